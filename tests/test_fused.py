"""A TPU's fused attention, interpreted on the CPU, against attention with its scores in memory."""

import jax
import jax.numpy as jnp
import numpy as np

from solrl_jax import device
from solrl_jax.models import fused, layers


def heads(tokens: int, dtype=jnp.float32, width: int = 8, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed + tokens).normal(size=(2, tokens, 1, width)), dtype)


def test_values_and_gradients_on_a_tpu():
    """Unequal and odd lengths, masked keys, several blocks of them: padding changes neither, and gives no gradient."""
    given, lengths = (heads(130), heads(520), heads(520, seed=1)), jnp.array([1, 300])

    def of(f):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(f(*x) ** 2), argnums=(0, 1, 2)))(*given)

    found = of(lambda *x: fused.by_pallas(*x, 0.3, lengths, interpret=True))
    plain = of(lambda *x: layers.attention(*x, scale=0.3, lengths=lengths))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, plain)


def test_values_on_a_tpu_in_bf16():
    """All keys of an odd length. The scale rounds q once more for d = 128: the error against float32 stays below 1.5
    times that of bf16 with scores in memory."""
    q, k, v = (heads(130, jnp.bfloat16, 128, seed) for seed in range(3))
    exact = layers.attention(*(x.astype(jnp.float32) for x in (q, k, v)))

    def error(y):
        return float(jnp.linalg.norm(y.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))

    found = jax.jit(lambda *x: fused.by_pallas(*x, 128**-0.5, interpret=True))(q, k, v)
    assert error(found) < 1.5 * error(layers.attention(q, k, v)) < 0.01


def test_which_kernel(monkeypatch):
    """By the device, the dtype and the width; none for few tokens, and none on a CPU."""

    def kernel(platform: str, tokens: int = 256, dtype=jnp.bfloat16, width: int = 128):
        monkeypatch.setattr(device, "platform", lambda: platform)
        return fused.kernel_for(heads(tokens, dtype, width))

    assert kernel("gpu") is fused.by_cudnn and kernel("tpu") is fused.by_pallas and kernel("cpu") is None
    assert kernel("gpu", width=512) is None and kernel("tpu", width=512) is fused.by_pallas  # the VAE's
    assert kernel("gpu", dtype=jnp.float16) is fused.by_cudnn and kernel("tpu", dtype=jnp.float16) is None
    assert kernel("gpu", tokens=64) is fused.by_cudnn
    for platform, tokens in fused.LONG.items():
        assert kernel(platform, tokens=tokens - 1) is None and kernel(platform, dtype=jnp.float32) is None
        assert kernel(platform, width=68) is None
