"""Decoding at full size with random weights: up-sampling as one convolution, against the two steps of before.

    python -m experiments.decode.run --out=experiments/decode/results                               # an H100
    python -m experiments.decode.run --models=flux --side=64 --pictures=2 --repeat=1 --out=/tmp/d   # the path in short

Each model's `--pictures` latents become pictures as in a rollout (models.vae.decode), in programs that differ in how
they are written, compiled first and then called in turns. A file a model; figures are medians of `--repeat` calls.
"""

import argparse
import contextlib
import functools
import statistics
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from experiments import results
from experiments.full_size import drawn, in_turns
from solrl_jax import config, device, sharding
from solrl_jax.models import convolutions, dcae, layers, vae
from solrl_jax.plan import shapes
from solrl_jax.run import assemble

DIMS = ("NHWC", "HWIO", "NHWC")


# --- forms that are not the package's -------------------------------------------------------------------------------


def four_convolutions(x: Array, kernel: Array, bias: Array) -> Array:
    """Each of the four pixels by its own 2x2 convolution, then put between each other."""
    (b, h, w, c), out = x.shape, kernel.shape[-1]
    k = convolutions.phase_kernel(kernel).astype(x.dtype).reshape(2, 2, c, 2, 2, out)
    how: dict[str, Any] = {"dimension_numbers": DIMS, "precision": layers.precision_of(x.dtype)}
    # The package's first pixel of a pair is the second of its own: it reads (i, i + 1).
    y = [
        [
            jax.lax.conv_general_dilated(x, k[:, :, :, 1 - r, 1 - s], (1, 1), ((1 - r, r), (1 - s, s)), **how)
            + bias.astype(x.dtype).reshape(1, 1, 1, -1)
            for s in range(2)
        ]
        for r in range(2)
    ]
    return jnp.stack([jnp.stack(row, axis=3) for row in y], axis=2).reshape(b, 2 * h, 2 * w, out)


def transposed(x: Array, kernel: Array, bias: Array) -> Array:
    """One transposed 4x4 convolution of stride 2, which cuDNN has as a gradient; the bias in a kernel of its own."""

    def spread(k: Array) -> Array:
        return jnp.stack([k[0], k[0] + k[1], k[1] + k[2], k[2]])

    k = spread(jnp.moveaxis(spread(kernel.astype(jnp.float32)), 1, 0)).swapaxes(0, 1).astype(x.dtype)
    how: dict[str, Any] = {"dimension_numbers": DIMS, "precision": layers.precision_of(x.dtype), "lhs_dilation": (2, 2)}
    y = jax.lax.conv_general_dilated(x, k, (1, 1), ((2, 2), (2, 2)), **how)
    return y + bias.astype(y.dtype).reshape(1, 1, 1, -1)


def two_passes(groups: int, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(groups, epsilon=vae.EPS, use_fast_variance=False, dtype=jnp.float32, name=name)


class Form(NamedTuple):
    """How a decoder is written; the defaults are the package's on GPUs."""

    up: Callable[[Array, Array, Array], Array] = convolutions._phases
    norm: Callable[[int, str], nn.Module] = lambda groups, name: vae.GroupNorm(groups, name=name)
    scales: str = "gpu"  # whose form of DC-AE's products at other scales

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            scales = types.SimpleNamespace(platform=lambda: self.scales)
            for where, name, form in (
                (convolutions, "_phases", self.up),
                (convolutions, "_repeated", self.up),
                (vae, "_norm", self.norm),
                (dcae, "device", scales),
            ):
                stack.enter_context(mock.patch.object(where, name, form))
            yield


OLD: dict[str, Any] = {"norm": two_passes, "scales": "cpu"}
FORMS = {
    "before": Form(convolutions._repeated, **OLD),
    "package": Form(),
    "up-sampling alone": Form(**OLD),
    "in four convolutions": Form(four_convolutions),
    "transposed convolution": Form(transposed),
}


# --- timing ---------------------------------------------------------------------------------------------------------


def measure(name: str, args: argparse.Namespace) -> dict[str, dict]:
    words = {"model.vae_dtype": args.dtype} | ({"model.size": str(args.side)} if args.side else {})
    with tempfile.TemporaryDirectory() as folder:
        cfg = assemble.resolved(shapes.with_configs(config.load(name, words), folder), assemble.capability())
        sizes = shapes.read(cfg, 1)
        params = drawn(sizes.frozen.vae)
    latents = jax.vmap(sizes.model.noise)(jax.random.split(jax.random.key(0), args.pictures))
    calls, figures, pictures = {}, {}, {}
    for form in args.forms.split(","):
        with FORMS[form].used():
            # A function of its own: jit would find the trace of the form before.
            program = jax.jit(lambda params, latents: sizes.model.decode(params, latents)).lower(params, latents)
            compiled = program.compile()
        calls[form] = functools.partial(compiled, params, latents)
        pictures[form] = jax.block_until_ready(calls[form]())
        memory: Any = compiled.memory_analysis()
        figures[f"{form}: temporary memory"] = results.figure(memory.temp_size_in_bytes / 1e9, "GB", 1)
    first = next(iter(calls))
    seconds = in_turns(calls, args.repeat)
    for form, found in seconds.items():
        median, spread = statistics.median(found), [round(min(found), 5), round(max(found), 5)]
        figures[form] = results.figure(median, "s; median [least, most]", args.repeat, spread)
        share = median / statistics.median(seconds[first])
        figures[f"{form}, of {first}"] = results.figure(share, f"of the time {first}", args.repeat)
        off = float(jnp.mean(jnp.abs(pictures[form] - pictures[first])))
        figures[f"{form}: mean difference of a pixel"] = results.figure(off, "of the range", args.pictures)
        print(f"{median:9.4f} s  {share:.3f}  {name}, {form} (a pixel differs by {off:.1e})", flush=True)
    return figures | {"side": results.figure(pictures[first].shape[1], "px", 1)}


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="flux,sana,sd35", help="configs, with commas")
    parser.add_argument(
        "--forms", default=",".join(FORMS), help="of these; the first is what the others are compared with"
    )
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--side", type=int, help="of a picture, in pixels; the config's")
    parser.add_argument("--dtype", default="bfloat16", help="of the convolutions")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    args = parser.parse_args(argv)
    assemble.use_compilation_cache()
    with jax.set_mesh(sharding.make_mesh(1)):
        for name in args.models.split(","):
            results.record(args.out / f"{name}.json", measure(name, args), pictures=args.pictures)


if __name__ == "__main__":
    main()
