"""FP8 products, their units, and which precision a device gets."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import config, quant
from solrl_jax.models import flux
from solrl_jax.quant import fp8, nvfp4
from solrl_jax.quant.calibrate import calibrated
from solrl_jax.run import assemble
from tests import nano

F32 = jnp.float32
STAGES = [config.Stage(2, "euler", "fp8")]


@jax.jit
def product(x, q):
    return q.matmul((x,), F32)


@jax.jit
def by_column(x, w, unit):
    """The product with a scale for each column of the kernel."""
    scale = jnp.max(jnp.abs(w), axis=0, keepdims=True) / fp8.MAX
    return fp8.encode(x, unit).astype(F32) @ fp8.encode(w / scale, 1.0).astype(F32) * (unit * scale)


def drawn(kind: str):
    key_x, key_w = jax.random.split(jax.random.key(0))
    x, w = jax.random.normal(key_x, (256, 3072)), 0.02 * jax.random.normal(key_w, (3072, 256))
    x = {"gauss": x, "gelu": jax.nn.gelu(x), "outliers": x.at[:, ::384].multiply(30.0)}[kind]
    return x, w


def apart(y, x, w) -> float:
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    return float(np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(("kind", "bound"), [("gauss", 0.0375), ("gelu", 0.0369), ("outliers", 0.0376)])
def test_error_of_a_product(kind, bound):
    """As one scale a tensor has; a scale a column of the kernel would be no better."""
    x, w = drawn(kind)
    unit = fp8.unit_of(float(np.max(np.abs(x))))
    found = apart(product(x, fp8.quantise(w, unit)), x, w)
    assert abs(found - bound) < 0.002
    assert abs(apart(by_column(x, w, unit), x, w) / found - 1) < 0.02


def test_units():
    """The least power of two in which twice the largest input fits."""
    values = [fp8.unit_of(largest) for largest in (224.0, 224.1, 1.0, 100.0, 1e4, 0.0, float("inf"))]
    assert values == [1.0, 2.0, 2**-7, 0.5, 64.0, 1.0, 1.0]
    x, w = drawn("gauss")
    coarse, fine = (product(x, fp8.quantise(w, unit)) for unit in (2**-4, 2**-5))
    assert apart(coarse, x, w) < 0.04
    np.testing.assert_allclose(coarse, fine, rtol=0, atol=2e-3)  # but for inputs below 2^-6 units the same numbers


def test_what_is_too_large_saturates():
    q = fp8.quantise(jnp.eye(16), 0.5)
    np.testing.assert_allclose(product(jnp.full((1, 16), 1e6), q), np.full((1, 16), 224.0), rtol=1e-6)
    assert not np.any(product(jnp.ones((2, 16)), fp8.quantise(jnp.zeros((16, 8)))))


def test_a_row_does_not_depend_on_its_batch():
    x, q = jax.random.normal(jax.random.key(1), (8, 64)), fp8.quantise(jax.random.normal(jax.random.key(2), (64, 32)))
    whole = product(x, q)
    for i in range(8):
        rest = np.where(np.arange(8) < i, 9.0, -700.0)[:, None]
        other = np.where(np.arange(8)[:, None] == i, x, rest).astype(np.float32)
        np.testing.assert_array_equal(product(other, q)[i], whole[i])


@pytest.mark.slow
def test_stacks_and_parts():
    """A stacked kernel is its layers' kernels; inputs in parts are the inputs put together, in every precision."""
    w = jax.random.normal(jax.random.key(0), (3, 64, 32))
    stacked = fp8.quantise(w, 0.5)
    for i in range(3):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[i], stacked), fp8.quantise(w[i], 0.5))  # noqa: B023
    x = jax.random.normal(jax.random.key(1), (5, 64))
    for q in (fp8.quantise(w[0]), nvfp4.quantise(w[0]), nvfp4.quantise(w[0], native=True)):
        np.testing.assert_allclose(q.matmul((x[:, :48], x[:, 48:]), F32), product(x, q), rtol=1e-5, atol=1e-5)


def test_parts_of_a_kernel():
    """Codes that lie in the parts in which inputs come are the whole kernel's codes, and give the same product."""
    w, x = jax.random.normal(jax.random.key(0), (3, 64, 32)), jax.random.normal(jax.random.key(1), (5, 64))
    whole, split = fp8.quantise(w, 0.5), fp8.quantise(w, 0.5, (48, 16))
    assert [c.shape for c in split.codes] == [(3, 32, 48), (3, 32, 16)]
    np.testing.assert_array_equal(split.whole(), whole.whole())
    np.testing.assert_array_equal(split.dequantise(), whole.dequantise())
    one, two = (jax.tree.map(lambda a: a[1], q) for q in (whole, split))
    given = (x[:, :48], x[:, 48:])
    np.testing.assert_array_equal(two.matmul(given, F32), one.matmul(given, F32))
    np.testing.assert_allclose(two.matmul((x,), F32), one.matmul((x,), F32), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"parts \(48, 17\) of a kernel with 64 inputs"):
        fp8.quantise(w[0], 0.5, (48, 17))


