"""Make the emoji world's checkpoints: tokenizers, VAE, FLUX pipeline and CLIP, all from the drawing program.

    python -m experiments.emoji.pretrain --minutes=9            # on a GPU; again, until runs/emoji is done
    python -m experiments.emoji.pretrain --scale=1e-4 --out=/tmp/emoji     # a short run, on a CPU

It goes on from where it was stopped, by the time or otherwise: a training that has ended has written its weights, and
one that has not has its state in <out>/state. Exit code 75: the time is over, run it again. experiments/pretraining.py
says how the networks are trained; `python -m experiments.emoji.check` measures their quality.

`--width=160` and 256 are the same world with a narrower transformer, for the experiments on width. `--like=FOLDER`
takes the VAE and the CLIP of a folder that is done and trains the transformer with its text encoders alone.
"""

import argparse
import dataclasses
import filecmp
import functools
import json
import math
import multiprocessing
import os
import shutil
import string
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import pretraining
from experiments.emoji import accuracy, check, world
from experiments.emoji.check import TOKENS
from experiments.emoji.world import Scene, Word
from experiments.pretraining import Fit, Folders
from experiments.tiny import pretrain as tiny
from experiments.tiny.check import draw_samples
from solrl_jax import config, device, disk
from solrl_jax.models import flux
from solrl_jax.models.folders import tokenize as tokenize_by

LETTERS = tuple(string.ascii_uppercase)
AGAIN = 75  # EX_TEMPFAIL of sysexits.h, as in solrl_jax.main

VAE = tiny.VAE | {"block_out_channels": [32, 64, 128], "sample_size": world.SIDE}
WIDTHS = (384, 256, 160)
TEXT = tiny.TEXT | {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 128}
T5 = tiny.T5 | {"d_model": 192, "d_ff": 512, "num_heads": 6}
VISION = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6}
CLIP = tiny.CLIP | {
    "projection_dim": 128,
    "text_config": {**TEXT, "model_type": "clip_text_model", "num_hidden_layers": 3},
    "vision_config": tiny.CLIP["vision_config"] | VISION | {"image_size": world.SIDE, "patch_size": 8},
}


def configs(width: int = 384) -> dict[str, Any]:
    """The config.json of all parts. Of 384 channels the transformer has 15.3M parameters, in heads of 32."""
    transformer = tiny.TRANSFORMER | {
        "num_layers": 1,
        "num_single_layers": 4,
        "num_attention_heads": width // tiny.TRANSFORMER["attention_head_dim"],
        "joint_attention_dim": T5["d_model"],
        "pooled_projection_dim": TEXT["hidden_size"],
    }
    return {
        "vae": VAE,
        "transformer": transformer,
        "text_encoder": TEXT,
        "text_encoder_2": T5,
        "clip": CLIP,
        "scheduler": tiny.SCHEDULER,
    }


# --- data -----------------------------------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    """Captions with all words but those that are drawn: the tokenizers spell these, as they spell any other word."""
    things = [world.caption(Scene((world.Thing(name, count),))) for name in world.OBJECTS for count in (1, 2)]
    numbers = [f"{number} x, x and x" for number in world.NUMBERS]
    relations = [
        f"x {relation} x on a {ground} background" for relation in world.RELATIONS for ground in world.BACKGROUNDS
    ]
    return [*things, *numbers, *relations, *(f"the word x in {ink}" for ink in world.INKS)]


def tokenizer(folders: Folders):
    """tokenize(captions) -> {"clip": i32 [n, 24], "t5": i32 [n, 24]}"""
    return functools.partial(tokenize_by, str(folders.pipeline), flux.ENCODERS, TOKENS)


def drawn(scenes: Sequence[Scene], rng: np.random.Generator) -> dict[str, Any]:
    return {"sprites": tuple(world.lay_out(scenes, rng))}


def pictures(batch: dict[str, Any]) -> jax.Array:
    return world.draw(world.Sprites(*batch["sprites"]), world.templates())


SPELLED = 0.25
"""The share of the flow's scenes that are words of random letters. Trained for 16 000 steps without them, on scenes of
which 14 % are one of 146 words, OCR read 8 % of these words and none of the others (experiments/emoji/README.md)."""


def spelled(rng: np.random.Generator) -> Scene:
    """A train scene of a word of 2 letters or more, all of them random."""
    while True:
        text = "".join(rng.choice(LETTERS, rng.integers(2, world.MOST_LETTERS + 1)))
        background, ink = world.any_ink(rng)
        scene = Scene(background=background, word=Word(text, ink))
        if world.split_of(scene) == "train" and text not in world.WORDS:
            return scene


