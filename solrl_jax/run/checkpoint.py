"""Whole training states on disk: orbax writes them, a manifest of SHA-256 hashes verifies them (run/manifest.py).

    <run>/checkpoints/<step>/state/         orbax; `step` is state.iteration, which also decides the next prompts
    <run>/checkpoints/<step>/config.json
    <run>/checkpoints/<step>/manifest.json  written last: without it the save is unfinished

Orbax restores a flipped byte without an error, and its latest_step() may be a damaged step. So a checkpoint counts only
if every file has the hash in its manifest.

Of several processes all give their parts to orbax; the first one makes the folder and, when all have written, hashes.
They meet in the thread that writes, on a channel of its own.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import gc
import importlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from solrl_jax import config, disk, guidance, processes
from solrl_jax.config import Config
from solrl_jax.run import base_loras, log, manifest
from solrl_jax.run.manifest import FORMAT, CheckpointError, damage, describe, hashes
from solrl_jax.structs import PyTree, TrainState

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

CHANGEABLE = (
    # No number of the training depends on these fields; on those of the second and third line, rounding does, and on
    # learn.micro_batch which points have the reference, which is the same in the mean.
    *("name", "iterations", "save_every", "keep", "encode_ahead", "wandb"),
    *("shard", "model.remat", "model.remat_keeps", "learn.deterministic"),
    *("explore.chunk", "regenerate.chunk", "learn.micro_batch"),
    *(f"evaluate.{f.name}" for f in dataclasses.fields(config.Evaluate) if f.name != "held_out"),
    *("model.path", "reward_paths", "prompt_files"),  # folders may move; of changed prompts the log has a line
    "model.lora",  # here by content (base_loras.check_same)
)
"""Fields that a resumed run may change. The training prompts depend on evaluate.held_out, so it is not one of them."""
WATCHING = ("watch.every", "watch.prompts")
"""Fields that it may also change if watch.fall_back is false before and after: the watch then only warns."""


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / str(step)


def steps(run: Path) -> list[int]:
    """Steps that have a folder, newest first, also damaged and unfinished ones."""
    found = (run / "checkpoints").glob("[0-9]*")
    return sorted((int(p.name) for p in found if p.name.isdecimal() and p.is_dir()), reverse=True)


# --- write ----------------------------------------------------------------------------------------------------------


class Saver:
    """Writes checkpoints of one run in the background, one at a time; leaving the context waits for the last one.

    `save` returns at once. The error of a save is raised by the next `save` or when the context ends. `facts` are for
    the manifest: "lora" and "prompts" of `manifest.read`.
    """

    def __init__(self, run: Path, cfg: Config, facts: Mapping[str, Any] = MappingProxyType({})):
        self.run, self.cfg, self.facts = run, cfg, facts
        self.last, _ = latest(run)  # the newest step that is whole or being written
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self.pending: concurrent.futures.Future | None = None

    def __enter__(self) -> "Saver":
        processes.by_first(lambda: clean(self.run))
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            pending = self.pending
            self.wait()
        except CheckpointError as e:
            if error is None or str(e) == str(error):
                raise
            raise CheckpointError(f"{error}. Beside that, {e}") from error  # first the error that ended the run
        else:
            if isinstance(error, CheckpointError) and pending is not None:
                raise CheckpointError(
                    f"{error}. The save after it, {folder(self.run, self.last or 0)}, is whole"
                ) from None
        finally:
            self.thread.shutdown()

    def save(self, state: TrainState, score: float | None = None) -> None:
        """Start to write `state`, unless its step is already saved. None of its arrays may be donated afterwards.

        `score` is the trained reward in its evaluation. If the previous save failed, raises CheckpointError after
        starting this one.
        """
        before, step = self.pending, int(state.iteration)
        if step != self.last:
            self.last = step
            self.pending = self.thread.submit(write, self.run, step, state, self.cfg, score, self.facts)
        if before is not None:
            processes.together(before.result)

    def wait(self) -> None:
        """Wait until the last state given to `save` is on disk. Raises CheckpointError."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def write(
    run: Path,
    step: int,
    state: PyTree,
    cfg: Config,
    score: float | None = None,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write one checkpoint: orbax, config, manifest with `facts`. Then delete older ones (`_drop_older`).

    Raises CheckpointError (full disk, no permission, a lost device) after removing the new folder; earlier steps are
    not touched. Threads of orbax that still write may leave files, which have no manifest and do not count.
    """
    place = folder(run, step)
    try:
        _write(place, step, state, cfg, score, facts)
    # Tensorstore reports a full disk as a ValueError.
    except (OSError, ValueError, jax.errors.JaxRuntimeError, processes.ProcessError) as e:
        why = cause(e)
    else:
        if processes.first():
            _drop_older(run, step, cfg.keep)
        return place
    # Outside of the except block, so that orbax's unfinished writes are freed before our own message.
    gc.collect()
    if processes.first():
        shutil.rmtree(place, ignore_errors=True)
    raise CheckpointError(f"checkpoint {place} could not be written: {why}. {_intact(run)}")


def _write(place: Path, step: int, state: PyTree, cfg: Config, score: float | None, facts: Mapping[str, Any]) -> None:
    processes.by_first(lambda: _make_room(place, state), CHANNEL)
    processes.together(lambda: save_tree(place / "state", state), CHANNEL)
    processes.by_first(lambda: _complete(place, step, state, cfg, score, facts), CHANNEL)


CHANNEL = "checkpoint"
"""Where the threads that write exchange what they found (processes.exchanged)."""


def _make_room(place: Path, state: PyTree) -> None:
    """An empty folder. Raises OSError if the disk has not enough space."""
    shutil.rmtree(place, ignore_errors=True)  # a damaged or unfinished save of the same step
    place.mkdir(parents=True)
    needed, free = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)), shutil.disk_usage(place).free
    if free < 1.2 * needed + 2**20:  # orbax would also fail, but with a page of tracebacks
        raise OSError(
            errno.ENOSPC, f"no space left on the disk ({needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free)"
        )


def _complete(
    place: Path, step: int, state: PyTree, cfg: Config, score: float | None, facts: Mapping[str, Any]
) -> None:
    """Config and manifest, beside orbax's files."""
    replace(place / "config.json", config.to_json(cfg))
    made = {"format": FORMAT, "step": step, "score": score, "tree": describe(state), "files": hashes(place)}
    replace(place / "manifest.json", json.dumps(made | dict(facts), indent=1))
    _sync(place)


