"""Several processes of one run: what they agree on, and that together they compute what one process does.

The processes are real ones, of this machine, connected by gloo.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from experiments.hosts.paper import free_address
from solrl_jax import processes
from solrl_jax.processes import ProcessError
from tests import nano

REPOSITORY = Path(__file__).resolve().parents[1]


def started(
    folder: Path,
    command: Sequence[str],
    count: int = 2,
    devices: int = 1,
    compiled: Path | None = None,
    second: Mapping[str, str] | None = None,
) -> list[subprocess.Popen]:
    """`count` processes of `devices` CPU devices each, in `folder`; process i prints to <folder>/<i>.out and .err.
    `second`: more of the environment of process 1."""
    found, where = [], free_address()
    for i in range(count):
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(compiled or folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}",
            "SEEN": str(folder / f"seen_{i}"),
            "WHERE": where,
        }
        env |= (second or {}) if i == 1 else {}
        several = (f"--coordinator={where}", f"--processes={count}", f"--process={i}") if count > 1 else ()
        words = [word.replace("{i}", str(i)) for word in (*command, *several)]
        with (folder / f"{i}.out").open("w") as out, (folder / f"{i}.err").open("w") as err:
            found.append(subprocess.Popen(words, cwd=folder, env=env, stdout=out, stderr=err))
    return found


def ended(running: Sequence[subprocess.Popen], seconds: float = 1200) -> list[int]:
    try:
        return [one.wait(timeout=seconds) for one in running]
    finally:
        for one in running:
            one.kill()


def said(folder: Path) -> list[str]:
    """What each process printed, on the screen and as errors."""
    return [file.read_text() + file.with_suffix(".err").read_text() for file in sorted(folder.glob("*.out"))]


# --- what they agree on ---------------------------------------------------------------------------------------------

AGREEING = """
import json, os, sys
import jax
from solrl_jax import processes, sharding
from solrl_jax.processes import ProcessError
from tests import nano

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


def test_joining_after_the_first_array():
    jax.devices()
    with pytest.raises(ProcessError, match=r"^JAX was in use before the processes joined, .*: join before the first"):
        processes.join("localhost:1", 2, 0)


STARTING = """
import json, runpy, sys
from solrl_jax import processes
processes.JOINING = int(sys.argv[3])
options, i = json.loads(sys.argv[1]), int(sys.argv[2])
sys.argv = ["solrl_jax", "--config=tiny", "--run_dir=run", *sys.argv[4:], *options[i]]
runpy.run_module("solrl_jax.main", run_name="__main__")
"""


def starting(options: Sequence[Sequence[str]], joining: int = 100) -> list[str]:
    """The command of processes with different options, of which JOINING is shorter."""
    return [sys.executable, "-c", STARTING, json.dumps(options), "{i}", str(joining)]


UNEVEN = ("--config.prompts=3", "--config.learn.micro_batch=24")


@pytest.mark.slow
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
        (
            ["--mode=sample", "--prompts=a.txt"],
            ["--mode=sample", "--prompts=b.txt"],
            "--prompts is 'a.txt' in process 0 and 'b.txt' in process 1: start all processes alike",
        ),
        ([], ["--processes=3"], "--processes is 2 in process 0 and 3 in process 1: start all processes alike"),
        (
            [*UNEVEN, "--config.model.path=nowhere"],  # found before any weight is read
            [*UNEVEN, "--config.model.path=nowhere"],
            "3 prompts do not divide over 2 devices of all processes: use a multiple of 2 prompts, or start processes "
            "with one of [1] devices together",
        ),
    ],
)
def test_processes_that_are_not_alike(tmp_path, first, second, message):
    (tmp_path / "options").mkdir()
    assert ended(started(tmp_path, starting([first, second])), 120) == [2, 2], said(tmp_path)
    assert message in said(tmp_path)[1] and "Traceback" not in "".join(said(tmp_path))


