"""What a run should not do unseen: alarms over its metrics, and a pass that measures how well the preview ranks.

Alarms are functions of metrics.jsonl's lines, so that a resumed run sees what the one before it saw.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from solrl_jax import rewards, rollout, sharding
from solrl_jax.config import Config, Stage
from solrl_jax.iteration import Stages
from solrl_jax.keys import sample_keys
from solrl_jax.run import assemble, data
from solrl_jax.run.assemble import Parts
from solrl_jax.run.log import Line, exploited
from solrl_jax.selection import fidelity
from solrl_jax.structs import Params, Rollout, TrainState

RECENT = 5
"""Iterations whose median an alarm looks at: one odd batch of prompts is none."""
COLLAPSED = 0.5
"""Share of prompts whose kept samples all have one reward."""
FAR = 0.2
"""Mean squared distance of velocities, which themselves are about 1, from the base's or the old policy's."""
GROWTH = 10.0
"""Times that a distance, once it is a hundredth of FAR, may grow in RECENT iterations."""


def alarms(lines: Sequence[Line], cfg: Config) -> dict[str, str]:
    """What is wrong as of the last of `lines`: {kind: a line}, {} where nothing is."""
    trained = [line for line in lines if line.get("loss") is not None]
    found = {"collapsed": _collapsed(trained), "ranks": _badly_ranked(lines, cfg)}
    if not cfg.of_steps:  # whose KL is of a step's means
        found |= {"kl_div": _far(trained, "kl_div", "base"), "old": _far(trained, "old_deviate", "old policy")}
    return {kind: f"warning: {text}" for kind, text in found.items() if text}


def falling(lines: Sequence[Line], cfg: Config) -> list[str]:
    """Which held-out rewards have fallen since the first evaluation, while the trained one rose."""
    return exploited(lines, rewards.held_out(cfg.reward, cfg.evaluate.rewards))


def _recent(lines: Sequence[Line], name: str, back: int = 0) -> float | None:
    """The median of the last RECENT values of a metric, or of those `back` before them; None where there are fewer."""
    end = len(lines) - back
    found = [line[name] for line in lines[max(0, end - RECENT) : max(0, end)] if line.get(name) is not None]
    return statistics.median(found) if len(found) == RECENT else None


def _collapsed(lines: Sequence[Line]) -> str:
    share = _recent(lines, "zero_std_ratio")
    if share is None or share < COLLAPSED:
        return ""
    return (
        f"{share:.0%} of the prompts have one reward for all their kept samples, from which nothing is learnt: the "
        "policy draws one picture, or the reward knows few values; raise learn.kl_weight, lower learn.learning_rate or "
        "take an earlier checkpoint"
    )


def _far(lines: Sequence[Line], name: str, other: str) -> str:
    now, before = _recent(lines, name), _recent(lines, name, RECENT)
    if now is None or before is None or (now < FAR and (now < FAR / 100 or now < GROWTH * before)):
        return ""
    return (
        f"the policy runs away from the {other}: {name} is {now:.3g}, {RECENT} iterations ago it was {before:.3g} "
        "(velocities are about 1): lower learn.learning_rate, raise learn.kl_weight or take an earlier checkpoint"
    )


def _badly_ranked(lines: Sequence[Line], cfg: Config) -> str:
    found = _ranks(lines)
    if not found or found[-1] >= cfg.watch.rank:
        return ""
    mend = "it goes on in bf16" if cfg.watch.fall_back else "set explore.precision=bf16 or watch.fall_back=true"
    return (
        f"the preview ranks candidates unlike the full rollout: Spearman {found[-1]:.2f}, below "
        f"watch.rank={cfg.watch.rank:g}; raise explore.steps{f', or {mend}' if _low(cfg) else ''}"
    )


def _ranks(lines: Sequence[Line]) -> list[float]:
    """Every measurement's Spearman so far."""
    return [line["watch/spearman"] for line in lines if line.get("watch/spearman") is not None]


def _low(cfg: Config) -> bool:
    """Whether exploration has a BF16 to fall back to."""
    return cfg.explore is not None and cfg.explore.precision != "bf16"


