"""The other side of --mode=prove's picture: diffusers' own pipeline, where it and torch are installed.

diffusers computes in float32. In bfloat16 its FLUX also rounds the times and the weight of guidance that the network
gets, by up to 1 part in 256: in a small pipeline of random weights that was another picture, latents 4 to 49 % away.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from solrl_jax.config import Config
from solrl_jax.run import assemble
from solrl_jax.run.assemble import Parts
from solrl_jax.weights import hub

INSTALL = "pip install torch diffusers (tested: those of requirements-dev.txt), or give --reference=FILE"


class Drawn(NamedTuple):
    """Final latents and the 8-bit picture."""

    latents: Float[np.ndarray, "h w c"]
    picture: UInt8[np.ndarray, "H W 3"]


class Source(NamedTuple):
    """One side of a comparison: what it is, for the JSON, and its pictures by weight of guidance."""

    told: dict[str, Any]
    drawn: Mapping[float, Drawn]


def absent(cfg: Config) -> str:
    """Why diffusers' pipeline cannot be asked for this config; "" if it can."""
    try:
        for name in ("torch", "diffusers"):
            importlib.import_module(name)
    except ImportError as e:
        return f"torch and diffusers are not both here (no {e.name}): {INSTALL}"
    if cfg.model.name not in CALLS:
        return f"how diffusers draws with a {cfg.model.name} is not known here: give --reference=FILE"
    if assemble.converted(cfg) is not None:
        return f"model.path={cfg.model.path} is converted, which diffusers cannot read: give the public folder"
    if cfg.model.weights:
        return f"model.weights={cfg.model.weights} are not the folder's, which diffusers reads: leave it empty"
    if cfg.model.lora:
        return f"model.lora={','.join(cfg.model.lora)} is in our base and not in the folder: leave it empty"
    return ""


class NoRoom(Exception):
    """The memory is not there."""


class Call(NamedTuple):
    """How a pipeline is called: its own words, and its latents from and to [B, c, h, w]."""

    words: dict[str, Any]
    pack: Callable[[Any], Any] = lambda x: x
    unpack: Callable[[Any], Any] = lambda x: x


def _flux(pipe: Any, want: Mapping[str, Any], w: float) -> Call:
    words: dict[str, Any] = {"guidance_scale": w if want["guided_by"] == "embedded" else 1.0}
    if want["guided_by"] == "cfg":
        words |= {"true_cfg_scale": w, "negative_prompt": ""}
    side = want["size"]

    def pack(x: Any) -> Any:
        return pipe._pack_latents(x, *x.shape)

    return Call(words, pack, lambda x: pipe._unpack_latents(x, side, side, pipe.vae_scale_factor))


def _flux2(pipe: Any, want: Mapping[str, Any], w: float) -> Call:
    """Its latents go in as [B, c, h, w] and come out as tokens; the negative prompt is always the empty one."""

    def unpack(x: Any) -> Any:
        side = math.isqrt(x.shape[1])
        return x.transpose(1, 2).reshape(x.shape[0], -1, side, side)

    return Call({"guidance_scale": w}, unpack=unpack)


def _sana(pipe: Any, want: Mapping[str, Any], w: float) -> Call:
    """Without the instruction that SANA's pipeline puts before a prompt, as this package."""
    words = {"complex_human_instruction": None, "use_resolution_binning": False, "guidance_scale": w}
    return Call(words)


CALLS: dict[str, Callable[[Any, Mapping[str, Any], float], Call]] = {
    "flux": _flux,
    "flux2": _flux2,
    "sd35": lambda pipe, want, w: Call({"guidance_scale": w}),
    "sana": _sana,
    "zimage": lambda pipe, want, w: Call({"guidance_scale": w - 1}),  # pos + g (pos - neg): ours less one
}
"""By model.name."""


