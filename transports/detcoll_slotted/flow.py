"""The rules of one ordered pair of ranks: sequence, credit and retention, without any I/O.

A sender numbers the messages of each lane from zero and keeps every one until the receiver has acknowledged it, so a
connection that breaks and comes back loses nothing: everything unacknowledged is sent again in order, and the receiver
drops what it has seen. What arrives out of order (the rest of a broken connection's queue) is dropped too, since what
is missing before it will be sent again (go-back-N; RFC 3366, section 1.3 describes the family).

Credit is standing: the receiver has promised to hold ``credit_bytes`` of payload, and the sender never has more than
that sent and not yet consumed. One message larger than the credit may go when nothing else is under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field

import numpy as np

from detcoll.discarding import has_prefix
from detcoll.errors import FrameError
from detcoll.transport import Ticket
from detcoll_slotted.wire import LANES, Lane


@dataclass(slots=True)
class Kept:
    """A message, or a part of one, sent and not yet acknowledged; ``place`` is the whole's bytes and its offset."""

    sequence: int
    ticket: Ticket
    view: memoryview
    place: tuple[int, int]

    @property
    def is_last(self) -> bool:
        """Whether the message ends with this."""
        return self.place[1] + self.view.nbytes == self.place[0]


@dataclass(slots=True)
class Outbound:
    """The sending side of an ordered pair."""

    credit_bytes: int
    is_open: bool = True
    """Whether the receiver knows this rank: until then nothing may go."""
    next_sequence: list[int] = field(default_factory=lambda: [0, 0])
    kept: tuple[deque[Kept], deque[Kept]] = field(default_factory=lambda: (deque(), deque()))
    sent_bytes: int = 0
    consumed_bytes: int = 0
    begun: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Tags of messages of which a part has left: bytes of the whole, and how many have left."""
    lane_of_tag: dict[int, list[int]] = field(default_factory=dict)
    """Tags with unacknowledged messages: their lane and how many, since one tag must not overtake itself."""

    def has_credit(self, nbytes: int) -> bool:
        """Tell whether a bulk message of ``nbytes`` may go now."""
        held = self.sent_bytes - self.consumed_bytes
        return self.is_open and (held == 0 or held + nbytes <= self.credit_bytes)

    def lane_for(self, tag: int, preferred: Lane) -> Lane:
        """Return the lane for a message with ``tag``: the one that its unacknowledged predecessors took."""
        in_use = self.lane_of_tag.get(tag)
        return LANES[in_use[0]] if in_use else preferred

    def keep(self, lane: Lane, ticket: Ticket, view: memoryview) -> Kept:
        """Retain a message, or the next part of one, that is about to be sent."""
        total, offset = self.begun.pop(ticket.tag, (ticket.nbytes, 0))
        if offset + view.nbytes < total:
            self.begun[ticket.tag] = total, offset + view.nbytes
        kept = Kept(self.next_sequence[lane], ticket, view, (total, offset))
        self.next_sequence[lane] += 1
        self.kept[lane].append(kept)
        self.lane_of_tag.setdefault(ticket.tag, [lane, 0])[1] += 1
        if lane is Lane.BULK:
            self.sent_bytes += view.nbytes
        return kept

    def acknowledged(self, acks: tuple[int, int], consumed_bytes: int) -> list[Ticket]:
        """Take in a cumulative acknowledgement; returns the tickets of messages that have arrived whole."""
        self.consumed_bytes = max(self.consumed_bytes, consumed_bytes)
        ended = []
        for lane in LANES:
            kept = self.kept[lane]
            while kept and kept[0].sequence < acks[lane]:
                first = kept.popleft()
                ticket = first.ticket
                in_use = self.lane_of_tag[ticket.tag]
                in_use[1] -= 1
                if not in_use[1]:
                    del self.lane_of_tag[ticket.tag]
                if first.is_last:
                    ended.append(ticket)
        return ended

    def drop(self, prefix: int, bits: int, going_on: Container[int]) -> None:
        """Expect no rest of messages of which a part has left, where tags have that prefix and are not ``going_on``."""
        for tag in [tag for tag in self.begun if has_prefix(tag, prefix, bits) and tag not in going_on]:
            del self.begun[tag]

    @property
    def idle(self) -> bool:
        """Whether everything sent was acknowledged."""
        return not self.kept[0] and not self.kept[1]


@dataclass(slots=True)
class Inbound:
    """The receiving side of an ordered pair."""

    tell_every_bytes: int
    received: list[int] = field(default_factory=lambda: [0, 0])
    consumed_bytes: int = 0
    told_bytes: int = 0
    untold_bytes: int = 0
    """What has come since the sender was told last."""
    owes_acknowledgement: bool = False
    untold_since_ns: int = 0
    """Since when there is something to tell; 0 while there is nothing."""
    warm_bytes: int = 0
    heard: set[Lane] = field(default_factory=set)
    """The lanes over which something has come."""
    bye: bool = False
    begun: dict[int, tuple[memoryview, int]] = field(default_factory=dict)
    """Tags of messages of which a part has come: memory for the whole, and how much of it is there."""

    def accept(self, lane: Lane, sequence: int) -> bool:
        """Tell whether this is the next message of its lane; if so it counts as received."""
        if sequence != self.received[lane]:
            return False
        self.received[lane] += 1
        return True

    def join(self, tag: int, total: int, offset: int, part: memoryview) -> memoryview | None:
        """Put a part of a message in its place, and return the whole once it is there.

        Raises
        ------
        FrameError
            If it does not go on where the part before ended.
        """
        whole, there = self.begun.pop(tag, (None, 0))
        if whole is None or offset == 0:  # a message that begins anew: its sender has given up the one before
            there = 0
            whole = np.empty(total, np.uint8).data
        if offset != there or len(whole) != total or offset + len(part) > total:
            raise FrameError(f"{len(part)} bytes at {offset} of {total} do not follow {there} of {len(whole)}")
        whole[offset : offset + len(part)] = part
        if offset + len(part) == total:
            return whole
        self.begun[tag] = whole, offset + len(part)
        return None

    def drop(self, prefix: int, bits: int) -> None:
        """Give up messages of which a part has come, where tags have that prefix."""
        for tag in [tag for tag in self.begun if has_prefix(tag, prefix, bits)]:
            del self.begun[tag]

    def tell(self, now_ns: int, *, soon: bool) -> None:
        """Take note that the sender has something to learn: at once with ``soon``, else it may wait for company."""
        self.owes_acknowledgement |= soon
        if not self.untold_since_ns:
            self.untold_since_ns = max(now_ns, 1)

    def consume(self, nbytes: int, now_ns: int) -> None:
        """Take note that ``nbytes`` are no longer held."""
        self.consumed_bytes += nbytes
        if nbytes:
            self.tell(now_ns, soon=False)

    def told(self) -> None:
        """Take note that everything was told to the sender."""
        self.told_bytes = self.consumed_bytes
        self.untold_bytes = 0
        self.owes_acknowledgement = False
        self.untold_since_ns = 0

    def due_ns(self, delay_ns: int) -> int | None:
        """Return when the sender must be told something, 0 for at once, or None while there is nothing to tell."""
        if not self.untold_since_ns:
            return None
        if self.owes_acknowledgement:
            return 0
        if max(self.consumed_bytes - self.told_bytes, self.untold_bytes) >= self.tell_every_bytes:
            return 0
        return self.untold_since_ns + delay_ns
