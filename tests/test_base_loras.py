"""Beginning from LoRAs: what is folded into the base, what is exported, which files a checkpoint is used with."""

import functools
import json
import re
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from jax.sharding import NamedSharding
from peft import LoraConfig
from safetensors.numpy import load_file, save_file

from solrl_jax import config, device, lora, sampler, sharding, train
from solrl_jax.config import ConfigError, Lora
from solrl_jax.plan import doctor
from solrl_jax.run import assemble, base_loras, convert, evaluate, export
from solrl_jax.run.checkpoint import CheckpointError
from solrl_jax.structs import leaves_by_path
from solrl_jax.weights import WeightsError, lora_content, lora_files
from tests import card, nano, nano_sana, nano_sd35
from tests.test_lora import drawn as with_b
from tests.test_lora_files import FAMILIES, drawn, patterns, peft_folder
from tests.test_sana import HOW, steps_of
from tests.tiers import slow
from tests.toy_world import TOY, interrupt_at, metrics_of

pytestmark = pytest.mark.usefixtures("compiled")

NEW = Lora(rank=4, alpha=8.0)
FILE = "pytorch_lora_weights.safetensors"


# --- entries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("style.safetensors", ("style.safetensors", 1.0)),
        ("style.safetensors:0.8", ("style.safetensors", 0.8)),
        ("/data/a:b/style.safetensors", ("/data/a:b/style.safetensors", 1.0)),
        ("/data/a:b.safetensors", ("/data/a:b.safetensors", 1.0)),
        ("/data/a:b.safetensors:-2", ("/data/a:b.safetensors", -2.0)),
        ("C:\\loras\\style.bin", ("C:\\loras\\style.bin", 1.0)),
        ("C:\\loras\\style.bin:.5", ("C:\\loras\\style.bin", 0.5)),
        ("a:folder:1", ("a:folder", 1.0)),
    ],
)
def test_a_scale_is_after_the_last_colon(text, found):
    assert config.lora_entry(text) == found
    assert config.Model(lora=(text,)).lora == (text,)


@pytest.mark.parametrize("scale", ["high", "", "nan", "inf", "1e999", "0", "0.8x", "1:"])
def test_a_scale_that_is_no_number(scale):
    last = scale.rpartition(":")[2]
    with pytest.raises(ConfigError, match=rf"^model.lora=style:{scale}: {last!r} is no scale; give a finite number"):
        config.override(config.Config(), **{"model.lora": f"other.safetensors,style:{scale}"})


def test_an_entry_that_is_empty():
    with pytest.raises(ConfigError, match=r"^model.lora=' ': give a LoRA file, FILE or FILE:scale"):
        config.Model(lora=(" ",))


# --- folded: FLUX, SD3.5, SANA ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["flux", "sd35", "sana"])
def family(request):
    return FAMILIES[request.param]()


def error(ours, theirs):
    """Largest difference over largest value."""
    a, b = (np.asarray(x.detach() if hasattr(x, "detach") else x, np.float64) for x in (ours, theirs))
    return np.abs(a - b).max() / np.abs(b).max()


def model_of(family):
    keys, comfy, native = family.tables
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), family.base)
    zeros = lambda key: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)  # noqa: E731 - only its shapes
    return TOY._replace(init=zeros, keys=keys, comfy=comfy, native=native)


def begun(family, *entries):
    return base_loras.read(config.Model(lora=tuple(map(str, entries))), model_of(family))


def folded(family, found, devices=1, shard=1):
    mesh = sharding.make_mesh(devices, shard)
    return base_loras.fold(sharding.place(jax.device_get(family.base), mesh), found, mesh)


def first_file(family, folder):
    """diffusers' own: ranks and alphas of each module, MLPs too, that the run's LoRA does not adapt."""
    model = family.make()
    model.add_adapter(patterns(family))
    drawn(model).save_lora_adapter(folder)
    return folder / FILE


def second_file(family, folder):
    """A pair in one block alone."""
    keys, _, _ = family.tables
    one = {"transformer." + family.one + f".lora_{x}.weight": np.zeros(0, np.float32) for x in "AB"}
    name = next(iter(one)).removeprefix("transformer.").removesuffix(".lora_A.weight")
    sizes = lora_files._sizes(lora_files._linears(family.base, keys))[name]
    rng = np.random.default_rng(3)
    a, b = (rng.normal(0, 0.3, shape).astype(np.float32) for shape in ((2, sizes[0]), (sizes[1], 2)))
    folder.mkdir(exist_ok=True)
    save_file(dict(zip(one, (a, b), strict=True)), folder / "one.safetensors")
    return folder / "one.safetensors"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_folded_is_the_adapter_unmerged(family, tmp_path):
    """With the file's own targets, ranks and alphas."""
    found = begun(family, peft_folder(family, tmp_path)[0])
    base = folded(family, found)
    wanted = family.policy({"params": family.base, "lora": found.adapter})
    assert error(family.ours(base), wanted) < 2e-6
    assert error(family.ours(family.base), wanted) > 0.05