def drawn(parts: Parts, want: Mapping[str, Any], noise: Float[np.ndarray, "h w c"]) -> Source:
    """The pictures that `asked` names by diffusers' pipeline, from this noise. Raises NoRoom if it cannot."""
    torch, diffusers = (importlib.import_module(name) for name in ("torch", "diffusers"))
    count = sum(x.size for x in jax.tree.leaves((parts.frozen.base, parts.frozen.vae, parts.text.params)))
    place = room_for(torch, count)
    folder = hub.pipeline(parts.cfg.model.path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(place)
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    if strange := {x.dtype for part in networks for x in part.parameters()} - {torch.float32}:
        raise RuntimeError(f"diffusers {diffusers.__version__} loads {strange} for float32: update diffusers")
    pipe.set_progress_bar_config(disable=True)
    told = {"by": "diffusers", "version": diffusers.__version__, "torch": torch.__version__, "device": place}
    told |= {"dtype": "float32", "vae_dtype": "float32", "scheduler": _exact_times(pipe)}
    x1 = torch.tensor(noise).permute(2, 0, 1)[None].to(place)
    with torch.backends.cudnn.flags(allow_tf32=False):
        return Source(told, {w: _called(pipe, want, w, x1) for w in want["guidance"]})


def _called(pipe: Any, want: Mapping[str, Any], w: float, x1: Any) -> Drawn:
    call, last = CALLS[want["model"]](pipe, want, w), {}
    words = {"height": want["size"], "width": want["size"], "num_inference_steps": want["steps"]}
    words |= {"max_sequence_length": want["text_tokens"], "latents": call.pack(x1), "output_type": "np"}

    def step(pipe: Any, number: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last.update(tensors)
        return {}

    image = pipe(prompt=want["prompt"], callback_on_step_end=step, **words, **call.words).images[0]
    latents = call.unpack(last["latents"])[0].permute(1, 2, 0).float().cpu().numpy()
    return Drawn(latents, np.round(np.clip(image, 0, 1) * 255).astype(np.uint8))


def _exact_times(pipe: Any) -> str:
    """The scheduler's name. A DPM-Solver, which would give the network its times cut to whole numbers of 1000, gives it
    the exact ones, as ours, and takes the steps of `dpm2` whatever else its file names."""
    kind = type(pipe.scheduler)
    if not hasattr(pipe.scheduler.config, "solver_order"):
        return kind.__name__

    class Exact(kind):
        def set_timesteps(self, *args: Any, **words: Any) -> None:
            super().set_timesteps(*args, **words)
            self.timesteps = self.sigmas[:-1].to(self.timesteps.device) * self.config.num_train_timesteps

    words = {"solver_order": 2, "solver_type": "midpoint", "algorithm_type": "dpmsolver++"}
    pipe.scheduler = Exact.from_config(pipe.scheduler.config, **words)
    return f"{kind.__name__} of order 2, times not rounded"


def room_for(torch: Any, parameters: int) -> str:
    """The device of a pipeline in float32: torch's GPU if it has room beside JAX, else the CPU, else NoRoom."""
    need = 1.2 * 4 * parameters + 1e9  # with activations, about
    places = {"cuda": torch.cuda.mem_get_info()[0]} if torch.cuda.is_available() else {}
    places["cpu"] = host_memory()
    for place, free in places.items():
        if need < free:
            return place
    raise NoRoom(
        f"diffusers in float32 would take about {need / 1e9:.0f} GB, {places['cpu'] / 1e9:.0f} GB of the host's memory "
        "are free: run it on a larger host, or give --reference=FILE, which such a run writes"
    )


def host_memory() -> float:
    """Bytes that a process can still take, by Linux; without limit elsewhere."""
    found = [math.inf]
    for file, word, unit in (("/proc/meminfo", "MemAvailable:", 1024), ("/sys/fs/cgroup/memory.max", "", 1)):
        lines = Path(file).read_text(encoding="utf-8").splitlines() if Path(file).is_file() else []
        numbers = [line.removeprefix(word).split()[0] for line in lines if line.startswith(word)]
        found += [float(n) * unit for n in numbers if n.isdigit()]
    return min(found)
