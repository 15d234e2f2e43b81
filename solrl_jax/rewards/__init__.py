"""Weighted mixtures of rewards: "pickscore:1,hpsv2:0.5". A reward is a file of this folder that defines `make`, or by
a name with a dot one of the user's own (`own`), which may run on the host.

The weighted sum is on the rewards' raw scales, as in DiffusionNFT's and Sol-RL's code; the parts stay beside it.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from solrl_jax.config import Config, ConfigError
from solrl_jax.rewards import own
from solrl_jax.structs import Params, PyTree, Reward, Row
from solrl_jax.weights import WeightsError


class Score(NamedTuple):
    """Rewards and their weights, in the order given. Hashable, a static argument; the towers' weights travel apart."""

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(reward.name for reward in self.rewards)

    @property
    def on_host(self) -> tuple[Reward, ...]:
        return tuple(reward for reward in self.rewards if reward.host is not None)


Asked = Mapping[str, Float[np.ndarray, "P"]]
"""1 where a prompt asks for a reward, else 0; all prompts ask for one that is not there (bound.Bound.masks)."""
NONE: Mapping[str, Any] = MappingProxyType({})

REWARDS = ("clipscore", "hpsv2", "imagereward", "ocr", "ocr_strict", "pickscore", "shapes")
"""Each is a file of this folder with `make(path, dtype) -> (Reward, params)`."""


def parse(mixture: str) -> dict[str, float]:
    """ "pickscore:1,hpsv2:0.5" -> {"pickscore": 1.0, "hpsv2": 0.5}; no weight is 1, the empty text is {}.

    Raises ConfigError for an unknown or repeated name and for a weight that is no finite number or is 0.
    """
    found = weights(mixture)
    for name in found:
        module(name, mixture)
    return found


def weights(mixture: str) -> dict[str, float]:
    """`parse` without asking whether the rewards are here: what a run elsewhere was trained on."""
    found: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in mixture.split(","))):
        name, _, text = (p.strip() for p in part.partition(":"))
        if name in found:
            raise ConfigError(f"reward {name!r} is twice in {mixture!r}: name it once, with one weight")
        try:
            found[name] = float(text) if text else 1.0
        except ValueError:
            found[name] = math.nan
        if not math.isfinite(found[name]) or found[name] == 0:
            raise ConfigError(
                f"weight {text!r} of reward {name!r}: give a finite number other than 0, as in {name}:0.5"
            )
    return found


def held_out(trained: str, others: str) -> dict[str, float]:
    """The rewards of the mixture `others` that `trained` has not: a reward in both counts as trained on."""
    mine = weights(trained)
    return {name: weight for name, weight in weights(others).items() if name not in mine}


def module(name: str, mixture: str = "") -> Any:
    """What defines a reward's `make`: a file of this folder or, for a name with a dot, own.Own. Raises ConfigError."""
    check_name(name, mixture)
    return own.find(name) if own.is_own(name) else importlib.import_module(f"solrl_jax.rewards.{name}")


def check_name(name: str, given: str = "") -> None:
    """ConfigError for a name that no reward can have. Nothing is imported: a user's own module need not be here.

    `given` is the whole text that has the name, for the message.
    """
    if own.is_own(name):
        own.check_name(name)
    elif name not in REWARDS:
        raise ConfigError(
            f"unknown reward {name!r} in {given or name!r}: use one of {', '.join(REWARDS)} "
            f"(there is no solrl_jax/rewards/{name}.py), or one of your own by its name with a dot, my_file.function"
        )


def check_unused(cfg: Config) -> None:
    """ConfigError if a name of reward_unused is not a reward's, or is that of a reward that the run uses."""
    given = f"reward_unused={','.join(cfg.reward_unused)}"
    for name in cfg.reward_unused:
        check_name(name, given)
        for field, mixture in (("reward", cfg.reward), ("evaluate.rewards", cfg.evaluate.rewards)):
            if name in weights(mixture):
                raise ConfigError(
                    f"{given}: {name} is in {field}={mixture} too, so the run does not do without it: take it out of "
                    "one of them"
                )


def parse_paths(pairs: Sequence[str]) -> dict[str, str]:
    """("clipscore=folder",) -> {"clipscore": "folder"}, or org/name; ConfigError for what is not name=folder."""
    paths = {}
    for pair in pairs:
        name, sign, folder = pair.partition("=")
        if not sign or not folder or not (own.is_own(name) or name in REWARDS):
            raise ConfigError(f"reward_paths={pair!r}: give name=folder, the name one of {', '.join(REWARDS)}")
        paths[name] = folder
    return paths


