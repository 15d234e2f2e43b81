"""The lab of the small world: what its controls do, and that what it measures is what the plain functions give."""

import functools
import itertools
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import compare, curves, evidence, lab, ranks, results, tune, worlds
from experiments.emoji import claims, judge
from experiments.methods import run, summary
from experiments.tiny import check
from solrl_jax import config, lora, sharding
from solrl_jax.config import Stage
from solrl_jax.models import flux
from solrl_jax.rewards import Reward, Score
from solrl_jax.weights import lora_files
from tests import nano, nano_emoji


def test_shuffled_rewards_stay_in_their_group_and_say_nothing():
    level = Reward("level", lambda prompts: None, lambda params, images, tokens: images.mean((1, 2, 3)))
    images = jnp.linspace(0, 1, 64).reshape(64, 1, 1, 1) * jnp.ones((64, 2, 2, 3))
    score = jax.jit(lab.shuffled(Score((level,), (1.0,))).rewards[0].score)
    dealt = np.asarray(score({}, images, jnp.zeros((2, 3)))).reshape(2, 32)
    plain = np.asarray(level.score({}, images, None)).reshape(2, 32)
    np.testing.assert_array_equal(np.sort(dealt), plain)  # each group keeps its values
    assert all(abs(np.corrcoef(a, b)[0, 1]) < 0.5 for a, b in zip(dealt, plain, strict=True))
    other = np.asarray(score({}, images[::-1], jnp.zeros((2, 3)))).reshape(2, 32)
    assert not np.array_equal(np.argsort(other), np.argsort(dealt))


def test_interval_covers_the_mean():
    low, high = lab.interval(np.random.default_rng(0).normal(0.1, 1.0, 400))
    assert low == pytest.approx(0.1 - 1.96 / 20, abs=0.06) and high == pytest.approx(0.1 + 1.96 / 20, abs=0.06)
    assert lab.interval(np.full(5, 0.25)) == [0.25, 0.25]


def test_arms_have_the_sizes_that_they_claim():
    steps = {name: evidence.image_steps(evidence.arm_config(arm)) for name, arm in evidence.ARMS.items()}
    assert steps["sol_rl"] == {"nvfp4_emulated": 16 * 24 * 6, "bf16": 16 * 8 * 10}
    assert steps["bf16"] == {"bf16": 16 * 24 * 6 + 16 * 8 * 10}
    assert steps["naive_scaling"] == {"bf16": 16 * 24 * 10} and steps["naive_quant"] == {"nvfp4_emulated": 16 * 24 * 10}
    assert steps["diffusionnft"] == {"bf16": 16 * 8 * 10}
    assert evidence.arm_config(evidence.ARMS["random"]).selection == "random"


def test_arms_that_differ_in_scalars_or_length_share_a_program():
    def key(name: str):
        arm = evidence.ARMS[name]
        return evidence.what_is_compiled(arm, evidence.arm_config(arm))

    assert key("long") == key("long_kl_0.03") and key("long_5e-4") == key("long_1e-3")
    assert len({key(n) for n in ("sol_rl", "shuffled", "bf16", "long", "long_5e-4")}) == 5


def test_curves_begin_at_the_base(tmp_path):
    found = {
        "test: gain of exact": results.figure(0.25, "", 1),
        "exact after 20 iterations, 400 image-steps": results.figure(0.75, "", 1),
        "exact after 10 iterations, 200 image-steps": results.figure(0.625, "", 1),
    }
    results.record(tmp_path / "arm.json", found)
    assert curves.points(tmp_path / "arm.json", "exact", "iterations") == [(0, 0.5), (10, 0.625), (20, 0.75)]
    assert curves.points(tmp_path / "arm.json", "exact", "image-steps")[1:] == [(200, 0.625), (400, 0.75)]


