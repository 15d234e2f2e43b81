"""Advantages, decays and the policies' losses: worked examples, and closed forms in f64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import algos, sampler
from solrl_jax.config import Config, Learn, Stage
from solrl_jax.structs import Hyper, Points, Trajectory, Transitions, Velocities

pytestmark = pytest.mark.usefixtures("strict_dtypes")


# Operation by operation they would be compiled for longer than as programs.
nft_loss, awm_loss, vgrpo_loss, flow_grpo_loss = (
    jax.jit(f, static_argnums=4) for f in (algos.nft_loss, algos.awm_loss, algos.vgrpo_loss, algos.flow_grpo_loss)
)
nft_points, awm_points, vgrpo_points, flow_grpo_points, dance_grpo_points = (
    jax.jit(getattr(algos, f"{name}_points"), static_argnums=(3, 4))
    for name in ("nft", "awm", "vgrpo", "flow_grpo", "dance_grpo")
)


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
    return nft_loss(Velocities(v, old, ref), points, advantage, h, Learn(advantage_mode=mode))


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
    grad = jax.jit(jax.grad(lambda v: jnp.sum(loss(v, points, old, ref, advantage, h)[0])))(old)
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
    points = nft_points(jax.random.key(3), sample, schedule, 6, Learn())
    assert len(set(np.asarray(points.t).tolist())) == 6 and set(np.asarray(points.t).tolist()) <= set(
        np.asarray(sigmas).tolist()
    )
    eps = (points.x_t - (1 - points.t[:, None, None, None]) * points.x0) / points.t[:, None, None, None]
    assert abs(float(jnp.std(eps)) - 1) < 0.15 and points.x_t.shape == (6, 4, 4, 2)
    other = nft_points(jax.random.key(4), sample, schedule, 6, Learn())
    assert not np.array_equal(points.t, other.t)


def test_advantages_of_the_prompt_alone():
    """DanceGRPO divides by each prompt's own unbiased std, Flow-GRPO-Fast by its population std."""
    reward = jnp.array([[1.0, 3.0, 6.0, 2.0], [20.0, 50.0, 20.0, 10.0]])
    away = np.asarray(reward) - np.asarray(reward).mean(1, keepdims=True)
    for spread, ddof, eps in (("prompt", 0, 1e-4), ("prompt_unbiased", 1, 1e-8)):
        expect = away / (np.std(reward, axis=1, ddof=ddof, keepdims=True) + eps)
        np.testing.assert_allclose(algos.advantages(reward, spread), expect, rtol=1e-6)
    with pytest.raises(ValueError, match="unknown spread 'group'"):
        algos.advantages(reward, "group")


@pytest.mark.parametrize("spread", ["all", "prompt", "prompt_unbiased"])
@pytest.mark.parametrize("kept", [8, 12, 24])
def test_equal_rewards_have_no_advantage(spread, kept):
    """Exactly none: by DanceGRPO's eps of 1e-8 a mean's rounding would be an advantage of .8 for the whole group."""
    reward = jnp.stack([jnp.full(kept, 0.3), jnp.full(kept, 0.7), jnp.linspace(0.1, 0.9, kept)])
    for how in (algos.advantages, jax.jit(algos.advantages, static_argnums=1)):
        np.testing.assert_array_equal(how(reward, spread)[:2], 0)


# --- GRPO -----------------------------------------------------------------------------------------------------------

SIGMAS = np.array([1, 0.9, 0.7, 0.4, 0])


def steps(solver="sde", eta=0.7, batch=3, shape=(4, 4, 2)):
    """Three steps of a sampler, taken by `old`, and two other policies."""
    keys = jax.random.split(jax.random.key(0), 5)
    law = jax.tree.map(lambda c: jnp.asarray(c[:batch], jnp.float32), sampler.gaussians(SIGMAS, solver, eta))
    x, old, ref, z, other = (jax.random.normal(k, (batch, *shape)) for k in keys)
    t = jnp.asarray(SIGMAS[:batch], jnp.float32)
    rows = sampler.table(SIGMAS, solver, eta)
    std = jnp.asarray(rows.noise[:batch], jnp.float32)
    x_next = sampler.mean(law, x, x - sampler.over(t, x) * old) + sampler.over(std, x) * z
    return Transitions(x, t, x_next, law), old, ref, old + 0.1 * other, jnp.array([2.0, -7.0, 0.5])


