"""Converted weights equal those of the public folder, on any mesh; damage and other configs are reported."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import types
import weakref
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding

from solrl_jax import config, sharding
from solrl_jax.models import flux
from solrl_jax.run import assemble, checkpoint, convert
from solrl_jax.structs import leaves_by_path
from solrl_jax.weights import Source, WeightsError
from tests import nano


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    return tmp_path_factory.mktemp("nano")


@pytest.fixture(scope="module")
def converted(public, tmp_path_factory):
    out, cfg = tmp_path_factory.mktemp("out") / "converted", nano.build(public)
    convert.convert(flux, cfg.model, out)
    return out


def moved(cfg, folder):
    return config.override(cfg, **{"model.path": folder})


@pytest.mark.parametrize("devices", [1, 4])
def test_the_same_weights_on_any_mesh(public, converted, devices):
    cfg, mesh = nano.build(public), sharding.make_mesh(devices)
    read, again = (assemble.open_weights(c, mesh) for c in (cfg, moved(cfg, converted)))
    assert jax.tree.structure(read) == jax.tree.structure(again)
    for one, two in zip(jax.tree.leaves(read), jax.tree.leaves(again), strict=True):
        assert (one.dtype, np.asarray(one).tobytes()) == (two.dtype, np.asarray(two).tobytes())
    where = sharding.specs_of(again[0]), jax.tree.map(lambda x: sharding.WHOLE, again[1])
    assert jax.tree.map(lambda x: x.sharding, again[:2]) == jax.tree.map(lambda s: NamedSharding(mesh, s), where)
    assert {type(x) for x in jax.tree.leaves(again[2])} == {np.ndarray}


def test_it_is_a_model_folder_and_names_its_sources(public, converted):
    source = Path(nano.build(public).model.path)
    read = list(source.rglob("*.safetensors"))
    assert len(read) == 4 and not list(converted.rglob("*.safetensors"))
    tokens = [
        flux.make(moved(nano.build(public), folder).model).tokenize(nano.PROMPTS) for folder in (source, converted)
    ]
    jax.tree.map(np.testing.assert_array_equal, *tokens)
    found = json.loads((converted / "weights.json").read_text())
    files = {f.relative_to(source).as_posix(): f for f in read}
    assert found["made from"] == {name: hashlib.sha256(f.read_bytes()).hexdigest() for name, f in files.items()}
    assert found["tree"].keys() and all(k.split("/")[0] in convert.NAMES for k in found["tree"])


def test_a_flipped_byte_and_another_config_are_named(public, converted, tmp_path):
    cfg, mesh = moved(nano.build(public), tmp_path / "copy"), sharding.make_mesh(1)
    shutil.copytree(converted, tmp_path / "copy")
    with pytest.raises(
        WeightsError, match=r"converted for another config: base/.* is float32\[.* there and bfloat16\[.*"
    ):
        assemble.open_weights(config.override(cfg, **{"model.dtype": "bfloat16"}), mesh)
    file = max((tmp_path / "copy" / "weights").rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsError, match=rf"{file.name} is not what was written \(SHA-256; 1 such\): convert again"):
        assemble.open_weights(cfg, mesh)
    found = json.loads((tmp_path / "copy" / "weights.json").read_text())
    found["leaves"].popitem()
    for text in ("{", "[]", "[" * 100_000, json.dumps(found)):
        (tmp_path / "copy" / "weights.json").write_text(text)
        with pytest.raises(WeightsError, match=r"weights.json cannot be read"):
            assemble.open_weights(cfg, mesh)


def test_leaves_of_every_shape_come_back(tmp_path):
    """Scalars, an empty axis, a transposed view, in bfloat16."""
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(ml_dtypes.bfloat16)
    tree = {
        "base": {"a": x.T, "b": np.array(x[0, 0]), "c": np.zeros((0, 4), np.float32)},
        "vae": {"d": x},
        "text": {},
    }
    (tmp_path / "weights").mkdir()

    def save(leaf):
        source = Source(leaf.shape, leaf.dtype, leaf.__getitem__)
        return convert._save(tmp_path / "weights" / f"{id(leaf)}", source)

    kept = jax.tree.map(save, tree)
    found = {"version": 2, "tree": checkpoint.describe(tree), "files": convert.hashes(tmp_path, tmp_path.rglob("*"))}
    found["leaves"] = {path: leaf.file for path, leaf in leaves_by_path(kept).items()}
    (tmp_path / "weights.json").write_text(json.dumps(found))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    read = convert.restore(tmp_path, tuple(shapes[name] for name in convert.NAMES), sharding.make_mesh(4))
    for one, two in zip(
        jax.tree.leaves(tree), jax.tree.leaves(dict(zip(convert.NAMES, read, strict=True))), strict=True
    ):
        assert (one.shape, one.dtype, one.tobytes()) == (two.shape, two.dtype, np.asarray(two).tobytes())


def test_nothing_is_overwritten_and_a_cut_conversion_leaves_nothing(public, converted, tmp_path, monkeypatch):
    cfg = nano.build(public)
    with pytest.raises(config.ConfigError, match="is not empty: give a new folder"):
        convert.convert(flux, cfg.model, converted)

    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "hashes", fails)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(flux, cfg.model, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


class Unread:
    """A model with 34 GB of weights, which must not be read."""

    @staticmethod
    def shapes(cfg):
        return jax.ShapeDtypeStruct((17 * 10**9,), "bfloat16"), {}, {}

    def __getattr__(self, name):
        raise AssertionError(f"{name} was asked for")


def test_what_can_be_known_is_told_before_anything_is_read(tmp_path, monkeypatch):
    model = config.Model(path="org/absent")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 35 * 10**9))
    with pytest.raises(WeightsError, match=r"full: 34\.0 GB are needed, 35\.0 GB are free there$"):
        convert.convert(Unread(), model, tmp_path / "full")
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match=rf"{tmp_path}/file/a/b: {tmp_path}/file is not a folder that can be"):
        convert.convert(object(), model, tmp_path / "file" / "a" / "b")
    with pytest.raises(config.ConfigError, match="is not empty"):
        convert.convert(object(), model, tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(WeightsError, match=f"new: {tmp_path} is not a folder that can be written to"):
        convert.convert(object(), model, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "/disk/x"), "^/disk/x: No space left on device$"),
        (OSError(28, "No space left on device"), "out: No space left on device$"),
        (PermissionError(13, "Permission denied"), "out: Permission denied$"),
    ],
)
def test_what_the_disk_refuses_midway_is_one_line(public, tmp_path, monkeypatch, error, message):
    def refused(file, leaf, write=convert._save):
        if file.name == "0070":
            raise error
        return write(file, leaf)

    monkeypatch.setattr(convert, "_save", refused)
    with pytest.raises(WeightsError, match=message):
        convert.convert(flux, nano.build(public).model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_defect_is_not_the_disks(public, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "_save", lambda file, leaf: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        convert.convert(flux, nano.build(public).model, tmp_path / "out")


def test_a_folder_that_cannot_be_read_back_is_told(public, converted, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied", "weights/x")

    monkeypatch.setattr(convert, "hashes", denied)
    with pytest.raises(WeightsError, match=r"^weights/x: Permission denied$"):
        assemble.open_weights(moved(nano.build(public), converted), sharding.make_mesh(1))


def test_one_leaf_is_held_at_a_time_and_other_checkpoints_are_not_hashed(public, tmp_path):
    cfg, alive, counts = nano.build(public), [], []
    shutil.copytree(cfg.model.path, tmp_path / "clone")
    (tmp_path / "clone" / "flux1-dev.safetensors").write_bytes(b"24 GB")
    (tmp_path / "clone" / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")

    def watched(place):
        def call(path, leaf):
            def read(at):
                counts.append(sum(x() is not None for x in alive))
                alive.append(weakref.ref(part := leaf.read(at)))
                return part

            return place(path, leaf._replace(read=read))

        return call

    def parts(cfg, *places):
        return flux.parts(cfg, *map(watched, places))

    module = types.SimpleNamespace(parts=parts, shapes=flux.shapes)
    convert.convert(module, moved(cfg, tmp_path / "clone").model, tmp_path / "out")
    assert len(counts) == len(jax.tree.leaves(flux.shapes(cfg.model))) > 150 and set(counts) == {0}
    names = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    names |= dict.fromkeys(("text_encoder", "text_encoder_2"), "model")
    found = json.loads((tmp_path / "out" / "weights.json").read_text())["made from"]
    assert found.keys() == {f"{part}/{stem}.safetensors" for part, stem in names.items()}


@pytest.mark.slow
def test_folders_of_version_1_are_read(public, converted, tmp_path):
    """Version 1 has a tree written by orbax in weights/<name> and no version in weights.json. Version 3 is refused."""
    cfg, mesh = moved(nano.build(public), tmp_path / "first"), sharding.make_mesh(4, 2)
    shutil.copytree(converted, tmp_path / "first", ignore=shutil.ignore_patterns("weights"))
    trees = convert.restore(converted, flux.shapes(cfg.model), mesh)
    for name, tree in zip(convert.NAMES, trees, strict=True):
        checkpoint.save_tree(tmp_path / "first" / "weights" / name, tree)
    file = tmp_path / "first" / "weights.json"
    found = json.loads(file.read_text())
    del found["version"], found["leaves"]
    found["files"] = convert.hashes(tmp_path / "first", (tmp_path / "first" / "weights").rglob("*"))
    file.write_text(json.dumps(found))
    read = assemble.open_weights(cfg, mesh)
    for one, two in zip(jax.tree.leaves(trees), jax.tree.leaves(read), strict=True):
        assert (one.dtype, type(one), np.asarray(one).tobytes()) == (two.dtype, type(two), np.asarray(two).tobytes())
    assert jax.tree.map(lambda x: x.sharding, read[:2]) == jax.tree.map(lambda x: x.sharding, trees[:2])
    file.write_text(json.dumps(found | {"version": 3}))
    with pytest.raises(WeightsError, match=r"weights.json has version 3, solrl_jax reads up to 2: convert again$"):
        assemble.open_weights(cfg, mesh)


MEASURE = """
import sys
from pathlib import Path
from solrl_jax import config
from solrl_jax.run import convert
from solrl_jax.models import flux

