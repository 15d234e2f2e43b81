"""--mode=plan: memory and time of a run before it starts, from shapes alone, in seconds; no weights, no accelerator.

The stages are traced as they run (`iteration.Stages`, the encoders), with one device's share of the prompts, so a
change of the code changes the plan. Memory is everything on a device while a stage runs. Weights, LoRA sets and
moments, merged and quantised kernels are counted from their shapes; of frozen weights sharded over K devices, one's
part. Activations, with the stage's results and a backward pass's residuals, are `jaxpr.peak` of its program. The
watch's measurement and the evaluation are stages too, once in many iterations. Not counted: workspaces of libraries,
copies, padding and reordering by XLA, fragmentation, and the runtime's own few hundred MB. Seconds are FLOPs at a
stated share of the card's peak, without the gathering of weights, whose seconds are given for each kind of link. Nor
is the result of a second block of pictures, which the loop holds on several devices and with rewards on the host.

Activations of FLUX.1-dev in GB, planned here and allocated by XLA when it compiles for an H100 (jax 0.10.2,
micro-batches of 12 points at 512 px): learn 9.4 and 6.5 if remat keeps nothing, 33.7 and 30.8 if it keeps attention and
the MLP, 47.7 and 45.7 with q, k and v too (so SD3.5 Large 48.4 and 45.8, SANA 31.9 and 29.7, Z-Image 56.3 and 54.5,
FLUX.2-klein 70.5 and 68.7). Measured on an H100 with random weights, an iteration of sol_rl of one prompt with the
reference on every micro-batch and exact float32 rewards (planned in brackets): FLUX 58.5 GB and 29.3 s (59.8 and 26.8),
SD3.5 Large 52.0 GB and 87 s (53.7 and 66), SANA 28.8 GB and 15 s (28.9 and 8.6). On an H200, with the reference on one
micro-batch of four: Z-Image 59.0 GB and 46.1 s (60.1 and 42.7), FLUX.2-klein 35.1 s (32.7).
The smaller the share of large products, the more a stage's time exceeds its FLOPs.
"""

import dataclasses
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from solrl_jax import device, sharding
from solrl_jax.config import AUTO, Config, ConfigError, override
from solrl_jax.plan import jaxpr
from solrl_jax.plan.cards import (
    CARDS,
    CAUTION,
    EMULATED,
    FRACTION,
    LINKS,
    SLACK,
    Card,
    Link,
    card_of,
    card_with,
    device_card,
    memory_limit,
    room,
    transfer,
)
from solrl_jax.plan.jaxpr import nbytes
from solrl_jax.plan.shapes import Sizes, batch, blank, parameters, read, with_configs
from solrl_jax.plan.stages import Use, kernels, planned_shard, stages_of, use_of, uses_of
from solrl_jax.quant import coverage
from solrl_jax.run import assemble
from solrl_jax.structs import Model

__all__ = [
    "CARDS",
    "DRAWING",
    "LINKS",
    "Card",
    "Plan",
    "Use",
    "advise",
    "card_of",
    "device_card",
    "fitted",
    "memory_limit",
    "per_image_flops",
    "plan",
    "remedied",
    "remedies",
    "report",
    "room",
    "run_plan",
    "settled",
    "spent",
    "use_of",
    "uses_of",
    "waiting",
]


class Plan(NamedTuple):
    cfg: Config
    devices: int
    card: str
    sizes: Sizes
    uses: tuple[Use, ...]
    advice: tuple[str, ...]  # for the stages that do not fit
    why: str = ""  # why frozen weights are sharded, if the plan chose so
    kept: str = ""  # what the backward pass keeps, if the plan chose it


