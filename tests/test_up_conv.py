"""Up-sampling and the convolution after it, in two steps and as one convolution with a pixel shuffle."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.decode import run
from solrl_jax import device
from solrl_jax.models import convolutions as conv

SIZES = [(1, 1, 1, 3, 2), (2, 5, 7, 4, 6), (3, 8, 4, 16, 8), (1, 3, 2, 64, 128)]  # batch, height, width, in, out


def drawn(batch: int, height: int, width: int, inside: int, outside: int):
    """(x, nn.Conv's parameters)"""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, height, width, inside)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, inside, outside)) * (9 * inside) ** -0.5
    return jnp.asarray(x), {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(rng.normal(size=outside))}


def applied(x, params, dtype=jnp.float32):
    """Compiled anew, as the tests say otherwise on which device that is."""
    return jax.jit(conv.UpConv(params["bias"].size, dtype).apply)({"params": params}, x)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_is_the_two_steps(sizes, platform, monkeypatch):
    """To 1e-6 of the largest output, and with nn.Conv's parameters and their first values."""
    x, params = drawn(*sizes)
    twice, plain = (
        jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2),
        conv.conv(sizes[-1], (3, 3), dtype=jnp.float32),
    )
    wanted = jax.jit(plain.apply)({"params": params}, twice)
    monkeypatch.setattr(device, "platform", lambda: platform)
    found = applied(x, params)
    assert found.shape == (sizes[0], 2 * sizes[1], 2 * sizes[2], sizes[-1]) == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    assert platform == "gpu" or np.array_equal(found, wanted)
    layers = (conv.UpConv(sizes[-1], jnp.float32), x), (plain, twice)
    both = (jax.jit(layer.init)(jax.random.key(1), y) for layer, y in layers)
    jax.tree.map(np.testing.assert_array_equal, *both)


@pytest.mark.parametrize("form", run.FORMS)
def test_forms_of_the_experiment(form):
    x, params = drawn(2, 5, 7, 4, 6)
    wanted = applied(x, params)
    with run.FORMS[form].used():
        found = applied(x, params)
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    assert applied(x, params).shape == found.shape and conv._phases is run.FORMS["package"].up


def test_taps():
    """Of a kernel with one weight w at row r: the pixels' weights on the rows (i, i + 1), by hand."""
    for r, wanted in enumerate([[[1, 1], [0, 0]], [[1, 0], [0, 1]], [[0, 0], [1, 1]]]):  # [tap][pixel: second, first]
        kernel = np.zeros((3, 3, 1, 1), np.float32)
        kernel[r, 2] = 5.0
        found = np.asarray(conv.phase_kernel(jnp.asarray(kernel))).reshape(2, 2, 2, 2)  # taps, pixels
        np.testing.assert_array_equal(found[:, 1], 5.0 * np.repeat(np.asarray(wanted)[..., None], 2, axis=-1))
        assert not found[:, 0].any()


def test_bfloat16_rounds_summed_kernels(monkeypatch):
    """Beside the exact result for bf16 operands: at most 2^-9 of each weight, and of the result twice (the product,
    with the bias). In the root mean square it is the two steps' error to within a half."""
    x, params = drawn(2, 9, 6, 64, 32)
    x, params = (jax.tree.map(lambda z: z.astype(jnp.bfloat16), tree) for tree in (x, params))
    wide, exact = jax.tree.map(lambda z: z.astype(jnp.float32), (x, params)), {}
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(device, "platform", lambda platform=platform: platform)
        exact[platform] = applied(*wide), applied(x, params, jnp.bfloat16)
    wanted, found = exact["gpu"][0], exact["gpu"][1].astype(jnp.float32)
    monkeypatch.setattr(conv, "phase_kernel", lambda kernel, make=conv.phase_kernel: jnp.abs(make(kernel)))
    size = conv._phases(jnp.abs(wide[0]), wide[1]["kernel"], jnp.zeros(32))
    bias = jnp.abs(wide[1]["bias"]).reshape(1, 1, 1, -1)
    assert np.all(jnp.abs(found - wanted) <= 1.02 * 2.0**-9 * (size + 2 * jnp.abs(wanted) + bias) + 1e-6)
    errors = {p: float(jnp.std(bf16.astype(jnp.float32) - f32) / jnp.std(f32)) for p, (f32, bf16) in exact.items()}
    assert 5e-4 < errors["cpu"] < errors["gpu"] < 1.5 * errors["cpu"] < 6e-3, errors


@pytest.mark.slow
def test_gradient(monkeypatch):
    x, params = drawn(2, 3, 4, 5, 6)
    back = jax.random.normal(jax.random.key(0), (2, 6, 8, 6))
    found = {}
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(device, "platform", lambda platform=platform: platform)
        found[platform] = jax.grad(lambda *a: jnp.sum(applied(*a) * back), argnums=(0, 1))(x, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found.values())


def test_in_a_module_it_is_named_like_a_convolution():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return conv.UpConv(4, jnp.float32, name="up")(conv.conv(3, (1, 1), dtype=jnp.float32, name="in")(x))

    shapes = jax.tree.map(jnp.shape, Two().init(jax.random.key(0), jnp.zeros((1, 2, 2, 5)))["params"])
    assert shapes["up"] == {"kernel": (3, 3, 3, 4), "bias": (4,)}
