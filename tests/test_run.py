"""A whole run on real parts at nano size: prompts to LoRA file, and resume bit for bit."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from solrl_jax import train
from solrl_jax.config import Evaluate, Stage
from solrl_jax.run import assemble
from tests import nano

NAMES = {
    *("reward/mean", "reward/max", "reward/min", "reward/range", "reward_std_mean", "zero_std_ratio"),
    *("kl_div", "old_deviate", "grad_norm", "rank/spearman", "time/explore", "time/learn", "eval_reward_clipscore"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two iterations without interruption, and one iteration followed by a second with --resume."""
    folder = tmp_path_factory.mktemp("run")
    cfg = nano.build(folder)
    train.train(cfg, folder / "whole", devices=1)
    train.train(dataclasses.replace(cfg, iterations=1), folder / "parts", devices=1)
    train.train(cfg, folder / "parts", resume=True, devices=1)
    return folder


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_writes_what_the_readme_says(runs):
    run = runs / "whole"
    for name in (
        "report.html",
        "config.json",
        "grids/000000.png",
        "grids/000002.png",
        "current/pytorch_lora_weights.safetensors",
        "comfyui/nano.safetensors",
        "model_card.md",
    ):
        assert (run / name).stat().st_size > 0, name
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir()) == ["1", "2"]
    assert set(lines(run)[-1]) >= NAMES
    tensors = load_file(run / "pytorch_lora_weights.safetensors")
    assert len(tensors) == 2 * (4 + 3)  # one double block's q, k, v, out and one single block's q, k, v
    assert all(np.any(x) for x in tensors.values()), "a factor that never moved"


@pytest.mark.slow
def test_resume_is_bit_for_bit(runs):
    whole, parts = (load_file(runs / name / "pytorch_lora_weights.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        np.testing.assert_array_equal(value, parts[key])
    last = [
        {k: v for k, v in lines(runs / name)[-1].items() if not k.startswith("time")} for name in ("whole", "parts")
    ]
    assert last[0] == last[1]


@pytest.mark.slow
def test_a_run_on_a_card_with_fp8(tmp_path, monkeypatch):
    """auto means FP8 there: config.json says so, and a resumed run calibrates to the same units and rewards."""
    monkeypatch.setattr(assemble, "capability", lambda: 9.0)
    seen = []
    real = train.calibrated
    monkeypatch.setattr(train, "calibrated", lambda *given: seen.append(real(*given)) or seen[-1])
    cfg = nano.build(tmp_path, evaluate=Evaluate(every=0), explore=Stage(steps=2, precision="auto", chunk=4))
    train.train(cfg, tmp_path / "whole", devices=1)
    assert json.loads((tmp_path / "whole/config.json").read_text())["explore"]["precision"] == "fp8"
    train.train(dataclasses.replace(cfg, iterations=1), tmp_path / "parts", devices=1)
    train.train(cfg, tmp_path / "parts", resume=True, devices=1)
    units = {model.quant_rules.fp8.units for model in seen}
    assert len(seen) == 3 and len(units) == 1 and {2**-k for k in range(1, 12)} >= {unit for _, unit in units.pop()}
    rewards = [[line["reward/mean"] for line in lines(tmp_path / name)] for name in ("whole", "parts")]
    assert rewards[0] == rewards[1] and len(rewards[0]) == 2
