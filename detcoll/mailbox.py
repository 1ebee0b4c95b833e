"""Matching messages with receives, for authors of transports: no socket, no thread, no clock, no lock.

A transport moves bytes. Everything else that the SPI asks of an endpoint is the same for all of them, and is here:
arguments are checked, receives wait for their messages, messages that come early wait for their receives, tickets end
and are collected, tags are discarded, peers are lost. `detcoll.endpoint.MailboxEndpoint` puts it behind the SPI.

A message that arrives passes through three calls, so that its bytes go straight to where they belong::

    if mail.admits(src, tag, nbytes):               # the header is here: is there room for the body?
        arrival = mail.begin(src, tag, nbytes, now_ns)
    count = sock.recv_into(arrival.rest)            # the receive's own memory if it is posted, else the mailbox's
    mail.advance(arrival, count, now_ns)            # ends the receive with the last byte

`Mailbox.deliver` does all of it for a message that lies in memory already, and copies it. `Mailbox.keep` leaves such a
message where it lies: a receive without ``into`` is lent that memory, and its owner hears when it is free again.

How much of one peer's early mail is held is bounded by ``held_bytes``. What is not admitted stays where it is, so its
sender has to wait. A transport that can take a later message first asks for nothing more. One that reads messages in
order passes ``in_order=True``: a message that a receive waits for may be behind the one that finds no room, and two
ranks that wait for such messages would wait for ever. So while a receive from that peer waits, up to `BEHIND` times as
much is held.

In a job of detcoll a receive of every peer always waits, one for control messages, so on an ordered transport
``held_bytes`` alone bounds nothing. What does is the sender's engine: it sends 8 MiB, or one message, to a peer that
has not asked for it (`detcoll.runtime.credit`), so no more than that is held.

One thread at a time uses a mailbox. A transport with threads guards it with a lock, which it need not hold while it
writes to `Arrival.rest`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from detcoll.discarding import Discarded, has_prefix
from detcoll.errors import Closed, FrameError, PeerLost, TransportError, UsageError
from detcoll.transport import LARGEST_TAG, TAG_BITS, Ticket, TicketKind, TicketStatus

HELD_BYTES = 2**26
"""How much of one peer's early mail a mailbox holds, unless told otherwise, while no receive of it waits."""
BEHIND = 32
"""Times ``held_bytes`` are held while a receive waits for a message that is behind others."""

Receive = tuple[Ticket, memoryview | None]
"""A receive: its ticket and ``into``."""
Key = tuple[int, int]
"""Source and tag."""


class Owner(Protocol):
    """Whose memory a message lies in: it hears when that is free again. It becomes `Ticket.lender` of a lent view."""

    def take_back(self, ticket: Ticket | None) -> None:
        """Take the memory back: of a lent view, where ``ticket.view`` is None by then, or of what nobody was lent."""


