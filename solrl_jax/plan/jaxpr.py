"""FLOPs, live memory and network traffic of a traced program, from its jaxpr: nothing is compiled or allocated.

XLA's own cost analysis counts a loop's body once; here it counts once per trip. An unknown operation is refused
(`CostError`): otherwise it would count as nothing.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from solrl_jax import sharding

CUDA = ("jax_cuda12_plugin", "jax_cuda13_plugin")
CALLS = ("jit", "pjit", "closed_call", "core_call", "eval_jaxpr", "remat", "remat2", "checkpoint", "shard_map")
CUSTOM_CALLS = ("custom_jvp_call", "custom_vjp_call")
LOOPS = {"scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",)}
SCATTERS = [f"scatter{kind}" for kind in ("", "-add", "-sub", "-mul", "-min", "-max")]
COMBINERS = dict.fromkeys(SCATTERS, ("update_jaxpr",)) | dict.fromkeys(("reduce", "reduce_window"), ("jaxpr",))
"""Primitives whose programs combine two numbers: elementwise work. A plain scatter, which only writes, has none."""
PROGRAMS = dict.fromkeys((*CALLS, *CUSTOM_CALLS), ("jaxpr", "call_jaxpr")) | LOOPS | COMBINERS
"""The parameters of a primitive that are programs."""
VIEWS = {"reshape", "squeeze", "expand_dims", "transpose"}
FUSED = VIEWS | {
    *("add", "add_any", "sub", "mul", "div", "rem", "neg", "abs", "sign", "floor", "ceil", "round", "square"),
    *("exp", "exp2", "expm1", "log", "log1p", "sin", "cos", "tan", "tanh", "logistic", "erf", "rsqrt", "sqrt", "cbrt"),
    *("pow", "integer_pow", "max", "min", "clamp", "select_n", "and", "or", "not", "xor", "eq", "ne", "lt", "le"),
    *("gt", "ge", "is_finite", "nextafter", "shift_left", "shift_right_logical", "shift_right_arithmetic"),
    *("convert_element_type", "bitcast_convert_type", "reduce_precision", "broadcast_in_dim", "iota", "concatenate"),
    *("pad", "rev", "slice", "split", "dynamic_slice", "stack", "unstack"),
}
"""Elementwise operations and operations that only move elements: XLA fuses them into the kernel that reads them."""


class CostError(ValueError):
    """A program with an operation of unknown cost; the message names the primitive."""


class Value:
    """One array of a running program, with its bytes; identified by the object itself."""

    def __init__(self, aval: Any, stored: bool = True):
        self.bytes = nbytes(aval) if stored else 0


def nbytes(tree: Any) -> int:
    """Bytes of all leaves that have a shape and a dtype (a random key has 8)."""
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "shape") and hasattr(x, "dtype")]
    return sum(math.prod(x.shape) * getattr(x.dtype, "itemsize", 8) for x in leaves)


def as_on_gpus() -> bool:
    """Whether programs are traced as for a GPU, which needs a CUDA plugin."""
    return any(map(find_spec, CUDA))


def trace(f: Callable[..., Any], *args: Any, shards: int = 1) -> Jaxpr:
    """The jaxpr of f for arguments given as shapes (jax.ShapeDtypeStruct leaves), on a mesh of `shards` devices over
    which frozen weights lie in parts. Shapes are those of whole arrays.

    The device is a GPU if a CUDA plugin is installed: without one JAX cannot trace the fused attention. Otherwise it is
    a device of another kind, not this machine's CPU, whose products may have another dtype.
    """
    device = AbstractDevice("GPU", None, "gpu" if as_on_gpus() else "other")
    mesh = AbstractMesh((1, shards), sharding.AXES, axis_types=(AxisType.Auto,) * 2, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.make_jaxpr(f)(*args).jaxpr


# --- FLOPs ----------------------------------------------------------------------------------------------------------


def flops(jaxpr: Jaxpr) -> Counter[str]:
    """2 x multiply-adds of products and convolutions, by the dtype of their operands ("float32" alone may be TF32), and
    those of FFTs.

    8-bit codes that are only cast for a product count as such: XLA multiplies the codes (quant.fp8). A loop's body
    counts once per trip, a `cond` as its costlier branch, a `while` once, as its trips are unknown. Elementwise work is
    not counted.
    """
    total: Counter[str] = Counter()
    codes: dict[Value, str] = {}
    for eqn, ins, outs in _inlined(jaxpr, [Value(v.aval) for v in jaxpr.invars])[0]:
        if eqn.primitive.name in PRODUCTS:
            total[codes.get(ins[:2][-1]) or _multiplied(eqn)] += PRODUCTS[eqn.primitive.name](eqn)
        elif eqn.primitive.name == "convert_element_type" and "float8" in str(_aval(eqn, 0).dtype):
            codes[outs[0]] = str(_aval(eqn, 0).dtype)
        elif found := [flops(body) for body in _bodies(eqn)]:
            choice = eqn.primitive.name == "cond"
            found = max(found, key=lambda c: c.total()) if choice else sum(found, Counter[str]())
            total.update({dtype: n * eqn.params.get("length", 1) for dtype, n in found.items()})
    return total


def _multiplied(eqn: JaxprEqn) -> str:
    """The dtype of a product's operands, and whether it is exact, which an FFT is always."""
    if eqn.primitive.name == "fft":
        return f"{np.finfo(_out(eqn).dtype).dtype} highest"
    exact = jax.lax.Precision.HIGHEST in (eqn.params.get("precision") or ())
    return f"{_aval(eqn, 1).dtype}{' highest' if exact else ''}"


