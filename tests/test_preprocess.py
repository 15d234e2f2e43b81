"""What the rewards look at, against Pillow (to the last bit) and torch's own antialiased resizes."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from solrl_jax.rewards import preprocess
from tests import card

SIZE = 224


def picture(kind, height, width):
    """uint8 [height, width, 3]: noise; something like a photograph, smooth with edges and grain; or a checkerboard."""
    rng = np.random.default_rng(0)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    y, x = np.mgrid[:height, :width]
    if kind == "checkerboard":
        return np.repeat(255 * ((y // 16 + x // 16) % 2)[..., None], 3, axis=2).astype(np.uint8)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    scene = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float)
    scene[(x - width / 3) ** 2 + (y - height / 2) ** 2 < (height / 5) ** 2] = (250, 240, 20)
    return np.clip(scene + rng.normal(0, 4, scene.shape), 0, 255).astype(np.uint8)


def pillow(image, size=SIZE, *, floor=True):
    """The reference's way: Pillow's resize of the short edge, then the middle."""
    height, width = image.shape[:2]
    short = min(height, width)
    height, width = (size if n == short else int(size * n / short) for n in (height, width))
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    top, left = ((n - size) // 2 if floor else round((n - size) / 2) for n in (height, width))
    return np.asarray(resized)[top : top + size, left : left + size]


resize = jax.jit(preprocess.pil_bicubic, static_argnums=1, static_argnames="floor")


def floats(*images):
    return np.stack(images).astype(np.float32) / 255


WIDE = [(256, 256), (512, 512), (1024, 1024), (301, 513), (768, 1024), (224, 224), (224, 320), (100, 150), (300, 900)]
TALL = [
    (1024, 513),
    (1024, 512),
    (1025, 512),
    (1027, 512),
    (1100, 256),
    (1000, 225),
    (900, 224),
    (700, 100),
    (448, 223),
]


@pytest.mark.parametrize("shape", WIDE + TALL)
def test_pillow_to_the_last_bit(shape):
    """No pixel of noise, photograph and checkerboard differs."""
    images = [picture(kind, *shape) for kind in ("noise", "photo", "checkerboard")]
    ours = np.asarray(resize(floats(*images), SIZE)) * 255
    levels = np.round(ours).astype(np.uint8)
    assert np.max(np.abs(ours - levels)) < 1e-4
    assert [int(np.sum(a != pillow(b))) for a, b in zip(levels, images, strict=True)] == [0, 0, 0]


def passes(image, after, axes):
    """uint8 [h, w] by pil_weights in whole numbers, one axis and then the other; an axis that stays has no pass."""
    for axis in axes:
        if image.shape[axis] != after[axis]:
            weights = preprocess.pil_weights(image.shape[axis], after[axis])
            total = np.moveaxis(np.tensordot(weights, image.astype(np.int64), (1, axis)), 0, axis)
            image = np.clip((total + 2**21) >> 22, 0, 255)
    return image.astype(np.uint8)


@pytest.mark.slow
def test_the_order_of_the_passes_is_the_installed_pillows():
    """400 resizes, up and down, from 1 x 1 to 200 x 200, each edge by itself; half of them at the rule's boundary."""
    rng, seen = np.random.default_rng(0), {True: 0, False: 0}
    for i in range(400):
        height, width, *after = np.exp(rng.uniform(0, np.log(200), 4)).astype(int).tolist()
        if i % 2 and width > after[1]:  # the height loses twice what the width does, or a pixel more or less
            height = after[0] + 2 * (width - after[1]) + int(rng.integers(-1, 3))
        image = np.where(rng.random((height, width)) < 0.3, 255, rng.integers(0, 256, (height, width))).astype(np.uint8)
        theirs = np.asarray(Image.fromarray(image).resize(after[::-1], Image.Resampling.BICUBIC))
        vertical = preprocess.vertical_first((height, width), tuple(after))
        ours, other = (passes(image, after, axes) for axes in ((0, 1), (1, 0))[:: 1 if vertical else -1])
        assert np.array_equal(ours, theirs) or not np.array_equal(other, theirs), (
            f"Pillow {PIL.__version__} resizes {height} x {width} to {after} in another order of passes than Pillow "
            "13.0, whose order preprocess.vertical_first has: install what requirements.txt asks for (pillow>=13.0); "
            "if that is a newer one, its order is what vertical_first must follow"
        )
        assert np.array_equal(ours, theirs), (height, width, after)
        seen[vertical] += not np.array_equal(ours, other)
    assert min(seen.values()) > 60, seen  # resizes of either order that tell the two apart


def test_large_pictures_take_three_digits():
    """Sums of 37 products of 11-bit digits and levels may pass 2**24."""
    assert [len(preprocess.pil_digits(n, SIZE)[0]) for n in (256, 1024, 2048)] == [2, 2, 3]
    image = picture("noise", 2048, 2048)
    assert np.array_equal(np.round(np.asarray(resize(floats(image), SIZE))[0] * 255), pillow(image))


@pytest.mark.parametrize(("before", "after"), [(256, 224), (1024, 224), (4000, 224), (100, 224), (37, 5)])
def test_digits_are_the_weights_and_small_enough(before, after):
    weights = preprocess.pil_weights(before, after)
    digits, bits = preprocess.pil_digits(before, after)
    assert np.array_equal(sum(x.astype(np.int64) << (bits * i) for i, x in enumerate(digits)), weights)
    assert np.max(np.sum(np.abs(digits), axis=2)) * 255 < 2**24
    assert np.max(np.sum(np.abs(weights), axis=1)) * 255 + 2**21 < 2**31
    np.testing.assert_allclose(np.sum(weights, axis=1), 2**22, atol=before)


