"""Folders in diffusers' layout with a transformer, a VAE and text encoders.

Each model file lists its encoders in a table of `Encoder`s. This file reads them, gives their shapes and tokenizes.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from solrl_jax import config, weights
from solrl_jax.models import dcae, gemma2, qwen3, text, vae
from solrl_jax.models.layers import F32, parameters
from solrl_jax.structs import Model, Params, PyTree
from solrl_jax.weights import hub


class Encoder(NamedTuple):
    """A text encoder of a pipeline: its name here, its folder and its tokenizer's folder."""

    name: str
    folder: str
    tokenizer: str
    config: type[text.ClipTextConfig] | type[text.T5Config] | type[gemma2.Gemma2Config] | type[qwen3.Qwen3Config]
    project: bool = False  # a CLIP whose pooled state is projected
    masked: bool = False  # the network needs a mask of its padding
    reads: tuple[int, ...] = ()  # which of transformers' hidden_states a Qwen3 gives
    template: qwen3.Template | None = None  # what is written around a prompt


Encoders = tuple[Encoder, ...]


class Naming(NamedTuple):
    """Other names of a network's weights. A file has these names if it contains the key `sign`."""

    sign: str
    keys: tuple[weights.Rule, ...]
    aliases: tuple[tuple[str, str], ...]
    droppable: tuple[str, ...]


def latent_side(size: int, vae_cfg: vae.VaeConfig | vae.Flux2VaeConfig | dcae.DcaeConfig, patch: int = 2) -> int:
    """Latents along a side of a picture of `size` pixels; ConfigError if they do not divide into patches."""
    if size % (patch * vae_cfg.factor):
        patches = f", {patch}x{patch} patches" if patch > 1 else ""
        raise config.ConfigError(
            f"model.size={size}: use a multiple of {patch * vae_cfg.factor} pixels (VAE x{vae_cfg.factor}{patches})"
        )
    return size // vae_cfg.factor


class Half(NamedTuple):
    """The decoding half of a kind of VAE: its config, its module, and what reads its weights."""

    config: Any
    module: Any
    load: Callable[..., tuple[nn.Module, Params]]


HALVES = {
    "AutoencoderKLFlux2": Half(vae.Flux2VaeConfig, vae.Flux2Decoder, vae.load_flux2),
    "AutoencoderDC": Half(dcae.DcaeConfig, dcae.Decoder, dcae.load),
}
"""By the class that vae/config.json names; every other name is left to AutoencoderKL's config, which refuses it."""


def _half(folder: Path) -> Half:
    name = str(weights.read_json(folder / "vae" / "config.json").get("_class_name"))
    return HALVES.get(name, Half(vae.VaeConfig, vae.Decoder, vae.load_vae))


def decoder(folder: Path, dtype: Any) -> vae.Decoder | vae.Flux2Decoder | dcae.Decoder:
    """The VAE's decoder, of the class that the pipeline's vae/config.json names."""
    half = _half(folder)
    return half.module(half.config.read(folder / "vae"), dtype)


def check_parts(folder: Path, found: Mapping[str, bool]) -> None:
    """WeightsError for the first false entry of {what the transformer takes and another part gives: they match}."""
    for what, fits in found.items():
        if not fits:
            raise weights.WeightsError(f"{folder}: the transformer takes {what}: the parts belong to different models")


def check_latents(x: Array, shape: tuple[int, ...]) -> None:
    """ValueError unless x is a batch of latents of the model's size."""
    if x.shape[1:] != shape:
        raise ValueError(f"latents of shape {x.shape}: this model needs [B, {', '.join(map(str, shape))}]")


def made_once(make: Callable[[config.Model, Path], Model]) -> Callable[[config.Model], Model]:
    """Turns `make`, of a config and its pipeline's folder (hub.pipeline), into a function of the config.

    The same config gives the same Model object, as jit's static arguments require. If the folder's config files
    change, it gives a new Model.
    """

    @functools.lru_cache(maxsize=8)
    def remembered(cfg: config.Model, folder: Path, digest: str) -> Model:
        return make(cfg, folder)

    @functools.wraps(make)
    def of(cfg: config.Model) -> Model:
        folder = hub.pipeline(cfg.path, configs_only=True)
        return remembered(
            cfg, folder, text.contents(folder, "model_index.json", "*/config.json", "*/scheduler_config.json")
        )

    return of


def text_modules(folder: Path, encoders: Encoders, dtype: Any) -> dict[str, nn.Module]:
    """{name: module} of the encoders, from their configs."""
    return {e.name: _module(e, folder, dtype) for e in encoders}


def _module(encoder: Encoder, folder: Path, dtype: Any) -> nn.Module:
    cfg = encoder.config.read(folder / encoder.folder)
    if isinstance(cfg, text.ClipTextConfig):
        return text.ClipText(cfg, dtype, encoder.project)
    if isinstance(cfg, qwen3.Qwen3Config):
        return qwen3.Qwen3(cfg, qwen3.ends_of(cfg, encoder.reads), dtype)
    return text.T5Encoder(cfg, dtype) if isinstance(cfg, text.T5Config) else gemma2.Gemma2(cfg, dtype)


