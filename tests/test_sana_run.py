"""Runs of SANA: config, plan from shapes alone, converted weights, an iteration in two low precisions, pictures."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from safetensors.numpy import load_file

from solrl_jax import config, learn, lora, main, plan, quant, recipes, rollout, sharding, train
from solrl_jax.config import ConfigError, Evaluate, Lora, Stage
from solrl_jax.models import public, sana
from solrl_jax.plan import shapes
from solrl_jax.quant.calibrate import calibrated
from solrl_jax.run import assemble, convert, evaluate
from solrl_jax.weights import WeightsError, hub
from tests import nano, nano_sana

REWARDS = ("pickscore", "clipscore", "hpsv2", "imagereward")


@pytest.fixture(scope="module")
def nano_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    nano_sana.build(folder)
    return folder


# --- the config -----------------------------------------------------------------------------------------------------


def test_sana_is_the_published_run():
    cfg = config.load("sana:sol_rl")
    assert cfg.model.path == "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
    assert (cfg.model.size, cfg.model.text_tokens, cfg.model.shift) == (1024, 300, 1.0)
    assert (cfg.model.min_dim, cfg.model.remat, cfg.seed, cfg.selection) == (2240, True, 42, "best_worst")
    assert (cfg.prompts, cfg.candidates, cfg.kept, cfg.times) == (48, 96, 24, 6)
    assert cfg.explore == Stage(6, "euler", "auto", 24) and cfg.regenerate == Stage(10, "euler", "bf16", 24)
    assert (cfg.lora.rank, cfg.lora.alpha, cfg.lora.targets) == (32, 64.0, ())
    assert (cfg.learn.timestep_fraction, cfg.learn.clip_norm, cfg.learn.learning_rate) == (0.6, 1.0, 3e-4)
    assert (cfg.learn.kl_weight, cfg.learn.ema_max, cfg.learn.strength, cfg.learn.updates) == (1e-4, 0.9, 1.0, 1)
    assert (cfg.evaluate.steps, cfg.evaluate.solver, cfg.reward) == (40, "euler", "pickscore")
    assert (
        *("t_embedder", "t_block", "cfg_embedder", "y_embedder", "x_embedder", "final_layer", "logvar_linear"),
        "attn.qkv",
    ) == sana.NVFP4_SKIP
    assert (
        *("attn.qkv", "attn.proj"),
        *("cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj"),
    ) == sana.LORA_TARGETS


def test_recipes_have_the_names_of_the_original():
    names = [f"{f}_{r}" for f in recipes.NAMES for r in REWARDS]
    made = {recipe: config.load(f"sana:{recipe}") for recipe in names}
    assert made["sol_rl_pickscore"] == config.load("sana:sol_rl")
    for recipe, cfg in made.items():
        assert cfg == config.load(f"sana:sana_{recipe}") and recipe.endswith(f"_{cfg.reward}")
    with pytest.raises(ConfigError, match="no such recipe"):
        config.load("sana:sd3_sol_rl")


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_it_divides_over_devices(devices):
    cfg = config.load("sana")
    assert learn.samples_at_a_time(cfg, cfg.prompts * cfg.kept // cfg.learn.updates // devices) == 4
    for _, stage, images in cfg.stages():
        assert rollout.block_shape(stage.chunk, cfg.prompts // devices, images) == (1, 24)


# --- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_plan_from_public_sizes(capsys, monkeypatch):
    """Nothing is placed, nothing read: parameters and TFLOP by the public configs."""
    monkeypatch.setattr(jax, "device_put", None)
    with flagsaver.flagsaver():
        assert main.main(main.parse(["solrl_jax", "--mode=plan", "--config=sana"])) == 0
    out = capsys.readouterr().out
    lines = [
        "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers with its public sizes",
        "transformer: 1,604,462,752 parameters, 3.2 GB",
        "LoRA: 18,636,800 parameters, 0.075 GB",
        "VAE decoder: 159,223,171 parameters, 0.64 GB",
        "text encoders: 2,614,341,888 parameters, 5.2 GB",
        "TFLOP an image: forward 2.967, decode 7.39",
    ]
    assert all(line in out for line in lines), out
    assert [line.split()[0] for line in out.splitlines() if " fits " in line] == [
        *("encode", "quantise", "explore", "regenerate", "learn", "watch", "evaluate")
    ]


@pytest.mark.slow
def test_flops_of_a_forward_pass_and_of_a_rollout(tmp_path):
    """2.9667 TFLOP; in a rollout the text's part is done once for all its steps and all images of a prompt."""
    path = str(hub.write_configs(tmp_path, next(iter(public.SANA.values()))))
    cfg = config.load("sana:sol_rl", {"model.path": path, "reward": "clipscore", "explore.precision": "bf16"})
    found = shapes.read(cfg, 1)
    one = plan.per_image_flops(found)
    assert one["forward"].total() == pytest.approx(2.9667e12, rel=1e-4)
    text = 2 * 300 * (2304 * 2240 + 2240**2 + 20 * 2240 * 4480)
    rows = plan.use_of("explore", cfg, found, 1, plan.CARDS["H100 80GB"]).flops.total()
    drawn = 4608 * (6 * (one["forward"].total() - text) + one["decode"].total()) + 4 * 48 * text
    judged = rows - drawn
    assert 0 < judged < 4608 * 0.5e12  # the reward's tower, and its preprocessing


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_converted_weights(nano_dir, tmp_path):
    cfg = nano_sana.build(nano_dir)
    out = tmp_path / "converted"
    convert.convert(assemble.model_module(cfg), cfg.model, out)
    mesh = sharding.make_mesh(1)
    read = assemble.open_weights(cfg, mesh)
    again = assemble.open_weights(config.override(cfg, **{"model.path": out}), mesh)
    assert jax.tree.structure(read) == jax.tree.structure(again)
    for one, two in zip(jax.tree.leaves(read), jax.tree.leaves(again), strict=True):
        assert (one.dtype, np.asarray(one).tobytes()) == (two.dtype, np.asarray(two).tobytes())
    assert set(read[2]) == {"gemma"}
    made = sana.make(nano_sana.model(out))
    jax.tree.map(np.testing.assert_array_equal, made.tokenize(["a"]), sana.make(cfg.model).tokenize(["a"]))


