"""The command line: python -m solrl_jax.main --config=tiny [--config.explore.steps=4] [--mode=...].

It checks the flags, picks the config and calls the mode. Modules that import JAX are imported in the function that
needs them, so that --help and errors in flags are fast. This package's own errors, and a disk that is full or not to be
written, end in one line on stderr and exit code 2; any other exception is a defect and shows its traceback.
"""

import dataclasses
import errno
import io
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import app, flags, logging

from solrl_jax import config, disk, recipes
from solrl_jax.config import Config, ConfigError

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Command:
    """The parsed command line; `place` is a checkpoint, `lora` a LoRA file or its folder."""

    cfg: Config
    run: Path
    place: Path | None = None
    lora: Path | None = None
    devices: int | None = None
    resume: bool = False
    prompt: str = ""
    prompts: str | None = None
    images: str | None = None
    card: str = ""
    negative: str | None = None
    out: str | None = None
    reference: Path | None = None


def train(c: Command) -> int:
    from solrl_jax import train

    return train.train(c.cfg, c.run, resume=c.resume, devices=c.devices)


def evaluate(c: Command) -> int:
    from solrl_jax.run import evaluate

    how = {"place": c.place, "lora_file": c.lora, "devices": c.devices, "negative": c.negative}
    return evaluate.run_eval(c.cfg, c.run, **how)


def sample(c: Command) -> int:
    from solrl_jax.run import data, evaluate

    texts = ([c.prompt] if c.prompt else []) + (list(data.read_file(c.prompts)[0]) if c.prompts else [])
    how = {"place": c.place, "lora_file": c.lora, "devices": c.devices, "negative": c.negative}
    return evaluate.run_sample(c.cfg, c.run, prompts=texts, **how)


def score(c: Command) -> int:
    from solrl_jax.run import score

    return score.run_score(c.cfg, c.run, prompts=c.prompts, images=c.images, devices=c.devices)


def export(c: Command) -> int:
    from solrl_jax.run import export

    return export.export(c.cfg, c.run, place=c.place, lora_file=c.lora, devices=c.devices)


def convert(c: Command) -> int:
    _on_cpu()
    from solrl_jax.run import assemble, convert

    convert.convert(assemble.model_module(c.cfg), c.cfg.model, c.run)
    print(f"converted {c.cfg.model.path}: use it as --config.model.path={c.run}")
    return 0


def plan(c: Command) -> int:
    _on_cpu()
    from solrl_jax import plan

    return plan.run_plan(c.cfg, devices=c.devices, card=c.card)


def doctor(c: Command) -> int:
    from solrl_jax.plan import doctor

    return doctor.run_doctor(c.cfg, c.run, devices=c.devices)


def prove(c: Command) -> int:
    from solrl_jax.run import prove

    out = Path(c.out or "prove.json")
    return prove.run_prove(c.cfg, out, prompt=c.prompt, reference=c.reference, devices=c.devices)


