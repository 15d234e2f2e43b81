"""Frozen dataclasses: one run, whole. Every field is validated where it is made, with the value, the rule and the mend.

Sizes are global (prompts, candidates, kept); what one device does follows from them. A config file in configs/ defines
`config(recipe: str) -> Config` and RECIPES, all there are; `--config=tiny:sol_rl_clipscore` names file and recipe.
"""

import dataclasses
import difflib
import importlib
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

FAMILIES = ("sol_rl", "naive_scaling", "naive_quant", "diffusionnft")
ALIASES = {"compile": "naive_scaling"}
"""Families of the original that are another one here, where everything is compiled."""
Precision = Literal["auto", "bf16", "fp8", "nvfp4_native", "nvfp4_emulated"]
"""Of a rollout (solrl_jax.quant); auto is the device's best low one."""


class ConfigError(ValueError):
    """A config that cannot run; the message names the value, the rule and the mend."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True)
class Model:
    """Which network, from where: `path` is a diffusers pipeline folder or a model of huggingface.co, "org/name".

    `size` is in pixels, `text_tokens` counts tokens of T5 or Gemma.
    """

    name: str = "flux"
    path: str = ""
    weights: str = ""  # a file of the network's weights to take instead of the folder's, or org/name/file
    schedule: Literal["own", "linear"] = "own"  # the pipeline's; or sigmas in equal steps from 1 to 0
    size: int = 512
    text_tokens: int = 128
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    vae_dtype: Literal["bfloat16", "float32"] = "float32"  # of the decoder's convolutions; its weights are f32
    remat: bool = True  # recompute blocks in the backward pass, but for what `remat_keeps` names
    remat_keeps: tuple[str, ...] = ()  # of "attention", "qkv", "mlp": faster, and so much more memory
    min_dim: int = 1000  # quantise only Linears with max(in, out) above this
    min_quantised_flops: float = 0.0  # a run whose rule covers a smaller share of the blocks' FLOPs stops

    def __post_init__(self):
        _require(self.size > 0, f"model.size={self.size}: give pixels, 1 or more")
        strange = sorted(set(self.remat_keeps) - {"attention", "qkv", "mlp"})
        _require(not strange, f"model.remat_keeps={','.join(self.remat_keeps)}: use some of attention, qkv, mlp")
        _require(self.text_tokens > 0, f"model.text_tokens={self.text_tokens}: give 1 or more")
        _require(0 <= self.min_quantised_flops <= 1, "model.min_quantised_flops is a share, 0 to 1")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One ODE rollout: how many steps, by which solver, in which precision, how many images at a time."""

    steps: int = 10
    solver: Literal["euler", "dpm1", "dpm2"] = "dpm2"
    precision: Precision = "bf16"
    chunk: int = 24

    def __post_init__(self):
        _require(self.steps >= 1, f"steps={self.steps}: a rollout takes at least one step")
        _require(self.chunk >= 1, f"chunk={self.chunk}: give 1 or more images at a time")


@dataclasses.dataclass(frozen=True)
class Lora:
    """y = W x + (alpha / rank) B A x on `targets` (empty: the model's own list)."""

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = ()

    def __post_init__(self):
        _require(self.rank >= 1, f"lora.rank={self.rank}: give 1 or more")
        _require(0 < self.alpha < math.inf, f"lora.alpha={self.alpha}: give a positive number")


