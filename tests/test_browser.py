"""The report in a real browser, headless, on a desktop and on a phone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from solrl_jax import report
from tests.test_report import EVIL, metrics, write

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Three runs with long names, prompts that are no prose, and evil ones."""
    folder = tmp_path_factory.mktemp("browser")
    prompts = (EVIL, "word" * 60, "a cat")
    names = ("one", "a_run_with_a_name_that_is_longer_than_a_phone_is_wide_" * 2, "three")
    changes = (0.125, -0.25, 0.0)
    runs = [
        write(folder / name, metrics(c, -c, count=40), prompts=prompts, change=c)
        for name, c in zip(names, changes, strict=True)
    ]
    return report.write(runs, folder / "report.html")


def look(file: Path, width: int) -> dict:
    command = [sys.executable, "-m", "tests.browser", str(file), str(width), str(file.with_name(f"{width}.png"))]
    root = Path(__file__).parent.parent
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_in_a_browser(page, width):
    seen = look(page, width)
    assert seen["loaded"] and seen["page"]["inner"] == width and seen["page"]["script"]
    assert seen["page"]["width"] <= width, "the page is wider than the screen"
    assert len(seen["page"]["tables"]) == 6 and all(seen["page"]["tables"])
    assert len(seen["page"]["pictures"]) == 12 and all(seen["page"]["pictures"])
    assert seen["console"] == []
    outside = [url for url in seen["requests"] if not url.startswith(("data:", page.as_uri()[:60]))]
    assert outside == [] and any(url.startswith("file:") for url in seen["requests"])

    before, clicked = seen["before"], seen["clicked"]
    assert before["target"] is None and clicked["target"] == "p0-0-0"
    assert clicked["overlay"] == [0, 0, width, before["height"]]
    assert clicked["picture"][2] > 2.4 * before["picture"][2] > 2.4 * 60
    assert clicked["picture"][0] >= 0 and clicked["picture"][0] + clicked["picture"][2] <= width
    assert clicked["focus"] == "close"
    assert seen["after Key_Right"]["target"] == "p0-0-1"  # the next run's, in the same place
    closed = seen["after Key_Escape"]
    assert closed["target"] is None and closed["focus"] == "open" and closed["picture"][2] == before["picture"][2]

    assert seen["plot"]["at"] == "last" and seen["plot"]["values"] == ["0.525", "0.15", "0.4"]
    x = int(seen["over"]["at"].removeprefix("iteration "))  # a quarter along: evaluated at every second iteration
    assert 2 <= x <= 12 and x % 2 == 0
    gains = [0.4 + gain * x / 40 for gain in (0.125, -0.25, 0.0)]
    assert [float(v) for v in seen["over"]["values"]] == pytest.approx(gains, rel=1e-3)
