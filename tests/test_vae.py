"""The VAE's halves against diffusers on small random weights, through files and back."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from oracle import error, randomise
from safetensors.numpy import load_file, save_file

from solrl_jax import device, weights
from solrl_jax.models import vae

THREE = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
FOUR = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 2, "layers_per_block": 1, "latent_channels": 16}
PLAIN = {"block_out_channels": (8, 8), "norm_num_groups": 8, "layers_per_block": 2, "shift_factor": None}
PLAIN |= {"mid_block_add_attention": False}

decode, encode = jax.jit(vae.decode, static_argnums=0), jax.jit(vae.encode, static_argnums=0)


def make_vae(folder, **config):
    blocks = len(config["block_out_channels"])
    config = {"scaling_factor": 0.3611, "shift_factor": 0.1159} | config
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **config,
    )
    randomise(model).save_pretrained(folder, max_shard_size="20KB")
    return model


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize("config", [THREE, FOUR, PLAIN], ids=["three", "four", "plain"])
def test_decode(tmp_path, config):
    model = make_vae(tmp_path, **config)
    latents = np.random.default_rng(0).normal(size=(2, 4, 6, model.config.latent_channels)).astype(np.float32)
    with torch.no_grad():
        z = torch.tensor(latents).permute(0, 3, 1, 2) / model.config.scaling_factor + (model.config.shift_factor or 0)
        theirs = channels_last(model.decode(z).sample)
    module, params = vae.load_vae(tmp_path, jnp.float32)
    factor = module.cfg.factor
    assert factor == 2 ** (len(config["block_out_channels"]) - 1)
    images = decode(module, params, jnp.asarray(latents))
    assert (images.shape, images.dtype) == ((2, 4 * factor, 6 * factor, 3), jnp.float32)
    assert theirs.abs().gt(1).any() and theirs.abs().lt(1).float().mean() > 0.5  # clipped, but not mostly
    assert error(images, (theirs / 2 + 0.5).clamp(0, 1)) < 1e-5


@pytest.mark.slow
def test_decode_in_the_form_for_gpus(tmp_path, monkeypatch):
    """Up-sampling by a pixel shuffle, norms in one pass: the same parameters, diffusers' pictures."""
    model = make_vae(tmp_path, **FOUR)
    latents = np.random.default_rng(0).normal(size=(2, 3, 5, 16)).astype(np.float32)
    with torch.no_grad():
        theirs = channels_last(model.decode(torch.tensor(latents).permute(0, 3, 1, 2) / 0.3611 + 0.1159).sample)
    latents = jnp.asarray(latents)
    module, params = vae.load_vae(tmp_path, jnp.float32)
    paths = jax.eval_shape(module.init, jax.random.key(0), latents)
    monkeypatch.setattr(device, "platform", lambda: "gpu")
    images = jax.jit(lambda p, x: vae.decode(module, p, x))(params, latents)
    assert error(images, (theirs / 2 + 0.5).clamp(0, 1)) < 1e-5
    assert jax.eval_shape(module.init, jax.random.key(0), latents) == paths


@functools.partial(jax.jit, static_argnums=0)
def normed(norm, params, x):
    return norm.apply({"params": params}, x)


slope = jax.jit(jax.grad(lambda norm, *given: jnp.sum(normed(norm, *given) ** 3), argnums=2), static_argnums=0)


@pytest.mark.parametrize("mean", [0.0, 3.0, 1000.0])
@pytest.mark.parametrize("outlier", [0.0, 30.0])
def test_group_norm(mean, outlier):
    """In one pass over x: as exact as flax's two passes, be the mean large, or one of the rows that the guess of
    the mean is made from 30 standard deviations away."""
    rng = np.random.default_rng(0)
    x = (mean + rng.normal(size=(2, 16, 9, 12))).astype(np.float32)
    x[:, 6] += outlier
    params = {"scale": rng.normal(size=12).astype(np.float32), "bias": rng.normal(size=12).astype(np.float32)}
    y = x.astype(np.float64).reshape(2, 16, 9, 3, 4)
    y = y - y.mean((1, 2, 4), keepdims=True)
    y = (y / np.sqrt((y**2).mean((1, 2, 4), keepdims=True) + 1e-6)).reshape(x.shape) * params["scale"] + params["bias"]
    two = nn.GroupNorm(3, epsilon=1e-6, use_fast_variance=False)
    x = jnp.asarray(x)
    errors = [np.abs(normed(norm, params, x) - y).max() for norm in (vae.GroupNorm(3), two)]
    assert errors[0] < 1.5 * errors[1] + 1e-6, errors
    slopes = [slope(norm, params, x) for norm in (vae.GroupNorm(3), two)]
    np.testing.assert_allclose(*slopes, atol=1e-3 * np.abs(slopes[1]).max())
    fast = normed(nn.GroupNorm(3, epsilon=1e-6, use_fast_variance=True), params, x)  # for comparison
    assert mean < 1000 or np.abs(fast - y).max() > 10 * errors[0]


@pytest.mark.slow
@pytest.mark.parametrize(("pixels", "together"), [(10**6, 6), (4 * 16 * 24, 3), (16 * 24, 1), (1, 1)])
def test_decode_takes_so_many_pixels_at_a_time(tmp_path, monkeypatch, pixels, together):
    make_vae(tmp_path, **THREE)
    module, params = vae.load_vae(tmp_path, jnp.float32)
    latents = jax.random.normal(jax.random.key(0), (6, 4, 6, module.cfg.latent_channels))
    whole, seen = decode(module, params, latents), []
    monkeypatch.setattr(vae, "TOGETHER", pixels)
    monkeypatch.setattr(vae.Decoder, "__call__", noting(vae.Decoder.__call__, seen))
    found = vae.decode(module, params, latents)
    assert set(seen) == {together}
    np.testing.assert_allclose(found, whole, atol=1e-5)


