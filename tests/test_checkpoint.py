"""Checkpoints: exact round trips; damaged, unfinished and incompatible ones are refused."""

import json
import resource
import subprocess
import sys
import types
import unittest.mock
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from solrl_jax import config, sharding
from solrl_jax.run import checkpoint
from solrl_jax.run.checkpoint import CheckpointError, Saver
from solrl_jax.structs import Hyper, TrainState
from tests import nano

CFG = config.Config(name="test", keep=2)


def state_at(step, width=8, rank=2):
    key = jax.random.key(7)
    a = jax.random.normal(key, (width, rank))
    lora = {"to_q": {"a": a, "b": (a.T * step).astype(jnp.bfloat16)}}
    optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))
    _, moments = optimizer.update(lora, optimizer.init(lora), lora)
    count = jnp.int32(step)
    hyper = Hyper(*(jnp.float32(0.1 * i) for i in range(len(Hyper._fields))))
    state = TrainState(
        count, count, count * 0, jax.random.fold_in(key, step), lora, lora, lora, moments, hyper, count * 0
    )
    return sharding.replicate(state, sharding.make_mesh(2))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, x.ndim)
        raw = (jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in (x, y))
        np.testing.assert_array_equal(*map(np.asarray, raw))


@pytest.fixture
def run(tmp_path):
    """A run with the checkpoints 2 and 3; 1 was deleted because keep=2."""
    with Saver(tmp_path, CFG) as saver:
        for step in (1, 2, 3):
            saver.save(state_at(step))
    (tmp_path / "config.json").write_text(config.to_json(CFG))
    return tmp_path


def largest_file(place):
    return max((p for p in (place / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_exact_there_and_back_and_the_newest_are_kept(run):
    assert checkpoint.steps(run) == [3, 2] and checkpoint.latest(run) == (3, [])
    for step in (2, 3):
        same(checkpoint.restore(checkpoint.folder(run, step), state_at(0), CFG), state_at(step))
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_at(0))
    same(checkpoint.restore(checkpoint.folder(run, 3), specs, CFG), state_at(3))
    assert checkpoint.load_config(run) == checkpoint.load_config(checkpoint.folder(run, 3)) == CFG


def test_a_flipped_byte_is_seen_and_the_one_before_is_used(run):
    file = largest_file(checkpoint.folder(run, 3))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    step, reasons = checkpoint.latest(run)
    assert step == 2 and len(reasons) == 1
    assert "checkpoints/3 is skipped" in reasons[0] and "is not what was written" in reasons[0]
    place, said = checkpoint.find(run)
    assert place.name == "2" and said == reasons
    with pytest.raises(CheckpointError, match=r"checkpoints/3 cannot be used: .*SHA-256 differs"):
        checkpoint.restore(checkpoint.folder(run, 3), state_at(0), CFG)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (
            lambda place: largest_file(place).write_bytes(largest_file(place).read_bytes()[:-9]),
            "is not what was written",
        ),
        (lambda place: largest_file(place).unlink(), "is missing"),
        (lambda place: (place / "manifest.json").unlink(), "no manifest.json, so its save was cut short"),
        (lambda place: (place / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda place: (place / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda place: (place / "manifest.json").write_text("[" * 100_000), "manifest.json cannot be read"),
        (lambda place: (place / "config.json").write_text("{}"), "config.json is not what was written"),
    ],
)
def test_other_damage_is_seen(run, harm, reason):
    harm(checkpoint.folder(run, 3))
    step, reasons = checkpoint.latest(run)
    assert step == 2 and reason in reasons[0]
    harm(checkpoint.folder(run, 2))
    assert checkpoint.latest(run)[0] is None
    with pytest.raises(CheckpointError, match="has no whole checkpoint"):
        checkpoint.find(run)


def test_what_a_file_manager_leaves_is_no_damage(run):
    for name in (".DS_Store", "state/Thumbs.db"):
        (checkpoint.folder(run, 3) / name).write_text("x")
    (checkpoint.folder(run, 3) / ".nfs01").symlink_to("gone")
    assert checkpoint.latest(run) == (3, [])
    same(checkpoint.restore(checkpoint.folder(run, 3), state_at(0), CFG), state_at(3))


def test_a_deletion_that_is_cut_short_leaves_no_checkpoint(run, monkeypatch):
    """Killed between two files: what is left of the step does not count as one of those that are kept."""
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda place, ignore_errors: None)
    checkpoint._drop_older(run, 3, keep=1)
    assert checkpoint.latest(run)[0] == 3 and checkpoint.steps(run) == [3, 2]
    assert not (checkpoint.folder(run, 2) / "manifest.json").exists()


def test_an_older_checkpoint_that_cannot_be_deleted_ends_no_run(run, monkeypatch):
    """As where another process has it open, on Windows or NFS: the new one is whole."""

    def refused(self, missing_ok=False):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "unlink", refused)
    checkpoint._drop_older(run, 3, keep=1)
    assert checkpoint.latest(run)[0] == 3


