"""What happened, beside what was planned.

Where tracing is asked for, each rank keeps the last collectives, the last sends over the wide area, and the windows
that it missed. Written to a file (schema ``detcoll.trace/1``), together with the calendar and the TCP connections used,
they let anybody hold a capture of the line against the windows that were promised.

Rows are whole numbers in flat arrays, so a row costs well below a microsecond; nothing is kept without a request.
Predictions are made when the trace is written, from when each call was made.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

TRACE_VARIABLE = "DETCOLL_TRACE"
"""In the environment: the folder for one trace file a rank."""

LARGEST_TRACE = 65_536
"""Collectives and sends kept, the oldest go first."""

SEND_COLUMNS = (
    "sequence", "dst", "nbytes", "not_before_ns", "not_after_ns", "started_ns", "left_ns", "ended_ns", "trimmed",
    "group",
)  # fmt: skip


class Records:
    """The last rows of whole numbers, in one flat array.

    Parameters
    ----------
    columns : sequence of str
        The name of each number of a row.
    largest : int
        Rows kept.
    """

    def __init__(self, columns: Sequence[str], largest: int = LARGEST_TRACE) -> None:
        self.columns = tuple(columns)
        self._largest_cells = largest * len(self.columns)
        self._cells = array("q")
        self._oldest = 0

    def append(self, row: tuple[int, ...]) -> None:
        """Add a row, in place of the oldest where there is no more room."""
        if len(self._cells) < self._largest_cells:
            self._cells.extend(row)
            return
        end = self._oldest + len(row)
        self._cells[self._oldest : end] = array("q", row)
        self._oldest = end % self._largest_cells

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self._cells) // len(self.columns)

    def rows(self) -> list[dict[str, int]]:
        """Return all rows by the names of their columns, the oldest first."""
        width = len(self.columns)
        cells = self._cells[self._oldest :] + self._cells[: self._oldest]
        return [
            dict(zip(self.columns, cells[at : at + width], strict=True)) for at in range(0, len(cells), width)
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """What all collectives of one kind, size and group have in common.

    ``subject`` is what their prediction is made from, ``group`` the number of the group in tags; the world's is 1.
    """

    kind: str
    nbytes: int
    algorithm: str
    subject: Hashable = None
    group: int = 1


Predict = Callable[[Call, int], int | None]
"""Gives the predicted nanoseconds of a call made at a time, or None."""


@dataclass(slots=True)
class Trace:
    """What one rank did. Times are nanoseconds of its monotonic clock; ``ready_ns`` is when it could be called.

    ``misses`` : destination site (-1: any), begin and end of each window in which data waited and nothing was sent.
    """

    rank: int
    site: int
    recording: bool = False
    ready_ns: int = 0
    calendar: dict[str, Any] | None = None
    connections: list[dict[str, object]] = field(default_factory=list)
    misses: list[tuple[int, int, int]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    collectives: Records = field(default_factory=lambda: Records(("sequence", "call", "called_ns", "ended_ns")))
    sends: Records = field(default_factory=lambda: Records(SEND_COLUMNS))
    _calls: dict[Call, int] = field(default_factory=dict)

    def note_collective(self, sequence: int, call: Call, called_ns: int, ended_ns: int) -> None:
        """Keep when a collective was called and when its result was ready, where that is asked for."""
        if self.recording:
            self.collectives.append((sequence, self._calls.setdefault(call, len(self._calls)), called_ns, ended_ns))

    def to_json(self, predict: Predict | None = None) -> dict[str, Any]:
        """Return the trace as plain data.

        Parameters
        ----------
        predict : callable, optional
            What predicts calls; without it ``predicted_end_ns`` is null.
        """
        return {
            "schema": "detcoll.trace/1",
            "rank": self.rank,
            "site": self.site,
            "ready_ns": self.ready_ns,
            "calendar": self.calendar,
            "connections": self.connections,
            "counts": self.counts,
            "collectives": self.calls(predict),
            "sends": [row | {"trimmed": bool(row["trimmed"])} for row in self.sends.rows()],
            "misses": [
                {"dst_site": site, "not_before_ns": begins_ns, "not_after_ns": ends_ns}
                for site, begins_ns, ends_ns in self.misses
            ],
        }

    def calls(self, predict: Predict | None = None) -> list[dict[str, Any]]:
        """Return the collectives as plain data, each with the end that was predicted for it."""
        known = list(self._calls)
        told: list[dict[str, Any]] = []
        for row in self.collectives.rows():
            call = known[row.pop("call")]
            takes_ns = predict(call, row["called_ns"]) if predict is not None else None
            told.append(
                row | {
                    "kind": call.kind, "nbytes": call.nbytes, "algorithm": call.algorithm, "group": call.group,
                    "predicted_end_ns": None if takes_ns is None else row["called_ns"] + takes_ns,
                }
            )  # fmt: skip
        return told
