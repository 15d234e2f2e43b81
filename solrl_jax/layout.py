"""The order of axes in memory, where XLA's own choice costs passes over memory."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def as_it_lies(x: jax.Array) -> jax.Array:
    """`x` in row-major order, here, inside a program.

    XLA works backwards from the order in which a result is wanted: to quantise into [out, in] it would first turn a
    whole stack of bf16 [in, out] kernels, and write a depthwise convolution's taps in f32, channel by channel, before a
    product that has its channels in groups.
    """
    return with_layout_constraint(jnp.asarray(x), Layout(major_to_minor=tuple(range(x.ndim))))
