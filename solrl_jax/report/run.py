"""The content of a run directory, also of older versions: config.json, metrics.jsonl, starts.json and kept pictures.

Missing and unreadable files become `notes`, not errors. Only a folder that is not a run directory is an error.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from solrl_jax import config, disk, rewards
from solrl_jax.config import Config, ConfigError
from solrl_jax.report.plot import Points
from solrl_jax.run import guards, log, model_card, pictures

EVAL = "eval_reward_"


class ReportError(ValueError):
    """A report that cannot be made; the message names the folder or file."""


class Run(NamedTuple):
    """`values` is the config by dotted names; `cfg` is None if a version with another config wrote it."""

    name: str
    folder: Path
    values: dict[str, Any]
    cfg: Config | None
    lines: list[log.Line]
    starts: list[dict[str, Any]]
    base: pictures.Kept | None
    last: pictures.Kept | None
    notes: list[str]
    damaged: tuple[str, ...] = ()  # files that exist but cannot be read; `notes` says why

    @property
    def iterations(self) -> int:
        return max((line["iteration"] for line in self.lines), default=0)

    @property
    def method(self) -> str:
        return model_card.family(self.cfg) if self.cfg else "—"

    @property
    def precisions(self) -> str:
        """ "explore nvfp4_emulated, regenerate bf16"."""
        found = [(name, self.values.get(f"{name}.precision")) for name in ("explore", "regenerate")]
        return ", ".join(f"{name} {precision}" for name, precision in found if precision) or "—"

    @property
    def guidance(self) -> float:
        """The weight of guidance in its evaluations; 1 in those of older versions."""
        return self.weight("evaluate.guidance") or self.weight("regenerate.guidance") or 1.0

    def weight(self, name: str) -> float:
        """The config's value of that name; 0 if it has none."""
        value: Any = self.values.get(name)
        return float(value) if drawable(value) else 0.0

    @property
    def devices(self) -> str:
        """ "2 x NVIDIA H100 80GB HBM3", for all starts."""
        found = [f"{start.get('devices')} x {start.get('device')}" for start in self.starts]
        return ", then ".join(dict.fromkeys(found)) or "—"

    @property
    def hours(self) -> float | None:
        """Hours of all iterations with their evaluations, without startup and the base's evaluation."""
        seconds = [y for _, y in self.points("time/iteration")]
        return sum(seconds) / 3600 if seconds else None

    @property
    def weights(self) -> dict[str, float]:
        """The weights of all evaluated rewards, trained ones first; negative: lower is better."""
        trained, others = self.mixtures
        return {**trained, **{name: weight for name, weight in others.items() if name not in trained}}

    @property
    def mixtures(self) -> tuple[dict[str, float], dict[str, float]]:
        """The weights of the trained rewards, and of those that are only evaluated."""
        trained, others = (str(self.values.get(key) or "") for key in ("reward", "evaluate.rewards"))
        return rewards.weights(trained), rewards.weights(others)

    def points(self, metric: str) -> list[tuple[int, float]]:
        """[(iteration, value)] for the finite values."""
        return [(line["iteration"], float(line[metric])) for line in self.lines if drawable(line.get(metric))]

    def evaluation(self, reward: str) -> "Evaluation | None":
        """None if this reward was never evaluated."""
        points = self.points(EVAL + reward)
        if not points:
            return None
        upwards = self.weights.get(reward, 1.0) > 0
        best = max(points, key=lambda point: point[1] if upwards else -point[1])
        return Evaluation(points[0] if points[0][0] == 0 else None, points[-1], best, upwards)


class Evaluation(NamedTuple):
    """(iteration, mean over the fixed prompts) of the base (if evaluated), of the last and of the best evaluation."""

    base: tuple[int, float] | None
    last: tuple[int, float]
    best: tuple[int, float]
    upwards: bool


def drawable(value: object) -> bool:
    """Whether it is a finite number, below 1e300 so that differences do not overflow."""
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) < 1e300


def metrics(runs: Sequence[Run], prefixes: Sequence[str]) -> list[str]:
    """Names of metrics with one of `prefixes` and a finite number in any run, in the order of `prefixes`."""
    names = sorted({name for run in runs for line in run.lines for name, value in line.items() if drawable(value)})
    return list(dict.fromkeys(name for prefix in prefixes for name in names if name.startswith(prefix)))


def read_all(folders: Sequence[Path]) -> list[Run]:
    """The runs, named by their folders, or by longer parts of their paths if names would be equal."""
    if not folders:
        raise ReportError("no run to report: give --run_dir=RUN or --runs=RUN,RUN")
    places = [Path(os.path.abspath(folder)) for folder in folders]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise ReportError(f"{twice} is given twice: give each run once")
    depth = next(d for d in range(1, 99) if len({place.parts[-d:] for place in places}) == len(places))
    return [read(place, "/".join(place.parts[-depth:])) for place in places]


