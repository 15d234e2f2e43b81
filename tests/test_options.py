"""Each option of each file that the loaders read, changed: taken, refused by name, or without effect in theirs too."""

import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from oracle import randomise
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    GemmaTokenizer,
    PretrainedConfig,
    T5Tokenizer,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from experiments.tiny import pretrain
from solrl_jax import weights
from solrl_jax.config import ConfigError
from solrl_jax.models import dcae, flux, gemma2, pipeline, sana, sd35, text, vae
from solrl_jax.models.schedule import Schedule
from solrl_jax.rewards import blip, clip_tower, preprocess
from solrl_jax.weights import WeightsError
from tests import nano, nano_sana, nano_sd35, test_flux, test_gemma2, test_sana, test_sd35, test_text
from tests.mutations import NEW, Case, examine

pytestmark = pytest.mark.usefixtures("one_thread")

ACTIVATIONS = ["gelu", "relu"]


def write(folder, values, name="config.json"):
    (folder / name).write_text(json.dumps(values))
    return folder / name


def rebuilt(kind, config, state, other=()):
    """A model of `kind` by its config, with the tensors of `state`; those of the half `other` do not matter."""
    model = kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)
    missing, unused = model.load_state_dict({k: x for k, x in state.items() if not k.startswith(other)}, strict=False)
    if bad := [key for key in (*missing, *unused) if not (other and key.startswith(other))]:
        raise ValueError(f"the weights are not this config's: {bad[:3]}")
    return model.eval()


def transformers_config(kind, raw):
    """As from_pretrained reads a file; what it hands out is not of the network."""
    config = kind.from_dict(raw)
    config.return_dict, config.output_attentions = True, False
    return config


def torch_values(given):
    return {name: torch.tensor(np.asarray(value)) for name, value in given.items()}


def by_config(read, folder, ours):
    """What `ours` gives; as an equal config makes an equal network, once for each that the folder's file comes to."""

    @functools.lru_cache
    def of(cfg):
        try:
            return ours(), None
        except (WeightsError, ConfigError) as e:
            return None, e

    def outcome():
        found, error = of(read(folder))
        if error is not None:
            raise error
        return found

    return outcome


@functools.lru_cache(maxsize=200)
def compiled(module):
    return jax.jit(lambda params, args, kwargs: module.apply({"params": params}, *args, **kwargs))


# --- diffusers' networks --------------------------------------------------------------------------------------------


def flux_case(folder):
    model = test_flux.make_transformer(folder)
    raw = json.loads((folder / "config.json").read_text())
    given = test_flux.inputs(flux.FluxConfig(**test_flux.SMALL), 3, 4, 5)

    def ours():
        cfg = flux.FluxConfig.read(folder)
        files = weights.Files(folder, "diffusion_pytorch_model")
        params = weights.load(files, test_flux.shapes_of(cfg), flux.KEYS)
        module, rope = flux.FluxTransformer(cfg, jnp.float32), test_flux.table_of(cfg, 3, 4, 5)
        return compiled(module)(params, (), {**given, "rope": rope})

    def theirs(raw):
        return test_flux.theirs(rebuilt(FluxTransformer2DModel, raw, model.state_dict()), given, 3, 4)

    others = {"out_channels": [8, 16, 32], "axes_dims_rope": [[6, 6, 4], [2, 6, 6]]}
    return Case(write(folder, raw), theirs, by_config(flux.FluxConfig.read, folder, ours), others)


def sd35_case(folder):
    model = test_sd35.make_transformer(**nano_sd35.MEDIUM)
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    given = test_sd35.inputs(sd35.Sd35Config(**nano_sd35.TRANSFORMER_FIELDS))

    def ours():
        cfg = sd35.Sd35Config.read(folder)
        files = weights.Files(folder, "diffusion_pytorch_model")
        params = weights.load(files, test_sd35.shapes_of(cfg), sd35.keys(cfg))
        return compiled(sd35.Sd35Transformer(cfg, jnp.float32))(params, (), given)

    def theirs(raw):
        return test_sd35.theirs(rebuilt(SD3Transformer2DModel, raw, model.state_dict()), given)

    others = {"qk_norm": ["layer_norm"], "dual_attention_layers": [[0], [1, 2]]}
    return Case(write(folder, raw), theirs, by_config(sd35.Sd35Config.read, folder, ours), others)


