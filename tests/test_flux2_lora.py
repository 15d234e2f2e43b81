"""LoRA files of FLUX.2-klein: what they touch, that diffusers computes our velocities from them, files of others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from oracle import error
from safetensors.numpy import load_file, save_file

from solrl_jax import lora, rollout, weights
from solrl_jax.config import ConfigError, Lora, Model, Stage
from solrl_jax.models import flux, flux2, public
from solrl_jax.models.flux2 import Flux2Config, Flux2Transformer
from solrl_jax.weights import WeightsError, hub, lora_files
from tests import nano_flux2
from tests.test_comfy import made, same
from tests.test_flux import Held
from tests.test_flux2 import SMALL, inputs, make_transformer, shapes_of, table_of, theirs

CFG = Lora(rank=4, alpha=8.0)
ALL = (*flux2.LORA_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "linear_in", "linear_out")
REST = ("x_embedder", "context_embedder", "linear_1", "linear_2", "proj_out")
MODULATION = ("double_stream_modulation_img.linear", "double_stream_modulation_txt.linear")
MODULATION += ("single_stream_modulation.linear", "norm_out.linear")
KLEIN = Flux2Config(**SMALL)
BASE = weights.load(Held(make_transformer()), shapes_of(KLEIN), flux2.KEYS)
GIVEN, TABLE = inputs(KLEIN, 3, 4, 5), table_of(KLEIN, 3, 4, 5)


@pytest.fixture(scope="module")
def velocity():
    """Of our policy, as a function of the set."""
    network = Flux2Transformer(KLEIN, jnp.float32)
    run = jax.jit(lambda variables: network.apply(variables, **GIVEN, rope=TABLE))
    return lambda adapter: run(lora.policy(BASE, adapter, CFG))


def in_diffusers(file) -> torch.Tensor:
    """The velocity of diffusers' transformer after what `pipe.load_lora_weights(file)` does."""
    model = make_transformer()
    Flux2KleinPipeline.load_lora_into_transformer(Flux2KleinPipeline.lora_state_dict(str(file)), model)
    return theirs(model, GIVEN, 3, 4)


def read(file, **changes):
    return lora_files.load(file, BASE, flux2.KEYS, CFG, flux2.COMFY, **changes).adapter


# --- what is adapted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "modules", "parameters"),
    [
        (flux2.LORA_TARGETS, 60, 33_423_360),
        (ALL, 100, 48_168_960),
        (flux.LORA_TARGETS, 20, 3_932_160),  # FLUX.1's four names: the double blocks' image stream alone
        (("attn.to_out",), 20, 20 * 32 * (12288 + 3072)),
        (("attn.to_out.0",), 5, 5 * 32 * (3072 + 3072)),
    ],
)
def test_targets(tmp_path, targets, modules, parameters):
    """Modules and parameters at rank 32 of klein-4B. "attn.to_out" is the single blocks', "attn.to_out.0" the double
    blocks'."""
    path = str(hub.write_configs(tmp_path, public.FLUX2["black-forest-labs/FLUX.2-klein-base-4B"]))
    model = flux2.make(Model(name="flux2", path=path, text_tokens=512))
    base = jax.eval_shape(model.init, jax.random.key(0))
    found = lora.adapted(base, targets)
    assert sum(shape[0] for shape in found.values()) == modules
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), base, targets, Lora(32)))
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == parameters
    with pytest.raises(ConfigError, match=r"lora.targets \['proj_mlp'\] name no Linear of this model"):
        lora.adapted(base, (*targets, "proj_mlp"))  # FLUX.1's


def test_names_in_the_file(tmp_path):
    adapter, file = made(BASE, flux2.LORA_TARGETS), tmp_path / "x.safetensors"
    lora_files.save(file, adapter, flux2.KEYS, CFG)
    stored = load_file(file)
    assert len(stored) == 2 * (2 * 4 + 3 * 2)
    pair = adapter["single_transformer_blocks"]["attn"]["to_out"]
    key = "transformer.single_transformer_blocks.2.attn.to_out.lora_{}.weight"
    np.testing.assert_array_equal(stored[key.format("A")], pair["a"][2].T)
    np.testing.assert_array_equal(stored[key.format("B")], 2 * pair["b"][2].T)
    assert "transformer.transformer_blocks.1.attn.to_out.0.lora_A.weight" in stored


