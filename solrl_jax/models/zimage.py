"""Z-Image and Z-Image-Turbo: one stream of image and caption in 30 blocks (diffusers' ZImagePipeline).

The network is in zimage_network.py. It takes 1 - sigma and gives x0 - noise: `velocity` changes the sign. The caption's
own two blocks depend on neither the state nor the time, so a rollout runs them once (`Model.prepare`).
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from solrl_jax import config
from solrl_jax.models import flux, folders, public, qwen3, vae
from solrl_jax.models.folders import Encoder
from solrl_jax.models.layers import F32, inputs_seen
from solrl_jax.models.schedule import Grid, Schedule, chosen
from solrl_jax.models.zimage_network import (
    MULTIPLE,
    Caption,
    ZImageConfig,
    ZImageTransformer,
    caption_rope,
    pack,
    places,
    unpack,
)
from solrl_jax.structs import Model, Params, PyTree, QuantRule, QuantRules, Variables
from solrl_jax.weights import Rule, hub
from solrl_jax.weights.lora_files import Fused

PIPELINES = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")  # all have the same parts
PUBLIC = public.ZIMAGE
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""diffusers' own script's. Flow-Factory adds feed_forward.w1, w2 and w3."""
# adaLN sees one row per picture; the embedders and the last layer have few FLOPs and feed all blocks.
SKIP = ("all_x_embedder", "t_embedder", "cap_embedder", "adaLN_modulation", "all_final_layer")
# hidden_states[-2]: the last layer's input, without the final norm.
ENCODERS = (
    Encoder(
        *("qwen3", "text_encoder", "tokenizer", qwen3.Qwen3Config), masked=True, reads=(-2,), template=qwen3.Z_IMAGE
    ),
)
TURBO_SHIFT = 3.0
"""Z-Image-Turbo's files differ from Z-Image's only in the scheduler's shift (6 of Z-Image) and in the weights."""


# --- the model ------------------------------------------------------------------------------------------------------


