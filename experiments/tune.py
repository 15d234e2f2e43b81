"""Which settings of an update gain most in a long training? One seed each, several settings as one vmapped program.

    python -m experiments.tune                                     # results/tune.json of the small world; a GPU
    python -m experiments.tune --world=emoji                       # of the emoji world
    python -m experiments.tune --marks=1 --prompts=10 --chunk=20 --out=/tmp/tune.json      # short

A world's `Sweep` is a recipe whose config is changed in a few fields by each setting. Settings that differ only in
scalars of `Hyper` share a program. They are measured after each of `--marks` iterations, on captions that no other
experiment measures: a setting chosen by the test captions would be better on those than on any others.
"""

import argparse
import functools
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments import evidence, lab, results, worlds
from experiments.evidence import ALL_LINEARS
from solrl_jax import device, sharding

Overrides = Mapping[str, str]


class Sweep(NamedTuple):
    """Settings of a recipe, beside what is `common` to all; measured after each of `marks`, numbers of iterations.

    A program is compiled for `at_once` runs: as many settings that share one, or a multiple of it, are neighbours.
    """

    recipe: str
    common: Overrides
    settings: Sequence[Overrides]
    at_once: int
    marks: str


def setting(rate: float, kl: float = 1e-4, more: Overrides | None = None) -> Overrides:
    return {"learn.learning_rate": f"{rate:g}", "learn.kl_weight": f"{kl:g}", **(more or {})}


SWEEPS = {
    "tiny": Sweep(
        "sol_rl",
        evidence.LONG,
        (
            setting(5e-4, 0.03),
            setting(5e-4, 0.1),
            setting(5e-4, 0.3),
            setting(1e-3, 0.1),
            setting(1e-3, 0.3),
            setting(1e-3, 1.0),
            setting(5e-4, more={"learn.strength": "2"}),
            setting(5e-4, 0.3, {"learn.strength": "0.5"}),
            setting(1e-3, more={"learn.old_ramp": "0.01", "learn.old_max": "0.9"}),
            setting(5e-4, more=ALL_LINEARS),
            setting(5e-4, 0.1, ALL_LINEARS),
            setting(1e-3, 0.1, ALL_LINEARS),
        ),
        at_once=3,
        marks="60,120",
    ),
    "emoji": Sweep(
        "branch",
        {},
        tuple(
            setting(rate, kl, targets)
            for targets in ({}, ALL_LINEARS)
            for kl in (0.03, 0.1)
            for rate in (2.5e-4, 5e-4, 1e-3)
        ),
        at_once=6,
        marks="100,300",
    ),
}


def groups(keys: Sequence[object], at_once: int) -> list[list[int]]:
    """Places of settings that train together: neighbours that share a program, at most `at_once` of them."""
    alike = [list(group) for _, group in itertools.groupby(range(len(keys)), lambda i: keys[i])]
    return [group[i : i + at_once] for group in alike for i in range(0, len(group), at_once)]


def main(argv: Sequence[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    worlds.add_arguments(parser)
    parser.add_argument("--marks", help="iterations after which to measure; the world's if not given")
    parser.add_argument("--prompts", type=int, default=500, help="captions to measure on")
    parser.add_argument("--chunk", type=int, default=500, help="pictures at a time while measuring")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--out", type=Path, default="results/tune.json", help="a file, relative to the world's folder")
    args = parser.parse_args(argv)
    world, sweep = worlds.of(args), SWEEPS[args.world]
    marks = [int(m) for m in (args.marks or sweep.marks).split(",")]
    arms = [evidence.Arm(sweep.recipe, {**sweep.common, **words}, marks[-1], marks[0]) for words in sweep.settings]
    cfgs = [evidence.arm_config(arm, world) for arm in arms]
    keys = [evidence.what_is_compiled(arm, cfg) for arm, cfg in zip(arms, cfgs, strict=True)]
    seeds = [args.seed] * sweep.at_once
    say, figures = lab.stopwatch(), {}

    with jax.set_mesh(sharding.make_mesh(1)), ThreadPoolExecutor(8) as pool:
        opened = lab.with_choosing(lab.open_world(cfgs[0], 1), args.prompts, args.seed)
        programs = {key: pool.submit(evidence.compiled, opened, *key, seeds) for key in dict.fromkeys(keys)}
        measure = functools.partial(lab.measure, opened, split="choosing", at_once=args.chunk)
        base = measure(lab.base_adapter(opened))
        for group in groups(keys, sweep.at_once):
            arm, cfg, program = arms[group[0]], cfgs[group[0]], programs[keys[group[0]]].result()
            learns = [cfgs[i].learn for i in group]
            for done, states in evidence.train(opened, arm, cfg, program, seeds, learns):
                if done not in marks:
                    continue
                found = measure(states.lora)
                for row, i in enumerate(group):
                    name = ", ".join(f"{k.split('.')[-1]} {v}" for k, v in sweep.settings[i].items())
                    for what in found:
                        gain = float((found[what][row] - base[what]).mean())
                        key = f"{name}, {done} iterations: gain of {what}"
                        figures[key] = results.figure(gain, "mean, one training seed", found[what][row].size)
                    gains = {k: round(float((v[row] - base[k]).mean()), 4) for k, v in found.items()}
                    say(name, done, gains)
                results.record(world.home / args.out, figures, base={k: float(np.mean(v)) for k, v in base.items()})


if __name__ == "__main__":
    main()
