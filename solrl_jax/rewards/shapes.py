"""The shapes world's vocabulary, and its judge: a reward that checks the caption's facts in the picture.

A picture shows one or two coloured shapes on a plain background; a caption states some facts about it. `read` finds,
without the caption, the shape that each palette colour forms in the picture; `judge` compares that with the caption.
Nothing here is learned, so the judge distinguishes real improvement from reward hacking.

Lengths are pixels of a 32-pixel picture, (y, x) from the top left corner; larger pictures are first averaged down to
32. A shape's centre is its centre of mass.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from solrl_jax.structs import Reward

SIDE = 32
# No colour is near the line from a background to another colour, so half covered pixels are not ambiguous.
COLOURS = {
    "red": (0.85, 0.00, 0.05),
    "orange": (1.00, 0.58, 0.00),
    "yellow": (0.90, 0.95, 0.05),
    "green": (0.05, 0.65, 0.10),
    "cyan": (0.05, 0.90, 0.80),
    "blue": (0.10, 0.25, 0.90),
    "purple": (0.40, 0.00, 0.80),
    "pink": (1.00, 0.40, 0.80),
}
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0), "gray": (0.5, 0.5, 0.5)}
SHAPES = ("circle", "square", "triangle", "cross")
RADII = {"small": (3.2, 3.9), "large": (5.5, 6.5)}  # the drawn range, pixels
RELATIONS = ("left", "right", "above", "below")  # of the subject to the other; index ^ 1 is the opposite
PLACES = ("left", "right", "top", "bottom", "center")

# A facts row has one column per entry: the index of the stated value, or -1 if the caption does not state it.
FACTS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(RADII),
    "other colour": tuple(COLOURS),
    "other shape": SHAPES,
    "other size": tuple(RADII),
    "relation": RELATIONS,
    "background": tuple(BACKGROUNDS),
    "place": PLACES,
}
VERDICTS = (*FACTS, "nothing else")

# All wordings of a value; the first is the plainest. "mirror" is a relation stated after both objects.
WORDING: dict[str, dict[str, tuple[str, ...]]] = {
    "size": {"small": ("small", "tiny", "little"), "large": ("large", "big", "huge")},
    "colour": {name: (name,) for name in COLOURS} | {"purple": ("purple", "violet")},
    "shape": {
        "circle": ("circle", "disc"),
        "square": ("square", "box"),
        "triangle": ("triangle",),
        "cross": ("cross", "plus"),
    },
    "relation": {
        "left": ("left of", "to the left of"),
        "right": ("right of", "to the right of"),
        "above": ("above", "over"),
        "below": ("below", "under", "beneath"),
    },
    "mirror": {
        "left": ("to its left",),
        "right": ("to its right",),
        "above": ("above it",),
        "below": ("below it", "under it"),
    },
    "background": {
        name: tuple(f"{word} {noun}" for word in words for noun in ("background", "backdrop"))
        for name, words in {"white": ("white",), "black": ("black",), "gray": ("gray", "grey")}.items()
    },
    "place": {
        "left": ("on the left", "at the left"),
        "right": ("on the right", "at the right"),
        "top": ("at the top",),
        "bottom": ("at the bottom",),
        "center": ("in the center", "in the middle"),
    },
}
_FILLERS = {"a", "an", "the", "there", "is", "with", "on", "against"}
_PHRASES = {phrase: (kind, value) for kind, ways in WORDING.items() for value, all_ in ways.items() for phrase in all_}
_PHRASE = re.compile(r"\b(?:" + "|".join(sorted(_PHRASES, key=len, reverse=True)) + r")\b")  # longest first
_LETTER = dict(zip(WORDING, "schrmbp", strict=True))
_THING = "s?ch"
_FORMS = {  # kinds of phrases in their order -> is the subject the object named first?
    re.compile(f"b?{_THING}p?|b?p{_THING}|{_THING}(p?b|bp)|p{_THING}b"): True,
    re.compile(f"b?{_THING}r{_THING}|{_THING}r{_THING}b"): True,
    re.compile(f"b?r{_THING}{_THING}|r{_THING}{_THING}b"): False,  # "above a red circle is a blue square"
    re.compile(f"b?{_THING}{_THING}m|{_THING}{_THING}mb"): False,  # "a red circle with a blue square above it"
}


def parse(caption: str) -> dict[str, str]:
    """The stated facts of a caption by their names in FACTS: {"colour": "red", "shape": "circle", "place": "left"}.

    Raises ValueError, with the caption, if it does not belong to this world.
    """
    text = re.sub(r"[\s,.]+", " ", caption.lower()).strip()
    said = [_PHRASES[phrase] for phrase in _PHRASE.findall(text)]
    strange = set(_PHRASE.sub(" ", text).split()) - _FILLERS
    order = "".join(_LETTER[kind] for kind, _ in said)
    subject_first = next((first for form, first in _FORMS.items() if form.fullmatch(order)), None)
    if strange or subject_first is None:
        why = f"unknown words {sorted(strange)}" if strange else "not one object, or two and their relation"
        raise ValueError(f"caption {caption!r} is not of the shapes world ({why}); try 'a red circle above a blue box'")
    things, facts, size = [], {}, {}
    for kind, value in said:
        if kind == "size":
            size = {"size": value}
        elif kind == "colour":
            things.append({"colour": value} | size)
            size = {}
        elif kind == "shape":
            things[-1]["shape"] = value
        else:
            facts["relation" if kind == "mirror" else kind] = value
    subject, *others = things if subject_first else things[::-1]
    for other in others:
        if other["colour"] == subject["colour"]:
            raise ValueError(f"caption {caption!r} is not of the shapes world: its two objects have one colour")
        facts |= {f"other {kind}": value for kind, value in other.items()}
    return subject | facts


def tokenize(prompts: Sequence[str]) -> Int[np.ndarray, "G 9"]:
    """Captions -> int32 facts rows in the column order of FACTS, -1 for facts that are not stated; an empty one states
    none. ValueError for another text."""
    parsed = [parse(prompt) if prompt else {} for prompt in prompts]
    rows = [[FACTS[name].index(facts[name]) if name in facts else -1 for name in FACTS] for facts in parsed]
    return np.array(rows, np.int32).reshape(-1, len(FACTS))


# The shapes' areas and extents (up, down, left, right) for radius 1.
AREAS = np.array([np.pi, 1.76**2, 1.25**2 * 3**1.5 / 4, 4 * 0.74 - 0.74**2], np.float32)
REACH = np.array([[1, 1, 1, 1], [0.88] * 4, [1.25, 0.625, 1.0825, 1.0825], [1, 1, 1, 1]], np.float32)


def _distances(radius: Float[Array, "4"], centre: Float[Array, "2"], size: int) -> Float[Array, "4 size size"]:
    """Signed distance, in pixels of a picture of `size`, from each pixel's centre to the edge of each shape."""
    scale = size / SIDE
    middles = jnp.arange(size) + 0.5
    y, x = jnp.meshgrid(middles - centre[0] * scale, middles - centre[1] * scale, indexing="ij")
    circle, square, triangle, cross = radius * scale
    tall, wide = jnp.abs(y), jnp.abs(x)
    along, across = jnp.maximum(tall, wide), jnp.minimum(tall, wide)
    return jnp.stack(
        [
            jnp.hypot(y, x) - circle,
            along - 0.88 * square,
            jnp.maximum(y, 0.75**0.5 * wide - 0.5 * y) - 0.625 * triangle,
            jnp.maximum(along - cross, across - 0.37 * cross),
        ]
    )


