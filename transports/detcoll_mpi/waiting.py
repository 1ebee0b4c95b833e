"""How to wait for MPI, which has nothing to wait on."""

from __future__ import annotations

import time

from detcoll.transport import Clock

SPIN_NS = 100_000
"""An answer within this is found at once; the time of one message on one host is a few microseconds."""

SHORTEST_SLEEP_NS, LONGEST_SLEEP_NS = 1000, 200_000


class Backoff:
    """Waits a little longer each time: spins at first, then sleeps, never past the deadline."""

    __slots__ = ("_clock", "_deadline_ns", "_sleep_ns", "_spin_until_ns")

    def __init__(self, clock: Clock, deadline_ns: int) -> None:
        self._clock = clock
        self._deadline_ns = deadline_ns
        self._spin_until_ns: int | None = None
        self._sleep_ns = SHORTEST_SLEEP_NS

    @property
    def is_long(self) -> bool:
        """Whether the wait is past its spinning."""
        return self._sleep_ns > SHORTEST_SLEEP_NS

    def pause(self) -> bool:
        """Wait; False if the deadline has passed."""
        now_ns = self._clock.now_ns()
        if now_ns >= self._deadline_ns:
            return False
        if self._spin_until_ns is None:
            self._spin_until_ns = now_ns + SPIN_NS
        if now_ns >= self._spin_until_ns:
            time.sleep(min(self._sleep_ns, self._deadline_ns - now_ns) / 1e9)
            self._sleep_ns = min(2 * self._sleep_ns, LONGEST_SLEEP_NS)
        return True
