"""The models' public configs, {name on huggingface.co: {file: content}}: all files that determine a pipeline's shapes.

For planning and tests, without gigabytes of weights.
"""

# --- FLUX.1-dev -----------------------------------------------------------------------------------------------------

FLUX_DEV = {
    "transformer/config.json": {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "latent_channels": 16,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder/config.json": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 77,
        "projection_dim": 768,
        "eos_token_id": 2,
    },
    "text_encoder_2/config.json": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
}
FLUX = {"black-forest-labs/FLUX.1-dev": FLUX_DEV}

# --- FLUX.2-klein ---------------------------------------------------------------------------------------------------

_QWEN3_4B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
_KLEIN_4B = {
    "transformer/config.json": {
        "_class_name": "Flux2Transformer2DModel",
        "attention_head_dim": 128,
        "axes_dims_rope": [32, 32, 32, 32],
        "eps": 1e-6,
        "guidance_embeds": False,
        "in_channels": 128,
        "joint_attention_dim": 7680,
        "mlp_ratio": 3.0,
        "num_attention_heads": 24,
        "num_layers": 5,
        "num_single_layers": 20,
        "out_channels": None,
        "patch_size": 1,
        "rope_theta": 2000,
        "timestep_guidance_channels": 256,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKLFlux2",
        "latent_channels": 32,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "mid_block_add_attention": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "patch_size": [2, 2],
        "batch_norm_eps": 1e-4,
        "force_upcast": True,
    },
    "text_encoder/config.json": _QWEN3_4B,
    "scheduler/scheduler_config.json": FLUX_DEV["scheduler/scheduler_config.json"],
}
_KLEIN_9B = _KLEIN_4B | {
    "transformer/config.json": _KLEIN_4B["transformer/config.json"]
    | {"num_attention_heads": 32, "num_layers": 8, "num_single_layers": 24, "joint_attention_dim": 12288},
    "text_encoder/config.json": _QWEN3_4B
    | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
}
_DISTILLED = {"model_index.json": {"_class_name": "Flux2KleinPipeline", "is_distilled": True}}
FLUX2 = {
    "black-forest-labs/FLUX.2-klein-base-4B": _KLEIN_4B,
    "black-forest-labs/FLUX.2-klein-4B": _KLEIN_4B | _DISTILLED,
    "black-forest-labs/FLUX.2-klein-base-9B": _KLEIN_9B,
    "black-forest-labs/FLUX.2-klein-9B": _KLEIN_9B | _DISTILLED,
}

# --- Stable Diffusion 3.5 -------------------------------------------------------------------------------------------

_CLIP = FLUX_DEV["text_encoder/config.json"]  # CLIP-L, as FLUX's
_SD35_TRANSFORMER = {
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
_SD35_REST = {
    "vae/config.json": FLUX_DEV["vae/config.json"] | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
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
    "text_encoder_3/config.json": FLUX_DEV["text_encoder_2/config.json"],  # T5-XXL, as FLUX's
    "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
}
_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
SD35 = {
    "stabilityai/stable-diffusion-3.5-large": {"transformer/config.json": _SD35_TRANSFORMER | _LARGE, **_SD35_REST},
    "stabilityai/stable-diffusion-3.5-medium": {
        "transformer/config.json": _SD35_TRANSFORMER | _MEDIUM | {"dual_attention_layers": list(range(13))},
        **_SD35_REST,
    },
}

# --- SANA -----------------------------------------------------------------------------------------------------------

_STAGES = {"block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3, "qkv_multiscales": [[]] * 3 + [[5]] * 3}
SANA_VAE = {
    "_class_name": "AutoencoderDC",
    "latent_channels": 32,
    "attention_head_dim": 32,
    **{f"decoder_{name}": value for name, value in _STAGES.items()},
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_layers_per_block": [3] * 6,
    "upsample_block_type": "interpolate",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}
SANA = {
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": {
        "transformer/config.json": {
            "_class_name": "SanaTransformer2DModel",
            "in_channels": 32,
            "out_channels": 32,
            "num_attention_heads": 70,
            "attention_head_dim": 32,
            "num_layers": 20,
            "num_cross_attention_heads": 20,
            "cross_attention_head_dim": 112,
            "cross_attention_dim": 2240,
            "caption_channels": 2304,
            "mlp_ratio": 2.5,
            "attention_bias": False,
            "dropout": 0.0,
            "sample_size": 32,
            "patch_size": 1,
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
        },
        "vae/config.json": SANA_VAE,
        "text_encoder/config.json": {
            "model_type": "gemma2",
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "sliding_window": 4096,
            "pad_token_id": 0,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DPMSolverMultistepScheduler",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
            "num_train_timesteps": 1000,
            "lambda_min_clipped": float("-inf"),  # the file has a bare -Infinity, which is not valid JSON
        },
    }
}
"""{name on huggingface.co: {file: content}}, every file that determines the pipeline's shapes."""

# --- Z-Image --------------------------------------------------------------------------------------------------------

_ZIMAGE = {
    "transformer/config.json": {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "cap_feat_dim": 2560,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
    },
    "vae/config.json": FLUX_DEV["vae/config.json"],
    "text_encoder/config.json": _QWEN3_4B,
    "scheduler/scheduler_config.json": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": False,
        "shift": 6.0,
    },
}
ZIMAGE = {
    "Tongyi-MAI/Z-Image": _ZIMAGE,
    "Tongyi-MAI/Z-Image-Turbo": {
        **_ZIMAGE,
        "scheduler/scheduler_config.json": _ZIMAGE["scheduler/scheduler_config.json"] | {"shift": 3.0},
    },
}
