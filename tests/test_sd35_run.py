"""Runs of SD3.5: a plan from shapes alone, converted weights, an iteration in two low precisions, pictures."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from safetensors.numpy import load_file

from solrl_jax import config, lora, main, plan, quant, recipes, sharding, train
from solrl_jax.config import ConfigError, Evaluate, Lora, Stage
from solrl_jax.models import sd35
from solrl_jax.plan import shapes
from solrl_jax.quant.calibrate import calibrated
from solrl_jax.run import assemble, convert, evaluate
from solrl_jax.weights import WeightsError, hub
from tests import nano, nano_sd35

REWARDS = ("imagereward", "pickscore", "clipscore", "hpsv2")


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    nano_sd35.build(folder)
    return folder


# --- the config -----------------------------------------------------------------------------------------------------


def test_sd35_is_the_published_run():
    cfg = config.load("sd35:sol_rl")
    assert (cfg.model.path, cfg.model.size, cfg.model.text_tokens) == (
        "stabilityai/stable-diffusion-3.5-large",
        1024,
        128,
    )
    assert (cfg.model.min_dim, cfg.model.remat, cfg.seed, cfg.selection) == (2432, True, 42, "best_worst")
    assert (cfg.prompts, cfg.candidates, cfg.kept, cfg.times) == (48, 96, 24, 6)
    assert cfg.explore == Stage(6, "dpm2", "auto", 24) and cfg.regenerate == Stage(10, "dpm2", "bf16", 24)
    assert (cfg.lora.rank, cfg.lora.alpha, cfg.lora.targets) == (32, 64.0, ())
    assert (cfg.learn.timestep_fraction, cfg.learn.clip_norm, cfg.learn.learning_rate) == (0.6, 0.002, 3e-4)
    assert (cfg.learn.kl_weight, cfg.learn.ema_max, cfg.learn.strength, cfg.learn.updates) == (1e-4, 0.9, 1.0, 1)
    assert (cfg.evaluate.steps, cfg.evaluate.solver, cfg.reward) == (40, "dpm2", "imagereward")
    assert sd35.NVFP4_SKIP == ("pos_embed", "context_embedder", "time_text_embed", "norm_out", "norm1", "ff_context")


def test_recipes_have_the_names_of_the_original():
    names = [f"{f}_{r}" for f in recipes.NAMES for r in REWARDS]
    made = {recipe: config.load(f"sd35:{recipe}") for recipe in names}
    assert made["sol_rl_imagereward"] == config.load("sd35:sol_rl")
    for recipe, cfg in made.items():
        assert cfg == config.load(f"sd35:sd3_{recipe}") and recipe.endswith(f"_{cfg.reward}")
        medium = config.load(f"sd35:medium_{recipe}")
        assert {*config.differences(cfg, medium)} == {"model.path", "model.min_quantised_flops"}
        assert medium.model.path == "stabilityai/stable-diffusion-3.5-medium"
    assert config.load("sd35:medium") == config.load("sd35:medium_branch_imagereward")
    lines = recipes.help_lines("sd35")
    assert [line.split()[0] for line in lines if line[:2] == "  " and line[2] != " "] == [
        *names,
        *(f"medium_{name}" for name in names),
    ]
    for wrong in ("mediun", "medium_", "mediumsol_rl", "large"):
        with pytest.raises(ConfigError, match="no such recipe"):
            config.load(f"sd35:{wrong}") if wrong != "medium_" else config.load("sd35:medium_sol")


# --- the plan -------------------------------------------------------------------------------------------------------


def command(*words):
    with flagsaver.flagsaver():
        return main.main(main.parse(["solrl_jax", *words]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "lines"),
    [
        (
            "sd35",
            [
                "stabilityai/stable-diffusion-3.5-large with its public sizes",
                "transformer: 8,146,280,768 parameters, 16.3 GB",
                "LoRA: 47,161,344 parameters, 0.19 GB",
                "text encoders: 5,580,620,800 parameters, 11.2 GB",
                "TFLOP an image: forward 30.02, decode 8.935",
            ],
        ),
        pytest.param(
            "sd35:medium",
            [
                "stabilityai/stable-diffusion-3.5-medium with its public sizes",
                "transformer: 2,469,663,936 parameters, 4.9 GB",
                "LoRA: 18,776,064 parameters, 0.075 GB",
                "TFLOP an image: forward 10.91, decode 8.935",
            ],
        ),
    ],
)
def test_plan_from_public_sizes(capsys, monkeypatch, recipe, lines):
    """Nothing is placed, nothing read: parameters and TFLOP by the public configs."""
    monkeypatch.setattr(jax, "device_put", None)
    assert command("--mode=plan", f"--config={recipe}") == 0
    out = capsys.readouterr().out
    assert all(line in out for line in lines), out
    assert [line.split()[0] for line in out.splitlines() if " fits " in line] == [
        *("encode", "quantise", "explore", "regenerate", "learn", "watch", "evaluate")
    ]


@pytest.mark.slow
def test_flops_of_a_forward_pass(tmp_path):
    """30.0287 TFLOP, of which the last block's queries of the text are spared, .009."""
    path = str(hub.write_configs(tmp_path, next(iter(sd35.PUBLIC.values()))))
    cfg = config.load("sd35", {"model.path": path, "reward": "clipscore"})
    found = plan.per_image_flops(shapes.read(cfg, 1))["forward"].total()
    spared = 4 * 205 * (4096 + 205) * 2432
    assert found + spared == pytest.approx(30.0287e12, rel=1e-5)


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_converted_weights(public, tmp_path):
    cfg = nano_sd35.build(public)
    out = tmp_path / "converted"
    convert.convert(assemble.model_module(cfg), cfg.model, out)
    mesh = sharding.make_mesh(1)
    read = assemble.open_weights(cfg, mesh)
    again = assemble.open_weights(config.override(cfg, **{"model.path": out}), mesh)
    assert jax.tree.structure(read) == jax.tree.structure(again)
    for one, two in zip(jax.tree.leaves(read), jax.tree.leaves(again), strict=True):
        assert (one.dtype, np.asarray(one).tobytes()) == (two.dtype, np.asarray(two).tobytes())
    assert set(read[2]) == {"clip", "clip_g", "t5"}
    made = sd35.make(dataclasses.replace(cfg.model, path=str(out)))
    jax.tree.map(np.testing.assert_array_equal, made.tokenize(["a"]), sd35.make(cfg.model).tokenize(["a"]))


