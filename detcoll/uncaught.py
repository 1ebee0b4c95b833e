"""How detcoll's own errors are shown when a program does not catch them.

Such an error says in its text what to change, and its traceback leads through detcoll alone from the line of the
program that is named. With several ranks it would be shown once a rank: under a launcher of detcoll's, a rank gives
what it would print to the launcher, which writes it once. That holds for the tracebacks of other exceptions too.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import traceback
from types import TracebackType

from detcoll.errors import DetcollError
from detcoll.launch import reports

_OURS = "detcoll"


def show_own_errors_short() -> None:
    """Let errors of detcoll that nobody catches end the program with one line instead of a traceback.

    With ``DETCOLL_LOG=debug`` the traceback is shown. All other exceptions are shown as before, and a program that has
    a `sys.excepthook` of its own keeps it. Where a launcher takes reports, it gets both to show.
    """
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _show


def report_to_launcher() -> None:
    """Where a launcher takes reports, let it show what ends the program, also before `init` is called."""
    if reports.may_send(os.environ):
        show_own_errors_short()


def describe(error: DetcollError, trace: TracebackType | None) -> str:
    """Return an error in one line: its kind, the line of the program that it comes from, and its text.

    A line of an installed package, such as torch's DDP, is named only where the program has none.
    """
    places: dict[bool, str] = {}
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if not str(trace.tb_frame.f_globals.get("__name__", "")).startswith(_OURS):
            places[_is_installed(path)] = f" in {_short(path)}, line {trace.tb_lineno}"
        trace = trace.tb_next
    place = places.get(False) or places.get(True, "")
    return f"detcoll: {type(error).__name__}{place}: {error}"


def _is_installed(path: str) -> bool:
    """Return whether a file belongs to an installed package or to Python."""
    folders = (sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib"))
    return path.startswith(tuple(f"{folder}{os.sep}" for folder in folders))


def _short(path: str) -> str:
    """Return a path as it is seen from the current folder, where that is shorter."""
    try:
        return min(os.path.relpath(path), path, key=len)
    except (OSError, ValueError):
        return path


def _has_more(error: BaseException) -> bool:
    """Return whether an exception of the program's own led to ``error``, or was under way, or notes were added to it.

    Causes inside detcoll, such as a package that cannot be imported, are told in its text.
    """
    seen = {id(error)}
    while not getattr(error, "__notes__", ()):
        before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if before is None or id(before) in seen:
            return False
        if not isinstance(before, DetcollError) and not _began_in_detcoll(before):
            return True
        seen.add(id(before))
        error = before
    return True


def _began_in_detcoll(error: BaseException) -> bool:
    """Return whether the frame that caught ``error`` is detcoll's, which turned an error of others into its own."""
    trace = error.__traceback__
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith(_OURS)


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    is_debug = os.environ.get("DETCOLL_LOG", "").lower() == "debug"
    if is_debug or sys.stderr is None:
        sys.__excepthook__(kind, error, trace)
        return
    short = f"{describe(error, trace)}\n" if isinstance(error, DetcollError) and not _has_more(error) else ""
    if _is_reported(short or "".join(traceback.format_exception(kind, error, trace))):
        return
    if short:
        print(short, end="", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)


def _is_reported(text: str) -> bool:
    """Give ``text`` to the launcher, after all that was printed; return whether it took it."""
    stderr = sys.stderr
    if stderr is not sys.__stderr__ or stderr is None:
        return False
    for stream in (sys.stdout, stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    return reports.send(os.environ, text.encode(stderr.encoding, "backslashreplace"))
