"""Z-Image's transformer: its config, the tables of positions, its blocks (diffusers' ZImageTransformer2DModel).

The image comes first, then the caption, padded with a learned token to a multiple of 32 that is attended to; what is
behind that is masked. The image's place on RoPE's first axis is after the padded caption, so the table of positions is
per sample. A block has RMSNorms before and behind each half, scales without shifts, and gates through tanh.

Modules have the checkpoint's own names. The residual stream is in the network's dtype; norms, modulation and RoPE are
in f32. Its time is 1 - sigma and its output x0 - noise, the opposite of a velocity.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from solrl_jax import weights
from solrl_jax.models.layers import F32, Linear, RMSNorm, attention, normalise, sinusoid
from solrl_jax.models.mmdit import stack
from solrl_jax.models.qwen3 import Z_IMAGE_BLOCK as MULTIPLE
from solrl_jax.models.rope import Rope, Scale, rotary_norm, signed
from solrl_jax.weights.options import Options

TIME_WIDTH, TIME_HIDDEN = 256, 1024


@dataclasses.dataclass(frozen=True)
class ZImageConfig:
    """The fields of transformer/config.json that shape the network; the defaults are diffusers', Z-Image's."""

    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1024, 512, 512)

    options: ClassVar[Options] = Options(
        "diffusers",
        only={"all_patch_size": (2,), "all_f_patch_size": (1,), "qk_norm": (True,), "siglip_feat_dim": (None,)},
    )

    def __post_init__(self):
        if self.n_kv_heads != self.n_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} is not n_heads {self.n_heads}: not a network of Z-Image's")
        if len(self.axes_dims) != 3 or any(d % 2 for d in self.axes_dims):
            raise ValueError(f"axes_dims {self.axes_dims} are not three even numbers")
        if self.dim % self.n_heads or sum(self.axes_dims) != self.head_dim:
            raise ValueError(f"axes_dims {self.axes_dims} do not add up to dim {self.dim} over n_heads {self.n_heads}")
        if len(self.axes_lens) != 3:
            raise ValueError(f"axes_lens {self.axes_lens} are not three numbers")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def hidden(self) -> int:
        return int(self.dim / 3 * 8)

    @property
    def time_width(self) -> int:
        return min(self.dim, TIME_WIDTH)

    @classmethod
    def read(cls, folder: str | Path) -> "ZImageConfig":
        """From config.json; a folder of another network is refused by its class name."""
        return weights.from_config(cls, folder, weights.read_config(folder, "ZImageTransformer2DModel"))


# --- positions ------------------------------------------------------------------------------------------------------


Table = tuple[np.ndarray, np.ndarray]


class Places(NamedTuple):
    """cos and signed sin of RoPE, f32: `frames` [F, d0] of the first axis by frame, `grid` [N, d - d0] of the others
    for the image's tokens. Channels 2k and 2k + 1 share an angle, as in flux.rope_table."""

    frames: Table
    grid: Table


def places(cfg: ZImageConfig, height: int, width: int, tokens: int) -> Places:
    """The tables of an image of height x width tokens, padded, and of captions of at most `tokens` tokens.

    Angles are computed in f64 and rounded to f32 before their cosines, as diffusers does: at 512 frames this rounding
    is 3e-5.
    """
    rows, cols = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    pad = np.zeros((-height * width % MULTIPLE, 2), int)
    ids = np.concatenate([np.stack([rows, cols], axis=-1).reshape(-1, 2), pad])
    grid = [_angles(ids[:, i], d, cfg.rope_theta) for i, d in enumerate(cfg.axes_dims[1:])]
    frames = _angles(np.arange(tokens + 2), cfg.axes_dims[0], cfg.rope_theta)
    return Places(signed(frames), signed(np.concatenate(grid, axis=-1)))


def _angles(at: np.ndarray, d: int, theta: float) -> np.ndarray:
    angle = at[:, None].astype(np.float64) / theta ** (np.arange(0, d, 2) / d)
    return np.repeat(angle.astype(np.float32).astype(np.float64), 2, axis=-1)