@pytest.mark.slow
def test_two_files_with_scales(family, tmp_path):
    """W + .7 A1 B1 - 1.5 A2 B2, by NumPy in f64; other kernels are not touched."""
    entries = f"{first_file(family, tmp_path / 'a')}:0.7", f"{second_file(family, tmp_path / 'b')}:-1.5"
    sets = [begun(family, entry.rpartition(":")[0]).adapter for entry in entries]
    before, after = (leaves_by_path(x) for x in (family.base, folded(family, begun(family, *entries))))
    factors, touched = [leaves_by_path(x) for x in sets], set()
    for path, w in before.items():
        wanted, module = np.asarray(w, np.float64), path.removesuffix("/kernel")
        for scale, own in zip((0.7, -1.5), factors, strict=True):
            if f"{module}/a" in own:
                touched.add(path)
                wanted = wanted + scale * np.float64(own[f"{module}/a"]) @ np.float64(own[f"{module}/b"])
        np.testing.assert_allclose(after[path], wanted, atol=2e-6 * np.abs(wanted).max(), err_msg=path)
    assert 4 <= len(touched) < len(before)


def test_in_bf16_the_sum_is_rounded_once(tmp_path):
    """Against the f64 sum rounded: next to none differ, of kernels rounded after each of two files 5 % would."""
    family = FAMILIES["flux"]()
    family.base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), family.base)
    entries = [first_file(family, tmp_path / x) for x in "ab"]
    one = begun(family, entries[0]).adapter
    both = leaves_by_path(folded(family, begun(family, *(f"{x}:0.1" for x in entries))))
    off = {"once": 0, "twice": 0}
    for path, a in leaves_by_path(one).items():
        if path.endswith("/a"):
            kernel = path.removesuffix("a") + "kernel"
            w = np.asarray(leaves_by_path(family.base)[kernel], np.float64)
            add = np.float64(np.float32(0.1)) * np.float64(a) @ np.float64(leaves_by_path(one)[path[:-1] + "b"])
            exact, half = ((w + n * add).astype(jnp.bfloat16) for n in (2, 1))
            twice = (half.astype(np.float64) + add).astype(jnp.bfloat16)
            assert both[kernel].dtype == jnp.bfloat16
            off["once"] += (np.asarray(both[kernel]) != exact).mean()
            off["twice"] += (twice != exact).mean()
    assert off["once"] < 0.01 * off["twice"] and off["twice"] > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("shard", [2, 4])
def test_a_base_in_parts_is_folded_in_parts(tmp_path, shard):
    """The same numbers, each where it was; the old kernels are freed."""
    family = FAMILIES["sd35"]()
    found = begun(family, first_file(family, tmp_path))
    mesh = sharding.make_mesh(4, shard)
    placed = sharding.place(jax.device_get(family.base), mesh)
    base, whole = base_loras.fold(placed, found, mesh), folded(family, found, 4)
    cut, old = sharding.cuts(base), leaves_by_path(placed)
    gone = {path for path, x in old.items() if x.is_deleted()}
    assert gone == {p.removesuffix("a") + "kernel" for p in leaves_by_path(found.adapter) if p.endswith("/a")}
    assert len(gone & set(cut)) >= 4
    for path, x in leaves_by_path(base).items():
        np.testing.assert_array_equal(x, leaves_by_path(whole)[path], err_msg=path)
        assert x.sharding == old[path].sharding, path
        part = x.nbytes // shard if path in cut else x.nbytes
        assert [s.data.nbytes for s in x.addressable_shards] == [part] * 4


@pytest.mark.parametrize("shard", [1, 2])
def test_a_stack_is_folded_where_it_lies(shard):
    """For an H100: the stack's memory is used again (aliased), beside it are made a layer's product and nothing in
    float32 of the whole stack (FLUX's largest: .2 GB for 3.6). Of a stack in parts nothing is sent."""
    on, (layers, inside, outside) = card.mesh(devices=shard, shard=shard), (38, 15360, 3072)
    w, a, b = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(on, where))
        for shape, dtype, where in (
            ((layers, inside, outside), "bfloat16", sharding.BY_INPUT),
            ((layers, inside, 64), "float32", sharding.WHOLE),
            ((layers, 64, outside), "float32", sharding.WHOLE),
        )
    )
    fold = jax.jit(lora._layers, static_argnames="where", donate_argnums=0, out_shardings=w.sharding)
    with jax.set_mesh(on):
        program = fold.lower(w, a, b, where=sharding.BY_INPUT).compile(device.XLA_GPU)
    memory, layer = program.memory_analysis(), inside * outside // shard
    assert memory.alias_size_in_bytes == 2 * layers * layer
    assert memory.temp_size_in_bytes < 10 * layer  # of a float32 stack it would be 4 * 38
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective", program.as_text())