@folders.made_once
def make(cfg: config.Model, folder: Path) -> Model:
    """The pure functions of the pipeline `cfg.path`, from the configs in its `folder`.

    Conditioning: {"text" [G, L, Dt], "length" int [G]}; `prepare` returns {"caption" [G, L, D], "length"}. Guidance is
    classifier-free, with weights of this package: the pipeline's guidance_scale is one less. Z-Image-Turbo takes none
    unless `cfg.guidance` is "cfg".
    """
    hub.check_pipeline(folder, PIPELINES)
    zimage = ZImageConfig.read(folder / "transformer")
    vae_cfg, qwen = vae.VaeConfig.read(folder / "vae"), qwen3.Qwen3Config.read(folder / "text_encoder")
    schedule = Schedule.read(folder / "scheduler")
    _check_parts(folder, zimage, vae_cfg, qwen)
    side, dtype = folders.latent_side(cfg.size, vae_cfg), jnp.dtype(cfg.dtype)
    check_sizes(cfg, zimage, side // 2)
    tokens, turbo = (side // 2) ** 2, schedule.shift == TURBO_SHIFT
    own = Grid(lambda steps: flux.sigmas(steps, tokens, schedule), lambda steps: flux.shift_of(tokens, schedule))
    grid = chosen(cfg.shift, own)
    network = ZImageTransformer(zimage, dtype, cfg.remat, cfg.remat_keeps)
    captions = Caption(zimage, dtype, cfg.remat, cfg.remat_keeps)
    (words,) = folders.text_modules(folder, ENCODERS, dtype).values()
    decoder = vae.Decoder(vae_cfg, jnp.dtype(cfg.vae_dtype))
    where, shape = places(zimage, side // 2, side // 2, cfg.text_tokens), (side, side, zimage.in_channels)

    def run(variables: Variables, x: Array, sigma: Array, cond: PyTree, **how: Any) -> Any:
        folders.check_latents(x, shape)  # the table of positions is made for this shape
        given = pack(x).astype(dtype), sigma, cond["length"], where, cond.get("text"), cond.get("caption")
        return network.apply(variables, *given, **how)

    def velocity(variables: Variables, x: Array, sigma: Array, cond: PyTree) -> Array:
        return -unpack(jnp.asarray(run(variables, x, sigma, cond)).astype(F32), side, side)

    def largest(variables: Variables, x: Array, sigma: Array, cond: PyTree) -> dict[str, Array]:
        return inputs_seen(run(variables, x, sigma, cond, mutable=["largest"])[1])

    def prepare(variables: Variables, cond: PyTree) -> PyTree:
        """Of this policy: LoRA and low precision reach the caption's blocks too."""
        text, length = cond["text"], cond["length"]
        caption = captions.apply(variables, text, length, caption_rope(where, *text.shape[:2]))
        return {"caption": caption, "length": length}

    def init(key: Key[Array, ""]) -> Params:
        x, text = jnp.zeros((1, tokens, 4 * zimage.in_channels)), jnp.zeros((1, cfg.text_tokens, zimage.cap_feat_dim))
        return network.init(key, x, jnp.ones(1), jnp.ones(1, jnp.int32), where, text)["params"]

    def encode(params: Params, ids: PyTree) -> PyTree:
        length = jnp.sum(ids["qwen3"]["mask"], axis=-1)
        return {"text": words.apply({"params": params["qwen3"]}, ids["qwen3"]["ids"], length), "length": length}

    guided = cfg.guidance == "cfg" or not turbo
    return Model(
        name="zimage",
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
        quant_rules=QuantRules(QuantRule(SKIP, cfg.min_dim), QuantRule(SKIP, cfg.min_dim)),
        keys=KEYS,
        comfy=COMFY,
        prepare=prepare,
        guidance="cfg" if guided else "none",
        guided=1.0 if turbo else 5.0,
        distilled=turbo,
    )


def check_sizes(cfg: config.Model, zimage: ZImageConfig, side: int) -> None:
    """ConfigError unless captions are padded to a multiple of 32 and RoPE's axes hold the caption and the image."""
    qwen3.check_z_image_tokens(cfg.text_tokens)
    frames, *grid = zimage.axes_lens
    if cfg.text_tokens + 2 > frames:
        raise config.ConfigError(
            f"model.text_tokens={cfg.text_tokens}: the network has {frames} frames (axes_lens): use "
            f"{(frames - 2) // MULTIPLE * MULTIPLE} or less"
        )
    if side > min(grid):
        raise config.ConfigError(
            f"model.size={cfg.size} is {side} tokens along a side: the network has places for {min(grid)} (axes_lens): "
            f"use {min(grid) * (cfg.size // side)} or less"
        )


def _check_parts(folder: Path, cfg: ZImageConfig, vae_cfg: vae.VaeConfig, qwen: qwen3.Qwen3Config) -> None:
    """WeightsError if the parts of a pipeline belong to different models."""
    found = {
        f"{cfg.in_channels} channels, the VAE gives {vae_cfg.latent_channels}": (
            cfg.in_channels == vae_cfg.latent_channels
        ),
        f"text of {cfg.cap_feat_dim} (cap_feat_dim), Qwen3 gives {qwen.hidden_size}": (
            cfg.cap_feat_dim == qwen.hidden_size
        ),
    }
    folders.check_parts(folder, found)


load, parts, shapes, token_shapes = folders.readers(make, ENCODERS)


# --- keys -----------------------------------------------------------------------------------------------------------


_STACKS = ("layers", "noise_refiner", "context_refiner")
_STACK = f"({'|'.join(_STACKS)})/(.+)"
KEYS = (
    Rule(_STACK + "/kernel", r"\1.{layer}.\2.weight", "linear"),
    Rule(_STACK + "/scale", r"\1.{layer}.\2.weight"),
    Rule(_STACK + "/bias", r"\1.{layer}.\2.bias"),
    Rule(r"(.+)/kernel", r"\1.weight", "linear"),
    Rule(r"(.+)/scale", r"\1.weight"),
    Rule(r"(.+)/bias", r"\1.bias"),
    Rule("(x|cap)_pad_token", r"\1_pad_token"),
)

# The original's module names, which ComfyUI uses, and the Linears that each combines.
_COMFY_BLOCK = {
    "attention_qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention_out": ("attention.to_out.0",),
    **{f"feed_forward_{w}": (f"feed_forward.{w}",) for w in ("w1", "w2", "w3")},
    "adaLN_modulation_0": ("adaLN_modulation.0",),
}
_COMFY_REST = {
    "x_embedder": "all_x_embedder.2-1",
    "cap_embedder_1": "cap_embedder.1",
    "t_embedder_mlp_0": "t_embedder.mlp.0",
    "t_embedder_mlp_2": "t_embedder.mlp.2",
    "final_layer_linear": "all_final_layer.2-1.linear",
    "final_layer_adaLN_modulation_1": "all_final_layer.2-1.adaLN_modulation.1",
}
COMFY = (
    *(
        Fused(f"{stack}_{{layer}}_{name}", tuple(f"{stack}.{{layer}}.{part}" for part in parts))
        for stack in _STACKS
        for name, parts in _COMFY_BLOCK.items()
        if (stack, name) != ("context_refiner", "adaLN_modulation_0")
    ),
    *(Fused(name, (ours,)) for name, ours in _COMFY_REST.items()),
)
