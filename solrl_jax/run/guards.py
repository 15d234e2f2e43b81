"""Warnings about a run that goes wrong, its fall-back to BF16, and the errors that stop it.

Alarms are functions of the lines of metrics.jsonl, so a resumed run has the same alarms. How well the preview ranks is
measured; a run that falls back stays in BF16, by a flag in its state. Numbers that are not finite stop a run.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Key

from solrl_jax import device, guidance, iteration, mixture, quant, rewards, rollout, sharding
from solrl_jax.config import Config, Stage
from solrl_jax.keys import sample_keys
from solrl_jax.quant import calibrate
from solrl_jax.rewards import Score
from solrl_jax.run import assemble, data
from solrl_jax.run.assemble import Parts
from solrl_jax.run.log import Line
from solrl_jax.sampler import Carry
from solrl_jax.selection import fidelity, mean_of_ranked
from solrl_jax.structs import Model, Params, Prompts, Rollout, TrainState, leaves_by_path

RECENT = 5
"""Iterations whose median an alarm looks at: one odd batch of prompts raises no alarm."""
COLLAPSED = 0.5
"""Share of prompts whose kept samples all have one reward."""
FAR = 0.2
"""Mean squared distance of velocities (about 1 themselves) from the base's or the old policy's."""
UNEQUAL = 5.0
"""How many times larger than another's the weighted spread of a summed reward may be."""
GROWTH = 10.0
"""Factor by which a distance of FAR / 100 or more may grow in RECENT iterations."""


def alarms(lines: Sequence[Line], cfg: Config) -> dict[str, str]:
    """The alarms as of the last of `lines`: {kind: a warning}, {} if there are none."""
    trained = [line for line in lines if line.get("loss") is not None]
    found = {"collapsed": _collapsed(trained), "ranks": _badly_ranked(lines, cfg), "saturated": _saturating(lines, cfg)}
    if not cfg.of_steps:  # there kl_div is the KL of a step's means
        w = guidance.weights(cfg)
        if w.kl == w.learn:  # otherwise kl_div begins at the distance of the guided base from the plain one
            found |= {"kl_div": _far(trained, "kl_div", "base")}
        found |= {"old": _far(trained, "old_deviate", "old policy")}
    found["scales"] = _unequal(trained, cfg)
    return {kind: f"warning: {text}" for kind, text in found.items() if text}


def _unequal(lines: Sequence[Line], cfg: Config) -> str:
    """Whether one reward of a raw sum decides alone, by the first spreads within prompts: those of the first iteration,
    or of a later one if no prompt of that asks for the reward."""
    if cfg.reward_rule != "sum" or not lines:
        return ""
    weights = rewards.weights(cfg.reward)
    found = {name: [x for line in lines if (x := line.get(f"reward_std/{name}")) is not None] for name in weights}
    says = {name: abs(w) * found[name][0] for name, w in weights.items() if found[name]}
    says = {name: value for name, value in says.items() if value > 0}
    if len(says) < 2 or max(says.values()) <= UNEQUAL * min(says.values()):
        return ""
    most, least = max(says, key=says.__getitem__), min(says, key=says.__getitem__)
    together = (line.get(f"asked/{most}", 1.0) + line.get(f"asked/{least}", 1.0) for line in lines)
    if max(together) < 1 + 1e-6:  # they may never be in one sum
        return ""
    even = ",".join(f"{name}:{weights[name] / x:.3g}" for name, x in says.items())
    return (
        f"of the sum of rewards {most} decides: weight times spread within a prompt is {says[most]:.3g}, that of "
        f"{least} {says[least]:.3g}; set reward_rule=gdpo and learn.advantage_spread=prompt, or weights over the "
        f"spreads, such as reward={even}"
    )


def falling(lines: Sequence[Line], cfg: Config) -> list[str]:
    """Warnings for held-out rewards that fell since the first evaluation while the trained one rose."""
    return exploited(lines, rewards.held_out(cfg.reward, cfg.evaluate.rewards))


def exploited(lines: Sequence[Line], held_out: Mapping[str, float]) -> list[str]:
    """A warning for each held-out reward that fell from the first evaluation to the last while the trained one rose.

    `held_out` gives their weights: a reward with a negative weight is better when lower, so its rise is warned of. A
    change counts beyond two of its standard errors over prompts, if the last line has those (evaluate.gains).
    """
    said = []
    for name, weight in held_out.items():
        keys = ("eval_reward_avg", f"eval_reward_{name}")
        found = [line for line in lines if all(line.get(key) is not None for key in keys)]
        if len(found) < 2:
            continue
        first, last = found[0], found[-1]
        (a, b), (c, d) = ((first[key], last[key]) for key in keys)
        noise, other = (2 * (last.get(f"eval_gain_error/{n}") or 0.0) for n in ("avg", name))
        if b - a > noise and weight * (d - c) < 0 and abs(d - c) > other:
            said.append(
                f"warning: from iteration {first['iteration']} to {last['iteration']} the trained reward rose by "
                f"{b - a:.4g} ({a:.4g} to {b:.4g}) while {name}, held out, {'fell' if d < c else 'rose'} by "
                f"{abs(d - c):.4g} ({c:.4g} to {d:.4g}): the policy may exploit what it is trained on; look at the "
                "pictures, take an earlier checkpoint, raise learn.kl_weight or train on a mix"
            )
    return said


