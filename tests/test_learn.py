"""Gradients to the LoRA: clipping, rate, bad gradients, which samples an update takes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import config, learn
from solrl_jax.algos import Sample
from solrl_jax.learn import apply_gradients, samples_at_a_time, split_over_updates
from solrl_jax.plan import jaxpr
from solrl_jax.run import assemble
from solrl_jax.selection import take
from solrl_jax.structs import Frozen, Hyper, Rollout, TrainState
from tests import nano
from tests.nano import numbers, parts_of
from tests.tiers import long, slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nano")


def test_a_bad_gradient_changes_nothing_and_is_counted(folder):
    parts = parts_of(nano.build(folder))
    with jax.set_mesh(parts.mesh):
        state = assemble.fresh(parts)
        step = jax.jit(lambda s, g: apply_gradients(s, g, parts.optimizer, parts.cfg))
        bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.lora)
        after, norm = step(*step(state, bad)[:1], bad)
        good, _ = step(after, jax.tree.map(jnp.ones_like, state.lora))
    assert not np.isfinite(norm) and int(after.skipped) == 2 and int(after.updates) == 0
    for name in ("lora", "ema", "moments", "old"):
        np.testing.assert_array_equal(numbers(getattr(after, name)), numbers(getattr(state, name)))
    assert int(good.skipped) == 0 and int(good.updates) == 1 and np.any(numbers(good.lora) != numbers(state.lora))


def test_skipped_updates_in_a_row_are_counted_within_an_iteration(folder, monkeypatch):
    """Of four updates the first three are not finite. The fourth is taken, and the means are its own."""

    def gradients(state, *rest, **statics):
        bad = state.skipped + 2 * state.updates < 3  # until three are skipped
        return {"w": jnp.where(bad, jnp.nan, jnp.ones(2))}, {"loss": jnp.where(bad, jnp.nan, 2.0)}

    monkeypatch.setattr(learn, "gradients", gradients)
    cfg = config.Config(kept=4, learn=config.Learn(updates=4, learning_rate=0.1))
    optimizer, adapter, zero = learn.make_optimizer(cfg), {"w": jnp.zeros(2)}, jnp.zeros((), jnp.int32)
    hyper = Hyper(*(jnp.asarray(getattr(cfg.learn, name), jnp.float32) for name in Hyper._fields))
    key, moments = jax.random.key(0), optimizer.init(adapter)
    state = TrainState(zero, zero, zero, key, adapter, adapter, adapter, moments, hyper, zero)
    reward = jnp.arange(4.0)[None]
    samples = Rollout(jax.random.split(key, (1, 4)), reward[..., None, None, None], reward, {})
    statics = {"model": parts_of(nano.build(folder)).model, "optimizer": optimizer, "cfg": cfg}
    new, metrics = learn.learn(state, Frozen({}, {}, {}), {"c": jnp.zeros((1, 3))}, samples, **statics)
    assert [int(x) for x in (new.skipped, new.updates, metrics["skipped"], metrics["skipped_in_a_row"])] == [0, 1, 3, 3]
    assert float(metrics["loss"]) == 2 and float(metrics["grad_norm"]) == pytest.approx(2**0.5)


def test_clipping_and_rate(folder):
    """AdamW's first step moves every weight by the rate, whatever the clipped norm; the norm is reported unclipped."""
    parts = parts_of(nano.build(folder))
    with jax.set_mesh(parts.mesh):
        state = assemble.fresh(parts)
        grads = jax.tree.map(lambda x: 100.0 * jnp.ones_like(x), state.lora)
        after, norm = apply_gradients(state, grads, parts.optimizer, parts.cfg)
    size = len(numbers(state.lora))
    assert float(norm) == pytest.approx(100 * size**0.5, rel=1e-5)
    decayed = numbers(state.lora) * (1 - 1e-3 * 1e-4)
    np.testing.assert_allclose(decayed - numbers(after.lora), 1e-3, rtol=1e-3)
    np.testing.assert_allclose(
        numbers(after.ema), numbers(state.lora) + 9 / 11 * (numbers(after.lora) - numbers(state.lora)), atol=1e-6
    )


