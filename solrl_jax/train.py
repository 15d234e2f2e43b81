"""The host loop of --mode=train: draw prompts, run one iteration, evaluate, log, save; and how a run ends.

A run ends in one of three ways. All iterations done: LoRA files and report, exit code 0. SIGINT or SIGTERM: the current
stage is finished, the last finished iteration saved, and the exit code is 75 (sysexits.h's EX_TEMPFAIL: try again),
which tells a scheduler to use --resume. An error (a reward that raises or is not finite, three non-finite updates in a
row, a lost device, a full disk): the last finished iteration is saved if possible, and the error is raised. An
iteration is finished when its line is in metrics.jsonl, so a resumed run has every line.

Of several processes the first one writes; a signal to one stops all after the same stage. Every iteration is saved: a
lost process ends the others before Python could save.
"""

import contextlib
import functools
import importlib.util
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import NamedTuple

import jax

from solrl_jax import device, disk, guidance, iteration, learn, mixture, processes, report, sharding
from solrl_jax.config import Config, ConfigError, to_json, values
from solrl_jax.keys import calibration_key
from solrl_jax.models.text import contents
from solrl_jax.quant import calibrate
from solrl_jax.quant.calibrate import calibrated
from solrl_jax.report.run import read_starts
from solrl_jax.rewards.own import RewardError
from solrl_jax.run import assemble, checkpoint, data, evaluate, export, guards, manifest, pictures, watch
from solrl_jax.run.assemble import Parts
from solrl_jax.run.guards import TrainError, check_ratio, check_rewards, device_error, not_finite
from solrl_jax.run.log import Line, Log, finite, open_log, read, wandb
from solrl_jax.run.pictures import Shown
from solrl_jax.structs import Prompts, Row, TrainState

Metrics = dict[str, float]
SKIPS = 3
"""Non-finite updates in a row after which a run stops."""
UNFINISHED = 75
"""Exit code of a run that was stopped, saved, and has iterations left."""
SHARED = 60
"""Seconds after which a process must see what another one wrote; NFS may show a folder as it was for as long."""


class Stopped(Exception):
    """Raised to leave an unfinished iteration: a signal came between two of its stages."""


def train(cfg: Config, run: Path, *, resume: bool = False, devices: int | None = None) -> int:
    """Train `cfg` in the directory `run`, from its newest whole checkpoint if `resume`. Returns the exit code."""
    asked, cfg = cfg, assemble.resolved(cfg, assemble.capability())
    if cfg.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"wandb={cfg.wandb} needs a package that is not here: pip install wandb")
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            stack.enter_context(checkpoint.alone(run))

        stop = stack.enter_context(signals())
        if resume:  # first, so that what is found there stays as it is
            processes.by_first(lambda: hold() if (run / "config.json").exists() else None)
        place, said = processes.together(lambda: resume_point(run, resume))
        if place is not None and int(place.name) > cfg.iterations:
            raise ConfigError(
                f"iterations={cfg.iterations}, but {run} has finished {place.name}: give more to go on, or choose "
                "another directory; --mode=export writes the LoRA of a saved iteration"
            )
        processes.same({"the checkpoint to go on from": str(place), **common_settings(cfg, run)})
        settled, why = assemble.settled_by_all(cfg, devices)
        state = None if place is None else restored(place, cfg, devices, settled.shard)
        parts = processes.together(lambda: assemble.assemble(cfg, devices, settled))
        processes.same({"the content of prompt_files": data.digest(parts.prompts)})
        stack.enter_context(jax.set_mesh(parts.mesh))
        parts, state = ready(parts), state or assemble.fresh(parts)
        done, notes = int(state.iteration), [*assemble.notes(parts), *other_prompts(place, parts)]

        def opened() -> list[str]:
            try:
                run.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise ConfigError(f"--run_dir={run} cannot be made ({e.strerror}): give another folder") from None
            if not resume:
                hold()
                resume_point(run, resume)  # again: another run may have begun here since
            elif place is None:  # it begins again: another base may have been drawn
                for name in ("base", "base_own"):
                    (run / "grids" / f"{name}.npz").unlink(missing_ok=True)
            checkpoint.replace(run / "config.json", to_json(cfg))
            return record_start(run, done, parts, notes)

        notes = processes.by_first(opened) or []
        check_shared(run)
        held_out = parts.judged.names[len(parts.score.names) :]
        judge = (*held_out, *parts.score.names)[0]
        also = (wandb(run, cfg.wandb, json.loads(to_json(cfg))),) if cfg.wandb and processes.first() else ()
        with open_log(run, int(state.iteration), cfg.iterations, judge, also) as out:
            for line in (*said, *assemble.told_of_auto(asked, cfg), *why, *notes):
                out.say(line)
            try:
                state = loop(parts, state, run, out, stop)
            except (TrainError, RewardError, processes.ProcessError) as e:
                begun = f"Nothing is saved in {run} yet: --resume begins again"
                there = f"Checkpoints, metrics and pictures so far are in {run}"
                raise TrainError(f"{e}. {there if checkpoint.saved(run) else begun}") from None
            except checkpoint.CheckpointError:  # its message says what is saved
                raise
            except Exception as e:
                e.add_note(f"What was finished before is saved in {run}: --resume --run_dir={run} goes on from it.")
                raise
    processes.by_first(lambda: finish(parts, state, run))
    return UNFINISHED if int(state.iteration) < cfg.iterations else 0


