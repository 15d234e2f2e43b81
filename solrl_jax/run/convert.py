"""--mode=convert: read a public folder once and write its weights in a form that loads faster.

    <out>/model_index.json, */config.json, tokenizer*/, ...   copies: <out> can be used as model.path
    <out>/weights/0000, 0001, ...                             one leaf each: its bytes, row-major, in its training dtype
    <out>/weights.json      written last: the tree, the file of each leaf, SHA-256 of the files in weights/ and of the
                            source files

Each leaf is written before the next one is read, a stack layer by layer. `restore` puts every leaf directly onto the
devices of any mesh, in parallel and without transposing; of a leaf that lies in parts it reads those parts.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from solrl_jax import disk, sharding
from solrl_jax.config import ConfigError, Model
from solrl_jax.models import folders
from solrl_jax.run import checkpoint
from solrl_jax.structs import Params, leaves_by_path
from solrl_jax.weights import Source, WeightsError, hub

MANIFEST = "weights.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".onnx", ".gguf", ".index.json")
"""Endings of weight files and of their indexes, which are not copied."""
Trees = tuple[Params, Params, Params]
NAMES = ("base", "vae", "text")
VERSION = 2
"""Format of a converted folder. Version 1 had no number; it stored each tree with orbax in weights/<name>, and orbax
needs memory for a second copy while it writes."""
READERS = 4
"""Leaves that `restore` reads at a time; a part of so many is in host memory before it is on the devices."""
PIECE = 2**26
"""Bytes that `convert` reads of a leaf at a time, unless one row of its first axis, as a layer of a stack, has more."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """Replaces a leaf in a tree after it was written."""

    file: str
    shape: tuple[int, ...]
    dtype: np.dtype


def is_converted(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def convert(module: Any, cfg: Model, out: Path) -> None:
    """Write to `out` the weights that `module` (models/<name>.py) loads for `cfg`, and the pipeline's small files.

    Raises ConfigError if `out` is not empty, WeightsError if it cannot be written (full disk); if possible before
    weights are downloaded or read.
    """
    if cfg.lora:
        raise ConfigError(
            f"model.lora={','.join(cfg.lora)} is folded in when a run reads its weights: convert without it"
        )
    with _said(out):
        if out.is_dir() and any(out.iterdir()):
            raise ConfigError(f"--run_dir={out} is not empty: give a new folder for the converted weights")
        where = next(p for p in (out, *out.absolute().parents) if p.exists())
        if not where.is_dir() or not os.access(where, os.W_OK | os.X_OK):
            raise WeightsError(f"{out}: {where} is not a folder that can be written to")
        free = shutil.disk_usage(where).free
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(module.shapes(cfg)))
    if free < 1.05 * needed:
        raise WeightsError(f"{out}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free there")
    try:
        with _said(out):
            _write(module, cfg, out)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # a partial folder would look like one without weights
        raise


@contextlib.contextmanager
def _said(place: Path) -> Iterator[None]:
    """Turn an OSError into a WeightsError."""
    try:
        yield
    except OSError as e:
        raise WeightsError(f"{e.filename or place}: {checkpoint.cause(e)}") from None


def _write(module: Any, cfg: Model, out: Path) -> None:
    """Write one leaf after another; `keep` returns a `Kept` in its place."""
    (out / "weights").mkdir(parents=True)
    numbers = itertools.count()

    def keep(path: str, leaf: Source) -> Kept:
        return _save(out / "weights" / f"{next(numbers):04d}", leaf)

    trees = dict(zip(NAMES, module.parts(cfg, keep, keep, keep), strict=True))
    source, file = hub.pipeline(cfg.path), folders.network_file(cfg)
    files = [f for f in sorted(source.rglob("*")) if f.is_file() and not f.relative_to(source).parts[0].startswith(".")]
    for small in files:
        if not small.name.endswith(WEIGHTS) and len(small.relative_to(source).parts) <= 2:
            (out / small.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(small, out / small.relative_to(source))
    manifest = {
        "version": VERSION,
        "source": str(source),
        "made from": hashes(source, [f for f in hub.read_of(source, file) if f != file])
        | ({str(file): disk.digest(file)} if file else {}),
        "tree": checkpoint.describe(trees),
        "leaves": {path: kept.file for path, kept in leaves_by_path(trees).items()},
        "files": hashes(out, (out / "weights").rglob("*")),
    }
    checkpoint.replace(out / MANIFEST, json.dumps(manifest, indent=1))


def _save(file: Path, leaf: Source) -> Kept:
    """Write the bytes of one leaf, some rows of its first axis at a time."""
    dtype = np.dtype(leaf.dtype)
    with file.open("wb") as f:
        for at in _pieces(leaf.shape, dtype.itemsize):
            f.write(np.ascontiguousarray(leaf.read(at)).reshape(-1).view(np.uint8).data)
        f.flush()
        os.fsync(f.fileno())
    return Kept(file.name, leaf.shape, dtype)


def _pieces(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """The slices of consecutive rows of the first axis that together have up to PIECE bytes, or of one row."""
    if not shape:
        yield ()
        return
    rows = max(1, PIECE // max(1, math.prod(shape[1:]) * itemsize))
    for first in range(0, shape[0], rows):
        yield slice(first, min(first + rows, shape[0])), *(slice(0, n) for n in shape[1:])


def hashes(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """{path below root: SHA-256}, several files at once (hashing lets other threads run)."""
    found = sorted(f for f in files if f.is_file())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return {f.relative_to(root).as_posix(): d for f, d in zip(found, pool.map(disk.digest, found), strict=True)}


def restore(folder: Path, shapes: Trees, mesh: Mesh) -> Trees:
    """Verify and read a converted folder: base and vae on the devices of `mesh`, text as numpy arrays.

    Of the base, every device gets its part (sharding.spec). `shapes` are ShapeDtypeStructs. Raises WeightsError as
    `check` does.
    """
    leaves = check(folder, shapes)
    if leaves is None:
        return _restore_first(folder, shapes, mesh)
    tree = dict(zip(NAMES, shapes, strict=True))

    def read(path: str, like: jax.ShapeDtypeStruct) -> Any:
        part = functools.partial(_part, folder / "weights" / leaves[path], like)
        if path.startswith("text/"):
            return part(tuple(slice(0, n) for n in like.shape))
        return sharding.placed(like.shape, part, mesh, _where(path, like))

    wanted = leaves_by_path(tree)
    with _said(folder), concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(read, wanted.keys(), wanted.values()))
    tree = jax.tree.unflatten(jax.tree.structure(tree), found)
    return tree["base"], tree["vae"], tree["text"]


def _where(path: str, like: jax.ShapeDtypeStruct) -> P:
    """Where a leaf lies, by its path "base/..." or "vae/..."."""
    return sharding.spec(path, len(like.shape)) if path.startswith("base/") else sharding.WHOLE


def _part(file: Path, like: jax.ShapeDtypeStruct, at: tuple[slice, ...]) -> np.ndarray:
    """The slices `at` of one leaf's file."""
    if all(s == slice(0, n) for s, n in zip(at, like.shape, strict=True)):
        return np.fromfile(file, like.dtype).reshape(like.shape)
    return np.array(np.memmap(file, like.dtype, "r", shape=like.shape)[at])


