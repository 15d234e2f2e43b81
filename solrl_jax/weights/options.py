"""Which options of a public folder's config are allowed, so that none is silently ignored.

A config class of ours states which of a library's options it reads (its fields), which may have certain values only
(`only`), and which have no effect here (`idle`; tests/test_options.py checks each with the library's own output). All
other options are unknown.

- diffusers' files hold the arguments of one class and nothing else: an unknown option is refused.
- transformers' files also hold settings of a whole language model (`top_k`, `id2label`, ...), and older files hold
  options that no version reads any more. transformers ignores options that a model does not read. So does this file,
  except for options whose names refer to a network's parts (`_SHAPES`): those are refused.

In both, an unknown option that is off (null, false, 0, empty) is allowed: the network is as it was before the option
existed.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from solrl_jax.structs import WeightsError


class Options(NamedTuple):
    """What a config class of ours states about the options that are not its fields."""

    library: Literal["diffusers", "transformers"]
    only: Mapping[str, tuple[Any, ...]] = {}  # the known values; for a list, of each element
    idle: tuple[str, ...] = ()


_IDLE = (
    r"_.*",  # notes about the program that wrote the file
    r"architectures|transformers_version|(torch_)?dtype",  # the same; the dtype of computation is model.dtype
    r".*dropout.*|initializer_.*",  # for training
    r"(output|return|tie|is_encoder|decoder_start|chunk_size)_.*|use_cache",  # how transformers returns results
    r"attn_implementation|add_cross_attention",  # a choice of kernels; for decoders
)
_SHAPES = re.compile(
    r"rope|rotary|position|attention|attn|softcap|window|causal|bidirectional|head|layer|block|stage|gate|moe|"
    r"expert|norm|eps|bias|scal|act_|_act|activation|quant|dim|size|width|channel|conv|kernel|embed|project|residual|"
    r"multiplier|factor|patch|type$"
)


def check(options: Options, fields: Iterable[str], file: Path, found: Mapping[str, Any]) -> None:
    """WeightsError for the first option of `found` that is not allowed, with file, value and the known values."""
    for key, value in found.items():
        if key in options.only:
            known = options.only[key]
            if not all(any(_same(x, y) for y in known) for x in (value if isinstance(value, list) else [value])):
                raise WeightsError(f"{file}: {key} is {value!r}: only {_listed(known)} is known here")
            continue
        idle = key in options.idle or any(re.fullmatch(pattern, key) for pattern in _IDLE)
        if key in fields or idle or not value:
            continue
        if options.library == "diffusers" or _SHAPES.search(key):
            raise WeightsError(
                f"{file}: {key} is {value!r}, an option that is not known here: it may change the network. "
                "Remove it if it changes nothing"
            )


def of(cls: type) -> Options | None:
    """The class variable `options` of dataclass `cls`, or None."""
    return getattr(cls, "options", None)


def nullable(field: dataclasses.Field) -> bool:
    """Whether null is a value, and does not mean the default."""
    return type(None) in getattr(field.type, "__args__", ())


def _same(a: Any, b: Any) -> bool:
    """Equal, where true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _listed(values: Iterable[Any]) -> str:
    return " or ".join("null" if x is None else repr(x) for x in values)
