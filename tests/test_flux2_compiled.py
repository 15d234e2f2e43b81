"""FLUX.2-klein at its true width, compiled for an H100 without one: 1024 tokens of the image, 512 of the text."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from solrl_jax import config, iteration, learn, lora, plan, quant
from solrl_jax.config import Lora
from solrl_jax.models import flux2, public
from solrl_jax.models.flux2 import Flux2Config, Flux2Transformer
from solrl_jax.plan import shapes
from solrl_jax.plan import stages as planned
from solrl_jax.weights import from_config, hub
from tests import card
from tests.test_compiled import calls, products

pytestmark = pytest.mark.usefixtures("optimised")

B, S, L = 8, 1024, 512
KLEIN = "black-forest-labs/FLUX.2-klein-base-4B"
RAW = public.FLUX2[KLEIN]["transformer/config.json"] | {"num_layers": 1, "num_single_layers": 1}
CFG = from_config(Flux2Config, "memory", RAW)
ROPE = tuple(map(jnp.asarray, flux2.rope_table(CFG, 32, 32, L)))


def given(batch: int) -> dict:
    context = jax.ShapeDtypeStruct((batch, L, CFG.width), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((batch, S, 128), jnp.bfloat16)
    return {"x": x, "sigma": jax.ShapeDtypeStruct((batch,), jnp.float32), "context": context}


def network(remat: bool = False):
    """(module, its base in bf16 as shapes)"""
    module = Flux2Transformer(CFG, jnp.bfloat16, remat, ("attention",) if remat else ())
    text = jax.ShapeDtypeStruct((1, L, CFG.joint_attention_dim), jnp.bfloat16)
    first = {**given(1), "context": None, "text": text}
    spec = jax.eval_shape(lambda x: module.init(jax.random.key(0), **x, rope=ROPE)["params"], first)
    return module, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), spec)


@pytest.fixture(scope="module")
def h100():
    return card.mesh()


@pytest.mark.slow
def test_merging(h100, tmp_path):
    """The merged kernels take what they are; A B of the widest stack, 6.8 GB in f32, is a layer's at a time."""
    path = hub.write_configs(tmp_path, public.FLUX2[KLEIN])
    model = flux2.make(config.Model(name="flux2", path=str(path), text_tokens=512))
    base = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), jax.eval_shape(model.init, jax.random.key(0))
    )
    adapter = jax.eval_shape(lambda base: lora.init(jax.random.key(0), base, model.lora_targets, Lora()), base)
    program = card.compiled(lambda b, a: lora.merged_kernels(b, a, Lora()), base, adapter, on=h100)
    memory = program.memory_analysis()
    assert memory.output_size_in_bytes == pytest.approx(5.3e9, rel=0.01)
    assert memory.temp_size_in_bytes < 1.0e9


@pytest.mark.slow
def test_forward(h100):
    """Fused attention once a block, bf16 out of every product, no scores in memory; the modulation is three products
    in all, however many blocks there are."""
    module, base = network()
    program = card.compiled(lambda p, x: module.apply({"params": p}, **x, rope=ROPE), base, given(B), on=h100)
    found, made = calls(program.as_text()), products(program.as_text())
    assert found["__cudnn$fmhaSoftmax"] == 2 and {dtype for dtype, *_ in made} == {"bf16"}
    # Of a double block 12, of a single one 3, the last of which is added to the second; 2 + 3 + 1 of one row a picture,
    # x_embedder and proj_out.
    assert len(made) == 12 + 3 + 6 + 2
    widest = B * (S + L) * 27648 * 2
    assert program.memory_analysis().temp_size_in_bytes < 2.5 * widest


@pytest.mark.slow
def test_forward_in_fp8(h100):
    """Every Linear of the blocks is an FP8 product, the last of a single block two: none of its codes is cut out of a
    larger array."""
    module, base = network()
    rule = flux2.quant_rules(CFG, 1000).fp8
    low = jax.eval_shape(lambda p: quant.quantise_tree(p, rule, "fp8"), base)
    variables = {"params": base, "quant": low}
    text = card.compiled(lambda v, x: module.apply(v, **x, rope=ROPE), variables, given(B), on=h100).as_text()
    f8 = [line for line in text.splitlines() if '"__cublas$lt$matmul$f8"' in line]
    assert len(f8) == 12 + 3
    assert Counter(int(re.search(r'"beta":(\d)', line)[1]) for line in f8) == {0: 14, 1: 1}
    assert not re.findall(r"= f8e4m3fn\[3072,(?:3072|9216)\]\S* fusion\(", text)
    assert calls(text)["__cudnn$fmhaSoftmax"] == 2


@pytest.mark.long
def test_gradient(h100):
    """The LoRA's gradient runs the fused attention backwards; forwards once a block, for remat keeps it."""
    module, base = network(remat=True)
    cfg = Lora()
    adapter = jax.eval_shape(lambda base: lora.init(jax.random.key(0), base, flux2.LORA_TARGETS, cfg), base)

    def loss(adapter, base, x):
        return jnp.sum(module.apply(lora.policy(base, adapter, cfg), **x, rope=ROPE).astype(jnp.float32) ** 2)

    found = calls(card.compiled(jax.grad(loss), adapter, base, given(B), on=h100).as_text())
    assert (found["__cudnn$fmhaSoftmaxBackward"], found["__cudnn$fmhaSoftmax"]) == (2, 2)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["merged", "quantised", "explore", "learn"])
def test_stages_of_the_recipe_for_24_gb(h100, tmp_path, stage):
    """The whole base 4B by `flux2:24gb`, one prompt an iteration: what the stage's program takes beside what else is on
    the card is below 23.2 GB, and its temporaries are about the plan's."""
    words = {"prompts": "1", "explore.precision": "fp8"}
    cfg = shapes.with_configs(config.load("flux2:24gb", words), tmp_path)
    programs = stages_of(cfg)
    program = card.compiled(*programs[stage], on=h100)
    memory = program.memory_analysis()
    use = plan.use_of({"merged": "quantise", "quantised": "quantise"}.get(stage, stage), *args_of(cfg))
    held = use.weights + use.adapters + use.merged + use.quantised
    print(stage, memory.temp_size_in_bytes / 1e9, use.activations / 1e9, (held + memory.temp_size_in_bytes) / 1e9)
    assert held + memory.temp_size_in_bytes < 23.2e9
    assert memory.temp_size_in_bytes < 1.1 * use.activations


def args_of(cfg):
    sizes = shapes.read(cfg, 1)
    return cfg, sizes, 1, plan.CARDS["H100 80GB"]


def stages_of(cfg):
    """{stage: (its function, its arguments' shapes)} as iteration.Staged runs them."""
    sizes = shapes.read(cfg, 1)
    run = iteration.stages(sizes.model, sizes.score, learn.make_optimizer(cfg), cfg)
    state, frozen = shapes.blank(cfg, sizes), sizes.frozen
    merged, low = planned.kernels(cfg, sizes)
    prompts = shapes.batch(sizes.prompts, 1)
    go_on = shapes.states(cfg, sizes, 1, cfg.kept)
    explore = (run.explore, merged, low, frozen, prompts, shapes.keys(1, cfg.candidates))
    rest = (run.regenerate, merged, None, frozen, prompts, shapes.keys(1, cfg.kept), go_on)
    samples = shapes.samples(cfg, sizes, 1, cfg.kept)
    return {
        "merged": (run.merged, state, frozen),
        "quantised": (run.quantised, merged, frozen),
        "explore": explore,
        "regenerate": rest,
        "learn": (run.learn, state, frozen, prompts.cond, samples),
    }
