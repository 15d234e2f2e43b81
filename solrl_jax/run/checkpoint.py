"""Whole training states on disk: orbax writes, a SHA-256 manifest says that what is there is what was written.

    <run>/checkpoints/<step>/state/         orbax; `step` is state.iteration, which is also the place in the prompts
    <run>/checkpoints/<step>/config.json
    <run>/checkpoints/<step>/manifest.json  written last: without it the save was cut short

Orbax restores a flipped byte without a word and lists damaged steps as its latest, so a checkpoint counts only after
every file of it has the hash that its manifest gives.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import gc
import hashlib
import importlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from solrl_jax import config, disk
from solrl_jax.config import Config
from solrl_jax.run import log
from solrl_jax.structs import PyTree, TrainState, leaves_by_path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

FORMAT = 2
"""Of the saved tree, in the manifest. 1, which had no number: a TrainState without `fallen_back`."""
CHANGEABLE = (
    # No number of the training depends on these.
    *("name", "iterations", "save_every", "keep", "encode_ahead", "wandb"),
    *(f"evaluate.{f.name}" for f in dataclasses.fields(config.Evaluate) if f.name != "held_out"),
    *("model.path", "reward_paths", "prompt_files"),  # folders move; that they hold the same is the user's word
)
"""Fields that a resumed run may change; evaluate.held_out is not one, the training prompts depend on it."""
WATCHING = ("watch.every", "watch.prompts")
"""Fields that it may change too where watch.fall_back is false, before and after: the watch then only warns."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message names the path and says what is still good."""


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / str(step)


def steps(run: Path) -> list[int]:
    """Steps that have a folder, newest first, whole or not."""
    found = (run / "checkpoints").glob("[0-9]*")
    return sorted((int(p.name) for p in found if p.name.isdigit() and p.is_dir()), reverse=True)


# --- write ----------------------------------------------------------------------------------------------------------


