"""LoRA files of SANA: fused adapters in diffusers' names and back; that diffusers draws our pictures from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from safetensors.numpy import load_file, save_file

from solrl_jax import lora, sampler
from solrl_jax.config import Lora, Model
from solrl_jax.models import public, sana
from solrl_jax.models.sana import SanaConfig
from solrl_jax.structs import leaves_by_path
from solrl_jax.weights import WeightsError, hub, lora_files
from tests import nano_sana
from tests.test_comfy import made, same
from tests.test_lora import drawn
from tests.test_sana import HOW, shapes_of, steps_of

CFG = Lora(rank=4, alpha=8.0)
ALL = (*sana.LORA_TARGETS, "inverted_conv.linear", "point_conv.linear", "t_block", "y_proj.fc1", "linear_1")
BASE = shapes_of(SanaConfig(**nano_sana.TRANSFORMER))


def at(name: str, i: int = 1) -> str:
    return f"transformer.transformer_blocks.{i}.{name}"


def test_targets(tmp_path):
    """100 modules, 18,636,800 parameters at rank 32."""
    path = str(hub.write_configs(tmp_path, next(iter(public.SANA.values()))))
    model = sana.make(Model(name="sana", path=path, size=1024))
    base = jax.eval_shape(model.init, jax.random.key(0))
    found = lora.adapted(base, model.lora_targets)
    assert sum(shape[0] for shape in found.values()) == 100 and len(found) == 5
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), base, model.lora_targets, Lora(32)))
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == 18_636_800


def test_a_fused_adapter_in_its_parts(tmp_path):
    """q, k and v have the same A, and a third of B's rows each."""
    adapter, file = made(BASE, sana.LORA_TARGETS), tmp_path / "x.safetensors"
    lora_files.save(file, adapter, sana.KEYS, CFG)
    stored = load_file(file)
    assert len(stored) == 2 * 3 * (3 + 1 + 1 + 2 + 1)
    factors = {name: adapter["blocks"][name[0]][name[1]] for name in (("attn", "qkv"), ("cross_attn", "kv_linear"))}
    for (module, parts), pair in zip((("attn1", "qkv"), ("attn2", "kv")), factors.values(), strict=True):
        for i, x in enumerate(parts):
            np.testing.assert_array_equal(stored[at(f"{module}.to_{x}.lora_A.weight")], pair["a"][1].T)
            rows = 2 * pair["b"][1].T[48 * i : 48 * (i + 1)]
            np.testing.assert_allclose(stored[at(f"{module}.to_{x}.lora_B.weight")], rows, rtol=1e-6)
    found = lora_files.load(file, BASE, sana.KEYS, CFG).adapter
    same(found, adapter, rtol=2e-7)
    assert {x.shape[-2] for p, x in leaves_by_path(found).items() if p[-1] == "b"} == {4}


def test_every_linear_there_and_back(tmp_path):
    """Those that are 1x1 convolutions in diffusers have factors of its shape."""
    adapter, file = made(BASE, ALL), tmp_path / "x.safetensors"
    lora_files.save(file, adapter, sana.KEYS, CFG)
    stored = load_file(file)
    assert stored[at("ff.conv_inverted.lora_A.weight")].shape == (4, 48, 1, 1)
    assert stored[at("ff.conv_point.lora_B.weight")].shape == (48, 4, 1, 1)
    same(lora_files.load(file, BASE, sana.KEYS, CFG).adapter, adapter, rtol=2e-7)


