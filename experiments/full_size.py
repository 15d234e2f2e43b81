"""A model at full size with random weights: one forward pass, one micro-step, whole iterations, stage by stage.

    python -m experiments.full_size --config=flux:sol_rl --out=experiments/flux_h100/results/iteration.json  # an H100
    python -m experiments.full_size --config=sd35:sol_rl --out=experiments/sd35_h100/results/iteration.json
    python -m experiments.full_size --config=tiny:sol_rl --prompts=4 --repeat=1 --out=/tmp/i.json  # the path in short

Random weights take the time and the memory of real ones; what the pictures and rewards are is of no matter. Every
figure is the median of `--repeat` calls after a first one, whose excess over that median is given as compile time.
Programs of whole iterations are compiled before they run; with --repeat=1 there is no first iteration.
"""

import argparse
import functools
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
from jax.sharding import Mesh, NamedSharding, Sharding

from experiments import profile, results
from solrl_jax import algos, config, device, iteration, plan, quant, rewards, sharding
from solrl_jax.config import Config
from solrl_jax.learn import gradients, init_state, learn, make_optimizer
from solrl_jax.plan import shapes
from solrl_jax.run import assemble
from solrl_jax.structs import Prompts, PyTree, Rollout, Variables


def drawn(tree: PyTree, place: Sharding | None = None) -> PyTree:
    """Random arrays for ShapeDtypeStructs, one at a time where they belong: norms' scales 1, kernels with the variance
    that keeps a signal's size, the rest of floats ~ N(0, 0.02^2), integers small."""

    @functools.partial(jax.jit, static_argnames=("shape", "dtype", "spread"), out_shardings=place)
    def draw(key, shape, dtype, spread):
        if jnp.issubdtype(dtype, jnp.floating):
            return jax.random.normal(key, shape, dtype) * jnp.asarray(spread, dtype)
        return jax.random.randint(key, shape, 1, 8).astype(dtype)  # a mask is all true

    def leaf(path, x):
        name, key = str(getattr(path[-1], "key", "")), jax.random.key(zlib.crc32(str(path).encode()))
        if name == "scale":
            return jnp.ones(x.shape, x.dtype, device=place)
        fan_in = math.prod(x.shape[:-1]) if x.ndim == 4 else x.shape[-2] if x.ndim > 1 else 1
        return draw(key, x.shape, x.dtype, fan_in**-0.5 if name == "kernel" else 0.02)

    return jax.tree_util.tree_map_with_path(leaf, tree)


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
    """A jitted function that is compiled before it first runs, and how long that took."""

    def __init__(self, jitted: Any):
        self.jitted, self.compiled, self.seconds = jitted, None, 0.0

    def __call__(self, *args: Any) -> Any:
        if self.compiled is None:
            began = time.perf_counter()
            self.compiled = self.jitted.lower(*args).compile()
            self.seconds = time.perf_counter() - began
        return self.compiled(*args)


STAGE_OF = {"merged": "quantise", "quantised": "quantise", "select_keys": "select", "select_samples": "select"}
"""The stage as part of which a program of iteration.Staged is timed, where that is not its name."""


def iterations(staged: iteration.Staged, bench: "Bench", learn: bool = True) -> tuple[list[dict], dict[str, float]]:
    """Seconds by stage of `bench.repeat` iterations, after a first one if there are several; compile time by stage.

    Without `learn` the last stage does nothing.
    """
    state, rows, compiling = bench.state(), [], dict[str, float]()
    programs = {name: Ahead(jitted) for name, jitted in staged.jit.items()}
    staged.jit |= programs if learn else programs | {"learn": lambda state, *_: (state, {})}
    for _ in range(bench.repeat + (bench.repeat > 1)):
        times: dict[str, float] = {}
        state, _ = staged(state, bench.frozen, bench.prompts, times)
        rows.append(times)
    for name, program in programs.items():
        stage = STAGE_OF.get(name, name)
        compiling[stage] = compiling.get(stage, 0.0) + program.seconds
    rows[0] = {stage: seconds - compiling[stage] for stage, seconds in rows[0].items()}
    return rows[-bench.repeat :], compiling