def common_settings(cfg: Config, run: Path) -> dict[str, str]:
    """What all processes must have in common to train together."""
    fields = {name: repr(value) for name, value in values(cfg)}
    code = contents(Path(__file__).parent, "**/*.py")[:16]
    return {"run_dir": str(run), "jax": jax.__version__, "the code of solrl_jax": code, **fields}


def check_shared(run: Path) -> None:
    """ConfigError, on all processes, if one does not see what the first one wrote last, starts.json: its folder `run`
    is another one, empty or a copy."""
    file = run / "starts.json"
    written = processes.agreed(lambda: file.read_text(encoding="utf-8"))

    def seen() -> None:
        until = time.monotonic() + SHARED
        while not file.exists() or file.read_text(encoding="utf-8") != written:
            if time.monotonic() > until:
                raise ConfigError(
                    f"--run_dir={run} is not shared: process 0 wrote {file.name} there and process "
                    f"{processes.index()} does not see it; give a folder that all hosts have"
                )
            time.sleep(1)

    processes.together(seen)


def record_start(run: Path, done: int, parts: Parts, notes: list[str]) -> list[str]:
    """Add this start to starts.json: `done`, the devices, JAX's version and the log's first lines. Returns those lines:
    the notes, after a message if the earlier starts cannot be read."""
    file, first = run / "starts.json", parts.mesh.devices.flat[0]
    past = disk.readable(read_starts, file, said := []) or []
    now = {"after": done, "devices": parts.mesh.size, "device": first.device_kind, "jax": jax.__version__}
    checkpoint.replace(file, json.dumps([*past, now | {"notes": [*said, *notes]}], indent=1))
    return [*said, *notes]


def resume_point(run: Path, resume: bool) -> tuple[Path | None, list[str]]:
    """(the checkpoint to resume from or None, lines for the log), before anything large is read."""
    has_config = (run / "config.json").exists()
    if not resume:
        if has_config:
            raise ConfigError(
                f"--run_dir={run} holds a run already: go on with it by --resume, or choose another directory"
            )
        if checkpoint.steps(run):  # they would be taken for this run's
            raise ConfigError(
                f"--run_dir={run} has checkpoints of a run without its config.json: copy one of {run}/checkpoints/ "
                "there and go on by --resume, or choose another directory"
            )
        return None, []
    if has_config and not checkpoint.saved(run):
        return None, [f"nothing was saved in {run} before it ended: beginning again"]
    place, said = checkpoint.find(run)
    return place, [*said, f"going on from {place}"]


