"""DanceGRPO, Flow-GRPO, AWM, DiffusionNFT and Sol-RL on the small world, each at the same cost, and Sol-RL's controls.

    python -m experiments.methods.run                                                       # a GPU's minutes
    python -m experiments.methods.run --world=emoji                    # methods on the emoji world, Sol-RL's first
    python -m experiments.methods.run --arms=sol_rl,awm --budget=600 --marks=1 --prompts=20 --seeds=0  # in short, a CPU

Cost is seconds at full FLUX.1-dev size on an H100 (price.py): every arm trains until the same budget is spent, and is
measured at the same shares of it. An arm's rate is chosen first, of RATES, all alike: half the budget each, one seed
that is not used again, by CLIPScore on captions that are not used again. Rates and then seeds train as one vmapped
program of the arm. Captions of combinations never trained on are drawn at the end alone. Writes ARM.json anew after
every part, of which `python -m experiments.methods.summary` makes a table and a figure: in results/arms here, and for
the emoji world in experiments/emoji/learning/results/arms.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments import evidence, lab, results, worlds
from experiments.evidence import Arm
from experiments.methods.price import ABOUT, price, prices, wall
from solrl_jax import config, device, sharding
from solrl_jax.config import Config
from solrl_jax.structs import TrainState

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COMMON = {"prompts": "32"}
ARMS = {
    "sol_rl": Arm("sol_rl", COMMON, about="explore 24 x 6 steps in NVFP4, keep 8, draw those in BF16"),
    "diffusionnft": Arm("diffusionnft", COMMON, about="8 of 8, dpm2"),
    "awm": Arm("awm", COMMON, about="8 of 8, SA-Solver of 14 steps"),
    "flow_grpo": Arm("flow_grpo", COMMON, about="8 of 8, SDE of 6 steps"),
    "dance_grpo": Arm("dance_grpo", COMMON, about="8 of 8, SDE of 12 steps, one noise a prompt"),
    "vgrpo": Arm("vgrpo", COMMON, about="8 of 8, dpm2, 4 shared points, one ratio a sample"),
    "branch": Arm(
        "branch", COMMON, about="explore 24 x 5 steps in low precision, 8 go on from step 3 with 4 more in BF16"
    ),
    "branch_4": Arm(
        "branch",
        COMMON | {"explore.steps": "4", "branch.after": "2", "branch.steps": "3"},
        about="explore 24 x 4 steps in low precision, 8 go on from step 2 with 3 more in BF16",
    ),
    "bf16": Arm("sol_rl", COMMON | {"explore.precision": "bf16"}, about="sol_rl, explored in BF16"),
    "naive_scaling": Arm("naive_scaling", COMMON, about="keep 8 of 24, all drawn in BF16"),
    "random": Arm("sol_rl", COMMON | {"selection": "random"}, about="sol_rl, the kept 8 of 24 chosen at random"),
    "shuffled": Arm(
        "sol_rl", COMMON, shuffled=True, about="sol_rl, each group's rewards dealt anew among its pictures"
    ),
}
BORROWED = {name: "sol_rl" for name in ("branch", "branch_4", "bf16", "naive_scaling", "random", "shuffled")}
"""Controls take the rate that was chosen for their method, and so do Sol-RL's branches: the first of them chooses."""
ORDER = {
    "tiny": tuple(ARMS),
    "emoji": (
        *("sol_rl", "branch", "naive_scaling", "diffusionnft"),
        *("awm", "flow_grpo", "dance_grpo", "vgrpo"),
    ),
}
"""The arms of a world, in their order: what a call has to end before its time is over comes first."""
RESULTS = {"tiny": HERE / "results/arms", "emoji": worlds.EMOJI.home / "learning/results/arms"}
RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)
TUNING_SEED = 100
CHOOSING = 100
"""The first so many test captions choose the rate; the others are the result."""


class Bench(NamedTuple):
    """What arms share: the opened world, the seeds, measure(adapters, split), the base's figures and the budget."""

    opened: lab.Opened
    seeds: Sequence[int]
    measure: Callable[..., dict[str, np.ndarray]]
    base: dict[str, dict[str, np.ndarray]]
    budget: float
    marks: int
    choosing: int
    iterations: int  # of every arm, whatever its budget; 0: what the budget pays
    out: Path
    say: Callable[..., None]


def a_mark(cfg: Config, budget: float, marks: int, iterations: int = 0) -> int:
    """Iterations of one of `marks` equal parts of the budget, rounded, at least one; or of `iterations`, if given."""
    return iterations // marks or max(1, round(budget / marks / sum(price(cfg, prices()).values())))


def trained(bench: Bench, cfg: Config, program, seeds: Sequence[int], rates: Sequence[float], marks: int):
    """States after each mark, one run a (seed, rate) pair."""
    settings = [evidence.scalars(config.override(cfg, **{"learn.learning_rate": f"{r:g}"}).learn) for r in rates]
    call = a_mark(cfg, bench.budget, bench.marks, bench.iterations)
    states = lab.begin(bench.opened, cfg, settings, seeds)
    for mark in range(marks):
        rows = lab.picks(bench.opened, cfg, seeds, mark * call, call)
        states, _ = program(states, bench.opened.table, bench.opened.parts.frozen, rows)
        yield (mark + 1) * call, states


