"""The files of transformers' encoders, tokenizers and towers, and what each library makes of them (mutations.py)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import torch
from oracle import randomise
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    PretrainedConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from experiments import pretraining
from experiments.tiny import pretrain
from solrl_jax import weights
from solrl_jax.models import folders, gemma2, qwen3, sana, text
from solrl_jax.rewards import blip, clip_tower, preprocess
from tests import nano, nano_qwen3, nano_sana, test_flux, test_gemma2, test_qwen3, test_text
from tests.mutations import Case, by_config, compiled, rebuilt, transformers_config, write

ACTIVATIONS = ["gelu", "relu"]


# --- transformers' encoders -----------------------------------------------------------------------------------------


OLD = {  # of files that transformers 4 wrote, with what a language model is asked to do
    **{"output_attentions": False, "output_hidden_states": False, "return_dict": True, "use_cache": True},
    **{"top_k": 50, "temperature": 1.0, "max_length": 20, "do_sample": False, "num_beams": 1, "torchscript": False},
    **{"decoder_start_token_id": 0, "tie_word_embeddings": True, "tie_encoder_decoder": False, "prefix": None},
    **{"add_cross_attention": False, "cross_attention_hidden_size": None, "pruned_heads": {}, "is_decoder": False},
    **{"chunk_size_feed_forward": 0, "problem_type": None, "output_past": True, "initializer_range": 0.02},
}
OLD_OTHERS = {
    **{
        "prefix": ["x"],
        "cross_attention_hidden_size": [8],
        "pruned_heads": [{"0": [0]}],
        "problem_type": ["regression"],
    },
    **{"id2label": [{"0": "a"}], "label2id": [{"a": 0}], "eos_token_id": [2, 5, 98, 99], "hidden_act": ACTIVATIONS},
}


def encoder_case(folder, model, raw, read, theirs, ours, others):
    """`theirs` is a model's output as a tuple of arrays, compared side by side."""
    model.save_pretrained(folder)
    raw = json.loads(json.dumps({**OLD, **raw}))

    def side_by_side(found):
        return np.concatenate([np.ravel(np.asarray(x)) for x in found])

    @functools.lru_cache
    def by_text(config):
        config = type(model.config).from_dict(json.loads(config))
        with torch.no_grad():
            return side_by_side(theirs(rebuilt(type(model), config, model.state_dict())))

    def library(raw):
        """Files that transformers' config cannot tell apart are one network."""
        return by_text(json.dumps(transformers_config(type(model.config), raw).to_dict()))

    file = write(folder, raw)
    mine = by_config(read, folder, lambda: side_by_side(ours()))
    return Case(file, library, mine, {**OLD_OTHERS, **others})


def clip_text_case(folder):
    model = test_text.clip_model(CLIPTextModelWithProjection, eos_token_id=99)

    def theirs(model):
        out = model(torch.tensor(test_text.IDS), output_hidden_states=True, return_dict=True)
        return out.last_hidden_state, out.text_embeds, out.hidden_states[-2]

    def ours():
        module, params = text.load_clip_text(folder, jnp.float32, project=True)
        return compiled(module)(params, (jnp.asarray(test_text.IDS),), {})

    ordered = lambda: (lambda x: (x.last, x.pooled, x.penultimate))(ours())  # noqa: E731
    return encoder_case(folder, model, model.config.to_dict(), text.ClipTextConfig.read, theirs, ordered, {})


def t5_case(folder):
    model = test_text.t5_model()
    ids = np.random.default_rng(0).integers(1, 50, (1, 40))
    ids[0, 30:] = 0

    def theirs(model):
        return [model(torch.tensor(ids), return_dict=True).last_hidden_state]

    def ours():
        module, params = text.load_t5(folder, jnp.float32)
        return [compiled(module)(params, (jnp.asarray(ids),), {})]

    others = {"feed_forward_proj": ["gated-silu", "gelu", "relu"], "dense_act_fn": ["relu", "silu", "gelu"]}
    raw = model.config.to_dict() | {"n_positions": 512, "num_decoder_layers": 3}
    return encoder_case(folder, model, raw, text.T5Config.read, theirs, ours, others)


