"""The emoji world's scenes: what is in them, their captions, where things are drawn, and the drawing.

    python -m experiments.emoji.world                       # write prompts/ anew

A `Scene` says what a picture shows; `caption` and `parse` convert it to text and back. `lay_out` (numpy, host) gives
places, sizes and colours for scenes, as rows of `Sprites`; `draw` (JAX, on the device during training) composes them
from the templates of a style. All lengths are pixels of the picture, SIDE by SIDE, (y, x) from the top left corner.

Ranges. A template's longer side is SIZES px, uniform and drawn for each object; its square box is at least MARGIN px
inside the picture and at least GAP px away from the next box; within that, places are uniform. With a relation, every
subject is at least CLEAR px beyond every other object in its direction, and the means of both differ by CLEAR px more
in that direction than across it. A word is WORD px wide if its cells are then no larger than CELL_MOST. A background is
the named colour, at most JITTER brighter or darker.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32
from PIL import Image

HERE = Path(__file__).resolve().parent
ASSETS = HERE / "assets"
SIDE, CELL, COLUMNS = 64, 32, 16
STYLES = ("fluent", "noto")  # the second is never trained on
SPLITS = ("train", "test")
HELD_PERCENT = 15  # of the compositions

_NAMES = json.loads((ASSETS / "names.json").read_text())
OBJECTS: tuple[str, ...] = tuple(entry["name"] for entry in _NAMES["objects"])
PLURALS = {entry["name"]: entry["plural"] for entry in _NAMES["objects"]}
SPOKEN = {"unicorn": False, "ufo": False, "hourglass": True}  # begins with a vowel, unlike what its letter says
WIDTHS: dict[str, float] = _NAMES["letters"]  # of a capital with its spacing, in cells
RELATIONS = ("left of", "right of", "above", "below")  # of the first thing to the second; index ^ 1 is the opposite
NUMBERS = ("a", "two", "three")
BACKGROUNDS = {
    "white": (1.0, 1.0, 1.0),
    "gray": (0.62, 0.62, 0.64),
    "red": (0.93, 0.36, 0.33),
    "yellow": (1.0, 0.90, 0.45),
    "green": (0.56, 0.85, 0.55),
    "blue": (0.50, 0.75, 1.0),
    "purple": (0.55, 0.40, 0.85),
    "pink": (1.0, 0.72, 0.84),
}
INKS = {
    "red": (0.85, 0.05, 0.10),
    "blue": (0.10, 0.20, 0.80),
    "green": (0.0, 0.45, 0.15),
    "black": (0.05, 0.05, 0.05),
    "white": (1.0, 1.0, 1.0),
}
LEGIBLE = 0.3  # least difference in luma between an ink and the background
_LIST = """
ACE ACT AIR ANT APE ARM ART ASK BAG BANK BAR BATH BED BEE BIG BIKE BIRD BLUE BOAT BOOK BOSS BOX BOY BREAD BUS CAB
CAFE CAKE CALL CAR CAT CHEF CITY CLUB COMIC COLD COOK CUP DAY DEAL DOG DOOR DRINK EAST EASY ECHO EXIT FARM FAST
FILM FIRE FISH FIVE FOOD FOUR FOX FREE FRESH FUN GAME GAS GATE GIFT GIRL GO GOLD GOOD GREEN GYM HAPPY HELP HERO
HI HOME HOT HOTEL ICE IDEA INN JAM JAZZ JOB JOKER JOY JUICE JUMP KEY KID KING KIWI LAB LAKE LION LOVE LUCK LUNCH
MAGIC MAP MEGA MENU MILK MOON MUSIC NEW NEWS NEXT NICE NINE NO NORTH OFF OIL OK ON ONE OPEN PARK PARTY PAY PHOTO
PIE PIZZA PLAY POOL POP PUSH QUEEN QUICK QUIET QUIZ RADIO RED REST RICE ROAD ROCK ROOM RUN SALE SALT SEA SEVEN
SHOE SHOP SHOW SIX SLOW SNOW SOUP SOUTH SPA STAR STOP SUN SWIM TAXI TEA TEN TIME TOY TRAIN TREE TWO UP VAN VIDEO
VIP VOTE WALK WATER WAX WAY WEST WILD WIN WOOD WORK YES YOGA ZERO ZOO
"""
WORDS = tuple(_LIST.split())
MOST_LETTERS = 5
SIZES = {1: (26.0, 36.0), 2: (22.0, 28.0), 3: (18.0, 21.0)}  # by the number of objects in the scene
MARGIN, GAP, CLEAR = 1.0, 1.0, 3.0
WORD, CELL_MOST = (42.0, 58.0), 36.0
JITTER = 0.04


# --- scenes and captions --------------------------------------------------------------------------------------------


class Thing(NamedTuple):
    """So many of one object."""

    name: str
    count: int = 1


class Word(NamedTuple):
    """A word in capitals and the name of its ink."""

    text: str
    ink: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a caption says: one to three things, three objects in all at most, or a word. None: not said.

    Two things have a relation (the first is `relation` the second), one and three have none. ValueError otherwise.
    """

    things: tuple[Thing, ...] = ()
    relation: str | None = None
    background: str | None = None
    word: Word | None = None

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise ValueError(f"{self} is no scene: {problem}")

    def _problem(self) -> str:
        names = [thing.name for thing in self.things]
        if strange := set(names) - set(OBJECTS):
            return f"there is no object {', '.join(sorted(strange))}; see OBJECTS"
        if self.background is not None and self.background not in BACKGROUNDS:
            return f"the background is one of {', '.join(BACKGROUNDS)}"
        if self.word is not None:
            return _word_problem(self.word) if not self.things else "it has things or a word, not both"
        counts = [thing.count for thing in self.things]
        if not counts or min(counts) < 1 or sum(counts) > len(NUMBERS):
            return f"it has 1 to {len(NUMBERS)} objects in all"
        if len(set(names)) < len(names):
            return "its things differ; say how many of one by its count"
        if (self.relation in RELATIONS) != (len(names) == 2) or (self.relation and self.relation not in RELATIONS):
            return f"two things have one of the relations {', '.join(RELATIONS)}; one and three things have none"
        return ""