def coverage(
    shape: Int[Array, ""], radius: Float[Array, ""], centre: Float[Array, "2"], size: int = SIDE
) -> Float[Array, "size size"]:
    """How much of each pixel one shape covers, 0 to 1; `radius` and `centre` (y, x) in pixels of a 32-pixel picture."""
    edge = _distances(jnp.full(4, radius), centre, size)
    return jnp.clip(0.5 - edge[shape], 0, 1)


class Reading(NamedTuple):
    """The content of pictures per palette colour (8, in the order of COLOURS). Indices as in FACTS; -1: unknown."""

    background: Int[Array, "B"]
    present: Bool[Array, "B 8"]  # exactly one clean shape of this colour, and nothing else of it
    shape: Int[Array, "B 8"]  # the best fitting template, also if not present
    size: Int[Array, "B 8"]
    radius: Float[Array, "B 8"]  # pixels of a 32-pixel picture
    centre: Float[Array, "B 8 2"]  # y, x
    fit: Float[Array, "B 8"]  # intersection over union with the best template, 0 to 1
    solid: Float[Array, "B 9"]  # fullest 3x3 window of each colour, and last of other paint, 0 to 1


NEAR = 0.25  # largest RGB distance of a pixel from a background, or from a blend of background and colour
CORE = 5  # least number of nearly pure pixels of a colour; with fewer, they are edges of something else
FIT = 0.78  # least intersection over union of a shape
SOLID = 0.75  # least fullness of a 3x3 window for paint to be an object and not an edge
SMALLEST, MIDDLE, LARGEST = 2.5, 4.7, 8.0  # radii: least, between small and large, largest


def _sharpen(alpha: Array) -> Array:
    """Faint paint becomes 0 and nearly full paint 1; one half stays one half, so areas do not change."""
    return jnp.clip((alpha - 0.15) / 0.7, 0, 1)


