"""Logging of metrics: metrics.jsonl, TensorBoard, the screen, and Weights & Biases if configured.

A sink is a function write(iteration, metrics). metrics.jsonl has one JSON object per line, "iteration" first. The line
of iteration 0 describes the base model: its evaluation and how well the preview ranks. It is the first line and written
once, whenever that happens. A number that is not finite is null there (JSON has no NaN) and not sent to TensorBoard.
"""

import contextlib
import json
import math
import os
import secrets
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from solrl_jax import disk, processes

Metrics = Mapping[str, float]
Sink = Callable[[int, Metrics], None]
Line = dict[str, Any]
"""One line of metrics.jsonl: "iteration" (int) and metrics (float, None where not finite)."""


class LogError(RuntimeError):
    """A sink cannot be opened; the message says what to do."""


class Log(NamedTuple):
    """write(iteration, metrics) writes to all sinks and returns the line of metrics.jsonl; between(stage, share done)
    moves the progress bar; say(text) prints a line."""

    write: Callable[[int, Metrics], Line]
    between: Callable[[str, float], None]
    say: Callable[[str], None]


@contextlib.contextmanager
def open_log(
    run: Path, done: int, total: int, judge: str = "", also: Sequence[contextlib.AbstractContextManager[Sink]] = ()
) -> Iterator[Log]:
    """Open all sinks of a run that has finished `done` iterations; the files' entries for later ones are removed.

    The screen shows the last evaluation of the reward `judge`; `also` are further sinks. Of several processes the first
    one writes; the others have no sinks.
    """
    if not processes.first():
        yield Log(as_line, lambda stage, share: None, lambda text: None)
        return
    with contextlib.ExitStack() as stack:
        screen = stack.enter_context(contextlib.closing(Screen(done, total, judge)))
        sinks = (
            stack.enter_context(jsonl(run / "metrics.jsonl", done)),
            stack.enter_context(tensorboard(run / "tensorboard", done)),
            *(stack.enter_context(sink) for sink in also),
        )

        def write(iteration: int, metrics: Metrics) -> Line:
            for sink in (*sinks, screen.write):
                sink(iteration, metrics)
            return as_line(iteration, metrics)

        yield Log(write, screen.between, screen.say)


# --- files ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def jsonl(file: Path, done: int) -> Iterator[Sink]:
    """Append to `file`, after removing lines of iterations after `done` and an incomplete last line.

    A line of iteration 0 goes to the beginning and replaces an existing one.
    """
    kept = [json.dumps(line) + "\n" for line in read(file) if line["iteration"] <= done]
    _rewrite(file, kept)
    f = file.open("a", encoding="utf-8")

    def write(iteration: int, metrics: Metrics) -> None:
        nonlocal f
        text = json.dumps(as_line(iteration, metrics), allow_nan=False) + "\n"
        if iteration == 0:  # it comes late if evaluation is switched on in a resumed run, and again if it is changed
            f.close()
            _rewrite(file, [text, *(json.dumps(line) + "\n" for line in read(file) if line["iteration"] > 0)])
            f = file.open("a", encoding="utf-8")
        else:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())  # before the checkpoint is saved: a checkpoint without its line must not exist

    try:
        yield write
    finally:
        f.close()


def finite(metrics: Metrics) -> dict[str, float | None]:
    """`metrics` with None for numbers that are not finite."""
    return {k: v if math.isfinite(v) else None for k, v in metrics.items()}


def _rewrite(file: Path, lines: Sequence[str]) -> None:
    with disk.whole(file) as f:
        f.write("".join(lines).encode())


def as_line(iteration: int, metrics: Metrics) -> Line:
    """The line of an iteration in metrics.jsonl; None for numbers that are not finite."""
    return {"iteration": iteration, **finite(metrics)}


def read(file: Path) -> list[Line]:
    """The lines of a metrics.jsonl as dicts; [] if there is no file. Incomplete and damaged lines are left out."""
    lines = []
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("iteration"), int)]


@contextlib.contextmanager
def tensorboard(folder: Path, done: int) -> Iterator[Sink]:
    """TensorBoard events; in a resumed run, TensorBoard is told to discard steps after `done`."""
    from tensorboardX import SummaryWriter

    resumed = folder.exists()
    with SummaryWriter(str(folder), purge_step=done + 1 if resumed else None) as writer:

        def write(iteration: int, metrics: Metrics) -> None:
            for name, value in metrics.items():
                if math.isfinite(value):
                    writer.add_scalar(name, value, iteration)
            writer.flush()

        yield write


