"""Several rewards: what orders a prompt's samples, by the golden numbers of the formulas' specification, 2.1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import algos, config, iteration, mixture
from solrl_jax.config import Config, Learn
from solrl_jax.run import guards
from solrl_jax.structs import Rollout

PICK = [[0.80, 0.84, 0.86, 0.82], [0.78, 0.79, 0.83, 0.80]]
IR = [[0.2, -0.4, 0.9, 0.3], [1.1, 0.4, 0.6, -0.5]]
S = [[-1.44411, -0.96452, 2.74541, -0.33678], [0.14585, -0.53168, 1.94053, -1.55469]]
A = [[-0.98615, -0.65865, 1.87478, -0.22998], [0.09960, -0.36307, 1.32515, -1.06167]]


def rolled(weights=(1.0, 1.0), **parts) -> Rollout:
    parts = {name: jnp.asarray(part, jnp.float32) for name, part in parts.items()}
    total = sum(w * part for w, part in zip(weights, parts.values(), strict=False))
    return Rollout(jax.random.split(jax.random.key(0), total.shape), None, total, parts)


def tagged(**asked) -> Rollout:
    """PICK and IR, of which each prompt asks for those with a 1; parts are 0 in the others, as rollouts give them."""
    has = {k: np.repeat(np.array(x, np.float32)[:, None], 4, axis=1) for k, x in asked.items()}
    found = rolled(pickscore=PICK * has["pickscore"], imagereward=IR * has["imagereward"])
    return found._replace(asked={name: jnp.asarray(x) for name, x in has.items()})


def of(rule: str, reward="pickscore,imagereward", spread="prompt") -> Config:
    explored = {"explore": None} if spread == "all" else {}  # gdpo over all prompts: without a preview alone
    return Config(reward=reward, reward_rule=rule, learn=Learn(advantage_spread=spread), **explored)


def test_golden():
    """With the raw sum imagereward alone decides the second prompt's best; normalised it is another sample."""
    found = rolled(pickscore=PICK, imagereward=IR)
    np.testing.assert_allclose(mixture.worth(found, of("gdpo")), S, atol=2e-5)
    np.testing.assert_allclose(mixture.advantages(found, of("gdpo")), A, atol=2e-5)
    best = [jnp.argmax(mixture.worth(found, of(rule)), axis=-1).tolist() for rule in ("sum", "gdpo")]
    assert best == [[2, 0], [2, 2]] and jnp.argmax(jnp.asarray(IR), axis=-1).tolist() == [2, 0]


def test_what_a_sum_cannot_tell_apart():
    """Two rewards of two samples: 1 for 0, once, in both rewards, and in one of equal others."""
    found = rolled(pickscore=[[0, 0], [0, 1], [0, 1]], imagereward=[[0, 1], [0, 1], [1, 1]])
    unbiased = mixture.worth(found, of("gdpo", spread="prompt_unbiased"))
    np.testing.assert_allclose(unbiased[:, 1], [0.7071068, 1.4142136, 0.7071068], rtol=1e-6)
    np.testing.assert_allclose(unbiased[:, 0], -unbiased[:, 1])
    population = mixture.worth(found, of("gdpo"))
    np.testing.assert_allclose(population[:, 1], [0.9998, 1.9996, 0.9998], rtol=1e-5)
    np.testing.assert_allclose(mixture.whitened(population)[:, 1], [0.707057, 1.414114, 0.707057], rtol=1e-5)
    raw = algos.advantages(found.reward, "prompt_unbiased")
    np.testing.assert_allclose(raw[:, 1], [0.7071068] * 3, rtol=1e-6)  # normalised after the sum, all are the same


def test_weights_weigh_whatever_the_scales():
    """The order does not change with a reward's unit; with the raw sum it does. A negative weight turns it round."""
    scaled = rolled(pickscore=1000 * np.asarray(PICK), imagereward=IR)
    plain = rolled(pickscore=PICK, imagereward=IR)
    np.testing.assert_allclose(mixture.worth(scaled, of("gdpo")), mixture.worth(plain, of("gdpo")), atol=2e-2)
    assert not np.array_equal(*(np.argsort(mixture.worth(x, of("sum")), axis=-1) for x in (scaled, plain)))
    alone = [
        mixture.worth(plain, of("gdpo", reward=f"pickscore:{a},imagereward:{b}")) for a, b in ((2, 1), (1, 1), (1, -1))
    ]
    z = [algos.advantages(jnp.asarray(x, jnp.float32), "prompt") for x in (PICK, IR)]
    for found, (a, b) in zip(alone, ((2, 1), (1, 1), (1, -1)), strict=True):
        np.testing.assert_allclose(found, a * z[0] + b * z[1], atol=1e-6)


def test_one_reward_is_the_plain_rule():
    """Where there is nothing to combine, the program is the same."""
    found = rolled(clipscore=PICK)
    for function in (mixture.worth, mixture.advantages):
        plain, other = (
            str(jax.make_jaxpr(lambda f, r=rule: function(f, of(r, "clipscore")))(found))  # noqa: B023
            for rule in ("sum", "gdpo")
        )
        assert plain == other
    assert mixture.metrics(found, of("gdpo", "clipscore")) == {}
    np.testing.assert_array_equal(mixture.worth(found, of("sum", "clipscore")), found.reward)


