"""Rollout and whole iteration of a model at full size: 96 candidates in BF16, and in two stages in BF16 and below.

    python -m experiments.efficiency.run --model=flux                               # an H100; sd35, sana
    python -m experiments.efficiency.run --model=tiny --prompts=4 --out=/tmp/e.json     # the path in short

The paper's table, against our own compiled BF16 rollout: naive is all candidates in BF16 with the full steps, of which
the kept are learnt from (`naive_scaling`); two stages in BF16 are the control that the low precision is measured by.
Random weights. What is learnt is the same in all three, so its time is measured once.
"""

import argparse
import functools
import statistics
import tempfile
from pathlib import Path

import jax

from experiments import results
from experiments.full_size import Bench
from solrl_jax import assemble, config, iteration, sharding, sizes
from solrl_jax.config import Config

HERE = Path(__file__).resolve().parent
VARIANTS = {
    "naive, BF16": ("naive_scaling", {}),
    "two stages, BF16": ("sol_rl", {"explore.precision": "bf16"}),
    "two stages, low precision": ("sol_rl", {}),
}


def stage_times(bench: Bench, cfg: Config, learn: bool) -> list[dict[str, float]]:
    """Seconds by stage of `bench.repeat` iterations after a first one; without learning where it is known."""
    bench.cfg, bench.statics = cfg, {**bench.statics, "cfg": cfg}
    staged, state, rows = iteration.Staged(score=bench.sizes.score, **bench.statics), bench.state(), []
    if not learn:
        staged.jit["learn"] = lambda state, *_: (state, {})
    for _ in range(bench.repeat + 1):
        times: dict[str, float] = {}
        staged(state, bench.frozen, bench.prompts, times)
        rows.append(times)
    return rows[1:]


def figures_of(rolled: dict[str, list[float]], learn: list[float]) -> dict[str, dict]:
    """Medians, and how many times as long the naive form takes."""
    out, naive = {}, statistics.median(rolled["naive, BF16"])
    learning = statistics.median(learn)
    figure = functools.partial(results.figure, n=len(learn))
    for name, seconds in rolled.items():
        rollout = statistics.median(seconds)
        spread = [round(min(seconds), 3), round(max(seconds), 3)]
        out[f"{name}: rollout"] = figure(rollout, "s a prompt; median [least, most]", spread=spread)
        out[f"{name}: rollout, naive over it"] = figure(naive / rollout, "times")
        out[f"{name}: end to end"] = figure(rollout + learning, "s a prompt")
        out[f"{name}: end to end, naive over it"] = figure((naive + learning) / (rollout + learning), "times")
    return out | {"learn": figure(learning, "s a prompt", spread=[round(min(learn), 3), round(max(learn), 3)])}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux", help="a config: flux, sd35, sana")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--set", default="", help="config words, field=value with commas: reward=clipscore")
    parser.add_argument("--out", type=Path, help="default: results/MODEL.json")
    args = parser.parse_args(argv)
    assemble.use_compilation_cache()
    words = {"prompts": str(args.prompts), **dict(w.split("=", 1) for w in filter(None, args.set.split(",")))}
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(sharding.make_mesh(1)):

        def variant(recipe: str, changes: dict[str, str]) -> Config:
            named = config.load(f"{args.model}:{recipe}", {**words, **changes})
            return assemble.resolved(sizes.with_configs(named, folder), assemble.capability())

        cfgs = {name: variant(*how) for name, how in VARIANTS.items()}
        bench = Bench(cfgs["two stages, low precision"], sharding.make_mesh(1), args.repeat)
        bench.encode()
        rolled: dict[str, list[float]] = {}
        learn: list[float] = []
        for name, cfg in cfgs.items():
            rows = stage_times(bench, cfg, learn=not learn)
            learn = learn or [row["learn"] for row in rows]
            rolled[name] = [sum(s for stage, s in row.items() if stage != "learn") / args.prompts for row in rows]
            print(f"{name}: {rows}", flush=True)
        figures = figures_of(rolled, [s / args.prompts for s in learn])
        for name, f in figures.items():
            print(f"{results.cell(f):>24}  {name}", flush=True)
        facts = {"model": args.model, "precision": cfgs["two stages, low precision"].low_precision}
        results.record(args.out or HERE / f"results/{args.model}.json", figures, **facts)


if __name__ == "__main__":
    main()