class Bench:
    """Everything that an iteration takes, drawn at random on the mesh; `figures` is what was measured."""

    def __init__(self, cfg: Config, mesh: Mesh, repeat: int, folder: Path | None = None):
        self.cfg, self.mesh, self.repeat, self.folder, self.figures = cfg, mesh, repeat, folder, {}
        self.sizes = shapes.read(cfg, 1)
        self.optimizer = make_optimizer(cfg)
        self.frozen = self.drawn(self.sizes.frozen)
        self.statics = {"model": self.sizes.model, "optimizer": self.optimizer, "cfg": cfg}

    def resize(self, cfg: Config) -> None:
        """Go on with a config of fewer prompts."""
        self.cfg, self.statics = cfg, {**self.statics, "cfg": cfg}
        few = jax.device_get(jax.tree.map(lambda x: x[: cfg.prompts], self.prompts))
        self.prompts = sharding.split(few, self.mesh)

    def drawn(self, tree: PyTree, split: bool = False) -> PyTree:
        """On every device, or split over them."""
        return drawn(tree, NamedSharding(self.mesh, sharding.SPLIT if split else sharding.WHOLE))

    def note(self, name: str, seconds: list[float], tflop: float = 0.0, **more: float) -> None:
        median = statistics.median(seconds)
        spread = [round(min(seconds), 4), round(max(seconds), 4)] if len(seconds) > 1 else None
        self.figures[name] = results.figure(median, "s; median [least, most]", len(seconds), spread)
        if tflop:
            self.figures[f"{name}: rate"] = results.figure(tflop / median, "TFLOP/s", len(seconds))
        self.figures |= {f"{name}: {k}": results.figure(v, "s", 1) for k, v in more.items()}
        print(f"{median:9.4f} s  {tflop / median:7.1f} TFLOP/s  {name}  {more or ''}", flush=True)

    def peak(self, name: str) -> None:
        """The most bytes in use so far (a GPU tells; a CPU does not)."""
        if stats := jax.local_devices()[0].memory_stats():
            self.figures[name] = results.figure(stats["peak_bytes_in_use"] / 1e9, "GB", 1)
            print(f"{stats['peak_bytes_in_use'] / 1e9:9.2f} GB  {name}", flush=True)

    def encode(self) -> None:
        """Text encoders, which then leave; sets `prompts`."""
        text, tokens = self.drawn(self.sizes.text), self.drawn(self.sizes.tokens, split=True)
        encode = jax.jit(self.sizes.model.encode)
        seconds, compiling = timed(lambda: encode(text, tokens), self.repeat)
        self.note(f"encode {self.cfg.prompts} prompts", seconds, compile=compiling)
        self.prompts = Prompts(encode(text, tokens), self.drawn(self.sizes.prompts.tokens, split=True))
        self.peak("peak with the text encoders")
        jax.tree.map(lambda x: x.delete(), text)

    def forward(self, precision: str, batches: str) -> None:
        """One velocity of so many images, for every one of `batches`."""
        variables = {"params": self.frozen.base}
        if precision != "bf16":
            variables["quant"] = self.quantised(precision)
        for batch in map(int, batches.split("/")):
            self.velocity(variables, precision, batch)

    def velocity(self, variables: Variables, precision: str, batch: int) -> None:
        model = self.sizes.model
        noise = jax.vmap(model.noise)(jax.random.split(jax.random.key(0), batch))
        cond = jax.tree.map(lambda c: jnp.repeat(c[:1], batch, axis=0), self.prompts.cond)
        velocity, sigma = jax.jit(model.velocity), jnp.full((batch,), 0.5)
        call = functools.partial(velocity, variables, noise, sigma, cond)
        seconds, compiling = timed(call, self.repeat)
        flop = plan.per_image_flops(self.sizes)["forward"].total() * batch
        self.note(f"{precision} forward of {batch}", seconds, flop / 1e12, compile=compiling)
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
        flop = plan.per_image_flops(self.sizes)["decode"].total() * batch
        self.note(f"decode of {batch}, {dtype}", seconds, flop / 1e12, compile=compiling)
        self.profiled(f"decode of {batch}, {dtype}", call)

    def reward(self, batch: int) -> None:
        """The trained reward of `batch` pictures of one prompt."""
        images = jnp.full((batch, self.cfg.model.size, self.cfg.model.size, 3), 0.5)
        tokens = jax.tree.map(lambda x: x[:1], self.prompts.tokens)
        score = jax.jit(functools.partial(rewards.score_images, self.sizes.score))
        seconds, compiling = timed(lambda: score(self.frozen.rewards, images, tokens), self.repeat)
        self.note(f"reward of {batch}: {', '.join(self.sizes.score.names)}", seconds, compile=compiling)

    def micro_step(self, keeps: str) -> None:
        """Forward of the trained, the old and the reference policy and the gradient, of one micro-batch."""
        cfg = config.override(self.cfg, **{"model.remat_keeps": keeps, "learn.reference_every": 1})
        model = assemble.model_module(cfg).make(cfg.model)
        kept = max(1, cfg.learn.micro_batch // cfg.times)
        state = self.state()
        keys = jax.random.split(jax.random.key(1), (1, kept))
        x0 = jnp.zeros((1, kept, *jax.eval_shape(model.noise, keys[0, 0]).shape))
        cond = jax.tree.map(lambda c: c[:1], self.prompts.cond)
        step = jax.jit(functools.partial(gradients, model=model, cfg=cfg))
        call = functools.partial(step, state, state, self.frozen, cond, keys, algos.Sample(x0), jnp.ones((1, kept)))
        seconds, compiling = timed(call, self.repeat)
        name = f"micro-step of {kept * cfg.times} points, keeping {keeps or 'nothing'}"
        self.note(name, seconds, compile=compiling)
        self.profiled(name, call)
        self.peak(f"peak after the {name}")

    def learn(self, every: int) -> None:
        """The policy update on the kept samples, with the reference on one micro-batch in `every`."""
        cfg = config.override(self.cfg, **{"learn.reference_every": every})
        model, state = self.sizes.model, self.state()
        keys = jax.random.split(jax.random.key(1), (cfg.prompts, cfg.kept))
        x0 = jax.random.normal(jax.random.key(2), (*keys.shape, *jax.eval_shape(model.noise, keys[0, 0]).shape))
        samples = Rollout(keys, x0, jax.random.normal(jax.random.key(3), keys.shape), {})
        update = jax.jit(functools.partial(learn, model=model, optimizer=self.optimizer, cfg=cfg))
        seconds, compiling = timed(lambda: update(state, self.frozen, self.prompts.cond, samples), self.repeat)
        what = "every micro-batch" if every == 1 else f"one micro-batch in {every}"
        self.note(f"learn of {keys.size} x {cfg.times}, the reference on {what}", seconds, compile=compiling)

    def state(self) -> iteration.TrainState:
        state = init_state(jax.random.key(0), self.frozen, **self.statics)
        return sharding.replicate(state, self.mesh)

    def iterations(self, tflop: dict[str, float]) -> None:
        """Whole iterations, staged; each stage's seconds and rate, `tflop` is `work`'s."""
        rows, compiling = iterations(iteration.Staged(score=self.sizes.score, **self.statics), self)
        for name in rows[0]:
            self.note(name, [row[name] for row in rows], tflop.get(name, 0.0), compile=compiling[name])
        self.note("iteration", [sum(row.values()) for row in rows])
        self.peak("peak of the whole")


def work(cfg: Config, devices: int) -> dict[str, float]:
    """TFLOP of every stage of an iteration, of one device; called outside of any mesh of several devices."""
    share, card = shapes.read(cfg, devices), plan.CARDS["H100 80GB"]
    return {use.stage: use.flops.total() / devices / 1e12 for use in plan.uses_of(cfg, share, devices, card)}


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="flux:sol_rl")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--forward", default="bf16:24", help="PRECISION:BATCH/BATCH of forward passes, with commas")
    parser.add_argument("--decode", default="bfloat16:24", help="DTYPE:BATCH of decodes, several with commas")
    parser.add_argument("--keeps", help="model.remat_keeps of micro-steps, several with semicolons; the config's")
    parser.add_argument("--every", default="1,4", help="learn.reference_every of whole updates, with commas")
    parser.add_argument(
        "--only", default="encode,forward,decode,reward,micro_step,iterations", help="of these and learn"
    )
    parser.add_argument("--profile", type=Path, help="folder for every kernel's time")
    parser.add_argument("--set", default="", help="config words, field=value with commas: explore.precision=bf16")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    assemble.use_compilation_cache()
    mesh = sharding.make_mesh(1)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        words = dict(word.split("=", 1) for word in filter(None, args.set.split(",")))
        named = config.load(args.config, {"prompts": str(args.prompts), **words})
        cfg = assemble.resolved(shapes.with_configs(named, folder), assemble.capability())
        bench = Bench(cfg, mesh, args.repeat, args.profile)
        forwards, decodes = ([word.split(":") for word in words.split(",")] for words in (args.forward, args.decode))
        keeping = ",".join(cfg.model.remat_keeps) if args.keeps is None else args.keeps
        steps = [
            ("encode", bench.encode),
            *(("forward", functools.partial(bench.forward, p, b)) for p, b in forwards),
            *(("decode", functools.partial(bench.decode, d, int(b))) for d, b in decodes),
            ("reward", functools.partial(bench.reward, 24)),
            *(("micro_step", functools.partial(bench.micro_step, keeps)) for keeps in keeping.split(";")),
            *(("learn", functools.partial(bench.learn, int(every))) for every in args.every.split(",")),
            ("iterations", functools.partial(bench.iterations, work(cfg, 1))),
        ]
        for name, step in steps:
            if name in args.only.split(","):
                try:
                    step()
                except jax.errors.JaxRuntimeError as e:  # out of memory: said, and the rest goes on
                    print(f"{name} failed: {str(e)[:300]}", flush=True)
                    bench.figures[f"{name} failed"] = results.figure(0, str(e)[:300], 0)
                results.record(args.out, bench.figures, config=config.to_json(named))


if __name__ == "__main__":
    main()
