"""What differs between the worlds that runs are made on: the small one, `tiny`, and the larger one, `emoji`.

A lab's run of many seeds is one program on the device (`lab`), so nothing in it may run on the host. OCR does: word
scenes of `emoji` therefore take no part in lab runs, and prompts/objects has its captions of objects alone. Training is
on CLIPScore; the reward that checks the facts of a caption is held out.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from experiments import fields
from experiments.emoji import judge as objects
from experiments.emoji import pretrain as emoji
from experiments.emoji import world as emoji_world
from experiments.tiny import pretrain as tiny
from experiments.tiny import world as tiny_world
from solrl_jax import config
from solrl_jax.config import Config
from solrl_jax.rewards import shapes
from solrl_jax.structs import Params, PyTree

HERE = Path(__file__).resolve().parent
SPLITS = ("test", "compositional")


class Verdict(Protocol):
    """What both judges say, of B pictures."""

    @property
    def share(self) -> Float[Array, "B"]: ...
    @property
    def exact(self) -> Bool[Array, "B"]: ...


class Sizes(NamedTuple):
    """How much its experiments do where the command does not say; see the sizes of TINY and of EMOJI.

    Methods: seconds of an H100 at full size (methods/price.py) that each arm gets, and at how many equal parts of them
    it is measured. Ranks: captions, candidates, how many of them are kept, and pictures at a time.
    """

    budget: float
    marks: int
    captions: int
    candidates: int
    kept: int
    chunk: int


class World(NamedTuple):
    """A world of configs/NAME.py; its results are in experiments/NAME.

    `prompts` has train.txt and a file for each of SPLITS: captions that are not trained on, of known and of new
    combinations. `judge(params, images [B, H, W, 3], tokens [G, ...])` is called for `at_once` captions at a time.
    `drawn(rng, n)` gives n train scenes, a tree with leaves [n, ...], and their captions; `pictures` draws them.
    """

    name: str
    prompts: Path
    overrides: tuple[tuple[str, str], ...]
    tokenize: Callable[[Sequence[str]], PyTree]
    params: Callable[[], Params]
    judge: Callable[[Params, Array, PyTree], Verdict]
    at_once: int
    drawn: Callable[[np.random.Generator, int], tuple[dict[str, Any], list[str]]]
    pictures: Callable[[dict[str, Any]], jax.Array]
    sizes: Sizes

    @property
    def home(self) -> Path:
        return HERE / self.name

    def config(self, recipe: str, overrides: Mapping[str, str] | None = None) -> Config:
        """The world's config of a recipe on CLIPScore alone."""
        return config.load(f"{self.name}:{recipe}_clipscore", {**dict(self.overrides), **(overrides or {})})

    def held_out(self, captions: int | None = None) -> dict[str, list[str]]:
        """{split: its first so many captions, or all}"""
        return {s: (self.prompts / f"{s}.txt").read_text().splitlines()[:captions] for s in SPLITS}


def _shapes_drawn(rng: np.random.Generator, n: int) -> tuple[dict[str, Any], list[str]]:
    scenes = tiny_world.sample_scenes(rng, n, "train")
    return {"scenes": tuple(scenes)}, tiny_world.captions(scenes, rng)


def _objects_drawn(rng: np.random.Generator, n: int) -> tuple[dict[str, Any], list[str]]:
    scenes = emoji_world.sample(rng, n, "train", words=False)
    return emoji.drawn(scenes, rng), [emoji_world.caption(scene) for scene in scenes]


TINY = World(
    name="tiny",
    prompts=HERE / "tiny/prompts",
    overrides=(),
    tokenize=shapes.tokenize,
    params=lambda: shapes.make()[1],
    judge=lambda params, images, tokens: shapes.judge(images, tokens),
    at_once=125,
    drawn=_shapes_drawn,
    pictures=tiny.pictures,
    sizes=Sizes(budget=20_000, marks=8, captions=500, candidates=24, kept=8, chunk=24),
)
EMOJI = World(
    name="emoji",
    prompts=HERE / "emoji/prompts/objects",
    overrides=(("prompt_files", str(HERE / "emoji/prompts/objects")), ("evaluate.rewards", "")),  # no OCR
    tokenize=objects.tokenize,
    params=lambda: objects.make()[1],
    judge=lambda params, images, tokens: objects.judge(images, tokens, params["cells"]),
    at_once=16,  # 16 captions of 4 pictures take about 320 MB
    drawn=_objects_drawn,
    pictures=emoji.pictures,
    # On an H200 an arm of five seeds takes about a minute (`methods.run --world=emoji --plan`), without compiling.
    sizes=Sizes(budget=20_000, marks=5, captions=200, candidates=96, kept=24, chunk=1920),
)
WORLDS = {world.name: world for world in (TINY, EMOJI)}


def find(name: str, networks: Path | None = None) -> World:
    """The world of that name, with the networks of another folder if one is given: its pipeline/ and its clip/."""
    if name not in WORLDS:
        raise ValueError(f"there is no world {name!r}: use one of {', '.join(WORLDS)}")
    if networks is None:
        return WORLDS[name]
    paths = ("model.path", str(networks / "pipeline")), ("reward_paths", f"clipscore={networks / 'clip'}")
    return WORLDS[name]._replace(overrides=(*WORLDS[name].overrides, *paths))


def defaults(name: str) -> str:
    """What a field of `Sizes` is in each world, for a parser's help."""
    return ", ".join(f"{world.name} {getattr(world.sizes, name):,g}" for world in WORLDS.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--world, --networks and --set, for `of`."""
    parser.add_argument("--world", default="tiny", choices=WORLDS)
    parser.add_argument("--networks", type=Path, help="a folder with pipeline/ and clip/; the world's own if not given")
    fields.add_argument(parser, "in every config, past its recipe but not past an arm's own: learn.kl_weight=1e-4")


def of(args: argparse.Namespace) -> World:
    """The world of `add_arguments`."""
    world = find(args.world, args.networks)
    return world._replace(overrides=(*world.overrides, *args.set))