def gemma_case(folder):
    model = nano_sana.make_gemma()
    mask = np.arange(12)[None] < np.array(test_gemma2.COUNTS)[:, None]

    def theirs(model):
        ids, seen = torch.tensor(test_gemma2.IDS).long(), torch.tensor(mask).long()
        return [model(input_ids=ids, attention_mask=seen, return_dict=True).last_hidden_state]

    def ours():
        module, params = gemma2.load(folder, jnp.float32)
        sana.check_length(test_gemma2.IDS.shape[1], module.cfg)
        args = jnp.asarray(test_gemma2.IDS), jnp.array(test_gemma2.COUNTS)
        return [compiled(module)(params, args, {})]

    ropes = [{"rope_type": "default", "rope_theta": 100.0}, {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}]
    ropes += [{"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}]
    others = {"rope_parameters": ropes, "rope_scaling": [{"type": "linear", "factor": 4.0}, {"rope_type": "default"}]}
    others |= {"hidden_activation": ACTIVATIONS, "layer_types": [["full_attention"] * 3]}
    others |= {"use_bidirectional_attention": [True], "sliding_window": [4, 12, 64]}
    others |= {"attn_logit_softcapping": [1.0, 30.0], "cache_implementation": ["static"], "pad_token_id": [1, 7]}
    raw = model.config.to_dict() | {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}
    raw |= {"rope_scaling": None, "sliding_window_size": 4}
    return encoder_case(folder, model, raw, gemma2.Gemma2Config.read, theirs, ours, others)


def old_gemma_case(folder):
    """With rope_theta where files before transformers 5 have it."""
    case = gemma_case(folder)
    raw = json.loads(case.file.read_text())
    kept = ("rope_scaling", "head_dim", "model_type", "num_key_value_heads")
    raw = {k: x for k, x in raw.items() if k in kept or (k not in OLD and k != "rope_parameters")}
    write(folder, raw | {"rope_theta": 10000.0})
    return case


def qwen3_case(folder):
    """The states that klein and Z-Image read, from a whole language model of klein's kind."""
    model = nano_qwen3.make()
    mask = np.arange(12)[None] < np.array(test_qwen3.COUNTS)[:, None]

    def theirs(model):
        ids, seen = torch.tensor(test_qwen3.IDS).long(), torch.tensor(mask).long()
        how = {"output_hidden_states": True, "return_dict": True}
        found = model(input_ids=ids, attention_mask=seen, **how).hidden_states
        return [np.concatenate([found[i].numpy() for i in (2, -2)], axis=-1)]

    def ours():
        module, params = qwen3.load(folder, (2, -2), jnp.float32)
        return [compiled(module)(params, (jnp.asarray(test_qwen3.IDS), jnp.array(test_qwen3.COUNTS)), {})]

    ropes = [{"rope_type": "default", "rope_theta": 10.0}, {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}]
    others = {"rope_parameters": ropes, "rope_scaling": [{"type": "linear", "factor": 4.0}, {"rope_type": "default"}]}
    others |= {"layer_types": [["full_attention"] * 4 + ["sliding_attention"]], "sliding_window": [4, 64]}
    others |= {"hidden_act": ACTIVATIONS, **{f"{x}_token_id": [1, 7] for x in ("bos", "eos", "pad")}}
    raw = model.config.to_dict() | {"rope_scaling": None, "sliding_window": 4}
    return encoder_case(folder, model, raw, qwen3.Qwen3Config.read, theirs, ours, others)


def clip_case(folder):
    """A reward's CLIP, both towers of it in one file."""
    from tests.test_clipscore import write_clip

    model = write_clip(folder)
    raw = json.loads(json.dumps(model.config.to_dict()))
    for inside in (raw, raw["text_config"], raw["vision_config"]):  # what is of transformers' every file: clip text
        common = [k for k in inside if k in PretrainedConfig().to_dict() and k != "model_type"]
        for key in common:
            del inside[key]
    raw |= {"text_config_dict": None, "vision_config_dict": None}
    rng = np.random.default_rng(0)
    pixels, ids = rng.normal(size=(2, 32, 32, 3)).astype(np.float32), rng.integers(5, 400, (2, 10))
    end = raw["text_config"]["eos_token_id"]
    ids[0, 6], ids[:, -1] = end, end

    def theirs(raw):
        model_ = rebuilt(CLIPModel, transformers_config(CLIPConfig, raw), model.state_dict())
        with torch.no_grad():
            given = {"pixel_values": torch.tensor(pixels).permute(0, 3, 1, 2), "input_ids": torch.tensor(ids)}
            out = model_(**given, return_dict=True)
        return np.concatenate([np.ravel(x) for x in (out.image_embeds, out.text_embeds, out.logits_per_image / 100)])

    def ours():
        tower, params = clip_tower.load_clip(folder)
        image, words = compiled(tower)(params, (pixels, jnp.asarray(ids)), {})
        logits = np.exp(params["logit_scale"]) * np.asarray(image @ words.T) / 100
        return np.concatenate([np.ravel(x) for x in (image, words, logits)])

    others = {**OLD_OTHERS, "eos_token_id": [2, 5], "image_size": [40, 64], "patch_size": [4, 16]}
    others |= {"text_config_dict": [{"hidden_act": "gelu"}], "vision_config_dict": [{"num_attention_heads": 2}]}
    ours = by_config(clip_tower.ClipConfig.read, folder, ours)
    return Case(write(folder, raw), theirs, ours, others, inner=("text_config", "vision_config"))


# --- tokenizers and preprocessors -----------------------------------------------------------------------------------


PROMPTS = [
    "a red circle left of a small blue square <pad> , \u2019quoted\u2019",
    "  A Large  pink square<pad>",
    "",
    "!",
]
LEFT = {"padding_side": "right", "truncation_side": "right", "clean_up_tokenization_spaces": False}


def tokenizer_case(folder, encoder, kind):
    """The ids (and where it counts the mask) of a prompt, as diffusers' pipelines ask their tokenizers for them."""
    if encoder.name == "gemma":
        count = nano_sana.write_tokenizer(folder / encoder.tokenizer)
        (folder / encoder.folder).mkdir()
        write(folder / encoder.folder, {**nano_sana.GEMMA, "vocab_size": count})
    elif encoder.name == "qwen3":
        count = nano_qwen3.write_tokenizer(folder / encoder.tokenizer)
        (folder / encoder.folder).mkdir()
        write(folder / encoder.folder, {**nano_qwen3.QWEN3, "vocab_size": count})
    else:
        pretraining.write_folders(folder, folder / "clip", nano.PROMPTS, nano.CONFIGS, pretrain.TOKENS)
    file = folder / encoder.tokenizer / "tokenizer_config.json"
    raw = json.loads(file.read_text())
    length = 60 if encoder.template else 12
    words = [f"{encoder.template.before}{p}{encoder.template.after}" if encoder.template else p for p in PROMPTS]

    def ours():
        found = folders.tokenize(str(folder), (encoder,), length, PROMPTS)[encoder.name]
        return np.concatenate([found["ids"], found["mask"]], axis=-1) if encoder.masked else found

    def theirs(raw):
        found = kind.from_pretrained(file.parent, **({"padding_side": "right"} if encoder.name == "gemma" else {}))
        most = found.model_max_length if encoder.name == "clip" else length
        how = {"padding": "max_length", "max_length": most, "truncation": True, "return_tensors": "np"}
        read = found(words, **how)
        return np.concatenate([read.input_ids, read.attention_mask], axis=-1) if encoder.masked else read.input_ids

    others = {"padding_side": ["left"], "truncation_side": ["left"], "tokenizer_class": ["BertTokenizer"]}
    others |= {"backend": ["x"], "extra_special_tokens": [["red</w>"]], "extra_ids": [3]}
    others |= {f"{x}_token": ["a", "!"] for x in ("bos", "eos", "unk", "pad", "mask")}
    others |= {"model_max_length": [12, 100], "unk_token": ["!"], "add_prefix_space": [True], "errors": ["strict"]}
    return Case(write(file.parent, LEFT | raw, file.name), theirs, ours, others)


def preprocessor_case(folder):
    """PickScore's, whose reference asks transformers' own."""
    raw = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).to_dict()
    file = write(folder, json.loads(json.dumps(raw)), preprocess.NAME)
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3)).astype(np.uint8)

    def ours():
        mean, std = preprocess.read_mean_std(folder, 32)
        return preprocess.standardise(preprocess.pil_bicubic(jnp.asarray(images / np.float32(255)), 32), mean, std)

    def theirs(raw):
        found = CLIPImageProcessorPil.from_dict(raw)
        return np.stack(found(list(images), return_tensors="np", input_data_format="channels_last")["pixel_values"])

    others = {"image_mean": [[0.1, 0.2, 0.3]], "image_std": [[0.5, 0.5, 0.5]], "resample": [2]}
    others |= {"size": [{"shortest_edge": 40}, {"height": 32, "width": 32}], "crop_size": [{"height": 24, "width": 24}]}
    others |= {"image_processor_type": ["X"], "feature_extractor_type": ["X"], "data_format": ["channels_last"]}
    return Case(file, lambda raw: theirs(raw).transpose(0, 2, 3, 1), ours, others)


