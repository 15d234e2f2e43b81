"""How well the preview ranks, measured during a run, and the fall-back to BF16 that may follow.

A run that falls back stays in BF16, by a flag in its state.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Key

from solrl_jax import device, iteration, mixture, quant, rollout, sharding
from solrl_jax.config import Config, Stage
from solrl_jax.keys import sample_keys
from solrl_jax.quant import calibrate
from solrl_jax.rewards import Score
from solrl_jax.run import assemble, data
from solrl_jax.run.assemble import Parts
from solrl_jax.sampler import Carry
from solrl_jax.selection import fidelity, mean_of_ranked
from solrl_jax.structs import Model, Params, Prompts, Rollout, TrainState


def due(cfg: Config, done: int) -> bool:
    """Whether the preview is measured after iteration `done`; 0 is the beginning of a run."""
    return cfg.explore is not None and cfg.watch.every > 0 and done % cfg.watch.every == 0


def measured(parts: Parts, state: TrainState) -> dict[str, float]:
    """Spearman, overlap of the best K/2 and kept contrast of the preview against all N candidates drawn in full.

    Uses `watch.prompts` training prompts, rounded to a multiple of the devices, and the noise of the coming iteration;
    costs N full rollouts per prompt. It runs the stages' own programs, in calls of as many prompts and images as a
    stage has, so it compiles little and takes no more memory than they do. With FP8 the Linears' inputs are looked at
    first, in BF16 and of calibrate.PROMPTS pictures at most. Prompts whose N full rollouts have one reward do not
    count, since nothing ranks them, nor those with one that is not finite; without any others there are no ranks.

    In a branch `watch/*` compares with all N finished from the preview's states, like the trained samples, and
    `watch/noise_*` with all N drawn from the noise by the steps of `regenerate`, like the policy's own samples.
    """
    cfg = parts.cfg
    devices, train = parts.mesh.size, parts.prompts.train
    count = min(-(-cfg.watch.prompts // devices), len(train) // devices) * devices  # all there are, if fewer
    batch = data.batch(train, cfg.seed, 0, max(count, cfg.prompts))[:count]
    prompts, rows = assemble.encode(parts, batch, parts.score), parts.prompts.rows_of(batch)
    keys = sample_keys(state, count, cfg.candidates)
    programs = iteration.programs(parts.model, parts.score, parts.optimizer, cfg)
    more = _measuring(parts.model, parts.score, cfg)
    kernels = programs["merged"](state, parts.frozen)
    saturated = {} if more.seen is None else _saturated(parts, more.seen, kernels, prompts, keys)
    low = programs["quantised"](kernels, parts.frozen)

    def roll(name: str, program: Callable[..., Rollout], low: Params | None, state: Carry | None = None) -> Rollout:
        """All N candidates of the prompts; of an uneven number of calls the last one begins at an earlier candidate."""
        stage, images = next((stage, images) for known, stage, images in cfg.stages() if known == name)
        few, found = prompts_per_call(stage, images, cfg.prompts // devices, count // devices), []
        for i in range(0, count // devices, few):
            group, *seeds = sharding.block((prompts, keys, state), i, few)
            columns = []
            for first in range(0, cfg.candidates, images):
                begin = min(first, cfg.candidates - images)
                some = sharding.block(seeds, begin, images, axis=1)
                one = program(kernels, low, parts.frozen, group, *some)
                one = rollout.with_host(one, parts.score, group.tokens, rows)._replace(keys=None, x0=None, path=None)
                again = first - begin
                columns.append(jax.block_until_ready(sharding.block(one, again, images - again, axis=1)))
            found.append(sharding.joined(tuple(columns), axis=1))
        return sharding.joined(tuple(found))

    preview = roll("explore", programs["explore"], low)
    if cfg.regenerate.precision == "bf16":
        low = None  # the quantised kernels leave the device
    truths = {"": roll("regenerate", programs["regenerate"], low, preview.state)}
    if more.full is not None:
        truths["noise_"] = roll("regenerate", more.full, low)
    guess, ranks = mixture.worth(preview, cfg), {}
    for at, full in truths.items():
        truth = mixture.worth(full, cfg)
        found = fidelity(guess, truth, cfg.kept)
        ranks |= {f"watch/{at}{name}": float(mean_of_ranked(x, truth)) for name, x in found.items()}
    return {name: x for name, x in ranks.items() if not math.isnan(x)} | saturated


def prompts_per_call(stage: Stage, images: int, mine: int, watched: int) -> int:
    """Prompts of a device in a call: of its `mine` as many as the stage takes, if these divide its `watched` ones."""
    return math.gcd(rollout.block_shape(stage.chunk, mine, images)[0], watched)


def _saturated(
    parts: Parts,
    seen: Callable[..., Any],
    kernels: dict[str, jax.Array],
    prompts: Prompts,
    keys: Key[jax.Array, "P N"],
) -> dict[str, float]:
    """How many quantised Linears of this policy have inputs, in one sample of each of a few prompts, that their FP8
    unit does not hold; and by how much the worst exceeds it (1: just held). NaN if an input is not finite.
    """
    rule, few = parts.model.quant_rules.fp8, min(len(keys), calibrate.PROMPTS)
    variables = rollout.policy_variables(kernels, None, parts.frozen)
    some = sharding.fetch(jax.tree.map(lambda x: x[:few], prompts.cond))
    try:
        given = sharding.replicate((some, keys[:few, 0]), parts.mesh)
        largest = calibrate.over_steps(*seen(variables, *given, parts.frozen.negative))
    except FloatingPointError:
        return {"watch/saturated": math.nan, "watch/saturation": math.nan}
    found = calibrate.saturating(rule, largest, quant.chosen(parts.frozen.base, rule))
    return {"watch/saturated": float(len(found)), "watch/saturation": max(found.values(), default=1.0)}


class MeasuringPrograms(NamedTuple):
    """The jitted programs of a measurement that no stage has."""

    seen: Callable[..., Any] | None  # the largest inputs (calibrate.seen); None if they have no units
    full: Callable[..., Rollout] | None  # from the noise; None without a branch, where `regenerate` begins there


@functools.lru_cache(maxsize=1)
def _measuring(model: Model, score: Score, cfg: Config) -> MeasuringPrograms:
    """Jitted once for a run."""
    assert cfg.preview is not None
    units = cfg.preview.precision == "fp8" and model.quant_rules.fp8.units
    full = functools.partial(rollout.rolled, model=model, score=score, stage=cfg.regenerate)
    options = device.compiler_options(cfg.regenerate.precision)
    return MeasuringPrograms(
        seen=jax.jit(functools.partial(calibrate.seen, model=model, stage=cfg.preview)) if units else None,
        full=jax.jit(full, compiler_options=options) if cfg.branch is not None else None,
    )


def with_fall_back(state: TrainState, metrics: Mapping[str, float], cfg: Config) -> TrainState:
    """`state`, with its flag for exploration in BF16 set if the run may fall back and the Spearman of these metrics is
    below watch.rank. The flag is part of the state, so a resumed run needs no metrics for it."""
    found = metrics.get("watch/spearman", math.nan)  # NaN is not below
    if not (cfg.watch.fall_back and cfg.explores_low and found < cfg.watch.rank):
        return state
    return state._replace(fallen_back=jnp.ones_like(state.fallen_back))


def in_bf16(cfg: Config) -> Config:
    """`cfg`, exploring in BF16."""
    assert cfg.explore is not None
    return dataclasses.replace(cfg, explore=dataclasses.replace(cfg.explore, precision="bf16"))
