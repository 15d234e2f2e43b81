"""What XLA makes of FLUX and SD3.5 at their true width for slices of TPUs, without one: fused attention in every block,
weights over four chips, gathered in the layers' loops."""

import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from experiments.tpu import compile as tpu
from solrl_jax import lora, sharding
from solrl_jax.config import Lora
from solrl_jax.models import flux, layers, sd35
from solrl_jax.models.flux import FluxConfig, FluxTransformer
from solrl_jax.models.sd35 import Sd35Config, Sd35Transformer
from solrl_jax.weights import from_config

pytestmark = pytest.mark.usefixtures("optimised")

pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu")

SHARD, L = 4, 128
FLUX = FluxConfig(num_layers=2, num_single_layers=3)
ROPE = tuple(map(jnp.asarray, flux.rope_table(FLUX, 32, 32, L)))
LARGE = next(iter(sd35.PUBLIC.values()))["transformer/config.json"]
SD35 = from_config(Sd35Config, "memory", LARGE | {"num_layers": 3})
"""Its last block is a stack of its own: the others' loop has two trips."""
NETWORKS = {  # the network, its inputs' shapes for B images, others of its arguments, the layers of its loops
    "flux": (FluxTransformer, FLUX, ((1024, 64), (L, 4096), (768,), (), ()), (ROPE,), (2, 3)),
    "sd35": (Sd35Transformer, SD35, ((128, 128, 16), (L + 77, 4096), (2048,), ()), (), (2,)),
}


def network(name: str, batch: int, on, remat: bool = False):
    """(module, its base, inputs of `batch` images a chip, other arguments), laid out over the slice."""
    kind, cfg, shapes, more, _ = NETWORKS[name]
    module, rows = kind(cfg, jnp.bfloat16, remat), [(batch * on.size, *shape) for shape in shapes]
    inputs = [jax.ShapeDtypeStruct(s, jnp.bfloat16 if len(s) > 1 else jnp.float32) for s in rows]
    spec = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x, *more)["params"], *inputs)
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), spec)
    split = functools.partial(tpu.laid, where=sharding.SPLIT, on=on)
    return module, tpu.laid(base, sharding.specs_of(base), on), [split(x) for x in inputs], more


def forward(name: str, batch: int, on) -> tpu.Program:
    module, base, inputs, more = network(name, batch, on)

    def f(base, *inputs):
        def own(base, *x):
            return module.apply({"params": base}, *x, *more)

        specs = sharding.specs_of(base), *[sharding.SPLIT] * len(inputs)
        return sharding.over_data(own, specs, sharding.SPLIT)(base, *inputs)

    return tpu.Program(f, (base, *inputs))


def micro_step(name: str, batch: int, on) -> tpu.Program:
    """The gradient of a LoRA."""
    module, base, inputs, more = network(name, batch, on, remat=True)
    targets, cfg = {"flux": flux, "sd35": sd35}[name].LORA_TARGETS, Lora()
    adapter = jax.eval_shape(lambda base: lora.init(jax.random.key(0), base, targets, cfg), base)

    def f(adapter, base, *inputs):
        def own(adapter, base, *x):
            def loss(adapter):
                v = module.apply(lora.policy(base, adapter, cfg), *x, *more)
                return jnp.sum(v.astype(jnp.float32) ** 2)

            return jax.lax.psum(jax.grad(loss)(adapter), sharding.AXES)

        specs = sharding.WHOLE, sharding.specs_of(base), *[sharding.SPLIT] * len(inputs)
        return sharding.over_data(own, specs, sharding.WHOLE)(adapter, base, *inputs)

    return tpu.Program(f, (tpu.laid(adapter, sharding.WHOLE, on), base, *inputs))


def gathered(text: str) -> dict[str, int]:
    """{loop's body, or "" outside of all: bytes that all-gathers make there in a trip}"""
    bodies, found = set(re.findall(r"body=%?([\w.\-]+)", text)), Counter()
    for computation in re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \()", text):
        name = computation.removeprefix("ENTRY ").removeprefix("%").split(" ")[0]
        for dtype, dims in re.findall(r"= (bf16|f32)\[([\d,]+)\]\S* all-gather\(", computation):
            size = {"bf16": 2, "f32": 4}[dtype] * math.prod(map(int, dims.split(",")))
            found[name if name in bodies else ""] += size
    return dict(found)


