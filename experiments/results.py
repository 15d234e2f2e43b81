"""results/*.json: what was measured, by which command, on what, with which versions, and tables made from it.

    python -m experiments.results experiments/tiny/README.md        # its tables anew from their files

A README holds `<!-- table:FILE -->` ... `<!-- end -->`, a row a figure (with `FILE | REGEX` those whose whole name
matches); or `<!-- matrix:FILES | FIGURE | FIGURE -->`, a row a file (FILES: patterns with commas between, rows in their
order); or `<!-- settings:FILE | FIGURE | FIGURE -->`, a row each NAME of a file whose figures are called `NAME:
FIGURE`. Columns are `FIGURE` or `FIGURE = title`.
"""

import datetime
import json
import math
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from solrl_jax import disk

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers")


def figure(value: float | None, unit: str, n: int, spread: Any = None) -> dict[str, Any]:
    """One measured number; `spread` is a standard error, an interval or a list of repeats, as the unit's text says."""
    return {"value": value, "unit": unit, "n": n, "spread": spread}


def record(file: str | Path, figures: dict[str, Any], **more: Any) -> None:
    """Write figures with command, device, versions, commit and date beside them."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()

    head = git("rev-parse", "HEAD")
    facts = {
        "command": " ".join(["python", "-m", _module(), *map(_told, sys.argv[1:])]),
        **machine(),
        "commit": (head or "unknown") + (" and changes to it" if git("status", "--porcelain", "-uno") else ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    with disk.whole(Path(file)) as f:  # a run that is stopped leaves the figures of before
        f.write((json.dumps({**facts, **more, "figures": figures}, indent=1) + "\n").encode())


def machine() -> dict[str, Any]:
    """What figures were measured on: the device and the versions."""
    import jax

    device = jax.devices()[0]
    gpus = f"{len(jax.devices())} x {device.device_kind}"
    return {
        "device": gpus if device.platform != "cpu" else f"cpu {platform.machine()}",
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in PACKAGES}},
    }


def _told(word: str) -> str:
    """An argument as a command elsewhere would have it: of an absolute path its last part."""
    flag, sign, value = word.rpartition("=")
    return f"{flag}{sign}{Path(value).name}" if Path(value).is_absolute() else word


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]


def cell(f: dict[str, Any], digits: int = 3) -> str:
    """A figure as text: value, then its standard error, interval or repeats; a dash where there is no value.

    A standard error shows its first digit at least. Of a value alone that would be one digit the next is shown too, of
    one that would be nothing but zeros the first three.
    """
    value, spread = f["value"], f["spread"]
    if value is None:
        return "-"
    error = spread.get("error") if isinstance(spread, dict) else spread if isinstance(spread, float) else None
    if error is not None:
        digits = max(digits, -math.floor(math.log10(error))) if error else digits
        return f"{value:.{digits}f} ± {error:.{digits}f}"
    assert not isinstance(spread, float)  # an error, above
    if spread is None:
        return _alone(value, digits)
    text = f"{value:.{digits}f}"
    if isinstance(spread, dict):
        parts = [_numbers(spread["interval"], digits)] if "interval" in spread else []
        return " ".join([text, *parts]) + (f" ({_numbers(spread['seeds'], digits)[1:-1]})" if "seeds" in spread else "")
    return f"{text} {_numbers(spread, digits)}" if spread[0] != spread[-1] else text


def _alone(value: float, digits: int) -> str:
    if 0 < abs(value) < 10**-digits:
        return f"{value:.3g}"
    one_digit = 0 < abs(value) < 10 ** (1 - digits)
    return f"{value:.{digits + one_digit}f}"


def _numbers(values: list[float], digits: int) -> str:
    return f"[{', '.join(f'{v:.{digits}f}' for v in values)}]"


def table(file: str | Path, pattern: str = ".*") -> str:
    """The figures of a results file, those whose name matches `pattern`, as a Markdown table."""
    data = json.loads(Path(file).read_text())
    rows = ["| figure | value | unit | n |", "|---|---|---|---|"]
    for name, f in data["figures"].items():
        if re.fullmatch(pattern, name):
            row = (name, cell(f), f["unit"], str(f["n"]))
            rows.append(f"| {' | '.join(map(_escaped, row))} |")
    return "\n".join(rows)


def _escaped(text: str) -> str:
    """As text of a Markdown table's cell, where a bar alone would end it."""
    return text.replace("|", r"\|")


def matrix(files: list[Path], columns: list[str]) -> str:
    """A row a results file, by its `arm` and `about`, else by its name; a column a figure, empty where it has none."""
    found = {}
    for file in files:
        data = json.loads(file.read_text())
        found[f"{data['arm']}: {data['about']}" if "arm" in data else file.stem] = data["figures"]
    return _crossed(found, columns)


def settings(file: Path, columns: list[str]) -> str:
    """A row each NAME of the figures `NAME: FIGURE` of a file that has one of the columns, in its order."""
    found: dict[str, dict[str, Any]] = {}
    for name, f in json.loads(file.read_text())["figures"].items():
        row, _, what = name.partition(": ")
        found.setdefault(row, {})[what] = f
    wanted = {c.partition(" = ")[0] for c in columns}
    return _crossed({row: figures for row, figures in found.items() if wanted & set(figures)}, columns)


def _crossed(found: dict[str, dict[str, Any]], columns: list[str]) -> str:
    names, titles = zip(*((c.partition(" = ")[0], c.partition(" = ")[2] or c) for c in columns), strict=True)
    rows = [f"| | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for label, figures in found.items():
        cells = [cell(figures[c]) if c in figures else "" for c in names]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(rows)


def fill(readme: str | Path) -> None:
    """Make the tables of a README anew from their files. Raises FileNotFoundError for a pattern without files."""
    readme = Path(readme)

    def made(match: re.Match) -> str:
        kind, (pattern, *columns) = match[2], [part.strip() for part in match[3].split(" | ")]
        found = {p.strip(): sorted(readme.parent.glob(p.strip())) for p in pattern.split(",")}
        if lacking := [p for p, files in found.items() if not files]:
            raise FileNotFoundError(f"{readme}: there is no {', '.join(lacking)}")
        files = [file for some in found.values() for file in some]
        if kind == "table":
            text = table(files[0], *columns)
        else:
            text = matrix(files, columns) if kind == "matrix" else settings(files[0], columns)
        return f"{match[1]}\n{text}\n<!-- end -->"

    text = re.sub(r"(<!-- (table|matrix|settings):(.*?) -->).*?<!-- end -->", made, readme.read_text(), flags=re.S)
    readme.write_text(text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        fill(name)
