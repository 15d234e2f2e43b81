"""Changing one option of a public folder's file at a time, and asking both libraries what comes of it.

What happens decides, no list of ours: a changed option is taken (our output is the library's, which changed), refused
(an error of ours that names it), or without effect (the library's output is what it was, and so is ours).
"""

import copy
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from solrl_jax.config import ConfigError
from solrl_jax.weights import WeightsError

MISSING = object()
"""The option left out, so that a default takes its place."""
NOTES = {
    "_class_name": "says which class reads the file: theirs are named by the tests",
    "_diffusers_version": "what wrote the file",
    "_name_or_path": "where it was copied from",
    "transformers_version": "what wrote the file",
    "architectures": "the class of a whole model, of which an encoder is a part",
    "model_type": "says which class reads the file: theirs are named by the tests",
    "dtype": "what the file's tensors are stored in: computed is in model.dtype",
    "torch_dtype": "as dtype, in older files",
}
"""Options that are not changed, each with its reason."""
NEW = "an_attention_of_a_newer_version"
"""An option that no library knows, named as one that shapes a network would be."""

TOGETHER = (
    "does not hold the weights that its config describes",
    "tokens, its text encoder only",
    "transformers cannot read its tokenizer",
)
"""Errors that name what several options are at odds with, and no one of them."""


class Case(NamedTuple):
    """One file of one part of a folder."""

    file: Path
    theirs: Callable[[dict[str, Any]], np.ndarray]  # the library's output by the file's content
    ours: Callable[[], np.ndarray]  # by the file itself
    others: Mapping[str, list[Any]] = {}  # values that the library knows, where no rule finds them
    inner: tuple[str, ...] = ()  # options that are objects of options
    tolerance: float = 3e-5


class Verdicts(NamedTuple):
    taken: set[str]
    refused: set[str]
    idle: set[str]  # without effect
    problems: list[str]


def examine(case: Case) -> Verdicts:
    """Every option of the file in every changed value. A base that is not the library's is an AssertionError."""
    raw, text = json.loads(case.file.read_text()), case.file.read_text()
    base = np.asarray(case.theirs(copy.deepcopy(raw)))
    assert _apart(np.asarray(case.ours()), base) < case.tolerance, "the unchanged file already differs"
    verdicts = Verdicts(set(), set(), set(), [])
    try:
        for name, value, changed in _changes(raw, case):
            case.file.write_text(json.dumps(changed))
            _judge(case, verdicts, name, value, changed, base)
    finally:
        case.file.write_text(text)
    return verdicts


def _changes(raw: dict[str, Any], case: Case) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(option, its value, the file's content)."""
    for key in raw:
        if key in NOTES:
            continue
        if key in case.inner:
            for name, value, inside in _changes(raw[key], case):
                yield f"{key}.{name}", value, {**raw, key: inside}
            continue
        for value in (*_other(key, raw[key], case.others), None, MISSING):
            if value is MISSING:
                yield key, value, {k: x for k, x in raw.items() if k != key}
            elif value != raw[key] or type(value) is not type(raw[key]):
                yield key, value, {**raw, key: value}
    yield NEW, True, {**raw, NEW: True}


def _other(key: str, value: Any, others: Mapping[str, list[Any]]) -> list[Any]:
    if key in others:
        return others[key]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value or 1]
    if isinstance(value, float):
        return [1.5 * value + 0.25 if math.isfinite(value) else -5.0]
    if isinstance(value, list) and value and all(type(x) is int for x in value):
        return [[2 * value[0], *value[1:]], value[:-1]]
    raise AssertionError(f"say what other values of {key} there are: it is {value!r}")


def _judge(case: Case, verdicts: Verdicts, name: str, value: Any, changed: dict[str, Any], base: np.ndarray) -> None:
    shown = f"{name} = {'(left out)' if value is MISSING else repr(value)}"
    key = name.split(".")[-1]
    try:
        ours = np.asarray(case.ours())
    except (WeightsError, ConfigError) as e:
        verdicts.refused.add(name)
        if key not in str(e) and not any(phrase in str(e) for phrase in TOGETHER):
            verdicts.problems.append(f"{shown}: refused without its name: {e}")
        return
    except Exception as e:
        verdicts.problems.append(f"{shown}: {type(e).__name__}: {str(e)[:120]}")
        return
    try:
        theirs = np.asarray(case.theirs(copy.deepcopy(changed)))
    except Exception as e:
        if value is not None:  # a null that it cannot take has no number that could be wrong
            verdicts.problems.append(f"{shown}: taken, where the library raises {type(e).__name__}: {str(e)[:90]}")
        return
    if (apart := _apart(ours, theirs)) > case.tolerance:
        verdicts.problems.append(f"{shown}: {apart:.1e} off the library's")
    (verdicts.taken if _apart(theirs, base) > 1e-6 else verdicts.idle).add(name)


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference over largest value; infinite where shapes differ."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    if a.shape != b.shape:
        return math.inf
    found = np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30)
    return math.inf if np.isnan(found) else float(found)


# --- what cases are made of -------------------------------------------------------------------------------------


def write(folder, values, name="config.json"):
    (folder / name).write_text(json.dumps(values))
    return folder / name


def rebuilt(kind, config, state, other=()):
    """A model of `kind` by its config, with the tensors of `state`; those of the half `other` do not matter."""
    model = kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)
    missing, unused = model.load_state_dict({k: x for k, x in state.items() if not k.startswith(other)}, strict=False)
    if bad := [key for key in (*missing, *unused) if not (other and key.startswith(other))]:
        raise ValueError(f"the weights are not this config's: {bad[:3]}")
    return model.eval()


def transformers_config(kind, raw):
    """As from_pretrained reads a file; what it hands out is not of the network."""
    config = kind.from_dict(raw)
    config.return_dict, config.output_attentions = True, False
    return config


def by_config(read, folder, ours):
    """What `ours` gives; as an equal config makes an equal network, once for each that the folder's file comes to."""

    @functools.lru_cache
    def of(cfg):
        try:
            return ours(), None
        except (WeightsError, ConfigError) as e:
            return None, e

    def outcome():
        found, error = of(read(folder))
        if error is not None:
            raise error
        return found

    return outcome


@functools.lru_cache(maxsize=200)
def compiled(module):
    return jax.jit(lambda params, args, kwargs: module.apply({"params": params}, *args, **kwargs))