# --- how well the preview ranks -------------------------------------------------------------------------------------


def due(cfg: Config, done: int) -> bool:
    """Whether the preview is measured after iteration `done`; 0 is the begin of a run."""
    return cfg.explore is not None and cfg.watch.every > 0 and done % cfg.watch.every == 0


def measured(parts: Parts, state: TrainState) -> dict[str, float]:
    """Spearman, overlap of the best K/2 and kept contrast of the preview against all N candidates drawn in full.

    Of `watch.prompts` training prompts, rounded to a multiple of the devices, with the noise of the coming iteration;
    costs N full rollouts of each. Takes no more memory than the stages: a prompt a device at a time, in the smallest of
    their chunks, and no quantised kernels beside the full rollouts.
    """
    cfg = parts.cfg
    devices, train = parts.mesh.size, parts.prompts.train
    count = min(-(-cfg.watch.prompts // devices), len(train) // devices) * devices  # all there are, where that is less
    batch = data.batch(train, cfg.seed, 0, max(count, cfg.prompts))[:count]
    prompts = assemble.encode(parts, batch, parts.score)
    keys = sample_keys(state, count, cfg.candidates)
    programs = _programs(Stages(parts.model, parts.score, parts.optimizer, cfg))
    kernels = programs.merged(state, parts.frozen)
    low = programs.quantised(kernels, parts.frozen)

    def rewards_of(roll: Callable[..., Rollout], low: Params | None) -> jax.Array:
        found = []
        for i in range(count // devices):
            group, group_keys = sharding.block((prompts, keys), i, 1)
            rolled = roll(kernels, low, parts.frozen, group, group_keys)
            found.append(rollout.with_host(rolled, parts.score, group.tokens).reward)
        return jax.block_until_ready(sharding.joined(tuple(found)))

    previewed = rewards_of(programs.preview, low)
    if cfg.regenerate.precision == "bf16":
        low = None  # the quantised kernels leave the device
    found: Mapping[str, jax.Array] = fidelity(previewed, rewards_of(programs.full, low), cfg.kept)
    return {f"watch/{name}": float(jnp.mean(value)) for name, value in found.items()}


class Programs(NamedTuple):
    """Of one measurement, each jitted: kernels, then rollouts of a prompt's N candidates."""

    merged: Callable[..., dict[str, jax.Array]]
    quantised: Callable[..., Params | None]
    preview: Callable[..., Rollout]
    full: Callable[..., Rollout]


@functools.lru_cache(maxsize=1)
def _programs(run: Stages) -> Programs:
    """Jitted once for a run."""
    rolls = (jax.jit(functools.partial(run.roll, stage)) for stage in rollouts(run.cfg))
    return Programs(jax.jit(run.merged), jax.jit(run.quantised), *rolls)


def rollouts(cfg: Config) -> tuple[Stage, Stage]:
    """Preview and full rollout of a measurement: the stages' own, in a chunk that fits both and divides N."""
    assert cfg.explore is not None
    smallest = min(cfg.explore.chunk, cfg.regenerate.chunk)
    chunk = max(size for size in range(1, min(smallest, cfg.candidates) + 1) if cfg.candidates % size == 0)
    return dataclasses.replace(cfg.explore, chunk=chunk), dataclasses.replace(cfg.regenerate, chunk=chunk)


def judged(state: TrainState, metrics: Mapping[str, float], cfg: Config) -> TrainState:
    """`state`, from which on exploration is in BF16 where these metrics have a Spearman below watch.rank and the run is
    one that falls back. The flag is part of the state, so a resumed run needs no metrics to know it."""
    found = metrics.get("watch/spearman", math.nan)  # NaN is not below
    if not (cfg.watch.fall_back and _low(cfg) and found < cfg.watch.rank):
        return state
    return state._replace(fallen_back=jnp.ones_like(state.fallen_back))


def in_bf16(cfg: Config) -> Config:
    """`cfg`, exploring in BF16."""
    assert cfg.explore is not None
    return dataclasses.replace(cfg, explore=dataclasses.replace(cfg.explore, precision="bf16"))
