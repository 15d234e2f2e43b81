"""Configs: validation with the fix in the message, overrides in the command line's words, JSON there and back."""

import dataclasses
import os
import subprocess
import sys

import jaxtyping
import numpy as np
import pytest

from solrl_jax import config, recipes
from solrl_jax.config import Config, ConfigError, Evaluate, Learn, Lora, Model, Stage, Watch

BASE = Config(name="base")


@pytest.fixture
def bare(monkeypatch):
    """Without the check of types that only tests have: as a user's Python calls it."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"name": "../there"},
            r"^name='../there': it becomes part of file names, so leave out /, \\, \.\. and control",
        ),
        ({"name": "a/b"}, r"^name='a/b': it becomes part"),
        ({"name": "a\\b"}, r"^name='a\\\\b': it becomes part"),
        ({"name": "a\0"}, r"^name='a\\x00': it becomes part"),
        ({"name": "a\udcff"}, r"^name='a\\udcff': it becomes part"),
        ({"name": "ä" * 101}, r"^name=ä{40}\.\.\.: give one of at most 200 bytes$"),
        ({"kept": "200"}, r"kept=200 of candidates=96: keep 2 to 96"),
        ({"candidates": "1", "kept": "1"}, r"candidates=1: draw 2 or more of a prompt"),
        ({"kept": "1", "selection": "top"}, r"kept=1 of candidates=96: keep 2 to 96, for an advantage is a difference"),
        ({"kept": "23"}, r"kept=23 is odd.*use kept=24"),
        ({"selection": "all"}, r"selection=all keeps every candidate: set kept=96"),
        ({"explore.chunk": "7"}, r"explore.chunk=7 neither divides a prompt's 96 images nor .*: use one of \[1, 2, 3,"),
        ({"learn.updates": "5"}, r"learn.updates=5 does not divide kept=24"),
        ({"learn.micro_batch": "7"}, r"learn.micro_batch=7 is neither a multiple nor a divisor"),
        ({"learn.timestep_fraction": "0.01"}, r"no time of 10 steps is trained, raise it"),
        ({"learn.clip_norm": "-1"}, r"learn.clip_norm=-1.0: give a positive number"),
        ({"learn.ema_max": "3"}, r"learn.ema_max=3.0: 0 \(no average\) up to below 1"),
        ({"learn.learning_rate": "nan"}, r"learn.learning_rate=nan: give a finite number, 0 or more"),
        ({"evaluate.grid": "0"}, r"evaluate.grid=0: give 1 or more"),
        ({"evaluate.images": "0"}, r"evaluate.images=0: give 1 or more"),
        ({"seed": "-1"}, r"seed=-1: 0 or more"),
        ({"save_every": "-1"}, r"save_every=-1"),
        ({"explroe.steps": "4"}, r"no field 'explroe' in Config; did you mean explore\?"),
        ({"explore.stepz": "4"}, r"no field 'stepz' in Stage; did you mean steps\? it has steps, solver"),
        ({"explore.steps": "four"}, r"--config.explore.steps=four: needs int"),
        ({"explore.solver": "rk4"}, r"use one of euler, dpm1, dpm2, ddim, sde, dance, cps, sa_solver"),
        ({"staged": "yes"}, r"use true or false"),
        ({"explore": "5"}, r"set its fields one by one, or none"),
        ({"learn": "5"}, r"set its fields, e.g. --config.learn.algorithm="),
        ({"seed.x": "5"}, r"seed has no fields here"),
    ],
)
def test_what_cannot_run_is_refused_with_its_mend(change, message):
    with pytest.raises(ConfigError, match=message):
        config.override(BASE, **change)


def test_names_with_spaces_colons_and_other_alphabets():
    for name in ("", "flux: 2.1", "ä" * 100, "a.b"):
        assert Config(name=name).name == name


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Stage, {"precision": "FP8"}, r"^precision='FP8': use one of auto, bf16, fp8, nvfp4_native, nvfp4_emulated$"),
        (Stage, {"solver": "heun"}, r"^solver='heun': use one of euler, dpm1, "),
        (Stage, {"steps": 2.0}, r"^steps=2.0: needs int$"),
        (Stage, {"steps": True}, r"^steps=True: needs int$"),
        (Stage, {"shared_noise": 1}, r"^shared_noise=1: needs bool$"),
        (Stage, {"eta": "0"}, r"^eta='0': needs float$"),
        (Stage, {"eta": False}, r"^eta=False: needs float$"),
        (Model, {"dtype": "float16"}, r"^model.dtype='float16': use one of bfloat16, float32$"),
        (Model, {"vae_dtype": "float16"}, r"^model.vae_dtype='float16': use one of bfloat16, float32$"),
        (Model, {"size": "512"}, r"^model.size='512': needs int$"),
        (Model, {"path": None}, r"^model.path=None: needs str$"),
        (Model, {"remat_keeps": "mlp"}, r"^model.remat_keeps='mlp': needs a tuple of str$"),
        (Learn, {"algorithm": "ppo"}, r"^learn.algorithm='ppo': use one of nft, awm, vgrpo, flow_grpo, dance_grpo$"),
        (Learn, {"advantage_spread": "none"}, r"^learn.advantage_spread='none': use one of all, prompt, "),
        (Learn, {"advantage_mode": "top"}, r"^learn.advantage_mode='top': use one of all, positive_only, "),
        (Learn, {"learning_rate": 10**400}, r"^learn.learning_rate=1000+: needs float$"),
        (Lora, {"targets": ("to_q", 1)}, r"^lora.targets=\('to_q', 1\): needs a tuple of str$"),
        (Evaluate, {"solver": "sde"}, r"^evaluate.solver='sde': use one of euler, dpm1, dpm2$"),
        (Watch, {"fall_back": "false"}, r"^watch.fall_back='false': needs bool$"),
        (Config, {"selection": "best"}, r"^selection='best': use one of best_worst, top, "),
        (Config, {"reward_dtype": "float16"}, r"^reward_dtype='float16': use one of float32, float32_exact, bfloat16$"),
        (Config, {"explore": {"steps": 6}}, r"^explore=\{'steps': 6\}: needs Stage$"),
        (Config, {"regenerate": None}, r"^regenerate=None: needs Stage$"),
        (Config, {"model": Lora()}, r"^model=Lora\(.*\): needs Model$"),
        (Config, {"seed": [1]}, r"^seed=\[1\]: needs int$"),
    ],
)
def test_what_is_made_in_python_is_checked_like_the_command_lines(bare, kind, values, message):
    with pytest.raises(ConfigError, match=message):
        kind(**values)
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(kind(), **values)


def test_every_field_of_every_class_is_checked(bare):
    """No field takes an object of no kind; what one takes by default it takes again."""
    made = 0
    for kind in (Model, Stage, Lora, Learn, Evaluate, Watch, Config):
        for field in dataclasses.fields(kind):
            with pytest.raises(ConfigError, match=rf"{field.name}=<object.*>: (needs|use one of) "):
                kind(**{field.name: object()})
            assert kind(**{field.name: getattr(kind(), field.name)}) == kind()
            made += 1
    assert made > 70, made


def test_numbers_become_the_fields_own(bare):
    """An int for a float, numpy's numbers, a list of names: the same config, hash and JSON as with plain ones."""
    plain = Config(lora=Lora(alpha=64.0, rank=4, targets=("to_q",)), seed=3)
    other = Config(lora=Lora(alpha=64, rank=np.int64(4), targets=["to_q"]), seed=np.uint32(3))
    assert (type(other.lora.alpha), type(other.lora.rank), type(other.seed)) == (float, int, int)
    assert other == plain and hash(other) == hash(plain) and config.to_json(other) == config.to_json(plain)
    assert Lora(alpha=np.float32(0.5)).alpha == 0.5
    assert config.from_json(config.to_json(other)) == other
    with pytest.raises(ConfigError, match=r"^lora.rank=True: needs int$"):
        Lora(rank=True)