def med_case(folder):
    """ImageReward's BERT that looks at pictures, as transformers' BLIP has it: its file is read by another name."""
    sizes = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 40, "max_position_embeddings": 16, "encoder_hidden_size": 24, "hidden_act": "gelu"}
    model = randomise(BlipTextModel(BlipTextConfig(**sizes)))
    # No options of BERT's: how wide a picture's states are, and that there is attention to them. (12 heads are its
    # default.)
    wide = {"encoder_hidden_size": sizes.pop("encoder_hidden_size"), "is_decoder": True}
    raw = {k: x for k, x in model.config.to_dict().items() if k in sizes or k in MED}
    raw |= {"layer_norm_eps": 1e-12, "vision_config": None, "encoder_width": 768, "type_vocab_size": 2}
    rng = np.random.default_rng(0)
    ids, picture = rng.integers(1, 60, (2, 9)), rng.normal(size=(2, 5, 24)).astype(np.float32)
    mask = np.arange(9)[None] < np.array([[9], [4]])

    def ours():
        cfg = blip.BlipConfig.read(folder).text
        module = blip.MedText(cfg)
        given = jnp.asarray(ids), jnp.asarray(mask), jnp.asarray(picture)
        spec = jax.eval_shape(module.init, jax.random.key(0), *given)["params"]
        keys = {f"{blip._BERT}{name}": x for name, x in model.state_dict().items() if "pooler" not in name}
        held = test_flux.Held(model)
        held.tensors, held.path = keys, folder
        params = weights.load(held, {"text": spec}, blip.KEYS)["text"]
        return compiled(module)(params, given, {})

    def theirs(raw):
        found = rebuilt(
            BlipTextModel,
            transformers_config(BlipTextConfig, {"num_attention_heads": 12} | raw | wide),
            model.state_dict(),
        )
        seen = {"attention_mask": torch.tensor(mask).long(), "encoder_hidden_states": torch.tensor(picture)}
        with torch.no_grad():
            return found(input_ids=torch.tensor(ids), **seen, return_dict=True).last_hidden_state[:, 0].numpy()

    others = {"hidden_act": ["relu", "gelu_new"], "vision_config": []}
    ours = by_config(blip.BlipConfig.read, folder, ours)
    return Case(write(folder, raw, "med_config.json"), theirs, ours, others)


MED = ("attention_probs_dropout_prob", "hidden_dropout_prob", "pad_token_id", "bos_token_id", "use_cache")
