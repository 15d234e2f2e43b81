"""The network of the package image-reward: BLIP's ViT, its BERT with cross-attention to the picture (MED), and
ImageReward's head.

The features are those of BLIP's image-text matching, except that the first token stays [CLS].
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from solrl_jax import weights
from solrl_jax.models.convolutions import conv
from solrl_jax.models.layers import ACTIVATIONS, F32, LayerNorm, Linear, attention, in_pairs, parameters
from solrl_jax.models.text import ClipLayer, check_layer_config, run_layers
from solrl_jax.rewards.clip_tower import ClipVisionConfig
from solrl_jax.structs import Params, PerSample, WeightsError
from solrl_jax.weights import Rule
from solrl_jax.weights.options import Options

HEAD = (1024, 128, 64, 16, 1)
_table = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class BlipVisionConfig(ClipVisionConfig):
    """ImageReward's ViT-L/16, which none of its files describes."""

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class MedConfig:
    """med_config.json; the defaults are the public file's. Its encoder_width is wrong for the pictures and unused."""

    vocab_size: int = 30524
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12

    options: ClassVar[Options] = Options(
        "transformers",
        only={
            "model_type": ("bert",),
            "position_embedding_type": ("absolute",),
            "is_decoder": (False, None),
            "add_cross_attention": (True,),
        },
        idle=("encoder_width", "type_vocab_size", "vision_config", "pad_token_id"),
    )

    def __post_init__(self):
        check_layer_config(self)


@dataclasses.dataclass(frozen=True)
class BlipConfig:
    """The defaults are ImageReward's."""

    vision: BlipVisionConfig = BlipVisionConfig()
    text: MedConfig = MedConfig()

    @classmethod
    def read(cls, folder: str | Path) -> "BlipConfig":
        """From med_config.json if it exists, with its "vision_config", which the public file does not have."""
        if not (Path(folder) / "med_config.json").is_file():
            return cls()
        values = weights.read_json(Path(folder) / "med_config.json")
        vision = values.get("vision_config") or {}
        if not isinstance(vision, dict):
            raise WeightsError(f"{Path(folder) / 'med_config.json'}: vision_config is {vision!r}, not an object")
        return cls(
            weights.from_config(BlipVisionConfig, folder, vision, "med_config.json"),
            weights.from_config(MedConfig, folder, values, "med_config.json"),
        )


class BlipVision(nn.Module):
    """Normalised pixels -> the states of the class token and of all patches, after the final norm."""

    cfg: BlipVisionConfig
    dtype: Any = F32
    pairs: bool = False  # see Linear

    @nn.compact
    def __call__(self, pixels: Float[Array, "B H W c"]) -> Float[Array, "B S W_"]:
        cfg, patch = self.cfg, (self.cfg.patch_size, self.cfg.patch_size)
        width, count = cfg.hidden_size, (cfg.image_size // cfg.patch_size) ** 2
        embed = conv(width, patch, strides=patch, padding="VALID", dtype=self.dtype, name="patch_embedding")
        patches = embed(pixels).astype(F32).reshape(-1, count, width)
        first = jnp.asarray(self.param("class_embedding", _table, (1, 1, width), F32))
        positions = jnp.asarray(self.param("position_embedding", _table, (1, 1 + count, width), F32))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(pixels), 1, width)), patches], axis=1) + positions
        x, _ = run_layers(ClipLayer(cfg, self.dtype, self.pairs, name="layers"), cfg.num_hidden_layers, x, None)
        return LayerNorm(cfg.layer_norm_eps, name="norm")(x)


class MedAttention(nn.Module):
    """LN(x + attention from x to `memory`)."""

    cfg: MedConfig
    dtype: Any = F32
    pairs: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], memory: Float[Array, "B S M"], bias: Float[Array, "#B #H L S"] | None = None
    ) -> Float[Array, "B L D"]:
        cfg, linear = self.cfg, partial(Linear, self.cfg.hidden_size, dtype=self.dtype, pairs=self.pairs)
        q, k, v = (
            linear(name=name)(given).reshape(*given.shape[:2], cfg.num_attention_heads, -1)
            for name, given in (("q", x), ("k", memory), ("v", memory))
        )
        o = attention(q, k, v, bias=bias).reshape(x.shape)
        return LayerNorm(cfg.layer_norm_eps, name="norm")(x + linear(name="out")(o))


class MedLayer(nn.Module):
    """BERT's layer (post-norm), with cross-attention to the picture between self-attention and the MLP."""

    cfg: MedConfig
    dtype: Any = F32
    pairs: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], bias: Float[Array, "B 1 L L"], picture: Float[Array, "B S M"]
    ) -> Float[Array, "B L D"]:
        cfg, linear = self.cfg, partial(Linear, dtype=self.dtype, pairs=self.pairs)
        x = MedAttention(cfg, self.dtype, self.pairs, name="words")(x, x, bias)
        x = MedAttention(cfg, self.dtype, self.pairs, name="picture")(x, picture)
        h = ACTIVATIONS[cfg.hidden_act](linear(cfg.intermediate_size, name="fc1")(x))
        return LayerNorm(cfg.layer_norm_eps, name="norm")(x + linear(cfg.hidden_size, name="fc2")(h))


