"""DC-AE's decoder against diffusers, on small random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from oracle import error, randomise

from solrl_jax import device, weights
from solrl_jax.models import dcae, public, vae
from solrl_jax.models.convolutions import DepthwiseConv
from solrl_jax.models.layers import linear_attention
from tests import nano_sana
from tests.test_flux import rewrite


def make(**changes):
    return randomise(AutoencoderDC(**{**nano_sana.VAE, **changes}))


def saved(folder, **changes):
    make(**changes).save_pretrained(folder, max_shard_size="20KB")
    return folder


def both(folder, model, shape, dtype=jnp.float32):
    module, params = dcae.load(folder, dtype)
    z = np.random.default_rng(0).normal(size=(*shape, module.cfg.latent_channels)).astype(np.float32)
    ours = jax.jit(lambda params: module.apply({"params": params}, jnp.asarray(z)))(params)
    with torch.no_grad():
        theirs = model.decode(torch.tensor(z).permute(0, 3, 1, 2)).sample.permute(0, 2, 3, 1)
    return ours, theirs


def test_decode(tmp_path):
    """Latents need not be square; of more positions than a head has channels, diffusers' linear path."""
    ours, theirs = both(saved(tmp_path), make(), (2, 5, 6))
    assert ours.shape == (2, 20, 24, 3) and error(ours, theirs) < 1e-5
    few, quadratic = both(tmp_path, make(), (2, 2, 3))  # 6 positions of 8 channels: its quadratic one, the same value
    assert error(few, quadratic) < 1e-5


def test_decode_in_the_form_for_gpus(tmp_path, monkeypatch):
    """Up-sampling by a pixel shuffle: diffusers' pictures."""
    saved(tmp_path)
    monkeypatch.setattr(device, "platform", lambda: "gpu")
    ours, theirs = both(tmp_path, make(), (2, 5, 3))
    assert ours.shape == (2, 20, 12, 3) and error(ours, theirs) < 1e-5


def test_what_is_added_to_small_sums(tmp_path):
    """Where what norms see is so small that their epsilon, 1e-5, matters, diffusers' result still is ours."""
    model = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("conv2.weight", "to_out.weight", "conv_point.weight")):
                parameter.mul_(3e-3)
    model.save_pretrained(tmp_path)
    assert error(*both(tmp_path, model, (1, 4, 5))) < 1e-5


@pytest.mark.slow
def test_true_stages(tmp_path):
    """All six stages at an eighth of their widths, two scales at once in one of them."""
    values = {k: v for k, v in public.SANA_VAE.items() if k != "_class_name"}
    values |= {"downsample_block_type": "Conv", "latent_channels": 8, "attention_head_dim": 8}
    values["decoder_qkv_multiscales"] = ((), (), (), (5,), (5, 3), (5,))
    for half in ("encoder", "decoder"):
        values |= {f"{half}_block_out_channels": (16, 16, 32, 32, 64, 64), f"{half}_layers_per_block": (1,) * 6}
        values |= {f"{half}_block_types": values["decoder_block_types"]}
    values |= {"encoder_qkv_multiscales": ((),) * 6, "decoder_layers_per_block": (3,) * 6}
    ours, theirs = both(saved(tmp_path, **values), make(**values), (1, 4, 4))
    assert ours.shape == (1, 128, 128, 3) and error(ours, theirs) < 1e-5


@pytest.mark.parametrize("changes", [{"decoder_qkv_multiscales": ((), (), ())}, {"scaling_factor": 0.7}])
def test_images(tmp_path, changes):
    """z = latents / scaling_factor, pictures in [0, 1]."""
    module, params = dcae.load(saved(tmp_path, **changes), jnp.float32)
    latents = np.random.default_rng(0).normal(size=(3, 4, 4, 4)).astype(np.float32)
    found = jax.jit(lambda p, x: vae.decode(module, p, x))(params, latents)
    with torch.no_grad():
        z = torch.tensor(latents).permute(0, 3, 1, 2) / changes.get("scaling_factor", 0.41407)
        images = (make(**changes).decode(z).sample.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1).numpy()
    assert np.abs(found - images).max() < 1e-5 and images.std() > 0.05


def test_weights_in_bfloat16(tmp_path):
    ours, theirs = both(saved(tmp_path), make(), (1, 4, 4), jnp.bfloat16)
    assert ours.dtype == jnp.bfloat16 and 1e-4 < error(ours, theirs) < 0.1


