"""FLUX against diffusers: the transformer on small random weights, and whole pictures of the committed small world."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from oracle import error, randomise
from safetensors.numpy import load_file, save_file

from configs import tiny
from solrl_jax import config, sampler, weights
from solrl_jax.models import flux, rope
from solrl_jax.models.flux import FluxConfig, FluxTransformer

SMALL = {"in_channels": 16, "attention_head_dim": 16, "num_attention_heads": 3, "joint_attention_dim": 24}
SMALL |= {"pooled_projection_dim": 20, "axes_dims_rope": (4, 6, 6), "num_layers": 1, "num_single_layers": 1}
PIPELINE = tiny.WORLD / "pipeline"
SCHEDULER = json.loads((PIPELINE / "scheduler" / "scheduler_config.json").read_text())
SCHEDULE = flux.Schedule.read(PIPELINE / "scheduler")
PROMPTS = (tiny.WORLD / "prompts" / "test.txt").read_text().splitlines()[:3]


class Held(weights.Files):
    """A torch model's tensors in place of files."""

    def __init__(self, model):
        self.folder, self.tensors = Path("memory"), model.state_dict()

    def keys(self):
        return self.tensors.keys()

    def __getitem__(self, key):
        return self.tensors[key].numpy()

    def part(self, key, at):
        return self[key][at]

    def shape(self, key):
        return tuple(self.tensors[key].shape)

    def stored_as(self, key):
        return str(self[key].dtype)

    def close(self):
        pass


def make_transformer(folder, **changes):
    model = randomise(FluxTransformer2DModel(**SMALL | {"guidance_embeds": True} | changes))
    model.save_pretrained(folder, max_shard_size="50KB")
    return model


def inputs(cfg: FluxConfig, height: int, width: int, tokens: int) -> dict[str, jax.Array]:
    """Arguments of FluxTransformer but for the RoPE table, two samples of them."""
    rng = np.random.default_rng(0)
    shapes = {"x": (2, height * width, cfg.in_channels), "text": (2, tokens, cfg.joint_attention_dim)}
    shapes["pooled"] = (2, cfg.pooled_projection_dim)
    drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return jax.tree.map(jnp.asarray, drawn | {"sigma": np.float32([0.95, 0.2]), "guidance": np.float32([1.0, 3.5])})


def table_of(cfg: FluxConfig, height: int, width: int, tokens: int):
    return tuple(map(jnp.asarray, flux.rope_table(cfg, height, width, tokens)))


@functools.lru_cache
def shapes_of(cfg: FluxConfig):
    """The parameters without their arrays."""
    network, given = FluxTransformer(cfg, jnp.float32), inputs(cfg, 2, 2, 3)
    table = table_of(cfg, 2, 2, 3)
    return jax.eval_shape(lambda: network.init(jax.random.key(0), **given, rope=table)["params"])


@functools.lru_cache
def compiled(cfg: FluxConfig, dtype, remat: bool):
    network = FluxTransformer(cfg, dtype, remat)
    return jax.jit(lambda params, given, table: network.apply({"params": params}, **given, rope=table))


def ours(params, given, height: int, width: int, *, cfg: FluxConfig, dtype=jnp.float32, remat: bool = False):
    return compiled(cfg, dtype, remat)(params, given, table_of(cfg, height, width, given["text"].shape[1]))


def theirs(model: FluxTransformer2DModel, given, height: int, width: int):
    t = {name: torch.tensor(np.asarray(value)) for name, value in given.items()}
    with torch.no_grad():
        return model(
            hidden_states=t["x"],
            encoder_hidden_states=t["text"],
            pooled_projections=t["pooled"],
            timestep=t["sigma"],
            guidance=t["guidance"] if model.config.guidance_embeds else None,
            img_ids=image_ids(height, width),
            txt_ids=torch.zeros(t["text"].shape[1], 3),
        ).sample


def image_ids(height, width):
    return FluxPipeline._prepare_latent_image_ids(1, height, width, "cpu", torch.float32)


