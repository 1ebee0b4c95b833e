"""What arrives: acknowledgements, hellos and messages, and what their senders are to be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import zmq

from detcoll.errors import FrameError
from detcoll.mailbox import Mailbox
from detcoll.transport import Clock, Ticket, TicketStatus
from detcoll_slotted.departures import Departures
from detcoll_slotted.flow import Inbound
from detcoll_slotted.peer import Peer
from detcoll_slotted.post import Post
from detcoll_slotted.wire import FrameKind, Header, Lane, decode


@dataclass(eq=False, slots=True)
class _Loan:
    """What a message counts against the credit of its sender while it is held."""

    intake: Intake
    peer: Peer
    nbytes: int

    def take_back(self, ticket: Ticket | None) -> None:
        """Count the bytes as consumed, so that the sender's credit comes back."""
        self.intake.consumed(self.peer, self.nbytes)


class Intake:
    """Takes frames of one endpoint; ``due_ns`` is when the endpoint must look again, 0 for at once."""

    def __init__(
        self, peers: Mapping[int, Peer], mail: Mailbox, post: Post, departures: Departures, clock: Clock,
        acknowledge_delay_ns: int,
    ) -> None:  # fmt: skip
        self.due_ns = 0
        self.counted = {"duplicates": 0, "foreign_frames": 0}
        self._peers, self._mail, self._post = peers, mail, post
        self._departures, self._clock = departures, clock
        self._delay_ns = acknowledge_delay_ns

    def take(
        self, frames: Sequence[zmq.Frame], greeted: Callable[[Header], None], left: Callable[[Peer], None]
    ) -> None:
        """Take one message in; ``greeted`` hears each hello, ``left`` who goes."""
        try:
            header = decode(frames[0].buffer)
        except FrameError:
            self.counted["foreign_frames"] += 1
            return
        if header.token != self._post.token:
            self.counted["foreign_frames"] += 1
            return
        if header.kind is FrameKind.HELLO:
            greeted(header)
        peer = self._peers.get(header.source)
        if peer is None:
            self.counted["foreign_frames"] += 1
            return
        peer.heard_ns = self._clock.now_ns()
        peer.inbound.heard.add(header.lane)
        for ticket in peer.outbound.acknowledged(header.acks, header.consumed):
            peer.acknowledged_ns = peer.heard_ns
            self._mail.end(ticket, TicketStatus.DONE, peer.heard_ns)
        self._departures.unblock(peer)
        if header.kind is FrameKind.BYE:
            peer.inbound.bye = True
            left(peer)
        elif header.kind is FrameKind.WARM:
            peer.inbound.warm_bytes += sum(len(frame) for frame in frames[1:])
        elif header.kind is FrameKind.DATA:
            self._take_data(peer, header, frames)

    def _take_data(self, peer: Peer, header: Header, frames: Sequence[zmq.Frame]) -> None:
        if len(frames) != 2:
            self.counted["foreign_frames"] += 1
            return
        payload, now_ns = memoryview(frames[1].buffer), self._clock.now_ns()
        if not peer.inbound.accept(header.lane, header.sequence):
            self.counted["duplicates"] += 1
            peer.inbound.tell(now_ns, soon=True)
            return
        # Each acknowledgement wakes up two hosts, so it waits a little for the next one.
        peer.inbound.tell(now_ns, soon=False)
        peer.inbound.untold_bytes += len(payload)
        loan = _Loan(self, peer, len(payload)) if header.lane is Lane.BULK else None
        if header.total != len(payload) and not self._mail.drops(header.tag):
            whole = self._join(peer, header, payload)
            if whole is None:
                return
            payload, loan = whole, None
        self._mail.keep(peer.rank, header.tag, payload, now_ns, loan)

    def _join(self, peer: Peer, header: Header, part: memoryview) -> memoryview | None:
        """Put a part in its place, in memory of its own that no credit covers: one message for each tag at most."""
        if header.lane is Lane.BULK:
            self.consumed(peer, len(part))
        try:
            return peer.inbound.join(header.tag, header.total, header.offset, part)
        except FrameError:
            self.counted["foreign_frames"] += 1
            return None

    def consumed(self, peer: Peer, nbytes: int) -> None:
        """Take note that bytes which count against a sender's credit are no longer held."""
        peer.inbound.consume(nbytes, self._clock.now_ns())
        self.note_due(peer.inbound)

    def note_due(self, inbound: Inbound) -> None:
        """Look at a peer again when it must be told something: at the next poll, where that may be the last."""
        due_ns = inbound.due_ns(self._delay_ns)
        if due_ns is not None:
            self.due_ns = 0 if self._is_at_rest() else min(self.due_ns, due_ns)

    def acknowledge(self, peer: Peer, now_ns: int) -> None:
        """Tell a peer what it must know by now, and all of it where nobody may poll again."""
        due_ns = peer.inbound.due_ns(self._delay_ns)
        if due_ns is not None and (due_ns <= now_ns or self._is_at_rest()):
            self._post.transmit(peer, Lane.EXPRESS, FrameKind.ACK)

    def _is_at_rest(self) -> bool:
        """Tell whether this rank waits for nobody."""
        return not self._mail.has_receives and all(peer.outbound.idle or peer.lost for peer in self._peers.values())
