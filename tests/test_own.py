"""Rewards of the user's own: those of docs/rewards.md, on the devices and on the host; what can be wrong with one."""

import csv
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image, ImageDraw

from solrl_jax import config, iteration, main, rewards, rollout, sharding, train
from solrl_jax.plan import shapes
from solrl_jax.rewards import own
from solrl_jax.run import assemble, data, evaluate
from solrl_jax.structs import Reward, Rollout
from tests.toy_world import TOY, metrics_of, unrewarded

pytestmark = pytest.mark.usefixtures("compiled")

PAGE = (Path(__file__).parent.parent / "docs/rewards.md").read_text(encoding="utf-8")
DEVICE, HOST, COUNTS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the page's my_reward.py and my_rules.py; imports are forgotten after a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    (tmp_path / "my_reward.py").write_text(DEVICE)
    (tmp_path / "my_rules.py").write_text(HOST)
    (tmp_path / "my_counts.py").write_text(COUNTS)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in {file.stem for file in tmp_path.iterdir()}:
            del sys.modules[name]


@pytest.fixture
def toy(folder, monkeypatch):
    """A run of the toy model in the current folder."""
    words = {"prompt_files": "prompts.txt", "reward": "my_reward.brightness", "iterations": 2, "save_every": 20}
    made = unrewarded(monkeypatch, folder)
    return config.override(made, **words, **{"evaluate.rewards": "", "watch.every": 20})


def test_the_pages_examples_are_short():
    assert len(DEVICE.strip().splitlines()) <= 15 and len(HOST.strip().splitlines()) <= 15
    assert len([line for line in COUNTS.splitlines() if line]) <= 20


@pytest.mark.slow
def test_the_pages_reward_on_the_devices_and_on_the_host(toy, tmp_path):
    mix = config.override(toy, reward="my_reward.brightness:1,my_rules.contrast:0.5")
    assert train.train(mix, tmp_path / "run", devices=2) == 0
    last = metrics_of(tmp_path / "run")[2]
    for name in ("explore/reward_{}", "reward/{}", "eval_reward_{}"):
        assert np.isfinite([last[name.format("my_reward.brightness")], last[name.format("my_rules.contrast")]]).all()
    parts = last["reward/my_reward.brightness"], last["reward/my_rules.contrast"]
    np.testing.assert_allclose(last["reward/mean"], parts[0] + 0.5 * parts[1], rtol=1e-5)


@pytest.mark.slow
def test_a_host_reward_is_the_same_as_on_the_devices(toy, folder):
    """Each picture with its own prompt, over two devices, in blocks; selection and training follow."""
    (folder / "same.py").write_text(
        "import numpy as np\nfrom solrl_jax.structs import Reward\n"
        "def letters(prompts):\n    return np.array([ord(p[-1]) for p in prompts], np.float32)\n"
        "def score(params, images, tokens):\n"
        "    return images.mean((1, 2, 3)) + 0.01 * tokens.repeat(len(images) // len(tokens))\n"
        "def device(path, dtype):\n    return Reward('x', letters, score), {}\n"
    )
    (folder / "host.py").write_text(
        "HOST = True\nfrom same import letters\n"
        "def score(images, prompts):\n    return images.mean((1, 2, 3)) / 255 + 0.01 * letters(prompts)\n"
        "def device(images, prompts):\n    return score(images, prompts)\n"
    )
    found = []
    for name in ("same.device", "host.device"):
        train.train(config.override(toy, reward=name, iterations=1), folder / name, devices=2)
        found.append({k.replace(name, "x"): v for k, v in metrics_of(folder / name)[1].items()})
    assert found[0].keys() == found[1].keys()
    for key in ("reward/mean", "reward/range", "explore/reward_mean", "eval_reward_x"):
        np.testing.assert_allclose(found[0][key], found[1][key], atol=0.004, err_msg=key)  # bytes are coarser


