"""One iteration of Sol-RL: explore in low precision, finish the kept in BF16, learn. Read this file first.

    policies = quantise(merge(base, old)), merge(base, old)
    preview  = rollout(explorer, keys [P, N])                 every candidate, cheaply
    chosen   = keys, states of the K/2 best and K/2 worst     a sample is its key, in a branch also its state
    samples  = rollout(merged, chosen [P, K])                 the same seeds, in BF16
    A        = advantages(rewards of the samples)
    state    = learn(samples, A)                              a LoRA, in BF16; the old policy follows

`iteration_step` is one pure, jittable function; `Staged` runs the same stages from the host, one jit each.
`branch`, the recipes' default: the preview of 5 steps also keeps each candidate's solver state after the 3rd,
[P, N, ...], and the samples continue from there in 4 steps. `sol_rl`, the paper's: a preview of 6 steps, and the
samples take 10 steps from the same noise. Families of one stage have explore = None: all candidates in one rollout, and
the kept are chosen from these.
"""

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from solrl_jax import device, mixture, sharding
from solrl_jax.config import Config, ConfigError
from solrl_jax.keys import sample_keys, selection_key
from solrl_jax.learn import check_hyper, learn
from solrl_jax.rewards import Score
from solrl_jax.rollout import block_shape, branched, merged, quantised, rolled, with_host
from solrl_jax.selection import mean_of_ranked, select, spearman, take
from solrl_jax.structs import (
    Frozen,
    Model,
    Params,
    Prompts,
    PyTree,
    Rollout,
    Row,
    TrainState,
)

Metrics = dict[str, Any]
F32 = jnp.float32


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
    run = stages(model, score, optimizer, cfg)
    count = jax.tree.leaves(prompts)[0].shape[0]
    chex.assert_tree_shape_prefix(prompts, (count,))  # jaxtyping does not see NamedTuple fields
    keys, chance = run.draw(state, count)
    kernels = run.merged(state, frozen)
    # Without the barrier XLA fuses quantising into the explorer's products: the preview rounds otherwise than staged,
    # tests/test_rollout.py::test_staged_equals_whole.
    kernels, low = jax.lax.optimization_barrier((kernels, run.quantised(kernels, frozen)))
    if cfg.explore is None:
        full = run.regenerate(kernels, low, frozen, prompts, keys)
        samples, metrics = run.select_samples(full, chance)
    else:
        preview = run.explore(kernels, low, frozen, prompts, keys)
        preview, chosen = run.select_keys(preview, chance)
        samples = run.regenerate(kernels, low, frozen, prompts, chosen.keys, chosen.state)
        metrics = run.compare(preview, chosen, samples)
    state, learnt = run.learn(state, frozen, prompts.cond, samples)
    return state, {**metrics, **learnt}


class Stages(NamedTuple):
    """The stages of an iteration: pure functions of arrays, which a benchmark can jit one by one."""

    merged: Callable[[TrainState, Frozen], dict[str, Array]]
    quantised: Callable[[dict[str, Array], Frozen], Params | None]
    draw: Callable[..., tuple[Array, Array]]  # (state, P) -> keys [P, N], random numbers [P, N] for the selection
    explore: Callable[..., Rollout]  # (kernels, low, frozen, prompts, keys)
    regenerate: Callable[..., Rollout]  # the same arguments, plus the states in a branch
    select_keys: Callable[[Rollout, Array], tuple[Rollout, Rollout]]
    select_samples: Callable[[Rollout, Array], tuple[Rollout, Metrics]]
    compare: Callable[[Rollout, Rollout, Rollout], Metrics]
    learn: Callable[[TrainState, Frozen, PyTree, Rollout], tuple[TrainState, Metrics]]


def stages(model: Model, score: Score, optimizer: optax.GradientTransformation, cfg: Config) -> Stages:
    """The stages with their statics bound: `Staged` jits each, `iteration_step` none."""
    roll = functools.partial(rolled, model=model, score=score, branch=branched(model, cfg))
    return Stages(
        merged=functools.partial(merged, cfg=cfg),
        quantised=functools.partial(quantised, model=model, precision=cfg.low_precision),
        draw=functools.partial(draw, cfg=cfg),
        explore=functools.partial(roll, stage=cfg.preview or cfg.regenerate),
        regenerate=functools.partial(roll, stage=cfg.regenerate, keep_path=cfg.of_steps),
        select_keys=functools.partial(select_keys, cfg=cfg),
        select_samples=functools.partial(select_samples, cfg=cfg),
        compare=functools.partial(compare, cfg=cfg),
        learn=functools.partial(learn, model=model, optimizer=optimizer, cfg=cfg),
    )


