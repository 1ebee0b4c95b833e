"""Marks that a user's own training script leaves, one an iteration, where `detcoll measure` runs it."""

from __future__ import annotations

import atexit
import os
import time
from pathlib import Path

from detcoll.launch.launchers import read_environment
from detcoll.measure.records import Marks, write_json

MARKS_VARIABLE = "DETCOLL_MARKS"
"""Names the directory that ranks leave their marks in; set by `detcoll measure` alone."""

_marks_ns: list[int] = []


def step() -> None:
    """Mark the end of a training iteration; call it once an iteration, on every rank.

    Under ``detcoll measure SCRIPT`` the time between marks is the iteration time. Elsewhere it does nothing.
    """
    if (directory := os.environ.get(MARKS_VARIABLE)) is None:
        return
    if not _marks_ns:
        atexit.register(_leave, Path(directory))
    _marks_ns.append(time.monotonic_ns())


def _leave(directory: Path) -> None:
    rank = read_environment(os.environ).rank
    write_json(directory / f"marks{rank}.json", Marks(rank, tuple(_marks_ns)))
    _marks_ns.clear()
