"""SD3.5 against diffusers: transformer, text, sigmas and whole pictures, on small random weights."""

import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from oracle import error, randomise
from safetensors.numpy import load_file, save_file
from transformers import T5EncoderModel

from solrl_jax import config, sampler, weights
from solrl_jax.models import fused, layers, sd35
from solrl_jax.models.sd35 import Sd35Config, Sd35Transformer
from solrl_jax.quant import coverage
from solrl_jax.weights import hub
from tests import nano, nano_sd35
from tests.test_flux import Held, rewrite
from tests.tiers import slow

PROMPTS = ["a red circle!", "A small  blue square on a white background, left of a green triangle", ""]
PUBLIC = dict(zip(("large", "medium"), sd35.PUBLIC.values(), strict=True))


def make_transformer(**changes):
    model = SD3Transformer2DModel(**{**nano_sd35.TRANSFORMER, **changes})
    model.pos_embed.pos_embed.add_(
        torch.randn(model.pos_embed.pos_embed.shape, generator=torch.Generator().manual_seed(1))
    )
    return randomise(model)


def inputs(cfg: Sd35Config, height: int = 6, width: int = 10, tokens: int = 5) -> dict[str, jax.Array]:
    """Arguments of Sd35Transformer, two samples of them; latents need not be square."""
    rng = np.random.default_rng(0)
    shapes = {"x": (2, height, width, cfg.in_channels), "text": (2, tokens, cfg.joint_attention_dim)}
    shapes["pooled"] = (2, cfg.pooled_projection_dim)
    drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return jax.tree.map(jnp.asarray, drawn | {"sigma": np.float32([0.95, 0.0089])})


@functools.lru_cache
def shapes_of(cfg: Sd35Config):
    """The parameters without their arrays."""
    network, given = Sd35Transformer(cfg, jnp.float32), inputs(cfg, 2, 2, 3)
    return jax.eval_shape(lambda: network.init(jax.random.key(0), **given)["params"])


@functools.lru_cache
def compiled(cfg: Sd35Config, dtype, remat: bool):
    network = Sd35Transformer(cfg, dtype, remat)
    return jax.jit(lambda params, given: network.apply({"params": params}, **given))


def ours(params, given, *, cfg: Sd35Config, dtype=jnp.float32, remat: bool = False):
    return compiled(cfg, dtype, remat)(params, given)


def theirs(model: SD3Transformer2DModel, given) -> torch.Tensor:
    t = {name: torch.tensor(np.asarray(value)) for name, value in given.items()}
    with torch.no_grad():
        return model(
            hidden_states=t["x"].permute(0, 3, 1, 2),
            encoder_hidden_states=t["text"],
            pooled_projections=t["pooled"],
            timestep=1000 * t["sigma"],
        ).sample.permute(0, 2, 3, 1)


# --- the transformer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dual", "qk_norm", "remat", "names"),
    [
        ((), None, False, ["0", "4"]),  # SD3 of 2024
        ((), "rms_norm", True, ["0", "4"]),  # Large
        ((0, 1), "rms_norm", True, ["0", "2", "4"]),  # Medium
        ((1, 3, 4), "rms_norm", False, ["0", "1", "2", "3", "4"]),  # what no checkpoint has, but a config can say
    ],
)
def test_transformer_from_shards(tmp_path, dual, qk_norm, remat, names):
    model = make_transformer(dual_attention_layers=dual, qk_norm=qk_norm)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file()
    cfg = Sd35Config.read(tmp_path)
    assert (cfg.width, cfg.num_layers, cfg.dual_attention_layers, cfg.qk_norm) == (48, 5, dual, qk_norm or "")
    files, keys = weights.Files(tmp_path, "diffusion_pytorch_model"), sd35.keys(cfg)
    params = weights.load(files, shapes_of(cfg), keys)
    assert sorted(name[19:] for name in params if name.startswith("transformer_blocks")) == names
    given = inputs(cfg)
    assert error(ours(params, given, cfg=cfg, remat=remat), theirs(model, given)) < 3e-5
    weights.save(params, keys, tmp_path / "out.safetensors")  # what we write is what diffusers wrote
    saved = load_file(tmp_path / "out.safetensors")
    assert saved.keys() == set(files.keys())
    assert all(np.array_equal(saved[key], files[key]) for key in saved)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "dual"), [("large", ()), ("medium", (0,))])