def read(folder: Path, name: str) -> Run:
    """Raises ReportError if `folder` is not the directory of a run."""
    text = _text(folder / "config.json")
    if text is None:
        raise ReportError(f"{folder} is not the directory of a run: it has no config.json")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ReportError(f"{folder / 'config.json'}: not the JSON of a config: {e}") from None
    if not isinstance(values, dict):
        raise ReportError(f"{folder / 'config.json'}: not the JSON of a config: give a folder that training wrote")
    cfg, notes = None, []
    try:
        cfg = config.from_json(text)
    except (ConfigError, TypeError) as e:
        notes.append(f"Its config is of another version and is shown as it is written: {e}.")
    values = dict(config.values(cfg)) if cfg else flat(values)
    lines = log.read(folder / "metrics.jsonl")
    readers = {"starts.json": read_starts, "grids/base.npz": pictures.load, "grids/last.npz": pictures.load}
    found, damaged = [], []
    for file, reader in readers.items():
        found.append(disk.readable(reader, folder / file, said := []))
        damaged += [file] * len(said)
        notes += said
    starts, base, last = found
    run = Run(name, folder, values, cfg, lines, starts or [], base, last, notes, tuple(damaged))
    return run._replace(notes=[*notes, *told(run)])


def read_starts(file: Path) -> list[dict[str, Any]]:
    """The entries that `train.record_start` wrote at each start. Raises ValueError for other content."""
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, list) or not all(isinstance(start, dict) for start in found):
        raise ValueError("not a list of starts")
    if not all(isinstance(start.get("notes", []), list) for start in found):
        raise ValueError("the notes of a start are not a list")
    return found


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def flat(tree: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """{"explore.steps": 6, ...}."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{at}{key}.") if isinstance(value, dict) else {f"{at}{key}": value}
    return found


def told(run: Run) -> list[str]:
    """Notes for the reader, shown before the curves."""
    said = []
    if not run.iterations:
        said.append("No iteration is finished: there is nothing to plot yet.")
    elif run.cfg and run.iterations < run.cfg.iterations:
        said.append(f"It has finished {run.iterations} of {run.cfg.iterations} iterations.")
    said += _guidance(run)
    if not any(name.startswith(EVAL) for line in run.lines for name in line):
        said.append("It has no evaluation: there are no rewards before and after.")
    lost: dict[str, list[int]] = {}
    for line in run.lines:
        for name in (name for name, value in line.items() if not drawable(value)):
            lost.setdefault(name, []).append(line["iteration"])
    for name, where in lost.items():
        some = ", ".join(map(str, where[:5])) + (" and more" if len(where) > 5 else "")
        said.append(f"{name} is not a finite number in {len(where)} of {len(run.lines)} lines (iteration {some}).")
    return said


def _guidance(run: Run) -> list[str]:
    """The weights of guidance of its evaluations and its training, and what the base reaches at its own."""
    said, drawn = [], run.weight("regenerate.guidance") or 1.0
    learnt = run.weight("learn.guidance") or drawn
    stages = {"the previews": run.weight("explore.guidance") or drawn} if "explore.steps" in run.values else {}
    stages |= {"the rollouts": drawn, "the loss": learnt, "its reference": run.weight("learn.kl_guidance") or learnt}
    if run.guidance != 1 or set(stages.values()) != {1.0}:
        trained = ", ".join(f"{name} at {w:g}" for name, w in stages.items())
        if len(set(stages.values())) == 1:
            trained = f"all of it at {drawn:g}"
        said.append(f"Its evaluations, also the base's, are at guidance {run.guidance:g}; its training: {trained}.")
    first = next((line for line in run.lines if drawable(line.get("eval_own/guidance"))), None)
    if first is not None:
        found = {name: first.get(name) for name in ("eval_own/guidance", "eval_own/avg", "eval_reward_avg")}
        if all(drawable(value) for value in found.values()):
            w, own, base = found.values()
            said.append(
                f"At its own guidance, {w:g}, the base alone has an average reward of {own:.4g}; at that of the "
                f"evaluations, {run.guidance:g}, it has {base:.4g}, and gains are measured from there."
            )
    return said


def warnings(run: Run) -> list[str]:
    """The log's own warnings: held-out rewards that fell while the trained one rose."""
    trained, others = run.mixtures
    held_out = {name: weight for name, weight in others.items() if name not in trained}
    numbers = [{k: v for k, v in line.items() if drawable(v)} for line in run.lines]
    return [line.removeprefix("warning: ") for line in guards.exploited(numbers, held_out)]


def series(runs: Sequence[Run], metric: str) -> dict[str, Points]:
    """{run: points} of the runs that have the metric."""
    return {run.name: points for run in runs if (points := run.points(metric))}
