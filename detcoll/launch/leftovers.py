"""Removes what MPICH leaves in shared memory when its ranks are killed.

MPICH takes a segment ``/dev/shm/mpich_shm_*`` for the ranks of a host and gives it back when they finalize, so a rank
that dies leaves it there. Nobody tells whose it was. What is removed here belongs to this user, was made since a given
moment, and no process has it open or mapped, so that no living rank can miss it: the one that made it holds it, and
others join only while that one lives.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PATTERN = "mpich_shm_*"
_COARSE_NS = 100_000_000
"""File systems stamp files by a clock that may lie this far behind."""


def now_ns() -> int:
    """Return the moment after which files count as made, for `remove_segments`."""
    return time.time_ns() - _COARSE_NS


def remove_segments(since_ns: int, folder: Path = SHARED_MEMORY) -> list[str]:
    """Remove segments of dead ranks of this user that were made since ``since_ns``, and return their names."""
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
    """Return the files in ``folder`` that a process has open or mapped, as far as they can be looked at."""
    used: set[str] = set()
    prefix = f"{folder}/"
    for process in Path("/proc").glob("[0-9]*"):
        # Who makes a segment opens, maps and closes it: looked at in this order it is seen whenever that happens.
        with contextlib.suppress(OSError):  # it has ended, or belongs to somebody else, who cannot use our segments
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    used.add(os.readlink(descriptor))
        with contextlib.suppress(OSError):
            lines = (process / "maps").read_text(errors="replace").splitlines()
            used.update(prefix + line.partition(prefix)[2] for line in lines if prefix in line)
    return used
