"""Folders in diffusers' layout of a transformer, an AutoencoderKL and the text encoders of text.py: FLUX's and SD3.5's.

A model file says which encoders it has, in a table of `Encoder`s; here they are read, described and fed.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from solrl_jax import config, hub, weights
from solrl_jax.models import text, vae
from solrl_jax.models.layers import F32
from solrl_jax.structs import Model, Params, PyTree


class Encoder(NamedTuple):
    """A text encoder of a pipeline: its name here, the folders of it and of its tokenizer."""

    name: str
    folder: str
    tokenizer: str
    config: type[text.ClipTextConfig] | type[text.T5Config]
    project: bool = False  # a CLIP whose pooled state is projected


Encoders = tuple[Encoder, ...]


def latent_side(size: int, vae_cfg: vae.VaeConfig) -> int:
    """Latents along a side of a picture of `size` pixels; ConfigError where 2x2 patches of them do not fill it."""
    if size % (2 * vae_cfg.factor):
        raise config.ConfigError(
            f"model.size={size}: use a multiple of {2 * vae_cfg.factor} pixels (VAE x{vae_cfg.factor}, 2x2 patches)"
        )
    return size // vae_cfg.factor


def text_modules(folder: Path, encoders: Encoders, dtype: Any) -> dict[str, nn.Module]:
    """{name: module} of the encoders, from their configs."""
    return {e.name: _module(e, folder, dtype) for e in encoders}


def _module(encoder: Encoder, folder: Path, dtype: Any) -> nn.Module:
    cfg = encoder.config.read(folder / encoder.folder)
    return text.T5Encoder(cfg, dtype) if isinstance(cfg, text.T5Config) else text.ClipText(cfg, dtype, encoder.project)


def parts(
    cfg: config.Model,
    model: Model,
    encoders: Encoders,
    place: weights.Place | None = None,
    place_text: weights.Place | None = None,
) -> Iterator[Params]:
    """Transformer, VAE decoder, text encoders {name: tree}, one after another, each read when it is asked for.

    In the dtypes that `model`'s functions expect; leaves go where `place` and `place_text` take them as they are read.
    """
    dtype = jnp.dtype(cfg.dtype)
    tokenizers(str(hub.pipeline(cfg.path, configs_only=True)), encoders)  # missing ones are said before gigabytes
    folder = hub.pipeline(cfg.path)
    spec = jax.eval_shape(model.init, jax.random.key(0))
    files = weights.Files(folder / "transformer", "diffusion_pytorch_model")
    yield weights.load(files, spec, model.keys, dtype=dtype, place=place)  # no name holds what was given
    yield vae.load_vae(folder / "vae", F32, place=place)[1]
    yield {e.name: _load(e, folder, dtype, place_text) for e in encoders}


def _load(encoder: Encoder, folder: Path, dtype: Any, place: weights.Place | None) -> Params:
    if encoder.config is text.T5Config:
        return text.load_t5(folder / encoder.folder, dtype, place=place)[1]
    return text.load_clip_text(folder / encoder.folder, dtype, encoder.project, place=place)[1]


def shapes(cfg: config.Model, model: Model, encoders: Encoders) -> tuple[Params, Params, Params]:
    """What `parts` gives, as ShapeDtypeStructs: from the folder's configs alone."""
    folder, dtype = hub.pipeline(cfg.path, configs_only=True), jnp.dtype(cfg.dtype)
    key, ids, vae_cfg = jax.random.key(0), jnp.zeros((1, 2), jnp.int32), vae.VaeConfig.read(folder / "vae")
    decoder = vae.Decoder(vae_cfg, F32)

    def decoder_init(k: Key[Array, ""]) -> Params:
        return decoder.init(k, jnp.zeros((1, 1, 1, vae_cfg.latent_channels)))["params"]

    def typed(tree: PyTree, to: Any) -> PyTree:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, to), tree)

    words = text_modules(folder, encoders, dtype)
    trees = {name: jax.eval_shape(module.init, key, ids)["params"] for name, module in words.items()}
    return (
        typed(jax.eval_shape(model.init, key), dtype),
        typed(jax.eval_shape(decoder_init, key), F32),
        typed(trees, dtype),
    )


def token_shapes(cfg: config.Model, encoders: Encoders, prompts: int) -> PyTree:
    """What `tokenize` gives for so many prompts, as ShapeDtypeStructs."""
    folder = hub.pipeline(cfg.path, configs_only=True)

    def length(encoder: Encoder) -> int:
        read = encoder.config.read(folder / encoder.folder)
        return cfg.text_tokens if isinstance(read, text.T5Config) else read.max_position_embeddings

    return {e.name: jax.ShapeDtypeStruct((prompts, length(e)), jnp.int32) for e in encoders}


@functools.lru_cache(maxsize=4)
def tokenizers(folder: str, encoders: Encoders) -> tuple[Any, ...]:
    """transformers' tokenizers of the encoders. WeightsError where one is missing or knows more words than its encoder
    does."""
    from transformers import AutoTokenizer

    found = []
    for e in encoders:
        found.append(AutoTokenizer.from_pretrained(text.require_tokenizer(Path(folder) / e.tokenizer)))
        words = e.config.read(Path(folder) / e.folder).vocab_size
        if len(found[-1]) > words:
            raise weights.WeightsError(
                f"{folder}/{e.tokenizer} has {len(found[-1])} tokens, its text encoder only {words}"
            )
    return tuple(found)


def tokenize(folder: str, encoders: Encoders, text_tokens: int, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """{name: int32 [G, L]}, padded and cut to a CLIP's own length or to `text_tokens`; no mask, pads attend."""
    pad = {"padding": "max_length", "truncation": True, "return_tensors": "np"}
    found = {}
    for e, tokenizer in zip(encoders, tokenizers(folder, encoders), strict=True):
        length = text_tokens if e.config is text.T5Config else tokenizer.model_max_length
        found[e.name] = tokenizer(list(prompts), max_length=length, **pad)["input_ids"].astype(np.int32)
    return found