def _word_problem(word: Word) -> str:
    if not re.fullmatch(f"[A-Z]{{1,{MOST_LETTERS}}}", word.text):
        return f"a word has 1 to {MOST_LETTERS} capitals A to Z"
    return "" if word.ink in INKS else f"the ink is one of {', '.join(INKS)}"


def caption(scene: Scene) -> str:
    """The one caption of a scene: "two foxes left of a cup on a blue background", "the word OPEN in red"."""
    if scene.word:
        text = f"the word {scene.word.text} in {scene.word.ink}"
    else:
        phrases = [_phrase(thing) for thing in scene.things]
        both = f" {scene.relation} ".join(phrases)
        text = both if len(phrases) < 3 else f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
    return f"{text} on a {scene.background} background" if scene.background else text


def _phrase(thing: Thing) -> str:
    if thing.count > 1:
        return f"{NUMBERS[thing.count - 1]} {PLURALS[thing.name]}"
    vowel = thing.name[0] in "aeiou" if thing.name not in SPOKEN else SPOKEN[thing.name]
    return f"{'an' if vowel else 'a'} {thing.name}"


_SAID = {_phrase(Thing(name, n)): Thing(name, n) for name in OBJECTS for n in range(1, len(NUMBERS) + 1)}


def parse(text: str) -> Scene:
    """The scene of a caption; caption(parse(text)) == text. ValueError, with the text, if it is not of this world."""
    found = re.fullmatch(r"(.+?)(?: on a (\w+) background)?", text)
    try:
        if found is None:
            raise ValueError("it is empty")
        body, background = found.groups()
        if word := re.fullmatch(r"the word (\w+) in (\w+)", body):
            return Scene(background=background, word=Word(*word.groups()))
        first, *relation = re.split(f" ({'|'.join(RELATIONS)}) ", body, maxsplit=1)
        phrases = [first, relation[1]] if relation else re.split(", | and ", body)
        if strange := [phrase for phrase in phrases if phrase not in _SAID]:
            raise ValueError(f"{strange[0]!r} is no number and object of it")
        return Scene(tuple(_SAID[phrase] for phrase in phrases), relation[0] if relation else None, background)
    except ValueError as e:
        raise ValueError(f"caption {text!r:.80} is not of the emoji world ({e}); try 'two foxes left of a cup'") from e


# --- splits ---------------------------------------------------------------------------------------------------------


def compositions(scene: Scene) -> tuple[str, ...]:
    """What a split holds out: each pair of different objects, each object in a number above one, the word."""
    if scene.word:
        return (f"word {scene.word.text}",)
    pairs = itertools.combinations(sorted(thing.name for thing in scene.things), 2)
    counts = [f"{thing.count} {thing.name}" for thing in scene.things if thing.count > 1]
    return (*(f"{a} + {b}" for a, b in pairs), *counts)