@dataclasses.dataclass(frozen=True)
class Learn:
    """The policy update (algorithms.md section 2 and 6). `micro_batch` counts (sample, time) points a forward pass."""

    algorithm: Literal["nft"] = "nft"
    timestep_fraction: float = 0.6
    updates: int = 1  # optimiser steps per pass over the kept samples
    epochs: int = 1  # passes over the kept samples, each with fresh times and noise
    micro_batch: int = 12
    learning_rate: float = 3e-4
    kl_weight: float = 1e-4
    strength: float = 1.0
    advantage_clip: float = 5.0
    advantage_mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all"
    clip_norm: float = 1.0
    weight_decay: float = 1e-4
    old_ramp: float = 1e-3  # old <- c old + (1 - c) current, c = min(old_ramp * updates, old_max)
    old_max: float = 0.5
    ema_max: float = 0.9

    def __post_init__(self):
        _require(
            0 < self.timestep_fraction <= 1, f"learn.timestep_fraction={self.timestep_fraction}: above 0, at most 1"
        )
        for name in ("updates", "epochs", "micro_batch"):
            _require(getattr(self, name) >= 1, f"learn.{name}={getattr(self, name)}: give 1 or more")
        for name in ("learning_rate", "kl_weight", "weight_decay", "old_ramp", "old_max", "ema_max"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"learn.{name}={value}: give a finite number, 0 or more")
        _require(0 < self.clip_norm < math.inf, f"learn.clip_norm={self.clip_norm}: give a positive number")
        _require(self.ema_max < 1, f"learn.ema_max={self.ema_max}: 0 (no average) up to below 1")
        _require(self.strength > 0, f"learn.strength={self.strength}: a positive number (1.0 or 0.1 in the paper)")
        _require(self.advantage_clip > 0, f"learn.advantage_clip={self.advantage_clip}: a positive number")
        _require(0 <= self.old_max < 1, f"learn.old_max={self.old_max}: 0 (old = current) up to below 1")


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Fixed prompts x fixed keys every `every` iterations (0: never), EMA weights, full steps."""

    every: int = 20
    prompts: int = 16
    images: int = 1  # per prompt
    steps: int = 28
    solver: Literal["euler", "dpm1", "dpm2"] = "dpm2"
    rewards: str = ""  # held-out rewards, scored and never trained on: "shapes" or "pickscore,hpsv2"
    grid: int = 8  # prompts in the picture grid
    chunk: int = 24

    def __post_init__(self):
        _require(self.every >= 0, f"evaluate.every={self.every}: 0 (never) or more")
        for name in ("prompts", "images", "steps", "chunk"):
            _require(getattr(self, name) >= 1, f"evaluate.{name}={getattr(self, name)}: give 1 or more")
        _require(
            self.images <= self.chunk or self.images % self.chunk == 0,
            f"evaluate.chunk={self.chunk} does not divide a prompt's {self.images} images: use one of "
            f"{_divisors(self.images)}, or {self.images} or more",
        )
        _require(1 <= self.grid <= self.prompts, f"evaluate.grid={self.grid}: 1 to evaluate.prompts={self.prompts}")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. `explore` None means one stage: `regenerate` rolls out all candidates, the kept are chosen from it."""

    name: str = ""
    model: Model = dataclasses.field(default_factory=Model)
    prompt_files: str = ""  # a folder with train.txt and test.txt, or one file (see data.read)
    reward: str = ""  # "clipscore" or a weighted mix "pickscore:1,hpsv2:0.5"
    reward_paths: tuple[str, ...] = ()  # "clipscore=folder", or "clipscore=org/name" of huggingface.co
    reward_dtype: Literal["float32", "bfloat16"] = "float32"  # what their networks compute in; weights stay float32
    prompts: int = 48
    candidates: int = 96
    kept: int = 24
    selection: Literal["best_worst", "top", "random", "all"] = "best_worst"
    explore: Stage | None = dataclasses.field(default_factory=lambda: Stage(steps=6, precision="auto"))
    regenerate: Stage = dataclasses.field(default_factory=Stage)
    lora: Lora = dataclasses.field(default_factory=Lora)
    learn: Learn = dataclasses.field(default_factory=Learn)
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)
    iterations: int = 300
    seed: int = 42
    save_every: int = 20  # iterations between checkpoints; 0: only where the run ends or is stopped
    keep: int = 3  # checkpoints
    encode_ahead: int = 0  # iterations whose prompts are encoded together, then the text encoders leave; 0: they stay
    staged: bool = True  # stages jitted apart (progress, stage times); False: one jit of the whole iteration_step

    def __post_init__(self):
        p, n, k = self.prompts, self.candidates, self.kept
        _require(p >= 1, f"prompts={p}: give 1 or more")
        _require(1 <= k <= n, f"kept={k} of candidates={n}: keep between 1 and {n}")
        _require(
            self.selection != "best_worst" or k % 2 == 0,
            f"kept={k} is odd: best_worst keeps K/2 best and K/2 worst; use kept={k + 1 if k < n else k - 1}",
        )
        _require(self.selection != "all" or k == n, f"selection=all keeps every candidate: set kept={n}")
        for name, stage, count in self.stages():
            together = stage.chunk // count if stage.chunk % count == 0 else 0  # whole prompts in a chunk
            _require(
                count % stage.chunk == 0 or (together > 0 and p % together == 0),
                f"{name}.chunk={stage.chunk} neither divides a prompt's {count} images nor takes whole prompts of {p}: "
                f"use one of {_divisors(count) + [count * d for d in _divisors(p)[1:]]}",
            )
        _require(
            len(self._low()) < 2,
            f"the rollouts run in {' and in '.join(self._low())}: kernels are quantised once, name one low precision",
        )
        u, t, m = self.learn.updates, self.times, self.learn.micro_batch
        _require(k % u == 0, f"learn.updates={u} does not divide kept={k}: use one of {_divisors(k)}")
        fraction, steps = self.learn.timestep_fraction, self.regenerate.steps
        _require(t >= 1, f"learn.timestep_fraction={fraction}: no time of {steps} steps is trained, raise it")
        _require(
            m % t == 0 or t % m == 0,
            f"learn.micro_batch={m} is neither a multiple nor a divisor of the {t} trained times a sample has: use {t}",
        )
        points = p * k // u * t
        _require(
            points % m == 0,
            f"learn.micro_batch={m} does not divide the {points} points of an update: use one of {_divisors(points)}",
        )
        _require(self.seed >= 0, f"seed={self.seed}: 0 or more")
        _require(self.iterations >= 0, f"iterations={self.iterations}: 0 or more")
        _require(self.encode_ahead >= 0, f"encode_ahead={self.encode_ahead}: 0 (the text encoders stay) or more")
        _require(self.save_every >= 0, f"save_every={self.save_every}: 0 (only at the end) or more")
        _require(self.keep >= 1, f"keep={self.keep}: keep at least one checkpoint")

    @property
    def times(self) -> int:
        """Trained times a sample has: T = int(fraction * steps)."""
        return int(self.learn.timestep_fraction * self.regenerate.steps + 1e-9)

    @property
    def low_precision(self) -> str | None:
        """The precision of the quantised kernels that rollouts run on, if any does."""
        return next(iter(self._low()), None)

    def _low(self) -> list[str]:
        return sorted({stage.precision for _, stage, _ in self.stages()} - {"bf16"})

    def stages(self) -> list[tuple[str, Stage, int]]:
        """(name, stage, images a prompt) of the rollouts, in order."""
        if self.explore is None:
            return [("regenerate", self.regenerate, self.candidates)]
        return [("explore", self.explore, self.candidates), ("regenerate", self.regenerate, self.kept)]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def family(config: Config, name: str) -> Config:
    """The rollout of a family: sol_rl, naive_scaling (all N in BF16), naive_quant (low precision throughout) or
    diffusionnft (K of K, nothing selected). One-stage families have explore = None (algorithms.md section 6)."""
    if name == "sol_rl":
        return config
    low = config.explore.precision if config.explore else "auto"
    full = dataclasses.replace(
        config.regenerate, chunk=config.explore.chunk if config.explore else config.regenerate.chunk
    )
    if name == "naive_scaling":
        return dataclasses.replace(config, explore=None, regenerate=full)
    if name == "naive_quant":
        return dataclasses.replace(config, explore=None, regenerate=dataclasses.replace(full, precision=low))
    if name == "diffusionnft":
        return dataclasses.replace(config, explore=None, candidates=config.kept, selection="all")
    raise ConfigError(f"unknown family {name!r}: use one of {', '.join(FAMILIES)}")


