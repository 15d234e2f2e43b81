"""The plan of FLUX.1-dev in numbers, from config files alone; costs of small programs against counts by hand."""

import dataclasses
import json
import types
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from absl.testing import flagsaver

from solrl_jax import config, main, plan, train
from solrl_jax.config import ConfigError, Evaluate, Stage
from solrl_jax.models import flux
from solrl_jax.plan import cards, jaxpr, shapes
from solrl_jax.quant import coverage
from tests import flux_dev

S, F32, BF16 = jax.ShapeDtypeStruct, jnp.float32, jnp.bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("flux")


@pytest.fixture(scope="module")
def planned(folder):
    return plan.plan(flux_dev.config(folder))


def by_stage(p):
    return {use.stage: use for use in p.uses}


# --- cost of small programs -----------------------------------------------------------------------------------------


def test_flops_of_products_convolutions_and_loops():
    def f(x, w, k):
        def body(x, _):
            return jax.nn.silu(x @ w), None

        x, _ = jax.lax.scan(body, x, None, length=7)
        return x, jax.lax.conv_general_dilated(k, jnp.ones((3, 3, 4, 5)), (1, 1), "SAME", dimension_numbers=LAST)

    LAST = ("NHWC", "HWIO", "NHWC")
    program = jaxpr.trace(f, S((2, 8), BF16), S((8, 8), BF16), S((1, 6, 6, 4), F32))
    assert jaxpr.flops(program) == {"bfloat16": 7 * 2 * 2 * 8 * 8, "float32": 2 * 6 * 6 * 5 * 3 * 3 * 4}
    exact = jaxpr.trace(lambda x: jnp.dot(x, x, precision="highest"), S((4, 4), F32))
    assert jaxpr.flops(exact) == {"float32 highest": 2 * 4**3}


def test_peak_of_fused_chains_products_and_loops():
    x, kib = S((16, 16), F32), 1024
    assert jaxpr.peak(jaxpr.trace(lambda x: jnp.exp(x) * 2 + 1, x)) == kib  # one kernel, one result
    assert jaxpr.peak(jaxpr.trace(lambda x: jnp.exp(x) @ x, x)) == 2 * kib  # the operand is written
    assert jaxpr.peak(jaxpr.trace(lambda x: ((x @ x) @ x) @ x, x)) == 2 * kib  # the first is freed

    def stacked(x):
        return jax.lax.scan(lambda c, _: (c @ c, c), x, None, length=10)

    assert jaxpr.peak(jaxpr.trace(stacked, x)) == (10 + 1 + 1) * kib  # what it stacks, its carry, and the next one