def padded(length: Int[Array, "B"]) -> Int[Array, "B"]:
    """The tokens of a caption with its learned padding."""
    return -(-length // MULTIPLE) * MULTIPLE


def image_rope(where: Places, length: Int[Array, "B"], tokens: int) -> Rope:
    """[B, N, d] of `tokens` image tokens and their padding, which is at the origin."""
    count = where.grid[0].shape[0]
    frame = jnp.where(jnp.arange(count)[None] < tokens, padded(length)[:, None] + 1, 0)
    shape = (length.shape[0], *where.grid[0].shape)
    cos, sin = (
        jnp.concatenate([jnp.asarray(table)[frame], jnp.broadcast_to(rest, shape)], axis=-1)
        for table, rest in zip(where.frames, where.grid, strict=True)
    )
    return cos, sin


def caption_rope(where: Places, batch: int, tokens: int) -> Rope:
    """[B, L, d] of L caption tokens, learned padding too: frames 1, 2, ..., at the grid's origin."""
    first, rest = where.frames[0].shape[-1], where.grid[0].shape[-1]
    cos, sin = (
        jnp.pad(jnp.asarray(table)[1 : tokens + 1], ((0, 0), (0, rest)), constant_values=fill)
        for table, fill in zip(where.frames, (1.0, 0.0), strict=True)
    )
    shape = (batch, tokens, first + rest)
    return jnp.broadcast_to(cos, shape), jnp.broadcast_to(sin, shape)


def rotary_norms(x: Float[Array, "B S H d"], scale: Float[Array, "1 S 1 d"], rope: Rope) -> Float[Array, "B S H d"]:
    """RoPE of RMSNorm(x), eps 1e-5 whatever norm_eps is, with each sample's own table [B, S, d]."""

    def one(x: Array, cos: Array, sin: Array) -> Array:
        return rotary_norm(x[None], scale, (cos, sin), 1e-5)[0]

    return jax.vmap(one)(x, *rope)


# --- layers ---------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention of each sample to its first `lengths` tokens (None: to all), without biases."""

    cfg: ZImageConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], rope: Rope, lengths: Array | None) -> Float[Array, "B S D"]:
        heads = (*x.shape[:2], self.cfg.n_heads, self.cfg.head_dim)
        names = ("to_q", "to_k", "to_v")
        found = [Linear(self.cfg.dim, use_bias=False, dtype=self.dtype, name=name)(x) for name in names]
        q, k, v = (checkpoint_name(y.reshape(heads), "qkv") for y in found)
        scales = [Scale((x.shape[1], self.cfg.head_dim), name=name)() for name in ("norm_q", "norm_k")]
        q, k = (rotary_norms(y, scale, rope) for y, scale in zip((q, k), scales, strict=True))
        out = checkpoint_name(attention(q, k, v, lengths=lengths), "attention")
        return Linear(self.cfg.dim, use_bias=False, dtype=self.dtype, name="to_out.0")(out.reshape(x.shape))


