"""What XLA makes of FLUX at its true width for an H100: the kernels that the speed depends on, without a card."""

import functools
import json
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from experiments import lab
from solrl_jax import config, device, iteration, learn, lora, quant, sharding
from solrl_jax.config import Lora
from solrl_jax.models import flux, layers, rope
from solrl_jax.models.flux import FluxConfig, FluxTransformer
from solrl_jax.plan import shapes
from solrl_jax.quant import nvfp4
from tests import card, flux_dev

pytestmark = pytest.mark.usefixtures("optimised")

B, S, L = 8, 1024, 128  # XLA would merge the q, k, v of smaller batches, at the price of copies
CFG = FluxConfig(num_layers=1, num_single_layers=1)
ROPE = tuple(map(jnp.asarray, flux.rope_table(CFG, 32, 32, L)))


def given(batch: int):
    inputs = [(batch, S, 64), (batch, L, 4096), (batch, 768)]
    times = [jax.ShapeDtypeStruct((batch,), jnp.float32)] * 2
    return [*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in inputs), *times]


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


@pytest.mark.slow
def test_forward(h100):
    """bf16 out of every product, GELUs in its epilogue, biases there or in what follows, no scores in memory."""
    module, base = network()
    program = card.compiled(lambda p, *x: module.apply({"params": p}, *x, ROPE), base, *given(B), on=h100)
    text = program.as_text()
    found, made = calls(text), products(text)
    assert found["__cudnn$fmhaSoftmax"] == 2 and set(found) == {"__cudnn$fmhaSoftmax", "__cublas$lt$matmul"}
    assert len(made) == found["__cublas$lt$matmul"] and {dtype for dtype, *_ in made} == {"bf16"}
    epilogues = Counter(epilogue for _, elements, epilogue in made if elements >= B * S * CFG.width)
    # Of the image's products; proj_out gives 64 channels, the single block's is two, the second added to the first.
    assert epilogues == {"BIAS": 3, "BIAS_GELU": 2, "DEFAULT": 8}  # BIAS: both v and the first product
    assert len(re.findall(rf"= bf16\[{B},{S + L},24,64,2\].*\"__triton\"", text)) == 4  # q and k, in one kernel each
    scores = B * CFG.num_attention_heads * (S + L) ** 2 * 2
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * scores  # 0.62 GB; scores in f32 alone would be 1.02


def heads(tokens: int):
    return jax.ShapeDtypeStruct((B, tokens, CFG.num_attention_heads, CFG.attention_head_dim), jnp.bfloat16)


SCALE = jax.ShapeDtypeStruct((1, S + L, 1, CFG.attention_head_dim), jnp.float32)


def joined(text, image, scale):
    return rope.rotary_norm(jnp.concatenate([text, image], axis=1), scale, ROPE)


@pytest.mark.slow
@pytest.mark.parametrize("joins", [False, True])
def test_rotary_norm(h100, joins):
    """One kernel, which reads q where it lies, also if that is in two streams, and keeps nothing in memory."""
    f, given = (joined, (heads(L), heads(S))) if joins else (lambda x, s: rope.rotary_norm(x, s, ROPE), (heads(S + L),))
    program = card.compiled(f, *given, SCALE, on=h100)
    assert kernels(program) == ["__triton"] and program.memory_analysis().temp_size_in_bytes < 1000
    # In the other form there are a kernel for rms(x), one for its root and one for the rest.
    program = card.compiled(lambda x, s: rope._in_two_passes(x, s, ROPE, 1e-6), heads(S + L), SCALE, on=h100)
    assert len(kernels(program)) == 3


def kernels(program) -> list[str]:
    """The kind of each fusion that a program runs: that of the Triton compiler, or "loop" for others."""
    body = program.as_text().split("ENTRY ")[1]
    found = [line for line in body.splitlines() if re.search(r" (fusion|copy|reduce|transpose|custom-call)\(", line)]
    return ["__triton" if '"__triton"' in line else "loop" for line in found]


@pytest.mark.parametrize("form", [rope.rotary_norm, rope._in_two_passes])
def test_gradient_of_rotary_norm(h100, form):
    """Its gradient is the other form's: nothing of x's size in f32, nor sums of its pairs; no strided reads."""

    def back(x, scale, out):
        return jax.vjp(lambda x: form(x, scale, ROPE, 1e-6), x)[1](out)[0]

    program = card.compiled(back, heads(S + L), SCALE, heads(S + L), on=h100)
    # Two f32 for each row of 128; the sums would be half an f32 for each element.
    assert program.memory_analysis().temp_size_in_bytes < 0.2 * np.prod(heads(S + L).shape)
    assert not re.search(r"slice=\{[^}]*:2\]", program.as_text())


