"""Compiling for a card that is not there, from its description; NVIDIA's libraries come with jax[cuda12]."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from solrl_jax import sharding


def mesh(name: str = "h100") -> Mesh:
    """A mesh of one described card; skips where JAX's CUDA plugin is not installed."""
    pytest.importorskip("jax_cuda12_plugin", reason="compiling for a GPU needs jax[cuda12]")
    text = (Path(__file__).parent / "cards" / f"{name}.txtpb").read_text()
    found = topologies.get_topology_desc(platform="cuda", target_config=text, topology="1x1x1")
    return Mesh(np.asarray(found.devices[:1]), (sharding.DATA,), axis_types=(jax.sharding.AxisType.Auto,))


def compiled(f, *args, on: Mesh):
    """f compiled for the card; leaves of `args` give shapes and dtypes alone."""
    place = NamedSharding(on, sharding.WHOLE)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    with jax.set_mesh(on):
        return jax.jit(f).lower(*shapes).compile({"xla_gpu_enable_triton_gemm": False})  # as solrl_jax sets it
