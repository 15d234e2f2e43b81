"""results/*.json: what was measured, by which command, on what, with which versions, and tables made from it.

python -m experiments.results experiments/tiny/README.md        # its tables anew from their files
"""

import datetime
import json
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers")


def figure(value: float, unit: str, n: int, spread: Any = None) -> dict[str, Any]:
    """One measured number; `spread` is a standard error, an interval or a list of repeats, as the unit's text says."""
    return {"value": value, "unit": unit, "n": n, "spread": spread}


def record(file: str | Path, figures: dict[str, Any], **more: Any) -> None:
    """Write figures with command, device, versions, commit and date beside them."""
    import jax

    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    device = jax.devices()[0]
    facts = {
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "device": f"{len(jax.devices())} x {device.device_kind}"
        if device.platform != "cpu"
        else f"cpu {platform.machine()}",
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in PACKAGES}},
        "commit": head.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps({**facts, **more, "figures": figures}, indent=1) + "\n")


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]


def table(file: str | Path, unit_digits: int = 3) -> str:
    """The figures of a results file as a Markdown table."""
    data = json.loads(Path(file).read_text())
    rows = ["| figure | value | unit | n |", "|---|---|---|---|"]
    for name, f in data["figures"].items():
        spread = f" ± {f['spread']:.3f}" if isinstance(f["spread"], float) else f" {f['spread'] or ''}".rstrip()
        rows.append(f"| {name} | {f['value']:.{unit_digits}f}{spread} | {f['unit']} | {f['n']} |")
    return "\n".join(rows)


def fill(readme: str | Path) -> None:
    """Write the tables between "<!-- table:FILE -->" and "<!-- end -->" of a README anew from their files."""
    readme = Path(readme)

    def made(match: re.Match) -> str:
        return f"{match[1]}\n{table(readme.parent / match[2])}\n<!-- end -->"

    text = re.sub(r"(<!-- table:(\S+) -->).*?<!-- end -->", made, readme.read_text(), flags=re.S)
    readme.write_text(text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        fill(name)
