"""Guidance in a training: which weights go together, and that the policy which learns is the guided one."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from solrl_jax import algos, config, guidance, iteration, learn, lora, plan, rollout, sharding, train
from solrl_jax.config import Branch, Config, ConfigError, Learn, Lora, Stage
from solrl_jax.models import sd35
from solrl_jax.plan import jaxpr, shapes
from solrl_jax.quant import calibrate
from solrl_jax.report import run as reports
from solrl_jax.run import assemble, checkpoint, guards, model_card, pictures
from solrl_jax.run.encode import Conditioner
from solrl_jax.structs import Hyper, Points
from solrl_jax.weights import lora_files
from tests import nano, nano_sd35, toy_world
from tests.test_guidance import linear
from tests.test_lora import drawn
from tests.toy_world import metrics_of

pytestmark = pytest.mark.usefixtures("compiled")

# --- which weights go together --------------------------------------------------------------------------------------


def weighed(explore=0.0, regenerate=0.0, loss=0.0, kl=0.0, *, algorithm="nft", branch=None, **values) -> Config:
    """A config of those weights; 0: not given."""
    steps = {"solver": "sde", "eta": 0.9} if algorithm.endswith("grpo") else {}
    return Config(
        explore=None if steps else Stage(6, "dpm2", guidance=float(explore)),
        regenerate=Stage(**{"steps": 10, "guidance": float(regenerate), **steps}),
        branch=branch,
        learn=Learn(
            algorithm=algorithm,
            guidance=float(loss),
            kl_guidance=float(kl),
            **{"timestep_fraction": 0.4, **values},
        ),
    )


ALL = {"explore.guidance": 4, "regenerate.guidance": 4, "learn.guidance": 4, "learn.kl_guidance": 4}


def test_a_weight_that_is_not_given_is_the_one_before_it():
    """One word guides everything; each other word changes what follows it."""
    assert guidance.weights(Config()) == (1, 1, 1, 1)
    assert guidance.weights(weighed(regenerate=4)) == (4, 4, 4, 4)
    assert guidance.weights(weighed(explore=1, regenerate=4)) == (1, 4, 4, 4)
    assert guidance.weights(weighed(regenerate=4, loss=1)) == (4, 4, 1, 1)
    assert guidance.weights(weighed(kl=4)) == (1, 1, 1, 4)
    assert guidance.weights(weighed(explore=3)) == (3, 1, 1, 1)  # refused with an embedded weight
    assert guidance.evaluated(weighed(regenerate=4)) == 4
    assert [stage.guidance for _, stage, _ in weighed(regenerate=4).stages()] == [4, 4]


@pytest.mark.parametrize("kind", ["cfg", "embedded"])
@pytest.mark.parametrize("algorithm", ["nft", "awm", "flow_grpo", "dance_grpo"])
def test_what_is_principled_runs_in_silence(kind, algorithm):
    model = linear(kind)
    assert guidance.check_training(weighed(algorithm=algorithm), model) == []
    assert guidance.check_training(weighed(regenerate=4, algorithm=algorithm), model) == []
    if algorithm in ("nft", "awm"):
        assert guidance.check_training(weighed(kl=4, algorithm=algorithm, kl_weight=0.1), model) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"regenerate": 4, "loss": 1}, "drawn at guidance 4 and the loss is of velocities at 1: it improves another"),
        ({"explore": 1, "regenerate": 4}, "the preview is at guidance 1, the samples at 4: from one noise they draw"),
        ({"kl": 4}, "learn.kl_guidance=4 with learn.guidance=1: learn.kl_weight=0.0001 hardly pulls"),
    ],
)
def test_what_is_warned_of(given, message):
    (said,) = guidance.check_training(weighed(**given), linear())
    assert message in said
    assert f"warning: {said}" in guidance.told(weighed(**given), linear())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"regenerate": 4, "loss": 1, "algorithm": "flow_grpo"},
            "learn.guidance=1 with regenerate.guidance=4: learn.algorithm=flow_grpo takes the probability of the steps",
        ),
        (
            {"loss": 4, "algorithm": "dance_grpo"},
            "learn.guidance=4 with regenerate.guidance=1: learn.algorithm=dance_grpo takes the probability",
        ),
        ({"loss": 4}, "learn.guidance=4 with regenerate.guidance=1: no policy draws so or did"),
        ({"regenerate": 4, "loss": 2}, "learn.guidance=2 with regenerate.guidance=4: no policy draws so or did"),
        (
            {"regenerate": 4, "kl": 2},
            "learn.kl_guidance=2 with learn.guidance=4: the penalty would be that of a",
        ),
        (
            {"regenerate": 4, "kl": 1},
            "learn.kl_guidance=1 with learn.guidance=4: the penalty would be that of a",
        ),
        ({"kl": 4, "kl_weight": 0.0}, "learn.kl_guidance=4 with learn.guidance=1 has no effect"),
        (
            {"regenerate": 4, "loss": 1, "advantage_mode": "positive_only"},
            "learn.advantage_mode=positive_only: guided samples that all count as good are distilled",
        ),
        ({"regenerate": 4, "loss": 1, "advantage_mode": "one_only"}, "learn.advantage_mode=one_only: guided samples"),
        (
            {"kl": 4, "algorithm": "vgrpo", "kl_weight": 0.1, "updates": 2},
            "learn.kl_guidance=4 with learn.guidance=1 has no effect: learn.algorithm=vgrpo has no reference",
        ),
        ({"kl": 4, "algorithm": "dance_grpo", "kl_weight": 0.1}, "learn.algorithm=dance_grpo has no reference"),
        (
            {"kl": 4, "algorithm": "flow_grpo", "kl_weight": 0.1},
            "learn.algorithm=flow_grpo compares the means of a step",
        ),
        (
            {"explore": 1, "regenerate": 4, "branch": Branch()},
            "explore.guidance=1 with regenerate.guidance=4: a branch",
        ),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(ConfigError) as e:
        guidance.check_training(weighed(**given), linear())
    assert str(e.value).startswith(message) or message in str(e.value)


def test_an_embedded_weight_is_free_of_some_rules():
    """A reference at another weight is one more number of the network's; a preview at another saves nothing."""
    assert guidance.check_training(weighed(regenerate=4, kl=2), linear("embedded")) == []
    with pytest.raises(ConfigError, match=r"explore.guidance=1 with regenerate.guidance=4: this toy takes guidance as"):
        guidance.check_training(weighed(explore=1, regenerate=4), linear("embedded"))
    for given in ({"regenerate": 4}, {"kl": 4, "kl_weight": 0.1}, {"explore": 2}):
        with pytest.raises(ConfigError, match="this toy takes no guidance"):
            guidance.check_training(weighed(**given), linear("none"))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"regenerate": 4}, "regenerate.guidance"),
        ({"explore": 4}, "explore.guidance"),
        ({"loss": 4}, "learn.guidance"),
        ({"kl": 4}, "learn.kl_guidance"),
    ],
)
def test_the_weight_that_was_given_is_named(given, name):
    """Not one that follows it: the user would not find it in the command."""
    with pytest.raises(ConfigError, match=f"^{name}=4: this toy takes no guidance"):
        guidance.check_training(weighed(**given), linear("none"))
    if name == "regenerate.guidance":  # of which an evaluation takes its own
        with pytest.raises(ConfigError, match=f"^{name}=4: this toy takes no guidance"):
            guidance.check(weighed(**given), linear("none"))


