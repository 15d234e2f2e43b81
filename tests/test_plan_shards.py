"""The plan of frozen weights over several devices: bytes of each device, the choice of K, and what gathering moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import config, plan, quant, sharding, train
from solrl_jax.config import ConfigError
from solrl_jax.plan import cards, jaxpr, shapes, stages
from solrl_jax.run import assemble, checkpoint
from tests import flux_dev, nano

CARD = plan.Card(80, 989, 9.0)
BLOCKS = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 3 * 32 * 32 + 32 * 128 + 160 * 32
"""The numbers of nano's kernels of a double block (two streams of q, k, v, out and an MLP) and a single one."""
MODULATIONS = 2 * 32 * 192 + 32 * 96
TEXT = 4 * 16 * 16 + 3 * 16 * 32 + 2 * (4 * 16 * 16 + 2 * 16 * 32)
"""T5's one layer and CLIP's two."""
SHORT = ("encode", "quantise")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    low = config.Stage(steps=2, precision="fp8", chunk=4)  # which is traced faster than NVFP4
    return nano.build(tmp_path_factory.mktemp("nano"), encode_ahead=2, explore=low)


@pytest.fixture(scope="module")
def uses(cfg):
    """{K: {stage: its Use}} on four devices."""
    sizes = shapes.read(cfg, 4)
    some = {k: [plan.use_of(s, dataclasses.replace(cfg, shard=k), sizes, 4, CARD) for s in SHORT] for k in (1, 2, 4)}
    return {k: {use.stage: use for use in found} for k, found in some.items()}


@pytest.fixture
def short(monkeypatch):
    """A training on a card that has FP8, planned by two of its stages, which are traced fast."""
    monkeypatch.setattr(plan, "stages_of", lambda cfg: SHORT)
    monkeypatch.setattr(assemble, "capability", lambda: 8.9)


def most(some):
    return max(use.total + cards.SLACK * use.activations for use in some.values())


# --- bytes of a device ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_device_holds_its_part(cfg, uses, k):
    """The blocks' kernels over K, float32; their FP8 codes, without the modulations', are a byte a number, with four
    for the scale of each of 17 kernels. The other leaves are whole."""
    whole, mine, text = uses[1]["quantise"], uses[k]["quantise"], uses[k]["encode"]
    assert whole.weights - mine.weights == 4 * (BLOCKS + MODULATIONS) * (k - 1) // k
    assert (uses[1]["encode"].weights - whole.weights) - (text.weights - mine.weights) == 4 * TEXT * (k - 1) // k
    assert mine.merged == 4 * 7 * 32 * 32 // k
    assert mine.quantised == BLOCKS // k + 17 * 4
    assert mine.adapters == whole.adapters and mine.flops.total() * k == whole.flops.total()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_planned_bytes_are_those_of_placed_arrays(cfg, k):
    base, _, text = assemble.model_module(cfg).shapes(cfg.model)
    mesh = sharding.make_mesh(4, k)
    for tree in (base, text):
        placed = sharding.place(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree), mesh)
        on_one = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed))
        assert on_one == stages.held(tree, k) and (on_one < jaxpr.nbytes(tree)) == (k > 1)


def test_activations_are_those_of_one_device(uses):
    """With K devices K times the prompts are traced, of which each has its own."""
    one, two, four = (uses[k]["encode"] for k in (1, 2, 4))
    assert one.activations == two.activations == four.activations > 0
    assert one.flops == two.flops == four.flops and one.seconds == two.seconds == four.seconds
    wide = jaxpr.trace(lambda x: sharding.over_data(jnp.sort, (sharding.SPLIT,), sharding.SPLIT)(2 * x), X, shards=4)
    assert jaxpr.peak(wide) == 2 * 64 * 4  # 2 x and the result: a quarter of 256 numbers


X = jax.ShapeDtypeStruct((256,), jnp.float32)


# --- what a device receives -----------------------------------------------------------------------------------------


def test_received_bytes_of_collectives():
    """Of [8, 8] f32 over four: gathered, exchanged, scattered 3/4 of it; a sum twice that; five times in a loop."""

    def f(x):
        def on_device(x):
            def step(total, _):
                y = jax.lax.all_gather(x, sharding.FSDP, tiled=True)  # [8, 8]
                z = jax.lax.all_to_all(x, sharding.FSDP, split_axis=1, concat_axis=0, tiled=True)  # [8, 2]
                w = jax.lax.psum_scatter(y, sharding.FSDP, tiled=True)  # [2, 8]; what a gather is in a gradient
                return total + jax.lax.psum(y, sharding.AXES) + jnp.sum(z) + jnp.sum(w), None

            return jax.lax.scan(step, jnp.zeros((8, 8)), None, length=5)[0]

        return sharding.over_data(on_device, (sharding.SPLIT,), sharding.WHOLE)(x)

    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    assert jaxpr.received(jaxpr.trace(f, x, shards=4), 4) == 5 * (256 + 64 + 2 * 256 + 256) * 3 // 4
    assert jaxpr.received(jaxpr.trace(f, x), 1) == 0

    def shifted(x):
        pairs = [(i, (i + 1) % 4) for i in range(4)]
        move = sharding.over_data(
            lambda x: jax.lax.ppermute(x, sharding.FSDP, pairs), (sharding.SPLIT,), sharding.SPLIT
        )
        return move(x)

    with pytest.raises(jaxpr.CostError, match=r"ppermute, which moves data between devices: add it to SENT"):
        jaxpr.received(jaxpr.trace(shifted, x, shards=4), 4)


