"""In which dtype bfloat16 numbers are multiplied.

On CPUs without matrix units for bfloat16, XLA's products of bfloat16 take twice as long as float32's. There both
operands become float32, which holds every product of two bfloat16 numbers exactly: only the sums' order changes. With
such units (AMX) the bfloat16 products are two to three times as fast as float32's, and are kept.

The processor is asked what it has, and is not timed: what else runs on the machine could turn a timing from one start
to the next, and a run that is resumed must find the same program. A program is traced for one of the two, so that the
compilation cache keeps them apart.
"""

import functools
from pathlib import Path

import jax.numpy as jnp
from jaxtyping import Array

from solrl_jax import sharding


@functools.cache
def has_amx(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether the CPU has matrix units for bfloat16, by the flag that Linux shows; other systems show none."""
    file = Path(cpuinfo)
    return file.exists() and "amx_bf16" in file.read_text(encoding="utf-8").split()


def wide() -> bool:
    """Whether bfloat16 numbers are multiplied as float32 ones, on the devices at hand."""
    return sharding.platform() == "cpu" and not has_amx()


def operands(*arrays: Array) -> tuple[Array, ...]:
    """The same numbers, in the dtype in which they are multiplied fastest."""
    if not wide():
        return arrays
    return tuple(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arrays)


def notes() -> list[str]:
    """What a run's first lines say of it: on CPUs which of the two was chosen, and why."""
    if sharding.platform() != "cpu":
        return []
    if wide():
        return ["bfloat16 products as float32 ones, summed in float32: this CPU has no matrix units for them (AMX)"]
    return ["bfloat16 products in this CPU's matrix units (AMX), summed in float32"]
