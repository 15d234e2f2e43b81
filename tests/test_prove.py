"""--mode=prove: its JSON, the picture beside diffusers' and beside a stored one, and what it refuses."""

import dataclasses
import functools
import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from solrl_jax import config, main, plan
from solrl_jax.plan import shapes
from solrl_jax.quant import coverage
from solrl_jax.run import assemble, prove, prove_diffusers, prove_picture, prove_stages
from tests import nano, nano_sana, nano_sd35, toy_world

pytestmark = pytest.mark.usefixtures("compiled")

BUILD = {"flux": nano.build, "sd35": nano_sd35.build, "sana": nano_sana.build}
PROMPT = "--prompt=a small blue square"


def started(made, monkeypatch, capsys):
    """command(*words) -> (exit code, output, error) of --mode=prove with the config `made`."""
    monkeypatch.setattr(config, "load", lambda spec, overrides: config.override(made, **overrides))

    def run(*words):
        capsys.readouterr()
        with flagsaver.flagsaver():
            code = main.main(main.parse(["x", "--config=x", "--mode=prove", "--devices=1", *words]))
        return code, *capsys.readouterr()

    return run


def picture_alone(monkeypatch):
    """The other parts, which compile most of the programs, are left out."""
    monkeypatch.setattr(prove_stages, "measured", lambda parts, plans: {"ran": True, "prompts": 1, **NOTHING})
    ranks = {"precision": "bf16", "prompts": 0, "candidates": 0, "reward": "none", "forms": {}}
    monkeypatch.setattr(prove, "ranks", lambda parts, cfg: dict(ranks))


NOTHING = {"memory": "unknown", "time": "unknown", "stages": {}}


def read(file):
    return json.loads(Path(file).read_text())