def _restore_first(folder: Path, shapes: Trees, mesh: Mesh) -> Trees:
    """`restore` for folders of version 1."""
    import orbax.checkpoint as ocp

    tree = dict(zip(NAMES, shapes, strict=True))
    where = [NamedSharding(mesh, _where(path, x)) for path, x in leaves_by_path(tree).items()]
    where = jax.tree.unflatten(jax.tree.structure(tree), where)
    like = jax.tree.map(lambda x, on: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), tree, where)
    like["text"] = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), tree["text"])
    with ocp.StandardCheckpointer() as reader:
        base, vae, text = (reader.restore((folder / "weights" / name).resolve(), like[name]) for name in NAMES)
    return base, vae, text


def check(folder: Path, shapes: Trees) -> dict[str, str] | None:
    """{path of a leaf: its file in weights/}; None for a folder of version 1.

    Raises WeightsError for damaged files and for weights of other shapes or dtypes.
    """
    manifest = _manifest(folder)
    with _said(folder):
        found = hashes(folder, (folder / "weights").rglob("*"))
    bad = sorted(k for k in {**manifest["files"], **found} if manifest["files"].get(k) != found.get(k))
    if bad:
        raise WeightsError(f"{folder}: {bad[0]} is not what was written (SHA-256; {len(bad)} such): convert again")
    wanted, there = checkpoint.describe(dict(zip(NAMES, shapes, strict=True))), manifest["tree"]
    differ = [k for k in {**there, **wanted} if there.get(k) != wanted.get(k)]
    if differ:
        k = differ[0]
        raise WeightsError(
            f"{folder} was converted for another config: {k} is {there.get(k, 'absent')} there and "
            f"{wanted.get(k, 'absent')} here ({len(differ)} such): convert again with this --config"
        )
    return manifest["leaves"]


def _manifest(folder: Path) -> dict[str, Any]:
    """`files`, `tree` and `leaves` (None in version 1) of weights.json."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest.get("version", 1)
        found = {"files": dict(manifest["files"]), "tree": dict(manifest["tree"]), "leaves": None}
        if version == VERSION:
            found["leaves"] = {path: manifest["leaves"][path] for path in found["tree"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise WeightsError(f"{folder / MANIFEST} cannot be read ({e!r}): convert again") from None
    if version not in (1, VERSION):
        raise WeightsError(f"{folder / MANIFEST} has version {version}, solrl_jax reads up to {VERSION}: convert again")
    return found
