"""The emoji world's judge: a reward that looks for a caption's objects in the picture by their templates.

    --config.reward=experiments.emoji.judge

Nothing here is learned. The background is the picture's median colour, and a template is compared with what differs
from it. With D = picture - background, S = alpha (template - background) and M = where alpha is, widened by 2 px,

    match = sum(D S) / sqrt(sum(D^2 M) sum(S^2)),

the normalised cross-correlation under alpha, over all positions and LEVELS sizes at once (by FFT: objects lie within
the picture, so that nothing wraps round). D and S are blurred alike first: noise and a codec's errors are mostly in
fine detail. Its maxima are the candidates. A candidate is the object if the match is at least `Limits.match`, no other
object fits better in the same place, and no other object of the caption has a better candidate there. Words are scored
by `ocr`.

README.md says which thresholds were set on train scenes, and which are guesses; accuracy is measured on scenes of
held-out compositions.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Int

from experiments.emoji import world
from experiments.emoji.world import SIDE
from solrl_jax.config import ConfigError
from solrl_jax.structs import Params, Reward

MOST = 3  # things in a caption; objects in all
FACTS = ("object 1", "number 1", "object 2", "number 2", "object 3", "number 3", "relation", "background")
VERDICTS = (*FACTS, "nothing else")

LEVELS = 8  # sizes that are tried, from the smallest to the largest drawn one, each by the same factor larger
APART = 0.85  # least distance of two candidates along an axis, in sizes; boxes of drawn objects do not overlap
BLUR = 1.0  # pixels, standard deviation; of pictures and templates alike before they are matched
FOUND = 4  # candidates of an object: one more than a caption may state
PATCH = 12  # pixels, a side, of what is in a candidate's box when it is compared with all objects
PATCH_BLUR = 0.7  # pixels of a patch, standard deviation; of patches and of all objects alike
POSES = [(1, 0, 0)] + [
    (scale, y, x)
    for scale in (0.75, 1, 1.25)
    for y, x in ((0, 0), (0, -0.12), (0, 0.12), (-0.12, 0), (0.12, 0))
    if (scale, y, x) != (1, 0, 0)
]
"""Sizes and places of these, in sizes of the candidate; the first are its own."""


class Limits(NamedTuple):
    """The thresholds."""

    match: float = 0.65  # least match of an object
    near: float = 0.16  # largest RGB distance of the background from the named colour
    other: float = 0.2  # least RGB distance of a blurred pixel from the background, to be part of something
    clutter: float = 12  # most such pixels outside what was found


LIMITS = Limits()


class Found(NamedTuple):
    """The candidates for one object, best first."""

    there: Bool[Array, "c"]  # it is the object
    match: Float[Array, "c"]
    centre: Float[Array, "c 2"]  # y, x, pixels
    size: Float[Array, "c"]  # side of the template's cell, pixels


class Verdict(NamedTuple):
    """Per picture: which facts (columns VERDICTS) are right, which are stated, the share that is right, all right."""

    right: Bool[Array, "B 9"]  # False if not stated
    stated: Bool[Array, "B 9"]
    share: Float[Array, "B"]
    exact: Bool[Array, "B"]


# --- captions -------------------------------------------------------------------------------------------------------


def row(scene: world.Scene) -> list[int]:
    """A scene in the columns of FACTS: index of the object, its number, ..., of the relation, of the background. Not
    stated: -1, and a number is 0."""
    if scene.word:
        raise ValueError(f"{world.caption(scene)!r} asks for a word: its picture is scored by the reward ocr")
    things = [(world.OBJECTS.index(name), count) for name, count in scene.things] + [(-1, 0)] * MOST
    relation = world.RELATIONS.index(scene.relation) if scene.relation else -1
    background = list(world.BACKGROUNDS).index(scene.background) if scene.background else -1
    return [value for thing in things[:MOST] for value in thing] + [relation, background]


def tokenize(prompts: Sequence[str]) -> Int[np.ndarray, "G 8"]:
    """Captions -> rows; of an empty one a row that states nothing.

    ValueError for a caption that is not of this world, or that asks for a word.
    """
    rows = [row(world.parse(prompt)) if prompt else [-1, 0] * MOST + [-1, -1] for prompt in prompts]
    return np.array(rows, np.int32).reshape(-1, len(FACTS))


# --- the picture ----------------------------------------------------------------------------------------------------


def levels() -> Float[np.ndarray, "l"]:
    """The sizes that are tried, pixels."""
    sizes = np.array(list(world.SIZES.values()))
    return np.geomspace(sizes.min(), sizes.max(), LEVELS).astype(np.float32)


def _ground(image: Float[Array, "64 64 3"]) -> Float[Array, "3"]:
    """The median colour: more than half of every picture is background."""
    return jnp.median(image.reshape(-1, 3), axis=0)


def _blurred(lines: Float[Array, "*n s w"], sd: float) -> Float[Array, "*n s w"]:
    """Weights of each pixel of a line, after a Gaussian along it; beyond its ends is background, so 0."""
    places = np.arange(lines.shape[-2])
    near = np.exp(-((places[:, None] - places[None]) ** 2) / (2 * sd**2))
    weights = jnp.asarray(near / near.sum(1).max(), jnp.float32)
    return jnp.einsum("rs,...sw->...rw", weights, lines, precision="highest")


class Kernels(NamedTuple):
    """One object at each size. Whatever depends on the background follows from these."""

    spectrum: Complex[Array, "l 64 33 5"]  # of alpha colour (3), alpha, M; centred at the first pixel's corner
    moments: Float[Array, "l 5"]


def _kernels(cell: Float[Array, "32 32 4"]) -> Kernels:
    sizes = jnp.asarray(levels())
    lines = world.resampling(jnp.full_like(sizes, SIDE / 2), sizes)
    blurred = _blurred(lines, BLUR)
    rgba = jnp.einsum("lyh,hwc,lxw->lyxc", blurred, cell, blurred, precision="highest")
    alpha = jnp.einsum("lyh,hwc,lxw->lyxc", lines, cell[..., 3:], lines, precision="highest")
    mask = jax.lax.reduce_window(alpha, 0.0, jax.lax.max, (1, 5, 5, 1), (1, 1, 1, 1), "SAME")
    both = jnp.roll(jnp.concatenate([rgba, mask], -1), (-SIDE // 2, -SIDE // 2), (1, 2))
    return Kernels(jnp.fft.rfft2(both, axes=(1, 2)), _moments(rgba, jnp.ones((SIDE, SIDE))))


def _moments(rgba: Float[Array, "*n h w 4"], mask: Float[Array, "h w"]) -> Float[Array, "*n 5"]:
    """Sums over a mask of (alpha colour)^2, alpha^2 colour (3) and alpha^2, from which `_energy` follows."""
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    fields = jnp.concatenate([(rgb**2).sum(-1, keepdims=True), rgb * alpha, alpha**2], -1)
    return jnp.einsum("...yxc,yx->...c", fields, mask, precision="highest")


def _energy(moments: Float[Array, "*n 5"], ground: Float[Array, "3"]) -> Float[Array, "*n"]:
    """sum(S^2) over the background `ground`."""
    return moments[..., 0] - 2 * moments[..., 1:4] @ ground + moments[..., 4] * (ground @ ground)


def _matches(offset: Float[Array, "64 64 3"], ground: Float[Array, "3"], kernels: Kernels) -> Float[Array, "l 64 64"]:
    """The match of an object at each size, centred at each pixel's upper left corner; -1 outside the picture."""
    maps = jnp.concatenate([offset, jnp.stack([offset @ ground, (offset**2).sum(-1)], -1)], -1)
    product = jnp.fft.rfft2(maps, axes=(0, 1))[None] * jnp.conj(kernels.spectrum)  # a correlation, by channel
    both = jnp.stack([product[..., :3].sum(-1) - product[..., 3], product[..., 4]])
    along, power = jnp.fft.irfft2(both, (SIDE, SIDE), axes=(2, 3))
    energy = _energy(kernels.moments, ground)
    match = along / jnp.sqrt(jnp.maximum(power * energy[:, None, None], 1e-4))
    half = jnp.asarray(levels())[:, None] / 2 - 1  # a box may be a pixel outside
    places = jnp.arange(SIDE)[None]
    inside = (places >= half) & (places <= SIDE - half)
    return jnp.where(inside[:, :, None] & inside[:, None, :], match, -1.0)


