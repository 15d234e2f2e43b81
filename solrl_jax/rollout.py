"""Keys to samples: the ODE or SDE, a block at a time, decoded and scored."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from solrl_jax import algos, guidance, lora, processes, quant, sampler, sharding
from solrl_jax.config import Config, ConfigError, Stage
from solrl_jax.keys import NOISE, STEPS, WINDOW, sample_key
from solrl_jax.rewards import Score, eight_bit, score_images, score_on_host
from solrl_jax.sampler import Carry
from solrl_jax.structs import (
    Frozen,
    Model,
    Params,
    Prompts,
    PyTree,
    Rollout,
    Row,
    TrainState,
    Trajectory,
    Variables,
)


def merged(state: TrainState, frozen: Frozen, *, cfg: Config) -> dict[str, Array]:
    """The adapted kernels of the policy that makes the samples, {path: W + (alpha / R) A B}."""
    rolls_out = algos.find(cfg.learn.algorithm).rolls_out
    return lora.merged_kernels(frozen.base, state.old if rolls_out == "old" else state.lora, cfg.lora)


def quantised(kernels: dict[str, Array], frozen: Frozen, *, model: Model, precision: str | None) -> Params | None:
    """The explorer's quantised kernels, made once per policy update from the merged policy; None if `precision` is
    None, when no rollout is in a low one."""
    if precision is None:
        return None
    return quant.quantise_tree(lora.graft(frozen.base, kernels), quant.rule_of(model.quant_rules, precision), precision)


def policy_variables(kernels: dict[str, Array], low: Params | None, frozen: Frozen) -> Variables:
    """Variables of a rollout: the merged policy, or the explorer if `low` is given."""
    params = {"params": lora.graft(frozen.base, kernels)}
    return params if low is None else {**params, "quant": quant.for_rollout(low)}


class Branched(NamedTuple):
    """The grid of a branch, f64 [after + steps + 1], whose first `after` steps are the preview's."""

    sigmas: np.ndarray
    after: int


def branched(model: Model, cfg: Config) -> Branched | None:
    """The config's branch on the model's grid."""
    if cfg.branch is None:
        return None
    assert cfg.explore is not None
    stage, branch = cfg.explore, cfg.branch
    shift = stage.shift or model.shift(stage.steps)
    return Branched(sampler.branched(sigmas_of(model, stage), branch.after, branch.steps, shift), branch.after)


def rolled(
    kernels: dict[str, Array],
    low: Params | None,
    frozen: Frozen,
    prompts: Prompts,
    keys: Key[Array, "P N"],
    state: Carry | None = None,
    *,
    stage: Stage,
    **statics: Any,
) -> Rollout:
    """`rollout` by the merged policy, or by the quantised one if the stage's precision is low."""
    variables = policy_variables(kernels, None if stage.precision == "bf16" else low, frozen)
    return rollout(variables, frozen, prompts, keys, state, stage=stage, **statics)


def rollout(
    variables: Variables,
    frozen: Frozen,
    prompts: Prompts,
    keys: Key[Array, "P N"],
    state: Carry | None = None,
    *,
    model: Model,
    score: Score,
    stage: Stage,
    branch: Branched | None = None,
    keep_path: bool = False,
) -> Rollout:
    """Integrate, decode and score P x N samples, `stage.chunk` at a time, each device its own prompts.

    Without a `state` the samples begin at their keys' noise and take the stage's steps; in a `branch` this is the
    preview, which keeps its state. With a `state`, leaves [P, N, ...], they take the branch's other steps from there.
    """

    def block(variables: Variables, frozen: Frozen, prompts: Prompts, seeds: Seeds):
        velocity = velocity_of(variables, prompts.cond, seeds, model, stage, frozen.negative)
        path = kept = None
        if branch is None:
            x0, path = trajectory(velocity, seeds, model=model, stage=stage, keep_path=keep_path)
        elif seeds.state is None:
            x0, kept = preview(velocity, seeds, branch, model=model, stage=stage)
        else:
            x0 = finish(velocity, seeds.state, branch, stage=stage)
        images = model.decode(frozen.vae, x0)
        shown = eight_bit(images) if score.on_host else None
        asked = {name: jnp.repeat(one, seeds.own.shape[1]) for name, one in prompts.asked.items()}
        reward, parts = score_images(score, frozen.rewards, images, prompts.tokens, asked)
        found = {"x0": x0 if kept is None else None, "state": kept, "path": path, "images": shown}
        return {**found, "reward": reward, "parts": parts, "asked": asked}

    begin = jnp.broadcast_to(keys[:, :1], keys.shape) if stage.shared_noise else keys
    found = by_block(block, stage.chunk)(variables, frozen, prompts, Seeds(begin, keys, state))
    return Rollout(keys=keys, **found)


