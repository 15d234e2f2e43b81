"""The public configs of SD3.5 Large and Medium, for planning without their gigabytes (models.md 3, 7.1, 8.1, 9.2)."""

from solrl_jax.models import flux_dev

_CLIP = flux_dev.CONFIGS["text_encoder/config.json"]  # CLIP-L, as FLUX's
_TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "sample_size": 128,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
_REST = {
    "vae/config.json": flux_dev.CONFIGS["vae/config.json"] | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "text_encoder/config.json": _CLIP,
    "text_encoder_2/config.json": _CLIP
    | {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "intermediate_size": 5120,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
    "text_encoder_3/config.json": flux_dev.CONFIGS["text_encoder_2/config.json"],  # T5-XXL, as FLUX's
    "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
}
_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
PUBLIC = {
    "stabilityai/stable-diffusion-3.5-large": {"transformer/config.json": _TRANSFORMER | _LARGE, **_REST},
    "stabilityai/stable-diffusion-3.5-medium": {
        "transformer/config.json": _TRANSFORMER | _MEDIUM | {"dual_attention_layers": list(range(13))},
        **_REST,
    },
}
"""{name on huggingface.co: {file: content}}, every file of the pipeline that shapes it."""
