"""SIGKILL at random moments of a run, some of them inside a save: is what was saved still there, and the end the same?

    python -m experiments.faults.run --kills=30 --in_saves=10        # 10 minutes on two CPU cores
    python -m experiments.faults.run --kills=2 --in_saves=1 --iterations=12 --out=/tmp/faults.json

A run of the small world that saves every iteration is killed, resumed by the command, killed again, and at last left to
end. After each kill the newest checkpoint that verifies must be no older than before it, and after the end LoRA and
metrics must be those of a run that nothing happened to, bit for bit.
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
"""Seconds after which a run that does nothing is given up."""


class Kill(NamedTuple):
    """Where it struck: the newest checkpoint that was there whole a moment before, the newest that verifies after, and
    whether a save was under way."""

    in_save: bool
    before: int
    after: int


def command(run: Path, iterations: int) -> list[str]:
    words = [f"--config.{name}={value}" for name, value in {**SMALL, "iterations": iterations}.items()]
    resume = ["--resume"] if (run / "config.json").exists() else []
    return [sys.executable, "-m", "solrl_jax.main", "--config=tiny", "--devices=1", f"--run_dir={run}", *words, *resume]


def saving(run: Path) -> bool:
    """Whether a step's folder is there that is not whole yet."""
    places = (run / "checkpoints").glob("*") if (run / "checkpoints").is_dir() else ()
    return any(place.is_dir() and not (place / "manifest.json").is_file() for place in places)


def newest(run: Path) -> int:
    """The newest checkpoint that verifies; -1 where there is none."""
    step = checkpoint.latest(run)[0] if (run / "checkpoints").is_dir() else None
    return -1 if step is None else step


def written(run: Path) -> int:
    """The newest checkpoint with a manifest, which is written last; -1 where there is none. Quick: nothing is read."""
    found = (run / "checkpoints").glob("*/manifest.json") if (run / "checkpoints").is_dir() else ()
    return max((int(file.parent.name) for file in found), default=-1)


def strike(run: Path, iterations: int, moment: Callable[[float], bool]) -> int | None:
    """Run or go on until moment(seconds since the first sign of progress), and kill; None if the run ended before, else
    the newest checkpoint that was written when it struck."""
    progress, count, metrics, size = None, len(lines(run)), run / "metrics.jsonl", -1
    with (
        tempfile.TemporaryFile() as errors,  # a pipe that nobody reads would fill up and block the run
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
    """Kill the run so many times, and let it end."""
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
        raise AssertionError("nothing was to be killed")
    return struck


def same(run: Path, other: Path) -> bool:
    """Whether two runs ended alike, bit for bit, but for their times."""

    def numbers(place: Path) -> list[dict]:
        rows = [json.loads(line) for line in lines(place)]
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]

    ours, theirs = load_file(run / LORA), load_file(other / LORA)  # the order of a file's metadata is by chance
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
