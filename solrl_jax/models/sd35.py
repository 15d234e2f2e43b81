"""Stable Diffusion 3.5, Large and Medium: joint blocks over [image, text] (SD3Transformer2DModel of diffusers).

Medium's first blocks attend to the image a second time (dual attention). The last block of both models reads the text
but does not update it. Adjacent equal blocks are one scan. Modules have the checkpoint's own names, so that the key
table is short. Where Sol-RL's code rounds (times truncated to whole numbers), this file computes in f32.
"""

import functools
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from solrl_jax import config, weights
from solrl_jax.models import folders, public, text, vae
from solrl_jax.models.convolutions import conv
from solrl_jax.models.folders import Encoder, Encoders
from solrl_jax.models.layers import F32, Linear, RMSNorm, attention, inputs_seen
from solrl_jax.models.mmdit import Conditioning, FeedForward, Modulation, gated, heads_of, modulate, stack
from solrl_jax.models.schedule import NAME, Grid, Schedule, chosen, shifted
from solrl_jax.models.sd35_config import PATCH, Sd35Config, comfy, keys, runs
from solrl_jax.structs import Model, Params, PyTree, QuantRule, QuantRules, Variables
from solrl_jax.weights import hub

PIPELINES = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")
PUBLIC = public.SD35
LORA_TARGETS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
NVFP4_SKIP = ("pos_embed", "context_embedder", "time_text_embed", "norm_out", "norm1", "ff_context")
# The original's list and min_dim are for NVFP4. 8-bit products pay off in all of a block except modulation (flux.py).
FP8_SKIP = ("context_embedder", "time_text_embed", r"\bnorm", r"^proj_out")
CLIPS = (
    Encoder("clip", "text_encoder", "tokenizer", text.ClipTextConfig, project=True),
    Encoder("clip_g", "text_encoder_2", "tokenizer_2", text.ClipTextConfig, project=True),
)
T5 = Encoder("t5", "text_encoder_3", "tokenizer_3", text.T5Config)


# --- layers ---------------------------------------------------------------------------------------------------------


class Patches(nn.Module):
    """2x2 patches of latents as tokens, row-major, plus the middle part of the checkpoint's table of positions."""

    cfg: Sd35Config
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B S D"]:
        most, width = self.cfg.pos_embed_max_size, self.cfg.width
        y = conv(width, (PATCH, PATCH), strides=PATCH, padding="VALID", dtype=self.dtype, name="proj")(x)
        table = jnp.asarray(self.param("pos_embed", nn.initializers.normal(0.02), (1, most**2, width), F32))
        top, left = (most - y.shape[1]) // 2, (most - y.shape[2]) // 2
        places = table.reshape(1, most, most, width)[:, top : top + y.shape[1], left : left + y.shape[2]]
        return (y.astype(F32) + places.astype(F32)).astype(self.dtype).reshape(y.shape[0], -1, width)


