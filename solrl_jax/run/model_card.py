"""model_card.md beside a run's LoRA files: the base model, how and how long they were trained, how to load them."""

import platform
from importlib import metadata
from pathlib import Path

from solrl_jax import disk, guidance, lora, mixture
from solrl_jax.config import Config, Lora, Stage
from solrl_jax.run.base_loras import ONLY_NEW, BaseLoras

PACKAGES = ("jax", "flax", "optax")


def published(path: str) -> str:
    """A name on the Hub as it is; of a folder or file of this machine the last part, for a card is published."""
    here = path.startswith((".", "~")) or Path(path).is_absolute() or Path(path).exists()
    return Path(path).name if here else path


def family(cfg: Config) -> str:
    """The name that `recipes.family` has for what `cfg` does; of a method that learns from a family's samples both:
    "flow_grpo on naive_scaling"."""
    samples = _samples(cfg)
    if cfg.learn.algorithm == "nft":
        return samples or "diffusionnft"
    method = cfg.learn.algorithm + ("_fast" if cfg.regenerate.window else "")
    return f"{method} on {samples}" if samples else method


def _samples(cfg: Config) -> str:
    """The family that makes these samples; "" if all are drawn in BF16 and kept."""
    if cfg.branch is not None:
        return "branch"
    if cfg.explore is not None:
        return "sol_rl"
    if cfg.regenerate.precision != "bf16":
        return "naive_quant"
    return "naive_scaling" if cfg.selection != "all" else ""


def write(
    folder: Path,
    cfg: Config,
    iterations: int,
    updates: int,
    targets: tuple[str, ...],
    comfy: str = "",
    loras: BaseLoras | None = None,
) -> Path:
    """Write <folder>/model_card.md. The LoRA adapts `targets`; `comfy` is its ComfyUI file, relative to the folder;
    `loras` are the LoRAs that were in the base."""
    name = cfg.name or folder.name
    rows = facts(cfg, iterations, updates, targets)
    rows |= {"began from": _began_from(loras, cfg.lora)} if loras else {}
    parts = [
        f"# {name}",
        f"A LoRA for `{published(cfg.model.path) or cfg.model.name}`, trained by reinforcement learning on rewards of "
        "its own pictures (Sol-RL, arXiv 2604.06916).",
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]),
        "## Use it",
        loading(cfg, comfy) + (_stacking(loras) if loras else ""),
        "## Which policy",
        which((folder / "ema").exists()),
    ]
    file = folder / "model_card.md"
    with disk.whole(file) as f:
        f.write(("\n\n".join(parts) + "\n").encode())
    return file


def facts(cfg: Config, iterations: int, updates: int, targets: tuple[str, ...]) -> dict[str, str]:
    """The rows of the card's table."""
    learn, w = cfg.learn, guidance.evaluated(cfg)
    base = f"`{published(cfg.model.path)}` (model {cfg.model.name}{_other_weights(cfg)})"
    return {
        "base": f"{base}, whose licence this LoRA is under",
        "family": f"{family(cfg)}: {_rollouts(cfg)}",
        "reward": _mixture(cfg.reward) + (", each normalised within its prompt (gdpo)" * mixture.by_parts(cfg)),
        "iterations": f"{iterations} of {cfg.iterations}, {cfg.prompts} prompts each; {updates} updates",
        "prompts": f"`{Path(cfg.prompt_files).name}`",
        "learning": f"{learn.algorithm}, rate {learn.learning_rate:g}, KL weight {learn.kl_weight:g}, "
        f"seed {cfg.seed}; every value is in config.json of the run",
        "LoRA": f"{_lora(cfg.lora)}, on {', '.join(targets)}",
        "pictures in training": f"{cfg.model.size} px, {_guidance(cfg)}",
        **({"pictures in its evaluations": f"guidance {w:g}"} if {w, *guidance.weights(cfg)} != {1.0} else {}),
        "made with": ", ".join(
            [*(f"{p} {metadata.version(p)}" for p in PACKAGES), f"Python {platform.python_version()}"]
        ),
    }