@contextlib.contextmanager
def wandb(run: Path, project: str, config: Mapping[str, Any]) -> Iterator[Sink]:
    """Weights & Biases; `project` is "project" or "entity/project". run/wandb.json keeps the id, so a resumed run
    continues the same wandb run.

    The axis is "iteration", not wandb's own step, which can only increase. So iterations that a killed run repeats
    appear twice, with the same numbers. Raises LogError if login fails.
    """
    import wandb as service  # pyright: ignore[reportMissingImports] - an optional dependency

    known = _wandb_id(run / "wandb.json")
    entity, _, name = project.rpartition("/")
    where = {"entity": entity or None, "project": name, "name": run.name, "dir": str(run)}
    try:
        session = service.init(**where, id=known, resume="allow", config=dict(config))
    except service.Error as e:
        raise LogError(
            f"wandb={project}: {str(e).rstrip('.')}; log in by `wandb login`, or set WANDB_MODE=offline"
        ) from None
    with session:
        session.define_metric("*", step_metric="iteration")

        def write(iteration: int, metrics: Metrics) -> None:
            session.log({"iteration": iteration, **{k: v for k, v in metrics.items() if math.isfinite(v)}})

        yield write


def _wandb_id(file: Path) -> str:
    """The id that `file` keeps, made if there is no file. LogError if it holds none, as after a full disk."""
    if not file.exists():
        with disk.whole(file) as f:
            f.write(json.dumps({"id": secrets.token_hex(4)}).encode())
    try:
        return json.loads(file.read_text(encoding="utf-8"))["id"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise LogError(f"{file} has no id of a wandb run ({e!r}): remove it, and the run continues as a new one") from e


# --- screen ---------------------------------------------------------------------------------------------------------

_NEXT = {"explore": "regenerate", "regenerate": "learn"}
_STAGES = ("encode", "quantise", "explore", "select", "regenerate", "learn", "evaluate")


class Screen:
    """A tqdm bar on a terminal; otherwise (files, CI) one plain line per iteration."""

    def __init__(self, done: int, total: int, judge: str = ""):
        self.total, self.judge = total, judge
        self.judged: float | None = None
        self.seconds: list[float] = []
        form = "{desc:15} |{bar:20}| {n_fmt}/{total_fmt}{postfix}"
        self.bar = tqdm(total=total, initial=done, dynamic_ncols=True, bar_format=form) if sys.stderr.isatty() else None

    def between(self, stage: str, share: float) -> None:
        if self.bar is not None:
            if share >= 1 and stage in _NEXT:
                stage, share = _NEXT[stage], 0.0
            self.bar.set_description_str(f"{stage} {share:4.0%}")

    def write(self, iteration: int, metrics: Metrics) -> None:
        """Show an iteration; iteration 0 is the base model."""
        self.judged = metrics.get(f"eval_reward_{self.judge}", self.judged)
        self.seconds += [metrics["time/iteration"]] if "time/iteration" in metrics else []
        text = self.line(iteration, metrics)
        if iteration == 0:
            self.say(
                "base model: " + "  ".join(f"{k.removeprefix('eval_reward_')} {v:.4f}" for k, v in metrics.items())
            )
        elif self.bar is not None:
            self.bar.set_description_str("", refresh=False)
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        else:
            print(f"iteration {iteration}/{self.total}  {text}", flush=True)

    def line(self, iteration: int, metrics: Metrics) -> str:
        """ "reward 0.31  shapes 0.62  ETA 3m20s  explore 2.1s  learn 1.2s" """
        words = [f"reward {metrics['reward/mean']:.4f}"] if "reward/mean" in metrics else []
        words += [f"{self.judge} {self.judged:.4f}"] if self.judged is not None else []
        left = self.total - iteration
        if left and len(self.seconds) > 1:  # the first one includes compiling
            words.append(f"ETA {duration(left * statistics.median(self.seconds[1:][-20:]))}")
        words += [f"{s} {metrics[f'time/{s}']:.1f}s" for s in _STAGES if metrics.get(f"time/{s}", 0) >= 0.05]
        return "  ".join(words)

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """ "45s", "3m20s", "2h05m"."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"
