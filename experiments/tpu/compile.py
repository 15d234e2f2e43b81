"""The stages of an iteration, compiled by XLA for a slice of TPUs that is not there: memory, kernels, seconds.

    python -m experiments.tpu.compile --slice=v5p:2x2x1 --out=experiments/tpu/results/flux_v5p.json      # no TPU
    python -m experiments.tpu.compile --slice=v6e:2x4 --stages learn --set=model.remat_keeps= --out=/tmp/tpu.json

Needs libtpu (`pip install .[tpu]`) and no TPU. Nothing runs: the models have their public sizes as shapes and dtypes,
and memory is XLA's own count for one chip. A stage that XLA refuses keeps its message. Figures of other stages that the
file already holds are kept, so that stages can be compiled one by one.
"""

import argparse
import functools
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import fields, results
from experiments.full_size import alike
from solrl_jax import config, device, iteration, learn, sharding
from solrl_jax.config import Config
from solrl_jax.plan import shapes
from solrl_jax.run import assemble
from solrl_jax.run.encode import encoded
from solrl_jax.structs import Frozen

MEMORY = {"v5p": 95, "v6e": 32}
"""GB of a chip, by Google's documentation."""
LEAST = -1.0
"""The least effort that XLA makes for a fast program, of -1 to 1; 0 is its default. A forward pass of FLUX with five
blocks compiles in an eighth of the time, with 14 % more temporaries."""
STAGES = ("encode", "merge", "explore", "regenerate", "learn")


def mesh(name: str, shard: int) -> Mesh:
    """A mesh of a described slice's chips, such as "v5p:2x2x1", weights over `shard` neighbours each."""
    # There is no TPU: libtpu must not ask its metadata server, nor hold the lock that one process has on it.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    found = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    return Mesh(np.reshape(found, (len(found) // shard, shard)), sharding.AXES, axis_types=(AxisType.Auto,) * 2)


def laid(tree: Any, where: Any, on: Mesh) -> Any:
    """Shapes with their shardings; `where` is one spec for all leaves, or a tree of them."""
    specs = jax.tree.map(lambda _: where, tree) if isinstance(where, P) else where
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(on, spec)), tree, specs
    )


class Program(NamedTuple):
    """A stage's function, its arguments, and what else is in a chip's memory while it runs, as laid-out shapes."""

    function: Callable
    given: tuple
    besides: tuple = ()


def programs(cfg: Config, on: Mesh) -> dict[str, Program]:
    """The stages as `iteration.Staged` runs them: rollouts a block of prompts at a time, `learn` on all prompts."""
    sizes = shapes.read(cfg, on.size)
    run = iteration.stages(sizes.model, sizes.score, learn.make_optimizer(cfg), cfg)
    whole, split = (functools.partial(laid, where=where, on=on) for where in (sharding.WHOLE, sharding.SPLIT))
    base, text = (laid(x, sharding.specs_of(x), on) for x in (sizes.frozen.base, sizes.text))
    frozen = Frozen(base, *map(whole, sizes.frozen[1:]))
    state = whole(shapes.blank(cfg, sizes))
    with jax.set_mesh(on):
        kernels = jax.eval_shape(run.merged, state, frozen)
    kernels = laid(kernels, sharding.specs_of(kernels), on)
    cond, tokens = (split(shapes.batch(x, cfg.prompts)) for x in (sizes.prompts.cond, sizes.tokens))
    samples = split(shapes.samples(cfg, sizes, cfg.prompts, cfg.kept))
    prompts = split(shapes.batch(sizes.prompts, on.size))  # of a block, one a chip
    candidates, kept = (split(shapes.keys(on.size, n)) for n in (cfg.candidates, cfg.kept))
    states = split(shapes.states(cfg, sizes, on.size, cfg.kept))
    return {
        "encode": Program(functools.partial(encoded, model=sizes.model), (text, tokens), (frozen, state)),
        "merge": Program(run.merged, (state, frozen)),
        "explore": Program(run.explore, (kernels, None, frozen, prompts, candidates), (state,)),
        "regenerate": Program(run.regenerate, (kernels, None, frozen, prompts, kept, states), (state, samples)),
        "learn": Program(run.learn, (state, frozen, cond, samples)),
    }


def held(tree: Any) -> int:
    """Bytes of laid-out shapes on one chip."""
    sizes = [(math.prod(x.sharding.shard_shape(x.shape)), x.dtype) for x in jax.tree.leaves(tree)]
    return sum(size * getattr(dtype, "itemsize", 8) for size, dtype in sizes)


def compiled(program: Program, on: Mesh, effort: float = LEAST) -> Any:
    with jax.set_mesh(on):
        lowered = jax.jit(program.function).lower(*program.given)
    options: dict[str, Any] = {"exec_time_optimization_effort": effort}
    return lowered.compile(options)


def kernels_in(text: str) -> int:
    """Pallas kernels in a compiled program; one in a loop counts once."""
    return len(re.findall(r'custom_call_target="tpu_custom_call"', text))


def figures_of(program: Program, on: Mesh, effort: float) -> dict[str, dict[str, Any]]:
    """A stage's figures. `memory` is what a chip holds while the stage runs: all arrays that are alive, also those
    that the program does not read, its temporaries and its results."""
    began = time.perf_counter()
    done = compiled(program, on, effort)
    seconds, found = time.perf_counter() - began, done.memory_analysis()
    alive = max(held((program.given, program.besides)), found.argument_size_in_bytes)
    sizes = {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "results": found.output_size_in_bytes - found.alias_size_in_bytes,
        "memory": alive + found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes,
    }
    return {name: results.figure(round(size / 1e9, 2), "GB a chip", 1) for name, size in sizes.items()} | {
        "kernels": results.figure(kernels_in(done.as_text()), "Pallas kernels in the program", 1),
        "seconds": results.figure(round(seconds), "s to compile on the host", 1),
    }


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="flux")
    parser.add_argument("--slice", default="v5p:2x2x1")
    parser.add_argument("--shard", type=int, default=4)
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    fields.add_argument(parser, "config fields: learn.micro_batch=4")
    parser.add_argument("--effort", type=float, default=LEAST, help="XLA's, from -1 to 1; a run's own is 0")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    on, chip = mesh(args.slice, args.shard), args.slice.partition(":")[0]
    changes, told = dict(args.set), [f"{name}={value}" for name, value in args.set]
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    figures, refused = before.get("figures", {}), before.get("refused", {})
    with tempfile.TemporaryDirectory() as folder:
        words = {"explore.precision": "bf16", "shard": str(args.shard), "evaluate.every": "0", **changes}
        named = config.load(args.config, alike(args.config, words))
        cfg = assemble.resolved(shapes.with_configs(named, folder), None)
        made = programs(cfg, on)
        for stage in args.stages:
            label = ", ".join([args.config, args.slice, f"shard={args.shard}", *told, stage])
            try:
                found = figures_of(made[stage], on, args.effort)
                refused.pop(label, None)
            except jax.errors.JaxRuntimeError as e:
                found, refused[label] = {"memory": results.figure(None, "GB a chip", 1)}, str(e)[:500]
            found["of"] = results.figure(MEMORY[chip], "GB a chip has", 1)
            figures |= {f"{label}: {name}": f for name, f in found.items()}
            print(label, *(f"{name} {results.cell(f, 2)}" for name, f in found.items()), sep="\n  ", flush=True)
            results.record(args.out, figures, refused=refused)


if __name__ == "__main__":
    main()
