"""LoRA sets: what they touch, what they add, and that diffusers draws our pictures from the files we write."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from configs import tiny
from solrl_jax import config, lora, sampler
from solrl_jax.config import ConfigError, Lora
from solrl_jax.models import flux
from solrl_jax.structs import leaves_by_path
from solrl_jax.weights import WeightsError, lora_files

pytestmark = pytest.mark.usefixtures("strict_dtypes")

CFG = Lora(rank=4, alpha=8.0)
SMALL = {"in_channels": 16, "attention_head_dim": 16, "num_attention_heads": 3, "joint_attention_dim": 24}
SMALL |= {"pooled_projection_dim": 20, "axes_dims_rope": (4, 6, 6), "num_layers": 2, "num_single_layers": 3}
FIRST = "transformer.transformer_blocks.0.attn.to_q"


def inputs(cfg):
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = (2, 6, cfg.in_channels), (2, 3, cfg.joint_attention_dim), (2, cfg.pooled_projection_dim)
    x, text, pooled = (jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))
    table = tuple(map(jnp.asarray, flux.rope_table(cfg, 2, 3, 3)))
    return x, text, pooled, jnp.array([0.9, 0.3]), jnp.ones(2), table


@pytest.fixture(scope="module")
def small():
    """A small FLUX (2 double, 3 single blocks): its base, its velocity, a fresh LoRA and one with B drawn too."""
    cfg = flux.FluxConfig(**SMALL)
    network, given = flux.FluxTransformer(cfg, jnp.float32), inputs(cfg)
    spec, rng = jax.eval_shape(network.init, jax.random.key(0), *given)["params"], np.random.default_rng(0)
    base = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.15, x.shape), jnp.float32), spec)
    fresh = lora.init(jax.random.key(2), base, flux.LORA_TARGETS, CFG)
    velocity = jax.jit(lambda variables: network.apply(variables, *given))
    return SimpleNamespace(base=base, velocity=velocity, fresh=fresh, drawn=drawn(fresh, 0.1))


def drawn(adapter, spread: float):
    """The same set with B ~ N(0, spread^2) in place of 0."""
    rng = np.random.default_rng(5)

    def draw(path, x):
        return jnp.asarray(rng.normal(0, spread, x.shape), jnp.float32) if path[-1].key == "b" else x

    return jax.tree_util.tree_map_with_path(draw, adapter)


# --- what is adapted ------------------------------------------------------------------------------------------------


def test_flux_targets():
    """FLUX.1-dev with Sol-RL's list: 19 x 4 + 38 x 3 modules, 37,355,520 parameters at rank 32."""
    cfg = flux.FluxConfig()
    network = flux.FluxTransformer(cfg)
    base = jax.eval_shape(lambda key: network.init(key, *inputs(cfg))["params"], jax.random.key(0))
    modules = lora.adapted(base, flux.LORA_TARGETS)
    double = [f"transformer_blocks/attn/{name}" for name in ("to_k", "to_out.0", "to_q", "to_v")]
    single = [f"single_transformer_blocks/attn/{name}" for name in ("to_k", "to_q", "to_v")]
    assert sorted(modules) == single + double
    assert sum(shape[0] for shape in modules.values()) == 190
    adapter = jax.eval_shape(lambda key: lora.init(key, base, flux.LORA_TARGETS, Lora(32)), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == 37_355_520
    assert adapter["single_transformer_blocks"]["attn"]["to_v"]["a"].shape == (38, 3072, 32)


@pytest.mark.parametrize(
    ("targets", "hit"),
    [
        (["proj"], ["attn/proj", "cross_attn/proj"]),
        (["attn.proj"], ["attn/proj"]),  # not cross_attn.proj: a dot must precede
        (["proj_out"], ["proj_out"]),
        (["to_out.0"], ["attn/to_out.0"]),
        (["attn.proj", "proj"], ["attn/proj", "cross_attn/proj"]),
    ],
)
def test_suffixes(targets, hit):
    names = ["attn/proj", "attn/to_out.0", "cross_attn/proj", "proj_out", "xproj"]
    base = {}
    for name in names:
        lora.put(base, name, {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)})
    base["conv"] = {"proj": {"kernel": jnp.zeros((3, 3, 2, 2))}, "norm": {"scale": jnp.ones(2)}}  # no Linears
    assert sorted(lora.adapted(base, targets)) == hit


@pytest.mark.parametrize("target", ["to_z", "q", "conv.proj", "norm", "to_q.kernel"])
def test_target_that_hits_nothing(target):
    base = {"to_q": {"kernel": jnp.zeros((2, 3))}, "conv": {"proj": {"kernel": jnp.zeros((3, 3, 2, 2))}}}
    with pytest.raises(ConfigError, match=rf"lora.targets \['{target}'\] name no Linear .* \['proj', 'to_q'\]"):
        lora.init(jax.random.key(0), base, ["to_q", target], CFG)