@functools.cache
def held_out(composition: str) -> bool:
    """By a hash that no version of Python changes."""
    return int.from_bytes(hashlib.sha256(composition.encode()).digest()[:8]) % 100 < HELD_PERCENT


def split_of(scene: Scene) -> str:
    """ "test" if one of the scene's compositions is held out. A single object is always "train"."""
    return "test" if any(map(held_out, compositions(scene))) else "train"


KINDS = {(1,): 0.24, (2,): 0.10, (3,): 0.08, (1, 1): 0.25, (1, 2): 0.05, (2, 1): 0.05, (1, 1, 1): 0.08, (): 0.15}
"""The share of scenes, before they are split, with these counts of things; (): words."""


def sample(rng: np.random.Generator, n: int, split: str = "train", words: bool = True) -> list[Scene]:
    """n scenes of `split`, four in ten with a stated background; without word scenes if not `words`."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: it must be one of {', '.join(SPLITS)}")
    found: list[Scene] = []
    while len(found) < n:
        scene = _any_scene(rng)
        if split_of(scene) == split and (words or scene.word is None):
            found.append(scene)
    return found


def _any_scene(rng: np.random.Generator) -> Scene:
    counts = tuple(KINDS)[rng.choice(len(KINDS), p=tuple(KINDS.values()))]
    if not counts:
        background, ink = any_ink(rng)
        return Scene(background=background, word=Word(WORDS[rng.integers(len(WORDS))], ink))
    names = rng.choice(len(OBJECTS), len(counts), replace=False)
    things = tuple(Thing(OBJECTS[i], count) for i, count in zip(names, counts, strict=True))
    relation = RELATIONS[rng.integers(len(RELATIONS))] if len(things) == 2 else None
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))] if rng.random() < 0.4 else None
    return Scene(things, relation, background)


def any_ink(rng: np.random.Generator) -> tuple[str | None, str]:
    """A word's background, stated four times in ten, and an ink that can be read on it."""
    ink = tuple(INKS)[rng.integers(len(INKS))]
    grounds = legible(ink)
    return grounds[rng.integers(len(grounds))] if rng.random() < 0.4 else None, ink


@functools.cache
def legible(ink: str) -> tuple[str, ...]:
    """The backgrounds on which an ink can be read."""
    luma = np.array([0.299, 0.587, 0.114])
    return tuple(name for name, rgb in BACKGROUNDS.items() if abs(luma @ (np.array(rgb) - INKS[ink])) > LEGIBLE)


# --- layout ---------------------------------------------------------------------------------------------------------


class Sprites(NamedTuple):
    """n pictures of up to MOST_LETTERS templates each, drawn in their order. A size of 0 is no sprite."""

    template: Int32[np.ndarray, "n s"]  # row of `templates`
    centre: Float32[np.ndarray, "n s 2"]  # y, x
    size: Float32[np.ndarray, "n s"]  # side of the template's cell
    tint: Float32[np.ndarray, "n s 3"]  # factor of the template's colours
    ground: Float32[np.ndarray, "n 3"]  # the background


def lay_out(scenes: Sequence[Scene], rng: np.random.Generator) -> Sprites:
    """Places, sizes and colours for scenes, all drawn from `rng`. A background that is not stated may be any."""
    n = len(scenes)
    out = Sprites(
        np.zeros((n, MOST_LETTERS), np.int32),
        np.zeros((n, MOST_LETTERS, 2), np.float32),
        np.zeros((n, MOST_LETTERS), np.float32),
        np.ones((n, MOST_LETTERS, 3), np.float32),
        np.zeros((n, 3), np.float32),
    )
    for i, scene in enumerate(scenes):
        may = (scene.background,) if scene.background else legible(scene.word.ink) if scene.word else (*BACKGROUNDS,)
        ground = np.array(BACKGROUNDS[may[rng.integers(len(may))]]) + rng.uniform(-JITTER, JITTER)
        out.ground[i] = np.clip(ground, 0, 1)
        if scene.word:
            _place_word(out, i, scene.word, rng)
    _place_things(out, scenes, rng)
    return out


