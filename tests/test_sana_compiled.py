"""SANA-1.6B at its true width, compiled for an H100 without one: 1024 positions, 300 tokens of text."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from solrl_jax import lora, quant
from solrl_jax.config import Lora
from solrl_jax.models import convolutions, dcae, layers, sana
from solrl_jax.models.sana import SanaConfig, SanaTransformer, TextKeys
from solrl_jax.structs import QuantRule, QuantRules
from solrl_jax.weights import from_config
from tests import card
from tests.test_compiled import calls, products

pytestmark = pytest.mark.usefixtures("optimised")

B, L = 8, 300
CFG = from_config(SanaConfig, "memory", next(iter(sana.PUBLIC.values()))["transformer/config.json"] | {"num_layers": 2})
SHAPES = {"x": (B, 32, 32, 32), "text": (B, L, 2304), "kv": (B, 2, L, 2 * 2240)}


def given(*names: str) -> dict:
    shapes = {name: jax.ShapeDtypeStruct(SHAPES[name], jnp.bfloat16) for name in ("x", *names)}
    ints = jax.ShapeDtypeStruct((B,), jnp.int32)
    return {**shapes, "sigma": jax.ShapeDtypeStruct((B,), jnp.float32), "length": ints}


def network(remat: bool = False):
    """(module, its base in bf16 as shapes)"""
    module = SanaTransformer(CFG, jnp.bfloat16, remat, ("attention", "qkv") if remat else ())
    spec = jax.eval_shape(lambda x: module.init(jax.random.key(0), **x)["params"], given("text"))
    return module, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), spec)


def depthwise(text: str) -> list[str]:
    """Types of the results of cuDNN's convolutions of as many groups as channels, in program order."""
    found = re.findall(r"= \((\w+\[[\d,]*?(\d+)\]).*? custom-call\(.*feature_group_count=(\d+)", text)
    return [kind for kind, channels, groups in found if channels == groups]


@pytest.fixture(scope="module")
def h100():
    return card.mesh()


@pytest.mark.slow
def test_forward(h100):
    """A rollout's step: fused attention with its lengths, no product for the text's keys and values; two convolutions,
    the one of the latents and the depthwise one, which is cuDNN's. f32 products are linear attention's two; nothing so
    wide is in memory in f32."""
    module, base = network()
    program = card.compiled(lambda p, x: module.apply({"params": p}, **x), base, given("kv"), on=h100)
    found, made = calls(program.as_text()), products(program.as_text())
    assert found["__cudnn$fmhaSoftmax"] == 1  # of a scan's body
    assert {name: n for name, n in found.items() if "conv" in name} == {
        "__cudnn$convBiasActivationForward": 1,
        "__cudnn$convForward": 1,
    }
    assert depthwise(program.as_text()) == [f"bf16[{B},32,32,11200]"]
    assert sorted(n for dtype, n, _ in made if dtype == "f32") == [B * 70 * 32 * 32, B * 1024 * 2240]
    assert len(made) == 12 and B * L * 4480 not in {n for _, n, _ in made}
    widest = B * 1024 * 11200 * 2
    assert program.memory_analysis().temp_size_in_bytes < 3 * widest


@pytest.mark.slow
def test_text_keys(h100):
    """Once a rollout: their products, and nothing of the rest of the network."""
    base = network()[1]
    text = card.compiled(
        lambda p, x: TextKeys(CFG).apply({"params": p}, x), base, given("text")["text"], on=h100
    ).as_text()
    assert not calls(text).get("__cudnn$fmhaSoftmax") and len(products(text)) <= 4


@pytest.mark.slow
def test_forward_in_fp8(h100):
    """Every Linear of a block is an FP8 product; with NVFP4's rule the FFN's alone would be."""
    module, base = network()
    rules = QuantRules(QuantRule(sana.NVFP4_SKIP, 2240), QuantRule(sana.FP8_SKIP, 0))
    low = jax.eval_shape(lambda p: quant.quantise_tree(p, quant.rule_of(rules, "fp8"), "fp8"), base)
    variables = {"params": base, "quant": low}
    text = card.compiled(lambda v, x: module.apply(v, **x), variables, given("kv"), on=h100).as_text()
    assert len(re.findall(r'"__cublas\$lt\$matmul\$f8"', text)) == 6
    assert calls(text)["__cudnn$fmhaSoftmax"] == 1


