"""The command line: an error is one line and exit code 2, without a traceback and without a run directory."""

import errno
import io
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from absl.testing import flagsaver

from solrl_jax import config, device, main, rewards


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command("--mode=eval", ...) -> (exit code, stdout, stderr), in an empty directory with one config, `small`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "available", lambda: ["small"])
    monkeypatch.setattr(config, "load", load_small)
    (tmp_path / "p.txt").write_text("a\nb\n")

    def run(*words):
        with flagsaver.flagsaver():
            code = main.main(main.parse(["solrl_jax", "--devices=1", *words]))
        out, err = capsys.readouterr()
        return code, out, err

    yield run
    assert not (tmp_path / "runs").exists()


def load_small(spec, overrides):
    if spec != "small":
        raise config.ConfigError(f"--config={spec}: there is no configs/{spec}.py; use one of small")
    made = config.Config(name="small", prompt_files="p.txt", prompts=2, reward="shapes")
    return config.override(made, **{"evaluate.prompts": 2, "evaluate.grid": 1, **overrides})


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "--conifg=small",
            "error: Unknown command line flag 'conifg'. Did you mean: config ?; --help lists all flags\n",
        ),
        ("--mode=trian", "error: flag --mode=trian: value should be one of <train|eval|"),
        ("--devices=none", "error: flag --devices=none: invalid literal for int() with base 10: 'none'; --help"),
    ],
)
def test_a_wrong_flag_ends_with_2(command, capsys, word, message):
    """As every error that starting again would not mend, which a scheduler must be able to tell."""
    with pytest.raises(SystemExit) as ended:
        command(word)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and said.err.startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no config is named: give --config=NAME, one of small\n"),
        (["--mode=eval"], "no config is named: give --config=NAME, one of small, or --run_dir=RUN, which has one"),
        (["--config=large"], "there is no configs/large.py; use one of small"),
        (["--config=small", "tiny"], "unexpected argument 'tiny': flags begin with --"),
        (["--config=small", "--config.explore.stepz=4"], "did you mean steps?"),
        (["--config=small", "--config.explore.steps"], "--config.explore.steps=: needs int"),
        (["--config=small", "--config.kept=999"], "kept=999 of candidates=96"),
        (["--config=small", "--config.prompts=3"], "prompts=3, but p.txt has 2 distinct training prompts"),
        (["--config=small", "--config.prompt_files=q.txt"], "q.txt does not exist"),
        (["--config=small", "--prompts=q.txt"], "q.txt does not exist"),
        (["--config=small", "--prompts=q.txt", "--config.prompt_files=p.txt"], "prompt_files differ: give one of them"),
        (["--config=small", "--mode=eval", "--prompts=q.txt"], "q.txt does not exist"),
        (["--config=small", "--mode=eval", "--resume"], "--resume is for --mode=train"),
        (["--config=large:help"], "there is no configs/large.py; use one of small"),
        (["--config=small", "--config.model.name=flax"], "model.name=flax: there is no such model"),
        (["--config=small", "--devices=64"], "64 devices asked for"),
        (["--config=small", "--resume"], "--resume needs --run_dir"),
        (["--run_dir=nowhere", "--resume"], "nowhere is not the directory of a run"),
        (["--mode=eval", "--run_dir=nowhere"], "nowhere is not the directory of a run"),
        (["--mode=export", "--config=small"], "--mode=export needs --run_dir of a run"),
        (["--mode=sample", "--config=small"], "needs --prompt='a text' or --prompts=file.txt"),
        (["--mode=sample", "--config=small", "--prompts=q.txt"], "q.txt does not exist"),
        (["--mode=eval", "--config=small", "--checkpoint=x/5"], "there is no checkpoint x/5"),
        (["--mode=report"], "no run to report: give --run_dir=RUN or --runs=RUN,RUN"),
        (["--mode=report", "--run_dir=nowhere"], "nowhere is not the directory of a run"),
        (["--mode=report", "--runs=a,b", "--run_dir=c"], "are both given: give one of them"),
        (["--mode=report", "--runs=a,b", "--out=."], "--out=. is a folder: give a file"),
        (["--mode=report", "--config=small"], "unexpected argument '--config=small': --mode=report takes --run_dir="),
        (["--mode=report", "--config.seed=1"], "unexpected argument 'config.seed=1'"),
        (["--mode=report", "--run_dir=nowhere", "--out=p.txt/r.html"], "p.txt is not a folder that can be written to"),
        (["--mode=report", "--runs=a,b", "--lora=x"], "--lora is for --mode=eval and --mode=sample and --mode=export"),
        (["--config=small", "--run_dir=p.txt/run"], "p.txt is not a folder that can be written to: give another"),
        (["--config=small", f"--run_dir=a/{'b' * 256}"], f"{'b' * 256}: File name too long: give another folder"),
        (["--config=small", "--mode=eval", f"--run_dir={'b' * 256}/c"], "b/c: File name too long: give another folder"),
        (["--mode=report", f"--run_dir={'b' * 256}"], f"File name too long: '{'b' * 256}"),
        (["--config=small", "--mode=eval", "--run_dir=p.txt/run"], "p.txt is not a folder that can be written to"),
        (["--config=small", "--checkpoint=best"], "and --mode=export; --resume goes on from the newest"),
        (["--config=small", "--lora=x"], "--mode=export; a training begins from --config.model.lora=FILE"),
        (["--config=small", "--prompt=p.txt"], "and --mode=prove; a training takes --prompts=DIR, or a file"),
        (["--config=small", "--mode=eval", "--prompt=a"], "--prompt is for --mode=sample and --mode=prove"),
        (["--config=small", "--mode=sample", "--prompt=a", "--images=b"], "--images is for --mode=score"),
        (["--config=small", "--out=r.html"], "--out is for --mode=report and --mode=prove"),
        (["--config=small", "--runs=a,b"], "--runs is for --mode=report"),
        (["--config=small", "--mode=doctor", "--card=H200"], "--card is for --mode=plan"),
        (["--config=small", "--mode=eval", "--lora=x", "--checkpoint=a/checkpoints/1"], "both given: give one of them"),
        (
            ["--config=small", "--mode=eval", "--run_dir=a", "--checkpoint=²"],
            "--checkpoint=²: there is no checkpoint ²",
        ),
        (["--config=small", "--mode=sample", "--prompt=a \udcff"], "--prompt='a \\udcff' is not UTF-8: write it in"),
        (["--config=small", "--mode=sample", "--prompt=a", "--negative=\udcff"], "--negative='\\udcff' is not UTF-8"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(command, words, message):
    code, _, err = command(*words)
    assert code == 2
    assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1


def test_rewards_are_checked_by_name_and_weight(command, monkeypatch):
    monkeypatch.setattr("solrl_jax.run.assemble.model_module", lambda cfg: types.SimpleNamespace(make=str))
    words = ("--config=small", "--config.explore.precision=bf16")  # the stand-in for a model has no coverage to check
    for mixture, message in (
        ("shape", "unknown reward 'shape' in 'shape': use one of "),
        ("shapes:1,shapes:2", "reward 'shapes' is twice"),
        ("shapes:much", "weight 'much' of reward 'shapes': give a finite number"),
        ("", "reward is empty: name what to train on"),
    ):
        code, _, err = command(*words, f"--config.reward={mixture}")
        assert code == 2 and message in err
    code, _, err = command(*words, "--config.reward_paths=clip")
    assert code == 2 and "reward_paths='clip': give name=folder" in err


def test_dotted_overrides_in_both_spellings(command):
    with flagsaver.flagsaver():  # flags parsed here must not reach later tests
        parsed = main.parse(["x", "--config=small", "--config.explore.steps=4", "--config.seed", "7", "-config.kept=8"])
    assert parsed == ["x", "config.explore.steps=4", "config.seed=7", "config.kept=8"]


def test_a_defect_keeps_its_traceback(command, monkeypatch):
    monkeypatch.setitem(main.MODES, "train", lambda asked: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        command("--config=small")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
def test_what_the_disk_refuses_is_one_line(command, monkeypatch, number):
    def refused(asked):
        raise OSError(number, os.strerror(number), "there")

    monkeypatch.setitem(main.MODES, "train", refused)
    said = f"error: [Errno {number}] {os.strerror(number)}: 'there'\n"
    assert command("--config=small") == (2, "", said)


def test_a_text_that_the_terminal_cannot_show_ends_nothing(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "")
    monkeypatch.setattr(main.app, "run", lambda *_, **__: print("ein grüner Kreis", flush=True))
    main.cli()
    assert screen.buffer.getvalue() == b"ein gr\\xfcner Kreis\n"


def test_an_interrupt_is_not_a_traceback(command, monkeypatch):
    def interrupted(asked):
        raise KeyboardInterrupt

    monkeypatch.setitem(main.MODES, "train", interrupted)
    assert command("--config=small") == (130, "", "interrupted\n")


def shell(*words, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")} | environment
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60, env=env)


def test_help_and_unknown_flags_answer_without_jax():
    found = shell("-X", "importtime", "-m", "solrl_jax.main", "--help")
    assert "--config" in found.stdout and "<train|eval|sample|score|export" in found.stdout
    assert " jax\n" not in found.stderr and " transformers\n" not in found.stderr
    found = shell("-m", "solrl_jax.main", "--confg=tiny")
    assert found.returncode == 2 and "Unknown command line flag 'confg'. Did you mean: config" in found.stderr


@pytest.mark.parametrize(
    ("name", "reward", "recipes"), [("flux", "clipscore", 44), ("tiny", "clipscore", 22), ("emoji", "mixed", 22)]
)
def test_recipes_are_listed_without_jax(name, reward, recipes):
    found = shell("-X", "importtime", "-m", "solrl_jax.main", f"--config={name}:help")
    assert found.returncode == 0 and " jax\n" not in found.stderr
    after = found.stdout.split(f"Recipes of --config={name}:RECIPE (default: branch_{reward})\n")[1]
    assert len(after.splitlines()) == recipes + 1 and after.startswith(f"  sol_rl_{reward} ")


def test_prompts_are_short_for_prompt_files_but_in_sample_mode(command, monkeypatch):
    seen = []
    for mode in ("train", "sample"):
        monkeypatch.setitem(main.MODES, mode, lambda asked: seen.append(asked.cfg.prompt_files) or 0)
        for words in ([], ["--prompts=other"], ["--prompts=other", "--config.prompt_files=other"]):
            assert command("--config=small", f"--mode={mode}", *words)[0] == 0
    assert seen == ["p.txt", "other", "other", "p.txt", "p.txt", "other"]


ENVIRONMENT = """
import os, jax
before = dict(os.environ)  # with TPU_LIBRARY_PATH, which JAX sets where libtpu is installed
import solrl_jax.main, solrl_jax.iteration, solrl_jax.train
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
assert jax.config.jax_platforms == before.get("JAX_PLATFORMS"), jax.config.jax_platforms
solrl_jax.device.setup()
print(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"], jax.config.jax_platforms)
"""


@pytest.mark.skipif(os.path.exists("/dev/nvidia0") or os.path.exists("/dev/dxg"), reason="there is a GPU")
@pytest.mark.parametrize(("given", "said"), [({}, "0.92 cpu"), ({"JAX_PLATFORMS": "tpu"}, "0.92 tpu")])
def test_importing_changes_no_environment_and_setup_does(given, said, monkeypatch):
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        monkeypatch.delenv(name, raising=False)
    found = shell("-c", ENVIRONMENT, **given)
    assert (found.returncode, found.stdout) == (0, f"{said}\n"), found.stderr


@pytest.mark.skipif(os.path.exists("/dev/nvidia0") or os.path.exists("/dev/dxg"), reason="there is a GPU")
def test_without_a_gpu_nothing_is_printed():
    found = shell("-c", "import jax; from solrl_jax import device; device.setup(); jax.devices()")
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_what_is_absent_is_named(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")  # the user's value is kept
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert device.absent() == ["XLA_FLAGS=--xla_gpu_dot_merger_threshold_mb=32", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"]


def test_gpu_flags_are_added_to_the_users_own():
    """Each flag that the user has not set. This jaxlib knows all of them: an unknown flag would end the process."""
    ours = "--xla_gpu_enable_triton_gemm=false --xla_gpu_dot_merger_threshold_mb=32"
    assert device.with_gpu_flags("") == ours
    theirs = "--xla_gpu_enable_triton_gemm=true --xla_dump_to=/tmp/x"
    assert device.with_gpu_flags(theirs) == f"{theirs} --xla_gpu_dot_merger_threshold_mb=32"
    found = shell("-c", "import jax; print(jax.device_count())", JAX_PLATFORMS="cpu", XLA_FLAGS=ours)
    assert (found.returncode, found.stdout) == (0, "1\n"), found.stderr


ON_CPU = """
import jax
from absl.testing import flagsaver
from solrl_jax import main, plan
from solrl_jax.run import convert
convert.convert = lambda *_: None
plan.run_plan = lambda *_, **__: print(jax.devices()) or 0
with flagsaver.flagsaver():
    assert main.main(main.parse(["x", "--config=tiny", "--mode={mode}"])) == 0
print(jax.default_backend())
"""


@pytest.mark.parametrize("mode", ["plan", "convert"])
def test_plan_and_convert_leave_the_gpu_alone(mode):
    """They run although CUDA is requested and there is none: they do not look for it."""
    found = shell("-c", ON_CPU.format(mode=mode), JAX_PLATFORMS="cuda")
    assert (found.returncode, found.stdout.splitlines()[-1]) == (0, "cpu"), found.stderr


def test_mixtures_are_weighted_sums_with_their_parts():
    one = rewards.Reward("one", len, lambda params, images, tokens: images.mean((1, 2, 3)))
    two = rewards.Reward("two", len, lambda params, images, tokens: images.max((1, 2, 3)) * params["scale"])
    score = rewards.Score((one, two), (1.0, 0.5))
    images = jax.random.uniform(jax.random.key(0), (4, 2, 2, 3))
    total, parts = rewards.score_images(score, {"one": {}, "two": {"scale": 3.0}}, images, {"one": 0, "two": 0})
    np.testing.assert_allclose(parts["two"], 3 * images.max((1, 2, 3)))
    np.testing.assert_allclose(total, parts["one"] + 0.5 * parts["two"], rtol=1e-6)
    assert score.names == ("one", "two") and hash(score) == hash(rewards.Score((one, two), (1.0, 0.5)))
    empty, none = rewards.score_images(rewards.Score((), ()), {}, images, {})
    assert none == {} and empty.shape == (4,)
    assert rewards.parse("pickscore:1,hpsv2:0.5") == {"pickscore": 1.0, "hpsv2": 0.5}
    assert rewards.parse("shapes") == {"shapes": 1.0} and "shapes" in rewards.REWARDS
