"""Does a short low-precision rollout rank candidates as the full BF16 rollout does? For base and trained policy.

    python -m experiments.ranks --run=RUN          # RUN's LoRA as the second policy; minutes on two CPU cores

Every candidate is rolled out from the same noise by each preview and by the full rollout (BF16, 10 steps), whose
CLIPScores are the truth. BF16 with equally few steps separates the cost of the steps from that of the precision. Three
figures, means over captions: Spearman; the share of the true best K/2 among the K/2 chosen as best; and the kept
contrast, the true mean of the chosen best minus that of the chosen worst, divided by that of a perfect choice.
"""

import argparse
import functools
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float

from experiments import lab, results
from experiments.tiny import check
from solrl_jax import config, device, lora, sharding
from solrl_jax.config import Stage
from solrl_jax.quant import calibrate
from solrl_jax.rollout import policy_variables, quantised, rollout
from solrl_jax.selection import fidelity
from solrl_jax.structs import PyTree
from solrl_jax.weights import lora_files

PRECISIONS: dict[str, config.Precision] = {"BF16": "bf16", "FP8": "fp8", "NVFP4": "nvfp4_emulated"}
PREVIEWS: dict[str, tuple[config.Precision, int]] = {
    **{f"{name}, {steps} steps": (p, steps) for name, p in PRECISIONS.items() for steps in (2, 4, 6, 8)},
    **{f"{name}, 10 steps": (PRECISIONS[name], 10) for name in ("FP8", "NVFP4")},
}
FULL: tuple[config.Precision, int] = ("bf16", 10)
NAMES = {"spearman": "Spearman", "kept_contrast": "kept contrast"}


def rewards(opened: lab.Opened, adapter, captions: int, candidates: int, chunk: int) -> dict[tuple[str, int], Array]:
    """CLIPScores [captions, candidates] of the same noise by every preview and by the full rollout."""
    parts, cfg = opened.parts, opened.parts.cfg
    prompts = jax.tree.map(lambda x: x[:captions], opened.held_out["test"][1])
    keys = jax.random.split(jax.random.key(0), (captions, candidates))
    kernels = lora.merged_kernels(parts.frozen.base, adapter, cfg.lora)
    some = jax.tree.map(lambda x: x[: calibrate.PROMPTS], prompts.cond)
    full = Stage(FULL[1], cfg.regenerate.solver, FULL[0], chunk)
    model = calibrate.calibrated(parts.model, {"params": parts.frozen.base}, some, jax.random.key(0), [full])
    low: dict[str, PyTree] = {"bf16": None}
    for precision in ("fp8", "nvfp4_emulated"):
        quantise = functools.partial(quantised, model=model, precision=precision)
        low[precision] = jax.jit(quantise)(kernels, parts.frozen)
    out = {}
    for precision, steps in (*PREVIEWS.values(), FULL):
        stage = Stage(steps, cfg.regenerate.solver, precision, chunk)
        variables = policy_variables(kernels, low[precision], parts.frozen)
        roll = jax.jit(functools.partial(_reward, model=model, score=parts.score, stage=stage))
        out[precision, steps] = roll(variables, parts.frozen, prompts, keys)
    return out


def _reward(*args, **statics) -> Float[Array, "P N"]:
    return rollout(*args, **statics).reward


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run's folder or a LoRA file")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--candidates", type=int, default=24)
    parser.add_argument("--kept", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=24)
    parser.add_argument("--out", type=Path, default=check.HERE / "results/ranks.json")
    args = parser.parse_args(argv)
    figures = {}
    with jax.set_mesh(sharding.make_mesh(1)):
        opened = lab.open_world(config.load("tiny:sol_rl"), args.prompts)
        nothing = jax.tree.map(lambda x: x[0], lab.base_adapter(opened))
        policies = {"base": nothing}
        if args.run:
            parts = opened.parts
            policies["trained"] = lora_files.load(
                args.run, parts.frozen.base, parts.model.keys, parts.cfg.lora, parts.model.comfy
            ).adapter
        for who, adapter in policies.items():
            found = rewards(opened, adapter, args.prompts, args.candidates, args.chunk)
            for name, preview in PREVIEWS.items():
                for what, each in fidelity(found[preview], found[FULL], args.kept).items():
                    each = np.asarray(each)
                    figure = results.figure(
                        float(each.mean()), "95 % bootstrap interval over captions", each.size, lab.interval(each)
                    )
                    what = f"overlap of the best {args.kept // 2}" if what == "overlap" else NAMES[what]
                    figures[f"{who}, {name}: {what}"] = figure
                    print(f"{figure['value']:.3f} {figure['spread']}  {who}, {name}: {what}", flush=True)
    results.record(args.out, figures, run=str(args.run or ""))


if __name__ == "__main__":
    main()