class Attention(nn.Module):
    """Attention over [image, text], or over the image alone. In the last block only the image has queries."""

    cfg: Sd35Config
    dtype: Any
    last: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], text: Float[Array, "B L D"] | None = None
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B L D"] | None]:
        q, k, v = self._qkv(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        if text is not None:
            # The last block's text queries are not used. The checkpoint and its LoRAs have them; XLA removes them.
            q_text, k_text, v_text = self._qkv(
                text, ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
            )
            q = q if self.last else jnp.concatenate([q, q_text], axis=1)
            k, v = jnp.concatenate([k, k_text], axis=1), jnp.concatenate([v, v_text], axis=1)
        out = attention(q, k, v).reshape((*q.shape[:2], -1))
        image = Linear(x.shape[-1], dtype=self.dtype, bias_after=True, name="to_out.0")(out[:, : x.shape[1]])
        if text is None or self.last:
            return image, None
        return image, Linear(x.shape[-1], dtype=self.dtype, bias_after=True, name="to_add_out")(out[:, x.shape[1] :])

    def _qkv(self, x: Array, names: tuple[str, ...], norms: tuple[str, str]) -> list[Array]:
        q, k, v = heads_of(x, names, self.cfg.num_attention_heads, self.cfg.attention_head_dim, self.dtype)
        if self.cfg.qk_norm == "rms_norm":
            q, k = RMSNorm(1e-6, name=norms[0])(q), RMSNorm(1e-6, name=norms[1])(k)
        return [q, k, v]


class JointBlock(nn.Module):
    cfg: Sd35Config
    dtype: Any
    dual: bool = False
    last: bool = False

    @nn.compact
    def __call__(self, streams: tuple[Array, Array], cond: Array):
        x, text = streams
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m, *second = Modulation(
            9 if self.dual else 6, self.dtype, name="norm1"
        )(cond)
        of_text = Modulation(2 if self.last else 6, self.dtype, name="norm1_context")(cond)
        t_shift, t_scale = of_text[::-1] if self.last else of_text[:2]  # the last block's order is scale, shift
        x_out, text_out = Attention(self.cfg, self.dtype, self.last, name="attn")(
            modulate(x, shift_a, scale_a, self.dtype), modulate(text, t_shift, t_scale, self.dtype)
        )
        again = None
        if self.dual:
            again, _ = Attention(self.cfg, self.dtype, name="attn2")(modulate(x, second[0], second[1], self.dtype))
        x = gated(x, gate_a, x_out)
        x = x if again is None else gated(x, second[2], again)
        x = gated(x, gate_m, FeedForward(self.dtype, name="ff")(modulate(x, shift_m, scale_m, self.dtype)))
        if text_out is None:
            return (x, text), None
        _, _, t_gate_a, t_shift_m, t_scale_m, t_gate_m = of_text
        text = gated(text, t_gate_a, text_out)
        text_ff = FeedForward(self.dtype, name="ff_context")(modulate(text, t_shift_m, t_scale_m, self.dtype))
        return (x, gated(text, t_gate_m, text_ff)), None


class Sd35Transformer(nn.Module):
    """The velocity [B, h, w, c] of latents [B, h, w, c], given text [B, L, Dt], pooled text [B, Dp] and sigma [B]."""

    cfg: Sd35Config
    dtype: Any = jnp.bfloat16
    remat: bool = False
    keeps: tuple[str, ...] = ()  # what remat does not recompute, of "attention", "qkv", "mlp"

    @nn.compact
    def __call__(self, x: Array, text: Array, pooled: Array, sigma: Array) -> Array:
        cfg, (b, h, w, _) = self.cfg, x.shape
        cond = Conditioning(cfg.width, self.dtype, name="time_text_embed")(sigma, pooled)
        x = Patches(cfg, self.dtype, name="pos_embed")(x)
        text = Linear(cfg.width, dtype=self.dtype, name="context_embedder")(text)
        for run in runs(cfg):
            blocks = stack(JointBlock, run.layers, 1, remat=self.remat, keeps=self.keeps)
            (x, text), _ = blocks(cfg, self.dtype, run.dual, run.last, name=run.name)((x, text), cond)
        scale, shift = Modulation(2, self.dtype, name="norm_out")(cond)
        y = Linear(PATCH**2 * cfg.out_channels, dtype=self.dtype, name="proj_out")(
            modulate(x, shift, scale, self.dtype)
        )
        y = y.reshape(b, h // PATCH, w // PATCH, PATCH, PATCH, -1)  # channels (dy, dx, c) with c fastest
        return y.transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)


# --- the model ------------------------------------------------------------------------------------------------------


def sigmas(steps: int, shift: float) -> np.ndarray:
    """f64 [steps + 1]: equal steps between the ends of the scheduler's shifted table of 1000, shifted again. As those
    of diffusers' FlowMatchEulerDiscreteScheduler."""
    return np.append(shifted(np.linspace(1, shifted(1 / 1000, shift), steps), shift), 0.0)


def check_schedule(folder: Path, schedule: Schedule) -> None:
    if schedule.use_dynamic_shifting:
        raise weights.WeightsError(f"{folder / NAME}: use_dynamic_shifting is not SD3.5's schedule")


def encoders_of(folder: Path) -> Encoders:
    """The pipeline's text encoders, with T5 unless model_index.json gives [null, null] for it."""
    if (folder / "model_index.json").is_file():
        index = weights.read_json(folder / "model_index.json")
        if index.get(T5.folder) == [None, None]:
            return CLIPS
    return (*CLIPS, T5)


def _check_widths(folder: Path, cfg: Sd35Config, vae_cfg: vae.VaeConfig, encoders: Encoders) -> None:
    """WeightsError if the parts of a pipeline belong to different models."""
    one, two, *rest = (e.config.read(folder / e.folder) for e in encoders)
    assert isinstance(one, text.ClipTextConfig) and isinstance(two, text.ClipTextConfig)
    wide = [("T5", x.d_model) for x in rest if isinstance(x, text.T5Config)]
    found = {
        f"{cfg.in_channels} channels, the VAE gives {vae_cfg.latent_channels}": (
            cfg.in_channels == vae_cfg.latent_channels
        ),
        f"pooled text of {cfg.pooled_projection_dim}, the CLIPs give {one.projection_dim} + "
        f"{two.projection_dim}": cfg.pooled_projection_dim == one.projection_dim + two.projection_dim,
        f"text of {cfg.joint_attention_dim}, the CLIPs give {one.hidden_size} + {two.hidden_size}": (
            one.hidden_size + two.hidden_size <= cfg.joint_attention_dim
        ),
    }
    found |= {f"text of {cfg.joint_attention_dim}, {name} gives {n}": n == cfg.joint_attention_dim for name, n in wide}
    folders.check_parts(folder, found)


@folders.made_once
def make(cfg: config.Model, folder: Path) -> Model:
    """The pure functions of the pipeline `cfg.path`, from the configs in its `folder`.

    Conditioning: {"text" [G, 77 + text_tokens, Dt], "pooled" [G, Dp]}. Guidance is classifier-free.
    """
    hub.check_pipeline(folder, PIPELINES)
    sd35 = Sd35Config.read(folder / "transformer")
    vae_cfg = vae.VaeConfig.read(folder / "vae")
    schedule = Schedule.read(folder / "scheduler")
    check_schedule(folder / "scheduler", schedule)
    encoders, dtype = encoders_of(folder), jnp.dtype(cfg.dtype)
    _check_widths(folder, sd35, vae_cfg, encoders)
    side = folders.latent_side(cfg.size, vae_cfg)
    if side // PATCH > sd35.pos_embed_max_size:
        most = sd35.pos_embed_max_size * PATCH * vae_cfg.factor
        raise config.ConfigError(f"model.size={cfg.size}: the model's table of positions ends at {most} pixels")
    network = Sd35Transformer(sd35, dtype, cfg.remat, cfg.remat_keeps)
    words, length = folders.text_modules(folder, encoders, dtype), _clip_length(folder) + cfg.text_tokens
    shape = (side, side, vae_cfg.latent_channels)
    decoder = vae.Decoder(vae_cfg, jnp.dtype(cfg.vae_dtype))

    def run(variables: Variables, x: Array, sigma: Array, cond: PyTree, **how: Any) -> Any:
        return network.apply(variables, x.astype(dtype), cond["text"], cond["pooled"], sigma, **how)

    def velocity(variables: Variables, x: Array, sigma: Array, cond: PyTree) -> Array:
        return jnp.asarray(run(variables, x, sigma, cond)).astype(F32)

    def largest(variables: Variables, x: Array, sigma: Array, cond: PyTree) -> dict[str, Array]:
        return inputs_seen(run(variables, x, sigma, cond, mutable=["largest"])[1])

    def init(key: Key[Array, ""]) -> Params:
        given = jnp.zeros((1, *shape)), jnp.zeros((1, length, sd35.joint_attention_dim))
        return network.init(key, *given, jnp.zeros((1, sd35.pooled_projection_dim)), jnp.ones(1))["params"]

    def encode(params: Params, ids: PyTree) -> PyTree:
        read = {name: module.apply({"params": params[name]}, ids[name]) for name, module in words.items()}
        return assembled(
            [cast(text.ClipOutput, read[e.name]) for e in CLIPS], cast(Any, read.get("t5")), sd35, cfg.text_tokens
        )

    grid = chosen(cfg.shift, Grid(lambda steps: sigmas(steps, schedule.shift), lambda steps: schedule.shift))
    return Model(
        name="sd35",
        tokenize=functools.partial(folders.tokenize, str(folder), encoders, cfg.text_tokens),
        encode=encode,
        noise=lambda key: jax.random.normal(key, shape),
        sigmas=grid.sigmas,
        shift=grid.shift,
        velocity=velocity,
        largest=largest,
        decode=lambda params, latents: vae.decode(decoder, params, latents),
        init=init,
        lora_targets=LORA_TARGETS,
        quant_rules=QuantRules(QuantRule(NVFP4_SKIP, cfg.min_dim), QuantRule(FP8_SKIP, 0)),
        keys=keys(sd35),
        comfy=comfy(sd35),
        guidance="cfg",
        guided=4.5 if sd35.dual_attention_layers else 3.5,  # Medium, which alone has them, and Large: their cards
    )


def assembled(
    clips: list[text.ClipOutput], t5: Float[Array, "G T Dt"] | None, cfg: Sd35Config, text_tokens: int
) -> dict[str, Array]:
    """The network's conditioning, as encode_prompt of diffusers' StableDiffusion3Pipeline makes it.

    The text is both CLIPs' penultimate states side by side, padded with zeros to T5's width, then T5's states (zeros
    without a T5).
    """
    short = jnp.concatenate([clip.penultimate for clip in clips], axis=-1)
    short = jnp.pad(short, ((0, 0), (0, 0), (0, cfg.joint_attention_dim - short.shape[-1])))
    if t5 is None:
        t5 = jnp.zeros((len(short), text_tokens, cfg.joint_attention_dim), short.dtype)
    both = jnp.concatenate([short, t5], axis=1)
    return {"text": both, "pooled": jnp.concatenate([clip.pooled for clip in clips], axis=-1)}


def _clip_length(folder: Path) -> int:
    lengths = {text.ClipTextConfig.read(folder / e.folder).max_position_embeddings for e in CLIPS}
    if len(lengths) != 1:
        raise weights.WeightsError(f"{folder}: its CLIPs read {sorted(lengths)} tokens: not one model's")
    return lengths.pop()


load, parts, shapes, token_shapes = folders.readers(make, encoders_of)
