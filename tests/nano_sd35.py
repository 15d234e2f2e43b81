"""SD3.5 at a size that compiles in seconds, with random weights, as diffusers itself writes a pipeline's folder."""

import json
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from oracle import randomise
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from experiments.tokenizers_local import write_clip_tokenizer, write_t5_tokenizer
from solrl_jax.config import Config, Model
from tests import nano

LENGTH, TOKENS = 12, 8  # of the CLIPs and of T5
SIZE = 16
TRANSFORMER = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 5,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 48,
    "caption_projection_dim": 48,
    "pooled_projection_dim": 40,
    "pos_embed_max_size": 7,  # a picture of 16 px has 4 x 4 patches, in the middle of the table but for half a place
    "qk_norm": "rms_norm",
}
TRANSFORMER_FIELDS = {k: v for k, v in TRANSFORMER.items() if k != "sample_size"}
MEDIUM = {"dual_attention_layers": (0, 1)}
VAE = {
    "latent_channels": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP = {"num_hidden_layers": 2, "max_position_embeddings": LENGTH, "eos_token_id": 2}
CLIP_L = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "projection_dim": 16}
BIG_G = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "projection_dim": 24,
    "hidden_act": "gelu",
}
T5 = {"d_model": 48, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}


def write(folder: Path, t5: bool = True, **changes) -> Path:
    """Write the pipeline, in small shards, into `folder`, and return it; `changes` are the transformer's."""
    words = folder.with_name(f"{folder.name}-words")
    vocabularies = [write_clip_tokenizer(words / str(i), nano.PROMPTS, LENGTH) for i in (1, 2)]
    file = words / "2" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "!"}))  # as the public one
    rows = write_t5_tokenizer(words / "3", nano.PROMPTS)
    clips = [
        randomise(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP, **sizes, vocab_size=count)), seed)
        for seed, (sizes, count) in enumerate(zip((CLIP_L, BIG_G), vocabularies, strict=True))
    ]
    transformer = SD3Transformer2DModel(**{**TRANSFORMER, **changes})
    rng = np.random.default_rng(0)
    table = transformer.pos_embed.pos_embed  # a buffer: anything a checkpoint may hold
    table.copy_(table + table.new_tensor(rng.normal(0, 0.5, tuple(table.shape))))
    StableDiffusion3Pipeline(
        transformer=randomise(transformer, 3),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=randomise(AutoencoderKL(**VAE), 4),
        text_encoder=clips[0],
        tokenizer=CLIPTokenizer.from_pretrained(words / "1"),
        text_encoder_2=clips[1],
        tokenizer_2=CLIPTokenizer.from_pretrained(words / "2"),
        text_encoder_3=randomise(T5EncoderModel(T5Config(**T5, vocab_size=rows)), 5) if t5 else None,
        tokenizer_3=T5TokenizerFast.from_pretrained(words / "3") if t5 else None,
    ).save_pretrained(folder, max_shard_size="100KB")
    return folder


def model(path: Path, **changes) -> Model:
    fields = {"path": str(path), "size": SIZE, "text_tokens": TOKENS, "dtype": "float32", "remat": False, "min_dim": 48}
    return Model(**{"name": "sd35", **fields, **changes})


def build(folder: Path, **changes) -> Config:
    """A config of one whole sol_rl iteration on Medium's kind; `changes` replace its fields."""
    if not (folder / "sd35").exists():
        write(folder / "sd35", **MEDIUM)
    cfg = nano.build(folder)  # for the reward's CLIP
    fields = {"model": model(folder / "sd35"), "name": "nano-sd35", "reward_paths": cfg.reward_paths}
    return nano.build(folder, **{**fields, **changes})