def test_curves_of_a_world(tmp_path):
    """Of the families those with results; a panel of each figure and axis."""
    marks = {
        f"{what} after 10 iterations, 200 image-steps": results.figure(0.5, "", 1) for what in ("exact", "clipscore")
    }
    found = marks | {f"test: gain of {what}": results.figure(0.25, "", 1) for what in ("exact", "clipscore")}
    for name in ("naive_quant", "branch"):
        results.record(tmp_path / f"{name}.json", found)
    curves.main([f"--arms={tmp_path}", f"--out={tmp_path / 'c.svg'}"])
    drawn = (tmp_path / "c.svg").read_text()
    assert drawn.count("<polyline") == 4 * 2 and drawn.count('data-x="0 200"') == 4 and "sol_rl" not in drawn
    with pytest.raises(SystemExit):
        curves.main(["--arms=/nowhere"])


@pytest.mark.parametrize(
    "captions, images, most, expect",
    [(500, 4, 500, 500), (300, 4, 500, 400), (5, 4, 8, 4), (200, 96, 1920, 1920), (3, 4, 2, 4)],
)
def test_pictures_at_a_time_divide_the_captions(captions, images, most, expect):
    assert lab.chunk(captions, images, most) == expect


def test_ranks_that_were_found_are_kept(tmp_path, monkeypatch):
    """A call that is ended has written what it had."""

    def pairs(*_):
        yield "base", "FP8, 6 steps", ranks.Pair(jnp.arange(8.0).reshape(1, 8), jnp.arange(8.0).reshape(1, 8))
        raise KeyboardInterrupt

    monkeypatch.setattr(ranks, "pairs", pairs)
    monkeypatch.setattr(lab, "open_world", lambda *_: None)
    monkeypatch.setattr(lab, "policies", lambda *_: {})
    with pytest.raises(KeyboardInterrupt):
        ranks.main(["--kept=2", f"--out={tmp_path / 'ranks.json'}"])
    assert results.table(tmp_path / "ranks.json").count("base, FP8, 6 steps") == 3


def test_gains_are_paired_by_caption_and_noise():
    base = {k: np.zeros((1, 3, 2)) for k in ("exact", "share of facts", "clipscore")} | {
        "spread": np.full((1, 3, 2), 4.0)
    }
    found = {k: np.zeros((2, 3, 2)) for k in base} | {"spread": np.full((2, 3, 2), 2.0)}
    found["exact"][1, :, 0] = 1  # the second seed is right in one of two pictures of each caption
    figures = evidence.gains(base, found, "test")
    gain = figures["test: gain of exact"]
    assert gain["value"] == 0.25 and gain["spread"] == {"interval": [0.25, 0.25], "seeds": [0.0, 0.5]}
    assert figures["test: spread of a caption's pictures"]["value"] == 0.5


@pytest.mark.parametrize("at_once", [2, 3, 125])
def test_a_judge_sees_some_captions_at_a_time(at_once):
    """Each caption's two pictures, in their order, and the arrays that the judge needs."""
    seen = []

    def judge(params, images, tokens):
        seen.append(images.shape)
        share = images.mean((1, 2, 3)) + params["more"] * jnp.repeat(tokens, 2)
        return SimpleNamespace(share=share, exact=share > 21)

    world = worlds.TINY._replace(at_once=at_once, judge=judge)
    images = jnp.arange(6.0).reshape(6, 1, 1, 1) * jnp.ones((6, 4, 4, 3))
    share, exact = lab.judged(world, {"more": jnp.float32(10)}, images, jnp.arange(3))
    assert share.tolist() == [0, 1, 12, 13, 24, 25] and exact.tolist() == [False] * 4 + [True] * 2
    assert set(seen) == {(2, 4, 4, 3)}


@pytest.fixture(scope="module")
def opened():
    with jax.set_mesh(sharding.make_mesh(1)):
        yield lab.open_world(config.load("tiny:sol_rl"), 4)


