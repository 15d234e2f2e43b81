"""The runs side by side: for each prompt of the grid the base's picture, then each run's last, with their rewards.

Runs share a shelf if they have the same prompts and their bases drew the same pictures, that is, with the same model,
seeds and steps. Each picture is in the page once; its link enlarges it with CSS only.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from solrl_jax import disk, guidance
from solrl_jax.report import plot
from solrl_jax.report.markup import Html, join, tag
from solrl_jax.report.run import Run
from solrl_jax.run import pictures

SAME = 3.0
"""Largest mean difference, of 255, between two bases' pictures that count as the same. Rounding on other devices gives
less than one, another seed gives tens."""
WIDEST = 256
"""Largest side of a picture in the page; the run directory has the full pictures."""


class Shelf(NamedTuple):
    """`runs`, by their index among all runs, have the prompts and, up to rounding, the pictures of `base`."""

    base: pictures.Shown
    runs: dict[int, Run]


def shelves(runs: Sequence[Run]) -> tuple[list[Shelf], list[str]]:
    """The shelves of the runs that kept pictures, in order, and notes about the other runs."""
    found: list[Shelf] = []
    lost: dict[str, list[str]] = {}
    for i, run in enumerate(runs):
        if run.base is None:
            lost.setdefault(_why(run), []).append(run.name)
            continue
        shelf = next((s for s in found if alike(s.base, run.base.shown)), None)
        if shelf is None:
            found.append(shelf := Shelf(run.base.shown, {}))
        shelf.runs[i] = run
        if run.last is None and "grids/last.npz" in run.damaged:
            lost.setdefault("its last.npz cannot be read, so the base's pictures stand alone", []).append(run.name)
        elif run.last is None:
            lost.setdefault("only the base was evaluated, so its pictures stand alone", []).append(run.name)
        elif not comparable(run):
            lost.setdefault("base and last evaluation have other settings of evaluate", []).append(run.name)
    missing = "No pictures before and after with their rewards, of"
    said = [f"{missing} {', '.join(names)}: {why}." for why, names in lost.items()]
    if len(found) > 1:
        said.append("The runs differ in the prompts, seeds or bases of their pictures: each kind has its own rows.")
    return found, said


def _why(run: Run) -> str:
    if "grids/base.npz" in run.damaged:
        return "its base.npz cannot be read"
    if any((run.folder / "grids").glob("[0-9]*.png")):
        return "written by an older version of solrl_jax, which kept grids alone"
    return "never evaluated"


def comparable(run: Run) -> bool:
    """Whether the last evaluation used the same prompts and settings as the base's."""
    base, last = run.base, run.last
    if base is None or last is None:
        return False
    return (base.how, base.shown.prompts) == (last.how, last.shown.prompts)


def alike(a: pictures.Shown, b: pictures.Shown) -> bool:
    if a.prompts != b.prompts or a.images.shape != b.images.shape:
        return False
    return float(np.abs(a.images.astype(int) - b.images).mean()) <= SAME


def gallery(runs: Sequence[Run]) -> Html:
    """All shelves as HTML; for runs without single pictures their last grids."""
    found, said = shelves(runs)
    parts = [tag("p", line, class_="note") for line in said]
    for s, shelf in enumerate(found):
        rows = [row(shelf, g, f"p{s}-{g}", len(runs) > 1) for g in range(len(shelf.base.prompts))]
        parts.append(tag("div", *rows, class_="shelf", style=f"--n: {1 + len(shelf.runs)}"))
    old = [last_grid(run) for run in runs if run.base is None]
    return join([*parts, tag("div", *old, class_="grids")] if any(old) else parts)


