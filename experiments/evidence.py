r"""What Sol-RL gains on the small world, or on the emoji world, and which of its parts cause the gain.

    python -m experiments.evidence --arms=sol_rl,shuffled --seeds=0,1,2          # minutes on a GPU
    python -m experiments.evidence --arms=sol_rl --iterations=2 --prompts=20      # a short run
    python -m experiments.evidence --world=emoji --arms=sol_rl,branch,naive_scaling,naive_quant \
        --iterations=400 --every=50 --out=results/samples

An arm is a recipe or a control; its seeds train as one vmapped program (`lab`). Each arm is measured on the test
captions x 4 fixed seeds, paired with the base, and at its end on the compositional ones. It writes
results/arms/ARM.json of its world anew at every point of its curve. A recipe is configs/WORLD.py's on CLIPScore, but
with larger chunks and micro-batches for a GPU, which changes numbers only by rounding. The third command is what
samples of each kind do to a long training; `--plan` says how long each of its arms takes, for the arms of one call.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab, pretraining, results, worlds
from experiments.methods import price
from solrl_jax import config, device, lora, sharding
from solrl_jax.config import Config
from solrl_jax.learn import apply_gradients
from solrl_jax.models import vae
from solrl_jax.structs import Hyper, TrainState
from solrl_jax.weights import lora_files


class Arm(NamedTuple):
    """A `recipe` of a world's config with `overrides`, trained for `iterations` and measured every `every` of them."""

    recipe: str = "sol_rl"
    overrides: Mapping[str, str] = {}
    iterations: int = 40
    every: int = 10
    shuffled: bool = False
    about: str = ""


LONG = {"prompts": "64", "learn.learning_rate": "5e-4"}
ALL_LINEARS = {"lora.targets": "to_q,to_k,to_v,to_out.0,proj_mlp,proj_out,net.0.proj,net.2"}
ARMS = {
    "sol_rl": Arm(about="explored in NVFP4, 6 steps"),
    "long": Arm("sol_rl", LONG | ALL_LINEARS | {"learn.kl_weight": "0.1"}, 400, 50, about="KL .1, all Linears adapted"),
    "long_kl_0.03": Arm(
        "sol_rl", LONG | ALL_LINEARS | {"learn.kl_weight": "0.03"}, 300, 50, about="KL .03, all Linears"
    ),
    "long_5e-4": Arm("sol_rl", LONG, 300, 50, about="KL 1e-4, attention alone, as sol_rl"),
    "long_1e-3": Arm("sol_rl", LONG | {"learn.learning_rate": "1e-3"}, 300, 50, about="the same at rate 1e-3"),
    "long_2.5e-4": Arm("sol_rl", LONG | {"learn.learning_rate": "2.5e-4"}, 300, 50, about="the same at rate 2.5e-4"),
    "shuffled": Arm(shuffled=True, about="each group's rewards permuted among its pictures"),
    "random": Arm(overrides={"selection": "random"}, about="the kept 8 of 24 chosen at random"),
    "bf16": Arm(overrides={"explore.precision": "bf16"}, about="exploration in BF16"),
    "naive_scaling": Arm("naive_scaling", about="all 24 in BF16, 10 steps"),
    "naive_quant": Arm("naive_quant", about="all 24 in NVFP4, 10 steps, trained on those"),
    "diffusionnft": Arm("diffusionnft", iterations=120, about="8 of 8, nothing selected"),
    "branch": Arm("branch", about="explored in NVFP4, 5 steps; the kept go on from step 3 in BF16"),
}
OTHERS = {
    "supervised": "flow matching on drawn pictures: as many LoRA steps on as many pictures, same rate",
    "guidance": "the base with classifier-free guidance, no training",
}


def arm_config(arm: Arm, world: worlds.World = worlds.TINY) -> Config:
    """The arm's config with chunks for a GPU: all prompts' candidates at once, all points of an update at once."""
    cfg = world.config(arm.recipe, arm.overrides)
    points = cfg.prompts * cfg.kept // cfg.learn.updates * cfg.times
    chunks = {f"{name}.chunk": str(cfg.prompts * images) for name, _, images in cfg.stages()}
    return config.override(cfg, **chunks, **{"learn.micro_batch": str(points)})


