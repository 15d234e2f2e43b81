"""Low-precision products: quantised kernels, the trees they sit in, and the one matmul that knows them.

Precisions, one static choice per run: bf16 (nothing is quantised), nvfp4_emulated (NVFP4 products computed exactly
in bf16 on any device: the same products as native NVFP4, only the order of summation differs).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, UInt8

from solrl_jax.quant import nvfp4
from solrl_jax.structs import Params, QuantRule
from solrl_jax.weights import leaves_by_path


class QTensor(NamedTuple):
    """An NVFP4 kernel of a Linear, the contracted axis ("in") last: 4.5 bits an element. Stacked layers lead."""

    codes: UInt8[Array, "*layers out half_in"]
    scales: Float8e4m3fn[Array, "*layers out blocks"]
    g: Float[Array, "*layers"]


def quantise(kernel: Float[Array, "*layers in out"]) -> QTensor:
    """One global scale a kernel (a layer of a stack is a kernel of its own)."""
    if kernel.ndim > 2:  # one layer at a time: a whole stack in f32 would not fit at FLUX's size
        return jax.lax.map(quantise, kernel)
    w = kernel.T.astype(jnp.float32)
    values, scale, g = nvfp4.encode(w, jnp.max(jnp.abs(w), keepdims=True))
    codes = nvfp4.pack(nvfp4.code_of(values).reshape(w.shape))
    return QTensor(codes, scale[..., 0].astype(jnp.float8_e4m3fn), g[0, 0])


def dequantise(q: QTensor, dtype=jnp.float32) -> Float[Array, "*layers in out"]:
    """The kernel that `q` stands for, g included."""
    return (jnp.swapaxes(_scaled(q), -1, -2) * q.g[..., None, None]).astype(dtype)


def _scaled(q: QTensor) -> Float[Array, "*layers out in"]:
    """Code values times block scales: exact in bf16."""
    values = nvfp4.value_of(nvfp4.unpack(q.codes))
    blocks = values.reshape((*q.scales.shape, nvfp4.BLOCK)) * q.scales.astype(jnp.float32)[..., None]
    return blocks.reshape(values.shape)


def matmul(x: Float[Array, "*batch in"], q: QTensor) -> Float[Array, "*batch out"]:
    """x W with both operands in NVFP4, f32: exact products in bf16, f32 sums, then g_x (a row's) times g_w."""
    a, g = nvfp4.fake_quantise(x)
    w = _scaled(q).astype(jnp.bfloat16)
    y = jax.lax.dot_general(
        a.astype(jnp.bfloat16), w, (((a.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return y * (g * q.g)


def chosen(params: Params, rule: QuantRule) -> dict[str, tuple[int, ...]]:
    """{"a/b/kernel": shape} of the Linears that the rule quantises."""
    kernels = {p: tuple(x.shape) for p, x in leaves_by_path(params).items() if p.endswith("/kernel")}
    return {
        p: s
        for p, s in kernels.items()
        if len(s) in (2, 3)
        and max(s[-2:]) > rule.min_dim
        and not any(skip in p.replace("/", ".") for skip in rule.skip)
    }


def quantise_tree(params: Params, rule: QuantRule) -> dict[str, Any]:
    """The `quant` collection of the explorer: a QTensor where the rule takes a kernel, nothing elsewhere."""
    paths = chosen(params, rule)

    def walk(tree: Mapping[str, Any], at: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, node in tree.items():
            path = f"{at}/{name}" if at else name
            if isinstance(node, Mapping):
                if inner := walk(node, path):
                    out[name] = inner
            elif path in paths:
                out[name] = quantise(node)
        return out

    return walk(params, "")
