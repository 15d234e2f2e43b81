"""CLIP with both towers, and the parts that all CLIP rewards share.

Two key tables map the same parameter tree: HF_KEYS to transformers' CLIPModel, OPEN_CLIP_KEYS to open_clip's CLIP.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from solrl_jax import weights
from solrl_jax.models.convolutions import conv
from solrl_jax.models.layers import F32, LayerNorm, Linear, in_pairs, parameters
from solrl_jax.models.text import (
    ClipLayer,
    ClipText,
    ClipTextConfig,
    check_layer_config,
    clip_layer_rules,
    clip_text_rules,
    run_layers,
)
from solrl_jax.structs import Params, PerSample
from solrl_jax.weights import Rule
from solrl_jax.weights.options import Options, check

_table = nn.initializers.normal(0.02)


class Products(NamedTuple):
    """How a reward's network multiplies in its blocks: in `dtype`, and float32 in pairs of bf16 (layers.in_pairs)."""

    dtype: Any = jnp.dtype(F32)
    pairs: bool | None = None

    @classmethod
    def of(cls, name: Any) -> "Products":
        """From the config's reward_dtype, or from a dtype."""
        exact = isinstance(name, str) and name == "float32_exact"
        return cls(pairs=False) if exact else cls(jnp.dtype(name))


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

    # Pictures have three channels; the projection's width is in the outer config.
    options: ClassVar[Options] = Options(
        "transformers", only={"model_type": ("clip_vision_model",), "num_channels": (3,)}, idle=("projection_dim",)
    )

    def __post_init__(self):
        check_layer_config(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """A CLIP's config.json. Both projections end in `projection_dim` channels."""

    text: ClipTextConfig
    vision: ClipVisionConfig
    projection_dim: int = 512

    options: ClassVar[Options] = Options(
        "transformers",
        only={"model_type": ("clip",)},
        idle=(
            *(f"{side}_config{old}" for side in ("text", "vision") for old in ("", "_dict")),
            "logit_scale_init_value",
        ),
    )

    @classmethod
    def read(cls, folder: str | Path) -> "ClipConfig":
        values = weights.read_config(folder)
        check(cls.options, ("projection_dim",), Path(folder) / "config.json", values)
        # The text tower's own projection_dim is for a separate text encoder; here the outer one is used.
        outer = {"projection_dim": values.get("projection_dim")}
        text = weights.from_config(ClipTextConfig, folder, {**_part(values, "text_config", folder), **outer})
        vision = weights.from_config(ClipVisionConfig, folder, _part(values, "vision_config", folder))
        return cls(text, vision, text.projection_dim)

    @classmethod
    def read_open_clip(cls, folder: str | Path) -> "ClipConfig":
        """From open_clip_config.json; WeightsError for a CLIP of another architecture."""
        file = Path(folder) / "open_clip_config.json"
        found = weights.read_json(file)
        check(_OPEN_CLIP, (), file, found)
        try:
            return cls._of_open_clip(**found["model_cfg"])
        except (TypeError, ValueError, KeyError, ZeroDivisionError) as e:  # a field that is unknown, missing or 0
            raise weights.WeightsError(f"{file} describes a model that is not known here: {e}") from e

    @classmethod
    def _of_open_clip(
        cls, embed_dim: int, vision_cfg: Mapping[str, Any], text_cfg: Mapping[str, Any], quick_gelu: bool = False
    ) -> "ClipConfig":
        act = "quick_gelu" if quick_gelu else "gelu"

        def vision(image_size: int, layers: int, width: int, patch_size: int, head_width: int = 64):
            sizes = {"num_attention_heads": width // head_width, "intermediate_size": 4 * width, "hidden_act": act}
            return ClipVisionConfig(width, layers, image_size=image_size, patch_size=patch_size, **sizes)

        def text(context_length: int, vocab_size: int, width: int, heads: int, layers: int):
            sizes = {"intermediate_size": 4 * width, "max_position_embeddings": context_length, "hidden_act": act}
            # eos_token_id 2 means that the end is the largest id, as in open_clip.
            return ClipTextConfig(vocab_size, width, layers, heads, **sizes, eos_token_id=2, projection_dim=embed_dim)

        return cls(text(**text_cfg), vision(**vision_cfg), embed_dim)


_OPEN_CLIP = Options("diffusers", idle=("model_cfg", "preprocess_cfg"))  # HPSv2 prepares pictures in its own way

VIT_H_14 = ClipConfig(
    ClipTextConfig(49408, 1024, 24, 16, 4096, 77, "gelu", eos_token_id=2, projection_dim=1024),
    ClipVisionConfig(1280, 32, 16, 5120, patch_size=14, hidden_act="gelu"),
    projection_dim=1024,
)
"""laion/CLIP-ViT-H-14-laion2B-s32B-b79K, from which PickScore and HPSv2 were trained; vision has 16 heads of 80."""


def _part(values: Mapping[str, Any], name: str, folder: str | Path) -> Mapping[str, Any]:
    """Old configs have the sub-config twice; as in transformers the "_dict" spelling wins if it is not null."""
    old = values.get(name + "_dict")
    found = (values.get(name) or {}) if old is None else old
    if not isinstance(found, Mapping):
        raise weights.WeightsError(f"{Path(folder) / 'config.json'}: {name} is {found!r}, not an object")
    return found


class ClipVision(nn.Module):
    """Normalised pixels -> projected state of the class token, f32; the blocks' products are in `dtype`."""

    cfg: ClipVisionConfig
    projection_dim: int
    dtype: Any = F32
    pairs: bool = False  # see Linear

    @nn.compact
    def __call__(self, pixels: Float[Array, "B H W c"]) -> Float[Array, "B D"]:
        cfg, patch = self.cfg, (self.cfg.patch_size, self.cfg.patch_size)
        width, count = cfg.hidden_size, (cfg.image_size // cfg.patch_size) ** 2
        embed = conv(
            width, patch, strides=patch, padding="VALID", use_bias=False, dtype=self.dtype, name="patch_embedding"
        )
        patches = embed(pixels).astype(F32).reshape(-1, count, width)
        first = jnp.asarray(self.param("class_embedding", _table, (width,), F32))
        positions = jnp.asarray(self.param("position_embedding", _table, (1 + count, width), F32))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(pixels), 1, width)), patches], axis=1) + positions[None]
        x = LayerNorm(cfg.layer_norm_eps, name="pre_norm")(x)
        x, _ = run_layers(ClipLayer(cfg, self.dtype, self.pairs, name="layers"), cfg.num_hidden_layers, x, None)
        x = LayerNorm(cfg.layer_norm_eps, name="post_norm")(x[:, 0])
        return Linear(self.projection_dim, use_bias=False, dtype=F32, name="projection")(x)


