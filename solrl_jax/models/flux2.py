"""FLUX.2-klein: 5 double and 20 single blocks over packed latents, text first (diffusers' Flux2Transformer2DModel).

Modules have the checkpoint's own names, as FLUX.1's (flux.py). No Linear has a bias. All blocks of a kind share one
modulation, computed once. All 512 positions of the text attend, its padding too. Latents are the VAE's normalised 2x2
patches, so a latent is a token.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from solrl_jax import config, weights
from solrl_jax.models import folders, public, qwen3, vae
from solrl_jax.models.flux import JointAttention, attend
from solrl_jax.models.folders import Encoder
from solrl_jax.models.layers import F32, Linear, inputs_seen, sinusoid, swiglu
from solrl_jax.models.mmdit import Embedder, Modulation, gated, modulate, stack
from solrl_jax.models.rope import Rope, Scale, rotations
from solrl_jax.models.schedule import Grid, Schedule, chosen, empirical_mu, shifted
from solrl_jax.structs import Model, Params, PyTree, QuantRule, QuantRules, Variables
from solrl_jax.weights import Rule, hub
from solrl_jax.weights.lora_files import Fused, fused
from solrl_jax.weights.options import Options

PIPELINES = ("Flux2KleinPipeline",)
PUBLIC = public.FLUX2
# Those of diffusers' training script. "attn.to_out" is the single blocks', "to_out.0" the double blocks'.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "attn.to_out")
LORA_ALL = (*LORA_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "linear_in", "linear_out")
"""All Linears of the blocks, as kohya's trainer takes them: for config.lora.targets."""
# The modulation has one row per picture, the last projection gives 128 channels, and the text comes as the residual
# stream of a language model, whose largest values are far from the rest.
SKIP = ("x_embedder", "context_embedder", "time_guidance_embed", "modulation", "norm_out", r"^proj_out")
ENCODERS = (
    Encoder(
        *("qwen3", "text_encoder", "tokenizer", qwen3.Qwen3Config),
        masked=True,
        reads=(9, 18, 27),
        template=qwen3.KLEIN,
    ),
)


@dataclasses.dataclass(frozen=True)
class Flux2Config:
    """The fields of transformer/config.json that shape the network; the defaults are diffusers', FLUX.2-dev's."""

    in_channels: int = 128
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: int = 2000
    guidance_embeds: bool = True

    options: ClassVar[Options] = Options("diffusers", only={"patch_size": (1,), "eps": (1e-6,)}, idle=("out_channels",))

    def __post_init__(self):
        if self.guidance_embeds:
            raise ValueError(
                "guidance_embeds is true, or missing, which means true: this is a FLUX.2-dev, whose text encoder is "
                "not known here: use a FLUX.2-klein"
            )
        if len(self.axes_dims_rope) != 4 or any(d % 2 for d in self.axes_dims_rope):
            raise ValueError(f"axes_dims_rope {self.axes_dims_rope} are not four even numbers")
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope {self.axes_dims_rope} do not add up to attention_head_dim {self.attention_head_dim}"
            )
        if self.timestep_guidance_channels % 2:
            raise ValueError(f"timestep_guidance_channels {self.timestep_guidance_channels} is odd: it has two halves")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Of a SwiGLU, after it."""
        return int(self.width * self.mlp_ratio)

    @classmethod
    def read(cls, folder: str | Path) -> "Flux2Config":
        """From config.json; a folder of another network is refused by its class name."""
        raw = weights.read_config(folder, "Flux2Transformer2DModel")
        found = weights.from_config(cls, folder, raw)
        if (out := raw.get("out_channels")) not in (None, found.in_channels):
            raise weights.WeightsError(
                f"{Path(folder) / 'config.json'}: out_channels {out} is not in_channels {found.in_channels}, nor null"
            )
        return found


# --- layers ---------------------------------------------------------------------------------------------------------


def rope_table(cfg: Flux2Config, height: int, width: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and signed sin for `rotary_norm`, f32 [tokens + height * width, d]: the text comes first.

    The axes are (time, row, column, place in the text): a text token is (0, 0, 0, i), an image's (0, row, column, 0).
    """
    rows, cols = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    none = np.zeros_like(rows)
    image = np.stack([none, rows, cols, none], axis=-1).reshape(-1, 4)
    text = np.arange(tokens)[:, None] * np.array([0, 0, 0, 1])
    return rotations(np.concatenate([text, image]), cfg.axes_dims_rope, float(cfg.rope_theta))


