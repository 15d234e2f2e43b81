"""Other ways to multiply float32 in the rewards' networks, for experiments.rewards.speed only: what `float32` is not.

`compiler`: XLA's own three bf16 products (DotAlgorithmPreset.BF16_BF16_F32_X3). Compiled for an H100 with Triton's
products off, it writes each float32 result three times, with a pass over it between (NaNs), and the bias apart.
`scores`: like float32, and attention's scores are products of pairs too. Its other product, softmax times v, would
have to write softmax's [B, H, S, S] result three times as bf16 and pad it, which takes longer than the exact product.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from solrl_jax.models import layers

F32 = jnp.float32


def by_the_compiler(x: Float[Array, "*batch d"], w: Float[Array, "d out"]) -> Float[Array, "*batch out"]:
    return jnp.dot(x, w, precision=jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3, preferred_element_type=F32)


def with_scores_in_pairs(q: Array, k: Array, v: Array, bias: Array | None = None) -> Array:
    """layers.attention of a tower in float32."""
    if bias is not None:  # a text tower, which is exact
        return layers.attention(q, k, v, bias=bias)
    (qh, ql), (kh, kl) = layers.halves(q), layers.halves(k)
    q3, k3 = jnp.concatenate([qh, ql, qh], -1), jnp.concatenate([kh, kh, kl], -1)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q3, k3, preferred_element_type=F32) * q.shape[-1] ** -0.5
    exact: dict[str, Any] = {"precision": jax.lax.Precision.HIGHEST}
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v, **exact)


SWAPPED = {
    "compiler": {"solrl_jax.models.layers.pair_product": by_the_compiler},
    "scores": {"solrl_jax.models.text.attention": with_scores_in_pairs},
}


@contextlib.contextmanager
def reward_dtype(kind: str) -> Iterator[str]:
    """The reward_dtype behind a kind of product; while this is open, programs are traced with that kind."""
    with contextlib.ExitStack() as stack:
        for name, function in SWAPPED.get(kind, {}).items():
            stack.enter_context(mock.patch(name, function))
        yield "float32" if kind in SWAPPED else kind
