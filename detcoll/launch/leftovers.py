"""Remove the shared memory segments that MPICH leaves behind when its ranks are killed.

MPICH creates a segment ``/dev/shm/mpich_shm_*`` for the ranks of a host and removes it when they finalize. If a rank
dies, the segment stays, and nothing shows which job it belonged to. A segment is removed if it belongs to this user,
was created after a given time, and no process has it open or mapped. Then no live rank can need it: the rank that
created it keeps it mapped, and others attach only while that rank lives.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PATTERN = "mpich_shm_*"
_COARSE_NS = 100_000_000
"""The clock of file timestamps may lag by up to this much."""


def now_ns() -> int:
    """Return the current time for `remove_segments`, less the possible lag of file timestamps."""
    return time.time_ns() - _COARSE_NS


def remove_segments(since_ns: int, folder: Path = SHARED_MEMORY) -> list[str]:
    """Remove this user's unused segments that were created since ``since_ns`` (UNIX time), and return their names."""
    candidates = {}
    for path in folder.glob(PATTERN):
        with contextlib.suppress(FileNotFoundError):
            state = path.lstat()
            if state.st_uid == os.geteuid() and state.st_ctime_ns >= since_ns:
                candidates[str(path)] = path
    removed = []
    for name in candidates.keys() - (_in_use(folder) if candidates else set()):
        candidates[name].unlink(missing_ok=True)
        removed.append(candidates[name].name)
    return sorted(removed)


def _in_use(folder: Path) -> set[str]:
    """Return the files in ``folder`` that a process has open or mapped, for all processes that may be inspected."""
    used: set[str] = set()
    prefix = f"{folder}/"
    for process in Path("/proc").glob("[0-9]*"):
        # A rank opens, maps and then closes a segment. Checking open files before maps finds it at any time.
        with contextlib.suppress(OSError):  # ended, or of another user, who cannot use our segments
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    used.add(os.readlink(descriptor))
        with contextlib.suppress(OSError):
            lines = (process / "maps").read_text(errors="replace").splitlines()
            used.update(prefix + line.partition(prefix)[2] for line in lines if prefix in line)
    return used
