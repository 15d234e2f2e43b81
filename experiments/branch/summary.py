"""results/summary.json and results/curves.png from the other results, then the README's tables.

    python -m experiments.branch.summary

How many times less a branch costs than naive and DiffusionNFT up to 75 % of DiffusionNFT's final gain of the trained
reward, with the 95 % bootstrap interval over seeds; and every arm's gains at one cost, and after equally many
iterations. Curves are read straight between marks; seed i meets the same prompts in the same order in every arm.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from experiments import results
from experiments.methods.summary import COMPARED, Curve, cost_of, curve, mean

HERE = Path(__file__).resolve().parent
PRECISIONS = {"fp8": "FP8", "nvfp4_emulated": "NVFP4", "bf16": "BF16"}
ARMS = ("diffusionnft", "naive_scaling", "sol_rl", "branch", "branch_4")
SHARE = 0.75
DRAWS = 10_000


def by_iteration(file: Path, what: str) -> Curve:
    """A figure's marks against iterations in the place of cost."""
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
    marks = [(re.fullmatch(rf"{re.escape(what)} after (\d+) iterations, \d+ s", n), f) for n, f in figures.items()]
    found = sorted((float(m[1]), f["spread"]["seeds"]) for m, f in marks if m)
    done, gains = zip(*found, strict=True)
    return Curve(np.array([0.0, *done]), np.array([[0.0] * len(gains[0]), *gains]))


def goal_of(baseline: Curve) -> float:
    """The gain that is compared: SHARE of what the baseline ends with."""
    return SHARE * float(baseline.gains[-1].mean())


def times_less(c: Curve, other: Curve, baseline: Curve) -> dict[str, Any]:
    """other's cost of the goal over c's; the interval is of seeds drawn again, the same in all arms and in the goal."""
    seeds, rng = c.gains.shape[1], np.random.default_rng(0)

    def ratio(kept: list[int]) -> float | None:
        costs = [cost_of(x.of(kept), goal_of(baseline.of(kept))) for x in (other, c)]
        return costs[0] / costs[1] if costs[0] and costs[1] else None

    whole = ratio(list(range(seeds)))
    drawn = [ratio(list(rng.integers(0, seeds, seeds))) for _ in range(DRAWS)]
    known = [x for x in drawn if x is not None]
    if whole is None or len(known) < DRAWS:
        return results.figure(whole, "times; no interval, for some draws do not reach it", seeds)
    interval = [float(q) for q in np.quantile(known, [0.025, 0.975])]
    return results.figure(whole, "times; 95 % bootstrap over seeds", seeds, interval)


def summary(files: dict[str, Path]) -> dict[str, dict]:
    out: dict[str, dict] = {}
    trained = {name: curve(file, COMPARED["CLIPScore"]) for name, file in files.items()}
    goal = float(min(c.cost[-1] for c in trained.values()))
    baseline = trained["diffusionnft"]
    for name, c in trained.items():
        cost = cost_of(c, goal_of(baseline))
        out[f"{name}: cost of 75 %"] = results.figure(cost, "s on an H100", c.gains.shape[1])
        for other in ("diffusionnft", "naive_scaling", "sol_rl"):
            if other != name:
                out[f"{name}: times less than {other}"] = times_less(c, trained[other], baseline)
    equal = min(int(by_iteration(f, COMPARED["CLIPScore"]).cost[-1]) for f in files.values())
    for what, label in COMPARED.items():
        at_cost = {name: curve(file, label).at(goal) for name, file in files.items()}
        at_count = {name: by_iteration(file, label).at(equal) for name, file in files.items()}
        for name in files:
            out[f"{name}: {what} at one cost"] = mean(at_cost[name], f"gain over the base at {goal:.0f} s")
            out[f"{name}: {what} after {equal} iterations"] = mean(at_count[name], "gain over the base")
            if name.startswith("branch"):
                less = mean(at_cost[name] - at_cost["naive_scaling"], "at one cost, seed by seed")
                out[f"{name}: {what} less naive's"] = less
                less = mean(at_count[name] - at_count["sol_rl"], "after equally many iterations, seed by seed")
                out[f"{name}: {what} less restart's, iterations"] = less
    return out


def crossed(file: Path) -> dict[str, dict]:
    """contrast.json's figures by form, so that a table has a row for each."""
    out: dict[str, dict] = {}
    for name, f in json.loads(file.read_text(encoding="utf-8"))["figures"].items():
        at, _, what = name.partition(": ")
        who, precision, *form = at.split(", ")
        if form:
            out[f"{form[0]}: {what}, {PRECISIONS[precision]}, {who}"] = f
    return out


def long_runs(folder: Path) -> dict[str, dict]:
    """Gains along 400 iterations, by arm and rate."""
    out: dict[str, dict] = {}
    for file in sorted(folder.glob("rate_*/*.json")):
        for what in ("clipscore", "exact"):
            for name, f in json.loads(file.read_text(encoding="utf-8"))["figures"].items():
                if match := re.fullmatch(rf"test: gain of {what} after (\d+) iterations, \d+ s", name):
                    rate = file.parent.name.replace("rate_", "rate ")
                    out[f"{file.stem}, {rate}: {what} after {match[1]}"] = f
    return out


def draw(files: dict[str, Path], to: Path) -> None:
    """The trained reward and the judge, against cost above and iterations below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    shown = (
        (curve, COMPARED["CLIPScore"], 3600, "gain of CLIPScore, trained", "hours of an H100 at FLUX's size"),
        (curve, COMPARED["captions all right"], 3600, "gain of captions all right, judged", "the same"),
        (by_iteration, COMPARED["CLIPScore"], 1, "gain of CLIPScore, trained", "iterations"),
    )
    for panel, (read, what, unit, title, below) in zip(panels, shown, strict=True):
        for name, file in files.items():
            c = read(file, what)
            (line,) = panel.plot(c.cost / unit, c.mean, label=name)
            low, high = c.mean - c.half_width, c.mean + c.half_width
            panel.fill_between(c.cost / unit, low, high, alpha=0.12, color=line.get_color(), lw=0)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(below)
        panel.grid(alpha=0.25)
    panels[0].legend(fontsize=8)
    figure.savefig(to, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    files = {name: HERE / f"results/arms/{name}.json" for name in ARMS}
    contrasts, long = crossed(HERE / "results/contrast.json"), long_runs(HERE / "results/long")
    results.record(HERE / "results/summary.json", {**summary(files), **contrasts, **long})
    draw(files, HERE / "results/curves.png")
    results.fill(HERE / "README.md")


if __name__ == "__main__":
    main()
