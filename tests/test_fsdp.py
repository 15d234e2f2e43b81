"""Frozen weights over several devices: the same numbers as with whole ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import iteration, sharding
from solrl_jax.structs import leaves_by_path
from tests import nano
from tests.nano import begun, numbers, parts_of, statics_of

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nano")


@functools.cache
def iterated(cfg, devices=4):
    """Each stage's results, in one program a stage."""
    parts = parts_of(cfg, devices)
    run = iteration.stages(*statics_of(parts))
    with jax.set_mesh(parts.mesh):
        state, prompts, keys = begun(parts)
        keys = sharding.split(keys, parts.mesh)
        kernels = jax.jit(run.merged)(state, parts.frozen)
        low = jax.jit(run.quantised)(kernels, parts.frozen)
        preview = jax.jit(run.explore)(kernels, low, parts.frozen, prompts, keys)
        full = jax.jit(run.regenerate)(kernels, None, parts.frozen, prompts, keys[:, :4])
        new, metrics = jax.jit(run.learn)(state, parts.frozen, prompts.cond, full)
    return {
        "base": parts.frozen.base,
        "kernels": kernels,
        "low": low,
        "preview": preview,
        "full": full,
        "new": new,
        "metrics": metrics,
    }


@pytest.mark.parametrize("shard", [2, 4])
def test_sharded(folder, shard):
    cfg = nano.build(folder)
    whole = iterated(cfg)
    parts = iterated(dataclasses.replace(cfg, shard=shard))
    for k in ("base", "kernels", "low", "preview", "full"):
        for (path, a), b in zip(leaves_by_path(whole[k]).items(), jax.tree.leaves(parts[k]), strict=True):
            a, b = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b))
            a, b = (np.asarray(x.astype(jnp.float32) if x.dtype.itemsize < 4 else x) for x in (a, b))
            d = np.abs(a.astype(np.float64) - b).max() if a.size else 0
            if d:
                print(k, path, d)
        print(
            k,
            [x.sharding.spec for x in jax.tree.leaves(parts[k])][:3],
            sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(parts[k])),
            sum(x.nbytes for x in jax.tree.leaves(parts[k]) if hasattr(x, "nbytes")),
        )
    print(
        np.abs(numbers(whole["new"].lora) - numbers(parts["new"].lora)).max(),
        {k: (float(v), float(parts["metrics"][k])) for k, v in whole["metrics"].items()},
    )
