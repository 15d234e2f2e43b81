"""Prompts that name their rewards: which ask for what, who is asked, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import config, rewards
from solrl_jax.config import Config, ConfigError, Learn
from solrl_jax.rewards import bound, ocr, own
from solrl_jax.run import assemble, data, evaluate
from solrl_jax.run.pictures import Shown, load, save
from solrl_jax.structs import Reward

SIGN, BOTH, CAT = (
    {"prompt": 'a sign "OPEN"', "rewards": ["ocr"]},
    {"prompt": 'a cup "TEA"', "rewards": ["ocr", "pickscore", "hpsv2"]},
    {"prompt": "a cat"},
)
DOG = {"prompt": "a dog", "rewards": ["pickscore"]}


def test_who_asks_for_what():
    """Without the field: for all. A held-out reward is for all prompts, unless one of them names it."""
    found = bound.read([SIGN, BOTH, CAT, DOG], ["ocr", "pickscore"], ["hpsv2", "ocr_strict"])
    masks = found.masks(["ocr", "pickscore", "hpsv2", "ocr_strict"], [SIGN, BOTH, CAT, DOG])
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "ocr": [1, 1, 1, 0],
        "pickscore": [0, 1, 1, 1],
        "hpsv2": [0, 1, 1, 0],
        "ocr_strict": [1, 1, 1, 1],
    }
    nothing = bound.read([CAT, {"prompt": "b", "text": "x"}], ["ocr"], [])
    assert nothing == bound.Bound() and nothing.masks(["ocr"], [CAT]) == {}
    assert bound.notes(found, [SIGN, BOTH, CAT, DOG], ["ocr", "ocr_strict"]) == ["3 of 4 training prompts ask for ocr"]


@pytest.mark.parametrize("value", ['"ocr"', "[]", "null", "[1]", '["ocr", null]', '{"ocr": 1}'])
def test_the_field_is_a_list_of_names(tmp_path, value):
    lines = [{"file": "x", "prompt": "a"}, {"file": "y", "prompt": "b", "rewards": json.loads(value)}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for read in (data.read, data.read_captions):
        with pytest.raises(data.DataError, match=r'p.jsonl, line 2: its "rewards" is .*: give a list of the names'):
            read(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([BOTH], {}, r"'a cup \"TEA\"' asks for reward 'hpsv2', which is not configured \(reward=ocr,pickscore, eval"),
        ([SIGN], {}, "no training prompt asks for reward pickscore, which is trained on"),
        ([CAT, {"prompt": "x", "rewards": ["hpsv2"]}], {"evaluate.rewards": "hpsv2"}, "'x' asks for no reward that is "
         "trained on, only for hpsv2: name one of ocr, pickscore"),
        ([SIGN, CAT], {}, r"asks for some of the rewards only, and learn.advantage_spread=all .* set learn.adv"),
        ([SIGN, CAT], {"reward_rule": "gdpo", "learn.advantage_spread": "prompt"}, None),
        ([SIGN, CAT], {"reward_rule": "gdpo", "explore": "none"}, None),
        ([SIGN, CAT], {"learn.advantage_spread": "prompt"}, None),
        ([BOTH, CAT, {"prompt": "y", "rewards": ["ocr", "pickscore"]}], {"evaluate.rewards": "hpsv2"}, None),
        ([CAT], {}, None),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_refused(rows, changes, message):
    """Sums over different rewards under one std: only with the raw sum, and only if a prompt lacks a trained one."""
    cfg = config.override(Config(reward="ocr,pickscore", learn=Learn(advantage_spread="all")), **changes)
    texts = tuple(row["prompt"] for row in rows)
    prompts = data.PromptSet(texts, texts, 0, 0, {row["prompt"]: row for row in rows})
    if message is None:
        return assemble.check_binding(cfg, prompts)
    with pytest.raises(ConfigError, match=message):
        assemble.check_binding(cfg, prompts)


def test_only_prompts_that_ask_must_be_readable_on_the_host():
    mix = rewards.Score((ocr.shapes(None, "float32")[0], Reward("x", own.places, own.nowhere)), (1.0, 1.0))
    rows = [CAT, SIGN, DOG]
    texts = [row["prompt"] for row in rows]
    tokens = rewards.tokenize(mix, texts, rows, {"ocr": np.array([0, 1, 0], np.float32)})
    assert tokens["ocr"].tolist() == tokens["x"].tolist() == [0, 1, 2]
    nobody = rewards.tokenize(mix, texts, rows, {"ocr": np.zeros(3, np.float32)})
    assert nobody["ocr"].tolist() == [0, 1, 2]
    for asked in ({"ocr": np.array([1, 1, 0], np.float32)}, {}):
        with pytest.raises(ConfigError, match="reward ocr cannot read a prompt: 'a cat' asks for no text"):
            rewards.tokenize(mix, texts, rows, asked)


def test_a_device_reward_reads_a_prompt_that_asks_in_place_of_others():
    """With its row, so that one which cannot read the others is not asked to; the empty prompt if none asks."""

    def tokenize(prompts, rows):
        assert [row["prompt"] for row in rows] == prompts
        if "a dog" in prompts:
            raise ValueError("no dogs")
        return np.array([len(row.get("rewards", ())) + len(row["prompt"]) for row in rows])

    mix, rows = rewards.Score((Reward("x", tokenize, own.nowhere),), (1.0,)), [BOTH, DOG]
    texts = [row["prompt"] for row in rows]
    found = rewards.tokenize(mix, texts, rows, {"x": np.array([1, 0], np.float32)})
    assert found["x"].tolist() == [len(BOTH["rewards"]) + len(BOTH["prompt"])] * 2
    assert rewards.tokenize(mix, texts, rows, {"x": np.zeros(2, np.float32)})["x"].tolist() == [0, 0]
    with pytest.raises(ConfigError, match="reward x cannot read a prompt: no dogs"):
        rewards.tokenize(mix, texts, rows)


def test_a_reward_may_be_named_and_left_unused():
    """What the config lists, and nothing else; the prompt's others stay."""
    found = bound.read([BOTH, DOG], ["pickscore"], [], ["ocr", "hpsv2"])
    assert {k: x.tolist() for k, x in found.masks(["pickscore"], [BOTH, DOG]).items()} == {"pickscore": [1, 1]}
    with pytest.raises(ConfigError, match=r"asks for reward 'hpsv2', .* or to reward_unused to do without it"):
        bound.read([BOTH], ["pickscore"], [], ["ocr"])


