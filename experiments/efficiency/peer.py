"""The transformer's forward pass by PyTorch: diffusers', compiled, in bfloat16 and in torchao's row-wise FP8.

    pip install diffusers torchao                                            # beside PyTorch with CUDA
    python -m experiments.efficiency.peer --model=flux --out=experiments/efficiency/results/peer/flux.json    # an H100
    python -m experiments.efficiency.peer --model=tiny --batch=2 --precisions=bf16 --out=/tmp/p.json  # in short

Full size, random weights, `--batch` images, medians of `--repeat` calls after two. Ours is `experiments.full_size
--only=encode,forward --forward=bf16:24,fp8:24`, on the same card. On a CPU nothing is compiled. The weights are the
same in every precision; torchao quantises the Linears of the blocks, rows of kernels and of inputs with a scale each.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import torch
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from experiments import results
from solrl_jax import config
from solrl_jax.plan import shapes

CLASSES = {
    "flux": FluxTransformer2DModel,
    "sd35": SD3Transformer2DModel,
    "sana": SanaTransformer2DModel,
}
"""By the name of our model module."""
PRECISIONS = ("bf16", "fp8")
BF16 = torch.bfloat16


def network(cfg: config.Config, folder: Path, place: str) -> torch.nn.Module:
    """diffusers' transformer of the pipeline's config, with its own random weights in bfloat16."""
    kind = CLASSES[cfg.model.name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    try:
        with torch.device(place):
            made = kind.from_config(kind.load_config(folder / "transformer"))
    finally:
        torch.set_default_dtype(before)
    return made.to(BF16).eval().requires_grad_(False)


def inputs(cfg: config.Config, model: Any, batch: int, place: str) -> dict[str, Any]:
    """What the transformer takes for `batch` images of the config's size."""
    how: dict[str, Any] = {"device": place, "dtype": BF16}
    length, name = cfg.model.text_tokens, cfg.model.name
    time_of = {"timestep": torch.full((batch,), 0.5 if name == "flux" else 500.0, **how)}
    if name == "flux":
        side = cfg.model.size // 16
        given = {
            "hidden_states": torch.randn(batch, side * side, model.config.in_channels, **how),
            "encoder_hidden_states": torch.randn(batch, length, model.config.joint_attention_dim, **how),
            "pooled_projections": torch.randn(batch, model.config.pooled_projection_dim, **how),
            "img_ids": torch.zeros(side * side, 3, **how),
            "txt_ids": torch.zeros(length, 3, **how),
        }
        if model.config.guidance_embeds:
            given["guidance"] = torch.ones(batch, **how)
        return given | time_of
    side = cfg.model.size // (8 if name == "sd35" else 32)
    image = torch.randn(batch, model.config.in_channels, side, side, **how)
    if name == "sd35":  # CLIP's 77 tokens, then T5's
        words = torch.randn(batch, 77 + length, model.config.joint_attention_dim, **how)
        pooled = torch.randn(batch, model.config.pooled_projection_dim, **how)
        return {"hidden_states": image, "encoder_hidden_states": words, "pooled_projections": pooled} | time_of
    words = torch.randn(batch, length, model.config.caption_channels, **how)
    return {"hidden_states": image, "encoder_hidden_states": words} | time_of


def quantised(model: torch.nn.Module, tuned: bool) -> None:
    """The blocks' Linears in FP8, in place: kernels and inputs with a scale a row.

    `tuned` sets what torchao recommends for Inductor, a search over every kernel's launches among it.
    """
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quantize_,
    )

    def of_a_block(module: torch.nn.Module, name: str) -> bool:
        modulation = any(part in name for part in (".norm.", ".norm1.", ".norm1_context."))
        return isinstance(module, torch.nn.Linear) and "blocks." in name and not modulation

    how = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=tuned)
    quantize_(model, how, filter_fn=of_a_block)


def timed(call: Callable[[], Any], repeat: int, place: str) -> tuple[list[float], float]:
    """Seconds of `repeat` calls after two, and how much longer the first took."""
    seconds = []
    for _ in range(repeat + 2):
        began = time.perf_counter()
        call()
        if place == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[2:], seconds[0] - statistics.median(seconds[2:])


def machine(place: str) -> dict[str, Any]:
    """PyTorch's device and versions, in the places of JAX's."""
    if place == "cpu":
        return {"versions": versions("torch", "diffusers")}
    return {"device": f"1 x {torch.cuda.get_device_name()}", "versions": versions("torch", "diffusers", "torchao")}


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}


def main(argv: list[str] | None = None) -> None:
    jax.config.update("jax_platforms", "cpu")  # else JAX would reserve the card's memory
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux", help="a config: flux, sd35, sana")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="with commas")
    parser.add_argument("--tuned", action="store_true", help="FP8 with torchao's settings of Inductor: > 5 min on FLUX")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    wanted = args.precisions.split(",")
    if strange := set(wanted) - set(PRECISIONS):
        parser.error(f"--precisions={args.precisions}: {', '.join(sorted(strange))} is unknown, use {PRECISIONS}")
    place = "cuda" if torch.cuda.is_available() else "cpu"
    figures: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        cfg = shapes.with_configs(config.load(f"{args.model}:sol_rl"), folder)
        model: Any = network(cfg, Path(cfg.model.path), place)
        given = inputs(cfg, model, args.batch, place)
        for precision in wanted:
            if precision == "fp8":
                quantised(model, args.tuned)
            if place == "cuda":
                torch.compiler.reset()
                model.compile_repeated_blocks(fullgraph=True)
            seconds, compiling = timed(lambda: model(**given, return_dict=False), args.repeat, place)
            name = f"PyTorch, {precision} forward of {args.batch}"
            figures[name] = results.figure(
                statistics.median(seconds), "s; median [least, most]", args.repeat, [min(seconds), max(seconds)]
            )
            figures[f"{name}: compile"] = results.figure(compiling, "s", 1)
            print(f"{statistics.median(seconds):9.4f} s  {name} (+{compiling:.1f} s)", flush=True)
            results.record(args.out, figures, model=args.model, **machine(place))


if __name__ == "__main__":
    main()
