"""Public checkpoints <-> parameter trees.

A table of `Rule`s gives, for every path of our tree, its checkpoint key or keys and its layout in the checkpoint. The
table starts from our tree, so `load` knows exactly the keys that it needs (missing and unused keys are both errors),
and `save` writes a tree in the public layout. Weights are only data: safetensors, or else torch's pickles, which are
read without running code in them.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

from solrl_jax import disk
from solrl_jax.structs import PyTree, WeightsError, leaves_by_path
from solrl_jax.weights import options, torch_file


class Rule(NamedTuple):
    """`path` (a regex over "a/b/kernel") -> checkpoint `key` (its replacement; "{layer}": the stacked leading axis).

    Layouts, here -> in the checkpoint. same; linear: [in, out] -> [out, in]; pointwise, a 1x1 convolution: [in, out] ->
    [out, in, 1, 1]; conv: HWIO -> OIHW.
    """

    path: str
    key: str | tuple[str, ...]  # several: equal parts of a Linear's outputs, in order, as q, k, v
    layout: str = "same"
    part: tuple[int, int] = (0, 1)  # (i, n): part i of n equal parts of the checkpoint's first axis, as q, k, v
    first: int = 0  # the checkpoint's number of a stack's first layer


_TO_OURS = {"same": None, "linear": (1, 0), "pointwise": (1, 0), "conv": (2, 3, 1, 0)}
_TO_THEIRS = {"same": None, "linear": (1, 0), "pointwise": (1, 0), "conv": (3, 2, 0, 1)}


FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")
"""The types, by safetensors' names and numpy's, whose numbers are the weights. Others need scales or are no weights."""

MAPPED = 2**26
"""Bytes read of a stack before its memory-mapped files are closed: left open, they hold a second copy of it."""


class Source(NamedTuple):
    """A leaf that is still in its files. `dtype` None: as stored there."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[tuple[slice, ...]], np.ndarray]  # a slice of each axis, of step 1 -> these numbers, row-major

    def whole(self) -> np.ndarray:
        return self.read((slice(None),) * len(self.shape))


Place = Callable[[str, Source], Any]
"""Reads the leaf of a path, in parts or whole, to its destination, such as the devices."""


class Leaf(NamedTuple):
    path: str
    keys: tuple[str, ...]  # for a stack, layer by layer
    stacked: bool
    layout: str
    part: tuple[int, int]
    shape: tuple[int, ...]
    fused: int = 1  # number of keys that make up a layer's outputs

    def by_layer(self) -> list[tuple[str, ...]]:
        return groups(self.keys, self.fused)


def groups(keys: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(keys[i : i + size]) for i in range(0, len(keys), size)]


def needed(tree: PyTree, rules: Sequence[Rule]) -> list[Leaf]:
    """The checkpoint entries of `tree` (arrays or ShapeDtypeStructs). A path without a rule is a bug in the table."""
    found = []
    for path, leaf in leaves_by_path(tree).items():
        for rule in rules:
            match = re.fullmatch(rule.path, path)
            if match:
                templates = (rule.key,) if isinstance(rule.key, str) else rule.key
                names = [match.expand(key).replace("/", ".") for key in templates]
                stacked = "{layer}" in names[0]
                layers = range(rule.first, rule.first + leaf.shape[0]) if stacked else range(1)
                keys = tuple(name.replace("{layer}", str(i)) for i in layers for name in names)
                found.append(Leaf(path, keys, stacked, rule.layout, rule.part, tuple(leaf.shape), len(names)))
                break
        else:
            raise WeightsError(f"no rule of the key table matches parameter {path!r}")
    return found