Chunks = list[Float[Array, "B 1 D"]]
"""Shift, scale and gate, once for each of a block's residuals."""


class FeedForward(nn.Module):
    """linear_in to [g, u], SwiGLU, linear_out."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        y = Linear(2 * self.hidden, use_bias=False, dtype=self.dtype, name="linear_in")(x)
        y = swiglu(checkpoint_name(y, "mlp"))
        return Linear(x.shape[-1], use_bias=False, dtype=self.dtype, name="linear_out")(y)


class DoubleBlock(nn.Module):
    cfg: Flux2Config
    dtype: Any

    @nn.compact
    def __call__(self, streams: tuple[Array, Array], image: Chunks, words: Chunks, rope: Rope):
        x, text = streams
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = image
        t_shift_a, t_scale_a, t_gate_a, t_shift_m, t_scale_m, t_gate_m = words
        x_out, text_out = JointAttention(self.cfg, self.dtype, use_bias=False, name="attn")(
            modulate(x, shift_a, scale_a, self.dtype), modulate(text, t_shift_a, t_scale_a, self.dtype), rope
        )
        x, text = gated(x, gate_a, x_out), gated(text, t_gate_a, text_out)
        hidden = self.cfg.hidden
        x = gated(x, gate_m, FeedForward(hidden, self.dtype, name="ff")(modulate(x, shift_m, scale_m, self.dtype)))
        text_ff = FeedForward(hidden, self.dtype, name="ff_context")(modulate(text, t_shift_m, t_scale_m, self.dtype))
        return (x, gated(text, t_gate_m, text_ff)), None


class ParallelAttention(nn.Module):
    """Attention and SwiGLU side by side: one Linear gives [q, k, v, g, u], one takes [attention, MLP]."""

    cfg: Flux2Config
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], rope: Rope) -> Float[Array, "B S D"]:
        cfg, width = self.cfg, self.cfg.width
        y = Linear(3 * width + 2 * cfg.hidden, use_bias=False, dtype=self.dtype, name="to_qkv_mlp_proj")(x)
        heads = *x.shape[:2], cfg.num_attention_heads, cfg.attention_head_dim
        qkv = (part.reshape(heads) for part in jnp.split(y[..., : 3 * width], 3, axis=-1))
        scales = [Scale((x.shape[1], heads[-1]), name=name)() for name in ("norm_q", "norm_k")]
        out = attend([*(checkpoint_name(part, "qkv") for part in qkv), *scales], rope).reshape(x.shape)
        mlp = swiglu(checkpoint_name(y[..., 3 * width :], "mlp"))
        return Linear(width, use_bias=False, dtype=self.dtype, name="to_out")(out, mlp)


class SingleBlock(nn.Module):
    cfg: Flux2Config
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, chunks: Chunks, rope: Rope):
        shift, scale, gate = chunks
        y = ParallelAttention(self.cfg, self.dtype, name="attn")(modulate(x, shift, scale, self.dtype), rope)
        return gated(x, gate, y), None


class Flux2Transformer(nn.Module):
    """The velocity [B, S, C] of latents [B, S, C], given sigma [B] and the text: the encoder's states [B, L, Dt], or
    `context`, the network's own of them, [B, L, D] (TextStates)."""

    cfg: Flux2Config
    dtype: Any = jnp.bfloat16
    remat: bool = False
    keeps: tuple[str, ...] = ()  # what remat does not recompute, of "attention", "qkv", "mlp"

    @nn.compact
    def __call__(self, x: Array, sigma: Array, rope: Rope, text: Array | None = None, context: Array | None = None):
        cfg, bare = self.cfg, {"use_bias": False, "dtype": self.dtype}
        time = sinusoid(1000 * sigma, cfg.timestep_guidance_channels)
        cond = Embedder(cfg.width, **bare, name="time_guidance_embed.timestep_embedder")(time)
        image, words = (Modulation(6, **bare, name=f"double_stream_modulation_{s}")(cond) for s in ("img", "txt"))
        chunks = Modulation(3, **bare, name="single_stream_modulation")(cond)
        x = Linear(cfg.width, **bare, name="x_embedder")(x)
        if context is None:
            assert text is not None
            context = Linear(cfg.width, **bare, name="context_embedder")(text)
        how = {"remat": self.remat, "keeps": self.keeps}
        double = stack(DoubleBlock, cfg.num_layers, 3, **how)(cfg, self.dtype, name="transformer_blocks")
        single = stack(SingleBlock, cfg.num_single_layers, 2, **how)
        (x, read), _ = double((x, context), image, words, rope)
        both = jnp.concatenate([read, x], axis=1)
        both, _ = single(cfg, self.dtype, name="single_transformer_blocks")(both, chunks, rope)
        scale, shift = Modulation(2, **bare, name="norm_out")(cond)
        x = modulate(both[:, -x.shape[1] :], shift, scale, self.dtype)
        return Linear(cfg.in_channels, **bare, name="proj_out")(x)


