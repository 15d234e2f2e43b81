"""What users get wrong, given to the command on a whole (nano) pipeline: exit code 2, the fix, nothing written."""

import json
import shutil
import struct

import numpy as np
import pytest
from absl.testing import flagsaver
from safetensors.numpy import load_file, save_file

from solrl_jax import config, main
from solrl_jax.run import assemble
from tests import nano


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a whole pipeline, CLIP and prompts."""
    folder = tmp_path_factory.mktemp("whole")
    nano.build(folder)
    return folder


@pytest.fixture
def command(whole, tmp_path, monkeypatch, capsys):
    """command(**overrides) -> (exit code, error) of a training run on a copy of the whole folder, `command.folder`."""
    folder = tmp_path / "world"
    shutil.copytree(whole, folder)
    made = nano.build(folder)
    monkeypatch.setattr(config, "load", lambda spec, overrides: config.override(made, **overrides))

    def run(**overrides):
        words = [f"--config.{name}={value}" for name, value in overrides.items()]
        with flagsaver.flagsaver():
            code = main.main(main.parse(["x", "--config=nano", "--devices=1", f"--run_dir={tmp_path / 'run'}", *words]))
        return code, capsys.readouterr().err

    run.folder = folder
    yield run
    assert not (tmp_path / "run").exists()


TRANSFORMER = "pipeline/transformer/diffusion_pytorch_model.safetensors"
CLIP = "clip/model.safetensors"
KEY = "transformer_blocks.0.attn.to_q.weight"


def without(file):
    tensors = load_file(file)
    del tensors[KEY]
    save_file(tensors, file)


def with_one_more(file):
    save_file({**load_file(file), "left.over.weight": np.zeros(3, np.float32)}, file)


def of_another_shape(file):
    tensors = load_file(file)
    save_file({**tensors, KEY: np.zeros((3, 5), np.float32)}, file)


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-100])


def cut_in_its_header(file):
    file.write_bytes(file.read_bytes()[:20])


def not_safetensors(file):
    file.write_bytes(struct.pack("<Q", 1 << 60) + b"version https://git-lfs.github.com/spec/v1")


def gone(file):
    file.unlink()


def folder_gone(file):
    shutil.rmtree(file.parent)


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        (TRANSFORMER, without, ["pipeline/transformer does not hold the weights", KEY]),
        (TRANSFORMER, with_one_more, ["left.over.weight"]),
        (TRANSFORMER, of_another_shape, [f"{KEY} has shape (5, 3), not (32, 32)"]),
        (TRANSFORMER, cut_short, [TRANSFORMER, "is not a complete safetensors file", "download it again"]),
        (TRANSFORMER, cut_in_its_header, [TRANSFORMER, "download it again"]),
        (TRANSFORMER, not_safetensors, [TRANSFORMER, "download it again"]),
        (TRANSFORMER, gone, ["transformer"]),
        (TRANSFORMER, folder_gone, ["transformer"]),
        ("pipeline/vae/diffusion_pytorch_model.safetensors", cut_short, ["vae"]),
        ("pipeline/text_encoder_2/model.safetensors", gone, ["text_encoder_2"]),
        ("pipeline/tokenizer/vocab.json", folder_gone, ["tokenizer"]),
        ("pipeline/scheduler/scheduler_config.json", gone, ["scheduler_config.json"]),
        (CLIP, cut_short, ["clip", "reward_paths: clipscore="]),
        (CLIP, gone, ["clip", "reward_paths: clipscore="]),
        ("clip/config.json", gone, ["clip", "reward_paths: clipscore="]),
    ],
)
def test_damaged_files_are_named(command, file, damage, words):
    damage(command.folder / file)
    code, error = command()
    assert code == 2 and error.startswith("error: ") and len(error.splitlines()) <= 2, error  # a second lists keys
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.path": "nowhere"}, "nowhere"),
        ({"reward_paths": "clipscore=nowhere"}, "nowhere"),
        ({"prompt_files": "nowhere"}, "nowhere does not exist"),
        ({"kept": "10"}, "kept=10 of candidates=8: keep 2 to 8"),
        ({"kept": "3"}, "kept=3 is odd: best_worst keeps K/2 best and K/2 worst; use kept=4"),
        ({"explore.steps": "0"}, "steps=0: a rollout takes at least one step"),
        ({"regenerate.steps": "0"}, "steps=0: a rollout takes at least one step"),
        ({"model.size": "13"}, "model.size=13: use a multiple of 4 pixels"),
        (
            {"model.path": "org/flux"},
            "org/flux is not a folder here and not complete in the hub's cache, and HF_HUB_OFFLINE is",
        ),
        ({"reward_paths": "clipscore=org/clip"}, "org/clip is not a folder here"),
        ({"reward": "pikscore"}, "unknown reward 'pikscore' in 'pikscore': use one of clipscore"),
        ({"reward": "clipscore:0"}, "weight '0' of reward 'clipscore': give a finite number other than 0"),
        ({"reward": "clipscore:nan"}, "weight 'nan' of reward 'clipscore'"),
        ({"reward": "clipscore,clipscore:2"}, "reward 'clipscore' is twice"),
        ({"reward": ""}, "reward is empty: name what to train on"),
        ({"reward": "mine.py"}, "mine.py"),
        ({"reward_paths": "clipscore"}, "reward_paths='clipscore': give name=folder"),
        ({"reward_paths": "aesthetics=x"}, "reward_paths='aesthetics=x': give name=folder, the name one of"),
        ({"reward_dtype": "float16"}, "reward_dtype=float16: use one of float32, float32_exact, bfloat16"),
        ({"seed": str(2**32)}, "seed=4294967296: 0 or more and below 2**32"),
        ({"learn.advantage_clip": "inf"}, "learn.advantage_clip=inf: a positive number, finite"),
        ({"learn.strength": "inf"}, "learn.strength=inf: a positive number, finite"),
        ({"evaluate.rewards": "beauty"}, "unknown reward 'beauty'"),
        ({"reward_unused": "ocr,ocrr"}, "unknown reward 'ocrr' in 'reward_unused=ocr,ocrr': use one of clipscore, hps"),
        ({"reward_unused": "my..judge"}, "reward 'my..judge' is not a dotted name: give package.module, or module.fu"),
        ({"reward_unused": "experiments.emoji.juge"}, "reward_unused=experiments.emoji.juge: no prompt asks for expe"),
        (
            {"reward_unused": "ocr,clipscore"},
            "reward_unused=ocr,clipscore: clipscore is in reward=clipscore too, so the run does not do without it: "
            "take it out of one of them",
        ),
        (
            {"reward_unused": "shapes", "evaluate.rewards": "shapes:2"},
            "reward_unused=shapes: shapes is in evaluate.rewards=shapes:2 too",
        ),
        ({"evaluate.prompts": "99"}, "evaluate.prompts=99, but"),
        ({"evaluate.solver": "sde"}, "evaluate.solver=sde: use one of euler, dpm1, dpm2"),
        ({"evaluate.grid": "0"}, "evaluate.grid=0: give 1 or more"),
        ({"prompts": "9"}, "prompts=9, but"),
        ({"prompts": "0"}, "prompts=0: give 1 or more"),
        ({"prompts": "four"}, "prompts=four: needs int"),
        ({"prompts": "4.5"}, "prompts=4.5: needs int"),
        ({"candidates": "-8"}, "candidates=-8: draw 2 or more of a prompt"),
        ({"explore.steps": "2.5"}, "explore.steps=2.5: needs int"),
        ({"explore.precision": "int4"}, "explore.precision=int4: use one of auto, bf16, fp8"),
        ({"explore.precision": "fp8"}, "explore.precision fp8 needs a GPU"),
        ({"explore.precision": "nvfp4_native"}, "explore.precision nvfp4_native needs a GPU"),
        ({"explore.chunk": "3"}, "explore.chunk=3 neither divides a prompt's 8 images"),
        ({"explore.eta": "0.5"}, "eta=0.5: dpm2 takes 0 only, it solves the ODE"),
        ({"explore": "7"}, "explore=7: set its fields one by one, or none"),
        ({"regenerate": "none"}, "regenerate=none"),
        ({"regenerate.solver": "rk4"}, "regenerate.solver=rk4: use one of euler"),
        ({"selection": "best"}, "selection=best: use one of best_worst"),
        ({"selection": "all"}, "selection=all keeps every candidate: set kept=8"),
        ({"model.name": "sdxl"}, "model.name=sdxl: there is no such model; use one of flux, "),
        ({"model.path": ""}, "no model is given"),
        ({"model.size": "-16"}, "model.size=-16: give pixels, 1 or more"),
        ({"model.size": "16px"}, "model.size=16px: needs int"),
        ({"model.text_tokens": "0"}, "model.text_tokens=0: give 1 or more"),
        ({"model.dtype": "bf16"}, "model.dtype=bf16: use one of bfloat16, float32"),
        ({"model.remat": "yes"}, "model.remat=yes: use true or false"),
        ({"model.remat_keeps": "attention,everything"}, "use some of attention, qkv, mlp, or auto"),
        ({"model.remat_keeps": "attention,auto"}, "use some of attention, qkv, mlp, or auto"),
        ({"model.min_quantised_flops": "1.5"}, "model.min_quantised_flops is a share, 0 to 1"),
        ({"model.min_dim": "4096", "model.min_quantised_flops": "0.9"}, "model.min_dim"),
        ({"lora.rank": "0"}, "lora.rank=0: give 1 or more"),
        ({"lora.alpha": "inf"}, "lora.alpha=inf: give a positive number"),
        ({"lora.targets": "to_qq"}, "to_qq"),
        ({"learn.learning_rate": "nan"}, "learn.learning_rate=nan: give a finite number, 0 or more"),
        ({"learn.learning_rate": "3e-4x"}, "learn.learning_rate=3e-4x: needs float"),
        ({"learn.updates": "3"}, "learn.updates=3 does not divide kept=4"),
        ({"learn.micro_batch": "7"}, "learn.micro_batch=7"),
        ({"learn.timestep_fraction": "1.5"}, "learn.timestep_fraction=1.5: above 0, at most 1"),
        ({"learn.timestep_fraction": "0.1"}, "no time of 3 steps is trained, raise it"),
        ({"learn.ema_max": "1"}, "learn.ema_max=1.0: 0 (no average) up to below 1"),
        ({"learn.algorithm": "ppo"}, "learn.algorithm=ppo: use one of nft, awm, vgrpo, flow_grpo, dance_grpo"),
        ({"learn.algorithm": "dance_grpo"}, "learn.algorithm=dance_grpo needs the probability of a step"),
        ({"learn.beta": "1"}, "no field 'beta' in Learn"),
        ({"learn": "1"}, "learn=1: set its fields, e.g. --config.learn.algorithm=..."),
        ({"seed": "-1"}, "seed=-1: 0 or more"),
        ({"keep": "0"}, "keep=0: keep at least one checkpoint"),
        ({"wandb": "a/b/c"}, "wandb=a/b/c: a project's name, or entity/project"),
        ({"iterations": "0"}, "iterations=0: 1 or more; --mode=eval draws without training"),
        ({"iterations": "many"}, "iterations=many: needs int"),
        ({"watch.rank": "2"}, "watch.rank=2.0: a rank correlation, -1 to 1"),
        ({"sede": "1"}, "no field 'sede' in Config; did you mean seed?"),
        ({"explore.stepz": "1"}, "no field 'stepz' in Stage; did you mean steps?"),
        ({"prompts.x": "1"}, "prompts has no fields here (it is a single value)"),
    ],
)
def test_bad_values_are_answered_with_the_rule(command, overrides, message):
    code, error = command(**overrides)
    assert code == 2 and error.startswith("error: ") and len(error.splitlines()) == 1 and message in error, error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no prompts"),
        (b"\n  \n", "no prompts"),
        (b"a red circle\n\xff\xfe\x00bad\n", "prompts.txt"),
    ],
)
def test_prompt_files_that_are_empty_or_not_text(command, content, message):
    (command.folder / "prompts.txt").write_bytes(content)
    code, error = command()
    assert code == 2 and message in error and len(error.splitlines()) == 1, error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"prompt": "a red circle"}\n{"text": "a blue square"}\n',
            'train_metadata.jsonl, line 2: no "prompt", it has text',
        ),
        (b'{"prompt": "a red circle"}\na blue square\n', "train_metadata.jsonl, line 2: not JSON at column 1"),
        (b'{"prompt": "a red \xff"}\n', "train_metadata.jsonl, line 1: byte 19 (0xff) is not UTF-8"),
        (None, "holds neither train.txt nor train_metadata.jsonl"),
    ],
)
def test_folders_of_json_lines(command, content, message):
    if content is not None:
        (command.folder / "train_metadata.jsonl").write_bytes(content)
    code, error = command(prompt_files=str(command.folder))
    assert code == 2 and message in error and len(error.splitlines()) == 1, error


@pytest.mark.parametrize(
    ("file", "kind", "message"),
    [
        ("model_index.json", "StableDiffusion3Pipeline", "holds a StableDiffusion3Pipeline, not a FluxPipeline: "),
        ("model_index.json", "SanaPipeline", "holds a SanaPipeline, not a FluxPipeline: "),
        ("transformer/config.json", "SanaTransformer2DModel", "holds a SanaTransformer2DModel, not a FluxTransformer"),
    ],
)
def test_the_folder_of_another_model(command, file, kind, message):
    (command.folder / "pipeline" / file).write_text(json.dumps({"_class_name": kind}))
    code, error = command()
    assert code == 2 and message in error and len(error.splitlines()) == 1, error


@pytest.mark.parametrize("file", ["pipeline/model_index.json", "pipeline/transformer/config.json", "clip/config.json"])
def test_json_that_is_nested_too_deep(command, file):
    (command.folder / file).write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    code, error = command()
    assert code == 2 and f"{file} is not JSON (maximum recursion depth" in error and len(error.splitlines()) == 1, error


def test_an_over_long_prompt_is_cut_and_said(whole, tmp_path):
    """The run goes on: the text encoders' limits are the model's, and the user is told which prompts lose words."""
    long = "a red circle left of a blue square " * 4
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*nano.PROMPTS, long]) + "\n")
    parts = assemble.assemble(nano.build(whole, prompt_files=str(file)), 1)
    said = [line for line in assemble.notes(parts) if "are cut" in line]
    # 8 tokens: six words besides CLIP's two marks; T5 cuts words that are rare in the nano vocabulary to pieces.
    assert [line.split(" reads")[0] for line in said] == [
        "2 prompts are longer than clip",
        "6 prompts are longer than t5",
    ]
    assert all("reads and are cut, e.g. 'a " in line for line in said)
    assert assemble.cut(parts, [long])[0].startswith("1 prompts are longer than clip reads and are cut, e.g. 'a red")
