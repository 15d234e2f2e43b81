"""Solvers against closed forms and published sigma tables."""

import itertools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import config, sampler, solvers

pytestmark = pytest.mark.usefixtures("strict_dtypes")

FLUX_10 = np.array([1, 0.944129, 0.882497, 0.814164, 0.737974, 0.652489, 0.555899, 0.445888, 0.319451, 0.172612, 0])


def toy(x, sigma):
    """A velocity that bends with sigma, so that the order of a solver shows."""
    return jnp.tanh(x) * (1 + sigma[:, None, None, None] ** 2) - 0.3 * x


def noise():
    return jax.random.normal(jax.random.key(0), (2, 4, 4, 3))


def reference(x, sigmas, second_order):
    """DPM-Solver++(2M), whose first and last step are Euler's, and Euler, in f64."""
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


# --- solvers with noise ---------------------------------------------------------------------------------------------

SD3_10 = np.array([1, 0.96012932, 0.91334897, 0.8576923, 0.79036826, 0.70727849, 0.60215056, 0.46487603, 0.27804878, 0])
SD3_10 = np.insert(SD3_10, 9, 0.00892857)
FLUX_6 = np.array([1, 0.903735578, 0.7897048, 0.652489424, 0.484218419, 0.27300331, 0])


def of_x_and_v(rows):
    """A table's first-order coefficients as those of x and v."""
    return rows.x + rows.x0[:, 0], -rows.sigma * rows.x0[:, 0]


def test_sde_golden():
    """The coefficients of Flow-GRPO (arXiv 2505.05470) on SD3, 10 steps, eta .7."""
    rows = sampler.table(SD3_10, "sde", 0.7)
    of_x, of_v = of_x_and_v(rows)
    x = [0.7550, 0.7125, 0.8426, 0.8841, 0.9029, 0.9120, 0.9155, 0.9145, 0.9087, 0.9978]
    v = [-0.0399, -0.0582, -0.0693, -0.0838, -0.1034, -0.1309, -0.1709, -0.2326, -0.3351, -0.0111]
    std = [0.7, 0.7430, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.2820, 0.2254, 0.00628]
    np.testing.assert_allclose(of_x, x, atol=6e-5)
    np.testing.assert_allclose(of_v, v, atol=6e-5)
    np.testing.assert_allclose(rows.noise, std, atol=6e-5)
    assert rows.noise[0] == pytest.approx(0.7, abs=1e-12) and of_x[0] == pytest.approx(1 - 0.7**2 / 2, abs=1e-12)


def test_dance_golden():
    """16 steps of shift 3, eta .3, as DanceGRPO's code on FLUX; the last step is the picture that it scores."""
    sigmas = sampler.shifted(16, 3.0)
    expect = [1, 0.978261, 0.954545, 0.928571, 0.9, 0.868421, 0.833333, 0.794118, 0.75, 0.7, 0.642857, 0.576923, 0.5]
    np.testing.assert_allclose(sigmas, [*expect, 0.409091, 0.3, 0.166667, 0], atol=1e-6)
    rows = sampler.table(sigmas, "dance", 0.3)
    std = [0.0442, 0.0462, 0.0483, 0.0507, 0.0533, 0.0562, 0.0594, 0.0630, 0.0671, 0.0717, 0.0770, 0.0832, 0.0905]
    np.testing.assert_allclose(rows.noise, [*std, 0.0991, 0.1095, 0], atol=6e-5)
    assert (rows.x[-1], rows.x0[-1, 0]) == (0, 1)
    s, d = sigmas[:-2], np.diff(sigmas)[:-1]
    of_x, of_v = of_x_and_v(rows)
    np.testing.assert_allclose(of_x[:-1], 1 + 0.09 * d / (2 * s), rtol=1e-12)
    np.testing.assert_allclose(of_v[:-1], d * (1 + 0.09 * (1 - s) / (2 * s)), rtol=1e-12)


