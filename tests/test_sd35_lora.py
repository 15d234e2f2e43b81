"""LoRA files of SD3.5: what they touch, that diffusers draws our pictures from them, where ComfyUI finds the rows."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.numpy import load_file, save_file

from solrl_jax import lora, sampler
from solrl_jax.config import Lora, Model
from solrl_jax.models import sd35
from solrl_jax.models.sd35 import Sd35Config
from solrl_jax.structs import leaves_by_path
from solrl_jax.weights import WeightsError, hub, lora_files
from tests import nano_sd35
from tests.test_comfy import made, same
from tests.test_lora import drawn
from tests.test_sd35 import shapes_of

CFG = Lora(rank=4, alpha=8.0)
ALL = (*sd35.LORA_TARGETS, "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "net.0.proj", "net.2", "linear")
ALL += ("context_embedder", "proj_out", "linear_1", "linear_2")


def small(**changes):
    """A small SD3.5 without weights: config, base, key table and ComfyUI's."""
    cfg = Sd35Config(**{**nano_sd35.TRANSFORMER_FIELDS, **nano_sd35.MEDIUM, **changes})
    return SimpleNamespace(cfg=cfg, base=shapes_of(cfg), keys=sd35.keys(cfg), comfy=sd35.comfy(cfg))


@pytest.mark.parametrize(("size", "modules", "parameters"), [(0, 303, 47_161_344), (1, 191, 18_776_064)])
def test_targets(tmp_path, size, modules, parameters):
    """303 modules of Large, 191 of Medium, whose second attention stays as it is."""
    path = str(hub.write_configs(tmp_path, list(sd35.PUBLIC.values())[size]))
    model = sd35.make(Model(name="sd35", path=path, size=1024))
    base = jax.eval_shape(model.init, jax.random.key(0))
    found = lora.adapted(base, model.lora_targets)
    assert sum(shape[0] for shape in found.values()) == modules and not any("attn2" in path for path in found)
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), base, model.lora_targets, Lora(32)))
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == parameters


def test_names_in_the_file(tmp_path):
    m = small()
    adapter = made(m.base, sd35.LORA_TARGETS)
    lora_files.save(tmp_path / "x.safetensors", adapter, m.keys, CFG)
    stored = load_file(tmp_path / "x.safetensors")
    assert len(stored) == 2 * (5 * 8 - 1)  # the last block has no to_add_out
    for name, at in (("transformer_blocks_0", 1), ("transformer_blocks_2", 1), ("transformer_blocks_4", 0)):
        number = int(name.rsplit("_", 1)[1]) + at
        a = adapter[name]["attn"]["add_k_proj"]["a"][at]
        key = f"transformer.transformer_blocks.{number}.attn.add_k_proj.lora_A.weight"
        np.testing.assert_array_equal(stored[key], a.T)
    same(lora_files.load(tmp_path / "x.safetensors", m.base, m.keys, CFG, m.comfy).adapter, adapter, rtol=2e-7)


# --- ComfyUI --------------------------------------------------------------------------------------------------------


def test_the_table_names_every_linear_once():
    m = small()
    parts = [part for module in m.comfy for part in module.parts]
    linears = {name for leaf in lora_files._linears(m.base, m.keys) for name in lora_files._module_names(leaf)}
    assert len(parts) == len(set(parts)) and linears <= set(parts)
    swapped = ["joint_blocks_4_context_block_adaLN_modulation_1", "final_layer_adaLN_modulation_1"]
    assert [module.name for module in m.comfy if module.swapped] == swapped


def test_rows_lie_where_the_original_checkpoint_has_them(tmp_path):
    """diffusers' converter of Stability AI's own checkpoints as the judge: our up factors in place of its kernels."""
    m = small()
    adapter, file = made(m.base, ALL), tmp_path / "x.safetensors"
    lora_files.save(tmp_path / "y.safetensors", adapter, m.keys, CFG)
    lora_files.save_fused(file, adapter, m.base, m.keys, m.comfy, CFG)
    theirs, stored = load_file(tmp_path / "y.safetensors"), load_file(file)
    modules = {f"lora_unet_{name.replace('.', '_')}": name for name in native(m.cfg)}
    linears = {key for key, name in modules.items() if ".ln_" not in name and not name.startswith("x_embedder")}
    assert {key.split(".", 1)[0] for key in stored} == linears
    whole = {"pos_embed": torch.zeros(1)}
    for key, name in modules.items():
        up = torch.tensor(stored.get(f"{key}.lora_up.weight", np.zeros(1, np.float32)))
        whole |= {f"{name}.weight": up, f"{name}.bias": torch.zeros(len(up))}
    found = convert_sd3_transformer_checkpoint_to_diffusers(whole)
    pairs = [key for key in theirs if key.endswith("lora_B.weight")]
    assert len(pairs) == len(lora_files._sizes(lora_files._linears(m.base, m.keys)))
    for key in pairs:
        name = key.removeprefix("transformer.").removesuffix(".lora_B.weight")
        rows = found[f"{name}.weight"].numpy()
        np.testing.assert_array_equal(rows[:, rows.any(0)], theirs[key], name)
    same(lora_files.load(file, m.base, m.keys, CFG, m.comfy).adapter, adapter, rtol=2e-7)