# --- exported ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_diffusers_reads_the_product_and_the_new_part(family, tmp_path):
    """Velocities. The main file on the original base, and only_new/ beside the first file at its scale."""
    first = first_file(family, tmp_path / "first")
    found = begun(family, f"{first}:0.7")
    base = folded(family, found)
    new = with_b(lora.init(jax.random.key(1), base, family.lora_targets, NEW), 0.2)
    ours = family.policy(lora.policy(base, new, NEW))
    file = export.write_lora(tmp_path / "out", new, model_of(family), NEW, "run", found)

    product = family.make()
    product.load_lora_adapter(tmp_path / "out", prefix="transformer", weight_name=FILE)
    assert error(family.theirs(product), ours) < family.tolerance

    both = family.make()
    both.load_lora_adapter(first.parent, prefix=None, weight_name=FILE, adapter_name="first")
    both.load_lora_adapter(tmp_path / "out/only_new", prefix="transformer", weight_name=FILE, adapter_name="new")
    both.set_adapters(["first", "new"], [0.7, 1.0])
    assert error(family.theirs(both), ours) < family.tolerance
    assert error(family.ours(base), ours) > 0.05  # neither part is small
    alone = lora_files.load(tmp_path / "out/only_new", family.base, family.tables[0], NEW).adapter
    assert error(family.policy(lora.policy(family.base, alone, NEW)), ours) > 0.05

    ranks = {key: x.shape[1] for key, x in load_file(file).items() if key.endswith("lora_B.weight")}
    own, theirs = (load_file(x) for x in (tmp_path / "out/only_new" / FILE, first))
    for key, rank in ranks.items():
        wanted = [x[k].shape[1] for x, k in ((own, key), (theirs, key.removeprefix("transformer."))) if k in x]
        assert rank == sum(wanted), key
    assert {key.removeprefix("transformer.") for key in load_file(file)} == {
        *theirs,
        *(key.removeprefix("transformer.") for key in own),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "sd35"])
