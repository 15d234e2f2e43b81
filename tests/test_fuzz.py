"""Damaged and hostile files, prompts, overrides: our own error or a sound result, no code run, no memory blown up."""

import dataclasses
import io
import json
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from solrl_jax import config, weights
from solrl_jax.config import ConfigError
from solrl_jax.run import base_loras, data
from solrl_jax.run.data import DataError
from solrl_jax.structs import WeightsError
from solrl_jax.weights import lora_content, torch_file
from tests import toy_world

QUICK = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MOST = 32 * 2**20
"""Bytes that a file of a few hundred may make us take."""

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.ones(5, ml_dtypes.bfloat16),
    "c.lora_A.weight": np.zeros((2, 4), np.float16),
}
SAFETENSORS = save(TENSORS)


def saved_by_torch() -> bytes:
    out = io.BytesIO()
    torch.save({"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}, out)
    return out.getvalue()


TORCH = saved_by_torch()


@st.composite
def damaged(draw, whole: bytes):
    """`whole` with some bytes changed, cut out, doubled or put in."""
    found = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(found) - 1)))
        kind, size = draw(st.sampled_from(("change", "cut", "double", "put"))), draw(st.integers(1, 24))
        if kind == "change":
            found[at : at + size] = draw(st.binary(min_size=size, max_size=size))
        elif kind == "cut":
            del found[at : at + size]
        elif kind == "double":
            found[at:at] = found[at : at + size]
        else:
            found[at:at] = draw(st.binary(min_size=1, max_size=size))
    return bytes(found)


def careful(f, *errors):
    """f(), whose only errors are ours, within MOST bytes."""
    tracemalloc.start()
    try:
        return f()
    except errors as e:
        assert str(e) and "\x00" not in str(e)
        return None
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < MOST, f"{most} bytes"


def read_all(file: Path):
    files = weights.Files(file)
    return {key: (files.shape(key), files[key].shape) for key in files.keys()}  # noqa: SIM118 - not a dict


@QUICK
@given(damaged(SAFETENSORS))
def test_damaged_safetensors(tmp_path, content):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    found = careful(lambda: read_all(file), WeightsError)
    assert found is None or all(a == b for a, b in found.values())
    careful(lambda: lora_content.read(file), WeightsError)


PAIR = {"transformer.to_q.lora_A.weight": np.ones((2, 4), np.float32)}
PAIR |= {"transformer.to_q.lora_B.weight": np.ones((6, 2), np.float32), "transformer.to_q.alpha": np.float32([2])}


@QUICK
@given(damaged(save(PAIR, {"solrl_jax": '{"holds": ["00"]}'})), st.sampled_from(["", ":0.5", ":1e29", ":-3"]))
def test_damaged_loras_to_begin_from(tmp_path, content, scale):
    """Our error, or a finite set for the model's one Linear."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    model = toy_world.TOY._replace(init=lambda key: {"to_q": {"kernel": jnp.zeros((4, 6))}})
    found = careful(lambda: base_loras.read(config.Model(lora=(f"{file}{scale}",)), model), WeightsError)
    if found is not None:
        assert found.adapter["to_q"]["b"].shape == (2, 6) and found.origins[0].sha256.keys() == {"x.safetensors"}
        assert all(np.isfinite(x).all() for x in found.adapter["to_q"].values())


@QUICK
@given(st.text(st.sampled_from("ab/:\\.0159-+e "), max_size=12))
def test_any_entry_of_a_lora(text):
    """A file and a finite scale that is not 0, which together are the entry; or ConfigError."""
    try:
        file, scale = config.lora_entry(text)
    except ConfigError as e:
        assert f"model.lora={text}" in str(e) or f"model.lora={text!r}" in str(e)
    else:
        assert file and np.isfinite(scale) and scale
        assert text == file or (text.startswith(f"{file}:") and float(text.removeprefix(f"{file}:")) == scale)


NUMBER = st.one_of(st.integers(-3, 10), st.sampled_from([2**31, 2**40, 2**62, 2**64, -(2**63)]))


@QUICK
@given(
    st.lists(
        st.tuples(st.sampled_from(["F32", "BF16", "I64", "F4", "???"]), st.lists(NUMBER, max_size=4), NUMBER, NUMBER),
        max_size=3,
    ),
    NUMBER,
)
def test_lying_headers(tmp_path, rows, size):
    """Shapes, offsets and a header's length that the file does not have."""
    header = {f"t{i}": {"dtype": d, "shape": s, "data_offsets": [a, b]} for i, (d, s, a, b) in enumerate(rows)}
    text = json.dumps(header).encode()
    file = tmp_path / "x.safetensors"
    for length in (len(text), size % 2**64):
        file.write_bytes(struct.pack("<Q", length) + text + bytes(64))
        careful(lambda: read_all(file), WeightsError)


