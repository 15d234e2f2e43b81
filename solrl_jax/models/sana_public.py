"""The public configs of SANA-1.6B at 1024 px, for planning without its gigabytes (models.md 4, 7.2, 8.1, 9.3)."""

_STAGES = {"block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3, "qkv_multiscales": [[]] * 3 + [[5]] * 3}
PUBLIC_VAE = {
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
PUBLIC = {
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
        "vae/config.json": PUBLIC_VAE,
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
            "lambda_min_clipped": float("-inf"),  # as there: a bare -Infinity, which JSON does not have
        },
    }
}
"""{name on huggingface.co: {file: content}}, every file of the pipeline that shapes it."""
