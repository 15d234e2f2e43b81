"""SANA-1.6B: linear attention over the image, cross-attention to Gemma's states (diffusers' SanaTransformer2DModel).

One set of modules serves both of its checkpoints. The modules follow the native checkpoint with Linears (LinearFFN),
which Sol-RL trains: q, k, v fused, the text's k and v fused, 1x1 convolutions as Linears. LoRA and low precision act on
these Linears. The key tables at the end translate diffusers' names and its separate q, k and v.

The residual stream is in the network's dtype; LayerNorm, modulation and linear attention are f32. There are no position
embeddings: the depthwise convolutions tell where a token is. The blocks' keys and values of the text do not depend on
the step, so a rollout computes them once (`Model.prepare`; tests/test_sana_compiled.py::test_forward).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from solrl_jax import config, weights
from solrl_jax.models import dcae, folders, gemma2, public, vae
from solrl_jax.models.convolutions import GatedConv, conv
from solrl_jax.models.folders import Encoder, Naming
from solrl_jax.models.layers import F32, Linear, RMSNorm, attention, gelu_tanh, inputs_seen, linear_attention, sinusoid
from solrl_jax.models.mmdit import STACKED, Embedder, gated, modulate, stack
from solrl_jax.models.schedule import Grid, SanaSchedule, chosen, shifted
from solrl_jax.structs import Model, Params, PyTree, QuantRule, QuantRules, Variables
from solrl_jax.weights import Rule, hub
from solrl_jax.weights.options import Options

PIPELINES = ("SanaPipeline",)
PUBLIC = public.SANA
LORA_TARGETS = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj")
NVFP4_SKIP = (
    *("t_embedder", "t_block", "cfg_embedder", "y_embedder", "x_embedder", "final_layer", "logvar_linear"),
    "attn.qkv",
)
# The original's min_dim excludes the square Linears, and its list q, k and v, for NVFP4's accuracy. FP8 takes all.
FP8_SKIP = NVFP4_SKIP[:-1]
ENCODERS = (Encoder("gemma", "text_encoder", "tokenizer", gemma2.Gemma2Config, masked=True),)


@dataclasses.dataclass(frozen=True)
class SanaConfig:
    """The fields of transformer/config.json that shape the network; the defaults are diffusers', SANA-1.6B's."""

    in_channels: int = 32
    out_channels: int = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    cross_attention_dim: int = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    norm_eps: float = 1e-6
    timestep_scale: float = 1.0
    patch_size: int = 1
    attention_bias: bool = False
    norm_elementwise_affine: bool = False
    guidance_embeds: bool = False
    qk_norm: str = ""
    interpolation_scale: float = 0.0

    options: ClassVar[Options] = Options("diffusers", idle=("sample_size", "guidance_embeds_scale"))

    def __post_init__(self):
        names = ("patch_size", "attention_bias", "norm_elementwise_affine", "guidance_embeds", "qk_norm", "norm_eps")
        known = {field.name: field.default for field in dataclasses.fields(self)}
        if strange := {n: getattr(self, n) for n in (*names, "interpolation_scale") if getattr(self, n) != known[n]}:
            raise ValueError(f"{strange}: not SANA-1.6B at 1024 px, the only network known here")
        if self.out_channels != self.in_channels:
            raise ValueError(f"out_channels {self.out_channels} is not in_channels {self.in_channels}")
        heads, width = self.num_cross_attention_heads, self.cross_attention_head_dim
        if not self.cross_attention_dim == heads * width == self.width:
            raise ValueError(
                f"cross_attention_dim {self.cross_attention_dim}, num_cross_attention_heads {heads} x "
                f"cross_attention_head_dim {width} and the width {self.width} (num_attention_heads "
                f"{self.num_attention_heads} x attention_head_dim {self.attention_head_dim}) are not equal"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        return int(self.mlp_ratio * self.width)

    @classmethod
    def read(cls, folder: str | Path) -> "SanaConfig":
        """From config.json; a folder of another network is refused by its class name."""
        return weights.from_config(cls, folder, weights.read_config(folder, "SanaTransformer2DModel"))


# --- layers ---------------------------------------------------------------------------------------------------------


class Caption(nn.Module):
    """Gemma's states in the network's width: fc1, GELU, fc2, RMSNorm."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, text: Float[Array, "B L Dt"]) -> Float[Array, "B L D"]:
        y = Linear(self.width, dtype=self.dtype, name="y_proj.fc1")(text)
        y = Linear(self.width, dtype=self.dtype, name="y_proj.fc2")(gelu_tanh(y))
        return RMSNorm(1e-5, name="norm")(y)