def test_anothers_folder_is_told(public, tmp_path):
    cfg = nano.build(tmp_path)
    with pytest.raises(WeightsError, match=r"holds a StableDiffusion3Pipeline, not a FluxPipeline: use --config=sd35"):
        assemble.assemble(config.override(cfg, **{"model.path": public / "sd35"}), 1)


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(public):
    """One iteration, exploring in emulated NVFP4."""
    cfg = nano_sd35.build(public, iterations=1, evaluate=Evaluate(every=0))
    train.train(cfg, public / "run", devices=1)
    return public / "run"


@pytest.mark.slow
def test_an_iteration(run):
    """All but the last block's factors of the text's queries move; both layouts and the report are there."""
    for name in (
        "report.html",
        "current/pytorch_lora_weights.safetensors",
        "comfyui/nano-sd35.safetensors",
        "model_card.md",
    ):
        assert (run / name).stat().st_size > 0, name
    tensors = load_file(run / "pytorch_lora_weights.safetensors")
    assert len(tensors) == 2 * (5 * 8 - 1)
    still = {key for key, x in tensors.items() if not np.any(x)}
    assert still == {"transformer.transformer_blocks.4.attn.add_q_proj.lora_B.weight"}
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(line["grad_norm"]) and line["grad_norm"] > 0 and "rank/spearman" in line


@pytest.mark.slow
def test_pictures_of_the_run(run, public, tmp_path):
    """The run's file in either layout draws the same pictures, of 2 prompts."""
    cfg = nano_sd35.build(public, evaluate=Evaluate(every=0, prompts=2, steps=2, grid=1, chunk=2))
    for name, file in {"theirs": run, "comfy": run / "comfyui/nano-sd35.safetensors"}.items():
        evaluate.run_sample(cfg, tmp_path / name, prompts=nano.PROMPTS[:2], place=None, lora_file=file, devices=1)
    one, two = (sorted((tmp_path / name / "samples").iterdir()) for name in ("theirs", "comfy"))
    assert [f.name for f in one] == [f.name for f in two] == ["0000_0.png", "0001_0.png"]
    assert [f.read_bytes() for f in one] == [f.read_bytes() for f in two] and len({f.read_bytes() for f in one}) == 2


