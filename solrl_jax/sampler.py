"""Solvers from noise to a picture: coefficient tables made on the host in f64, and one scan for all of them.

Every step goes s -> t (falling sigmas) as x' = a x + b0 x0hat + b1 x0hat_prev + ... + c z with x0hat = x - s v and z of
N(0, I), so a solver is a table and nothing else. The edge cases s = 1 and t = 0 are handled in the table: no logarithm
or quotient of zero is ever traced. A noisy step that depends on no earlier x0hat is a Gaussian; algorithms use its
mean and density (`gaussians`, `log_prob`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from solrl_jax.solvers import GAUSSIAN, LIMITS

F32 = jnp.float32


class Table(NamedTuple):
    """Per step: the sigma that the network sees; coefficients of x, of x0hat and the x0hats before it, and of noise.

    f64 [N]; for `x0` [N, M] with M - 1 steps of history. [N, B] and [N, B, M] if the steps of a batch's samples differ.
    """

    sigma: Any
    x: Any
    x0: Any
    noise: Any


def table(sigmas: np.ndarray, solver: str, eta: float = 0.0) -> Table:
    """sigmas f64 [N + 1], falling from 1 to 0 -> the N steps of a solver; `eta` is its noise.

    With eta = 0 ddim, sde, dance and cps are Euler; dance's special last step then equals Euler's.

    Raises ValueError for an unknown solver, an eta outside its range, or sigmas that do not fall from at most 1
    to 0.
    """
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.ndim != 1 or len(sigmas) < 2 or sigmas[0] > 1 or sigmas[-1] != 0 or np.any(np.diff(sigmas) >= 0):
        raise ValueError(f"sigmas {sigmas} must fall strictly from at most 1 to 0 in one step or more")
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: use one of {', '.join(SOLVERS)}")
    if not 0 <= eta <= LIMITS[solver].noise:
        raise ValueError(f"eta={eta}: the noise of {solver} is 0 to {LIMITS[solver].noise:g}")
    return SOLVERS[solver](sigmas, eta)


# --- solvers: (sigmas f64 [N + 1], eta) -> Table; s, t: where a step begins and ends; d = t - s ----------------------


def euler(sigmas: np.ndarray, eta: float) -> Table:
    """x' = x + d v. DPM-Solver++ of first order, dpm1, is the same formula."""
    s, t = sigmas[:-1], sigmas[1:]
    return Table(s, t / s, (1 - t / s)[:, None], np.zeros_like(s))


def dpm2(sigmas: np.ndarray, eta: float) -> Table:
    """DPM-Solver++(2M): x0hat is extrapolated by half a step, x0hat + r/2 (x0hat - x0hat_prev) with r = h/h_prev in
    lambda = ln((1-s)/s). First and last step are of first order, and so is the second, whose h_prev is infinite."""
    s, t = sigmas[:-1], sigmas[1:]
    with np.errstate(divide="ignore"):
        lam = np.log((1 - sigmas) / sigmas)
    h, r = np.diff(lam), np.zeros_like(s)
    r[1:-1] = h[1:-1] / h[:-2]  # h / inf = 0 at the second step
    first_order = 1 - t / s
    of_x0 = np.stack([first_order * (1 + 0.5 * r), -0.5 * r * first_order], axis=1)
    return Table(s, t / s, of_x0, np.zeros_like(s))


def sde(sigmas: np.ndarray, eta: float) -> Table:
    """Flow-GRPO's: a reverse SDE of Euler's marginals with diffusion g^2 = eta^2 s / (1 - s)."""
    s, t = sigmas[:-1], sigmas[1:]
    # At s = 1 Flow-GRPO takes the next sigma in g; SANA's own grid begins at .9997, where 1 - s is nearly 0.
    rest = np.where(s > 0.999, 1 - t, 1 - s)
    return _reverse(s, t, eta**2 * s / rest)


