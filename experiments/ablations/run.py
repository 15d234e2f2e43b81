"""Sol-RL's choices, one at a time, on the small world: a JSON and a figure of the gains for each ablation.

    python -m experiments.ablations.run                                                    # minutes on a GPU
    python -m experiments.ablations.run --only=selection --iterations=1 --prompts=20 --seeds=0   # short, on a CPU

Every setting is `sol_rl` with one field changed. All train for the same number of iterations at the recipe's rate,
the seeds as one vmapped program. Results: gains over the base on the test captions, mean and standard error over
seeds, and seconds of an iteration at full FLUX.1-dev size on an H100 (methods/price.py). A setting that several
ablations share is trained once.
"""

import argparse
import functools
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax

from experiments import evidence, lab, results
from experiments.evidence import Arm
from experiments.methods import run as methods
from experiments.methods.price import price, prices
from solrl_jax import config, device, sharding, train

HERE = Path(__file__).resolve().parent


class Ablation(NamedTuple):
    """`claim` is the paper's; `settings` maps the label of a tick to an arm."""

    claim: str
    axis: str
    settings: Mapping[str, Arm]


def changed(field: str, *values: object, more: Mapping[str, str] | None = None) -> dict[str, Arm]:
    """One arm per value: `sol_rl` with `field` set to it."""
    return {str(v): Arm("sol_rl", {**(more or {}), field: str(v)}) for v in values}


ABLATIONS = {
    "pool": Ablation(
        "a larger pool helps: HPSv2 .3569, .3622, .3663, .3686 with N = 24, 48, 72, 96 of which 24 are kept",
        "candidates N, of which 8 are kept",
        changed("candidates", 24, 48, 96, 192),
    ),
    "kept": Ablation(
        "24 of 96 are kept; other numbers are not reported",
        "kept K of 48 candidates",
        changed("kept", 4, 8, 16, 24, more={"candidates": "48"}),
    ),
    "preview_steps": Ablation(
        "six steps are enough: HPSv2 .3587, .3650, .3686, .3659 with 2, 4, 6, 8",
        "steps of the preview",
        changed("explore.steps", 2, 4, 6, 8),
    ),
    "selection": Ablation(
        "the best and the worst are kept, for their contrast",
        "which 8 of 24 are kept",
        changed("selection", "best_worst", "max_variance", "top", "random"),
    ),
    "precision": Ablation(
        "the low-precision preview ranks as BF16 does",
        "precision of the preview",
        changed("explore.precision", "bf16", "fp8", "nvfp4_emulated"),
    ),
    "samples": Ablation(
        "training on low-precision samples peaks early and falls; two stages stay within 1 % of BF16 throughout",
        "what is trained on",
        {
            "two stages": Arm("sol_rl", {"explore.precision": "nvfp4_emulated"}),
            "BF16 throughout": Arm("naive_scaling"),
            "NVFP4 throughout": Arm("naive_quant"),
        },
    ),
    "old_policy": Ablation(
        "the policy that draws and anchors follows with c = min(.001 updates, .5) (DiffusionNFT)",
        "the most that the old policy keeps of itself, c",
        changed("learn.old_max", 0.0, 0.5, 0.9, more={"learn.old_ramp": "0.01"}),
    ),
}


def arm_of(arm: Arm, rate: float, iterations: int) -> Arm:
    overrides = {**arm.overrides, "learn.learning_rate": f"{rate:g}"}
    return arm._replace(overrides=overrides, iterations=iterations, every=iterations)


def gained(bench: methods.Bench, arm: Arm, cfg: config.Config, program) -> dict[str, dict]:
    """Figures of one setting after its last iteration, with the cost of an iteration."""
    *_, (done, states) = evidence.train(bench.opened, arm, cfg, program, bench.seeds)
    cost = sum(price(cfg, prices()).values())
    found = {}
    for split, base in bench.base.items():
        marks = methods.at_mark(split, done, done * cost, states, bench, base)
        found |= {name: f for name, f in marks.items() if " after " not in name}
    return found | {"cost of an iteration": results.figure(cost, "s on an H100 at full size", 1)}


