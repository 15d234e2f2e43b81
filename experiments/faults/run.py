"""SIGKILL at random moments of a run, also during saves: are the checkpoints intact, and is the result the same?

    python -m experiments.faults.run --kills=30 --in_saves=10        # 10 minutes on two CPU cores
    python -m experiments.faults.run --kills=2 --in_saves=1 --iterations=12 --out=/tmp/faults.json

A run of the small world saves every iteration. It is killed and resumed by the command many times, then it runs to its
end. After each kill, the newest valid checkpoint must be no older than before. At the end, LoRA and metrics must equal
those of an uninterrupted run, bit for bit.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

from experiments import results
from solrl_jax import device
from solrl_jax.run import checkpoint

HERE = Path(__file__).resolve().parent
SMALL = {
    **{"prompts": 2, "candidates": 4, "kept": 2, "explore.chunk": 4, "regenerate.chunk": 2, "learn.updates": 1},
    **{"learn.micro_batch": 4, "evaluate.every": 0, "watch.every": 0, "save_every": 1, "keep": 2},
}
LORA = "pytorch_lora_weights.safetensors"
PATIENCE = 300.0
"""Seconds without progress after which the run counts as hung."""


class Kill(NamedTuple):
    """One kill: was it during a save, the newest complete checkpoint just before, the newest valid one after."""

    in_save: bool
    before: int
    after: int


def command(run: Path, iterations: int) -> list[str]:
    words = [f"--config.{name}={value}" for name, value in {**SMALL, "iterations": iterations}.items()]
    resume = ["--resume"] if (run / "config.json").exists() else []
    return [
        sys.executable,
        "-m",
        "solrl_jax.main",
        "--config=tiny:sol_rl",
        "--devices=1",
        f"--run_dir={run}",
        *words,
        *resume,
    ]


def saving(run: Path) -> bool:
    """Whether a save is in progress: some step's folder has no manifest yet."""
    places = (run / "checkpoints").glob("*") if (run / "checkpoints").is_dir() else ()
    return any(place.is_dir() and not (place / "manifest.json").is_file() for place in places)


def newest(run: Path) -> int:
    """The newest valid checkpoint; -1 if there is none."""
    step = checkpoint.latest(run)[0] if (run / "checkpoints").is_dir() else None
    return -1 if step is None else step


def written(run: Path) -> int:
    """The newest checkpoint with a manifest, which is written last; -1 if there is none. Fast: no file is read."""
    found = (run / "checkpoints").glob("*/manifest.json") if (run / "checkpoints").is_dir() else ()
    return max((int(file.parent.name) for file in found), default=-1)


def strike(run: Path, iterations: int, moment: Callable[[float], bool]) -> int | None:
    """Start or resume the run, and kill it once moment(seconds since its first new metrics) is true.

    Returns the newest complete checkpoint just before the kill; None if the run ended first.
    """
    progress, count, metrics, size = None, len(lines(run)), run / "metrics.jsonl", -1
    with (
        tempfile.TemporaryFile() as errors,  # an unread pipe would fill up and block the run
        subprocess.Popen(command(run, iterations), stdout=subprocess.DEVNULL, stderr=errors) as child,
    ):
        moved = time.monotonic()
        while child.poll() is None:
            now = time.monotonic()
            if (grown := metrics.stat().st_size if metrics.exists() else 0) != size:
                moved, size = now, grown
            if progress is None and len(lines(run)) > count:
                progress = now
            if progress is not None and moment(now - progress):
                newest_before = written(run)
                child.send_signal(signal.SIGKILL)
                child.wait()
                return newest_before
            if now - moved > PATIENCE:
                child.kill()
                raise TimeoutError(f"no progress in {PATIENCE:.0f} s")
            time.sleep(0.0005)
        if child.returncode:
            errors.seek(0)
            raise RuntimeError(f"the run ended with {child.returncode}: {errors.read().decode()[-2000:]}")
    return None


def lines(run: Path) -> list[str]:
    file = run / "metrics.jsonl"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def attack(run: Path, iterations: int, kills: int, in_saves: int, seed: int = 0) -> list[Kill]:
    """Kill the run `kills` times, then let it finish."""
    rng, struck = random.Random(seed), []
    kinds = [True] * in_saves + [False] * (kills - in_saves)
    rng.shuffle(kinds)
    for in_save in kinds:
        wait = rng.uniform(0, 2.0)
        before = strike(run, iterations, (lambda s: saving(run)) if in_save else lambda s, wait=wait: s >= wait)
        if before is None:
            raise RuntimeError(f"the run ended after {len(struck)} kills: give it more --iterations")
        struck.append(Kill(in_save and saving(run), before, newest(run)))
        print(f"kill {len(struck)} of {kills}: {struck[-1]}", flush=True)
    if strike(run, iterations, lambda s: False) is not None:
        raise AssertionError("the last run must not be killed")
    return struck


def same(run: Path, other: Path) -> bool:
    """Whether two runs have the same LoRA and metrics, bit for bit, except for times."""

    def numbers(place: Path) -> list[dict]:
        rows = [json.loads(line) for line in lines(place)]
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]

    ours, theirs = (
        load_file(run / LORA),
        load_file(other / LORA),
    )  # the order of a file's metadata is random
    equal = ours.keys() == theirs.keys() and all(np.array_equal(x, theirs[key]) for key, x in ours.items())
    return equal and numbers(run) == numbers(other)


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--in_saves", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results/kills.json")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        broken, whole = Path(folder) / "broken", Path(folder) / "whole"
        began = time.monotonic()
        struck = attack(broken, args.iterations, args.kills, args.in_saves, args.seed)
        seconds = time.monotonic() - began
        strike(whole, args.iterations, lambda s: False)
        figures = {
            "kills": results.figure(len(struck), "SIGKILL", 1),
            "of them inside a save": results.figure(sum(k.in_save for k in struck), "SIGKILL", 1),
            "kills that lost a checkpoint": results.figure(sum(k.after < k.before for k in struck), "of kills", 1),
            "the end is that of an unbroken run": results.figure(float(same(broken, whole)), "1: bit for bit", 1),
            "time of the broken run": results.figure(seconds, "s", 1),
        }
        results.record(args.out, figures, kills=[k._asdict() for k in struck], iterations=args.iterations)
        for name, f in figures.items():
            print(f"{results.cell(f):>10}  {name}")


if __name__ == "__main__":
    main()
