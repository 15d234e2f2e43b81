"""Keys to samples: the ODE or SDE, a block at a time, decoded and scored."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from solrl_jax import algos, lora, quant, sampler, sharding
from solrl_jax.config import Config, ConfigError, Stage
from solrl_jax.keys import NOISE, STEPS, WINDOW, sample_key
from solrl_jax.rewards import Score, eight_bit, own, score_images, score_on_host
from solrl_jax.structs import (
    Frozen,
    Model,
    Params,
    Path,
    Prompts,
    PyTree,
    Rollout,
    TrainState,
    Variables,
)


def merged(state: TrainState, frozen: Frozen, *, cfg: Config) -> dict[str, Array]:
    """The adapted kernels of the policy that makes the samples, {path: W + (alpha / R) A B}."""
    rolls_out = algos.find(cfg.learn.algorithm).rolls_out
    return lora.merged_kernels(frozen.base, state.old if rolls_out == "old" else state.lora, cfg.lora)


def quantised(kernels: dict[str, Array], frozen: Frozen, *, model: Model, precision: str | None) -> Params | None:
    """The explorer's quantised kernels, made once per policy update from the merged policy; None without a precision,
    where no rollout is in a low one."""
    if precision is None:
        return None
    return quant.quantise_tree(lora.graft(frozen.base, kernels), quant.rule_of(model.quant_rules, precision), precision)


def policy_variables(kernels: dict[str, Array], low: Params | None, frozen: Frozen) -> Variables:
    """Variables of a rollout: the merged policy, or the explorer where `low` is given."""
    params = {"params": lora.graft(frozen.base, kernels)}
    return params if low is None else {**params, "quant": quant.for_rollout(low)}


def rolled(
    kernels: dict[str, Array],
    low: Params | None,
    frozen: Frozen,
    prompts: Prompts,
    keys: Key[Array, "P N"],
    *,
    model: Model,
    score: Score,
    stage: Stage,
    keep_path: bool = False,
) -> Rollout:
    """`rollout` by the merged policy, or by the quantised one where the stage's precision is a low one."""
    variables = policy_variables(kernels, None if stage.precision == "bf16" else low, frozen)
    return rollout(variables, frozen, prompts, keys, model=model, score=score, stage=stage, keep_path=keep_path)


def rollout(
    variables: Variables,
    frozen: Frozen,
    prompts: Prompts,
    keys: Key[Array, "P N"],
    *,
    model: Model,
    score: Score,
    stage: Stage,
    keep_path: bool = False,
) -> Rollout:
    """Integrate, decode and score P x N samples, `stage.chunk` at a time, each device its own prompts."""

    def block(variables: Variables, frozen: Frozen, prompts: Prompts, keys: Seeds):
        x0, path = trajectory(variables, prompts.cond, keys, model=model, stage=stage, keep_path=keep_path)
        images = model.decode(frozen.vae, x0)
        shown = eight_bit(images) if score.on_host else None
        return x0, *score_images(score, frozen.rewards, images, prompts.tokens), path, shown

    begin = jnp.broadcast_to(keys[:, :1], keys.shape) if stage.shared_noise else keys
    return Rollout(keys, *by_block(block, stage.chunk)(variables, frozen, prompts, Seeds(begin, keys)))


def with_host(rollout: Rollout, score: Score, tokens: Mapping[str, PyTree]) -> Rollout:
    """The same samples with the rewards that run on the host: pictures go there, scores come back. Not for jit."""
    if rollout.images is None:
        return rollout
    texts = own.from_bytes(np.asarray(tokens[score.on_host[0].name]))
    found = score_on_host(score, np.asarray(rollout.images), texts)
    total, parts = jax.device_put(found, rollout.reward.sharding)
    return rollout._replace(reward=rollout.reward + total, parts={**rollout.parts, **parts}, images=None)


class Seeds(NamedTuple):
    """Keys of samples [p, n]: of the noise that each begins with, and of everything else."""

    begin: Key[Array, "p n"]
    own: Key[Array, "p n"]


def integrate(
    variables: Variables, cond: PyTree, keys: Key[Array, "p n"], *, model: Model, stage: Stage
) -> Float[Array, "B h w c"]:
    """From each key's noise to its latents, all p x n = B samples as one batch; cond leaves [p, ...]."""
    return trajectory(variables, cond, Seeds(keys, keys), model=model, stage=stage)[0]


