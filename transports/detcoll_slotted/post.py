"""Writing frames and handing them to ZeroMQ."""

from __future__ import annotations

import zmq

from detcoll.transport import Clock, Ticket
from detcoll_slotted.constant import send_constant
from detcoll_slotted.flow import Kept
from detcoll_slotted.peer import Peer
from detcoll_slotted.wire import FRAME_BYTES, FrameKind, Header, Lane

LEAD_NS = 150_000
"""What a send needs from here through ZeroMQ's thread and TCP to the line, at least: it starts that much earlier."""
_LEAST_LENT_BYTES = 65_536
"""Smaller payloads are copied, which costs less than it does to lend them."""
_LAST, _PART = int(zmq.DONTWAIT), int(zmq.DONTWAIT | zmq.SNDMORE)


class Post:
    """Sends frames of one rank; ``resent_bytes`` counts what went a second time."""

    def __init__(self, rank: int, token: int, clock: Clock) -> None:
        self.resent_bytes = 0
        self.token = token
        self._rank, self._clock = rank, clock

    def put(self, peer: Peer, lane: Lane, ticket: Ticket, view: memoryview) -> int:
        """Send a message, or a part of one, and keep it until it is acknowledged; return when it was handed over."""
        now_ns = self._clock.now_ns()
        if not ticket.sent_bytes:  # of several parts the first counts
            lead_ns = LEAD_NS if lane is Lane.BULK else 0  # when it reaches the line, at the earliest
            ticket.started_ns = now_ns + lead_ns
        self.transmit_kept(peer, lane, peer.outbound.keep(lane, ticket, view))
        return now_ns

    def resend(self, peer: Peer, lane: Lane) -> int:
        """Send everything of a lane again that is not acknowledged; returns how many bytes that is on the wire."""
        nbytes = 0
        for kept in peer.outbound.kept[lane]:
            self.resent_bytes += kept.view.nbytes
            nbytes += kept.view.nbytes + FRAME_BYTES
            self.transmit_kept(peer, lane, kept, again=True)
        return nbytes

    def transmit_kept(self, peer: Peer, lane: Lane, kept: Kept, *, again: bool = False) -> None:
        """Send a kept message: lent the first time, where that pays."""
        # What is sent again may be acknowledged, and its memory given back, while it still waits behind the first.
        # Behind a proxy ZeroMQ may keep a message after this rank gave it up (`Trunk.close`).
        lend = not again and kept.view.nbytes >= _LEAST_LENT_BYTES and not peer.lines[lane].trunk.is_proxied
        self.transmit(peer, lane, FrameKind.DATA, kept.view, kept.ticket.tag, kept.sequence, kept.place, lend=lend)

    def transmit(
        self, peer: Peer, lane: Lane, kind: FrameKind, view: memoryview | None = None,
        tag: int = 0, sequence: int = 0, place: tuple[int, int] = (0, 0), *, lend: bool = False,
    ) -> None:  # fmt: skip
        """Hand a frame to ZeroMQ, which copies it, or reads it where it lies if ``lend``."""
        inbound = peer.inbound
        acks = (inbound.received[0], inbound.received[1])
        header = Header(
            kind, lane, self._rank, tag, *place, self.token, sequence, acks, inbound.consumed_bytes
        ).encode()
        line = peer.lines[lane]
        router = line.trunk.socket
        router.send(line.route, _PART)
        if view is None:
            router.send(header, _LAST)
        else:
            router.send(header, _PART)
            if lend:
                send_constant(router, view)
            else:
                router.send(view, _LAST)
        if lane is Lane.EXPRESS:  # on the other lane it waits behind paced data
            inbound.told()
