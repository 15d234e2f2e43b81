"""Reinforcement learning of text-to-image flow models in JAX: explore in low precision, train in bfloat16.

jax[cuda12] prints a stack trace on a machine without a GPU unless it is told the platform before its import. That is
done here, and only where no accelerator can be and the user has said nothing.
"""

import glob
import os

_ACCELERATORS = ("nvidia[0-9]*", "dxg", "kfd", "accel[0-9]*", "vfio/[0-9]*")  # CUDA, CUDA under WSL, ROCm, TPUs

if "JAX_PLATFORMS" not in os.environ and not any(glob.glob(f"/dev/{node}") for node in _ACCELERATORS):
    os.environ["JAX_PLATFORMS"] = "cpu"

# JAX reserves 75 % of a GPU at first use by default: too little for 12B parameters on 80 GB.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

# Only its tokenizers are used here: transformers need not warn that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
