"""The text encoders of FLUX and SD3.5: CLIP text towers and the encoder half of T5 v1.1, as transformers has them.

Neither masks padding: CLIP is causal and its first end-of-text token is used; T5 always sees its padding in these
pipelines. The layers of each are one nn.scan (weights stacked on a leading axis). Norms and softmax are f32; products
and the residual stream are in the module's dtype.
"""

import dataclasses
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from solrl_jax import weights
from solrl_jax.models.layers import ACTIVATIONS, F32, LayerNorm, Linear, RMSNorm, attention, gelu_tanh, parameters
from solrl_jax.structs import Params
from solrl_jax.weights import Place, Rule
from solrl_jax.weights.options import Options

_table = nn.initializers.normal(0.02)


def run_layers(layer: nn.Module, count: int, x: Array, *context: Array | None) -> tuple[Array, Array]:
    """`count` layers x -> layer(x, *context), each with its own weights: the result, and the input of the last one."""

    def step(layer, carry, _):
        x, _ = carry
        return (layer(x, *context), x), None

    scan = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=count)
    return scan(layer, (x, x), None)[0]


def require_tokenizer(folder: str | Path) -> str:
    """The folder, if it holds a tokenizer's files; without them transformers would silently make up a tokenizer."""
    names = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
    if not any((Path(folder) / name).is_file() for name in names):
        raise weights.WeightsError(f"{folder} holds no tokenizer, none of {', '.join(names)}: download it again")
    return str(folder)


def read_tokenizer(kind: Any, where: str, **how: Any) -> Any:
    """The tokenizer of class `kind` of transformers in a folder. WeightsError if its files cannot be read."""
    try:
        found = kind.from_pretrained(where, **how)
    except Exception as e:  # any kind: the files are the user's and the reader is transformers
        said = " ".join(str(e).split())[:200]
        raise weights.WeightsError(
            f"{where}: transformers cannot read its tokenizer ({said}): download it again"
        ) from e
    return found


def check_merges(tokenizer: Any, where: str) -> None:
    """WeightsError if a word of a CLIP's vocabulary has no merge that makes it.

    With an empty or shortened merges.txt transformers silently spells such words in letters.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    made = {a + b for a, b in model["merges"]} | tokenizer.get_added_vocab().keys()
    words = [word for word in model["vocab"] if len(word.removesuffix("</w>")) > 1 and not word.startswith("<|")]
    lone = [word for word in words if word not in made]  # <|startoftext|> and <|endoftext|> have none
    if lone:
        first = min(lone, key=model["vocab"].get)
        raise weights.WeightsError(
            f"{where}: no merge makes {first!r} and {len(lone) - 1} other words of its vocabulary, so merges.txt is "
            "cut or of another tokenizer: download it again"
        )


def contents(folder: Path, *patterns: str) -> str:
    """A digest of the names and bytes of the files that match `patterns`: it changes if any of them changes."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}):
        data = file.read_bytes()
        digest.update(f"{file.relative_to(folder)} {len(data)}\n".encode() + data)
    return digest.hexdigest()


# ---- CLIP


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """config.json of a CLIP text encoder; the defaults are transformers' own for missing keys."""

    vocab_size: int = 49408
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int = 512

    options: ClassVar[Options] = Options(
        "transformers", only={"model_type": ("clip_text_model",)}, idle=("bos_token_id", "pad_token_id")
    )

    def __post_init__(self):
        check_layer_config(self)

    @classmethod
    def read(cls, folder: str | Path) -> "ClipTextConfig":
        return weights.from_config(cls, folder)


def check_layer_config(cfg: Any) -> None:
    """The conditions on both CLIP towers' configs."""
    if cfg.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act {cfg.hidden_act!r} is not known here: it must be one of {sorted(ACTIVATIONS)}")
    if cfg.hidden_size % cfg.num_attention_heads:
        raise ValueError(
            f"hidden_size {cfg.hidden_size} does not divide into {cfg.num_attention_heads} heads (num_attention_heads)"
        )


class ClipLayer(nn.Module):
    """x += attention(LN x); x += fc2(act(fc1(LN x))): the block of both CLIP towers."""

    cfg: Any  # ClipTextConfig or ClipVisionConfig: both use the same names
    dtype: Any = jnp.bfloat16
    pairs: bool = False  # see Linear

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], bias: Float[Array, "#B #H S S"] | None = None
    ) -> Float[Array, "B S D"]:
        cfg, linear = self.cfg, partial(Linear, dtype=self.dtype, pairs=self.pairs)
        heads = (*x.shape[:2], cfg.num_attention_heads, -1)
        h = LayerNorm(cfg.layer_norm_eps, name="norm1")(x)
        q, k, v = (linear(cfg.hidden_size, name=name)(h).reshape(heads) for name in "qkv")
        o = attention(q, k, v, bias=bias).reshape(x.shape)
        x = x + linear(cfg.hidden_size, name="out")(o)
        h = LayerNorm(cfg.layer_norm_eps, name="norm2")(x)
        h = ACTIVATIONS[cfg.hidden_act](linear(cfg.intermediate_size, name="fc1")(h))
        return x + linear(cfg.hidden_size, name="fc2")(h)