def log_prob(v, points):
    """Of a step of Flow-GRPO's SDE in f64, from the mean in x and v."""
    x, x_next, t, v = (np.asarray(a, np.float64) for a in (points.x_t, points.x_next, points.t, v))
    out = []
    for i, s in enumerate(t):
        d, apart = SIGMAS[i + 1] - SIGMAS[i], 1 - (SIGMAS[1] if s == 1 else s)
        g2 = 0.49 * s / apart
        mu, std = x[i] * (1 + g2 * d / (2 * s)) + v[i] * d * (1 + g2 * (1 - s) / (2 * s)), np.sqrt(-g2 * d)
        out.append(np.mean(-((x_next[i] - mu) ** 2) / (2 * std**2) - np.log(std) - 0.5 * np.log(2 * np.pi)))
    return np.array(out)


@pytest.mark.parametrize("name", ["flow_grpo", "dance_grpo"])
def test_grpo_before_the_first_update(name):
    """Ratio 1, loss -A, gradient -A dlogp, with or without the behaviour policy's own pass."""
    points, old, _, _, advantage = steps()
    algorithm, cfg, h = algos.find(name), Learn(kl_weight=0.0), hyper(kl_weight=0.0)
    a = np.clip(np.asarray(advantage), -5, 5)

    def total(v, behaviour):
        return jnp.sum(algorithm.loss(Velocities(v, behaviour=behaviour), points, advantage, h, cfg)[0])

    for behaviour in (None, old):
        # Not as a program: that may round the two passes differently.
        loss, metrics = algorithm.loss(Velocities(old, behaviour=behaviour), points, advantage, h, cfg)
        np.testing.assert_array_equal(metrics["ratio/deviation"], 0)
        np.testing.assert_allclose(loss, -a, rtol=1e-6)
        grad = jax.jit(jax.grad(total))(old, behaviour)
        eps = 1e-4
        for i in range(3):
            direction = np.zeros(old.shape)
            direction[i] = np.random.default_rng(i).standard_normal(old.shape[1:])
            ends = [log_prob(np.asarray(old) + sign * eps * direction, points)[i] for sign in (1, -1)]
            slope = (ends[0] - ends[1]) / (2 * eps)
            assert float(jnp.sum(grad * direction)) == pytest.approx(-a[i] * slope, rel=2e-3)


def test_grpo_away_from_it():
    """Ratio of the log-probabilities in f64, clipped on the side where the advantage pushes on."""
    points, old, _, v, advantage = steps()
    h = hyper(kl_weight=0.0, clip_range=0.001)
    loss, metrics = flow_grpo_loss(Velocities(v, behaviour=old), points, advantage, h, Learn(kl_weight=0.0))
    ratio, a = np.exp(log_prob(v, points) - log_prob(old, points)), np.clip(np.asarray(advantage), -5, 5)
    np.testing.assert_allclose(loss, np.maximum(-a * ratio, -a * np.clip(ratio, 0.999, 1.001)), rtol=1e-4)
    np.testing.assert_allclose(metrics["ratio/deviation"], np.abs(ratio - 1), rtol=5e-3, atol=1e-6)
    assert np.abs(ratio - 1).min() > 0.002 and float(metrics["ratio/clipped"].mean()) == 1.0


