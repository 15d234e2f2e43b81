"""CLIPScore: exp(logit_scale) cos(image, text) / 100 of openai/clip-vit-large-patch14 (spec/rewards.md sections 0-4).

Bilinear resizing and no rounding to bytes, as in Sol-RL's reference; text in transformers' flavour of CLIP's tokenizer.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from solrl_jax import hub, weights
from solrl_jax.models.layers import F32
from solrl_jax.models.text import ClipTextConfig, require_tokenizer
from solrl_jax.rewards import clip_tower
from solrl_jax.rewards.clip_tower import ClipConfig, ClipTower, ClipVisionConfig
from solrl_jax.structs import Images, Params, PerSample, Reward


def make(path: str | Path | None, dtype: Any = F32) -> tuple[Reward, Params]:
    """The reward of a CLIPModel (hub.model: weights, config.json, tokenizer in transformers' layout), its f32 weights.

    `dtype` is what the towers compute in. The same folder, config and dtype give the same Reward, as a static argument
    of jit must be.
    """
    if path is None:
        raise weights.WeightsError(f"clipscore needs the folder of a CLIP model, or {HUB_ID}")
    path = hub.model(str(path))
    tower, params = clip_tower.load_clip(path, jnp.dtype(dtype))
    folder = str(path.resolve())
    check_tokenizer(folder, tower.cfg.text)
    return _reward(folder, tower.cfg, jnp.dtype(dtype), *clip_tower.read_mean_std(folder)), params


HUB_ID = "openai/clip-vit-large-patch14"
PUBLIC = ClipConfig(
    ClipTextConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072, projection_dim=768),
    ClipVisionConfig(1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, patch_size=14),
    projection_dim=768,
)
"""HUB_ID's."""


def shapes(path: str | Path | None) -> tuple[Reward, Params, Any]:
    """The reward, and as ShapeDtypeStructs its weights and one prompt's tokens: from config.json alone.

    Sizes are PUBLIC's where there is no such folder and none in the hub's cache.
    """
    folder = hub.here(path)
    cfg = PUBLIC if folder is None else ClipConfig.read(folder)
    ids = jax.ShapeDtypeStruct((1, cfg.text.max_position_embeddings), jnp.int32)
    reward = _reward(str(path), cfg, jnp.dtype(F32), clip_tower.OPENAI_MEAN, clip_tower.OPENAI_STD)
    return reward, clip_tower.shapes(ClipTower(cfg, F32)), {"ids": ids}


@functools.lru_cache
def _reward(folder: str, cfg: ClipConfig, dtype: jnp.dtype, mean: tuple[float, ...], std: tuple[float, ...]) -> Reward:
    tokenize = functools.partial(_tokenize, folder, cfg.text.max_position_embeddings)
    return Reward("clipscore", tokenize, functools.partial(_score, ClipTower(cfg, dtype), mean, std))


@functools.lru_cache
def _tokenizer(folder: str) -> Any:
    from transformers import CLIPTokenizer  # seconds to import

    return CLIPTokenizer.from_pretrained(require_tokenizer(folder))


def check_tokenizer(folder: str, cfg: ClipTextConfig) -> None:
    """Tokenizer and weights must be of one model: else ids run past the embeddings, or no id is the end."""
    tokenizer = _tokenizer(folder)
    end = tokenizer.eos_token_id
    if len(tokenizer) > cfg.vocab_size or cfg.eos_token_id not in (2, end):
        raise weights.WeightsError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens and ends with {end}, "
            f"but config.json says vocab_size {cfg.vocab_size} and eos_token_id {cfg.eos_token_id}"
        )


def _tokenize(folder: str, length: int, prompts: Sequence[str]) -> dict[str, Int[np.ndarray, "G L"]]:
    how = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "np"}
    return {"ids": _tokenizer(folder)(list(prompts), **how)["input_ids"].astype(np.int32)}


def _score(
    tower: ClipTower,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    params: Params,
    images: Images,
    tokens: Mapping[str, Int[Array, "G L"]],
) -> PerSample:
    """Images f32 [0, 1], B of them for G prompts."""
    with jax.default_matmul_precision("highest"):  # GPUs would take TF32, and group advantages divide by a small spread
        images = clip_tower.resize_crop(images.astype(F32), tower.cfg.vision.image_size, "linear")
        pixels = clip_tower.standardise(images, mean, std)
        image = jnp.asarray(tower.apply({"params": params}, pixels, method="image_features"))
        text = jnp.asarray(tower.apply({"params": params}, jnp.asarray(tokens["ids"]), method="text_features"))
    return jnp.exp(params["logit_scale"]) * clip_tower.pair_cosines(image, text) / 100
