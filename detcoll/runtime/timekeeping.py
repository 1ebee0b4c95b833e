"""Keeps the clock of this rank's site: windows mean the same time on all ranks that share an uplink, or a downlink.

The lowest rank of a site is its leader, and the leader's monotonic clock is the site's. Ranks whose clock is the very
same (one kernel, one time namespace) have nothing to do. The others ask the leader in small messages, a burst at the
start and one a second later on, and a `detcoll.clock.Synchroniser` makes an offset and a bound of the answers.

Windows that lead from several sites to one need more where sites do not share a clock (`Aligning`): leaders ask the
leader of the first site in the same way, four times a second, which gives the job's time up to what a path is unequal
there and back. To that an `ArrivalLoop` adds a correction, until what leaves by it arrives where receivers want it; its
marks go between all leaders. A site's time is then no rank's clock, so all others of a site ask their leader. It
answers while it knows the time, and tells whether windows by it can be trusted; who hears nothing for `SILENCE_NS`
trusts its own no longer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from detcoll.clock import (
    MARK_BYTES,
    RECORD_BYTES,
    ArrivalLoop,
    MonotonicClock,
    SuspendDetector,
    Synchroniser,
    SyncState,
    Verdict,
    answer_ping,
)
from detcoll.topology import Topology
from detcoll.transport import Clock, Endpoint, Ticket, TicketStatus

log = logging.getLogger("detcoll")

PING_TAG, PONG_TAG, MARK_TAG = 2**31 - 1, 2**31 - 2, 2**31 - 3
SILENCE_NS = 1_500_000_000
_LOOK_NS = 100_000_000
_ALIGNING_INTERVAL_NS = 250_000_000
"""Two crystals 100 ppm apart move 25 us between two asks, before the skew is known."""


@dataclass(frozen=True, slots=True)
class Aligning:
    """Sites align arrivals: their ``leaders`` in order of sites, this rank's ``site``, and its loop if it leads."""

    leaders: tuple[int, ...]
    site: int
    loop: ArrivalLoop | None

    @classmethod
    def of(cls, topology: Topology, rank: int) -> Aligning:
        """Return the part of ``rank``."""
        leaders, here = tuple(site.ranks[0] for site in topology.sites), topology.site_of(rank)
        delays_ns = {site: topology.one_way_ns(site, here) for site in range(len(leaders)) if site != here}
        return cls(leaders, here, ArrivalLoop(delays_ns) if rank == leaders[here] else None)


