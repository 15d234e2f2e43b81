"""Folders of models, by path or by their name on huggingface.co ("black-forest-labs/FLUX.1-dev").

A folder is used directly. A name is looked up in the hub's cache first (HF_HOME), without the network, then fetched.
Only the files that the loaders read are fetched, so not the single-file checkpoints beside the diffusers layout.
"""

import fnmatch
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from solrl_jax import config, weights
from solrl_jax.weights import WeightsError

SITE = "https://huggingface.co"
WEIGHTS = (
    *(f"{part}/diffusion_pytorch_model*.safetensors" for part in ("transformer", "vae")),
    "text_encoder*/model*.safetensors",
)
"""The weights of a pipeline as patterns, folder/stem*.ending."""
_CONFIGS = ("config.json", *(f"{part}_config.json" for part in ("scheduler", "tokenizer", "preprocessor")))
_VOCABULARIES = (("tokenizer.json",), ("spiece.model",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_FITS = {
    "FluxPipeline": "flux",
    "Flux2KleinPipeline": "flux2",
    "StableDiffusion3Pipeline": "sd35",
    "SanaPipeline": "sana",
    "ZImagePipeline": "zimage",
}


def pipeline(path: str, configs_only: bool = False) -> Path:
    """The folder of a diffusers pipeline; with `configs_only` only configs and tokenizers are fetched, no weights.

    Raises WeightsError, with a message of one line, if it is not available.
    """
    small = ("model_index.json", "*/*.json", "*/*.txt", "*/*.model")
    return _resolve(path, small, () if configs_only else WEIGHTS, ", --config.model.path=DIR")


def model(
    path: str,
    small: tuple[str, ...] = ("config.json", "*.json", "*.txt"),
    heavy: tuple[str, ...] = ("model*.safetensors",),
) -> Path:
    """The folder of one model, by default in transformers' layout, like a CLIP. Raises WeightsError as `pipeline` does.

    `small` and `heavy` are the files that are fetched; the first of `small` and all of `heavy` must exist.
    """
    return _resolve(path, small, heavy, "")


def file(path: str, flag: str) -> Path:
    """A file by its path, or by its place on the hub, org/name/file. Raises WeightsError as `pipeline` does."""
    if Path(path).is_file():
        return Path(path)
    name, inside = _in_repository(path)
    if not inside or not is_name(name) or Path(path).exists():
        raise WeightsError(f"{path} is not a file: give one{flag}, or org/name/file of {SITE}")
    return _fetch(name, (inside,), (), f"{flag}=FILE") / inside


def here(path: str | Path | None, file: str = "config.json") -> Path | None:
    """`path` if it exists, else the folder in the hub's cache of the model with that name, if it has `file`, else None.

    Does not use the network.
    """
    import huggingface_hub

    if path is None or Path(path).exists():
        return path if path is None else Path(path)
    try:
        found = huggingface_hub.try_to_load_from_cache(str(path), file) if is_name(str(path)) else None
    except ValueError:  # not a valid name on the hub
        found = None
    return Path(found).parent if isinstance(found, str) else None


def file_here(path: str) -> Path | None:
    """What `file` returns if the file is on this machine (its path or the hub's cache), else None. No network."""
    if Path(path).is_file():
        return Path(path)
    name, inside = _in_repository(path)
    found = here(name, inside) if inside and is_name(name) else None
    return found / Path(inside).name if found else None


def pipeline_here(path: str) -> Path | None:
    """What `pipeline` returns if all of it is on this machine (a folder or the hub's cache), else None. No network."""
    if not is_name(path):
        return pipeline(path)
    found = here(path, "model_index.json")
    return found if found and _whole(found, "model_index.json", WEIGHTS) else None


def is_name(path: str) -> bool:
    """Whether `path` has the form of a name on the hub, org/name, and does not exist on this machine."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]*\w", path, re.ASCII) is not None and not Path(path).exists()


def _in_repository(path: str) -> tuple[str, str]:
    """ "org/name/folder/file" -> ("org/name", "folder/file")."""
    parts = path.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:])


def _resolve(path: str, small: tuple[str, ...], heavy: tuple[str, ...], flag: str) -> Path:
    if is_name(path):
        return _fetch(path, small, heavy, flag)
    if not path or not Path(path).is_dir():
        what = f"{path} is not a directory" if path else "no model is given"
        raise WeightsError(f"{what}: give the folder of a model in its public layout{flag}, or org/name of {SITE}")
    return Path(path)


@functools.lru_cache(maxsize=16)
def _fetch(name: str, small: tuple[str, ...], heavy: tuple[str, ...], flag: str) -> Path:
    """The folder in the hub's cache if it is `_whole`; else the missing files are fetched.

    An interrupted download, or another program, can leave part of a repository there without any sign of it.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [*small, *heavy]
    try:
        try:
            found = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=True))
            if _whole(found, small[0], heavy):
                return found
        except LocalEntryNotFoundError:
            pass
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as e:  # errors of the hub, of HTTP or of the disk: each becomes one line
        raise WeightsError(_said(name, flag, e)) from e