# --- the transformer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "guidance", "remat"),
    [((1, 1), True, False), ((2, 3), True, True), ((3, 1), False, False)],
)
def test_transformer_from_shards(tmp_path, layers, guidance, remat):
    model = make_transformer(
        tmp_path, num_layers=layers[0], num_single_layers=layers[1], guidance_embeds=guidance, in_channels=24
    )
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file()
    cfg = FluxConfig.read(tmp_path)
    assert (cfg.width, cfg.num_layers, cfg.num_single_layers, cfg.guidance_embeds) == (48, *layers, guidance)
    files = weights.Files(tmp_path, "diffusion_pytorch_model")
    params = weights.load(files, shapes_of(cfg), flux.KEYS)
    assert params["transformer_blocks"]["attn"]["to_q"]["kernel"].shape == (layers[0], 48, 48)
    given = inputs(cfg, 3, 4, 5)
    found = ours(params, given, 3, 4, cfg=cfg, remat=remat)
    assert error(found, theirs(model, given, 3, 4)) < 3e-5  # 1e-5 seen, most of it from sin(1000 sigma f)
    weights.save(params, flux.KEYS, tmp_path / "out.safetensors")  # what we write is what diffusers wrote
    saved = load_file(tmp_path / "out.safetensors")
    assert saved.keys() == set(files.keys())
    assert all(np.array_equal(saved[key], files[key]) for key in saved)


@pytest.mark.slow
def test_true_width():
    """One double and one single block of FLUX.1-dev's own width: 0.5 B parameters."""
    model = randomise(FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True))
    cfg = FluxConfig(num_layers=1, num_single_layers=1)
    assert cfg.width == 3072
    params = weights.load(Held(model), shapes_of(cfg), flux.KEYS)
    given = inputs(cfg, 4, 4, 8)
    assert error(ours(params, given, 4, 4, cfg=cfg), theirs(model, given, 4, 4)) < 3e-5