def test_a_run_of_a_version_that_wrote_1_goes_on():
    """1 and 0, which is not given, are the same training; any other difference is one."""
    written = weighed(explore=1, regenerate=1)
    assert checkpoint.forbidden(written, weighed()) == "" == checkpoint.forbidden(weighed(), written)
    assert checkpoint.forbidden(weighed(regenerate=4), weighed(explore=4, regenerate=4, loss=4)) == ""
    changed = checkpoint.forbidden(written, weighed(regenerate=4))
    assert changed == "explore.guidance is 1.0 there and 0.0 here; regenerate.guidance is 1.0 there and 4.0 here"
    assert checkpoint.forbidden(weighed(explore=3), weighed()) != ""


@pytest.mark.parametrize("name", ["explore.guidance", "regenerate.guidance", "learn.guidance", "learn.kl_guidance"])
@pytest.mark.parametrize("value", ["0.5", "-1", "nan", "inf"])
def test_no_weight_below_1(name, value):
    with pytest.raises(ConfigError, match=r"guidance=.*: 1 \(none\) or a finite number above it, or 0"):
        config.override(Config(), **{name: value})


# --- the policy that learns is the guided one -----------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """toy_world's, which is guided; its own weight is 3."""
    monkeypatch.setattr(toy_world, "TOY", toy_world.TOY._replace(guidance="cfg", guided=3.0))
    return toy_world.world(monkeypatch, tmp_path)


