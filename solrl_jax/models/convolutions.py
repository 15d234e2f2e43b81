"""Convolutions of the networks and decoders, in the form that is fast on each kind of device.

SANA's network and DC-AE share the gated convolution; both decoders share the up-sampling one.
"""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from solrl_jax import device
from solrl_jax.device import row_major
from solrl_jax.models.layers import F32, Linear, plus, precision_of


def conv(width: int, size: tuple[int, int], *, dtype: Any, **how: Any) -> nn.Conv:
    """flax's convolution in `dtype`, with the precision of `precision_of`."""
    return nn.Conv(width, size, dtype=dtype, precision=precision_of(dtype), **how)


class UpConv(nn.Module):
    """A 3x3 convolution of x with each pixel repeated as 2x2; parameters are nn.Conv's.

    On GPUs it is one 2x2 convolution of x with four times the channels and a pixel shuffle: 16/36 of the FLOPs
    (tests/test_decoders_compiled.py::test_up_sampling). Elsewhere it is done in two steps: on CPUs the other form takes
    .96 of the time for the small world's decoder, but rounds differently, and a run's numbers would change.
    """

    features: int
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B 2*h 2*w out"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], self.features), F32)
        bias = jnp.asarray(self.param("bias", nn.initializers.zeros, (self.features,), F32))
        convolve = _phases if device.platform() == "gpu" else _repeated
        return convolve(x.astype(self.dtype), jnp.asarray(kernel), bias)


def _repeated(x: Array, kernel: Array, bias: Array) -> Array:
    """In two steps."""
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return plus(_convolved(x, kernel.astype(x.dtype), "SAME"), bias)


def _phases(x: Array, kernel: Array, bias: Array) -> Array:
    """The same for each of the four pixels that x's become: 3x3 taps read only 2x2 of x.

    The second row of pixels i has the weights (W0 + W1, W2) on x's rows (i, i + 1), the first one of pixels i + 1 has
    (W0, W1 + W2) on the same; columns likewise. So what one position of the convolution gives, in the order of their
    rows and columns, are four neighbours, and a plain pixel shuffle makes the picture with a border of one to cut off.
    """
    (b, h, w, _), width = x.shape, kernel.shape[-1]
    y = _convolved(x, phase_kernel(kernel).astype(x.dtype), ((1, 1), (1, 1)))
    y = plus(y, jnp.tile(bias, 4)).reshape(b, h + 1, w + 1, 2, 2 * width)
    return jnp.swapaxes(y, 2, 3).reshape(b, 2 * h + 2, 2 * w + 2, width)[:, 1:-1, 1:-1]


def phase_kernel(kernel: Float[Array, "3 3 C out"]) -> Float[Array, "2 2 C 4*out"]:
    """Summed in f32; the output's channels are (dy, dx, out)."""

    def taps(k: Array) -> Array:
        """[3, ...] -> [tap, pixel, ...]"""
        return jnp.stack([jnp.stack([k[0] + k[1], k[0]]), jnp.stack([k[2], k[1] + k[2]])])

    k = taps(jnp.moveaxis(taps(kernel.astype(F32)), 2, 0))  # [column's tap, pixel, row's tap, pixel, C, out]
    return k.transpose(2, 0, 4, 3, 1, 5).reshape(2, 2, kernel.shape[2], -1)


def _convolved(x: Array, kernel: Array, padding: Any) -> Array:
    how: dict[str, Any] = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": precision_of(x.dtype)}
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, **how)


class DepthwiseConv(nn.Module):
    """A k x k convolution of each channel separately, padded to the same size; returns `dtype`, summed in f32.

    On GPUs it is cuDNN's grouped convolution: shifted products would become one elementwise kernel, which computes its
    input again for every tap (tests/test_sana_compiled.py::test_depthwise_convolutions_of_the_decoder). Elsewhere it is
    k^2 shifted products in one elementwise kernel: convolutions with this many groups are slow on CPUs. XLA would write
    their sum in f32, channel by channel; `row_major` prevents this (test_depthwise_convolutions_as_shifted_products).
    """

    size: int
    use_bias: bool = True
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        channels = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.size, self.size, 1, channels), F32)
        convolve = _grouped if device.platform() == "gpu" else _shifted
        y = convolve(x.astype(self.dtype), jnp.asarray(kernel).astype(self.dtype))
        if self.use_bias:
            y = plus(y, jnp.asarray(self.param("bias", nn.initializers.zeros, (channels,), F32)))
        return row_major(y.astype(self.dtype))


def _grouped(x: Float[Array, "B h w C"], kernel: Float[Array, "k k 1 C"]) -> Float[Array, "B h w C"]:
    how: dict[str, Any] = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": precision_of(x.dtype)}
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", feature_group_count=x.shape[-1], **how)


def _shifted(x: Float[Array, "B h w C"], kernel: Float[Array, "k k 1 C"]) -> Float[Array, "B h w C"]:
    """The same convolution in f32, tap by tap."""
    (_, height, width, _), k = x.shape, kernel.shape[0]
    padded = jnp.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    y = jnp.zeros(x.shape, F32)
    for i, j in itertools.product(range(k), range(k)):
        y = y + padded[:, i : i + height, j : j + width].astype(F32) * kernel[i, j][None, None].astype(F32)
    return y


class GatedConv(nn.Module):
    """GLUMBConv: 1x1 to 2 * `hidden` channels, SiLU, depthwise 3x3, value * SiLU(gate), 1x1 back to x's channels.

    The first half of the channels is the value, the second the gate.
    """

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        wide = Linear(2 * self.hidden, dtype=self.dtype, bias_after=True, name="inverted_conv.linear")
        y = checkpoint_name(wide(x), "mlp")
        y = jax.nn.silu(y)
        value, gate = jnp.split(DepthwiseConv(3, dtype=self.dtype, name="depth_conv.conv")(y), 2, axis=-1)
        y = value * jax.nn.silu(gate)
        return Linear(x.shape[-1], use_bias=False, dtype=self.dtype, name="point_conv.linear")(y)