@QUICK
@given(damaged(TORCH))
def test_damaged_pickles(tmp_path, content):
    file = tmp_path / "x.pt"
    file.write_bytes(content)
    found = careful(lambda: torch_file.read(file), WeightsError)
    assert found is None or all(isinstance(x, np.ndarray) for x in found.values())


def repacked(pickled: bytes) -> bytes:
    """torch's file with another data.pkl."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(TORCH)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, pickled if entry.filename.endswith("data.pkl") else old.read(entry))
    return out.getvalue()


def description() -> bytes:
    with zipfile.ZipFile(io.BytesIO(TORCH)) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))


@QUICK
@given(damaged(description()))
def test_damaged_descriptions_in_a_whole_file(tmp_path, content):
    file = tmp_path / "x.pt"
    file.write_bytes(repacked(content))
    found = careful(lambda: torch_file.read(file), WeightsError)
    assert found is None or all(isinstance(x, np.ndarray) and x.size <= 17 for x in found.values())


class Evil:
    ran = False

    def __reduce__(self):
        return exec, ("import tests.test_fuzz as t; t.Evil.ran = True",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps({"a": Evil()}, 2), "builtin.*exec, which is not part of a tensor"),
        (pickle.dumps(Evil(), 4), "exec, which is not part of a tensor"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "its pickle has LONG_BINPUT '2147483647'"),  # a memo of 34 GB
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.", "is not a complete file|BYTEARRAY8"),
        (b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00echo\x85R.", "os.system, which is not part of a tensor"),
        (b"\x80\x02(cos\nsystem\no.", "its pickle has OBJ"),
        (b"\x80\x02(ios\nsystem\n.", "its pickle has INST|is not a complete file"),
        (b"\x80\x02\x82\x01.", "its pickle has EXT1"),
        (b"\x80\x02}}b.", "not a complete file|holds"),
    ],
)
def test_hostile_pickles(tmp_path, content, said):
    """Nothing runs, nothing large is reserved, and it is said what the file asks for."""
    file = tmp_path / "x.pt"
    file.write_bytes(repacked(content))
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=said):
            torch_file.read(file)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()
    assert not Evil.ran


def test_a_bomb_is_not_unpacked(tmp_path):
    """A gigabyte of one letter, compressed to one megabyte, as the description."""
    file = tmp_path / "x.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02X\xff\xff\xff\x0f" + bytes(2**26))
    with pytest.raises(WeightsError, match=r"is compressed, which torch\.save never does"):
        torch_file.read(file)


@QUICK
@given(st.binary(max_size=300), st.sampled_from([".txt", ".jsonl"]))
def test_any_bytes_as_prompts(tmp_path, content, ending):
    file = tmp_path / f"p{ending}"
    file.write_bytes(content)
    found = careful(lambda: data.read(file), DataError)
    if found is not None:
        assert (
            found.train and all(p == p.strip() and p for p in found.train) and len(set(found.train)) == len(found.train)
        )


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


@QUICK
@given(st.lists(st.one_of(JSON, st.fixed_dictionaries({"prompt": JSON})), min_size=1, max_size=4))
def test_any_json_as_prompts(tmp_path, rows):
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    careful(lambda: data.read(file), DataError)
    careful(lambda: data.read_captions(file), DataError)


FIELDS = [name for name, _ in config.values(config.Config())]


@QUICK
@given(
    st.dictionaries(
        st.one_of(st.sampled_from(FIELDS), st.text(max_size=12)),
        st.one_of(st.text(max_size=12), st.sampled_from(["0", "-1", "nan", "inf", "1e999", "none", "true", "9" * 400])),
        min_size=1,
        max_size=3,
    )
)
def test_any_override(changes):
    """A config that holds its own rules, or ConfigError in one line."""
    try:
        made = config.override(config.Config(), **changes)
    except ConfigError as e:
        assert str(e)
    else:
        assert config.from_json(config.to_json(made)) == made or "nan" in str(changes).lower()


SMALL_CONFIG = st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(config.Config)]), JSON, max_size=3)


@QUICK
@given(st.one_of(JSON, SMALL_CONFIG, st.fixed_dictionaries({"learn": SMALL_CONFIG, "explore": JSON})))
def test_any_json_as_a_config(value):
    try:
        made = config.from_json(json.dumps(value))
    except ConfigError as e:
        assert str(e)
    else:
        assert isinstance(made, config.Config) and isinstance(value, dict)
