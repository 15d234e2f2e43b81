"""CLIP with both towers, and the pieces that every CLIP reward shares (spec/rewards.md sections 2-4).

The parameter tree knows no naming: HF_KEYS is transformers' CLIPModel, another spelling is another table.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from solrl_jax import weights
from solrl_jax.models.layers import F32, LayerNorm, Linear
from solrl_jax.models.text import (
    ClipLayer,
    ClipText,
    ClipTextConfig,
    check_layer_config,
    clip_layer_rules,
    clip_text_rules,
    run_layers,
)
from solrl_jax.structs import Images, Params, PerSample
from solrl_jax.weights import Rule

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_table = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """vision_config of a CLIP's config.json; the defaults are transformers' own for missing keys."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        check_layer_config(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """A CLIP's config.json. Both projections end in `projection_dim` channels."""

    text: ClipTextConfig
    vision: ClipVisionConfig
    projection_dim: int = 512

    @classmethod
    def read(cls, folder: str | Path) -> "ClipConfig":
        values = weights.read_config(folder)
        # The text tower's own projection_dim is for a text encoder that stands alone; here the outer one counts.
        outer = {"projection_dim": values.get("projection_dim")}
        text = weights.from_config(ClipTextConfig, folder, {**_part(values, "text_config", folder), **outer})
        vision = weights.from_config(ClipVisionConfig, folder, _part(values, "vision_config", folder))
        return cls(text, vision, text.projection_dim)


def _part(values: Mapping[str, Any], name: str, folder: str | Path) -> Mapping[str, Any]:
    """Old configs carry the sub-config twice; as in transformers the "_dict" spelling wins where it is not null."""
    old = values.get(name + "_dict")
    found = (values.get(name) or {}) if old is None else old
    if not isinstance(found, Mapping):
        raise weights.WeightsError(f"{Path(folder) / 'config.json'}: {name} is {found!r}, not an object")
    return found


class ClipVision(nn.Module):
    """Normalised pixels -> projected state of the class token."""

    cfg: ClipVisionConfig
    projection_dim: int
    dtype: Any = F32

    @nn.compact
    def __call__(self, pixels: Float[Array, "B H W c"]) -> Float[Array, "B D"]:
        cfg, patch = self.cfg, (self.cfg.patch_size, self.cfg.patch_size)
        width, count = cfg.hidden_size, (cfg.image_size // cfg.patch_size) ** 2
        embed = nn.Conv(width, patch, patch, padding="VALID", use_bias=False, dtype=self.dtype, name="patch_embedding")
        patches = embed(pixels).reshape(-1, count, width)
        first = jnp.asarray(self.param("class_embedding", _table, (width,), F32), self.dtype)
        positions = jnp.asarray(self.param("position_embedding", _table, (1 + count, width), F32), self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (len(pixels), 1, width)), patches], axis=1) + positions[None]
        x = LayerNorm(cfg.layer_norm_eps, name="pre_norm")(x)
        x, _ = run_layers(ClipLayer(cfg, self.dtype, name="layers"), cfg.num_hidden_layers, x, None)
        x = LayerNorm(cfg.layer_norm_eps, name="post_norm")(x[:, 0])
        return Linear(self.projection_dim, use_bias=False, dtype=self.dtype, name="projection")(x)


