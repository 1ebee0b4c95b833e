"""The clock of this host: reading it, telling whether another process has the same, noticing a suspend."""

from __future__ import annotations

import os
import time
from pathlib import Path


class MonotonicClock:
    """The monotonic clock of this process."""

    now_ns = staticmethod(time.monotonic_ns)
    """Return the time in nanoseconds; it never goes back, and stops while the host is suspended."""


def clock_domain(proc: Path = Path("/proc")) -> str:
    """Return a string that is equal for processes whose monotonic clocks are the very same.

    That is one boot of one kernel and one offset of the time namespace. Where the system does not tell, the answer
    is equal to no other process's.
    """
    try:
        boot = (proc / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return f"{os.uname().nodename} {os.getpid()} {time.monotonic_ns()}"
    try:
        here, children = (os.readlink(proc / "self/ns" / name) for name in ("time", "time_for_children"))
        if here != children:  # the offsets on show are those of children still to come
            return f"{boot} {here}"
        for line in (proc / "self/timens_offsets").read_text(encoding="ascii").splitlines():
            name, seconds, nanoseconds = line.split()
            if name in ("monotonic", "1"):
                return f"{boot} {seconds} {nanoseconds}"
    except (FileNotFoundError, ValueError):
        pass  # a kernel without time namespaces
    return f"{boot} 0 0"


class SuspendDetector:
    """Tells when this host was suspended: its boot-time clock goes on while the monotonic one stops.

    Readings are arguments: the monotonic clock before and after the boot-time clock (``CLOCK_BOOTTIME``), so that a
    thread that loses the processor in between never looks like a suspended host.
    """

    def __init__(self) -> None:
        self._low_ns: int | None = None
        self._high_ns = 0

    def update(self, before_ns: int, boottime_ns: int, after_ns: int) -> int:
        """Return for how many nanoseconds, at least, the host was suspended since the last call; 0 if it was not."""
        low_ns, high_ns = boottime_ns - after_ns, boottime_ns - before_ns
        if self._low_ns is None or low_ns > self._high_ns:
            suspended_ns = 0 if self._low_ns is None else low_ns - self._high_ns
            self._low_ns, self._high_ns = low_ns, high_ns
            return suspended_ns
        self._low_ns, self._high_ns = max(low_ns, self._low_ns), min(high_ns, self._high_ns)
        return 0
