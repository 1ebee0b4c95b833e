"""Files that are written at the end of a long run: refused at its start where they could not be, written in one way.

Whether a place can be written to is found by trying, since permissions alone do not tell of read-only file systems, of
special ones, or of who is asking. What is tried leaves nothing behind: a file without a name in the folder, or opening
what is there without changing it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from tempfile import TemporaryFile

from detcoll.errors import DetcollError, UsageError


class OutputLost(OSError):
    """What goes to standard output could not be written; the arguments are those of `OSError`."""


def require_writable(path: Path | None, name: str) -> None:
    """Refuse a file that could not be written, before anything runs; ``name`` is the option's.

    Raises
    ------
    UsageError
        If ``path`` is a folder, its folder is not there, or it cannot be written; names the reason.

    Guarantees
    ----------
    What was there is as before, and nothing is made.
    """
    if path is None:
        return
    try:
        _try_to_write(path)
    except IsADirectoryError as error:
        raise UsageError(f"{name}={str(path)!r} is a directory; expected the name of a file") from error
    except FileNotFoundError as error:
        folder = str(path.parent)
        why = f"no file can be made in {folder!r}" if path.parent.is_dir() else f"there is no directory {folder!r}"
        raise UsageError(f"{name}={str(path)!r}: {why}") from error
    except OSError as error:
        raise UsageError(f"{name}={str(path)!r} cannot be written: {error.strerror}") from error


def require_folder(path: Path | None, name: str) -> None:
    """Refuse a folder that could not be made or written to, before anything runs; `write_file` makes it.

    Raises
    ------
    UsageError
        If ``path`` is something else, or cannot be made or written to; names the reason.

    Guarantees
    ----------
    Nothing is made.
    """
    if path is None:
        return
    try:
        nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
        with TemporaryFile(dir=nearest):
            pass
    except NotADirectoryError as error:
        what = "is a file; expected a folder" if path.exists() else f"cannot be made: {str(nearest)!r} is a file"
        raise UsageError(f"{name}={str(path)!r} {what}") from error
    except OSError as error:
        raise UsageError(f"{name}={str(path)!r} cannot be written to: {error.strerror}") from error


def write_file(path: Path, content: bytes) -> None:
    """Write a file that was checked at the start, and make its folder if it is not there.

    Raises
    ------
    DetcollError
        If it cannot be written now; names the reason.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise DetcollError(f"{str(path)!r} cannot be written: {error.strerror}") from error


def _try_to_write(path: Path) -> None:
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        with TemporaryFile(dir=path.parent.resolve()):
            return
    if not stat.S_ISFIFO(kind):  # opening one waits for its reader
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
