"""What XLA makes of FLUX and SD3.5 at their true width for slices of TPUs, without one: fused attention in every block,
weights over four chips, gathered in the layers' loops."""

import functools
import math
import re

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
from tests.test_fsdp_compiled import SMALL, moved

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
    return module, tpu.laid(base, sharding.weights(base), on), [split(x) for x in inputs], more


def forward(name: str, batch: int, on) -> tpu.Program:
    module, base, inputs, more = network(name, batch, on)

    def f(base, *inputs):
        specs = sharding.weights(base), *[sharding.SPLIT] * len(inputs)
        own = lambda base, *x: module.apply({"params": base}, *x, *more)  # noqa: E731
        return sharding.over_data(own, specs, sharding.SPLIT)(base, *inputs)

    return tpu.Program(f, (base, *inputs))


def micro_step(name: str, batch: int, on) -> tpu.Program:
    """The gradient of a LoRA, beside a second policy that has none."""
    module, base, inputs, more = network(name, batch, on, remat=True)
    targets, cfg = {"flux": flux, "sd35": sd35}[name].LORA_TARGETS, Lora()
    adapter = jax.eval_shape(lambda base: lora.init(jax.random.key(0), base, targets, cfg), base)

    def f(adapter, base, *inputs):
        def own(adapter, base, *x):
            def velocity(adapter):
                return module.apply(lora.policy(base, adapter, cfg), *x, *more)

            old = velocity(jax.lax.stop_gradient(adapter))
            grad = jax.grad(lambda a: jnp.sum((velocity(a) - 2 * old).astype(jnp.float32) ** 2))
            return jax.lax.psum(grad(adapter), sharding.AXES)

        specs = sharding.WHOLE, sharding.weights(base), *[sharding.SPLIT] * len(inputs)
        return sharding.over_data(own, specs, sharding.WHOLE)(adapter, base, *inputs)

    return tpu.Program(f, (tpu.laid(adapter, sharding.WHOLE, on), base, *inputs))