def _place_word(out: Sprites, i: int, word: Word, rng: np.random.Generator) -> None:
    widths = np.array([WIDTHS[letter] for letter in word.text])
    cell = min(rng.uniform(*WORD) / widths.sum(), CELL_MOST)
    ends = np.cumsum(widths) * cell
    reach = SIDE - ends[-1], SIDE - cell
    left, top = rng.uniform(MARGIN, np.array(reach) - MARGIN)
    many = slice(len(word.text))
    out.template[i, many] = [len(OBJECTS) + ord(letter) - ord("A") for letter in word.text]
    out.centre[i, many, 0], out.centre[i, many, 1] = top + cell / 2, left + ends - widths * cell / 2
    out.size[i, many] = cell
    out.tint[i, many] = INKS[word.ink]


def _place_things(out: Sprites, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    """Uniform places, drawn again until a scene's fit: all scenes at once, since few draws fit."""
    todo = np.array([i for i, scene in enumerate(scenes) if scene.things], int)
    group = np.full((len(scenes), 3), -1)  # the thing that each of three objects belongs to; -1: there is none
    relation = np.array([RELATIONS.index(scene.relation) if scene.relation else -1 for scene in scenes])
    for i in todo:
        which = [t for t, thing in enumerate(scenes[i].things) for _ in range(thing.count)]
        group[i, : len(which)] = which
        out.template[i, : len(which)] = [OBJECTS.index(scenes[i].things[t].name) for t in which]
        out.size[i, : len(which)] = rng.uniform(*SIZES[len(which)], len(which))
    while len(todo):
        half = out.size[todo, :3, None] / 2
        low = MARGIN + half
        centre = low + rng.random((len(todo), 3, 2)) * (SIDE - 2 * low)
        good = _apart(centre, half, group[todo] >= 0) & _related(centre, group[todo], relation[todo])
        out.centre[todo[good], :3] = centre[good]
        todo = todo[~good]


def _apart(
    centre: Float[np.ndarray, "n 3 2"], half: Float[np.ndarray, "n 3 1"], there: Bool[np.ndarray, "n 3"]
) -> Bool[np.ndarray, "n"]:
    """Whether no two boxes are closer than GAP along both axes."""
    good = np.ones(len(centre), bool)
    for a, b in itertools.combinations(range(3), 2):
        beyond = np.abs(centre[:, a] - centre[:, b]) - half[:, a] - half[:, b]
        good &= (beyond.max(1) >= GAP) | ~(there[:, a] & there[:, b])
    return good


def _related(centre: Float[np.ndarray, "n 3 2"], group: np.ndarray, relation: np.ndarray) -> Bool[np.ndarray, "n"]:
    """Whether the stated relations hold clearly; true where there is none."""
    axis = np.where(relation < 2, 1, 0)
    sign = np.where(relation % 2 == 0, 1, -1)[:, None]
    rows = np.arange(len(centre))
    along, across = centre[rows, :, axis] * sign, centre[rows, :, 1 - axis]
    first, second = group == 0, group == 1
    least = np.where(second, along, np.inf).min(1) - np.where(first, along, -np.inf).max(1)
    means = [_mean(x, second) - _mean(x, first) for x in (along, across)]
    return ((least >= CLEAR) & (means[0] - np.abs(means[1]) >= CLEAR)) | (relation < 0)


def _mean(x: np.ndarray, of: np.ndarray) -> np.ndarray:
    return (x * of).sum(1) / np.maximum(of.sum(1), 1)


# --- drawing --------------------------------------------------------------------------------------------------------


@functools.cache
def templates(style: str = "fluent") -> Float32[np.ndarray, "k 32 32 4"]:
    """The objects' pictures in a style and the 26 capitals; RGBA in [0, 1], colours multiplied by alpha."""
    if style not in STYLES:
        raise ValueError(f"style is {style!r}: it must be one of {', '.join(STYLES)}")
    cells = [*_cells(ASSETS / f"{style}.png")[: len(OBJECTS)], *_cells(ASSETS / "letters.png")[: len(WIDTHS)]]
    rgba = np.stack(cells).astype(np.float32) / 255
    return np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], -1)


def _cells(file: Path) -> np.ndarray:
    pixels = np.asarray(Image.open(file))
    rows = len(pixels) // CELL
    return pixels.reshape(rows, CELL, COLUMNS, CELL, 4).swapaxes(1, 2).reshape(-1, CELL, CELL, 4)


