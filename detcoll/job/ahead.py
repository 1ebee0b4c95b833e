"""Which calls others have to wait for, where the transport and the progress thread both carry calls out.

Each of the two keeps the order of its own calls. Calls on the same memory of which one goes either way are kept in
order here: the later one is handed over only when the earlier one has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from detcoll.runtime import Work
from detcoll.runtime.operation import Span, overlap

_FEW = 16


class Ahead:
    """Calls that were handed over, and the memory that they work on. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[tuple[Sequence[Span], Work, bool]] = []
        self._most = _FEW

    def note(self, spans: Sequence[Span], work: Work, *, on_loop: bool) -> None:
        """Remember a call that was handed over; those that have ended are forgotten now and then."""
        if not spans:
            return
        with self._lock:
            if len(self._calls) >= self._most:
                self._calls = [call for call in self._calls if not call[1].done()]
                self._most = max(_FEW, 2 * len(self._calls))
            self._calls.append((spans, work, on_loop))

    def of(self, spans: Sequence[Span], *, on_loop: bool) -> list[Work]:
        """Return what works on this memory, has not ended and goes the other way."""
        if not self._calls:
            return []
        with self._lock:
            return [
                work for others, work, elsewhere in self._calls
                if elsewhere != on_loop and not work.done() and overlap(spans, others)
            ]  # fmt: skip

    def wait(self, spans: Sequence[Span], *, on_loop: bool) -> None:
        """Return once all that `of` returns has ended, as each does by its own deadline."""
        for work in self.of(spans, on_loop=on_loop):
            work.exception()