def test_cps_golden():
    """The noise of flow_grpo's CPS, sin(eta pi/2) of the next sigma, at eta .8."""
    np.testing.assert_allclose(
        sampler.table(SD3_10, "cps", 0.8).noise,
        [0.9131, 0.8686, 0.8157, 0.7517, 0.6727, 0.5727, 0.4421, 0.2644, 0.0085, 0],
        atol=6e-5,
    )
    std = sampler.table(FLUX_6, "cps", 0.8).noise
    np.testing.assert_allclose(std, [0.8595, 0.7511, 0.6206, 0.4605, 0.2596, 0], atol=6e-5)


@pytest.mark.parametrize("solver", ["sde", "dance", "cps", "ddim"])
def test_without_noise_they_are_euler(solver):
    ours, euler = sampler.table(FLUX_10, solver, 0.0), sampler.table(FLUX_10, "euler")
    for a, b in zip(ours, euler, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-14)


@pytest.mark.parametrize(("solver", "eta"), [("sde", 0.7), ("dance", 0.3), ("ddim", 0.6), ("sa_solver", 0.4)])
def test_noise_keeps_the_distribution(solver, eta):
    """With the exact velocity of x0 ~ N(0, c^2), fine steps end in N(0, c^2), however noisy they are."""
    c2 = 0.25

    def velocity(x, sigma):
        s = sigma[:, None, None, None]
        return x * (s - (1 - s) * c2) / ((1 - s) ** 2 * c2 + s**2)

    steps = sampler.table(np.linspace(1, 0, 401), solver, eta)

    def draw(key):
        begin, path = jax.random.split(key)
        noise = lambda i: jax.random.normal(jax.random.fold_in(path, i), (64, 8, 8, 4))  # noqa: E731
        return sampler.sample(velocity, jax.random.normal(begin, (64, 8, 8, 4)), steps, noise)

    x0 = jax.jit(draw)(jax.random.key(0))
    assert float(jnp.std(x0)) == pytest.approx(0.5, rel=0.02)  # 16384 numbers: .5 +- .003, and the steps' own error


def sa_reference(x, sigmas, tau, noise):
    """AWM's use of SA-Solver, in f64: predict, evaluate, correct."""
    grid = np.array(sigmas, np.float64)
    grid[0] = 0.999
    grid[-2] = grid[-3] / 2
    lam = lambda s: np.log((1 - s) / s)  # noqa: E731
    model = lambda x, s: x - s * (np.tanh(x) * (1 + s**2) - 0.3 * x)  # noqa: E731
    m = [model(x, grid[0])]
    for k in range(1, len(grid) - 1):
        s, q, z = grid[k - 1], grid[k], noise[k - 1]
        t2 = tau**2 if 0.3 <= q <= 0.9 else 0.0
        a, h = 1 + t2, lam(q) - lam(s)
        stay, c0 = np.exp(-t2 * h) * q / s, (1 - q) * (1 - np.exp(-a * h))
        ns = q * np.sqrt(1 - np.exp(-2 * t2 * h))
        predicted = stay * x + c0 * m[-1] + ns * z
        if k > 1:
            predicted += a / 2 * (1 - q) * h**2 * (m[-1] - m[-2]) / (lam(s) - lam(grid[k - 2]))
        m.append(model(predicted, q))
        x = predicted if k == 1 else stay * x + c0 * m[-2] + a / 2 * (1 - q) * h * (m[-1] - m[-2]) + ns * z
    return m[-1]


@pytest.mark.parametrize(("sigmas", "tau"), [(FLUX_10, 0.4), (FLUX_10, 0.0), (SD3_10, 0.9), ([1, 0.6, 0], 0.4)])
def test_sa_solver_in_one_scan_is_the_published_one(sigmas, tau):
    z = jax.random.normal(jax.random.key(5), (len(sigmas), *noise().shape))
    ours = sampler.sample(toy, noise(), sampler.table(np.array(sigmas), "sa_solver", tau), lambda i: z[i])
    np.testing.assert_allclose(ours, sa_reference(np.asarray(noise(), np.float64), sigmas, tau, z), atol=2e-5)


