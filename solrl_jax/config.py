"""One run as frozen dataclasses. Every field is checked on creation; errors name the value, the rule and the fix.

Sizes are global (prompts, candidates, kept); what one device does follows from them. A config file in configs/ defines
`config(recipe: str) -> Config` and RECIPES, the list of all recipes; `--config=tiny:sol_rl_clipscore` names file
and recipe.
"""

import dataclasses
import importlib
import json
import math
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from solrl_jax.fields import Checked, ConfigError, build, override, require
from solrl_jax.solvers import GAUSSIAN, LIMITS, ODE

Precision = Literal["auto", "bf16", "fp8", "nvfp4_native", "nvfp4_emulated"]
"""A rollout's precision (solrl_jax.quant); auto is the device's best low one."""
Solver = Literal["euler", "dpm1", "dpm2", "ddim", "sde", "dance", "cps", "sa_solver"]
FOLDER = Path(__file__).resolve().parent / "configs"
if not FOLDER.is_dir():
    FOLDER = FOLDER.parent.parent / "configs"
PACKAGE = "solrl_jax_configs"
"""FOLDER has the configs: inside an installed package, beside it in the repository. PACKAGE is their module's name."""


AUTO = ("auto",)
"""model.remat_keeps, before the plan has chosen."""
WEIGHT = "1 (none) or a finite number above it"


def _is_weight(w: float) -> bool:
    """Whether it is a weight of guidance, or 0, which stands for another field's."""
    return w == 0 or 1 <= w < math.inf


@dataclasses.dataclass(frozen=True)
class Model(Checked):
    """Which network, and its weights: `path` is a diffusers pipeline folder or a model of huggingface.co, "org/name".

    `size` is in pixels, `text_tokens` counts tokens of T5, Gemma or Qwen3.
    """

    name: str = "flux"
    path: str = ""
    weights: str = ""  # the network's weights, if not the folder's: a file, or org/name/file
    lora: tuple[str, ...] = ()  # LoRAs that are folded into the base, in order: FILE or FILE:scale (run/base_loras.py)
    shift: float = 0.0  # of equally spaced sigmas (sampler.shifted), 1: unchanged; 0: the pipeline's own sigmas
    size: int = 512
    text_tokens: int = 128
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the networks' products; float32 is never TF32
    vae_dtype: Literal["bfloat16", "float32"] = "float32"  # of the decoder's products; an H100's float32 peak is 1/15
    # auto: the network's own kind of guidance (structs.Model); cfg: the classifier-free one, also for a FLUX.
    guidance: Literal["auto", "cfg"] = "auto"
    remat: bool = True  # recompute blocks in the backward pass, except what `remat_keeps` names
    # Some of "attention", "qkv", "mlp": faster, with more memory. "auto": as many as fit the device (plan.settled);
    # where no plan is asked, none.
    remat_keeps: tuple[str, ...] = ()
    min_dim: int = 1000  # quantise only Linears with max(in, out) above this
    min_quantised_flops: float = 0.0  # a run whose rule covers a smaller share of the blocks' FLOPs stops

    def rules(self) -> None:
        for entry in self.lora:
            lora_entry(entry)
        require(self.size > 0, f"model.size={self.size}: give pixels, 1 or more")
        known = self.remat_keeps == AUTO or set(self.remat_keeps) <= {"attention", "qkv", "mlp"}
        require(known, f"model.remat_keeps={','.join(self.remat_keeps)}: use some of attention, qkv, mlp, or auto")
        require(0 <= self.shift < math.inf, f"model.shift={self.shift}: 0 (the pipeline's sigmas) or a positive number")
        require(self.text_tokens > 0, f"model.text_tokens={self.text_tokens}: give 1 or more")
        require(0 <= self.min_quantised_flops <= 1, "model.min_quantised_flops is a share, 0 to 1")


