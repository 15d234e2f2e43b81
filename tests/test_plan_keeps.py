"""What the plan lets the backward pass keep, where model.remat_keeps is auto."""

import dataclasses
from collections import Counter

import pytest

from solrl_jax import config, device, plan, train
from solrl_jax.plan import cards, shapes
from solrl_jax.run import assemble, checkpoint
from tests import nano

CARD = plan.Card(80, 989, 9.0)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder, low = tmp_path_factory.mktemp("nano"), config.Stage(steps=2, precision="bf16", chunk=4)
    return config.override(nano.build(folder, explore=low), **{"model.remat": "true", "model.remat_keeps": "auto"})


@pytest.fixture
def learning(monkeypatch):
    """A training is planned by its learning alone."""
    monkeypatch.setattr(plan, "stages_of", lambda cfg: ("learn",))


def keeping(cfg, names):
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat_keeps=names))


@pytest.fixture(scope="module")
def uses(cfg):
    """{what is kept: the learning's Use}, each of a config that says it."""
    some = {keeps: keeping(cfg, keeps) for keeps in plan.KEEPS}
    return {keeps: plan.use_of("learn", one, shapes.read(one, 1), 1, CARD) for keeps, one in some.items()}


@pytest.mark.slow
def test_what_is_kept_costs_memory_and_saves_work(uses):
    memory, work = zip(*((use.total, use.flops.total()) for use in uses.values()), strict=True)
    assert list(memory) == sorted(memory, reverse=True) and len(set(memory)) >= 2
    assert list(work) == sorted(work) and work[0] < work[-1]


@pytest.mark.parametrize("which", range(4))
def test_the_most_that_fits_is_kept(cfg, monkeypatch, learning, which):
    """With SLACK for what the plan may be too low; a byte less, and it is the next; at last nothing, even so."""
    memory = dict(zip(plan.KEEPS, (8, 6, 4, 2), strict=True))

    def use_of(stage, cfg, sizes, devices, card):
        keeps = cfg.model.remat_keeps
        assert sizes.model == assemble.model_module(cfg).make(cfg.model)
        return plan.Use(stage, memory.get(keeps, 2) * 10**9, 0, 0, 0, 10**9, Counter(), 1.0)

    monkeypatch.setattr(plan, "use_of", use_of)
    keeps, room = plan.KEEPS[which], plan.room(CARD)
    use = use_of("learn", keeping(cfg, keeps), shapes.read(keeping(cfg, keeps), 1), 1, CARD)
    need = use.total + cards.SLACK * use.activations
    found, said = plan.settled(cfg, 1, need + 1)
    assert found == dataclasses.replace(keeping(cfg, keeps), shard=1)
    told = f"learn takes about {plan._gb(use.total)} of {plan._gb(need + 1)} GB"
    named = ",".join(keeps) or " (nothing)"
    assert said == [f"model.remat_keeps={named}, which auto comes to: {told}"]
    below, _ = plan.settled(cfg, 1, need - 1)
    assert below.model.remat_keeps == plan.KEEPS[min(which + 1, 3)]
    assert plan.settled(keeping(cfg, keeps), 1, room)[0].model.remat_keeps == keeps  # as it was asked for


def test_where_there_is_nothing_to_choose(cfg, learning, monkeypatch):
    """Without remat all is kept already; a CPU has no limit, a drawing no backward pass: there auto stays, which is
    nothing. A GPU without a limit says so."""
    room = plan.room(CARD)
    plain = config.override(cfg, **{"model.remat": "false"})
    assert plan.settled(plain, 1, room) == (dataclasses.replace(plain, shard=1), [])
    assert plan.settled(cfg, 1, None) == (dataclasses.replace(cfg, shard=1), [])
    monkeypatch.setattr(device, "platform", lambda: "gpu")
    found, (said,) = plan.settled(cfg, 1, None)
    assert found.model.remat_keeps == config.AUTO and "does not tell its memory, so nothing is kept" in said
    assert plan.settled(plain, 1, None)[1] == []
    monkeypatch.undo()
    drawing, said = plan.settled(cfg, 1, room, stages=plan.DRAWING)
    assert drawing.model.remat_keeps == config.AUTO and said == []


@pytest.mark.slow
def test_auto_where_no_plan_is_asked_keeps_nothing(cfg, uses):
    use = plan.use_of("learn", cfg, shapes.read(cfg, 1), 1, CARD)
    assert use == uses[()]


def test_the_plan_shows_its_choice(cfg, monkeypatch):
    monkeypatch.setattr(plan, "stages_of", lambda cfg: ("encode", "learn"))
    found = plan.plan(cfg, 1, "H100 80GB")
    assert found.cfg.model.remat_keeps == plan.KEEPS[0]
    assert found.sizes.model == assemble.model_module(found.cfg).make(found.cfg.model)
    assert [use.stage for use in found.uses] == ["encode", "learn"]
    assert any(line.startswith("model.remat_keeps=attention,qkv,mlp, which auto") for line in plan.report(found))


@pytest.mark.slow
def test_a_run_says_what_it_keeps_and_stays_auto(cfg, uses, tmp_path, monkeypatch, capsys, learning):
    """A resume with less memory keeps less, and its config is still auto."""
    once = config.override(cfg, **{"iterations": "1", "evaluate.every": "0"})
    for iterations, keeps, resume in (("1", plan.KEEPS[0], False), ("2", plan.KEEPS[1], True)):
        need = uses[keeps].total + cards.SLACK * uses[keeps].activations
        monkeypatch.setattr(plan, "memory_limit", lambda need=need: need + 1)
        longer = config.override(once, iterations=iterations)
        assert train.train(longer, tmp_path / "run", resume=resume, devices=1) == 0
        assert f"model.remat_keeps={','.join(keeps)}, which auto comes to" in capsys.readouterr().out
        assert checkpoint.load_config(tmp_path / "run").model.remat_keeps == config.AUTO


def test_processes_choose_by_the_least_memory():
    assert assemble.least_of(["24.5", "null", "23.0"]) == "23.0"
    assert assemble.least_of(["null", "null"]) == "null"  # CPUs
