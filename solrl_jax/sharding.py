"""The mesh, where arrays lie on it, and how frozen weights are gathered where they are used.

Its axes are `data` and `fsdp`. Every device takes its own prompts, so prompts are split over both. The base, its merged
and quantised kernels and the text encoders are sharded over the K devices of `fsdp`, which belong to one host: of each
kernel of a stack [L, in, out] a device holds a part of every layer. They are frozen, so nothing is reduced: a Linear
gathers its kernel inside the layers' scan, in the precision in which it is used, and again in the backward pass
(`at_use`). A stack of one layer, SD3.5's last block, has no loop of its own: it is gathered where it is called. LoRA
sets, moments, VAE and rewards are whole on every device. K = 1: all weights are whole.

In float32 all numbers are those of whole weights, bit for bit where a product's sums do not depend on its number of
rows; in bfloat16 they differ by rounding, for a row of a modulation is rounded before it is sent (tests/test_fsdp.py).
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from solrl_jax import processes
from solrl_jax.structs import path_name

DATA, FSDP = "data", "fsdp"
AXES = (DATA, FSDP)
SPLIT, WHOLE = P(AXES), P()
BY_INPUT, BY_OUTPUT = P(None, FSDP), P(None, None, FSDP)
"""A stack's kernels [L, in, out] in parts. (Codes are [L, out, in]: of these BY_INPUT's axis 1 is the output.)"""
MODULATION = re.compile(r"norm\w*/linear/kernel$")
"""Kernels in parts by output. A modulation has one row per picture, so its results are usually fewer numbers than its
weights, a quarter of FLUX's, and are exchanged instead (`at_use`)."""
_KERNEL = re.compile(r"(^|/)kernel(/|$)")


def make_mesh(devices: int | None = None, shard: int = 1) -> Mesh:
    """A mesh of the first `devices` devices (default: all), frozen weights sharded over `shard` neighbours each."""
    found = jax.devices()
    count = len(found) if devices is None else devices
    if not 1 <= count <= len(found):
        raise ValueError(f"{count} devices asked for, {len(found)} found: choose between 1 and {len(found)}")
    if shard < 1 or count % shard:
        fits = [k for k in range(1, count + 1) if count % k == 0]
        raise ValueError(f"shard={shard} does not divide {count} devices: use one of {fits}, or other --devices")
    auto = jax.sharding.AxisType.Auto
    return jax.make_mesh((count // shard, shard), AXES, devices=found[:count], axis_types=(auto, auto))


def check_divides(mesh: Mesh, prompts: int) -> None:
    """ValueError unless each device gets the same number of whole prompts."""
    if prompts % mesh.size:
        fits = [n for n in range(1, jax.device_count() + 1) if prompts % n == 0]
        several = processes.count() > 1
        raise ValueError(
            f"{prompts} prompts do not divide over {mesh.size} devices{' of all processes' if several else ''}: "
            f"use a multiple of {mesh.size} prompts, or "
            + (f"start processes with one of {fits} devices together" if several else f"--devices with one of {fits}")
        )


# --- data-parallel work ---------------------------------------------------------------------------------------------


def over_data(f: Callable, specs: tuple, out_specs: Any) -> Callable:
    """Run `f` once per device of the ambient mesh. `specs` say which part of each argument it gets: SPLIT its rows of
    the leading axis, WHOLE all of it, `specs_of(tree)` its parts of frozen weights.

    Inside, each device sees only its own prompts and scans over them: a scanned axis is never the sharded one.
    Raises ValueError without an ambient mesh; one device is a mesh too.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError("no mesh: call this under `with jax.set_mesh(sharding.make_mesh())`")
    # We sum the devices' gradients ourselves; with check_vma=True, shard_map would sum them too.
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)


def over_parts(f: Callable, specs: tuple, out_specs: Any) -> Callable:
    """`over_data` if weights are sharded; else `f` itself, which then needs no mesh."""
    return over_data(f, specs, out_specs) if shards() > 1 else f


def index() -> jax.Array:
    """This device's number, inside `over_data`."""
    return jax.lax.axis_index(AXES)


@functools.partial(jax.jit, static_argnames=("count", "axis"))
def block(tree, first, count: int, axis: int = 0):
    """Rows `first` to `first` + `count`, on another axis columns, of each device's part of every leaf, split as it is.

    Outside of jit, the result of a slice is replicated: every device gathers the rows of the others.
    """

    def mine(tree, first):
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, count, axis), tree)

    return over_data(mine, (SPLIT, WHOLE), SPLIT)(tree, first)


