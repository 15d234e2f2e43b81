"""Reinforcement learning of text-to-image flow models in JAX: explore in low precision, train in bfloat16.

jax[cuda12] prints a stack trace on a machine without a GPU unless it is told the platform before its import. That is
done here, and only where no accelerator can be and the user has said nothing.
"""

import glob
import os

_ACCELERATORS = ("nvidia[0-9]*", "dxg", "kfd", "accel[0-9]*", "vfio/[0-9]*")  # CUDA, CUDA under WSL, ROCm, TPUs

if "JAX_PLATFORMS" not in os.environ and not any(glob.glob(f"/dev/{node}") for node in _ACCELERATORS):
    os.environ["JAX_PLATFORMS"] = "cpu"

# On FLUX's products cuBLASLt, with biases in its epilogue, beats the Triton kernels that XLA would search for minutes.
if glob.glob("/dev/nvidia[0-9]*") and "xla_gpu_enable_triton_gemm" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false".strip()

# JAX reserves 75 % of a GPU at first use by default: too little for 12B parameters on 80 GB.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

# Only its tokenizers are used here: transformers need not warn that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
