"""How far one run on 2 processes of 2 devices and on 1 process of 4 come apart: the small world on CPUs, by iteration.

    python -m experiments.hosts.apart --out=experiments/hosts/results/apart.json             # a CPU, minutes
    python -m experiments.hosts.apart --iterations=1 --out=/tmp/apart.json                   # the path in short

The two add the devices' gradients in another order, so they differ by rounding from the first update on. Both are
compared in bfloat16, as tiny trains, and in float32.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments import results
from experiments.hosts.paper import free_address
from solrl_jax import device

SMALL = (
    *("--config=tiny:sol_rl", "--config.prompts=4", "--config.candidates=8", "--config.kept=4"),
    *("--config.explore.precision=bf16", "--config.explore.chunk=8", "--config.regenerate.chunk=4"),
    *("--config.learn.micro_batch=16", "--config.evaluate.every=0", "--config.watch.every=0"),
)
METRICS = ("reward/mean", "loss", "grad_norm")
DEVICES = 4


def run(folder: Path, processes: int, words: list[str]) -> list[dict[str, float]]:
    """The metrics of a run, by iteration; its processes have DEVICES devices together."""
    env = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "solrl_jax.main", "--mode=train", *SMALL, *words, f"--run_dir={folder}"]
    several = ["--coordinator", free_address(), "--processes", str(processes)] if processes > 1 else []
    own = [["--process", str(i)] if several else [] for i in range(processes)]
    running = [subprocess.Popen([*command, *several, *one], env={**os.environ, **env}) for one in own]
    if any([one.wait() for one in running]):
        raise SystemExit(f"{' '.join([*command, *several])} failed in a process: see above")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def apart(whole: list[dict[str, float]], split: list[dict[str, float]]) -> dict[str, dict]:
    """Relative differences of METRICS in every iteration."""
    out = {}
    for number, (a, b) in enumerate(zip(whole, split, strict=True), 1):
        for name in METRICS:
            off = abs(a[name] - b[name]) / abs(a[name])
            out[f"iteration {number}: {name}"] = results.figure(off, "relative difference", 1)
    return out


def main(argv: list[str] | None = None) -> None:
    device.setup()  # without a GPU here it looks for none
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    figures: dict[str, dict] = {}
    for dtype in ("float32", "bfloat16"):
        words = [f"--config.iterations={args.iterations}", f"--config.model.dtype={dtype}"]
        with tempfile.TemporaryDirectory() as folder:
            whole, split = (run(Path(folder) / str(count), count, words) for count in (1, 2))
        figures |= {f"{dtype}, {name}": figure for name, figure in apart(whole, split).items()}
        results.record(args.out, figures, settings=[*SMALL, *words[:1]])


if __name__ == "__main__":
    main()
