"""FLUX.2-klein against diffusers: transformer, VAE, sigmas and whole pictures, on small random weights."""

import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from oracle import error, randomise
from safetensors.numpy import load_file

from solrl_jax import config, lora, quant, rollout, sharding, weights
from solrl_jax.config import ConfigError, Stage
from solrl_jax.models import flux2, public, vae
from solrl_jax.models.flux2 import Flux2Config, Flux2Transformer, TextStates
from solrl_jax.models.schedule import Schedule
from solrl_jax.quant import coverage
from solrl_jax.run.encode import Conditioner
from solrl_jax.weights import hub
from tests import nano_flux2
from tests.test_flux import Held, rewrite
from tests.tiers import slow

SMALL = {"in_channels": 16, "attention_head_dim": 16, "num_attention_heads": 3, "joint_attention_dim": 24}
SMALL |= {"axes_dims_rope": (4, 4, 4, 4), "num_layers": 2, "num_single_layers": 3, "guidance_embeds": False}
DYNAMIC = Schedule(shift=3.0, use_dynamic_shifting=True)


def make_transformer(**changes):
    return randomise(Flux2Transformer2DModel(**SMALL | changes))


def inputs(cfg: Flux2Config, height: int, width: int, tokens: int) -> dict[str, jax.Array]:
    """Arguments of Flux2Transformer but for the RoPE table, two samples of them."""
    rng = np.random.default_rng(0)
    shapes = {"x": (2, height * width, cfg.in_channels), "text": (2, tokens, cfg.joint_attention_dim)}
    drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return jax.tree.map(jnp.asarray, drawn | {"sigma": np.float32([0.95, 0.2])})


def table_of(cfg: Flux2Config, height: int, width: int, tokens: int):
    return tuple(map(jnp.asarray, flux2.rope_table(cfg, height, width, tokens)))


@functools.lru_cache
def shapes_of(cfg: Flux2Config):
    """The parameters without their arrays."""
    network, given, table = Flux2Transformer(cfg, jnp.float32), inputs(cfg, 2, 2, 3), table_of(cfg, 2, 2, 3)
    return jax.eval_shape(lambda: network.init(jax.random.key(0), **given, rope=table)["params"])


@functools.lru_cache
def compiled(cfg: Flux2Config, dtype, remat: bool):
    network = Flux2Transformer(cfg, dtype, remat)
    return jax.jit(lambda params, given, table: network.apply({"params": params}, **given, rope=table))


def ours(params, given, height: int, width: int, *, cfg: Flux2Config, dtype=jnp.float32, remat: bool = False):
    return compiled(cfg, dtype, remat)(params, given, table_of(cfg, height, width, given["text"].shape[1]))


def image_ids(height: int, width: int) -> torch.Tensor:
    return Flux2KleinPipeline._prepare_latent_ids(torch.zeros(1, 1, height, width))[0]


def text_ids(tokens: int) -> torch.Tensor:
    return Flux2KleinPipeline._prepare_text_ids(torch.zeros(1, tokens, 1))[0]


def theirs(model: Flux2Transformer2DModel, given, height: int, width: int) -> torch.Tensor:
    t = {name: torch.tensor(np.asarray(value)) for name, value in given.items()}
    with torch.no_grad():
        return model(
            hidden_states=t["x"],
            encoder_hidden_states=t["text"],
            timestep=t["sigma"],
            img_ids=image_ids(height, width),
            txt_ids=text_ids(t["text"].shape[1]),
        ).sample


# --- the transformer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "remat"),
    [
        ({}, False),
        ({"num_layers": 1, "mlp_ratio": 2.5, "rope_theta": 100}, True),
        ({"axes_dims_rope": (2, 6, 6, 2), "timestep_guidance_channels": 32}, False),
    ],
)
def test_transformer_from_shards(tmp_path, changes, remat):
    model = make_transformer(**changes)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file()
    cfg = Flux2Config.read(tmp_path)
    files = weights.Files(tmp_path, "diffusion_pytorch_model")
    params = weights.load(files, shapes_of(cfg), flux2.KEYS)
    assert params["single_transformer_blocks"]["attn"]["to_out"]["kernel"].shape == (3, 48 + cfg.hidden, 48)
    given = inputs(cfg, 3, 4, 5)
    assert error(ours(params, given, 3, 4, cfg=cfg, remat=remat), theirs(model, given, 3, 4)) < 3e-5
    weights.save(params, flux2.KEYS, tmp_path / "out.safetensors")  # what we write is what diffusers wrote
    saved = load_file(tmp_path / "out.safetensors")
    assert saved.keys() == set(files.keys())
    assert all(np.array_equal(saved[key], files[key]) for key in saved)