def recipes(rewards: Sequence[str]) -> tuple[str, ...]:
    """FAMILY_REWARD of every family and reward, aliases last."""
    return tuple(f"{name}_{reward}" for name in (*FAMILIES, *ALIASES) for reward in rewards)


def choose(base: Callable[[str], Config], rewards: Sequence[str], recipe: str) -> Config:
    """The config of FAMILY_REWARD, of a FAMILY alone or of "": the default is sol_rl, and the first of `rewards`.

    `base(reward)` is sol_rl on that reward. Raises ConfigError for another recipe, with the nearest.
    """
    found = next((r for r in rewards if recipe.endswith(f"_{r}")), None)
    name = recipe.removesuffix(f"_{found}") if found else recipe or FAMILIES[0]
    reward = found or rewards[0]
    if name not in (*FAMILIES, *ALIASES):
        at = base(reward).name
        near = difflib.get_close_matches(recipe, (*FAMILIES, *ALIASES, *recipes(rewards)), 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"--config={at}:{recipe}: no such recipe; {hint}use FAMILY_REWARD, of {', '.join((*FAMILIES, *ALIASES))} "
            f"and {', '.join(rewards)} (--config={at}:help lists them)"
        )
    return family(base(reward), ALIASES.get(name, name))


def help_lines(name: str) -> list[str]:
    """What `--config=<name>:help` prints: the config file's own words, and every recipe in one line."""
    module = _module(name)
    made = {recipe: module.config(recipe) for recipe in module.RECIPES}
    default, width = module.config(""), max(map(len, made))
    first = next(recipe for recipe, cfg in made.items() if cfg == default)
    lines = [*(module.__doc__ or "").strip().splitlines(), "", f"Recipes of --config={name}:RECIPE (default: {first})"]
    for recipe, cfg in made.items():
        same = next((f"; the same as {real}" for old, real in ALIASES.items() if recipe.startswith(old)), "")
        here = (Path(__file__).parent / "rewards" / f"{cfg.reward}.py").is_file()
        missing = "" if here else f" ({cfg.reward} is not here yet)"
        lines.append(f"  {recipe:{width}}  {describe(cfg)}{same}{missing}")
    return [*lines, "A FAMILY alone is trained on the default's reward."]


