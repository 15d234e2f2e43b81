"""What the paper's tables claim beside what was measured on this world: results/claims.json.

    python -m experiments.emoji.claims

A claim holds if the whole 95 % interval of its estimate is above what is asked, does not hold if none of it is, and
cannot be told otherwise. Intervals are over captions for ranks, and over training seeds, paired, for the rest; each
stands alone. Ranks are those of the base. Seconds and the ablations are not measured here (experiments/efficiency and
experiments/ablations).
"""

import argparse
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from experiments import results
from experiments.methods.summary import BASELINE
from solrl_jax import device

HERE = Path(__file__).resolve().parent
Figures = Mapping[str, Mapping[str, Any]]


class Estimate(NamedTuple):
    """A value and its 95 % interval, of n captions or seeds."""

    value: float
    low: float
    high: float
    n: int


class Measured(NamedTuple):
    """Figures of ranks.json, of learning/results/summary.json, and by arm of results/samples; empty if not run.

    `weak_kl`: by arm of trainings at the published KL weight and a larger rate, results/samples_kl_1e-4.
    """

    ranks: Figures
    methods: Figures
    samples: Mapping[str, Figures]
    weak_kl: Mapping[str, Figures] = {}


class Claim(NamedTuple):
    """`estimate` raises KeyError for figures that were not measured; the claim is that it is above `least`."""

    text: str
    estimate: Callable[[Measured], Estimate]
    least: float
    paper: str


# --- estimates ------------------------------------------------------------------------------------------------------


def over_seeds(values: Float[np.ndarray, "R"]) -> Estimate:
    """Mean with Student's t; of one seed the interval is everything."""
    n, mean = len(values), float(values.mean())
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return Estimate(mean, mean - half, mean + half, n)


def rank(measured: Measured, figure: str) -> Estimate:
    f = measured.ranks[f"base, {figure}"]
    low, high = f["spread"]
    return Estimate(f["value"], low, high, f["n"])


def gain(measured: Measured, arm: str, than: str, what: str) -> Estimate:
    """How much more an arm gains than another at one cost."""
    one, other = (measured.methods[f"{name}: gain of {what}"]["spread"]["seeds"] for name in (arm, than))
    if len(one) != len(other):
        raise ValueError(f"{arm} has {len(one)} seeds and {than} {len(other)}: they cannot be paired")
    return over_seeds(np.subtract(one, other))


def times(measured: Measured, arm: str, share: str) -> Estimate:
    """How many times less an arm costs to reach a share of the baseline's gain; if it never does, 0 of any interval."""
    f = measured.methods[f"{arm}: {share} of {BASELINE}'s gain of CLIPScore"]
    if f["value"] is None:
        return Estimate(0.0, -math.inf, math.inf, f["n"])
    error = f["spread"]["error"] if f["spread"] else math.inf
    half = float(stats.t.ppf(0.975, f["n"] - 1)) * error if f["n"] > 1 else math.inf
    return Estimate(f["value"], f["value"] - half, f["value"] + half, f["n"])


def along(samples: Mapping[str, Figures], arm: str, what: str) -> dict[int, Float[np.ndarray, "R"]]:
    """A figure of each seed after so many iterations of a long training."""
    marks = {
        int(name.split()[2]): np.array(f["spread"]["seeds"])
        for name, f in samples[arm].items()
        if name.startswith(f"{what} after ")
    }
    return dict(sorted(marks.items()))


def ended(measured: Measured, arm: str, than: str, what: str) -> Estimate:
    """An arm's figure over another's, at the last mark that both have."""
    one, other = along(measured.samples, arm, what), along(measured.samples, than, what)
    last = max(one.keys() & other.keys())
    return over_seeds(one[last] / other[last])


def fallen(measured: Measured, arm: str, what: str, weak_kl: bool = False) -> Estimate:
    """How far each seed ends below the best mark. The other seeds say which that is: the best of several noisy marks
    would be above the last one by chance."""
    samples = measured.weak_kl if weak_kl else measured.samples
    marks = np.stack([*along(samples, arm, what).values()])
    runs = range(marks.shape[1])
    best = [np.delete(marks, r, axis=1).mean(axis=1).argmax() if len(runs) > 1 else marks.argmax() for r in runs]
    return over_seeds(marks[best, runs] - marks[-1])


# --- the claims -----------------------------------------------------------------------------------------------------

