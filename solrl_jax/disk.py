"""Atomic writes, and reading of files that may be damaged."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def whole(file: Path) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `file` at the end, once it is on disk; after an error `file` is unchanged.

    Its permissions follow the umask. Creates the folder.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    try:
        with part.open("wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)  # it would waste space on a full disk
        raise


def unwritable(folder: Path) -> str:
    """Why nothing can be written in `folder`, which need not exist yet; "" if something can."""
    try:
        place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        missing = folder.absolute().relative_to(place.absolute()).parts
        for name in missing:
            (place / name).exists()  # a folder that is not made yet would not tell
        if missing and (place / missing[0]).is_symlink():  # Path.exists says no, and mkdir that it is there
            return f"{place / missing[0]} is a link to nothing"
    except OSError as e:  # a name that is too long
        return e.strerror or str(e)
    can = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    return "" if can else f"{place} is not a folder that can be written to"


def digest(file: Path) -> str:
    """The SHA-256 of a file's content."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def readable(read: Callable[[Path], T], file: Path, said: list[str]) -> T | None:
    """read(file), or None if there is no file or `read` fails, because it is incomplete or has other content.

    A failure is reported as a line appended to `said`.
    """
    if not file.exists():
        return None
    try:
        return read(file)
    except Exception as e:  # zipfile, zlib, NumPy and JSON raise many kinds of errors for a damaged file
        said.append(f"{file} cannot be read and counts as absent ({type(e).__name__}: {e})")
        return None
