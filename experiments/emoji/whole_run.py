"""Figures of a whole run of the command: its seconds by part, and the rewards of its evaluations, first and last.

    python -m solrl_jax.main --config=emoji --run_dir=RUN             # a GPU; time this command
    python -m experiments.emoji.whole_run RUN --seconds=377           # its wall time, which no file of the run has

The device and JAX's version of the JSON are those that made it; "run on" and "run by jax" are the run's.
"""

import argparse
import json
import statistics
from pathlib import Path

from experiments import results
from solrl_jax import device

HERE = Path(__file__).resolve().parent
STAGES = ("explore", "regenerate", "learn", "iteration")
REWARD, GAIN, ERROR = "eval_reward_", "eval_gain/", "eval_gain_error/"


def figures_of(lines: list[dict], seconds: float | None) -> dict[str, dict]:
    """Of metrics.jsonl's lines: medians of the stages without the first iteration, which compiles; every reward of the
    base and of the last evaluation, with its gain and the gain's standard error over prompts."""
    base, first, *rest = lines
    last, out = [line for line in lines if any(name.startswith(REWARD) for name in line)][-1], {}
    if seconds is not None:
        out["the whole command"] = results.figure(seconds, "s", 1)
    out[f"{len(lines) - 1} iterations"] = results.figure(sum(x["time/iteration"] for x in (first, *rest)), "s", 1)
    out["the first iteration"] = results.figure(first["time/iteration"], "s, with compiling", 1)
    for stage in STAGES:
        each = [line[f"time/{stage}"] for line in rest]
        spread = [round(min(each), 3), round(max(each), 3)]
        out[stage] = results.figure(statistics.median(each), "s; median [least, most]", len(each), spread)
    for name in (name.removeprefix(REWARD) for name in last if name.startswith(REWARD)):
        for when, line in (("base", base), (f"after {last['iteration']}", last)):
            out[f"{name}: {when}"] = results.figure(line[REWARD + name], "mean over prompts", 1)
        gain, error = last[GAIN + name], last[ERROR + name]
        out[f"{name}: gain"] = results.figure(gain, "mean ± standard error over prompts", 1, error)
    return out


def main(argv: list[str] | None = None) -> None:
    device.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, help="wall time of the command")
    parser.add_argument("--out", type=Path, default=HERE / "results/whole_run.json")
    args = parser.parse_args(argv)
    lines = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    starts = json.loads((args.run / "starts.json").read_text(encoding="utf-8"))
    if len(starts) != 1 or [line["iteration"] for line in lines] != list(range(len(lines))):
        parser.error(f"{args.run}: {len(starts)} starts and {len(lines)} lines: give a run that was not interrupted")
    ran_on = {"run on": starts[0]["device"], "run by jax": starts[0]["jax"]}
    results.record(args.out, figures_of(lines, args.seconds), **ran_on)


if __name__ == "__main__":
    main()