def noting(call, seen: list):
    """The same call; the batch of each is noted."""

    def noted(self, z):
        seen.append(z.shape[0])
        return call(self, z)

    return noted


@pytest.mark.parametrize("config", [THREE, FOUR], ids=["three", "four"])
def test_encode(tmp_path, config):
    model = make_vae(tmp_path, **config)
    images = np.random.default_rng(0).uniform(size=(2, 16, 24, 3)).astype(np.float32)
    with torch.no_grad():
        found = model.encode(torch.tensor(images).permute(0, 3, 1, 2) * 2 - 1).latent_dist
    scale, shift = model.config.scaling_factor, model.config.shift_factor or 0
    module, params = vae.load_vae(tmp_path, jnp.float32, encoder=True)
    mean, logvar = encode(module, params, jnp.asarray(images))
    assert mean.dtype == logvar.dtype == jnp.float32
    assert error(mean, channels_last((found.mean - shift) * scale)) < 1e-5
    assert error(jnp.exp(logvar / 2), channels_last(found.std * scale)) < 1e-5


def test_public_sizes():
    """Parameter counts of FLUX's and SD3.5's decoder and encoder, from shapes alone."""
    widths = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
    cfg = vae.VaeConfig(**widths, use_quant_conv=False, use_post_quant_conv=False)
    for half, channels, count in ((vae.Decoder, 16, 49_545_475), (vae.Encoder, 3, 34_274_208)):
        shapes = jax.eval_shape(half(cfg).init, jax.random.key(0), jnp.zeros((1, 8, 8, channels)))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_saved_tree_is_the_public_file(tmp_path):
    """What we write is what diffusers wrote: same keys, layouts and values; one table for both halves."""
    make_vae(tmp_path, **THREE)
    halves = {"encoder": vae.load_vae(tmp_path, jnp.float32, encoder=True)[1]}
    halves["decoder"] = vae.load_vae(tmp_path, jnp.float32)[1]
    weights.save(halves, vae.VAE_KEYS, tmp_path / "out.safetensors")
    saved = load_file(tmp_path / "out.safetensors")
    public = weights.Files(tmp_path, "diffusion_pytorch_model")
    assert saved.keys() == set(public.keys())
    assert all(np.array_equal(saved[key], public[key]) for key in saved)


def test_old_attention_names(tmp_path):
    make_vae(tmp_path, **THREE)
    _, params = vae.load_vae(tmp_path, jnp.float32)
    files = weights.Files(tmp_path, "diffusion_pytorch_model")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key in files.keys():  # noqa: SIM118
        name = key
        for new, was in old.items():
            name = name.replace(f".{new}.", f".{was}.")
        renamed[name] = files[key]
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in renamed
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    save_file(renamed, tmp_path / "diffusion_pytorch_model.safetensors")
    _, again = vae.load_vae(tmp_path, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.slow
def test_bfloat16_stays_near(tmp_path):
    make_vae(tmp_path, **PLAIN)
    latents = jax.random.normal(jax.random.key(0), (1, 4, 4, 4))
    images = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        module, params = vae.load_vae(tmp_path, dtype)
        images[dtype] = decode(module, params, latents)
        assert images[dtype].dtype == jnp.float32
    assert 0 < jnp.mean(jnp.abs(images[jnp.float32] - images[jnp.bfloat16])) < 0.02


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"use_quant_conv": True}, "use_quant_conv"),
        ({"use_post_quant_conv": True}, "use_post_quant_conv"),
        ({"norm_num_groups": 3}, "norm_num_groups 3"),
        ({"act_fn": "gelu"}, "config.json: act_fn is 'gelu': only 'silu' is known here"),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "up_block_types is .*: only 'UpDecoder"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types has 1 blocks, block_out_channels 2"),
        ({"latents_mean": [0.1] * 4}, "latents_mean is .*: only null is known here"),
        ({"a_new_option": 3}, "a_new_option is 3, an option that is not known here"),
    ],
)
def test_refused_configs(tmp_path, values, words):
    make_vae(tmp_path, **PLAIN)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(weights.WeightsError, match=words):
        vae.load_vae(tmp_path)
    file.write_text(json.dumps({"block_out_channels": [8, 8], "norm_num_groups": 8}))  # diffusers' default is true
    with pytest.raises(weights.WeightsError, match="use_quant_conv"):
        vae.load_vae(tmp_path)


def test_errors_name_the_keys(tmp_path):
    make_vae(tmp_path, **PLAIN)
    files = weights.Files(tmp_path, "diffusion_pytorch_model")
    stored = {key: files[key] for key in files.keys()}  # noqa: SIM118
    stored["decoder.conv_inn.weight"] = stored.pop("decoder.conv_in.weight")
    stored["decoder.conv_out.weight"] = stored["decoder.conv_out.weight"][:, :4]
    stored["encoder.whatever"] = np.zeros(1, np.float32)  # the other half is not looked at
    for shard in tmp_path.glob("*.safetensors*"):
        shard.unlink()
    save_file({k: np.ascontiguousarray(v) for k, v in stored.items()}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(weights.WeightsError) as e:
        vae.load_vae(tmp_path)
    assert "missing decoder.conv_in.weight" in str(e.value)
    assert "unused decoder.conv_inn.weight" in str(e.value)
    assert "decoder.conv_out.weight has shape (3, 3, 4, 3), not (3, 3, 8, 3)" in str(e.value)
    assert "whatever" not in str(e.value)