def row(shelf: Shelf, g: int, anchor: str, several: bool) -> Html:
    """One prompt: the base, then the runs with a last evaluation; with `several` runs, each with its line style."""
    prompt = shelf.base.prompts[g]
    before = scores_of(shelf.base, g)
    some = next(iter(shelf.runs.values()))
    when = guidance.titled("before training", some.guidance)
    cells = [("base", shelf.base.images[g], [tag("b", "base")], when, score_list(before, {}, {}))]
    for i, run in shelf.runs.items():
        if run.last is not None and comparable(run):
            title = tag("b", *([plot.swatch(i), " "] if several else []), run.name)
            scores = score_list(scores_of(run.last.shown, g), before, run.weights)
            when = guidance.titled(f"iteration {run.last.iteration}", run.guidance)
            cells.append((run.name, run.last.shown.images[g], [title], when, scores))
    figures = []
    for c, (name, image, title, when, scores) in enumerate(cells):
        beside = [f"{anchor}-{k}" if 0 <= k < len(cells) else None for k in (c - 1, c + 1)]
        caption = join([*title, tag("span", when, class_="when"), scores])
        figures.append(figure(f"{anchor}-{c}", anchor, beside, image, prompt, name, caption))
    return tag("section", tag("h3", prompt), tag("div", *figures, class_="row"), class_="prompt", id=anchor)


def scores_of(shown: pictures.Shown, g: int) -> dict[str, float]:
    """The scores of picture `g` by the rewards that its prompt asks for."""
    return {n: float(values[g]) for n, values in shown.scores.items() if n not in shown.asked or shown.asked[n][g]}


def figure(
    anchor: str,
    home: str,
    beside: Sequence[str | None],
    image: UInt8[np.ndarray, "H W 3"],
    prompt: str,
    name: str,
    caption: Html,
) -> Html:
    """A picture whose link enlarges it (:target), with links to its neighbours and back to `home`."""
    picture = tag("img", src=data_uri(image), alt=f"{prompt} — {name}", class_="sharp" if len(image) < 128 else None)
    way = [
        tag("a", words, href=f"#{to}", class_=kind, aria_label=said) if to else Html("")
        for to, words, kind, said in (
            (beside[0], "‹", "back", "picture to the left"),
            (beside[1], "›", "on", "picture to the right"),
            (home, "×", "close", "close the large picture"),
        )
    ]
    large = tag("a", picture, href=f"#{anchor}", class_="open", aria_label=f"{prompt} — {name}, large")
    shown = tag("figure", large, tag("figcaption", tag("span", prompt, class_="what"), caption), *way, id=anchor)
    return tag("div", shown, class_="cell")


def score_list(scores: Mapping[str, float], before: Mapping[str, float], weights: Mapping[str, float]) -> Html:
    """Each reward of one picture, and its change from the base; of a module's dotted name the last part, which fits."""
    items = []
    for name, value in scores.items():
        words = [tag("dt", name.rpartition(".")[2], title=name)]
        words.append(tag("dd", f"{value:.4f}" if math.isfinite(value) else "not finite"))
        change = value - before[name] if name in before else math.nan
        if math.isfinite(change):
            better = change * weights.get(name, 1.0)
            kind = "up" if better > 0 else "down" if better < 0 else None
            words.append(tag("dd", f"{change:+.4f}" if change else "±0", class_=kind))
        items.append(tag("div", *words))
    return tag("dl", *items)


def last_grid(run: Run) -> Html:
    """The last grid (base and policy side by side) of a run that kept no single pictures."""
    files = sorted((run.folder / "grids").glob("[0-9]*.png"))
    if not files:
        return Html("")
    if (image := disk.readable(_pixels, files[-1], said := [])) is None:
        return tag("p", *said, class_="note")
    words = f"{run.name}, iteration {int(files[-1].stem)}"
    picture = tag("img", src=data_uri(image, max(image.shape)), alt=f"grid of {words}")
    return tag("figure", tag("figcaption", tag("b", words)), picture)


def _pixels(file: Path) -> UInt8[np.ndarray, "H W 3"]:
    with Image.open(file) as opened:
        return np.asarray(opened.convert("RGB"))


def data_uri(image: UInt8[np.ndarray, "H W 3"], widest: int = WIDEST) -> str:
    """A PNG as a data URI; images larger than `widest` are scaled down."""
    made, file = Image.fromarray(image), io.BytesIO()
    made.thumbnail((widest, widest), Image.Resampling.LANCZOS)
    made.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