def _whole(folder: Path, first: str, heavy: tuple[str, ...]) -> bool:
    """Whether `folder` has the file `first`, all weights that `heavy` names, and all parts in a pipeline's index."""
    try:
        parts = _components(folder) if first == "model_index.json" else ()
        return (
            (folder / first).is_file()
            and all(_configured(folder / part) for part in parts)
            and all(file.is_file() for pattern in heavy for file in _stored(folder, pattern, parts))
        )
    except WeightsError:
        return False


def _components(folder: Path) -> tuple[str, ...]:
    """The folders of a pipeline's parts, from its model_index.json: {"vae": ["diffusers", "AutoencoderKL"], ...}."""
    index = weights.read_json(folder / "model_index.json")
    return tuple(name for name, kind in index.items() if isinstance(kind, list) and None not in kind)


def _configured(part: Path) -> bool:
    """Whether a part of a pipeline has its config, and a tokenizer also its vocabulary."""
    words = not part.name.startswith("tokenizer") or any(
        all((part / name).is_file() for name in names) for names in _VOCABULARIES
    )
    return words and any((part / name).is_file() for name in _CONFIGS)


def _stored(folder: Path, pattern: str, parts: tuple[str, ...] = ()) -> Iterator[Path]:
    """The files, existing or not, that the loaders read for folder/stem*.ending.

    The folders are those in `parts` and those that exist. WeightsError if one has no weights.
    """
    where, _, file = pattern.rpartition("/")
    if "*" not in file:
        yield folder / pattern
        return
    found = {*fnmatch.filter(parts, where), *(f.name for f in folder.glob(where) if f.is_dir())} if where else {""}
    for part in sorted(found or {where}):
        yield from weights.stored(folder / part, file.partition("*")[0])


def write_configs(folder: str | Path, configs: Mapping[str, Any]) -> Path:
    """Write the files {path: JSON} into `folder`, and return it: a pipeline without its weights."""
    for name, content in configs.items():
        file = Path(folder) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return Path(folder)


def read_of(folder: Path, network: Path | None = None) -> list[Path]:
    """The weight files that are read for a pipeline's folder; `network` replaces its transformer's."""
    patterns = [pattern for pattern in WEIGHTS if network is None or not pattern.startswith("transformer/")]
    return [*([network] if network else []), *(file for pattern in patterns for file in _stored(folder, pattern))]


def _said(name: str, flag: str, e: Exception) -> str:
    """A message for the error `e` with the hub's `name`: the problem, the page, what to do."""
    from huggingface_hub import errors

    page = f"{SITE}/{name}"
    status = next((r.status_code for x in (e, e.__cause__) if (r := getattr(x, "response", None)) is not None), None)
    licence = f"accept the licence at {page} and run `hf auth login`"
    if isinstance(e, errors.GatedRepoError):
        return f"{name} is behind a licence: {licence}, or give a folder{flag}"
    if isinstance(e, errors.HFValidationError):
        return f"{name} is not a folder here, nor a valid name on {SITE}: give org/name, or a folder{flag}"
    if isinstance(e, errors.RepositoryNotFoundError) or status == 401:
        fix = f"fix the name, or {licence}, or give a folder{flag}"
        return f"{name} is not a folder here, and {page} is missing or private: {fix}"
    if isinstance(e, errors.OfflineModeIsEnabled) or isinstance(e.__cause__, errors.OfflineModeIsEnabled):
        why = "is not a folder here and not complete in the hub's cache, and HF_HUB_OFFLINE is set"
    elif isinstance(e, errors.LocalEntryNotFoundError) and not status:
        why = "is not a folder here and not complete in the hub's cache, and the hub cannot be reached"
    else:
        reason = f"the hub answers {status}" if status else f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
        why = f"cannot be fetched ({reason})"
    return f"{name} {why}: try again with network access (if it is behind a licence, {licence}), or give a folder{flag}"


def check_pipeline(folder: Path, kinds: tuple[str, ...]) -> None:
    """WeightsError if model_index.json exists and does not name a pipeline class of `kinds`."""
    if not (folder / "model_index.json").is_file():
        return
    kind = str(weights.read_json(folder / "model_index.json").get("_class_name"))
    if kind not in kinds:
        here, fit = _configs(), _FITS.get(kind)
        fix = f"use --config={fit}" if fit in here else f"no config is for it, there are {', '.join(here)}"
        raise WeightsError(f"{folder} holds a {kind}, not a {kinds[0]}: {fix}")


def _configs() -> list[str]:
    """The available configs; empty where the package has none."""
    try:
        return config.available()
    except config.ConfigError:
        return []
