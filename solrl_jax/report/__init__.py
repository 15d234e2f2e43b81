"""report.html of one run or of several side by side: figures, pictures, curves, configs. One file that needs no network
and no JavaScript, readable on a phone (JavaScript adds the values under the pointer and keys).

The page's content security policy allows only report.js, by its hash, and no address.
"""

import base64
import hashlib
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from solrl_jax import disk
from solrl_jax.report import gallery, plot, run
from solrl_jax.report.markup import Html, join, tag
from solrl_jax.report.run import EVAL, ReportError, Run

__all__ = ["ReportError", "write"]


class Family(NamedTuple):
    """Metrics that are plotted together. For several runs, `apart`: each metric is a plot; else only the first."""

    title: str
    prefixes: tuple[str, ...]
    unit: str
    why: str = ""
    apart: bool = True


FAMILIES = (
    Family("Evaluation: fixed prompts and noise, averaged policy", (EVAL,), "reward"),
    Family("Reward of the kept samples", ("reward/mean", "reward/max", "reward/min"), "reward", apart=False),
    Family("Spread of rewards within a prompt", ("reward_std_mean", "reward/range"), "reward"),
    Family("Spread of each reward within a prompt", ("reward_std/",), "reward", apart=False),
    Family("Share of each reward in the order of a prompt's samples", ("share/",), "share", apart=False),
    Family("Does the preview rank as the real thing does?", ("rank/",), "Spearman", "1: the same order"),
    Family("Distance from the base and from the old policy", ("kl_div", "old_deviate"), "mean square"),
    Family("Ratio of probabilities", ("ratio/deviation", "ratio/clipped"), "|ratio - 1|, share"),
    Family("Gradient norm", ("grad_norm",), "norm"),
    Family("Time of an iteration", ("time/iteration", "time/"), "seconds", "the first compiles", False),
)
NONE = "—"


def write(folders: Sequence[Path], file: Path) -> Path:
    """Write `file` from the current files of the runs. Raises ReportError if a folder is not a run directory."""
    runs = run.read_all(folders)
    title = " · ".join(r.name for r in runs)
    counted = f"{len(runs)} runs" if len(runs) > 1 else f"{runs[0].iterations} iterations"
    parts = [
        tag("header", tag("h1", title if len(runs) < 4 else f"{title[:80]}…"), tag("p", about(runs))),
        tag(
            "nav", *(tag("a", words, href=f"#{words.lower()}") for words in ("Results", "Pictures", "Curves", "Setup"))
        ),
        section("Results", warned(runs), results(runs)),
        section("Pictures", gallery.gallery(runs)),
        section("Curves", curves(runs), stages(runs)),
        section("Setup", setup(runs)),
    ]
    content = page(f"{title}: {counted}", join(parts)).encode("utf-8", "replace")
    with disk.whole(file) as f:
        f.write(content)
    return file


def page(title: str, body: Html) -> str:
    """The whole file, with report.css and report.js inside."""
    here = Path(__file__).parent
    css, js = (Html((here / name).read_text(encoding="utf-8")) for name in ("report.css", "report.js"))
    allowed = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", css),
    ]
    inside = tag("html", tag("head", *head), tag("body", tag("main", body), tag("script", js)), lang="en")
    return f"<!doctype html>\n{inside}\n"


def section(title: str, *inside: Html) -> Html:
    return tag("section", tag("h2", title), *inside, id=title.lower())


