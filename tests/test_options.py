"""Each option of each file that the loaders read, changed: taken, refused by name, or without effect in theirs too."""

import dataclasses
import functools
import logging

import pytest
from transformers import CLIPTokenizer, GemmaTokenizer, Qwen2Tokenizer, T5Tokenizer

from solrl_jax.models import dcae, flux, flux2, gemma2, public, qwen3, sana, sd35, text, vae
from solrl_jax.models.schedule import SanaSchedule, Schedule
from solrl_jax.rewards import blip, clip_tower, preprocess
from tests import cases_diffusers as diffusers
from tests import cases_transformers as transformers
from tests import test_qwen3
from tests.mutations import NEW, examine, write
from tests.tiers import long, slow

pytestmark = pytest.mark.usefixtures("one_thread")

FLOW = [functools.partial(diffusers.flow_case, model=name) for name in ("flux", "sd35", "flux2")]
TOKENIZERS = [
    functools.partial(transformers.tokenizer_case, encoder=encoder, kind=kind)
    for encoder, kind in zip(
        (*flux.ENCODERS, *sana.ENCODERS, test_qwen3.Z_IMAGE),
        (CLIPTokenizer, T5Tokenizer, GemmaTokenizer, Qwen2Tokenizer),
        strict=True,
    )
]
CASES = {  # and some of what is taken
    "flux": (diffusers.flux_case, {"axes_dims_rope"}),
    "flux2": (diffusers.flux2_case, {"rope_theta", "axes_dims_rope"}),
    "sd35": (diffusers.sd35_case, set()),
    "sana": (diffusers.sana_case, {"timestep_scale"}),
    "zimage": (diffusers.zimage_case, {"rope_theta", "t_scale", "norm_eps", "axes_dims"}),
    "vae": (diffusers.vae_case, {"scaling_factor", "shift_factor", "norm_num_groups"}),
    "flux2's vae": (diffusers.flux2_vae_case, {"batch_norm_eps", "norm_num_groups"}),
    "dcae": (diffusers.dcae_case, {"scaling_factor"}),
    "clip text": (transformers.clip_text_case, {"hidden_act", "layer_norm_eps", "eos_token_id"}),
    "t5": (transformers.t5_case, {"relative_attention_max_distance", "layer_norm_epsilon"}),
    "gemma2": (transformers.gemma_case, {"attn_logit_softcapping", "hidden_activation", "rope_parameters"}),
    "old gemma2": (transformers.old_gemma_case, {"rope_theta", "query_pre_attn_scalar", "rms_norm_eps"}),
    "qwen3": (transformers.qwen3_case, {"hidden_act", "rms_norm_eps", "rope_parameters"}),
    "clip": (transformers.clip_case, {"text_config.hidden_act", "vision_config.layer_norm_eps"}),
    "flux's scheduler": (FLOW[0], {"base_shift", "max_shift", "max_image_seq_len"}),
    "sd35's scheduler": (FLOW[1], {"shift"}),
    "flux2's scheduler": (FLOW[2], {"use_dynamic_shifting"}),
    "sana's scheduler": (diffusers.dpm_case, {"flow_shift"}),
    "clip's tokenizer": (TOKENIZERS[0], {"padding_side", "pad_token"}),
    "t5's tokenizer": (TOKENIZERS[1], {"padding_side", "truncation_side"}),
    "gemma's tokenizer": (TOKENIZERS[2], {"truncation_side"}),
    "qwen3's tokenizer": (TOKENIZERS[3], {"truncation_side", "pad_token"}),
    "preprocessor": (transformers.preprocessor_case, {"image_mean", "image_std"}),
    "imagereward": (transformers.med_case, {"layer_norm_eps"}),
}