class TextStates(nn.Module):
    """The text as the blocks take it, [B, L, D]; it reads Flux2Transformer's parameters."""

    cfg: Flux2Config
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, text: Float[Array, "B L Dt"]) -> Float[Array, "B L D"]:
        return Linear(self.cfg.width, use_bias=False, dtype=self.dtype, name="context_embedder")(text)


# --- times ----------------------------------------------------------------------------------------------------------


def sigmas(steps: int, tokens: int, schedule: Schedule) -> np.ndarray:
    """f64 [steps + 1], as Flux2KleinPipeline's: linspace(1, 1/n, n) shifted by `shift_of`; last 0."""
    return np.append(shifted(np.linspace(1, 1 / steps, steps), shift_of(steps, tokens, schedule)), 0.0)


def shift_of(steps: int, tokens: int, schedule: Schedule) -> float:
    """e^mu of the image's tokens and the steps, or the schedule's constant; its other numbers have no effect."""
    return float(np.exp(empirical_mu(tokens, steps))) if schedule.use_dynamic_shifting else schedule.shift


# --- the model ------------------------------------------------------------------------------------------------------


@folders.made_once
def make(cfg: config.Model, folder: Path) -> Model:
    """The pure functions of the pipeline `cfg.path`, from the configs in its `folder`.

    Conditioning: {"text" [G, 512, Dt]}; `prepare` returns {"context" [G, 512, D]}. Guidance is classifier-free, its
    negative prompt empty by default; a model distilled to few steps takes none, unless `cfg.guidance` is "cfg".
    """
    hub.check_pipeline(folder, PIPELINES)
    klein, vae_cfg = Flux2Config.read(folder / "transformer"), vae.Flux2VaeConfig.read(folder / "vae")
    schedule, words = Schedule.read(folder / "scheduler"), qwen3.Qwen3Config.read(folder / "text_encoder")
    _check_widths(folder, klein, vae_cfg, words)
    qwen3.check_klein_tokens(cfg.text_tokens)
    dtype, side = jnp.dtype(cfg.dtype), folders.latent_side(cfg.size, vae_cfg, patch=1)
    tokens, shape = side**2, (side, side, vae_cfg.channels)
    own = Grid(lambda steps: sigmas(steps, tokens, schedule), lambda steps: shift_of(steps, tokens, schedule))
    grid = chosen(cfg.shift, own)
    network, states = Flux2Transformer(klein, dtype, cfg.remat, cfg.remat_keeps), TextStates(klein, dtype)
    (qwen,) = folders.text_modules(folder, ENCODERS, dtype).values()
    rope, images = rope_table(klein, side, side, cfg.text_tokens), vae.Flux2Decoder(vae_cfg, jnp.dtype(cfg.vae_dtype))
    distilled = is_distilled(folder)

    def run(variables: Variables, x: Array, sigma: Array, cond: PyTree, **how: Any) -> Any:
        folders.check_latents(x, shape)  # the table of positions is made for this shape
        given = x.reshape(x.shape[0], tokens, -1).astype(dtype), sigma, tuple(map(jnp.asarray, rope))
        return network.apply(variables, *given, cond.get("text"), cond.get("context"), **how)

    def velocity(variables: Variables, x: Array, sigma: Array, cond: PyTree) -> Array:
        return jnp.asarray(run(variables, x, sigma, cond)).astype(F32).reshape(x.shape)

    def largest(variables: Variables, x: Array, sigma: Array, cond: PyTree) -> dict[str, Array]:
        return inputs_seen(run(variables, x, sigma, cond, mutable=["largest"])[1])

    def prepare(variables: Variables, cond: PyTree) -> PyTree:
        return {"context": states.apply(variables, cond["text"])}

    def init(key: Key[Array, ""]) -> Params:
        x, text = jnp.zeros((1, tokens, klein.in_channels)), jnp.zeros((1, cfg.text_tokens, klein.joint_attention_dim))
        return network.init(key, x, jnp.ones(1), tuple(map(jnp.asarray, rope)), text)["params"]

    def encode(params: Params, ids: PyTree) -> PyTree:
        length = jnp.sum(ids["qwen3"]["mask"], axis=-1)
        return {"text": qwen.apply({"params": params["qwen3"]}, ids["qwen3"]["ids"], length)}

    return Model(
        name="flux2",
        tokenize=functools.partial(folders.tokenize, str(folder), ENCODERS, cfg.text_tokens),
        encode=encode,
        noise=lambda key: jax.random.normal(key, shape),
        sigmas=grid.sigmas,
        shift=grid.shift,
        velocity=velocity,
        largest=largest,
        decode=lambda params, latents: vae.decode(images, params, latents),
        init=init,
        lora_targets=LORA_TARGETS,
        quant_rules=quant_rules(klein, cfg.min_dim),
        keys=KEYS,
        comfy=COMFY,
        prepare=prepare,
        guidance="none" if distilled and cfg.guidance != "cfg" else "cfg",
        guided=1.0 if distilled else 4.0,
        distilled=distilled,
    )


