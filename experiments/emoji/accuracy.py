"""How often the judge is right: true captions of held-out compositions, and captions that are wrong in one part.

    python -m experiments.emoji.accuracy                    # results/judge.json; some minutes on two CPU cores
    python -m experiments.emoji.accuracy --tune             # results/thresholds.json: each threshold, on train scenes

A picture is judged by its own caption, which must be right in all facts, and by captions that differ from it in one
part, which must not: another object, the object that looks most like it, another number, another side, another
background. Accuracy is the mean of the share of true captions accepted and that of wrong ones rejected. Pictures are as
drawn, or degraded as a reconstruction may be. Word scenes are read by the rewards `ocr` and `ocr_strict`.
"""

import argparse
import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from experiments import results
from experiments.emoji import judge, world
from experiments.emoji.judge import Limits
from experiments.emoji.world import Scene, Thing
from solrl_jax import device
from solrl_jax.rewards import ocr

HERE = Path(__file__).resolve().parent
CHUNK = 50  # pictures judged at once
PARTS = ("object", "likest object", "number", "side", "background")
Pictures = Float[np.ndarray, "n 64 64 3"]


# --- wrong captions -------------------------------------------------------------------------------------------------


@functools.cache
def likest() -> dict[str, str]:
    """{object: the one whose template has the largest cosine with its own, less gray}."""
    cells = judge.objects()
    shapes = (cells[..., :3] - 0.5 * cells[..., 3:]).reshape(len(cells), -1)
    shapes = shapes / np.linalg.norm(shapes, axis=1, keepdims=True)
    alike = shapes @ shapes.T - 2 * np.eye(len(cells))
    return {name: world.OBJECTS[i] for name, i in zip(world.OBJECTS, alike.argmax(1), strict=True)}


def wrong(scene: Scene, part: str, rng: np.random.Generator) -> Scene | None:
    """A scene that differs in one of PARTS; None if that part is not stated or has no other value."""
    names = [thing.name for thing in scene.things]
    which = int(rng.integers(len(names)))
    name, count = scene.things[which]
    if part == "side":
        others = [r for r in world.RELATIONS if r != scene.relation]
        return dataclasses.replace(scene, relation=str(rng.choice(others))) if scene.relation else None
    if part == "background":
        others = [b for b in world.BACKGROUNDS if b != scene.background]
        return dataclasses.replace(scene, background=str(rng.choice(others))) if scene.background else None
    if part == "number":
        room = len(world.NUMBERS) - sum(thing.count for thing in scene.things)
        counts = [n for n in range(1, count + room + 1) if n != count]
        return _with(scene, which, Thing(name, int(rng.choice(counts)))) if counts else None
    other = likest()[name] if part == "likest object" else str(rng.choice([o for o in world.OBJECTS if o != name]))
    return _with(scene, which, Thing(other, count)) if other not in names else None


def _with(scene: Scene, which: int, thing: Thing) -> Scene:
    return dataclasses.replace(scene, things=(*scene.things[:which], thing, *scene.things[which + 1 :]))


# --- pictures -------------------------------------------------------------------------------------------------------


def blur(images: Pictures, rng: np.random.Generator) -> Pictures:
    """Gaussian, sd 1 px."""
    weights = np.exp(-(np.arange(-3, 4) ** 2) / 2)
    for axis in (1, 2):
        wide = np.pad(images, [(3, 3) if a == axis else (0, 0) for a in range(4)], mode="edge")
        shifted = [np.take(wide, np.arange(i, i + world.SIDE), axis) for i in range(7)]
        images = np.tensordot(weights / weights.sum(), np.stack(shifted), 1)
    return images.astype(np.float32)


def noise(images: Pictures, rng: np.random.Generator) -> Pictures:
    """Gaussian, sd .05 in each channel."""
    return np.clip(images + rng.normal(0, 0.05, images.shape), 0, 1).astype(np.float32)


def jpeg(images: Pictures, rng: np.random.Generator) -> Pictures:
    """JPEG, quality 50, colours at half the resolution."""
    out = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(np.round(255 * image).astype(np.uint8)).save(file, "jpeg", quality=50, subsampling="4:2:0")
        out.append(np.asarray(Image.open(file), np.float32) / 255)
    return np.stack(out)


def plain(images: Pictures, rng: np.random.Generator) -> Pictures:
    return images


class View(NamedTuple):
    """Pictures drawn in a style and degraded, judged by the templates of a style."""

    drawn: str
    by: str
    degrade: Callable[[Pictures, np.random.Generator], Pictures]


VIEWS = {
    "as drawn": View("fluent", "fluent", plain),
    "blur, sd 1 px": View("fluent", "fluent", blur),
    "noise, sd .05": View("fluent", "fluent", noise),
    "JPEG, quality 50": View("fluent", "fluent", jpeg),
    "blur, then noise": View("fluent", "fluent", lambda images, rng: noise(blur(images, rng), rng)),
    "second style, its own templates": View("noto", "noto", plain),
    "second style, the first one's templates": View("noto", "fluent", plain),
}


def pictures(scenes: Sequence[Scene], view: View, seed: int) -> Pictures:
    rng = np.random.default_rng(seed)
    images = jax.jit(world.draw)(world.lay_out(scenes, rng), world.templates(view.drawn))
    return view.degrade(np.asarray(images), rng)


# --- the judge ------------------------------------------------------------------------------------------------------

_judge = jax.jit(judge.judge)


