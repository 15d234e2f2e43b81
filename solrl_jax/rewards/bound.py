"""Rewards bound to prompts: a prompt's row may name, in its field "rewards", those that it is scored by.

A row without the field asks for all rewards. A held-out reward that no row names is asked for by every prompt. A reward
that a prompt does not ask for has no part in it: not a score of 0 beside other scores, but nothing to compare.
"""

import difflib
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from solrl_jax.config import Config, ConfigError
from solrl_jax.rewards import own
from solrl_jax.structs import Row

FIELD = "rewards"


class Bound(NamedTuple):
    """`tagged`: whether a row of the prompt files has the field. `always`: the held-out rewards that no row names."""

    tagged: bool = False
    always: frozenset[str] = frozenset()

    def asks(self, row: Row, name: str) -> bool:
        return FIELD not in row or name in row[FIELD] or name in self.always

    def masks(self, names: Iterable[str], rows: Sequence[Row]) -> dict[str, Float[np.ndarray, "P"]]:
        """{reward: 1 where a prompt asks for it, else 0}; {} if no row of the files has the field."""
        if not self.tagged:
            return {}
        return {name: np.array([self.asks(row, name) for row in rows], np.float32) for name in names}


def read(
    rows: Collection[Row], trained: Collection[str], held_out: Collection[str], unused: Collection[str] = ()
) -> Bound:
    """How the `rows` of all prompts bind the rewards; those in `unused` may be named and score nothing.

    ConfigError if a row names any other reward that is not configured, or if `unused` has a dotted name that is
    neither named by a row nor that of a module's reward.
    """
    tagged = [row for row in rows if FIELD in row]
    named = {name for row in tagged for name in row[FIELD]}
    check_unused(unused, named)
    for row in tagged:
        for name in row[FIELD]:
            if not any(name in some for some in (trained, held_out, unused)):
                there = f"reward={','.join(trained)}, evaluate.rewards={','.join(held_out)}"
                raise ConfigError(
                    f"the prompt {row['prompt']!r:.60} asks for reward {name!r}, which is not configured ({there}): "
                    f'add it to one of them, or to reward_unused to do without it, or name others in its "{FIELD}"'
                )
    return Bound(bool(tagged), frozenset(held_out) - named)


def check_unused(unused: Collection[str], named: Collection[str]) -> None:
    """ConfigError for a dotted name in `unused` that is not among those `named` by prompts and cannot be imported.

    A reward that prompts name is not imported: a run that does without it does not need its module.
    """
    for name in [n for n in unused if own.is_own(n) and n not in named]:
        try:
            own.find(name)
        except ConfigError as e:
            near = difflib.get_close_matches(name, named, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(
                f"reward_unused={','.join(unused)}: no prompt asks for {name}, and it is not a reward of a module here "
                f"({e}): correct the name{hint}, or take it out"
            ) from None


def check_training(bound: Bound, rows: Collection[Row], trained: Sequence[str], cfg: Config) -> None:
    """ConfigError if one of the training prompts' `rows` asks for no trained reward or no row for one of these, or if
    sums of different rewards would be divided by one std."""
    if not bound.tagged or not trained:
        return
    nothing = next((row for row in rows if not any(bound.asks(row, name) for name in trained)), None)
    if nothing is not None:
        raise ConfigError(
            f"the prompt {nothing['prompt']!r:.60} asks for no reward that is trained on, only for "
            f'{", ".join(nothing[FIELD])}: name one of {", ".join(trained)} in its "{FIELD}" too, or take the prompt '
            "out of the training prompts"
        )
    for name in trained:
        if not any(bound.asks(row, name) for row in rows):
            raise ConfigError(
                f"no training prompt asks for reward {name}, which is trained on: take it out of the config's reward, "
                f'or name it in the "{FIELD}" of a row'
            )
    partial = next((row for row in rows if not all(bound.asks(row, name) for name in trained)), None)
    if partial is not None and cfg.reward_rule == "sum" and cfg.learn.advantage_spread == "all":
        raise ConfigError(
            f"the prompt {partial['prompt']!r:.60} asks for some of the rewards only, and learn.advantage_spread=all "
            "divides the sums of all prompts by one std, whatever their rewards' scales: set "
            "learn.advantage_spread=prompt"
        )


def notes(bound: Bound, rows: Collection[Row], names: Iterable[str]) -> list[str]:
    """A line for each reward that only some of the training prompts' `rows` ask for."""
    counts = {name: sum(bound.asks(row, name) for row in rows) for name in names}
    return [f"{count} of {len(rows)} training prompts ask for {k}" for k, count in counts.items() if count < len(rows)]