@pytest.mark.slow
def test_bfloat16_stays_near(tmp_path):
    model = make_transformer(tmp_path, num_layers=2, num_single_layers=2)
    cfg = FluxConfig.read(tmp_path)
    params = weights.load(Held(model), shapes_of(cfg), flux.KEYS, dtype=jnp.bfloat16)
    given = inputs(cfg, 3, 4, 5)
    found = ours(params, given, 3, 4, cfg=cfg, dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    assert 1e-4 < error(found, theirs(model, given, 3, 4)) < 0.05


def test_missing_config_fields(tmp_path):
    """As in diffusers: old FLUX.1-dev files lack axes_dims_rope; without guidance_embeds there is no embedding."""
    (tmp_path / "config.json").write_text('{"num_layers": 3, "out_channels": null, "axes_dims_rope": null}')
    found = FluxConfig.read(tmp_path)
    assert found == FluxConfig(num_layers=3, guidance_embeds=False)
    with torch.device("meta"):
        public = FluxTransformer2DModel(num_layers=3).config
    assert {k: tuple(v) if k[:4] == "axes" else v for k, v in public.items() if hasattr(found, k)} == vars(found)


def test_public_keys_and_sizes():
    """FLUX.1-dev: its 1160 tensors, by the names and shapes that diffusers has."""
    with torch.device("meta"):
        public = FluxTransformer2DModel(guidance_embeds=True).state_dict()
    spec = shapes_of(FluxConfig())
    assert sum(leaf.size for leaf in jax.tree.leaves(spec)) == 11_901_408_320
    found = {}
    for leaf in weights.needed(spec, flux.KEYS):
        shape = leaf.shape[1:] if leaf.stacked else leaf.shape
        found |= dict.fromkeys(leaf.keys, shape[::-1] if leaf.layout == "linear" else shape)
    assert len(found) == 1160
    assert found == {key: tuple(value.shape) for key, value in public.items()}


# --- latents, positions, times --------------------------------------------------------------------------------------


def test_packing():
    x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    public = FluxPipeline._pack_latents(torch.tensor(x).permute(0, 3, 1, 2), 2, 3, 4, 6)
    ours = flux.pack(jnp.asarray(x))
    np.testing.assert_array_equal(ours, public)
    # token 1 is the patch at row 0, column 2; its channels are (c, dy, dx) with dx fastest
    np.testing.assert_array_equal(
        ours[0, 1, :5], [x[0, 0, 2, 0], x[0, 0, 3, 0], x[0, 1, 2, 0], x[0, 1, 3, 0], x[0, 0, 2, 1]]
    )
    np.testing.assert_array_equal(flux.unpack(ours, 4, 6), x)
    back = FluxPipeline._unpack_latents(public, 4 * 8, 6 * 8, 8)
    np.testing.assert_array_equal(flux.unpack(jnp.asarray(public.numpy()), 4, 6), back.permute(0, 2, 3, 1))


@pytest.mark.parametrize(("height", "width", "tokens"), [(32, 32, 128), (2, 5, 3)])
def test_rope_table(height, width, tokens):
    cos, sin = flux.rope_table(FluxConfig(), height, width, tokens)
    assert cos.shape == sin.shape == (tokens + height * width, 128) and cos.dtype == np.float32
    ids = torch.cat([torch.zeros(tokens, 3), image_ids(height, width)])
    public_cos, public_sin = FluxPosEmbed(10000, (16, 56, 56))(ids)
    np.testing.assert_allclose(cos, public_cos, atol=1e-7)
    np.testing.assert_allclose(sin[:, 1::2], public_sin[:, 1::2], atol=1e-7)
    np.testing.assert_array_equal(sin[:, 0::2], -sin[:, 1::2])  # the sign of a pair's rotation
    assert (cos[:tokens] == 1).all() and (sin[:tokens] == 0).all()  # text is not rotated
    row, column = 1, width - 1
    at = tokens + row * width + column
    np.testing.assert_allclose(sin[at, [1, 17, 73]], [0, np.sin(row), np.sin(column)], atol=1e-7)


LITERAL = {  # by diffusers: (steps, tokens)
    (6, 1024): [1, 0.903735578, 0.789704800, 0.652489424, 0.484218419, 0.273003310, 0],
    (10, 1024): [
        *(1, 0.944129348, 0.882497251, 0.814164102, 0.737974048, 0.652489424),
        *(0.555899024, 0.445888311, 0.319451332, 0.172612414, 0),
    ],
    (6, 4096): [1, 0.940444171, 0.86332047, 0.759510934, 0.612267315, 0.387119174, 0],
}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "within"), [(jnp.bfloat16, 2.0**-7), (jnp.float32, 2.0**-21)])
def test_both_forms_of_rotary_norm(dtype, within):
    """In one pass as in two: bfloat16 to one rounding, where one channel of a pair is much larger too; and one
    gradient."""
    table = tuple(map(jnp.asarray, flux.rope_table(FluxConfig(), 3, 4, 5)))
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (2, 17, 3, 128)) * jnp.exp(2 * jax.random.normal(keys[1], (2, 17, 3, 128)))
    x, scale = x.astype(dtype), 1 + 0.1 * jax.random.normal(keys[2], (1, 17, 1, 128))
    weight = jax.random.normal(keys[3], x.shape)

    def run(form):
        def out(x, scale):
            return form(x, scale, table, 1e-6)

        return out(x, scale), jax.grad(lambda *given: jnp.sum(out(*given) * weight), argnums=(0, 1))(x, scale)

    (one, one_grad), (two, two_grad) = run(rope._in_one_pass), run(rope._in_two_passes)
    one, two = (np.asarray(y, np.float64).reshape(2, 17, 3, 64, 2) for y in (one, two))
    assert np.std(two) > 0.5  # a pair turns as a whole, so its larger channel is the measure
    assert np.max(np.abs(one - two) / np.max(np.abs(two), axis=-1, keepdims=True)) <= within
    if dtype == jnp.bfloat16:
        assert np.mean(one != two) < 0.01
    itself = run(rope._in_one_pass.__wrapped__)[1]  # its own gradient, of which the other form's takes the place
    for a, b, c in zip(one_grad, two_grad, itself, strict=True):
        np.testing.assert_array_equal(a, b)
        b, c = np.asarray(b, np.float64), np.asarray(c, np.float64)
        assert np.linalg.norm(b - c) <= (1e-5 if dtype == jnp.float32 else 1e-2) * np.linalg.norm(b)


@pytest.mark.parametrize("steps", [6, 10, 28])
@pytest.mark.parametrize("tokens", [16, 1024, 4096])
def test_sigmas(steps, tokens):
    ours = flux.sigmas(steps, tokens, SCHEDULE)
    scheduler = FlowMatchEulerDiscreteScheduler(**{k: v for k, v in SCHEDULER.items() if k[0] != "_"})
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=calculate_shift(tokens))
    assert (ours.dtype, ours.shape) == (np.float64, (steps + 1,))
    np.testing.assert_allclose(ours, scheduler.sigmas, rtol=1e-6, atol=0)
    # Exactly 1, so that lambda is infinite there: 1.0000000000000002 would be refused, and with 0.9999999999999999
    # the second step of dpm2 would extrapolate from a step that has no x0 before it.
    assert ours[0] == 1 and sampler.table(ours, "dpm2").x0[1, 1] == 0
    if (steps, tokens) in LITERAL:
        np.testing.assert_allclose(ours, LITERAL[steps, tokens], rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"shift": 3.0},
        {"use_dynamic_shifting": False, "shift": 3.0},
        {"use_dynamic_shifting": True, "max_shift": 0.9},
    ],
)
def test_sigmas_of_other_schedulers(values):
    """Missing fields have diffusers' own defaults, in which nothing depends on the size."""
    scheduler = FlowMatchEulerDiscreteScheduler(**values)
    found = scheduler.config
    names = "base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6), mu=calculate_shift(1024, *(found[n] for n in names)))
    np.testing.assert_allclose(flux.sigmas(6, 1024, flux.Schedule(**values)), scheduler.sigmas, rtol=1e-6, atol=0)


