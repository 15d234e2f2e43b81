"""By what the samples of a prompt are compared and learnt from, where there are several rewards (config.reward_rule).

    "sum"   R = sum_k w_k R_k on the rewards' own scales, as published for the methods here; the largest scale decides.
    "gdpo"  S = sum_k w_k z_k, where z_k is the advantage of reward k alone, and the advantages are S whitened over the
            batch (GDPO, arXiv 2601.05242). Weights then weigh, whatever the scales are.

Selection, the strata of updates and the measures of ranks all take the same `worth`. With one reward both rules give
one order, and the first is used.

Prompts may ask for some of the rewards only (rewards.bound): z_k and w_k R_k are 0 for those that do not ask for k, and
spread="all" takes the std over those that do.
"""

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp
from jaxtyping import Array, Float

from solrl_jax import algos, rewards
from solrl_jax.config import Config
from solrl_jax.selection import correlation
from solrl_jax.structs import Rollout

Parts = Mapping[str, Float[Array, "P K"]]
OF_PARTS = ("reward/", "explore/reward_", "reward_std/", "zero_std/", "share/", "corr/")
"""What the names of a reward's own metrics begin with."""


def combined(
    parts: Parts, weights: Mapping[str, float], spread: str, asked: Parts = MappingProxyType({})
) -> Float[Array, "P K"]:
    """S = sum_k w_k z_k of the rewards' parts; `spread` says which std a z is divided by (algos.advantages)."""
    total = jnp.zeros_like(next(iter(parts.values())))
    for name, part in parts.items():
        total = total + weights[name] * algos.advantages(part, spread, asked.get(name))
    return total


def whitened(score: Float[Array, "P K"]) -> Float[Array, "P K"]:
    """(S - mean) / (std + 1e-4) over the batch; the mean of S is 0 already, up to rounding."""
    return (score - jnp.mean(score)) / (jnp.std(score) + 1e-4)


def by_parts(cfg: Config) -> bool:
    """Whether rewards are normalised one by one: by the rule, and because there are several."""
    return cfg.reward_rule == "gdpo" and len(rewards.weights(cfg.reward)) > 1


def worth(found: Rollout, cfg: Config) -> Float[Array, "P K"]:
    """What a prompt's samples are ordered by."""
    if not by_parts(cfg):
        return found.reward
    return combined(found.parts, rewards.weights(cfg.reward), cfg.learn.advantage_spread, found.asked)


def advantages(samples: Rollout, cfg: Config) -> Float[Array, "P K"]:
    """A of the kept samples, before `algos.shape_advantage`."""
    if not by_parts(cfg):
        return algos.advantages(samples.reward, cfg.learn.advantage_spread)
    return whitened(worth(samples, cfg))


def metrics(samples: Rollout, cfg: Config) -> dict[str, Float[Array, ""]]:
    """Of each of several rewards over the kept samples of the prompts that ask for it; {} for one.

    reward_std/<k>, zero_std/<k>: mean std within a prompt, and the share of prompts with one value. share/<k>: its part
    of sum |w z| (gdpo) or of sum |w| std (sum), what it has to say in the order. corr/<k>: its mean correlation with
    the worth within a prompt. advantage/std, with gdpo: of S before whitening.
    """
    if len(samples.parts) < 2:
        return {}
    weights, score, asked = rewards.weights(cfg.reward), worth(samples, cfg), samples.asked
    mean = {name: functools.partial(mean_asked, asked=asked.get(name)) for name in samples.parts}
    out, says = {}, {}
    for name, part in samples.parts.items():
        out[f"reward_std/{name}"] = std = mean[name](jnp.std(part, axis=-1))
        z = algos.advantages(part, cfg.learn.advantage_spread, asked.get(name))
        says[name] = abs(weights[name]) * (mean[name](jnp.abs(z)) if by_parts(cfg) else std)
    everything = sum(says.values(), jnp.float32(0))
    for name, part in samples.parts.items():
        out[f"zero_std/{name}"] = mean[name](jnp.all(part == part[:, :1], axis=-1).astype(jnp.float32))
        out[f"share/{name}"] = says[name] / jnp.where(everything > 0, everything, 1.0)
        out[f"corr/{name}"] = mean[name](correlation(part, score))
    return out | ({"advantage/std": jnp.std(score)} if by_parts(cfg) else {})


def mean_asked(x: Float[Array, "P *K"], asked: Float[Array, "P K"] | None) -> Float[Array, ""]:
    """The mean over the prompts that ask for a reward, all of them without `asked`; 0 if none does."""
    if asked is None:
        return jnp.mean(x)
    there = jnp.broadcast_to(asked[:, 0] if x.ndim == 1 else asked[:, :1], x.shape)
    return jnp.sum(x * there) / jnp.maximum(jnp.sum(there), 1.0)


def known(metrics: Mapping[str, float]) -> dict[str, float]:
    """An iteration's metrics without means of nothing: those of rewards that none of its prompts asks for, and of ranks
    if no prompt's rewards differ."""
    none = [name.removeprefix("asked/") for name, x in metrics.items() if name.startswith("asked/") and x == 0]
    left_out = {begin + name for name in none for begin in OF_PARTS}
    left_out |= {name for name, x in metrics.items() if name == "rank/spearman" and math.isnan(x)}
    return {name: value for name, value in metrics.items() if name not in left_out}
