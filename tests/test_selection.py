"""Selection: golden indices, ties, properties."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import selection
from solrl_jax.selection import ranks

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# Operation by operation they would be compiled for longer than as programs.
select = jax.jit(selection.select, static_argnums=(1, 2))
fidelity = jax.jit(selection.fidelity, static_argnums=2)
spearman, take = jax.jit(selection.spearman), jax.jit(selection.take)
KEY = jax.random.key(0)
REWARD = jnp.array([[0.1, 0.9, 0.4, 0.7, 0.2, 0.8], [5.0, 1.0, 4.0, 2.0, 3.0, 0.0]])


def test_golden():
    np.testing.assert_array_equal(select(REWARD, 4, "best_worst"), [[1, 5, 4, 0], [0, 2, 1, 5]])
    np.testing.assert_array_equal(select(REWARD, 3, "best_worst"), [[1, 5, 0], [0, 2, 5]])
    np.testing.assert_array_equal(select(REWARD, 3, "top"), [[1, 5, 3], [0, 2, 4]])
    np.testing.assert_array_equal(select(REWARD, 6, "all"), [range(6), range(6)])


@pytest.mark.parametrize("rule", ["best_worst", "top", "max_variance", "random"])
@pytest.mark.parametrize("kept", [2, 8, 24])
def test_ties_never_pick_twice(rule, kept):
    """All equal: Sol-RL's code picks 12 distinct of 24; one sort cannot."""
    index = np.asarray(select(jnp.zeros((3, 24)), kept, rule, jax.random.uniform(KEY, (3, 24))))
    assert all(len(set(row)) == kept for row in index)


def test_keeping_all_keeps_every_candidate():
    index = select(REWARD, 6, "best_worst")
    np.testing.assert_array_equal(np.sort(index, axis=-1), [range(6), range(6)])


def test_max_variance_is_the_best_of_all_subsets():
    """Against every subset of 4 of 8, on skewed rewards, whose best split is not the middle one."""
    reward = jax.random.normal(KEY, (16, 8)) ** 3
    kept = take(reward, select(reward, 4, "max_variance"))
    subsets = np.array(list(itertools.combinations(range(8), 4)))
    best = np.var(np.asarray(reward)[:, subsets], axis=-1).max(axis=1)
    np.testing.assert_allclose(np.var(np.asarray(kept), axis=-1), best, rtol=1e-5)
    assert (np.diff(np.asarray(kept), axis=-1) <= 0).all()  # best first
    middle = take(reward, select(reward, 4, "best_worst"))
    assert (np.var(np.asarray(middle), axis=-1) < best - 1e-3).any()


def test_permuting_candidates_permutes_the_kept():
    order = jnp.array([3, 1, 5, 0, 2, 4])
    kept = take(REWARD, select(REWARD, 4, "best_worst"))
    np.testing.assert_array_equal(take(REWARD[:, order], select(REWARD[:, order], 4, "best_worst")), kept)


def test_random_differs_between_keys_and_prompts():
    a, b = (select(jnp.zeros((4, 96)), 24, "random", jax.random.uniform(key, (4, 96))) for key in jax.random.split(KEY))
    assert not np.array_equal(a, b)
    assert not np.array_equal(a[0], a[1])


@pytest.mark.parametrize(
    ("kept", "rule", "match"),
    [(7, "top", "kept=7 of 6"), (0, "top", "kept=0"), (2, "median", "unknown"), (2, "random", "by chance")],
)
def test_bad_requests(kept, rule, match):
    with pytest.raises(ValueError, match=match):
        select(REWARD, kept, rule)


def test_spearman():
    a = jnp.array([[1.0, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 1, 1, 1, 1]])
    b = jnp.array([[2.0, 4, 6, 8, 1000], [5, 6, 7, 8, 7], [1, 2, 3, 4, 5]])
    np.testing.assert_allclose(spearman(a, b), [1.0, 0.8207826816681233, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(ranks(jnp.array([3.0, 1.0, 3.0, 2.0])), [2.5, 0.0, 2.5, 1.0])


def test_fidelity_of_perfect_reversed_and_blind_previews():
    truth = jax.random.normal(jax.random.key(0), (50, 24))
    values = [{k: float(v.mean()) for k, v in fidelity(p, truth, 8).items()} for p in (truth, -truth)]
    names = []
    jax.eval_shape(lambda x: names.extend(selection.fidelity(x, x, 8)), truth)  # programs sort what they return
    assert names == ["spearman", "overlap", "kept_contrast"]
    assert [values[0][name] for name in names] == pytest.approx([1, 1, 1], abs=1e-6)
    assert [values[1][name] for name in names] == pytest.approx([-1, 0, -1], abs=1e-6)
    blind = fidelity(jax.random.normal(jax.random.key(1), (50, 24)), truth, 8)
    assert abs(blind["spearman"].mean()) < 0.1 and abs(blind["kept_contrast"].mean()) < 0.15
    assert blind["overlap"].mean() == pytest.approx(4 / 24, abs=0.08)
    np.testing.assert_array_equal(fidelity(truth, jnp.ones((50, 24)), 8)["kept_contrast"], 0)


def test_prompts_with_one_reward_have_no_rank():
    """A perfect preview of a reward that tells the candidates of one prompt in four apart is perfect."""
    truth = jnp.zeros((4, 6)).at[1].set(jnp.arange(6.0))
    found = fidelity(truth, truth, 4)
    assert {name: float(selection.mean_of_ranked(x, truth)) for name, x in found.items()} == pytest.approx(
        {"spearman": 1, "overlap": 1, "kept_contrast": 1}
    )
    blind = fidelity(jnp.zeros((4, 6)), truth, 4)
    assert float(selection.mean_of_ranked(blind["spearman"], truth)) == 0
    assert np.isnan(selection.mean_of_ranked(found["spearman"], jnp.ones((4, 6))))


def test_fidelity_golden():
    """Chosen 1, 2 and 5, 0 for the true 0, 1 and 4, 5: contrast (5 - 2.5) / (5.5 - .5)."""
    truth, preview = jnp.array([[6.0, 5, 4, 2, 1, 0]]), jnp.array([[0.0, 5, 4, 3, 2, 1]])
    found = fidelity(preview, truth, 4)
    assert float(found["overlap"][0]) == 0.5 and float(found["kept_contrast"][0]) == pytest.approx(
        ((5 + 4) / 2 - (0 + 6) / 2) / ((6 + 5) / 2 - (1 + 0) / 2)
    )
