"""Files that are written whole or not at all, and files that may turn out unreadable."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def whole(file: Path) -> Iterator[BinaryIO]:
    """A binary file to write to that becomes `file` at the end, when it is on the disk; on an error `file` stays as
    it was. Readable by whom the umask says. Makes the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    try:
        with part.open("wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)  # on a full disk it would take room for nothing
        raise


def readable(read: Callable[[Path], T], file: Path, said: list[str]) -> T | None:
    """What `read` makes of `file`; None where there is no file, and where there is one that `read` cannot use, cut
    short or of other content: a line in `said` tells so."""
    if not file.exists():
        return None
    try:
        return read(file)
    except Exception as e:  # for a damaged file zipfile, zlib, NumPy and JSON each raise several kinds of their own
        said.append(f"{file} cannot be read and counts as absent ({type(e).__name__}: {e})")
        return None
