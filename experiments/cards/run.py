"""Which GPUs a FLUX trains on, by the plan: how many, at which setting, and what gathering the weights costs.

    python -m experiments.cards.run --out=experiments/cards/results/flux.json                # no GPU, 15 minutes
    python -m experiments.cards.run --config=tiny --cases=1 --out=/tmp/cards.json            # the path in short

Nothing is measured: memory and seconds are the plan's (`--mode=plan`). A case is planned as the config is, with as few
shards as will do; for what does not fit, the plan's own remedies are taken, and it is planned again. The model of 20 B
parameters is FLUX.1-dev with 32 and 64 blocks instead of 19 and 38.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from experiments import results
from solrl_jax import config, device, plan
from solrl_jax.config import Config
from solrl_jax.models import public
from solrl_jax.plan import shapes
from solrl_jax.weights import hub

LARGE = {"num_layers": 32, "num_single_layers": 64}


class Case(NamedTuple):
    devices: int
    card: str
    large: bool = False  # the model of 20 B parameters


CASES = (
    *(Case(1, "RTX 4090 24GB"), Case(1, "A100 40GB"), Case(1, "L40S 48GB"), Case(2, "RTX 4090 24GB")),
    *(Case(4, "RTX 4090 24GB"), Case(8, "RTX 4090 24GB"), Case(2, "A100 40GB"), Case(8, "H100 80GB")),
    *(Case(1, "H100 80GB", large=True), Case(8, "H100 80GB", large=True)),
)
LINKS = ("NVLink", "PCIe 4 x16", "400 Gb/s a GPU")


def large(cfg: Config, folder: Path) -> Config:
    """`cfg` with the model of 20 B parameters, as configs alone."""
    network = "transformer/config.json"
    files = public.FLUX_DEV | {network: public.FLUX_DEV[network] | LARGE}
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, path=str(hub.write_configs(folder, files))))


def fitted(cfg: Config, case: Case) -> plan.Plan:
    """The plan of `cfg`, changed by the remedies of the stages that do not fit."""
    found, card = plan.plan(cfg, case.devices, case.card), plan.CARDS[case.card]
    changes: dict[str, str] = {}
    for use in found.uses:
        if use.total > plan.room(card):
            changed = config.override(found.cfg, **changes)
            changes |= plan.remedied(use, changed, found.sizes, case.devices, card)[0]
    return plan.plan(config.override(cfg, **changes), case.devices, case.card) if changes else found


def named(found: plan.Plan, name: str) -> str:
    """The case with its setting: shards, images of a chunk in both rollouts, points of a micro-batch."""
    cfg = found.cfg
    chunks = "/".join(str(stage.chunk) for _, stage, _ in cfg.stages())
    keeps = "+".join(cfg.model.remat_keeps) or "nothing"
    how = f"chunk {chunks}, micro_batch {cfg.learn.micro_batch}, remat keeps {keeps}, encode_ahead {cfg.encode_ahead}"
    return f"{name}, {found.devices} x {found.card}, shard={cfg.shard}, {cfg.low_precision or 'bf16'}, {how}"


def figures_of(found: plan.Plan, name: str) -> dict[str, dict[str, Any]]:
    """A case's GB by stage, and, if it fits, seconds of an iteration a prompt, without and with each link."""
    label, most = named(found, name), plan.room(plan.CARDS[found.card])
    fits = all(use.total <= most for use in found.uses)
    out = {f"{label}: {use.stage}": results.figure(round(use.total / 1e9, 1), "GB", 1) for use in found.uses}
    out[f"{label}: usable"] = results.figure(round(most / 1e9, 1), "GB", 1)
    out[f"{label}: fits"] = results.figure(float(fits), "1: yes", 1)
    each = plan.spent(found.uses)
    waits = {"seconds": 0.0} | {link: plan.waiting(found.uses, plan.LINKS[link]) for link in LINKS}
    for what, more in waits.items():
        value = round((each + more) / found.cfg.prompts, 2) if fits else None
        out[f"{label}: {what}"] = results.figure(value, "s an iteration and prompt", 1)
    return out


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="flux")
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many of the cases")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cfg = shapes.with_configs(config.load(args.config), folder)
        for case in CASES[: args.cases]:
            model = large(cfg, Path(folder) / "large") if case.large else cfg
            found = fitted(model, case)
            name = "20 B" if case.large else "FLUX.1-dev" if args.config.startswith("flux") else args.config
            figures |= figures_of(found, name)
            print(named(found, name), *found.advice, sep="\n  ", flush=True)
    results.record(args.out, figures, config=config.to_json(config.load(args.config)))


if __name__ == "__main__":
    main()