def lora_entry(text: str) -> tuple[str, float]:
    """(file or folder, scale) of an entry of model.lora, "FILE" or "FILE:scale". What is after the last colon is the
    scale, unless it goes on as a path does, as in C:\\x and a:b.safetensors. ConfigError if it is no number, or 0."""
    file, _, scale = text.rpartition(":")
    if not file or "/" in scale or "\\" in scale or scale.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt")):
        require(text.strip() not in ("", ":"), f"model.lora={text!r}: give a LoRA file, FILE or FILE:scale")
        return text, 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    require(
        0 < abs(number) < 1e30,
        f"model.lora={text}: {scale!r} is no scale; give a finite number other than 0, as in {file}:0.8. A folder with "
        f"a colon in its name needs a scale too: {text}:1",
    )
    return file, number


@dataclasses.dataclass(frozen=True)
class Stage(Checked):
    """One rollout: how many steps, by which solver, in which precision, how many images at a time.

    `eta` is the solver's noise (sampler.table), 0 for the ODE. With a `window` only that many steps have noise, placed
    at random for each sample within the first `window_within` (Flow-GRPO-Fast); 0: every step has noise.
    """

    steps: int = 10
    solver: Solver = "dpm2"
    precision: Precision = "bf16"
    chunk: int = 24
    eta: float = 0.0
    window: int = 0
    window_within: int = 0
    shift: float = 0.0  # of equally spaced sigmas (sampler.shifted); 0: the model's own sigmas
    shared_noise: bool = False  # a prompt's samples all begin with the same noise
    # w of v_neg + w (v_pos - v_neg), 1: none (solrl_jax.guidance); 0: in explore regenerate's, in regenerate none.
    guidance: float = 0.0

    def at(self) -> str:
        return ""  # whether it explores or regenerates is not known here

    def rules(self) -> None:
        require(self.steps >= 1, f"steps={self.steps}: a rollout takes at least one step")
        require(self.chunk >= 1, f"chunk={self.chunk}: give 1 or more images at a time")
        most = LIMITS[self.solver].noise
        takes = f"0 to {most:g}" if most < math.inf else "a finite number, 0 or more"
        require(
            0 <= self.eta <= most and self.eta < math.inf,
            f"eta={self.eta}: {self.solver} takes {takes if most else '0 only, it solves the ODE'}",
        )
        require(0 <= self.shift < math.inf, f"shift={self.shift}: 0 (the model's sigmas) or a positive number")
        require(_is_weight(self.guidance), f"guidance={self.guidance}: {WEIGHT}, or 0 (the rollouts' own)")
        require(
            not self.shared_noise or self.stochastic,
            f"shared_noise=true with solver={self.solver}, eta={self.eta}: all samples of a prompt would be the same",
        )
        if self.window or self.window_within:
            require(
                self.stochastic and self.solver in GAUSSIAN,
                f"window={self.window}: only {', '.join(GAUSSIAN)} with eta > 0 have noise for a window",
            )
            require(
                1 <= self.window <= self.window_within < self.steps,
                f"window={self.window}, window_within={self.window_within} of steps={self.steps}: a window has 1 or "
                "more steps, and lies within the first window_within of them; the last step, whose noise is 0 or "
                "next to it, is not one of those",
            )

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    @property
    def trainable(self) -> int:
        """Consecutive steps that have a log-probability: the window's, or all but the last."""
        return (self.window or self.steps - 1) if self.stochastic and self.solver in GAUSSIAN else 0


@dataclasses.dataclass(frozen=True)
class Branch(Checked):
    """The kept candidates continue from the preview's solver state after `after` steps, and take `steps` more.

    The preview's remaining steps serve only its reward. See sampler.branched for the grid.
    """

    after: int = 3
    steps: int = 4

    def rules(self) -> None:
        require(self.after >= 1, f"branch.after={self.after}: 1 or more; to begin again from the noise, branch=none")
        require(self.steps >= 1, f"branch.steps={self.steps}: a sample takes at least one step after the branch")


@dataclasses.dataclass(frozen=True)
class Lora(Checked):
    """y = W x + (alpha / rank) B A x on `targets` (empty: the model's own list)."""

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = ()

    def rules(self) -> None:
        require(self.rank >= 1, f"lora.rank={self.rank}: give 1 or more")
        require(0 < self.alpha < math.inf, f"lora.alpha={self.alpha}: give a positive number")