def captioned(rng: np.random.Generator, count: int, tokenize) -> dict[str, Any]:
    """`count` train scenes with the tokens of their captions."""
    words = int(SPELLED * count)
    scenes = [*world.sample(rng, count - words), *(spelled(rng) for _ in range(words))]
    return drawn(scenes, rng) | {"tokens": tokenize([world.caption(scene) for scene in scenes])}


def mutated(scene: Scene, rng: np.random.Generator) -> Scene:
    """A train scene that differs in one stated fact: an object, a number, a side, the background, the word, its ink.

    Of scenes with a side it is the side in half of them and more: the CLIP learns it last."""
    if scene.word is None:
        side = ["side"] if rng.random() < 0.5 else []
        orders = ([*side, *map(str, rng.permutation(accuracy.PARTS))] for _ in range(20))
        options = (accuracy.wrong(scene, part, rng) for order in orders for part in order)
    else:
        options = (dataclasses.replace(scene, word=word) for word in _others(scene.word, scene.background, rng))
    return next(other for other in options if other is not None and world.split_of(other) == "train")


def _others(word: Word, ground: str | None, rng: np.random.Generator) -> Iterator[Word]:
    """Words that differ in their text or in an ink that can be read on the background."""
    inks = [x for x in world.INKS if x != word.ink and (ground is None or ground in world.legible(x))]
    while True:
        if inks and rng.random() < 0.5:
            yield Word(word.text, str(rng.choice(inks)))
        yield Word(str(rng.choice([x for x in world.WORDS if x != word.text])), word.ink)


def paired(rng: np.random.Generator, count: int, tokenize) -> dict[str, Any]:
    """[count, 2, ...]: train scenes beside one that differs in one fact, laid out anew; the CLIP's tokens."""
    scenes = world.sample(rng, count)
    both = [scenes, [mutated(scene, rng) for scene in scenes]]
    sprites = [world.lay_out(each, rng) for each in both]
    tokens = [tokenize([world.caption(scene) for scene in each])["clip"] for each in both]
    return {"sprites": tuple(np.stack(x, 1) for x in zip(*sprites, strict=True)), "tokens": np.stack(tokens, 1)}


# --- all of it ------------------------------------------------------------------------------------------------------


def watch(cfg: config.Model, decoder, base, text) -> str:
    """Exact by the judge on 200 test captions of objects, 10 steps."""
    scenes = world.sample(np.random.default_rng(2), 200, "test", words=False)
    model = flux.make(cfg)
    tokens = jax.tree.map(jnp.asarray, model.tokenize([world.caption(scene) for scene in scenes]))
    images = draw_samples(cfg, base, decoder, jax.jit(model.encode)(text, tokens), 1, config.Stage(steps=10, chunk=1))
    return f"exact {accuracy.judged(np.asarray(images[:, 0]), scenes).exact.mean():.3f}"


def train_vae(folders: Folders, pool, how: Fit) -> None:
    pretraining.save_vae(folders, *pretraining.train_vae(VAE, pictures, pool, how))


def train_flow(folders: Folders, pool, how: Fit) -> None:
    """Recomputing a block is faster on a GPU than storing and loading all that its backward pass reads."""
    cfg, vae_params = check.model_config(folders.pipeline), pretraining.stored_vae(folders.pipeline)
    cfg = dataclasses.replace(cfg, remat=True)
    seen = functools.partial(watch, cfg, vae_params["decoder"])
    pretraining.save_flow(folders, pretraining.train_flow(cfg, vae_params, pictures, pool, how, watch=seen))


def train_clip(folders: Folders, pool, how: Fit) -> None:
    vae_params = pretraining.stored_vae(folders.pipeline)
    trained = pretraining.train_clip(folders.clip, folders.pipeline, vae_params, pictures, pool, how)
    pretraining.save_clip(folders, trained)


TRAININGS = {"vae": train_vae, "flow": train_flow, "clip": train_clip}
"""In their order: each reads what those before it wrote."""
POOLS = {"vae": 50_000, "flow": 300_000, "clip": 100_000}
"""Scenes of each training; the CLIP's each with one that differs in a fact."""
PART = 2_000


def part_of(label: str, seed: int, part: int, count: int, folders: Folders) -> Any:
    """A part of a training's scenes. It has its own random numbers, so that a training that goes on has the same."""
    rng = np.random.default_rng([seed, tuple(TRAININGS).index(label), part])
    if label == "vae":
        return drawn(world.sample(rng, count), rng)
    return {"flow": captioned, "clip": paired}[label](rng, count, tokenizer(folders))