# --- the committed small world --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    found = FluxPipeline.from_pretrained(PIPELINE, torch_dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine torch's threads wait on each other for seconds
    yield found
    torch.set_num_threads(threads)


def model_config(path=PIPELINE, **changes):
    return config.Model(
        **{"path": str(path), "size": 32, "text_tokens": 24, "dtype": "float32", "remat": False} | changes
    )


def test_pictures(pipe):
    """The same prompts and noise give diffusers' pictures, through our files, tokenizers, encoders, sampler and VAE."""
    cfg = model_config()
    model, (base, decoder, encoders) = flux.make(cfg), flux.load(cfg)
    cond = jax.jit(model.encode)(encoders, model.tokenize(PROMPTS))
    with torch.no_grad():
        states, pooled, _ = pipe.encode_prompt(PROMPTS, None, max_sequence_length=24)
    assert error(cond["text"], states) < 1e-5
    assert error(cond["pooled"], pooled) < 1e-5

    x1 = jax.vmap(model.noise)(jax.random.split(jax.random.key(3), len(PROMPTS)))
    assert x1.shape == (3, 8, 8, 8)
    noise = FluxPipeline._pack_latents(torch.tensor(np.asarray(x1)).permute(0, 3, 1, 2), 3, 8, 8, 8)
    how = {"height": 32, "width": 32, "num_inference_steps": 10, "guidance_scale": 1.0, "max_sequence_length": 24}
    public = pipe(PROMPTS, latents=noise, output_type="np", **how).images

    @jax.jit
    def draw(base, decoder, cond, x1):
        velocity = lambda x, sigma: model.velocity({"params": base}, x, sigma, cond)  # noqa: E731
        return model.decode(decoder, sampler.sample(velocity, x1, sampler.table(model.sigmas(10), "euler")))

    found = np.asarray(draw(base, decoder, cond, x1))
    assert found.shape == public.shape == (3, 32, 32, 3)
    assert public.std() > 0.05  # drawings, not one colour
    assert np.abs(found - public).max() < 1e-4
    bits = [(x * 255).round().astype(int) for x in (found, public)]
    assert np.abs(bits[0] - bits[1]).max() <= 1


def test_small_world_is_made_and_loaded_in_its_dtype():
    cfg = model_config(dtype="bfloat16")
    model, (base, decoder, encoders) = flux.make(cfg), flux.load(cfg)
    assert flux.make(model_config(dtype="bfloat16")) is model  # the same static argument
    assert {x.dtype for x in jax.tree.leaves((base, encoders))} == {np.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(decoder)} == {np.dtype(np.float32)}
    spec = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, base) == jax.tree.map(jnp.shape, spec)
    ids = model.tokenize(["a red circle", "a red circle " * 30])
    assert {name: x.shape for name, x in ids.items()} == {"clip": (2, 24), "t5": (2, 24)}
    np.testing.assert_allclose(model.sigmas(10), flux.sigmas(10, 16, SCHEDULE), rtol=0)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(PIPELINE, tmp_path / "pipeline"))


