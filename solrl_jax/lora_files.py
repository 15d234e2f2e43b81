"""Files of LoRA sets, read and written.

They come in two layouts. diffusers': one module per Linear, transformer.<name>.lora_A.weight [R, in] and lora_B [out,
R]. ComfyUI's (and kohya's): lora_unet_<name>.lora_down.weight, .lora_up.weight and .alpha, in which one module can hold
the rows of several Linears (`Fused`); the model's table says which.
"""

import itertools
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

from solrl_jax import disk
from solrl_jax.config import Lora
from solrl_jax.lora import put, scaled
from solrl_jax.structs import Params
from solrl_jax.weights import Leaf, Rule, WeightsError, groups, leaves_by_path, matrix, needed

Tensors = Mapping[str, np.ndarray]


class Fused(NamedTuple):
    """A module of a LoRA file and the Linears whose output rows it holds, in order ("{layer}" in all or in none)."""

    name: str
    parts: tuple[str, ...]
    swapped: bool = False  # its two halves of rows stand the other way round there


def save(file: str | Path, lora: Params, keys: Sequence[Rule], cfg: Lora) -> None:
    """One safetensors file that `pipe.load_lora_weights` takes at scale 1: alpha / R is folded into lora_B, because
    older readers ignore alpha (models.md section 10). The metadata tells how it was made."""
    tensors = {}
    for leaf, name, part, x in _public(scaled(lora, cfg), keys):
        x = x.T[..., None, None] if leaf.layout == "pointwise" else x.T
        tensors[f"transformer.{name}.lora_{part}.weight"] = x
    _write(file, tensors, cfg)


def save_fused(
    file: str | Path, lora: Params, base: Params, keys: Sequence[Rule], fused: Sequence[Fused], cfg: Lora
) -> None:
    """The same policy in ComfyUI's layout, for strength 1; of `base` only shapes are used.

    A fused module stacks the down factors of its adapted parts; its up factor holds theirs in blocks and zeros
    elsewhere. alpha is the module's rank: the readers' alpha / rank is 1.
    """
    factors: dict[str, dict[str, np.ndarray]] = {}
    for _, name, part, x in _public(scaled(lora, cfg), keys):
        factors.setdefault(name, {})[part] = x.T
    sizes = _sizes(_linears(base, keys))
    tensors: dict[str, np.ndarray] = {}
    for module in _layers(fused, sizes):
        parts = [(sizes[p][1], factors.pop(p, None)) for p in module.parts]
        if any(pair for _, pair in parts):
            (down, up), its = _blocks(parts), _Names.of(module.name, comfy=True)
            tensors[its.down], tensors[its.up] = down, _swap(up) if module.swapped else up
            tensors[its.alpha] = np.array(len(down), np.float32)
    if factors:
        raise WeightsError(f"the model's table has no ComfyUI name for {', '.join(sorted(factors)[:4])}")
    _write(file, tensors, cfg)


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


def _write(file: str | Path, tensors: Mapping[str, np.ndarray], cfg: Lora) -> None:
    made = json.dumps({"rank": cfg.rank, "alpha": cfg.alpha, "folded": True})
    in_rows = {key: np.asarray(x, order="C") for key, x in tensors.items()}  # other orders are written out wrong
    content = safetensors_bytes(in_rows, metadata={"format": "pt", "solrl_jax": made})
    with disk.whole(Path(file)) as f:  # save_file makes files that only their owner can read
        f.write(content)


def load(file: str | Path, base: Params, keys: Sequence[Rule], cfg: Lora, fused: Sequence[Fused] = ()) -> Params:
    """The set that a file holds, of the file's own ranks and for the Linears that it names.

    The layout shows in the names; ComfyUI's is read with the model's table `fused`. Ranks may differ: the layers of a
    stack are padded with zeros to the largest. B is divided by cfg's alpha / R, so that `scaled` gives the file's
    policy at the alphas it states (else scale 1). Of `base` only shapes are used. WeightsError where a name fits no
    Linear, a layer of a stack or half of a pair lacks, a shape differs.
    """
    file = Path(file)
    if file.is_dir():
        file = file / "pytorch_lora_weights.safetensors"
    tensors, stated = _read(file)
    linears = _linears(base, keys)
    sizes = _sizes(linears)
    comfy = any(key.startswith("lora_unet_") for key in tensors)
    layout = _layers(fused, sizes) if comfy else [Fused(name, (name,)) for name in sizes]
    names = {module: _Names.of(module.name, comfy) for module in layout}
    present = {module: its for module, its in names.items() if {its.down, its.up} & tensors.keys()}
    absent = _absent_layers(linears, names, present)
    if problems := absent + _problems(tensors, present, sizes) or ([] if tensors else ["it is empty"]):
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise WeightsError(
            f"{file} is no LoRA of this model: pairs of factors on its Linears, in the names of diffusers "
            "(transformer.*.lora_A.weight) or ComfyUI (lora_unet_*.lora_down.weight):\n  "
            + "\n  ".join(problems[:8])
            + more
        )
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for module, its in present.items():
        down, up = (tensors[key].astype(np.float32) for key in (its.down, its.up))
        alpha = stated if stated is not None else tensors[its.alpha].item() if its.alpha in tensors else len(down)
        pairs |= _split(module, down, up * (alpha / len(down)), sizes)
    found = _stacked(linears, pairs, cfg)
    if not found:
        raise WeightsError(f"{file} adds nothing to the model: every up factor is zero")
    return found


