"""Low precision: the precisions of a rollout, and the trees of quantised kernels that it reads.

A precision is one static choice per stage of a run, resolved once for the device (`resolve`):

    bf16             nothing is quantised
    fp8              e4m3 kernels and inputs, on GPUs from compute capability 8.9 (fp8.py)
    nvfp4_native     NVFP4 kernels and inputs through the tensor cores' block-scaled product, from capability 10
    nvfp4_emulated   the same products, exact in bf16, on any device (nvfp4.py); only the order of summation differs
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from solrl_jax import device, sharding
from solrl_jax.quant import fp8, nvfp4
from solrl_jax.quant.fp8 import Fp8
from solrl_jax.quant.nvfp4 import Nvfp4
from solrl_jax.structs import Params, QuantRule, QuantRules, leaves_by_path

LOW = ("fp8", "nvfp4_native", "nvfp4_emulated")
"""The precisions to which kernels are quantised."""
LEAST = {"fp8": 8.9, "nvfp4_native": 10.0}
"""The least compute capability that a precision needs."""


class Unsupported(ValueError):
    """A precision that is not known, or that the device does not have."""


def _known(precision: str, names: tuple[str, ...] = ("bf16", *LOW), what: str = "one that is known") -> None:
    if precision not in names:
        raise Unsupported(f"precision {precision!r} is not {what}: use {', '.join(names)}")


def resolve(precision: str, capability: float | None) -> str:
    """The precision itself, or for "auto" the device's best: NVFP4 or FP8 on a GPU that has it, BF16 on other GPUs and
    TPUs, which would take longer for NVFP4's numbers than for BF16's, and NVFP4's numbers on a CPU. `capability` is
    CUDA's, 0 for a TPU and None for a CPU.

    Raises Unsupported for an unknown precision and for one that the device does not have: there is no silent fallback.
    """
    _known(precision, ("auto", "bf16", *LOW))
    have = 0.0 if capability is None else capability
    if precision == "auto":
        others = "nvfp4_emulated" if capability is None else "bf16"
        return next((p for p in ("nvfp4_native", "fp8") if have >= LEAST[p]), others)
    if have < (least := LEAST.get(precision, 0.0)):
        found = f"this one has {capability}" if capability else "it is no CUDA device"
        raise Unsupported(
            f"precision {precision} needs a GPU of compute capability {least} or more; {found}: use auto, "
            "nvfp4_emulated or bf16"
        )
    return precision


def bits(precision: str) -> float:
    """Bits of a weight, block scales included."""
    _known(precision)
    return {"bf16": 16.0, "fp8": 8.0}.get(precision, 4.5)


def rule_of(rules: QuantRules, precision: str) -> QuantRule:
    """The rule by which a low precision chooses its Linears."""
    _known(precision)
    return rules.fp8 if precision == "fp8" else rules.nvfp4


def chosen(params: Params, rule: QuantRule) -> dict[str, tuple[int, ...]]:
    """{"a/b/kernel": shape} of the Linears that the rule quantises."""
    kernels = {p: tuple(x.shape) for p, x in leaves_by_path(params).items() if p.endswith("/kernel")}
    return {
        p: s
        for p, s in kernels.items()
        if len(s) in (2, 3)
        and max(s[-2:]) > rule.min_dim
        and not any(re.search(skip, p.removesuffix("/kernel").replace("/", ".")) for skip in rule.skip)
    }


def quantise(
    kernel: Any, precision: str, unit: float = 1.0, parts: Sequence[int] = (), largest: Any = None
) -> Fp8 | Nvfp4:
    """A kernel [*layers, in, out] in a precision of LOW, else Unsupported; `unit` and `parts` are of FP8's inputs.

    `largest`: max|W| of the kernel of which this one [in, out] is a device's part; by default, of `kernel` itself.
    """
    _known(precision, LOW, "one that kernels are quantised to")
    if precision == "fp8":
        return fp8.quantise(kernel, unit, parts, largest)
    return nvfp4.quantise(kernel, precision == "nvfp4_native", nvfp4.SWEEP, largest)


def quantise_parts(stack: Any, where: P, make: Callable[..., Fp8 | Nvfp4]) -> Fp8 | Nvfp4:
    """make(kernel [in, out], largest=max|W|) of every layer of a stack that lies over several devices as `where`.

    Each device quantises its outputs: a layer at a time, parts by input become parts by output. The codes are those of
    the whole kernel, for a kernel's scales depend on the others' outputs by the largest weight alone.
    """

    def one(part: Any) -> Fp8 | Nvfp4:
        if where == sharding.BY_INPUT:
            part = jax.lax.all_to_all(part, sharding.FSDP, split_axis=1, concat_axis=0, tiled=True)
        largest = jnp.max(jnp.abs(part).astype(jnp.float32))
        return make(part, largest=jax.lax.pmax(largest, sharding.FSDP))

    shapes = jax.eval_shape(lambda w: jax.lax.map(make, w), stack)
    specs = sharding.specs_of({"kernel": shapes})["kernel"]
    return sharding.over_data(lambda part: jax.lax.map(one, part), (where,), specs)(stack)


def quantise_tree(params: Params, rule: QuantRule, precision: str) -> dict[str, Any]:
    """The explorer's `quant` collection: the quantised kernels of the Linears that the rule chooses, nothing else."""
    paths, units, parts = chosen(params, rule), dict(rule.units), dict(rule.parts)

    def walk(tree: Mapping[str, Any], at: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, node in tree.items():
            path = f"{at}/{name}" if at else name
            if isinstance(node, Mapping):
                if inner := walk(node, path):
                    out[name] = inner
            elif path in paths:
                inputs = {"unit": units.get(at, 1.0), "parts": parts.get(at, ())}
                make = functools.partial(quantise, precision=precision, **inputs)
                where = sharding.spec(path, node.ndim)
                in_parts = sharding.shards() > 1 and where != sharding.WHOLE
                out[name] = quantise_parts(node, where, make) if in_parts else make(node)
        return out

    return walk(params, "")


def for_rollout(low: Params) -> Params:
    """The `quant` collection as a rollout reads it.

    On CPUs, which have the memory, emulated NVFP4 is unpacked once: otherwise every step of the rollout's loop would
    unpack it again (tests/test_device.py::test_emulated_kernels_are_unpacked_once_on_cpus).
    """

    def ready(kernel: Fp8 | Nvfp4) -> Any:
        if isinstance(kernel, Nvfp4) and not kernel.native.value and device.platform() == "cpu":
            return nvfp4.unpacked(kernel)
        return kernel

    return jax.tree.map(ready, low, is_leaf=lambda x: isinstance(x, Fp8 | Nvfp4))