def with_host(rollout: Rollout, score: Score, tokens: Mapping[str, PyTree], rows: Sequence[Row]) -> Rollout:
    """Add the rewards that run on the host: pictures are copied there, scores come back. Not for jit.
    A process sees the pictures of its own devices.

    `rows` are of the batch that was encoded; the tokens say which of its prompts this block has.
    """
    if rollout.images is None:
        return rollout
    places, images, asked = sharding.here((tokens[score.on_host[0].name], rollout.images, rollout.asked))
    mine, asked = [rows[place] for place in places], {name: one[:, 0] for name, one in asked.items()}
    found = processes.together(lambda: score_on_host(score, images, mine, asked))
    total, parts = sharding.from_here(found, jax.sharding.get_mesh())
    unseen = 0 * rollout.reward  # NaN for a picture that is not finite (score_images)
    parts = {**rollout.parts, **{name: part + unseen for name, part in parts.items()}}
    return rollout._replace(reward=rollout.reward + total, parts=parts, images=None)


class Seeds(NamedTuple):
    """Keys of samples [p, n]: `begin` for the initial noise, `own` for all other numbers.

    With a solver's `state`, leaves [p, n, ...], a sample continues from it and has no initial noise.
    """

    begin: Key[Array, "p n"]
    own: Key[Array, "p n"]
    state: Carry | None = None


def integrate(
    variables: Variables, cond: PyTree, keys: Key[Array, "p n"], *, model: Model, stage: Stage, negative: PyTree = None
) -> Float[Array, "B h w c"]:
    """From each key's noise to its latents, all p x n = B samples as one batch; cond leaves [p, ...], negative's
    [1, ...]."""
    seeds = Seeds(keys, keys)
    velocity = velocity_of(variables, cond, seeds, model, stage, negative)
    return trajectory(velocity, seeds, model=model, stage=stage)[0]


Velocity = Callable[[Array, Array], Array]


def velocity_of(
    variables: Variables, cond: PyTree, seeds: Seeds, model: Model, stage: Stage, negative: PyTree = None
) -> Velocity:
    """velocity(x [B, ...], sigma [B]) of a policy, at the stage's guidance, for a block of p prompts x n samples; cond
    leaves [p, ...], negative's [1, ...]."""
    w = guidance.of(stage)
    cond = jax.tree.map(lambda c: jnp.repeat(c, seeds.own.shape[1], axis=0), model.prepare(variables, cond))
    away = model.prepare(variables, negative) if guidance.doubles(model, w) else None
    rows, velocity = guidance.conditioned(model, cond, away, w), guidance.velocity(model, w)
    return lambda x, sigma: velocity(variables, x, sigma, rows)


def trajectory(
    velocity: Velocity, seeds: Seeds, *, model: Model, stage: Stage, keep_path: bool = False
) -> tuple[Float[Array, "B h w c"], Trajectory | None]:
    """Solve the ODE, or the SDE if the stage has noise; with `keep_path` also the steps that can be trained on."""
    x0, states, _, first = solved(velocity, seeds, model=model, stage=stage, keep_path=keep_path)
    if states is None:
        return x0, None
    states = jnp.concatenate([states, x0[None]])  # [N + 1, B, ...]
    window = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=stage.trainable + 1)
    return x0, Trajectory(jax.vmap(window, in_axes=(1, 0))(states, first), first)


def preview(
    velocity: Velocity, seeds: Seeds, branch: Branched, *, model: Model, stage: Stage
) -> tuple[Float[Array, "B h w c"], Carry]:
    """x0 of a branch's preview, and its state where the branch begins, leaves [B, ...]."""
    steps = sampler.table(sigmas_of(model, stage), stage.solver)
    begin = sampler.at_noise(noises(model, seeds.begin.reshape(-1)), steps)
    state, _ = sampler.advance(velocity, begin, sampler.rows(steps, 0, branch.after))
    return sampler.advance(velocity, state, sampler.rows(steps, branch.after))[0].x, state


def finish(velocity: Velocity, state: Carry, branch: Branched, *, stage: Stage) -> Float[Array, "B h w c"]:
    """x0 of a branch's samples, from their preview's state, leaves [p, n, ...]."""
    state = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), state)
    rest = sampler.rows(sampler.table(branch.sigmas, stage.solver), branch.after)
    return sampler.advance(velocity, state, rest)[0].x


def noises(model: Model, keys: Key[Array, "B"]) -> Float[Array, "B h w c"]:
    """Each sample's initial noise."""
    return jax.vmap(lambda k: model.noise(sample_key(k, NOISE)))(keys)


