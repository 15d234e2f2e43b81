"""What `--config=NAME:RECIPE` chooses: a family or a method, and a reward, on top of a model's own sizes.

A family is a way to make samples for DiffusionNFT's loss, named as in Sol-RL's code; a method is an algorithm that
Sol-RL is compared with. `base(reward)` of configs/NAME.py gives sol_rl with the model's own values, of which every
other family is a function; branch is the default.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from solrl_jax import config
from solrl_jax.config import Branch, Config, ConfigError, Learn, Stage, share_of

ON_THE_HUB = (
    "clipscore=openai/clip-vit-large-patch14",
    "pickscore=yuvalkirstain/PickScore_v1",
    "hpsv2=xswu/HPSv2",
    "imagereward=zai-org/ImageReward",
)
"""Where the four rewards are read from, as `reward_paths`."""
ALIASES = {"compile": "naive_scaling"}
"""The original's families that equal another one here, because all code is compiled."""


# --- families: ways to make samples for DiffusionNFT's loss; `cfg` is sol_rl -----------------------------------------


def sol_rl(cfg: Config) -> Config:
    """Explore all N in few low-precision steps, regenerate the K best and worst in BF16."""
    return cfg


def branch(cfg: Config) -> Config:
    """Explore all N in 5 low-precision steps; the K best and worst continue in BF16 from their state after step 3."""
    return replace(cfg, explore=replace(_explored(cfg), steps=5), branch=Branch(after=3, steps=4))


def naive_scaling(cfg: Config) -> Config:
    """All N in one BF16 rollout; the K best and worst are kept."""
    return replace(cfg, explore=None, regenerate=replace(cfg.regenerate, chunk=_explored(cfg).chunk))


def naive_quant(cfg: Config) -> Config:
    """All N in one full low-precision rollout; the K best and worst of these samples are trained on."""
    low = _explored(cfg)
    return replace(cfg, explore=None, regenerate=replace(cfg.regenerate, chunk=low.chunk, precision=low.precision))


def diffusionnft(cfg: Config) -> Config:
    """K candidates in BF16, all kept: no selection."""
    return replace(cfg, explore=None, candidates=cfg.kept, selection="all")


def _explored(cfg: Config) -> Stage:
    return cfg.explore or replace(cfg.regenerate, precision="auto")


# --- methods: rollout and loss as published for FLUX.1-dev with a LoRA; K of K ---------------------------------------


def flow_grpo(cfg: Config) -> Config:
    """The reverse SDE in 6 steps, all but the last trained."""
    stage = replace(cfg.regenerate, steps=6, solver="sde", eta=0.9)
    return _method(cfg, stage, grpo(cfg, algorithm="flow_grpo", timestep_fraction=0.99, clip_range=1e-4))


def flow_grpo_fast(cfg: Config) -> Config:
    """Only the first 3 of 6 steps have noise and are trained; the coefficients-preserving step."""
    stage = replace(cfg.regenerate, steps=6, solver="cps", eta=0.8, window=3, window_within=3)
    return _method(cfg, stage, grpo(cfg, algorithm="flow_grpo", timestep_fraction=0.99, clip_range=1e-5))


def dance_grpo(cfg: Config) -> Config:
    """12 steps of DanceGRPO's SDE, of which 6 are trained; a prompt's samples begin with the same noise."""
    stage = replace(cfg.regenerate, steps=12, solver="dance", eta=0.3, shift=3.0, shared_noise=True)
    learn = grpo(cfg, algorithm="dance_grpo", timestep_fraction=0.5, clip_range=1e-4)
    return _method(cfg, stage, replace(learn, advantage_spread="prompt_unbiased"))


def awm(cfg: Config) -> Config:
    """14 steps of SA-Solver. AWM has no FLUX trainer: these are its values for SD3.5-M."""
    stage = replace(cfg.regenerate, steps=14, solver="sa_solver", eta=0.4)
    learn = replace(cfg.learn, algorithm="awm", timestep_fraction=0.43, first_time=1, kl_weight=1e-3, clip_range=1.0)
    return _method(cfg, stage, replace(learn, lag_weight=1.0, old_ramp=1e-3, old_max=0.3, clip_norm=1.0))


