"""When sends leave: windows, credit and pace.

A send with a window that ends waits for it to open, and is handed over as far as it will have left by the end. All
others wait for nothing but credit. What is handed over is little ahead of what leaves, since nothing calls it back.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

from detcoll.mailbox import Mailbox
from detcoll.transport import Clock, Ticket, TicketStatus, Window
from detcoll_slotted.gate import LARGEST_FRAME_BYTES
from detcoll_slotted.line import UNPACED
from detcoll_slotted.pacing import AHEAD_NS, SWITCH_AHEAD_NS, PaceGroup, Uplink
from detcoll_slotted.peer import Peer
from detcoll_slotted.post import LEAD_NS, Post
from detcoll_slotted.wire import FRAME_BYTES, Lane

_SHORTEST_WAIT_NS = 100_000

_Timed = tuple[int, int, Ticket, memoryview, Window]


class Departures:
    """Sends of one rank that have not left, and what decides when they do."""

    def __init__(self, peers: Mapping[int, Peer], post: Post, mail: Mailbox, clock: Clock) -> None:
        self.missed_sends = 0
        self._peers, self._post, self._mail, self._clock = peers, post, mail, clock
        self._timed: list[_Timed] = []
        self._stalled: list[_Timed] = []
        self._sharing: list[PaceGroup] = []
        self._order = itertools.count()
        self._uplink = Uplink()
        self._resume_ns = 0

    @property
    def has_timed(self) -> bool:
        """Whether a send waits for a time that is not far."""
        return bool(self._timed or self._stalled or self._sharing)

    def is_near(self, now_ns: int) -> bool:
        """Tell whether a window is open, or opens in a moment."""
        return bool(self._stalled or self._sharing or (self._timed and self._timed[0][0] <= now_ns + LEAD_NS))

    def is_due(self, now_ns: int) -> bool:
        """Tell whether something may be handed over."""
        if any(group.resume_ns and group.resume_ns <= now_ns for group in self._sharing):
            return True
        return self._resume_ns <= now_ns and bool(self._timed) and self._timed[0][0] <= now_ns + LEAD_NS

    def next_ns(self, now_ns: int) -> int | None:
        """Return when something is to be handed over or given up even if nothing arrives; None for never."""
        if not self.has_timed:
            return None
        times = [entry[4].not_after_ns for entry in self._stalled if entry[4].not_after_ns]
        times += [group.resume_ns for group in self._sharing if group.resume_ns]
        if self._timed:
            window = self._timed[0][4]
            opens_ns = window.not_before_ns - LEAD_NS
            times.append(opens_ns if opens_ns > now_ns else self._resume_ns or window.not_after_ns or now_ns)
        return min(times, default=None)

    def hold(self, ticket: Ticket, view: memoryview, window: Window) -> None:
        """Let a send wait for its window."""
        heapq.heappush(self._timed, (window.not_before_ns, next(self._order), ticket, view, window))

    def queue(self, peer: Peer, ticket: Ticket, view: memoryview, window: Window | None) -> None:
        """Send as soon as there is credit, behind what waits for it already."""
        peer.blocked.append((ticket, view, window))
        self.unblock(peer)

    def unblock(self, peer: Peer) -> None:
        """Send what a peer's credit has room for, as far as it need not wait for others of its pace."""
        while peer.blocked and peer.outbound.has_credit(peer.next_bytes):
            window = peer.blocked[0][2]
            if window is not None and peer.group is not None:
                peer.group.join_queue(peer)
                self._share(peer.group, self._clock.now_ns())
                return
            peer.lines[Lane.BULK].pace(UNPACED if window is None else window.rate_bytes_per_s)
            ticket, nbytes, handed_ns = self._put_next(peer)
            if window is not None:
                ticket.left_ns = peer.lines[Lane.BULK].leaves_ns(handed_ns + LEAD_NS, nbytes + FRAME_BYTES)

    def _put_next(self, peer: Peer) -> tuple[Ticket, int, int]:
        """Hand over the next message that waits for nothing but credit, or the next part of a large one.

        Returns its ticket, the bytes handed over, and when.
        """
        ticket, view, window = peer.blocked[0]
        nbytes = peer.next_bytes
        if nbytes == view.nbytes:
            peer.blocked.popleft()
        else:
            peer.blocked[0] = ticket, view[nbytes:], window
            view = view[:nbytes]
        handed_ns = self._post.put(peer, peer.outbound.lane_for(ticket.tag, Lane.BULK), ticket, view)
        if peer.blocked and peer.blocked[0][0] is ticket:
            ticket.sent_bytes += nbytes
        return ticket, nbytes, handed_ns

    def _share(self, group: PaceGroup, now_ns: int) -> None:
        """Hand over messages of peers that share a pace, in turn, one connection at a time."""
        group.resume_ns = 0
        while (peer := group.first_ready()) is not None:
            window = peer.blocked[0][2]
            if window is None:  # it shares nothing
                group.go_on(peer, has_more=False)
                self.unblock(peer)
                continue
            line = peer.lines[Lane.BULK]
            free_ns = group.free_ns(now_ns, window.rate_bytes_per_s)
            ahead_ns = group.ahead_ns(line)
            if free_ns - now_ns > ahead_ns:
                resume_ns = free_ns - (ahead_ns if ahead_ns == SWITCH_AHEAD_NS else ahead_ns // 2)
                group.resume_ns = max(resume_ns, now_ns + _SHORTEST_WAIT_NS)
                break
            line.pace(window.rate_bytes_per_s)
            ticket, nbytes, handed_ns = self._put_next(peer)
            begins_ns = max(free_ns, handed_ns + LEAD_NS)
            group.hand(line, handed_ns, begins_ns + int(window.takes_ns(nbytes + FRAME_BYTES) / line.share))
            ticket.left_ns = group.drained_ns
            group.go_on(peer, has_more=bool(peer.blocked))
        if group.waiting and group not in self._sharing:
            self._sharing.append(group)

    def note_resent(self, peer: Peer, nbytes: int) -> None:
        """Let what shares the pace of a connection that came back wait for what was sent again over it."""
        line = peer.lines[Lane.BULK]
        rate_bytes_per_s = line.rate_bytes_per_s
        if rate_bytes_per_s in (0, UNPACED):
            return
        now_ns = self._clock.now_ns()
        takes_ns = int(nbytes / rate_bytes_per_s * 1e9)
        granted_bytes_per_s = rate_bytes_per_s / line.share
        drained_ns = self._uplink.drained_at(now_ns, granted_bytes_per_s)
        self._uplink.hand(line, now_ns, max(drained_ns, now_ns + LEAD_NS) + takes_ns)
        if peer.group is not None:
            free_ns = peer.group.free_ns(now_ns, granted_bytes_per_s)
            peer.group.hand(line, now_ns, max(free_ns, now_ns + LEAD_NS) + takes_ns)

    def withdraw(self, wanted: Callable[[Ticket], bool]) -> list[Ticket]:
        """Take out sends that have not left, and return their tickets."""
        waiting = self._timed + self._stalled
        taken = [entry[2] for entry in waiting if wanted(entry[2])]
        self._timed, self._stalled = [entry for entry in waiting if not wanted(entry[2])], []
        heapq.heapify(self._timed)
        for peer in self._peers.values():
            taken += [entry[0] for entry in peer.blocked if wanted(entry[0])]
            kept = [entry for entry in peer.blocked if not wanted(entry[0])]
            peer.blocked.clear()
            peer.blocked.extend(kept)
            if peer.group is not None and peer in peer.group.waiting and not kept:
                peer.group.go_on(peer, has_more=False)
        return taken

    def begun_tags(self, rank: int) -> set[int]:
        """Return tags of sends to a peer that have left in part and go on by themselves."""
        entries = self._timed + self._stalled
        tickets = [entry[2] for entry in entries if entry[2].peer == rank]
        if rank in self._peers:
            tickets += [entry[0] for entry in self._peers[rank].blocked]
        return {ticket.tag for ticket in tickets if ticket.sent_bytes}

    def turn(self, now_ns: int) -> None:
        """Send what is in its window now, as far as it will have left by the window's end, and whose turn it is."""
        if self._sharing:
            for group in self._sharing:
                self._share(group, now_ns)
            self._sharing = [group for group in self._sharing if group.waiting]
        self._resume_ns = 0
        while self._stalled:
            heapq.heappush(self._timed, self._stalled.pop())
        without_credit: set[int] = set()
        while self._timed and self._timed[0][0] <= now_ns + LEAD_NS:
            ticket, _, window = self._timed[0][2:]
            if ticket.peer in without_credit:  # its later sends do not pass the first
                self._stall()
            elif window.not_after_ns is None:
                _, _, ticket, view, window = heapq.heappop(self._timed)
                self.queue(self._peers[ticket.peer], ticket, view, window)
            elif not self._depart(window.not_after_ns - LEAD_NS, now_ns):
                if self._resume_ns:
                    return
                without_credit.add(ticket.peer)
                self._stall()

    def _stall(self) -> None:
        self._stalled.append(heapq.heappop(self._timed))

    def _depart(self, closes_ns: int, now_ns: int) -> bool:
        """Hand over what fits of the first send in its window, or end it; False where line or credit are lacking."""
        opens_ns, order, ticket, view, window = self._timed[0]
        peer = self._peers[ticket.peer]
        line = peer.lines[Lane.BULK]
        fitted = replace(window, not_after_ns=closes_ns)
        is_same = line is self._uplink.last
        drained_ns = self._uplink.drained_at(now_ns, window.rate_bytes_per_s)
        if peer.group is not None:
            drained_ns = max(drained_ns, peer.group.free_ns(now_ns, window.rate_bytes_per_s))
            is_same = is_same and line is peer.group.last
        part_bytes = fitted.fitting_bytes(view.nbytes, drained_ns, FRAME_BYTES)
        if not part_bytes and view.nbytes:
            heapq.heappop(self._timed)
            self.missed_sends += not ticket.sent_bytes
            self._mail.end(ticket, TicketStatus.MISSED, now_ns)
            return True
        if drained_ns - now_ns > (AHEAD_NS if is_same else 0):
            # Not yet: if the line is slower than said, what lies in the queues leaves after the window.
            self._resume_ns = max(drained_ns - AHEAD_NS // 2, now_ns + _SHORTEST_WAIT_NS)
            return False
        before_tail = replace(fitted, not_after_ns=closes_ns - AHEAD_NS)
        part_bytes = before_tail.fitting_bytes(part_bytes, drained_ns, FRAME_BYTES) or part_bytes
        part_bytes = min(part_bytes, LARGEST_FRAME_BYTES)
        if not peer.outbound.has_credit(part_bytes):
            return False
        line.pace(window.rate_bytes_per_s)
        handed_ns = self._post.put(peer, peer.outbound.lane_for(ticket.tag, Lane.BULK), ticket, view[:part_bytes])
        # This thread may have been stopped for a while since ``now_ns`` was read.
        # A line that may take a share only goes on after its window: at that rate nothing might fit into a short one.
        drained_ns = max(drained_ns, handed_ns) + int(fitted.takes_ns(part_bytes + FRAME_BYTES) / line.share)
        self._uplink.hand(line, handed_ns, drained_ns)
        if peer.group is not None:
            peer.group.hand(line, handed_ns, drained_ns)
        ticket.left_ns = drained_ns + LEAD_NS
        if part_bytes == view.nbytes:
            heapq.heappop(self._timed)
        else:
            ticket.sent_bytes += part_bytes
            self._timed[0] = (opens_ns, order, ticket, view[part_bytes:], window)
        return True
