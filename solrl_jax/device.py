"""XLA's settings for each kind of device, and the choices that depend on the kind of device.

`setup` is for programs: the command line, the tests and every experiment call it before their first array. Importing
solrl_jax changes neither an environment variable nor a setting of JAX.

bfloat16 on CPUs: without matrix units for it (AMX), XLA's products of bfloat16 take twice as long as those of float32.
So both operands become float32, in which every product of two bfloat16 numbers is exact: only the order of the sums
changes. With AMX, bfloat16 products are two to three times as fast as float32's, and are kept. The choice follows the
CPU's flags, not a timing: other load on the machine could change a timing between two starts, and a resumed run must
run the same program. The choice is made when a program is traced, so the compilation cache keeps the two apart.
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
"""XLA's flags for GPUs, known to all versions that requirements.txt allows. For FLUX's products, cuBLASLt with the bias
in its epilogue is faster than the Triton kernels, among which XLA would search for minutes. From JAX 0.12 on, XLA's
default is to merge products of one input up to 64 MB, and merged ones lose their epilogues: in FP8, a batch of 8 loses
a GELU (tests/test_compiled.py::test_forward_in_fp8)."""
NO_TRITON_NORMS = {"xla_disable_hlo_passes": "triton-softmax-rewriter"}
"""Compiler options without the pass that makes one Triton kernel of each norm and of each quantisation, and then tries
tilings for every operation that could join one."""
DETERMINISTIC = {"xla_gpu_deterministic_ops": True}
"""Compiler options with which XLA takes kernels of a GPU that add in a fixed order: without, cuDNN's attention does not
in its backward pass. XLA then also takes the first kernel for each product, not the fastest it has timed, so that
another compilation has the same ones. Whether all bits repeat was not measured yet."""
MEMORY = "0.92"
"""Share of a GPU's memory that JAX reserves. Its own default, 75 %, is too little for 12B parameters on 80 GB."""


# --- settings -------------------------------------------------------------------------------------------------------


def setup() -> None:
    """Set XLA's flags and JAX's share of a GPU's memory; call it before the first array. The user's settings are kept.

    Without an accelerator, JAX's platform is set to CPU: else jax[cuda12] prints a stack trace.
    """
    if "JAX_PLATFORMS" not in os.environ and not any(glob.glob(f"/dev/{node}") for node in _ACCELERATORS):
        os.environ["JAX_PLATFORMS"] = "cpu"  # for child processes
        jax.config.update("jax_platforms", "cpu")
    if glob.glob("/dev/nvidia[0-9]*"):
        os.environ["XLA_FLAGS"] = with_gpu_flags(os.environ.get("XLA_FLAGS", ""))
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY)
    # Only the tokenizers of transformers are used, so its warning about missing PyTorch is turned off.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def with_gpu_flags(flags: str) -> str:
    """XLA_FLAGS plus those flags of XLA_GPU that are not in it."""
    return " ".join([flags, *_missing(flags)]).strip()


def _missing(flags: str) -> list[str]:
    return [f"--{name}={str(value).lower()}" for name, value in XLA_GPU.items() if name not in flags]


def compiler_options(precision: str, deterministic: bool = False) -> dict[str, str | bool]:
    """XLA's options for a program in `precision` on the current platform, `deterministic` or not.

    Emulated NVFP4 quantises every Linear's input by a dozen operations: on a GPU, trying tilings for these is most of
    compiling.
    """
    if platform() != "gpu":
        return {}
    return {**(NO_TRITON_NORMS if precision == "nvfp4_emulated" else {}), **(DETERMINISTIC if deterministic else {})}


def absent() -> list[str]:
    """The GPU settings of `setup` that are not set in this process, as NAME=value for the environment."""
    found = [f"XLA_FLAGS={flag}" for flag in _missing(os.environ.get("XLA_FLAGS", ""))]
    fraction = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    return found if fraction in os.environ else [*found, f"{fraction}={MEMORY}"]


# --- inside programs ------------------------------------------------------------------------------------------------


def platform() -> str:
    """ "cpu", "gpu" or "tpu": the platform of the ambient mesh, or JAX's default without one. The mesh's devices may be
    descriptions only, to compile for a card that is not there."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(described, "platform", None) or jax.default_backend()


def row_major(x: Array) -> Array:
    """`x` with a row-major memory layout at this point of a program.

    XLA derives the layout of a value from the layouts that its users need. Without this, quantising into
    [out, in] first transposes a whole stack of bf16 [in, out] kernels, and a depthwise convolution made of shifted
    products writes its sum in f32, channel by channel (tests/test_compiled.py::test_quantising_turns_the_codes_alone,
    tests/test_sana_compiled.py::test_depthwise_convolutions_as_shifted_products).
    """
    return with_layout_constraint(jnp.asarray(x), Layout(major_to_minor=tuple(range(x.ndim))))


@functools.cache
def has_amx(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether the CPU has matrix units for bfloat16, by its flag in Linux; False on other systems."""
    file = Path(cpuinfo)
    return file.exists() and "amx_bf16" in file.read_text(encoding="utf-8").split()


def wide() -> bool:
    """Whether bfloat16 operands are multiplied as float32 on the current platform."""
    return platform() == "cpu" and not has_amx()


def operands(*arrays: Array) -> tuple[Array, ...]:
    """The arrays in the dtype in which their product is fastest; the numbers do not change."""
    if not wide():
        return arrays
    return tuple(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arrays)


def notes() -> list[str]:
    """A line for the start of a run: on CPUs, which of the two is chosen, and why."""
    if platform() != "cpu":
        return []
    if wide():
        return ["bfloat16 products as float32 ones, summed in float32: this CPU has no matrix units for them (AMX)"]
    return ["bfloat16 products in this CPU's matrix units (AMX), summed in float32"]