class Rivals(NamedTuple):
    """All objects in all of POSES, where one object is."""

    mask: Float[Array, "12 12"]  # M of this object
    moments: Float[Array, "k p 5"]  # within M


def _poses(cells: Float[Array, "k 32 32 4"]) -> Float[Array, "k p 12 12 4"]:
    """All objects in all of POSES on a patch, blurred."""
    scale, y, x = jnp.asarray(POSES, jnp.float32).T
    lines = [_blurred(world.resampling(PATCH / 2 + PATCH * at, PATCH * scale, PATCH), PATCH_BLUR) for at in (y, x)]
    return jnp.einsum("pyh,khwc,pxw->kpyxc", lines[0], cells, lines[1], precision="highest")


def _rivals(which: Int[Array, ""], poses: Float[Array, "k p 12 12 4"]) -> Rivals:
    mask = jax.lax.reduce_window(poses[which, 0, ..., 3], 0.0, jax.lax.max, (3, 3), (1, 1), "SAME")
    return Rivals(mask, _moments(poses, mask))


def _patch(
    offset: Float[Array, "64 64 3"], centre: Float[Array, "2"], size: Float[Array, ""]
) -> Float[Array, "12 12 3"]:
    """What is in a box, averaged to a patch and blurred."""
    steps = (jnp.arange(PATCH) + 0.5 - PATCH / 2) * size / PATCH
    wide = jnp.maximum(1.0, size / PATCH)

    def weights(middle: Float[Array, ""]) -> Float[Array, "12 64"]:
        near = jnp.maximum(0.0, 1 - jnp.abs((steps + middle)[:, None] - (jnp.arange(SIDE) + 0.5)[None]) / wide)
        return _blurred(near / jnp.maximum(near.sum(-1, keepdims=True), 1e-6), PATCH_BLUR)

    return jnp.einsum("hy,yxc,wx->hwc", weights(centre[0]), offset, weights(centre[1]), precision="highest")


