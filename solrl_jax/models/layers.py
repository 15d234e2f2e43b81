"""Layers shared by the networks, and the only file that handles LoRA, low precision and weights in parts.

`Linear` looks at the collections it is given: a kernel in `quant` replaces its own, factors in `lora` are added. So one
module serves as the reference {params}, the policy {params, lora} and the explorer {params, quant}.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from solrl_jax import device, sharding
from solrl_jax.device import operands
from solrl_jax.models import fused

F32 = jnp.float32


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """The precision that products of operands in `dtype` request.

    Without HIGHEST, GPUs compute float32 products in TF32 and TPUs in bfloat16 (tests/test_precision.py). Other types
    have only one kind of product, so they request nothing.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == F32 else None


def halves(x: Float[Array, "*d"]) -> tuple[Array, Array]:
    """f32 x ~ high + low, both bf16: 16 of its 24 bits.

    Rounding is `reduce_precision`, not a cast to bf16 and back: XLA removes such a pair of casts on GPUs, and then low
    is 0 (tests/test_pairs.py::test_the_low_halves_are_in_the_program).
    """
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def pair_product(x: Float[Array, "*batch d"], w: Float[Array, "d out"]) -> Float[Array, "*batch out"]:
    """x w of f32 operands, each as a pair of bf16 numbers, summed in f32; relative error 5e-6 (float32: 3e-7).

    It is one bf16 product of three times the depth, [xh | xl | xh] [Wh; Wh; Wl]: xl Wl would be 2^-16 of the whole. As
    three products their f32 results would be written to memory three times, and the bias would be a kernel of its own.
    """
    (xh, xl), (wh, wl) = halves(x), halves(w)
    deep = jnp.concatenate([xh, xl, xh], axis=-1), jnp.concatenate([wh, wh, wl], axis=0)
    return jnp.dot(*operands(*deep), preferred_element_type=F32)


def in_pairs(dtype: Any, pairs: bool | None) -> bool:
    """Whether a network's products in `dtype` are `pair_product`s. None: those in float32, on all devices but CPUs."""
    return jnp.dtype(dtype) == F32 and (device.platform() != "cpu" if pairs is None else pairs)


def parameters(module: nn.Module, *inputs: Array) -> Any:
    """The parameters of `module` as ShapeDtypeStructs, for inputs like these. Equal modules are traced once."""
    found = _parameters(module, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs))
    return jax.tree.map(lambda x: x, found)  # dicts of its own


@functools.lru_cache(maxsize=64)
def _parameters(module: nn.Module, *inputs: jax.ShapeDtypeStruct) -> Any:
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