def test_comfyuis_form_holds_the_same(tmp_path, name):
    family = FAMILIES[name]()
    found = begun(family, f"{first_file(family, tmp_path / 'first')}:0.7", second_file(family, tmp_path / "second"))
    new = with_b(lora.init(jax.random.key(1), family.base, family.lora_targets, NEW), 0.2)
    model, out = model_of(family), tmp_path / "out"
    export.write_lora(out, new, model, NEW, "run", found)
    once, kernels = Lora(1, 1.0), {}
    names = (FILE, "comfyui/run.safetensors", f"only_new/{FILE}", "only_new/comfyui/run_only_new.safetensors")
    for name in names:
        adapter = lora_files.load(out / name, family.base, model.keys, once, model.comfy).adapter
        kernels[name] = lora.merged_kernels(family.base, adapter, once)
    adapted = {path.removesuffix("a") + "kernel" for path in leaves_by_path(new) if path.endswith("/a")}
    assert kernels[names[2]].keys() == kernels[names[3]].keys() == adapted <= kernels[FILE].keys()
    for one, other in (names[:2], names[2:]):
        assert kernels[one].keys() == kernels[other].keys()
        for path, kernel in kernels[one].items():
            np.testing.assert_allclose(kernel, kernels[other][path], atol=1e-6, err_msg=path)
    both = (leaves_by_path(folded(family, begun(family, out / name))) for name in names[:2])  # ComfyUI's is read too
    for one, other in zip(*(x.values() for x in both), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    for path, wanted in lora.merged_kernels(folded(family, found), new, NEW).items():
        np.testing.assert_allclose(kernels[FILE][path], wanted, atol=3e-6, err_msg=path)


# --- what cannot be folded ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux():
    return FAMILIES["flux"]()


@pytest.fixture
def whole(flux, tmp_path):
    """The tensors of a file that fits, by diffusers' names."""
    flux_file = first_file(flux, tmp_path / "whole")
    found = load_file(flux_file)
    return {f"transformer.{key}": x for key, x in found.items()}


def in_kohyas_names(tensors, end):
    return {key.replace(".lora_A.weight", end): x for key, x in tensors.items() if "lora_A" in key}


Q = "transformer.transformer_blocks.0.attn.to_q"
REFUSED = {
    "text encoder": (
        lambda t: t | {"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": np.ones((4, 4), np.float32)},
        r"adapts text encoders too \(1 keys, as text_encoder\..*fc1.lora_A.weight\), which cannot be folded",
    ),
    "kohya's text encoder": (
        lambda t: t | {"lora_te1_text_model_x.lora_down.weight": np.ones((4, 4), np.float32)},
        r"adapts text encoders too \(1 keys, as lora_te1_text_model_x",
    ),
    "DoRA": (
        lambda t: t | {f"{Q}.dora_scale": np.ones((48, 1), np.float32)},
        rf"unused {Q}.dora_scale, which is of a DoRA",
    ),
    "PEFT's DoRA": (
        lambda t: t | {f"{Q}.lora_magnitude_vector": np.ones(48, np.float32)},
        rf"unused {Q}.lora_magnitude_vector, which is of a DoRA",
    ),
    "LoHa": (lambda t: in_kohyas_names(t, ".hada_w1_a"), r"hada_w1_a, which is of a LoHa"),
    "LoKr": (lambda t: in_kohyas_names(t, ".lokr_w1"), r"lokr_w1, which is of a LoKr"),
    "full difference": (
        lambda t: t | {f"{Q}.diff": np.ones((48, 48), np.float32)},
        r"to_q.diff, which is of a full diff",
    ),
    "bias": (lambda t: t | {f"{Q}.lora_B.bias": np.ones(48, np.float32)}, r"lora_B.bias, which is of a bias"),
    "a deeper model": (
        lambda t: t | {k.replace("blocks.0", "blocks.7"): x for k, x in t.items()},
        r"is not a LoRA of this model(.|\n)*unused transformer.\S*transformer_blocks.7",
    ),
    "a wider model": (
        lambda t: {k: np.pad(x, ((0, 0), (0, 16))) if "lora_A" in k else x for k, x in t.items()},
        r"has shape \(\d+, 64\), not \(\d+, 48\)",
    ),
    "not finite": (
        lambda t: t | {f"{Q}.lora_A.weight": np.full_like(t[f"{Q}.lora_A.weight"], np.nan)},
        "is not finite at",
    ),
    "empty": (lambda t: {}, "it is empty"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_folded_is_named(flux, whole, tmp_path, kind):
    change, words = REFUSED[kind]
    save_file(change(whole), tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=rf"^{tmp_path}/x.safetensors(.|\n)*{words}"):
        begun(flux, tmp_path / "x.safetensors")


def test_a_file_that_is_not_there(flux, tmp_path):
    with pytest.raises(WeightsError, match=rf"{tmp_path}/none.safetensors does not exist: give a LoRA"):
        begun(flux, f"{tmp_path}/none.safetensors:0.5")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WeightsError, match=r"folder holds no LoRA file"):
        begun(flux, tmp_path / "folder")
    with pytest.raises(WeightsError, match=r"model.safetensors is not a LoRA of this model"):  # a whole checkpoint
        save_file({f"{Q}.weight": np.ones((48, 48), np.float32)}, tmp_path / "model.safetensors")
        begun(flux, tmp_path / "model.safetensors")


def test_a_sum_that_overflows(flux, tmp_path):
    found = begun(flux, first_file(flux, tmp_path))
    huge = jax.tree.map(lambda x: np.where(x == 0, x, np.float32(1e30)), found.adapter)
    with pytest.raises(WeightsError, match=r"/kernel is not finite with .*: lower the scale"):
        folded(flux, found._replace(adapter=huge))
    pair = {"A": np.ones((1, 48), np.float32), "B": np.full((48, 1), 1e20, np.float32)}
    save_file({f"{Q}.lora_{x}.weight": factor for x, factor in pair.items()}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"a factor of \S+ is not finite at scale 1e\+29"):
        begun(flux, f"{tmp_path}/x.safetensors:1e29")


@pytest.mark.parametrize("family_name", ["sd35", "sana"])
def test_a_lora_of_another_family(flux, tmp_path, family_name):
    other = FAMILIES[family_name]()
    with pytest.raises(WeightsError, match=r"is not a LoRA of this model"):
        begun(other, first_file(flux, tmp_path))


# --- runs -------------------------------------------------------------------------------------------------------------


def style(folder, seed=1, name="style.safetensors"):
    """A LoRA of rank 3 for the toy's one Linear."""
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(0, 0.3, shape).astype(np.float32) for shape in ((3, 16), (16, 3)))
    folder.mkdir(exist_ok=True)
    save_file({"transformer.to_q.lora_A.weight": a, "transformer.to_q.lora_B.weight": b}, folder / name)
    return folder / name


@pytest.fixture
def from_style(toy, tmp_path):
    return config.override(toy, iterations=2, save_every=1, **{"model.lora": f"{style(tmp_path / 'loras')}:0.5"})


def product(file, name="to_q"):
    x = load_file(file)
    return x[f"transformer.{name}.lora_B.weight"] @ x[f"transformer.{name}.lora_A.weight"]


@pytest.mark.slow
def test_a_run_begins_from_it(toy, from_style, tmp_path):
    """The base is base + LoRA, the KL is 0 there, and what is written is the product of both, and the new part."""
    run, file = tmp_path / "run", tmp_path / "loras/style.safetensors"
    train.train(from_style, run, devices=1)
    parts, plain = assemble.assemble(from_style, 1), assemble.assemble(toy, 1)
    base, bare = (np.asarray(x.frozen.base["to_q"]["kernel"]) for x in (parts, plain))
    np.testing.assert_allclose(base - bare, 0.5 * product(file).T, atol=1e-6)
    assert metrics_of(run)[1]["kl_div"] == 0 < metrics_of(run)[2]["kl_div"]

    for at in (run, run / "current"):
        new, both = product(at / "only_new" / FILE), product(at / FILE)
        np.testing.assert_allclose(both, 0.5 * product(file) + new, atol=1e-6)
        assert np.any(new) and load_file(at / FILE)["transformer.to_q.lora_A.weight"].shape == (3 + 2, 16)
        np.testing.assert_array_equal(
            load_file(at / FILE)["transformer.to_q.lora_A.weight"][:3],
            load_file(file)["transformer.to_q.lora_A.weight"],
        )
    held = lora_content.made(run)
    assert held["rank"] == held["alpha"] == 5 and len(held["holds"]) == 1
    digest = held["holds"][0]
    told = "\n".join(json.loads((run / "starts.json").read_text())[0]["notes"])
    assert f"folded into the base: {file} (scale 0.5, SHA-256 {digest[:12]}...)" in told and "rank up to 3 + 2" in told
    card = (run / "model_card.md").read_text()
    for words in (
        f"`{file.name}` at scale 0.5, SHA-256 style.safetensors {digest}",
        "KL's reference",
        "rank up to 3 + 2",
    ):
        assert words in card
    assert "already hold `style.safetensors` at scale 0.5: load them alone. `only_new/`" in card
    manifest = json.loads((run / "checkpoints/2/manifest.json").read_text())
    assert manifest["lora"] == [{"file": str(file), "scale": 0.5, "sha256": {"style.safetensors": digest}}]


@pytest.mark.slow
def test_a_resumed_run_equals_an_unbroken_one(from_style, tmp_path, monkeypatch):
    """Bit for bit, also where the file was moved and has another name."""
    cfg = config.override(from_style, iterations=4)
    train.train(cfg, tmp_path / "whole", devices=1)
    with monkeypatch.context() as m:
        interrupt_at(m, 2, signal.SIGTERM)
        assert train.train(cfg, tmp_path / "parts", devices=1) == train.UNFINISHED
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "loras/style.safetensors", tmp_path / "moved/mine.safetensors")
    moved = config.override(cfg, **{"model.lora": f"{tmp_path / 'moved/mine.safetensors'}:0.5"})
    assert train.train(moved, tmp_path / "parts", resume=True, devices=1) == 0
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")
    for name in (FILE, f"only_new/{FILE}", f"current/{FILE}"):
        one, other = (load_file(tmp_path / run / name) for run in ("whole", "parts"))
        assert one.keys() == other.keys() and all(np.array_equal(x, other[key]) for key, x in one.items())