def vgrpo(cfg: Config) -> Config:
    """The model's own ODE; the ratio of a sample's errors at 4 points, which the samples of a prompt share. The values
    for FLUX are from digests of the paper (docs/methods.md)."""
    fraction = min(1.0, 4 / cfg.regenerate.steps)
    learn = grpo(cfg, algorithm="vgrpo", timestep_fraction=fraction, clip_range=1e-2)
    learn = replace(learn, advantage_spread="prompt", shared_points=True)
    return _method(cfg, cfg.regenerate, learn)


def grpo(cfg: Config, **values: Any) -> Learn:
    """What Flow-GRPO, DanceGRPO and V-GRPO have in common: two or more updates, no KL, no lagging old policy."""
    common = {"updates": max(2, cfg.learn.updates), "kl_weight": 0.0, "old_max": 0.0, "clip_norm": 1.0}
    return replace(cfg.learn, **common, **values)


def _method(cfg: Config, stage: Stage, learn: Learn) -> Config:
    """One stage, all K pictures kept. The micro-batch has the points of as many whole samples as fit into the config's
    and divide an update's samples."""
    times = stage.window or share_of(learn.timestep_fraction, stage.steps)
    samples, most = cfg.prompts * cfg.kept // learn.updates, max(1, cfg.learn.micro_batch // times)
    fitting = max(n for n in range(1, most + 1) if samples % n == 0)
    learn = replace(learn, micro_batch=times * fitting, reference_every=1)
    return replace(diffusionnft(cfg), regenerate=stage, learn=learn)


FAMILIES = {f.__name__: f for f in (sol_rl, branch, naive_scaling, naive_quant, diffusionnft)}
METHODS = {f.__name__: f for f in (flow_grpo, flow_grpo_fast, dance_grpo, awm, vgrpo)}
NAMES = (*FAMILIES, *METHODS, *ALIASES)


# --- names on the command line --------------------------------------------------------------------------------------


def family(cfg: Config, name: str) -> Config:
    """`cfg` (sol_rl) as another family or method, with the same prompts, pictures, LoRA, rate and reward."""
    if name not in FAMILIES | METHODS:
        raise ConfigError(f"unknown family {name!r}: use one of {', '.join(FAMILIES | METHODS)}")
    return (FAMILIES | METHODS)[name](cfg)


def recipes(rewards: Sequence[str]) -> tuple[str, ...]:
    """FAMILY_REWARD of every family, method and reward, aliases last."""
    return tuple(f"{name}_{reward}" for name in NAMES for reward in rewards)


def choose(base: Callable[[str], Config], rewards: Sequence[str], recipe: str) -> Config:
    """The config of FAMILY_REWARD, FAMILY or ""; the defaults are branch and the first of `rewards`.

    `base(reward)` is sol_rl on that reward. Raises ConfigError for any other recipe, and names the nearest.
    """
    found = next((r for r in rewards if recipe.endswith(f"_{r}")), None)
    name = recipe.removesuffix(f"_{found}") if found else recipe or branch.__name__
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
    """What `--config=<name>:help` prints: the config file's docstring, and one line per recipe."""
    module = config.module(name)
    made = {recipe: module.config(recipe) for recipe in module.RECIPES}
    default, width = module.config(""), max(map(len, made))
    first = next(recipe for recipe, cfg in made.items() if cfg == default)
    lines = [*(module.__doc__ or "").strip().splitlines(), "", f"Recipes of --config={name}:RECIPE (default: {first})"]
    for recipe, cfg in made.items():
        same = next((f"; the same as {real}" for old, real in ALIASES.items() if recipe.startswith(old)), "")
        lines.append(f"  {recipe:{width}}  {describe(cfg)}{same}")
    return [*lines, "A FAMILY alone is trained on the default's reward."]


def describe(cfg: Config) -> str:
    """The rollout in one line: "explore 96 x 6 steps nvfp4_emulated, regenerate 24 x 10 steps bf16".

    A solver that adds noise is named too.
    """
    rollouts = [
        f"{name} {count} x {stage.steps} steps {stage.precision}" + (f" {stage.solver}" if stage.stochastic else "")
        for name, stage, count in cfg.stages()
    ]
    if cfg.branch is not None:
        return f"{rollouts[0]}, {rollouts[1].replace('regenerate', f'after {cfg.branch.after} of these go on with')}"
    if cfg.explore is not None:
        return ", ".join(rollouts)
    return f"{rollouts[0].replace('regenerate', 'roll out')}, keep {cfg.kept}"
