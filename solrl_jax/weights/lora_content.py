"""The content of LoRA files: tensors, in one spelling of their keys, and what the files say of their scale and origin.

lora_files gives the tensors to a model's Linears.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from solrl_jax.weights import WeightsError, matrix, not_floats, peft_config, torch_file

COMFY, DIFFUSERS = "lora_unet_", "transformer."


class Names(NamedTuple):
    """The keys of one module in a file, in `_spelt`'s spelling."""

    down: str
    up: str
    alpha: str

    @classmethod
    def of(cls, name: str, prefix: str) -> "Names":
        ends = ("lora_down.weight", "lora_up.weight") if prefix == COMFY else ("lora_A.weight", "lora_B.weight")
        return cls(*(f"{prefix}{name}.{end}" for end in (*ends, "alpha")))


class Content(NamedTuple):
    """A file: its tensors in one spelling, the prefix of its names, its stated scale, the keys that are not read."""

    file: Path
    prefix: str
    tensors: dict[str, np.ndarray]
    adapter: peft_config.Adapter | None
    text: tuple[str, ...]  # keys of text encoders

    def named(self) -> set[str]:
        """The names of the modules, with the prefix."""
        return {key.split(".lora_")[0] for key in self.tensors}

    def scale(self, name: str, its: Names, rank: int) -> float:
        """The scale of B: from the description, else alpha / rank, else 1."""
        if self.adapter is not None:
            return self.adapter.scale(name, rank)
        return self.tensors[its.alpha].item() / rank if its.alpha in self.tensors else 1.0

    def left_out(self) -> list[str]:
        if not self.text:
            return []
        return [f"{len(self.text)} keys of text encoders are left out ({self.text[0]}, ...): those do not change"]


def read(file: Path) -> Content:
    """Read a file, safetensors or torch's pickle, with any content."""
    if not file.is_file():
        if ":" in file.name and Path(str(file).rpartition(":")[0]).exists():
            raise WeightsError(f"{file} does not exist: only --config.model.lora takes a scale; leave it out here")
        raise WeightsError(f"{file} does not exist: give a LoRA .safetensors file or the folder that holds it")
    try:
        if torch_file.is_checkpoint(file):
            tensors, metadata = torch_file.read(file), {}
            _check_floats(file, {key: str(x.dtype) for key, x in tensors.items()})
        else:
            with safe_open(file, "numpy") as f:
                _check_floats(file, {key: f.get_slice(key).get_dtype() for key in f.keys()})  # noqa: SIM118
                tensors, metadata = {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except SafetensorError as e:
        raise WeightsError(f"{file} is not a complete safetensors file ({e})") from e
    except OSError as e:
        raise WeightsError(f"{file} cannot be read: {e.strerror or e}") from e
    text = tuple(key for key in tensors if _TEXT.match(key))
    spelt = _respelt(file, [key for key in tensors if key not in text])
    prefixes = (COMFY, DIFFUSERS, peft_config.PREFIX)
    prefix = next((p for p in prefixes if any(key.startswith(p) for key in spelt)), "")
    by_key = {key: tensors[own].reshape(matrix(tensors[own].shape)) for key, own in spelt.items()}
    return Content(file, prefix, by_key, _described(file, prefix, metadata), text)


def _check_floats(file: Path, kinds: Mapping[str, str]) -> None:
    """WeightsError for factors of another type. What is no factor, as alpha, may be a whole number."""
    if odd := not_floats({key: kind for key, kind in kinds.items() if ".lora" in key or kind[0] not in "IUiu"}):
        raise WeightsError(f"{file}: {odd[0]}")


_TEXT = re.compile(r"text_encoders?(_\d)?\.|lora_te\d?_")


def _described(file: Path, prefix: str, metadata: Mapping[str, str]) -> peft_config.Adapter | None:
    if (stated := metadata.get("lora_adapter_metadata")) is not None:
        return peft_config.of_metadata(file, stated)
    return peft_config.of_folder(file) if prefix == peft_config.PREFIX or file.stem == "adapter_model" else None


def _respelt(file: Path, keys: Iterable[str]) -> dict[str, str]:
    """{a key in our spelling: the file's}; WeightsError if two keys are the same."""
    found: dict[str, str] = {}
    for key in keys:
        if (same := found.setdefault(_spelt(key), key)) != key:
            raise WeightsError(f"{file}: {same} and {key} are one factor of two adapters: give a file with one of them")
    return found


def _spelt(key: str) -> str:
    """The key in our spelling.

    lora_A and lora_B are also called down and up, with an adapter's name after them or a dot instead of "_". ComfyUI
    also reads and writes the dotted names of its own modules: diffusion_model.<a.b.c>.lora_A.weight.
    """
    if not (match := re.fullmatch(r"(.+?)\.(?:lora[_.](A|B|down|up)(?:\.[^.]+)?\.weight|alpha)", key)):
        return key
    name, half = match.groups()
    if name.startswith("diffusion_model."):
        name = COMFY + name.removeprefix("diffusion_model.").replace(".", "_")
    if half is None:
        return f"{name}.alpha"
    down, up = ("down", "up") if name.startswith(COMFY) else ("A", "B")
    return f"{name}.lora_{down if half in ('A', 'down') else up}.weight"


def sources(place: Path) -> list[Path]:
    """The LoRA file of a folder, or a file itself; and PEFT's description if it is there, which has the scale."""
    file = inside(place)
    beside = file.with_name(peft_config.NAME)
    return [file, beside] if beside.is_file() else [file]


def made(file: Path) -> dict[str, Any]:
    """What this package said of a file that it wrote (`save`); {} of others."""
    try:
        with safe_open(inside(file), "numpy") as f:
            found = json.loads((f.metadata() or {}).get("solrl_jax", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def inside(place: Path) -> Path:
    """The LoRA file of a folder; a file itself."""
    if not place.is_dir():
        return place
    names = [f"{stem}.{end}" for end in ("safetensors", "bin") for stem in ("pytorch_lora_weights", "adapter_model")]
    if not (files := [place / name for name in names if (place / name).is_file()]):
        raise WeightsError(f"{place} holds no LoRA file: none of {', '.join(names)} is there")
    return files[0]
