"""What experiments/methods and experiments/ablations make of their runs: prices, curves, shares of a gain, figures."""

import argparse
import json
from collections import Counter
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evidence, fields, full_size, profile, ranks, results, worlds
from experiments.ablations import run as ablations
from experiments.efficiency import peer
from experiments.efficiency import run as efficiency
from experiments.flux2_h100 import run as flux2_h100
from experiments.flux_eight import run as flux_eight
from experiments.flux_multi_gpu import run as flux_multi_gpu
from experiments.methods import run, summary
from experiments.methods.price import WORK, Prices, of_world, price, wall
from experiments.rewards import speed
from experiments.zimage_h100 import run as zimage_h100
from solrl_jax import config, recipes
from solrl_jax.run import model_card

EACH = Prices(bf16=2.0, low=1.0, decoded=0.5, trained=3.0, fixed=2.0, quantise=7.0)


def test_an_iteration_has_the_price_of_its_work():
    """FLUX's own sizes, by hand: image-steps, decoded pictures, trained points with their further velocities."""
    sol_rl = price(config.load("flux:sol_rl"), EACH)
    assert sol_rl == {
        "rollout in bf16": 48 * 24 * 10 * 2.0,
        "rollout in low precision": 48 * 96 * 6 * 1.0,
        "decode and reward": 48 * (96 + 24) * 0.5,
        "learn": 48 * 24 * 4 * (3.0 + 2 * 2.0),
        "quantise": 7.0,
    }
    flow = price(config.load("flux:flow_grpo"), EACH)
    assert flow["rollout in bf16"] == 48 * 24 * 6 * 2.0 and flow["quantise"] == 0
    assert flow["learn"] == 48 * 24 * 5 * (3.0 + 2.0)  # two updates: the behaviour policy, and no KL
    assert price(config.load("flux:awm"), EACH)["learn"] == 48 * 24 * 6 * (3.0 + 2 * 2.0)
    branch = price(config.load("flux:branch"), EACH)
    assert branch["rollout in low precision"] == 48 * 96 * 5 * 1.0 and branch["learn"] == sol_rl["learn"]
    assert branch["rollout in bf16"] == 48 * 24 * 4 * 2.0
    naive = price(config.load("flux:naive_scaling"), EACH)
    assert naive["rollout in bf16"] == 48 * 96 * 10 * 2.0 and naive["decode and reward"] == 48 * 96 * 0.5


def test_every_arm_spends_the_budget():
    for name, arm in run.ARMS.items():
        cfg = evidence.arm_config(arm)
        each = sum(price(cfg, run.prices()).values())
        spent = run.a_mark(cfg, 20_000, 8) * 8 * each
        assert spent == pytest.approx(20_000, rel=0.08), name
        assert run.BORROWED.get(name, name) in run.ARMS


def test_the_arms_of_a_world():
    """Those of the emoji world begin with Sol-RL's, of which the first chooses the rate of all."""
    assert run.ORDER["tiny"] == tuple(run.ARMS) and set(run.ORDER["emoji"]) < set(run.ARMS)
    assert run.ORDER["emoji"][:3] == ("sol_rl", "branch", "naive_scaling")
    assert run.ORDER.keys() == run.RESULTS.keys() == set(worlds.WORLDS) == set(WORK)
    assert worlds.defaults("captions") == "tiny 500, emoji 200"


def test_an_arm_on_the_emoji_world():
    """The recipe's sizes, on captions of objects, and nothing that OCR would score."""
    tiny, emoji = (evidence.arm_config(run.ARMS["branch"], world) for world in (worlds.TINY, worlds.EMOJI))
    assert evidence.image_steps(tiny) == evidence.image_steps(emoji)
    assert (emoji.name, emoji.reward, emoji.evaluate.rewards) == ("emoji", "clipscore", "")
    assert emoji.prompt_files == str(worlds.EMOJI.prompts) and emoji.branch == tiny.branch
    assert price(tiny, EACH) == price(emoji, EACH)
    with pytest.raises(ValueError, match="no world 'mnist': use one of tiny, emoji"):
        worlds.find("mnist")


def test_a_world_with_other_networks(tmp_path):
    """Its pipeline and its CLIP; captions and the judge stay."""
    other = worlds.find("emoji", tmp_path)
    assert other.prompts == worlds.EMOJI.prompts and other.name == "emoji"
    cfg = evidence.arm_config(run.ARMS["sol_rl"], other)
    assert cfg.model.path == str(tmp_path / "pipeline") and cfg.reward_paths == (f"clipscore={tmp_path / 'clip'}",)


