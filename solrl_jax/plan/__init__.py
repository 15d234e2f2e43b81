"""--mode=plan: memory and time of a run before it starts, from shapes alone, in seconds; no weights, no accelerator.

The stages are traced as they run (`iteration.Stages`, the encoders), with one device's share of the prompts, so a
change of the code changes the plan. Memory is everything on a device while a stage runs. Weights, LoRA sets and
moments, merged and quantised kernels are counted from their shapes. Activations, with the stage's results and a
backward pass's residuals, are `jaxpr.peak` of its program. The watch's measurement and the evaluation are stages too,
once in many iterations. Not counted: workspaces of libraries, copies, padding and reordering by XLA, fragmentation, and
the runtime's own few hundred MB. Seconds are FLOPs at a stated share of the card's peak.

Activations of FLUX.1-dev in GB, planned here and allocated by XLA when it compiles for an H100 (jax 0.10.2,
micro-batches of 12 points at 512 px): learn 9.4 and 6.5 if remat keeps nothing, 33.7 and 30.8 if it keeps attention and
the MLP. Measured on an H100 with random weights, an iteration of sol_rl of one prompt with the reference on every
micro-batch and exact float32 rewards (planned in brackets): FLUX 58.5 GB and 29.3 s (59.8 and 26.8), SD3.5 Large 52.0
GB and 87 s (53.7 and 66), SANA 28.8 GB and 15 s (28.9 and 8.6).
The smaller the share of large products, the more a stage's time exceeds its FLOPs.
"""

import functools
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from solrl_jax import iteration, learn, lora
from solrl_jax.config import Config, ConfigError, Stage, override
from solrl_jax.plan import jaxpr
from solrl_jax.plan.jaxpr import nbytes
from solrl_jax.plan.shapes import Sizes, batch, blank, keys, parameters, read, samples, states, with_configs
from solrl_jax.quant import coverage
from solrl_jax.rollout import block_shape, branched, rolled
from solrl_jax.run import assemble, evaluate, guards
from solrl_jax.structs import Frozen, Model, Params, Prompts, TrainState


class Card(NamedTuple):
    """Memory in GiB, peak in TFLOP/s (dense bf16), compute capability."""

    memory: float | int
    peak: float | int
    capability: float


CARDS = {
    "H100 80GB": Card(80, 989, 9.0),
    "H200 141GB": Card(141, 989, 9.0),
    "A100 80GB": Card(80, 312, 8.0),
    "RTX 4090 24GB": Card(24, 165, 8.9),
    "B200 180GB": Card(180, 2250, 10.0),
}
CAUTION = 0.3  # share of the planned activations by which they may be too high
USABLE = 0.92  # share of a card's memory that JAX reserves (XLA_PYTHON_CLIENT_MEM_FRACTION)
FRACTION = 0.6  # assumed share of its peak that a card reaches
EMULATED = 0.8  # factor on that for NVFP4 emulated in bf16
RATES = {
    "float32": 0.5,
    "float32 highest": 1 / 16,
    "float8_e4m3fn": 2.0,
    "float4_e2m1fn": 4.0,
}  # peaks relative to bf16's; f32 without HIGHEST runs as TF32


class Use(NamedTuple):
    """One stage, run in every `every`-th iteration: bytes on each device, FLOPs of all devices by operand dtype, and
    expected seconds."""

    stage: str
    weights: int
    adapters: int
    merged: int
    quantised: int
    activations: int
    flops: Counter[str]
    seconds: float
    every: int = 1

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.merged + self.quantised + self.activations


class Plan(NamedTuple):
    cfg: Config
    devices: int
    card: str
    sizes: Sizes
    uses: tuple[Use, ...]
    advice: tuple[str, ...]  # for the stages that do not fit


def card_of(name: str) -> Card:
    """ConfigError for an unknown card."""
    if name not in CARDS:
        raise ConfigError(f"--card={name}: use one of {', '.join(CARDS)}")
    return CARDS[name]


def room(card: Card) -> float:
    """Bytes of a card that a run can use."""
    return USABLE * card.memory * 2**30


def plan(cfg: Config, devices: int = 1, card: str = "H100 80GB") -> Plan:
    """The plan of a config whose model folder has at least the config files. Raises ConfigError or WeightsError."""
    found = card_of(card)
    most, cfg = room(found), assemble.resolved(cfg, found.capability)
    sizes = read(cfg, devices)
    uses = uses_of(cfg, sizes, devices, found)
    advice = (advise(use, cfg, sizes, devices, found) for use in uses if use.total > most)
    return Plan(cfg, devices, card, sizes, uses, tuple(advice))


