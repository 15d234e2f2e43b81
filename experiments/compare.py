"""Compare trained LoRAs with the base by the judge: the same prompts and seeds, paired.

    python -m experiments.compare runs/tiny-...                   # writes experiments/tiny/results/default_run.json
    python -m experiments.compare RUN experiments/tiny/results/long.safetensors --pictures=pictures.png
    python -m experiments.compare --world=emoji LORAS/sol_rl.safetensors --pictures=pictures.png     # 24 captions

Exact-caption accuracy, share of facts, CLIPScore and spread of the first LoRA and the base, gains with 95 % bootstrap
intervals over prompts; minutes on two CPU cores for tiny. `--pictures` draws test captions instead, one column for the
base and one for each LoRA. `--loras` of experiments.evidence makes such files.
"""

import argparse
from pathlib import Path

import jax
import numpy as np

from experiments import evidence, lab, results, worlds
from solrl_jax import device, sharding
from solrl_jax.run import evaluate, pictures
from solrl_jax.structs import Params

AT_ONCE = 100


def by_figure(base: dict[str, np.ndarray], trained: dict[str, np.ndarray], split: str) -> dict[str, dict]:
    """The means of every figure for base and trained, and the gains."""
    means = {
        f"{split}: {what}, {who}": results.figure(float(found[what].mean()), "mean", found[what].size)
        for what in ("exact", "share of facts", "clipscore")
        for who, found in (("base", base), ("trained", trained))
    }
    return means | evidence.gains(base, trained, split)


def draw(opened: lab.Opened, adapters: dict[str, Params], file: Path, count: int) -> None:
    captions = evaluate.fixed_prompts(opened.parts)[:count]  # with the same noise as the grids of a run
    columns = {
        name: evaluate.pictures(opened.parts, adapter, captions, score=opened.parts.judged).images[:, 0]
        for name, adapter in adapters.items()
    }
    print(pictures.write_grid(file, captions, columns))


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    worlds.add_arguments(parser)
    parser.add_argument("loras", type=Path, nargs="+", help="a run's folder or a LoRA file")
    parser.add_argument("--prompts", type=int, default=500, help="captions of each split")
    parser.add_argument("--out", type=Path, help="results/default_run.json of the world")
    parser.add_argument("--pictures", type=Path, help="draw pictures into this file instead")
    parser.add_argument("--count", type=int, help="captions of the pictures; as many as a run's report shows")
    args = parser.parse_args(argv)
    world = worlds.of(args)
    with jax.set_mesh(sharding.make_mesh(1)):
        opened = lab.open_world(world.config("sol_rl"), args.prompts)
        if args.pictures:
            shown = lab.policies(opened) | {file.stem: lab.read_adapter(opened, file) for file in args.loras}
            return draw(opened, shown, args.pictures, args.count or opened.parts.cfg.evaluate.grid)
        figures = {}
        policies = lab.policies(opened, args.loras[0])
        for split in lab.SPLITS:
            base, policy = (
                lab.measure(opened, jax.tree.map(lambda x: x[None], adapter), split, at_once=AT_ONCE)
                for adapter in policies.values()
            )
            figures |= by_figure(base, policy, split)
    for name, f in figures.items():
        print(f"{f['value']:.4f}  {name}  {f['spread'] or ''}", flush=True)
    results.record(args.out or world.home / "results/default_run.json", figures, lora=str(args.loras[0]))


if __name__ == "__main__":
    main()
