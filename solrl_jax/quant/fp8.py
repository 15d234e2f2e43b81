"""FP8, e4m3: a kernel and its inputs as 8-bit floats, each with one scale; the product is one cuBLASLt call on Hopper.

e4m3 has a relative precision of 2^-4 over a range of 2^14 (2^-6 to 448), so a scale only has to bring the numbers into
that range. One scale per kernel is as exact as one per column (tests/test_fp8.py::test_error_of_a_product), and a
power of two as exact as max|W| / 448, which cast to bf16 would err by up to .4 % of a product. The scale of an input
can be fixed for a run (`unit`, a power of two too: dividing by it is exact). Both are scalars that the product itself
applies, together with bias and GELU (tests/test_compiled.py::test_forward_in_fp8). No pass over the input is needed to
find its maximum, and a sample does not depend on the others in its batch. Inputs above 448 units saturate.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float8e4m3fn

from solrl_jax.device import row_major
from solrl_jax.structs import Static

MAX = 448.0
MARGIN = 2.0
"""How far the range ends above the largest input that calibration saw."""


class Fp8(NamedTuple):
    """A kernel of a Linear, the contracted axis ("in") last: the layout that Hopper's tensor cores read.

    In the other order XLA transposes the codes before every product (tests/test_compiled.py::test_forward_in_fp8).
    """

    codes: tuple[Float8e4m3fn[Array, "*layers out _"], ...]  # in parts along the contracted axis
    scale: Float[Array, "*layers"]  # a power of two
    unit: Static  # float: inputs are stored as x / unit

    def matmul(self, parts: Sequence[Float[Array, "*batch _"]], out: Any) -> Float[Array, "*batch out"]:
        """x W with result dtype `out`; x in parts along the contracted axis.

        Unless the codes lie in the same parts, XLA copies each part's slice of them before its product.
        """
        total, at = None, 0
        factor = (self.unit.value * self.scale).astype(out)
        for i, x in enumerate(parts):
            w = self.codes[i] if len(self.codes) == len(parts) else self.whole()[:, at : at + x.shape[-1]]
            # The factor is on an operand, not on the result: XLA hands either to the 8-bit product, but results that
            # are scaled are added by a pass of their own. It is on the input, not on the kernel: XLA merges small
            # products of one input, and merged kernels of several scales are no longer 8-bit
            # (tests/test_compiled.py::test_forward_in_fp8). In `out` the factor is exact: it is a power of two.
            y = jax.lax.dot_general(
                encode(x, self.unit.value).astype(out) * factor,
                w.astype(out),
                (((x.ndim - 1,), (1,)), ((), ())),
                preferred_element_type=out,
            )
            total, at = y if total is None else total + y, at + x.shape[-1]
        assert total is not None
        return total

    @property
    def shape(self) -> tuple[int, int]:
        """[in, out] of a layer."""
        return sum(part.shape[-1] for part in self.codes), self.codes[0].shape[-2]

    def whole(self) -> Float8e4m3fn[Array, "*layers out in"]:
        """The codes as one array."""
        return self.codes[0] if len(self.codes) == 1 else jnp.concatenate(self.codes, axis=-1)

    def dequantise(self) -> Float[Array, "*layers in out"]:
        """The kernel that the codes represent, f32."""
        return jnp.swapaxes(self.whole().astype(jnp.float32), -1, -2) * self.scale[..., None, None]


def encode(x: Float[Array, "*d"], scale: Float[Array, ""] | float) -> Float8e4m3fn[Array, "*d"]:
    """x / scale, rounded to nearest, ties to even, saturating at 448: a bare cast would give NaN above 464."""
    return jnp.clip(x * (1 / scale), -MAX, MAX).astype(jnp.float8_e4m3fn)


def quantise(
    kernel: Float[Array, "*layers in out"],
    unit: float = 1.0,
    parts: Sequence[int] = (),
    largest: Float[Array, ""] | None = None,
) -> Fp8:
    """One scale per kernel (each layer of a stack is a kernel): the least power of two with which it fits.

    `largest`: max|W| of the kernel of which this one [in, out] is a device's part; by default, of `kernel` itself.

    `parts`: the sizes in which the contracted axis comes to the product; empty for one. ValueError if they are not it.

    Without `row_major`, XLA first transposes the whole stack of bf16 kernels; with it, only the codes
    (tests/test_compiled.py::test_quantising_turns_the_codes_alone).
    """
    if kernel.ndim > 2:
        assert largest is None  # of one kernel
        return jax.lax.map(lambda k: quantise(k, unit, parts), kernel)
    if sum(parts or kernel.shape[:1]) != kernel.shape[0]:
        raise ValueError(f"parts {tuple(parts)} of a kernel with {kernel.shape[0]} inputs: they have to add up to it")
    w = row_major(kernel).astype(jnp.float32)
    scale = power_of_two((jnp.max(jnp.abs(w)) if largest is None else largest) * jnp.float32(1 / MAX))
    rows = jnp.split(w, np.cumsum(parts)[:-1]) if parts else [w]
    return Fp8(tuple(row_major(encode(part, scale)).T for part in rows), scale, Static(unit))


def power_of_two(x: Float[Array, ""]) -> Float[Array, ""]:
    """The least power of two that is not below x, f32; 1 for 0, and x itself if it is not finite. Exact: logarithms are
    not."""
    fraction, exponent = jnp.frexp(x)  # x = fraction 2^exponent, fraction in [.5, 1)
    found = jnp.where(x > 0, jnp.ldexp(jnp.float32(1), exponent - (fraction == 0.5)), 1.0)
    return jnp.where(jnp.isfinite(x), found, x)


def unit_of(largest: float) -> float:
    """The smallest power of two with which inputs up to MARGIN x `largest` fit; 1 if nothing was seen."""
    return 2.0 ** math.ceil(math.log2(MARGIN * largest / MAX)) if 0 < largest < math.inf else 1.0
