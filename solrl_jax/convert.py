"""Weights in a form that loads faster: --mode=convert reads a public folder once and writes down what `load` gives.

    <out>/model_index.json, */config.json, tokenizer*/, ...   as they were: <out> is a model.path like any other
    <out>/weights/                                            orbax: {"base", "vae", "text"}, dtypes as they train
    <out>/weights.json      written last: the tree, SHA-256 of the files of weights/ and of those it was made from

Restoring puts every leaf straight onto the devices of whatever mesh there is, in parallel and without transposing.
"""

import concurrent.futures
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from solrl_jax import checkpoint
from solrl_jax.config import ConfigError
from solrl_jax.structs import Params
from solrl_jax.weights import WeightsError

MANIFEST = "weights.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".onnx", ".gguf", ".index.json")
"""Endings of files that hold weights, or say where they are: they are not copied."""
Trees = tuple[Params, Params, Params]
NAMES = ("base", "vae", "text")


def is_converted(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def convert(trees: Trees, source: Path, out: Path) -> None:
    """Write `trees` (base, vae, text), read from the pipeline folder `source`, and its small files to `out`.

    Raises ConfigError where `out` is there already, WeightsError where it cannot be written (full disk).
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--run_dir={out} is not empty: give a new folder for the converted weights")
    needed, where = sum(x.nbytes for x in jax.tree.leaves(trees)), out.parent
    while not where.exists():
        where = where.parent
    if (free := shutil.disk_usage(where).free) < 1.05 * needed:
        raise WeightsError(f"{out}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free there")
    try:
        _write(trees, source, out)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # a part of it would be taken for a folder without weights
        raise


def _write(trees: Trees, source: Path, out: Path) -> None:
    import orbax.checkpoint as ocp

    files = [f for f in sorted(source.rglob("*")) if f.is_file() and not f.relative_to(source).parts[0].startswith(".")]
    for file in files:
        if not file.name.endswith(WEIGHTS) and len(file.relative_to(source).parts) <= 2:
            (out / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / file.relative_to(source))
    tree = dict(zip(NAMES, trees, strict=True))
    with ocp.StandardCheckpointer() as writer:
        writer.save((out / "weights").resolve(), tree)
        writer.wait_until_finished()
    manifest = {
        "source": str(source),
        "made from": hashes(source, [f for f in files if f.name.endswith(".safetensors")]),
        "tree": checkpoint.describe(tree),
        "files": hashes(out, (out / "weights").rglob("*")),
    }
    checkpoint.replace(out / MANIFEST, json.dumps(manifest, indent=1))


def hashes(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """{path below root: SHA-256}, several files at once (hashing lets other threads run)."""

    def digest(file: Path) -> str:
        with file.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    found = sorted(f for f in files if f.is_file())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return {f.relative_to(root).as_posix(): d for f, d in zip(found, pool.map(digest, found), strict=True)}


def restore(folder: Path, shapes: Trees, sharding: Sharding) -> Trees:
    """(base, vae) on the devices of `sharding`, text as numpy arrays, of a converted folder, verified.

    `shapes` are ShapeDtypeStructs. Raises WeightsError for damaged files and for weights of other shapes or dtypes.
    """
    import orbax.checkpoint as ocp

    manifest = _manifest(folder)
    found = hashes(folder, (folder / "weights").rglob("*"))
    bad = sorted(k for k in {**manifest["files"], **found} if manifest["files"].get(k) != found.get(k))
    if bad:
        raise WeightsError(f"{folder}: {bad[0]} is not what was written (by SHA-256; {len(bad)} such): convert again")
    tree = dict(zip(NAMES, shapes, strict=True))
    wanted, there = checkpoint.describe(tree), manifest["tree"]
    differ = [k for k in {**there, **wanted} if there.get(k) != wanted.get(k)]
    if differ:
        k = differ[0]
        raise WeightsError(
            f"{folder} was converted for another config: {k} is {there.get(k, 'absent')} there and "
            f"{wanted.get(k, 'absent')} here, {len(differ)} such: convert again with this --config"
        )
    on_devices = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
    on_host = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), tree["text"])
    with ocp.StandardCheckpointer() as reader:
        read = reader.restore((folder / "weights").resolve(), {**on_devices, "text": on_host})
    return read["base"], read["vae"], read["text"]


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {"files": dict(manifest["files"]), "tree": dict(manifest["tree"])}
    except (ValueError, KeyError, TypeError) as e:
        raise WeightsError(f"{folder / MANIFEST} cannot be read ({e!r}): convert again") from None
