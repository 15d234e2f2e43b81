"""A model at full size with random weights: one forward pass, one micro-step, whole iterations, stage by stage.

    python -m experiments.full_size --config=flux:sol_rl --out=experiments/flux_h100/results/iteration.json  # an H100
    python -m experiments.full_size --config=sd35:sol_rl --out=experiments/sd35_h100/results/iteration.json
    python -m experiments.full_size --devices=4 --prompts=4 --set=shard=4 --out=FILE         # the base over 4 cards
    python -m experiments.full_size --config=tiny:sol_rl --prompts=4 --repeat=1 --out=/tmp/i.json  # the path in short

Random weights take the time and the memory of real ones; what the pictures and rewards are is of no matter. Every
figure is the median of `--repeat` calls after a first one, whose excess over that median is given as compile time.
Programs of whole iterations are compiled before they run; with --repeat=1 there is no first iteration.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import math
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, Sharding

from experiments import fields, profile, results
from solrl_jax import algos, config, device, iteration, plan, quant, rewards, sharding
from solrl_jax.config import Config
from solrl_jax.learn import gradients, init_state, learn, make_optimizer
from solrl_jax.plan import shapes
from solrl_jax.run import assemble
from solrl_jax.run.encode import encoded
from solrl_jax.structs import Frozen, Prompts, PyTree, Rollout, Variables

Options = Mapping[str, Any]
"""XLA's options of one program, by their names in its flags."""


def drawn(tree: PyTree, place: Any = None) -> PyTree:
    """Random arrays for ShapeDtypeStructs, one at a time where they belong: norms' scales and variances 1, kernels with
    the variance that keeps a signal's size, the rest of floats ~ N(0, 0.02^2), integers small.

    `place` is a sharding, or a tree of them. Of an array in parts each device draws its own; the numbers are the same.
    """

    def leaf(path, x, place):
        name, key = str(getattr(path[-1], "key", "")), jax.random.key(zlib.crc32(str(path).encode()))
        if name in ("scale", "running_var"):
            return jnp.ones(x.shape, x.dtype, device=place)
        fan_in = math.prod(x.shape[:-1]) if x.ndim == 4 else x.shape[-2] if x.ndim > 1 else 1
        return _draw(place)(key, x.shape, x.dtype, fan_in**-0.5 if name == "kernel" else 0.02)

    leaves, form = jax.tree_util.tree_flatten_with_path(tree)
    alone = place is None or isinstance(place, Sharding)
    places = [place] * len(leaves) if alone else jax.tree.leaves(place)
    return form.unflatten([leaf(path, x, where) for (path, x), where in zip(leaves, places, strict=True)])


@functools.cache
def _draw(place: Sharding | None) -> Any:
    """(key, shape, dtype, spread) -> a random array, made where it lies."""

    def draw(key, shape, dtype, spread):
        if jnp.issubdtype(dtype, jnp.floating):
            return jax.random.normal(key, shape, dtype) * jnp.asarray(spread, dtype)
        return jax.random.randint(key, shape, 1, 8).astype(dtype)  # a mask is all true

    return jax.jit(draw, static_argnames=("shape", "dtype", "spread"), out_shardings=place)


def timed(call: Callable[[], Any], repeat: int) -> tuple[list[float], float]:
    """Seconds of each call but the first, and how much longer the first one took."""
    seconds = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return seconds[1:], seconds[0] - statistics.median(seconds[1:])


def in_turns(calls: Mapping[str, Callable[[], Any]], repeat: int) -> dict[str, list[float]]:
    """Seconds of `repeat` calls of each program, one of each after the other, so that all see the same clock."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeat):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - began)
    return seconds


class Ahead:
    """A jitted function that is compiled before it first runs, with XLA's `options`, and how long that took."""

    def __init__(self, jitted: Any, options: Options | None = None):
        self.jitted, self.options, self.compiled, self.seconds = jitted, options, None, 0.0

    def compile(self, *args: Any) -> Any:
        began = time.perf_counter()
        self.compiled = self.jitted.lower(*args).compile(self.options)
        self.seconds = time.perf_counter() - began
        return self.compiled

    def __call__(self, *args: Any) -> Any:
        return (self.compiled or self.compile(*args))(*args)