def native(cfg: Sd35Config) -> list[str]:
    """Stability AI's names of all modules with weights."""
    found = ["x_embedder.proj", "context_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    found += [f"{x}_embedder.mlp.{i}" for x in "ty" for i in (0, 2)]
    for i in range(cfg.num_layers):
        ends = ["attn.qkv", "attn.ln_q", "attn.ln_k", "adaLN_modulation.1"]
        more = ["attn.proj", "mlp.fc1", "mlp.fc2"]
        again = ["attn2.qkv", "attn2.ln_q", "attn2.ln_k", "attn2.proj"] if i in cfg.dual_attention_layers else []
        found += [f"joint_blocks.{i}.x_block.{end}" for end in (*ends, *more, *again)]
        found += [f"joint_blocks.{i}.context_block.{e}" for e in (*ends, *(more if i < cfg.num_layers - 1 else []))]
    return found


def test_comfyui_also_reads_its_dotted_names(tmp_path):
    m = small()
    adapter, file = made(m.base, sd35.LORA_TARGETS), tmp_path / "x.safetensors"
    lora_files.save_fused(file, adapter, m.base, m.keys, m.comfy, CFG)
    stored = load_file(file)
    key = "lora_unet_joint_blocks_4_context_block_attn_qkv.lora_down.weight"
    assert stored[key].shape == (12, 48)
    dotted = {}
    for name in native(m.cfg):
        for end, other in (("lora_down.weight", "lora_A.weight"), ("lora_up.weight", "lora_B.weight"), ("alpha",) * 2):
            if (k := f"lora_unet_{name.replace('.', '_')}.{end}") in stored:
                dotted[f"diffusion_model.{name}.{other}"] = stored[k]
    assert len(dotted) == len(stored)
    save_file(dotted, file)
    same(lora_files.load(file, m.base, m.keys, CFG, m.comfy).adapter, adapter, rtol=2e-7)


# --- another model's ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_the_other_size_is_refused(tmp_path, layout):
    """Medium has other widths than Large: said by name, nothing is loaded in part."""
    wide = {"num_attention_heads": 4, "caption_projection_dim": 64, "num_layers": 7, "dual_attention_layers": ()}
    medium, large, file = small(), small(**wide), tmp_path / "x.safetensors"
    adapter = made(medium.base, sd35.LORA_TARGETS)
    if layout == "diffusers":
        lora_files.save(file, adapter, medium.keys, CFG)
    else:
        lora_files.save_fused(file, adapter, medium.base, medium.keys, medium.comfy, CFG)
    with pytest.raises(WeightsError, match=r"is not a LoRA of this model") as e:
        lora_files.load(file, large.base, large.keys, CFG, large.comfy)
    assert "blocks" in str(e.value) and "more" in str(e.value)
    same_depth = small(**wide | {"num_layers": 5})
    with pytest.raises(WeightsError, match=r"has shape \(\d+, 48\), not \(\d+, 64\)"):
        lora_files.load(file, same_depth.base, same_depth.keys, CFG, same_depth.comfy)


def test_fewer_blocks_of_the_same_widths_are_told(tmp_path):
    """The names fit and so do the shapes: the set is taken, and what is printed says that blocks are left over."""
    few, many, file = small(), small(num_layers=7), tmp_path / "x.safetensors"
    lora_files.save(file, made(few.base, ("attn.to_q", "attn.to_k")), few.keys, CFG)
    found, said = lora_files.load(file, many.base, many.keys, CFG, many.comfy)
    assert said == ("LoRA of rank 4 on 10 of 110 Linears, in 5 of 7 blocks; the others are not changed",)
    assert set(found) == {"transformer_blocks_0", "transformer_blocks_2"}  # the last block is a stack of its own
    assert not found["transformer_blocks_2"]["attn"]["to_q"]["b"][3:].any()


def test_attn2_of_medium_on_large(tmp_path):
    """What only Medium has is unknown to Large, at the same widths too."""
    medium, large, file = small(), small(dual_attention_layers=()), tmp_path / "x.safetensors"
    lora_files.save(file, made(medium.base, ("attn2.to_q",)), medium.keys, CFG)
    with pytest.raises(WeightsError, match=r"unused transformer.transformer_blocks.0.attn2.to_q.lora_A.weight"):
        lora_files.load(file, large.base, large.keys, CFG, large.comfy)


# --- diffusers ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_diffusers_draws_our_pictures(tmp_path):
    """Three Euler steps in f32: our policy, and the file of it at scale 1 in diffusers."""
    cfg = nano_sd35.model(nano_sd35.write(tmp_path / "sd35", **nano_sd35.MEDIUM))
    model, (base, decoder, _) = sd35.make(cfg), sd35.load(cfg)
    x1 = jax.vmap(model.noise)(jax.random.split(jax.random.key(3), 2))
    adapter = drawn(lora.init(jax.random.key(0), base, model.lora_targets, CFG), 0.1)

    @jax.jit
    def ours(variables):
        velocity = lambda x, sigma: model.velocity(variables, x, sigma, cond)  # noqa: E731
        return model.decode(decoder, sampler.sample(velocity, x1, sampler.table(model.sigmas(3), "euler")))

    pipe = StableDiffusion3Pipeline.from_pretrained(cfg.path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red circle", "a small blue square"]
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=nano_sd35.TOKENS
        )
    cond = {"text": jnp.asarray(states.numpy()), "pooled": jnp.asarray(pooled.numpy())}
    noise = torch.tensor(np.asarray(x1)).permute(0, 3, 1, 2)

    def theirs():
        how = {"height": 16, "width": 16, "guidance_scale": 1.0, "max_sequence_length": nano_sd35.TOKENS}
        return pipe(prompts, latents=noise, num_inference_steps=3, output_type="np", **how).images

    before = theirs()
    lora_files.save(tmp_path / "set.safetensors", adapter, model.keys, CFG)
    pipe.load_lora_weights(tmp_path / "set.safetensors")
    after = theirs()
    assert np.abs(before - after).max() > 10 / 255
    assert np.abs(np.asarray(ours(lora.policy(base, adapter, CFG))) - after).max() < 1e-4
    assert all(leaves_by_path(adapter)[path].any() for path in leaves_by_path(adapter))
