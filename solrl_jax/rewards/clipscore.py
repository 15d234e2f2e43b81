"""CLIPScore: exp(logit_scale) cos(image, text) / 100 of openai/clip-vit-large-patch14.

Bilinear resizing, not rounded to bytes, as in Sol-RL's reference; text by transformers' variant of CLIP's tokenizer.
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
from solrl_jax.models.text import ClipTextConfig, require_tokenizer
from solrl_jax.rewards import clip_tokens, clip_tower, preprocess
from solrl_jax.rewards.clip_tower import ClipConfig, ClipTower, ClipVisionConfig, Products
from solrl_jax.structs import Images, Params, PerSample, Reward
from solrl_jax.weights import hub

HUB_ID = "openai/clip-vit-large-patch14"
PUBLIC = ClipConfig(
    ClipTextConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072, projection_dim=768),
    ClipVisionConfig(1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, patch_size=14),
    projection_dim=768,
)
"""HUB_ID's."""


def make(path: str | Path | None, dtype: Any = F32) -> tuple[Reward, Params]:
    """The reward of a CLIPModel (hub.model: weights, config.json, tokenizer in transformers' layout), its f32 weights.

    `dtype` is that of the vision tower's products (Products.of). The same folder, config and dtype give the same Reward
    object, as jit's static arguments require.
    """
    if path is None:
        raise weights.WeightsError(f"clipscore needs the folder of a CLIP model, or {HUB_ID}")
    path = hub.model(str(path))
    tower, params = clip_tower.load_clip(path)
    folder = str(path.resolve())
    clip_tokens.check_hf(tower.cfg.text, require_tokenizer(folder))
    return _reward(
        folder, tower.cfg, Products.of(dtype), *preprocess.read_mean_std(folder, tower.cfg.vision.image_size)
    ), params


def shapes(path: str | Path | None, dtype: Any = F32) -> tuple[Reward, Params, Any]:
    """The reward, its weights and one prompt's tokens, the last two as ShapeDtypeStructs, from config.json alone.

    Sizes are PUBLIC's if there is no such folder, and none in the hub's cache.
    """
    folder = hub.here(path)
    cfg = PUBLIC if folder is None else ClipConfig.read(folder)
    ids = jax.ShapeDtypeStruct((1, cfg.text.max_position_embeddings), jnp.int32)
    reward = _reward(str(path), cfg, Products.of(dtype), preprocess.OPENAI_MEAN, preprocess.OPENAI_STD)
    return reward, clip_tower.shapes(ClipTower(cfg)), {"ids": ids}


@functools.lru_cache
def _reward(folder: str, cfg: ClipConfig, how: Products, mean: tuple[float, ...], std: tuple[float, ...]) -> Reward:
    tokenize = functools.partial(clip_tokens.hf, folder, cfg.text.max_position_embeddings)
    return Reward("clipscore", tokenize, functools.partial(_score, ClipTower(cfg, *how), mean, std))


def _score(
    tower: ClipTower,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    params: Params,
    images: Images,
    tokens: Mapping[str, Int[Array, "G L"]],
) -> PerSample:
    """Images f32 [0, 1], B of them for G prompts."""
    images = preprocess.resize_crop(images.astype(F32), tower.cfg.vision.image_size, "linear")
    cosines = clip_tower.cosines(tower, params, preprocess.standardise(images, mean, std), tokens["ids"])
    return jnp.exp(params["logit_scale"]) * cosines / 100