def test_other_files_than_a_checkpoints_are_refused(toy, from_style, tmp_path, capsys):
    """By every mode that uses one: resume, eval, sample, export; before anything large is read."""
    run, file = tmp_path / "run", tmp_path / "loras/style.safetensors"
    train.train(config.override(from_style, iterations=1), run, devices=1)
    place = run / "checkpoints/1"
    kept, out = file.read_bytes(), tmp_path / "out"
    others = {
        "changed": lambda: style(tmp_path / "loras", seed=2) and from_style,
        "none": lambda: config.override(from_style, **{"model.lora": ""}),
        "scale": lambda: config.override(from_style, **{"model.lora": f"{file}:0.6"}),
        "twice": lambda: config.override(from_style, **{"model.lora": f"{file}:0.5,{file}:0.5"}),
    }
    here = {
        "changed": r"scale 0\.5, SHA",
        "none": "none",
        "scale": r"scale 0\.6",
        "twice": r"scale 0\.5.*, .*scale 0\.5",
    }
    for name, other in others.items():
        cfg = other()
        words = (
            rf"checkpoint {place} adapts a base with other LoRAs folded in: there .*{file.name} \(scale 0\.5, SHA-256 "
        )
        words += rf".*; here, by model\.lora, .*{here[name]}.*Give the same files and scales"
        for use in (
            lambda: train.train(cfg, run, resume=True, devices=1),  # noqa: B023
            lambda: evaluate.run_eval(cfg, out, place=place, lora_file=None, devices=1),  # noqa: B023
            lambda: evaluate.run_sample(cfg, out, prompts=["a"], place=place, lora_file=None, devices=1),  # noqa: B023
            lambda: export.export(cfg, out, place=place, devices=1),  # noqa: B023
        ):
            with pytest.raises(CheckpointError, match=words):
                use()
        file.write_bytes(kept)
    plain = tmp_path / "plain"
    train.train(config.override(toy, iterations=1), plain, devices=1)
    with pytest.raises(CheckpointError, match=r"there none; here, by model.lora, .*style.safetensors"):
        train.train(from_style, plain, resume=True, devices=1)
    assert not out.exists()
    assert "began from" not in (plain / "model_card.md").read_text() and not (plain / "only_new").exists()
    assert "lora" not in json.loads((plain / "checkpoints/1/manifest.json").read_text())


