"""results/summary.json and results/curves.png, made from results/arms/*.json; then the README's tables.

    python -m experiments.methods.summary
    python -m experiments.methods.summary --results=experiments/emoji/learning/results

A curve is the mean over seeds at each mark, the band its 95 % interval (Student's t over seeds). Arms are compared at
one cost, that of the arm which ends first, and by the cost of reaching a share of DiffusionNFT's gain there; both are
read straight between marks. Seeds are paired: run i of every arm meets the same prompts in the same order. An arm that
was stopped before its end is left out, for it would lower the cost at which all are compared; a line and a figure say
so.
"""

import argparse
import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from experiments import results

HERE = Path(__file__).resolve().parent
BASELINE = "diffusionnft"
SHARES = (0.25, 0.5, 0.75, 1.0)
PANELS = {
    "test: gain of clipscore": "gain of CLIPScore, which is trained",
    "test: gain of exact": "gain of captions all right (the judge, held out)",
}
COMPARED = {
    "CLIPScore": "test: gain of clipscore",
    "captions all right": "test: gain of exact",
    "facts right": "test: gain of share of facts",
}


class Curve(NamedTuple):
    """Of one arm: cost at each mark in s, 0 first, and what each seed had gained."""

    cost: Float[np.ndarray, "M"]
    gains: Float[np.ndarray, "M R"]

    @property
    def mean(self) -> Float[np.ndarray, "M"]:
        return self.gains.mean(axis=1)

    @property
    def half_width(self) -> Float[np.ndarray, "M"]:
        """Of the 95 % interval; 0 for one seed, of which nothing is known."""
        n = self.gains.shape[1]
        if n == 1:
            return np.zeros(len(self.cost))
        return stats.t.ppf(0.975, n - 1) * self.gains.std(axis=1, ddof=1) / np.sqrt(n)

    def at(self, cost: float) -> Float[np.ndarray, "R"]:
        """What each seed has gained at a cost."""
        return np.stack([np.interp(cost, self.cost, seed) for seed in self.gains.T])

    def of(self, seeds: list[int]) -> "Curve":
        """The same with some of the seeds."""
        return self._replace(gains=self.gains[:, seeds])


def curve(file: Path, what: str) -> Curve:
    """The marks of one figure of an arm's file. ValueError if it has none."""
    found = marks(file, what)
    if not found:
        raise ValueError(f"{file} has no marks of {what!r}: run experiments.methods.run")
    cost, gains = zip(*found, strict=True)
    return Curve(np.array([0, *cost]), np.array([[0.0] * len(gains[0]), *gains]))


def marks(file: Path, what: str) -> list[tuple[float, list[float]]]:
    """(cost in s, what each seed has gained) at each mark; none if a training was stopped before its first."""
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
    named = [
        (re.fullmatch(rf"{re.escape(what)} after \d+ iterations, (\d+) s", name), f) for name, f in figures.items()
    ]
    return sorted((float(m[1]), f["spread"]["seeds"]) for m, f in named if m)


def stopped(file: Path) -> float | None:
    """The cost in s of the last mark, 0 without one, of an arm that was stopped before its end; None for a whole one.

    Older files have a budget at most: with .9 of it an arm is whole there, because it is met in whole iterations.
    """
    last = min(max((cost for cost, _ in marks(file, what)), default=0.0) for what in COMPARED.values())
    return None if last > 0 and last >= end_of(file) else last


def end_of(file: Path) -> float:
    """The cost in s at which a whole arm ends, or the least of it; 0 if its file does not say."""
    facts = json.loads(file.read_text(encoding="utf-8"))
    return facts.get("ends_at", 0.9 * facts.get("budget", 0))


def rates(file: Path) -> dict[str, dict[str, Any]]:
    """By rate what it gained of CLIPScore in half the budget; nothing for a control, whose rate is its method's."""
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
    tried = {
        re.fullmatch(r"rate (\S+): gain of clipscore after \d+ iterations", name): f for name, f in figures.items()
    }
    return {match[1]: f for match, f in tried.items() if match}


def cost_of(c: Curve, gain: float) -> float | None:
    """Where the mean curve first reaches `gain`; None where it never does."""
    reached = np.flatnonzero(c.mean >= gain)
    if not len(reached):
        return None
    i = int(reached[0])
    if i == 0:
        return 0.0
    a, b = c.mean[i - 1 : i + 1]
    return float(c.cost[i - 1] + (gain - a) / (b - a) * (c.cost[i] - c.cost[i - 1]))


def speed(c: Curve, baseline: Curve, goal: float, share: float) -> float | None:
    """How many times less than the baseline `c` costs up to a share of what the baseline has gained at cost `goal`."""
    gain = share * float(baseline.at(goal).mean())
    cost, own = cost_of(c, gain), cost_of(baseline, gain)
    return own / cost if own and cost else None


