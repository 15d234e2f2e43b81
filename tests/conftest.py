"""Tests run on 4 fake CPU devices; shapes and dtypes of public signatures are checked, silent broadcasting refused."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ["HF_HUB_OFFLINE"] = "1"
# A test compiles far longer than it computes. Without most of XLA's optimisations compiling takes half the time.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"

import jax
import pytest
from jaxtyping import install_import_hook

ARRAYS = (
    *("algos", "device", "guidance", "iteration", "keys", "learn", "lora", "mixture", "models", "quant", "report"),
    *("rewards", "rollout", "run", "sampler", "selection", "sharding", "solvers", "structs", "train", "weights"),
)
"""Signatures of these are checked. A check takes longer than a small function, and the plan calls a million of them."""
jax.config.update("jax_numpy_rank_promotion", "raise")


LONGEST = (
    *("test_docs", "test_processes", "test_fsdp_compiled", "test_prove", "test_faults", "test_tpu_compiled"),
    *("test_flux2_run", "test_zimage_run", "test_multi_gpu", "test_plan", "test_iteration", "test_train", "test_run"),
)
"""Files that take minutes. They begin first: the last file of a tier then leaves no process idle for long."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)  # stable: otherwise their order stays


def pytest_configure(config):
    if config.option.markexpr not in ("slow", "long"):  # these tiers call the same functions for longer
        install_import_hook([f"solrl_jax.{name}" for name in ARRAYS], "beartype.beartype")
    from solrl_jax import device  # after the hook, which checks what is imported from here on

    device.setup()


@pytest.fixture
def strict_dtypes():
    """Dtypes are cast where they are meant to be, for a test of formulas. Networks and optax's AdamW promote: bfloat16
    residuals to float32, and the optimiser's integer count."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def optimised():
    """For a module that looks at what XLA makes of a program, or compares with numbers of programs made that way.

    Programs of other modules differ in the last bit: they are dropped, or jit uses them.
    """
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture
def one_thread():
    """torch on one thread: on a busy machine its threads wait on each other for seconds."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