def image_steps(cfg: Config) -> dict[str, int]:
    """{precision: number of network evaluations of single pictures} in one iteration's rollouts."""
    out: dict[str, int] = {}
    for _, stage, images in cfg.stages():
        out[stage.precision] = out.get(stage.precision, 0) + cfg.prompts * images * stage.steps
    return out


# --- training -------------------------------------------------------------------------------------------------------


def train(
    opened: lab.Opened, arm: Arm, cfg: Config, run, seeds: Sequence[int], learns: Sequence[config.Learn] = ()
) -> Iterator[tuple[int, TrainState]]:
    """Train a state per seed; yields (iterations done, states) every `arm.every`. `learns`: one per seed, not cfg's."""
    settings = [scalars(learn) for learn in learns or [cfg.learn] * len(seeds)]
    states, call = lab.begin(opened, cfg, settings, seeds), a_call(arm)
    for first in range(0, arm.iterations, call):
        rows = lab.picks(opened, cfg, seeds, first, call)
        states, _ = run(states, opened.table, opened.parts.frozen, rows)
        if (first + call) % arm.every == 0:
            yield first + call, states


def scalars(learn: config.Learn) -> dict[str, float]:
    """The settings of an update that are data of the program (`Hyper`)."""
    return {name: getattr(learn, name) for name in Hyper._fields}


def a_call(arm: Arm) -> int:
    """Iterations per call of an arm's program; arms that differ only in length share the program."""
    return math.gcd(arm.every, 10)


def what_is_compiled(arm: Arm, cfg: Config) -> tuple[Config, bool, int]:
    """What the arm's program depends on: all but the length and the scalars of `Hyper`, which are data."""
    scalars = {f"learn.{name}": getattr(config.Learn(), name) for name in Hyper._fields}
    return config.override(cfg, **scalars, iterations=1), arm.shuffled, a_call(arm)


def compiled(opened: lab.Opened, cfg: Config, shuffled: bool, call: int, seeds: Sequence[int]):
    """The compiled program of `call` iterations; several compile at once in threads."""
    score = lab.shuffled(opened.parts.score) if shuffled else opened.parts.score
    return lab.compiled(opened, cfg, score, seeds, call)


def supervised(opened: lab.Opened, cfg: Config, seeds: Sequence[int], iterations: int):
    """LoRAs [R, ...] trained with the pretraining loss on drawn train pictures: the effect of the steps alone."""
    parts, count = opened.parts, cfg.prompts * cfg.kept // cfg.learn.updates * cfg.times
    encoder, weights = vae.load_vae(Path(cfg.model.path) / "vae", jnp.float32, encoder=True)
    states = lab.begin(opened, cfg, [{}] * len(seeds), seeds)
    pools = []
    for seed in seeds:
        scenes, captions = opened.world.drawn(np.random.default_rng([seed, 1]), 4096)
        pools.append({**scenes, "cond": parts.text(captions)})
    pool = jax.tree.map(lambda *x: jnp.stack(x), *pools)

    def loss(adapter, base, batch, x0, key):
        def velocity(x, t):
            return parts.model.velocity(lora.policy(base, adapter, cfg.lora), x, t, batch["cond"])

        key_t, key_eps = jax.random.split(key)
        return pretraining.flow_matching(velocity, x0, key_t, key_eps, pretraining.shift(parts.model))

    def update(state: TrainState, pool, base, weights):
        pick, key = jax.random.split(jax.random.fold_in(state.key, state.updates))
        size = jax.tree.leaves(pool)[0].shape[0]
        batch = jax.tree.map(lambda x: x[jax.random.randint(pick, (count,), 0, size)], pool)
        x0, _ = vae.encode(encoder, weights, opened.world.pictures(batch))
        grads = jax.grad(loss)(state.lora, base, batch, x0, key)
        return apply_gradients(state, grads, parts.optimizer, cfg)[0]

    @functools.partial(jax.jit, static_argnames="updates")
    def run(states, pool, base, weights, updates):
        one = jax.vmap(update, (0, 0, None, None))
        return jax.lax.fori_loop(0, updates, lambda _, s: one(s, pool, base, weights), states)

    return run(states, pool, parts.frozen.base, weights, iterations * cfg.learn.updates).lora