def mean(by_seed: Float[np.ndarray, "R"], unit: str) -> dict[str, Any]:
    """A figure: the mean over seeds with its standard error, and each seed's value."""
    error = float(by_seed.std(ddof=1) / np.sqrt(len(by_seed))) if len(by_seed) > 1 else 0.0
    spread = {"seeds": [round(float(x), 4) for x in by_seed], "error": error}
    return results.figure(
        float(by_seed.mean()), f"{unit}; mean over seeds, and its standard error", len(by_seed), spread
    )


def jackknifed(of: Callable[[list[int]], float | None], seeds: int, unit: str) -> dict[str, Any]:
    """The figure of(all seeds), its standard error from leaving out each seed in turn, where all of those exist."""
    everyone = list(range(seeds))
    value = of(everyone)
    without = [of([s for s in everyone if s != one]) for one in everyone] if seeds > 1 else []
    known = [v for v in without if v is not None]
    if value is None or len(known) < seeds or not known:
        return results.figure(value, unit, seeds)
    error = float(np.sqrt((seeds - 1) * np.var(known)))
    return results.figure(value, f"{unit}; and its jackknife standard error over seeds", seeds, {"error": error})


def summary(files: Mapping[str, Path]) -> dict[str, dict]:
    """Of every arm its gains at one cost, those less the baseline's, and how fast it reaches shares of its gain.

    And what each rate that was tried gained, which chose the arm's.
    """
    out = {f"{name}: rate {rate}": f for name, file in files.items() for rate, f in rates(file).items()}
    curves = {name: {of: curve(file, what) for of, what in COMPARED.items()} for name, file in files.items()}
    goal = float(min(c.cost[-1] for some in curves.values() for c in some.values()))
    for name, some in curves.items():
        for of, c in some.items():
            baseline, seeds = curves[BASELINE][of], c.gains.shape[1]
            out[f"{name}: gain of {of}"] = mean(c.at(goal), f"over the base, at {goal:.0f} s on an H100")
            if seeds == baseline.gains.shape[1]:
                less = c.at(goal) - baseline.at(goal)
                out[f"{name}: gain of {of} less {BASELINE}'s"] = mean(less, "at the same cost, seed by seed")
            for share in SHARES:
                label, unit = f"{name}: {share:.0%} of {BASELINE}'s gain of {of}", f"times less cost than {BASELINE}"

                def times(kept: list[int], c=c, baseline=baseline, share=share) -> float | None:
                    return speed(c.of(kept), baseline.of(kept), goal, share)

                out[label] = jackknifed(times, min(seeds, baseline.gains.shape[1]), unit)
                cost = cost_of(c, share * float(baseline.at(goal).mean()))
                out[f"{label}: cost"] = results.figure(cost, "s on an H100; none where it is not reached", seeds)
    return out


def draw(files: Mapping[str, Path], to: Path) -> None:
    """Two panels: the trained reward and the judge against cost, a line and a band an arm; controls are dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from experiments.methods.run import BORROWED

    figure, panels = plt.subplots(1, len(PANELS), figsize=(12, 4.2), layout="constrained")
    colours = dict(zip(files, itertools.cycle(matplotlib.color_sequences["tab10"]), strict=False))
    for panel, (what, title) in zip(panels, PANELS.items(), strict=True):
        for name, file in files.items():
            c, hours = (found := curve(file, what)), found.cost / 3600
            line = "--" if name in BORROWED else "-"
            panel.plot(hours, c.mean, line, color=colours[name], label=name, lw=1.3 if name in BORROWED else 1.9)
            low, high = c.mean - c.half_width, c.mean + c.half_width
            panel.fill_between(hours, low, high, color=colours[name], alpha=0.1, lw=0)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("cost: hours of one H100 at full FLUX.1-dev size")
        panel.grid(alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(to, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    from experiments.methods.run import ARMS

    files = {name: file for name in ARMS if (file := args.results / f"arms/{name}.json").is_file()}
    left_out = {name: cost for name, file in files.items() if (cost := stopped(file)) is not None}
    for name, cost in left_out.items():
        when = f"at {cost:.0f} s, before its end" if cost else "before its first mark"
        print(f"{name} is left out: it was stopped {when}")
    files = {name: file for name, file in files.items() if name not in left_out}
    if BASELINE not in files:
        parser.error(
            f"--results={args.results}: there is no whole arms/{BASELINE}.json to compare with: run "
            f"experiments.methods.run --arms={BASELINE}"
        )
    ends = {name: end for name, file in files.items() if (end := end_of(file))}
    if ends and max(ends.values()) > 1.25 * min(ends.values()):
        each = ", ".join(f"{name} {end:.0f} s" for name, end in ends.items())
        parser.error(f"--results={args.results}: arms of unlike budgets end at {each}: run them with the same --budget")
    unit = "s on an H100; before its end, so it is not compared"
    told = {f"{name}: stopped at": results.figure(cost, unit, 1) for name, cost in left_out.items()}
    results.record(args.results / "summary.json", summary(files) | told)
    draw(files, args.results / "curves.png")
    if (args.results.parent / "README.md").is_file():
        results.fill(args.results.parent / "README.md")


if __name__ == "__main__":
    main()
