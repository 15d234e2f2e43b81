"""The emoji world's networks with random weights, in the layout of experiments/emoji; nothing is trained."""

from pathlib import Path

from experiments.emoji import pretrain
from solrl_jax import config
from solrl_jax.config import Config
from tests import nano

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
NANO = {
    "vae": {"block_out_channels": [8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4},
    "transformer": {
        "num_single_layers": 1,
        "num_attention_heads": 1,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
    },
    "text_encoder": SMALL,
    "text_encoder_2": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
}


def configs() -> dict:
    """The world's own, with as few channels and layers as compile fast."""
    full = pretrain.configs()
    made = {part: full[part] | NANO.get(part, {}) for part in full}
    vision = full["clip"]["vision_config"] | SMALL | {"patch_size": 32}
    made["clip"] = full["clip"] | {"text_config": full["clip"]["text_config"] | SMALL, "vision_config": vision}
    return made


def write(folder: Path, full: bool = False) -> Path:
    """`folder`, with pipeline/ and clip/; `full` at the world's own sizes."""
    made = pretrain.configs() if full else configs()
    nano.write(folder / "pipeline", folder / "clip", made, pretrain.vocabulary(), 0.02 if full else 0.2)
    return folder


def load(folder: Path, recipe: str = "", **changes: str) -> Config:
    """--config=emoji:RECIPE with the networks of `folder`."""
    paths = {"model.path": str(folder / "pipeline"), "reward_paths": f"clipscore={folder / 'clip'}"}
    return config.load(f"emoji:{recipe}", paths | changes)
