"""Qwen3 and both prompt templates against transformers, on small random weights and a tokenizer of bytes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import error
from safetensors.numpy import load_file, save_file
from transformers import Qwen2Tokenizer

from solrl_jax import device, weights
from solrl_jax.config import ConfigError
from solrl_jax.models import folders, public, qwen3
from solrl_jax.models.folders import Encoder
from solrl_jax.run import data
from tests import card, nano_qwen3
from tests.test_flux import rewrite

IDS, COUNTS = np.random.default_rng(0).integers(5, 100, (4, 12)).astype(np.int32), [12, 7, 1, 5]
for row, count in zip(IDS, COUNTS, strict=True):
    row[count:] = 3  # the padding, which has an embedding
EVERY = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3")
    nano_qwen3.make().save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


@functools.partial(jax.jit, static_argnums=0)
def applied(module, params, ids, counts):
    return module.apply({"params": params}, ids, counts)


def ours(path, reads=EVERY, dtype=jnp.float32):
    module, params = qwen3.load(path, reads, dtype)
    return applied(module, params, IDS, np.array(COUNTS))


def theirs(model, reads=EVERY) -> torch.Tensor:
    mask = np.arange(12)[None] < np.array(COUNTS)[:, None]
    with torch.no_grad():
        args = {"input_ids": torch.tensor(IDS).long(), "attention_mask": torch.tensor(mask).long()}
        found = model(**args, output_hidden_states=True).hidden_states
    return torch.cat([found[i] for i in reads], dim=-1)


def test_states_of_every_layer(folder):
    """Of all tokens, the padding's too: they see the text before them, at their own positions."""
    found, wanted = ours(folder), theirs(nano_qwen3.make())
    for i in range(4):
        assert error(found[..., 32 * i : 32 * (i + 1)], wanted[..., 32 * i : 32 * (i + 1)]) < 1e-5
    pads = np.asarray(found)[3, 5:]
    assert np.ptp(pads, axis=0).max() > 0.1  # equal embeddings, which positions alone tell apart


@pytest.mark.parametrize(("reads", "layers"), [((1, 3), 3), ((-2,), 4), ((2,), 2)])
def test_only_the_layers_below_the_last_state_are_built(folder, reads, layers):
    _, params = qwen3.load(folder, reads, jnp.float32)
    assert sum(params[name]["norm1"]["scale"].shape[0] for name in params if name.startswith("layers_")) == layers
    assert error(ours(folder, reads), theirs(nano_qwen3.make(), reads)) < 1e-5


def test_the_public_sizes():
    """Parameters that are built, of the 4B and the 8B: 27 layers for klein, 35 for Z-Image."""
    four = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_key_value_heads": 8}
    for changes, reads, count in [
        ({}, (9, 18, 27), 388_956_160 + 27 * 100_930_816),
        ({}, (-2,), 388_956_160 + 35 * 100_930_816),
        ({"hidden_size": 4096, "intermediate_size": 12288}, (9, 18, 27), 622_329_856 + 27 * 192_946_432),
    ]:
        cfg = qwen3.Qwen3Config(**{**four, **changes})
        module = qwen3.Qwen3(cfg, qwen3.ends_of(cfg, reads))
        spec = jax.eval_shape(module.init, jax.random.key(0), *qwen3.blank())["params"]
        assert sum(x.size for x in jax.tree.leaves(spec)) == count


@pytest.mark.slow
def test_memory_on_a_card(monkeypatch):
    """48 prompts of klein-4B, compiled for an H100: beside weights and states there is one layer's room, of which
    its float32 scores take 1.6 GB; no stack of weights is copied."""
    monkeypatch.setattr(device, "platform", lambda: "gpu")
    cfg = weights.from_config(qwen3.Qwen3Config, "x", next(iter(public.FLUX2.values()))["text_encoder/config.json"])
    module = qwen3.Qwen3(cfg, (9, 18, 27))
    spec = jax.eval_shape(module.init, jax.random.key(0), *qwen3.blank())["params"]
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), spec)
    args = (jax.ShapeDtypeStruct((48, *shape), jnp.int32) for shape in ((512,), ()))
    found = card.compiled(lambda p, *x: module.apply({"params": p}, *x), spec, *args, on=card.mesh()).memory_analysis()
    assert found.argument_size_in_bytes == pytest.approx(2 * 3_114_088_192, rel=1e-3)
    assert found.output_size_in_bytes == 48 * 512 * 7680 * 2
    assert found.temp_size_in_bytes < 3.2e9


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"head_dim": 16},
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 0.1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}},
    ],
)
def test_what_the_config_says_is_heard(tmp_path, folder, changes):
    """Each value changes the states, to those of transformers."""
    model = nano_qwen3.make(**changes)
    model.save_pretrained(tmp_path)
    found = ours(tmp_path)
    assert error(found, theirs(model)) < 1e-5
    assert np.abs(found - ours(folder)).max() > 5e-4


