"""bfloat16 products on CPUs with and without matrix units: both choices give the same numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_dtypes import bfloat16

from solrl_jax import config, device, iteration, learn, quant
from solrl_jax.models import layers
from solrl_jax.plan import jaxpr, shapes
from solrl_jax.quant import fp8, nvfp4


@pytest.fixture(params=[False, True], ids=["float32", "amx"])
def amx(request, monkeypatch):
    """Both choices, on any machine."""
    monkeypatch.setattr(device, "has_amx", lambda: request.param)
    return request.param


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rounded(x):
    """x in bf16, as f64."""
    return np.asarray(x).astype(bfloat16).astype(np.float64)


def test_the_processor_is_asked(tmp_path):
    for name, flags, expect in (("old", "avx512_bf16 avx512_fp16", False), ("new", "amx_tile amx_bf16", True)):
        (tmp_path / name).write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
        assert device.has_amx(str(tmp_path / name)) == expect
    assert not device.has_amx(str(tmp_path / "of another system"))


def test_a_program_is_of_one_choice(amx):
    """The program differs, so that the compilation cache keeps them apart; the first lines of a run say which it is."""
    x = jnp.ones((8, 16), jnp.bfloat16)
    text = jax.jit(lambda x, w: jnp.dot(*device.operands(x, w))).lower(x, x.T).as_text()
    assert ("tensor<8x16xbf16>, tensor<16x8xbf16>" in text) == amx
    assert device.wide() == (not amx)
    assert ("no matrix units" in device.notes()[0]) == (not amx)


def test_only_cpus_choose(monkeypatch):
    x = jnp.ones(3, jnp.bfloat16)
    for platform in ("gpu", "tpu"):
        monkeypatch.setattr(device, "platform", lambda platform=platform: platform)
        assert device.operands(x) == (x,) and device.notes() == []


def test_only_emulated_nvfp4_on_gpus_compiles_without_triton_norms(monkeypatch):
    """Of the programs of a run those that roll out in it; test_compiled.py has what the option does."""
    assert device.compiler_options("nvfp4_emulated") == {}  # a CPU
    monkeypatch.setattr(device, "platform", lambda: "gpu")
    assert device.compiler_options("nvfp4_emulated") == {"xla_disable_hlo_passes": "triton-softmax-rewriter"}
    assert [device.compiler_options(p) for p in ("bf16", "fp8", "nvfp4_native")] == [{}] * 3


def test_learning_alone_is_deterministic_where_asked(monkeypatch):
    """It alone has a backward pass. A CPU's programs are so without an option."""
    given = {}
    monkeypatch.setattr(jax, "jit", lambda f, compiler_options: given.update({f: compiler_options}) or f)
    cfg = config.load("tiny:sol_rl")

    def with_options(cfg):
        given.clear()
        sizes = shapes.read(cfg, 1)
        found = iteration.programs.__wrapped__(sizes.model, sizes.score, learn.make_optimizer(cfg), cfg)
        return {name: options for name, f in found.items() if (options := given[f])}

    asked = config.override(cfg, **{"learn.deterministic": "true"})
    assert with_options(asked) == {}
    monkeypatch.setattr(device, "platform", lambda: "gpu")
    explore = {"explore": {"xla_disable_hlo_passes": "triton-softmax-rewriter"}}
    assert with_options(cfg) == explore
    assert with_options(asked) == {**explore, "learn": {"xla_gpu_deterministic_ops": True}}
    assert device.compiler_options("nvfp4_emulated", True) == {**explore["explore"], "xla_gpu_deterministic_ops": True}


def test_linear_multiplies_rounded_operands(amx):
    """Operands are rounded to bf16, also if the same program computed them in f32; sums are not rounded."""
    x, w = normal(64, 160), normal(160, 96, seed=1)
    module = layers.Linear(96, use_bias=False)
    found = jax.jit(lambda x, w: module.apply({"params": {"kernel": w}}, x * 1.5))(x, w)
    expect = rounded(x * np.float32(1.5)) @ rounded(w)
    np.testing.assert_allclose(rounded(found), expect, rtol=2**-8, atol=1e-5)
    f32 = jax.jit(lambda x, w: layers._product((x * 1.5,), w, jnp.bfloat16, jnp.float32))(x, w)
    np.testing.assert_allclose(f32, expect, rtol=1e-5, atol=1e-5)


