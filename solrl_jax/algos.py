"""Advantages and policy losses: DiffusionNFT, AWM, V-GRPO, Flow-GRPO, DanceGRPO.

An `Algorithm`, found by its name (`find`), is two functions and what they need. points(key, sample, schedule, times,
cfg) gives the points at which one sample's velocities are computed, leaves [T, ...]. loss(velocities, points,
advantage, hyper, cfg) gives (f32 [B], metrics [B]). `learn.learn` averages, differentiates and updates. A new one needs
its name in config.Learn, and in config.Config's rules if it asks something of the rollout.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from solrl_jax import sampler
from solrl_jax.config import Learn, last_time
from solrl_jax.sampler import Gaussian
from solrl_jax.structs import Hyper, Points, Trajectory, Transitions, Velocities

Metrics = dict[str, Array]
"""One value a point, shaped as the loss: `learn` takes their mean."""
Loss = tuple[Float[Array, "B"], Metrics]


class Algorithm(NamedTuple):
    """`fixed(cfg)`: the fields of Velocities that the loss reads besides `current`; none of them gets a gradient.

    `rolls_out`: whether the old policy, which lags behind, or the current one makes the samples. `whole`: the loss
    takes whole samples, velocities and points with leaves [S, T, ...] and advantages [S], and gives f32 [S, T].
    """

    points: Callable[..., Any]
    loss: Callable[..., tuple[Array, Metrics]]
    fixed: Callable[[Learn], tuple[str, ...]]
    rolls_out: Literal["old", "current"]
    whole: bool = False


class Sample(NamedTuple):
    """What a rollout keeps of one sample."""

    x0: Float[Array, "h w c"]
    path: Trajectory | None = None


class Schedule(NamedTuple):
    """The rollout's times, f32 [N] without the last 0, and the distributions of its steps if they are Gaussian."""

    sigmas: Float[Array, "N"]
    steps: Gaussian | None = None


def find(name: str) -> Algorithm:
    """The algorithm of that name: nft, awm, vgrpo, flow_grpo or dance_grpo."""
    return {"nft": NFT, "awm": AWM, "vgrpo": VGRPO, "flow_grpo": FLOW_GRPO, "dance_grpo": DANCE_GRPO}[name]


# --- advantages and decays ------------------------------------------------------------------------------------------


def advantages(
    reward: Float[Array, "P K"], spread: str = "all", asked: Float[Array, "P K"] | None = None
) -> Float[Array, "P K"]:
    """A = (R - mean of its prompt) / (std + eps); `spread` says which std.

    "all": over all rewards; "prompt": over the prompt's rewards; both population std, eps 1e-4. "prompt_unbiased": over
    the prompt's rewards, divided by K - 1, eps 1e-8 (DanceGRPO's); needs K >= 2. Prompts whose `asked` is 0 have A = 0
    and no part in the std over all.
    """
    away = reward - reward[..., :1]  # exactly 0 for equal rewards: DanceGRPO's eps is smaller than their rounding error
    away = away - jnp.mean(away, axis=-1, keepdims=True)
    there = None
    if asked is not None:
        away = jnp.where(asked > 0, away, 0.0)
        there = (asked > 0) | ~jnp.any(asked > 0)  # the std of nothing would be NaN
    if spread == "all":
        return away / (jnp.std(reward, where=there) + 1e-4)
    if spread == "prompt":
        return away / (jnp.std(reward, axis=-1, keepdims=True) + 1e-4)
    if spread == "prompt_unbiased":
        return away / (jnp.std(reward, axis=-1, keepdims=True, ddof=1) + 1e-8)
    raise ValueError(f"unknown spread {spread!r}: use all, prompt or prompt_unbiased")