class SelfAttention(nn.Module):
    """Linear attention over all positions; q, k and v are consecutive outputs of one Linear without bias."""

    cfg: SanaConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        b, h, w, width = x.shape
        qkv = checkpoint_name(Linear(3 * width, use_bias=False, dtype=self.dtype, name="qkv")(x), "qkv")
        heads = qkv.reshape(b, h * w, 3, self.cfg.num_attention_heads, self.cfg.attention_head_dim)
        out = checkpoint_name(linear_attention(*(heads[:, :, i] for i in range(3))), "attention")
        return Linear(width, dtype=self.dtype, bias_after=True, name="proj")(out.reshape(x.shape))


class CrossAttention(nn.Module):
    """Attention to the first `length` tokens of a text; `kv` is the text's k and v, concatenated."""

    cfg: SanaConfig
    dtype: Any

    def setup(self):
        self.q_linear = Linear(self.cfg.width, dtype=self.dtype)
        self.kv_linear = Linear(2 * self.cfg.width, dtype=self.dtype)
        self.proj = Linear(self.cfg.width, dtype=self.dtype, bias_after=True)

    def __call__(
        self, x: Float[Array, "B h w D"], kv: Float[Array, "B L two_D"], length: Int[Array, "B"]
    ) -> Float[Array, "B h w D"]:
        b, h, w, _ = x.shape
        heads = self.cfg.num_cross_attention_heads, self.cfg.cross_attention_head_dim
        q = checkpoint_name(self.q_linear(x), "qkv").reshape(b, h * w, *heads)
        k, v = (part.reshape(b, -1, *heads) for part in jnp.split(kv, 2, axis=-1))
        return self.proj(attention(q, k, v, lengths=length).reshape(x.shape))


class Block(nn.Module):
    """Linear attention, cross-attention (without norm or gate), gated convolution."""

    cfg: SanaConfig
    dtype: Any

    def setup(self):
        self.scale_shift_table = self.param("scale_shift_table", nn.initializers.normal(0.02), (6, self.cfg.width), F32)
        self.attn = SelfAttention(self.cfg, self.dtype)
        self.cross_attn = CrossAttention(self.cfg, self.dtype)
        self.mlp = GatedConv(self.cfg.hidden, self.dtype)

    def __call__(self, x: Array, time: Array, length: Array, y: Any, kv: Any):
        """x [B, h, w, D]; time [B, 6, D] f32; the text y [B, L, D], or its k and v for this block [B, L, 2 D]."""
        found = modulations(self.scale_shift_table, time)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = found
        x = gated(x, gate_a, self.attn(modulate(x, shift_a, scale_a, self.dtype)))
        kv = self.cross_attn.kv_linear(y) if kv is None else kv
        x = x + self.cross_attn(x, kv, length)
        return gated(x, gate_m, self.mlp(modulate(x, shift_m, scale_m, self.dtype))), None

    def text_keys(self, carry: None, y: Float[Array, "B L D"]) -> tuple[None, Float[Array, "B L two_D"]]:
        """This block's k and v of a text, for a scan over blocks."""
        return carry, self.cross_attn.kv_linear(y)


