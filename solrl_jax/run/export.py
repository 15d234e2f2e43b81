"""--mode=export: the LoRA files of a run, for diffusers and ComfyUI, with their model card."""

from pathlib import Path
from typing import Any

import jax

from solrl_jax import lora, processes
from solrl_jax.config import Config, ConfigError, Lora
from solrl_jax.run import assemble, base_loras, checkpoint, model_card
from solrl_jax.run.base_loras import ONLY_NEW, BaseLoras
from solrl_jax.structs import Model, Params, TrainState
from solrl_jax.weights import lora_files

NAME = "pytorch_lora_weights.safetensors"
"""The name by which diffusers finds a LoRA in a folder."""
CURRENT = "current"
"""Subfolder for the LoRA files of the trained policy itself, not of its running average."""


def deliver(folder: Path, state: TrainState, model: Model, cfg: Config, loras: BaseLoras | None = None) -> Path:
    """Write the running average of the policy (evaluations use it), the policy itself in current/, and a model card.

    Both are written for diffusers and ComfyUI. Sol-RL saves both, DiffusionNFT and Flow-GRPO only the average. `loras`:
    the LoRAs in the base, as for `write_lora`.
    """
    file = write_lora(folder, state.ema, model, cfg.lora, cfg.name, loras)
    write_lora(folder / CURRENT, state.lora, model, cfg.lora, cfg.name, loras)
    targets = cfg.lora.targets or model.lora_targets
    comfy = comfy_name(cfg.name) if model.comfy else ""
    model_card.write(folder, cfg, int(state.iteration), int(state.updates), targets, comfy, loras)
    return file


def write_lora(
    folder: Path, adapter: Params, model: Model, how: Lora, name: str, loras: BaseLoras | None = None
) -> Path:
    """pytorch_lora_weights.safetensors, and comfyui/<name>.safetensors if the model has a ComfyUI layout.

    If the base has LoRAs in it, the files hold the product of these and of the adapter, for the original base; those in
    only_new/ hold the adapter alone, for the base that it was trained on. Their metadata says which LoRAs these are.
    """
    if loras is None:
        return _write(folder, adapter, model, how, name)
    _write(folder / ONLY_NEW, adapter, model, how, f"{name or 'lora'}_{ONLY_NEW}", said={"on": loras.digests})
    return _write(folder, adapter, model, how, name, under=loras.adapter, said={"holds": loras.digests})


def _write(folder: Path, adapter: Params, model: Model, how: Lora, name: str, **more: Any) -> Path:
    """Both files; `more` is for lora_files.save."""
    file = folder / NAME
    lora_files.save(file, adapter, model.keys, how, **more)
    if model.comfy:
        base = jax.eval_shape(model.init, jax.random.key(0))
        lora_files.save_fused(folder / comfy_name(name), adapter, base, model.keys, model.comfy, how, **more)
    return file


def comfy_name(name: str) -> str:
    """In its own folder, because diffusers expects one LoRA file in a folder; ComfyUI shows the file's name."""
    return f"comfyui/{name or 'lora'}.safetensors"


def _keep(run: Path, place: Path | None, comfy: str) -> None:
    """ConfigError if there are LoRA files in `run`, unless `place` is a checkpoint of it."""
    if place is not None and place.resolve().is_relative_to(run.resolve()):
        return
    if there := [file for file in (run / NAME, run / comfy) if file.exists()]:
        raise ConfigError(
            f"{there[0]} is there already, and only a checkpoint of {run} is exported over it: write into another "
            "folder, --run_dir=FOLDER, with --config=NAME if no --checkpoint is given"
        )


def export(
    cfg: Config, run: Path, *, place: Path | None, lora_file: Path | None = None, devices: int | None = None
) -> int:
    """Write into `run` the LoRA files of a checkpoint, or convert a LoRA file. Needs no base weights.

    Files of `run` are written over by its own checkpoints alone; ConfigError if others would do that.
    """
    if place is None and lora_file is None:
        raise ConfigError(
            "--mode=export needs --run_dir of a run, --checkpoint=<run>/checkpoints/<step> or --lora=file.safetensors"
        )
    model = assemble.model_module(cfg).make(cfg.model)
    processes.by_first(lambda: _keep(run, place, comfy_name(cfg.name)))
    if lora_file is not None:
        base = jax.eval_shape(model.init, jax.random.key(0))
        as_it_is = Lora(rank=1, alpha=1.0)  # keeps the scale that the file states
        found, said = lora_files.load(lora_file, base, model.keys, as_it_is, model.comfy, model.native)
        rank = lora.rank(found)
        as_read = Lora(rank=rank, alpha=float(rank))
        file = processes.by_first(lambda: write_lora(run, found, model, as_read, cfg.name))
        print("\n".join(f"{lora_file}: {line}" for line in (*said, f"LoRA of rank {rank} in {file}, for scale 1")))
        return 0
    assert place is not None
    like = assemble.blank(cfg, model, assemble.make_mesh(devices))
    fields = {name: getattr(like, name) for name in ("lora", "ema", "iteration", "updates")}
    state = like._replace(**checkpoint.restore_fields(place, fields, cfg, assemble.INFERENCE))
    loras = base_loras.read(cfg.model, model)
    there = checkpoint.load_config(place)  # the card describes the run, not the flags
    file = processes.by_first(lambda: deliver(run, state, model, there, loras))
    print(f"{place}: LoRA of the running average in {file}, the policy as it was then in {run / CURRENT}")
    return 0
