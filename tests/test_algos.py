"""Advantages, decays and the NFT loss: the golden numbers of algorithms.md section 10."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import algos
from solrl_jax.config import Learn
from solrl_jax.structs import Hyper, Points, Velocities


def hyper(**changes):
    values = {name: getattr(Learn(), name) for name in Hyper._fields} | changes
    return Hyper(**{name: jnp.float32(x) for name, x in values.items()})


def problem(batch=3, shape=(4, 4, 2)):
    keys = jax.random.split(jax.random.key(0), 5)
    t = jnp.array([0.9, 0.5, 0.2])[:batch]
    x0, eps, old, ref = (jax.random.normal(k, (batch, *shape)) for k in keys[:4])
    s = t[:, None, None, None]
    return Points((1 - s) * x0 + s * eps, t, x0), old, ref, jnp.array([2.0, -7.0, 0.5])[:batch]


def loss(v, points, old, ref, advantage, h, mode="all"):
    return algos.nft_loss(Velocities(v, old, ref), points, advantage, h, Learn(advantage_mode=mode))


def test_advantages_golden():
    """Prompts with their own means, one global population std."""
    reward = jnp.array([[1.0, 3.0, 6.0], [2.0, 5.0, 2.0]])
    std = np.std(np.asarray(reward)) + 1e-4
    expect = np.array([[-7 / 3, -1 / 3, 8 / 3], [-1.0, 2.0, -1.0]]) / std
    np.testing.assert_allclose(algos.advantages(reward), expect, rtol=1e-6)


def test_equal_rewards_give_no_advantage():
    np.testing.assert_array_equal(algos.advantages(jnp.full((2, 4), 0.7)), 0)


def test_decays_golden():
    def decay(k, *how):
        return float(algos.old_decay(jnp.int32(k), *map(jnp.float32, how)))

    assert [decay(k, 0, 0.001, 0.5) for k in (0, 100, 900)] == [0.0, pytest.approx(0.1), 0.5]
    late = [decay(k, 75, 0.0075, 0.999) for k in (74, 75, 115, 209)]
    assert late == [0.0, 0.0, pytest.approx(0.3), pytest.approx(0.999)]
    ema = [float(algos.ema_decay(jnp.int32(k), m)) for k, m in ((1, 0.9), (80, 0.9), (890, 0.99))]
    assert ema == [pytest.approx(2 / 11), pytest.approx(0.9), pytest.approx(0.99)]


@pytest.mark.parametrize("strength", [1.0, 0.1])
def test_nft_gradient_identity(strength):
    """At v = v_old the gradient is A_clip dL/dv with dL/dv = -2 t (x0hat - x0) / (w D), whatever the strength."""
    points, old, ref, advantage = problem()
    h = hyper(strength=strength, kl_weight=0.0)
    grad = jax.grad(lambda v: jnp.sum(loss(v, points, old, ref, advantage, h)[0]))(old)
    t = points.t[:, None, None, None]
    error = points.x_t - t * old - points.x0
    w = jnp.mean(jnp.abs(error), axis=(1, 2, 3), keepdims=True)
    expect = jnp.clip(advantage, -5, 5)[:, None, None, None] * -2 * t * error / (w * error[0].size)
    np.testing.assert_allclose(grad, expect, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("strength", [1.0, 0.1])
def test_nft_value_at_the_old_policy(strength):
    """Loss 5 / strength * L, no KL where current = reference."""
    points, old, _, advantage = problem()
    value, metrics = loss(old, points, old, old, advantage, hyper(strength=strength))
    error = points.x_t - points.t[:, None, None, None] * old - points.x0
    matching = jnp.mean(error**2, axis=(1, 2, 3)) / jnp.mean(jnp.abs(error), axis=(1, 2, 3))
    np.testing.assert_allclose(value, 5 / strength * matching, rtol=1e-5)
    np.testing.assert_array_equal(metrics["kl_div"], 0)
    np.testing.assert_array_equal(metrics["old_deviate"], 0)


def test_nft_against_numpy():
    """The whole formula in f64 away from the old policy."""
    points, old, ref, advantage = problem()
    v = old + 0.1 * ref
    beta, h = 0.1, hyper(strength=0.1)
    p, n = (np.asarray(x, np.float64) for x in (beta * v + (1 - beta) * old, (1 + beta) * old - beta * v))
    x_t, x0, t = (np.asarray(x, np.float64) for x in (points.x_t, points.x0, points.t[:, None, None, None]))

    def side(u):
        error = x_t - t * u - x0
        return (error**2).mean((1, 2, 3)) / np.abs(error).mean((1, 2, 3))

    r = np.clip(np.clip(np.asarray(advantage), -5, 5) / 10 + 0.5, 0, 1)
    kl = ((np.asarray(v) - np.asarray(ref)) ** 2).mean((1, 2, 3))
    expect = 5 * (r * side(p) + (1 - r) * side(n)) / beta + 1e-4 * kl
    np.testing.assert_allclose(loss(v, points, old, ref, advantage, h)[0], expect, rtol=1e-5)


def test_advantage_modes():
    a = jnp.array([-7.0, -1.0, 0.0, 2.0])
    expect = {
        "all": [-5, -1, 0, 2],
        "positive_only": [0, 0, 0, 2],
        "negative_only": [-5, -1, 0, 0],
        "one_only": [0, 0, 0, 1],
        "binary": [-1, -1, 0, 1],
    }
    for mode, values in expect.items():
        np.testing.assert_array_equal(algos.shape_advantage(a, 5.0, mode), values)


def test_points_are_distinct_rollout_times():
    sigmas = jnp.linspace(1, 0.1, 10)
    sample, schedule = algos.Sample(jnp.ones((4, 4, 2))), algos.Schedule(sigmas)
    points = algos.nft_points(jax.random.key(3), sample, schedule, 6, Learn())
    assert len(set(np.asarray(points.t).tolist())) == 6 and set(np.asarray(points.t).tolist()) <= set(
        np.asarray(sigmas).tolist()
    )
    eps = (points.x_t - (1 - points.t[:, None, None, None]) * points.x0) / points.t[:, None, None, None]
    assert abs(float(jnp.std(eps)) - 1) < 0.15 and points.x_t.shape == (6, 4, 4, 2)
    other = algos.nft_points(jax.random.key(4), sample, schedule, 6, Learn())
    assert not np.array_equal(points.t, other.t)