class Files:
    """A checkpoint's tensors, read one by one: {key: tensor} over one file or over shards with an index.

    `path` is one file, or a folder with files named `stem`. Files are memory-mapped, so what was read stays in memory
    until `close`; the next read opens them again.
    """

    twice: tuple[str, ...] = ()  # messages about keys that are in two files

    def __init__(self, path: str | Path, stem: str = "model"):
        self.path = Path(path)
        if not self.path.exists():
            raise WeightsError(
                f"{self.path} is neither a directory nor a file: give the folder of a model in its public layout"
            )
        self._open: dict[Path, Any] = {}
        self.where: dict[str, Path] = {}
        for file in [self.path] if self.path.is_file() else _shards(self.path, stem):
            for key in self._handle(file).keys():  # noqa: SIM118 - a safetensors handle is not a dict
                if key in self.where:
                    self.twice += (f"{key} is in {self.where[key].name} and in {file.name}",)
                self.where[key] = file

    def _handle(self, file: Path):
        if file not in self._open:
            try:
                self._open[file] = torch_file.read(file) if torch_file.is_checkpoint(file) else safe_open(file, "numpy")
            except FileNotFoundError as e:
                raise WeightsError(f"{file} is in the index but does not exist: download it again") from e
            except SafetensorError as e:
                raise WeightsError(f"{file} is not a complete safetensors file ({e}): download it again") from e
            except OSError as e:
                raise WeightsError(f"{file} cannot be read: {e.strerror or e}") from e
        return self._open[file]

    def __getitem__(self, key: str) -> np.ndarray:
        handle = self._handle(self.where[key])
        return np.array(handle[key]) if isinstance(handle, dict) else handle.get_tensor(key)

    def part(self, key: str, at: tuple[slice, ...]) -> np.ndarray:
        """A slice of each axis of a tensor; the rest of it is not copied."""
        handle = self._handle(self.where[key])
        return np.array(handle[key][at]) if isinstance(handle, dict) else handle.get_slice(key)[at]

    def shape(self, key: str) -> tuple[int, ...]:
        """From the header alone."""
        handle = self._handle(self.where[key])
        return handle[key].shape if isinstance(handle, dict) else tuple(handle.get_slice(key).get_shape())

    def stored_as(self, key: str) -> str:
        """The name of its type, as in FLOATS; from the header alone."""
        handle = self._handle(self.where[key])
        return str(handle[key].dtype) if isinstance(handle, dict) else handle.get_slice(key).get_dtype()

    def keys(self) -> Iterable[str]:
        return self.where.keys()

    def close(self) -> None:
        self._open.clear()


