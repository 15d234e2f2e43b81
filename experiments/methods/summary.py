"""results/summary.json and results/curves.png, made from results/arms/*.json; then the README's tables.

    python -m experiments.methods.summary

A curve is the mean over seeds at each mark, the band its 95 % interval (Student's t over seeds). The cost of reaching a
share of DiffusionNFT's final gain is read off the mean curve, straight between marks.
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

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


def curve(file: Path, what: str) -> Curve:
    """The marks of one figure of an arm's file."""
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
    marks = [
        (re.fullmatch(rf"{re.escape(what)} after \d+ iterations, (\d+) s", name), f) for name, f in figures.items()
    ]
    found = sorted((float(m[1]), f["spread"]["seeds"]) for m, f in marks if m)
    if not found:
        raise ValueError(f"{file} has no marks of {what!r}: run experiments.methods.run")
    cost, gains = zip(*found, strict=True)
    return Curve(np.array([0, *cost]), np.array([[0.0] * len(gains[0]), *gains]))


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


def summary(files: Mapping[str, Path]) -> dict[str, dict]:
    """Costs of the shares of the baseline's gain, in s and as a multiple of the baseline's own."""
    out = {}
    for what, of in (("clipscore", "CLIPScore"), ("exact", "captions all right")):
        curves = {name: curve(file, f"test: gain of {what}") for name, file in files.items()}
        goal = curves[BASELINE].mean[-1]
        for name, c in curves.items():
            for share in SHARES:
                cost, own = cost_of(c, share * goal), cost_of(curves[BASELINE], share * goal)
                label = f"{name}: {share:.0%} of {BASELINE}'s gain of {of}"
                if cost is None or not own:
                    out[label] = results.figure(None, "never reached within the budget", c.gains.shape[1])
                else:
                    unit = f"s on an H100; {own / cost:.2f} x as fast as {BASELINE}"
                    out[label] = results.figure(round(cost), unit, c.gains.shape[1])
    return out


def draw(files: Mapping[str, Path], to: Path) -> None:
    """Two panels: the trained reward and the judge against cost, a line and a band an arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(PANELS), figsize=(11, 4.2), layout="constrained")
    styles = [(c, line) for line in ("-", "--") for c in matplotlib.color_sequences["tab10"][:5]]
    for panel, (what, title) in zip(panels, PANELS.items(), strict=True):
        for (name, file), (colour, line) in zip(files.items(), styles, strict=False):
            c = curve(file, what)
            panel.plot(c.cost / 3600, c.mean, line, color=colour, label=name, lw=1.6)
            panel.fill_between(
                c.cost / 3600, c.mean - c.half_width, c.mean + c.half_width, color=colour, alpha=0.12, lw=0
            )
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("cost: hours of one H100 at full FLUX.1-dev size")
        panel.grid(alpha=0.25)
    panels[0].legend(fontsize=8)
    figure.savefig(to, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    from experiments.methods.run import ARMS

    files = {name: args.results / f"arms/{name}.json" for name in ARMS}
    files = {name: file for name, file in files.items() if file.is_file()}
    if BASELINE not in files:
        parser.error(f"--results={args.results}: there is no arms/{BASELINE}.json to compare with")
    results.record(args.results / "summary.json", summary(files))
    draw(files, args.results / "curves.png")
    if (args.results.parent / "README.md").is_file():
        results.fill(args.results.parent / "README.md")


if __name__ == "__main__":
    main()
