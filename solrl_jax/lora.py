"""LoRA sets: y = W x + (alpha / R) B A x, kept in f32 over a frozen base.

A set mirrors the base's tree: where an adapted Linear has `kernel` [in, out], the set has `a` [in, R] and `b` [R, out],
stacked layers leading. Sets are made from the base's shapes alone, so that a name that fits nothing cannot slip in.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from solrl_jax.config import ConfigError, Lora
from solrl_jax.structs import Params, Variables
from solrl_jax.weights import Rule, WeightsError, leaves_by_path, needed


def adapted(base: Params, targets: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """{module path: kernel shape} of the Linears whose dotted path is a target or ends in "." + target."""
    kernels = {
        p.removesuffix("/kernel"): tuple(x.shape) for p, x in leaves_by_path(base).items() if p.endswith("/kernel")
    }
    found = {
        p: s
        for p, s in kernels.items()
        if any(("." + p.replace("/", ".")).endswith("." + t) for t in targets) and len(s) < 4
    }
    idle = [t for t in targets if not any(("." + p.replace("/", ".")).endswith("." + t) for p in found)]
    if idle:
        raise ConfigError(f"lora.targets {idle} name no Linear of this model; names end like {sorted(_tails(kernels))}")
    return found


def _tails(paths: Mapping[str, Any]) -> set[str]:
    return {p.rsplit("/", 1)[-1] for p in paths}


def init(key: jax.Array, base: Params, targets: Sequence[str], cfg: Lora) -> Params:
    """A ~ N(0, (1/R)^2), B = 0, so the policy starts as the base (algorithms.md 1.4)."""
    modules = adapted(base, targets)
    tree: dict[str, Any] = {}
    for k, (path, shape) in zip(jax.random.split(key, len(modules)), modules.items(), strict=True):
        *layers, inside, outside = shape
        a = jax.random.normal(k, (*layers, inside, cfg.rank)) / cfg.rank
        _put(tree, path, {"a": a, "b": jnp.zeros((*layers, cfg.rank, outside))})
    return tree


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


def scaled(lora: Params, cfg: Lora) -> Params:
    """The set as the network takes it: alpha / R folded into B."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x * (cfg.alpha / cfg.rank) if path[-1].key == "b" else x, lora
    )


def rank(lora: Params) -> int:
    return next(x.shape[-2] for path, x in leaves_by_path(lora).items() if path.endswith("/b"))


def check(base: Params, lora: Params) -> None:
    """WeightsError for an adapter leaf that sits on no Linear of the base: flax would ignore it in silence."""
    paths = leaves_by_path(base)
    for path in leaves_by_path(lora):
        module, _, part = path.rpartition("/")
        if part not in ("a", "b") or f"{module}/kernel" not in paths:
            raise WeightsError(f"adapter leaf {path!r} sits on no Linear of this model: make adapters with lora.init")


def policy(base: Params, lora: Params, cfg: Lora) -> Variables:
    """base + adapter, unmerged: what is trained."""
    check(base, lora)
    return {"params": base, "lora": scaled(lora, cfg)}


def merged_kernels(base: Params, lora: Params, cfg: Lora) -> dict[str, jax.Array]:
    """{kernel path: W + (alpha / R) A B in W's dtype}: only the adapted kernels, a second whole tree would not fit."""
    check(base, lora)
    kernels, factors = leaves_by_path(base), leaves_by_path(scaled(lora, cfg))
    out = {}
    for path in (p.removesuffix("/a") for p in factors if p.endswith("/a")):
        w = kernels[f"{path}/kernel"]
        out[f"{path}/kernel"] = (w.astype(jnp.float32) + factors[f"{path}/a"] @ factors[f"{path}/b"]).astype(w.dtype)
    return out


def graft(base: Params, kernels: Mapping[str, jax.Array]) -> Params:
    """The base with some kernels replaced; every other leaf is shared, nothing is copied."""

    def walk(tree: Mapping[str, Any], at: str) -> dict[str, Any]:
        return {
            name: walk(node, f"{at}{name}/") if isinstance(node, Mapping) else kernels.get(f"{at}{name}", node)
            for name, node in tree.items()
        }

    return walk(base, "")


def save(file: str | Path, lora: Params, keys: Sequence[Rule], cfg: Lora) -> None:
    """One safetensors file that `pipe.load_lora_weights` takes at scale 1: alpha / R is folded into lora_B, because
    older readers ignore alpha (models.md section 10). The metadata tells how it was made."""
    tensors = {}
    for name, part, x in _public(scaled(lora, cfg), keys):
        tensors[f"transformer.{name}.lora_{part}.weight"] = np.ascontiguousarray(x.T)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    made = json.dumps({"rank": cfg.rank, "alpha": cfg.alpha, "folded": True})
    save_file(tensors, file, metadata={"format": "pt", "solrl_jax": made})


