"""Gemma-2 against transformers, on small random weights."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import error
from safetensors.numpy import load_file, save_file

from solrl_jax import weights
from solrl_jax.models import gemma2
from tests import nano_sana
from tests.test_flux import rewrite

IDS, COUNTS = np.random.default_rng(0).integers(5, 100, (3, 12)).astype(np.int32), [12, 5, 1]
for row, count in zip(IDS, COUNTS, strict=True):
    row[0], row[count:] = 2, 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gemma")
    nano_sana.make_gemma().save_pretrained(path, max_shard_size="20KB")
    return path


def ours(path, dtype=jnp.float32):
    module, params = gemma2.load(path, dtype)
    return compiled(module)(params)


@functools.lru_cache
def compiled(module):
    return jax.jit(lambda params: module.apply({"params": params}, jnp.asarray(IDS), jnp.array(COUNTS)))


def theirs(model) -> torch.Tensor:
    mask = np.arange(12)[None] < np.array(COUNTS)[:, None]
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS).long(), attention_mask=torch.tensor(mask).long()).last_hidden_state


def test_states(folder):
    """Of all tokens, the padding's too, which see the text before them."""
    assert error(ours(folder), theirs(nano_sana.make_gemma())) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_logit_softcapping": 1000.0},
        {"attn_logit_softcapping": None},
        {"num_key_value_heads": 4},
        {"query_pre_attn_scalar": 8},
        {"hidden_activation": "gelu"},
        {"rms_norm_eps": 0.1},
    ],
)
def test_what_the_config_says_is_heard(tmp_path, folder, changes):
    """Each value changes the states, to those of transformers."""
    model = nano_sana.make_gemma(**changes)
    model.save_pretrained(tmp_path)
    found = ours(tmp_path)
    assert error(found, theirs(model)) < 1e-5
    assert np.abs(found - ours(folder)).max() > 5e-4


def test_bfloat16_stays_near(folder):
    found = ours(folder, jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    assert 1e-4 < error(found, theirs(nano_sana.make_gemma())) < 0.1


def test_spellings(tmp_path, folder):
    """The public file's config, and the keys of a whole language model."""
    model = nano_sana.make_gemma()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "layers.0.self_attn.q_proj.weight" in tensors
    renamed = {f"model.{k}": x for k, x in tensors.items()} | {"lm_head.weight": np.zeros((4, 4), np.float32)}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["rope_theta"] = raw.pop("rope_parameters")["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    np.testing.assert_array_equal(ours(tmp_path), ours(folder))
    rewrite(tmp_path / "config.json", rope_theta=10.0)
    assert np.abs(ours(tmp_path) - ours(folder)).max() > 1e-3


def test_rope_is_half_split():
    """Position 1 turns the pair (0, d/2) by one radian: transformers' rotate_half."""
    cos, sin = map(jnp.asarray, gemma2.rope_table(2, 4, 10000.0))
    x = jnp.array([1.0, 0, 0, 0]).reshape(1, 1, 1, 4) * jnp.ones((1, 2, 1, 1))
    found = gemma2.rotate(x, (cos, sin))[0, 1, 0]
    np.testing.assert_allclose(found, [np.cos(1), 0, np.sin(1), 0], atol=1e-6)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "gemma3_text"}, "holds a gemma3_text, not a gemma2"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads 3"),
        ({"attention_bias": True}, "attention_bias true is not known here"),
        ({"hidden_activation": "swish"}, "hidden_activation 'swish' is not one of"),
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping 0.0 is neither above 0 nor null"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling is .*'factor': 8.0.*: only rope_type 'def"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters is .*yarn.*: only rope_type 'def"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, an option that is not known here"),
        ({"hidden_size": "32"}, "hidden_size is '32', not a whole number"),
    ],
)
def test_refused_configs(tmp_path, folder, values, words):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    rewrite(tmp_path / "config.json", **values)
    with pytest.raises(weights.WeightsError, match=words):
        gemma2.Gemma2Config.read(tmp_path)