def shape_advantage(a: Float[Array, "*B"], clip: float, mode: str) -> Float[Array, "*B"]:
    """Clip to +-clip, then the variant of DiffusionNFT's `adv_mode`; "soft" is V-GRPO's clip tanh(A / clip)."""
    if mode == "soft":
        return clip * jnp.tanh(a / clip)
    a = jnp.clip(a, -clip, clip)
    if mode == "all":
        return a
    if mode == "positive_only":
        return jnp.maximum(a, 0.0)
    if mode == "negative_only":
        return jnp.minimum(a, 0.0)
    if mode == "one_only":
        return (a > 0).astype(a.dtype)
    if mode == "binary":
        return jnp.sign(a)
    raise ValueError(f"unknown advantage mode {mode!r}")


def old_decay(
    updates: Int[Array, ""], wait: Float[Array, ""], ramp: Float[Array, ""], maximum: Float[Array, ""]
) -> Float[Array, ""]:
    """c of old <- c old + (1 - c) current: min(ramp * (updates - wait), maximum), 0 before `wait` (DiffusionNFT)."""
    return jnp.clip(ramp * (updates.astype(jnp.float32) - wait), 0.0, maximum)


def ema_decay(updates: Int[Array, ""], maximum: float) -> Float[Array, ""]:
    """D = min((1 + k) / (10 + k), maximum), where k includes this update."""
    k = updates.astype(jnp.float32)
    return jnp.minimum((1 + k) / (10 + k), maximum)


# --- DiffusionNFT ---------------------------------------------------------------------------------------------------


def nft_points(key: Key[Array, ""], sample: Sample, schedule: Schedule, times: int, cfg: Learn) -> Points:
    """T of the N rollout times in random order, each with fresh noise: x_t = (1 - t) x0 + t eps. Leaves [T, ...]."""
    chex.assert_scalar_in(times, 1, schedule.sigmas.shape[0])
    key_t, key_eps = jax.random.split(key)
    return _noised(key_eps, sample.x0, jax.random.permutation(key_t, schedule.sigmas)[:times])


def nft_loss(v: Velocities, points: Points, advantage: Float[Array, "B"], hyper: Hyper, cfg: Learn) -> Loss:
    """DiffusionNFT (arXiv 2509.16117), with the constants of its code (NVlabs/DiffusionNFT); f32.

    v+ = beta v + (1 - beta) v_old,  v- = (1 + beta) v_old - beta v,  r = clip(A / (2 clip) + 1/2, 0, 1),
    L+- = mean |x_t - t v+- - x0|^2 / w+-,  w = mean |x_t - t v+- - x0| without gradient,
    loss = clip (r L+ + (1 - r) L-) / beta + kl_weight mean |v - v_ref|^2.
    """
    assert v.old is not None
    chex.assert_equal_shape([v.current, v.old, points.x_t, points.x0])
    chex.assert_equal_shape([points.t, advantage])
    beta, clip = hyper.strength, cfg.advantage_clip
    a = shape_advantage(advantage, clip, cfg.advantage_mode)
    r = jnp.clip(a / (2 * clip) + 0.5, 0.0, 1.0)
    plus = _matching(beta * v.current + (1 - beta) * v.old, points)
    minus = _matching((1 + beta) * v.old - beta * v.current, points)
    policy = clip * (r * plus + (1 - r) * minus) / beta
    kl, metrics = _from_reference(v, hyper)
    return policy + kl, {"policy_loss": policy, **metrics, "old_deviate": _mean((v.current - v.old) ** 2)}


def _matching(velocity: Float[Array, "B h w c"], points: Points) -> Float[Array, "B"]:
    """Squared error of the implied x0, divided by its own mean absolute error (no gradient through that)."""
    error = points.x_t - sampler.over(points.t, velocity) * velocity - points.x0
    weight = jax.lax.stop_gradient(jnp.maximum(_mean(jnp.abs(error)), 1e-5))
    return _mean(error**2) / weight


# --- AWM ------------------------------------------------------------------------------------------------------------


