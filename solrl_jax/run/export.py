"""The LoRA files of a run, for diffusers and ComfyUI, with their model card; --mode=export."""

from pathlib import Path

import jax

from solrl_jax import lora
from solrl_jax.config import Config, ConfigError, Lora
from solrl_jax.run import assemble, checkpoint, model_card
from solrl_jax.structs import Model, Params, TrainState
from solrl_jax.weights import lora_files

CURRENT = "current"
"""Folder, beside the LoRA files of the average, of those of the policy that is trained."""


def deliver(folder: Path, state: TrainState, model: Model, cfg: Config) -> Path:
    """The running average, which is what evaluations score and draw, for diffusers and ComfyUI; the policy as it is in
    current/, in both layouts too; a model card. Sol-RL saves both, DiffusionNFT and Flow-GRPO the average."""
    file = write_lora(folder, state.ema, model, cfg.lora, cfg.name)
    write_lora(folder / CURRENT, state.lora, model, cfg.lora, cfg.name)
    targets = cfg.lora.targets or model.lora_targets
    comfy = comfy_name(cfg.name) if model.comfy else ""
    model_card.write(folder, cfg, int(state.iteration), int(state.updates), targets, comfy)
    return file


def write_lora(folder: Path, adapter: Params, model: Model, how: Lora, name: str) -> Path:
    """pytorch_lora_weights.safetensors, and comfyui/<name>.safetensors where the model has that layout."""
    file = folder / "pytorch_lora_weights.safetensors"
    lora_files.save(file, adapter, model.keys, how)
    if model.comfy:
        base = jax.eval_shape(model.init, jax.random.key(0))
        lora_files.save_fused(folder / comfy_name(name), adapter, base, model.keys, model.comfy, how)
    return file


def comfy_name(name: str) -> str:
    """In a folder of its own: diffusers takes a folder of one LoRA file, ComfyUI lists files by their names."""
    return f"comfyui/{name or 'lora'}.safetensors"


def export(
    cfg: Config, run: Path, *, place: Path | None, lora_file: Path | None = None, devices: int | None = None
) -> int:
    """--mode=export: the LoRA files of a checkpoint, or a LoRA file rewritten, in `run`. Needs no base weights."""
    if place is None and lora_file is None:
        raise ConfigError(
            "--mode=export needs --run_dir of a run, --checkpoint=<run>/checkpoints/<step> or --lora=file.safetensors"
        )
    model = assemble.model_module(cfg).make(cfg.model)
    if lora_file is not None:
        base = jax.eval_shape(model.init, jax.random.key(0))
        as_it_is = Lora(rank=1, alpha=1.0)  # whatever scale it states
        found, said = lora_files.load(lora_file, base, model.keys, as_it_is, model.comfy, model.native)
        rank = lora.rank(found)
        file = write_lora(run, found, model, Lora(rank=rank, alpha=float(rank)), cfg.name)
        print("\n".join(f"{lora_file}: {line}" for line in (*said, f"LoRA of rank {rank} in {file}, for scale 1")))
        return 0
    assert place is not None
    like = assemble.blank(cfg, model, assemble.make_mesh(devices))
    fields = {name: getattr(like, name) for name in ("lora", "ema", "iteration", "updates")}
    state = like._replace(**checkpoint.restore_fields(place, fields, cfg, assemble.INFERENCE))
    file = deliver(run, state, model, checkpoint.load_config(place))  # the card tells of the run, not of the flags
    print(f"{place}: LoRA, the average, in {file}; the policy as it was then in {run / CURRENT}")
    return 0
