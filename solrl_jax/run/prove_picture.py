"""The picture of --mode=prove: one prompt and seed by diffusers' own pipeline, or by an earlier run, against ours.

Both begin at our noise and take the steps of the pipeline's own scheduler, at guidance 1 and at the model's own weight.
Compared are the final latents and the 8-bit pictures. Two sides in float32 differ by the order of their sums (F32). If
ours is in bfloat16, the bound follows what bfloat16 alone does to this picture, which is measured: ours again with the
same weights and products in float32. If the weights are bfloat16 in their files, that one is held to F32 as well.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from solrl_jax import disk, guidance, rollout, weights
from solrl_jax.config import Config, ConfigError, Stage
from solrl_jax.keys import evaluation_keys
from solrl_jax.models.schedule import NAME
from solrl_jax.rewards import eight_bit
from solrl_jax.run import assemble, prove_diffusers
from solrl_jax.run.assemble import Parts
from solrl_jax.run.encode import Conditioner
from solrl_jax.run.prove_diffusers import Drawn, Source
from solrl_jax.structs import Frozen, Model, Prompts, PyTree, Variables
from solrl_jax.weights import hub

PROMPT = "a photo of a red fox sitting in the snow, morning light"
SOLVERS = {"FlowMatchEulerDiscreteScheduler": "euler", "DPMSolverMultistepScheduler": "dpm2"}
"""Our solver that takes a scheduler's steps."""


class Bound(NamedTuple):
    """At most: root mean square of the latents' difference over theirs; mean difference of pictures, of 255 levels."""

    latents: float
    picture: float


F32 = Bound(1e-3, 0.5)
LOW, FACTOR = Bound(5e-3, 0.5), 3.0
"""With bfloat16 on a side: LOW, and FACTOR times what bfloat16 alone does to ours. In the small pipelines of the tests
the difference is .9 to 2.4 times that; it includes the rounding of weights that are not bfloat16 in their files."""
MOST = Bound(0.3, 16.0)
"""Two other pictures differ by more: no bound exceeds it."""


def asked(cfg: Config, prompt: str) -> dict[str, Any]:
    """What a picture depends on, but for weights and dtype. Reads configs only. Raises ConfigError, WeightsError."""
    module = assemble.model_module(cfg)
    model = module.make(cfg.model)
    base = module.shapes(cfg.model)[0]
    return {
        "model": cfg.model.name,
        "parameters": sum(x.size for x in jax.tree.leaves(base)),
        "prompt": prompt or PROMPT,
        "seed": cfg.seed,
        "size": cfg.model.size,
        "text_tokens": cfg.model.text_tokens,
        "steps": cfg.regenerate.steps,
        "solver": solver_of(_folder(cfg)),
        "guided_by": model.guidance,
        "guidance": list(dict.fromkeys([1.0, model.guided])),
    }


def solver_of(folder: Path) -> str:
    """Ours for the scheduler of a pipeline's folder."""
    name = weights.read_json(folder / "scheduler" / NAME).get("_class_name")
    if name not in SOLVERS:
        raise ConfigError(f"{folder} names the scheduler {name}: --mode=prove takes steps as {', '.join(SOLVERS)}")
    return SOLVERS[name]


def _folder(cfg: Config) -> Path:
    return hub.pipeline(cfg.model.path, configs_only=True)


# --- ours -----------------------------------------------------------------------------------------------------------


def draw(
    variables: Variables, frozen: Frozen, cond: PyTree, keys: Key[Array, "P n"], *, model: Model, stage: Stage
) -> tuple[Float[Array, "P n h w c"], UInt8[Array, "P n H W 3"]]:
    """Final latents and 8-bit pictures, one per key."""

    def block(variables: Variables, frozen: Frozen, prompts: Prompts, keys: Key[Array, "p n"]):
        how = {"model": model, "stage": stage, "negative": frozen.negative}
        x0 = rollout.integrate(variables, prompts.cond, keys, **how)
        return x0, eight_bit(model.decode(frozen.vae, x0))

    return rollout.by_block(block, stage.chunk)(variables, frozen, Prompts(cond, {}), keys)


_draw = jax.jit(draw, static_argnames=("model", "stage"))


