"""The flight recorder: the last events of one rank, for the diagnosis of a job that failed or hangs."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from detcoll.descriptor import brief
from detcoll.types import ReduceOp

RECORD_SCHEMA = "detcoll.record/1"
"""Schema of the file that `detcoll.job.flight` writes."""

LARGEST_RECORD = 2_000
"""Number of events kept; the oldest are dropped first."""

COLUMNS = ("at_ns", "event", "group", "sequence", "step", "peer", "detail")
CALLED = ("kind", "op", "dtype", "count", "root", "arrays", "name", "shape")
"""What a row of a ``call`` has beside `COLUMNS`, under the key ``called``."""

Called = tuple[str, ReduceOp | str, np.dtype[Any] | str, int, int, int, str, str]
"""The arguments of `detcoll.descriptor.brief`, which formats them only when the events are read."""

Detail = str | Called

Event = tuple[int, str, int, int, int, int, Detail]


class Recorder:
    """Keeps the last `LARGEST_RECORD` events as tuples of `COLUMNS`; each costs well below a microsecond.

    Events: ``join``, ``call`` (detail: the call), ``refuse``, ``start``, ``greeted`` (a peer confirmed the call),
    ``step``, ``window`` (a send got a window), ``message`` (detail: a send or recv), ``match`` (a recv has found its
    message), ``end``, ``fail`` (detail: the reason), ``lost`` (a rank, and the reason).
    """

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=LARGEST_RECORD)

    def note(
        self, at_ns: int, event: str, group: int = 0, sequence: int = -1, step: int = -1, peer: int = -1,
        detail: Detail = "",
    ) -> None:  # fmt: skip
        """Record an event; ``group`` is the number of the group as in tags."""
        self._events.append((at_ns, event, group, sequence, step, peer, detail))

    def rows(self) -> list[dict[str, Any]]:
        """Return the events as dictionaries with keys `COLUMNS`, the oldest first; see `CALLED`. Thread-safe."""
        while True:
            try:
                events = list(self._events)
                break
            except RuntimeError:  # another thread added an event during the copy
                continue
        return [_row(event) for event in events]


def _row(event: Event) -> dict[str, Any]:
    detail = event[-1]
    if isinstance(detail, str):
        return dict(zip(COLUMNS, event, strict=True))
    row = dict(zip(COLUMNS, (*event[:-1], brief(*detail)), strict=True))
    kind, op, dtype, *rest = detail
    named = op.value if isinstance(op, ReduceOp) else op
    return row | {"called": dict(zip(CALLED, (kind, named, str(dtype), *rest), strict=True))}