def plan(cfg: Config, devices: int = 1, card: str = "H100 80GB") -> Plan:
    """The plan of a config whose model folder has at least the config files. Raises ConfigError or WeightsError."""
    found = card_of(card)
    cfg = assemble.resolved(cfg, found.capability)
    sizes = read(cfg, devices)
    choice = chosen(cfg, sizes, devices, found)
    sizes = _like(sizes, choice.cfg, cfg)
    advice = (advise(use, choice.cfg, sizes, devices, found) for use in choice.uses if use.total > room(found))
    return Plan(choice.cfg, devices, card, sizes, choice.uses, tuple(advice), choice.why, choice.kept)


# --- what is chosen by memory: over how many devices frozen weights are sharded, what the backward pass keeps ---------


DRAWING = ("encode", "evaluate")
"""The stages of --mode=eval and --mode=sample."""


class Choice(NamedTuple):
    """`cfg` with `shard` and `model.remat_keeps` chosen, its stages, and a line for the log on each choice that needs
    one."""

    cfg: Config
    uses: tuple[Use, ...]
    why: str = ""
    kept: str = ""


def settled(
    cfg: Config, devices: int, most: float | int | None, *, host: int = 0, stages: Sequence[str] = ()
) -> tuple[Config, list[str]]:
    """(`cfg` with what its "auto" comes to on devices of `most` bytes each, lines for the log).

    config.shard of 0 is the least K with which every stage fits, at most the `host`'s devices (0: all). Then
    model.remat_keeps of "auto" is the most with which learning fits. Without a limit (None, on a CPU) K is 1, and
    nothing is kept.

    Nothing is read but configs. ConfigError, with the plan's numbers and what to change, if `cfg` fits with no such K,
    or if config.shard does not divide. The plan's activations may be a share of SLACK too low, for which a choice has
    room if there is another; or of CAUTION too high, by which a stage may exceed `most` with the last. `stages`:
    DRAWING, or those of a training.
    """
    if most is None:
        asked = cfg.model.remat_keeps == AUTO and cfg.model.remat and not stages and device.platform() != "cpu"
        untold = "model.remat_keeps=auto: this device does not tell its memory, so nothing is kept"
        return dataclasses.replace(cfg, shard=planned_shard(cfg)), [untold] if asked else []
    sizes = read(cfg, devices, training=not stages)
    found = fitted(cfg, sizes, devices, card_with(most), host=host, stages=stages)
    return found.cfg, [line for line in (found.why, found.kept) if line]


def fitted(cfg: Config, sizes: Sizes, devices: int, card: Card, *, host: int = 0, stages: Sequence[str] = ()) -> Choice:
    """`chosen`; ConfigError, as `settled` says, if a stage does not fit even so."""
    found = chosen(cfg, sizes, devices, card, host=host, stages=stages)
    sizes = _like(sizes, found.cfg, cfg)
    for use in found.uses:
        if use.total - CAUTION * use.activations > room(card):
            raise ConfigError(f"this GPU is too small: {advise(use, found.cfg, sizes, devices, card)}; see --mode=plan")
    return found


def chosen(cfg: Config, sizes: Sizes, devices: int, card: Card, *, host: int = 0, stages: Sequence[str] = ()) -> Choice:
    """What `settled` says; the largest K if nothing fits."""
    among = devices if cfg.shard else math.gcd(devices, host or devices)
    fit = fitting(cfg, sizes, among, quantised=not stages)
    if cfg.shard and cfg.shard not in fit:
        raise ConfigError(
            f"shard={cfg.shard} does not divide {devices} devices and the weights: use one of {fit}, or other --devices"
        )
    choices, why = [cfg.shard] if cfg.shard else fit, ""
    for k in choices:
        one, uses = dataclasses.replace(cfg, shard=k), []
        for stage in stages or stages_of(cfg):
            uses.append(use := use_of(stage, one, sizes, devices, card))
            if use.total + SLACK * use.activations > room(card) and k < choices[-1]:
                why = why or f"with whole weights {stage} would take about {_gb(use.total)} of {_gb(room(card))} GB"
                break
        else:
            said = f"shard={k}: frozen weights are sharded over {k} devices and gathered where they are used; {why}"
            return with_keeps(Choice(one, tuple(uses), said if why else ""), sizes, devices, card)
    raise AssertionError("the last choice is never left")


