"""NVFP4: x ~ value(code) * block scale * g.

A code is e2m1 (sign, 2 exponent bits, 1 mantissa bit): magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6. Sixteen consecutive
elements of the contracted axis share one e4m3 scale; a tensor (weights) or a row (activations) shares one f32
g = max|x| / 2688, where 2688 = 6 * 448. That is 4.5 bits per element. A byte holds two codes, the even index in the low
nibble.

The order of operations is that of NVIDIA's Transformer Engine (quantize_transpose_nvfp4.cuh), bit for bit on a CPU. A
policy's kernels then get the block scales of least squared error beside NVIDIA's (SWEEP; experiments/precision); inputs
keep NVIDIA's.

Rounding is f32 arithmetic, never a cast to the narrow type and back: XLA removes such a pair of casts on GPUs, and the
network silently runs unquantised (tests/test_compiled.py: test_e4m3_rounding_is_in_the_program and
test_e2m1_rounding_is_in_the_program). Casting an already rounded value is exact, so storing it is safe.

`Nvfp4.matmul` multiplies NVFP4 kernels with NVFP4 inputs. The emulation is exact: e2m1 x e4m3 has at most 6 significant
bits and bf16 has 8, so the products equal the native ones. The native form (not yet run on a Blackwell card) is XLA's
block-scaled dot, which becomes a cuDNN call from compute capability 10 on (tests/test_compiled.py::
test_forward_in_native_nvfp4).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float8e4m3fn, UInt8

from solrl_jax import device
from solrl_jax.device import operands, row_major
from solrl_jax.structs import Static

BLOCK = 16
E2M1_MAX, E4M3_MAX = 6.0, 448.0
FULL = E2M1_MAX * E4M3_MAX
E4M3_CODES = 127  # from 0, code 0, to 448, in order
FLT_MAX = 3.4028234663852886e38
SWEEP = (-2, -1, 1, 2, 3, 4, 5)
"""e4m3 codes from NVIDIA's block scale to those tried beside it: -26 % of a Gaussian kernel's squared error."""


def round_e2m1(x: Float[Array, "*d"]) -> Float[Array, "*d"]:
    """Nearest e2m1 value, ties to the even code, saturating at 6; f32 in and out."""
    x = jnp.clip(x, -E2M1_MAX, E2M1_MAX)
    a = jnp.abs(x)
    return jnp.where(a < 2, jnp.round(2 * x) * 0.5, jnp.where(a < 4, jnp.round(x), 2 * jnp.round(x * 0.5)))


def round_e4m3(x: Float[Array, "*d"]) -> Float[Array, "*d"]:
    """Nearest float8_e4m3fn value of x >= 0, saturating at 448; f32 in and out."""
    x = jnp.minimum(x, E4M3_MAX)
    subnormal = jnp.round(x * 512) * (1 / 512)
    return jnp.where(x < 2.0**-6, subnormal, lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3))


def code_of(value: Float[Array, "*d"]) -> UInt8[Array, "*d"]:
    """e2m1 value -> its code 0..15; bit 3 is the sign, -0 has code 8."""
    m = jnp.abs(value)
    code = jnp.where(m < 2, 2 * m, jnp.where(m < 4, m + 2, m * 0.5 + 4)).astype(jnp.uint8)
    return jnp.where(jnp.signbit(value), code + jnp.uint8(8), code)


def value_of(code: UInt8[Array, "*d"]) -> Float[Array, "*d"]:
    """Code 0..15 -> its e2m1 value, f32."""
    m = (code & 7).astype(jnp.float32)
    value = jnp.where(m < 4, m * 0.5, jnp.where(m < 6, m - 2, 2 * m - 8))
    return jnp.where((code & 8) > 0, -value, value)


def pack(code: UInt8[Array, "*d"], axis: int = -1) -> UInt8[Array, "*half"]:
    """Two codes per byte along `axis`, the even index in the low nibble."""
    even, odd = (lax.slice_in_dim(code, first, None, 2, axis) for first in (0, 1))
    return even | (odd << 4)


def unpack(packed: UInt8[Array, "*d half"]) -> UInt8[Array, "*d K"]:
    both = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return both.reshape((*packed.shape[:-1], 2 * packed.shape[-1]))


def encode(
    x: Float[Array, "*d K"], amax: Float[Array, "*g 1"]
) -> tuple[Float[Array, "*d blocks 16"], Float[Array, "*d blocks 1"], Float[Array, "*g 1"]]:
    """x -> (e2m1 values, e4m3 block scales, g), all f32, with x ~ values * scales * g.

    `amax` is max|x| over the tensor or over each row, shaped to broadcast against x.
    """
    _check(x.shape[-1])
    blocks = x.astype(jnp.float32).reshape((*x.shape[:-1], -1, BLOCK))
    amax = amax.astype(jnp.float32)
    return *_encode_blocks(blocks, amax[..., None], -1), amax * jnp.float32(1 / FULL)


def _check(contracted: int) -> None:
    if contracted % BLOCK:
        raise ValueError(f"the contracted axis has {contracted} elements: NVFP4 needs a multiple of {BLOCK}")


def _encode_blocks(blocks: Array, amax: Array, axis: int, sweep: Sequence[int] = ()) -> tuple[Array, Array]:
    """(e2m1 values, e4m3 scales) of blocks along `axis`; the scales keep that axis with length 1.

    With `sweep`, each block's scale is the one of least squared error among the e4m3 values so many codes above
    NVIDIA's; NVIDIA's where none errs less.
    """
    s_enc = jnp.where(amax > 0, jnp.minimum(FULL / amax, FLT_MAX), 1.0)
    s_dec = 1.0 / s_enc
    block_max = jnp.max(jnp.abs(blocks), axis=axis, keepdims=True)
    scale = round_e4m3(block_max * (s_enc * jnp.float32(1 / 6)))

    def values(scale: Array) -> Array:
        return round_e2m1(blocks * jnp.minimum(1.0 / (scale * s_dec), FLT_MAX))

    def errors(scale: Array) -> Array:  # in the unit of g: squares of small kernels would be 0
        return jnp.square(values(scale) * scale - blocks * s_enc)

    if sweep:  # all that is kept of a step are codes, a byte a block
        first = lax.bitcast_convert_type(scale.astype(jnp.float8_e4m3fn), jnp.uint8)

        def better(best: tuple[Array, Array], step: Array | int) -> tuple[tuple[Array, Array], None]:
            first, best_code = lax.optimization_barrier(best)  # one candidate at a time in memory
            tried = jnp.clip(first.astype(jnp.int32) + step, 0, E4M3_CODES - 1).astype(jnp.uint8)
            more = jnp.sum(errors(_e4m3_of(tried)) - errors(_e4m3_of(best_code)), axis=axis, keepdims=True)
            return (first, jnp.where(more < 0, tried, best_code)), None

        best = first, first
        if device.platform() == "cpu":  # which drops barriers, so a loop; on a GPU a loop would write the kernel in f32
            best, _ = lax.scan(better, best, jnp.array(sweep, jnp.int32))
        else:
            for step in sweep:
                best, _ = better(best, step)
        scale = _e4m3_of(best[1])
    return values(scale), scale


def _e4m3_of(code: Array) -> Array:
    return lax.bitcast_convert_type(code, jnp.float8_e4m3fn).astype(jnp.float32)


# --- kernels --------------------------------------------------------------------------------------------------------


class Nvfp4(NamedTuple):
    """A kernel of a Linear, the contracted axis ("in") last: 4.5 bits per element. Layers of a stack come first."""

    codes: UInt8[Array, "*layers out half_in"]
    scales: Float8e4m3fn[Array, "*layers out blocks"]
    g: Float[Array, "*layers"]
    native: Static  # bool

    @property
    def shape(self) -> tuple[int, int]:
        """[in, out] of a layer."""
        return 2 * self.codes.shape[-1], self.codes.shape[-2]

    def matmul(self, parts: Sequence[Float[Array, "*batch _"]], out: Any) -> Float[Array, "*batch out"]:
        """x W with result dtype `out`, both operands in NVFP4; x in parts along the contracted axis.

        The sum is multiplied by g_x (one per row) times g_w.
        """
        if not self.native.value:
            return unpacked(self).matmul(parts, out)
        y, g = _native(_whole(parts), self, out)
        return (y.astype(jnp.float32) * (g * self.g)).astype(out)

    def dequantise(self) -> Float[Array, "*layers in out"]:
        """The kernel that the codes represent, f32, g included."""
        return jnp.swapaxes(_scaled(self), -1, -2) * self.g[..., None, None]


def quantise(
    kernel: Float[Array, "*layers in out"],
    native: bool = False,
    sweep: Sequence[int] = (),
    largest: Float[Array, ""] | None = None,
) -> Nvfp4:
    """One global scale per kernel (each layer of a stack is a kernel); `sweep` as in `_encode_blocks`, () is NVIDIA's.

    `largest`: max|W| of the kernel of which this one [in, out] is a device's part; by default, of `kernel` itself.

    Without `row_major`, XLA first transposes the whole stack of bf16 kernels; with it, only the codes and scales
    (tests/test_compiled.py::test_quantising_turns_the_codes_alone).
    """
    if kernel.ndim > 2:  # one layer at a time: on CPUs, all at once would take twice the memory (tests/test_quant.py)
        assert largest is None  # of one kernel
        return lax.map(lambda k: quantise(k, native, sweep), kernel)
    _check(kernel.shape[0])
    w = row_major(kernel).astype(jnp.float32)
    amax, blocks = jnp.max(jnp.abs(w)) if largest is None else largest, w.reshape(-1, BLOCK, w.shape[1])
    values, scales = _encode_blocks(blocks, amax, 1, sweep)
    codes = pack(code_of(values), 1).reshape(-1, w.shape[1])
    scales = scales[:, 0].astype(jnp.float8_e4m3fn)
    return Nvfp4(row_major(codes).T, row_major(scales).T, amax * jnp.float32(1 / FULL), Static(native))


def _scaled(q: Nvfp4) -> Float[Array, "*layers out in"]:
    """Code values times block scales: exact in bf16."""
    values = value_of(unpack(q.codes))
    blocks = values.reshape((*q.scales.shape, BLOCK)) * q.scales.astype(jnp.float32)[..., None]
    return blocks.reshape(values.shape)


class Unpacked(NamedTuple):
    """An emulated kernel as the numbers that are multiplied, codes times block scales, in the dtype of the products."""

    values: Float[Array, "*layers out in"]
    g: Float[Array, "*layers"]

    @property
    def shape(self) -> tuple[int, int]:
        """[in, out] of a layer."""
        return self.values.shape[-1], self.values.shape[-2]

    def matmul(self, parts: Sequence[Float[Array, "*batch _"]], out: Any) -> Float[Array, "*batch out"]:
        """As Nvfp4's. The products are exact, in bf16 or, where bf16 is slow, in f32; the sums are f32."""
        a, g = fake_quantise(_whole(parts))
        a, contracted = a.astype(self.values.dtype), (((a.ndim - 1,), (1,)), ((), ()))
        y = lax.dot_general(a, self.values, contracted, preferred_element_type=out)
        return (y.astype(jnp.float32) * (g * self.g)).astype(out)


