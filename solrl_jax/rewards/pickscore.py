"""PickScore: exp(logit_scale) cos(image, text) / 26 of yuvalkirstain/PickScore_v1.

8-bit pictures resized by Pillow's bicubic filter, text by transformers' variant of CLIP's tokenizer, as in Sol-RL's
reference. The public file is a CLIP ViT-H/14 in transformers' naming.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from solrl_jax import weights
from solrl_jax.models.layers import F32
from solrl_jax.rewards import clip_tokens, clip_tower, preprocess
from solrl_jax.rewards.clip_tower import VIT_H_14, ClipConfig, ClipTower, Products
from solrl_jax.structs import Images, Params, PerSample, Reward
from solrl_jax.weights import hub

HUB_ID = "yuvalkirstain/PickScore_v1"


def make(path: str | Path | None, dtype: Any = F32) -> tuple[Reward, Params]:
    """The reward of a CLIPModel (hub.model: weights, config.json, maybe a tokenizer), its f32 weights; see clipscore.

    If the folder has no tokenizer, the one of clip_tokens.HUB_ID is used, the model from which PickScore was trained.
    """
    if path is None:
        raise weights.WeightsError(f"pickscore needs the folder of a CLIP model, or {HUB_ID}")
    path = hub.model(str(path))
    tower, params = clip_tower.load_clip(path)
    tokenizer = clip_tokens.find(path)
    clip_tokens.check_hf(tower.cfg.text, tokenizer)
    return _reward(
        tokenizer, tower.cfg, Products.of(dtype), *preprocess.read_mean_std(path, tower.cfg.vision.image_size)
    ), params


def shapes(path: str | Path | None, dtype: Any = F32) -> tuple[Reward, Params, Any]:
    """The reward, and the shapes of its weights and of one prompt's tokens; ViT-H/14's without such a folder."""
    folder = hub.here(path)
    cfg = VIT_H_14 if folder is None else ClipConfig.read(folder)
    ids = jax.ShapeDtypeStruct((1, cfg.text.max_position_embeddings), jnp.int32)
    reward = _reward(str(path), cfg, Products.of(dtype), preprocess.OPENAI_MEAN, preprocess.OPENAI_STD)
    return reward, clip_tower.shapes(ClipTower(cfg)), {"ids": ids}


@functools.lru_cache
def _reward(folder: str, cfg: ClipConfig, how: Products, mean: tuple[float, ...], std: tuple[float, ...]) -> Reward:
    tokenize = functools.partial(clip_tokens.hf, folder, cfg.text.max_position_embeddings)
    return Reward("pickscore", tokenize, functools.partial(_score, ClipTower(cfg, *how), mean, std))


def _score(
    tower: ClipTower,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    params: Params,
    images: Images,
    tokens: Mapping[str, Int[Array, "G L"]],
) -> PerSample:
    """Images f32 [0, 1], B of them for G prompts."""
    images = preprocess.pil_bicubic(images, tower.cfg.vision.image_size)
    cosines = clip_tower.cosines(tower, params, preprocess.standardise(images, mean, std), tokens["ids"])
    return jnp.exp(params["logit_scale"]) * cosines / 26
