"""Does a reward in bfloat16, or in float32 as GPUs multiply it, rank the pictures of a prompt as in exact float32?

    python -m experiments.rewards.ranks --out=experiments/rewards/results/ranks.json             # minutes on a GPU
    python -m experiments.rewards.ranks --rewards= --captions=4 --pictures=8 --out=/tmp/r.json   # short

The pictures are the small world's candidates. Its CLIP is trained and gets them unchanged; the four networks of full
size have random weights and get them enlarged to 256 px. With random weights, the scores of a group differ far less
than with trained ones (`spread`, their standard deviation), so bfloat16's errors, which have the same size, change the
order more. Means over groups. On a CPU float32 is exact, so only bfloat16 is compared there.
"""

import argparse
import importlib
import operator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments import lab, results
from experiments.full_size import drawn
from experiments.rewards.speed import REWARDS
from experiments.tiny import check
from solrl_jax import config, device, sharding
from solrl_jax.plan import shapes
from solrl_jax.rewards import clipscore, parse_paths
from solrl_jax.selection import fidelity
from solrl_jax.structs import Params, PyTree, Reward

EXACT, OTHERS = "float32_exact", ("float32", "bfloat16")
SIZE = 256


def scores(
    reward: Reward, params: Params, images: Float[Array, "P N H W 3"], tokens: PyTree, size: int = 0
) -> Float[np.ndarray, "P N"]:
    """Scores, computed one prompt at a time; a non-zero `size` enlarges the pictures to size x size pixels."""

    @jax.jit
    def group(params: Params, images: Float[Array, "N H W 3"], tokens: PyTree) -> Float[Array, "N"]:
        if size:
            images = jnp.clip(jax.image.resize(images, (len(images), size, size, 3), "cubic"), 0, 1)
        return reward.score(params, images, jax.tree.map(lambda x: x[None], tokens))

    return np.stack(
        [group(params, *jax.tree.map(operator.itemgetter(p), (images, tokens))) for p in range(len(images))]
    )


def compared(name: str, full: Float[np.ndarray, "P N"], low: Float[np.ndarray, "P N"], kept: int) -> dict[str, dict]:
    """Figures of the scores `low` against the exact ones, `full`."""
    full, low = full.astype(np.float64), low.astype(np.float64)
    error = low - full
    spread = full.std(axis=1)
    each = {**fidelity(jnp.asarray(low), jnp.asarray(full), kept), "spread": spread}
    each |= {"error over spread": error.std(axis=1) / spread}  # std: an error that a whole group shares changes no rank
    return {
        f"{name}: {what}": results.figure(
            float(np.mean(v)), "mean over prompts; least, most", len(v), [float(np.min(v)), float(np.max(v))]
        )
        for what, v in each.items()
    }


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", default=REWARDS, help="of full size, with random weights")
    parser.add_argument("--captions", type=int, default=100, help="prompts scored by the small world's CLIP")
    parser.add_argument("--groups", type=int, default=4, help="how many of these the full-size networks score")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--kept", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    with jax.set_mesh(sharding.make_mesh(1)):
        world = lab.open_world(config.load("tiny:sol_rl"), args.captions)
        _, prompts = world.held_out["test"]
        frozen, stage = world.parts.frozen, config.Stage(steps=10, chunk=args.pictures)
        images = check.draw_samples(world.parts.cfg.model, frozen.base, frozen.vae, prompts.cond, args.pictures, stage)
        figures: dict[str, dict] = {}
        dtypes = (EXACT, *(dtype for dtype in OTHERS if dtype != "float32" or device.platform() != "cpu"))

        def note(name: str, found: dict[str, Float[np.ndarray, "P N"]]) -> None:
            for dtype in list(found)[1:]:
                figures.update(compared(f"{name}, {dtype}", found[EXACT], found[dtype], args.kept))
            results.record(args.out, figures)
            for figure, f in figures.items():
                if figure.startswith(name):
                    print(f"{results.cell(f, 4):>36}  {figure}", flush=True)

        folder, tokens = parse_paths(world.parts.cfg.reward_paths)["clipscore"], prompts.tokens["clipscore"]
        trained = {dtype: clipscore.make(folder, dtype) for dtype in dtypes}
        note("trained, small", {dtype: scores(*made, images, tokens) for dtype, made in trained.items()})
        for name in filter(None, args.rewards.split(",")):
            described = importlib.import_module(f"solrl_jax.rewards.{name}").shapes
            params = drawn(described(None)[1])
            rewards = {dtype: described(None, dtype) for dtype in dtypes}
            tokens = drawn(shapes.batch(rewards[EXACT][2], args.groups))
            few = images[: args.groups]
            note(name, {d: scores(reward, params, few, tokens, SIZE) for d, (reward, *_) in rewards.items()})
            del params


if __name__ == "__main__":
    main()