def test_peak_of_training_counts_residuals_and_less_of_them_with_remat():
    def loss(w, x, block):
        return jnp.sum(jax.lax.scan(lambda x, _: (block(x, w), None), x, None, length=20)[0])

    def block(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    plain, again = (
        jaxpr.peak(jaxpr.trace(jax.grad(lambda w, x, f=f: loss(w, x, f)), S((8, 8), F32), S((1024, 8), F32)))
        for f in (block, jax.checkpoint(block))
    )
    state = 1024 * 8 * 4
    assert 20 * state < again < 30 * state < 40 * state < plain


# --- FLUX.1-dev -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_parameters_and_bytes(planned):
    found = planned.sizes
    assert shapes.parameters(found.frozen.base) == 11_901_408_320
    assert shapes.parameters(found.frozen.vae) == 49_545_475
    assert shapes.parameters(shapes.blank(planned.cfg, found).lora) == 37_355_520
    assert {name: shapes.parameters(x) for name, x in found.text.items()} == {"clip": 123_060_480, "t5": 4_762_310_656}
    assert shapes.parameters(found.frozen.rewards["clipscore"]) == 427_616_513
    use = by_stage(planned)["explore"]
    assert use.weights == 2 * 11_901_408_320 + 4 * (49_545_475 + 427_616_513)
    assert use.adapters == pytest.approx(5 * 4 * 37_355_520, abs=100)  # current, old, average and two moments
    assert use.merged == 2 * (19 * 4 + 38 * 3) * 3072**2
    low = sum(u.weights for u in coverage.uses(found.model, "fp8") if u.quantised)
    assert use.quantised == pytest.approx(low, rel=1e-6) == pytest.approx(8.60e9, rel=1e-2)


@pytest.mark.slow
def test_rewards_that_are_not_here_have_their_public_sizes(planned):
    cfg = dataclasses.replace(planned.cfg, reward="pickscore:1,hpsv2:0.5", evaluate=Evaluate(rewards="clipscore"))
    found = shapes.read(cfg, 1)
    assert {name: shapes.parameters(x) for name, x in found.frozen.rewards.items()} == {
        "pickscore": 986_109_441,
        "hpsv2": 986_109_441,
    }
    assert {name: shapes.parameters(x) for name, x in found.towers.items()} == {"clipscore": 427_616_513}
    assert {name: x["ids"].shape for name, x in found.prompts.tokens.items()} == {
        "pickscore": (48, 77),
        "hpsv2": (48, 77),
    }
    assert sum("has its public sizes here" in note for note in found.notes) == 3


def test_imagereward_without_its_weights(planned):
    """The vision is .12 TFLOP an image, the text that looks at it .016 more."""
    found = shapes.read(dataclasses.replace(planned.cfg, reward="imagereward"), 1)
    params, reward = found.frozen.rewards["imagereward"], found.score.rewards[0]
    assert shapes.parameters(params) == 446_206_689
    tokens = found.prompts.tokens["imagereward"]
    assert {name: x.shape for name, x in tokens.items()} == {"ids": (48, 35), "mask": (48, 35)}
    program = jaxpr.trace(reward.score, params, S((24, 512, 512, 3), F32), shapes.batch(tokens, 1))
    found = jaxpr.flops(program)
    assert found["bfloat16"] / 3 + found["float32 highest"] == pytest.approx(24 * 0.139e12, rel=0.03)


def test_what_rewards_cost_by_dtype(planned):
    """An image through ViT-H/14 takes .32 TFLOP; in float32 its blocks' products are bf16 ones of three times the
    depth, and 4 % stay: attention, patches, and the text."""
    flops = {}
    for dtype in ("float32_exact", "float32", "bfloat16"):
        cfg = dataclasses.replace(planned.cfg, reward="pickscore", reward_dtype=dtype)
        found = shapes.read(cfg, 1)
        images, tokens = S((24, 512, 512, 3), F32), shapes.batch(found.prompts.tokens["pickscore"], 1)
        program = jaxpr.trace(found.score.rewards[0].score, found.frozen.rewards["pickscore"], images, tokens)
        flops[dtype] = jaxpr.flops(program)
    exact = flops["float32_exact"]["float32 highest"]
    assert exact == flops["float32_exact"].total() == pytest.approx(24 * 0.335e12, rel=0.03)
    blocks = 24 * 32 * 257 * 24 * 1280**2
    assert flops["float32"] == {"bfloat16": 3 * blocks, "float32 highest": exact - blocks}
    assert blocks == pytest.approx(0.95 * exact, rel=0.02)
    assert flops["bfloat16"].total() == exact
    half = sum(n for dtype, n in flops["bfloat16"].items() if dtype.startswith("bfloat16"))
    assert half > 0.98 * flops["bfloat16"].total()


def test_flops(planned):
    flops = plan.per_image_flops(planned.sizes)
    assert flops["forward"].total() == pytest.approx(15.8125e12, rel=1e-4)  # as torch's FlopCounterMode has it
    assert flops["decode"].total() == pytest.approx(2.133e12, rel=1e-3)  # 2.515e12 with up-sampling in two steps
    linears = sum(u.flops for u in coverage.uses(planned.sizes.model, "fp8"))
    assert linears == pytest.approx(14.883e12, rel=1e-4)
    stages = by_stage(planned)
    images, kept = 48 * 96, 48 * 24
    explore = stages["explore"].flops
    pairs = 24 * 257 * 24 * 1024**2  # an image's products in CLIP's blocks, which are bf16 ones three times as deep
    assert explore["float8_e4m3fn"] + explore["bfloat16"] == pytest.approx(
        images * (6 * 15.8125e12 + 3 * pairs), rel=1e-3
    )
    regenerate = stages["regenerate"].flops["bfloat16"]
    assert regenerate == pytest.approx(kept * (10 * 15.8125e12 + 3 * pairs), rel=1e-3)
    # The decoder, in float32 here, and the reward.
    assert stages["explore"].flops["float32 highest"] == pytest.approx(images * (2.133e12 + 0.163e12 - pairs), rel=1e-3)
    # Three forwards, one for the gradients of activations, and what remat runs again: no gradient of a base kernel.
    forwards = stages["learn"].flops["bfloat16"] / (kept * 6 * 15.8125e12)
    assert 4.3 < forwards < 5.2


def test_memory_of_the_stages(planned):
    """GB on one H100; text encoders only while they encode."""
    total = {name: use.total / 1e9 for name, use in by_stage(planned).items()}
    assert not planned.advice and all(use.total < plan.room(plan.CARDS["H100 80GB"]) for use in planned.uses)
    assert 35 < total["encode"] < 39 and 35 < total["quantise"] < 42
    assert 35 < total["explore"] < 60 and 30 < total["regenerate"] < 52 and 30 < total["learn"] < 45
    staying = sizes_with(planned, encode_ahead=0, stage="learn")
    assert staying.weights - by_stage(planned)["learn"].weights == 2 * (123_060_480 + 4_762_310_656)


def sizes_with(planned, stage, **changes):
    cfg = dataclasses.replace(planned.cfg, **changes)
    return plan.use_of(stage, cfg, plan._like(planned.sizes, cfg, planned.cfg), 1, plan.CARDS["H100 80GB"])


@pytest.mark.slow
def test_a_branch_has_its_own_steps_and_states(planned):
    """5 steps and 4 for 6 and 10; the kept candidates' states, x and one x0hat each, lie beside both rollouts."""
    cfg, stages = planned.cfg, by_stage(planned)
    changes = {"explore": dataclasses.replace(cfg.explore, steps=5), "branch": config.Branch(3, 4)}
    found = {name: sizes_with(planned, name, **changes) for name in ("explore", "regenerate", "watch")}
    branch = dataclasses.replace(cfg, **changes)
    states = shapes.states(branch, planned.sizes, cfg.prompts, cfg.kept)
    assert plan.nbytes(states) == 2 * 4 * 48 * 24 * 64 * 64 * 16
    assert shapes.states(cfg, planned.sizes, cfg.prompts, cfg.kept) is None
    forward = plan.per_image_flops(planned.sizes)["forward"].total()
    for name, images, fewer in (("explore", 48 * 96, 6 - 5), ("regenerate", 48 * 24, 10 - 4)):
        less = stages[name].flops.total() - found[name].flops.total()
        assert less == pytest.approx(images * fewer * forward, rel=0.01)
    assert found["regenerate"].activations > stages["regenerate"].activations + 0.9 * plan.nbytes(states)
    # Previews, all finished from their states, and all from the noise: 5 + 2 + 10 + 4 - 2 steps for 6 + 10.
    assert found["watch"].flops.total() > 1.1 * stages["watch"].flops.total()


def test_less_at_a_time_takes_less(planned):
    stages = by_stage(planned)
    half = sizes_with(planned, "explore", explore=dataclasses.replace(planned.cfg.explore, chunk=12))
    # Not half: the largest thing is the decode, of 8 pictures at a time or 6.
    assert half.activations < 0.8 * stages["explore"].activations
    assert half.flops == pytest.approx(stages["explore"].flops, rel=0.01)
    stored = sizes_with(planned, "learn", model=dataclasses.replace(planned.cfg.model, remat=False))
    assert stored.activations > 3 * stages["learn"].activations and stored.flops.total() < stages["learn"].flops.total()


def test_seconds():
    card = plan.CARDS["H100 80GB"]
    work = jaxpr.Counter({"bfloat16": 989 * 10**12})
    assert cards.seconds(work, card) == pytest.approx(1 / 0.6) and cards.seconds(work, card, 8) == pytest.approx(
        0.125 / 0.6
    )
    assert cards.seconds(jaxpr.Counter({"float32": 989 * 10**12}), card) == pytest.approx(2 / 0.6)


@pytest.mark.slow
def test_emulation_and_devices_change_seconds_not_work(planned):
    bf16, low = (
        sizes_with(planned, "explore", explore=Stage(steps=6, precision=p)) for p in ("bf16", "nvfp4_emulated")
    )
    fp8 = by_stage(planned)["explore"]
    assert fp8.flops.total() == pytest.approx(bf16.flops.total(), rel=1e-2)
    assert fp8.seconds < 0.7 * bf16.seconds  # decoding in float32 is a third of it
    assert low.seconds == pytest.approx(bf16.seconds / 0.8, rel=1e-2) and low.flops == pytest.approx(
        bf16.flops, rel=1e-2
    )
    cfg = planned.cfg
    eight = plan.use_of("regenerate", cfg, shapes.read(cfg, 8), 8, plan.CARDS["H100 80GB"])
    one = by_stage(planned)["regenerate"]
    assert eight.flops == one.flops and eight.seconds == pytest.approx(one.seconds / 8)
    kept = plan.nbytes(
        shapes.samples(cfg, planned.sizes, cfg.prompts, cfg.kept)
    )  # the prompts are shared, and so their samples
    assert one.total - eight.total == pytest.approx(kept * 7 / 8, rel=1e-6)


# --- what comes once in many iterations -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_measurement_and_evaluation_are_counted(planned):
    """4 prompts of 96 candidates in 6 and in 10 steps; 16 pictures in 28 steps. A 20th of each is in an iteration."""
    stages, forward, decode = by_stage(planned), 15.8125e12, 2.133e12
    assert list(stages)[-2:] == ["watch", "evaluate"]
    assert stages["watch"].flops.total() == pytest.approx(4 * 96 * (16 * forward + 2 * decode), rel=2e-2)
    assert stages["evaluate"].flops.total() == pytest.approx(16 * (28 * forward + decode), rel=2e-2)
    each = sum(stages[name].seconds for name in ("encode", "quantise", "explore", "regenerate", "learn"))
    rare = stages["watch"].seconds + stages["evaluate"].seconds
    assert plan.spent(planned.uses) == pytest.approx(each + rare / 20) and rare > 100
    assert stages["watch"].quantised == stages["explore"].quantised and stages["evaluate"].merged == 0
    never = config.override(planned.cfg, **{"watch.every": "0", "evaluate.every": "0"})
    found = plan.uses_of(never, planned.sizes, 1, plan.CARDS["H100 80GB"])
    assert [use.stage for use in found] == ["encode", "quantise", "explore", "regenerate", "learn"]


@pytest.mark.slow
def test_a_watch_of_a_lowered_chunk_takes_what_that_takes(planned):
    low = config.override(planned.cfg, **{"explore.chunk": "4", "regenerate.chunk": "4"})
    full, less = by_stage(planned)["watch"], plan.use_of("watch", low, planned.sizes, 1, plan.CARDS["H100 80GB"])
    assert less.activations < 0.6 * full.activations and less.flops == pytest.approx(full.flops, rel=0.02)
    eight = plan.use_of("watch", planned.cfg, shapes.read(planned.cfg, 8), 8, plan.CARDS["H100 80GB"])
    assert eight.flops.total() == pytest.approx(2 * full.flops.total(), rel=1e-3)  # 4 prompts are 8 there


@pytest.mark.slow
def test_an_evaluation_that_does_not_fit_is_refused_before_the_run(planned, monkeypatch):
    """2048 pictures at a time; with the chunk that does fit."""
    cfg = config.override(planned.cfg, **{"evaluate.chunk": "2048", "evaluate.images": "128"})
    use = plan.use_of("evaluate", cfg, planned.sizes, 1, plan.CARDS["H100 80GB"])
    assert use.activations > 8 * by_stage(planned)["evaluate"].activations
    monkeypatch.setattr(plan, "stages_of", lambda _: ("evaluate",))  # the others are not asked about again
    with pytest.raises(ConfigError, match=r"too small: evaluate does not fit: .* with --config.evaluate.chunk=\d+"):
        plan.settled(cfg, 1, plan.room(plan.CARDS["H100 80GB"]))
    both = [("explore.chunk", "12"), ("regenerate.chunk", "12"), ("explore.chunk", "8"), ("regenerate.chunk", "8")]
    assert [x for x in plan.remedies("watch", planned.cfg) if x[0].endswith("chunk")][:4] == both
    assert ("evaluate.chunk", "1024") in plan.remedies("evaluate", cfg)


# --- advice ---------------------------------------------------------------------------------------------------------


def card_without(use, share):
    """A card that holds all of a stage but the given share of its activations."""
    return plan.Card((use.total - share * use.activations) / cards.USABLE / 2**30, 989, 9.0)


@pytest.mark.slow
def test_advice_names_the_field_to_change(planned):
    def advice(stage, share):
        use = by_stage(planned)[stage]
        return plan.advise(use, planned.cfg, planned.sizes, 1, card_without(use, share))

    assert advice("explore", 0.3).endswith("--config.explore.chunk=4")
    assert advice("encode", 1.01).endswith("lora.rank=32, reward (without clipscore: -1.7 GB)")
    assert advice("encode", 9.0).endswith(" GB. Use more cards (--devices), or a larger card")  # these do not cover it


@pytest.mark.slow
def test_a_gpu_that_is_too_small_is_refused_before_anything_is_read(planned, tmp_path, monkeypatch):
    """With the plan's numbers; an estimate that is a little over the room is let through, as it may be too high."""
    largest = max(planned.uses, key=lambda use: use.total)
    assert plan.settled(planned.cfg, 1, plan.room(card_without(largest, 0.25))) == (planned.cfg, [])
    with pytest.raises(
        ConfigError, match=r"too small: explore does not fit: \d+\.\d of \d+\.\d GB; it fits \(.*chunk="
    ):
        plan.settled(planned.cfg, 1, plan.room(card_without(largest, 0.5)))
    monkeypatch.setattr("solrl_jax.run.assemble.capability", lambda: 9.0)
    monkeypatch.setattr(plan, "memory_limit", lambda: 24e9)
    with pytest.raises(ConfigError, match=r"too small: encode does not fit: .* of 24.0 GB"):
        train.train(planned.cfg, tmp_path / "run", devices=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090 24GB"),
        ("NVIDIA L40S", "L40S 48GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada 48GB"),
        ("NVIDIA GeForce RTX 3060", None),
        ("NVIDIA RTX A5000", None),
        ("NVIDIA L40", None),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(monkeypatch, kind, name):
    device = types.SimpleNamespace(device_kind=kind, memory_stats=lambda: {"bytes_limit": 10e9})
    monkeypatch.setattr(cards.jax, "local_devices", lambda: [device])
    found = plan.device_card()
    assert found is None if name is None else found is not None and found[1:] == plan.CARDS[name][1:]
    assert found is None or plan.room(found) == pytest.approx(10e9)


def test_remedies_come_cheapest_in_time_first(planned):
    cfg = dataclasses.replace(planned.cfg, encode_ahead=0, model=dataclasses.replace(planned.cfg.model, remat=False))
    assert list(plan.remedies("encode", cfg)) == [] and list(plan.remedies("quantise", cfg)) == [("encode_ahead", "20")]
    assert list(plan.remedies("learn", cfg))[:4] == [
        *(("encode_ahead", "20"), ("model.remat", "true"), ("learn.micro_batch", "6"), ("learn.micro_batch", "4")),
    ]
    assert [int(size) for _, size in plan.remedies("regenerate", planned.cfg)] == [12, 8, 6, 4, 3, 2, 1]


def test_report_of_a_card_that_is_too_small(planned):
    lines = plan.report(planned._replace(card="RTX 4090 24GB", advice=("explore does not fit: ...",)))
    text = "\n".join(lines)
    assert "11,901,408,320 parameters, 23.8 GB" in text and "forward 15.81" in text and " over " in text
    assert lines[-1] == "explore does not fit: ..." and "at 60% of the bf16 peak" in text


@pytest.mark.parametrize(("advice", "code"), [((), 0), (("explore does not fit: ...",), 1)])
def test_what_does_not_fit_ends_with_1(planned, monkeypatch, capsys, advice, code):
    monkeypatch.setattr(plan, "plan", lambda *_: planned._replace(advice=advice))
    assert plan.run_plan(planned.cfg) == code
    assert ("fits H100 80GB" in capsys.readouterr().out) == (not advice)


def test_large_numbers_of_the_report_have_no_exponents(planned):
    """479,700 TFLOP in 1,640 s and 137 h, not 4.797e+05 in 1.64e+03."""
    learn = next(use for use in planned.uses if use.stage == "learn")
    large = learn._replace(flops=Counter(bf16=479_700 * 10**12), seconds=1640.4)
    lines = plan.report(planned._replace(uses=(large,)))
    (row,) = (line for line in lines if line.startswith("learn "))
    assert row.split()[-2:] == ["479,700", "1,640"] and not any("e+0" in line for line in lines)
    iterations = planned.cfg.iterations
    assert f"an iteration: 1,640 s, {iterations} of them {iterations * 1640.4 / 3600:.0f} h" in lines
    assert [plan._short(x) for x in (0.003091, 18.46, 99.96, 632.4)] == ["0.00309", "18.5", "100", "632"]


@pytest.mark.parametrize("plugin", ["json", "no_such_plugin"])
def test_the_report_says_whether_a_gpu_was_traced(planned, monkeypatch, plugin):
    monkeypatch.setattr(plan, "per_image_flops", lambda sizes: {})
    monkeypatch.setattr(plan, "_covered", lambda *_: [])
    monkeypatch.setattr(jaxpr, "CUDA", (plugin,))
    notes = [line for line in plan.report(planned) if "there is no CUDA plugin here" in line]
    assert len(notes) == (plugin != "json") and all("unfused attention" in line for line in notes)


def test_a_reward_that_is_here_has_its_own_sizes(planned, tmp_path, monkeypatch):
    """In a folder, and by its name in the hub's cache; the public model's where there is neither."""
    root, commit = tmp_path / "models--org--clip", "a" * 40
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 1000}}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def read(path):
        found = shapes.read(dataclasses.replace(planned.cfg, reward_paths=(f"clipscore={path}",)), 1)
        return shapes.parameters(found.frozen.rewards["clipscore"]), [n for n in found.notes if "clipscore" in n]

    small = 151_277_313 - (49_408 - 1000) * 512  # transformers' default CLIP is ViT-B/32, here with fewer words
    assert read(snapshot) == read("org/clip") == (small, [])
    note = "reward clipscore has its public sizes here, openai/clip-vit-large-patch14's: nothing is at reward_paths="
    assert read("org/other") == (427_616_513, [f"{note}clipscore=org/other"])
    assert read("openai/clip-vit-large-patch14") == (427_616_513, [])  # they are its own