# --- on a toy -------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch, tmp_path, capsys):
    """The command on toy_world's, guided; its folder has a scheduler and files for weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy_world, "TOY", toy_world.TOY._replace(guidance="cfg", guided=3.0))
    made, folder = toy_world.world(monkeypatch, tmp_path), tmp_path / "toy"
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        (folder / part).mkdir(parents=True)
        save_file({"x": np.zeros(3, np.float32)}, folder / part / f"{stem}.safetensors")
    (folder / "text_encoder").mkdir()
    save_file({"x": np.zeros(3, np.float32)}, folder / "text_encoder/model.safetensors")
    (folder / "scheduler").mkdir()
    kind = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(kind))
    module = assemble.model_module(made)
    module.shapes = lambda cfg: jax.eval_shape(lambda: toy_world.load(cfg, lambda path, x: x.read(...), None))
    module.token_shapes = lambda cfg, count: jax.ShapeDtypeStruct((count, 12), np.int32)
    monkeypatch.setattr(assemble, "model_module", lambda cfg: module)
    monkeypatch.setattr(coverage, "check", lambda *_: None)  # the toy has no Linear
    model = dataclasses.replace(made.model, path=str(folder), dtype="float32")
    return started(dataclasses.replace(made, model=model), monkeypatch, capsys)


@pytest.mark.slow
def test_the_json_has_every_part(toy, tmp_path, monkeypatch):
    """Diffusers has no toy, which is said and is no pass; what is stored serves a second command."""
    code, out, err = toy("--out=a/p.json", PROMPT)
    assert code == 0, err
    found = read("a/p.json")
    assert found["format"] == 1 and {"date", "commit", "versions", "device", "config"} < found.keys()
    assert found["versions"]["jax"] == jax.__version__ and found["device"] | {"bytes": None} == found["device"]
    assert found["device"]["platform"] == "cpu" and found["config"]["model"]["path"] == "toy"
    assert str(tmp_path) not in Path("a/p.json").read_text()
    files = found["weights"]
    assert len(files) == 3 and all(len(x["sha256"]) == 64 and x["bytes"] > 0 for x in files.values())

    run = found["stages"]
    assert list(run["stages"]) == ["encode", "quantise", "explore", "regenerate", "learn"]
    for name, row in run["stages"].items():
        assert 0 < row["seconds"] < row["first_seconds"], name  # the first time it is compiled
        assert row["peak_bytes"] is row["rose"] is row["planned_seconds"] is None and row["planned_bytes"] > 0
    assert (run["prompts"], run["candidates"], run["kept"]) == (1, 4, 2) and run["decode"]["seconds"] > 0
    assert run["memory"] == "unknown: a cpu does not tell" and run["time"].startswith("not planned: this device")

    rank = found["ranks"]
    assert (rank["prompts"], rank["candidates"], rank["kept"]) == (7, 4, 2)  # of 8 asked for, 7 are there
    assert rank["precision"] == "nvfp4_emulated" and list(rank["forms"]) == ["restart 6+10", "branch 5@3+4"]
    restart, branch = rank["forms"].values()
    assert restart.keys() == {"spearman", "overlap", "kept_contrast"} and branch.keys() > restart.keys()
    assert branch["spearman"] == 1 and -1 <= restart["spearman"] <= 1

    picture = found["picture"]
    assert picture["ran"] is False and "passed" not in picture and "a toy is not known here" in picture["why"]
    assert picture["asked"]["guidance"] == [1.0, 3.0] and picture["asked"]["prompt"] == "a small blue square"
    assert "picture: NOT COMPARED: how diffusers draws with a toy" in out and "a/p.json: post it" in out
    assert all(f"\n  {name} " in out for name in (*run["stages"], *rank["forms"]))

    picture_alone(monkeypatch)
    code, out, err = toy("--reference=a/p.json", PROMPT, "--out=again.json")
    again = read("again.json")["picture"]
    assert code == 0 and again["passed"] and again["against"]["by"] == "solrl_jax", err
    assert again["noise_largest"] == 0 and not Path("again.safetensors").exists()
    for w in ("1", "3"):
        each = again["differences"][w]
        assert each["latents_relative_rms"] == each["picture_largest"] == 0 and each["picture_psnr"] is None
        assert each["bound"] == {"latents_relative_rms": 1e-3, "picture_mean": 0.5}
    assert again["differences"]["1"]["latents_largest_value"] != again["differences"]["3"]["latents_largest_value"]

    load = toy_world.load
    monkeypatch.setattr(assemble.model_module(None), "load", lambda *a: perturbed(load(*a)))
    code, out, _ = toy("--reference=a/p.safetensors", PROMPT)
    assert code == 1 and "picture: OUT OF its bounds, against solrl_jax" in out
    assert not any(x["passed"] for x in read("prove.json")["picture"]["differences"].values())


def perturbed(trees, by=1.1):
    """The first kernel of the base, a tenth larger."""
    base, *rest = trees
    leaves, form = jax.tree.flatten(base)
    first = next(i for i, x in enumerate(leaves) if x.ndim > 1)
    leaves[first] = leaves[first] * by
    return form.unflatten(leaves), *rest


@pytest.mark.slow
def test_on_several_devices(toy, monkeypatch):
    """A prompt a device; the picture is the same, also with the base in parts."""
    code, _, err = toy(PROMPT, "--devices=2", "--config.prompts=4")
    found = read("prove.json")
    assert code == 0 and found["device"]["count"] == found["stages"]["prompts"] == 2, err
    assert found["ranks"]["prompts"] == 6  # of 7, as many as divide
    picture_alone(monkeypatch)
    for words in (["--devices=1"], ["--devices=4", "--config.shard=2"]):
        code, _, err = toy(PROMPT, *words, "--reference=prove.json", "--out=other.json")
        again = read("other.json")["picture"]
        assert code == 0 and all(x["latents_relative_rms"] < 1e-6 for x in again["differences"].values()), err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reference=nowhere.safetensors"], "--reference=nowhere.safetensors is not a file: give the .safetensors"),
        (["--reference=prompts.txt"], "is not a file that --mode=prove wrote (SafetensorError"),
        (["--reference=toy/vae/diffusion_pytorch_model.safetensors"], "is not a file that --mode=prove wrote ("),
        (["--reference=other.safetensors"], "of another picture: prompt is 'a fox' there and 'a small blue square'"),
        (["--out=here"], "--out=here: give a file that ends in .json, as in --out=prove.json"),
        (["--out=prompts.txt/p.json"], "prompts.txt is not a folder that can be written to"),
        (["--config.reward="], "reward is empty: name what to train on"),
        (["--config.candidates=2"], "candidates=2: previews of 4 or more are ranked"),
        (["--lora=x"], "--lora with --mode=prove, which draws with the base alone: leave it out"),
        (["--checkpoint=best"], "--checkpoint with --mode=prove"),
        (["--guidance=2"], "--guidance is for --mode=sample and --mode=eval"),
        (["--mode=plan", "--reference=x"], "--reference is for --mode=prove"),
    ],
)
def test_what_is_refused(toy, monkeypatch, words, message):
    """In one line, before weights are read; nothing is written."""
    monkeypatch.setattr(assemble, "open_weights", None)
    drawn = prove_diffusers.Drawn(np.zeros((4, 4, 1), np.float32), np.zeros((4, 4, 3), np.uint8))
    cfg = config.load("x", {})
    want = prove_picture.asked(cfg, "a fox")
    source = prove_diffusers.Source({"by": "x"}, {1.0: drawn, 3.0: drawn})
    prove_picture.store(Path("other.safetensors"), want, source, drawn.latents)
    code, _, err = toy(PROMPT, *words)
    assert code == 2 and err.startswith("error: ") and message in err and len(err.splitlines()) == 1, err
    assert not list(Path().glob("*.json"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("regenerate.steps", 7), ("model.size", 64), ("seed", 7), ("model.text_tokens", 4)],
)
def test_a_reference_of_another_picture(toy, field, value):
    cfg = config.load("x", {})
    drawn = prove_diffusers.Drawn(np.zeros((4, 4, 1), np.float32), np.zeros((4, 4, 3), np.uint8))
    source, file = prove_diffusers.Source({"by": "x"}, {1.0: drawn, 3.0: drawn}), Path("r.safetensors")
    prove_picture.store(file, prove_picture.asked(cfg, "a fox"), source, drawn.latents)
    assert prove_picture.stored(file, prove_picture.asked(cfg, "a fox")).source.told == {"by": "x"}
    other = prove_picture.asked(config.override(cfg, **{field: value}), "a fox")
    name = field.rpartition(".")[2]
    with pytest.raises(config.ConfigError, match=f"of another picture: {name} is .* there and {value} here: ask for"):
        prove_picture.stored(file, other)
    with pytest.raises(config.ConfigError, match="parameters is 256 there and 1 here"):
        prove_picture.stored(file, prove_picture.asked(cfg, "a fox") | {"parameters": 1})


@pytest.mark.parametrize(
    ("name", "prompts", "chunks"),
    [("flux", 8, (24, 24)), ("flux", 7, (24, 6)), ("flux:flow_grpo", 8, (24, 24)), ("tiny:diffusionnft", 8, (8, 8))],
)
def test_the_ranked_forms_of_a_config(name, prompts, chunks, tmp_path, monkeypatch):
    """Of any family; the chunks stay as large as they divide."""
    monkeypatch.setattr(coverage, "check", lambda *_: None)
    given = shapes.with_configs(config.load(name), tmp_path)
    for cfg, steps in zip((forms := prove.ranked_forms(given, prompts)).values(), (6, 5), strict=True):
        assert cfg.explore is not None and (cfg.explore.steps, cfg.regenerate.steps) == (steps, 10)
        assert cfg.explore.precision == "nvfp4_emulated" and cfg.regenerate.precision == "bf16"
        assert not cfg.explore.stochastic and not cfg.regenerate.stochastic and cfg.explore.solver == "dpm2"
        assert (cfg.explore.chunk, cfg.regenerate.chunk) == chunks
        assert cfg.kept == cfg.candidates // 4
    assert [cfg.branch for cfg in forms.values()] == [None, config.Branch(3, 4)]


@pytest.mark.parametrize(
    ("name", "points", "reference"),
    [("flux", 12, 4), ("sd35", 6, 4), ("sana", None, None), ("tiny:flow_grpo", None, None)],
)
def test_one_prompt_of_a_config(name, points, reference):
    """All that a stage takes at a time stays, if one prompt divides into it."""
    given = config.load(name)
    for devices in (1, 8):
        cfg = prove_stages.one_prompt_each(given, devices)
        assert (cfg.prompts, cfg.candidates, cfg.kept) == (devices, given.candidates, given.kept)
        assert [stage for _, stage, _ in cfg.stages()] == [stage for _, stage, _ in given.stages()]
        assert cfg.branch == given.branch and cfg.learn.algorithm == given.learn.algorithm
        if points:
            assert (cfg.learn.micro_batch, cfg.learn.reference_every) == (points, reference)


def test_a_peak_is_a_stages_own_if_it_rose(monkeypatch):
    """Devices tell the most since the process began; the one with the most counts, and a silent one hides all."""
    use = plan.Use("", 1, 2, 3, 4, 5, Counter(), 7.0)
    uses, peaks = dict.fromkeys(("encode", "explore", "learn"), use), {"encode": 10, "explore": 30, "learn": 30}
    times = dict.fromkeys(uses, 9.0), dict.fromkeys(uses, 8.0)
    found = prove_stages.rows(uses, times, {"begin": 5, **peaks}, timed=True)
    assert [row.rose for row in found.values()] == [True, True, False]
    assert found["explore"] == prove_stages.Row(8.0, 9.0, 7.0, 30, True, 15)
    found = prove_stages.rows(uses, times, {"begin": None, **dict.fromkeys(peaks)}, timed=False)
    assert found["learn"] == prove_stages.Row(8.0, 9.0, None, None, None, 15)
    for sizes, most in (((3, 5), 5), ((3, None), None), ((0,), 0)):
        devices = [FakeDevice(None if x is None else {"peak_bytes_in_use": x}) for x in sizes]
        monkeypatch.setattr(jax, "local_devices", lambda devices=devices: devices)
        assert prove_stages.peak() == most


class FakeDevice:
    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_what_fails_keeps_what_was_measured(toy, monkeypatch):
    """diffusers that fails is exit code 1; without memory for it, it did not run; a device's error ends all."""

    def raised(error):
        def fail(*given):
            raise error

        return fail

    picture_alone(monkeypatch)
    monkeypatch.setitem(prove_diffusers.CALLS, "toy", None)
    for error, code, why in (
        (RuntimeError("no such file\nas x"), 1, "diffusers' pipeline failed (RuntimeError: no such file)"),
        (prove_diffusers.NoRoom("59 GB"), 0, "59 GB"),
    ):
        monkeypatch.setattr(prove_diffusers, "drawn", raised(error))
        found, out, err = toy(PROMPT)
        picture = read("prove.json")["picture"]
        assert found == code and picture["ran"] is False and picture["why"] == why, err
        assert f"picture: NOT COMPARED: {why}" in out and picture.get("passed") in (False, None)
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: of 3 GB")
    monkeypatch.setattr(prove, "ranks", raised(full))
    code, _, err = toy(PROMPT, "--out=full.json")
    assert code == 2 and err.startswith("error: ranks: the device's memory is full (RESOURCE_EXHAUSTED: of 3 GB)")
    assert "full.json has what was measured before it" in err
    assert [read("full.json")[part]["ran"] for part in ("stages", "ranks", "picture")] == [True, False, False]


