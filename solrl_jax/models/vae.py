"""diffusers' AutoencoderKL, of FLUX and SD3.5: encoder and decoder, channels last. And FLUX.2's AutoencoderKLFlux2, its
decoder alone.

GroupNorm is f32, convolutions `dtype`. Outside this file latents are scaled: (z - shift) * scaling of the VAE's own z,
so that their standard deviation is about one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from solrl_jax import device, weights
from solrl_jax.models.convolutions import UpConv, conv
from solrl_jax.models.layers import F32, Linear, attention, parameters
from solrl_jax.structs import Images, Latents, Params
from solrl_jax.weights import Place, Rule
from solrl_jax.weights.options import Options

Features = Float[Array, "B h w C"]
EPS = 1e-6  # of every norm


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """config.json of an AutoencoderKL; the defaults are diffusers' own for missing keys (a null shift is 0)."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    options: ClassVar[Options] = Options(
        "diffusers",
        only={
            "act_fn": ("silu",),
            "down_block_types": ("DownEncoderBlock2D",),
            "up_block_types": ("UpDecoderBlock2D",),
            "latents_mean": (None,),
            "latents_std": (None,),
        },
        idle=("sample_size", "force_upcast"),
    )

    def __post_init__(self):
        if self.use_quant_conv or self.use_post_quant_conv:
            raise ValueError(
                "use_quant_conv and use_post_quant_conv must be false: only VAEs without them are known here"
            )
        bad = [width for width in self.block_out_channels if width % self.norm_num_groups]
        if bad:
            raise ValueError(f"block_out_channels {bad} do not divide into norm_num_groups {self.norm_num_groups}")

    @classmethod
    def read(cls, folder: str | Path) -> "VaeConfig":
        """From config.json; another kind of autoencoder is refused by its class name."""
        raw = weights.read_config(folder, "AutoencoderKL")
        found = weights.from_config(cls, folder, raw)
        _check_blocks(folder, raw, found.block_out_channels, default=1)
        return found

    @property
    def factor(self) -> int:
        """Image pixels along one side of a latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """Of the latents that `decode` takes."""
        return self.latent_channels


def _check_blocks(folder: str | Path, raw: Mapping[str, Any], widths: Sequence[int], default: int) -> None:
    """WeightsError unless a VAE's lists of blocks are as long as that of their widths."""
    for name in ("down_block_types", "up_block_types"):
        if len(blocks := raw.get(name, ("diffusers' default",) * default)) != len(widths):
            raise weights.WeightsError(
                f"{Path(folder) / 'config.json'}: {name} has {len(blocks)} blocks, block_out_channels {len(widths)}"
            )