def test_true_width(size, dual):
    """A block of each kind that the checkpoint has, at its own width."""
    values = PUBLIC[size]["transformer/config.json"] | {"num_layers": 2 + len(dual), "dual_attention_layers": dual}
    values |= {"pos_embed_max_size": 8}
    model = randomise(SD3Transformer2DModel(**{k: v for k, v in values.items() if k[0] != "_"}))
    cfg = weights.from_config(Sd35Config, "memory", values)
    assert cfg.width == {"large": 2432, "medium": 1536}[size] and len(sd35.runs(cfg)) == 2 + len(dual)
    params = weights.load(Held(model), shapes_of(cfg), sd35.keys(cfg))
    given = inputs(cfg, 8, 8, 9)
    assert error(ours(params, given, cfg=cfg), theirs(model, given)) < 3e-5


@pytest.mark.slow
def test_bfloat16_stays_near():
    model = make_transformer(**nano_sd35.MEDIUM)
    cfg = Sd35Config(**nano_sd35.TRANSFORMER_FIELDS, **nano_sd35.MEDIUM)
    params = weights.load(Held(model), shapes_of(cfg), sd35.keys(cfg), dtype=jnp.bfloat16)
    given = inputs(cfg)
    found = ours(params, given, cfg=cfg, dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    assert 1e-4 < error(found, theirs(model, given)) < 0.05


def test_missing_config_fields(tmp_path):
    """As in diffusers: SD3.5 Large's file has no dual_attention_layers, SD3's neither them nor qk_norm."""
    (tmp_path / "config.json").write_text('{"num_layers": 3, "qk_norm": null, "dual_attention_layers": []}')
    found = Sd35Config.read(tmp_path)
    assert found == Sd35Config(num_layers=3)
    with torch.device("meta"):
        public = SD3Transformer2DModel(num_layers=3).config
    assert {k: v or "" if k == "qk_norm" else v for k, v in public.items() if hasattr(found, k)} == vars(found)


@pytest.mark.parametrize(
    ("size", "parameters", "table"), [("large", 8_056_627_520, 89_653_248), ("medium", 2_243_171_520, 226_492_416)]
)
def test_public_keys_and_sizes(size, parameters, table):
    """Every tensor of the public models, by the names and shapes that diffusers has."""
    values = PUBLIC[size]["transformer/config.json"]
    with torch.device("meta"):
        public = SD3Transformer2DModel(**{k: v for k, v in values.items() if k[0] != "_"}).state_dict()
    cfg = weights.from_config(Sd35Config, "memory", values)
    spec = shapes_of(cfg)
    assert sum(leaf.size for leaf in jax.tree.leaves(spec)) == parameters + table
    assert spec["pos_embed"]["pos_embed"].size == table
    order = {"linear": (1, 0), "conv": (3, 2, 0, 1)}
    found = {}
    for leaf in weights.needed(spec, sd35.keys(cfg)):
        shape = leaf.shape[1:] if leaf.stacked else leaf.shape
        found |= dict.fromkeys(leaf.keys, tuple(shape[i] for i in order.get(leaf.layout, range(len(shape)))))
    assert found == {key: tuple(value.shape) for key, value in public.items()}
    kinds = [(run.first, run.layers, run.dual, run.last) for run in sd35.runs(cfg)]
    medium = [(0, 13, True, False), (13, 10, False, False), (23, 1, False, True)]
    assert kinds == {"large": [(0, 37, False, False), (37, 1, False, True)], "medium": medium}[size]


@pytest.mark.parametrize(
    ("size", "linears", "low", "share", "flops", "of_flops", "total"),
    [
        ("large", 536, 76, 0.2232, 23.1891e12, 0.6352, 1_798_045_696),
        ("medium", 392, 48, 0.2019, 6.8461e12, 0.5420, 452_984_832),
    ],
)
def test_coverage(tmp_path, size, linears, low, share, flops, of_flops, total):
    """`share` is of all parameters, so that the Linears' own is a little more."""
    path = str(hub.write_configs(tmp_path, PUBLIC[size]))
    least = config.load("sd35" if size == "large" else "sd35:medium").model.min_quantised_flops
    model = sd35.make(config.Model(name="sd35", path=path, size=1024, min_dim=2432))
    found = coverage.check(model, "nvfp4_emulated", least)
    assert (sum(u.layers for u in found), sum(u.layers for u in found if u.quantised)) == (linears, low)
    assert sum(u.weights for u in found if u.quantised) == total
    assert coverage.share(found, "weights") == pytest.approx(share, abs=2e-4)
    assert coverage.share(found, "flops") == pytest.approx(of_flops, abs=1e-4)
    assert sum(u.flops for u in found) == pytest.approx(flops, rel=1e-5)
    assert {u.path.split("/", 1)[1] for u in found if u.quantised} == {"ff/net.0.proj", "ff/net.2"}
    eight = coverage.check(model, "fp8", 0.999)
    kept = {u.path.split("/", 1)[-1] for u in eight if not u.quantised and u.stacked}
    assert kept == {"norm1/linear", "norm1_context/linear"}


# --- attention of odd lengths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (4, 7)])
def test_odd_lengths(queries, keys):
    """A row that is added and masked changes neither values nor gradients, under vmap as in a LoRA's policies too."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(3, 2, n, 2, 8)), jnp.float32) for n in (queries, keys, keys))

    def of(f):
        def total(*given):
            return jnp.sum(jax.vmap(f)(*given) ** 2)

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)

    found = of(lambda *x: fused.odd_attention(*x, 0.3, "xla"))
    plain = of(lambda *x: layers.attention(*x, scale=0.3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, plain)


# --- times ----------------------------------------------------------------------------------------------------------


LITERAL = {  # shift 3, by diffusers
    6: [1, 0.923342526, 0.818923354, 0.668326676, 0.432225078, 0.00892857183, 0],
    10: [
        *(1, 0.960129321, 0.913348973, 0.857692301, 0.790368259, 0.707278490),
        *(0.602150559, 0.464876026, 0.278048784, 0.00892857183, 0),
    ],
}


@pytest.mark.parametrize("steps", [1, 6, 10, 40])
@pytest.mark.parametrize("shift", [3.0, 1.0])
def test_sigmas(steps, shift):
    ours = sd35.sigmas(steps, shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    assert (ours.dtype, ours.shape) == (np.float64, (steps + 1,))
    np.testing.assert_allclose(ours, scheduler.sigmas, rtol=1e-6, atol=0)
    np.testing.assert_allclose(1000 * ours[:-1], scheduler.timesteps, rtol=1e-6)  # what the network is told
    assert ours[0] == 1 and (steps == 1 or sampler.table(ours, "dpm2").x0[1, 1] == 0)
    if shift == 3.0 and steps in LITERAL:
        np.testing.assert_allclose(ours, LITERAL[steps], rtol=1e-7, atol=0)


# --- whole pictures -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Medium's kind with T5, and Large's without it."""
    root = tmp_path_factory.mktemp("sd35")
    return {
        "medium": nano_sd35.write(root / "medium", **nano_sd35.MEDIUM),
        "no t5": nano_sd35.write(root / "large", t5=False),
    }


def pipe_of(folder):
    without = {} if (folder / "text_encoder_3").exists() else {"text_encoder_3": None, "tokenizer_3": None}
    found = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32, **without)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["medium", slow("no t5")])