def write(out: Path, name: str, found: Mapping[str, Mapping[str, dict]], bench: methods.Bench, rate: float) -> None:
    """Write the JSON and the figure of one ablation."""
    ablation = ABLATIONS[name]
    figures = {f"{label}: {what}": f for label, some in found.items() for what, f in some.items()}
    facts = {"claim": ablation.claim, "axis": ablation.axis, "seeds": list(bench.seeds), "rate": rate}
    results.record(out / f"{name}.json", figures, **facts)
    draw(out / f"{name}.json")


def draw(file: Path) -> None:
    """NAME.png beside NAME.json: three panels; per setting the mean with its standard error and one point per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = json.loads(file.read_text(encoding="utf-8"))
    labels = list(dict.fromkeys(name.partition(": ")[0] for name in data["figures"]))
    panels = {
        "test: gain of clipscore": "gain of CLIPScore",
        "test: gain of exact": "gain of captions all right",
        "test: spread of a caption's pictures": "spread, of the base's",
    }
    drawn, axes = plt.subplots(1, len(panels), figsize=(11, 3.4), layout="constrained")
    for panel, (what, title) in zip(axes, panels.items(), strict=True):
        for x, label in enumerate(labels):
            f = data["figures"][f"{label}: {what}"]
            panel.errorbar(x, f["value"], f["spread"]["error"], fmt="o", color="#0969da", capsize=4)
            panel.scatter([x] * len(f["spread"]["seeds"]), f["spread"]["seeds"], s=8, color="#8c959f", zorder=0)
        panel.set_xticks(range(len(labels)), labels, fontsize=8)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(data["axis"], fontsize=9)
        panel.grid(axis="y", alpha=0.25)
        panel.margins(x=0.2)
    drawn.savefig(file.with_suffix(".png"), dpi=130)
    plt.close(drawn)


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ABLATIONS))
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--iterations", type=int, default=60, help="of 16 prompts each, for every setting")
    parser.add_argument("--rate", type=float, default=1e-3, help="the learning rate; the default is the recipe's")
    parser.add_argument("--prompts", type=int, default=500, help="captions of each split")
    parser.add_argument("--chunk", type=int, default=500, help="pictures at a time while measuring")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    names, seeds = args.only.split(","), [int(s) for s in args.seeds.split(",")]
    if strange := [n for n in names if n not in ABLATIONS]:
        parser.error(f"--only: there is no {', '.join(strange)}; use of {', '.join(ABLATIONS)}")
    arms = {n: {k: arm_of(a, args.rate, args.iterations) for k, a in ABLATIONS[n].settings.items()} for n in names}
    cfgs = {n: {k: evidence.arm_config(a) for k, a in some.items()} for n, some in arms.items()}
    say = lab.stopwatch()
    with jax.set_mesh(sharding.make_mesh(1)), ThreadPoolExecutor(8) as pool:
        opened = lab.open_world(evidence.arm_config(Arm()), args.prompts)
        calibrated = opened._replace(parts=with_units(opened.parts))
        programs = {}
        for n, some in cfgs.items():
            for k, cfg in some.items():
                key = evidence.what_is_compiled(arms[n][k], cfg)
                if key not in programs:
                    programs[key] = pool.submit(evidence.compiled, calibrated, *key, seeds)
        measure = functools.partial(lab.measure, opened, at_once=args.chunk)
        base = lab.measure_base(opened, args.chunk)
        bench = methods.Bench(calibrated, seeds, measure, base, 0.0, 1, 0, 0, args.out, say)
        say(f"{len(programs)} programs for {', '.join(names)}")
        known: dict[config.Config, dict[str, dict]] = {}
        for n, some in cfgs.items():
            found = {}
            for k, cfg in some.items():
                if cfg not in known:
                    program = programs[evidence.what_is_compiled(arms[n][k], cfg)].result()
                    known[cfg] = gained(bench, arms[n][k], cfg, program)
                found[k] = known[cfg]
                say(n, k, {w: round(f["value"], 4) for w, f in found[k].items() if w.startswith("test: gain")})
            write(args.out, n, found, bench, args.rate)
        say("done")


def with_units(parts):
    """`parts` with a model that is calibrated for FP8; other precisions ignore the calibration."""
    low = config.override(parts.cfg, **{"explore.precision": "fp8"})
    return parts._replace(model=train.ready(parts._replace(cfg=low)).model)


if __name__ == "__main__":
    main()
