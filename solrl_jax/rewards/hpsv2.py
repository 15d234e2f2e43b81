"""HPSv2.1: cos(image, text) of xswu/HPSv2's HPS_v2.1_compressed.pt.

Bicubic resizing of floats, without clipping the overshoot, the whole picture padded with black; text by open_clip's
variant of CLIP's tokenizer. The public file is a CLIP ViT-H/14 in open_clip's naming. HPS v2.0 has the same keys and
shapes but other scores, so only the file's name distinguishes them.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from solrl_jax.models.layers import F32
from solrl_jax.rewards import clip_tokens, clip_tower, preprocess
from solrl_jax.rewards.clip_tower import VIT_H_14, ClipConfig, ClipTower, Products
from solrl_jax.structs import Images, Params, PerSample, Reward, WeightsError
from solrl_jax.weights import hub

HUB_ID, PUBLIC_FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"


def make(path: str | Path | None, dtype: Any = F32) -> tuple[Reward, Params]:
    """The reward, and its f32 weights, from a .pt or .safetensors file, from its folder, or from xswu/HPSv2.

    The tokenizer is the one beside the file (vocab.json and merges.txt, tokenizer.json, or open_clip's .txt.gz), else
    clip_tokens.HUB_ID's. A model of other sizes needs its open_clip_config.json beside the file.
    """
    if path is None:
        raise WeightsError(f"hpsv2 needs {PUBLIC_FILE}, its folder, or {HUB_ID}")
    file = find(path)
    tower, params = clip_tower.load_open_clip(file, _config(file.parent))
    tokenizer = clip_tokens.find(file.parent, also=(clip_tokens.GZIP,))
    clip_tokens.check_open_clip(tower.cfg.text, tokenizer)
    return _reward(tokenizer, tower.cfg, Products.of(dtype)), params


def shapes(path: str | Path | None, dtype: Any = F32) -> tuple[Reward, Params, Any]:
    """The reward, its weights and one prompt's tokens, the last two as ShapeDtypeStructs; no weights are read."""
    found = hub.here(path, "open_clip_config.json")
    cfg = VIT_H_14 if found is None else _config(found.parent if found.is_file() else found)
    ids = jax.ShapeDtypeStruct((1, cfg.text.max_position_embeddings), jnp.int32)
    return _reward(str(path), cfg, Products.of(dtype)), clip_tower.shapes(ClipTower(cfg)), {"ids": ids}


def find(path: str | Path) -> Path:
    """The file of HPS v2.1 from a file, a folder or a name on the hub; WeightsError if it is v2.0's."""
    file = Path(path)
    if not file.is_file():
        folder = hub.model(str(path), (PUBLIC_FILE,), ())
        found = [f for kind in ("safetensors", "pt") for f in sorted(folder.glob(f"HPS_v2*.{kind}"))]
        if not found:
            raise WeightsError(f"{folder} holds no {PUBLIC_FILE} (nor a .safetensors of it): get it from {HUB_ID}")
        file = next((f for f in found if not _is_v2_0(f)), found[0])
    if _is_v2_0(file):
        raise WeightsError(f"{file} is HPS v2.0, whose scores are not those of v2.1: give {PUBLIC_FILE}")
    return file


def _is_v2_0(file: Path) -> bool:
    return re.fullmatch(r"HPS_?v2(\.0)?(_compressed)?", file.stem, re.IGNORECASE) is not None


def _config(folder: Path) -> ClipConfig:
    """From open_clip_config.json if the folder has one."""
    return ClipConfig.read_open_clip(folder) if (folder / "open_clip_config.json").is_file() else VIT_H_14


@functools.lru_cache
def _reward(folder: str, cfg: ClipConfig, how: Products) -> Reward:
    tokenize = functools.partial(clip_tokens.open_clip, folder, cfg.text.max_position_embeddings)
    return Reward("hpsv2", tokenize, functools.partial(_score, ClipTower(cfg, *how)))


def _score(tower: ClipTower, params: Params, images: Images, tokens: Mapping[str, Int[Array, "G L"]]) -> PerSample:
    """Images f32 [0, 1], B of them for G prompts. The score does not use the logit scale."""
    images = preprocess.resize_pad(images.astype(F32), tower.cfg.vision.image_size)
    pixels = preprocess.standardise(images, preprocess.OPENAI_MEAN, preprocess.OPENAI_STD)
    return clip_tower.cosines(tower, params, pixels, tokens["ids"])
