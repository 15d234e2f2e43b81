"""A run is killed, really, and goes on; clocks go backwards; a reward raises in the middle."""

import time

import pytest

from experiments.faults import run as faults
from solrl_jax import checkpoint, config, train
from tests.test_train import compiled, metrics_of, toy

__all__ = ["compiled", "toy"]  # fixtures


@pytest.mark.slow
def test_killed_runs_end_as_unbroken_ones_do(tmp_path):
    """SIGKILL at three moments, one of them inside a save (the thirty: experiments/faults)."""
    struck = faults.attack(tmp_path / "broken", 40, kills=3, in_saves=1)
    assert len(struck) == 3 and any(kill.in_save for kill in struck)
    assert all(kill.after >= kill.before for kill in struck)
    assert not faults.strike(tmp_path / "whole", 40, lambda seconds: False)
    assert faults.same(tmp_path / "broken", tmp_path / "whole")
    assert faults.newest(tmp_path / "broken") == 40


def test_a_clock_that_goes_backwards_changes_nothing(toy, tmp_path, monkeypatch):
    """Wall time is only shown: a run under a clock that runs backwards has the same numbers."""
    train.train(toy, tmp_path / "plain", devices=1)
    now = time.time
    for clock in ("time", "perf_counter"):
        monkeypatch.setattr(time, clock, lambda: 2e9 - now())
    train.train(toy, tmp_path / "backwards", devices=1)
    assert metrics_of(tmp_path / "plain") == metrics_of(tmp_path / "backwards")


def test_a_second_process_in_a_run_is_refused_before_anything_is_read(toy, tmp_path, monkeypatch):
    train.train(config.override(toy, iterations=1), tmp_path / "run", devices=1)
    before = (tmp_path / "run/metrics.jsonl").read_text()
    monkeypatch.setattr(train.assemble, "assemble", lambda *_: pytest.fail("weights were read"))
    with checkpoint.alone(tmp_path / "run"), pytest.raises(checkpoint.CheckpointError, match="another process"):
        train.train(toy, tmp_path / "run", resume=True, devices=1)
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
