"""--mode=prove: is this model the public one here, does its preview rank, and what does it take. A JSON to post.

Three parts, for the first run with real weights and for every new model. Stages: one iteration of the config with one
prompt a device, its seconds and memory beside the plan's. Ranks: previews in the device's low precision against full
rollouts, in the two forms of the method, on PROMPTS prompts. Picture: diffusers' own pipeline, or a stored picture,
against ours (prove_picture.py). The JSON is written after each part, so an error leaves what was measured before it.
"""

import dataclasses
import json
import math
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from solrl_jax import disk, plan, sharding, train
from solrl_jax.config import FOLDER, Branch, Config, ConfigError, Evaluate, Learn, Watch, to_json
from solrl_jax.plan.doctor import PACKAGES
from solrl_jax.quant import coverage
from solrl_jax.run import assemble, convert, guards, prove_diffusers, prove_picture, prove_stages, watch
from solrl_jax.run.assemble import Parts
from solrl_jax.solvers import ODE
from solrl_jax.weights import hub

FORMAT = 1
"""Version of the JSON."""
PROMPTS, CANDIDATES = 8, 24
"""Of the measurement of ranks: prompts, and candidates of each at most, of which a quarter is kept."""
RESTART = (6, 10)
"""Steps of the preview and of the full rollout of sol_rl."""
BRANCH = (5, Branch(after=3, steps=4))
"""Steps of the preview of branch, and where the kept go on."""
TEXTS = (
    prove_picture.PROMPT,
    "a blue bicycle leaning against a yellow wall",
    "two green apples on a wooden table",
    "an old lighthouse on a cliff above a stormy sea",
    "a small robot watering flowers in a garden",
    "a white cat asleep on a stack of books",
    "a street market at night with paper lanterns",
    "a glass teapot with steam, on a black background",
)
"""The prompts of a config without prompt_files."""


def run_prove(
    cfg: Config, out: Path, *, prompt: str = "", reference: Path | None = None, devices: int | None = None
) -> int:
    """Write `out`, and beside it the picture that --reference takes. Returns 1 if a comparison is out of its bound.

    Raises ConfigError, DataError or WeightsError before any large file is read, TrainError if a device fails.
    """
    check_out(out)
    given, want = cfg, prove_picture.asked(cfg, prompt)
    kept = None if reference is None else prove_picture.stored(reference, want)
    why_not = "" if reference else prove_diffusers.absent(cfg)
    ranked_forms(cfg)
    with tempfile.TemporaryDirectory() as folder:
        if not cfg.prompt_files:
            file = Path(folder) / "prompts.txt"
            file.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
            cfg = dataclasses.replace(cfg, prompt_files=str(file))
        parts = assemble.assemble(prove_stages.one_prompt_each(cfg, devices or jax.device_count()), devices)
    plans = prove_stages.planned(parts)
    found: dict[str, Any] = {"format": FORMAT, **facts(given, parts), "weights": files(given)}
    with jax.set_mesh(parts.mesh):
        work: dict[str, Callable[[], dict[str, Any]]] = {
            "stages": lambda: prove_stages.measured(train.ready(parts), plans),
            "ranks": lambda: ranks(parts, given),
            "picture": lambda: prove_picture.run(parts, want, kept, why_not, out.with_suffix(".safetensors")),
        }
        for name in work:
            found[name] = {"ran": False, "why": "not reached"}
        for name, measure in work.items():
            write(out, found)
            print(f"{name} ...", flush=True)
            began = time.perf_counter()
            try:
                found[name] = measure()
            except jax.errors.JaxRuntimeError as e:
                said = guards.device_error(e)
                raise guards.TrainError(f"{name}: {said}. {out} has what was measured before it") from e
            found[name]["seconds"] = time.perf_counter() - began
    write(out, found)
    print("\n".join([*table(found), f"{out}: post it"]))
    return 1 if found["picture"].get("passed") is False else 0


def check_out(out: Path) -> None:
    """ConfigError unless `out` can become a .json file."""
    if out.is_dir() or out.suffix != ".json":
        raise ConfigError(f"--out={out}: give a file that ends in .json, as in --out=prove.json")
    if why := disk.unwritable(out.parent):
        raise ConfigError(f"--out={out}: {why}: give another file")