def test_a_world_with_fields_of_the_command(capsys):
    """They are an arm's, but for those that the arm sets."""
    parser = argparse.ArgumentParser()
    worlds.add_arguments(parser)
    world = worlds.of(parser.parse_args(["--world=emoji", "--set=learn.kl_weight=3e-4", "--set=prompts=8"]))
    cfg = evidence.arm_config(evidence.Arm("branch", {"prompts": "4"}), world)
    assert (cfg.learn.kl_weight, cfg.prompts, cfg.reward) == (3e-4, 4, "clipscore")
    with pytest.raises(SystemExit):
        parser.parse_args(["--set=learn.kl_weight"])
    assert "'learn.kl_weight': use FIELD=VALUE" in capsys.readouterr().err
    with pytest.raises(config.ConfigError, match=r"learn\.kl_wait"):
        world._replace(overrides=(("learn.kl_wait", "1"),)).config("branch")


def test_fields_with_commas_in_their_values():
    """--set is repeated."""
    words = ["--set=model.remat_keeps=attention,mlp", "--set=reward_paths=clipscore=a,shapes=b"]
    pairs = {"model.remat_keeps": "attention,mlp", "reward_paths": "clipscore=a,shapes=b"}
    assert flux_eight.parsed(words).set == flux_multi_gpu.parsed(words).set == pairs
    short = flux_multi_gpu.parsed(["--short", "--set=kept=4"]).set
    assert (short["candidates"], short["kept"]) == ("4", "4") and len(short) == 6
    parser = argparse.ArgumentParser()
    fields.add_argument(parser)
    assert dict(parser.parse_args(words).set) == pairs and fields.arguments(pairs) == words
    cfg = config.load("flux", dict(parser.parse_args(words).set))
    assert cfg.model.remat_keeps == ("attention", "mlp") and cfg.reward_paths == ("clipscore=a", "shapes=b")


@pytest.mark.parametrize("module", [flux2_h100, zimage_h100])
def test_fields_of_a_part_are_passed_on_to_full_size(module, monkeypatch, tmp_path):
    """The command's past the part's own."""
    ran, plans = [], []
    monkeypatch.setattr(module.subprocess, "run", lambda command, **_: ran.append(command) or mock.Mock(returncode=0))
    monkeypatch.setattr(module.planned, "write", lambda name, words, out: plans.append(words))
    words = ["--parts=1024", f"--out={tmp_path}"]
    module.main([*words, "--set=prompts=2", "--set=explore.chunk=6", "--set=model.remat_keeps=attention,mlp"])
    told = [word.removeprefix("--set=") for word in ran[0] if word.startswith("--set=")]
    assert dict(word.split("=", 1) for word in told) == plans[0] and plans[0]["model.remat_keeps"] == "attention,mlp"
    assert (plans[0]["prompts"], plans[0]["explore.chunk"], plans[0]["regenerate.chunk"]) == ("2", "6", "12")


def test_the_seconds_of_a_call():
    """Of the emoji world, by hand: steps, decoded pictures, trained points with two further velocities; and what is
    measured, in 10 steps. A call of three arms tunes once and leaves room to compile."""
    cfg, each = evidence.arm_config(run.ARMS["sol_rl"], worlds.EMOJI), of_world("emoji")
    assert each.bf16 == pytest.approx(1.632 / 190e3) and each.decoded == pytest.approx((1.766 + 1.035) / 190e3)
    steps = 32 * (24 * 6 * 1.7 + 8 * 10 + 8 * 4 * (2.2 + 2)) + 50
    decoded = 32 * (24 + 8) + 5
    assert wall(cfg, 3, 1, 5) == pytest.approx(3 * (steps * each.bf16 + decoded * each.decoded))
    cfgs = {n: evidence.arm_config(run.ARMS[n], worlds.EMOJI) for n in run.ORDER["emoji"][:3]}
    sizes = worlds.EMOJI.sizes
    *rows, last = run.plan(cfgs, sizes.budget, sizes.marks, 0, 5, 500)[1:]
    assert [row.split()[0] for row in rows if "+ 5 x 0 " not in row] == ["sol_rl"] and "5 x 70 + 5 x 28" in rows[0]
    assert 100 < float(last.split()[1]) < 300
    arm = evidence.ARMS["sol_rl"]
    *_, last = evidence.plan({"sol_rl": arm}, {"sol_rl": evidence.arm_config(arm)}, 3, 500)
    assert float(last.split()[1]) < 10