def dance(sigmas: np.ndarray, eta: float) -> Table:
    """DanceGRPO's: the same SDE with g = eta; its last step gives x0hat, which DanceGRPO decodes."""
    s, t = sigmas[:-1], sigmas[1:]
    steps = _reverse(s, t, np.full_like(s, eta**2))
    steps.x[-1], steps.x0[-1], steps.noise[-1] = 0, 1, 0
    return steps


def _reverse(s: np.ndarray, t: np.ndarray, g2: np.ndarray) -> Table:
    """mean = x (1 + g^2 d/(2s)) + v d (1 + g^2 (1-s)/(2s)), std = g sqrt(-d)."""
    d = t - s
    of_v = d * (1 + g2 * (1 - s) / (2 * s))
    return Table(s, 1 + g2 * d / (2 * s) + of_v / s, (-of_v / s)[:, None], np.sqrt(-g2 * d))


def ddim(sigmas: np.ndarray, eta: float) -> Table:
    """DDIM's noise, of share eta."""
    s, t = sigmas[:-1], sigmas[1:]
    return _shared(s, t, eta * np.sqrt(np.maximum(0.0, 1 - (t * (1 - s) / (s * (1 - t))) ** 2)))


def cps(sigmas: np.ndarray, eta: float) -> Table:
    """Flow-GRPO's coefficients-preserving step: noise t sin(eta pi/2), and t cos(eta pi/2) of ehat."""
    s, t = sigmas[:-1], sigmas[1:]
    return _shared(s, t, np.full_like(s, math.sin(eta * math.pi / 2)))


def _shared(s: np.ndarray, t: np.ndarray, share: np.ndarray) -> Table:
    """x' = (1 - t) x0hat + t sqrt(1 - share^2) ehat + t share z, ehat = (x - (1 - s) x0hat) / s."""
    ehat = t * np.sqrt(1 - share**2)
    return Table(s, ehat / s, ((1 - t) - ehat * (1 - s) / s)[:, None], t * share)


def sa_solver(sigmas: np.ndarray, tau: float) -> Table:
    """AWM's stochastic Adams: SA-Solver, predictor and corrector of order 2, one network call a step.

    A step has noise if it ends at a sigma of .3 to .9. The grid begins at .999; its last sigma above 0 is half of the
    one before. A step's corrector needs the x0hat at the step's end, so it is part of the next step's row:
    x' = L (x + corr (m - m1) - pred (m1 - m2)) + c0 m + pred' (m - m1) + noise z, with m1, m2 the earlier x0hats.
    """
    q = sigmas.copy()
    q[0] = min(q[0], 0.999)
    if len(q) > 2:
        q[-2] = q[-3] / 2
    s, t, n = q[:-1], q[1:], len(q) - 1
    lam = np.log((1 - s) / s)
    h = np.diff(lam)  # of the steps that end above 0
    tau2 = np.where((t[:-1] >= 0.3) & (t[:-1] <= 0.9), tau**2, 0.0)
    a = 1 + tau2
    decay = np.exp(-tau2 * h) * t[:-1] / s[:-1]
    c0 = (1 - t[:-1]) * -np.expm1(-a * h)
    corr, pred = np.zeros(n), np.zeros(n)  # of the step that ends at grid point i
    corr[2:] = a[1:] / 2 * (1 - s[2:]) * h[1:]
    pred[2:] = corr[2:] * h[1:] / h[:-1]
    of_x, of_x0, noise = np.zeros(n), np.zeros((n, 3)), np.zeros(n)
    of_x[:-1] = decay
    of_x0[:-1, 0] = decay * corr[:-1] + c0 + pred[1:]
    of_x0[:-1, 1] = -decay * (corr[:-1] + pred[:-1]) - pred[1:]
    of_x0[:-1, 2] = decay * pred[:-1]
    of_x0[-1, 0] = 1
    noise[:-1] = t[:-1] * np.sqrt(-np.expm1(-2 * tau2 * h))
    return Table(s, of_x, of_x0, noise)


