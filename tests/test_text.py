"""CLIP text towers and T5 against transformers on small random weights, through files and back."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import error, randomise
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel
from transformers import T5Config as HfT5Config

from experiments.tokenizers_local import write_clip_tokenizer, write_t5_tokenizer
from solrl_jax import weights
from solrl_jax.models import text

CAPTIONS = [
    "a red circle left of a blue square",
    "two green triangles, on the white area",
    "Don't are read: re-read ared area!",
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
IDS = np.array([[98, 5, 6, 7, 99, 99, 99, 99], [98, 8, 99, 0, 0, 0, 0, 0], [98, 1, 2, 3, 4, 5, 6, 99]])


@functools.partial(jax.jit, static_argnums=0)
def applied(module, params, ids):
    return module.apply({"params": params}, ids)


def clip_model(kind=CLIPTextModel, **changes):
    config = SIZES | {"vocab_size": 100, "max_position_embeddings": 8, "projection_dim": 24, **changes}
    return randomise(kind(CLIPTextConfig(**config)))


def t5_model(**changes):
    config = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
    return randomise(T5EncoderModel(HfT5Config(**config, feed_forward_proj="gated-gelu", **changes)))


def clip_oracle(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor(ids), output_hidden_states=True)


@pytest.mark.parametrize(("act", "eos"), [("quick_gelu", 2), ("gelu", 99)])
def test_clip_text_from_shards(tmp_path, act, eos):
    model = clip_model(hidden_act=act, eos_token_id=eos)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    module, params = text.load_clip_text(tmp_path, jnp.float32)
    ours, theirs = applied(module, params, IDS), clip_oracle(model)
    assert error(ours.last, theirs.last_hidden_state) < 1e-5
    assert error(ours.pooled, theirs.pooler_output) < 1e-5
    assert error(ours.penultimate, theirs.hidden_states[-2]) < 1e-5
    assert params["layers"]["q"]["kernel"].shape == (3, 32, 32)


def test_clip_text_with_projection(tmp_path):
    model = clip_model(CLIPTextModelWithProjection, hidden_act="gelu", eos_token_id=2)
    model.save_pretrained(tmp_path)
    module, params = text.load_clip_text(tmp_path, jnp.float32, project=True)
    ours, theirs = applied(module, params, IDS), clip_oracle(model)
    assert error(ours.pooled, theirs.text_embeds) < 1e-5
    plain, without = text.load_clip_text(tmp_path, jnp.float32)  # FLUX's use of the same file
    assert "projection" not in without
    assert applied(plain, without, IDS).pooled.shape == (3, 32)


def test_clip_text_spellings(tmp_path):
    clip_model().save_pretrained(tmp_path)
    _, params = text.load_clip_text(tmp_path, jnp.float32)
    bare = load_file(tmp_path / "model.safetensors")
    assert "final_layer_norm.weight" in bare
    public = {"text_model." + key: value for key, value in bare.items()}
    public["text_model.embeddings.position_ids"] = np.arange(8)[None]
    save_file(public, tmp_path / "model.safetensors")
    _, again = text.load_clip_text(tmp_path, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    weights.save(again, text.CLIP_TEXT_KEYS, tmp_path / "out.safetensors")
    saved = load_file(tmp_path / "out.safetensors")
    assert saved.keys() == public.keys() - {"text_model.embeddings.position_ids"}
    assert all(np.array_equal(saved[key], public[key]) for key in saved)


def test_t5_from_shards(tmp_path):
    model = t5_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    ids = np.random.default_rng(0).integers(1, 50, (2, 100))  # longer than the last bucket's edge
    ids[1, 40:] = 0
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).last_hidden_state
    module, params = text.load_t5(tmp_path, jnp.float32)
    assert error(applied(module, params, ids), theirs) < 1e-5


def test_t5_spellings(tmp_path):
    t5_model().save_pretrained(tmp_path)
    _, params = text.load_t5(tmp_path, jnp.float32)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    save_file(stored | {"encoder.embed_tokens.weight": stored["shared.weight"]}, file)
    _, with_copy = text.load_t5(tmp_path, jnp.float32)
    save_file({key.replace("shared", "encoder.embed_tokens"): value for key, value in stored.items()}, file)
    _, only_copy = text.load_t5(tmp_path, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, with_copy, params)
    jax.tree.map(np.testing.assert_array_equal, only_copy, params)
    weights.save(params, text.T5_KEYS, file)
    saved = load_file(file)
    assert saved.keys() == stored.keys()
    assert all(np.array_equal(saved[key], stored[key]) for key in saved)


def test_public_sizes():
    """Parameter counts of FLUX's encoders, from shapes alone."""
    clip_l = text.ClipTextConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072, projection_dim=768)
    xxl = text.T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    found = (text.ClipText(clip_l), 123_060_480), (text.ClipText(clip_l, project=True), 123_060_480 + 589_824)
    for module, count in (*found, (text.T5Encoder(xxl), 4_762_310_656)):
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_t5_buckets():
    rows = text.t5_buckets(300, 32, 128)
    edges = [8, 12, 16, 23, 32, 46, 64, 91]
    changes = [d for d in range(8, 300) if rows[d, 0] != rows[d - 1, 0]]  # keys behind the query
    assert changes == edges
    assert [rows[d, 0] for d in edges] == list(range(8, 16))
    assert [rows[0, d] for d in edges] == list(range(24, 32))  # keys ahead
    assert [rows[d, 0] for d in range(8)] == list(range(8))
    assert rows[0, 7] == 23
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(300)[None, :] - torch.arange(300)[:, None]
    np.testing.assert_array_equal(rows, T5Attention._relative_position_bucket(distance, True, 32, 128).numpy())