KEEPS = (("attention", "qkv", "mlp"), ("attention", "mlp"), ("attention",), ())
"""What "auto" may come to, the most first: each makes FLUX's learning faster than the next (experiments/flux_h100)."""


def with_keeps(choice: Choice, sizes: Sizes, devices: int, card: Card) -> Choice:
    """`choice` with the first of KEEPS with which learning fits, where model.remat_keeps is auto."""
    cfg, uses = choice.cfg, {use.stage: use for use in choice.uses}
    if cfg.model.remat_keeps != AUTO or not cfg.model.remat or "learn" not in uses:  # without remat all is kept
        return choice
    for keeps in KEEPS:  # with nothing it is planned already
        one = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat_keeps=keeps))
        use = use_of("learn", one, _like(sizes, one, cfg), devices, card) if keeps else uses["learn"]
        if use.total + SLACK * use.activations <= room(card):
            break
    uses["learn"] = use
    taken = f"learn takes about {_gb(use.total)} of {_gb(room(card))} GB"
    named = ",".join(keeps) or " (nothing)"
    kept = f"model.remat_keeps={named}, which auto comes to: {taken}"
    return choice._replace(cfg=one, uses=tuple(uses.values()), kept=kept)


def fitting(cfg: Config, sizes: Sizes, devices: int, quantised: bool = True) -> list[int]:
    """Every K that divides the devices and the axes along which base, text encoders and quantised kernels are cut."""
    low = kernels(cfg, sizes)[1] if quantised else None
    return sharding.shards_that_fit(sharding.cuts((sizes.frozen.base, sizes.text, low)).values(), devices)


def spent(uses: Sequence[Use]) -> float:
    """Seconds of an iteration, with its share of the stages that run once in many iterations."""
    return sum(use.seconds / use.every for use in uses)


def waiting(uses: Sequence[Use], link: Link) -> float:
    """Seconds of an iteration in which devices wait for each other's weights, if no gather runs beside a product."""
    return sum(transfer(use.received, link) / use.every for use in uses)


# --- advice ---------------------------------------------------------------------------------------------------------


def advise(use: Use, cfg: Config, sizes: Sizes, devices: int, card: Card) -> str:
    """What to change so that a stage fits that does not; if nothing makes it fit, other ways to save memory."""
    need = f"{use.stage} does not fit: {_gb(use.total)} of {_gb(room(card))} GB; "
    changes, use = remedied(use, cfg, sizes, devices, card)
    if use.total <= room(card):
        return f"{need}it fits ({_gb(use.total)} GB) with {' '.join(f'--config.{k}={v}' for k, v in changes.items())}"
    towers = {name: nbytes(x) for name, x in {**sizes.frozen.rewards, **sizes.towers}.items() if nbytes(x)}
    less = "".join(f", reward (without {name}: -{_gb(size)} GB)" for name, size in towers.items())
    enough = use.total - use.adapters - sum(towers.values()) <= room(card)
    larger = f"a larger card, or lower lora.rank={cfg.lora.rank}{less}" if enough else "or a larger card"
    even = "".join(f" with --config.{k}={v}" for k, v in changes.items() if k == "encode_ahead")
    most = fitting(cfg, sizes, devices)[-1]
    shared = f"--config.shard={most}, " if 0 < cfg.shard < most else "more cards (--devices), "
    return f"{need}without activations it takes {_gb(use.total - use.activations)} GB{even}. Use {shared}{larger}"


def remedied(use: Use, cfg: Config, sizes: Sizes, devices: int, card: Card) -> tuple[dict[str, str], Use]:
    """(the first of `remedies`, applied one after another, with which the stage fits, or all that could help; the stage
    with them)."""
    changes: dict[str, str] = {}
    for field, value in remedies(use.stage, cfg):
        if use.total <= room(card):
            break
        if field.endswith(("chunk", "micro_batch")) and use.total - use.activations > room(card):
            break  # fewer samples at a time cannot help
        try:
            other = override(cfg, **{**changes, field: value})
            use = use_of(use.stage, other, _like(sizes, other, cfg), devices, card)
        except ConfigError:  # this size does not divide
            continue
        changes[field] = value
    return changes, use