@functools.partial(jax.jit, static_argnames="axis")
def joined(blocks: tuple, axis: int = 0):
    """The inverse of `block`: concatenates consecutive blocks."""

    def mine(*blocks):
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis), *blocks)

    return over_data(mine, (SPLIT,) * len(blocks), SPLIT)(*blocks)


# --- between the host and the devices -------------------------------------------------------------------------------


def replicate(tree, mesh: Mesh):
    """Whole on every device. Every process gives the same values."""
    return jax.tree.map(functools.partial(_put, where=NamedSharding(mesh, WHOLE)), tree)


def split(tree, mesh: Mesh):
    """Split the leading axis over the devices. Every process gives the same values, whole."""
    return jax.tree.map(functools.partial(_put, where=NamedSharding(mesh, SPLIT)), tree)


@functools.lru_cache
def _moved(where: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """x -> x laid as `where`, by a program of all processes; one function a sharding, so that it compiles once."""
    return jax.jit(lambda x: x, out_shardings=where)


def _put(x: Any, where: NamedSharding) -> jax.Array:
    """jax.device_put. With several processes it would first send every array to all of them, to compare it."""
    if processes.count() == 1:
        return jax.device_put(x, where)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return _moved(where)(x)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(x), where), impl=jax.random.key_impl(x))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, where, lambda part: x[part])


def fetch(tree):
    """The whole arrays, in the memory of every host."""

    def one(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        whole = NamedSharding(x.sharding.mesh, WHOLE)  # pyright: ignore[reportAttributeAccessIssue]
        return np.asarray(_moved(whole)(x))

    return jax.device_get(tree) if processes.count() == 1 else jax.tree.map(one, tree)


def rows_here(count: int, mesh: Mesh) -> list[int]:
    """Which of `count` rows lie on this process's devices, where rows are split."""
    parts = NamedSharding(mesh, SPLIT).addressable_devices_indices_map((count,)).values()
    return sorted(i for part in parts for i in range(count)[part[0]])  # pyright: ignore[reportOptionalSubscript]


def here(tree):
    """Of arrays that are split by rows: this process's rows, in their order, in the host's memory."""

    def one(x: jax.Array) -> np.ndarray:
        parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(parts[first]) for first in sorted(parts)])

    return jax.device_get(tree) if processes.count() == 1 else jax.tree.map(one, tree)


def from_here(tree, mesh: Mesh):
    """The inverse of `here`: every process gives its own rows."""
    if processes.count() == 1:
        return split(tree, mesh)
    where = NamedSharding(mesh, SPLIT)
    return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, where), tree)


# --- frozen weights in parts ----------------------------------------------------------------------------------------


def shards() -> int:
    """K of the ambient mesh; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get(FSDP, 1)


def specs_of(tree: Any) -> Any:
    """The specs of frozen weights: a base, text encoders, merged or quantised kernels, or the variables of a policy."""
    return jax.tree_util.tree_map_with_path(lambda path, x: spec(path_name(path), len(x.shape)), tree)


def spec(path: str, ndim: int) -> P:
    """Where a leaf lies, by its path ("a/b/kernel") and its number of axes alone.

    A stack's kernel [L, in, out] lies in parts along "in": the gathered kernel is then row-major as it arrives. Along
    "out" XLA would transpose the device's whole stack (test_forward of tests/test_fsdp_compiled.py). Codes and scales
    [L, out, ..] lie along "out", the order in which a product reads them. All other leaves are whole, a convolution's
    kernels too.
    """
    if ndim != 3 or not _KERNEL.search(path):
        return WHOLE
    return BY_OUTPUT if MODULATION.search(path) else BY_INPUT  # axis 1 of codes is "out"


def cuts(tree: Any) -> dict[str, int]:
    """{path of a leaf that lies in parts: the length of the axis that is cut}."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    where = [(path_name(path), x.shape, spec(path_name(path), len(x.shape))) for path, x in found]
    return {path: shape[s.index(FSDP)] for path, shape, s in where if FSDP in s}