def _background(image: Float[Array, "32 32 3"]) -> tuple[Int[Array, ""], Float[Array, "3"]]:
    """The background with the most pixels near it (-1 if less than a third of all), and their mean."""
    distance = jnp.stack([jnp.linalg.norm(image - jnp.array(rgb)[None, None], axis=-1) for rgb in BACKGROUNDS.values()])
    near = distance < NEAR
    best = jnp.argmax(near.sum((1, 2)))
    weight = near[best].astype(jnp.float32)[..., None]
    mean = (image * weight).sum((0, 1)) / jnp.maximum(weight.sum(), 1)
    return jnp.where(weight.mean() > 1 / 3, best, -1), mean


def _paint(image: Float[Array, "32 32 3"], ground: Float[Array, "3"]) -> Float[Array, "9 32 32"]:
    """How much of each pixel is painted in each palette colour, and last in any other colour; 0 to 1.

    A pixel is background + alpha (colour - background), for the colour with the smallest residual. Colours without a
    core are excluded: otherwise pixels on the edge of one object would get other colours.
    """
    offset = image - ground[None, None]
    ray = jnp.array(list(COLOURS.values())) - ground[None]
    along = jnp.einsum("yxc,kc->kyx", offset, ray, precision="highest")
    alpha = jnp.clip(along / (ray**2).sum(-1)[:, None, None], 0, 1)
    rest = jnp.linalg.norm(offset[None] - alpha[..., None] * ray[:, None, None], axis=-1)
    own = jnp.arange(8)[:, None, None] == jnp.argmin(rest, 0)[None]
    real = (own & (alpha > 0.7) & (rest < NEAR)).sum((1, 2)) >= CORE
    rest = jnp.where(real[:, None, None], rest, jnp.linalg.norm(offset, axis=-1)[None])
    own = jnp.arange(8)[:, None, None] == jnp.argmin(rest, 0)[None]
    known = own & (rest < NEAR) & real[:, None, None]
    return jnp.concatenate([jnp.where(known, _sharpen(alpha), 0), (rest.min(0) >= NEAR)[None].astype(jnp.float32)])


def _soften(masks: Float[Array, "4 32 32"]) -> Float[Array, "4 32 32"]:
    """Blurred by 0.8 pixels, like a decoder's output: a blurred square fits a sharp circle better than a square."""
    wide = jnp.pad(masks, ((0, 0), (1, 1), (1, 1)))
    tall = 0.36 * wide[:, 1:-1] + 0.32 * (wide[:, 2:] + wide[:, :-2])
    return 0.36 * tall[:, :, 1:-1] + 0.32 * (tall[:, :, 2:] + tall[:, :, :-2])


def _fit(mask: Float[Array, "32 32"]) -> tuple[Int[Array, ""], Float[Array, ""], Float[Array, "2"], Float[Array, ""]]:
    """The shape that fits best: index, radius, centre and intersection over union.

    Centre of mass and area determine a template's position and size, so only the four shapes are tried. The centre is
    computed three times, the last two times near the previous one only, so that distant specks do not shift it.
    """
    middles = jnp.arange(SIDE) + 0.5
    near, centre = mask, jnp.zeros(2)
    for _ in range(3):
        moments = jnp.stack([(near.sum(1) * middles).sum(), (near.sum(0) * middles).sum()])
        centre = moments / jnp.maximum(near.sum(), 1e-6)
        away = (middles - centre[0])[:, None] ** 2 + (middles - centre[1])[None] ** 2
        near = jnp.where(away < 10**2, mask, 0)
    radius = jnp.sqrt(near.sum() / AREAS)
    crisp = jnp.clip(0.5 - _distances(radius, centre, SIDE), 0, 1)
    template = _sharpen(jnp.stack([crisp, _soften(crisp)]))
    both = jnp.minimum(template, mask[None, None]).sum((2, 3))
    either = template.sum((2, 3)) + mask.sum() - both
    fit = (both / jnp.maximum(either, 1e-6)).max(0)
    best = jnp.argmax(fit)
    return best, radius[best], centre, fit[best]


def _read_one(image: Float[Array, "32 32 3"]) -> Reading:
    background, ground = _background(image)
    paint = jnp.where(background >= 0, _paint(image, ground), jnp.ones((9, 1, 1)))  # no background: all is clutter
    shape, radius, centre, fit = jax.vmap(_fit)(paint[:8])
    present = (background >= 0) & (fit >= FIT) & (radius >= SMALLEST) & (radius <= LARGEST)
    window = jax.lax.reduce_window(paint, 0.0, jax.lax.add, (1, 3, 3), (1, 1, 1), "VALID") / 9
    size = (radius > MIDDLE).astype(jnp.int32)
    return Reading(background, present, shape, size, radius, centre, fit, window.max((1, 2)))