def ours(parts: Parts, want: Mapping[str, Any], dtype: str = "") -> Source:
    """Our pictures on the pipeline's own grid of times; with `dtype` in that one, of the same weights, also the VAE's.

    Call it under the mesh. Every device draws the same picture.
    """
    cfg, mesh = parts.cfg.model, parts.mesh
    cfg = dataclasses.replace(cfg, shift=0.0, **({"dtype": dtype, "vae_dtype": dtype} if dtype else {}))
    model = assemble.model_module(parts.cfg).make(cfg)
    negative = "" if model.guidance == "cfg" else None
    text = Conditioner(model, parts.text.params, mesh, group=mesh.size, stay=parts.text.stay, negative=negative)
    cond = text([want["prompt"]] * mesh.size)
    keys = jnp.repeat(key_of(want)[None, None], mesh.size, axis=0)
    found = {}
    for w in want["guidance"]:
        stage = Stage(want["steps"], want["solver"], chunk=1, guidance=w)
        away = text.negative() if guidance.doubles(model, w) else None
        frozen = Frozen({}, parts.frozen.vae, {}, away)
        x0, picture = _draw({"params": parts.frozen.base}, frozen, cond, keys, model=model, stage=stage)
        found[w] = Drawn(np.asarray(x0[0, 0]), np.asarray(picture[0, 0]))
    return Source({"by": "solrl_jax", "dtype": cfg.dtype, "vae_dtype": cfg.vae_dtype}, found)


def key_of(want: Mapping[str, Any]) -> Key[Array, ""]:
    """That of the first picture of --mode=sample."""
    return evaluation_keys(want["seed"], 0, 1)[0]


def noise_of(parts: Parts, want: Mapping[str, Any]) -> Float[np.ndarray, "h w c"]:
    return np.asarray(rollout.noises(parts.model, key_of(want)[None])[0])


# --- a stored picture -----------------------------------------------------------------------------------------------


def store(file: Path, want: Mapping[str, Any], source: Source, noise: np.ndarray) -> None:
    """Write `source` as a file that --reference takes."""
    from safetensors.numpy import save

    arrays = {f"{name}/{w:g}": x for w, drawn in source.drawn.items() for name, x in drawn._asdict().items()}
    told = json.dumps({"asked": dict(want), "told": source.told})
    arrays = {name: np.ascontiguousarray(x) for name, x in {"noise": noise, **arrays}.items()}
    with disk.whole(file) as f:
        f.write(save(arrays, {"prove": told}))


class Stored(NamedTuple):
    source: Source
    noise: Float[np.ndarray, "h w c"]


def stored(file: Path, want: Mapping[str, Any]) -> Stored:
    """What `store` wrote; of a prove.json, the file beside it. ConfigError if it is none, or of another picture."""
    from safetensors import safe_open

    file = file.with_suffix(".safetensors") if file.suffix == ".json" else file
    given = f"--reference={file}"
    if not file.is_file():
        raise ConfigError(f"{given} is not a file: give the .safetensors that --mode=prove wrote beside its --out")
    try:
        with safe_open(file, "numpy") as f:
            told = json.loads(f.metadata()["prove"])
            was, source = dict(told["asked"]), dict(told["told"])
            pair = {w: Drawn(*(f.get_tensor(f"{name}/{w:g}") for name in Drawn._fields)) for w in was["guidance"]}
            found = Stored(Source(source, pair), f.get_tensor("noise"))
    except Exception as e:  # safetensors and JSON raise many kinds of errors for another file
        raise ConfigError(
            f"{given} is not a file that --mode=prove wrote ({type(e).__name__}: {(str(e).splitlines() or [''])[0]}): "
            "give the .safetensors beside its --out"
        ) from None
    if differ := [name for name in {**want, **was} if want.get(name) != was.get(name)]:
        lines = "; ".join(f"{name} is {was.get(name)!r} there and {want.get(name)!r} here" for name in differ)
        raise ConfigError(f"{given} is of another picture: {lines}: ask for the same, or for no reference")
    return found


# --- comparison -----------------------------------------------------------------------------------------------------


def difference(one: Drawn, other: Drawn) -> dict[str, float]:
    """Of latents: root mean square of the difference over the other's, largest difference, the other's largest value.
    Of 8-bit pictures, in levels: mean and largest difference, and their PSNR in dB (None: equal)."""
    apart = one.latents.astype(np.float64) - other.latents
    levels = np.abs(one.picture.astype(np.int64) - other.picture)
    square = float(np.mean(levels**2))
    return {
        "latents_relative_rms": float(np.sqrt(np.mean(apart**2) / np.mean(other.latents.astype(np.float64) ** 2))),
        "latents_largest": float(np.abs(apart).max()),
        "latents_largest_value": float(np.abs(other.latents).max()),
        "picture_mean": float(levels.mean()),
        "picture_largest": float(levels.max()),
        "picture_psnr": math.inf if square == 0 else 10 * math.log10(255**2 / square),
    }