def _is_best(
    offset: Float[Array, "12 12 3"],
    ground: Float[Array, "3"],
    which: Int[Array, ""],
    poses: Float[Array, "k p 12 12 4"],
    rivals: Rivals,
) -> Bool[Array, ""]:
    """Whether no other object in any pose has a larger cosine with a patch than the object `which` in the first one.

    Only where this object is, or next to it: if it is a part of another one, that explains as much of it, and better.
    """
    offset = offset * rivals.mask[..., None]
    maps = jnp.concatenate([offset, -(offset @ ground)[..., None]], -1)
    along = jnp.einsum("kpyxc,yxc->kp", poses, maps, precision="highest")
    cosine = along / jnp.sqrt(jnp.maximum(_energy(rivals.moments, ground), 1e-6))
    return cosine[which, 0] >= cosine.max(1).at[which].set(-jnp.inf).max()


def _find(
    offset: Float[Array, "64 64 3"],
    blurred: Float[Array, "64 64 3"],
    ground: Float[Array, "3"],
    which: Int[Array, ""],
    kernels: Kernels,
    poses: Float[Array, "k p 12 12 4"],
    rivals: Rivals,
    least: float | Array,
) -> Found:
    """The candidates for one object in a picture: maxima of the match, none closer than APART to a better one."""
    match = _matches(blurred, ground, kernels)
    best, level = match.max(0), jnp.asarray(levels())[match.argmax(0)]
    places = jnp.arange(SIDE)

    def next_best(best: Array, _: None) -> tuple[Array, tuple[Array, Array, Array]]:
        y, x = jnp.unravel_index(jnp.argmax(best), best.shape)
        size = level[y, x]
        near = jnp.maximum(jnp.abs(places - y)[:, None], jnp.abs(places - x)[None]) < APART * size
        return jnp.where(near, -1.0, best), (best[y, x], jnp.stack([y, x]).astype(jnp.float32), size)

    _, (score, centre, size) = jax.lax.scan(next_best, best, None, length=FOUND)
    patches = jax.vmap(_patch, (None, 0, 0))(offset, centre, size)
    own = jax.vmap(_is_best, (0, None, None, None, None))(patches, ground, which, poses, rivals)
    return Found((score >= least) & own, score, centre, size)


# --- the verdict ----------------------------------------------------------------------------------------------------


def _judge_one(
    image: Float[Array, "64 64 3"],
    facts: Int[Array, "8"],
    kernels: Kernels,
    poses: Float[Array, "k p 12 12 4"],
    rivals: Rivals,
    limits: Limits,
) -> Bool[Array, "9"]:
    """Which facts of one row hold in one picture; columns that are not stated are undefined."""
    objects, numbers, relation, background = facts[:6:2], facts[1:6:2], facts[6], facts[7]
    ground = _ground(image)
    offset = image - ground[None, None]
    lines = _blurred(jnp.eye(SIDE), BLUR)
    blurred = jnp.einsum("ry,yxc,sx->rsc", lines, offset, lines, precision="highest")
    found = jax.vmap(_find, (None, None, None, 0, 0, None, 0, None))(
        offset, blurred, ground, objects, kernels, poses, rivals, limits.match
    )
    there = _best_in_place(found, found.there & (objects >= 0)[:, None])
    count = there.sum(1)
    middle = (found.centre * there[..., None]).sum(1) / jnp.maximum(count, 1)[:, None]
    y, x = middle[1] - middle[0]
    along = jnp.stack([x, -x, y, -y])[relation]
    across = jnp.where(relation < 2, jnp.abs(y), jnp.abs(x))
    colour = jnp.array(list(world.BACKGROUNDS.values()))[background]
    right = [*jnp.stack([count > 0, count == numbers], 1).reshape(-1)]
    right += [(count[0] > 0) & (count[1] > 0) & (along > across), jnp.linalg.norm(ground - colour) < limits.near]
    return jnp.stack([*right, _other(blurred, found, there, limits.other) <= limits.clutter])


