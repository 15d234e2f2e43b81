"""Runs of Z-Image: config, plan from shapes alone, converted weights, iterations in two low precisions, every mode."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from absl.testing import flagsaver
from diffusers import ZImagePipeline
from safetensors.numpy import load_file

from solrl_jax import config, guidance, learn, main, plan, quant, recipes, rollout, sharding, train
from solrl_jax.config import ConfigError, Evaluate, Stage
from solrl_jax.models import public, zimage
from solrl_jax.plan import shapes
from solrl_jax.quant.calibrate import calibrated
from solrl_jax.run import assemble, convert, evaluate
from solrl_jax.weights import WeightsError, hub
from tests import nano, nano_zimage, test_prove
from tests.test_flux import rewrite

REWARDS = ("pickscore", "clipscore", "hpsv2", "imagereward")
FEED_FORWARD = tuple(f"feed_forward.{w}" for w in ("w1", "w2", "w3"))
METHODS = ("branch", "flow_grpo")  # Sol-RL is `run`, V-GRPO is guided below, the others are in tests/test_flux2_run.py


@pytest.fixture(scope="module")
def nano_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    nano_zimage.build(folder)
    return folder


# --- the config -----------------------------------------------------------------------------------------------------


def test_zimage_has_fluxs_settings():
    cfg, flux = config.load("zimage:sol_rl"), config.load("flux:sol_rl_pickscore")
    changed = {"name", "model.name", "model.path", "regenerate.guidance", "learn.micro_batch"}
    assert set(config.differences(flux, cfg)) == changed and guidance.weights(cfg) == (5, 5, 5, 5)
    assert cfg.model.path == "Tongyi-MAI/Z-Image" and (cfg.model.size, cfg.model.text_tokens) == (512, 128)
    assert (cfg.model.shift, cfg.evaluate.own, guidance.evaluated(cfg)) == (0.0, True, 5)


def test_turbo_is_drawn_in_eight_steps():
    cfg, turbo = config.load("zimage:sol_rl"), config.load("zimage:turbo_sol_rl")
    changed = {"model.path", "explore.steps", "regenerate.steps", "regenerate.guidance", "evaluate.steps"}
    changed |= {"learn.timestep_fraction"}
    assert guidance.weights(turbo) == (1, 1, 1, 1)
    assert set(config.differences(cfg, turbo)) == changed
    assert turbo.model.path == "Tongyi-MAI/Z-Image-Turbo" and turbo.regenerate.steps == turbo.evaluate.steps == 8
    assert turbo.times == cfg.times == 4
    assert config.load("zimage:turbo") == config.load("zimage:turbo_branch_pickscore")


def test_recipes_have_the_names_of_the_original():
    names = [f"{f}_{r}" for f in recipes.NAMES for r in REWARDS]
    for recipe in names:
        assert recipe.endswith(f"_{config.load(f'zimage:{recipe}').reward}")
        assert config.load(f"zimage:turbo_{recipe}").model.path.endswith("Turbo")
    assert config.load("zimage") == config.load("zimage:branch_pickscore")
    lines = recipes.help_lines("zimage")
    listed = [line.split()[0] for line in lines if line[:2] == "  " and line[2] != " "]
    assert listed == [*names, *(f"turbo_{name}" for name in names)]
    for wrong in ("turbi", "turbosol_rl", "turbo_sol"):
        with pytest.raises(ConfigError, match="no such recipe"):
            config.load(f"zimage:{wrong}")


@pytest.mark.parametrize("recipe", ["zimage", "zimage:turbo"])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_it_divides_over_devices(recipe, devices):
    cfg = config.load(recipe)
    assert learn.samples_at_a_time(cfg, cfg.prompts * cfg.kept // cfg.learn.updates // devices) == 2
    for _, stage, images in cfg.stages():
        assert rollout.block_shape(stage.chunk, cfg.prompts // devices, images) == (1, 24)


# --- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_plan_from_public_sizes(capsys, monkeypatch):
    """Nothing is placed, nothing read: parameters and TFLOP by the public configs."""
    monkeypatch.setattr(jax, "device_put", None)
    with flagsaver.flagsaver():
        assert main.main(main.parse(["solrl_jax", "--mode=plan", "--config=zimage"])) == 0
    out = capsys.readouterr().out
    lines = [
        "Tongyi-MAI/Z-Image with its public sizes",
        "transformer: 6,154,908,736 parameters, 12.3 GB",
        "LoRA: 33,423,360 parameters, 0.13 GB",
        "text encoders: 3,921,534,720 parameters, 7.8 GB",
        "TFLOP an image: forward 13.69, decode 2.133",
        "fp8: 238 of 276 Linears, 97.8% of their weights",
    ]
    assert all(line in out for line in lines), out
    assert [line.split()[0] for line in out.splitlines() if " fits " in line] == [
        *("encode", "quantise", "explore", "regenerate", "learn", "watch", "evaluate")
    ]


def sizes_of(folder, **changes):
    path = str(hub.write_configs(folder, public.ZIMAGE["Tongyi-MAI/Z-Image"]))
    words = {"model.path": path, "reward": "clipscore", "explore.precision": "bf16", "regenerate.guidance": "1"}
    cfg = config.load("zimage:sol_rl", words | changes)
    return cfg, shapes.read(cfg, 1)


FINAL = 2 * 3840 * 64
"""FLOP of the last layer for a token of the caption, which diffusers computes and throws away."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "tokens", "tflop"),
    [(512, 128, 13.694), (512, 512, 18.533), (1024, 64, 55.606)],
)
def test_flops_of_a_forward_pass(tmp_path, size, tokens, tflop):
    """diffusers' network, counted by hand, for captions that fill the window; it runs its last layer on them too."""
    _, found = sizes_of(tmp_path, **{"model.size": str(size), "model.text_tokens": str(tokens)})
    total = plan.per_image_flops(found)["forward"].total()
    assert (total + tokens * FINAL) / 1e12 == pytest.approx(tflop, rel=1e-4)