def awm_points(key: Key[Array, ""], sample: Sample, schedule: Schedule, times: int, cfg: Learn) -> Points:
    """One rollout time from each of T strata, with fresh noise, as AWM's code. Leaves [T, ...].

    The strata split the time indices `first_time` .. int(.9 N) - 1 into T adjacent ranges, with bounds rounded down.
    (The original draws times once for all samples of a micro-batch; here each sample draws its own.)
    """
    key_t, key_eps = jax.random.split(key)
    edges = jnp.asarray(awm_edges(schedule.sigmas.shape[0], times, cfg.first_time))
    widths = (edges[1:] - edges[:-1]).astype(jnp.float32)
    index = edges[:-1] + jnp.floor(jax.random.uniform(key_t, (times,)) * widths).astype(jnp.int32)
    return _noised(key_eps, sample.x0, schedule.sigmas[jnp.minimum(index, edges[1:] - 1)])


def awm_edges(steps: int, times: int, first: int) -> list[int]:
    """The T + 1 bounds of AWM's strata: for N = 14, T = 6, first 1 they are 1, 2, 4, 6, 8, 10, 12."""
    return [int(first + (last_time(steps) - first) * k / times + 1e-9) for k in range(times + 1)]


def awm_loss(v: Velocities, points: Points, advantage: Float[Array, "B"], hyper: Hyper, cfg: Learn) -> Loss:
    """Advantage weighted matching (arXiv 2509.25050), generalised Huber form with p = 1/4.

    e = mean |v - (eps - x0)|^2,  log p = -(t/p) ((e + 1e-10)^p - (1e-10)^p),  ratio = p / p_behaviour,
    loss = max(-A ratio, -A clip(ratio, 1 -+ c)) + kl_weight mean |v - v_ref|^2 + lag_weight mean |v - v_old|^2,
    with A in [-1, 1]: the clipped advantage divided by its bound.
    """
    assert v.old is not None
    chex.assert_equal_shape([v.current, v.old, points.x_t, points.x0])
    a = shape_advantage(advantage, cfg.advantage_clip, cfg.advantage_mode) / cfg.advantage_clip
    target = (points.x_t - points.x0) / sampler.over(points.t, points.x_t)  # eps - x0

    def log_prob(velocity: Float[Array, "B h w c"]) -> Float[Array, "B"]:
        return awm_log_prob(_mean((velocity - target) ** 2), points.t)

    policy, metrics = _clipped(log_prob, v, a, hyper)
    (kl, distance), lag = _from_reference(v, hyper), _mean((v.current - v.old) ** 2)
    loss = policy + kl + hyper.lag_weight * lag
    return loss, {**metrics, "policy_loss": policy, **distance, "old_deviate": lag}


def awm_log_prob(error: Float[Array, "B"], t: Float[Array, "B"], power: float = 0.25) -> Float[Array, "B"]:
    """-(t/p) ((e + 1e-10)^p - (1e-10)^p): AWM's log-probability for mean squared error e."""
    return -t / power * ((error + 1e-10) ** power - 1e-10**power)


# --- V-GRPO ---------------------------------------------------------------------------------------------------------


def vgrpo_points(key: Key[Array, ""], sample: Sample, schedule: Schedule, times: int, cfg: Learn) -> Points:
    """One of the N rollout times from each of T adjacent ranges, with fresh noise. Leaves [T, ...].

    The first N mod T ranges have one time more. With learn.shared_points, as published, all samples of a prompt have
    the same key here, so the same times and noise.
    """
    key_t, key_eps = jax.random.split(key)
    begin, width = vgrpo_ranges(schedule.sigmas.shape[0], times)
    within = jnp.floor(jax.random.uniform(key_t, (times,)) * jnp.asarray(width, jnp.float32)).astype(jnp.int32)
    index = jnp.asarray(begin) + jnp.minimum(within, jnp.asarray(width - 1))
    return _noised(key_eps, sample.x0, schedule.sigmas[index])