@pytest.mark.long
def test_gradient(h100):
    """The masked attention runs backwards, under a vmap of two policies too."""
    module, base = network(remat=True)
    cfg = Lora()
    adapter = jax.eval_shape(lambda base: lora.init(jax.random.key(0), base, sana.LORA_TARGETS, cfg), base)

    def loss(adapter, base, x):
        def velocity(adapter):
            return module.apply(lora.policy(base, adapter, cfg), **x)

        both = jax.vmap(velocity)(jax.tree.map(lambda a: jnp.stack([a, 0 * a]), jax.lax.stop_gradient(adapter)))
        return jnp.sum((velocity(adapter) - both[0] - both[1]).astype(jnp.float32) ** 2)

    text = card.compiled(jax.grad(loss), adapter, base, given("text"), on=h100).as_text()
    assert depthwise(text).count(f"bf16[{B},32,32,11200]") >= 2  # forwards and, of the gradient, backwards
    assert calls(text)["__cudnn$fmhaSoftmaxBackward"] == 1 and calls(text)["__cudnn$fmhaSoftmax"] >= 2


def two_blocks(on):
    """Two of DC-AE's blocks in a row, at 1/8 of 1024 px, compiled."""

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(2):
                x = dcae.VitBlock(32, (5,), jnp.bfloat16, name=f"block_{i}")(x)
            return x

    x = jax.ShapeDtypeStruct((2, 128, 128, 512), jnp.bfloat16)
    params = jax.eval_shape(lambda x: Two().init(jax.random.key(0), x)["params"], x)
    return card.compiled(lambda p, x: Two().apply({"params": p}, x), params, x, on=on)


@pytest.mark.slow
def test_depthwise_convolutions_of_the_decoder(h100):
    """The 5 x 5 and the 3 x 3 convolutions are cuDNN's. As one elementwise kernel, the first concatenated q, k and v
    again for every tap, which was a fifth of the decoder's time."""
    program = two_blocks(h100)
    assert depthwise(program.as_text()) == ["bf16[2,128,128,1536]", "bf16[2,128,128,4096]"] * 2
    assert program.memory_analysis().temp_size_in_bytes < 0.8e9


@pytest.mark.slow
def test_attention_of_the_decoder(h100):
    """q, k and v of another scale leave their product in bf16; in f32 they were written once and read three times."""
    made, scales = products(two_blocks(h100).as_text()), 2 * 128 * 128 * 3 * 512
    assert [dtype for dtype, elements, _ in made if elements == scales] == ["bf16"] * 2


@pytest.mark.slow
def test_depthwise_convolutions_as_shifted_products(h100, monkeypatch):
    """The form for TPUs, compiled for an H100: row-major, two blocks in a row take 0.6 GB; in the order that XLA
    chooses (f32, channel by channel), 3.4 GB."""
    monkeypatch.setattr(convolutions, "_grouped", convolutions._shifted)
    assert two_blocks(h100).memory_analysis().temp_size_in_bytes < 0.8e9


@pytest.mark.slow
def test_linear_attention_makes_no_f32_copies_of_k_and_v(h100):
    """Only relu(q) and the result are written in f32 at the size of k; f32 copies of k and v would be two more."""
    shape = (B, 1024, 70, 32)
    qkv = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3
    entry = card.compiled(layers.linear_attention, *qkv, on=h100).as_text().partition("\nENTRY")[2]
    made = re.findall(r" = (\(.*?\)|\S+) (?:fusion|custom-call|convert|copy)\(", entry)
    wide = [dims for result in made for dims in re.findall(r"f32\[([\d,]+)\]", result)]
    assert sum(math.prod(map(int, dims.split(","))) == math.prod(shape) for dims in wide) == 2