def test_the_table_names_every_linear_once():
    parts = [part for module in lora_files._layers(flux2.COMFY, names()) for part in module.parts]
    assert len(parts) == len(set(parts)) and set(parts) == names() and len(parts) == 2 * 12 + 3 * 2 + 9
    assert [module.name for module in flux2.COMFY if module.swapped] == ["final_layer_adaLN_modulation_1"]


def names() -> set[str]:
    return set(lora_files._sizes(lora_files._linears(BASE, flux2.KEYS)))


# --- out ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("targets", [flux2.LORA_TARGETS, (*ALL, *REST), ("to_q", "to_v", "linear_in")])
@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_diffusers_has_our_velocity(tmp_path, velocity, layout, targets):
    """Of both layouts; and each comes back as it was."""
    adapter, file = made(BASE, targets), tmp_path / "x.safetensors"
    if layout == "diffusers":
        lora_files.save(file, adapter, flux2.KEYS, CFG)
    else:
        lora_files.save_fused(file, adapter, BASE, flux2.KEYS, flux2.COMFY, CFG)
    found = in_diffusers(file)
    assert error(velocity(adapter), found) < 3e-5
    assert error(velocity(jax.tree.map(jnp.zeros_like, adapter)), found) > 0.05
    same(read(file), adapter, rtol=2e-7)