def test_bfloat16_stays_near(folder):
    found = ours(folder, dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    assert 1e-4 < error(found, theirs(nano_qwen3.make())) < 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_language_model(tmp_path, tied):
    """The keys of a Qwen3ForCausalLM, with the head of its own that the 8B has, and the public file's config."""
    model = nano_qwen3.make(whole=True, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "model.layers.4.self_attn.q_proj.weight" in tensors and ("lm_head.weight" in tensors) is not tied
    found = ours(tmp_path)
    assert error(found, theirs(model)) < 1e-5
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["rope_theta"] = raw.pop("rope_parameters")["rope_theta"]
    del raw["layer_types"]
    raw |= {"rope_scaling": None, "sliding_window": None, "use_sliding_window": False, "max_window_layers": 36}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    np.testing.assert_array_equal(ours(tmp_path), found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("layers.3.mlp.up_proj.weight"), "missing layers.3.mlp.up_proj.weight"),
        (lambda t: t.update({"layers.1.self_attn.q_proj.bias": np.zeros(48)}), "unused layers.1.self_attn.q_proj.bias"),
        (lambda t: t.update({"layers.5.mlp.up_proj.weight": np.zeros((48, 32))}), "unused layers.5.mlp.up_proj.weight"),
        (lambda t: t.update({"layers.2.self_attn.k_norm.weight": np.zeros(9)}), r"k_norm.weight has shape \(9,\), not"),
    ],
)
def test_every_key_is_accounted_for(tmp_path, change, words):
    nano_qwen3.make().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(weights.WeightsError, match=words):
        qwen3.load(tmp_path, (-2,))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "qwen2"}, "holds a qwen2, not a qwen3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads 3"),
        ({"attention_bias": True}, "attention_bias true is not known here"),
        ({"hidden_act": "swish"}, "hidden_act 'swish' is not one of"),
        ({"use_sliding_window": True}, "use_sliding_window is True: only null or False is known here"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .*: only null or 'full_attention'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is .*yarn.*: only rope_type 'default'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters is .*linear.*: only rope_type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, an option that is not known here"),
        ({"num_experts": 8}, "num_experts is 8, an option that is not known here"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .*, an option that is not known here"),
        ({"hidden_size": "32"}, "hidden_size is '32', not a whole number"),
    ],
)
def test_refused_configs(tmp_path, folder, values, words):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    rewrite(tmp_path / "config.json", **values)
    with pytest.raises(weights.WeightsError, match=words):
        qwen3.Qwen3Config.read(tmp_path)


@pytest.mark.parametrize(("reads", "layers"), [((2, 5), 6), ((5,), 6), ((9, 18, 27), 28)])
def test_too_few_layers(folder, reads, layers):
    """The last state of all is behind the final norm."""
    with pytest.raises(weights.WeightsError, match=f"num_hidden_layers is 5: .* {layers} or more are needed"):
        qwen3.load(folder, reads)


# --- the text -------------------------------------------------------------------------------------------------------


