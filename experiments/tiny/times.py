"""Seconds of each stage of an iteration for every family, in runs of the command on this machine.

    python -m experiments.tiny.times               # minutes on two CPU cores, without other load

Medians over all iterations but the first, which includes compiling. Emulated NVFP4 is exact, but slower than BF16 on
every device.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from experiments import results
from experiments.tiny import check
from solrl_jax import config, device, train

RECIPES = {
    "sol_rl": ("sol_rl", {}),
    "sol_rl, BF16 exploration": ("sol_rl", {"explore.precision": "bf16"}),
    "naive_scaling": ("naive_scaling", {}),
    "naive_quant": ("naive_quant", {}),
    "diffusionnft": ("diffusionnft", {}),
}
STAGES = ("quantise", "explore", "regenerate", "learn", "iteration")


def seconds(recipe: str, overrides: dict[str, str], iterations: int) -> dict[str, list[float]]:
    """{stage: its seconds in each iteration but the first} of a run in a temporary folder."""
    short = {"iterations": str(iterations), "evaluate.every": "0", "save_every": "0"}
    with tempfile.TemporaryDirectory() as folder:
        train.train(config.load(f"tiny:{recipe}", {**overrides, **short}), Path(folder) / "run", devices=1)
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    return {s: [line[f"time/{s}"] for line in lines[1:] if f"time/{s}" in line] for s in STAGES}


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--out", type=Path, default=check.HERE / "results/times.json")
    args = parser.parse_args(argv)
    figures = {}
    for name, (recipe, overrides) in RECIPES.items():
        for stage, repeats in seconds(recipe, overrides, args.iterations).items():
            if repeats:
                spread = [round(x, 3) for x in (min(repeats), max(repeats))]
                unit = "s; median [least, most]"
                figures[f"{name}: {stage}"] = results.figure(statistics.median(repeats), unit, len(repeats), spread)
    results.record(args.out, figures)


if __name__ == "__main__":
    main()