def test_others_that_do_not_come(tmp_path):
    """The first process waits for the second; the second for a coordinator that does not answer."""
    where = [free_address() for _ in range(2)]
    assert ended(started(tmp_path, starting([[f"--coordinator={at}"] for at in where], 2)), 120) == [2, 2]
    assert said(tmp_path) == [
        f"error: the processes did not meet at the coordinator ({at}) within 2 s: is process 0 running there, "
        "is the port open, and are as many processes started as were told?\n"
        for at in where
    ]


# --- runs -----------------------------------------------------------------------------------------------------------

SMALL = (
    *("--config=tiny", "--config.model.path=nano/pipeline", "--config.reward_paths=clipscore=nano/clip"),
    *("--config.model.size=16", "--config.model.text_tokens=8", "--config.model.min_dim=0"),
    *("--config.prompts=4", "--config.candidates=8", "--config.kept=4", "--config.learn.updates=2"),
    *("--config.learn.micro_batch=16", "--config.explore.chunk=8", "--config.regenerate.chunk=4"),
    *("--config.explore.steps=3", "--config.branch.after=1", "--config.branch.steps=1"),
    *("--config.evaluate.every=2", "--config.evaluate.prompts=8", "--config.evaluate.steps=2"),
    *("--config.evaluate.rewards=", "--config.watch.every=0"),
    *("--config.reward=clipscore:1,some_rewards.redness:0.5", "--config.iterations=3", "--run_dir=run"),
)
REWARD = """
import os
import signal

HOST = True
calls, (name, when) = 0, os.environ.get("HAPPENS", "SIGTERM 0").split()


def redness(images, prompts):
    global calls
    calls += 1
    if calls == int(when):
        os.kill(os.getpid(), getattr(signal, name))
    with open(os.environ["SEEN"], "a") as f:
        f.write("".join(f"{prompt}\\n" for prompt in prompts))
    return images[..., 0].mean((1, 2)) / 255


def broken(images, prompts):
    if os.environ["SEEN"].endswith("1"):
        raise OSError("the server of this host does not answer")
    return redness(images, prompts)
"""
SESSION = """
import json, os, sys, types
from jax._src import compiler
from solrl_jax import main, processes, train

# On CPUs each process has its own keys in the compilation cache, but JAX lets only the first one write there.
compiler.distributed = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0, client=None))

steps, several = json.loads(sys.argv[1]), sys.argv[2:]
codes, join, train.SHARED = [], processes.join, 1

def join_once(*where):
    processes.join = lambda *where: None
    join(*where)

processes.join = join_once
for folder, words in steps:
    os.chdir(folder)
    for name in main.FLAGS:
        main.FLAGS[name].unparse()
    print("$", *words)
    codes.append(main.main(main.parse(["solrl_jax", *words, *several])))
    print("exit code", codes[-1], file=sys.stderr)
sys.exit(codes[-1])
"""
TRAIN, RESUME = ["--mode=train", *SMALL], ["--mode=train", "--run_dir=run", "--resume"]
MODES = [
    ["--mode=eval", "--run_dir=run"],
    ["--mode=sample", "--run_dir=run", "--prompts=texts.txt"],
    ["--mode=score", "--run_dir=run", "--prompts=texts.jsonl", "--images=run/samples"],
    ["--mode=export", "--run_dir=run"],
]


def session(*steps: tuple[Path | str, Sequence[str]]) -> list[str]:
    """One start that runs command lines, each in its folder: the processes meet once, and all is compiled once."""
    return [sys.executable, "-c", SESSION, json.dumps([(str(folder), words) for folder, words in steps])]


def world(folder: Path) -> Path:
    """A folder for processes to start in, with networks as small as they come, which those beside it share."""
    folder.mkdir()
    nano.build(folder.parent / "nano")
    (folder / "nano").symlink_to(folder.parent / "nano")
    (folder / "some_rewards.py").write_text(REWARD)
    texts = ["a red circle", "a small blue square", "a red circle left of a blue square"]
    (folder / "texts.txt").write_text("\n".join(texts))
    rows = [{"file": f"{i:04d}_{j}.png", "prompt": text} for i, text in enumerate(texts) for j in range(2)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def lines(run: Path) -> list[dict]:
    """metrics.jsonl without the seconds."""
    found = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in found]