def _other_weights(cfg: Config) -> str:
    return f", its network with the weights of `{published(cfg.model.weights)}`" if cfg.model.weights else ""


def _guidance(cfg: Config) -> str:
    """The weights of guidance of rollouts, loss and reference, as far as they differ."""
    w = guidance.weights(cfg)
    if set(w) == {1.0}:
        return "guidance 1.0 (no classifier-free guidance)"
    text = f"guidance {w.regenerate:g}"
    for name, value, other in (
        ("previews", w.explore, w.regenerate),
        ("in the loss", w.learn, w.regenerate),
        ("of the reference", w.kl, w.learn),
    ):
        text += f", {value:g} {name}" if value != other else ""
    return text


def _rollouts(cfg: Config) -> str:
    def stage(s: Stage) -> str:
        noise = f" (eta {s.eta:g})" if s.stochastic else ""
        return f"{s.steps} {s.solver}{noise} steps in {s.precision}"

    chosen = f"{cfg.kept} kept ({cfg.selection})"
    if cfg.explore is None:
        return f"{cfg.candidates} pictures a prompt in {stage(cfg.regenerate)}, {chosen}"
    explored = f"{cfg.candidates} candidates a prompt in {stage(cfg.explore)}, {chosen}"
    _, finish, _ = cfg.stages()[1]
    if cfg.branch is not None:
        return f"{explored} and finished from their states after {cfg.branch.after} of them in {stage(finish)}"
    return f"{explored} and drawn in {stage(finish)}"


def _mixture(text: str) -> str:
    """ "pickscore,hpsv2:0.5" -> "1 x pickscore + 0.5 x hpsv2"."""
    parts = [part.strip().partition(":") for part in text.split(",") if part.strip()]
    return " + ".join(f"{weight.strip() or 1} x {name.strip()}" for name, _, weight in parts)


def _began_from(loras: BaseLoras, new: Lora) -> str:
    files = "; ".join(
        f"`{Path(o.file).name}` at scale {o.scale:g}, SHA-256 {', '.join(' '.join(x) for x in o.sha256.items())}"
        for o in loras.origins
    )
    return (
        f"{files}: folded into the base, so the KL's reference and the base of evaluations are base + LoRA. The files "
        f"here hold the product of both, rank up to {lora.rank(loras.adapter)} + {new.rank}"
    )


def _stacking(loras: BaseLoras) -> str:
    files = ", ".join(f"`{Path(o.file).name}` at scale {o.scale:g}" for o in loras.origins)
    return (
        f"\n\nThese files already hold {files}: load them alone. `{ONLY_NEW}/` has the trained part alone, in the same "
        f"layouts, to be loaded at scale 1 beside {files}."
    )


def _lora(cfg: Lora) -> str:
    return f"rank {cfg.rank}, alpha {cfg.alpha:g} folded into the factors (so the scale to load it at is 1)"


def loading(cfg: Config, comfy: str) -> str:
    """How to load the files in diffusers and ComfyUI."""
    base = published(cfg.model.path)
    elsewhere = "" if base == cfg.model.path else "  # its folder, or its name on the Hub"
    lines = [
        "diffusers:",
        "",
        "```python",
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.bfloat16){elsewhere}',
        'pipe.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")  # "." is this folder',
        "```",
    ]
    if comfy:
        lines += ["", f"ComfyUI: copy `{comfy}` to `models/loras`, load it with a LoRA loader at strength 1."]
    return "\n".join(lines)


def which(ema: bool) -> str:
    """Which policy each file holds; `ema`: whether an older version left a folder ema/."""
    lines = [
        "The files here hold the running average of the policy over its updates; every evaluation used this average. "
        "The policy itself, as it was after the last update, is in `current/`, in the same layouts.",
    ]
    if ema:
        lines += [
            "",
            "`ema/` is of an earlier version of solrl_jax, which saved the average there and the policy itself "
            "here; it may be from an earlier iteration.",
        ]
    return "\n".join(lines)
