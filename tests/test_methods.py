"""AWM, Flow-GRPO and DanceGRPO through the same iteration_step: paths, ratios, devices, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solrl_jax import algos, config, iteration, learn, recipes, sampler, train
from solrl_jax.config import ConfigError, Stage
from solrl_jax.keys import STEPS, sample_key, sample_keys
from solrl_jax.rollout import policy_variables, sigmas_of
from solrl_jax.run import assemble
from tests import nano
from tests.nano import begun, numbers, parts_of, statics_of
from tests.test_iteration import folder, whole
from tests.tiers import long, slow

__all__ = ["folder"]  # fixtures
SMALL = {"flow_grpo": 3, "flow_grpo_fast": 4, "dance_grpo": 4, "awm": 5, "vgrpo": 5}
"""Steps of a rollout here."""


def build(folder, name: str, **changes):
    """nano by that method, with fewer steps."""
    cfg = recipes.family(nano.build(folder), name)
    stage = {"steps": str(SMALL[name])} | ({"window": "2", "window_within": "3"} if cfg.regenerate.window else {})
    fraction = {"flow_grpo": "0.7", "dance_grpo": "0.5", "awm": "0.4", "flow_grpo_fast": "0.5", "vgrpo": "0.4"}[name]
    words = {f"regenerate.{k}": v for k, v in stage.items()} | {"learn.timestep_fraction": fraction}
    return config.override(cfg, **{**words, "learn.micro_batch": "2", **changes})


def rolled(parts):
    """The samples of a first iteration, their prompts' conditioning, and the policy that drew them."""
    run = iteration.stages(*statics_of(parts))
    with jax.set_mesh(parts.mesh):
        state, prompts, _ = begun(parts)
        keys = sample_keys(state, 4, parts.cfg.candidates)
        kernels = jax.jit(run.merged)(state, parts.frozen)
        samples = jax.jit(run.regenerate)(kernels, None, parts.frozen, prompts, keys)
    return state, samples, prompts, policy_variables(kernels, None, parts.frozen)


@pytest.mark.parametrize("name", ["flow_grpo", slow("flow_grpo_fast"), slow("dance_grpo")])
def test_paths_are_the_steps_that_were_taken(folder, name):
    """x' = mean + std z with the sample's own noise; DanceGRPO's samples of a prompt begin alike."""
    parts = parts_of(build(folder, name))
    stage = parts.cfg.regenerate
    _, samples, prompts, variables = rolled(parts)
    assert samples.path is not None
    first, states = np.asarray(samples.path.first), samples.path.states
    assert states.shape == (4, 4, stage.trainable + 1, 8, 8, 4)
    law = sampler.gaussians(sigmas_of(parts.model, stage), stage.solver, stage.eta)
    rows = sampler.table(sigmas_of(parts.model, stage), stage.solver, stage.eta)
    cond = jax.tree.map(lambda c: jnp.repeat(c, 4, axis=0), prompts.cond)
    velocity = jax.jit(parts.model.velocity)
    for k in range(stage.trainable):
        at = (first + k).reshape(-1)
        x, x_next = (states[:, :, j].reshape(16, 8, 8, 4) for j in (k, k + 1))
        t = jnp.asarray(rows.sigma[at], jnp.float32)
        x0 = x - sampler.over(t, x) * velocity(variables, x, t, cond)
        step = jax.tree.map(lambda c: jnp.asarray(c[at], jnp.float32), law)  # noqa: B023
        keys = samples.keys.reshape(-1)
        z = jnp.stack([jax.random.normal(sample_key(key, STEPS, int(i)), (8, 8, 4))
                       for key, i in zip(keys, at, strict=True)])  # fmt: skip
        expect = sampler.mean(step, x, x0) + sampler.over(jnp.asarray(rows.noise[at], jnp.float32), x) * z
        np.testing.assert_allclose(x_next, expect, rtol=1e-4, atol=2e-5)
    begins = np.asarray(states[:, :, 0])
    if name == "flow_grpo_fast":
        assert set(first.ravel()) == {0, 1}  # windows of 2 steps within the first 3
    else:
        assert (first == 0).all() and not np.allclose(begins[0, 0], begins[1, 0])
        assert np.array_equal(begins[:, 0], begins[:, 1]) == (name == "dance_grpo")
    if name == "dance_grpo":
        last = np.asarray(samples.path.states[:, :, -1]).reshape(16, 8, 8, 4)
        t = jnp.full(16, rows.sigma[-1], jnp.float32)
        clean = last - float(t[0]) * np.asarray(velocity(variables, jnp.asarray(last), t, cond))
        np.testing.assert_allclose(samples.x0.reshape(16, 8, 8, 4), clean, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "name",
    [*map(slow, ("vgrpo", "awm", "flow_grpo", "dance_grpo")), long("flow_grpo_fast")],
)
def test_a_method_learns_one_iteration(folder, name):
    """In f32 the ratio before the first update is 1 within 1e-6; the update is the same on four devices."""
    found = []
    for devices in (1, 4) if name == "flow_grpo_fast" else (1,):
        parts = parts_of(build(folder, name), devices)
        with jax.set_mesh(parts.mesh):
            state, prompts = assemble.fresh(parts), assemble.encode(parts, nano.PROMPTS[:4], parts.score)
            new, metrics = whole(statics_of(parts))(state, parts.frozen, prompts)
        assert int(new.updates) == 2 and int(new.skipped) == 0 and float(metrics["grad_norm"]) > 0
        assert 0 <= float(metrics["ratio/noise"]) <= 1e-6
        assert float(metrics["ratio/deviation"]) > 10 * float(metrics["ratio/noise"])  # the second update is another
        moved = numbers(new.lora) - numbers(state.lora)
        assert np.abs(moved).max() > 1e-4
        # Only AWM's old policy lags behind: it keeps c = .001 x 2 updates of where it was.
        lag = numbers(new.old) - numbers(new.lora)
        np.testing.assert_allclose(lag, (-0.002 if name == "awm" else 0) * moved, atol=1e-7)
        found.append((new, metrics))
    if len(found) > 1:
        np.testing.assert_allclose(numbers(found[0][0].lora), numbers(found[1][0].lora), atol=2e-5)