def sana_case(folder):
    model = test_sana.make_transformer()
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    given = test_sana.inputs(sana.SanaConfig(**nano_sana.TRANSFORMER))

    def ours():
        cfg = sana.SanaConfig.read(folder)
        files = weights.Files(folder, "diffusion_pytorch_model")
        params = weights.load(files, test_sana.shapes_of(cfg), sana.KEYS)
        return compiled(sana.SanaTransformer(cfg, jnp.float32))(params, (), given)

    def theirs(raw):
        found = rebuilt(SanaTransformer2DModel, raw, model.state_dict())
        scaled = given | {"sigma": given["sigma"] * found.config.timestep_scale}  # as SanaPipeline does
        return test_sana.theirs(found, scaled)

    others = {"qk_norm": ["rms_norm_across_heads"], "interpolation_scale": [1.0], "timestep_scale": [0.5]}
    return Case(write(folder, raw), theirs, by_config(sana.SanaConfig.read, folder, ours), others)


def decoder_case(folder, model, kind, shape, read, load, others):
    """The decoding half, of latents, as a pipeline does it."""
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    latents = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def ours():
        module, params = load(folder, jnp.float32)
        return jitted_decode(module, params, latents)

    def theirs(raw):
        found = rebuilt(kind, raw, model.state_dict(), ("encoder.",))
        shift = getattr(found.config, "shift_factor", 0) or 0
        z = torch.tensor(latents).permute(0, 3, 1, 2) / found.config.scaling_factor + shift
        with torch.no_grad():
            return (found.decode(z).sample.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)

    return Case(write(folder, raw), theirs, by_config(read, folder, ours), others)


jitted_decode = jax.jit(vae.decode, static_argnums=0)


def vae_case(folder):
    others = {"act_fn": ["relu", "gelu"], "latents_mean": [[0.5] * 4], "latents_std": [[2.0] * 4]}
    others |= {"down_block_types": [["AttnDownEncoderBlock2D"] * 2], "up_block_types": [["AttnUpDecoderBlock2D"] * 2]}
    model = randomise(AutoencoderKL(**nano_sd35.VAE))
    return decoder_case(folder, model, AutoencoderKL, (1, 4, 4, 4), vae.VaeConfig.read, vae.load_vae, others)


def dcae_case(folder):
    blocks, scales = ["ResBlock", "ResBlock", "EfficientViTBlock"], [[], [], [3]]
    others = {f"{half}_block_types": [blocks] for half in ("encoder", "decoder")}
    others |= {f"{half}_qkv_multiscales": [scales] for half in ("encoder", "decoder")}
    others |= {"upsample_block_type": ["pixel_shuffle"], "downsample_block_type": ["pixel_unshuffle"]}
    others |= {"decoder_norm_types": ["batch_norm"], "decoder_act_fns": ["relu"], "decoder_conv_act_fn": ["silu"]}
    return decoder_case(folder, random_dcae(), AutoencoderDC, (1, 4, 4, 4), dcae.DcaeConfig.read, dcae.load, others)


def random_dcae():
    return randomise(AutoencoderDC(**nano_sana.VAE))


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
    raw |= {"rope_scaling": None}
    return encoder_case(folder, model, raw, gemma2.Gemma2Config.read, theirs, ours, others)


def old_gemma_case(folder):
    """With rope_theta where files before transformers 5 have it."""
    case = gemma_case(folder)
    raw = json.loads(case.file.read_text())
    kept = ("rope_scaling", "head_dim", "model_type", "num_key_value_heads")
    raw = {k: x for k, x in raw.items() if k in kept or (k not in OLD and k != "rope_parameters")}
    write(folder, raw | {"rope_theta": 10000.0})
    return case


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


# --- schedulers -----------------------------------------------------------------------------------------------------