def save_tree(place: Path, tree: PyTree) -> None:
    """Write `tree` with orbax; returns when it is on disk."""
    import orbax.checkpoint as ocp

    # Named processes meet through JAX's runtime. Orbax's default is a program on the devices, which would cross those
    # of the main thread.
    named = set(range(processes.count())) if processes.count() > 1 else None
    how = ocp.options.MultiprocessingOptions(active_processes=named)
    with _quiet(), ocp.StandardCheckpointer(multiprocessing_options=how) as writer:
        writer.save(place.resolve(), tree)
        writer.wait_until_finished()


def _drop_older(run: Path, step: int, keep: int) -> None:
    """Keep `step`, the keep - 1 before it, the `best` and all later steps. Unfinished older saves are deleted."""
    older = [s for s in steps(run) if s < step]
    finished = [s for s in older if (folder(run, s) / "manifest.json").exists()]
    for old in set(older) - {*finished[: keep - 1], best(run, [step, *finished])}:
        with contextlib.suppress(OSError):  # as rmtree does: the new checkpoint is whole
            (folder(run, old) / "manifest.json").unlink()  # first: a deletion cut short leaves no checkpoint
        shutil.rmtree(folder(run, old), ignore_errors=True)


def best(run: Path, among: Sequence[int]) -> int | None:
    """The step with the highest trained reward in its evaluation; None if none of them was evaluated."""
    judged = [(score, step) for step in among if (score := _score(run, step)) is not None]
    return max(judged)[1] if judged else None


def _score(run: Path, step: int) -> float | None:
    """From the manifest; manifests of format 1 have no score, so for these from metrics.jsonl."""
    try:
        found = manifest.read(folder(run, step))
    except CheckpointError:  # an unfinished or damaged one is not the best
        return None
    if found["format"] == 1:
        return {line["iteration"]: line.get("eval_reward_avg") for line in log.read(run / "metrics.jsonl")}.get(step)
    return found["score"]


def best_step(run: Path) -> int | None:
    """The undamaged checkpoint with the highest eval_reward_avg; None if none of these was evaluated."""
    return best(run, [step for step in steps(run) if damage(folder(run, step)) is None])


@contextlib.contextmanager
def alone(run: Path) -> Iterator[None]:
    """Hold the lock of `run`, so that no other process trains there. Raises CheckpointError if another holds it.

    The operating system frees the lock when the process ends, also when it is killed.
    """
    with (run / "lock").open("a") as file:
        try:
            _lock(file.fileno(), True)
        except (BlockingIOError, PermissionError):  # POSIX, Windows
            raise CheckpointError(
                f"--run_dir={run}: another process is training there; wait for it, stop it, or choose another directory"
            ) from None
        try:
            yield
        finally:
            _lock(file.fileno(), False)


