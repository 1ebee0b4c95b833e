"""Keeps the clock of this rank's site: windows mean the same time on all ranks that share an uplink.

The lowest rank of a site is its leader, and the leader's monotonic clock is the site's. Ranks whose clock is the very
same (one kernel, one time namespace) have nothing to do. The others ask the leader in small messages, a burst at the
start and one a second later on, and a `detcoll.clock.Synchroniser` makes an offset and a bound of the answers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from detcoll.clock import RECORD_BYTES, SuspendDetector, Synchroniser, SyncState, answer_ping
from detcoll.transport import LARGEST_TAG, Endpoint, Ticket, TicketStatus

log = logging.getLogger("detcoll")

PING_TAG, PONG_TAG = LARGEST_TAG, LARGEST_TAG - 1
_LOOK_NS = 1_000_000_000


class Timekeeper:
    """Offset of the site's clock to this rank's, kept up to date; driven by the progress thread.

    Parameters
    ----------
    rank, leader : int
        This rank, and the one whose clock is the site's.
    domains : Sequence of str
        The clock domain of every rank of the job.
    site : Sequence of int
        The ranks of this site.
    endpoint_of : Mapping
        Where messages to a rank go.
    """

    def __init__(
        self, rank: int, site: Sequence[int], domains: Sequence[str], endpoint_of: Mapping[int, Endpoint]
    ) -> None:
        self._leader = site[0]
        self._endpoint_of = endpoint_of
        self._followers = [r for r in site if domains[r] != domains[self._leader]] if rank == self._leader else []
        self._synchroniser = Synchroniser(same_clock=domains[rank] == domains[self._leader])
        self._follows = domains[rank] != domains[self._leader]
        self._suspends = SuspendDetector()
        self._look_ns = 0
        self._kept: list[bytes] = []

    @property
    def synchronised(self) -> bool:
        """Whether the offset may be trusted."""
        return self._synchroniser.state is SyncState.SYNCHRONISED

    def offset_ns(self, now_ns: int) -> int:
        """Return what to add to local time for the site's time; 0 until it is known."""
        return self._synchroniser.offset_ns(now_ns) if self._known else 0

    def bound_ns(self, now_ns: int) -> int:
        """Return how far the offset may be off."""
        return self._synchroniser.bound_ns(now_ns) if self._known else 0

    def start(self) -> None:
        """Be ready to answer."""
        for follower in self._followers:
            self._listen(follower, PING_TAG, self._asked)

    def turn(self, now_ns: int) -> None:
        """Ask when it is time to."""
        if not self._follows:
            return
        if now_ns >= self._look_ns:
            self._look_ns = now_ns + _LOOK_NS
            boottime_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            if self._suspends.update(now_ns, boottime_ns, time.monotonic_ns()):
                log.warning("this host was suspended; asking rank %d for its time anew", self._leader)
                self._synchroniser.restart()
        if self._synchroniser.due(now_ns):
            self._listen(self._leader, PONG_TAG, self._answered)
            self._send(self._leader, PING_TAG, self._synchroniser.make_ping(time.monotonic_ns()))

    def next_ns(self, now_ns: int) -> int | None:
        """Return when `turn` has something to do, or None if never."""
        return self._synchroniser.next_ns(now_ns)

    @property
    def _known(self) -> bool:
        return self._follows and self._synchroniser.state is not SyncState.EMPTY

    def _listen(self, peer: int, tag: int, then: Callable[[Ticket, int], None]) -> None:
        ticket = self._endpoint_of[peer].recv(peer, tag, RECORD_BYTES)
        ticket.context = partial(self._take, then=then)

    def _take(self, ticket: Ticket, then: Callable[[Ticket, int], None]) -> None:
        now_ns = ticket.ended_ns or time.monotonic_ns()
        if ticket.status is TicketStatus.DONE:
            then(ticket, now_ns)
        ticket.release()

    def _asked(self, ticket: Ticket, now_ns: int) -> None:
        self._listen(ticket.peer, PING_TAG, self._asked)
        pong = answer_ping(bytes(ticket.view or b""), now_ns, time.monotonic_ns())
        self._send(ticket.peer, PONG_TAG, pong)

    def _answered(self, ticket: Ticket, now_ns: int) -> None:
        self._synchroniser.handle_pong(bytes(ticket.view or b""), now_ns)

    def _send(self, peer: int, tag: int, record: bytes) -> None:
        """Send a record, which the endpoint borrows until the ticket ends."""
        ticket = self._endpoint_of[peer].send(peer, tag, memoryview(record))
        self._kept.append(record)
        ticket.context = self._sent

    def _sent(self, ticket: Ticket) -> None:
        if self._kept:
            self._kept.pop(0)