def test_pictures(folders, kind):
    """The same prompts and noise give diffusers' pictures, through our files, tokenizers, encoders, sampler and VAE."""
    cfg, pipe = nano_sd35.model(folders[kind]), pipe_of(folders[kind])
    model, (base, decoder, encoders) = sd35.make(cfg), sd35.load(cfg)
    assert set(encoders) == {"clip", "clip_g", "t5"} - ({"t5"} if kind == "no t5" else set())
    ids = model.tokenize(PROMPTS)
    cond = jax.jit(model.encode)(encoders, ids)
    with torch.no_grad():
        how = {"do_classifier_free_guidance": False, "max_sequence_length": nano_sd35.TOKENS}
        states, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, **how)
    assert cond["text"].shape == (3, nano_sd35.LENGTH + nano_sd35.TOKENS, 48)
    assert error(cond["text"], states) < 1e-5
    assert error(cond["pooled"], pooled) < 1e-5
    assert kind == "medium" or not np.any(cond["text"][:, nano_sd35.LENGTH :])

    x1 = jax.vmap(model.noise)(jax.random.split(jax.random.key(3), len(PROMPTS)))
    assert x1.shape == (3, 8, 8, 4)
    noise = torch.tensor(np.asarray(x1)).permute(0, 3, 1, 2)
    how = {"height": 16, "width": 16, "num_inference_steps": 6, "guidance_scale": 1.0, "max_sequence_length": 8}
    latents = pipe(PROMPTS, latents=noise, output_type="latent", **how).images.permute(0, 2, 3, 1)
    public = pipe(PROMPTS, latents=noise, output_type="np", **how).images

    @jax.jit
    def draw(base, decoder, cond, x1):
        velocity = lambda x, sigma: model.velocity({"params": base}, x, sigma, cond)  # noqa: E731
        x0 = sampler.sample(velocity, x1, sampler.table(model.sigmas(6), "euler"))
        return x0, model.decode(decoder, x0)

    x0, found = draw(base, decoder, cond, x1)
    assert error(x0, latents) < 1e-4
    assert found.shape == public.shape == (3, 16, 16, 3) and public.std() > 0.05
    assert np.abs(found - public).max() < 1e-4