@pytest.mark.parametrize("k", [2, 4])
def test_received_bytes_of_stages(uses, k):
    """Encoding gathers every kernel of the encoders once. Quantising exchanges the blocks' parts by input, and the
    largest weight of 17 kernels."""
    assert uses[k]["encode"].received == 4 * TEXT * (k - 1) // k
    assert uses[k]["quantise"].received == 4 * BLOCKS // k * (k - 1) // k + 17 * (2 * 4 * (k - 1) // k)
    assert uses[1]["encode"].received == uses[1]["quantise"].received == 0


@pytest.mark.parametrize(("precision", "gigabytes"), [("bf16", 17.21), ("fp8", 8.61), ("nvfp4_emulated", 4.84)])
def test_received_bytes_of_flux_in_a_forward_pass(tmp_path, precision, gigabytes):
    """The kernels of the blocks without the modulations', whose results for 24 pictures are exchanged: .05 GB."""
    sizes = shapes.read(flux_dev.config(tmp_path, prompts=4), 4)
    base, model, k = sizes.frozen.base, sizes.model, 4
    variables = {"params": base}
    if precision != "bf16":
        rule = quant.rule_of(model.quant_rules, precision)
        variables["quant"] = jax.eval_shape(lambda base: quant.quantise_tree(base, rule, precision), base)
    noise = jax.eval_shape(lambda: model.noise(jax.random.key(0)))
    x, sigma = (jax.ShapeDtypeStruct((24 * k, *rest), jnp.float32) for rest in (noise.shape, ()))
    each = sharding.specs_of(variables), *[sharding.SPLIT] * 3
    program = jaxpr.trace(
        lambda *given: sharding.over_data(model.velocity, each, sharding.SPLIT)(*given),
        *(variables, x, sigma, shapes.batch(sizes.prompts.cond, 24 * k)),
        shards=k,
    )
    received = jaxpr.received(program, k) / 1e9
    assert received == pytest.approx(gigabytes * 3 / 4, rel=0.02) and received > 0.99 * gigabytes * 3 / 4


def test_seconds_of_links():
    """15.06 GB: BF16's forward pass on 8 devices."""
    found = [cards.transfer(15_060_000_000, plan.LINKS[name]) for name in ("NVLink", "PCIe 4 x16", "400 Gb/s a GPU")]
    assert found == pytest.approx([0.0418, 0.588, 0.335], rel=2e-3)
    use = plan.Use("explore", 0, 0, 0, 0, 0, jaxpr.Counter(), 2.0, 1, 360_000_000_000)
    rare = use._replace(stage="watch", every=20)
    assert plan.waiting([use, rare], plan.LINKS["NVLink"]) == pytest.approx(1.05)


# --- the choice -----------------------------------------------------------------------------------------------------


def shard_of(cfg, *args, **kwargs):
    """(K, lines for the log) of plan.settled."""
    found, said = plan.settled(cfg, *args, **kwargs)
    return found.shard, said


@pytest.mark.slow
def test_the_least_shard_that_fits_is_chosen(cfg, uses, short):
    whole, two, four = (most(uses[k]) for k in (1, 2, 4))
    assert whole > two > four
    assert shard_of(cfg, 4, 1e12) == shard_of(cfg, 4, None) == (1, [])
    for limit, host, k in ((two, 0, 2), (two - 1, 0, 4), (two - 1, 2, 2)):  # on a host of two, two are the most
        chosen, (said,) = shard_of(cfg, 4, limit, host=host)
        assert chosen == k and said.startswith(f"shard={k}: frozen weights are sharded over {k} devices")
        assert f"with whole weights encode would take about {plan._gb(uses[1]['encode'].total)} of" in said
    assert shard_of(dataclasses.replace(cfg, shard=4), 4, 1e12, host=2) == (4, [])  # as was asked for


@pytest.mark.slow
def test_nothing_that_fits_is_refused_with_numbers(cfg, uses, short):
    limit = 0.8 * most(uses[4])
    encode = plan._gb(uses[4]["encode"].total)
    with pytest.raises(ConfigError, match=rf"too small: encode does not fit: {encode} of .* see --mode=plan"):
        shard_of(cfg, 4, limit)
    with pytest.raises(ConfigError, match="too small: encode"):  # nor may another K be taken than the one asked for
        shard_of(dataclasses.replace(cfg, shard=1), 4, most(uses[2]))


