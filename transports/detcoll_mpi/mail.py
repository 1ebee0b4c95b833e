"""Messages over MPI, matched by source and by tags of 64 bits, of which MPI itself has fewer.

Every message begins with a letter on one reserved tag of MPI: its tag, its size, a number, and, if it is small, its
bytes. What is larger follows under the number, which is a tag of MPI too, at the same time; the receiver asks MPI for
it when a receive wants it, so it goes straight into the caller's memory, and a message that nobody wants stays with
its sender. Letters are taken in the order in which they were sent, so matching is ours and exact.

Numbers are counted for each receiver and begin again when they are used up. MPI gives the first of two messages with
the same number to the first that asks for it. So where a letter brings a number that an earlier message still bears,
that one is fetched first, into memory of ours; the two are never mixed up.

Letters are small enough to leave at once in every MPI library, so that a letter alone never waits for its receiver.
"""

from __future__ import annotations

import struct
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any

from detcoll.discarding import Discarded, has_prefix
from detcoll.errors import FrameError, PeerLost, TransportError
from detcoll.transport import Clock, Ticket, TicketStatus
from detcoll_mpi.pool import Loan, Pool

HEADER = struct.Struct("<QQI")
"""Tag, size in bytes, and the number under which the message follows; 0 where it is in the letter."""

LETTER_BYTES = 4000
"""Open MPI sends up to 4,096 bytes at once between processes of one host, its own header included."""

INLINE_BYTES = LETTER_BYTES - HEADER.size
LETTER_TAG = 0
LETTERS_A_TURN = 64
"""So many letters are taken before a caller may look at its deadline."""

_unfinished: list[Any] = []
"""What MPI may still read or write after its endpoint was closed: the memory must stay until MPI is done with it."""


@dataclass(eq=False, slots=True)
class _Sending:
    """A send under way: what MPI is still doing for it, and the memory that it reads."""

    ticket: Ticket
    requests: list[Any]
    memory: tuple[bytes, memoryview]


@dataclass(eq=False, slots=True)
class _Letter:
    """A letter that is not all here yet."""

    request: Any
    data: bytearray


@dataclass(eq=False, slots=True)
class _Posted:
    """A receive."""

    ticket: Ticket
    into: memoryview | None


@dataclass(eq=False, slots=True)
class _Arrival:
    """A message that was announced: its bytes once they are here, or else the number under which they follow."""

    src: int
    tag: int
    nbytes: int
    number: int
    data: memoryview | None = None
    posted: _Posted | None = None
    loan: Loan | None = None
    is_dropped: bool = False


@dataclass(eq=False, slots=True)
class _Fetch:
    """A message under way from MPI into memory."""

    request: Any
    arrival: _Arrival
    memory: memoryview