def test_a_reward_gets_a_dtype_it_can_use(folder):
    """float32_exact is for the networks of the package: it is no dtype's name."""
    (folder / "told.py").write_text(
        "import numpy as np\nfrom solrl_jax.structs import Reward\n"
        "def make(path, dtype):\n    return Reward('x', len, len), {'w': np.zeros(1, dtype)}\n"
    )
    for dtype, told in (("float32_exact", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")):
        assert rewards.load_rewards("told.make", {}, dtype)[1]["told.make"]["w"].dtype == told
        assert rewards.module("told.make").shapes(None, dtype)[1]["w"].dtype == told


def test_one_jitted_step_refuses_a_host_reward(toy, tmp_path):
    whole = config.override(toy, reward="my_rules.contrast", staged=False)
    with pytest.raises(config.ConfigError, match=r"staged=false, but reward my_rules\.contrast runs on the host"):
        train.train(whole, tmp_path / "run", devices=1)
    parts = assemble.assemble(config.override(whole, staged=True), 1)
    statics = {"model": TOY, "score": parts.score, "optimizer": parts.optimizer, "cfg": parts.cfg}
    with jax.set_mesh(parts.mesh), pytest.raises(config.ConfigError, match="set staged=true"):
        prompts = assemble.encode(parts, ["a"] * 4, parts.score)
        iteration.iteration_step(assemble.fresh(parts), parts.frozen, prompts, **statics)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("[1.0]", r"returned shape \[1\] for 4 pictures: it must return 4 finite numbers"),
        ("images.mean((1, 2))", r"returned shape \[4, 3\] for 4 pictures"),
        ("[float('nan')] * len(images)", r"returned nan for a picture of 'prompt \d'"),
        ("'good'", "returned str: it must return 4 finite numbers"),
        ("None", r"returned"),
    ],
)
def test_what_a_host_function_must_return(toy, folder, result, message):
    (folder / "wrong.py").write_text(f"HOST = True\ndef score(images, prompts):\n    return {result}\n")
    (folder / "wrong").mkdir()  # no package: the file is taken
    (folder / "pack").mkdir()
    (folder / "pack" / "wrong.py").write_text((folder / "wrong.py").read_text())
    bad = config.override(toy, reward="pack.wrong", **{"evaluate.every": 0})
    with pytest.raises(train.TrainError, match=f"reward pack.wrong {message}.*Nothing is saved in"):
        train.train(bad, folder / "run", devices=1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nowhere.at", None, "there is no module nowhere.at and no module nowhere in "),
        ("my_reward.dark", None, "my_reward.py defines no function dark: it needs a function make"),
        ("my reward.x", None, "is not a dotted name"),
        (".brightness", None, "is not a dotted name"),
        (
            "bad.x",
            "import no_such_thing\n",
            r"ModuleNotFoundError: No module named 'no_such_thing' \(.*bad.py, line 1\)",
        ),
        ("bad.x", "\n1 / 0\n", r"ZeroDivisionError: division by zero \(.*bad.py, line 2\)"),
        ("bad.x", "def x(:\n", r"SyntaxError: .*bad.py, line 1\)"),
        ("pack.bad", "make = 3\n", "bad.py defines no function make"),
        ("pack.bad", "HOST = True\n", "bad.py defines no function score"),
        ("pack.bad", "import no_such_thing\n", r"No module named 'no_such_thing' \(.*bad.py, line 1\)"),
        ("bad.x", "def x(path, dtype):\n    return 3\n", "its function gives int: return"),
        ("bad.x", "def x(path, dtype):\n    raise OSError('gone')\n", r"OSError: gone \(.*bad.py, line 2\)"),
    ],
)
def test_what_is_wrong_with_a_name_or_its_file(toy, folder, name, text, message):
    (folder / "pack").mkdir()
    if text is not None:
        (folder / ("pack/bad.py" if name == "pack.bad" else "bad.py")).write_text(text)
    with pytest.raises(config.ConfigError, match=message) as found:
        train.train(config.override(toy, reward=name), folder / "run", devices=1)
    assert len(str(found.value).splitlines()) == 1 and not (folder / "run").exists()


def test_a_device_reward_of_a_wrong_shape_is_not_broadcast(folder):
    (folder / "flat.py").write_text(DEVICE.replace("(1, 2, 3)", "(1, 2)"))
    mix, params = rewards.load_rewards("flat.brightness", {})
    with pytest.raises(own.RewardError, match=r"flat.brightness gives \[2, 3\] for 2 pictures: give \[2\]"):
        images = jax.numpy.zeros((2, 4, 4, 3))
        rewards.score_images(mix, params, images, rewards.tokenize(mix, ["a", "b"]))