# --- what it adds ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fresh_set_is_the_base(small):
    leaves = leaves_by_path(small.fresh)
    assert len(leaves) == 14 and {x.dtype for x in leaves.values()} == {np.dtype(np.float32)}
    assert all((x == 0).all() for path, x in leaves.items() if path.endswith("/b"))
    assert leaves["transformer_blocks/attn/to_q/a"].shape == (2, 48, 4)
    assert leaves["transformer_blocks/attn/to_out.0/b"].shape == (2, 4, 48)
    np.testing.assert_array_equal(
        small.velocity(lora.policy(small.base, small.fresh, CFG)), small.velocity({"params": small.base})
    )


@pytest.mark.parametrize("rank", [4, 32])
def test_spread_of_a(rank):
    base = {name: {"kernel": jnp.zeros((2, 500, 8))} for name in ("to_q", "to_k")}
    adapter = lora.init(jax.random.key(0), base, ["to_q", "to_k"], Lora(rank, 64.0))
    first, second = adapter["to_q"]["a"], adapter["to_k"]["a"]
    assert first.shape == (2, 500, rank)
    assert float(first.std()) == pytest.approx(1 / rank, rel=0.05)
    assert abs(float(first.mean())) < 0.05 / rank
    corners = [first[0, 0, 0], first[1, 0, 0], second[0, 0, 0], second[1, 0, 0]]  # layers and modules of their own
    assert len(set(map(float, corners))) == 4


@pytest.mark.slow
def test_merged_kernels(small):
    merged = lora.merged_kernels(small.base, small.drawn, CFG)
    assert len(merged) == 7
    path = "single_transformer_blocks/attn/to_k"
    w, factors = leaves_by_path(small.base)[f"{path}/kernel"], leaves_by_path(small.drawn)
    for layer in range(3):
        expected = w[layer] + 2.0 * np.dot(factors[f"{path}/a"][layer], factors[f"{path}/b"][layer])
        np.testing.assert_allclose(merged[f"{path}/kernel"][layer], expected, atol=1e-6)
    policy = small.velocity(lora.policy(small.base, small.drawn, CFG))
    grafted = small.velocity({"params": lora.graft(small.base, merged)})
    scale = np.abs(policy).max()
    assert np.abs(policy - small.velocity({"params": small.base})).max() > 0.05 * scale
    assert np.abs(policy - grafted).max() < 1e-5 * scale


def test_merged_kernels_keep_the_dtype():
    base = {"to_q": {"kernel": jnp.ones((3, 2), jnp.bfloat16)}}
    adapter = {"to_q": {"a": jnp.full((3, 1), 0.25), "b": jnp.array([[0.01, -0.5]])}}
    (kernel,) = lora.merged_kernels(base, adapter, Lora(1, 2.0)).values()
    assert kernel.dtype == jnp.bfloat16
    # 1.005 lies nearer to 1.0078125 than to 1: added in f32, rounded once
    np.testing.assert_array_equal(kernel, np.tile(np.array([1.0078125, 0.75], jnp.bfloat16), (3, 1)))


def test_graft_shares_the_rest(small):
    merged = lora.merged_kernels(small.base, small.drawn, CFG)
    before, after = leaves_by_path(small.base), leaves_by_path(lora.graft(small.base, merged))
    assert list(before) == list(after)
    assert all(after[path] is merged.get(path, before[path]) for path in before)


def test_gradient(small):
    """Into both factors once B is not zero; at the start into B alone."""

    @jax.jit
    def gradient(adapter):
        return jax.grad(lambda a: jnp.sum(small.velocity(lora.policy(small.base, a, CFG)) ** 2))(adapter)

    size = jax.tree.map(lambda g: float(jnp.abs(g).max()), gradient(small.fresh))
    assert all((g > 0) == path.endswith("/b") for path, g in leaves_by_path(size).items())
    found = leaves_by_path(gradient(small.drawn))
    assert found.keys() == leaves_by_path(small.drawn).keys()
    assert all((jnp.abs(g).max(axis=(1, 2)) > 0).all() for g in found.values())  # in every layer


# --- files ----------------------------------------------------------------------------------------------------------


