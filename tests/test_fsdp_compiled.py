"""Weights over four H100s of a host, compiled without them: each layer's kernels are gathered in the layers' loops."""

import functools
import math
import re
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from experiments.tpu.compile import held, laid
from solrl_jax import config, device, iteration, learn, lora, quant, sharding
from solrl_jax.config import Lora
from solrl_jax.models import flux
from solrl_jax.models.flux import FluxConfig, FluxTransformer
from solrl_jax.plan import shapes
from solrl_jax.run import assemble
from solrl_jax.structs import Frozen
from tests import card

pytestmark = pytest.mark.usefixtures("optimised")

B, S, L = 8, 1024, 128  # of one card
CFG = FluxConfig(num_layers=2, num_single_layers=3)
ROPE = tuple(map(jnp.asarray, flux.rope_table(CFG, 32, 32, L)))
CARDS = 4
SMALL = 2**20  # bytes: the rows of a modulation, and sums of metrics


class Moved(NamedTuple):
    """A collective of a program: its operation, bytes of its result, and trips of the loop that it is in (0: none)."""

    kind: str
    bytes: int
    trips: int


_BYTES = {"f32": 4, "bf16": 2, "f8e4m3fn": 1, "u8": 1, "s32": 4, "u32": 4, "f64": 8, "pred": 1}


def moved(text: str) -> list[Moved]:
    """The collectives of a compiled program."""
    bodies = re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \()", text)
    trips = dict(re.findall(r'body=%?([\w.\-]+),.*?"known_trip_count":\{"n":"(\d+)"\}', text))
    found = []
    for body in bodies:
        name = body.removeprefix("ENTRY ").removeprefix("%").split(" ")[0]
        made = re.findall(
            r"= (.*?) (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(-start)?\(", body
        )
        for result, kind, start in made:
            arrays = [
                _BYTES[t] * math.prod(map(int, d.split(","))) for t, d in re.findall(r"(\w+)\[([\d,]+)\]", result)
            ]
            # What starts has its operands, then its results.
            total = sum(arrays[len(arrays) // 2 :]) if start else sum(arrays)
            found.append(Moved(kind, total, int(trips.get(name, 0))))
    return found


def compiled(f, *args, on):
    with jax.set_mesh(on):
        return jax.jit(f).lower(*args).compile(device.XLA_GPU)


@pytest.fixture(scope="module")
def cards():
    return card.mesh(devices=CARDS, shard=CARDS)


def forward_of(precision: str, mesh):
    """(a forward pass of a batch on each card, its arguments)"""
    module = FluxTransformer(CFG, jnp.bfloat16)
    rows = [(CARDS * B, S, 64), (CARDS * B, L, 4096), (CARDS * B, 768), (CARDS * B,), (CARDS * B,)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16 if len(shape) > 1 else jnp.float32) for shape in rows]
    spec = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x, ROPE)["params"], *inputs)
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), spec)
    variables = {"params": base}
    if precision != "bf16":
        rule = quant.rule_of(flux.quant_rules(CFG, 1000), precision)
        variables["quant"] = jax.eval_shape(lambda base: quant.quantise_tree(base, rule, precision), base)

    def forward(variables, *inputs):
        def own(variables, *inputs):
            return module.apply(variables, *inputs, ROPE)

        specs = sharding.specs_of(variables), *[sharding.SPLIT] * len(inputs)
        return sharding.over_data(own, specs, sharding.SPLIT)(variables, *inputs)

    where = sharding.specs_of(variables)
    return forward, (laid(variables, where, mesh), *(laid(x, sharding.SPLIT, mesh) for x in inputs))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_forward(cards, precision):
    """A layer's kernels are gathered in its loop, in the precision in which they are used; nothing large outside."""
    forward, args = forward_of(precision, cards)
    program = compiled(forward, *args, on=cards)
    text, layers = program.as_text(), {CFG.num_layers: 0, CFG.num_single_layers: 0}
    for kind, size, trips in moved(text):
        assert kind in ("all-gather", "all-to-all"), kind
        assert trips in layers or size < SMALL, (kind, size, trips)
        if trips in layers and kind == "all-gather":
            layers[trips] += size
    width, each = 3072, 1 if precision == "fp8" else 2
    double, single = (8 + 16) * width**2, (3 + 4 + 5) * width**2  # of q, k, v, out and the MLPs
    assert layers[2] == pytest.approx(each * double, rel=0.01) and layers[3] == pytest.approx(each * single, rel=0.01)
    # Without modulations' exchange they would be gathered too: 12 and 3 width^2 more.
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes <= held(args)  # of the whole models a fourth: test_stages_of_the_public_models
    # Cut by output XLA would transpose its part of every stack.
    assert memory.temp_size_in_bytes < 1.2e9
    assert not re.search(rf"= bf16\[{CFG.num_single_layers},[\d,]+\]\S* (transpose|copy)\(", text)


