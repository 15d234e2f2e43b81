"""FP8, e4m3: a kernel and its inputs as 8-bit floats, each with one scale; the product is one cuBLASLt call on Hopper.

e4m3 has a relative precision of 2^-4 over a range of 2^14 (2^-6 to 448), so a scale only has to bring the numbers into
that range. One scale per kernel is as exact as one per column (spec/nvfp4.md section 4: .0375 against .0373). The scale
of an input can be fixed for a run (`unit`, a power of two: dividing by it is exact). Both are scalars, so the product's
epilogue applies them, together with bias and GELU (tests/test_compiled.py::test_forward_in_fp8). No pass over the input
is needed to find its maximum, and a sample does not depend on the others in its batch. Inputs above 448 units saturate.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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

    codes: Float8e4m3fn[Array, "*layers out in"]
    scale: Float[Array, "*layers"]
    unit: Static  # float: inputs are stored as x / unit

    def matmul(self, parts: Sequence[Float[Array, "*batch _"]], out: Any) -> Float[Array, "*batch out"]:
        """x W with result dtype `out`; x in parts along the contracted axis."""
        total, at = None, 0
        factor = self.unit.value * self.scale
        for x in parts:
            w = self.codes[:, at : at + x.shape[-1]]
            y = jax.lax.dot_general(
                encode(x, self.unit.value), w, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=out
            ) * factor.astype(out)
            total, at = y if total is None else total + y, at + x.shape[-1]
        assert total is not None
        return total

    def dequantise(self) -> Float[Array, "*layers in out"]:
        """The kernel that the codes represent, f32."""
        return jnp.swapaxes(self.codes.astype(jnp.float32), -1, -2) * self.scale[..., None, None]


def encode(x: Float[Array, "*d"], scale: Float[Array, ""] | float) -> Float8e4m3fn[Array, "*d"]:
    """x / scale, rounded to nearest, ties to even, saturating at 448: a bare cast would give NaN above 464."""
    return jnp.clip(x * (1 / scale), -MAX, MAX).astype(jnp.float8_e4m3fn)


def quantise(kernel: Float[Array, "*layers in out"], unit: float = 1.0) -> Fp8:
    """One scale per kernel (each layer of a stack is a kernel).

    Without `row_major`, XLA first transposes the whole stack of bf16 kernels; with it, only the codes
    (tests/test_compiled.py::test_quantising_turns_the_codes_alone).
    """
    if kernel.ndim > 2:
        return jax.lax.map(lambda k: quantise(k, unit), kernel)
    w = row_major(kernel).astype(jnp.float32)
    most = jnp.max(jnp.abs(w))
    scale = jnp.where(most > 0, most * jnp.float32(1 / MAX), 1.0)
    return Fp8(row_major(encode(w, scale)).T, scale, Static(unit))


def unit_of(largest: float) -> float:
    """The smallest power of two with which inputs up to MARGIN x `largest` fit; 1 if nothing was seen."""
    return 2.0 ** math.ceil(math.log2(MARGIN * largest / MAX)) if 0 < largest < math.inf else 1.0
