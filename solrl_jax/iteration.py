"""One iteration of Sol-RL: explore in low precision, regenerate in BF16, learn. Read this file first.

    policies = quantise(merge(base, old)), merge(base, old)
    preview  = rollout(explorer, keys [P, N], 6 steps)        every candidate, cheaply
    keys     = keys of the K/2 best and K/2 worst             a sample is its key
    samples  = rollout(merged, keys [P, K], 10 steps)         the same noise, exactly
    A        = advantages(rewards of the samples)
    state    = learn(samples, A)                              a LoRA, in BF16; the old policy follows

`iteration_step` is that, pure and jittable whole; `Staged` runs the same functions one jit each, from the host.
Families of one stage are the same with explore = None: all candidates in one rollout, the kept chosen from it.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from solrl_jax import algos, lora, quant, sampler, sharding
from solrl_jax.algos import Sample, Schedule
from solrl_jax.config import Config, ConfigError, Stage
from solrl_jax.rewards import Score, eight_bit, own, score_images, score_on_host
from solrl_jax.selection import select, spearman, take
from solrl_jax.structs import (
    Frozen,
    Hyper,
    Model,
    Params,
    Path,
    Prompts,
    PyTree,
    Rollout,
    TrainState,
    Variables,
    Velocities,
)

Metrics = dict[str, Any]
F32 = jnp.float32
NOISE, ORDER, POINTS, STEPS, WINDOW = range(5)  # what a sample's key is folded with: each use has a key of its own


# --- state ----------------------------------------------------------------------------------------------------------


def make_optimizer(cfg: Config) -> optax.GradientTransformation:
    """AdamW's direction as in torch (decoupled decay, eps outside the root); `apply_gradients` applies the rate."""
    return optax.chain(optax.scale_by_adam(0.9, 0.999, 1e-8), optax.add_decayed_weights(cfg.learn.weight_decay))


def init_state(
    key: Key[Array, ""], frozen: Frozen, *, model: Model, optimizer: optax.GradientTransformation, cfg: Config
) -> TrainState:
    """A fresh LoRA (the base's output exactly), old and ema its copies."""
    key_lora, key = jax.random.split(key)
    adapter = lora.init(key_lora, frozen.base, cfg.lora.targets or model.lora_targets, cfg.lora)
    hyper = Hyper(*(jnp.asarray(getattr(cfg.learn, name), F32) for name in Hyper._fields))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, zero, key, adapter, adapter, adapter, optimizer.init(adapter), hyper, zero)


# --- rollout --------------------------------------------------------------------------------------------------------


def sample_keys(state: TrainState, prompts: int, candidates: int) -> Key[Array, "P N"]:
    """This iteration's samples. A sample is its key, whatever batch or device it falls to."""
    return jax.random.split(_purpose(state, 0), (prompts, candidates))


def _purpose(state: TrainState, which: int) -> Key[Array, ""]:
    """Keys of one iteration apart by purpose: 0 for its samples, 1 for its random selection."""
    return jax.random.fold_in(jax.random.fold_in(state.key, state.iteration), which)


def merged(state: TrainState, frozen: Frozen, cfg: Config) -> dict[str, Array]:
    """The adapted kernels of the policy that makes the samples, {path: W + (alpha / R) A B}."""
    rolls_out = algos.find(cfg.learn.algorithm).rolls_out
    return lora.merged_kernels(frozen.base, state.old if rolls_out == "old" else state.lora, cfg.lora)


def quantised(kernels: dict[str, Array], frozen: Frozen, model: Model, precision: str) -> Params:
    """The explorer's quantised kernels, made once per policy update from the merged policy."""
    return quant.quantise_tree(lora.graft(frozen.base, kernels), quant.rule_of(model.quant_rules, precision), precision)


def policy_variables(kernels: dict[str, Array], low: Params | None, frozen: Frozen) -> Variables:
    """Variables of a rollout: the merged policy, or the explorer where `low` is given."""
    params = {"params": lora.graft(frozen.base, kernels)}
    return params if low is None else {**params, "quant": quant.for_rollout(low)}


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
    x1 = jax.vmap(lambda k: model.noise(jax.random.fold_in(k, NOISE)))(begin)
    sigmas = sigmas_of(model, stage)
    steps, first = sampler.table(sigmas, stage.solver, stage.eta), jnp.zeros(own.shape, jnp.int32)
    if stage.window:
        last = stage.window_within - stage.window
        first = jax.vmap(lambda k: jax.random.randint(jax.random.fold_in(k, WINDOW), (), 0, last + 1))(own)
        steps = sampler.windowed(steps, sampler.table(sigmas, "euler"), first, stage.window)

    def noise(step: Int[Array, ""]) -> Float[Array, "B h w c"]:
        return jax.vmap(lambda k: jax.random.normal(_use(k, STEPS, step), x1.shape[1:]))(own)

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


