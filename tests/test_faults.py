"""A run is killed, really, and goes on; clocks go backwards; a reward raises in the middle."""

import time

import jax
import numpy as np
import pytest

from experiments.faults import run as faults
from solrl_jax import checkpoint, config, iteration, recipes, train
from tests.test_train import compiled, interrupt_at, metrics_of, toy

__all__ = ["compiled", "toy"]  # fixtures
FEW = {"evaluate.every": 0, "watch.every": 0}


@pytest.mark.slow
def test_killed_runs_end_as_unbroken_ones_do(tmp_path):
    """SIGKILL at three moments, one of them inside a save (the thirty: experiments/faults)."""
    struck = faults.attack(tmp_path / "broken", 40, kills=3, in_saves=1)
    assert len(struck) == 3 and any(kill.in_save for kill in struck)
    assert all(kill.after >= kill.before for kill in struck)
    assert faults.strike(tmp_path / "whole", 40, lambda seconds: False) is None
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


@pytest.mark.parametrize(
    "method",
    [
        name if name == "awm" else pytest.param(name, marks=pytest.mark.slow)
        for name in (*recipes.METHODS, "diffusionnft", "naive_scaling")
    ],
)
def test_every_method_resumes_bit_for_bit(toy, tmp_path, monkeypatch, method):
    """LoRA, EMA, old policy, moments, steps and keys, and the prompts that come: 3 + 2 iterations are 5."""
    cfg = config.override(recipes.family(toy, method), **FEW)
    states = {}
    for name in ("whole", "broken"):
        with monkeypatch.context() as patch:
            if name == "broken":
                interrupt_at(patch, 3)
                train.train(cfg, tmp_path / name, devices=1)
                assert checkpoint.latest(tmp_path / name)[0] == 3
        states[name] = ended(monkeypatch, cfg, tmp_path / name, name == "broken")
    jax.tree.map(np.testing.assert_array_equal, states["whole"], states["broken"])
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "broken")
    assert sorted(metrics_of(tmp_path / "whole")) == [1, 2, 3, 4, 5]