def test_the_samples_of_a_prompt_share_their_points(folder):
    """Times and noise, in every update of an epoch and on any number of devices; another epoch has others."""
    cfg = build(folder, "vgrpo")
    parts = parts_of(cfg)
    with jax.set_mesh(parts.mesh):
        state = assemble.fresh(parts)
    keys = sample_keys(state, 3, 4)
    own = config.override(cfg, **{"learn.shared_points": "false"})
    shared, other = (jax.random.key_data(learn.point_keys(state, keys, jnp.int32(e), cfg)) for e in (0, 1))
    alone = jax.random.key_data(learn.point_keys(state, keys, jnp.int32(0), own))
    assert len(np.unique(shared.reshape(12, -1), axis=0)) == 3 and (shared == shared[:, :1]).all()
    assert len(np.unique(alone.reshape(12, -1), axis=0)) == 12 and not (shared == other).all()
    made = algos.Sample(jnp.zeros((2, 8, 8, 4)))
    schedule = learn.schedule_of(parts.model, cfg)
    points = jax.vmap(lambda k, x: algos.vgrpo_points(k, x, schedule, cfg.times, cfg.learn))(
        learn.point_keys(state, keys, jnp.int32(0), cfg)[0, :2], made
    )
    np.testing.assert_array_equal(points.t[0], points.t[1])
    np.testing.assert_array_equal(points.x_t[0], points.x_t[1])  # of equal samples


@pytest.mark.slow
def test_one_update_needs_no_second_pass(folder):
    """Where a rollout is one update the ratio is exactly 1 and the behaviour policy is not run."""
    cfg = build(folder, "dance_grpo", **{"learn.updates": "1"})
    assert algos.find("dance_grpo").fixed(cfg.learn) == ()
    assert algos.find("awm").fixed(cfg.learn) == ("old",)  # nor the reference, without a weight
    assert algos.find("awm").fixed(dataclasses.replace(cfg.learn, kl_weight=1e-3)) == ("old", "reference")
    parts = parts_of(cfg)
    state, samples, prompts, _ = rolled(parts)
    run = iteration.stages(*statics_of(parts))
    with jax.set_mesh(parts.mesh):
        _, metrics = jax.jit(run.learn)(state, parts.frozen, prompts.cond, samples)
    assert float(metrics["ratio/deviation"]) == 0.0 and "ratio/noise" not in metrics
    advantage = algos.advantages(samples.reward, "prompt_unbiased")
    assert float(metrics["loss"]) == pytest.approx(-float(jnp.mean(advantage)), abs=1e-6)


