"""SANA against diffusers: transformer in both namings, text, sigmas and whole pictures, on small random weights."""

import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from oracle import error, randomise
from safetensors.numpy import save_file

from solrl_jax import config, sampler, sharding, structs, weights
from solrl_jax.models import fused, layers, public, sana
from solrl_jax.models.sana import SanaConfig, SanaTransformer, TextKeys
from solrl_jax.quant import coverage
from solrl_jax.run import assemble, convert
from solrl_jax.structs import Model
from solrl_jax.weights import hub
from tests import nano, nano_sana
from tests.test_flux import Held, rewrite

PROMPTS = ["a red circle!", "  A small Blue square on a white background, left of a green triangle", ""]
PUBLIC = next(iter(public.SANA.values()))


def make_transformer(**changes):
    return randomise(SanaTransformer2DModel(**{**nano_sana.TRANSFORMER, **changes}))


def inputs(cfg: SanaConfig, height: int = 5, width: int = 7, tokens: int = 9) -> dict[str, jax.Array]:
    """Arguments of SanaTransformer, two samples of them; latents need not be square."""
    rng = np.random.default_rng(0)
    shapes = {"x": (2, height, width, cfg.in_channels), "text": (2, tokens, cfg.caption_channels)}
    drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    drawn |= {"sigma": np.float32([0.95, 0.1]), "length": np.int32([tokens // 2, tokens])}
    return jax.tree.map(jnp.asarray, drawn)


@functools.lru_cache
def shapes_of(cfg: SanaConfig):
    """The parameters without their arrays."""
    network, given = SanaTransformer(cfg, jnp.float32), inputs(cfg, 2, 2, 3)
    return jax.eval_shape(lambda: network.init(jax.random.key(0), **given)["params"])


@functools.lru_cache
def compiled(cfg: SanaConfig, dtype, remat: bool):
    network = SanaTransformer(cfg, dtype, remat)
    return jax.jit(lambda params, given: network.apply({"params": params}, **given))


def ours(params, given, *, cfg: SanaConfig, dtype=jnp.float32, remat: bool = False):
    return compiled(cfg, dtype, remat)(params, given)


def theirs(model: SanaTransformer2DModel, given) -> torch.Tensor:
    t = {name: torch.tensor(np.asarray(value)) for name, value in given.items()}
    mask = torch.arange(t["text"].shape[1])[None] < t["length"][:, None]
    with torch.no_grad():
        return model(
            hidden_states=t["x"].permute(0, 3, 1, 2),
            encoder_hidden_states=t["text"],
            timestep=1000 * t["sigma"],
            encoder_attention_mask=mask.float(),
        ).sample.permute(0, 2, 3, 1)


# --- the transformer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", [False, True])
def test_transformer_from_shards(tmp_path, remat):
    model = make_transformer()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file()
    cfg = SanaConfig.read(tmp_path)
    assert (cfg.width, cfg.hidden, cfg.num_layers) == (48, 64, 3)
    files = weights.Files(tmp_path, "diffusion_pytorch_model")
    params = weights.load(files, shapes_of(cfg), sana.KEYS)
    given = inputs(cfg)
    assert error(ours(params, given, cfg=cfg, remat=remat), theirs(model, given)) < 1e-5
    weights.save(params, sana.KEYS, tmp_path / "out.safetensors")  # what we write is what diffusers wrote
    saved = weights.Files(tmp_path / "out.safetensors")
    assert set(saved.keys()) == set(files.keys())
    assert all(np.array_equal(saved[key], files[key]) for key in saved.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("smaller", "by"),
    [
        (("caption_projection.linear_2",), 3e-4),  # to the norm of the text: 1e-5
        (("patch_embed.proj",), 1e-3),  # to the first LayerNorm: 1e-6
        (("attn1.to_q", "attn1.to_k"), 3e-9),  # to the sum below linear attention: 1e-15
    ],
)
def test_what_is_added_to_small_sums(smaller, by):
    """Where weights are so small that each of the network's epsilons matters, diffusers' result still is ours."""
    model, cfg = make_transformer(), SanaConfig(**nano_sana.TRANSFORMER)
    plain = ours(weights.load(Held(model), shapes_of(cfg), sana.KEYS), given := inputs(cfg), cfg=cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f"{x}." in name for x in smaller):
                parameter.mul_(by)
    found = ours(weights.load(Held(model), shapes_of(cfg), sana.KEYS), given, cfg=cfg)
    assert error(found, theirs(model, given)) < 2e-5
    assert np.abs(found - plain).max() > 1e-2


def test_the_rest_of_the_text_is_not_seen():
    cfg = SanaConfig(**nano_sana.TRANSFORMER)
    params, given = weights.load(Held(make_transformer()), shapes_of(cfg), sana.KEYS), inputs(cfg)
    other = given | {"text": given["text"].at[0, 4:].set(7.0)}
    np.testing.assert_array_equal(ours(params, given, cfg=cfg), ours(params, other, cfg=cfg))
    longer = given | {"length": given["length"] + jnp.array([1, 0])}
    assert np.abs(ours(params, longer, cfg=cfg) - ours(params, given, cfg=cfg))[0].max() > 1e-3


@pytest.mark.slow
def test_true_width():
    """One block of SANA-1.6B's own width."""
    values = {k: v for k, v in PUBLIC["transformer/config.json"].items() if k[0] != "_"} | {"num_layers": 1}
    model = randomise(SanaTransformer2DModel(**values))
    cfg = weights.from_config(SanaConfig, "memory", values)
    assert (cfg.width, cfg.hidden) == (2240, 5600)
    params = weights.load(Held(model), shapes_of(cfg), sana.KEYS)
    given = inputs(cfg, 8, 8, 20)
    assert error(ours(params, given, cfg=cfg), theirs(model, given)) < 1e-5


@pytest.mark.slow
def test_bfloat16_stays_near():
    model, cfg = make_transformer(), SanaConfig(**nano_sana.TRANSFORMER)
    params = weights.load(Held(model), shapes_of(cfg), sana.KEYS, dtype=jnp.bfloat16)
    given = inputs(cfg)
    found = ours(params, given, cfg=cfg, dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    assert 1e-4 < error(found, theirs(model, given)) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["params", "lora", "quant"])
def test_text_keys_once_a_rollout(folder, kind):
    """Keys and values made beforehand, of each policy's own weights, give the same velocity."""
    from solrl_jax import lora, quant

    cfg = nano_sana.model(folder)
    model, (base, _, _) = sana.make(cfg), sana.load(cfg)
    base = jax.tree.map(jnp.asarray, base)
    how = config.Lora(4)
    adapter = nano.random(lora.init(jax.random.key(0), base, model.lora_targets, how), 2)
    variables = {
        "params": lambda: {"params": base},
        "lora": lambda: lora.policy(base, adapter, how),
        "quant": lambda: {
            "params": base,
            "quant": quant.quantise_tree(base, model.quant_rules.nvfp4._replace(min_dim=0), "nvfp4_emulated"),
        },
    }[kind]()
    rng = np.random.default_rng(1)
    cond = {"text": jnp.asarray(rng.normal(size=(2, 12, 32)), jnp.float32), "length": jnp.array([5, 12])}
    prepared = jax.jit(model.prepare)(variables, cond)
    assert prepared["kv"].shape == (2, 3, 12, 96) and set(prepared) == {"kv", "length"}
    given = variables, jax.random.normal(jax.random.key(1), (2, 8, 8, 4)), jnp.array([0.9, 0.4])
    found = jax.jit(model.velocity)(*given, cond)
    np.testing.assert_allclose(jax.jit(model.velocity)(*given, prepared), found, atol=1e-5)
    if kind != "params":
        assert np.abs(found - jax.jit(model.velocity)({"params": base}, *given[1:], cond)).max() > 1e-3


def test_masked_attention():
    """What the fused kernel is asked for is what the plain attention gives, gradients too."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(3, n, 2, 8)), jnp.float32) for n in (6, 9, 9))
    lengths = jnp.array([1, 5, 9])

    def of(f):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(f(*x) ** 2), argnums=(0, 1, 2)))(q, k, v)

    found = of(lambda *x: fused.masked_attention(*x, 0.3, "xla", lengths))
    plain = of(lambda *x: layers.attention(*x, scale=0.3, lengths=lengths))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, plain)


# --- native names ---------------------------------------------------------------------------------------------------


def native(model: SanaTransformer2DModel, convolutions: bool = False) -> dict[str, torch.Tensor]:
    """The same weights as Sol-RL's checkpoint has them; with `convolutions` as SANA's first form."""
    own, state = {}, dict(model.state_dict())

    def move(theirs: str, *names: str) -> None:
        for end in ("weight", "bias"):
            if f"{names[0]}.{end}" in state:
                own[f"{theirs}.{end}"] = torch.cat([state.pop(f"{name}.{end}") for name in names])

    move("x_embedder.proj", "patch_embed.proj")
    move("t_embedder.mlp.0", "time_embed.emb.timestep_embedder.linear_1")
    move("t_embedder.mlp.2", "time_embed.emb.timestep_embedder.linear_2")
    move("t_block.1", "time_embed.linear")
    move("y_embedder.y_proj.fc1", "caption_projection.linear_1")
    move("y_embedder.y_proj.fc2", "caption_projection.linear_2")
    move("attention_y_norm", "caption_norm")
    move("final_layer.linear", "proj_out")
    own["final_layer.scale_shift_table"] = state.pop("scale_shift_table")
    for i in range(model.config.num_layers):
        here, there = f"blocks.{i}", f"transformer_blocks.{i}"
        own[f"{here}.scale_shift_table"] = state.pop(f"{there}.scale_shift_table")
        move(f"{here}.attn.qkv", *(f"{there}.attn1.to_{x}" for x in "qkv"))
        move(f"{here}.attn.proj", f"{there}.attn1.to_out.0")
        move(f"{here}.cross_attn.q_linear", f"{there}.attn2.to_q")
        move(f"{here}.cross_attn.kv_linear", f"{there}.attn2.to_k", f"{there}.attn2.to_v")
        move(f"{here}.cross_attn.proj", f"{there}.attn2.to_out.0")
        kind = "conv" if convolutions else "linear"
        move(f"{here}.mlp.inverted_conv.{kind}", f"{there}.ff.conv_inverted")
        move(f"{here}.mlp.depth_conv.conv", f"{there}.ff.conv_depth")
        move(f"{here}.mlp.point_conv.{kind}", f"{there}.ff.conv_point")
    assert not state
    for key in list(own):
        if re.search(r"(inverted|point)_conv\.linear\.weight", key):
            own[key] = own[key][:, :, 0, 0].contiguous()
    return own | {"y_embedder.y_embedding": torch.ones(300, 32), "pos_embed": torch.ones(1, 4, 48)}


@pytest.mark.parametrize(
    ("name", "convolutions", "around"),
    [
        ("SANA_LinearFFN.pth", False, "state_dict"),
        ("x.pth", False, "model"),
        ("x.pth", True, None),
        ("x.safetensors", False, None),
    ],
)
def test_native_checkpoint(folder, tmp_path, name, convolutions, around):
    """The folder's own weights, re-laid out in one native file, come to the same tree bit for bit."""
    cfg, file = nano_sana.model(folder), tmp_path / name
    tensors = native(SanaTransformer2DModel.from_pretrained(folder / "transformer"), convolutions)
    if file.suffix == ".pth":
        torch.save({around: tensors, "epoch": 3} if around else tensors, file)
    else:
        save_file({k: x.numpy() for k, x in tensors.items()}, file)
    found = next(sana.parts(nano_sana.model(folder, weights=str(file))))
    jax.tree.map(np.testing.assert_array_equal, found, next(sana.parts(cfg)))


def test_weights_in_diffusers_names(folder, tmp_path):
    """model.weights also takes a whole transformer of diffusers, another one than the folder's."""
    model = make_transformer()
    file = tmp_path / "x.safetensors"
    save_file({k: x.numpy() for k, x in model.state_dict().items()}, file)
    found = next(sana.parts(nano_sana.model(folder, weights=str(file))))
    given = inputs(SanaConfig(**nano_sana.TRANSFORMER))
    assert error(ours(found, given, cfg=SanaConfig(**nano_sana.TRANSFORMER)), theirs(model, given)) < 1e-5


def test_native_files_that_cannot_be_used(folder, tmp_path):
    tensors = native(make_transformer())
    file = tmp_path / "x.pth"
    cfg = nano_sana.model(folder, weights=str(file))
    with pytest.raises(
        weights.WeightsError, match=r"x.pth is not a file: give one, --config.model.weights, or org/name"
    ):
        next(sana.parts(cfg))
    torch.save({k: x for k, x in tensors.items() if k != "blocks.1.attn.qkv.weight"}, file)
    with pytest.raises(weights.WeightsError, match=r"missing blocks.1.attn.qkv.weight"):
        next(sana.parts(cfg))
    torch.save(tensors | {"blocks.1.attn.qkv.weight": torch.zeros(96, 48)}, file)
    with pytest.raises(weights.WeightsError, match=r"qkv.weight has shape \(48, 96\), not \(48, 144\)"):
        next(sana.parts(cfg))
    torch.save(tensors, file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(weights.WeightsError, match=r"x.pth is not a complete file of torch.save"):
        next(sana.parts(cfg))


def test_a_checkpoint_of_the_hub(folder, tmp_path, monkeypatch):
    (tmp_path / "net.pth").write_bytes(b"")
    asked = []
    monkeypatch.setattr(hub, "_fetch", lambda *given: asked.append(given) or tmp_path)
    assert hub.file("org/name/net.pth", ", --flag") == tmp_path / "net.pth"
    assert asked == [("org/name", ("net.pth",), (), ", --flag=FILE")]
    for wrong in ("org/name", "net.pth", str(tmp_path)):
        with pytest.raises(weights.WeightsError, match=r"is not a file: give one, --flag, or org/name/file of"):
            hub.file(wrong, ", --flag")


# --- by shapes ------------------------------------------------------------------------------------------------------


def test_every_key_of_the_public_checkpoint():
    """396 tensors, 1,604,462,752 parameters, in diffusers' shapes."""
    values = {k: v for k, v in PUBLIC["transformer/config.json"].items() if k[0] != "_"}
    with torch.device("meta"):
        public = dict(SanaTransformer2DModel(**values).state_dict())
    spec = shapes_of(weights.from_config(SanaConfig, "memory", values))
    assert sum(x.size for x in jax.tree.leaves(spec)) == 1_604_462_752 and len(public) == 396
    order = {"linear": (1, 0), "pointwise": (1, 0), "conv": (3, 2, 0, 1)}
    found = {}
    for leaf in weights.needed(spec, sana.KEYS):
        shape = leaf.shape[1:] if leaf.stacked else leaf.shape
        shape = (*shape[:-1], shape[-1] // leaf.fused) if leaf.fused > 1 else shape
        there = tuple(shape[i] for i in order.get(leaf.layout, range(len(shape))))
        found |= dict.fromkeys(leaf.keys, there + (1, 1) * (leaf.layout == "pointwise"))
    assert found == {key: tuple(value.shape) for key, value in public.items()}


def public_model(tmp_path, **changes) -> Model:
    path = str(hub.write_configs(tmp_path, PUBLIC))
    return sana.make(config.Model(**{"name": "sana", "path": path, "size": 1024, "text_tokens": 300} | changes))


def test_coverage(tmp_path):
    """Shares of all parameters and of all FLOPs, attention and convolutions too: 59.42 % and 56.02 %."""
    model = public_model(tmp_path, min_dim=2240)
    found = coverage.check(model, "nvfp4_emulated", config.load("sana").model.min_quantised_flops)
    assert (sum(u.layers for u in found), sum(u.layers for u in found if u.quantised)) == (146, 60)
    low = sum(u.weights for u in found if u.quantised)
    assert low == 953_344_000 and low / 1_604_462_752 == pytest.approx(0.5942, abs=1e-4)
    assert coverage.share(found, "flops") == pytest.approx(0.5728, abs=1e-4)
    assert sum(u.flops for u in found) == pytest.approx(2.9013e12, rel=1e-4)
    assert sum(u.flops for u in found if u.quantised) / 2.9667e12 == pytest.approx(0.5602, abs=1e-4)
    tails = {u.path.split("/", 1)[1] for u in found if u.quantised}
    assert tails == {"cross_attn/kv_linear", "mlp/inverted_conv.linear", "mlp/point_conv.linear"}
    eight = coverage.check(model, "fp8", 0.999)
    assert {u.path for u in eight if not u.quantised} == {u.path for u in eight if not u.stacked}


# --- times ----------------------------------------------------------------------------------------------------------


OWN = {  # of scheduler_config.json, by diffusers
    6: [0.9996665, 0.9371482, 0.8567753, 0.7496248, 0.5996398, 0.3747187, 0],
    10: [
        *(0.9996665, 0.9639411, 0.9227217, 0.8746352, 0.8178097, 0.7496248),
        *(0.6662961, 0.5621483, 0.4282652, 0.2497916, 0.0),
    ],
}
ROUNDED = {  # the original's, in bf16
    6: [1, 0.83203125, 0.66796875, 0.5, 0.333984375, 0.1669921875, 0],
    10: [
        *(1, 0.8984375, 0.80078125, 0.69921875, 0.6015625, 0.5),
        *(0.400390625, 0.30078125, 0.2001953125, 0.10009765625, 0),
    ],
}


@pytest.mark.parametrize("steps", [1, 6, 10, 40])
def test_sigmas(folder, steps):
    linear, own = (sana.make(nano_sana.model(folder, shift=s)).sigmas(steps) for s in (1.0, 0.0))
    assert linear.dtype == own.dtype == np.float64
    np.testing.assert_allclose(linear, 1 - np.arange(steps + 1) / steps, atol=1e-15)
    scheduler = DPMSolverMultistepScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(own, scheduler.sigmas, rtol=1e-6, atol=1e-7)
    if steps in OWN:
        np.testing.assert_allclose(own, OWN[steps], rtol=2e-7, atol=0)
        np.testing.assert_allclose(linear, ROUNDED[steps], rtol=2**-8)
        np.testing.assert_array_equal(linear.astype(jnp.bfloat16).astype(np.float64)[:-1], ROUNDED[steps][:-1])


@pytest.mark.parametrize("name", ["flux", "sd35"])
def test_a_shift_of_ones_own_is_every_models(tmp_path, name):
    path = {"flux": lambda: nano.build(tmp_path).model}
    if name == "sd35":
        from tests import nano_sd35

        path = {"sd35": lambda: nano_sd35.model(nano_sd35.write(tmp_path / "sd35"))}
    cfg = path[name]()
    make = assemble.model_module(config.Config(model=cfg)).make
    linear = config.override(config.Config(model=cfg), **{"model.shift": "1"}).model
    np.testing.assert_allclose(make(linear).sigmas(4), [1, 0.75, 0.5, 0.25, 0])
    assert np.abs(make(cfg).sigmas(4) - make(linear).sigmas(4)).max() > 0.01


# --- whole pictures -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return nano_sana.write(tmp_path_factory.mktemp("sana") / "sana")


def pipe_of(folder):
    found = SanaPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


HOW = {"use_resolution_binning": False, "complex_human_instruction": None, "max_sequence_length": nano_sana.TOKENS}
HOW |= {"height": 32, "width": 32, "guidance_scale": 1.0}


def steps_of(pipe, steps: int) -> dict:
    """Arguments for Euler steps of equal size."""
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return {"sigmas": np.linspace(1, 0, steps + 1)[:-1].tolist(), "num_inference_steps": steps}


@pytest.mark.usefixtures("one_thread")
def test_pictures(folder):
    """The same prompts and noise give diffusers' pictures, through our files, tokenizer, encoder, sampler and VAE."""
    cfg, pipe = nano_sana.model(folder), pipe_of(folder)
    model, (base, decoder, encoders) = sana.make(cfg), sana.load(cfg)
    cond = jax.jit(model.encode)(encoders, model.tokenize(PROMPTS))
    with torch.no_grad():
        how = {"do_classifier_free_guidance": False, "complex_human_instruction": None}
        states, mask, _, _ = pipe.encode_prompt(PROMPTS, max_sequence_length=nano_sana.TOKENS, **how)
    assert cond["length"].tolist() == mask.sum(-1).tolist() == [12, 12, 1]
    assert error(cond["text"], states) < 1e-5

    x1 = jax.vmap(model.noise)(jax.random.split(jax.random.key(3), len(PROMPTS)))
    assert x1.shape == (3, 8, 8, 4)
    how = {"latents": torch.tensor(np.asarray(x1)).permute(0, 3, 1, 2), **HOW, **steps_of(pipe, 6)}
    latents = pipe(PROMPTS, output_type="latent", **how).images.permute(0, 2, 3, 1)
    public = pipe(PROMPTS, output_type="np", **how).images

    @jax.jit
    def draw(base, decoder, cond, x1):
        cond = model.prepare({"params": base}, cond)
        velocity = lambda x, sigma: model.velocity({"params": base}, x, sigma, cond)  # noqa: E731
        x0 = sampler.sample(velocity, x1, sampler.table(model.sigmas(6), "euler"))
        return x0, model.decode(decoder, x0)

    x0, found = draw(base, decoder, cond, x1)
    assert error(x0, latents) < 1e-4
    assert found.shape == public.shape == (3, 32, 32, 3) and public.std() > 0.05
    assert np.abs(found - public).max() < 1e-4


def test_prompts_are_lower_case_and_cut(folder):
    tokenize = sana.make(nano_sana.model(folder)).tokenize
    ids = tokenize(["  A Red", "a red\n", "", "x" * 40])["gemma"]["ids"]
    assert ids.dtype == np.int32 and ids.shape == (4, nano_sana.TOKENS)
    np.testing.assert_array_equal(ids[0], ids[1])
    assert ids[0, 0] == 2 and list(ids[0, 6:]) == [0] * 6  # <bos>, five letters and spaces, no end
    assert list(ids[2]) == [2] + [0] * 11 and ids[3].all()


def test_made_and_loaded_in_its_dtype(folder):
    cfg = nano_sana.model(folder, dtype="bfloat16")
    model, (base, decoder, encoders) = sana.make(cfg), sana.load(cfg)
    assert sana.make(nano_sana.model(folder, dtype="bfloat16")) is model and hash(model)
    assert {x.dtype for x in jax.tree.leaves((base, encoders))} == {np.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(decoder)} == {np.dtype(np.float32)}
    described = jax.tree.map(lambda x: (x.shape, x.dtype), sana.shapes(cfg))
    assert described == jax.tree.map(lambda x: (x.shape, x.dtype), (base, decoder, encoders))
    tokens = jax.tree.map(lambda x: (x.shape, x.dtype), sana.token_shapes(cfg, 3))
    assert tokens == jax.tree.map(lambda x: (x.shape, x.dtype), model.tokenize(PROMPTS))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("pad", [0, 7])
def test_what_is_padding_says_the_tokenizer(copy, pad):
    """Not the words of a prompt, which may end in <pad>, nor its encoder's config, which may name another id."""
    rewrite(copy / "text_encoder" / "config.json", pad_token_id=pad)
    prompts = ["red <pad>", "a<pad><pad>", "<pad>", "<pad> b", ""]
    cfg, pipe = nano_sana.model(copy), pipe_of(copy)
    model, (_, _, encoders) = sana.make(cfg), sana.load(cfg)
    cond = jax.jit(model.encode)(encoders, model.tokenize(prompts))
    with torch.no_grad():
        how = {"do_classifier_free_guidance": False, "complex_human_instruction": None}
        states, mask, _, _ = pipe.encode_prompt(prompts, max_sequence_length=nano_sana.TOKENS, **how)
    assert cond["length"].tolist() == mask.sum(-1).tolist() == [6, 4, 2, 4, 1]
    assert error(cond["text"], states) < 1e-5


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "pipeline"))


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        (
            "transformer/config.json",
            {"_class_name": "FluxTransformer2DModel"},
            "holds a FluxTransformer2DModel, not a SanaTransformer2DModel",
        ),
        ("transformer/config.json", {"patch_size": 2}, "{'patch_size': 2}: not SANA-1.6B"),
        ("transformer/config.json", {"guidance_embeds": True}, "{'guidance_embeds': True}: not SANA-1.6B"),
        ("transformer/config.json", {"qk_norm": "rms_norm_across_heads"}, "'qk_norm': .*: not SANA-1.6B"),
        ("transformer/config.json", {"interpolation_scale": 1.0}, "interpolation_scale.*: not SANA-1.6B"),
        ("transformer/config.json", {"num_attention_heads": 7}, "and the width 56 .* are not equal"),
        ("transformer/config.json", {"out_channels": 8}, "out_channels 8 is not in_channels 4"),
        ("transformer/config.json", {"in_channels": 8, "out_channels": 8}, "takes 8 channels, the VAE gives 4"),
        ("transformer/config.json", {"caption_channels": 2304}, "takes text of 2304, Gemma gives 32"),
        ("transformer/config.json", {"num_layers": "3"}, "num_layers is '3', not a whole number above 0"),
        ("text_encoder/config.json", {"model_type": "t5"}, "holds a t5, not a gemma2"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "holds a AutoencoderKL, not a AutoencoderDC"),
        (SCHEDULER, {"use_flow_sigmas": False}, "use_flow_sigmas is False: only True is known"),
        (SCHEDULER, {"_class_name": "DDIMScheduler"}, "_class_name is 'DDIMScheduler': only 'DPMSolverM"),
        (SCHEDULER, {"use_karras_sigmas": True}, "use_karras_sigmas is True: only False or null is known here"),
        (SCHEDULER, {"use_exponential_sigmas": True}, "use_exponential_sigmas is True: only False or null"),
        (SCHEDULER, {"use_beta_sigmas": True}, "use_beta_sigmas is True: only False or null"),
        (SCHEDULER, {"use_lu_lambdas": True}, "use_lu_lambdas is True: only False or null"),
        (SCHEDULER, {"final_sigmas_type": "sigma_min"}, "final_sigmas_type is 'sigma_min': only 'zero' is known"),
        (SCHEDULER, {"flow_shift": float("-inf")}, "flow_shift -inf is not a number above 0"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "holds a FluxPipeline, .*: use --config=flux"),
    ],
)
def test_refused_folders(copy, file, values, words):
    rewrite(copy / file, **values)
    with pytest.raises(weights.WeightsError, match=words) as e:
        sana.make(nano_sana.model(copy))
    assert str(copy) in str(e.value)


def test_infinity_in_a_json(copy):
    """Where diffusers writes it, it is read; it stands in none of our fields."""
    text = (copy / SCHEDULER).read_text()
    assert '"lambda_min_clipped": -Infinity' in text
    assert sana.make(nano_sana.model(copy)).sigmas(2)[0] == 1
    (copy / SCHEDULER).write_text(text[: len(text) // 2])
    with pytest.raises(weights.WeightsError, match=r"scheduler_config.json is not JSON .*download it again"):
        sana.make(nano_sana.model(copy, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 30}, "model.size=30: use a multiple of 4 pixels"),
        ({"text_tokens": 17}, "model.text_tokens=17: Gemma's layers see 16"),
    ],
)
def test_sizes_that_do_not_fit(copy, changes, words):
    with pytest.raises(config.ConfigError, match=words):
        sana.make(nano_sana.model(copy, **changes))


def test_sizes_of_the_public_model(tmp_path):
    with pytest.raises(config.ConfigError, match=r"model.size=1000: use a multiple of 32 pixels \(VAE x32\)"):
        public_model(tmp_path, size=1000)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_truncated_weights(copy, part):
    file = sorted((copy / part).glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(weights.WeightsError, match=rf"{part}/.*is not a complete safetensors file") as e:
        sana.load(nano_sana.model(copy))
    assert "\n" not in str(e.value)


def test_a_tokenizer_that_is_not_there(copy):
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(weights.WeightsError, match=r"tokenizer holds no tokenizer"):
        sana.load(nano_sana.model(copy))


def test_a_tokenizer_of_another_model(copy):
    raw = json.loads((copy / "text_encoder/config.json").read_text())
    rewrite(copy / "text_encoder/config.json", vocab_size=raw["vocab_size"] - 1)
    with pytest.raises(weights.WeightsError, match=r"tokens, its text encoder only"):
        sana.load(nano_sana.model(copy))


def test_config_of_another_depth(copy):
    rewrite(copy / "transformer" / "config.json", num_layers=2)
    with pytest.raises(weights.WeightsError, match=r"unused transformer_blocks.2.") as e:
        sana.load(nano_sana.model(copy))
    assert str(e.value).count("unused") <= 12


def test_flux_in_its_place(tmp_path):
    nano.build(tmp_path)
    with pytest.raises(weights.WeightsError, match=r"holds a FluxPipeline, not a SanaPipeline: use --config=flux"):
        sana.make(nano_sana.model(tmp_path / "pipeline"))


def test_converted_weights_are_not_replaced(folder, tmp_path):
    """model.weights is read when weights are converted, and has no place afterwards."""
    file, out = tmp_path / "net.pth", tmp_path / "out"
    torch.save(native(make_transformer()), file)
    cfg = nano_sana.model(folder, weights=str(file))
    convert.convert(sana, cfg, out)
    assert str(file) in json.loads((out / convert.MANIFEST).read_text())["made from"]
    mesh, plain = sharding.make_mesh(1), config.Config(model=nano_sana.model(out))
    base, _, _ = assemble.open_weights(plain, mesh)
    jax.tree.map(np.testing.assert_array_equal, base, next(sana.parts(cfg)))
    with pytest.raises(config.ConfigError, match=r"holds converted weights: leave it empty"):
        assemble.open_weights(config.override(plain, **{"model.weights": str(file)}), mesh)


def test_text_keys_use_the_networks_parameters():
    """The module for the text alone makes no parameter of its own."""
    cfg = SanaConfig(**nano_sana.TRANSFORMER)
    spec = shapes_of(cfg)
    own = jax.eval_shape(lambda: TextKeys(cfg, jnp.float32).init(jax.random.key(0), jnp.zeros((1, 3, 32)))["params"])
    found = {path: x.shape for path, x in structs.leaves_by_path(own).items() if "scale_shift" not in path}
    assert found.items() <= {path: x.shape for path, x in structs.leaves_by_path(spec).items()}.items()
    assert "blocks/cross_attn/kv_linear/kernel" in found
