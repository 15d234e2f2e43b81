"""NVFP4: every published vector bit for bit, the formats' tables, error bounds, and batch independence."""

import functools
import json
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from solrl_jax import config, quant
from solrl_jax.quant import nvfp4
from solrl_jax.structs import QuantRule, QuantRules

VECTORS = json.loads((Path(__file__).parent / "data/nvfp4_vectors.json").read_text())


@jax.jit
def product(x, q):
    return q.matmul((x,), jnp.float32)


quantised = jax.jit(nvfp4.quantise)


@jax.jit
def encode(x):
    values, scale, g = nvfp4.encode(x, jnp.max(jnp.abs(x), keepdims=True))
    code = nvfp4.code_of(values).reshape(x.shape)
    return code, scale[..., 0].astype(jnp.float8_e4m3fn), g, nvfp4.pack(code)


@pytest.mark.parametrize("name", VECTORS["cases"])
def test_vectors_bit_for_bit(name):
    case = VECTORS["cases"][name]
    code, scale, g, packed = encode(jnp.array(case["x"], jnp.float32))
    np.testing.assert_array_equal(code, case["expected"]["codes"])
    np.testing.assert_array_equal(np.asarray(scale).view(np.uint8), case["expected"]["scales"])
    assert [row.tobytes().hex() for row in np.asarray(packed)] == case["expected"]["packed_hex"]
    assert float(g[0, 0]) == np.float32(case["g"])


def test_tie_tables():
    ties = VECTORS["e2m1_round_ties"]
    x = np.array([int(t["x_hex_f32"], 16) for t in ties], np.uint32).view(np.float32)
    np.testing.assert_array_equal(jax.jit(lambda x: nvfp4.code_of(nvfp4.round_e2m1(x)))(x), [t["code"] for t in ties])
    scales = VECTORS["e4m3_scale_round"]
    rounded = jax.jit(nvfp4.round_e4m3)(jnp.array([t["x"] for t in scales], jnp.float32))
    np.testing.assert_array_equal(rounded, np.array([t["value"] for t in scales], np.float32))


def test_rounding_equals_ml_dtypes_on_every_bf16():
    x = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    x = x[np.isfinite(x)]
    np.testing.assert_array_equal(jax.jit(nvfp4.round_e2m1)(x), x.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))
    positive = np.minimum(x[x >= 0], 448)
    np.testing.assert_array_equal(
        jax.jit(nvfp4.round_e4m3)(positive), positive.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    )


def test_e4m3_rounds_to_even_at_every_midpoint():
    """f32 scales fall between bf16 numbers: every midpoint of two e4m3 values, and the next f32 below and above it."""
    values = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middle, even = (values[:-1] + values[1:]) / 2, values[np.arange(126) + np.arange(126) % 2]
    for x, rounded in (
        (middle, even),
        (np.nextafter(middle, np.float32(0)), values[:-1]),
        (np.nextafter(middle, np.float32(np.inf)), values[1:]),
    ):
        np.testing.assert_array_equal(jax.jit(nvfp4.round_e4m3)(x), rounded)


def test_a_stack_is_quantised_one_layer_at_a_time():
    """On a CPU it takes 4.6 bytes per element, the f32 kernels; 8 if all layers are quantised at once."""
    stack = jax.ShapeDtypeStruct((32, 256, 512), jnp.bfloat16)
    program = jax.jit(functools.partial(quant.quantise, precision="nvfp4_emulated")).lower(stack).compile()
    assert program.memory_analysis().temp_size_in_bytes < 5 * stack.size


def test_swept_scales_err_less():
    """Of a Gaussian kernel's squared error -20 % with 4 and 5 codes up, -26 % with -2 to 5."""

    @jax.jit
    def made(kernel):
        every = [nvfp4.quantise(kernel, sweep=tried) for tried in ((), (4, 5), nvfp4.SWEEP)]
        return every, [
            jnp.square(q.dequantise() - kernel) for q in (*every, nvfp4.quantise(0 * kernel, sweep=nvfp4.SWEEP))
        ]

    kernel = 0.02 * jax.random.normal(jax.random.key(1), (2, 512, 256))
    (plain, _, best), (first, *less, nothing) = made(kernel)
    np.testing.assert_allclose(first.sum() / jnp.sum(kernel**2), 0.0090, atol=0.0001)
    np.testing.assert_allclose([1 - e.sum() / first.sum() for e in less], [0.197, 0.264], atol=0.01)
    blocks, before = (np.asarray(e).reshape(2, 32, 16, 256).sum(axis=2) for e in (less[1], first))
    assert np.all(blocks <= before * 1.000001)  # no block is worse
    scales = np.asarray(best.scales, np.float32)
    assert 0 < scales.min() < scales.max() == 448 and np.mean(scales != np.asarray(plain.scales, np.float32)) > 0.5
    np.testing.assert_array_equal(best.g, plain.g)
    for precision in ("nvfp4_native", "nvfp4_emulated"):  # what a rollout has
        low = quant.quantise(kernel, precision)
        for ours, swept in zip(jax.tree.leaves(low), jax.tree.leaves(best), strict=True):
            np.testing.assert_array_equal(ours, swept)
    np.testing.assert_array_equal(nothing, kernel**2)  # a kernel of zeros stays zero