def ended(monkeypatch, cfg, run, resume, devices=1):
    """The state with which a run ends, as numbers on the host."""
    kept, finish = [], train.finish
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", lambda parts, state, *rest: (kept.append(state), finish(parts, state, *rest)))
        train.train(cfg, run, resume=resume, devices=devices)
    state = kept[0]
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def test_a_run_goes_on_on_another_number_of_devices(toy, tmp_path, monkeypatch):
    """Four devices, then one: the same kept candidates in every iteration, and numbers to rounding."""
    chosen, staged, cfg = [], iteration.Staged, config.override(toy, **FEW, iterations=2)

    class Seen(staged):
        def __init__(self, **statics):
            super().__init__(**statics)
            select = self.jit["select_keys"]
            self.jit["select_keys"] = lambda *given: (chosen.append(select(*given)), chosen[-1])[1]

    monkeypatch.setattr(iteration, "Staged", Seen)
    train.train(cfg, tmp_path / "whole", devices=1)
    whole, chosen[:] = list(chosen), []
    train.train(config.override(cfg, iterations=1), tmp_path / "moved", devices=4)
    train.train(cfg, tmp_path / "moved", resume=True, devices=1)
    assert len(whole) == len(chosen) == 2
    for one, other in zip(whole, chosen, strict=True):
        np.testing.assert_array_equal(*(jax.random.key_data(found.keys) for found in (one, other)))
    ours, theirs = metrics_of(tmp_path / "moved"), metrics_of(tmp_path / "whole")
    for i, line in theirs.items():
        assert ours[i] == pytest.approx(line, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS\nmore",
            r"a device failed \(INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS\)\. What",
        ),
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.",
            r"out of memory \(RESOURCE.*lower the chunk",
        ),
    ],
)
def test_a_device_that_fails_in_the_middle(toy, tmp_path, monkeypatch, said, told):
    """One line, and the run goes on from what it had finished to the end of an unbroken one."""
    train.train(toy, tmp_path / "whole", devices=1)
    staged, run = iteration.Staged, tmp_path / "run"

    class Failing(staged):
        def __call__(self, state, *rest):
            if int(state.iteration) == 3:
                raise jax.errors.JaxRuntimeError(said)
            return super().__call__(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(iteration, "Staged", Failing)
        with pytest.raises(train.TrainError, match=told) as found:
            train.train(toy, run, devices=1)
    assert "\n" not in str(found.value) and checkpoint.latest(run)[0] == 3
    train.train(toy, run, resume=True, devices=1)
    assert metrics_of(run) == metrics_of(tmp_path / "whole")


def test_gradients_that_are_not_finite_change_nothing_and_are_counted(toy, tmp_path, monkeypatch):
    """Of the second update, for real: LoRA, EMA, old policy and moments stay, and the run goes on."""
    poisoned = config.override(toy, **FEW, iterations=3)
    gradients, before = iteration.gradients, []

    def bad(state, *rest, **more):
        grads, metrics = gradients(state, *rest, **more)
        factor = jax.numpy.where(state.iteration == 1, jax.numpy.nan, 1.0)
        return jax.tree.map(lambda g: g * factor, grads), metrics

    monkeypatch.setattr(iteration, "gradients", bad)
    staged = iteration.Staged

    class Seen(staged):
        def __call__(self, state, *rest):
            new, metrics = super().__call__(state, *rest)
            before.append((jax.device_get(state.lora), jax.device_get(new.lora), int(new.skipped)))
            return new, metrics

    monkeypatch.setattr(iteration, "Staged", Seen)
    train.train(poisoned, tmp_path / "run", devices=1)
    same = [all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b))) for a, b, _ in before]
    assert same == [False, True, False] and [skipped for *_, skipped in before] == [0, 1, 0]


def test_weights_that_are_not_finite_end_the_run_before_it_learns(toy, tmp_path, monkeypatch):
    """Their pictures' rewards are not finite: that is what is said."""
    assemble = train.assemble.assemble

    def bad(*given):
        parts = assemble(*given)
        base = jax.tree.map(lambda x: x * jax.numpy.nan, parts.frozen.base)
        return parts._replace(frozen=parts.frozen._replace(base=base))

    monkeypatch.setattr(train.assemble, "assemble", bad)
    with pytest.raises(train.TrainError, match=r"iteration 1: a reward is not finite: bright = nan"):
        train.train(config.override(toy, **{"evaluate.every": 0}), tmp_path / "run", devices=1)
    assert checkpoint.steps(tmp_path / "run") == []


@pytest.mark.slow
def test_a_reward_that_raises_in_the_middle(toy, tmp_path, monkeypatch):
    """The iteration before it is saved, the reward named; on it goes once the reward is well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "remote.py").write_text(
        "HOST, CALLS = True, []\n"
        "def score(images, prompts):\n"
        "    CALLS.append(1)\n"
        "    if len(CALLS) == 19:\n"  # four of a preview and four of a rollout make an iteration's eight
        "        raise OSError('no route to the server')\n"
        "    return images.mean((1, 2, 3)) / 255\n"
    )
    cfg, run = config.override(toy, **FEW, reward="remote.score", iterations=4), tmp_path / "run"
    with pytest.raises(OSError, match="no route to the server") as found:
        train.train(cfg, run, devices=1)
    reward, saved = found.value.__notes__
    assert reward == "This was raised by the reward remote.score." and f"--resume --run_dir={run} goes on" in saved
    assert checkpoint.latest(run)[0] == 2 and sorted(metrics_of(run)) == [1, 2]
    train.train(cfg, run, resume=True, devices=1)
    train.train(cfg, tmp_path / "whole", devices=1)
    assert metrics_of(run) == metrics_of(tmp_path / "whole") and len(metrics_of(run)) == 4