def test_a_damaged_step_is_written_again_and_is_never_what_is_kept(run):
    largest_file(checkpoint.folder(run, 3)).unlink()
    with Saver(run, config.override(CFG, keep=1)) as saver:
        saver.save(state_at(2))  # already saved: nothing to do
        assert saver.pending is None
        saver.save(state_at(3))
    assert checkpoint.latest(run) == (3, []) and checkpoint.steps(run) == [3]


def test_leftovers_of_cut_saves_are_cleaned(run):
    left = run / "checkpoints" / "4" / "state.orbax-checkpoint-tmp-12"
    left.mkdir(parents=True)
    (left / "half").write_text("x")
    (run / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()
    part = checkpoint.folder(run, 3) / "manifest.json.part"
    part.write_text("{")
    with Saver(run, CFG) as saver:
        assert not left.exists() and not part.exists() and saver.last == 3
        assert not (run / "checkpoints" / "5.orbax-checkpoint-tmp").exists()
        assert checkpoint.latest(run)[0] == 3
        saver.save(state_at(6))
    assert checkpoint.steps(run) == [6, 3]  # the empty 4 is gone and did not count


def test_another_structure_or_config_is_named(run):
    place = checkpoint.folder(run, 3)
    with pytest.raises(CheckpointError, match=r"lora/to_q/a is float32\[8,2\] there and float32\[8,4\] here"):
        checkpoint.restore(place, state_at(0, rank=4), CFG)
    other = state_at(0)._replace(ema={})
    with pytest.raises(CheckpointError, match=r"ema/to_q/a is float32\[8,2\] there and absent here"):
        checkpoint.restore(place, other, CFG)
    same(checkpoint.restore(place, state_at(0), config.override(CFG, iterations=9)), state_at(3))


def test_of_the_config_only_what_no_number_of_the_training_depends_on_may_change(run):
    """Each field separately, and the fields of the watch if it only warns."""

    def refused(cfg=CFG, **changes):
        return checkpoint.forbidden(cfg, config.override(cfg, **changes))

    assert refused(**{"learn.kl_weight": 0.5}) == "learn.kl_weight is 0.0001 there and 0.5 here"
    assert refused(**{"evaluate.held_out": 5}) == "evaluate.held_out is 0 there and 5 here"  # re-splits the prompts
    free = {"iterations": 9, "wandb": "a/b", "save_every": 3, "evaluate.every": 7, "evaluate.grid": 2, "keep": 1}
    assert refused(**free, **{"watch.every": 3, "watch.prompts": 2, "evaluate.rewards": "shapes"}) == ""
    assert refused(**{"watch.rank": 0.1}) == "watch.rank is 0.5 there and 0.1 here"
    falls = config.override(CFG, **{"watch.fall_back": "true"})
    assert refused(falls, **{"watch.every": 3}) == "watch.every is 20 there and 3 here"
    assert refused(**{"watch.fall_back": "true", "watch.prompts": 2}).split("; ") == [
        "watch.prompts is 4 there and 2 here",
        "watch.fall_back is False there and True here",
    ]
    with pytest.raises(CheckpointError, match=r"config: learn.kl_weight is 0.0001 there and 0.5 here\. Go on"):
        checkpoint.restore(checkpoint.folder(run, 3), state_at(0), config.override(CFG, **{"learn.kl_weight": 0.5}))


def test_inference_reads_only_what_it_uses(run):
    """The average can be read from a checkpoint whose state has more, fewer and other fields."""
    place, like = checkpoint.folder(run, 3), {"ema": state_at(0).ema}
    (place / "manifest.json").unlink()
    old, wanted = state_at(3)._asdict(), state_at(3).ema
    strange = {k: v for k, v in old.items() if k not in ("moments", "hyper")} | {"velocity": old["lora"]}
    checkpoint.write(run, 3, strange, CFG)
    other = config.override(CFG, **{"learn.kl_weight": 0.5})
    same(checkpoint.restore_fields(place, like, other, ("lora.",)), {"ema": wanted})
    with pytest.raises(CheckpointError, match=r"lora.alpha is 64.0 there and 8.0 here"):
        checkpoint.restore_fields(place, like, config.override(CFG, **{"lora.alpha": 8}), ("lora.",))
    with pytest.raises(CheckpointError, match=r"ema/to_q/a is float32\[8,2\] there and float32\[8,4\] here"):
        checkpoint.restore_fields(place, {"ema": state_at(0, rank=4).ema}, CFG, ("lora.",))
    with pytest.raises(CheckpointError, match=r"velocity/to_q/a is float32\[8,2\] there and absent here"):
        checkpoint.restore(place, state_at(0), CFG)


def test_a_later_format_is_refused_by_its_number(run):
    file = checkpoint.folder(run, 3) / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 3}))
    with pytest.raises(CheckpointError, match=r"has format 3, this version of solrl_jax reads up to 2: update"):
        checkpoint.restore(checkpoint.folder(run, 3), state_at(0), CFG)