@functools.lru_cache(maxsize=1)
def programs(
    model: Model, score: Score, optimizer: optax.GradientTransformation, cfg: Config
) -> Mapping[str, Callable[..., Any]]:
    """The stages by their names, jitted: once for a run, whose loop and whose measurements of previews share them."""
    run, how = stages(model, score, optimizer, cfg), {name: stage.precision for name, stage, _ in cfg.stages()}
    functions = run._replace(draw=functools.partial(run.draw, prompts=cfg.prompts))._asdict()
    options = {name: device.compiler_options(how.get(name, "bf16")) for name in functions}
    options["learn"] = device.compiler_options("bf16", cfg.learn.deterministic)  # alone in having a backward pass
    return {name: jax.jit(f, compiler_options=options[name]) for name, f in functions.items()}


class Staged:
    """`iteration_step` run from the host: the same functions, one jit each, rollouts one block of prompts at a time.

    Between the calls the host can time each stage, show progress and stop.
    """

    def __init__(self, *, model: Model, score: Score, optimizer: optax.GradientTransformation, cfg: Config):
        self.cfg, self.score = cfg, score
        self.jit = dict(programs(model, score, optimizer, cfg))

    def __call__(
        self,
        state: TrainState,
        frozen: Frozen,
        prompts: Prompts,
        times: dict[str, float],
        between: Callable[[str, float], None] = lambda stage, share: None,
        rows: Sequence[Row] = (),
    ) -> tuple[TrainState, Metrics]:
        """One iteration. `times` receives seconds per stage; `between(stage, share done)` runs between host calls.

        `rows` are the prompts' rows, for rewards that run on the host. ValueError if these lack them.
        """
        if self.score.on_host and len(rows) != self.cfg.prompts:
            name = self.score.on_host[0].name
            raise ValueError(
                f"{len(rows)} rows of {self.cfg.prompts} prompts for reward {name} on the host: pass rows="
            )
        check_hyper(state.hyper, self.cfg)
        keys, chance = self.jit["draw"](state)
        with clock(times, "quantise"):
            kernels = self.jit["merged"](state, frozen)
            low = jax.block_until_ready(self.jit["quantised"](kernels, frozen))
        if self.cfg.explore is None:
            full = self._by_prompt("regenerate", (kernels, low, frozen), (prompts, keys), times, between, rows=rows)
            with clock(times, "select"):
                samples, metrics = jax.block_until_ready(self.jit["select_samples"](full, chance))
            del full  # frees the candidates that are not kept
        else:
            given = prompts, keys, None  # None, not left out, as watch.measured calls it: else jit compiles it twice
            preview, chosen = self._by_prompt("explore", (kernels, low, frozen), given, times, between, chance, rows)
            if self.cfg.regenerate.precision == "bf16":
                low = None  # the quantised kernels leave the device
            given = prompts, chosen.keys, chosen.state
            samples = self._by_prompt("regenerate", (kernels, low, frozen), given, times, between, rows=rows)
            metrics = self.jit["compare"](preview, chosen, samples)
            del preview, chosen, given
        del kernels, low
        with clock(times, "learn"):
            state, learnt = jax.block_until_ready(self.jit["learn"](state, frozen, prompts.cond, samples))
        between("learn", 1.0)
        return state, {**metrics, **learnt}

    def _by_prompt(
        self, name: str, rest, given: tuple, times, between, chance: Array | None = None, rows: Sequence[Row] = ()
    ) -> Any:
        """Run a stage block by block: in each call a device takes as many of its prompts as a chunk holds.

        `given` are the prompts, keys and states. With `chance` the kept are selected block by block, which counts as
        part of the stage; the other candidates' states are freed. On several devices the next block is already
        enqueued while one runs, so that a device that is done does not wait for the others; and with rewards that run
        on the host, so that the device draws the next pictures while the host scores these.
        """
        prompts, images = given[1].shape
        mesh = jax.sharding.get_mesh()
        mine = prompts // mesh.size
        stage = next(stage for n, stage, _ in self.cfg.stages() if n == name)
        together = block_shape(stage.chunk, mine, images)[0]

        def kept(found: Rollout, i: int) -> Any:
            return found if chance is None else self.jit["select_keys"](found, sharding.block(chance, i, together))

        def enqueued(i: int) -> Any:
            prompts, *start = sharding.block(given, i, together)
            found = self.jit[name](*rest, prompts, *start)
            return (found, prompts.tokens) if self.score.on_host else kept(found, i)

        def done(i: int, found: Any) -> Any:
            if self.score.on_host:
                found, tokens = found
                found = kept(with_host(jax.block_until_ready(found), self.score, tokens, rows), i)
            found = jax.block_until_ready(found)
            between(name, (i + together) / mine)
            return found

        ahead = AHEAD if mesh.size > 1 or self.score.on_host else 0
        waiting, parts = collections.deque[tuple[int, Any]](), []
        with clock(times, name):
            for i in range(0, mine, together):
                waiting.append((i, enqueued(i)))
                if len(waiting) > ahead:
                    parts.append(done(*waiting.popleft()))
            parts.extend(done(*block) for block in waiting)
        return sharding.joined(tuple(parts))


