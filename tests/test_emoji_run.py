"""--config=emoji: its recipes, which prompt asks for which reward, what it needs; one iteration at nano size."""

import numpy as np
import pytest
from absl.testing import flagsaver

from configs import emoji
from experiments.emoji import whole_run
from solrl_jax import config, learn, main, rewards
from solrl_jax.config import ConfigError
from solrl_jax.report import run as report_run
from solrl_jax.rewards import ocr
from solrl_jax.run import assemble, data, model_card
from tests import nano_emoji

MIXED = ("clipscore", emoji.JUDGE, "ocr")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return nano_emoji.write(tmp_path_factory.mktemp("emoji"))


@pytest.fixture
def no_reader(monkeypatch):
    """As where requirements-ocr.txt is not installed."""

    def absent():
        raise ImportError("No module named 'rapidocr'")

    monkeypatch.setattr(ocr, "_options", absent)


def test_recipes():
    """Three rewards by gdpo, or CLIPScore alone; what is held out is not trained on."""
    made = {name: config.load(f"emoji:{name}") for name in emoji.RECIPES}
    assert len(made) == 22 and made["branch_mixed"] == config.load("emoji")
    for name, cfg in made.items():
        mixed = name.endswith("_mixed")
        trained, others = tuple(rewards.parse(cfg.reward)), rewards.held_out(cfg.reward, cfg.evaluate.rewards)
        assert trained == (MIXED if mixed else ("clipscore",)) and cfg.reward_rule == ("gdpo" if mixed else "sum")
        assert tuple(others) == (("ocr_strict",) if mixed else (emoji.JUDGE,))
        assert (cfg.model.size, cfg.kept, cfg.prompts, cfg.evaluate.grid) == (64, 8, 16, 24)
    sol_rl = made["sol_rl_mixed"]
    assert sol_rl.explore is not None and (sol_rl.explore.steps, sol_rl.explore.precision) == (6, "nvfp4_emulated")
    assert (sol_rl.regenerate.steps, sol_rl.regenerate.precision, sol_rl.lora.rank) == (10, "bf16", 32)
    assert made["flow_grpo_mixed"].learn.clip_range == pytest.approx(5e-4)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_every_device_count_that_divides_works(devices):
    cfg = config.load("emoji")
    held = cfg.prompts * cfg.kept // cfg.learn.updates // devices
    assert held % learn.samples_at_a_time(cfg, held) == 0


@pytest.mark.parametrize(("recipe", "of_words"), [("", (1, 0, 1, 1)), ("branch_clipscore", (1, 0))])
def test_which_prompt_asks_for_what(recipe, of_words):
    """Words for all but the judge, objects for CLIPScore and the judge; with CLIPScore alone all train on it."""
    cfg = config.load(f"emoji:{recipe}")
    prompts = assemble.open_prompts(cfg, train=cfg.prompts, test=cfg.evaluate.prompts)
    assemble.check_binding(cfg, prompts)
    names = (*rewards.parse(cfg.reward), *rewards.held_out(cfg.reward, cfg.evaluate.rewards))
    rows = prompts.rows_of((*prompts.train, *prompts.test))
    masks = np.stack(list(assemble.binding(cfg, prompts).masks(names, rows).values()), 1)
    words = np.array(["text" in row for row in rows])
    assert 0.1 < words.mean() < 0.3 and (masks[words] == of_words).all()
    assert (masks[~words] == [name in ("clipscore", emoji.JUDGE) for name in names]).all()


def test_the_judge_is_not_asked_to_read_words(folder):
    """Of an iteration's prompts, and of all when a run begins; objects have their own tokens."""
    cfg = nano_emoji.load(
        folder, reward=emoji.JUDGE, reward_unused="clipscore,ocr,ocr_strict", **{"evaluate.rewards": ""}
    )
    prompts = assemble.open_prompts(cfg)
    judges = assemble.open_rewards(cfg, prompts)
    some = ("the word OPEN in red", "a fox")
    rows = [{"prompt": some[0], "rewards": ["ocr"]}, {"prompt": some[1], "rewards": [emoji.JUDGE]}]
    tokens = rewards.tokenize(judges.score, some, rows, judges.bound.masks((emoji.JUDGE,), rows))[emoji.JUDGE]
    assert tokens[1, 1] == 1 and (tokens[0] == tokens[1]).all()  # one fox, in place of the word too
    nobody = rewards.tokenize(judges.score, some, rows, {emoji.JUDGE: np.zeros(2, np.float32)})[emoji.JUDGE]
    assert (nobody < 1).all()  # they state nothing


