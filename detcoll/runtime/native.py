"""Runs a transport's own collectives, in order of call.

A call that nobody is ahead of runs on the caller's thread, which saves two thread switches. Asynchronous calls go to a
worker thread, and calls after them queue behind.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from detcoll.errors import Closed, DeadlineMissed, DetcollError, TransportError
from detcoll.runtime.work import Work
from detcoll.trace import CollectiveRecord, Trace
from detcoll.transport import NativeCollectives
from detcoll.types import ReduceOp

LARGEST_QUEUE = 4096


@dataclass(frozen=True, slots=True)
class NativeCall:
    """One collective for the transport itself."""

    sequence: int
    kind: str
    array: NDArray[Any]
    op: ReduceOp
    root: int
    deadline_ns: int
    called_ns: int


class NativeRunner:
    """Owns an endpoint with native collectives."""

    def __init__(self, collectives: NativeCollectives, trace: Trace, on_failure: Callable[[Exception], None]) -> None:
        self._collectives, self._trace, self._on_failure = collectives, trace, on_failure
        self._turn = threading.Lock()
        self._queue: queue.Queue[tuple[NativeCall, Work] | None] = queue.Queue(LARGEST_QUEUE)
        self._queued = 0
        self._count = threading.Lock()
        self._failure: Exception | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="detcoll-native", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> Exception | None:
        """What ended this communicator, or None."""
        return self._failure

    def run(self, call: NativeCall, work: Work, *, wait: bool) -> None:
        """Run ``call``, at once if the caller will wait for it and nothing is ahead."""
        if self._failure is not None or self._closing:
            reason = f": {self._failure}" if self._failure is not None else ""
            raise Closed(f"the communicator is closed{reason}") from self._failure
        if wait and not self._queued and self._turn.acquire(blocking=False):
            try:
                if not self._queued:
                    self._do(call, work)
                    return
            finally:
                self._turn.release()
        with self._count:
            self._queued += 1
        try:
            self._queue.put((call, work), timeout=max(call.deadline_ns - time.monotonic_ns(), 0) / 1e9)
        except queue.Full:
            with self._count:
                self._queued -= 1
            raise DeadlineMissed(f"{call.kind}: {LARGEST_QUEUE} collectives before it are not finished") from None

    def fail(self, error: Exception) -> None:
        """Refuse further calls because of ``error``."""
        self._failure = self._failure or error

    @property
    def was_told(self) -> bool:
        """Whether a caller was shown the failure: its collective was, or one queued behind it."""
        return True

    def drain(self, deadline_ns: int) -> bool:
        """Finish what is queued, or give up at the deadline and return False."""
        self.close()
        self._thread.join(max(deadline_ns - time.monotonic_ns(), 0) / 1e9)
        if self._thread.is_alive():
            self.fail(DeadlineMissed("closing: native collectives were still under way at the deadline"))
            return False
        return True

    def close(self) -> None:
        """Take no more calls. Where the thread is inside the transport, only that can end it."""
        if not self._closing:
            self._closing = True
            with contextlib.suppress(queue.Full):  # the thread then looks at `_closing` when it has emptied the queue
                self._queue.put_nowait(None)

    def _serve(self) -> None:
        while not (self._closing and self._queue.empty()) and (entry := self._queue.get()) is not None:
            with self._turn:
                self._do(*entry)
            with self._count:
                self._queued -= 1

    def _do(self, call: NativeCall, work: Work) -> None:
        if self._failure is not None:
            work.finish(self._failure)
            return
        error: Exception | None = None
        try:
            self._dispatch(call)
        except DetcollError as problem:
            error = problem
        except Exception as problem:
            error = TransportError(f"{call.kind} number {call.sequence} failed: {problem!r}")
            error.__cause__ = problem
        if error is not None:
            self._failure = error
            self._on_failure(error)
        else:
            self._trace.collectives.append(
                CollectiveRecord(
                    call.sequence, call.kind, call.array.nbytes, self._collectives.algorithm, call.called_ns,
                    time.monotonic_ns(), 0,
                )
            )  # fmt: skip
        work.finish(error)

    def _dispatch(self, call: NativeCall) -> None:
        if call.kind == "all_reduce":
            self._collectives.all_reduce(call.array, call.op, call.deadline_ns)
        elif call.kind == "broadcast":
            self._collectives.broadcast(call.array, call.root, call.deadline_ns)
        else:
            self._collectives.barrier(call.deadline_ns)