def test_json_of_wrong_values_names_their_place():
    """By their whole path, also of a stage, which does not know its own name."""
    for text, message in (
        ('{"explore": {"precision": "FP8"}}', r"^explore.precision='FP8': use one of auto, bf16, "),
        ('{"regenerate": {"steps": 2.5}}', r"^regenerate.steps=2.5: needs int$"),
        ('{"lora": {"targets": "to_q"}}', r"^lora.targets='to_q': needs a tuple of str$"),
        ('{"lora": 5}', r"^lora=5: needs Lora$"),
        ('{"explore": [6]}', r"^explore=\[6\]: needs Stage$"),
        ('{"regenerate": null}', r"^regenerate=None: needs Stage$"),
        ('{"explore": {"stepz": 6}}', r"unknown fields explore.stepz"),
    ):
        with pytest.raises(ConfigError, match=message):
            config.from_json(text)


def test_overrides_are_applied_together():
    new = config.override(BASE, candidates="8", kept="4", **{"explore.chunk": "8", "regenerate.chunk": "4"})
    assert (new.candidates, new.kept, new.explore.chunk, new.regenerate.chunk) == (8, 4, 8, 4)
    assert config.override(BASE, explore="none", **{"regenerate.chunk": "96"}).explore is None
    assert config.override(BASE, reward_paths="a=b,c=d").reward_paths == ("a=b", "c=d")


