"""What a preview keeps: contrast of the kept candidates, restarted from the noise or branched from the preview.

    python -m experiments.branch.contrast --run=experiments/tiny/results/long.safetensors           # a GPU's minutes
    python -m experiments.branch.contrast --prompts=4 --precisions=nvfp4_emulated --out=/tmp/c.json    # on a CPU

A form is "restart E+R": a preview of E steps, the kept drawn again from their noise in R steps of BF16 (Sol-RL's is
6+10); or "branch E@k+R": the kept go on from the preview's state after k of its E steps, in R steps of BF16. 24
candidates a caption, 8 kept by the preview. Contrast is the mean reward of the better half of the kept less that of
the worse half, by the rewards of what is trained on: the finished samples. It is given as a share of what choosing
the best and the worst 4 of 24 finished BF16 samples of 10 steps keeps (naive), 95 % bootstrap over captions. Captions
are those of the test split from --first on: the earlier ones chose rates and forms.
"""

import argparse
import functools
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments import lab, results
from solrl_jax import config, device, lora, rollout, sharding
from solrl_jax.config import Branch, Config
from solrl_jax.rewards import Score
from solrl_jax.selection import select, spearman, take
from solrl_jax.structs import Model, Params, Rollout

HERE = Path(__file__).resolve().parent
NAIVE = "naive 10"
FORMS = (
    *("restart 6+10", "restart 5+10", "branch 6@3+5", "branch 6@4+3", "branch 5@3+4", "branch 5@3+3", "branch 5@2+4"),
    *("branch 4@2+4", "branch 4@2+3", "branch 3@2+3"),
)
PRECISIONS = ("fp8", "nvfp4_emulated", "bf16")


def form_config(cfg: Config, form: str, precision: str) -> Config:
    """`cfg`, which is sol_rl, as a form of FORMS. Raises ValueError for what is not one."""
    match = re.fullmatch(r"(restart|branch) (\d+)(?:@(\d+))?\+(\d+)", form)
    if match is None or (match[1] == "branch") != (match[3] is not None):
        raise ValueError(f"form {form!r}: use 'restart E+R' or 'branch E@k+R'")
    assert cfg.explore is not None
    explore = replace(cfg.explore, steps=int(match[2]), precision=precision)
    if match[3]:
        return replace(cfg, explore=explore, branch=Branch(int(match[3]), int(match[4])))
    return replace(cfg, explore=explore, regenerate=replace(cfg.regenerate, steps=int(match[4])))


class Rewards(NamedTuple):
    """Of every candidate, [captions, candidates]: the preview's reward, and the finished sample's."""

    preview: Float[Array, "P N"]
    finished: Float[Array, "P N"]


class Bench(NamedTuple):
    """What all forms share: the world, kernels of a policy by precision, prompts and keys."""

    opened: lab.Opened
    kernels: dict[str, Array]
    low: dict[str, Params | None]
    prompts: Any
    keys: Array


@functools.cache
def programs(model: Model, score: Score, cfg: Config) -> tuple[Callable[..., Rollout], Callable[..., Rollout]]:
    """Preview and finish of a form, jitted once for all policies."""
    roll = functools.partial(rollout.rolled, model=model, score=score, branch=rollout.branched(model, cfg))
    assert cfg.explore is not None
    return jax.jit(functools.partial(roll, stage=cfg.explore)), jax.jit(functools.partial(roll, stage=cfg.regenerate))


def rewards(bench: Bench, task: tuple[str, str]) -> Rewards:
    """All candidates previewed, and all of them finished, in a (form, precision)."""
    form, precision = task
    parts = bench.opened.parts
    preview, finish = programs(parts.model, parts.score, form_config(parts.cfg, form, precision))
    given = parts.frozen, bench.prompts, bench.keys
    with jax.set_mesh(sharding.make_mesh(1)):  # an ambient mesh is a thread's own
        previewed = preview(bench.kernels, bench.low[precision], *given)
        finished = finish(bench.kernels, None, *given, previewed.state)
        return Rewards(*jax.block_until_ready((previewed.reward, finished.reward)))


