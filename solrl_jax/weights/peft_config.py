"""PEFT's description of an adapter: the scale of its factors, and features that are more than a LoRA.

The description is a JSON object: adapter_config.json beside adapter_model.safetensors, or lora_adapter_metadata in the
header of a file that diffusers wrote, where each key may have the model's part as a prefix ("transformer.r").
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from solrl_jax.weights import WeightsError, read_json

PREFIX = "base_model.model."
"""The prefix of every name in a file of PEFT."""
NAME = "adapter_config.json"

_READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "bias", "init_lora_weights")
_OF_TRAINING = ("lora_dropout", "inference_mode", "runtime_config", "eva_config", "ensure_weight_tying")
_OF_CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type")
_OF_ORIGIN = ("auto_mapping", "peft_version", "base_model_name_or_path", "revision")
_OF_OTHERS = ("fan_in_fan_out", "megatron_core", "qalora_group_size")  # no effect on Linears, or of another option
_KNOWN = {*_READ, *_OF_TRAINING, *_OF_CHOICE, *_OF_ORIGIN, *_OF_OTHERS}


class Adapter(NamedTuple):
    """B is scaled by alpha / r, or with rslora by alpha / sqrt(r); patterns of names can have their own r and alpha."""

    where: str  # for messages
    r: int
    alpha: float
    ranks: dict[str, int]
    alphas: dict[str, float]
    rslora: bool

    def scale(self, name: str, rank: int) -> float:
        """The scale of module `name` with factors of `rank`; WeightsError if the description has another rank."""
        if (r := self.ranks.get(_pattern(self.ranks, name), self.r)) != rank:
            raise WeightsError(f"{self.where} says rank {r} of {name}, whose factors have rank {rank}: export it again")
        return self.alphas.get(_pattern(self.alphas, name), self.alpha) / (math.sqrt(r) if self.rslora else r)


def _pattern(patterns: Mapping[str, Any], name: str) -> str:
    """The first pattern that matches the name, or its end after a dot, as PEFT looks it up."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), "")


def of_folder(file: Path) -> Adapter:
    """The adapter_config.json beside `file`."""
    beside = file.with_name(NAME)
    if not beside.is_file():
        raise WeightsError(f"{file} is an adapter of PEFT, whose scale is in adapter_config.json: put it beside it")
    return _adapter(str(beside), read_json(beside))


def of_metadata(file: Path, stated: str) -> Adapter | None:
    """The lora_adapter_metadata of `file`; None if it has no keys of the transformer."""
    where = f"{file}: its lora_adapter_metadata"
    try:
        found = dict(json.loads(stated).items())
    except (ValueError, AttributeError, RecursionError) as e:
        raise WeightsError(f"{where} is not a JSON object ({e}): export it again") from None
    own = {key.removeprefix("transformer."): x for key, x in found.items() if key.startswith("transformer.")}
    own = own or {key: x for key, x in found.items() if "." not in key}
    return _adapter(where, own) if own else None


def _adapter(where: str, found: Mapping[str, Any]) -> Adapter:
    """WeightsError if it is not a plain LoRA, and for values of a wrong kind."""
    odd = [name for name, value in found.items() if name not in _KNOWN and value]
    odd += [f"peft_type {found['peft_type']}"] if found.get("peft_type") not in (None, "LORA") else []
    odd += [f"bias {found['bias']}"] if found.get("bias") not in (None, "none") else []
    if (start := found.get("init_lora_weights")) not in (None, True, False, "gaussian", "eva"):
        odd.append(f"init_lora_weights {start}")  # such a start changes the base's kernels too
    if odd:
        raise WeightsError(f"{where} has {', '.join(map(str, odd))}, which is more than a LoRA: give a plain one")
    if not isinstance(rslora := found.get("use_rslora") or False, bool):
        raise WeightsError(f"{where} says use_rslora {rslora!r}, not true or false: export it again")
    ranks = {p: _rank(where, f"rank_pattern {p}", x) for p, x in _patterns(where, "rank_pattern", found)}
    alphas = {p: _number(where, f"alpha_pattern {p}", x) for p, x in _patterns(where, "alpha_pattern", found)}
    r, alpha = _rank(where, "r", found.get("r")), _number(where, "lora_alpha", found.get("lora_alpha"))
    return Adapter(where, r, alpha, ranks, alphas, rslora)


def _patterns(where: str, name: str, found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(pattern, its value) of one of the two tables."""
    if not isinstance(table := found.get(name) or {}, dict):
        raise WeightsError(f"{where} says {name} {table!r}, not an object: export it again")
    for pattern in table:
        try:
            re.compile(pattern)
        except re.error as e:
            raise WeightsError(f"{where}: {name} has {pattern!r}, not a pattern ({e}): export it again") from None
    return list(table.items())


def _rank(where: str, name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise WeightsError(f"{where} says {name} {value!r}, not a whole number above 0: export it again")
    return value


def _number(where: str, name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
        raise WeightsError(f"{where} says {name} {value!r}, not a number: export it again")
    return float(value)
