"""Many runs on a world of `worlds` as one program: `iteration_step` under vmap over seeds and settings.

    opened = open_world(cfg)                         weights, prompts encoded once, the judge
    states = begin(opened, cfg, [{}] * 3, (0, 1, 2)) three seeds of a recipe, leaves [R, ...]
    run = program(opened, cfg, opened.parts.score)
    states, metrics = run(states, opened.table, opened.parts.frozen, picks(opened, cfg, (0, 1, 2), 0, 10))
    found = measure(opened, states.lora, "test")     {"exact": [R, prompts, images], ...}

These are the functions of `python -m solrl_jax.main --config=tiny` with the same keys, plus a leading axis. Rewards
that run on the host cannot take part, nor can captions that need them: words, which OCR reads, of `emoji`.
"""

import functools
import itertools
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from experiments import worlds
from experiments.worlds import SPLITS as SPLITS
from experiments.worlds import World
from solrl_jax import config, device, iteration, learn, lora, rollout, sharding, train
from solrl_jax.config import Config, Stage
from solrl_jax.rewards import Reward, Score
from solrl_jax.run import assemble, data
from solrl_jax.run.assemble import Parts
from solrl_jax.structs import Frozen, Model, Params, Prompts, PyTree, TrainState, Variables
from solrl_jax.weights import lora_files

FACTS = "facts"
"""Under this name the judge's tokens are in a Prompts and its arrays in Frozen.rewards."""
PICTURES = 4
"""Of each caption that is measured."""
COMPILER: dict[str, Any] = device.NO_TRITON_NORMS
"""XLA's options for programs of many runs: a preview of five runs compiles in 21 s without the pass and in 364 with it
(on a CPU, for an H100). Of single programs it takes up to 5 % of the run time (experiments/triton_norms;
tests/test_compiled.py::test_programs_of_many_runs_have_no_triton_norms)."""


class Opened(NamedTuple):
    """Captions and their Prompts (leaves [captions, ...]), encoded once: train and `table`, and each held-out split."""

    world: World
    parts: Parts
    train: tuple[str, ...]
    table: Prompts
    held_out: Mapping[str, tuple[list[str], Prompts]]


def open_world(cfg: Config, captions: int = 500, world: World | None = None) -> Opened:
    """Everything that runs of `cfg` share, and the first `captions` captions of each held-out split of its world.

    FP8 is calibrated where a stage of `cfg` runs in it. The empty caption is the negative conditioning. Call this and
    the functions below under `jax.set_mesh(sharding.make_mesh(1))`. ValueError if cfg is of no world of `worlds`, or
    trains on a reward that runs on the host.
    """
    world, parts = world or worlds.find(cfg.name), train.ready(assemble.assemble(cfg, 1))
    if parts.score.on_host:
        name = parts.score.on_host[0].name
        raise ValueError(f"reward {name} runs on the host, and a lab's runs are one program: train on other rewards")
    towers = {**parts.frozen.rewards, FACTS: world.params()}
    parts = parts._replace(frozen=parts.frozen._replace(rewards=towers, negative=parts.text([""])))

    held_out = {split: (texts, encoded(world, parts, texts)) for split, texts in world.held_out(captions).items()}
    return Opened(world, parts, parts.prompts.train, encoded(world, parts, parts.prompts.train), held_out)


def encoded(world: World, parts: Parts, captions: Sequence[str]) -> Prompts:
    """Captions for the networks, the rewards and the judge, leaves [captions, ...]."""
    prompts = assemble.encode(parts, captions, parts.score)
    facts = jax.tree.map(jnp.asarray, world.tokenize(captions))
    return prompts._replace(tokens={**prompts.tokens, FACTS: facts})


def with_choosing(opened: Opened, captions: int, seed: int) -> Opened:
    """`opened` with a further split, "choosing": captions of drawn scenes that are in no file of the world's prompts.

    Settings are chosen on these, so that the held-out captions stay unseen. ValueError if the world has too few.
    """
    world = opened.world
    known = {*opened.train, *itertools.chain.from_iterable(world.held_out().values())}
    drawn = dict.fromkeys(world.drawn(np.random.default_rng(seed), 20 * captions)[1])
    texts = [caption for caption in drawn if caption not in known][:captions]
    if len(texts) < captions:
        raise ValueError(f"{captions} captions to choose by: the world drew {len(texts)} new ones; ask for fewer")
    return opened._replace(held_out={**opened.held_out, "choosing": (texts, encoded(world, opened.parts, texts))})


# --- training -------------------------------------------------------------------------------------------------------