@dataclasses.dataclass(frozen=True)
class Learn(Checked):
    """The policy update (solrl_jax.algos). `micro_batch` counts (sample, time) points per forward pass."""

    algorithm: Literal["nft", "awm", "vgrpo", "flow_grpo", "dance_grpo"] = "nft"
    timestep_fraction: float = 0.6
    first_time: int = 0  # AWM: number of the first rollout time that is trained
    shared_points: bool = False  # all samples of a prompt have the same times and noise: not for a GRPO's steps
    updates: int = 1  # optimiser steps per pass over the kept samples
    epochs: int = 1  # passes over the kept samples, each with fresh times and noise
    micro_batch: int = 12
    learning_rate: float = 3e-4
    kl_weight: float = 1e-4  # of the distance from the base; V-GRPO: from the policy when the iteration began
    reference_every: int = 1  # m: every m-th micro-batch has the reference, at m times the KL's weight
    deterministic: bool = False  # on GPUs: XLA is asked for kernels that add in a fixed order (docs/run.md)
    guidance: float = 0.0  # of the policies that are compared; 0: regenerate's, for what drew is then what learns
    kl_guidance: float = 0.0  # of the reference; 0: learn.guidance
    lag_weight: float = 1.0  # AWM: weight of the distance to the old policy
    clip_range: float = 1e-4  # AWM, GRPO: a sample's probability ratio is not pushed beyond 1 -+ this
    strength: float = 1.0  # NFT: beta of v+ and v-
    advantage_spread: Literal["all", "prompt", "prompt_unbiased"] = "all"  # the rewards whose std divides an advantage
    advantage_clip: float = 5.0
    advantage_mode: Literal["all", "positive_only", "negative_only", "one_only", "binary", "soft"] = "all"
    clip_norm: float = 1.0
    weight_decay: float = 1e-4
    old_wait: float = 0.0  # old <- c old + (1 - c) current, c = min(old_ramp * (updates - old_wait), old_max)
    old_ramp: float = 1e-3
    old_max: float = 0.5
    ema_max: float = 0.9

    def rules(self) -> None:
        require(
            0 < self.timestep_fraction <= 1, f"learn.timestep_fraction={self.timestep_fraction}: above 0, at most 1"
        )
        for name in ("updates", "epochs", "micro_batch", "reference_every"):
            require(getattr(self, name) >= 1, f"learn.{name}={getattr(self, name)}: give 1 or more")
        numbers = ("learning_rate", "kl_weight", "lag_weight", "weight_decay", "old_wait", "old_ramp", "old_max")
        for name in (*numbers, "ema_max"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"learn.{name}={value}: give a finite number, 0 or more")
        require(0 < self.clip_norm < math.inf, f"learn.clip_norm={self.clip_norm}: give a positive number")
        for name, other in (("guidance", "regenerate.guidance"), ("kl_guidance", "learn.guidance")):
            w = getattr(self, name)
            require(_is_weight(w), f"learn.{name}={w}: {WEIGHT}, or 0 ({other})")
        require(self.ema_max < 1, f"learn.ema_max={self.ema_max}: 0 (no average) up to below 1")
        require(self.clip_range > 0, f"learn.clip_range={self.clip_range}: a positive number, such as 1e-4")
        require(self.first_time >= 0, f"learn.first_time={self.first_time}: 0 or more")
        require(
            0 < self.strength < math.inf,
            f"learn.strength={self.strength}: a positive number, finite (1.0 or 0.1 in the paper)",
        )
        require(
            0 < self.advantage_clip < math.inf,
            f"learn.advantage_clip={self.advantage_clip}: a positive number, finite, for advantages are divided by it",
        )
        require(0 <= self.old_max < 1, f"learn.old_max={self.old_max}: 0 (old = current) up to below 1")