def test_file_layout(small, tmp_path):
    lora_files.save(tmp_path / "new" / "set.safetensors", small.drawn, flux.KEYS, CFG)
    stored = load_file(tmp_path / "new" / "set.safetensors")
    assert len(stored) == 2 * (2 * 4 + 3 * 3) and {x.dtype for x in stored.values()} == {np.dtype(np.float32)}
    q = small.drawn["transformer_blocks"]["attn"]["to_q"]
    np.testing.assert_array_equal(stored[f"{FIRST}.lora_A.weight"], q["a"][0].T)
    np.testing.assert_array_equal(stored[f"{FIRST}.lora_B.weight"], 2 * q["b"][0].T)  # alpha / r folded
    last = small.drawn["single_transformer_blocks"]["attn"]["to_v"]
    np.testing.assert_array_equal(
        stored["transformer.single_transformer_blocks.2.attn.to_v.lora_A.weight"], last["a"][2].T
    )
    assert stored["transformer.transformer_blocks.1.attn.to_out.0.lora_B.weight"].shape == (48, 4)
    with safe_open(tmp_path / "new" / "set.safetensors", "numpy") as f:
        metadata = f.metadata()
    assert metadata["format"] == "pt" and json.loads(metadata["solrl_jax"]) == {"rank": 4, "alpha": 8.0, "folded": True}


@pytest.mark.parametrize("alpha", [8.0, 3.0])
def test_round_trip(small, tmp_path, alpha):
    cfg, file = Lora(4, alpha), tmp_path / "pytorch_lora_weights.safetensors"
    lora_files.save(file, small.drawn, flux.KEYS, cfg)
    for place in (file, tmp_path):  # a file, or the folder that holds it
        again = lora_files.load(place, small.base, flux.KEYS, cfg).adapter
        assert jax.tree.structure(again) == jax.tree.structure(small.drawn)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-7), again, small.drawn)
    other = lora_files.load(file, small.base, flux.KEYS, Lora(4, 2 * alpha)).adapter  # the same policy at another alpha
    one, two = (lora.scaled(x, c) for x, c in ((again, cfg), (other, Lora(4, 2 * alpha))))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-7), one, two)


def test_half_precision_file(small, tmp_path):
    file = tmp_path / "set.safetensors"
    lora_files.save(file, small.drawn, flux.KEYS, CFG)
    save_file({key: x.astype(jnp.bfloat16) for key, x in load_file(file).items()}, file)
    found = lora_files.load(file, small.base, flux.KEYS, CFG).adapter
    assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-8), found, small.drawn)


def test_scale_in_the_metadata(small, tmp_path):
    """diffusers' own files need not fold: lora_alpha 12 over r 4 says that B counts three times."""
    file = tmp_path / "set.safetensors"
    lora_files.save(file, small.drawn, flux.KEYS, CFG)
    stated = {"transformer.r": 4, "transformer.lora_alpha": 12, "transformer.target_modules": ["to_q"]}
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": json.dumps(stated)})
    found = lora_files.load(file, small.base, flux.KEYS, CFG).adapter
    path = "transformer_blocks/attn/to_q/"
    before, after = leaves_by_path(small.drawn), leaves_by_path(found)
    np.testing.assert_array_equal(after[path + "a"], before[path + "a"])
    np.testing.assert_allclose(after[path + "b"], 3 * before[path + "b"], rtol=2e-7)
    stated["transformer.use_rslora"] = True  # 12 over the root of 4
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": json.dumps(stated)})
    after = leaves_by_path(lora_files.load(file, small.base, flux.KEYS, CFG).adapter)
    np.testing.assert_allclose(after[path + "b"], 6 * before[path + "b"], rtol=2e-7)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("{", r"is not a JSON object \(Expecting"),
        ("[]", "is not a JSON object"),
        ("3", "is not a JSON object"),
        ('{"r": 4, "lora_alpha": null}', "says lora_alpha None, not a number"),
        ('{"r": 4, "lora_alpha": "x"}', "says lora_alpha 'x', not a number"),
        ('{"r": 4, "lora_alpha": NaN}', "says lora_alpha nan, not a number"),
        ('{"r": 4, "lora_alpha": [8]}', r"says lora_alpha \[8\], not a number"),
    ],
)
def test_metadata_that_cannot_be_read(small, tmp_path, metadata, words):
    file = tmp_path / "set.safetensors"
    lora_files.save(file, small.drawn, flux.KEYS, CFG)
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(WeightsError, match=rf"^{file}: its lora_adapter_metadata {words}.*export it again$"):
        lora_files.load(file, small.base, flux.KEYS, CFG)


def broken(name: str, tensors: dict) -> dict:
    key = f"{FIRST}.lora_A.weight"
    rest = {k: v for k, v in tensors.items() if k != key}
    return {
        "missing": rest,
        "unused": tensors | {f"{FIRST.replace('to_q', 'to_quux')}.lora_A.weight": tensors[key]},
        "shape": rest | {key: np.zeros((4, 47), np.float32)},
        "foreign": {k.replace("transformer.", "unet."): v for k, v in tensors.items()},
    }[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", f"missing {FIRST}.lora_A.weight"),
        ("unused", f"unused {FIRST.replace('to_q', 'to_quux')}.lora_A.weight"),
        ("shape", rf"{FIRST}.lora_A.weight has shape \(4, 47\), not \(4, 48\)"),
        ("foreign", r"transformer\.\*(.|\n)*unused unet.single_transformer_blocks(.|\n)*and 26 more"),
    ],
)
def test_refused_files(small, tmp_path, name, words):
    file = tmp_path / "set.safetensors"
    lora_files.save(file, small.drawn, flux.KEYS, CFG)
    save_file(broken(name, load_file(file)), file)
    with pytest.raises(WeightsError, match=words) as e:
        lora_files.load(file, small.base, flux.KEYS, CFG)
    assert str(file) in str(e.value)


