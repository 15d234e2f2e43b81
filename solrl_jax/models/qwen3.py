"""Qwen3, the text encoder of FLUX.2-klein and Z-Image: states between the layers of a causal language model.

Both pipelines put a prompt in a chat template (`KLEIN`, `Z_IMAGE`) and read residual streams, without the final norm:
klein those after layers 9, 18 and 27, Z-Image the last layer's input. Only the layers below the last state that is read
are built and loaded, as one stack (nn.scan) up to each of these states. Norms, scores and rotation are f32; products
and the residual stream are in the module's dtype.
"""

import dataclasses
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from solrl_jax import weights
from solrl_jax.config import ConfigError
from solrl_jax.models.gemma2 import blank, rope_options, rope_table, rotate
from solrl_jax.models.layers import ACTIVATIONS, F32, Linear, RMSNorm, attention, parameters
from solrl_jax.models.text import run_layers
from solrl_jax.structs import Params
from solrl_jax.weights import Place, Rule
from solrl_jax.weights.options import Options

KLEIN_TOKENS = 512
Z_IMAGE_BLOCK = 32
"""Z-Image pads the tokens of a caption, and of an image, to a multiple of this."""


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """config.json of a Qwen3; the defaults are transformers' own for missing keys."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32  # null: as many as num_attention_heads
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attention_bias: bool = False

    options: ClassVar[Options] = Options(
        "transformers",
        only={
            "model_type": ("qwen3",),
            "use_sliding_window": (None, False),
            "layer_types": (None, "full_attention"),
        },
        idle=(
            *("max_position_embeddings", "sliding_window", "max_window_layers"),  # the window is off
            *("rope_scaling", "rope_parameters"),  # checked in gemma2.rope_options
        ),
    )

    def __post_init__(self):
        if self.kv_heads < 1 or self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions rotate pairs")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not one of {sorted(ACTIVATIONS)}")
        if self.attention_bias:
            raise ValueError("attention_bias true is not known here: Qwen3-4B and Qwen3-8B have none")

    @property
    def kv_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @classmethod
    def read(cls, folder: str | Path) -> "Qwen3Config":
        """From config.json, in the spelling of old files or of transformers 5; another language model is refused."""
        file = Path(folder) / "config.json"
        raw = weights.read_json(file)
        if (kind := raw.get("model_type", "qwen3")) != "qwen3":
            raise weights.WeightsError(f"{folder} holds a {kind}, not a qwen3: give the pipeline's own text encoder")
        return weights.from_config(cls, folder, raw | rope_options(file, raw))


# --- the network ----------------------------------------------------------------------------------------------------


class Qwen3Layer(nn.Module):
    """x += o(attention(norm(x))); x += down(act(gate norm(x)) * up norm(x)); no biases. q and k are normed per head."""

    cfg: Qwen3Config
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(
        self, x: Float[Array, "G L D"], bias: Float[Array, "G 1 L L"], cos: Array, sin: Array
    ) -> Float[Array, "G L D"]:
        cfg, linear = self.cfg, partial(Linear, use_bias=False, dtype=self.dtype)
        norm, shape = partial(RMSNorm, cfg.rms_norm_eps), (*x.shape[:2], -1, cfg.head_dim)
        h, counts = norm(name="norm1")(x), (cfg.num_attention_heads, cfg.kv_heads, cfg.kv_heads)
        q, k, v = (linear(n * cfg.head_dim, name=f)(h).reshape(shape) for f, n in zip("qkv", counts, strict=True))
        q, k = (rotate(norm(name=f"{f}_norm")(y), (cos, sin)) for f, y in (("q", q), ("k", k)))
        k, v = (jnp.repeat(y, cfg.num_attention_heads // cfg.kv_heads, axis=2) for y in (k, v))
        x = x + linear(cfg.hidden_size, name="o")(attention(q, k, v, bias=bias).reshape(*x.shape[:2], -1))
        h = norm(name="norm2")(x)
        h = ACTIVATIONS[cfg.hidden_act](linear(cfg.intermediate_size, name="gate")(h)) * linear(
            cfg.intermediate_size, name="up"
        )(h)
        return x + linear(cfg.hidden_size, name="down")(h)


class Qwen3(nn.Module):
    """Token ids (the first `lengths` are the text, the rest is padding) -> the states after each of `ends` layers.

    They are concatenated along the last axis. Padding sees the text, not the padding, and has its own positions, as in
    transformers: klein's network reads its rows too.
    """

    cfg: Qwen3Config
    ends: tuple[int, ...]  # ascending, from 1 on
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, ids: Int[Array, "G L"], lengths: Int[Array, "G"]) -> Float[Array, "G L n_D"]:
        cfg, length = self.cfg, ids.shape[1]
        table = self.param("embedding", nn.initializers.normal(0.02), (cfg.vocab_size, cfg.hidden_size), F32)
        x = jnp.asarray(table)[ids].astype(self.dtype)
        seen = jnp.arange(length)[None, :] < lengths[:, None]
        seen = seen[:, None, :] & jnp.tril(jnp.ones((length, length), bool))[None]
        bias = jnp.where(seen, 0.0, -jnp.inf)[:, None]
        rope = tuple(jnp.asarray(table) for table in rope_table(length, cfg.head_dim, cfg.rope_theta))
        states = []
        for i, (first, end) in enumerate(zip((0, *self.ends), self.ends, strict=False)):
            x, _ = run_layers(Qwen3Layer(cfg, self.dtype, name=f"layers_{i}"), end - first, x, bias, *rope)
            states.append(x)
        return jnp.concatenate(states, axis=-1)


def ends_of(cfg: Qwen3Config, reads: Sequence[int]) -> tuple[int, ...]:
    """The numbers of layers after which transformers' hidden_states[i], i of `reads`, are taken; the embedding is 0.

    WeightsError if the model has too few layers. Its very last state counts as too many: transformers puts it through
    the final norm.
    """
    count = cfg.num_hidden_layers
    ends = tuple(i if i >= 0 else count + 1 + i for i in reads)
    if not (ends[0] > 0 and ends[-1] < count):
        last = max(ends[-1], 1)
        raise weights.WeightsError(
            f"num_hidden_layers is {count}: the network reads the state after layer {last}, so {last + 1} or more are "
            "needed: give the pipeline's own text encoder"
        )
    return ends


_LAYER = "layers.{layer}."
ALIASES = ((r"^model\.", ""),)  # Qwen3ForCausalLM's prefix; a Qwen3Model has none


def keys(ends: Sequence[int]) -> tuple[Rule, ...]:
    """The key table of a Qwen3 with these `ends`."""
    rules = [Rule("embedding", "embed_tokens.weight")]
    for i, first in enumerate((0, *ends[:-1])):
        at = f"layers_{i}/"
        rules += [
            Rule(at + r"(q|k|v|o)/kernel", _LAYER + r"self_attn.\1_proj.weight", "linear", first=first),
            Rule(at + r"(gate|up|down)/kernel", _LAYER + r"mlp.\1_proj.weight", "linear", first=first),
            Rule(at + r"(q|k)_norm/scale", _LAYER + r"self_attn.\1_norm.weight", first=first),
            Rule(at + "norm1/scale", _LAYER + "input_layernorm.weight", first=first),
            Rule(at + "norm2/scale", _LAYER + "post_attention_layernorm.weight", first=first),
        ]
    return tuple(rules)


def droppable(cfg: Qwen3Config, ends: Sequence[int]) -> tuple[str, ...]:
    """What a file of the whole model also holds: the head, the final norm, the layers after the last state."""
    above = "|".join(map(str, range(ends[-1], cfg.num_hidden_layers)))
    return r"lm_head\.weight", r"norm\.weight", r".*rotary_emb\.inv_freq", rf"layers\.({above})\..*"


def load(
    folder: str | Path, reads: Sequence[int], dtype: Any = jnp.bfloat16, place: Place | None = None
) -> tuple[Qwen3, Params]:
    """Module and parameters (in `dtype`; numpy, or the results of `place`) of a folder in transformers' layout."""
    cfg = Qwen3Config.read(folder)
    ends = ends_of(cfg, reads)
    module = Qwen3(cfg, ends, dtype)
    spec = parameters(module, *blank())
    how = {"aliases": ALIASES, "droppable": droppable(cfg, ends), "place": place}
    return module, weights.load(weights.Files(folder, "model"), spec, keys(ends), dtype=dtype, **how)


