"""Pictures per second of each reward, including preprocessing, at full size with random weights.

    python -m experiments.rewards.speed --out=experiments/rewards/results/speed.json                      # an H100
    python -m experiments.rewards.speed --pictures=2 --sizes=64 --rewards=clipscore --out=/tmp/r.json     # short

`--pictures` pictures of one prompt, 24 at a time, in each reward_dtype of `--kinds` (float32: on GPUs products of pairs
of bf16 numbers; ranks: experiments.rewards.ranks). A reward's share of FLUX's rollout is computed from the rollout's
time in experiments/efficiency, which includes CLIPScore in float32.
"""

import argparse
import functools
import importlib
import itertools
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Float

from experiments import results
from experiments.full_size import drawn, timed
from solrl_jax import device, sharding
from solrl_jax.plan import shapes
from solrl_jax.run import assemble
from solrl_jax.structs import Images, Params, PyTree

REWARDS = "clipscore,pickscore,hpsv2,imagereward"
KINDS = "float32_exact,float32,bfloat16"
TOGETHER = 24
ROLLOUT = Path(__file__).resolve().parent.parent / "efficiency/results/flux.json"


def shares(figures: Mapping[str, dict]) -> dict[str, dict]:
    """The share that each reward in `figures` would take of a prompt's two-stage FP8 rollout at 512 px."""
    measured = json.loads(ROLLOUT.read_text(encoding="utf-8"))
    scored = measured["candidates"] + measured["kept"]
    rollout = measured["figures"]["two stages, low precision: rollout"]["value"]
    taken = {
        case: scored / f["value"] for case, f in figures.items() if case.endswith(", 512 px") and "all" not in case
    }
    if (its_own := "clipscore, float32, 512 px") not in taken:
        return {}
    rest = rollout - taken[its_own]
    for dtype in KINDS.split(","):
        if together := [t for case, t in taken.items() if f", {dtype}, " in case]:
            taken[f"all, {dtype}, 512 px"] = sum(together)
    unit = f"of FLUX's rollout, {scored} pictures a prompt"
    return {f"{case}: share": results.figure(t / (rest + t), unit, 1) for case, t in taken.items()}


def scored(
    kind: str, described: Callable[..., Any], params: Params, pictures: int, side: int, repeat: int
) -> tuple[list[float], float]:
    """Seconds of scoring so many pictures of side x side pixels, `repeat` times; the time to compile."""
    images, chunks = jax.random.uniform(jax.random.key(0), (pictures, side, side, 3)), max(1, pictures // TOGETHER)
    reward, _, tokens = described(None, kind)

    @jax.jit
    def score(params: Params, images: Images, ids: PyTree) -> Float[Array, "chunks n"]:
        parts = images.reshape(chunks, -1, *images.shape[1:])
        return jax.lax.map(lambda part: reward.score(params, part, ids), parts)

    return timed(functools.partial(score, params, images, drawn(shapes.batch(tokens, 1))), repeat)


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", default=REWARDS)
    parser.add_argument("--kinds", default=KINDS)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--sizes", default="512,1024")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    assemble.use_compilation_cache()
    figures, together = {}, {}
    with jax.set_mesh(sharding.make_mesh(1)):
        for name in args.rewards.split(","):
            described = importlib.import_module(f"solrl_jax.rewards.{name}").shapes
            params = drawn(described(None)[1])
            for kind, side in itertools.product(args.kinds.split(","), map(int, args.sizes.split(","))):
                seconds, compiling = scored(kind, described, params, args.pictures, side, args.repeat)
                median, case = statistics.median(seconds), f"{kind}, {side} px"
                together[case] = together.get(case, 0.0) + median
                figures[f"{name}, {case}"] = results.figure(args.pictures / median, "pictures/s", args.repeat)
                figures[f"{name}, {case}: seconds"] = results.figure(
                    median, "s", args.repeat, [min(seconds), max(seconds)]
                )
                rate = args.pictures / median
                print(f"{median:8.4f} s {rate:8.0f} /s  {name} {case} (+{compiling:.1f} s)", flush=True)
            del params
            results.record(args.out, figures)
    for case, seconds in together.items():
        figures[f"all, {case}: seconds of {args.pictures}"] = results.figure(seconds, "s", args.repeat)
        print(f"{seconds:8.4f} s  all {case}")
    results.record(args.out, figures | shares(figures))


if __name__ == "__main__":
    main()