def keep(rollout: Rollout, kept: int, rule: str, key: Key[Array, ""]) -> Rollout:
    """The kept samples of each prompt, best first."""
    index = select(rollout.reward, kept, rule, key)
    return jax.tree.map(lambda x: take(x, index), rollout)


def chooser(state: TrainState) -> Key[Array, ""]:
    """The key of this iteration's random selection, apart from every sample's key."""
    return _purpose(state, 1)


# --- learn ----------------------------------------------------------------------------------------------------------


def learn(
    state: TrainState,
    frozen: Frozen,
    cond: PyTree,
    samples: Rollout,
    *,
    model: Model,
    optimizer: optax.GradientTransformation,
    cfg: Config,
) -> tuple[TrainState, Metrics]:
    """Advantages over the kept samples, `epochs` x `updates` steps of the LoRA, then the old policy follows.

    An update takes K / updates samples of every prompt (`dealt`): which ones does not depend on the devices.
    """
    chex.assert_tree_shape_prefix(samples, samples.keys.shape)
    chex.assert_tree_shape_prefix(cond, samples.keys.shape[:1])
    advantage = algos.advantages(samples.reward, cfg.learn.advantage_spread)
    epochs, updates = cfg.learn.epochs, cfg.learn.updates
    began = state

    def update(state: TrainState, which: tuple[Array, Array]):
        epoch, index = which
        keys = jax.vmap(jax.vmap(lambda k: _use(k, POINTS, epoch)))(samples.keys)
        made = Sample(samples.x0, samples.path)
        batch = jax.tree.map(lambda x: take(x, index), (keys, made, advantage))
        grads, metrics = gradients(state, began, frozen, cond, *batch, model=model, cfg=cfg)
        state, norm = apply_gradients(state, grads, optimizer, cfg)
        return state, {**metrics, "grad_norm": norm, "skipped": (state.skipped > 0).astype(F32)}

    epoch_of = jnp.repeat(jnp.arange(epochs), updates)
    index = jnp.concatenate([dealt(samples.keys, samples.reward, e, updates) for e in range(epochs)])
    state, metrics = jax.lax.scan(update, state, (epoch_of, index))
    hyper = state.hyper
    decay = algos.old_decay(state.updates, hyper.old_wait, hyper.old_ramp, hyper.old_max)
    followed = jax.tree.map(lambda o, c: decay * o + (1 - decay) * c, began.old, state.lora)
    state = state._replace(old=followed, iteration=state.iteration + 1)
    if "behaviour" in algos.find(cfg.learn.algorithm).fixed(cfg.learn):
        # Of the first update both policies are the same: what is left is the rounding of the two programs.
        metrics["ratio/noise"] = metrics["ratio/deviation"][0]
    return state, {**jax.tree.map(jnp.mean, metrics), "skipped": jnp.sum(metrics["skipped"]), "old_decay": decay}


def _use(key: Key[Array, ""], use: int, epoch: Int[Array, ""] | int) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.fold_in(key, use), epoch)


