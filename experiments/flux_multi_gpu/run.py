"""FLUX.1-dev on the cards of one host: scaling, the base over several cards, pipelined gathers, equal gradients.

    python -m experiments.flux_multi_gpu.run --part=scaling --devices=1,2,4 --repeat=3
    python -m experiments.flux_multi_gpu.run --part=shards --devices=4 --shard=4 --settings=named
    python -m experiments.flux_multi_gpu.run --part=shards --devices=4 --shard=4 --settings=default
    python -m experiments.flux_multi_gpu.run --part=shards --devices=4 --shard=4 --settings=named --limit=23.2
    python -m experiments.flux_multi_gpu.run --part=pipelined --devices=4 --shard=4 --settings=named
    python -m experiments.flux_multi_gpu.run --part=gradients --devices=1,2,4 --shard=4
    python -m experiments.flux_multi_gpu.run --part=ahead --devices=2 --each=4 --set=candidates=24 --set=kept=6

    export XLA_FLAGS=--xla_force_host_platform_device_count=2 JAX_DISABLE_MOST_OPTIMIZATIONS=1  # a minute or two each
    python -m experiments.flux_multi_gpu.run --short --part=scaling --devices=1,2 --out=/tmp/s.json   # in short
    python -m experiments.flux_multi_gpu.run --short --part=shards --devices=2 --out=/tmp/s.json      # in short
    python -m experiments.flux_multi_gpu.run --short --part=pipelined --devices=2 --out=/tmp/s.json   # in short
    python -m experiments.flux_multi_gpu.run --short --part=gradients --devices=1,2 --out=/tmp/s.json # in short
    python -m experiments.flux_multi_gpu.run --short --part=ahead --devices=2 --each=2 --out=/tmp/s.json  # in short

Random weights at full size, `--each` prompts a card, so that perfect scaling keeps the seconds and multiplies the
prompts. Figures are medians of `--repeat` iterations after a first one, [least, most] of them; every ratio is of one
process. The file is written after every figure. A form that runs out of memory is recorded as failed.

scaling      prompts a second and efficiency on 1, 2, 4 cards, seconds of each stage, peak memory of each card
shards       the base over `--shard` cards against whole on each, at a setting for cards of 24 GB (`--chunk`,
             `--micro_batch`, `--keeps`) and at the config's own; with `--limit` GB for JAX's allocator on each
             card, in parts alone
pipelined    the base over several cards, with XLA's pipelined all-gathers against without
gradients    gradients.py
ahead        a rollout whose next block is enqueued while one runs (iteration.AHEAD) against one that waits for the
             slowest card after every block; several prompts a card, for else there is one block
"""

import argparse
import functools
import gc
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import fields, results
from experiments.flux_multi_gpu import gradients
from experiments.full_size import Ahead, Bench, Options, Times, alike, in_turns
from solrl_jax import config, device, iteration, processes
from solrl_jax.config import Config
from solrl_jax.plan import shapes
from solrl_jax.run import assemble

RENAMED = jax.__version_info__ >= (0, 11)  # the option, which takes a mode since
PIPELINED: Options = (
    {"xla_gpu_pipeline_all_gather": "COLLECTIVE_PIPELINING_MODE_ON"}
    if RENAMED
    else {"xla_gpu_enable_pipelined_all_gather": True}
)
FORMS: dict[str, tuple[bool, Options | None]] = {
    "parts": (True, None),
    "parts, pipelined": (True, PIPELINED),
    "whole": (False, None),
}
"""Of the base: whether it lies in parts, and XLA's options. In the order of their memory, for JAX tells the peak of a
process: a form's own is known where it exceeds that of the forms before."""
HERE = Path(__file__).resolve().parent
SHORT = {
    "config": "tiny",
    "repeat": 1,
    "shard": 2,
    "settings": "named",
    "chunk": "2",
    "dtypes": "float32",
    "set": [
        *(("candidates", "4"), ("kept", "2"), ("explore.chunk", "4"), ("regenerate.chunk", "2")),
        *(("learn.updates", "1"), ("learn.micro_batch", "4")),
    ],
}
"""The small world's defaults of the arguments."""
OF_PART = {"shards": ("parts", "whole"), "pipelined": ("parts", "parts, pipelined")}
ONE_NUMBER = {*OF_PART, "ahead"}
"""Parts that run on one number of cards."""
RATIOS = (("parts", "whole"), ("parts, pipelined", "parts"), ("parts, pipelined", "whole"))
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