def _best_in_place(found: Found, there: Bool[Array, "t c"]) -> Bool[Array, "t c"]:
    """Those with no better candidate in the same place: an object is also a poor match of others in the caption."""
    match, size, seen = (x.reshape(-1) for x in (found.match, found.size, there))
    centre = found.centre.reshape(-1, 2)
    apart = jnp.abs(centre[:, None] - centre[None]).max(-1)
    near = apart < APART * (size[:, None] + size[None]) / 2
    better = near & (match[None] > match[:, None]) & seen[None]
    return there & ~better.any(1).reshape(there.shape)


def _other(
    blurred: Float[Array, "64 64 3"], found: Found, there: Bool[Array, "t c"], least: float | Array
) -> Int[Array, ""]:
    """How many pixels show something outside the boxes of what was found."""
    middles = jnp.arange(SIDE) + 0.5
    reach = found.size / 2 + 2
    y, x = (jnp.abs(middles[None, None] - found.centre[..., axis, None]) <= reach[..., None] for axis in (0, 1))
    boxes = y[..., :, None] & x[..., None, :] & there[..., None, None]
    return ((jnp.linalg.norm(blurred, axis=-1) > least) & ~boxes.any((0, 1))).sum()


def judge(
    images: Float[Array, "B 64 64 3"],
    facts: Int[Array | np.ndarray, "G 8"],
    cells: Float[Array | np.ndarray, "k 32 32 4"],
    limits: Limits = LIMITS,
) -> Verdict:
    """Check pictures in [0, 1] against captions' rows; image i belongs to row i // (B // G).

    `cells` are `objects(style)`. Takes about 4 MB of memory per picture, and as much per caption.

    Per thing, two facts: one of it at least is there, and as many as stated. Relation: the mean place of the first is
    beyond that of the second in the stated direction, by more than it is aside. Background: the named colour. Always
    stated: nothing else is there. A fact that is not stated does not count.
    """
    batch, groups = images.shape[0], facts.shape[0]
    if groups == 0 or batch % groups:
        raise ValueError(f"{batch} images for {groups} captions: every caption needs the same number of images")
    if images.shape[1:] != (SIDE, SIDE, 3):
        raise ValueError(f"pictures of {images.shape[1:]}: the emoji world's judge reads {SIDE}x{SIDE}x3")
    facts, cells = jnp.asarray(facts), jnp.asarray(cells)
    poses = _poses(cells)
    grouped = images.astype(jnp.float32).reshape(groups, -1, SIDE, SIDE, 3)

    def group(images: Array, facts: Array) -> Bool[Array, "n 9"]:
        """The pictures of one caption; what depends on its objects alone is made once."""
        kernels = jax.vmap(_kernels)(cells[facts[:6:2]])
        rivals = jax.vmap(_rivals, (0, None))(facts[:6:2], poses)
        one = functools.partial(_judge_one, facts=facts, kernels=kernels, poses=poses, rivals=rivals, limits=limits)
        return jax.vmap(one)(images)

    right = jax.vmap(group)(grouped, facts).reshape(batch, -1)
    rows = jnp.repeat(facts, batch // groups, axis=0)
    objects = jnp.repeat(rows[:, :6:2] >= 0, 2, axis=1)
    stated = jnp.concatenate([objects, rows[:, 6:] >= 0, jnp.ones((batch, 1), bool)], 1)
    right &= stated
    return Verdict(right, stated, right.sum(1) / stated.sum(1), jnp.all(right == stated, 1))


def _score(params: Mapping[str, Any], images: Array, tokens: Array) -> Float[Array, "B"]:
    return judge(images, tokens, params["cells"]).share


@functools.cache
def objects(style: str = "fluent") -> Float[np.ndarray, "k 32 32 4"]:
    """The objects' templates, without those of letters."""
    return world.templates(style)[: len(world.OBJECTS)]


def make(path: str | None = None, dtype: Any = jnp.float32) -> tuple[Reward, Params]:
    """The judge as a reward: share of the caption's facts that are right, 0 to 1.

    It has templates but no weights, so it takes no path, and `dtype` changes nothing. ConfigError for a path.
    """
    if path is not None:
        raise ConfigError(f"reward {world.JUDGE} reads no path ({path!r}): remove it from reward_paths")
    return Reward(world.JUDGE, tokenize, _score), {"cells": jnp.asarray(objects())}