def checked(program: tpu.Program, on, tokens: int) -> tuple[int, list[int], int, float]:
    """(Pallas kernels, MB gathered in a trip of each loop, MB gathered outside, GB of temporaries), once there are no
    scores in memory and a chip's arguments are its own part of the kernels."""
    made = tpu.compiled(program, on)
    text, memory = made.as_text(), made.memory_analysis()
    assert not re.search(rf"\[[\d,]*{tokens},{tokens}\]", text)
    assert memory.argument_size_in_bytes < 1.01 * tpu.held(program.given) + 1e7  # layouts pad small arrays
    found = gathered(text)
    alone = found.pop("", 0) // 10**6
    return tpu.kernels_in(text), sorted(n // 10**6 for n in found.values()), alone, memory.temp_size_in_bytes / 1e9


DOUBLE, SINGLE = (2 * 3072**2 * n // 10**6 for n in (8 + 16, 3 + 4 + 5))
"""MB of a FLUX block's kernels: q, k, v, out and the MLPs. Modulations are exchanged, not gathered."""


def near(found: list[int], wanted: list[int]) -> bool:
    """Equal to 1 MB: rows of modulations are gathered too."""
    return len(found) == len(wanted) and all(abs(a - b) <= 1 for a, b in zip(found, wanted, strict=True))


@pytest.mark.slow
def test_forward_of_flux():
    """Four images a chip: a kernel a block, whose scores would take 0.5 GB in f32 and as much again in the softmax."""
    on = tpu.mesh("v6e:2x4", SHARD)
    kernels, loops, alone, temporary = checked(forward("flux", 4, on), on, 1024 + L)
    assert kernels == 2 and near(loops, [SINGLE, DOUBLE]) and alone <= 1
    assert temporary < 0.8  # 0.61; 0.54 with XLA's default effort


@pytest.mark.slow
def test_micro_step_of_flux():
    """Forward, and in the backward pass again with its two kernels: four a block; a block gathers anew to recompute."""
    on = tpu.mesh("v5p:2x2x1", SHARD)
    kernels, loops, alone, temporary = checked(micro_step("flux", 4, on), on, 1024 + L)
    assert kernels == 2 * 4 and near(loops, [SINGLE, SINGLE, DOUBLE, DOUBLE]) and alone <= 1
    assert temporary < 1.6


@pytest.mark.long
def test_micro_step_of_sd35():
    """4096 + 205 tokens, padded to 4352. The last block has no loop of its own, and is gathered outside."""
    on = tpu.mesh("v6e:2x4", SHARD)
    kernels, loops, alone, temporary = checked(micro_step("sd35", 1, on), on, 4352)
    block, last = (2 * 2432**2 * n // 10**6 for n in (8 + 16, 7 + 8))
    assert kernels == 2 * 4 and near(loops, [block, block]) and alone <= 2 * last + 1
    assert temporary < 2.6


@pytest.mark.slow
def test_remat_keeps_the_fused_attention():
    """If "attention" is kept, the forward kernel runs once, beside the backward pass's two; else it runs again."""
    on = tpu.mesh("v5p:2x2x1", SHARD)
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 512, 512), (3, 512, 512)))

    def kernels(kept: tuple[str, ...]) -> int:
        @functools.partial(jax.checkpoint, policy=layers.keeping(kept))
        def block(w, x):
            q, k, v = ((x @ each).reshape(*x.shape[:2], 4, 128) for each in w)
            return layers.attention(q, k, v).reshape(x.shape)

        def grad(w, x):
            return jax.grad(lambda w: jnp.sum(block(w, x).astype(jnp.float32) ** 2))(w)

        def own(w, x):
            return sharding.over_data(grad, (sharding.WHOLE, sharding.WHOLE), sharding.WHOLE)(w, x)

        program = tpu.Program(own, tpu.laid((w, x), sharding.WHOLE, on))
        return tpu.kernels_in(tpu.compiled(program, on).as_text())

    assert (kernels(("attention",)), kernels(())) == (3, 4)