def _aval(eqn: JaxprEqn, which: int) -> Any:
    return eqn.invars[which].aval


def _shape(v: Any) -> tuple[int, ...]:
    return getattr(v.aval, "shape", ())


def _out(eqn: JaxprEqn) -> Any:
    return eqn.outvars[0].aval


def _dot(eqn: JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * math.prod(_out(eqn).shape) * math.prod([_aval(eqn, 0).shape[i] for i in contracted])


def _convolution(eqn: JaxprEqn) -> int:
    kernel, numbers = _aval(eqn, 1).shape, eqn.params["dimension_numbers"]
    return 2 * math.prod(_out(eqn).shape) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]


def _attention(eqn: JaxprEqn) -> int:
    """cuDNN's fused kernel: two products, and five in its backward pass (it recomputes the scores)."""
    b, queries, heads, width = _aval(eqn, 0).shape
    count = 5 if "bwd" in eqn.primitive.name else 2
    return 2 * count * b * heads * queries * _aval(eqn, 1).shape[1] * width


def _scaled(eqn: JaxprEqn) -> int:
    """NVFP4's block-scaled product of [batch, m, k] and [batch, n, k]."""
    return 2 * math.prod(_aval(eqn, 0).shape) * _aval(eqn, 1).shape[1]


def _fft(eqn: JaxprEqn) -> int:
    """5 n log2 n of n complex numbers, half of it where one side is real (as FFTW counts)."""
    n, sides = math.prod(eqn.params["fft_lengths"]), (_aval(eqn, 0), _out(eqn))
    real = [x for x in sides if not np.issubdtype(x.dtype, np.complexfloating)]
    return int((2.5 if real else 5) * math.prod((real or sides)[0].shape) * math.log2(n))


PRODUCTS = {
    "fft": _fft,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "dot_product_attention_fwd_wrapper": _attention,
    "dot_product_attention_bwd_wrapper": _attention,
    "scaled_matmul_wrapper": _scaled,
}
MULTIPLIES = re.compile(
    r"dot|matmul|gemm|attention|conv(?!ert)|solve|symmetric_product|cholesky|householder_product|pallas|ffi|fft"
    r"|^(eigh?|hessenberg|lu|ormqr|qr|schur|svd|tridiagonal)$"
)
"""Names of primitives that multiply matrices, or may do so internally."""