class ClipOutput(NamedTuple):
    last: Float[Array, "G L D"]  # after the final norm
    pooled: Float[Array, "G D"]  # `last` at the first end-of-text token; projected if `project`
    penultimate: Float[Array, "G L D"]  # transformers' hidden_states[-2]: the last layer's input, no norm; for SD3


class ClipText(nn.Module):
    """CLIP's text tower. `project` adds the bias-free projection of `pooled` to cfg.projection_dim."""

    cfg: ClipTextConfig
    dtype: Any = jnp.bfloat16
    project: bool = False

    @nn.compact
    def __call__(self, ids: Int[Array, "G L"]) -> ClipOutput:
        cfg, length = self.cfg, ids.shape[1]
        tokens = self.param("token_embedding", _table, (cfg.vocab_size, cfg.hidden_size), F32)
        positions = self.param("position_embedding", _table, (cfg.max_position_embeddings, cfg.hidden_size), F32)
        x = jnp.asarray(tokens)[ids].astype(F32) + jnp.asarray(positions[None, :length], F32)
        causal = jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0.0, -jnp.inf)[None, None]
        layer = ClipLayer(cfg, self.dtype, name="layers")
        x, penultimate = run_layers(layer, cfg.num_hidden_layers, x.astype(self.dtype), causal)
        last = LayerNorm(cfg.layer_norm_eps, name="final_norm")(x)
        # Configs older than transformers 4.30 say 2, which is never the end token: the largest id is.
        is_end = ids if cfg.eos_token_id == 2 else ids == cfg.eos_token_id
        pooled = last[jnp.arange(len(ids)), jnp.argmax(is_end, axis=-1)]
        if self.project:
            pooled = Linear(cfg.projection_dim, use_bias=False, dtype=self.dtype, name="projection")(pooled)
        return ClipOutput(last, pooled, penultimate)


def clip_layer_rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Rules of one tower's stacked layers; `ours` is a path prefix, `theirs` the tower's key prefix without its dot."""
    layer = theirs + ".encoder.layers.{layer}"
    return (
        Rule(ours + r"layers/(q|k|v|out)/kernel", layer + r".self_attn.\1_proj.weight", "linear"),
        Rule(ours + r"layers/(q|k|v|out)/bias", layer + r".self_attn.\1_proj.bias"),
        Rule(ours + r"layers/(fc1|fc2)/kernel", layer + r".mlp.\1.weight", "linear"),
        Rule(ours + r"layers/(fc1|fc2)/bias", layer + r".mlp.\1.bias"),
        Rule(ours + r"layers/norm(1|2)/scale", layer + r".layer_norm\1.weight"),
        Rule(ours + r"layers/norm(1|2)/bias", layer + r".layer_norm\1.bias"),
    )


def clip_text_rules(ours: str = "") -> tuple[Rule, ...]:
    """The key table of a ClipText whose parameters are under the path `ours`."""
    return (
        Rule(ours + r"(token|position)_embedding", r"text_model.embeddings.\1_embedding.weight"),
        *clip_layer_rules(ours, "text_model"),
        Rule(ours + r"final_norm/scale", "text_model.final_layer_norm.weight"),
        Rule(ours + r"final_norm/bias", "text_model.final_layer_norm.bias"),
        Rule(ours + r"projection/kernel", "text_projection.weight", "linear"),
    )


CLIP_TEXT_KEYS = clip_text_rules()
# transformers 5 saves a CLIPTextModel without the prefix that every public file has.
CLIP_TEXT_ALIASES = ((r"^(?=(embeddings|encoder|final_layer_norm)\.)", "text_model."),)
CLIP_TEXT_DROPPABLE = (r".*\.position_ids", r"text_projection\.weight")


def load_clip_text(
    folder: str | Path, dtype: Any = jnp.bfloat16, project: bool = False, place: Place | None = None
) -> tuple[ClipText, Params]:
    """Module and parameters (in `dtype`; numpy, or the results of `place`) of a folder in transformers' layout.

    FLUX uses the pooled state without projection. SD3 needs project=True, and text_projection.weight in the file.
    """
    module = ClipText(ClipTextConfig.read(folder), dtype, project)
    how = {"aliases": CLIP_TEXT_ALIASES, "droppable": CLIP_TEXT_DROPPABLE}
    return module, _load(module, folder, CLIP_TEXT_KEYS, place=place, **how)


# ---- T5


@dataclasses.dataclass(frozen=True)
class T5Config:
    """config.json of a T5 v1.1 encoder; the defaults are transformers' own for missing keys."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    feed_forward_proj: str = "relu"
    layer_norm_epsilon: float = 1e-6

    options: ClassVar[Options] = Options(
        "transformers",
        # Files of transformers 4 also state these, which follow from gated-gelu.
        only={
            "model_type": ("t5",),
            "dense_act_fn": ("gelu_new",),
            "is_gated_act": (True,),
            "is_decoder": (False, None),
        },
        idle=("num_decoder_layers", "n_positions", "scale_decoder_outputs", "output_past"),
    )

    def __post_init__(self):
        if self.feed_forward_proj != "gated-gelu":
            raise ValueError(f"feed_forward_proj {self.feed_forward_proj!r}: only T5 v1.1 ('gated-gelu') is known here")

    @classmethod
    def read(cls, folder: str | Path) -> "T5Config":
        return weights.from_config(cls, folder)


