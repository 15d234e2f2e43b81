"""Samples to gradients, gradients to the LoRA, the old policy and the average."""

import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from solrl_jax import algos, guidance, lora, mixture, sampler, sharding
from solrl_jax.algos import Sample, Schedule
from solrl_jax.config import Config, ConfigError
from solrl_jax.keys import ORDER, POINTS, sample_key, shared_point_keys, split_seed
from solrl_jax.rollout import sigmas_of
from solrl_jax.selection import take
from solrl_jax.structs import (
    Frozen,
    Hyper,
    Model,
    Params,
    PyTree,
    Rollout,
    TrainState,
    Velocities,
)

Metrics = dict[str, Any]
F32 = jnp.float32


def make_optimizer(cfg: Config) -> optax.GradientTransformation:
    """AdamW's direction as in torch (decoupled decay, eps outside the root); `apply_gradients` applies the rate."""
    return optax.chain(optax.scale_by_adam(0.9, 0.999, 1e-8), optax.add_decayed_weights(cfg.learn.weight_decay))


def init_state(
    key: Key[Array, ""], frozen: Frozen, *, model: Model, optimizer: optax.GradientTransformation, cfg: Config
) -> TrainState:
    """A fresh LoRA (its output is exactly the base's), with copies as old and ema."""
    key_lora, key = split_seed(key)
    adapter = lora.init(key_lora, frozen.base, cfg.lora.targets or model.lora_targets, cfg.lora)
    hyper = Hyper(*(jnp.asarray(getattr(cfg.learn, name), F32) for name in Hyper._fields))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        iteration=zero,
        updates=zero,
        skipped=zero,
        key=key,
        lora=adapter,
        old=adapter,
        ema=adapter,
        moments=optimizer.init(adapter),
        hyper=hyper,
        fallen_back=zero,
    )


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

    An update takes K / updates samples of every prompt (`split_over_updates`), the same ones on any devices.
    """
    chex.assert_tree_shape_prefix(samples, samples.keys.shape)
    chex.assert_tree_shape_prefix(cond, samples.keys.shape[:1])
    advantage, worth = mixture.advantages(samples, cfg), mixture.worth(samples, cfg)
    epochs, updates = cfg.learn.epochs, cfg.learn.updates
    began, x0 = state, samples.x0
    assert x0 is not None  # these are samples, not a branch's preview

    def update(state: TrainState, which: tuple[Array, Array]):
        epoch, index = which
        keys = point_keys(state, samples.keys, epoch, cfg)
        made = Sample(x0, samples.path)
        batch = jax.tree.map(lambda x: take(x, index), (keys, made, advantage))
        grads, metrics = gradients(state, began, frozen, cond, *batch, model=model, cfg=cfg)
        state, norm = apply_gradients(state, grads, optimizer, cfg)
        return state, {**metrics, "grad_norm": norm, "skipped": state.skipped}

    epoch_of = jnp.repeat(jnp.arange(epochs), updates)
    index = jnp.concatenate([split_over_updates(samples.keys, worth, e, updates) for e in range(epochs)])
    state, metrics = jax.lax.scan(update, state, (epoch_of, index))
    hyper = state.hyper
    decay = algos.old_decay(state.updates, hyper.old_wait, hyper.old_ramp, hyper.old_max)
    followed = jax.tree.map(lambda o, c: decay * o + (1 - decay) * c, began.old, state.lora)
    state = state._replace(old=followed, iteration=state.iteration + 1)
    in_a_row = metrics.pop("skipped")
    found = {name: jnp.mean(x, where=in_a_row == 0) for name, x in metrics.items()}  # of the updates that were taken
    if "behaviour" in algos.find(cfg.learn.algorithm).fixed(cfg.learn):
        # In the first update both policies are the same: the deviation is the rounding of the two programs.
        found["ratio/noise"] = metrics["ratio/deviation"][0]
    skipped = {"skipped": jnp.sum(in_a_row > 0), "skipped_in_a_row": jnp.max(in_a_row)}
    return state, {**found, **skipped, "old_decay": decay}


def point_keys(state: TrainState, keys: Key[Array, "P K"], epoch: Int[Array, ""], cfg: Config) -> Key[Array, "P K"]:
    """The key of each sample's points in an epoch; with learn.shared_points it is its prompt's."""
    if not cfg.learn.shared_points:
        return jax.vmap(jax.vmap(lambda k: sample_key(k, POINTS, epoch)))(keys)
    return jnp.broadcast_to(shared_point_keys(state, epoch, keys.shape[0])[:, None], keys.shape)


def split_over_updates(
    keys: Key[Array, "P K"], worth: Float[Array, "P K"], epoch: int, updates: int
) -> Int[Array, "U P k"]:
    """The K / updates samples that each update takes of every prompt, no sample twice.

    A stratum is `updates` neighbours in the prompt's order of rewards. An update takes one of each at random, so it
    has good and bad samples of a prompt, whose advantages nearly cancel. (The original shuffles all samples together.)
    """
    prompts, kept = keys.shape
    order = jnp.argsort(worth, axis=-1, stable=True)
    chance = jax.vmap(jax.vmap(lambda k: jax.random.uniform(sample_key(k, ORDER, epoch))))(keys)
    strata, chance = (x.reshape(prompts, kept // updates, updates) for x in (order, take(chance, order)))
    return jnp.moveaxis(jnp.take_along_axis(strata, jnp.argsort(chance, axis=-1), axis=-1), -1, 0)


def samples_at_a_time(cfg: Config, held: int) -> int:
    """How many of the `held` samples of a device and update have their points made together; ConfigError if uneven."""
    group = min(held, max(1, cfg.learn.micro_batch // cfg.times))
    if held % group:
        raise ConfigError(
            f"learn.micro_batch={cfg.learn.micro_batch} takes {group} samples at a time, but a device holds {held} in "
            f"an update: set it to {cfg.times} times a divisor of {held}, or use fewer devices"
        )
    return group


def micro_batches(cfg: Config, held: int) -> int:
    """How many micro-batches the `held` samples of a device and update make; ConfigError if they do not divide."""
    group = samples_at_a_time(cfg, held) * cfg.times
    count, every = held * cfg.times // min(cfg.learn.micro_batch, group), cfg.learn.reference_every
    if "reference" in algos.find(cfg.learn.algorithm).fixed(cfg.learn) and count % every:
        fits = [n for n in range(1, count + 1) if count % n == 0]
        raise ConfigError(
            f"learn.reference_every={every} does not divide the {count} micro-batches of a device and update: use one "
            f"of {fits}"
        )
    return count


def check_hyper(hyper: Hyper, cfg: Config) -> None:
    """ConfigError if a state asks for a KL penalty whose reference pass the programs of `cfg` leave out."""
    asked = np.ravel(jax.device_get(hyper.kl_weight))
    if np.any(asked) and not cfg.learn.kl_weight:
        raise ConfigError(
            f"hyper.kl_weight={asked[asked != 0][0]:g}, but with learn.kl_weight=0 the reference is not computed: give "
            "learn.kl_weight a positive number"
        )


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
    """Gradient and metrics of the mean loss over all (sample, time) points, `micro_batch` points per forward pass.

    `began` is the state when the iteration began; leaves of `samples` [P, k, ...]. Each device takes its own prompts;
    the sums of the devices are added. Of every m = learn.reference_every micro-batches in a row one has the reference,
    at m times the KL's weight. In the next update it is another one, so over m updates each is it once: the gradient is
    the same in the mean.
    """
    passes, every = passes_of(cfg)
    hyper = state.hyper._replace(kl_weight=every * state.hyper.kl_weight)
    # By updates % every alone, update i of each iteration would have one phase if an iteration has `every` updates: the
    # same ranks of reward would always have the reference.
    phase = (state.updates + state.updates // every) % every
    specs = (
        sharding.WHOLE,  # the trained policy
        sharding.specs_of(frozen.base),
        sharding.WHOLE,  # the fixed policies
        sharding.WHOLE,  # the phase
        sharding.WHOLE,  # the negative conditioning
        *[sharding.SPLIT] * 4,  # a device's conditioning, keys, samples and advantages
    )
    summed = functools.partial(summed_gradients, hyper=hyper, model=model, cfg=cfg)
    run = sharding.over_data(summed, specs, sharding.WHOLE)
    fixed = fixed_policies(state, began, passes[0])
    grads, sums = run(state.lora, frozen.base, fixed, phase, frozen.negative, cond, keys, samples, advantage)
    count = keys.size * cfg.times
    metrics = means(sums, (count // every, count - count // every)[: len(passes)])
    return jax.tree.map(lambda x: x / count, grads), metrics


def passes_of(cfg: Config) -> tuple[list[tuple[str, ...]], int]:
    """(the fixed policies of each kind of micro-batch, m): with the reference, which one of every m micro-batches has,
    and without."""
    names = algos.find(cfg.learn.algorithm).fixed(cfg.learn)
    every = cfg.learn.reference_every if "reference" in names else 1
    return ([names] if every == 1 else [names, tuple(name for name in names if name != "reference")]), every


def summed_gradients(
    current: Params,
    base: Params,
    fixed: dict[str, Params],
    phase: Int[Array, ""],
    negative: PyTree,
    cond: PyTree,
    keys: Key[Array, "p k"],
    samples: Sample,
    advantage: Float[Array, "p k"],
    *,
    hyper: Hyper,
    model: Model,
    cfg: Config,
) -> tuple[Params, list[Metrics]]:
    """One device's part of `gradients`: the gradient of its points' losses and, for each kind of micro-batch, their
    metrics, both summed over all points of all devices."""
    size, count = samples_at_a_time(cfg, keys.size), micro_batches(cfg, keys.size)
    groups, pieces = by_group(keys, samples, advantage, size), count * size // keys.size
    points = functools.partial(points_of, schedule=schedule_of(model, cfg), cfg=cfg)
    passes, every = passes_of(cfg)

    def added(policies: tuple[str, ...], total: Params, which: Int[Array, "M"]):
        objective = functools.partial(summed_loss, names=policies, hyper=hyper, model=model, cfg=cfg)
        gradient = jax.value_and_grad(objective, has_aux=True)
        others = [stacked([fixed[name] for name in group]) for _, group in by_guidance(policies, cfg)]

        def one_micro(total, number):
            group = jax.tree.map(lambda x: x[number // pieces], groups)
            owner, *micro = jax.tree.map(lambda x: x[number % pieces], points(*group))
            own = jax.tree.map(lambda c: c[owner], cond)
            (_, metrics), grads = gradient(current, base, others, own, negative, *micro)
            return jax.tree.map(jnp.add, total, grads), metrics

        total, metrics = jax.lax.scan(one_micro, total, which)
        return total, jax.tree.map(jnp.sum, metrics)

    order, sums = reference_first(sharding.index(), count, every, phase), []
    grads = jax.tree.map(jnp.zeros_like, current)
    for which, policies in zip(jnp.split(order, [count // every] if every > 1 else []), passes, strict=True):
        grads, metrics = added(policies, grads, which)
        sums.append(metrics)
    return jax.lax.psum((grads, sums), sharding.AXES)


def reference_first(device: Int[Array, ""], count: int, every: int, phase: Int[Array, ""]) -> Int[Array, "count"]:
    """A device's `count` micro-batches, the one of every `every` that has the reference first.

    The choice is by their numbers among all devices'. It is another place in each `every` of them, for samples are in
    the order of their rewards, and the same place would be the same ranks of every prompt.
    """
    number = device * count + jnp.arange(count)
    return jnp.argsort((number - number // every - phase) % every != 0, stable=True)


def means(sums: Sequence[Metrics], counts: Sequence[int]) -> Metrics:
    """Each metric's mean over the points that have it; `counts` are the points behind each of `sums`."""
    found: dict[str, list[tuple[Array, int]]] = {}
    for metrics, count in zip(sums, counts, strict=True):
        for name, total in metrics.items():
            found.setdefault(name, []).append((total, count))
    return {name: sum(t for t, _ in parts) / sum(n for _, n in parts) for name, parts in found.items()}


