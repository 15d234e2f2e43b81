"""Frozen dataclasses whose fields are checked: made in code or from JSON, and changed by words of a command line."""

import contextlib
import dataclasses
import difflib
import functools
import numbers
import types
import typing
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A config that cannot run; the message names the value, the rule and the fix."""


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


class Checked:
    """A dataclass that is checked on creation: each value by its field's type, then all by the class's `rules`.

    Numbers and lists are converted to the field's type (64 becomes 64.0 for a float), so that equality, hash and JSON
    are the same as for values from the command line.
    """

    def __post_init__(self):
        for name, kind in _hints(type(self)).items():
            object.__setattr__(self, name, _typed(kind, getattr(self, name), f"{self.at()}{name}"))
        self.rules()

    def at(self) -> str:
        """What stands before its fields' names in an error."""
        return f"{type(self).__name__.lower()}."

    def rules(self) -> None:
        raise NotImplementedError


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def build(kind: Any, values: dict[str, Any], at: str = "") -> Any:
    """The dataclass `kind` from a JSON object. Values are checked here too, where their whole path is known: `at`."""
    if strange := [f"{at}{name}" for name in values if name not in _hints(kind)]:
        raise ConfigError(
            f"unknown fields {', '.join(strange)}: this config was written by another version of solrl_jax"
        )
    made = {}
    for name, value in values.items():
        wanted = _hints(kind)[name]
        inner = next(filter(dataclasses.is_dataclass, (wanted, *typing.get_args(wanted))), None)
        built = inner is not None and isinstance(value, dict)
        made[name] = build(inner, value, f"{at}{name}.") if built else _typed(wanted, value, f"{at}{name}")
    return kind(**made)


def _typed(kind: Any, value: Any, path: str) -> Any:
    """`value` converted to the field's type `kind`; ConfigError if it has another type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _typed(args[0], value, path)
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return value
        raise ConfigError(f"{path}={value!r}: use one of {', '.join(args)}")
    if origin is tuple and isinstance(value, list | tuple) and all(isinstance(x, str) for x in value):
        return tuple(value)
    if kind is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    if kind is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if origin is None and kind not in (float, int) and isinstance(value, kind):
        return value
    raise ConfigError(f"{path}={value!r}: needs {'a tuple of str' if origin is tuple else kind.__name__}")


def override(old: T, **changes: Any) -> T:
    """override(config, **{"explore.steps": "4"}): the same names and values as on the command line."""
    nested: dict[str, Any] = {}
    for path, text in changes.items():
        _set(nested, old, path, str(text))
    return _replace(old, nested)


def _set(changes: dict[str, Any], old: Any, path: str, text: str, rest: str | None = None) -> None:
    """Parse one override by the types of `old` into the nested dict `changes`; `rest` is the rest of `path`."""
    head, _, rest = (path if rest is None else rest).partition(".")
    fields = {f.name: f for f in dataclasses.fields(old)}
    if head not in fields:
        near = difflib.get_close_matches(head, fields, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"--config.{path}: no field {head!r} in {type(old).__name__}; {hint}it has {', '.join(fields)}"
        )
    kind = _hints(type(old))[head]
    if rest:
        inner = getattr(old, head)
        if not dataclasses.is_dataclass(inner):
            what = "this family has no such stage" if inner is None else "it is a single value"
            raise ConfigError(f"--config.{path}: {head} has no fields here ({what})")
        _set(changes.setdefault(head, {}), inner, path, text, rest)
    else:
        changes[head] = _parse(kind, text, path)


def _replace(old: Any, changes: dict[str, Any]) -> Any:
    """Apply all changes at once, because two overrides may be valid only together."""
    new = {k: _replace(getattr(old, k), v) if isinstance(v, dict) else v for k, v in changes.items()}
    return dataclasses.replace(old, **new)


def _parse(kind: Any, text: str, path: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if text in args:
            return text
        raise ConfigError(f"--config.{path}={text}: use one of {', '.join(map(str, args))}")
    if origin in (types.UnionType, typing.Union):
        if text.lower() == "none":
            return None
        raise ConfigError(f"--config.{path}={text}: set its fields one by one, or none")
    if origin is tuple:
        return tuple(part for part in text.split(",") if part)
    if dataclasses.is_dataclass(kind):
        raise ConfigError(
            f"--config.{path}={text}: set its fields, e.g. --config.{path}.{dataclasses.fields(kind)[0].name}=..."
        )
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ConfigError(f"--config.{path}={text}: use true or false")
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"--config.{path}={text}: needs {kind.__name__}") from None
