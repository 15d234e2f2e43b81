"""The pictures that a run keeps: grids/<iteration>.png to look at, and base.npz and last.npz for the report.

The .npz files hold the pictures of the grid's prompts and their rewards, of the base model and of the last evaluation.
"""

import itertools
import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from solrl_jax import disk


class Shown(NamedTuple):
    """G prompts, one 8-bit picture of each, and its raw score by every reward, trained or held out; NaN if not finite.
    `means` has, for all P evaluated prompts, the mean over the pictures of a prompt. `asked`, of the P prompts, is 0
    where a prompt does not ask for a reward, whose scores there mean nothing; {} if all ask for all."""

    prompts: list[str]
    images: UInt8[np.ndarray, "G H W 3"]
    scores: dict[str, Float[np.ndarray, "G"]]
    means: dict[str, Float[np.ndarray, "P"]]
    asked: dict[str, Float[np.ndarray, "P"]] = {}  # noqa: RUF012 - never written to


def save(file: Path, shown: Shown, iteration: int, how: str) -> None:
    """Write `shown` atomically; `how` is evaluate.settings."""
    table = np.array(list(shown.scores.values()), np.float32).reshape(len(shown.scores), len(shown.prompts))
    means = np.array(list(shown.means.values()), np.float32)
    # Text as JSON's bytes: NumPy's strings lose zero characters at their end.
    names = {"rewards": list(shown.scores), "means": list(shown.means)}
    names |= {"asked": {name: one.tolist() for name, one in shown.asked.items()}}
    text = json.dumps({"prompts": shown.prompts, **names, "iteration": iteration, "how": how})
    arrays = {"images": shown.images, "scores": table, "means": means}
    with disk.whole(file) as f:
        np.savez_compressed(f, **arrays, text=np.frombuffer(text.encode(), np.uint8))


OLDER = ({"images", "how"}, {"images", "scores", "text"})
"""The arrays that older versions kept."""


class Kept(NamedTuple):
    """The content of a file of `save`."""

    shown: Shown
    iteration: int
    how: str


def load(file: Path) -> Kept | None:
    """The content of a file of `save`; None for files of older versions. Raises for a damaged file (disk.readable)."""
    with np.load(file) as saved:
        if set(saved) in OLDER:
            return None
        told, images = json.loads(saved["text"].tobytes()), saved["images"]
        scores = dict(zip(told["rewards"], saved["scores"], strict=True))
        means = dict(zip(told["means"], saved["means"], strict=True))
        if images.dtype != np.uint8 or images.ndim != 4 or any(len(x) != len(images) for x in scores.values()):
            raise ValueError(f"its pictures are {images.dtype}{list(images.shape)}")
        if len(told["prompts"]) != len(images):
            raise ValueError(f"it has {len(told['prompts'])} prompts for {len(images)} pictures")
        asked = {name: np.array(one, np.float32) for name, one in told.get("asked", {}).items()}
        if any(one.shape != saved["means"].shape[1:] for one in asked.values()):
            raise ValueError("it does not say of each prompt which rewards it asks for")
        return Kept(Shown(told["prompts"], images, scores, means, asked), told["iteration"], told["how"])


_CAPTION, _HEAD, _GAP = 180, 24, 6  # pixels: width of the captions, height of the titles, space between pictures


def write_grid(file: Path, prompts: Sequence[str], columns: dict[str, UInt8[np.ndarray, "G H W 3"]]) -> Path:
    """A PNG with a row per prompt, its caption at the left, and a column per policy, its name above.

    Rows that would make it higher than wide go on at the right, under the same names.
    """
    height, width = next(iter(columns.values())).shape[1:3]
    scale = max(1, 128 // width) if width < 256 else 256 / width  # small pictures stay crisp, large ones are shrunk
    size = (round(width * scale), round(height * scale))
    across, down = _CAPTION + len(columns) * (size[0] + _GAP), size[1] + _GAP  # a block's width, a row's height
    blocks = next(n for n in itertools.count(1) if n * across >= math.ceil(len(prompts) / n) * down)
    rows = math.ceil(len(prompts) / blocks)
    canvas = Image.new("RGB", (math.ceil(len(prompts) / rows) * across, _HEAD + rows * down), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    for i, prompt in enumerate(prompts):
        left, top = i // rows * across, _HEAD + i % rows * down
        lines = textwrap.wrap(prompt, 28, max_lines=max(1, size[1] // 15), placeholder=" ...")
        pen.multiline_text((left + 6, top), "\n".join(lines), "black", font)
        for c, (title, images) in enumerate(columns.items()):
            x = left + _CAPTION + c * (size[0] + _GAP)
            if i % rows == 0:
                pen.text((x, 4), title, "black", font)
            canvas.paste(Image.fromarray(images[i]).resize(size, how), (x, top))
    with disk.whole(file) as f:
        canvas.save(f, "PNG")
    return file