def resampling(centre: Float[Array, "*b"], size: Float[Array, "*b"], side: int = SIDE) -> Float[Array, "*b side 32"]:
    """Weights of a cell's pixels in each pixel of a line, if the cell is `size` wide and in the middle at `centre`.

    A triangle as wide as a pixel of the coarser of both grids: bilinear when enlarged, antialiased when reduced. Its
    weights are divided by their sum, over pixels outside the cell too, or a grid would show. Sizes of 8 or more.
    """
    pad = 8
    size = jnp.maximum(size, 8.0)[..., None, None]
    out = _middles(0, side, size.ndim - 1)[..., None]
    at = (out - centre[..., None, None]) * CELL / size + CELL / 2  # pixels of the cell
    wide = jnp.maximum(1.0, CELL / size)
    near = jnp.maximum(0.0, 1 - jnp.abs(at - _middles(-pad, CELL + pad, at.ndim)) / wide)
    return (near / jnp.maximum(near.sum(-1, keepdims=True), 1e-6))[..., pad:-pad]


def _middles(first: int, end: int, ndim: int) -> Float[Array, "..."]:
    """The middles of pixels along the last of so many axes."""
    return (jnp.arange(first, end) + 0.5).reshape((1,) * (ndim - 1) + (-1,))


def draw(sprites: Sprites, cells: Float[Array | np.ndarray, "k 32 32 4"]) -> Float[Array, "n 64 64 3"]:
    """Pictures in [0, 1]; `cells` are `templates(style)`. Can be jitted, to draw batches on the device."""
    template, centre, size, tint, ground = map(jnp.asarray, sprites)
    image = jnp.broadcast_to(ground[:, None, None], (len(ground), SIDE, SIDE, 3))
    cells = jnp.asarray(cells)
    for s in range(template.shape[1]):
        y, x = (resampling(centre[:, s, axis], size[:, s]) for axis in (0, 1))
        rgba = jnp.einsum("nyh,nhwc,nxw->nyxc", y, cells[template[:, s]], x, precision="highest")
        rgba = rgba * (size[:, s, None, None, None] > 0)
        image = rgba[..., :3] * tint[:, s, None, None] + (1 - rgba[..., 3:]) * image
    return jnp.clip(image, 0, 1)


# --- prompts --------------------------------------------------------------------------------------------------------

JUDGE = "experiments.emoji.judge"


def prompt_row(scene: Scene) -> dict[str, object]:
    """A line of a prompt file: words are scored by `ocr`, objects by the judge, both by `clipscore`.

    `ocr_strict`, which is never trained on, is named too: unnamed, it would be asked of objects as well.
    """
    if scene.word:
        return {"prompt": caption(scene), "text": scene.word.text, "rewards": ["clipscore", "ocr", "ocr_strict"]}
    return {"prompt": caption(scene), "rewards": ["clipscore", JUDGE]}


def write_prompts(folder: Path, seed: int = 0) -> None:
    """train_metadata.jsonl (1500) and test_metadata.jsonl (500): distinct captions with their rewards, one per line."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in zip(SPLITS, (1500, 500), strict=True):
        scenes = list(dict.fromkeys(sample(rng, 2 * count, split)))[:count]
        lines = [json.dumps(prompt_row(scene)) + "\n" for scene in scenes]
        (folder / f"{split}_metadata.jsonl").write_text("".join(lines))


def write_objects(folder: Path, rows: Path, seed: int = 1, count: int = 500) -> None:
    """train.txt, test.txt and compositional.txt: captions of objects, one per line, for runs without OCR.

    train: those of train_metadata.jsonl in `rows`. test: `count` others whose compositions are all trained on.
    compositional: `count` with one that is held out, first those of test_metadata.jsonl.
    """

    def known(split: str) -> list[str]:
        found = map(json.loads, (rows / f"{split}_metadata.jsonl").read_text().splitlines())
        return [row["prompt"] for row in found if "text" not in row]

    def sampled(split: str) -> list[str]:
        return [caption(scene) for scene in sample(rng, 3 * count, split, words=False)]

    rng, train = np.random.default_rng(seed), known("train")
    other = [text for text in sampled("train") if text not in train]
    files = {"train": train, "test": other, "compositional": known("test") + sampled("test")}
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in files.items():
        distinct = list(dict.fromkeys(texts))
        kept = distinct if name == "train" else distinct[:count]
        (folder / f"{name}.txt").write_text("\n".join(kept) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "prompts")
    folder = parser.parse_args(argv).out
    write_prompts(folder)
    write_objects(folder / "objects", folder)


if __name__ == "__main__":
    main()
