"""LoRA files in ComfyUI's layout: names and blocks, what comes back, what diffusers makes of them; the model card."""

import dataclasses
import inspect
import json
from types import SimpleNamespace

import diffusers.loaders.lora_conversion_utils as conversion
import diffusers.loaders.lora_pipeline as pipeline
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from configs import tiny
from solrl_jax import config, lora, recipes, sampler, sharding
from solrl_jax.config import Config, Lora
from solrl_jax.models import flux
from solrl_jax.run import assemble, export, model_card
from solrl_jax.structs import Frozen, TrainState, leaves_by_path
from solrl_jax.weights import WeightsError, lora_files
from tests.test_lora import SMALL, inputs

CFG = Lora(rank=4, alpha=8.0)
ALL = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
ALL += ("attn.to_add_out", "net.0.proj", "net.2", "linear", "proj_mlp", "proj_out", "linear_1", "linear_2")
ALL += ("x_embedder", "context_embedder")
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
BFL = [
    f"double_blocks.0.{s}_{m}" for s in ("img", "txt") for m in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "mod.lin")
]
BFL += [f"single_blocks.0.{m}" for m in ("linear1", "linear2", "modulation.lin")]
BFL += [f"{m}_in.{end}_layer" for m in ("time", "guidance", "vector") for end in ("in", "out")]
BFL += ["img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"]
NORMS = [f"double_blocks.0.{s}_attn.norm.{x}_norm.scale" for s in ("img", "txt") for x in ("query", "key")]
NORMS += [f"single_blocks.0.norm.{x}_norm.scale" for x in ("query", "key")]


def shapes(**sizes):
    """The base of a FLUX as ShapeDtypeStructs."""
    cfg = flux.FluxConfig(**sizes)
    network, key = flux.FluxTransformer(cfg, jnp.float32), jax.random.key(0)
    return jax.eval_shape(lambda k: network.init(k, *inputs(cfg))["params"], key)


def made(base, targets, rank=4):
    """A LoRA drawn on the host: nothing to compile."""
    spec = jax.eval_shape(lambda key: lora.init(key, base, targets, Lora(rank)), jax.random.key(0))
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.15, x.shape), jnp.float32), spec)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small FLUX (2 double, 3 single blocks, width 48), a LoRA on Sol-RL's Linears and its file in both layouts."""
    folder, base = tmp_path_factory.mktemp("lora"), shapes(**SMALL)
    adapter = made(base, flux.LORA_TARGETS)
    lora_files.save(folder / "theirs.safetensors", adapter, flux.KEYS, CFG)
    lora_files.save_fused(folder / "comfyui" / "x.safetensors", adapter, base, flux.KEYS, flux.COMFY, CFG)
    return SimpleNamespace(base=base, adapter=adapter, file=folder / "comfyui" / "x.safetensors", folder=folder)


def read(file, base, cfg=CFG):
    return lora_files.load(file, base, flux.KEYS, cfg, flux.COMFY).adapter


def same(one, two, **tolerance):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), one, two)


def products(adapter, cfg=CFG):
    """{module: alpha / R A B}, what is added to the kernels."""
    factors = leaves_by_path(lora.scaled(adapter, cfg))
    return {p[:-2]: np.asarray(factors[p]) @ np.asarray(factors[p[:-1] + "b"]) for p in factors if p.endswith("/a")}


# --- names and blocks -----------------------------------------------------------------------------------------------


