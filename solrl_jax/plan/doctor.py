"""--mode=doctor: check whether a run can start here. The last line is "ready", or there is a list of things to fix.

Checks everything that a config names: the devices and their precisions, the weights (all files present and complete),
tokenizers, rewards (loaded as in a run), prompts, and space in memory and on disk. After a failed check, the next ones
still run.
"""

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax

from solrl_jax import device, guidance, plan, rewards, weights
from solrl_jax.config import FOLDER, Config, ConfigError
from solrl_jax.disk import unwritable
from solrl_jax.plan import jaxpr, shapes
from solrl_jax.quant import coverage
from solrl_jax.rewards.bound import Bound
from solrl_jax.run import assemble, base_loras, checkpoint, convert
from solrl_jax.run.data import DataError
from solrl_jax.run.log import duration
from solrl_jax.structs import WeightsError
from solrl_jax.weights import hub

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
SPARE = 2 * 2**30
"""Bytes of disk for pictures, logs and compiled programs, in addition to the checkpoints."""
REQUIREMENTS = FOLDER.parent / "requirements.txt"
"""Of the repository; an installed package has no such file."""


class Finding(NamedTuple):
    """One line of the result; `fix` says what to do if there is a problem."""

    text: str
    fix: str = ""
    unknown: bool = False  # could not be checked; does not prevent a run

    @property
    def mark(self) -> str:
        return "to do" if self.fix else "note" if self.unknown else "ok"


def run_doctor(cfg: Config, run: Path, *, devices: int | None = None) -> int:
    """Print the findings. Returns 0 if a run can start, 1 if something must be fixed first."""
    fixes = []
    for check in (versions, hardware, precision, division, model, tokenizers, judges, prompts, memory, disk):
        for found in examine(check, cfg, run, devices):
            if found.fix in fixes:  # as where the model's folder is missing
                found = Finding(f"{check.__name__}: not checked, for a reason above", unknown=True)
            print(f"{found.mark:6}{found.text}", flush=True)
            fixes += [found.fix] if found.fix else []
    todo = [f"- {fix}" for fix in fixes]
    print("\n".join(["", "to do first:", *todo] if todo else ["ready"]))
    return 1 if fixes else 0


Check = Callable[[Config, Path, int | None], Iterator[Finding]]


def examine(check: Check, cfg: Config, run: Path, devices: int | None) -> Iterator[Finding]:
    """The findings of a check; an error that would end a run becomes a finding."""
    try:
        yield from check(cfg, run, devices)
    except (ConfigError, DataError, WeightsError) as e:
        yield Finding(f"{check.__name__}: see below", str(e))


def versions(cfg: Config, run: Path, devices: int | None) -> Iterator[Finding]:
    found = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    yield Finding(f"Python {platform.python_version()}, {found}")
    if (asked := minima()) is None:
        why = f"neither {REQUIREMENTS} nor pip's record of solrl_jax names the required versions"
        yield Finding(f"versions were not compared: {why}", unknown=True)
        return
    for name, least in asked.items():
        if number(metadata.version(name)) < number(least):
            text = f"{name} {metadata.version(name)} is older than the required {least}"
            how = f"-r {REQUIREMENTS.name}" if REQUIREMENTS.is_file() else f"'{name}>={least}'"
            yield Finding(text, f"{text}: pip install {how}")


