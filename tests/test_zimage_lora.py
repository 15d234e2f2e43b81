"""LoRA files of Z-Image: names, that diffusers computes our velocities from them, files of other trainers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from oracle import error
from safetensors.numpy import load_file, save_file

from solrl_jax import lora, rollout
from solrl_jax.config import Lora, Stage
from solrl_jax.models import zimage
from solrl_jax.weights import WeightsError, lora_files
from tests import nano_zimage
from tests.test_comfy import made, same
from tests.test_lora_files import velocity_of_zimage
from tests.test_zimage import SMALL, inputs, params_of, theirs

CFG = Lora(rank=4, alpha=8.0)
FLOW_FACTORY = (*zimage.LORA_TARGETS, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
REST = ("adaLN_modulation.0", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2", "all_x_embedder.2-1")
REST += ("all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1")
BASE, GIVEN = params_of(nano_zimage.make_transformer()), inputs(SMALL)
BLOCKS = [
    f"{stack}.{i}" for stack, n in (("layers", 3), ("noise_refiner", 2), ("context_refiner", 2)) for i in range(n)
]


@pytest.fixture(scope="module")
def velocity():
    """Of our policy, as a function of the set; the network's own sign."""
    run = jax.jit(lambda variables: velocity_of_zimage(variables, **GIVEN))
    return lambda adapter: run(lora.policy(BASE, adapter, CFG))


def in_diffusers(file) -> torch.Tensor:
    """The velocity of diffusers' transformer after what `pipe.load_lora_weights(file)` does."""
    model = nano_zimage.make_transformer()
    ZImagePipeline.load_lora_into_transformer(ZImagePipeline.lora_state_dict(str(file)), model)
    return theirs(model, GIVEN)


def read(file):
    return lora_files.load(file, BASE, zimage.KEYS, CFG, zimage.COMFY).adapter


def sizes() -> dict[str, tuple[int, int]]:
    return lora_files._sizes(lora_files._linears(BASE, zimage.KEYS))


def test_the_table_names_every_linear_once():
    parts = [part for module in lora_files._layers(zimage.COMFY, sizes()) for part in module.parts]
    assert len(parts) == len(set(parts)) and set(parts) == sizes().keys() and len(parts) == 7 * 7 + 5 + 6
    assert not any(module.swapped for module in zimage.COMFY)  # the last layer has a scale alone


def test_names_in_the_files(tmp_path):
    adapter, file = made(BASE, FLOW_FACTORY), tmp_path / "x.safetensors"
    lora_files.save(file, adapter, zimage.KEYS, CFG)
    ends = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    ends += tuple(f"feed_forward.w{i}" for i in (1, 2, 3))
    assert set(load_file(file)) == {f"transformer.{b}.{e}.lora_{x}.weight" for b in BLOCKS for e in ends for x in "AB"}
    lora_files.save_fused(file, adapter, BASE, zimage.KEYS, zimage.COMFY, CFG)
    ends = ("attention_qkv", "attention_out", "feed_forward_w1", "feed_forward_w2", "feed_forward_w3")
    wanted = {f"lora_unet_{b.replace('.', '_')}_{e}" for b in BLOCKS for e in ends}
    stored = load_file(file)
    assert {key.split(".")[0] for key in stored} == wanted and len(stored) == 3 * len(wanted)
    pair, name = adapter["noise_refiner"]["attention"], "lora_unet_noise_refiner_1_attention_qkv"
    up, down = (stored[f"{name}.lora_{half}.weight"] for half in ("up", "down"))
    assert up.shape == (144, 12) and stored[f"{name}.alpha"] == 12
    for i, part in enumerate(("to_q", "to_k", "to_v")):
        np.testing.assert_array_equal(down[4 * i : 4 * i + 4], pair[part]["a"][1].T)
        np.testing.assert_array_equal(up[48 * i : 48 * i + 48, 4 * i : 4 * i + 4], 2 * pair[part]["b"][1].T)