@pytest.mark.parametrize("name", [*recipes.FAMILIES, *recipes.METHODS])
def test_families_and_json_both_ways(name):
    made = recipes.family(BASE, name)
    assert config.from_json(config.to_json(made)) == made
    assert hash(made) == hash(config.from_json(config.to_json(made)))


def test_json_of_another_version_or_of_nothing():
    with pytest.raises(ConfigError, match=r"unknown fields learn.beta.*another version"):
        config.from_json('{"learn": {"beta": 1}}')
    with pytest.raises(ConfigError, match="not the JSON of a config"):
        config.from_json("{")
    with pytest.raises(ConfigError, match="not the JSON of a config: maximum recursion depth"):
        config.from_json("[" * 100_000)
    assert config.from_json("{}") == Config()


def test_differences_name_single_values():
    other = dataclasses.replace(BASE, explore=Stage(steps=4), learn=Learn(kl_weight=0.5), evaluate=Evaluate(every=3))
    found = config.differences(BASE, other)
    assert found["explore.steps"] == (6, 4) and found["learn.kl_weight"] == (1e-4, 0.5)
    assert found["evaluate.every"] == (20, 3) and "seed" not in found
    assert config.differences(BASE, BASE) == {}
    gone = config.differences(BASE, config.override(BASE, explore="none", **{"regenerate.chunk": "96"}))
    assert gone["explore.steps"] == (6, None)


def test_load_by_name_recipe_and_override(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "available", lambda: ["nowhere"])
    with pytest.raises(ConfigError, match=r"--config=somewhere: there is no configs/somewhere.py; use one of nowhere"):
        config.load("somewhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch.after": "5"}, r"branch.after=5 of explore.steps=5: branch before the last step, .* after 4 or fewer"),
        ({"branch.after": "0"}, r"branch.after=0: 1 or more; to begin again from the noise, branch=none"),
        ({"branch.steps": "0"}, r"branch.steps=0: a sample takes at least one step after the branch"),
        ({"explore": "none"}, r"branch.after=3 of no preview: set branch=none, or take a family with explore"),
        (
            {"explore.solver": "euler"},
            r"explore.solver=euler, regenerate.solver=dpm2: a branch is one solve, give both the same",
        ),
        ({"regenerate.shift": "3"}, r"explore.shift=0.0, regenerate.shift=3.0: a branch is one solve"),
        (
            {"explore.solver": "sde", "regenerate.solver": "sde"},
            r"explore.solver=sde: a branch takes an ODE's state, use one of euler, dpm1, dpm2",
        ),
        ({"regenerate.solver": "cps"}, r"regenerate.solver=cps: a branch takes an ODE's state"),
    ],
)
def test_a_branch_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config.override(config.load("flux:branch"), **changes)


def test_a_branch_is_sol_rl_but_for_its_steps():
    sol_rl, branch = config.load("flux:sol_rl"), config.load("flux:branch")
    assert config.differences(sol_rl, branch) == {
        "explore.steps": (6, 5),
        "branch.after": (None, 3),
        "branch.steps": (None, 4),
    }
    assert branch.times == sol_rl.times == 4  # of the grid of 10 steps
    assert [(name, stage.steps, n) for name, stage, n in branch.stages()] == [("explore", 5, 96), ("regenerate", 4, 24)]
    assert config.override(branch, branch="none", **{"explore.steps": "6"}) == sol_rl
    assert config.override(branch, **{"branch.after": "2"}).branch == config.Branch(2, 4)