def begin_pool(host: Executor, label: str, seed: int, scale: float, folders: Folders) -> list[Future]:
    """The parts of a training's scenes, as `host` draws them."""
    count = max(8, int(POOLS[label] * scale))
    sizes = [min(PART, count - first) for first in range(0, count, PART)]
    return [host.submit(part_of, label, seed, part, size, folders) for part, size in enumerate(sizes)]


def drawer(scale: float) -> Executor:
    """Draws the scenes of the next trainings while the device trains: in processes, if there are many."""
    if scale * max(POOLS.values()) <= PART:
        return ThreadPoolExecutor(1)
    spawn = multiprocessing.get_context("spawn")  # JAX has threads, which a fork loses
    return ProcessPoolExecutor(min(os.cpu_count() or 1, 16), mp_context=spawn)


def prepare(folders: Folders, width: int, like: Folders | None) -> None:
    """Write what is no weight, and copy the CLIP and the VAE of `like`. ValueError if that is not done, or if `folders`
    was begun with another width or VAE."""
    if like and (missing := [str(file) for file in like.done.values() if not file.is_file()]):
        raise ValueError(f"--like: there is no {', '.join(missing)}: train it first, or leave --like out")
    made, vae = configs(width), folders.done["vae"]
    if vae.exists():
        transformer = json.loads((folders.pipeline / "transformer/config.json").read_text())
        if (heads := transformer["num_attention_heads"]) != made["transformer"]["num_attention_heads"]:
            begun = heads * transformer["attention_head_dim"]
            raise ValueError(f"--width={width}: {folders.pipeline} was begun with {begun}: give that, or another --out")
        if like and not filecmp.cmp(vae, like.done["vae"], shallow=False):
            raise ValueError(f"--like: {vae} is another one already: leave --like out, or give another --out")
        return
    pretraining.write_folders(*folders, vocabulary(), made, TOKENS)
    if like:
        shutil.copytree(like.clip, folders.clip, dirs_exist_ok=True)
        shutil.copy(like.pipeline / "vae/config.json", vae.parent)
        with disk.whole(vae) as f:  # last: its name means that all of this is here
            f.write(like.done["vae"].read_bytes())


def main(argv: list[str] | None = None) -> int:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, choices=WIDTHS, default=WIDTHS[0], help="channels of the transformer")
    parser.add_argument("--like", type=Path, help="a folder that is done: take its VAE and its CLIP")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many, to be run again")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full number of steps and scenes")
    parser.add_argument("--vae_steps", type=int, default=5_000)
    parser.add_argument("--flow_steps", type=int, default=20_000)
    parser.add_argument("--flow_batch", type=int, default=512)
    parser.add_argument("--flow_rate", type=float, default=1e-3)
    parser.add_argument("--clip_steps", type=int, default=8_000)
    args = parser.parse_args(argv)
    folders, start = Folders(args.out / "pipeline", args.out / "clip"), time.time()
    until, steps = start + 60 * args.minutes, {label: getattr(args, f"{label}_steps") for label in TRAININGS}
    like = Folders(args.like / "pipeline", args.like / "clip") if args.like else None
    try:
        prepare(folders, args.width, like)
    except ValueError as e:
        parser.error(str(e))
    todo = [label for label in TRAININGS if not folders.done[label].exists()]
    with drawer(args.scale) as host:
        pools = {label: begin_pool(host, label, args.seed, args.scale, folders) for label in todo}
        try:
            for label in todo:
                batch, rate = (args.flow_batch, args.flow_rate) if label == "flow" else (256, 1e-3)
                count, state = max(2, int(steps[label] * args.scale)), args.out / "state" / f"{label}.msgpack"
                parts = [part.result() for part in pools.pop(label)]
                if label != todo[0] and time.time() > until:
                    raise pretraining.Stopped(f"the time is over before {label}")
                how = Fit(count, batch, rate, args.seed, label, state, until)
                TRAININGS[label](folders, jax.tree.map(lambda *x: np.concatenate(x), *parts), how)
                state.unlink(missing_ok=True)  # the weights are written
        except pretraining.Stopped as e:
            print(f"{e}; run the command again to go on", flush=True)
            return AGAIN
        finally:
            host.shutdown(wait=False, cancel_futures=True)  # not after all scenes of the other trainings
    print(f"{args.out} is done, {time.time() - start:.0f} s on {jax.devices()[0].device_kind}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