def shards_that_fit(cut: Iterable[int], devices: int) -> list[int]:
    """Every K that divides the devices and each length of `cut`."""
    common = math.gcd(devices, *cut)
    return [k for k in range(1, devices + 1) if common % k == 0]


def place(tree: Any, mesh: Mesh) -> Any:
    """Frozen weights, from the host, on the devices; each gets only its part."""
    return jax.tree.map(lambda x, part: _put(x, NamedSharding(mesh, part)), tree, specs_of(tree))


def placed(
    shape: tuple[int, ...], read: Callable[[tuple[slice, ...]], np.ndarray], mesh: Mesh, where: P = WHOLE
) -> jax.Array:
    """One leaf, of which the host holds a part at a time: `read` gives the slices that it is asked for, each part once.

    Only the parts of this host's devices are read.
    """
    holders: dict[tuple, list[Any]] = {}
    for holder, at in NamedSharding(mesh, where).addressable_devices_indices_map(shape).items():
        ends = (s.indices(n)[:2] for s, n in zip(at or (), shape, strict=True))
        holders.setdefault(tuple(ends), []).append(holder)

    def put(part: np.ndarray, devices: list[Any]) -> list[jax.Array]:
        return jax.block_until_ready([jax.device_put(part, holder) for holder in devices])  # the host's copy is freed

    parts = [x for at, devices in holders.items() for x in put(read(tuple(slice(*ends) for ends in at)), devices)]
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, where), parts)


# --- gathering at use -----------------------------------------------------------------------------------------------


def at_use(
    product: Callable[..., jax.Array], xs: Sequence[jax.Array], kernel: Any, whole: tuple[int, int]
) -> jax.Array:
    """product(xs, kernel) of rows [*batch, in], in pieces `xs` along the last axis. The kernel is `whole` [in, out];
    this device may hold a part of it.

    The devices' parts are gathered; or, if that is fewer numbers, the results are exchanged. What is gathered is not
    kept for the backward pass, which gathers it again (tests/test_fsdp_compiled.py::test_gradient). `kernel` has a
    shape [in, out]: an array, or a quantised kernel, whose arrays are [out, ..].
    """
    cut = cut_axis(tuple(kernel.shape), whole)
    if cut is None:
        return product(xs, kernel)
    rows = math.prod(xs[0].shape[:-1]) * shards()
    if cut == 1 and rows * sum(whole) < math.prod(whole):
        return exchanged(product, xs, kernel)
    axis = cut if isinstance(kernel, jax.Array) else 1 - cut

    def gathered(xs: Sequence[jax.Array], kernel: Any) -> jax.Array:
        def all_of(x: jax.Array) -> jax.Array:  # a quantised kernel's scales of the whole have no axis to gather
            return jax.lax.all_gather(x, FSDP, axis=axis, tiled=True) if x.ndim == 2 else x

        return product(xs, jax.tree.map(all_of, kernel))

    return jax.checkpoint(gathered, prevent_cse=False)(xs, kernel)


def cut_axis(held: tuple[int, ...], whole: tuple[int, int]) -> int | None:
    """The axis along which a kernel of shape `held` is one device's part of `whole`; None if it is whole itself.

    ValueError if it is neither.
    """
    if held == whole:
        return None
    for axis in (0, 1):
        if tuple(n * shards() if i == axis else n for i, n in enumerate(held)) == whole:
            return axis
    raise ValueError(f"a kernel of shape {held} where the network needs {whole}, or a part of it ({shards()} devices)")


def exchanged(product: Callable[..., jax.Array], xs: Sequence[jax.Array], kernel: Any) -> jax.Array:
    """The product of all devices' rows with this device's outputs; then each device gets its rows, with all outputs."""
    rows = [jax.lax.all_gather(x, FSDP, tiled=True) for x in xs]
    y = product(rows, kernel)
    return jax.lax.all_to_all(y, FSDP, split_axis=0, concat_axis=y.ndim - 1, tiled=True)
