"""Z-Image against diffusers: transformer, captions of unequal length, sigmas and whole pictures, on random weights."""

import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from oracle import error, randomise
from safetensors.numpy import load_file

from solrl_jax import config, guidance, lora, quant, sampler, weights
from solrl_jax.models import public, zimage, zimage_network
from solrl_jax.models.zimage import Caption, ZImageConfig, ZImageTransformer
from solrl_jax.quant import coverage
from solrl_jax.structs import Model
from solrl_jax.weights import hub
from tests import nano, nano_zimage
from tests.test_flux import Held, rewrite
from tests.tiers import slow

PUBLIC = public.ZIMAGE["Tongyi-MAI/Z-Image"]
SMALL = ZImageConfig(**nano_zimage.TRANSFORMER)
LENGTHS = (1, 31, 32, 33, 64)
"""Text tokens of a batch's captions: padded to 32, 32, 32, 64 and 64."""


def inputs(cfg: ZImageConfig, height: int = 4, width: int = 6, lengths=LENGTHS, tokens: int = 64):
    """x [B, h, w, c], sigma, length and text; the text is drawn behind each caption's end too."""
    rng, count = np.random.default_rng(0), len(lengths)
    shapes = {"x": (count, height, width, cfg.in_channels), "text": (count, tokens, cfg.cap_feat_dim)}
    drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    drawn |= {"sigma": np.linspace(0.95, 0.1, count, dtype=np.float32), "length": np.int32(lengths)}
    return jax.tree.map(jnp.asarray, drawn)


@functools.lru_cache
def shapes_of(cfg: ZImageConfig):
    """The parameters without their arrays."""
    network, where = ZImageTransformer(cfg, jnp.float32), zimage.places(cfg, 1, 1, 32)
    given = jnp.zeros((1, 1, 4 * cfg.in_channels)), jnp.ones(1), jnp.ones(1, jnp.int32), where
    return jax.eval_shape(
        lambda: network.init(jax.random.key(0), *given, jnp.zeros((1, 32, cfg.cap_feat_dim)))["params"]
    )


def params_of(model: ZImageTransformer2DModel, cfg: ZImageConfig = SMALL, **how):
    return weights.load(Held(model), shapes_of(cfg), zimage.KEYS, **how)