def test_a_reward_that_is_constant_says_nothing():
    found = rolled(pickscore=PICK, imagereward=[[0.3] * 4, IR[1]])
    z = algos.advantages(jnp.asarray(PICK, jnp.float32), "prompt")
    np.testing.assert_array_equal(mixture.worth(found, of("gdpo"))[0], z[0])
    metrics = mixture.metrics(found, of("gdpo"))
    assert float(metrics["zero_std/imagereward"]) == 0.5 and float(metrics["zero_std/pickscore"]) == 0
    assert np.isfinite(list(map(float, metrics.values()))).all()


def test_a_prompt_is_compared_as_it_is_beside_others():
    """The candidates of a block of prompts are compared before the next are drawn: no number of another prompt counts,
    or stages run from the host would keep other samples than one program."""
    found = rolled(pickscore=PICK, imagereward=IR)
    first = jax.tree.map(lambda x: x[:1], found)
    for spread in ("prompt", "prompt_unbiased"):
        cfg = of("gdpo", spread=spread)
        np.testing.assert_array_equal(mixture.worth(first, cfg), mixture.worth(found, cfg)[:1])
    with pytest.raises(
        config.ConfigError, match=r"^learn\.advantage_spread=all with reward_rule=gdpo: .* use prompt, "
    ):
        Config(reward="a,b", reward_rule="gdpo")
    for cfg in (of("gdpo", "clipscore", "all"), of("sum", spread="all")):
        np.testing.assert_array_equal(mixture.worth(first, cfg), mixture.worth(found, cfg)[:1])
    alone = Config(reward="a,b", reward_rule="gdpo", explore=None)  # all samples are there when they are compared
    assert alone.learn.advantage_spread == "all"


@pytest.mark.parametrize("rule", ["sum", "gdpo"])
def test_selection_strata_ranks_and_advantages_take_one_order(rule):
    words = {"learn.micro_batch": "6", "explore.chunk": "4", "regenerate.chunk": "2"}
    words |= {"prompts": "2", "candidates": "4", "kept": "2"}
    cfg = config.override(of(rule), **words)
    found, chance = rolled(pickscore=PICK, imagereward=IR), jnp.zeros((2, 4))
    preview, chosen = iteration.select_keys(found, chance, cfg=cfg)
    order = np.argsort(-np.asarray(mixture.worth(found, cfg)), axis=-1)
    expect = np.take_along_axis(np.asarray(PICK), order[:, [0, 3]], axis=-1)
    np.testing.assert_allclose(chosen.parts["pickscore"], expect, rtol=1e-6)
    metrics = iteration.compare(preview, chosen, chosen, cfg=cfg)
    assert float(metrics["rank/spearman"]) == 1 and float(metrics["reward/mean"]) == pytest.approx(
        float(chosen.reward.mean())
    )
    assert {"share/pickscore", "corr/imagereward", "reward_std/pickscore"} <= metrics.keys()
    assert ("advantage/std" in metrics) == (rule == "gdpo")


def test_shares_and_correlations():
    found = rolled(pickscore=PICK, imagereward=IR)
    std = [np.std(x, axis=-1).mean() for x in (PICK, IR)]
    by_sum, by_parts = (mixture.metrics(found, of(rule)) for rule in ("sum", "gdpo"))
    assert float(by_sum["share/imagereward"]) == pytest.approx(std[1] / sum(std), rel=1e-5) and std[1] > 10 * std[0]
    assert 0.4 < float(by_parts["share/imagereward"]) < 0.6
    expect = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(PICK, S, strict=True)])
    assert float(by_parts["corr/pickscore"]) == pytest.approx(expect, abs=1e-4)
    assert float(by_parts["advantage/std"]) == pytest.approx(np.std(S), rel=1e-4)


@pytest.mark.parametrize(("rule", "spreads", "said"), [
    ("sum", (0.02, 0.5), True), ("sum", (0.1, 0.5), False), ("sum", (0.0, 0.5), False), ("gdpo", (0.02, 0.5), False),
])  # fmt: skip
def test_a_reward_that_decides_alone_is_told(rule, spreads, said):
    """By the first iteration, once; the weights that it names make the spreads equal."""
    names = ("pickscore", "imagereward")
    line = {"iteration": 1, "loss": 1.0} | {f"reward_std/{n}": s for n, s in zip(names, spreads, strict=True)}
    found = guards.alarms([line, {**line, "iteration": 2}], of(rule)).get("scales", "")
    assert bool(found) == said
    if said:
        assert "of the sum of rewards imagereward decides" in found and "reward_rule=gdpo" in found
        assert found.endswith("reward=pickscore:50,imagereward:2")
    weighted = guards.alarms([line], of(rule, "pickscore:50,imagereward:2"))
    assert "scales" not in weighted or spreads != (0.02, 0.5)


def test_every_rule_is_named():
    with pytest.raises(config.ConfigError, match=r"--config\.reward_rule=mean: use one of sum, gdpo"):
        config.override(Config(), reward_rule="mean")