def load(file: str | Path, base: Params, keys: Sequence[Rule], cfg: Lora) -> Params:
    """The set that a file in the diffusers layout holds, of the file's own rank and for the Linears that it names.

    B is divided by cfg's alpha / R, so that `scaled` gives the file's policy at the scale its metadata states (else 1).
    Of `base` only shapes are used. WeightsError where a name fits no Linear, a layer of a stack lacks, a shape differs.
    """
    file = Path(file)
    if file.is_dir():
        file = file / "pytorch_lora_weights.safetensors"
    tensors, scale = _read(file)
    linears: dict[str, Any] = {}
    for path, kernel in leaves_by_path(base).items():
        if path.endswith("/kernel") and kernel.ndim < 4:
            _put(linears, path, kernel)
    of_rank = next((len(x) for key, x in tensors.items() if key.endswith(".lora_A.weight")), 0)
    present, wanted = [], {}
    for leaf in needed(linears, keys):
        inside, outside = leaf.shape[-2:]
        shapes = {f"transformer.{k.removesuffix('.weight')}.lora_A.weight": (of_rank, inside) for k in leaf.keys}
        shapes |= {k.replace(".lora_A.", ".lora_B."): (outside, of_rank) for k in shapes}
        if shapes.keys() & tensors.keys():
            present.append((leaf, list(shapes)))
            wanted |= shapes
    problems = [f"missing {k}" for k in wanted if k not in tensors] + [
        f"unused {k}" for k in tensors if k not in wanted
    ]
    problems += [
        f"{k} has shape {v.shape}, not {wanted[k]}" for k, v in tensors.items() if k in wanted and v.shape != wanted[k]
    ]
    if problems or not tensors:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise WeightsError(
            f"{file} is no LoRA of this model, in diffusers' names (transformer.*.lora_A.weight) and of one rank:\n  "
            + "\n  ".join(problems[:8] or ["it is empty"])
            + more
        )
    divisor, out = cfg.alpha / cfg.rank / scale, {}
    for leaf, names in present:
        layers = [jnp.asarray(tensors[name].astype(np.float32).T) for name in names]
        a, b = layers[: len(leaf.keys)], layers[len(leaf.keys) :]
        a, b = (jnp.stack(x) if leaf.stacked else x[0] for x in (a, b))
        _put(out, leaf.path.removesuffix("/kernel"), {"a": a, "b": b / divisor})
    return out


def _read(file: Path) -> tuple[dict[str, np.ndarray], float]:
    """A file's tensors and the scale that its metadata states."""
    if not file.is_file():
        raise WeightsError(f"{file} does not exist: give a LoRA .safetensors file or the folder that holds it")
    try:
        with safe_open(file, "numpy") as f:
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 - a safetensors handle is no dict
            return tensors, _stated_scale(file, f.metadata() or {})
    except SafetensorError as e:
        raise WeightsError(f"{file} is not a whole safetensors file ({e})") from e


def _stated_scale(file: Path, metadata: Mapping[str, str]) -> float:
    """alpha / r of the `lora_adapter_metadata` that diffusers writes when it does not fold (models.md section 10)."""
    stated = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    found = {key.removeprefix("transformer."): value for key, value in stated.items()}
    odd = [name for name in ("alpha_pattern", "use_rslora", "use_dora") if found.get(name)]
    if odd:
        raise WeightsError(f"{file} is a LoRA with {', '.join(odd)}: give one with the same alpha / r everywhere")
    return found["lora_alpha"] / found["r"] if {"lora_alpha", "r"} <= found.keys() else 1.0


def _modules(tree: Params, keys: Sequence[Rule]):
    """(leaf path, checkpoint module names, stacked) of each `a` and `b`, by way of its kernel's rule."""
    for path, leaf in leaves_by_path(tree).items():
        kernel = path.rsplit("/", 1)[0]
        kernel_tree: dict[str, Any] = {}
        _put(kernel_tree, f"{kernel}/kernel", leaf)
        (rule,) = needed(kernel_tree, keys)
        yield path, [k.removesuffix(".weight") for k in rule.keys], rule.stacked


def _public(tree: Params, keys: Sequence[Rule]):
    """(checkpoint module name, "A" or "B", matrix) of every layer of every adapted module."""
    by_path = leaves_by_path(tree)
    for path, names, stacked in _modules(tree, keys):
        value = np.asarray(by_path[path], np.float32)
        for name, matrix in zip(names, value if stacked else value[None], strict=True):
            yield name, path[-1].upper(), matrix
