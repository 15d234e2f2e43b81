"""The user's own rewards, by a dotted name: `package.module`, or `module.function` of a single file.

A module defines `make(path, dtype) -> (Reward, params)`, like the rewards of this folder, which runs on the devices. Or
it sets `HOST = True` and defines `score(images, prompts) -> one number per picture`, plain Python that is called on the
host between the staged calls. In the form `module.function`, the function replaces `make` or `score`.

A host function, and a Reward's `tokenize`, gets the prompts' rows too if it has a parameter for them (`with_rows`).
"""

import copy
import functools
import importlib
import importlib.util
import inspect
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from solrl_jax.config import ConfigError
from solrl_jax.structs import Params, PyTree, Reward, Row


class RewardError(ValueError):
    """A reward that raised or did not give one score per picture; the message names the reward and the problem."""


class Own(NamedTuple):
    """The functions of a module of `solrl_jax.rewards`, for a user's own reward; its `shapes` reads the weights."""

    make: Callable[[str | None, Any], tuple[Reward, Params]]
    shapes: Callable[[str | None, Any], tuple[Reward, Params, PyTree]]


def is_own(name: str) -> bool:
    return "." in name


def check_name(name: str) -> None:
    """ConfigError if it is not identifiers with dots between them."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"reward {name!r} is not a dotted name: give package.module, or module.function")


def find(name: str) -> Own:
    """The reward with a dotted name, from sys.path or the current folder. ConfigError if importing its file fails."""
    module, function = _module(name)
    host = getattr(module, "HOST", False)
    wanted = function or ("score" if host else "make")
    found = getattr(module, wanted, None)
    if not callable(found):
        rule = "a function make(path, dtype), or HOST = True and a function score(images, prompts)"
        raise ConfigError(f"reward {name!r}: {_place(module)} defines no function {wanted}: it needs {rule}")
    make = functools.partial(on_host if host else _on_device, name, found)
    return Own(make, functools.partial(_shapes, make))


# --- import ---------------------------------------------------------------------------------------------------------


def _module(name: str) -> tuple[types.ModuleType, str]:
    """(module, "") if `name` is a module, else (the module before the last dot, the part after it)."""
    folder = str(Path.cwd())
    if not {"", folder} & set(sys.path):
        sys.path.append(folder)  # as with `python -m`
    importlib.invalidate_caches()
    before, _, last = name.rpartition(".")
    for module, function in ((name, ""), (before, last)):
        if _is_there(module, name):
            return _guarded(name, importlib.import_module, module), function
    raise ConfigError(
        f"reward {name!r}: there is no module {name} and no module {before} in {folder} or on sys.path (PYTHONPATH)"
    )


def _is_there(module: str, name: str) -> bool:
    """Whether the module exists. Its parent packages are imported; ConfigError if that fails."""

    def look() -> bool:
        try:
            return importlib.util.find_spec(module) is not None
        except ModuleNotFoundError as e:
            if e.name is not None and f"{module}.".startswith(f"{e.name}."):  # not an import in its package
                return False
            raise

    return _guarded(name, look)


def _guarded(name: str, run: Callable, *args: Any) -> Any:
    """run(*args), which runs the user's file; an error there becomes a ConfigError with its line."""
    try:
        return run(*args)
    except ConfigError:
        raise
    except Exception as e:
        raise ConfigError(f"reward {name!r} cannot be made: {_raised(e)}") from e


def _raised(e: Exception) -> str:
    """ "KeyError: 'x' (my_file.py, line 7)" """
    at = [frame for frame in traceback.extract_tb(e.__traceback__) if not frame.filename.startswith("<frozen")][-1]
    where = (e.filename, e.lineno) if isinstance(e, SyntaxError) else (at.filename, at.lineno)
    what = str(e).strip().splitlines()[0] if str(e).strip() else "no message"
    return f"{type(e).__name__}: {what} ({where[0]}, line {where[1]})"


def _place(module: types.ModuleType) -> str:
    return getattr(module, "__file__", None) or module.__name__


# --- on the devices -------------------------------------------------------------------------------------------------


def _on_device(name: str, make: Callable, path: str | None, dtype: Any) -> tuple[Reward, Params]:
    """The user's (Reward, params), with the dotted name; ConfigError for anything else."""
    found = _guarded(name, make, path, plain(dtype))
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Reward)):
        raise ConfigError(
            f"reward {name!r}: its function gives {type(found).__name__}: return (solrl_jax.structs.Reward, params)"
        )
    return _checked(name, found[0]), found[1]


def plain(dtype: Any) -> Any:
    """The config's reward_dtype as a dtype's name; how float32 is multiplied concerns this folder's networks alone."""
    return "float32" if isinstance(dtype, str) and dtype == "float32_exact" else dtype