def test_golden_names_and_shapes(small):
    stored = load_file(small.file)
    modules = [f"double_blocks_{i}_img_attn_{x}" for i in range(2) for x in ("qkv", "proj")]
    modules += [f"single_blocks_{i}_linear1" for i in range(3)]
    ends = ("lora_down.weight", "lora_up.weight", "alpha")
    assert sorted(stored) == sorted(f"lora_unet_{m}.{end}" for m in modules for end in ends)
    found = {m: [stored[f"lora_unet_{m}.{end}"].shape for end in ends] for m in modules}
    assert found["double_blocks_1_img_attn_qkv"] == [(12, 48), (144, 12), ()]
    assert found["double_blocks_1_img_attn_proj"] == [(4, 48), (48, 4), ()]
    assert found["single_blocks_2_linear1"] == [(12, 48), (3 * 48 + 192, 12), ()]  # q, k, v and zero rows for the MLP
    assert all(stored[f"lora_unet_{m}.alpha"] == found[m][0][0] for m in modules)  # readers' scale alpha / rank is 1
    q, v = (small.adapter["transformer_blocks"]["attn"][name] for name in ("to_q", "to_v"))
    np.testing.assert_array_equal(stored[f"{QKV}.lora_down.weight"][:4], q["a"][0].T)
    np.testing.assert_array_equal(stored[f"{QKV}.lora_down.weight"][8:], v["a"][0].T)
    up = stored[f"{QKV}.lora_up.weight"]
    np.testing.assert_array_equal(up[:48, :4], 2 * q["b"][0].T)
    np.testing.assert_array_equal(up[96:, 8:], 2 * v["b"][0].T)
    assert not up[:48, 4:].any() and not up[48:96, :4].any() and not up[48:96, 8:].any() and not up[96:, :8].any()
    assert not stored["lora_unet_single_blocks_0_linear1.lora_up.weight"][144:].any()
    with safe_open(small.file, "numpy") as f:
        assert json.loads(f.metadata()["solrl_jax"]) == {"rank": 4, "alpha": 8.0, "folded": True}