@pytest.mark.slow
def test_flops_of_a_rollout(tmp_path):
    """The caption's part is done once for all steps and all images of a prompt."""
    cfg, found = sizes_of(tmp_path)
    one = plan.per_image_flops(found)
    block = 2 * 128 * 176_947_200 + 4 * 128 * 128 * 3840  # Linears; scores and their sum
    text = 2 * 128 * 2560 * 3840 + 2 * block
    rows = plan.use_of("explore", cfg, found, 1, plan.CARDS["H100 80GB"]).flops.total()
    drawn = 4608 * (6 * (one["forward"].total() - text) + one["decode"].total()) + 4 * 48 * text
    judged = rows - drawn
    assert 0 < judged < 4608 * 0.5e12  # the reward's tower, and its preprocessing


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_converted_weights(nano_dir, tmp_path):
    cfg = nano_zimage.build(nano_dir)
    out = tmp_path / "converted"
    convert.convert(assemble.model_module(cfg), cfg.model, out)
    mesh = sharding.make_mesh(1)
    read = assemble.open_weights(cfg, mesh)
    again = assemble.open_weights(config.override(cfg, **{"model.path": out}), mesh)
    assert jax.tree.structure(read) == jax.tree.structure(again)
    for one, two in zip(jax.tree.leaves(read), jax.tree.leaves(again), strict=True):
        assert (one.dtype, np.asarray(one).tobytes()) == (two.dtype, np.asarray(two).tobytes())
    assert set(read[2]) == {"qwen3"}
    made = zimage.make(nano_zimage.model(out))
    jax.tree.map(np.testing.assert_array_equal, made.tokenize(["a"]), zimage.make(cfg.model).tokenize(["a"]))


def test_anothers_folder_is_told(nano_dir, tmp_path):
    cfg = nano.build(tmp_path)
    with pytest.raises(WeightsError, match=r"holds a ZImagePipeline, not a FluxPipeline: use --config=zimage"):
        assemble.assemble(config.override(cfg, **{"model.path": nano_dir / "zimage"}), 1)


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(nano_dir):
    """One iteration, exploring in emulated NVFP4."""
    cfg = nano_zimage.build(nano_dir, iterations=1, evaluate=Evaluate(every=0))
    train.train(cfg, nano_dir / "run", devices=1)
    return nano_dir / "run"


