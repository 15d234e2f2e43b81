"""Forward passes and a LoRA gradient at full size with random weights: how RoPE, norms and 8-bit products are written.

    python -m experiments.precision.forward --out=experiments/precision/results/forward.json         # an H100
    python -m experiments.precision.forward --config=tiny:sol_rl --repeat=2 --out=/tmp/f.json        # the path in short

Programs of one kind differ in form, are compiled first and are then called in turns. Figures are medians of `--repeat`
calls. On a CPU the forms `package` and `apart` are the same computation.
"""

import argparse
import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments import results
from experiments.full_size import drawn, in_turns
from solrl_jax import config, device, lora, quant, sharding
from solrl_jax.models import flux
from solrl_jax.models.layers import Linear, attention
from solrl_jax.models.mmdit import rows
from solrl_jax.models.rope import Rope, _in_two_passes
from solrl_jax.plan import shapes
from solrl_jax.quant import fp8
from solrl_jax.run import assemble
from solrl_jax.structs import PyTree, Static

# --- forms that are not the package's -------------------------------------------------------------------------------


class Apart(flux.JointAttention):
    """Each stream normalised and rotated alone, in two passes, and then joined."""

    @nn.compact
    def __call__(self, x: Array, text: Array | None, rope: Rope) -> Any:
        split = 0 if text is None else text.shape[1]
        image = self._turned(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), [t[split:] for t in rope])
        if text is None:
            return rows(attention(*image).reshape(x.shape))
        names, norms = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
        added = self._turned(text, names, norms, [t[:split] for t in rope])
        out = attention(*(jnp.concatenate(pair, axis=1) for pair in zip(added, image, strict=True)))
        out = out.reshape((*out.shape[:2], -1))
        image_out = Linear(x.shape[-1], dtype=self.dtype, bias_after=True, name="to_out.0")(out[:, split:])
        return image_out, Linear(x.shape[-1], dtype=self.dtype, bias_after=True, name="to_add_out")(out[:, :split])

    def _turned(self, x: Array, names: Sequence[str], norms: Sequence[str], rope: Sequence[Array]) -> list[Array]:
        q, k, v, *scales = self._stream(x, names, norms)
        of = [_in_two_passes(y, scale, (rope[0], rope[1]), 1e-6) for y, scale in zip((q, k), scales, strict=True)]
        return [*of, v]


class Whole(NamedTuple):
    """An 8-bit kernel with its codes in one piece and a scale max|W| / 448, which is applied to each product."""

    codes: Array
    scale: Array
    unit: Static

    def matmul(self, parts: Sequence[Array], out: Any) -> Array:
        at, total = 0, jnp.zeros((), out)
        for i, x in enumerate(parts):
            w, at = self.codes[:, at : at + x.shape[-1]], at + x.shape[-1]
            dims = (((x.ndim - 1,), (1,)), ((), ()))
            y = jax.lax.dot_general(fp8.encode(x, self.unit.value), w, dims, preferred_element_type=out)
            y = y * (self.unit.value * self.scale).astype(out)
            total = total + y if i else y
        return total


def whole(kernel: Array, unit: float = 1.0, parts: Sequence[int] = ()) -> Whole:
    if kernel.ndim > 2:
        return jax.lax.map(lambda k: whole(k, unit), kernel)
    w = device.row_major(kernel).astype(jnp.float32)
    scale = jnp.max(jnp.abs(w)) / fp8.MAX
    return Whole(device.row_major(fp8.encode(w, scale)).T, scale, Static(unit))


@contextlib.contextmanager
def used(form: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if form != "package":
            stack.enter_context(mock.patch.object(flux, "JointAttention", Apart))
        if form == "before":
            stack.enter_context(mock.patch.object(fp8, "quantise", whole))
        yield


FORMS = {"fp8": ("package", "apart", "before"), "bf16": ("package", "apart"), "gradient": ("package", "apart")}
"""Of each kind of program. `apart`: q and k as before; `before`: the 8-bit products too."""


# --- timing ---------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    model: Any
    cfg: config.Config
    base: PyTree
    cond: PyTree  # of one prompt


def made(given: Given, kind: str, form: str, batch: int) -> tuple[Callable[[], Array], float]:
    """A program with its arguments, compiled, and the seconds which that took."""
    model, base = given.model, given.base
    x = jax.vmap(model.noise)(jax.random.split(jax.random.key(0), batch))
    rest = x, jnp.full((batch,), 0.5), jax.tree.map(lambda c: jnp.repeat(c, batch, axis=0), given.cond)
    with used(form):
        if kind == "gradient":
            adapter = jax.jit(lambda base: lora.init(jax.random.key(0), base, model.lora_targets, given.cfg.lora))(base)

            def loss(adapter, base, *rest):
                return jnp.sum(model.velocity(lora.policy(base, adapter, given.cfg.lora), *rest) ** 2)

            call, args = jax.grad(loss), (adapter, base, *rest)
        else:
            variables = {"params": base}
            if kind == "fp8":
                rule = quant.rule_of(model.quant_rules, kind)
                variables["quant"] = jax.jit(functools.partial(quant.quantise_tree, rule=rule, precision=kind))(base)
            # A function of its own: jit would find the trace of the form before.
            call, args = (lambda *args: model.velocity(*args)), (variables, *rest)
        began = time.perf_counter()
        program = jax.jit(call).lower(*args).compile()
    return functools.partial(program, *args), time.perf_counter() - began


def measure(given: Given, kind: str, batch: int, repeat: int) -> dict[str, dict]:
    calls, figures, first = {}, {}, {}
    for form in FORMS[kind]:
        calls[form], compiling = made(given, kind, form, batch)
        figures[f"{kind} of {batch}, {form}: compile"] = results.figure(compiling, "s", 1)
        first[form] = jax.block_until_ready(calls[form]())
    seconds, last = in_turns(calls, repeat), FORMS[kind][-1]
    for form, found in seconds.items():
        name, median = f"{kind} of {batch}, {form}", statistics.median(found)
        figures[name] = results.figure(
            median, "s; median [least, most]", repeat, [round(min(found), 4), round(max(found), 4)]
        )
        share = median / statistics.median(seconds[last])
        figures[f"{name}: share"] = results.figure(share, f"of the time of {last}", repeat)
        off = _apart(first[form], first[last])
        figures[f"{name}: difference"] = results.figure(off, f"|v - v'| / |v'|, v' of {last}", 1)
        print(f"{median:9.4f} s  {share:.4f}  {name} (differs by {off:.1e})", flush=True)
    return figures


def _apart(a: PyTree, b: PyTree) -> float:
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / optax.tree.norm(b))


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="flux:sol_rl")
    parser.add_argument("--programs", default="fp8:24,bf16:24,gradient:12", help="KIND:BATCH with commas")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    assemble.use_compilation_cache()
    figures: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(sharding.make_mesh(1)):
        cfg = assemble.resolved(shapes.with_configs(config.load(args.config, {}), folder), assemble.capability())
        found = shapes.read(cfg, 1)
        given = Given(found.model, cfg, drawn(found.frozen.base), drawn(shapes.batch(found.prompts.cond, 1)))
        for kind, batch in (word.split(":") for word in args.programs.split(",")):
            figures |= measure(given, kind, int(batch), args.repeat)
            results.record(args.out, figures)


if __name__ == "__main__":
    main()
