"""The host loop on the toy world."""

import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import signal
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from solrl_jax import config, main, rewards, train
from solrl_jax.run import assemble, checkpoint, data, evaluate, export, log, pictures
from solrl_jax.weights import WeightsError
from tests.tiers import slow
from tests.toy_world import TOY, as_branch, interrupt_at, metrics_of

pytestmark = pytest.mark.usefixtures("compiled")


def test_a_whole_run_writes_everything(toy, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.train(toy, run, devices=1) == 0
    found = metrics_of(run)
    assert sorted(found) == [0, 1, 2, 3, 4, 5]
    assert {"reward/mean", "reward/range", "kl_div", "old_deviate", "grad_norm", "rank/spearman"} <= found[1].keys()
    assert [i for i in found if "eval_reward_dark" in found[i]] == [0, 2, 4, 5]
    assert found[0]["eval_reward_bright"] == found[0]["eval_reward_avg"] != found[5]["eval_reward_bright"]
    gain, means = found[5]["eval_gain/dark"], [pictures.load(run / f"grids/{n}.npz") for n in ("base", "last")]
    assert gain == pytest.approx(found[5]["eval_reward_dark"] - found[0]["eval_reward_dark"], abs=1e-6)
    before, after = (kept.shown.means["dark"] for kept in means if kept is not None)
    error = np.std(after - before, ddof=1) / len(before) ** 0.5
    assert found[5]["eval_gain_error/dark"] == pytest.approx(error, rel=1e-5) and error < np.std(before) / 2
    times = {k for k in log.read(run / "metrics.jsonl")[2] if k.startswith("time/")}
    assert times >= {"time/encode", "time/explore", "time/regenerate", "time/learn", "time/evaluate", "time/iteration"}
    assert sorted(p.name for p in (run / "grids").glob("*.png")) == [f"{i:06d}.png" for i in (0, 2, 4, 5)]
    assert checkpoint.steps(run) == [5, 4, 2] and checkpoint.latest(run) == (5, [])
    assert any((run / "tensorboard").iterdir())
    for file in (run / "pytorch_lora_weights.safetensors", run / "current" / "pytorch_lora_weights.safetensors"):
        assert set(load_file(file)) == {"transformer.to_q.lora_A.weight", "transformer.to_q.lora_B.weight"}
    said = capsys.readouterr().out
    assert "iteration 5/5  reward " in said and "dark " in said
    assert "report.html" in said.splitlines()[-1] and "pytorch_lora_weights" in said.splitlines()[-1]


def test_a_checkpoint_of_another_family_is_no_branch(toy, tmp_path):
    run = tmp_path / "run"
    train.train(dataclasses.replace(toy, iterations=2), run, devices=1)
    with pytest.raises(checkpoint.CheckpointError, match=r"branch\.after is None there and 2 here"):
        train.train(as_branch(toy), run, resume=True, devices=1)


@pytest.mark.parametrize(("staged", "family"), [(True, "branch"), slow(True, "sol_rl"), slow(False, "sol_rl")])
def test_a_resumed_run_equals_an_unbroken_one(toy, tmp_path, monkeypatch, capsys, staged, family):
    toy = config.override(as_branch(toy) if family == "branch" else toy, staged=staged)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train.train(toy, whole, devices=1)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, signal.SIGTERM if staged else signal.SIGINT)
        assert train.train(toy, broken, devices=1) == train.UNFINISHED == 75
    stopped_after = 3 if staged else 4  # a single program cannot be left in its middle
    assert checkpoint.latest(broken)[0] == stopped_after
    assert f"stopped after iteration {stopped_after} of 5" in capsys.readouterr().out
    assert not (broken / "pytorch_lora_weights.safetensors").exists()
    assert train.train(toy, broken, resume=True, devices=1) == 0
    assert metrics_of(broken) == metrics_of(whole)
    assert (broken / "grids" / "000005.png").read_bytes() == (whole / "grids" / "000005.png").read_bytes()
    for name in ("pytorch_lora_weights.safetensors", "current/pytorch_lora_weights.safetensors"):
        jax.tree.map(np.testing.assert_array_equal, load_file(broken / name), load_file(whole / name))


def test_a_signal_before_the_first_iteration_leaves_something_to_go_on_with(toy, tmp_path, monkeypatch, capsys):
    """And whoever goes on after the prompts were edited is told."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 0)
        assert train.train(toy, run, devices=1) == 75
    assert checkpoint.latest(run)[0] == 0 and sorted(metrics_of(run)) == [0]
    assert train.train(config.override(toy, iterations=1), run, resume=True, devices=1) == 0
    assert sorted(metrics_of(run)) == [0, 1]
    assert "has other prompts" not in capsys.readouterr().out
    with open(toy.prompt_files, "a") as f:
        f.write("prompt 7\n")
    assert train.train(config.override(toy, iterations=1), run, resume=True, devices=1) == 0
    told = f"prompt_files={toy.prompt_files} has other prompts or rows than when {run / 'checkpoints/1'} was saved"
    assert told in capsys.readouterr().out


def test_a_signal_while_the_weights_are_read_saves_what_the_run_begins_with(toy, tmp_path, monkeypatch, capsys):
    """Nothing is drawn then: not even the base's pictures."""
    run, assembled = tmp_path / "run", assemble.assemble

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return assembled(*args)

    with monkeypatch.context() as patch:
        patch.setattr(assemble, "assemble", stopped)
        patch.setattr(evaluate, "evaluate", None)
        assert train.train(toy, run, devices=1) == 75
    assert checkpoint.latest(run)[0] == 0 and "stopped after iteration 0 of 5, saved" in capsys.readouterr().out
    assert train.train(config.override(toy, iterations=1), run, resume=True, devices=1) == 0
    assert sorted(metrics_of(run)) == [0, 1]


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_save_begins_anew(toy, tmp_path, capsys):
    """config.json is there, and a save that was cut short: --resume gives what an unbroken run gives."""
    train.train(toy, tmp_path / "whole", devices=1)
    run = tmp_path / "killed"
    (run / "checkpoints/1/state").mkdir(parents=True)
    (run / "config.json").write_text(config.to_json(toy))
    train.train(toy, run, resume=True, devices=1)
    assert f"nothing was saved in {run} before it ended: beginning again" in capsys.readouterr().out
    assert metrics_of(run) == metrics_of(tmp_path / "whole")


