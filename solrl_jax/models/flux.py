"""FLUX.1: 19 double and 38 single blocks over packed latents, text first (diffusers' FluxTransformer2DModel).

Modules have the checkpoint's own names, so that the key table at the end is short. The residual stream is in the
network's dtype; LayerNorm, modulation and RoPE are in f32. Where the reference rounds (the time in bf16, times 1000),
this file computes in f32.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from solrl_jax import config, weights
from solrl_jax.models import folders, public, text, vae
from solrl_jax.models.folders import Encoder
from solrl_jax.models.layers import F32, Linear, attention, gelu_tanh, inputs_seen
from solrl_jax.models.mmdit import Conditioning, FeedForward, Modulation, gated, heads_of, modulate, rows, stack
from solrl_jax.models.rope import Rope, Scale, rotary_norm, rotations
from solrl_jax.models.schedule import Grid, Schedule, chosen, shifted
from solrl_jax.structs import Model, Params, PyTree, QuantRule, QuantRules, Variables
from solrl_jax.weights import Rule, hub
from solrl_jax.weights.lora_files import Fused, fused
from solrl_jax.weights.options import Options

PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")  # all have the same parts
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
NVFP4_SKIP = ("x_embedder", "context_embedder", "time_text_embed", "norm_out")
# Modulation has one row per picture, and the last projection gives 64 channels: 8-bit products would not be faster.
FP8_SKIP = (*NVFP4_SKIP, r"\bnorm", r"^proj_out")
ENCODERS = (
    Encoder("clip", "text_encoder", "tokenizer", text.ClipTextConfig),
    Encoder("t5", "text_encoder_2", "tokenizer_2", text.T5Config),
)
PUBLIC = public.FLUX


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """The fields of transformer/config.json that shape the network; the defaults are FLUX.1-dev's."""

    in_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    options: ClassVar[Options] = Options("diffusers", only={"patch_size": (1,)}, idle=("out_channels",))

    def __post_init__(self):
        if len(self.axes_dims_rope) != 3 or any(d % 2 for d in self.axes_dims_rope):
            raise ValueError(f"axes_dims_rope {self.axes_dims_rope} are not three even numbers")
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope {self.axes_dims_rope} do not add up to attention_head_dim {self.attention_head_dim}"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def read(cls, folder: str | Path) -> "FluxConfig":
        """From config.json; a folder of another network is refused by its class name."""
        raw = weights.read_config(folder, "FluxTransformer2DModel")
        # diffusers' default of guidance_embeds, not the dev model's
        found = weights.from_config(cls, folder, {"guidance_embeds": False} | raw)
        if (out := raw.get("out_channels")) not in (None, found.in_channels):
            raise weights.WeightsError(
                f"{Path(folder) / 'config.json'}: out_channels {out} is not in_channels {found.in_channels}, nor null"
            )
        return found


# --- layers ---------------------------------------------------------------------------------------------------------