class Record:
    """The figures of a part, in a file that is written anew with every one."""

    def __init__(self, file: Path, **facts: Any):
        self.file, self.facts, self.figures = file, facts, dict[str, Any]()

    def __call__(self, figures: dict[str, Any]) -> None:
        self.figures |= figures
        if processes.first():
            results.record(self.file, self.figures, **self.facts)

    def named(self, name: str) -> Callable[[dict[str, Any]], None]:
        """Adds figures as `NAME: FIGURE`."""
        return lambda figures: self({f"{name}: {k}": f for k, f in figures.items()})


class Together(Bench):
    """The bench of one of several processes: its peaks are those of the cards of all."""

    def peak(self, name: str) -> None:
        super().peak(name)
        if name in self.figures:  # a CPU has none, in any process
            told = processes.exchanged(json.dumps(self.figures[name]), merged)
            self.figures[name] = json.loads(told)
            self.written(self.figures)


def merged(texts: Sequence[str]) -> str:
    """The peaks of several processes, as JSON, as one: each card's in the processes' order. It is an upper bound if the
    highest is."""
    peaks = [json.loads(text) for text in texts]
    each = [gb for peak in peaks for gb in peak["spread"] or [round(peak["value"], 3)]]
    highest = max(peaks, key=lambda peak: peak["value"])
    unit = "GB, the most of all cards [each]" + "".join(highest["unit"].partition(":")[1:])
    return json.dumps(results.figure(highest["value"], unit, len(each), each))


def measured(record: Record, name: str, cfg: Config, devices: int, repeat: int, options: Options | None = None):
    """Seconds of each of `repeat` iterations by stage, recorded under `name`; nothing if memory ran out."""
    print(f"--- {name}", flush=True)
    mesh = assemble.make_mesh(devices, cfg.shard, cfg.prompts)
    assemble.check_divides(cfg, devices)
    rows = []
    try:
        bench = (Together if processes.count() > 1 else Bench)(cfg, mesh, repeat, written=record.named(name))
        with jax.set_mesh(mesh):
            bench.encode()
            rows = bench.iterations({}, options)
    except jax.errors.JaxRuntimeError as e:  # out of memory: said, and the next form begins
        if processes.count() > 1:  # the others are in this form still
            raise
        record({f"{name}: failed": results.figure(None, str(e)[:300].replace("\n", " "), 0)})
        print(f"{name} failed: {str(e)[:300]}", flush=True)
    bench = None  # its arrays are freed before the next form
    gc.collect()
    return rows


def totals(rows: Sequence[dict[str, float]], stage: str = "iteration") -> list[float]:
    """Seconds of each iteration, or of a stage of it."""
    return [sum(row.values()) if stage == "iteration" else row[stage] for row in rows]


def over(a: Sequence[float], b: Sequence[float], unit: str) -> dict[str, Any]:
    """The ratio of the medians; its spread is that of the farthest repeats."""
    spread = [round(min(a) / max(b), 4), round(max(a) / min(b), 4)]
    value = statistics.median(a) / statistics.median(b)
    return results.figure(value, f"{unit}; of medians [least, most]", len(a), spread if len(a) > 1 else None)