@functools.lru_cache
def _checked(name: str, reward: Reward) -> Reward:
    """The same reward gives the same Reward object, as jit's static arguments require."""
    return Reward(name, reward.tokenize, functools.partial(_score, name, reward.score))


def _score(name: str, score: Callable, params: Params, images: Array, tokens: PyTree) -> Float[Array, "B"]:
    try:
        found = score(params, images, tokens)
    except Exception as e:  # whatever a user's function raises
        raise RewardError(f"reward {name} failed: {_raised(e)}") from e
    if found.shape != (len(images),):  # (B, 1) would be broadcast to (B, B)
        raise RewardError(f"reward {name} gives {list(found.shape)} for {len(images)} pictures: give [{len(images)}]")
    return found.astype("float32")


def _shapes(make: Callable, path: str | None, dtype: Any) -> tuple[Reward, Params, PyTree]:
    """The reward, its weights and one prompt's tokens, the last two as ShapeDtypeStructs.

    RewardError if it cannot read an empty prompt, whose row has no other field.
    """
    reward, params = make(path, plain(dtype))

    def tokens() -> PyTree:
        try:
            return with_rows(reward.tokenize, [""], rows=[{"prompt": ""}])
        except Exception as e:  # whatever a user's function raises
            raise RewardError(f"its tokenize cannot read an empty prompt without other fields: {_raised(e)}") from e

    return reward, *jax.eval_shape(lambda: (params, tokens()))


# --- rows -----------------------------------------------------------------------------------------------------------


def with_rows(function: Callable, *given: Any, rows: Sequence[Row]) -> Any:
    """function(*given), or with copies of `rows` as one more argument, if it has a parameter that is named `rows` or
    one more positional parameter without a default."""
    how = _takes_rows(function, len(given))
    if how is None:
        return function(*given)
    copies = [copy.deepcopy(row) for row in rows]  # what a function writes into them is gone after the call
    return function(*given, rows=copies) if how == "by name" else function(*given, copies)


@functools.lru_cache
def _takes_rows(function: Callable, before: int) -> Literal["by name", "by place"] | None:
    """How a function is given rows behind its first `before` arguments."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature
        return None
    only = inspect.Parameter.POSITIONAL_ONLY
    if any(p.name == "rows" and p.kind != only for p in parameters[before:]):
        return "by name"
    places = [p for p in parameters if p.kind in (only, inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    more = places[before] if len(places) > before else None
    return "by place" if more is not None and (more.name == "rows" or more.default is more.empty) else None


# --- on the host ----------------------------------------------------------------------------------------------------


def places(prompts: Sequence[str]) -> Int[np.ndarray, "G"]:
    """The tokens of a reward that runs on the host: where in the batch a prompt is, whichever device scores it."""
    return np.arange(len(prompts), dtype=np.int32)


def on_host(
    name: str, function: Callable, path: str | None, dtype: Any, tokenize: Callable[..., PyTree] = places
) -> tuple[Reward, Params]:
    """The reward that calls `function`; `tokenize` gives `places`, and ValueError for prompts that it cannot read."""
    if path is not None:
        raise ConfigError(f"reward {name!r} runs on the host and reads no path ({path!r}): remove it from reward_paths")
    return Reward(name, tokenize, nowhere, function), {}


def nowhere(params: Params, images: Array, tokens: PyTree) -> Float[Array, "B"]:
    raise ConfigError("a reward that runs on the host cannot be part of a jitted program: set staged=true")


def ask(reward: Reward, images: UInt8[np.ndarray, "B H W 3"], rows: Sequence[Row]) -> Float[np.ndarray, "B"]:
    """A host reward's scores of B pictures with one row each. RewardError unless it gives B finite numbers."""
    assert reward.host is not None
    prompts = [row["prompt"] for row in rows]
    rule = f"it must return {len(images)} finite numbers, one per picture"
    try:
        found = with_rows(reward.host, images.copy(), list(prompts), rows=rows)
    except Exception as e:  # whatever a user's function raises
        raise RewardError(f"reward {reward.name} failed: {_raised(e)}") from e
    try:
        scores = np.asarray(found, np.float32)
    except (TypeError, ValueError) as e:
        raise RewardError(f"reward {reward.name} returned {type(found).__name__}: {rule}") from e
    if scores.shape != (len(images),):
        raise RewardError(
            f"reward {reward.name} returned shape {list(scores.shape)} for {len(images)} pictures: {rule}"
        )
    if not np.isfinite(scores).all():
        first = int(np.argmin(np.isfinite(scores)))
        raise RewardError(
            f"reward {reward.name} returned {scores[first]} for a picture of {prompts[first]!r:.60}: {rule}"
        )
    return scores