STAGE_OF = {"merged": "quantise", "quantised": "quantise", "select_keys": "select", "select_samples": "select"}
"""The stage as part of which a program of iteration.Staged is timed, where that is not its name."""


Times = dict[str, float]
"""Seconds by stage."""


def iterations(
    staged: iteration.Staged,
    bench: "Bench",
    learn: bool = True,
    options: Options | None = None,
    each: Callable[[list[Times], Times], None] = lambda rows, compiling: None,
) -> tuple[list[Times], Times]:
    """Seconds by stage of `bench.repeat` iterations, after a `bench.first` that does not count; compile time by stage.

    Without `learn` the last stage does nothing. `options` are XLA's for every program. `each` gets what is known after
    every iteration that counts.
    """
    state, rows, compiling, first = bench.state(), list[Times](), Times(), bench.first
    programs = {name: Ahead(jitted, options) for name, jitted in staged.jit.items()}
    staged.jit |= programs if learn else programs | {"learn": lambda state, *_: (state, {})}
    for number in range(bench.repeat + first):
        times = Times()
        state, _ = staged(state, bench.frozen, bench.prompts, times)
        if number == 0:
            for name, program in programs.items():
                stage = STAGE_OF.get(name, name)
                compiling[stage] = compiling.get(stage, 0.0) + program.seconds
            times = {stage: seconds - compiling[stage] for stage, seconds in times.items()}
        if number or not first:
            rows.append(times)
            each(rows, compiling)
    return rows, compiling


def peaks(mesh: Mesh) -> list[float]:
    """GB in use at most since the process began, of each of its own devices (a GPU tells; a CPU does not)."""
    found = [device.memory_stats() for device in mesh.local_devices]
    return [stats["peak_bytes_in_use"] / 1e9 for stats in found if stats]


