"""Z-Image at a size that compiles in seconds, with random weights, as diffusers itself writes a pipeline's folder."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from oracle import randomise
from transformers import Qwen2Tokenizer

from solrl_jax.config import Config, Model
from tests import nano, nano_qwen3, nano_sd35

TOKENS = 64
SIZE = 16  # 4 x 4 patches: as many learned pads behind them
TRANSFORMER = {
    "in_channels": 4,
    "dim": 48,
    "n_layers": 3,
    "n_refiner_layers": 2,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 32,
    "axes_dims": (4, 6, 6),
    "axes_lens": (160, 32, 32),
}
VAE = nano_sd35.VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}


def make_transformer(seed: int = 3, **changes) -> ZImageTransformer2DModel:
    """Everything is drawn, the pad tokens too: their own values, zero, would hide errors."""
    return randomise(ZImageTransformer2DModel(**{**TRANSFORMER, **changes}), seed)


def write(folder: Path, *, shift: float = 6.0, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """Write the pipeline, in small shards, into `folder`, and return it; `changes` are the transformer's."""
    words = folder.with_name(f"{folder.name}-words")
    count = nano_qwen3.write_tokenizer(words)
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False),
        vae=randomise(AutoencoderKL(**VAE), 4),
        text_encoder=nano_qwen3.make(count),
        tokenizer=Qwen2Tokenizer.from_pretrained(words),
        transformer=make_transformer(**changes).to(dtype),
    ).save_pretrained(folder, max_shard_size="100KB")
    return folder


def model(path: Path, **changes) -> Model:
    fields = {"path": str(path), "size": SIZE, "text_tokens": TOKENS, "dtype": "float32", "remat": False, "min_dim": 0}
    return Model(**{"name": "zimage", **fields, **changes})


def build(folder: Path, **changes) -> Config:
    """A config of one whole sol_rl iteration; `changes` replace its fields."""
    if not (folder / "zimage").exists():
        write(folder / "zimage")
    cfg = nano.build(folder)  # for the reward's CLIP
    fields = {"model": model(folder / "zimage"), "name": "nano-zimage", "reward_paths": cfg.reward_paths}
    return nano.build(folder, **{**fields, **changes})