def bound_of(told: Mapping[str, Any], other: Mapping[str, Any], alone: Mapping[str, float] | None) -> Bound:
    """The bound on a difference of two sources; `alone` is what bfloat16 alone does to ours, None in float32."""

    def most(at: int, names: tuple[str, ...], rounded: float) -> float:
        wide = all(side[name] == "float32" for side in (told, other) for name in names)
        return F32[at] if wide else min(MOST[at], LOW[at] + FACTOR * rounded)

    rms, mean = (0.0, 0.0) if alone is None else (alone["latents_relative_rms"], alone["picture_mean"])
    return Bound(most(0, ("dtype",), rms), most(1, ("dtype", "vae_dtype"), mean))


def in_bfloat16(cfg: Config) -> bool:
    """Whether all weights are bfloat16 in the model's public files, so that loading them rounds nothing."""
    from safetensors import safe_open

    if assemble.converted(cfg) is not None or cfg.model.weights:
        return False
    files = hub.read_of(hub.pipeline(cfg.model.path))
    if any(file.suffix != ".safetensors" for file in files):
        return False
    kinds = set[str]()
    for file in files:
        with safe_open(file, "numpy") as f:
            kinds |= {f.get_slice(name).get_dtype() for name in f.keys()}  # noqa: SIM118 - it is no mapping
    return kinds == {"BF16"}


def judged(one: Drawn, other: Drawn, bound: Bound | None) -> dict[str, Any]:
    """`difference`, with its bound and whether it is within; without them if there is none."""
    found = difference(one, other)
    if bound is None:
        return found
    names = dict(zip(("latents_relative_rms", "picture_mean"), bound, strict=True))
    return {**found, "bound": names, "passed": all(found[name] <= most for name, most in names.items())}  # NaN is not


def compared(parts: Parts, want: Mapping[str, Any], mine: Source, other: Source) -> dict[str, Any]:
    """The JSON of a comparison: by weight of guidance the differences, the bound, and what bfloat16 alone does."""
    wide = all(mine.told[name] == "float32" for name in ("dtype", "vae_dtype"))
    exact = None if wide else ours(parts, want, "float32")
    tight = F32 if other.told["dtype"] == "float32" == other.told["vae_dtype"] and in_bfloat16(parts.cfg) else None
    each, passed = {}, []
    for w in want["guidance"]:
        alone = None if exact is None else difference(mine.drawn[w], exact.drawn[w])
        found = judged(mine.drawn[w], other.drawn[w], bound_of(mine.told, other.told, alone))
        again = None if exact is None else judged(exact.drawn[w], other.drawn[w], tight)
        each[f"{w:g}"] = {**found, "bf16_alone": alone, "ours_in_float32": again}
        passed += [x["passed"] for x in (found, again or {}) if "passed" in x]
    return {"ran": True, "passed": all(passed), "against": other.told, "differences": each}


def run(parts: Parts, want: Mapping[str, Any], reference: Stored | None, why_not: str, file: Path) -> dict[str, Any]:
    """Draw and compare; call it under the mesh. Without a reference, `file` becomes one: diffusers' picture, or ours.

    `why_not` says why diffusers is not asked, "" if it is. If it fails, that is told, and counts as not passed.
    """
    mine, noise = ours(parts, want), noise_of(parts, want)
    out = {"asked": dict(want), "ours": mine.told}
    if reference is not None:
        apart = {"noise_largest": float(np.abs(noise - reference.noise).max())}
        return out | compared(parts, want, mine, reference.source) | apart
    try:
        other = None if why_not else prove_diffusers.drawn(parts, want, noise)
    except prove_diffusers.NoRoom as e:
        other, why_not = None, str(e)
    except Exception as e:  # another library's, of any kind: what was measured before it is kept
        said = (str(e).splitlines() or [""])[0].replace(str(_folder(parts.cfg)), parts.cfg.model.path)
        return out | {"ran": False, "passed": False, "why": f"diffusers' pipeline failed ({type(e).__name__}: {said})"}
    if other is None:
        store(file, want, mine, noise)
        return out | {"ran": False, "why": why_not, "stored": f"{file.name}, ours: it proves nothing by itself"}
    store(file, want, other, noise)
    return out | compared(parts, want, mine, other) | {"stored": f"{file.name}, diffusers'"}