def program(cfg):
    """The whole iteration's operations."""
    parts = train.ready(assemble.assemble(cfg, 1))
    statics = {"model": parts.model, "score": parts.score, "optimizer": parts.optimizer, "cfg": cfg}
    with jax.set_mesh(parts.mesh):
        state = assemble.fresh(parts)
        prompts = assemble.encode(parts, [f"prompt {i}" for i in range(cfg.prompts)], parts.score)
        return str(jax.make_jaxpr(functools.partial(iteration.iteration_step, **statics))(state, parts.frozen, prompts))


def test_a_weight_of_1_is_the_program_without_guidance(toy):
    plain = program(toy)
    assert program(config.override(toy, **dict.fromkeys(ALL, "1"))) == plain
    assert program(config.override(toy, **{"regenerate.guidance": "2"})) != plain
    assert program(config.override(toy, **{"learn.kl_guidance": "2", "learn.kl_weight": "0.1"})) != plain


def torch_velocity(transformer, name, x, t, rows, w):
    """v_neg + w (v_pos - v_neg) of diffusers' network with the LoRA of that name, or without one."""
    transformer.disable_adapters() if name is None else (transformer.enable_adapters(), transformer.set_adapter(name))

    def one(text, pooled):
        return transformer(
            hidden_states=x, timestep=1000 * t, encoder_hidden_states=text, pooled_projections=pooled
        ).sample

    (toward, away) = (one(*row) for row in rows)
    return toward if w == 1 else away + w * (toward - away)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("w", "kl"), [(4.0, 4.0), (1.0, 4.0), (1.0, 1.0)])
