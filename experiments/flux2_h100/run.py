"""FLUX.2-klein-base-4B at full size on one GPU, part by part, each in a process of its own: a JSON after every figure.

    python -m experiments.flux2_h100.run                                                       # an H100
    python -m experiments.flux2_h100.run --parts=1024 --repeat=1                               # minutes a part
    python -m experiments.flux2_h100.run --forward=2 --set=model.path=DIR --set=candidates=8  # and more, in short

Random weights (experiments/full_size.py), one prompt an iteration, guided at 4: a sample is two rows of the network.

512, 1024   forward of 24 rows in BF16 and FP8, decode, micro-steps, whole iterations of sol_rl with every stage, peak
24gb        whole iterations of `flux2:24gb` with the allocator limited to LIMIT bytes, as a card of 24 GB has them;
            beside it what the plan says of memory and seconds, made before the run
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from experiments import fields, planned

HERE = Path(__file__).resolve().parent
LIMIT = 23.7e9
"""Bytes that JAX takes of a card of 24 GiB."""


class Part(NamedTuple):
    config: str
    words: dict[str, str]
    only: str  # what of full_size
    keeps: str = ""  # model.remat_keeps of its micro-steps
    limit: bool = False


_LARGE = {"model.size": "1024", "explore.chunk": "12", "regenerate.chunk": "12", "learn.micro_batch": "4"}
PARTS = {
    "512": Part("flux2:sol_rl", {}, "encode,forward,decode,reward,micro_step,iterations", ";attention;attention,mlp"),
    "1024": Part("flux2:sol_rl", _LARGE, "encode,forward,decode,micro_step,iterations", "attention"),
    "24gb": Part("flux2:24gb", {}, "encode,iterations", limit=True),
}


def limited(bytes_wanted: float) -> dict[str, str]:
    """The environment in which JAX takes so much of the first GPU's memory, and no more; nothing without a GPU."""
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    total = float(said.splitlines()[0]) * 2**20
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{bytes_wanted / total:.4f}", "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="of 512, 1024 and 24gb, with commas")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--forward", default="24", help="rows of a forward pass")
    parser.add_argument("--precisions", default="bf16,fp8", help="of the forward passes")
    fields.add_argument(parser)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    failed = []
    for name in args.parts.split(","):
        part = PARTS[name]
        words = {"prompts": "1", **part.words, **dict(args.set)}
        planned.write(part.config, words, args.out / f"{name}_plan.json")
        command = [sys.executable, "-m", "experiments.full_size", f"--config={part.config}", f"--only={part.only}"]
        command += [*fields.arguments(words), f"--repeat={args.repeat}", f"--keeps={part.keeps}"]
        command += [f"--forward={','.join(f'{p}:{args.forward}' for p in args.precisions.split(','))}"]
        command += [f"--decode=bfloat16:{args.forward}", f"--out={args.out / f'{name}.json'}"]
        print(f"== {name}: {' '.join(command[1:])}", flush=True)
        if subprocess.run(command, env={**os.environ, **(limited(LIMIT) if part.limit else {})}).returncode:
            failed.append(name)  # the other parts still run
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