def halves(kept: Float[Array, "P K"]) -> Float[Array, "P"]:
    """Mean of the better half less that of the worse half, by the rewards themselves."""
    ranked, half = jnp.sort(kept, axis=-1), kept.shape[-1] // 2
    return jnp.mean(ranked[:, half:], axis=-1) - jnp.mean(ranked[:, :half], axis=-1)


def figures_of(found: Rewards, naive: Float[Array, "P N"], kept: int) -> dict[str, dict]:
    """Contrast as a share of naive's, ranks, and the mean reward that is trained on."""
    samples = take(found.finished, index := select(found.preview, kept, "best_worst"))
    best = halves(take(naive, select(naive, kept, "best_worst")))
    out = {"contrast of the kept, of naive's": share(np.asarray(halves(samples)), np.asarray(best))}
    single = {
        "spearman of the kept": spearman(take(found.preview, index), samples),
        "spearman of all": spearman(found.preview, found.finished),
        "mean reward of all finished": jnp.mean(found.finished, axis=-1),
        "less naive's": jnp.mean(found.finished, axis=-1) - jnp.mean(naive, axis=-1),
    }
    for name, each in single.items():
        each = np.asarray(each)
        out[name] = results.figure(float(each.mean()), "95 % bootstrap over captions", each.size, lab.interval(each))
    return out


def share(part: np.ndarray, whole: np.ndarray, draws: int = 4000) -> dict[str, Any]:
    """mean(part) / mean(whole) of the same captions, with the bootstrap's interval."""
    index = np.random.default_rng(0).integers(0, len(part), (draws, len(part)))
    ratios = part[index].mean(1) / whole[index].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    value = float(part.mean() / whole.mean())
    return results.figure(value, "95 % bootstrap over captions", len(part), [float(low), float(high)])


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run's folder or a LoRA file: the second policy")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--first", type=int, default=200)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--chunk", type=int, default=600, help="pictures at a time, whole captions")
    parser.add_argument("--out", type=Path, default=HERE / "results/contrast.json")
    args = parser.parse_args(argv)
    forms, precisions, figures = args.forms.split(","), args.precisions.split(","), {}
    low = "fp8" if "fp8" in precisions else "nvfp4_emulated"
    at_once = min(args.chunk, 24 * args.prompts)
    words = {"explore.precision": low, "explore.chunk": str(at_once), "regenerate.chunk": str(at_once)}
    cfg = config.load("tiny:sol_rl", words | {"kept": "24", "selection": "all", "prompts": str(args.prompts)})
    with jax.set_mesh(sharding.make_mesh(1)):
        opened = lab.open_world(cfg, args.first + args.prompts)
        for who, adapter in lab.policies(opened, args.run).items():
            bench = of_policy(opened, adapter, precisions, args.first, args.prompts)
            truth = rewards(bench, ("restart 10+10", "bf16")).finished
            figures[f"{who}, {NAIVE}: mean reward of all finished"] = results.figure(
                float(truth.mean()), "", truth.size
            )
            tasks = [(form, precision) for precision in precisions for form in forms]
            with ThreadPoolExecutor(8) as pool:
                every = list(pool.map(functools.partial(rewards, bench), tasks))
            for (form, precision), found in zip(tasks, every, strict=True):
                made = figures_of(found, truth, kept=8)
                figures |= {f"{who}, {precision}, {form}: {name}": f for name, f in made.items()}
                print(f"{who}, {precision}, {form}:", ", ".join(f"{f['value']:.4f}" for f in made.values()), flush=True)
            results.record(args.out, figures, run=str(args.run or ""))


def of_policy(opened: lab.Opened, adapter: Params, precisions: Sequence[str], first: int, count: int) -> Bench:
    parts = opened.parts
    prompts = jax.tree.map(lambda x: x[first : first + count], opened.held_out["test"][1])
    kernels = lora.merged_kernels(parts.frozen.base, adapter, parts.cfg.lora)
    low: dict[str, Params | None] = {"bf16": None}
    for precision in set(precisions) - {"bf16"}:
        quantise = functools.partial(rollout.quantised, model=parts.model, precision=precision)
        low[precision] = jax.jit(quantise)(kernels, parts.frozen)
    return Bench(opened, kernels, low, prompts, jax.random.split(jax.random.key(0), (count, parts.cfg.candidates)))


if __name__ == "__main__":
    main()