def fixed_policies(state: TrainState, began: TrainState, names: Sequence[str]) -> dict[str, Params]:
    """The adapters of the named policies without gradient that the loss compares with.

    "old" and "behaviour" are the adapters at the iteration's beginning; "reference" is an adapter of zeros.
    """
    policies = {"old": began.old, "reference": jax.tree.map(jnp.zeros_like, state.lora), "behaviour": began.lora}
    return {name: policies[name] for name in names}


def by_guidance(names: Sequence[str], cfg: Config) -> list[tuple[float, tuple[str, ...]]]:
    """The named policies in groups of one weight of guidance, which go through the network as one batch."""
    w = guidance.weights(cfg)
    found: dict[float, list[str]] = {}
    for name in names:
        found.setdefault(w.kl if name == "reference" else w.learn, []).append(name)
    return [(w, tuple(group)) for w, group in found.items()]


def stacked(policies: Sequence[Params]) -> Params:
    """Adapters with a leading axis over the policies."""
    return jax.tree.map(lambda *x: jnp.stack(x), *policies)


def summed_loss(
    current: Params,
    base: Params,
    fixed: Sequence[Params],
    cond: PyTree,
    negative: PyTree,
    points: Any,
    advantage: Float[Array, "B"],
    *,
    names: Sequence[str],
    hyper: Hyper,
    model: Model,
    cfg: Config,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss and its metrics, summed over B points; `cond` leaves [B, ...], `negative`'s [1, ...].

    The `fixed` policies are stacked in the groups of `by_guidance(names)`. Of a guided velocity both rows have the
    policy's LoRA, and the current one's gradient goes through both.
    """
    algorithm = algos.find(cfg.learn.algorithm)

    def velocity(adapter: Params, w: float) -> Array:
        rows = guidance.conditioned(model, cond, negative, w)
        variables = lora.policy(base, adapter, cfg.lora)
        return guidance.velocity(model, w)(variables, points.x_t, points.t, rows)

    others: dict[str, Array] = {}
    for (w, group), adapters in zip(by_guidance(names, cfg), fixed, strict=True):
        found = jax.lax.stop_gradient(jax.vmap(functools.partial(velocity, w=w))(adapters))
        others |= dict(zip(group, found, strict=True))
    v = Velocities(velocity(current, guidance.weights(cfg).learn), **others)
    if algorithm.whole:
        v, points = jax.tree.map(lambda x: x.reshape((-1, cfg.times, *x.shape[1:])), (v, points))
        advantage = advantage[:: cfg.times]
    loss, metrics = algorithm.loss(v, points, advantage, hyper, cfg.learn)
    return jnp.sum(loss), jax.tree.map(jnp.sum, {"loss": loss, **metrics})


def by_group(keys: Key[Array, "p k"], samples: Sample, advantage: Float[Array, "p k"], size: int) -> PyTree:
    """(prompt's number, key, sample, advantage) of p x k samples, leaves [p k / size, size, ...]."""
    owner = jnp.repeat(jnp.arange(keys.shape[0]), keys.shape[1])
    flat = (owner, *jax.tree.map(lambda x: x.reshape((keys.size, *x.shape[2:])), (keys, samples, advantage)))
    return jax.tree.map(lambda x: x.reshape((keys.size // size, size, *x.shape[1:])), flat)


def points_of(
    owner: Int[Array, "n"],
    keys: Key[Array, "n"],
    samples: Sample,
    advantage: Float[Array, "n"],
    *,
    schedule: Schedule,
    cfg: Config,
) -> PyTree:
    """(prompt's number, point, advantage) of T points per sample, leaves [n T / micro_batch, micro_batch, ...]."""
    algorithm, times = algos.find(cfg.learn.algorithm), cfg.times
    points = jax.vmap(lambda k, x: algorithm.points(k, x, schedule, times, cfg.learn))(keys, samples)
    flat = (
        jnp.repeat(owner, times),
        jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), points),
        jnp.repeat(advantage, times),
    )
    micro = min(cfg.learn.micro_batch, owner.shape[0] * times)
    return jax.tree.map(lambda x: x.reshape((-1, micro, *x.shape[1:])), flat)


def schedule_of(model: Model, cfg: Config) -> Schedule:
    """The times of the trained rollout, and the distribution of its steps if the algorithm needs it."""
    stage = cfg.regenerate
    sigmas = sigmas_of(model, stage)
    steps = sampler.gaussians(sigmas, stage.solver, stage.eta) if cfg.of_steps else None
    return Schedule(*jax.tree.map(lambda x: jnp.asarray(x, F32), (sigmas[:-1], steps)))


def apply_gradients(
    state: TrainState, grads: Params, optimizer: optax.GradientTransformation, cfg: Config
) -> tuple[TrainState, Float[Array, ""]]:
    """One clipped AdamW step and the EMA's update. If the gradient or the new LoRA is not finite, nothing changes and
    the skip is counted."""
    norm = optax.tree.norm(grads)
    scale = jnp.minimum(1.0, cfg.learn.clip_norm / (norm + 1e-6))  # torch's clip_grad_norm_
    grads = jax.tree.map(lambda g: g * scale, grads)
    direction, moments = optimizer.update(grads, state.moments, state.lora)
    stepped = jax.tree.map(lambda p, d: p - state.hyper.learning_rate * d, state.lora, direction)
    finite = jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(stepped))
    decay = algos.ema_decay(state.updates + 1, cfg.learn.ema_max)
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, stepped)
    new = state._replace(lora=stepped, moments=moments, ema=ema, updates=state.updates + 1)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new._replace(key=None), state._replace(key=None))
    return new._replace(key=state.key, skipped=jnp.where(finite, 0, state.skipped + 1)), norm
