"""Compiling for a card that is not there, from its description; NVIDIA's libraries come with jax[cuda12]."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from solrl_jax import device, sharding


def mesh(name: str = "h100", devices: int = 1, shard: int = 1) -> Mesh:
    """A mesh of described cards in one host, weights over `shard` of them; skips without JAX's CUDA plugin."""
    pytest.importorskip("jax_cuda12_plugin", reason="compiling for a GPU needs jax[cuda12]")
    text = (Path(__file__).parent / "cards" / f"{name}.txtpb").read_text()
    found = topologies.get_topology_desc(platform="cuda", target_config=text, topology=f"1x{devices}x1")
    auto = jax.sharding.AxisType.Auto
    return Mesh(np.reshape(found.devices, (devices // shard, shard)), sharding.AXES, axis_types=(auto, auto))


def compiled(f, *args, on: Mesh, split: tuple = (), options: Mapping[str, Any] = {}):
    """f compiled for the cards, with further compiler options, by the shapes and dtypes of `args`, which lie whole on
    every device, and then of `split`, which lie over the devices."""
    shapes = [
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(on, place)), tree)  # noqa: B023
        for tree, place in [*((a, sharding.WHOLE) for a in args), *((a, sharding.SPLIT) for a in split)]
    ]
    with jax.set_mesh(on):
        return jax.jit(f).lower(*shapes).compile({**device.XLA_GPU, **options})