def test_a_file_says_its_rank_and_modules(small, tmp_path):
    """Any trained LoRA file is taken, whatever this run's config would train."""
    file = tmp_path / "set.safetensors"
    other = drawn(lora.init(jax.random.key(0), small.base, ("to_k", "proj_mlp", "ff.net.2"), Lora(8)), 0.1)
    lora_files.save(file, other, flux.KEYS, Lora(8, 16.0))
    found = lora_files.load(file, small.base, flux.KEYS, CFG).adapter
    assert leaves_by_path(found).keys() == leaves_by_path(other).keys()
    one, two = lora.merged_kernels(small.base, found, CFG), lora.merged_kernels(small.base, other, Lora(8, 16.0))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), one, two)
    tensors = load_file(file)
    a, b = (f"{FIRST.replace('to_q', 'to_k')}.lora_{x}.weight" for x in "AB")
    save_file({**tensors, a: tensors[a][:4].copy(), b: tensors[b][:, :4].copy()}, file)  # layers of ranks 4 and 8
    mixed = lora_files.load(file, small.base, flux.KEYS, CFG).adapter["transformer_blocks"]["attn"]["to_k"]
    assert mixed["a"].shape == (2, 48, 8) and not mixed["a"][0, :, 4:].any() and not mixed["b"][0, 4:].any()
    jax.tree.map(np.testing.assert_array_equal, mixed["a"][1], found["transformer_blocks"]["attn"]["to_k"]["a"][1])
    np.testing.assert_allclose(mixed["a"][0] @ mixed["b"][0] * 2, (tensors[b][:, :4] @ tensors[a][:4]).T, atol=1e-6)
    save_file({}, file)
    with pytest.raises(WeightsError, match="it is empty"):
        lora_files.load(file, small.base, flux.KEYS, CFG)


def test_files_that_are_none(small, tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with pytest.raises(WeightsError, match=r"pytorch_lora_weights.safetensors does not exist"):
        lora_files.load(file, small.base, flux.KEYS, CFG)
    lora_files.save(file, small.drawn, flux.KEYS, CFG)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"pytorch_lora_weights.safetensors is not a complete safetensors file"):
        lora_files.load(tmp_path, small.base, flux.KEYS, CFG)


# --- diffusers ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_diffusers_draws_our_pictures(tmp_path):
    """The committed small world in f32, four Euler steps: our policy, and the file of it at scale 1 in diffusers."""
    cfg = config.Model(path=str(tiny.WORLD / "pipeline"), size=32, text_tokens=24, dtype="float32", remat=False)
    model, (base, decoder, _) = flux.make(cfg), flux.load(cfg)
    prompts = (tiny.WORLD / "prompts" / "test.txt").read_text().splitlines()[:2]
    x1 = jax.vmap(model.noise)(jax.random.split(jax.random.key(3), 2))
    adapter = drawn(lora.init(jax.random.key(0), base, model.lora_targets, CFG), 0.1)

    @jax.jit
    def ours(variables):
        velocity = lambda x, sigma: model.velocity(variables, x, sigma, cond)  # noqa: E731
        return model.decode(decoder, sampler.sample(velocity, x1, sampler.table(model.sigmas(4), "euler")))

    pipe = FluxPipeline.from_pretrained(cfg.path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        states, pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=24)
    cond = {"text": jnp.asarray(states.numpy()), "pooled": jnp.asarray(pooled.numpy())}
    noise = FluxPipeline._pack_latents(torch.tensor(np.asarray(x1)).permute(0, 3, 1, 2), 2, 8, 8, 8)

    def theirs():
        how = {"height": 32, "width": 32, "guidance_scale": 1.0, "max_sequence_length": 24}
        return pipe(prompts, latents=noise, num_inference_steps=4, output_type="np", **how).images

    before = theirs()
    lora_files.save(tmp_path / "set.safetensors", adapter, model.keys, CFG)
    pipe.load_lora_weights(tmp_path / "set.safetensors")
    after = theirs()
    assert np.abs(before - after).max() > 10 / 255
    assert np.abs(np.asarray(ours(lora.policy(base, adapter, CFG))) - after).max() < 1e-4