def test_log_probabilities_golden():
    """Means over elements: Gaussian with its constants, and CPS's bare square."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, x0, z = (jax.random.normal(k, (1, 4, 4, 2)) for k in keys)
    for solver, eta in (("sde", 0.9), ("dance", 0.3), ("ddim", 0.5), ("cps", 0.8)):
        rows, law = sampler.table(FLUX_6, solver, eta), sampler.gaussians(FLUX_6, solver, eta)
        step = jax.tree.map(lambda c: jnp.asarray(c[2:3], jnp.float32), law)
        middle, std = sampler.mean(step, x, x0), rows.noise[2]
        np.testing.assert_allclose(middle, rows.x[2] * x + rows.x0[2, 0] * x0, rtol=1e-5)
        found = sampler.log_prob(step, middle, middle + std * z)
        square = float(jnp.mean(z**2))
        gaussian = -square / 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
        assert float(found[0]) == pytest.approx(-(std**2) * square if solver == "cps" else gaussian, rel=1e-4)
        assert law.diffusion[2] == pytest.approx(std / np.sqrt(FLUX_6[2] - FLUX_6[3]))
    assert sampler.gaussians(FLUX_6, "sde", 0.9).diffusion[1] ** 2 == pytest.approx(0.81 * FLUX_6[1] / (1 - FLUX_6[1]))


def test_a_window_has_noise_and_the_rest_is_euler():
    inside, outside = sampler.table(FLUX_6, "cps", 0.8), sampler.table(FLUX_6, "euler")
    steps = sampler.windowed(inside, outside, jnp.array([0, 2]), 3)
    np.testing.assert_allclose(steps.noise[:, 0], [*inside.noise[:3], 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(steps.noise[:, 1], [0, 0, *inside.noise[2:5], 0], rtol=1e-6)
    np.testing.assert_allclose(steps.x0[:, 1, 0], [*outside.x0[:2, 0], *inside.x0[2:5, 0], outside.x0[5, 0]], rtol=1e-6)
    x, z = noise(), jax.random.normal(jax.random.key(2), (6, *noise().shape))
    both = sampler.sample(toy, x, steps, lambda i: z[i])
    whole = sampler.sample(toy, x, sampler.table(FLUX_6, "euler"))
    assert not np.allclose(both, whole, atol=0.1)
    for row in range(2):
        alone = jax.tree.map(lambda c: c[:, row], steps)  # noqa: B023
        np.testing.assert_allclose(sampler.sample(toy, x, alone, lambda i: z[i])[row], both[row], rtol=1e-5, atol=1e-6)


def test_paths_are_what_the_steps_began_with():
    rows = sampler.table(FLUX_6, "sde", 0.9)
    z = jax.random.normal(jax.random.key(2), (6, *noise().shape))
    end, states = sampler.advance(toy, sampler.at_noise(noise(), rows), rows, lambda i: z[i], keep_path=True)
    states = np.concatenate([states, end.x[None]])
    np.testing.assert_array_equal(states[0], noise())
    for i, s in enumerate(FLUX_6[:-1]):
        found = states[i] - s * np.asarray(toy(jnp.asarray(states[i]), jnp.full(2, s)))
        expect = rows.x[i] * states[i] + rows.x0[i, 0] * found + rows.noise[i] * z[i]
        np.testing.assert_allclose(states[i + 1], expect, rtol=1e-4, atol=1e-5)


FLUX_5, SD35_5 = sampler.shifted(5, 1.878), np.array([1, 0.9, 0.751, 0.503, 0.009, 0])


@pytest.mark.parametrize("shift", [0.09, 0.15, 0.2, 0.3, 0.45, 1.0, 3.0])
def test_a_shifted_grid_begins_at_one(shift):
    """To the bit: at a rounding error above it a solver refuses it, and below it dpm2's second step has order 2."""
    sigmas = sampler.shifted(6, shift)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and np.all(np.diff(sigmas) < 0)
    assert sampler.table(sigmas, "dpm2").x0[1, 1] == 0


