"""--mode=doctor: what is whole is said to be, and everything that is not is named at once with what to do."""

import dataclasses
import json
import types
from collections import Counter
from pathlib import Path

import pytest

from solrl_jax import config, device, plan
from solrl_jax.plan import doctor, stages
from solrl_jax.run import assemble, convert
from tests import nano

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    return nano.build(tmp_path_factory.mktemp("nano"))


def told(cfg, run, capsys):
    """(exit code, lines before the end, what is to be done)"""
    code = doctor.run_doctor(cfg, run)
    lines = capsys.readouterr().out.splitlines()
    end = lines.index("ready") if "ready" in lines else lines.index("to do first:")
    return code, lines[:end], [line.removeprefix("- ") for line in lines[end + 1 :]]


def test_what_is_whole_is_ready(cfg, tmp_path, capsys):
    code, lines, todo = told(cfg, tmp_path / "run", capsys)
    assert code == 0 and todo == [] and all(line.startswith("ok    ") for line in lines)
    for words in (
        "explore: 2 dpm2 steps in nvfp4_emulated",
        "regenerate: 3 dpm2 steps in bf16",
        "4 prompts over ",
        "4 files of weights, 0.0 GB",
        "tokenizers: clip 24, t5 8",
        "reward clipscore: 0.0 GB",
        "8 training prompts, 8 test prompts",
    ):
        assert any(words in line for line in lines), words
    assert not (tmp_path / "run").exists()


def test_everything_that_is_wrong_is_told_at_once(cfg, tmp_path, capsys):
    """A cut file, a reward without weights, no prompts, sizes that do not divide, a precision that is not there."""
    import shutil

    shutil.copytree(cfg.model.path, tmp_path / "pipeline")
    file = tmp_path / "pipeline/transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    broken = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, path=str(tmp_path / "pipeline")),
        reward_paths=(f"clipscore={tmp_path / 'nothing'}",),
        prompt_files=str(tmp_path / "none.txt"),
        explore=dataclasses.replace(cfg.explore, precision="fp8"),
    )
    code, lines, todo = told(broken, tmp_path / "run", capsys)
    assert code == 1 and len(todo) == len(set(todo))
    for words in ("not a complete safetensors file", "reward clipscore: ", "none.txt does not exist", "fp8"):
        assert any(words in line for line in todo), (words, todo)
    assert any(line.startswith("ok    tokenizers") for line in lines)  # what is right is still said
    file.unlink()
    assert any("holds no diffusion_pytorch_model.safetensors" in line for line in told(broken, tmp_path, capsys)[2])


def test_what_cannot_be_checked_for_a_reason_above_is_no_second_problem(cfg, tmp_path, capsys):
    """Without the model neither its tokenizers nor the size of its checkpoints are known; the disk may be fine."""
    gone = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, path=str(tmp_path / "gone")))
    _, lines, todo = told(gone, tmp_path / "run", capsys)
    assert len([line for line in todo if "gone" in line]) == 1
    for name in ("tokenizers", "disk"):
        assert f"note  {name}: not checked, for a reason above" in lines