def test_room_for_a_pipeline(monkeypatch):
    """torch's GPU if it has 4.8 bytes for each parameter and a GB, else the host, else the sizes are told."""

    class Torch:
        cuda = SimpleNamespace(is_available=lambda: True, mem_get_info=lambda: (40e9, 80e9))

    for parameters, host, place in ((8e9, 1e9, "cuda"), (8.2e9, 41e9, "cpu"), (12e9, math.inf, "cpu")):
        monkeypatch.setattr(prove_diffusers, "host_memory", lambda host=host: host)
        assert prove_diffusers.room_for(Torch, int(parameters)) == place
    monkeypatch.setattr(prove_diffusers, "host_memory", lambda: 50e9)
    with pytest.raises(
        prove_diffusers.NoRoom, match="take about 59 GB, 50 GB of the host's memory are free: run it on"
    ):
        prove_diffusers.room_for(Torch, int(12e9))
    monkeypatch.undo()
    assert 1e6 < prove_diffusers.host_memory() < 1e15


def test_what_a_pipeline_is_not_asked(toy, monkeypatch):
    """Other weights than its folder's."""
    cfg = config.override(config.load("x", {}), **{"model.name": "flux"})
    assert prove_diffusers.absent(cfg) == ""
    other = config.override(cfg, **{"model.weights": "w.safetensors"})
    assert "model.weights=w.safetensors are not the folder's" in prove_diffusers.absent(other)
    Path("toy/weights.json").write_text("{}")
    assert "toy is converted, which diffusers cannot read" in prove_diffusers.absent(cfg)