def write(out: Path, found: Mapping[str, Any]) -> None:
    """As JSON, with null for numbers that are not finite."""

    def finite(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {k: finite(v) for k, v in x.items()}
        return None if isinstance(x, float) and not math.isfinite(x) else x

    with disk.whole(out) as f:
        f.write((json.dumps(finite(found), indent=1, allow_nan=False) + "\n").encode())


# --- what was run ---------------------------------------------------------------------------------------------------


def facts(cfg: Config, parts: Parts) -> dict[str, Any]:
    """Date, commit, versions, devices and config."""
    first = parts.mesh.devices.flat[0]
    known = {name: version for name in (*PACKAGES, "torch", "diffusers") if (version := _version(name))}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(FOLDER.parent),
        "versions": {"python": platform.python_version(), **known},
        "device": {
            "kind": first.device_kind,
            "platform": first.platform,
            "count": parts.mesh.size,
            "shard": parts.mesh.shape[sharding.FSDP],
            "bytes": plan.memory_limit(),
        },
        "config": _told(json.loads(to_json(cfg))),
    }


def _told(value: Any) -> Any:
    """A config's values for others: of an absolute path its last part."""
    if isinstance(value, dict):
        return {k: _told(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_told(v) for v in value]
    if not isinstance(value, str):
        return value
    name, sign, path = value.rpartition("=")  # "clipscore=/a/folder"
    return f"{name}{sign}{Path(path).name}" if Path(path).is_absolute() else value


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit(folder: Path) -> str | None:
    """Of the repository `folder`; None for an installed package, or without git."""
    if not (folder / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=folder).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return head + " and changes to it" * bool(git("status", "--porcelain", "-uno")) if head else None
    except OSError:
        return None


def files(cfg: Config) -> dict[str, Any]:
    """{file of weights: its bytes and SHA-256}, by its path in the model's folder."""
    folder = assemble.converted(cfg)
    if folder is not None:
        found = [folder / convert.MANIFEST]  # which has the sums of all others, and of the source
    else:
        folder = hub.pipeline(cfg.model.path)
        network = hub.file(cfg.model.weights, "") if cfg.model.weights else None
        found = hub.read_of(folder, network)

    def name(file: Path) -> str:
        return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name

    return {name(f): {"bytes": f.stat().st_size, "sha256": disk.digest(f)} for f in found}


# --- ranks ----------------------------------------------------------------------------------------------------------


def ranked_forms(cfg: Config, prompts: int = PROMPTS) -> dict[str, Config]:
    """The two forms of the method with cfg's model, reward, solver and chunks, in the device's low precision if `cfg`
    has none. Raises ConfigError if previews of this config cannot be ranked."""
    count = min(CANDIDATES, cfg.candidates)
    if count < 4:
        raise ConfigError(f"candidates={cfg.candidates}: previews of 4 or more are ranked")
    assemble.check_rewards(cfg)
    one, kept = dataclasses.replace, max(2, count // 8 * 2)
    solver, shift = cfg.regenerate.solver, cfg.regenerate.shift
    solver, shift = (solver, shift) if solver in ODE else ("dpm2", 0.0)
    plain: dict[str, Any] = {"eta": 0.0, "window": 0, "window_within": 0, "shared_noise": False}
    plain |= {"solver": solver, "shift": shift}  # a branch is one solve
    low, full = one(cfg.explore or cfg.regenerate, **plain), one(cfg.regenerate, **plain)
    low = one(low, precision="auto" if low.precision == "bf16" else low.precision)
    size = max(n for n in range(1, min(low.chunk, full.chunk, count) + 1) if count % n == 0)
    whole = [n for n in range(kept, size + 1, kept) if prompts % (n // kept) == 0]  # whole prompts in a chunk
    rest = max(n for n in (*range(1, size + 1), *whole) if n in whole or kept % n == 0)
    low, full = one(low, steps=RESTART[0], chunk=size), one(full, steps=RESTART[1], chunk=rest, precision="bf16")
    shared = {"prompts": prompts, "candidates": count, "kept": kept, "selection": "best_worst", "iterations": 1}
    shared |= {"learn": Learn(micro_batch=1), "watch": Watch(every=1, prompts=prompts), "evaluate": Evaluate(every=0)}
    base = assemble.resolved(one(cfg, explore=low, regenerate=full, branch=None, **shared), assemble.capability())
    assert base.explore is not None
    steps, branch = BRANCH
    forms = {
        f"restart {RESTART[0]}+{RESTART[1]}": base,
        f"branch {steps}@{branch.after}+{branch.steps}": one(
            base, explore=one(base.explore, steps=steps), branch=branch
        ),
    }
    model = assemble.model_module(cfg).make(cfg.model)
    coverage.check(model, base.explore.precision, cfg.model.min_quantised_flops)
    return forms


def ranks(parts: Parts, cfg: Config) -> dict[str, Any]:
    """Spearman, overlap of the best and kept contrast of the previews of `cfg`'s forms, the mean over the prompts."""
    devices, there = parts.mesh.size, len(parts.prompts.train)
    count = min(-(-PROMPTS // devices), there // devices) * devices  # all there are, if fewer
    state, found, forms = assemble.fresh(parts), {}, ranked_forms(cfg, count)
    first = next(iter(forms.values()))
    for name, cfg in forms.items():
        each = watch.measured(train.ready(parts._replace(cfg=cfg)), state)
        found[name] = {key.removeprefix("watch/"): value for key, value in each.items()}
    assert first.explore is not None
    return {
        "ran": True,
        "prompts": count,
        "candidates": first.candidates,
        "kept": first.kept,
        "reward": first.reward,
        "precision": first.explore.precision,
        "forms": found,
    }


# --- the table ------------------------------------------------------------------------------------------------------


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """The JSON's main numbers as lines."""
    yield from _picture(found["picture"])
    rank = found["ranks"]
    yield f"previews in {rank['precision']}, {rank['prompts']} prompts x {rank['candidates']}, by {rank['reward']}:"
    for name, each in rank["forms"].items():
        names = (what for what in ("spearman", "overlap", "kept_contrast") if what in each)
        told = ", ".join(f"{what.replace('_', ' ')} {each[what]:.3f}" for what in names)
        yield f"  {name:16}{told or 'no prompt has two candidates of unequal reward'}"
        if "noise_spearman" in each:
            yield f"    of the full rollouts from the noise: spearman {each['noise_spearman']:.3f}"
    run = found["stages"]
    yield f"{run['prompts']} prompts; memory {run['memory']}; time {run['time']}"
    yield f"  {'stage':12}{'seconds':>9}{'plan':>9}{'peak GB':>9}{'plan':>9}"
    for name, row in run["stages"].items():
        gb = (None if x is None else x / 1e9 for x in (row["peak_bytes"], row["planned_bytes"]))
        cells = (row["seconds"], row["planned_seconds"], *gb)
        yield f"  {name:12}" + "".join(f"{'-' if x is None else f'{x:.3g}':>9}" for x in cells)


def _picture(picture: Mapping[str, Any]) -> Iterator[str]:
    if not picture["ran"]:
        yield f"picture: NOT COMPARED: {picture['why']}"
        return
    yield f"picture: {_within(picture['passed'])} its bounds, against {picture['against']['by']}"
    for w, each in picture["differences"].items():
        (rms, most), (mean, level) = ((each[x], each["bound"][x]) for x in ("latents_relative_rms", "picture_mean"))
        exact = each["ours_in_float32"] or {}
        yield f"  guidance {w}: latents {rms:.2e} (at most {most:.2e}), picture {mean:.3f} of 255 (at most {level:.3f})"
        if "passed" in exact:
            rms, mean = exact["latents_relative_rms"], exact["picture_mean"]
            yield f"    ours in float32: latents {rms:.2e}, picture {mean:.3f}, {_within(exact['passed'])} its bounds"


def _within(passed: bool) -> str:
    return "within" if passed else "OUT OF"
