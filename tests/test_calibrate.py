"""Units of FP8's inputs: by which keys, times and prompts they are measured."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import lora, quant, rollout, sampler, train
from solrl_jax.config import Stage
from solrl_jax.keys import EVALUATION, sample_keys, selection_key
from solrl_jax.quant import calibrate
from solrl_jax.run import assemble, data, watch
from solrl_jax.structs import QuantRule
from tests import nano

FP8 = Stage(2, "dpm2", "fp8", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("calibrate")


@pytest.fixture(scope="module")
def parts(folder):
    return assemble.assemble(nano.build(folder), 1)


def with_fp8(parts, **changes):
    """`parts` as on a card that has FP8."""
    return parts._replace(cfg=dataclasses.replace(parts.cfg, **{"explore": FP8, **changes}))


@pytest.fixture
def given(monkeypatch):
    """What `ready` gives `calibrated`, a call a time: (conditioning, key, stages, the negative conditioning)."""
    seen = []
    monkeypatch.setattr(train, "calibrated", lambda model, _, *rest: seen.append(rest) or model)
    return seen


@pytest.mark.slow
def test_keys_are_pairwise_different(parts, given, monkeypatch):
    """LoRA's init, the state, samples and selections of three iterations, evaluation, calibration: of one seed."""
    keys, init = {"seed": jax.random.key(parts.cfg.seed)}, lora.init
    with jax.set_mesh(parts.mesh):
        monkeypatch.setattr(lora, "init", lambda key, *rest: keys.update(lora=key) or init(key, *rest))
        state = assemble.fresh(parts)
        train.ready(with_fp8(parts))
    keys |= {"state": state.key, "calibration": given[0][1]}
    keys["evaluation"] = jax.random.fold_in(keys["seed"], EVALUATION)
    for name in ("lora", "calibration"):
        keys |= {f"{name} {i}": key for i, key in enumerate(jax.random.split(keys[name], 8))}
    keys |= {f"picture {i}": jax.random.fold_in(keys["evaluation"], i) for i in range(8)}
    for at in (state._replace(iteration=jnp.int32(i)) for i in range(3)):
        samples = sample_keys(at, 4, 8).reshape(-1)
        keys |= {f"sample {at.iteration} {i}": key for i, key in enumerate(samples)}
        keys[f"selection {at.iteration}"] = selection_key(at)
    found = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys.values()}
    assert len(found) == len(keys) == 5 + 3 * 8 + 3 * 33


@pytest.mark.parametrize(("prompts", "there", "devices"), [(4, 8, 1), (1, 8, 1), (1, 3, 1), (2, 3, 2)])
def test_eight_prompts(parts, given, folder, prompts, there, devices):
    """The first that the run will see, however few an iteration has, and fewer only where there are fewer; on two
    devices three are encoded as four. What the text encoders' first visit is for, they encode in it."""
    cfg = nano.build(folder, prompts=prompts, encode_ahead=2, explore=FP8)
    text = assemble.Conditioner(parts.model, parts.text.params, assemble.make_mesh(devices), group=prompts, stay=True)
    some = parts._replace(cfg=cfg, mesh=text.mesh, text=text)
    some = some._replace(prompts=parts.prompts._replace(train=parts.prompts.train[:there]))
    with jax.set_mesh(some.mesh):
        train.ready(some)
    ((cond, _, stages, negative),) = given
    first = data.batch(some.prompts.train, cfg.seed, 0, min(8, there))
    expected = [jax.tree.map(np.asarray, text.kept[prompt]) for prompt in first]
    jax.tree.map(np.testing.assert_array_equal, cond, jax.tree.map(lambda *x: np.stack(x), *expected))
    assert len(cond["pooled"]) == min(8, there) and stages == [FP8] and negative is None
    assert {*train.drawn(some, 0)[0], *train.drawn(some, 0)[1]} <= text.kept.keys()