def test_there_and_back(tmp_path):
    module, params = dcae.load(saved(tmp_path), jnp.float32)
    weights.save(params, dcae.keys(module.cfg), tmp_path / "out.safetensors")
    files = {p: weights.Files(p, "diffusion_pytorch_model") for p in (tmp_path, tmp_path / "out.safetensors")}
    there, out = files.values()
    wanted = {key for key in there.keys() if key.startswith("decoder.")}  # noqa: SIM118
    assert set(out.keys()) == wanted
    assert all(np.array_equal(there[key], out[key]) for key in wanted)


def test_pixel_shuffle():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(np.float32)
    theirs = torch.nn.functional.pixel_shuffle(torch.tensor(x).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(dcae.pixel_shuffle(jnp.asarray(x)), theirs)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("size", [3, 5])
def test_depthwise(size, platform, monkeypatch):
    """Both ways of writing it, and what its input's gradient is."""
    monkeypatch.setattr(device, "platform", lambda: platform)
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=s).astype(np.float32) for s in ((2, 4, 6, 5), (size, size, 1, 5)))
    bias, back = rng.normal(size=5).astype(np.float32), rng.normal(size=x.shape).astype(np.float32)
    layer, params = DepthwiseConv(size, dtype=jnp.float32), {"kernel": kernel, "bias": bias}
    found, pull = jax.vjp(lambda x: layer.apply({"params": params}, x), jnp.asarray(x))
    given = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    theirs = torch.nn.functional.conv2d(
        given, torch.tensor(kernel).permute(3, 2, 0, 1), torch.tensor(bias), padding=size // 2, groups=5
    )
    theirs.backward(torch.tensor(back).permute(0, 3, 1, 2))
    assert error(found, theirs.permute(0, 2, 3, 1)) < 1e-6
    assert error(pull(jnp.asarray(back))[0], given.grad.permute(0, 2, 3, 1)) < 1e-6


def test_linear_attention():
    """Its quadratic form, and 0 where no query or no key is above 0."""
    q, k, v = (jnp.asarray(np.random.default_rng(i).normal(size=(2, 7, 3, 4)), jnp.float32) for i in range(3))
    q = q.at[:, 0].set(-1.0)
    scores = jnp.einsum("bnhd,bmhd->bhnm", jnp.maximum(q, 0), jnp.maximum(k, 0))
    weighted = jnp.einsum("bhnm,bmhd->bnhd", scores / (scores.sum(-1, keepdims=True) + 1e-15), v)
    found = linear_attention(q, k, v)
    np.testing.assert_allclose(found, weighted, atol=1e-5)
    assert not np.any(found[:, 0])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"_class_name": "AutoencoderKL"}, "holds a AutoencoderKL, not a AutoencoderDC"),
        ({"upsample_block_type": "pixel_shuffle"}, "{'upsample_block_type': 'pixel_shuffle'} is not known here"),
        ({"decoder_block_types": ["ResBlock", "Mamba", "ResBlock"]}, r"decoder_block_types \['Mamba'\] are not known"),
        (
            {"decoder_layers_per_block": [1, 1]},
            "decoder_block_out_channels has 3 stages, but {'decoder_layers_per_block': 2}",
        ),
        ({"decoder_qkv_multiscales": [[], [], [4]]}, r"decoder_qkv_multiscales \[4\] are not odd"),
        ({"decoder_qkv_multiscales": [[], 5, []]}, r"decoder_qkv_multiscales is .*, not a list, each a list"),
        ({"attention_head_dim": 3}, "do not divide into attention_head_dim 3"),
        ({"latent_channels": 3}, "do not divide as the shortcuts need"),
    ],
)
def test_refused_configs(tmp_path, values, words):
    (tmp_path / "config.json").write_text(json.dumps(dict(make().config)))
    rewrite(tmp_path / "config.json", **{"_class_name": "AutoencoderDC", **values})
    with pytest.raises(weights.WeightsError, match=words):
        dcae.DcaeConfig.read(tmp_path)


def test_a_file_that_lacks_a_tensor(tmp_path):
    saved(tmp_path)
    rewrite(tmp_path / "config.json", decoder_layers_per_block=[1, 2, 2])
    with pytest.raises(weights.WeightsError, match=r"missing decoder.up_blocks.2.1.attn.to_q.weight"):
        dcae.load(tmp_path)