def test_gradient_of_a_product(amx):
    x, w = normal(32, 48), normal(48, 16, seed=1)
    back = jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(layers._product((x,), w, jnp.bfloat16, jnp.float32))), (0, 1)))
    out = np.cos(rounded(x) @ rounded(w))
    for found, expect in zip(back(x, w), (out @ rounded(w).T, rounded(x).T @ out), strict=True):
        np.testing.assert_allclose(found, expect, rtol=2**-8, atol=1e-4)  # rounded once, to the operand's bf16


def test_emulated_nvfp4_is_exact(amx):
    """Both operands have at most 6 significant bits: every product is exact, only the f32 sums round."""
    x, kernel = normal(24, 800), nvfp4.quantise(jnp.asarray(normal(800, 160, seed=1)))
    values, g = nvfp4.fake_quantise(jnp.asarray(x))
    exact = np.asarray(values, np.float64) @ np.asarray(nvfp4._scaled(kernel), np.float64).T
    expect = exact * np.asarray(g * kernel.g, np.float64)
    found = jax.jit(lambda x, q: q.matmul((x,), jnp.float32))(x, kernel)
    np.testing.assert_allclose(found, expect, rtol=1e-5, atol=1e-6 * np.abs(expect).max())


def test_attention(amx):
    """The softmax weights are rounded to bf16, as on every device."""
    q, k, v = (jnp.asarray(normal(3, 40, 5, 32, seed=i), jnp.bfloat16) for i in range(3))
    scores = np.einsum("bqhd,bkhd->bhqk", rounded(q), rounded(k)) / 32**0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expect = np.einsum("bhqk,bkhd->bqhd", rounded(weights), rounded(v))
    found = jax.jit(layers.attention)(q, k, v)
    assert found.dtype == jnp.bfloat16 and found.shape == q.shape
    np.testing.assert_allclose(rounded(found), expect, rtol=2**-7, atol=2e-3)


def test_attention_multiplies_in_bhqd_order(amx):
    """XLA's CPU backend makes the product for bqhd as [B, H, d, Q], which takes up to 1.5 times as long."""
    shape = jax.ShapeDtypeStruct((3, 40, 5, 32), jnp.bfloat16)
    text = jax.jit(layers.attention).lower(shape, shape, shape).compile().as_text()
    assert set(re.findall(r" = \w+\[([\d,]+)\]\S* dot\(", text)) == {"3,5,40,40", "3,5,40,32"}


@pytest.mark.parametrize("f", [layers.gelu_tanh, layers.gelu_erf])
def test_gelu_rounds_once(f):
    """GELU of a bf16 number is the rounded f32 GELU; the same holds for its derivative."""
    x = jnp.asarray(np.linspace(-6, 6, 4001), jnp.bfloat16)
    wide = x.astype(jnp.float32)
    np.testing.assert_array_equal(jax.jit(f)(x), jax.jit(f)(wide).astype(jnp.bfloat16))
    slope = jax.jit(jax.grad(lambda x: jnp.sum(f(x).astype(jnp.float32))))
    np.testing.assert_array_equal(slope(x), slope(wide).astype(jnp.bfloat16))


def test_a_plan_does_not_depend_on_this_cpu(amx, monkeypatch):
    """A plan's programs are those of another device, also without a CUDA plugin to trace for."""
    x, w = jax.ShapeDtypeStruct((4, 16), jnp.bfloat16), jax.ShapeDtypeStruct((16, 8), jnp.bfloat16)
    for plugin in (False, True):
        monkeypatch.setattr(jaxpr, "as_on_gpus", lambda plugin=plugin: plugin)
        found = jaxpr.trace(lambda x, w: layers._product((x,), w, jnp.bfloat16, jnp.float32), x, w)
        assert jaxpr.flops(found) == {"bfloat16": 2 * 4 * 16 * 8}


def test_emulated_kernels_are_unpacked_once_on_cpus(monkeypatch):
    """The same numbers, bit for bit; on a GPU, kernels stay packed at 4.5 bits per weight."""
    low = {"a": nvfp4.quantise(jnp.asarray(normal(2, 32, 48))), "b": fp8.quantise(jnp.asarray(normal(32, 48)))}
    found = quant.for_rollout(low)
    assert isinstance(found["a"], nvfp4.Unpacked) and found["b"] is low["b"]
    x = jnp.asarray(normal(5, 32))
    packed, ready = (jax.tree.map(lambda leaf: leaf[1], kernel) for kernel in (low["a"], found["a"]))
    multiply = jax.jit(lambda kernel, x: kernel.matmul((x,), jnp.float32))
    np.testing.assert_array_equal(multiply(ready, x), multiply(packed, x))
    monkeypatch.setattr(device, "platform", lambda: "gpu")
    assert quant.for_rollout(low)["a"] is low["a"]
