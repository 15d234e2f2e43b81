"""Alarms over a run's metrics, the measurement of the preview's ranks, and falling back to BF16 exploration."""

import types

import jax
import pytest

from solrl_jax import assemble, config, train, watch
from solrl_jax.config import Config, ConfigError, Watch
from tests.test_checkpoint import state_at
from tests.test_train import compiled, metrics_of, toy

__all__ = ["compiled", "toy"]  # fixtures
CFG = Config()


def lines(**series):
    """Metrics of iterations 1, 2, ...; the base's evaluation before them."""
    rows = [dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True)]
    return [
        {"iteration": 0, "eval_reward_avg": 0.5},
        *({"iteration": i + 1, "loss": 1.0, **row} for i, row in enumerate(rows)),
    ]


def test_collapsed_groups():
    assert watch.alarms(lines(zero_std_ratio=[0.1] * 5 + [1.0, 0.2, 0.9, 0.2, 0.2]), CFG) == {}  # the median is .2
    found = watch.alarms(lines(zero_std_ratio=[0.0] * 5 + [0.6, 0.75, 0.5, 0.9, 0.75]), CFG)
    assert list(found) == ["collapsed"] and found["collapsed"].startswith("warning: 75% of the prompts have one reward")
    assert watch.alarms(lines(zero_std_ratio=[1.0] * 4), CFG) == {}  # too few to tell


@pytest.mark.parametrize("name", ["kl_div", "old_deviate"])
def test_runaway_distances(name):
    kind = {"kl_div": "kl_div", "old_deviate": "old"}[name]
    steady = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 6e-3, 8e-3, 9e-3]  # 12 times in 5 iterations, then slower
    assert watch.alarms(lines(**{name: [*steady, 9e-3, 9e-3, 9e-3, 9e-3, 9e-3]}), CFG) == {}
    assert list(watch.alarms(lines(**{name: [0.1] * 5 + [0.3] * 5}), CFG)) == [kind]  # far
    found = watch.alarms(lines(**{name: [4e-4] * 5 + [5e-3] * 5}), CFG)  # near, but 12.5 times as far as it was
    assert "is 0.005, 5 iterations ago it was 0.0004" in found[kind]
    assert watch.alarms(lines(**{name: [1e-6] * 5 + [1e-4] * 5}), CFG) == {}  # next to nothing may grow
    assert watch.alarms(lines(**{name: [None] * 5 + [1.0] * 5}), CFG) == {}
    grpo = config.load("flux:flow_grpo")
    assert watch.alarms(lines(**{name: [0.1] * 5 + [0.3] * 5}), grpo) == {}


def test_bad_ranks():
    found = watch.alarms([{"iteration": 4, "watch/spearman": 0.8}, {"iteration": 8, "watch/spearman": 0.31}], CFG)
    assert "Spearman 0.31, below watch.rank=0.5" in found["ranks"] and "explore.precision=bf16" in found["ranks"]
    assert watch.alarms([{"iteration": 4, "watch/spearman": 0.31}, {"iteration": 8, "watch/spearman": 0.8}], CFG) == {}


def test_a_preview_in_bf16_has_nothing_to_fall_back_to():
    cfg = config.override(CFG, **{"explore.precision": "bf16", "watch.fall_back": "true"})
    low = [{"iteration": 4, "watch/spearman": 0.31}]
    assert watch.alarms(low, cfg)["ranks"].endswith("raise explore.steps")
    state, fp8 = state_at(1), config.override(cfg, **{"explore.precision": "fp8"})
    for rank, how, flag in ((0.31, cfg, 0), (0.31, fp8, 1), (0.5, fp8, 0), (float("nan"), fp8, 0)):
        assert int(watch.judged(state, {"watch/spearman": rank}, how).fallen_back) == flag
    warned = config.override(fp8, **{"watch.fall_back": "false"})
    assert int(watch.judged(state, {"watch/spearman": 0.31}, warned).fallen_back) == 0


def test_when_it_is_due():
    cfg = config.override(CFG, **{"watch.every": "4"})
    assert [done for done in range(1, 13) if watch.due(cfg, done)] == [4, 8, 12]
    assert not watch.due(config.override(CFG, **{"watch.every": "0"}), 4)
    assert not any(watch.due(config.load("tiny:diffusionnft"), done) for done in range(1, 60))
    for change, message in (
        ({"every": -1}, "watch.every=-1"),
        ({"prompts": 0}, "watch.prompts=0"),
        ({"rank": 2.0}, "watch.rank=2.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Watch(**change)


def test_a_preview_like_the_full_rollout_ranks_like_it(toy):
    """As many steps, same solver: Spearman, overlap and contrast are 1; on two devices two prompts at a time."""
    cfg = config.override(toy, **{"watch.prompts": "3", "candidates": "8", "kept": "4", "explore.chunk": "8"})
    for steps, solver, devices in ((4, "dpm2", 2), (1, "euler", 1)):
        changed = config.override(cfg, **{"explore.steps": str(steps), "explore.solver": solver})
        parts = assemble.assemble(changed, devices)
        with jax.set_mesh(parts.mesh):
            found = watch.measured(parts, assemble.fresh(parts))
        assert set(found) == {"watch/spearman", "watch/overlap", "watch/kept_contrast"}
        assert (found["watch/spearman"] == pytest.approx(1, abs=1e-6)) == (steps == 4)
        assert -1 <= found["watch/kept_contrast"] <= 1 + 1e-6


def test_of_fewer_prompts_than_asked_for_all_are_measured(toy, tmp_path):
    """Three training prompts on two devices, and watch.prompts=4, the default: two are measured."""
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    parts = assemble.assemble(config.override(toy, **{"prompts": "2"}), 2)
    with jax.set_mesh(parts.mesh):
        assert "watch/spearman" in watch.measured(parts, assemble.fresh(parts))


def test_a_run_falls_back_to_bf16_and_a_resumed_one_stays_there(toy, tmp_path, capsys, monkeypatch):
    """Measured as it begins and after each second iteration: a step does not rank as 4 do, as watch.rank=1 asks."""
    nothing = types.SimpleNamespace(check=lambda *_: None, uses=lambda *_: [], report=lambda *_: [])
    monkeypatch.setattr(assemble, "coverage", nothing)  # the toy has no Linear to quantise
    low = {"explore.precision": "nvfp4_emulated", "watch.every": "2", "watch.rank": "1", "watch.prompts": "2"}
    low |= {"evaluate.every": "0", "explore.steps": "1", "candidates": "8", "kept": "4", "explore.chunk": "8"}
    cfg = config.override(toy, iterations=4, **low)
    train.train(cfg, tmp_path / "warned", devices=1)
    said = capsys.readouterr().out
    assert said.count("warning: the preview ranks candidates unlike the full rollout") == 1
    assert "exploring in bf16" not in said
    found = metrics_of(tmp_path / "warned")
    assert [i for i in found if "watch/spearman" in found[i]] == [0, 2, 4] and found[0]["watch/spearman"] < 1
    cfg = config.override(cfg, **{"watch.fall_back": "true"})
    train.train(cfg, tmp_path / "fell", devices=1)
    said = capsys.readouterr().out
    assert said.count("exploring in bf16 from iteration 1 on") == 1 and "it goes on in bf16" in said
    fell = metrics_of(tmp_path / "fell")
    assert fell[0] == found[0] and [i for i in fell if "watch/spearman" in fell[i]] == [0]
    train.train(config.override(cfg, iterations=5), tmp_path / "fell", resume=True, devices=1)
    assert capsys.readouterr().out.count("exploring in bf16 from iteration 5 on") == 1
