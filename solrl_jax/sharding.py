"""The mesh and its one axis. Data-parallel stages run in `over_data`; everything else is replicated."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA = "data"
SPLIT, WHOLE = P(DATA), P()


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh of the first `devices` devices (all of them by default)."""
    found = jax.devices()
    count = len(found) if devices is None else devices
    if not 1 <= count <= len(found):
        raise ValueError(f"{count} devices asked for, {len(found)} found: choose between 1 and {len(found)}")
    return jax.make_mesh((count,), (DATA,), devices=found[:count], axis_types=(jax.sharding.AxisType.Auto,))


def check_divides(mesh: Mesh, prompts: int) -> None:
    """ValueError unless each device gets the same number of whole prompts."""
    if prompts % mesh.size:
        fits = [n for n in range(1, jax.device_count() + 1) if prompts % n == 0]
        raise ValueError(
            f"{prompts} prompts do not divide over {mesh.size} devices: use a multiple of {mesh.size} prompts, "
            f"or --devices with one of {fits}"
        )


def over_data(f: Callable, split: tuple[bool, ...], out_specs) -> Callable:
    """Run `f` once per device of the ambient mesh, on its slice of the arguments marked in `split` (leading axis).

    Inside, each device sees only its own prompts and scans over them: a scanned axis is never the sharded one.
    Raises ValueError without an ambient mesh; one device is a mesh too.
    """
    specs = tuple(SPLIT if s else WHOLE for s in split)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError("no mesh: call this under `with jax.set_mesh(sharding.make_mesh())`")
    # We sum the devices' gradients ourselves; with check_vma=True, shard_map would sum them too.
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)


@functools.partial(jax.jit, static_argnames="count")
def block(tree, first, count: int):
    """Rows `first` to `first` + `count` of each device's part of every leaf, split as the leaf is.

    Outside of jit, the result of a slice is replicated: every device gathers the rows of the others.
    """

    def mine(tree, first):
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, count), tree)

    return over_data(mine, (True, False), SPLIT)(tree, first)


@jax.jit
def joined(blocks: tuple):
    """The inverse of `block`: concatenates consecutive blocks."""

    def mine(*blocks):
        return jax.tree.map(lambda *x: jnp.concatenate(x), *blocks)

    return over_data(mine, (True,) * len(blocks), SPLIT)(*blocks)


def replicate(tree, mesh: Mesh):
    return jax.device_put(tree, NamedSharding(mesh, WHOLE))


def split(tree, mesh: Mesh):
    """Split the leading axis over the devices."""
    return jax.device_put(tree, NamedSharding(mesh, SPLIT))
