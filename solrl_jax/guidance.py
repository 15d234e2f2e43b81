"""Guidance of weight w: v = v_neg + w (v_pos - v_neg). w = 1 is none, and then the program is the one without it.

How a model is guided is its `Model.guidance`:
    "cfg"       classifier-free: v_pos is the velocity for the prompt, v_neg for a negative conditioning, that of the
                empty prompt by default. One call of the network has 2B rows, first the negative ones.
    "embedded"  the network was distilled from guided velocities, and w is one of its inputs: no second row.
    "none"      neither: w is 1.
v is linear in the network's output, so a solver's table holds for it as it stands.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from solrl_jax.config import Config, ConfigError
from solrl_jax.structs import Model, PyTree, Variables

Guided = Callable[[Variables, Array, Array, PyTree], Array]
"""velocity(variables, x [B, ...], sigma [B], conditioning of `conditioned`) -> f32 like x."""


def doubles(model: Model, w: float) -> bool:
    """Whether a guided call has two rows for each sample, and needs the negative conditioning."""
    return w != 1 and model.guidance == "cfg"


def conditioned(model: Model, cond: PyTree, negative: PyTree, w: float) -> PyTree:
    """What `velocity(model, w)` takes for B samples, of their conditioning, leaves [B, ...].

    `negative` has leaves [1, ...], and is used only by "cfg": the result then has leaves [2B, ...], the negative rows
    first. Raises ConfigError if the model takes no guidance.
    """
    if w == 1:
        return cond
    if not doubles(model, w):
        _require_guidance(model, f"guidance {w:g}")
        count = jax.tree.leaves(cond)[0].shape[0]
        return {**cond, "guidance": jnp.full((count,), w, jnp.float32)}
    return jax.tree.map(lambda n, c: jnp.concatenate([jnp.broadcast_to(n, c.shape), c]), negative, cond)


def velocity(model: Model, w: float) -> Guided:
    """The model's velocity at guidance w, of a conditioning of `conditioned`."""
    if not doubles(model, w):
        return model.velocity

    def guided(variables: Variables, x: Array, sigma: Array, cond: PyTree) -> Array:
        both = model.velocity(variables, jnp.concatenate([x, x]), jnp.concatenate([sigma, sigma]), cond)
        away, toward = jnp.split(both, 2)
        return away + w * (toward - away)

    return guided


# --- of an evaluation -----------------------------------------------------------------------------------------------


def evaluated(cfg: Config) -> float:
    """The w of evaluations and of --mode=sample."""
    return cfg.evaluate.guidance or cfg.regenerate.guidance


def text_of(cfg: Config, model: Model, negative: str | None = None) -> str | None:
    """The text of an evaluation's negative conditioning, the empty prompt unless it is given; None if it has none."""
    return (negative or "") if doubles(model, evaluated(cfg)) else None


def check(cfg: Config, model: Model, negative: str | None = None) -> None:
    """ConfigError unless the model can be evaluated at the config's w, with the text of --negative if it is given."""
    w = evaluated(cfg)
    if w != 1:
        _require_guidance(model, f"evaluate.guidance={w:g}")
    if negative is None:
        return
    given = f"--negative={negative!r}"
    _require_guidance(model, given)
    if model.guidance == "embedded":
        raise ConfigError(
            f"{given}: guidance of this {model.name} is a number that the network takes, without a negative prompt: "
            "leave it out, or set model.guidance=cfg"
        )
    if w == 1:
        raise ConfigError(f"{given} has no effect at guidance 1: give --guidance above 1, such as {model.guided:g}")


def _require_guidance(model: Model, given: str) -> None:
    if model.guidance == "none":
        raise ConfigError(
            f"{given}: this {model.name} takes no guidance (it has no input for it, as FLUX.1-schnell): leave it at 1, "
            "or set model.guidance=cfg, classifier-free guidance, for which it was not made"
        )


def titled(name: str, w: float) -> str:
    """`name` of pictures or rewards at guidance w: "base", or "base w=4.5"."""
    return name if w == 1 else f"{name} w={w:g}"
