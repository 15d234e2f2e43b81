"""Is the emoji world suitable for learning? Quality of its checkpoints before any reinforcement learning.

    python -m experiments.emoji.check                        # results/check.json here; a minute or two on a GPU
    python -m experiments.emoji.check --world=runs/emoji     # of networks of your own, results/check.json there

The judge and OCR must be right on VAE reconstructions of pictures that no network has seen. The base must be
neither perfect nor hopeless. The CLIP must be a useful reward: it must know a caption from one that is wrong in a part,
and choosing by it must raise the judge's accuracy.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import results
from experiments.emoji import accuracy, judge, world
from experiments.emoji.world import Scene
from experiments.tiny.check import draw_samples
from solrl_jax import config, device
from solrl_jax.models import flux, vae
from solrl_jax.rewards import clipscore, ocr
from solrl_jax.selection import spearman

HERE = Path(__file__).resolve().parent
TOKENS = 24
CHUNK = 50  # pictures at once
Figures = dict[str, dict[str, Any]]


def model_config(pipeline: Path) -> config.Model:
    return config.Model(path=str(pipeline), size=world.SIDE, text_tokens=TOKENS, remat=False, min_dim=0)


def reconstructed(pipeline: Path, images: np.ndarray) -> np.ndarray:
    """Pictures [n, 64, 64, 3] after the VAE's encoder and decoder."""
    encoder, e_params = vae.load_vae(pipeline / "vae", jnp.float32, encoder=True)
    decoder, d_params = vae.load_vae(pipeline / "vae", jnp.float32)
    through = jax.jit(lambda e, d, x: vae.decode(decoder, d, vae.encode(encoder, e, x)[0]))
    chunks = np.array_split(images, max(1, len(images) // CHUNK))
    return np.concatenate([np.asarray(through(e_params, d_params, x)) for x in chunks])


def read_right(images: np.ndarray, scenes: list[Scene]) -> np.ndarray:
    """Whether OCR reads exactly the word of each scene."""
    texts = ocr.read(np.round(255 * images).astype(np.uint8))
    words = [scene.word.text for scene in scenes if scene.word]
    return np.array([ocr.shown(text, word, strict=True) == 1 for text, word in zip(texts, words, strict=True)])


def judges(pipeline: Path, things: list[Scene], words: list[Scene]) -> Figures:
    """The judge and OCR on drawings and on their reconstructions, and the error of these."""
    view = accuracy.VIEWS["as drawn"]
    drawn = [accuracy.pictures(scenes, view, 3) for scenes in (things, words)]
    through = [reconstructed(pipeline, images) for images in drawn]
    error = np.concatenate([np.abs(a - b).mean((1, 2, 3)) for a, b in zip(drawn, through, strict=True)])
    out = {"VAE: mean absolute error": results.figure(float(error.mean()), "of 1", len(error))}
    for name, (objects, texts) in (("drawn", drawn), ("reconstructed", through)):
        found = accuracy.accepted(objects, things, view.by, 3, judge.LIMITS)
        out |= {f"judge on {name}: {k}": f for k, f in accuracy.figures(found).items()}
        out[f"OCR on {name}: word read"] = accuracy.share(read_right(texts, words))
    return out


def clip_knows(world_folder: Path, pipeline: Path, things: list[Scene]) -> Figures:
    """How often the CLIP gives a reconstruction's caption more than one that is wrong in a part."""
    reward, params = clipscore.make(str(world_folder / "clip"))
    images = reconstructed(pipeline, accuracy.pictures(things, accuracy.VIEWS["as drawn"], 4))
    rng, out = np.random.default_rng(5), {}
    score = jax.jit(reward.score)

    def scores(which: list[int], scenes: list[Scene]) -> np.ndarray:
        tokens = reward.tokenize([world.caption(scene) for scene in scenes])
        return np.asarray(score(params, images[which], tokens))

    for part in accuracy.PARTS:
        pairs = [(i, other) for i, scene in enumerate(things) if (other := accuracy.wrong(scene, part, rng))]
        which = [i for i, _ in pairs]
        better = scores(which, [things[i] for i in which]) > scores(which, [other for _, other in pairs])
        out[f"CLIP prefers the caption to a wrong {part}"] = accuracy.share(better)
    return out


def base(world_folder: Path, cfg: config.Model, split: str, count: int, candidates: int) -> Figures:
    """What the base draws for captions of a split, and what choosing among candidates would give."""
    model = flux.make(cfg)
    params, vae_params, text = jax.tree.map(jnp.asarray, flux.load(cfg))
    reward, clip = clipscore.make(str(world_folder / "clip"))
    encode, score = jax.jit(model.encode), jax.jit(reward.score)
    rng, out = np.random.default_rng(6), {}
    stage = config.Stage(steps=10, chunk=candidates)

    def draws(scenes: list[Scene]) -> tuple[np.ndarray, list[str]]:
        captions = [world.caption(scene) for scene in scenes]
        cond = encode(text, jax.tree.map(jnp.asarray, model.tokenize(captions)))
        return np.asarray(draw_samples(cfg, params, vae_params, cond, candidates, stage)), captions

    scenes = world.sample(rng, count, split, words=False)
    images, captions = draws(scenes)
    verdicts = [accuracy.judged(images[:, i], scenes) for i in range(candidates)]
    right, shares = (np.stack([getattr(v, name) for v in verdicts], 1) for name in ("exact", "share"))
    words = reward.tokenize(captions)
    clips = np.stack([np.asarray(score(clip, images[:, i], words)) for i in range(candidates)], 1)
    varied = shares.std(1) > 0
    rho = np.asarray(spearman(jnp.asarray(clips[varied]), jnp.asarray(shares[varied])))
    best = np.take_along_axis(right, clips.argmax(1)[:, None], 1)[:, 0]
    out |= {
        "base exact": accuracy.share(right.mean(1)),
        "base share of facts": accuracy.share(shares.mean(1)),
        "spearman of CLIP and judge within prompts": accuracy.share(rho)
        | {"unit": "rank correlation ± standard error"},
        f"exact of the best of {candidates} by CLIP": accuracy.share(best),
        f"exact of the best of {candidates} by the judge": accuracy.share(right.max(1)),
    }
    scenes = [scene for scene in world.sample(rng, 12 * count, split) if scene.word][: max(1, count // 4)]
    images, _ = draws(scenes)
    read = np.stack([read_right(images[:, i], scenes) for i in range(candidates)], 1)
    out |= {
        "base: word read": accuracy.share(read.mean(1)),
        f"word read in the best of {candidates}": accuracy.share(read.max(1)),
    }
    return {f"{split}: {name}": f for name, f in out.items()}


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=HERE, help="the folder of pipeline/ and clip/")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--candidates", type=int, default=24)
    parser.add_argument("--out", type=Path, help="results/check.json of the world")
    args = parser.parse_args(argv)
    ocr.make(None, None)  # an error if the reader is not here
    pipeline, rng = args.world / "pipeline", np.random.default_rng(7)
    things = world.sample(rng, args.scenes, "test", words=False)
    words = [s for s in world.sample(rng, 12 * args.scenes, "test") if s.word][: max(1, args.scenes // 4)]
    figures = judges(pipeline, things, words) | clip_knows(args.world, pipeline, things)
    for split in world.SPLITS:
        figures |= base(args.world, model_config(pipeline), split, args.scenes, args.candidates)
    for name, f in figures.items():
        print(f"{results.cell(f)}  {name}", flush=True)
    results.record(args.out or args.world / "results/check.json", figures)


if __name__ == "__main__":
    main()