def test_an_exclamation_mark_is_padding_to_the_second_clip(folders):
    """Its pad token is "!", id 0, which the tokenizer sees before it sees words."""
    ids = sd35.make(nano_sd35.model(folders["medium"])).tokenize(["a red circle!"])
    first, second = ids["clip"][0], ids["clip_g"][0]
    assert first[4] == 256 and second[4] == 0  # "!</w>", and "!"
    end = first[-1]
    assert list(first[5:]) == [end] * 7 and list(second[5:]) == [end] + [0] * 6


def test_made_and_loaded_in_its_dtype(folders):
    cfg = nano_sd35.model(folders["medium"], dtype="bfloat16")
    model, (base, decoder, encoders) = sd35.make(cfg), sd35.load(cfg)
    assert sd35.make(nano_sd35.model(folders["medium"], dtype="bfloat16")) is model and hash(model)
    assert {x.dtype for x in jax.tree.leaves((base, encoders))} == {np.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(decoder)} == {np.dtype(np.float32)}
    described = jax.tree.map(lambda x: (x.shape, x.dtype), sd35.shapes(cfg))
    assert described == jax.tree.map(lambda x: (x.shape, x.dtype), (base, decoder, encoders))
    tokens = {name: (x.shape, x.dtype) for name, x in sd35.token_shapes(cfg, 3).items()}
    assert tokens == {name: (x.shape, x.dtype) for name, x in model.tokenize(PROMPTS).items()}