def test_handlers_are_as_before_a_run(toy, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train.train(config.override(toy, iterations=1, **{"evaluate.every": 0}), tmp_path / "run", devices=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_reward_that_is_not_finite_is_named(toy, tmp_path):
    toy = config.override(toy, reward="bright,broken:0.5", **{"evaluate.every": 0})
    with pytest.raises(train.TrainError, match=r"iteration 1: a reward is not finite: broken = nan"):
        train.train(toy, tmp_path / "run", devices=1)
    assert checkpoint.steps(tmp_path / "run") == []


def test_three_non_finite_updates_stop_the_run_and_are_saved(toy, tmp_path, monkeypatch):
    staged = train.iteration.Staged

    class Poisoned(staged):
        def __call__(self, state, *rest):
            new, metrics = super().__call__(state, *rest)
            return new._replace(skipped=state.skipped + 1), metrics | {"skipped_in_a_row": state.skipped + 1}

    monkeypatch.setattr(train.iteration, "Staged", Poisoned)
    with pytest.raises(train.TrainError, match="iteration 3: 3 updates in a row had non-finite gradients"):
        train.train(toy, tmp_path / "run", devices=1)
    assert checkpoint.latest(tmp_path / "run")[0] == 3


def test_a_failed_save_ends_the_run_and_says_what_is_intact(toy, tmp_path, monkeypatch):
    run, replace = tmp_path / "run", checkpoint.replace

    def full(file, text):
        if file.parent.name == "4":
            raise OSError(28, "No space left on device")
        replace(file, text)

    monkeypatch.setattr(checkpoint, "replace", full)
    message = r"checkpoints/4 could not be written: No space left.*intact.*The save after it, .*/5, is whole$"
    with pytest.raises(checkpoint.CheckpointError, match=message) as failed:
        train.train(toy, run, devices=1)
    assert checkpoint.steps(run) == [5, 2] and checkpoint.latest(run) == (5, [])
    assert not hasattr(failed.value, "__notes__")  # which would say that all is saved, whatever failed


def test_metrics_are_on_disk_before_the_checkpoint_that_outlives_them(toy, tmp_path, monkeypatch):
    """By what the system is asked for: each line is synchronised before the state of its iteration is written."""
    run, sync, write, synced, seen = tmp_path / "run", os.fsync, checkpoint.write, [], []

    def fsync(number):
        lines = run / "metrics.jsonl"
        if lines.exists() and os.path.sameopenfile(number, opened := os.open(lines, os.O_RDONLY)):
            os.close(opened)
            synced.append(len(log.read(run / "metrics.jsonl")))
        return sync(number)

    def save(folder, step, *rest):
        seen.append((step, synced[-1]))
        return write(folder, step, *rest)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(checkpoint, "write", save)
    train.train(config.override(toy, iterations=3, save_every=1), run, devices=1)
    assert [step for step, _ in seen] == [1, 2, 3]
    assert all(lines >= step + 1 for step, lines in seen)  # and that of the base


def test_alarms_see_what_the_file_has(toy, tmp_path, monkeypatch):
    """A measurement that is NaN is null in the file: a run that goes on alarms as one that was resumed does."""
    run, seen = tmp_path / "run", []
    monkeypatch.setattr(train.watch, "measured", lambda *_: {"watch/spearman": float("nan")})
    monkeypatch.setattr(train.guards, "alarms", lambda lines, cfg: seen.append(list(lines)) or {})
    train.train(config.override(toy, iterations=2, **{"watch.every": "1"}), run, devices=1)
    assert seen[-1] == log.read(run / "metrics.jsonl") and seen[-1][-1]["watch/spearman"] is None


def test_resume_refuses_another_config_and_allows_a_longer_run(toy, tmp_path):
    run = tmp_path / "run"
    train.train(config.override(toy, iterations=1), run, devices=1)
    with pytest.raises(checkpoint.CheckpointError, match=r"learn.learning_rate is 0.03 there and 0.5 here"):
        train.train(config.override(toy, **{"learn.learning_rate": "0.5"}), run, resume=True, devices=1)
    with pytest.raises(checkpoint.CheckpointError, match=r"candidates is 4 there and 8 here"):
        train.train(config.override(toy, candidates=8), run, resume=True, devices=1)
    with pytest.raises(config.ConfigError, match="holds a run already"):
        train.train(toy, run, devices=1)
    assert train.train(config.override(toy, iterations=2), run, resume=True, devices=1) == 0
    assert sorted(metrics_of(run)) == [0, 1, 2]
    with pytest.raises(config.ConfigError, match=r"iterations=1, but .*run has finished 2: give more to go on"):
        train.train(config.override(toy, iterations=1), run, resume=True, devices=1)
    assert json.loads((run / "config.json").read_text())["iterations"] == 2  # it says what was done


def test_a_run_that_began_meanwhile_is_not_written_over(toy, tmp_path, monkeypatch):
    """Another start, in the minutes in which this one reads its weights; it is over before this one writes."""
    run, assembled = tmp_path / "run", assemble.assemble

    def meanwhile(cfg, *args):
        monkeypatch.setattr(assemble, "assemble", assembled)
        train.train(config.override(toy, iterations=1), run, devices=1)
        return assembled(cfg, *args)

    monkeypatch.setattr(assemble, "assemble", meanwhile)
    with pytest.raises(config.ConfigError, match="holds a run already"):
        train.train(config.override(toy, iterations=2, seed=5), run, devices=1)
    assert numbers_of(run) == [0, 1] and checkpoint.load_config(run).seed == toy.seed


def test_a_resume_waits_for_nothing_that_another_process_may_change(toy, tmp_path):
    """The lock is held before the checkpoint is chosen."""
    run = tmp_path / "run"
    train.train(config.override(toy, iterations=1), run, devices=1)
    with checkpoint.alone(run), pytest.raises(checkpoint.CheckpointError, match="another process is training there"):
        train.train(config.override(toy, iterations=1), run, resume=True, devices=1)


@pytest.mark.slow
def test_a_resumed_run_takes_what_an_error_told_it_to_lower(toy, tmp_path):
    """Chunks and, with the reference on every one, micro-batches change rounding alone."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    names = "explore.chunk", "regenerate.chunk", "evaluate.chunk", "learn.micro_batch"
    cfg = config.override(toy, iterations=2, **dict.fromkeys(names, "4"))
    train.train(cfg, whole, devices=1)
    train.train(config.override(cfg, iterations=1), run, devices=1)
    train.train(config.override(cfg, **dict.fromkeys(names, "2")), run, resume=True, devices=1)
    found, wanted = metrics_of(run)[2], metrics_of(whole)[2]
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name


def test_checkpoints_without_a_config_are_not_taken_for_a_new_runs(tmp_path):
    (tmp_path / "run/checkpoints/2").mkdir(parents=True)
    with pytest.raises(config.ConfigError, match=r"run has checkpoints of a run without its config.json: copy one of"):
        train.resume_point(tmp_path / "run", resume=False)


def test_the_command_that_goes_on_can_be_pasted(tmp_path):
    words = shlex.split(train.again(tmp_path / "my runs" / "it's one", jax.device_count()))
    assert words[3:] == [f"--run_dir={tmp_path}/my runs/it's one", "--resume"]


def test_bad_input_leaves_no_run_directory(toy, tmp_path):
    for change, message in (
        ({"prompts": "8"}, "prompts=8, but .* has 7"),
        ({"evaluate.prompts": "9"}, "evaluate.prompts=9, but .* has 7"),
        ({"reward": "nice"}, "unknown reward 'nice'"),
        ({"reward": ""}, "reward is empty"),
        ({"prompt_files": ""}, "prompt_files is empty"),
    ):
        with pytest.raises(config.ConfigError, match=message):
            train.train(config.override(toy, **change), tmp_path / "run", devices=1)
    with pytest.raises(config.ConfigError, match="4 prompts do not divide over 3 devices"):
        train.train(toy, tmp_path / "run", devices=3)
    with pytest.raises(config.ConfigError, match="99 devices asked for"):
        train.train(toy, tmp_path / "run", devices=99)
    assert not (tmp_path / "run").exists()


def test_what_is_held_out_of_a_file_is_evaluated_and_never_trained_on(toy, tmp_path, monkeypatch):
    drawn, batch = {4: set(), 3: set()}, data.batch

    def seen(prompts, seed, number, count):
        drawn[count] |= set(found := batch(prompts, seed, number, count))
        return found

    monkeypatch.setattr(data, "batch", seen)
    train.train(config.override(toy, **{"evaluate.held_out": "3", "iterations": "2"}), tmp_path / "run", devices=1)
    assert (len(drawn[4]), len(drawn[3])) == (4, 3) and not drawn[4] & drawn[3]  # of 7
    told = json.loads((tmp_path / "run/starts.json").read_text())
    assert told[0]["notes"][0] == "4 training prompts, 3 test prompts"
    with pytest.raises(config.ConfigError, match=r"prompts=4, but .* has 3 distinct training prompts: use 3 or fewer"):
        train.train(config.override(toy, **{"evaluate.held_out": "4"}), tmp_path / "other", devices=1)


@pytest.mark.slow
def test_one_prompt_is_a_dataset(toy, tmp_path):
    (tmp_path / "prompts.txt").write_text("the only one")
    few = {"prompts": "1", "evaluate.prompts": "1", "evaluate.grid": "1", "iterations": "2", "learn.micro_batch": "1"}
    assert train.train(config.override(toy, **few), tmp_path / "run", devices=1) == 0
    found = metrics_of(tmp_path / "run")
    assert found[2]["reward/mean"] > 0 and found[2]["grad_norm"] > 0 and "eval_gain/dark" not in found[2]


def test_wandb_that_is_not_installed_is_said_before_anything_is_read(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(config.ConfigError, match=r"wandb=flow needs a package that is not here: pip install wandb"):
        train.train(config.override(toy, wandb="flow"), tmp_path / "run", devices=1)
    assert not (tmp_path / "run").exists()


def test_evaluation_is_fixed_and_does_not_depend_on_the_devices(toy):
    found = []
    for devices in (1, 4):
        parts = assemble.assemble(toy, devices)
        with jax.set_mesh(parts.mesh):
            found.append(evaluate.evaluate(parts, assemble.fresh(parts).lora))
    (one, shown), (four, others) = found
    assert one.keys() == {"eval_reward_bright", "eval_reward_dark", "eval_reward_avg"}
    np.testing.assert_allclose(list(one.values()), list(four.values()), rtol=1e-5)
    assert shown.images.shape == (2, 4, 4, 3) and np.abs(shown.images.astype(int) - others.images).max() <= 1
    assert shown.prompts == others.prompts and len(shown.prompts) == 2


def test_pictures_leave_the_devices_as_bytes(toy, monkeypatch):
    """The bytes that NumPy makes of the same floats, ties to even; a quarter of what the floats take."""
    edges = (np.arange(256, dtype=np.float32)[:, None] + np.float32([-0.5, 0, 0.5])) / np.float32(255)
    edges = np.stack([edges, np.nextafter(edges, np.float32(9)), np.nextafter(edges, np.float32(-9))])[..., None, :]
    expect = (np.clip(edges, 0, 1) * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(jax.jit(rewards.eight_bit)(edges), expect)
    assert len(set(expect.ravel())) == 256

    drawn, seen = evaluate._draw, []
    monkeypatch.setattr(evaluate, "_draw", lambda *args, **kw: seen.append(drawn(*args, **kw)) or seen[-1])
    parts = assemble.assemble(toy, 2)
    with jax.set_mesh(parts.mesh):
        _, shown = evaluate.evaluate(parts, assemble.fresh(parts).lora)
    (images, *_), *others = seen
    assert images.dtype == jnp.uint8 and images.shape == (4, 2, 4, 4, 3) and not others  # 3 prompts, filled up
    assert not images.sharding.is_fully_replicated
    np.testing.assert_array_equal(shown.images, np.asarray(images)[:2, 0])


def test_a_policy_of_another_model_is_refused_before_weights_are_read(toy, tmp_path, monkeypatch):
    run, other = tmp_path / "run", tmp_path / "other.safetensors"
    train.train(config.override(toy, iterations=1, **{"evaluate.every": 0}), run, devices=1)
    save_file({"transformer.to_q.lora_A.weight": np.ones((2, 5), np.float32)}, other)
    monkeypatch.setattr(assemble, "open_weights", None)
    place, wide = run / "checkpoints/1", config.override(toy, **{"lora.rank": 4})
    how = {"devices": 1, "place": None, "lora_file": other}
    with pytest.raises(WeightsError, match=r"other\.safetensors"):
        evaluate.run_eval(toy, run, **how)
    with pytest.raises(WeightsError, match=r"other\.safetensors"):
        evaluate.run_sample(toy, run, prompts=["a"], **how)
    how |= {"place": place, "lora_file": None}
    with pytest.raises(checkpoint.CheckpointError, match=r"lora.rank is 2 there and 4 here; without --config its own"):
        evaluate.run_eval(wide, run, **how)
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            checkpoint.CheckpointError,
            match=r"ema/to_q/a is .*\. Is it of another model\? Without --config its own is taken",
        ),
    ):
        patch.setattr(assemble, "INFERENCE", ())
        evaluate.run_sample(wide, run, prompts=["a"], **how)


def test_a_folder_that_cannot_be_made_is_told_in_a_line(toy, tmp_path, monkeypatch):
    run, mkdir = tmp_path / "run", Path.mkdir

    def refused(self, *args, **how):
        if self == run:
            raise FileNotFoundError(2, "No such file or directory")
        mkdir(self, *args, **how)

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(config.ConfigError, match=r"--run_dir=.*run cannot be made \(No such file or directory\): give"):
        train.train(toy, run, devices=1)


def test_modes_eval_sample_and_export(toy, tmp_path, capsys):
    run = tmp_path / "run"
    train.train(config.override(toy, iterations=2), run, devices=1)
    capsys.readouterr()
    place = run / "checkpoints" / "2"
    assert evaluate.run_eval(toy, run, place=place, lora_file=None, devices=1) == 0
    table = capsys.readouterr().out
    assert "dark" in table and (run / "eval.png").is_file()
    last = metrics_of(run)[2]
    assert f"{last['eval_reward_bright']:.4f}" in table  # the EMA of the checkpoint, as in the run
    assert evaluate.run_eval(toy, tmp_path / "new", place=None, lora_file=run, devices=1) == 0  # the main file is it
    told, *rows = capsys.readouterr().out.splitlines()
    assert told.endswith("LoRA of rank 2 on 1 of 1 Linears") and rows[:-1] == table.splitlines()[:-1]

    texts = [f"text {i}" for i in range(5)]
    assert evaluate.run_sample(toy, run, prompts=texts, place=place, lora_file=None, devices=2) == 0
    assert len(list((run / "samples").glob("*.png"))) == 10
    few = tmp_path / "few"
    evaluate.run_sample(toy, few, prompts=texts[:2], place=place, lora_file=None, devices=1)
    first = (run / "samples" / "0001_1.png").read_bytes()
    assert (few / "samples" / "0001_1.png").read_bytes() == first
    assert capsys.readouterr().out.splitlines()[-1] == f"policy: {place}"
    evaluate.run_sample(toy, few, prompts=texts[:1], place=None, lora_file=None, devices=1)
    names = [f"{i:04d}_{j}.png" for i in range(3) for j in (0, 1)]  # the new ones beside those that were there
    assert sorted(file.name for file in (few / "samples").iterdir()) == names
    assert (few / "samples" / "0001_1.png").read_bytes() == first
    assert capsys.readouterr().out.splitlines()[-1] == "policy: the base model"
    with pytest.raises(config.ConfigError, match="needs --prompt"):
        evaluate.run_sample(toy, run, prompts=[], place=None, lora_file=None, devices=1)

    assert export.export(toy, tmp_path / "out", place=place, devices=1) == 0
    out, mine = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (tmp_path / "out", run))
    jax.tree.map(np.testing.assert_array_equal, out, mine)
    assert "2 of 2, 4 prompts each" in (tmp_path / "out" / "model_card.md").read_text()  # the run's config, not `toy`
    assert export.export(toy, tmp_path / "again", place=None, lora_file=run, devices=1) == 0  # from a LoRA file
    again = load_file(tmp_path / "again" / "pytorch_lora_weights.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again, mine)


def test_an_export_is_written_over_a_runs_files_only_by_its_own_checkpoints(toy, tmp_path):
    """Neither a LoRA file nor another run's checkpoint: what training wrote stays, bit for bit."""
    run, other = tmp_path / "run", tmp_path / "other"
    train.train(config.override(toy, iterations=2, save_every=1), run, devices=1)
    train.train(config.override(toy, iterations=1, seed=7), other, devices=1)
    files = [f for f in run.rglob("*.safetensors") if "checkpoints" not in f.parts]
    was = {f: f.read_bytes() for f in (*files, run / "model_card.md")}
    assert len(was) == 3
    told = rf"run/pytorch_lora_weights\.safetensors is there already, and only a checkpoint of {run} is exported over"
    for how in ({"lora_file": other, "place": None}, {"place": checkpoint.folder(other, 1)}):
        with pytest.raises(config.ConfigError, match=told):
            export.export(toy, run, devices=1, **how)
        assert {f: f.read_bytes() for f in was} == was
    ended = {f: load_file(f) for f in files}
    for step in (1, 2):
        assert export.export(toy, run, place=checkpoint.folder(run, step), devices=1) == 0
        for file, tensors in ended.items():
            same = [np.array_equal(x, load_file(file)[name]) for name, x in tensors.items()]
            assert all(same) if step == 2 else not all(same)


@pytest.mark.slow
def test_a_mix_is_trained_on_with_its_parts_and_others_are_only_watched(toy, tmp_path):
    run = tmp_path / "run"
    mix = config.override(toy, reward="bright:1,dark:0.5", iterations=1, **{"evaluate.rewards": "dark,plain"})
    train.train(mix, run, devices=1)
    found = metrics_of(run)[1]
    for mean, part in (("reward/mean", "reward/{}"), ("explore/reward_mean", "explore/reward_{}"),
                       ("eval_reward_avg", "eval_reward_{}")):  # fmt: skip
        assert found[mean] == pytest.approx(found[part.format("bright")] + 0.5 * found[part.format("dark")], rel=1e-5)
    assert found["eval_reward_plain"] == pytest.approx(0.25)
    assert not {"reward/plain", "explore/reward_plain"} & found.keys()
    assert rewards.held_out(mix.reward, mix.evaluate.rewards) == {"plain": 1.0}


NAMED = ["bright"], ["bright"], ["bright"], ["dark"], ["dark"], ["bright", "dark", "plain"], None


def naming(cfg, folder):
    """The toy config whose prompts name the NAMED rewards; `plain`, held out, is named by one."""
    rows = [{"prompt": f"prompt {i}"} | ({"rewards": names} if names else {}) for i, names in enumerate(NAMED)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {"prompt_files": str(folder / "prompts.jsonl"), "reward": "bright:1,dark:0.5", "reward_rule": "gdpo"}
    words |= {"evaluate.rewards": "plain", "evaluate.prompts": "7", "learn.advantage_spread": "prompt"}
    return config.override(cfg, **words)


def asking(texts):
    named = [NAMED[int(text.split()[1])] for text in texts]
    return {name: [names is None or name in names for names in named] for name in ("bright", "dark", "plain")}


@pytest.mark.slow
@pytest.mark.parametrize(("staged", "devices"), [("true", 1), ("false", 2)])
def test_prompts_name_their_rewards(toy, tmp_path, capsys, staged, devices):
    """Two prompts an iteration: what none of them asks for has no metrics there, and nothing is not finite."""
    run, cfg = tmp_path / "run", config.override(naming(toy, tmp_path), prompts=2, iterations=4, seed=3, staged=staged)
    train.train(cfg, run, devices=devices)
    said = capsys.readouterr().out
    assert "5 of 7 training prompts ask for bright" in said and "4 of 7 training prompts ask for dark" in said
    found, texts, absent = metrics_of(run), [f"prompt {i}" for i in range(7)], 0
    for number in range(1, 5):
        asked, line = asking(data.batch(texts, cfg.seed, number - 1, 2)), found[number]
        total = 0.0
        for name, weight in (("bright", 1), ("dark", 0.5)):
            assert line[f"asked/{name}"] == np.mean(asked[name])
            assert (f"reward/{name}" in line) == (f"corr/{name}" in line) == any(asked[name])
            total += weight * line[f"asked/{name}"] * line.get(f"reward/{name}", 0)
            absent += not any(asked[name])
        assert line["reward/mean"] == pytest.approx(total, rel=1e-5)
        assert None not in line.values() and line["skipped"] == 0
    assert absent
    last = pictures.load(run / "grids/last.npz")
    assert last is not None
    asked, means = asking(data.batch(texts, cfg.seed, 0, 7)), last.shown.means
    for name in ("bright", "dark", "plain"):
        assert found[4][f"eval_reward_{name}"] == pytest.approx(means[name][asked[name]].mean())
    each = asked["bright"] * means["bright"] + 0.5 * (asked["dark"] * means["dark"])
    assert found[4]["eval_reward_avg"] == pytest.approx(each.mean())
    assert "not finite" not in (run / "report.html").read_text()


def test_rewards_that_prompts_name_are_found_when_a_run_begins(toy, tmp_path):
    for words, message in (
        ({"evaluate.rewards": ""}, r"'prompt 5' asks for reward 'plain', which is not configured \(reward=bright,dark"),
        (
            {"reward_rule": "sum", "learn.advantage_spread": "all"},
            "'prompt 0' asks for some of the rewards only, and learn.advantage_spread=all",
        ),
    ):
        with pytest.raises(config.ConfigError, match=message):
            train.train(config.override(naming(toy, tmp_path), **words), tmp_path / "run", devices=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("step", "told"), [(-0.25, True), (0.0, False)])
def test_a_held_out_reward_that_falls_is_told_in_the_log_and_in_the_report(
    toy, tmp_path, monkeypatch, capsys, step, told
):
    """The second evaluation is of a resumed run: the first is known from the file. The numbers are made up."""
    run, real, count = tmp_path / "run", evaluate.evaluate, iter(range(9))

    def made_up(parts, adapter):
        _, shown = real(parts, adapter)
        i = next(count)
        means = {"bright": np.full(3, 0.5 + i / 8, np.float32), "dark": np.full(3, 1 + step * i, np.float32)}
        return evaluate.averages(shown._replace(means=means), parts.score), shown._replace(means=means)

    monkeypatch.setattr(evaluate, "evaluate", made_up)
    train.train(config.override(toy, iterations=1), run, devices=1)
    train.train(config.override(toy, iterations=2), run, resume=True, devices=1)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    page = (run / "report.html").read_text()
    if told:
        assert [line.split(" the trained")[0] for line in said] == [f"warning: from iteration 0 to {i}" for i in (1, 2)]
        assert "rose by 0.25 (0.5 to 0.75) while dark, held out, fell by 0.5 (1 to 0.5): " in said[1]
        assert said[1].removeprefix("warning: ") in page and said[0].removeprefix("warning: ") not in page
    else:
        assert said == [] and 'class="warning"' not in page


def test_report_is_one_readable_file(toy, tmp_path):
    """Two prompts, the base's picture and the last of each, with the rewards that evaluation gave."""
    run = tmp_path / "run"
    train.train(toy, run, devices=1)
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and page.count("<script") == 1 and "http:" not in page
    assert "dark (held out)" in page and "learn.learning_rate" in page and 'name="viewport"' in page
    assert "1 x cpu" in page and "7 training prompts" in page
    base, last = (pictures.load(run / "grids" / f"{name}.npz") for name in ("base", "last"))
    assert (base.iteration, last.iteration) == (0, 5) and base.shown.prompts == last.shown.prompts
    assert base.shown.images.shape == last.shown.images.shape == (2, 4, 4, 3)
    assert (base.shown.images != last.shown.images).any()
    for kept in (base, last):
        assert list(kept.shown.scores) == ["bright", "dark"]
        for name, of in (("bright", lambda x: x.mean((1, 2, 3))), ("dark", lambda x: 1 - x.min((1, 2, 3)))):
            np.testing.assert_allclose(kept.shown.scores[name], of(kept.shown.images / 255), atol=1 / 255)
            assert f"{kept.shown.scores[name][0]:.4f}" in page


@pytest.mark.slow
def test_a_run_of_format_1_goes_on_evaluates_and_exports(toy, tmp_path, monkeypatch, capsys):
    """Written by the version before checkpoints had a format: two iterations, after which it had fallen back to BF16.
    Its third and fourth are what that version made of them."""
    run = tmp_path / "run"
    shutil.copytree(Path(__file__).parent / "data" / "run_format_1", run)
    monkeypatch.chdir(tmp_path)  # where its config says that the prompts are
    nothing = types.SimpleNamespace(check=lambda *_: None, uses=lambda *_: [], report=lambda *_: [])
    monkeypatch.setattr(assemble, "coverage", nothing)
    cfg, place = checkpoint.load_config(run), run / "checkpoints" / "2"
    assert checkpoint.best(run, [2]) == 2  # its score is in metrics.jsonl
    assert evaluate.run_eval(cfg, tmp_path / "eval", place=place, lora_file=None, devices=1) == 0
    assert "0.5124" in capsys.readouterr().out
    assert export.export(cfg, tmp_path / "out", place=place, devices=1) == 0
    assert train.train(config.override(cfg, iterations=4), run, resume=True, devices=1) == 0
    assert "exploring in bf16 from iteration 3 on" in capsys.readouterr().out
    found = metrics_of(run)
    assert found[3]["reward/mean"] == pytest.approx(0.5309007167816162, abs=1e-6)
    assert found[4]["eval_reward_avg"] == pytest.approx(0.5150182843208313, abs=1e-6)
    assert "watch/spearman" not in found[4]
    (run / "metrics.jsonl").write_text('{"iteration": 4}\n')  # from format 2 on, the state itself says it
    assert train.train(config.override(cfg, iterations=5), run, resume=True, devices=1) == 0
    assert "exploring in bf16 from iteration 5 on" in capsys.readouterr().out


def test_a_run_of_an_older_version_goes_on(toy, tmp_path):
    """Its base.npz has no rewards: the base is drawn anew, to the same pictures."""
    run, file = tmp_path / "run", tmp_path / "run/grids/base.npz"
    train.train(config.override(toy, iterations=1), run, devices=1)
    before = pictures.load(file).shown
    np.savez(file, images=before.images, how="")
    (run / "starts.json").unlink()
    train.train(config.override(toy, iterations=2), run, resume=True, devices=1)
    np.testing.assert_array_equal(pictures.load(file).shown.images, before.images)
    (start,) = json.loads((run / "starts.json").read_text())
    assert (start["after"], start["devices"], start["device"]) == (1, 1, "cpu")
    assert sorted(metrics_of(run)) == [0, 1, 2]


def test_through_the_command_line(toy, tmp_path, capsys, monkeypatch):
    from absl.testing import flagsaver

    run = str(tmp_path / "run")
    monkeypatch.setattr(config, "load", lambda spec, overrides: config.override(toy, **overrides))
    for words in (["--config=toy", "--config.iterations=1"], ["--resume", "--config.iterations", "2"]):
        with flagsaver.flagsaver():
            assert main.main(main.parse(["solrl_jax", f"--run_dir={run}", "--devices=1", *words])) == 0
    assert sorted(metrics_of(tmp_path / "run")) == [0, 1, 2]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["iterations"] == 2
    for words in (
        *(["--mode=eval"], ["--mode=export", "--checkpoint=1"], ["--mode=sample", "--prompt=x"], ["--mode=report"]),
        ["--mode=report", f"--runs={run}", f"--out={tmp_path / 'a' / 'b.html'}", "--run_dir="],
    ):
        with flagsaver.flagsaver():
            assert main.main(main.parse(["solrl_jax", f"--run_dir={run}", "--devices=1", *words])) == 0
    assert (tmp_path / "a/b.html").read_text() == (tmp_path / "run/report.html").read_text()
    with flagsaver.flagsaver():
        assert main.main(main.parse(["solrl_jax", f"--run_dir={run}", "--mode=eval", "--checkpoint=77"])) == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    with flagsaver.flagsaver():
        assert main.main(main.parse(["solrl_jax", f"--run_dir={run}/config.json", "--config=toy"])) == 2
    assert "config.json is a file: give a new folder or the folder of a run" in capsys.readouterr().err


# --- iteration 0's line ---------------------------------------------------------------------------------------------


def numbers_of(run):
    return [line["iteration"] for line in log.read(run / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["write_grid", "save", "write"])
def test_a_run_killed_at_its_first_pictures_has_one_line_of_the_base(toy, tmp_path, monkeypatch, where):
    """Before the grid, before the pictures are kept, and before the line: a resumed run is an unbroken one."""
    cfg, run = config.override(toy, iterations=2), tmp_path / "run"
    train.train(cfg, tmp_path / "whole", devices=1)
    with monkeypatch.context() as patch:
        strike(patch, where)
        with pytest.raises(KeyboardInterrupt):
            train.train(cfg, run, devices=1)
    assert numbers_of(run) == [] and checkpoint.steps(run) == []
    train.train(cfg, run, resume=True, devices=1)
    assert numbers_of(run) == [0, 1, 2] and metrics_of(run) == metrics_of(tmp_path / "whole")


def strike(patch, where):
    """What a kill leaves: nothing is caught, nothing more is written."""

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    if where != "write":
        patch.setattr(pictures, where, killed)
        return
    patch.setattr(log, "finite", killed)


def test_a_line_of_the_base_that_was_written_before_the_pictures_is_not_written_twice(toy, tmp_path):
    """As a run of an older version left it when it was killed between the two."""
    run, cfg = tmp_path / "run", config.override(toy, iterations=1)
    train.train(cfg, tmp_path / "whole", devices=1)
    run.mkdir()
    (run / "config.json").write_text(config.to_json(cfg))
    (run / "metrics.jsonl").write_text((tmp_path / "whole/metrics.jsonl").read_text().splitlines()[0] + "\n")
    train.train(cfg, run, resume=True, devices=1)
    assert numbers_of(run) == [0, 1] and metrics_of(run) == metrics_of(tmp_path / "whole")


@pytest.mark.slow
def test_evaluation_that_is_switched_on_late_has_its_base(toy, tmp_path, capsys):
    """Its line comes first, as if it had been there: report and alarms have the base to compare with."""
    run = tmp_path / "run"
    train.train(config.override(toy, iterations=2), tmp_path / "whole", devices=1)
    train.train(config.override(toy, iterations=1, **{"evaluate.every": 0}), run, devices=1)
    assert numbers_of(run) == [1]
    train.train(config.override(toy, iterations=2), run, resume=True, devices=1)
    assert numbers_of(run) == [0, 1, 2]
    found, whole = metrics_of(run), metrics_of(tmp_path / "whole")
    assert found[0] == whole[0] and found[2] == whole[2] and found[0]["eval_reward_dark"] > 0
    capsys.readouterr()
    train.train(config.override(toy, iterations=3), run, resume=True, devices=1)
    assert numbers_of(run) == [0, 1, 2, 3] and "base model:" not in capsys.readouterr().out  # it was there


def test_what_the_bases_pictures_depend_on(toy):
    """Not on how often they are compared, nor on what a backward pass keeps."""
    parts = assemble.assemble(toy, 1)

    def text(test=parts.prompts.test, **changes):
        cfg = config.override(toy, **{name.replace("_", ".", 1): x for name, x in changes.items()})
        return evaluate.settings(parts._replace(cfg=cfg, prompts=parts.prompts._replace(test=test)))

    assert text() == text(evaluate_every=7) == text(evaluate_every=0) == text(model_remat_keeps="attention")
    others = [{"steps": 7}, {"solver": "euler"}, {"prompts": 2}, {"guidance": 2.5}]
    found = {text(**{f"evaluate_{name}": x for name, x in other.items()}) for other in others}
    assert text() == text(model_path="/moved")
    found |= {text(), text(seed=5), text(model_text_tokens=7), text(test=parts.prompts.test[::-1])}
    assert len(found) == len(others) + 4


def test_both_kinds_of_prompts_that_are_too_few_are_named(toy):
    message = r"prompts=16, but .* training prompts: use \d or fewer; evaluate\.prompts=9, but .* test prompts: use \d"
    with pytest.raises(config.ConfigError, match=message):
        assemble.open_prompts(toy, train=16, test=9)


@pytest.mark.slow
def test_another_evaluation_at_resume_gives_the_base_its_own_line(toy, tmp_path):
    """Line 0 and base.npz are always of one evaluation."""
    run = tmp_path / "run"
    train.train(config.override(toy, iterations=1), run, devices=1)
    before = metrics_of(run)[0]
    train.train(config.override(toy, iterations=2, **{"evaluate.rewards": "plain"}), run, resume=True, devices=1)
    after = metrics_of(run)[0]
    assert numbers_of(run) == [0, 1, 2] and "eval_reward_dark" in before and "eval_reward_dark" not in after
    kept = pictures.load(run / "grids/base.npz")
    assert after["eval_reward_plain"] == pytest.approx(kept.shown.means["plain"].mean()) == pytest.approx(0.25)
    assert after["eval_reward_bright"] == before["eval_reward_bright"]


@pytest.mark.slow
def test_other_test_prompts_at_resume_are_drawn_by_the_base_too(toy, tmp_path):
    """A gain is over the base's pictures of the same prompts."""
    file, run = tmp_path / "prompts.txt", tmp_path / "run"
    texts = Path(toy.prompt_files).read_text().splitlines()
    file.write_text("\n".join(texts))
    cfg = config.override(toy, prompt_files=str(file), **{"evaluate.every": 1})
    train.train(config.override(cfg, iterations=1), run, devices=1)
    before = pictures.load(run / "grids/base.npz").shown.prompts
    file.write_text("\n".join(f"other {text}" for text in texts))
    train.train(config.override(cfg, iterations=2), run, resume=True, devices=1)
    base, last = (pictures.load(run / f"grids/{name}.npz").shown.prompts for name in ("base", "last"))
    assert base == last and all(text.startswith("other ") for text in base) and not set(base) & set(before)


# --- what a run delivers --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "{", '{"a": 1}', "[1]"])
def test_files_that_cannot_be_read_are_absent_for_a_resumed_run(toy, tmp_path, capsys, content):
    """Said once, each by its name; the base is drawn anew and the run ends as one that was whole."""
    run, toy = tmp_path / "run", config.override(toy, **{"evaluate.every": 1})
    train.train(config.override(toy, iterations=2), tmp_path / "whole", devices=1)
    train.train(config.override(toy, iterations=1), run, devices=1)
    for name in ("starts.json", "grids/base.npz", "grids/last.npz"):
        (run / name).write_text(content)
    capsys.readouterr()
    train.train(config.override(toy, iterations=2), run, resume=True, devices=1)
    said = capsys.readouterr().out
    for name in ("starts.json", "grids/base.npz"):
        assert said.count(f"{run / name} cannot be read and counts as absent (") == 1
    assert metrics_of(run) == metrics_of(tmp_path / "whole")
    (start,) = json.loads((run / "starts.json").read_text())
    assert start["after"] == 1 and "starts.json cannot be read" in start["notes"][0]
    assert (run / "report.html").stat().st_size > 0 and pictures.load(run / "grids/last.npz").iteration == 2


@pytest.mark.parametrize("stopped", [False, True])
def test_a_report_that_cannot_be_made_hides_nothing(toy, tmp_path, monkeypatch, capsys, stopped):
    """Its last iteration spoils config.json, without which there is no report: the LoRA is there before."""
    run, write, seen = tmp_path / "run", train.report.write, []

    def spoilt(folders, file):
        seen.append((run / "pytorch_lora_weights.safetensors").exists() and (run / "model_card.md").exists())
        (run / "config.json").write_text("{")
        return write(folders, file)

    monkeypatch.setattr(train.report, "write", spoilt)
    if stopped:
        interrupt_at(monkeypatch, 1)
    train.train(config.override(toy, iterations=2), run, devices=1)
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if line.startswith(f"warning: {run / 'report.html'} could not be made (ReportError")]
    assert len(told) == 1 and f"{run / 'config.json'}: not the JSON of a config" in told[0]
    assert seen == [not stopped] and "report.html" not in lines[-1]
    assert lines[-1].startswith("stopped after iteration 1 of 2" if stopped else "done: the LoRA is ")


def test_the_main_file_is_the_policy_that_was_evaluated(toy, tmp_path, capsys):
    """The average; the policy as it ended is in current/. The last line and the card say which is which."""
    run = tmp_path / "run"
    train.train(config.override(toy, iterations=3), run, devices=1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert "the average that was evaluated (the policy as it ended: " + str(run / "current") in last
    like = assemble.blank(toy, TOY, assemble.make_mesh(1))
    fields = {"ema": like.ema, "lora": like.lora}
    found = checkpoint.restore_fields(checkpoint.folder(run, 3), fields, toy, assemble.INFERENCE)
    state = like._replace(**found)
    for folder, mine, other in ((run, state.ema, state.lora), (run / "current", state.lora, state.ema)):
        up = load_file(folder / "pytorch_lora_weights.safetensors")["transformer.to_q.lora_B.weight"]
        np.testing.assert_array_equal(up, 2 * np.asarray(mine["to_q"]["b"]).T)  # alpha / rank is 2
        assert np.any(up != 2 * np.asarray(other["to_q"]["b"]).T)
    card = (run / "model_card.md").read_text()
    assert "running average" in card and "`current/`" in card and "ema/" not in card
    (run / "ema").mkdir()  # of an older version
    export.export(toy, run, place=checkpoint.folder(run, 3), devices=1)
    assert f"the policy as it was then in {run / 'current'}" in capsys.readouterr().out
    assert "`ema/` is of an earlier version" in (run / "model_card.md").read_text()


def test_the_best_checkpoint_is_taken_by_every_mode(toy, tmp_path, capsys, monkeypatch):
    """Of the whole ones that were evaluated: 2 is the best, 4 the best of what is left where 2 is damaged."""
    from absl.testing import flagsaver

    run = tmp_path / "run"
    train.train(config.override(toy, keep=5), run, devices=1)

    def scored(**scores):
        for step in checkpoint.steps(run):
            file = checkpoint.folder(run, step) / "manifest.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"score": scores.get(f"step_{step}")}))

    scored(step_2=0.9, step_4=0.6, step_5=0.5)
    assert checkpoint.steps(run) == [5, 4, 2]

    def command(*words):
        capsys.readouterr()
        with flagsaver.flagsaver():
            code = main.main(main.parse(["solrl_jax", "--devices=1", "--checkpoint=best", *words]))
        return code, capsys.readouterr()

    def mode(name, *words):
        return command(f"--run_dir={run}", f"--mode={name}", *words)

    told = f"the best checkpoint is {checkpoint.folder(run, 2)}"
    for name, *words in (("export",), ("sample", "--prompt=x"), ("eval",)):
        code, said = mode(name, *words)
        assert code == 0 and said.out.splitlines()[0] == told, name
    export.export(toy, tmp_path / "two", place=checkpoint.folder(run, 2), devices=1)
    two, exported = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (tmp_path / "two", run))
    jax.tree.map(np.testing.assert_array_equal, two, exported)
    (checkpoint.folder(run, 2) / "config.json").write_text("{}")
    assert mode("export")[1].out.splitlines()[0] == f"the best checkpoint is {checkpoint.folder(run, 4)}"
    scored()
    code, said = mode("export")
    assert code == 2 and f"--checkpoint=best: no whole checkpoint of {run} was evaluated; name a step" in said.err
    code, said = command("--config=tiny", "--mode=export")
    assert code == 2 and "--checkpoint=best needs --run_dir" in said.err


@pytest.mark.slow
@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_the_reward_rises_and_with_a_negative_weight_falls(toy, tmp_path, weight):
    """The whole loop moves the pictures to where the sign of the weight says. Small steps, many candidates: this
    network was never trained, so at large steps it drifts whatever the reward is."""
    changes = {"iterations": 40, "prompts": 7, "candidates": 16, "kept": 8, "explore.chunk": 16, "regenerate.chunk": 8}
    changes |= {"learn.micro_batch": 8, "learn.learning_rate": 0.01, "learn.kl_weight": 0.1, "evaluate.every": 40}
    cfg = config.override(toy, **changes, **{"evaluate.steps": 4, "save_every": 0, "reward": f"bright:{weight}"})
    assert train.train(cfg, tmp_path / "run", devices=1) == 0
    metrics = metrics_of(tmp_path / "run")
    change = metrics[40]["eval_reward_bright"] - metrics[0]["eval_reward_bright"]
    assert weight * change > 0.004  # .0070 and .0073
    assert metrics[40]["eval_gain/avg"] == pytest.approx(weight * change, abs=1e-5)
