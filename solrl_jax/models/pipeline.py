"""Folders in diffusers' layout of a transformer, a VAE and text encoders: FLUX's, SD3.5's and SANA's.

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
from solrl_jax.models import dcae, gemma2, text, vae
from solrl_jax.models.layers import F32
from solrl_jax.structs import Model, Params, PyTree


class Encoder(NamedTuple):
    """A text encoder of a pipeline: its name here, the folders of it and of its tokenizer."""

    name: str
    folder: str
    tokenizer: str
    config: type[text.ClipTextConfig] | type[text.T5Config] | type[gemma2.Gemma2Config]
    project: bool = False  # a CLIP whose pooled state is projected


Encoders = tuple[Encoder, ...]


class Naming(NamedTuple):
    """Other names of a network's weights, which a file has that holds the key `sign`."""

    sign: str
    keys: tuple[weights.Rule, ...]
    aliases: tuple[tuple[str, str], ...]
    droppable: tuple[str, ...]


def latent_side(size: int, vae_cfg: vae.VaeConfig | dcae.DcaeConfig, patch: int = 2) -> int:
    """Latents along a side of a picture of `size` pixels; ConfigError where patches of them do not fill it."""
    if size % (patch * vae_cfg.factor):
        patches = f", {patch}x{patch} patches" if patch > 1 else ""
        raise config.ConfigError(
            f"model.size={size}: use a multiple of {patch * vae_cfg.factor} pixels (VAE x{vae_cfg.factor}{patches})"
        )
    return size // vae_cfg.factor


def decoder(folder: Path, dtype: Any) -> vae.Decoder | dcae.Decoder:
    """The VAE's half that is needed, of the class that the pipeline's vae/config.json names."""
    if weights.read_json(folder / "vae" / "config.json").get("_class_name") == "AutoencoderDC":
        return dcae.Decoder(dcae.DcaeConfig.read(folder / "vae"), dtype)
    return vae.Decoder(vae.VaeConfig.read(folder / "vae"), dtype)


def text_modules(folder: Path, encoders: Encoders, dtype: Any) -> dict[str, nn.Module]:
    """{name: module} of the encoders, from their configs."""
    return {e.name: _module(e, folder, dtype) for e in encoders}


def _module(encoder: Encoder, folder: Path, dtype: Any) -> nn.Module:
    cfg = encoder.config.read(folder / encoder.folder)
    if isinstance(cfg, text.ClipTextConfig):
        return text.ClipText(cfg, dtype, encoder.project)
    return text.T5Encoder(cfg, dtype) if isinstance(cfg, text.T5Config) else gemma2.Gemma2(cfg, dtype)


def parts(
    cfg: config.Model,
    model: Model,
    encoders: Encoders,
    place: weights.Place | None = None,
    place_text: weights.Place | None = None,
    namings: tuple[Naming, ...] = (),
) -> Iterator[Params]:
    """Transformer, VAE decoder, text encoders {name: tree}, one after another, each read when it is asked for.

    In the dtypes that `model`'s functions expect; leaves go where `place` and `place_text` take them as they are read.
    The transformer's names are those of `model.keys`, or of one of `namings`.
    """
    dtype = jnp.dtype(cfg.dtype)
    tokenizers(str(hub.pipeline(cfg.path, configs_only=True)), encoders)  # missing ones are said before gigabytes
    folder = hub.pipeline(cfg.path)
    spec = jax.eval_shape(model.init, jax.random.key(0))
    files = weights.Files(network_file(cfg) or folder / "transformer", "diffusion_pytorch_model")
    naming = next((x for x in namings if x.sign in files.keys()), Naming("", model.keys, (), ()))  # noqa: SIM118
    how = {"aliases": naming.aliases, "droppable": naming.droppable}
    yield weights.load(files, spec, naming.keys, dtype=dtype, place=place, **how)  # no name holds what was given
    load = dcae.load if isinstance(decoder(folder, F32), dcae.Decoder) else vae.load_vae
    yield load(folder / "vae", F32, place=place)[1]
    yield {e.name: _load(e, folder, dtype, place_text) for e in encoders}


def network_file(cfg: config.Model) -> Path | None:
    """What model.weights names; fetched, if it is on the hub."""
    return hub.file(cfg.weights, ", --config.model.weights") if cfg.weights else None


def _load(encoder: Encoder, folder: Path, dtype: Any, place: weights.Place | None) -> Params:
    if encoder.config is text.T5Config:
        return text.load_t5(folder / encoder.folder, dtype, place=place)[1]
    if encoder.config is gemma2.Gemma2Config:
        return gemma2.load(folder / encoder.folder, dtype, place=place)[1]
    return text.load_clip_text(folder / encoder.folder, dtype, encoder.project, place=place)[1]


def shapes(cfg: config.Model, model: Model, encoders: Encoders) -> tuple[Params, Params, Params]:
    """What `parts` gives, as ShapeDtypeStructs: from the folder's configs alone."""
    folder, dtype = hub.pipeline(cfg.path, configs_only=True), jnp.dtype(cfg.dtype)
    key, ids, half = jax.random.key(0), jnp.zeros((1, 2), jnp.int32), decoder(folder, F32)

    def decoder_init(k: Key[Array, ""]) -> Params:
        return half.init(k, jnp.zeros((1, 1, 1, half.cfg.latent_channels)))["params"]

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
        return read.max_position_embeddings if isinstance(read, text.ClipTextConfig) else cfg.text_tokens

    return {e.name: jax.ShapeDtypeStruct((prompts, length(e)), jnp.int32) for e in encoders}


@functools.lru_cache(maxsize=4)
def tokenizers(folder: str, encoders: Encoders) -> tuple[Any, ...]:
    """transformers' tokenizers of the encoders. WeightsError where one is missing or knows more words than its encoder
    does."""
    from transformers import AutoTokenizer

    found = []
    for e in encoders:
        where = text.require_tokenizer(Path(folder) / e.tokenizer)
        found.append(AutoTokenizer.from_pretrained(where, padding_side="right"))  # Gemma's files say left
        words = e.config.read(Path(folder) / e.folder).vocab_size
        if len(found[-1]) > words:
            raise weights.WeightsError(
                f"{folder}/{e.tokenizer} has {len(found[-1])} tokens, its text encoder only {words}"
            )
    return tuple(found)


def tokenize(folder: str, encoders: Encoders, text_tokens: int, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """{name: int32 [G, L]}, padded at the right and cut to a CLIP's own length or to `text_tokens`."""
    pad = {"padding": "max_length", "truncation": True, "return_tensors": "np"}
    found = {}
    for e, tokenizer in zip(encoders, tokenizers(folder, encoders), strict=True):
        length = tokenizer.model_max_length if e.config is text.ClipTextConfig else text_tokens
        found[e.name] = tokenizer(list(prompts), max_length=length, **pad)["input_ids"].astype(np.int32)
    return found