@pytest.mark.long
def test_an_iteration(run):
    """Every factor moves, the refiners' too; both layouts, the card and the report are there."""
    for name in (
        *("report.html", "current/pytorch_lora_weights.safetensors", "model_card.md"),
        "comfyui/nano-zimage.safetensors",
    ):
        assert (run / name).stat().st_size > 0, name
    tensors = load_file(run / "pytorch_lora_weights.safetensors")
    assert len(tensors) == 2 * 7 * 4
    assert all(np.any(x) and np.all(np.isfinite(x)) for x in tensors.values())
    comfy = {key.split(".")[0] for key in load_file(run / "comfyui/nano-zimage.safetensors")}
    assert len(comfy) == 7 * 2 and "lora_unet_layers_2_attention_qkv" in comfy
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(line["grad_norm"]) and line["grad_norm"] > 0 and "rank/spearman" in line


@pytest.mark.long
def test_pictures_of_the_run(run, nano_dir, tmp_path):
    """The run's file in either layout draws the same pictures, other than the base's."""
    cfg = nano_zimage.build(nano_dir, evaluate=Evaluate(every=0, prompts=2, steps=2, grid=1, chunk=2))
    files = {"theirs": run, "comfy": run / "comfyui/nano-zimage.safetensors", "base": None}
    for name, file in files.items():
        evaluate.run_sample(cfg, tmp_path / name, prompts=nano.PROMPTS[:2], place=None, lora_file=file, devices=1)
    found = {name: sorted((tmp_path / name / "samples").iterdir()) for name in files}
    assert [f.name for f in found["base"]] == ["0000_0.png", "0001_0.png"]
    one, two, three = ([f.read_bytes() for f in found[name]] for name in files)
    assert one == two and len({*one, *three}) == 4


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
def test_diffusers_draws_with_the_runs_file(run, nano_dir):
    """The LoRA file in diffusers' pipeline moves the velocity by what it moves ours."""
    cfg = nano_zimage.build(nano_dir)
    parts = assemble.for_drawing(cfg, 1)
    policy = assemble.adapter(parts, None, run)
    pipe = ZImagePipeline.from_pretrained(nano_dir / "zimage", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(run)
    x1 = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    how = {"latents": torch.tensor(np.asarray(x1)).permute(0, 3, 1, 2), "guidance_scale": 0.0, "output_type": "latent"}
    how |= {"height": 16, "width": 16, "max_sequence_length": nano_zimage.TOKENS, "num_inference_steps": 1}
    theirs = pipe(nano.PROMPTS[0], **how).images.permute(0, 2, 3, 1).numpy()
    from solrl_jax import lora

    cond = parts.text(nano.PROMPTS[:1])
    for adapter, least, most in ((policy, 0.0, 1e-4), (jax.tree.map(jnp.zeros_like, policy), 1e-3, np.inf)):
        variables = lora.policy(parts.frozen.base, adapter, cfg.lora)
        ours = x1 - jax.jit(parts.model.velocity)(variables, x1, jnp.ones(1), cond)
        assert least <= np.abs(ours - theirs).max() < most


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_methods(nano_dir, tmp_path, name):
    """An iteration by each recipe, of small numbers of steps."""
    cfg = nano_zimage.build(nano_dir, iterations=1, evaluate=Evaluate(every=0), explore=Stage(2, chunk=4))
    cfg = recipes.family(cfg, name)
    words = {"learn.micro_batch": "2", "regenerate.steps": "3"}
    if name == "flow_grpo":
        words |= {"regenerate.steps": "4", "learn.timestep_fraction": "0.5"}
    train.train(config.override(cfg, **words), tmp_path / "run", devices=1)
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(line["grad_norm"]) and line["grad_norm"] > 0


@pytest.mark.slow
def test_a_guided_iteration(nano_dir, tmp_path):
    """V-GRPO: rollouts and loss at weight 5, whose negative is the empty prompt, 19 tokens here; feed-forwards adapted
    too."""
    evaluated = Evaluate(every=1, prompts=4, steps=2, grid=2, chunk=4)
    cfg = recipes.family(nano_zimage.build(nano_dir, iterations=1, evaluate=evaluated), "vgrpo")
    words = {"regenerate.steps": "5", "learn.timestep_fraction": "0.4", "learn.micro_batch": "2"}
    cfg = config.override(cfg, **words, **{"regenerate.guidance": "5.0"})
    cfg = dataclasses.replace(cfg, lora=dataclasses.replace(cfg.lora, targets=(*zimage.LORA_TARGETS, *FEED_FORWARD)))
    train.train(cfg, tmp_path / "run", devices=1)
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(line["grad_norm"]) and line["grad_norm"] > 0
    assert len(load_file(tmp_path / "run/pytorch_lora_weights.safetensors")) == 2 * 7 * 7


def test_turbo_is_not_guided_and_told(nano_dir, tmp_path):
    """One line of a run's log; a weight of guidance is refused unless it is asked for as the classifier-free one."""
    turbo = nano_zimage.write(tmp_path / "zimage")
    rewrite(turbo / "scheduler/scheduler_config.json", shift=3.0)
    cfg = nano_zimage.build(nano_dir, model=nano_zimage.model(turbo))
    model = zimage.make(cfg.model)
    (said,) = [line for line in guidance.told(cfg, model) if "distilled" in line]
    assert said.startswith("warning: this zimage was distilled to draw in few steps without guidance: training loses")
    assert not [
        line for line in guidance.told(cfg, zimage.make(nano_zimage.model(nano_dir / "zimage"))) if "few" in line
    ]
    guided = config.override(cfg, **{"regenerate.guidance": "5"})
    with pytest.raises(
        ConfigError, match=r"=5: this zimage takes no guidance \(it was distilled to draw without\): leave"
    ):
        guidance.check_training(guided, model)
    asked = dataclasses.replace(guided, model=dataclasses.replace(cfg.model, guidance="cfg"))
    assert (
        guidance.doubles(zimage.make(asked.model), 5.0)
        and guidance.check_training(asked, zimage.make(asked.model)) == []
    )


@pytest.mark.long
def test_a_card_with_fp8(nano_dir, tmp_path, monkeypatch):
    """auto is FP8 there, with units for all Linears of the blocks but the modulation, the refiners' too."""
    monkeypatch.setattr(assemble, "capability", lambda: 9.0)
    seen = []
    monkeypatch.setattr(train, "calibrated", lambda *given: seen.append(calibrated(*given)) or seen[-1])
    low = Stage(steps=2, precision="auto", chunk=4)
    cfg = nano_zimage.build(nano_dir, iterations=1, evaluate=Evaluate(every=0), explore=low)
    train.train(cfg, tmp_path / "run", devices=1)
    assert json.loads((tmp_path / "run/config.json").read_text())["explore"]["precision"] == "fp8"
    (model,) = seen
    spec = jax.eval_shape(model.init, jax.random.key(0))
    chosen = {path.removesuffix("/kernel") for path in quant.chosen(spec, model.quant_rules.fp8)}
    units = dict(model.quant_rules.fp8.units)
    assert chosen <= units.keys() and all(np.log2(unit) % 1 == 0 for unit in units.values())
    names = (
        *(f"attention/{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"feed_forward/w{i}" for i in (1, 2, 3)),
    )
    assert chosen == {f"{stack}/{name}" for stack in ("layers", "noise_refiner", "context_refiner") for name in names}


@pytest.mark.long
def test_errors_of_the_low_precisions(nano_dir):
    """Units that are measured, for feed-forwards whose hidden is a thousand times as large as usual."""
    cfg = nano_zimage.build(nano_dir).model
    model, (base, _, _) = zimage.make(cfg), zimage.load(cfg)
    base = jax.tree.map(jnp.asarray, base)
    for name in ("layers", "noise_refiner", "context_refiner"):
        hidden = base[name]["feed_forward"]["w3"]
        base[name]["feed_forward"]["w3"] = {"kernel": 3000 * hidden["kernel"]}
    cond = {"text": jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 32)), jnp.float32)}
    cond |= {"length": jnp.array([5, 40])}
    x, sigma = jax.random.normal(jax.random.key(0), (2, 8, 8, 4)), jnp.array([0.9, 0.4])
    stages = [Stage(2, "euler", "bf16", 4)]
    measured = calibrated(model, {"params": base}, cond, jax.random.key(1), stages)
    assert dict(measured.quant_rules.fp8.units)["layers/feed_forward/w2"] >= 32
    found = {}
    for name, rules in {"bf16": model, "nvfp4_emulated": model, "fp8": measured, "cut": model}.items():
        precision = "fp8" if name == "cut" else name
        rule = quant.rule_of(rules.quant_rules, precision)
        low = {} if name == "bf16" else {"quant": quant.quantise_tree(base, rule, precision)}
        variables = {"params": base, **low}
        found[name] = jax.jit(model.velocity)(variables, x, sigma, jax.jit(model.prepare)(variables, cond))
    size = float(jnp.linalg.norm(found["bf16"]))
    apart = {name: float(jnp.linalg.norm(v - found["bf16"])) / size for name, v in found.items()}
    assert 0.01 < apart["nvfp4_emulated"] < 0.4 and 0.005 < apart["fp8"] < 0.2, apart
    assert apart["cut"] > 2 * apart["fp8"], apart  # without units what is above 448 is cut off