# --- the text -------------------------------------------------------------------------------------------------------


class Template(NamedTuple):
    """What stands before and after a prompt: what the tokenizer's chat template makes of one message of a user."""

    before: str
    after: str

    def around(self, prompt: str, tokenizer: Any) -> str:
        """The whole text. A special word of the tokenizer that stands in the prompt, as "<|im_end|>", would end the
        message: it becomes plain text, "< |im_end|>"."""
        special = "|".join(re.escape(x[1:]) for x in tokenizer.get_added_vocab() if x.startswith("<"))
        return f"{self.before}{re.sub(f'<(?={special})', '< ', prompt)}{self.after}"

    def missing(self, tokenizer: Any) -> list[str]:
        """The template's special words that are not tokens of the tokenizer."""
        return [x for x in re.findall(r"<[^<>]+>", self.before + self.after) if x not in tokenizer.get_added_vocab()]


# klein asks for no thinking, which adds an empty thought; Z-Image asks for thinking, which adds nothing.
KLEIN = Template("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
Z_IMAGE = Template("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")


def check_klein_tokens(text_tokens: int) -> None:
    """ConfigError unless a prompt has klein's 512 tokens, all of which its network attends to."""
    if text_tokens != KLEIN_TOKENS:
        raise ConfigError(
            f"model.text_tokens={text_tokens}: FLUX.2-klein attends to all of its {KLEIN_TOKENS} tokens, padding too: "
            f"use {KLEIN_TOKENS}"
        )


def check_z_image_tokens(text_tokens: int) -> None:
    """ConfigError unless a prompt's tokens are a multiple of 32, to which Z-Image fills every caption up."""
    if text_tokens % Z_IMAGE_BLOCK:
        fits = text_tokens + -text_tokens % Z_IMAGE_BLOCK
        raise ConfigError(
            f"model.text_tokens={text_tokens}: Z-Image fills captions up to a multiple of {Z_IMAGE_BLOCK} tokens: use "
            f"{fits}"
        )