def test_the_gradient_of_both_rows_is_torchs(tmp_path, w, kl):
    """DiffusionNFT's loss and its gradient in every factor of SD3.5's LoRA, the three policies at their weights."""
    cfg_model, cfg_lora = nano_sd35.model(nano_sd35.write(tmp_path / "sd35")), Lora(rank=4, alpha=8.0)
    model, (base, _, encoders) = sd35.make(cfg_model), sd35.load(cfg_model)
    cfg = Config(
        lora=cfg_lora,
        regenerate=Stage(10, guidance=w),
        learn=Learn(timestep_fraction=0.4, guidance=w, kl_guidance=kl, kl_weight=0.5, micro_batch=4),
    )
    fresh = lora.init(jax.random.key(0), base, model.lora_targets, cfg_lora)
    current, old = drawn(fresh, 0.1), jax.tree.map(lambda x: 0.7 * x, drawn(fresh, 0.1))
    text = Conditioner(model, encoders, sharding.make_mesh(1), group=2, stay=True, negative="")
    cond, negative = jax.device_get((text(nano.PROMPTS[:2]), text.negative()))
    x_t, x0 = jax.random.normal(jax.random.key(5), (2, 2, 8, 8, 4))
    points, advantage = Points(x_t, jnp.array([0.8, 0.3]), x0), jnp.array([1.5, -0.7])
    hyper = Hyper(*(jnp.float32(getattr(cfg.learn, name)) for name in Hyper._fields))
    names = ("old", "reference")
    fixed = {"old": old, "reference": jax.tree.map(jnp.zeros_like, old)}
    groups = [learn.stacked([fixed[name] for name in group]) for _, group in learn.by_guidance(names, cfg)]
    objective = functools.partial(learn.summed_loss, names=names, hyper=hyper, model=model, cfg=cfg)
    given = base, groups, cond, negative, points, advantage
    (found, metrics), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(current, *given)

    pipe = StableDiffusion3Pipeline.from_pretrained(cfg_model.path, torch_dtype=torch.float32)
    for name, adapter in (("current", current), ("old", old)):
        (tmp_path / name).mkdir()
        lora_files.save(tmp_path / name / "pytorch_lora_weights.safetensors", adapter, model.keys, cfg_lora)
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    x, clean = (torch.tensor(np.asarray(a)).permute(0, 3, 1, 2) for a in (x_t, x0))
    t, a = torch.tensor([0.8, 0.3]), torch.tensor([1.5, -0.7])
    rows = [
        [torch.tensor(np.repeat(np.asarray(tree[key]), 2 // len(tree[key]), axis=0)) for key in ("text", "pooled")]
        for tree in (cond, negative)
    ]
    with torch.no_grad():
        v_old = torch_velocity(pipe.transformer, "old", x, t, rows, w)
        v_ref = torch_velocity(pipe.transformer, None, x, t, rows, kl)
    v = torch_velocity(pipe.transformer, "current", x, t, rows, w)

    def side(u):
        away = x - t[:, None, None, None] * u - clean
        return (away**2).mean((1, 2, 3)) / away.abs().mean((1, 2, 3)).detach()

    r = (a / 10 + 0.5).clamp(0, 1)
    policy = 5 * (r * side(v) + (1 - r) * side(2 * v_old - v))  # beta = 1
    far = ((v - v_ref) ** 2).mean((1, 2, 3))
    loss = (policy + 0.5 * far).sum()
    loss.backward()
    assert float(found) == pytest.approx(loss.item(), rel=1e-5)
    assert float(metrics["kl_div"]) == pytest.approx(far.sum().item(), rel=1e-5)
    theirs = {
        name.replace(".current.weight", ".weight"): p.grad
        for name, p in pipe.transformer.named_parameters()
        if ".current." in name
    }
    ours = {f"{name}.lora_{part}.weight": x.T for _, name, part, x in lora_files._public(grads, model.keys)}
    assert ours.keys() == theirs.keys() and len(ours) == 2 * (5 * 8 - 1)
    nothing = 1e-6 * max(np.abs(g).max() for g in ours.values())  # such as the last block's queries of the text
    for name, g in ours.items():
        expect = theirs[name] * (2.0 if "lora_B" in name else 1.0)  # the file's B has alpha / rank in it
        assert np.abs(g - expect.numpy()).max() < 1e-4 * max(expect.abs().max(), nothing), name


def made(cfg, steps=4):
    """A guided toy's parts with samples of its own rollout: (parts, state, samples, cond)."""
    parts = train.ready(assemble.assemble(cfg, 1))
    with jax.set_mesh(parts.mesh):
        state = assemble.fresh(parts)
        prompts = assemble.encode(parts, [f"prompt {i}" for i in range(cfg.prompts)], parts.score)
        keys = jax.random.split(jax.random.key(1), (cfg.prompts, cfg.kept))
        variables = rollout.policy_variables(rollout.merged(state, parts.frozen, cfg=cfg), None, parts.frozen)
        how = {"model": parts.model, "score": parts.score, "stage": cfg.regenerate, "keep_path": cfg.of_steps}
        samples = rollout.rollout(variables, parts.frozen, prompts, keys, **how)
    return parts, state, samples, prompts.cond


@pytest.mark.slow
def test_grpos_ratio_is_1_on_guided_steps(toy):
    """Before the first update the policy that drew the steps is the one whose probability is taken; at another weight
    it would not be, and nothing else would show it."""
    words = {"regenerate.solver": "sde", "regenerate.eta": 0.9, "regenerate.steps": 4, "learn.timestep_fraction": 0.5}
    words |= {"explore": "none", "regenerate.precision": "bf16", "learn.algorithm": "flow_grpo", "learn.updates": 2}
    words |= {"regenerate.chunk": toy.kept, "candidates": toy.kept, "selection": "all", "regenerate.guidance": 2.5}
    cfg = config.override(toy, **words, **{"branch": "none"} if toy.branch else {}, **{"learn.micro_batch": 2})
    parts, state, samples, cond = made(cfg)
    moved = {}
    for w in (2.5, 1.0):
        other = config.override(cfg, **{"learn.guidance": w})
        run = functools.partial(learn.gradients, model=parts.model, cfg=other)
        keys, path = samples.keys, algos.Sample(samples.x0, samples.path)
        with jax.set_mesh(parts.mesh):
            given = state, state, parts.frozen, cond, keys, path, jnp.ones(keys.shape)
            moved[w] = jax.jit(run)(*given)[1]
    assert float(moved[2.5]["ratio/deviation"]) < 1e-6
    text = {name: float(value) for name, value in moved[2.5].items()}
    assert np.isfinite(list(text.values())).all()
    with pytest.raises(ConfigError, match="takes the probability of the steps that were drawn"):
        guidance.check_training(config.override(cfg, **{"learn.guidance": 1}), parts.model)


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_guided_run(toy, tmp_path):
    """Guided everywhere; stopped after one iteration and resumed it is the run that was not, to the bit."""
    cfg = config.override(toy, iterations=2, **{"regenerate.guidance": 2.5, "evaluate.own": "true"})
    train.train(cfg, tmp_path / "whole", devices=1)
    train.train(config.override(cfg, iterations=1), tmp_path / "two", devices=1)
    train.train(cfg, tmp_path / "two", devices=1, resume=True)
    whole, two, plain = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "two"), tmp_path / "plain"
    same = {name for name in whole[2] if not name.startswith("time/")}
    assert {name: whole[2][name] for name in same} == {name: two[2][name] for name in same}
    assert whole[0]["eval_own/guidance"] == 3.0 == two[0]["eval_own/guidance"]
    assert whole[0]["eval_own/avg"] == two[0]["eval_own/avg"] != whole[0]["eval_reward_avg"]
    notes = json.loads((tmp_path / "whole/starts.json").read_text())[0]["notes"]
    names = ["explore.guidance", "regenerate.guidance", "learn.guidance", "learn.kl_guidance"]
    assert "guidance: " + ", ".join(f"{name}=2.5" for name in names if cfg.explore or "explore" not in name) in notes
    train.train(config.override(toy, iterations=2), plain, devices=1)
    assert metrics_of(plain)[1]["reward/mean"] != whole[1]["reward/mean"]
    page, card = ((tmp_path / "whole" / name).read_text() for name in ("report.html", "model_card.md"))
    assert "are at guidance 2.5; its training: all of it at 2.5" in page and "At its own guidance, 3, the base" in page
    assert "512 px, guidance 2.5 |" in card


def test_the_base_at_its_own_weight_is_drawn_again(toy, tmp_path):
    """If its pictures are damaged, lost or of another evaluation, like those that it is compared with."""
    cfg, said = config.override(toy, **{"evaluate.own": "true"}), []
    parts, file = train.ready(assemble.assemble(cfg, 1)), tmp_path / "grids/base_own.npz"
    out = train.Log(lambda iteration, metrics: {}, lambda stage, share: None, said.append)
    with jax.set_mesh(parts.mesh):
        state = assemble.fresh(parts)
        _, first = train.beginning(parts, state, tmp_path, out)
        assert first["eval_own/guidance"] == 3.0 and first["eval_own/avg"] != first["eval_reward_avg"]
        kept = pictures.load(file)
        other = kept.shown._replace(means={name: x + 1 for name, x in kept.shown.means.items()})
        for spoil in (
            lambda: file.write_bytes(b"no pictures"),
            file.unlink,
            lambda: pictures.save(file, other, 0, kept.how.replace("steps=3", "steps=2")),
        ):
            spoil()
            _, again = train.beginning(parts, state, tmp_path, out)
            assert again == first
            assert pictures.load(file).how == kept.how


@pytest.mark.long
def test_weights_in_parts_give_a_guided_training_the_same_bits(tmp_path):
    """The network over 2 devices, its negative conditioning whole on each."""
    found = []
    for shard in (1, 2):
        words = {"model.guidance": "cfg", "regenerate.guidance": 2.5, "learn.guidance": 1, "learn.kl_guidance": 2.5}
        words |= {"explore": "none", "candidates": 4}
        parts = train.ready(nano.parts_of(config.override(nano.build(tmp_path, shard=shard), **words), 2))
        with jax.set_mesh(parts.mesh):
            state, prompts, _ = nano.begun(parts)
            statics = dict(zip(nano.STATICS, nano.statics_of(parts), strict=True))
            found.append(jax.jit(functools.partial(iteration.iteration_step, **statics))(state, parts.frozen, prompts))
    np.testing.assert_array_equal(nano.numbers(found[0][0].lora), nano.numbers(found[1][0].lora))
    assert {k: float(v) for k, v in found[0][1].items()} == {k: float(v) for k, v in found[1][1].items()}


def test_a_negative_conditioning_that_is_not_finite_is_named(toy):
    parts = train.ready(assemble.assemble(config.override(toy, **{"regenerate.guidance": 2}), 1))
    with jax.set_mesh(parts.mesh):
        state, prompts = assemble.fresh(parts), assemble.encode(parts, ["prompt 1"] * toy.prompts, parts.score)
        assert guards.not_finite(parts, state, prompts) == ""
        broken = jax.tree.map(lambda x: x * jnp.nan, parts.frozen.negative)
        spoilt = parts._replace(frozen=parts.frozen._replace(negative=broken))
        assert "not finite are negative" in guards.not_finite(spoilt, state, prompts)


def test_the_report_names_each_weight():
    def told(**given):
        cfg = weighed(**given)
        return reports._guidance(reports.Run("r", None, dict(config.values(cfg)), cfg, [], [], None, None, []))

    assert told() == [] == told(explore=1, regenerate=1)
    assert told(regenerate=4) == ["Its evaluations, also the base's, are at guidance 4; its training: all of it at 4."]
    (said,) = told(explore=1, regenerate=4)
    assert said.endswith("its training: the previews at 1, the rollouts at 4, the loss at 4, its reference at 4.")
    (said,) = told(regenerate=4, algorithm="flow_grpo")  # which has no previews
    assert said.endswith("all of it at 4.")
    (said,) = told(kl=4)
    assert said.endswith("the previews at 1, the rollouts at 1, the loss at 1, its reference at 4.")


def test_the_model_card_names_each_weight():
    def pictures(**given):
        return model_card.facts(weighed(**given), 1, 1, ("to_q",))["pictures in training"]

    assert pictures() == "512 px, guidance 1.0 (no classifier-free guidance)"
    assert pictures(regenerate=4) == "512 px, guidance 4"
    assert pictures(regenerate=4, loss=1) == "512 px, guidance 4, 1 in the loss"
    assert pictures(explore=1, regenerate=4) == "512 px, guidance 4, 1 previews"
    assert pictures(kl=4) == "512 px, guidance 1, 4 of the reference"
    for cfg, w in (
        (weighed(), None),
        (weighed(regenerate=4), "guidance 4"),
        (config.override(weighed(regenerate=4), **{"evaluate.guidance": 1}), "guidance 1"),
    ):
        assert model_card.facts(cfg, 1, 1, ("to_q",)).get("pictures in its evaluations") == w


def test_the_alarm_of_the_distance_is_not_for_a_guided_reference():
    """Its distance begins at the guided base's from the plain one."""
    lines = [{"iteration": i, "loss": 1.0, "kl_div": 3.0, "old_deviate": 0.0} for i in range(1, 60)]
    assert "kl_div" in guards.alarms(lines, weighed())
    assert "kl_div" in guards.alarms(lines, weighed(regenerate=4))
    assert "kl_div" not in guards.alarms(lines, weighed(kl=4))


# --- what it costs --------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_plan_counts_both_rows_of_a_training(tmp_path):
    """Forward passes: a guided rollout 2 for 1; a point of the loss, of 1 + 1 + 1 policies, 2 for each that is guided,
    where the trained one counts four times with its gradient and what is computed again."""
    cfg = config.override(nano.build(tmp_path), **{"model.guidance": "cfg", "learn.kl_weight": 0.1})
    found = {}
    for name, words in {
        "plain": {},
        "all": {"regenerate.guidance": 4},
        "reference": {"learn.kl_guidance": 4},
        "rollouts": {"regenerate.guidance": 4, "learn.guidance": 1},
    }.items():
        one = config.override(cfg, **words)
        sizes = shapes.read(one, 1)
        stages = [*(stage for stage, _, _ in one.stages()), "learn"]
        uses = {stage: plan.use_of(stage, one, sizes, 1, plan.CARDS["H100 80GB"]) for stage in stages}
        found[name] = {stage: use.flops.total() for stage, use in uses.items()}
        found[name] |= {f"{stage} memory": use.activations for stage, use in uses.items()}
    x, sigma = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 8, 8, 4), (1,)))
    reference = {"params": sizes.frozen.base}
    policy = jax.eval_shape(
        functools.partial(lora.policy, cfg=cfg.lora), sizes.frozen.base, shapes.blank(cfg, sizes).ema
    )
    cond = shapes.batch(sizes.prompts.cond, 1)
    flops = {
        name: jaxpr.flops(jaxpr.trace(sizes.model.velocity, v, x, sigma, cond)).total()
        for name, v in (("merged", reference), ("policy", policy))
    }
    explored = cfg.prompts * cfg.candidates * cfg.explore.steps
    for name in ("all", "rollouts"):
        assert found[name]["explore"] - found["plain"]["explore"] == explored * flops["merged"]
        assert found[name]["regenerate"] > found["plain"]["regenerate"]
    points = cfg.prompts * cfg.kept * cfg.times
    more = (found["reference"]["learn"] - found["plain"]["learn"]) / (points * flops["policy"])
    assert 1.0 <= more < 1.1  # and what a LoRA does not touch, which policies of one batch share
    assert found["rollouts"]["learn"] == found["plain"]["learn"]
    assert 1.9 < found["all"]["learn"] / found["plain"]["learn"] < 2.01
    assert found["all"]["learn memory"] > 1.3 * found["plain"]["learn memory"]


def test_units_are_measured_on_both_rows():
    """Of FP8's inputs; a negative row that is larger than every prompt's sets the unit."""
    model, stage = linear(), Stage(2, "euler", guidance=3.0)

    def largest(variables, x, sigma, cond):
        return {"text": jnp.abs(cond["text"]).max(), "x": jnp.abs(x).max(), "rows": jnp.float32(len(x))}

    model = model._replace(largest=largest)
    cond, negative = {"text": jnp.ones((2, 3))}, {"text": jnp.full((1, 3), 40.0)}
    keys = jax.random.split(jax.random.key(0), 2)
    with jax.set_mesh(sharding.make_mesh(1)):
        _, guided = calibrate.seen({}, cond, keys, negative, model=model, stage=stage)
        _, plain = calibrate.seen({}, cond, keys, negative, model=model, stage=Stage(2, "euler"))
    assert guided["text"].tolist() == [40.0, 40.0] and plain["text"].tolist() == [1.0, 1.0]
    assert guided["rows"].tolist() == [4, 4] and plain["rows"].tolist() == [2, 2]
    assert guided["x"][0] == plain["x"][0] and guided["x"][1] != plain["x"][1]  # the states are those of guided steps
