"""Reinforcement learning of text-to-image flow models in JAX: explore in low precision, train in bfloat16.

jax[cuda12] prints a stack trace on a machine without a GPU unless it is told the platform before its import, so that is
done here, and only where no GPU can be (no NVIDIA device node, not WSL's /dev/dxg) and the user has said nothing.
"""

import glob
import os

if "JAX_PLATFORMS" not in os.environ and not glob.glob("/dev/nvidia[0-9]*") and not os.path.exists("/dev/dxg"):
    os.environ["JAX_PLATFORMS"] = "cpu"