class Saver:
    """Writes checkpoints of one run in the background, one at a time; a context whose end is when all are on disk.

    `save` returns at once; what went wrong with the save before is raised by the next `save` or at the end.
    """

    def __init__(self, run: Path, cfg: Config):
        self.run, self.cfg = run, cfg
        self.last, _ = latest(run)  # the newest step that is whole, or on its way
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self.pending: concurrent.futures.Future | None = None

    def __enter__(self) -> "Saver":
        clean(self.run)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            pending = self.pending
            self.wait()
        except CheckpointError as e:
            if error is None or str(e) == str(error):
                raise
            raise CheckpointError(f"{error}. Beside that, {e}") from error  # what ended the run is said first
        else:
            if isinstance(error, CheckpointError) and pending is not None:
                raise CheckpointError(
                    f"{error}. The save after it, {folder(self.run, self.last or 0)}, is whole"
                ) from None
        finally:
            self.thread.shutdown()

    def save(self, state: TrainState, score: float | None = None) -> None:
        """Write `state`, unless that step is there. Its arrays stay as they are: nothing of it may be donated.

        `score` is the trained reward of this state's evaluation, if it was evaluated. Raises CheckpointError where the
        save before failed, after this one is on its way.
        """
        before, step = self.pending, int(state.iteration)
        if step != self.last:
            self.last = step
            self.pending = self.thread.submit(write, self.run, step, state, self.cfg, score)
        if before is not None:
            before.result()

    def wait(self) -> None:
        """Return when everything given to `save` is whole on disk. Raises CheckpointError."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def write(run: Path, step: int, state: PyTree, cfg: Config, score: float | None = None) -> Path:
    """One checkpoint: orbax, config, manifest; then the ones older than the newest `cfg.keep` are deleted.

    Raises CheckpointError (full disk, no permission, a device whose arrays cannot be read) after removing what it had
    begun; earlier steps are not touched.
    Writes that orbax still has in the air then may leave pieces: they have no manifest and do not count.
    """
    place = folder(run, step)
    try:
        _write(place, step, state, cfg, score)
    except (OSError, ValueError, jax.errors.JaxRuntimeError) as e:  # tensorstore reports a full disk as a ValueError
        why = cause(e)
    else:
        _drop_older(run, step, cfg.keep)
        return place
    # Outside of the handler, so that the writes which orbax left unfinished are freed before our own message.
    gc.collect()
    shutil.rmtree(place, ignore_errors=True)
    raise CheckpointError(f"checkpoint {place} could not be written: {why}. {_intact(run)}")


def _write(place: Path, step: int, state: PyTree, cfg: Config, score: float | None) -> None:
    shutil.rmtree(place, ignore_errors=True)  # a damaged or cut save of the same step
    place.mkdir(parents=True)
    needed, free = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)), shutil.disk_usage(place).free
    if free < 1.2 * needed + 2**20:  # orbax itself notices too, but its threads print a page of tracebacks
        raise OSError(
            errno.ENOSPC, f"no space left on the disk ({needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free)"
        )
    save_tree(place / "state", state)
    replace(place / "config.json", config.to_json(cfg))
    manifest = {"format": FORMAT, "step": step, "score": score, "tree": describe(state), "files": hashes(place)}
    replace(place / "manifest.json", json.dumps(manifest, indent=1))
    _sync(place)


def save_tree(place: Path, tree: PyTree) -> None:
    """Orbax writes `tree`; on return it is on disk."""
    import orbax.checkpoint as ocp

    with _quiet(), ocp.StandardCheckpointer() as writer:
        writer.save(place.resolve(), tree)
        writer.wait_until_finished()


def _drop_older(run: Path, step: int, keep: int) -> None:
    """Keep `step`, the keep - 1 before it and the `best`. Cut saves do not count and go; later steps stay."""
    older = [s for s in steps(run) if s < step]
    finished = [s for s in older if (folder(run, s) / "manifest.json").exists()]
    for old in set(older) - {*finished[: keep - 1], best(run, [step, *finished])}:
        shutil.rmtree(folder(run, old), ignore_errors=True)


def best(run: Path, among: Sequence[int]) -> int | None:
    """Of these steps the one whose evaluation gave the trained reward most; None if none was evaluated."""
    judged = [(score, step) for step in among if (score := _score(run, step)) is not None]
    return max(judged)[1] if judged else None


def _score(run: Path, step: int) -> float | None:
    """By its manifest; that of a step of format 1, which had none, by metrics.jsonl."""
    try:
        manifest = _manifest(folder(run, step))
    except CheckpointError:  # one that is cut short or damaged is not the best
        return None
    if manifest["format"] == 1:
        return {line["iteration"]: line.get("eval_reward_avg") for line in _lines(run)}.get(step)
    return manifest["score"]


def _lines(run: Path) -> list[log.Line]:
    return log.read(run / "metrics.jsonl")


def best_step(run: Path) -> int | None:
    """The whole checkpoint with the highest eval_reward_avg; None if no whole one was evaluated."""
    return best(run, [step for step in steps(run) if damage(folder(run, step)) is None])


@contextlib.contextmanager
def alone(run: Path) -> Iterator[None]:
    """While it lasts, no other process may train in `run`. Raises CheckpointError if one does.

    The system lets go of the lock when its process ends, however that comes about.
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
    """Take or free the lock of an open file. OSError at once where another process has it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if hold else fcntl.LOCK_UN)
    else:  # Windows locks bytes: here the first, where an empty file stays
        windows = importlib.import_module("msvcrt")
        windows.locking(file, windows.LK_NBLCK if hold else windows.LK_UNLCK, 1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A failed write reaches us as one error; what orbax and tensorstore also print of it is kept from the screen.

    Orbax logs the stack of each of its threads. Tensorstore's other writes of the same save end later and then find
    orbax's event loop closed, a traceback each: they end when they like, so after a failure the hook stays.
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
    """ "No space left on device" out of an OSError or out of tensorstore's long message."""
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
    """Write so that the file is there whole or not at all."""
    with disk.whole(file) as f:
        f.write(text.encode())


