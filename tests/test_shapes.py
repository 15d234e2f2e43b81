"""The judge against drawn truth: what it must accept, what it must refuse, and what captions it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tiny import world
from solrl_jax.rewards import shapes

judge, draw = jax.jit(shapes.judge), jax.jit(world.draw, static_argnums=1)
FEW = 8  # small batches are filled up to this many, so that the judge is compiled only a few times


@pytest.fixture(scope="module")
def drawn():
    """2000 test scenes, their pictures and the facts rows of their captions."""
    rng = np.random.default_rng(7)
    scenes = world.sample_scenes(rng, 2000, "test")
    return scenes, draw(scenes, 32), shapes.tokenize(world.captions(scenes, rng))


def judge_many(images, facts, chunk=250):
    """The verdict on one picture a row, in chunks: all at once the templates would fill a gigabyte."""
    parts = [judge(images[i : i + chunk], facts[i : i + chunk]) for i in range(0, len(images), chunk)]
    return shapes.Verdict(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def judge_few(images, facts):
    """The verdict on a few pictures, all with one row or each with its own."""
    images = jnp.asarray(images)
    filled = jnp.concatenate([images, jnp.ones((FEW - len(images), 32, 32, 3))])
    rows = np.resize(facts, (FEW, 9))
    return shapes.Verdict(*(field[: len(images)] for field in judge(filled, rows)))


def blurred(images, sigma=0.8):
    weights = np.exp(-(np.arange(-3, 4) ** 2) / 2 / sigma**2)
    weights /= weights.sum()
    for axis in (1, 2):
        images = sum(float(w) * jnp.roll(images, shift, axis) for shift, w in zip(range(-3, 4), weights, strict=True))
    return images


def painted(*spots, colour="red"):
    """A white picture with discs of one colour: (y, x, radius in pixels) each."""
    y, x = np.meshgrid(np.arange(32) + 0.5, np.arange(32) + 0.5, indexing="ij")
    mask = np.max([np.clip(r + 0.5 - np.hypot(y - cy, x - cx), 0, 1) for cy, cx, r in spots], 0)[..., None]
    return jnp.asarray(1 - mask * (1 - np.array(shapes.COLOURS[colour])), jnp.float32)


def test_drawn_pictures_are_exact(drawn):
    _, images, facts = drawn
    verdict = judge_many(images, facts)
    assert verdict.exact.mean() >= 0.999  # measured: 1.0
    np.testing.assert_allclose(verdict.share, (verdict.right.sum(1) / verdict.stated.sum(1)), rtol=1e-6)
    np.testing.assert_array_equal(verdict.stated[:, :9], facts >= 0)


def test_reading_gives_the_drawn_geometry_at_any_size(drawn):
    scenes = world.Scenes(*(field[:200] for field in drawn[0]))
    reading = jax.jit(shapes.read)(draw(scenes, 64))
    rows, (colour, shape, size) = np.arange(200), scenes.attributes[:, :3].T
    assert np.abs(reading.centre[rows, colour] - scenes.centre[:, 0]).max() < 0.25
    assert np.abs(reading.radius[rows, colour] - scenes.radius[:, 0]).max() < 0.25
    np.testing.assert_array_equal(reading.shape[rows, colour], shape)
    np.testing.assert_array_equal(reading.size[rows, colour], size)
    np.testing.assert_array_equal(reading.background, scenes.attributes[:, 7])
    np.testing.assert_array_equal(reading.present.sum(1), 1 + (scenes.attributes[:, 3] >= 0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil",
    [
        blurred,
        lambda x: jnp.clip(x + 0.03 * jax.random.normal(jax.random.key(0), x.shape), 0, 1),
        lambda x: jnp.round(x * 255) / 255,
        lambda x: 0.04 + 0.92 * x,  # a decoder that does not reach black and white
    ],
    ids=["blur", "noise", "8bit", "pale"],
)
def test_slightly_spoilt_pictures_stay_exact(drawn, spoil):
    images, facts = drawn[1][:1000], drawn[2][:1000]
    assert judge_many(spoil(images), facts).exact.mean() >= 0.97  # measured: above 0.999 each


def test_mutated_fact_is_wrong_and_the_others_right():
    rng = np.random.default_rng(3)
    scenes = world.sample_scenes(rng, 2000, "train")
    other, changed = world.mutate(scenes, rng)
    verdict = judge_many(draw(other, 32), world.facts(scenes))
    rows = np.arange(2000)
    assert verdict.right[rows, changed].mean() <= 0.001  # measured: 0
    assert verdict.exact.mean() == 0
    kept = np.isin(changed, [1, 2, 4, 5, 6, 7, 8])  # a changed colour takes its object's other facts with it
    assert (verdict.right.sum(1) == verdict.stated.sum(1) - 1)[kept].mean() >= 0.999


def test_blank_and_noise_have_no_objects():
    facts = shapes.tokenize(["a small red circle left of a blue cross", "a green square at the top"])
    noise = jax.random.uniform(jax.random.key(0), (4, 32, 32, 3))
    blank = jnp.ones_like(noise)
    for images in (blank, 0 * blank, 0.5 * blank, 0.75 * blank, jnp.nan * blank, noise):
        verdict = judge_few(images, facts)
        assert not verdict.right[:, [*range(7), 8]].any() and not verdict.exact.any()
    assert not judge_few(noise, facts).right.any()  # noise is neither a background nor "nothing else"


def test_blobs_are_no_shape():
    facts = shapes.tokenize(["a red circle"])
    smear = np.exp(-np.sum((np.indices((32, 32)) + 0.5 - 16) ** 2, 0) / 2 / 4**2)[..., None]
    bad = {
        "two circles": painted((16, 8, 3.5), (16, 24, 3.5)),
        "touching circles": painted((16, 12.5, 3.5), (16, 19.5, 3.5)),
        "merged circles": painted((16, 13.5, 3.5), (16, 18.5, 3.5)),
        "large and small merged": painted((16, 12, 6), (16, 20, 4)),
        "streak": painted(*((16, x, 3.5) for x in range(10, 22))),
        "speck": painted((16, 16, 2)),
        "far too large": painted((16, 16, 9)),
        "smear": jnp.asarray(1 - smear * (1 - np.array(shapes.COLOURS["red"])), jnp.float32),
    }
    seen = judge_few(jnp.stack([*bad.values()]), facts).right[:, 0]
    assert not seen.any(), [name for name, there in zip(bad, seen, strict=True) if there]
    assert judge_few(painted((16, 16, 3.5))[None], facts).exact.all()


def test_further_things_are_seen():
    red, facts = painted((16, 8, 4)), shapes.tokenize(["a red circle"])
    brown = red.at[10:15, 20:25].set(jnp.array([0.45, 0.3, 0.15]))
    further = [jnp.minimum(red, painted((16, 24, 4), colour="blue")), brown]
    verdict = judge_few(jnp.stack(further), facts)
    np.testing.assert_array_equal(verdict.right[:, [0, 1, 9]], [[True, True, False]] * 2)
    np.testing.assert_allclose(verdict.share, 2 / 3, rtol=1e-6)


def test_order_of_the_batch_does_not_matter(drawn):
    _, images, facts = drawn
    order = np.random.default_rng(0).permutation(250)
    straight, mixed = judge(images[:250], facts[:250]), judge(images[order], facts[order])
    for a, b in zip(straight, mixed, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[order], b)


def test_images_belong_to_captions_in_groups(drawn):
    _, images, facts = drawn
    grouped, spread = judge(images[:FEW], facts[:2]), judge_few(images[:FEW], np.repeat(facts[:2], FEW // 2, 0))
    np.testing.assert_array_equal(grouped.right, spread.right)
    with pytest.raises(ValueError, match="same number"):
        shapes.judge(images[:10], facts[:3])
    with pytest.raises(ValueError, match="multiple of 32"):
        shapes.read(jnp.zeros((1, 48, 48, 3)))


def test_reward_contract(drawn):
    _, images, facts = drawn
    reward, params = shapes.make()
    assert reward.name == "shapes" and params == {}
    share = jax.jit(reward.score)(params, images[:FEW], facts[:2])
    assert share.shape == (FEW,) and share.dtype == jnp.float32
    np.testing.assert_array_equal(share, judge(images[:FEW], facts[:2]).share)
    hash(reward)
    with pytest.raises(ValueError, match="no weights"):
        shapes.make("somewhere")


def test_captions_are_parsed():
    assert shapes.parse("A big violet disc, on the left.") == {
        "colour": "purple",
        "shape": "circle",
        "size": "large",
        "place": "left",
    }
    two = {"colour": "red", "shape": "square", "other colour": "blue", "other shape": "cross", "relation": "above"}
    for caption in (
        "a red square above a blue cross",
        "there is a red box over the blue plus",
        "above a blue cross is a red square",
        "a blue cross with a red square above it",
    ):
        assert shapes.parse(caption) == two
    grounded = two | {"background": "gray", "other size": "small"}
    assert shapes.parse("on a grey backdrop a red square is above a tiny blue plus") == grounded
    row = [list(shapes.COLOURS).index("red"), 1, -1, list(shapes.COLOURS).index("blue"), 3, -1, 2, -1, -1]
    np.testing.assert_array_equal(shapes.tokenize(["a red square above a blue cross"]), [row])
    assert shapes.tokenize([]).shape == (0, 9)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "red",
        "a brown circle",
        "a red circle and a blue square",
        "a red circle above a red square",
        "a red circle left of a blue square at the top",
        "on a white background a red circle on a black background",
    ],
)
def test_strange_captions_are_named(caption):
    with pytest.raises(ValueError, match=f"caption '{caption}' is not of the shapes world"):
        shapes.parse(caption)