def describe(config: Config) -> str:
    """The rollout in one line: "explore 96 x 6 steps nvfp4_emulated, regenerate 24 x 10 steps bf16"."""
    rollouts = [f"{name} {count} x {stage.steps} steps {stage.precision}" for name, stage, count in config.stages()]
    if config.explore is not None:
        return ", ".join(rollouts)
    return f"{rollouts[0].replace('regenerate', 'roll out')}, keep {config.kept}"


def load(spec: str, overrides: Mapping[str, str] | None = None) -> Config:
    """`tiny` or `tiny:sol_rl_clipscore` -> Config, with {"explore.steps": "4"} overrides applied in order."""
    name, _, recipe = spec.partition(":")
    return override(_module(name).config(recipe), **(overrides or {}))


def _module(name: str) -> types.ModuleType:
    """configs/<name>.py."""
    if name not in available():
        raise ConfigError(f"--config={name}: there is no configs/{name}.py; use one of {', '.join(available())}")
    return importlib.import_module(f"configs.{name}")


def available() -> list[str]:
    """Names that --config takes: the files of the repository's configs/."""
    try:
        configs = importlib.import_module("configs")
    except ModuleNotFoundError:
        raise ConfigError(f"no folder configs/ in {Path.cwd()}: run from the repository's root") from None
    return sorted(f.stem for path in configs.__path__ for f in Path(path).glob("[a-z]*.py"))


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1)


