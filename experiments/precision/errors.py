"""Error of a model's velocity in each precision against float32, at full width with random weights.

    python -m experiments.precision.errors --layers=1,2 --out=experiments/precision/results/three_blocks.json
    python -m experiments.precision.errors --config=sd35:sol_rl --layers=2 --set=model.size=512 --out=...
    python -m experiments.precision.errors --config=tiny:sol_rl --out=/tmp/e.json                       # a short run

Relative error |v - v32| / |v32| of a picture at three noise levels; float32 products are exact, not TF32. FP8 is
calibrated first, as in a run. `--layers=1,2`, one double and two single blocks, takes minutes on two cores; all 19 and
38 need a card of 80 GB.
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import fields, results
from experiments.full_size import drawn
from solrl_jax import config, device, quant, sharding
from solrl_jax.plan import shapes
from solrl_jax.quant import coverage
from solrl_jax.quant.calibrate import calibrated
from solrl_jax.run import assemble

PRECISIONS = ("bf16", "fp8", "nvfp4_emulated")
SIGMAS = (0.9, 0.5, 0.1)


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="flux:sol_rl")
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--layers", default="", help="number of blocks; for FLUX 1,2: double, single")
    fields.add_argument(parser, "config fields: model.min_dim=1000")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    assemble.use_compilation_cache()
    figures = {}
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(sharding.make_mesh(1)):
        named = config.load(args.config, {"explore.precision": "bf16", **dict(args.set)})
        cfg = shapes.with_configs(named, folder)
        if args.layers:
            shallow(Path(folder), [int(n) for n in args.layers.split(",")])
        low = config.override(cfg, **{"model.dtype": "bfloat16"})
        high = config.override(cfg, **{"model.dtype": "float32"})
        found = shapes.read(low, 1)
        model, exact = found.model, assemble.model_module(high).make(high.model)
        base = drawn(found.frozen.base)
        cond = drawn(shapes.batch(found.prompts.cond, args.pictures))
        x = jax.vmap(model.noise)(jax.random.split(jax.random.key(0), args.pictures))
        times = [jnp.full((args.pictures,), sigma) for sigma in SIGMAS]
        truth = {}
        velocity = jax.jit(lambda base, *given: exact.velocity({"params": base}, *given))
        full = jax.tree.map(lambda w: w.astype(jnp.float32), base)
        truth = [np.asarray(velocity(full, x, t, cond), np.float64) for t in times]
        jax.tree.map(lambda w: w.delete(), full)
        model = calibrated(model, {"params": base}, cond, jax.random.key(1), [config.Stage(3, "euler")])
        for precision in PRECISIONS:
            variables = {"params": base}
            if precision != "bf16":
                rule = quant.rule_of(model.quant_rules, precision)
                share = coverage.share(coverage.uses(model, precision), "flops")
                figures[f"{precision}: quantised"] = results.figure(share, "of the Linears' FLOPs", 1)
                make = jax.jit(functools.partial(quant.quantise_tree, rule=rule, precision=precision))
                variables["quant"] = make(base)
            velocity = jax.jit(model.velocity)
            for sigma, t, v32 in zip(SIGMAS, times, truth, strict=True):
                v = np.asarray(velocity(variables, x, t, cond), np.float64)
                error = float(np.linalg.norm(v - v32) / np.linalg.norm(v32))
                figures[f"{precision}, sigma {sigma}"] = results.figure(error, "relative", args.pictures)
                print(f"{error:.4f}  {precision} sigma {sigma}", flush=True)
            del variables
    results.record(args.out, figures, config=config.to_json(named))


def shallow(folder: Path, layers: Sequence[int]) -> None:
    """Set the numbers of blocks in the public configs in `folder`."""
    file = folder / "transformer/config.json"
    few = dict(zip(("num_layers", "num_single_layers"), layers, strict=False))
    file.write_text(json.dumps(json.loads(file.read_text()) | few))


if __name__ == "__main__":
    main()