SOLVERS: dict[str, Callable[[np.ndarray, float], Table]] = {
    "euler": euler,
    "dpm1": euler,
    "dpm2": dpm2,
    "ddim": ddim,
    "sde": sde,
    "dance": dance,
    "cps": cps,
    "sa_solver": sa_solver,
}
"""The names are those of solvers.LIMITS, which has their limits."""


# --- sigmas and the scan --------------------------------------------------------------------------------------------


def shifted(steps: int, shift: float) -> np.ndarray:
    """f64 [steps + 1]: s = shift u / (1 + (shift - 1) u) of u from 1 to 0 in equal steps (DanceGRPO's, with 3)."""
    u = np.linspace(1, 0, steps + 1)
    sigmas = shift * u / (1 + (shift - 1) * u)
    # A rounding error away with many a shift below .5: `table` refuses more than 1, and less gives dpm2 a wrong step.
    sigmas[0] = 1.0
    return sigmas


def windowed(inside: Table, outside: Table, first: Int[Array, "B"], length: int) -> Table:
    """Columns [N, B]: each sample takes `inside`'s steps first .. first + length - 1, and `outside`'s elsewhere."""
    step = jnp.arange(len(inside.sigma))[:, None]
    within = (step >= first[None]) & (step < first[None] + length)

    def column(a: np.ndarray, b: np.ndarray) -> Array:
        mask = within.reshape(within.shape + (1,) * (a.ndim - 1))
        return jnp.where(mask, jnp.asarray(a, F32)[:, None], jnp.asarray(b, F32)[:, None])

    return jax.tree.map(column, inside, outside)


def branched(sigmas: np.ndarray, after: int, steps: int, shift: float) -> np.ndarray:
    """f64 [after + steps + 1]: the first `after` steps of a grid, then `steps` new ones from there to 0.

    The new steps are equal in u, where sigma = shift u / (1 + (shift - 1) u) as in `shifted`. The table of this grid
    is one multistep solve; its first `after` rows are those of the table of `sigmas`.

    Raises ValueError unless 1 <= after < number of steps of `sigmas`, and steps >= 1.
    """
    if not 1 <= after < len(sigmas) - 1 or steps < 1:
        raise ValueError(
            f"after={after} of {len(sigmas) - 1} steps, then {steps}: branch after step 1 to {len(sigmas) - 2}, and "
            "take 1 step or more from there"
        )
    reached = sigmas[after]
    u = np.linspace(reached / (shift - (shift - 1) * reached), 0, steps + 1)[1:]
    return np.concatenate([sigmas[: after + 1], shift * u / (1 + (shift - 1) * u)])


class Carry(NamedTuple):
    """A solver's state between two steps, f32: x, and the x0hats of the earlier steps, newest first."""

    x: Float[Array, "*B h w c"]
    x0hats: tuple[Float[Array, "*B h w c"], ...] = ()


def at_noise(x1: Float[Array, "*B h w c"], steps: Table) -> Carry:
    """The state before a table's first step."""
    return Carry(x1, (jnp.zeros_like(x1),) * (np.shape(steps.x0)[-1] - 1))


def sample(
    velocity: Callable[[Array, Array], Array],
    x1: Float[Array, "B h w c"],
    steps: Table,
    noise: Callable[[Int[Array, ""]], Float[Array, "B h w c"]] | None = None,
) -> Float[Array, "B h w c"]:
    """All steps of a table, from noise x1 (sigma 1) to the sample x0 (sigma 0); see `advance`."""
    return advance(velocity, at_noise(x1, steps), steps, noise)[0].x


