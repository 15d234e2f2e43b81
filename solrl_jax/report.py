"""report.html of a run: curves, pictures before and after, config. One file, no scripts, readable on a phone."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from solrl_jax import checkpoint, config, log, rewards

Points = Sequence[tuple[int, float]]

CURVES = {
    "Reward of the kept samples": ("reward/mean", "reward/max", "reward/min"),
    "Evaluation: fixed prompts, fixed noise, EMA policy": ("eval_reward_",),
    "Spread within a prompt": ("reward_std_mean", "reward/range", "zero_std_ratio"),
    "Does the preview rank as the real thing does? (Spearman)": ("rank/",),
    "Distance from base and old policy": ("kl_div", "old_deviate"),
    "Gradient norm": ("grad_norm",),
    "Seconds an iteration": ("time/",),
}
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#57606a", "#0a7ea4")

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; color: #1f2328 }
svg, img { width: 100%; height: auto } figure { margin: 1.5rem 0 } figcaption { font-weight: 600 }
img { max-width: 40rem; display: block } svg text { font-size: 11px }
p { border-left: .3rem solid #d1242f; padding-left: .6rem }
table { border-collapse: collapse; font-size: .85rem }
td { border-top: 1px solid #d0d7de; padding: .15rem .6rem .15rem 0; overflow-wrap: anywhere }
"""


def curve(series: Mapping[str, Points], width: int = 640, height: int = 220) -> str:
    """An inline SVG of lines {name: [(x, y), ...]}, all finite: ranges at the axes, names and last values below."""
    xs, ys = ([point[i] for points in series.values() for point in points] for i in (0, 1))
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)

    def place(x: int, y: float) -> str:
        up = (y - low) / (high - low) if high > low else 0.5
        return f"{60 + (x - left) / (right - left or 1) * (width - 70):.1f},{height - 20 - up * (height - 30):.1f}"

    parts = [
        f'<svg viewBox="0 0 {width} {height + 4 + 18 * -(-len(series) // 3)}" role="img">',
        f'<path d="M60 10V{height - 20}H{width - 10}" fill="none" stroke="#8c959f"/>',
        f'<text x="55" y="16" text-anchor="end">{high:.4g}</text>',
        f'<text x="55" y="{height - 20}" text-anchor="end">{low:.4g}</text>',
        f'<text x="60" y="{height - 5}">{left:g}</text>',
        f'<text x="{width - 10}" y="{height - 5}" text-anchor="end">{right:g}</text>',
    ]
    for i, (name, points) in enumerate(series.items()):
        colour, line = COLOURS[i % len(COLOURS)], [place(x, y) for x, y in points]
        parts.append(f'<polyline points="{" ".join(line)}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if len(line) <= 40:  # few points: show where they are, also a lone one
            parts += ['<circle cx="{}" cy="{}" r="2.5" fill="{}"/>'.format(*p.split(","), colour) for p in line]
        x, y = 60 + (i % 3) * (width - 70) // 3, height + 14 + 18 * (i // 3)
        parts.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="{y}">{html.escape(name)} {points[-1][1]:.4g}</text>')
    return "".join([*parts, "</svg>"])


def collect(lines: Sequence[log.Line], prefixes: Sequence[str]) -> Mapping[str, Points]:
    """{metric: [(iteration, value)]} of the metrics that begin with one of `prefixes`; nulls are left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if value is not None and name.startswith(tuple(prefixes)):
                found.setdefault(name, []).append((line["iteration"], value))
    return found


def summary(lines: Sequence[log.Line]) -> str:
    """First and last evaluation of every reward, as a table."""
    rows = [
        f"<tr><td>{html.escape(name.removeprefix('eval_reward_'))}</td><td>{points[0][1]:.4f}</td><td>{points[-1][1]:.4f}</td></tr>"
        for name, points in collect(lines, ("eval_reward_",)).items()
    ]
    return f"<table><tr><td>reward</td><td>base</td><td>last</td></tr>{''.join(rows)}</table>" if rows else ""


def figure(title: str, body: str) -> str:
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{body}</figure>"


def grids(run: Path) -> list[Path]:
    """The first grid, the last, and two between: enough to see the way."""
    files = sorted((run / "grids").glob("[0-9]*.png"))
    count = len(files)
    return [files[i] for i in sorted({0, count // 3, 2 * count // 3, count - 1})] if files else []


def write(run: Path) -> Path:
    """Make <run>/report.html from what the run has written so far."""
    lines = log.read(run / "metrics.jsonl")
    cfg = checkpoint.load_config(run)
    title = f"{cfg.name or run.name}: {max((line['iteration'] for line in lines), default=0)} iterations"
    said = log.exploited(lines, rewards.held_out(cfg.reward, cfg.evaluate.rewards))
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in said), summary(lines)]
    for file in reversed(grids(run)):
        picture = base64.b64encode(file.read_bytes()).decode()
        parts.append(
            figure(f"Iteration {int(file.stem)}", f'<img alt="pictures" src="data:image/png;base64,{picture}">')
        )
    for name, prefixes in CURVES.items():
        if series := collect(lines, prefixes):
            parts.append(figure(name, curve(series)))
    cells = [f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in config.values(cfg)]
    parts.append(figure("Config", f"<table>{''.join(cells)}</table>"))
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    page = f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    file = run / "report.html"
    file.write_text(page, encoding="utf-8")
    return file