def _lock(file: int, hold: bool) -> None:
    """Take or free the lock of an open file. Raises OSError at once if another process holds it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if hold else fcntl.LOCK_UN)
    else:  # Windows locks bytes: here the first one of an empty file
        windows = importlib.import_module("msvcrt")
        windows.locking(file, windows.LK_NBLCK if hold else windows.LK_UNLCK, 1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what orbax and tensorstore print about a failed write; the error itself is raised as usual.

    Orbax logs the stack of each of its threads. Tensorstore's other writes of the same save end at some later time,
    find orbax's event loop closed and print a traceback each. So after a failure the hook stays installed.
    """
    logger, shown = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def hook(unraisable: Any) -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = hook
    try:
        yield
        sys.unraisablehook = shown
    finally:
        logger.setLevel(level)


def cause(e: Exception) -> str:
    """The short reason, as "No space left on device", of an OSError or of tensorstore's long message."""
    code = re.search(r"os_error_code='(\d+)'", str(e))
    if code:
        return os.strerror(int(code.group(1)))
    return e.strerror or str(e) if isinstance(e, OSError) else str(e)[:300]


def _intact(run: Path) -> str:
    step, _ = latest(run)
    return (
        f"The last good checkpoint is intact: {folder(run, step)}"
        if step is not None
        else "There is no earlier checkpoint"
    )


def replace(file: Path, text: str) -> None:
    """Write a file atomically."""
    with disk.whole(file) as f:
        f.write(text.encode())


def _sync(place: Path) -> None:
    """Flush the folder's entries to disk. Windows cannot open a folder; there the file system's journal does it."""
    if os.name == "nt":
        return
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clean(run: Path) -> None:
    """Delete the remains of unfinished saves: orbax's *.orbax-checkpoint-tmp*, our *.part."""
    root = run / "checkpoints"
    left = [p for pattern in ("*.orbax-checkpoint-tmp*", "*.part") for p in sorted(root.rglob(pattern)) if p.exists()]
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# --- read -----------------------------------------------------------------------------------------------------------


def latest(run: Path) -> tuple[int | None, list[str]]:
    """The newest undamaged step (None if there is none), and why each newer one was skipped."""
    reasons = []
    for step in steps(run):
        problem = damage(folder(run, step))
        if problem is None:
            return step, reasons
        reasons.append(f"checkpoint {folder(run, step)} is skipped: {problem}")
    return None, reasons


def saved(run: Path) -> bool:
    """Whether any save of `run` was finished; it may be damaged since then."""
    return any((folder(run, step) / "manifest.json").exists() for step in steps(run))


def find(run: Path, which: str | None = None) -> tuple[Path, list[str]]:
    """(checkpoint folder, lines to print). `which` is a step of `run`, a path, or "best"; None is the newest
    undamaged one; the lines say why newer ones were skipped. Raises CheckpointError if there is none."""
    if which == "best":
        load_config(run)
        if (step := best_step(run)) is None:
            raise CheckpointError(
                f"--checkpoint=best: no whole checkpoint of {run} was evaluated; name a step{_listed(run)}, or "
                "leave it out for the newest"
            )
        return folder(run, step), [f"the best checkpoint is {folder(run, step)}"]
    if which is not None:
        place = folder(run, int(which)) if which.isdecimal() else Path(which)
        if not place.is_dir() or not place.name.isdecimal():
            raise CheckpointError(
                f"--checkpoint={which}: there is no checkpoint {place}; give a step of --run_dir"
                f"{_listed(run)}, or <run>/checkpoints/<step>"
            )
        try:
            manifest.read(place)
        except CheckpointError as e:
            raise CheckpointError(f"--checkpoint={which}: {place} cannot be used: {e}; name another step") from None
        return place, []
    load_config(run)
    step, reasons = latest(run)
    if step is None:
        raise CheckpointError("; ".join([f"{run} has no whole checkpoint", *reasons]) + ": start a new run")
    return folder(run, step), reasons


def _listed(run: Path) -> str:
    """ ", one of 3, 2"; nothing if there are none."""
    found = ", ".join(map(str, steps(run)))
    return f", one of {found}" if found else ""