def _on_cpu() -> None:
    """Use no GPU memory, so that a training run beside this one keeps it. Call it before JAX makes its first array."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def report(words: Sequence[str]) -> int:
    """Write a report from the files of runs, also of other versions; needs no config."""
    if words or FLAGS.config:
        word = words[0] if words else f"--config={FLAGS.config}"
        raise ConfigError(
            f"unexpected argument {word!r}: --mode=report takes --run_dir=RUN or --runs=RUN,RUN, and --out"
        )
    if FLAGS.run_dir and FLAGS.runs:
        raise ConfigError("--run_dir and --runs are both given: give one of them")
    from solrl_jax import report

    runs = [Path(run) for run in FLAGS.runs or ([FLAGS.run_dir] if FLAGS.run_dir else [])]
    inside = runs[0] if len(runs) == 1 else Path()
    out = Path(FLAGS.out) if FLAGS.out else inside / "report.html"
    if out.is_dir():
        raise ConfigError(f"--out={out} is a folder: give a file, as in --out={out / 'report.html'}")
    if FLAGS.out and (why := disk.unwritable(out.parent)):
        raise ConfigError(f"--out={out}: {why}: give another file")
    print(f"{report.write(runs, out)}: open it in a browser")
    return 0


MODES: dict[str, Callable[[Command], int]] = {
    "train": train,
    "eval": evaluate,
    "sample": sample,
    "score": score,
    "export": export,
    "convert": convert,
    "plan": plan,
    "doctor": doctor,
    "prove": prove,
}

flags.DEFINE_string(
    "config",
    None,
    "NAME or NAME:RECIPE, a file of configs/; NAME:help lists recipes; --config.explore.steps=4 overrides any field",
)
flags.DEFINE_enum(
    "mode",
    "train",
    [*MODES, "report"],
    "train; eval: rewards of a policy; sample: pictures of --prompt; score: rewards of the pictures in --images; "
    "export: LoRA files; convert: the weights of --config.model.path to --run_dir, in a form that loads faster; "
    "plan: memory and time of a run on --card; doctor: whether a run can start here, and what to do if not; "
    "prove: a picture beside diffusers' own, ranks of previews, memory and time, as a JSON to post; "
    "report: report.html of --run_dir, or of --runs side by side",
)
flags.DEFINE_string("run_dir", None, "directory of the run (default: runs/<config>-<time>)")
flags.DEFINE_list("runs", None, "report: directories of runs to compare, RUN,RUN")
flags.DEFINE_string(
    "out",
    None,
    "report: the file (default: report.html in --run_dir, or here for --runs); prove: the file (default: prove.json)",
)
flags.DEFINE_string("reference", None, "prove: the picture of an earlier --out, to compare with instead of diffusers'")
flags.DEFINE_bool("resume", False, "train: continue from the newest undamaged checkpoint of --run_dir")
flags.DEFINE_string("prompt", None, "sample, prove: one prompt")
flags.DEFINE_string(
    "prompts",
    None,
    "sample: a file, one prompt per line; score: the same, one line per picture in the order of names, or a .jsonl "
    'file of {"file": ..., "prompt": ...}; else same as --config.prompt_files: a folder with train.txt and test.txt, '
    "or with train_metadata.jsonl and test_metadata.jsonl, or one .txt or .jsonl file",
)
flags.DEFINE_float(
    "guidance", None, "eval, sample: the weight w of guidance, 1 for none, instead of --config.evaluate.guidance"
)
flags.DEFINE_string("negative", None, "eval, sample: the text that guidance leads away from (default: the empty one)")
flags.DEFINE_string("images", None, "score: the folder of the pictures, .png, .jpg, .jpeg or .webp")
flags.DEFINE_string(
    "checkpoint",
    None,
    "eval, sample, export: a step of --run_dir, best (the kept one with the highest eval_reward_avg) or "
    "<run>/checkpoints/<step> (default: the newest)",
)
flags.DEFINE_string(
    "lora",
    None,
    "eval, sample, export: a LoRA file or its folder, of diffusers, PEFT or ComfyUI, instead of a checkpoint",
)
flags.DEFINE_integer("devices", None, "how many devices to use (default: all; plan: 1)", lower_bound=1)
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, to start several processes by hand, one per host")
flags.DEFINE_integer("processes", None, "how many processes are started by hand", lower_bound=1)
flags.DEFINE_integer("process", None, "the number of this process, from 0", lower_bound=0)
flags.DEFINE_string("card", "H100 80GB", "plan: the GPU to plan for")


def parse(argv: Sequence[str]) -> list[str]:
    """Parse all flags with absl except --config.a.b=value; these are returned after the program's name.

    A flag that does not exist, or has a wrong value, ends the program with a line and exit code 2.
    """
    mine, rest = [], []
    words = iter(argv)
    for word in words:
        if word.startswith(("--config.", "-config.")):
            mine.append(word.lstrip("-") if "=" in word else f"{word.lstrip('-')}={next(words, '')}")
        else:
            rest.append(word)
    try:
        return [*FLAGS(rest), *mine]
    except flags.Error as e:
        print(f"error: {' '.join(str(e).split())}; --help lists all flags", file=sys.stderr)
        sys.exit(2)


def main(argv: Sequence[str]) -> int:
    """Run the mode of FLAGS; `argv` is parse's result. Returns the exit code."""
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # app.run's default is INFO, and orbax logs every save at INFO
    try:
        name, _, recipe = (FLAGS.config or "").partition(":")
        if recipe == "help":
            print("\n".join(recipes.help_lines(name)))
            return 0
        _check_flags()
        if FLAGS.mode == "report":
            return report(argv[1:])
        return alone(argv[1:]) if not _several() else joined(argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as e:
        if not _expected(e):
            raise
        print(f"error: {e}", file=sys.stderr)
        return 2


def _expected(error: Exception) -> bool:
    """Whether one line tells all of an error: it is this package's own, or the disk refuses. Any other is a defect."""
    refused = isinstance(error, OSError) and error.errno in REFUSED
    return refused or type(error).__module__.startswith("solrl_jax.")


REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
"""A disk that is full, or files that may not be read or written: errors that name the file and the reason."""


def alone(words: Sequence[str]) -> int:
    """The mode, in one process."""
    asked = command(words)
    from solrl_jax import device

    device.setup()
    return MODES[FLAGS.mode](asked)


def joined(words: Sequence[str]) -> int:
    """The mode, in this one of several processes. An error that the others do not know ends the process at once."""
    from solrl_jax import device, processes

    if FLAGS.mode not in SEVERAL:
        raise ConfigError(f"--mode={FLAGS.mode} runs in one process; {', '.join(SEVERAL)} run in several")
    if FLAGS.devices is not None:
        raise ConfigError(f"--devices={FLAGS.devices} with several processes, which use all: leave it out")
    device.setup()
    processes.join(FLAGS.coordinator, FLAGS.processes, FLAGS.process)
    try:
        asked = processes.together(lambda: command(words))
        asked = dataclasses.replace(asked, run=Path(processes.agreed(lambda: str(asked.run))))
        if FLAGS.mode != "train":  # which compares more, and once it has found its checkpoint
            flags_of = {f"--{name}": value for name, value in vars(asked).items() if name != "cfg"}
            given = {**flags_of, **dict(config.values(asked.cfg))}
            processes.same({name: repr(value) for name, value in given.items()})
        if FLAGS.mode == "score":  # it uses one device
            return processes.by_first(lambda: MODES["score"](asked)) or 0
        return MODES[FLAGS.mode](asked)
    except KeyboardInterrupt:
        processes.leave(130)
        raise
    except Exception as e:
        known, expected, me = processes.known(e), _expected(e), processes.index()
        if known and not expected:
            raise
        if not expected:
            traceback.print_exc()
        said = f"error in process {me}: {e}" if expected else f"process {me} ends; the others follow"
        print(said, file=sys.stderr)
        if not known:
            processes.leave(2 if expected else 1)
        return 2


SEVERAL = ("train", "eval", "sample", "score", "export")
"""The modes that several processes run together."""


def _several() -> bool:
    """Whether this process is one of several. JAX is imported only if it may be."""
    given = any(FLAGS[name].present for name in ("coordinator", "processes", "process"))
    names = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_HOSTNAMES")
    if not given and not any(name in os.environ for name in names):
        return False
    from solrl_jax import processes

    return processes.asked(FLAGS.coordinator, FLAGS.processes, FLAGS.process)


def command(words: Sequence[str]) -> Command:
    """The command of the flags and the overrides. Raises ConfigError if they contradict each other."""
    if strange := [w for w in words if not w.startswith("config.")]:
        raise ConfigError(f"unexpected argument {strange[0]!r}: flags begin with --, as in --config=tiny")
    overrides = dict(word.removeprefix("config.").split("=", 1) for word in words)
    short = FLAGS.prompts if FLAGS.mode not in ("sample", "score") else None
    if short and overrides.setdefault("prompt_files", short) != short:
        raise ConfigError("--prompts and --config.prompt_files differ: give one of them")
    overrides |= _guidance(overrides)
    run = Path(FLAGS.run_dir) if FLAGS.run_dir else None
    if run is not None and os.path.exists(run) and not run.is_dir():  # Path.exists fails for a name that is too long
        raise ConfigError(f"--run_dir={run} is a file: give a new folder or the folder of a run")
    # Several processes: the first alone writes, and its folder may be no other host's.
    if FLAGS.mode in SEVERAL and not _several() and (why := disk.unwritable(run or Path("runs"))):
        raise ConfigError(f"--run_dir={run or 'runs'}: {why}: give another folder")
    place = _place(run)
    source = run if FLAGS.mode == "train" else (place or run)
    if FLAGS.mode == "score" and FLAGS.config is None and not (run and (run / "config.json").exists()):
        cfg = config.override(Config(), **overrides)  # only its rewards matter
    elif FLAGS.config is None and source is not None and (FLAGS.resume or FLAGS.mode != "train"):
        from solrl_jax.run import checkpoint

        cfg = config.override(checkpoint.load_config(source), **overrides)
    elif FLAGS.config is None:
        other = "" if FLAGS.mode == "train" else ", or --run_dir=RUN, which has one"
        raise ConfigError(f"no config is named: give --config=NAME, one of {', '.join(config.available())}{other}")
    else:
        cfg = config.load(FLAGS.config, overrides)
    if FLAGS.resume and run is None:
        raise ConfigError("--resume needs --run_dir, the directory of the run to continue")
    name = (FLAGS.config or cfg.name or "run").replace(":", "-")
    return Command(
        cfg=cfg,
        run=run or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}",
        place=place,
        lora=Path(FLAGS.lora) if FLAGS.lora else None,
        devices=FLAGS.devices,
        resume=FLAGS.resume,
        prompt=FLAGS.prompt or "",
        prompts=FLAGS.prompts,
        images=FLAGS.images,
        card=FLAGS.card,
        negative=FLAGS.negative,
        out=FLAGS.out,
        reference=Path(FLAGS.reference) if FLAGS.reference else None,
    )