def read(images: Float[Array, "B H W 3"]) -> Reading:
    """The content of pictures in [0, 1]. Height and width are equal and a multiple of 32."""
    batch, height, width, _ = images.shape
    if height != width or height % SIDE:
        raise ValueError(f"pictures of {height}x{width}: the judge reads squares whose side is a multiple of {SIDE}")
    step = height // SIDE
    small = images.astype(jnp.float32).reshape(batch, SIDE, step, SIDE, step, 3).mean((2, 4))
    return jax.vmap(_read_one)(small)


class Verdict(NamedTuple):
    """Per picture: which facts (columns VERDICTS) are right, which are stated, the share that is right, all right."""

    right: Bool[Array, "B 10"]  # False if not stated
    stated: Bool[Array, "B 10"]
    share: Float[Array, "B"]
    exact: Bool[Array, "B"]


def _place(centre: Float[Array, "2"]) -> Int[Array, ""]:
    """Index into PLACES: the center is a box of 7 pixels; outside it the larger offset gives the side."""
    y, x = centre - SIDE / 2
    side = jnp.where(jnp.abs(x) >= jnp.abs(y), jnp.where(x < 0, 0, 1), jnp.where(y < 0, 2, 3))
    return jnp.where(jnp.maximum(jnp.abs(x), jnp.abs(y)) <= 3.5, 4, side)


def _judge_one(seen: Reading, facts: Int[Array, "9"]) -> Bool[Array, "10"]:
    """Which facts of one row hold in one picture's reading (no batch axis); columns not stated are undefined."""
    colour, shape, size, other, other_shape, other_size, relation, background, place = facts
    there, other_there = seen.present[colour], seen.present[other]
    y, x = seen.centre[other] - seen.centre[colour]  # how far the subject is above and to the left of the other
    beyond = jnp.stack([x, -x, y, -y])[relation] > 2
    named = (jnp.arange(9) == colour) | (jnp.arange(9) == other)
    return jnp.stack(
        [
            there,
            there & (seen.shape[colour] == shape),
            there & (seen.size[colour] == size),
            other_there,
            other_there & (seen.shape[other] == other_shape),
            other_there & (seen.size[other] == other_size),
            there & other_there & beyond,
            seen.background == background,
            there & (_place(seen.centre[colour]) == place),
            jnp.all(named | (seen.solid < SOLID)),
        ]
    )


def judge(images: Float[Array, "B H W 3"], facts: Int[Array | np.ndarray, "G 9"]) -> Verdict:
    """Check pictures in [0, 1] against captions' facts rows; image i belongs to row i // (B // G).

    The rule. The two objects of a caption always differ in colour, so the colour identifies the object. Per object: one
    clean shape of that colour is there (and nothing else of that colour), it is the stated shape, and it has the stated
    size; all three are wrong if it is absent, or if the colour forms a blob or several pieces. Relation: both are there
    and the subject's centre is more than 2 pixels (of 32) beyond the other's in the stated direction. Background: most
    of the picture has it. Place: the position of the centre (see `_place`). Always stated: nothing else is there, that
    is, no solid paint of a colour that the caption does not name. A fact that is not stated is neither right nor wrong,
    and does not count.
    """
    batch, groups = images.shape[0], facts.shape[0]
    if groups == 0 or batch % groups:
        raise ValueError(f"{batch} images for {groups} captions: every caption needs the same number of images")
    rows = jnp.repeat(jnp.asarray(facts), batch // groups, axis=0)
    stated = jnp.concatenate([rows >= 0, jnp.ones((batch, 1), bool)], 1)
    right = jax.vmap(_judge_one)(read(images), rows) & stated
    return Verdict(right, stated, right.sum(1) / stated.sum(1), jnp.all(right == stated, 1))


def _score(
    params: Mapping[str, Any], images: Float[Array, "B H W 3"], tokens: Int[Array | np.ndarray, "G 9"]
) -> Float[Array, "B"]:
    return judge(images, tokens).share


def make(path: str | None = None, dtype: Any = jnp.float32) -> tuple[Reward, dict[str, Any]]:
    """The judge as a reward: share of the caption's stated facts that are right, 0 to 1.

    It has no weights and no network, so it takes no path, and `dtype` changes nothing.
    """
    if path is not None:
        raise ValueError(f"reward shapes has no weights to load, but path is {path!r}: remove it")
    return Reward("shapes", tokenize, _score), {}


def shapes(path: str | None, dtype: Any = jnp.float32) -> tuple[Reward, dict[str, Any], Any]:
    """The reward, no weights, and one prompt's tokens as a ShapeDtypeStruct (see clipscore.shapes)."""
    return *make(path), jax.ShapeDtypeStruct((1, len(FACTS)), jnp.int32)
