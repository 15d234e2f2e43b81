"""Where a GPU's time goes: seconds of every kernel of a call, by the operation it belongs to in the program."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

GROUPS = (
    ("attention", r"fmha|flash|cudnn_generated|sdpa|dot_do_o|convert_dq"),
    ("products", r"gemm|nvjet|cutlass|cublas|wgmma|xmma"),
    ("convolutions", r"conv(?!ert)|fprop|cudnn"),
    ("copies and concatenations", r"copy|concatenate|transpose|memcpy|memset|slice"),
    ("reductions", r"reduce|softmax|norm"),
)


def kernels(call: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """{(kernel, operation): seconds} of one call on the first GPU; `call` has run before, so nothing compiles."""
    seconds: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (file,) = Path(folder).rglob("*.xplane.pb")
        for plane in ProfileData.from_file(str(file)).planes:
            if plane.name != "/device:GPU:0":
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        operation = str(dict(event.stats).get("hlo_op", ""))
                        seconds[event.name, operation] += event.duration_ns / 1e9
    return seconds


def group(kernel: str, operation: str) -> str:
    """What kind of work a kernel does, by its name."""
    text = f"{kernel} {operation}".lower()
    return next((name for name, pattern in GROUPS if re.search(pattern, text)), "elementwise")


def groups(found: Counter[tuple[str, str]]) -> dict[str, float]:
    """Seconds by kind of work, the largest first."""
    total: Counter[str] = Counter()
    for (kernel, operation), seconds in found.items():
        total[group(kernel, operation)] += seconds
    return dict(total.most_common())
