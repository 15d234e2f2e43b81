"""Guidance of weight w: v = v_neg + w (v_pos - v_neg). w = 1: no guidance, by the program without it.

How a model is guided is its `Model.guidance`:
    "cfg"       classifier-free: v_pos is the velocity for the prompt, v_neg for a negative conditioning, that of the
                empty prompt by default. One call of the network has 2B rows, first the negative ones.
    "embedded"  the network was distilled from guided velocities, and w is one of its inputs: no second row.
    "none"      neither: w is 1.
v is linear in the network's output, so a solver's table holds for it as it stands.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from solrl_jax import algos, config
from solrl_jax.config import Config, ConfigError, Stage
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


def twice(model: Model, w: float, given: PyTree) -> PyTree:
    """Arrays [B, ...] for the rows that a call at guidance w has: [2B, ...] where it doubles, else as they are."""
    return jax.tree.map(lambda x: jnp.concatenate([x, x]), given) if doubles(model, w) else given


def velocity(model: Model, w: float) -> Guided:
    """The model's velocity at guidance w, of a conditioning of `conditioned`."""
    if not doubles(model, w):
        return model.velocity

    def guided(variables: Variables, x: Array, sigma: Array, cond: PyTree) -> Array:
        x, sigma = twice(model, w, (x, sigma))
        both = model.velocity(variables, x, sigma, cond)
        away, toward = jnp.split(both, 2)
        return away + w * (toward - away)

    return guided


# --- of a training --------------------------------------------------------------------------------------------------


def of(stage: Stage) -> float:
    """The w of a stage; 1, none, where its field is 0, not given."""
    return stage.guidance or 1.0


class Weights(NamedTuple):
    """The w of the preview, of the samples, of the policies that the loss compares, and of its reference."""

    explore: float
    regenerate: float
    learn: float
    kl: float


FIELDS = ("explore.guidance", "regenerate.guidance", "learn.guidance", "learn.kl_guidance")
"""The config's field of each of Weights."""


def weights(cfg: Config) -> Weights:
    """Each w of a training; one that is not given is the one before it, so that what draws is what learns."""
    drawn = of(cfg.regenerate)
    learnt = cfg.learn.guidance or drawn
    return Weights(of(cfg.preview or cfg.regenerate), drawn, learnt, cfg.learn.kl_guidance or learnt)


def check_training(cfg: Config, model: Model) -> list[str]:
    """What to warn of in the config's combination of weights. ConfigError if the model, the algorithm or the loss makes
    no sense of it.

    The policy is the guided velocity, in the rollouts and in the loss, with gradients through both rows; or it is the
    plain one, in both. With learn.guidance=1 the reference may be guided: its penalty then pulls the policy, which is
    drawn without guidance, to the guided base (CRD, arXiv 2603.14128).
    """
    w, learn = weights(cfg), cfg.learn
    given = dict(config.values(cfg))
    for name in _named(w, cfg):
        if given[name] > 1:
            _require_guidance(model, f"{name}={given[name]:g}")
    _check_preview(w, cfg, model)
    given = f"learn.guidance={w.learn:g} with regenerate.guidance={w.regenerate:g}"
    if w.learn != w.regenerate:
        if cfg.of_steps:
            raise ConfigError(
                f"{given}: learn.algorithm={learn.algorithm} takes the probability of the steps that were drawn, whose "
                "mean is the guided one: give both the same"
            )
        if w.learn != 1:
            raise ConfigError(f"{given}: no policy draws so or did: give both the same, or learn.guidance=1")
        if learn.advantage_mode in ("positive_only", "one_only"):
            raise ConfigError(
                f"{given}, learn.advantage_mode={learn.advantage_mode}: guided samples that all count as good are "
                "distilled, whatever the rewards say: use learn.advantage_mode=all, or give both the same guidance"
            )
    return [*_check_reference(w, cfg, model), *_warnings(w, cfg)]


def trains_doubled(cfg: Config, model: Model) -> bool:
    """Whether a training's stages need the negative conditioning."""
    return any(doubles(model, w) for w in weights(cfg))


def text_of_training(cfg: Config, model: Model) -> str | None:
    """The text of a run's negative conditioning, the empty prompt; None if neither the training nor an evaluation has
    one."""
    evaluates = cfg.evaluate.every and (doubles(model, evaluated(cfg)) or doubles(model, own(cfg, model) or 1.0))
    return "" if evaluates or trains_doubled(cfg, model) else None


def told(cfg: Config, model: Model) -> list[str]:
    """What a run's log says of guidance: every w if one is not 1, warnings, and the w of its evaluations if the base's
    own is another one."""
    w, shown, said = weights(cfg), evaluated(cfg), []
    if model.distilled:
        said.append(
            f"warning: this {model.name} was distilled to draw in few steps without guidance: training loses that "
            "ability; train the base model of its family if you need it"
        )
    if any(value != 1 for value in w):
        said.append("guidance: " + ", ".join(f"{name}={value:g}" for name, value in _named(w, cfg).items()))
    said += [f"warning: {line}" for line in check_training(cfg, model)]
    if cfg.evaluate.every and model.guided not in (1, shown):
        where = "the first evaluation shows" if own(cfg, model) else "--mode=eval shows"
        said.append(
            f"evaluations are at guidance {shown:g}, also the base's; its own is {model.guided:g}: {where} it there too"
        )
    return said


