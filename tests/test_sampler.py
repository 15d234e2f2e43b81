"""Solvers against closed forms and published sigma tables."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import sampler

FLUX_10 = np.array([1, 0.944129, 0.882497, 0.814164, 0.737974, 0.652489, 0.555899, 0.445888, 0.319451, 0.172612, 0])


def toy(x, sigma):
    """A velocity that bends with sigma, so that the order of a solver shows."""
    return jnp.tanh(x) * (1 + sigma[:, None, None, None] ** 2) - 0.3 * x


def noise():
    return jax.random.normal(jax.random.key(0), (2, 4, 4, 3))


def reference(x, sigmas, second_order):
    """DPM-Solver++(2M) and Euler straight from algorithms.md 1.3 (a), (d), (f), in f64."""
    x = np.asarray(x, np.float64)
    sigmas = np.asarray(sigmas, np.float64)
    lam = lambda s: np.log((1 - s) / s)  # noqa: E731
    steps, m1 = len(sigmas) - 1, None
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        v = np.asarray(np.tanh(x) * (1 + s**2) - 0.3 * x)
        m0 = x - s * v
        if i in (0, steps - 1) or not second_order:
            x = x + (t - s) * v
        else:
            h = lam(t) - lam(s)
            h0 = np.inf if sigmas[i - 1] == 1 else lam(s) - lam(sigmas[i - 1])
            d1 = (h / h0) * (m0 - m1)
            x = t / s * x - (1 - t) * np.expm1(-h) * (m0 + 0.5 * d1)
        m1 = m0
    return x


@pytest.mark.parametrize(("solver", "second"), [("euler", False), ("dpm1", False), ("dpm2", True)])
def test_solvers_equal_their_formulas(solver, second):
    x = jax.jit(lambda x: sampler.sample(toy, x, sampler.table(FLUX_10, solver)))(noise())
    np.testing.assert_allclose(x, reference(noise(), FLUX_10, second), rtol=2e-5, atol=2e-6)


def test_dpm2_with_three_steps_is_first_order():
    sigmas = np.array([1, 0.8, 0.4, 0])
    np.testing.assert_array_equal(sampler.table(sigmas, "dpm2").x0[:, 1], 0)
    np.testing.assert_allclose(
        sampler.sample(toy, noise(), sampler.table(sigmas, "dpm2")),
        sampler.sample(toy, noise(), sampler.table(sigmas, "euler")),
        rtol=1e-6,
    )


def test_straight_paths_are_exact_in_one_step():
    """v = eps - x0 is constant along a straight path: any number of steps lands on x0."""
    x0, eps = noise() * 0.5, jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    for sigmas in ([1, 0], [1, 0.7, 0.2, 0]):
        out = sampler.sample(lambda x, s: eps - x0, eps, sampler.table(np.array(sigmas), "dpm2"))
        np.testing.assert_allclose(out, x0, atol=2e-6)


def test_samples_do_not_depend_on_their_batch():
    x = noise()
    both = sampler.sample(toy, x, sampler.table(FLUX_10, "dpm2"))
    np.testing.assert_allclose(sampler.sample(toy, x[1:], sampler.table(FLUX_10, "dpm2")), both[1:], rtol=1e-6)


@pytest.mark.parametrize("sigmas", [[1.0], [1, 0.5, 0.6, 0], [1, 0.5], [1.2, 0.5, 0]])
def test_bad_sigmas_are_refused(sigmas):
    with pytest.raises(ValueError, match="must fall strictly"):
        sampler.table(np.array(sigmas), "euler")


def test_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="unknown solver 'heun'"):
        sampler.table(FLUX_10, "heun")
