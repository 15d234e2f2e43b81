"""The drawing program: true captions, valid layouts, clean splits."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tiny import world
from solrl_jax.rewards import shapes

PROMPTS = Path(world.__file__).parent / "prompts"


@pytest.fixture(scope="module", params=world.SPLITS)
def told(request):
    """3000 scenes of one split with their captions."""
    rng = np.random.default_rng(11)
    scenes = world.sample_scenes(rng, 3000, request.param)
    return request.param, scenes, world.captions(scenes, rng)


def held_out(rows):
    pairs = [(list(shapes.COLOURS).index(colour), shapes.SHAPES.index(shape)) for colour, shape in world.HELD_OUT]
    return np.array([(c, s) in pairs or (d, t) in pairs for c, s, _, d, t in rows[:, :5]])


def test_captions_tell_the_stated_facts(told):
    _, scenes, captions = told
    rows = shapes.tokenize(captions)
    np.testing.assert_array_equal(rows, world.facts(scenes))
    assert ((rows == scenes.attributes) | (rows < 0)).all()
    assert max(len(caption.split()) for caption in captions) <= world.MAX_WORDS
    assert all(caption == caption.lower() for caption in captions)
    assert len({word for caption in captions for word in caption.split()}) <= 60


def test_splits_keep_to_themselves(told):
    split, scenes, captions = told
    rows = world.facts(scenes)
    assert (world.split_of(rows) == split).all()
    assert held_out(rows).all() if split == "compositional" else not held_out(rows).any()
    assert 0.5 < (rows[:, 3] >= 0).mean() < 0.8
    rng = np.random.default_rng(12)
    for other in set(world.SPLITS) - {split}:
        assert not set(captions) & set(world.captions(world.sample_scenes(rng, 3000, other), rng))


def test_a_relation_and_its_converse_share_a_split():
    words = [("left of", "right of"), ("above", "below")]
    objects = [f"a {colour} {shape}" for colour in shapes.COLOURS for shape in shapes.SHAPES]
    pairs = [(a, b) for a in objects for b in objects if a.split()[1] != b.split()[1]]
    for one, converse in words:
        there = world.split_of(shapes.tokenize([f"{a} {one} {b}" for a, b in pairs]))
        back = world.split_of(shapes.tokenize([f"{b} {converse} {a}" for a, b in pairs]))
        np.testing.assert_array_equal(there, back)


def test_every_colour_and_shape_is_in_training():
    rows = world.facts(world.sample_scenes(np.random.default_rng(0), 4000, "train"))
    assert len({tuple(row) for row in rows[:, :2]}) == 32 - len(world.HELD_OUT)


def check_layout(scenes):
    reach = shapes.REACH[scenes.attributes[:, [1, 4]]] * scenes.radius[..., None]
    two = scenes.attributes[:, 3] >= 0
    low = scenes.centre - reach[..., 0::2]  # of each object's box, (y, x)
    high = scenes.centre + reach[..., 1::2]
    there = np.stack([np.ones_like(two), two], 1)
    assert low[there].min() >= world.MARGIN - 1e-4 and high[there].max() <= 32 - world.MARGIN + 1e-4
    gap = np.maximum(low[:, 0] - high[:, 1], low[:, 1] - high[:, 0]).max(1)[two]
    assert gap.min() >= world.GAP - 1e-4
    away = (scenes.centre[:, 1] - scenes.centre[:, 0])[two]  # y, x
    along = np.stack([away[:, 1], -away[:, 1], away[:, 0], -away[:, 0]], 1)
    relation = scenes.attributes[two, 6]
    stated = along[np.arange(len(along)), relation]
    aside = np.abs(away)[np.arange(len(away)), np.where(relation < 2, 0, 1)]
    assert stated.min() >= 4 and (stated - aside).min() >= 2 - 1e-4
    assert (scenes.attributes[two, 0] != scenes.attributes[two, 3]).all()
    ranges = np.array(list(shapes.RADII.values()))[scenes.attributes[:, [2, 5]]]
    assert (scenes.radius >= ranges[..., 0] - 1e-5)[there].all()
    assert (scenes.radius <= ranges[..., 1] + 1e-5)[there].all()


def test_layouts_are_valid(told):
    check_layout(told[1])


def test_mutations_change_one_stated_attribute(told):
    split, scenes, _ = told
    other, changed = world.mutate(scenes, np.random.default_rng(5))
    check_layout(other)
    rows = np.arange(len(changed))
    assert (scenes.attributes != other.attributes).sum(1).tolist() == [1] * len(rows)
    assert (scenes.attributes != other.attributes)[rows, changed].all() and scenes.stated[rows, changed].all()
    assert set(changed) == set(range(len(shapes.FACTS)))
    if split == "train":
        assert (world.split_of(world.facts(other)) == "train").all()


def test_sampling_is_a_function_of_the_seed():
    one, two = (world.sample_scenes(np.random.default_rng(3), 50, "test") for _ in range(2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="compositional"):
        world.sample_scenes(np.random.default_rng(3), 1, "validation")


@pytest.mark.parametrize("size", [32, 64])
def test_coverage_adds_up_to_the_area(size):
    shape = jnp.repeat(jnp.arange(4), 3)
    centre = jnp.tile(jnp.array([[16.0, 16.0], [16.3, 15.7], [15.5, 16.5]]), (4, 1))
    cover = jax.jit(jax.vmap(lambda s, c: shapes.coverage(s, jnp.array(5.8), c, size)))
    areas = cover(shape, centre).sum((1, 2)) * (32 / size) ** 2
    np.testing.assert_allclose(areas, shapes.AREAS[shape] * 5.8**2, rtol=0.02)


def test_pictures_are_in_range_and_the_same_at_any_size():
    scenes = world.sample_scenes(np.random.default_rng(0), 64)
    small, large = (jax.jit(world.draw, static_argnums=1)(scenes, size) for size in (32, 64))
    for images, size in ((small, 32), (large, 64)):
        assert images.shape == (64, size, size, 3) and images.dtype == jnp.float32
        assert images.min() >= 0 and images.max() <= 1
    assert jnp.abs(large.reshape(64, 32, 2, 32, 2, 3).mean((2, 4)) - small).mean() < 0.005


def test_prompt_files_keep_to_their_splits(tmp_path):
    """The committed files, and freshly written ones, which are the same unless numpy changes its random streams."""
    world.write_prompts(tmp_path)
    for folder in (PROMPTS, tmp_path):
        for split, count in zip(world.SPLITS, (2000, 500, 500), strict=True):
            lines = (folder / f"{split}.txt").read_text().splitlines()
            assert len(lines) == len(set(lines)) == count
            assert (world.split_of(shapes.tokenize(lines)) == split).all()
