"""Rollout and whole iteration of a model at full size: 96 candidates in BF16, and in two stages in BF16 and below.

    python -m experiments.efficiency.run --model=flux                               # an H100; flux2, sd35, sana, zimage
    python -m experiments.efficiency.run --model=tiny --prompts=4 --forms="naive;branch" --out=/tmp/e.json   # in short

The paper's table, against our own compiled BF16 rollout: naive is all candidates in BF16 with the full steps, of which
the kept are learnt from (`naive_scaling`); two stages in BF16 are the control that the low precision is measured by.
Random weights. What is learnt is the same in all three, so its time is measured once. The file is written after every
form; `--more` measures those that a command cut short did not come to.
"""

import argparse
import functools
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import fields, results
from experiments.full_size import Bench, alike, iterations
from solrl_jax import config, device, iteration, sharding
from solrl_jax.config import Config
from solrl_jax.plan import shapes
from solrl_jax.run import assemble

HERE = Path(__file__).resolve().parent
NAIVE = "naive, BF16"
VARIANTS = {
    NAIVE: ("naive_scaling", {}),
    "two stages, BF16": ("sol_rl", {"explore.precision": "bf16"}),
    "two stages, low precision": ("sol_rl", {}),
    "branch, low precision": ("branch", {}),
}


def stage_times(bench: Bench, cfg: Config, learn: bool) -> list[dict[str, float]]:
    """Seconds by stage of `bench.repeat` iterations; without learning where that is known."""
    bench.cfg, bench.statics = cfg, {**bench.statics, "cfg": cfg}
    rows, compiling = iterations(iteration.Staged(score=bench.sizes.score, **bench.statics), bench, learn)
    print("compile:", ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in compiling.items()), flush=True)
    return rows


def figures_of(measured: dict[str, list[dict[str, float]]], prompts: int) -> dict[str, dict]:
    """Medians of stages and their sums, a prompt, and how many times as long the naive form takes, if it is measured.

    The first of `measured` has what learning takes.
    """
    rolled = {name: [sum(row.values()) - row["learn"] for row in rows] for name, rows in measured.items()}
    naive = rolled.get(NAIVE)
    learn = [row["learn"] for row in next(iter(measured.values()))]
    figure = functools.partial(results.figure, n=len(learn))

    def seconds(found: Sequence[float]) -> dict[str, Any]:
        each = [x / prompts for x in found]
        spread = [round(min(each), 3), round(max(each), 3)] if len(each) > 1 else None
        return figure(statistics.median(each), "s a prompt; median [least, most]", spread=spread)

    def times(name: str, form: Sequence[float], also: float = 0.0) -> dict[str, Any]:
        if naive is None:
            return {}
        ratio = (statistics.median(naive) + also) / (statistics.median(form) + also)
        return {f"{name}, naive over it": figure(ratio, "times")}

    out = {"learn": seconds(learn)}
    for name, rollout in rolled.items():
        whole = [x + statistics.median(learn) for x in rollout]
        out |= {f"{name}: {stage}": seconds([row[stage] for row in measured[name]]) for stage in measured[name][0]}
        out |= {f"{name}: rollout": seconds(rollout), **times(f"{name}: rollout", rollout)}
        out |= {f"{name}: end to end": seconds(whole)}
        out |= times(f"{name}: end to end", rollout, statistics.median(learn))
        del out[f"{name}: learn"]
    return out


def known(file: Path, facts: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    """The forms in `file`. Raises ValueError if they were measured on another device, version or with other `facts`."""
    data, here = json.loads(file.read_text(encoding="utf-8")), {**results.machine(), **facts}
    if other := [k for k, v in here.items() if data.get(k) != v]:
        told = "; ".join(f"{k}: {data.get(k)!r} there, {here[k]!r} here" for k in other)
        raise ValueError(f"--more: {file} was measured under other conditions ({told}): measure all forms anew")
    return data["seconds"]


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux", help="a config: flux, flux2, sd35, sana, zimage")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="count the first iteration of several too: it was compiled")
    fields.add_argument(parser)
    parser.add_argument("--out", type=Path, help="default: results/MODEL.json")
    parser.add_argument("--more", action="store_true", help="measure only the forms that --out does not have")
    parser.add_argument(
        "--forms",
        default="",
        help="parts of the forms' names, with semicolons, in this order: others are left out; without naive no ratios",
    )
    args = parser.parse_args(argv)
    out = args.out or HERE / f"results/{args.model}.json"
    assemble.use_compilation_cache()
    words = alike(f"{args.model}:sol_rl", {"prompts": str(args.prompts), **dict(args.set)})
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(sharding.make_mesh(1)):

        def variant(recipe: str, changes: dict[str, str]) -> Config:
            named = config.load(f"{args.model}:{recipe}", {**words, **changes})
            return assemble.resolved(shapes.with_configs(named, folder), assemble.capability())

        wanted = [part.strip() for part in args.forms.split(";")]
        cfgs = {n: variant(*how) for part in wanted for n, how in VARIANTS.items() if part in n}
        if not cfgs or NAIVE in list(cfgs)[1:]:
            parser.error(f"--forms={args.forms}: take parts of {'; '.join(VARIANTS)}; the naive form, if any, first")
        low = next((cfg for cfg in cfgs.values() if cfg.low_precision), next(iter(cfgs.values())))
        bench = Bench(low, sharding.make_mesh(1), args.repeat)
        bench.first = bench.first and not args.all
        facts = {"model": args.model, "precision": bench.cfg.low_precision, "prompts": args.prompts}
        facts |= {"candidates": bench.cfg.candidates, "kept": bench.cfg.kept}
        measured = known(out, facts) if args.more else {}
        bench.encode()
        for name, cfg in cfgs.items():
            if name in measured:
                continue
            measured[name] = stage_times(bench, cfg, learn=not measured)
            figures = figures_of(measured, args.prompts)
            results.record(out, figures, **facts, seconds=measured)
            for figure, f in figures.items():
                if figure.startswith(name):
                    print(f"{results.cell(f):>24}  {figure}", flush=True)


if __name__ == "__main__":
    main()