def minima() -> dict[str, str] | None:
    """{package: minimum version} for PACKAGES, from requirements.txt, or else from pip's record of solrl_jax; None if
    neither names one."""
    try:
        lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        try:
            lines = [line for line in metadata.requires("solrl_jax") or [] if "extra ==" not in line]
        except metadata.PackageNotFoundError:
            return None
    found = (re.match(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)", line) for line in lines)
    return {m[1]: m[2] for m in found if m and m[1] in PACKAGES} or None


def number(version: str) -> tuple[int, ...]:
    """ "0.10.2.dev1" -> (0, 10, 2)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[a-z+]", version)[0]))


def hardware(cfg: Config, run: Path, devices: int | None) -> Iterator[Finding]:
    first, count = jax.devices()[0], jax.device_count()
    if first.platform == "cpu":
        what = f"{count} CPU device{'s' * (count > 1)}, {os.cpu_count()} cores"
        # The plugin can only be missing on a computer with an NVIDIA card.
        unseen = shutil.which("nvidia-smi") is not None and not os.environ.get("JAX_PLATFORMS", "").startswith("cpu")
        how = "-r requirements.txt (jax[cuda12])" if REQUIREMENTS.is_file() else "'jax[cuda12]'"
        fix = f"JAX does not see the NVIDIA GPU here: pip install {how}, or read JAX's log"
        yield Finding(what, fix if unseen else "")
        return
    limit = (first.memory_stats() or {}).get("bytes_limit", 0)
    yield Finding(f"{count} x {first.device_kind}, JAX may take {limit / 1e9:.1f} GB of each")
    if first.platform == "gpu" and (settings := device.absent()):
        text = f"settings for speed or memory are missing: {', '.join(settings)}"
        yield Finding(text, "call solrl_jax.device.setup() before the first array, or set them in the environment")


def precision(cfg: Config, run: Path, devices: int | None) -> Iterator[Finding]:
    meant = assemble.resolved(cfg, assemble.capability())
    for (name, asked, _), (_, stage, _) in zip(cfg.stages(), meant.stages(), strict=True):
        auto = " (auto)" if asked.precision == "auto" else ""
        branch = cfg.branch if name == "regenerate" else None
        where = f", from the preview's state after step {branch.after}" if branch else ""
        yield Finding(f"{name}: {stage.steps} {stage.solver} steps in {stage.precision}{auto}{where}")


def division(cfg: Config, run: Path, devices: int | None) -> Iterator[Finding]:
    mesh = assemble.make_mesh(devices, max(1, cfg.shard), cfg.prompts)
    assemble.check_divides(cfg, mesh.size)
    assemble.check_shard(cfg, mesh, assemble.resolved(cfg, assemble.capability()).low_precision)
    yield Finding(f"{cfg.prompts} prompts over {mesh.size} device{'s' * (mesh.size > 1)}")


def model(cfg: Config, run: Path, devices: int | None) -> Iterator[Finding]:
    """The model's configs and weight files; a file's header says how long the file must be."""
    where, module = cfg.model.path, assemble.model_module(cfg)
    made = module.make(cfg.model)
    guidance.check(cfg, made)
    for line in guidance.told(cfg, made):
        yield Finding(line)
    base = jax.eval_shape(made.init, jax.random.key(0))
    name = f"{cfg.model.name}, {shapes.parameters(base):,} parameters"
    if (folder := assemble.converted(cfg)) is not None:
        convert.check(folder, module.shapes(cfg.model))
        yield Finding(f"{name}: converted weights, complete, in {folder}")
    elif (folder := hub.pipeline_here(where)) is None:
        fix = f"fetch {where}: hf download {where}, or let a run do it"
        yield Finding(f"{name}: {where} is not complete in the hub's cache", fix)
    else:
        yield from files(cfg, folder, name)
    for line in base_loras.notes(base_loras.read(cfg.model, made), cfg.lora):
        yield Finding(line)
    low = assemble.resolved(cfg, assemble.capability()).low_precision
    if low:
        coverage.check(made, low, cfg.model.min_quantised_flops)


def files(cfg: Config, folder: Path, name: str) -> Iterator[Finding]:
    """A finding for each incomplete file, then the number of files."""
    named = cfg.model.weights
    network = hub.file_here(named) if named else None
    if named and network is None:
        what = f"model.weights={named} is not a file here, nor in the hub's cache"
        yield Finding(what, f"{what}: give one that is, or org/name/file of {hub.SITE}, which a run fetches")
    found = hub.read_of(folder, network)
    for file in found:
        try:
            weights.Files(file).close()
        except WeightsError as e:
            yield Finding(str(e), str(e))
    total = sum(file.stat().st_size for file in found if file.is_file())
    yield Finding(f"{name}: {len(found)} files of weights, {total / 1e9:.1f} GB, in {folder}")


def tokenizers(cfg: Config, run: Path, devices: int | None) -> Iterator[Finding]:
    tokens = assemble.model_module(cfg).make(cfg.model).tokenize(["a red circle"])
    read = {name: x["ids"] if isinstance(x, dict) else x for name, x in tokens.items()}
    lengths = ", ".join(f"{name} {ids.shape[-1]}" for name, ids in read.items())
    yield Finding(f"tokenizers: {lengths or 'there'}")


def judges(cfg: Config, run: Path, devices: int | None) -> Iterator[Finding]:
    """Load each reward and free it again; a run would only find an error after reading the model's weights.

    Whether it can read the run's prompts is looked at, too, if there are such: the next check says what is wrong.
    """
    try:
        asked = assemble.open_prompts(cfg)
        binding = assemble.binding(cfg, asked)
    except (ConfigError, DataError):
        asked, binding = None, Bound()
    judging = cfg.evaluate.every > 0  # else a run does not load those that are held out
    names = dict.fromkeys(n for n in assemble.reward_names(cfg) if judging or n in rewards.parse(cfg.reward))
    if not rewards.parse(cfg.reward):
        yield Finding("no reward to train on", f"give --config.reward, of {', '.join(rewards.REWARDS)}")
    for name in names:
        try:
            score, params = rewards.load_rewards(name, rewards.parse_paths(cfg.reward_paths), cfg.reward_dtype)
            texts = ["a red circle"] if asked is None else [*asked.train, *asked.test]
            if asked is not None or not score.on_host:
                rows = None if asked is None else asked.rows_of(texts)
                rewards.tokenize(score, texts, rows, binding.masks(score.names, rows or ()))
        except (ConfigError, WeightsError) as e:
            told = str(e) if str(e).startswith(f"reward {name}") else f"reward {name}: {e}"
            yield Finding(f"reward {name}: see below", told)
            continue
        place = "on the host" if score.on_host else f"{jaxpr.nbytes(params) / 1e9:.1f} GB"
        yield Finding(f"reward {name}: {place}{'' if name in rewards.parse(cfg.reward) else ', held out'}")


def prompts(cfg: Config, run: Path, devices: int | None) -> Iterator[Finding]:
    found = assemble.open_prompts(cfg, train=cfg.prompts, test=cfg.evaluate.prompts if cfg.evaluate.every else 0)
    assemble.check_binding(cfg, found)
    dropped = f" ({found.repeated} repeated and {found.blank} blank lines dropped)" * bool(found.repeated + found.blank)
    yield Finding(f"{len(found.train)} training prompts, {len(found.test)} test prompts{dropped}")


def memory(cfg: Config, run: Path, devices: int | None) -> Iterator[Finding]:
    """Whether every stage fits into memory, and the time of an iteration; only for a known GPU."""
    card = plan.device_card()
    if card is None:
        yield Finding("memory and time: no known GPU here; --mode=plan --card=... gives them for a card")
        return
    cfg, count = assemble.resolved(cfg, assemble.capability()), devices or jax.device_count()
    _, uses, *why = plan.fitted(cfg, shapes.read(cfg, count), count, card, host=jax.local_device_count())
    yield from (Finding(line) for line in why if line)
    most = max(uses, key=lambda use: use.total)
    seconds = plan.spent(uses)
    yield Finding(f"memory: {most.stage} takes the most, {most.total / 1e9:.1f} of {plan.room(card) / 1e9:.1f} GB")
    whole = duration(seconds * cfg.iterations)
    yield Finding(f"time: about {duration(seconds)} per iteration, {whole} for all {cfg.iterations}, with evaluation")


def disk(cfg: Config, run: Path, devices: int | None) -> Iterator[Finding]:
    """Space for the checkpoints that are kept and for one that is being written."""
    place = next(parent for parent in (run, *run.absolute().parents) if parent.exists())
    state = jaxpr.nbytes(assemble.blank(cfg, assemble.model_module(cfg).make(cfg.model), assemble.make_mesh(1)))
    need, free = (cfg.keep + 1) * state + SPARE, shutil.disk_usage(place).free
    kept = f"{cfg.keep} checkpoints of {state / 1e9:.2f}"
    text = f"disk: {free / 1e9:.0f} GB free for {run}, {need / 1e9:.1f} GB needed ({kept})"
    fix = f"make room at {place}, name another --run_dir, or lower keep={cfg.keep}" if free < need else ""
    if why := unwritable(run):
        fix = f"{why}: name another --run_dir"
    yield Finding(text, fix)
    if (run / "config.json").exists() and (found := checkpoint.latest(run))[0] is not None:
        yield Finding(f"{run} holds a run, saved at iteration {found[0]}: --resume continues it")