# --- beside diffusers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("prove")


@pytest.fixture
def pipeline(root, monkeypatch, capsys, tmp_path):
    """pipeline(name, **changes) -> the command on the nano pipeline of that name."""
    monkeypatch.chdir(tmp_path)

    def of(name, **changes):
        (root / name).mkdir(exist_ok=True)
        return started(BUILD[name](root / name, **changes), monkeypatch, capsys)

    return of


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_flux_beside_diffusers(pipeline, monkeypatch):
    """Within 1e-4 in float32; a wrong kernel is found; without diffusers only a stored picture can pass."""
    picture_alone(monkeypatch)
    command = pipeline("flux")
    code, out, err = command(PROMPT)
    found = read("prove.json")["picture"]
    assert code == 0 and found["passed"] and found["stored"] == "prove.safetensors, diffusers'", err
    assert found["against"]["dtype"] == found["ours"]["dtype"] == "float32"
    check_close(found, ["1", "3.5"])

    monkeypatch.setitem(sys.modules, "diffusers", None)
    code, out, _ = command(PROMPT, "--out=without.json")
    without = read("without.json")["picture"]
    assert code == 0 and without["ran"] is False and "passed" not in without and "differences" not in without
    assert "torch and diffusers are not both here (no diffusers): pip install" in without["why"]
    assert "picture: NOT COMPARED: torch and diffusers are not both here" in out
    code, _, _ = command(PROMPT, "--out=stored.json", "--reference=prove.json")
    stored = read("stored.json")["picture"]
    assert code == 0 and stored["against"] == found["against"]
    check_close(stored, ["1", "3.5"])

    monkeypatch.setattr(assemble, "open_weights", lambda *a, f=assemble.open_weights: perturbed(f(*a)))
    code, out, _ = command(PROMPT, "--out=wrong.json", "--reference=prove.json")
    wrong = read("wrong.json")["picture"]
    assert code == 1 and wrong["passed"] is False and "picture: OUT OF its bounds, against diffusers" in out
    assert all(each["latents_relative_rms"] > 2e-3 for each in wrong["differences"].values())


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
def test_weights_that_are_in_bfloat16(pipeline, monkeypatch, root):
    """Nothing is rounded when they are read: ours in float32 is held to the bound of float32, and finds a fault that
    the bound of bfloat16 does not see."""
    picture_alone(monkeypatch)
    command = pipeline("flux")
    shutil.copytree(root / "flux/pipeline", "pipeline")
    for file in Path("pipeline").rglob("*.safetensors"):
        save_torch({name: x.bfloat16() for name, x in load_torch(file).items()}, file, {"format": "pt"})
    low = "--config.model.path=pipeline", "--config.model.dtype=bfloat16", "--config.model.vae_dtype=bfloat16"
    code, out, err = command(PROMPT, *low)
    found = read("prove.json")["picture"]
    assert code == 0 and out.count("    ours in float32: latents ") == 2, err
    for each in found["differences"].values():
        exact, rms = each["ours_in_float32"], each["latents_relative_rms"]
        assert exact["latents_relative_rms"] < 1e-4 < 1e-3 < rms and exact["picture_largest"] <= 1
        assert exact["bound"] == {"latents_relative_rms": 1e-3, "picture_mean": 0.5}
        assert each["bf16_alone"]["latents_relative_rms"] == pytest.approx(rms, rel=0.02)
    fault = functools.partial(perturbed, by=1.05)
    monkeypatch.setattr(assemble, "open_weights", lambda *a, f=assemble.open_weights: fault(f(*a)))
    code, _, _ = command(PROMPT, *low, "--out=wrong.json")
    wrong = read("wrong.json")["picture"]["differences"].values()
    assert code == 1 and [each["passed"] for each in wrong] == [True] * 2
    assert [each["ours_in_float32"]["passed"] for each in wrong] == [False] * 2