# --- the command ----------------------------------------------------------------------------------------------------


def command(*words):
    with flagsaver.flagsaver():
        return main.main(main.parse(["solrl_jax", "--mode=plan", *words]))


@pytest.mark.slow
def test_plan_of_the_small_world(capsys, monkeypatch):
    monkeypatch.setattr(jax, "device_put", None)  # nothing is placed
    assert command("--config=tiny") == 0
    out = capsys.readouterr().out
    assert "tiny at 32 px on 1 x H100 80GB" in out and "fits H100 80GB" in out.splitlines()[-1]
    assert [line.split()[0] for line in out.splitlines() if " fits " in line] == [
        *("encode", "quantise", "explore", "regenerate", "learn", "watch", "evaluate")
    ]
    assert "evaluate: at the start and every 20 iterations; an iteration's time has its share\n" in out


def test_what_is_wrong_is_said(capsys):
    assert command("--config=tiny", "--card=H100") == 2
    assert "--card=H100: use one of H100 80GB, H200 141GB, A100 80GB" in capsys.readouterr().err
    assert command("--config=tiny", "--devices=3") == 2
    assert "prompts=16 do not divide over 3 devices" in capsys.readouterr().err
    assert command("--config=tiny", "--config.model.path=nowhere") == 2
    assert "nowhere" in capsys.readouterr().err