@pytest.mark.long
def test_measuring_is_what_the_plain_functions_give(opened):
    """Against `check`, which draws and judges by itself; guidance of weight 1 is none."""
    nothing = lab.base_adapter(opened)
    found = lab.measure(opened, nothing, "test", 2, steps=2)
    captions, prompts = opened.held_out["test"]
    cfg = check.model_config(check.HERE / "pipeline")
    frozen = opened.parts.frozen
    images = check.draw_samples(cfg, frozen.base, frozen.vae, prompts.cond, 2, Stage(steps=2, chunk=2))
    share, exact = check.exact(images, captions)
    np.testing.assert_allclose(found["share of facts"][0], share, atol=1e-6)
    np.testing.assert_array_equal(found["exact"][0], exact)
    apart = 255 * np.abs(np.asarray(images[:, 0] - images[:, 1])).mean((1, 2, 3))
    np.testing.assert_allclose(found["spread"][0][:, 0], apart, rtol=0.02)
    guided = lab.measure(opened, nothing, "test", 2, steps=2, w=3.0)
    assert np.abs(guided["clipscore"] - found["clipscore"]).max() > 1e-2


@pytest.mark.slow
def test_picks_are_the_prompts_that_the_command_draws(opened):
    rows = lab.picks(opened, opened.parts.cfg, [0, 1], 3, 2)
    assert rows.shape == (2, 2, 16) and rows.min() >= 0 and rows.max() < 2000
    assert all(len(set(row)) == 16 for row in rows.reshape(-1, 16))
    np.testing.assert_array_equal(rows[1], lab.picks(opened, opened.parts.cfg, [0, 1], 4, 1)[0])
    assert not np.array_equal(rows[:, 0], rows[:, 1])


@pytest.mark.long
def test_settings_are_chosen_on_captions_of_no_file(opened):
    found = lab.with_choosing(opened, 40, 100)
    captions, prompts = found.held_out["choosing"]
    files = {*opened.train, *itertools.chain.from_iterable(worlds.TINY.held_out().values())}
    assert len(files) > 2900 and len({*captions} - files) == 40
    assert {x.shape[0] for x in jax.tree.leaves(prompts)} == {40} and found.held_out.keys() > opened.held_out.keys()
    assert lab.with_choosing(opened, 40, 100).held_out["choosing"][0] == captions
    assert lab.with_choosing(opened, 40, 101).held_out["choosing"][0] != captions
    known = opened._replace(train=(*opened.train, *captions[:-1]))
    assert not {*captions[:-1]} & {*lab.with_choosing(known, 5, 100).held_out["choosing"][0]}
    barren = opened._replace(world=opened.world._replace(drawn=lambda rng, n: ({}, captions[:3] * n)))
    with pytest.raises(ValueError, match="4 captions to choose by: the world drew 3 new ones"):
        lab.with_choosing(barren, 4, 100)


def test_settings_that_share_a_program_train_together():
    assert tune.groups("aaaaabbab", 3) == [[0, 1, 2], [3, 4], [5, 6], [7], [8]]


@pytest.mark.parametrize("world", tune.SWEEPS)
def test_the_settings_of_a_sweep_differ_and_fill_its_programs(world):
    """A program is compiled for `at_once` runs and takes no other number of them."""
    sweep = tune.SWEEPS[world]
    arms = [evidence.Arm(sweep.recipe, {**sweep.common, **words}) for words in sweep.settings]
    cfgs = [evidence.arm_config(arm, worlds.WORLDS[world]) for arm in arms]
    assert len({repr(cfg) for cfg in cfgs}) == len(sweep.settings) == 12
    keys = [evidence.what_is_compiled(arm, cfg) for arm, cfg in zip(arms, cfgs, strict=True)]
    assert {len(group) for group in tune.groups(keys, sweep.at_once)} == {sweep.at_once}


@pytest.mark.long
def test_previews_and_branches_are_ranked_by_their_own_truth(opened, monkeypatch):
    """The full rollout ranks as itself; a branch in BF16 is judged by pictures that are not the full rollout's."""
    monkeypatch.setattr(ranks, "PREVIEWS", {"full": ranks.FULL, "NVFP4": ("nvfp4_emulated", 2)})
    monkeypatch.setattr(ranks, "BRANCHES", {"branch": "bf16"})
    adapter = jax.tree.map(lambda x: x[0], lab.base_adapter(opened))
    found = {name: pair for _, name, pair in ranks.pairs(opened, {"base": adapter}, captions=2, candidates=4, chunk=8)}
    assert list(found) == ["full", "NVFP4", "branch"] and found["full"].truth.shape == (2, 4)
    np.testing.assert_array_equal(found["full"].preview, found["full"].truth)
    np.testing.assert_array_equal(found["NVFP4"].truth, found["full"].truth)
    assert np.abs(found["NVFP4"].preview - found["NVFP4"].truth).max() > 1e-3
    assert 1e-4 < np.abs(found["branch"].truth - found["full"].truth).max() < 0.2
    assert np.abs(found["branch"].preview - found["branch"].truth).max() > 1e-4