@functools.lru_cache
def compiled(cfg: ZImageConfig, dtype, remat: bool):
    network = ZImageTransformer(cfg, dtype, remat)

    def of(params, x, sigma, length, text):
        h, w = x.shape[1:3]
        where = zimage.places(cfg, h // 2, w // 2, text.shape[1])
        out = network.apply({"params": params}, zimage.pack(x), sigma, length, where, text)
        return zimage.unpack(out, h, w)

    return jax.jit(of)


def ours(params, given, *, cfg: ZImageConfig = SMALL, dtype=jnp.float32, remat: bool = False):
    return compiled(cfg, dtype, remat)(params, **given)


def theirs(model: ZImageTransformer2DModel, given) -> torch.Tensor:
    """diffusers takes lists: each caption without what stands behind it."""
    t = {name: torch.tensor(np.asarray(value)) for name, value in given.items()}
    captions = [text[:length] for text, length in zip(t["text"], t["length"], strict=True)]
    with torch.no_grad():
        out = model(list(t["x"].permute(0, 3, 1, 2)[:, :, None]), 1 - t["sigma"], captions).sample
    return torch.stack(out)[:, :, 0].permute(0, 2, 3, 1)


# --- the transformer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", [False, True])
def test_transformer_from_shards(tmp_path, remat):
    model = nano_zimage.make_transformer()
    assert min(float(x.detach().abs().max()) for x in (model.x_pad_token, model.cap_pad_token)) > 0.1
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file()
    cfg = ZImageConfig.read(tmp_path)
    assert (cfg.dim, cfg.hidden, cfg.head_dim, cfg.time_width) == (48, 128, 16, 48)
    files = weights.Files(tmp_path, "diffusion_pytorch_model")
    params = weights.load(files, shapes_of(cfg), zimage.KEYS)
    given = inputs(cfg)
    assert error(ours(params, given, cfg=cfg, remat=remat), theirs(model, given)) < 1e-5
    weights.save(params, zimage.KEYS, tmp_path / "out.safetensors")  # what we write is what diffusers wrote
    saved = weights.Files(tmp_path / "out.safetensors")
    assert set(saved.keys()) == set(files.keys()) and len(set(files.keys())) == 7 * 13 + 5 * 2 + 15
    assert all(np.array_equal(saved[key], files[key]) for key in saved.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("side", "lengths"), [((8, 16), (64, 1)), ((8, 16), (32, 32)), ((2, 2), (5, 5)), ((2, 2), (33, 32))]
)
def test_lengths_and_sizes(side, lengths):
    """Images with and without learned padding; captions that are equal or not, padded or not."""
    model, given = nano_zimage.make_transformer(), inputs(SMALL, *side, lengths)
    assert error(ours(params_of(model), given), theirs(model, given)) < 1e-5


def test_what_is_behind_the_caption_is_not_seen():
    """Junk there changes nothing; the learned pads, and how many there are, do."""
    params, given = params_of(nano_zimage.make_transformer()), inputs(SMALL)
    plain = ours(params, given)
    junk = given | {
        "text": jnp.where(jnp.arange(64)[None, :, None] < given["length"][:, None, None], given["text"], 7.0)
    }
    np.testing.assert_array_equal(ours(params, junk), plain)
    other = ours({**params, "cap_pad_token": params["cap_pad_token"] + 1}, given)
    moved = np.abs(other - plain).max(axis=(1, 2, 3))
    assert np.all(moved[[0, 1, 3]] > 1e-3) and np.all(moved[[2, 4]] == 0)  # 32 and 64 tokens have no pads
    longer = ours(params, given | {"length": given["length"].at[2].set(33)})  # one token more: 32 more attend
    assert np.abs(longer - plain)[2].max() > 1e-3
    imaged = ours({**params, "x_pad_token": params["x_pad_token"] + 1}, given)
    assert np.abs(imaged - plain).max(axis=(1, 2, 3)).min() > 1e-3


@pytest.mark.slow
def test_the_window_of_text_is_free():
    """A caption gives the same velocity in a window of 32 and of 128 tokens."""
    params, given = params_of(nano_zimage.make_transformer()), inputs(SMALL, lengths=(7, 32), tokens=128)
    short = given | {"text": given["text"][:, :32]}
    np.testing.assert_allclose(ours(params, short), ours(params, given), atol=2e-6)


@pytest.mark.parametrize(
    ("smaller", "by"),
    [
        (("cap_embedder.0",), 1.0),
        (("all_x_embedder",), 3e-3),  # to the first RMSNorm: 1e-5
        (("to_q", "to_k"), 3e-3),  # to q's and k's: 1e-5
        (("to_out.0", "w2"), 3e-3),  # to those behind the halves: 1e-5
    ],
)
def test_what_is_added_to_small_sums(smaller, by):
    """Where weights are so small that each of the network's epsilons matters, diffusers' result still is ours."""
    model, given = nano_zimage.make_transformer(), inputs(SMALL)
    if "cap_embedder.0" in smaller:
        given |= {"text": 3e-3 * given["text"]}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(x in name for x in smaller):
                parameter.mul_(by)
    assert error(ours(params_of(model), given), theirs(model, given)) < 2e-5


@pytest.mark.slow
def test_true_width():
    """One block of each kind of Z-Image's own width, 3840, at a caption of its own 2560."""
    values = {k: v for k, v in PUBLIC["transformer/config.json"].items() if k[0] != "_"}
    values |= {"n_layers": 1, "n_refiner_layers": 1}
    model = randomise(ZImageTransformer2DModel(**values))
    cfg = weights.from_config(ZImageConfig, "memory", values)
    assert (cfg.dim, cfg.hidden, cfg.time_width) == (3840, 10240, 256)
    given = inputs(cfg, 8, 10, (9, 32))
    assert error(ours(params_of(model, cfg), given, cfg=cfg), theirs(model, given)) < 1e-5


@pytest.mark.slow
def test_bfloat16_stays_near():
    model, given = nano_zimage.make_transformer(), inputs(SMALL)
    found = ours(params_of(model, dtype=jnp.bfloat16), given, dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    assert 1e-4 < error(found, theirs(model, given)) < 0.05


@pytest.mark.slow
def test_remat_keeps_the_gradient():
    params, given = params_of(nano_zimage.make_transformer()), inputs(SMALL)
    where, x = zimage.places(SMALL, 2, 3, 64), zimage.pack(given["x"])

    def of(remat, keeps):
        network = ZImageTransformer(SMALL, jnp.float32, remat, keeps)
        given_ = given["sigma"], given["length"], where, given["text"]
        return jax.jit(jax.grad(lambda params: jnp.sum(network.apply({"params": params}, x, *given_) ** 2)))(params)

    plain, kept = of(False, ()), of(True, ("attention", "mlp"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max()), plain, kept)


# --- the caption, once per rollout ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "params", "quant"])
def test_captions_once_a_rollout(folder, kind):
    """Captions refined beforehand, with each policy's own weights, give the same velocity."""
    model, (base, _, _) = zimage.make(nano_zimage.model(folder)), zimage.load(nano_zimage.model(folder))
    base, how = jax.tree.map(jnp.asarray, base), config.Lora(4)
    adapter = nano.random(lora.init(jax.random.key(0), base, model.lora_targets, how), 2)
    variables = {
        "params": lambda: {"params": base},
        "lora": lambda: lora.policy(base, adapter, how),
        "quant": lambda: {
            "params": base,
            "quant": quant.quantise_tree(base, model.quant_rules.nvfp4, "nvfp4_emulated"),
        },
    }[kind]()
    given = inputs(SMALL, 8, 8)
    cond = {"text": given["text"], "length": given["length"]}
    prepared = jax.jit(model.prepare)(variables, cond)
    assert prepared["caption"].shape == (5, 64, 48) and set(prepared) == {"caption", "length"}
    at = given["x"], given["sigma"]
    found = jax.jit(model.velocity)(variables, *at, cond)
    np.testing.assert_allclose(jax.jit(model.velocity)(variables, *at, prepared), found, atol=1e-5)
    if kind != "params":
        assert np.abs(found - jax.jit(model.velocity)({"params": base}, *at, cond)).max() > 1e-3
        assert np.abs(prepared["caption"] - jax.jit(model.prepare)({"params": base}, cond)["caption"]).max() > 1e-3


def test_captions_use_the_networks_parameters():
    """The module for the caption alone makes no parameter of its own."""
    rope = zimage.caption_rope(zimage.places(SMALL, 1, 1, 32), 1, 32)
    given = jnp.zeros((1, 32, 32)), jnp.ones(1, jnp.int32), rope
    own = jax.eval_shape(lambda: Caption(SMALL, jnp.float32).init(jax.random.key(0), *given)["params"])
    spec = shapes_of(SMALL)
    assert set(own) == {"cap_embedder.0", "cap_embedder.1", "cap_pad_token", "context_refiner"}
    assert jax.tree.map(lambda x: x.shape, own) == jax.tree.map(lambda x: x.shape, {k: spec[k] for k in own})


@pytest.mark.slow
def test_the_velocity_is_minus_the_networks_output(folder):
    model, (base, _, _) = zimage.make(nano_zimage.model(folder)), zimage.load(nano_zimage.model(folder))
    given = inputs(SMALL, 8, 8)
    found = jax.jit(model.velocity)({"params": base}, given["x"], given["sigma"], given)
    np.testing.assert_array_equal(found, -ours(base, given))
    with pytest.raises(ValueError, match=r"latents of shape .*: this model needs \[B, 8, 8, 4\]"):
        model.velocity({"params": base}, given["x"][:, :4], given["sigma"], given)


@pytest.mark.slow
def test_what_is_seen_of_every_linear(folder):
    """Of all Linears, those of the caption's blocks too: units of FP8 are per Linear of a stack."""
    model, (base, _, _) = zimage.make(nano_zimage.model(folder)), zimage.load(nano_zimage.model(folder))
    given = inputs(SMALL, 8, 8)
    seen = jax.jit(model.largest)({"params": base}, given["x"], given["sigma"], given)
    assert all(np.isfinite(x) and x > 0 for x in seen.values())
    chosen = {path.removesuffix("/kernel") for path in quant.chosen(base, model.quant_rules.fp8)}
    assert len(chosen) == 3 * 7 and chosen <= set(seen)


# --- the public sizes -----------------------------------------------------------------------------------------------


def public_model(tmp_path, **changes) -> Model:
    path = str(hub.write_configs(tmp_path, PUBLIC))
    return zimage.make(config.Model(**{"name": "zimage", "path": path, "size": 512, "text_tokens": 128} | changes))


def test_keys_of_the_public_model(tmp_path):
    """6,154,908,736 parameters in 521 tensors, and diffusers' own names and shapes of them."""
    spec = jax.eval_shape(public_model(tmp_path).init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(spec)) == 6_154_908_736
    with torch.device("meta"):
        values = {k: v for k, v in PUBLIC["transformer/config.json"].items() if k[0] != "_"}
        there = {k: tuple(v.shape) for k, v in ZImageTransformer2DModel(**values).state_dict().items()}
    assert len(there) == 521
    found = {}
    for leaf in weights.needed(spec, zimage.KEYS):
        shape = leaf.shape[1:] if leaf.stacked else leaf.shape
        found |= dict.fromkeys(leaf.keys, shape[::-1] if leaf.layout == "linear" else shape)
    assert found == there


def test_coverage(tmp_path):
    """238 of 276 Linears, 6,016,204,800 of 6,154,908,736 parameters."""
    model = public_model(tmp_path)
    for precision in ("nvfp4_emulated", "fp8"):
        found = coverage.check(model, precision, config.load("zimage").model.min_quantised_flops)
        assert (sum(u.layers for u in found), sum(u.layers for u in found if u.quantised)) == (276, 238)
        low = sum(u.weights for u in found if u.quantised)
        assert low == 6_016_204_800 and low / 6_154_908_736 == pytest.approx(0.9775, abs=5e-5)
        assert sum(u.flops for u in found) == pytest.approx(13.0497e12, rel=1e-4)  # at a caption of 128
        assert coverage.share(found, "flops", blocks=True) > 0.999


@pytest.mark.parametrize(
    ("targets", "modules", "count"),
    [
        (zimage.LORA_TARGETS, 136, 33_423_360),
        ((*zimage.LORA_TARGETS, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"), 238, 79_380_480),
    ],
)
def test_lora_targets(tmp_path, targets, modules, count):
    """At rank 32: the refiners are adapted too."""
    spec = jax.eval_shape(public_model(tmp_path).init, jax.random.key(0))
    found = lora.adapted(spec, targets)
    assert sum(shape[0] for shape in found.values()) == modules
    assert sum(layers * 32 * (inside + outside) for layers, inside, outside in found.values()) == count
    assert {path.split("/")[0] for path in found} == {"layers", "noise_refiner", "context_refiner"}


def test_frames_after_the_caption():
    """The image's frame is one behind the padded caption; rotations depend on differences alone."""
    cfg = weights.from_config(ZImageConfig, "memory", PUBLIC["transformer/config.json"])
    where = zimage.places(cfg, 2, 3, 64)
    cos, sin = zimage_network.image_rope(where, jnp.array([1, 33]), 6)
    assert cos.shape == sin.shape == (2, 32, 128)
    np.testing.assert_allclose(cos[:, 0, 0], np.cos([33.0, 65.0]), atol=1e-6)  # theta^0 = 1
    np.testing.assert_allclose(-sin[:, 0, 0], np.sin([33.0, 65.0]), atol=1e-6)
    np.testing.assert_allclose(cos[0, 5, 32:34], np.cos([1.0, 1.0]), atol=1e-6)  # row 1
    np.testing.assert_allclose(cos[0, 5, 80:82], np.cos([2.0, 2.0]), atol=1e-6)  # column 2
    assert np.all(cos[:, 6:] == 1) and np.all(sin[:, 6:] == 0)  # pads of the image are at the origin
    cos, sin = zimage.caption_rope(where, 2, 64)
    np.testing.assert_allclose(cos[1, :, 0], np.cos(np.arange(1, 65)), atol=1e-6)
    assert np.all(cos[..., 32:] == 1) and np.all(sin[..., 32:] == 0)


# --- times ----------------------------------------------------------------------------------------------------------


SIX = {  # shift 6, of Z-Image; Turbo has 3
    6: [1, 0.9677419, 0.9230769, 0.8571429, 0.75, 0.5454545, 0],
    10: [1, 0.9818182, 0.96, 0.9333333, 0.9, 0.8571429, 0.8, 0.72, 0.6, 0.4, 0],
}
TURBO = {8: [1, 0.9545455, 0.9, 0.8333333, 0.75, 0.6428571, 0.5, 0.3, 0]}


@pytest.mark.parametrize("steps", [1, 4, 6, 10, 28, 50])
def test_sigmas(folder, steps):
    found = zimage.make(nano_zimage.model(folder)).sigmas(steps)
    assert found.dtype == np.float64 and found.shape == (steps + 1,) and found[0] == 1 and found[-1] == 0
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), mu=0.7)
    np.testing.assert_allclose(found, scheduler.sigmas, rtol=1e-6, atol=1e-7)
    if steps in SIX:
        np.testing.assert_allclose(found, SIX[steps], rtol=1e-6)
    if steps == 50:
        np.testing.assert_allclose(found[[1, -2]], [0.9966102, 0.1090909], rtol=1e-6)


def test_sigmas_of_turbo(folder, tmp_path):
    turbo = Path(shutil.copytree(folder, tmp_path / "turbo"))
    rewrite(turbo / "scheduler/scheduler_config.json", shift=3.0)
    model = zimage.make(nano_zimage.model(turbo))
    np.testing.assert_allclose(model.sigmas(8), TURBO[8], rtol=1e-6)
    assert (model.shift(8), model.guidance, model.guided, model.distilled) == (3.0, "none", 1.0, True)
    plain = zimage.make(nano_zimage.model(folder))
    assert (plain.shift(8), plain.guidance, plain.guided, plain.distilled) == (6.0, "cfg", 5.0, False)
    asked = zimage.make(nano_zimage.model(turbo, guidance="cfg"))
    assert (asked.guidance, asked.distilled) == ("cfg", True)
    linear = zimage.make(nano_zimage.model(turbo, shift=1.0))
    np.testing.assert_allclose(linear.sigmas(4), [1, 0.75, 0.5, 0.25, 0])
    assert linear.guidance == "none"


# --- whole pictures -------------------------------------------------------------------------------------------------


PROMPTS = ["a red circle!", "", "a small blue square on a white background", "cats"]
"""Of 32, 19, 60 and 23 tokens in the small tokenizer, less its merges."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return nano_zimage.write(tmp_path_factory.mktemp("zimage") / "zimage")


def pipe_of(folder):
    found = ZImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


HOW = {"height": nano_zimage.SIZE, "width": nano_zimage.SIZE, "max_sequence_length": nano_zimage.TOKENS}


@pytest.mark.usefixtures("one_thread")
def test_captions(folder):
    """Qwen3's states of the text alone, template included, as the pipeline gives them."""
    model, (_, _, encoders) = zimage.make(nano_zimage.model(folder)), zimage.load(nano_zimage.model(folder))
    cond = jax.jit(model.encode)(encoders, model.tokenize(PROMPTS))
    with torch.no_grad():
        states, _ = pipe_of(folder).encode_prompt(list(PROMPTS), max_sequence_length=nano_zimage.TOKENS)
    assert cond["length"].tolist() == [len(x) for x in states]
    assert {-(-n // 32) for n in cond["length"].tolist()} == {1, 2} and 19 in cond["length"].tolist()
    for ours, length, theirs in zip(cond["text"], cond["length"], states, strict=True):
        assert error(ours[:length], theirs) < 1e-5


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("w", [slow(1.0), 5.0])
def test_pictures(folder, w):
    """The same prompts and noise give diffusers' pictures, through our files, tokenizer, encoder, sampler and VAE.

    Our weight of guidance is the pipeline's guidance_scale plus one.
    """
    cfg, pipe = nano_zimage.model(folder), pipe_of(folder)
    model, (base, decoder, encoders) = zimage.make(cfg), zimage.load(cfg)
    cond = jax.jit(model.encode)(encoders, model.tokenize(PROMPTS))
    negative = jax.tree.map(lambda x: x[1:2], cond)
    x1 = jax.vmap(model.noise)(jax.random.split(jax.random.key(3), len(PROMPTS)))
    assert x1.shape == (4, 8, 8, 4)
    how = {"latents": torch.tensor(np.asarray(x1)).permute(0, 3, 1, 2), "num_inference_steps": 6, **HOW}
    how |= {"guidance_scale": w - 1}
    latents = pipe(list(PROMPTS), output_type="latent", **how).images.permute(0, 2, 3, 1)
    public = pipe(list(PROMPTS), output_type="np", **how).images

    @jax.jit
    def draw(base, decoder, cond, negative, x1):
        cond, negative = (model.prepare({"params": base}, x) for x in (cond, negative))
        rows = guidance.conditioned(model, cond, negative, w)
        velocity = lambda x, sigma: guidance.velocity(model, w)({"params": base}, x, sigma, rows)  # noqa: E731
        x0 = sampler.sample(velocity, x1, sampler.table(model.sigmas(6), "euler"))
        return x0, model.decode(decoder, x0)

    x0, found = draw(base, decoder, cond, negative, x1)
    assert error(x0, latents) < 1e-4
    assert found.shape == public.shape == (4, 16, 16, 3) and public.std() > 0.05
    assert np.abs(found - public).max() < 1e-4


def test_made_and_loaded_in_its_dtype(folder):
    cfg = nano_zimage.model(folder, dtype="bfloat16")
    model, (base, decoder, encoders) = zimage.make(cfg), zimage.load(cfg)
    assert zimage.make(nano_zimage.model(folder, dtype="bfloat16")) is model and hash(model)
    assert {x.dtype for x in jax.tree.leaves((base, encoders))} == {np.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(decoder)} == {np.dtype(np.float32)}
    described = jax.tree.map(lambda x: (x.shape, x.dtype), zimage.shapes(cfg))
    assert described == jax.tree.map(lambda x: (x.shape, x.dtype), (base, decoder, encoders))
    tokens = jax.tree.map(lambda x: (x.shape, x.dtype), zimage.token_shapes(cfg, 4))
    assert tokens == jax.tree.map(lambda x: (x.shape, x.dtype), model.tokenize(PROMPTS))


def test_files_of_another_dtype(folder, tmp_path):
    """Turbo's transformer is in float32, Z-Image's in bfloat16: the files' headers say so, and both load as asked."""
    half = Path(shutil.copytree(folder, tmp_path / "half"))
    ZImageTransformer2DModel.from_pretrained(folder / "transformer").to(torch.bfloat16).save_pretrained(
        half / "transformer"
    )
    file = next(f for f in (half / "transformer").glob("*.safetensors") if len(f.name.split("-")) == 1)
    [f.unlink() for f in (half / "transformer").iterdir() if "-of-" in f.name or f.name.endswith("index.json")]
    kinds = {x.dtype for x in load_file(file).values()}
    assert kinds == {np.dtype(jnp.bfloat16)}
    for dtype in ("float32", "bfloat16"):
        one, two = (zimage.load(nano_zimage.model(path, dtype=dtype))[0] for path in (folder, half))
        assert {x.dtype for x in jax.tree.leaves((one, two))} == {np.dtype(jnp.dtype(dtype))}
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8, atol=0), *jax.tree.map(np.float32, (one, two))
        )


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "pipeline"))


