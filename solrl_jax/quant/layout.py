"""Where a quantised kernel is turned: [in, out] as the policy holds it, [out, in] as the tensor cores take it."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def as_it_lies(x: jax.Array) -> jax.Array:
    """`x` in row-major order, here, inside a program.

    Left to itself XLA turns a whole stack of bf16 kernels first, to work in the order of the result: as many bytes
    again as the kernels', there and back. With this only what is quantised is turned, a half or a quarter of it.
    """
    return with_layout_constraint(jnp.asarray(x), Layout(major_to_minor=tuple(range(x.ndim))))
