"""Faults during a run: SIGKILL and resume, for every algorithm and on other devices; a clock that runs backwards; a
reward that raises; a lost device; NaN in gradients and weights; a full disk."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.faults import run as faults
from solrl_jax import config, iteration, recipes, train
from solrl_jax.learn import apply_gradients
from solrl_jax.run import assemble, checkpoint, data, evaluate
from tests import toy_world
from tests.tiers import long, slow
from tests.toy_world import TOY, metrics_of

pytestmark = pytest.mark.usefixtures("compiled")
ALGORITHMS = ("sol_rl", "naive_scaling", "diffusionnft", "awm", "flow_grpo", "flow_grpo_fast", "dance_grpo")
SHORT = {"evaluate.every": 0, "save_every": 1}


# --- a run that is killed -------------------------------------------------------------------------------------------


def by(toy, name):
    """The toy config of a family or method, with rollouts of 4 steps, 2 of them trained; saved after 2 of 4."""
    cfg = recipes.family(toy, name)
    window = {"window": 2, "window_within": 3} if cfg.regenerate.window else {}
    stage = dataclasses.replace(cfg.regenerate, steps=4, **window)
    learn = dataclasses.replace(cfg.learn, timestep_fraction=0.5, micro_batch=2, updates=2, clip_range=0.5)
    learn = dataclasses.replace(learn, first_time=0)
    return dataclasses.replace(cfg, regenerate=stage, learn=learn, iterations=4, save_every=2)


def killed(name, folder):
    """Start a run of `name` in folder/name in another process and kill it when its fourth iteration starts."""
    cfg, batch = by(toy_world.world(pytest.MonkeyPatch(), folder), name), data.batch

    def struck(prompts, seed, number, count):
        if number == 3:
            while checkpoint.latest(folder / name)[0] != 2:  # wait until the run has saved something
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(prompts, seed, number, count)

    data.batch = struck
    train.train(cfg, folder / name, devices=1)


KILLED = """
import os, signal, sys
from pathlib import Path
import jax
from tests import test_faults
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
for name in sys.argv[3:]:
    if not (child := os.fork()):
        test_faults.killed(name, Path(sys.argv[1]))
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, name
"""


@pytest.fixture(scope="module", params=[ALGORITHMS[:1], long(ALGORITHMS[1:])])
def broken(request, tmp_path_factory):
    """(folder, algorithms): one run of each, killed by SIGKILL after 3 of 4 iterations, of which 2 are saved."""
    folder = tmp_path_factory.mktemp("killed")
    words = [sys.executable, "-c", KILLED, str(folder), jax.config.values["jax_compilation_cache_dir"], *request.param]
    found = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    return folder, request.param


def raw(state):
    """{path: array} of a state; random keys as numbers."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return {jax.tree_util.keystr(k): np.asarray(jax.random.key_data(x) if is_key(x) else x) for k, x in leaves}


def end_of(run, cfg):
    """All arrays of a run's newest checkpoint."""
    return raw(checkpoint.restore(checkpoint.find(run)[0], assemble.blank(cfg, TOY, assemble.make_mesh(1)), cfg))