def test_remat_keeps_the_fused_attention(h100):
    """If "attention" is kept, the forward kernel runs once. Without the rule for its primitive, its softmax sums are
    not kept, and it runs again in the backward pass."""
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, S, 512), (3, 512, 512)))

    def runs(kept: tuple[str, ...]) -> int:
        @functools.partial(jax.checkpoint, policy=layers.keeping(kept))
        def block(w, x):
            q, k, v = ((x @ each).reshape(*x.shape[:2], 8, 64) for each in w)
            return layers.attention(q, k, v).reshape(x.shape)

        grad = jax.grad(lambda w, x: jnp.sum(block(w, x).astype(jnp.float32) ** 2))
        return calls(card.compiled(grad, w, x, on=h100).as_text())["__cudnn$fmhaSoftmax"]

    assert (runs(("attention",)), runs(())) == (1, 2)


def test_e4m3_rounding_is_in_the_program(h100):
    """XLA removes a cast to float8_e4m3fn and back, so the rounding is arithmetic."""
    x = jax.ShapeDtypeStruct((8, 1024), jnp.float32)
    assert "reduce-precision(" in card.compiled(nvfp4.round_e4m3, x, on=h100).as_text()


def test_e2m1_rounding_is_in_the_program(h100):
    """Its three roundings, one for each spacing of the values; of a cast to float4_e2m1fn and back nothing is left."""
    x = jax.ShapeDtypeStruct((8, 1024), jnp.float32)
    assert card.compiled(nvfp4.round_e2m1, x, on=h100).as_text().count("round-nearest-even(") == 3
    casts = card.compiled(lambda x: x.astype(jnp.float4_e2m1fn).astype(x.dtype), x, on=h100)
    assert "f4e2m1fn" not in casts.as_text()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp8", "nvfp4_emulated"])
def test_quantising_turns_the_codes_alone(h100, precision):
    """Of a stack of bf16 kernels nothing is written but codes and scales, once as they come and once turned."""
    stack = jax.ShapeDtypeStruct((4, 3072, 12288), jnp.bfloat16)
    program = card.compiled(functools.partial(quant.quantise, precision=precision), stack, on=h100)
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 1.1 * memory.output_size_in_bytes < 2 * stack.size  # the stack has 2 bytes each
    assert not re.search(r"= (bf16|f32)\[[\d,]*3072[\d,]*\]\S* (transpose|copy)\(", program.as_text())


def low(precision: str):
    """(module, its base and the low-precision copy as shapes)"""
    module, base = network()
    rule = quant.rule_of(flux.quant_rules(CFG, 1000), precision)
    make = functools.partial(quant.quantise_tree, rule=rule, precision=precision)
    return module, {"params": base, "quant": jax.eval_shape(make, base)}


@pytest.mark.slow
def test_forward_in_fp8(h100):
    """One FP8 product a Linear (the single block's proj_out two), GELU and cast in it."""
    module, variables = low("fp8")
    program = card.compiled(lambda v, *x: module.apply(v, *x, ROPE), variables, *given(B), on=h100)
    text = program.as_text()
    found = re.findall(r'= \(?(\w+)\[[\d,]+\].*"__cublas\$lt\$matmul\$f8".*"epilogue":"(\w+)"', text)
    double, single = 6 + 2 + 4, 3 + 1 + 2
    assert len(found) == double + single and Counter(found)["f8e4m3fn", "BIAS_GELU"] == 3
    assert {dtype for dtype, epilogue in found if epilogue != "BIAS_GELU"} == {"bf16"}
    # proj_out's second product is added to the first by itself, and neither's codes are cut out of a larger array.
    f8 = [line for line in text.splitlines() if '"__cublas$lt$matmul$f8"' in line]
    assert sorted(int(re.search(r'"beta":(\d)', line)[1]) for line in f8) == [0] * (len(f8) - 1) + [1]
    assert not re.findall(r"= f8e4m3fn\[3072,(?:3072|12288)\]\S* fusion\(", text)
    assert calls(text)["__cudnn$fmhaSoftmax"] == 2 and "wrapped_dot" not in text
    assert not re.findall(r"= f8e4m3fn\[[^\]]*\]\S* transpose", text)  # weights lie as the tensor cores take them
    assert program.memory_analysis().temp_size_in_bytes < 0.5e9  # 0.33; 0.44 from JAX 0.12 on, with the same products


@pytest.mark.slow
def test_forward_in_native_nvfp4():
    """For a B200: cuDNN's block-scaled product for each of the 14 + 6 Linears of the blocks and the last projection."""
    module, variables = low("nvfp4_native")
    on = card.mesh("b200")
    text = card.compiled(lambda v, *x: module.apply(v, *x, ROPE), variables, *given(B), on=on).as_text()
    scaled = re.findall(r'= \(?(\w+)\[[\d,]+\].*"__cudnn\$blockScaledDot"', text)
    assert scaled == ["bf16"] * 21 and "round-nearest-even" in text and "wrapped_dot" not in text