class Readers(NamedTuple):
    """What reads a pipeline's weights; every model file has these four functions. All take its config.Model first.

    load(cfg, place, place_vae): (transformer, VAE decoder, text encoders {name: tree}) in the dtypes that `make`'s
    functions expect, whatever the files have: SD3.5's T5 is stored in float16, in which its states would overflow.
    `place` reads each leaf of the transformer, `place_vae` of the decoder; the others stay numpy. The transformer's
    weights are the folder's, or those of `cfg.weights`.
    parts(cfg, place, place_vae, place_text): an iterator over the same; each is read when it is asked for.
    shapes(cfg): what `load` returns, as ShapeDtypeStructs, from the folder's configs alone.
    token_shapes(cfg, prompts): what `tokenize` returns for that many prompts, as ShapeDtypeStructs.
    """

    load: Callable[..., tuple[Params, Params, Params]]
    parts: Callable[..., Iterator[Params]]
    shapes: Callable[[config.Model], tuple[Params, Params, Params]]
    token_shapes: Callable[[config.Model, int], PyTree]


def readers(
    make: Callable[[config.Model], Model],
    encoders: Encoders | Callable[[Path], Encoders],
    namings: tuple[Naming, ...] = (),
) -> Readers:
    """The readers of the pipelines that `make` is for. `encoders` may depend on the folder."""

    def of(cfg: config.Model) -> Encoders:
        return encoders(hub.pipeline(cfg.path, configs_only=True)) if callable(encoders) else encoders

    def each(
        cfg: config.Model,
        place: weights.Place | None = None,
        place_vae: weights.Place | None = None,
        place_text: weights.Place | None = None,
    ) -> Iterator[Params]:
        return _parts(cfg, make(cfg), of(cfg), place, place_vae, place_text, namings)

    def load(
        cfg: config.Model, place: weights.Place | None = None, place_vae: weights.Place | None = None
    ) -> tuple[Params, Params, Params]:
        base, decoder, words = each(cfg, place, place_vae)
        return base, decoder, words

    return Readers(
        load,
        each,
        lambda cfg: _shapes(cfg, make(cfg), of(cfg)),
        lambda cfg, prompts: _token_shapes(cfg, of(cfg), prompts),
    )


def _parts(
    cfg: config.Model,
    model: Model,
    encoders: Encoders,
    place: weights.Place | None = None,
    place_vae: weights.Place | None = None,
    place_text: weights.Place | None = None,
    namings: tuple[Naming, ...] = (),
) -> Iterator[Params]:
    """Yields transformer, VAE decoder and text encoders {name: tree}; each is read when it is asked for.

    They have the dtypes that `model`'s functions expect. `place`, `place_vae` and `place_text` read the leaves of each.
    The transformer's names are those of `model.keys`, or of one of `namings`.
    """
    dtype = jnp.dtype(cfg.dtype)
    tokenizers(str(hub.pipeline(cfg.path, configs_only=True)), encoders)  # fails before gigabytes are fetched
    folder = hub.pipeline(cfg.path)
    spec = jax.eval_shape(model.init, jax.random.key(0))
    files = weights.Files(network_file(cfg) or folder / "transformer", "diffusion_pytorch_model")
    naming = next((x for x in namings if x.sign in files.keys()), Naming("", model.keys, (), ()))  # noqa: SIM118
    how = {"aliases": naming.aliases, "droppable": naming.droppable}
    yield weights.load(files, spec, naming.keys, dtype=dtype, place=place, **how)  # no variable keeps it alive
    yield _half(folder).load(folder / "vae", F32, place=place_vae)[1]
    yield {e.name: _load(e, folder, dtype, place_text) for e in encoders}


def network_file(cfg: config.Model) -> Path | None:
    """The file that model.weights names; fetched if it is on the hub."""
    return hub.file(cfg.weights, ", --config.model.weights") if cfg.weights else None


def _load(encoder: Encoder, folder: Path, dtype: Any, place: weights.Place | None) -> Params:
    if encoder.config is text.T5Config:
        return text.load_t5(folder / encoder.folder, dtype, place=place)[1]
    if encoder.config is gemma2.Gemma2Config:
        return gemma2.load(folder / encoder.folder, dtype, place=place)[1]
    if encoder.config is qwen3.Qwen3Config:
        return qwen3.load(folder / encoder.folder, encoder.reads, dtype, place=place)[1]
    return text.load_clip_text(folder / encoder.folder, dtype, encoder.project, place=place)[1]


def _shapes(cfg: config.Model, model: Model, encoders: Encoders) -> tuple[Params, Params, Params]:
    """What `_parts` yields, as ShapeDtypeStructs, from the folder's configs alone."""
    folder, dtype = hub.pipeline(cfg.path, configs_only=True), jnp.dtype(cfg.dtype)
    key, half = jax.random.key(0), decoder(folder, F32)

    def decoder_init(k: Key[Array, ""]) -> Params:
        return half.init(k, jnp.zeros((1, 1, 1, half.cfg.channels)))["params"]

    def typed(tree: PyTree, to: Any) -> PyTree:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, to), tree)

    words = text_modules(folder, encoders, dtype)
    trees = {name: parameters(module, *_blank(module)) for name, module in words.items()}
    return (
        typed(jax.eval_shape(model.init, key), dtype),
        typed(jax.eval_shape(decoder_init, key), F32),
        typed(trees, dtype),
    )