def judged(
    images: Pictures, scenes: Sequence[Scene], by: str = "fluent", limits: Limits = judge.LIMITS
) -> judge.Verdict:
    """Each picture by its scene, CHUNK at once."""
    tokens = judge.tokenize([world.caption(scene) for scene in scenes])
    found = []
    for i in range(0, len(images), CHUNK):
        pad = max(0, i + CHUNK - len(images))
        some = [np.concatenate([x[i : i + CHUNK], x[:1].repeat(pad, 0)]) for x in (images, tokens)]
        found.append(
            jax.tree.map(lambda x, end=CHUNK - pad: np.asarray(x)[:end], _judge(*some, judge.objects(by), limits))
        )
    return jax.tree.map(lambda *x: np.concatenate(x), *found)


def accepted(images: Pictures, scenes: Sequence[Scene], by: str, seed: int, limits: Limits) -> dict[str, np.ndarray]:
    """{"true" or the wrong part: whether each caption is accepted}, over the scenes that have the part."""
    rng = np.random.default_rng([seed, 1])
    said = {"true": list(enumerate(scenes))}
    for part in PARTS:
        mutants = ((i, wrong(scene, part, rng)) for i, scene in enumerate(scenes))
        said[part] = [(i, scene) for i, scene in mutants if scene is not None]
    everything = [pair for pairs in said.values() for pair in pairs]
    verdicts = judged(images[[i for i, _ in everything]], [scene for _, scene in everything], by, limits).exact
    ends = np.cumsum([len(pairs) for pairs in said.values()])[:-1]
    return dict(zip(said, np.split(np.asarray(verdicts), ends), strict=True))


def figures(found: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Shares with their standard errors, and the accuracy of both kinds together."""
    right = {"true caption accepted": found["true"]}
    right |= {f"wrong {part} rejected": ~found[part] for part in PARTS}
    out = {name: share(x) for name, x in right.items()}
    other = ~np.concatenate([found[part] for part in PARTS])
    error = 0.5 * (found["true"].var() / len(found["true"]) + other.var() / len(other)) ** 0.5
    value = 0.5 * float(found["true"].mean() + other.mean())
    return {
        "accuracy": results.figure(value, "share ± standard error", len(found["true"]) + len(other), float(error))
    } | out


def share(x: np.ndarray) -> dict[str, Any]:
    """Of no scenes: no value."""
    value, error = (float(x.mean()), float(x.std() / len(x) ** 0.5)) if len(x) else (None, None)
    return results.figure(value, "share ± standard error", len(x), error)


def words(n: int, seed: int) -> dict[str, dict[str, Any]]:
    """How many unseen words are read right. ConfigError, with what to install, if the reader is not here."""
    ocr.make(None, None)
    rng = np.random.default_rng(seed)
    scenes = [scene for scene in world.sample(rng, 8 * n, "test") if scene.word][:n]
    out = {}
    for name, view in VIEWS.items():
        if view.drawn == "fluent":
            images = np.round(255 * pictures(scenes, view, seed)).astype(np.uint8)
            pairs = [
                (text, scene.word.text) for text, scene in zip(ocr.read(images), scenes, strict=True) if scene.word
            ]
            out[f"{name}: word read"] = share(np.array([ocr.shown(a, b, strict=True) == 1 for a, b in pairs]))
            out[f"{name}: ocr"] = share(np.array([ocr.shown(a, b) for a, b in pairs]))
    return out


# --- commands -------------------------------------------------------------------------------------------------------

GRID = {
    "match": (0.45, 0.65, 0.75, 0.85),
    "near": (0.12, 0.2),
    "other": (0.15, 0.25),
    "clutter": (6, 24),
}
"""What each threshold is tried at while the others keep their defaults."""
TUNED_ON = ("as drawn", "JPEG, quality 50", "blur, then noise")


def tune(n: int) -> dict[str, dict[str, Any]]:
    """Accuracy on train scenes, over TUNED_ON, with one threshold changed at a time."""
    scenes = world.sample(np.random.default_rng(100), n, "train", words=False)
    tuned_on, out = [VIEWS[name] for name in TUNED_ON], {}
    for name, values in GRID.items():
        for value in values:
            limits = Limits()._replace(**{name: value})
            found = [accepted(pictures(scenes, view, 101), scenes, view.by, 101, limits) for view in tuned_on]
            joined = {part: np.concatenate([f[part] for f in found]) for part in found[0]}
            out |= {f"{name} {value:g}: {k}": f for k, f in figures(joined).items()}
            print(f"{name} {value:g}", {k: results.cell(f) for k, f in figures(joined).items()}, flush=True)
    return out


def measure(n: int) -> dict[str, dict[str, Any]]:
    """Every view on test scenes."""
    scenes = world.sample(np.random.default_rng(200), n, "test", words=False)
    out = {}
    for name, view in VIEWS.items():
        found = figures(accepted(pictures(scenes, view, 201), scenes, view.by, 201, Limits()))
        out |= {f"{name}: {k}": f for k, f in found.items()}
        print(name, {k: results.cell(f) for k, f in found.items()}, flush=True)
    return out | words(max(1, n // 5), 202)


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="the thresholds, on train scenes")
    parser.add_argument("--scenes", type=int, help="200, with --tune 20")
    parser.add_argument("--out", type=Path, help="results/judge.json, with --tune results/thresholds.json")
    args = parser.parse_args(argv)
    name, run, scenes = ("thresholds", tune, 20) if args.tune else ("judge", measure, 200)
    found = run(args.scenes or scenes)
    results.record(args.out or HERE / f"results/{name}.json", found, limits=Limits()._asdict())


if __name__ == "__main__":
    main()