def rewrite(file: Path, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        (
            "transformer",
            {"_class_name": "SD3Transformer2DModel"},
            "a SD3Transformer2DModel, not a FluxTransformer2DModel",
        ),
        ("transformer", {"patch_size": 2}, "patch_size is 2: only 1 is known here"),
        ("transformer", {"axes_dims_rope": [4, 14, 12]}, "axes_dims_rope .* attention_head_dim 32"),
        ("transformer", {"in_channels": 64}, "takes 64 channels, the VAE gives 4 x 8"),
        ("vae", {"latent_channels": 16}, "takes 32 channels, the VAE gives 4 x 16"),
        (
            "transformer",
            {"joint_attention_dim": 64},
            r"text of 64 \(joint_attention_dim\), T5 gives 128: the parts belong",
        ),
        (
            "transformer",
            {"pooled_projection_dim": 768},
            r"pooled text of 768 .*, CLIP gives 96: the parts belong to diff",
        ),
        ("transformer", {"out_channels": 16}, "out_channels 16 is not in_channels 32, nor null"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "holds a AutoencoderTiny, not a AutoencoderKL"),
        ("vae", {"act_fn": "relu"}, "act_fn is 'relu': only 'silu' is known here"),
        ("vae", {"use_quant_conv": True}, "use_quant_conv"),
        ("text_encoder", {"hidden_size": 192, "num_attention_heads": 6}, "takes pooled text of 96 .*, CLIP gives 192"),
        ("text_encoder_2", {"d_model": 512}, "takes text of 128 .*, T5 gives 512"),
        ("text_encoder_2", {"dense_act_fn": "relu"}, "dense_act_fn is 'relu': only 'gelu_new' is known here"),
        ("text_encoder_2", {"quantization_config": {"load_in_8bit": True}}, "quantization_config is .*not known here"),
        ("text_encoder_2", {"feed_forward_proj": "relu"}, "gated-gelu"),
    ],
)
def test_refused_folders(copy, part, values, words):
    rewrite(copy / part / "config.json", **values)
    with pytest.raises(weights.WeightsError, match=words) as e:
        flux.make(model_config(copy))
    assert str(copy) in str(e.value)


@pytest.mark.parametrize(
    "values",
    [
        *({"use_beta_sigmas": True}, {"time_shift_type": "linear"}, {"shift_terminal": 0.1}),
        {"_class_name": "FlowMatchHeunDiscreteScheduler"},
    ],
)
def test_schedules_that_are_not_ours_are_refused(copy, values):
    rewrite(copy / "scheduler" / "scheduler_config.json", **values)
    with pytest.raises(
        weights.WeightsError, match=rf"scheduler_config.json: {next(iter(values))} is .*: only .* known here$"
    ):
        flux.make(model_config(copy))


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("transformer/config.json", {"num_layers": "1"}, "num_layers is '1', not a whole number above 0"),
        ("transformer/config.json", {"num_layers": True}, "num_layers is True, not a whole number above 0"),
        ("transformer/config.json", {"axes_dims_rope": 16}, "axes_dims_rope is 16, not a list, each a whole number"),
        ("transformer/config.json", {"axes_dims_rope": [16, 16]}, r"axes_dims_rope \(16, 16\) are not three even"),
        ("transformer/config.json", {"axes_dims_rope": [4, 15, 13]}, "axes_dims_rope .* are not three even numbers"),
        ("transformer/config.json", {"num_attention_heads": 0}, "num_attention_heads is 0, not a whole number above"),
        ("transformer/config.json", {"guidance_embeds": 1}, "guidance_embeds is 1, not true or false"),
        ("vae/config.json", {"norm_num_groups": 0}, "norm_num_groups is 0, not a whole number above 0"),
        ("vae/config.json", {"block_out_channels": []}, r"block_out_channels is \[\], not a list, each a whole"),
        ("vae/config.json", {"scaling_factor": "1"}, "scaling_factor is '1', not a number"),
        ("text_encoder/config.json", {"num_attention_heads": 0}, "num_attention_heads is 0, not a whole number"),
        ("text_encoder/config.json", {"hidden_act": 3}, "hidden_act is 3, not a text"),
        ("text_encoder_2/config.json", {"num_heads": -4}, "num_heads is -4, not a whole number above 0"),
        ("scheduler/scheduler_config.json", {"shift": "3.0"}, "shift is '3.0', not a number"),
        ("scheduler/scheduler_config.json", {"shift": 0.0}, "shift 0.0 is not a number above 0"),
        (
            "scheduler/scheduler_config.json",
            {"max_image_seq_len": 256},
            "base_image_seq_len and max_.* are both 256",
        ),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": "no"}, "use_dynamic_shifting is 'no', not true"),
    ],
)
def test_damaged_values_are_named_with_their_file(copy, file, values, words):
    rewrite(copy / file, **values)
    with pytest.raises(weights.WeightsError, match=rf"{copy / file}: {words}"):
        flux.make(model_config(copy))