def check_close(picture, weights):
    assert list(picture["differences"]) == weights
    for each in picture["differences"].values():
        assert each["latents_relative_rms"] < 1e-4 and each["picture_largest"] <= 1
        assert each["latents_largest"] < 1e-4 * each["latents_largest_value"]


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
def test_a_whole_command(pipeline, monkeypatch):
    """All of it on a small pipeline of FLUX.1, in float32, then the picture in bfloat16. The other models' pictures are
    compared in tests/test_guidance.py and by the every_mode of tests/test_flux2_run.py and tests/test_zimage_run.py."""
    command = pipeline("flux")
    code, _, err = command(PROMPT, "--config.prompt_files=")  # the built-in ones
    found = read("prove.json")
    assert code == 0, err
    check_close(found["picture"], ["1", "3.5"])
    assert [found[part]["ran"] for part in ("stages", "ranks", "picture")] == [True] * 3
    assert list(found["stages"]["stages"]) == ["encode", "quantise", "explore", "regenerate", "learn"]
    assert (found["ranks"]["prompts"], found["ranks"]["candidates"], found["ranks"]["kept"]) == (8, 8, 2)
    for form in found["ranks"]["forms"].values():
        assert all(math.isfinite(x) for x in form.values()) and 0 < form["spearman"] <= 1  # of random weights

    picture_alone(monkeypatch)
    low = "--config.model.dtype=bfloat16", "--config.model.vae_dtype=bfloat16"
    code, _, err = command(PROMPT, "--out=bf16.json", *low)
    rounded = read("bf16.json")["picture"]
    assert code == 0 and rounded["passed"], err
    for each in rounded["differences"].values():
        alone, bound = each["bf16_alone"], each["bound"]
        assert 1e-3 < each["latents_relative_rms"] < bound["latents_relative_rms"] < 0.1
        assert bound["latents_relative_rms"] == pytest.approx(5e-3 + 3 * alone["latents_relative_rms"])
        assert bound["picture_mean"] == pytest.approx(0.5 + 3 * alone["picture_mean"])
        assert each["ours_in_float32"]["latents_relative_rms"] < each["bound"]["latents_relative_rms"]