def test_anothers_folder_is_told(nano_dir, tmp_path):
    cfg = nano.build(tmp_path)
    with pytest.raises(WeightsError, match=r"holds a SanaPipeline, not a FluxPipeline: use --config=sana"):
        assemble.assemble(config.override(cfg, **{"model.path": nano_dir / "sana"}), 1)


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(nano_dir):
    """One iteration, exploring in emulated NVFP4."""
    cfg = nano_sana.build(nano_dir, iterations=1, evaluate=Evaluate(every=0))
    train.train(cfg, nano_dir / "run", devices=1)
    return nano_dir / "run"


@pytest.mark.slow
def test_an_iteration(run):
    """Every factor moves; the file in diffusers' names, the card and the report are there, ComfyUI's layout is not."""
    for name in ("report.html", "current/pytorch_lora_weights.safetensors", "model_card.md"):
        assert (run / name).stat().st_size > 0, name
    assert not (run / "comfyui").exists() and "ComfyUI" not in (run / "model_card.md").read_text()
    tensors = load_file(run / "pytorch_lora_weights.safetensors")
    assert len(tensors) == 2 * 3 * 8
    assert all(np.any(x) and np.all(np.isfinite(x)) for x in tensors.values())
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(line["grad_norm"]) and line["grad_norm"] > 0 and "rank/spearman" in line


@pytest.mark.slow
def test_pictures_of_the_run(run, nano_dir, tmp_path):
    """The run's file draws what its state does not: other pictures than the base's, of 2 prompts."""
    cfg = nano_sana.build(nano_dir, evaluate=Evaluate(every=0, prompts=2, steps=2, solver="euler", grid=1, chunk=2))
    for name, file in {"base": None, "policy": run}.items():
        evaluate.run_sample(cfg, tmp_path / name, prompts=nano.PROMPTS[:2], place=None, lora_file=file, devices=1)
    one, two = (sorted((tmp_path / name / "samples").iterdir()) for name in ("base", "policy"))
    assert [f.name for f in one] == [f.name for f in two] == ["0000_0.png", "0001_0.png"]
    assert len({f.read_bytes() for f in (*one, *two)}) == 4


