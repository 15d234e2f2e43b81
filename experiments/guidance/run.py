"""Guidance in a training, four ways, on the small world: which learns most, seen at guidance 1 and at w.

    python -m experiments.guidance.run                                                # a GPU
    python -m experiments.guidance.run --seeds=0 --iterations=1 --captions=4 --batch=2 --ways=reference --out=/tmp/g

The four ways are rows of the table in docs/run.md: without guidance; guided everywhere; only the reference guided
(CRD); guided samples for the plain policy's loss. Each is DiffusionNFT's loss on the samples of tiny's default recipe,
but explored in BF16, at two weights of the KL. All seeds of a way are one vmapped program; the base is measured at both
weights of guidance too. A way's file is written when it is done.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments import evidence, lab, results
from solrl_jax import device, guidance, sharding
from solrl_jax.config import Config

HERE = Path(__file__).resolve().parent
KL_WEIGHTS = (1e-4, 0.1)


class Way(NamedTuple):
    """Its weights of guidance, "w" for the experiment's; and the words of its row."""

    weights: Mapping[str, str]
    about: str


WAYS = {
    "plain": Way({}, "no guidance"),
    "everywhere": Way({"regenerate.guidance": "w"}, "samples, loss and reference guided"),
    "reference": Way({"learn.kl_guidance": "w"}, "only the reference guided"),
    "samples": Way({"regenerate.guidance": "w", "learn.guidance": "1"}, "samples guided, the loss of the plain policy"),
}


def config_of(way: Way, w: float, batch: int) -> Config:
    """tiny's default on `batch` prompts, explored in BF16, in one block; classifier-free."""
    words = {name: f"{w:g}" if value == "w" else value for name, value in way.weights.items()}
    small = {"prompts": str(batch), "learn.micro_batch": "4"}  # arm_config makes it larger
    words |= {"model.guidance": "cfg", "explore.precision": "bf16"}
    return evidence.arm_config(evidence.Arm("branch", words | small))


def figures_of(at: float, kl: float, found: Mapping, base: Mapping, split: str) -> dict[str, dict]:
    """Means over the seeds of one KL weight, at guidance `at`; gains are over the base at the same guidance."""
    out = {}
    for name, unit in (("exact", "share"), ("clipscore", "score")):
        by_seed = found[name].mean((1, 2))
        gain = by_seed - base[name].mean()
        for what, values in ((name, by_seed), (f"gain of {name}", gain)):
            error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
            seeds = [round(float(x), 4) for x in values]
            spread = {"seeds": seeds} if error is None else {"error": error}
            figure = results.figure(float(values.mean()), f"{unit}; standard error over seeds", len(values), spread)
            out[f"KL weight {kl:g}: {split} at guidance {at:g}: {what}"] = figure | {"seeds": seeds}
    apart = found["spread"].mean((1, 2)) / base["spread"].mean()
    name = f"KL weight {kl:g}: {split} at guidance {at:g}: spread of a caption's pictures"
    return out | {name: results.figure(float(apart.mean()), "of the base's there", len(apart), None)}


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--w", type=float, default=3.0)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16, help="prompts of an iteration")
    parser.add_argument("--captions", type=int, default=500, help="of each split, for measuring")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    names, seeds = args.ways.split(","), [int(s) for s in args.seeds.split(",")]
    if strange := [n for n in names if n not in WAYS]:
        parser.error(f"--ways: there is no {', '.join(strange)}; use of {', '.join(WAYS)}")
    cfgs = {name: config_of(WAYS[name], args.w, args.batch) for name in names}
    say = lab.stopwatch()
    with jax.set_mesh(sharding.make_mesh(1)), ThreadPoolExecutor() as pool:
        opened = lab.open_world(config_of(WAYS["everywhere"], args.w, args.batch), args.captions)
        what = opened.parts.score, seeds * len(KL_WEIGHTS), args.iterations
        programs = {n: pool.submit(lab.compiled, opened, cfg, *what) for n, cfg in cfgs.items()}
        say("compiling", ", ".join(names))
        measure = functools.partial(lab.measure, opened)
        nothing = lab.base_adapter(opened)
        places = list(itertools.product((1.0, args.w), lab.SPLITS))
        base = {(w, split): measure(nothing, split, w=w) for w, split in places}
        say("base:", {f"{split} at {w:g}": round(float(b["exact"].mean()), 3) for (w, split), b in base.items()})
        write_base(args.out / "base.json", base)
        for name in names:
            program = programs[name].result()
            run(opened, name, cfgs[name], program, seeds, args.iterations, measure, base, args.out, say)


def write_base(file: Path, base: Mapping) -> None:
    figures = {
        f"{split} at guidance {w:g}: {name}": results.figure(float(found[name].mean()), "mean", found[name].size)
        for (w, split), found in base.items()
        for name in ("exact", "clipscore")
    }
    results.record(file, figures)


def run(opened, name, cfg: Config, program, seeds, iterations: int, measure, base: Mapping, out: Path, say) -> None:
    """Train every seed at every KL weight by the one `program`, measure, and write the way's file."""
    learns, each = [{"kl_weight": kl} for kl in KL_WEIGHTS for _ in seeds], seeds * len(KL_WEIGHTS)
    states = lab.begin(opened, cfg, learns, each)
    rows, began = lab.picks(opened, cfg, each, 0, iterations), time.perf_counter()
    states, metrics = jax.block_until_ready(program(states, opened.table, opened.parts.frozen, rows))
    wall = time.perf_counter() - began
    say(name, "trained", f"{wall:.1f} s")
    figures: dict[str, dict] = {}
    kl = np.asarray(metrics["kl_div"])  # [T, R]
    for i, weight in enumerate(KL_WEIGHTS):
        mine = slice(i * len(seeds), (i + 1) * len(seeds))
        figures[f"KL weight {weight:g}: kl_div at the end"] = results.figure(
            float(kl[-1, mine].mean()), "mean square of velocities", len(seeds)
        )
        adapters = jax.tree.map(lambda x, mine=mine: x[mine], states.lora)
        for (w, split), before in base.items():
            figures |= figures_of(w, weight, measure(adapters, split, w=w), before, split)
        say(name, weight, {k: round(f["value"], 4) for k, f in figures.items() if f"t {weight:g}: test" in k})
    facts = {"arm": name, "about": WAYS[name].about, "seeds": list(seeds), "iterations": iterations}
    results.record(out / f"{name}.json", figures, **facts, guidance=guidance.weights(cfg)._asdict())


if __name__ == "__main__":
    main()
