"""Draw results/curves.svg from results/arms: judge and reward of the families over iterations and image-steps.

python -m experiments.tiny.curves
"""

import json
import re
from pathlib import Path

from experiments.tiny import check
from solrl_jax.report import plot

FAMILIES = ("sol_rl", "naive_scaling", "naive_quant", "diffusionnft", "random", "shuffled")
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


def main() -> None:
    panels = []
    for row, (what, title) in enumerate({"exact": "Captions all right", "clipscore": "CLIPScore"}.items()):
        for column, across in enumerate(("iterations", "image-steps")):
            series = {name: points(check.HERE / f"results/arms/{name}.json", what, across) for name in FAMILIES}
            drawn = plot.curve(series, title=title, unit=title, across=across, width=WIDTH, height=HEIGHT)
            drawn = drawn.replace("<svg ", f'<svg width="{WIDTH}" height="{HEIGHT}" ', 1)
            place = f"translate({20 + column * (WIDTH + 20)},{16 + row * (HEIGHT + 20)})"
            panels.append(f'<g transform="{place}">{drawn}</g>')
    size = (2 * WIDTH + 60, 2 * HEIGHT + 80)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" font-family="sans-serif" '
    names = plot.legend(FAMILIES, 60, size[1] - 16, (size[0] - 80) / len(FAMILIES))
    page = [head + 'font-size="12">', '<rect width="100%" height="100%" fill="white"/>', *panels, names, "</svg>\n"]
    (check.HERE / "results/curves.svg").write_text("\n".join(page))


if __name__ == "__main__":
    main()