def load_rewards(mixture: str, paths: Mapping[str, str], dtype: str = "float32") -> tuple[Score, dict[str, Params]]:
    """The mixture, computed in `dtype`, and its towers' weights by reward name, read from paths[name].

    Raises ConfigError or WeightsError.
    """
    weights = parse(mixture)
    rewards, params = [], {}
    for name in weights:
        try:
            reward, params[name] = module(name).make(paths.get(name), dtype)
        except WeightsError as e:
            raise WeightsError(f"{e} (config field reward_paths: {name}=folder)") from e
        except ValueError as e:
            raise ConfigError(str(e)) from e
        rewards.append(reward)
    return Score(tuple(rewards), tuple(weights.values())), params


def tokenize(
    score: Score, prompts: Sequence[str], rows: Sequence[Row] | None = None, asked: Asked = NONE
) -> dict[str, PyTree]:
    """{reward name: its tokens, leaves [G, ...]}; without `rows` a prompt's row is {"prompt": text}.

    A caption or a row that a reward cannot read raises ConfigError; with `asked`, it has to read only the prompts that
    ask for it. A reward on the devices is given the first that asks in place of the others, or, if none does, the empty
    prompt: it scores every picture, and these scores are dropped.
    """
    tokens: dict[str, PyTree] = {}
    rows = [{"prompt": prompt} for prompt in prompts] if rows is None else rows
    for reward in score.rewards:
        try:
            mine = _asking(reward.name, asked, len(rows))
            if reward.host is None:
                others = set(range(len(rows))) - set(mine)
                stand_in = rows[mine[0]] if mine else {"prompt": ""}
                read = [stand_in if i in others else row for i, row in enumerate(rows)]
                tokens[reward.name] = own.with_rows(reward.tokenize, [row["prompt"] for row in read], rows=read)
                continue
            tokens[reward.name] = own.places(prompts)
            if mine:
                own.with_rows(reward.tokenize, [prompts[i] for i in mine], rows=[rows[i] for i in mine])
        except ValueError as e:
            raise ConfigError(f"reward {reward.name} cannot read a prompt: {e}") from e
    return tokens


def score_images(
    score: Score,
    params: Mapping[str, Params],
    images: Float[Array, "B H W C"],
    tokens: Mapping[str, Any],
    asked: Mapping[str, Float[Array, "B"]] = NONE,
) -> tuple[Float[Array, "B"], dict[str, Float[Array, "B"]]]:
    """Weighted sum and parts of B images of G prompts (token leaves [G, ...]); image i is of prompt i // (B // G).

    Without the rewards that run on the host, which `score_on_host` adds. Parts are 0 where `asked` is. A picture that
    is not finite has the score NaN: the 8 bits that some rewards look at would make a colour of it.
    """
    unseen = nan_if_not_finite(images)
    parts, total = {}, unseen
    for weight, r in zip(score.weights, score.rewards, strict=True):
        if r.host is None:
            part = r.score(params[r.name], images, tokens[r.name]) + unseen
            parts[r.name] = jnp.where(asked[r.name] > 0, part, 0.0) if r.name in asked else part
            total = total + weight * parts[r.name]
    return total, parts


def nan_if_not_finite(images: Float[Array, "B H W C"]) -> Float[Array, "B"]:
    """0, or NaN for an image that is not finite: added to its scores."""
    return jnp.where(jnp.all(jnp.isfinite(images), axis=(1, 2, 3)), 0.0, jnp.nan)


def eight_bit(images: Float[Array, "B H W 3"]) -> UInt8[Array, "B H W 3"]:
    """What rewards on the host look at, of images in [0, 1]."""
    return jnp.round(jnp.clip(images, 0, 1) * 255).astype(jnp.uint8)


def score_on_host(
    score: Score, images: UInt8[np.ndarray, "P n H W 3"], rows: Sequence[Row], asked: Asked = NONE
) -> tuple[Float[np.ndarray, "P n"], dict[str, Float[np.ndarray, "P n"]]]:
    """Weighted sum and parts of the rewards that run on the host alone, of P prompts' rows. Raises own.RewardError.

    A reward sees the pictures of the prompts that ask for it only; its part is 0 in the others.
    """
    shape, parts = images.shape[:2], {}
    total = np.zeros(shape, np.float32)
    for weight, reward in zip(score.weights, score.rewards, strict=True):
        if reward.host is not None:
            mine = _asking(reward.name, asked, len(rows))
            parts[reward.name] = part = np.zeros(shape, np.float32)
            if mine:
                flat = images[mine].reshape((-1, *images.shape[2:]))
                each = [rows[i] for i in mine for _ in range(shape[1])]
                part[mine] = own.ask(reward, flat, each).reshape((-1, shape[1]))
            total = total + np.float32(weight) * part
    return total, parts


def _asking(name: str, asked: Asked, count: int) -> list[int]:
    """The places, of `count`, of the prompts that ask for a reward."""
    return [i for i in range(count) if name not in asked or asked[name][i]]
