"""README.md and docs/*.md as what can be run: their commands, Python blocks, fields and links."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_PROGRAMS = r"python -m|pip|hf|tensorboard"


class Command(NamedTuple):
    page: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shlex.join(self.words)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """[(language, text)] of the fenced blocks."""
    return _FENCE.findall(read(page))


def spans(page: str) -> list[str]:
    """What stands between backticks in the text, each in one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", _FENCE.sub("", read(page)))]


def commands(page: str) -> list[Command]:
    """Every line of the bash blocks, continued ones as one, and every command within the text; each once, in order."""
    lines = [line for language, text in blocks(page) if language == "bash" for line in _joined(text)]
    lines += [span for span in spans(page) if re.match(rf"({_PROGRAMS}) ", span)]
    found = (Command(page, tuple(shlex.split(line, comments=True))) for line in lines)
    return list(dict.fromkeys(command for command in found if command.words))


def _joined(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


def in_short() -> list[Command]:
    """The commands that the headers of the experiments call the path in short."""
    found = []
    for file in sorted((ROOT / "experiments").rglob("*.py")):
        for line in file.read_text(encoding="utf-8").splitlines():
            if re.match(r" +python -m .*# .*\bshort\b", line):
                found.append(Command(str(file.relative_to(ROOT)), tuple(shlex.split(line, comments=True))))
    return found


def fields(page: str) -> list[str]:
    """`explore.steps` of every --config.explore.steps=6, and of every dotted name between backticks that may be one."""
    named = re.findall(r"--config\.([\w.]+)", read(page))
    sections = "model|explore|branch|regenerate|lora|learn|evaluate|watch"
    return sorted({*named, *(s for s in spans(page) if re.fullmatch(rf"({sections})\.[a-z_]+", s))})


def links(page: str) -> list[tuple[str, str]]:
    """[(path from this page, anchor)] of the links to files; "" where there is none."""
    found = re.findall(r"\]\(([^)\s#]*)#?([^)\s]*)\)", _FENCE.sub("", read(page)))
    return [(path, anchor) for path, anchor in found if not path.startswith("http")]


def anchors(file: Path) -> set[str]:
    """The headings of a page, as links name them."""
    heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
