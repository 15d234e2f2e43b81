"""What XLA's Triton kernels of norms and quantisations take to compile, and save to run.

    python -m experiments.triton_norms.run                             # an H100 or H200, minutes
    python -m experiments.triton_norms.run --short --out=/tmp/t.json   # the path in short, on a CPU

Each program in two forms: with XLA's pass that makes these kernels, and without it (device.NO_TRITON_NORMS). Those
without compile one after the other, those with it all at once in threads, so on a busier host. Then both run in turns.

flux    forward of 24 rows, one block of each kind at FLUX.1-dev's true width, 512 px, random weights
emoji   the stages of an iteration of `--config=emoji`: exploring and finishing one prompt, learning from all
"""

import argparse
import functools
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import full_size, results
from solrl_jax import config, device, iteration, quant, sharding
from solrl_jax.models import flux
from solrl_jax.models.flux import FluxConfig, FluxTransformer
from solrl_jax.plan import shapes
from solrl_jax.run import assemble

HERE = Path(__file__).resolve().parent
WITH = {"xla_disable_hlo_passes": ""}
PRECISIONS = ("bf16", "fp8", "nvfp4_emulated")
STAGES = {
    **{"quantised": "quantise to nvfp4_emulated", "explore": "explore in nvfp4_emulated"},
    **{"regenerate": "finish in bf16", "learn": "learn in bf16"},
}


class Size(NamedTuple):
    flux: FluxConfig
    batch: int  # of FLUX's forward
    side: int  # of its pictures, in tokens
    tokens: int  # of its captions
    emoji: dict[str, str]  # words of its config
    repeat: int


FULL = Size(FluxConfig(num_layers=1, num_single_layers=1), 24, 32, 128, {}, 20)
SHORT = Size(
    FluxConfig(num_layers=1, num_single_layers=1, num_attention_heads=2, joint_attention_dim=64),
    *(2, 4, 8),
    {"prompts": "1", "candidates": "4", "kept": "2", "explore.chunk": "4", "regenerate.chunk": "2"}
    | {"learn.micro_batch": "2", "learn.updates": "1"},
    1,
)


class Kept(full_size.Ahead):
    """A program without the pass, and what it was given first."""

    args: tuple | None = None

    def __init__(self, jitted: Any):
        super().__init__(jitted, device.NO_TRITON_NORMS)

    def __call__(self, *args: Any) -> Any:
        self.args = self.args or args
        return super().__call__(*args)


def flux_programs(size: Size) -> Iterator[tuple[str, Kept]]:
    """Forward passes of FLUX in every precision."""
    cfg, bf16 = size.flux, jnp.bfloat16
    module = FluxTransformer(cfg, bf16)
    rope = tuple(map(jnp.asarray, flux.rope_table(cfg, size.side, size.side, size.tokens)))
    rows = (size.side**2, cfg.in_channels), (size.tokens, cfg.joint_attention_dim), (cfg.pooled_projection_dim,)
    given = [jax.ShapeDtypeStruct((size.batch, *shape), bf16) for shape in rows]
    given += [jax.ShapeDtypeStruct((size.batch,), jnp.float32)] * 2
    spec = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x, rope)["params"], *given)
    base = full_size.drawn(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, bf16), spec))
    inputs = full_size.drawn(given)
    for precision in PRECISIONS:
        variables = {"params": base}
        if precision != "bf16":
            rule = quant.rule_of(flux.quant_rules(cfg, 0), precision)
            make = functools.partial(quant.quantise_tree, rule=rule, precision=precision)
            variables["quant"] = jax.jit(make)(base)
        forward = Kept(jax.jit(lambda v, *x: module.apply(v, *x, rope)))
        forward(variables, *inputs)
        yield f"flux, forward in {precision}", forward


def emoji_programs(size: Size) -> Iterator[tuple[str, Kept]]:
    """The stages of an iteration."""
    with tempfile.TemporaryDirectory() as folder:
        named = config.load("emoji:branch_clipscore", size.emoji)
        cfg = assemble.resolved(shapes.with_configs(named, folder), assemble.capability())
        bench = full_size.Bench(cfg, sharding.make_mesh(1), 1)
        bench.encode()
        staged = iteration.Staged(score=bench.sizes.score, **bench.statics)
        kept = {name: Kept(staged.jit[name]) for name in STAGES}
        staged.jit |= kept
        staged(bench.state(), bench.frozen, bench.prompts, {})
    for name, program in kept.items():
        yield f"emoji, {STAGES[name]}", program


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="small networks, once")
    parser.add_argument("--out", type=Path, default=HERE / "results/h100.json")
    args = parser.parse_args(argv)
    size, figures = SHORT if args.short else FULL, {}
    with jax.set_mesh(sharding.make_mesh(1)):
        without = dict([*flux_programs(size), *emoji_programs(size)])
    for name, program in without.items():
        print(f"{program.seconds:6.1f} s to compile without: {name}", flush=True)

    def compiled(program: Kept) -> full_size.Ahead:
        ahead = full_size.Ahead(program.jitted, WITH)
        with jax.set_mesh(sharding.make_mesh(1)):  # an ambient mesh is a thread's own
            ahead.compile(*program.args or ())
        return ahead

    with ThreadPoolExecutor(len(without)) as pool:
        both = dict(zip(without, pool.map(compiled, without.values()), strict=True))
    for name, program in without.items():
        forms, given = {"with": both[name], "without": program}, program.args or ()
        calls = {form: functools.partial(each, *given) for form, each in forms.items()}
        full_size.in_turns(calls, 2)
        for form, seconds in full_size.in_turns(calls, size.repeat).items():
            spread = [round(min(seconds), 5), round(max(seconds), 5)]
            median = statistics.median(seconds)
            figures[f"{name}: run {form}"] = results.figure(median, "s; median [least, most]", len(seconds), spread)
            figures[f"{name}: compile {form}"] = results.figure(forms[form].seconds, "s", 1)
        run = [figures[f"{name}: run {form}"]["value"] for form in forms]
        figures[f"{name}: run, without over with"] = results.figure(run[1] / run[0], "times", size.repeat)
        print(
            f"{forms['with'].seconds:6.1f} s to compile with; runs {run[1] / run[0]:.3f} times as long without: {name}"
        )
        results.record(args.out, figures)


if __name__ == "__main__":
    main()