# --- network --------------------------------------------------------------------------------------------------------


SENT = {"all_gather": 1, "all_to_all": 1, "reduce_scatter": 1, "psum": 2, "pmax": 2, "pmin": 2}
"""How often a device receives the other devices' parts of a whole array, which is the result, or what reduce_scatter is
given: a sum is reduced part by part, then gathered."""


def received(jaxpr: Jaxpr, devices: int) -> int:
    """Bytes that each of `devices` devices receives from the others; a loop's body counts once per trip.

    `devices` are those that share frozen weights. A LoRA's gradient, which all devices add up, counts as if these alone
    added it up.
    """
    total = 0
    for eqn, _, _ in _inlined(jaxpr, [Value(v.aval) for v in jaxpr.invars])[0]:
        name, among = eqn.primitive.name, eqn.params.get("axis_name") or eqn.params.get("axes") or ()
        if name in SENT:
            whole = eqn.invars if name == "reduce_scatter" else eqn.outvars
            total += SENT[name] * nbytes([v.aval for v in whole]) * (devices - 1) // devices
        elif name != "axis_index" and any(isinstance(axis, str) for axis in among):
            raise CostError(
                f"the plan cannot count the operation {name}, which moves data between devices: add it to SENT in "
                "solrl_jax/plan/jaxpr.py"
            )
        total += eqn.params.get("length", 1) * max((received(body, devices) for body in _bodies(eqn)), default=0)
    return total


# --- memory ---------------------------------------------------------------------------------------------------------


def peak(jaxpr: Jaxpr) -> int:
    """The most bytes that are live at once on a device, with the program's results and without its inputs.

    The program is walked in order. A result of FUSED needs no memory: its sources stay alive instead. It is stored when
    a product, a loop or another operation that needs an array reads it, or if it is at most half as large as its
    sources (a cast to bf16, a sum of two). A loop needs its carry once, its body's own peak, and everything that it
    stacks, which includes a backward pass's residuals. Not counted: workspaces of libraries, and reordering, padding,
    fragmentation and copies by XLA.
    """
    return _peak(jaxpr, [Value(v.aval, stored=False) for v in jaxpr.invars])


class _Live:
    """The arrays in memory, each with its first and last step, while a program is walked."""

    def __init__(self, inputs: Sequence[Value]):
        self.sources = {v: frozenset((v,)) for v in inputs}  # the stored arrays that a value is, or is computed from
        self.views = set(inputs)  # values in memory, or views of such values
        self.born: dict[Value, int] = {}
        self.last: dict[Value, int] = {}

    def of(self, values: Sequence[Value]) -> frozenset[Value]:
        return frozenset().union(*(self.sources.get(v, ()) for v in values))

    def read(self, values: Sequence[Value], at: int) -> None:
        for v in self.of(values):
            self.born.setdefault(v, at)  # a slice that a loop reads is created at its first use
            self.last[v] = at

    def store(self, v: Value, at: int) -> None:
        self.read((v,), at)
        self.sources[v] = frozenset((v,))
        self.views.add(v)
        self.born[v] = self.last[v] = at

    def bytes_at(self, count: int) -> np.ndarray:
        change = np.zeros(count + 1, np.int64)
        for v, since in self.born.items():
            change[since] += v.bytes
            change[self.last[v] + 1] -= v.bytes
        return np.cumsum(change)


def _peak(jaxpr: Jaxpr, inputs: list[Value]) -> int:
    live, inside = _Live(inputs), [0]
    equations, results = _inlined(jaxpr, inputs)
    for at, (eqn, ins, outs) in enumerate(equations, 1):
        name = eqn.primitive.name
        if name in FUSED:
            of = live.of(ins)
            live.sources |= dict.fromkeys(outs, of)
            if name in VIEWS and ins[0] in live.views:
                live.views.update(outs)
            elif 2 * sum(v.bytes for v in outs) <= sum(v.bytes for v in of):
                for v in outs:
                    live.store(v, at)
            inside.append(0)
            continue
        for v in ins if not name.startswith(("reduce_", "arg")) else ():
            if v not in live.views:
                live.store(v, at)
        live.read(ins, at)
        for v in outs:
            live.store(v, at)
        inside.append(_inside(eqn))
    for v in results:
        if v not in live.views:
            live.store(v, len(inside))
    live.read(results, len(inside))
    inside.append(0)
    return int(max(live.bytes_at(len(inside)) + np.array([*inside, 0])))


