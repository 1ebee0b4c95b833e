"""The flight recorder: the last events of one rank, for looking into a job that failed or hangs."""

from __future__ import annotations

from collections import deque
from typing import Any

LARGEST_RECORD = 2_000
"""Events kept, the oldest go first."""

COLUMNS = ("at_ns", "event", "group", "sequence", "step", "peer")


class Recorder:
    """Keeps the last `LARGEST_RECORD` events as tuples of `COLUMNS`, which costs well below a microsecond each."""

    def __init__(self) -> None:
        self._events: deque[tuple[int, str, int, int, int, int]] = deque(maxlen=LARGEST_RECORD)

    def note(self, at_ns: int, event: str, group: int = 0, sequence: int = -1, step: int = -1, peer: int = -1) -> None:
        """Keep an event."""
        self._events.append((at_ns, event, group, sequence, step, peer))

    def rows(self) -> list[dict[str, Any]]:
        """Return the events by the names of their columns, the oldest first."""
        return [dict(zip(COLUMNS, event, strict=True)) for event in list(self._events)]
