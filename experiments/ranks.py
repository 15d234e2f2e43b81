"""Does a short low-precision rollout rank candidates as the full BF16 rollout does? For base and trained policy.

    python -m experiments.ranks --run=RUN          # RUN's LoRA as the second policy; minutes on two CPU cores
    python -m experiments.ranks --world=emoji --run=RUN          # 24 of 96 candidates; a GPU
    python -m experiments.ranks --prompts=2 --candidates=4 --kept=2 --chunk=8 --out=/tmp/r.json     # short

Every candidate is rolled out from the same noise by each preview and by the full rollout (BF16, 10 steps), whose
CLIPScores are the truth. BF16 with equally few steps separates the cost of the steps from that of the precision. Of a
branch, the truth are the pictures that it trains on: every candidate goes on in BF16 from its preview's state. Three
figures, means over captions: Spearman; the share of the true best K/2 among the K/2 chosen as best; and the kept
contrast, the true mean of the chosen best minus that of the chosen worst, divided by that of a perfect choice.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from experiments import lab, results, worlds
from solrl_jax import config, device, lora, rollout, sharding
from solrl_jax.config import Config, Stage
from solrl_jax.quant import calibrate
from solrl_jax.rollout import quantised
from solrl_jax.selection import fidelity
from solrl_jax.structs import Model, Params

PRECISIONS: dict[str, config.Precision] = {"BF16": "bf16", "FP8": "fp8", "NVFP4": "nvfp4_emulated"}
PREVIEWS: dict[str, tuple[config.Precision, int]] = {
    **{f"{name}, {steps} steps": (p, steps) for name, p in PRECISIONS.items() for steps in (2, 4, 6, 8)},
    **{f"{name}, 10 steps": (PRECISIONS[name], 10) for name in ("FP8", "NVFP4")},
}
BRANCHES: dict[str, config.Precision] = {
    f"{name}, branch of 5 steps": precision for name, precision in PRECISIONS.items()
}
FULL: tuple[config.Precision, int] = ("bf16", 10)
NAMES = {"spearman": "Spearman", "kept_contrast": "kept contrast"}


class Pair(NamedTuple):
    """CLIPScores of every candidate: those that choose, and the true ones."""

    preview: Float[Array, "P N"]
    truth: Float[Array, "P N"]


def tasks(opened: lab.Opened, model: Model, chunk: int) -> dict[str, tuple[config.Precision, Callable[..., Any]]]:
    """{name: its precision, a function of (kernels, low, frozen, prompts, keys)}: rewards of a preview, of the full
    rollout ("truth"), or the Pair of a branch."""
    solver, how = opened.parts.cfg.regenerate.solver, {"model": model, "score": opened.parts.score}

    def stage(precision: config.Precision, steps: int) -> tuple[config.Precision, Callable[..., Any]]:
        return precision, functools.partial(reward, stage=Stage(steps, solver, precision, chunk), **how)

    def branch(precision: config.Precision) -> tuple[config.Precision, Callable[..., Any]]:
        cfg = opened.world.config("branch", {"explore.precision": precision})
        return precision, functools.partial(finished, cfg=cfg, chunk=chunk, **how)

    previews = {name: stage(*preview) for name, preview in PREVIEWS.items()}
    return {"truth": stage(*FULL), **previews, **{name: branch(p) for name, p in BRANCHES.items()}}


def reward(*given: Any, **statics: Any) -> Float[Array, "P N"]:
    return rollout.rolled(*given, **statics).reward


def finished(kernels, low, frozen, prompts, keys, *, cfg: Config, chunk: int, **how: Any) -> Pair:
    """Every candidate previewed, and every one finished from its preview's state, in blocks of `chunk`: the config's
    chunks fit its own numbers of prompts and candidates only."""
    roll = functools.partial(rollout.rolled, branch=rollout.branched(how["model"], cfg), **how)
    assert cfg.explore is not None
    explore, rest = (dataclasses.replace(stage, chunk=chunk) for stage in (cfg.explore, cfg.regenerate))
    preview = roll(kernels, low, frozen, prompts, keys, stage=explore)
    samples = roll(kernels, None, frozen, prompts, keys, preview.state, stage=rest)
    return Pair(preview.reward, samples.reward)


def pairs(
    opened: lab.Opened, adapters: Mapping[str, Params], captions: int, candidates: int, chunk: int
) -> Iterator[tuple[str, str, Pair]]:
    """(policy, name of PREVIEWS or BRANCHES, Pair), one by one, of the same noise. All programs compile at once."""
    parts = opened.parts
    prompts = jax.tree.map(lambda x: x[:captions], opened.held_out["test"][1])
    keys = jax.random.split(jax.random.key(0), (captions, candidates))
    some = jax.tree.map(lambda x: x[: calibrate.PROMPTS], prompts.cond)
    full = Stage(FULL[1], parts.cfg.regenerate.solver, FULL[0], chunk)
    model = calibrate.calibrated(parts.model, {"params": parts.frozen.base}, some, jax.random.key(0), [full])
    quantise = {p: jax.jit(functools.partial(quantised, model=model, precision=p)) for p in ("fp8", "nvfp4_emulated")}

    def given(adapter: Params) -> dict[str, tuple]:
        """The arguments of a task, by its precision."""
        kernels = lora.merged_kernels(parts.frozen.base, adapter, parts.cfg.lora)
        low = {"bf16": None} | {p: f(kernels, parts.frozen) for p, f in quantise.items()}
        return {p: (kernels, one, parts.frozen, prompts, keys) for p, one in low.items()}

    def compiled(task: tuple[str, Callable[..., Any]], given: dict[str, tuple]) -> Callable[..., Any]:
        with jax.set_mesh(sharding.make_mesh(1)):  # an ambient mesh is a thread's own
            return jax.jit(task[1]).lower(*given[task[0]]).compile(lab.COMPILER)

    policies, todo = {who: given(adapter) for who, adapter in adapters.items()}, tasks(opened, model, chunk)
    some_policy = next(iter(policies.values()))
    with ThreadPoolExecutor(len(todo)) as pool:
        programs = dict(zip(todo, pool.map(lambda task: compiled(task, some_policy), todo.values()), strict=True))
    for who, args in policies.items():
        truth = programs["truth"](*args["bf16"])
        for name, (precision, _) in todo.items():
            if name != "truth":
                found = programs[name](*args[precision])
                yield who, name, found if isinstance(found, Pair) else Pair(found, truth)


def figures_of(pair: Pair, kept: int) -> dict[str, dict]:
    out = {}
    for what, each in fidelity(pair.preview, pair.truth, kept).items():
        each = np.asarray(each)
        what = f"overlap of the best {kept // 2}" if what == "overlap" else NAMES[what]
        unit = "95 % bootstrap interval over captions"
        out[what] = results.figure(float(each.mean()), unit, each.size, lab.interval(each))
    return out


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    worlds.add_arguments(parser)
    parser.add_argument("--run", type=Path, help="a run's folder or a LoRA file")
    parser.add_argument("--pipeline", type=Path, help="another pipeline of the world, of another width")
    for name in ("captions", "candidates", "kept", "chunk"):
        flag = "--prompts" if name == "captions" else f"--{name}"
        parser.add_argument(flag, dest=name, type=int, help=worlds.defaults(name))
    parser.add_argument("--out", type=Path, help="results/ranks.json of the world")
    args = parser.parse_args(argv)
    world = worlds.of(args)
    captions, candidates, kept, chunk = (
        getattr(args, name) or getattr(world.sizes, name) for name in ("captions", "candidates", "kept", "chunk")
    )
    chunk = lab.chunk(captions, candidates, chunk)
    cfg = world.config("sol_rl", {"model.path": str(args.pipeline)} if args.pipeline else None)
    figures, out = {}, args.out or world.home / "results/ranks.json"
    facts = {"run": str(args.run or ""), "candidates": candidates, "kept": kept}
    facts |= {"pipeline": args.pipeline.parent.name if args.pipeline else ""}
    with jax.set_mesh(sharding.make_mesh(1)):
        opened = lab.open_world(cfg, captions, world)
        policies = lab.policies(opened, args.run)
        for who, name, pair in pairs(opened, policies, captions, candidates, chunk):
            for what, f in figures_of(pair, kept).items():
                figures[f"{who}, {name}: {what}"] = f
                print(f"{f['value']:.3f} {f['spread']}  {who}, {name}: {what}", flush=True)
            results.record(out, figures, **facts)  # after each, so that a call that is ended keeps them


if __name__ == "__main__":
    main()