def test_a_rate_that_was_chosen_before(tmp_path):
    """The method's own, else that of an arm which shares it."""
    for name, rate in (("branch", 1e-3), ("awm", 5e-4)):
        results.record(tmp_path / f"{name}.json", {"rate": results.figure(rate, "chosen", 1)})
    assert run.chosen_before(tmp_path, "sol_rl") == ("branch", 1e-3)
    assert run.chosen_before(tmp_path, "awm") == ("awm", 5e-4)
    with pytest.raises(FileNotFoundError, match=r"no vgrpo there has the rate of vgrpo; leave it out"):
        run.chosen_before(tmp_path, "vgrpo")


def test_ranks_of_a_perfect_preview_and_of_a_reversed_one():
    truth = jnp.linspace(0.0, 1.0, 12).reshape(1, 12)
    perfect, reversed_ = (ranks.figures_of(ranks.Pair(x, truth), 4) for x in (truth, -truth))
    assert {name: f["value"] for name, f in perfect.items()} == {
        "Spearman": pytest.approx(1.0),
        "overlap of the best 2": 1.0,
        "kept contrast": 1.0,
    }
    assert [f["value"] for f in reversed_.values()] == pytest.approx([-1.0, 0.0, -1.0])


def test_every_arm_names_its_recipe():
    """So that results on disk stay those of the arm when the default changes."""
    settings = {n: arm for ablation in ablations.ABLATIONS.values() for n, arm in ablation.settings.items()}
    for name, arm in [*run.ARMS.items(), *evidence.ARMS.items(), *settings.items()]:
        assert arm.recipe in recipes.NAMES, name
        assert model_card.family(evidence.arm_config(arm)) == arm.recipe, name
    assert model_card.family(evidence.arm_config(evidence.Arm())) == "sol_rl"


def arm(folder, name, gains, **facts):
    """An arm's file with marks at 100, 200, ... s; gains [marks, seeds]."""
    figures = {}
    for what in summary.COMPARED.values():
        for i, row in enumerate(gains):
            spread = {"seeds": list(row), "error": 0.1}
            label = f"{what} after {i + 1} iterations, {100 * (i + 1)} s"
            figures[label] = figures[what] = results.figure(float(np.mean(row)), "mean", 1, spread)
    figures["rate 0.0005: gain of clipscore after 4 iterations"] = results.figure(0.7, "score", 1)
    results.record(folder / f"arms/{name}.json", figures, arm=name, about=name, **facts)


def test_arms_at_one_cost(tmp_path):
    """DiffusionNFT gains .4 in 200 s, evenly; an arm twice as fast, and one that never gets there."""
    arm(tmp_path, "diffusionnft", [[0.1, 0.3], [0.3, 0.5]])
    arm(tmp_path, "sol_rl", [[0.3, 0.5], [0.5, 0.9]])
    arm(tmp_path, "random", [[0.1, 0.1], [0.1, 0.1]])
    found = summary.summary({n: tmp_path / f"arms/{n}.json" for n in ("diffusionnft", "sol_rl", "random")})
    gain = "of diffusionnft's gain of CLIPScore"
    shares, near = ("25%", "50%", "75%", "100%"), pytest.approx
    assert [found[f"diffusionnft: {s} {gain}: cost"]["value"] for s in shares] == near([50, 100, 150, 200])
    assert [found[f"sol_rl: {s} {gain}: cost"]["value"] for s in shares] == near([25, 50, 75, 100])
    assert [found[f"sol_rl: {s} {gain}"]["value"] for s in shares] == near([2, 2, 2, 2])
    assert found[f"random: 25% {gain}"]["value"] == near(0.5) and found[f"random: 50% {gain}"]["value"] is None
    assert results.cell(found[f"random: 50% {gain}"]) == "-"
    assert found["sol_rl: gain of CLIPScore"]["value"] == pytest.approx(0.7)
    assert found["sol_rl: gain of CLIPScore"]["spread"]["error"] == pytest.approx(0.2)  # .2828 / sqrt 2
    less = found["sol_rl: gain of CLIPScore less diffusionnft's"]
    assert less["value"] == pytest.approx(0.3) and less["spread"]["seeds"] == [0.2, 0.4]
    # Half of the gain, of either seed alone: .15 at 50 s against 125, .25 at 50 s against 83.3; all of it: 100, 200.
    assert found[f"sol_rl: 50% {gain}"]["spread"]["error"] == pytest.approx((2.5 - 5 / 3) / 2)
    assert found[f"sol_rl: 100% {gain}"]["spread"]["error"] == pytest.approx(0.0)
    c = summary.curve(tmp_path / "arms/sol_rl.json", "test: gain of exact")
    np.testing.assert_allclose(c.mean, [0, 0.4, 0.7])
    np.testing.assert_allclose(c.half_width, [0, 1.2706, 2.5412], rtol=1e-4)  # 12.706 x .1 / sqrt 2 x sqrt 2
    np.testing.assert_allclose(c.at(150), [0.4, 0.7])
    rate_alone = {"rate": results.figure(1e-3, "chosen", 1)}  # of a call that ended before the first mark
    results.record(tmp_path / "arms/awm.json", rate_alone, arm="awm", about="")
    summary.main([f"--results={tmp_path}"])
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    told = json.loads((tmp_path / "summary.json").read_text())["figures"]
    assert told.pop("awm: stopped at")["value"] == 0 and len(told) == 3 * (3 * (2 + 4 * 2) + 1)
    assert found["random: rate 0.0005"]["value"] == 0.7
    with pytest.raises(ValueError, match="has no marks of 'spread'"):
        summary.curve(tmp_path / "arms/sol_rl.json", "spread")