def remedies(stage: str, cfg: Config) -> Iterator[tuple[str, str]]:
    """(config field, value) pairs that lower a stage's memory; those that cost least time come first."""
    if not cfg.encode_ahead and stage != "encode":
        yield "encode_ahead", "20"
    if stage == "learn" and not cfg.model.remat:
        yield "model.remat", "true"
    if stage == "learn" and cfg.model.remat_keeps:
        yield "model.remat_keeps", ""
    sizes = {f"{name}.chunk": rollout.chunk for name, rollout, _ in cfg.stages()}
    if stage != "watch":  # which runs both rollouts
        sizes |= {"learn.micro_batch": cfg.learn.micro_batch, "evaluate.chunk": cfg.evaluate.chunk}
        sizes = {field: now for field, now in sizes.items() if field.startswith(f"{stage}.")}
    for size in range(max(sizes.values(), default=1) - 1, 0, -1):
        yield from ((field, str(size)) for field, now in sizes.items() if size < now and now % size == 0)


def _like(sizes: Sizes, new: Config, cfg: Config) -> Sizes:
    """`sizes` for the config `new`, which differs from `cfg` in chunks or remat only."""
    return sizes if new.model == cfg.model else sizes._replace(model=assemble.model_module(new).make(new.model))


# --- report ---------------------------------------------------------------------------------------------------------


NO_PLUGIN = (
    f"activations: there is no CUDA plugin here ({' or '.join(jaxpr.CUDA)}), so they are those of unfused attention "
    "and of f32 products: more than on a GPU"
)
GATHERING = (
    "gathering: "
    + ", ".join(f"{name} at {link.share:.0%} of {link.rate} GB/s" for name, link in LINKS.items())
    + " each way, assumed; added in full, the worst case: XLA runs a part of it beside the products"
)
HEADER = f"{'GB a device':<12}{'weights':>9}{'LoRA':>7}{'merged':>8}{'quantised':>11}{'activations':>13}{'total':>8}"


def report(p: Plan) -> list[str]:
    """The plan as lines: the run's parts, a table of the stages, the assumptions, what to change."""
    model, frozen, card, each = p.sizes.model, p.sizes.frozen, CARDS[p.card], spent(p.uses)
    held = {
        "transformer": frozen.base,
        "LoRA": blank(p.cfg, p.sizes).lora,
        "VAE decoder": frozen.vae,
        "text encoders": p.sizes.text,
    }
    held |= {f"reward {name}": x for name, x in {**frozen.rewards, **p.sizes.towers}.items() if parameters(x)}
    rare = [u for u in p.uses if u.stage in ("watch", "evaluate")]
    per_image = [f"{name} {flops.total() / 1e12:.4g}" for name, flops in per_image_flops(p.sizes).items()]
    return [
        f"{p.cfg.name or 'run'} at {p.cfg.model.size} px on {p.devices} x {p.card}: {_gb(room(card))} GB usable of "
        f"{_gb(card.memory * 2**30)}, {card.peak:g} TFLOP/s in bf16",
        *(f"  {name}: {parameters(x):,} parameters, {_gb(nbytes(x))} GB" for name, x in held.items()),
        f"  TFLOP an image: {', '.join(per_image)}",
        *(f"  {line}" for line in _covered(model, p.cfg.low_precision)),
        "",
        f"{HEADER}{'':12}{'TFLOP':>11}{'seconds':>10}",
        *(_row(use, room(card)) for use in p.uses),
        f"an iteration: {_short(each)} s, {p.cfg.iterations} of them {_short(p.cfg.iterations * each / 3600)} h",
        *(f"{u.stage}: at the start and every {u.every} iterations; an iteration's time has its share" for u in rare),
        *((p.kept,) if p.kept else ()),
        *_network(p),
        "",
        f"seconds: at {FRACTION:.0%} of the bf16 peak, float32 at 1/16, TF32 at half of it; emulated NVFP4 is not "
        f"faster: bf16's time / {EMULATED}; measured: 1.1 (flux, flux2, zimage), 1.3 (sd35), 1.7 times as long (sana)",
        *((GATHERING,) if planned_shard(p.cfg) > 1 else ()),
        "activations: an estimate from the traced program; no library workspaces",
        *(() if jaxpr.as_on_gpus() else (NO_PLUGIN,)),
        *p.sizes.notes,
        *(p.advice or (f"fits {p.card}",)),
    ]