@pytest.fixture(autouse=True)
def quiet():
    """Both libraries warn of every option that they do not know."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


SLOW = (
    "sana",
    "t5",
    "flux",
    "flux2",
    "flux2's vae",
    "sd35",
    "vae",
    "dcae",
    "clip text",
    "qwen3",
    "imagereward",
)
LONG = ("zimage", "clip", "gemma2", "old gemma2")
TIERS = dict.fromkeys(SLOW, slow) | dict.fromkeys(LONG, long)


@pytest.mark.parametrize("name", [TIERS.get(name, str)(name) for name in CASES])
def test_changed_options(tmp_path, name):
    make, taken = CASES[name]
    found = examine(make(tmp_path))
    assert not found.problems, "\n  ".join(["", *found.problems])
    assert taken <= found.taken
    assert NEW in (found.idle if name.endswith("tokenizer") else found.refused)  # transformers itself reads those


# --- what public files hold ------------------------------------------------------------------------------------------


_FILE = {"_class_name": "X", "_diffusers_version": "0.30.0", "_name_or_path": "../checkpoints/x"}
_OLD_CLIP = {  # of transformers 4.20: all that a language model can be asked to do
    **{"add_cross_attention": False, "architectures": None, "attention_dropout": 0.0, "bad_words_ids": None},
    **{"bos_token_id": 0, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "dropout": 0.0},
    **{"decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False, "early_stopping": False},
    **{"encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": None, "finetuning_task": None},
    **{"forced_bos_token_id": None, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "is_decoder": False},
    **{"is_encoder_decoder": False, "length_penalty": 1.0, "max_length": 20, "min_length": 0, "num_beams": 1},
    **{"initializer_factor": 1.0, "initializer_range": 0.02, "no_repeat_ngram_size": 0, "num_beam_groups": 1},
    **{"num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False, "output_scores": False},
    **{"pad_token_id": 1, "prefix": None, "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False},
    **{"repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None},
    **{"task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False},
    **{"tie_word_embeddings": True, "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torch_dtype": None},
    **{"torchscript": False, "transformers_version": "4.24.0", "typical_p": 1.0, "use_bfloat16": False},
    **{"_name_or_path": "", "suppress_tokens": None, "begin_suppress_tokens": None},
}
_VIT = {
    "model_type": "clip_vision_model",
    "num_channels": 3,
    "projection_dim": 768,
    "image_size": 224,
    "patch_size": 14,
}
_WORDS = {"model_type": "clip_text_model", "eos_token_id": 2, "projection_dim": 768, "vocab_size": 49408}
PUBLIC = {
    "flux": (
        flux.FluxConfig,
        {"patch_size": 1, "out_channels": None, "guidance_embeds": True, "_class_name": "FluxTransformer2DModel"},
    ),
    "flux2": (
        flux2.Flux2Config,
        {
            **{"_class_name": "Flux2Transformer2DModel", "patch_size": 1, "out_channels": None, "eps": 1e-6},
            **{"guidance_embeds": False, "rope_theta": 2000, "timestep_guidance_channels": 256, "mlp_ratio": 3.0},
        },
    ),
    "flux2's vae": (
        vae.Flux2VaeConfig,
        {
            **{"_class_name": "AutoencoderKLFlux2", "sample_size": 1024, "force_upcast": True, "patch_size": [2, 2]},
            **{"batch_norm_eps": 1e-4, "batch_norm_momentum": 0.1, "use_quant_conv": True, "act_fn": "silu"},
            "decoder_block_out_channels": None,
        },
    ),
    "sd35": (
        sd35.Sd35Config,
        {"_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "dual_attention_layers": [0, 1]},
    ),
    "sana": (
        sana.SanaConfig,
        {
            **{"_class_name": "SanaTransformer2DModel", "sample_size": 32, "dropout": 0.0, "attention_bias": False},
            **{"interpolation_scale": None, "norm_elementwise_affine": False, "qk_norm": None, "timestep_scale": 1.0},
            **{"guidance_embeds": False, "guidance_embeds_scale": 0.1},
        },
    ),
    "vae": (
        vae.VaeConfig,
        {
            **{"_class_name": "AutoencoderKL", "act_fn": "silu", "force_upcast": True, "sample_size": 1024},
            **{"latents_mean": None, "latents_std": None, "block_out_channels": [128, 256, 512, 512]},
            **{"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
            **{"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": True},
        },
    ),
    "dcae": (
        dcae.DcaeConfig,
        {
            **{k: x for k, x in public.SANA_VAE.items()},
            **{"downsample_block_type": "Conv", "encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "in_channels": 3},
            **{"encoder_block_types": ["ResBlock"] * 6, "encoder_block_out_channels": [128] * 6},
            **{"encoder_qkv_multiscales": [[]] * 6, "encoder_out_shortcut": True, "decoder_conv_act_fn": "relu"},
        },
    ),
    "clip text": (text.ClipTextConfig, {**_OLD_CLIP, **_WORDS, "architectures": ["CLIPTextModel"], "hidden_size": 768}),
    "t5": (
        text.T5Config,
        {
            **{"model_type": "t5", "classifier_dropout": 0.0, "decoder_start_token_id": 0, "dense_act_fn": "gelu_new"},
            **{"dropout_rate": 0.1, "is_gated_act": True, "output_past": True, "num_decoder_layers": 24},
            **{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "use_cache": True, "n_positions": 512},
            **{"initializer_factor": 1.0, "is_encoder_decoder": True, "pad_token_id": 0, "torch_dtype": "bfloat16"},
        },
    ),
    "gemma2": (
        gemma2.Gemma2Config,
        {
            **{"model_type": "gemma2", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2},
            **{"cache_implementation": "hybrid", "eos_token_id": [1, 107], "final_logit_softcapping": 30.0},
            **{"hidden_act": "gelu_pytorch_tanh", "initializer_range": 0.02, "max_position_embeddings": 8192},
            **{"pad_token_id": 0, "rope_theta": 10000.0, "use_cache": True, "sliding_window_size": 4096},
        },
    ),
    "qwen3": (
        qwen3.Qwen3Config,
        {
            **{"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0},
            **{"bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu"},
            **{"hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 9728, "max_window_layers": 36},
            **{"max_position_embeddings": 40960, "model_type": "qwen3", "num_attention_heads": 32},
            **{"num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": None},
            **{"rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_cache": True},
            **{"torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_sliding_window": False},
            **{"vocab_size": 151936, "layer_types": ["full_attention"] * 36},
        },
    ),
    "clip": (
        clip_tower.ClipConfig,
        {
            **{"_commit_hash": None, "architectures": ["CLIPModel"], "initializer_factor": 1.0, "model_type": "clip"},
            **{"logit_scale_init_value": 2.6592, "projection_dim": 768, "torch_dtype": "float32"},
            **{"text_config": {**_OLD_CLIP, **_WORDS}, "text_config_dict": {"hidden_size": 768, **_WORDS}},
            **{
                "vision_config": {**_OLD_CLIP, **_VIT},
                "vision_config_dict": {"hidden_size": 1024, "num_attention_heads": 16},
            },
        },
    ),
    "imagereward": (
        blip.BlipConfig,
        {
            **{"architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1},
            **{"initializer_range": 0.02, "model_type": "bert", "pad_token_id": 0, "type_vocab_size": 2},
            **{"encoder_width": 768, "add_cross_attention": True, "vocab_size": 30524},
        },
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_what_public_files_hold_is_known(tmp_path, name):
    """Every option that files of the public checkpoints are known to have, at their values."""
    read, values = PUBLIC[name]
    for file in ("config.json", "med_config.json"):
        write(tmp_path, _FILE | values if "_class_name" in values else values, file)
    assert read.read(tmp_path)


def test_where_a_model_says_its_options_it_says_no_field_of_its_own():
    """What is taken is neither fixed nor idle; and each config that reads a file says what it leaves unread."""
    for read in (*(read for read, _ in PUBLIC.values()), Schedule, SanaSchedule, preprocess.Preprocessing):
        found, fields = getattr(read, "options", None), {field.name for field in dataclasses.fields(read)}
        if found is None:
            assert read is blip.BlipConfig  # of two parts, which both do
            continue
        assert not fields & {*found.only, *found.idle} and not found.only.keys() & set(found.idle), read
