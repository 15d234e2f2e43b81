"""--mode=convert: read a public folder once and write its weights in a form that loads faster.

    <out>/model_index.json, */config.json, tokenizer*/, ...   copies: <out> can be used as model.path
    <out>/weights/0000, 0001, ...                             one leaf each: its bytes, row-major, in its training dtype
    <out>/weights.json      written last: the tree, the file of each leaf, SHA-256 of the files in weights/ and of the
                            source files

Each leaf is written before the next one is read. `restore` puts every leaf directly onto the devices of any mesh, in
parallel and without transposing.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from solrl_jax.config import ConfigError, Model
from solrl_jax.models import folders
from solrl_jax.run import checkpoint
from solrl_jax.structs import Params, leaves_by_path
from solrl_jax.weights import WeightsError, hub

MANIFEST = "weights.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".onnx", ".gguf", ".index.json")
"""Endings of weight files and of their indexes, which are not copied."""
Trees = tuple[Params, Params, Params]
NAMES = ("base", "vae", "text")
VERSION = 2
"""Format of a converted folder. Version 1 had no number; it stored each tree with orbax in weights/<name>, and orbax
needs memory for a second copy while it writes."""
READERS = 4
"""Leaves that `restore` reads at a time; so many are in host memory before they are on the devices."""


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
    """Write one leaf after another; `keep` returns a `Kept` for it, so that its memory is freed before the next."""
    (out / "weights").mkdir(parents=True)
    numbers = itertools.count()

    def keep(leaf: np.ndarray) -> Kept:
        return _save(out / "weights" / f"{next(numbers):04d}", leaf)

    trees = dict(zip(NAMES, module.parts(cfg, keep, keep), strict=True))
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
        | ({str(file): digest(file)} if file else {}),
        "tree": checkpoint.describe(trees),
        "leaves": {path: kept.file for path, kept in leaves_by_path(trees).items()},
        "files": hashes(out, (out / "weights").rglob("*")),
    }
    checkpoint.replace(out / MANIFEST, json.dumps(manifest, indent=1))


def _save(file: Path, leaf: np.ndarray) -> Kept:
    """Write the bytes of one leaf."""
    with file.open("wb") as f:
        f.write(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
        f.flush()
        os.fsync(f.fileno())
    return Kept(file.name, leaf.shape, leaf.dtype)


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hashes(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """{path below root: SHA-256}, several files at once (hashing lets other threads run)."""
    found = sorted(f for f in files if f.is_file())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return {f.relative_to(root).as_posix(): d for f, d in zip(found, pool.map(digest, found), strict=True)}


def restore(folder: Path, shapes: Trees, sharding: Sharding) -> Trees:
    """Verify and read a converted folder: base and vae on the devices of `sharding`, text as numpy arrays.

    `shapes` are ShapeDtypeStructs. Raises WeightsError as `check` does.
    """
    leaves = check(folder, shapes)
    if leaves is None:
        return _restore_first(folder, shapes, sharding)
    tree = dict(zip(NAMES, shapes, strict=True))

    def read(path: str, like: jax.ShapeDtypeStruct) -> Any:
        x = np.fromfile(folder / "weights" / leaves[path], like.dtype).reshape(like.shape)
        return x if path.startswith("text/") else jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

    wanted = leaves_by_path(tree)
    with _said(folder), concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(read, wanted.keys(), wanted.values()))
    tree = jax.tree.unflatten(jax.tree.structure(tree), found)
    return tree["base"], tree["vae"], tree["text"]


def _restore_first(folder: Path, shapes: Trees, sharding: Sharding) -> Trees:
    """`restore` for folders of version 1."""
    import orbax.checkpoint as ocp

    tree = dict(zip(NAMES, shapes, strict=True))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise WeightsError(f"{folder / MANIFEST} cannot be read ({e!r}): convert again") from None
    if version not in (1, VERSION):
        raise WeightsError(f"{folder / MANIFEST} has version {version}, solrl_jax reads up to {VERSION}: convert again")
    return found
