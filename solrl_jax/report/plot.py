"""Line plots as inline SVG, without a plotting library: readable alone, and with a page's own colours.

A line is identified by its colour and its dashes. The colours are Okabe and Ito's (jfly.uni-koeln.de/color), which
colour-blind readers can distinguish; yellow and black, invisible on white or on black, are replaced by olive and grey.
For a dark background a page redefines them with the classes s0 to s7.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from solrl_jax.report.markup import Html, tag

Number = int | float
Points = Sequence[tuple[int, Number]]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b4539a", "#2b95d6", "#b57a00", "#7a7a00", "#666666")
DASHES = (None, "7 3", "2 3", "9 3 2 3", "14 4")
MOST = 500
"""The most points of a line that are drawn; of longer lines, evenly spaced points."""


class Axis(NamedTuple):
    """An axis from `low` to `high`, with ticks."""

    low: Number
    high: Number
    ticks: tuple[Number, ...]


def axis(values: Sequence[Number], whole: bool = False) -> Axis:
    """An axis for `values`, all finite, with ticks at multiples of 1, 2 or 5 times a power of ten; it ends at ticks.

    With `whole`, ticks are whole numbers and the axis ends at the smallest and largest value.
    """
    low, high = min(values), max(values)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-280):  # flat: a line in the middle
        room = abs(low) / 10 if abs(low) > 1e-280 else 1.0
        low, high = (low, low + 1) if whole else (low - room, high + room)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    if whole:
        step = max(1.0, step)
        return Axis(low, high, tuple(i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(i * step for i in range(first, last + 1))
    return Axis(min(low, ticks[0]), max(high, ticks[-1]), ticks)


def short(value: Number) -> str:
    """ "0.35", "20k", "1.5M": the label of a tick."""
    for size, letter in ((1e6, "M"), (1e4, "k")):
        if size <= abs(value) < 1e9:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value + 0.0:.4g}"  # no -0


def style(i: int) -> dict[str, object]:
    """Attributes of line number i: 40 combinations of colour and dashes."""
    colour = i % len(COLOURS)
    return {"class_": f"s{colour}", "stroke": COLOURS[colour], "stroke_dasharray": DASHES[i % len(DASHES)]}


def thinned(points: Points) -> Points:
    """About MOST of the points, evenly spaced, and the last point."""
    each = -(-len(points) // MOST)
    return points if each <= 1 else [*points[:-1:each], points[-1]]


def curve(
    series: Mapping[str, Points],
    *,
    title: str = "",
    unit: str = "",
    across: str = "iteration",
    styles: Sequence[int] | None = None,
    width: int = 420,
    height: int = 240,
) -> Html:
    """An inline SVG of lines {name: [(x, y), ...]}, all finite and at least one; line i has style `styles`[i].

    `unit` is above the vertical axis, `across` below the horizontal one. Each line has its values as data-x and data-y.
    """
    flat = {name: thinned(points) for name, points in series.items()}
    xs, ys = ([point[i] for points in flat.values() for point in points] for i in (0, 1))
    level, up = axis(xs, whole=True), axis(ys)
    left = 14 + round(7.2 * max(len(short(t)) for t in up.ticks))
    right, top, bottom = width - 14, 26, height - 38

    def x_of(x: Number) -> float:
        return left + (x - level.low) / (level.high - level.low) * (right - left)

    def y_of(y: Number) -> float:
        return bottom - (y - up.low) / (up.high - up.low) * (bottom - top)

    parts = [_text(unit, 4, 14), _text(across, (left + right) / 2, height - 4, "middle")]
    for t in up.ticks:
        parts += [_rule(left, right, y_of(t), y_of(t)), _text(short(t), left - 6, y_of(t) + 4, "end")]
    for t in level.ticks:
        parts += [_rule(x_of(t), x_of(t), bottom, bottom + 5), _text(short(t), x_of(t), bottom + 18, "middle")]
    for i, points in enumerate(flat.values()):
        look = style(styles[i] if styles else i)
        spots = [(f"{x_of(x):.1f}", f"{y_of(y):.1f}") for x, y in points]
        parts.append(
            tag(
                "polyline",
                points=" ".join(",".join(spot) for spot in spots),
                fill="none",
                stroke_width=2,
                stroke_linejoin="round",
                **look,
                data_x=" ".join(str(x) for x, _ in points),
                data_y=" ".join(f"{y:.4g}" for _, y in points),
            )
        )
        if len(spots) <= 12:  # few points: mark each, so that a single one is visible
            look["stroke_dasharray"] = None
            parts += [tag("circle", cx=x, cy=y, r=2.5, fill="none", stroke_width=2, **look) for x, y in spots]
    said = "; ".join(f"{name}: {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in series.items())
    where = {"viewBox": f"0 0 {width} {height}", "font_size": 12, "font_family": "system-ui, sans-serif"}
    return tag("svg", *parts, **where, role="img", aria_label=f"{title}, by {across}. {said}")


def _text(words: str, x: Number, y: Number, anchor: str | None = None) -> Html:
    return tag("text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, fill="currentColor")


def _rule(x1: Number, x2: Number, y1: Number, y2: Number) -> Html:
    ends = {"x1": f"{x1:.1f}", "x2": f"{x2:.1f}", "y1": f"{y1:.1f}", "y2": f"{y2:.1f}"}
    return tag("line", **ends, stroke="currentColor", stroke_opacity=0.18)


def sample(i: int, x: Number = 0, y: Number = 0) -> Html:
    """A piece of line number i, 28 units long, for a legend."""
    return tag("line", x1=x, x2=x + 28, y1=y, y2=y, stroke_width=2.5, **style(i))


def swatch(i: int) -> Html:
    return tag("svg", sample(i, 0, 6), viewBox="0 0 28 12", width=28, height=12, aria_hidden="true")


def legend(names: Sequence[str], x: Number, y: Number, each: Number) -> Html:
    """The names of lines in a row, `each` units apart, from (x, y), for an SVG file of its own."""
    parts = [(sample(i, x + each * i, y - 4), _text(name, x + each * i + 34, y)) for i, name in enumerate(names)]
    return tag("g", *(part for pair in parts for part in pair))