def begin(opened: Opened, cfg: Config, settings: Sequence[Mapping[str, float]], seeds: Sequence[int]) -> TrainState:
    """States of one run per (setting, seed) pair, leaves [R, ...]; a setting replaces fields of `Hyper`."""

    parts = opened.parts
    statics = {"model": parts.model, "optimizer": parts.optimizer, "cfg": cfg}

    def state(setting: Mapping[str, float], seed: int) -> TrainState:
        made = learn.init_state(jax.random.key(seed), parts.frozen, **statics)
        hyper = made.hyper._replace(**{k: jnp.float32(v) for k, v in setting.items()})
        learn.check_hyper(hyper, cfg)
        return made._replace(hyper=hyper)

    states = [state(setting, seed) for setting, seed in zip(settings, seeds, strict=True)]
    return jax.tree.map(lambda *x: jnp.stack(x), *states)


def picks(opened: Opened, cfg: Config, seeds: Sequence[int], first: int, count: int) -> Int[np.ndarray, "T R P"]:
    """The train prompts that each run draws in iterations first .. first + count, as the command does with its seed."""
    place = {caption: i for i, caption in enumerate(opened.train)}
    rows = [[data.batch(opened.train, s, first + i, cfg.prompts) for s in seeds] for i in range(count)]
    return np.asarray([[[place[caption] for caption in batch] for batch in row] for row in rows], np.int32)


def program(opened: Opened, cfg: Config, score: Score) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """(states [R], table, frozen, picks [T, R, P]) -> states and metrics [T, R, ...], jitted."""
    parts = opened.parts
    statics = {"model": parts.model, "score": score, "optimizer": parts.optimizer, "cfg": cfg}

    def run(states: TrainState, table: Prompts, frozen: Frozen, picks: Int[Array, "T R P"]):
        def one(state: TrainState, pick: Int[Array, "P"]):
            return iteration.iteration_step(state, frozen, jax.tree.map(lambda x: x[pick], table), **statics)

        return jax.lax.scan(lambda states, pick: jax.vmap(one)(states, pick), states, picks)

    return jax.jit(run)


def compiled(opened: Opened, cfg: Config, score: Score, seeds: Sequence[int], count: int):
    """`program`, compiled for `count` iterations of one run a seed. Threads may call it: XLA compiles at once."""
    with jax.set_mesh(sharding.make_mesh(1)):  # an ambient mesh is a thread's own
        states, rows = begin(opened, cfg, [{}] * len(seeds), seeds), picks(opened, cfg, seeds, 0, count)
        lowered = program(opened, cfg, score).lower(states, opened.table, opened.parts.frozen, rows)
        return lowered.compile(COMPILER)


def shuffled(score: Score) -> Score:
    """`score` with each call's values permuted among its images; the permutation depends on the images' bits.

    If a call has the whole group of a prompt, the rewards then carry no information about the pictures: a control.
    """

    def deal(reward: Reward) -> Reward:
        def dealt(params: Params, images: Float[Array, "B H W 3"], tokens: PyTree) -> Float[Array, "B"]:
            bits = jnp.sum(jax.lax.bitcast_convert_type(images, jnp.uint32), dtype=jnp.uint32)
            groups = jax.tree.leaves(tokens)[0].shape[0]
            rows = reward.score(params, images, tokens).reshape(groups, -1)
            return jax.random.permutation(jax.random.key(bits), rows, axis=1, independent=True).reshape(-1)

        return reward._replace(score=dealt)

    return Score(tuple(deal(r) for r in score.rewards), score.weights)


def stopwatch() -> Callable[..., None]:
    """say(*what) prints it after the seconds since this call."""
    began = time.perf_counter()

    def say(*what: object) -> None:
        print(f"{time.perf_counter() - began:7.1f} s ", *what, flush=True)

    return say


# --- measuring ------------------------------------------------------------------------------------------------------


