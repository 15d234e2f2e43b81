"""experiments/emoji: claims against made-up results, and the figure of widths."""

import json

import numpy as np
import pytest

from experiments import results
from experiments.emoji import claims, widths
from experiments.emoji.claims import Claim, Estimate, Measured

SEEDS = ([0.5, 0.5, 0.5], [0.75, 0.8, 0.85], [0.6, 0.7, 0.65])
"""A long training of three seeds at marks 50, 100 and 150: it is best at the second."""


def by_seed(*seeds):
    return results.figure(0.0, "", 1, {"seeds": list(seeds), "error": 0.0})


def training(*marks):
    return {f"clipscore after {50 * (i + 1)} iterations, 9 image-steps": by_seed(*m) for i, m in enumerate(marks)}


MEASURED = Measured(
    {"base, NVFP4, 6 steps: Spearman": results.figure(0.92, "", 200, [0.91, 0.93])},
    {
        "sol_rl: gain of CLIPScore": by_seed(0.3, 0.5),
        "awm: gain of CLIPScore": by_seed(0.2, 0.2),
        "sol_rl: 100% of diffusionnft's gain of CLIPScore": results.figure(3.0, "", 5, {"error": 0.5}),
        "awm: 100% of diffusionnft's gain of CLIPScore": results.figure(None, "", 5),
    },
    {"naive_quant": training(*SEEDS), "sol_rl": training(*SEEDS[::-1]), "short": training(*SEEDS[:2])},
    {"naive_quant": training(*SEEDS[:2])},
)


@pytest.mark.parametrize(
    "estimate, expect",
    [
        (claims.rank(MEASURED, "NVFP4, 6 steps: Spearman"), (0.92, 0.91, 0.93, 200)),
        (claims.gain(MEASURED, "sol_rl", "awm", "CLIPScore"), (0.2, 0.2 - 1.2706, 0.2 + 1.2706, 2)),  # 12.706 x .1
        (claims.times(MEASURED, "sol_rl", "100%"), (3.0, 3 - 1.3882, 3 + 1.3882, 5)),  # 2.7764 x .5
        (claims.times(MEASURED, "awm", "100%"), (0.0, -float("inf"), float("inf"), 5)),  # never reached
        (claims.fallen(MEASURED, "naive_quant", "clipscore"), (0.15, 0.02579, 0.27421, 3)),  # .15, .1, .2
        (claims.fallen(MEASURED, "short", "clipscore"), (0.0, 0.0, 0.0, 3)),  # best at its end
        (claims.fallen(MEASURED, "naive_quant", "clipscore", weak_kl=True), (0.0, 0.0, 0.0, 3)),
        (claims.ended(MEASURED, "sol_rl", "short", "clipscore"), (1.0, 1.0, 1.0, 3)),  # at the second mark
        (claims.over_seeds(np.array([0.5])), (0.5, -float("inf"), float("inf"), 1)),
    ],
)
def test_estimates_and_their_intervals(estimate, expect):
    assert tuple(estimate) == pytest.approx(expect, abs=1e-4)


def test_arms_of_other_seeds_are_not_paired():
    one = MEASURED.methods["awm: gain of CLIPScore"]
    methods = {**MEASURED.methods, "awm: gain of CLIPScore": {**one, "spread": {"seeds": [0.1], "error": 0.0}}}
    claim = next(c for c in claims.CLAIMS if c.text == "at one cost Sol-RL gains more CLIPScore than awm")
    found = claims.judged(claim, MEASURED._replace(methods=methods))
    assert found["value"] is None and found["unit"].startswith("cannot be told (sol_rl has 2 seeds and awm 1")


@pytest.mark.parametrize(
    "interval, said",
    [((0.91, 0.93), "holds"), ((0.89, 0.95), "cannot be told"), ((0.8, 0.9), "does not hold")],
)
def test_a_verdict_is_of_the_whole_interval(interval, said):
    assert claims.verdict(Estimate(0.9, interval[0], interval[1], 3), 0.9) == said


def test_a_claim_is_a_figure():
    claim = Claim("ranks", lambda m: claims.rank(m, "NVFP4, 6 steps: Spearman"), 0.9, ".900")
    found = claims.judged(claim, MEASURED)
    assert found == results.figure(0.92, "holds; above 0.9 asked; the paper's .900", 200, [0.91, 0.93])
    assert claims.judged(claim, Measured({}, {}, {}))["unit"] == "not run; above 0.9 asked; the paper's .900"


def test_what_was_not_run_is_said(tmp_path):
    """Claims read the files that the experiments write, and name what is missing."""
    results.record(tmp_path / "results/ranks.json", dict(MEASURED.ranks))
    for folder in ("samples", "samples_kl_1e-4"):
        file = tmp_path / "results" / folder / "naive_quant.json"
        results.record(file, dict(MEASURED.samples["naive_quant"]))
    claims.main([f"--home={tmp_path}"])
    figures = json.loads((tmp_path / "results/claims.json").read_text())["figures"]
    assert len(figures) == len(claims.CLAIMS)
    told = {text: f["unit"].partition(";")[0] for text, f in figures.items()}
    run = [text for text, verdict in told.items() if verdict != "not run"]
    assert len(run) == 3 and set(told.values()) == {"holds", "not run"}


def ranks(folder, name, value):
    found = {
        f"base, {precision}, 6 steps: {what}": results.figure(value + i / 10, "", 1)
        for i, precision in enumerate(widths.PRECISIONS)
        for what in widths.FIGURES
    }
    results.record(folder / name, found)


def test_ranks_against_width(tmp_path, capsys):
    ranks(tmp_path, "ranks.json", 0.7)
    with pytest.raises(SystemExit):
        widths.main([f"--results={tmp_path}"])
    assert "ranks of two widths or more are needed, here are 1" in capsys.readouterr().err
    ranks(tmp_path, "ranks_160.json", 0.5)
    widths.main([f"--results={tmp_path}"])
    drawn = (tmp_path / "widths.svg").read_text()
    assert drawn.count('data-x="160 384"') == 6 and drawn.count('data-y="0.6 0.8"') == 2  # FP8's in both panels
    assert all(name in drawn for name in widths.PRECISIONS)