class Solved(NamedTuple):
    """x0; with `keep_path` the x before each of the N steps; the steps; the first step of each sample's window."""

    x0: Float[Array, "B h w c"]
    states: Float[Array, "N B h w c"] | None
    steps: sampler.Table
    first: Int[Array, "B"]


def solved(velocity: Velocity, seeds: Seeds, *, model: Model, stage: Stage, keep_path: bool) -> Solved:
    """Solve from each key's noise by the stage's solver."""
    x1, own = noises(model, seeds.begin.reshape(-1)), seeds.own.reshape(-1)
    sigmas = sigmas_of(model, stage)
    steps, first = sampler.table(sigmas, stage.solver, stage.eta), jnp.zeros(own.shape, jnp.int32)
    if stage.window:
        last = stage.window_within - stage.window
        first = jax.vmap(lambda k: jax.random.randint(sample_key(k, WINDOW), (), 0, last + 1))(own)
        steps = sampler.windowed(steps, sampler.table(sigmas, "euler"), first, stage.window)

    def noise(step: Int[Array, ""]) -> Float[Array, "B h w c"]:
        return jax.vmap(lambda k: jax.random.normal(sample_key(k, STEPS, step), x1.shape[1:]))(own)

    begin = sampler.at_noise(x1, steps)
    end, states = sampler.advance(velocity, begin, steps, noise if stage.stochastic else None, keep_path=keep_path)
    return Solved(end.x, states, steps, first)


def sigmas_of(model: Model, stage: Stage) -> np.ndarray:
    """f64 [steps + 1]: the stage's if it has a shift, else the model's."""
    return sampler.shifted(stage.steps, stage.shift) if stage.shift else model.sigmas(stage.steps)


def by_block(block: Callable[..., PyTree], chunk: int) -> Callable[..., PyTree]:
    """block(variables, frozen, prompts, keys [p, n]) -> leaves [p * n, ...], run over keys [P, N] a block at a time.

    A block has at most `chunk` samples: a part of one prompt's, or all of several prompts'. Keys are a tree of arrays
    [P, N, ...]. Result leaves [P, N, ...].
    """

    def on_device(variables: Variables, frozen: Frozen, prompts: Prompts, keys: PyTree) -> PyTree:
        shape = jax.tree.leaves(keys)[0].shape[:2]
        p, n = block_shape(chunk, *shape)

        def one_group(args):
            prompts, keys = args
            columns = jax.tree.map(lambda k: k.reshape((p, -1, n, *k.shape[2:])).swapaxes(0, 1), keys)
            parts = jax.lax.map(lambda k: block(variables, frozen, prompts, k), columns)  # leaves [N / n, p * n, ...]
            return jax.tree.map(lambda x: x.reshape((-1, p, n, *x.shape[2:])).swapaxes(0, 1), parts)

        groups = jax.tree.map(lambda x: x.reshape((-1, p, *x.shape[1:])), (prompts, keys))
        out = jax.lax.map(one_group, groups)  # leaves [P / p, p, N / n, n, ...]
        return jax.tree.map(lambda x: x.reshape((*shape, *x.shape[4:])), out)

    def run(variables: Variables, frozen: Frozen, prompts: Prompts, keys: PyTree) -> PyTree:
        whole: Any = sharding.WHOLE
        held = Frozen(base=sharding.specs_of(frozen.base), vae=whole, rewards=whole, negative=whole)
        specs = sharding.specs_of(variables), held, sharding.SPLIT, sharding.SPLIT
        return sharding.over_data(on_device, specs, sharding.SPLIT)(variables, frozen, prompts, keys)

    return run


def block_shape(chunk: int, prompts: int, images: int) -> tuple[int, int]:
    """(prompts, images of each) that one device passes through the networks together; at most `chunk` images.

    Raises ConfigError if they do not divide what the device holds.
    """
    p, n = max(1, min(chunk // images, prompts)), min(images, chunk)
    if prompts % p or images % n:
        raise ConfigError(
            f"chunk={chunk} takes {p} prompts x {n} images at a time, which does not divide the {prompts} x {images} "
            f"of one device: use one of {[d for d in range(1, images + 1) if images % d == 0]}, or fewer devices"
        )
    return p, n


def sample(
    variables: Variables, cond: PyTree, keys: Key[Array, "P n"], *, model: Model, stage: Stage, negative: PyTree = None
) -> Float[Array, "P n h w c"]:
    """Latents of P x n samples, without decoding or scoring; negative's leaves [1, ...]."""

    def block(variables: Variables, frozen: Frozen, prompts: Prompts, keys: Key[Array, "p n"]):
        return integrate(variables, prompts.cond, keys, model=model, stage=stage, negative=frozen.negative)

    frozen = Frozen(base={}, vae={}, rewards={}, negative=negative)
    return by_block(block, stage.chunk)(variables, frozen, Prompts(cond, {}), keys)
