"""When sends leave: windows, credit and pace.

A send with a window that ends waits for it to open, and is handed over as far as it will have left by the end. All
others wait for nothing but credit. What is handed over is little ahead of what leaves, since nothing calls it back.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from detcoll.transport import Clock, Ticket, TicketStatus, Window
from detcoll_slotted.line import UNPACED, Line
from detcoll_slotted.outcomes import Outcomes
from detcoll_slotted.peer import Peer
from detcoll_slotted.post import LEAD_NS, Post
from detcoll_slotted.wire import FRAME_BYTES, Lane

_AHEAD_NS = 2_000_000
"""How much of a window may lie in ZeroMQ's and TCP's queues: enough to sleep through, too little to spill far."""
_SETTLE_NS = 300_000
_SHORTEST_WAIT_NS = 100_000

_Timed = tuple[int, int, Ticket, memoryview, Window]


@dataclass(slots=True)
class Uplink:
    """What this rank handed over last, and when it will have left."""

    last: Line | None = None
    handed_ns: int = 0
    drained_ns: int = 0

    def drained_at(self, now_ns: int, rate_bytes_per_s: float) -> int:
        """Return when everything handed over so far will have left, at this rate.

        The kernel says what it has not sent; what ZeroMQ's thread was given a moment ago it may not know yet.
        """
        if self.last is None:
            return now_ns
        known_ns = now_ns + int(self.last.unsent_bytes() / rate_bytes_per_s * 1e9)
        return max(known_ns, self.drained_ns) if now_ns - self.handed_ns < _SETTLE_NS else known_ns


class Departures:
    """Sends of one rank that have not left, and what decides when they do."""

    def __init__(self, peers: Mapping[int, Peer], post: Post, outcomes: Outcomes, clock: Clock) -> None:
        self.missed_sends = 0
        self._peers, self._post, self._outcomes, self._clock = peers, post, outcomes, clock
        self._timed: list[_Timed] = []
        self._order = itertools.count()
        self._uplink = Uplink()
        self._resume_ns = 0

    @property
    def has_timed(self) -> bool:
        """Whether a send waits for its window or is in it."""
        return bool(self._timed)

    def is_near(self, now_ns: int) -> bool:
        """Tell whether a window is open, or opens in a moment."""
        return bool(self._timed) and self._timed[0][0] <= now_ns + LEAD_NS

    def is_due(self, now_ns: int) -> bool:
        """Tell whether something may be handed over."""
        return self.is_near(now_ns) and self._resume_ns <= now_ns

    def next_ns(self, now_ns: int) -> int | None:
        """Return when something is to be handed over or given up even if nothing arrives; None for never."""
        if not self._timed:
            return None
        window = self._timed[0][4]
        opens_ns = window.not_before_ns - LEAD_NS
        return opens_ns if opens_ns > now_ns else self._resume_ns or window.not_after_ns

    def hold(self, ticket: Ticket, view: memoryview, window: Window) -> None:
        """Let a send wait for its window."""
        heapq.heappush(self._timed, (window.not_before_ns, next(self._order), ticket, view, window))

    def queue(self, peer: Peer, ticket: Ticket, view: memoryview, window: Window | None) -> None:
        """Send as soon as there is credit, behind what waits for it already."""
        peer.blocked.append((ticket, view, window))
        self.unblock(peer)

    def unblock(self, peer: Peer) -> None:
        """Send what a peer's credit has room for."""
        while peer.blocked and peer.outbound.has_credit(peer.blocked[0][0].nbytes):
            ticket, view, window = peer.blocked.popleft()
            peer.lines[Lane.BULK].pace(UNPACED if window is None else window.rate_bytes_per_s)
            self._post.put(peer, peer.outbound.lane_for(ticket.tag, Lane.BULK), ticket, view)
            if window is not None:
                ticket.left_ns = peer.lines[Lane.BULK].leaves_ns(ticket.started_ns, view.nbytes + FRAME_BYTES)

    def withdraw(self, wanted: Callable[[Ticket], bool]) -> list[Ticket]:
        """Take out sends that have not left, and return their tickets."""
        taken = [entry[2] for entry in self._timed if wanted(entry[2])]
        self._timed = [entry for entry in self._timed if not wanted(entry[2])]
        heapq.heapify(self._timed)
        for peer in self._peers.values():
            taken += [entry[0] for entry in peer.blocked if wanted(entry[0])]
            kept = [entry for entry in peer.blocked if not wanted(entry[0])]
            peer.blocked.clear()
            peer.blocked.extend(kept)
        return taken

    def begun_tags(self, rank: int) -> set[int]:
        """Return tags of sends to a peer that have left in part and go on by themselves."""
        return {entry[2].tag for entry in self._timed if entry[2].peer == rank and entry[2].sent_bytes}

    def turn(self, now_ns: int) -> None:
        """Send what is in its window now, as far as it will have left by the window's end."""
        self._resume_ns = 0
        while self._timed and self._timed[0][0] <= now_ns + LEAD_NS:
            opens_ns, order, ticket, view, window = self._timed[0]
            peer = self._peers[ticket.peer]
            if window.not_after_ns is None:
                heapq.heappop(self._timed)
                self.queue(peer, ticket, view, window)
                continue
            line = peer.lines[Lane.BULK]
            closes_ns = window.not_after_ns - LEAD_NS
            fitted = replace(window, not_after_ns=closes_ns)
            drained_ns = self._uplink.drained_at(now_ns, window.rate_bytes_per_s)
            part_bytes = fitted.fitting_bytes(view.nbytes, drained_ns, FRAME_BYTES)
            if not part_bytes and view.nbytes:
                heapq.heappop(self._timed)
                self.missed_sends += not ticket.sent_bytes
                self._outcomes.end(ticket, TicketStatus.MISSED)
                continue
            if drained_ns - now_ns > (_AHEAD_NS if line is self._uplink.last else 0):
                # Not yet: if the line is slower than said, what lies in the queues leaves after the window.
                self._resume_ns = max(drained_ns - _AHEAD_NS // 2, now_ns + _SHORTEST_WAIT_NS)
                return
            before_tail = replace(fitted, not_after_ns=closes_ns - _AHEAD_NS)
            part_bytes = before_tail.fitting_bytes(part_bytes, drained_ns, FRAME_BYTES) or part_bytes
            if not peer.outbound.has_credit(part_bytes):
                return
            drained_ns += fitted.takes_ns(part_bytes + FRAME_BYTES)
            self._uplink.last, self._uplink.handed_ns, self._uplink.drained_ns = line, now_ns, drained_ns
            line.pace(window.rate_bytes_per_s)
            self._post.put(peer, peer.outbound.lane_for(ticket.tag, Lane.BULK), ticket, view[:part_bytes])
            ticket.left_ns = drained_ns
            if part_bytes == view.nbytes:
                heapq.heappop(self._timed)
            else:
                ticket.sent_bytes += part_bytes
                self._timed[0] = (opens_ns, order, ticket, view[part_bytes:], window)
