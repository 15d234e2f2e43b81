"""The decoder of diffusers' AutoencoderDC, for SANA: a latent covers 32 x 32 pixels, channels last.

Residual blocks in the fine stages, linear attention at several scales in the coarse stages. Norms and attention sums
are f32, convolutions `dtype`. Outside this file latents are scaled: the autoencoder's own z times scaling_factor.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from solrl_jax import device, weights
from solrl_jax.models.convolutions import DepthwiseConv, GatedConv, UpConv, conv
from solrl_jax.models.layers import F32, Linear, RMSNorm, linear_attention, parameters, precision_of
from solrl_jax.structs import Params
from solrl_jax.weights import Place, Rule
from solrl_jax.weights.options import Options

Features = Float[Array, "B h w C"]
EXPANSION = 4  # of the gated convolutions
EPS = 1e-5  # of every norm


@dataclasses.dataclass(frozen=True)
class DcaeConfig:
    """The decoder's fields of an AutoencoderDC's config.json; the defaults are f32c32's."""

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    decoder_block_types: tuple[str, ...] = (*("ResBlock",) * 3, *("EfficientViTBlock",) * 3)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_layers_per_block: tuple[int, ...] = (3,) * 6
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = "pixel_shuffle"
    decoder_norm_types: str = "rms_norm"
    decoder_act_fns: str = "silu"
    decoder_conv_act_fn: str = "relu"
    decoder_in_shortcut: bool = True
    scaling_factor: float = 1.0

    options: ClassVar[Options] = Options(
        "diffusers",
        idle=(
            "downsample_block_type",
            *(f"encoder_{x}" for x in ("block_types", "block_out_channels", "layers_per_block", "qkv_multiscales")),
            "encoder_out_shortcut",
        ),
    )

    def __post_init__(self):
        known = {"upsample_block_type": "interpolate", "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"}
        known |= {"decoder_conv_act_fn": "relu", "decoder_in_shortcut": True}
        if strange := {name: found for name, is_ in known.items() if (found := getattr(self, name)) != is_}:
            raise ValueError(f"{strange} is not known here: only f32c32's {known}")
        if other := sorted(set(self.decoder_block_types) - {"ResBlock", "EfficientViTBlock"}):
            raise ValueError(f"decoder_block_types {other} are not known here: only ResBlock and EfficientViTBlock")
        widths, stages = self.decoder_block_out_channels, len(self.decoder_block_out_channels)
        lists = self.decoder_block_types, self.decoder_layers_per_block, self.decoder_qkv_multiscales
        names = "decoder_block_types", "decoder_layers_per_block", "decoder_qkv_multiscales"
        if other := {name: len(x) for name, x in zip(names, lists, strict=True) if len(x) != stages}:
            raise ValueError(f"decoder_block_out_channels has {stages} stages, but {other}")
        if even := [k for scales in self.decoder_qkv_multiscales for k in scales if k % 2 == 0]:
            raise ValueError(f"decoder_qkv_multiscales {even} are not odd")
        heads = [w for w, kind in zip(widths, self.decoder_block_types, strict=True) if kind != "ResBlock"]
        if bad := [width for width in heads if width % self.attention_head_dim]:
            raise ValueError(
                f"decoder_block_out_channels {bad} do not divide into attention_head_dim {self.attention_head_dim}"
            )
        if widths[-1] % self.latent_channels or any(4 * a % b for a, b in itertools.pairwise(widths)):
            raise ValueError(
                f"decoder_block_out_channels {widths} do not divide as the shortcuts need (latent_channels "
                f"{self.latent_channels})"
            )

    @classmethod
    def read(cls, folder: str | Path) -> "DcaeConfig":
        return weights.from_config(cls, folder, weights.read_config(folder, "AutoencoderDC"))

    @property
    def factor(self) -> int:
        """Image pixels along one side of a latent."""
        return 2 ** (len(self.decoder_block_out_channels) - 1)

    @property
    def channels(self) -> int:
        return self.latent_channels

    @property
    def shift_factor(self) -> float:
        return 0.0


# --- layers ---------------------------------------------------------------------------------------------------------