def scaling(args: argparse.Namespace, record: Record, loaded: Callable[..., Config]) -> None:
    """Weights whole on every card, the same prompts a card."""
    found: dict[int, list[float]] = {}
    for devices in args.devices:
        cfg = loaded(prompts=args.each * devices, shard=1)
        rows = measured(record, f"{devices} devices", cfg, devices, args.repeat)
        if not rows:
            continue
        found[devices] = [args.each * devices / seconds for seconds in totals(rows)]
        spread = [min(found[devices]), max(found[devices])] if len(rows) > 1 else None
        rate = results.figure(statistics.median(found[devices]), "1/s; median [least, most]", len(rows), spread)
        record({f"{devices} devices: prompts a second": rate})
        if 1 in found and devices > 1:
            efficiency = over([x / devices for x in found[devices]], found[1], "of perfect scaling")
            record({f"{devices} devices: efficiency": efficiency})
            print(f"efficiency on {devices}: {efficiency['value']:.4f} {efficiency['spread']}", flush=True)


def named_setting(args: argparse.Namespace) -> dict[str, str]:
    """The config words of the setting for cards of 24 GB."""
    words = {"explore.chunk": args.chunk, "regenerate.chunk": args.chunk}
    return words | {"learn.micro_batch": args.micro_batch, "model.remat_keeps": args.keeps}


def forms(args: argparse.Namespace, record: Record, loaded: Callable[..., Config]) -> None:
    """The forms of the part at every setting, and how long one takes over another."""
    settings = {"named": named_setting(args), "default": {}}
    (devices,) = args.devices
    for setting in args.settings:
        found: dict[str, list[dict[str, float]]] = {}
        for form in args.forms:
            in_parts, options = FORMS[form]
            cfg = loaded(prompts=args.each * devices, shard=args.shard if in_parts else 1, **settings[setting])
            if rows := measured(record, f"{setting}, {form}", cfg, devices, args.repeat, options):
                found[form] = rows
        for a, b in RATIOS:
            if a in found and b in found:
                for stage in ("iteration", *found[a][0]):
                    ratio = over(totals(found[a], stage), totals(found[b], stage), "times")
                    record({f"{setting}, {stage}: {a} over {b}": ratio})
                    print(f"{ratio['value']:.4f} {ratio['spread']}  {setting}, {stage}: {a} over {b}", flush=True)


def ahead(args: argparse.Namespace, record: Record, loaded: Callable[..., Config]) -> None:
    """Seconds of a rollout with the next block enqueued and without, in turns, and what the second block takes."""
    (devices,) = args.devices
    cfg = loaded(prompts=args.each * devices, shard=1)
    mesh = assemble.make_mesh(devices, 1, cfg.prompts)
    bench = Bench(cfg, mesh, 1, written=record)
    staged = iteration.Staged(score=bench.sizes.score, **bench.statics)
    staged.jit = {name: Ahead(jitted) for name, jitted in staged.jit.items()} | {"learn": lambda state, *_: (state, {})}
    found: dict[int, list[Times]] = {0: [], 1: []}

    def rollout(blocks: int) -> None:
        times = Times()
        iteration.AHEAD = blocks
        staged(state, bench.frozen, bench.prompts, times)
        found[blocks].append(times)

    with jax.set_mesh(mesh):
        bench.encode()
        state = bench.state()
        for blocks in found:  # compiles, and takes the memory of the smaller form first
            rollout(blocks)
            bench.peak(f"{blocks} blocks ahead: peak")
        in_turns({str(blocks): functools.partial(rollout, blocks) for blocks in found}, args.repeat)
    rows = {blocks: rows[1:] for blocks, rows in found.items()}
    for stage in ("iteration", *(stage for stage in rows[0][0] if stage in ("explore", "regenerate"))):
        of = {blocks: totals(each, stage) for blocks, each in rows.items()}
        name = "rollout" if stage == "iteration" else stage
        for blocks, seconds in of.items():
            bench.note(f"{blocks} blocks ahead: {name}", seconds)
        record({f"{name}: ahead over waiting": over(of[1], of[0], "times")})


def limit(gb: float, card_gb: float | None) -> None:
    """Limit the memory that JAX takes of every card, before it takes any."""
    if card_gb is None:
        ask = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        mib = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()
        card_gb = max(map(int, mib)) * 2**20 / 1e9
    os.environ[FRACTION] = f"{gb / card_gb - 5e-5:.4f}"


