"""Every command and every Python block of README.md and docs/ is run; one that no rule here covers fails.

Commands run word for word, in a folder that has what they name (RUN, DIR, FILE, prompts, ...), beside a hub's cache
that holds nano models under the public names. All that is changed is `small`: the sizes of a config. The default tier
runs what is quick and of the rest everything up to where work begins: flags, config, recipe, prompts; `-m slow` runs
one command of each kind whole. Experiments' arguments are parsed. What needs the network or another program is in
ELSEWHERE, with what is looked at instead.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from absl.testing import flagsaver
from nbclient import NotebookClient
from packaging.requirements import Requirement
from PIL import Image

from experiments import results
from solrl_jax import config, main, processes, train
from solrl_jax.config import Config
from solrl_jax.run import data
from tests import documents, nano, test_report
from tests.documents import PAGES, ROOT, Command
from tests.tiers import long, slow

pytestmark = pytest.mark.usefixtures("compiled")

COMMANDS = [command for page in PAGES for command in documents.commands(page)]
PROGRAM = ("python", "-m", "solrl_jax.main")
QUICK = ("doctor", "score", "report")
"""Modes that run in the default tier, with --config=NAME:help."""


# --- what a command finds -------------------------------------------------------------------------------------------

NANO = {"black-forest-labs/FLUX.1-dev": "pipeline", "openai/clip-vit-large-patch14": "clip"}
NANO |= {"yuvalkirstain/PickScore_v1": "clip"}


def publish(cache: Path, name: str, folder: Path) -> None:
    """Put a folder into a hub's cache as the public model `name`."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text("a" * 40)
    shutil.copytree(folder, root / "snapshots" / ("a" * 40))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A hub's cache with FLUX.1, FLUX.2-klein, Z-Image, CLIP and PickScore at nano size."""
    from tests import nano_flux2, nano_zimage

    folder, cache = tmp_path_factory.mktemp("nano"), tmp_path_factory.mktemp("cache")
    nano.build(folder)
    for name, part in NANO.items():
        publish(cache, name, folder / part)
    publish(cache, "black-forest-labs/FLUX.2-klein-base-4B", nano_flux2.write(folder / "flux2"))
    publish(cache, "Tongyi-MAI/Z-Image", nano_zimage.write(folder / "zimage"))
    return cache


def small(cfg: Config) -> Config:
    """`cfg` for the models in the cache, in two short iterations: recipe, solvers, precisions, rewards stay its own."""
    one_stage, steps = cfg.explore is None, cfg.regenerate.steps if cfg.regenerate.stochastic else 3
    regenerate = dataclasses.replace(cfg.regenerate, steps=steps, chunk=2)
    cfg = dataclasses.replace(
        cfg,
        prompts=2,
        candidates=2 if cfg.selection == "all" else 4,
        kept=2,
        explore=None if one_stage else dataclasses.replace(cfg.explore, steps=2, chunk=4),
        regenerate=regenerate,
        branch=None if cfg.branch is None else config.Branch(after=1, steps=1),
        learn=dataclasses.replace(cfg.learn, updates=min(cfg.learn.updates, 2), micro_batch=1, reference_every=1),
        evaluate=dataclasses.replace(cfg.evaluate, prompts=2, images=1, steps=2, grid=1, chunk=2),
        iterations=2,
        save_every=1,
        encode_ahead=min(cfg.encode_ahead, 1),
    )
    sizes = {"size": 32 if cfg.model.name == "sana" else 16, "text_tokens": 8, "min_quantised_flops": 0.0}
    sizes |= {"min_dim": 0 if cfg.model.name in ("flux", "flux2", "zimage") else 48}
    if cfg.model.name == "zimage":
        sizes["text_tokens"] = 64
    if cfg.model.name == "flux2":
        sizes["text_tokens"] = cfg.model.text_tokens  # no other number is taken
    if cfg.name == "tiny":  # its own weights are here
        sizes = {}
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dtype="float32", **sizes))


