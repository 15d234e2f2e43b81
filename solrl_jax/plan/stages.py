"""A run's stages, traced as they run with one device's share of the prompts: memory, FLOPs, and what is gathered.

With K = config.shard > 1 the stages are traced on a mesh of K devices, each with its own prompts, so that a device's
part of the program has a device's shapes, with a gathered kernel as one of its arrays. A config whose shard is not
chosen yet (0) is planned with whole weights.
"""

import functools
from collections import Counter
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from solrl_jax import guidance, iteration, learn, lora, sharding
from solrl_jax.config import Config, Stage
from solrl_jax.plan import jaxpr
from solrl_jax.plan.cards import EMULATED, Card, seconds
from solrl_jax.plan.jaxpr import nbytes
from solrl_jax.plan.shapes import Sizes, batch, blank, keys, samples, states
from solrl_jax.rollout import block_shape, branched, rolled
from solrl_jax.run import evaluate, watch
from solrl_jax.run.encode import encoded
from solrl_jax.structs import Frozen, Params, Prompts


class Use(NamedTuple):
    """One stage, run in every `every`-th iteration: bytes on each device, FLOPs of all devices by operand dtype,
    expected seconds of these, and the bytes that each device receives from the others."""

    stage: str
    weights: int
    adapters: int
    merged: int
    quantised: int
    activations: int
    flops: Counter[str]
    seconds: float
    every: int = 1
    received: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.merged + self.quantised + self.activations


def stages_of(cfg: Config) -> tuple[str, ...]:
    """The stages in order; then those that run at the start and once in many iterations."""
    rare = ["watch"] * watch.due(cfg, 0) + ["evaluate"] * bool(cfg.evaluate.every)
    return ("encode", "quantise", *(name for name, _, _ in cfg.stages()), "learn", *rare)


def uses_of(cfg: Config, sizes: Sizes, devices: int, card: Card) -> tuple[Use, ...]:
    """The `Use` of each of `stages_of`."""
    return tuple(use_of(stage, cfg, sizes, devices, card) for stage in stages_of(cfg))


def planned_shard(cfg: Config) -> int:
    """K of config.shard; 1 before it is chosen."""
    return max(1, cfg.shard)