def vgrpo_ranges(steps: int, times: int) -> tuple[np.ndarray, np.ndarray]:
    """(first index, length) of each of T ranges of N times: for N = 10, T = 4 they begin at 0, 3, 6, 8."""
    width = np.full(times, steps // times, np.int32) + (np.arange(times) < steps % times).astype(np.int32)
    return np.cumsum(width, dtype=np.int32) - width, width


def vgrpo_loss(
    v: Velocities, points: Points, advantage: Float[Array, "S"], hyper: Hyper, cfg: Learn
) -> tuple[Float[Array, "S T"], Metrics]:
    """V-GRPO (arXiv 2604.23380, Eq. 14 to 17), of whole samples: velocities and points [S, T, ...], advantages [S].

    L = mean over a sample's T points of the error of the implied x0 as DiffusionNFT weighs it, ratio = exp(L_b - L),
    loss = max(-A ratio, -A clip(ratio, 1 -+ c)) + kl_weight mean (t (v - v_b))^2, b: the policy when the iteration
    began. The mean is inside the exponent: a sample has one ratio. With one update a rollout the ratio is 1, and the
    gradient is DiffusionNFT's with old = current.
    """
    chex.assert_equal_shape([v.current, points.x_t, points.x0])
    chex.assert_equal_shape_prefix([points.t, advantage], 1)
    shape = points.t.shape

    def log_prob(velocity: Float[Array, "S T h w c"]) -> Float[Array, "S"]:
        flat = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), (velocity, points))
        return -jnp.mean(_matching(*flat).reshape(shape), axis=1)

    policy, metrics = _clipped(log_prob, v, shape_advantage(advantage, cfg.advantage_clip, cfg.advantage_mode), hyper)
    metrics["policy_loss"] = policy
    if v.behaviour is not None:
        moved = jnp.mean((v.current - v.behaviour) ** 2, axis=(2, 3, 4)) * points.t**2
        metrics["old_deviate"] = jnp.mean(moved, axis=1)
        policy = policy + hyper.kl_weight * metrics["old_deviate"]
    return jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], shape), (policy, metrics))


# --- Flow-GRPO and DanceGRPO ----------------------------------------------------------------------------------------


def flow_grpo_points(key: Key[Array, ""], sample: Sample, schedule: Schedule, times: int, cfg: Learn) -> Transitions:
    """The first T steps of the sample's path, in order. Leaves [T, ...]."""
    return _steps(sample, schedule, jnp.arange(times))


def dance_grpo_points(key: Key[Array, ""], sample: Sample, schedule: Schedule, times: int, cfg: Learn) -> Transitions:
    """T random steps of the sample's path. Leaves [T, ...]."""
    assert sample.path is not None
    return _steps(sample, schedule, jax.random.permutation(key, sample.path.states.shape[0] - 1)[:times])


def flow_grpo_loss(v: Velocities, points: Transitions, advantage: Float[Array, "B"], hyper: Hyper, cfg: Learn) -> Loss:
    """Flow-GRPO (arXiv 2505.05470): the clipped ratio of a step's probabilities, and a KL.

    loss = max(-A ratio, -A clip(ratio, 1 -+ c)) + kl_weight mean |mu - mu_ref|^2 / (2 g^2), where mu is the step's mean
    and g its diffusion. This is the original code's KL; the paper also divides it by the step's length.
    """
    policy, metrics = _clipped_step(v, points, advantage, hyper, cfg)
    if v.reference is None:
        return policy, {**metrics, "policy_loss": policy}
    moved = sampler.over(points.step.on_x0 * points.t, v.current) * (v.current - v.reference)
    kl = _mean(moved**2) / (2 * points.step.diffusion**2)
    return policy + hyper.kl_weight * kl, {**metrics, "policy_loss": policy, "kl_div": kl}


def dance_grpo_loss(v: Velocities, points: Transitions, advantage: Float[Array, "B"], hyper: Hyper, cfg: Learn) -> Loss:
    """DanceGRPO (arXiv 2505.07818): the clipped ratio of a step's probabilities, no KL."""
    policy, metrics = _clipped_step(v, points, advantage, hyper, cfg)
    return policy, {**metrics, "policy_loss": policy}


