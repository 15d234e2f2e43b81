"""Keys to samples: a sample is its key, blocks of any size, each device its share; and a branch, which begins with the
preview's state."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import config, iteration, sampler
from solrl_jax.config import Branch, Stage
from solrl_jax.keys import sample_keys
from solrl_jax.rollout import block_shape, branched, noises, policy_variables, rolled, rollout, sigmas_of
from solrl_jax.run import assemble, data, guards, watch
from solrl_jax.selection import fidelity, take
from tests import nano
from tests.nano import STATICS, begun, numbers, parts_of, statics_of
from tests.tiers import long, slow

BRANCH = {
    "explore": Stage(steps=4, precision="nvfp4_emulated", chunk=4),
    "branch": Branch(after=2, steps=3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nano")


def staged_of(parts):
    return iteration.Staged(**dict(zip(STATICS, statics_of(parts), strict=True)))


def step_of(parts):
    return functools.partial(iteration.iteration_step, **dict(zip(STATICS, statics_of(parts), strict=True)))


@pytest.mark.parametrize("solver", [slow("dpm2"), long("euler")])
def test_two_bf16_halves_are_one_solve(folder, solver):
    """Preview and rest in one precision are the combined table's solve, to the bit on a CPU; and the preview's rewards
    are those of a rollout that keeps no state."""
    cfg = nano.build(folder, **BRANCH)
    halves = (cfg.explore, cfg.regenerate)
    explore, regenerate = (dataclasses.replace(half, solver=solver, precision="bf16") for half in halves)
    parts = parts_of(dataclasses.replace(cfg, explore=explore, regenerate=regenerate))
    model, branch = parts.model, branched(parts.model, parts.cfg)
    with jax.set_mesh(parts.mesh):
        _, prompts, keys = begun(parts)
        given = {}, None, parts.frozen, prompts, keys  # no adapted kernels: the base
        roll = functools.partial(rolled, model=model, score=parts.score)
        preview = jax.jit(functools.partial(roll, stage=explore, branch=branch))(*given)
        samples = jax.jit(functools.partial(roll, stage=regenerate, branch=branch))(*given, preview.state)
        alone = jax.jit(functools.partial(roll, stage=explore))(*given)
        table = sampler.table(branch.sigmas, solver)
        noise = jax.tree.map(
            lambda x: x.reshape(4, 8, *x.shape[1:]), sampler.at_noise(noises(model, keys.reshape(-1)), table)
        )
        whole = jax.jit(functools.partial(roll, stage=regenerate, branch=branch._replace(after=0)))(*given, noise)
    assert preview.x0 is None and preview.state.x.shape == alone.x0.shape == (4, 8, 8, 8, 4)
    assert len(preview.state.x0hats) == (solver == "dpm2")
    np.testing.assert_array_equal(preview.reward, alone.reward)
    np.testing.assert_array_equal(samples.x0, whole.x0)
    np.testing.assert_array_equal(samples.reward, whole.reward)
    assert np.abs(np.asarray(samples.x0) - np.asarray(alone.x0)).max() > 1e-3  # the rest has its own sigmas


@pytest.mark.slow
def test_a_sample_is_its_key_and_its_state(folder):
    """Any subset, in any order and in blocks of another size, goes on to the same samples."""
    parts = parts_of(nano.build(folder, **BRANCH))
    run = iteration.stages(*statics_of(parts))
    with jax.set_mesh(parts.mesh):
        state, prompts, keys = begun(parts)
        kernels = run.merged(state, parts.frozen)
        low = run.quantised(kernels, parts.frozen)
        preview = jax.jit(run.explore)(kernels, low, parts.frozen, prompts, keys)
        rest = jax.jit(lambda keys, at: run.regenerate(kernels, None, parts.frozen, prompts, keys, at))
        everything = rest(keys, preview.state)
        index = jnp.array([[3, 1, 7, 0], [0, 1, 2, 3], [7, 6, 5, 4], [2, 4, 6, 0]])
        some = rest(*jax.tree.map(lambda x: take(x, index), (keys, preview.state)))
    np.testing.assert_allclose(some.x0, take(everything.x0, index), atol=2e-6)
    np.testing.assert_allclose(some.reward, take(everything.reward, index), atol=1e-6)


@functools.cache
def by_one_program(cfg):
    parts = parts_of(cfg)
    with jax.set_mesh(parts.mesh):
        state, prompts, _ = begun(parts)
        step = jax.jit(step_of(parts))
        return step(state, parts.frozen, prompts)


@pytest.mark.parametrize("devices", [slow(1), long(4)])
def test_staged_equals_whole(folder, devices):
    """To the bit on one device. And the states of candidates that are not kept are gone: when a block is done only the
    kept of it, of those before it and, on several devices, of the one that is enqueued are held."""
    parts, seen = parts_of(nano.build(folder, **BRANCH), devices), []
    with jax.set_mesh(parts.mesh):
        state, prompts, _ = begun(parts)
        staged = staged_of(parts)
        there = jax.live_arrays()

        def states(stage, share):
            known = {id(y) for y in there}
            if stage == "explore":
                seen.append(sorted(x.shape[:2] for x in jax.live_arrays() if id(x) not in known and x.ndim == 5))

        new, metrics = staged(state, parts.frozen, prompts, {}, states)
    kept = (devices, 4)  # a prompt a device, x and one x0hat of the 4 kept of 8
    blocks = 4 // devices
    assert seen == [[kept, kept] * min(i + (1 if devices == 1 else 2), blocks) for i in range(blocks)]
    expect, expect_metrics = by_one_program(nano.build(folder, **BRANCH))
    if devices == 1:
        np.testing.assert_array_equal(numbers(new.lora), numbers(expect.lora))
        assert {k: float(v) for k, v in metrics.items()} == {k: float(v) for k, v in expect_metrics.items()}
    np.testing.assert_allclose(numbers(new.lora), numbers(expect.lora), rtol=1e-5, atol=1e-5)
    assert np.abs(numbers(new.lora) - numbers(state.lora)).max() > 1e-4


@pytest.mark.slow
def test_chance_is_the_same_by_block(folder):
    """What is kept at random is drawn once for all prompts, so that blocks keep what the whole keeps."""
    parts = parts_of(nano.build(folder, selection="random", **BRANCH))
    with jax.set_mesh(parts.mesh):
        state, prompts, _ = begun(parts)
        new, _ = staged_of(parts)(state, parts.frozen, prompts, {})
    np.testing.assert_array_equal(numbers(new.lora), numbers(by_one_program(parts.cfg)[0].lora))


@pytest.mark.slow
def test_runs_are_one_program(folder):
    """vmap over two states is the two alone."""
    parts = parts_of(nano.build(folder, **BRANCH))
    with jax.set_mesh(parts.mesh):
        state, prompts, _ = begun(parts)
        other = state._replace(key=jax.random.key(7))
        step = step_of(parts)
        both = jax.tree.map(lambda *x: jnp.stack(x), state, other)
        found, metrics = jax.jit(jax.vmap(step, in_axes=(0, None, None)))(both, parts.frozen, prompts)
    expect, alone = by_one_program(parts.cfg)
    np.testing.assert_allclose(metrics["reward/mean"][0], alone["reward/mean"], rtol=1e-5)
    np.testing.assert_allclose(numbers(jax.tree.map(lambda x: x[0], found.lora)), numbers(expect.lora), atol=1e-4)
    assert abs(float(metrics["reward/mean"][1] - metrics["reward/mean"][0])) > 1e-6


@pytest.mark.slow
def test_the_watch_compares_with_what_is_trained_on(folder):
    """All N finished from their states; and beside it, told and never acted on, all N from the noise."""
    how = dataclasses.replace(nano.build(folder).watch, every=2, prompts=2, fall_back=True, rank=0.5)
    parts = parts_of(nano.build(folder, watch=how, **BRANCH))
    run = iteration.stages(*statics_of(parts))
    roll = functools.partial(rolled, model=parts.model, score=parts.score, stage=parts.cfg.regenerate)
    with jax.set_mesh(parts.mesh):
        state = assemble.fresh(parts)
        found = watch.measured(parts, state)
        batch = data.batch(parts.prompts.train, parts.cfg.seed, 0, 4)[:2]
        prompts, keys = assemble.encode(parts, batch, parts.score), sample_keys(state, 2, 8)
        kernels = run.merged(state, parts.frozen)
        low, given = run.quantised(kernels, parts.frozen), (parts.frozen, prompts, keys)
        preview = jax.jit(run.explore)(kernels, low, *given)
        finished = jax.jit(run.regenerate)(kernels, None, *given, preview.state)
        noise = jax.jit(roll)(kernels, None, *given)
    expect = {f"watch/{k}": float(v.mean()) for k, v in fidelity(preview.reward, finished.reward, 4).items()}
    expect |= {f"watch/noise_{k}": float(v.mean()) for k, v in fidelity(preview.reward, noise.reward, 4).items()}
    assert found == pytest.approx(expect, abs=1e-5) and len(found) == 6
    good, bad = (
        {"watch/spearman": 0.9, "watch/noise_spearman": 0.1},
        {"watch/spearman": 0.1, "watch/noise_spearman": 0.9},
    )
    assert int(watch.with_fall_back(state, good, parts.cfg).fallen_back) == 0
    assert int(watch.with_fall_back(state, bad, parts.cfg).fallen_back) == 1
    assert "ranks" not in guards.alarms([{"iteration": 0, **good}], parts.cfg)
    said = guards.alarms([{"iteration": 0, **bad}], parts.cfg)["ranks"]
    assert "unlike the samples that go on from it: Spearman 0.10" in said


def test_the_grid_is_the_models_own(folder):
    """Of nano's FLUX: shifted, so that in u a preview of 4 steps stands at 1/2 after 2, then three equal steps to 0."""
    parts = parts_of(nano.build(folder, **BRANCH))
    found, shift = branched(parts.model, parts.cfg), parts.model.shift(4)
    assert found.after == 2 and found.sigmas.shape == (6,)
    np.testing.assert_array_equal(found.sigmas[:3], sigmas_of(parts.model, parts.cfg.explore)[:3])
    u = found.sigmas / (shift - (shift - 1) * found.sigmas)
    np.testing.assert_allclose(u, [1, 3 / 4, 1 / 2, 1 / 3, 1 / 6, 0], atol=1e-12)