class FeedForward(nn.Module):
    """w2(SiLU(w1 x) * w3 x), without biases; the gate is computed in f32."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        gate, up = (
            checkpoint_name(Linear(self.hidden, use_bias=False, dtype=self.dtype, name=name)(x), "mlp").astype(F32)
            for name in ("w1", "w3")
        )
        y = (jax.nn.silu(gate) * up).astype(self.dtype)
        return Linear(x.shape[-1], use_bias=False, dtype=self.dtype, name="w2")(y)


class Block(nn.Module):
    """Attention and feed-forward, each between two RMSNorms; modulated by `cond` [B, 256] unless that is None."""

    cfg: ZImageConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], cond: Array | None, rope: Rope, lengths: Array | None):
        scale_a, gate_a, scale_m, gate_m = self._modulation(cond)
        y = Attention(self.cfg, self.dtype, name="attention")(self._norm("attention_norm1", x, scale_a), rope, lengths)
        x = self._added(x, gate_a, "attention_norm2", y)
        y = FeedForward(self.cfg.hidden, self.dtype, name="feed_forward")(self._norm("ffn_norm1", x, scale_m))
        return self._added(x, gate_m, "ffn_norm2", y), None

    def _modulation(self, cond: Array | None) -> list[Float[Array, "_ 1 _"]]:
        """Scale and gate of each half, f32. There is no SiLU before this Linear, unlike in other DiTs."""
        if cond is None:
            return [jnp.ones((1, 1, 1))] * 4
        four = Linear(4 * self.cfg.dim, dtype=self.dtype, bias_after=True, name="adaLN_modulation.0")(cond)
        scale_a, gate_a, scale_m, gate_m = jnp.split(four.astype(F32)[:, None], 4, axis=-1)
        return [1 + scale_a, jnp.tanh(gate_a), 1 + scale_m, jnp.tanh(gate_m)]

    def _norm(self, name: str, x: Array, scale: Array) -> Array:
        return (RMSNorm(self.cfg.norm_eps, name=name)(x).astype(F32) * scale).astype(self.dtype)

    def _added(self, x: Array, gate: Array, name: str, y: Array) -> Array:
        """x + gate RMSNorm(y), added in f32."""
        return (x.astype(F32) + gate * RMSNorm(self.cfg.norm_eps, name=name)(y).astype(F32)).astype(x.dtype)


class Time(nn.Module):
    """1 - sigma, times t_scale -> the vector by which every block is modulated."""

    cfg: ZImageConfig
    dtype: Any

    @nn.compact
    def __call__(self, sigma: Float[Array, "B"]) -> Float[Array, "B c"]:
        y = Linear(TIME_HIDDEN, dtype=self.dtype, name="mlp.0")(sinusoid(self.cfg.t_scale * (1 - sigma)))
        return Linear(self.cfg.time_width, dtype=self.dtype, name="mlp.2")(jax.nn.silu(y))


class FinalLayer(nn.Module):
    """LayerNorm, scaled by the time; then a Linear to `channels`. Here alone a SiLU precedes the modulation."""

    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], cond: Float[Array, "B c"]) -> Float[Array, "B N C"]:
        scale = Linear(x.shape[-1], dtype=self.dtype, bias_after=True, name="adaLN_modulation.1")(jax.nn.silu(cond))
        y = (normalise(x, 1e-6) * (1 + scale.astype(F32)[:, None])).astype(self.dtype)
        return Linear(self.channels, dtype=self.dtype, name="linear")(y)


class Caption(nn.Module):
    """Qwen3's states [B, L, Dt], of which `length` [B] belong to the text -> the refined caption [B, L, D].

    Everything behind the text becomes the learned pad token, so what stands there in `text` has no effect. Its
    parameters are ZImageTransformer's.
    """

    cfg: ZImageConfig
    dtype: Any = jnp.bfloat16
    remat: bool = False
    keeps: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, text: Float[Array, "B L Dt"], length: Int[Array, "B"], rope: Rope) -> Float[Array, "B L D"]:
        return refined(self, text, length, rope)


def refined(
    at: "Caption | ZImageTransformer", text: Float[Array, "B L Dt"], length: Int[Array, "B"], rope: Rope
) -> Float[Array, "B L D"]:
    """`Caption`, as submodules of the module `at`."""
    cfg, dtype = at.cfg, at.dtype
    y = RMSNorm(cfg.norm_eps, name="cap_embedder.0")(text.astype(dtype))
    y = Linear(cfg.dim, dtype=dtype, name="cap_embedder.1")(y)
    pad = jnp.asarray(at.param("cap_pad_token", nn.initializers.normal(0.02), (1, cfg.dim), F32))
    inside = jnp.arange(text.shape[1])[None, :, None] < length[:, None, None]
    y = jnp.where(inside, y, pad[None].astype(dtype))
    blocks = stack(Block, cfg.n_refiner_layers, 3, remat=at.remat, keeps=at.keeps)
    return blocks(cfg, dtype, name="context_refiner")(y, None, rope, padded(length))[0]


class ZImageTransformer(nn.Module):
    """x0 - noise [B, N, C] of image tokens [B, N, C], the opposite of the velocity.

    Given sigma [B], how many of the L caption tokens are text, int [B], and Qwen3's states of them [B, L, Dt] or
    `Caption`'s [B, L, D].
    """

    cfg: ZImageConfig
    dtype: Any = jnp.bfloat16
    remat: bool = False
    keeps: tuple[str, ...] = ()  # what remat does not recompute, of "attention", "qkv", "mlp"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N C"],
        sigma: Float[Array, "B"],
        length: Int[Array, "B"],
        where: Places,
        text: Array | None = None,
        caption: Array | None = None,
    ) -> Float[Array, "B N C"]:
        cfg, dtype, (batch, tokens, channels) = self.cfg, self.dtype, x.shape
        given = text if caption is None else caption
        assert given is not None
        ropes = image_rope(where, length, tokens), caption_rope(where, batch, given.shape[1])
        cond = Time(cfg, dtype, name="t_embedder")(sigma)
        image = self._padded(Linear(cfg.dim, dtype=dtype, name="all_x_embedder.2-1")(x))
        how: Any = {"remat": self.remat, "keeps": self.keeps}
        noise = stack(Block, cfg.n_refiner_layers, 3, **how)(cfg, dtype, name="noise_refiner")
        image, _ = noise(image, cond, ropes[0], None)
        words = refined(self, given, length, ropes[1]) if caption is None else given
        both = jnp.concatenate([image, words.astype(dtype)], axis=1)
        cos, sin = (jnp.concatenate(pair, axis=1) for pair in zip(*ropes, strict=True))
        layers = stack(Block, cfg.n_layers, 3, **how)(cfg, dtype, name="layers")
        both, _ = layers(both, cond, (cos, sin), image.shape[1] + padded(length))
        return FinalLayer(channels, dtype, name="all_final_layer.2-1")(both[:, :tokens], cond)

    def _padded(self, image: Float[Array, "B N D"]) -> Float[Array, "B M D"]:
        """Image tokens and, up to a multiple of 32, the learned pad token."""
        pad = jnp.asarray(self.param("x_pad_token", nn.initializers.normal(0.02), (1, self.cfg.dim), F32))
        batch, tokens, width = image.shape
        rest = jnp.broadcast_to(pad[None].astype(image.dtype), (batch, -tokens % MULTIPLE, width))
        return jnp.concatenate([image, rest], axis=1)


def pack(latents: Float[Array, "B h w c"]) -> Float[Array, "B N C"]:
    """2x2 patches as tokens, row-major; channel = (dy, dx, c) with c fastest, unlike FLUX's."""
    b, h, w, c = latents.shape
    x = latents.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(tokens: Float[Array, "B N C"], height: int, width: int) -> Float[Array, "B h w c"]:
    """The inverse of `pack`; height and width in latents."""
    b, _, c = tokens.shape
    x = tokens.reshape(b, height // 2, width // 2, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height, width, c // 4)
