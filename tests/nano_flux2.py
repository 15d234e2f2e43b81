"""FLUX.2-klein at a size that compiles in seconds, with random weights, as diffusers itself writes its folder."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from oracle import randomise
from transformers import Qwen2Tokenizer

from solrl_jax.config import Config, Model, Stage
from tests import nano, nano_qwen3

TOKENS = 512
SIZE = 16  # 4 x 4 tokens
TRANSFORMER = {
    "in_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "num_layers": 1,
    "num_single_layers": 2,
    "joint_attention_dim": 3 * nano_qwen3.QWEN3["hidden_size"],
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}
VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
LAYERS = 28  # of the text encoder, whose states after 9, 18 and 27 are read


def make_vae(**changes) -> AutoencoderKLFlux2:
    """With statistics of its own: those of a new BatchNorm, 0 and 1, would hide an error."""
    model = randomise(AutoencoderKLFlux2(**{**VAE, **changes}), 4)
    generator = torch.Generator().manual_seed(7)
    model.bn.running_mean.copy_(torch.randn(model.bn.running_mean.shape, generator=generator))
    model.bn.running_var.copy_(0.5 + torch.rand(model.bn.running_var.shape, generator=generator))
    return model


def write(folder: Path, distilled: bool = False, **changes) -> Path:
    """Write the pipeline, in small shards, into `folder`, and return it; `changes` are the transformer's."""
    words = folder.with_name(f"{folder.name}-words")
    count = nano_qwen3.write_tokenizer(words)
    Flux2KleinPipeline(
        tokenizer=Qwen2Tokenizer.from_pretrained(words),
        text_encoder=nano_qwen3.make(count, whole=True, num_hidden_layers=LAYERS),
        vae=make_vae(),
        transformer=randomise(Flux2Transformer2DModel(**{**TRANSFORMER, **changes}), 3),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        is_distilled=distilled,
    ).save_pretrained(folder, max_shard_size="50KB")
    if not distilled:  # the base's file does not name it
        file = folder / "model_index.json"
        index = json.loads(file.read_text())
        file.write_text(json.dumps({name: value for name, value in index.items() if name != "is_distilled"}))
    return folder


def model(path: Path, **changes) -> Model:
    fields = {"path": str(path), "size": SIZE, "text_tokens": TOKENS, "dtype": "float32", "remat": False, "min_dim": 0}
    return Model(**{"name": "flux2", **fields, **changes})


def build(folder: Path, **changes) -> Config:
    """A config of one whole sol_rl iteration, guided at 4; `changes` replace its fields."""
    if not (folder / "flux2").exists():
        write(folder / "flux2")
    cfg = nano.build(folder)  # for the reward's CLIP
    fields = {"model": model(folder / "flux2"), "name": "nano-flux2", "reward_paths": cfg.reward_paths}
    fields |= {"regenerate": Stage(3, chunk=4, guidance=4.0)}
    return nano.build(folder, **{**fields, **changes})