def test_text_states_computed_before():
    """The context that a rollout computes once gives the same velocity."""
    cfg = Flux2Config(**SMALL)
    params, given = weights.load(Held(make_transformer()), shapes_of(cfg), flux2.KEYS), inputs(cfg, 3, 4, 5)
    table, text = table_of(cfg, 3, 4, 5), given.pop("text")
    network = Flux2Transformer(cfg, jnp.float32)
    run = jax.jit(lambda params, **more: network.apply({"params": params}, **given, **more, rope=table))
    context = TextStates(cfg, jnp.float32).apply({"params": params}, text)
    assert context.shape == (2, 5, 48)
    np.testing.assert_allclose(run(params, context=context), run(params, text=text), atol=1e-6)


def test_every_text_position_attends_at_its_place():
    """Padding is not masked, and the order of the text's states matters: no other model of the package does this."""
    cfg = Flux2Config(**SMALL)
    params, given = weights.load(Held(make_transformer()), shapes_of(cfg), flux2.KEYS), inputs(cfg, 3, 4, 5)
    network, table = Flux2Transformer(cfg, jnp.float32), table_of(cfg, 3, 4, 5)
    run = jax.jit(lambda text: network.apply({"params": params}, **given | {"text": text}, rope=table))
    plain = run(given["text"])
    for other in (given["text"].at[:, -1].set(0.0), given["text"][:, ::-1]):
        assert np.abs(run(other) - plain).max() > 1e-3


@pytest.mark.slow
def test_true_width():
    """One double and one single block of klein-4B's own width."""
    values = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 24, "joint_attention_dim": 7680}
    values |= {"guidance_embeds": False}
    model, cfg = randomise(Flux2Transformer2DModel(**values)), Flux2Config(**values)
    assert (cfg.width, cfg.hidden) == (3072, 9216)
    params = weights.load(Held(model), shapes_of(cfg), flux2.KEYS)
    given = inputs(cfg, 4, 4, 8)
    assert error(ours(params, given, 4, 4, cfg=cfg), theirs(model, given, 4, 4)) < 3e-5