def _guidance(overrides: Mapping[str, str]) -> dict[str, str]:
    """The override that --guidance is short for. ConfigError if it is not a weight, or not for this mode."""
    w = FLAGS.guidance
    for name, value in (("guidance", w), ("negative", FLAGS.negative)):
        if value is not None and FLAGS.mode not in ("eval", "sample"):
            fix = "" if name == "negative" else "; the evaluation of a run takes --config.evaluate.guidance"
            raise ConfigError(f"--{name} is for --mode=sample and --mode=eval{fix}")
    if w is None:
        return {}
    if not 1 <= w < math.inf:
        raise ConfigError(f"--guidance={w:g}: give 1 (none) or a finite number above it")
    if "evaluate.guidance" in overrides:
        raise ConfigError("--guidance and --config.evaluate.guidance are both given: give one of them")
    return {"evaluate.guidance": str(w)}


MODES_OF = {
    "reference": ("prove",),
    "prompt": ("sample", "prove"),
    "images": ("score",),
    "checkpoint": ("eval", "sample", "export"),
    "lora": ("eval", "sample", "export"),
    "card": ("plan",),
    "runs": ("report",),
    "out": ("report", "prove"),
    "resume": ("train",),
}
"""Flags that only these modes read: in any other mode they are an error."""
INSTEAD = {
    "checkpoint": "--resume goes on from the newest",
    "lora": "a training begins from --config.model.lora=FILE",
    "prompt": "a training takes --prompts=DIR, or a file",
}
"""What --mode=train takes."""


