"""What commands write to: consoles for tables and progress, and standard output that may be closed or full.

Texts come from files, other programs and users, so brackets in them are never taken for rich's markup.

A command whose output cannot be written ends with one line on standard error and code 1, or without a word and with
code 141 (128 + SIGPIPE) where the reader is gone, as in ``detcoll plan | head -1``: other programs end so too.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from detcoll.outputs import OutputLost

CLOSED_PIPE, LOST = 141, 1
PIPE_WIDTH = 120


class PlainConsole(Console):
    """A console that takes texts as they are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)


def output_console() -> Console:
    """Return the console for tables: as wide as the terminal, or as a line of text where there is none."""
    console = PlainConsole()
    return console if console.is_terminal and _has_width() else PlainConsole(width=PIPE_WIDTH)


def error_console() -> Console:
    """Return the console for what is said beside the results."""
    return PlainConsole(stderr=True)


def _has_width() -> bool:
    """Tell whether standard output is a terminal that knows its width; those that Open MPI gives its ranks do not."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns > 0
    except (OSError, ValueError):
        return False


@contextmanager
def progress_bars() -> Iterator[Callable[[str, float], None]]:
    """Give a function that takes what is being done and which share of it is; a bar each, on standard error."""
    bars: dict[str, TaskID] = {}
    task = TextColumn("{task.description}", markup=False)
    columns = (task, BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = error_console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:

        def say(what: str, share: float) -> None:
            if what not in bars:
                bars[what] = shown.add_task(what, total=1.0)
            shown.update(bars[what], completed=share)

        yield say


class _Watched:
    """An output stream that hands errors of writing to ``on_error``; the rest is as it was."""

    def __init__(self, stream: IO[str], on_error: Callable[[OSError], None]) -> None:
        self._stream, self._on_error = stream, on_error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._on_error(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._on_error(error)


@contextmanager
def watched_output() -> Iterator[None]:
    """Raise `OutputLost` where standard output cannot be written, at the latest on leaving, and ignore it of errors.

    Both streams are made where this process was started without.
    """
    _require_streams()
    stdout: Any = _Watched(sys.stdout, _raise_lost)
    stderr: Any = _Watched(sys.stderr, lambda _: None)
    with redirect_stdout(stdout), redirect_stderr(stderr):
        yield
        stdout.flush()


def give_up_output(error: OutputLost) -> int:
    """Say why the output is lost, drop what waits for it, so that nobody tries again, and return the exit code."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, sys.stdout.fileno(), inheritable=False)
        os.close(nowhere)
    if error.errno == errno.EPIPE:
        return CLOSED_PIPE
    with suppress(OSError):
        print(f"detcoll: standard output cannot be written: {error.strerror}", file=sys.stderr, flush=True)
    return LOST


def _raise_lost(error: OSError) -> None:
    raise OutputLost(error.errno, error.strerror) from error


def _require_streams() -> None:
    """Stand in for standard output and standard error where there is none.

    What is written to a closed output is lost and has to be told; errors then have nowhere to go. The numbers 1 and 2
    are taken, so that no file of ours gets them, and closed again in processes that are started.
    """
    for number, name, mode in ((1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, mode | os.O_CLOEXEC)
            if descriptor != number:
                os.dup2(descriptor, number, inheritable=False)
                os.close(descriptor)
            # Opened for reading only, it answers as a closed one does: EBADF.
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115 (as long as we are)