@pytest.mark.slow
def test_bfloat16_stays_near():
    model, cfg = make_transformer(), Flux2Config(**SMALL)
    params = weights.load(Held(model), shapes_of(cfg), flux2.KEYS, dtype=jnp.bfloat16)
    given = inputs(cfg, 3, 4, 5)
    found = ours(params, given, 3, 4, cfg=cfg, dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    assert 1e-4 < error(found, theirs(model, given, 3, 4)) < 0.05


@pytest.mark.parametrize(("height", "width", "tokens"), [(32, 32, 512), (2, 5, 3)])
def test_rope_table(height, width, tokens):
    cfg = Flux2Config(guidance_embeds=False)
    cos, sin = flux2.rope_table(cfg, height, width, tokens)
    assert cos.shape == sin.shape == (tokens + height * width, 128) and cos.dtype == np.float32
    public_cos, public_sin = Flux2PosEmbed(2000, (32,) * 4)(torch.cat([text_ids(tokens), image_ids(height, width)]))
    np.testing.assert_allclose(cos, public_cos, atol=1e-7)
    np.testing.assert_allclose(sin[:, 1::2], public_sin[:, 1::2], atol=1e-7)
    np.testing.assert_array_equal(sin[:, 0::2], -sin[:, 1::2])  # the sign of a pair's rotation
    at = tokens + width + 1  # row 1, column 1
    np.testing.assert_allclose(sin[at, [1, 33, 65, 97]], [0, np.sin(1), np.sin(1), 0], atol=1e-7)
    np.testing.assert_allclose(sin[2, [1, 33, 65, 97]], [0, 0, 0, np.sin(2)], atol=1e-7)


# --- times ----------------------------------------------------------------------------------------------------------


LITERAL = {  # by diffusers, to 7 digits: (steps, tokens)
    (4, 1024): [1, 0.9580854, 0.8839818, 0.7174966, 0],
    (6, 1024): [1, 0.9740637, 0.9375875, 0.8825079, 0.7897219, 0.6003585, 0],
    (10, 1024): [
        *(1, 0.9850066, 0.9668854, 0.9445438, 0.9163132, 0.8795114),
        *(0.8295366, 0.7577739, 0.6460033, 0.4478372, 0),
    ],
    (4, 4096): [1, 0.9673840, 0.9081439, 0.7672000, 0],
    (10, 4096): [
        *(1, 0.9884958, 0.9744825, 0.9570387, 0.9347291, 0.9051879),
        *(0.8642187, 0.8035999, 0.7047356, 0.5147510, 0),
    ],
}


@pytest.mark.parametrize("steps", [4, 6, 10, 28, 50])
@pytest.mark.parametrize("tokens", [16, 1024, 4096, 6400])
def test_sigmas(steps, tokens):
    found = flux2.sigmas(steps, tokens, DYNAMIC)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
    assert (found.dtype, found.shape, found[0]) == (np.float64, (steps + 1,), 1.0)
    np.testing.assert_allclose(found, scheduler.sigmas, rtol=1e-6, atol=0)
    if (steps, tokens) in LITERAL:
        np.testing.assert_allclose(found, LITERAL[steps, tokens], rtol=0, atol=6e-8)
    np.testing.assert_allclose(
        flux2.sigmas(steps, tokens, Schedule(shift=3.0))[1], 3 * (1 - 1 / steps) / (3 - 2 / steps)
    )


# --- the VAE --------------------------------------------------------------------------------------------------------


def decoded(model: AutoencoderKLFlux2, latents: np.ndarray) -> torch.Tensor:
    """As Flux2KleinPipeline ends: statistics, patches, decoder; images [B, H, W, 3]."""
    with torch.no_grad():
        std = torch.sqrt(model.bn.running_var + model.config.batch_norm_eps)
        x = torch.tensor(latents) * std + model.bn.running_mean
        z = Flux2KleinPipeline._unpatchify_latents(x.permute(0, 3, 1, 2))
        return (model.decode(z).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


SMALLER = {"decoder_block_out_channels": (4, 8)}


@pytest.mark.parametrize(
    "changes",
    [{}, SMALLER, {"use_post_quant_conv": False, "use_quant_conv": False}, {"batch_norm_eps": 0.1}],
    ids=["as public", "small decoder", "no convolution", "eps"],
)
def test_decode(tmp_path, changes):
    model = nano_flux2.make_vae(**changes)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    latents = np.random.default_rng(0).normal(size=(2, 2, 3, 16)).astype(np.float32)
    module, params = vae.load_flux2(tmp_path, jnp.float32)
    assert (module.cfg.factor, module.cfg.channels) == (4, 16)
    found = jax.jit(vae.decode, static_argnums=0)(module, params, jnp.asarray(latents))
    public = decoded(model, latents)
    assert (found.shape, found.dtype) == ((2, 8, 12, 3), jnp.float32)
    assert public.std() > 0.05 and error(found, public) < 1e-4


def test_every_key_of_the_public_vae():
    """84,046,115 parameters and the statistics; of them 49,620,259 and the statistics are read."""
    with torch.device("meta"):
        public = AutoencoderKLFlux2()
    assert sum(p.numel() for p in public.parameters()) == 84_046_115
    module = vae.Flux2Decoder(vae.Flux2VaeConfig(), jnp.float32)
    spec = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, 1, 128)))["params"]
    found = {key: leaf for leaf in weights.needed(spec, vae.FLUX2_KEYS) for key in leaf.keys}
    other = {key for key in public.state_dict() if key.split(".")[0] in ("encoder", "quant_conv")}
    assert found.keys() | other | {"bn.num_batches_tracked"} == public.state_dict().keys()
    assert sum(x.size for x in jax.tree.leaves(spec)) == 49_619_203 + 1_056 + 2 * 128


# --- whole pictures -------------------------------------------------------------------------------------------------