@pytest.fixture
def place(tmp_path, monkeypatch, cache):
    """The current folder: DIR and prompts with both splits and three pictures, their captions in FILE, prompts for ocr
    in signs.jsonl, own rewards."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    texts = [*nano.PROMPTS, *(f"a {colour} cross" for colour in ("red", "blue", "green", "pink"))]
    for folder in (tmp_path / "DIR", tmp_path / "prompts"):
        folder.mkdir()
        for split in ("train", "test"):
            (folder / f"{split}.txt").write_text("\n".join(texts) + "\n")
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    signs = [json.dumps({"prompt": f'a sign that says "{text}"'}) for text in ("OPEN", "SALE", "42", "Hello", "Exit")]
    (tmp_path / "signs.jsonl").write_text("\n".join(signs))
    (tmp_path / "FILE").write_text("\n".join(texts[:3]) + "\n")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    for file, text in own_rewards().items():
        (tmp_path / file).write_text(text)
    yield tmp_path
    for name in set(sys.modules) - before:
        if f"{name}.py" in own_rewards():
            del sys.modules[name]


def own_rewards() -> dict[str, str]:
    """{file: text} of the Python blocks of docs/rewards.md, under the names that its text gives them."""
    device, host, counts = (text for language, text in documents.blocks("docs/rewards.md") if language == "python")
    return {"my_reward.py": device, "my_rules.py": host, "my_counts.py": counts}


def ours(*words: str) -> int:
    """The exit code of python -m solrl_jax.main, on one device; of several processes each uses all of its own."""
    several = any(word.startswith("--coordinator=") for word in words)
    with flagsaver.flagsaver():
        return main.main(main.parse(["solrl_jax", *([] if several else ["--devices=1"]), *words]))


def mode(command: Command) -> str:
    return next((word.removeprefix("--mode=") for word in command.words if word.startswith("--mode=")), "train")


def asks_for_help(command: Command) -> bool:
    return any(re.fullmatch(r"--config=\w+:help", word) for word in command.words)


# --- commands of the package ----------------------------------------------------------------------------------------

OURS = [command for command in COMMANDS if command.words[:3] == PROGRAM]


@pytest.mark.parametrize("command", OURS, ids=lambda c: f"{c.page}: {' '.join(c.words[3:])}")
def test_a_command_of_the_package(command, place, monkeypatch, capsys):
    """Quick ones run. The rest end where work begins: flags, config, recipe and fields are real, and so are prompts."""
    seen = []
    for name in set(main.MODES) - set(QUICK):
        monkeypatch.setitem(main.MODES, name, lambda asked: seen.append((asked.cfg, asked.run)) or 0)
    monkeypatch.setattr(main, "_place", lambda run: None)  # checkpoints are what only a trained run has
    monkeypatch.setattr(processes, "join", lambda *words: None)  # there is no other process to meet
    for name in ("RUN", "runs/a", "runs/b", "runs/mine"):
        test_report.write(place / name, test_report.metrics(), config.load("tiny"))
    if mode(command) == "doctor":
        monkeypatch.setattr(config, "load", lambda *words, load=config.load: small(load(*words)))
    assert ours(*command.words[3:]) == 0, capsys.readouterr().err
    assert len(seen) == (mode(command) not in QUICK and not asks_for_help(command))
    if seen and mode(command) == "train":
        assert data.read(seen[0][0].prompt_files).train


@pytest.fixture(scope="module")
def imagereward(cache, tmp_path_factory):
    """ImageReward is in the cache too."""
    from tests import test_imagereward

    publish(cache, "zai-org/ImageReward", test_imagereward.write(tmp_path_factory.mktemp("imagereward")))


@pytest.fixture
def shrunk(monkeypatch):
    """Configs at their small sizes."""
    monkeypatch.setattr(config, "load", lambda *words, load=config.load: small(load(*words)))


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """The default run, at its small size."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    train.train(small(config.load("tiny", {"watch.every": "2"})), run, devices=1)
    return run


