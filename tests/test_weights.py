"""The key-table engine: trees and public files there and back, and what it says of files that do not fit."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from solrl_jax import weights
from solrl_jax.weights import Files, Rule, WeightsError

RULES = (
    Rule(r"blocks/(.+)/kernel", r"blocks.{layer}.\1.weight", "linear"),
    Rule(r"blocks/gain", "blocks.{layer}.gain"),
    Rule(r"conv/kernel", "conv.weight", "conv"),
    Rule(r"(.+)/kernel", r"\1.weight", "linear"),
    Rule(r"temperature", "logit_scale"),
    Rule(r"table", "table.weight"),
)
SHAPES = {
    "blocks": {"attn": {"q": {"kernel": (3, 4, 5)}}, "gain": (3,)},  # three layers, stacked
    "conv": {"kernel": (2, 3, 4, 6)},  # height, width, in, out
    "head": {"kernel": (5, 7)},  # in, out
    "table": (6, 2),
    "temperature": (),
}


def is_shape(x):
    return isinstance(x, tuple)


SPEC = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES, is_leaf=is_shape)


def tree_of(dtype=np.float32):
    """Random finite bits of `dtype`: nothing that rounds comes back the same."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda shape: np.asarray(rng.normal(0, 100, shape), dtype), SHAPES, is_leaf=is_shape)


@pytest.fixture
def folder(tmp_path):
    weights.save(tree_of(), RULES, tmp_path / "model.safetensors")
    return tmp_path


def load(folder, rules=RULES, **how):
    return weights.load(Files(folder, "model"), SPEC, rules, **how)


def change(folder, **changes):
    """The file with some tensors replaced; None takes one out."""
    stored = load_file(folder / "model.safetensors") | changes
    save_file({key: x for key, x in stored.items() if x is not None}, folder / "model.safetensors")


def identical(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


# --- there and back -------------------------------------------------------------------------------------------------


def test_layouts(folder):
    tree, stored = tree_of(), load_file(folder / "model.safetensors")
    names = [f"blocks.{i}.{part}" for i in range(3) for part in ("attn.q.weight", "gain")]
    assert stored.keys() == {*names, "conv.weight", "head.weight", "table.weight", "logit_scale"}
    assert stored["blocks.2.attn.q.weight"].shape == (5, 4)  # out, in
    assert stored["blocks.2.attn.q.weight"][3, 1] == tree["blocks"]["attn"]["q"]["kernel"][2, 1, 3]
    assert stored["blocks.1.gain"].shape == () and stored["blocks.1.gain"] == tree["blocks"]["gain"][1]
    assert stored["conv.weight"].shape == (6, 4, 2, 3)  # out, in, height, width
    assert stored["conv.weight"][5, 3, 1, 2] == tree["conv"]["kernel"][1, 2, 3, 5]
    assert stored["head.weight"].shape == (7, 5)
    assert stored["table.weight"].shape == (6, 2)
    assert stored["logit_scale"].shape == () and stored["logit_scale"] == tree["temperature"]


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_there_and_back(tmp_path, dtype):
    weights.save(tree_of(dtype), RULES, tmp_path / "model.safetensors")
    found = load(tmp_path)
    identical(found, tree_of(dtype))
    weights.save(jax.tree.map(jnp.asarray, found), RULES, tmp_path / "again.safetensors")  # device arrays too
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_dtypes(folder):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree_of())
    identical(load(folder, dtype=jnp.bfloat16), half)
    weights.save(tree_of(), RULES, folder / "model.safetensors", dtype=jnp.bfloat16)
    assert {x.dtype for x in load_file(folder / "model.safetensors").values()} == {np.dtype(jnp.bfloat16)}
    identical(load(folder), half)
    identical(load(folder, dtype=np.float32), jax.tree.map(np.float32, half))