def test_a_killed_run_goes_on_to_the_bit(toy, tmp_path, broken):
    """4 iterations give the same as 3, of which 2 were saved, SIGKILL, and 2 more: metrics, pictures, LoRA, EMA, old
    policy, moments, key, counts."""
    folder, names = broken
    for name in names:
        cfg, whole, run = by(toy, name), tmp_path / name, folder / name
        assert checkpoint.latest(run) == (2, []) and sorted(metrics_of(run)) == [0, 1, 2, 3], name
        cfg = dataclasses.replace(cfg, prompt_files=str(folder / "prompts.txt"))
        train.train(cfg, whole, devices=1)
        train.train(cfg, run, resume=True, devices=1)
        assert metrics_of(run) == metrics_of(whole) and sorted(metrics_of(run)) == [0, 1, 2, 3, 4], name
        ours, theirs = end_of(run, cfg), end_of(whole, cfg)
        assert ours.keys() == theirs.keys() and int(ours[".iteration"]) == 4 and int(ours[".updates"]) == 8, name
        for key, value in ours.items():
            np.testing.assert_array_equal(value, theirs[key], err_msg=f"{name} {key}")
        assert np.any(ours[".ema['to_q']['b']"] != ours[".lora['to_q']['b']"])  # EMA and LoRA differ
        for file in (faults.LORA, f"current/{faults.LORA}"):
            jax.tree.map(np.testing.assert_array_equal, load_file(run / file), load_file(whole / file))
        assert (run / "grids/000004.png").read_bytes() == (whole / "grids/000004.png").read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices(toy, tmp_path, monkeypatch):
    """2 of 4 iterations on one device, the others on two, then on four: the same samples (keys) are kept; metrics and
    LoRA are equal up to rounding."""
    cfg, kept, staged = by(toy, "sol_rl"), {}, iteration.Staged
    monkeypatch.setattr(iteration, "Staged", lambda **statics: watched(staged(**statics)))

    def watched(run):
        learn = run.jit["learn"]

        def learnt(state, frozen, cond, samples):
            kept.setdefault(int(state.iteration), []).append(np.asarray(jax.random.key_data(samples.keys)))
            return learn(state, frozen, cond, samples)

        run.jit["learn"] = learnt
        return run

    train.train(cfg, tmp_path / "one", devices=1)
    for devices in (2, 4):
        run = tmp_path / f"{devices}"
        train.train(config.override(cfg, iterations=2), run, devices=1)
        train.train(cfg, run, resume=True, devices=devices)
        one, other = metrics_of(tmp_path / "one"), metrics_of(run)
        assert one.keys() == other.keys() and {k: other[k] for k in (1, 2)} == {k: one[k] for k in (1, 2)}
        for number in (3, 4):
            assert other[number] == pytest.approx(one[number], rel=1e-4, abs=1e-6)
        ours, theirs = load_file(run / faults.LORA), load_file(tmp_path / "one" / faults.LORA)
        for key, value in ours.items():
            np.testing.assert_allclose(value, theirs[key], rtol=1e-4, atol=1e-6)
    for number in (2, 3):
        first, *others = kept[number]
        assert len(others) == 2 and first.shape == (4, 2, 2) and all(np.array_equal(first, x) for x in others)


