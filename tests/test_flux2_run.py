"""Runs of FLUX.2-klein: config, plan from shapes alone, converted weights, iterations in low precisions, every mode."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from absl.testing import flagsaver
from diffusers import Flux2KleinPipeline
from safetensors.numpy import load_file

from solrl_jax import config, guidance, learn, lora, main, plan, quant, recipes, rollout, sharding, train
from solrl_jax.config import ConfigError, Evaluate, Stage
from solrl_jax.models import flux2, public
from solrl_jax.plan import shapes
from solrl_jax.quant.calibrate import calibrated
from solrl_jax.run import assemble, convert, evaluate
from solrl_jax.weights import hub
from tests import nano, nano_flux2

REWARDS = ("clipscore", "pickscore", "hpsv2", "imagereward")
VARIANTS = ("24gb", "base_9b", "4b", "9b")
METHODS = ("awm", "dance_grpo")  # Sol-RL is `run`, the others are in tests/test_zimage_run.py


@pytest.fixture(scope="module")
def nano_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    nano_flux2.build(folder)
    return folder


# --- the config -----------------------------------------------------------------------------------------------------


def test_klein_has_fluxs_settings_and_is_guided():
    cfg, flux = config.load("flux2:sol_rl"), config.load("flux:sol_rl")
    changed = {"name", "model.name", "model.path", "model.text_tokens", "model.remat_keeps", "encode_ahead"}
    assert set(config.differences(flux, cfg)) == {*changed, "regenerate.guidance"}
    assert cfg.model.path == "black-forest-labs/FLUX.2-klein-base-4B"
    assert tuple(guidance.weights(cfg)) == (4.0,) * 4 and guidance.evaluated(cfg) == 4.0


def test_variants():
    base = config.load("flux2:sol_rl")
    chunks = {"explore.chunk", "regenerate.chunk", "learn.micro_batch", "evaluate.chunk"}
    steps = {"explore.steps", "regenerate.steps", "evaluate.steps", "learn.timestep_fraction", "regenerate.guidance"}
    for name, changed, path in (
        ("24gb", chunks | {"model.remat_keeps"}, base.model.path),
        ("base_9b", {"model.path"}, "black-forest-labs/FLUX.2-klein-base-9B"),
        ("4b", {"model.path", *steps}, "black-forest-labs/FLUX.2-klein-4B"),
        ("9b", {"model.path", *steps}, "black-forest-labs/FLUX.2-klein-9B"),
    ):
        cfg = config.load(f"flux2:{name}_sol_rl")
        assert set(config.differences(base, cfg)) == changed and cfg.model.path == path in flux2.PUBLIC
        assert config.load(f"flux2:{name}") == config.load(f"flux2:{name}_branch_clipscore")
    assert config.load("flux2:4b").times == 4 and tuple(guidance.weights(config.load("flux2:4b"))) == (1.0,) * 4


def test_recipes():
    names = [f"{f}_{r}" for f in recipes.NAMES for r in REWARDS]
    every = [*names, *(f"{variant}_{name}" for variant in VARIANTS for name in names)]
    listed = [line.split()[0] for line in recipes.help_lines("flux2") if line[:2] == "  " and line[2] != " "]
    assert listed == every
    for recipe in every:
        assert recipe.endswith(f"_{config.load(f'flux2:{recipe}').reward}")
    for wrong in ("24", "4bsol_rl", "4b_sol"):
        with pytest.raises(ConfigError, match="no such recipe"):
            config.load(f"flux2:{wrong}")


@pytest.mark.parametrize(("recipe", "samples", "chunk"), [("flux2", 3, 24), ("flux2:24gb", 1, 3), ("flux2:4b", 3, 24)])
@pytest.mark.parametrize("devices", [1, 8])
def test_it_divides_over_devices(recipe, samples, chunk, devices):
    cfg = config.load(recipe)
    assert learn.samples_at_a_time(cfg, cfg.prompts * cfg.kept // cfg.learn.updates // devices) == samples
    assert cfg.explore is not None
    assert rollout.block_shape(cfg.explore.chunk, cfg.prompts // devices, cfg.candidates) == (1, chunk)


# --- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("card", ["RTX 4090 24GB"])
def test_plan_from_public_sizes(capsys, monkeypatch, card):
    """Nothing is placed, nothing read: parameters and TFLOP by the public configs. By `24gb` every stage fits a
    card of 24 GB, of which a run can use 23.2."""
    monkeypatch.setattr(jax, "device_put", None)
    with flagsaver.flagsaver():
        assert main.main(main.parse(["solrl_jax", "--mode=plan", "--config=flux2:24gb", f"--card={card}"])) == 0
    out = capsys.readouterr().out
    lines = [
        "black-forest-labs/FLUX.2-klein-base-4B with its public sizes",
        "transformer: 3,875,544,576 parameters, 7.8 GB",
        "LoRA: 33,423,360 parameters, 0.13 GB",
        "VAE decoder: 49,620,515 parameters, 0.2 GB",
        "text encoders: 3,114,088,192 parameters, 6.2 GB",  # the first 27 layers
        "TFLOP an image: forward 10.17, decode 2.13",
        f"fits {card}",
    ]
    assert all(line in out for line in lines), out
    assert [line.split()[0] for line in out.splitlines() if " fits " in line] == [
        *("encode", "quantise", "explore", "regenerate", "learn", "watch", "evaluate")
    ]


def sizes_of(folder, name="base-4B", **changes):
    path = str(hub.write_configs(folder, public.FLUX2[f"black-forest-labs/FLUX.2-klein-{name}"]))
    words = {"model.path": path, "reward": "clipscore", "explore.precision": "bf16", **changes}
    cfg = config.load("flux2:sol_rl", words)
    return cfg, shapes.read(cfg, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "tflop"),
    [("base-4B", 512, 10.173), ("base-4B", 1024, 34.820), ("base-9B", 512, 22.732), ("base-9B", 1024, 75.515)],
)
def test_flops_of_a_forward_pass(tmp_path, name, size, tflop):
    """diffusers' network, counted by hand."""
    _, found = sizes_of(tmp_path, name, **{"model.size": str(size)})
    assert plan.per_image_flops(found)["forward"].total() / 1e12 == pytest.approx(tflop, rel=1e-4)