def test_arms_that_end_apart_meet_at_the_cheaper_end(tmp_path):
    """100 s is where the shorter arm ends: of the longer one only its first mark counts."""
    arm(tmp_path, "diffusionnft", [[0.1, 0.3], [0.3, 0.5]])
    arm(tmp_path, "sol_rl", [[0.3, 0.5]])
    found = summary.summary({n: tmp_path / f"arms/{n}.json" for n in ("diffusionnft", "sol_rl")})
    assert found["diffusionnft: gain of CLIPScore"]["value"] == pytest.approx(0.2)
    assert found["sol_rl: 100% of diffusionnft's gain of CLIPScore"]["value"] == pytest.approx(2.0)


def test_an_arm_that_was_stopped_does_not_lower_the_cost_of_the_others(tmp_path, capsys):
    """By where it ends, whatever its budget is; without that by nine tenths of its budget; whole without either."""
    one, two = [[0.3, 0.5]], [[0.1, 0.3], [0.3, 0.5]]
    arm(tmp_path, "diffusionnft", two)
    arm(tmp_path, "sol_rl", two, budget=222.0)
    arm(tmp_path, "vgrpo", two, budget=20_000.0, ends_at=200)  # two iterations, by --iterations
    arm(tmp_path, "branch", one, budget=200.0)
    arm(tmp_path, "awm", two, budget=200.0, ends_at=201)
    files = {n: tmp_path / f"arms/{n}.json" for n in ("diffusionnft", "sol_rl", "vgrpo", "branch", "awm")}
    assert [summary.stopped(file) for file in files.values()] == [None, None, None, 100, 200]
    summary.main([f"--results={tmp_path}"])
    assert "branch is left out: it was stopped at 100 s, before its end\n" in capsys.readouterr().out
    found = json.loads((tmp_path / "summary.json").read_text())["figures"]
    assert [found[f"{name}: stopped at"]["value"] for name in ("branch", "awm")] == [100, 200]
    gains = {n.split(":")[0]: f for n, f in found.items() if n.endswith(": gain of CLIPScore")}
    assert sorted(gains) == ["diffusionnft", "sol_rl", "vgrpo"]
    assert all("at 200 s" in f["unit"] and f["value"] == pytest.approx(0.4) for f in gains.values())
    table = results.settings(tmp_path / "summary.json", ["gain of CLIPScore = CLIPScore"]).splitlines()
    assert len(table) == 2 + 3 and not any("branch" in row for row in table)
    arm(tmp_path, "sol_rl", two, budget=100.0)
    with pytest.raises(SystemExit):
        summary.main([f"--results={tmp_path}"])
    assert "arms of unlike budgets end at sol_rl 90 s, vgrpo 200 s: run them with" in capsys.readouterr().err
    arm(tmp_path, "diffusionnft", two, budget=20_000.0)
    with pytest.raises(SystemExit):
        summary.main([f"--results={tmp_path}"])
    assert "there is no whole arms/diffusionnft.json to compare with: run " in capsys.readouterr().err