def _network(p: Plan) -> list[str]:
    """Over how many devices frozen weights are sharded, and what gathering them adds to an iteration, a line a link."""
    if planned_shard(p.cfg) == 1:
        return []
    each = spent(p.uses)

    def line(name: str, link: Link) -> str:
        more = waiting(p.uses, link)
        most = [use for use in p.uses if transfer(use.received, link) / use.every > 0.01 * more]
        stages = ", ".join(f"{use.stage} {_more(transfer(use.received, link), use.seconds)}" for use in most)
        return f"gathering over {name}: an iteration {_more(more, each)}: {stages}"

    first = p.why or f"shard={p.cfg.shard}: frozen weights are sharded over {p.cfg.shard} devices"
    return [first, *(line(name, link) for name, link in LINKS.items())]


def _short(x: float) -> str:
    """Three digits, and all that are before the point: 0.00309, 18.5, 1,640."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _more(extra: float, seconds: float) -> str:
    return f"+{extra:,.{0 if extra >= 10 else 1 if extra >= 1 else 2}f} s ({extra / max(seconds, 1e-9):.0%})"


def _covered(model: Model, precision: str | None) -> list[str]:
    return coverage.report(coverage.uses(model, precision), precision)[:1] if precision else []


def _row(use: Use, most: float | int) -> str:
    fit = "fits" if use.total <= most else f"{_gb(use.total - most)} over"
    held = (use.weights, use.adapters, use.merged, use.quantised, use.activations)
    sizes = "".join(f"{_gb(x) if x else '-':>{width}}" for x, width in zip(held, (9, 7, 8, 11, 13), strict=True))
    work = f"{_short(use.flops.total() / 1e12):>11}{_short(use.seconds):>10}"
    return f"{use.stage:<12}{sizes}{_gb(use.total):>8}  {fit:<10}{work}"


def per_image_flops(sizes: Sizes) -> dict[str, Counter[str]]:
    """FLOPs for one image: one forward pass of the transformer, and one decode."""
    noise = jax.eval_shape(lambda: sizes.model.noise(jax.random.key(0)))
    x, sigma = jax.ShapeDtypeStruct((1, *noise.shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    forward = {"params": sizes.frozen.base}, x, sigma, batch(sizes.prompts.cond, 1)
    return {
        "forward": jaxpr.flops(jaxpr.trace(sizes.model.velocity, *forward)),
        "decode": jaxpr.flops(jaxpr.trace(sizes.model.decode, sizes.frozen.vae, x)),
    }


def run_plan(cfg: Config, *, devices: int | None = None, card: str = "H100 80GB") -> int:
    """Print the plan of a run on `devices` devices (default 1).

    A model of PUBLIC has its public sizes; without a model in the config, it is the first of them. Returns 1 if a stage
    does not fit.
    """
    card_of(card)  # a wrong name fails at once
    with tempfile.TemporaryDirectory() as folder:
        sized = with_configs(cfg, folder)
        if sized is not cfg:
            print(f"{cfg.model.path or 'the public model'} with its public sizes")
        found = plan(sized, devices or 1, card)
        print("\n".join(report(found)))
    return 1 if found.advice else 0


def _gb(size: float | int) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2g}"
