"""Z-Image at its true width, compiled for an H100 without one: 1024 image tokens, 128 tokens of caption."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from solrl_jax import lora, quant
from solrl_jax.config import Lora
from solrl_jax.models import public, zimage, zimage_network
from solrl_jax.models.zimage import ZImageConfig, ZImageTransformer
from solrl_jax.structs import QuantRule
from solrl_jax.weights import from_config
from tests import card
from tests.test_compiled import calls, kernels, products

pytestmark = pytest.mark.usefixtures("optimised")

B, N, L = 8, 1024, 128
CFG = from_config(
    ZImageConfig, "memory", public.ZIMAGE["Tongyi-MAI/Z-Image"]["transformer/config.json"] | {"n_layers": 2}
)
WHERE = zimage.places(CFG, 32, 32, L)
SHAPES = {"x": (B, N, 64), "text": (B, L, 2560), "caption": (B, L, 3840)}


def given(*names: str) -> dict:
    shapes = {name: jax.ShapeDtypeStruct(SHAPES[name], jnp.bfloat16) for name in ("x", *names)}
    return {
        **shapes,
        "sigma": jax.ShapeDtypeStruct((B,), jnp.float32),
        "length": jax.ShapeDtypeStruct((B,), jnp.int32),
    }


def network(remat: bool = False):
    """(a function of variables and `given`, the base in bf16 as shapes)"""
    module = ZImageTransformer(CFG, jnp.bfloat16, remat, ("attention", "mlp") if remat else ())
    spec = jax.eval_shape(lambda x: module.init(jax.random.key(0), **x, where=WHERE)["params"], given("text"))
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), spec)
    return lambda variables, x: module.apply(variables, **x, where=WHERE), base


@pytest.fixture(scope="module")
def h100():
    return card.mesh()


WIDEST = B * (N + L) * 10240 * 2
"""Bytes of a feed-forward's hidden."""


@pytest.mark.slow
def test_forward(h100):
    """A rollout's step: fused attention, with lengths in the layers; q and k each in one kernel with their norm and
    rotation; nothing of the caption's own blocks, nothing as wide as the stream in f32, no scores in memory."""
    apply, base = network()
    program = card.compiled(lambda p, x: apply({"params": p}, x), base, given("caption"), on=h100)
    text = program.as_text()
    made = products(text)
    assert calls(text) == {"__cublas$lt$matmul": 21, "__cudnn$fmhaSoftmax": 2}  # a scan's body has 8 and one
    assert len(made) == 21 and {dtype for dtype, *_ in made} == {"bf16"}
    assert Counter(n for _, n, _ in made)[B * (N + L) * 3840] == 5 and not {n for _, n, _ in made} & {B * L * 3840}
    for tokens in (N, N + L):
        assert len(re.findall(rf"= bf16\[{B},1,{tokens},30,64,2\].*\"__triton\"", text)) == 2
    assert not re.findall(rf"= f32\[{B},(?:{N}|{N + L}),(?:3840|10240)\]\S* (?:fusion|custom-call)\(", text)
    assert program.memory_analysis().temp_size_in_bytes < 4 * WIDEST  # 0.72 GB


@pytest.mark.slow
def test_forward_in_fp8(h100):
    """Every Linear of a block but the modulation is an FP8 product; casts are part of the kernels before them."""
    apply, base = network()
    low = jax.eval_shape(lambda p: quant.quantise_tree(p, QuantRule(zimage.SKIP, 1000), "fp8"), base)
    program = card.compiled(apply, {"params": base, "quant": low}, given("caption"), on=h100)
    text = program.as_text()
    found = re.findall(r'= \(?(\w+)\[[\d,]+\].*"__cublas\$lt\$matmul\$f8".*"epilogue":"(\w+)"', text)
    assert found == [("bf16", "DEFAULT")] * 14
    assert calls(text) == {"__cublas$lt$matmul$f8": 14, "__cublas$lt$matmul": 7, "__cudnn$fmhaSoftmax": 2}
    assert not re.findall(r"= f8e4m3fn\[[^\]]*\]\S* transpose", text)  # weights lie as the tensor cores take them
    assert len(re.findall(rf"= f8e4m3fn\[{B},{N + L},3840\]\S* fusion\(.*\"__triton\"", text)) == 2  # norms and casts
    assert program.memory_analysis().temp_size_in_bytes < 4 * WIDEST


@pytest.mark.long
def test_gradient(h100):
    """The masked attention runs backwards, under a vmap of two policies too, and is kept and not run again; that of the
    picture's own blocks, of the caption's and of the layers."""
    apply, base = network(remat=True)
    cfg = Lora()
    adapter = jax.eval_shape(lambda base: lora.init(jax.random.key(0), base, zimage.LORA_TARGETS, cfg), base)

    def loss(adapter, base, x):
        def velocity(adapter):
            return apply(lora.policy(base, adapter, cfg), x)

        both = jax.vmap(velocity)(jax.tree.map(lambda a: jnp.stack([a, 0 * a]), jax.lax.stop_gradient(adapter)))
        return jnp.sum((velocity(adapter) - both[0] - both[1]).astype(jnp.float32) ** 2)

    program = card.compiled(jax.grad(loss), adapter, base, given("text"), on=h100)
    found = calls(program.as_text())
    # w1 and w3 once, for they are kept, and the gradient of w2's input. XLA of JAX 0.11 runs both again, to keep them.
    wide = sum(n == B * (N + L) * 10240 for _, n, _ in products(program.as_text()))
    assert wide == (5 if jax.__version_info__[:2] == (0, 11) else 3)
    assert found["__cudnn$fmhaSoftmaxBackward"] == 3 and found["__cudnn$fmhaSoftmax"] == 6
    assert set(found) == {"__cublas$lt$matmul", "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    assert program.memory_analysis().temp_size_in_bytes < 4e9  # 3.6 GB


@pytest.mark.slow
def test_rotary_norm(h100):
    """One kernel, with a table for each sample too, which keeps nothing in memory."""
    x = jax.ShapeDtypeStruct((B, N + L, 30, 128), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((1, N + L, 1, 128), jnp.float32)
    table = jax.ShapeDtypeStruct((B, N + L, 128), jnp.float32)
    program = card.compiled(zimage_network.rotary_norms, x, scale, (table, table), on=h100)
    assert kernels(program) == ["__triton"] and program.memory_analysis().temp_size_in_bytes < 1000
