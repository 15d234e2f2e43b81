"""Solvers of dx/dsigma = v: coefficient tables made on the host in f64, and one scan that serves them all.

Every step goes s -> t (falling sigmas) as x' = a x + b x0hat + c x0hat_prev, with x0hat = x - s v. The edge cases s = 1
and t = 0 are handled in the table, so that no logarithm of zero is ever traced.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Table(NamedTuple):
    """Per step: the sigma that the network sees, and the coefficients of x, x0hat and the previous x0hat."""

    sigma: np.ndarray
    x: np.ndarray
    x0: np.ndarray
    x0_prev: np.ndarray


def table(sigmas: np.ndarray, solver: str) -> Table:
    """sigmas f64 [steps + 1], falling from 1 to 0 -> Table of f64 [steps].

    euler: x' = x + (t - s) v = (t/s) x + (1 - t/s) x0hat. dpm1, DPM-Solver++ of first order, is the same formula.
    dpm2, DPM-Solver++(2M): x0hat is extrapolated by half a step, x0hat + r/2 (x0hat - x0hat_prev) with r = h/h_prev in
    lambda = ln((1-s)/s); first and last step stay first order, and so does the second, whose h_prev is infinite
    (algorithms.md 1.3 e, f). Raises ValueError for an unknown solver or sigmas that do not fall from at most 1 to 0.
    """
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.ndim != 1 or len(sigmas) < 2 or sigmas[0] > 1 or sigmas[-1] != 0 or np.any(np.diff(sigmas) >= 0):
        raise ValueError(f"sigmas {sigmas} must fall strictly from at most 1 to 0 in one step or more")
    s, t = sigmas[:-1], sigmas[1:]
    first_order = 1 - t / s
    r = np.zeros_like(s)
    if solver == "dpm2":
        with np.errstate(divide="ignore"):
            lam = np.log((1 - sigmas) / sigmas)
        h = np.diff(lam)
        r[1:-1] = h[1:-1] / h[:-2]  # h / inf = 0 at the second step
    elif solver not in ("euler", "dpm1"):
        raise ValueError(f"unknown solver {solver!r}: use euler, dpm1 or dpm2")
    return Table(s, t / s, first_order * (1 + 0.5 * r), -0.5 * r * first_order)


def sample(
    velocity: Callable[[Array, Array], Array], x1: Float[Array, "B h w c"], sigmas: np.ndarray, solver: str
) -> Float[Array, "B h w c"]:
    """Integrate from noise x1 (sigma 1) to the sample x0 (sigma 0); the state stays f32 whatever the network's dtype.

    velocity(x, sigma [B]) -> v like x.
    """
    steps = jax.tree.map(lambda c: jnp.asarray(c, jnp.float32), table(sigmas, solver))

    def step(carry, c: Table):
        x, previous = carry
        x0 = x - c.sigma * velocity(x, jnp.broadcast_to(c.sigma, x.shape[:1]))
        return (c.x * x + c.x0 * x0 + c.x0_prev * previous, x0), None

    (x0, _), _ = jax.lax.scan(step, (x1, jnp.zeros_like(x1)), steps)
    return x0