@pytest.fixture
def trained(place, default_run):
    """RUN, runs/a and runs/b: the default run, with a checkpoint 20."""
    for name in ("RUN", "runs/a", "runs/b"):
        shutil.copytree(default_run, place / name)
    (place / "RUN/checkpoints/1").rename(place / "RUN/checkpoints/20")


WHOLE = {mode(command): command for command in reversed(OURS) if not asks_for_help(command)}.values()
"""The first of each mode. What their flags and recipes do has tests of its own."""
ALONE = [command for command in WHOLE if mode(command) not in ("train", "prove")]
"""Without what takes minutes: the default run is `trained`, and tests/test_prove.py has the other."""
ALONE += [c for c in OURS if c.page == "docs/flux.md" and mode(c) == "train" and "--run_dir=runs/mine" in c.words]


@pytest.mark.usefixtures("imagereward", "trained", "shrunk")
@pytest.mark.parametrize(
    "page", [long(page) if page == "docs/flux.md" else slow(page) for page in sorted({c.page for c in ALONE})]
)
def test_the_commands_of_a_page_run(page, capsys):
    """In their order, each with what those before it left."""
    for command in documents.commands(page):
        if command in ALONE:
            assert ours(*command.words[3:]) == 0, f"{command.text}\n{capsys.readouterr().err}"
    if page == "docs/flux.md":
        ((_, text),) = (block for block in documents.blocks(page) if block[0] == "python")
        exec(text.replace('"cuda"', '"cpu"').replace("512", "16"), {})
        assert Image.open("fox.png").size == (16, 16)


def test_tests_that_are_named_exist():
    """In code and pages a test is named as what shows a statement."""
    files = [*(ROOT / "tests").glob("*.py")]
    tests = {f.stem: set(re.findall(r"^ *def (test_\w+)", f.read_text(encoding="utf-8"), re.M)) for f in files}
    there, named = {*tests, *itertools.chain(*tests.values())}, {}
    for folder, pattern in (("solrl_jax", "*.py"), ("configs", "*.py"), ("experiments", "*.py"), (".", "*.md")):
        for file in (ROOT / folder).rglob(pattern):
            if not {".venv", ".git", "runs"} & set(file.relative_to(ROOT).parts) and file.name != "CHANGELOG.md":
                text = re.sub(r"::\s+", "::", file.read_text(encoding="utf-8"))
                named |= {name: file for name in re.findall(r"\b(test_\w+)", text) if name != "test_metadata"}
                for at, name in re.findall(r"\b(test_\w+)\.py::(test_\w+)", text):
                    assert name in tests[at], file
    assert len(named) > 40 and not {name: file for name, file in named.items() if name not in there}


# --- other commands -------------------------------------------------------------------------------------------------

LAB = [command for command in COMMANDS if command.words[2:3] and command.words[2].startswith("experiments.")]
IN_SHORT = {command.words[2]: command for command in documents.in_short()}


class Parsed(Exception):
    """Leaves a command behind its arguments."""


@pytest.mark.parametrize("command", [*LAB, *IN_SHORT.values()], ids=lambda c: f"{c.page}: {c.text}")
def test_a_command_of_the_experiments(command, tmp_path, monkeypatch):
    """Their modules are there and take the arguments; `results` makes the tables of docs/results.md and
    of the READMEs as they are."""
    module, words = importlib.import_module(command.words[2]), command.words[3:]
    if module is results:
        (tmp_path / "docs").mkdir()
        (tmp_path / "experiments").symlink_to(ROOT / "experiments")
        page = shutil.copy(ROOT / "docs/results.md", tmp_path / "docs")
        results.fill(page)
        assert Path(page).read_text() == documents.read("docs/results.md")
        for readme in sorted((ROOT / "experiments").glob("*/README.md")):
            copy = shutil.copytree(readme.parent, tmp_path / readme.parent.name, ignore=shutil.ignore_patterns("*.py"))
            results.fill(copy / "README.md")
            assert (copy / "README.md").read_text() == readme.read_text(), readme
        return

    def parse(parser, argv=None, known=argparse.ArgumentParser.parse_args):
        known(parser, argv)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed):
        module.main([*words])