@dataclasses.dataclass(frozen=True)
class Evaluate(Checked):
    """Fixed prompts x fixed keys every `every` iterations (0: never), EMA weights, full steps."""

    every: int = 20
    prompts: int = 16
    held_out: int = 0  # prompts of a single file kept from training; 0: both splits are the whole file
    images: int = 1  # per prompt
    steps: int = 28
    solver: Literal["euler", "dpm1", "dpm2"] = "dpm2"
    rewards: str = ""  # held-out rewards, scored and never trained on: "shapes" or "pickscore,hpsv2"
    grid: int = 8  # the first prompts, as many as there are, in the picture grid
    chunk: int = 24
    # Not in the text of evaluate.settings, which adds the weight that they come to.
    guidance: float = dataclasses.field(default=0.0, repr=False)  # 0: the rollouts', regenerate.guidance; 1: none
    own: bool = dataclasses.field(default=False, repr=False)  # the base is drawn once at its own guidance too

    def rules(self) -> None:
        require(self.every >= 0, f"evaluate.every={self.every}: 0 (never) or more")
        require(self.held_out >= 0, f"evaluate.held_out={self.held_out}: 0 (none) or more")
        for name in ("prompts", "images", "steps", "chunk", "grid"):
            require(getattr(self, name) >= 1, f"evaluate.{name}={getattr(self, name)}: give 1 or more")
        require(
            self.images <= self.chunk or self.images % self.chunk == 0,
            f"evaluate.chunk={self.chunk} does not divide a prompt's {self.images} images: use one of "
            f"{_divisors(self.images)}, or {self.images} or more",
        )
        require(
            _is_weight(self.guidance),
            f"evaluate.guidance={self.guidance}: {WEIGHT}, or 0 (regenerate.guidance)",
        )


@dataclasses.dataclass(frozen=True)
class Watch(Checked):
    """How often and on how many prompts the preview's ranks are compared with full rollouts, and the consequences."""

    every: int = 20  # iterations; 0: never
    prompts: int = 4
    rank: float = 0.5  # a warning if the mean Spearman is below this
    fall_back: bool = False  # then also explore in BF16 from there on

    def rules(self) -> None:
        require(self.every >= 0, f"watch.every={self.every}: 0 (never) or more")
        require(self.prompts >= 1, f"watch.prompts={self.prompts}: give 1 or more")
        require(-1 <= self.rank <= 1, f"watch.rank={self.rank}: a rank correlation, -1 to 1")


