"""OCR: how much of the text that a prompt asks for can be read in its picture; 1 is all of it, 0 nothing.

    a = all that is read, b = the text; both in NFKC and lower case, without spaces
    d = 0 if b occurs in a, else min(Levenshtein(a, b), |b|)
    score = 1 - d / |b|

The formula of flow_grpo's and DiffusionNFT's repositories, whose reader is PaddleOCR 2.9; here it is rapidocr
with PP-OCRv6, whose models are in its wheel. A picture without text is 0; a reader that fails is an error.
`ocr_strict` has no rule for b within a: a policy that adds other text gains nothing there.
"""

import functools
import hashlib
import os
import re
import threading
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8

from solrl_jax.config import ConfigError
from solrl_jax.rewards import own
from solrl_jax.structs import Params, PyTree, Reward, Row


def make(path: str | None, dtype: Any) -> tuple[Reward, Params]:
    """ConfigError if the reader is not installed."""
    return reading("ocr", score, path, dtype)


def reading(name: str, function: Any, path: str | None, dtype: Any) -> tuple[Reward, Params]:
    """The reward `name`, whose `function` reads pictures."""
    try:
        _options()
    except (ImportError, AttributeError) as e:  # not there, or older than its models
        how = "pip install 'rapidocr>=3.10' onnxruntime, or -r requirements-ocr.txt"
        raise ConfigError(f"reward {name} needs a reader of text that is not here ({e}): {how}") from None
    return own.on_host(name, function, path, dtype, tokenize)


def shapes(path: str | None, dtype: Any) -> tuple[Reward, Params, PyTree]:
    """No weights on the devices. Needs no reader."""
    return Reward("ocr", tokenize, own.nowhere, score), {}, jax.ShapeDtypeStruct((1,), np.int32)


def tokenize(prompts: Sequence[str], rows: Sequence[Row]) -> Int[np.ndarray, "G"]:
    """ValueError for a prompt that asks for no text."""
    for row in rows:
        target(row)
    return own.places(prompts)


def score(images: UInt8[np.ndarray, "B H W 3"], prompts: Sequence[str], rows: Sequence[Row]) -> list[float]:
    return [shown(text, target(row)) for text, row in zip(read(images), rows, strict=True)]


# --- the formula ----------------------------------------------------------------------------------------------------

_QUOTES = str.maketrans("“”„", '"""')


def target(row: Row) -> str:
    """What the picture of a row must say: its "text", or else what stands between the prompt's first two quotes.

    ValueError, with the prompt, if there is none.
    """
    prompt = row["prompt"]
    quoted = re.search('"([^"]*)"', prompt.translate(_QUOTES))
    text = row.get("text", quoted[1] if quoted else "")
    if not isinstance(text, str) or not plain(text):
        said = (
            f'its row has "text": {text!r:.40}'
            if "text" in row
            else 'it has no text in double quotes, its row no "text"'
        )
        raise ValueError(
            f"{prompt!r:.80} asks for no text that can be read ({said}): write it as in: a sign that says "
            '"OPEN", or give a .jsonl line {"prompt": ..., "text": "OPEN"}'
        )
    return text


def plain(text: str) -> str:
    """In NFKC and lower case, without spaces."""
    return "".join(unicodedata.normalize("NFKC", text).lower().split())


def shown(read: str, text: str, strict: bool = False) -> float:
    """The score of a picture in which `read` is read and `text` is asked for; `strict` without the rule for b in a."""
    a, b = plain(read), plain(text)
    if b in a and not strict:
        return 1.0
    return 1 - min(distance(a, b), len(b)) / len(b)


def distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest characters to insert, delete or replace."""
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
        above = row
    return above[-1]


# --- the reader -----------------------------------------------------------------------------------------------------


def read(images: UInt8[np.ndarray, "B H W 3"]) -> list[str]:
    """All text of each picture, its lines from top to bottom. Pictures are read one by one, on all cores.

    The same pictures as in this thread's last call are not read again: `ocr` and `ocr_strict` ask one after the other.
    """
    digest = images.shape, hashlib.sha256(images.tobytes()).digest()  # for which no picture has to be kept
    if getattr(_mine, "digest", None) != digest:
        _mine.texts = list(_pool().map(_read, images))
        _mine.digest = digest  # not if reading failed
    return list(_mine.texts)


def _read(picture: UInt8[np.ndarray, "H W 3"]) -> str:
    found = _engine()(np.ascontiguousarray(picture[..., ::-1]))  # BGR
    return "".join(found.txts or ())  # None: no text was found; without `txts`, reading failed


_mine = threading.local()
"""In threads that read, their engine; in threads that ask, the digest of the last call's pictures and their texts."""


def _engine() -> Any:
    """This thread's reader: its 31 MB of weights, and calls that do not wait for those of other threads."""
    from rapidocr import RapidOCR

    if not hasattr(_mine, "engine"):
        _mine.engine = RapidOCR(params=_options())
    return _mine.engine


@functools.cache
def _pool() -> ThreadPoolExecutor:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ThreadPoolExecutor(cores, "ocr")


def _options() -> dict[str, Any]:
    """As the reference sets its reader, and so that a picture's text depends on this picture alone."""
    import onnxruntime  # noqa: F401 - rapidocr imports it at the first picture only
    from rapidocr import ModelType, OCRVersion

    return {
        "Global.log_level": "error",
        "Global.use_cls": False,  # does not look for text upside down
        "Det.limit_type": "max",  # larger pictures are shrunk to this side, smaller ones are read as they are
        "Det.limit_side_len": 960,
        "Det.ocr_version": OCRVersion.PPOCRV6,  # the models of the wheel; all others would be downloaded
        "Det.model_type": ModelType.SMALL,
        "Rec.ocr_version": OCRVersion.PPOCRV6,
        "Rec.model_type": ModelType.SMALL,
        "Rec.rec_batch_num": 1,  # the lines of a batch are padded to its widest, which changes what is read
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,  # a core per picture, not all cores on one
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