@dataclass(eq=False, slots=True)
class Arrival:
    """A message between its header and the end of its receive.

    ``memory`` : where its bytes belong, all of it.  ``filled_bytes`` : how many of them are there.  ``receive`` : who
    takes it, None while nobody does.  ``is_dropped`` : nobody will.  ``is_early`` : it counts as held for its source.
    ``owner`` : whose memory it is, if it is to hear when that is free.  ``error`` : why its bytes cannot be had.
    """

    source: int
    tag: int
    memory: memoryview
    receive: Receive | None
    is_early: bool = False
    is_dropped: bool = False
    filled_bytes: int = 0
    owner: Owner | None = None
    error: Exception | None = None

    @property
    def rest(self) -> memoryview:
        """Where the next bytes go, up to the end of the message."""
        return self.memory[self.filled_bytes :]

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are there."""
        return self.filled_bytes == self.memory.nbytes


class Mailbox:
    """The tickets of one endpoint, and the messages that nobody has asked for yet.

    It has more fields than most classes: what waits, on which side, and how much of it, stands side by side.

    Parameters
    ----------
    rank : int
        Of the endpoint; named in errors.
    largest_message_bytes : int
        Of the transport's capabilities; larger sends and receives raise UsageError.
    held_bytes : int
        How much of one peer's early mail is held while no receive of it waits; see the module's text.
    memory : callable, optional
        Returns writable memory of so many bytes and who is told when it is free again, or None, for a transport that
        uses its memory more than once. It is asked for messages that do not go straight to a receive's own memory.
        What is under way when a peer is lost or the mailbox is closed need not come back. By default memory is Python's
        own.
    """

    def __init__(
        self, rank: int, *, largest_message_bytes: int = 2**30, held_bytes: int = HELD_BYTES,
        memory: Callable[[int], tuple[memoryview, Owner | None]] | None = None,
    ) -> None:  # fmt: skip
        self.peers: set[int] = set()
        """The ranks that messages may be exchanged with."""
        self.counters = dict.fromkeys(("messages_sent", "bytes_sent", "messages_received", "bytes_received"), 0)
        self.is_open = True
        self.largest_message_bytes = largest_message_bytes
        self._rank, self._largest_held_bytes = rank, held_bytes
        self._memory = memory or _fresh_memory
        self._discarded = Discarded()
        self._posted: dict[Key, deque[Receive]] = {}
        self._waiting: dict[int, int] = {}
        self._early: dict[Key, deque[Arrival]] = {}
        self._held: dict[int, int] = {}
        self._arriving: set[Arrival] = set()
        self._sends: dict[Ticket, None] = {}
        self._unreachable: dict[int, Exception] = {}
        self._gone: dict[int, Exception] = {}
        self._ended: list[Ticket] = []

    @property
    def has_ended(self) -> bool:
        """Whether tickets wait to be collected."""
        return bool(self._ended)

    @property
    def has_sends(self) -> bool:
        """Whether sends are pending."""
        return bool(self._sends)

    @property
    def has_receives(self) -> bool:
        """Whether a receive waits for a message that has not begun to arrive."""
        return bool(self._waiting)

    def held_bytes(self, src: int) -> int:
        """Return the bytes of early mail that are held for a source."""
        return self._held.get(src, 0)

    def awaits(self, src: int) -> bool:
        """Tell whether a receive waits for a message of ``src`` that has not begun to arrive."""
        return src in self._waiting

    def drops(self, tag: int) -> bool:
        """Tell whether messages with a tag are dropped."""
        return bool(self._discarded) and self._discarded.covers(tag)

    def check_open(self) -> None:
        """Raise Closed once `close` was called."""
        if not self.is_open:
            raise Closed(f"the endpoint of rank {self._rank} is closed")

    def check(self, name: str, peer: int, tag: int, nbytes: int) -> None:
        """Raise for what may not be asked for, as `send` and `recv` do; ``name`` is that of the argument ``peer``."""
        self.check_open()
        if peer not in self.peers:
            raise UsageError(f"{name}={peer} is not connected; expected one of {sorted(self.peers)}")
        if not 0 <= tag <= LARGEST_TAG:
            raise UsageError(f"tag={tag} must be from 0 to {LARGEST_TAG}")
        if not 0 <= nbytes <= self.largest_message_bytes:
            raise UsageError(f"a message of {nbytes} bytes is not from 0 to {self.largest_message_bytes}")

    def send(self, dst: int, tag: int, nbytes: int, started_ns: int = 0) -> Ticket:
        """Return the ticket of a new send, which the transport ends with `end`.

        ``started_ns`` : when it is passed to the network; 0 if the transport sets it later.

        Raises
        ------
        UsageError
            If ``dst`` is not one of `peers`, ``tag`` is out of range or the message is too large.
        PeerLost, Closed
            If the peer is lost or the mailbox is closed.
        """
        self.check("dst", dst, tag, nbytes)
        if dst in self._unreachable:
            raise PeerLost(str(self._unreachable[dst])) from self._unreachable[dst]
        self._lift(tag)
        ticket = Ticket(TicketKind.SEND, dst, tag, nbytes, started_ns=started_ns)
        self._sends[ticket] = None
        return ticket

    def recv(self, src: int, tag: int, nbytes: int, into: memoryview | None, now_ns: int) -> Ticket:
        """Return the ticket of a new receive, which takes a message that is here or waits for one.

        Raises
        ------
        UsageError
            If ``src`` is not one of `peers`, ``tag`` is out of range, or ``into`` does not fit.
        PeerLost, Closed
            If the peer is lost and no message of it is left, or the mailbox is closed.
        """
        self.check("src", src, tag, nbytes)
        if into is not None:
            if into.readonly or into.nbytes != nbytes or not into.c_contiguous:
                raise UsageError(f"into has {into.nbytes} bytes; expected {nbytes} writable, contiguous bytes")
            into = into.cast("B")
        ticket, key = Ticket(TicketKind.RECV, src, tag, nbytes), (src, tag)
        early = self._early.get(key)
        if early is None and src in self._gone:
            raise PeerLost(str(self._gone[src])) from self._gone[src]
        self._lift(tag)
        if early is not None:
            arrival = _first_of(self._early, key, early)
            arrival.receive = ticket, into
            if arrival.is_complete:
                self._finish(arrival, now_ns)
        else:
            self._posted.setdefault(key, deque()).append((ticket, into))
            self._waiting[src] = self._waiting.get(src, 0) + 1
        return ticket

    def admits(self, src: int, tag: int, nbytes: int, *, in_order: bool = False) -> bool:
        """Tell whether a message may be taken in: it is asked for, or dropped, or there is room to hold it.

        What is not admitted may be asked about again after `recv` and `discard`, and after a message of that source has
        been taken. ``in_order`` : no later message of that source can be taken first; see the module's text.
        """
        if (src, tag) in self._posted or self.drops(tag):
            return True
        held_bytes = self._held.get(src, 0) + nbytes
        if held_bytes <= self._largest_held_bytes:
            return True
        return in_order and src in self._waiting and held_bytes <= self._largest_held_bytes * BEHIND

    def begin(self, src: int, tag: int, nbytes: int, now_ns: int) -> Arrival:
        """Take note of a message of which the header is here, and return where its bytes go.

        Messages with one tag are begun in the order in which their source sent them. An empty message ends at once.
        """
        posted = self._posted.get((src, tag))
        into = None if posted is None else posted[0][1]
        memory, owner = (into, None) if into is not None and into.nbytes == nbytes else self._memory(nbytes)
        arrival = Arrival(src, tag, memory, self._take_posted(src, tag), owner=owner)
        if arrival.receive is None:
            self._drop_or_hold(arrival)
        self._arriving.add(arrival)
        if not nbytes:
            self.advance(arrival, 0, now_ns)
        return arrival

    def advance(self, arrival: Arrival, count: int, now_ns: int) -> None:
        """Take note that the next ``count`` bytes of a message lie in its memory; the last one ends its receive."""
        arrival.filled_bytes += count
        if not arrival.is_complete:
            return
        self._arriving.discard(arrival)
        if arrival.receive is not None or arrival.is_dropped:
            self._finish(arrival, now_ns)

    def fail(self, arrival: Arrival, error: Exception, now_ns: int) -> None:
        """Take note that the rest of a message cannot be had: fails the receive that takes it, now or later.

        Its memory is free again: nobody writes to it any more.
        """
        arrival.error = error
        self.advance(arrival, arrival.memory.nbytes - arrival.filled_bytes, now_ns)

    def deliver(self, src: int, tag: int, data: memoryview, now_ns: int) -> None:
        """Take in a whole message, of which ``data`` is copied."""
        arrival = self.begin(src, tag, data.nbytes, now_ns)
        if data.nbytes:
            arrival.memory[:] = data
            self.advance(arrival, data.nbytes, now_ns)

    def keep(self, src: int, tag: int, data: memoryview, now_ns: int, owner: Owner | None = None) -> None:
        """Take in a whole message, flat bytes, that stays where it lies; ``owner`` hears when its memory is free again.

        That is when it was copied to the receive's own memory, when the view that was lent of it is released, or when
        it is dropped. The owner of a message that is still held when the mailbox is closed hears nothing.
        """
        arrival = Arrival(src, tag, data, self._take_posted(src, tag), filled_bytes=data.nbytes, owner=owner)
        if arrival.receive is None:
            self._drop_or_hold(arrival)
        if not arrival.is_early:
            self._finish(arrival, now_ns)

    def end(self, ticket: Ticket, status: TicketStatus, now_ns: int, error: Exception | None = None) -> None:
        """End a ticket, unless it has ended, so that `take_ended` returns it."""
        if ticket.status is not TicketStatus.PENDING:
            return
        is_send = ticket.kind is TicketKind.SEND
        if is_send:
            self._sends.pop(ticket, None)
        if status is TicketStatus.DONE:
            self.counters["messages_sent" if is_send else "messages_received"] += 1
            self.counters["bytes_sent" if is_send else "bytes_received"] += ticket.nbytes
        ticket.error, ticket.ended_ns, ticket.status = error, now_ns, status
        self._ended.append(ticket)

    def take_ended(self) -> list[Ticket]:
        """Return the tickets that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, ticket: Ticket, now_ns: int) -> bool:
        """End a receive that waits, or a send that the transport has taken back, as CANCELLED; see `Endpoint.cancel`.

        Returns False for what has ended, and for a receive whose message has begun to arrive.
        """
        if ticket.status is not TicketStatus.PENDING:
            return False
        if ticket.kind is TicketKind.SEND:
            self._sends.pop(ticket, None)
        elif not self._unpost(ticket):
            return False
        ticket.ended_ns, ticket.status = now_ns, TicketStatus.CANCELLED
        return True

    def discard(self, tag: int, bits: int, now_ns: int) -> None:
        """Drop what belongs to a prefix of tags, now and later; see `Endpoint.discard`.

        Raises
        ------
        UsageError
            If ``tag`` is out of range or ``bits`` is not from 0 to 64.
        Closed
            If the mailbox is closed.
        """
        self.check_open()
        if not (0 <= tag <= LARGEST_TAG and 0 <= bits <= TAG_BITS):
            raise UsageError(f"tag={tag}, bits={bits} must be from 0 to {LARGEST_TAG} and from 0 to {TAG_BITS}")
        self._discarded.add(tag, bits)
        for key in [key for key in self._posted if has_prefix(key[1], tag, bits)]:
            for ticket, _ in self._posted.pop(key):
                self._no_longer_waits(key[0])
                self.end(ticket, TicketStatus.CANCELLED, now_ns)
        for key in [key for key in self._early if has_prefix(key[1], tag, bits)]:
            for arrival in self._early.pop(key):
                arrival.is_dropped = True
                if arrival.is_complete:
                    self._finish(arrival, now_ns)
        for arrival in [arrival for arrival in self._arriving if has_prefix(arrival.tag, tag, bits)]:
            arrival.is_dropped = True
            if arrival.receive is not None and arrival.receive[1] is not arrival.memory:
                # Nobody writes to the memory of the caller, so its receive need not wait for the rest.
                self.end(arrival.receive[0], TicketStatus.CANCELLED, now_ns)
                arrival.receive = None

    def end_sends(self, peer: int, error: Exception, now_ns: int) -> None:
        """Fail the sends to a peer that takes no more messages; what it has sent may still be received."""
        self._unreachable.setdefault(peer, error)
        for ticket in [ticket for ticket in self._sends if ticket.peer == peer]:
            self.end(ticket, TicketStatus.FAILED, now_ns, error)

    def lose(self, peer: int, error: TransportError, now_ns: int) -> None:
        """Fail all tickets of a lost peer, but keep the messages that arrived from it before.

        Its messages that have not arrived whole are dropped, so the transport writes no more to their memory.
        """
        self.end_sends(peer, error, now_ns)
        self._gone.setdefault(peer, error)
        self._end_receives(peer, TicketStatus.FAILED, error, now_ns)

    def close(self, now_ns: int) -> None:
        """Cancel everything; whatever is asked for afterwards raises Closed. Idempotent."""
        if not self.is_open:
            return
        self.is_open = False
        for ticket in list(self._sends):
            self.end(ticket, TicketStatus.CANCELLED, now_ns)
        for peer in {*self._waiting, *(arrival.source for arrival in self._arriving)}:
            self._end_receives(peer, TicketStatus.CANCELLED, None, now_ns)
        self._early.clear()
        self._held.clear()

    def _lift(self, tag: int) -> None:
        if self._discarded:
            self._discarded.lift(tag)

    def _no_longer_waits(self, src: int) -> None:
        if self._waiting[src] == 1:
            del self._waiting[src]
        else:
            self._waiting[src] -= 1

    def _unpost(self, ticket: Ticket) -> bool:
        key = ticket.peer, ticket.tag
        posted: Iterable[Receive] = self._posted.get(key, ())
        kept = deque(receive for receive in posted if receive[0] is not ticket)
        if key not in self._posted or len(kept) == len(self._posted[key]):
            return False
        self._no_longer_waits(ticket.peer)
        if kept:
            self._posted[key] = kept
        else:
            del self._posted[key]
        return True

    def _take_posted(self, src: int, tag: int) -> Receive | None:
        """Take the receive that a message is for, if one waits.

        Then its tag is not dropped: `discard` ends the receives of such tags, and `recv` lifts what covers its own.
        """
        key = src, tag
        posted = self._posted.get(key)
        if posted is None:
            return None
        receive: Receive = _first_of(self._posted, key, posted)
        self._no_longer_waits(src)
        return receive

    def _drop_or_hold(self, arrival: Arrival) -> None:
        """Decide what becomes of a message that no receive waits for."""
        if self.drops(arrival.tag):
            arrival.is_dropped = True
            return
        src = arrival.source
        arrival.is_early = True
        self._early.setdefault((src, arrival.tag), deque()).append(arrival)
        self._held[src] = self._held.get(src, 0) + arrival.memory.nbytes

    def _finish(self, arrival: Arrival, now_ns: int) -> None:
        """End the receive of a message all of which is here, and hold it no longer."""
        self._hold_no_longer(arrival)
        receive, owner, memory = arrival.receive, arrival.owner, arrival.memory
        arrival.receive = None
        if receive is not None:
            ticket, into = receive
            if arrival.is_dropped:
                self.end(ticket, TicketStatus.CANCELLED, now_ns)
            elif arrival.error is not None:
                self.end(ticket, TicketStatus.FAILED, now_ns, arrival.error)
            elif memory.nbytes != ticket.nbytes:
                came = f"{memory.nbytes} bytes came from rank {ticket.peer} with tag {ticket.tag}"
                self.end(ticket, TicketStatus.FAILED, now_ns, FrameError(f"{came}; expected {ticket.nbytes}"))
            elif into is None:
                ticket.view = memory.toreadonly()
                ticket.lender, owner = owner, None
                self.end(ticket, TicketStatus.DONE, now_ns)
            else:
                if into is not memory:
                    into[:] = memory
                self.end(ticket, TicketStatus.DONE, now_ns)
        if owner is not None:
            owner.take_back(None)

    def _hold_no_longer(self, arrival: Arrival) -> None:
        if arrival.is_early:
            arrival.is_early = False
            self._held[arrival.source] -= arrival.memory.nbytes

    def _end_receives(self, peer: int, status: TicketStatus, error: Exception | None, now_ns: int) -> None:
        for key in [key for key in self._posted if key[0] == peer]:
            for ticket, _ in self._posted.pop(key):
                self._no_longer_waits(peer)
                self.end(ticket, status, now_ns, error)
        for arrival in [arrival for arrival in self._arriving if arrival.source == peer]:
            self._arriving.discard(arrival)
            self._hold_no_longer(arrival)
            if arrival.receive is not None:
                self.end(arrival.receive[0], status, now_ns, error)
            elif not arrival.is_dropped:
                key = peer, arrival.tag
                self._early[key].remove(arrival)
                if not self._early[key]:
                    del self._early[key]
            arrival.receive, arrival.is_dropped = None, True  # a thread may be about to take note of its last byte


def _fresh_memory(nbytes: int) -> tuple[memoryview, None]:
    """Return memory that is not cleared first, and that nobody waits for."""
    data: Any = np.empty(nbytes, np.uint8).data
    return memoryview(data), None


def _first_of(queues: dict[Key, deque[Any]], key: Key, queue: deque[Any]) -> Any:
    """Take the first of a queue, and forget a queue that ran empty, since tags need not come again."""
    first = queue.popleft()
    if not queue:
        del queues[key]
    return first