def _named(w: Weights, cfg: Config) -> dict[str, float]:
    """Each w by the name of its field; that of the preview only if there is one."""
    named = dict(zip(FIELDS, w, strict=True))
    return {name: value for name, value in named.items() if cfg.explore is not None or name != FIELDS[0]}


def _check_preview(w: Weights, cfg: Config, model: Model) -> None:
    """ConfigError if the preview's w may not differ from the samples'."""
    if w.explore == w.regenerate:
        return
    given = f"explore.guidance={w.explore:g} with regenerate.guidance={w.regenerate:g}"
    if cfg.branch is not None:
        raise ConfigError(f"{given}: a branch is one solve, give both the same, or set branch=none")
    if model.guidance == "embedded":
        raise ConfigError(f"{given}: this {model.name} takes guidance as a number, which costs nothing: use the same")


def _check_reference(w: Weights, cfg: Config, model: Model) -> list[str]:
    """What to warn of in the reference's w. ConfigError if it has no effect, or is not a reference of the policy."""
    if w.kl == w.learn:
        return []
    given, weight = f"learn.kl_guidance={w.kl:g} with learn.guidance={w.learn:g}", cfg.learn.kl_weight
    name = f"learn.algorithm={cfg.learn.algorithm}"
    if "reference" not in algos.find(cfg.learn.algorithm).fixed(dataclasses.replace(cfg.learn, kl_weight=1.0)):
        raise ConfigError(f"{given} has no effect: {name} has no reference: leave learn.kl_guidance out")
    if not weight:
        raise ConfigError(f"{given} has no effect, for no reference is computed: give learn.kl_weight, such as 0.1")
    if w.learn != 1 and model.guidance == "cfg":
        raise ConfigError(
            f"{given}: the penalty would be that of a change of guidance, not of the policy: give both the same, or "
            "learn.guidance=1"
        )
    if cfg.of_steps and model.guidance == "cfg":
        raise ConfigError(
            f"{given}: {name} compares the means of a step that was drawn, which have one guidance: give both the same"
        )
    if w.learn != 1 or weight >= 0.01:
        return []
    return [f"{given}: learn.kl_weight={weight:g} hardly pulls the policy to the guided base; 0.01 to 0.1 does"]


def _warnings(w: Weights, cfg: Config) -> list[str]:
    said = []
    if w.explore != w.regenerate:
        said.append(
            f"the preview is at guidance {w.explore:g}, the samples at {w.regenerate:g}: from one noise they draw "
            "different pictures; watch/spearman says whether the preview still ranks them"
        )
    if w.learn != w.regenerate:
        said.append(
            f"the samples are drawn at guidance {w.regenerate:g} and the loss is of velocities at {w.learn:g}: it "
            f"improves another policy than the one that draws; keep learn.kl_weight above 0 (it is "
            f"{cfg.learn.kl_weight:g}), and evaluate at {w.regenerate:g} and at {w.learn:g}"
        )
    return said


# --- of an evaluation -----------------------------------------------------------------------------------------------


def evaluated(cfg: Config) -> float:
    """The w of evaluations and of --mode=sample."""
    return cfg.evaluate.guidance or of(cfg.regenerate)


def text_of(cfg: Config, model: Model, negative: str | None = None) -> str | None:
    """The text of an evaluation's negative conditioning, the empty prompt unless it is given; None if it has none."""
    return (negative or "") if doubles(model, evaluated(cfg)) else None


def own(cfg: Config, model: Model) -> float | None:
    """The base's own w, if a run's evaluation draws the base at it too; None if it is the evaluation's, or 1."""
    w = model.guided
    return w if cfg.evaluate.every and cfg.evaluate.own and w not in (1, evaluated(cfg)) else None


def check(cfg: Config, model: Model, negative: str | None = None) -> None:
    """ConfigError unless the model can be evaluated at the config's w, with the text of --negative if it is given."""
    w = evaluated(cfg)
    if w != 1:
        _require_guidance(model, f"{'evaluate' if cfg.evaluate.guidance else 'regenerate'}.guidance={w:g}")
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
        why = "it was distilled to draw without" if model.distilled else "it has no input for it, as FLUX.1-schnell"
        raise ConfigError(
            f"{given}: this {model.name} takes no guidance ({why}): leave it at 1, or set model.guidance=cfg, "
            "classifier-free guidance, for which it was not made"
        )


def titled(name: str, w: float) -> str:
    """`name` of pictures or rewards at guidance w: "base", or "base w=4.5"."""
    return name if w == 1 else f"{name} w={w:g}"