class Timekeeper:
    """Offset of the site's clock to this rank's, kept up to date; driven by the progress thread.

    It has many fields because a rank can ask, answer and lead at once, and each of these has its own state.

    Parameters
    ----------
    rank : int
        This rank.
    site : Sequence of int
        The ranks of this site; the first leads.
    domains : Sequence of str
        The clock domain of every rank of the job.
    endpoint_of : Mapping
        Where messages to a rank go.
    aligning : Aligning, optional
        Where arrivals of sites without a common clock are aligned.
    clock : Clock, optional
        The one that windows and endpoints of this rank go by, if it is not the monotonic one.
    boottime : callable, optional
        Reads a clock that goes on while this host is suspended, if it is not the system's.
    """

    def __init__(
        self, rank: int, site: Sequence[int], domains: Sequence[str], endpoint_of: Mapping[int, Endpoint],
        aligning: Aligning | None = None, clock: Clock | None = None, boottime: Callable[[], int] | None = None,
    ) -> None:  # fmt: skip
        self._endpoint_of, self._clock = endpoint_of, clock or MonotonicClock()
        self._boottime = boottime or _boottime_ns
        self._aligning, self._loop = aligning, aligning.loop if aligning else None
        self._followers = [
            r for r in site[1:] if rank == site[0] and (aligning is not None or domains[r] != domains[rank])
        ]
        self._source = site[0] if rank != site[0] else aligning.leaders[0] if aligning else rank
        self._follows = self._source != rank and (aligning is not None or domains[rank] != domains[self._source])
        self.asks = self._follows or self._loop is not None
        """Whether this rank asks others for the time. If not, it leads its site, or reads the clock of who does."""
        self._others = [leader for leader in aligning.leaders if leader != rank] if aligning and self._loop else []
        interval_ns = _ALIGNING_INTERVAL_NS if aligning else 10**9
        self._synchroniser = Synchroniser(same_clock=not self._follows, interval_ns=interval_ns)
        self._suspends = SuspendDetector()
        self._look_ns = self._heard_ns = 0
        self._kept: list[bytes] = []
        self._is_started = False

    @property
    def synchronised(self) -> bool:
        """Whether the site's time is known."""
        is_known = self._synchroniser.state is SyncState.SYNCHRONISED
        return is_known and (self._loop is None or self._loop.settled)

    @property
    def trusted(self) -> bool:
        """Whether windows may be kept by it."""
        if not self.synchronised or self._aligning is None:
            return self.synchronised
        if self._loop is not None:
            return self._loop.holds
        return self._synchroniser.peer_is_sure and self._clock.now_ns() - self._heard_ns <= SILENCE_NS

    def offset_ns(self, now_ns: int) -> int:
        """Return what to add to local time for the site's time; 0 until it is known."""
        return self._job_offset_ns(now_ns) + (self._loop.correction_ns if self._loop else 0)

    def bound_ns(self, now_ns: int) -> int:
        """Return how far the offset to whom this rank asks may be off."""
        return self._synchroniser.bound_ns(now_ns) if self._known else 0

    @property
    def arrivals_ns(self) -> int | None:
        """How far apart arrivals are that should meet exactly, at the worst receiver; None where not known."""
        return self._loop.error_ns if self._loop else None

    @property
    def aligned(self) -> bool:
        """Whether this site's loop needs no other site any more, nor they this one, to know what it comes to."""
        return self._loop is None or self._loop.all_settled

    def start(self) -> None:
        """Be ready to answer ranks of this site; who aligned arrivals asks anew, since clocks have drifted."""
        self._is_started = True
        for follower in self._followers:
            self._listen(follower, PING_TAG, self._asked)
        if self._loop is None:
            self._start_asking()
        else:
            self._start_anew()

    def start_aligning(self) -> None:
        """Be ready to answer leaders of other sites, and to align arrivals with them; before `start`."""
        if self._aligning is None or self._loop is None:
            return
        self._start_asking()
        for leader in self._others:
            self._listen(leader, MARK_TAG, self._marked)
            if not self._follows:
                self._listen(leader, PING_TAG, self._asked_by_site)

    def _start_asking(self) -> None:
        if self._follows:
            self._listen(self._source, PONG_TAG, self._answered)

    def turn(self, now_ns: int) -> None:
        """Ask, and tell, when it is time to."""
        if not self.asks:
            return
        if now_ns >= self._look_ns:
            self._look_ns = now_ns + _LOOK_NS
            if self._suspends.update(now_ns, self._boottime(), self._clock.now_ns()):
                log.warning("this host was suspended; asking rank %d for its time anew", self._source)
                self._start_anew()
        if self._synchroniser.due(now_ns):
            self._send(self._source, PING_TAG, self._synchroniser.make_ping(self._clock.now_ns()))
        if self._aligns and self._loop is not None and self._loop.turn(now_ns):
            for leader in self._others:
                departs_ns = self._clock.now_ns()
                mark = self._loop.make_mark(self._site_of(leader), departs_ns + self._job_offset_ns(departs_ns))
                self._send(leader, MARK_TAG, mark)

    def next_ns(self, now_ns: int) -> int | None:
        """Return when `turn` has something to do, or None if never."""
        times = [self._synchroniser.next_ns(now_ns)]
        if self._aligns and self._loop is not None:
            times.append(self._loop.next_ns(now_ns))
        return min((at_ns for at_ns in times if at_ns is not None), default=None)

    @property
    def _known(self) -> bool:
        return self._follows and self._synchroniser.state is not SyncState.EMPTY

    @property
    def _aligns(self) -> bool:
        """Whether this rank knows the job's time well enough to say when something arrives."""
        return self._loop is not None and self._synchroniser.state is SyncState.SYNCHRONISED

    def _job_offset_ns(self, now_ns: int) -> int:
        return self._synchroniser.offset_ns(now_ns) if self._known else 0

    def _site_of(self, leader: int) -> int:
        assert self._aligning is not None
        return self._aligning.leaders.index(leader)

    def _start_anew(self) -> None:
        self._synchroniser.restart()
        if self._loop is not None:
            self._loop.restart()

    def _listen(self, peer: int, tag: int, then: Callable[[Ticket, int], None]) -> None:
        ticket = self._endpoint_of[peer].recv(peer, tag, MARK_BYTES if tag == MARK_TAG else RECORD_BYTES)
        ticket.context = partial(self._take, then=then)

    def _take(self, ticket: Ticket, then: Callable[[Ticket, int], None]) -> None:
        now_ns = ticket.ended_ns or self._clock.now_ns()
        if ticket.status is TicketStatus.DONE:
            self._listen(ticket.peer, ticket.tag, then)
            then(ticket, now_ns)
        ticket.release()

    def _asked(self, ticket: Ticket, now_ns: int) -> None:
        """Answer a rank of this site in the site's time."""
        if self.synchronised:
            self._answer(ticket, now_ns, self.offset_ns(now_ns))

    def _asked_by_site(self, ticket: Ticket, now_ns: int) -> None:
        """Answer another site in the job's time, which is this rank's clock."""
        self._answer(ticket, now_ns, 0)

    def _answer(self, ticket: Ticket, now_ns: int, offset_ns: int) -> None:
        sent_ns, is_sure = self._clock.now_ns() + offset_ns, self._aligning is None or self.trusted
        pong = answer_ping(bytes(ticket.view or b""), now_ns + offset_ns, sent_ns, is_sure)
        self._send(ticket.peer, PONG_TAG, pong)

    def _answered(self, ticket: Ticket, now_ns: int) -> None:
        self._heard_ns = now_ns
        if self._synchroniser.handle_pong(bytes(ticket.view or b""), now_ns) is Verdict.STEP:
            log.warning("the clock of rank %d, or of this one, has stepped; asking for its time anew", self._source)
            if self._loop is not None:
                self._loop.restart()

    def _marked(self, ticket: Ticket, now_ns: int) -> None:
        if not self._aligns or self._loop is None:
            return
        arrives_ns = now_ns + self._job_offset_ns(now_ns)
        has_stepped = self._loop.handle_mark(self._site_of(ticket.peer), bytes(ticket.view or b""), arrives_ns)
        if has_stepped and self._is_started:  # before, others may be through and not answer any more
            log.info("what rank %d sends arrives at another time than before; finding out the time", ticket.peer)
            self._start_anew()

    def _send(self, peer: int, tag: int, record: bytes) -> None:
        """Send a record, which the endpoint borrows until the ticket ends."""
        ticket = self._endpoint_of[peer].send(peer, tag, memoryview(record))
        self._kept.append(record)
        ticket.context = self._sent

    def _sent(self, ticket: Ticket) -> None:
        if self._kept:
            self._kept.pop(0)


def _boottime_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def align_arrivals(timekeeper: Timekeeper, endpoints: Sequence[Endpoint], deadline_ns: int, clock: Clock) -> None:
    """Drive a leader's timekeeper until arrivals are aligned as well as they can be, or the deadline passes.

    All leaders do so at once, before anything else uses their endpoints.

    Raises
    ------
    DetcollError
        If an endpoint fails.
    """
    timekeeper.start_aligning()
    while not timekeeper.aligned and (now_ns := clock.now_ns()) < deadline_ns:
        timekeeper.turn(now_ns)
        wake_ns = min(deadline_ns, timekeeper.next_ns(now_ns) or deadline_ns)
        for endpoint in endpoints:
            for ticket in endpoint.poll(wake_ns if endpoint is endpoints[-1] else 0):
                if ticket.status is TicketStatus.FAILED and ticket.error is not None:
                    raise ticket.error
                if ticket.context is not None:
                    ticket.context(ticket)