def _blank(module: nn.Module) -> tuple[Array, ...]:
    return gemma2.blank() if isinstance(module, gemma2.Gemma2 | qwen3.Qwen3) else (jnp.zeros((1, 2), jnp.int32),)


def _token_shapes(cfg: config.Model, encoders: Encoders, prompts: int) -> PyTree:
    """What `tokenize` returns for that many prompts, as ShapeDtypeStructs."""
    folder = hub.pipeline(cfg.path, configs_only=True)

    def length(encoder: Encoder) -> int:
        read = encoder.config.read(folder / encoder.folder)
        return read.max_position_embeddings if isinstance(read, text.ClipTextConfig) else cfg.text_tokens

    def shapes(encoder: Encoder) -> PyTree:
        ids, mask = (jax.ShapeDtypeStruct((prompts, length(encoder)), kind) for kind in (jnp.int32, jnp.bool_))
        return {"ids": ids, "mask": mask} if encoder.masked else ids

    return {e.name: shapes(e) for e in encoders}


def tokenizers(folder: str, encoders: Encoders) -> tuple[Any, ...]:
    """transformers' tokenizers of the encoders.

    WeightsError if one is missing or does not fit its encoder: it has more tokens, or, for a CLIP, another length.
    """
    return tuple(_tokenizer(Path(folder), e, _files(Path(folder), e)) for e in encoders)


def _files(folder: Path, encoder: Encoder) -> str:
    return text.contents(folder, f"{encoder.tokenizer}/*", f"{encoder.folder}/config.json")


@functools.lru_cache(maxsize=8)
def _tokenizer(folder: Path, encoder: Encoder, digest: str) -> Any:
    """Cached by the `digest` of the files."""
    import transformers

    where, cfg = text.require_tokenizer(folder / encoder.tokenizer), encoder.config.read(folder / encoder.folder)
    kind = getattr(transformers, _KINDS[encoder.config])  # the class in model_index.json; its own file may name another
    # Gemma's files say left, its pipeline says right. The others pad as their files say.
    how = {"padding_side": "right"} if encoder.config is gemma2.Gemma2Config else {}
    found = text.read_tokenizer(kind, where, **how)
    if encoder.config is text.ClipTextConfig:
        text.check_merges(found, where)
    if len(found) > cfg.vocab_size:
        raise weights.WeightsError(f"{where} has {len(found)} tokens, its text encoder only {cfg.vocab_size}")
    if found.pad_token_id is None:
        raise weights.WeightsError(f"{Path(where) / 'tokenizer_config.json'}: pad_token is missing: download it again")
    if encoder.masked and (side := found.padding_side) != "right":
        raise weights.WeightsError(
            f"{Path(where) / 'tokenizer_config.json'}: padding_side is {side!r}: set it to 'right'"
        )
    if encoder.template and (missing := encoder.template.missing(found)):
        raise weights.WeightsError(
            f"{where} has no token {missing[0]}, which the prompt's template needs: download it again"
        )
    if isinstance(cfg, text.ClipTextConfig) and found.model_max_length != cfg.max_position_embeddings:
        raise weights.WeightsError(
            f"{Path(where) / 'tokenizer_config.json'}: model_max_length is {_length(found)}: its text encoder reads "
            f"{cfg.max_position_embeddings} tokens (max_position_embeddings)"
        )
    return found


_KINDS = {
    text.ClipTextConfig: "CLIPTokenizer",
    text.T5Config: "T5Tokenizer",
    gemma2.Gemma2Config: "GemmaTokenizer",
    qwen3.Qwen3Config: "Qwen2Tokenizer",
}


def _length(tokenizer: Any) -> str:
    """transformers gives 10**30 if there is no length."""
    return str(tokenizer.model_max_length) if tokenizer.model_max_length < 10**9 else "missing"


def tokenize(folder: str, encoders: Encoders, text_tokens: int, prompts: Sequence[str]) -> dict[str, PyTree]:
    """{name: int32 [G, L]}, padded and truncated to a CLIP's own length or to `text_tokens`.

    A prompt is put in the encoder's template first; truncation can cut the template's end.
    For a masked encoder {"ids", "mask"}: the mask is the tokenizer's own, bool [G, L], False for padding.
    """
    pad = {"padding": "max_length", "truncation": True, "return_tensors": "np"}
    found = {}
    for e, tokenizer in zip(encoders, tokenizers(folder, encoders), strict=True):
        length = tokenizer.model_max_length if e.config is text.ClipTextConfig else text_tokens
        words = [e.template.around(prompt, tokenizer) if e.template else prompt for prompt in prompts]
        read = tokenizer(words, max_length=length, **pad)
        ids, mask = read["input_ids"].astype(np.int32), read["attention_mask"].astype(bool)
        found[e.name] = {"ids": ids, "mask": mask} if e.masked else ids
    return found