PARTS = "qwen3", "text_encoder", "tokenizer", qwen3.Qwen3Config
KLEIN = Encoder(*PARTS, masked=True, reads=(1, 2, 3), template=qwen3.KLEIN)
Z_IMAGE = KLEIN._replace(reads=(-2,), template=qwen3.Z_IMAGE)
PROMPTS = [
    "a red circle \u2019quoted\u2019 re",
    "",
    "  A  Large\n\npink square\t are 12345  \n",
    "\nre\u0301al e\u0301 \u00e9, 100%!",  # NFC makes two characters one
    "word " * 30,
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    count = nano_qwen3.write_tokenizer(path / "tokenizer")
    nano_qwen3.make(count).save_pretrained(path / "text_encoder")
    return path


def asked(pipeline, prompts, length, thinking):
    """As diffusers' pipelines ask: the chat template as text, then the tokenizer."""
    theirs = Qwen2Tokenizer.from_pretrained(pipeline / "tokenizer")
    words = [
        theirs.apply_chat_template(
            [{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        for p in prompts
    ]
    return theirs(words, padding="max_length", max_length=length, truncation=True, return_tensors="np")


@pytest.mark.parametrize(("encoder", "thinking", "empty"), [(KLEIN, False, 12), (Z_IMAGE, True, 8)])
def test_prompts_are_tokenised_as_the_pipelines_do(pipeline, encoder, thinking, empty):
    """Ids and mask, of a prompt that is cut and of the empty one too."""
    found = folders.tokenize(str(pipeline), (encoder,), 64, PROMPTS)["qwen3"]
    wanted = asked(pipeline, PROMPTS, 64, thinking)
    np.testing.assert_array_equal(found["ids"], wanted["input_ids"])
    np.testing.assert_array_equal(found["mask"], wanted["attention_mask"].astype(bool))
    lengths = found["mask"].sum(axis=-1)
    assert lengths[4] == 64 and lengths.max() == 64 and len(set(lengths)) == 5
    words = Qwen2Tokenizer.from_pretrained(pipeline / "tokenizer")
    end = words.convert_tokens_to_ids("<|im_end|>")
    assert (found["ids"] == end).sum(axis=-1).tolist() == [1, 1, 1, 1, 0]  # the cut one lost its end
    # The empty prompt's tokens: "user" and "assistant" are one word each in Qwen3's vocabulary, bytes here; and two
    # newlines are one token.
    letters = len("user") - 1 + len("assistant") - 1
    newlines = 2 if encoder is KLEIN else 0
    assert lengths[1] == empty + letters + newlines


@pytest.mark.parametrize("word", ["<|im_end|>", "<|endoftext|>", "<|im_start|>", "<think>", "</think>"])
def test_special_words_in_a_prompt_are_text(pipeline, word):
    """In transformers they would be tokens that end the message, or that are padding."""
    prompt = f"a {word}{word} sign"
    found = folders.tokenize(str(pipeline), (KLEIN, Z_IMAGE._replace(name="other")), 64, [prompt, "a sign"])
    words = Qwen2Tokenizer.from_pretrained(pipeline / "tokenizer")
    special = words.convert_tokens_to_ids(word)
    for read, thinking in ((found["qwen3"], False), (found["other"], True)):
        count = [np.sum(row[mask] == special) for row, mask in zip(read["ids"], read["mask"], strict=True)]
        assert count[0] == count[1] <= 2
        assert (asked(pipeline, [prompt], 64, thinking)["input_ids"] == special).sum() >= count[0] + 2
    text = words.decode(found["other"]["ids"][0][found["other"]["mask"][0]])
    split = f"{word[0]} {word[1:]}"
    assert text == f"<|im_start|>user\na {split}{split} sign<|im_end|>\n<|im_start|>assistant\n"


def test_prompts_that_are_cut_are_named(pipeline):
    found = data.cut(PROMPTS, lambda prompts: folders.tokenize(str(pipeline), (KLEIN,), 64, prompts))
    assert found == {"qwen3": [PROMPTS[4]]}


def test_padding_is_not_counted(pipeline):
    """The states of a text and its length do not depend on how far it is padded; klein reads the padding's too."""
    module, params = qwen3.load(pipeline / "text_encoder", KLEIN.reads, jnp.float32)
    apply = jax.jit(lambda p, *args: module.apply({"params": p}, *args))
    short, long = (folders.tokenize(str(pipeline), (KLEIN,), n, PROMPTS[:2])["qwen3"] for n in (64, 96))
    assert short["mask"].sum(axis=-1).tolist() == long["mask"].sum(axis=-1).tolist()
    states = [
        apply(params, jnp.asarray(x["ids"]), jnp.asarray(x["mask"].sum(axis=-1, dtype=np.int32))) for x in (short, long)
    ]
    assert states[0].shape == (2, 64, 96)
    np.testing.assert_allclose(states[0], states[1][:, :64], atol=1e-5)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("tokenizer_config.json", {"padding_side": "left"}, "padding_side is 'left': set it to 'right'"),
        ("tokenizer_config.json", {"pad_token": None}, "pad_token is missing: download it again"),
    ],
)
def test_refused_tokenizers(tmp_path, file, change, words):
    count = nano_qwen3.write_tokenizer(tmp_path / "tokenizer")
    nano_qwen3.make(count).save_pretrained(tmp_path / "text_encoder")
    rewrite(tmp_path / "tokenizer" / file, **change)
    with pytest.raises(weights.WeightsError, match=words):
        folders.tokenizers(str(tmp_path), (KLEIN,))


def test_a_tokenizer_without_the_templates_words(tmp_path, monkeypatch):
    monkeypatch.setattr(nano_qwen3, "THINK", ("<think>",))
    count = nano_qwen3.write_tokenizer(tmp_path / "tokenizer")
    nano_qwen3.make(count).save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(weights.WeightsError, match=r"has no token </think>, .* needs: download it again"):
        folders.tokenizers(str(tmp_path), (KLEIN,))
    assert folders.tokenizers(str(tmp_path), (Z_IMAGE,))


def test_text_tokens():
    qwen3.check_klein_tokens(512)
    for length in (128, 511, 1024):
        with pytest.raises(ConfigError, match=f"model.text_tokens={length}: FLUX.2-klein .* use 512"):
            qwen3.check_klein_tokens(length)
    for length in (32, 128, 512):
        qwen3.check_z_image_tokens(length)
    for length, fits in ((1, 32), (100, 128), (511, 512)):
        with pytest.raises(
            ConfigError, match=f"model.text_tokens={length}: Z-Image .* multiple of 32 tokens: use {fits}$"
        ):
            qwen3.check_z_image_tokens(length)