def _shards(folder: Path, stem: str) -> list[Path]:
    """Files without a variant first, then bf16, fp16, torch's pickles; in each kind an index before a file."""
    pickled = "pytorch_model" if stem == "model" else stem  # transformers has two names, diffusers one
    for name, index in (
        (f"{stem}.safetensors", f"{stem}.safetensors.index.json"),
        (f"{stem}.bf16.safetensors", f"{stem}.safetensors.index.bf16.json"),
        (f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"),
        (f"{pickled}.bin", f"{pickled}.bin.index.json"),
    ):
        if (folder / index).is_file():
            return _indexed(folder / index)
        if (folder / name).is_file():
            return [folder / name]
    raise WeightsError(
        f"{folder} holds no {stem}.safetensors (nor an index, nor a bf16 or fp16 variant of it) and no {pickled}.bin"
    )


def _indexed(index: Path) -> list[Path]:
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({index.parent / file for file in named.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise WeightsError(f"{index} is not an index of weights ({e!r}): download it again") from e
    except OSError as e:
        raise WeightsError(f"{index} cannot be read: {e.strerror}") from e


def load(
    files: Files,
    spec: PyTree,
    rules: Sequence[Rule],
    *,
    dtype: Any = None,
    aliases: Sequence[tuple[str, str]] = (),
    droppable: Sequence[str] = (),
    copies: Sequence[str] = (),
    place: Place | None = None,
) -> PyTree:
    """Read the tree of `spec` (from eval_shape) out of `files`; leaves are numpy arrays of `dtype` (None: as stored).

    With `place`, they are what it returns for each leaf's path and `Source`, one leaf after another. So the host never
    holds more than what `place` reads at a time: one leaf, at most a stack of layers, or a part of it. `aliases` are
    (regex, replacement) pairs from other spellings of keys to the table's. `droppable` are regexes of keys that may
    stay unused, `copies` are keys that may occur in two spellings. One WeightsError lists all missing, unused, wrongly
    shaped, quantised and repeated keys, before any tensor is read.
    """
    names, twice = _spelt(files.keys(), aliases, copies)
    wanted = needed(spec, rules)
    if problems := [*files.twice, *twice, *_problems(files, names, wanted, droppable)]:
        shown = "\n  ".join(problems[:12]) + (f"\n  and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise WeightsError(f"{files.path} does not hold the weights that its config describes:\n  {shown}")
    values, place = [], place or (lambda path, source: source.whole())
    for leaf in wanted:  # no variable keeps a leaf alive: it is freed before the next is read
        read = functools.partial(_read, files, leaf, [names[key] for key in leaf.keys], dtype)
        values.append(place(leaf.path, Source(leaf.shape, dtype, read)))
        files.close()
    return jax.tree.unflatten(jax.tree.structure(spec), values)


def _spelt(
    keys: Iterable[str], aliases: Sequence[tuple[str, str]], copies: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """{the table's spelling of a key: the file's}, and messages about keys in two spellings that are not in `copies`.

    If both spellings exist, the table's own is read.
    """
    names: dict[str, str] = {}
    twice = []
    for key in keys:
        public = key
        for pattern, replacement in aliases:
            public = re.sub(pattern, replacement, public)
        if public in names and public not in copies:
            twice.append(f"{names[public]} and {key} are the same, {public}")
        if public == key or public not in names:
            names[public] = key
    return names, twice


def _problems(files: Files, names: Mapping[str, str], wanted: Sequence[Leaf], droppable: Sequence[str]) -> list[str]:
    """Types that are not floats, missing and unused keys and wrong shapes, from the headers alone."""
    want = {key for leaf in wanted for key in leaf.keys}
    kinds = {key: files.stored_as(names[key]) for key in want & names.keys()}
    found = not_floats({key: kinds[key] for leaf in wanted for key in leaf.keys if key in kinds})
    found += [f"missing {key}" for leaf in wanted for key in leaf.keys if key not in names]
    found += [f"unused {k}" for k in names if k not in want and not any(re.fullmatch(d, k) for d in droppable)]
    for leaf in wanted:
        shape = leaf.shape[1:] if leaf.stacked else leaf.shape
        shape = shape if leaf.fused == 1 else (*shape[:-1], shape[-1] // leaf.fused)
        there = {key: _ours_shape(files.shape(names[key]), leaf) for key in leaf.keys if key in names}
        found += [f"{key} has shape {s}, not {shape}" for key, s in there.items() if s != shape]
    return list(dict.fromkeys(found))  # a tensor with several parts is listed once


def not_floats(kinds: Mapping[str, str]) -> list[str]:
    """One message if some of {key: type} are no FLOATS."""
    odd = [key for key, kind in kinds.items() if kind not in FLOATS]
    more = f", as {len(odd) - 1} others" if len(odd) > 1 else ""
    what = "numbers of another type than floats of 16, 32 or 64 bits: give weights that are not quantised"
    return [f"{odd[0]} is stored as {kinds[odd[0]]}{more}: {what}"] if odd else []


def _read(files: Files, leaf: Leaf, keys: Sequence[str], dtype: Any, at: tuple[slice, ...]) -> np.ndarray:
    """The part `at` of one leaf in our layout, its layers stacked as they are read."""
    at = _explicit(at, leaf.shape)
    if not leaf.stacked:
        value = _layer(files, leaf, keys, leaf.shape, at)
        return np.asarray(value, order="C", dtype=value.dtype if dtype is None else dtype)
    shape, inside = leaf.shape[1:], at[1:]
    layers = (_layer(files, leaf, group, shape, inside) for group in groups(keys, leaf.fused)[at[0]])
    if dtype is None:
        return np.stack([np.asarray(x, order="C") for x in layers])
    stack, read = np.empty([s.stop - s.start for s in at], dtype), 0
    for i, value in enumerate(layers):
        stack[i] = value
        read += math.prod(shape) * value.itemsize  # a few columns of a tensor are in all of its pages
        if read > MAPPED:
            files.close()
            read = 0
    return stack


def _explicit(at: Sequence[slice], shape: Sequence[int]) -> tuple[slice, ...]:
    """The same slices with start and stop."""
    return tuple(slice(*s.indices(n)[:2]) for s, n in zip(at, shape, strict=True))


def _layer(files: Files, leaf: Leaf, keys: Sequence[str], shape: tuple[int, ...], at: tuple[slice, ...]) -> np.ndarray:
    """The part `at` of one layer, of `shape` in our layout. Tensors that are not in it are not read."""
    if len(keys) == 1:
        return _tensor(files, leaf, keys[0], at)
    width, last, parts = shape[-1] // len(keys), at[-1], []
    for i, key in enumerate(keys):
        first, end = (min(max(x - i * width, 0), width) for x in (last.start, last.stop))
        if first < end:
            parts.append(_tensor(files, leaf, key, (*at[:-1], slice(first, end))))
    return np.concatenate(parts, axis=-1)


def _tensor(files: Files, leaf: Leaf, key: str, at: tuple[slice, ...]) -> np.ndarray:
    """The part `at`, in our layout, of one tensor or of the leaf's part of it."""
    shape, (i, n) = files.shape(key), leaf.part
    axes = _TO_OURS[leaf.layout]
    axes = tuple(range(len(at))) if axes is None or len(axes) != len(at) else axes
    there = [at[axes.index(axis)] for axis in range(len(at))]
    if n > 1:
        first = i * (shape[0] // n)
        there[0] = slice(first + there[0].start, first + there[0].stop)
    there += [slice(0, 1)] * (len(shape) - len(at))  # of a 1x1 convolution
    whole = all(s == slice(0, size) for s, size in zip(there, shape, strict=True))
    x = files[key] if whole else files.part(key, tuple(there))
    return x.reshape(x.shape[: len(at)]).transpose(axes)


def save(
    tree: PyTree,
    rules: Sequence[Rule],
    file: str | Path,
    *,
    dtype: Any = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `tree` as one safetensors file in the public layout; the inverse of `load`."""
    by_path = leaves_by_path(tree)
    parts: dict[str, dict[int, np.ndarray]] = {}
    for leaf in needed(tree, rules):
        value = np.asarray(by_path[leaf.path])
        value = value if dtype is None else value.astype(dtype)
        for i, keys in enumerate(leaf.by_layer()):
            own = value[i, ...] if leaf.stacked else value
            for key, piece in zip(keys, np.split(own, leaf.fused, axis=-1) if leaf.fused > 1 else [own], strict=True):
                parts.setdefault(key, {})[leaf.part[0]] = _theirs(piece, leaf.layout)
    tensors = {k: x[0] if len(x) == 1 else np.concatenate([x[i] for i in sorted(x)]) for k, x in parts.items()}
    write(file, tensors, metadata or {})


def write(file: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write tensors as one safetensors file, which replaces `file` once it is complete; memory holds its bytes."""
    in_rows = {key: np.asarray(x, order="C") for key, x in tensors.items()}  # safetensors writes other orders wrongly
    content = safetensors_bytes(in_rows, metadata={"format": "pt", **metadata})
    with disk.whole(Path(file)) as f:  # save_file creates files that only their owner can read
        f.write(content)


def _ours_shape(shape: tuple[int, ...], leaf: Leaf) -> tuple[int, ...]:
    axes, n = _TO_OURS[leaf.layout], leaf.part[1]
    shape = matrix(shape) if leaf.layout == "pointwise" else shape
    shape = shape if n == 1 or not shape or shape[0] % n else (shape[0] // n, *shape[1:])
    return shape if axes is None or len(shape) != len(axes) else tuple(shape[i] for i in axes)


def matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[out, in] for a 1x1 convolution's [out, in, 1, 1]; other shapes unchanged."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _theirs(x: np.ndarray, layout: str) -> np.ndarray:
    axes = _TO_THEIRS[layout]
    x = np.asarray(x if axes is None else x.transpose(axes), order="C")  # ascontiguousarray turns () into (1,)
    return x[..., None, None] if layout == "pointwise" else x


def read_json(file: str | Path) -> dict[str, Any]:
    """A JSON file of a checkpoint (bare -Infinity is accepted: public scheduler configs contain it)."""
    file = Path(file)
    if not file.is_file():
        raise WeightsError(f"{file} is missing: {file.parent} is not the folder of a model in its public layout")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise WeightsError(f"{file} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise WeightsError(f"{file} is not JSON ({e}): download it again") from e
    if not isinstance(found, dict):
        raise WeightsError(f"{file} holds a {type(found).__name__}, not an object: download it again")
    return found


def read_config(folder: str | Path, kind: str | None = None) -> dict[str, Any]:
    """config.json of one component, as a dict; WeightsError if its class name is not `kind`."""
    raw = read_json(Path(folder) / "config.json")
    if kind is not None and (found := raw.get("_class_name", kind)) != kind:
        raise WeightsError(f"{folder} holds a {found}, not a {kind}: use the config of that model")
    return raw


def stored(folder: str | Path, stem: str) -> list[Path]:
    """The files that `Files` would read, whether they exist or not; WeightsError if the folder has no weights."""
    return _shards(Path(folder), stem)


def from_config(cls, folder: str | Path, values: Mapping[str, Any] | None = None, name: str = "config.json"):
    """Dataclass `cls` from `values`, by default the content of the folder's file `name`.

    Lists become tuples. Missing and null values keep the default, with two exceptions: null stays None if the field may
    be None, and null for a bool is an error. Also WeightsErrors: a value of another kind than its field's default
    (`_unlike`), values that the class refuses, and options that its `options` do not allow (options.py).
    """
    file, fields = Path(folder) / name, {field.name: field for field in dataclasses.fields(cls)}
    found = read_json(file) if values is None else values
    if (known := options.of(cls)) is not None:
        options.check(known, fields, file, found)
    given = {}
    for key, value in ((key, value) for key, value in found.items() if key in fields):
        default = fields[key].default
        if value is not None and (wanted := _unlike(value, default)):
            raise WeightsError(f"{file}: {key} is {value!r}, not {wanted}: download it again")
        if value is None and isinstance(default, bool):
            raise WeightsError(f"{file}: {key} is null, not true or false: download it again")
        if value is not None or options.nullable(fields[key]):
            given[key] = float(value) if type(value) is int and isinstance(default, float) else _as_tuple(value)
    try:
        return cls(**given)
    except ValueError as e:
        raise WeightsError(f"{file}: {e}") from e


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _unlike(value: Any, default: Any) -> str | None:
    """The kind that `value` should have, given a field's default; None if it does. Counts and sizes are above 0."""
    if default == ():  # indices, possibly none
        fits = isinstance(value, list | tuple) and not any(_unlike(x, 0) for x in value)
        return None if fits else "a list of whole numbers"
    if isinstance(default, tuple):
        fits = isinstance(value, list | tuple) and value and not any(_unlike(x, default[0]) for x in value)
        return None if fits else f"a list, each {_KINDS[type(default[0])]}"
    numbers = (int, float) if isinstance(default, float) else (type(default),)
    fits = isinstance(value, numbers) and isinstance(value, bool) == isinstance(default, bool)
    if fits and type(default) is int and default > 0:
        fits = value > 0
    return None if fits else _KINDS.get(type(default))


_KINDS = {bool: "true or false", int: "a whole number above 0", float: "a number", str: "a text", tuple: "a list"}
