"""What the options of a public folder's config may be, so that none is read past in silence.

A config of ours says of a library's options which it takes (its fields), which may have one value only (`only`), and
which do nothing here (`idle`; tests/test_options.py proves each by the library's own output). What is left is unknown.

- diffusers' files hold the arguments of one class and nothing else: an unknown option is refused.
- transformers' files also hold whatever a whole language model is asked to do (`top_k`, `id2label`, ...), and older
  ones much that no version reads any more. transformers ignores what a model does not read, and so do we, but for
  options whose names speak of a network's parts (`_SHAPES`): those are refused.

In both an unknown option that is off (null, false, 0, empty) does nothing: that is what a network was before it.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from solrl_jax.structs import WeightsError


class Options(NamedTuple):
    """What a config of ours says of the options that are not its fields."""

    library: Literal["diffusers", "transformers"]
    only: Mapping[str, tuple[Any, ...]] = {}  # the values that are known here; of a list each
    idle: tuple[str, ...] = ()


_IDLE = (
    r"_.*",  # notes of what wrote the file
    r"architectures|transformers_version|(torch_)?dtype",  # and of how; what is computed in is model.dtype
    r".*dropout.*|initializer_.*",  # of training
    r"(output|return|tie|is_encoder|decoder_start|chunk_size)_.*|use_cache",  # how transformers hands results out
    r"attn_implementation|add_cross_attention",  # a choice of kernels; of decoders
)
_SHAPES = re.compile(
    r"rope|rotary|position|attention|attn|softcap|window|causal|bidirectional|head|layer|block|stage|gate|moe|"
    r"expert|norm|eps|bias|scal|act_|_act|activation|quant|dim|size|width|channel|conv|kernel|embed|project|residual|"
    r"multiplier|factor|patch|type$"
)


def check(options: Options, fields: Iterable[str], file: Path, found: Mapping[str, Any]) -> None:
    """WeightsError, with file, option, value and what is known, for the first of `found` that cannot be left unread."""
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
                f"{file}: {key} is {value!r}, an option that is not known here: the network may be another one. "
                "Take it out if it changes nothing"
            )


def of(cls: type) -> Options | None:
    """What dataclass `cls` says in its class variable `options`, if it does."""
    return getattr(cls, "options", None)


def nullable(field: dataclasses.Field) -> bool:
    """Whether null is a value of its own, not the default's place."""
    return type(None) in getattr(field.type, "__args__", ())


def _same(a: Any, b: Any) -> bool:
    """Equal, and of one kind: true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _listed(values: Iterable[Any]) -> str:
    return " or ".join("null" if x is None else repr(x) for x in values)