def chunk(captions: int, images: int, most: int) -> int:
    """Pictures at a time: all of as many captions as divide their number evenly, `most` pictures or less."""
    together = (n for n in range(max(1, min(captions, most // images)), 0, -1) if captions % n == 0)
    return images * next(together)


def measure(
    opened: Opened,
    adapters: Params,
    split: str,
    images: int = PICTURES,
    *,
    steps: int = 10,
    at_once: int = 500,
    seed: int = 0,
    w: float = 1.0,
) -> dict[str, Float[np.ndarray, "R P n"]]:
    """exact, share of facts and clipscore of R adapters (leaves [R, ...]) on a split's captions x fixed seeds, with
    classifier-free guidance of weight w; `at_once` pictures at a time, or fewer.

    Also `spread`: the mean absolute difference, in 8-bit levels, between two pictures of one caption.
    """
    captions, prompts = opened.held_out[split]
    stage = Stage(steps=steps, chunk=chunk(len(captions), images, at_once), guidance=w)
    keys = jax.random.split(jax.random.key(seed), (len(captions), images))
    found = [
        _measure(
            jax.tree.map(operator.itemgetter(r), adapters),
            opened.parts.frozen,
            prompts,
            keys,
            world=opened.world,
            model=opened.parts.model._replace(guidance="cfg"),
            reward=opened.parts.score.rewards[0],
            stage=stage,
            lora_cfg=opened.parts.cfg.lora,
        )
        for r in range(jax.tree.leaves(adapters)[0].shape[0])
    ]
    return {name: np.stack([np.asarray(f[name], np.float64) for f in found]) for name in found[0]}


@functools.partial(jax.jit, static_argnames=("world", "model", "reward", "stage", "lora_cfg"))
def _measure(
    adapter: Params,
    frozen: Frozen,
    prompts: Prompts,
    keys: Key[Array, "P n"],
    *,
    world: World,
    model: Model,
    reward: Reward,
    stage: Stage,
    lora_cfg: config.Lora,
) -> dict[str, Array]:
    variables = {"params": lora.graft(frozen.base, lora.merged_kernels(frozen.base, adapter, lora_cfg))}

    def block(variables: Variables, frozen: Frozen, prompts: Prompts, keys: Key[Array, "p n"]) -> dict[str, Array]:
        how = {"model": model, "stage": stage, "negative": frozen.negative}
        images = model.decode(frozen.vae, rollout.integrate(variables, prompts.cond, keys, **how))
        share, exact = judged(world, frozen.rewards[FACTS], images, prompts.tokens[FACTS])
        rows = images.reshape(*keys.shape, -1)
        apart = jnp.abs(rows[:, :, None] - rows[:, None]).mean(-1).sum((1, 2)) / (keys.shape[1] * (keys.shape[1] - 1))
        return {
            "exact": exact.astype(jnp.float32),
            "share of facts": share,
            "clipscore": reward.score(frozen.rewards[reward.name], images, prompts.tokens[reward.name]),
            "spread": 255 * jnp.repeat(apart, keys.shape[1]),
        }

    _, together = rollout.block_shape(stage.chunk, *keys.shape)
    assert together == keys.shape[1], "a block must hold all pictures of a caption, to compute their spread"
    return rollout.by_block(block, stage.chunk)(variables, frozen, prompts, keys)


def judged(
    world: World, params: Params, images: Float[Array, "B H W 3"], tokens: PyTree
) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    """(share of facts, exact), `world.at_once` captions at a time: what a judge holds of a picture may be large."""
    groups = jax.tree.leaves(tokens)[0].shape[0]

    def caption(args: tuple[Array, PyTree]) -> tuple[Array, Array]:
        verdict = world.judge(params, args[0], jax.tree.map(lambda x: x[None], args[1]))
        return verdict.share, verdict.exact

    grouped = images.reshape(groups, -1, *images.shape[1:])
    found = jax.lax.map(caption, (grouped, tokens), batch_size=world.at_once)
    return jax.tree.map(lambda x: x.reshape(-1), found)


def measure_base(opened: Opened, at_once: int = 500) -> dict[str, dict[str, Float[np.ndarray, "1 P n"]]]:
    """{split: what `measure` finds of the base}"""
    return {split: measure(opened, base_adapter(opened), split, at_once=at_once) for split in SPLITS}


def interval(gain: Float[np.ndarray, "P"], draws: int = 10_000) -> list[float]:
    """95 % bootstrap interval of the mean of `gain`, over prompts."""
    rng = np.random.default_rng(0)
    means = gain[rng.integers(0, len(gain), (draws, len(gain)))].mean(axis=1)
    return [round(float(x), 4) for x in np.quantile(means, (0.025, 0.975))]


def base_adapter(opened: Opened, runs: int = 1) -> Params:
    """Adapters [R, ...] of zeros: the base."""
    like = begin(opened, opened.parts.cfg, [{}] * runs, range(runs)).lora
    return jax.tree.map(jnp.zeros_like, like)


def read_adapter(opened: Opened, run: Path) -> Params:
    """The adapter of a run's folder or of a LoRA file."""
    parts = opened.parts
    return lora_files.load(run, parts.frozen.base, parts.model.keys, parts.cfg.lora, parts.model.comfy).adapter


def policies(opened: Opened, run: Path | None = None) -> dict[str, Params]:
    """Adapters of the base and, if there is a run, of the trained policy."""
    base = {"base": jax.tree.map(lambda x: x[0], base_adapter(opened))}
    return base if run is None else base | {"trained": read_adapter(opened, run)}