def test_levels_round_half_to_even_and_clip():
    levels = np.array([-0.2, 0.5, 1.5, 2.5, 254.5, 300], np.float32)
    image = np.broadcast_to((levels / 255)[:, None, None, None], (6, 8, 8, 3))
    assert np.round(np.asarray(resize(image, 8))[:, 0, 0, 0] * 255).tolist() == [0, 0, 2, 2, 254, 255]
    half = resize(jnp.asarray(image, jnp.bfloat16), 8)
    assert half.dtype == jnp.float32


def test_the_middle_of_either_reference():
    """224 x 227 pictures: the middle begins at 1 in transformers, at 2 in torchvision."""
    image = picture("noise", 224, 227)
    assert np.array_equal(np.round(np.asarray(resize(floats(image), SIZE))[0] * 255), image[:, 1:225])
    assert np.array_equal(np.round(np.asarray(resize(floats(image), SIZE, floor=False))[0] * 255), image[:, 2:226])
    for shape in ((301, 513), (1101, 300)):
        image = picture("photo", *shape)
        ours = np.round(np.asarray(resize(floats(image), SIZE, floor=False))[0] * 255)
        assert np.array_equal(ours, pillow(image, floor=False))


def both(images):
    """What PickScore and ImageReward make of the same pictures."""
    pick = preprocess.standardise(preprocess.pil_bicubic(images, SIZE), (0.5,) * 3, (0.5,) * 3)
    return pick, preprocess.standardise(preprocess.pil_bicubic(images, SIZE, floor=False), (0.1,) * 3, (0.2,) * 3)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts a CPU's products; the next test counts a GPU's")
@pytest.mark.parametrize("width", [512, 513])
def test_two_rewards_that_want_the_same_pixels_share_one_resize(width):
    """Two products, one a pass; four were it computed twice. Also where the middles differ."""
    lowered = jax.jit(both).lower(jax.ShapeDtypeStruct((2, 512, width, 3), jnp.float32))
    assert lowered.as_text().count("dot_general") == 4
    assert lowered.compile().as_text().count(" dot(") == 2


def test_one_exact_resize_on_an_h100():
    """TF32 products are not exact, and a GPU would take them."""
    images = jax.ShapeDtypeStruct((2, 512, 512, 3), jnp.float32)
    text = card.compiled(both, images, on=card.mesh()).as_text()
    made = [line for line in text.splitlines() if "__cublas" in line]
    assert len(made) == 2
    assert all('"operand_precision":["HIGHEST","HIGHEST"]' in line for line in made)


@pytest.mark.parametrize(
    "shape", [(512, 512), (1024, 1024), (512, 301), (301, 512), (224, 224), (150, 100), (900, 256)]
)
def test_hpsv2_pixels(shape):
    """torch's bicubic of the long edge, with its overshoot, in the middle of black."""
    images = floats(picture("noise", *shape), picture("checkerboard", *shape))
    ours = np.asarray(jax.jit(preprocess.resize_pad, static_argnums=1)(images, SIZE))
    scale = SIZE / max(shape)
    inner = [round(n * scale) for n in shape]
    x = torch.tensor(images).permute(0, 3, 1, 2)
    if scale != 1:
        x = torch.nn.functional.interpolate(x, inner, mode="bicubic", antialias=True)
    theirs = np.zeros((2, SIZE, SIZE, 3), np.float32)
    top, left = ((SIZE - n) // 2 for n in inner)
    theirs[:, top : top + inner[0], left : left + inner[1]] = x.permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours, theirs, atol=2e-6 if shape[0] == shape[1] else 1e-5)
    assert scale == 1 or (ours.min() < -0.02 and ours.max() > 1.02)


@pytest.mark.parametrize("shape", [(1, 1000), (449, 1)])
def test_a_picture_of_which_nothing_is_left(shape):
    """It was a black square with a score."""
    with pytest.raises(ValueError, match="the short edge is 0 pixels if the long one has 224: cut the picture"):
        preprocess.resize_pad(jnp.ones((1, *shape, 3)), SIZE)
    assert preprocess.resize_pad(jnp.ones((1, 1, 447, 3)), SIZE).sum() > 0


@pytest.mark.parametrize("shape", [(512, 512), (301, 512), (900, 256), (60, 224)])
def test_clipscore_pixels(shape):
    images = floats(picture("noise", *shape), picture("checkerboard", *shape))
    ours = np.asarray(jax.jit(preprocess.resize_crop, static_argnums=(1, 2))(images, SIZE, "linear"))
    short = min(shape)
    height, width = (SIZE if n == short else int(SIZE * n / short) for n in shape)
    x = torch.nn.functional.interpolate(
        torch.tensor(images).permute(0, 3, 1, 2), (height, width), mode="bilinear", antialias=True
    )
    top, left = round((height - SIZE) / 2), round((width - SIZE) / 2)
    theirs = x[:, :, top : top + SIZE, left : left + SIZE].permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours, theirs, atol=2e-6 if shape[0] == shape[1] else 1e-5)  # positions in f32
