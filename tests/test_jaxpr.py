"""What the plan cannot count it refuses, instead of counting nothing."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas
from jax.extend.core import Primitive

from solrl_jax import config, plan
from solrl_jax.plan import cards, jaxpr, shapes

X = jax.ShapeDtypeStruct((4, 4), jnp.float32)


def made_up(name: str, **params):
    """An operation of that name, of an array like its input."""
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda x, **_: x)
    return lambda x: primitive.bind(x, **params)


def kernel(x, out):
    out[...] = x[...] @ x[...]


BODY = jax.make_jaxpr(lambda x: x @ x)(jnp.ones((4, 4)))
UNKNOWN = {
    "programs in a parameter": (made_up("run_twice", body=BODY), "run_twice, which runs the program in .* body"),
    "in a tuple of one": (made_up("run_both", bodies=(1, (BODY.jaxpr,))), "run_both, .* parameter bodies"),
    "a call by another parameter": (made_up("remat2", inner=BODY), "remat2, .* parameter inner"),
    "a call without a program": (made_up("closed_call", function=1), "closed_call, .* no program in jaxpr or call"),
    "another product": (made_up("scaled_dot_v2"), "scaled_dot_v2, which multiplies"),
    "a ragged product": (lambda x: jax.lax.ragged_dot(x, x[None], jnp.array([4])), "ragged_dot_general, which multip"),
    "a linear solve": (
        lambda x: jax.lax.custom_linear_solve(lambda y: x @ y, x, lambda f, b: b),
        "custom_linear_solve",
    ),
    "a root's derivative": (lambda x: jax.jvp(root, (x,), (x,))[1], "custom_linear_solve, .* parameter jaxprs"),
    "a decomposition": (jnp.linalg.cholesky, "cholesky, which multiplies"),
    "a kernel": (lambda x: pallas.pallas_call(kernel, out_shape=x)(x), "pallas_call, .* parameter jaxpr"),
}


def root(a):
    def solve(g, y):
        return jax.lax.custom_linear_solve(g, y, lambda f, b: b)

    return jax.lax.custom_root(lambda y: y - a, a, lambda f, x: x + a, solve)


@pytest.mark.parametrize(("f", "said"), UNKNOWN.values(), ids=UNKNOWN.keys())
@pytest.mark.parametrize("count", [jaxpr.flops, jaxpr.peak])
def test_what_is_not_known_is_refused(f, said, count):
    """Also inside of a branch of a loop's body that is made anew."""

    def deep(x):
        step = jax.checkpoint(lambda x, _: (jax.lax.cond(x[0, 0] > 0, f, lambda x: x, x), None))
        return jax.lax.scan(step, x, None, length=3)[0]

    for program in (f, deep):
        with pytest.raises(jaxpr.CostError, match=f"cannot count the operation {said}"):
            count(jaxpr.trace(program, X))


@jax.custom_vjp
def doubled(x):
    return 2 * (x @ x)


doubled.defvjp(lambda x: (doubled(x), x), lambda x, g: (g @ x @ x,))


def test_calls_choices_loops_and_sums():
    """64 multiply-adds a product of 4 x 4; a `while` counts once, its test too, and of a choice the costlier branch."""
    one = 2 * 4**3
    programs = {
        1: (
            doubled,
            jax.jit(lambda x: x @ x),
            lambda x: x.at[0].add(1.0) @ x.at[x.argmax()].set(0),
            lambda x: x @ x + summed(x)[None],
        ),
        2: (lambda x: jax.lax.while_loop(lambda x: (x @ x)[0, 0] < 3, lambda x: x @ x, x),),
        3: (jax.grad(lambda x: doubled(x).sum()), lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x, cube, x)),
        12: (lambda x: jax.lax.scan(lambda x, _: (cube(x), None), x, None, length=4)[0],),
    }
    for products, some in programs.items():
        for f in some:
            traced = jaxpr.trace(f, X)
            assert jaxpr.flops(traced) == {"float32": products * one} and jaxpr.peak(traced) >= 64


def test_ffts_count_and_are_exact():
    """Of 16 numbers in two dimensions 4 levels; three such pictures of real numbers, to complex ones and back."""
    x = jax.ShapeDtypeStruct((3, 4, 4), jnp.float32)
    there = jaxpr.trace(jnp.fft.rfft2, x)
    assert jaxpr.flops(there) == {"float32 highest": 3 * 2.5 * 16 * 4} and jaxpr.peak(there) == 3 * 4 * 3 * 8
    back = jaxpr.trace(lambda x: jnp.fft.irfft2(jnp.fft.rfft2(x)), x)
    assert jaxpr.flops(back) == {"float32 highest": 2 * 480}
    whole = jaxpr.trace(jnp.fft.fft2, jax.ShapeDtypeStruct((3, 4, 4), jnp.complex64))
    assert jaxpr.flops(whole) == {"float32 highest": 2 * 480}


def cube(x):
    return x @ x @ x @ x


def summed(x):
    return jax.lax.reduce(x, 0.0, lambda a, b: a + 2 * b, (0,))


@pytest.mark.slow
@pytest.mark.skipif(not jaxpr.as_on_gpus(), reason="native NVFP4 is traced as f32 where no CUDA plugin is installed")
def test_native_nvfp4_counts(tmp_path):
    """As many FLOPs as where it is emulated in bf16, and four times as fast as those."""
    work = {}
    for card, precision in (("B200 180GB", "nvfp4_native"), ("A100 80GB", "nvfp4_emulated")):
        words = {"prompts": "1", "explore.precision": precision, "reward": "shapes"}
        cfg = shapes.with_configs(config.load("flux", words), tmp_path / precision)
        work[precision] = plan.use_of("explore", cfg, shapes.read(cfg, 1), 1, plan.CARDS[card]).flops
    native, emulated = work.values()
    assert native.total() == emulated.total() and native["float4_e2m1fn"] > 0.9 * native.total()
    assert cards.seconds(native, plan.CARDS["B200 180GB"]) < cards.seconds(emulated, plan.CARDS["B200 180GB"]) / 3
