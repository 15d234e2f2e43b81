"""FLUX.1-dev on the eight cards of one host: the paper's own iteration, 48 prompts x 96 candidates, 24 kept.

    python -m experiments.flux_eight.run                                     # 8 GPUs
    python -m experiments.flux_eight.run --processes=8 --forms=branch        # the same with one process a card
    python -m experiments.flux_eight.run --config=sd35 --forms=branch        # and sana, at 1024 px
    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_DISABLE_MOST_OPTIMIZATIONS=1 \
        python -m experiments.flux_eight.run --short --out=/tmp/e.json       # the small world; minutes on a CPU

Random weights at full size. Each form is one iteration, compiled before it runs: seconds of every stage, prompts a
second and peak memory of every card, also of several processes'. `one card` has the prompts of one of the cards, so
with perfect scaling it takes as long; the branch's efficiency is against it. Low precision is what the cards have, FP8
on an H100 or H200. Of FLUX the paper's seconds stand beside. The file is written after every figure; a form that runs
out of memory is recorded as failed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments import fields, results
from experiments.flux_multi_gpu.run import Record, measured, over, totals
from experiments.full_size import alike
from experiments.hosts.paper import free_address
from solrl_jax import config, device, processes
from solrl_jax.config import Config
from solrl_jax.plan import shapes
from solrl_jax.run import assemble

HERE = Path(__file__).resolve().parent


class Form(NamedTuple):
    """A recipe on all cards or on one, with the base whole on each card or over all of them."""

    recipe: str
    all_cards: bool = True
    in_parts: bool = False


FORMS = {
    "branch, base over the cards": Form("branch", in_parts=True),
    "branch, one card": Form("branch", all_cards=False),
    "branch": Form("branch"),
    "sol_rl": Form("sol_rl"),
    "naive_scaling": Form("naive_scaling"),
}
"""In the order of their memory, for JAX tells the peak of a process."""
PAPER = {"naive_scaling": {"rollout": 184.0, "iteration": 274.0}, "sol_rl": {"rollout": 79.0, "iteration": 169.0}}
"""Seconds on eight B200 with two stages in NVFP4 (arXiv 2604.06916, its table of FLUX.1 at 512 px)."""
SHORT = {
    "config": "tiny",
    "prompts": 8,
    "set": [("learn.updates", "1")],
}
"""The small world's defaults of the arguments."""


def figures_of(
    found: Mapping[str, Sequence[dict[str, float]]], prompts: Mapping[str, int], cards: int
) -> dict[str, dict]:
    """Rollouts, prompts a second, and efficiency against `one card` where that ran; `found` is seconds by form."""
    out = {}
    for name, rows in found.items():
        rate = [prompts[name] / seconds for seconds in totals(rows)]
        out[f"{name}: prompts a second"] = results.figure(rate[0], "1/s", 1)
        out[f"{name}: rollout"] = results.figure(sum(rows[0].values()) - rows[0]["learn"], "s, all but learn", 1)
        if alone := found.get(f"{name}, one card"):
            one = [prompts[f"{name}, one card"] / seconds for seconds in totals(alone)]
            out[f"{name}: efficiency"] = over([x / cards for x in rate], one, "of perfect scaling")
    return out


def config_of(form: Form, name: str, prompts: int, cards: int, words: Mapping[str, str]) -> Config:
    """The form's config; of one card with as many of the prompts as each of all has."""
    if prompts % cards:
        raise SystemExit(f"--prompts={prompts}: {cards} cards do not divide them")
    here = prompts if form.all_cards else prompts // cards
    more = {"prompts": str(here), "shard": str(cards if form.in_parts else 1)}
    return config.load(f"{name}:{form.recipe}", {**words, **more})


def run(args: argparse.Namespace, record: Record) -> None:
    cards, found, prompts = len(jax.devices()), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.forms:
            form = FORMS[name]
            named = config_of(form, args.config, args.prompts, cards, alike(args.config, args.set))
            cfg, prompts[name] = (
                assemble.resolved(shapes.with_configs(named, folder), assemble.capability()),
                named.prompts,
            )
            if rows := measured(record, name, cfg, cards if form.all_cards else 1, 1):
                found[name] = rows
                record(figures_of(found, prompts, cards))
            if (args.config, args.prompts, args.set) == ("flux", 48, {}) and (paper := PAPER.get(name)):
                figures = {
                    f"{name}: {what}, the paper's": results.figure(s, "s, 8 B200", 1) for what, s in paper.items()
                }
                record(figures)


# --- processes ------------------------------------------------------------------------------------------------------


def a_process_a_card(count: int, argv: Sequence[str]) -> int:
    """This command in `count` processes, each with a card of its own; the exit code of one that failed.

    JAX is not asked here how many cards there are: it would take their memory.
    """
    where, running = free_address(), []
    for i in range(count):
        command = [sys.executable, "-m", "experiments.flux_eight.run", *argv, f"--process={i},{count},{where}"]
        running.append(subprocess.Popen(command, env={**os.environ, **of_card(i)}))
    while None in (codes := [one.poll() for one in running]) and not any(codes):
        time.sleep(1)
    for one in running:  # one that failed leaves the others waiting for it
        if one.poll() is None:
            one.terminate()
    return next(filter(None, codes), 0)


def of_card(i: int) -> dict[str, str]:
    """Environment of a process that has the i-th card alone, and of a CPU one device."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if not flag.startswith("--xla_force_host_platform_device_count")]
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return {"CUDA_VISIBLE_DEVICES": cards.split(",")[i] if cards else str(i), "XLA_FLAGS": " ".join(kept)}


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="flux", help="flux, sd35, sana")
    parser.add_argument("--forms", default="", help=f"of {'; '.join(FORMS)}, with semicolons; all if not given")
    parser.add_argument("--prompts", type=int, default=48, help="of an iteration, over all cards")
    fields.add_argument(parser)
    parser.add_argument("--short", action="store_true", help="other defaults, for the small world on a CPU")
    parser.add_argument("--processes", type=int, help="one a card, so many; without the forms of one card")
    parser.add_argument("--process", help="of one of them: its number, how many, and where the first one is")
    parser.add_argument("--out", type=Path, help="default: results/CONFIG.json, with _processes where they are several")
    args = parser.parse_args(argv)
    if args.short:
        parser.set_defaults(**SHORT)
        args = parser.parse_args(argv)
    several = args.processes or args.process
    possible = [name for name, form in FORMS.items() if form.all_cards or not several]
    args.forms = [name.strip() for name in args.forms.split(";")] if args.forms else possible
    if strange := [name for name in args.forms if name not in possible]:
        parser.error(f"--forms: {'; '.join(strange)} unknown, take {'; '.join(possible)}")
    args.set = dict(args.set)
    args.out = args.out or HERE / f"results/{args.config}{'_processes' if several else ''}.json"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    if args.processes and not args.process:
        raise SystemExit(a_process_a_card(args.processes, sys.argv[1:] if argv is None else argv))
    device.setup()
    facts: dict[str, Any] = {"prompts": args.prompts, "processes": 1}
    if args.process:
        number, count, where = args.process.split(",")
        processes.join(where, int(count), int(number))
        facts["processes"] = int(count)
    assemble.use_compilation_cache()
    run(args, Record(args.out, **facts))


if __name__ == "__main__":
    main()