def from_json(text: str) -> Config:
    """The inverse of `to_json`; a field that this version does not know raises ConfigError."""
    try:
        return _build(Config, json.loads(text), "")
    except json.JSONDecodeError as e:
        raise ConfigError(f"not the JSON of a config: {e}") from None


def values(config: Config) -> list[tuple[str, Any]]:
    """[("explore.steps", 6), ...]: every single value by its dotted name; a missing stage is one value, None."""

    def walk(tree: dict[str, Any], at: str) -> Iterator[tuple[str, Any]]:
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, f"{at}{name}.")
            else:
                yield f"{at}{name}", value

    return list(walk(dataclasses.asdict(config), ""))


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """{"explore.steps": (6, 4)} for every single value that is not the same in both."""
    a, b = dict(values(old)), dict(values(new))
    return {k: (a.get(k), b.get(k)) for k in {**a, **b} if a.get(k) != b.get(k)}


def _build(kind: Any, values: dict[str, Any], at: str) -> Any:
    types_ = typing.get_type_hints(kind)
    if strange := [f"{at}{name}" for name in values if name not in types_]:
        raise ConfigError(
            f"unknown fields {', '.join(strange)}: this config was written by another version of solrl_jax"
        )
    made = {}
    for name, value in values.items():
        inner = next((t for t in (types_[name], *typing.get_args(types_[name])) if dataclasses.is_dataclass(t)), None)
        if inner and value is not None:
            value = _build(inner, value, f"{at}{name}.")
        made[name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)


def override(config: Config, **changes: Any) -> Config:
    """override(config, **{"explore.steps": "4"}): the same words as on the command line."""
    nested: dict[str, Any] = {}
    for path, text in changes.items():
        _set(nested, config, path, str(text))
    return _replace(config, nested)


def _set(changes: dict[str, Any], config: Any, path: str, text: str, rest: str | None = None) -> None:
    """Parse one override by the types of `config` into the nested dict `changes`; `rest` is what of `path` is left."""
    head, _, rest = (path if rest is None else rest).partition(".")
    fields = {f.name: f for f in dataclasses.fields(config)}
    if head not in fields:
        near = difflib.get_close_matches(head, fields, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"--config.{path}: no field {head!r} in {type(config).__name__}; {hint}it has {', '.join(fields)}"
        )
    kind = typing.get_type_hints(type(config))[head]
    if rest:
        inner = getattr(config, head)
        if not dataclasses.is_dataclass(inner):
            what = "this family has no such stage" if inner is None else "it is a single value"
            raise ConfigError(f"--config.{path}: {head} has no fields here ({what})")
        _set(changes.setdefault(head, {}), inner, path, text, rest)
    else:
        changes[head] = _parse(kind, text, path)


def _replace(config: Any, changes: dict[str, Any]) -> Any:
    """All changes at once, so that two overrides which only fit together are not refused one by one."""
    new = {k: _replace(getattr(config, k), v) if isinstance(v, dict) else v for k, v in changes.items()}
    return dataclasses.replace(config, **new)


def _parse(kind: Any, text: str, path: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if text in args:
            return text
        raise ConfigError(f"--config.{path}={text}: use one of {', '.join(map(str, args))}")
    if origin in (types.UnionType, typing.Union):
        if text.lower() == "none":
            return None
        raise ConfigError(f"--config.{path}={text}: set its fields one by one, or none")
    if origin is tuple:
        return tuple(part for part in text.split(",") if part)
    if dataclasses.is_dataclass(kind):
        raise ConfigError(
            f"--config.{path}={text}: set its fields, e.g. --config.{path}.{dataclasses.fields(kind)[0].name}=..."
        )
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ConfigError(f"--config.{path}={text}: use true or false")
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"--config.{path}={text}: needs {kind.__name__}") from None