def test_a_shard_that_does_not_divide_is_refused(cfg, short):
    for k in (3, 8):
        with pytest.raises(ConfigError, match=rf"shard={k} does not divide 4 devices .*: use one of \[1, 2, 4\]"):
            shard_of(dataclasses.replace(cfg, shard=k), 4, 1e12)
    with pytest.raises(ConfigError, match=r"shard=-1: 0 \(auto\), 1"):
        dataclasses.replace(cfg, shard=-1)


def test_a_run_that_does_not_fit_ends_before_anything_is_read(cfg, short, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "memory_limit", lambda: 3e5)
    monkeypatch.setattr(assemble, "open_weights", None)
    monkeypatch.setattr(assemble, "open_rewards", None)
    with pytest.raises(ConfigError, match=r"too small: encode does not fit: 0.* of 0.0003 GB"):
        train.train(cfg, tmp_path / "run", devices=4)
    assert not (tmp_path / "run").exists()


class Assembled(Exception):
    pass


def test_a_run_takes_the_chosen_shard(cfg, uses, short, tmp_path, monkeypatch):
    def assembled(cfg, devices, settled):
        raise Assembled(cfg.shard, devices, settled.shard)

    monkeypatch.setattr(plan, "memory_limit", lambda: float(most(uses[2])))
    monkeypatch.setattr(assemble, "assemble", assembled)
    with pytest.raises(Assembled) as found:
        train.train(cfg, tmp_path / "run", devices=4)
    assert found.value.args == (0, 4, 2)


@pytest.mark.slow
def test_drawing_is_planned_by_itself(cfg, monkeypatch, capsys):
    """Base and text encoders in parts, LoRA sets of the base and one policy; for samples there is no reward."""
    sizes, placed = shapes.read(cfg, 4, training=False), []
    monkeypatch.setattr(assemble, "open_weights", lambda cfg, mesh: placed.append(mesh.shape["fsdp"]) or ({}, {}, {}))
    whole = [plan.use_of(stage, cfg, sizes, 4, CARD) for stage in plan.DRAWING]
    assert whole[0].adapters == 2 * jaxpr.nbytes(shapes.blank(cfg, sizes).ema)
    monkeypatch.setattr(plan, "memory_limit", lambda: float(most({use.stage: use for use in whole}) - 1))
    assemble.for_evaluation(cfg, 4)
    assert "shard=2: frozen weights are sharded over 2 devices" in capsys.readouterr().out
    assemble.for_drawing(cfg, 4)
    assert placed == [2, 1] and capsys.readouterr().out == ""
    monkeypatch.setattr(plan, "memory_limit", lambda: 2e5)
    with pytest.raises(ConfigError, match="too small: encode does not fit"):
        assemble.for_drawing(cfg, 4)
    assert len(placed) == 2


@pytest.mark.long
def test_a_run_says_its_shard_and_keeps_auto(cfg, tmp_path, monkeypatch, capsys):
    """Its config and checkpoint have 0 (auto), so that a resume on other devices chooses anew."""
    monkeypatch.setattr(plan, "stages_of", lambda cfg: SHORT)
    emulated = config.override(cfg, **{"explore.precision": "nvfp4_emulated", "evaluate.every": "0"})
    once = config.override(emulated, iterations="1")
    monkeypatch.setattr(plan, "memory_limit", lambda: 6.4e5)  # quantising takes 6.7e5
    assert train.train(once, tmp_path / "run", devices=4) == 0
    assert "shard=2: frozen weights are sharded over 2 devices" in capsys.readouterr().out
    place = checkpoint.find(tmp_path / "run")[0]
    assert checkpoint.load_config(tmp_path / "run").shard == checkpoint.load_config(place).shard == 0
    monkeypatch.setattr(plan, "memory_limit", lambda: None)
    assert train.train(emulated, tmp_path / "run", resume=True, devices=2) == 0
    said = capsys.readouterr().out
    assert "going on from" in said and "shard=" not in said


# --- the report -----------------------------------------------------------------------------------------------------


def test_the_report_prices_each_link(cfg, uses):
    p = plan.Plan(dataclasses.replace(cfg, shard=2), 4, "RTX 4090 24GB", shapes.read(cfg, 4), (), ())
    use = plan.Use("explore", 0, 0, 0, 0, 0, jaxpr.Counter(), 10.0, 1, 360_000_000_000)
    lines = plan._network(p._replace(uses=(use, use._replace(stage="encode", received=10))))
    assert lines[0] == "shard=2: frozen weights are sharded over 2 devices"
    assert lines[1] == "gathering over NVLink: an iteration +1.0 s (5%): explore +1.0 s (10%)"
    assert lines[3] == "gathering over PCIe 4 x16: an iteration +14 s (70%): explore +14 s (141%)"
    assert len(lines) == 1 + len(plan.LINKS) and plan._network(p._replace(cfg=cfg)) == []
