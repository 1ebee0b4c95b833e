"""When to ask a peer for its time, and what to make of the answer. Carries no message itself."""

from __future__ import annotations

import struct

from detcoll.clock.filter import ClockFilter, Exchange, SyncState, Verdict
from detcoll.errors import FrameError, UsageError

_RECORD = struct.Struct("<4sIqqq")
_PING = b"dcP1"
_PONG = b"dcA1"
_DOUBTFUL_PONG = b"dcA0"
RECORD_BYTES = _RECORD.size
"""Size of a ping and of a pong: a kind, a number, and three times (t0, t1, t2) in nanoseconds."""


def answer_ping(ping: bytes, received_ns: int, sent_ns: int, is_sure: bool = True) -> bytes:
    """Return the pong for ``ping``, which arrived at ``received_ns`` and is answered at ``sent_ns`` of this clock.

    ``is_sure`` False tells the peer that windows by this clock should not be trusted now.

    Raises
    ------
    FrameError
        If it is no ping.
    """
    number, t0_ns, _, _ = _unpacked(ping, (_PING,), "ping")
    return _RECORD.pack(_PONG if is_sure else _DOUBTFUL_PONG, number, t0_ns, received_ns, sent_ns)


def _unpacked(record: bytes, kinds: tuple[bytes, ...], name: str) -> tuple[int, int, int, int]:
    if len(record) != RECORD_BYTES or bytes(record[:4]) not in kinds:
        raise FrameError(f"{len(record)} bytes that start {bytes(record[:4])!r} are no {name} of {RECORD_BYTES} bytes")
    _, number, t0_ns, t1_ns, t2_ns = _RECORD.unpack(record)
    return number, t0_ns, t1_ns, t2_ns


class Synchroniser:
    """Decides when to ask one peer for its time, and feeds a filter with the answers. Does no I/O.

    Asks in a burst at the start and after a step, then at an interval. It never waits for an answer: what is lost is
    lost. Where both clocks are the very same there is nothing to ask, and offset and bound are exactly 0.

    Parameters
    ----------
    clock_filter : ClockFilter
        What the answers go to.
    same_clock : bool
        Whether the peer has the same `clock_domain`.
    burst : int
        How many exchanges are made at the start and after a step.
    spacing_ns, interval_ns : int
        Time between exchanges in a burst, and after it.
    """

    def __init__(
        self,
        clock_filter: ClockFilter | None = None,
        *,
        same_clock: bool = False,
        burst: int = 8,
        spacing_ns: int = 2 * 10**6,
        interval_ns: int = 10**9,
    ) -> None:
        if burst < 1 or spacing_ns < 1 or interval_ns < 1:
            raise UsageError(f"burst={burst}, spacing_ns={spacing_ns}, interval_ns={interval_ns} must be at least 1")
        self.filter = ClockFilter() if clock_filter is None else clock_filter
        self._same_clock = same_clock
        self._burst = burst
        self._spacing_ns = spacing_ns
        self._interval_ns = interval_ns
        self._number = 0
        self._pending: dict[int, int] = {}
        self._left = burst
        self._next_ns: int | None = None
        self.peer_is_sure = True
        """Whether the peer trusts its time itself, by its last answer."""

    @property
    def state(self) -> SyncState:
        """How much is known of the peer's clock."""
        return SyncState.SYNCHRONISED if self._same_clock else self.filter.state

    def offset_ns(self, now_ns: int) -> int:
        """Return the peer's time minus local time; see `ClockFilter.offset_ns`."""
        return 0 if self._same_clock else self.filter.offset_ns(now_ns)

    def bound_ns(self, now_ns: int) -> int:
        """Return how far `offset_ns` can be wrong; see `ClockFilter.bound_ns`."""
        return 0 if self._same_clock else self.filter.bound_ns(now_ns)

    def restart(self) -> None:
        """Forget the peer's clock and ask anew at once, as after a suspend; answers under way no longer count."""
        self.filter.forget()
        self._ask_anew(self._burst)

    def next_ns(self, now_ns: int) -> int | None:
        """Return when the next ping is due, at the earliest ``now_ns``; None if none ever is."""
        if self._same_clock:
            return None
        return now_ns if self._next_ns is None else max(now_ns, self._next_ns)

    def due(self, now_ns: int) -> bool:
        """Tell whether a ping should be sent now."""
        return self.next_ns(now_ns) == now_ns

    def make_ping(self, now_ns: int) -> bytes:
        """Return a ping that is sent at ``now_ns``, and schedule the next."""
        self._number = (self._number + 1) % 2**32
        self._pending[self._number] = now_ns
        while len(self._pending) > 2 * self._burst:  # what was lost must not pile up
            del self._pending[next(iter(self._pending))]
        self._left = max(self._left - 1, 0)
        self._next_ns = now_ns + (self._spacing_ns if self._left else self._interval_ns)
        return _RECORD.pack(_PING, self._number, now_ns, 0, 0)

    def handle_pong(self, pong: bytes, now_ns: int) -> Verdict:
        """Take the answer that arrived at ``now_ns`` into account; one that nobody waits for is REFUSED.

        Raises
        ------
        FrameError
            If it is no pong.
        """
        number, t0_ns, t1_ns, t2_ns = _unpacked(pong, (_PONG, _DOUBTFUL_PONG), "pong")
        if self._pending.get(number) != t0_ns:
            return Verdict.REFUSED
        del self._pending[number]
        self.peer_is_sure = bytes(pong[:4]) == _PONG
        verdict = self.filter.add(Exchange(t0_ns, t1_ns, t2_ns, now_ns))
        if verdict is Verdict.STEP:
            self._ask_anew(self._burst - 1)
        return verdict

    def _ask_anew(self, count: int) -> None:
        """Plan ``count`` pings from now on, and let those under way count no more: the clock may have stepped since."""
        self._pending.clear()
        self._left = count
        self._next_ns = None
