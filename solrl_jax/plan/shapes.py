"""Everything in a run as shapes and dtypes (jax.ShapeDtypeStruct): like `assemble`, without reading weights."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from solrl_jax import guidance, learn, rewards, sampler
from solrl_jax.config import Config, ConfigError
from solrl_jax.rewards import Score, own
from solrl_jax.run import assemble
from solrl_jax.sampler import Carry
from solrl_jax.structs import Frozen, Model, Params, Prompts, PyTree, Rollout, TrainState, Trajectory
from solrl_jax.weights import hub


class Sizes(NamedTuple):
    """Everything in a run, in shapes; prompts and tokens are one device's share."""

    model: Model
    score: Score
    frozen: Frozen
    towers: dict[str, Params]  # of the held-out rewards
    text: Params
    tokens: PyTree
    prompts: Prompts
    judged: Score  # the trained rewards, then the held-out ones
    captions: dict[str, PyTree]  # their tokens
    notes: tuple[str, ...]
    training: bool = True  # whether there is a training's state


def read(cfg: Config, devices: int, *, training: bool = True) -> Sizes:
    """Shapes and dtypes as `assemble` would load them. Without `training` prompts need not divide over the devices."""
    if training and cfg.prompts % devices:
        raise ConfigError(f"prompts={cfg.prompts} do not divide over {devices} devices: use a multiple of {devices}")
    module, mine = assemble.model_module(cfg), -(-cfg.prompts // devices)
    model = module.make(cfg.model)
    guidance.check(cfg, model)
    if training:
        guidance.check_training(cfg, model)
    base, vae, text = module.shapes(cfg.model)
    paths, notes = rewards.parse_paths(cfg.reward_paths), []
    wanted, found = rewards.parse(cfg.reward), {}
    judging = cfg.evaluate.every > 0 or not training
    for name in {**wanted, **(rewards.parse(cfg.evaluate.rewards) if judging else {})}:
        reward = rewards.module(name)
        shapes = getattr(reward, "shapes", None)
        if shapes is None:
            notes.append(f"reward {name} is not counted: rewards/{name}.py defines no shapes(path)")
            continue
        try:
            found[name] = shapes(paths.get(name), cfg.reward_dtype)
        except own.RewardError as e:
            notes.append(f"reward {name} is not counted: {e}")
            continue
        path, public = paths.get(name), getattr(reward, "HUB_ID", "another model")
        if not own.is_own(name) and jax.tree.leaves(found[name][1]) and path != public and hub.here(path) is None:
            what = f"nothing is at reward_paths={name}={path or '...'}"
            notes.append(f"reward {name} has its public sizes here, {public}'s: {what}")
    trained = [name for name in wanted if name in found]
    weights = {**rewards.held_out(cfg.reward, cfg.evaluate.rewards), **wanted}
    everyone = [*trained, *(name for name in found if name not in trained)]
    captions = {name: batch(found[name][2], mine) for name in everyone}
    tokens = module.token_shapes(cfg.model, mine)
    cond = jax.eval_shape(model.encode, text, tokens)
    negative = batch(cond, 1) if training and guidance.trains_doubled(cfg, model) else None
    return Sizes(
        model=model,
        score=Score(tuple(found[name][0] for name in trained), tuple(wanted[name] for name in trained)),
        frozen=Frozen(base, vae, {name: found[name][1] for name in trained}, negative),
        towers={name: params for name, (_, params, _) in found.items() if name not in trained},
        text=text,
        tokens=tokens,
        prompts=Prompts(cond, {name: captions[name] for name in trained}),
        judged=Score(tuple(found[name][0] for name in everyone), tuple(weights[name] for name in everyone)),
        captions=captions,
        notes=tuple(notes),
        training=training,
    )


def with_configs(cfg: Config, folder: str | Path) -> Config:
    """`cfg` with its model's public configs, written to `folder`, if it names a public model; else unchanged.

    If it names no model, the first one in the model file's PUBLIC is used.
    """
    public = assemble.model_module(cfg).PUBLIC
    name = cfg.model.path or next(iter(public), "")
    if name not in public:
        return cfg
    path = str(hub.write_configs(folder, public[name]))
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, path=path))


def batch(tree: PyTree, count: int) -> PyTree:
    """Shapes whose leading axis is replaced by one of `count`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), tree)


def keys(prompts: int, images: int) -> Any:
    return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (prompts, images)))


def samples(cfg: Config, sizes: Sizes, prompts: int, images: int) -> Rollout:
    """`images` samples for each of `prompts` prompts, as `learn` takes them."""
    grid, x0 = (prompts, images), latents(sizes, prompts, images)
    reward: Any = jax.ShapeDtypeStruct(grid, jnp.float32)
    path: Any = None
    if cfg.of_steps:
        states: Any = jax.ShapeDtypeStruct((*grid, cfg.regenerate.trainable + 1, *x0.shape[2:]), jnp.float32)
        first: Any = jax.ShapeDtypeStruct(grid, jnp.int32)
        path = Trajectory(states, first)
    return Rollout(keys(*grid), x0, reward, {name: reward for name in sizes.score.names}, path)


def states(cfg: Config, sizes: Sizes, prompts: int, images: int) -> Carry | None:
    """The states with which a branch's `images` candidates for each of `prompts` prompts go on; None without one."""
    if cfg.branch is None:
        return None
    steps = sampler.table(np.array([1.0, 0.5, 0.0]), cfg.regenerate.solver)
    return jax.eval_shape(lambda x: sampler.at_noise(x, steps), latents(sizes, prompts, images))


def latents(sizes: Sizes, prompts: int, images: int) -> Any:
    noise = jax.eval_shape(lambda: sizes.model.noise(jax.random.key(0)))
    return jax.ShapeDtypeStruct((prompts, images, *noise.shape), jnp.float32)


def blank(cfg: Config, sizes: Sizes) -> TrainState:
    """A run's state in shapes."""
    begin = functools.partial(learn.init_state, model=sizes.model, optimizer=learn.make_optimizer(cfg), cfg=cfg)
    return jax.eval_shape(lambda frozen: begin(jax.random.key(0), frozen), sizes.frozen)


def parameters(tree: PyTree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))