def _check_flags() -> None:
    """ConfigError if a flag is of another mode, if two name the policy, or if a text is not UTF-8."""
    for name, modes in MODES_OF.items():
        if not (FLAGS[name].present and FLAGS[name].value) or FLAGS.mode in modes:
            continue
        if FLAGS.mode == "prove" and name in INSTEAD:
            raise ConfigError(f"--{name} with --mode=prove, which draws with the base alone: leave it out")
        instead = f"; {INSTEAD[name]}" if FLAGS.mode == "train" and name in INSTEAD else ""
        raise ConfigError(f"--{name} is for {' and '.join(f'--mode={mode}' for mode in modes)}{instead}")
    if FLAGS.checkpoint and FLAGS.lora:
        raise ConfigError(f"--checkpoint={FLAGS.checkpoint} and --lora={FLAGS.lora} are both given: give one of them")
    for name in ("prompt", "negative"):
        try:
            (FLAGS[name].value or "").encode()
        except UnicodeEncodeError:  # bytes that the shell gave
            raise ConfigError(f"--{name}={FLAGS[name].value!r} is not UTF-8: write it in UTF-8") from None


def _place(run: Path | None) -> Path | None:
    """The checkpoint for eval, sample and export: --checkpoint, else the newest of an existing run, else None."""
    inside = run is not None and (run / "config.json").exists()
    if FLAGS.mode in ("train", "plan", "score", "doctor", "prove") or FLAGS.lora or not (FLAGS.checkpoint or inside):
        return None
    if FLAGS.checkpoint == "best" and run is None:
        raise ConfigError("--checkpoint=best needs --run_dir, the directory of the run")
    from solrl_jax.run import checkpoint

    place, said = checkpoint.find(run or Path(), FLAGS.checkpoint)
    for line in said:
        print(line)
    return place


def cli() -> None:
    """Entry point of the command `solrl`; the same as python -m solrl_jax.main, also its --help."""
    sys.modules["__main__"].__doc__ = __doc__
    if isinstance(sys.stdout, io.TextIOWrapper):  # a prompt that a terminal cannot show does not end a command
        sys.stdout.reconfigure(errors="backslashreplace")
    for flag in FLAGS.flags_by_module_dict().get(__name__, []):  # --help shows those of argv[0]
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    cli()
