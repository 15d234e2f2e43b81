"""In which dtype bfloat16 numbers are multiplied.

On CPUs without bfloat16 matrix units XLA's products of bfloat16 run at half the speed of float32's or less. There they
are done in float32, which holds every product of two bfloat16 numbers exactly: only the sums' order changes. The
choice is made by what the processor says of itself and not by a measurement, which other work on the machine could turn
from one start to the next: a run that is resumed must find the same program. Being read where a program is traced, it
is part of the program, and so of the compilation cache's keys.
"""

import functools
import platform
from pathlib import Path

import jax.numpy as jnp
from jaxtyping import Array

from solrl_jax import sharding


@functools.cache
def has_amx() -> bool:
    """Whether the CPU says that it has matrix units for bfloat16 (AMX); Linux alone is asked."""
    flags = Path("/proc/cpuinfo")
    return platform.system() == "Linux" and "amx_bf16" in flags.read_text(encoding="utf-8").split()


def wide() -> bool:
    """Whether bfloat16 numbers are multiplied as float32 ones here."""
    return sharding.platform() == "cpu" and not has_amx()


def operands(*arrays: Array) -> tuple[Array, ...]:
    """The same numbers in the dtype to multiply them in."""
    if not wide():
        return arrays
    return tuple(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arrays)
