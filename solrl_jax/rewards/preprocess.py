"""Pictures [0, 1] -> inputs of the reward networks, inside jit.

Each reference resizes differently, and group advantages divide by a small spread, so each way is reproduced: linear or
cubic in floats, or Pillow's bytes, rounded after each of two passes.
"""

import dataclasses
import functools
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int64

from solrl_jax import weights
from solrl_jax.structs import Images
from solrl_jax.weights.options import Options

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def standardise(images: Images, mean: tuple[float, ...], std: tuple[float, ...]) -> Images:
    """(x - mean) / std by channel."""
    centred = images - jnp.asarray(mean, jnp.float32).reshape(1, 1, 1, 3)
    return centred / jnp.asarray(std, jnp.float32).reshape(1, 1, 1, 3)


NAME, NESTED = "preprocessor_config.json", "processor_config.json"


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """preprocessor_config.json of a CLIP; the defaults are OpenAI's, which all known CLIPs use."""

    image_mean: tuple[float, ...] = OPENAI_MEAN
    image_std: tuple[float, ...] = OPENAI_STD

    options: ClassVar[Options] = Options(
        "diffusers",
        only={
            "resample": (3,),  # bicubic; CLIPScore resizes bilinearly: like its reference, it ignores this
            "rescale_factor": (1 / 255,),
            **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), (True,)),
            "use_square_size": (False,),
        },
        idle=(
            *("size", "crop_size"),  # read_mean_std
            *("do_convert_rgb", "feature_extractor_type", "image_processor_type", "processor_class"),
        ),
    )

    def __post_init__(self):
        if bad := {n: x for n, x in vars(self).items() if len(x) != 3}:
            raise ValueError(f"{bad}: give one number for each of three channels")