def modulations(table: Array, time: Float[Array, "B n D"]) -> list[Float[Array, "B 1 1 D"]]:
    """The n vectors of a learned table [n, D], each plus its part of the time embedding."""
    found = jnp.asarray(table)[None].astype(F32) + time.astype(F32)
    return [found[:, i, None, None, :] for i in range(table.shape[0])]


class FinalLayer(nn.Module):
    """Shift and scale from the time embedding itself, then a Linear to `channels`."""

    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"], time: Float[Array, "B D"]) -> Float[Array, "B h w c"]:
        table = self.param("scale_shift_table", nn.initializers.normal(0.02), (2, x.shape[-1]), F32)
        shift, scale = modulations(jnp.asarray(table), time[:, None])
        return Linear(self.channels, dtype=self.dtype, name="linear")(modulate(x, shift, scale, self.dtype))


class SanaTransformer(nn.Module):
    """The velocity [B, h, w, c] of latents [B, h, w, c].

    Given sigma [B], Gemma's states [B, L, Dt] or `TextKeys` of them [B, layers, L, 2 D], and how many of the L tokens
    belong to the text, int [B].
    """

    cfg: SanaConfig
    dtype: Any = jnp.bfloat16
    remat: bool = False
    keeps: tuple[str, ...] = ()  # what remat does not recompute, of "attention", "qkv", "mlp"

    @nn.compact
    def __call__(self, x: Array, sigma: Array, length: Array, text: Array | None = None, kv: Array | None = None):
        cfg, dtype = self.cfg, self.dtype
        x = conv(cfg.width, (1, 1), dtype=dtype, name="x_embedder")(x)
        time = Embedder(cfg.width, dtype, name="t_embedder")(sinusoid(1000 * cfg.timestep_scale * sigma))
        six = Linear(6 * cfg.width, dtype=dtype, name="t_block")(jax.nn.silu(time)).reshape(-1, 6, cfg.width)
        y = None if text is None else Caption(cfg.width, dtype, name="y_embedder")(text)
        blocks = stack(Block, cfg.num_layers, 3, own=1, remat=self.remat, keeps=self.keeps)
        x, _ = blocks(cfg, dtype, name="blocks")(x, six.astype(F32), length, y, kv)
        return FinalLayer(cfg.out_channels, dtype, name="final_layer")(x, time)


class TextKeys(nn.Module):
    """k and v of a text [B, L, Dt] for every block [B, layers, L, 2 D]; it reads SanaTransformer's parameters."""

    cfg: SanaConfig
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, text: Float[Array, "B L Dt"]) -> Float[Array, "B layers L two_D"]:
        y = Caption(self.cfg.width, self.dtype, name="y_embedder")(text)
        blocks = nn.scan(
            Block,
            variable_axes=STACKED,
            split_rngs={"params": True},
            in_axes=cast(Any, (nn.broadcast,)),
            out_axes=1,
            length=self.cfg.num_layers,
            methods=["text_keys"],
        )
        return blocks(self.cfg, self.dtype, name="blocks").text_keys(None, y)[1]


# --- times ----------------------------------------------------------------------------------------------------------


def sigmas(steps: int, shift: float) -> np.ndarray:
    """SANA's own sigmas, f64 [steps + 1]: equal steps from .999 towards 0, shifted (the first is .9997), then 0. As
    those of diffusers' DPMSolverMultistepScheduler.

    Sol-RL uses equal steps from 1 to 0 instead (model.shift = 1), rounded to bf16 (.8320 for 5/6). Here they are exact:
    the sampler, the network and the loss use the same number.
    """
    return np.append(shifted(np.linspace(0.999, 0, steps + 1)[:-1], shift), 0.0)


# --- the model ------------------------------------------------------------------------------------------------------


