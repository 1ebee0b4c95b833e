"""Messages over MPI: a mailbox matches them, by tags of 64 bits, of which MPI itself has fewer.

Every message begins with a letter on one reserved tag of MPI: its tag, its size, a number, and, if it is small, its
bytes. What is larger follows under the number, which is a tag of MPI too, at the same time; the receiver asks MPI for
it when a receive wants it, so it goes straight into the caller's memory, and a message that nobody wants stays with
its sender. Letters are taken in the order in which they were sent, and messages with one tag are given to the mailbox
in that order: a small one waits outside behind a larger one that nobody wants yet.

Numbers are counted for each receiver and begin again when they are used up. MPI gives the first of two messages with
the same number to the first that asks for it. So where a letter brings a number that an earlier message still bears,
that one is fetched first, into the mailbox's memory; the two are never mixed up. It stands in front of those of its tag
that wait outside: numbers go round in order, so what was sent before it was let in already.

Letters are small enough to leave at once in every MPI library, so that a letter alone never waits for its receiver.
"""

from __future__ import annotations

import struct
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any

from detcoll.discarding import has_prefix
from detcoll.errors import PeerLost, TransportError
from detcoll.mailbox import Arrival, Key, Mailbox
from detcoll.transport import Clock, Ticket, TicketKind, TicketStatus
from detcoll_mpi.pool import Pool

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
class _Announced:
    """A message that waits outside the mailbox: the number under which it follows, or 0 and its bytes."""

    nbytes: int
    number: int
    data: memoryview


@dataclass(eq=False, slots=True)
class _Fetch:
    """A message under way from MPI into memory."""

    request: Any
    arrival: Arrival