def read_mean_std(folder: str | Path, size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """From the folder's files if they have them; the sizes there must equal the vision tower's `size`.

    transformers 5 writes the content of preprocessor_config.json as "image_processor" of processor_config.json, and
    reads that first.
    """
    file, values = Path(folder) / NESTED, None
    if file.is_file():
        values = weights.read_json(file).get("image_processor")
    if values is None:
        file = Path(folder) / NAME
        if not file.is_file():
            return OPENAI_MEAN, OPENAI_STD
        values = weights.read_json(file)
    if not isinstance(values, dict):
        raise weights.WeightsError(f"{file}: image_processor is {values!r}, not an object: download it again")
    for key, sides in (("size", ("shortest_edge",)), ("crop_size", ("height", "width"))):
        found = values.get(key, 224)  # transformers' default
        if found != size and found != dict.fromkeys(sides, size):
            raise weights.WeightsError(f"{file}: {key} is {found!r}: the model's config says image_size {size}")
    found = weights.from_config(Preprocessing, folder, values, file.name)
    return tuple(map(float, found.image_mean)), tuple(map(float, found.image_std))


# ---- floats: like torchvision's antialiased resizes of tensors, which jax.image.resize matches to 1e-6


def resize_crop(images: Images, size: int, method: str) -> Float[Array, "B {size} {size} 3"]:
    """CLIPScore: short edge to `size` if it differs (antialiased, not rounded or clipped), then a centre crop.

    `method` is "linear" or "cubic".
    """
    height, width = images.shape[1:3]
    short = min(height, width)
    if short != size:
        height, width = (_scaled(n, short, size) for n in (height, width))
        images = jax.image.resize(images, (len(images), height, width, 3), method, antialias=True)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return images[:, top : top + size, left : left + size]


def resize_pad(images: Images, size: int) -> Float[Array, "B {size} {size} 3"]:
    """HPSv2: long edge to `size` (cubic, antialiased, overshoot beyond [0, 1] kept), padded with black.

    ValueError for a picture so narrow that no pixel of its short edge is left.
    """
    height, width = images.shape[1:3]
    if max(height, width) != size:
        height, width = (round(n * (size / max(images.shape[1:3]))) for n in (height, width))
        if not min(height, width):
            raise ValueError(f"the short edge is 0 pixels if the long one has {size}: cut the picture")
        images = jax.image.resize(images, (len(images), height, width, 3), "cubic", antialias=True)
    down, right = size - height, size - width
    return jnp.pad(images, ((0, 0), (down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0)))


def _scaled(n: int, short: int, size: int) -> int:
    """The length of an edge of n pixels if the short edge becomes `size`, rounded down as in both libraries."""
    return size if n == short else int(size * n / short)


# ---- bytes: Pillow's bicubic resize of 8-bit images, to the last bit

SHIFT = 22  # Pillow's weights are integers, in units of 2**-22


def pil_bicubic(images: Images, size: int, *, floor: bool = True) -> Float[Array, "B {size} {size} 3"]:
    """PickScore and ImageReward: 8-bit pictures, short edge to `size` as in Pillow, then a centre crop; levels / 255.

    If the crop is half a pixel off centre, transformers takes the floor, torchvision (ImageReward) the even neighbour:
    floor=False. Both use the same resize, so XLA computes it once if both are asked for. Levels are rounded after each
    pass, so the order of the passes matters. It is that of Pillow 13 (`vertical_first`), which requirements.txt pins;
    Pillow 12 and older always begin with the horizontal pass.
    """
    levels = jnp.clip(jnp.round(images.astype(jnp.float32) * 255), 0, 255)
    before = images.shape[1], images.shape[2]
    height, width = after = _scaled(before[0], min(before), size), _scaled(before[1], min(before), size)
    for axis in (1, 2) if vertical_first(before, after) else (2, 1):
        levels = _resample(levels, axis, after[axis - 1])
    top, left = ((n - size) // 2 if floor else round((n - size) / 2) for n in (height, width))
    return levels[:, top : top + size, left : left + size] / 255


def vertical_first(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Whether Pillow 13 begins with the vertical pass, from one (height, width) to another.

    It does if the height loses more than twice as many pixels as the width. This was found by comparing both orders
    with Pillow 13.0 over thousands of sizes. With the short edge to `size`, it holds for pictures taller than 2:1 that
    shrink.
    """
    (height, width), (new_height, new_width) = before, after
    return new_height < height and height - new_height > 2 * (width - new_width)


def _resample(levels: Images, axis: int, count: int) -> Float[Array, "B h w 3"]:
    """One pass, vertical (axis 1) or horizontal (axis 2): sums of integer levels times integer weights, rounded.

    The weights are split into digits so small that f32 sums are exact, as GPUs multiply f32 fast; the totals reach
    2**31. HIGHEST, because TF32 products are not exact (tests/test_preprocess.py).
    """
    if levels.shape[axis] == count:
        return levels
    digits, bits = pil_digits(levels.shape[axis], count)
    subscripts = "bhwc,doh->dbowc" if axis == 1 else "bhwc,dow->dbhoc"
    parts = jnp.einsum(subscripts, levels, digits, precision=jax.lax.Precision.HIGHEST).astype(jnp.int32)
    half = 1 << (SHIFT - 1)
    total = sum((part << (bits * i) for i, part in enumerate(parts)), start=half)
    return jnp.clip(total >> SHIFT, 0, 255).astype(jnp.float32)


@functools.lru_cache
def pil_digits(before: int, after: int) -> tuple[Float32[np.ndarray, "d {after} {before}"], int]:
    """pil_weights in d digits of `bits` bits, the lowest first: weights = sum of digits[i] << (bits * i).

    A digit is less than 2**bits, so the sum of a row's products with levels is less than 2**24, where f32 is exact. The
    highest digit has the sign.
    """
    whole = pil_weights(before, after)
    taps = int(np.max(np.sum(whole != 0, axis=1)))
    bits = int(np.log2(2**24 / (255 * taps)))
    shifts = range(0, SHIFT, bits)
    low = [(whole >> shift) & ((1 << bits) - 1) for shift in shifts[:-1]]
    return np.stack([*low, whole >> shifts[-1]]).astype(np.float32), bits


def pil_weights(before: int, after: int) -> Int64[np.ndarray, "{after} {before}"]:
    """Pillow's bicubic weights from `before` to `after` pixels, in units of 2**-SHIFT; 0 outside a row's window."""
    scale = before / after
    stretch = max(scale, 1.0)
    out = np.zeros((after, before), np.int64)
    for i in range(after):
        centre = (i + 0.5) * scale
        low, high = max(int(centre - 2 * stretch + 0.5), 0), min(int(centre + 2 * stretch + 0.5), before)
        window = _keys_cubic((np.arange(low, high) - centre + 0.5) / stretch)
        exact = window / window.sum() * 2**SHIFT
        out[i, low:high] = np.trunc(exact + np.copysign(0.5, exact))
    return out


def _keys_cubic(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """Keys' cubic kernel with a = -1/2."""
    a, x = -0.5, np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