# --- measuring ------------------------------------------------------------------------------------------------------


def gains(base: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], split: str) -> dict[str, dict]:
    """Figures of trained [R, P, n] against base [1, P, n], paired by caption and noise; intervals over captions."""
    out = {}
    for name, unit in (("exact", "share"), ("share of facts", "share"), ("clipscore", "score")):
        by_caption = (found[name] - base[name]).mean(axis=(0, 2))
        seeds = [round(float(x), 4) for x in (found[name] - base[name]).mean(axis=(1, 2))]
        out[f"{split}: gain of {name}"] = results.figure(
            float(by_caption.mean()),
            f"{unit}; 95 % bootstrap interval over captions, and each seed",
            found[name].size,
            {"interval": lab.interval(by_caption), "seeds": seeds},
        )
    spread = found["spread"].mean(axis=(1, 2)) / base["spread"].mean()
    out[f"{split}: spread of a caption's pictures"] = results.figure(
        float(spread.mean()),
        "of the base's; mean absolute difference between two of them",
        found["spread"].size,
        {"seeds": [round(float(x), 3) for x in spread]},
    )
    return out


class Bench(NamedTuple):
    """For measuring arms: `measure(adapters, split)`, the base's figures by split, the output folders."""

    opened: lab.Opened
    measure: Callable[..., dict[str, np.ndarray]]
    base: Mapping[str, Mapping[str, np.ndarray]]
    seeds: Sequence[int]
    out: Path
    loras: Path | None
    say: Callable[..., None]

    def write(self, name: str, about: str, found: Mapping[str, Mapping], **more: Mapping[str, dict]) -> None:
        figures = {k: v for split in found for k, v in gains(self.base[split], found[split], split).items()}
        for key, f in figures.items():
            print(f"    {f['value']:+.4f}  {key}  {f['spread']}", flush=True)
        for extra in more.values():
            figures |= extra
        results.record(self.out / f"{name}.json", figures, arm=name, about=about, seeds=self.seeds)


def run_arm(bench: Bench, name: str, arm: Arm, cfg: Config, program) -> None:
    """Train and measure one arm; its file is rewritten at every point of the curve."""
    steps, curve, began = image_steps(cfg), {}, time.perf_counter()
    costs = {f"image-steps an iteration, {k}": results.figure(v, "image-steps", 1) for k, v in steps.items()}
    for done, states in train(bench.opened, arm, cfg, program, bench.seeds):
        found = bench.measure(states.lora, "test")
        at = f"{done} iterations, {done * sum(steps.values())} image-steps"
        for what in ("exact", "clipscore"):
            value = found[what].mean(axis=(1, 2))
            spread = {"seeds": [round(float(x), 4) for x in value]}
            curve[f"{what} after {at}"] = results.figure(float(value.mean()), "mean", found[what].size, spread)
        bench.say(name, at, {k: round(float(v.mean()), 4) for k, v in found.items()})
        per = (time.perf_counter() - began) / done
        wall = {"wall time an iteration": results.figure(per, f"s, {len(bench.seeds)} runs at once, with measuring", 1)}
        splits = {"test": found}
        if done == arm.iterations:
            splits["compositional"] = bench.measure(states.lora, "compositional")
        bench.write(name, arm.about, splits, costs=costs, wall=wall, curve=curve)
        if bench.loras:
            first = jax.tree.map(lambda x: np.asarray(x[0]), states.lora)
            bench.loras.mkdir(parents=True, exist_ok=True)
            lora_files.save(bench.loras / f"{name}.safetensors", first, bench.opened.parts.model.keys, cfg.lora)


def run_supervised(bench: Bench, cfg: Config, iterations: int) -> None:
    trained = supervised(bench.opened, cfg, bench.seeds, iterations)
    bench.say("supervised", iterations)
    bench.write("supervised", OTHERS["supervised"], {s: bench.measure(trained, s) for s in lab.SPLITS})


