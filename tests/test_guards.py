"""Alarms over a run's metrics, the measurement of the preview's ranks, and falling back to BF16 exploration."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import config, iteration, train
from solrl_jax.config import Config, ConfigError, Watch
from solrl_jax.run import assemble, checkpoint, guards, watch
from solrl_jax.structs import Rollout
from tests.test_checkpoint import state_at
from tests.toy_world import as_branch, metrics_of

pytestmark = pytest.mark.usefixtures("compiled")
CFG = Config()


def lines(**series):
    """Metrics of iterations 1, 2, ...; the base's evaluation before them."""
    rows = [dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True)]
    return [
        {"iteration": 0, "eval_reward_avg": 0.5},
        *({"iteration": i + 1, "loss": 1.0, **row} for i, row in enumerate(rows)),
    ]


def test_saturation_is_told():
    first, last = {"watch/saturated": 0.0, "watch/saturation": 1.0}, {"watch/saturated": 3.0, "watch/saturation": 1.25}
    assert guards.alarms([{"iteration": 0, **first}], CFG) == {}
    found = guards.alarms([{"iteration": 0, **first}, {"iteration": 20, **last}, {"iteration": 21}], CFG)
    assert list(found) == ["saturated"] and "the inputs of 3 Linears outgrew the FP8 units" in found["saturated"]
    assert "up to 1.25 times what these hold" in found["saturated"]
    assert guards.alarms([{"iteration": 0, **last}, {"iteration": 20, **first}], CFG) == {}
    assert guards.alarms([{"iteration": 20, **last}], watch.in_bf16(CFG)) == {}  # nothing is cut off any more
    falls = config.override(CFG, **{"watch.fall_back": "true"})
    ranked = [{"iteration": 20, **last, "watch/spearman": rank} for rank in (0.7, 0.3)]
    assert "saturated" in guards.alarms(ranked[:1], falls) and "saturated" not in guards.alarms(ranked, falls)
    unknown = {"watch/saturated": math.nan, "watch/saturation": math.nan}
    assert guards.alarms([{"iteration": 20, **unknown}], CFG) == {}


def test_collapsed_groups():
    assert guards.alarms(lines(zero_std_ratio=[0.1] * 5 + [1.0, 0.2, 0.9, 0.2, 0.2]), CFG) == {}  # the median is .2
    found = guards.alarms(lines(zero_std_ratio=[0.0] * 5 + [0.6, 0.75, 0.5, 0.9, 0.75]), CFG)
    assert list(found) == ["collapsed"] and found["collapsed"].startswith("warning: 75% of the prompts have one reward")
    assert guards.alarms(lines(zero_std_ratio=[1.0] * 4), CFG) == {}  # too few to tell


@pytest.mark.parametrize("name", ["kl_div", "old_deviate"])
def test_runaway_distances(name):
    kind = {"kl_div": "kl_div", "old_deviate": "old"}[name]
    steady = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 6e-3, 8e-3, 9e-3]  # 12 times in 5 iterations, then slower
    assert guards.alarms(lines(**{name: [*steady, 9e-3, 9e-3, 9e-3, 9e-3, 9e-3]}), CFG) == {}
    assert list(guards.alarms(lines(**{name: [0.1] * 5 + [0.3] * 5}), CFG)) == [kind]  # far
    found = guards.alarms(lines(**{name: [4e-4] * 5 + [5e-3] * 5}), CFG)  # near, but 12.5 times as far as it was
    assert "is 0.005, 5 iterations ago it was 0.0004" in found[kind]
    assert guards.alarms(lines(**{name: [1e-6] * 5 + [1e-4] * 5}), CFG) == {}  # next to nothing may grow
    assert guards.alarms(lines(**{name: [None] * 5 + [1.0] * 5}), CFG) == {}
    grpo = config.load("flux:flow_grpo")
    assert guards.alarms(lines(**{name: [0.1] * 5 + [0.3] * 5}), grpo) == {}