def _inside(eqn: JaxprEqn) -> int:
    """Peak of an operation's body. A scan's constants and carry are counted outside; its slices live in the body."""

    def inputs(body: Jaxpr) -> list[Value]:
        if eqn.primitive.name != "scan":
            return [Value(v.aval, stored=False) for v in body.invars]
        pairs = zip(eqn.invars, body.invars, strict=True)
        return [Value(inner.aval, stored=_shape(outer) != _shape(inner)) for outer, inner in pairs]

    return max((_peak(body, inputs(body)) for body in _bodies(eqn)), default=0)


# --- the walk -------------------------------------------------------------------------------------------------------


Step = tuple[JaxprEqn, list[Value], list[Value]]


def _inlined(jaxpr: Jaxpr, inputs: list[Value]) -> tuple[list[Step], list[Value]]:
    """(equation, its inputs, its outputs) in program order, with all calls inlined, and the program's results."""
    env: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    env |= {v: Value(v.aval, stored=False) for v in jaxpr.constvars}
    steps: list[Step] = []
    for eqn in jaxpr.eqns:
        _check(eqn)
        ins, called = _values(env, eqn.invars), _called(eqn)
        if eqn.primitive.name == "shard_map" and called is not None:  # of what is split, a device holds its part
            for v, inner in zip(ins, called.invars, strict=True):
                v.bytes = min(v.bytes, nbytes(inner.aval))
        if called is None:
            outs = [Value(v.aval) for v in eqn.outvars]
            steps.append((eqn, ins, outs))
        else:
            inner, outs = _inlined(called, ins)
            steps += inner
        env.update(zip(eqn.outvars, outs, strict=True))
    return steps, _values(env, jaxpr.outvars)


def _values(env: dict[Any, Value], variables: Sequence[Any]) -> list[Value]:
    """A literal is a value without bytes."""
    return [Value(v.aval, stored=False) if isinstance(v, Literal) else env[v] for v in variables]


def _check(eqn: JaxprEqn) -> None:
    """CostError for an operation that may multiply matrices without being counted."""
    name, what = eqn.primitive.name, ""
    known = PROGRAMS.get(name, ())
    if strange := [p for p, value in eqn.params.items() if p not in known and any(_programs(value))]:
        what = f"runs the program in its parameter {strange[0]}"
    elif name in PROGRAMS and name != "scatter" and not any(any(_programs(eqn.params.get(p))) for p in known):
        what = f"has no program in {' or '.join(known)}, but in one of {', '.join(eqn.params)}"
    elif name not in PRODUCTS and MULTIPLIES.search(name):
        what = "multiplies"
    if what:
        raise CostError(
            f"the plan cannot count the operation {name}, which {what}: add its cost to "
            "solrl_jax/plan/jaxpr.py, or "
            "compute the same with products and loops that it knows"
        )


def _programs(value: Any) -> Iterator[Jaxpr]:
    """The programs in a parameter, also in tuples."""
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _programs(part)


def _called(eqn: JaxprEqn) -> Jaxpr | None:
    """The program that a call runs."""
    if eqn.primitive.name not in (*CALLS, *CUSTOM_CALLS):
        return None
    return next(_programs([eqn.params.get("jaxpr"), eqn.params.get("call_jaxpr")]))


def _bodies(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The programs that a loop or a `cond` runs."""
    for parameter in LOOPS.get(eqn.primitive.name, ()):
        yield from _programs(eqn.params[parameter])
