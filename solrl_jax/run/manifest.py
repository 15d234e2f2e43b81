"""manifest.json of a checkpoint: the SHA-256 of every file and the shape and dtype of every leaf.

The manifest is the last file of a save. A folder without one is an unfinished save and does not count as a checkpoint.
"""

import json
from pathlib import Path
from typing import Any

from solrl_jax import disk
from solrl_jax.structs import PyTree, leaves_by_path

FORMAT = 2
"""Version of the saved tree. Format 1 had no number: its TrainState had no `fallen_back`."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or used. The message names its path and which checkpoint is still intact."""


def read(place: Path) -> dict[str, Any]:
    """format, score, files {path: SHA-256} and tree {path of a leaf: its type} of the checkpoint folder `place`, and
    lora: [{file, scale, sha256}], the LoRAs in the base that it adapts, and prompts: `data.digest` of its prompts, or
    "" where an earlier version wrote none."""
    try:
        manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
        found = {"format": int(manifest.get("format", 1)), "score": manifest.get("score")}
        found["prompts"] = str(manifest.get("prompts", ""))
        loras = [(str(x["file"]), float(x["scale"]), dict(x["sha256"])) for x in manifest.get("lora", [])]
        found["lora"] = [dict(zip(("file", "scale", "sha256"), x, strict=True)) for x in loras]
        return found | {"files": dict(manifest["files"]), "tree": dict(manifest["tree"])}
    except FileNotFoundError:
        raise CheckpointError("it has no manifest.json, so its save was cut short") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"its manifest.json cannot be read ({e!r})") from None


def damage(place: Path) -> str | None:
    """What is wrong with a checkpoint folder; None if every file of its manifest has the hash there.

    Other files, such as those that a file manager leaves, are not read.
    """
    try:
        wanted = read(place)["files"]
        found = {name: disk.digest(place / name) for name in wanted if (place / name).is_file()}
    except (CheckpointError, OSError) as e:
        return str(e)
    for name in sorted(wanted):
        if name not in found:
            return f"{name} is missing"
        if wanted[name] != found[name]:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def usable(place: Path) -> dict[str, Any]:
    """The manifest of an undamaged checkpoint in a known format. Raises CheckpointError for any other."""
    if problem := damage(place):
        raise CheckpointError(f"checkpoint {place} cannot be used: {problem}")
    if (found := read(place))["format"] > FORMAT:
        raise CheckpointError(
            f"checkpoint {place} has format {found['format']}, this version of solrl_jax reads up to {FORMAT}: "
            "update solrl_jax"
        )
    return found


def hashes(place: Path) -> dict[str, str]:
    """{relative path: SHA-256} of every file below `place`, without the manifest and unfinished *.part files."""
    files = sorted(p for p in place.rglob("*") if p.is_file() and p.name != "manifest.json" and p.suffix != ".part")
    return {file.relative_to(place).as_posix(): disk.digest(file) for file in files}


def describe(tree: PyTree) -> dict[str, str]:
    """{"lora/blocks/to_q/a": "float32[2,64,8]"} for every leaf; a typed key is "key<fry>[]"."""
    return {path: f"{x.dtype}[{','.join(map(str, x.shape))}]" for path, x in leaves_by_path(tree).items()}


def compare(saved: dict[str, str], wanted: dict[str, str], place: Path) -> None:
    """CheckpointError if two results of `describe` differ; it names the first four differences."""
    differ = [k for k in {**saved, **wanted} if saved.get(k) != wanted.get(k)]
    lines = [f"{k} is {saved.get(k, 'absent')} there and {wanted.get(k, 'absent')} here" for k in differ]
    if lines:
        more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise CheckpointError(f"checkpoint {place} holds another state: {'; '.join(lines[:4])}{more}")