@pytest.mark.slow
def test_fp16_text_encoders(copy):
    """Public T5 files are fp16, whose range its states leave: they are read, and computed in the network's dtype."""
    for file in (copy / "text_encoder_3").glob("*.safetensors"):
        tensors = load_file(file)
        grown = {k: 50_000 * x if k.endswith(("wo.weight", "shared.weight")) else x for k, x in tensors.items()}
        save_file({k: x.astype(np.float16) for k, x in grown.items()}, file, metadata={"format": "pt"})
    half = T5EncoderModel.from_pretrained(copy / "text_encoder_3", dtype=torch.float16)
    for dtype in ("float32", "bfloat16"):
        cfg = nano_sd35.model(copy, dtype=dtype)
        model, (_, _, encoders) = sd35.make(cfg), sd35.load(cfg)
        ids = jax.tree.map(jnp.asarray, model.tokenize(PROMPTS))
        text = jax.jit(model.encode)(encoders, ids)["text"][:, nano_sd35.LENGTH :]
        with torch.no_grad():
            states = half.to(torch.float32)(torch.tensor(np.array(ids["t5"]))).last_hidden_state
            stream = half.encoder.block[0](half.shared(torch.tensor(np.array(ids["t5"]))))[0]
        assert stream.abs().max() > 65504  # fp16 would have ended here
        assert text.dtype == dtype and error(text, states) < {"float32": 1e-4, "bfloat16": 0.1}[dtype]


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(folders, tmp_path):
    return Path(shutil.copytree(folders["medium"], tmp_path / "pipeline"))


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        (
            "transformer/config.json",
            {"_class_name": "FluxTransformer2DModel"},
            "holds a FluxTransformer2DModel, not a SD3Transformer2DModel",
        ),
        ("transformer/config.json", {"patch_size": 1}, "patch_size 1 is not SD3.5's 2"),
        ("transformer/config.json", {"qk_norm": "layer_norm"}, "qk_norm 'layer_norm' is not known here"),
        ("transformer/config.json", {"num_attention_heads": 4}, "caption_projection_dim 48 is not the width"),
        (
            "transformer/config.json",
            {"dual_attention_layers": [0, 5]},
            r"dual_attention_layers \[5\] are not in 0..4",
        ),
        (
            "transformer/config.json",
            {"dual_attention_layers": "0"},
            "dual_attention_layers is '0', not a list of whole",
        ),
        ("transformer/config.json", {"out_channels": 8}, "out_channels 8 is not in_channels 4"),
        (
            "transformer/config.json",
            {"in_channels": 16, "out_channels": 16},
            "takes 16 channels, the VAE gives 4: the parts belong to different models",
        ),
        ("transformer/config.json", {"pooled_projection_dim": 2048}, r"pooled text of 2048, the CLIPs give 16 \+ 24"),
        ("transformer/config.json", {"joint_attention_dim": 4096}, "takes text of 4096, T5 gives 48"),
        ("transformer/config.json", {"joint_attention_dim": 32}, r"takes text of 32, the CLIPs give 16 \+ 24"),
        ("text_encoder_2/config.json", {"max_position_embeddings": 77}, r"its CLIPs read \[12, 77\] tokens"),
        ("text_encoder_3/config.json", {"feed_forward_proj": "relu"}, "gated-gelu"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting is not SD3.5's"),
        (
            "scheduler/scheduler_config.json",
            {"use_karras_sigmas": True},
            "use_karras_sigmas is True: only False or null",
        ),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "holds a FluxPipeline, not a StableDiffusion3Pipeline"),
    ],
)
def test_refused_folders(copy, file, values, words):
    rewrite(copy / file, **values)
    with pytest.raises(weights.WeightsError, match=words) as e:
        sd35.make(nano_sd35.model(copy))
    assert str(copy) in str(e.value)


@pytest.mark.parametrize(("size", "words"), [(18, "use a multiple of 4 pixels"), (32, "positions ends at 28 pixels")])
def test_sizes_that_do_not_fit(copy, size, words):
    with pytest.raises(config.ConfigError, match=rf"model.size={size}: .*{words}"):
        sd35.make(nano_sd35.model(copy, size=size))


def test_t5_that_is_named_but_not_there(copy):
    """Only model_index.json can leave it out, by [null, null]."""
    shutil.rmtree(copy / "text_encoder_3")
    with pytest.raises(weights.WeightsError, match=r"text_encoder_3/config.json is missing"):
        sd35.make(nano_sd35.model(copy))
    rewrite(copy / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    (copy / "scheduler").rename(copy / "moved")
    (copy / "moved").rename(copy / "scheduler")
    assert set(sd35.load(nano_sd35.model(copy, text_tokens=9))[2]) == {"clip", "clip_g"}


def test_a_tokenizer_that_is_not_there(copy):
    shutil.rmtree(copy / "tokenizer_2")
    with pytest.raises(weights.WeightsError, match=r"tokenizer_2 holds no tokenizer"):
        sd35.load(nano_sd35.model(copy))


def test_projection_that_is_not_there(copy):
    """FLUX's CLIP in the place of SD3.5's: its file has no projection."""
    for file in (copy / "text_encoder").glob("*.safetensors"):
        save_file({k: x for k, x in load_file(file).items() if k != "text_projection.weight"}, file)
    with pytest.raises(weights.WeightsError, match=r"missing text_projection.weight"):
        sd35.load(nano_sd35.model(copy))


def test_config_of_another_depth(copy):
    rewrite(copy / "transformer" / "config.json", num_layers=4)
    with pytest.raises(weights.WeightsError, match=r"unused transformer_blocks.4.") as e:
        sd35.load(nano_sd35.model(copy))
    assert "unused transformer_blocks.3.attn.to_add_out" in str(e.value) or "more" in str(e.value)


def test_flux_in_its_place(tmp_path):
    """The folder of a FLUX, and what its error says to use."""
    nano.build(tmp_path)
    with pytest.raises(weights.WeightsError, match=r"holds a FluxPipeline, not a Stable.*: use --config=flux"):
        sd35.make(nano_sd35.model(tmp_path / "pipeline"))