class Linear(nn.Module):
    """y = x W + (x A) B + b. W [in, out] in the network's dtype, A [in, R] and B [R, out] f32, alpha/R folded in.

    x may come in several parts along its last axis, which are then never concatenated in memory. `bias_after` adds the
    bias after the product, as part of an elementwise kernel that reads y anyway. A product whose epilogue has a bias
    makes XLA copy the layer's kernel out of the stack first; one without a bias reads the kernel inside the stack
    (epilogues counted in tests/test_compiled.py::test_forward). With `pairs` the kernel's float32 products are
    `pair_product`s; for networks without LoRA and quantised kernels.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.bfloat16
    bias_after: bool = False
    pairs: bool = False

    @nn.compact
    def __call__(self, *parts: Float[Array, "*batch _"]) -> Float[Array, "*batch out"]:
        # On CPUs, bf16 products with f32 results are up to twice as fast as with bf16 results. On GPUs f32 results
        # would double the memory traffic, and gain nothing: cuBLASLt adds the bias to its f32 sums before it rounds.
        # Guard: every product's result is bf16 (tests/test_compiled.py::test_forward).
        out = self.dtype if device.platform() == "gpu" else F32
        if self.is_mutable_collection("largest") and not self.is_initializing():
            self.sow("largest", "x", jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in parts])).astype(F32))
        whole = sum(x.shape[-1] for x in parts), self.features
        if self.has_variable("quant", "kernel"):
            low = self.get_variable("quant", "kernel")
            y = sharding.at_use(lambda parts, low: low.matmul(parts, out), parts, low, whole)
        else:
            kernel = _stored(self, whole)
            product = functools.partial(_product, dtype=self.dtype, out=out, pairs=self.pairs)
            y = sharding.at_use(product, parts, kernel, whole)
        bias = None
        if self.use_bias:
            bias = jnp.asarray(self.param("bias", nn.initializers.zeros, (self.features,), F32))
        if bias is not None and not self.bias_after:
            y = plus(y, bias)
        if self.has_variable("lora", "a"):
            a, b = (jnp.asarray(self.get_variable("lora", name)) for name in "ab")
            y = y + _product((_product(parts, a, self.dtype, out),), b, self.dtype, out)
        if bias is not None and self.bias_after:
            # Without the barrier XLA moves the bias back into the product's epilogue: BIAS where test_forward of
            # tests/test_compiled.py expects DEFAULT.
            y = plus(jax.lax.optimization_barrier(y) if device.platform() == "gpu" else y, bias)
        return y.astype(self.dtype)


def _stored(linear: Linear, whole: tuple[int, int]) -> Float[Array, "_ _"]:
    """The kernel, or this device's part of it, which flax's own check of shapes would refuse."""
    if not linear.is_initializing() and linear.has_variable("params", "kernel"):
        return jnp.asarray(linear.get_variable("params", "kernel"))
    return jnp.asarray(linear.param("kernel", nn.initializers.lecun_normal(), whole, F32))


def plus(y: Array, bias: Array) -> Array:
    return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def inputs_seen(variables: Mapping[str, Any]) -> dict[str, Array]:
    """{path of a Linear: largest |input|}, the maximum over a stack's layers.

    `variables` are those that a call with the mutable collection `largest` returns.
    """
    found = jax.tree_util.tree_leaves_with_path(variables["largest"])
    return {
        "/".join(key.key for key in path if hasattr(key, "key")).removesuffix("/x"): jnp.max(x) for path, x in found
    }


def _product(parts: Sequence[Array], w: Array, dtype: Any, out: Any, pairs: bool = False) -> Array:
    """x w with result dtype `out`; x in parts along the contracted axis, both operands in `dtype`."""
    total, at = None, 0
    for x in parts:
        both = x.astype(dtype), w[at : at + x.shape[-1]].astype(dtype)
        how = {"precision": precision_of(dtype), "preferred_element_type": out}
        y = pair_product(*both) if pairs else jnp.dot(*operands(*both), **how)
        total, at = y if total is None else total + y, at + x.shape[-1]
    assert total is not None
    return total


class RMSNorm(nn.Module):
    """x / rms(x) * scale, plus a bias if `use_bias`, over the last axis, in f32; returns x's dtype.

    `offset` is added to the stored scale: Gemma's files store scale - 1.
    """

    eps: float = 1e-6
    use_bias: bool = False
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        ones = (1,) * (x.ndim - 1) + (-1,)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), F32).astype(F32)
        scale = scale + self.offset if self.offset else scale
        y = x.astype(F32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y * scale.reshape(ones)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (x.shape[-1],), F32).astype(F32).reshape(ones)
        return y.astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias over the last axis, in f32; returns x's dtype."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        ones = (1,) * (x.ndim - 1) + (-1,)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), F32).astype(F32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), F32).astype(F32)
        return (normalise(x, self.eps) * scale.reshape(ones) + bias.reshape(ones)).astype(x.dtype)


def normalise(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch d"]:
    """LayerNorm without gain or bias, f32."""
    y = x.astype(F32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)


def attention(
    q: Float[Array, "B Q H d"],
    k: Float[Array, "B S H d"],
    v: Float[Array, "B S H d"],
    *,
    scale: float | None = None,
    bias: Float[Array, "#B #H Q S"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    softcap: float | None = None,
) -> Float[Array, "B Q H d"]:
    """softmax(q k' scale + bias) v with the softmax in f32; scale defaults to d^-1/2. Returns q's dtype.

    Each sample attends to its first `lengths` keys only. With a softcap c, scores become c tanh(scores / c).
    On GPUs and TPUs a fused kernel is used if it applies and pays off: half precision, no bias or softcap, at least
    fused.LONG[platform] queries. Otherwise the scores are written to memory in f32 (test_forward of
    tests/test_compiled.py, of tests/test_sd35_compiled.py and of tests/test_tpu_compiled.py, by the program's temporary
    memory).
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if bias is None and softcap is None and (kernel := fused.kernel_for(q)):
        return kernel(q, k, v, factor, lengths)
    how: dict[str, Any] = {"precision": precision_of(q.dtype), "preferred_element_type": F32}
    scores = jnp.einsum("bqhd,bkhd->bhqk", *operands(q, k), **how) * factor
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if lengths is not None:
        seen = jnp.arange(k.shape[1])[None, :] < lengths[:, None]
        scores = jnp.where(seen[:, None, None, :], scores, -jnp.inf)
    if bias is not None:
        scores = scores + jnp.broadcast_to(bias, scores.shape)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights, v = operands(weights, v)
    if q.dtype == jnp.bfloat16 and device.platform() == "cpu":
        # This product gives bhqd. XLA's CPU backend computes one that gives bqhd as bhdq, which takes up to 1.5 times
        # as long (tests/test_device.py::test_attention_multiplies_in_bhqd_order).
        out = jnp.einsum("bhqk,bhkd->bhqd", weights, jnp.swapaxes(v, 1, 2), **how)
        return jnp.swapaxes(out.astype(q.dtype), 1, 2)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, **how).astype(q.dtype)