@pytest.mark.slow
def test_bfloat16_files_and_products(tmp_path):
    """Public text encoders are half precision: they are read as stored, and a bf16 module stays near the f32 one."""
    model = t5_model()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(1, 50, (2, 12))
    outputs = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        module, params = text.load_t5(tmp_path, dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
        outputs[dtype] = applied(module, params, ids)
        assert outputs[dtype].dtype == dtype
    assert error(outputs[jnp.bfloat16], torch.tensor(np.asarray(outputs[jnp.float32]))) < 0.1


def test_errors_name_the_keys(tmp_path):
    clip_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    stored["encoder.layers.1.mlp.fc3.weight"] = stored.pop("encoder.layers.1.mlp.fc1.weight")
    stored["final_layer_norm.bias"] = np.zeros(31, np.float32)
    save_file(stored, file)
    with pytest.raises(weights.WeightsError) as e:
        text.load_clip_text(tmp_path)
    assert "missing text_model.encoder.layers.1.mlp.fc1.weight" in str(e.value)
    assert "unused text_model.encoder.layers.1.mlp.fc3.weight" in str(e.value)
    assert "text_model.final_layer_norm.bias has shape (31,), not (32,)" in str(e.value)


@pytest.mark.parametrize(
    ("load", "values", "words"),
    [
        (text.load_clip_text, {"hidden_act": "swish9"}, "swish9"),
        (text.load_clip_text, {"hidden_size": 30, "num_attention_heads": 4}, "4 heads"),
        (text.load_t5, {"feed_forward_proj": "relu"}, "gated-gelu"),
        (text.load_t5, {}, "relu"),
    ],
)
def test_refused_configs(tmp_path, load, values, words):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(weights.WeightsError, match=words) as e:
        load(tmp_path)
    assert "config.json" in str(e.value)


def test_tokenizers_keep_words_whole(tmp_path):
    count = write_clip_tokenizer(tmp_path / "clip", CAPTIONS, length=16)
    clip = AutoTokenizer.from_pretrained(tmp_path / "clip")
    assert (len(clip), clip.model_max_length, clip.eos_token_id) == (count, 16, count - 1)
    assert clip.convert_tokens_to_ids("!") == 0
    assert clip.tokenize(CAPTIONS[0]) == [word + "</w>" for word in CAPTIONS[0].split()]
    assert clip.tokenize(CAPTIONS[2])[:4] == ["don</w>", "'t</w>", "are</w>", "read</w>"]
    assert clip("日本").input_ids[-1] == clip.eos_token_id  # bytes, never an error
    count = write_t5_tokenizer(tmp_path / "t5", CAPTIONS)
    t5 = AutoTokenizer.from_pretrained(tmp_path / "t5")
    assert (len(t5), t5.pad_token_id, t5.eos_token_id, t5.unk_token_id) == (count, 0, 1, 2)
    assert t5.tokenize(CAPTIONS[0]) == ["▁" + word for word in CAPTIONS[0].split()]
    assert t5.tokenize("circles, ?") == ["▁circle", "s", ",", "▁", "?"]


def test_flux_pipeline_conditioning(tmp_path):
    """diffusers loads the tokenizers and encoders, and what it makes of a prompt is what we make of it."""
    from diffusers import FluxPipeline

    vocab_size = write_clip_tokenizer(tmp_path / "tokenizer", CAPTIONS, length=12)
    write_t5_tokenizer(tmp_path / "tokenizer_2", CAPTIONS)
    clip_model(vocab_size=vocab_size, max_position_embeddings=12, eos_token_id=2).save_pretrained(
        tmp_path / "text_encoder"
    )
    model = t5_model()
    model.resize_token_embeddings(200)
    randomise(model).save_pretrained(tmp_path / "text_encoder_2")
    parts = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
    parts |= {"text_encoder_2": "T5EncoderModel", "tokenizer_2": "T5TokenizerFast"}
    index = {"_class_name": "FluxPipeline"} | {name: ["transformers", kind] for name, kind in parts.items()}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipe = FluxPipeline.from_pretrained(tmp_path, transformer=None, vae=None, scheduler=None)
    prompts = [*CAPTIONS, "a blue area", ""]
    with torch.no_grad():
        states, pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=10)
    clip, clip_params = text.load_clip_text(tmp_path / "text_encoder", jnp.float32)
    t5, t5_params = text.load_t5(tmp_path / "text_encoder_2", jnp.float32)
    how = {"padding": "max_length", "truncation": True, "return_tensors": "np"}
    ids = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")(prompts, **how).input_ids
    ids_2 = AutoTokenizer.from_pretrained(tmp_path / "tokenizer_2")(prompts, max_length=10, **how).input_ids
    assert error(applied(clip, clip_params, ids).pooled, pooled) < 1e-5
    assert error(applied(t5, t5_params, ids_2), states) < 1e-5