@folders.made_once
def make(cfg: config.Model, folder: Path) -> Model:
    """The pure functions of the pipeline `cfg.path`, from the configs in its `folder`.

    Conditioning: {"text" [G, L, Dt], "length" int [G]}; `prepare` returns {"kv" [G, layers, L, 2 D], "length"}. Prompts
    are made lower case, and no instruction is put before them. Guidance is classifier-free.
    """
    hub.check_pipeline(folder, PIPELINES)
    sana = SanaConfig.read(folder / "transformer")
    decoder, gemma = dcae.DcaeConfig.read(folder / "vae"), gemma2.Gemma2Config.read(folder / "text_encoder")
    shift = SanaSchedule.read(folder / "scheduler").flow_shift
    _check_parts(folder, sana, decoder, gemma)
    check_length(cfg.text_tokens, gemma)
    side, dtype = folders.latent_side(cfg.size, decoder, patch=1), jnp.dtype(cfg.dtype)
    network, keys_of = SanaTransformer(sana, dtype, cfg.remat, cfg.remat_keeps), TextKeys(sana, dtype)
    words, images = gemma2.Gemma2(gemma, dtype), dcae.Decoder(decoder, jnp.dtype(cfg.vae_dtype))
    shape = (side, side, sana.in_channels)

    def run(variables: Variables, x: Array, sigma: Array, cond: PyTree, **how: Any) -> Any:
        return network.apply(variables, x.astype(dtype), sigma, cond["length"], cond.get("text"), cond.get("kv"), **how)

    def velocity(variables: Variables, x: Array, sigma: Array, cond: PyTree) -> Array:
        return jnp.asarray(run(variables, x, sigma, cond)).astype(F32)

    def largest(variables: Variables, x: Array, sigma: Array, cond: PyTree) -> dict[str, Array]:
        return inputs_seen(run(variables, x, sigma, cond, mutable=["largest"])[1])

    def prepare(variables: Variables, cond: PyTree) -> PyTree:
        return {"kv": keys_of.apply(variables, cond["text"]), "length": cond["length"]}

    def init(key: Key[Array, ""]) -> Params:
        text = jnp.zeros((1, cfg.text_tokens, sana.caption_channels))
        return network.init(key, jnp.zeros((1, *shape)), jnp.ones(1), jnp.ones(1, jnp.int32), text)["params"]

    def encode(params: Params, ids: PyTree) -> PyTree:
        length = jnp.sum(ids["gemma"]["mask"], axis=-1)  # not from ids: a prompt may contain the word <pad>
        return {"text": words.apply({"params": params["gemma"]}, ids["gemma"]["ids"], length), "length": length}

    def tokenize(prompts: Sequence[str]) -> PyTree:
        plain = [prompt.lower().strip() for prompt in prompts]
        return folders.tokenize(str(folder), ENCODERS, cfg.text_tokens, plain)

    grid = chosen(cfg.shift, Grid(lambda steps: sigmas(steps, shift), lambda steps: shift))
    return Model(
        name="sana",
        tokenize=tokenize,
        encode=encode,
        noise=lambda key: jax.random.normal(key, shape),
        sigmas=grid.sigmas,
        shift=grid.shift,
        velocity=velocity,
        largest=largest,
        decode=lambda params, latents: vae.decode(images, params, latents),
        init=init,
        lora_targets=LORA_TARGETS,
        quant_rules=QuantRules(QuantRule(NVFP4_SKIP, cfg.min_dim), QuantRule(FP8_SKIP, 0)),
        keys=KEYS,
        native=NATIVE[0].keys,
        prepare=prepare,
        guidance="cfg",
        guided=4.5,
    )


def check_length(text_tokens: int, gemma: gemma2.Gemma2Config) -> None:
    """ConfigError if texts are longer than the window of the encoder's sliding-window layers."""
    if text_tokens > gemma.sliding_window:
        raise config.ConfigError(
            f"model.text_tokens={text_tokens}: Gemma's layers see {gemma.sliding_window} (sliding_window)"
        )


