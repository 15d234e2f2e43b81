"""--mode=prove: its JSON, the picture beside diffusers' and beside a stored one, and what it refuses."""

import dataclasses
import json
import sys
import types

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from safetensors.numpy import save_file

from solrl_jax import config, main, plan
from solrl_jax.config import ConfigError, Stage
from solrl_jax.quant import coverage
from solrl_jax.run import assemble, prove, prove_picture
from tests import nano, nano_sana, nano_sd35, test_train
from tests.test_train import compiled  # noqa: F401 - small programs are compiled once

BUILD = {"flux": nano.build, "sd35": nano_sd35.build, "sana": nano_sana.build}


# --- the command, on a toy ------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """command(*words) -> (exit code, output, error) on test_train's toy, guided, whose folder names a scheduler."""
    monkeypatch.chdir(tmp_path)
    model = test_train.TOY._replace(guidance="cfg", guided=3.0)
    monkeypatch.setattr(test_train, "TOY", model)
    made = test_train.world(monkeypatch, tmp_path)
    folder = tmp_path / "toy"
    for part in ("transformer", "vae", "text_encoder"):
        (folder / part).mkdir(parents=True)
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save_file({"x": np.zeros(3, np.float32)}, folder / part / f"{stem}.safetensors")
    (folder / "scheduler").mkdir()
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"}))
    module = assemble.model_module(made)
    module.shapes = lambda cfg: jax.eval_shape(lambda: test_train.load(cfg, lambda path, x: x.read(...), None))
    module.token_shapes = lambda cfg, count: jax.ShapeDtypeStruct((count, 12), np.int32)
    monkeypatch.setattr(assemble, "model_module", lambda cfg: module)
    monkeypatch.setattr(coverage, "check", lambda *_: None)  # the toy has no Linear
    made = dataclasses.replace(made, model=dataclasses.replace(made.model, path=str(folder), dtype="float32"))
    monkeypatch.setattr(config, "load", lambda spec, overrides: config.override(made, **overrides))

    def run(*words):
        with flagsaver.flagsaver():
            code = main.main(main.parse(["x", "--config=toy", "--mode=prove", "--devices=1", *words]))
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_json(command, tmp_path):
    code, out, err = command("--out=a/p.json")
    assert code == 0, err
    found = json.loads((tmp_path / "a/p.json").read_text())
    print(json.dumps(found, indent=1))
    print(out)
    import cProfile, pstats

    p = cProfile.Profile()
    p.enable()
    command()
    p.disable()
    pstats.Stats(p).sort_stats("cumulative").print_stats(70)
    assert 0