def test_updates_take_disjoint_parts_of_every_prompt():
    """Each of 4 updates has one of the prompt's 4 best and one of its 4 worst; another epoch has others."""
    keys = jax.random.split(jax.random.key(0), (3, 8))
    reward = jax.random.normal(jax.random.key(1), (3, 8))
    index = np.asarray(split_over_updates(keys, reward, 0, 4))
    assert index.shape == (4, 3, 2)
    rank = np.argsort(np.argsort(reward, axis=1), axis=1)
    for prompt in range(3):
        assert sorted(index[:, prompt].ravel().tolist()) == list(range(8))
        assert np.array_equal(rank[prompt][index[:, prompt]] >= 4, [[False, True]] * 4)
    assert not np.array_equal(index, split_over_updates(keys, reward, 1, 4))
    assert np.array_equal(split_over_updates(keys, reward, 0, 1)[0], np.argsort(reward, axis=1))


def test_a_micro_batch_that_does_not_divide_a_device_is_refused(folder):
    learn = config.Learn(timestep_fraction=0.7, micro_batch=12)
    cfg = dataclasses.replace(nano.build(folder), prompts=6, learn=learn)
    assert samples_at_a_time(cfg, 24) == 6 and samples_at_a_time(cfg, 3) == 3  # at most 6
    with pytest.raises(
        config.ConfigError, match=r"learn\.micro_batch=12 takes 6 samples at a time, but a device holds 8"
    ):
        parts_of(cfg, 3)


# --- the reference on every m-th micro-batch ---


@functools.cache
def update_of(cfg, devices: int = 1):
    """(jitted gradient of (state, the state as the iteration began), its arguments): a policy away from the base."""
    parts = parts_of(cfg, devices)
    with jax.set_mesh(parts.mesh):
        state, prompts, keys = nano.begun(parts)
        away = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), state.lora)
        state = state._replace(lora=away)
        keys = keys[:, :4]
        x0 = jax.random.normal(jax.random.key(3), (*keys.shape, *jax.eval_shape(parts.model.noise, keys[0, 0]).shape))
        advantage = jax.random.normal(jax.random.key(4), keys.shape)
    run = jax.jit(functools.partial(learn.gradients, model=parts.model, cfg=parts.cfg))
    return parts.mesh, run, (state, state, parts.frozen, prompts.cond, keys, Sample(x0), advantage)


def with_reference(folder, every: int, kl_weight: float = 0.5, micro_batch: int = 2, **fields):
    how = config.Learn(
        timestep_fraction=0.7, updates=1, micro_batch=micro_batch, kl_weight=kl_weight, reference_every=every, **fields
    )
    return dataclasses.replace(nano.build(folder), learn=how)


@pytest.mark.parametrize("micro_batch", [slow(2), long(1)])  # a sample, half of its times
def test_the_reference_on_every_fourth_micro_batch_is_right_in_the_mean(folder, micro_batch):
    """Over the four phases gradient and metrics are those with the reference everywhere; a single phase's are not."""
    whole, some = (update_of(with_reference(folder, every, micro_batch=micro_batch)) for every in (1, 4))
    with jax.set_mesh(whole[0]):
        exact, metrics = whole[1](*whole[2])
        state, *rest = some[2]
        found = [some[1](state._replace(updates=jnp.int32(n)), *rest) for n in range(4)]
    mean = jax.tree.map(lambda *x: sum(x) / 4, *found)
    size = np.abs(numbers(exact)).max()
    np.testing.assert_allclose(numbers(mean[0]), numbers(exact), rtol=0, atol=1e-5 * size)
    assert np.abs(numbers(found[0][0]) - numbers(exact)).max() > 1e-2 * size
    assert set(mean[1]) == set(metrics)
    for name, value in metrics.items():
        assert float(mean[1][name]) == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.slow
def test_every_update_of_an_iteration_gets_every_phase(folder):
    """With as many updates as phases, an update is not given the same micro-batches in every iteration."""
    run = update_of(with_reference(folder, 4))
    with jax.set_mesh(run[0]):
        state, *rest = run[2]
        kl = [float(run[1](state._replace(updates=jnp.int32(n)), *rest)[1]["kl_div"]) for n in (0, 4, 8, 12, 16)]
    assert len({round(x, 7) for x in kl[:4]}) == 4 and kl[4] == pytest.approx(kl[0], rel=1e-6)


