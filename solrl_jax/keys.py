"""Every random number of a run comes from a key that is made here."""

import jax
from jaxtyping import Array, Int, Key

from solrl_jax.structs import (
    TrainState,
)

NOISE, ORDER, POINTS, STEPS, WINDOW = range(5)  # what a sample's key is folded with: each use has a key of its own


def sample_keys(state: TrainState, prompts: int, candidates: int) -> Key[Array, "P N"]:
    """This iteration's samples. A sample is its key, whatever batch or device it falls to."""
    return jax.random.split(_purpose(state, 0), (prompts, candidates))


def _purpose(state: TrainState, which: int) -> Key[Array, ""]:
    """Keys of one iteration apart by purpose: 0 for its samples, 1 for its random selection."""
    return jax.random.fold_in(jax.random.fold_in(state.key, state.iteration), which)


def chooser(state: TrainState) -> Key[Array, ""]:
    """The key of this iteration's random selection, apart from every sample's key."""
    return _purpose(state, 1)


def _use(key: Key[Array, ""], use: int, epoch: Int[Array, ""] | int) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.fold_in(key, use), epoch)