@pytest.mark.slow
def test_the_ranks_fit_the_sizes_of_the_emoji_world(tmp_path):
    """Traced, not run: a preview and a branch of all captions and candidates, in the chunks of a GPU."""
    sizes = worlds.EMOJI.sizes
    with jax.set_mesh(sharding.make_mesh(1)):
        opened = lab.open_world(nano.emoji(tmp_path), 2)
        todo = ranks.tasks(opened, opened.parts.model, lab.chunk(sizes.captions, sizes.candidates, sizes.chunk))
        prompts = jax.eval_shape(
            lambda x: jax.tree.map(lambda x: jnp.repeat(x, sizes.captions // 2, axis=0), x),
            opened.held_out["test"][1],
        )
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (sizes.captions, sizes.candidates)))
        kernels = lora.merged_kernels(
            opened.parts.frozen.base, jax.tree.map(lambda x: x[0], lab.base_adapter(opened)), opened.parts.cfg.lora
        )
        for name in ("BF16, 4 steps", "BF16, branch of 5 steps"):
            found = jax.eval_shape(todo[name][1], kernels, None, opened.parts.frozen, prompts, keys)
            assert {x.shape for x in jax.tree.leaves(found)} == {(200, 96)}


@pytest.mark.long
def test_a_run_on_the_emoji_world(tmp_path):
    """An iteration of two seeds, and what is measured against the judge itself; networks with random weights."""
    cfg = nano.emoji(tmp_path)
    with jax.set_mesh(sharding.make_mesh(1)):
        opened = lab.open_world(cfg, 3)
        assert opened.world is worlds.EMOJI and not any("word" in caption for caption in opened.train)
        run = lab.program(opened, cfg, opened.parts.score)
        rows = lab.picks(opened, cfg, (0, 1), 0, 1)
        states, metrics = run(lab.begin(opened, cfg, [{}] * 2, (0, 1)), opened.table, opened.parts.frozen, rows)
        assert states.iteration.tolist() == [1, 1] and np.isfinite(metrics["reward/mean"]).all()
        stage, (captions, prompts) = Stage(steps=2, chunk=2), opened.held_out["compositional"]
        found = lab.measure(opened, lab.base_adapter(opened), "compositional", 2, steps=2, at_once=2)
        frozen = opened.parts.frozen
        images = check.draw_samples(cfg.model, frozen.base, frozen.vae, prompts.cond, 2, stage)
    verdict = jax.jit(judge.judge)(images.reshape(6, 64, 64, 3), judge.tokenize(captions), judge.objects())
    np.testing.assert_array_equal(found["share of facts"][0].ravel(), np.asarray(verdict.share, np.float64))