def requirements(command: Command) -> None:
    """Every line of the file is a requirement or a file that is there; what is installed here meets it."""
    for line in (ROOT / command.words[-1]).read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("-r "):
            assert (ROOT / text.removeprefix("-r ")).is_file()
        elif text:
            wanted = Requirement(text)
            found = [d.version for d in metadata.distributions(name=wanted.name)]
            assert not found or wanted.specifier.contains(found[0], prereleases=True), text


def optional(command: Command) -> None:
    """A test is there for what the package gives: skipped without it, or with a stand-in."""
    looked_for = {
        "open_clip_torch": 'importorskip("open_clip")',
        "tensorboard": "EventFileWriter",
        "wandb": "FakeWandb",
    }
    text = looked_for[command.words[-1]]
    assert any(text in f.read_text() for f in (ROOT / "tests").glob("test_*.py") if f != Path(__file__))


def extra(command: Command) -> None:
    """It is an extra of this package."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    name = re.fullmatch(r"\.\[(\w+)\]", command.words[-1])
    assert name and name[1] in declared


def pytest_is_set_up(command: Command) -> None:
    how = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert how["testpaths"] == ["tests"] and "-m 'not slow and not long'" in how["addopts"]
    tiers = [mark.partition(":")[0] for mark in how["markers"]]
    assert tiers == ["slow", "long"] and command.words[3:] in ((), *(("-m", tier) for tier in tiers))


def hub_command(command: Command) -> None:
    """The program is one of huggingface_hub's and takes such words; what it fetches is what a config names."""
    found = subprocess.run([Path(sys.executable).parent / "hf", *command.words[1:3], "--help"], capture_output=True)
    assert found.returncode == 0
    names = {
        *(config.load(name).model.path for name in ("flux", "flux2", "zimage")),
        *(pair.partition("=")[2] for pair in config.load("flux").reward_paths),
    }
    assert command.words[1] == "auth" or command.words[2] in names


def event_files(command: Command) -> None:
    """It is another program's; of a run it reads this folder, whose content tests/test_log.py reads."""
    assert command.words[1:] in (("--logdir=runs",), ("--logdir", "runs"))
    assert (ROOT / "tests/test_log.py").read_text().count("EventFileWriter")


ELSEWHERE = {
    ("pip", "install", "-r"): requirements,  # the network, a fresh environment
    ("pip", "install", ".[cuda12]"): extra,  # the same
    ("pip", "install"): optional,  # the network
    ("python", "-m", "pytest"): pytest_is_set_up,  # this is it
    ("hf",): hub_command,  # the network, a licence
    ("tensorboard",): event_files,  # a server, of a package that is not required
}
"""Commands by how they begin, and what is looked at in place of running them."""
REST = [command for command in COMMANDS if command not in OURS and command not in LAB]


@pytest.mark.parametrize("command", REST, ids=lambda c: f"{c.page}: {c.text}")
def test_a_command_that_is_run_elsewhere(command):
    found = [check for words, check in ELSEWHERE.items() if command.words[: len(words)] == words]
    assert found, f"no rule runs {command.text!r} of {command.page}: write one here"
    found[0](command)


# --- the rest of a page ---------------------------------------------------------------------------------------------


