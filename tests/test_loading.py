"""Weights that lie over several devices: each device reads its part of a leaf, and nothing else is read or placed."""

import dataclasses
import functools
import math
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from safetensors.numpy import load_file, save_file

from solrl_jax import config, device, sharding, structs, weights
from solrl_jax.config import ConfigError
from solrl_jax.run import assemble, convert
from solrl_jax.run.encode import Conditioner
from solrl_jax.structs import leaves_by_path
from solrl_jax.weights import Files, Rule
from tests import nano, nano_sana, nano_sd35

BUILDS = {"flux": nano.build, "converted": nano.build, "sd35": nano_sd35.build, "sana": nano_sana.build}

CUT = {"flux": 20, "converted": 20, "sd35": 43, "sana": 7}
"""Kernels of stacks."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """{name: (config, what is read of it whole)}, made once."""

    @functools.cache
    def of(name):
        folder = tmp_path_factory.mktemp(name)
        cfg = BUILDS[name](folder)
        if name == "converted":
            convert.convert(assemble.model_module(cfg), cfg.model, folder / "out")
            cfg = config.override(cfg, **{"model.path": folder / "out"})
        return cfg, assemble.open_weights(cfg, sharding.make_mesh(4))

    return of


class Copied(list):
    """The bytes of every array that was copied out of a file; and how `sharding.placed` was asked for each leaf."""

    def __init__(self, monkeypatch):
        self.leaves = []
        for at, name in ((Files, "part"), (Files, "__getitem__"), (convert, "_part")):
            monkeypatch.setattr(at, name, self.counted(getattr(at, name)))
        monkeypatch.setattr(sharding, "placed", functools.partial(self.placed, sharding.placed))

    def counted(self, read):
        def call(*given):
            x = read(*given)
            self.append(x.nbytes)
            return x

        return call

    def placed(self, put, shape, read, *where):
        asked = []

        def watched(at):
            x = read(at)
            asked.append((tuple((s.start, s.stop) for s in at), x.nbytes))
            return x

        self.leaves.append(asked)
        return put(shape, watched, *where)


def bits(x):
    return x.dtype, x.shape, np.asarray(x).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("shard", [2, 4])
@pytest.mark.parametrize("name", BUILDS)
def test_a_device_reads_and_holds_its_part(built, name, shard, monkeypatch):
    """The numbers are those of whole weights. Of all files together each byte is copied once."""
    (cfg, whole), copied = built(name), Copied(monkeypatch)
    mesh = sharding.make_mesh(4, shard)
    base, vae, text = found = assemble.open_weights(dataclasses.replace(cfg, shard=shard), mesh)
    assert jax.tree.map(bits, found) == jax.tree.map(bits, whole)
    assert {type(x) for x in jax.tree.leaves(text)} == {np.ndarray}
    cut, where = sharding.cuts(base), leaves_by_path(sharding.specs_of(base))
    assert len(cut) == CUT[name] < len(where)
    for path, x in leaves_by_path(base).items():
        assert x.sharding == NamedSharding(mesh, where[path])
        part = x.nbytes // shard if path in cut else x.nbytes
        assert [s.data.nbytes for s in x.addressable_shards] == [part] * 4
    assert all(x.sharding == NamedSharding(mesh, sharding.WHOLE) for x in jax.tree.leaves(vae))

    assert sum(copied) == sum(x.nbytes for x in jax.tree.leaves(found))
    asked = sorted(len(reads) for reads in copied.leaves)
    leaves = len(where) + len(jax.tree.leaves(vae))
    assert asked == [1] * (leaves - len(cut)) + [shard] * len(cut)
    for reads in copied.leaves:
        assert len({at for at, _ in reads}) == len(reads) and len({size for _, size in reads}) == 1
    held = {path: x.addressable_shards[0].data.nbytes for path, x in leaves_by_path(base).items()}
    most = max(*held.values(), *(x.nbytes for x in jax.tree.leaves(vae)))
    assert max(size for reads in copied.leaves for _, size in reads) == most  # of what the host holds at a time


def test_a_part_is_read_once_for_all_its_devices_and_then_freed(monkeypatch):
    """Two devices hold each half. On a CPU, jax would keep numpy's memory as an array's own: here it copies."""
    alive, asked, put = [], [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, device: put(x.copy(), device))
    x = np.arange(48.0, dtype=np.float32).reshape(2, 4, 6)

    def read(at):
        asked.append(at)
        assert not any(part() is not None for part in alive)
        alive.append(weakref.ref(part := x[at].copy()))
        return part

    mesh = sharding.make_mesh(4, 2)
    found = sharding.placed(x.shape, read, mesh, sharding.BY_INPUT)
    assert asked == [(slice(0, 2), slice(0, 2), slice(0, 6)), (slice(0, 2), slice(2, 4), slice(0, 6))]
    assert bits(found) == bits(x) and [s.data.shape for s in found.addressable_shards] == [(2, 2, 6)] * 4
    asked.clear()
    assert bits(sharding.placed(x.shape, read, mesh)) == bits(x) and len(asked) == 1
    scalar = sharding.placed((), lambda at: np.asarray(3, jnp.bfloat16), mesh)
    assert scalar.dtype == jnp.bfloat16 and float(scalar) == 3


# --- slices of files --------------------------------------------------------------------------------------------------

RULES = (
    Rule(r"blocks/(q|k)/kernel", r"blocks.{layer}.\1", "linear", first=1),
    Rule(r"blocks/fused/kernel", ("{layer}.a", "{layer}.b", "{layer}.c"), "linear"),
    Rule(r"blocks/first/kernel", "{layer}.rows", "linear", (0, 2)),
    Rule(r"blocks/second/kernel", "{layer}.rows", "linear", (1, 2)),
    Rule(r"blocks/point/kernel", "{layer}.point", "pointwise"),
    Rule(r"blocks/depth/kernel", "{layer}.depth", "conv"),
    Rule(r"blocks/fused/bias", ("{layer}.a_bias", "{layer}.b_bias", "{layer}.c_bias")),
    Rule(r"blocks/gain", "{layer}.gain"),
    Rule(r"conv/kernel", "conv", "conv"),
    Rule(r"table", "table"),
)
SHAPES = {
    "blocks/q/kernel": (3, 4, 5),
    "blocks/fused/kernel": (3, 4, 9),
    "blocks/first/kernel": (3, 6, 4),
    "blocks/second/kernel": (3, 6, 4),
    "blocks/point/kernel": (3, 5, 6),
    "blocks/depth/kernel": (3, 3, 3, 1, 4),
    "blocks/fused/bias": (3, 6),
    "blocks/gain": (3,),
    "conv/kernel": (2, 3, 4, 6),
    "table": (7, 3),
}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_slices_of_every_layout(tmp_path, kind, dtype, monkeypatch):
    """20 slices of each leaf, whole axes and single rows among them. Only what is in them is copied from the file."""
    rng = np.random.default_rng(0)
    tree = {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
    weights.save(tree, RULES, file := tmp_path / "model.safetensors")
    if kind == "bin":
        found = {key: torch.from_numpy(x.copy()) for key, x in load_file(file).items()}
        torch.save(found, tmp_path / "pytorch_model.bin")
        file.unlink()
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    copied, seen = Copied(monkeypatch), []

    def look(path, leaf):
        want = tree[path] if dtype is None else tree[path].astype(dtype)
        assert (leaf.shape, leaf.dtype) == (want.shape, dtype)
        for i in range(20):
            ends = [sorted(rng.choice(n + 1, 2, replace=False)) if i else (0, n) for n in want.shape]
            at = tuple(slice(int(a), int(b)) for a, b in ends)
            copied.clear()
            part = leaf.read(at)
            assert bits(part) == bits(np.ascontiguousarray(want[at])) and part.flags.c_contiguous
            assert sum(copied) == part.size * 4
            seen.append(path)

    weights.load(Files(tmp_path), spec, RULES, dtype=dtype, place=look)
    assert len(seen) == 20 * len(SHAPES)


def test_maps_are_closed_by_what_is_mapped(tmp_path, monkeypatch):
    """One column of a tensor lies in all its pages: after two tensors of 400 bytes, of which 40 are read, the map is
    closed."""
    monkeypatch.setattr(weights, "MAPPED", 799)
    save_file({f"{i}.x": np.ones((10, 10), np.float32) for i in range(6)}, tmp_path / "model.safetensors")
    files, opened = Files(tmp_path), []
    handle = files._handle
    monkeypatch.setattr(files, "_handle", lambda file: opened.append(file not in files._open) or handle(file))
    spec = {"x": {"kernel": jax.ShapeDtypeStruct((6, 10, 10), jnp.float32)}}

    def one(path, leaf):
        opened.clear()
        return leaf.read((slice(0, 6), slice(3, 4), slice(0, 10)))

    found = weights.load(files, spec, (Rule("x/kernel", "{layer}.x", "linear"),), dtype=np.float32, place=one)
    assert found["x"]["kernel"].shape == (6, 1, 10) and sum(opened) == 2 and not files._open


def test_conversion_reads_a_layer_at_a_time(built, tmp_path, monkeypatch):
    """The files are the same, and no read has more than PIECE bytes, or one row of the first axis."""
    (cfg, _), sizes = built("flux"), []
    module, read = assemble.model_module(cfg), weights._read

    def watched(*given):
        sizes.append(read(*given).nbytes)
        return read(*given)

    convert.convert(module, cfg.model, tmp_path / "whole")
    monkeypatch.setattr(convert, "PIECE", 4096)
    monkeypatch.setattr(weights, "_read", watched)
    convert.convert(module, cfg.model, tmp_path / "pieces")
    one, two = (convert._manifest(tmp_path / name)["files"] for name in ("whole", "pieces"))
    assert one == two
    rows = [math.prod(x.shape[1:]) * 4 for x in jax.tree.leaves(module.shapes(cfg.model))]
    assert max(sizes) == max(4096, *rows) and len(sizes) > len(rows)


def test_rows_of_a_piece(monkeypatch):
    monkeypatch.setattr(convert, "PIECE", 100)
    assert list(convert._pieces((), 4)) == [()]
    assert list(convert._pieces((0, 3), 4)) == []
    assert list(convert._pieces((7, 2, 5), 4)) == [
        (slice(first, end), slice(0, 2), slice(0, 5)) for first, end in ((0, 2), (2, 4), (4, 6), (6, 7))
    ]
    assert [at[0] for at in convert._pieces((2, 300), 4)] == [slice(0, 1), slice(1, 2)]


# --- text encoders ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stay", [True, False])
def test_text_encoders_lie_in_parts(built, stay, monkeypatch):
    """Each device gets a quarter of every kernel of T5's and CLIP's stacks; the conditioning is that of whole ones."""
    cfg, (_, _, text) = built("flux")
    model, held, place = assemble.model_module(cfg).make(cfg.model), [], sharding.place

    def watched(params, mesh):
        found = place(params, mesh)
        held.append({path: [s.data.shape for s in x.addressable_shards] for path, x in leaves_by_path(found).items()})
        return found

    monkeypatch.setattr(sharding, "place", watched)
    whole, parts = (
        Conditioner(model, text, sharding.make_mesh(4, shard), group=4, stay=stay)(nano.PROMPTS[:4]) for shard in (1, 4)
    )
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert held[0] == {path: [x.shape] * 4 for path, x in leaves_by_path(text).items()}
    kernels = [path for path in held[1] if path.endswith("/kernel")]
    assert len(kernels) == 13 and kernels == list(sharding.cuts(text))
    assert held[0]["t5/layers/wo/kernel"] == [(1, 32, 16)] * 4 and held[1]["t5/layers/wo/kernel"] == [(1, 8, 16)] * 4
    for path, shapes in held[1].items():
        assert math.prod(shapes[0]) * (4 if path in kernels else 1) == math.prod(held[0][path][0])


# --- what is refused, and what is warned of ---------------------------------------------------------------------------


def test_shards_that_fit():
    assert sharding.shards_that_fit((3072, 4096, 12288), 12) == [1, 2, 4]
    assert sharding.shards_that_fit((3072, 15360), 12) == [1, 2, 3, 4, 6, 12]
    assert sharding.shards_that_fit((), 3) == [1, 3]
    spec = {"norm1": {"linear": {"kernel": (2, 5, 6)}}, "to_q": {"kernel": (2, 10, 4), "bias": (2, 4)}}
    spec = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, "float32"), spec, is_leaf=lambda x: isinstance(x, tuple))
    assert sharding.cuts(spec) == {"norm1/linear/kernel": 6, "to_q/kernel": 10}


@pytest.mark.parametrize("how", ["train", "eval", "sample"])
def test_what_does_not_divide_is_refused_before_anything_is_read(built, how, monkeypatch):
    cfg, _ = built("flux")
    cfg = dataclasses.replace(cfg, shard=3, prompts=3, kept=4, learn=dataclasses.replace(cfg.learn, updates=1))
    cfg = config.override(cfg, **{"explore.precision": "auto"})  # only a training run chooses it
    for owner, name in ((weights, "load"), (assemble, "open_rewards"), (assemble, "open_prompts")):
        monkeypatch.setattr(owner, name, None)
    opened = {"train": assemble.assemble, "eval": assemble.for_evaluation, "sample": assemble.for_drawing}[how]
    message = r"^shard=3 does not divide an axis of \w+/attn/to_k/kernel \(32\): use one of \[1\]$"
    with pytest.raises(ConfigError, match=message):
        opened(cfg, 3)


def test_quantised_kernels_are_cut_by_output(monkeypatch):
    """A kernel whose inputs divide and whose outputs do not; and a text encoder's, which is never quantised."""
    rule = structs.QuantRule((), 0)
    model = types.SimpleNamespace(quant_rules=structs.QuantRules(rule, rule))

    def shapes(inputs):
        def kernel(*shape):
            return {"q": {"kernel": jax.ShapeDtypeStruct(shape, "float32")}}

        return lambda cfg: (kernel(2, 8, 6), kernel(2, 3, 3), {"t5": kernel(2, inputs, 3)})

    module = types.SimpleNamespace(shapes=shapes(12), make=lambda cfg: model)
    monkeypatch.setattr(assemble, "model_module", lambda cfg: module)
    cfg, mesh = config.load("tiny"), sharding.make_mesh(4, 4)
    with pytest.raises(ConfigError, match=r"^shard=4 does not .* q/kernel, quantised \(6\): use one of \[1, 2\]$"):
        assemble.check_shard(cfg, mesh, "nvfp4_emulated")
    assemble.check_shard(cfg, mesh)
    module.shapes = shapes(6)
    with pytest.raises(ConfigError, match=r"^shard=4 does not divide an axis of t5/q/kernel \(6\): .* \[1, 2\]$"):
        assemble.check_shard(cfg, mesh)


def test_weights_over_several_hosts_are_warned_of(built, monkeypatch):
    """A quarter of the kernels is here; three quarters come over the network."""
    cfg, (base, _, _) = built("flux")
    parts = nano.parts_of(dataclasses.replace(cfg, shard=4), 4)
    assert assemble.network(parts) == []
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    size = sum(x.nbytes for path, x in leaves_by_path(base).items() if path in sharding.cuts(base))
    assert assemble.notes(parts)[-1 - len(device.notes())] == (
        f"shard=4, but this host has 2 devices: in each forward pass a device fetches up to {size * 3 / 4e9:.3g} GB of "
        f"the base over the network: use shard=2 or less, or fewer, larger devices"
    )
