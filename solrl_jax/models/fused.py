"""Attention whose scores stay on the chip: cuDNN's kernel on GPUs, JAX's own Pallas kernel on TPUs.

Of JAX's two kernels for TPUs, splash attention is used: it hands its backward pass one number a query, where flash
attention writes two rows of 128, and it names what the backward pass reads, so that a remat policy can keep it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from solrl_jax import device

LONG = {"gpu": 64, "tpu": 256}
"""Least number of tokens for the fused attention. The emoji world has 88: compiled for an H100, a training step reads
and writes a quarter less with it (test_the_emoji_world_has_the_fused_attention of tests/test_compiled.py); it has run
on an H200, but was not timed by itself. The small world has 40, too few for it to pay off."""
LANES = 128
"""A TPU's registers have this many columns: both lengths are padded to a multiple of it."""
BLOCKS = (512, 384, 256, 128)
"""Queries, and keys, that a TPU's kernel takes at a time: the first that divides the padded length."""

Heads = Float[Array, "B _ H d"]
Lengths = Int[Array, "B"]
Kernel = Literal["cudnn", "xla"]


def kernel_for(q: Heads) -> Callable[..., Heads] | None:
    """The device's kernel f(q, k, v, scale, lengths) for such queries; None if it lacks one or the queries are few."""
    platform, width = device.platform(), q.shape[-1]
    if q.shape[1] < LONG.get(platform, math.inf) or width % 8:
        return None
    if platform == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and width <= 128:
        return by_cudnn
    return by_pallas if platform == "tpu" and q.dtype == jnp.bfloat16 and width <= 512 else None


# --- GPUs -----------------------------------------------------------------------------------------------------------


def by_cudnn(q: Heads, k: Heads, v: Heads, scale: float, lengths: Lengths | None = None) -> Heads:
    if lengths is not None:
        return masked_attention(q, k, v, scale, "cudnn", lengths)
    if q.shape[1] % 2 or k.shape[1] % 2:
        return odd_attention(q, k, v, scale, "cudnn")
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def odd_attention(q: Heads, k: Heads, v: Heads, scale: float, kernel: Kernel) -> Heads:
    """The fused attention for odd lengths, such as SD3.5's 4096 + 205 tokens.

    JAX refuses to differentiate it at odd lengths. So where a gradient is asked for, one masked row is appended
    (tests/test_sd35_compiled.py::test_gradient).
    """
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation=kernel)


def masked_attention(
    q: Heads, k: Heads, v: Heads, scale: float, kernel: Kernel, lengths: Lengths | None = None
) -> Heads:
    """The fused attention to the first `lengths` keys (None: all); odd lengths are padded to even ones."""
    queries, keys = q.shape[1], k.shape[1]
    q, k, v = (_padded(x, 2) for x in (q, k, v))
    # Zeros computed from q, so that under vmap the lengths have q's batch axes, as JAX's rule requires
    # (test_gradient of tests/test_sd35_compiled.py and of tests/test_sana_compiled.py).
    none = 0 * jax.lax.stop_gradient(q)[:, 0, 0, 0].astype(jnp.int32)
    how: dict[str, Any] = {"scale": scale, "implementation": kernel}
    how |= {"query_seq_lengths": none + queries, "key_value_seq_lengths": none + (keys if lengths is None else lengths)}
    return jax.nn.dot_product_attention(q, k, v, **how)[:, :queries]


def _odd_forward(q: Heads, k: Heads, v: Heads, scale: float, kernel: Kernel):
    return jax.vjp(functools.partial(masked_attention, scale=scale, kernel=kernel), q, k, v)


odd_attention.defvjp(_odd_forward, lambda scale, kernel, back, out: back(out))


# --- TPUs -----------------------------------------------------------------------------------------------------------


def by_pallas(
    q: Heads, k: Heads, v: Heads, scale: float, lengths: Lengths | None = None, interpret: bool = False
) -> Heads:
    """Splash attention to the first `lengths` keys (None: all), for any lengths; `interpret` runs it on a CPU.

    The kernel has no scale, so q is scaled before it, and rounded to q's dtype again: not a change where d^-1/2 is a
    power of two (d = 64), one more rounding of q for d = 128. Its result and softmax sums are named "attention".
    """
    # Here, not above: only TPUs need it, and it takes 0.2 s.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    queries, keys = q.shape[1], k.shape[1]
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v = (jnp.swapaxes(_padded(x, LANES), 1, 2) for x in (q, k, v))
    padded, segments = (q.shape[2], k.shape[2]), None
    if lengths is not None or keys % LANES:
        # All queries are in segment 1, the padded ones too: a query without a key would divide by zero.
        seen = jnp.arange(padded[1])[None] < (jnp.full(len(k), keys) if lengths is None else lengths)[:, None]
        segments = splash.SegmentIds(jnp.ones((len(q), padded[0]), jnp.int32), seen.astype(jnp.int32))
    of_q, of_k = (next(size for size in BLOCKS if n % size == 0) for n in padded)
    backward: dict[str, Any] = {"block_q_dkv": of_q, "block_kv_dkv": of_k, "block_q_dq": of_q, "block_kv_dq": of_k}
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask(padded)] * q.shape[1]),
        block_sizes=splash.BlockSizes(of_q, of_k, **backward),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    out = cast(Array, jax.vmap(kernel)(q, k, v, segments))
    return jnp.swapaxes(out, 1, 2)[:, :queries]


def _padded(x: Heads, multiple: int) -> Heads:
    """x with zeros after its rows, up to a multiple of so many."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))
