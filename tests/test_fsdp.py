"""Frozen weights over several devices (sharding.py): where they lie, and that all numbers are those of whole ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.faults import run as faults
from solrl_jax import config, guidance, iteration, quant, recipes, sharding, train
from solrl_jax.config import Stage
from solrl_jax.quant import calibrate
from solrl_jax.run import assemble, checkpoint, evaluate
from solrl_jax.structs import QuantRule, leaves_by_path
from tests import nano, nano_flux2, nano_sana, nano_sd35, nano_zimage
from tests.nano import begun, numbers, parts_of, statics_of
from tests.tiers import long, slow

MODELS = {"flux": nano, "flux2": nano_flux2, "sd35": nano_sd35, "sana": nano_sana, "zimage": nano_zimage}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nano")


@functools.cache
def stages_of(cfg, precision: str, devices: int = 4) -> dict:
    """What each stage of an iteration makes, as on a device that explores in this precision."""
    parts = parts_of(cfg, devices)
    parts = parts._replace(cfg=dataclasses.replace(cfg, explore=dataclasses.replace(cfg.explore, precision=precision)))
    run = iteration.stages(*statics_of(parts))
    with jax.set_mesh(parts.mesh):
        if guidance.trains_doubled(parts.cfg, parts.model):
            parts = parts._replace(frozen=parts.frozen._replace(negative=parts.text.negative()))
        state, prompts, keys = begun(parts)
        keys = sharding.split(keys, parts.mesh)
        state = state._replace(old=jax.tree.map(lambda x: x + 0.05, state.old))  # B = 0 would merge nothing
        kernels = jax.jit(run.merged)(state, parts.frozen)
        low = jax.jit(run.quantised)(kernels, parts.frozen)
        preview = jax.jit(run.explore)(kernels, low, parts.frozen, prompts, keys)
        full = jax.jit(run.regenerate)(kernels, None, parts.frozen, prompts, keys[:, :4])
        new, metrics = jax.jit(run.learn)(state, parts.frozen, prompts.cond, full)
    made = {"text": prompts.cond, "base": parts.frozen.base, "merged": kernels, "quantised": low}
    return {**made, "preview": preview, "samples": full, "learnt": new, "metrics": metrics}


def bits(tree) -> list[np.ndarray]:
    """Every array as unsigned integers."""

    def leaf(x) -> np.ndarray:
        x = np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        return x.reshape(-1).view(f"u{x.dtype.itemsize}")

    return [leaf(x) for x in jax.tree.leaves(tree)]


def bytes_of(tree) -> int:
    """On the first device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("model", "precision", "dtype", "shard"),
    [
        slow("flux", "nvfp4_native", "float32", 4),
        long("flux", "nvfp4_emulated", "bfloat16", 4),
        long("sd35", "fp8", "float32", 2),
        long("sana", "nvfp4_emulated", "float32", 2),
        long("flux2", "fp8", "float32", 2),
        long("zimage", "nvfp4_emulated", "float32", 4),
    ],
)
def test_all_stages_give_the_same_bits(folder, model, precision, dtype, shard):
    """On 4 devices, weights over 2 or all of them: codes, latents, rewards, the gradient's norm and the new LoRA. In
    bfloat16 the codes alone; samples differ by rounding."""
    cfg = MODELS[model].build(folder / model)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dtype=dtype))
    whole, parts = (stages_of(dataclasses.replace(cfg, shard=k), precision) for k in (1, shard))
    # XLA's CPU backend does not round a bf16 row before its product; a row that is exchanged is rounded.
    exact = [name for name in whole if dtype == "float32" or name in ("text", "base", "merged", "quantised")]
    apart = np.asarray(whole["samples"].x0) - np.asarray(parts["samples"].x0)
    assert np.sqrt(np.mean(apart**2) / np.mean(np.asarray(whole["samples"].x0) ** 2)) <= 1e-2 * (dtype == "bfloat16")
    for name in exact:
        for path, a, b in zip(leaves_by_path(whole[name]), bits(whole[name]), bits(parts[name]), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{name} {path}")
    for name in ("base", "merged", "quantised"):
        leaves = leaves_by_path({"base": whole[name]} if name == "base" else whole[name])
        cut = {p: x for p, x in leaves.items() if sharding.FSDP in sharding.spec(p, x.ndim)}
        expect = sum(x.nbytes // (shard if p in cut else 1) for p, x in leaves.items())
        assert bytes_of(parts[name]) == expect and bytes_of(whole[name]) == sum(x.nbytes for x in leaves.values())
        assert sum(x.nbytes for x in cut.values()) > 0.3 * bytes_of(whole[name]), name
    assert float(parts["metrics"]["grad_norm"]) > 1e-3


def test_where_leaves_lie():
    """Kernels of stacks by input, modulations by output, codes [L, out, in] by output; everything else whole."""
    made = jax.eval_shape(lambda w: quant.quantise(w, "nvfp4_emulated"), jax.ShapeDtypeStruct((3, 32, 64), jnp.float32))
    tree = {
        "blocks": {
            "attn": {"to_q": {"kernel": jnp.zeros((3, 8, 8)), "bias": jnp.zeros((3, 8)), "a": jnp.zeros((3, 8, 2))}},
            "norm1_context": {"linear": {"kernel": jnp.zeros((3, 8, 48))}},
            "conv": {"kernel": jnp.zeros((3, 3, 3, 1, 8))},
        },
        "norm_out": {"linear": {"kernel": jnp.zeros((8, 16))}},
        "low": {"kernel": made},
    }
    found = leaves_by_path(sharding.specs_of(tree))
    by_input, by_output = P(None, "fsdp"), P(None, None, "fsdp")
    parts = {"blocks/attn/to_q/kernel": by_input, "blocks/norm1_context/linear/kernel": by_output}
    parts |= {"low/kernel/codes": by_input, "low/kernel/scales": by_input}  # axis 1 of these is "out"
    assert {path: where for path, where in found.items() if where != P()} == parts
    cut = sharding.cuts(tree).values()
    assert sorted(cut) == [8, 48, 64, 64] and sharding.shards_that_fit(cut, 8) == [1, 2, 4, 8]
    assert sharding.shards_that_fit(cut, 6) == [1, 2]


def product_of(x, w, where, devices: int = 4):
    """(x W of a device's rows and its parts of W, the collectives of its program)"""
    mesh = sharding.make_mesh(devices, devices)
    with jax.set_mesh(mesh):
        given = sharding.split(x, mesh), jax.device_put(w, NamedSharding(mesh, where))
        run = sharding.over_data(
            lambda x, w: sharding.at_use(lambda parts, w: parts[0] @ w, (x,), w, (64, 96)),
            (sharding.SPLIT, where),
            sharding.SPLIT,
        )
        eqns = str(jax.make_jaxpr(run)(*given))
        return np.asarray(jax.jit(run)(*given)), {name for name in ("all_gather", "all_to_all") if name in eqns}


@pytest.mark.parametrize(("rows", "exchanges"), [(1, True), (50, False)])
def test_few_rows_go_to_the_weights(rows, exchanges):
    """x W of 64 inputs and 96 outputs on 4 devices: 4 rows (160 numbers each) are fewer than W, 200 are more."""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((4 * rows, 64), (64, 96)))
    by_output = product_of(x, w, P(None, sharding.FSDP))
    by_input = product_of(x, w, P(sharding.FSDP))
    assert by_output[1] == ({"all_gather", "all_to_all"} if exchanges else {"all_gather"})
    assert by_input[1] == {"all_gather"}
    for found, _ in (by_output, by_input):
        np.testing.assert_allclose(found, x @ w, rtol=0, atol=2e-5)


def test_a_part_of_another_kernel_is_refused():
    with jax.set_mesh(sharding.make_mesh(4, 2)):
        assert [sharding.cut_axis(held, (8, 6)) for held in ((8, 6), (4, 6), (8, 3))] == [None, 0, 1]
        with pytest.raises(ValueError, match=r"shape \(2, 6\) where the network needs \(8, 6\), or a part .*2 devices"):
            sharding.cut_axis((2, 6), (8, 6))


def test_shards_that_do_not_divide_are_refused(folder):
    with pytest.raises(config.ConfigError, match=r"shard=3 does not divide 4 devices: use one of \[1, 2, 4\]"):
        assemble.make_mesh(4, 3)
    with pytest.raises(config.ConfigError, match=r"shard=-1: "):
        config.override(nano.build(folder), shard="-1")


@pytest.mark.slow
def test_units_of_inputs_are_the_same(folder):
    """FP8's calibration, with the base in parts."""
    found = []
    for shard in (1, 4):
        parts = parts_of(nano.build(folder, shard=shard), 4)
        with jax.set_mesh(parts.mesh):
            _, prompts, keys = begun(parts)
            cond = sharding.replicate(jax.device_get(prompts.cond), parts.mesh)
            model = parts.model._replace(quant_rules=parts.model.quant_rules._replace(fp8=QuantRule((), 0)))
            given = {"params": parts.frozen.base}, cond, keys[0, 0]
            found.append(calibrate.calibrated(model, *given, [Stage(steps=2, precision="fp8")]).quant_rules.fp8.units)
    assert found[0] == found[1] and len(dict(found[0])) > 10


@pytest.mark.long
def test_a_run_goes_on_with_weights_in_parts_and_back(folder, tmp_path):
    """Iterations 1 and 4 of 4 with whole weights, 2 and 3 with weights over two devices: all that an unbroken run has,
    to the bit, evaluations and measured previews too; and a sample's pictures."""
    watch = config.Watch(every=2, prompts=2)
    cfg = nano.build(folder, evaluate=config.Evaluate(every=1, prompts=4, steps=2, grid=2, chunk=4), watch=watch)
    train.train(config.override(cfg, iterations=4), tmp_path / "whole", devices=2)
    for iterations, shard in ((1, 1), (3, 2), (4, 1)):
        then = config.override(cfg, iterations=iterations, shard=shard)
        train.train(then, tmp_path / "parts", resume=iterations > 1, devices=2)
    assert faults.same(tmp_path / "parts", tmp_path / "whole")
    files, place = [], checkpoint.folder(tmp_path / "whole", 4)
    for shard in (1, 2):
        out, some = tmp_path / f"shard{shard}", config.override(cfg, shard=shard)
        evaluate.run_sample(some, out, prompts=nano.PROMPTS[:2], place=place, lora_file=None, devices=2)
        files.append([file.read_bytes() for file in sorted(out.rglob("*.png"))])
    assert files[0] == files[1] and len(files[0]) > 1


@pytest.mark.parametrize("name", [slow("branch"), slow("vgrpo"), long("naive_quant"), long("flow_grpo")])
def test_families_and_methods(folder, name):
    """A step of it, traced with weights over two devices: no kernel is used without its other part."""
    cfg = dataclasses.replace(recipes.family(nano.build(folder), name), shard=2)
    parts = parts_of(cfg, 2)
    with jax.set_mesh(parts.mesh):
        state, prompts, _ = begun(parts)
        step = functools.partial(iteration.iteration_step, **dict(zip(nano.STATICS, statics_of(parts), strict=True)))
        new, metrics = jax.eval_shape(step, state, parts.frozen, prompts)
    assert jax.tree.structure(new) == jax.tree.structure(state) and "loss" in metrics


@pytest.mark.parametrize("target", [slow("norm1.linear"), long("timestep_embedder.linear_1")])
def test_the_gradient_of_an_adapted_modulation(folder, target):
    """A LoRA where results are exchanged, or before: its gradient goes through all devices' rows."""
    found = []
    for shard in (1, 2):
        cfg = nano.build(folder, lora=config.Lora(rank=4, alpha=8.0, targets=(target,)), shard=shard)
        parts = parts_of(cfg, 2)
        run = iteration.stages(*statics_of(parts))
        with jax.set_mesh(parts.mesh):
            state, prompts, keys = begun(parts)
            keys = sharding.split(keys, parts.mesh)
            full = jax.jit(run.regenerate)(jax.jit(run.merged)(state, parts.frozen), None, parts.frozen, prompts, keys)
            full = jax.tree.map(lambda x: x[:, :4], full)
            found.append(jax.jit(run.learn)(state, parts.frozen, prompts.cond, full)[0])
    one, other = (numbers(new.moments) for new in found)
    assert np.abs(one).max() > 0
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * np.abs(one).max())
