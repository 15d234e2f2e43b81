"""What an iteration would take on 1 to 4,096 GPUs: a table on paper, from measured parts and named assumptions.

    python -m experiments.hosts.paper --out=experiments/hosts/results/paper.json                  # a CPU, a minute
    python -m experiments.hosts.paper --repeat=1 --out=/tmp/paper.json                         # the path in short

Measured here: a request to the store through which the processes agree (`solrl_jax.processes.exchanged` makes three in
each process), one at a time and with many waiting; asker and store share this machine's cores. Taken from results
beside this one: FLUX's seconds a prompt on an H100 (experiments/efficiency) and the plan's for a model of 20 B
parameters with its base over the cards of a host (experiments/cards). All else is an assumption, in `ASSUMED`.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments import results

GPUS = (1, 8, 64, 512, 4096)
HOST = 8
"""GPUs of a host, and of a process: one a host."""
PAPER = 48
"""Prompts of an iteration in the paper; a GPU has one at least, so more GPUs take more prompts."""
ASSUMED = {
    "share of one GPU's rate that each of several keeps": 0.98,
    "network of a GPU, GB/s each way": 50 * 0.9,
    "latency of a step of an all-reduce, s": 20e-6,
    "exchanges of an iteration, and one more a prompt of a GPU": 12,
    "shared disk for a state, GB/s": 1.0,
    "shared disk for all hosts' weights, GB/s": 100.0,
    "of one host, GB/s": 5.0,
    "compiling, s": 120.0,
    "GPU hours between two failures": 16384 * 54 * 24 / 419,  # 16,384 H100s, 54 days (Llama 3, arXiv 2407.21783, 3.3.4)
}
SIZES = {"FLUX.1-dev": {"state": 0.75, "gradient": 0.15, "weights": 33.7}}
SIZES["20 B"] = {"state": 1.26, "gradient": 0.25, "weights": 50.0}
"""GB: FLUX.1-dev's as measured; of the 20 B model by its 96 blocks instead of 57, and 40 GB beside T5's 9.5."""

ASKING = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
import jax
from jax._src import distributed
where, at_once, count = sys.argv[1], *map(int, sys.argv[2:])
jax.distributed.initialize(where, 1, 0)
store = distributed.global_state.client
with ThreadPoolExecutor(at_once) as pool:
    for _ in range(2):
        began = time.perf_counter()
        list(pool.map(lambda i: store.key_value_increment("a", 1), range(count)))
print((time.perf_counter() - began) / count)
"""


def free_address() -> str:
    """Of this machine, with a port that nothing has."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return f"localhost:{s.getsockname()[1]}"


def a_request(at_once: int, count: int = 4000) -> float:
    """Seconds that the store of JAX's distributed runtime takes for a request, of so many that wait at a time."""
    command = [sys.executable, "-c", ASKING, free_address(), str(at_once), str(count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    done.check_returncode()
    return float(done.stdout)


def seconds_a_prompt() -> dict[str, dict[bool, float]]:
    """Seconds of an iteration a prompt on one GPU; by whether it is one of several, whose base may be in parts."""
    root = Path(results.__file__).parent
    measured, planned = (
        json.loads((root / file).read_text())["figures"]
        for file in ("efficiency/results/flux.json", "cards/results/flux.json")
    )
    flux = measured["branch, low precision: end to end"]["value"]

    def by_plan(model: str, cards: int, link: str) -> float:
        (found,) = (
            f["value"]
            for name, f in planned.items()
            if name.startswith(f"{model}, {cards} x H100") and name.endswith(f": {link}")
        )
        return cards * found

    ratio = flux / by_plan("FLUX.1-dev", 8, "seconds")
    large = {several: ratio * by_plan("20 B", 8 if several else 1, "NVLink") for several in (False, True)}
    return {"FLUX.1-dev": {False: flux, True: flux}, "20 B": large}


def on_paper(model: str, gpus: int, a_prompt: float, request: float) -> dict[str, dict[str, Any]]:
    """The figures of one row; the store takes `request` seconds for each of the three of every process."""
    size, a = SIZES[model], ASSUMED
    hosts, prompts = max(1, gpus // HOST), max(PAPER, gpus)
    each = prompts / gpus
    rate = 1.0 if gpus == 1 else a["share of one GPU's rate that each of several keeps"]
    work = each * a_prompt / rate
    ring = 2 * size["gradient"] / a["network of a GPU, GB/s each way"]
    reduce = (hosts > 1) * (ring + 2 * hosts * a["latency of a step of an all-reduce, s"])
    agree = (hosts > 1) * (a["exchanges of an iteration, and one more a prompt of a GPU"] + each) * 3 * hosts * request
    whole = work + reduce + agree
    disk = max(
        size["weights"] / a["of one host, GB/s"],
        hosts * size["weights"] / a["shared disk for all hosts' weights, GB/s"],
    )
    start = disk + a["compiling, s"]
    between = a["GPU hours between two failures"] * 3600 / gpus
    lost = (whole / 2 + start) / between
    row = {
        "prompts": (prompts, "an iteration"),
        "iteration": (whole, "s"),
        "all-reduce": (reduce, "s"),
        "agreeing": (agree, "s"),
        "saving": (size["state"] / a["shared disk for a state, GB/s"], "s, beside the next iteration"),
        "start": (start, "s"),
        "hours": (between / 3600, "h between two failures"),
        "lost": (100 * lost, "% of the time, by failures"),
        "rate": (prompts / whole * (1 - lost), "prompts a second"),
        "efficiency": (prompts / whole * (1 - lost) / gpus * a_prompt, "of as many single GPUs"),
    }
    return {f"{model}, {gpus}: {name}": results.figure(value, unit, 1) for name, (value, unit) in row.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    figures: dict[str, dict[str, Any]] = {}
    for at_once in (1, 64):
        found = sorted(1000 * a_request(at_once) for _ in range(args.repeat))
        name = f"a request, {at_once} at a time"
        figures[name] = results.figure(
            float(np.median(found)), "ms; median [least, most]", args.repeat, [found[0], found[-1]]
        )
        print(name, figures[name], flush=True)
    figures |= {f"assumed: {name}": results.figure(value, "", 1) for name, value in ASSUMED.items()}
    for model, seconds in seconds_a_prompt().items():
        for gpus in GPUS:
            figures |= on_paper(model, gpus, seconds[gpus > 1], figures[name]["value"] / 1000)
    results.record(args.out, figures)


if __name__ == "__main__":
    main()