def test_the_kubernetes_job():
    """Valid YAML, whose command is one of ours."""
    [text] = [text for language, text in documents.blocks("docs/hosts.md") if language == "yaml"]
    job = yaml.safe_load(text)["spec"]
    [pod] = job["template"]["spec"]["containers"]
    words = pod["args"][0].replace("$JOB_COMPLETION_INDEX", "3").split()
    flags = [word for word in words if word.startswith("--") and "resume" not in word]
    assert words[:4] == ["exec", "python", "-m", "solrl_jax.main"] and job["completions"] == job["parallelism"] == 4
    with flagsaver.flagsaver():
        assert main.parse(["solrl_jax", *flags]) == ["solrl_jax"] and main.FLAGS.processes == 4
        assert processes.asked(main.FLAGS.coordinator, 4, main.FLAGS.process)
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"]}
    assert codes == {"Ignore": [train.UNFINISHED], "FailJob": [2]}


def test_blocks_are_bash_that_is_run_and_python_that_is_run():
    """A block without a language is a drawing: no command hides in it."""
    languages = {page: [language for language, _ in documents.blocks(page)] for page in PAGES}
    assert {language for found in languages.values() for language in found} == {"bash", "python", "yaml", ""}
    python = {page: found.count("python") for page, found in languages.items() if "python" in found}
    # Run by tests/test_own.py; above, with the page; below.
    assert python == {"docs/rewards.md": 3, "docs/flux.md": 1, "README.md": 1}
    drawn = [text for page in PAGES for language, text in documents.blocks(page) if not language]
    assert not any(re.search(r"^\s*(\$|python|pip|hf) ", text, re.M) for text in drawn)
    assert len(OURS) > 25 and len(LAB) > 12 and len(REST) > 5


@pytest.mark.slow
@pytest.mark.usefixtures("shrunk")
def test_the_iteration_of_the_readme(capsys):
    """Its Python block, word for word, at a small size."""
    ((_, text),) = (block for block in documents.blocks("README.md") if block[0] == "python")
    scope = {}
    exec(text, scope)
    assert int(scope["state"].iteration) == 1 and scope["samples"].reward.shape == (2, 2)
    assert all(np.isfinite(float(x)) for x in capsys.readouterr().out.split())


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    """docs/compose.ipynb, cell by cell in Jupyter's kernel, as its reader runs it; its policy learns its reward."""
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")  # it computes longer than it compiles
    book = nbformat.read(ROOT / "docs/compose.ipynb", as_version=4)
    assert len(book.cells) == 15
    book.cells.append(nbformat.v4.new_code_cell("print(history[-1] - history[0])"))
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    (told,) = book.cells.pop().outputs
    assert float(told["text"]) > 0.1
    kinds = [set(output.get("data", ())) for cell in book.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in kind for kind in kinds) == 4


@pytest.mark.parametrize("page", PAGES)
def test_fields_modes_and_links_are_there(page):
    known = dict(config.values(config.load("flux"))).keys()
    assert set(documents.fields(page)) <= known
    modes = set(re.findall(r"--mode=(\w+)", documents.read(page)))
    assert modes <= {*main.MODES, "report"}
    for path, anchor in documents.links(page):
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), path
        assert not anchor or anchor in documents.anchors(file), f"{path}#{anchor}"


@pytest.mark.slow
def test_a_runs_metrics_are_described(default_run):
    """All of them, in the table of docs/reports.md, where NAME, STAGE and * stand for what a run has there."""
    rows = re.findall(r"^\| (`.*?) \|", documents.read("docs/reports.md"), re.M)
    described = [re.sub(r"NAME|STAGE|\*", r"[\\w.]+", name) for row in rows for name in re.findall(r"`([^`]+)`", row)]
    lines = (default_run / "metrics.jsonl").read_text().splitlines()
    written = {name for line in lines for name in json.loads(line)} - {"iteration"}
    assert "watch/spearman" in written and "eval_gain_error/shapes" in written
    assert {name for name in written if not any(re.fullmatch(form, name) for form in described)} == set()
