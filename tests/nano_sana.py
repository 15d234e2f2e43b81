"""SANA at a size that compiles in seconds, with random weights, as diffusers itself writes a pipeline's folder."""

from pathlib import Path

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from oracle import randomise
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from solrl_jax.config import Config, Model, Stage
from tests import nano

TOKENS = 12
SIZE = 32  # diffusers asks for a multiple of 32
TRANSFORMER = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 6,
    "attention_head_dim": 8,
    "num_layers": 3,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 48,
    "caption_channels": 32,
    "mlp_ratio": 4 / 3,  # 64 channels: NVFP4's blocks of 16 divide them
}
VAE = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "scaling_factor": 0.41407,
}
for half in ("encoder", "decoder"):
    VAE |= {
        f"{half}_block_types": ("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
        f"{half}_block_out_channels": (8, 16, 16),
        f"{half}_layers_per_block": (1, 2, 1),
        f"{half}_qkv_multiscales": ((), (), (5,)),
    }
GEMMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 12,
    "attn_logit_softcapping": 2.0,
    "sliding_window": 16,
}


def write_tokenizer(folder: Path) -> int:
    """Gemma's kind, of bytes and letters without merges: pad 0, eos 1, bos 2, unk 3. Returns how many tokens it has."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581"]
    words += [chr(i) for i in range(33, 127)]
    vocabulary = {word: i for i, word in enumerate(words)}
    GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True).save_pretrained(folder)
    return len(vocabulary)


def make_gemma(words: int = 100, **changes) -> Gemma2Model:
    model = randomise(Gemma2Model(Gemma2Config(**{**GEMMA, "vocab_size": words, **changes})), 5)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.ndim == 1):
            parameter.sub_(1)  # a norm's file holds what is above 1
    return model


def write(folder: Path, **changes) -> Path:
    """Write the pipeline, in small shards, into `folder`, and return it; `changes` are the transformer's."""
    words = folder.with_name(f"{folder.name}-words")
    count = write_tokenizer(words)
    SanaPipeline(
        tokenizer=GemmaTokenizer.from_pretrained(words),
        text_encoder=make_gemma(count),
        vae=randomise(AutoencoderDC(**VAE), 4),
        transformer=randomise(SanaTransformer2DModel(**{**TRANSFORMER, **changes}), 3),
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, solver_order=2
        ),
    ).save_pretrained(folder, max_shard_size="50KB")
    return folder


def model(path: Path, **changes) -> Model:
    fields = {"path": str(path), "size": SIZE, "text_tokens": TOKENS, "dtype": "float32", "remat": False, "min_dim": 48}
    return Model(**{"name": "sana", "shift": 1.0, **fields, **changes})


def build(folder: Path, **changes) -> Config:
    """A config of one whole sol_rl iteration; `changes` replace its fields."""
    if not (folder / "sana").exists():
        write(folder / "sana")
    cfg = nano.build(folder)  # for the reward's CLIP
    fields = {"model": model(folder / "sana"), "name": "nano-sana", "reward_paths": cfg.reward_paths}
    fields |= {"explore": Stage(2, "euler", "nvfp4_emulated", 4), "regenerate": Stage(3, "euler", "bf16", 4)}
    return nano.build(folder, **{**fields, **changes})