@pytest.mark.slow
def test_an_update_has_the_reference_on_samples_of_every_rank(folder):
    """16 samples of four prompts, in the order of their rewards: one of each rank has it, in every phase."""
    mesh, run, (state, _, frozen, cond, keys, made, advantage) = update_of(with_reference(folder, 4))
    with jax.set_mesh(mesh):
        whole = update_of(with_reference(folder, 1))[1]
        for n in range(4):
            at = state._replace(updates=jnp.int32(n))
            kl = float(run(at, state, frozen, cond, keys, made, advantage)[1]["kl_div"])
            # The same mean from four updates of one sample a prompt, of the ranks that this phase should have.
            ranks = (n + jnp.arange(4)[:, None]) % 4
            key, x0, good = (take(x, ranks) for x in (keys, made.x0, advantage))
            expect = float(whole(at, state, frozen, cond, key, Sample(x0), good)[1]["kl_div"])
            assert kl == pytest.approx(expect, rel=1e-5)


@pytest.mark.slow
def test_the_choice_of_micro_batches_does_not_depend_on_the_devices(folder):
    one, two = (update_of(with_reference(folder, 4), devices) for devices in (1, 2))
    for n in (1, 2):
        found = []
        for mesh, run, (state, _, frozen, *rest) in (one, two):
            with jax.set_mesh(mesh):
                found.append(jax.device_get(run(state._replace(updates=jnp.int32(n)), state, frozen, *rest)))
        np.testing.assert_allclose(numbers(found[0]), numbers(found[1]), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_what_the_reference_costs(folder):
    """A third of the forward passes belongs to it: m = 4 saves three quarters of that, no KL all of it.

    A point takes one pass of each of three policies, and a backward pass of the trained one.
    """

    def cost(cfg) -> float:
        mesh, run, args = update_of(cfg)
        with jax.set_mesh(mesh):
            return sum(jaxpr.flops(jaxpr.trace(run, *args)).values())

    whole, fourth, none = (cost(with_reference(folder, *how)) for how in ((1,), (4,), (1, 0.0)))
    assert none < fourth < whole and (whole - fourth) / (whole - none) == pytest.approx(0.75, abs=1e-3)
    assert 0.15 < 1 - none / whole < 0.25


@pytest.mark.slow
def test_without_a_weight_there_is_no_reference(folder):
    """The gradient is the one that a penalty of weight zero gives; kl_div is not measured."""
    zero, none = update_of(with_reference(folder, 1)), update_of(with_reference(folder, 4, 0.0))
    with jax.set_mesh(zero[0]):
        state, *rest = zero[2]
        exact, _ = zero[1](state._replace(hyper=state.hyper._replace(kl_weight=jnp.float32(0))), *rest)
        found, metrics = none[1](*none[2])
    np.testing.assert_allclose(numbers(found), numbers(exact), rtol=0, atol=1e-6 * np.abs(numbers(exact)).max())
    assert "kl_div" not in metrics and "policy_loss" in metrics


def test_a_penalty_that_the_program_leaves_out_is_refused(folder):
    cfg = with_reference(folder, 1, 0.0)
    state = assemble.fresh(parts_of(cfg))
    learn.check_hyper(state.hyper, cfg)
    other = state.hyper._replace(kl_weight=jnp.asarray([0.0, 0.25]))
    with pytest.raises(config.ConfigError, match=r"hyper\.kl_weight=0\.25, but with learn\.kl_weight=0 the reference"):
        learn.check_hyper(other, cfg)
    learn.check_hyper(other, with_reference(folder, 1))


def test_a_reference_that_does_not_divide_is_refused(folder):
    """Of 16 samples' 32 points, 16 micro-batches on one device and 4 on each of four."""
    cfg = with_reference(folder, 8)
    assert learn.micro_batches(cfg, 16) == 16
    with pytest.raises(
        config.ConfigError, match=r"learn\.reference_every=8 does not divide the 4 .*: use one of \[1, 2, 4"
    ):
        parts_of(cfg, 4)
    assert learn.micro_batches(with_reference(folder, 8, 0.0), 4) == 4  # no reference, nothing to divide
    with pytest.raises(config.ConfigError, match=r"learn\.reference_every=0: give 1 or more"):
        config.Learn(reference_every=0)


def test_full_size_configs_have_the_reference_on_one_in_four():
    found = {name: config.load(name).learn.reference_every for name in ("flux", "sd35", "sana", "tiny")}
    assert found == {"flux": 4, "sd35": 4, "sana": 3, "tiny": 1}
    assert config.load("flux:awm").learn.reference_every == 1