# --- prompts that name their rewards ---------------------------------------------------------------------------------

TAGGED_S = [S[0], [-1.06336, -0.53168, 1.59504, 0]]
TAGGED_A = [[-1.06802, -0.71333, 2.03042, -0.24907], [-0.78643, -0.39322, 1.17965, 0]]


def test_golden_of_a_prompt_that_asks_for_one_reward():
    """The second prompt asks for pickscore only: nothing of its S is imagereward's."""
    found = tagged(pickscore=[1, 1], imagereward=[1, 0])
    score = mixture.worth(found, of("gdpo"))
    np.testing.assert_allclose(score, TAGGED_S, atol=2e-5)
    np.testing.assert_allclose(mixture.advantages(found, of("gdpo")), TAGGED_A, atol=2e-5)
    np.testing.assert_allclose(np.std(score, axis=-1), [1.633, 0.995], atol=1e-3)
    np.testing.assert_allclose(mixture.worth(found, of("sum"))[1], PICK[1], rtol=1e-6)


def test_the_std_over_all_is_over_the_prompts_that_ask():
    """A prompt that does not ask for imagereward does not change how the other one is normalised."""
    z = mixture.worth(tagged(pickscore=[1, 1], imagereward=[1, 0]), of("gdpo", spread="all"))
    pick, ir = (np.asarray(x) - np.mean(x, axis=-1, keepdims=True) for x in (PICK, IR))
    expect = pick / (np.std(PICK) + 1e-4) + ir / (np.std(IR[0]) + 1e-4) * [[1], [0]]
    np.testing.assert_allclose(z, expect, rtol=1e-4, atol=1e-5)
    nobody = mixture.worth(tagged(pickscore=[1, 1], imagereward=[0, 0]), of("gdpo", spread="all"))
    np.testing.assert_allclose(nobody, pick / (np.std(PICK) + 1e-4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["sum", "gdpo"])
@pytest.mark.parametrize("spread", ["all", "prompt", "prompt_unbiased"])
def test_a_mask_of_ones_changes_no_number(rule, spread):
    cfg = of(rule, spread=spread)
    plain, ones = rolled(pickscore=PICK, imagereward=IR), tagged(pickscore=[1, 1], imagereward=[1, 1])
    np.testing.assert_allclose(mixture.worth(ones, cfg), mixture.worth(plain, cfg), rtol=1e-6)
    found, expect = (mixture.metrics(x, cfg) | iteration.reward_metrics(x, x) for x in (ones, plain))
    assert found.keys() - expect.keys() == {"asked/pickscore", "asked/imagereward"}
    assert {k: float(found[k]) for k in expect} == pytest.approx({k: float(v) for k, v in expect.items()}, rel=1e-5)


def test_metrics_are_of_the_prompts_that_ask():
    """And those of a reward that no prompt asks for are left out on the host: there is no mean of nothing."""
    found, cfg = tagged(pickscore=[1, 1], imagereward=[1, 0]), of("gdpo")
    metrics = {k: float(v) for k, v in (mixture.metrics(found, cfg) | iteration.reward_metrics(found, found)).items()}
    assert metrics["reward/imagereward"] == metrics["explore/reward_imagereward"] == pytest.approx(np.mean(IR[0]))
    assert metrics["reward_std/imagereward"] == pytest.approx(np.std(IR[0])) and metrics["zero_std/imagereward"] == 0
    assert metrics["reward_std/pickscore"] == pytest.approx(np.std(PICK, axis=-1).mean(), rel=1e-5)
    assert metrics["corr/imagereward"] == pytest.approx(np.corrcoef(IR[0], S[0])[0, 1], abs=1e-4)
    assert (metrics["asked/pickscore"], metrics["asked/imagereward"]) == (1, 0.5) and mixture.known(metrics) == metrics
    none = tagged(pickscore=[1, 1], imagereward=[0, 0])
    metrics = {k: float(v) for k, v in (mixture.metrics(none, cfg) | iteration.reward_metrics(none, none)).items()}
    assert np.isfinite(list(metrics.values())).all()
    left = {f"{k}imagereward" for k in mixture.OF_PARTS}
    assert metrics.keys() - mixture.known(metrics).keys() == left and len(left) == 6
    assert metrics["share/pickscore"] == 1


@pytest.mark.parametrize(("asked", "said"), [((0.75, 0.5), True), ((0.5, 0.5), False)])
def test_rewards_that_no_prompt_sums_are_not_compared(asked, said):
    """By the first spread of each, which may be of different iterations."""
    shares = {f"asked/{name}": x for name, x in zip(("pickscore", "imagereward"), asked, strict=True)}
    lines = [{"iteration": i, "loss": 1.0, **shares} for i in (1, 2, 3)]
    lines[0] |= {"reward_std/pickscore": 0.02}
    lines[1] |= {"reward_std/pickscore": 9.0, "reward_std/imagereward": 0.5}
    assert ("scales" in guards.alarms(lines, of("sum"))) == said
    assert "scales" not in guards.alarms(lines[:1], of("sum"))
