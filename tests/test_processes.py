"""Several processes of one run: what they agree on, and that together they compute what one process does.

The processes are real ones, of this machine, connected by gloo.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from solrl_jax import processes
from solrl_jax.processes import ProcessError

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = (
    "--config=tiny",
    *("--config.prompts=4", "--config.candidates=8", "--config.kept=4", "--config.learn.updates=2"),
    *("--config.learn.micro_batch=16", "--config.explore.chunk=8", "--config.regenerate.chunk=4"),
    *("--config.evaluate.every=2", "--config.evaluate.prompts=8", "--config.evaluate.steps=4"),
    "--config.watch.every=0",
    "--config.reward=clipscore:1,some_rewards.redness:0.5",
)
REWARD = """
import os

HOST = True


def redness(images, prompts):
    with open(os.environ["SEEN"], "a") as f:
        f.write("".join(f"{prompt}\\n" for prompt in prompts))
    return images[..., 0].mean((1, 2)) / 255
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def started(folder: Path, command: Sequence[str], count: int = 2, devices: int = 1) -> list[subprocess.Popen]:
    """`count` processes of `devices` CPU devices each; process i writes to <folder>/<i>.log."""
    found, where = [], f"localhost:{free_port()}"
    for i in range(count):
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}",
            "SEEN": str(folder / f"seen_{i}"),
            "WHERE": where,
        }
        several = (f"--coordinator={where}", f"--processes={count}", f"--process={i}") if count > 1 else ()
        with (folder / f"{i}.log").open("w") as log:
            words = [word.replace("{i}", str(i)) for word in (*command, *several)]
            found.append(subprocess.Popen(words, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT))
    return found


def ended(running: Sequence[subprocess.Popen], seconds: float = 600) -> list[int]:
    try:
        return [one.wait(timeout=seconds) for one in running]
    finally:
        for one in running:
            one.kill()


def said(folder: Path) -> list[str]:
    return [file.read_text() for file in sorted(folder.glob("*.log"))]


# --- what they agree on ---------------------------------------------------------------------------------------------

AGREEING = """
import json, os, sys
import jax
from solrl_jax import processes, sharding
from solrl_jax.processes import ProcessError

i = int(sys.argv[-1].split("=")[1])
processes.join(os.environ["WHERE"], 2, i)
out = {"exchanged": [json.loads(processes.exchanged(f"{i} {n}", json.dumps)) for n in range(5)]}
out["agreed"] = processes.agreed(lambda: {"from": i, "x": [1.5, None]})
out["any"] = [processes.any_of(i == 1), processes.any_of(False)]
out["by_first"] = processes.by_first(lambda: "written")

def act():
    if i == 1:
        raise OSError("no space")

tries = {"together": lambda: processes.together(act), "same": lambda: processes.same({"a": "1", "b": str(i)})}
for name, tried in tries.items():
    try:
        tried()
    except Exception as e:
        out[name] = [type(e).__name__, str(e), processes.known(e)]
try:
    raise ValueError("only here")
except ValueError as e:
    out["known"] = processes.known(e)
mesh = sharding.make_mesh()
import numpy as np
rows = sharding.rows_here(6, mesh)
whole = sharding.split(np.arange(6), mesh)
out["rows"] = rows
out["here"] = sharding.here(whole).tolist()
out["back"] = sharding.fetch(sharding.from_here(np.asarray(rows) * 10, mesh)).tolist()
keys = sharding.split(jax.random.split(jax.random.key(3), 6), mesh)
out["keys"] = jax.random.key_data(sharding.replicate(keys, mesh)).addressable_data(0).tolist()
print("on the screen of the first alone")
with open(f"{i}.json", "w") as f:
    json.dump(out, f)
"""


def test_what_two_processes_agree_on(tmp_path):
    assert ended(started(tmp_path, [sys.executable, "-c", AGREEING]), 120) == [0, 0], said(tmp_path)
    found = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    for i, one in enumerate(found):
        assert one["exchanged"] == [[f"0 {n}", f"1 {n}"] for n in range(5)]
        assert one["agreed"] == {"from": 0, "x": [1.5, None]}
        assert one["any"] == [True, False]
        assert one["by_first"] == ("written" if i == 0 else None)
        assert one["together"] == (
            ["ProcessError", "process 1 failed: OSError: no space", True] if i == 0 else ["OSError", "no space", True]
        )
        assert one["same"][1] == "b is 0 in process 0 and 1 in process 1: start all processes alike"
        assert one["known"] is False
        assert one["rows"] == one["here"] == [[0, 1, 2], [3, 4, 5]][i]
        assert one["back"] == [0, 10, 20, 30, 40, 50]
    assert found[0]["keys"] == found[1]["keys"] and np.shape(found[0]["keys"]) == (6, 2)
    assert [("on the screen" in text) for text in said(tmp_path)] == [True, False]


def test_one_process_agrees_with_itself():
    def fails():
        raise ValueError("as it is")

    assert processes.exchanged("a", "".join) == "a" and processes.agreed(lambda: {1: 2}) == {1: 2}
    assert processes.first() and processes.by_first(lambda: 3) == 3 and processes.any_of(True)
    with pytest.raises(ValueError, match="as it is"):
        processes.together(fails)
    processes.same({"a": "b"})


WAYS = {
    "nothing": ({}, (None, None, None), False),
    "by hand": ({}, ("host:12", 2, 1), True),
    "a task of srun": ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, (None, None, None), True),
    "a shell of Slurm": ({"SLURM_NTASKS": "4"}, (None, None, None), False),
    "one task": ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (None, None, None), False),
    "Open MPI": ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, (None, None, None), True),
    "a TPU slice": ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, (None, None, None), True),
    "a TPU host": ({"TPU_WORKER_HOSTNAMES": "localhost"}, (None, None, None), False),
}


