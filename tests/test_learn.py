"""Gradients to the LoRA: clipping, rate, bad gradients, which samples an update takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import config
from solrl_jax.learn import apply_gradients, dealt, samples_at_a_time
from solrl_jax.run import assemble
from tests import nano
from tests.nano import numbers, parts_of

pytestmark = pytest.mark.usefixtures("quick_compiles")


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
    index = np.asarray(dealt(keys, reward, 0, 4))
    assert index.shape == (4, 3, 2)
    rank = np.argsort(np.argsort(reward, axis=1), axis=1)
    for prompt in range(3):
        assert sorted(index[:, prompt].ravel().tolist()) == list(range(8))
        assert np.array_equal(rank[prompt][index[:, prompt]] >= 4, [[False, True]] * 4)
    assert not np.array_equal(index, dealt(keys, reward, 1, 4))
    assert np.array_equal(dealt(keys, reward, 0, 1)[0], np.argsort(reward, axis=1))


def test_a_micro_batch_that_does_not_divide_a_device_is_refused(folder):
    learn = config.Learn(timestep_fraction=0.7, micro_batch=12)
    cfg = dataclasses.replace(nano.build(folder), prompts=6, learn=learn)
    assert samples_at_a_time(cfg, 24) == 6 and samples_at_a_time(cfg, 3) == 3  # at most 6
    with pytest.raises(
        config.ConfigError, match=r"learn\.micro_batch=12 takes 6 samples at a time, but a device holds 8"
    ):
        parts_of(cfg, 3)
