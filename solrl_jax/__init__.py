"""Reinforcement learning of text-to-image flow models in JAX: explore in low precision, train in bfloat16.

jax[cuda12] prints a stack trace on a machine without a GPU unless it is told the platform before its import. That is
done here, and only where no accelerator can be and the user has said nothing.
"""

import glob
import os

_ACCELERATORS = ("nvidia[0-9]*", "dxg", "kfd", "accel[0-9]*", "vfio/[0-9]*")  # CUDA, CUDA under WSL, ROCm, TPUs

if "JAX_PLATFORMS" not in os.environ and not any(glob.glob(f"/dev/{node}") for node in _ACCELERATORS):
    os.environ["JAX_PLATFORMS"] = "cpu"

XLA_GPU = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 32}
"""What XLA is told about GPUs; every version from requirements.txt's on knows both. On FLUX's products cuBLASLt, with
biases in its epilogue, beats the Triton kernels that XLA would search for minutes. And from JAX 0.12 on XLA merges
products of one input up to its default of 64 MB at the price of their epilogues: a batch of 8 in FP8 loses a GELU."""


def with_gpu_flags(flags: str) -> str:
    """XLA_FLAGS with those of XLA_GPU that it does not name."""
    own = [f"--{name}={str(value).lower()}" for name, value in XLA_GPU.items() if name not in flags]
    return " ".join([flags, *own]).strip()


if glob.glob("/dev/nvidia[0-9]*"):
    os.environ["XLA_FLAGS"] = with_gpu_flags(os.environ.get("XLA_FLAGS", ""))

# JAX reserves 75 % of a GPU at first use by default: too little for 12B parameters on 80 GB.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

# Only its tokenizers are used here: transformers need not warn that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
