"""Converted weights: what the public folder gives, on any mesh, with hashes; damage and other configs are told."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from solrl_jax import assemble, config, convert, sharding
from solrl_jax.models import flux
from solrl_jax.weights import WeightsError
from tests import nano


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    return tmp_path_factory.mktemp("nano")


@pytest.fixture(scope="module")
def converted(public, tmp_path_factory):
    out, cfg = tmp_path_factory.mktemp("out") / "converted", nano.build(public)
    convert.convert(flux.load(cfg.model), Path(cfg.model.path), out)
    return out


def moved(cfg, folder):
    return config.override(cfg, **{"model.path": folder})


@pytest.mark.parametrize("devices", [1, 4])
def test_the_same_weights_on_any_mesh(public, converted, devices):
    cfg, mesh = nano.build(public), sharding.make_mesh(devices)
    read, again = (assemble.read_weights(c, mesh) for c in (cfg, moved(cfg, converted)))
    assert jax.tree.structure(read) == jax.tree.structure(again)
    for one, two in zip(jax.tree.leaves(read), jax.tree.leaves(again), strict=True):
        assert (one.dtype, np.asarray(one).tobytes()) == (two.dtype, np.asarray(two).tobytes())
    assert all(x.sharding == NamedSharding(mesh, sharding.WHOLE) for x in jax.tree.leaves(again[:2]))
    assert {type(x) for x in jax.tree.leaves(again[2])} == {np.ndarray}


def test_it_is_a_model_folder_and_names_its_sources(public, converted):
    source = Path(nano.build(public).model.path)
    tokens = [
        flux.make(moved(nano.build(public), folder).model).tokenize(nano.PROMPTS) for folder in (source, converted)
    ]
    jax.tree.map(np.testing.assert_array_equal, *tokens)
    assert not list(converted.rglob("*.safetensors"))
    found = json.loads((converted / "weights.json").read_text())
    files = {f.relative_to(source).as_posix(): f for f in source.rglob("*.safetensors")}
    assert found["made from"] == {name: hashlib.sha256(f.read_bytes()).hexdigest() for name, f in files.items()}
    assert found["tree"].keys() and all(k.split("/")[0] in convert.NAMES for k in found["tree"])


def test_a_flipped_byte_and_another_config_are_named(public, converted, tmp_path):
    cfg, mesh = moved(nano.build(public), tmp_path / "copy"), sharding.make_mesh(1)
    shutil.copytree(converted, tmp_path / "copy")
    with pytest.raises(
        WeightsError, match=r"converted for another config: base/.* is float32\[.* there and bfloat16\[.*"
    ):
        assemble.read_weights(config.override(cfg, **{"model.dtype": "bfloat16"}), mesh)
    file = max((tmp_path / "copy" / "weights").rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        WeightsError, match=rf"{file.name} is not what was written \(by SHA-256; 1 such\): convert again"
    ):
        assemble.read_weights(cfg, mesh)
    (tmp_path / "copy" / "weights.json").write_text("{")
    with pytest.raises(WeightsError, match=r"weights.json cannot be read"):
        assemble.read_weights(cfg, mesh)


def test_nothing_is_overwritten_and_a_cut_conversion_leaves_nothing(public, converted, tmp_path, monkeypatch):
    cfg = nano.build(public)
    trees, source = flux.load(cfg.model), Path(cfg.model.path)
    with pytest.raises(config.ConfigError, match="is not empty: give a new folder"):
        convert.convert(trees, source, converted)

    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "hashes", fails)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(trees, source, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(WeightsError, match=r"0\.0 GB are needed, 0\.0 GB are free"):
        convert.convert(trees, source, tmp_path / "full")