FLUX = [f"{f}_{r}" for f in recipes.NAMES for r in ("clipscore", "pickscore", "hpsv2", "imagereward")]


def test_flux_is_the_published_run():
    cfg = config.load("flux:sol_rl")
    assert (cfg.model.path, cfg.model.size, cfg.model.text_tokens) == ("black-forest-labs/FLUX.1-dev", 512, 128)
    assert (cfg.model.min_dim, cfg.model.remat, cfg.seed, cfg.selection) == (1000, True, 42, "best_worst")
    assert (cfg.prompts, cfg.candidates, cfg.kept, cfg.times) == (48, 96, 24, 4)
    assert cfg.explore == Stage(6, "dpm2", "auto", 24) and cfg.regenerate == Stage(10, "dpm2", "bf16", 24)
    assert (cfg.lora.rank, cfg.lora.alpha, cfg.lora.targets) == (32, 64.0, ())
    learn = Learn(timestep_fraction=0.4, updates=1, micro_batch=12, learning_rate=3e-4, kl_weight=1e-4, clip_norm=1.0)
    assert cfg.learn == dataclasses.replace(learn, reference_every=4)  # the same gradient in the mean
    assert cfg.learn.ema_max == 0.9 and cfg.learn.strength == 1.0
    assert (cfg.evaluate.every, cfg.evaluate.steps, cfg.evaluate.solver) == (20, 28, "dpm2")
    assert (cfg.reward, cfg.reward_dtype) == ("clipscore", "float32")
    assert {
        "clipscore=openai/clip-vit-large-patch14",
        "pickscore=yuvalkirstain/PickScore_v1",
        "hpsv2=xswu/HPSv2",
        "imagereward=zai-org/ImageReward",
    } == {*cfg.reward_paths}


def test_sol_rl_on_flux_field_by_field():
    """All that is not a field's own default; the published run was `--config=flux` before branch was."""
    cfg = config.load("flux:sol_rl_clipscore")
    assert cfg == config.load("flux:sol_rl") and cfg.branch is None
    assert {name: value for name, (_, value) in config.differences(Config(), cfg).items()} == {
        "name": "flux",
        "model.path": "black-forest-labs/FLUX.1-dev",
        "model.vae_dtype": "bfloat16",
        "model.remat_keeps": ("auto",),
        "model.min_quantised_flops": 0.9,
        "reward": "clipscore",
        "reward_paths": recipes.ON_THE_HUB,
        "learn.timestep_fraction": 0.4,
        "learn.reference_every": 4,
        "evaluate.prompts": 128,
        "evaluate.chunk": 16,
        "evaluate.own": True,
        "save_every": 5,
        "encode_ahead": 20,
    }


@pytest.mark.parametrize(
    ("name", "reward"),
    [
        ("flux:", "clipscore"),
        ("sd35:", "imagereward"),
        ("sd35:medium_", "imagereward"),
        ("sana:", "pickscore"),
        ("tiny:", "clipscore"),
        ("emoji:", "mixed"),
    ],
)
def test_the_default_is_a_branch(name, reward):
    default = config.load(name.rstrip(":_"))
    assert default == config.load(f"{name}branch") == config.load(f"{name}branch_{reward}")
    assert config.differences(config.load(f"{name}sol_rl_{reward}"), default) == {
        "explore.steps": (6, 5),
        "branch.after": (None, 3),
        "branch.steps": (None, 4),
    }