def other_prompts(place: Path | None, parts: Parts) -> list[str]:
    """A line for the log if the checkpoint's run drew from other prompts: `prompt_files` may move, or be edited."""
    if place is None or manifest.read(place)["prompts"] in ("", data.digest(parts.prompts)):
        return []
    return [f"prompt_files={parts.cfg.prompt_files} has other prompts or rows than when {place} was saved"]


def restored(place: Path, cfg: Config, devices: int | None, shard: int) -> TrainState:
    """The state of a checkpoint, on every device."""
    mesh = assemble.make_mesh(devices, shard, cfg.prompts)
    return checkpoint.restore(place, assemble.blank(cfg, assemble.model_module(cfg).make(cfg.model), mesh), cfg)


def loop(parts: Parts, state: TrainState, run: Path, out: Log, stop: "Stop") -> TrainState:
    """Iterate to the end or to a signal; the last finished iteration is on disk when this returns or raises."""
    cfg, first, done, score = parts.cfg, int(state.iteration), int(state.iteration), None
    every = cfg.save_every if processes.count() == 1 else 1
    lora = {"lora": [origin._asdict() for origin in parts.base_loras.origins]} if parts.base_loras else {}
    with checkpoint.Saver(run, cfg, {"prompts": data.digest(parts.prompts), **lora}) as saver:
        try:
            if stop.asked():  # while the weights were read
                return state
            base, seen = beginning(parts, state, run, out)
            state = watch.with_fall_back(state, seen, cfg) if done == 0 else state
            lines, alarms = processes.agreed(lambda: read(run / "metrics.jsonl")), frozenset()
            step, low, began = stepper(parts, out, stop), True, time.perf_counter()
            while done < cfg.iterations and not stop.asked():
                if low and int(state.fallen_back):
                    step, low = stepper(parts._replace(cfg=watch.in_bf16(cfg)), out, stop), False
                    out.say(f"exploring in bf16 from iteration {done + 1} on")
                batch = encoded(parts, done, times := {})
                try:
                    new, metrics = iterate(parts, state, batch, step, times)
                except Stopped:
                    break
                number = int(new.iteration)
                if low and watch.due(cfg, number):
                    metrics |= watch.measured(parts, new)
                    new = watch.with_fall_back(new, metrics, cfg)
                if cfg.evaluate.every and (number % cfg.evaluate.every == 0 or number == cfg.iterations):
                    metrics |= evaluated(parts, new, run, out, base)
                began, metrics["time/iteration"] = time.perf_counter(), time.perf_counter() - began
                lines.append(line := processes.together(functools.partial(out.write, number, metrics)))
                state, done, score = new, number, line.get("eval_reward_avg")
                alarms = warned(lines, cfg, alarms, out)
                if every and done % every == 0:
                    saver.save(state, score)
                processes.together(functools.partial(check_skipped, parts, state, batch.prompts, metrics))
        except jax.errors.JaxRuntimeError as e:
            raise TrainError(f"iteration {done + 1}: {device_error(e)}") from e
        finally:
            # A run that fails in its first iteration saves nothing; a run that is stopped there saves its state. If
            # one process fails alone, the others do not come here: what it finished before is saved already.
            if (done > first or stop.agreed) and processes.known(sys.exception()):
                saver.save(state, score)
    return state


def warned(lines: list[Line], cfg: Config, before: Set[str], out: Log) -> Set[str]:
    """Say what is wrong in the last of `lines`. Returns the kinds of alarms that go on; one is said when it begins."""
    last = lines[-1]
    if last["skipped"]:
        out.say(f"warning: iteration {last['iteration']}: {last['skipped']:.0f} updates were not finite and skipped")
    found = guards.alarms(lines, cfg)
    for kind in found.keys() - before:
        out.say(found[kind])
    for warning in guards.falling(lines, cfg) if "eval_reward_avg" in last else ():
        out.say(warning)
    return found.keys()