def _steps(sample: Sample, schedule: Schedule, which: Int[Array, "T"]) -> Transitions:
    """The steps of a path with the indices `which`."""
    assert sample.path is not None and schedule.steps is not None
    states, number = sample.path.states, sample.path.first + which
    law = jax.tree.map(lambda column: column[number], schedule.steps)
    return Transitions(states[which], schedule.sigmas[number], states[which + 1], law)


def _clipped_step(v: Velocities, points: Transitions, advantage: Float[Array, "B"], hyper: Hyper, cfg: Learn) -> Loss:
    chex.assert_equal_shape([v.current, points.x_t, points.x_next])

    def log_prob(velocity: Float[Array, "B h w c"]) -> Float[Array, "B"]:
        x0 = points.x_t - sampler.over(points.t, velocity) * velocity
        return sampler.log_prob(points.step, sampler.mean(points.step, points.x_t, x0), points.x_next)

    return _clipped(log_prob, v, shape_advantage(advantage, cfg.advantage_clip, cfg.advantage_mode), hyper)


def _clipped(log_prob: Callable[[Array], Array], v: Velocities, a: Float[Array, "B"], hyper: Hyper) -> Loss:
    """max(-A ratio, -A clip(ratio, 1 -+ c)), ratio = p / p_behaviour.

    If there is one update per rollout, `behaviour` is None: it is the current policy itself, and the ratio is 1.
    """
    now = log_prob(v.current)
    before = jax.lax.stop_gradient(now if v.behaviour is None else log_prob(v.behaviour))
    ratio, c = jnp.exp(now - before), hyper.clip_range
    policy = jnp.maximum(-a * ratio, -a * jnp.clip(ratio, 1 - c, 1 + c))
    away = jnp.abs(ratio - 1)
    return policy, {"ratio/deviation": away, "ratio/clipped": (away > c).astype(jnp.float32)}


def _from_reference(v: Velocities, hyper: Hyper) -> tuple[Float[Array, "B"] | float, dict[str, Float[Array, "B"]]]:
    """kl_weight mean |v - v_ref|^2 and its metric; 0 and none where no reference was computed."""
    if v.reference is None:
        return 0.0, {}
    chex.assert_equal_shape([v.current, v.reference])
    kl = _mean((v.current - v.reference) ** 2)
    return hyper.kl_weight * kl, {"kl_div": kl}


def several(cfg: Learn) -> tuple[str, ...]:
    """The behaviour policy, if a rollout has more than one update."""
    return ("behaviour",) if cfg.updates * cfg.epochs > 1 else ()


def penalised(cfg: Learn) -> tuple[str, ...]:
    """The reference, if the distance from it has a weight."""
    return ("reference",) if cfg.kl_weight else ()


# --- shared ---------------------------------------------------------------------------------------------------------


def _noised(key: Key[Array, ""], x0: Float[Array, "h w c"], t: Float[Array, "T"]) -> Points:
    eps = jax.random.normal(key, (t.shape[0], *x0.shape))
    x0 = jnp.broadcast_to(x0[None], eps.shape)
    s = sampler.over(t, eps)
    return Points((1 - s) * x0 + s * eps, t, x0)


def _mean(x: Float[Array, "B h w c"]) -> Float[Array, "B"]:
    return jnp.mean(x, axis=(1, 2, 3))


NFT = Algorithm(nft_points, nft_loss, lambda cfg: ("old", *penalised(cfg)), "old")
AWM = Algorithm(awm_points, awm_loss, lambda cfg: ("old", *penalised(cfg), *several(cfg)), "current")
VGRPO = Algorithm(vgrpo_points, vgrpo_loss, several, "current", whole=True)
FLOW_GRPO = Algorithm(flow_grpo_points, flow_grpo_loss, lambda cfg: (*several(cfg), *penalised(cfg)), "current")
DANCE_GRPO = Algorithm(dance_grpo_points, dance_grpo_loss, several, "current")
