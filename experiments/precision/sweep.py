"""NVFP4 kernels with block scales swept for least error: what it saves of the error, and whether previews rank better.

    python -m experiments.precision.sweep --run=experiments/tiny/results/long.safetensors    # a quarter of an hour, CPU
    python -m experiments.precision.sweep --prompts=4 --out=/tmp/s.json                             # a short run

A block's scale is NVIDIA's (its largest at 6, rounded to e4m3) or the one of least squared error among e4m3 values
beside it. Inputs are quantised as ever. Squared errors are shares of the kernels' squares: a Gaussian kernel, and the
small world's. Ranks: 24 candidates a caption, NVFP4 previews against BF16 with 10 steps from the same noise. Kernels in
f32 with NVFP4 inputs show what is left to gain. "more" is the figure less NVIDIA's of the same captions.
"""

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from experiments import lab, results
from experiments.branch import contrast
from experiments.ranks import FULL, NAMES
from solrl_jax import config, device, lora, quant, rollout, sharding
from solrl_jax.config import Stage
from solrl_jax.quant import nvfp4
from solrl_jax.selection import fidelity
from solrl_jax.structs import Params, QuantRule, leaves_by_path

HERE = Path(__file__).resolve().parent
PRECISION = "nvfp4_emulated"
NVIDIA = "NVIDIA's"
SWEEPS = {
    NVIDIA: (),
    "4, 5": (4, 5),
    "-1 to 1": (-1, 1),
    "-2 to 2": (-2, -1, 1, 2),
    "-1 to 4": (-1, 1, 2, 3, 4),
    "-2 to 5": nvfp4.SWEEP,
    "-3 to 6": (-3, -2, -1, 1, 2, 3, 4, 5, 6),
    "-8 to 12": tuple(range(-8, 13)),
}
"""The e4m3 values that are tried beside NVIDIA's, by their distance in codes."""
RANKED = {NVIDIA: (), "-2 to 5": SWEEPS["-2 to 5"], "not quantised": None}
PREVIEW = 6


def kernels_of(params: Params, rule: QuantRule) -> dict[str, Array]:
    """{path: kernel [*layers, in, out]} of those that are quantised."""
    return {path: leaves_by_path(params)[path] for path in quant.chosen(params, rule)}


def errors(kernels: Sequence[Array], sweep: Sequence[int]) -> float:
    """Squared error of all kernels [*layers, in, out] as a share of their squares."""

    @jax.jit
    def both(kernel: Array) -> Array:
        w = kernel.astype(jnp.float32)
        error = nvfp4.quantise(w, sweep=sweep).dequantise() - w
        return jnp.stack([jnp.sum(error * error), jnp.sum(w * w)])

    error, square = np.sum([np.asarray(both(k), np.float64) for k in kernels], axis=0)
    return float(error / square)


def low(kernels: Mapping[str, Array], sweep: Sequence[int] | None) -> Params:
    """The explorer's `quant` collection, unpacked; with None kernels stay f32 and only inputs are quantised."""

    def made(kernel: Array) -> nvfp4.Unpacked:
        if sweep is not None:
            return nvfp4.unpacked(nvfp4.quantise(kernel, sweep=sweep))
        return nvfp4.Unpacked(jnp.swapaxes(kernel, -1, -2).astype(jnp.float32), jnp.ones(kernel.shape[:-2]))

    return traverse_util.unflatten_dict({path: made(k) for path, k in kernels.items()}, sep="/")


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run's folder or a LoRA file: the second policy")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--kept", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=240, help="pictures at a time, whole captions")
    parser.add_argument("--out", type=Path, default=HERE / "results/sweep.json")
    args = parser.parse_args(argv)
    cfg = config.load("tiny:sol_rl", {"explore.precision": PRECISION, "kept": str(args.kept)})
    sources = {"Gaussian": [jax.random.normal(jax.random.key(0), (3072, 1024))]}
    figures, gains = {}, {}
    with jax.set_mesh(sharding.make_mesh(1)):
        opened = lab.open_world(cfg, args.prompts)
        parts = opened.parts
        rule = quant.rule_of(parts.model.quant_rules, PRECISION)
        for who, adapter in lab.policies(opened, args.run).items():
            bench = contrast.of_policy(opened, adapter, (), 0, args.prompts)
            kernels = kernels_of(lora.graft(parts.frozen.base, bench.kernels), rule)
            sources[who] = list(kernels.values())
            found = rewards(bench, kernels, args.chunk)
            figures |= ranked(who, found, args.kept, gains)
            results.record(args.out, figures, run=str(args.run or ""))
    if len(sources) > 2:
        figures |= {f"both, {name}": of_captions(np.mean(each, axis=0)) for name, each in gains.items()}
    figures |= errors_of(sources)
    results.record(args.out, figures, run=str(args.run or ""))


def errors_of(sources: Mapping[str, Sequence[Array]]) -> dict[str, dict]:
    out = {}
    for name, sweep in SWEEPS.items():
        for source, kernels in sources.items():
            error = errors(kernels, sweep)
            least = out.get(f"{NVIDIA}: {source}", {"value": error})["value"]
            out[f"{name}: {source}"] = results.figure(error, "squared error, of the kernels' squares", len(kernels))
            out[f"{name}: {source}, change"] = results.figure(error / least - 1, "of NVIDIA's", len(kernels))
        print(name, {k: round(f["value"], 5) for k, f in out.items() if k.startswith(f"{name}:")}, flush=True)
    return out


def rewards(bench: contrast.Bench, kernels: Mapping[str, Array], chunk: int) -> dict[str, Float[Array, "P N"]]:
    """CLIPScores of the same noise by every preview of RANKED, and by the full rollout under its precision."""
    parts = bench.opened.parts
    solver, at_once = parts.cfg.regenerate.solver, min(chunk, bench.keys.size)
    made = {name: jax.jit(functools.partial(low, sweep=sweep))(kernels) for name, sweep in RANKED.items()}
    roll = functools.partial(rollout.rolled, model=parts.model, score=parts.score)
    preview = jax.jit(functools.partial(roll, stage=Stage(PREVIEW, solver, PRECISION, at_once)))
    full = jax.jit(functools.partial(roll, stage=Stage(FULL[1], solver, "bf16", at_once)))
    given = parts.frozen, bench.prompts, bench.keys
    out = {name: preview(bench.kernels, q, *given).reward for name, q in made.items()}
    return out | {FULL[0]: full(bench.kernels, None, *given).reward}


def ranked(who: str, found: Mapping[str, Array], kept: int, gains: dict[str, list[np.ndarray]]) -> dict[str, dict]:
    """Figures of a policy; what each caption gains over NVIDIA's scales is added to `gains`."""
    out, first = {}, {}
    for name in RANKED:
        for what, each in fidelity(found[name], found[FULL[0]], kept).items():
            what, each = NAMES.get(what, what), np.asarray(each)
            out[f"{who}, {name}: {what}"] = of_captions(each)
            more = each - first.setdefault(what, each)
            if name != NVIDIA:
                out[f"{who}, {name}: {what}, more"] = of_captions(more)
                gains.setdefault(f"{name}: {what}, more", []).append(more)
    for name, f in out.items():
        print(f"{f['value']:.4f} {f['spread']}  {name}", flush=True)
    return out


def of_captions(each: np.ndarray) -> dict[str, Any]:
    return results.figure(float(each.mean()), "95 % bootstrap over captions", each.size, lab.interval(each))


if __name__ == "__main__":
    main()
