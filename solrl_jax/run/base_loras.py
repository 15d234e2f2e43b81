"""Beginning from LoRAs: the files of model.lora are folded into the base before anything else is made of it.

The base of such a run is base + LoRA: its KL's reference, its first policy, what is quantised and calibrated, and the
"base" of its evaluations. (Other trainers go on with the file's own factors, and their reference is the base without
it: docs/differences.md.) What is exported is the product of both on the original base, and the new part alone in
only_new/. A checkpoint's manifest has each file's name, scale and SHA-256, and is used with the same files alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from solrl_jax import config, disk, lora, sharding
from solrl_jax.config import Lora
from solrl_jax.run.manifest import CheckpointError
from solrl_jax.structs import Model, Params, leaves_by_path
from solrl_jax.weights import WeightsError, lora_content, lora_files

ONLY_NEW = "only_new"
"""Subfolder for the part that a run has trained, without the LoRAs that it began from."""


class Origin(NamedTuple):
    """One entry of model.lora. `sha256` has the digest of each file that it consists of, by name."""

    file: str
    scale: float
    sha256: Mapping[str, str]

    def __str__(self) -> str:
        first = next(iter(self.sha256.values()), "")
        return f"{self.file} (scale {self.scale:g}, SHA-256 {first[:12]}...)"


class BaseLoras(NamedTuple):
    """What is folded into the base: one set for all files, `lora.scaled` and on the host."""

    adapter: Params
    origins: tuple[Origin, ...]
    said: tuple[str, ...]  # how much of the model each file adapts

    @property
    def digests(self) -> list[str]:
        return [x for origin in self.origins for x in origin.sha256.values()]


def read(cfg: config.Model, model: Model) -> BaseLoras | None:
    """The LoRAs of model.lora; None if it is empty. Needs no weights of the base.

    Raises WeightsError, which names the file, if one cannot be folded whole: it is of another base, adapts text
    encoders, is a DoRA, LoHa or LoKr, is not finite.
    """
    if not cfg.lora:
        return None
    base, as_it_is = jax.eval_shape(model.init, jax.random.key(0)), Lora(rank=1, alpha=1.0)
    sets, said = [], []
    for file, scale in map(config.lora_entry, cfg.lora):
        found = lora_files.load(Path(file), base, model.keys, as_it_is, model.comfy, model.native, whole=True)
        sets.append(_times(scale, found.adapter, file))
        said += [f"{file}: {line}" for line in found.said]
    loras = BaseLoras(lora.joined(sets), origins(cfg.lora), tuple(said))
    for file, _ in map(config.lora_entry, cfg.lora):
        check_held_once(Path(file), loras)
    return loras


def _times(scale: float, adapter: Params, file: str) -> Params:
    """The set with B times `scale`, on the host. WeightsError if a factor is not finite."""

    def leaf(path: tuple, x: Any) -> np.ndarray:
        y = np.asarray(x) * np.float32(scale) if path[-1].key == "b" else np.asarray(x)
        if not np.isfinite(y).all():
            module = "/".join(k.key for k in path[:-1])
            raise WeightsError(f"{file}: a factor of {module} is not finite at scale {scale:g}: train or save it again")
        return y

    with np.errstate(over="ignore"):
        return jax.tree_util.tree_map_with_path(leaf, adapter)


def fold(base: Params, loras: BaseLoras | None, mesh: Mesh) -> Params:
    """`base`, on `mesh`, with the LoRAs in it; its adapted kernels are given up. WeightsError if one overflows."""
    if loras is None:
        return base
    found = lora.folded(base, loras.adapter, mesh)
    kernels = leaves_by_path(found)
    adapted = [f"{path.removesuffix('/a')}/kernel" for path in leaves_by_path(loras.adapter) if path.endswith("/a")]
    finite = jax.jit(lambda xs: [jnp.isfinite(x).all() for x in xs], out_shardings=NamedSharding(mesh, sharding.WHOLE))
    finite = jax.device_get(finite([kernels[path] for path in adapted]))
    for path, fine in zip(adapted, finite, strict=True):
        if not fine:
            files = ", ".join(origin.file for origin in loras.origins)
            raise WeightsError(f"{path} is not finite with {files} folded in: lower the scale, or see if it is whole")
    return found


def notes(loras: BaseLoras | None, new: Lora) -> list[str]:
    """Lines for a log."""
    if loras is None:
        return []
    rank = lora.rank(loras.adapter)
    return [
        *loras.said,
        f"folded into the base: {listed(loras.origins)}. The reference of the KL, the first policy and the base of "
        f"evaluations are base + LoRA; exported is their product, of rank up to {rank} + {new.rank}",
    ]


# --- which files ----------------------------------------------------------------------------------------------------


def origins(entries: Sequence[str]) -> tuple[Origin, ...]:
    """What model.lora names, as it is now. WeightsError if a file is not there."""
    return tuple(
        Origin(file, scale, {f.name: _digest(f) for f in lora_content.sources(Path(file))})
        for file, scale in map(config.lora_entry, entries)
    )


def _digest(file: Path) -> str:
    try:
        return disk.digest(file)
    except OSError as e:
        raise WeightsError(f"model.lora: {file} cannot be read: {e.strerror or e}") from None


def listed(among: Iterable[Origin]) -> str:
    return ", ".join(map(str, among)) or "none"


def check_same(place: Path, recorded: Sequence[Mapping[str, Any]], entries: Sequence[str]) -> None:
    """CheckpointError unless model.lora's files have the contents and scales that checkpoint `place` recorded, in the
    same order. Names and folders may differ."""
    there, here = tuple(Origin(**x) for x in recorded), origins(entries)
    if [(sorted(x.sha256.values()), x.scale) for x in there] != [(sorted(x.sha256.values()), x.scale) for x in here]:
        raise CheckpointError(
            f"checkpoint {place} adapts a base with other LoRAs folded in: there {listed(there)}; here, by model.lora, "
            f"{listed(here)}. Give the same files and scales"
        )


def check_held_once(file: Path, loras: BaseLoras) -> None:
    """WeightsError if `file` is an export that holds one of `loras`, which would then count twice."""
    held = lora_content.made(file).get("holds")
    if twice := set(loras.digests) & set(held if isinstance(held, list) else []):
        name = next(o.file for o in loras.origins if twice & set(o.sha256.values()))
        raise WeightsError(
            f"{file} is the product of a training and of {name}, which model.lora folds into the base already: give "
            f"{ONLY_NEW}/ beside it, or leave {name} out of model.lora"
        )
