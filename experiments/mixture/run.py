"""Two rewards of unequal scale on the small world: their raw sum, and each normalised within its prompt (GDPO).

    python -m experiments.mixture.run                                                        # a GPU
    python -m experiments.mixture.run --seeds=0 --iterations=1 --captions=4 --batch=2 --arms=gdpo --out=/tmp/m

CLIPScore varies by about .09 within a prompt; the judge's share of right facts by 2.8 times that, so in a raw sum the
judge decides. tiny's default recipe, explored in BF16, all seeds of an arm as one vmapped program; gains of both
over the base, on captions that were not trained on. The arms compile at once; an arm's file is written when it is done.
"""

import argparse
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments import evidence, lab, results
from solrl_jax import device, sharding
from solrl_jax.config import Config
from solrl_jax.rewards import Score

HERE = Path(__file__).resolve().parent
BOTH = "clipscore:1,shapes:1"


class Arm(NamedTuple):
    reward: str
    rule: str
    about: str


ARMS = {
    "clipscore": Arm("clipscore", "sum", "CLIPScore alone"),
    "shapes": Arm("shapes", "sum", "the judge alone"),
    "sum": Arm(BOTH, "sum", "the raw sum"),
    "gdpo": Arm(BOTH, "gdpo", "each normalised within its prompt, then summed"),
}


def config_of(arm: Arm, batch: int) -> Config:
    words = {"prompts": str(batch), "learn.micro_batch": "4", "explore.precision": "bf16"}
    words |= {"reward": arm.reward, "reward_rule": arm.rule, "learn.advantage_spread": "prompt"}
    return evidence.arm_config(evidence.Arm("branch", words | {"evaluate.rewards": ""}))


def score_of(opened: lab.Opened, cfg: Config) -> Score:
    """The arm's rewards, of the world's, which has both."""
    names = [part.partition(":")[0] for part in cfg.reward.split(",")]
    kept = [reward for reward in opened.parts.score.rewards if reward.name in names]
    return Score(tuple(kept), (1.0,) * len(kept))


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16, help="prompts of an iteration")
    parser.add_argument("--captions", type=int, default=500, help="of each split, for measuring")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    names, seeds = args.arms.split(","), [int(s) for s in args.seeds.split(",")]
    if strange := [n for n in names if n not in ARMS]:
        parser.error(f"--arms: there is no {', '.join(strange)}; use of {', '.join(ARMS)}")
    say = lab.stopwatch()
    cfgs = {name: config_of(ARMS[name], args.batch) for name in names}
    with jax.set_mesh(sharding.make_mesh(1)), ThreadPoolExecutor() as pool:
        opened = lab.open_world(config_of(ARMS["gdpo"], args.batch), args.captions)
        programs = {
            n: pool.submit(lab.compiled, opened, cfg, score_of(opened, cfg), seeds, args.iterations)
            for n, cfg in cfgs.items()
        }
        measure, base = functools.partial(lab.measure, opened), lab.measure_base(opened)
        say("base:", {split: round(float(found["exact"].mean()), 3) for split, found in base.items()})
        for name in names:
            cfg, program = cfgs[name], programs[name].result()
            states = lab.begin(opened, cfg, [{}] * len(seeds), seeds)
            rows = lab.picks(opened, cfg, seeds, 0, args.iterations)
            states, metrics = jax.block_until_ready(program(states, opened.table, opened.parts.frozen, rows))
            figures = gains(states.lora, measure, base) | shares(metrics)
            facts = {"arm": name, "about": ARMS[name].about, "seeds": seeds, "iterations": args.iterations}
            results.record(args.out / f"{name}.json", figures, **facts)
            say(name, {k: round(f["value"], 4) for k, f in figures.items()})


def gains(adapters, measure, base) -> dict[str, dict]:
    """Over the base on each split: the mean over seeds and its standard error."""
    out = {}
    for split, before in base.items():
        found = measure(adapters, split)
        for name in ("exact", "share of facts", "clipscore"):
            by_seed = (found[name] - before[name]).mean((1, 2))
            error = float(by_seed.std(ddof=1) / len(by_seed) ** 0.5) if len(by_seed) > 1 else None
            figure = results.figure(
                float(by_seed.mean()), "mean over seeds, and its standard error", len(by_seed), error
            )
            out[f"{split}: gain of {name}"] = figure
    return out


def shares(metrics) -> dict[str, dict]:
    """What each reward says in the order of the samples, and its spread within a prompt, in the first iteration."""
    kept = {name: np.asarray(x)[0] for name, x in metrics.items() if name.startswith(("share/", "reward_std/"))}
    return {
        name: results.figure(float(x.mean()), "first iteration, mean over seeds", len(x)) for name, x in kept.items()
    }


if __name__ == "__main__":
    main()