AHEAD = 1
"""Blocks that are enqueued while another one runs."""


def draw(state: TrainState, prompts: int, *, cfg: Config) -> tuple[Key[Array, "P N"], Float[Array, "P N"]]:
    """Keys of the coming iteration's candidates, and the random numbers of a selection by chance."""
    keys = sample_keys(state, prompts, cfg.candidates)
    return keys, jax.random.uniform(selection_key(state), keys.shape)


def keep(found: Rollout, chance: Float[Array, "P N"], *, cfg: Config) -> Rollout:
    """The kept samples of each prompt, best first."""
    index = select(mixture.worth(found, cfg), cfg.kept, cfg.selection, chance)
    return jax.tree.map(lambda x: take(x, index), found)


def select_keys(preview: Rollout, chance: Float[Array, "P N"], *, cfg: Config) -> tuple[Rollout, Rollout]:
    """(the preview without states and latents, its kept candidates with keys and states)."""
    return preview._replace(x0=None, state=None), keep(preview._replace(x0=None), chance, cfg=cfg)


def select_samples(full: Rollout, chance: Float[Array, "P N"], *, cfg: Config) -> tuple[Rollout, Metrics]:
    """The samples kept of one stage's candidates, and the reward metrics of both."""
    samples = keep(full, chance, cfg=cfg)
    return samples, reward_metrics(full, samples) | mixture.metrics(samples, cfg)


def compare(preview: Rollout, chosen: Rollout, samples: Rollout, *, cfg: Config) -> Metrics:
    """Does the preview rank as the full rollout does? Spearman within each prompt, over the kept samples; the mean over
    prompts whose samples are not all worth the same."""
    guess, truth = mixture.worth(chosen, cfg), mixture.worth(samples, cfg)
    agreement = mean_of_ranked(spearman(guess, truth), truth)
    return {**reward_metrics(preview, samples), **mixture.metrics(samples, cfg), "rank/spearman": agreement}


def reward_metrics(preview: Rollout, samples: Rollout) -> Metrics:
    """Reward metrics by the original's names, over the kept samples except for `explore/*`.

    Those of one reward are over the prompts that ask for it; asked/<k> is their share of all, if prompts name rewards.
    """
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
    mean, asked = mixture.mean_asked, samples.asked
    out |= {f"reward/{name}": mean(part, asked.get(name)) for name, part in samples.parts.items()}
    out |= {f"asked/{name}": jnp.mean(one[:, 0]) for name, one in asked.items()}
    out["explore/reward_mean"] = jnp.mean(preview.reward)
    out["explore/reward_std_mean"] = jnp.mean(jnp.std(preview.reward, axis=-1))
    return out | {f"explore/reward_{n}": mean(part, preview.asked.get(n)) for n, part in preview.parts.items()}


@contextlib.contextmanager
def clock(times: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds spent inside to times[name]."""
    began = time.perf_counter()
    yield
    times[name] = times.get(name, 0.0) + time.perf_counter() - began
