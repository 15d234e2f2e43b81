"""RoPE over several axes of positions, and with it the RMSNorm of q and k: what FLUX.1, FLUX.2 and Z-Image share."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from solrl_jax import device
from solrl_jax.models.layers import F32

Rope = tuple[Array, Array]
"""cos and signed sin, f32 [S, d] (rotations)."""


def rotations(ids: np.ndarray, dims: Sequence[int], theta: float) -> tuple[np.ndarray, np.ndarray]:
    """The table of positions `ids` [S, axes]: each axis turns its `dims` of the channels, by powers of `theta`."""
    ids = ids.astype(np.float64)
    angles = [ids[:, i, None] * theta ** (-np.arange(0, d, 2) / d)[None, :] for i, d in enumerate(dims)]
    return signed(np.repeat(np.concatenate(angles, axis=-1), 2, axis=-1))


def signed(angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and signed sin of `angle` [..., d], f32; channels 2k and 2k + 1 have one angle: cos twice, -sin and sin."""
    sign = np.where(np.arange(angle.shape[-1]) % 2, 1.0, -1.0)
    return np.cos(angle).astype(np.float32), (sign * np.sin(angle)).astype(np.float32)


def rotary_norm(
    x: Float[Array, "B S H d"], scale: Float[Array, "1 S 1 d"], rope: Rope, eps: float = 1e-6
) -> Float[Array, "B S H d"]:
    """RoPE of RMSNorm(x), in x's dtype; on GPUs in one kernel that reads x once."""
    return (_in_one_pass if device.platform() == "gpu" else _in_two_passes)(x, scale, rope, eps)


def _in_two_passes(x: Array, scale: Array, rope: Rope, eps: float) -> Array:
    """On GPUs one kernel for rms(x) and one for the rest.

    A rotation does not change rms(x), so the division by it can come last. If it came first, XLA would write the
    normalised x in f32 and read it again. The two channels of each pair are swapped in place: if x were split into even
    and odd channels, the kernels would read every second element.
    """
    y, (cos, sin) = x.astype(F32), (table[None, :, None, :] for table in rope)
    norm = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    y = y * scale
    swapped = jnp.flip(y.reshape((*y.shape[:-1], -1, 2)), axis=-1).reshape(y.shape)
    return ((y * cos + swapped * sin) * norm).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _in_one_pass(x: Array, scale: Array, rope: Rope, eps: float) -> Array:
    """The same as products and sums over the last axis alone, which XLA computes in one kernel: the other channel of a
    pair is the pair's sum less this one, in f32. A reversed axis, or the division last, would divide it in two
    (tests/test_compiled.py::test_rotary_norm).
    """
    y = x.astype(F32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps) * scale
    pairs = y.reshape((*x.shape[:-1], -1, 2))
    cos, sin = (table.reshape((1, x.shape[1], 1, -1, 2)) for table in rope)
    other = jnp.sum(pairs, axis=-1, keepdims=True) - pairs
    return (pairs * cos + other * sin).reshape(x.shape).astype(x.dtype)


def _back(eps: float, given: tuple[Array, Array, Rope], out: Array):
    """The other form's gradient, which has fewer passes than this one's own (test_gradient_of_rotary_norm)."""
    x, scale, rope = given
    x = jax.lax.optimization_barrier(x)  # else rms(x), shared with a recomputed forward pass, would divide that in two
    return *jax.vjp(lambda x, scale: _in_two_passes(x, scale, rope, eps), x, scale)[1](out), None


_in_one_pass.defvjp(lambda x, scale, rope, eps: (_in_one_pass(x, scale, rope, eps), (x, scale, rope)), _back)


class Scale(nn.Module):
    """A norm's scale for each position, f32 [1, S, 1, d]."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self) -> Float[Array, "1 S 1 d"]:
        scale = self.param("scale", nn.initializers.ones, self.shape[1:], F32)
        return jnp.broadcast_to(scale.astype(F32), self.shape)[None, :, None]
