"""The package: its dependencies are requirements.txt's, and a wheel alone runs --config=tiny from any folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from solrl_jax.plan import doctor

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BUILT_FROM = ("solrl_jax", "configs", "experiments/tiny")
"""The folders of the repository that the wheel is made of."""


def least(lines: list[str]) -> dict[str, str]:
    """{name: versions} of requirements, without extras and markers; a name that is there twice has one answer."""
    found: dict[str, str] = {}
    for each in map(Requirement, lines):
        versions = found.setdefault(canonicalize_name(each.name), str(each.specifier))
        assert versions == str(each.specifier), each
    return found


def lines_of(file: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    return [line for line in lines if line]


def test_dependencies_are_those_of_requirements():
    """By name and version. Only JAX differs: the package asks for the plain one, its extras for a kind of device."""
    project = PROJECT["project"]
    asked = least(project["dependencies"])
    assert asked == least(lines_of("requirements.txt"))
    assert not any(each.extras or each.marker for each in map(Requirement, project["dependencies"]))
    extras = dict(project["optional-dependencies"])
    assert least(extras.pop("ocr")) == least(lines_of("requirements-ocr.txt"))
    for extra, names in extras.items():
        assert names == [f"jax[{extra}]{asked['jax']}"]
    assert set(extras) == {"cuda12", "cuda13", "tpu"}


def test_every_package_is_listed():
    """Also one that was made yesterday."""
    inside = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "solrl_jax").rglob("__init__.py")}
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    assert inside | set(mapped) == set(PROJECT["tool"]["setuptools"]["packages"])
    assert all(name == f"solrl_jax.{folder.replace('/', '.')}" for name, folder in mapped.items())


def test_an_extra_asks_nothing_of_who_did_not_choose_it(monkeypatch, tmp_path):
    """In pip's record, which doctor reads where there is no requirements.txt."""
    record = ["jax>=0.10.2", "flax>=0.12.8", 'jax[cuda12]>=99.1; extra == "cuda12"', "jax[tpu]>=99.1 ; extra == 'tpu'"]
    monkeypatch.setattr(doctor, "REQUIREMENTS", tmp_path / "requirements.txt")
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: record)
    assert doctor.minima() == {"jax": "0.10.2", "flax": "0.12.8"}


def build(folder: Path) -> Path:
    """The wheel, made of a copy: a build leaves files beside its source."""
    source = folder / "source"
    for name in BUILT_FROM:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder]
    subprocess.run([*pip, source], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """The bin/ of a new environment with the wheel in it, and what runs these tests behind it on the path."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel], check=True, capture_output=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "running.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.mark.slow
def test_a_wheel_alone_runs_the_small_world(tmp_path):
    """From a folder that is not the repository and has a configs/ of its own."""
    wheel = build(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.stat().st_size < 15e6
    assert [name for name in names if "/experiments/" in name and name.endswith(".py")] == []
    folder = install(wheel, tmp_path / "env")
    here = tmp_path / "here"
    (here / "configs").mkdir(parents=True)
    for name in ("__init__", "tiny"):
        (here / f"configs/{name}.py").write_text("raise ValueError('of somebody else')\n")
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}

    def told(program: str, *words: str, code: int = 0) -> str:
        ended = subprocess.run([folder / program, *words], cwd=here, env=plain, capture_output=True, text=True)
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended.stdout

    place = Path(told("python", "-c", "import solrl_jax; print(solrl_jax.__file__)").strip())
    assert place.is_relative_to(tmp_path / "env")
    assert "--[no]resume" in told("solrl", "--help", code=1)  # absl's code for help
    assert told("solrl", "--config=tiny", "--mode=doctor").splitlines()[-1] == "ready"
    small = {"iterations": 2, "prompts": 2, "candidates": 4, "kept": 2, "explore.chunk": 4, "regenerate.chunk": 2}
    small |= {"learn.updates": 1, "learn.micro_batch": 4, "evaluate.every": 0, "watch.every": 0, "save_every": 0}
    told("solrl", "--config=tiny", "--run_dir=run", *(f"--config.{name}={value}" for name, value in small.items()))
    assert list((here / "run").rglob("pytorch_lora_weights.safetensors"))