def restore(place: Path, like: TrainState, cfg: Config) -> TrainState:
    """The verified state in <run>/checkpoints/<step>, with the structure and shardings of `like`, to resume with `cfg`.

    Raises CheckpointError if files are damaged, if the saved state differs from `like` (arrays or ShapeDtypeStructs),
    or if the saved config differs from `cfg` in a field that is not in CHANGEABLE. The message names what differs.
    """
    found = manifest.usable(place)
    base_loras.check_same(place, found["lora"], cfg.model.lora)
    if changed := forbidden(load_config(place), cfg):
        raise CheckpointError(
            f"checkpoint {place} belongs to another config: {changed}. Go on with its own, or start a new run"
        )
    added = {} if found["format"] > 1 else {"fallen_back": _had_fallen_back(place, like.fallen_back)}
    wanted = {name: tree for name, tree in like._asdict().items() if name not in added}
    manifest.compare(found["tree"], describe(wanted), place)
    return TrainState(**_read(place, wanted), **added)


def restore_fields(place: Path, like: Mapping[str, PyTree], cfg: Config, same: tuple[str, ...]) -> dict[str, PyTree]:
    """The fields named in `like`, verified, of the state in <run>/checkpoints/<step>: {name: tree}.

    Other fields of the saved state are ignored, so checkpoints of older and newer versions can be read. Raises
    CheckpointError as `restore` does; of the config, only fields whose names start with one of `same` must be equal.
    """
    check_fields(place, like, cfg, same)
    return _read(place, like)


def check_fields(place: Path, like: Mapping[str, PyTree], cfg: Config, same: tuple[str, ...]) -> None:
    """Raises what `restore_fields` would, and reads no array."""
    found = manifest.usable(place)
    base_loras.check_same(place, found["lora"], cfg.model.lora)
    own = "without --config its own is taken"
    if changed := _differences(load_config(place), cfg, lambda field: not field.startswith(same)):
        raise CheckpointError(f"checkpoint {place} belongs to another config: {changed}; {own}")
    saved = {k: v for k, v in found["tree"].items() if k.partition("/")[0] in like}
    try:
        manifest.compare(saved, describe(like), place)
    except CheckpointError as e:
        raise CheckpointError(f"{e}. Is it of another model? {own.capitalize()}") from None


def _read(place: Path, like: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The fields of the saved tree that `like` names; other fields are not read."""
    import orbax.checkpoint as ocp

    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), dict(like))
    how = ocp.checkpoint_utils.construct_restore_args(target)
    with ocp.PyTreeCheckpointer() as reader:
        args = ocp.args.PyTreeRestore(item=target, restore_args=how, partial_restore=True)
        return reader.restore((place / "state").resolve(), args=args)


def _had_fallen_back(place: Path, like: Any) -> Any:
    """`fallen_back` of a checkpoint of format 1: whether a measurement up to its step was below watch.rank."""
    cfg, step, lines = load_config(place), int(place.name), log.read(place.parent.parent / "metrics.jsonl")
    ranks = [line.get("watch/spearman") for line in lines if line["iteration"] <= step]
    below = any(rank is not None and rank < cfg.watch.rank for rank in ranks)
    fell = cfg.watch.fall_back and cfg.explores_low and below
    return jax.device_put(np.asarray(fell, like.dtype), like.sharding)


def forbidden(saved: Config, cfg: Config) -> str:
    """The fields that differ and may not on --resume, as "explore.steps is 6 there and 4 here; ..."; "" if none."""
    free = CHANGEABLE if saved.watch.fall_back or cfg.watch.fall_back else (*CHANGEABLE, *WATCHING)
    if guidance.weights(saved) == guidance.weights(cfg):  # one that is not given may be what the other gives
        free = (*free, *guidance.FIELDS)
    return _differences(saved, cfg, lambda field: field in free)


def _differences(saved: Config, cfg: Config, free: Callable[[str], bool]) -> str:
    changed = {k: v for k, v in config.differences(saved, cfg).items() if not free(k)}
    return "; ".join(f"{k} is {there!r} there and {here!r} here" for k, (there, here) in changed.items())


def load_config(run: Path) -> Config:
    """The config of a run or of one checkpoint. Raises CheckpointError if there is none."""
    file = run / "config.json"
    try:
        return config.from_json(file.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        raise CheckpointError(f"{run} is not the directory of a run: it has no config.json") from None
    except OSError as e:
        raise CheckpointError(f"{file} cannot be read: {e.strerror}") from None
    except config.ConfigError as e:
        raise CheckpointError(f"{file}: {e}") from e