def test_a_reward_of_ones_own_is_left_unused_without_its_module():
    """What is not used is not imported; only a name that is used too is refused."""
    cfg = Config(reward="clipscore", reward_unused=("nowhere.judge", "ocr"))
    assert assemble.reward_names(cfg) == ("clipscore",)
    again = config.override(cfg, **{"evaluate.rewards": "nowhere.judge:0.5"})
    with pytest.raises(ConfigError, match=r"=nowhere.judge,ocr: nowhere.judge is in evaluate.rewards=nowhere.judge:0"):
        assemble.reward_names(again)


@pytest.mark.parametrize(
    ("unused", "message"),
    [
        ("experiments.emoji.juge", r"experiments.emoji.juge, and it .* no function juge.*: correct the name \(did you"),
        ("ocr,my_own.scores", r"my_own.scores, .* no module my_own in .*: correct the name, or take it out"),
        ("experiments.emoji.judge,nowhere.judge", None),
        ("experiments.tiny.world,nowhere.judge", r"experiments.tiny.world, .* defines no function make"),
        ("solrl_jax.rewards.shapes,nowhere.judge,experiments.emoji.judge", None),  # one that no prompt asks for
    ],
)
def test_a_misspelt_module_in_reward_unused(unused, message):
    """It is neither named by a prompt nor a module here. A name that a prompt has too is not imported."""
    rows = [CAT, {"prompt": "a fox", "rewards": ["pickscore", "experiments.emoji.judge", "nowhere.judge"]}]
    if message is None:
        assert bound.read(rows, ["pickscore"], [], unused.split(",")).tagged
        return
    with pytest.raises(ConfigError, match=f"^reward_unused={unused}: no prompt asks for {message}"):
        bound.read(rows, ["pickscore"], [], unused.split(","))