class ClipTower(nn.Module):
    """Both towers. Features are f32 and of length one, so that a cosine is a dot product."""

    cfg: ClipConfig
    dtype: Any = F32

    def setup(self):
        self.text = ClipText(self.cfg.text, self.dtype, project=True)
        self.vision = ClipVision(self.cfg.vision, self.cfg.projection_dim, self.dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), (), F32)  # log of the factor

    def image_features(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        return _unit(self.vision(pixels))

    def text_features(self, ids: Int[Array, "G L"]) -> Float[Array, "G D"]:
        return _unit(self.text(ids).pooled)

    def __call__(
        self, pixels: Float[Array, "B H W 3"], ids: Int[Array, "G L"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "G D"]]:
        """Both kinds of features; what `init` runs."""
        return self.image_features(pixels), self.text_features(ids)


def _unit(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    x = x.astype(F32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def pair_cosines(image: Float[Array, "B D"], text: Float[Array, "G D"]) -> PerSample:
    """Cosine of image i and prompt i // (B // G), both of length one."""
    groups = len(text)
    if len(image) % groups:
        raise ValueError(f"{len(image)} images of {groups} prompts: each prompt must have equally many")
    grouped = image.reshape(groups, -1, image.shape[-1])
    return jnp.sum(grouped * text[:, None], axis=-1).reshape(-1)


def resize_crop(images: Images, size: int, method: str) -> Float[Array, "B {size} {size} 3"]:
    """Short edge to `size` (antialiased, values neither rounded nor clipped; unless it is that), then the middle.

    `method` is "linear" or "cubic": jax.image.resize equals torchvision's antialiased float resize to 1e-6.
    """
    height, width = images.shape[1:3]
    short = min(height, width)
    if short != size:
        height, width = (size if n == short else int(size * n / short) for n in (height, width))
        images = jax.image.resize(images, (len(images), height, width, 3), method, antialias=True)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return images[:, top : top + size, left : left + size]


def standardise(images: Images, mean: tuple[float, ...], std: tuple[float, ...]) -> Images:
    """(x - mean) / std by channel."""
    centred = images - jnp.asarray(mean, F32).reshape(1, 1, 1, 3)
    return centred / jnp.asarray(std, F32).reshape(1, 1, 1, 3)


def read_mean_std(folder: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of preprocessor_config.json; OpenAI's numbers, which all known CLIPs use, where the file or a key is missing."""
    file = Path(folder) / "preprocessor_config.json"
    values = weights.read_json(file) if file.is_file() else {}
    mean, std = values.get("image_mean") or OPENAI_MEAN, values.get("image_std") or OPENAI_STD
    return tuple(map(float, mean)), tuple(map(float, std))


HF_KEYS = (
    *clip_text_rules("text/"),
    Rule(r"vision/class_embedding", "vision_model.embeddings.class_embedding"),
    Rule(r"vision/position_embedding", "vision_model.embeddings.position_embedding.weight"),
    Rule(r"vision/patch_embedding/kernel", "vision_model.embeddings.patch_embedding.weight", "conv"),
    Rule(r"vision/pre_norm/scale", "vision_model.pre_layrnorm.weight"),  # sic
    Rule(r"vision/pre_norm/bias", "vision_model.pre_layrnorm.bias"),
    *clip_layer_rules("vision/", "vision_model"),
    Rule(r"vision/post_norm/scale", "vision_model.post_layernorm.weight"),
    Rule(r"vision/post_norm/bias", "vision_model.post_layernorm.bias"),
    Rule(r"vision/projection/kernel", "visual_projection.weight", "linear"),
    Rule(r"logit_scale", "logit_scale"),
)


def load_clip(folder: str | Path, dtype: Any = F32) -> tuple[ClipTower, Params]:
    """Module that computes in `dtype`, and f32 parameters (numpy), of a CLIPModel folder in transformers' layout."""
    tower = ClipTower(ClipConfig.read(folder), dtype)
    # f32 whatever the dtype: exp(logit_scale) would be off by 0.3 percent in bf16.
    files, droppable = weights.Files(folder, "model"), (r".*\.position_ids",)
    return tower, weights.load(files, shapes(tower), HF_KEYS, dtype=F32, droppable=droppable)


def shapes(tower: ClipTower) -> Params:
    """The tower's parameters as ShapeDtypeStructs, f32."""
    cfg = tower.cfg.vision
    pixels, ids = jnp.zeros((1, cfg.image_size, cfg.image_size, cfg.num_channels)), jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(tower.init, jax.random.key(0), pixels, ids)["params"]
