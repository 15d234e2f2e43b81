"""What an iteration costs at full FLUX.1-dev size on an H100: its image-steps and trained points by measured seconds.

The small world's own wall time says little of the methods: there a quantised network is slower than a BF16 one, and a
VAE costs as much as the transformer. So each kind of work is counted in the small world and paid at the price of one
image at 512 px (experiments/flux_h100): a step in BF16, a step in low precision, decoding and scoring, a point that is
trained (forward and backward), and each further velocity at it (old policy, reference, behaviour).
"""

import json
from pathlib import Path
from typing import NamedTuple

from solrl_jax import algos
from solrl_jax.config import Config

MEASURED = Path(__file__).resolve().parent.parent / "flux_h100/results/iteration.json"


class Prices(NamedTuple):
    """Seconds of one image on an H100, and of quantising once."""

    bf16: float
    low: float
    decoded: float  # and scored
    trained: float
    fixed: float
    quantise: float


def prices(file: Path = MEASURED) -> Prices:
    """From the results of experiments/flux_h100; low precision there is FP8."""
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"]

    def seconds(name: str) -> float:
        return figures[name]["value"]

    bf16 = seconds("bf16 forward of 24") / 24
    micro_step = seconds("micro-step of 12 points, keeping attention,mlp") / 12  # with two further velocities a point
    return Prices(
        bf16=bf16,
        low=seconds("fp8 forward of 24") / 24,
        decoded=(seconds("decode of 24, bfloat16") + seconds("reward of 24: clipscore")) / 24,
        trained=micro_step - 2 * bf16,
        fixed=bf16,
        quantise=seconds("quantise"),
    )


class Work(NamedTuple):
    """A world's own networks for one picture, GFLOP: a step, decoding, the reward; TFLOP/s of an H200 on them."""

    forward: float
    decode: float
    reward: float
    rate: float
    decode_rate: float


WORK = {"tiny": Work(0.157, 0.112, 0.307, rate=50, decode_rate=25), "emoji": Work(1.632, 1.766, 1.035, 190, 190)}
"""GFLOP by `--mode=plan` and by `plan.jaxpr` of the reward; tiny decodes in float32. With these rates the arms of
experiments/methods and of experiments/tiny would have taken .7 to 1.5 of their measured wall times. The emoji world's
is fitted to its first two arms, which had neither fused attention nor `lab.COMPILER`."""
ABOUT = "about {:.0f} s on an H200 by FLOPs; compiling, loading and the judge are not counted"


def of_world(world: str) -> Prices:
    """What a picture takes in a world's own networks on an H200, seconds, estimated from its FLOPs; low precision is
    emulated there. A trained point is 2.2 forward passes: the base's weights have no gradient."""
    work = WORK[world]
    step = work.forward / work.rate / 1e3
    decoded = work.decode / work.decode_rate / 1e3 + work.reward / work.rate / 1e3
    return Prices(bf16=step, low=1.7 * step, decoded=decoded, trained=2.2 * step, fixed=step, quantise=0.0)


def price(cfg: Config, each: Prices) -> dict[str, float]:
    """Seconds of one iteration of `cfg`, by kind of work."""
    out = {"rollout in bf16": 0.0, "rollout in low precision": 0.0, "decode and reward": 0.0}
    for _, stage, images in cfg.stages():
        low = stage.precision != "bf16"
        kind = "rollout in low precision" if low else "rollout in bf16"
        out[kind] += cfg.prompts * images * stage.steps * (each.low if low else each.bf16)
        out["decode and reward"] += cfg.prompts * images * each.decoded
    further = len(algos.find(cfg.learn.algorithm).fixed(cfg.learn))
    points = cfg.prompts * cfg.kept * cfg.times * cfg.learn.epochs
    out["learn"] = points * (each.trained + further * each.fixed)
    out["quantise"] = each.quantise if cfg.low_precision else 0.0
    return out


def wall(cfg: Config, runs: int, iterations: int, pictures: int) -> float:
    """Seconds of an H200 for so many runs of a world's config, each with so many pictures measured in 10 steps: an
    estimate from FLOPs. Compiling, loading and the judge are not counted."""
    each = of_world(cfg.name)
    measured = pictures * (10 * each.bf16 + each.decoded)
    return runs * (iterations * sum(price(cfg, each).values()) + measured)
