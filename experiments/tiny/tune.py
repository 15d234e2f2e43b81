"""Which settings teach best in the default run's 40 iterations? Settings x seeds as vmapped programs.

    python -m experiments.tiny.tune --out=/tmp/tune.json           # a GPU's minutes

Scalars (learning rate, strength, old policy) share a program; sizes (updates, times, prompts) need one each.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from experiments.tiny import evidence, lab
from solrl_jax import sharding

SETTINGS = [
    {"learning_rate": r, "old_ramp": ramp, "old_max": m, "strength": b}
    for r in (5e-4, 1e-3, 2e-3)
    for ramp, m in ((1e-3, 0.5), (1e-2, 0.9))
    for b in (1.0, 0.3, 0.1)
]
SIZES = {
    "default": {},
    "updates=8": {"learn.updates": "8"},
    "updates=2": {"learn.updates": "2"},
    "times=9": {"learn.timestep_fraction": "0.9", "learn.micro_batch": "9"},
    "epochs=2": {"learn.epochs": "2"},
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--marks",
        default="40",
        help="iterations after which to measure, multiples of the first; later ones for the default sizes alone",
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--limit", type=int, default=99)
    parser.add_argument("--sizes", default=",".join(SIZES))
    args = parser.parse_args(argv)
    began = time.time()

    def say(*what):
        print(f"{time.time() - began:6.1f}", *what, flush=True)

    marks = [int(m) for m in args.marks.split(",")]
    half = marks[0]
    arms = {n: evidence.Arm(overrides=SIZES[n], every=half) for n in args.sizes.split(",")}
    cfgs = {n: evidence.arm_config(arm) for n, arm in arms.items()}
    settings = [s for s in SETTINGS for _ in range(args.seeds)][: args.limit]
    seeds = [100 + i % args.seeds for i in range(len(settings))]
    with jax.set_mesh(sharding.make_mesh(1)):
        world = lab.open_world(next(iter(cfgs.values())))
        say("world open")
        states = lab.begin(world, world.parts.cfg, settings, seeds)
        rows = lab.picks(world, world.parts.cfg, seeds, 0, marks[-1])
        with ThreadPoolExecutor(8) as pool:
            waiting = {n: pool.submit(evidence.compiled, world, arms[n], cfgs[n], seeds) for n in arms}
        programs = {n: program.result() for n, program in waiting.items()}
        say("compiled")
        base = {k: v.mean() for k, v in lab.measure(world, lab.base_adapter(world), "test").items()}
        say("base", {k: round(float(v), 4) for k, v in base.items()})
        out = {"base": base, "settings": settings, "found": {}}
        for name, run in programs.items():
            state, now = states, time.time()
            for at in range(0, marks[-1] if name == "default" else half, half):
                state, metrics = jax.block_until_ready(
                    run(state, world.table, world.parts.frozen, rows[at : at + half])
                )
                if at + half not in marks:
                    continue
                say(name, at + half, f"{(time.time() - now) / (at + half):.3f} s an iteration")
                found = lab.measure(world, state.lora, "test")
                means = {k: v.mean((1, 2)).tolist() for k, v in found.items()}
                out["found"][f"{name} at {at + half}"] = means
                for i, setting in enumerate(settings):
                    gains = " ".join(f"{k} {means[k][i] - base[k]:+.3f}" for k in means)
                    print("   ", *setting.values(), gains, f"r {np.asarray(metrics['reward/mean'])[-5:, i].mean():.3f}")
                say("measured")
            args.out.write_text(json.dumps(out, default=float))
        say("done")


if __name__ == "__main__":
    main()