# --- stages ---------------------------------------------------------------------------------------------------------


def uses_of(cfg: Config, sizes: Sizes, devices: int, card: Card) -> tuple[Use, ...]:
    """The `Use` of every stage in order; then of those that run at the start and once in many iterations."""
    stages = ["encode", "quantise", *(name for name, _, _ in cfg.stages()), "learn"]
    stages += ["watch"] * guards.due(cfg, 0) + ["evaluate"] * bool(cfg.evaluate.every)
    return tuple(use_of(stage, cfg, sizes, devices, card) for stage in stages)


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
    model, frozen, mine = sizes.model, sizes.frozen, cfg.prompts // devices
    run, state = iteration.stages(model, sizes.score, learn.make_optimizer(cfg), cfg), blank(cfg, sizes)
    for name, how, images in cfg.stages():
        if name == stage:
            go_on = states(cfg, sizes, mine, cfg.kept)
            # Samples stay in memory until `learn` has used them, and GRPO's include their paths.
            held = go_on, samples(cfg, sizes, mine, images) if stage == "regenerate" else None
            branch = "preview" if stage == "explore" else "rest"
            return _rollout(stage, how, mine, images, cfg, sizes, devices, branch)._replace(held=held)
    if stage == "encode":
        return Work(stage, cfg, sizes, devices, jaxpr.trace(model.encode, sizes.text, sizes.tokens))
    if stage == "learn":
        held = samples(cfg, sizes, mine, cfg.kept)
        program = jaxpr.trace(run.learn, state, frozen, sizes.prompts.cond, held)
        return Work(stage, cfg, sizes, devices, program, held=held)
    if stage == "evaluate":
        return _evaluation(cfg, sizes, devices)
    program = jaxpr.trace(lambda state, frozen: run.quantised(run.merged(state, frozen), frozen), state, frozen)
    kernels, low = _kernels(run, state, frozen)
    return Work(stage, cfg, sizes, devices, program, kernels=kernels, low=low)


def _kernels(run: iteration.Stages, state: TrainState, frozen: Frozen) -> tuple[Any, Any]:
    """The merged and the quantised kernels, in shapes."""
    kernels = jax.eval_shape(run.merged, state, frozen)
    return kernels, jax.eval_shape(run.quantised, kernels, frozen)