def unpacked(q: Nvfp4) -> Unpacked:
    (values,) = operands(_scaled(q).astype(jnp.bfloat16))
    return Unpacked(values, q.g)


def _whole(parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _native(x: Float[Array, "*batch in"], q: Nvfp4, out: Any) -> tuple[Array, Array]:
    """The block-scaled product. On other devices than GPUs, f32 products of the same operands.

    These need no precision: all operands are exact in bf16.
    """
    values, scales, g = encode(x, jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    a = values.reshape(-1, x.shape[-1]).astype(jnp.float4_e2m1fn)
    a_scales = scales.reshape(a.shape[0], -1).astype(jnp.float8_e4m3fn)
    w = lax.bitcast_convert_type(q.codes, jnp.float4_e2m1fn).reshape(q.codes.shape[0], -1)
    if device.platform() == "gpu":
        operands = (o[None] for o in (a, w, a_scales, q.scales))
        y = jax.nn.scaled_matmul(*operands, preferred_element_type=out)[0]
    else:
        y = _decoded(a, a_scales) @ _decoded(w, q.scales).T
    return y.reshape((*x.shape[:-1], -1)), g


def _decoded(codes: Array, scales: Array) -> Array:
    blocks = codes.astype(jnp.float32).reshape((*scales.shape, BLOCK))
    return (blocks * scales.astype(jnp.float32)[..., None]).reshape(codes.shape)


def fake_quantise(x: Float[Array, "*d K"]) -> tuple[Float[Array, "*d K"], Float[Array, "*d 1"]]:
    """Activations: (values * block scales, g), one g per row, so a sample never depends on the others in its batch.

    The products are exact in bf16: e2m1 has 2 significant bits, e4m3 has 4.
    """
    most = jnp.max(jnp.abs(x.astype(jnp.float32).reshape((*x.shape[:-1], -1, BLOCK))), axis=-1)  # as in encode
    values, scale, g = encode(x, jnp.max(most, axis=-1, keepdims=True))
    return (values * scale).reshape(x.shape), g