def test_flux_dev_that_is_not_here_has_its_public_sizes(planned, capsys, monkeypatch):
    def on_folder(cfg, devices, card):
        assert flux.FluxConfig.read(f"{cfg.model.path}/transformer") == flux.FluxConfig()
        return planned

    monkeypatch.setattr(plan, "plan", on_folder)
    model = dataclasses.replace(planned.cfg.model, path="black-forest-labs/FLUX.1-dev")
    assert plan.run_plan(dataclasses.replace(planned.cfg, model=model)) == 0
    out = capsys.readouterr().out
    assert "FLUX.1-dev with its public sizes" in out and out.endswith("fits H100 80GB\n")


@pytest.mark.slow
def test_paths_of_grpo_are_counted(planned):
    """Flow-GRPO's samples come with T + 1 states each: f32, as large as their latents."""
    cfg = config.override(
        planned.cfg,
        explore="none",
        **{"regenerate.solver": "sde", "regenerate.eta": "0.9", "learn.algorithm": "flow_grpo"},
        **{"candidates": str(planned.cfg.kept), "selection": "all"},
    )
    plain = shapes.samples(planned.cfg, planned.sizes, cfg.prompts, cfg.kept)
    found = shapes.samples(cfg, planned.sizes, cfg.prompts, cfg.kept)
    assert found.path is not None and found.path.states.shape[2] == cfg.regenerate.steps
    assert plain.x0 is not None
    extra = cfg.regenerate.steps * plan.nbytes(plain.x0) + 4 * plain.x0.shape[0] * plain.x0.shape[1]
    assert plan.nbytes(found) - plan.nbytes(plain) == extra
    use = plan.use_of("learn", cfg, planned.sizes, 1, plan.CARDS["H100 80GB"])
    assert use.activations > plan.nbytes(found)
    # All candidates are drawn with their paths before some are kept.
    wide = config.override(cfg, **{"candidates": str(4 * cfg.kept), "selection": "best_worst"})
    few, many = (plan.use_of("regenerate", c, planned.sizes, 1, plan.CARDS["H100 80GB"]) for c in (cfg, wide))
    assert many.activations - few.activations >= 3 * plan.nbytes(found)
