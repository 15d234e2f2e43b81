"""The runs side by side: for each prompt of the grid the base's picture, then each run's last, with their rewards.

Runs share a shelf where their prompts are the same and their bases drew the same pictures, which is to say with the
same model, seeds and steps. A picture is in the page once; its link makes it large by CSS alone.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from solrl_jax import grids
from solrl_jax.report import plot
from solrl_jax.report.markup import Html, join, tag
from solrl_jax.report.run import Run

SAME = 3.0
"""Mean difference, of 255, up to which two bases' pictures are the same: what devices round differently is below one,
and another seed is tens."""
WIDEST = 256
"""Pixels of a picture in the page; the run directory has them whole."""


class Shelf(NamedTuple):
    """`runs` have the prompts and, to rounding, the pictures of `base`."""

    base: grids.Shown
    runs: list[tuple[int, Run]]


def shelves(runs: Sequence[Run]) -> tuple[list[Shelf], list[str]]:
    """The shelves of the runs that kept pictures, in order, and what to say of those that did not."""
    found: list[Shelf] = []
    said = []
    for i, run in enumerate(runs):
        if run.base is None:
            said.append(f"{run.name} has no pictures with their rewards: {_why(run)}.")
            continue
        base = run.base.shown
        shelf = next((s for s in found if alike(s.base, base)), None)
        if shelf is None:
            found.append(shelf := Shelf(base, []))
        shelf.runs.append((i, run))
        if run.last is None:
            said.append(f"{run.name} has no pictures but the base's: it was not evaluated since.")
        elif run.last.how != run.base.how or run.last.shown.prompts != base.prompts:
            said.append(f"{run.name} has pictures of two settings of evaluate: they are not set side by side.")
    if len(found) > 1:
        said.append("The runs differ in the prompts, seeds or bases of their pictures: each kind has its own rows.")
    return found, said


def _why(run: Run) -> str:
    if (run.folder / "grids" / "base.npz").exists() or any((run.folder / "grids").glob("[0-9]*.png")):
        return "an older version of solrl_jax wrote it, and kept grids alone"
    return "it was not evaluated"


def alike(a: grids.Shown, b: grids.Shown) -> bool:
    if a.prompts != b.prompts or a.images.shape != b.images.shape:
        return False
    return float(np.abs(a.images.astype(int) - b.images).mean()) <= SAME


def gallery(runs: Sequence[Run]) -> Html:
    """All shelves as HTML; of runs without single pictures their last grids."""
    found, said = shelves(runs)
    parts = [tag("p", line, class_="note") for line in said]
    for s, shelf in enumerate(found):
        for g in range(len(shelf.base.prompts)):
            parts.append(row(shelf, g, f"p{s}-{g}"))
    old = [last_grid(run) for run in runs if run.base is None]
    return join([*parts, tag("div", *old, class_="grids")] if any(old) else parts)


def row(shelf: Shelf, g: int, anchor: str) -> Html:
    """One prompt: the base, then the runs that have a last evaluation."""
    base, prompt = shelf.base, shelf.base.prompts[g]
    before = {name: float(values[g]) for name, values in base.scores.items()}
    cells: list[tuple[str, int | None, np.ndarray, dict[str, float], str]] = [
        ("base", None, base.images[g], before, "before training")
    ]
    for i, run in shelf.runs:
        last = run.last
        if last is not None and last.how == (run.base and run.base.how) and last.shown.prompts == base.prompts:
            after = {name: float(values[g]) for name, values in last.shown.scores.items()}
            cells.append((run.name, i, last.shown.images[g], after, f"iteration {last.iteration}"))
    figures = []
    for c, (name, i, image, scores, when) in enumerate(cells):
        beside = [f"{anchor}-{k}" if 0 <= k < len(cells) else None for k in (c - 1, c + 1)]
        weights = {} if i is None else dict(shelf.runs)[i].weights
        title = tag("b", *([] if i is None else [plot.swatch(i), " "]), name)
        caption = [title, tag("span", when, class_="when")]
        caption.append(score_list(scores, before if i is not None else {}, weights))
        figures.append(figure(f"{anchor}-{c}", anchor, beside, image, prompt, name, join(caption)))
    return tag("section", tag("h3", prompt), tag("div", *figures, class_="row"), class_="prompt", id=anchor)


def figure(
    anchor: str,
    home: str,
    beside: Sequence[str | None],
    image: UInt8[np.ndarray, "H W 3"],
    prompt: str,
    name: str,
    caption: Html,
) -> Html:
    """A picture whose link makes it large (:target), with links to those beside it and back to `home`."""
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
    """Each reward of one picture, and its change from the base's."""
    items = []
    for name, value in scores.items():
        words = [tag("dt", name), tag("dd", f"{value:.4g}" if math.isfinite(value) else "not finite")]
        change = value - before[name] if name in before else math.nan
        if math.isfinite(change):
            better = change * weights.get(name, 1.0)
            kind = "up" if better > 0 else "down" if better < 0 else None
            words.append(tag("dd", f"{change:+.3g}" if change else "±0", class_=kind))
        items.append(tag("div", *words))
    return tag("dl", *items)


def last_grid(run: Run) -> Html:
    """The last grid, base and policy side by side, of a run that kept no single pictures."""
    files = sorted((run.folder / "grids").glob("[0-9]*.png"))
    if not files:
        return Html("")
    with Image.open(files[-1]) as opened:
        image = np.asarray(opened.convert("RGB"))
    words = f"{run.name}, iteration {int(files[-1].stem)}"
    picture = tag("img", src=data_uri(image, max(image.shape)), alt=f"grid of {words}")
    return tag("figure", tag("figcaption", tag("b", words)), picture)


def data_uri(image: UInt8[np.ndarray, "H W 3"], widest: int = WIDEST) -> str:
    """A PNG; larger ones than `widest` are shrunk."""
    made, file = Image.fromarray(image), io.BytesIO()
    made.thumbnail((widest, widest), Image.Resampling.LANCZOS)
    made.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
