"""Seconds and memory of a run's stages, measured in one iteration, beside the plan's: a part of --mode=prove."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from solrl_jax import iteration, learn, plan, rollout, sharding
from solrl_jax.config import Config, ConfigError, Evaluate, Watch
from solrl_jax.plan import jaxpr, shapes
from solrl_jax.plan.cards import seconds
from solrl_jax.run import assemble
from solrl_jax.run.assemble import Parts

BEGIN = "begin"
"""The peak before the first stage."""


def one_prompt_each(cfg: Config, devices: int) -> Config:
    """`cfg` in one iteration of one prompt a device, without watch and evaluation.

    The chunks and the micro-batch are the largest that divide this, up to the config's own.
    """
    one, most = dataclasses.replace, max(1, cfg.learn.micro_batch)
    smaller = {name: one(stage, chunk=min(stage.chunk, images)) for name, stage, images in cfg.stages()}
    if cfg.branch is not None:
        smaller["regenerate"] = one(smaller["regenerate"], steps=cfg.regenerate.steps)
    smaller |= {"prompts": devices, "iterations": 1, "watch": Watch(every=0), "evaluate": Evaluate(every=0)}
    for size in range(most, 0, -1):
        for every in dict.fromkeys((cfg.learn.reference_every, 1)):
            how = one(cfg.learn, micro_batch=size, reference_every=every)
            try:
                made = one(cfg, learn=how, **smaller)
                learn.micro_batches(made, made.kept // made.learn.updates)
                return made
            except ConfigError:
                continue
    return one(cfg, **smaller)  # whose error names what is wrong


class Row(NamedTuple):
    """Of a stage: seconds, those of the first time with compiling, the plan's; bytes on the device with the most at
    its end since the process began, whether this stage took more than those before it, and the plan's bytes."""

    seconds: float
    first_seconds: float
    planned_seconds: float | None
    peak_bytes: int | None
    rose: bool | None
    planned_bytes: int | None


class Planned(NamedTuple):
    """The plan of each stage and of one decode of regenerate's chunk; `timed`: its seconds are of this device."""

    uses: dict[str, plan.Use]
    decode: float
    timed: bool


def planned(parts: Parts) -> Planned:
    """Not under the run's mesh: the plan is traced on one of its own."""
    cfg, card = dataclasses.replace(parts.cfg, shard=parts.mesh.shape[sharding.FSDP]), plan.device_card()
    sizes, of = shapes.read(cfg, parts.mesh.size), card or plan.CARDS["H100 80GB"]
    uses = {use.stage: use for use in plan.uses_of(cfg, sizes, parts.mesh.size, of)}
    noise = jax.eval_shape(lambda: rollout.noises(parts.model, jax.random.split(jax.random.key(0), _together(parts))))
    work = jaxpr.flops(jaxpr.trace(parts.model.decode, sizes.frozen.vae, noise))
    return Planned(uses, seconds(work, of), card is not None)


def _together(parts: Parts) -> int:
    return parts.cfg.regenerate.chunk


def measured(parts: Parts, plans: Planned) -> dict[str, Any]:
    """Encode and an iteration, twice: memory of the first time, seconds of the second. And one decode of a chunk.

    Call it under the mesh.
    """
    cfg, times, peaks = parts.cfg, ({}, {}), {BEGIN: peak()}
    texts, state = parts.prompts.train[: cfg.prompts], assemble.fresh(parts)
    staged = iteration.Staged(model=parts.model, score=parts.score, optimizer=parts.optimizer, cfg=cfg)
    plain, seen = dict(staged.jit), {name: _noting(f, name, peaks) for name, f in staged.jit.items()}
    for each, programs in zip(times, (seen, plain), strict=True):
        parts.text.kept.clear()  # else nothing is encoded
        with iteration.clock(each, "encode"):
            prompts = jax.block_until_ready(assemble.encode(parts, texts, parts.score))
        peaks.setdefault("encode", peak())
        staged.jit = programs
        staged(state, parts.frozen, prompts, each)
    return {
        "ran": True,
        "prompts": cfg.prompts,
        "candidates": cfg.candidates,
        "kept": cfg.kept,
        "of": {"micro_batch": cfg.learn.micro_batch, **{n: dataclasses.asdict(s) for n, s, _ in cfg.stages()}},
        "memory": "measured" if peaks[BEGIN] is not None else f"unknown: a {jax.devices()[0].platform} does not tell",
        "time": "planned" if plans.timed else "not planned: this device is not a card that the plan knows",
        "stages": {name: row._asdict() for name, row in rows(plans.uses, times, peaks, timed=plans.timed).items()},
        "decode": {**decode(parts), "planned_seconds": plans.decode if plans.timed else None},
    }


def rows(
    uses: Mapping[str, plan.Use],
    times: tuple[Mapping[str, float], Mapping[str, float]],
    peaks: Mapping[str, int | None],
    timed: bool,
) -> dict[str, Row]:
    """A row of each planned stage, in the order in which they ran; without the plan's seconds unless `timed`."""
    found, before = {}, peaks[BEGIN]
    for name, use in uses.items():
        most = peaks[name]
        rose = None if most is None or before is None else most > before
        planned = use.seconds if timed else None
        found[name] = Row(times[1][name], times[0][name], planned, most, rose, use.total)
        before = most
    return found


def peak() -> int | None:
    """The most bytes in use since the process began, of the device with the most; None if they do not tell."""
    found = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    return None if None in found else max(x for x in found if x is not None)


def _noting(program: Callable[..., Any], name: str, peaks: dict[str, int | None]) -> Callable[..., Any]:
    """`program`, after which the peak is noted under its stage."""

    def run(*args: Any) -> Any:
        found = jax.block_until_ready(program(*args))
        peaks["quantise" if name in ("merged", "quantised") else name] = peak()
        return found

    return run


def decode(parts: Parts) -> dict[str, Any]:
    """Seconds of one decode of regenerate's chunk of pictures, on each device the same."""
    count, vae = _together(parts), parts.frozen.vae
    keys = jax.random.split(jax.random.key(parts.cfg.seed), count)
    x0, run = sharding.replicate(rollout.noises(parts.model, keys), parts.mesh), jax.jit(parts.model.decode)
    jax.block_until_ready(run(vae, x0))
    times: dict[str, float] = {}
    with iteration.clock(times, "seconds"):
        jax.block_until_ready(run(vae, x0))
    return {"pictures": count, **times}