def _sync(place: Path) -> None:
    """Names reach the disk as well as contents. Windows opens no folder: there its file system's journal sees to it."""
    if os.name == "nt":
        return
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clean(run: Path) -> list[Path]:
    """Delete what cut saves left behind (orbax's *.orbax-checkpoint-tmp*, our *.part); returns what was deleted."""
    root = run / "checkpoints"
    left = [p for pattern in ("*.orbax-checkpoint-tmp*", "*.part") for p in sorted(root.rglob(pattern)) if p.exists()]
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return left


# --- read -----------------------------------------------------------------------------------------------------------


def latest(run: Path) -> tuple[int | None, list[str]]:
    """The newest whole step (None: there is none), and why each newer one was passed over."""
    reasons = []
    for step in steps(run):
        problem = damage(folder(run, step))
        if problem is None:
            return step, reasons
        reasons.append(f"checkpoint {folder(run, step)} is passed over: {problem}")
    return None, reasons


def saved(run: Path) -> bool:
    """Whether a save was ever finished in `run`; it may be damaged by now."""
    return any((folder(run, step) / "manifest.json").exists() for step in steps(run))


def find(run: Path, which: str | None = None) -> tuple[Path, list[str]]:
    """The checkpoint folder that is meant, and what to say of that: the newest whole one of `run` and why newer ones
    were passed over, or `which`, a step of it, a path, or "best". Raises CheckpointError if there is none."""
    if which == "best":
        load_config(run)
        if (step := best_step(run)) is None:
            raise CheckpointError(
                f"--checkpoint=best: no whole checkpoint of {run} was evaluated; name a step, one of "
                f"{', '.join(map(str, steps(run))) or 'none'}, or leave it out for the newest"
            )
        return folder(run, step), [f"the best checkpoint is {folder(run, step)}"]
    if which is not None:
        place = folder(run, int(which)) if which.isdigit() else Path(which)
        if not place.is_dir() or not place.name.isdigit():
            raise CheckpointError(
                f"--checkpoint={which}: there is no checkpoint {place}; give <run>/checkpoints/<step>"
            )
        return place, []
    load_config(run)
    step, reasons = latest(run)
    if step is None:
        raise CheckpointError("; ".join([f"{run} has no whole checkpoint", *reasons]) + ": start a new run")
    return folder(run, step), reasons