# --- a sample is its key ---


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "trips"), [(1, 4), (4, 1)])
def test_each_device_does_its_share(folder, devices, trips):
    """The scan over prompts has P / devices trips on each device: a scanned axis is never the sharded one."""
    parts = parts_of(nano.build(folder), devices)
    run = iteration.stages(*statics_of(parts))
    with jax.set_mesh(parts.mesh):
        state, prompts, keys = begun(parts)
        text = str(jax.make_jaxpr(run.explore)(run.merged(state, parts.frozen), None, parts.frozen, prompts, keys))
    lengths = {int(n) for n in re.findall(r"\blength=(\d+)", text)}  # layers 1, chunks of a prompt 2, steps 2, prompts
    assert lengths == {1, 2, trips}


def test_a_sample_is_its_key(folder):
    """Any subset of the keys, in any order, gives the same samples; and permuted prompts give permuted outputs."""
    parts = parts_of(nano.build(folder))
    run = iteration.stages(*statics_of(parts))
    with jax.set_mesh(parts.mesh):
        state, prompts, keys = begun(parts)
        kernels = run.merged(state, parts.frozen)
        roll = jax.jit(lambda prompts, keys: run.regenerate(kernels, None, parts.frozen, prompts, keys))
        everything = roll(prompts, keys)
        index = jnp.array([[3, 1, 7, 0], [0, 1, 2, 3], [7, 6, 5, 4], [2, 4, 6, 0]])
        some = roll(prompts, take(keys, index))
        order = jnp.array([2, 0, 3, 1])
        turned = roll(jax.tree.map(lambda x: x[order], prompts), keys[order])
    np.testing.assert_allclose(some.x0, take(everything.x0, index), atol=2e-6)
    np.testing.assert_allclose(some.reward, take(everything.reward, index), atol=1e-6)
    np.testing.assert_allclose(turned.reward, everything.reward[order], atol=1e-6)