def test_the_description_of_a_peft_folder_counts(tmp_path):
    """adapter_config.json has the scale: another one is another LoRA."""
    folder = style(tmp_path / "peft", name="adapter_model.safetensors").parent
    (folder / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6}))
    cfg, two = config.Model(lora=(str(folder),)), base_loras.origins((str(folder),))
    up = load_file(folder / "adapter_model.safetensors")["transformer.to_q.lora_B.weight"]
    np.testing.assert_allclose(base_loras.read(cfg, TOY).adapter["to_q"]["b"], 2 * up.T)
    base_loras.check_same(folder, [x._asdict() for x in two], cfg.lora)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 3}))
    with pytest.raises(CheckpointError, match=r"adapts a base with other LoRAs folded in"):
        base_loras.check_same(folder, [x._asdict() for x in two], cfg.lora)


@pytest.mark.slow
def test_every_mode_draws_base_and_lora(toy, from_style, tmp_path, capsys):
    """A checkpoint, its product on the original base, its new part on base + LoRA: the same rewards and pictures."""
    run = tmp_path / "run"
    train.train(from_style, run, devices=1)
    place = run / "checkpoints/2"

    def table(cfg, **how):
        capsys.readouterr()
        evaluate.run_eval(cfg, tmp_path / "eval", **{"place": None, "lora_file": None, "devices": 1} | how)
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    def column(lines, i):
        return {line[0]: line[i] for line in lines if line[0] in ("bright", "dark")}

    bare = config.override(from_style, **{"model.lora": ""})
    of_run = table(from_style, place=place)
    assert any("folded into the base:" in " ".join(line) for line in of_run)
    base, policy = column(of_run, 1), column(of_run, 2)
    for cfg, file in ((bare, run), (from_style, run / "only_new")):
        assert column(table(cfg, lora_file=file), 2) == policy
    assert column(table(bare, lora_file=tmp_path / "loras/style.safetensors"), 2) != policy
    assert policy["bright"] != base["bright"] and len(policy) == 2

    evaluate.run_sample(from_style, tmp_path / "one", prompts=["a"], place=place, lora_file=None, devices=1)
    evaluate.run_sample(bare, tmp_path / "two", prompts=["a"], place=None, lora_file=run, devices=1)
    one, two = (tmp_path / x / "samples/0000_0.png" for x in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()

    assert export.export(from_style, tmp_path / "out", place=place, devices=1) == 0
    for name in (FILE, f"only_new/{FILE}", f"current/{FILE}", f"current/only_new/{FILE}"):
        one, two = (load_file(x / name) for x in (tmp_path / "out", run))
        assert one.keys() == two.keys() and all(np.array_equal(x, two[key]) for key, x in one.items())
        assert lora_content.made(tmp_path / "out" / name) == lora_content.made(run / name)
    assert "began from" in (tmp_path / "out/model_card.md").read_text()


def test_one_lora_does_not_count_twice(from_style, tmp_path):
    """A run's main file holds what model.lora folds in: refused with the file to take."""
    run = tmp_path / "run"
    train.train(config.override(from_style, iterations=1), run, devices=1)
    words = rf"{run}(/{FILE})? is the product of a training and of .*style.safetensors, .*: give only_new/ beside it"
    with pytest.raises(WeightsError, match=words):
        evaluate.run_eval(from_style, tmp_path / "e", place=None, lora_file=run, devices=1)
    both = f"{from_style.model.lora[0]},{run / FILE}"
    with pytest.raises(WeightsError, match=words):
        assemble.assemble(config.override(from_style, **{"model.lora": both}), 1)
    stacked = config.override(from_style, **{"model.lora": f"{from_style.model.lora[0]},{run / 'only_new'}"})
    other = config.override(from_style, **{"model.lora": str(run)})
    one, two = (assemble.assemble(cfg, 1).frozen.base["to_q"]["kernel"] for cfg in (stacked, other))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_two_runs_in_a_row(from_style, tmp_path):
    """The second begins from the first's product: ranks 3 + 2 + 2."""
    train.train(config.override(from_style, iterations=1), tmp_path / "first", devices=1)
    cfg = config.override(from_style, iterations=1, **{"model.lora": str(tmp_path / "first")})
    train.train(cfg, tmp_path / "second", devices=1)
    assert load_file(tmp_path / "second" / FILE)["transformer.to_q.lora_A.weight"].shape == (7, 16)
    new = product(tmp_path / "second/only_new" / FILE)
    np.testing.assert_allclose(product(tmp_path / "second" / FILE), product(tmp_path / "first" / FILE) + new, atol=1e-6)


def test_bad_input_is_found_before_the_weights_are_read(from_style, tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "open_weights", None)
    save_file({"transformer.to_k.lora_A.weight": np.ones((2, 16), np.float32)}, tmp_path / "other.safetensors")
    cfg = config.override(from_style, **{"model.lora": str(tmp_path / "other.safetensors")})
    with pytest.raises(WeightsError, match=r"is not a LoRA of this model(.|\n)*unused transformer.to_k.lora_A.weight"):
        train.train(cfg, tmp_path / "run", devices=1)
    assert not (tmp_path / "run").exists()


# --- whole pipelines --------------------------------------------------------------------------------------------------


def peft_file(transformer, targets, folder):
    """diffusers' own file for a pipeline's transformer."""
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    drawn(transformer).save_lora_adapter(folder)
    transformer.delete_adapters("default")
    return folder / FILE


NANOS = {
    "flux": (nano, FluxTransformer2DModel, "pipeline", ["to_q", "to_v", "proj_mlp", "ff.net.2"]),
    "sd35": (nano_sd35, SD3Transformer2DModel, "sd35", ["attn.to_q", "ff.net.2", "attn.add_k_proj"]),
    "sana": (nano_sana, SanaTransformer2DModel, "sana", ["attn1.to_q", "attn2.to_v", "conv_point"]),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    @functools.cache
    def of(name):
        module, kind, folder, targets = NANOS[name]
        root = tmp_path_factory.mktemp(name)
        cfg = module.build(root)
        file = peft_file(kind.from_pretrained(root / folder / "transformer"), targets, root / "loras")
        return cfg, config.override(cfg, **{"model.lora": f"{file}:0.3"})

    return of


def test_convert_and_doctor(built, tmp_path, capsys):
    """Converting writes the base alone; the doctor says what is folded in, or why it cannot be."""
    cfg, begun_from = built("flux")
    with pytest.raises(ConfigError, match=r"^model.lora=\S+:0.3 is folded in when a run reads its weights"):
        convert.convert(assemble.model_module(cfg), begun_from.model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = list(doctor.examine(doctor.model, begun_from, tmp_path, 1))
    assert not any(x.fix for x in found)
    assert [x.text.startswith("folded into the base: ") for x in found].count(True) == 1
    other = config.override(cfg, **{"model.lora": str(tmp_path / "none.safetensors")})
    *_, last = doctor.examine(doctor.model, other, tmp_path, 1)
    assert "none.safetensors does not exist" in last.fix


def test_a_converted_folder(built, tmp_path):
    cfg, begun_from = built("flux")
    convert.convert(assemble.model_module(cfg), cfg.model, tmp_path / "out")
    moved = config.override(begun_from, **{"model.path": tmp_path / "out"})
    found = (assemble.for_drawing(x, 1).frozen.base for x in (begun_from, moved))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize("name", ["flux", slow("sd35"), slow("sana")])
def test_what_assemble_reads(built, name):
    """base + LoRA, each kernel where the base's is, in parts on two devices."""
    cfg, begun_from = built(name)
    mesh = sharding.make_mesh(2, 2)
    module = assemble.model_module(cfg)
    model = module.make(cfg.model)
    found = base_loras.read(begun_from.model, model)
    base = base_loras.fold(assemble.open_weights(cfg, mesh)[0], found, mesh)
    plain, kernels = leaves_by_path(assemble.open_weights(cfg, mesh)[0]), leaves_by_path(base)
    factors = leaves_by_path(found.adapter)
    for path, w in plain.items():
        at = path.removesuffix("kernel")
        add = np.float64(factors[f"{at}a"]) @ np.float64(factors[f"{at}b"]) if f"{at}a" in factors else 0
        np.testing.assert_allclose(kernels[path], np.asarray(w, np.float64) + add, atol=2e-6, err_msg=path)
        assert kernels[path].sharding == w.sharding
    assert len(factors) >= 6
    parts = assemble.for_drawing(config.override(begun_from, shard=2), 2)
    jax.tree.map(np.testing.assert_array_equal, parts.frozen.base, base)


def ours(parts, x1, adapter):
    """Three Euler steps in float32."""

    @jax.jit
    def draw(variables, cond, vae):
        once = model.prepare(variables, cond)
        velocity = lambda x, sigma: model.velocity(variables, x, sigma, once)  # noqa: E731
        return model.decode(vae, sampler.sample(velocity, x1, sampler.table(model.sigmas(3), "euler")))

    model = parts.model
    with jax.set_mesh(parts.mesh):
        policy = lora.policy(parts.frozen.base, adapter, parts.cfg.lora)
        return np.asarray(draw(policy, parts.text(nano.PROMPTS[:2]), parts.frozen.vae))


def theirs(name, cfg, x1):
    """(pipeline of the original base, its pictures as a function)."""
    pipe = DiffusionPipeline.from_pretrained(cfg.model.path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.tensor(np.asarray(x1)).permute(0, 3, 1, 2)
    how = {"num_inference_steps": 3, "output_type": "np", "guidance_scale": 1.0}
    if name == "sana":
        how |= HOW | steps_of(pipe, 3)
    else:
        how |= {"height": cfg.model.size, "width": cfg.model.size, "max_sequence_length": cfg.model.text_tokens}
    if name == "flux":
        noise = FluxPipeline._pack_latents(noise, 2, noise.shape[1], *noise.shape[2:])
    return pipe, lambda: pipe(nano.PROMPTS[:2], latents=noise, **how).images


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", NANOS)
def test_diffusers_draws_our_pictures(built, name, tmp_path):
    """The exported product on the original base; and the first LoRA and only_new/ beside each other."""
    cfg, begun_from = built(name)
    parts = assemble.for_drawing(begun_from, 1)
    x1 = jax.vmap(parts.model.noise)(jax.random.split(jax.random.key(3), 2))
    shapes = lora.init(jax.random.key(1), parts.frozen.base, parts.model.lora_targets, cfg.lora)
    new = with_b(shapes, 0.1)
    export.write_lora(tmp_path, new, parts.model, cfg.lora, "run", parts.base_loras)
    pictures = ours(parts, x1, new)

    pipe, draw = theirs(name, cfg, x1)
    bare = draw()
    pipe.load_lora_weights(tmp_path, weight_name=FILE)
    assert np.abs(draw() - pictures).max() < 1e-4
    pipe.unload_lora_weights()
    assert np.abs(draw() - bare).max() < 1e-6
    first, scale = config.lora_entry(begun_from.model.lora[0])
    how = {"prefix": None, "weight_name": FILE, "adapter_name": "first"}
    pipe.transformer.load_lora_adapter(Path(first).parent, **how)
    pipe.load_lora_weights(tmp_path / "only_new", weight_name=FILE, adapter_name="new")
    pipe.set_adapters(["first", "new"], [scale, 1.0])
    assert np.abs(draw() - pictures).max() < 1e-4
    assert np.abs(bare - pictures).max() > 10 / 255
    assert np.abs(ours(parts, x1, jax.tree.map(lambda x: x * 0, new)) - pictures).max() > 10 / 255


@pytest.mark.slow
def test_a_run_on_real_parts(built, tmp_path):
    """NVFP4 rollouts of base + LoRA; resumed bit for bit; the exported product draws on the original base what the run
    evaluated last."""
    cfg, begun_from = built("flux")
    train.train(begun_from, tmp_path / "whole", devices=1)
    train.train(config.override(begun_from, iterations=1), tmp_path / "parts", devices=1)
    train.train(begun_from, tmp_path / "parts", resume=True, devices=1)
    assert metrics_of(tmp_path / "whole")[2] == metrics_of(tmp_path / "parts")[2]
    for name in (FILE, f"only_new/{FILE}", "comfyui/nano.safetensors", "only_new/comfyui/nano_only_new.safetensors"):
        one, other = (load_file(tmp_path / run / name) for run in ("whole", "parts"))
        assert one.keys() == other.keys() and all(np.array_equal(x, other[key]) for key, x in one.items())
    parts = assemble.for_evaluation(cfg, 1)
    with jax.set_mesh(parts.mesh):
        found, _ = evaluate.evaluate(parts, assemble.adapter(parts, None, tmp_path / "whole"))
    last = metrics_of(tmp_path / "whole")[2]["eval_reward_clipscore"]
    np.testing.assert_allclose(found["eval_reward_clipscore"], last, rtol=1e-4)