def test_no_run_and_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="is not the directory of a run"):
        checkpoint.find(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*checkpoints/7"):
        checkpoint.find(tmp_path, "7")
    (tmp_path / "checkpoints/7/state").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"--checkpoint=7: .*checkpoints/7 cannot be used: .* cut short; name"):
        checkpoint.find(tmp_path, "7")
    (tmp_path / "config.json").write_text('{"beta": 1}')
    with pytest.raises(CheckpointError, match="unknown fields beta"):
        checkpoint.find(tmp_path)
    (tmp_path / "config.json").write_bytes(b'\xff\xfe{"seed": 1}')
    with pytest.raises(CheckpointError, match=r"config\.json: not the JSON of a config"):
        checkpoint.find(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: Is a directory"):
        checkpoint.find(tmp_path)


def test_a_full_disk_is_told_at_the_next_save_which_is_not_lost(run, monkeypatch):
    """The save of 4 fails, space is freed, the run is stopped at 9: 9 is saved, then the failure of 4 is raised."""
    usage = checkpoint.shutil.disk_usage
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda place: types.SimpleNamespace(free=1_000_000))
    message = (
        r"checkpoints/4 could not be written: no space left .*1.0 MB free\)\. The last good .* is intact: .*/3"
        r"\. The save after it, .*/9, is whole$"
    )
    with pytest.raises(CheckpointError, match=message), Saver(run, CFG) as saver:
        saver.save(state_at(4))
        with pytest.raises(CheckpointError):
            saver.pending.result()
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage)
        saver.save(state_at(9))
    assert checkpoint.latest(run) == (9, []) and checkpoint.steps(run) == [9, 3]


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, "tests")
import test_checkpoint as t
big = t.state_at(4, width=200_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
t.checkpoint.write(Path(sys.argv[1]), 4, big, t.CFG)
"""


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a file size limit")
def test_a_write_that_the_system_refuses_is_one_clear_error(run):
    """A real failure: the kernel refuses files over 100 kB, and tensorstore reports it in its own form."""
    found = subprocess.run([sys.executable, "-c", LIMITED, str(run)], capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert "CheckpointError: checkpoint " in found.stderr and "/4 could not be written: File too large" in found.stderr
    assert "ERROR:absl" not in found.stderr and "Event loop is closed" not in found.stderr
    assert checkpoint.latest(run)[0] == 3  # unfinished writes may leave files of 4; they do not count
    with Saver(run, CFG) as saver:
        saver.save(state_at(4))
    assert checkpoint.latest(run) == (4, [])


def test_the_manifest_says_what_is_in_the_tree(run):
    manifest = json.loads((checkpoint.folder(run, 3) / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["score"]) == (2, 3, None)
    assert manifest["tree"]["key"] == "key<fry>[]"
    assert manifest["tree"]["lora/to_q/b"] == "bfloat16[2,8]" and "config.json" in manifest["files"]


def test_the_best_by_evaluation_is_kept_too(tmp_path):
    """keep=2 of steps 1 to 5, evaluated at 2 (the best), 4 and 5. Then a better step is saved and 2 is deleted. No line
    of metrics is needed."""
    scores = {2: 0.9, 4: 0.3}
    with Saver(tmp_path, CFG) as saver:
        for step in range(1, 6):
            saver.save(state_at(step), scores.get(step))
    assert checkpoint.steps(tmp_path) == [5, 4, 2] and checkpoint.best(tmp_path, [5, 4, 2]) == 2
    with Saver(tmp_path, CFG) as saver:
        saver.save(state_at(6), 0.95)
    assert checkpoint.steps(tmp_path) == [6, 5] and checkpoint.best(tmp_path, [5]) is None
    assert checkpoint.best(tmp_path, [6, 5]) == 6


WINDOWS = """
import sys, types, fcntl, jax, optax  # modules that look at the system do so now
asked = []
def locking(number, mode, count):
    asked.append((mode, count))
    try:
        fcntl.flock(number, (fcntl.LOCK_UN if mode == "unlock" else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(13, "Permission denied") from None  # as Windows, if another process holds the lock
sys.modules["fcntl"], sys.modules["msvcrt"] = None, types.SimpleNamespace(
    locking=locking, LK_NBLCK="lock", LK_UNLCK="unlock"
)
"""
"""No fcntl, and an msvcrt with the behaviour of Windows."""


@pytest.mark.parametrize("system", ["", WINDOWS], ids=["posix", "windows"])
def test_one_process_at_a_time(tmp_path, system):
    """A second process is refused while the first one holds the lock, but not after the first was killed."""
    hold = system + "import sys, time; from pathlib import Path\n"
    hold += "from solrl_jax import train; from solrl_jax.run import checkpoint\n"
    hold += "with checkpoint.alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="another process is training there"), checkpoint.alone(tmp_path):
            pass
        second = subprocess.run([sys.executable, "-c", hold, str(tmp_path)], capture_output=True, text=True)
        assert "CheckpointError: --run_dir=" in second.stderr and "another process is training" in second.stderr
        other.kill()
        other.wait()
    with checkpoint.alone(tmp_path):
        pass


@pytest.mark.slow
def test_a_run_locks_its_folder_without_fcntl(tmp_path):
    """No module needs what Windows lacks; a run takes its lock and frees it at its end."""
    cfg = nano.build(tmp_path, iterations=1, evaluate=config.Evaluate(every=0), watch=config.Watch(every=0))
    (tmp_path / "config.json").write_text(config.to_json(cfg))
    code = "import orbax.checkpoint, tensorboardX, transformers\nfrom pathlib import Path\n"
    code += "from solrl_jax import config, main, train\nhere = Path(sys.argv[1])\n"
    code += "cfg = config.from_json((here / 'config.json').read_text())\nprint(train.train(cfg, here / 'run'), asked)"
    ended = subprocess.run([sys.executable, "-c", WINDOWS + code, str(tmp_path)], capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1:] == ["0 [('lock', 1), ('unlock', 1)]"], ended.stderr
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


def test_a_folder_that_cannot_be_opened_is_not_synced(tmp_path, monkeypatch):
    """Windows cannot open a folder; on other systems, a folder that cannot be flushed is an error."""
    denied = unittest.mock.Mock(side_effect=PermissionError(13, "Permission denied"))
    system = types.SimpleNamespace(name="posix", open=denied, O_RDONLY=0)
    monkeypatch.setattr(checkpoint, "os", system)
    with pytest.raises(PermissionError):
        checkpoint._sync(tmp_path)
    system.name = "nt"
    checkpoint._sync(tmp_path)
    assert denied.call_count == 1