@dataclasses.dataclass(frozen=True)
class Flux2VaeConfig:
    """config.json of an AutoencoderKLFlux2; the defaults are diffusers' own for missing keys.

    Its latents here are those of the flow: 2x2 patches of the VAE's own, normalised by the statistics in its file.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 32
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] = ()  # of the variant with a small decoder; else as the encoder's
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True  # the encoder's
    use_post_quant_conv: bool = True
    batch_norm_eps: float = 1e-4

    options: ClassVar[Options] = Options(
        "diffusers",
        only={
            "act_fn": ("silu",),
            "down_block_types": ("DownEncoderBlock2D",),
            "up_block_types": ("UpDecoderBlock2D",),
            "patch_size": (2,),
        },
        idle=("sample_size", "force_upcast", "batch_norm_momentum"),
    )
    scaling_factor: ClassVar[float] = 1.0
    shift_factor: ClassVar[float] = 0.0

    def __post_init__(self):
        if len(self.decoder.block_out_channels) != len(self.block_out_channels):
            raise ValueError(
                f"decoder_block_out_channels {self.decoder_block_out_channels} are not as many as block_out_channels "
                f"{self.block_out_channels}"
            )

    @classmethod
    def read(cls, folder: str | Path) -> "Flux2VaeConfig":
        """From config.json; another kind of autoencoder is refused by its class name."""
        raw = weights.read_config(folder, "AutoencoderKLFlux2")
        found = weights.from_config(cls, folder, raw)
        _check_blocks(folder, raw, found.block_out_channels, default=4)
        return found

    @property
    def decoder(self) -> VaeConfig:
        """Of the network behind the statistics, the patches and the 1x1 convolution."""
        names = ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups")
        same = {name: getattr(self, name) for name in (*names, "mid_block_add_attention")}
        widths = self.decoder_block_out_channels or self.block_out_channels
        return VaeConfig(**same, block_out_channels=widths, use_quant_conv=False, use_post_quant_conv=False)

    @property
    def factor(self) -> int:
        return 2 * self.decoder.factor

    @property
    def channels(self) -> int:
        return 4 * self.latent_channels


def _norm(groups: int, name: str) -> nn.Module:
    if device.platform() == "gpu":
        return GroupNorm(groups, name=name)
    return nn.GroupNorm(groups, epsilon=EPS, use_fast_variance=False, dtype=F32, name=name)


class GroupNorm(nn.Module):
    """nn.GroupNorm in f32 with its sums from one pass over x, for GPUs: a second pass for the variance was an eighth of
    the decoder's memory traffic (tests/test_decoders_compiled.py::test_one_pass_for_the_norms).

    The sums are of x - c and (x - c)^2, c the mean of about four rows: so no large mean cancels in the variance
    E[(x - c)^2] - E[x - c]^2 (tests/test_vae.py::test_group_norm). They are one reduction of two operands, row by row
    first: as two, or over both axes at once, XLA writes x - c of small pictures in f32.
    """

    groups: int

    @nn.compact
    def __call__(self, x: Features) -> Features:
        scale, bias = (
            jnp.asarray(self.param(name, init, (x.shape[-1],), F32)).astype(F32).reshape(1, 1, 1, -1)
            for name, init in (("scale", nn.initializers.ones), ("bias", nn.initializers.zeros))
        )
        x = x.astype(F32)

        def mean(rows: Float[Array, "B k C"]) -> Float[Array, "B 1 1 C"]:
            """Over rows and each group's channels, for every channel."""
            found = jnp.mean(rows.reshape(*rows.shape[:2], self.groups, -1), axis=(1, 3))
            return jnp.repeat(found, x.shape[-1] // self.groups, axis=-1)[:, None, None]

        height = x.shape[1]
        near = mean(jnp.mean(x[:, height // 8 :: max(1, height // 4)], axis=2))
        off, zero = x - near, jnp.zeros((), F32)
        sums = jax.lax.reduce((off, off * off), (zero, zero), partial(jax.tree.map, jnp.add), (2,))
        rest, square = (mean(z) / x.shape[2] for z in sums)
        factor = jax.lax.rsqrt(jnp.maximum(square - rest * rest, 0.0) + EPS) * scale
        return (x - (near + rest)) * factor + bias


def _conv(width: int, dtype: Any, name: str, size: int = 3) -> nn.Conv:
    return conv(width, (size, size), padding="SAME", dtype=dtype, name=name)


class Resnet(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with a 1x1 convolution on x if the width changes."""

    width: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "B h w {self.width}"]:
        h = _conv(self.width, self.dtype, "conv1")(nn.silu(_norm(self.groups, "norm1")(x)))
        h = _conv(self.width, self.dtype, "conv2")(nn.silu(_norm(self.groups, "norm2")(h)))
        if x.shape[-1] != self.width:
            x = _conv(self.width, self.dtype, "conv_shortcut", size=1)(x)
        return x + h


class Attention(nn.Module):
    """x + single-head attention over all positions."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Features) -> Features:
        batch, height, width, channels = x.shape
        h = _norm(self.groups, "group_norm")(x).reshape(batch, height * width, channels)
        linear = partial(Linear, channels, dtype=self.dtype)
        q, k, v = (linear(name=name)(h)[:, :, None] for name in "qkv")
        return x + linear(name="out")(attention(q, k, v)[:, :, 0]).reshape(x.shape)


class Middle(nn.Module):
    """The coarsest level of encoder and decoder: resnet, attention, resnet."""

    cfg: VaeConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Features) -> Features:
        width, groups = self.cfg.block_out_channels[-1], self.cfg.norm_num_groups
        x = Resnet(width, groups, self.dtype, name="resnets_0")(x)
        if self.cfg.mid_block_add_attention:
            x = Attention(groups, self.dtype, name="attentions_0")(x)
        return Resnet(width, groups, self.dtype, name="resnets_1")(x)


class Encoder(nn.Module):
    """x in [-1, 1] -> mean and log-variance of z, side by side in the channels."""

    cfg: VaeConfig
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Float[Array, "B H W c"]) -> Float[Array, "B h w z"]:
        cfg, groups, dtype = self.cfg, self.cfg.norm_num_groups, self.dtype
        x = _conv(cfg.block_out_channels[0], dtype, "conv_in")(x)
        for i, width in enumerate(cfg.block_out_channels):
            for j in range(cfg.layers_per_block):
                x = Resnet(width, groups, dtype, name=f"down_blocks_{i}_resnets_{j}")(x)
            if i < len(cfg.block_out_channels) - 1:
                # Unlike "SAME": one row and column of zeros after the last pixel, none before the first.
                halve = partial(conv, width, (3, 3), strides=2, padding=((0, 1), (0, 1)), dtype=dtype)
                x = halve(name=f"down_blocks_{i}_downsamplers_0")(x)
        x = Middle(cfg, dtype, name="mid_block")(x)
        x = nn.silu(_norm(groups, "conv_norm_out")(x))
        return _conv(2 * cfg.latent_channels, dtype, "conv_out")(x)


class Decoder(nn.Module):
    """z -> x, about in [-1, 1]."""

    cfg: VaeConfig
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, z: Float[Array, "B h w z"]) -> Float[Array, "B H W c"]:
        cfg, groups, dtype = self.cfg, self.cfg.norm_num_groups, self.dtype
        x = _conv(cfg.block_out_channels[-1], dtype, "conv_in")(z)
        x = Middle(cfg, dtype, name="mid_block")(x)
        for i, width in enumerate(reversed(cfg.block_out_channels)):
            for j in range(cfg.layers_per_block + 1):
                x = Resnet(width, groups, dtype, name=f"up_blocks_{i}_resnets_{j}")(x)
            if i < len(cfg.block_out_channels) - 1:
                x = UpConv(width, dtype, name=f"up_blocks_{i}_upsamplers_0")(x)
        x = nn.silu(_norm(groups, "conv_norm_out")(x))
        return _conv(cfg.out_channels, dtype, "conv_out")(x)


class Statistics(nn.Module):
    """A BatchNorm's mean and variance of each channel, f32 [C], as they lie in its file: nothing is trained."""

    channels: int

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        mean = self.param("running_mean", nn.initializers.zeros, (self.channels,), F32)
        variance = self.param("running_var", nn.initializers.ones, (self.channels,), F32)
        return jnp.asarray(mean).astype(F32), jnp.asarray(variance).astype(F32)


class Flux2Decoder(nn.Module):
    """Normalised 2x2 patches of z, channels (c, dy, dx) with c slowest -> x, about in [-1, 1]."""

    cfg: Flux2VaeConfig
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, patches: Float[Array, "B h w four_z"]) -> Float[Array, "B H W c"]:
        cfg, (b, h, w, _) = self.cfg, patches.shape
        mean, variance = (x.reshape(1, 1, 1, -1) for x in Statistics(cfg.channels, name="bn")())
        z = patches.astype(F32) * jnp.sqrt(variance + cfg.batch_norm_eps) + mean
        z = z.reshape(b, h, w, cfg.latent_channels, 2, 2).transpose(0, 1, 4, 2, 5, 3)
        z = z.reshape(b, 2 * h, 2 * w, cfg.latent_channels)
        if cfg.use_post_quant_conv:
            z = _conv(cfg.latent_channels, self.dtype, "post_quant_conv", size=1)(z)
        return Decoder(cfg.decoder, self.dtype, name="decoder")(z)


def decode(module: Any, params: Params, latents: Latents) -> Images:
    """Scaled latents -> images, f32 in [0, 1], at most TOGETHER pixels at a time (24 images of 512 px take 16 GB).

    `module` is a `Decoder` or `Flux2Decoder` of this file, or a `Decoder` of dcae.py.
    """

    def some(latents: Latents) -> Images:
        z = latents.astype(F32) / module.cfg.scaling_factor + module.cfg.shift_factor
        x = jnp.asarray(module.apply({"params": params}, z), F32)
        return jnp.clip(x / 2 + 0.5, 0.0, 1.0)

    count, height, width, _ = latents.shape
    most = min(count, max(1, TOGETHER // (height * width * module.cfg.factor**2)))
    together = max(n for n in range(1, most + 1) if count % n == 0)
    if together == count:
        return some(latents)
    images = jax.lax.map(some, latents.reshape(-1, together, *latents.shape[1:]))
    return images.reshape(count, *images.shape[2:])


TOGETHER = 8 * 512 * 512
"""Pixels decoded at a time: enough to keep a GPU busy. Without a limit, decoding took a third of a FLUX rollout's
memory."""


def encode(module: Encoder, params: Params, images: Images) -> tuple[Latents, Latents]:
    """Images in [0, 1] -> mean and log-variance, f32, of the scaled latents that `decode` takes.

    In terms of the VAE's own z (whose log-variance is clipped to [-30, 20] as in diffusers): (mean - shift) * scaling
    and logvar + 2 log(scaling). A KL loss to a unit Gaussian must first convert them back to z.
    """
    scale, shift = module.cfg.scaling_factor, module.cfg.shift_factor
    x = jnp.asarray(module.apply({"params": params}, images.astype(F32) * 2 - 1), F32)
    mean, logvar = jnp.split(x, 2, axis=-1)
    return (mean - shift) * scale, jnp.clip(logvar, -30.0, 20.0) + 2 * jnp.log(scale)


def vae_rules(half: str, ours: str = "") -> tuple[Rule, ...]:
    """The key table of one half ("encoder" or "decoder") whose parameters are under the path `ours`."""
    places = (
        (r"(conv_in|conv_out|conv_norm_out)", r"\1"),
        (r"mid_block/resnets_(\d)/(\w+)", r"mid_block.resnets.\1.\2"),
        (r"mid_block/attentions_0/group_norm", r"mid_block.attentions.0.group_norm"),
        (r"(up|down)_blocks_(\d+)_resnets_(\d+)/(\w+)", r"\1_blocks.\2.resnets.\3.\4"),
        (r"(up|down)_blocks_(\d+)_(\w+)_0", r"\1_blocks.\2.\3.0.conv"),
    )
    linears = (
        (r"mid_block/attentions_0/(q|k|v)", r"mid_block.attentions.0.to_\1"),
        (r"mid_block/attentions_0/out", r"mid_block.attentions.0.to_out.0"),
    )
    return (
        *(Rule(f"{ours}{a}/kernel", f"{half}.{b}.weight", "conv") for a, b in places),
        *(Rule(f"{ours}{a}/kernel", f"{half}.{b}.weight", "linear") for a, b in linears),
        *(Rule(f"{ours}{a}/scale", f"{half}.{b}.weight") for a, b in places),
        *(Rule(f"{ours}{a}/bias", f"{half}.{b}.bias") for a, b in places + linears),
    )


ENCODER_KEYS, DECODER_KEYS = vae_rules("encoder"), vae_rules("decoder")
VAE_KEYS = (*vae_rules("encoder", "encoder/"), *vae_rules("decoder", "decoder/"))  # a tree {"encoder", "decoder"}
VAE_ALIASES = (  # the attention's spelling in old diffusers
    *((rf"\.attentions\.0\.{old}\.", f".attentions.0.to_{old[0]}.") for old in ("query", "key", "value")),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
)

FLUX2_KEYS = (
    *vae_rules("decoder", "decoder/"),
    Rule("post_quant_conv/kernel", "post_quant_conv.weight", "conv"),
    Rule("post_quant_conv/bias", "post_quant_conv.bias"),
    Rule(r"bn/(running_mean|running_var)", r"bn.\1"),
)


def load_flux2(
    folder: str | Path, dtype: Any = jnp.bfloat16, *, place: Place | None = None
) -> tuple[Flux2Decoder, Params]:
    """As `load_vae`, of an AutoencoderKLFlux2's decoder."""
    cfg = Flux2VaeConfig.read(folder)
    module = Flux2Decoder(cfg, dtype)
    spec = parameters(module, jnp.zeros((1, 1, 1, cfg.channels)))
    files = weights.Files(folder, "diffusion_pytorch_model")
    others = (r"encoder\..*", r"bn\.num_batches_tracked", *([r"quant_conv\..*"] * cfg.use_quant_conv))
    return module, weights.load(files, spec, FLUX2_KEYS, dtype=dtype, droppable=others, place=place)


@overload
def load_vae(
    folder: str | Path, dtype: Any = ..., *, encoder: Literal[True], place: Place | None = None
) -> tuple[Encoder, Params]: ...
@overload
def load_vae(
    folder: str | Path, dtype: Any = ..., *, encoder: Literal[False] = False, place: Place | None = None
) -> tuple[Decoder, Params]: ...
def load_vae(
    folder: str | Path, dtype: Any = jnp.bfloat16, *, encoder: bool = False, place: Place | None = None
) -> tuple[Decoder | Encoder, Params]:
    """Module and parameters (in `dtype`; numpy, or the results of `place`) of a folder in diffusers' layout.

    They are the decoder's, or with `encoder` the encoder's.
    """
    cfg = VaeConfig.read(folder)
    module = (Encoder if encoder else Decoder)(cfg, dtype)
    sample = (1, cfg.factor, cfg.factor, cfg.in_channels) if encoder else (1, 1, 1, cfg.latent_channels)
    spec = parameters(module, jnp.zeros(sample))
    rules, other = (ENCODER_KEYS, r"decoder\..*") if encoder else (DECODER_KEYS, r"encoder\..*")
    files = weights.Files(folder, "diffusion_pytorch_model")
    return module, weights.load(files, spec, rules, dtype=dtype, aliases=VAE_ALIASES, droppable=(other,), place=place)