def test_bad_ranks():
    found = guards.alarms([{"iteration": 4, "watch/spearman": 0.8}, {"iteration": 8, "watch/spearman": 0.31}], CFG)
    assert "Spearman 0.31, below watch.rank=0.5" in found["ranks"] and "explore.precision=bf16" in found["ranks"]
    assert guards.alarms([{"iteration": 4, "watch/spearman": 0.31}, {"iteration": 8, "watch/spearman": 0.8}], CFG) == {}


def test_a_preview_in_bf16_has_nothing_to_fall_back_to():
    cfg = config.override(CFG, **{"explore.precision": "bf16", "watch.fall_back": "true"})
    low = [{"iteration": 4, "watch/spearman": 0.31}]
    assert guards.alarms(low, cfg)["ranks"].endswith("raise explore.steps")
    state, fp8 = state_at(1), config.override(cfg, **{"explore.precision": "fp8"})
    for rank, how, flag in ((0.31, cfg, 0), (0.31, fp8, 1), (0.5, fp8, 0), (float("nan"), fp8, 0)):
        assert int(watch.with_fall_back(state, {"watch/spearman": rank}, how).fallen_back) == flag
    warned = config.override(fp8, **{"watch.fall_back": "false"})
    assert int(watch.with_fall_back(state, {"watch/spearman": 0.31}, warned).fallen_back) == 0


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


@pytest.mark.slow
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


def test_full_rollouts_have_no_quantised_kernels_beside_them(toy, monkeypatch):
    """All 8 candidates go through the run's own programs: explored together, then six at once, as the kept are; the
    second six begin at the third candidate."""
    cfg = config.override(toy, **{"regenerate.chunk": "3", "explore.chunk": "4", "candidates": "8", "kept": "6"})
    parts, programs, seen = assemble.assemble(cfg, 1), iteration.programs, {"explore": [], "regenerate": []}
    before = jax.live_arrays()  # held, so that no id is given anew

    def watched(*statics):
        made = programs(*statics)

        def roll(name, *args):
            new = [x for x in jax.live_arrays() if id(x) not in {id(y) for y in before}]
            seen[name].append((args[1] is None, sum(x.dtype == jnp.float8_e4m3fn for x in new), args[4].shape))
            reward = jax.vmap(jax.random.uniform)(args[4].reshape(-1)).reshape(args[4].shape)
            return Rollout(args[4], reward[..., None, None, None], reward, {})

        low = {"quantised": lambda kernels, frozen: {"to_q": jnp.zeros(8, jnp.float8_e4m3fn)}}
        return {**made, **low, **{name: functools.partial(roll, name) for name in seen}}

    monkeypatch.setattr(iteration, "programs", watched)
    with jax.set_mesh(parts.mesh):
        found = watch.measured(parts, assemble.fresh(parts))
    assert found["watch/spearman"] == pytest.approx(1)  # a reward is its key's: every candidate is compared with itself
    assert seen["explore"] == [(False, 1, (1, 8))] * 4  # a prompt a call
    assert seen["regenerate"] == [(True, 0, (1, 6))] * 8


@pytest.mark.parametrize(("told", "spearman"), [(1, 1.0), (0, math.nan)])
def test_a_reward_that_tells_few_candidates_apart_is_no_bad_rank(toy, monkeypatch, told, spearman):
    """All candidates of three or four of four prompts have one reward. The preview and the full rollouts agree."""
    cfg = config.override(toy, **{"watch.prompts": "4"})
    low = config.override(cfg, **{"watch.fall_back": "true", "explore.precision": "fp8"})
    parts, programs, known = assemble.assemble(cfg, 1), iteration.programs, {}

    def roll(*args):
        numbers = np.asarray(jax.random.key_data(args[4]))  # [p, n, 2]
        for seeds in numbers:
            if tuple(seeds[0]) not in known:
                scale = 1.0 if len(known) < told * len(seeds) else 0.0
                known.update({tuple(seed): scale * i for i, seed in enumerate(seeds)})
        reward = jnp.asarray([[known[tuple(seed)] for seed in seeds] for seeds in numbers])
        return Rollout(args[4], reward[..., None, None, None], reward, {})

    made = {"explore": roll, "regenerate": roll}
    monkeypatch.setattr(iteration, "programs", lambda *statics: {**programs(*statics), **made})
    with jax.set_mesh(parts.mesh):
        state = assemble.fresh(parts)
        found = watch.measured(parts, state)
    assert found == (
        {}
        if math.isnan(spearman)
        else {f"watch/{n}": pytest.approx(1) for n in ("spearman", "overlap", "kept_contrast")}
    )
    assert int(watch.with_fall_back(state, found, low).fallen_back) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("branch", "prompts"), [(False, 1), (True, 1), (True, 2)])