def test_the_settings_of_every_ablation_can_run():
    """Their configs are valid, and differ from each other."""
    for name, ablation in ablations.ABLATIONS.items():
        cfgs = [evidence.arm_config(ablations.arm_of(a, 1e-3, 60)) for a in ablation.settings.values()]
        assert len(set(cfgs)) == len(cfgs) >= 3, name
        assert all(cfg.learn.learning_rate == 1e-3 for cfg in cfgs)


def test_an_ablation_is_drawn(tmp_path):
    figures = {}
    for label in ("2", "4"):
        for what in ("test: gain of clipscore", "test: gain of exact", "test: spread of a caption's pictures"):
            figures[f"{label}: {what}"] = results.figure(0.1, "mean", 1, {"seeds": [0.1, 0.2], "error": 0.05})
    results.record(tmp_path / "pool.json", figures, claim="", axis="N")
    ablations.draw(tmp_path / "pool.json")
    assert (tmp_path / "pool.png").read_bytes()[:4] == b"\x89PNG"
    assert results.cell(figures["2: test: gain of exact"]) == "0.100 ± 0.050"


def test_efficiency_is_over_the_naive_rollout():
    """Medians of rollouts, and of rollout and learning, over those of BF16 in one stage."""
    stages = {
        "naive, BF16": [60.0, 52.0, 56.0],
        "two stages, BF16": [40.0] * 3,
        "two stages, low precision": [28.0] * 3,
        "branch, low precision": [20.0] * 3,
    }
    learn = {"naive, BF16": [24.0, 22.0, 26.0]}
    measured = {
        name: [
            {"quantise": 0.0, "explore": x / 2, "regenerate": x / 2, "learn": y}
            for x, y in zip(seconds, learn.get(name, [0.0] * 3), strict=True)
        ]
        for name, seconds in stages.items()
    }
    found = efficiency.figures_of(measured, 2)
    assert found["naive, BF16: rollout"]["value"] == 28 and found["naive, BF16: rollout"]["spread"] == [26.0, 30.0]
    assert found["learn"]["value"] == 12 and found["two stages, BF16: explore"]["value"] == 10
    assert found["two stages, low precision: rollout, naive over it"]["value"] == 2.0
    assert found["two stages, BF16: end to end"]["value"] == 32.0
    assert found["two stages, BF16: end to end, naive over it"]["value"] == 40 / 32
    assert set(efficiency.VARIANTS) == set(stages)
    for recipe, changes in efficiency.VARIANTS.values():
        for model in ("flux", "sd35", "sana"):
            assert config.load(f"{model}:{recipe}", {"prompts": "1", **changes}).prompts == 1


def test_efficiency_goes_on_from_what_was_measured(tmp_path, monkeypatch):
    """--more measures the forms that the file lacks and keeps the others; under other conditions it refuses."""
    asked = []

    def measure(bench, cfg, learn):
        asked.append((cfg.explore is None, learn))
        return [{"quantise": 0.0, "regenerate": float(len(asked)), "learn": 3.0 if learn else 0.0}]

    monkeypatch.setattr(efficiency, "stage_times", measure)
    monkeypatch.setattr(efficiency, "Bench", lambda cfg, mesh, repeat: mock.Mock(cfg=cfg))
    out = tmp_path / "e.json"
    words = ["--model=tiny", "--prompts=4", f"--out={out}"]
    efficiency.main(words)
    whole = json.loads(out.read_text())
    assert asked == [(True, True), (False, False), (False, False), (False, False)]
    cut = {**whole, "seconds": {k: v for k, v in whole["seconds"].items() if k.endswith("BF16")}}
    out.write_text(json.dumps(cut))
    asked[:] = [()] * 2
    efficiency.main([*words, "--more"])
    assert (
        asked == [(), (), (False, False), (False, False)] and json.loads(out.read_text())["figures"] == whole["figures"]
    )
    asked[:] = []
    efficiency.main([*words[:2], f"--out={tmp_path / 'two.json'}", "--forms=naive;branch"])
    found = json.loads((tmp_path / "two.json").read_text())
    assert len(asked) == 2 and list(found["seconds"]) == ["naive, BF16", "branch, low precision"]
    asked[:] = []
    efficiency.main([*words[:2], f"--out={tmp_path / 'three.json'}", "--forms=branch"])
    found = json.loads((tmp_path / "three.json").read_text())["figures"]  # nothing to compare with, and it learns
    assert asked == [(False, True)] and found["branch, low precision: end to end"]["value"] == 1.0
    assert not [name for name in found if "over it" in name]
    with pytest.raises(SystemExit):  # what is learnt would be measured with another form
        efficiency.main([*words[:2], f"--out={tmp_path / 'four.json'}", "--forms=branch;naive"])
    out.write_text(json.dumps({**cut, "device": "another"}))
    with pytest.raises(ValueError, match=r"--more.*device: 'another' there.*anew"):
        efficiency.main([*words, "--more"])


