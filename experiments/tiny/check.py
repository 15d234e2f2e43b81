"""Is the small world suitable for learning? Quality of its checkpoints before any reinforcement learning.

    python -m experiments.tiny.check            # a minute on a GPU, several on two CPU cores

The judge must be right on drawings and their VAE reconstructions. The base must not be perfect. The CLIP must be a
useful reward: within a prompt, its ranks agree with the judge's, and choosing by it raises the judge's accuracy.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import results
from experiments.tiny import world
from solrl_jax import config, device, rollout, sharding
from solrl_jax.models import flux, vae
from solrl_jax.rewards import clipscore, shapes
from solrl_jax.selection import spearman
from solrl_jax.structs import Frozen

HERE = Path(__file__).parent
TOKENS, SIZE = 24, 32


def model_config(pipeline: Path) -> config.Model:
    return config.Model(path=str(pipeline), size=SIZE, text_tokens=TOKENS, remat=False, min_dim=0)


def draw_samples(cfg: config.Model, base, vae_params, cond, images: int, stage: config.Stage, seed: int = 0):
    """Images f32 [P, images, H, W, 3] of the base for P prompts; the keys depend only on `seed`."""
    model = flux.make(cfg)
    frozen = Frozen(base, vae_params, {})
    prompts = jax.tree.leaves(cond)[0].shape[0]
    keys = jax.random.split(jax.random.key(seed), (prompts, images))
    with jax.set_mesh(sharding.make_mesh(1)):
        run = jax.jit(
            lambda frozen, cond, keys: rollout.sample({"params": frozen.base}, cond, keys, model=model, stage=stage)
        )
        x0 = run(frozen, cond, keys)
        decode = jax.jit(lambda p, x: jax.lax.map(lambda row: model.decode(p, row), x))
        return decode(vae_params, x0)


def exact(images, captions: list[str]):
    """The judge's (share, exact), each [P, n]."""
    prompts, n = images.shape[:2]
    facts = jnp.asarray(shapes.tokenize(captions))
    judge = jax.jit(lambda x, f: jax.lax.map(lambda row: shapes.judge(row[0], row[1][None]), (x, f)))
    verdict = judge(images, facts)
    return np.asarray(verdict.share).reshape(prompts, n), np.asarray(verdict.exact).reshape(prompts, n)


def judge_figures(cfg: config.Model, count: int) -> dict:
    """The judge's accuracy on drawings and on their VAE reconstructions."""
    rng = np.random.default_rng(1)
    scenes = world.sample_scenes(rng, count, "test")
    captions = world.captions(scenes, rng)
    images = jax.jit(world.draw)(scenes)
    encoder, e_params = vae.load_vae(Path(cfg.path) / "vae", jnp.float32, encoder=True)
    decoder, d_params = vae.load_vae(Path(cfg.path) / "vae", jnp.float32)
    through = jax.jit(lambda e, d, x: vae.decode(decoder, d, vae.encode(encoder, e, x)[0]))
    out = {}
    for name, x in (("drawn", images), ("reconstructed", through(e_params, d_params, images))):
        right = exact(x[:, None], captions)[1]
        out[f"judge exact on {name} pictures"] = results.figure(float(right.mean()), "share", count)
    return out


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=HERE)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--candidates", type=int, default=24)
    args = parser.parse_args(argv)
    cfg = model_config(args.world / "pipeline")
    figures = judge_figures(cfg, 2000)
    model = flux.make(cfg)
    base, vae_params, text = jax.tree.map(jnp.asarray, flux.load(cfg))
    reward, clip_params = clipscore.make(str(args.world / "clip"))
    stage = config.Stage(steps=10, chunk=args.candidates)
    for split in ("test", "compositional"):
        captions = (args.world / f"prompts/{split}.txt").read_text().splitlines()[: args.prompts]
        cond = jax.jit(model.encode)(text, model.tokenize(captions))
        images = draw_samples(cfg, base, vae_params, cond, args.candidates, stage)
        share, right = exact(images, captions)
        tokens = reward.tokenize(captions)
        rows = jax.jit(
            lambda p, x, t: jax.lax.map(lambda r: reward.score(p, r[0], jax.tree.map(lambda y: y[None], r[1])), (x, t))
        )
        clip = np.asarray(rows(clip_params, images, tokens))
        varied = share.std(axis=1) > 0
        rho = np.asarray(spearman(jnp.asarray(clip[varied]), jnp.asarray(share[varied])))
        best = np.take_along_axis(right, clip.argmax(1)[:, None], 1)[:, 0]
        n = len(captions)
        figures |= {
            f"{split}: base exact": results.figure(
                float(right.mean()), "share", right.size, float(right.mean(1).std() / n**0.5)
            ),
            f"{split}: base share of facts": results.figure(float(share.mean()), "share", share.size),
            f"{split}: spearman of CLIP and judge within prompts": results.figure(
                float(rho.mean()), "rank correlation", int(varied.sum())
            ),
            f"{split}: exact of the best of {args.candidates} by CLIP": results.figure(float(best.mean()), "share", n),
            f"{split}: exact of the best of {args.candidates} by the judge": results.figure(
                float(right.any(1).mean()), "share", n
            ),
        }
    for name, f in figures.items():
        print(f"{f['value']:.4f}  {name}", flush=True)
    results.record(args.world / "results/check.json", figures)


if __name__ == "__main__":
    main()