def about(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs side by side."
    (one,) = runs
    total = one.values.get("iterations", NONE)
    return f"{one.method}, {one.iterations} of {total} iterations, {one.precisions}; {one.devices}."


def warned(runs: Sequence[Run]) -> Html:
    """For each run the log's warnings and the missing files."""
    parts = []
    for r in runs:
        name = [tag("b", r.name), ": "] if len(runs) > 1 else []
        parts += [tag("p", "⚠ ", *name, line, class_="warning") for line in run.warnings(r)]
        parts += [tag("p", *name, line, class_="note") for line in r.notes]
    return join(parts)


# --- tables ---------------------------------------------------------------------------------------------------------


def table(caption: str, head: Sequence[Html], rows: Sequence[Sequence[Html]]) -> Html:
    """A table that scrolls horizontally if it is wider than the page."""
    words = tag("caption", tag("span", caption))
    body = tag("tbody", *(tag("tr", *cells) for cells in rows))
    whole = tag("table", words, tag("thead", *(tag("tr", h) for h in head)), body)
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def number(value: float | None, form: str = ".4f", kind: str = "n") -> Html:
    return tag("td", NONE if value is None else f"{value:{form}}", class_=kind)


def name_cell(runs: Sequence[Run], i: int) -> Html:
    sign = [plot.swatch(i), " "] if len(runs) > 1 else []
    return tag("th", *sign, runs[i].name, scope="row")


def column(words: str, **more: object) -> Html:
    return tag("th", words, scope="col", **more)


def evaluated(runs: Sequence[Run]) -> list[str]:
    """The rewards that any run evaluated, in the runs' order; the weighted sum only if it has more than one part."""
    names = [name for r in runs for name in r.weights]
    names += [name.removeprefix(EVAL) for name in run.metrics(runs, (EVAL,))]
    mixed = any(len(r.mixtures[0]) > 1 for r in runs)
    return [n for n in dict.fromkeys(names) if (n != "avg" or mixed) and any(r.points(EVAL + n) for r in runs)]


def results(runs: Sequence[Run]) -> Html:
    """A row per run: method, rewards, time, and every evaluated reward before and after training."""
    names = evaluated(runs)
    words = ("run", "method", "trained on", "iterations", "hours")
    first = [column(word, rowspan=2, class_="n" if word in ("iterations", "hours") else None) for word in words]
    trained = {"avg", *(n for r in runs for n in r.mixtures[0])}
    titles = {n: n if n in trained else f"{n} (held out)" for n in names}
    above = [tag("th", titles[n], scope="colgroup", colspan=4, class_="group") for n in names]
    below = [
        column(w, class_="n from" if w == "base" else "n") for _ in names for w in ("base", "last", "change", "best")
    ]
    rows = []
    for i, r in enumerate(runs):
        done = f"{r.iterations} of {r.values.get('iterations', NONE)}"
        cells = [name_cell(runs, i), tag("td", r.method), tag("td", r.values.get("reward") or NONE)]
        cells += [tag("td", done, class_="n"), number(r.hours, ".2f")]
        for n in names:
            cells += evaluation_cells(r, n)
        rows.append(cells)
    caption = "Rewards are means over the fixed evaluation prompts, on their raw scales; the best with its iteration"
    return join([table(caption, [join([*first, *above]), join(below)], rows), *compared(runs, names)])


def evaluation_cells(r: Run, name: str) -> list[Html]:
    """Base, last, change, best with its iteration."""
    found = r.evaluation(name)
    if found is None:
        return [number(None, kind="n from"), *[number(None)] * 3]
    base, last, best = (point and point[1] for point in (found.base, found.last, found.best))
    change = None if base is None or last is None else last - base
    better = 0 if change is None else change if found.upwards else -change
    kind = "n up" if better > 0 else "n down" if better < 0 else "n"
    return [
        number(base, kind="n from"),
        number(last),
        tag("td", NONE if change is None else f"{change:+.4f}", class_=kind),
        tag("td", f"{best:.4f} ", tag("small", f"at {found.best[0]}"), class_="n"),
    ]


def compared(runs: Sequence[Run], names: Sequence[str]) -> list[Html]:
    """Notes on why the runs' rewards cannot be compared directly."""
    said = []
    if len({r.values.get("reward") for r in runs}) > 1:
        said.append("The runs are trained on different rewards; a dash: not evaluated.")
    bases = {
        n: [found.base[1] for r in runs if (found := r.evaluation(n)) is not None and found.base is not None]
        for n in names
    }
    apart = [n for n, values in bases.items() if values and max(values) - min(values) > 1e-2 * max(map(abs, values))]
    if apart:
        said.append(
            f"The base's {', '.join(apart)} differs between the runs: prompts, seeds, steps, guidance or the base "
            "itself differ (see Setup). Compare each run's change, not its last value."
        )
    return [tag("p", line, class_="note") for line in said]


def stages(runs: Sequence[Run]) -> Html:
    """Median seconds of each stage, without each run's first iteration, which compiles."""
    names = [n for n in run.metrics(runs, ("time/",)) if n != "time/iteration"]
    if not names:
        return Html("")
    order = ["time/iteration", *names]
    rows = []
    for i, r in enumerate(runs):
        medians = [[y for x, y in r.points(n) if x > 1] for n in order]
        cells = [number(statistics.median(ys), ".2f") if ys else number(None) for ys in medians]
        rows.append([name_cell(runs, i), *cells])
    head = join([column("run"), *(column(n.removeprefix("time/"), class_="n") for n in order)])
    return table("Seconds by stage: medians over the iterations after the first, which compiles", [head], rows)


# --- curves ---------------------------------------------------------------------------------------------------------


def curves(runs: Sequence[Run]) -> Html:
    """For one run, a plot per family of metrics; for several, a plot per metric with a line per run."""
    plots = []
    for family in FAMILIES:
        names = [n for n in run.metrics(runs, family.prefixes) if n != f"{EVAL}avg" or "avg" in evaluated(runs)]
        if names and len(runs) == 1:
            lines = {n.removeprefix(EVAL): runs[0].points(n) for n in names}
            plots.append(panel(family.title, family.why, lines, family.unit))
        elif names:
            words = "; ".join(filter(None, (family.title, family.why)))
            for n, (kind, some) in itertools.product(names if family.apart else names[:1], kinds(runs, family)):
                if found := run.series(some, n):
                    plots.append(panel(n.removeprefix(EVAL) + kind, words, found, family.unit, runs))
    if not plots:
        return tag("p", "No metrics are written yet.", class_="note")
    return tag("div", *plots, class_="plots")


def kinds(runs: Sequence[Run], family: Family) -> list[tuple[str, Sequence[Run]]]:
    """All runs as one kind; of ranks branches apart, whose preview is compared with what goes on from it."""
    if "rank/" not in family.prefixes:
        return [("", runs)]
    branches = [r for r in runs if r.method == "branch"]
    others = [r for r in runs if r.method != "branch"]
    return [("", others), (", branches", branches)]


def panel(title: str, why: str, series: Mapping[str, plot.Points], unit: str, runs: Sequence[Run] = ()) -> Html:
    """A plot with its legend; a run has the same line style in all plots."""
    places = {r.name: i for i, r in enumerate(runs)}
    styles = [places.get(name, i) for i, name in enumerate(series)]
    items = [
        tag("li", plot.swatch(style), tag("span", name), tag("output", f"{points[-1][1]:.4g}"))
        for style, (name, points) in zip(styles, series.items(), strict=True)
    ]
    words = [tag("h3", title), *([tag("p", why)] if why else [])]
    drawn = plot.curve(series, title=title, unit=unit, styles=styles)
    where = tag("p", "last", class_="at")
    return tag("figure", *words, drawn, where, tag("ul", *items, class_="legend"), class_="plot")


# --- setup ----------------------------------------------------------------------------------------------------------


def setup(runs: Sequence[Run]) -> Html:
    """Devices and precisions; the differences between the configs; each whole config; each log's first lines."""
    rows = [
        [name_cell(runs, i), *(tag("td", words) for words in (r.devices, jax_of(r), r.precisions, str(r.folder)))]
        for i, r in enumerate(runs)
    ]
    heads = ("run", "devices", "JAX", "precision", "folder")
    parts = [table("Where and how the runs ran", [join(column(w) for w in heads)], rows)]
    if lost := ", ".join(r.name for r in runs if not r.starts and "starts.json" not in r.damaged):
        parts.append(tag("p", f"Not recorded, by an older version of solrl_jax: the devices of {lost}.", class_="note"))
    parts += [differences(runs)] if len(runs) > 1 else []
    for r in runs:
        cells = [[tag("th", key, scope="row"), tag("td", shown(value))] for key, value in r.values.items()]
        whole = table(f"Config of {r.name}", [join([column("field"), column("value")])], cells)
        said = dict.fromkeys(str(line) for start in r.starts for line in start.get("notes", ()))
        notes = tag("ul", *(tag("li", line) for line in said)) if said else Html("")
        parts.append(tag("details", tag("summary", f"Config and first lines of {r.name}"), notes, whole))
    return join(parts)


def jax_of(r: Run) -> str:
    return ", ".join(dict.fromkeys(str(start.get("jax")) for start in r.starts)) or NONE


def shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def differences(runs: Sequence[Run]) -> Html:
    """The fields in which the configs differ; a dash if a run has no such field."""
    keys = dict.fromkeys(key for r in runs for key in r.values)
    found = {key: [shown(r.values[key]) if key in r.values else NONE for r in runs] for key in keys}
    apart = {key: row for key, row in found.items() if len(set(row)) > 1}
    if not apart:
        return tag("p", "The configs are the same.", class_="note")
    head = join([column("field"), *(column(r.name) for r in runs)])
    rows = [[tag("th", key, scope="row"), *(tag("td", words) for words in row)] for key, row in apart.items()]
    return table("Where the configs differ", [head], rows)