def flow_case(folder, model):
    """The sigmas, and one step of a sampler."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=model == "flux")
    scheduler.save_pretrained(folder)
    file = folder / "scheduler_config.json"
    raw = json.loads(file.read_text())
    x, v = (np.random.default_rng(i).normal(size=(1, 4, 4)).astype(np.float32) for i in range(2))

    def ours():
        schedule = Schedule.read(folder)
        if model == "flux":
            sigmas = flux.sigmas(6, 1024, schedule)
        else:
            sd35.check_schedule(folder, schedule)
            sigmas = sd35.sigmas(6, schedule.shift)
        return np.concatenate([sigmas, np.ravel(x + (sigmas[1] - sigmas[0]) * v)])

    def theirs(raw):
        found, names = FlowMatchEulerDiscreteScheduler.from_config(raw), ("base_image_seq_len", "max_image_seq_len")
        c = found.config
        mu = calculate_shift(1024, *(c[n] for n in names), c["base_shift"], c["max_shift"])
        if model == "flux":
            found.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6), mu=mu)
        else:
            found.set_timesteps(6, mu=mu if c["use_dynamic_shifting"] else None)
        generator = torch.Generator().manual_seed(0)
        step = found.step(torch.tensor(v), found.timesteps[0], torch.tensor(x), generator=generator).prev_sample
        return np.concatenate([found.sigmas, np.ravel(step)])

    others = {"shift_terminal": [0.1], "time_shift_type": ["linear"]}
    return Case(write(folder, raw, file.name), theirs, ours, others)


def dpm_case(folder):
    """The sigmas: SANA's steps are by the solver that a config names, not by this scheduler."""
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, solver_order=2
    )
    scheduler.save_pretrained(folder)
    file = folder / "scheduler_config.json"
    raw = json.loads(file.read_text())

    def theirs(raw):
        found = DPMSolverMultistepScheduler.from_config(raw)
        found.set_timesteps(6)
        return found.sigmas.numpy()

    def ours():
        return sana.sigmas(6, sana.SanaSchedule.read(folder).flow_shift)

    others = {"beta_schedule": ["scaled_linear"], "trained_betas": [[0.1, 0.2]], "prediction_type": ["epsilon"]}
    others |= {"algorithm_type": ["sde-dpmsolver++"], "solver_type": ["heun"], "final_sigmas_type": ["sigma_min"]}
    others |= {"variance_type": ["learned_range"], "timestep_spacing": ["trailing"], "time_shift_type": ["linear"]}
    return Case(write(folder, raw, file.name), theirs, ours, others)


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
    else:
        pretrain.write_folders(folder, folder / "clip", nano.PROMPTS, nano.CONFIGS)
    file = folder / encoder.tokenizer / "tokenizer_config.json"
    raw = json.loads(file.read_text())

    def ours():
        found = pipeline.tokenize(str(folder), (encoder,), 12, PROMPTS)[encoder.name]
        return np.concatenate([found["ids"], found["mask"]], axis=-1) if encoder.masked else found

    def theirs(raw):
        found = kind.from_pretrained(file.parent, **({"padding_side": "right"} if encoder.masked else {}))
        length = found.model_max_length if encoder.name == "clip" else 12
        how = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "np"}
        read = found(PROMPTS, **how)
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


CASES = {  # and some of what is taken
    "flux": (flux_case, {"axes_dims_rope"}),
    "sd35": (sd35_case, set()),
    "sana": (sana_case, {"timestep_scale"}),
    "vae": (vae_case, {"scaling_factor", "shift_factor", "norm_num_groups"}),
    "dcae": (dcae_case, {"scaling_factor"}),
    "clip text": (clip_text_case, {"hidden_act", "layer_norm_eps", "eos_token_id"}),
    "t5": (t5_case, {"relative_attention_max_distance", "layer_norm_epsilon"}),
    "gemma2": (gemma_case, {"attn_logit_softcapping", "hidden_activation", "rms_norm_eps", "rope_parameters"}),
    "old gemma2": (old_gemma_case, {"rope_theta", "query_pre_attn_scalar"}),
    "clip": (clip_case, {"text_config.hidden_act", "vision_config.layer_norm_eps"}),
    "flux's scheduler": (functools.partial(flow_case, model="flux"), {"base_shift", "max_shift", "max_image_seq_len"}),
    "sd35's scheduler": (functools.partial(flow_case, model="sd35"), {"shift"}),
    "sana's scheduler": (dpm_case, {"flow_shift"}),
    "clip's tokenizer": (
        functools.partial(tokenizer_case, encoder=flux.ENCODERS[0], kind=CLIPTokenizer),
        {"padding_side", "pad_token"},
    ),
    "t5's tokenizer": (
        functools.partial(tokenizer_case, encoder=flux.ENCODERS[1], kind=T5Tokenizer),
        {"padding_side", "truncation_side"},
    ),
    "gemma's tokenizer": (functools.partial(tokenizer_case, encoder=sana.ENCODERS[0], kind=GemmaTokenizer), set()),
    "preprocessor": (preprocessor_case, {"image_mean", "image_std"}),
    "imagereward": (med_case, {"layer_norm_eps"}),
}


@pytest.fixture(autouse=True)
def quiet():
    """Both libraries warn of every option that they do not know."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", CASES)
def test_changed_options(tmp_path, name):
    make, taken = CASES[name]
    found = examine(make(tmp_path))
    assert not found.problems, "\n  ".join(["", *found.problems])
    assert taken <= found.taken
    assert NEW in (found.idle if name.endswith("tokenizer") else found.refused)  # transformers itself reads those