def damage(place: Path) -> str | None:
    """What is wrong with a checkpoint folder, None if every file is as its manifest says."""
    try:
        wanted, found = _manifest(place)["files"], hashes(place)
    except (CheckpointError, OSError) as e:
        return str(e)
    for name in sorted({*wanted, *found}):
        if name not in found:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} is not in its manifest"
        if wanted[name] != found[name]:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def _manifest(place: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
        made = {"format": int(manifest.get("format", 1)), "score": manifest.get("score")}
        return made | {"files": dict(manifest["files"]), "tree": dict(manifest["tree"])}
    except FileNotFoundError:
        raise CheckpointError("it has no manifest.json, so its save was cut short") from None
    except (ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"its manifest.json cannot be read ({e!r})") from None


def hashes(place: Path) -> dict[str, str]:
    """{relative path: SHA-256} of every file below `place` but the manifest and what `replace` left unfinished."""
    files = sorted(p for p in place.rglob("*") if p.is_file() and p.name != "manifest.json" and p.suffix != ".part")
    digests = {}
    for file in files:
        with file.open("rb") as f:
            digests[file.relative_to(place).as_posix()] = hashlib.file_digest(f, "sha256").hexdigest()
    return digests


def describe(tree: PyTree) -> dict[str, str]:
    """{"lora/blocks/to_q/a": "float32[2,64,8]"} of every leaf; typed keys as "key<fry>[]"."""
    return {path: f"{x.dtype}[{','.join(map(str, x.shape))}]" for path, x in leaves_by_path(tree).items()}


def restore(place: Path, like: TrainState, cfg: Config) -> TrainState:
    """The state in a folder <run>/checkpoints/<step>, verified, with the structure and shardings of `like`, to go on
    with under `cfg`.

    Raises CheckpointError where the files are damaged, or where state or config are not those of `like` (arrays or
    ShapeDtypeStructs) and `cfg`, naming what differs. Fields in CHANGEABLE may differ.
    """
    manifest = _usable(place)
    if changed := forbidden(load_config(place), cfg):
        raise CheckpointError(
            f"checkpoint {place} belongs to another config: {changed}. Go on with its own, or start a new run"
        )
    added = {} if manifest["format"] > 1 else {"fallen_back": _had_fallen_back(place, like.fallen_back)}
    wanted = {name: tree for name, tree in like._asdict().items() if name not in added}
    _compare(manifest["tree"], describe(wanted), place)
    return TrainState(**_read(place, wanted), **added)


def restore_fields(place: Path, like: Mapping[str, PyTree], cfg: Config, same: tuple[str, ...]) -> dict[str, PyTree]:
    """Some fields of the state in a folder <run>/checkpoints/<step>, verified, as {name: tree like that of `like`}.

    What else the state holds does not matter: files of versions that knew more, or less, serve as well. Raises
    CheckpointError as `restore` does; of the config only the fields that begin as in `same` must be equal.
    """
    manifest = _usable(place)
    if changed := _differences(load_config(place), cfg, lambda field: not field.startswith(same)):
        raise CheckpointError(f"checkpoint {place} belongs to another config: {changed}. Use its own")
    saved = {k: v for k, v in manifest["tree"].items() if k.partition("/")[0] in like}
    _compare(saved, describe(like), place)
    return _read(place, like)


def _usable(place: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are what was written, in a format that is known here."""
    if problem := damage(place):
        raise CheckpointError(f"checkpoint {place} cannot be used: {problem}")
    if (manifest := _manifest(place))["format"] > FORMAT:
        raise CheckpointError(
            f"checkpoint {place} has format {manifest['format']}, this version of solrl_jax reads up to {FORMAT}: "
            "update solrl_jax"
        )
    return manifest


def _read(place: Path, like: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The fields of the saved tree that `like` names; the others are not read."""
    import orbax.checkpoint as ocp

    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), dict(like))
    how = ocp.checkpoint_utils.construct_restore_args(target)
    with ocp.PyTreeCheckpointer() as reader:
        args = ocp.args.PyTreeRestore(item=target, restore_args=how, partial_restore=True)
        return reader.restore((place / "state").resolve(), args=args)


def _had_fallen_back(place: Path, like: Any) -> Any:
    """The flag of a run of format 1, which looked it up in its metrics: a measurement below watch.rank until then."""
    cfg, step = load_config(place), int(place.name)
    low = cfg.explore is not None and cfg.explore.precision != "bf16"
    ranks = [line.get("watch/spearman") for line in _lines(place.parent.parent) if line["iteration"] <= step]
    fell = cfg.watch.fall_back and low and any(rank is not None and rank < cfg.watch.rank for rank in ranks)
    return jax.device_put(np.asarray(fell, like.dtype), like.sharding)


def forbidden(saved: Config, cfg: Config) -> str:
    """ "explore.steps is 6 there and 4 here; ..." of the fields that differ and may not on --resume; "" if none."""
    free = CHANGEABLE if saved.watch.fall_back or cfg.watch.fall_back else (*CHANGEABLE, *WATCHING)
    return _differences(saved, cfg, lambda field: field in free)


def _differences(saved: Config, cfg: Config, free: Callable[[str], bool]) -> str:
    changed = {k: v for k, v in config.differences(saved, cfg).items() if not free(k)}
    return "; ".join(f"{k} is {there!r} there and {here!r} here" for k, (there, here) in changed.items())


def _compare(saved: dict[str, str], wanted: dict[str, str], place: Path) -> None:
    differ = [k for k in {**saved, **wanted} if saved.get(k) != wanted.get(k)]
    lines = [f"{k} is {saved.get(k, 'absent')} there and {wanted.get(k, 'absent')} here" for k in differ]
    if lines:
        more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise CheckpointError(f"checkpoint {place} holds another state: {'; '.join(lines[:4])}{more}")


def load_config(run: Path) -> Config:
    """The config of a run or of one checkpoint. Raises CheckpointError where there is none."""
    file = run / "config.json"
    try:
        return config.from_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{run} is not the directory of a run: it has no config.json") from None
    except config.ConfigError as e:
        raise CheckpointError(f"{file}: {e}") from e
