"""Several processes of one run, on one host or on many: joining them, and what they agree on.

Every process runs the same program on the same arguments. JAX's distributed runtime connects them: an array can be
spread over the devices of all. Files, the screen and logs belong to the `first` process alone. What one process alone
finds out, a signal or an error, is told to all before the next program that needs all of them; otherwise they would
wait in it.

Texts are exchanged through the runtime's key-value store, which uses no device: it does not wait for a running program,
and the thread that writes checkpoints may use it too (its own `channel`).
"""

import collections
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from jax._src import distributed, xla_bridge  # JAX has no public name for the store; Orbax takes it from here too

T = TypeVar("T")
JOINING = 300
"""Seconds that a process waits for the others when it starts."""
HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as lost, and all others end."""
_LONGEST = 24 * 3600 * 1000
"""Milliseconds of an exchange. A process that computes may be late by hours; a lost one is noticed by its heartbeat."""
_rounds: dict[str, Iterator[int]] = collections.defaultdict(itertools.count)
_COUNT = "solrl_jax/processes"
"""The key of the number that the first process was told."""
_KNOWN = "known_to_all_processes"
"""An attribute of errors that all processes were told."""


class ProcessError(RuntimeError):
    """The processes cannot start together, or another one failed; the message says which and why."""


# --- joining --------------------------------------------------------------------------------------------------------


def asked(coordinator: str | None, processes: int | None, process: int | None) -> bool:
    """Whether this is one of several processes: by the flags, or by Slurm's, Open MPI's or a TPU slice's variables.

    Raises ProcessError if the flags are incomplete.
    """
    flags = {"coordinator": coordinator, "processes": processes, "process": process}
    if missing := [f"--{name}" for name, value in flags.items() if value is None]:
        if len(missing) < len(flags):
            raise ProcessError(
                f"{' and '.join(missing)} missing: give --coordinator=HOST:PORT, --processes and --process"
            )
        tpus = len([host for host in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host])
        tasks = max(int(os.environ.get(name) or 1) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
        # An interactive shell of Slurm has the number of tasks, but only a task that srun started has its own number.
        return tpus > 1 or (tasks > 1 and ("SLURM_PROCID" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ))
    assert coordinator is not None and processes is not None and process is not None
    if not 0 <= process < processes:
        raise ProcessError(f"--process={process} of --processes={processes}: number them from 0 to {processes - 1}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ProcessError(f"--coordinator={coordinator}: give HOST:PORT, where process 0 runs and a free port there")
    return True


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Connect this process to the others; call it before the first array. Then only the first one prints.

    Without arguments JAX finds them out. Raises ProcessError if this process cannot join, or if the others were told
    another number of processes. If they do not come within JOINING seconds, it prints why and ends this process with
    exit code 2: JAX's own timeout would abort it, past Python.
    """
    if xla_bridge.backends_are_initialized():
        raise ProcessError(
            "JAX was in use before the processes joined, so its devices cannot be shared any more: join before the "
            "first array, and see what Python imports at its start (sitecustomize, PYTHONSTARTUP, plugins)"
        )
    late = threading.Timer(JOINING, _not_met, [coordinator])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=2 * JOINING, heartbeat_timeout_seconds=HEARTBEAT
        )
    except (RuntimeError, ValueError) as e:  # JaxRuntimeError is a RuntimeError
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise ProcessError(f"this process cannot join at the coordinator ({_where(coordinator)}): {why}") from e
    finally:
        late.cancel()
    if not first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process runs
    store: Any = distributed.global_state.client
    if first():
        store.key_value_set(_COUNT, str(count()))
    there = int(store.blocking_key_value_get(_COUNT, _LONGEST))  # the runtime lets so many in
    same({"--processes": str(count())}, there)


def _not_met(coordinator: str | None) -> None:
    print(
        f"error: the processes did not meet at the coordinator ({_where(coordinator)}) within {JOINING:g} s: is "
        "process 0 running there, is the port open, and are as many processes started as were told?",
        file=sys.stderr,
    )
    leave(2)