@pytest.mark.parametrize("x", [0.0, 1e-30, 0.37, 0.5, 0.50001, 1.0, 3.0, 447.0, 2.0**-126])
def test_scales_are_powers_of_two(x):
    """The least that is not below x; exact in bf16, in which products apply it."""
    found = float(fp8.power_of_two(jnp.float32(x)))
    assert found == (2.0 ** np.ceil(np.log2(np.float64(np.float32(x)))) if x else 1.0)
    q = fp8.quantise(jnp.full((16, 8), x, F32))
    assert float(q.scale) == float(q.scale.astype(jnp.bfloat16)) and (x < 1e-36 or float(jnp.max(q.codes[0])) > 224)
    np.testing.assert_allclose(q.dequantise(), np.full((16, 8), x), rtol=2**-4 if x > 1e-36 else 1)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_kernel_that_is_not_finite_stays_so(bad):
    """It must be seen in the samples: codes saturate, so the scale has to tell."""
    q = fp8.quantise(jnp.ones((16, 8)).at[3, 2].set(bad))
    assert not np.isfinite(q.scale) and not np.any(np.isfinite(product(jnp.ones((2, 16)), q)))


@pytest.mark.slow
def test_native_nvfp4_has_the_numbers_of_the_emulated():
    """The same operands, summed in another order; a row by itself."""
    x, w = jax.random.normal(jax.random.key(0), (16, 256)), jax.random.normal(jax.random.key(1), (256, 64))
    emulated, native = nvfp4.quantise(w), nvfp4.quantise(w, native=True)
    np.testing.assert_array_equal(emulated.codes, native.codes)
    np.testing.assert_allclose(product(x, native), product(x, emulated), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(product(x.at[1:].multiply(50.0), native)[0], product(x, native)[0])


@pytest.mark.parametrize(
    ("asked", "capability", "given"),
    [
        *(
            ("auto", None, "nvfp4_emulated"),
            ("auto", 0.0, "bf16"),
            ("auto", 8.0, "bf16"),
            ("auto", 8.9, "fp8"),
            ("auto", 9.0, "fp8"),
        ),
        *(("auto", 10.0, "nvfp4_native"), ("bf16", None, "bf16"), ("fp8", 9.0, "fp8"), ("fp8", 10.0, "fp8")),
        *(("nvfp4_emulated", 10.0, "nvfp4_emulated"), ("nvfp4_native", 12.0, "nvfp4_native")),
    ],
)
def test_the_precision_of_a_device(asked, capability, given):
    assert quant.resolve(asked, capability) == given


def test_what_auto_comes_to_is_told():
    asked = config.override(config.Config(), **{"explore.precision": "auto"})
    for capability, precision in ((8.0, "bf16"), (9.0, "fp8")):
        said = assemble.told_of_auto(asked, assemble.resolved(asked, capability))
        assert said == [f"explore.precision=auto comes to {precision} on this device"]
    plain = config.override(asked, **{"explore.precision": "bf16"})
    assert assemble.told_of_auto(plain, assemble.resolved(plain, 9.0)) == []


@pytest.mark.parametrize(("asked", "capability"), [("fp8", None), ("fp8", 0.0), ("fp8", 8.0), ("nvfp4_native", 9.0)])
def test_what_a_device_cannot_do_is_an_error(asked, capability):
    cfg = config.Config(explore=config.Stage(6, precision=asked))
    with pytest.raises(config.ConfigError, match=rf"explore.precision {asked} needs a GPU of compute capability"):
        assemble.resolved(cfg, capability)
    assert assemble.resolved(config.Config(), 9.0).explore.precision == "fp8"


@pytest.mark.parametrize(("platform", "expected"), [("cpu", None), ("tpu", 0.0), ("gpu", 8.9)])
def test_the_capability_of_a_device(monkeypatch, platform, expected):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform=platform, compute_capability="8.9")])
    assert assemble.capability() == expected


def test_two_low_precisions_are_refused():
    with pytest.raises(config.ConfigError, match=r"run in fp8 and in nvfp4_emulated: .* name one low precision"):
        config.Config(explore=config.Stage(6, precision="fp8"), regenerate=config.Stage(10, precision="nvfp4_emulated"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A nano FLUX with its base, and conditioning of two prompts."""
    parts = assemble.assemble(nano.build(tmp_path_factory.mktemp("fp8")), 1)
    with jax.set_mesh(parts.mesh):
        return parts, parts.text(nano.PROMPTS[:2])


@pytest.mark.slow
def test_calibration(small):
    """Every Linear has a unit; those of one input have the same, so that XLA quantises it once."""
    parts, cond = small
    model = calibrated(parts.model, {"params": parts.frozen.base}, cond, jax.random.key(0), STAGES)
    units = dict(model.quant_rules.fp8.units)
    kernels = {p.removesuffix("/kernel") for p in quant.chosen(parts.frozen.base, quant.QuantRule((), 0))}
    assert set(units) == kernels and all(np.log2(unit) % 1 == 0 for unit in units.values())
    single = "single_transformer_blocks"
    assert len({units[f"{single}/{name}"] for name in ("attn/to_q", "attn/to_k", "attn/to_v", "proj_mlp")}) == 1
    x = jax.random.normal(jax.random.key(3), (2, 8, 8, 4))
    seen = parts.model.largest({"params": parts.frozen.base}, x, jnp.full((2,), 0.5), cond)
    assert float(seen["x_embedder"]) == pytest.approx(float(jnp.max(jnp.abs(flux.pack(x)))))
    base = jax.tree.map(lambda w: w, parts.frozen.base)
    base["x_embedder"]["kernel"] = base["x_embedder"]["kernel"] * jnp.nan
    with pytest.raises(FloatingPointError, match=r"the input of \S+ is not finite at sigma 1.000"):
        calibrated(parts.model, {"params": base}, cond, jax.random.key(0), STAGES)
