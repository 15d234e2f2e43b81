"""Every random number of a run comes from one of these keys. A sample is its key, whatever its batch or device.

| number | key |
|---|---|
| the LoRA's first A | the first half of the seed's key; the second is the state's |
| a candidate | state's key, iteration, SAMPLES; split into [P, N] |
| selection by chance | state's key, iteration, SELECTION |
| a sample's first noise | its key, NOISE |
| noise of its step i, in an SDE | its key, STEPS, i |
| first step of its window | its key, WINDOW |
| which of an epoch's updates takes it | its key, ORDER, epoch |
| its trained times and their noise | its key, POINTS, epoch |
| those of all samples of a prompt, if they share them | state's key, iteration, SHARED, epoch; split into [P] |
| pictures of an evaluation | seed's key, EVALUATION, place of the picture |
| pictures that FP8 is calibrated on | seed's key, CALIBRATION; split |

"a, b" is `jax.random.fold_in(a, b)`. The order of prompts (run/data.py) is NumPy's, from the seed and the epoch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from solrl_jax.structs import TrainState

SAMPLES, SELECTION, SHARED = range(3)
"""Purposes of an iteration's key."""
NOISE, ORDER, POINTS, STEPS, WINDOW = range(5)
"""Purposes of a sample's key."""
EVALUATION, CALIBRATION = 0xE7A1, 0xCA11B
"""Purposes of the seed's key. Not 0 or 1: fold_in(key, i) is split(key)[i], and `split_seed` splits it in two."""


def split_seed(key: Key[Array, ""]) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """(the LoRA's key, the state's key) from the seed's key."""
    for_lora, for_state = jax.random.split(key)
    return for_lora, for_state


def sample_keys(state: TrainState, prompts: int, candidates: int) -> Key[Array, "P N"]:
    """The keys of the coming iteration's candidates."""
    return jax.random.split(_of_iteration(state, SAMPLES), (prompts, candidates))


def selection_key(state: TrainState) -> Key[Array, ""]:
    """The key of the coming iteration's selection by chance."""
    return _of_iteration(state, SELECTION)


def shared_point_keys(state: TrainState, epoch: Int[Array, ""], prompts: int) -> Key[Array, "P"]:
    """The keys of the points that all samples of a prompt share in an epoch of the iteration."""
    return jax.random.split(jax.random.fold_in(_of_iteration(state, SHARED), epoch), prompts)


def _of_iteration(state: TrainState, purpose: int) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.fold_in(state.key, state.iteration), purpose)


def sample_key(key: Key[Array, ""], purpose: int, number: Int[Array, ""] | int | None = None) -> Key[Array, ""]:
    """The key of a sample for one `purpose`, and for the step or epoch `number` if the purpose has numbers."""
    key = jax.random.fold_in(key, purpose)
    return key if number is None else jax.random.fold_in(key, number)


def evaluation_keys(seed: int, first: int, count: int) -> Key[Array, "n"]:
    """The keys of pictures first .. first + count - 1 of an evaluation."""
    key = jax.random.fold_in(jax.random.key(seed), EVALUATION)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(count))


def calibration_key(seed: int) -> Key[Array, ""]:
    """The key of the pictures, one per prompt, on which FP8's units are measured."""
    return jax.random.fold_in(jax.random.key(seed), CALIBRATION)
