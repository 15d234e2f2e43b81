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
