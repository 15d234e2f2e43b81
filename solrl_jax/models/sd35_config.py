"""SD3.5's transformer config: the runs of equal blocks, and the weights' names in the checkpoint and in ComfyUI.

The network is in sd35.py.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import ClassVar, NamedTuple

from solrl_jax import weights
from solrl_jax.weights import Rule
from solrl_jax.weights.lora_files import Fused
from solrl_jax.weights.options import Options

PATCH = 2


@dataclasses.dataclass(frozen=True)
class Sd35Config:
    """The fields of transformer/config.json that shape the network; the defaults are diffusers'."""

    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str = ""
    patch_size: int = PATCH

    options: ClassVar[Options] = Options("diffusers", idle=("sample_size",))  # the table of positions is in the file

    def __post_init__(self):
        if self.patch_size != PATCH:
            raise ValueError(f"patch_size {self.patch_size} is not SD3.5's {PATCH}")
        if self.qk_norm not in ("", "rms_norm"):
            raise ValueError(f"qk_norm {self.qk_norm!r} is not known here: it must be rms_norm, or null")
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"caption_projection_dim {self.caption_projection_dim} is not the width, num_attention_heads "
                f"{self.num_attention_heads} x attention_head_dim {self.attention_head_dim}"
            )
        if self.out_channels != self.in_channels:
            raise ValueError(f"out_channels {self.out_channels} is not in_channels {self.in_channels}")
        if strange := sorted(set(self.dual_attention_layers) - set(range(self.num_layers))):
            raise ValueError(f"dual_attention_layers {strange} are not in 0..{self.num_layers - 1}")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def read(cls, folder: str | Path) -> "Sd35Config":
        """From config.json; a folder of another network is refused by its class name."""
        return weights.from_config(cls, folder, weights.read_config(folder, "SD3Transformer2DModel"))


class Run(NamedTuple):
    """Adjacent blocks of one kind: `layers` blocks from the checkpoint's number `first` on."""

    first: int
    layers: int
    dual: bool
    last: bool

    @property
    def name(self) -> str:
        return f"transformer_blocks_{self.first}"


def runs(cfg: Sd35Config) -> list[Run]:
    """Large: 37 blocks and the last. Medium: 13 blocks with dual attention, 10 without, and the last."""
    kinds = [(i in cfg.dual_attention_layers, i == cfg.num_layers - 1) for i in range(cfg.num_layers)]
    found, first = [], 0
    for (dual, last), equal in itertools.groupby(kinds):
        found.append(Run(first, len(list(equal)), dual, last))
        first += found[-1].layers
    return found


def keys(cfg: Sd35Config) -> tuple[Rule, ...]:
    """The key table of a transformer with these runs of blocks."""
    leaves = (("kernel", "weight", "linear"), ("scale", "weight", "same"), ("bias", "bias", "same"))
    return (
        *(
            Rule(rf"{run.name}/(.+)/{ours}", rf"transformer_blocks.{{layer}}.\1.{theirs}", layout, first=run.first)
            for run in runs(cfg)
            for ours, theirs, layout in leaves
        ),
        Rule(r"pos_embed/pos_embed", "pos_embed.pos_embed"),
        Rule(r"pos_embed/proj/kernel", "pos_embed.proj.weight", "conv"),
        Rule(r"(.+)/kernel", r"\1.weight", "linear"),
        Rule(r"(.+)/bias", r"\1.bias"),
    )


# Stability AI's module names, which ComfyUI uses for SD3.5, and the Linears that each combines.
_COMFY_BLOCK = {
    "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block_attn_proj": ("attn.to_out.0",),
    "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block_attn2_proj": ("attn2.to_out.0",),
    "x_block_mlp_fc1": ("ff.net.0.proj",),
    "x_block_mlp_fc2": ("ff.net.2",),
    "x_block_adaLN_modulation_1": ("norm1.linear",),
    "context_block_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block_attn_proj": ("attn.to_add_out",),
    "context_block_mlp_fc1": ("ff_context.net.0.proj",),
    "context_block_mlp_fc2": ("ff_context.net.2",),
    "context_block_adaLN_modulation_1": ("norm1_context.linear",),
}
_COMFY_ENDS = {
    "context_embedder": "context_embedder",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
    "final_layer_linear": "proj_out",
}


def comfy(cfg: Sd35Config) -> tuple[Fused, ...]:
    """The modules of ComfyUI's LoRA files. Readers and writers skip modules that a block does not have."""
    last = cfg.num_layers - 1
    blocks = (
        Fused(
            f"joint_blocks_{i}_{name}",
            tuple(f"transformer_blocks.{i}.{part}" for part in parts),
            swapped=i == last and name == "context_block_adaLN_modulation_1",  # order there: shift, scale
        )
        for i in range(cfg.num_layers)
        for name, parts in _COMFY_BLOCK.items()
    )
    ends = (Fused(name, (part,)) for name, part in _COMFY_ENDS.items())
    return (*blocks, *ends, Fused("final_layer_adaLN_modulation_1", ("norm_out.linear",), swapped=True))