def test_flow_grpo_kl_in_velocities():
    """d^2 (1 + eta^2/2)^2 (1-s) / (2 eta^2 s) |dv|^2, at s = 1 (1-s1)^3 / (2 eta^2) |dv|^2, as flow_grpo's code."""
    points, _, ref, v, advantage = steps()
    h = hyper(kl_weight=0.04)
    _, metrics = flow_grpo_loss(Velocities(v, reference=ref), points, advantage, h, Learn())
    square = np.mean((np.asarray(v, np.float64) - np.asarray(ref)) ** 2, axis=(1, 2, 3))
    s, d, eta2 = SIGMAS[1:3], np.diff(SIGMAS)[1:3], 0.49
    factor = [(1 - SIGMAS[1]) ** 3 / (2 * eta2), *(d**2 * (1 + eta2 / 2) ** 2 * (1 - s) / (2 * eta2 * s))]
    np.testing.assert_allclose(metrics["kl_div"], factor * square, rtol=1e-4)


def test_grpo_points_are_steps_of_the_path():
    """Flow-GRPO takes the first T of a window in order, DanceGRPO T random ones; each with its own law and time."""
    states = jnp.arange(4.0)[:, None, None, None] * jnp.ones((4, 2, 2, 1))  # steps 1 .. 3 of a rollout
    sample = algos.Sample(states[-1], Trajectory(states, jnp.int32(1)))
    law = jax.tree.map(jnp.asarray, sampler.gaussians(SIGMAS, "sde", 0.7))
    schedule = algos.Schedule(jnp.asarray(SIGMAS[:-1], jnp.float32), law)
    found = flow_grpo_points(jax.random.key(0), sample, schedule, 2, Learn())
    np.testing.assert_allclose(found.t, SIGMAS[1:3])
    np.testing.assert_array_equal(found.x_t[:, 0, 0, 0], [0, 1])
    np.testing.assert_array_equal(found.x_next[:, 0, 0, 0], [1, 2])
    np.testing.assert_allclose(found.step.on_x, np.asarray(law.on_x)[1:3])
    seen = set()
    for i in range(8):
        found = dance_grpo_points(jax.random.key(i), sample, schedule, 2, Learn())
        at = np.asarray(found.x_t[:, 0, 0, 0]).astype(int)
        np.testing.assert_array_equal(found.x_next[:, 0, 0, 0], at + 1)
        np.testing.assert_allclose(found.t, SIGMAS[1 + at])
        np.testing.assert_allclose(found.step.precision, np.asarray(law.precision)[1 + at])
        assert len(set(at)) == 2
        seen |= set(at)
    assert seen == {0, 1, 2}


# --- AWM ------------------------------------------------------------------------------------------------------------


def test_awm_log_prob_golden():
    """e = .8, t = .5, p = 1/4."""
    e, t = jnp.array([0.8]), jnp.array([0.5])
    assert float(algos.awm_log_prob(e, t)[0]) == pytest.approx(-1.8851587, rel=1e-6)
    slope = jax.jit(jax.grad(lambda e: algos.awm_log_prob(e, t)[0]))(e)
    assert float(slope[0]) == pytest.approx(-0.5910886, rel=1e-6)


def test_awm_loss_golden():
    """On-policy: loss -A plus the distances, gradient -A dlogp; A over its bound, so within 1."""
    points, old, ref, advantage = problem()
    h, a = hyper(kl_weight=0.0, lag_weight=0.0, clip_range=1.0), np.clip(np.asarray(advantage), -5, 5) / 5

    def loss(v):
        return awm_loss(Velocities(v, old, ref), points, advantage, h, Learn())[0]

    np.testing.assert_allclose(loss(old), -a, rtol=1e-6)
    x_t, x0, t, v = (np.asarray(x, np.float64) for x in (points.x_t, points.x0, points.t, old))
    error = v - (x_t - x0) / t[:, None, None, None]
    square = (error**2).mean((1, 2, 3))
    slope = -t * (square + 1e-10) ** -0.75
    expect = -(a * slope)[:, None, None, None] * 2 * error / error[0].size
    np.testing.assert_allclose(jax.jit(jax.grad(lambda v: jnp.sum(loss(v))))(old), expect, rtol=2e-4, atol=1e-6)
    v, h = old + 0.1 * ref, hyper(kl_weight=0.003, lag_weight=1.0, clip_range=1.0)
    found, metrics = awm_loss(Velocities(v, old, ref), points, advantage, h, Learn())
    kl, lag = (np.mean((np.asarray(v, np.float64) - np.asarray(x)) ** 2, axis=(1, 2, 3)) for x in (ref, old))
    np.testing.assert_allclose(found, -a + 0.003 * kl + lag, rtol=1e-5)
    np.testing.assert_allclose(metrics["old_deviate"], lag, rtol=1e-5)
    # Off-policy the ratio counts, and a clip range of 1 lets it go from 0 to 2.
    later, _ = awm_loss(Velocities(v, v, v, behaviour=old), points, advantage, h, Learn())
    before, now = (algos.awm_log_prob(jnp.mean((u - (x_t - x0) / t[:, None, None, None]) ** 2, axis=(1, 2, 3)),
                                      points.t) for u in (old, v))  # fmt: skip
    ratio = np.exp(np.asarray(now) - np.asarray(before))
    np.testing.assert_allclose(later, np.maximum(-a * ratio, -a * np.clip(ratio, 0, 2)), rtol=1e-4)