@pytest.mark.parametrize("way", WAYS)
def test_whether_there_are_several(monkeypatch, way):
    there, flags, expected = WAYS[way]
    for name in {name for others, _, _ in WAYS.values() for name in others}:
        monkeypatch.delenv(name, raising=False)
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    assert processes.asked(*flags) is expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1", 2, None), r"^--process missing: give --coordinator=HOST:PORT, --processes and --process$"),
        ((None, 2, None), r"^--coordinator and --process missing"),
        (("host:1", 2, 2), r"^--process=2 of --processes=2: number them from 0 to 1$"),
        (("host", 2, 0), r"^--coordinator=host: give HOST:PORT, where process 0 runs and a free port there$"),
        ((":80", 2, 0), r"^--coordinator=:80: give HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(ProcessError, match=message):
        processes.asked(*flags)


# --- a run ----------------------------------------------------------------------------------------------------------


def command(run: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "solrl_jax.main", *SMALL, f"--run_dir={run}", *more]


def lines(run: Path) -> list[dict]:
    """metrics.jsonl without the seconds."""
    found = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in found]


def wait_for(there: Callable[[], bool], running: Sequence[subprocess.Popen], seconds: float = 400) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until and all(one.poll() is None for one in running)
        time.sleep(0.2)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "some_rewards.py").write_text(REWARD)
    return tmp_path


def resumed(folder: Path, run: Path, iterations: int, count: int) -> list[int]:
    more = (f"--run_dir={run}", "--resume", f"--config.iterations={iterations}")
    return ended(started(folder, [sys.executable, "-m", "solrl_jax.main", *more], count, devices=3 - count))


@pytest.mark.slow
def test_two_processes_are_one_with_two_devices(folder):
    """Metrics, pictures and LoRA bit for bit; a reward on the host sees a process's own pictures. A signal to one stops
    both; a lost one ends the other; and the run goes on in one or in two."""
    one, two = folder / "one", folder / "two"
    assert ended(started(folder, command(one, "--config.iterations=2"), 1, devices=2)) == [0], said(folder)
    asked = (folder / "seen_0").read_text().split("\n")
    (folder / "seen_0").unlink()
    assert ended(started(folder, command(two, "--config.iterations=2"))) == [0, 0], said(folder)
    assert lines(one) == lines(two) and len(lines(one)) == 3
    mine, other = ((folder / f"seen_{i}").read_text().split("\n") for i in range(2))
    assert sorted([*mine, *other]) == sorted([*asked, ""]) and len(mine) == len(other)
    files = [load_file(run / "pytorch_lora_weights.safetensors") for run in (one, two)]
    assert all(np.array_equal(files[0][name], files[1][name]) for name in files[0]) and len(files[0]) == 40
    for name in ("000000.png", "000002.png", "base.npz", "last.npz"):
        assert (one / "grids" / name).read_bytes() == (two / "grids" / name).read_bytes()
    assert {p.name for p in (two / "checkpoints").iterdir()} == {"1", "2"}  # every iteration
    assert said(folder)[1].count("iteration") == 0

    more = (f"--run_dir={two}", "--resume", "--config.iterations=200")
    running = started(folder, [sys.executable, "-m", "solrl_jax.main", *more])
    wait_for(lambda: len(lines(two)) > 4, running)
    running[1].send_signal(signal.SIGTERM)
    assert ended(running) == [75, 75], said(folder)
    stopped = len(lines(two)) - 1
    assert f"stopped after iteration {stopped} of 200, saved; go on with: " in said(folder)[0]
    assert "started in each process as before" in said(folder)[0]

    running = started(folder, [sys.executable, "-m", "solrl_jax.main", *more])
    wait_for(lambda: len(lines(two)) > stopped + 2, running)
    running[1].kill()
    began = time.monotonic()
    assert 0 not in ended(running, 90) and time.monotonic() - began < 60, said(folder)

    done = len(lines(two)) + 2
    assert resumed(folder, two, done, 1) == [0], said(folder)
    assert resumed(folder, one, done, 2) == [0, 0], said(folder)
    assert [line for line in lines(one) if line["iteration"] < done] == lines(two)[:done]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            ["--config.seed=1"],
            ["--config.seed=2"],
            "seed is 1 in process 0 and 2 in process 1: start all processes alike",
        ),
        (
            ["--mode=plan"],
            ["--mode=plan"],
            "--mode=plan runs in one process; train, eval, sample, score, export run in",
        ),
        (["--devices=1"], ["--devices=1"], "--devices=1 with several processes, which use all: leave it out"),
        (["--config.steps=1"], ["--config.seed=1"], "process 0 failed: ConfigError: "),
    ],
)
def test_processes_that_are_not_alike(folder, first, second, message):
    (folder / "options").mkdir()
    words = [sys.executable, "-c", STARTING, json.dumps([first, second]), "{i}"]
    assert ended(started(folder, words), 120) == [2, 2], said(folder)
    assert message in said(folder)[1] and "Traceback" not in "".join(said(folder))


STARTING = """
import json, runpy, sys
options, i = json.loads(sys.argv[1]), int(sys.argv[2])
sys.argv = ["solrl_jax", "--config=tiny", "--run_dir=run", *options[i], *sys.argv[3:]]
runpy.run_module("solrl_jax.main", run_name="__main__")
"""
