"""What ends a run whose numbers or device are not sound, and which of its arrays are to blame."""

import math
from collections.abc import Callable

import jax.numpy as jnp

from solrl_jax.run.assemble import Parts
from solrl_jax.structs import Prompts, TrainState, leaves_by_path

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
    """Raises TrainError that names the rewards whose mean is not finite, over the kept samples or the candidates.

    `cause` says which weights are to blame, "" where none are.
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
    """Which arrays an iteration begins with that are NaN or infinite somewhere, and what to do; "" if none."""
    frozen = parts.frozen
    trees = {"network": frozen.base, "vae": frozen.vae, "rewards": frozen.rewards, "conditioning": prompts.cond}
    trees |= {"lora": state.lora, "old": state.old}
    floats = {k: x for k, x in leaves_by_path(trees).items() if jnp.issubdtype(x.dtype, jnp.floating)}
    bad = [k for k, x in floats.items() if not bool(jnp.isfinite(x.astype(jnp.float32)).all())]
    if not bad:
        return ""
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return (
        f"not finite are {', '.join(bad[:3])}{more}: look at those weights (conditioning is the text encoders'; of a "
        "damaged lora or old delete the newest checkpoint and go on from the one before)"
    )


def check_ratio(metrics: Metrics, number: int, clip_range: float) -> None:
    """Raises TrainError where ratios of probabilities are clipped at what is mere rounding.

    Of an iteration's first update the ratio is 1; how far it is off is what the network's rounding does to it.
    """
    noise = metrics.get("ratio/noise", 0.0)
    if not clip_range >= 10 * noise:
        raise TrainError(
            f"iteration {number}: before an update the ratio of probabilities is off by {noise:.1e} from rounding, "
            f"more than a tenth of learn.clip_range={clip_range:g}: use {11 * noise:.1e} or more, learn.updates=1 "
            "(whose ratio is exactly 1) or model.dtype=float32"
        )


def device_error(e: Exception) -> str:
    """What a device reports, its first line, and what mends it."""
    told = (str(e).strip() or "no message").splitlines()[0]
    if "RESOURCE_EXHAUSTED" in told:
        sizes = "explore.chunk, regenerate.chunk, evaluate.chunk or learn.micro_batch"
        return f"the device's memory is full ({told}): lower {sizes}; --mode=plan says what each takes"
    return f"the device failed ({told}): see whether it is still there, then go on with --resume"