def test_a_measurement_runs_the_programs_of_the_run(toy, tmp_path, caplog, branch, prompts):
    """Of a run with a measurement, two rollouts are compiled; in a branch the one from the noise is a third. Also where
    a chunk has the images of two prompts."""
    chunks = {"explore.chunk": 4 * prompts, "regenerate.chunk": 2 * prompts, "watch.every": 20}
    cfg = config.override(as_branch(toy) if branch else toy, iterations=1, **chunks)
    with jax.log_compiles():
        train.train(cfg, tmp_path / "run", devices=1)
    compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling ")]
    assert sum("rolled" in text for text in compiled) == (3 if branch else 2)
    assert [sum(name in text for text in compiled) for name in ("merged", "quantised", "learn")] == [1] * 3
    names = {"watch/spearman", "watch/overlap", "watch/kept_contrast"}
    noise = {name.replace("/", "/noise_") for name in names} if branch else set()
    assert watch_names(metrics_of(tmp_path / "run")[0]) == names | noise


@pytest.mark.slow
def test_a_run_is_measured_as_it_begins(toy, tmp_path, capsys, monkeypatch):
    """In the base's line, also without evaluation; a run that goes on is not measured again and has the same lines."""
    cfg = config.override(toy, iterations=2, **{"watch.every": "20", "watch.prompts": "2", "evaluate.every": "2"})
    whole, blind = tmp_path / "whole", tmp_path / "blind"
    train.train(cfg, whole, devices=1)
    found = metrics_of(whole)
    assert [i for i in found if "watch/spearman" in found[i]] == [0] and "eval_reward_dark" in found[0]
    assert "watch/spearman" in next(line for line in capsys.readouterr().out.splitlines() if "base model: " in line)
    train.train(config.override(cfg, **{"watch.every": "0"}), tmp_path / "unwatched", devices=1)
    unwatched = metrics_of(tmp_path / "unwatched")
    assert [unwatched[i] for i in (1, 2)] == [found[i] for i in (1, 2)]  # training's numbers are as without
    train.train(config.override(cfg, iterations=1, **{"evaluate.every": "0"}), blind, devices=1)
    assert list(metrics_of(blind)) == [0, 1] and set(metrics_of(blind)[0]) == {"iteration", *watch_names(found[0])}
    monkeypatch.setattr(watch, "measured", lambda *_: pytest.fail("measured again"))
    train.train(cfg, blind, resume=True, devices=1)
    assert metrics_of(blind)[0] == found[0] and metrics_of(blind)[2] == found[2]


def watch_names(line):
    return {name for name in line if name.startswith("watch/")}


def test_a_device_too_small_for_the_measurement_ends_a_run_in_its_first_minutes(toy, tmp_path, monkeypatch):
    """Before its first iteration, with the fields to lower; nothing is saved, so a run with those begins anew."""

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    cfg = config.override(toy, iterations=1, **{"watch.every": "20"})
    monkeypatch.setattr(watch, "measured", full)
    with pytest.raises(train.TrainError, match=r"iteration 1: the device's memory is full .*lower explore.chunk"):
        train.train(cfg, tmp_path / "run", devices=1)
    assert metrics_of(tmp_path / "run") == {} and checkpoint.steps(tmp_path / "run") == []


@pytest.mark.slow
def test_of_fewer_prompts_than_asked_for_all_are_measured(toy, tmp_path):
    """Three training prompts on two devices, and watch.prompts=4, the default: two are measured."""
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    parts = assemble.assemble(config.override(toy, **{"prompts": "2"}), 2)
    with jax.set_mesh(parts.mesh):
        assert "watch/spearman" in watch.measured(parts, assemble.fresh(parts))


@pytest.mark.slow
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