def trajectory(
    variables: Variables, cond: PyTree, keys: Seeds, *, model: Model, stage: Stage, keep_path: bool = False
) -> tuple[Float[Array, "B h w c"], Path | None]:
    """The ODE, or where the stage has noise the SDE; with `keep_path` also the steps that can be trained on."""
    cond = jax.tree.map(lambda c: jnp.repeat(c, keys.own.shape[1], axis=0), model.prepare(variables, cond))

    def velocity(x: Array, sigma: Array) -> Array:
        return model.velocity(variables, x, sigma, cond)

    found, _, first = solved(velocity, keys, model=model, stage=stage, keep_path=keep_path)
    if not keep_path:
        return found, None
    x0, states = found
    states = jnp.concatenate([states, x0[None]])  # [N + 1, B, ...]
    window = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=stage.trainable + 1)
    return x0, Path(jax.vmap(window, in_axes=(1, 0))(states, first), first)


def solved(
    velocity: Callable[[Array, Array], Array], keys: Seeds, *, model: Model, stage: Stage, keep_path: bool
) -> tuple[Any, sampler.Table, Int[Array, "B"]]:
    """From each key's noise by the stage's solver: what `sampler.sample` gives, its steps, and each window's first."""
    begin, own = (k.reshape(-1) for k in keys)
    x1 = jax.vmap(lambda k: model.noise(sample_key(k, NOISE)))(begin)
    sigmas = sigmas_of(model, stage)
    steps, first = sampler.table(sigmas, stage.solver, stage.eta), jnp.zeros(own.shape, jnp.int32)
    if stage.window:
        last = stage.window_within - stage.window
        first = jax.vmap(lambda k: jax.random.randint(sample_key(k, WINDOW), (), 0, last + 1))(own)
        steps = sampler.windowed(steps, sampler.table(sigmas, "euler"), first, stage.window)

    def noise(step: Int[Array, ""]) -> Float[Array, "B h w c"]:
        return jax.vmap(lambda k: jax.random.normal(sample_key(k, STEPS, step), x1.shape[1:]))(own)

    return sampler.sample(velocity, x1, steps, noise if stage.stochastic else None, keep_path=keep_path), steps, first


def sigmas_of(model: Model, stage: Stage) -> np.ndarray:
    """f64 [steps + 1]: the model's own, or the stage's."""
    return sampler.shifted(stage.steps, stage.shift) if stage.shift else model.sigmas(stage.steps)


def by_block(block: Callable[..., PyTree], chunk: int) -> Callable[..., PyTree]:
    """block(variables, frozen, prompts, keys [p, n]) -> leaves [p * n, ...], run over keys [P, N] a block at a time.

    A block has at most `chunk` samples: a part of one prompt's, or several whole prompts. Keys are a tree of arrays
    [P, N]. Result leaves [P, N, ...].
    """

    def on_device(variables: Variables, frozen: Frozen, prompts: Prompts, keys: PyTree):
        shape = jax.tree.leaves(keys)[0].shape
        p, n = block_shape(chunk, *shape)

        def one_group(args):
            prompts, keys = args
            columns = jax.tree.map(lambda k: k.reshape(p, -1, n).swapaxes(0, 1), keys)
            parts = jax.lax.map(lambda k: block(variables, frozen, prompts, k), columns)  # leaves [N / n, p * n, ...]
            return jax.tree.map(lambda x: x.reshape((-1, p, n, *x.shape[2:])).swapaxes(0, 1), parts)

        groups = jax.tree.map(lambda x: x.reshape((-1, p, *x.shape[1:])), (prompts, keys))
        out = jax.lax.map(one_group, groups)  # leaves [P / p, p, N / n, n, ...]
        return jax.tree.map(lambda x: x.reshape((*shape, *x.shape[4:])), out)

    return sharding.over_data(on_device, (False, False, True, True), sharding.SPLIT)


def block_shape(chunk: int, prompts: int, images: int) -> tuple[int, int]:
    """(prompts, images of each) that go through the networks together, of what one device holds; at most `chunk`.

    Raises ConfigError where they do not divide.
    """
    p, n = max(1, min(chunk // images, prompts)), min(images, chunk)
    if prompts % p or images % n:
        raise ConfigError(
            f"chunk={chunk} takes {p} prompts x {n} images at a time, which does not divide the {prompts} x {images} "
            f"of one device: use one of {[d for d in range(1, images + 1) if images % d == 0]}, or fewer devices"
        )
    return p, n


def sample(
    variables: Variables, cond: PyTree, keys: Key[Array, "P n"], *, model: Model, stage: Stage
) -> Float[Array, "P n h w c"]:
    """Latents of P x n samples, without decoding or scoring."""

    def block(variables: Variables, _: Frozen, prompts: Prompts, keys: Key[Array, "p n"]):
        return integrate(variables, prompts.cond, keys, model=model, stage=stage)

    return by_block(block, stage.chunk)(variables, Frozen({}, {}, {}), Prompts(cond, {}), keys)
