"""What `--config=NAME:RECIPE` chooses: a family or a method, and a reward, on top of a model's own sizes.

A family is a way to make samples for DiffusionNFT's loss, with the names of Sol-RL's code; a method is one of those
that Sol-RL is compared with. `base(reward)` of configs/NAME.py gives sol_rl and everything that is the model's.
"""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from solrl_jax import config
from solrl_jax.config import Config, ConfigError

FAMILIES = ("sol_rl", "naive_scaling", "naive_quant", "diffusionnft")
ALIASES = {"compile": "naive_scaling"}
"""Families of the original that are another one here, where everything is compiled."""
_GRPO = {"updates": 2, "kl_weight": 0.0, "old_max": 0.0, "clip_norm": 1.0}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flow_grpo": (
        {"steps": 6, "solver": "sde", "eta": 0.9},
        {"algorithm": "flow_grpo", "timestep_fraction": 0.99, "clip_range": 1e-4, **_GRPO},
    ),
    "flow_grpo_fast": (
        {"steps": 6, "solver": "cps", "eta": 0.8, "window": 3, "window_within": 3},
        {"algorithm": "flow_grpo", "timestep_fraction": 0.99, "clip_range": 1e-5, **_GRPO},
    ),
    "dance_grpo": (
        {"steps": 12, "solver": "dance", "eta": 0.3, "shift": 3.0, "shared_noise": True},
        {
            **{"algorithm": "dance_grpo", "timestep_fraction": 0.5, "clip_range": 1e-4},
            **{"advantage_spread": "prompt_unbiased", **_GRPO},
        },
    ),
    "awm": (
        {"steps": 14, "solver": "sa_solver", "eta": 0.4},
        {
            **{"algorithm": "awm", "timestep_fraction": 0.43, "first_time": 1, "updates": 1, "kl_weight": 1e-3},
            **{"clip_range": 1.0, "lag_weight": 1.0, "old_ramp": 1e-3, "old_max": 0.3, "clip_norm": 1.0},
        },
    ),
}
"""Rollout and loss of the methods, as published for FLUX.1-dev with a LoRA; AWM, which has no FLUX trainer, as for
SD3.5-M (algorithms.md section 7). Of K pictures a prompt all are kept. DanceGRPO draws its 12 steps and trains 6."""
ON_THE_HUB = (
    "clipscore=openai/clip-vit-large-patch14",
    "pickscore=yuvalkirstain/PickScore_v1",
    "hpsv2=xswu/HPSv2",
    "imagereward=zai-org/ImageReward",
)
"""Where the four rewards are read from, as `reward_paths`."""
NAMES = (*FAMILIES, *METHODS, *ALIASES)


def family(cfg: Config, name: str) -> Config:
    """`cfg`, which is sol_rl, as another family or method; one-stage ones have explore = None (algorithms.md 6).

    sol_rl; naive_scaling, all N in BF16; naive_quant, all in low precision; diffusionnft and the methods, K of K,
    nothing selected. Prompts, pictures, LoRA, rate and reward stay as they are, and updates are at least as many.
    """
    if name not in (*FAMILIES, *METHODS):
        raise ConfigError(f"unknown family {name!r}: use one of {', '.join((*FAMILIES, *METHODS))}")
    if name == "sol_rl":
        return cfg
    low, chunk = (cfg.explore.precision, cfg.explore.chunk) if cfg.explore else ("auto", cfg.regenerate.chunk)
    full = dataclasses.replace(cfg.regenerate, chunk=chunk)
    if name == "naive_scaling":
        return dataclasses.replace(cfg, explore=None, regenerate=full)
    if name == "naive_quant":
        return dataclasses.replace(cfg, explore=None, regenerate=dataclasses.replace(full, precision=low))
    alone = {"explore": None, "candidates": cfg.kept, "selection": "all"}
    if name == "diffusionnft":
        return dataclasses.replace(cfg, **alone)
    stage, how = METHODS[name]
    learn = dataclasses.replace(cfg.learn, **how | {"updates": max(how["updates"], cfg.learn.updates)})
    stage = dataclasses.replace(cfg.regenerate, **stage)
    times = stage.window or int(learn.timestep_fraction * stage.steps + 1e-9)
    learn = dataclasses.replace(learn, micro_batch=_micro_batch(cfg, times, cfg.prompts * cfg.kept // learn.updates))
    return dataclasses.replace(cfg, **alone | {"regenerate": stage, "learn": learn})


def _micro_batch(cfg: Config, times: int, samples: int) -> int:
    """As many whole samples' points as fit into the config's micro-batch, and divide an update's samples."""
    most = max(1, cfg.learn.micro_batch // times)
    return times * max(n for n in range(1, most + 1) if samples % n == 0)


def recipes(rewards: Sequence[str]) -> tuple[str, ...]:
    """FAMILY_REWARD of every family, method and reward, aliases last."""
    return tuple(f"{name}_{reward}" for name in NAMES for reward in rewards)


def choose(base: Callable[[str], Config], rewards: Sequence[str], recipe: str) -> Config:
    """The config of FAMILY_REWARD, of a FAMILY alone or of "": the default is sol_rl, and the first of `rewards`.

    `base(reward)` is sol_rl on that reward. Raises ConfigError for another recipe, with the nearest.
    """
    found = next((r for r in rewards if recipe.endswith(f"_{r}")), None)
    name = recipe.removesuffix(f"_{found}") if found else recipe or FAMILIES[0]
    reward = found or rewards[0]
    if name not in NAMES:
        at = base(reward).name
        near = difflib.get_close_matches(recipe, (*NAMES, *recipes(rewards)), 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"--config={at}:{recipe}: no such recipe; {hint}use FAMILY_REWARD, of {', '.join(NAMES)} "
            f"and {', '.join(rewards)} (--config={at}:help lists them)"
        )
    return family(base(reward), ALIASES.get(name, name))


def help_lines(name: str) -> list[str]:
    """What `--config=<name>:help` prints: the config file's own words, and every recipe in one line."""
    module = config.module(name)
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


def describe(cfg: Config) -> str:
    """The rollout in one line: "explore 96 x 6 steps nvfp4_emulated, regenerate 24 x 10 steps bf16".

    And the solver where it adds noise.
    """
    rollouts = [
        f"{name} {count} x {stage.steps} steps {stage.precision}" + (f" {stage.solver}" if stage.stochastic else "")
        for name, stage, count in cfg.stages()
    ]
    if cfg.explore is not None:
        return ", ".join(rollouts)
    return f"{rollouts[0].replace('regenerate', 'roll out')}, keep {cfg.kept}"
