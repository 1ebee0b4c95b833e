"""The flight recorder: the last events of one rank, for looking into a job that failed or hangs."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from detcoll.descriptor import brief
from detcoll.types import ReduceOp

RECORD_SCHEMA = "detcoll.record/1"
"""Of the file that `detcoll.job.flight` writes."""

LARGEST_RECORD = 2_000
"""Events kept, the oldest go first."""

COLUMNS = ("at_ns", "event", "group", "sequence", "step", "peer", "detail")

Called = tuple[str, ReduceOp | str, np.dtype[Any] | str, int, int, int, str]
"""What `detcoll.descriptor.brief` makes text of, once somebody reads it."""

Detail = str | Called

Event = tuple[int, str, int, int, int, int, Detail]


class Recorder:
    """Keeps the last `LARGEST_RECORD` events as tuples of `COLUMNS`, which costs well below a microsecond each.

    Events: ``join``, ``call`` (with what was called), ``refuse``, ``start``, ``greeted`` (a peer called the same),
    ``step``, ``window`` (a send was given one), ``end``, ``fail`` (why), ``lost`` (a rank, and why).
    """

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=LARGEST_RECORD)

    def note(
        self, at_ns: int, event: str, group: int = 0, sequence: int = -1, step: int = -1, peer: int = -1,
        detail: Detail = "",
    ) -> None:  # fmt: skip
        """Keep an event; ``group`` is the number of the group in tags."""
        self._events.append((at_ns, event, group, sequence, step, peer, detail))

    def rows(self) -> list[dict[str, Any]]:
        """Return the events by the names of their columns, the oldest first; from any thread."""
        while True:
            try:
                events = list(self._events)
                break
            except RuntimeError:  # another thread added one meanwhile
                continue
        return [dict(zip(COLUMNS, (*event[:-1], _text(event[-1])), strict=True)) for event in events]


def _text(detail: Detail) -> str:
    return detail if isinstance(detail, str) else brief(*detail)