def test_prompts_that_ask_for_what_is_not_configured(cfg, tmp_path):
    rows = [{"prompt": f"a red circle {i}"} for i in range(cfg.prompts)]
    rows[1]["rewards"] = ["hpsv2"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = dataclasses.replace(cfg, prompt_files=str(tmp_path / "p.jsonl"))
    with pytest.raises(config.ConfigError, match="'a red circle 1' asks for reward 'hpsv2', which is not configured"):
        list(doctor.prompts(named, tmp_path, None))
    (found,) = doctor.judges(named, tmp_path, None)
    assert not found.fix


def test_rewards_are_asked_whether_they_can_read_the_prompts(cfg, tmp_path):
    """Those of the run, with their rows; without any, as far as a reward of this folder is read at all."""
    pytest.importorskip("rapidocr")
    asked = dataclasses.replace(cfg, reward="ocr", prompt_files=str(tmp_path / "p.jsonl"))

    def told(lines):
        (tmp_path / "p.jsonl").write_text(lines)
        (found,) = doctor.judges(asked, tmp_path, None)
        return found

    assert told('{"prompt": "a poster", "text": "SALE"}\n{"prompt": "a sign: \\"A\\""}') == (
        "reward ocr: on the host",
        "",
        False,
    )
    assert "reward ocr cannot read a prompt: 'a poster' asks for no text" in told('{"prompt": "a poster"}').fix
    assert told("\n") == ("reward ocr: on the host", "", False)  # that there is no prompt is another finding


@pytest.mark.slow
def test_weights_that_a_run_would_not_find_are_told(cfg, tmp_path, monkeypatch):
    """model.weights that is not there; a damaged converted folder; a name of which only configs were fetched."""
    import shutil

    def fixes(**changes):
        changed = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **changes))
        return [found.fix for found in doctor.examine(doctor.model, changed, tmp_path, None) if found.fix]

    assert fixes() == []
    (missing,) = fixes(weights=str(tmp_path / "no.safetensors"))
    assert "no.safetensors is not a file here, nor in the hub's cache: give one that is" in missing
    network = shutil.move(shutil.copytree(cfg.model.path, tmp_path / "bare") / WEIGHTS, tmp_path)
    assert fixes(path=str(tmp_path / "bare"), weights=str(network)) == []  # it is read in the place of the folder's

    convert.convert(assemble.model_module(cfg), cfg.model, tmp_path / "converted")
    assert fixes(path=str(tmp_path / "converted")) == []
    assert "leave it empty" in fixes(path=str(tmp_path / "converted"), weights=str(network))[0]
    assert "was converted for another config" in fixes(path=str(tmp_path / "converted"), dtype="bfloat16")[0]
    largest = max(
        (f for f in (tmp_path / "converted/weights").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:-1])
    assert "is not what was written" in fixes(path=str(tmp_path / "converted"))[0]

    root = tmp_path / "models--org--flux"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text("a" * 40)
    shutil.copytree(cfg.model.path, root / "snapshots" / ("a" * 40), ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert fixes(path="org/flux") == ["fetch org/flux: hf download org/flux, or let a run do it"]


def test_prompts_and_shards_over_devices(cfg, tmp_path):
    def found(devices, **changes):
        changed = dataclasses.replace(cfg, **changes)
        return [(x.text, x.fix) for x in doctor.examine(doctor.division, changed, tmp_path, devices)]

    assert found(2) == found(2, shard=2) == [("4 prompts over 2 devices", "")]
    assert found(1) == [("4 prompts over 1 device", "")]
    ((_, fix),) = found(2, shard=4)
    assert fix == "shard=4 does not divide 2 devices: use one of [1, 2], or other --devices"


def test_no_reward_and_no_model(tmp_path, capsys):
    code, _, todo = told(config.Config(), tmp_path, capsys)
    assert code == 1 and any("no model is given" in line for line in todo)
    assert any("give --config.reward, of clipscore" in line for line in todo)


def test_a_full_disk_and_one_that_is_not_ours(cfg, tmp_path, monkeypatch):
    usage = types.SimpleNamespace(free=1e9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage)
    found = list(doctor.disk(cfg, tmp_path / "a/b", None))
    assert found[0].fix.startswith(f"make room at {tmp_path}") and "1 GB free" in found[0].text
    usage.free = 1e12
    assert next(doctor.disk(cfg, tmp_path, None)).fix == ""
    (tmp_path / "file").touch()
    said = f"{tmp_path / 'file'} is not a folder that can be written to: name another --run_dir"
    assert next(doctor.disk(cfg, tmp_path / "file/run", None)).fix == said
    monkeypatch.setattr(doctor.os, "access", lambda place, how: False)
    said = f"{tmp_path} is not a folder that can be written to: name another --run_dir"
    assert next(doctor.disk(cfg, tmp_path, None)).fix == said


@pytest.mark.slow
def test_a_gpu_that_is_known_gives_memory_and_time(cfg, tmp_path, monkeypatch):
    card = plan.CARDS["H100 80GB"]
    monkeypatch.setattr(plan, "device_card", lambda: card)
    monkeypatch.setattr(assemble, "capability", lambda: None)
    text = [found.text for found in doctor.memory(cfg, tmp_path, 1)]
    assert text[0].startswith("memory: ") and f"of {plan.room(card) / 1e9:.1f} GB" in text[0]
    assert text[1].startswith("time: about ") and f"for all {cfg.iterations}" in text[1]
    monkeypatch.setattr(plan, "device_card", lambda: card._replace(memory=1e-4))
    found = list(doctor.examine(doctor.memory, cfg, tmp_path, 1))
    assert "this GPU is too small" in found[0].fix


def test_memory_traces_each_stage_once(cfg, tmp_path, monkeypatch):
    traced = []

    def use_of(stage, *_):
        traced.append(stage)
        return plan.Use(stage, *[0] * 4, activations=10**9, flops=Counter(), seconds=1.0)

    for module in (plan, stages):
        monkeypatch.setattr(module, "use_of", use_of)
    monkeypatch.setattr(plan, "device_card", lambda: plan.CARDS["H100 80GB"])
    monkeypatch.setattr(assemble, "capability", lambda: None)
    text, _ = [found.text for found in doctor.memory(cfg, tmp_path, 1)]
    assert text.startswith("memory: encode takes the most, 1.0 of ")
    assert traced == ["encode", "quantise", "explore", "regenerate", "learn", "evaluate"]


def test_old_packages_are_named(monkeypatch, cfg, tmp_path):
    assert doctor.minima()["jax"] == "0.10.2" and doctor.number("0.10.2.dev3") == (0, 10, 2)
    monkeypatch.setattr(doctor, "minima", lambda: {"jax": "99.1"})
    found = list(doctor.versions(cfg, tmp_path, None))
    assert "is older than the required 99.1" in found[1].text and "pip install -r" in found[1].fix


def test_an_installed_package_has_its_minima_with_it(monkeypatch, cfg, tmp_path):
    """Where there is no requirements.txt; where nothing says what is asked for, nothing is called compared."""
    monkeypatch.setattr(doctor, "REQUIREMENTS", tmp_path / "requirements.txt")
    (tmp_path / "solrl_jax-0.1.0.dist-info").mkdir()
    lines = ['jax[cuda12]>=99.1 ; sys_platform == "linux"', 'jax>=99.1; sys_platform != "linux"', "absl-py>=2.5"]
    head = ["Metadata-Version: 2.1", "Name: solrl_jax", "Version: 0.1.0"]
    text = "\n".join([*head, *(f"Requires-Dist: {line}" for line in lines)])
    (tmp_path / "solrl_jax-0.1.0.dist-info/METADATA").write_text(text + "\n")
    with monkeypatch.context() as here:
        here.syspath_prepend(tmp_path)
        assert doctor.minima() == {"jax": "99.1"}
        (old,) = [found for found in doctor.versions(cfg, tmp_path, None) if found.fix]
        assert "is older than the required 99.1" in old.text and "pip install 'jax>=99.1'" in old.fix
    assert doctor.minima() is None
    _, last = doctor.versions(cfg, tmp_path, None)
    assert last.text.startswith("versions were not compared: ") and last.mark == "note" and not last.fix


def test_what_was_not_compared_is_not_ok(cfg, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "REQUIREMENTS", tmp_path / "requirements.txt")
    code, lines, todo = told(cfg, tmp_path / "run", capsys)
    assert code == 0 and todo == [] and lines[1].startswith("note  versions were not compared: ")
    assert all(line.startswith("ok    ") for line in [lines[0], *lines[2:]])


def test_settings_that_a_gpu_lacks_are_named(cfg, tmp_path, monkeypatch):
    gpu = types.SimpleNamespace(platform="gpu", device_kind="H100", memory_stats=lambda: {"bytes_limit": 60e9})
    monkeypatch.setattr(doctor.jax, "devices", lambda: [gpu])
    monkeypatch.setattr(device, "absent", lambda: [])
    (found,) = doctor.hardware(cfg, tmp_path, None)
    assert found.text.endswith("JAX may take 60.0 GB of each") and not found.fix
    monkeypatch.setattr(device, "absent", lambda: ["XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"])
    _, found = doctor.hardware(cfg, tmp_path, None)
    assert found.text.endswith("are missing: XLA_PYTHON_CLIENT_MEM_FRACTION=0.92") and "device.setup()" in found.fix


def test_a_branch_says_where_its_samples_begin():
    found = [f.text for f in doctor.precision(config.load("tiny:branch"), Path("run"), 1)]
    assert found == [
        "explore: 5 dpm2 steps in nvfp4_emulated",
        "regenerate: 4 dpm2 steps in bf16, from the preview's state after step 3",
    ]