def linear_attention(
    q: Float[Array, "B N H d"], k: Float[Array, "B N H d"], v: Float[Array, "B N H d"]
) -> Float[Array, "B N H d"]:
    """relu(q) (relu(k)' v) / (relu(q) . sum of relu(k)), summed in f32 (SANA's and DC-AE's). Returns q's dtype.

    In a float32 network all products are float32. In a bfloat16 network the products of q with the f32 sums over k use
    the device's fast float32 product: TF32 on GPUs, which has three bits more than the bfloat16 of q and of the result.
    """
    dtype, q, k = q.dtype, jax.nn.relu(q), jax.nn.relu(k)
    product = functools.partial(jnp.einsum, precision=precision_of(dtype))
    # Products of bf16 are exact in f32, so both branches give the same numbers. XLA's CPU backend lacks this product in
    # bf16. On a GPU, f32 copies of k and v would be written to memory (tests/test_sana_compiled.py::
    # test_linear_attention_makes_no_f32_copies_of_k_and_v).
    k, v = (k, v) if device.platform() == "gpu" else (k.astype(F32), v.astype(F32))
    states = product("bnhd,bnhe->bhde", k, v, preferred_element_type=F32)
    total = jnp.sum(k.astype(F32), axis=1)
    above = product("bnhd,bhde->bnhe", q.astype(F32), states)
    below = product("bnhd,bhd->bnh", q.astype(F32), total)
    return (above / (below[..., None] + 1e-15)).astype(dtype)


def keeping(names: Sequence[str]) -> Callable[..., Any]:
    """The policy of jax.checkpoint that keeps the results with these names (`checkpoint_name`) for the backward pass.

    "attention" also keeps the fused kernel's result and the softmax sums that its backward kernel reads. A TPU's kernel
    names both; cuDNN's is recognised by its primitive's name: save_only_these_names alone would run it again in the
    backward pass (test_remat_keeps_the_fused_attention of tests/test_compiled.py and of tests/test_tpu_compiled.py).
    """
    named = jax.checkpoint_policies.save_only_these_names(*names)

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        fused = "attention" in names and primitive.name == "dot_product_attention_fwd_wrapper"
        return fused or named(primitive, *args, **params)

    return policy


def sinusoid(t: Float[Array, "B"], width: int = 256) -> Float[Array, "B width"]:
    """[cos(t f), sin(t f)] with f_i = 10000^(-i / (width/2)); t is the time from 0 to 1000.

    As diffusers' get_timestep_embedding with flip_sin_to_cos and no downscale_freq_shift.
    """
    half = width // 2
    f = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=F32) / half)
    angle = t.astype(F32)[:, None] * f[None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu_tanh(x: Array) -> Array:
    return _rounded_once(functools.partial(jax.nn.gelu, approximate=True), x)


def gelu_erf(x: Array) -> Array:
    return _rounded_once(functools.partial(jax.nn.gelu, approximate=False), x)


def swiglu(y: Float[Array, "*batch two_M"]) -> Float[Array, "*batch M"]:
    """SiLU(g) u of y = [g, u], in f32 and rounded once. The backward pass keeps only y."""

    def f(y: Array) -> Array:
        g, u = jnp.split(y.astype(F32), 2, axis=-1)
        return (jax.nn.silu(g) * u).astype(y.dtype)

    return jax.checkpoint(f, prevent_cse=False)(y)


def _rounded_once(f: Callable[[Array], Array], x: Array) -> Array:
    """f(x); for bf16 x on CPUs, f is computed in f32 and rounded once.

    Without this, XLA's CPU backend rounds after each of f's operations, which takes three times as long
    (tests/test_device.py::test_gelu_rounds_once). The backward pass keeps only x. On GPUs a GELU is part of a product's
    epilogue, in f32 (tests/test_compiled.py::test_forward).
    """
    if x.dtype != jnp.bfloat16 or device.platform() != "cpu":
        return f(x)
    return jax.checkpoint(lambda x: f(x.astype(F32)).astype(x.dtype), prevent_cse=False)(x)


ACTIVATIONS = {
    "quick_gelu": quick_gelu,
    "gelu": gelu_erf,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "silu": jax.nn.silu,
}
