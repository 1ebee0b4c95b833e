"""Keeps MPI going while nobody calls it.

MPI moves data only inside its calls. When all tickets of a rank have ended, a confirmation that its peer waits for may
still lie in a queue of the library, and if the rank then computes, or has closed its endpoint, the peer waits in vain:
with MPICH 5, three ranks that exchanged 200 messages each on two busy cores did so in one run of eight, and never in
141 runs with this thread. It looks into MPI every 2 ms after a call of ours, and ever less often, down to 16 times a
second, while there are none. It stays a second after the last endpoint was closed.
"""

from __future__ import annotations

import atexit
import threading
from typing import Any

SHORTEST_S = 0.002
LONGEST_S = 0.064
LINGER_S = 1.0


class Progress:
    """One thread for all endpoints of the process."""

    def __init__(self) -> None:
        self.is_active = False
        """Set by endpoints at each call."""
        self._lock = threading.Lock()
        self._open = 0
        self._wakeup = threading.Event()
        self._thread: threading.Thread | None = None

    def enter(self, mpi: Any) -> None:
        """Take note of an endpoint that opens."""
        with self._lock:
            self._open += 1
            if self._thread is None:
                self._wakeup.clear()
                self._thread = threading.Thread(target=self._run, args=(mpi,), name="detcoll MPI progress", daemon=True)
                self._thread.start()

    def leave(self) -> None:
        """Take note of an endpoint that closes."""
        self.is_active = True
        with self._lock:
            self._open -= 1

    def stop(self) -> None:
        """End the thread."""
        with self._lock:
            thread, self._thread = self._thread, None
        self._wakeup.set()
        if thread is not None:
            thread.join()

    def _run(self, mpi: Any) -> None:
        interval_s, idle_s = SHORTEST_S, 0.0
        while not self._wakeup.wait(interval_s):
            idle_s = 0.0 if self.is_active else idle_s + interval_s
            interval_s = SHORTEST_S if self.is_active else min(2 * interval_s, LONGEST_S)
            self.is_active = False
            if mpi.Is_finalized():
                return
            mpi.COMM_WORLD.Iprobe(mpi.ANY_SOURCE, mpi.ANY_TAG)
            with self._lock:
                if self._open == 0 and idle_s > LINGER_S:
                    self._thread = None
                    return


progress = Progress()
atexit.register(progress.stop)