def run_guidance(bench: Bench, weights: Sequence[float] = (1.5, 2.0, 3.0)) -> None:
    nothing = lab.base_adapter(bench.opened)
    for weight in weights:
        found = {split: bench.measure(nothing, split, w=weight) for split in lab.SPLITS}
        bench.say("guidance", weight)
        bench.write(f"guidance_{weight:g}", f"{OTHERS['guidance']}, weight {weight:g}", found)


def plan(arms: Mapping[str, Arm], cfgs: Mapping[str, Config], seeds: int, captions: int) -> list[str]:
    """Estimated seconds of an H200 for each arm, with what is measured."""

    def seconds(name: str) -> float:
        marks = arms[name].iterations // arms[name].every + 1  # and the compositional captions
        return price.wall(cfgs[name], seeds, arms[name].iterations, marks * captions * lab.PICTURES)

    each = {name: seconds(name) for name in arms}
    lines = [f"{name:14} {seeds} x {arms[name].iterations} iterations  {s:.0f} s" for name, s in each.items()]
    return [
        *lines,
        f"about {sum(each.values()):.0f} s on an H200 by FLOPs; compiling, loading and the judge not counted",
    ]


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    worlds.add_arguments(parser)
    parser.add_argument("--arms", default=",".join([*ARMS, *OTHERS]))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--iterations", type=int, help="of every arm")
    parser.add_argument(
        "--every", type=int, help="with --iterations, measure after so many; once at the end if not given"
    )
    parser.add_argument("--prompts", type=int, default=500, help="captions of each split")
    parser.add_argument("--chunk", type=int, default=500, help="pictures at a time while measuring")
    parser.add_argument("--out", type=Path, default="results/arms", help="a folder, relative to the world's")
    parser.add_argument("--plan", action="store_true", help="print how long each arm takes, and stop")
    parser.add_argument("--loras", type=Path, help="save the LoRA of each arm's first seed here")
    args = parser.parse_args(argv)
    names, seeds = args.arms.split(","), [int(s) for s in args.seeds.split(",")]
    if strange := [n for n in names if n not in (*ARMS, *OTHERS)]:
        parser.error(f"--arms: there is no {', '.join(strange)}; use of {', '.join([*ARMS, *OTHERS])}")
    arms = {n: ARMS[n] for n in names if n in ARMS}
    if args.every and (not args.iterations or args.iterations % args.every):
        parser.error(f"--every={args.every}: give --iterations, a multiple of it")
    if args.iterations:
        every = args.every or args.iterations
        arms = {n: a._replace(iterations=args.iterations, every=every) for n, a in arms.items()}
    world = worlds.of(args)
    cfgs = {n: arm_config(a, world) for n, a in arms.items()}
    if args.plan:
        return print("\n".join(plan(arms, cfgs, len(seeds), args.prompts)))
    say = lab.stopwatch()
    with jax.set_mesh(sharding.make_mesh(1)), ThreadPoolExecutor(8) as pool:
        sol_rl = arm_config(ARMS["sol_rl"], world)
        opened = lab.open_world(sol_rl, args.prompts)
        own = {n: what_is_compiled(arms[n], cfgs[n]) for n in arms}
        programs = {pool.submit(compiled, opened, *key, seeds): key for key in set(own.values())}
        say(f"{len(opened.train)} train captions; compiling {', '.join(arms) or 'nothing'}")
        measure = functools.partial(lab.measure, opened, at_once=args.chunk)
        base = lab.measure_base(opened, args.chunk)
        say("base:", {k: round(float(v.mean()), 4) for k, v in base["test"].items()})
        bench = Bench(opened, measure, base, seeds, opened.world.home / args.out, args.loras, say)
        if "supervised" in names:
            run_supervised(bench, sol_rl, args.iterations or ARMS["sol_rl"].iterations)
        if "guidance" in names:
            run_guidance(bench)
        for program in as_completed(programs):
            for name in [n for n in arms if own[n] == programs[program]]:
                run_arm(bench, name, arms[name], cfgs[name], program.result())
        say("done")


if __name__ == "__main__":
    main()