def ready(parts: Parts) -> Parts:
    """`parts` with the negative conditioning, if the training is guided by one, and the units of FP8's inputs, if a
    stage runs in FP8. The base measures the units on the run's first prompts, encoded with all prompts of the text
    encoders' first call, so that a resumed run finds the same ones.
    """
    cfg, there = parts.cfg, parts.prompts.train
    low = [stage for _, stage, _ in cfg.stages() if stage.precision == "fp8"]
    cond = None
    if low:
        some = data.batch(there, cfg.seed, 0, min(calibrate.PROMPTS, len(there)))
        padded = [*some, *[some[-1]] * (-len(some) % parts.mesh.size)]
        first, ahead = drawn(parts, 0)
        found = parts.text(padded, [*first, *ahead], batch=cfg.prompts)
        cond = jax.tree.map(lambda c: c[: len(some)], sharding.fetch(found))
    if guidance.trains_doubled(cfg, parts.model):
        parts = parts._replace(frozen=parts.frozen._replace(negative=parts.text.negative()))
    if not low:
        return parts
    variables, key = {"params": parts.frozen.base}, calibration_key(cfg.seed)
    given = sharding.replicate(cond, parts.mesh), key, low, parts.frozen.negative
    try:
        return parts._replace(model=calibrated(parts.model, variables, *given))
    except FloatingPointError as e:
        raise TrainError(f"FP8 cannot be calibrated: {e}; see whether the weights are whole") from None


def drawn(parts: Parts, done: int) -> tuple[list[str], list[str]]:
    """(prompts of the iteration after `done`, prompts of the later ones that are encoded with them)."""
    cfg = parts.cfg
    upcoming = range(done, min(done + max(1, cfg.encode_ahead), cfg.iterations))
    found = [p for i in upcoming for p in data.batch(parts.prompts.train, cfg.seed, i, cfg.prompts)]
    return found[: cfg.prompts], found[cfg.prompts :]


class Batch(NamedTuple):
    """An iteration's prompts, encoded, and their rows."""

    prompts: Prompts
    rows: list[Row]


def encoded(parts: Parts, done: int, times: dict[str, float]) -> Batch:
    """The prompts of the iteration after `done`; `drawn` says which are encoded with them."""
    with iteration.clock(times, "encode"):
        texts, ahead = drawn(parts, done)
        prompts = jax.block_until_ready(assemble.encode(parts, texts, parts.score, ahead))
        return Batch(prompts, parts.prompts.rows_of(texts))


def iterate(
    parts: Parts, state: TrainState, batch: Batch, step: "Step", times: dict[str, float]
) -> tuple[TrainState, Metrics]:
    """One iteration's state and metrics, which include `times`. Raises TrainError if a reward is not finite, Stopped
    if a signal came between two stages."""
    new, metrics = step(state, batch, times)
    numbers = mixture.known({name: float(value) for name, value in jax.device_get(metrics).items()})
    number = int(new.iteration)

    def check() -> None:
        check_rewards(numbers, number, functools.partial(not_finite, parts, state, batch.prompts))
        if number == 1:  # only at the start: a later iteration near the limit does not stop a run
            check_ratio(numbers, number, parts.cfg.learn.clip_range)

    processes.together(check)
    return new, numbers | {f"time/{name}": seconds for name, seconds in times.items()}


def check_skipped(parts: Parts, state: TrainState, prompts: Prompts, metrics: Metrics) -> None:
    """Raises TrainError, which names the cause, after SKIPS non-finite updates in a row."""
    if (skipped := int(metrics["skipped_in_a_row"])) >= SKIPS:
        raise TrainError(
            f"iteration {int(state.iteration)}: {skipped} updates in a row had non-finite gradients: "
            + (not_finite(parts, state, prompts) or "lower learn.learning_rate or set model.dtype=float32")
        )


Step = Callable[[TrainState, Batch, dict[str, float]], tuple[TrainState, dict]]