def test_awm_times_are_stratified():
    """As AWM's code: of 14 steps, 6 times of the bins {1}, {2, 3}, ..., {10, 11}; with first 0 {0, 1}, ..."""
    assert algos.awm_edges(14, 6, 1) == [1, 2, 4, 6, 8, 10, 12] and algos.awm_edges(14, 6, 0) == [0, 2, 4, 6, 8, 10, 12]
    sigmas = jnp.linspace(1, 0.1, 14)
    found = jax.vmap(
        lambda k: awm_points(k, algos.Sample(jnp.ones((2, 2, 1))), algos.Schedule(sigmas), 6, Learn(first_time=1))
    )(jax.random.split(jax.random.key(0), 64))
    index = np.argmin(np.abs(np.asarray(found.t)[..., None] - np.asarray(sigmas)), axis=-1)
    assert [set(index[:, k]) for k in range(6)] == [{1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}]
    assert len({tuple(row) for row in index}) > 16  # each sample draws its own


def test_times_that_are_trained_golden():
    """T of the published runs."""
    for fraction, n, t in ((0.99, 10, 9), (0.99, 25, 24), (0.99, 6, 5), (0.6, 10, 6), (0.4, 10, 4)):
        assert Config(regenerate=Stage(steps=n), learn=Learn(timestep_fraction=fraction, micro_batch=t)).times == t


# --- V-GRPO ---------------------------------------------------------------------------------------------------------


def shared_points():
    """Two samples of one prompt at two shared points, 2 numbers each: (points, velocities of the iteration's begin)."""
    x0, eps = np.array([[1, -1], [0.5, 0.5]]), np.array([[0.2, -0.4], [-1, 0.6]])
    t = np.array([0.75, 0.25])
    x_t = (1 - t[:, None]) * x0[:, None] + t[:, None] * eps
    np.testing.assert_allclose(x_t, [[[0.4, -0.55], [0.5, -0.6]], [[0.275, -0.175], [0.125, 0.525]]])
    old = np.array([[[-0.5, 0.4], [-1.6, 1.2]], [[-0.1, -0.6], [-1.2, 0.3]]])

    def picture(x):
        return jnp.asarray(x.reshape(2, 2, 1, 2, 1), jnp.float32)

    clean = np.broadcast_to(x0[:, None], x_t.shape)
    return Points(picture(x_t), jnp.asarray(np.broadcast_to(t, (2, 2)), jnp.float32), picture(clean)), picture(old)


DELTA = np.array([[[-0.1, 0.05], [-0.1, 0.1]], [[0.05, -0.1], [0.1, -0.05]]]).reshape(2, 2, 1, 2, 1)