class Mail:
    """All messages of one rank.

    It has many fields since MPI needs its own queue for each stage of a message: letters, bodies, held, lent, sent.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    comm : Comm
        On which nothing else sends messages, in the job's order of ranks.
    clock : Clock
        Of the endpoint.
    numbers : int
        How many tags MPI has for messages that follow their letter.
    """

    def __init__(self, mpi: Any, comm: Any, clock: Clock, numbers: int) -> None:
        self._mpi, self._comm, self._clock = mpi, comm, clock
        self._numbers = numbers
        self._last_number: defaultdict[int, int] = defaultdict(int)
        self._pool = Pool()
        self._sending: dict[Ticket, _Sending] = {}
        self._letters: dict[int, deque[_Letter]] = {}
        self._posted: defaultdict[tuple[int, int], deque[_Posted]] = defaultdict(deque)
        self._arrived: defaultdict[tuple[int, int], deque[_Arrival]] = defaultdict(deque)
        self._waiting: dict[tuple[int, int], _Arrival] = {}  # by source and number: those that MPI was not asked for
        self._fetching: list[_Fetch] = []
        self._discarded = Discarded()
        self._ended: list[Ticket] = []
        self._any, self._state = mpi.ANY_SOURCE, mpi.Status()
        self.counters = dict.fromkeys(("messages_sent", "bytes_sent", "messages_received", "bytes_received"), 0)

    def send(self, ticket: Ticket, view: memoryview) -> None:
        """Send a message; the ticket ends when MPI has read all of it.

        Raises
        ------
        PeerLost
            If MPI refuses.
        """
        if self._discarded:
            self._discarded.lift(ticket.tag)
        dst, nbytes, byte = ticket.peer, ticket.nbytes, self._mpi.BYTE
        number = 0 if nbytes <= INLINE_BYTES else self._next_number(dst)
        letter = HEADER.pack(ticket.tag, nbytes, number)
        if not number:
            letter += view
        try:
            requests = [self._comm.Isend([letter, byte], dst, LETTER_TAG)]
            if number:
                requests.append(self._comm.Isend([view, byte], dst, number))
        except self._mpi.Exception as error:
            raise _lost(error, dst) from error
        sending = self._sending[ticket] = _Sending(ticket, requests, (letter, view))
        self._advance_send(sending)

    def receive(self, ticket: Ticket, into: memoryview | None) -> None:
        """Match a receive with a message that was announced, or let it wait for one."""
        if self._discarded:
            self._discarded.lift(ticket.tag)
        key = ticket.peer, ticket.tag
        posted = _Posted(ticket, into)
        if self._arrived.get(key):
            self._match(posted, _pop(self._arrived, key))
        else:
            self._posted[key].append(posted)

    def progress(self) -> None:
        """Take what came and end what is done.

        Raises
        ------
        TransportError
            If MPI fails in a way that concerns no peer in particular.
        """
        try:
            self._take_letters()
        except self._mpi.Exception as error:
            raise TransportError(f"MPI failed: {error}") from error
        if self._fetching:
            for fetch in list(self._fetching):
                self._advance_fetch(fetch)
        if self._sending:
            for sending in list(self._sending.values()):
                self._advance_send(sending)

    def collect(self) -> list[Ticket]:
        """Return the tickets that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, ticket: Ticket) -> bool:
        """End a receive whose message was not announced yet; MPI takes neither sends nor the rest back."""
        key = ticket.peer, ticket.tag
        for posted in self._posted.get(key, ()):
            if posted.ticket is ticket:
                self._posted[key].remove(posted)
                if not self._posted[key]:
                    del self._posted[key]
                self._end(ticket, TicketStatus.CANCELLED, tell=False)
                return True
        return False

    def discard(self, tag: int, bits: int) -> None:
        """Drop what belongs to a prefix of tags, now and later."""
        self._discarded.add(tag, bits)
        for key in [key for key in self._posted if has_prefix(key[1], tag, bits)]:
            for posted in self._posted.pop(key):
                self._end(posted.ticket, TicketStatus.CANCELLED)
        for key in [key for key in self._arrived if has_prefix(key[1], tag, bits)]:
            for arrival in self._arrived.pop(key):
                self._drop(arrival)
        for fetch in self._fetching:
            if has_prefix(fetch.arrival.tag, tag, bits):
                fetch.arrival.is_dropped = True
                self._end_lent(fetch.arrival)

    @property
    def is_sending(self) -> bool:
        """Whether MPI has not read all of what was sent."""
        return bool(self._sending)

    def end(self) -> bool:
        """Drop everything; False if MPI may still have messages of this mail, so that its communicator must stay."""
        clean = not (self._waiting or self._fetching or self._sending or self._letters)
        tickets = [posted.ticket for queue in self._posted.values() for posted in queue]
        tickets += [fetch.arrival.posted.ticket for fetch in self._fetching if fetch.arrival.posted is not None]
        for ticket in [*tickets, *self._sending]:
            if ticket.status is TicketStatus.PENDING:
                self._end(ticket, TicketStatus.CANCELLED, tell=False)
        _unfinished.extend([*self._sending.values(), *self._fetching, *self._letters.values()])
        for everything in (self._posted, self._arrived, self._waiting, self._fetching, self._letters, self._sending):
            everything.clear()
        return clean

    def _next_number(self, dst: int) -> int:
        number = self._last_number[dst] % self._numbers + 1
        self._last_number[dst] = number
        return number

    def _advance_send(self, sending: _Sending) -> None:
        """End a send if MPI is done with all of it."""
        try:
            while sending.requests and sending.requests[0].Test():
                del sending.requests[0]
        except self._mpi.Exception as error:
            self._fail(sending.ticket, _lost(error, sending.ticket.peer))
        else:
            if sending.requests:
                return
            self.counters["messages_sent"] += 1
            self.counters["bytes_sent"] += sending.ticket.nbytes
            self._end(sending.ticket, TicketStatus.DONE)
        del self._sending[sending.ticket]

    def _take_letters(self) -> None:
        """Read the letters that are here, those of one source in the order in which they were sent."""
        if self._letters:
            for src, letters in list(self._letters.items()):
                self._open_letters(src, letters)
        state = self._state
        for _ in range(LETTERS_A_TURN):
            message = self._comm.Improbe(self._any, LETTER_TAG, state)
            if message is None:
                return
            src, data = state.source, bytearray(state.count)
            request = message.Irecv([data, self._mpi.BYTE])
            if src in self._letters:
                self._letters[src].append(_Letter(request, data))
            elif request.Test():
                self._read(src, data)
            else:
                self._letters[src] = deque([_Letter(request, data)])

    def _open_letters(self, src: int, letters: deque[_Letter]) -> None:
        while letters and letters[0].request.Test():
            self._read(src, letters.popleft().data)
        if not letters:
            del self._letters[src]

    def _read(self, src: int, letter: bytearray) -> None:
        """Give a message that is announced to the receive that waits for it, or keep it."""
        tag, nbytes, number = HEADER.unpack_from(letter)
        arrival = _Arrival(src, tag, nbytes, number)
        if not number:
            arrival.data = memoryview(letter)[HEADER.size :]
        else:
            earlier = self._waiting.get((src, number))
            if earlier is not None:
                self._fetch(earlier)
            self._waiting[src, number] = arrival
        key = src, tag
        if self._discarded and self._discarded.covers(tag):
            self._drop(arrival)
        elif self._posted.get(key):
            self._match(_pop(self._posted, key), arrival)
        else:
            self._arrived[key].append(arrival)

    def _match(self, posted: _Posted, arrival: _Arrival) -> None:
        """Give a message to a receive, now or when it is here."""
        if arrival.data is not None:
            self._give(posted, arrival)
        elif posted.ticket.nbytes != arrival.nbytes:
            self._fail(posted.ticket, _wrong_size(posted.ticket, arrival))
            self._drop(arrival)
        else:
            arrival.posted = posted
            self._fetch(arrival)

    def _give(self, posted: _Posted, arrival: _Arrival) -> None:
        """End a receive with a message that is here, in memory of ours or in the caller's already."""
        ticket, data = posted.ticket, arrival.data
        assert data is not None
        if ticket.nbytes != arrival.nbytes:
            self._fail(ticket, _wrong_size(ticket, arrival))
            self._release(arrival)
            return
        if posted.into is None:
            ticket.lender, ticket.view = arrival.loan, data.toreadonly()
        else:
            if data is not posted.into:
                posted.into[:] = data
            self._release(arrival)
        self.counters["messages_received"] += 1
        self.counters["bytes_received"] += ticket.nbytes
        self._end(ticket, TicketStatus.DONE)

    def _drop(self, arrival: _Arrival) -> None:
        """Forget a message; what follows its letter must be fetched all the same, or its sender would wait for ever."""
        arrival.is_dropped = True
        self._end_lent(arrival)
        if arrival.data is not None:
            self._release(arrival)
        else:
            self._fetch(arrival)

    def _end_lent(self, arrival: _Arrival) -> None:
        """End the receive of a message that is dropped, unless MPI is writing to the caller's memory."""
        posted = arrival.posted
        if posted is not None and (posted.into is None or arrival.loan is not None):
            arrival.posted = None
            self._end(posted.ticket, TicketStatus.CANCELLED)

    def _fetch(self, arrival: _Arrival) -> None:
        """Ask MPI for what follows a letter, unless it was asked already."""
        if self._waiting.get((arrival.src, arrival.number)) is not arrival:
            return
        del self._waiting[arrival.src, arrival.number]
        memory = arrival.posted.into if arrival.posted is not None else None
        if memory is None:
            arrival.loan = Loan(self._pool, self._pool.take(arrival.nbytes))
            memory = arrival.loan.memory(arrival.nbytes)
        try:
            request = self._comm.Irecv([memory, self._mpi.BYTE], arrival.src, arrival.number)
        except self._mpi.Exception as error:
            self._miss(arrival, error)
            return
        fetch = _Fetch(request, arrival, memory)
        self._fetching.append(fetch)
        self._advance_fetch(fetch)

    def _advance_fetch(self, fetch: _Fetch) -> None:
        """Hand over what MPI has fetched."""
        arrival = fetch.arrival
        try:
            if not fetch.request.Test():
                return
        except self._mpi.Exception as error:
            self._fetching.remove(fetch)
            self._miss(arrival, error)
            return
        self._fetching.remove(fetch)
        arrival.data = fetch.memory
        if arrival.is_dropped:
            self._release(arrival)
            if arrival.posted is not None:
                self._end(arrival.posted.ticket, TicketStatus.CANCELLED)
        elif arrival.posted is not None:
            self._give(arrival.posted, arrival)

    def _miss(self, arrival: _Arrival, error: Exception) -> None:
        """Fail the receive of a message that MPI cannot fetch."""
        if arrival.posted is not None:
            self._fail(arrival.posted.ticket, _lost(error, arrival.src))

    def _release(self, arrival: _Arrival) -> None:
        if arrival.loan is not None:
            arrival.loan.give_back()

    def _end(self, ticket: Ticket, status: TicketStatus, *, tell: bool = True) -> None:
        ticket.status = status
        ticket.ended_ns = self._clock.now_ns()
        if tell:
            self._ended.append(ticket)

    def _fail(self, ticket: Ticket, error: TransportError) -> None:
        ticket.error = error
        self._end(ticket, TicketStatus.FAILED)


def _pop(queues: dict[tuple[int, int], deque[Any]], key: tuple[int, int]) -> Any:
    """Take the first of a queue, and forget the queue if it ran empty, since tags need not come again."""
    first = queues[key].popleft()
    if not queues[key]:
        del queues[key]
    return first


def _wrong_size(ticket: Ticket, arrival: _Arrival) -> FrameError:
    came = f"{arrival.nbytes} bytes came from rank {ticket.peer} with tag {ticket.tag}"
    return FrameError(f"{came}; expected {ticket.nbytes}")


def _lost(error: Exception, peer: int) -> PeerLost:
    mapped = PeerLost(f"MPI lost rank {peer}: {error}")
    mapped.__cause__ = error
    return mapped
