"""What calls cost this process: processor time of all its threads, and memory beyond what it held before.

Processor time is user and system time of the whole process from the first timed call until all ranks are through with
the last, less what the calling thread spent between calls on preparing and checking. So what other threads do for a
call after it has returned counts, as does waiting that keeps a processor busy. Threads of the kernel, the launcher and
the lab's router do not count.

Memory is how far the peak of the resident set (Linux, VmHWM in proc_pid_status(5)) rose in any call above the resident
set before the first one, with the caller's array all there. Memory that ranks share counts in each of them in full.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class Meter:
    """Of one process; `prepare` before each call, `enter` and `leave` around it."""

    def __init__(self) -> None:
        self._resident_bytes: int | None = None
        self._peak_bytes = 0
        self._began_s = self._left_s = self._outside_s = 0.0

    def prepare(self) -> None:
        """Get ready for a call; takes some time itself."""
        if self._resident_bytes is None:
            self._resident_bytes = read_kib(_text(_STATUS), "VmRSS")
        try:
            _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
        except OSError:  # not Linux, or a kernel without it: the peak since the process began says nothing
            self._resident_bytes = -1

    def enter(self, *, timed: bool) -> None:
        """Take note that the call begins; processor time counts from the first one that is ``timed``."""
        if timed and self._began_s:
            self._outside_s += time.thread_time() - self._left_s
        elif timed:
            self._began_s = time.process_time()

    def leave(self) -> None:
        """Take note that the call has returned."""
        self._left_s = time.thread_time()
        self._peak_bytes = max(self._peak_bytes, read_kib(_text(_STATUS), "VmHWM") or 0)

    def processor_s(self) -> float:
        """Return the processor time of the timed calls; to be asked once all ranks are through with the last one."""
        return time.process_time() - self._began_s - self._outside_s - (time.thread_time() - self._left_s)

    def extra_bytes(self) -> int | None:
        """Return the greatest rise of memory in a call, or None where the system does not tell."""
        if self._resident_bytes is None or self._resident_bytes < 0:
            return None
        return max(0, self._peak_bytes - self._resident_bytes)


def read_kib(status: str, name: str) -> int | None:
    """Return in bytes the field ``name``, which is in KiB, of the text of ``/proc/self/status``."""
    found = re.search(rf"^{name}:\s*(\d+) kB$", status, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
