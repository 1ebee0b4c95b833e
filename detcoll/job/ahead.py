"""Ordering of calls on the same memory, where several executors carry out calls.

Executors are the progress thread, and in each group the runner of native collectives. Each executes its own calls in
order. Where two calls go to different ones and use the same memory, the later call is submitted only when the earlier
one has ended. An executor is any object that stands for it; None is the progress thread.
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
        self.calls: list[tuple[Sequence[Span], Work, object]] = []
        """Those that were noted, some of which may have ended; where there are none, nothing has to be waited for."""
        self._most = _FEW

    def note(self, spans: Sequence[Span], work: Work, executor: object) -> None:
        """Record a submitted call; drop ended calls when the list has grown."""
        if not spans:
            return
        with self._lock:
            if len(self.calls) >= self._most:
                self.calls = [call for call in self.calls if not call[1].done()]
                self._most = max(_FEW, 2 * len(self.calls))
            self.calls.append((spans, work, executor))

    def of(self, spans: Sequence[Span], executor: object) -> list[Work]:
        """Return the unfinished calls on this memory that were submitted to another executor."""
        if not self.calls:
            return []
        with self._lock:
            return [
                work for others, work, other in self.calls
                if other is not executor and not work.done() and overlap(spans, others)
            ]  # fmt: skip

    def wait(self, spans: Sequence[Span], executor: object) -> None:
        """Block until the calls on this memory that other executors have under way end, each by its own deadline."""
        for work in self.of(spans, executor):
            work.exception()