def choose(bench: Bench, name: str, cfg: Config, program) -> tuple[float, dict[str, dict]]:
    """The rate of RATES (as many as the program has runs) that gains the most, and what every one gained."""
    rates = RATES[: len(bench.seeds)]
    marks = max(1, bench.marks // 2)
    *_, (done, states) = trained(bench, cfg, program, [TUNING_SEED] * len(rates), rates, marks)
    found = bench.measure(states.lora, "test")["clipscore"][:, : bench.choosing].mean(axis=(1, 2))
    gains = found - bench.base["test"]["clipscore"][:, : bench.choosing].mean()
    figures = {
        f"rate {rate:g}: gain of clipscore after {done} iterations": results.figure(
            float(gain), "score, one seed, captions for choosing", bench.choosing * lab.PICTURES
        )
        for rate, gain in zip(rates, gains, strict=True)
    }
    bench.say(name, "rates", dict(zip(rates, gains.round(4).tolist(), strict=True)))
    return rates[int(np.nanargmax(gains))], figures


def final(bench: Bench, name: str, cfg: Config, program, rate: float, figures: dict[str, dict]) -> None:
    """Train all seeds at `rate` to the end of the budget; the arm's file is written anew at every mark."""
    cost, arm, began = price(cfg, prices()), ARMS[name], time.perf_counter()
    call = a_mark(cfg, bench.budget, bench.marks, bench.iterations)
    figures |= {f"cost of an iteration: {k}": results.figure(v, "s, H100", 1) for k, v in cost.items()}
    facts = {
        "arm": name,
        "about": arm.about,
        "seeds": list(bench.seeds),
        "budget": bench.budget,
        "ends_at": round(bench.marks * call * sum(cost.values())),  # s: the last mark's, by budget or --iterations
        "precision": cfg.low_precision,
    }
    results.record(bench.out / f"{name}.json", figures, **facts)  # the rate, for --rates, if this call ends early
    seeds, rates = list(bench.seeds), [rate] * len(bench.seeds)
    for done, states in trained(bench, cfg, program, seeds, rates, bench.marks):
        wall = (time.perf_counter() - began) / done
        figures["wall time an iteration"] = results.figure(wall, f"s, {len(seeds)} runs at once, with measuring", 1)
        for split in lab.SPLITS if done == bench.marks * call else ("test",):
            figures |= at_mark(split, done, done * sum(cost.values()), states, bench, bench.base[split])
        last = {k: round(v["value"], 4) for k, v in figures.items() if f"after {done} " in k and "test: gain" in k}
        bench.say(name, last)
        results.record(bench.out / f"{name}.json", figures, **facts)


def at_mark(split: str, done: int, cost: float, states: TrainState, bench: Bench, base: dict) -> dict[str, dict]:
    """Gains over the base of each seed after `done` iterations, paired by caption and noise, and the spread left."""
    first = bench.choosing if split == "test" else 0
    found = {k: v[:, first:] for k, v in bench.measure(states.lora, split).items()}
    out = {}
    for name in ("exact", "share of facts", "clipscore", "spread"):
        of_base = base[name][:, first:]
        share = name == "spread"  # of the base's; the others are gains
        by_seed = found[name].mean((1, 2)) / of_base.mean() if share else (found[name] - of_base).mean((1, 2))
        what = "spread of a caption's pictures" if share else f"gain of {name}"
        label = f"{split}: {what}"
        error = float(by_seed.std(ddof=1) / np.sqrt(len(by_seed))) if len(by_seed) > 1 else 0.0
        spread = {"seeds": [round(float(x), 4) for x in by_seed], "error": error}
        f = results.figure(float(by_seed.mean()), "mean over seeds, and its standard error", found[name].size, spread)
        out |= {label: f, f"{label} after {done} iterations, {cost:.0f} s": f}  # the first stays as the last mark's
    return out


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    worlds.add_arguments(parser)
    parser.add_argument("--arms", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    for name, kind, what in (
        ("budget", float, "seconds on an H100 at full size, for each arm"),
        ("marks", int, "measurements along the budget"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=f"{what}; {worlds.defaults(name)}")
    parser.add_argument("--prompts", type=int, default=500, help="captions of each split")
    parser.add_argument("--chunk", type=int, default=500, help="pictures at a time while measuring")
    parser.add_argument("--rate", type=float, help="train at this rate and try no other")
    parser.add_argument("--rates", type=Path, help="a folder of results/arms/*.json: train at the rates chosen there")
    parser.add_argument("--iterations", type=int, default=0, help="of every arm, a multiple of --marks; not by budget")
    parser.add_argument("--precision", default="nvfp4_emulated", help="of the explorers: fp8, an H100's own")
    parser.add_argument("--plan", action="store_true", help="print the run list and what it costs, and stop")
    parser.add_argument("--out", type=Path, help="; ".join(f"{w}: {p.relative_to(ROOT)}" for w, p in RESULTS.items()))
    args = parser.parse_args(argv)
    names: list[str] = args.arms.split(",") if args.arms else list(ORDER[args.world])
    seeds, out = [int(s) for s in args.seeds.split(",")], args.out or RESULTS[args.world]
    if strange := [n for n in names if n not in ARMS]:
        parser.error(f"--arms: there is no {', '.join(strange)}; use of {', '.join(ARMS)}")
    world = worlds.of(args)
    budget, marks = args.budget or world.sizes.budget, args.marks or world.sizes.marks
    if args.iterations % marks:
        parser.error(f"--iterations={args.iterations}: use a multiple of --marks={marks}")
    cfgs = {n: in_precision(evidence.arm_config(ARMS[n], world), args.precision) for n in names}
    if args.plan:
        tunes = not (args.rate or args.rates)
        return print("\n".join(plan(cfgs, budget, marks, args.iterations, len(seeds), args.prompts, tunes)))
    say = lab.stopwatch()
    with jax.set_mesh(sharding.make_mesh(1)), ThreadPoolExecutor(8) as pool:
        sol_rl = evidence.arm_config(ARMS["sol_rl"], world)
        opened = lab.open_world(in_precision(sol_rl, args.precision), args.prompts)
        programs: dict[str, Future] = {}
        for n, cfg in cfgs.items():
            key, shuffled, _ = evidence.what_is_compiled(ARMS[n], cfg)
            call = a_mark(cfg, budget, marks, args.iterations)
            programs[n] = pool.submit(evidence.compiled, opened, key, shuffled, call, seeds)
        say("compiling", ", ".join(cfgs))
        measure = functools.partial(lab.measure, opened, at_once=args.chunk)
        base = lab.measure_base(opened, args.chunk)
        say("base:", {k: round(float(v.mean()), 4) for k, v in base["test"].items()})
        choosing = min(CHOOSING, args.prompts // 5)
        bench = Bench(opened, seeds, measure, base, budget, marks, choosing, args.iterations, out, say)
        chosen: dict[str, tuple[str, float]] = {}  # by method: the arm that chose, and its rate
        for name, cfg in cfgs.items():
            program, source = programs[name].result(), BORROWED.get(name, name)
            figures: dict[str, dict] = {}
            if args.rate:
                rate, how = args.rate, "given"
            elif args.rates:
                by, rate = chosen_before(args.rates, source)
                how = f"of {by}, in --rates"
            elif source in chosen:
                by, rate = chosen[source]
                how = f"of {by}"
            else:
                (rate, figures), how = choose(bench, name, cfg, program), "chosen"
                chosen[source] = name, rate
            final(bench, name, cfg, program, rate, figures | {"rate": results.figure(rate, how, 1)})
        say("done")


def chosen_before(folder: Path, source: str) -> tuple[str, float]:
    """The arm of a folder whose rate is that of the method `source`, and the rate. FileNotFoundError without one."""
    arms = [source, *(name for name, of in BORROWED.items() if of == source)]
    for file in (folder / f"{name}.json" for name in arms):
        if file.is_file():
            return file.stem, json.loads(file.read_text(encoding="utf-8"))["figures"]["rate"]["value"]
    raise FileNotFoundError(f"--rates={folder}: no {' or '.join(arms)} there has the rate of {source}; leave it out")


def in_precision(cfg: Config, precision: str) -> Config:
    """`cfg` with its low-precision explorer in another precision."""
    if cfg.explore is None or cfg.explore.precision == "bf16":
        return cfg
    return config.override(cfg, **{"explore.precision": precision})


def plan(
    cfgs: dict[str, Config], budget: float, marks: int, iterations: int, seeds: int, captions: int, tunes: bool = True
) -> list[str]:
    """The run list: iterations of the training and of the tuning, estimated seconds of an H200 for both and for what is
    measured, and what an iteration costs, by kind."""
    lines = [f"{'arm':14} iterations  s on an H200  s an iteration at full size on an H100, by kind"]
    in_all, tuned = 0.0, set()
    for name, cfg in cfgs.items():
        cost, each, source = price(cfg, prices()), a_mark(cfg, budget, marks, iterations), BORROWED.get(name, name)
        tuning = max(1, marks // 2) * each if tunes and source not in tuned else 0
        tuned.add(source)
        measured = (marks + 1 + bool(tuning)) * captions * lab.PICTURES
        seconds = wall(cfg, seeds, each * marks + tuning, measured)
        in_all += seconds
        kinds = ", ".join(f"{k} {v:.0f}" for k, v in cost.items() if v)
        counts = f"{seeds} x {each * marks} + {seeds} x {tuning}"
        lines.append(f"{name:14} {counts}  {seconds:.0f}  {sum(cost.values()):.0f}: {kinds}")
    return [*lines, ABOUT.format(in_all)]


if __name__ == "__main__":
    main()