PROMPTS = ["a red circle!", "  A small Blue square, left of a green triangle and a very long line of words", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return nano_flux2.write(tmp_path_factory.mktemp("klein") / "pipeline")


@pytest.fixture(scope="module")
def pipe(folder):
    found = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield found
    torch.set_num_threads(threads)


@pytest.mark.parametrize("w", [4.0, slow(1.0)])
def test_pictures(folder, pipe, w):
    """Three prompts of unequal length, one of them empty, in one batch: text states, latents of 4 guided steps and
    pictures are diffusers', through our files, tokenizer, encoder, sampler and VAE."""
    cfg = nano_flux2.model(folder)
    model, (base, decoder, encoders) = flux2.make(cfg), flux2.load(cfg)
    assert (model.guidance, model.guided, model.distilled) == ("cfg", 4.0, False)
    text = Conditioner(model, encoders, sharding.make_mesh(1), group=3, stay=True, negative="")
    cond, away = text(PROMPTS), text.negative()
    with torch.no_grad():
        states, _ = pipe.encode_prompt(PROMPTS)
    assert error(cond["text"], states) < 1e-4 and error(away["text"], states[2:]) < 1e-4
    keys = jax.random.split(jax.random.key(3), (3, 1))
    noise = torch.tensor(np.asarray(rollout.noises(model, keys[:, 0]))).permute(0, 3, 1, 2)
    assert noise.shape == (3, 16, 4, 4)
    how = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": w}
    last = {}
    public = pipe(
        prompt=PROMPTS, latents=noise, output_type="np", callback_on_step_end=lambda *x: last.update(x[3]) or {}, **how
    ).images
    stage = Stage(4, "euler", chunk=3, guidance=w)

    @jax.jit
    def draw(base, decoder, cond, away):
        x0 = rollout.integrate({"params": base}, cond, keys, model=model, stage=stage, negative=away)
        return x0, model.decode(decoder, x0)

    x0, pictures = draw(base, decoder, cond, away if w > 1 else None)
    assert error(x0.reshape(3, 16, 16), last["latents"]) < 1e-4
    assert public.std() > 0.05 and np.abs(np.asarray(pictures) - public).max() < 1e-4


def test_a_distilled_model(tmp_path):
    """Its index says so: no guidance, unless it is asked for."""
    folder = nano_flux2.write(tmp_path / "pipeline", distilled=True)
    model = flux2.make(nano_flux2.model(folder))
    assert (model.guidance, model.guided, model.distilled) == ("none", 1.0, True)
    assert flux2.make(nano_flux2.model(folder, guidance="cfg")).guidance == "cfg"


# --- by shapes ------------------------------------------------------------------------------------------------------


SIZES = {"4B": (3_875_544_576, 169), "9B": (9_078_581_248, 233)}


def public_model(tmp_path, name: str, size: int = 512):
    path = hub.write_configs(tmp_path, public.FLUX2[f"black-forest-labs/FLUX.2-klein-{name}"])
    return flux2.make(config.Model(name="flux2", path=str(path), size=size, text_tokens=512))


@pytest.mark.parametrize("name", ["base-4B", "9B"])
def test_every_key_of_the_public_checkpoint(tmp_path, name):
    """Parameters and tensors of the public configs, by the names and shapes that diffusers has."""
    model = public_model(tmp_path, name)
    raw = {k: v for k, v in weights.read_config(tmp_path / "transformer").items() if k[0] != "_"}
    with torch.device("meta"):
        there = dict(Flux2Transformer2DModel(**raw).state_dict())
    spec = jax.eval_shape(model.init, jax.random.key(0))
    found = {}
    for leaf in weights.needed(spec, flux2.KEYS):
        shape = leaf.shape[1:] if leaf.stacked else leaf.shape
        found |= dict.fromkeys(leaf.keys, shape[::-1] if leaf.layout == "linear" else shape)
    assert (sum(x.size for x in jax.tree.leaves(spec)), len(found)) == SIZES[name[-2:]]
    assert found == {key: tuple(value.shape) for key, value in there.items()}
    assert (model.distilled, model.guidance) == ((False, "cfg") if "base" in name else (True, "none"))


@pytest.mark.parametrize("precision", ["fp8", "nvfp4_emulated"])
def test_coverage(tmp_path, precision):
    """100 of 109 Linears, 94.97 % of the weights, 92.6 % of the FLOPs with attention."""
    model = public_model(tmp_path, "base-4B")
    found = coverage.check(model, precision, config.load("flux2").model.min_quantised_flops)
    assert (sum(u.layers for u in found), sum(u.layers for u in found if u.quantised)) == (109, 100)
    low = sum(u.weights for u in found if u.quantised)
    assert low == 3_680_501_760 and low / 3_875_544_576 == pytest.approx(0.9497, abs=5e-5)
    assert sum(u.flops for u in found) == pytest.approx(9.4482e12, rel=1e-4)
    assert sum(u.flops for u in found if u.quantised) / 10.173e12 == pytest.approx(0.926, abs=1e-3)


def test_fp8_lies_in_the_parts_of_the_input(tmp_path):
    """The last Linear of a single block takes [attention, MLP]; its codes are two arrays, of 3072 and 9216 inputs."""
    model = public_model(tmp_path, "base-4B")
    spec = jax.eval_shape(model.init, jax.random.key(0))
    low = jax.eval_shape(lambda p: quant.quantise_tree(p, model.quant_rules.fp8, "fp8"), spec)
    codes = low["single_transformer_blocks"]["attn"]["to_out"]["kernel"].codes
    assert [x.shape for x in codes] == [(20, 3072, 3072), (20, 3072, 9216)]
    assert [x.shape for x in low["single_transformer_blocks"]["attn"]["to_qkv_mlp_proj"]["kernel"].codes] == [
        (20, 27648, 3072)
    ]


LORAS = {  # modules of all layers, parameters at rank 32
    flux2.LORA_TARGETS: (60, 33_423_360),
    flux2.LORA_ALL: (100, 48_168_960),
    ("to_q", "to_k", "to_v", "to_out.0"): (20, 3_932_160),
}


@pytest.mark.parametrize("targets", LORAS)
def test_lora_targets(tmp_path, targets):
    spec = jax.eval_shape(public_model(tmp_path, "base-4B").init, jax.random.key(0))
    made = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, targets, config.Lora(32)), spec)
    leaves = jax.tree.leaves(made)
    assert (sum(x.shape[0] for x in leaves) // 2, sum(x.size for x in leaves)) == LORAS[targets]


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "pipeline"))


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("transformer", {"guidance_embeds": True}, "guidance_embeds is true, or missing.*use a FLUX.2-klein"),
        ("transformer", {"guidance_embeds": 0}, "guidance_embeds is 0, not true or false"),
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel, not a Flux2Transformer"),
        ("transformer", {"patch_size": 2}, "patch_size is 2: only 1 is known here"),
        ("transformer", {"eps": 1e-5}, "eps is 1e-05: only 1e-06 is known here"),
        ("transformer", {"axes_dims_rope": [4, 6, 6]}, "axes_dims_rope .* are not four even numbers"),
        ("transformer", {"axes_dims_rope": [4, 4, 4, 6]}, "axes_dims_rope .* attention_head_dim 16"),
        ("transformer", {"timestep_guidance_channels": 255}, "timestep_guidance_channels 255 is odd"),
        ("transformer", {"out_channels": 8}, "out_channels 8 is not in_channels 16, nor null"),
        ("transformer", {"new_option": 3}, "new_option is 3, an option that is not known here"),
        ("transformer", {"in_channels": 64}, "takes 64 channels, the VAE gives 4 x 4"),
        ("transformer", {"joint_attention_dim": 64}, "takes text of 64 .*, Qwen3 gives 3 x 32"),
        ("vae", {"_class_name": "AutoencoderKL"}, "holds a AutoencoderKL, not a AutoencoderKLFlux2"),
        ("vae", {"patch_size": [4, 4]}, r"patch_size is \[4, 4\]: only 2 is known here"),
        ("vae", {"act_fn": "relu"}, "act_fn is 'relu': only 'silu' is known here"),
        ("vae", {"scaling_factor": 0.36}, "scaling_factor is 0.36, an option that is not known here"),
        ("vae", {"decoder_block_out_channels": [4, 4, 8]}, "decoder_block_out_channels .* are not as many as"),
        ("vae", {"decoder_block_out_channels": [4, 6]}, r"block_out_channels \[6\] do not divide"),
        ("vae", {"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types has 1 blocks, block_out_channels 2"),
    ],
)
def test_refused_folders(copy, part, values, words):
    rewrite(copy / part / "config.json", **values)
    with pytest.raises(weights.WeightsError, match=words) as e:
        flux2.make(nano_flux2.model(copy))
    assert str(copy) in str(e.value)


def test_a_missing_key_means_dev(copy):
    file = copy / "transformer" / "config.json"
    file.write_text(file.read_text().replace('"guidance_embeds": false,', ""))
    with pytest.raises(weights.WeightsError, match=r"guidance_embeds is true, or missing, .*: this is a FLUX.2-dev"):
        flux2.make(nano_flux2.model(copy))


def test_sizes_that_do_not_fit(folder):
    with pytest.raises(ConfigError, match=r"model.size=18: use a multiple of 4 pixels"):
        flux2.make(nano_flux2.model(folder, size=18))
    with pytest.raises(ConfigError, match=r"model.text_tokens=128: FLUX.2-klein attends to all of its 512 tokens"):
        flux2.make(nano_flux2.model(folder, text_tokens=128))