@pytest.mark.slow
def test_blocks_of_any_size_give_the_same_samples(folder):
    """A chunk is a part of a prompt's 8 samples, all of them, or those of 2 or 4 prompts."""
    parts = parts_of(nano.build(folder))
    run = iteration.stages(*statics_of(parts))
    with jax.set_mesh(parts.mesh):
        state, prompts, keys = begun(parts)
        variables = policy_variables(run.merged(state, parts.frozen), None, parts.frozen)

        def rolled(chunk):
            stage = dataclasses.replace(parts.cfg.regenerate, chunk=chunk)
            roll = functools.partial(rollout, model=parts.model, score=parts.score, stage=stage)
            return jax.jit(roll)(variables, parts.frozen, prompts, keys)

        expect, *others = (rolled(chunk) for chunk in (8, 2, 16, 32))
    for found in others:
        np.testing.assert_allclose(found.x0, expect.x0, atol=1e-5)
        np.testing.assert_allclose(found.reward, expect.reward, atol=1e-6)


def test_blocks_that_do_not_divide_are_refused():
    assert block_shape(8, 4, 8) == (1, 8) and block_shape(16, 4, 8) == (2, 8)
    assert block_shape(2, 4, 8) == (1, 2) and block_shape(999, 4, 8) == (4, 8)
    with pytest.raises(config.ConfigError, match=r"chunk=24 takes 3 prompts x 8 images .* 4 x 8 of one device"):
        block_shape(24, 4, 8)
    with pytest.raises(config.ConfigError, match=r"chunk=3 takes 1 prompts x 3 .* use one of \[1, 2, 4, 8\]"):
        block_shape(3, 4, 8)


