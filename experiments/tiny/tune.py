"""Which settings gain most in a long run? One seed each, several settings at once in one vmapped program.

    python -m experiments.tiny.tune                                # minutes on a GPU
    python -m experiments.tiny.tune --marks=1 --prompts=10 --chunk=20 --out=/tmp/tune.json      # short

Each setting is the long run (`evidence.LONG`: 64 prompts per iteration) with some fields of its config changed.
Settings that differ only in scalars of `Hyper` share a program. Measured after each of `--marks` iterations on the test
captions x 4, as in `evidence`.
"""

import argparse
import itertools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from experiments import evidence, lab, results
from experiments.tiny import check
from solrl_jax import config, device, sharding


def setting(rate: float, kl: float = 1e-4, more: Mapping[str, str] | None = None) -> dict[str, str]:
    return {"learn.learning_rate": f"{rate:g}", "learn.kl_weight": f"{kl:g}", **(more or {})}


SETTINGS: tuple[dict[str, str], ...] = (
    setting(5e-4, 0.03),
    setting(5e-4, 0.1),
    setting(5e-4, 0.3),
    setting(1e-3, 0.1),
    setting(1e-3, 0.3),
    setting(1e-3, 1.0),
    setting(5e-4, more={"learn.strength": "2"}),
    setting(5e-4, 0.3, {"learn.strength": "0.5"}),
    setting(1e-3, more={"learn.old_ramp": "0.01", "learn.old_max": "0.9"}),
    setting(5e-4, more=evidence.ALL_LINEARS),
    setting(5e-4, 0.1, evidence.ALL_LINEARS),
    setting(1e-3, 0.1, evidence.ALL_LINEARS),
)
AT_ONCE = 3


def main(argv: Sequence[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--marks", default="60,120", help="iterations after which to measure")
    parser.add_argument("--prompts", type=int, default=500, help="test captions")
    parser.add_argument("--chunk", type=int, default=500, help="pictures at a time while measuring")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--out", type=lambda p: check.HERE.joinpath(p), default=check.HERE / "results/tune.json")
    args = parser.parse_args(argv)
    marks = [int(m) for m in args.marks.split(",")]
    arms = [evidence.Arm("sol_rl", evidence.LONG | words, marks[-1], marks[0]) for words in SETTINGS]
    cfgs = [evidence.arm_config(arm) for arm in arms]
    keys = [evidence.what_is_compiled(arm, cfg) for arm, cfg in zip(arms, cfgs, strict=True)]
    seeds = [args.seed] * AT_ONCE
    began, figures = time.perf_counter(), {}

    with jax.set_mesh(sharding.make_mesh(1)), ThreadPoolExecutor(8) as pool:
        opened = lab.open_world(cfgs[0], args.prompts)
        programs = {key: pool.submit(evidence.compiled, opened, *key, seeds) for key in dict.fromkeys(keys)}
        stage = config.Stage(steps=10, chunk=min(args.chunk, 4 * args.prompts))
        base = lab.measure(opened, lab.base_adapter(opened), "test", stage=stage)
        groups = [list(g) for _, g in itertools.groupby(range(len(arms)), lambda i: keys[i])]
        for group in (g[i : i + AT_ONCE] for g in groups for i in range(0, len(g), AT_ONCE)):
            program, scalars = programs[keys[group[0]]].result(), [cfgs[i].learn for i in group]
            for done, states in evidence.train(opened, arms[group[0]], cfgs[group[0]], program, seeds, scalars):
                if done not in marks:
                    continue
                found = lab.measure(opened, states.lora, "test", stage=stage)
                for row, i in enumerate(group):
                    name = ", ".join(f"{k.split('.')[-1]} {v}" for k, v in SETTINGS[i].items())
                    for what in found:
                        gain = float((found[what][row] - base[what]).mean())
                        key = f"{name}, {done} iterations: gain of {what}"
                        figures[key] = results.figure(gain, "mean, one training seed", found[what][row].size)
                    gains = {k: round(float((v[row] - base[k]).mean()), 4) for k, v in found.items()}
                    print(f"{time.perf_counter() - began:7.1f} s ", name, done, gains, flush=True)
                results.record(args.out, figures, base={k: float(np.mean(v)) for k, v in base.items()})


if __name__ == "__main__":
    main()