@pytest.mark.slow
def test_sharded_weights(nano_dir):
    """A base over 4 devices, gathered at use, gives the velocity of a whole one."""
    cfg = nano_zimage.build(nano_dir)
    model, (base, _, _) = zimage.make(cfg.model), zimage.load(cfg.model)
    rng, found = np.random.default_rng(0), []
    cond = {"text": rng.normal(size=(4, 64, 32)).astype(np.float32), "length": np.int32([5, 32, 33, 64])}
    x, sigma = rng.normal(size=(4, 8, 8, 4)).astype(np.float32), np.float32([0.9, 0.4, 0.5, 0.1])
    for shard in (1, 4):
        mesh = sharding.make_mesh(4, shard)
        with jax.set_mesh(mesh):
            variables = {"params": sharding.place(base, mesh)}
            specs = sharding.specs_of(variables), *[sharding.SPLIT] * 3
            call = jax.jit(sharding.over_data(model.velocity, specs, sharding.SPLIT))
            found.append(np.asarray(call(variables, *sharding.split((x, sigma, cond), mesh))))
    assert len(sharding.cuts(base)) == 3 * 7 + 2
    np.testing.assert_allclose(*found, atol=2e-5)


# --- every mode by its command --------------------------------------------------------------------------------------


@pytest.fixture
def command(nano_dir, monkeypatch, capsys):
    """command(mode, *words) -> (exit code, output) with the small config."""
    made = nano_zimage.build(nano_dir, evaluate=Evaluate(every=0, prompts=4, steps=2, grid=2, chunk=4))
    monkeypatch.setattr(config, "load", lambda spec, overrides: config.override(made, **overrides))

    def of(mode, *words):
        capsys.readouterr()
        with flagsaver.flagsaver():
            code = main.main(main.parse(["x", "--config=x", f"--mode={mode}", *words]))
        out, err = capsys.readouterr()
        return code, out + err

    return of


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
def test_every_mode(command, run, tmp_path, monkeypatch):
    """eval and plan are as for klein; of prove the picture."""
    test_prove.picture_alone(monkeypatch)
    here = ("--devices=1", f"--run_dir={tmp_path / 'out'}")
    code, out = command("doctor", *here)
    assert code == 0 and "ready" in out, out
    code, out = command("sample", *here, f"--lora={run}", "--prompt=a red circle", "--guidance=5")
    assert code == 0, out
    (picture,) = (tmp_path / "out/samples").glob("*.png")
    (tmp_path / "p.txt").write_text("a red circle\n")
    code, out = command("score", *here, f"--images={picture.parent}", f"--prompts={tmp_path / 'p.txt'}")
    assert code == 0 and "mean" in out, out
    code, out = command("export", "--devices=1", f"--run_dir={run}")
    assert code == 0, out
    prove = ("--devices=1", f"--out={tmp_path / 'prove.json'}", "--prompt=a small blue square")
    code, out = command("prove", *prove, "--config.prompts=2")
    found = json.loads((tmp_path / "prove.json").read_text())["picture"]
    assert code == 0 and found["passed"], out
    assert max(each["latents_relative_rms"] for each in found["differences"].values()) < 1e-4
    assert found["against"]["by"] == "diffusers"