@dataclasses.dataclass(frozen=True)
class Config(Checked):
    """One run. `explore` None means one stage: `regenerate` rolls out all candidates, the kept are chosen from these.

    With a `branch` the kept continue from the preview's states, and `regenerate.steps` only gives the grid of the
    trained times.
    """

    name: str = ""  # part of file names: of a run's default folder and of its LoRA for ComfyUI
    model: Model = dataclasses.field(default_factory=Model)
    prompt_files: str = ""  # a folder with train.txt and test.txt, or one file (see data.read)
    reward: str = ""  # "clipscore" or a weighted mix "pickscore:1,hpsv2:0.5"
    reward_rule: Literal["sum", "gdpo"] = "sum"  # how several are combined (solrl_jax.mixture)
    reward_unused: tuple[str, ...] = ()  # rewards that prompts may name and that this run does without
    reward_paths: tuple[str, ...] = ()  # "clipscore=folder", or "clipscore=org/name" of huggingface.co
    # Of the reward networks' products; the rest is float32. On GPUs "float32" multiplies pairs of bfloat16 numbers.
    reward_dtype: Literal["float32", "float32_exact", "bfloat16"] = "float32"
    prompts: int = 48
    candidates: int = 96
    kept: int = 24
    selection: Literal["best_worst", "top", "max_variance", "random", "all"] = "best_worst"
    explore: Stage | None = dataclasses.field(default_factory=lambda: Stage(steps=6, precision="auto"))
    regenerate: Stage = dataclasses.field(default_factory=Stage)
    branch: Branch | None = None
    lora: Lora = dataclasses.field(default_factory=Lora)
    learn: Learn = dataclasses.field(default_factory=Learn)
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)
    watch: Watch = dataclasses.field(default_factory=Watch)
    iterations: int = 300
    seed: int = 42
    save_every: int = 20  # iterations between checkpoints; 0: only when the run ends or is stopped
    keep: int = 3  # checkpoints
    wandb: str = ""  # "project" or "entity/project" of Weights & Biases, which gets the metrics too; pip install wandb
    shard: int = (
        0  # devices over which frozen weights are sharded, gathered at use; 0: the fewest with which the plan fits
    )
    encode_ahead: int = 0  # iterations encoded together, then the text encoders leave the device; 0: they stay
    staged: bool = True  # stages jitted separately (progress, stage times); False: one jit of the whole iteration_step

    def at(self) -> str:
        return ""

    def rules(self) -> None:
        require(
            self.name.isprintable() and not any(part in self.name for part in ("/", "\\", "..")),
            f"name={self.name!r}: it becomes part of file names, so leave out /, \\, .. and control characters",
        )
        most = 200  # bytes: file systems take 255, and a time or an ending follows
        require(len(self.name.encode()) <= most, f"name={self.name:.40}...: give one of at most {most} bytes")
        p, n, k = self.prompts, self.candidates, self.kept
        require(p >= 1, f"prompts={p}: give 1 or more")
        require(n >= 2, f"candidates={n}: draw 2 or more of a prompt")
        why = "an advantage is a difference from the other samples of its prompt"
        require(2 <= k <= n, f"kept={k} of candidates={n}: keep 2 to {n}, for {why}")
        require(
            self.selection != "best_worst" or k % 2 == 0,
            f"kept={k} is odd: best_worst keeps K/2 best and K/2 worst; use kept={k + 1 if k < n else k - 1}",
        )
        require(self.selection != "all" or k == n, f"selection=all keeps every candidate: set kept={n}")
        for name, stage, count in self.stages():
            together = stage.chunk // count if stage.chunk % count == 0 else 0  # whole prompts in a chunk
            require(
                count % stage.chunk == 0 or (together > 0 and p % together == 0),
                f"{name}.chunk={stage.chunk} neither divides a prompt's {count} images nor takes whole prompts of {p}: "
                f"use one of {_divisors(count) + [count * d for d in _divisors(p)[1:]]}",
            )
        require(
            len(self._low()) < 2,
            f"the rollouts run in {' and in '.join(self._low())}: kernels are quantised once, name one low precision",
        )
        self._check_branch()
        self._check_algorithm()
        u, t, m = self.learn.updates, self.times, self.learn.micro_batch
        require(k % u == 0, f"learn.updates={u} does not divide kept={k}: use one of {_divisors(k)}")
        require(
            m % t == 0 or t % m == 0,
            f"learn.micro_batch={m} is neither a multiple nor a divisor of the {t} trained times a sample has: use {t}",
        )
        points = p * k // u * t
        require(
            points % m == 0,
            f"learn.micro_batch={m} does not divide the {points} points of an update: use one of {_divisors(points)}",
        )
        require(0 <= self.seed < 2**32, f"seed={self.seed}: 0 or more and below 2**32, which JAX's keys take")
        require(
            self.kept > 1 or self.learn.advantage_spread != "prompt_unbiased",
            f"kept={self.kept}: learn.advantage_spread=prompt_unbiased takes the spread of 2 or more",
        )
        require(
            self.reward_rule == "sum"
            or "," not in self.reward
            or self.explore is None
            or self.learn.advantage_spread != "all",
            "learn.advantage_spread=all with reward_rule=gdpo: a prompt's candidates are compared before those of the "
            "next prompts are drawn, so the spread over all of them is not known: use prompt, as published, or "
            "prompt_unbiased",
        )
        require(self.iterations >= 1, f"iterations={self.iterations}: 1 or more; --mode=eval draws without training")
        require(self.encode_ahead >= 0, f"encode_ahead={self.encode_ahead}: 0 (the text encoders stay) or more")
        require(self.save_every >= 0, f"save_every={self.save_every}: 0 (only at the end) or more")
        require(self.shard >= 0, f"shard={self.shard}: 0 (auto), 1 (weights whole on every device) or more")
        require(self.keep >= 1, f"keep={self.keep}: keep at least one checkpoint")
        parts = self.wandb.split("/")
        require(
            not self.wandb or (len(parts) <= 2 and all(part.strip() == part != "" for part in parts)),
            f"wandb={self.wandb}: a project's name, or entity/project",
        )

    def _check_branch(self) -> None:
        """Check that the samples can continue from the preview's state."""
        if self.branch is None:
            return
        after, explore, rest = self.branch.after, self.explore, self.regenerate
        if explore is None:
            raise ConfigError(f"branch.after={after} of no preview: set branch=none, or take a family with explore")
        require(
            after < explore.steps,
            f"branch.after={after} of explore.steps={explore.steps}: branch before the last step, where a candidate is "
            f"not finished, after {explore.steps - 1} or fewer",
        )
        for name, stage in (("explore", explore), ("regenerate", rest)):
            require(
                stage.solver in ODE,
                f"{name}.solver={stage.solver}: a branch takes an ODE's state, use one of {', '.join(ODE)}",
            )
        for field in ("solver", "shift"):
            mine, other = getattr(explore, field), getattr(rest, field)
            require(
                mine == other,
                f"explore.{field}={mine}, regenerate.{field}={other}: a branch is one solve, give both the same",
            )

    def _check_algorithm(self) -> None:
        """Check that the rollout provides what the algorithm needs."""
        name, stage, t = self.learn.algorithm, self.regenerate, self.times
        require(
            self.explore is None or not (self.explore.stochastic or stage.stochastic),
            f"explore.eta={self.explore and self.explore.eta}, regenerate.eta={stage.eta}: the kept seeds would be "
            "drawn again with other noise in every step, so the preview would say nothing of them: set eta=0, or take "
            "a family of one stage",
        )
        fraction, steps = self.learn.timestep_fraction, stage.steps
        require(t >= 1, f"learn.timestep_fraction={fraction}: no time of {steps} steps is trained, raise it")
        if name == "awm":
            last, first = last_time(steps), self.learn.first_time
            require(
                first < last,
                f"learn.first_time={first}: learn.algorithm=awm trains times of {steps} steps below number {last}, "
                "use a lower one, or more steps",
            )
            require(
                t <= last - first,
                f"learn.algorithm=awm trains {t} times of {steps}, one of each stratum of those from number {first} "
                f"to {last - 1}: use learn.timestep_fraction={max(0, last - first) / steps:g} or less, or more steps",
            )
        if name == "vgrpo":
            self._check_vgrpo()
        if self.of_steps:
            require(
                not self.learn.shared_points,
                f"learn.shared_points=true: learn.algorithm={name} learns from the steps that were taken, not from new "
                "points: set it to false",
            )
            require(
                stage.trainable > 0,
                f"learn.algorithm={name} needs the probability of a step, which solver={stage.solver} with "
                f"eta={stage.eta} has not: use {', '.join(GAUSSIAN)} with eta > 0",
            )
            require(
                t <= stage.trainable,
                f"learn.timestep_fraction={fraction} is {t} of {steps} steps, but only {stage.trainable} have a "
                f"probability that is trained on: use {stage.trainable / steps:g} or less",
            )
            require(
                stage.precision == "bf16",
                f"regenerate.precision={stage.precision}: learn.algorithm={name} takes the ratio of the trained policy "
                "to the one that drew the samples, which would be another network: use bf16",
            )

    def _check_vgrpo(self) -> None:
        """Check that a micro-batch has whole samples, and that a penalty has a policy to be the distance from."""
        t, m = self.times, self.learn.micro_batch
        require(
            m % t == 0,
            f"learn.micro_batch={m}: learn.algorithm=vgrpo takes the ratio of a whole sample, which has {t} times: use "
            f"a multiple of {t}",
        )
        require(
            not self.learn.kl_weight or self.learn.updates * self.learn.epochs > 1,
            f"learn.kl_weight={self.learn.kl_weight:g}: learn.algorithm=vgrpo takes the distance from the policy when "
            "the iteration began, which with one update is 0: set it to 0, or learn.updates=2 or more",
        )

    @property
    def of_steps(self) -> bool:
        """Whether the algorithm learns from the rollout's own steps, not from its pictures with fresh noise."""
        return self.learn.algorithm in ("flow_grpo", "dance_grpo")

    @property
    def times(self) -> int:
        """Trained times per sample: T = int(fraction * steps), or the window's steps."""
        whole = share_of(self.learn.timestep_fraction, self.regenerate.steps)
        return min(whole, self.regenerate.window) if self.of_steps and self.regenerate.window else whole

    @property
    def explores_low(self) -> bool:
        """Whether there is a preview in low precision, which can fall back to BF16."""
        return self.explore is not None and self.explore.precision != "bf16"

    @property
    def low_precision(self) -> str | None:
        """The low precision of the rollouts, None if all are in BF16."""
        return next(iter(self._low()), None)

    def _low(self) -> list[str]:
        return sorted({stage.precision for _, stage, _ in self.stages()} - {"bf16"})

    @property
    def preview(self) -> Stage | None:
        """`explore` with its weight of guidance, regenerate's where it has none of its own."""
        if self.explore is None:
            return None
        return dataclasses.replace(self.explore, guidance=self.explore.guidance or self.regenerate.guidance)

    def stages(self) -> list[tuple[str, Stage, int]]:
        """(name, stage, images per prompt) of the rollouts, in order; `steps` counts the steps taken."""
        if self.preview is None:
            return [("regenerate", self.regenerate, self.candidates)]
        rest = self.regenerate
        if self.branch is not None:
            rest = dataclasses.replace(rest, steps=self.branch.steps)
        return [("explore", self.preview, self.candidates), ("regenerate", rest, self.kept)]


