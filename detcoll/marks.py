"""Marks that a training script leaves, one an iteration, where `detcoll measure` runs it.

A script calls `step`. One that trains with torch over the process group of detcoll need not, since it is to import
nothing of detcoll: there the end of an optimizer's step is the mark (`optimizer_stepped`), which every loop comes to
once an iteration. Once a script has called `step`, only that counts. A rank that opens a job leaves a file as well:
without any, the script did not use detcoll, and its times would say nothing of detcoll's transports.
"""

from __future__ import annotations

import atexit
import os
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from detcoll.launch.launchers import read_environment
from detcoll.outputs import write_file

MARKS_VARIABLE = "DETCOLL_MARKS"
"""Names the directory that ranks leave their marks in; set by `detcoll measure` alone."""

_OPENED = "opened"


@dataclass(frozen=True, slots=True)
class Marks:
    """When one rank of a user's script ended its iterations, in nanoseconds of the monotonic clock."""

    rank: int
    marks_ns: tuple[int, ...]


class _Marker:
    """The marks of this process; ``called`` : those of `step`.  ``stepped`` : those of the optimizer."""

    def __init__(self) -> None:
        self.called: list[int] = []
        self.stepped: list[int] = []
        self.optimizer: weakref.ref[Any] | None = None

    def add(self, marks_ns: list[int], directory: str) -> None:
        if not self.called and not self.stepped:
            atexit.register(self.leave, Path(directory))
        marks_ns.append(time.monotonic_ns())

    def leave(self, directory: Path) -> None:
        rank = read_environment(os.environ).rank
        marks = Marks(rank, tuple(self.called or self.stepped))
        write_file(directory / f"marks{rank}.json", msgspec.json.encode(marks))
        self.called, self.stepped = [], []


_marker = _Marker()


def step() -> None:
    """Mark the end of a training iteration; call it once an iteration, on every rank.

    Under ``detcoll measure SCRIPT`` the time between marks is the iteration time. Elsewhere it does nothing.
    """
    if (directory := os.environ.get(MARKS_VARIABLE)) is not None:
        _marker.add(_marker.called, directory)


def job_opened() -> None:
    """Tell who measures that this script uses detcoll."""
    if (directory := os.environ.get(MARKS_VARIABLE)) is not None:
        Path(directory, _OPENED).touch()


def was_job_opened(directory: Path) -> bool:
    """Return whether a rank that left its marks in ``directory`` opened a job."""
    return (directory / _OPENED).exists()


def optimizer_stepped(optimizer: Any) -> None:
    """Mark the end of an optimizer's step, of the first optimizer alone: a loop may have several, or nest them."""
    directory = os.environ.get(MARKS_VARIABLE)
    if directory is None:
        return
    first = None if _marker.optimizer is None else _marker.optimizer()
    if first is None:
        _marker.optimizer = weakref.ref(optimizer)
    elif first is not optimizer:
        return
    _marker.add(_marker.stepped, directory)
