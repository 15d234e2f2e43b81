"""LoRA sets: y = W x + (alpha / R) B A x, in f32, on a frozen base.

A set mirrors the base's tree: where an adapted Linear has `kernel` [in, out], the set has `a` [in, R] and `b` [R, out],
each with the stack's leading axis of layers. Sets are made from the base's shapes, so every leaf belongs to a Linear.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from solrl_jax import sharding
from solrl_jax.config import ConfigError, Lora
from solrl_jax.structs import Params, Variables, leaves_by_path
from solrl_jax.weights import WeightsError


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
    """A ~ N(0, (1/R)^2), B = 0, so the policy starts as the base (peft's init_lora_weights="gaussian")."""
    modules = adapted(base, targets)
    tree: dict[str, Any] = {}
    for k, (path, shape) in zip(jax.random.split(key, len(modules)), modules.items(), strict=True):
        *layers, inside, outside = shape
        a = jax.random.normal(k, (*layers, inside, cfg.rank)) / cfg.rank
        put(tree, path, {"a": a, "b": jnp.zeros((*layers, cfg.rank, outside))})
    return tree


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


def scaled(lora: Params, cfg: Lora) -> Params:
    """The set as the network reads it: alpha / R folded into B."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x * (cfg.alpha / cfg.rank) if path[-1].key == "b" else x, lora
    )


def rank(lora: Params) -> int:
    """The largest rank of the set's modules."""
    return max(x.shape[-2] for path, x in leaves_by_path(lora).items() if path.endswith("/b"))


def check(base: Params, lora: Params) -> None:
    """WeightsError for an adapter leaf that belongs to no Linear of the base: flax would silently ignore it."""
    paths = leaves_by_path(base)
    for path in leaves_by_path(lora):
        module, _, part = path.rpartition("/")
        if part not in ("a", "b") or f"{module}/kernel" not in paths:
            raise WeightsError(f"adapter leaf {path!r} belongs to no Linear here: make adapters with lora.init")


def policy(base: Params, lora: Params, cfg: Lora) -> Variables:
    """base + adapter, unmerged: what is trained."""
    check(base, lora)
    return {"params": base, "lora": scaled(lora, cfg)}


def merged_kernels(base: Params, lora: Params, cfg: Lora) -> dict[str, jax.Array]:
    """{kernel path: W + (alpha / R) A B in W's dtype}: only adapted kernels, as a second whole tree would not fit.

    A B is always float32, never TF32 (tests/test_precision.py). At this small rank it is cheap: 0.1 TFLOP for FLUX.
    """
    check(base, lora)
    kernels, factors = leaves_by_path(base), leaves_by_path(scaled(lora, cfg))
    paths = [p.removesuffix("/a") for p in factors if p.endswith("/a")]

    def merged(path: str) -> jax.Array:
        w = kernels[f"{path}/kernel"]
        return _merged(w, factors[f"{path}/a"], factors[f"{path}/b"], sharding.spec(f"{path}/kernel", w.ndim))

    return {f"{path}/kernel": merged(path) for path in paths}


WIDE = 2**31
"""Bytes of a stack's A B in f32 above which it is merged a layer at a time: that of FLUX.2-klein's widest is 6.8 GB
(tests/test_flux2_compiled.py::test_merging)."""


def _merged(w: Any, a: Any, b: Any, where: P) -> jax.Array:
    """W + A B. Where W is a part, only A's rows or B's columns of that part are multiplied."""

    def add(w: Any, a: Any, b: Any) -> jax.Array:
        if w.ndim == 3 and w.size * 4 > WIDE:
            return jax.lax.map(lambda layer: add(*layer), (w, a, b))
        return (w.astype(jnp.float32) + jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)).astype(w.dtype)

    if w.ndim != 3:
        return add(w, a, b)
    specs = (where, where, sharding.WHOLE) if where == sharding.BY_INPUT else (where, sharding.WHOLE, where)
    return sharding.over_parts(add, specs, where)(w, a, b)


def joined(sets: Sequence[Params]) -> Params:
    """One set that adds what all `sets`, already `scaled`, add: A = [A1 | A2 | ..], B = [B1; B2; ..]. Ranks add where
    several adapt a module. On the host."""
    by_path = [leaves_by_path(x) for x in sets]
    out: dict[str, Any] = {}
    for path in dict.fromkeys(path for leaves in by_path for path in leaves):
        factors = [np.asarray(leaves[path]) for leaves in by_path if path in leaves]
        put(out, path, np.concatenate(factors, axis=-1 if path.endswith("/a") else -2))
    return out


def folded(base: Params, lora: Params, mesh: Mesh) -> Params:
    """The base with W + A B, summed in f32 and rounded once, in place of each adapted kernel W; `lora` is `scaled`.

    For good, not for a rollout: the memory of W is used again (W is donated), a stack takes the room of one layer more,
    and each kernel keeps its sharding on `mesh`.
    """
    check(base, lora)
    kernels, factors = leaves_by_path(base), leaves_by_path(lora)
    done = {}
    with jax.set_mesh(mesh):
        for path in (p.removesuffix("/a") for p in factors if p.endswith("/a")):
            w = kernels[f"{path}/kernel"]
            a, b = sharding.replicate((factors[f"{path}/a"], factors[f"{path}/b"]), mesh)
            fold = jax.jit(_layers, static_argnames="where", donate_argnums=0, out_shardings=w.sharding)
            done[f"{path}/kernel"] = fold(w, a, b, where=sharding.spec(f"{path}/kernel", w.ndim))
    return graft(base, done)


def _layers(w: jax.Array, a: jax.Array, b: jax.Array, *, where: P) -> jax.Array:
    """`_merged`, in place and a layer of a stack at a time: A B of a whole stack of FLUX takes 7 GB."""
    if w.ndim != 3:
        return _merged(w, a, b, where)

    def one(i: jax.Array, w: jax.Array) -> jax.Array:
        its, down, up = (jax.lax.dynamic_slice_in_dim(x, i, 1) for x in (w, a, b))
        return jax.lax.dynamic_update_slice_in_dim(w, _merged(its, down, up, where), i, 0)

    return jax.lax.fori_loop(0, w.shape[0], one, w)


def graft(base: Params, kernels: Mapping[str, jax.Array]) -> Params:
    """The base with some kernels replaced; every other leaf is shared, nothing is copied."""

    def walk(tree: Mapping[str, Any], at: str) -> dict[str, Any]:
        return {
            name: walk(node, f"{at}{name}/") if isinstance(node, Mapping) else kernels.get(f"{at}{name}", node)
            for name, node in tree.items()
        }

    return walk(base, "")