@pytest.mark.slow
def test_flops_of_a_guided_rollout(tmp_path):
    """Two rows a picture; the text's projection once for all steps and all images of a prompt, and once for the
    negative prompt of a block."""
    cfg, found = sizes_of(tmp_path)
    one, text = plan.per_image_flops(found), 2 * 512 * 7680 * 3072
    rows = plan.use_of("explore", cfg, found, 1, plan.CARDS["H100 80GB"]).flops.total()
    drawn = 4608 * (2 * 6 * (one["forward"].total() - text) + one["decode"].total())
    tower = rows - drawn
    assert 0 < tower < 4608 * 0.5e12  # the reward's, its preprocessing, and 2 x 4 x 48 texts
    assert drawn > 0.99 * rows


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_converted_weights(nano_dir, tmp_path):
    cfg = nano_flux2.build(nano_dir)
    out = tmp_path / "converted"
    convert.convert(assemble.model_module(cfg), cfg.model, out)
    mesh = sharding.make_mesh(1)
    read = assemble.open_weights(cfg, mesh)
    again = assemble.open_weights(config.override(cfg, **{"model.path": out}), mesh)
    assert jax.tree.structure(read) == jax.tree.structure(again)
    for one, two in zip(jax.tree.leaves(read), jax.tree.leaves(again), strict=True):
        assert (one.dtype, np.asarray(one).tobytes()) == (two.dtype, np.asarray(two).tobytes())
    assert set(read[1]) == {"bn", "decoder", "post_quant_conv"} and set(read[2]) == {"qwen3"}
    made = flux2.make(nano_flux2.model(out))
    jax.tree.map(np.testing.assert_array_equal, made.tokenize(["a"]), flux2.make(cfg.model).tokenize(["a"]))


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(nano_dir):
    """One iteration, guided at 4, exploring in emulated NVFP4."""
    cfg = nano_flux2.build(nano_dir, iterations=1, evaluate=Evaluate(every=0))
    train.train(cfg, nano_dir / "run", devices=1)
    return nano_dir / "run"