def rope_table(cfg: FluxConfig, height: int, width: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and signed sin for `rotary_norm`, f32 [tokens + height * width, d], computed in f64.

    The text comes first, at position 0 (no rotation). Channels 2k and 2k + 1 share an angle: cos twice, -sin and sin.
    """
    rows, cols = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    image = np.stack([np.zeros_like(rows), rows, cols], axis=-1).reshape(-1, 3)
    return rotations(np.concatenate([np.zeros((tokens, 3)), image]), cfg.axes_dims_rope, 10000.0)


class JointAttention(nn.Module):
    """Attention over [text, image]; if `text` is None, over one stream that already holds both (single blocks)."""

    cfg: Any  # FluxConfig, or another network's with these fields
    dtype: Any
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array, text: Array | None, rope: Rope) -> Any:
        image = self._stream(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        if text is None:
            return rows(attend(image, rope).reshape(x.shape))
        added = self._stream(text, ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"))
        # Joined before the norms: their kernel reads both streams where they lie, and writes one array.
        out = attend([jnp.concatenate(pair, axis=1) for pair in zip(added, image, strict=True)], rope)
        out, split = out.reshape((*out.shape[:2], -1)), text.shape[1]
        how = {"use_bias": self.use_bias, "dtype": self.dtype, "bias_after": True}
        image_out = Linear(x.shape[-1], **how, name="to_out.0")(out[:, split:])
        return image_out, Linear(x.shape[-1], **how, name="to_add_out")(out[:, :split])

    def _stream(self, x: Array, names: Sequence[str], norms: Sequence[str]) -> list[Array]:
        """q, k, v [B, S, H, d] and the scales of q's and k's norms."""
        width = self.cfg.attention_head_dim
        scales = [Scale((x.shape[1], width), name=name)() for name in norms]
        return heads_of(x, names, self.cfg.num_attention_heads, width, self.dtype, self.use_bias) + scales


def attend(stream: Sequence[Array], rope: Rope) -> Float[Array, "B S H d"]:
    q, k, v, scale_q, scale_k = stream
    return attention(rotary_norm(q, scale_q, rope), rotary_norm(k, scale_k, rope), v)


class DoubleBlock(nn.Module):
    cfg: FluxConfig
    dtype: Any

    @nn.compact
    def __call__(self, streams: tuple[Array, Array], cond: Array, rope: Rope):
        x, text = streams
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = Modulation(6, self.dtype, name="norm1")(cond)
        t_shift_a, t_scale_a, t_gate_a, t_shift_m, t_scale_m, t_gate_m = Modulation(
            6, self.dtype, name="norm1_context"
        )(cond)
        x_out, text_out = JointAttention(self.cfg, self.dtype, name="attn")(
            modulate(x, shift_a, scale_a, self.dtype), modulate(text, t_shift_a, t_scale_a, self.dtype), rope
        )
        x, text = gated(x, gate_a, x_out), gated(text, t_gate_a, text_out)
        x = gated(x, gate_m, FeedForward(self.dtype, name="ff")(modulate(x, shift_m, scale_m, self.dtype)))
        text_ff = FeedForward(self.dtype, name="ff_context")(modulate(text, t_shift_m, t_scale_m, self.dtype))
        return (x, gated(text, t_gate_m, text_ff)), None


class SingleBlock(nn.Module):
    cfg: FluxConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, cond: Array, rope: Rope):
        shift, scale, gate = Modulation(3, self.dtype, name="norm")(cond)
        h = modulate(x, shift, scale, self.dtype)
        mlp = checkpoint_name(Linear(4 * self.cfg.width, dtype=self.dtype, name="proj_mlp")(rows(h)), "mlp")
        out = JointAttention(self.cfg, self.dtype, name="attn")(h, None, rope)
        y = Linear(self.cfg.width, dtype=self.dtype, bias_after=True, name="proj_out")(out, gelu_tanh(mlp))
        return gated(x, gate, y.reshape(x.shape)), None


class FluxTransformer(nn.Module):
    """The velocity [B, S, C] of packed latents [B, S, C].

    Given T5 states [B, L, Dt], pooled CLIP [B, Dp], sigma [B] and guidance [B].
    """

    cfg: FluxConfig
    dtype: Any = jnp.bfloat16
    remat: bool = False
    keeps: tuple[str, ...] = ()  # what remat does not recompute, of "attention", "qkv", "mlp"

    @nn.compact
    def __call__(self, x: Array, text: Array, pooled: Array, sigma: Array, guidance: Array, rope: Rope) -> Array:
        guided = guidance if self.cfg.guidance_embeds else None
        cond = Conditioning(self.cfg.width, self.dtype, name="time_text_embed")(sigma, pooled, guided)
        x = Linear(self.cfg.width, dtype=self.dtype, name="x_embedder")(x)
        text = Linear(self.cfg.width, dtype=self.dtype, name="context_embedder")(text)
        how = {"inputs": 2, "remat": self.remat, "keeps": self.keeps}
        double = stack(DoubleBlock, self.cfg.num_layers, **how)(self.cfg, self.dtype, name="transformer_blocks")
        single = stack(SingleBlock, self.cfg.num_single_layers, **how)
        (x, text), _ = double((x, text), cond, rope)
        both = jnp.concatenate([text, x], axis=1)
        both, _ = single(self.cfg, self.dtype, name="single_transformer_blocks")(both, cond, rope)
        scale, shift = Modulation(2, self.dtype, name="norm_out")(cond)
        image = modulate(both[:, text.shape[1] :], shift, scale, self.dtype)
        return Linear(self.cfg.in_channels, dtype=self.dtype, name="proj_out")(image)


# --- latents --------------------------------------------------------------------------------------------------------


def pack(latents: Float[Array, "B h w c"]) -> Float[Array, "B S C"]:
    """2x2 patches as tokens, row-major; channel = (c, dy, dx) with c slowest."""
    b, h, w, c = latents.shape
    x = latents.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, (h // 2) * (w // 2), c * 4)


def unpack(tokens: Float[Array, "B S C"], height: int, width: int) -> Float[Array, "B h w c"]:
    """The inverse of `pack`; height and width in latents."""
    b, _, c = tokens.shape
    x = tokens.reshape(b, height // 2, width // 2, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, height, width, c // 4)


def sigmas(steps: int, tokens: int, schedule: Schedule) -> np.ndarray:
    """f64 [steps + 1], as FluxPipeline's: linspace(1, 1/n, n) shifted by mu, which grows with the tokens; last 0."""
    return np.append(shifted(np.linspace(1, 1 / steps, steps), shift_of(tokens, schedule)), 0.0)


def shift_of(tokens: int, schedule: Schedule) -> float:
    """e^mu, or the schedule's constant."""
    if not schedule.use_dynamic_shifting:
        return schedule.shift
    low, high = schedule.base_image_seq_len, schedule.max_image_seq_len
    base, top = schedule.base_shift, schedule.max_shift
    return np.exp(base + (tokens - low) * (top - base) / (high - low))


# --- the model ------------------------------------------------------------------------------------------------------


@folders.made_once
def make(cfg: config.Model, folder: Path) -> Model:
    """The pure functions of the pipeline `cfg.path`, from the configs in its `folder`.

    Conditioning: {"text" [G, L, Dt], "pooled" [G, Dp]}, and for FLUX.1-dev, if it is guided, "guidance" [G], which is
    otherwise 1. FLUX.1-schnell takes none. With `cfg.guidance` "cfg" both are guided by a negative conditioning.
    """
    hub.check_pipeline(folder, PIPELINES)
    flux = FluxConfig.read(folder / "transformer")
    vae_cfg = vae.VaeConfig.read(folder / "vae")
    schedule = Schedule.read(folder / "scheduler")
    dtype = jnp.dtype(cfg.dtype)
    side = folders.latent_side(cfg.size, vae_cfg)
    _check_widths(folder, flux, vae_cfg)
    tokens = (side // 2) ** 2
    own = Grid(lambda steps: sigmas(steps, tokens, schedule), lambda steps: shift_of(tokens, schedule))
    grid = chosen(cfg.shift, own)
    network = FluxTransformer(flux, dtype, cfg.remat, cfg.remat_keeps)
    rope = rope_table(flux, side // 2, side // 2, cfg.text_tokens)
    shape = (side, side, vae_cfg.latent_channels)
    decoder = vae.Decoder(vae_cfg, jnp.dtype(cfg.vae_dtype))

    def run(variables: Variables, x: Array, sigma: Array, cond: PyTree, **how: Any) -> Any:
        folders.check_latents(x, shape)  # the table of positions is made for this shape
        guided = cond["guidance"] if "guidance" in cond else jnp.ones_like(sigma)
        given = pack(x).astype(dtype), cond["text"], cond["pooled"], sigma, guided
        return network.apply(variables, *given, tuple(map(jnp.asarray, rope)), **how)

    def velocity(variables: Variables, x: Array, sigma: Array, cond: PyTree) -> Array:
        return unpack(jnp.asarray(run(variables, x, sigma, cond)).astype(F32), side, side)

    def largest(variables: Variables, x: Array, sigma: Array, cond: PyTree) -> dict[str, Array]:
        return inputs_seen(run(variables, x, sigma, cond, mutable=["largest"])[1])

    def init(key: Key[Array, ""]) -> Params:
        x, text = jnp.zeros((1, tokens, flux.in_channels)), jnp.zeros((1, cfg.text_tokens, flux.joint_attention_dim))
        one, pooled = jnp.ones(1), jnp.zeros((1, flux.pooled_projection_dim))
        return network.init(key, x, text, pooled, one, one, tuple(map(jnp.asarray, rope)))["params"]

    clip, t5 = folders.text_modules(folder, ENCODERS, dtype).values()
    kind = "cfg" if cfg.guidance == "cfg" else "embedded" if flux.guidance_embeds else "none"

    def encode(params: Params, ids: PyTree) -> PyTree:
        read = cast(text.ClipOutput, clip.apply({"params": params["clip"]}, ids["clip"]))
        return {"text": t5.apply({"params": params["t5"]}, ids["t5"]), "pooled": read.pooled}

    return Model(
        name="flux",
        tokenize=functools.partial(folders.tokenize, str(folder), ENCODERS, cfg.text_tokens),
        encode=encode,
        noise=lambda key: jax.random.normal(key, shape),
        sigmas=grid.sigmas,
        shift=grid.shift,
        velocity=velocity,
        largest=largest,
        decode=lambda params, latents: vae.decode(decoder, params, latents),
        init=init,
        lora_targets=LORA_TARGETS,
        quant_rules=quant_rules(flux, cfg.min_dim),
        keys=KEYS,
        comfy=COMFY,
        guidance=kind,
        guided=3.5 if kind == "embedded" else 1.0,
    )


def quant_rules(cfg: FluxConfig, min_dim: int) -> QuantRules:
    """NVFP4 by the original's rule. In FP8 the kernel of a single block's last Linear lies in two parts, of attention
    and MLP."""
    parts = (("single_transformer_blocks/proj_out", (cfg.width, 4 * cfg.width)),)
    return QuantRules(QuantRule(NVFP4_SKIP, min_dim), QuantRule(FP8_SKIP, min_dim, parts=parts))


def _check_widths(folder: Path, cfg: FluxConfig, vae_cfg: vae.VaeConfig) -> None:
    """WeightsError if the parts of a pipeline belong to different models."""
    clip, t5 = (e.config.read(folder / e.folder) for e in ENCODERS)
    assert isinstance(clip, text.ClipTextConfig) and isinstance(t5, text.T5Config)
    found = {
        f"{cfg.in_channels} channels, the VAE gives 4 x {vae_cfg.latent_channels}": (
            cfg.in_channels == 4 * vae_cfg.latent_channels
        ),
        f"text of {cfg.joint_attention_dim} (joint_attention_dim), T5 gives {t5.d_model}": (
            cfg.joint_attention_dim == t5.d_model
        ),
        f"pooled text of {cfg.pooled_projection_dim} (pooled_projection_dim), CLIP gives {clip.hidden_size}": (
            cfg.pooled_projection_dim == clip.hidden_size
        ),
    }
    folders.check_parts(folder, found)


load, parts, shapes, token_shapes = folders.readers(make, ENCODERS)


_STACK = r"((?:single_)?transformer_blocks)/(.+)"
KEYS = (
    Rule(_STACK + "/kernel", r"\1.{layer}.\2.weight", "linear"),
    Rule(_STACK + "/scale", r"\1.{layer}.\2.weight"),
    Rule(_STACK + "/bias", r"\1.{layer}.\2.bias"),
    Rule(r"(.+)/kernel", r"\1.weight", "linear"),
    Rule(r"(.+)/bias", r"\1.bias"),
)

# Black Forest Labs' module names, which ComfyUI and kohya's trainer use for FLUX, and the Linears that each combines.
_COMFY_BLOCKS = {
    ("double_blocks_{layer}_", "transformer_blocks.{layer}."): {
        "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "img_attn_proj": ("attn.to_out.0",),
        "txt_attn_proj": ("attn.to_add_out",),
        "img_mlp_0": ("ff.net.0.proj",),
        "img_mlp_2": ("ff.net.2",),
        "txt_mlp_0": ("ff_context.net.0.proj",),
        "txt_mlp_2": ("ff_context.net.2",),
        "img_mod_lin": ("norm1.linear",),
        "txt_mod_lin": ("norm1_context.linear",),
    },
    ("single_blocks_{layer}_", "single_transformer_blocks.{layer}."): {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
        "modulation_lin": ("norm.linear",),
    },
    ("", ""): {"img_in": ("x_embedder",), "txt_in": ("context_embedder",), "final_layer_linear": ("proj_out",)},
    ("", "time_text_embed."): {
        "time_in_in_layer": ("timestep_embedder.linear_1",),
        "time_in_out_layer": ("timestep_embedder.linear_2",),
        "guidance_in_in_layer": ("guidance_embedder.linear_1",),
        "guidance_in_out_layer": ("guidance_embedder.linear_2",),
        "vector_in_in_layer": ("text_embedder.linear_1",),
        "vector_in_out_layer": ("text_embedder.linear_2",),
    },
}
COMFY = (
    *fused(_COMFY_BLOCKS),
    Fused("final_layer_adaLN_modulation_1", ("norm_out.linear",), swapped=True),  # order there: shift, scale
)
