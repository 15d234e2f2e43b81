"""What the plan says of a config, before it runs: memory and seconds of every stage, with the models' public sizes.

    python -m experiments.planned --config=flux2:24gb --set=prompts=1 --out=FILE              # a CPU, half a minute

On the host's CPU, in a process of its own: JAX would take the GPU's memory from the run that follows.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax

from experiments import fields, results
from solrl_jax import config, plan
from solrl_jax.plan import shapes

CARD = "H100 80GB"


def write(name: str, words: Mapping[str, str], out: Path) -> None:
    """The plan of a config with these fields into `out`, by another process."""
    command = [sys.executable, "-m", "experiments.planned", f"--config={name}", f"--out={out}"]
    subprocess.run([*command, *fields.arguments(words)], check=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    fields.add_argument(parser)
    parser.add_argument("--card", default=CARD)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        cfg = shapes.with_configs(config.load(args.config, dict(args.set)), folder)
        found = plan.plan(cfg, 1, args.card)
    figures = {f"{use.stage}: memory": results.figure(use.total / 1e9, "GB", 1) for use in found.uses}
    figures |= {f"{use.stage}: time": results.figure(use.seconds, "s", 1) for use in found.uses}
    results.record(args.out, figures, card=args.card)


if __name__ == "__main__":
    main()