# --- out ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("targets", [zimage.LORA_TARGETS, FLOW_FACTORY, ("to_q", "to_v", "feed_forward.w2")])
@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_diffusers_has_our_velocity(tmp_path, velocity, layout, targets):
    """Of both layouts; and each comes back as it was."""
    adapter, file = made(BASE, targets), tmp_path / "x.safetensors"
    if layout == "diffusers":
        lora_files.save(file, adapter, zimage.KEYS, CFG)
    else:
        lora_files.save_fused(file, adapter, BASE, zimage.KEYS, zimage.COMFY, CFG)
    found = in_diffusers(file)
    assert error(velocity(adapter), found) < 1e-5
    assert error(velocity(jax.tree.map(jnp.zeros_like, adapter)), found) > 0.05
    same(read(file), adapter, rtol=2e-7)


@pytest.mark.usefixtures("one_thread")
def test_every_linear_goes_out(tmp_path, velocity):
    """Embedders, modulation and the last layer too: diffusers reads its own layout of them, we read both."""
    adapter, file = made(BASE, (*FLOW_FACTORY, *REST)), tmp_path / "x.safetensors"
    lora_files.save(file, adapter, zimage.KEYS, CFG)
    assert error(velocity(adapter), in_diffusers(file)) < (1e-5 if jax.__version_info__ < (0, 12) else 1.1e-5)
    same(read(file), adapter, rtol=2e-7)
    lora_files.save_fused(file, adapter, BASE, zimage.KEYS, zimage.COMFY, CFG)
    same(read(file), adapter, rtol=2e-7)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_diffusers_draws_our_pictures(tmp_path):
    """Three guided Euler steps in f32: our policy, and the file of it at scale 1 in diffusers' pipeline."""
    cfg = nano_zimage.model(nano_zimage.write(tmp_path / "zimage"))
    model, (base, decoder, encoders) = zimage.make(cfg), zimage.load(cfg)
    adapter, prompts = made(base, model.lora_targets), ["a red circle", "a small blue square and more"]
    cond = jax.jit(model.encode)(encoders, jax.tree.map(jnp.asarray, model.tokenize([*prompts, ""])))
    away, cond = jax.tree.map(lambda x: x[2:], cond), jax.tree.map(lambda x: x[:2], cond)
    keys, stage = jax.random.split(jax.random.key(3), (2, 1)), Stage(3, "euler", chunk=2, guidance=5.0)

    @jax.jit
    def ours(variables):
        return model.decode(decoder, rollout.integrate(variables, cond, keys, model=model, stage=stage, negative=away))

    pipe = ZImagePipeline.from_pretrained(cfg.path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.tensor(np.asarray(rollout.noises(model, keys[:, 0]))).permute(0, 3, 1, 2)
    how = {"latents": noise, "height": 16, "width": 16, "num_inference_steps": 3, "guidance_scale": 4.0}
    how |= {"max_sequence_length": nano_zimage.TOKENS, "output_type": "np"}
    before = pipe(prompt=list(prompts), **how).images
    lora_files.save(tmp_path / "set.safetensors", adapter, model.keys, CFG)
    pipe.load_lora_weights(tmp_path / "set.safetensors")
    after = pipe(prompt=list(prompts), **how).images
    assert np.abs(before - after).max() > 10 / 255
    assert np.abs(np.asarray(ours(lora.policy(base, adapter, CFG))) - after).max() < 1e-4


# --- in -------------------------------------------------------------------------------------------------------------


def trained(modules: dict[str, tuple[int, int]], rank: int = 3) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A dense pair (down, up) for each module, as another trainer makes them."""
    rng = np.random.default_rng(0)
    return {
        name: tuple(rng.normal(0, 0.3, shape).astype(np.float32) for shape in ((rank, n), (out, rank)))
        for name, (n, out) in modules.items()
    }


def own() -> dict[str, tuple[int, int]]:
    """The blocks' Linears but for the modulation, by their names in diffusers."""
    return {name: size for name, size in sizes().items() if "attention" in name or "feed_forward" in name}


def original() -> dict[str, tuple[int, int]]:
    """The same in the original network, where q, k and v are one."""
    fused = {f"{block}.attention.qkv": (48, 144) for block in BLOCKS}
    fused |= {f"{block}.attention.out": (48, 48) for block in BLOCKS}
    return fused | {name: size for name, size in own().items() if "feed_forward" in name}


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("alphas", [True, False])
@pytest.mark.parametrize("modules", [own, original])
def test_kohyas_files(tmp_path, velocity, modules, alphas):
    """lora_unet_ with the names of diffusers' modules or of the original's; an alpha that is not the rank, or none."""
    file, tensors = tmp_path / "x.safetensors", {}
    for name, (down, up) in trained(modules()).items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors |= {f"{key}.alpha": np.array(1.5, np.float32)} if alphas else {}
    save_file(tensors, file)
    found, said = lora_files.load(file, BASE, zimage.KEYS, CFG, zimage.COMFY)
    assert error(velocity(found), in_diffusers(file)) < 1e-5
    assert said == ("LoRA of rank 3 on 49 of 60 Linears, in 7 of 7 blocks",)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_ai_toolkits_files(tmp_path, velocity):
    """diffusion_model. with diffusers' dotted names, of a rank each."""
    file, tensors = tmp_path / "x.safetensors", {}
    for rank, names in ((2, "to_q to_v w1"), (5, "to_k to_out w2 w3")):
        some = {name: size for name, size in own().items() if any(x in name for x in names.split())}
        for name, (down, up) in trained(some, rank).items():
            tensors |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
    save_file(tensors, file)
    found, said = lora_files.load(file, BASE, zimage.KEYS, CFG, zimage.COMFY)
    assert error(velocity(found), in_diffusers(file)) < 1e-5
    assert said == ("LoRA of rank 5 on 49 of 60 Linears, in 7 of 7 blocks",)
    assert found["layers"]["attention"]["to_q"]["a"].shape == (3, 48, 2)


def test_comfyuis_dotted_names(tmp_path):
    """diffusion_model. with the original's fused names is what its lora_unet_ files hold; diffusers refuses it."""
    file, found = tmp_path / "x.safetensors", []
    for prefix, mark, down_end, up_end in (
        ("lora_unet_", "_", "lora_down", "lora_up"),
        ("diffusion_model.", ".", "lora_A", "lora_B"),
    ):
        tensors = {}
        for name, (down, up) in trained(original()).items():
            key = prefix + name.replace(".", mark)
            tensors |= {f"{key}.{down_end}.weight": down, f"{key}.{up_end}.weight": up}
        save_file(tensors, file)
        found.append(read(file))
    same(*found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("diffusion_model.layers.0.attention.to_k.lora_B.weight"), "missing lora_unet_layers_0_attent"),
        (
            lambda t: t.update(
                {"diffusion_model.layers.3.attention.to_k.lora_A.weight": np.zeros((3, 48), np.float32)}
            ),
            "unused lora_unet_layers_3_attention_to_k.lora_down.weight",
        ),
        (
            lambda t: t.update(
                {f"diffusion_model.layers.0.attention.qkv.lora_{x}.weight": np.ones(s) for x, s in QKV.items()}
            ),
            r"layers\.0\.attention\.to_q is adapted by two modules",
        ),
        (
            lambda t: t.update({"diffusion_model.layers.0.attention.to_k.lora_A.weight": np.zeros((3, 64))}),
            r"lora_down.weight has shape \(3, 64\), not \(3, 48\)",
        ),
        (
            lambda t: t.update({"diffusion_model.layers.0.attention.to_k.dora_scale": np.zeros(48)}),
            "which is of a DoRA",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, words):
    tensors = {}
    for name, (down, up) in trained(own()).items():
        tensors |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=words):
        read(tmp_path / "x.safetensors")


QKV = {"A": (3, 48), "B": (144, 3)}
