"""What XLA is told by kind of device, and what is computed otherwise on one kind than on another.

`setup` is for programs: the command line, the tests and every experiment call it before their first array. Importing
solrl_jax changes neither an environment variable nor a setting of JAX.

bfloat16 on CPUs: without matrix units for it, XLA's products of bfloat16 take twice as long as float32's. There both
operands become float32, which holds every product of two bfloat16 numbers exactly: only the order of the sums changes.
With such units (AMX) the bfloat16 products are two to three times as fast as float32's, and are kept. The processor is
asked what it has, and is not timed: what else runs on the machine could change a timing from one start to the next, and
a resumed run must find the same program. A program is traced for one of the two, so the compilation cache keeps them
apart.
"""

import functools
import glob
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array

_ACCELERATORS = ("nvidia[0-9]*", "dxg", "kfd", "accel[0-9]*", "vfio/[0-9]*")  # CUDA, CUDA under WSL, ROCm, TPUs

XLA_GPU = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 32}
"""What XLA is told about GPUs; every version from requirements.txt's on knows both. On FLUX's products cuBLASLt, with
biases in its epilogue, is faster than the Triton kernels that XLA would search for minutes. And from JAX 0.12 on XLA
merges products of one input up to its default of 64 MB at the price of their epilogues: a batch of 8 in FP8 loses a
GELU (tests/test_compiled.py::test_forward_in_fp8)."""
MEMORY = "0.92"
"""Share of a GPU's memory that JAX reserves. Its own default, 75 %, is too little for 12B parameters on 80 GB."""


# --- settings -------------------------------------------------------------------------------------------------------


def setup() -> None:
    """Set XLA's flags and JAX's share of a GPU's memory; call it before the first array. What the user has set stays.

    Where there is no accelerator JAX is told so: jax[cuda12] prints a stack trace on a machine without a GPU.
    """
    if "JAX_PLATFORMS" not in os.environ and not any(glob.glob(f"/dev/{node}") for node in _ACCELERATORS):
        os.environ["JAX_PLATFORMS"] = "cpu"  # for processes that this one starts
        jax.config.update("jax_platforms", "cpu")
    if glob.glob("/dev/nvidia[0-9]*"):
        os.environ["XLA_FLAGS"] = with_gpu_flags(os.environ.get("XLA_FLAGS", ""))
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY)
    # Only its tokenizers are used here: transformers need not warn that PyTorch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def with_gpu_flags(flags: str) -> str:
    """XLA_FLAGS with those of XLA_GPU that it does not name."""
    return " ".join([flags, *_missing(flags)]).strip()


def _missing(flags: str) -> list[str]:
    return [f"--{name}={str(value).lower()}" for name, value in XLA_GPU.items() if name not in flags]


def absent() -> list[str]:
    """Settings of `setup` for GPUs that this process does not have, as they would be written into the environment."""
    found = [f"XLA_FLAGS={flag}" for flag in _missing(os.environ.get("XLA_FLAGS", ""))]
    fraction = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    return found if fraction in os.environ else [*found, f"{fraction}={MEMORY}"]


# --- inside programs ------------------------------------------------------------------------------------------------


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the ambient mesh's devices, which may be described only (to compile for a card that
    is not there); without a mesh JAX's default."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(described, "platform", None) or jax.default_backend()


def row_major(x: Array) -> Array:
    """`x` in row-major order, at this place of a program.

    XLA chooses the order of axes backwards from the order in which a result is wanted. Without this, quantising into
    [out, in] first transposes a whole stack of bf16 [in, out] kernels, and a depthwise convolution made of shifted
    products writes its sum in f32, channel by channel (tests/test_compiled.py::test_quantising_turns_the_codes_alone,
    tests/test_sana_compiled.py::test_depthwise_convolutions_as_shifted_products).
    """
    return with_layout_constraint(jnp.asarray(x), Layout(major_to_minor=tuple(range(x.ndim))))


@functools.cache
def has_amx(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether the CPU has matrix units for bfloat16, by the flag that Linux shows; other systems show none."""
    file = Path(cpuinfo)
    return file.exists() and "amx_bf16" in file.read_text(encoding="utf-8").split()


def wide() -> bool:
    """Whether bfloat16 numbers are multiplied as float32 ones, on the devices at hand."""
    return platform() == "cpu" and not has_amx()


def operands(*arrays: Array) -> tuple[Array, ...]:
    """The same numbers, in the dtype in which they are multiplied fastest."""
    if not wide():
        return arrays
    return tuple(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arrays)


def notes() -> list[str]:
    """What a run's first lines say of it: on CPUs which of the two was chosen, and why."""
    if platform() != "cpu":
        return []
    if wide():
        return ["bfloat16 products as float32 ones, summed in float32: this CPU has no matrix units for them (AMX)"]
    return ["bfloat16 products in this CPU's matrix units (AMX), summed in float32"]
