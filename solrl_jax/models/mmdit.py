"""What the blocks of FLUX, FLUX.2 and SD3.5 share: AdaLN modulation, gates, feed-forwards, embedders, and equal layers
as one scan.

Modules have the checkpoint's own names. The residual stream is in the network's dtype; LayerNorm and modulation f32.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from solrl_jax.models.layers import F32, Linear, gelu_tanh, keeping, normalise, sinusoid


class Modulation(nn.Module):
    """SiLU(cond) -> `chunks` vectors of the stream's width, each [B, 1, D] f32."""

    chunks: int
    dtype: Any
    use_bias: bool = True

    @nn.compact
    def __call__(self, cond: Float[Array, "B D"]) -> list[Float[Array, "B 1 D"]]:
        how = {"use_bias": self.use_bias, "dtype": self.dtype, "bias_after": True}
        y = Linear(self.chunks * cond.shape[-1], **how, name="linear")(jax.nn.silu(cond))
        return jnp.split(y.astype(F32)[:, None, :], self.chunks, axis=-1)


def modulate(x: Array, shift: Array, scale: Array, dtype: Any) -> Array:
    return (normalise(x, 1e-6) * (1 + scale) + shift).astype(dtype)


def gated(x: Array, gate: Array, y: Array) -> Array:
    """x + gate y, added in f32."""
    return (x.astype(F32) + gate * y.astype(F32)).astype(x.dtype)


def rows(x: Float[Array, "B S D"]) -> Float[Array, "BS D"]:
    """All samples' tokens as the rows of one matrix.

    With a batch axis, the products with the epilogue BIAS_GELU give bf16, and XLA casts to FP8 in a separate kernel. As
    rows, their results are f8e4m3fn (tests/test_compiled.py::test_forward_in_fp8). In bf16 this changes no product.
    """
    return x.reshape(-1, x.shape[-1])


class FeedForward(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        y = checkpoint_name(Linear(4 * x.shape[-1], dtype=self.dtype, name="net.0.proj")(rows(x)), "mlp")
        return Linear(x.shape[-1], dtype=self.dtype, bias_after=True, name="net.2")(gelu_tanh(y)).reshape(x.shape)


def heads_of(
    x: Float[Array, "B S D"], names: Sequence[str], heads: int, width: int, dtype: Any, use_bias: bool = True
) -> list[Float[Array, "B S H d"]]:
    """q, k and v: x through a Linear of each name (submodules of the calling module), as heads of `width` channels.

    q and k are normalised next, in a kernel that can add their bias; v goes straight into attention.
    """
    how = {"use_bias": use_bias, "dtype": dtype}
    found = [Linear(heads * width, bias_after=i < 2, name=name, **how)(x) for i, name in enumerate(names)]
    return [checkpoint_name(y.reshape((*x.shape[:2], heads, width)), "qkv") for y in found]


class Embedder(nn.Module):
    """linear_1, SiLU, linear_2."""

    width: int
    dtype: Any
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B in"]) -> Float[Array, "B D"]:
        y = Linear(self.width, self.use_bias, self.dtype, name="linear_1")(x)
        return Linear(self.width, self.use_bias, self.dtype, name="linear_2")(jax.nn.silu(y))


class Conditioning(nn.Module):
    """Time, pooled text and, if given, guidance -> one vector."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(
        self, sigma: Float[Array, "B"], pooled: Float[Array, "B Dp"], guidance: Float[Array, "B"] | None = None
    ) -> Float[Array, "B D"]:
        cond = Embedder(self.width, self.dtype, name="timestep_embedder")(sinusoid(1000 * sigma))
        if guidance is not None:
            cond = cond + Embedder(self.width, self.dtype, name="guidance_embedder")(sinusoid(1000 * guidance))
        return cond + Embedder(self.width, self.dtype, name="text_embedder")(pooled)


STACKED: Mapping[Any, Any] = {"params": 0, "lora": 0, "quant": 0, "largest": 0}
"""The collections of a stack, whose leading axis is the layers."""


def stack(
    block: type[nn.Module], layers: int, inputs: int, *, own: int = 0, remat: bool, keeps: Sequence[str] = ()
) -> Callable[..., nn.Module]:
    """`layers` equal blocks as one scan, so that compile time does not grow with depth; takes `block`'s arguments.

    block(carry, *inputs) -> (carry, None). The first `inputs` inputs are the same for all blocks. The next `own` inputs
    have an axis of layers after the batch axis, and each block gets its slice. `remat` recomputes a block in the
    backward pass, except what `keeps` names (tests/test_compiled.py::test_gradient).
    """
    return nn.scan(
        nn.remat(block, prevent_cse=False, policy=keeping(keeps)) if remat else block,
        variable_axes=STACKED,
        split_rngs={"params": True},
        in_axes=cast(
            Any, (nn.broadcast,) * inputs + (1,) * own
        ),  # flax does not annotate it: pyright infers int from the default
        length=layers,
    )