def dealt(keys: Key[Array, "P K"], reward: Float[Array, "P K"], epoch: int, updates: int) -> Int[Array, "U P k"]:
    """The K / updates samples that each update takes of every prompt, no sample twice.

    One of each stratum, `updates` neighbours in the prompt's order of rewards, by chance: so every update sees good
    and bad samples of a prompt, and advantages that nearly cancel. (The original shuffles all samples together.)
    """
    prompts, kept = keys.shape
    order = jnp.argsort(reward, axis=-1, stable=True)
    chance = jax.vmap(jax.vmap(lambda k: jax.random.uniform(_use(k, ORDER, epoch))))(keys)
    strata, chance = (x.reshape(prompts, kept // updates, updates) for x in (order, take(chance, order)))
    return jnp.moveaxis(jnp.take_along_axis(strata, jnp.argsort(chance, axis=-1), axis=-1), -1, 0)


def samples_at_a_time(cfg: Config, held: int) -> int:
    """Samples whose points are made together, of the `held` that one device has in an update; ConfigError if uneven."""
    group = min(held, max(1, cfg.learn.micro_batch // cfg.times))
    if held % group:
        raise ConfigError(
            f"learn.micro_batch={cfg.learn.micro_batch} takes {group} samples at a time, but a device holds {held} in "
            f"an update: set it to {cfg.times} times a divisor of {held}, or use fewer devices"
        )
    return group


def gradients(
    state: TrainState,
    began: TrainState,
    frozen: Frozen,
    cond: PyTree,
    keys: Key[Array, "P k"],
    samples: Sample,
    advantage: Float[Array, "P k"],
    *,
    model: Model,
    cfg: Config,
) -> tuple[Params, Metrics]:
    """Gradient and metrics of the mean loss over all (sample, time) points, `micro_batch` points a forward pass.

    `began` is the state as the iteration began; leaves of `samples` [P, k, ...].
    """
    times, micro, hyper = cfg.times, cfg.learn.micro_batch, state.hyper
    algorithm = algos.find(cfg.learn.algorithm)
    schedule = schedule_of(model, cfg)
    # Policies that no gradient goes through, in one pass; the reference is an adapter of zeros.
    zeros = jax.tree.map(jnp.zeros_like, state.lora)
    policies = {"old": began.old, "reference": zeros, "behaviour": began.lora}
    names = algorithm.fixed(cfg.learn)
    fixed = jax.tree.map(lambda *x: jnp.stack(x), *(policies[name] for name in names)) if names else {}

    def objective(current: Params, base: Params, fixed: Params, cond: PyTree, points: Any, advantage: Array):
        def velocity(adapter: Params) -> Array:
            return model.velocity(lora.policy(base, adapter, cfg.lora), points.x_t, points.t, cond)

        apart = jax.lax.stop_gradient(jax.vmap(velocity)(fixed)) if names else ()
        v = Velocities(velocity(current), **dict(zip(names, apart, strict=True)))
        loss, metrics = algorithm.loss(v, points, advantage, hyper, cfg.learn)
        return jnp.sum(loss), jax.tree.map(jnp.sum, {"loss": loss, **metrics})

    def on_device(current, base, fixed, cond, keys, samples, advantage):
        count = keys.size
        group = samples_at_a_time(cfg, count)
        owner = jnp.repeat(jnp.arange(keys.shape[0]), keys.shape[1])
        flat = (owner, *jax.tree.map(lambda x: x.reshape((count, *x.shape[2:])), (keys, samples, advantage)))
        groups = jax.tree.map(lambda x: x.reshape((count // group, group, *x.shape[1:])), flat)

        def one_group(total, item):
            owner, keys, samples, advantage = item
            points = jax.vmap(lambda k, x: algorithm.points(k, x, schedule, times, cfg.learn))(keys, samples)
            flat = (
                jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), points),
                jnp.repeat(owner, times),
                jnp.repeat(advantage, times),
            )
            micros = jax.tree.map(lambda x: x.reshape((-1, min(micro, group * times), *x.shape[1:])), flat)

            def one_micro(total, item):
                points, owner, advantage = item
                own = jax.tree.map(lambda c: c[owner], cond)
                gradient = jax.value_and_grad(objective, has_aux=True)
                (_, metrics), grads = gradient(current, base, fixed, own, points, advantage)
                return jax.tree.map(jnp.add, total, grads), metrics

            return jax.lax.scan(one_micro, total, micros)

        grads, metrics = jax.lax.scan(one_group, jax.tree.map(jnp.zeros_like, current), groups)
        return jax.lax.psum((grads, jax.tree.map(jnp.sum, metrics)), sharding.DATA)

    run = sharding.over_data(on_device, (False, False, False, True, True, True, True), sharding.WHOLE)
    total = run(state.lora, frozen.base, fixed, cond, keys, samples, advantage)
    return jax.tree.map(lambda x: x / (keys.size * times), total)


def schedule_of(model: Model, cfg: Config) -> Schedule:
    """The times of the rollout that is trained on, and the law of its steps where the algorithm asks for it."""
    stage = cfg.regenerate
    sigmas = sigmas_of(model, stage)
    steps = sampler.gaussians(sigmas, stage.solver, stage.eta) if cfg.of_steps else None
    return Schedule(*jax.tree.map(lambda x: jnp.asarray(x, F32), (sigmas[:-1], steps)))


def apply_gradients(
    state: TrainState, grads: Params, optimizer: optax.GradientTransformation, cfg: Config
) -> tuple[TrainState, Float[Array, ""]]:
    """One clipped AdamW step and the evaluation average. A gradient or a LoRA that would not be finite changes nothing
    and is counted."""
    norm = optax.tree.norm(grads)
    scale = jnp.minimum(1.0, cfg.learn.clip_norm / (norm + 1e-6))  # torch's clip_grad_norm_
    grads = jax.tree.map(lambda g: jnp.where(jnp.isfinite(norm), g * scale, 0.0), grads)
    direction, moments = optimizer.update(grads, state.moments, state.lora)
    stepped = jax.tree.map(lambda p, d: p - state.hyper.learning_rate * d, state.lora, direction)
    finite = jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(stepped))
    decay = algos.ema_decay(state.updates + 1, cfg.learn.ema_max)
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, stepped)
    new = state._replace(lora=stepped, moments=moments, ema=ema, updates=state.updates + 1)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new._replace(key=None), state._replace(key=None))
    return new._replace(key=state.key, skipped=jnp.where(finite, 0, state.skipped + 1)), norm


# --- metrics --------------------------------------------------------------------------------------------------------


def reward_metrics(preview: Rollout | None, samples: Rollout) -> Metrics:
    """Names that users of the original plot; over the kept samples, except `explore/*`."""
    r = samples.reward
    std = jnp.std(r, axis=-1)
    out = {
        "reward/mean": jnp.mean(r),
        "reward/max": jnp.max(r),
        "reward/min": jnp.min(r),
        "reward/range": jnp.mean(jnp.max(r, axis=-1) - jnp.min(r, axis=-1)),
        "reward_std_mean": jnp.mean(std),
        "zero_std_ratio": jnp.mean((jnp.max(r, axis=-1) == jnp.min(r, axis=-1)).astype(F32)),
    }
    out |= {f"reward/{name}": jnp.mean(part) for name, part in samples.parts.items()}
    if preview is not None:
        out["explore/reward_mean"] = jnp.mean(preview.reward)
        out["explore/reward_std_mean"] = jnp.mean(jnp.std(preview.reward, axis=-1))
        out |= {f"explore/reward_{name}": jnp.mean(part) for name, part in preview.parts.items()}
    return out


# --- the iteration --------------------------------------------------------------------------------------------------


def iteration_step(
    state: TrainState,
    frozen: Frozen,
    prompts: Prompts,
    *,
    model: Model,
    score: Score,
    optimizer: optax.GradientTransformation,
    cfg: Config,
) -> tuple[TrainState, Metrics]:
    """One iteration over P prompts. Pure; jit it whole under `jax.set_mesh`, with the keyword arguments static."""
    if score.on_host:
        raise ConfigError(f"reward {score.on_host[0].name} runs on the host, between the stages: set staged=true")
    run = Stages(model, score, optimizer, cfg)
    count = jax.tree.leaves(prompts)[0].shape[0]
    chex.assert_tree_shape_prefix(prompts, (count,))  # fields of NamedTuples are not seen by jaxtyping
    keys = sample_keys(state, count, cfg.candidates)
    kernels = run.merged(state, frozen)
    low = run.quantised(kernels, frozen)
    if cfg.explore is None:
        full = run.regenerate(kernels, low, frozen, prompts, keys)
        samples, metrics = run.select_samples(state, full)
    else:
        preview = run.explore(kernels, low, frozen, prompts, keys)
        chosen = run.select_keys(state, preview)
        samples = run.regenerate(kernels, low, frozen, prompts, chosen.keys)
        metrics = run.compare(preview, chosen, samples)
    state, learnt = run.learn(state, frozen, prompts.cond, samples)
    return state, {**metrics, **learnt}


class Stages(NamedTuple):
    """An iteration's stages as functions of arrays, bound to the statics; `Staged` jits each, `iteration_step` none."""

    model: Model
    score: Score
    optimizer: optax.GradientTransformation
    cfg: Config

    def merged(self, state: TrainState, frozen: Frozen) -> dict[str, Array]:
        return merged(state, frozen, self.cfg)

    def quantised(self, kernels: dict[str, Array], frozen: Frozen) -> Params | None:
        """None where no stage explores in low precision."""
        low = self.cfg.low_precision
        return quantised(kernels, frozen, self.model, low) if low else None

    def explore(self, kernels, low, frozen: Frozen, prompts: Prompts, keys) -> Rollout:
        assert self.cfg.explore is not None
        return self.roll(self.cfg.explore, kernels, low, frozen, prompts, keys)

    def regenerate(self, kernels, low, frozen: Frozen, prompts: Prompts, keys) -> Rollout:
        return self.roll(self.cfg.regenerate, kernels, low, frozen, prompts, keys, keep_path=self.cfg.of_steps)

    def roll(self, stage: Stage, kernels, low, frozen, prompts, keys, keep_path: bool = False) -> Rollout:
        variables = policy_variables(kernels, None if stage.precision == "bf16" else low, frozen)
        statics = {"model": self.model, "score": self.score, "stage": stage, "keep_path": keep_path}
        return rollout(variables, frozen, prompts, keys, **statics)

    def select_keys(self, state: TrainState, preview: Rollout) -> Rollout:
        return keep(preview, self.cfg.kept, self.cfg.selection, chooser(state))

    def select_samples(self, state: TrainState, full: Rollout) -> tuple[Rollout, Metrics]:
        samples = keep(full, self.cfg.kept, self.cfg.selection, chooser(state))
        return samples, reward_metrics(full, samples)

    def compare(self, preview: Rollout, chosen: Rollout, samples: Rollout) -> Metrics:
        """Does the preview rank as the real thing does? Spearman within each prompt, over the kept samples."""
        agreement = jnp.mean(spearman(chosen.reward, samples.reward))
        return {**reward_metrics(preview, samples), "rank/spearman": agreement}

    def learn(self, state: TrainState, frozen: Frozen, cond: PyTree, samples: Rollout) -> tuple[TrainState, Metrics]:
        return learn(state, frozen, cond, samples, model=self.model, optimizer=self.optimizer, cfg=self.cfg)


class Staged:
    """`iteration_step` from the host: the same functions, one jit each, rollouts one block of prompts at a time.

    Between the calls the host knows the time of each stage, can show progress and can stop.
    """

    def __init__(self, *, model: Model, score: Score, optimizer: optax.GradientTransformation, cfg: Config):
        self.cfg = cfg
        self.stages = Stages(model, score, optimizer, cfg)
        jitted = ("merged", "quantised", "explore", "regenerate", "select_keys", "select_samples", "compare", "learn")
        self.jit: dict[str, Callable[..., Any]] = {name: jax.jit(getattr(self.stages, name)) for name in jitted}
        self.keys = jax.jit(functools.partial(sample_keys, prompts=cfg.prompts, candidates=cfg.candidates))

    def __call__(
        self,
        state: TrainState,
        frozen: Frozen,
        prompts: Prompts,
        times: dict[str, float],
        between: Callable[[str, float], None] = lambda stage, share: None,
    ) -> tuple[TrainState, Metrics]:
        """One iteration. `times` receives seconds per stage; `between(stage, share done)` runs between host calls."""
        keys = self.keys(state)
        with clock(times, "quantise"):
            kernels = self.jit["merged"](state, frozen)
            low = jax.block_until_ready(self.jit["quantised"](kernels, frozen))
        if self.cfg.explore is None:
            full = self._by_prompt("regenerate", (kernels, low, frozen), prompts, keys, times, between)
            with clock(times, "select"):
                samples, metrics = jax.block_until_ready(self.jit["select_samples"](state, full))
            del full  # candidates that are not learnt from leave the device, as do previews
        else:
            preview = self._by_prompt("explore", (kernels, low, frozen), prompts, keys, times, between)
            with clock(times, "select"):
                chosen = jax.block_until_ready(self.jit["select_keys"](state, preview))
            if self.cfg.regenerate.precision == "bf16":
                low = None  # the quantised kernels leave the device
            samples = self._by_prompt("regenerate", (kernels, low, frozen), prompts, chosen.keys, times, between)
            metrics = self.jit["compare"](preview, chosen, samples)
            del preview, chosen
        del kernels, low
        with clock(times, "learn"):
            state, learnt = jax.block_until_ready(self.jit["learn"](state, frozen, prompts.cond, samples))
        between("learn", 1.0)
        return state, {**metrics, **learnt}

    def _by_prompt(self, name: str, rest, prompts: Prompts, keys, times, between) -> Rollout:
        """One block per device and call: of each device's own prompts the next that a chunk takes together."""
        (count, images), devices, parts = keys.shape, jax.sharding.get_mesh().size, []
        stage = next(stage for n, stage, _ in self.cfg.stages() if n == name)
        mine = count // devices
        together = block_shape(stage.chunk, mine, images)[0]
        with clock(times, name):
            for i in range(0, mine, together):
                group, group_keys = sharding.block((prompts, keys), i, together)
                rolled = jax.block_until_ready(self.jit[name](*rest, group, group_keys))
                parts.append(with_host(rolled, self.stages.score, group.tokens))
                between(name, (i + together) / mine)
        return sharding.joined(tuple(parts))


@contextlib.contextmanager
def clock(times: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds spent inside to times[name]."""
    began = time.perf_counter()
    yield
    times[name] = times.get(name, 0.0) + time.perf_counter() - began