def test_the_table_names_every_linear_of_flux_once():
    kernels = [p for p, x in leaves_by_path(shapes()).items() if p.endswith("/kernel")]
    parts = [part for module in flux.COMFY for part in module.parts]
    ours = [p.removesuffix("/kernel").replace("blocks/", "blocks.{layer}.").replace("/", ".") for p in kernels]
    assert sorted(parts) == sorted(ours) and len(parts) == 30
    assert [m.name for m in flux.COMFY if m.swapped] == ["final_layer_adaLN_modulation_1"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """FLUX.1-dev's widths, one block of each kind, a LoRA of rank 4 on every Linear: {module: (A, B)} and the file."""
    base, file = shapes(num_layers=1, num_single_layers=1), tmp_path_factory.mktemp("wide") / "x.safetensors"
    adapter = made(base, ALL)
    lora_files.save_fused(file, adapter, base, flux.KEYS, flux.COMFY, CFG)
    lora_files.save(file.with_name("y.safetensors"), adapter, flux.KEYS, CFG)
    theirs = load_file(file.with_name("y.safetensors"))
    names = {key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in theirs}
    pairs = {n: [theirs[f"transformer.{n}.lora_{x}.weight"] for x in "AB"] for n in names}
    return SimpleNamespace(base=base, file=file, pairs=pairs, adapter=adapter)


def test_rows_lie_where_the_original_checkpoint_has_them(wide):
    """diffusers' converter of whole BFL checkpoints as the judge: our up factors in place of the kernels."""
    stored = load_file(wide.file)
    assert {key.split(".")[0] for key in stored} == {f"lora_unet_{name.replace('.', '_')}" for name in BFL}
    whole = {name: torch.zeros(1) for name in NORMS}
    for name in BFL:
        up = torch.tensor(stored[f"lora_unet_{name.replace('.', '_')}.lora_up.weight"])
        whole |= {f"{name}.weight": up, f"{name}.bias": torch.zeros(len(up))}
    found = convert_flux_transformer_checkpoint_to_diffusers(whole)
    assert not whole and len(wide.pairs) == 30
    for name, (_, b) in wide.pairs.items():
        rows = found[f"{name}.weight"].numpy()
        np.testing.assert_array_equal(rows[:, rows.any(0)], b, name)


def test_diffusers_reads_the_same_factors(wide):
    """Its converter of kohya's files, at the widths it is made for; it knows the layout of ComfyUI's keys."""
    found = conversion._convert_kohya_flux_lora_to_diffusers(
        {k: torch.tensor(v) for k, v in load_file(wide.file).items()}
    )
    found = {key.removeprefix("transformer."): x.numpy() for key, x in found.items()}
    assert len(found) == 2 * 30
    for name, (a, b) in wide.pairs.items():  # q, k, v and mlp come apart again: it sees the blocks
        np.testing.assert_array_equal(found[f"{name}.lora_A.weight"], a, name)
        np.testing.assert_array_equal(found[f"{name}.lora_B.weight"], b, name)


# --- reading back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [flux.LORA_TARGETS, ALL, ("to_v", "proj_mlp", "linear_1")])
def test_both_layouts_come_back(small, tmp_path, targets):
    adapter, file = made(small.base, targets), tmp_path / "x.safetensors"
    for cfg in (CFG, Lora(4, 3.0)):
        lora_files.save(file, adapter, flux.KEYS, cfg)
        same(read(file, small.base, cfg), adapter, rtol=2e-7)
        lora_files.save_fused(file, adapter, small.base, flux.KEYS, flux.COMFY, cfg)
        same(read(file, small.base, cfg), adapter, rtol=2e-7)
    other = lora_files.load(file, small.base, flux.KEYS, Lora(1, 1.0), flux.COMFY).adapter  # as it is
    same(other, lora.scaled(adapter, Lora(4, 3.0)), rtol=2e-7)


def test_half_precision(small, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({key: x.astype(jnp.bfloat16) for key, x in load_file(small.file).items()}, file)
    found = read(file, small.base)
    assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    same(found, small.adapter, rtol=2**-8)


def foreign(small, rank=3, alpha=1.5):
    """A file as another trainer makes it: one dense pair a module, alpha not the rank. Also {module: product}."""
    rng, tensors, added = np.random.default_rng(0), {}, {}
    for key in (k.removesuffix(".alpha") for k in load_file(small.file) if k.endswith(".alpha")):
        out = load_file(small.file)[f"{key}.lora_up.weight"].shape[0]
        down, up = (rng.normal(0, 1, s).astype(np.float32) for s in ((rank, 48), (out, rank)))
        tensors |= {
            f"{key}.lora_down.weight": down,
            f"{key}.lora_up.weight": up,
            f"{key}.alpha": np.float32([alpha])[0],
        }
        added[key] = alpha / rank * up @ down
    return {key: np.asarray(x) for key, x in tensors.items()}, added


def test_a_dense_file_with_alphas(small, tmp_path):
    file = tmp_path / "x.safetensors"
    tensors, added = foreign(small)
    save_file(tensors, file)
    found = read(file, small.base)
    assert found["transformer_blocks"]["attn"]["to_q"]["a"].shape == (2, 48, 3)
    ours = products(found)
    assert len(ours) == 8  # the single blocks' MLP too: its rows are not zero here
    for i in range(2):
        qkv = [ours[f"transformer_blocks/attn/to_{x}"][i].T for x in "qkv"]
        np.testing.assert_allclose(np.concatenate(qkv), added[f"lora_unet_double_blocks_{i}_img_attn_qkv"], atol=1e-5)
    names = ("attn/to_q", "attn/to_k", "attn/to_v", "proj_mlp")
    rows = np.concatenate([ours[f"single_transformer_blocks/{name}"][2].T for name in names])
    np.testing.assert_allclose(rows, added["lora_unet_single_blocks_2_linear1"], atol=1e-5)
    dotted = {"double.blocks": "double_blocks", "single.blocks": "single_blocks", "img.attn": "img_attn"}
    spelt = {}
    for key, x in tensors.items():  # ComfyUI's own names for the same, with other ends
        name, end = key.removeprefix("lora_unet_").split(".", 1)
        name = name.replace("_", ".")
        for wrong, right in dotted.items():
            name = name.replace(wrong, right)
        spelt[f"diffusion_model.{name}.{end.replace('lora_down', 'lora_A').replace('lora_up', 'lora_B')}"] = x
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight" in spelt
    save_file(spelt, file)
    same(read(file, small.base), found)
    save_file({key: x for key, x in tensors.items() if not key.endswith("alpha")}, file)  # then the scale is 1
    np.testing.assert_allclose(
        products(read(file, small.base))["transformer_blocks/attn/to_out.0"],
        2 * ours["transformer_blocks/attn/to_out.0"],
        atol=1e-5,
    )


def test_alphas_in_diffusers_names(small, tmp_path):
    tensors, file = load_file(small.folder / "theirs.safetensors"), tmp_path / "x.safetensors"
    key = "transformer.transformer_blocks.1.attn.to_out.0.alpha"
    alphas = {f"{name.rsplit('.lora_', 1)[0]}.alpha": np.array(4, np.float32) for name in tensors}
    save_file(tensors | alphas | {key: np.array(1, np.float32)}, file)  # a quarter, of rank 4
    one, two = (x["transformer_blocks/attn/to_out.0"] for x in map(products, (read(file, small.base), small.adapter)))
    np.testing.assert_allclose(one, two * np.array([1, 0.25]).reshape(2, 1, 1), rtol=1e-6)


def test_ranks_of_their_own(small, tmp_path):
    """Layers and modules of ranks 3 and 5: padded with zeros, the products are as in the file."""
    (few, added), (many, more) = foreign(small, 3), foreign(small, 5)
    mixed = {k: (many if "blocks_1" in k or "linear1" in k else few)[k] for k in few}
    save_file(mixed, tmp_path / "x.safetensors")
    found = read(tmp_path / "x.safetensors", small.base)
    assert lora.rank(found) == 5
    assert {x.shape[-1] for p, x in leaves_by_path(found).items() if p.endswith("/a")} == {5}
    out = products(found)["transformer_blocks/attn/to_out.0"]
    np.testing.assert_allclose(out[0].T, added["lora_unet_double_blocks_0_img_attn_proj"], atol=1e-5)
    np.testing.assert_allclose(out[1].T, more["lora_unet_double_blocks_1_img_attn_proj"], atol=1e-5)
    lora_files.save_fused(tmp_path / "y.safetensors", found, small.base, flux.KEYS, flux.COMFY, CFG)  # and out again
    again = products(read(tmp_path / "y.safetensors", small.base))
    same(again, products(found), atol=1e-6)


def broken(name, tensors):
    down, up = f"{QKV}.lora_down.weight", f"{QKV}.lora_up.weight"
    return {
        "half": {k: v for k, v in tensors.items() if k != up},
        "layer": {k.replace("double_blocks_0", "double_blocks_2"): v for k, v in tensors.items()},
        "rows": tensors | {up: tensors[up][:96].copy()},
        "ranks": tensors | {down: tensors[down][:5].copy()},
        "none": tensors | {down: tensors[down][:0].copy(), up: tensors[up][:, :0].copy()},
        "alphas": tensors | {f"{QKV}.alpha": np.ones(3, np.float32)},
        "text": {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": tensors[up]},
        "dora": tensors | {f"{QKV}.dora_scale": np.ones((144, 1), np.float32)},
        "lokr": {k.replace("lora_up.weight", "lokr_w1"): v for k, v in tensors.items()},
        "both": tensors | {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": tensors[down]},
        "zero": {k: 0 * v if "up" in k and "qkv" in k else v for k, v in tensors.items() if "qkv" in k},
    }[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("half", f"missing {QKV}.lora_up.weight"),
        (
            "layer",
            "unused lora_unet_double_blocks_2_img_attn_proj.alpha",
        ),
        ("rows", rf"{QKV}.lora_up.weight has shape \(96, 12\), not \(144, 12\)"),
        ("ranks", rf"{QKV}.lora_up.weight has shape \(144, 12\), not \(144, 5\)"),
        ("none", rf"{QKV}.lora_down.weight has shape \(0, 48\), not \(1, 48\)"),
        ("alphas", rf"{QKV}.alpha has shape \(3,\), not \(1,\)"),
        ("text", r"has only keys of a text encoder \(lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight\)"),
        ("dora", f"unused {QKV}.dora_scale"),
        ("lokr", f"missing {QKV}.lora_up.weight"),
        ("both", "unused transformer.transformer_blocks.0.attn.to_q.lora_A.weight"),
        ("zero", "adds nothing to the model"),
    ],
)
def test_refused_files(small, tmp_path, name, words):
    file = tmp_path / "x.safetensors"
    save_file(broken(name, load_file(small.file)), file)
    with pytest.raises(WeightsError, match=words) as e:
        read(file, small.base)
    assert str(file) in str(e.value)


def test_a_model_without_the_layout(small):
    with pytest.raises(WeightsError, match="unused lora_unet_"):
        lora_files.load(small.file, small.base, flux.KEYS, CFG)
    with pytest.raises(WeightsError, match=r"no ComfyUI name for transformer_blocks\.0\.attn\.to_k"):
        file = small.folder / "no.safetensors"
        lora_files.save_fused(file, small.adapter, small.base, flux.KEYS, flux.COMFY[3:], CFG)


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch):
    """diffusers' converter knows FLUX.1-dev's widths only: the same code with the small world's."""
    source, wide = inspect.getsource(conversion._convert_kohya_flux_lora_to_diffusers), "[3072, 3072, 3072, 12288]"
    assert source.count(wide) == 1
    known = dict(vars(conversion))
    exec(source.replace(wide, "[160, 160, 160, 640]"), known)
    monkeypatch.setattr(
        pipeline, "_convert_kohya_flux_lora_to_diffusers", known["_convert_kohya_flux_lora_to_diffusers"]
    )


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "narrow")
def test_diffusers_draws_our_pictures(tmp_path):
    """The committed small world in f32, three Euler steps: our policy, and its ComfyUI file in diffusers."""
    cfg = config.Model(path=str(tiny.WORLD / "pipeline"), size=32, text_tokens=24, dtype="float32", remat=False)
    model, (base, decoder, _) = flux.make(cfg), flux.load(cfg)
    prompt = (tiny.WORLD / "prompts" / "test.txt").read_text().splitlines()[0]
    x1 = model.noise(jax.random.key(3))[None]
    adapter, file = made(base, model.lora_targets), tmp_path / "x.safetensors"
    pipe = FluxPipeline.from_pretrained(cfg.path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        states, pooled, _ = pipe.encode_prompt(prompt, None, max_sequence_length=24)
    cond = {"text": jnp.asarray(states.numpy()), "pooled": jnp.asarray(pooled.numpy())}
    noise = FluxPipeline._pack_latents(torch.tensor(np.asarray(x1)).permute(0, 3, 1, 2), 1, 8, 8, 8)

    @jax.jit
    def ours(variables):
        return model.decode(
            decoder,
            sampler.sample(
                lambda x, s: model.velocity(variables, x, s, cond), x1, sampler.table(model.sigmas(3), "euler")
            ),
        )

    def theirs():
        how = {"height": 32, "width": 32, "guidance_scale": 1.0, "max_sequence_length": 24}
        return pipe(prompt, latents=noise, num_inference_steps=3, output_type="np", **how).images

    before = theirs()
    lora_files.save_fused(file, adapter, base, model.keys, model.comfy, CFG)
    pipe.load_lora_weights(file)
    after = theirs()
    assert np.abs(before - after).max() > 10 / 255
    assert np.abs(np.asarray(ours(lora.policy(base, adapter, CFG))) - after).max() < 1e-4
    again = read(file, base)
    assert np.abs(np.asarray(ours(lora.policy(base, again, CFG))) - after).max() < 1e-4


# --- what a run delivers --------------------------------------------------------------------------------------------


def a_run(small, **changes):
    fields = {"name": "mine", "model": config.Model(path="/models/FLUX.1-dev"), "reward": "pickscore,hpsv2:0.5"}
    cfg = Config(**{**fields, "lora": CFG, "iterations": 300, "prompt_files": "prompts.txt", **changes})
    model = flux.make(config.Model(path=str(tiny.WORLD / "pipeline"), size=32, text_tokens=24))
    twice = jax.tree.map(lambda x: 2 * x, small.adapter)
    state = TrainState(*[None] * len(TrainState._fields))._replace(lora=twice, ema=small.adapter)
    state = state._replace(iteration=jnp.array(120), updates=jnp.array(240))
    return cfg, state, model._replace(init=lambda key: small.base)


def test_a_run_delivers_both_layouts_and_a_card(small, tmp_path):
    cfg, state, model = a_run(small)
    assert export.deliver(tmp_path, state, model, cfg) == tmp_path / "pytorch_lora_weights.safetensors"
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*"))
    names = ["comfyui/mine.safetensors", "pytorch_lora_weights.safetensors"]
    assert files == [names[0], *(f"current/{name}" for name in names), "model_card.md", names[1]]
    for name in names:
        same(read(tmp_path / name, small.base), small.adapter, rtol=2e-7)  # the average
        same(read(tmp_path / "current" / name, small.base), state.lora, rtol=2e-7)
    text = (tmp_path / "model_card.md").read_text()
    for words in (
        "# mine\n",
        "| base | `FLUX.1-dev` (model flux), whose licence this LoRA is under |",
        'from_pretrained("FLUX.1-dev", torch_dtype=torch.bfloat16)  # its folder, or its name on the Hub\n',
        "sol_rl: 96 candidates a prompt in 6 dpm2 steps in auto, 24 kept (best_worst) and drawn in 10 dpm2",
        "| reward | 1 x pickscore + 0.5 x hpsv2 |",
        "120 of 300, 48 prompts each; 240 updates",
        "rank 4, alpha 8 folded into the factors (so the scale to load it at is 1), on to_q, to_k, to_v, to_out.0",
        f"jax {jax.__version__}",
        'pipe.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")',
        "copy `comfyui/mine.safetensors` to `models/loras`",
    ):
        assert words in text, words
    assert "/models" not in text  # paths of this machine: a card is published


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("", ""),
        ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev"),
        ("org/name/file.pth", "org/name/file.pth"),
        ("~/models/FLUX", "FLUX"),
        ("../m/FLUX", "FLUX"),
        ("/m/FLUX", "FLUX"),
        ("here/FLUX", "FLUX"),
    ],
)
def test_a_card_has_names_on_the_hub_whole(path, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/FLUX").mkdir(parents=True)
    assert model_card.published(path) == shown


def test_a_model_without_the_layout_delivers_none(small, tmp_path):
    cfg, state, model = a_run(small, name="")
    export.deliver(tmp_path, state, model._replace(comfy=()), cfg)
    assert not (tmp_path / "comfyui").exists() and "ComfyUI" not in (tmp_path / "model_card.md").read_text()


def test_export_takes_either_layout(small, tmp_path, monkeypatch, capsys):
    cfg, _, model = a_run(small)
    monkeypatch.setattr(assemble, "model_module", lambda cfg: SimpleNamespace(make=lambda c: model))
    for file in (small.file, small.folder / "theirs.safetensors"):
        assert export.export(cfg, tmp_path / file.stem, place=None, lora_file=file) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{file}: LoRA of rank ") and " on 17 of 56 Linears, in 5 of 5 blocks\n" in out
        assert f"{file}: LoRA of rank 4 in {tmp_path / file.stem / 'pytorch_lora_weights.safetensors'}, for" in out
        for name in ("pytorch_lora_weights", "comfyui/mine"):
            found = read(tmp_path / file.stem / f"{name}.safetensors", small.base)
            same(found, small.adapter, rtol=2e-7)


def test_eval_and_sample_tell_how_much_is_adapted(small, monkeypatch, capsys):
    cfg, _, model = a_run(small)
    monkeypatch.setattr(assemble, "blank", lambda cfg, model, mesh: None)  # compiles nothing: of no use to a file
    parts = assemble.Parts(*[None] * len(assemble.Parts._fields))._replace(cfg=cfg, model=model)
    parts = parts._replace(mesh=sharding.make_mesh(1), frozen=Frozen(small.base, {}, {}))
    same(assemble.adapter(parts, None, small.file), small.adapter, rtol=2e-7)
    assert capsys.readouterr().out == f"{small.file}: LoRA of rank 4 on 17 of 56 Linears, in 5 of 5 blocks\n"


@pytest.mark.parametrize("name", [*recipes.FAMILIES, *recipes.METHODS])
def test_the_card_knows_the_family(name):
    cfg = recipes.family(Config(), name)
    assert model_card.family(cfg) == name
    assert f"{name}: " in model_card.facts(cfg, 1, 1, ("to_q",))["family"]
    assert model_card.family(dataclasses.replace(cfg, reward="shapes")) == name


def test_the_card_knows_a_method_on_the_samples_of_a_family():
    chosen = config.override(recipes.family(Config(), "flow_grpo_fast"), candidates=96, selection="best_worst")
    assert model_card.family(chosen) == "flow_grpo_fast on naive_scaling"
    assert model_card.family(config.override(Config(), **{"learn.algorithm": "awm"})) == "awm on sol_rl"