def test_recipes_have_the_names_of_the_original():
    made = {recipe: config.load(f"flux:{recipe}") for recipe in FLUX}
    assert made["sol_rl_clipscore"] == config.load("flux:sol_rl")
    assert len(set(made.values())) == 40 and len(made) == 44  # an alias is another's
    for recipe, cfg in made.items():
        assert cfg == config.load(f"flux:flux1_{recipe}") and recipe.endswith(f"_{cfg.reward}") and cfg.name == "flux"
    assert {n: recipes.describe(made[f"{n}_hpsv2"]) for n in recipes.NAMES} == {
        "sol_rl": "explore 96 x 6 steps auto, regenerate 24 x 10 steps bf16",
        "branch": "explore 96 x 5 steps auto, after 3 of these go on with 24 x 4 steps bf16",
        "naive_scaling": "roll out 96 x 10 steps bf16, keep 24",
        "naive_quant": "roll out 96 x 10 steps auto, keep 24",
        "diffusionnft": "roll out 24 x 10 steps bf16, keep 24",
        "flow_grpo": "roll out 24 x 6 steps bf16 sde, keep 24",
        "flow_grpo_fast": "roll out 24 x 6 steps bf16 cps, keep 24",
        "dance_grpo": "roll out 24 x 12 steps bf16 dance, keep 24",
        "awm": "roll out 24 x 14 steps bf16 sa_solver, keep 24",
        "vgrpo": "roll out 24 x 10 steps bf16, keep 24",
        "compile": "roll out 96 x 10 steps bf16, keep 24",
    }


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "sol_rl_pikscore",
            r"--config=flux:sol_rl_pikscore: no such recipe; did you mean sol_rl_pickscore\? use FAMILY_REW",
        ),
        (
            "solrl",
            r"did you mean sol_rl\? use FAMILY_REWARD, of sol_rl, branch, naive_scaling, naive_quant, diffusionnft, "
            r"flow_grpo, flow_grpo_fast, dance_grpo, awm, vgrpo, compile",
        ),
        ("hpsv2", r"and clipscore, pickscore, hpsv2, imagereward \(--config=flux:help lists them\)"),
        ("_hpsv2", r"no such recipe"),
        ("???", r"no such recipe; use FAMILY_REWARD"),
    ],
)
def test_a_wrong_recipe_is_answered_with_the_nearest(recipe, message):
    with pytest.raises(ConfigError, match=message):
        config.load(f"flux:{recipe}")


def test_help_has_every_recipe_in_one_line():
    lines = recipes.help_lines("flux")
    assert (
        lines[0]
        == "FLUX.1-dev at 512 px: Sol-RL with the settings of its FLUX runs; the samples continue from the preview."
    )
    assert "Recipes of --config=flux:RECIPE (default: branch_clipscore)" in lines
    assert [line.split()[0] for line in lines if line[:2] == "  " and line[2] != " "] == FLUX
    assert all("; the same as naive_scaling" in line for line in lines if line.startswith("  compile_"))
    for reward in ("clipscore", "pickscore", "hpsv2", "imagereward"):
        assert not any(f"{reward} is not here yet" in line for line in lines)
    assert sum(line.startswith("  ") and line[2] != " " for line in recipes.help_lines("tiny")) == 22
    with pytest.raises(
        ConfigError, match=r"--config=nothing: there is no configs/nothing.py; use one of .*flux, .*tiny"
    ):
        recipes.help_lines("nothing")


def test_a_package_without_its_repository_says_so(tmp_path, monkeypatch):
    """Also where another package's folder of that name is beside it."""
    monkeypatch.setattr(config, "FOLDER", tmp_path / "configs")
    with pytest.raises(ConfigError, match=r"there are no configs in .*configs: install the package with pip"):
        config.available()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/tiny.py").write_text("raise ValueError('of somebody else')\n")
    with pytest.raises(ConfigError, match="there are no configs in "):
        config.load("tiny")


def test_a_users_own_configs_shadow_nothing(tmp_path):
    """In the folder where the command is given, and first on the path."""
    (tmp_path / "configs").mkdir()
    for name in ("__init__", "tiny"):
        (tmp_path / f"configs/{name}.py").write_text("raise ValueError('of somebody else')\n")
    root = config.FOLDER.parent
    command = [sys.executable, "-m", "solrl_jax.main", "--config=tiny:help"]
    ended = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    assert ended.stdout.splitlines() == recipes.help_lines("tiny")


def test_configs_may_take_from_each_other(tmp_path, monkeypatch):
    made = "from solrl_jax.config import Config\n\nRECIPES = ('',)\n\n\ndef config(recipe):\n    return "
    (tmp_path / "one.py").write_text(f"{made}Config(name='one', iterations=7)\n")
    (tmp_path / "two.py").write_text(f"from . import one\n{made}one.config(recipe)\n")
    monkeypatch.setattr(config, "FOLDER", tmp_path)
    monkeypatch.setattr(config, "PACKAGE", "configs_of_two")
    assert config.available() == ["one", "two"] and config.load("two").iterations == 7