def test_damage_to_the_newest_checkpoint_costs_only_time(toy, tmp_path, capsys):
    """One checkpoint has a flipped byte, another is truncated: both are reported, the older one gives the same end."""
    cfg = config.override(toy, **SHORT, iterations=4)
    train.train(cfg, tmp_path / "whole", devices=1)
    train.train(config.override(cfg, iterations=3), tmp_path / "run", devices=1)
    for step, harm in ((3, lambda b: b[:-1] + bytes([b[-1] ^ 1])), (2, lambda b: b[:-7])):
        place = checkpoint.folder(tmp_path / "run", step) / "state"
        file = max((p for p in place.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        file.write_bytes(harm(file.read_bytes()))
    capsys.readouterr()
    train.train(cfg, tmp_path / "run", resume=True, devices=1)
    said = capsys.readouterr().out
    assert all(f"checkpoints/{n} is skipped" in said for n in (3, 2)) and "checkpoints/1\n" in said
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


# --- faults outside the training --------------------------------------------------------------------------------------


def test_a_clock_that_goes_backwards_changes_nothing(toy, tmp_path, monkeypatch):
    """Wall time is only displayed: a run with a clock that runs backwards has the same numbers."""
    toy, now = config.override(toy, iterations=2), time.time
    train.train(toy, tmp_path / "plain", devices=1)
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


def goes_on(cfg, run, whole):
    """Resume `run` and compare its result with that of an uninterrupted run, bit for bit."""
    train.train(cfg, whole, devices=1)
    train.train(cfg, run, resume=True, devices=1)
    assert metrics_of(run) == metrics_of(whole)
    jax.tree.map(np.testing.assert_array_equal, load_file(run / faults.LORA), load_file(whole / faults.LORA))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["explore", "regenerate", "learn", "evaluate"])
def test_a_device_that_is_lost_in_mid_run(toy, tmp_path, monkeypatch, stage):
    """In a stage of iteration 3 or the evaluation of 2: one line of error; saves stay; the run can be resumed."""
    run, evaluation = tmp_path / "run", stage == "evaluate"
    cfg = config.override(toy, iterations=4, save_every=0 if evaluation else 1, **{"evaluate.every": 2})
    done = 1 if evaluation else 2
    with monkeypatch.context() as patch:
        lose(patch, stage, 2)
        with pytest.raises(train.TrainError, match=rf"^iteration {done + 1}: the device failed \(INTERNAL: .* lost\)"):
            train.train(cfg, run, devices=1)
    assert checkpoint.latest(run)[0] == done and max(metrics_of(run)) == done
    goes_on(cfg, run, tmp_path / "whole")


def lose(patch, stage, calls, message="INTERNAL: the device is lost\nand a page more"):
    """Raise a JaxRuntimeError in the stage's first call after so many iterations (evaluations)."""
    fail = jax.errors.JaxRuntimeError(message)
    if stage == "evaluate":
        real, count = evaluate.evaluate, iter(range(99))

        def judged(*args):
            if next(count) == calls - 1:  # the first call is for the base
                raise fail
            return real(*args)

        patch.setattr(evaluate, "evaluate", judged)
        return

    class Losing(iteration.Staged):
        def __call__(self, state, *rest):
            if int(state.iteration) == calls:
                self.jit[stage] = lambda *_: (_ for _ in ()).throw(fail)
            return super().__call__(state, *rest)

    patch.setattr(train.iteration, "Staged", Losing)


@pytest.mark.slow
def test_a_device_that_does_not_come_back_costs_what_was_not_saved(toy, tmp_path, monkeypatch):
    """Its arrays cannot be read either: both errors are reported, and the last save is the newest."""
    run, cfg = tmp_path / "run", config.override(toy, iterations=4)
    with monkeypatch.context() as patch:
        lose(patch, "learn", 3)
        save = checkpoint.save_tree

        def unread(place, tree):
            if int(tree.iteration) == 3:
                raise jax.errors.JaxRuntimeError("INTERNAL: the device is lost")
            save(place, tree)

        patch.setattr(checkpoint, "save_tree", unread)
        message = r"iteration 4: the device failed .*Beside that, .*checkpoints/3 could not.*intact: .*checkpoints/2"
        with pytest.raises(checkpoint.CheckpointError, match=message):
            train.train(cfg, run, devices=1)
    assert checkpoint.steps(run) == [2]
    goes_on(cfg, run, tmp_path / "whole")


def test_a_device_whose_memory_is_full_is_told_what_to_lower(toy, tmp_path, monkeypatch):
    lose(monkeypatch, "explore", 0, "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    message = r"iteration 1: the device's memory is full \(RESOURCE.*lower explore.chunk, .*--mode=plan"
    with pytest.raises(train.TrainError, match=message):
        train.train(toy, tmp_path / "run", devices=1)


OWN = """
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from solrl_jax.structs import Reward
HOST = {host}
calls = Path(__file__).with_name("calls")
def check():
    calls.write_text(calls.read_text() + "x")
    if len(calls.read_text()) == {number}:
        raise KeyError("no such picture")
def score(images, prompts):
    check()
    return images.mean((1, 2, 3)) / 255
def traced(params, images, tokens):
    check()
    return images.mean((1, 2, 3))
def make(path, dtype):
    return Reward("x", lambda prompts: np.zeros(len(prompts)), traced), {{}}
"""


@pytest.mark.parametrize(("host", "number", "done"), [(True, 22, 1), slow(False, 1, 0)])
def test_a_reward_that_raises_in_mid_run(toy, tmp_path, monkeypatch, host, number, done):
    """On the host (12 calls for the measurement at the start, then 8 per iteration) and on the devices, while explore
    is traced for the measurement. The error names the reward; the run can be resumed."""
    name, run = f"unsure_{host}".lower(), tmp_path / "run"
    (tmp_path / f"{name}.py").write_text(OWN.format(host=host, number=number))
    (tmp_path / "calls").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = f"{name}.score" if host else f"{name}.make"
    cfg = config.override(toy, reward=reward, iterations=3, save_every=1, **{"evaluate.every": 0, "watch.every": 2})
    line = OWN.splitlines().index('        raise KeyError("no such picture")') + 1
    saved = "Checkpoints" if done else "Nothing is saved in"
    message = rf"^reward {reward} failed: KeyError: 'no such picture' \(.*{name}\.py, line {line}\)\. {saved}"
    with pytest.raises(train.TrainError, match=message):
        train.train(cfg, run, devices=1)
    assert checkpoint.latest(run)[0] == (done or None) and sorted(metrics_of(run)) == ([0, 1] if host else [])
    goes_on(cfg, run, tmp_path / "whole")


# --- numbers that are not finite ------------------------------------------------------------------------------------


def poisoned(monkeypatch, first, last):
    """A network whose gradient, not its velocity, is NaN in iterations first to last, recognised by their prompts."""

    @jax.custom_jvp
    def nan_gradient(x, where):
        return x

    @nan_gradient.defjvp
    def _(primals, tangents):
        x, where = primals
        return x, tangents[0] * jnp.where(where > 0, jnp.nan, 1.0)

    def encode(params, ids):
        return {**TOY.encode(params, ids), "where": (ids == ord("!")).any(1).astype(jnp.float32)}

    def velocity(variables, x, sigma, cond):
        v = TOY.velocity(variables, x, sigma, cond)
        return nan_gradient(v, jnp.broadcast_to(cond["where"][:, None, None, None], v.shape))

    model, batch = TOY._replace(encode=encode, velocity=velocity), data.batch
    module = types.SimpleNamespace(make=lambda c: model, load=toy_world.load)
    monkeypatch.setattr(assemble, "model_module", lambda cfg: module)

    def marked(prompts, seed, number, count):
        found = batch(prompts, seed, number, count)
        return [f"!{p}"[:12] for p in found] if first <= number + 1 <= last else found

    monkeypatch.setattr(data, "batch", marked)


@pytest.mark.slow
@pytest.mark.parametrize("updates", [1, 2])
def test_nan_gradients_are_skipped_counted_and_end_the_run(toy, tmp_path, monkeypatch, capsys, updates):
    """In iteration 2 they change only the counts; three in a row from iteration 4 stop the run, which is saved."""
    cfg = config.override(toy, **SHORT, iterations=9, keep=9, **{"learn.updates": updates})
    run, last = tmp_path / "run", {1: 6, 2: 5}[updates]
    with monkeypatch.context() as patch:
        poisoned(patch, 2, 2)
        train.train(config.override(cfg, iterations=3), run, devices=1)
    assert f"warning: iteration 2: {updates} updates were not finite and skipped" in capsys.readouterr().out
    found = metrics_of(run)
    assert [found[i]["skipped"] for i in (1, 2, 3)] == [0, updates, 0]
    assert found[2]["grad_norm"] is None and found[2]["reward/mean"] > 0
    with monkeypatch.context() as patch:
        poisoned(patch, 4, 9)
        message = rf"iteration {last}: {updates * (last - 3)} updates in a row .*lower learn.learning_rate.*Checkpoints"
        with pytest.raises(train.TrainError, match=message):
            train.train(cfg, run, resume=True, devices=1)
    assert checkpoint.steps(run) == list(range(last, 0, -1))
    states = {}
    for step in checkpoint.steps(run):
        like = assemble.blank(cfg, TOY, assemble.make_mesh(1))
        states[step] = raw(checkpoint.restore(checkpoint.folder(run, step), like, cfg))
    assert [int(states[i][".skipped"]) for i in (1, 2, 3, last)] == [0, updates, 0, updates * (last - 3)]
    for before, after in ((1, 2), (3, last)):
        for name in (".lora", ".ema", ".moments", ".updates"):
            for key in (k for k in states[after] if k.startswith(name)):
                np.testing.assert_array_equal(states[before][key], states[after][key], err_msg=key)
    assert any(np.any(states[2][k] != states[3][k]) for k in states[3] if k.startswith(".lora"))
    train.train(config.override(cfg, iterations=last + 1), run, resume=True, devices=1)  # without the NaN, it continues
    assert metrics_of(run)[last + 1]["skipped"] == 0


def test_a_step_to_a_lora_that_is_not_finite_is_not_taken(toy):
    """A finite gradient, but a learning rate that overflows float32."""
    parts = assemble.assemble(toy, 1)
    with jax.set_mesh(parts.mesh):
        state = assemble.fresh(parts)
        fast = state._replace(hyper=state.hyper._replace(learning_rate=jnp.float32(3e38)))
        after, norm = apply_gradients(
            fast, jax.tree.map(lambda x: 9 * jnp.ones_like(x), state.lora), parts.optimizer, parts.cfg
        )
    assert np.isfinite(norm) and int(after.skipped) == 1 and int(after.updates) == 0
    for name in ("lora", "ema", "moments"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))


def test_nan_weights_are_named(toy, tmp_path, monkeypatch):
    """NaN in the base: nothing is trained or saved."""

    def load(cfg, *places):
        base, vae, text = toy_world.load(cfg, *places)
        return {"to_q": {"kernel": base["to_q"]["kernel"].at[0, 0].set(jnp.nan)}}, vae, text

    module = types.SimpleNamespace(make=lambda c: TOY, load=load)
    monkeypatch.setattr(assemble, "model_module", lambda cfg: module)
    message = "iteration 1: a reward is not finite: bright = nan; not finite are network/to_q/kernel: look at those"
    with pytest.raises(train.TrainError, match=message):
        train.train(config.override(toy, **SHORT), tmp_path / "run", devices=1)
    assert checkpoint.steps(tmp_path / "run") == [] and metrics_of(tmp_path / "run") == {}


@pytest.mark.slow
def test_a_reward_that_sees_nothing_wrong_in_nan_pictures(toy, tmp_path, monkeypatch):
    """A reward of 8-bit pictures reads NaN as a colour. Its score is NaN all the same, and the LoRA is named, when the
    old policy has followed it.
    """
    run = tmp_path / "run"
    monkeypatch.setitem(
        sys.modules,
        "solrl_jax.rewards.bright",
        toy_world.reward_module("bright", lambda params, images, tokens: jnp.nan_to_num(images).mean((1, 2, 3))),
    )
    cfg = config.override(toy, **SHORT, iterations=9, keep=9)
    train.train(config.override(cfg, iterations=1), run, devices=1)
    place = checkpoint.folder(run, 1)
    state = checkpoint.restore(place, assemble.blank(cfg, TOY, assemble.make_mesh(1)), cfg)
    bad = state._replace(lora=jax.tree.map(lambda x: x.at[0].set(jnp.nan), state.lora))
    checkpoint.write(run, 2, bad._replace(iteration=state.iteration + 1), cfg)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2}\n')
    with pytest.raises(train.TrainError, match=r"4: .*bright = nan; not finite are lora/to_q/a, lora/to_q/b"):
        train.train(cfg, run, resume=True, devices=1)
    for step in checkpoint.steps(run)[:-1]:
        shutil.rmtree(checkpoint.folder(run, step))
    goes_on(config.override(cfg, iterations=3), run, tmp_path / "whole")  # as the message says