def printed(folder: Path, mode: str) -> list[str]:
    """What the first process printed in a mode."""
    text = (folder / "0.out").read_text().split(f"$ --mode={mode} ")[1].split("$ --mode=")[0]
    return [line for line in text.splitlines() if not line.startswith("[Gloo]")]


def codes(folder: Path) -> list[list[int]]:
    """The exit codes of a session's steps, by process."""
    errors = [file.read_text().splitlines() for file in sorted(folder.glob("*.err"))]
    return [[int(line.split()[-1]) for line in text if line.startswith("exit code ")] for text in errors]


def content(file: Path) -> Any:
    """A file's bytes; of safetensors, which writes its metadata in any order, what is in it."""
    if file.suffix != ".safetensors":
        return file.read_bytes()
    with safe_open(file, "np") as f:
        return f.metadata(), {name: f.get_tensor(name).tobytes() for name in f.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def two(tmp_path_factory, compiled):
    """A run of two processes with a device each. In its third iteration one of them is killed."""
    folder = world(tmp_path_factory.mktemp("several") / "two")
    lost = started(folder, session((folder, TRAIN)), compiled=compiled, second={"HAPPENS": "SIGKILL 13"})
    assert lost[1].wait(timeout=1200) == -signal.SIGKILL, said(folder)
    began = time.monotonic()
    assert ended(lost, 90)[0] not in (0, 75) and time.monotonic() - began < 60, said(folder)
    assert len(lines(folder / "run")) == 3
    assert {p.name for p in (folder / "run" / "checkpoints").iterdir()} >= {"1", "2"}  # every iteration
    for i in range(2):
        (folder / f"seen_{i}").rename(folder / f"seen_first_{i}")
    return folder


@pytest.fixture(scope="module")
def one(two, compiled):
    """The same run, and all modes, in one process with two devices; and a copy of the run of two, resumed there."""
    folder = world(two.parent / "one")
    copy = world(two.parent / "copy")
    shutil.copytree(two / "run", copy / "run")
    steps = [(folder, TRAIN), *((folder, mode) for mode in MODES), (copy, RESUME)]
    assert ended(started(folder, session(*steps), 1, devices=2, compiled=compiled)) == [0], said(folder)
    return folder


@pytest.fixture(scope="module")
def again(two, one, compiled):
    """The run of two processes, resumed in two, and all modes."""
    steps = [(two, RESUME), *((two, mode) for mode in MODES)]
    assert ended(started(two, session(*steps), compiled=compiled)) == [0, 0], said(two)
    return two


@pytest.mark.slow
def test_two_processes_are_one_with_two_devices(two, one, again):
    """Metrics, pictures and LoRA bit for bit, though the run of two was lost and resumed, in two or in one. A reward on
    the host sees a process's own pictures."""
    assert len(lines(one / "run")) == 4 and lines(one / "run") == lines(two / "run") == lines(one.parent / "copy/run")
    mine, other = ((two / f"seen_first_{i}").read_text().splitlines() for i in range(2))
    mine = mine[: len(other)]  # the other was killed as it was asked, at the beginning of an iteration
    asked = (one / "seen_0").read_text().splitlines()[: 2 * len(other)]
    assert sorted([*mine, *other]) == sorted(asked) and len(mine) == len(other) > 0
    for run in (two / "run", one.parent / "copy" / "run"):
        files = [load_file(x / "pytorch_lora_weights.safetensors") for x in (one / "run", run)]
        assert all(np.array_equal(files[0][name], files[1][name]) for name in files[0]) and len(files[0]) == 14
        for name in ("000000.png", "000002.png", "000003.png", "base.npz", "last.npz"):
            assert (one / "run" / "grids" / name).read_bytes() == (run / "grids" / name).read_bytes()


@pytest.mark.slow
def test_the_other_modes_are_one_processes(one, again):
    """eval, sample, score and export print once, and their files are one process's, bit for bit."""
    for mode in ("eval", "sample", "score", "export"):
        assert printed(one, mode) == printed(again, mode) != []
    assert "$" not in (again / "1.out").read_text().removeprefix("$ --mode=train")
    assert codes(again) == [[0] * 5] * 2 and codes(one) == [[0] * 6]
    kinds = {".png", ".csv", ".safetensors", ".npz", ".md"}
    there, here = (
        {x.relative_to(at / "run"): content(x) for x in (at / "run").rglob("*") if x.suffix in kinds}
        for at in (one, again)
    )
    assert there == here and {"eval.png", "scores.csv", "pytorch_lora_weights.safetensors"} < set(map(str, there))


@pytest.mark.long
def test_a_signal_to_one_process_stops_both(tmp_path, compiled):
    """In the second iteration; the state is saved, and how to go on is said once."""
    folder = world(tmp_path / "stopped")
    stopped = started(folder, session((folder, TRAIN)), compiled=compiled, second={"HAPPENS": "SIGTERM 7"})
    assert ended(stopped) == [75, 75], said(folder)
    assert "stopped after iteration 1 of 3, saved; go on with: " in said(folder)[0]
    assert "started in each process as before" in said(folder)[0] and "iteration 1" not in said(folder)[1]
    assert len(lines(folder / "run")) == 2


@pytest.fixture(scope="module")
def refused(tmp_path_factory, compiled):
    """Two starts of two processes: in folders that they do not share, and with a reward that raises in one of them."""
    folder = world(tmp_path_factory.mktemp("refused") / "two")
    for i in range(2):
        world(folder / f"own_{i}")
    small = [*TRAIN, "--config.evaluate.every=0"]
    apart = [*small, "--config.reward=clipscore"]
    broken = [*small, "--config.reward=clipscore:1,some_rewards.broken:0.5", "--run_dir=broken"]
    steps = [(folder / "own_{i}", apart), (folder, broken)]
    assert ended(started(folder, session(*steps), compiled=compiled)) == [2, 2], said(folder)
    assert codes(folder) == [[2, 2]] * 2
    return folder


@pytest.mark.long
def test_a_folder_that_is_not_shared(refused):
    for i, error in enumerate((refused / f"{i}.err").read_text() for i in range(2)):
        assert f"error in process {i}: " in error and "Traceback" not in error
        assert "--run_dir=run is not shared: process 0 wrote starts.json there and process 1 does not see it" in error


@pytest.mark.long
def test_a_reward_that_raises_in_one_process(refused):
    first, second = ((refused / f"{i}.err").read_text() for i in range(2))
    cause = "reward some_rewards.broken failed: OSError: the server of this host does not answer"
    assert f"error in process 0: process 1 failed: RewardError: {cause}" in first
    assert f"error in process 1: {cause}" in second


@pytest.mark.long
def test_four_devices_of_two_processes(tmp_path, compiled):
    """Of one process with four they differ by the order of sums. In float32 the first iteration is that to 1e-5, and so
    is its gradient: Adam's first moment is a tenth of it. Later ones: experiments/hosts."""
    more = ("--config.iterations=1", "--config.evaluate.every=0", "--config.model.dtype=float32")
    more += ("--config.learn.updates=1", "--config.learn.clip_norm=1e9")
    runs = [world(tmp_path / name) for name in ("whole", "split")]
    for folder, count in zip(runs, (1, 2), strict=True):
        at_once = started(folder, session((folder, [*TRAIN, *more])), count, 4 // count, compiled)
        assert ended(at_once) == [0] * count, said(folder)
    (before,), (after,) = (lines(folder / "run") for folder in runs)
    assert before == pytest.approx(after, rel=1e-5) and before["grad_norm"] > 0
    whole, split = (first_moment(folder / "run" / "checkpoints" / "1" / "state") for folder in runs)
    assert whole.keys() == split.keys() and len(whole) == 14  # a and b of seven Linears
    for name, x in whole.items():
        assert np.linalg.norm(split[name] - x) <= 1e-5 * np.linalg.norm(x), name


def first_moment(state: Path) -> dict[str, np.ndarray]:
    """Adam's, of a saved state, by the path of a LoRA's factor."""
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(state).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        found = jax.tree_util.tree_leaves_with_path(reader.restore(state, restore_args=as_numpy))
    return {name: x for path, x in found if "'mu'" in (name := jax.tree_util.keystr(path))}