@pytest.mark.long
def test_a_card_with_fp8(nano_dir, tmp_path, monkeypatch):
    """auto is FP8 there, with units for all Linears of a block."""
    monkeypatch.setattr(assemble, "capability", lambda: 9.0)
    seen = []
    monkeypatch.setattr(train, "calibrated", lambda *given: seen.append(calibrated(*given)) or seen[-1])
    low = Stage(steps=2, solver="euler", precision="auto", chunk=4)
    cfg = nano_sana.build(nano_dir, iterations=1, evaluate=Evaluate(every=0), explore=low)
    train.train(cfg, tmp_path / "run", devices=1)
    assert json.loads((tmp_path / "run/config.json").read_text())["explore"]["precision"] == "fp8"
    (model,) = seen
    spec = jax.eval_shape(model.init, jax.random.key(0))
    chosen = {path.removesuffix("/kernel") for path in quant.chosen(spec, model.quant_rules.fp8)}
    units = dict(model.quant_rules.fp8.units)
    assert chosen <= units.keys() and all(np.log2(unit) % 1 == 0 for unit in units.values())
    assert {path.removeprefix("blocks/") for path in chosen} == {
        *("attn/qkv", "attn/proj", "cross_attn/q_linear", "cross_attn/kv_linear", "cross_attn/proj"),
        *("mlp/inverted_conv.linear", "mlp/point_conv.linear"),
    }


@pytest.mark.long
def test_errors_of_the_low_precisions(nano_dir):
    cfg = nano_sana.build(nano_dir).model
    model, (base, _, _) = sana.make(cfg), sana.load(cfg)
    base = jax.tree.map(jnp.asarray, base)
    cond = {"text": jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 32)), jnp.float32)}
    cond |= {"length": jnp.array([5, 12])}
    x, sigma = jax.random.normal(jax.random.key(0), (2, 8, 8, 4)), jnp.array([0.9, 0.4])
    found = {}
    for name in ("bf16", "nvfp4_emulated", "fp8"):
        rule = quant.rule_of(model.quant_rules, name)
        low = {} if name == "bf16" else {"quant": quant.quantise_tree(base, rule, name)}
        variables = {"params": base, **low}
        found[name] = jax.jit(model.velocity)(variables, x, sigma, jax.jit(model.prepare)(variables, cond))
    size = float(jnp.linalg.norm(found["bf16"]))
    apart = {name: float(jnp.linalg.norm(v - found["bf16"])) / size for name, v in found.items()}
    assert 0.01 < apart["nvfp4_emulated"] < 0.3 and 0.005 < apart["fp8"] < 0.15, apart


@pytest.mark.slow
def test_remat_keeps_the_gradient(nano_dir):
    """Recomputing blocks, but for some results, gives the same gradient of the LoRA."""
    found = []
    for remat, keeps in ((False, ()), (True, ("attention", "qkv", "mlp"))):
        model = sana.make(nano_sana.model(nano_dir / "sana", remat=remat, remat_keeps=keeps))
        base = nano.random(jax.eval_shape(model.init, jax.random.key(0)), 1)
        begin = functools.partial(lora.init, jax.random.key(0), targets=model.lora_targets, cfg=Lora(4))
        adapter = nano.random(jax.eval_shape(begin, base), 2)
        text, x = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((1, 12, 32), (1, 8, 8, 4))))
        cond = {"text": text, "length": jnp.array([7])}

        def loss(adapter, base, cond, model=model, x=x):
            policy = lora.policy(base, adapter, Lora(4))
            return jnp.sum(model.velocity(policy, x, jnp.full((1,), 0.5), cond) ** 2)

        found.append(jax.jit(jax.grad(loss))(adapter, base, cond))
    assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(found[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max()), *found)