def _rollout(
    stage: str, how: Stage, mine: int, images: int, cfg: Config, sizes: Sizes, devices: int, part: str = ""
) -> Work:
    """`images` images for each of a device's `mine` prompts, one block of prompts per call; the `part` of a branch that
    it is, if there is one: its preview, or the rest from the preview's states."""
    run = iteration.stages(sizes.model, sizes.score, learn.make_optimizer(cfg), cfg)
    kernels, low = _kernels(run, blank(cfg, sizes), sizes.frozen)
    if stage != "explore" and how.precision == "bf16":
        low = None
    together = block_shape(how.chunk, mine, images)[0]
    keep_path = stage == "regenerate" and cfg.of_steps
    branch = branched(sizes.model, cfg) if part else None
    statics = {"model": sizes.model, "score": sizes.score, "stage": how, "branch": branch, "keep_path": keep_path}
    given = batch(sizes.prompts, together), keys(together, images)
    begin = states(cfg, sizes, together, images) if part == "rest" else None
    program = jaxpr.trace(functools.partial(rolled, **statics), kernels, low, sizes.frozen, *given, begin)
    return Work(stage, cfg, sizes, devices, program, mine // together, 1, how.precision, kernels, low)


def _measured(cfg: Config, sizes: Sizes, devices: int, card: Card) -> Use:
    """A measurement's preview and full rollouts, one prompt per call: the larger memory, the work of all."""
    prompts, (preview, full) = -(-cfg.watch.prompts // devices), guards.rollouts(cfg)
    rolls = [("explore", preview, "preview"), ("watch", full, "")] + [("watch", full, "rest")] * (
        cfg.branch is not None
    )
    held, uses = states(cfg, sizes, prompts, cfg.candidates), []
    for name, how, part in rolls:
        one = _rollout(name, how, 1, cfg.candidates, cfg, sizes, devices, part)
        uses.append(_use(one._replace(calls=prompts, every=cfg.watch.every, held=held), card))
    largest = max(uses, key=lambda use: use.total)
    flops = sum((use.flops for use in uses), Counter())
    return largest._replace(stage="watch", flops=flops, seconds=sum(use.seconds for use in uses))


def _evaluation(cfg: Config, sizes: Sizes, devices: int) -> Work:
    """All of a device's fixed prompts in one call, including the rewards that are not trained on."""
    mine = evaluate.prompts_each(cfg.evaluate, cfg.evaluate.prompts, devices)
    frozen = sizes.frozen._replace(rewards={**sizes.frozen.rewards, **sizes.towers})

    def drawn(adapter: Params, frozen: Frozen, prompts: Prompts, keys: Any) -> Any:
        statics = {"model": sizes.model, "score": sizes.judged, "stage": evaluate.rollout_of(cfg.evaluate)}
        return evaluate.draw(lora.policy(frozen.base, adapter, cfg.lora), frozen, prompts, keys, **statics)

    prompts = batch(Prompts(sizes.prompts.cond, sizes.captions), mine)
    program = jaxpr.trace(drawn, blank(cfg, sizes).ema, frozen, prompts, keys(mine, cfg.evaluate.images))
    return Work("evaluate", cfg, sizes, devices, program, every=cfg.evaluate.every)


def _use(work: Work, card: Card) -> Use:
    stage, cfg, sizes, devices = work.stage, work.cfg, work.sizes, work.devices
    flops = Counter({dtype: n * work.calls * devices for dtype, n in jaxpr.flops(work.program).items()})
    text = nbytes(sizes.text) if stage == "encode" or not cfg.encode_ahead else 0
    made = nbytes(work.low) if stage == "quantise" else 0  # its result is not an activation
    return Use(
        stage=stage,
        weights=nbytes((sizes.frozen, sizes.towers)) + text,
        adapters=nbytes(blank(cfg, sizes)),
        merged=nbytes(work.kernels),
        quantised=nbytes(work.low),
        activations=jaxpr.peak(work.program) + nbytes(work.held) - made,
        flops=flops,
        seconds=seconds(flops, card, devices) / (EMULATED if work.precision.endswith("_emulated") else 1),
        every=work.every,
    )


def spent(uses: Sequence[Use]) -> float:
    """Seconds of an iteration, with its share of the stages that run once in many iterations."""
    return sum(use.seconds / use.every for use in uses)


def seconds(flops: Counter[str], card: Card, devices: int = 1) -> float:
    """Time of these FLOPs at FRACTION of the peak of `devices` cards."""
    return sum(n / RATES.get(dtype, 1.0) for dtype, n in flops.items()) / (FRACTION * card.peak * 1e12 * devices)


def device_card() -> Card | None:
    """The first device as a card, with the memory that JAX can reserve on it and the peak of the card of that name.

    None on a CPU, and for a GPU that is not in CARDS.
    """
    device = jax.local_devices()[0]
    known = [card for name, card in CARDS.items() if name.rpartition(" ")[0] in device.device_kind]
    most = (device.memory_stats() or {}).get("bytes_limit")
    return known[0]._replace(memory=most / USABLE / 2**30) if known and most else None


def check_fits(cfg: Config, devices: int, most: float) -> None:
    """ConfigError, with the plan's numbers and what to change, if a stage cannot fit into `most` bytes per device.

    The plan can overestimate activations by a share of CAUTION, so a stage may exceed `most` by that.
    """
    sizes, card = read(cfg, devices), Card(most / USABLE / 2**30, 1, 0.0)
    for use in uses_of(cfg, sizes, devices, card):
        if use.total - CAUTION * use.activations > most:
            raise ConfigError(f"this GPU is too small: {advise(use, cfg, sizes, devices, card)}; see --mode=plan")


# --- advice ---------------------------------------------------------------------------------------------------------


def advise(use: Use, cfg: Config, sizes: Sizes, devices: int, card: Card) -> str:
    """The first of `remedies`, applied one after another, with which the stage fits; else other ways to save memory."""
    changes: dict[str, str] = {}
    need = f"{use.stage} does not fit: {_gb(use.total)} of {_gb(room(card))} GB; "
    for field, value in remedies(use.stage, cfg):
        if field.endswith(("chunk", "micro_batch")) and use.total - use.activations > room(card):
            break  # fewer samples at a time cannot help
        try:
            other = override(cfg, **{**changes, field: value})
            use = use_of(use.stage, other, _like(sizes, other, cfg), devices, card)
        except ConfigError:  # this size does not divide
            continue
        changes[field] = value
        if use.total <= room(card):
            return (
                f"{need}it fits ({_gb(use.total)} GB) with {' '.join(f'--config.{k}={v}' for k, v in changes.items())}"
            )
    towers = {**sizes.frozen.rewards, **sizes.towers}
    less = "".join(f", reward (without {name}: -{_gb(nbytes(x))} GB)" for name, x in towers.items() if nbytes(x))
    even = "".join(f" with --config.{k}={v}" for k, v in changes.items() if k == "encode_ahead")
    return (
        f"{need}without activations it takes {_gb(use.total - use.activations)} GB{even}. Use a larger card, or lower "
        f"lora.rank={cfg.lora.rank}{less}"
    )


def remedies(stage: str, cfg: Config) -> Iterator[tuple[str, str]]:
    """(config field, value) pairs that lower a stage's memory; those that cost least time come first."""
    if not cfg.encode_ahead and stage != "encode":
        yield "encode_ahead", "20"
    if stage == "learn" and not cfg.model.remat:
        yield "model.remat", "true"
    if stage == "learn" and cfg.model.remat_keeps:
        yield "model.remat_keeps", ""
    chunks = {name: rollout.chunk for name, rollout, _ in cfg.stages()}
    chunks |= {"learn": cfg.learn.micro_batch, "watch": cfg.regenerate.chunk, "evaluate": cfg.evaluate.chunk}
    field = {"learn": "learn.micro_batch", "watch": "regenerate.chunk"}.get(stage, f"{stage}.chunk")
    for size in range(chunks.get(stage, 1) - 1, 0, -1):
        if chunks[stage] % size == 0:
            yield field, str(size)


def _like(sizes: Sizes, new: Config, cfg: Config) -> Sizes:
    """`sizes` for the config `new`, which differs from `cfg` in chunks or remat only."""
    return sizes if new.model == cfg.model else sizes._replace(model=assemble.model_module(new).make(new.model))


# --- report ---------------------------------------------------------------------------------------------------------


NO_PLUGIN = (
    f"activations: there is no CUDA plugin here ({' or '.join(jaxpr.CUDA)}), so they are those of unfused attention "
    "and of f32 products: more than on a GPU"
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
        f"an iteration: {each:,.3g} s, {p.cfg.iterations} of them {p.cfg.iterations * each / 3600:,.3g} h",
        *(f"{u.stage}: at the start and every {u.every} iterations; an iteration's time has its share" for u in rare),
        "",
        f"seconds: at {FRACTION:.0%} of the bf16 peak, float32 at 1/16, TF32 at half of it; emulated NVFP4 is not "
        f"faster: bf16's time / {EMULATED}; an H100 took 1.1 (flux), 1.3 (sd35), 1.7 times as long (sana)",
        "activations: an estimate from the traced program; no library workspaces",
        *(() if jaxpr.as_on_gpus() else (NO_PLUGIN,)),
        *p.sizes.notes,
        *(p.advice or (f"fits {p.card}",)),
    ]


def _covered(model: Model, precision: str | None) -> list[str]:
    return coverage.report(coverage.uses(model, precision), precision)[:1] if precision else []


def _row(use: Use, most: float | int) -> str:
    fit = "fits" if use.total <= most else f"{_gb(use.total - most)} over"
    held = (use.weights, use.adapters, use.merged, use.quantised, use.activations)
    sizes = "".join(f"{_gb(x) if x else '-':>{width}}" for x, width in zip(held, (9, 7, 8, 11, 13), strict=True))
    work = f"{use.flops.total() / 1e12:>11,.4g}{use.seconds:>10,.3g}"
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

    A model of PUBLIC has its public sizes; without a model in the config, it is the first of them.
    """
    card_of(card)  # a wrong name fails at once
    with tempfile.TemporaryDirectory() as folder:
        sized = with_configs(cfg, folder)
        if sized is not cfg:
            print(f"{cfg.model.path or 'the public model'} with its public sizes")
        print("\n".join(report(plan(sized, devices or 1, card))))
    return 0


def _gb(size: float | int) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2g}"