# --- a full disk ----------------------------------------------------------------------------------------------------

FULL = """
import sys
from pathlib import Path
import pytest
from solrl_jax import config, main
from tests import toy_world
patch = pytest.MonkeyPatch()
toy = toy_world.world(patch, Path(sys.argv[2]))
patch.setattr(config, "load", lambda spec, overrides: config.override(toy, **overrides))
run, words = sys.argv[1], sys.argv[3:]
words = main.parse(["solrl_jax", "--config=toy", f"--run_dir={run}", "--devices=1", *words])
sys.exit(main.main(words))
"""
MOUNTED = ["unshare", "--user", "--map-root-user", "--mount"]


def mounts():
    """Whether this process may mount a file system of a chosen size."""
    try:
        return not subprocess.run([*MOUNTED, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not mounts(), reason="needs a user namespace, for a small file system")
@pytest.mark.parametrize("left", [8, 120])
def test_a_disk_that_is_full(toy, tmp_path, left):
    """A real full disk: a tmpfs with so many kB left. One line of error; with more space, it resumes bit for bit."""
    run, small = tmp_path / "run", tmp_path / "small"
    small.mkdir()
    flags = ["--config.iterations=4", "--config.save_every=1", "--config.evaluate.every=2"]
    words = [sys.executable, "-c", FULL, str(small / "run"), str(tmp_path), *flags]
    python = " ".join(f'"${k}"' for k in range(len(words)))
    script = f"mount -t tmpfs -o size=4m none {small} && head -c {4096 - left}k /dev/zero > {small}/rest && "
    script += f"{python}; code=$?; cp -r {small}/run {run}; exit $code"
    found = subprocess.run([*MOUNTED, "sh", "-c", script, *words], capture_output=True, text=True, timeout=200)
    assert found.returncode == 2, found.stderr[-3000:]
    assert re.search("^error: .*No space left", found.stderr, re.I | re.M), found.stderr[
        -3000:
    ]  # tensorboardX adds its own
    cfg = config.override(toy, iterations=4, save_every=1, **{"evaluate.every": 2})
    if (run / "config.json").exists():
        goes_on(cfg, run, tmp_path / "whole")
