"""Gemma-2, SANA's text encoder: a causal language model of which the last states are used (transformers' Gemma2Model).

Rotary positions, grouped-query attention, scores capped at 50 by a tanh, norms before and after both halves of a layer.
One nn.scan over the layers. Norms, scores and rotation are f32; products and the residual stream are in the module's
dtype.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from solrl_jax import weights
from solrl_jax.models.layers import ACTIVATIONS, F32, Linear, RMSNorm, attention, parameters
from solrl_jax.models.text import run_layers
from solrl_jax.structs import Params
from solrl_jax.weights import Place, Rule
from solrl_jax.weights.options import Options


@dataclasses.dataclass(frozen=True)
class Gemma2Config:
    """config.json of a Gemma-2; the defaults are transformers' own for missing keys, which are the 2B model's."""

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    query_pre_attn_scalar: int = 256
    attn_logit_softcapping: float | None = 50.0  # null: off
    sliding_window: int = 4096
    attention_bias: bool = False

    options: ClassVar[Options] = Options(
        "transformers",
        only={"model_type": ("gemma2",), "use_bidirectional_attention": (None, False)},
        # Texts are never longer than sliding_window, so layers of both types see the whole text.
        idle=(
            *("layer_types", "max_position_embeddings", "hidden_act", "final_logit_softcapping"),
            "sliding_window_size",
            *("rope_scaling", "rope_parameters"),  # checked in rope_options
        ),
    )

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions rotate pairs")
        if self.hidden_activation not in ACTIVATIONS:
            raise ValueError(f"hidden_activation {self.hidden_activation!r} is not one of {sorted(ACTIVATIONS)}")
        if self.attn_logit_softcapping is not None and not self.attn_logit_softcapping > 0:
            raise ValueError(f"attn_logit_softcapping {self.attn_logit_softcapping} is neither above 0 nor null")
        if self.attention_bias:
            raise ValueError("attention_bias true is not known here: Gemma-2 has none")

    @classmethod
    def read(cls, folder: str | Path) -> "Gemma2Config":
        """From config.json, in the spelling of old files or of transformers 5; another language model is refused."""
        raw = weights.read_json(Path(folder) / "config.json")
        if (kind := raw.get("model_type", "gemma2")) != "gemma2":
            raise weights.WeightsError(f"{folder} holds a {kind}, not a gemma2: give SANA's text encoder")
        return weights.from_config(cls, folder, raw | rope_options(Path(folder) / "config.json", raw))


def rope_options(file: Path, raw: Mapping[str, Any]) -> dict[str, float]:
    """rope_theta if the file has it in an object; WeightsError for another kind of rotary positions."""
    found = {}
    for key in ("rope_scaling", "rope_parameters"):
        given = raw.get(key) or {}
        plain = isinstance(given, Mapping) and given.get("rope_type", given.get("type", "default")) == "default"
        if not plain or set(given) - {"rope_type", "type", "rope_theta"}:
            raise weights.WeightsError(f"{file}: {key} is {given!r}: only rope_type 'default' is known here")
        found |= {"rope_theta": given["rope_theta"]} if "rope_theta" in given else {}
    if raw.get("rope_scaling") and raw.get("rope_parameters"):
        raise weights.WeightsError(f"{file}: rope_scaling and rope_parameters are both given: remove rope_scaling")
    return found


def rope_table(length: int, width: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and signed sin, f32 [length, width], for positions from 0 on; a pair is (k, k + width/2)."""
    angle = np.arange(length)[:, None] * theta ** (-np.arange(0, width, 2) / width)[None, :]
    angle, sign = np.concatenate([angle, angle], axis=-1), np.repeat([-1.0, 1.0], width // 2)
    return np.cos(angle).astype(np.float32), (sign * np.sin(angle)).astype(np.float32)


def rotate(x: Float[Array, "G L H d"], rope: tuple[Array, Array]) -> Float[Array, "G L H d"]:
    cos, sin = (jnp.asarray(table)[None, :, None, :] for table in rope)
    return (x.astype(F32) * cos + jnp.roll(x.astype(F32), x.shape[-1] // 2, axis=-1) * sin).astype(x.dtype)


class Gemma2Layer(nn.Module):
    """x += norm(attention(norm(x))); x += norm(down(act(gate norm(x)) * up norm(x))); no biases."""

    cfg: Gemma2Config
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(
        self, x: Float[Array, "G L D"], bias: Float[Array, "G 1 L L"], cos: Array, sin: Array
    ) -> Float[Array, "G L D"]:
        cfg, linear = self.cfg, partial(Linear, use_bias=False, dtype=self.dtype)
        norm = partial(RMSNorm, cfg.rms_norm_eps, offset=1.0)
        h, shape = norm(name="norm1")(x), (*x.shape[:2], -1, cfg.head_dim)
        counts = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.num_key_value_heads
        q, k, v = (linear(n * cfg.head_dim, name=f)(h).reshape(shape) for f, n in zip("qkv", counts, strict=True))
        q, k = (rotate(y, (cos, sin)) for y in (q, k))
        k, v = (jnp.repeat(y, cfg.num_attention_heads // cfg.num_key_value_heads, axis=2) for y in (k, v))
        scale, cap = cfg.query_pre_attn_scalar**-0.5, cfg.attn_logit_softcapping
        o = attention(q, k, v, scale=scale, bias=bias, softcap=cap).reshape(*x.shape[:2], -1)
        x = x + norm(name="norm2")(linear(cfg.hidden_size, name="o")(o))
        h = norm(name="norm3")(x)
        h = ACTIVATIONS[cfg.hidden_activation](linear(cfg.intermediate_size, name="gate")(h)) * linear(
            cfg.intermediate_size, name="up"
        )(h)
        return x + norm(name="norm4")(linear(cfg.hidden_size, name="down")(h))


class Gemma2(nn.Module):
    """Token ids (the first `lengths` are the text, the rest is padding) -> the states after the final norm."""

    cfg: Gemma2Config
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, ids: Int[Array, "G L"], lengths: Int[Array, "G"]) -> Float[Array, "G L D"]:
        cfg, length = self.cfg, ids.shape[1]
        table = self.param("embedding", nn.initializers.normal(0.02), (cfg.vocab_size, cfg.hidden_size), F32)
        x = jnp.asarray(table)[ids].astype(F32) * cfg.hidden_size**0.5
        seen = jnp.arange(length)[None, :] < lengths[:, None]
        seen = seen[:, None, :] & jnp.tril(jnp.ones((length, length), bool))[None]
        bias = jnp.where(seen, 0.0, -jnp.inf)[:, None]
        rope = (jnp.asarray(table) for table in rope_table(length, cfg.head_dim, cfg.rope_theta))
        layer = Gemma2Layer(cfg, self.dtype, name="layers")
        x, _ = run_layers(layer, cfg.num_hidden_layers, x.astype(self.dtype), bias, *rope)
        return RMSNorm(cfg.rms_norm_eps, offset=1.0, name="final_norm")(x)


def blank() -> tuple[Int[Array, "1 2"], Int[Array, "1"]]:
    """Arguments of `init` for finding the parameters' shapes."""
    return jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32)


_LAYER = "layers.{layer}."
_NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")
KEYS = (
    Rule("embedding", "embed_tokens.weight"),
    Rule(r"layers/(q|k|v|o)/kernel", _LAYER + r"self_attn.\1_proj.weight", "linear"),
    Rule(r"layers/(gate|up|down)/kernel", _LAYER + r"mlp.\1_proj.weight", "linear"),
    *(Rule(f"layers/norm{i}/scale", f"{_LAYER}{name}_layernorm.weight") for i, name in enumerate(_NORMS, 1)),
    Rule("final_norm/scale", "norm.weight"),
)
ALIASES = ((r"^model\.", ""),)  # the prefix in files of a whole language model, with its head
DROPPABLE = (r"lm_head\.weight", r".*rotary_emb\.inv_freq")


def load(folder: str | Path, dtype: Any = jnp.bfloat16, place: Place | None = None) -> tuple[Gemma2, Params]:
    """Module and parameters (in `dtype`; numpy, or the results of `place`) of a folder in transformers' layout."""
    module = Gemma2(Gemma2Config.read(folder), dtype)
    spec = parameters(module, *blank())
    files = weights.Files(folder, "model")
    return module, weights.load(files, spec, KEYS, dtype=dtype, aliases=ALIASES, droppable=DROPPABLE, place=place)