@pytest.mark.usefixtures("one_thread")
def test_modulation_goes_out_in_diffusers_names(tmp_path, velocity):
    """diffusers reads it in its own layout, and leaves it out of ComfyUI's. There norm_out's halves are in the order
    of the original network, shift and scale."""
    adapter, file, other = made(BASE, MODULATION), tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    lora_files.save(file, adapter, flux2.KEYS, CFG)
    assert error(velocity(adapter), in_diffusers(file)) < 3e-5
    lora_files.save_fused(other, adapter, BASE, flux2.KEYS, flux2.COMFY, CFG)
    up = load_file(other)["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    scale, shift = np.split(load_file(file)["transformer.norm_out.linear.lora_B.weight"], 2)
    np.testing.assert_array_equal(up, np.concatenate([shift, scale]))
    for written in (file, other):
        same(read(written), adapter, rtol=2e-7)
    assert not Flux2KleinPipeline.lora_state_dict(str(other))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_diffusers_draws_our_pictures(tmp_path):
    """Three guided Euler steps in f32: our policy, and the file of it at scale 1 in diffusers' pipeline."""
    cfg = nano_flux2.model(nano_flux2.write(tmp_path / "klein"))
    model, (base, decoder, encoders) = flux2.make(cfg), flux2.load(cfg)
    adapter, prompts = made(base, model.lora_targets), ["a red circle", "a small blue square"]
    tokens = jax.tree.map(jnp.asarray, model.tokenize([*prompts, ""]))
    cond = jax.jit(model.encode)(encoders, tokens)
    away, cond = jax.tree.map(lambda x: x[2:], cond), jax.tree.map(lambda x: x[:2], cond)
    keys, stage = jax.random.split(jax.random.key(3), (2, 1)), Stage(3, "euler", chunk=2, guidance=4.0)

    @jax.jit
    def ours(variables):
        return model.decode(decoder, rollout.integrate(variables, cond, keys, model=model, stage=stage, negative=away))

    pipe = Flux2KleinPipeline.from_pretrained(cfg.path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.tensor(np.asarray(rollout.noises(model, keys[:, 0]))).permute(0, 3, 1, 2)
    how = {"latents": noise, "height": 16, "width": 16, "num_inference_steps": 3, "guidance_scale": 4.0}
    before = pipe(prompt=prompts, output_type="np", **how).images
    lora_files.save(tmp_path / "set.safetensors", adapter, model.keys, CFG)
    pipe.load_lora_weights(tmp_path / "set.safetensors")
    after = pipe(prompt=prompts, output_type="np", **how).images
    assert np.abs(before - after).max() > 10 / 255
    assert np.abs(np.asarray(ours(lora.policy(base, adapter, CFG))) - after).max() < 1e-4


# --- in -------------------------------------------------------------------------------------------------------------


def native() -> dict[str, tuple[int, int]]:
    """{Black Forest Labs' dotted name of a Linear of the blocks: (in, out)} of the small model."""
    width, hidden, found = KLEIN.width, KLEIN.hidden, {}
    for i in range(KLEIN.num_layers):
        for stream in ("img", "txt"):
            found[f"double_blocks.{i}.{stream}_attn.qkv"] = width, 3 * width
            found[f"double_blocks.{i}.{stream}_attn.proj"] = width, width
            found[f"double_blocks.{i}.{stream}_mlp.0"] = width, 2 * hidden
            found[f"double_blocks.{i}.{stream}_mlp.2"] = hidden, width
    for i in range(KLEIN.num_single_layers):
        found[f"single_blocks.{i}.linear1"] = width, 3 * width + 2 * hidden
        found[f"single_blocks.{i}.linear2"] = width + hidden, width
    return found


def trained(modules: dict[str, tuple[int, int]], rank: int = 3) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A dense pair (down, up) for each module, as another trainer makes them."""
    rng = np.random.default_rng(0)
    return {
        name: tuple(rng.normal(0, 0.3, shape).astype(np.float32) for shape in ((rank, n), (out, rank)))
        for name, (n, out) in modules.items()
    }


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("trainer", ["kohya", "ai-toolkit", "ai-toolkit in diffusers' names"])
def test_files_of_other_trainers(tmp_path, velocity, trainer):
    """Read as diffusers reads them: kohya's with an alpha that is not the rank, ai-toolkit's without."""
    file, tensors = tmp_path / "x.safetensors", {}
    if trainer == "kohya":
        for name, (down, up) in trained(native()).items():
            key = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": np.float32(1.5)}
    else:
        own = {name: size for name, size in sizes().items() if "blocks" in name}
        modules = native() if trainer == "ai-toolkit" else own
        for name, (down, up) in trained(modules).items():
            key = f"diffusion_model.{name}"
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    save_file({key: np.asarray(x) for key, x in tensors.items()}, file)
    found, said = lora_files.load(file, BASE, flux2.KEYS, CFG, flux2.COMFY)
    assert error(velocity(found), in_diffusers(file)) < 3e-5
    assert said == ("LoRA of rank 3 on 30 of 39 Linears, in 5 of 5 blocks",)


def sizes() -> dict[str, tuple[int, int]]:
    return lora_files._sizes(lora_files._linears(BASE, flux2.KEYS))


def test_a_linear_that_two_modules_adapt(tmp_path):
    """One would silently win: the fused q, k and v, and q by its own name."""
    q, qkv = "transformer_blocks_0_attn_to_q", "double_blocks_0_img_attn_qkv"
    tensors = {}
    for name, out in ((q, 48), (qkv, 144)):
        tensors |= {f"lora_unet_{name}.lora_down.weight": np.ones((2, 48), np.float32)}
        tensors |= {f"lora_unet_{name}.lora_up.weight": np.ones((out, 2), np.float32)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"transformer_blocks\.0\.attn\.to_q is adapted by two modules"):
        read(tmp_path / "x.safetensors")


def test_a_file_of_flux1_is_refused(tmp_path):
    """The names of its double blocks are klein's; those of its single blocks are not."""
    from tests.test_flux import shapes_of as flux_shapes
    from tests.test_lora import SMALL as FLUX1

    base = flux_shapes(flux.FluxConfig(**FLUX1, guidance_embeds=True))
    adapter = made(base, (*flux.LORA_TARGETS, "proj_mlp"))
    lora_files.save(tmp_path / "x.safetensors", adapter, flux.KEYS, CFG)
    with pytest.raises(WeightsError, match=r"unused transformer.single_transformer_blocks.0.(attn.to_q|proj_mlp)"):
        read(tmp_path / "x.safetensors")