@pytest.mark.long
def test_a_whole_iteration_explores_in_fp8(tmp_path):
    """iteration_step at true width, one block of each kind: the scanned explorer's 18 FP8 products are there once, as
    alone, on each device of two; the gradient is summed over the devices and no weight is gathered."""
    devices = 2
    on = card.mesh("h100", devices)
    configs = flux_dev.configs(tmp_path)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        file = configs / name / "config.json"
        depth = {"num_layers": 1, "num_single_layers": 1, "num_hidden_layers": 1}
        raw = json.loads(file.read_text())
        file.write_text(json.dumps(raw | {k: v for k, v in depth.items() if k in raw}))
    few = {"prompts": str(devices), "candidates": "8", "kept": "4", "explore.chunk": "8", "regenerate.chunk": "4"}
    few |= {"learn.micro_batch": "4", "explore.precision": "fp8", "model.path": str(configs)}
    cfg = config.load("flux:sol_rl", few)
    found = shapes.read(cfg, devices)
    statics = {"model": found.model, "score": found.score, "optimizer": learn.make_optimizer(cfg), "cfg": cfg}
    step = functools.partial(iteration.iteration_step, **statics)
    prompts = shapes.batch(found.prompts, devices)
    text = card.compiled(step, shapes.blank(cfg, found), found.frozen, on=on, split=(prompts,)).as_text()
    made = calls(text)
    assert made["__cublas$lt$matmul$f8"] == 18
    assert made["__cudnn$fmhaSoftmaxBackward"] == 2 * 2  # of micro-batches with the reference, and without
    assert "all-reduce" in text and "all-gather" not in text


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
        again = 2 if jax.__version_info__ < (0, 12) else 1  # there one block's is not computed again
        assert found["__cudnn$fmhaSoftmaxBackward"] == 2
        assert found["__cudnn$fmhaSoftmax"] == (2 + again if remat else 2)
        temporary[remat] = program.memory_analysis().temp_size_in_bytes
    assert temporary[True] < temporary[False]


def test_programs_of_many_runs_have_no_triton_norms(h100):
    """`lab.COMPILER`: the norm that is one Triton kernel (test_rotary_norm) is others with it."""
    given = (heads(S + L), SCALE)
    program = card.compiled(lambda x, s: rope.rotary_norm(x, s, ROPE), *given, on=h100, options=lab.COMPILER)
    assert len(kernels(program)) >= 3 and set(kernels(program)) == {"loop"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "nvfp4_emulated"])
def test_a_run_explores_in_emulated_nvfp4_without_triton_norms(h100, tmp_path, precision):
    """The jitted stage of a run of the emoji world, where its platform is a GPU."""
    words = {"explore.precision": precision, "prompts": "1", "candidates": "4", "kept": "2", "explore.chunk": "4"}
    words |= {"regenerate.chunk": "2", "learn.micro_batch": "2", "learn.updates": "1"}
    cfg = shapes.with_configs(config.load("emoji:branch_clipscore", words), tmp_path)
    found = shapes.read(cfg, 1)
    with jax.set_mesh(h100):
        stages = iteration.programs(found.model, found.score, learn.make_optimizer(cfg), cfg)
        low = jax.eval_shape(stages["merged"], shapes.blank(cfg, found), found.frozen)
        given = low, jax.eval_shape(stages["quantised"], low, found.frozen), found.frozen
        given = *given, shapes.batch(found.prompts, 1), shapes.keys(1, 4)
        text = stages["explore"].lower(*given).compile(device.XLA_GPU).as_text()
    assert ("__triton" in text) == (precision == "bf16")


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_deterministic_program_adds_in_order(h100, deterministic):
    """Sums into places that are drawn are sorted first, instead of added as they come. What cuDNN does is not told."""

    def added(places, x):
        return jnp.zeros(64).at[places].add(x)

    place = NamedSharding(h100, sharding.WHOLE)
    given = (jax.ShapeDtypeStruct((1000,), dtype, sharding=place) for dtype in (jnp.int32, jnp.float32))
    with jax.set_mesh(h100):
        options = device.compiler_options("bf16", deterministic)
        text = jax.jit(added, compiler_options=options).lower(*given).compile(device.XLA_GPU).as_text()
    assert (" sort(" in text) == deterministic


def test_the_emoji_world_has_the_fused_attention(h100):
    """88 tokens in heads of 32, of two runs at once, as the lab trains them; forward and backward."""

    def loss(x):
        return jnp.sum(jax.vmap(lambda x: layers.attention(x, x, x))(x).astype(jnp.float32) ** 2)

    x = jax.ShapeDtypeStruct((2, 4, 88, 12, 32), jnp.bfloat16)
    found = calls(card.compiled(jax.grad(loss), x, on=h100).as_text())
    assert found["__cudnn$fmhaSoftmax"] == 1 and found["__cudnn$fmhaSoftmaxBackward"] == 1


def test_the_small_world_keeps_its_own_attention(h100):
    """40 tokens: no fused kernel; and without a mesh, or on a CPU's, nothing of this is chosen."""
    assert device.platform() == "cpu"
    with jax.set_mesh(h100):
        assert device.platform() == "gpu"
    with jax.set_mesh(sharding.make_mesh(1)):
        assert device.platform() == "cpu"
