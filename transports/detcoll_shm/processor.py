"""Which processor a thread runs on, and how it moves to another one.

Threads that wake each other are drawn together: a scheduler likes to put the one that is woken beside its waker, and
with other work on the machine two ranks may so share one processor for seconds, though each could have its own. Then
whoever waits keeps the other from running.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

_STATE, _PROCESSOR = 0, 36
"""Places behind a thread's name in its ``stat``."""


def _find() -> Callable[[], int]:
    try:
        sched_getcpu = ctypes.CDLL(None).sched_getcpu
    except (OSError, AttributeError):
        return lambda: -1
    sched_getcpu.restype, sched_getcpu.argtypes = ctypes.c_int, []
    return sched_getcpu


current_processor = _find()
"""Return the number of the processor that runs the calling thread; -1 where the system does not tell."""


def awaited_processor(pid: int, thread: int) -> int | None:
    """Return on which processor a thread wants to run (``proc_pid_stat(5)``), None if it sleeps or is gone."""
    try:
        text = Path(f"/proc/{pid}/task/{thread}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return int(fields[_PROCESSOR]) if fields[_STATE] == "R" else None


def leave(processor: int) -> None:
    """Move the calling thread off ``processor``, if it may run on others; where it may run stays as it is."""
    allowed = os.sched_getaffinity(0)
    others = allowed - {processor}
    if not others:
        return
    with contextlib.suppress(OSError):  # where a sandbox forbids it the thread stays, and only time is lost
        os.sched_setaffinity(0, others)
        os.sched_setaffinity(0, allowed)