def most():  # of this program only: ru_maxrss starts at that of the parent process
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) * 1024

cfg = config.from_json(Path(sys.argv[1]).read_text()).model
flux.shapes(cfg), flux.make(cfg).tokenize(["a red circle"])
before = most()
convert.convert(flux, cfg, Path(sys.argv[2]))
print(before, most())
"""


@pytest.mark.slow
def test_the_host_holds_a_leaf_not_a_tree(tmp_path):
    """Of 0.6 GB, with a largest leaf of 84 MB: beyond its imports, the process needs one leaf and the file being read.

    When whole trees were written, it needed 1.9 times the largest tree, 1.07 GB.
    """
    larger = {
        "transformer": {"num_layers": 4, "num_single_layers": 8, "attention_head_dim": 128, "num_attention_heads": 8},
        "text_encoder_2": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 24, "num_heads": 8},
    }
    configs = {name: {**values, **larger.get(name, {})} for name, values in nano.CONFIGS.items()}
    configs["transformer"] |= {"axes_dims_rope": [16, 56, 56], "joint_attention_dim": 512}
    cfg = nano.build(tmp_path, configs)
    (tmp_path / "config.json").write_text(config.to_json(config.override(cfg, **{"model.dtype": "bfloat16"})))
    given = [sys.executable, "-c", MEASURE, str(tmp_path / "config.json"), str(tmp_path / "out")]
    before, most = map(int, subprocess.check_output(given, text=True, env=os.environ | {"XLA_FLAGS": ""}).split())
    trees = flux.shapes(config.override(cfg, **{"model.dtype": "bfloat16"}).model)
    tree = max(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(t)) for t in trees)
    leaf = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))
    print(f"largest tree {tree / 1e6:.0f} MB, largest leaf {leaf / 1e6:.0f} MB, taken {(most - before) / 1e6:.0f} MB")
    assert tree > 5e8 > 5 * leaf
    assert most - before < leaf + 160e6 < tree / 2