def share_of(fraction: float, steps: int) -> int:
    """int(fraction * steps), where rounding does not lose a whole step."""
    return int(fraction * steps + 1e-9)


def last_time(steps: int) -> int:
    """AWM trains only times below this number, not the last tenth of a rollout."""
    return int(0.9 * steps)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def load(spec: str, overrides: Mapping[str, str] | None = None) -> Config:
    """`tiny` or `tiny:sol_rl_clipscore` -> Config, with {"explore.steps": "4"} overrides applied in order."""
    name, _, recipe = spec.partition(":")
    return override(module(name).config(recipe), **(overrides or {}))


def module(name: str) -> types.ModuleType:
    """<name>.py of FOLDER, as a module of PACKAGE: no other module named configs is used."""
    if name not in available():
        raise ConfigError(f"--config={name}: there is no configs/{name}.py; use one of {', '.join(available())}")
    package = sys.modules.setdefault(PACKAGE, types.ModuleType(PACKAGE))
    package.__path__ = [str(FOLDER)]
    return importlib.import_module(f"{PACKAGE}.{name}")


def available() -> list[str]:
    """Names that --config takes: the files of FOLDER that define `config`."""
    texts = {file.stem: file.read_text(encoding="utf-8") for file in FOLDER.glob("[a-z]*.py")}
    if found := sorted(name for name, text in texts.items() if "\ndef config(" in text):
        return found
    raise ConfigError(f"there are no configs in {FOLDER}: install the package with pip, or take its repository")


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1)


def from_json(text: str) -> Config:
    """The inverse of `to_json`; a field that this version does not know raises ConfigError."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"not the JSON of a config: {e}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"not the JSON of a config: a {type(values).__name__}, not an object")
    return build(Config, values)


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
    """{"explore.steps": (6, 4)} for every single value that differs."""
    a, b = dict(values(old)), dict(values(new))
    return {k: (a.get(k), b.get(k)) for k in {**a, **b} if a.get(k) != b.get(k)}