def t5_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """int32 [query, key]: the row of the bias table for each distance key - query.

    The upper half is for keys after the query. Within a half, the first half of the rows are single distances; the rest
    are logarithmically growing ranges up to `max_distance`; all larger distances share the last row.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    far = np.log(np.maximum(np.abs(distance), 1) / exact) / np.log(max_distance / exact) * (half - exact)
    row = np.where(np.abs(distance) < exact, np.abs(distance), np.minimum(exact + far.astype(np.int32), half - 1))
    return (row + np.where(distance > 0, half, 0)).astype(np.int32)


class T5Layer(nn.Module):
    """x += attention(RMS x); x += wo(gelu(wi_0 RMS x) * wi_1 RMS x); no biases, and no 1/sqrt(d) on the scores."""

    cfg: T5Config
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Float[Array, "G L D"], bias: Float[Array, "1 H L L"]) -> Float[Array, "G L D"]:
        cfg, linear = self.cfg, partial(Linear, use_bias=False, dtype=self.dtype)
        inner, heads = cfg.num_heads * cfg.d_kv, (*x.shape[:2], cfg.num_heads, cfg.d_kv)
        h = RMSNorm(cfg.layer_norm_epsilon, name="norm1")(x)
        q, k, v = (linear(inner, name=name)(h).reshape(heads) for name in "qkv")
        o = attention(q, k, v, scale=1.0, bias=bias).reshape(*x.shape[:2], inner)
        x = x + linear(cfg.d_model, name="o")(o)
        h = RMSNorm(cfg.layer_norm_epsilon, name="norm2")(x)
        h = gelu_tanh(linear(cfg.d_ff, name="wi_0")(h)) * linear(cfg.d_ff, name="wi_1")(h)
        return x + linear(cfg.d_model, name="wo")(h)


class T5Encoder(nn.Module):
    """T5 v1.1's encoder. The public files keep the only bias table in layer 0; here it is outside the layers."""

    cfg: T5Config
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, ids: Int[Array, "G L"]) -> Float[Array, "G L D"]:
        cfg, length = self.cfg, ids.shape[1]
        words = self.param("embedding", _table, (cfg.vocab_size, cfg.d_model), F32)
        rows = t5_buckets(length, cfg.relative_attention_num_buckets, cfg.relative_attention_max_distance)
        table = self.param("relative_bias", _table, (cfg.relative_attention_num_buckets, cfg.num_heads), F32)
        bias = jnp.asarray(table, F32)[rows].transpose(2, 0, 1)[None]
        x = jnp.asarray(words)[ids].astype(self.dtype)
        x, _ = run_layers(T5Layer(cfg, self.dtype, name="layers"), cfg.num_layers, x, bias)
        return RMSNorm(cfg.layer_norm_epsilon, name="final_norm")(x)


_BLOCK = "encoder.block.{layer}.layer."
T5_KEYS = (
    Rule(r"embedding", "shared.weight"),
    Rule(r"relative_bias", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    Rule(r"layers/(q|k|v|o)/kernel", _BLOCK + r"0.SelfAttention.\1.weight", "linear"),
    Rule(r"layers/(wi_0|wi_1|wo)/kernel", _BLOCK + r"1.DenseReluDense.\1.weight", "linear"),
    Rule(r"layers/norm1/scale", _BLOCK + "0.layer_norm.weight"),
    Rule(r"layers/norm2/scale", _BLOCK + "1.layer_norm.weight"),
    Rule(r"final_norm/scale", "encoder.final_layer_norm.weight"),
)
T5_ALIASES = ((r"^encoder\.embed_tokens\.weight$", "shared.weight"),)  # a copy of shared.weight, or the only one


def load_t5(folder: str | Path, dtype: Any = jnp.bfloat16, place: Place | None = None) -> tuple[T5Encoder, Params]:
    """Module and parameters (in `dtype`; numpy, or the results of `place`) of a folder in transformers' layout."""
    module = T5Encoder(T5Config.read(folder), dtype)
    return module, _load(module, folder, T5_KEYS, place=place, aliases=T5_ALIASES, copies=("shared.weight",))


def _load(module: ClipText | T5Encoder, folder: str | Path, keys: tuple[Rule, ...], **how: Any) -> Params:
    spec = parameters(module, jnp.zeros((1, 2), jnp.int32))
    return weights.load(weights.Files(folder, "model"), spec, keys, dtype=module.dtype, **how)