@pytest.mark.slow
def test_an_iteration(run):
    """Every factor moves; both layouts, the card and the report are there."""
    comfy = "comfyui/nano-flux2.safetensors"
    for name in ("report.html", "current/pytorch_lora_weights.safetensors", "model_card.md", comfy):
        assert (run / name).stat().st_size > 0, name
    tensors = load_file(run / "pytorch_lora_weights.safetensors")
    assert len(tensors) == 2 * (4 + 2 * 2)
    assert all(np.any(x) and np.all(np.isfinite(x)) for x in tensors.values())
    modules = {key.split(".")[0].removeprefix("lora_unet_") for key in load_file(run / comfy)}
    singles = {f"single_blocks_{i}_linear{j}" for i in (0, 1) for j in (1, 2)}
    assert modules == {"double_blocks_0_img_attn_qkv", "double_blocks_0_img_attn_proj", *singles}
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(line["grad_norm"]) and line["grad_norm"] > 0 and "rank/spearman" in line


@pytest.mark.slow
def test_pictures_of_the_run(run, nano_dir, tmp_path):
    """The run's file in either layout draws the same pictures, other than the base's."""
    cfg = nano_flux2.build(nano_dir, evaluate=Evaluate(every=0, prompts=2, steps=2, grid=1, chunk=2))
    files = {"theirs": run, "comfy": run / "comfyui/nano-flux2.safetensors", "base": None}
    for name, file in files.items():
        evaluate.run_sample(cfg, tmp_path / name, prompts=nano.PROMPTS[:2], place=None, lora_file=file, devices=1)
    found = {name: sorted((tmp_path / name / "samples").iterdir()) for name in files}
    one, two, three = ([f.read_bytes() for f in found[name]] for name in files)
    assert one == two and len({*one, *three}) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_diffusers_draws_with_the_runs_file(run, nano_dir):
    """The LoRA file in diffusers' pipeline gives our guided velocity with it."""
    cfg = nano_flux2.build(nano_dir)
    parts = assemble.for_drawing(cfg, 1)
    policy, model = assemble.adapter(parts, None, run), parts.model
    pipe = Flux2KleinPipeline.from_pretrained(nano_dir / "flux2", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(run)
    x1 = jax.random.normal(jax.random.key(0), (1, 4, 4, 16))
    last = {}
    how = {"latents": torch.tensor(np.asarray(x1)).permute(0, 3, 1, 2), "height": 16, "width": 16}
    how |= {"callback_on_step_end": lambda *x: last.update(x[3]) or {}, "num_inference_steps": 1}
    pipe(prompt=nano.PROMPTS[0], guidance_scale=4.0, output_type="latent", **how)
    theirs = last["latents"].reshape(1, 4, 4, 16).numpy()
    cond = guidance.conditioned(model, parts.text(nano.PROMPTS[:1]), parts.text.negative(), 4.0)
    velocity = jax.jit(guidance.velocity(model, 4.0))
    for adapter, least, most in ((policy, 0.0, 2e-4), (jax.tree.map(jnp.zeros_like, policy), 1e-3, np.inf)):
        ours = x1 - velocity(lora.policy(parts.frozen.base, adapter, cfg.lora), x1, jnp.ones(1), cond)
        assert least <= np.abs(ours - theirs).max() < most


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_methods(nano_dir, tmp_path, name):
    """An iteration by each recipe, of small numbers of steps, guided. AWM's has an evaluation and trains all Linears of
    the blocks, as kohya's trainer does."""
    whole = name == "awm"
    evaluated = Evaluate(every=1, prompts=4, steps=2, grid=2, chunk=4) if whole else Evaluate(every=0)
    cfg = recipes.family(nano_flux2.build(nano_dir, iterations=1, evaluate=evaluated), name)
    words = {"learn.micro_batch": "2", "regenerate.steps": "5" if whole else "4"}
    words |= {"learn.timestep_fraction": "0.4" if whole else "0.5"}
    if whole:
        cfg = dataclasses.replace(cfg, lora=dataclasses.replace(cfg.lora, targets=flux2.LORA_ALL))
    train.train(config.override(cfg, **words), tmp_path / "run", devices=1)
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(line["grad_norm"]) and line["grad_norm"] > 0
    modules = (12 if whole else 4) + 2 * 2
    assert len(load_file(tmp_path / "run/pytorch_lora_weights.safetensors")) == 2 * modules


def test_a_distilled_model_is_not_guided_and_told(nano_dir, tmp_path):
    """One line of a run's log; a weight of guidance is refused unless it is asked for as the classifier-free one."""
    folder = nano_flux2.write(tmp_path / "flux2", distilled=True)
    cfg = nano_flux2.build(nano_dir, model=nano_flux2.model(folder), regenerate=Stage(3, chunk=4))
    model, base = flux2.make(cfg.model), flux2.make(nano_flux2.build(nano_dir).model)
    (said,) = [line for line in guidance.told(cfg, model) if "distilled" in line]
    assert said.startswith("warning: ") and "few steps" in said
    assert not [line for line in guidance.told(nano_flux2.build(nano_dir), base) if "few" in line]
    guided = config.override(cfg, **{"regenerate.guidance": "4"})
    with pytest.raises(ConfigError, match=r"regenerate.guidance=4: this flux2 takes no guidance"):
        guidance.check_training(guided, model)
    asked = flux2.make(dataclasses.replace(cfg.model, guidance="cfg"))
    assert guidance.doubles(asked, 4.0) and guidance.check_training(guided, asked) == []


NAMES = {
    "transformer_blocks": (
        *(f"attn/{x}" for x in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")),
        *("attn/to_add_out", "ff/linear_in", "ff/linear_out", "ff_context/linear_in", "ff_context/linear_out"),
    ),
    "single_transformer_blocks": ("attn/to_qkv_mlp_proj", "attn/to_out"),
}


@pytest.mark.long
def test_a_card_with_fp8(nano_dir, tmp_path, monkeypatch):
    """auto is FP8 there, with units for all Linears of the blocks, from guided rollouts."""
    monkeypatch.setattr(assemble, "capability", lambda: 9.0)
    seen = []
    monkeypatch.setattr(train, "calibrated", lambda *given: seen.append(calibrated(*given)) or seen[-1])
    low = Stage(steps=2, precision="auto", chunk=4)
    cfg = nano_flux2.build(nano_dir, iterations=1, evaluate=Evaluate(every=0), explore=low)
    train.train(cfg, tmp_path / "run", devices=1)
    assert json.loads((tmp_path / "run/config.json").read_text())["explore"]["precision"] == "fp8"
    (model,) = seen
    spec = jax.eval_shape(model.init, jax.random.key(0))
    chosen = {path.removesuffix("/kernel") for path in quant.chosen(spec, model.quant_rules.fp8)}
    units = dict(model.quant_rules.fp8.units)
    assert chosen <= units.keys() and all(np.log2(unit) % 1 == 0 for unit in units.values())
    assert chosen == {f"{stack}/{name}" for stack, names in NAMES.items() for name in names}


@pytest.mark.long
def test_errors_of_the_low_precisions(nano_dir):
    """With the text's projection computed before, as in a rollout."""
    cfg = nano_flux2.build(nano_dir).model
    model, (base, _, _) = flux2.make(cfg), flux2.load(cfg)
    base = jax.tree.map(jnp.asarray, base)
    cond = {"text": jnp.asarray(np.random.default_rng(0).normal(size=(2, 512, 96)), jnp.float32)}
    x, sigma = jax.random.normal(jax.random.key(0), (2, 4, 4, 16)), jnp.array([0.9, 0.4])
    model = calibrated(model, {"params": base}, cond, jax.random.key(1), [Stage(2, "euler", "bf16", 4)])
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
    found, how = [], config.Lora(4)
    for remat, keeps in ((False, ()), (True, ("attention",)), (True, ("attention", "qkv", "mlp"))):
        model = flux2.make(nano_flux2.model(nano_dir / "flux2", remat=remat, remat_keeps=keeps))
        base = nano.random(jax.eval_shape(model.init, jax.random.key(0)), 1)
        spec = jax.eval_shape(lambda b, m=model: lora.init(jax.random.key(0), b, m.lora_targets, how), base)
        adapter = nano.random(spec, 2)
        text, x = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((1, 512, 96), (1, 4, 4, 16))))

        def loss(adapter, base, cond, model=model, x=x):
            return jnp.sum(model.velocity(lora.policy(base, adapter, how), x, jnp.full((1,), 0.5), cond) ** 2)

        found.append(jax.jit(jax.grad(loss))(adapter, base, {"text": text}))
    assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(found[0]))
    for other in found[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max()), found[0], other
        )