def test_pack_is_its_own_inverse():
    code = jnp.array(np.random.default_rng(0).integers(0, 16, (3, 32)), jnp.uint8)
    again, valued = jax.jit(lambda c: (nvfp4.unpack(nvfp4.pack(c)), nvfp4.code_of(nvfp4.value_of(c))))(code)
    np.testing.assert_array_equal(again, code)
    np.testing.assert_array_equal(valued, code)


def test_products_of_values_and_scales_are_exact_in_bf16():
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    scales = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    exact = np.outer(values, scales)
    np.testing.assert_array_equal(exact.astype(ml_dtypes.bfloat16).astype(np.float32), exact)


def test_gemm_vector():
    """Against the vectors' accumulator: codes x scales of both operands, then both global scales."""
    gemm, x = VECTORS["gemm"], jnp.array(VECTORS["cases"]["B_gauss_bf16"]["x"], jnp.float32)
    w = jnp.array(gemm["w"], jnp.float32)
    per_tensor = jnp.max(jnp.abs(x), keepdims=True)
    values, scale, g = jax.jit(nvfp4.encode)(x, per_tensor)
    q = quantised(w.T)
    accumulator = (values * scale).reshape(x.shape) @ (jax.jit(nvfp4.Nvfp4.dequantise)(q) / q.g)
    np.testing.assert_allclose(accumulator, gemm["acc_before_global_scales_exact"], rtol=1e-6)
    np.testing.assert_allclose(accumulator * g * q.g, gemm["y"], rtol=1e-6)


@pytest.mark.parametrize(("activation", "bound"), [("gauss", 0.1344), ("gelu", 0.1325), ("outliers", 0.1255)])
def test_error_of_a_product(activation, bound):
    """Relative Frobenius error of W4A4 with a scale per row, K = 3072."""
    key_x, key_w = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, (512, 3072))
    if activation == "gelu":
        x = jax.nn.gelu(x)
    if activation == "outliers":
        x = x.at[:, ::384].multiply(30.0)
    x = x.astype(jnp.bfloat16).astype(jnp.float32)
    w = (0.02 * jax.random.normal(key_w, (3072, 512))).astype(jnp.bfloat16).astype(jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    error = np.linalg.norm(product(x, quantised(w)) - exact) / np.linalg.norm(exact)
    assert abs(error - bound) < 0.003


def test_a_row_does_not_depend_on_its_batch():
    x = jax.random.normal(jax.random.key(1), (8, 64)) * jnp.arange(1.0, 9.0)[:, None]
    q = quantised(jax.random.normal(jax.random.key(2), (64, 32)))
    whole = product(x, q)
    for i in range(8):
        rest = np.where(np.arange(8) < i, 9.0, -7.0)[:, None]
        other = np.where(np.arange(8)[:, None] == i, x, rest).astype(np.float32)
        np.testing.assert_array_equal(product(other, q)[i], whole[i])


def test_zero_rows_and_zero_kernels_stay_zero():
    q = quantised(jnp.zeros((32, 16)))
    assert not np.any(product(jnp.ones((2, 32)), q)) and not np.any(jax.jit(nvfp4.Nvfp4.dequantise)(q))
    assert not np.any(product(jnp.zeros((2, 32)), quantised(jnp.ones((32, 16)))))


def test_rule_takes_what_it_should():
    params = {
        "x_embedder": {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)},
        "blocks": {"ff": {"kernel": jnp.ones((3, 32, 64))}, "norm": {"scale": jnp.ones((3, 32))}},
        "proj": {"kernel": jnp.ones((32, 16))},
    }
    assert quant.chosen(params, QuantRule(("x_embedder",), 0)) == {
        "blocks/ff/kernel": (3, 32, 64),
        "proj/kernel": (32, 16),
    }
    assert list(quant.chosen(params, QuantRule(("x_embedder",), 32))) == ["blocks/ff/kernel"]
    low = quant.quantise_tree(params, QuantRule(("x_embedder",), 0), "nvfp4_emulated")
    assert set(low) == {"blocks", "proj"} and low["blocks"]["ff"]["kernel"].codes.shape == (3, 64, 16)


def test_odd_widths_are_refused():
    with pytest.raises(ValueError, match="24 elements: NVFP4 needs a multiple of 16"):
        nvfp4.quantise(jnp.ones((24, 8)))


@pytest.mark.parametrize("precision", ["FP8", "int4", "", "auto"])
def test_an_unknown_precision_is_not_taken_for_nvfp4(precision):
    rules = QuantRules(QuantRule((), 1), QuantRule((), 2))
    for ask in (
        lambda: quant.quantise(jnp.ones((32, 16)), precision),
        lambda: quant.quantise_tree({"a": {"kernel": jnp.ones((32, 16))}}, rules.nvfp4, precision),
        lambda: quant.bits(precision),
        lambda: quant.rule_of(rules, precision),
        *([lambda: quant.resolve(precision, 9.0)] if precision != "auto" else []),
    ):
        with pytest.raises(quant.Unsupported, match=rf"^precision {precision!r} is not .*fp8, nvfp4_native, nvfp4"):
            ask()
    with pytest.raises(quant.Unsupported, match=r"^precision 'bf16' is not one that kernels are quantised to: use fp8"):
        quant.quantise(jnp.ones((32, 16)), "bf16")
    assert ("auto", "bf16", *quant.LOW) == typing.get_args(config.Precision)  # what a config takes is known here
    assert [quant.bits(p) for p in ("bf16", "fp8", "nvfp4_native", "nvfp4_emulated")] == [16.0, 8.0, 4.5, 4.5]
