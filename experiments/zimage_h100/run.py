"""Z-Image at full size on one GPU, part by part, each in a process of its own: a JSON after every figure.

    python -m experiments.zimage_h100.run                                                      # an H100
    python -m experiments.zimage_h100.run --parts=1024 --repeat=1
    python -m experiments.zimage_h100.run --parts=512 --forward=2 --set=model.path=DIR            # and more: in short

Random weights (experiments/full_size.py), one prompt an iteration, captions of 128 tokens, their whole window,
guided at 5: a sample is two rows of the network.

512, 1024   forward of 24 rows in BF16 and FP8, decode, micro-steps, whole iterations of sol_rl with every stage, peak
plain       at 512 px, whole iterations without guidance, as Z-Image-Turbo's

PART.json has what was measured, PART_plan.json what the plan says of the same config, made before the run.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from experiments import fields, planned

HERE = Path(__file__).resolve().parent


class Part(NamedTuple):
    words: Mapping[str, str]  # of the config
    only: str  # what of full_size
    keeps: str = ""  # model.remat_keeps of its micro-steps


LARGE = {
    **{"model.size": "1024", "explore.chunk": "12", "regenerate.chunk": "12"},
    **{"learn.micro_batch": "4", "model.remat_keeps": "attention"},
}
PARTS = {
    "512": Part({}, "encode,forward,decode,reward,micro_step,iterations", "attention,mlp;attention"),
    "1024": Part(LARGE, "encode,forward,decode,micro_step,iterations", "attention"),
    "plain": Part({"regenerate.guidance": "1"}, "encode,iterations"),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, with commas")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--forward", default="24", help="rows of a forward pass, and pictures of a decode")
    parser.add_argument("--precisions", default="bf16,fp8", help="of the forward passes")
    fields.add_argument(parser)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    failed = []
    for name in args.parts.split(","):
        part = PARTS[name]
        words = {"prompts": "1", **part.words, **dict(args.set)}
        planned.write("zimage:sol_rl", words, args.out / f"{name}_plan.json")
        rows = ",".join(f"{precision}:{args.forward}" for precision in args.precisions.split(","))
        command = [sys.executable, "-m", "experiments.full_size", "--config=zimage:sol_rl", f"--only={part.only}"]
        command += [*fields.arguments(words), f"--repeat={args.repeat}", f"--keeps={part.keeps}", f"--forward={rows}"]
        command += [f"--decode=bfloat16:{args.forward}", f"--out={args.out / f'{name}.json'}"]
        print(f"== {name}: {' '.join(command[1:])}", flush=True)
        if subprocess.run(command).returncode:
            failed.append(name)  # the other parts still run
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
