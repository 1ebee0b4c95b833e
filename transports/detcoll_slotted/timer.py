"""A timer with a descriptor, `timerfd_create(2)`: epoll alone would wait in whole milliseconds."""

from __future__ import annotations

import ctypes
import os
import time

_CLOCK_MONOTONIC = 1
_ABSOLUTE = 1
_NONBLOCK_CLOEXEC = 0o4000 | 0o2000000


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("it_interval", _Timespec), ("it_value", _Timespec))


class Timer:
    """Makes its descriptor readable at a time of the monotonic clock."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._spec = _Itimerspec()
        self._spec_at = ctypes.byref(self._spec)
        self._settime = ctypes.PyDLL(None).timerfd_settime  # it never waits, so the interpreter's lock is kept
        self.fd: int = libc.timerfd_create(_CLOCK_MONOTONIC, _NONBLOCK_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._armed_ns = 0

    def arm(self, at_ns: int) -> None:
        """Fire at ``at_ns``, or earlier where it is set to already; at once where that has passed."""
        if time.monotonic_ns() < self._armed_ns <= at_ns:  # whoever wakes too early sets it again, which is rare
            return
        self._armed_ns = at_ns
        self._spec.it_value.tv_sec, self._spec.it_value.tv_nsec = divmod(max(at_ns, 1), 10**9)
        self._settime(self.fd, _ABSOLUTE, self._spec_at, None)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.fd)