@pytest.mark.slow
def test_low_precision_is_really_there(folder):
    """The explorer's optimised program rounds to nearest even, the bf16 one does not; its samples differ a little."""
    parts = parts_of(nano.build(folder))
    run = iteration.stages(*statics_of(parts))
    with jax.set_mesh(parts.mesh):
        state, prompts, keys = begun(parts)
        kernels = run.merged(state, parts.frozen)
        low = run.quantised(kernels, parts.frozen)
        jax.config.update("jax_disable_most_optimizations", False)
        compiled = jax.jit(run.explore).lower(kernels, low, parts.frozen, prompts, keys).compile().as_text()
        plain = jax.jit(run.regenerate).lower(kernels, None, parts.frozen, prompts, keys).compile().as_text()
        jax.config.update("jax_disable_most_optimizations", True)
        exact = rollout(
            {"params": parts.frozen.base},
            parts.frozen,
            prompts,
            keys,
            model=parts.model,
            score=parts.score,
            stage=parts.cfg.explore,
        )
        rough = jax.jit(run.explore)(kernels, low, parts.frozen, prompts, keys)
    assert "round-nearest-even" in compiled and "round-nearest-even" not in plain
    assert all(x.dtype in (jnp.uint8, jnp.float8_e4m3fn, jnp.float32) for x in jax.tree.leaves(low))
    error = np.linalg.norm(rough.x0 - exact.x0) / np.linalg.norm(exact.x0)
    assert 0.01 < error < 0.5