def test_a_clip_range_within_the_noise_is_refused():
    train.check_ratio({"ratio/noise": 9e-6}, 1, 1e-4)
    train.check_ratio({}, 1, 1e-4)
    train.check_ratio(
        {"ratio/noise": float("nan")}, 1, 1e-4
    )  # of an update that was skipped, which check_skipped tells
    with pytest.raises(train.TrainError, match=r"iteration 3: .*off by 1.1e-05 from rounding.*use 1.2e-04 or more"):
        train.check_ratio({"ratio/noise": 1.1e-5}, 3, 1e-4)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sol_rl", {"learn.algorithm": "flow_grpo"}, r"needs the probability of a step, which solver=dpm2 with eta=0"),
        ("sol_rl", {"regenerate.solver": "sde", "regenerate.eta": "0.7"}, r"other noise in every step, so the preview"),
        ("sol_rl", {"explore.solver": "cps", "explore.eta": "0.7"}, r"explore.eta=0.7, regenerate.eta=0.0"),
        ("flow_grpo", {"regenerate.solver": "sa_solver"}, r"solver=sa_solver with eta=0.9 has not: use ddim, sde, d"),
        ("flow_grpo", {"regenerate.precision": "fp8"}, r"precision=fp8: learn.algorithm=flow_grpo takes the ratio"),
        ("flow_grpo", {"learn.timestep_fraction": "1"}, r"is 6 of 6 steps, but only 5 have a probability"),
        ("flow_grpo", {"regenerate.eta": "inf"}, r"eta=inf: sde takes a finite number, 0 or more"),
        (
            "flow_grpo",
            {"regenerate.window": "7", "regenerate.window_within": "7"},
            r"window=7, window_within=7 of",
        ),
        ("flow_grpo_fast", {"regenerate.window_within": "6"}, r"=6 of steps=6: .*; the last step, whose noise is 0 or"),
        ("flow_grpo_fast", {"regenerate.window_within": "2"}, r"a window has 1 or more steps, and lies within the fir"),
        ("diffusionnft", {"regenerate.eta": "0.5"}, r"eta=0.5: dpm2 takes 0 only, it solves the ODE"),
        ("diffusionnft", {"regenerate.window": "2"}, r"window=2: only ddim, sde, dance, cps with eta > 0 have noise"),
        ("diffusionnft", {"regenerate.shared_noise": "true"}, r"all samples of a prompt would be the same"),
        ("dance_grpo", {"regenerate.shift": "-3"}, r"shift=-3.0: 0 \(the model's sigmas\) or a positive number"),
        ("awm", {"learn.timestep_fraction": "0.9"}, r"awm trains 12 times of 14, one of each stratum .* 1 to 11: use"),
        ("awm", {"learn.first_time": "12"}, r"first_time=12: .* trains times of 14 steps below number 12, use a lower"),
        ("awm", {"learn.clip_range": "0"}, r"learn.clip_range=0.0: a positive number"),
        ("awm", {"learn.lag_weight": "-1"}, r"learn.lag_weight=-1.0: give a finite number, 0 or more"),
        ("vgrpo", {"learn.micro_batch": "2"}, r"micro_batch=2: .*vgrpo takes the ratio of a whole sample, which has 4"),
        (
            "vgrpo",
            {"learn.kl_weight": "0.3", "learn.updates": "1"},
            r"kl_weight=0.3: .*with one update is 0: set it to",
        ),
        (
            "flow_grpo",
            {"learn.shared_points": "true"},
            r"flow_grpo learns from the steps that were taken, not from new",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(name, change, message):
    with pytest.raises(ConfigError, match=message):
        config.override(config.load(f"flux:{name}"), **change)


def test_any_algorithm_that_learns_from_pictures_takes_any_family():
    for name in ("sol_rl", "naive_scaling", "naive_quant", "diffusionnft"):
        cfg = config.override(config.load(f"flux:{name}"), **{"learn.algorithm": "awm"})
        assert cfg.learn.algorithm == "awm" and cfg.times == 4
    wide = config.load("flux:flow_grpo", {"candidates": "96", "selection": "best_worst"})
    assert wide.explore is None and wide.of_steps  # all 96 by the SDE, 24 of them trained on


def test_the_methods_as_published():
    """The constants of the methods' published code (docs/methods.md), on FLUX's own sizes."""
    for model in ("flux", "tiny"):
        made = {name: config.load(f"{model}:{name}") for name in recipes.METHODS}
        for name, cfg in made.items():
            assert cfg.explore is None and cfg.candidates == cfg.kept and cfg.selection == "all", name
            assert cfg.lora == config.load(model).lora and cfg.prompts == config.load(model).prompts
        assert [made[n].times for n in made] == [5, 3, 6, 6, 4]
    flux = {name: config.load(f"flux:{name}") for name in recipes.METHODS}
    chunk = {"precision": "bf16", "chunk": 24}
    assert flux["flow_grpo"].regenerate == Stage(6, "sde", **chunk, eta=0.9)
    assert flux["flow_grpo_fast"].regenerate == Stage(6, "cps", **chunk, eta=0.8, window=3, window_within=3)
    assert flux["dance_grpo"].regenerate == Stage(12, "dance", **chunk, eta=0.3, shift=3.0, shared_noise=True)
    assert flux["awm"].regenerate == Stage(14, "sa_solver", **chunk, eta=0.4)
    learns = {n: dataclasses.astuple(c.learn)[:2] for n, c in flux.items()}
    assert learns["awm"] == ("awm", 0.43) and learns["dance_grpo"] == ("dance_grpo", 0.5)
    assert {n: (c.learn.updates, c.learn.clip_range) for n, c in flux.items()} == {
        **{"flow_grpo": (2, 1e-4), "flow_grpo_fast": (2, 1e-5), "dance_grpo": (2, 1e-4), "awm": (1, 1.0)},
        "vgrpo": (2, 1e-2),
    }
    assert (flux["awm"].learn.old_max, flux["awm"].learn.kl_weight, flux["awm"].learn.lag_weight) == (0.3, 1e-3, 1.0)
    assert [flux[n].learn.micro_batch for n in flux] == [10, 12, 12, 12, 12]
    assert flux["vgrpo"].learn.shared_points and flux["vgrpo"].regenerate == config.load("flux:sol_rl").regenerate
