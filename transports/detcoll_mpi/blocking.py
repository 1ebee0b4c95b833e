"""Calls that block in C for as long as they like, and a caller that does not."""

from __future__ import annotations

import atexit
import signal
import sys
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from detcoll.errors import Closed

FINALIZE_S = 5
LOOK_S = 0.02
_callers: list[BlockingCaller] = []
"""Those that were not stopped, or not while a call was under way."""

stuck_requests: list[tuple[Any, Any, Any]] = []
"""What collectives that did not end well have left: the MPI module, a request, and the memory that MPI may still use
for it, which must stay."""


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
        self._asked = self._returned = 0
        self._thread = threading.Thread(target=self._serve, name="detcoll MPI collectives", daemon=True)
        _callers.append(self)
        self._thread.start()

    def call(self, function: Callable[[], Any], timeout_s: float, look: Callable[[], None] = lambda: None) -> bool:
        """Call ``function`` and return True; False if it has not returned in time.

        ``look`` is called now and then meanwhile, and raises where the wait is over. After anything but True never call
        again: the answer may still come.

        Raises
        ------
        Exception
            What ``function`` or ``look`` raised, or Closed if `stop` was called meanwhile.
        """
        self._asked += 1
        self._calls.put(function)
        ends_s = time.monotonic() + timeout_s
        while (left_s := ends_s - time.monotonic()) > 0:
            try:
                error = self._answers.get(timeout=min(left_s, LOOK_S))
            except Empty:
                look()
                continue
            if error is not None:
                raise error
            return True
        return False

    def stop(self) -> None:
        """End the thread, or give up the call that it is in; who waits for that call is told."""
        self._calls.put(None)
        if self.is_busy:
            self._answers.put(Closed("the MPI endpoint was closed while a collective was under way"))
        else:
            self._thread.join()
            _callers.remove(self)

    @property
    def is_busy(self) -> bool:
        """Whether a call has not returned."""
        return self._asked != self._returned

    def _serve(self) -> None:
        while (function := self._calls.get()) is not None:
            answer: Exception | None = None
            try:
                function()
            except Exception as error:
                answer = error
            self._returned += 1
            self._answers.put(answer)


@atexit.register
def _end_job_if_stuck() -> None:
    """Leave at once where a thread is still inside MPI: to finalize MPI then would crash or never end.

    After a collective that never ended MPI may still finalize, unless a rank is frozen; so it gets some time.
    """
    busy = [caller for caller in _callers if caller.is_busy]
    if any(not mpi.Is_finalized() and not request.Test() for mpi, request, _ in stuck_requests):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(FINALIZE_S)
        print(
            "detcoll: a collective never ended in MPI, which may not be able to finalize now; unless it does in "
            f"{FINALIZE_S} s, SIGALRM (alarm clock) ends this process",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    if busy:
        print("detcoll: a collective is stuck in MPI, so the whole MPI job is ended", file=sys.stderr, flush=True)
        busy[0].mpi.COMM_WORLD.Abort(1)
