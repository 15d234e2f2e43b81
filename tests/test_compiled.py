"""What XLA makes of FLUX at its true width for an H100: the kernels that the speed hangs on, without a card."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import lora, sharding
from solrl_jax.config import Lora
from solrl_jax.models import flux
from solrl_jax.models.flux import FluxConfig, FluxTransformer
from tests import card

B, S, L = 8, 1024, 128  # XLA would merge the q, k, v of smaller batches, at the price of copies
CFG = FluxConfig(num_layers=1, num_single_layers=1)
ROPE = tuple(map(jnp.asarray, flux.rope_table(CFG, 32, 32, L)))


def given(batch: int):
    shapes = [(batch, S, 64), (batch, L, 4096), (batch, 768)]
    times = [jax.ShapeDtypeStruct((batch,), jnp.float32)] * 2
    return [*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes), *times]


def network(remat: bool = False):
    """(module, its base in bf16 as shapes)"""
    module = FluxTransformer(CFG, jnp.bfloat16, remat)
    spec = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x, ROPE)["params"], *given(1))
    return module, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), spec)


def calls(text: str) -> Counter:
    return Counter(re.findall(r'custom_call_target="([^"]+)"', text))


def products(text: str) -> list[tuple[str, int, str]]:
    """(dtype, elements, epilogue) of every cuBLASLt product."""
    found = re.findall(r'= \(?(\w+)\[([\d,]+)\].*"__cublas\$lt\$matmul".*"epilogue":"(\w+)"', text)
    return [(dtype, int(np.prod([int(n) for n in dims.split(",")])), epilogue) for dtype, dims, epilogue in found]


@pytest.fixture(scope="module")
def h100():
    return card.mesh()


def test_forward(h100):
    """bf16 out of every product, biases and GELUs in its epilogue, fused attention, no scores in memory."""
    module, base = network()
    program = card.compiled(lambda p, *x: module.apply({"params": p}, *x, ROPE), base, *given(B), on=h100)
    text = program.as_text()
    found, made = calls(text), products(text)
    assert found["__cudnn$fmhaSoftmax"] == 2 and set(found) == {"__cudnn$fmhaSoftmax", "__cublas$lt$matmul"}
    assert len(made) == found["__cublas$lt$matmul"] and {dtype for dtype, *_ in made} == {"bf16"}
    epilogues = Counter(epilogue for _, elements, epilogue in made if elements >= B * S * CFG.width)
    assert epilogues == {"BIAS": 10, "BIAS_GELU": 2}  # of the image's products; proj_out gives 64 channels
    scores = B * CFG.num_attention_heads * (S + L) ** 2 * 2
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * scores  # 0.62 GB; scores in f32 alone would be 1.02


@pytest.mark.slow
def test_gradient(h100):
    """The LoRA's gradient runs the fused attention backwards, and recomputes a block instead of keeping it."""
    cfg = Lora()
    temporary = {}
    for remat in (False, True):
        module, base = network(remat)
        adapter = jax.eval_shape(lambda base: lora.init(jax.random.key(0), base, flux.LORA_TARGETS, cfg), base)

        def loss(adapter, base, *x, module=module):
            return jnp.sum(module.apply(lora.policy(base, adapter, cfg), *x, ROPE).astype(jnp.float32) ** 2)

        program = card.compiled(jax.grad(loss), adapter, base, *given(B), on=h100)
        found = calls(program.as_text())
        assert found["__cudnn$fmhaSoftmaxBackward"] == 2 and found["__cudnn$fmhaSoftmax"] == (4 if remat else 2)
        temporary[remat] = program.memory_analysis().temp_size_in_bytes
    assert temporary[True] < temporary[False]


def test_the_small_world_keeps_its_own_attention(h100):
    """40 tokens: no fused kernel; and without a mesh, or on a CPU's, nothing of this is chosen."""
    assert sharding.platform() == "cpu"
    with jax.set_mesh(h100):
        assert sharding.platform() == "gpu"
    with jax.set_mesh(sharding.make_mesh(1)):
        assert sharding.platform() == "cpu"