def limits() -> list[float]:
    """GB that JAX's allocator has on each card; a CPU has none."""
    return [s["bytes_limit"] / 1e9 for d in jax.devices() if (s := d.memory_stats()) and "bytes_limit" in s]


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="scaling", choices=("scaling", *OF_PART, "gradients", "ahead"))
    parser.add_argument("--short", action="store_true", help="other defaults, for the small world on a CPU")
    parser.add_argument("--config", default="flux")
    parser.add_argument("--devices", help="numbers of cards, with commas; one for shards, pipelined, ahead")
    parser.add_argument("--shard", type=int, default=4, help="cards over which the base lies")
    parser.add_argument("--each", type=int, default=1, help="prompts a card")
    parser.add_argument("--repeat", type=int, default=3, help="iterations, after a first one if there are several")
    parser.add_argument("--settings", default="named,default", help="named, default or both")
    parser.add_argument("--forms", default="", help="only these, with semicolons: parts; parts, pipelined; whole")
    parser.add_argument("--chunk", default="24", help="the named setting's pictures at a time, of both rollouts")
    parser.add_argument("--micro_batch", default="12", help="the named setting's learn.micro_batch")
    parser.add_argument("--keeps", default="", help="the named setting's model.remat_keeps")
    parser.add_argument("--limit", type=float, help="GB of every card that JAX's allocator may take")
    parser.add_argument("--card_gb", type=float, help="GB (1e9 bytes) of a card; default: nvidia-smi's")
    fields.add_argument(parser)
    parser.add_argument("--out", type=Path, help="default: results/PART_SETTING.json")
    gradients.arguments(parser)
    args = parser.parse_args(argv)
    if args.short:
        parser.set_defaults(**SHORT)
        args = parser.parse_args(argv)
    return checked(args, parser)


def checked(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments as lists, numbers and a file's name."""
    args.devices = [int(n) for n in (args.devices or ("4" if args.part in ONE_NUMBER else "1,2,4")).split(",")]
    args.set = alike(args.config, dict(args.set))
    args.settings = args.settings.split(",")
    taken = ("parts",) if args.part == "shards" and args.limit else OF_PART.get(args.part, ())
    args.forms = [form.strip() for form in args.forms.split(";")] if args.forms else taken
    setting = args.settings if args.part in OF_PART and len(args.settings) == 1 else []
    name = "_".join([args.part, *setting, *(["limited"] if args.limit else [])])
    args.out = args.out or HERE / f"results/{name}.json"
    if args.part in ONE_NUMBER and len(args.devices) > 1:
        parser.error(f"--devices={args.devices}: --part={args.part} takes one number of cards")
    if strange := {*args.forms} - {*FORMS}:
        parser.error(f"--forms: {'; '.join(strange)} unknown, take {'; '.join(FORMS)}")
    if strange := {*args.settings} - {"named", "default"}:
        parser.error(f"--settings={','.join(strange)}: take named, default or both")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parsed(argv)
    if args.limit:
        limit(args.limit, args.card_gb)
    device.setup()
    assemble.use_compilation_cache()
    if args.limit and not (0 < max(limits(), default=0.0) <= args.limit):
        raise SystemExit(f"--limit={args.limit}: the allocators' limits are {limits()} GB; give --card_gb, on GPUs")
    with tempfile.TemporaryDirectory() as folder:

        def named(**words: Any) -> Config:
            return config.load(args.config, {**args.set, **{k: str(v) for k, v in words.items()}})

        def loaded(**words: Any) -> Config:
            return assemble.resolved(shapes.with_configs(named(**words), folder), assemble.capability())

        told = named(prompts=args.each * max(args.devices))
        record = Record(args.out, config=config.to_json(told), named=named_setting(args), shard=args.shard)
        if found := limits():
            record({"limit of JAX's memory on a card": results.figure(max(found), "GB", len(found))})
        parts = {"scaling": scaling, "gradients": gradients.run, "ahead": ahead}
        parts.get(args.part, forms)(args, record, loaded)


if __name__ == "__main__":
    main()