@pytest.mark.parametrize(("length", "said"), [(None, "missing"), (77, "77")])
def test_a_clip_tokenizer_of_another_length(copy, length, said):
    """Without one transformers cuts at 10**30 tokens."""
    file = copy / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "model_max_length"}))
    if length:
        rewrite(file, model_max_length=length)
    for read in (flux.load, lambda cfg: flux.make(cfg).tokenize(PROMPTS)):
        with pytest.raises(weights.WeightsError, match=rf"{file}: model_max_length is {said}: .* reads 24 tokens") as e:
            read(model_config(copy))
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("shape", [(4, 16, 8), (16, 16, 8), (8, 8, 4)])
def test_latents_of_another_shape_have_no_positions(shape):
    """4 x 16 latents are as many as 8 x 8, so that the table of positions would fit, and be wrong."""
    model = flux.make(model_config())
    base = jax.eval_shape(model.init, jax.random.key(0))
    cond = {
        "text": jax.ShapeDtypeStruct((1, 24, 128), jnp.float32),
        "pooled": jax.ShapeDtypeStruct((1, 96), jnp.float32),
    }
    given = jax.ShapeDtypeStruct((1, *shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32), cond
    with pytest.raises(ValueError, match=rf"latents of shape \(1, {shape[0]}, .*\): this model needs \[B, 8, 8, 8\]"):
        jax.eval_shape(model.velocity, {"params": base}, *given)


def test_a_folder_that_is_written_anew(copy):
    """Its configs make the model and its tokenizers' files the tokens, not what was there before."""
    cfg = model_config(copy)
    first = flux.make(cfg)
    assert flux.make(cfg) is first
    ids = first.tokenize(PROMPTS)
    rewrite(copy / "scheduler" / "scheduler_config.json", use_dynamic_shifting=False, shift=1.0)
    second = flux.make(cfg)
    assert second is not first and second != first
    np.testing.assert_allclose(second.sigmas(4), [1, 0.75, 0.5, 0.25, 0])
    assert np.abs(first.sigmas(4) - second.sigmas(4)).max() > 0.01
    rewrite(copy / "tokenizer" / "tokenizer_config.json", pad_token="!")
    again = second.tokenize(PROMPTS)
    assert set(again["clip"][:, -1]) == {0} and 0 not in ids["clip"]
    np.testing.assert_array_equal(again["t5"], ids["t5"])


def test_size_that_does_not_divide():
    with pytest.raises(config.ConfigError, match=r"model.size=36: use a multiple of 8 pixels"):
        flux.make(model_config(size=36))


def test_missing_folders(copy):
    with pytest.raises(weights.WeightsError, match=r"nowhere is not a directory"):
        flux.make(model_config("nowhere"))
    (copy / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(weights.WeightsError, match=r"scheduler_config.json is missing"):
        flux.make(model_config(copy))


def test_errors_name_the_keys(copy):
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    stored = load_file(file)
    stored["single_transformer_blocks.3.attn.to_qq.bias"] = stored.pop("single_transformer_blocks.3.attn.to_q.bias")
    stored["transformer_blocks.1.ff.net.2.weight"] = stored["transformer_blocks.1.ff.net.2.weight"][:, :639].copy()
    save_file(stored, file)
    with pytest.raises(weights.WeightsError) as e:
        flux.load(model_config(copy))
    lines = [line.strip() for line in str(e.value).splitlines()]
    assert "missing single_transformer_blocks.3.attn.to_q.bias" in lines
    assert "unused single_transformer_blocks.3.attn.to_qq.bias" in lines
    assert "transformer_blocks.1.ff.net.2.weight has shape (639, 160), not (640, 160)" in lines  # [in, out], as here
    assert len(lines) == 4 and str(copy / "transformer") in lines[0]


@pytest.mark.parametrize("layers", [1, 3])
def test_config_of_another_depth(copy, layers):
    rewrite(copy / "transformer" / "config.json", num_layers=layers)
    words = "unused transformer_blocks.1." if layers == 1 else "missing transformer_blocks.2."
    with pytest.raises(weights.WeightsError, match=words):
        flux.load(model_config(copy))


def test_truncated_file(copy):
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(
        weights.WeightsError, match=r"diffusion_pytorch_model.safetensors is not a complete safetensors file"
    ):
        flux.load(model_config(copy))


def test_index_names_a_missing_shard(copy):
    folder = copy / "transformer"
    FluxTransformer2DModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="6MB")
    shards = sorted(folder.glob("*-of-*.safetensors"))
    assert len(shards) > 1
    flux.load(model_config(copy))
    shards[1].unlink()
    with pytest.raises(weights.WeightsError, match=f"{shards[1].name} is in the index but does not exist"):
        flux.load(model_config(copy))