def test_a_host_reward_sees_the_pictures_of_prompts_that_ask():
    seen = []

    def host(images, prompts, rows):
        seen.append((images[:, 0, 0, 0].tolist(), prompts, [row["prompt"] for row in rows]))
        return images[:, 0, 0, 0] + 1

    mix = rewards.Score((Reward("x", own.places, own.nowhere, host),), (0.5,))
    images = np.broadcast_to(np.arange(6, dtype=np.uint8).reshape(3, 2, 1, 1, 1), (3, 2, 4, 4, 3))
    total, parts = rewards.score_on_host(mix, images, [SIGN, CAT, BOTH], {"x": np.array([1, 0, 1], np.float32)})
    assert seen == [([0, 1, 4, 5], [x["prompt"] for x in (SIGN, SIGN, BOTH, BOTH)], seen[0][1])]
    assert parts["x"].tolist() == [[1, 2], [0, 0], [5, 6]] and total.tolist() == [[0.5, 1], [0, 0], [2.5, 3]]
    total, parts = rewards.score_on_host(mix, images, [SIGN, CAT, BOTH], {"x": np.zeros(3, np.float32)})
    assert len(seen) == 1 and not parts["x"].any() and not total.any()


def test_a_device_reward_has_no_part_where_it_is_not_asked():
    """Not even one that is not a number there."""
    nan = Reward("n", own.places, lambda params, images, tokens: jnp.log(images.mean((1, 2, 3)) - 0.5))
    mix, levels = rewards.Score((nan,), (2.0,)), jnp.array([0.75, 1.5, 0.25])
    images = jnp.broadcast_to(levels[:, None, None, None], (3, 2, 2, 3))
    total, parts = rewards.score_images(mix, {"n": {}}, images, {"n": np.arange(3)}, {"n": jnp.array([1.0, 1.0, 0.0])})
    np.testing.assert_allclose(parts["n"], [np.log(0.25), 0, 0], atol=1e-6)
    np.testing.assert_allclose(total, 2 * parts["n"])


def test_evaluations_are_over_the_prompts_that_ask(tmp_path):
    """Means, gains and their errors by reward, and the average of each prompt's own rewards."""
    mix = rewards.Score(tuple(Reward(n, own.places, own.nowhere) for n in "ab"), (1.0, 0.5))
    asked = {n: np.array(x, np.float32) for n, x in {"a": [1, 1, 0], "b": [1, 0, 1], "c": [0, 0, 0]}.items()}

    def shown(**means):
        means = {n: np.array(x, np.float32) for n, x in means.items()}
        images = np.zeros((2, 4, 4, 3), np.uint8)
        return Shown(["p", "q"], images, {n: x[:2] for n, x in means.items()}, means, asked)

    before = shown(a=[1, 2, 90], b=[4, 90, 8], c=[90, 90, 90])
    after = shown(a=[2, 4, 70], b=[5, 70, 10], c=[70, 70, 70])
    assert evaluate.averages(before, mix) == {"eval_reward_a": 1.5, "eval_reward_b": 6, "eval_reward_avg": 3}
    gains = evaluate.gains(before, after, mix)
    assert {n: x for n, x in gains.items() if "error" not in n} == pytest.approx(
        {"eval_gain/a": 1.5, "eval_gain/b": 1.5, "eval_gain/avg": 1.5}
    )
    assert gains["eval_gain_error/a"] == pytest.approx(0.5)
    save(tmp_path / "x.npz", after, 3, "how")
    kept = load(tmp_path / "x.npz")
    assert kept is not None and evaluate.averages(kept.shown, mix) == evaluate.averages(after, mix)