STAGES = [
    Stage(3, "euler", "fp8", 4, shift=3.0),
    Stage(4, "dpm2", "fp8", 4),
    Stage(4, "sde", "fp8", 4, eta=0.7, window=1, window_within=2, shift=2.0),
    Stage(5, "sa_solver", "fp8", 4, eta=1.0),
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.solver)
def test_the_stage_as_it_draws(parts, stage):
    """Inputs are looked at where the stage's own rollout of the same keys is: its sigmas, shift, solver and noise."""
    at = []
    keys, cond = jax.random.split(jax.random.key(1), 2), {"text": jnp.array([0.3, -0.4])}

    def velocity(variables, x, sigma, cond):
        return x * sampler.over(sigma**2 + cond["text"], x)

    def largest(variables, x, sigma, cond):
        jax.debug.callback(lambda x, sigma: at.append((x, sigma)), x, sigma, ordered=True)
        return {"x": jnp.max(jnp.abs(x))}

    model = parts.model._replace(velocity=velocity, largest=largest)
    sigmas, found = jax.jit(lambda c, k: calibrate.seen({}, c, k, model=model, stage=stage))(cond, keys)
    jax.effects_barrier()
    assert len(at) == stage.steps and found["x"].shape == (stage.steps,)
    table = sampler.table(rollout.sigmas_of(model, stage), stage.solver, stage.eta)
    np.testing.assert_allclose(sigmas, table.sigma, rtol=1e-6)
    np.testing.assert_allclose([sigma for _, sigma in at], np.repeat(table.sigma[:, None], 2, 1), rtol=1e-6)
    x, sigma = map(jnp.asarray, at[-1])  # every solver's last step takes x0hat
    drawn = rollout.integrate({}, cond, keys[:, None], model=model, stage=stage)
    np.testing.assert_allclose(x - sampler.over(sigma, x) * velocity({}, x, sigma, cond), drawn, rtol=1e-5, atol=1e-5)
    assert np.abs(at[0][0]).max() == pytest.approx(float(found["x"][0]))


def test_units_are_of_all_stages(parts):
    """Where both rollouts run in FP8, an input's unit holds what either of them sees."""
    stages = [Stage(2, "euler", "fp8", 4), Stage(3, "euler", "fp8", 4)]
    model = parts.model._replace(largest=lambda _, x, sigma, cond: {"first": sigma[0] * 10, "last": 1 / sigma[0]})
    with jax.set_mesh(parts.mesh):
        cond = parts.text(nano.PROMPTS[:2])
    given = {"params": parts.frozen.base}, cond, jax.random.key(0)
    units = [dict(calibrate.calibrated(model, *given, some).quant_rules.fp8.units) for some in (stages[:1], stages)]
    last = [1 / rollout.sigmas_of(model, stage)[-2] for stage in stages]
    assert units[0]["last"] == calibrate.fp8.unit_of(last[0]) and units[1]["last"] == calibrate.fp8.unit_of(max(last))
    assert units[0]["first"] == units[1]["first"] == calibrate.fp8.unit_of(10.0)


def test_inputs_that_outgrew_their_units():
    """A unit holds 448 of itself. Linears that are not quantised, have no unit or were not seen are not asked."""
    rule = QuantRule((), 0, units=(("a", 1.0), ("b", 0.5), ("c", 2.0), ("d", 1.0), ("skipped", 1.0)))
    largest = {"a": 448.0, "b": 336.0, "c": 1000.0, "e": 1e9, "skipped": 1e9}
    kernels = [f"{path}/kernel" for path in "abcde"]
    assert calibrate.saturating(rule, largest, kernels) == {"b": 1.5, "c": 1000 / 896}
    assert list(calibrate.saturating(rule, largest, kernels)) == ["b", "c"]  # worst first


@pytest.mark.long
def test_a_measurement_counts_inputs_that_outgrew_their_units(parts):
    """With the base's units none; where units are a 64th, about as many as those inputs of the base itself."""
    cfg = with_fp8(parts).cfg
    with jax.set_mesh(parts.mesh):
        state, prompts = assemble.fresh(parts), assemble.encode(parts, nano.PROMPTS[:4], parts.score)
        keys, variables = sample_keys(state, 4, 8)[:, 0], {"params": parts.frozen.base}
        model = calibrate.calibrated(parts.model, variables, prompts.cond, keys[0], [cfg.explore])
        seen = calibrate.seen(variables, prompts.cond, keys, model=model, stage=cfg.explore)
        rule = model.quant_rules.fp8
        small = rule._replace(units=tuple((path, unit / 64) for path, unit in rule.units))
        expect = calibrate.saturating(small, calibrate.over_steps(*seen), quant.chosen(parts.frozen.base, rule))
        found = [
            watch.measured(
                parts._replace(cfg=cfg, model=model._replace(quant_rules=model.quant_rules._replace(fp8=r))), state
            )
            for r in (rule, small)
        ]
        assert "watch/saturated" not in watch.measured(parts, state)  # NVFP4 has no units
    assert (found[0]["watch/saturated"], found[0]["watch/saturation"]) == (0.0, 1.0)
    # Not the same prompts and noise, so not quite the same inputs.
    assert abs(found[1]["watch/saturated"] - len(expect)) <= 2 < len(expect)
    assert found[1]["watch/saturation"] == pytest.approx(max(expect.values()), rel=0.5)