@pytest.mark.slow
def test_comparing_writes_the_figures_of_a_lora_and_the_base(tmp_path, monkeypatch):
    """Of both splits, two captions x 4 pictures; tiny with random networks. A LoRA of zeros has no gain at all."""
    nano.write(tmp_path / "pipeline", tmp_path / "clip")
    cfg = worlds.find("tiny", tmp_path).config("sol_rl")
    model, key = flux.make(cfg.model), jax.random.key(0)
    zeros = lora.init(key, jax.eval_shape(model.init, key), model.lora_targets, cfg.lora)
    monkeypatch.setattr(lab, "open_world", functools.cache(lab.open_world))  # the first command's, in the second

    def compared(adapter) -> dict[str, dict]:
        lora_files.save(tmp_path / "lora.safetensors", adapter, model.keys, cfg.lora)
        file, out = tmp_path / "lora.safetensors", tmp_path / "results/run.json"
        compare.main([f"--networks={tmp_path}", "--prompts=2", str(file), f"--out={out}"])
        written = json.loads(out.read_text())
        assert written["lora"] == str(file)
        return written["figures"]

    found, same = compared(nano.random(zeros, 1)), compared(zeros)
    for split in lab.SPLITS:
        for what in ("exact", "share of facts", "clipscore"):
            base, trained = (found[f"{split}: {what}, {who}"] for who in ("base", "trained"))
            gain = found[f"{split}: gain of {what}"]
            assert base["n"] == trained["n"] == gain["n"] == 2 * lab.PICTURES
            assert gain["value"] == pytest.approx(trained["value"] - base["value"], abs=1e-9)
            assert same[f"{split}: {what}, base"] == same[f"{split}: {what}, trained"] == base
            assert same[f"{split}: gain of {what}"]["value"] == 0
        assert abs(found[f"{split}: gain of clipscore"]["value"]) > 1e-3
        assert same[f"{split}: spread of a caption's pictures"]["value"] == 1
    assert len(found) == len(same) == 2 * (6 + 4)


@pytest.mark.long
def test_commands_on_the_emoji_world_come_to_their_end(tmp_path, monkeypatch):
    """Methods, a long training and its pictures with the networks of a folder; every file is there."""
    networks = nano_emoji.write(tmp_path / "nano")
    few = {"prompts": "2", "candidates": "8", "kept": "4", "regenerate.chunk": "4", "learn.micro_batch": "1"}
    monkeypatch.setitem(run.ARMS, "branch", evidence.Arm("branch", few | {"explore.chunk": "8"}))
    monkeypatch.setitem(evidence.ARMS, "naive_quant", evidence.Arm("naive_quant", few))
    world = ["--world=emoji", f"--networks={networks}", "--prompts=5"]
    words = [*world, "--seeds=0", "--chunk=20", "--iterations=2"]
    arms, samples = tmp_path / "learning/results/arms", tmp_path / "results/samples"
    run.main([*words, "--arms=branch", "--marks=2", f"--out={arms}"])
    shutil.copy(arms / "branch.json", arms / "diffusionnft.json")  # what arms are compared with
    ran = json.loads((arms / "branch.json").read_text())
    assert f"test: gain of exact after 2 iterations, {ran['ends_at']} s" in ran["figures"]
    summary.main([f"--results={arms.parent}"])
    evidence.main([*words, "--arms=naive_quant", "--every=1", f"--out={samples}", f"--loras={tmp_path}"])
    compare.main([*world, str(tmp_path / "naive_quant.safetensors"), f"--pictures={tmp_path / 'before_after.png'}"])
    claims.main([f"--home={tmp_path}"])
    monkeypatch.setitem(
        tune.SWEEPS, "emoji", tune.Sweep("branch", few | {"explore.chunk": "8"}, (tune.setting(1e-3),), 1, "1")
    )
    tune.main([*world, "--chunk=20", f"--out={tmp_path / 'tune.json'}"])
    tuned = json.loads((tmp_path / "tune.json").read_text())
    name = "learning_rate 0.001, kl_weight 0.0001, 1 iterations: gain of "
    assert set(tuned["figures"]) == {name + what for what in tuned["base"]} and tuned["base"].keys() > {"exact"}
    figures = json.loads((samples / "naive_quant.json").read_text())["figures"]
    assert {f"clipscore after {n} iterations, {n * 160} image-steps" for n in (1, 2)} < set(figures)
    assert {"test: gain of exact", "compositional: gain of exact"} < set(figures)
    told = json.loads((tmp_path / "results/claims.json").read_text())["figures"]
    assert sum(not f["unit"].startswith("not run") for f in told.values()) == 1  # of one seed nothing can be told
    with Image.open(tmp_path / "before_after.png") as grid:
        assert grid.size == (3 * 448, 24 + 8 * 134)  # 24 captions in three blocks of eight
    assert (arms.parent / "curves.png").is_file() and (arms.parent / "summary.json").is_file()
