"""What happened, beside what was planned.

Each rank keeps the last collectives and the last sends over the wide area. Written to a file (schema
``detcoll.trace/1``), together with the calendar and the TCP connections used, they let anybody hold a capture of the
line against the windows that were promised.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

LARGEST_TRACE = 65_536
"""Collectives and sends kept, the oldest go first."""


@dataclass(frozen=True, slots=True)
class CollectiveRecord:
    """One collective: when it was called, when its result was ready, when that was predicted (0: not predicted)."""

    sequence: int
    kind: str
    nbytes: int
    algorithm: str
    called_ns: int
    ended_ns: int
    predicted_ns: int


@dataclass(frozen=True, slots=True)
class SendRecord:
    """One message over the wide area: its window (0, 0: none), when it was handed to the line and acknowledged."""

    sequence: int
    dst: int
    nbytes: int
    not_before_ns: int
    not_after_ns: int
    started_ns: int
    ended_ns: int


@dataclass(slots=True)
class Trace:
    """What one rank did. Times are nanoseconds of its monotonic clock; ``ready_ns`` is when it could be called."""

    rank: int
    site: int
    ready_ns: int = 0
    calendar: dict[str, Any] | None = None
    connections: list[dict[str, object]] = field(default_factory=list)
    collectives: deque[CollectiveRecord] = field(default_factory=lambda: deque(maxlen=LARGEST_TRACE))
    sends: deque[SendRecord] = field(default_factory=lambda: deque(maxlen=LARGEST_TRACE))

    def to_json(self) -> dict[str, Any]:
        """Return the trace as plain data."""
        return {
            "schema": "detcoll.trace/1",
            "rank": self.rank,
            "site": self.site,
            "ready_ns": self.ready_ns,
            "calendar": self.calendar,
            "connections": self.connections,
            "collectives": [asdict(record) for record in self.collectives],
            "sends": [asdict(record) for record in self.sends],
        }
