"""How far FLUX.1-dev's velocity is from float32's in every precision, at full size with random weights.

    python -m experiments.precision.errors --out=experiments/precision/results/errors.json                # an H100
    python -m experiments.precision.errors --config=tiny --out=/tmp/e.json                       # the path in short

Relative error |v - v32| / |v32| of two pictures at three noise levels; float32 products are exact ones, not TF32.
FP8's units are calibrated first, as a run does.
"""

import argparse
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import results
from experiments.flux_h100.run import drawn
from solrl_jax import assemble, config, quant, sharding, sizes
from solrl_jax.models import flux_dev
from solrl_jax.quant.calibrate import calibrated

PRECISIONS = ("bf16", "fp8", "nvfp4_emulated")
SIGMAS = (0.9, 0.5, 0.1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="flux")
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    assemble.use_compilation_cache()
    # Only errors are looked at here: kernels need not be the fastest.
    compiled = functools.partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0} if _on_gpu() else {})
    figures = {}
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(sharding.make_mesh(1)):
        here = {"model.path": str(flux_dev.write(folder))} if args.config.startswith("flux") else {}
        cfg = config.load(args.config, {"explore.precision": "bf16", **here})
        low = config.override(cfg, **{"model.dtype": "bfloat16"})
        high = config.override(cfg, **{"model.dtype": "float32"})
        found = sizes.read(low, 1)
        model, exact = found.model, assemble.model_module(high).make(high.model)
        base = drawn(found.frozen.base)
        cond = drawn(sizes.batch(found.prompts.cond, args.pictures))
        x = jax.vmap(model.noise)(jax.random.split(jax.random.key(0), args.pictures))
        times = [jnp.full((args.pictures,), sigma) for sigma in SIGMAS]
        truth = {}
        with jax.default_matmul_precision("highest"):
            velocity = compiled(lambda base, *given: exact.velocity({"params": base}, *given))
            full = jax.tree.map(lambda w: w.astype(jnp.float32), base)
            truth = [np.asarray(velocity(full, x, t, cond), np.float64) for t in times]
            jax.tree.map(lambda w: w.delete(), full)
        model = calibrated(model, {"params": base}, cond, jax.random.key(1), 3)
        for precision in PRECISIONS:
            variables = {"params": base}
            if precision != "bf16":
                rule = quant.rule_of(model.quant_rules, precision)
                make = compiled(functools.partial(quant.quantise_tree, rule=rule, precision=precision))
                variables["quant"] = make(base)
            velocity = compiled(model.velocity)
            for sigma, t, v32 in zip(SIGMAS, times, truth, strict=True):
                v = np.asarray(velocity(variables, x, t, cond), np.float64)
                error = float(np.linalg.norm(v - v32) / np.linalg.norm(v32))
                figures[f"{precision}, sigma {sigma}"] = results.figure(error, "of |v|", args.pictures)
                print(f"{error:.4f}  {precision} sigma {sigma}", flush=True)
            del variables
    results.record(args.out, figures, config=config.to_json(cfg))


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu"


if __name__ == "__main__":
    main()