@pytest.mark.usefixtures("no_reader")
def test_only_the_mixture_needs_a_reader_of_text(folder):
    """Also evaluations with CLIPScore alone, which hold out the judge."""
    cfg = nano_emoji.load(folder, "branch_clipscore")
    judges = assemble.open_rewards(cfg, assemble.open_prompts(cfg))
    assert judges.judged.names == ("clipscore", emoji.JUDGE) and not judges.judged.on_host
    with pytest.raises(ConfigError, match=r"reward ocr needs a reader of text .* or -r requirements-ocr.txt"):
        assemble.open_rewards(nano_emoji.load(folder))


def test_outside_of_the_repository_it_says_so(tmp_path, monkeypatch):
    """An installed package has neither the networks nor the judge."""
    monkeypatch.setattr(config.module("emoji"), "WORLD", tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"--config=emoji: there is no .*nothing; .* clone it"):
        config.load("emoji")


@pytest.mark.parametrize(
    ("recipe", "said"), [("", "1 x ocr, each normalised"), ("branch_clipscore", "1 x clipscore |")]
)
def test_the_model_card_tells_how_rewards_are_combined(recipe, said, tmp_path):
    assert said in model_card.write(tmp_path, config.load(f"emoji:{recipe}"), 1, 4, ("to_q",)).read_text()


def test_figures_of_a_whole_run():
    """The first iteration, which compiles, is in no median; the last evaluation need not be the last line's."""

    def line(number, seconds, **more):
        return {"iteration": number, **{f"time/{stage}": seconds for stage in whole_run.STAGES}, **more}

    last = {"eval_reward_dark": 0.7, "eval_gain/dark": 0.2, "eval_gain_error/dark": 0.05}
    lines = [{"iteration": 0, "eval_reward_dark": 0.5}, line(1, 60), line(2, 3), line(3, 1, **last), line(4, 2)]
    found = whole_run.figures_of(lines, 100)
    assert {
        name: (f["value"], f["n"]) for name, f in found.items() if name not in ("explore", "regenerate", "learn")
    } == {
        **{"the whole command": (100, 1), "4 iterations": (66, 1), "the first iteration": (60, 1), "iteration": (2, 3)},
        **{"dark: base": (0.5, 1), "dark: after 3": (0.7, 1), "dark: gain": (0.2, 1)},
    }
    assert found["explore"]["spread"] == [1, 3] and found["dark: gain"]["spread"] == 0.05


# --- one iteration --------------------------------------------------------------------------------------------------

SMALL = {
    "prompts": 4,
    "candidates": 4,
    "kept": 2,
    "explore.chunk": 4,
    "regenerate.chunk": 2,
    "learn.updates": 1,
    "learn.micro_batch": 4,
    "evaluate.prompts": 24,
    "evaluate.images": 1,
    "evaluate.steps": 2,
    "evaluate.chunk": 8,
    "watch.every": 0,
    "iterations": 1,
}


@pytest.mark.slow
def test_one_iteration_trains_on_what_each_prompt_asks_for(folder, tmp_path, monkeypatch, capsys):
    """By the command; what the reader sees is made up. The report has 24 captions, each with its own rewards."""
    seen = []
    monkeypatch.setattr(ocr, "_options", dict)
    monkeypatch.setattr(ocr, "read", lambda images: seen.append(images.shape) or ["open"] * len(images))
    sizes = {"model.path": folder / "pipeline", "reward_paths": f"clipscore={folder / 'clip'}", **SMALL}
    words = [f"--config.{name}={value}" for name, value in sizes.items()]
    with flagsaver.flagsaver():
        parsed = main.parse(["x", "--config=emoji", f"--run_dir={tmp_path / 'run'}", "--devices=1", *words])
        assert main.main(parsed) == 0, capsys.readouterr().err
    assert seen and all(shape[1:] == (64, 64, 3) for shape in seen)
    run = report_run.read(tmp_path / "run", "run")
    assert run.last is not None and run.last.shown.images.shape == (24, 64, 64, 3)
    asked = run.last.shown.asked
    assert 0 < asked["ocr"].sum() < 24 and (asked["ocr"] + asked[emoji.JUDGE] == 1).all()
    assert (asked["ocr_strict"] == asked["ocr"]).all() and asked["clipscore"].all()
    assert (tmp_path / "run/report.html").read_text().count("<img") == 48
    assert set(run.last.shown.prompts) <= set(data.read(config.load("emoji").prompt_files).test)