class Mail:
    """All messages of one rank: its mailbox, and what MPI does to fill and empty it.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    comm : Comm
        On which nothing else sends messages, in the job's order of ranks.
    clock : Clock
        Of the endpoint.
    largest_message_bytes : int
        Of the transport's capabilities.
    numbers : int
        How many tags MPI has for messages that follow their letter.
    """

    def __init__(self, mpi: Any, comm: Any, clock: Clock, largest_message_bytes: int, numbers: int) -> None:
        self._mpi, self._comm, self._clock = mpi, comm, clock
        self._numbers = numbers
        # Without room for early mail, the mailbox admits just what a receive waits for and what is dropped.
        self._box = Mailbox(
            comm.Get_rank(), largest_message_bytes=largest_message_bytes, held_bytes=0, memory=Pool().take
        )
        self._last_number: defaultdict[int, int] = defaultdict(int)
        self._sending: dict[Ticket, _Sending] = {}
        self._letters: dict[int, deque[_Letter]] = {}
        self._outside: dict[Key, deque[_Announced]] = {}
        self._unasked: dict[tuple[int, int], int] = {}  # by source and number: tags of what MPI was not asked for
        self._fetching: list[_Fetch] = []
        self._any, self._state = mpi.ANY_SOURCE, mpi.Status()

    @property
    def is_open(self) -> bool:
        """Whether `end` was not called yet."""
        return self._box.is_open

    @property
    def peers(self) -> set[int]:
        """The ranks that messages may be exchanged with."""
        return self._box.peers

    @property
    def counters(self) -> dict[str, int]:
        """Messages and bytes sent and received."""
        return self._box.counters

    @property
    def is_sending(self) -> bool:
        """Whether MPI has not read all of what was sent."""
        return self._box.has_sends

    def check_open(self) -> None:
        """Raise Closed once `end` was called."""
        self._box.check_open()

    def send(self, dst: int, tag: int, view: memoryview) -> Ticket:
        """Send a message; the ticket ends when MPI has read all of it. See `Mailbox.send`.

        Raises
        ------
        PeerLost
            If MPI refuses.
        """
        nbytes, byte = view.nbytes, self._mpi.BYTE
        ticket = self._box.send(dst, tag, nbytes, self._clock.now_ns())
        try:
            number = 0 if nbytes <= INLINE_BYTES else self._next_number(dst)
            letter = HEADER.pack(tag, nbytes, number)
            if not number:
                letter += view
            requests = [self._comm.Isend([letter, byte], dst, LETTER_TAG)]
            if number:
                requests.append(self._comm.Isend([view, byte], dst, number))
        except BaseException as error:
            self._box.cancel(ticket, self._clock.now_ns())
            if isinstance(error, self._mpi.Exception):
                raise _lost(error, dst) from error
            raise
        sending = self._sending[ticket] = _Sending(ticket, requests, (letter, view))
        self._advance_send(sending)
        return ticket

    def recv(self, src: int, tag: int, nbytes: int, into: memoryview | None) -> Ticket:
        """Take a message that was announced, or wait for one; see `Mailbox.recv`."""
        ticket = self._box.recv(src, tag, nbytes, into, self._clock.now_ns())
        if self._outside:
            self._look_outside((src, tag))
        return ticket

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
        return self._box.take_ended()

    def cancel(self, ticket: Ticket) -> bool:
        """End a receive whose message was not announced yet; MPI takes neither sends nor the rest back."""
        return ticket.kind is TicketKind.RECV and self._box.cancel(ticket, self._clock.now_ns())

    def discard(self, tag: int, bits: int) -> None:
        """Drop what belongs to a prefix of tags, now and later; see `Mailbox.discard`."""
        self._box.discard(tag, bits, self._clock.now_ns())
        for key in [key for key in self._outside if has_prefix(key[1], tag, bits)]:
            self._look_outside(key)

    def end(self) -> bool:
        """Drop everything; False if MPI may still have messages of this mail, so that its communicator must stay."""
        clean = not (self._unasked or self._fetching or self._sending or self._letters)
        self._box.close(self._clock.now_ns())
        _unfinished.extend([*self._sending.values(), *self._fetching, *self._letters.values()])
        for everything in (self._outside, self._unasked, self._fetching, self._letters, self._sending):
            everything.clear()
        return clean

    def _next_number(self, dst: int) -> int:
        number = self._last_number[dst] % self._numbers + 1
        self._last_number[dst] = number
        return number

    def _advance_send(self, sending: _Sending) -> None:
        """End a send if MPI is done with all of it."""
        ticket = sending.ticket
        try:
            while sending.requests and sending.requests[0].Test():
                del sending.requests[0]
        except self._mpi.Exception as error:
            self._box.end(ticket, TicketStatus.FAILED, self._clock.now_ns(), _lost(error, ticket.peer))
        else:
            if sending.requests:
                return
            self._box.end(ticket, TicketStatus.DONE, self._clock.now_ns())
        del self._sending[ticket]

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
        """Put a message behind those of its tag that wait outside, and let it in if it may."""
        tag, nbytes, number = HEADER.unpack_from(letter)
        if number:
            earlier = self._unasked.get((src, number))
            if earlier is not None:
                self._let_in((src, earlier), self._outside[src, earlier].popleft())
                self._look_outside((src, earlier))
            self._unasked[src, number] = tag
        key, message = (src, tag), _Announced(nbytes, number, memoryview(letter)[HEADER.size :])
        if number or key in self._outside:
            self._outside.setdefault(key, deque()).append(message)
            self._look_outside(key)
        else:
            self._let_in(key, message)

    def _look_outside(self, key: Key) -> None:
        """Let in what is wanted, dropped, or here already, in order."""
        waiting = self._outside.get(key)
        if waiting is None:
            return
        while waiting and (not waiting[0].number or self._box.admits(*key, waiting[0].nbytes)):
            self._let_in(key, waiting.popleft())
        if not waiting:
            del self._outside[key]

    def _let_in(self, key: Key, message: _Announced) -> None:
        """Give a message to the mailbox, and ask MPI for what follows its letter, to where it belongs."""
        (src, tag), number = key, message.number
        if not number:
            self._box.keep(src, tag, message.data, self._clock.now_ns())
            return
        del self._unasked[src, number]
        arrival = self._box.begin(src, tag, message.nbytes, self._clock.now_ns())
        try:
            request = self._comm.Irecv([arrival.memory, self._mpi.BYTE], src, number)
        except self._mpi.Exception as error:
            self._box.fail(arrival, _lost(error, src), self._clock.now_ns())
            return
        fetch = _Fetch(request, arrival)
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
            arrival.owner = None  # MPI may go on writing, so this memory is not used again
            self._box.fail(arrival, _lost(error, arrival.source), self._clock.now_ns())
            return
        self._fetching.remove(fetch)
        self._box.advance(arrival, arrival.memory.nbytes, self._clock.now_ns())


def _lost(error: Exception, peer: int) -> PeerLost:
    mapped = PeerLost(f"MPI lost rank {peer}: {error}")
    mapped.__cause__ = error
    return mapped
