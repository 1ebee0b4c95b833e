"""Scheduling priority for threads that must wake up in time.

A window that its owner sleeps through is lost. Where the process may (root, ``CAP_SYS_NICE`` or ``RLIMIT_RTPRIO``),
threads that keep time run at the lowest real-time priorities, ahead of the training they serve, which they interrupt
only for what the line needs. Where it may not, nothing changes. Niceness would not do: with automatic task groups it
counts inside one session only. ``DETCOLL_REALTIME=0`` leaves everything as it is.

What the system gives, the interpreter can keep back: a thread that computes in Python holds its lock for
`sys.getswitchinterval`, 5 ms unless changed, before one that was woken may run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys
import threading
from collections.abc import Callable, Iterator

from detcoll.quantities import read_flag

_NUMBERS = {"x86_64": 314, "aarch64": 274}
"""Of the system call ``sched_setattr``, which the C library does not have."""

_ATTRIBUTES = struct.Struct("IIQiIQQQII")  # struct sched_attr of linux/sched/types.h
_SLICE_NS = 100_000
SWITCH_INTERVAL_S = 0.0005
"""A tenth of that helped no more where training kept Python busy; see docs/training.md."""


def _sched_setattr() -> Callable[[int, bytes, int], int] | None:
    number = _NUMBERS.get(platform.machine())
    if number is None or platform.system() != "Linux":
        return None
    syscall = ctypes.CDLL(None).syscall
    syscall.restype = ctypes.c_long
    return lambda thread, attributes, flags: syscall(number, thread, attributes, flags)


_SETATTR = _sched_setattr()

PROGRESS, OWNER, LINE = 1, 2, 3
"""Real-time priorities. Threads that hand bytes to the line go first, then the one whose window it is, and last those
that decide and fold."""


def _is_left_alone() -> bool:
    return read_flag(os.environ.get("DETCOLL_REALTIME", "")) is False


def make_prompt(priority: int = PROGRESS) -> bool:
    """Put the calling thread ahead of ordinary ones; False where that is not allowed or not wanted."""
    if _is_left_alone():
        return False
    try:
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_RR, os.sched_param(priority))
    except (OSError, AttributeError):
        return False
    return True


def shorten_turns() -> bool:
    """Ask that the calling thread runs often and briefly instead of seldom and long; False where that is not offered.

    Linux 6.12 and newer take a time slice for ordinary threads (``sched_setattr(2)``, ``sched_runtime``, at least
    0.1 ms): whoever asks for a short one waits less for threads with the usual one of some 3 ms. It needs no privilege.
    """
    return _set_slice(_SLICE_NS)


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
    """Do as `shorten_turns` for a while: a thread that waits inside runs soon after it is woken."""
    shortened = _set_slice(_SLICE_NS)
    try:
        yield
    finally:
        if shortened:
            _set_slice(0)


def _set_slice(slice_ns: int) -> bool:
    """Set the time slice of the calling thread, 0 for the usual one, unless it chose another class than the usual."""
    if _SETATTR is None or os.sched_getscheduler(0) != os.SCHED_OTHER or _is_left_alone():
        return False
    nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, 0, nice, 0, slice_ns, 0, 0, 0, 0)
    return _SETATTR(0, attributes, 0) == 0


@contextlib.contextmanager
def prompt_threads() -> Iterator[None]:
    """Put threads that are started inside, by a library too, ahead: they inherit their creator's class."""
    thread = threading.get_native_id()
    before = (os.sched_getscheduler(thread), os.sched_getparam(thread))
    raised = make_prompt(LINE)
    try:
        yield
    finally:
        if raised:
            os.sched_setscheduler(thread, *before)


class _Switching:
    """The interpreter's switch interval, which belongs to the process, as long as anybody wants it short."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted_by = 0
        self._usual_s = 0.0

    def begin(self) -> None:
        with self._lock:
            self._wanted_by += 1
            if self._wanted_by == 1:
                self._usual_s = sys.getswitchinterval()
                sys.setswitchinterval(min(self._usual_s, SWITCH_INTERVAL_S))

    def end(self) -> None:
        with self._lock:
            self._wanted_by -= 1
            if not self._wanted_by:
                sys.setswitchinterval(self._usual_s)


_SWITCHING = _Switching()


@contextlib.contextmanager
def quick_switches() -> Iterator[None]:
    """Let threads that were woken have the interpreter after `SWITCH_INTERVAL_S`, in the whole process, for a while."""
    if _is_left_alone():
        yield
        return
    _SWITCHING.begin()
    try:
        yield
    finally:
        _SWITCHING.end()


class Urgency:
    """The priority of one thread, if it has a real-time one: changed only where it differs, since it is asked often."""

    def __init__(self) -> None:
        self._thread = 0
        self._priority = 0

    def set(self, priority: int) -> None:
        """Give the calling thread this priority, unless it runs in the ordinary class."""
        thread = threading.get_native_id()
        if thread != self._thread:
            self._thread = thread
            is_prompt = os.sched_getscheduler(0) == os.SCHED_RR
            self._priority = os.sched_getparam(0).sched_priority if is_prompt else 0
        if self._priority and priority != self._priority:
            with contextlib.suppress(OSError):
                os.sched_setparam(0, os.sched_param(priority))
                self._priority = priority