def _check_parts(folder: Path, cfg: SanaConfig, decoder: dcae.DcaeConfig, gemma: gemma2.Gemma2Config) -> None:
    """WeightsError if the parts of a pipeline belong to different models."""
    found = {
        f"{cfg.in_channels} channels, the VAE gives {decoder.latent_channels}": (
            cfg.in_channels == decoder.latent_channels
        ),
        f"text of {cfg.caption_channels}, Gemma gives {gemma.hidden_size}": cfg.caption_channels == gemma.hidden_size,
    }
    folders.check_parts(folder, found)


# --- keys -----------------------------------------------------------------------------------------------------------


_T, _B, _EMBEDDER = "transformer_blocks.{layer}.", "blocks.{layer}.", "time_embed.emb.timestep_embedder."
_MODULES = (  # ours: diffusers' layout and names, the native name
    ("blocks/attn/qkv", "linear", tuple(f"{_T}attn1.to_{x}" for x in "qkv"), _B + "attn.qkv"),
    ("blocks/attn/proj", "linear", (_T + "attn1.to_out.0",), _B + "attn.proj"),
    ("blocks/cross_attn/q_linear", "linear", (_T + "attn2.to_q",), _B + "cross_attn.q_linear"),
    (
        "blocks/cross_attn/kv_linear",
        "linear",
        (_T + "attn2.to_k", _T + "attn2.to_v"),
        _B + "cross_attn.kv_linear",
    ),
    ("blocks/cross_attn/proj", "linear", (_T + "attn2.to_out.0",), _B + "cross_attn.proj"),
    ("blocks/mlp/inverted_conv.linear", "pointwise", (_T + "ff.conv_inverted",), _B + "mlp.inverted_conv.linear"),
    ("blocks/mlp/depth_conv.conv", "conv", (_T + "ff.conv_depth",), _B + "mlp.depth_conv.conv"),
    ("blocks/mlp/point_conv.linear", "pointwise", (_T + "ff.conv_point",), _B + "mlp.point_conv.linear"),
    ("x_embedder", "conv", ("patch_embed.proj",), "x_embedder.proj"),
    ("t_embedder/linear_1", "linear", (_EMBEDDER + "linear_1",), "t_embedder.mlp.0"),
    ("t_embedder/linear_2", "linear", (_EMBEDDER + "linear_2",), "t_embedder.mlp.2"),
    ("t_block", "linear", ("time_embed.linear",), "t_block.1"),
    ("y_embedder/y_proj.fc1", "linear", ("caption_projection.linear_1",), "y_embedder.y_proj.fc1"),
    ("y_embedder/y_proj.fc2", "linear", ("caption_projection.linear_2",), "y_embedder.y_proj.fc2"),
    ("final_layer/linear", "linear", ("proj_out",), "final_layer.linear"),
)


def _rules(native: bool) -> Iterator[Rule]:
    for ours, layout, diffusers, own in _MODULES:
        theirs = (own,) if native else diffusers
        path = ours.replace(".", r"\.")
        yield Rule(f"{path}/kernel", tuple(f"{name}.weight" for name in theirs), layout)
        yield Rule(f"{path}/bias", tuple(f"{name}.bias" for name in theirs))
    yield Rule("blocks/scale_shift_table", (_B if native else _T) + "scale_shift_table")
    yield Rule("y_embedder/norm/scale", "attention_y_norm.weight" if native else "caption_norm.weight")
    yield Rule("final_layer/scale_shift_table", "final_layer.scale_shift_table" if native else "scale_shift_table")


KEYS = tuple(_rules(native=False))
NATIVE = (
    Naming(
        "x_embedder.proj.weight",
        tuple(_rules(native=True)),
        ((r"\.mlp\.(inverted|point)_conv\.conv\.", r".mlp.\1_conv.linear."),),  # SANA's first form, 1x1 convolutions
        (r"y_embedder\.y_embedding", "pos_embed", r"logvar_linear\..*"),
    ),
)
load, parts, shapes, token_shapes = folders.readers(make, ENCODERS, NATIVE)
