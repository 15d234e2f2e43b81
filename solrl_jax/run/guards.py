"""Warnings about a run that goes wrong, and the errors that stop it.

Alarms are functions of the lines of metrics.jsonl, so a resumed run has the same alarms. Numbers that are not finite
stop a run.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp

from solrl_jax import guidance, rewards
from solrl_jax.config import Config
from solrl_jax.run.assemble import Parts
from solrl_jax.run.log import Line
from solrl_jax.structs import Prompts, TrainState, leaves_by_path

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
