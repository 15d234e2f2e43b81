"""Pictures of a policy: the fixed evaluation of a run, and --mode=eval and --mode=sample.

Evaluation draws fixed prompts from fixed keys, both pure functions of cfg.seed, so that only the policies make a
difference. The base is drawn with a LoRA of zeros: this is exactly the base, without a second program.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Key, UInt8
from PIL import Image

from solrl_jax import guidance, lora, processes, rollout, sharding
from solrl_jax.config import Config, ConfigError, Evaluate, Stage
from solrl_jax.keys import evaluation_keys
from solrl_jax.rewards import Score, eight_bit, nan_if_not_finite, score_images, score_on_host
from solrl_jax.run import assemble, data
from solrl_jax.run.assemble import Parts
from solrl_jax.run.pictures import Shown, write_grid
from solrl_jax.structs import Frozen, Model, Params, Prompts, Variables


def draw(
    variables: Variables,
    frozen: Frozen,
    prompts: Prompts,
    keys: Key[Array, "P n"],
    *,
    model: Model,
    score: Score,
    stage: Stage,
) -> tuple[UInt8[Array, "P n H W 3"], dict[str, Float[Array, "P n"]], Float[Array, "P n"]]:
    """8-bit pictures of P prompts, one per key, their scores by the rewards that run on the devices, and what is added
    to those by the others (`nan_if_not_finite`)."""

    def block(variables: Variables, frozen: Frozen, prompts: Prompts, keys: Key[Array, "p n"]):
        how = {"model": model, "stage": stage, "negative": frozen.negative}
        images = model.decode(frozen.vae, rollout.integrate(variables, prompts.cond, keys, **how))
        scores = score_images(score, frozen.rewards, images, prompts.tokens)[1]
        return eight_bit(images), scores, nan_if_not_finite(images)

    return rollout.by_block(block, stage.chunk)(variables, frozen, prompts, keys)


_draw = jax.jit(draw, static_argnames=("model", "score", "stage"))


class Pictures(NamedTuple):
    """8-bit pictures [prompts, images per prompt, H, W, 3] and each reward's scores [prompts, images per prompt]; of
    rewards that a prompt does not ask for these mean nothing."""

    images: UInt8[np.ndarray, "P n H W 3"]
    scores: dict[str, Float[np.ndarray, "P n"]]


def pictures(
    parts: Parts, adapter: Params, prompts: Sequence[str], *, score: Score, first: int = 0, pad_to: int | None = None
) -> Pictures:
    """cfg.evaluate.images pictures per prompt by base + adapter, full steps; call it under the mesh.

    Picture i has the key of place `first` + i. Fewer than `pad_to` prompts are padded, so that all calls of a series
    have one shape and compile once.
    """
    cfg, devices, stage = parts.cfg.evaluate, parts.mesh.size, rollout_of(parts.cfg)
    count = devices * prompts_each(cfg, max(pad_to or 0, len(prompts)), devices)
    padded = [*prompts, *[prompts[-1]] * (count - len(prompts))]
    keys = evaluation_keys(parts.cfg.seed, first, count * cfg.images)
    given = assemble.encode(parts, padded, score)
    negative = parts.text.negative() if guidance.doubles(parts.model, stage.guidance) else None
    images, scores, unseen = _draw(
        lora.policy(parts.frozen.base, adapter, parts.cfg.lora),
        parts.frozen._replace(rewards={**parts.frozen.rewards, **parts.towers}, negative=negative),
        given,
        sharding.split(keys.reshape(count, cfg.images), parts.mesh),
        model=parts.model,
        score=score,
        stage=stage,
    )
    scores |= {name: found + unseen for name, found in on_hosts(parts, score, images, prompts).items()}
    return Pictures(*jax.tree.map(lambda x: x[: len(prompts)], sharding.fetch((images, scores))))


def on_hosts(parts: Parts, score: Score, images: Array, prompts: Sequence[str]) -> dict[str, Array]:
    """Scores [P, n] of the rewards that run on the host; each process asks for the pictures of its own devices. Those
    after the last of `prompts` are not asked for."""
    if not score.on_host:
        return {}
    mine = sharding.rows_here(len(images), parts.mesh)
    rows = parts.prompts.rows_of([prompts[i] for i in mine if i < len(prompts)])
    shown, masks = sharding.here(images)[: len(rows)], parts.bound.masks(score.names, rows)
    rest = np.zeros((len(mine) - len(rows), images.shape[1]), np.float32)

    def ask() -> dict[str, Float[np.ndarray, "p n"]]:
        return {name: np.concatenate([x, rest]) for name, x in score_on_host(score, shown, rows, masks)[1].items()}

    return sharding.from_here(processes.together(ask), parts.mesh)


def prompts_each(cfg: Evaluate, prompts: int, devices: int) -> int:
    """How many of `prompts` one device takes, rounded up to whole blocks."""
    together = max(1, min(cfg.chunk // cfg.images, -(-prompts // devices)))
    return -(-prompts // (together * devices)) * together


def rollout_of(cfg: Config) -> Stage:
    how = cfg.evaluate
    w = guidance.evaluated(cfg)
    return Stage(steps=how.steps, solver=how.solver, precision="bf16", chunk=how.chunk, guidance=w)


def settings(parts: Parts) -> str:
    """What an evaluation's pictures and scores depend on, as text: while it is the same, the base's stay."""
    cfg = parts.cfg
    how = dataclasses.replace(cfg.evaluate, every=0)  # when does not change them
    # Nor does what a backward pass keeps, nor where files lie, which may move (checkpoint.CHANGEABLE).
    model = dataclasses.replace(cfg.model, remat=True, remat_keeps=(), path="", lora=())
    loras = parts.base_loras.origins if parts.base_loras else ()
    folded = [(sorted(origin.sha256.values()), origin.scale) for origin in loras]
    rows = parts.prompts.rows_of(fixed_prompts(parts))
    others = data.digest_of([cfg.seed, model, folded, parts.judged.names, rows])
    return f"{guidance.titled(repr(how), guidance.evaluated(cfg))}, of {others}"


def evaluate(parts: Parts, adapter: Params) -> tuple[dict[str, float], Shown]:
    """The `averages`, and the first picture of each prompt of the grid."""
    cfg = parts.cfg
    prompts = fixed_prompts(parts)
    found = pictures(parts, adapter, prompts, score=parts.judged)
    means = {name: found.scores[name].mean(1) for name in parts.judged.names}
    grid = slice(cfg.evaluate.grid)
    scores = {name: found.scores[name][grid, 0] for name in parts.judged.names}
    asked = parts.bound.masks(parts.judged.names, parts.prompts.rows_of(prompts))
    shown = Shown(prompts[grid], found.images[grid, 0], scores, means, asked)
    return averages(shown, parts.score), shown


def averages(shown: Shown, score: Score) -> dict[str, float]:
    """{"eval_reward_<name>": mean over the fixed prompts that ask for it}, without rewards that none asks for.

    "eval_reward_avg" is the weighted sum of the trained rewards that a prompt asks for, under the name that the
    original gives it.
    """
    asked = _asked(shown, score)
    each = {name: x[asked[name]] for name, x in _with_total(shown, score).items()}
    return {f"eval_reward_{name}": float(x.mean()) for name, x in each.items() if len(x)}


def gains(base: Shown, now: Shown, score: Score) -> dict[str, float]:
    """{"eval_gain/<name>": the mean gain over the base, "eval_gain_error/<name>": its standard error}, also of "avg".

    Gains are taken prompt by prompt, so that differences between prompts do not count. Without rewards that fewer than
    two prompts ask for.
    """
    before, after = (_with_total(shown._replace(asked=now.asked), score) for shown in (base, now))
    asked = _asked(now, score)
    each = {name: (after[name] - before[name])[asked[name]] for name in after if name in before}
    each = {name: x for name, x in each.items() if len(x) > 1}
    means = {f"eval_gain/{name}": float(x.mean()) for name, x in each.items()}
    return means | {f"eval_gain_error/{name}": float(x.std(ddof=1) / len(x) ** 0.5) for name, x in each.items()}


def _with_total(shown: Shown, score: Score) -> dict[str, np.ndarray]:
    """The means by prompt and, as "avg", the weighted sum of the trained rewards that a prompt asks for."""
    means, asked = shown.means, _asked(shown, score)
    if not means:
        return {}
    weighted = [w * np.where(asked[n], means[n], 0) for n, w in zip(score.names, score.weights, strict=True)]
    return means | {"avg": np.sum(weighted, axis=0)}


def _asked(shown: Shown, score: Score) -> dict[str, np.ndarray]:
    """Which prompts ask for a reward; for "avg", which ask for any trained one."""
    found = {name: shown.asked.get(name, np.ones(len(x))) > 0 for name, x in shown.means.items()}
    return found | ({"avg": np.any([found[name] for name in score.names], axis=0)} if found else {})


def fixed_prompts(parts: Parts) -> list[str]:
    return data.batch(parts.prompts.test, parts.cfg.seed, 0, parts.cfg.evaluate.prompts)


# --- modes ----------------------------------------------------------------------------------------------------------


def run_eval(
    cfg: Config,
    run: Path,
    *,
    place: Path | None,
    lora_file: Path | None,
    devices: int | None,
    negative: str | None = None,
) -> int:
    """--mode=eval: every reward of base and policy on the fixed prompts, as a table, and their grid.

    Beside a policy, the base is also shown at its own weight of guidance, if that is another one.
    """
    assemble.check_rewards(cfg)
    processes.together(lambda: assemble.check_policy(cfg, place, lora_file))
    settled = assemble.settled_here(cfg, devices, drawing=True)
    parts = processes.together(lambda: assemble.for_evaluation(cfg, devices, negative, settled))
    processes.same({"the content of prompt_files": data.digest(parts.prompts)})
    name, w, own = str(lora_file or place or ""), guidance.evaluated(cfg), parts.model.guided
    with jax.set_mesh(parts.mesh):
        base = assemble.adapter(parts, None, None)
        found = {guidance.titled("base", w): evaluate(parts, base)}
        if name:
            policy = evaluate(parts, assemble.adapter(parts, place, lora_file))
            found |= {guidance.titled("policy", w): policy}
            found |= {guidance.titled("base", own): evaluate(at_own(parts), base)} if own != w else {}
    print("  ".join([f"{'reward':24}", *(f"{title:>10}" for title in found)]))
    first, shown = next(iter(found.values()))
    for key in first:
        numbers = (f"{metrics[key]:{max(10, len(title))}.4f}" for title, (metrics, _) in found.items())
        print("  ".join([f"{key.removeprefix('eval_reward_'):24}", *numbers]))
    columns = {title: shown.images for title, (_, shown) in found.items()}
    grid = processes.by_first(lambda: write_grid(run / "eval.png", shown.prompts, columns))
    print(f"policy: {name or 'the base model'}; pictures: {grid}")
    return 0


def at_own(parts: Parts) -> Parts:
    """`parts` that evaluate at the model's own weight of guidance; in chunks of half the size where a call then has
    twice the rows, so that it takes no more memory."""
    how, model = parts.cfg.evaluate, parts.model
    half = max(1, how.chunk // 2)
    fits = half if half >= how.images else max(n for n in range(1, half + 1) if how.images % n == 0)
    twice = guidance.doubles(model, model.guided) and not guidance.doubles(model, guidance.evaluated(parts.cfg))
    how = dataclasses.replace(how, guidance=model.guided, chunk=fits if twice else how.chunk)
    return parts._replace(cfg=dataclasses.replace(parts.cfg, evaluate=how))


def run_sample(
    cfg: Config,
    run: Path,
    *,
    prompts: Sequence[str],
    place: Path | None,
    lora_file: Path | None,
    devices: int | None,
    negative: str | None = None,
) -> int:
    """--mode=sample: cfg.evaluate.images pictures of each prompt as PNG files in <run>/samples."""
    if not prompts:
        raise ConfigError("--mode=sample needs --prompt='a text' or --prompts=file.txt")
    processes.same({"the prompts": data.digest_of(prompts)})
    processes.together(lambda: assemble.check_policy(cfg, place, lora_file))
    settled = assemble.settled_here(assemble.unscored(cfg), devices, drawing=True)
    parts = processes.together(lambda: assemble.for_drawing(cfg, devices, negative, settled))
    for line in assemble.cut(parts, prompts):
        print(line)
    folder = run / "samples"
    processes.by_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    each = cfg.evaluate.images
    group = (
        max(1, cfg.evaluate.chunk * parts.mesh.size // each)
        if len(prompts) * each > cfg.evaluate.chunk
        else len(prompts)
    )
    with jax.set_mesh(parts.mesh):
        adapter = assemble.adapter(parts, place, lora_file)
        for i in range(0, len(prompts), group):
            some = prompts[i : i + group]
            found = pictures(parts, adapter, some, score=Score((), ()), first=i * each, pad_to=group)
            processes.by_first(functools.partial(_save, found.images, some, folder))
    print(f"policy: {lora_file or place or 'the base model'}")
    return 0


def _save(images: UInt8[np.ndarray, "P n H W 3"], prompts: Sequence[str], folder: Path) -> None:
    """Write the pictures, numbered on from those that are there."""
    there = (file.name.partition("_")[0] for file in folder.glob("[0-9]*_*.png"))
    first = 1 + max((int(number) for number in there if number.isdecimal()), default=-1)
    for i, (prompt, row) in enumerate(zip(prompts, images, strict=True), first):
        for j, image in enumerate(row):
            Image.fromarray(image).save(folder / f"{i:04d}_{j}.png")
            print(f"{folder / f'{i:04d}_{j}.png'}  {prompt}", flush=True)