def test_the_peers_forward_pass(tmp_path, capsys):
    """The small world's transformer by diffusers: recorded with PyTorch's versions, not JAX's."""
    words = ["--model=tiny", "--batch=2", "--repeat=1", f"--out={tmp_path / 'peer.json'}"]
    peer.main([*words, "--precisions=bf16"])
    found = json.loads((tmp_path / "peer.json").read_text())
    assert set(found["figures"]) == {f"PyTorch, bf16 forward of 2{more}" for more in ("", ": compile")}
    assert found["figures"]["PyTorch, bf16 forward of 2"]["value"] > 0 and "torch" in found["versions"]
    with pytest.raises(SystemExit):
        peer.main([*words, "--precisions=fp4"])
    assert "fp4 is unknown" in capsys.readouterr().err


def test_full_size_has_written_what_it_knew_when_it_is_stopped(tmp_path, monkeypatch):
    """Every figure is in the file at once, so that a time limit within the next one loses nothing."""

    class Stopped(full_size.Bench):
        def encode(self):
            self.note("encode 4 prompts", [2.0, 3.0, 4.0])
            raise KeyboardInterrupt

    monkeypatch.setattr(full_size, "Bench", Stopped)
    monkeypatch.setattr(full_size, "drawn", lambda tree, place=None: tree)
    monkeypatch.setattr(full_size, "work", lambda cfg, devices: {})
    with pytest.raises(KeyboardInterrupt):
        full_size.main(["--config=tiny:sol_rl", "--prompts=4", f"--out={tmp_path / 'f.json'}"])
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["figures"]["encode 4 prompts"] == results.figure(3.0, "s; median [least, most]", 3, [2.0, 4.0])
    assert json.loads(found["config"])["prompts"] == 4


def test_kinds_of_kernels():
    """By the names that XLA's, cuBLAS's and cuDNN's kernels had on an H200."""
    for kind, kernel in {
        "products": "nvjet_sm90_tst_128x160_64x5_2x1_v_bz_NNT",
        "attention": "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x4x1",
        "convolutions": "wrapped_convolution",
        "reductions": "input_reduce_fusion_2",
        "copies and concatenations": "memcpy128",
        "elementwise": "loop_convert_fusion_65",
    }.items():
        assert profile.group(kernel, "command_buffer_291") == kind
    assert profile.group("void cudnn::fusion::convert_dq_to_16bits<true>", "") == "attention"
    assert profile.group("input_add_convert_reduce_fusion_2", "") == "reductions"
    both = Counter({("memcpy128", ""): 1.0, ("memset", ""): 2.0, ("loop_add_fusion", ""): 0.5})
    assert profile.groups(both) == {"copies and concatenations": 3.0, "elementwise": 0.5}


def test_a_reward_takes_a_share_of_the_rollout(tmp_path, monkeypatch):
    """100 + 20 pictures in 12 s, of which 120 / 60 = 2 s are CLIPScore's own; another reward takes 5 s in its place."""
    rollout = {"two stages, low precision: rollout": results.figure(12.0, "s", 1)}
    results.record(tmp_path / "flux.json", rollout, candidates=100, kept=20)
    monkeypatch.setattr(speed, "ROLLOUT", tmp_path / "flux.json")
    rates = {"clipscore, float32, 512 px": 60.0, "hpsv2, float32_exact, 512 px": 24.0, "hpsv2, float32, 1024 px": 1.0}
    found = speed.shares({case: results.figure(rate, "pictures/s", 1) for case, rate in rates.items()})
    assert found["clipscore, float32, 512 px: share"]["value"] == pytest.approx(2 / 12)
    assert found["hpsv2, float32_exact, 512 px: share"]["value"] == pytest.approx(5 / 15)
    assert found["all, float32, 512 px: share"]["value"] == pytest.approx(2 / 12)
    assert found["all, float32_exact, 512 px: share"]["value"] == pytest.approx(5 / 15)
    assert speed.shares({"hpsv2, float32, 512 px": results.figure(24.0, "pictures/s", 1)}) == {}