SIX = "NVFP4, 6 steps"
_part = functools.partial
CLAIMS = (
    Claim("NVFP4 previews of 6 steps rank by CLIPScore: Spearman", _part(rank, figure=f"{SIX}: Spearman"), 0.9, ".900"),
    Claim(
        "the same: the share of the best 12 that it finds",
        _part(rank, figure=f"{SIX}: overlap of the best 12"),
        0.933,
        ".933; its definition is not published",
    ),
    *(
        Claim(
            f"at one cost Sol-RL gains more {what} than {name}",
            _part(gain, arm="sol_rl", than=name, what=what),
            0.0,
            f"{paper} on FLUX" if what == "CLIPScore" else "more of three held-out rewards",
        )
        for what in ("CLIPScore", "captions all right")
        for name, paper in (
            ("diffusionnft", ".3089 against .2991"),
            ("awm", ".3089 against .3039"),
            ("flow_grpo", ".3089 against .2884"),
            ("dance_grpo", ".3089 against .2898"),
        )
    ),
    *(
        Claim(
            f"{arm} gains more CLIPScore than {than}",
            _part(gain, arm=arm, than=than, what="CLIPScore"),
            0.0,
            paper,
        )
        for arm, than, paper in (
            ("diffusionnft", "flow_grpo", ".2991 against .2884"),
            ("diffusionnft", "dance_grpo", ".2991 against .2898"),
            ("awm", "flow_grpo", ".3039 against .2884"),
            ("awm", "dance_grpo", ".3039 against .2898"),
        )
    ),
    Claim(
        "Sol-RL reaches DiffusionNFT's gain of CLIPScore at how many times less cost",
        _part(times, arm="sol_rl", share="100%"),
        2.42,
        "2.42 to 4.64, ImageReward",
    ),
    Claim(
        "Sol-RL ends within 1 % of naive in CLIPScore, after equally many iterations: the ratio",
        _part(ended, arm="sol_rl", than="naive_scaling", what="clipscore"),
        0.99,
        ".3688 / .3699 of HPSv2",
    ),
    Claim(
        "trained on the NVFP4 samples themselves, CLIPScore falls from its best",
        _part(fallen, arm="naive_quant", what="clipscore"),
        0.0,
        "peaks early and falls",
    ),
    Claim(
        "the same at a KL weight of 1e-4 and a rate of 1e-3",
        _part(fallen, arm="naive_quant", what="clipscore", weak_kl=True),
        0.0,
        "peaks early and falls, at 1e-4 and 3e-4",
    ),
    Claim(
        "Sol-RL ends with more CLIPScore than training on the NVFP4 samples: the ratio",
        _part(ended, arm="sol_rl", than="naive_quant", what="clipscore"),
        1.0,
        "higher",
    ),
)


def verdict(found: Estimate, least: float) -> str:
    if found.low > least:
        return "holds"
    return "does not hold" if found.high <= least else "cannot be told"


def judged(claim: Claim, measured: Measured) -> dict[str, Any]:
    """A figure whose unit says the verdict; without a value if it was not run."""
    said = f"above {claim.least:g} asked; the paper's {claim.paper}"
    try:
        found = claim.estimate(measured)
    except KeyError:
        return results.figure(None, f"not run; {said}", 0)
    except ValueError as e:
        return results.figure(None, f"cannot be told ({e}); {said}", 0)
    interval = [found.low, found.high] if math.isfinite(found.low) else None  # one seed has none
    return results.figure(found.value, f"{verdict(found, claim.least)}; {said}", found.n, interval)


def read(home: Path) -> Measured:
    """What there is of a world's results."""

    def figures(file: Path) -> Figures:
        return json.loads(file.read_text(encoding="utf-8"))["figures"] if file.is_file() else {}

    def by_arm(folder: Path) -> Mapping[str, Figures]:
        return {file.stem: figures(file) for file in sorted(folder.glob("*.json"))}

    here = home / "results"
    return Measured(
        figures(here / "ranks.json"),
        figures(home / "learning/results/summary.json"),
        by_arm(here / "samples"),
        by_arm(here / "samples_kl_1e-4"),
    )


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=HERE, help="the folder of results/ and learning/results/")
    args = parser.parse_args(argv)
    measured = read(args.home)
    figures = {claim.text: judged(claim, measured) for claim in CLAIMS}
    for text, f in figures.items():
        print(f"{f['unit'].partition(';')[0]:14} {results.cell(f)}  {text}", flush=True)
    results.record(args.home / "results/claims.json", figures)


if __name__ == "__main__":
    main()
