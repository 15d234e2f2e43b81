"""A trained LoRA against the base, by the judge: the same prompts, the same seeds, paired.

    python -m experiments.tiny.compare --run=runs/tiny-...          # minutes on two CPU cores

Writes results/<name>.json with exact-caption accuracy, share of facts and CLIPScore of both, and a 95 % bootstrap
interval of the gain over prompts.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import results
from experiments.tiny import check
from experiments.tiny.lab import interval
from solrl_jax import config, lora
from solrl_jax.models import flux
from solrl_jax.rewards import clipscore


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--name", default="compare")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--trained_at", default="", help="commit that trained the run, if it is not this one")
    args = parser.parse_args(argv)
    cfg = check.model_config(check.HERE / "pipeline")
    model, lora_cfg = flux.make(cfg), config.load("tiny").lora
    base, vae_params, text = jax.tree.map(jnp.asarray, flux.load(cfg))
    like = lora.init(jax.random.key(0), base, model.lora_targets, lora_cfg)
    trained = lora.load(args.run, like, model.keys, lora_cfg)
    policies = {"base": base, "trained": lora.graft(base, lora.merged_kernels(base, trained, lora_cfg))}
    reward, clip_params = clipscore.make(str(check.HERE / "clip"))
    stage, figures = config.Stage(steps=10, chunk=args.images), {}
    for split in ("test", "compositional"):
        captions = (check.HERE / f"prompts/{split}.txt").read_text().splitlines()
        cond = jax.jit(model.encode)(text, model.tokenize(captions))
        tokens, found = reward.tokenize(captions), {}
        for name, params in policies.items():
            images = check.draw_samples(cfg, params, vae_params, cond, args.images, stage)
            share, right = check.exact(images, captions)
            scores = jax.jit(reward.score)(clip_params, images.reshape(-1, *images.shape[2:]), tokens)
            found[name] = {
                "exact": right,
                "share of facts": share,
                "clipscore": np.asarray(scores).reshape(right.shape),
            }
        for what in found["base"]:
            before, after = (found[name][what].mean(axis=1) for name in ("base", "trained"))
            n = found["base"][what].size
            figures[f"{split}: {what}, base"] = results.figure(float(before.mean()), "mean", n)
            figures[f"{split}: {what}, trained"] = results.figure(float(after.mean()), "mean", n)
            gain = results.figure(
                float((after - before).mean()), "95 % bootstrap interval over prompts", n, interval(after - before)
            )
            figures[f"{split}: {what}, gain"] = gain
    for name, f in figures.items():
        print(f"{f['value']:.4f}  {name}  {f['spread'] or ''}", flush=True)
    trained_at = args.trained_at or "this commit"
    results.record(check.HERE / f"results/{args.name}.json", figures, run=str(args.run), trained_at=trained_at)


if __name__ == "__main__":
    main()