def stepper(parts: Parts, out: Log, stop: "Stop") -> Step:
    """(state, batch, times) -> (state, metrics): staged, with progress and stops between stages, or one program."""
    statics = {"model": parts.model, "score": parts.score, "optimizer": parts.optimizer, "cfg": parts.cfg}
    if parts.cfg.staged:
        staged = iteration.Staged(**statics)

        def between(stage: str, share: float) -> None:
            out.between(stage, share)
            if stage != "learn" and stop.asked():  # learn is the last stage: the iteration finishes
                raise Stopped

        return lambda state, batch, times: staged(state, parts.frozen, batch.prompts, times, between, batch.rows)
    options = device.compiler_options(parts.cfg.low_precision or "bf16", parts.cfg.learn.deterministic)
    whole = jax.jit(iteration.iteration_step, static_argnames=tuple(statics), compiler_options=options)

    def step(state: TrainState, batch: Batch, times: dict[str, float]) -> tuple[TrainState, dict]:
        learn.check_hyper(state.hyper, parts.cfg)
        with iteration.clock(times, "step"):
            return jax.block_until_ready(whole(state, parts.frozen, batch.prompts, **statics))

    return step


# --- evaluation -----------------------------------------------------------------------------------------------------


def beginning(parts: Parts, state: TrainState, run: Path, out: Log) -> tuple[Shown | None, Metrics]:
    """The base model's pictures (from a resumed run's file, or drawn; None without evaluation) and its metrics.

    The metrics are iteration 0's line: the rewards of these pictures, and how well the preview ranks. The line is
    written if it is missing or different. The preview is measured when a run begins, so that a run that does not fit
    the device fails in its first minutes.
    """
    cfg = parts.cfg
    shown = _base(parts, state, run, out) if cfg.evaluate.every else {}
    base, own = shown.get("base"), shown.get("base_own")
    lines = processes.agreed(lambda: read(run / "metrics.jsonl"))
    before = next((line for line in lines if line["iteration"] == 0), {})
    metrics = {} if base is None else evaluate.averages(base, parts.score)
    if own is not None:
        means = evaluate.averages(own, parts.score)
        metrics |= {f"eval_own/{name.removeprefix('eval_reward_')}": value for name, value in means.items()}
        metrics["eval_own/guidance"] = parts.model.guided
    for name, value in before.items() if int(state.iteration) else ():
        if name != "iteration" and (base is None or name.startswith("watch/")):
            metrics[name] = math.nan if value is None else value
    if int(state.iteration) == 0 and watch.due(cfg, 0):
        out.between("watch", 0.0)
        metrics |= watch.measured(parts, state)
    if metrics and finite(metrics) != {k: v for k, v in before.items() if k != "iteration"}:
        processes.together(lambda: out.write(0, metrics))
    return base, metrics


def _base(parts: Parts, state: TrainState, run: Path, out: Log) -> dict[str, Shown]:
    """ "base": the base's pictures for the config's evaluation, and "base_own": those at its own weight of guidance, if
    the config asks for them. They are drawn again if the file's are for another evaluation."""
    wanted = {"base": parts} | ({"base_own": evaluate.at_own(parts)} if guidance.own(parts.cfg, parts.model) else {})
    how, found = {name: evaluate.settings(each) for name, each in wanted.items()}, {}
    for name in wanted:
        kept = disk.readable(pictures.load, run / "grids" / f"{name}.npz", said := [])
        for line in said:
            out.say(line)
        if not processes.any_of(kept is None or kept.how != how[name]):
            found[name] = kept.shown  # pyright: ignore[reportOptionalMemberAccess] - it is not None
    if found.keys() == wanted.keys():
        return found
    out.between("evaluate", 0.0)
    zeros = jax.tree.map(lambda x: x * 0, state.ema)  # placed like the EMA: one compiled program draws both
    drawn = {name: evaluate.evaluate(each, zeros)[1] for name, each in wanted.items() if name not in found}
    found = {name: (found | drawn)[name] for name in wanted}
    columns = {guidance.titled("base", guidance.evaluated(wanted[name].cfg)): x.images for name, x in found.items()}

    def write() -> None:
        grid = pictures.write_grid(run / "grids" / "000000.png", found["base"].prompts, columns)
        out.say(f"first pictures: {grid}")
        for name, shown in drawn.items():
            pictures.save(run / "grids" / f"{name}.npz", shown, 0, how[name])

    processes.by_first(write)
    return found