def _leaves(tree):
    return [("/".join(k.key for k in path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.long
def test_gradient(cards):
    """What is gathered is gathered again in the backward pass, not kept: the gathered kernels of all layers would be
    1.6 GB more."""
    cfg, module = Lora(), FluxTransformer(CFG, jnp.bfloat16, remat=False)
    _, (variables, *_) = forward_of("bf16", cards)
    adapter = jax.eval_shape(
        lambda base: lora.init(jax.random.key(0), base, flux.LORA_TARGETS, cfg), variables["params"]
    )

    def gradient(adapter, base, *inputs):
        def own(adapter, base, *inputs):
            def loss(adapter):
                v = module.apply(lora.policy(base, adapter, cfg), *inputs, ROPE)
                return jnp.sum(v.astype(jnp.float32) ** 2)

            return jax.lax.psum(jax.grad(loss)(adapter), sharding.AXES)

        specs = sharding.WHOLE, sharding.specs_of(base), *[sharding.SPLIT] * len(inputs)
        return sharding.over_data(own, specs, sharding.WHOLE)(adapter, base, *inputs)

    found = {}
    for shard in (1, CARDS):
        mesh = card.mesh(devices=CARDS, shard=shard)
        _, (variables, *inputs) = forward_of("bf16", mesh)
        program = compiled(gradient, laid(adapter, sharding.WHOLE, mesh), variables["params"], *inputs, on=mesh)
        found[shard] = program.memory_analysis().temp_size_in_bytes
        sizes = [m for m in moved(program.as_text()) if m.kind == "all-gather" and m.bytes > SMALL]
        assert all(m.trips in (2, 3) for m in sizes)
        # Forward and backward pass; recomputing a block gathers for both at once.
        layer = 2 * 3072**2 * (24 + 12)
        assert sum(m.bytes for m in sizes) == pytest.approx((shard > 1) * 2 * layer, rel=0.15)
    assert found[CARDS] - found[1] < 0.8e9


@pytest.mark.long
@pytest.mark.parametrize("name", ["flux", "sd35"])
def test_stages_of_the_public_models(name):
    """Merging sends nothing; quantising to FP8, exploring and learning move kernels in the layers' loops alone; base,
    merged and quantised kernels are a fourth on each card. FLUX.1 explores and learns for the others, whose kernels are
    merged and quantised alone."""
    mesh = card.mesh(devices=CARDS, shard=CARDS)
    with tempfile.TemporaryDirectory() as folder:
        cfg = shapes.with_configs(config.load(name, {"prompts": str(CARDS), "evaluate.every": "0"}), folder)
        cfg = assemble.resolved(cfg, 9.0)
        sizes = shapes.read(cfg, 1)
    cut = [x for path, x in _leaves(sizes.frozen.base) if sharding.spec(path, x.ndim) != sharding.WHOLE]
    layers, last = {x.shape[0] for x in cut}, sum(2 * x.size for x in cut if x.shape[0] == 1)
    run = iteration.stages(sizes.model, sizes.score, learn.make_optimizer(cfg), cfg)
    base = laid(sizes.frozen.base, sharding.specs_of(sizes.frozen.base), mesh)
    whole = (laid(tree, sharding.WHOLE, mesh) for tree in (sizes.frozen.vae, sizes.frozen.rewards))
    frozen, state = Frozen(base, *whole), laid(shapes.blank(cfg, sizes), sharding.WHOLE, mesh)
    split = functools.partial(laid, where=sharding.SPLIT, on=mesh)
    prompts = split(shapes.batch(sizes.prompts, CARDS))
    with jax.set_mesh(mesh):
        kernels = jax.eval_shape(run.merged, state, frozen)
        kernels = laid(kernels, sharding.specs_of(kernels), mesh)
        low = jax.eval_shape(run.quantised, kernels, frozen)
        low = laid(low, sharding.specs_of(low), mesh)
    keys, samples = split(shapes.keys(CARDS, cfg.candidates)), split(shapes.samples(cfg, sizes, CARDS, cfg.kept))
    programs = {
        "merged": (run.merged, state, frozen),
        "quantise": (run.quantised, kernels, frozen),
        "explore": (run.explore, kernels, low, frozen, prompts, keys),
        "learn": (run.learn, state, frozen, prompts.cond, samples),
    }
    for path, x in (("base", base), ("merged", kernels), ("quantised", low)):
        parts, total = held(x), sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(x))
        assert parts < (1 / CARDS + 0.03) * total, path
    for stage, (f, *args) in programs.items():
        if stage in ("explore", "learn") and name != "flux":
            continue
        program = compiled(f, *args, on=mesh)
        sent = [m for m in moved(program.as_text()) if m.bytes > SMALL]
        if stage == "merged":
            assert not sent
            continue
        gathers = [m for m in sent if m.kind != "all-reduce"]
        # A stack of one layer has no loop: SD3.5's last block is quantised in none.
        assert gathers and all(m.trips or (1 in layers and stage == "quantise") for m in gathers), stage
        alone = sum(m.bytes for m in gathers if m.trips not in layers)
        assert alone == 0 if 1 not in layers else alone < 3 * last, (stage, alone)
        assert program.memory_analysis().argument_size_in_bytes <= held(args), stage
