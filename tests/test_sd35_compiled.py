"""What XLA makes of SD3.5 Large at its true width for an H100, without a card: 4096 + 205 tokens, an odd number."""

import re

import jax
import jax.numpy as jnp
import pytest

from solrl_jax import lora, quant
from solrl_jax.config import Lora
from solrl_jax.models import sd35
from solrl_jax.models.sd35 import Sd35Config, Sd35Transformer
from solrl_jax.structs import QuantRule, QuantRules
from solrl_jax.weights import from_config
from tests import card
from tests.test_compiled import calls, products

pytestmark = pytest.mark.usefixtures("optimised")

B, L = 4, 205
LARGE = next(iter(sd35.PUBLIC.values()))["transformer/config.json"]
CFG = from_config(Sd35Config, "memory", LARGE | {"num_layers": 2})


def given():
    shapes = [(B, 128, 128, 16), (B, L, 4096), (B, 2048)]
    return [*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes), jax.ShapeDtypeStruct((B,), jnp.float32)]


def network(remat: bool = False):
    """(module, its base in bf16 as shapes)"""
    module = Sd35Transformer(CFG, jnp.bfloat16, remat)
    spec = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x)["params"], *given())
    return module, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), spec)


@pytest.fixture(scope="module")
def h100():
    return card.mesh()


@pytest.mark.slow
def test_forward(h100):
    """Fused attention, bf16 out of every product."""
    module, base = network()
    program = card.compiled(lambda p, *x: module.apply({"params": p}, *x), base, *given(), on=h100)
    found, made = calls(program.as_text()), products(program.as_text())
    assert found["__cudnn$fmhaSoftmax"] == 2 and {dtype for dtype, *_ in made} == {"bf16"}
    scores = B * CFG.num_attention_heads * (4096 + L) ** 2 * 2
    assert program.memory_analysis().temp_size_in_bytes < scores / 2  # unfused they would be there in f32


@pytest.mark.slow
def test_forward_in_fp8(h100):
    """FP8 products of both streams; the modulation stays bf16."""
    module, base = network()
    rules = QuantRules(QuantRule(sd35.NVFP4_SKIP, 2432), QuantRule(sd35.FP8_SKIP, 0))
    low = jax.eval_shape(lambda p: quant.quantise_tree(p, quant.rule_of(rules, "fp8"), "fp8"), base)
    variables = {"params": base, "quant": low}
    text = card.compiled(lambda v, *x: module.apply(v, *x), variables, *given(), on=h100).as_text()
    eight = re.findall(r'"__cublas\$lt\$matmul\$f8"', text)
    # q, k, v, out and both MLP's of two streams; in the last block the text's k and v alone. Each has its own scale of
    # the input, so XLA merges none.
    assert len(eight) == 20 and calls(text)["__cudnn$fmhaSoftmax"] == 2 and "wrapped_dot" not in text


@pytest.mark.long
def test_gradient(h100):
    """The fused attention runs backwards though its length is odd, under a vmap of two policies too."""
    module, base = network(remat=True)
    cfg = Lora()
    adapter = jax.eval_shape(lambda base: lora.init(jax.random.key(0), base, sd35.LORA_TARGETS, cfg), base)

    def loss(adapter, base, *x):
        def velocity(adapter):
            return module.apply(lora.policy(base, adapter, cfg), *x)

        both = jax.vmap(velocity)(jax.tree.map(lambda a: jnp.stack([a, 0 * a]), jax.lax.stop_gradient(adapter)))
        return jnp.sum((velocity(adapter) - both[0] - both[1]).astype(jnp.float32) ** 2)

    text = card.compiled(jax.grad(loss), adapter, base, *given(), on=h100).as_text()
    assert calls(text)["__cudnn$fmhaSoftmaxBackward"] == 2 and calls(text)["__cudnn$fmhaSoftmax"] >= 4