class _Names(NamedTuple):
    """The keys of one module in a file."""

    down: str
    up: str
    alpha: str

    @classmethod
    def of(cls, name: str, comfy: bool) -> "_Names":
        ends = ("lora_down.weight", "lora_up.weight") if comfy else ("lora_A.weight", "lora_B.weight")
        return cls(*(f"{'lora_unet_' if comfy else 'transformer.'}{name}.{end}" for end in (*ends, "alpha")))


def _problems(tensors: Tensors, present: Mapping[Fused, _Names], sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Halves of pairs, wrong shapes, and keys that are none of the model's."""
    missing, shapes = [], {}
    for module, keys in present.items():
        missing += [f"missing {key}" for key in (keys.down, keys.up) if key not in tensors]
        known = tensors[keys.down].shape[:1] if keys.down in tensors else tensors[keys.up].shape[1:]
        rank = max((1, *known))
        shapes[keys.down] = (rank, sizes[module.parts[0]][0])
        shapes[keys.up] = (sum(sizes[part][1] for part in module.parts), rank)
        if keys.alpha in tensors:
            shapes[keys.alpha] = (1,) * tensors[keys.alpha].ndim
    unused = [f"unused {key}" for key in tensors if key not in shapes]
    return [*missing, *unused] + [
        f"{key} has shape {tensors[key].shape}, not {shape}"
        for key, shape in shapes.items()
        if key in tensors and tensors[key].shape != shape
    ]


def _absent_layers(linears: Sequence[Leaf], names: Mapping[Fused, _Names], present: Collection[Fused]) -> list[str]:
    """What a file lacks that adapts some layers of a stack: it may be for a model of fewer layers."""
    home = {part: module for module in names for part in module.parts}
    problems = {}
    for leaf, first in ((one, first) for one in linears for first in range(one.fused)):
        homes = [home[name] for name in _module_names(leaf)[first :: leaf.fused] if name in home]
        if any(module in present for module in homes):
            problems |= {names[module].down: None for module in homes if module not in present}
    return [f"missing {key}" for key in problems]


def _split(
    module: Fused, down: np.ndarray, up: np.ndarray, sizes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{Linear: (down [r, in], up [out, r])} of one module's [R, in] and [out of all, R].

    Each part takes its own rows, and of the R components those that reach them: what `save_fused` put in blocks comes
    back as it was, what another trainer made dense keeps the whole down factor in every part.
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
    """The tree of our layout, B divided by cfg's alpha / R; Linears that nothing reaches are left out."""
    out: dict[str, Any] = {}
    for leaf in linears:
        rows = leaf.shape[-1] // leaf.fused
        layers = [[(rows, pairs.get(name)) for name in group] for group in groups(_module_names(leaf), leaf.fused)]
        found = [_one_pair(parts) for parts in layers if any(pair for _, pair in parts)]
        if not (most := max((len(down) for down, _ in found), default=0)):
            continue
        a = [np.pad(down.T, ((0, 0), (0, most - len(down)))) for down, _ in found]
        b = [np.pad(up.T, ((0, most - len(down)), (0, 0))) / (cfg.alpha / cfg.rank) for down, up in found]
        a, b = (jnp.asarray(np.stack(x) if leaf.stacked else x[0]) for x in (a, b))
        put(out, leaf.path.removesuffix("/kernel"), {"a": a, "b": b})
    return out


def _one_pair(parts: Sequence[tuple[int, tuple[np.ndarray, np.ndarray] | None]]) -> tuple[np.ndarray, np.ndarray]:
    """(down, up) of a Linear that is several ones in the file, given as (rows, their pair): q, k and v of a fused one.

    What `save` wrote, the same down factor for all, comes back as it was; different ones are stacked (`_blocks`).
    """
    (first, _), *rest = (pair for _, pair in parts if pair)
    if all(np.array_equal(down, first) for down, _ in rest):
        return first, np.concatenate([pair[1] if pair else np.zeros((n, len(first)), np.float32) for n, pair in parts])
    return _blocks([(rows, {"A": pair[0], "B": pair[1]} if pair else None) for rows, pair in parts])


def _linears(base: Params, keys: Sequence[Rule]) -> list[Leaf]:
    """The Linears' kernels and where the checkpoint has them."""
    kernels: dict[str, Any] = {}
    for path, kernel in leaves_by_path(base).items():
        if path.endswith("/kernel") and kernel.ndim < 4:
            put(kernels, path, kernel)
    return needed(kernels, keys)


def _module_names(leaf: Leaf) -> list[str]:
    return [key.removesuffix(".weight") for key in leaf.keys]


def _sizes(linears: Sequence[Leaf]) -> dict[str, tuple[int, int]]:
    """{checkpoint module name: (in, out)}, every layer of a stack by itself."""
    return {name: (leaf.shape[-2], leaf.shape[-1] // leaf.fused) for leaf in linears for name in _module_names(leaf)}


def _layers(fused: Sequence[Fused], modules: Collection[str]) -> Iterator[Fused]:
    """The table with every layer that the model has by itself; what the model lacks is left out."""
    for rule in fused:
        for layer in itertools.count():
            name, *parts = (text.replace("{layer}", str(layer)) for text in (rule.name, *rule.parts))
            if parts[0] not in modules:
                break
            yield Fused(name, tuple(parts), rule.swapped)
            if name == rule.name:
                break


def _read(file: Path) -> tuple[dict[str, np.ndarray], float | None]:
    """A file's tensors, in one spelling of each layout, and the alpha that its metadata states for all of them."""
    if not file.is_file():
        raise WeightsError(f"{file} does not exist: give a LoRA .safetensors file or the folder that holds it")
    try:
        with safe_open(file, "numpy") as f:
            tensors = {_spelt(key): f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 - the handle is no dict
            tensors = {key: x.reshape(matrix(x.shape)) for key, x in tensors.items()}
            return tensors, _stated_alpha(file, f.metadata() or {})
    except SafetensorError as e:
        raise WeightsError(f"{file} is not a whole safetensors file ({e})") from e
    except OSError as e:
        raise WeightsError(f"{file} cannot be read: {e.strerror or e}") from e


def _spelt(key: str) -> str:
    """ComfyUI also takes the dotted names of its own modules, and saves them: diffusion_model.<a.b.c>.lora_A.weight."""
    if not (match := re.fullmatch(r"diffusion_model\.(.+?)\.(lora_(?:A|B|up|down)\.weight|alpha)", key)):
        return key
    end = match[2].replace("lora_A", "lora_down").replace("lora_B", "lora_up")
    return f"lora_unet_{match[1].replace('.', '_')}.{end}"


def _stated_alpha(file: Path, metadata: Mapping[str, str]) -> float | None:
    """The alpha of the `lora_adapter_metadata` that diffusers writes when it does not fold (models.md section 10)."""
    try:
        stated = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")).items())
    except (ValueError, AttributeError) as e:
        raise WeightsError(f"{file}: its lora_adapter_metadata is no JSON object ({e}): export it again") from None
    found = {key.removeprefix("transformer."): value for key, value in stated.items()}
    odd = [name for name in ("alpha_pattern", "use_rslora", "use_dora") if found.get(name)]
    if odd:
        raise WeightsError(f"{file} is a LoRA with {', '.join(odd)}: give one with the same alpha / r everywhere")
    if not {"lora_alpha", "r"} <= found.keys():
        return None
    alpha = found["lora_alpha"]
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise WeightsError(f"{file}: its lora_adapter_metadata says lora_alpha {alpha!r}, no number: export it again")
    return float(alpha)


def _modules(tree: Params, keys: Sequence[Rule]) -> Iterator[tuple[str, Leaf]]:
    """(leaf path, its Linear as the key table has it) of each `a` and `b`."""
    for path, leaf in leaves_by_path(tree).items():
        kernel = path.rsplit("/", 1)[0]
        kernel_tree: dict[str, Any] = {}
        put(kernel_tree, f"{kernel}/kernel", leaf)
        yield path, needed(kernel_tree, keys)[0]


def _public(tree: Params, keys: Sequence[Rule]) -> Iterator[tuple[Leaf, str, str, np.ndarray]]:
    """(its Linear, checkpoint module name, "A" or "B", matrix) of every layer of every adapted module.

    Of a Linear that the checkpoint has as several, each takes the same A and its own part of B.
    """
    by_path = leaves_by_path(tree)
    for path, leaf in _modules(tree, keys):
        value, part = np.asarray(by_path[path], np.float32), path[-1].upper()
        for names, factor in zip(leaf.by_layer(), value if leaf.stacked else value[None], strict=True):
            own = np.split(factor, len(names), axis=-1) if part == "B" else [factor] * len(names)
            for name, x in zip(names, own, strict=True):
                yield leaf, name.removesuffix(".weight"), part, x
