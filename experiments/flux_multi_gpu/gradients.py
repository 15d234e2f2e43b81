"""The gradient of one update on one card and on several, in float32 and bfloat16; and what moves it on one card alone.

Of a FLUX of true width with fewer blocks (`--layers=4,8`: 4 double, 8 single), so that float32 fits a card. The weights
and texts are numbers that bfloat16 has, so both dtypes compute the same function; the adapter is a random one, for a
fresh one's down factors have no gradient. The samples are the same on any number of cards.

Each difference is |g' - g| / |g| over all leaves, in each dtype. Against g of one card, in the same micro-batches: on
several cards, with the base over `--shard` of them, the same program run again (some kernels add in an order that
differs each time), the program of learn.deterministic and its second run, and one compiled with another option of XLA
(`--other`). Then one card in other micro-batches (`--other_micro`), and several cards against it in these. In bfloat16
also g against float32's.
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from experiments import results
from experiments.full_size import Ahead, Options, drawn
from solrl_jax import algos, config, device, learn, sharding
from solrl_jax.config import Config
from solrl_jax.plan import shapes
from solrl_jax.run import assemble
from solrl_jax.structs import Frozen, PyTree, leaves_by_path

Gradient = dict[str, np.ndarray]
OTHER = {"gpu": "xla_gpu_autotune_level=0", "cpu": "xla_disable_hlo_passes=fusion"}
"""An option by platform with which other kernels compute the same products and sums."""
BASE, ORDERED = "one card", "deterministic"


class Case(NamedTuple):
    """One way to compute the gradient, and the name of the case with which it is compared."""

    devices: int = 1
    shard: int = 1
    micro: int = 4
    options: Options | None = None
    deterministic: bool = False
    against: str = BASE


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtypes", default="float32,bfloat16", help="gradients: model.dtype, with commas")
    parser.add_argument("--layers", default="4,8", help="gradients: FLUX's double and single blocks; 0: all")
    parser.add_argument("--samples", type=int, default=2, help="gradients: samples a prompt")
    parser.add_argument("--micro", type=int, default=4, help="gradients: points of a micro-batch")
    parser.add_argument("--other_micro", type=int, default=8, help="gradients: points of another micro-batch")
    parser.add_argument("--other", default="", help="gradients: XLA's option of another compilation, NAME=VALUE")


def cases(args: argparse.Namespace) -> dict[str, Case]:
    """By name, in the order of their worth, for a command may be cut short."""
    plain, several = Case(micro=args.micro), sorted({*args.devices} - {1}, reverse=True)
    option, _, value = (args.other or OTHER[device.platform()]).partition("=")
    other = f"micro_batch={args.other_micro}"
    found = {BASE: plain, ORDERED: plain._replace(deterministic=True)}
    for devices in several:
        found[f"{devices} devices"] = plain._replace(devices=devices)
        if args.shard > 1 and devices % args.shard == 0:
            found[f"{devices} devices, shard={args.shard}"] = plain._replace(devices=devices, shard=args.shard)
    switch = {"true": True, "false": False}.get(value.lower(), value)  # XLA reads other values from their text
    found[f"compiled with {option}={value}"] = plain._replace(options={option: switch})
    found[other] = plain._replace(micro=args.other_micro)
    for devices in several[:1]:
        found[f"{devices} devices, {other} on both"] = Case(devices, micro=args.other_micro, against=other)
    return found


def run(args: argparse.Namespace, record: Callable[[dict[str, Any]], None], loaded: Callable[..., Config]) -> None:
    """Every case in every dtype; each difference is recorded when it is known."""
    exact: Gradient | None = None
    for dtype in args.dtypes.split(","):
        known: dict[str, Gradient] = {}
        for name, case in cases(args).items():
            words = {"learn.micro_batch": case.micro, "learn.reference_every": 1, "shard": case.shard}
            words["learn.deterministic"] = case.deterministic
            cfg = loaded(prompts=max(args.devices), **{"model.dtype": dtype}, **words)
            shallow(cfg, args.layers)
            known[name], *again = gradient(cfg, case, args.samples, runs=2 if name in (BASE, ORDERED) else 1)
            figures = {f"{dtype}: {name}": difference(known[name], known[case.against])}
            if name == ORDERED:
                figures[f"{dtype}: {name}, run again"] = difference(again[0], known[name])
            if name == BASE:
                figures = {f"{dtype}: |g|": results.figure(size(known[name]), "over all leaves", 1)}
                figures[f"{dtype}: run again"] = difference(again[0], known[name])
                if dtype == "float32":
                    exact = known[name]
                elif exact is not None:
                    figures[f"{dtype}: against float32"] = difference(known[name], exact)
            record(figures)
            for figure, f in figures.items():
                print(f"{f['value']:.3e}  {figure}", flush=True)


def gradient(cfg: Config, case: Case, count: int, runs: int) -> list[Gradient]:
    """The mean loss's gradient of `count` made-up samples for each of `cfg.prompts` prompts, found `runs` times."""
    mesh = assemble.make_mesh(case.devices, case.shard, cfg.prompts)
    with jax.set_mesh(mesh):
        model, base, cond = network(cfg, mesh)
        split = functools.partial(sharding.split, mesh=mesh)
        frozen, optimizer = Frozen(base, {}, {}), learn.make_optimizer(cfg)
        state = learn.init_state(jax.random.key(0), frozen, model=model, optimizer=optimizer, cfg=cfg)
        state = sharding.replicate(state, mesh)
        moved = drawn(state.lora, NamedSharding(mesh, sharding.WHOLE))
        keys = jax.random.split(jax.random.key(1), (cfg.prompts, count))
        x0 = jax.vmap(jax.vmap(model.noise))(keys)
        advantage = jnp.tile(jnp.linspace(-2.0, 2.0, count), (cfg.prompts, 1))
        options = device.compiler_options("bf16", cfg.learn.deterministic)
        jitted = jax.jit(functools.partial(learn.gradients, model=model, cfg=cfg), compiler_options=options)
        step = Ahead(jitted, case.options)
        given = state._replace(lora=moved), state, frozen, cond, *map(split, (keys, algos.Sample(x0), advantage))
        found = [jax.device_get(step(*given)[0]) for _ in range(runs)]
    return [{path: np.asarray(x, np.float64) for path, x in leaves_by_path(g).items()} for g in found]