def held(tree: Any, shards: int) -> int:
    """Bytes that one device holds of frozen weights, of which each of `shards` has a part."""
    where = jax.tree.leaves(sharding.specs_of(tree), is_leaf=lambda s: isinstance(s, P))
    leaves = zip(jax.tree.leaves(tree), where, strict=True)
    return sum(nbytes(x) // (shards if sharding.FSDP in spec else 1) for x, spec in leaves)


def use_of(stage: str, cfg: Config, sizes: Sizes, devices: int, card: Card) -> Use:
    """The `Use` of `stage`, as `iteration.Staged`, `watch.measured` and `evaluate.pictures` run it."""
    return _measured(cfg, sizes, devices, card) if stage == "watch" else _use(_work(stage, cfg, sizes, devices), card)


class Work(NamedTuple):
    """One device's program, called `calls` times, and the other arrays in memory at that time."""

    stage: str
    cfg: Config
    sizes: Sizes
    devices: int
    program: Any  # a jaxpr
    calls: int = 1
    every: int = 1
    precision: str = "bf16"
    kernels: Any = None
    low: Any = None
    held: Any = None


def _work(stage: str, cfg: Config, sizes: Sizes, devices: int) -> Work:
    model, frozen, mine, k = sizes.model, sizes.frozen, -(-cfg.prompts // devices), planned_shard(cfg)
    run, state = iteration.stages(model, sizes.score, learn.make_optimizer(cfg), cfg), blank(cfg, sizes)
    for name, how, images in cfg.stages():
        if name == stage:
            go_on = states(cfg, sizes, mine, cfg.kept)
            # Samples stay in memory until `learn` has used them, and GRPO's include their paths.
            stay = go_on, samples(cfg, sizes, mine, images) if stage == "regenerate" else None
            branch = "preview" if stage == "explore" else "rest"
            return _rollout(stage, how, mine, images, cfg, sizes, devices, branch)._replace(held=stay)
    if stage == "encode":
        run_encoders = functools.partial(encoded, model=model)
        program = jaxpr.trace(run_encoders, sizes.text, batch(sizes.tokens, mine * k), shards=k)
        return Work(stage, cfg, sizes, devices, program)
    if stage == "learn":
        stay = samples(cfg, sizes, mine, cfg.kept)
        given = batch(sizes.prompts.cond, mine * k), samples(cfg, sizes, mine * k, cfg.kept)
        program = jaxpr.trace(run.learn, state, frozen, *given, shards=k)
        return Work(stage, cfg, sizes, devices, program, held=stay)
    if stage == "evaluate":
        return _evaluation(cfg, sizes, devices)
    program = jaxpr.trace(
        lambda state, frozen: run.quantised(run.merged(state, frozen), frozen), state, frozen, shards=k
    )
    merged, low = kernels(cfg, sizes)
    return Work(stage, cfg, sizes, devices, program, kernels=merged, low=low)


def kernels(cfg: Config, sizes: Sizes) -> tuple[Any, Any]:
    """The merged and the quantised kernels, in shapes."""
    run, state = iteration.stages(sizes.model, sizes.score, learn.make_optimizer(cfg), cfg), blank(cfg, sizes)
    merged = jax.eval_shape(run.merged, state, sizes.frozen)
    return merged, jax.eval_shape(run.quantised, merged, sizes.frozen)


def _rollout(
    stage: str, how: Stage, mine: int, images: int, cfg: Config, sizes: Sizes, devices: int, part: str = ""
) -> Work:
    """`images` images for each of a device's `mine` prompts, one block of prompts per call; the `part` of a branch that
    it is, if there is one: its preview, or the rest from the preview's states."""
    merged, low = kernels(cfg, sizes)
    if stage != "explore" and how.precision == "bf16":
        low = None
    together, k = block_shape(how.chunk, mine, images)[0], planned_shard(cfg)
    keep_path = stage == "regenerate" and cfg.of_steps
    branch = branched(sizes.model, cfg) if part else None
    statics = {"model": sizes.model, "score": sizes.score, "stage": how, "branch": branch, "keep_path": keep_path}
    given = batch(sizes.prompts, together * k), keys(together * k, images)
    begin = states(cfg, sizes, together * k, images) if part == "rest" else None
    program = jaxpr.trace(functools.partial(rolled, **statics), merged, low, sizes.frozen, *given, begin, shards=k)
    return Work(stage, cfg, sizes, devices, program, mine // together, 1, how.precision, merged, low)


def _measured(cfg: Config, sizes: Sizes, devices: int, card: Card) -> Use:
    """A measurement's preview and full rollouts, by the stages' programs: the largest memory, the work of all
    candidates."""
    assert cfg.preview is not None
    prompts, parts = -(-cfg.watch.prompts // devices), ("rest",) if cfg.branch is None else ("rest", "")
    rolls = [("explore", cfg.preview, cfg.candidates, "preview")]
    rolls += [("regenerate", cfg.regenerate, cfg.kept, part) for part in parts]
    stay, uses = states(cfg, sizes, prompts, cfg.candidates), []
    for name, how, images, part in rolls:
        together = watch.prompts_per_call(how, images, -(-cfg.prompts // devices), prompts)
        one = _rollout(name, how, together, images, cfg, sizes, devices, part)
        calls = prompts // together * -(-cfg.candidates // images)
        uses.append(_use(one._replace(calls=calls, every=cfg.watch.every, held=stay), card))
    largest = max(uses, key=lambda use: use.total)
    flops, received = sum((use.flops for use in uses), Counter()), sum(use.received for use in uses)
    return largest._replace(stage="watch", flops=flops, seconds=sum(use.seconds for use in uses), received=received)


def _evaluation(cfg: Config, sizes: Sizes, devices: int) -> Work:
    """All of a device's fixed prompts in one call, including the rewards that are not trained on, and the rows of the
    negative conditioning if it is guided by one."""
    mine = evaluate.prompts_each(cfg.evaluate, cfg.evaluate.prompts, devices) * planned_shard(cfg)
    stage = evaluate.rollout_of(cfg)
    negative = batch(sizes.prompts.cond, 1) if guidance.doubles(sizes.model, stage.guidance) else None
    frozen = sizes.frozen._replace(rewards={**sizes.frozen.rewards, **sizes.towers}, negative=negative)

    def drawn(adapter: Params, frozen: Frozen, prompts: Prompts, keys: Any) -> Any:
        statics = {"model": sizes.model, "score": sizes.judged, "stage": stage}
        return evaluate.draw(lora.policy(frozen.base, adapter, cfg.lora), frozen, prompts, keys, **statics)

    prompts = batch(Prompts(sizes.prompts.cond, sizes.captions), mine)
    given = blank(cfg, sizes).ema, frozen, prompts, keys(mine, cfg.evaluate.images)
    program = jaxpr.trace(drawn, *given, shards=planned_shard(cfg))
    return Work("evaluate", cfg, sizes, devices, program, every=cfg.evaluate.every)


def _use(work: Work, card: Card) -> Use:
    stage, cfg, sizes, devices, k = work.stage, work.cfg, work.sizes, work.devices, planned_shard(work.cfg)
    flops = Counter({dtype: n * work.calls * devices for dtype, n in jaxpr.flops(work.program).items()})
    text = held(sizes.text, k) if stage == "encode" or not cfg.encode_ahead else 0
    made = held(work.low, k) if stage == "quantise" else 0  # its result is not an activation
    state = blank(cfg, sizes)
    return Use(
        stage=stage,
        weights=held(sizes.frozen.base, k) + nbytes((sizes.frozen._replace(base={}), sizes.towers)) + text,
        adapters=nbytes(state if sizes.training else (state.ema, state.ema)),  # a drawing has the base's and its own
        merged=held(work.kernels, k),
        quantised=held(work.low, k),
        activations=jaxpr.peak(work.program) + nbytes(work.held) - made,
        flops=flops,
        seconds=seconds(flops, card, devices) / (EMULATED if work.precision.endswith("_emulated") else 1),
        every=work.every,
        received=jaxpr.received(work.program, k) * work.calls,
    )