class Bench:
    """Everything that an iteration takes, drawn at random on the mesh; `figures` is what was measured.

    The base and the text encoders are sharded over `fsdp` of the mesh. With `first` an iteration runs that does not
    count before those that do. `written` is called after every figure. `flop` is of one picture by part of the work,
    for rates; 0: no rates.
    """

    def __init__(
        self,
        cfg: Config,
        mesh: Mesh,
        repeat: int,
        folder: Path | None = None,
        written: Callable[[dict[str, Any]], None] = lambda figures: None,
    ):
        self.cfg, self.mesh, self.repeat, self.folder, self.written = cfg, mesh, repeat, folder, written
        self.first = repeat > 1
        self.figures, self.before = {}, peaks(mesh)
        self.sizes = shapes.read(cfg, 1)
        self.flop: Mapping[str, float] = {"forward": 0.0, "decode": 0.0}
        self.optimizer = make_optimizer(cfg)
        sizes = self.sizes.frozen
        base = self.drawn(sizes.base, sharding.specs_of(sizes.base))
        self.frozen = Frozen(base, self.drawn(sizes.vae), self.drawn(sizes.rewards), self.drawn(sizes.negative))
        self.statics = {"model": self.sizes.model, "optimizer": self.optimizer, "cfg": cfg}

    def resize(self, cfg: Config) -> None:
        """Go on with a config of fewer prompts."""
        self.cfg, self.statics = cfg, {**self.statics, "cfg": cfg}
        few = jax.device_get(jax.tree.map(lambda x: x[: cfg.prompts], self.prompts))
        self.prompts = sharding.split(few, self.mesh)

    def drawn(self, tree: PyTree, where: Any = sharding.WHOLE) -> PyTree:
        """Random arrays where a spec, or a tree of specs, says."""
        return drawn(tree, jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), where))

    def note(self, name: str, seconds: list[float], tflop: float = 0.0, **more: float) -> None:
        median = statistics.median(seconds)
        spread = [round(min(seconds), 4), round(max(seconds), 4)] if len(seconds) > 1 else None
        self.figures[name] = results.figure(median, "s; median [least, most]", len(seconds), spread)
        if tflop:
            self.figures[f"{name}: rate"] = results.figure(tflop / median, "TFLOP/s", len(seconds))
        self.figures |= {f"{name}: {k}": results.figure(v, "s", 1) for k, v in more.items()}
        print(f"{median:9.4f} s  {tflop / median:7.1f} TFLOP/s  {name}  {more or ''}", flush=True)
        self.written(self.figures)

    def peak(self, name: str) -> None:
        """The most GB in use since the process began, on the card with the most, and on each of several."""
        if not (found := peaks(self.mesh)):
            return
        unit = "GB" if len(found) == 1 else "GB, the most of all cards [each]"
        if max(found) <= max(self.before):
            unit += ": at most, for as much was in use before"
        each = [round(x, 3) for x in found] if len(found) > 1 else None
        self.figures[name] = results.figure(max(found), unit, len(found), each)
        print(f"{max(found):9.2f} {unit}  {name}  {each or ''}", flush=True)
        self.written(self.figures)

    def encode(self) -> None:
        """Text encoders, which then leave; sets `prompts`. Each device encodes its own."""
        where = sharding.specs_of(self.sizes.text)
        text, tokens = self.drawn(self.sizes.text, where), self.drawn(self.sizes.tokens, sharding.SPLIT)
        encode = jax.jit(functools.partial(encoded, model=self.sizes.model))
        seconds, compiling = timed(lambda: encode(text, tokens), self.repeat)
        self.note(f"encode {self.cfg.prompts} prompts", seconds, compile=compiling)
        self.prompts = Prompts(encode(text, tokens), self.drawn(self.sizes.prompts.tokens, sharding.SPLIT))
        self.peak("peak with the text encoders")
        jax.tree.map(lambda x: x.delete(), text)

    def forward(self, precision: str, batches: str) -> None:
        """One velocity of so many images a device, for every one of `batches`."""
        variables = {"params": self.frozen.base}
        if precision != "bf16":
            variables["quant"] = self.quantised(precision)
        for batch in map(int, batches.split("/")):
            self.velocity(variables, precision, batch)

    def velocity(self, variables: Variables, precision: str, batch: int) -> None:
        model, rows = self.sizes.model, batch * self.mesh.size
        noise = jax.vmap(model.noise)(jax.random.split(jax.random.key(0), rows))
        cond = jax.tree.map(lambda c: jnp.repeat(c[:1], rows, axis=0), self.prompts.cond)
        noise, sigma, cond = sharding.split((noise, jnp.full((rows,), 0.5), cond), self.mesh)
        specs = sharding.specs_of(variables), *[sharding.SPLIT] * 3
        velocity = jax.jit(sharding.over_data(model.velocity, specs, sharding.SPLIT))
        call = functools.partial(velocity, variables, noise, sigma, cond)
        seconds, compiling = timed(call, self.repeat)
        self.note(f"{precision} forward of {batch}", seconds, self.flop["forward"] * batch / 1e12, compile=compiling)
        self.profiled(f"{precision} forward of {batch}", call)

    def quantised(self, precision: str) -> PyTree:
        """The low-precision copy of the base, made in one program; the time of that too."""
        rule = quant.rule_of(self.sizes.model.quant_rules, precision)
        make = jax.jit(functools.partial(quant.quantise_tree, rule=rule, precision=precision))
        seconds, compiling = timed(lambda: make(self.frozen.base), self.repeat)
        self.note(f"{precision} quantise", seconds, compile=compiling)
        return make(self.frozen.base)

    def profiled(self, name: str, call: Callable[[], Any]) -> None:
        """Seconds by kind of kernel, on a GPU; every kernel's in a text file of --profile."""
        if self.folder is None:
            return
        found = profile.kernels(call)
        for kind, seconds in profile.groups(found).items():
            self.figures[f"{name}: {kind}"] = results.figure(seconds, "s", 1)
            print(f"{seconds:9.4f} s  {name}: {kind}", flush=True)
        self.written(self.figures)
        lines = [f"{s * 1e3:10.3f} ms  {profile.group(*k):26} {k[1]:40} {k[0]}" for k, s in found.most_common(150)]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{name.replace(' ', '_')}.txt").write_text("\n".join(lines) + "\n")

    def decode(self, dtype: str, batch: int) -> None:
        """Latents of `batch` images to pictures, the decoder's convolutions in `dtype`."""
        cfg = config.override(self.cfg, **{"model.vae_dtype": dtype})
        model = assemble.model_module(cfg).make(cfg.model)
        latents = jax.vmap(model.noise)(jax.random.split(jax.random.key(0), batch))
        call = functools.partial(jax.jit(model.decode), self.frozen.vae, latents)
        seconds, compiling = timed(call, self.repeat)
        self.note(f"decode of {batch}, {dtype}", seconds, self.flop["decode"] * batch / 1e12, compile=compiling)
        self.profiled(f"decode of {batch}, {dtype}", call)

    def reward(self, batch: int) -> None:
        """The trained reward of `batch` pictures of one prompt."""
        images = jnp.full((batch, self.cfg.model.size, self.cfg.model.size, 3), 0.5)
        tokens = jax.tree.map(lambda x: x[:1], self.prompts.tokens)
        score = jax.jit(functools.partial(rewards.score_images, self.sizes.score))
        seconds, compiling = timed(lambda: score(self.frozen.rewards, images, tokens), self.repeat)
        self.note(f"reward of {batch}: {', '.join(self.sizes.score.names)}", seconds, compile=compiling)

    def micro_step(self, keeps: str) -> None:
        """Forward of the trained, the old and the reference policy and the gradient, of a micro-batch a device."""
        cfg = config.override(self.cfg, **{"model.remat_keeps": keeps, "learn.reference_every": 1})
        model = assemble.model_module(cfg).make(cfg.model)
        kept = max(1, cfg.learn.micro_batch // cfg.times)
        state = self.state()
        keys = jax.random.split(jax.random.key(1), (self.mesh.size, kept))
        x0 = jnp.zeros((*keys.shape, *jax.eval_shape(model.noise, keys[0, 0]).shape))
        cond = jax.tree.map(lambda c: c[: self.mesh.size], self.prompts.cond)
        step = jax.jit(functools.partial(gradients, model=model, cfg=cfg))
        call = functools.partial(step, state, state, self.frozen, cond, keys, algos.Sample(x0), jnp.ones(keys.shape))
        seconds, compiling = timed(call, self.repeat)
        name = f"micro-step of {kept * cfg.times} points, keeping {keeps or 'nothing'}"
        self.note(name, seconds, compile=compiling)
        self.profiled(name, call)
        self.peak(f"peak after the {name}")

    def learn(self, every: int, deterministic: bool = False) -> None:
        """The policy update on the kept samples, with the reference on one micro-batch in `every`; and how far the
        gradient of the same program, run again, lies from the first one."""
        cfg = config.override(self.cfg, **{"learn.reference_every": every, "learn.deterministic": deterministic})
        model, state = self.sizes.model, self.state()
        keys = jax.random.split(jax.random.key(1), (cfg.prompts, cfg.kept))
        x0 = jax.random.normal(jax.random.key(2), (*keys.shape, *jax.eval_shape(model.noise, keys[0, 0]).shape))
        samples = Rollout(keys, x0, jax.random.normal(jax.random.key(3), keys.shape), {})
        options = device.compiler_options("bf16", deterministic)
        update = jax.jit(
            functools.partial(learn, model=model, optimizer=self.optimizer, cfg=cfg), compiler_options=options
        )
        found = collections.deque[PyTree](maxlen=2)  # a tenth of the clipped gradient of each of the last calls

        def call() -> PyTree:
            found.append(optax.tree.get(update(state, self.frozen, self.prompts.cond, samples)[0].moments, "mu"))
            return found[-1]

        seconds, compiling = timed(call, self.repeat)
        what = "every micro-batch" if every == 1 else f"one micro-batch in {every}"
        name = f"learn of {keys.size} x {cfg.times}, the reference on {what}" + ", deterministic" * deterministic
        self.note(name, seconds, compile=compiling)
        first, again = found
        apart = optax.tree.norm(optax.tree.sub(again, first)) / optax.tree.norm(first)
        self.figures[f"{name}: run again"] = results.figure(float(apart), "|g' - g| / |g|", 1)
        print(f"{apart:9.2e}  {name}: run again", flush=True)
        self.written(self.figures)

    def state(self) -> iteration.TrainState:
        state = init_state(jax.random.key(0), self.frozen, **self.statics)
        return sharding.replicate(state, self.mesh)

    def iterations(self, tflop: Times, options: Options | None = None) -> list[Times]:
        """Whole iterations, staged; each stage's seconds and rate, `tflop` is `work`'s. Known after every iteration.

        The seconds by stage of each.
        """

        def each(rows: list[Times], compiling: Times) -> None:
            for name in rows[0]:
                self.note(name, [row[name] for row in rows], tflop.get(name, 0.0), compile=compiling[name])
            self.note("iteration", [sum(row.values()) for row in rows])
            self.peak("peak of the whole")

        staged = iteration.Staged(score=self.sizes.score, **self.statics)
        return iterations(staged, self, options=options, each=each)[0]


def alike(name: str, words: Mapping[str, str]) -> dict[str, str]:
    """`words` for the config, with attention's and the MLP's results kept for the backward pass if they leave that to
    the card: what is compared keeps the same, on any card."""
    auto = config.load(name, words).model.remat_keeps == config.AUTO
    return {**words, **({"model.remat_keeps": "attention,mlp"} if auto else {})}


def work(cfg: Config, devices: int) -> Times:
    """TFLOP of every stage of an iteration, of one device; called outside of any mesh of several devices."""
    cfg = config.override(cfg, shard="1")  # the same work
    share, card = shapes.read(cfg, devices), plan.CARDS["H100 80GB"]
    return {use.stage: use.flops.total() / devices / 1e12 for use in plan.uses_of(cfg, share, devices, card)}


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="flux:sol_rl")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--forward", default="bf16:24", help="PRECISION:BATCH/BATCH of forward passes, with commas")
    parser.add_argument("--decode", default="bfloat16:24", help="DTYPE:BATCH of decodes, several with commas")
    parser.add_argument("--keeps", help="model.remat_keeps of micro-steps, several with semicolons; the config's")
    parser.add_argument("--every", default="1,4", help="learn.reference_every of whole updates, with commas")
    parser.add_argument("--deterministic", action="store_true", help="whole updates also with learn.deterministic")
    parser.add_argument(
        "--only", default="encode,forward,decode,reward,micro_step,iterations", help="of these and learn"
    )
    parser.add_argument("--profile", type=Path, help="folder for every kernel's time")
    fields.add_argument(parser, "config fields: explore.precision=bf16")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    assemble.use_compilation_cache()
    named = config.load(args.config, alike(args.config, {"prompts": str(args.prompts), **dict(args.set)}))
    mesh = assemble.make_mesh(args.devices, max(1, named.shard), named.prompts)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        cfg = assemble.resolved(shapes.with_configs(named, folder), assemble.capability())
        tflop = work(cfg, mesh.size)
        written = functools.partial(results.record, args.out, config=config.to_json(named))
        bench = Bench(cfg, mesh, args.repeat, args.profile, written)
        bench.flop = {part: flop.total() for part, flop in plan.per_image_flops(bench.sizes).items()}
        stack.enter_context(jax.set_mesh(mesh))
        forwards, decodes = ([word.split(":") for word in words.split(",")] for words in (args.forward, args.decode))
        keeping = ",".join(cfg.model.remat_keeps) if args.keeps is None else args.keeps
        updates = itertools.product(args.every.split(","), (False, True)[: 1 + args.deterministic])
        steps = [
            ("encode", bench.encode),
            *(("forward", functools.partial(bench.forward, p, b)) for p, b in forwards),
            *(("decode", functools.partial(bench.decode, d, int(b))) for d, b in decodes),
            ("reward", functools.partial(bench.reward, 24)),
            *(("micro_step", functools.partial(bench.micro_step, keeps)) for keeps in keeping.split(";")),
            *(("learn", functools.partial(bench.learn, int(every), fixed)) for every, fixed in updates),
            ("iterations", functools.partial(bench.iterations, tflop)),
        ]
        for name, step in steps:
            if name in args.only.split(","):
                try:
                    step()
                except jax.errors.JaxRuntimeError as e:  # out of memory: said, and the rest goes on
                    print(f"{name} failed: {str(e)[:300]}", flush=True)
                    bench.figures[f"{name} failed"] = results.figure(0, str(e)[:300], 0)
                    written(bench.figures)


if __name__ == "__main__":
    main()