def _conv(width: int, dtype: Any, name: str, bias: bool = True) -> nn.Conv:
    return conv(width, (3, 3), padding="SAME", use_bias=bias, dtype=dtype, name=name)


def _norm(name: str) -> RMSNorm:
    return RMSNorm(EPS, use_bias=True, name=name)


def pixel_shuffle(x: Float[Array, "B h w C"]) -> Float[Array, "B H W c"]:
    """Each pixel's channels (c, dy, dx), c slowest, become 2x2 pixels."""
    b, h, w, channels = x.shape
    x = x.reshape(b, h, w, channels // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, 2 * h, 2 * w, channels // 4)


class ResBlock(nn.Module):
    """x + norm(conv2(SiLU(conv1(x))))."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Features) -> Features:
        y = jax.nn.silu(_conv(x.shape[-1], self.dtype, "conv1")(x))
        return x + _norm("norm")(_conv(x.shape[-1], self.dtype, "conv2", bias=False)(y))


class Scale(nn.Module):
    """q, k and v at another scale: a depthwise k x k convolution, then a mix of each run of `run` channels."""

    size: int
    run: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Features) -> Features:
        runs = x.shape[-1] // self.run
        x = DepthwiseConv(self.size, use_bias=False, dtype=self.dtype, name="proj_in")(x)
        kernel = self.param("proj_out", nn.initializers.lecun_normal(), (1, 1, self.run, x.shape[-1]), F32)
        kernel = jnp.asarray(kernel).astype(self.dtype).reshape(self.run, runs, self.run)
        x = x.reshape(*x.shape[:3], runs, self.run)
        # On GPUs f32 results would be written to memory and read three times (tests/test_sana_compiled.py::
        # test_attention_of_the_decoder). cuBLASLt rounds its f32 sums in the same way.
        out = self.dtype if device.platform() == "gpu" else F32
        how: dict[str, Any] = {"precision": precision_of(self.dtype), "preferred_element_type": out}
        y = jnp.einsum("bhwgi,igo->bhwgo", x, kernel, **how)
        return y.astype(self.dtype).reshape(*x.shape[:3], -1)


class Attention(nn.Module):
    """x + norm(projected linear attention over all positions, at the scales of `scales` side by side).

    The released weights split the channels [q k v, the scales' q k v] into runs of three heads and take each run as q,
    k, v of one head. So a run can cross the borders between the three projections.
    """

    head: int
    scales: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: Features) -> Features:
        b, h, w, channels = x.shape
        names = ("to_q", "to_k", "to_v")
        found = [Linear(channels, use_bias=False, dtype=self.dtype, name=name)(x) for name in names]
        qkv = jnp.concatenate(found, axis=-1)
        more = [Scale(k, self.head, self.dtype, name=f"scale_{i}")(qkv) for i, k in enumerate(self.scales)]
        groups = jnp.concatenate([qkv, *more], axis=-1).reshape(b, h * w, -1, 3 * self.head)
        out = linear_attention(*jnp.split(groups, 3, axis=-1)).reshape(b, h, w, -1)
        return x + _norm("norm_out")(Linear(channels, use_bias=False, dtype=self.dtype, name="to_out")(out))


class VitBlock(nn.Module):
    """Attention, then a gated convolution: x + norm(GatedConv(x))."""

    head: int
    scales: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: Features) -> Features:
        x = Attention(self.head, self.scales, self.dtype, name="attn")(x)
        return x + _norm("norm")(GatedConv(EXPANSION * x.shape[-1], self.dtype, name="conv_out")(x))


class Upsample(nn.Module):
    """conv(x with each pixel repeated as 2x2) + pixel_shuffle(x with its channels repeated)."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "B H W {self.width}"]:
        direct = pixel_shuffle(jnp.repeat(x, 4 * self.width // x.shape[-1], axis=-1))
        return UpConv(self.width, self.dtype, name="conv")(x) + direct


class Decoder(nn.Module):
    """z -> x, about in [-1, 1]; used by vae.decode."""

    cfg: DcaeConfig
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, z: Float[Array, "B h w z"]) -> Float[Array, "B H W c"]:
        cfg, dtype, z = self.cfg, self.dtype, z.astype(self.dtype)
        widths = cfg.decoder_block_out_channels
        x = _conv(widths[-1], dtype, "conv_in")(z) + jnp.repeat(z, widths[-1] // cfg.latent_channels, axis=-1)
        for i in reversed(range(len(widths))):
            first = int(i < len(widths) - 1)
            if first:
                x = Upsample(widths[i], dtype, name=f"up_blocks_{i}_0")(x)
            for j in range(first, first + cfg.decoder_layers_per_block[i]):
                name = f"up_blocks_{i}_{j}"
                if cfg.decoder_block_types[i] == "ResBlock":
                    x = ResBlock(dtype, name=name)(x)
                else:
                    x = VitBlock(cfg.attention_head_dim, cfg.decoder_qkv_multiscales[i], dtype, name=name)(x)
        x = jax.nn.relu(_norm("norm_out")(x))
        return _conv(cfg.in_channels, dtype, "conv_out")(x)


# --- weights --------------------------------------------------------------------------------------------------------


_BLOCK, _THERE = r"up_blocks_(\d+)_(\d+)/", r"decoder.up_blocks.\1.\2."
KEYS = (
    Rule(_BLOCK + r"attn/(to_\w+)/kernel", _THERE + r"attn.\3.weight", "linear"),
    Rule(_BLOCK + r"attn/scale_(\d)/proj_in/kernel", _THERE + r"attn.to_qkv_multiscale.\3.proj_in.weight", "conv"),
    Rule(_BLOCK + r"attn/scale_(\d)/proj_out", _THERE + r"attn.to_qkv_multiscale.\3.proj_out.weight", "conv"),
    Rule(_BLOCK + r"attn/norm_out/scale", _THERE + "attn.norm_out.weight"),
    Rule(_BLOCK + r"attn/norm_out/bias", _THERE + "attn.norm_out.bias"),
    Rule(_BLOCK + r"conv_out/(inverted|point)_conv\.linear/kernel", _THERE + r"conv_out.conv_\3.weight", "pointwise"),
    Rule(_BLOCK + r"conv_out/depth_conv\.conv/kernel", _THERE + "conv_out.conv_depth.weight", "conv"),
    Rule(_BLOCK + r"conv_out/(inverted|depth)_conv\.\w+/bias", _THERE + r"conv_out.conv_\3.bias"),
    Rule(_BLOCK + r"(conv\d?)/kernel", _THERE + r"\3.weight", "conv"),
    Rule(_BLOCK + r"(conv\d?)/bias", _THERE + r"\3.bias"),
    Rule(r"(conv_in|conv_out)/kernel", r"decoder.\1.weight", "conv"),
    Rule(r"(conv_in|conv_out)/bias", r"decoder.\1.bias"),
    Rule(r"norm_out/scale", "decoder.norm_out.weight"),
    Rule(r"norm_out/bias", "decoder.norm_out.bias"),
)


def keys(cfg: DcaeConfig) -> tuple[Rule, ...]:
    """The key table. In the checkpoint a gated convolution contains its norm."""
    norms = []
    for i, kind in enumerate(cfg.decoder_block_types):
        inside = "norm" if kind == "ResBlock" else "conv_out.norm"
        there = rf"decoder.up_blocks.{i}.\1.{inside}"
        norms += [Rule(rf"up_blocks_{i}_(\d+)/norm/scale", f"{there}.weight")]
        norms += [Rule(rf"up_blocks_{i}_(\d+)/norm/bias", f"{there}.bias")]
    return (*norms, *KEYS)


def load(folder: str | Path, dtype: Any = jnp.bfloat16, place: Place | None = None) -> tuple[Decoder, Params]:
    """Module and parameters (in `dtype`; numpy, or the results of `place`) of a folder in diffusers' layout."""
    cfg = DcaeConfig.read(folder)
    module = Decoder(cfg, dtype)
    spec = parameters(module, jnp.zeros((1, 1, 1, cfg.latent_channels)))
    files = weights.Files(folder, "diffusion_pytorch_model")
    return module, weights.load(files, spec, keys(cfg), dtype=dtype, droppable=(r"encoder\..*",), place=place)
