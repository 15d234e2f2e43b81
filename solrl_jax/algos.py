"""Advantages and policy losses.

An algorithm NAME is two functions, found by `learn.algorithm`: NAME_points(key, x0, sigmas, times) -> Points of one
sample, where velocities are asked for, and NAME_loss(velocities, points, advantage, hyper, cfg) -> (f32 [B], metrics).
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from solrl_jax.config import Learn
from solrl_jax.structs import Hyper, Points, Velocities

Metrics = dict[str, Any]


def advantages(reward: Float[Array, "P K"]) -> Float[Array, "P K"]:
    """A = (R - mean of its prompt) / (std of all rewards + 1e-4), population std (algorithms.md 1.6)."""
    return (reward - jnp.mean(reward, axis=-1, keepdims=True)) / (jnp.std(reward) + 1e-4)


def shape_advantage(a: Float[Array, "*B"], clip: float, mode: str) -> Float[Array, "*B"]:
    """Clip to +-clip, then the variant of DiffusionNFT's `adv_mode`."""
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


def old_decay(updates: Int[Array, ""], ramp: Float[Array, ""], maximum: Float[Array, ""]) -> Float[Array, ""]:
    """old <- c old + (1 - c) current with c = min(ramp * updates, maximum) (algorithms.md section 2)."""
    return jnp.minimum(ramp * updates.astype(jnp.float32), maximum)


def ema_decay(updates: Int[Array, ""], maximum: float) -> Float[Array, ""]:
    """D = min((1 + k) / (10 + k), maximum), k counted after the update (algorithms.md 1.5)."""
    k = updates.astype(jnp.float32)
    return jnp.minimum((1 + k) / (10 + k), maximum)


def nft_points(key: Key[Array, ""], x0: Float[Array, "h w c"], sigmas: Float[Array, "N"], times: int) -> Points:
    """T of the N rollout times in random order, each with fresh noise: x_t = (1 - t) x0 + t eps. Leaves [T, ...]."""
    chex.assert_scalar_in(times, 1, sigmas.shape[0])
    key_t, key_eps = jax.random.split(key)
    t = jax.random.permutation(key_t, sigmas)[:times]
    eps = jax.random.normal(key_eps, (times, *x0.shape))
    x0 = jnp.broadcast_to(x0[None], eps.shape)
    s = t[:, None, None, None]
    return Points((1 - s) * x0 + s * eps, t, x0)


def nft_loss(
    v: Velocities, points: Points, advantage: Float[Array, "B"], hyper: Hyper, cfg: Learn
) -> tuple[Float[Array, "B"], Metrics]:
    """DiffusionNFT (arXiv 2509.16117), with every constant of algorithms.md section 2; f32.

    v+ = beta v + (1 - beta) v_old,  v- = (1 + beta) v_old - beta v,  r = clip(A / (2 clip) + 1/2, 0, 1),
    L+- = mean |x_t - t v+- - x0|^2 / w+-,  w = mean |x_t - t v+- - x0| without gradient,
    loss = clip (r L+ + (1 - r) L-) / beta + kl_weight mean |v - v_ref|^2.
    """
    chex.assert_equal_shape([v.current, v.old, v.reference, points.x_t, points.x0])
    chex.assert_equal_shape([points.t, advantage])
    beta, clip = hyper.strength, cfg.advantage_clip
    a = shape_advantage(advantage, clip, cfg.advantage_mode)
    r = jnp.clip(a / (2 * clip) + 0.5, 0.0, 1.0)
    plus = _matching(beta * v.current + (1 - beta) * v.old, points)
    minus = _matching((1 + beta) * v.old - beta * v.current, points)
    policy = clip * (r * plus + (1 - r) * minus) / beta
    kl = _mean((v.current - v.reference) ** 2)
    return policy + hyper.kl_weight * kl, {
        "policy_loss": policy,
        "kl_div": kl,
        "old_deviate": _mean((v.current - v.old) ** 2),
    }


def _matching(velocity: Float[Array, "B h w c"], points: Points) -> Float[Array, "B"]:
    """Squared error of the implied x0, divided by its own mean absolute error (no gradient through that)."""
    error = points.x_t - points.t[:, None, None, None] * velocity - points.x0
    weight = jax.lax.stop_gradient(jnp.maximum(_mean(jnp.abs(error)), 1e-5))
    return _mean(error**2) / weight


def _mean(x: Float[Array, "B h w c"]) -> Float[Array, "B"]:
    return jnp.mean(x, axis=(1, 2, 3))
