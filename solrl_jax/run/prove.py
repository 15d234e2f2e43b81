"""--mode=prove: is this model the public one here, does its preview rank, and what does it take. A JSON to post.

Three parts, for the first run with real weights and for every new model. Stages: one iteration of the config with one
prompt a device, its seconds and memory beside the plan's. Ranks: previews in the device's low precision against full
rollouts, in the two forms of the method, on PROMPTS prompts. Picture: diffusers' own pipeline, or a stored picture,
against ours (prove_picture.py). The JSON is written after each part, so an error leaves what was measured before it.
"""

import dataclasses
import functools
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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from solrl_jax import disk, iteration, learn, plan, rollout, sharding, train
from solrl_jax.config import FOLDER, Branch, Config, ConfigError, Evaluate, Learn, Stage, Watch, to_json
from solrl_jax.plan import jaxpr, shapes
from solrl_jax.plan.cards import seconds
from solrl_jax.plan.doctor import PACKAGES
from solrl_jax.quant import coverage
from solrl_jax.run import assemble, convert, guards, prove_picture
from solrl_jax.run.assemble import Parts
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
    if out.is_dir() or out.suffix != ".json":
        raise ConfigError(f"--out={out}: give a file that ends in .json, as in --out=prove.json")
    given, want = cfg, prove_picture.asked(cfg, prompt)
    kept = None if reference is None else prove_picture.stored(reference, want)
    why_not = "" if reference else prove_picture.absent(cfg)
    forms = ranked_forms(cfg)
    with tempfile.TemporaryDirectory() as folder:
        if not cfg.prompt_files:
            file = Path(folder) / "prompts.txt"
            file.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
            cfg = dataclasses.replace(cfg, prompt_files=str(file))
        parts = assemble.assemble(one_prompt_each(cfg, devices or jax.device_count()), devices)
    found: dict[str, Any] = {"format": FORMAT, **facts(given, parts), "weights": files(given)}
    with jax.set_mesh(parts.mesh):
        work: dict[str, Callable[[], dict[str, Any]]] = {
            "stages": lambda: stages(train.ready(parts)),
            "ranks": lambda: ranks(parts, forms),
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


def write(out: Path, found: Mapping[str, Any]) -> None:
    """As JSON, with null for numbers that are not finite."""

    def finite(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {k: finite(v) for k, v in x.items()}
        return None if isinstance(x, float) and not math.isfinite(x) else x

    try:
        with disk.whole(out) as f:
            f.write((json.dumps(finite(found), indent=1, allow_nan=False) + "\n").encode())
    except PermissionError as e:
        raise ConfigError(f"--out={out} cannot be written ({e.strerror}): give another file") from None


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
        "config": json.loads(to_json(cfg)),
    }


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

    return {name(f): {"bytes": f.stat().st_size, "sha256": convert.digest(f)} for f in found}


# --- stages ---------------------------------------------------------------------------------------------------------


def one_prompt_each(cfg: Config, devices: int) -> Config:
    """`cfg` in one iteration of one prompt a device, without watch and evaluation.

    The chunks and the micro-batch are the largest that divide this, up to the config's own.
    """
    one, most = dataclasses.replace, max(1, cfg.learn.micro_batch)
    smaller = {name: one(stage, chunk=min(stage.chunk, images)) for name, stage, images in cfg.stages()}
    if cfg.branch is not None:
        smaller["regenerate"] = one(smaller["regenerate"], steps=cfg.regenerate.steps)
    smaller |= {"prompts": devices, "iterations": 1, "watch": Watch(every=0), "evaluate": Evaluate(every=0)}
    for size in range(most, 0, -1):
        for every in dict.fromkeys((cfg.learn.reference_every, 1)):
            how = one(cfg.learn, micro_batch=size, reference_every=every)
            try:
                made = one(cfg, learn=how, **smaller)
                learn.micro_batches(made, made.kept // made.learn.updates)
                return made
            except ConfigError:
                continue
    return one(cfg, **smaller)  # whose error names what is wrong


class Row(NamedTuple):
    """Of a stage: seconds, those of the first time with compiling, the plan's; bytes on the device with the most at
    its end since the process began, whether this stage took more than those before it, and the plan's bytes."""

    seconds: float
    first_seconds: float
    planned_seconds: float | None
    peak_bytes: int | None
    rose: bool | None
    planned_bytes: int | None


def stages(parts: Parts) -> dict[str, Any]:
    """Encode and an iteration, twice: memory of the first time, seconds of the second. And one decode of a chunk."""
    cfg, card = dataclasses.replace(parts.cfg, shard=parts.mesh.shape[sharding.FSDP]), plan.device_card()
    sizes = shapes.read(cfg, parts.mesh.size)
    uses = {u.stage: u for u in plan.uses_of(cfg, sizes, parts.mesh.size, card or plan.CARDS["H100 80GB"])}
    times, peaks = ({}, {}), {"begin": peak()}
    texts, state = parts.prompts.train[: cfg.prompts], assemble.fresh(parts)
    staged = iteration.Staged(model=parts.model, score=parts.score, optimizer=parts.optimizer, cfg=parts.cfg)
    plain, seen = dict(staged.jit), {name: _noting(f, name, peaks) for name, f in staged.jit.items()}
    for each, programs in zip(times, (seen, plain), strict=True):
        parts.text.kept.clear()  # else nothing is encoded
        with iteration.clock(each, "encode"):
            prompts = jax.block_until_ready(assemble.encode(parts, texts, parts.score))
        peaks.setdefault("encode", peak())
        staged.jit = programs
        staged(state, parts.frozen, prompts, each)
    rows, before = {}, peaks.pop("begin")
    for name, use in uses.items():
        most = peaks[name]
        rose = None if most is None or before is None else most > before
        planned = None if card is None else use.seconds
        rows[name] = Row(times[1][name], times[0][name], planned, most, rose, use.total)._asdict()
        before = most
    return {
        "ran": True,
        "prompts": cfg.prompts,
        "candidates": cfg.candidates,
        "kept": cfg.kept,
        "of": {"micro_batch": cfg.learn.micro_batch, **{n: dataclasses.asdict(s) for n, s, _ in cfg.stages()}},
        "memory": "measured" if before is not None else f"unknown: a {jax.devices()[0].platform} does not tell",
        "time": "planned" if card is not None else "not planned: this device is not a card that the plan knows",
        "stages": rows,
        "decode": decode(parts, card),
    }


def peak() -> int | None:
    """The most bytes in use since the process began, of the device with the most; None if they do not tell."""
    found = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    return None if None in found else max(x for x in found if x is not None)


def _noting(program: Callable[..., Any], name: str, peaks: dict[str, int | None]) -> Callable[..., Any]:
    """`program`, after which the peak is noted under its stage."""

    def run(*args: Any) -> Any:
        found = jax.block_until_ready(program(*args))
        peaks["quantise" if name in ("merged", "quantised") else name] = peak()
        return found

    return run


def decode(parts: Parts, card: plan.Card | None) -> dict[str, Any]:
    """Seconds of one decode of regenerate's chunk of pictures, on each device the same."""
    count, vae = parts.cfg.regenerate.chunk, parts.frozen.vae
    keys = jax.random.split(jax.random.key(parts.cfg.seed), count)
    x0, run = sharding.replicate(rollout.noises(parts.model, keys), parts.mesh), jax.jit(parts.model.decode)
    jax.block_until_ready(run(vae, x0))
    times: dict[str, float] = {}
    with iteration.clock(times, "decode"):
        jax.block_until_ready(run(vae, x0))
    work = jaxpr.flops(jaxpr.trace(parts.model.decode, vae, x0))
    return {"pictures": count, **times, "planned_seconds": None if card is None else seconds(work, card)}


# --- ranks ----------------------------------------------------------------------------------------------------------


def ranked_forms(cfg: Config) -> dict[str, Config]:
    """The two forms of the method with cfg's model, reward, solver and chunks, in the device's low precision if `cfg`
    has none. Raises ConfigError if previews of this config cannot be ranked."""
    count = min(CANDIDATES, cfg.candidates)
    if count < 4:
        raise ConfigError(f"candidates={cfg.candidates}: previews of 4 or more are ranked")
    assemble.check_rewards(cfg)
    one, kept = dataclasses.replace, max(2, count // 8 * 2)
    plain: dict[str, Any] = {"eta": 0.0, "window": 0, "window_within": 0, "shared_noise": False, "shift": 0.0}
    if cfg.regenerate.stochastic:
        plain["solver"] = "dpm2"
    low, full = one(cfg.explore or cfg.regenerate, **plain), one(cfg.regenerate, **plain)
    low = one(low, precision="auto" if low.precision == "bf16" else low.precision)
    size = max(n for n in range(1, min(low.chunk, full.chunk, count) + 1) if count % n == 0)
    rest = max(n for n in range(1, size + 1) if kept % n == 0)
    low, full = one(low, steps=RESTART[0], chunk=size), one(full, steps=RESTART[1], chunk=rest, precision="bf16")
    shared = {"prompts": PROMPTS, "candidates": count, "kept": kept, "selection": "best_worst", "iterations": 1}
    shared |= {"learn": Learn(micro_batch=1), "watch": Watch(every=1, prompts=PROMPTS), "evaluate": Evaluate(every=0)}
    base = assemble.resolved(one(cfg, explore=low, regenerate=full, branch=None, **shared), assemble.capability())
    assert base.explore is not None
    steps, branch = BRANCH
    forms = {
        f"restart {RESTART[0]}+{RESTART[1]}": base,
        f"branch {steps}@{branch.after}+{branch.steps}": one(base, explore=one(base.explore, steps=steps), branch=branch),
    }
    model = assemble.model_module(cfg).make(cfg.model)
    coverage.check(model, base.explore.precision, cfg.model.min_quantised_flops)
    return forms


def ranks(parts: Parts, forms: Mapping[str, Config]) -> dict[str, Any]:
    """Spearman, overlap of the best and kept contrast of the previews, the mean over the prompts."""
    state, found, first = assemble.fresh(parts), {}, next(iter(forms.values()))
    for name, cfg in forms.items():
        cfg = dataclasses.replace(cfg, prompt_files=parts.cfg.prompt_files, shard=parts.cfg.shard)
        each = guards.measured(train.ready(parts._replace(cfg=cfg)), state)
        found[name] = {key.removeprefix("watch/"): value for key, value in each.items()}
    assert first.explore is not None
    devices, there = parts.mesh.size, len(parts.prompts.train)
    return {
        "ran": True,
        "prompts": min(-(-PROMPTS // devices), there // devices) * devices,
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
        yield f"  {name:16}Spearman {each['spearman']:.3f}, overlap {each['overlap']:.3f}, contrast {each['kept_contrast']:.3f}"
        if "noise_spearman" in each:
            yield f"    of the full rollouts from the noise: Spearman {each['noise_spearman']:.3f}"
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
    yield f"picture: {'within' if picture['passed'] else 'OUT OF'} its bounds, against {picture['against']['by']}"
    for w, each in picture["differences"].items():
        bound = each["bound"]
        yield (
            f"  guidance {w}: latents {each['latents_relative_rms']:.2e} (at most {bound['latents_relative_rms']:.2e}), "
            f"picture {each['picture_mean']:.3f} of 255 (at most {bound['picture_mean']:.3f})"
        )
