"""Axis letters, array aliases and the NamedTuples that travel between the stages.

Axes: P prompts, N candidates, K kept, B flattened batch, G groups (distinct prompts of a batch), T times or steps,
S image tokens, L text tokens, D width, R LoRA rank, H heads; latents are "h w c", images "H W 3", with H the height.
sigma is in [0, 1] and 1 is pure noise: x_t = (1 - t) x0 + t eps, v = eps - x0.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Array, Float, Int, Key, UInt8

from solrl_jax.sampler import Carry, Gaussian

PyTree = Any
Params = Mapping[str, Any]
Variables = Mapping[str, Any]
"""flax collections of one policy: {params} is the reference, + lora is a policy, + quant is the explorer."""

Latents = Float[Array, "B h w c"]
Images = Float[Array, "B H W 3"]
PerSample = Float[Array, "B"]
Keys = Key[Array, "*batch"]
Row = dict[str, Any]
"""What is known of a prompt, on the host only: its line of a JSON-lines file, at least {"prompt": text}."""


class WeightsError(ValueError):
    """A checkpoint that cannot be used; the message names the file, the keys and what to do."""


def path_name(path: tuple) -> str:
    """ "a/b/kernel" for a leaf's path of jax.tree_util."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """{"a/b/kernel": leaf} in tree order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in flat}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """A value that is part of a tree's structure: known at trace time; another value needs another program."""

    value: Any


class Model(NamedTuple):
    """A text-to-image flow model as pure functions; made by `models.<name>.make`. Hashable, a static argument.

    tokenize(prompts) -> arrays [G, ...] on the host;
    encode(text_params, tokens) -> conditioning, leaves [G, ...];
    noise(key) -> one sample's x_1, f32 [h, w, c]; sigmas(steps) -> f64 [steps + 1], falling from 1 to 0;
    shift(steps) -> the shift of that grid; a branch's steps are equal in its u (sampler.branched);
    prepare(variables, cond) -> conditioning, leaves [G, ...], which velocity takes instead of `encode`'s: the part of
    the network that depends on neither x nor sigma, computed once per rollout;
    velocity(variables, x, sigma, cond) -> f32 like x, for x f32 [B, h, w, c], sigma f32 [B] and cond leaves [B, ...];
    largest(variables, x, sigma, cond) -> {Linear's path: the largest |input| that it sees in this call, f32 []};
    decode(vae_params, latents) -> images f32 [B, H, W, 3] in [0, 1]; init(key) -> a fresh base;
    guidance: how the model is guided (solrl_jax.guidance); of "embedded", `velocity` takes the weights from the leaf
    "guidance" [B] of cond, and 1 without it; guided: the weight that its pipeline or its card names;
    distilled: it was distilled to draw in few steps without guidance, an ability that training loses.
    """

    name: str
    tokenize: Callable[[Sequence[str]], PyTree]
    encode: Callable[[Params, PyTree], PyTree]
    noise: Callable[[Keys], Array]
    sigmas: Callable[[int], Any]
    shift: Callable[[int], float]
    velocity: Callable[[Variables, Array, Array, PyTree], Array]
    largest: Callable[[Variables, Array, Array, PyTree], dict[str, Array]]
    decode: Callable[[Params, Array], Array]
    init: Callable[[Keys], Params]
    lora_targets: tuple[str, ...]
    quant_rules: "QuantRules"
    keys: tuple  # weights.Rule table: our parameter paths <-> the public checkpoint's keys
    comfy: tuple = ()  # lora_files.Fused table: the modules of ComfyUI's LoRA files; empty: no such files
    native: tuple = ()  # a weights.Rule table of other module names that LoRA files may use
    prepare: Callable[[Variables, PyTree], PyTree] = lambda variables, cond: cond
    guidance: Literal["cfg", "embedded", "none"] = "none"
    guided: float = 1.0
    distilled: bool = False


class QuantRule(NamedTuple):
    """The explorer quantises Linears with no `skip` pattern in their dotted name and max(in, out) > `min_dim`.

    For FP8 (quant.fp8): `units` are (Linear's path, unit of its input), 1 for Linears not named; `parts` are (Linear's
    path, sizes of the parts in which its input comes), of Linears with several.
    """

    skip: tuple[str, ...]
    min_dim: int
    units: tuple[tuple[str, float], ...] = ()
    parts: tuple[tuple[str, tuple[int, ...]], ...] = ()


class QuantRules(NamedTuple):
    """The original's rule, for both forms of NVFP4, and one for FP8."""

    nvfp4: QuantRule
    fp8: QuantRule


class Reward(NamedTuple):
    """A judge of images: the functions `tokenize` and `score`.

    tokenize(prompts) -> arrays [G, ...] on the host;
    score(params, images f32 [B, H, W, 3], tokens [G, ...]) -> f32 [B].
    B is a multiple of G and image i belongs to prompt i // (B // G), so that a prompt is encoded once per group.
    `host`, if given, is called on the host instead of `score`: host(images u8 [B, H, W, 3], B prompts) -> [B].
    Its tokens are then each prompt's place in the batch, i32 [G].
    `tokenize` and `host` may have one more parameter: the rows of the prompts (rewards.own.with_rows).
    """

    name: str
    tokenize: Callable[..., PyTree]
    score: Callable[[Params, Array, PyTree], Array]
    host: Callable[..., Any] | None = None


class Prompts(NamedTuple):
    """P prompts as the step takes them: conditioning and each reward's tokens, all with leaves [P, ...].

    `asked` is 1 where a prompt asks for a reward and 0 elsewhere; {} if no prompt of the run's files names its rewards
    (rewards.bound).
    """

    cond: PyTree
    tokens: Mapping[str, PyTree]
    asked: Mapping[str, Float[Array, "P"]] = {}


class Frozen(NamedTuple):
    """Everything that no update touches: base weights, VAE, and the towers of the trained rewards by name.

    `negative` is the conditioning of the negative prompt, leaves [1, ...]; None where no stage is guided by it.
    """

    base: Params
    vae: Params
    rewards: Mapping[str, Params]
    negative: PyTree = None


class Hyper(NamedTuple):
    """Traced scalars: a leading axis over them (and the rest of the state) trains many settings as one program."""

    learning_rate: Float[Array, ""]
    kl_weight: Float[Array, ""]
    lag_weight: Float[Array, ""]  # AWM: weight of the distance to the old policy
    clip_range: Float[Array, ""]  # of ratios of probabilities
    strength: Float[Array, ""]  # beta of DiffusionNFT's v+ and v-
    old_wait: Float[Array, ""]
    old_ramp: Float[Array, ""]
    old_max: Float[Array, ""]


class TrainState(NamedTuple):
    """Small on purpose (LoRA sets and moments) and never donated: the last finished iteration stays whole."""

    iteration: Int[Array, ""]
    updates: Int[Array, ""]  # optimiser steps so far
    skipped: Int[Array, ""]  # non-finite updates in a row
    key: Key[Array, ""]
    lora: Params
    old: Params
    ema: Params
    moments: PyTree
    hyper: Hyper
    fallen_back: Int[Array, ""]  # 1: exploration is in BF16 from here on (watch.fall_back); set between iterations


class Trajectory(NamedTuple):
    """The T consecutive noisy steps of a sample that can be trained on: their states, and the first step's number."""

    states: Float[Array, "*B T+1 h w c"]
    first: Int[Array, "*B"]


class Rollout(NamedTuple):
    """Samples of one stage. `keys` identify the samples: each began at the noise of its key, or with Stage.shared_noise
    at that of its prompt's first key.

    A branch's preview has the solver's `state` instead of `x0`; the kept candidates continue from it. `path` is set for
    algorithms that learn from a sampler's steps. `images`, 8 bits, are set only if rewards run on the host, until
    these have seen them. `asked` is the prompts', for each sample; parts are 0 where it is 0.
    """

    keys: Key[Array, "P K"]
    x0: Float[Array, "P K h w c"] | None
    reward: Float[Array, "P K"]
    parts: Mapping[str, Float[Array, "P K"]]
    path: Trajectory | None = None
    state: Carry | None = None
    images: UInt8[Array, "P K H W 3"] | None = None
    asked: Mapping[str, Float[Array, "P K"]] = {}


class Points(NamedTuple):
    """Where velocities are evaluated: x_t at time t, and the clean sample they are compared with."""

    x_t: Float[Array, "*B h w c"]
    t: Float[Array, "*B"]
    x0: Float[Array, "*B h w c"]


class Transitions(NamedTuple):
    """A sampler's steps: from x_t at time t to `x_next`; `step` is the distribution of `x_next`."""

    x_t: Float[Array, "*B h w c"]
    t: Float[Array, "*B"]
    x_next: Float[Array, "*B h w c"]
    step: Gaussian


class Velocities(NamedTuple):
    """f32 velocities at the same points: of the trained policy, and of the fixed ones that an algorithm needs.

    `old` is the policy that follows the trained one, `behaviour` the trained one when this iteration began,
    `reference` the base.
    """

    current: Float[Array, "*B h w c"]
    old: Float[Array, "*B h w c"] | None = None
    reference: Float[Array, "*B h w c"] | None = None
    behaviour: Float[Array, "*B h w c"] | None = None