def test_another_trainers_file(tmp_path):
    """Of its own A for each of q and v, none for k: the policy is the sum of theirs, at rank 2 + 3."""
    rng, tensors = np.random.default_rng(0), {}
    for i in range(3):
        for name, rank in (("to_q", 2), ("to_v", 3)):
            for part, shape in (("A", (rank, 48)), ("B", (48, rank))):
                tensors[at(f"attn1.{name}.lora_{part}.weight", i)] = rng.normal(size=shape).astype(np.float32)
    save_file(tensors, tmp_path / "x.safetensors")
    found = lora_files.load(tmp_path / "x.safetensors", BASE, sana.KEYS, CFG).adapter
    pair = lora.scaled(found, CFG)["blocks"]["attn"]["qkv"]
    assert pair["a"].shape == (3, 48, 5) and pair["b"].shape == (3, 5, 144)
    for i in range(3):
        wanted = [
            tensors[at(f"attn1.to_{x}.lora_B.weight", i)] @ tensors[at(f"attn1.to_{x}.lora_A.weight", i)] for x in "qv"
        ]
        rows = np.concatenate([wanted[0], np.zeros((48, 48), np.float32), wanted[1]])
        np.testing.assert_allclose((pair["a"][i] @ pair["b"][i]).T, rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(at("attn1.to_k.lora_B.weight")), "missing " + at("attn1.to_k.lora_B.weight")),
        (
            lambda t: t.update({at("attn1.to_k.lora_A.weight", 3): np.zeros((4, 48), np.float32)}),
            "unused " + at("attn1.to_k.lora_A.weight", 3),
        ),
        (lambda t: t.update({at("attn1.to_x.lora_A.weight"): np.zeros((4, 48))}), "unused " + at("attn1.to_x")),
        (
            lambda t: t.update({at("attn1.to_k.lora_B.weight"): np.zeros((144, 4), np.float32)}),
            r"to_k.lora_B.weight has shape \(144, 4\), not \(48, 4\)",
        ),
        (
            lambda t: t.update({f"lora_unet_{i}.alpha": t.pop(k) for i, k in enumerate(list(t))}),
            "is not a LoRA of this model",
        ),
        (
            lambda t: t.update({k.replace("transformer_blocks", "single_blocks"): t.pop(k) for k in list(t)}),
            "unused transformer.single_blocks",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, words):
    adapter, file = made(BASE, sana.LORA_TARGETS), tmp_path / "x.safetensors"
    lora_files.save(file, adapter, sana.KEYS, CFG)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=words):
        lora_files.load(file, BASE, sana.KEYS, CFG)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("targets", [sana.LORA_TARGETS, ALL])
def test_diffusers_draws_our_pictures(tmp_path, targets):
    """Three Euler steps in f32: our policy, and the file of it at scale 1 in diffusers."""
    cfg = nano_sana.model(nano_sana.write(tmp_path / "sana"))
    model, (base, decoder, encoders) = sana.make(cfg), sana.load(cfg)
    x1 = jax.vmap(model.noise)(jax.random.split(jax.random.key(3), 2))
    adapter = drawn(lora.init(jax.random.key(0), base, targets, CFG), 0.1)
    prompts = ["a red circle", "a blue one"]
    cond = jax.jit(model.encode)(encoders, jax.tree.map(jnp.asarray, model.tokenize(prompts)))

    @jax.jit
    def ours(variables):
        once = model.prepare(variables, cond)
        velocity = lambda x, sigma: model.velocity(variables, x, sigma, once)  # noqa: E731
        return model.decode(decoder, sampler.sample(velocity, x1, sampler.table(model.sigmas(3), "euler")))

    pipe = SanaPipeline.from_pretrained(cfg.path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    how = {"latents": torch.tensor(np.asarray(x1)).permute(0, 3, 1, 2), **HOW, **steps_of(pipe, 3)}
    before = pipe(prompts, output_type="np", **how).images
    lora_files.save(tmp_path / "set.safetensors", adapter, model.keys, CFG)
    pipe.load_lora_weights(tmp_path / "set.safetensors")
    after = pipe(prompts, output_type="np", **how).images
    assert np.abs(before - after).max() > 10 / 255
    assert np.abs(np.asarray(ours(lora.policy(base, adapter, CFG))) - after).max() < 1e-4