def network(cfg: Config, mesh: Mesh) -> tuple[Any, PyTree, PyTree]:
    """(the model, its base, texts ~ N(0, 1)) in the config's dtype, with values that bfloat16 has."""
    coarse, fine = (shapes.read(config.override(cfg, **{"model.dtype": t}), 1) for t in ("bfloat16", cfg.model.dtype))
    base, cond = coarse.frozen.base, coarse.prompts.cond
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), sharding.specs_of(base))
    texts = jax.tree.map(lambda x: 50 * x, drawn(cond, NamedSharding(mesh, sharding.SPLIT)))

    def cast(values: PyTree, like: PyTree) -> PyTree:
        return jax.tree.map(lambda x, to: x.astype(jnp.bfloat16).astype(to.dtype), values, like)

    return fine.model, cast(drawn(base, places), fine.frozen.base), cast(texts, fine.prompts.cond)


def shallow(cfg: Config, layers: str) -> None:
    """Set the numbers of blocks in a public model's configs; a folder with weights of its own stays as it is."""
    file = Path(cfg.model.path) / "transformer/config.json"
    if layers != "0" and not list(file.parent.glob("*.safetensors*")):
        few = dict(zip(("num_layers", "num_single_layers"), map(int, layers.split(",")), strict=True))
        file.write_text(json.dumps(json.loads(file.read_text()) | few))


def size(g: Gradient) -> float:
    return float(np.sqrt(sum(np.sum(x**2) for x in g.values())))


def difference(found: Gradient, other: Gradient) -> dict[str, Any]:
    """|found - other| / |other| over all leaves."""
    apart = size({path: found[path] - other[path] for path in other}) / size(other)
    return results.figure(apart, "|g' - g| / |g|", 1)
