"""Draw curves.svg from the results of `experiments.evidence`: judge and reward over iterations and image-steps.

    python -m experiments.curves                                     # experiments/tiny/results/arms
    python -m experiments.curves --world=emoji --arms=results/samples

The picture is in results/ of the world. Of FAMILIES those are drawn that have results.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import worlds
from solrl_jax.report import plot

FAMILIES = ("sol_rl", "branch", "naive_scaling", "naive_quant", "diffusionnft", "random", "shuffled")
WIDTH, HEIGHT = 640, 266  # of one panel


def points(file: Path, what: str, axis: str) -> list[tuple[int, float]]:
    """[(iterations or image-steps, mean over seeds)] of an arm; the base is the first point."""
    figures = json.loads(file.read_text())["figures"]
    marks = [
        (re.fullmatch(rf"{what} after (\d+) iterations, (\d+) image-steps", name), f["value"])
        for name, f in figures.items()
    ]
    found = sorted((int(m[1 if axis == "iterations" else 2]), value) for m, value in marks if m)
    return [(0, found[-1][1] - figures[f"test: gain of {what}"]["value"]), *found]


def panel(series: Mapping[str, plot.Points], title: str, across: str) -> str:
    """One plot of lines, of the size that `page` gives it."""
    drawn = plot.curve(series, title=title, unit=title, across=across, width=WIDTH, height=HEIGHT)
    return drawn.replace("<svg ", f'<svg width="{WIDTH}" height="{HEIGHT}" ', 1)


def page(rows: Sequence[Sequence[str]], names: Sequence[str]) -> str:
    """An SVG file of rows of panels, and below them the legend of their lines."""
    size = (len(rows[0]) * (WIDTH + 20) + 20, len(rows) * (HEIGHT + 20) + 40)
    placed = [
        f'<g transform="translate({20 + column * (WIDTH + 20)},{16 + row * (HEIGHT + 20)})">{drawn}</g>'
        for row, panels in enumerate(rows)
        for column, drawn in enumerate(panels)
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" font-family="sans-serif" '
    legend = plot.legend(names, 60, size[1] - 16, (size[0] - 80) / len(names))
    white = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head + 'font-size="12">', white, *placed, legend, "</svg>\n"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="tiny", choices=worlds.WORLDS)
    parser.add_argument("--arms", type=Path, default="results/arms", help="a folder, relative to the world's")
    parser.add_argument("--out", type=Path, help="results/curves.svg of the world")
    args = parser.parse_args(argv)
    home = worlds.find(args.world).home
    files = {name: home / args.arms / f"{name}.json" for name in FAMILIES}
    files = {name: file for name, file in files.items() if file.is_file()}
    if not files:
        parser.error(f"--arms={args.arms}: {home / args.arms} has no results of {', '.join(FAMILIES)}")
    rows = [
        [
            panel({name: points(file, what, across) for name, file in files.items()}, title, across)
            for across in ("iterations", "image-steps")
        ]
        for what, title in {"exact": "Captions all right", "clipscore": "CLIPScore"}.items()
    ]
    (args.out or home / "results/curves.svg").write_text(page(rows, tuple(files)))


if __name__ == "__main__":
    main()
