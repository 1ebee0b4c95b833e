"""Calls that block in C for as long as they like, and a caller that does not."""

from __future__ import annotations

import atexit
import signal
import sys
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

FINALIZE_S = 5
_stuck: list[BlockingCaller] = []
stuck_requests: list[tuple[Any, Any]] = []
"""Collectives that missed their deadline, each with the MPI module: MPI may still use their memory, so it must stay."""


class BlockingCaller:
    """A thread that makes one call at a time, on which another thread waits with a deadline.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``, to end the job at exit if a call never returned.
    """

    def __init__(self, mpi: Any) -> None:
        self.mpi = mpi
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._answers: SimpleQueue[Exception | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="detcoll MPI collectives", daemon=True)
        self._is_stuck = False
        self._thread.start()

    def call(self, function: Callable[[], Any], timeout_s: float) -> bool:
        """Call ``function`` and return True; False if it has not returned in time, and never call again then."""
        self._calls.put(function)
        try:
            error = self._answers.get(timeout=timeout_s)
        except Empty:
            self._is_stuck = True
            _stuck.append(self)
            return False
        if error is not None:
            raise error
        return True

    def stop(self) -> None:
        """End the thread, unless it is stuck."""
        self._calls.put(None)
        if not self._is_stuck:
            self._thread.join()

    @property
    def is_busy(self) -> bool:
        """Whether a call that was given up has still not returned."""
        return self._is_stuck and self._answers.empty()

    def _serve(self) -> None:
        while (function := self._calls.get()) is not None:
            try:
                function()
            except Exception as error:
                self._answers.put(error)
            else:
                self._answers.put(None)


@atexit.register
def _end_job_if_stuck() -> None:
    """Leave at once where a thread is still inside MPI: to finalize MPI then would crash or never end.

    After a collective that never ended MPI may still finalize, unless a rank is frozen; so it gets some time.
    """
    busy = [caller for caller in _stuck if caller.is_busy]
    if any(not mpi.Is_finalized() and not request.Test() for mpi, request in stuck_requests):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(FINALIZE_S)
    if busy:
        print("detcoll: a collective is stuck in MPI, so the whole MPI job is ended", file=sys.stderr, flush=True)
        busy[0].mpi.COMM_WORLD.Abort(1)
