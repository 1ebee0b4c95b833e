"""The producer's side of a ring: queued sends, and how they get into the peer's memory.

Sends go in the order in which they were made. A message that is small travels inside its descriptor; one of up to a
quarter of the ring goes whole, so that the receiver can fold from it where it lies; a larger one goes in fragments,
which the receiver puts together while the next ones are written. Where all gaps are hemmed in by lent records, a
message that would go whole goes in fragments as well, as large as there is room, so it never waits for a release.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from detcoll.transport import Clock, Ticket, TicketStatus
from detcoll_shm.area import Area, NoRoom
from detcoll_shm.layout import (
    DESCRIPTOR,
    HEAD,
    INLINE_BYTES,
    LINE_BYTES,
    PAGE_BYTES,
    RECORD_HEADER_BYTES,
    SLEEPING,
    SLOT_BYTES,
    STATE,
    TAIL,
    WANTS_ROOM,
    WORD_BYTES,
    Geometry,
    Kind,
    Record,
    State,
    record_bytes,
)
from detcoll_shm.memory import Ring
from detcoll_shm.stores import Counts

_INLINE, _WHOLE, _FIRST, _MORE = (int(kind) for kind in Kind)
_FULL = int(Record.FULL)


class Sending:
    """A send under way: ``moved`` bytes of ``view`` are in the ring."""

    __slots__ = ("moved", "ticket", "view")

    def __init__(self, ticket: Ticket, view: memoryview) -> None:
        self.ticket = ticket
        self.view = view
        self.moved = 0


class Outbound:
    """Sends to one peer.

    It has many fields for the same reason as `detcoll_shm.inbound.Inbound`.

    Parameters
    ----------
    ring
        This rank's ring in the peer's memory.
    geometry
        Its sizes.
    fragment_bytes
        Largest part of a message that is sent in parts.
    ring_bell
        Rings the peer's doorbell.
    end
        Takes each ticket that ends.
    """

    def __init__(
        self,
        ring: Ring,
        geometry: Geometry,
        fragment_bytes: int,
        clock: Clock,
        counts: Counts,
        ring_bell: Callable[[], None],
        end: Callable[[Ticket, TicketStatus], None],
    ) -> None:
        self.queue: deque[Sending] = deque()
        self._ring = ring
        self._words = ring.words
        self._data = ring.data
        self._area = Area(ring.words, geometry.area_at, geometry.area_bytes)
        self._area_at = geometry.area_at
        self._slots = geometry.slots
        self._whole_bytes = geometry.whole_bytes
        self._fragment_bytes = min(fragment_bytes, geometry.whole_bytes)
        self._clock = clock
        self._counts = counts
        self._ring_bell = ring_bell
        self._end = end
        self._fence = threading.Lock()
        self._head = 0
        self._tail = 0
        self._wanting = False

    def post(self, ticket: Ticket, view: memoryview) -> None:
        """Queue a send and move what there is room for."""
        self.queue.append(Sending(ticket, view))
        if len(self.queue) == 1:
            self.advance()

    def advance(self) -> None:
        """Move queued sends into the ring, as far as there is room."""
        self._move_all()
        words = self._words
        if not self.queue:
            if self._wanting:
                words[WANTS_ROOM] = 0
                self._wanting = False
        elif not self._wanting:
            self._counts.waits_for_room += 1
            self._wanting = True
            words[WANTS_ROOM] = 1
            with self._fence:
                pass
            self._move_all()
            # The peer may have to make room by copying messages out, and may sleep with a full ring.
            self.wake_sleeper()

    def withdraw(self, ticket: Ticket) -> bool:
        """Take back a send of which nothing has moved."""
        for sending in self.queue:
            if sending.ticket is ticket and not sending.moved:
                self.queue.remove(sending)
                return True
        return False

    def set_state(self, state: State) -> None:
        """Tell the peer how far this rank has come."""
        self._words[STATE] = state

    def fail(self, error: Exception) -> None:
        """End all queued sends as FAILED."""
        while self.queue:
            ticket = self.queue.popleft().ticket
            ticket.error = error
            self._end(ticket, TicketStatus.FAILED)

    def drop(self) -> list[Ticket]:
        """Forget and return what is queued, and unmap the ring."""
        left = [sending.ticket for sending in self.queue]
        self.queue.clear()
        self._ring.unmap()
        return left

    def wake_sleeper(self) -> None:
        """Ring the peer's doorbell if it sleeps."""
        if self._words[SLEEPING]:
            # Whoever clears the flag rings next, so no other need ring; a late clear is always followed by a ring.
            self._words[SLEEPING] = 0
            self._ring_bell()

    def _move_all(self) -> None:
        queue = self.queue
        while queue:
            ticket = queue[0].ticket
            if not self._move(queue[0]):
                return
            queue.popleft()
            self._counts.messages_sent += 1
            self._counts.bytes_sent += ticket.nbytes
            self._end(ticket, TicketStatus.DONE)

    def _move(self, sending: Sending) -> bool:
        """Move what there is room for; True once all of the message is in the ring."""
        ticket = sending.ticket
        nbytes = ticket.nbytes
        while True:
            if self._head - self._tail >= self._slots:
                self._tail = self._words[TAIL]
                if self._head - self._tail >= self._slots:
                    return False
            if nbytes <= INLINE_BYTES:
                ticket.started_ns = self._clock.now_ns()
                at = PAGE_BYTES + (self._head % self._slots) * SLOT_BYTES + DESCRIPTOR.size
                self._data[at : at + nbytes] = sending.view
                self._publish(_INLINE, ticket.tag, nbytes, 0, nbytes)
                return True
            if not self._move_part(sending):
                return False
            if sending.moved == nbytes:
                return True

    def _move_part(self, sending: Sending) -> bool:
        """Move the whole message or its next fragment; False if there is no room."""
        ticket, moved = sending.ticket, sending.moved
        nbytes = ticket.nbytes
        size = nbytes if not moved and nbytes <= self._whole_bytes else min(nbytes - moved, self._fragment_bytes)
        place = self._area.place(record_bytes(size))
        while place is NoRoom.STUCK and size > LINE_BYTES:
            size = max(LINE_BYTES, size // 2 // LINE_BYTES * LINE_BYTES)
            place = self._area.place(record_bytes(size))
        if isinstance(place, NoRoom):
            return False
        if not moved:
            ticket.started_ns = self._clock.now_ns()
        at = self._area_at + place
        self._words[at // WORD_BYTES] = _FULL
        at += RECORD_HEADER_BYTES
        self._data[at : at + size] = sending.view if size == nbytes else sending.view[moved : moved + size]
        sending.moved = moved + size
        kind = _MORE if moved else _WHOLE if size == nbytes else _FIRST
        self._publish(kind, ticket.tag, nbytes, place, size)
        return True

    def _publish(self, kind: int, tag: int, nbytes: int, place: int, size: int) -> None:
        """Show the peer the next descriptor, and wake it if it sleeps."""
        head = self._head
        at = PAGE_BYTES + (head % self._slots) * SLOT_BYTES
        DESCRIPTOR.pack_into(self._data, at, head, kind, tag, nbytes, place, size)
        self._head = head + 1
        words = self._words
        words[HEAD] = head + 1
        with self._fence:
            pass
        if words[SLEEPING]:  # looked at here as well, to spare the call in the usual case
            self.wake_sleeper()