class MedText(nn.Module):
    """Words of G prompts and B pictures -> B states of the first token. Picture i belongs to prompt i // (B // G).

    Only the embeddings are computed once per prompt: from the first layer on, every state depends on a picture.
    """

    cfg: MedConfig
    dtype: Any = F32
    pairs: bool = False

    @nn.compact
    def __call__(
        self, ids: Int[Array, "G L"], mask: Bool[Array, "G L"], picture: Float[Array, "B S M"]
    ) -> Float[Array, "B D"]:
        cfg, (groups, length) = self.cfg, ids.shape
        if len(picture) % groups:
            raise ValueError(f"{len(picture)} images of {groups} prompts: each prompt must have the same number")
        words = self.param("word_embedding", _table, (cfg.vocab_size, cfg.hidden_size), F32)
        positions = self.param("position_embedding", _table, (cfg.max_position_embeddings, cfg.hidden_size), F32)
        x = jnp.asarray(words)[ids].astype(F32) + jnp.asarray(positions[None, :length], F32)
        x = LayerNorm(cfg.layer_norm_eps, name="norm")(x)
        bias = jnp.where(mask, 0.0, -1e4)[:, None, None, :]
        bias = jnp.broadcast_to(bias, (groups, 1, length, length))
        x, bias = (jnp.repeat(each, len(picture) // groups, axis=0) for each in (x, bias))
        x, _ = run_layers(MedLayer(cfg, self.dtype, self.pairs, name="layers"), cfg.num_hidden_layers, x, bias, picture)
        return x[:, 0]


class Blip(nn.Module):
    """ImageReward before its scores are standardised: one f32 number per picture and its prompt.

    The blocks' products are in `dtype`; the residual streams, norms and the head are f32, as in clip_tower,
    which describes `pairs`.
    """

    cfg: BlipConfig
    dtype: Any = F32
    pairs: bool | None = None

    @nn.compact
    def __call__(self, pixels: Float[Array, "B H W 3"], ids: Int[Array, "G L"], mask: Bool[Array, "G L"]) -> PerSample:
        how = self.dtype, in_pairs(self.dtype, self.pairs)
        picture = BlipVision(self.cfg.vision, *how, name="vision")(pixels)
        x = MedText(self.cfg.text, *how, name="text")(ids, mask, picture)
        for i, width in enumerate(HEAD):  # no activations: the published weights were trained without
            x = Linear(width, dtype=F32, name=f"head_{i}")(x)
        return x[:, 0]


def _linear_rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    return Rule(ours + "/kernel", theirs + ".weight", "linear"), Rule(ours + "/bias", theirs + ".bias")


def _norm_rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    return Rule(ours + "/scale", theirs + ".weight"), Rule(ours + "/bias", theirs + ".bias")


_VIT, _BERT = "blip.visual_encoder.", "blip.text_encoder."
_BLOCK, _LAYER = _VIT + "blocks.{layer}.", _BERT + "encoder.layer.{layer}."
KEYS = (
    Rule("vision/class_embedding", _VIT + "cls_token"),
    Rule("vision/position_embedding", _VIT + "pos_embed"),
    Rule("vision/patch_embedding/kernel", _VIT + "patch_embed.proj.weight", "conv"),
    Rule("vision/patch_embedding/bias", _VIT + "patch_embed.proj.bias"),
    *(Rule(f"vision/layers/{x}/kernel", _BLOCK + "attn.qkv.weight", "linear", (i, 3)) for i, x in enumerate("qkv")),
    *(Rule(f"vision/layers/{x}/bias", _BLOCK + "attn.qkv.bias", "same", (i, 3)) for i, x in enumerate("qkv")),
    *_linear_rules("vision/layers/out", _BLOCK + "attn.proj"),
    *_linear_rules("vision/layers/(fc1|fc2)", _BLOCK + r"mlp.\1"),
    *_norm_rules("vision/layers/(norm1|norm2)", _BLOCK + r"\1"),
    *_norm_rules("vision/norm", _VIT + "norm"),
    Rule("text/(word|position)_embedding", _BERT + r"embeddings.\1_embeddings.weight"),
    *_norm_rules("text/norm", _BERT + "embeddings.LayerNorm"),
    *(
        rule
        for ours, theirs in (("text/layers/words/", "attention."), ("text/layers/picture/", "crossattention."))
        for rule in (
            *_linear_rules(ours + "q", _LAYER + theirs + "self.query"),
            *_linear_rules(ours + "k", _LAYER + theirs + "self.key"),
            *_linear_rules(ours + "v", _LAYER + theirs + "self.value"),
            *_linear_rules(ours + "out", _LAYER + theirs + "output.dense"),
            *_norm_rules(ours + "norm", _LAYER + theirs + "output.LayerNorm"),
        )
    ),
    *_linear_rules("text/layers/fc1", _LAYER + "intermediate.dense"),
    *_linear_rules("text/layers/fc2", _LAYER + "output.dense"),
    *_norm_rules("text/layers/norm", _LAYER + "output.LayerNorm"),
    *(rule for i, j in enumerate((0, 2, 4, 6, 7)) for rule in _linear_rules(f"head_{i}", f"mlp.layers.{j}")),
)
DROPPABLE = (r"blip\.text_encoder\.embeddings\.position_ids", r"blip\.(vision|text)_proj\.(weight|bias)")
"""A buffer, and BLIP's projections for retrieval, which the score does not use."""


def shapes(module: Blip) -> Params:
    """The module's parameters as ShapeDtypeStructs, f32."""
    cfg = module.cfg.vision
    pixels = jnp.zeros((1, cfg.image_size, cfg.image_size, cfg.num_channels))
    ids = jnp.zeros((1, 2), jnp.int32)
    return parameters(module, pixels, ids, ids == 0)


def load(file: str | Path, module: Blip) -> Params:
    """f32 parameters (numpy) of ImageReward.pt, or of the same tensors as safetensors."""
    files = weights.Files(file)
    if not any(key.startswith("blip.") for key in files.keys()):  # noqa: SIM118
        raise WeightsError(f"{file} holds another model, without BLIP: give ImageReward.pt")
    return weights.load(files, shapes(module), KEYS, dtype=F32, droppable=DROPPABLE)