def _where(coordinator: str | None) -> str:
    return coordinator or distributed.global_state.coordinator_address or "no address was found"


def leave(code: int) -> None:
    """End this process at once: JAX's own way out waits for the others, which may wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def count() -> int:
    return distributed.global_state.num_processes  # jax.process_count() would start JAX's devices


def index() -> int:
    return distributed.global_state.process_id


def first() -> bool:
    """Whether this process writes the files and prints."""
    return index() == 0


# --- agreeing -------------------------------------------------------------------------------------------------------


def exchanged(text: str, reduce: Callable[[list[str]], str], channel: str = "main", there: int | None = None) -> str:
    """reduce(the texts of all processes, in their order), on each. All must call it equally often on a `channel`.

    The process that comes last reads all texts at once and hands out what `reduce` makes of them: three requests of
    each process, and none waits for a text after the other (experiments/hosts). `there` is how many there are, if that
    may not be `count`.
    """
    if count() == 1:
        return reduce([text])
    store: Any = distributed.global_state.client
    number = next(_rounds[channel])
    here = f"solrl_jax/{channel}/{number}"
    store.key_value_set(f"{here}/said/{index():06d}", json.dumps(text))
    if store.key_value_increment(f"{here}/came", 1) == (there or count()):
        each = [json.loads(said) for _, said in sorted(store.key_value_dir_get(f"{here}/said/"))]
        store.key_value_set(f"{here}/all", json.dumps(reduce(each)))
        if number:  # all have sent to this round, so they have read the one before
            store.key_value_delete(f"solrl_jax/{channel}/{number - 1}/")
    return json.loads(store.blocking_key_value_get(f"{here}/all", _LONGEST))


def agreed(value: Callable[[], Any]) -> Any:
    """What `value` gives on the first process, on all; it must be of JSON's kinds."""
    if count() == 1:
        return value()
    return json.loads(exchanged(json.dumps(by_first(value)), lambda each: each[0]))


def any_of(flag: bool, channel: str = "main") -> bool:
    """Whether `flag` is true on any process."""
    return bool(exchanged("yes" if flag else "", "".join, channel))


def together(act: Callable[[], T], channel: str = "main") -> T:
    """act() on every process. If it raises on one, it raises on all: its own error there, ProcessError elsewhere.

    For what a process does alone; `act` must not wait for other processes.
    """
    if count() == 1:
        return act()
    result, error = None, None
    try:
        result = act()
    except Exception as e:
        error = e
    mine = "" if error is None else f"process {index()} failed: {type(error).__name__}: {error}"
    said = exchanged(mine, lambda each: next(filter(None, each), ""), channel)
    if error is not None:
        setattr(error, _KNOWN, True)
        raise error
    if said:
        raise ProcessError(said)
    return result  # pyright: ignore[reportReturnType] - act() returned it


def by_first(act: Callable[[], T], channel: str = "main") -> T | None:
    """act() on the first process, and None on the others; an error is raised on all."""
    return together(act if first() else lambda: None, channel)


def known(error: BaseException | None) -> bool:
    """Whether all processes know of this error or of its cause, so that they can still do something together."""
    return count() == 1 or error is None or isinstance(error, ProcessError) or _told(error)


def _told(error: BaseException) -> bool:
    cause = error.__cause__ or error.__context__
    return hasattr(error, _KNOWN) or (cause is not None and known(cause))


def same(values: Mapping[str, str], there: int | None = None) -> None:
    """Raises ProcessError, on all processes, that names the first of `values` in which they differ."""
    if said := exchanged(json.dumps(dict(values)), _difference, there=there):
        raise ProcessError(said)


def _difference(each: list[str]) -> str:
    """The first value in which a process differs from the first one; "" if there is none."""
    first, *others = map(json.loads, each)
    for name, value in first.items():
        for i, other in enumerate(others, 1):
            if other.get(name) != value:
                return f"{name} is {value} in process 0 and {other.get(name)} in process {i}: start all processes alike"
    return ""