class ClipTower(nn.Module):
    """Both towers. Features are f32 with norm 1, so that a cosine is a dot product.

    `dtype` is that of the products in the vision tower's blocks, which take most of the time. The residual stream, the
    norms and everything computed once per picture or per prompt are f32: the pictures of a group are nearly alike, and
    rounding them to bfloat16 on the way changes their ranking. `pairs` is layers.in_pairs'.
    """

    cfg: ClipConfig
    dtype: Any = F32
    pairs: bool | None = None

    def setup(self):
        self.text = ClipText(self.cfg.text, F32, project=True)
        self.vision = ClipVision(self.cfg.vision, self.cfg.projection_dim, self.dtype, in_pairs(self.dtype, self.pairs))
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), (), F32)  # log of the factor

    def image_features(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        return _unit(self.vision(pixels))

    def text_features(self, ids: Int[Array, "G L"]) -> Float[Array, "G D"]:
        return _unit(self.text(ids).pooled)

    def __call__(
        self, pixels: Float[Array, "B H W 3"], ids: Int[Array, "G L"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "G D"]]:
        """Both kinds of features; used by `init`."""
        return self.image_features(pixels), self.text_features(ids)


def _unit(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    x = x.astype(F32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def cosines(
    tower: ClipTower, params: Params, pixels: Float[Array, "B S S 3"], ids: Int[Array | np.ndarray, "G L"]
) -> PerSample:
    """Cosine of image i and prompt i // (B // G)."""
    image = jnp.asarray(tower.apply({"params": params}, pixels, method="image_features"))
    text = jnp.asarray(tower.apply({"params": params}, jnp.asarray(ids), method="text_features"))
    return pair_cosines(image, text)


def pair_cosines(image: Float[Array, "B D"], text: Float[Array, "G D"]) -> PerSample:
    """Cosine of image i and prompt i // (B // G), both with norm 1."""
    groups = len(text)
    if len(image) % groups:
        raise ValueError(f"{len(image)} images of {groups} prompts: each prompt must have the same number")
    grouped = image.reshape(groups, -1, image.shape[-1])
    return jnp.sum(grouped * text[:, None], axis=-1).reshape(-1)


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


def _open_clip_layer_rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Rules of one tower's stacked layers, as text.clip_layer_rules; q, k and v are thirds of one tensor."""
    layer = theirs + "transformer.resblocks.{layer}."
    thirds = [(f"{ours}layers/{name}/", (i, 3)) for i, name in enumerate("qkv")]
    return (
        *(Rule(at + "kernel", layer + "attn.in_proj_weight", "linear", part) for at, part in thirds),
        *(Rule(at + "bias", layer + "attn.in_proj_bias", part=part) for at, part in thirds),
        Rule(ours + r"layers/out/kernel", layer + "attn.out_proj.weight", "linear"),
        Rule(ours + r"layers/out/bias", layer + "attn.out_proj.bias"),
        Rule(ours + r"layers/fc1/kernel", layer + "mlp.c_fc.weight", "linear"),
        Rule(ours + r"layers/fc1/bias", layer + "mlp.c_fc.bias"),
        Rule(ours + r"layers/fc2/kernel", layer + "mlp.c_proj.weight", "linear"),
        Rule(ours + r"layers/fc2/bias", layer + "mlp.c_proj.bias"),
        Rule(ours + r"layers/norm(1|2)/scale", layer + r"ln_\1.weight"),
        Rule(ours + r"layers/norm(1|2)/bias", layer + r"ln_\1.bias"),
    )


OPEN_CLIP_KEYS = (
    Rule(r"text/token_embedding", "token_embedding.weight"),
    Rule(r"text/position_embedding", "positional_embedding"),
    *_open_clip_layer_rules("text/", ""),
    Rule(r"text/final_norm/scale", "ln_final.weight"),
    Rule(r"text/final_norm/bias", "ln_final.bias"),
    Rule(r"text/projection/kernel", "text_projection"),  # [in, out] in the file too
    Rule(r"vision/class_embedding", "visual.class_embedding"),
    Rule(r"vision/position_embedding", "visual.positional_embedding"),
    Rule(r"vision/patch_embedding/kernel", "visual.conv1.weight", "conv"),
    Rule(r"vision/(pre|post)_norm/scale", r"visual.ln_\1.weight"),
    Rule(r"vision/(pre|post)_norm/bias", r"visual.ln_\1.bias"),
    *_open_clip_layer_rules("vision/", "visual."),
    Rule(r"vision/projection/kernel", "visual.proj"),
    Rule(r"logit_scale", "logit_scale"),
)


def load_clip(folder: str | Path, dtype: Any = F32) -> tuple[ClipTower, Params]:
    """Module with exact products in `dtype`, and f32 parameters (numpy), of a folder in transformers' layout."""
    tower = ClipTower(ClipConfig.read(folder), dtype, pairs=False)
    # Parameters are always f32: in bf16 exp(logit_scale) would have an error of 0.3 percent.
    files, droppable = weights.Files(folder, "model"), (r".*\.position_ids",)
    return tower, weights.load(files, shapes(tower), HF_KEYS, dtype=F32, droppable=droppable)


def load_open_clip(file: str | Path, cfg: ClipConfig, dtype: Any = F32) -> tuple[ClipTower, Params]:
    """Like `load_clip`, for one file in open_clip's naming. WeightsError if it has another architecture."""
    tower, files = ClipTower(cfg, dtype, pairs=False), weights.Files(file)
    _check_open_clip(files, cfg)
    aliases = ((r"^module\.", ""),)  # the prefix that training on several GPUs adds to every key
    return tower, weights.load(files, shapes(tower), OPEN_CLIP_KEYS, dtype=F32, aliases=aliases)


def _check_open_clip(files: weights.Files, cfg: ClipConfig) -> None:
    """WeightsError of one line for a file of another kind, for which `load` would list all keys."""
    keys = {key.removeprefix("module."): key for key in files.keys()}  # noqa: SIM118
    patches, tokens = (keys.get(key) for key in ("visual.conv1.weight", "token_embedding.weight"))
    if patches is None or tokens is None:
        what = "transformers' naming, not open_clip's" if "logit_scale" in keys else "no CLIP in open_clip's naming"
        raise weights.WeightsError(f"{files.path} holds {what}: give another file")
    for key, count in ((patches, 4), (tokens, 2)):
        if len(files.shape(key)) != count:
            raise weights.WeightsError(
                f"{files.path}: {key} has shape {files.shape(key)}, not {count} axes: give the file as it was published"
            )
    layers = Counter(key.split(".")[0] for key in keys if key.endswith(".ln_1.weight"))
    width, _, patch, _ = files.shape(patches)
    found = (width, layers["visual"], patch, files.shape(tokens)[1], layers["transformer"])
    vision, text = cfg.vision, cfg.text
    wanted = (vision.hidden_size, vision.num_hidden_layers, vision.patch_size, text.hidden_size, text.num_hidden_layers)
    if found != wanted:
        said = "vision {} wide, {} layers, patches of {}; text {} wide, {} layers"
        raise weights.WeightsError(f"{files.path} is another CLIP: {said.format(*found)}, not {said.format(*wanted)}")


def shapes(tower: ClipTower) -> Params:
    """The tower's parameters as ShapeDtypeStructs, f32."""
    cfg = tower.cfg.vision
    pixels, ids = jnp.zeros((1, cfg.image_size, cfg.image_size, cfg.num_channels)), jnp.zeros((1, 2), jnp.int32)
    return parameters(tower, pixels, ids)
