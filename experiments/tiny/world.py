"""The small world's drawing program: scenes of one or two shapes, with captions and pictures.

A scene is a row of numbers, sampled by `sample_scenes` (numpy, host), described by `captions` (host) and drawn by
`draw` (JAX, on the device during training). Vocabulary, shapes and caption parser: solrl_jax.rewards.shapes.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from solrl_jax.rewards import shapes

# (colour, shape) pairs that never occur in train and test; each colour and shape occurs there in other pairs.
HELD_OUT = (("orange", "triangle"), ("green", "cross"), ("cyan", "circle"), ("purple", "square"))
SPLITS = ("train", "test", "compositional")
TEST_PERCENT = 15  # of the distinct fact rows of captions
MARGIN, GAP = 1.0, 1.5  # least distance, in pixels of 32, of an object from the border and from the other object
MAX_WORDS = 18

_NAMES = list(shapes.FACTS)
_SIZES = np.array([len(values) for values in shapes.FACTS.values()])
_RELATION, _BACKGROUND, _PLACE = _NAMES.index("relation"), _NAMES.index("background"), _NAMES.index("place")
_HELD = np.zeros((8, 4), bool)
for _colour, _shape in HELD_OUT:
    _HELD[list(shapes.COLOURS).index(_colour), shapes.SHAPES.index(_shape)] = True


class Scenes(NamedTuple):
    """n scenes. Columns of the first two are those of shapes.FACTS; object 0 is the caption's subject."""

    attributes: Int32[np.ndarray, "n 9"]  # the scene's facts; -1 if absent: no second object, or no place
    stated: Bool[np.ndarray, "n 9"]  # which facts the caption states
    chance: Float32[np.ndarray, "n 8"]  # uniform random numbers for the layout
    radius: Float32[np.ndarray, "n 2"]  # pixels of a 32-pixel picture
    centre: Float32[np.ndarray, "n 2 2"]  # y, x, same pixels; meaningless for an absent object


def facts(scenes: Scenes) -> Int32[np.ndarray, "n 9"]:
    """The captions' fact rows; equal to shapes.tokenize(captions(scenes, rng)) for any wording."""
    return np.where(scenes.stated, scenes.attributes, -1).astype(np.int32)


