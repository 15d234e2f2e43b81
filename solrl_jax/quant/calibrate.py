"""Units of FP8's inputs, from the inputs of every Linear in a few rollouts of the unquantised policy."""

import functools
import itertools
import math
from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from solrl_jax import guidance, rollout, sharding
from solrl_jax.config import Stage
from solrl_jax.quant import fp8, rule_of
from solrl_jax.structs import Model, PyTree, QuantRule, Variables

PROMPTS = 8
"""Prompts, one picture each, on which units are measured."""


def calibrated(
    model: Model,
    variables: Variables,
    cond: PyTree,
    key: Key[Array, ""],
    stages: Sequence[Stage],
    negative: PyTree = None,
) -> Model:
    """`model` with units in its FP8 rule, from a rollout of each stage for each of the G prompts of `cond`. Of a guided
    stage the rows of `negative`, leaves [1, ...], count too.

    Units are powers of two with room above the largest input seen (fp8.unit_of). They are reproducible, because they
    are constants of the compiled program. Raises FloatingPointError if an input is not finite.
    """
    keys = jax.random.split(key, jax.tree.leaves(cond)[0].shape[0])
    largest: dict[str, float] = {}
    for stage in stages:
        program = jax.jit(functools.partial(seen, model=model, stage=stage))  # weights are arguments, not constants
        for path, value in over_steps(*program(variables, cond, keys, negative)).items():
            largest[path] = max(largest.get(path, 0.0), value)
    rule = rule_of(model.quant_rules, "fp8")
    units = tuple(sorted((path, fp8.unit_of(value)) for path, value in largest.items()))
    return model._replace(quant_rules=model.quant_rules._replace(fp8=rule._replace(units=units)))


def over_steps(sigmas: Float[Array, "N"], found: Mapping[str, Float[Array, "N"]]) -> dict[str, float]:
    """{path: the largest of all steps} of what `seen` gives. Raises FloatingPointError if one is not finite."""
    sigmas, found = jax.device_get((sigmas, dict(found)))
    for (path, values), (i, sigma) in itertools.product(found.items(), enumerate(sigmas)):
        if not math.isfinite(values[i]):
            raise FloatingPointError(f"the input of {path} is not finite at sigma {sigma:.3f}")
    return {path: float(max(values)) for path, values in found.items()}


def saturating(rule: QuantRule, largest: Mapping[str, float], kernels: Collection[str]) -> dict[str, float]:
    """Of the Linears that are quantised, those whose largest input exceeds what their unit holds: FP8 cuts it off.

    {path: the largest input over the limit}, worst first. `kernels` are the quantised kernels (quant.chosen).
    """
    units = {path: unit for path, unit in rule.units if f"{path}/kernel" in kernels}
    ratio = {path: largest[path] / (fp8.MAX * unit) for path, unit in units.items() if path in largest}
    return {path: r for path, r in sorted(ratio.items(), key=lambda item: -item[1]) if r > 1}


def seen(
    variables: Variables, cond: PyTree, keys: Key[Array, "G"], negative: PyTree = None, *, model: Model, stage: Stage
) -> tuple[Float[Array, "N"], dict[str, Float[Array, "N"]]]:
    """For each step of the stage's rollout, its sigma (the first sample's) and the largest |input| of every Linear.

    `cond` is not prepared (`Model.prepare`), so that the Linears that run once per rollout are measured too.
    """

    whole = sharding.WHOLE
    measure = sharding.over_parts(
        functools.partial(_seen, model=model, stage=stage), (sharding.specs_of(variables), whole, whole, whole), whole
    )
    return measure(variables, cond, keys, negative)


def _seen(
    variables: Variables, cond: PyTree, keys: Key[Array, "G"], negative: PyTree, *, model: Model, stage: Stage
) -> tuple[Float[Array, "N"], dict[str, Float[Array, "N"]]]:
    w = guidance.of(stage)
    rows = guidance.conditioned(model, cond, negative, w)

    def velocity(x: Array, sigma: Array) -> Array:
        return guidance.velocity(model, w)(variables, x, sigma, rows)

    def largest(at: tuple[Array, Array]) -> dict[str, Array]:
        x, sigma = guidance.twice(model, w, at)
        return model.largest(variables, x, sigma, rows)

    seeds = rollout.Seeds(keys[:, None], keys[:, None])
    _, states, steps, _ = rollout.solved(velocity, seeds, model=model, stage=stage, keep_path=True)
    assert states is not None
    sigmas = jnp.asarray(steps.sigma, jnp.float32).reshape(len(states), -1)
    sigmas = jnp.broadcast_to(sigmas, states.shape[:2])
    found = jax.lax.map(largest, (states, sigmas))
    return sigmas[:, 0], found