@pytest.mark.slow
def test_sharded_weights(nano_dir):
    """A base over 2 devices, gathered at use, gives the velocity of a whole one."""
    cfg = nano_flux2.build(nano_dir)
    model, (base, _, _) = flux2.make(cfg.model), flux2.load(cfg.model)
    rng, found = np.random.default_rng(0), []
    cond = {"text": rng.normal(size=(4, 512, 96)).astype(np.float32)}
    x, sigma = rng.normal(size=(4, 4, 4, 16)).astype(np.float32), np.float32([0.9, 0.4, 0.5, 0.1])
    for shard in (1, 4):
        mesh = sharding.make_mesh(4, shard)
        with jax.set_mesh(mesh):
            variables = {"params": sharding.place(base, mesh)}
            specs = sharding.specs_of(variables), *[sharding.SPLIT] * 3
            call = jax.jit(sharding.over_data(model.velocity, specs, sharding.SPLIT))
            found.append(np.asarray(call(variables, *sharding.split((x, sigma, cond), mesh))))
    assert len(sharding.cuts(base)) == 12 + 2
    np.testing.assert_allclose(*found, atol=2e-5 * np.abs(found[0]).max())


def test_merging_a_layer_at_a_time(monkeypatch):
    """Of a stack whose A B would be wide, the same kernels."""
    w, a, b = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((3, 8, 6), (3, 8, 2), (3, 2, 6))))
    base, adapter = {"x": {"kernel": w}}, {"x": {"a": a, "b": b}}
    whole = lora.merged_kernels(base, adapter, config.Lora(2))["x/kernel"]
    monkeypatch.setattr(lora, "WIDE", w.size * 4 - 1)
    found = jax.jit(lambda *given: lora.merged_kernels(*given, config.Lora(2)))(base, adapter)["x/kernel"]
    np.testing.assert_allclose(found, whole, rtol=1e-6)
    assert np.abs(whole - w).max() > 0.1


# --- every mode by its command --------------------------------------------------------------------------------------


@pytest.fixture
def command(nano_dir, monkeypatch, capsys):
    """command(mode, *words) -> (exit code, output) with the small config."""
    made = nano_flux2.build(nano_dir, evaluate=Evaluate(every=0, prompts=4, steps=2, grid=2, chunk=4))
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
def test_every_mode(command, run, tmp_path):
    here = ("--devices=1", f"--run_dir={tmp_path / 'out'}")
    code, out = command("doctor", *here)
    assert code == 0 and "ready" in out, out
    code, out = command("plan", "--devices=1")
    assert code == 0 and "TFLOP an image: forward" in out, out
    code, out = command("eval", "--devices=1", f"--run_dir={run}", "--guidance=4", "--negative=a dog")
    assert code == 0 and "clipscore" in out, out
    code, out = command("sample", *here, f"--lora={run}", "--prompt=a red circle", "--guidance=4")
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
    assert code == 0 and found["passed"] and set(found["differences"]) == {"1", "4"}, out
    assert max(each["latents_relative_rms"] for each in found["differences"].values()) < 1e-4
    assert found["against"]["by"] == "diffusers"
