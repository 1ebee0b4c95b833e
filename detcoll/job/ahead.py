"""Ordering of calls on the same memory, where the transport and the progress thread both execute calls.

Each of the two executes its own calls in order. Where one call goes to the transport, another to the progress thread,
and both use the same memory, the later call is submitted only when the earlier one has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from detcoll.runtime import Work
from detcoll.runtime.operation import Span, overlap

_FEW = 16


class Ahead:
    """The submitted calls and the memory that they use. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[tuple[Sequence[Span], Work, bool]] = []
        self._most = _FEW

    def note(self, spans: Sequence[Span], work: Work, *, on_loop: bool) -> None:
        """Record a submitted call; drop ended calls when the list has grown."""
        if not spans:
            return
        with self._lock:
            if len(self._calls) >= self._most:
                self._calls = [call for call in self._calls if not call[1].done()]
                self._most = max(_FEW, 2 * len(self._calls))
            self._calls.append((spans, work, on_loop))

    def of(self, spans: Sequence[Span], *, on_loop: bool) -> list[Work]:
        """Return the unfinished calls on this memory that were submitted to the other executor."""
        if not self._calls:
            return []
        with self._lock:
            return [
                work for others, work, elsewhere in self._calls
                if elsewhere != on_loop and not work.done() and overlap(spans, others)
            ]  # fmt: skip

    def wait(self, spans: Sequence[Span], *, on_loop: bool) -> None:
        """Block until the calls on this memory that the other executor has under way end, each by its own deadline."""
        for work in self.of(spans, on_loop=on_loop):
            work.exception()