def evaluated(parts: Parts, state: TrainState, run: Path, out: Log, base: Shown | None) -> dict[str, float]:
    """eval_reward_* and eval_gain* of the EMA policy. Writes its grid beside the base's and its last.npz."""
    out.between("evaluate", 0.0)
    times: dict[str, float] = {}
    with iteration.clock(times, "time/evaluate"):
        metrics, shown = evaluate.evaluate(parts, state.ema)
    number, w = int(state.iteration), guidance.evaluated(parts.cfg)
    columns = ({} if base is None else {"base": base.images}) | {f"iteration {number}": shown.images}
    columns = {guidance.titled(title, w): images for title, images in columns.items()}

    def write() -> None:
        pictures.write_grid(run / "grids" / f"{number:06d}.png", shown.prompts, columns)
        pictures.save(run / "grids" / "last.npz", shown, number, evaluate.settings(parts))

    processes.by_first(write)
    return metrics | ({} if base is None else evaluate.gains(base, shown, parts.score)) | times


# --- ends -----------------------------------------------------------------------------------------------------------


class Stop:
    """Whether the run is to stop: `event` is set by a signal to this process; `agreed`, if all have learnt of one."""

    def __init__(self, event: threading.Event):
        self.event, self.agreed = event, False

    def asked(self) -> bool:
        """`agreed`, after asking all processes. All must call it at the same stages."""
        self.agreed = self.agreed or processes.any_of(self.event.is_set())
        return self.agreed


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM set its event; a second signal ends the process at once, by the default handler."""
    stop, kinds = threading.Event(), (signal.SIGINT, signal.SIGTERM)

    def handler(number: int, frame: object) -> None:
        stop.set()
        for kind in kinds:
            signal.signal(kind, signal.SIG_DFL)
        os.write(2, b"\nfinishing the current stage, then saving; once more to quit at once\n")  # safe in a handler

    before = {kind: signal.signal(kind, handler) for kind in kinds}
    try:
        yield Stop(stop)
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)


def finish(parts: Parts, state: TrainState, run: Path) -> None:
    """Write the LoRA files, if the run is done, and the report; print where they are, or how a stopped run goes on."""
    done, total = int(state.iteration), parts.cfg.iterations
    if done < total:
        reported(run)
        print(
            f"stopped after iteration {done} of {total}, saved; go on with: {again(run, parts.mesh.size)}", flush=True
        )
        return
    file = export.deliver(run, state, parts.model, parts.cfg, parts.base_loras)
    page = reported(run)
    print(
        f"done: the LoRA is {file}, the average that was evaluated (the policy as it ended: {run / export.CURRENT}), "
        f"its model_card.md says how to load it; {f'{page} in a browser shows the run, ' if page else ''}"
        f"tensorboard --logdir={shlex.quote(str(run))} its curves",
        flush=True,
    )


def reported(run: Path) -> Path | None:
    """Write report.html. If this fails, print why and go on: a run's other files do not depend on it."""
    file = run / "report.html"
    try:
        return report.write([run], file)
    except Exception as e:  # any error: --mode=report raises it again, with a traceback if it is a defect
        why = (str(e).splitlines() or [""])[0]
        print(
            f"warning: {file} could not be made ({type(e).__name__}: {why}); try again by --mode=report "
            f"--run_dir={shlex.quote(str(run))}",
            flush=True,
        )
        return None


def again(run: Path, devices: int) -> str:
    """The command that resumes a run on as many devices."""
    command = f"python -m solrl_jax.main --run_dir={shlex.quote(str(run))} --resume"
    if processes.count() > 1:
        return f"{command}, started in each process as before"
    return command if devices == jax.device_count() else f"{command} --devices={devices}"
