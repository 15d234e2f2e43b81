"""`ocr` without the rule that text around the asked one costs nothing: to hold out while `ocr` is trained.

score = 1 - min(Levenshtein(a, b), |b|) / |b|, by the words of ocr.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from solrl_jax.rewards import ocr
from solrl_jax.structs import Params, PyTree, Reward, Row


def make(path: str | None, dtype: Any) -> tuple[Reward, Params]:
    """ConfigError if the reader is not installed."""
    return ocr.reading("ocr_strict", score, path, dtype)


def shapes(path: str | None, dtype: Any) -> tuple[Reward, Params, PyTree]:
    """No weights on the devices. Needs no reader."""
    reward, params, tokens = ocr.shapes(path, dtype)
    return reward._replace(name="ocr_strict", host=score), params, tokens


def score(images: UInt8[np.ndarray, "B H W 3"], prompts: Sequence[str], rows: Sequence[Row]) -> list[float]:
    pairs = zip(ocr.read(images), rows, strict=True)
    return [ocr.shown(text, ocr.target(row), strict=True) for text, row in pairs]