def _recent(lines: Sequence[Line], name: str, back: int = 0) -> float | None:
    """The median of a metric over the last RECENT lines, or those `back` lines earlier; None if values are missing."""
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
    fix = "it goes on in bf16" if cfg.watch.fall_back else "set explore.precision=bf16 or watch.fall_back=true"
    other = "full rollout" if cfg.branch is None else "samples that go on from it"
    return (
        f"the preview ranks candidates unlike the {other}: Spearman {found[-1]:.2f}, below "
        f"watch.rank={cfg.watch.rank:g}; raise explore.steps{f', or {fix}' if cfg.explores_low else ''}"
    )


def _saturating(lines: Sequence[Line], cfg: Config) -> str:
    fell_back = cfg.watch.fall_back and any(rank < cfg.watch.rank for rank in _ranks(lines))
    if not cfg.explores_low or fell_back:
        return ""
    count, worst = (
        next((line[f"watch/{name}"] for line in reversed(lines) if line.get(f"watch/{name}") is not None), None)
        for name in ("saturated", "saturation")
    )
    if not count or worst is None or not math.isfinite(worst):
        return ""
    return (
        f"the inputs of {count:.0f} Linears outgrew the FP8 units measured on the base, up to {worst:.2f} times what "
        "these hold, and are cut off there: set explore.precision=bf16, lower learn.learning_rate or take an earlier "
        "checkpoint"
    )


def _ranks(lines: Sequence[Line]) -> list[float]:
    """Every measurement's Spearman so far."""
    return [line["watch/spearman"] for line in lines if line.get("watch/spearman") is not None]


# --- how well the preview ranks -------------------------------------------------------------------------------------


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


# --- what stops a run ------------------------------------------------------------------------------------------------

Metrics = dict[str, float]


class TrainError(RuntimeError):
    """A run that cannot go on; the message says why and what was saved."""


SUMMARIES = (
    "reward/mean",
    "reward/max",
    "reward/min",
    "reward/range",
    "explore/reward_mean",
    "explore/reward_std_mean",
)


def check_rewards(metrics: Metrics, number: int, cause: Callable[[], str]) -> None:
    """Raises TrainError that names each reward whose mean, over the kept samples or the candidates, is not finite.

    `cause` says which weights are to blame, "" if there are none.
    """
    scored = {name: value for name, value in metrics.items() if name.startswith(("reward/", "explore/reward"))}
    bad = {name: value for name, value in scored.items() if not math.isfinite(value)}
    if bad:
        named = {
            n.removeprefix("explore/reward_").removeprefix("reward/"): v for n, v in bad.items() if n not in SUMMARIES
        }
        told = ", ".join(f"{name} = {value}" for name, value in (named or bad).items())
        raise TrainError(
            f"iteration {number}: a reward is not finite: {told}; {cause() or 'look at the pictures it got'}"
        )


def not_finite(parts: Parts, state: TrainState, prompts: Prompts) -> str:
    """Which of an iteration's input arrays have NaN or infinite values, and what to do; "" if none."""
    frozen = parts.frozen
    trees = {"network": frozen.base, "vae": frozen.vae, "rewards": frozen.rewards, "conditioning": prompts.cond}
    trees |= {"negative": frozen.negative, "lora": state.lora, "old": state.old}
    floats = {k: x for k, x in leaves_by_path(trees).items() if jnp.issubdtype(x.dtype, jnp.floating)}
    bad = [k for k, x in floats.items() if not bool(jnp.isfinite(x.astype(jnp.float32)).all())]
    if not bad:
        return ""
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return (
        f"not finite are {', '.join(bad[:3])}{more}: look at those weights (conditioning and negative are the text "
        "encoders'; of a damaged lora or old delete the newest checkpoint and go on from the one before)"
    )


def check_ratio(metrics: Metrics, number: int, clip_range: float) -> None:
    """Raises TrainError if rounding alone can clip the ratios of probabilities.

    In an iteration's first update the exact ratio is 1; its deviation is the network's rounding. It is not known of an
    update that was skipped as not finite.
    """
    noise = metrics.get("ratio/noise", 0.0)
    if clip_range < 10 * noise and math.isfinite(noise):
        raise TrainError(
            f"iteration {number}: before an update the ratio of probabilities is off by {noise:.1e} from rounding, "
            f"more than a tenth of learn.clip_range={clip_range:g}: use {11 * noise:.1e} or more, learn.updates=1 "
            "(whose ratio is exactly 1) or model.dtype=float32"
        )


def device_error(e: Exception) -> str:
    """The first line of a device's error, and how to fix it."""
    told = (str(e).strip() or "no message").splitlines()[0]
    if "RESOURCE_EXHAUSTED" in told:
        sizes = "explore.chunk, regenerate.chunk, evaluate.chunk or learn.micro_batch"
        return f"the device's memory is full ({told}): lower {sizes}; --mode=plan says what each takes"
    return f"the device failed ({told}): see whether it is still there, then go on with --resume"