@pytest.mark.slow
def test_a_card_with_fp8(public, tmp_path, monkeypatch):
    """auto is FP8 there, with units for all that its rule takes: attention, both MLPs, no modulation."""
    monkeypatch.setattr(assemble, "capability", lambda: 9.0)
    seen = []
    monkeypatch.setattr(train, "calibrated", lambda *given: seen.append(calibrated(*given)) or seen[-1])
    low = Stage(steps=2, precision="auto", chunk=4)
    cfg = nano_sd35.build(public, iterations=1, evaluate=Evaluate(every=0), explore=low)
    train.train(cfg, tmp_path / "run", devices=1)
    assert json.loads((tmp_path / "run/config.json").read_text())["explore"]["precision"] == "fp8"
    (model,) = seen
    spec = jax.eval_shape(model.init, jax.random.key(0))
    chosen = {path.removesuffix("/kernel") for path in quant.chosen(spec, model.quant_rules.fp8)}
    units = dict(model.quant_rules.fp8.units)
    assert chosen <= units.keys() and all(np.log2(unit) % 1 == 0 for unit in units.values())
    tails = {path.split("/", 1)[1] for path in chosen if path.startswith("transformer_blocks_0/")}
    attn = {f"attn/{x}" for x in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")}
    again = {f"attn2/{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")}
    assert tails == attn | again | {"attn/to_add_out"} | {
        f"{x}/net.{y}" for x in ("ff", "ff_context") for y in ("0.proj", "2")
    }


@pytest.mark.long
def test_errors_of_the_low_precisions(public):
    cfg = nano_sd35.build(public).model
    model, (base, _, _) = sd35.make(cfg), sd35.load(cfg)
    base, cond = jax.tree.map(jnp.asarray, (base, {"text": np.ones((2, 20, 48)), "pooled": np.ones((2, 40))}))
    x, sigma = jax.random.normal(jax.random.key(0), (2, 8, 8, 4)), jnp.array([0.9, 0.4])
    found = {}
    for name in ("bf16", "nvfp4_emulated", "fp8"):
        rule = quant.rule_of(model.quant_rules, name)
        low = {} if name == "bf16" else {"quant": quant.quantise_tree(base, rule, name)}
        found[name] = jax.jit(model.velocity)({"params": base, **low}, x, sigma, cond)
    size = float(jnp.linalg.norm(found["bf16"]))
    apart = {name: float(jnp.linalg.norm(v - found["bf16"])) / size for name, v in found.items()}
    assert 0.01 < apart["nvfp4_emulated"] < 0.3 and 0.005 < apart["fp8"] < 0.15, apart


@pytest.mark.slow
def test_remat_keeps_the_gradient(public):
    """Recomputing blocks, but for some results, gives the same gradient of the LoRA."""
    found = []
    for remat, keeps in ((False, ()), (True, ("qkv", "mlp"))):
        model = sd35.make(nano_sd35.model(public / "sd35", remat=remat, remat_keeps=keeps))
        base = nano.random(jax.eval_shape(model.init, jax.random.key(0)), 1)
        begin = functools.partial(lora.init, jax.random.key(0), targets=model.lora_targets, cfg=Lora(4))
        adapter = nano.random(jax.eval_shape(begin, base), 2)
        cond = {"text": jnp.ones((1, 20, 48)), "pooled": jnp.ones((1, 40))}

        def loss(adapter, base, cond, model=model):
            policy = lora.policy(base, adapter, Lora(4))
            return jnp.sum(model.velocity(policy, jnp.ones((1, 8, 8, 4)), jnp.full((1,), 0.5), cond) ** 2)

        found.append(jax.jit(jax.grad(loss))(adapter, base, cond))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max()), *found)