def test_a_leaf_is_placed_as_soon_as_it_is_read(tmp_path):
    """The host holds one stack of layers and one layer more, whatever the size of the whole."""
    layers, width, blocks = 8, 256, 6
    rules = [Rule(r"(.+)/kernel", r"\1.{layer}.weight", "linear")]
    tree = {f"block{i}": {"kernel": np.full((layers, width, width), i, np.float32)} for i in range(blocks)}
    weights.save(tree, rules, tmp_path / "model.safetensors")
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    files, seen = Files(tmp_path, "model"), []

    def look(x):
        seen.append((x.shape, float(x.mean())))

    tracemalloc.start()
    weights.load(files, spec, rules, dtype=np.float32, place=lambda _, leaf: look(leaf.whole()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == [((layers, width, width), float(i)) for i in range(blocks)]
    stack = layers * width * width * 4
    assert stack < peak < 1.5 * stack
    assert not files._open  # nothing stays mapped


@pytest.mark.parametrize(("mapped", "opened"), [(2**26, 5), (159, 6), (0, 9)])
def test_maps_are_closed_within_a_stack(folder, monkeypatch, mapped, opened):
    """What was read from a map is no second copy of the stack. Of six leaves two are stacks of three layers, of 80 and
    of 4 bytes each; the first leaf's map is open already, and a map is closed with each leaf in any case."""
    monkeypatch.setattr(weights, "MAPPED", mapped)
    files, times = Files(folder, "model"), []
    handle = files._handle

    def watched(file):
        times.append(file not in files._open)
        return handle(file)

    monkeypatch.setattr(files, "_handle", watched)
    identical(weights.load(files, SPEC, RULES, dtype=np.float32), tree_of())
    assert sum(times) == opened


def test_folders_are_made(tmp_path):
    weights.save(tree_of(), RULES, tmp_path / "a" / "b" / "model.safetensors", metadata={"made": "here"})
    from safetensors import safe_open

    with safe_open(tmp_path / "a" / "b" / "model.safetensors", "numpy") as f:
        assert f.metadata() == {"format": "pt", "made": "here"}
    identical(load(tmp_path / "a" / "b"), tree_of())


# --- the table ------------------------------------------------------------------------------------------------------


def test_needed():
    found = {leaf.path: leaf for leaf in weights.needed(SPEC, RULES)}
    q = found["blocks/attn/q/kernel"]
    assert (q.keys, q.stacked, q.layout) == (tuple(f"blocks.{i}.attn.q.weight" for i in range(3)), True, "linear")
    assert found["head/kernel"][1:6] == (("head.weight",), False, "linear", (0, 1), (5, 7))
    assert found["temperature"][1:6] == (("logit_scale",), False, "same", (0, 1), ())


def test_first_rule_wins(folder):
    change(folder, **{"head.weight": None, "top.weight": np.zeros((5, 7), np.float32)})
    found = load(folder, (Rule("head/kernel", "top.weight"), *RULES))
    assert (found["head"]["kernel"] == 0).all()


@pytest.mark.parametrize("rules", [RULES[:-1], (*RULES[:-1], Rule("tabl", "x"), Rule("able", "x"))])
def test_path_without_a_rule(folder, rules):
    for use in (lambda: load(folder, rules), lambda: weights.save(tree_of(), rules, folder / "out.safetensors")):
        with pytest.raises(WeightsError, match="no rule of the key table matches parameter 'table'"):
            use()
    assert not (folder / "out.safetensors").exists()


def test_aliases(folder):
    stored = load_file(folder / "model.safetensors")
    old = {key.replace("head", "module.top").replace("blocks", "h"): x for key, x in stored.items()}
    save_file(old, folder / "model.safetensors")
    aliases = ((r"^h\.", "blocks."), (r"^module\.", ""), (r"^top\.", "head."))  # one after the other
    identical(load(folder, aliases=aliases), tree_of())
    with pytest.raises(WeightsError, match=r"unused module\.top\.weight"):
        load(folder, aliases=aliases[:1])


def test_droppable(folder):
    change(folder, **{"position_ids": np.arange(3), "encoder.x": np.ones(1, np.float32)})
    identical(load(folder, droppable=(r"position_ids", r"encoder\..*")), tree_of())
    with pytest.raises(WeightsError, match=r"unused encoder\.x$"):
        load(folder, droppable=(r"position_ids", "encoder"))  # the whole name must match


def test_two_spellings_of_one_key_are_told(folder):
    other = np.ones((7, 5), np.float32)
    change(folder, **{"module.head.weight": other})
    aliases = ((r"^module\.", ""),)
    with pytest.raises(WeightsError) as e:
        load(folder, aliases=aliases)
    assert [line.strip() for line in str(e.value).splitlines()[1:]] == [
        "head.weight and module.head.weight are the same, head.weight"
    ]
    identical(load(folder, aliases=aliases, copies=("head.weight",)), tree_of())  # the table's own spelling is read
    change(folder, **{"head.weight": None, "a.head.weight": other})
    aliases = ((r"^(module|a)\.", ""),)
    assert (load(folder, aliases=aliases, copies=("head.weight",))["head"]["kernel"] == 1).all()


def test_a_key_of_two_shards_is_told(folder):
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"head.weight": stored["head.weight"]}, folder / "b.safetensors")
    index = {"weight_map": dict.fromkeys(stored, "a.safetensors") | {"head.weight": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r":\n  head.weight is in a.safetensors and in b.safetensors$"):
        load(folder)


def test_all_problems_at_once(folder):
    changes = {"blocks.1.gain": None, "extra": np.ones(1, np.float32), "table.weight": np.ones((2, 6), np.float32)}
    changes |= {"blocks.2.attn.q.weight": np.ones((5, 3), np.float32), "logit_scale": np.ones(1, np.float32)}
    change(folder, **changes)
    with pytest.raises(WeightsError) as e:
        load(folder)
    first, *lines = (line.strip() for line in str(e.value).splitlines())
    assert first.startswith(str(folder))
    assert lines == [
        "missing blocks.1.gain",
        "unused extra",
        "blocks.2.attn.q.weight has shape (3, 5), not (4, 5)",  # as here: [in, out]
        "table.weight has shape (2, 6), not (6, 2)",
        "logit_scale has shape (1,), not ()",
    ]


def test_layers_that_lack(folder):
    """A shallower checkpoint, and a kernel that is no matrix."""
    change(folder, **{"blocks.2.gain": None, "blocks.2.attn.q.weight": None, "head.weight": np.ones(35, np.float32)})
    with pytest.raises(WeightsError) as e:
        load(folder)
    assert [line.strip() for line in str(e.value).splitlines()[1:]] == [
        "missing blocks.2.attn.q.weight",
        "missing blocks.2.gain",
        "head.weight has shape (35,), not (5, 7)",
    ]


@pytest.mark.parametrize(("kind", "name"), [(ml_dtypes.float8_e4m3fn, "F8_E4M3"), (np.int8, "I8"), (np.uint8, "U8")])
def test_quantised_weights_are_told(folder, kind, name):
    """Their codes are not weights without scales, which are kept in many ways; numpy cannot read the first at all."""
    stored = load_file(folder / "model.safetensors")
    change(folder, **{f"blocks.{i}.gain": stored[f"blocks.{i}.gain"].astype(kind) for i in range(3)})
    message = rf"its config describes:\n  blocks.0.gain is stored as {name}, as 2 others: numbers of another type"
    with pytest.raises(WeightsError, match=message):
        load(folder)


def test_quantised_weights_of_torch_are_told(tmp_path):
    torch.save({"logit_scale": torch.tensor(3, dtype=torch.int8)}, tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=r"logit_scale is stored as int8: numbers of another type than floats"):
        weights.load(Files(tmp_path / "model.pt"), {"temperature": SPEC["temperature"]}, RULES)


def test_long_lists_are_cut(folder):
    change(folder, **{f"extra_{i:02d}": np.ones(1, np.float32) for i in range(40)})
    with pytest.raises(WeightsError, match=r"unused extra_11\n  and 28 more"):
        load(folder)


# --- fused tensors --------------------------------------------------------------------------------------------------

FUSED = (
    Rule(r"(q)/kernel", "{layer}.in_proj", "linear", (0, 3)),
    Rule(r"(k)/kernel", "{layer}.in_proj", "linear", (1, 3)),
    Rule(r"(v)/kernel", "{layer}.in_proj", "linear", (2, 3)),
)


def test_parts_of_one_tensor(tmp_path):
    """q, k and v are rows 0-3, 4-7 and 8-11 of what is stored; saved again it is the same."""
    stored = {f"{i}.in_proj": np.arange(60, dtype=np.float32).reshape(12, 5) + 100 * i for i in range(2)}
    save_file(stored, tmp_path / "model.safetensors")
    spec = {name: {"kernel": jax.ShapeDtypeStruct((2, 5, 4), jnp.float32)} for name in "qkv"}
    tree = weights.load(Files(tmp_path, "model"), spec, FUSED)
    for i, name in enumerate("qkv"):
        np.testing.assert_array_equal(tree[name]["kernel"][1], stored["1.in_proj"][4 * i : 4 * i + 4].T)
    weights.save(tree, FUSED, tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == stored.keys()
    assert all(np.array_equal(again[key], stored[key]) for key in stored)


@pytest.mark.parametrize(
    ("rows", "message"),
    [(11, r"1.in_proj has shape \(5, 11\), not \(5, 4\)"), (9, r"1.in_proj has shape \(5, 3\), not \(5, 4\)")],
)
def test_a_fused_tensor_that_does_not_fit_is_named_once(tmp_path, rows, message):
    save_file({"1.in_proj": np.ones((rows, 5), np.float32)}, tmp_path / "model.safetensors")
    spec = {name: {"kernel": jax.ShapeDtypeStruct((2, 5, 4), jnp.float32)} for name in "qkv"}
    with pytest.raises(WeightsError, match=rf":\n  missing 0.in_proj\n  {message}$"):
        weights.load(Files(tmp_path, "model"), spec, FUSED)


# --- files ----------------------------------------------------------------------------------------------------------


def test_file_preference(tmp_path):
    """No variant before bf16 before fp16; of each, an index before a single file."""

    def index(variant):
        return f"model.safetensors.index{variant}.json"

    order = []
    for i, variant in enumerate(("", ".bf16", ".fp16")):
        shard = f"model{variant}-00001-of-00001.safetensors"
        save_file({f"{i}_shard": np.ones(1)}, tmp_path / shard)
        save_file({f"{i}_single": np.ones(1)}, tmp_path / f"model{variant}.safetensors")
        (tmp_path / index(variant)).write_text(json.dumps({"weight_map": {f"{i}_shard": shard}}))
        order += [(f"{i}_shard", index(variant)), (f"{i}_single", f"model{variant}.safetensors")]
    for key, file in order:
        assert list(Files(tmp_path, "model").keys()) == [key]
        (tmp_path / file).unlink()
    with pytest.raises(WeightsError, match=r"holds no model.safetensors \(nor an index.*no pytorch_model.bin"):
        Files(tmp_path, "model")


def test_shards(folder):
    stored = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    where = {key: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, (key, _) in enumerate(stored)}
    for file in set(where.values()):
        save_file({key: x for key, x in stored if where[key] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    identical(load(folder), tree_of())
    (folder / where["head.weight"]).unlink()
    with pytest.raises(WeightsError, match=f"{where['head.weight']} is in the index but does not exist"):
        load(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": null}', '{"weight_map": {"a": 1}}', b"\xff\xfe{", "[" * 100_000],
    ids=range(8),
)
def test_broken_index(folder, text):
    index = folder / "model.safetensors.index.json"
    index.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(WeightsError, match=r"index.json is not an index of weights .* download it again"):
        load(folder)


def test_an_index_that_names_a_directory(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"head.weight": "."}}))
    with pytest.raises(WeightsError, match=rf"^{folder} cannot be read: .*(No such device|Is a directory)"):
        load(folder)


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "config.json"])
def test_a_file_that_may_not_be_read(folder, file, monkeypatch):
    (folder / file).write_text("{}")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr("pathlib.Path.read_text", denied)
    with pytest.raises(WeightsError, match=rf"^{folder / file} cannot be read: Permission denied$"):
        load(folder) if "index" in file else weights.read_config(folder)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_truncated_file(folder, cut):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(WeightsError, match=r"model.safetensors is not a complete safetensors file"):
        load(folder)


def test_no_folder(tmp_path):
    with pytest.raises(WeightsError, match="nowhere is neither a directory"):
        Files(tmp_path / "nowhere", "model")


# --- config.json ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sizes:
    width: int = 8
    stages: tuple[int, ...] = (1, 2)
    scale: float = 0.5
    offset: int = 0
    exact: bool = True
    name: str = "a"

    def __post_init__(self):
        if self.width % 2:
            raise ValueError(f"width {self.width} is odd")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{}", Sizes()),
        ('{"width": 6, "stages": [3, 4, 5], "_class_name": "X"}', Sizes(6, (3, 4, 5))),
        ('{"width": null, "scale": -Infinity}', Sizes(scale=-np.inf)),
        ('{"scale": 2, "offset": -3, "exact": false, "name": "b"}', Sizes(scale=2, offset=-3, exact=False, name="b")),
    ],
)
def test_from_config(tmp_path, text, found):
    (tmp_path / "config.json").write_text(text)
    read = weights.from_config(Sizes, tmp_path)
    assert read == found and type(read.scale) is float  # "2" too


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"width": 7}', "width 7 is odd"),
        (b'{"width": 7', "is not JSON"),
        pytest.param(b"[" * 100_000, "is not JSON", id="nested too deep"),
        (b'{"width": "\xff"}', "is not JSON"),
        (b"[1, 2]", "holds a list"),
        (None, r"config.json is missing: /\S+/test_config_that_cannot_be_use\d+ is not the folder of a model"),
        (b'{"width": "8"}', "width is '8', not a whole number above 0: download it again"),
        (b'{"width": 8.0}', "width is 8.0, not a whole number above 0"),
        (b'{"width": 0}', "width is 0, not a whole number above 0"),
        (b'{"width": true}', "width is True, not a whole number above 0"),
        (b'{"stages": 3}', "stages is 3, not a list, each a whole number above 0"),
        (b'{"stages": [3, "4"]}', r"stages is \[3, '4'\], not a list, each a whole number above 0"),
        (b'{"stages": []}', r"stages is \[\], not a list"),
        (b'{"scale": "x"}', "scale is 'x', not a number"),
        (b'{"scale": false}', "scale is False, not a number"),
        (b'{"offset": 1.5}', "offset is 1.5, not a whole number"),
        (b'{"exact": 1}', "exact is 1, not true or false"),
        (b'{"name": ["a"]}', r"name is \['a'\], not a text"),
    ],
)
def test_config_that_cannot_be_used(tmp_path, text, words):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(WeightsError, match=words) as e:
        weights.from_config(Sizes, tmp_path)
    assert str(tmp_path / "config.json") in str(e.value)