def test_vgrpo_golden():
    """Errors, ratios, losses and gradient of a worked example."""
    points, old = shared_points()
    v = old + jnp.asarray(DELTA, jnp.float32)
    a = algos.advantages(jnp.array([[2.0, 1.0]]), "prompt")[0]
    np.testing.assert_allclose(a, [0.9998, -0.9998], rtol=1e-5)
    np.testing.assert_allclose(algos.shape_advantage(a, 3.0, "soft"), [0.9643589, -0.9643589], rtol=1e-6)
    cfg = Learn(algorithm="vgrpo", advantage_mode="soft", advantage_clip=3.0)

    def loss(v, behaviour, **changes):
        h = hyper(**{"kl_weight": 0.0, **changes})
        return vgrpo_loss(Velocities(v, behaviour=behaviour), points, a, h, cfg)

    flat = jax.tree.map(lambda x: x.reshape((4, *x.shape[2:])), points)
    matching = jax.jit(algos._matching)
    errors = [matching(x.reshape(4, 1, 2, 1), flat).reshape(2, 2) for x in (old, v)]
    np.testing.assert_allclose(errors[0], [[0.195, 0.1], [0.195, 0.065]], rtol=1e-5)
    np.testing.assert_allclose(errors[1], [[0.1339286, 0.075], [0.1708333, 0.0829545]], rtol=1e-5)
    found, metrics = loss(v, old, clip_range=0.2)
    assert found.shape == (2, 2) and float(found.mean()) == pytest.approx(-0.0197039, abs=1e-7)
    np.testing.assert_allclose(metrics["ratio/deviation"][:, 0], [0.0439752, 0.0031109], atol=1e-7)
    assert float(loss(v, old, clip_range=0.01)[0].mean()) == pytest.approx(-0.0033218, abs=1e-7)
    moved = loss(v, old, clip_range=0.2, kl_weight=1.0)[0] - found
    assert float(moved.mean()) == pytest.approx(0.0020117, abs=1e-7)  # the mean over elements
    expect = [[0.2169808, -0.1446538, 0.0602724, -0.0602724], [-0.1446538, -0.2169808, -0.0723269, -0.0482179]]
    for behaviour in (None, old):
        grad = jax.jit(jax.grad(lambda v: loss(v, behaviour)[0].mean()))(old)  # noqa: B023
        np.testing.assert_allclose(grad.reshape(2, 4), expect, rtol=1e-5)


def test_one_step_of_vgrpo_is_nft_without_lag():
    """At v = v_old, whatever NFT's beta."""
    points, old = shared_points()
    a, flat = jnp.array([0.7, -1.2]), jax.tree.map(lambda x: x.reshape((4, *x.shape[2:])), points)

    def ours(v):
        return vgrpo_loss(Velocities(v), points, a, hyper(kl_weight=0.0), Learn(algorithm="vgrpo"))[0].sum()

    def nft(v):
        v, v_old = v.reshape(4, 1, 2, 1), old.reshape(4, 1, 2, 1)
        h = hyper(strength=0.1, kl_weight=0.0)
        return nft_loss(Velocities(v, v_old), flat, jnp.repeat(a, 2), h, Learn())[0].sum()

    slopes = jax.jit(lambda v: (jax.grad(ours)(v), jax.grad(nft)(v)))(old)
    np.testing.assert_allclose(*slopes, rtol=2e-5)


def test_vgrpos_ranges_take_every_time():
    for steps, times, expect in (
        (10, 4, [0, 3, 6, 8]),
        (6, 3, [0, 2, 4]),
        (5, 5, [0, 1, 2, 3, 4]),
        (14, 4, [0, 4, 8, 11]),
    ):
        begin, width = algos.vgrpo_ranges(steps, times)
        assert begin.tolist() == expect and int(width.sum()) == steps and begin[-1] + width[-1] == steps
    schedule, sample = (
        algos.Schedule(jnp.asarray(np.linspace(1, 0.1, 10), jnp.float32)),
        algos.Sample(jnp.zeros((1, 1, 1))),
    )
    seen = set()
    for i in range(40):
        t = vgrpo_points(jax.random.key(i), sample, schedule, 4, Learn()).t
        index = np.round((1 - np.asarray(t)) * 10).astype(int)
        assert all(b <= k < b + w for k, b, w in zip(index, *algos.vgrpo_ranges(10, 4), strict=True))
        seen |= set(index.tolist())
    assert seen == set(range(10))
