"""Files of LoRA sets, read and written.

Two layouts are written. diffusers': one module per Linear, transformer.<name>.lora_A.weight [R, in] and lora_B [out,
R]. ComfyUI's (and kohya's): lora_unet_<name>.lora_down.weight, .lora_up.weight and .alpha. There a module can hold the
rows of several Linears (`Fused`), listed in the model's table.

Both are read. diffusers' names are also read without "transformer." (a transformer's own save_lora_adapter) and after
"base_model.model." (PEFT's folders); the file's metadata or adapter_config.json then give the scale of the factors. In
ComfyUI's layout, diffusers' names are read too: lora_unet_layers_0_attention_to_q (kohya's trainers of networks that
have diffusers' modules) and diffusion_model.layers.0.attention.to_q (ai-toolkit's files of Z-Image).
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from solrl_jax.config import Lora
from solrl_jax.lora import put, scaled
from solrl_jax.structs import Params, leaves_by_path
from solrl_jax.weights import Leaf, Rule, WeightsError, groups, needed, write
from solrl_jax.weights.lora_content import COMFY, Content, Names, inside, read

Tensors = Mapping[str, np.ndarray]


class Fused(NamedTuple):
    """A module of a LoRA file and the Linears whose output rows it holds, in order ("{layer}" in all or in none)."""

    name: str
    parts: tuple[str, ...]
    swapped: bool = False  # its two halves of rows are in the opposite order


Modules = Mapping[tuple[str, str], Mapping[str, tuple[str, ...]]]


def fused(modules: Modules) -> Iterator[Fused]:
    """From {(prefix of their names, prefix of ours): {their name: our names}}."""
    for (theirs, ours), names in modules.items():
        for name, parts in names.items():
            yield Fused(theirs + name, tuple(ours + part for part in parts))


def save(
    file: str | Path,
    lora: Params,
    keys: Sequence[Rule],
    cfg: Lora,
    *,
    under: Params | None = None,
    said: Mapping[str, Any] | None = None,
) -> None:
    """Write one safetensors file that `pipe.load_lora_weights` reads at scale 1.

    alpha / R is folded into lora_B, because older versions of diffusers ignore alpha. The metadata has rank and
    alpha, and `said`. `under`: a set, already `scaled`, whose product is added: its factors come first in every
    module that it adapts, and ranks add there.
    """
    factors = _factors(lora, keys, cfg, under)
    leaves = (leaf for x in (lora, under or {}) for _, leaf in _modules(x, keys) if leaf.layout == "pointwise")
    pointwise = {name for leaf in leaves for name in _module_names(leaf)}
    tensors = {
        f"transformer.{name}.lora_{part}.weight": x[..., None, None] if name in pointwise else x
        for name, pair in factors.items()
        for part, x in pair.items()
    }
    write(file, tensors, _metadata(factors, cfg, under, said))


def save_fused(
    file: str | Path,
    lora: Params,
    base: Params,
    keys: Sequence[Rule],
    fused: Sequence[Fused],
    cfg: Lora,
    *,
    under: Params | None = None,
    said: Mapping[str, Any] | None = None,
) -> None:
    """The same policy in ComfyUI's layout, for strength 1; only the shapes of `base` are used.

    A fused module stacks the down factors of its adapted parts; its up factor has their up factors as blocks on the
    diagonal, and zeros elsewhere. alpha is the module's rank, so that the readers' alpha / rank is 1.
    """
    factors = _factors(lora, keys, cfg, under)
    metadata, sizes = _metadata(factors, cfg, under, said), _sizes(_linears(base, keys))
    tensors: dict[str, np.ndarray] = {}
    for module in _layers(fused, sizes):
        parts = [(sizes[p][1], factors.pop(p, None)) for p in module.parts]
        if any(pair for _, pair in parts):
            (down, up), its = _blocks(parts), Names.of(module.name, COMFY)
            tensors[its.down], tensors[its.up] = down, _swap(up) if module.swapped else up
            tensors[its.alpha] = np.array(len(down), np.float32)
    if factors:
        raise WeightsError(f"the model's table has no ComfyUI name for {', '.join(sorted(factors)[:4])}")
    write(file, tensors, metadata)


def _factors(lora: Params, keys: Sequence[Rule], cfg: Lora, under: Params | None) -> dict[str, dict[str, np.ndarray]]:
    """{checkpoint module name: {A [R, in], B [out, R]}} of `lora`, with those of `under` before its own.

    Of `under`, components whose column of B is zero add nothing and are left out: those of layers and of parts of a
    Linear that its files do not have.
    """
    found = _by_name(scaled(lora, cfg), keys)
    for name, pair in _by_name(under or {}, keys).items():
        if (used := pair["B"].any(axis=0)).any():
            both = ({"A": pair["A"][used], "B": pair["B"][:, used]}, *([found[name]] if name in found else []))
            found[name] = {part: np.concatenate([x[part] for x in both], axis=int(part == "B")) for part in "AB"}
    return found


def _by_name(lora: Params, keys: Sequence[Rule]) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for _, name, part, x in _public(lora, keys):
        found.setdefault(name, {})[part] = x.T
    return found


def _metadata(
    factors: Mapping[str, Tensors], cfg: Lora, under: Params | None, said: Mapping[str, Any] | None
) -> dict[str, str]:
    """The metadata of a file: its rank is the largest of its modules."""
    rank = max(len(pair["A"]) for pair in factors.values()) if under else cfg.rank
    made = {"rank": rank, "alpha": float(rank) if under else cfg.alpha, "folded": True, **(said or {})}
    return {"solrl_jax": json.dumps(made)}


def _blocks(parts: Sequence[tuple[int, Tensors | None]]) -> tuple[np.ndarray, np.ndarray]:
    """One pair for Linears of the same input, each given as (rows, {A [r, in], B [rows, r]} or None)."""
    down = np.concatenate([pair["A"] for _, pair in parts if pair])
    up, row, column = np.zeros((sum(rows for rows, _ in parts), len(down)), np.float32), 0, 0
    for rows, pair in parts:
        if pair:
            up[row : row + rows, column : column + len(pair["A"])] = pair["B"]
            column += len(pair["A"])
        row += rows
    return down, up


class Loaded(NamedTuple):
    """A set, and lines for the user about its file: how much it adapts, what was left out."""

    adapter: Params
    said: tuple[str, ...]


def load(
    file: str | Path,
    base: Params,
    keys: Sequence[Rule],
    cfg: Lora,
    fused: Sequence[Fused] = (),
    native: Sequence[Rule] = (),
    *,
    whole: bool = False,
) -> Loaded:
    """The set in a file, with the file's own ranks and for the Linears that it names.

    The names tell the layout. ComfyUI's is read with the model's table `fused` (or with diffusers' names), names of the
    original code with its table `native`. Layers of a stack that the file does not have, and ranks below the stack's
    largest, become zeros. B is divided by cfg's alpha / R, so that `scaled` gives the file's policy at the scale that
    it states (else 1). Only the shapes of `base` are used. WeightsError if a name fits no Linear, two modules adapt
    one, one factor of a pair is missing, a shape differs, a number is not finite, or the file is more than a LoRA; if
    `whole`, also for keys of text encoders, which are else left out.
    """
    found = read(inside(Path(file)))
    if whole and found.text:
        raise WeightsError(
            f"{found.file} adapts text encoders too ({len(found.text)} keys, as {found.text[0]}), which cannot be "
            "folded into the model: give a LoRA of the transformer alone"
        )
    tables = [_linears(base, table) for table in (keys, native) if table]
    linears = max(tables, key=lambda those: len({found.prefix + name for name in _sizes(those)} & found.named()))
    sizes = _sizes(linears)
    layout = _underscored(fused, sizes) if found.prefix == COMFY else [Fused(name, (name,)) for name in sizes]
    names = {module: Names.of(module.name, found.prefix) for module in layout}
    present = {module: its for module, its in names.items() if {its.down, its.up} & found.tensors.keys()}
    _check(found, present, sizes)
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for module, its in present.items():
        with np.errstate(over="ignore", invalid="ignore"):
            down, up = (found.tensors[key].astype(np.float32) for key in (its.down, its.up))
            up = up * (scale := found.scale(module.name, its, len(down)))
        for key, x in ((its.down, down), (its.up, up)):
            if not np.isfinite(x).all():
                raise WeightsError(f"{found.file}: {key} is not finite at scale {scale:g}: train or save it again")
        pairs |= _split(module, down, up, sizes)
    adapter = _stacked(linears, pairs, cfg)
    if not adapter:
        raise WeightsError(f"{found.file} adds nothing to the model: every up factor is zero")
    return Loaded(adapter, (_coverage(linears, pairs), *found.left_out()))


def _check(found: Content, present: Mapping[Fused, Names], sizes: Mapping[str, tuple[int, int]]) -> None:
    """WeightsError that lists what does not fit in a file."""
    empty = f"it has only keys of a text encoder ({found.text[0]})" if found.text else "it is empty"
    problems = _problems(found.tensors, present, sizes) if found.tensors else [empty]
    alphas = [its.alpha for its in present.values() if its.alpha in found.tensors]
    if found.adapter is not None and alphas:
        problems.append(f"{alphas[0]} beside the alpha that {found.adapter.where} states: keep one of them")
    if found.prefix != COMFY and 0 < len(alphas) < len(present):
        lone = next(its.alpha for its in present.values() if its.alpha not in alphas)
        problems.append(f"missing {lone}, though others have one, and readers then differ: give all or none")
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise WeightsError(
            f"{found.file} is not a LoRA of this model: pairs of factors on its Linears, in the names of diffusers "
            "(transformer.*.lora_A.weight), PEFT (base_model.model.*) or ComfyUI (lora_unet_*.lora_down.weight):\n  "
            + "\n  ".join(problems[:8])
            + more
        )


def _problems(tensors: Tensors, present: Mapping[Fused, Names], sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Incomplete pairs, wrong shapes, Linears that two modules adapt, and keys that are not the model's."""
    missing, shapes = [], {}
    times = Counter(part for module in present for part in module.parts)
    twice = [f"{part} is adapted by two modules" for part, count in times.items() if count > 1]
    for module, keys in present.items():
        missing += [f"missing {key}" for key in (keys.down, keys.up) if key not in tensors]
        known = tensors[keys.down].shape[:1] if keys.down in tensors else tensors[keys.up].shape[1:]
        rank = max((1, *known))
        shapes[keys.down] = (rank, sizes[module.parts[0]][0])
        shapes[keys.up] = (sum(sizes[part][1] for part in module.parts), rank)
        if keys.alpha in tensors:
            shapes[keys.alpha] = (1,) * tensors[keys.alpha].ndim
    unused = {key: _form(key) for key in tensors if key not in shapes}
    more = [f"unused {key}, which is of a {form}" for key, form in unused.items() if form]
    return [*more, *twice, *missing, *(f"unused {key}" for key, form in unused.items() if not form)] + [
        f"{key} has shape {tensors[key].shape}, not {shape}"
        for key, shape in shapes.items()
        if key in tensors and tensors[key].shape != shape
    ]


_FORMS = {
    "DoRA": r"\.(dora_scale|lora_magnitude_vector)\b",
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "OFT": r"\.oft_",
    "LoCon with a core": r"\.lora_mid\b",
    "full difference": r"\.diff(_b)?$",
    "bias": r"\.bias$",
}
"""Keys by which more than a LoRA is recognised."""


def _form(key: str) -> str:
    return next((form for form, pattern in _FORMS.items() if re.search(pattern, key)), "")


def _coverage(linears: Sequence[Leaf], pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """How much of the model is adapted. A file made for a model of fewer blocks is recognised by this."""
    ranks = {name: len(down) for name, (down, _) in pairs.items() if len(down)}
    names = [name for leaf in linears if leaf.stacked for name in _module_names(leaf)]
    blocks = {name: match[0] for name in names if (match := re.match(r".+?\.\d+(?=\.)", name))}
    inside, whole = {blocks[name] for name in ranks if name in blocks}, set(blocks.values())
    rest = "; the others are not changed" if inside and inside != whole else ""
    total = sum(len(_module_names(leaf)) for leaf in linears)
    stacks = f", in {len(inside)} of {len(whole)} blocks{rest}" if whole else ""
    return f"LoRA of rank {max(ranks.values())} on {len(ranks)} of {total} Linears{stacks}"


def _split(
    module: Fused, down: np.ndarray, up: np.ndarray, sizes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{Linear: (down [r, in], up [out, r])} of one module's [R, in] and [out of all, R].

    Each part gets its own rows, and those of the R components that are not zero in them. So the blocks of `save_fused`
    are restored exactly, and a dense module of another trainer keeps the whole down factor in every part.
    """
    up, ends = _swap(up) if module.swapped else up, list(itertools.accumulate(sizes[p][1] for p in module.parts))
    pairs = {}
    for part, rows in zip(module.parts, np.split(up, ends[:-1]), strict=True):
        reach = rows.any(axis=0) if len(module.parts) > 1 else np.ones(len(down), bool)
        pairs[part] = down[reach], rows[:, reach]
    return pairs


def _swap(up: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(up, 2)[::-1])


def _stacked(linears: Sequence[Leaf], pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], cfg: Lora) -> Params:
    """The tree in our layout, B divided by cfg's alpha / R; Linears without factors are left out."""
    out: dict[str, Any] = {}
    for leaf in linears:
        rows = leaf.shape[-1] // leaf.fused
        layers = [[(rows, pairs.get(name)) for name in group] for group in groups(_module_names(leaf), leaf.fused)]
        found = [_one_pair(parts, leaf.shape) for parts in layers]
        if not (most := max(len(down) for down, _ in found)):
            continue
        a = [np.pad(down.T, ((0, 0), (0, most - len(down)))) for down, _ in found]
        b = [np.pad(up.T, ((0, most - len(down)), (0, 0))) / (cfg.alpha / cfg.rank) for down, up in found]
        a, b = (jnp.asarray(np.stack(x) if leaf.stacked else x[0]) for x in (a, b))
        put(out, leaf.path.removesuffix("/kernel"), {"a": a, "b": b})
    return out


def _one_pair(
    parts: Sequence[tuple[int, tuple[np.ndarray, np.ndarray] | None]], shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """(down, up) of a Linear that is several Linears in the file, as a fused q, k, v, given as (rows, their pair).

    If all have the same down factor, as `save` writes, it is kept; different ones are stacked (`_blocks`). Without any
    pair the result has rank 0, for a kernel of `shape` [..., in, out].
    """
    if not any(pair for _, pair in parts):
        return np.zeros((0, shape[-2]), np.float32), np.zeros((shape[-1], 0), np.float32)
    (first, _), *rest = (pair for _, pair in parts if pair)
    if all(np.array_equal(down, first) for down, _ in rest):
        return first, np.concatenate([pair[1] if pair else np.zeros((n, len(first)), np.float32) for n, pair in parts])
    return _blocks([(rows, {"A": pair[0], "B": pair[1]} if pair else None) for rows, pair in parts])


def _linears(base: Params, keys: Sequence[Rule]) -> list[Leaf]:
    """The Linears' kernels and their keys in the checkpoint."""
    kernels: dict[str, Any] = {}
    for path, kernel in leaves_by_path(base).items():
        if path.endswith("/kernel") and kernel.ndim < 4:
            put(kernels, path, kernel)
    return needed(kernels, keys)


def _module_names(leaf: Leaf) -> list[str]:
    return [key.removesuffix(".weight") for key in leaf.keys]


def _sizes(linears: Sequence[Leaf]) -> dict[str, tuple[int, int]]:
    """{checkpoint module name: (in, out)}, with every layer of a stack separately."""
    return {name: (leaf.shape[-2], leaf.shape[-1] // leaf.fused) for leaf in linears for name in _module_names(leaf)}


def _layers(fused: Sequence[Fused], modules: Collection[str]) -> Iterator[Fused]:
    """The table with a separate entry for every layer; modules that the model does not have are left out."""
    for rule in fused:
        for layer in itertools.count():
            name, *parts = (text.replace("{layer}", str(layer)) for text in (rule.name, *rule.parts))
            if parts[0] not in modules:
                break
            yield Fused(name, tuple(parts), rule.swapped)
            if name == rule.name:
                break


def _underscored(fused: Sequence[Fused], modules: Collection[str]) -> list[Fused]:
    """The table's modules, and each Linear by its name in diffusers; where both have a name, the table's."""
    plain = {name.replace(".", "_"): Fused(name.replace(".", "_"), (name,)) for name in modules}
    return list((plain | {module.name: module for module in _layers(fused, modules)}).values())


def _modules(tree: Params, keys: Sequence[Rule]) -> Iterator[tuple[str, Leaf]]:
    """(leaf path, its Linear's entry in the key table) of each `a` and `b`."""
    for path, leaf in leaves_by_path(tree).items():
        kernel = path.rsplit("/", 1)[0]
        kernel_tree: dict[str, Any] = {}
        put(kernel_tree, f"{kernel}/kernel", leaf)
        yield path, needed(kernel_tree, keys)[0]


def _public(tree: Params, keys: Sequence[Rule]) -> Iterator[tuple[Leaf, str, str, np.ndarray]]:
    """(its Linear, checkpoint module name, "A" or "B", matrix) of every layer of every adapted module.

    If the checkpoint splits a Linear into several, each gets the same A and its own part of B.
    """
    by_path = leaves_by_path(tree)
    for path, leaf in _modules(tree, keys):
        value, part = np.asarray(by_path[path], np.float32), path[-1].upper()
        for names, factor in zip(leaf.by_layer(), value if leaf.stacked else value[None], strict=True):
            own = np.split(factor, len(names), axis=-1) if part == "B" else [factor] * len(names)
            for name, x in zip(names, own, strict=True):
                yield leaf, name.removesuffix(".weight"), part, x
