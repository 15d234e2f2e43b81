"""Units of FP8's inputs: what every Linear sees along a few rollouts of the unquantised policy."""

import itertools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from solrl_jax.quant import fp8, rule_of
from solrl_jax.structs import Model, PyTree, Variables


def calibrated(model: Model, variables: Variables, cond: PyTree, key: Key[Array, ""], steps: int) -> Model:
    """`model` with units in its FP8 rule, from one Euler rollout of so many steps for each of the G prompts of `cond`.

    Units are powers of two with room above the largest input seen (fp8.unit_of), the same numbers every time: they are
    part of the compiled program. Raises FloatingPointError where an input is not finite.
    """
    sigmas = model.sigmas(steps)
    prompts = jax.tree.leaves(cond)[0].shape[0]
    x = jax.vmap(model.noise)(jax.random.split(key, prompts))

    @jax.jit
    def step(variables, cond, x, sigma, following):  # not closed over: weights would become part of the program
        times = jnp.full((prompts,), sigma)
        seen = model.largest(variables, x, times, cond)
        return x + (following - sigma) * model.velocity(variables, x, times, cond), seen

    largest: dict[str, float] = {}
    for sigma, following in itertools.pairwise(sigmas):
        x, seen = step(variables, cond, x, jnp.float32(sigma), jnp.float32(following))
        for path, value in jax.device_get(seen).items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the input of {path} is not finite at sigma {sigma:.3f}")
            largest[path] = max(largest.get(path, 0.0), float(value))
    rule = rule_of(model.quant_rules, "fp8")
    units = tuple(sorted((path, fp8.unit_of(value)) for path, value in largest.items()))
    return model._replace(quant_rules=model.quant_rules._replace(fp8=rule._replace(units=units)))