@pytest.mark.parametrize(("devices", "shard"), [(1, 1), (2, 1), (4, 2)])
def test_each_block_has_its_own_prompts_on_the_host(devices, shard):
    """The texts themselves, of any length, and their rows, whichever devices the prompts of a block are on."""
    texts = ["", "a cat", "чёрный кот", "\N{CAT FACE}", "x" * 5000, "a\0b", "6", "7"]
    rows = [{"prompt": text, "n": i} for i, text in enumerate(texts)]
    seen = []

    def host(images, prompts, rows):
        seen.extend(zip(images[:, 0, 0, 0].tolist(), prompts, rows, strict=True))
        return images[:, 0, 0, 0]

    mix = rewards.Score((Reward("x", own.places, own.nowhere, host),), (2.0,))
    pixels = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None, None, None, None], (8, 2, 2, 2, 3))
    mesh = sharding.make_mesh(devices, shard)
    with jax.set_mesh(mesh):
        tokens, images = sharding.split((rewards.tokenize(mix, texts, rows), pixels), mesh)
        zeros = sharding.split(np.zeros((8, 2), np.float32), mesh)
        blocks = []
        for i in range(8 // devices):
            some, shown, zero = sharding.block((tokens, images, zeros), i, 1)
            rolled = Rollout(None, None, zero, {}, images=shown)
            blocks.append(rollout.with_host(rolled, mix, some, rows)._replace(keys=zero))
        found = sharding.joined(tuple(blocks))
    np.testing.assert_array_equal(found.reward, 2 * np.arange(8.0)[:, None].repeat(2, 1))
    assert [(text, row) for _, text, row in seen] == [(texts[i], rows[i]) for i, _, _ in seen]
    assert sorted(i for i, _, _ in seen) == [i for i in range(8) for _ in range(2)]


def test_a_picture_that_is_not_finite_has_no_score_on_the_host_either():
    """Its 8 bits are a black picture, which the reward scores 0."""

    def host(images, prompts, rows):
        return images[:, 0, 0, 0] + 1.0

    mix = rewards.Score((Reward("x", own.places, own.nowhere, host),), (2.0,))
    pictures = jnp.stack([jnp.zeros((2, 2, 3)), jnp.full((2, 2, 3), jnp.nan)])
    mesh = sharding.make_mesh(1)
    with jax.set_mesh(mesh):
        tokens, images = sharding.split((rewards.tokenize(mix, ["a"], [{"prompt": "a"}]), pictures[None]), mesh)
        total, parts = rewards.score_images(mix, {}, images[0], {})
        rolled = Rollout(None, None, total[None], parts, images=rewards.eight_bit(images[0])[None])
        found = rollout.with_host(rolled, mix, tokens, [{"prompt": "a"}])
    np.testing.assert_array_equal(rewards.eight_bit(pictures), 0)
    np.testing.assert_array_equal(found.reward, [[2, np.nan]])
    np.testing.assert_array_equal(found.parts["x"], [[1, np.nan]])


WAYS = {
    "def score(images, prompts): pass": None,
    "def score(images, prompts, rows): pass": "rows",
    "def score(images, prompts, about): pass": "rows",
    "def score(images, prompts, about, /): pass": "rows",
    "def score(images, prompts, *, rows): pass": "rows",
    "def score(images, prompts, rows=None): pass": "rows",
    "def score(images, prompts, scale=2, rows=()): pass": "rows",
    "def score(images, prompts, scale=2): pass": None,
    "def score(images, prompts, *, scale=2): pass": None,
    "def score(*both, **more): pass": None,
    "class Made:\n  def __call__(self, images, prompts, rows): pass\nscore = Made()": "rows",
    "import functools\nscore = functools.partial(lambda rows, images, prompts: None, ())": None,
    "score = max": None,
}


@pytest.mark.parametrize("text", WAYS)
def test_which_functions_are_given_rows(text):
    """A function of two parameters works as it did, also one with options of its own."""
    scope = {}
    exec(text, scope)
    assert (own._takes_rows(scope["score"], 2) is not None) == (WAYS[text] is not None)


def test_what_a_function_writes_into_its_rows_is_gone():
    rows, seen = [{"prompt": "a", "include": [{"count": 2}]}] * 2, []

    def spoils(images, prompts, rows):
        seen.append([row["include"][0].pop("count") for row in rows])
        rows.clear()
        return [0.0] * len(images)

    reward = Reward("x", own.places, own.nowhere, spoils)
    for _ in range(2):
        own.ask(reward, np.zeros((2, 4, 4, 3), np.uint8), rows)
    assert seen == [[2, 2], [2, 2]] and rows[0]["include"] == [{"count": 2}]


def things(*what):
    """A picture with one red or blue disc after the other."""
    image = Image.new("RGB", (96, 96), "white")
    for i, ink in enumerate(what):
        left, top = 4 + 30 * (i % 3), 4 + 30 * (i // 3)
        ImageDraw.Draw(image).ellipse((left, top, left + 24, top + 24), fill={"red": "#d2322d", "blue": "#2d5ac8"}[ink])
    return image


def test_the_pages_counting_reward_scores_pictures_by_their_rows(folder, capsys):
    """In --mode=score; equal prompts have rows of their own there, for each line is of one picture."""
    two = [{"class": "disc", "count": 2, "color": "red"}]
    both = [*two, {"class": "disc", "count": 1, "color": "blue"}]
    cases = [
        ("a.png", things("red", "red"), two, 1.0),
        ("b.png", things("red"), two, 0.5),
        ("c.png", things("red", "red", "blue"), both, 1.0),
        ("d.png", things("red", "red"), both, 0.5),
        ("e.png", things("red", "red", "red", "red", "blue"), both, 0.5),
    ]
    (folder / "pictures").mkdir()
    lines = []
    for name, image, include, _ in cases:
        image.save(folder / "pictures" / name)
        lines.append(json.dumps({"file": name, "prompt": "two discs", "include": include}))
    (folder / "p.jsonl").write_text("\n".join(lines))
    words = ("--mode=score", "--run_dir=out", "--prompts=p.jsonl", "--images=pictures")
    with flagsaver.flagsaver(config=None):
        assert main.main(main.parse(["solrl_jax", *words, "--config.reward=my_counts.counting"])) == 0
    with (folder / "out/scores.csv").open(newline="") as f:
        found = [float(line["my_counts.counting"]) for line in csv.DictReader(f)]
    assert found == [score for *_, score in cases]


@pytest.fixture
def rowed(toy, folder):
    """The toy run by two rewards that are each prompt's number "n": one on the host, one on the devices."""
    lines = [json.dumps({"prompt": f"prompt {i}", "n": i, "tag": {"of": [i]}}) for i in range(7)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    (folder / "rowed.py").write_text(
        "HOST, calls = True, []\n"
        "def score(images, prompts, rows):\n"
        "    calls.append(len(rows))\n"
        "    assert [f'prompt {row[\"n\"]}' for row in rows] == [row['prompt'] for row in rows] == prompts\n"
        "    return [row['tag']['of'][0] for row in rows]\n"
    )
    (folder / "tokened.py").write_text(
        "import numpy as np\nfrom solrl_jax.structs import Reward\n"
        "def tokenize(prompts, rows):\n    return np.array([row['n'] for row in rows], np.float32)\n"
        "def score(params, images, tokens):\n    return tokens.repeat(len(images) // len(tokens))\n"
        "def make(path, dtype):\n    return Reward('x', tokenize, score), {}\n"
    )
    return config.override(toy, reward="rowed.score,tokened.make", prompt_files="prompts.jsonl")


def test_every_picture_has_its_row(rowed):
    """In the blocks of a stage, by two devices, and in evaluations; a reward on the devices reads rows too."""
    parts = assemble.assemble(rowed, 2)
    statics = {"model": TOY, "score": parts.score, "optimizer": parts.optimizer, "cfg": parts.cfg}
    texts = data.batch(parts.prompts.train, 0, 5, 4)
    with jax.set_mesh(parts.mesh):
        staged, state = iteration.Staged(**statics), assemble.fresh(parts)
        prompts, rows = assemble.encode(parts, texts, parts.score), parts.prompts.rows_of(texts)
        keys, _ = staged.jit["draw"](state)
        rest = staged.jit["merged"](state, parts.frozen), None, parts.frozen
        found = staged._by_prompt("regenerate", rest, (prompts, keys), {}, lambda *_: None, rows=rows)
        _, shown = evaluate.evaluate(parts, jax.tree.map(lambda x: x * 0, state.ema))
    np.testing.assert_array_equal(found.parts["rowed.score"], [[int(text[-1])] * 4 for text in texts])
    np.testing.assert_array_equal(found.parts["tokened.make"], found.parts["rowed.score"])
    assert shown.means["rowed.score"].tolist() == [int(text[-1]) for text in evaluate.fixed_prompts(parts)]
    np.testing.assert_array_equal(shown.means["rowed.score"], shown.means["tokened.make"])


@pytest.mark.slow
def test_a_run_gives_every_picture_its_row(rowed, folder):
    """In both stages, in measurements of the preview and in evaluations."""
    every = config.override(rowed, iterations=1, **{"watch.every": 1, "evaluate.every": 1})
    assert train.train(every, folder / "run", devices=2) == 0
    for line in metrics_of(folder / "run").values():
        for name in ("explore/reward_{}", "reward/{}", "eval_reward_{}"):
            one, two = (line.get(name.format(each)) for each in ("rowed.score", "tokened.make"))
            assert one == two and (one is None or one > 0)
    assert "eval_reward_rowed.score" in metrics_of(folder / "run")[0]
    assert set(sys.modules["rowed"].calls) == {8, 4, 6}


def test_a_device_reward_that_needs_a_row_is_left_out_of_the_plan(folder):
    (folder / "tokened.py").write_text(
        "from solrl_jax.structs import Reward\n"
        "def tokenize(prompts, rows):\n    return [row['n'] for row in rows]\n"
        "def make(path, dtype):\n    return Reward('x', tokenize, None), {}\n"
    )
    found = shapes.read(config.override(config.load("tiny"), reward="clipscore,tokened.make"), 1)
    (note,) = (note for note in found.notes if "tokened" in note)
    assert note.startswith("reward tokened.make is not counted: its tokenize cannot read an empty prompt without other")
    assert "KeyError: 'n'" in note and found.score.names == ("clipscore",)


def test_stages_need_the_rows_of_a_host_reward(toy):
    parts = assemble.assemble(config.override(toy, reward="my_rules.contrast"), 1)
    statics = {"model": TOY, "score": parts.score, "optimizer": parts.optimizer, "cfg": parts.cfg}
    with (
        jax.set_mesh(parts.mesh),
        pytest.raises(ValueError, match=r"0 rows of 4 prompts for reward my_rules\.contrast"),
    ):
        prompts = assemble.encode(parts, ["a"] * 4, parts.score)
        iteration.Staged(**statics)(assemble.fresh(parts), parts.frozen, prompts, {})


def test_the_plan_counts_them_and_paths_reach_them(folder):
    found = rewards.module("my_reward.brightness").shapes(None, "float32")
    assert found[1]["scale"].shape == () and found[2].shape == (1,) and shapes.own is own
    assert rewards.parse_paths(["my_reward.brightness=x"]) == {"my_reward.brightness": "x"}
    one, two = (rewards.load_rewards("my_reward.brightness", {})[0] for _ in range(2))
    assert one == two and hash(one) == hash(two)  # no new program
    with pytest.raises(config.ConfigError, match="runs on the host and reads no path"):
        rewards.load_rewards("my_rules.contrast", {"my_rules.contrast": "x"})


def test_they_score_pictures_on_disk(folder):
    from solrl_jax.run import score

    mix, params = rewards.load_rewards("my_reward.brightness,my_rules.contrast", {})
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    found = score.score_arrays(mix, params, images, [{"prompt": text} for text in "abc"])
    np.testing.assert_allclose(found["my_reward.brightness"], images.mean((1, 2, 3)) / 255, rtol=1e-5)
    np.testing.assert_allclose(found["my_rules.contrast"], images.std((1, 2, 3)) / 255, rtol=1e-5)