def split_of(rows: Int32[np.ndarray, "n 9"]) -> np.ndarray:
    """Fact rows -> "train", "test" or "compositional". Both wordings of a relation are in the same split."""
    subject, other = rows[:, 0:3], rows[:, 3:6]
    turned = (rows[:, _RELATION] % 2 == 1) & (other[:, 0] >= 0)  # "right of" and "below" become "left of" and "above"
    pair = np.where(turned[:, None], np.concatenate([other, subject], 1), rows[:, 0:6])
    relation = np.where(turned, rows[:, _RELATION] - 1, rows[:, _RELATION])
    told = np.concatenate([pair, relation[:, None], rows[:, _BACKGROUND:]], 1)
    digest = np.zeros(len(rows), np.uint64)
    for column in told.T:  # our own hash: those of Python and numpy may change
        digest = (digest ^ (column + 1).astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        digest ^= digest >> np.uint64(29)
    held = _HELD[subject[:, 0], subject[:, 1]] | ((other[:, 0] >= 0) & _HELD[other[:, 0], other[:, 1]])
    return np.where(held, "compositional", np.where(digest % np.uint64(100) < TEST_PERCENT, "test", "train"))


def sample_scenes(rng: np.random.Generator, n: int, split: str = "train") -> Scenes:
    """n scenes whose captions are in `split` (one of SPLITS). Before splitting, 40 % have one object and 60 % two."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: it must be one of {', '.join(SPLITS)}")
    found, count = [], 0
    while count < n:
        scenes = _any_scenes(rng, 2 * n + 64)
        found.append(_take(scenes, split_of(facts(scenes)) == split))
        count += len(found[-1].radius)
    return Scenes(*(np.concatenate(field)[:n] for field in zip(*found, strict=True)))


def _take(scenes: Scenes, which: np.ndarray) -> Scenes:
    return Scenes(*(field[which] for field in scenes))


def _any_scenes(rng: np.random.Generator, n: int) -> Scenes:
    attributes = rng.integers(0, _SIZES, (n, len(_NAMES)), np.int32)
    attributes[:, 3] = (attributes[:, 0] + rng.integers(1, 8, n)) % 8  # the two colours differ
    two = rng.random(n) < 0.6
    attributes[~two, 3:7] = -1
    attributes[two, _PLACE] = -1
    likely = np.array([1, 1, 0.5, 1, 1, 0.5, 1, 0.4, 0.5])
    stated = (rng.random((n, len(_NAMES))) < likely[None]) & (attributes >= 0)
    return _laid_out(attributes, stated, rng.random((n, 8), np.float32))


def _laid_out(attributes: np.ndarray, stated: np.ndarray, chance: np.ndarray) -> Scenes:
    """Radii and centres for these attributes; with the same `chance`, similar scenes have similar layouts."""
    ranges = np.array(list(shapes.RADII.values()), np.float32)[attributes[:, [2, 5]]]
    radius = ranges[..., 0] + chance[:, 0:2] * (ranges[..., 1] - ranges[..., 0])
    reach = (shapes.REACH[attributes[:, [1, 4]]] * radius[..., None]).reshape(-1, 2, 2, 2)  # object, axis, (low, high)
    two = attributes[:, 3] >= 0
    centre = np.where(two[:, None, None], _pair(attributes[:, _RELATION], reach, chance[:, 2:6]), 0.0)
    centre[:, 0] = np.where(two[:, None], centre[:, 0], _single(attributes[:, _PLACE], reach[:, 0], chance[:, 2:5]))
    return Scenes(attributes, stated, chance, radius, centre.astype(np.float32))


def _between(low: np.ndarray | float, high: np.ndarray | float, chance: np.ndarray) -> np.ndarray:
    return low + chance * (high - low)


def _pair(relation: np.ndarray, reach: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Centres [n, object, (y, x)]. The boxes are apart along the relation's axis; across it, the centres are closer."""
    rows = np.arange(len(relation))
    axis = np.where(relation < 2, 1, 0)
    first = relation % 2  # the object that is to the left or above
    along = reach[rows, :, axis]  # [n, object, (low, high)]
    (a_low, a_high), (b_low, b_high) = along[rows, first].T, along[rows, 1 - first].T
    slack = shapes.SIDE - 2 * MARGIN - GAP - (a_low + a_high + b_low + b_high)
    before, after = np.sort(chance[:, 0:2], 1).T
    a = MARGIN + slack * before + a_low
    b = a + a_high + GAP + slack * (after - before) + b_low
    across = reach[rows, :, 1 - axis]
    low, high = MARGIN + across[..., 0], shapes.SIDE - MARGIN - across[..., 1]  # [n, object]
    zero = _between(low[:, 0], high[:, 0], chance[:, 2])
    nearer = b - a - 2  # so that the stated direction is unambiguous
    one = _between(np.maximum(low[:, 1], zero - nearer), np.minimum(high[:, 1], zero + nearer), chance[:, 3])
    centre = np.empty((len(relation), 2, 2))
    centre[rows, first, axis], centre[rows, 1 - first, axis] = a, b
    centre[rows, 0, 1 - axis], centre[rows, 1, 1 - axis] = zero, one
    return centre


def _single(place: np.ndarray, reach: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Centres [n, (y, x)]: within 2 pixels of the middle, or 5 or more to one side and less along the other axis."""
    rows = np.arange(len(place))
    low, high = MARGIN + reach[..., 0] - 16, 16 - MARGIN - reach[..., 1]  # offsets from the middle, [n, axis]
    middle = np.clip(_between(-2.0, 2.0, chance[:, 0:2]), low, high)
    axis = np.where(place < 2, 1, 0)
    sign = np.where(place % 2 == 0, -1, 1)
    furthest = np.where(sign < 0, -low[rows, axis], high[rows, axis])
    out = _between(5.0, furthest, chance[:, 0])
    aside = np.clip(_between(2 - out, out - 2, chance[:, 1]), low[rows, 1 - axis], high[rows, 1 - axis])
    side = np.empty((len(place), 2))
    side[rows, axis], side[rows, 1 - axis] = sign * out, aside
    return 16 + np.where((place == shapes.PLACES.index("center"))[:, None], middle, side)


def mutate(scenes: Scenes, rng: np.random.Generator) -> tuple[Scenes, Int32[np.ndarray, "n"]]:
    """Hard negatives: scenes that differ in one stated attribute, and the index of that column of shapes.FACTS.

    So the old caption is wrong for the new picture in exactly this fact. A relation becomes its opposite, another
    attribute any other value; the layout uses the same `chance`. A train scene becomes a train scene, never one with a
    held-out pair or a test caption, so the new scenes can be used for training.
    """
    n = len(scenes.radius)
    train = split_of(facts(scenes)) == "train"
    attributes, changed = scenes.attributes.copy(), np.zeros(n, np.int32)
    todo = np.arange(n)
    while len(todo):
        attributes[todo] = scenes.attributes[todo]
        column = np.argmax(rng.random((len(todo), len(_NAMES))) * scenes.stated[todo], 1)
        value = (attributes[todo, column] + rng.integers(1, _SIZES[column])) % _SIZES[column]
        value = np.where(column == _RELATION, attributes[todo, column] ^ 1, value)
        attributes[todo, column], changed[todo] = value, column
        now = split_of(np.where(scenes.stated, attributes, -1)[todo])
        todo = todo[(attributes[todo, 0] == attributes[todo, 3]) | (train[todo] & (now != "train"))]
    return _laid_out(attributes, scenes.stated, scenes.chance), changed


def captions(scenes: Scenes, rng: np.random.Generator) -> list[str]:
    """One caption per scene, lower case, at most MAX_WORDS words, with exactly the facts marked as stated."""
    return [_caption(row, rng.random(12)) for row in facts(scenes)]


def _caption(row: np.ndarray, chance: np.ndarray) -> str:
    told = {name: shapes.FACTS[name][value] for name, value in zip(_NAMES, row, strict=True) if value >= 0}

    def say(kind: str, value: str, luck: float) -> str:
        """The simplest wording half of the time, else any."""
        ways = shapes.WORDING[kind][value]
        return ways[int(max(0.0, 2 * luck - 1) * len(ways))]

    def thing(prefix: str, luck: np.ndarray) -> str:
        kinds = [kind for kind in ("size", "colour", "shape") if prefix + kind in told]
        words = " ".join(say(kind, told[prefix + kind], x) for kind, x in zip(kinds, luck[-len(kinds) :], strict=True))
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    subject, there = thing("", chance[0:3]), "there is " if chance[6] < 0.25 else ""
    if "relation" in told:
        other, order = thing("other ", chance[3:6]), chance[7]
        relation, mirror = (say(kind, told["relation"], chance[8]) for kind in ("relation", "mirror"))
        if order < 0.7:
            text = f"{there}{subject} {'is ' if chance[6] > 0.75 else ''}{relation} {other}"
        elif order < 0.85:
            text = f"{relation} {other} {there or 'is '}{subject}"
        else:
            text = f"{there}{other} with {subject} {mirror}"
    elif "place" in told and chance[7] < 0.25:
        text = f"{say('place', told['place'], chance[8])} {there or 'is '}{subject}"
    else:
        text = f"{there}{subject}" + (f" {say('place', told['place'], chance[8])}" if "place" in told else "")
    if "background" not in told:
        return text
    ground = f"{'on' if chance[9] < 0.7 else 'against'} a {say('background', told['background'], chance[10])}"
    return f"{ground} {text}" if chance[11] < 0.2 else f"{text} {ground}"


def draw(scenes: Scenes, size: int = 32) -> Float[Array, "n size size 3"]:
    """Antialiased pictures in [0, 1]; can be jitted with `size` static, to draw batches on the device."""
    colours, grounds = (jnp.array(list(table.values())) for table in (shapes.COLOURS, shapes.BACKGROUNDS))

    def picture(attributes: Array, radius: Array, centre: Array) -> Array:
        image = jnp.broadcast_to(grounds[attributes[_BACKGROUND]], (size, size, 3))
        for index, column in enumerate((0, 3)):
            mask = shapes.coverage(attributes[column + 1], radius[index], centre[index], size)[..., None]
            paint = colours[attributes[column]][None, None]
            image = jnp.where(attributes[column] >= 0, image + mask * (paint - image), image)
        return image

    return jax.vmap(picture)(*map(jnp.asarray, (scenes.attributes, scenes.radius, scenes.centre)))


def write_prompts(folder: str | Path, seed: int = 0) -> None:
    """Write train.txt (2000), test.txt (500) and compositional.txt (500): distinct captions, one per line."""
    rng = np.random.default_rng(seed)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split, count in zip(SPLITS, (2000, 500, 500), strict=True):
        lines: dict[str, None] = {}
        while len(lines) < count:
            lines |= dict.fromkeys(captions(sample_scenes(rng, count, split), rng))
        (Path(folder) / f"{split}.txt").write_text("\n".join(list(lines)[:count]) + "\n")