def is_distilled(folder: Path) -> bool:
    """Whether a pipeline's model_index.json says so; the base's says nothing."""
    file = folder / "model_index.json"
    return file.is_file() and weights.read_json(file).get("is_distilled") is True


def quant_rules(cfg: Flux2Config, min_dim: int) -> QuantRules:
    """All Linears of the blocks. In FP8 the kernel of a single block's last Linear lies in two parts, of attention and
    MLP."""
    parts = (("single_transformer_blocks/attn/to_out", (cfg.width, cfg.hidden)),)
    return QuantRules(QuantRule(SKIP, min_dim), QuantRule(SKIP, min_dim, parts=parts))


def _check_widths(folder: Path, cfg: Flux2Config, vae_cfg: vae.Flux2VaeConfig, words: qwen3.Qwen3Config) -> None:
    """WeightsError if the parts of a pipeline belong to different models."""
    states = len(ENCODERS[0].reads)
    found = {
        f"{cfg.in_channels} channels, the VAE gives 4 x {vae_cfg.latent_channels}": cfg.in_channels == vae_cfg.channels,
        f"text of {cfg.joint_attention_dim} (joint_attention_dim), Qwen3 gives {states} x {words.hidden_size}": (
            cfg.joint_attention_dim == states * words.hidden_size
        ),
    }
    folders.check_parts(folder, found)


load, parts, shapes, token_shapes = folders.readers(make, ENCODERS)


# --- keys -----------------------------------------------------------------------------------------------------------


_STACK = r"((?:single_)?transformer_blocks)/(.+)"
KEYS = (
    Rule(_STACK + "/kernel", r"\1.{layer}.\2.weight", "linear"),
    Rule(_STACK + "/scale", r"\1.{layer}.\2.weight"),
    Rule(r"(.+)/kernel", r"\1.weight", "linear"),
)

# Black Forest Labs' module names, which ComfyUI and kohya's trainer use, and the Linears that each combines.
_COMFY_BLOCKS = {
    ("double_blocks_{layer}_", "transformer_blocks.{layer}."): {
        "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "img_attn_proj": ("attn.to_out.0",),
        "txt_attn_proj": ("attn.to_add_out",),
        "img_mlp_0": ("ff.linear_in",),
        "img_mlp_2": ("ff.linear_out",),
        "txt_mlp_0": ("ff_context.linear_in",),
        "txt_mlp_2": ("ff_context.linear_out",),
    },
    ("single_blocks_{layer}_", "single_transformer_blocks.{layer}."): {
        "linear1": ("attn.to_qkv_mlp_proj",),
        "linear2": ("attn.to_out",),
    },
    ("", ""): {
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "time_in_in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
        "time_in_out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
        "double_stream_modulation_img_lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt_lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation_lin": ("single_stream_modulation.linear",),
        "final_layer_linear": ("proj_out",),
    },
}
COMFY = (
    *fused(_COMFY_BLOCKS),
    Fused("final_layer_adaLN_modulation_1", ("norm_out.linear",), swapped=True),  # order there: shift, scale
)
