"""What FLUX.2-klein and Z-Image share: one text encoder, guidance in the loss, LoRAs that reach what is prepared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import guidance, lora
from solrl_jax.config import Lora
from solrl_jax.models import flux2, zimage
from tests import nano, nano_flux2, nano_zimage

MODELS = {"flux2": (flux2, nano_flux2, 4.0), "zimage": (zimage, nano_zimage, 5.0)}


@pytest.fixture(scope="module", params=MODELS)
def built(request, tmp_path_factory):
    """(model, random base, conditioning of 2 prompts, of the negative one, latents, its guidance)."""
    module, small, w = MODELS[request.param]
    model = module.make(small.model(small.write(tmp_path_factory.mktemp("nano") / request.param)))
    base = nano.random(jax.eval_shape(model.init, jax.random.key(0)), 1)
    rng = np.random.default_rng(0)
    sizes = {"flux2": ((512, 96), (4, 4, 16)), "zimage": ((64, 32), (8, 8, 4))}[request.param]
    text, x = (rng.normal(size=(n, *shape)).astype(np.float32) for n, shape in zip((3, 2), sizes, strict=True))
    cond = {"text": text} | ({"length": np.int32([40, 33, 19])} if request.param == "zimage" else {})
    asked, away = (
        jax.tree.map(lambda leaf, part=part: jnp.asarray(leaf[part]), cond) for part in (slice(2), slice(2, 3))
    )
    return model, base, asked, away, jnp.asarray(x), w


def test_one_text_encoder():
    """Both call it by the same name, under which its parameters and tokens are found."""
    assert [encoder.name for module in (flux2, zimage) for encoder in module.ENCODERS] == ["qwen3", "qwen3"]


@pytest.mark.slow
def test_the_guided_policy_of_the_loss(built):
    """Value and gradient of one call of doubled rows are those of a call for each prompt, whose captions differ in
    length; the second sample's is longer than the negative one's by a block."""
    model, base, asked, away, x, w = built
    how = Lora(4)
    adapter = nano.random(
        jax.eval_shape(lambda b: lora.init(jax.random.key(0), b, model.lora_targets, how), base), 2, 0.1
    )
    sigma = jnp.array([0.9, 0.4])

    def doubled(adapter):
        rows = guidance.conditioned(model, asked, away, w)
        v = guidance.velocity(model, w)(lora.policy(base, adapter, how), x, sigma, rows)
        return jnp.mean(v**2), v

    def single(adapter):
        variables, each = lora.policy(base, adapter, how), []
        for i in range(2):
            at = slice(i, i + 1)
            toward, minus = (
                model.velocity(variables, x[at], sigma[at], c)
                for c in (jax.tree.map(lambda leaf, at=at: leaf[at], asked), away)
            )
            each.append(minus + w * (toward - minus))
        v = jnp.concatenate(each)
        return jnp.mean(v**2), v

    (_, v), grad = jax.jit(jax.value_and_grad(doubled, has_aux=True))(adapter)
    (_, want), wanted = jax.jit(jax.value_and_grad(single, has_aux=True))(adapter)
    np.testing.assert_allclose(v, want, atol=2e-5 * np.abs(want).max())
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())
        assert np.any(b)
