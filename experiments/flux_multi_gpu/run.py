"""The same iteration of FLUX.1-dev on one device and on several: prompts a second, efficiency, and equal gradients.

    python -m experiments.flux_multi_gpu.run --out=experiments/flux_multi_gpu/results/scaling.json    # 2 GPUs
    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
    python -m experiments.flux_multi_gpu.run --config=tiny:sol_rl --each=4 --out=/tmp/s.json       # the path in short

Random weights at full size, `--each` prompts a device, so that perfect scaling keeps the seconds and multiplies the
prompts. Gradients are those of one update on the same samples, on one device and on all.
"""

import argparse
import functools
import gc
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import results
from experiments.full_size import Bench, work
from solrl_jax import algos, config, device, learn, sharding
from solrl_jax.config import Config
from solrl_jax.plan import shapes
from solrl_jax.run import assemble
from solrl_jax.structs import leaves_by_path


def gradient(bench: Bench, cfg: Config) -> dict[str, np.ndarray]:
    """One update's gradient of made-up samples: `cfg.prompts` prompts, as many samples of each as a micro-batch takes.

    The adapter is a random one: a fresh one's down factors have no gradient.
    """
    state, model = bench.state(), bench.sizes.model
    moved = bench.drawn(state.lora)
    kept = max(1, cfg.learn.micro_batch // cfg.times)
    keys = jax.random.split(jax.random.key(1), (cfg.prompts, kept))
    x0 = jax.vmap(jax.vmap(model.noise))(keys)
    advantage = jnp.tile(jnp.linspace(-2.0, 2.0, kept), (cfg.prompts, 1))
    split = functools.partial(sharding.split, mesh=bench.mesh)
    every = config.override(cfg, **{"learn.reference_every": "1"})  # a device has one micro-batch a prompt
    step = jax.jit(functools.partial(learn.gradients, model=model, cfg=every))
    keys, samples, advantage = map(split, (keys, algos.Sample(x0), advantage))
    found, _ = step(state._replace(lora=moved), state, bench.frozen, bench.prompts.cond, keys, samples, advantage)
    return {path: np.asarray(x, np.float64) for path, x in leaves_by_path(jax.device_get(found)).items()}


def apart(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """|a - b| / |a| over all leaves."""
    return float(np.sqrt(sum(np.sum((a[k] - b[k]) ** 2) for k in a) / sum(np.sum(a[k] ** 2) for k in a)))


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="flux:sol_rl")
    parser.add_argument("--each", type=int, default=1, help="prompts a device")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    assemble.use_compilation_cache()
    count = jax.device_count()
    figures, gradients, rate = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        named = config.load(args.config, {"prompts": str(args.each * count)})
        for devices in (1, count):
            mesh = sharding.make_mesh(devices)
            # The gradients of as many prompts as all devices have; the iteration of `each` a device.
            cfg = assemble.resolved(shapes.with_configs(named, folder), assemble.capability())
            few = config.override(cfg, prompts=str(args.each * devices))
            tflop = work(few, devices)
            with jax.set_mesh(mesh):
                bench = Bench(cfg, mesh, args.repeat)
                bench.encode()
                gradients[devices] = gradient(bench, cfg)
                bench.resize(few)
                bench.iterations(tflop)
                seconds = bench.figures["iteration"]["value"]
                rate[devices] = args.each * devices / seconds
                figures |= {f"{devices} devices: {name}": figure for name, figure in bench.figures.items()}
                figures[f"{devices} devices: prompts a second"] = results.figure(rate[devices], "1/s", args.repeat)
            del bench
            gc.collect()
    figures["efficiency"] = results.figure(rate[count] / (count * rate[1]), "of perfect scaling", args.repeat)
    figures["gradients apart"] = results.figure(apart(gradients[1], gradients[count]), "|a - b| / |a|", 1)
    results.record(args.out, figures, config=config.to_json(named))
    print(f"efficiency {figures['efficiency']['value']:.3f}, gradients apart {figures['gradients apart']['value']:.2e}")


if __name__ == "__main__":
    main()