def advance(
    velocity: Callable[[Array, Array], Array],
    carry: Carry,
    steps: Table,
    noise: Callable[[Int[Array, ""]], Float[Array, "B h w c"]] | None = None,
    *,
    keep_path: bool = False,
) -> tuple[Carry, Float[Array, "N B h w c"] | None]:
    """Take the N steps of a table, or of a part of one (`rows`), from a solver's state.

    velocity(x, sigma [B]) -> v like x; noise(step) -> z like x, for a table with noise. Returns the new state, and
    with `keep_path` the x before each step. The state stays f32 for every dtype of the network.
    """
    history, columns_of_x0 = len(carry.x0hats), np.shape(steps.x0)[-1]
    if columns_of_x0 != history + 1:
        raise ValueError(
            f"a state with {history} x0hats, a table that takes {columns_of_x0 - 1}: use the solver that left the state"
        )
    index = jnp.arange(np.shape(steps.sigma)[0])
    columns = jax.tree.map(lambda c: jnp.asarray(c, F32), steps)

    def step(carry, row: tuple[Table, Array]):
        (x, earlier), (c, i) = carry, row
        sigma = jnp.broadcast_to(c.sigma, x.shape[:1])
        found = (x - over(c.sigma, x) * velocity(x, sigma), *earlier)
        new = over(c.x, x) * x
        for k, x0 in enumerate(found):
            new = new + over(c.x0[..., k], x) * x0
        if noise is not None:
            new = new + over(c.noise, x) * noise(i)
        return Carry(new, found[:history]), x if keep_path else None

    return jax.lax.scan(step, carry, (columns, index))


def rows(steps: Table, first: int, last: int | None = None) -> Table:
    """The steps `first` .. `last` - 1 of a table."""
    return jax.tree.map(lambda column: column[first:last], steps)


def over(c: Array, x: Array) -> Array:
    """A scalar, or one number per sample [B], shaped to broadcast against x [B, ...]."""
    return c.reshape(c.shape + (1,) * (x.ndim - 1)) if c.ndim else c


class Gaussian(NamedTuple):
    """Steps x' ~ N(on_x x + on_x0 x0hat, std^2): leaves [N], or [B], a step per sample; `diffusion` = std / sqrt(-d).

    log p(x') = log_norm - precision mean |x' - mean|^2, over all but the batch axis (the mean, not the sum).
    """

    on_x: Any
    on_x0: Any
    precision: Any
    log_norm: Any
    diffusion: Any


def gaussians(sigmas: np.ndarray, solver: str, eta: float) -> Gaussian:
    """The noisy steps of a solver, f64 [N]; steps without noise have precision 0 and no meaning.

    sde, dance, ddim: precision 1/(2 std^2) and log_norm -ln(std) - ln(2 pi)/2; cps: 1 and 0, as Flow-GRPO defines it.
    """
    if solver not in GAUSSIAN or eta <= 0:
        raise ValueError(
            f"solver {solver}, eta={eta}: a log-probability needs eta > 0 and one of {', '.join(GAUSSIAN)}"
        )
    rows = table(sigmas, solver, eta)
    std = np.where(rows.noise > 0, rows.noise, np.inf)
    known = rows.noise > 0
    precision = known * 1.0 if solver == "cps" else 1 / (2 * std**2)
    log_norm = np.zeros_like(std) if solver == "cps" else -np.log(np.where(known, std, 1)) - math.log(2 * math.pi) / 2
    return Gaussian(rows.x, rows.x0[:, 0], precision, log_norm, rows.noise / np.sqrt(-np.diff(sigmas)))


def mean(step: Gaussian, x: Float[Array, "B h w c"], x0: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
    """The mean of a step from x, given x0hat; leaves of `step` [B]."""
    return over(step.on_x, x) * x + over(step.on_x0, x) * x0


def log_prob(step: Gaussian, mean: Float[Array, "B h w c"], x_next: Float[Array, "B h w c"]) -> Float[Array, "B"]:
    """Log-density of the step to `x_next`, averaged over its elements; leaves of `step` [B]."""
    return step.log_norm - step.precision * jnp.mean((x_next - mean) ** 2, axis=(1, 2, 3))
