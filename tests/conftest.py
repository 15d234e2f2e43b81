"""Tests run on 4 fake CPU devices; shapes and dtypes of public signatures are checked, silent broadcasting refused."""

import gc
import os
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ["HF_HUB_OFFLINE"] = "1"
# A test compiles far longer than it computes. Without most of XLA's optimisations compiling takes half the time.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"

import jax
import pytest
from jaxtyping import install_import_hook

ARRAYS = (
    *("algos", "device", "guidance", "iteration", "keys", "learn", "lora", "mixture", "models", "quant"),
    *("report.gallery", "rewards", "rollout", "run", "sampler", "selection", "sharding", "solvers", "structs", "train"),
    "weights",
)
"""Signatures of these are checked. A check takes longer than a small function, and the plan calls a million of them;
of the report, which is of strings, 3000 a page."""
jax.config.update("jax_numpy_rank_promotion", "raise")
OLD_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
"""Without the new code generator of fusions a CPU's program compiles in half the time again. In the default tier alone:
the others compute for longer, and look at more of what XLA makes of a program."""


def known(flag: str) -> bool:
    """Whether this XLA has the flag: with one that it does not know it ends the process."""
    words, env = [sys.executable, "-c", "import jax; jax.devices()"], os.environ | {"XLA_FLAGS": flag}
    return subprocess.run(words, env=env, capture_output=True).returncode == 0


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
        # XLA reads its flags with the first array. Other processes of the tier inherit them.
        if OLD_EMITTERS not in os.environ["XLA_FLAGS"] and known(OLD_EMITTERS):
            os.environ["XLA_FLAGS"] += f" {OLD_EMITTERS}"
        # Tracing makes millions of objects, few of them garbage in cycles: to look for it as often as Python does
        # takes 6 % of the time. What the other tiers hold is gigabytes.
        gc.set_threshold(50_000, 20, 20)
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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """For a module whose runs trace and compile the same few programs: once is enough."""
    from solrl_jax import iteration
    from tests import toy_world

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [jax.config.values[name] for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0), strict=True):
        jax.config.update(name, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iteration, "stages", toy_world.traced_once())
        yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """The config of the toy world (toy_world.py); runs go to tmp_path."""
    from tests import toy_world

    return toy_world.world(monkeypatch, tmp_path)


@pytest.fixture
def one_thread():
    """torch on one thread: on a busy machine its threads wait on each other for seconds."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
