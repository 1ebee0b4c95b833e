"""The consumer's side of a ring: what came from one peer, and which receive it belongs to.

Descriptors are taken in order, and only while a receive waits; so a peer that sends what nobody asked for fills its
ring, and then waits. A whole message without a receive stays in the ring. If the peer then wants room while a receive
still waits for something later, such messages are copied out, so that no tag blocks another. What is copied out for
receives not posted yet is bounded by one `Budget` for the endpoint; beyond it the peer waits until some are posted.
Messages with tags that were discarded are taken and dropped even if no receive waits.

A receive without ``into`` is lent the ring's memory itself, as long as no more than half of the ring is lent, since
lent memory is room that the peer lacks. Beyond that, and for a message that came in parts, it is lent a pooled buffer.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from detcoll.discarding import Discarded
from detcoll.errors import FrameError
from detcoll.transport import Ticket, TicketStatus
from detcoll_shm.layout import (
    DESCRIPTOR,
    HEAD,
    INLINE_BYTES,
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
    record_bytes,
)
from detcoll_shm.memory import Ring
from detcoll_shm.stores import Budget, Counts, Pool, PoolLoan

_INLINE, _WHOLE, _FIRST, _MORE = (int(kind) for kind in Kind)
_FREE, _LENT = int(Record.FREE), int(Record.LENT)
_KEEPING_BYTES = 512  # what a kept message costs besides its payload, roughly


@dataclass(eq=False, slots=True)
class _Arrived:
    """A message without a receive: in the ring at ``place``, or kept in ``data``."""

    tag: int
    nbytes: int
    place: int
    data: memoryview | None = None


@dataclass(eq=False, slots=True)
class _Assembly:
    """A message that comes in parts: ``target`` holds ``filled`` bytes so far, None where nobody wants them.

    ``pooled`` : the buffer behind ``target`` that the ticket will be lent.
    """

    tag: int
    nbytes: int
    target: memoryview | None
    ticket: Ticket | None = None
    pooled: bytearray | None = None
    filled: int = 0


class _RingLoan:
    """Lends a record of the ring until the ticket is released."""

    __slots__ = ("_inbound", "_nbytes", "_place")

    def __init__(self, inbound: Inbound, place: int, nbytes: int) -> None:
        self._inbound = inbound
        self._place = place
        self._nbytes = nbytes

    def take_back(self, ticket: Ticket) -> None:
        self._inbound.take_back(self._place, self._nbytes)


class Inbound:
    """Receives from one peer.

    It has many fields since a message that arrives in parts is one state with its ring, its loans and its counts; each
    further object on that path would cost every message.

    Parameters
    ----------
    ring
        The peer's ring in this rank's memory.
    geometry
        Its sizes.
    discards
        Tags that the endpoint drops.
    wake
        Rings the peer's doorbell if it sleeps.
    end
        Takes each ticket that ends.
    """

    def __init__(
        self,
        source: int,
        ring: Ring,
        geometry: Geometry,
        pool: Pool,
        budget: Budget,
        counts: Counts,
        discards: Discarded,
        wake: Callable[[], None],
        end: Callable[[Ticket, TicketStatus], None],
    ) -> None:
        self.waiting = 0
        self.closed = False
        self._source = source
        self._ring = ring
        self._words = ring.words
        self._data = ring.data
        self._lendable = ring.lendable
        self._slots = geometry.slots
        self._area_at = geometry.area_at
        self._area_bytes = geometry.area_bytes
        self._copied_bytes = geometry.copied_bytes
        self._may_lend_bytes = geometry.lent_bytes
        self._pool = pool
        self._budget = budget
        self._counts = counts
        self._discards = discards
        self._wake = wake
        self._end = end
        self._fence = threading.Lock()
        self._lending = threading.Lock()
        """Held while a loan begins or ends, and while the ring is unmapped: tickets may be released on any thread."""
        self._seen = 0
        self._lent_bytes = 0
        self._in_ring = 0
        self._posted: dict[int, deque[tuple[Ticket, memoryview | None]]] = {}
        self._arrived: dict[int, deque[_Arrived]] = {}
        self._assembly: _Assembly | None = None
        self._doomed: set[int] = set()
        """Descriptors in the ring that had come when their tags were discarded."""

    def post(self, ticket: Ticket, into: memoryview | None) -> None:
        """Start a receive; it ends at once if its message is here."""
        arrived = self._arrived.get(ticket.tag)
        if arrived:
            message = arrived.popleft()
            if not arrived:
                del self._arrived[ticket.tag]
            self._hand_over(message, ticket, into)
            return
        posted = self._posted.get(ticket.tag)
        if posted is None:
            self._posted[ticket.tag] = deque([(ticket, into)])
        else:
            posted.append((ticket, into))
        self.waiting += 1
        self.advance()

    def advance(self) -> None:
        """Take what the peer published, as far as receives wait for it or it is to be dropped.

        Raises
        ------
        FrameError
            If the peer wrote nonsense.
        """
        words = self._words
        seen, head = self._seen, words[HEAD]
        while self._seen < head and (self.waiting or self._drops_next()) and self._take_next():
            self._seen += 1
        if self._seen != seen:
            words[TAIL] = self._seen
            if self._doomed:
                self._doomed = {index for index in self._doomed if index >= self._seen}
        if self._in_ring and self.waiting and words[WANTS_ROOM]:
            self._make_room()
        elif self._seen != seen:
            self._tell_room()

    def drained(self) -> bool:
        """Tell whether all that was published has been taken."""
        return self._seen == self._words[HEAD]

    def peer_state(self) -> int:
        """Return the `State` that the peer has written."""
        return self._words[STATE]

    def set_sleeping(self, sleeping: int) -> None:
        """Tell the peer whether to ring when it sends."""
        self._words[SLEEPING] = sleeping

    def withdraw(self, ticket: Ticket) -> bool:
        """Take back a receive of which nothing has come."""
        posted = self._posted.get(ticket.tag, deque())
        for entry in posted:
            if entry[0] is ticket:
                posted.remove(entry)
                if not posted:
                    del self._posted[ticket.tag]
                self.waiting -= 1
                return True
        return False

    def discard(self) -> None:
        """Cancel receives of discarded tags, and drop what has come with such tags."""
        covers = self._discards.covers
        for tag in [tag for tag in self._posted if covers(tag)]:
            for ticket, _ in self._posted.pop(tag):
                self.waiting -= 1
                self._end(ticket, TicketStatus.CANCELLED)
        for tag in [tag for tag in self._arrived if covers(tag)]:
            for message in self._arrived.pop(tag):
                self._drop_arrived(message)
        if self._assembly is not None and covers(self._assembly.tag):
            self._drop_assembly(self._assembly)
        for index in range(self._seen, self._words[HEAD]):
            at = PAGE_BYTES + (index % self._slots) * SLOT_BYTES
            if covers(DESCRIPTOR.unpack_from(self._data, at)[2]):
                self._doomed.add(index)
        self._tell_room()

    def fail(self, error: Exception) -> None:
        """End all receives that wait as FAILED."""
        for ticket in self._forget_waiting():
            ticket.error = error
            self._end(ticket, TicketStatus.FAILED)

    def drop(self) -> list[Ticket]:
        """Forget and return the receives that wait, and unmap the ring; what is lent stays readable."""
        left = self._forget_waiting()
        self._arrived.clear()
        with self._lending:
            self.closed = True
            self._ring.unmap()
        return left

    def take_back(self, place: int, nbytes: int) -> None:
        """End the loan of a record."""
        with self._lending:
            if not self.closed:
                self._lent_bytes -= record_bytes(nbytes)
                self._free(place)
                self._tell_room()

    def _forget_waiting(self) -> list[Ticket]:
        left = [ticket for posted in self._posted.values() for ticket, _ in posted]
        if self._assembly is not None and self._assembly.ticket is not None:
            left.insert(0, self._assembly.ticket)
            self._assembly = None
        self._posted.clear()
        self.waiting = 0
        return left

    def _free(self, place: int) -> None:
        self._words[(self._area_at + place) // WORD_BYTES] = _FREE

    def _tell_room(self) -> None:
        """Wake the peer if it waits for room; it has to see what was given back before this looks at its flag."""
        with self._fence:
            pass
        if self._words[WANTS_ROOM]:
            self._wake()

    def _take_next(self) -> bool:
        """Take one descriptor; False if it has to stay until the budget allows."""
        at = PAGE_BYTES + (self._seen % self._slots) * SLOT_BYTES
        index, kind, tag, nbytes, place, size = DESCRIPTOR.unpack_from(self._data, at)
        self._validate(index, kind, tag, nbytes, place, size)
        if kind != _MORE and self._is_dropped(tag):
            self._counts.messages_dropped += 1
            if kind == _WHOLE:
                self._free(place)
            elif kind == _FIRST:
                self._assembly = _Assembly(tag, nbytes, None)
                self._add_part(place, size)
            return True
        if kind == _WHOLE:
            posted = self._posted.get(tag)
            if posted:
                self._hand_over_record(place, nbytes, *self._next_posted(posted, tag))
            else:
                self._in_ring += 1
                self._keep(_Arrived(tag, nbytes, place))
            return True
        if kind == _INLINE:
            return self._take_inline(tag, at + DESCRIPTOR.size, nbytes)
        if kind == _FIRST and not self._begin(tag, nbytes):
            return False
        self._add_part(place, size)
        return True

    def _is_dropped(self, tag: int) -> bool:
        """Tell whether the next descriptor, which has ``tag``, belongs to what was discarded."""
        return self._seen in self._doomed or (bool(self._discards) and self._discards.covers(tag))

    def _drops_next(self) -> bool:
        """Tell whether the next descriptor is taken although no receive waits."""
        if not self._doomed and not self._discards:
            return False
        if self._assembly is not None:
            return self._assembly.target is None
        at = PAGE_BYTES + (self._seen % self._slots) * SLOT_BYTES
        return self._is_dropped(DESCRIPTOR.unpack_from(self._data, at)[2])

    def _drop_arrived(self, message: _Arrived) -> None:
        self._counts.messages_dropped += 1
        if message.data is not None:
            self._budget.give(message.nbytes + _KEEPING_BYTES)
        else:
            self._in_ring -= 1
            self._free(message.place)

    def _drop_assembly(self, assembly: _Assembly) -> None:
        """Let the parts that are still to come go nowhere."""
        if assembly.target is None:
            return
        ticket, pooled = assembly.ticket, assembly.pooled
        assembly.target = assembly.ticket = assembly.pooled = None
        self._counts.messages_dropped += 1
        if ticket is None:
            self._budget.give(assembly.nbytes + _KEEPING_BYTES)
            return
        self.waiting -= 1
        if pooled is not None:
            self._pool.give(pooled)
        self._end(ticket, TicketStatus.CANCELLED)

    def _next_posted(
        self, posted: deque[tuple[Ticket, memoryview | None]], tag: int
    ) -> tuple[Ticket, memoryview | None]:
        entry = posted.popleft()
        if not posted:
            del self._posted[tag]
        self.waiting -= 1
        return entry

    def _take_inline(self, tag: int, at: int, nbytes: int) -> bool:
        posted = self._posted.get(tag)
        if not posted and not self._budget.take(nbytes + _KEEPING_BYTES):
            return False
        data = memoryview(bytes(self._data[at : at + nbytes]))
        if posted:
            self._hand_over_data(data, *self._next_posted(posted, tag))
        else:
            self._counts.messages_kept += 1
            self._keep(_Arrived(tag, nbytes, -1, data))
        return True

    def _keep(self, message: _Arrived) -> None:
        self._arrived.setdefault(message.tag, deque()).append(message)

    def _begin(self, tag: int, nbytes: int) -> bool:
        """Start to put a message together; False if the budget does not allow to keep it."""
        posted = self._posted.get(tag)
        if not posted:
            if not self._budget.take(nbytes + _KEEPING_BYTES):
                return False
            self._assembly = _Assembly(tag, nbytes, memoryview(bytearray(nbytes)))
            return True
        ticket, into = self._next_posted(posted, tag)
        if ticket.nbytes != nbytes:
            self._refuse(ticket, nbytes)
            self._assembly = _Assembly(tag, nbytes, None)
            return True
        self.waiting += 1  # until the last part is here
        pooled = self._pool.take(nbytes) if into is None else None
        target = into if pooled is None else memoryview(pooled)[:nbytes]
        self._assembly = _Assembly(tag, nbytes, target, ticket, pooled)
        return True

    def _add_part(self, place: int, size: int) -> None:
        assembly = self._assembly
        assert assembly is not None  # _validate has seen to it
        if assembly.target is not None:
            at = self._area_at + place + RECORD_HEADER_BYTES
            assembly.target[assembly.filled : assembly.filled + size] = self._data[at : at + size]
        assembly.filled += size
        self._free(place)
        if assembly.filled < assembly.nbytes:
            return
        self._assembly = None
        if assembly.ticket is not None:
            self.waiting -= 1
            if assembly.pooled is not None:
                self._lend_pooled(assembly.pooled, assembly.ticket)
            self._received(assembly.ticket)
        elif assembly.target is not None:
            self._complete_kept(_Arrived(assembly.tag, assembly.nbytes, -1, assembly.target))

    def _complete_kept(self, message: _Arrived) -> None:
        """Keep a complete message, unless its receive was posted meanwhile."""
        self._counts.messages_kept += 1
        posted = self._posted.get(message.tag)
        if posted:
            self._hand_over(message, *self._next_posted(posted, message.tag))
        else:
            self._keep(message)

    def _make_room(self) -> None:
        """Copy messages without a receive out of the ring, since the peer wants room and a receive waits."""
        for queue in self._arrived.values():
            for message in queue:
                if message.place < 0 or not self._budget.take(message.nbytes + _KEEPING_BYTES):
                    continue
                at = self._area_at + message.place + RECORD_HEADER_BYTES
                message.data = memoryview(bytes(self._data[at : at + message.nbytes]))
                self._free(message.place)
                message.place = -1
                self._in_ring -= 1
                self._counts.messages_kept += 1
        self._tell_room()

    def _hand_over(self, message: _Arrived, ticket: Ticket, into: memoryview | None) -> None:
        """End a receive with a message that came before it."""
        if message.data is None:
            self._in_ring -= 1
            self._hand_over_record(message.place, message.nbytes, ticket, into)
            self._tell_room()
        else:
            self._budget.give(message.nbytes + _KEEPING_BYTES)
            self._hand_over_data(message.data, ticket, into)

    def _hand_over_data(self, data: memoryview, ticket: Ticket, into: memoryview | None) -> None:
        """End a receive with a message that is out of the ring."""
        if data.nbytes != ticket.nbytes:
            self._refuse(ticket, data.nbytes)
            return
        if into is None:
            ticket.view = data.toreadonly()
        else:
            into[:] = data
        self._received(ticket)

    def _hand_over_record(self, place: int, nbytes: int, ticket: Ticket, into: memoryview | None) -> None:
        """End a receive with a whole message in the ring."""
        if nbytes != ticket.nbytes:
            self._free(place)
            self._refuse(ticket, nbytes)
            return
        at = self._area_at + place + RECORD_HEADER_BYTES
        if into is None and self._lend(place, at, nbytes, ticket):
            self._received(ticket)
            return
        source = self._data[at : at + nbytes]
        if into is not None:
            into[:] = source
        elif nbytes <= self._copied_bytes:
            ticket.view = memoryview(bytes(source))
        else:
            buffer = self._pool.take(nbytes)
            memoryview(buffer)[:nbytes] = source
            self._lend_pooled(buffer, ticket)
        source.release()
        self._free(place)
        self._received(ticket)

    def _lend(self, place: int, at: int, nbytes: int, ticket: Ticket) -> bool:
        """Lend a record itself, unless it is small or too much is lent."""
        if nbytes <= self._copied_bytes:
            return False
        with self._lending:
            lent_bytes = self._lent_bytes + record_bytes(nbytes)
            if lent_bytes > self._may_lend_bytes:
                return False
            self._lent_bytes = lent_bytes
        self._words[(self._area_at + place) // WORD_BYTES] = _LENT
        ticket.view = self._lendable[at : at + nbytes]
        ticket.lender = _RingLoan(self, place, nbytes)
        self._counts.messages_lent += 1
        self._counts.bytes_lent += nbytes
        return True

    def _lend_pooled(self, buffer: bytearray, ticket: Ticket) -> None:
        ticket.view = memoryview(buffer)[: ticket.nbytes].toreadonly()
        ticket.lender = PoolLoan(self._pool, buffer)

    def _received(self, ticket: Ticket) -> None:
        self._counts.messages_received += 1
        self._counts.bytes_received += ticket.nbytes
        self._end(ticket, TicketStatus.DONE)

    def _refuse(self, ticket: Ticket, nbytes: int) -> None:
        ticket.error = FrameError(
            f"{nbytes} bytes came from rank {self._source} with tag {ticket.tag}; expected {ticket.nbytes}"
        )
        self._end(ticket, TicketStatus.FAILED)

    def _validate(self, index: int, kind: int, tag: int, nbytes: int, place: int, size: int) -> None:
        """Refuse a descriptor that this side would not have written."""
        assembly = self._assembly
        fits = index == self._seen and 0 <= size <= nbytes
        if kind == _MORE:
            fits = fits and assembly is not None and assembly.tag == tag and assembly.nbytes == nbytes
            fits = fits and assembly is not None and assembly.filled + size <= nbytes
        else:
            fits = fits and assembly is None and kind in (_INLINE, _WHOLE, _FIRST)
        if kind == _INLINE:
            fits = fits and size == nbytes <= INLINE_BYTES
        else:
            fits = fits and 0 <= place <= self._area_bytes - record_bytes(size) and place % 64 == 0
        if not fits or (kind == _WHOLE and size != nbytes):
            raise FrameError(
                f"rank {self._source} wrote descriptor {self._seen} as index={index} kind={kind} tag={tag} "
                f"nbytes={nbytes} place={place} size={size}, which does not fit the protocol"
            )