@pytest.mark.parametrize(
    ("sigmas", "after", "steps", "shift", "rest"),
    [
        (sampler.shifted(5, 1.0), 3, 4, 1.0, [0.3, 0.2, 0.1]),
        (sampler.shifted(4, 3.0), 2, 3, 3.0, [3 / 5, 3 / 8]),  # u of 1/2, then 1/3 and 1/6
        (SD35_5, 3, 2, 3.0, [0.30216]),  # sigma .503 is u .2523, the half of which is .1261
        (np.array([0.9997, 0.8, 0.5, 0]), 1, 2, 1.0, [0.4]),
    ],
)
def test_grid_of_a_branch(sigmas, after, steps, shift, rest):
    """Golden: the preview's sigmas to where it stands, then equal steps in u; and one multistep solve of the whole."""
    found = sampler.branched(sigmas, after, steps, shift)
    np.testing.assert_array_equal(found[: after + 1], sigmas[: after + 1])
    np.testing.assert_allclose(found[after + 1 :], [*rest, 0], atol=5e-5)
    for solver in ("euler", "dpm2"):
        one, two = sampler.table(sigmas, solver), sampler.table(found, solver)
        first = [sampler.rows(table, 0, after) for table in (one, two)]
        jax.tree.map(np.testing.assert_array_equal, *first)  # to the bit: the preview's rows
    # dpm2's row at the branch extrapolates from the preview's last step.
    lam = np.log((1 - found) / found, where=found < 1, out=np.full_like(found, -np.inf), casting="unsafe")[:-1]
    if after > 1 and steps > 1:
        r = (lam[after + 1] - lam[after]) / (lam[after] - lam[after - 1])
        assert two.x0[after, 1] == pytest.approx(-0.5 * r * (1 - found[after + 1] / found[after]), rel=1e-9)


def test_a_solve_in_two_parts_is_the_solve():
    table, x = sampler.table(sampler.branched(FLUX_5, 3, 4, 1.878), "dpm2"), noise()
    whole = sampler.sample(toy, x, table)
    state, path = sampler.advance(toy, sampler.at_noise(x, table), sampler.rows(table, 0, 3))
    end, _ = sampler.advance(toy, state, sampler.rows(table, 3))
    assert path is None and len(state.x0hats) == 1
    np.testing.assert_allclose(end.x, whole, rtol=1e-6, atol=1e-6)


def test_a_state_of_another_solver_is_refused():
    euler, dpm2 = (sampler.table(FLUX_5, solver) for solver in ("euler", "dpm2"))
    with pytest.raises(ValueError, match=r"a state with 0 x0hats, a table that takes 1: use the solver that left"):
        sampler.advance(toy, sampler.at_noise(noise(), euler), dpm2)


@pytest.mark.parametrize(("after", "steps"), [(0, 4), (5, 4), (3, 0)])
def test_a_branch_that_is_none_is_refused(after, steps):
    with pytest.raises(ValueError, match=rf"after={after} of 5 steps, then {steps}: branch after step 1 to 4"):
        sampler.branched(FLUX_5, after, steps, 1.878)


def test_noise_that_a_solver_does_not_have_is_refused():
    for solver, eta in (("euler", 0.1), ("dpm2", 0.7), ("cps", 1.5), ("sde", -0.1)):
        with pytest.raises(ValueError, match=f"eta={eta}: the noise of {solver} is 0 to"):
            sampler.table(FLUX_10, solver, eta)
    with pytest.raises(ValueError, match="a log-probability needs eta > 0 and one of ddim, sde, dance, cps"):
        sampler.gaussians(FLUX_10, "sa_solver", 0.4)


def test_a_grid_that_begins_just_below_one_begins_as_from_one():
    """SANA's own, .9997: 1 / (1 - sigma) would make the first step's noise 12 and its x -75."""
    below, at = (sampler.table(np.array([first, 0.94, 0.8, 0.5, 0.0]), "sde", 0.9) for first in (0.9997, 1.0))
    for mine, whole in zip(below[1:], at[1:], strict=True):
        np.testing.assert_allclose(mine, whole, atol=5e-3)


def test_solvers_limits_and_the_config_name_the_same():
    names = list(solvers.LIMITS)
    assert list(sampler.SOLVERS) == names == list(typing.get_args(config.Solver))
    for name, limits in solvers.LIMITS.items():
        most = min(limits.noise, 2.0)
        assert np.any(sampler.table(FLUX_10, name, most).noise > 0) == (limits.noise > 0)
        with pytest.raises(ValueError, match="the noise of" if limits.noise < math.inf else "noise"):
            sampler.table(FLUX_10, name, limits.noise + 0.1 if limits.noise < math.inf else -0.1)
        config.Stage(solver=name, eta=most)