NETWORK, SCHEDULER = "transformer/config.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        (
            NETWORK,
            {"_class_name": "FluxTransformer2DModel"},
            "holds a FluxTransformer2DModel, not a ZImageTransformer2",
        ),
        (NETWORK, {"all_patch_size": [4]}, "all_patch_size is .4.: only 2 is known here"),
        (NETWORK, {"all_f_patch_size": [2]}, "all_f_patch_size is .2.: only 1 is known here"),
        (NETWORK, {"qk_norm": False}, "qk_norm is False: only True is known here"),
        (NETWORK, {"siglip_feat_dim": 1152}, "siglip_feat_dim is 1152: only null is known here"),
        (NETWORK, {"n_kv_heads": 1}, "n_kv_heads 1 is not n_heads 3"),
        (NETWORK, {"axes_dims": [4, 6, 8]}, r"axes_dims \(4, 6, 8\) do not add up to dim 48 over n_heads 3"),
        (NETWORK, {"axes_dims": [8, 8]}, r"axes_dims \(8, 8\) are not three even numbers"),
        (NETWORK, {"n_layers": "3"}, "n_layers is '3', not a whole number above 0"),
        (NETWORK, {"an_attention": "new"}, "an_attention is 'new', an option that is not known here"),
        (NETWORK, {"cap_feat_dim": 2560}, r"takes text of 2560 \(cap_feat_dim\), Qwen3 gives 32"),
        (NETWORK, {"in_channels": 16}, "takes 16 channels, the VAE gives 4"),
        ("text_encoder/config.json", {"model_type": "gemma2"}, "holds a gemma2, not a qwen3"),
        ("vae/config.json", {"use_post_quant_conv": True}, "use_post_quant_conv"),
        (SCHEDULER, {"_class_name": "DDIMScheduler"}, "_class_name is 'DDIMScheduler': only 'FlowMatchEuler"),
        (SCHEDULER, {"use_beta_sigmas": True}, "use_beta_sigmas is True: only False or null"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "holds a FluxPipeline, .*: use --config=flux"),
    ],
)
def test_refused_folders(copy, file, values, words):
    rewrite(copy / file, **values)
    with pytest.raises(weights.WeightsError, match=words) as e:
        zimage.make(nano_zimage.model(copy))
    assert str(copy) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 30}, r"model.size=30: use a multiple of 4 pixels \(VAE x2, 2x2 patches\)"),
        ({"text_tokens": 33}, "model.text_tokens=33: Z-Image .* multiple of 32 tokens: use 64"),
        ({"text_tokens": 160}, r"model.text_tokens=160: the network has 160 frames \(axes_lens\): use 128 or less"),
        ({"size": 256}, "model.size=256 is 64 tokens .* has places for 32 .axes_lens.: use 128 or less"),
    ],
)
def test_sizes_that_do_not_fit(copy, changes, words):
    with pytest.raises(config.ConfigError, match=words):
        zimage.make(nano_zimage.model(copy, **changes))


def test_config_of_another_depth(copy):
    rewrite(copy / NETWORK, n_layers=2)
    with pytest.raises(weights.WeightsError, match=r"unused layers.2.") as e:
        zimage.load(nano_zimage.model(copy))
    assert str(e.value).count("unused") <= 12


def test_flux_in_its_place(tmp_path):
    nano.build(tmp_path)
    with pytest.raises(weights.WeightsError, match=r"holds a FluxPipeline, not a ZImagePipeline: use --config=flux"):
        zimage.make(nano_zimage.model(tmp_path / "pipeline"))
