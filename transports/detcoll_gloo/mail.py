"""Messages over Gloo: a mailbox, and a thread for each direction of each pair.

A message is a frame (kind, tag, size and, if it is small, the payload), followed by the payload if it is larger. The
messages of a pair travel in order. Who closes sends ``BYE`` to those to whom it has sent messages, and goes when they
have answered ``SEEN``, since a connection that is closed earlier may take its last messages with it.

One lock guards all of it. Threads never hold it while they wait for Gloo.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from detcoll.errors import PeerLost, TransportError
from detcoll.mailbox import Arrival, Mailbox
from detcoll.transport import Clock, Ticket, TicketKind, TicketStatus
from detcoll_gloo.group import FOREVER, Group

_HEADER = struct.Struct("<B7xQQ")
FRAME_BYTES = 1024
INLINE_BYTES = FRAME_BYTES - _HEADER.size
JOIN_TIMEOUT_S = 10.0
_FRAME_TAG, _PAYLOAD_TAG = 0, 1
_DATA, _BYE, _SEEN = range(3)


@dataclass(eq=False, slots=True)
class _Outgoing:
    """What a writer sends: a message with its ticket, or a word of its own."""

    kind: int
    tag: int = 0
    view: memoryview = field(default_factory=lambda: memoryview(b""))
    ticket: Ticket | None = None


class _Line:
    """The queue of messages to one peer; ``seen`` once it has answered the goodbye."""

    def __init__(self, lock: threading.Lock) -> None:
        self.queue: deque[_Outgoing] = deque()
        self.filled = threading.Condition(lock)
        self.seen = False


class Mail:
    """All messages of one rank: the mailbox, and a thread for each direction of each pair that fills and empties it.

    Parameters
    ----------
    group : Group
        The joined group.
    clock : Clock
        Of the endpoint.
    largest_message_bytes : int
        Of the transport's capabilities.
    unexpected_bytes : int
        How much of one peer's mail is held before its receive is posted.
    """

    def __init__(self, group: Group, clock: Clock, largest_message_bytes: int, unexpected_bytes: int) -> None:
        self._group = group
        self._clock = clock
        self._box = Mailbox(
            group.rank, largest_message_bytes=largest_message_bytes, held_bytes=unexpected_bytes
        )  # fmt: skip
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._outside: dict[int, tuple[int, int]] = {}  # tag and size of a peer's message that finds no room
        self._let_in: dict[int, Arrival] = {}
        self._lines: dict[int, _Line] = {}
        self._lost: set[int] = set()
        self._threads: list[threading.Thread] = []
        self._is_closing = self._is_told = False

    @property
    def peers(self) -> set[int]:
        """The ranks that messages may be exchanged with."""
        return self._box.peers

    @property
    def counters(self) -> dict[str, int]:
        """Messages and bytes sent and received."""
        return self._box.counters

    def fileno(self) -> int:
        """Return an eventfd that is readable while tickets wait to be collected."""
        return self._eventfd

    def send(self, dst: int, tag: int, view: memoryview) -> Ticket:
        """Queue a message; see `Mailbox.send`."""
        with self._lock:
            ticket = self._box.send(dst, tag, view.nbytes, self._clock.now_ns())
            self._start()
            self._queue(dst, _Outgoing(_DATA, tag, view, ticket))
            return ticket

    def recv(self, src: int, tag: int, nbytes: int, into: memoryview | None) -> Ticket:
        """Take a message that is here, or wait for one; see `Mailbox.recv`."""
        with self._lock:
            ticket = self._box.recv(src, tag, nbytes, into, self._clock.now_ns())
            self._start()
            self._look_outside(src)
            self._tell()
            return ticket

    def collect(self, deadline_ns: int) -> list[Ticket]:
        """Return the tickets that ended, waiting until there is one or the deadline passes."""
        with self._lock:
            while not self._box.has_ended:
                remaining_ns = deadline_ns - self._clock.now_ns()
                if remaining_ns <= 0:
                    break
                self._news.wait(remaining_ns / 1e9)
            self._is_told = False
            return self._box.take_ended()

    def arm(self) -> bool:
        """Empty the descriptor; True if there is nothing to collect."""
        with self._lock:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._eventfd)
            self._is_told = False
            self._tell()
            return not self._box.has_ended

    def cancel(self, ticket: Ticket) -> bool:
        """Take back what is not yet being moved."""
        with self._lock:
            is_send = ticket.kind is TicketKind.SEND
            return (not is_send or self._take_back(ticket)) and self._box.cancel(ticket, self._clock.now_ns())

    def discard(self, tag: int, bits: int) -> None:
        """Drop what belongs to a prefix of tags, now and later."""
        with self._lock:
            self._box.discard(tag, bits, self._clock.now_ns())
            self._start()
            for peer in list(self._outside):
                self._look_outside(peer)
            self._tell()

    def close(self, deadline_ns: int) -> None:
        """Wait until what was sent has been seen by its receivers, then end all threads."""
        with self._lock:
            for peer in self._lines:
                if peer not in self._lost:
                    self._queue(peer, _Outgoing(_BYE))
            while not all(line.seen or peer in self._lost for peer, line in self._lines.items()):
                remaining_ns = deadline_ns - self._clock.now_ns()
                if remaining_ns <= 0:
                    break
                self._news.wait(remaining_ns / 1e9)
        self.abort()

    def abort(self) -> None:
        """Close the connections, end all threads, and cancel what is pending."""
        with self._lock:
            self._is_closing = True
            self._room.notify_all()
            for line in self._lines.values():
                line.filled.notify_all()
        self._group.end()
        for thread in self._threads:
            thread.join(JOIN_TIMEOUT_S)
        with self._lock:
            self._box.close(self._clock.now_ns())
        os.close(self._eventfd)

    def _start(self) -> None:
        """Start a reader for each peer, at the first message."""
        if self._threads:
            return
        for peer in range(self._group.size):
            if peer != self._group.rank:
                self._spawn(self._read, peer, "from")

    def _spawn(self, run: Any, peer: int, direction: str) -> None:
        thread = threading.Thread(target=run, args=(peer,), name=f"detcoll Gloo {direction} {peer}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _queue(self, peer: int, outgoing: _Outgoing) -> None:
        line = self._lines.get(peer)
        if line is None:
            line = self._lines[peer] = _Line(self._lock)
            self._spawn(self._write, peer, "to")
        line.queue.append(outgoing)
        line.filled.notify_all()

    def _tell(self) -> None:
        """Wake up who waits for tickets, if some have ended and nobody was told yet."""
        if self._box.has_ended and not (self._is_told or self._is_closing):
            self._is_told = True
            os.eventfd_write(self._eventfd, 1)
            self._news.notify_all()

    def _take_back(self, ticket: Ticket) -> bool:
        line = self._lines.get(ticket.peer)
        for outgoing in line.queue if line is not None else ():
            if outgoing.ticket is ticket:
                assert line is not None
                line.queue.remove(outgoing)
                return True
        return False

    def _write(self, peer: int) -> None:
        """Send what is queued for ``peer``, until the end."""
        line = self._lines[peer]
        frame = bytearray(FRAME_BYTES)
        try:
            while (outgoing := self._next(line)) is not None:
                view = outgoing.view
                _HEADER.pack_into(frame, 0, outgoing.kind, outgoing.tag, view.nbytes)
                if 0 < view.nbytes <= INLINE_BYTES:
                    frame[_HEADER.size : _HEADER.size + view.nbytes] = view
                self._group.start_send(self._group.bytes_tensor(memoryview(frame)), peer, _FRAME_TAG).wait(FOREVER)
                if view.nbytes > INLINE_BYTES:
                    self._group.start_send(self._group.bytes_tensor(view), peer, _PAYLOAD_TAG).wait(FOREVER)
                self._sent(outgoing)
        except RuntimeError as error:
            self._lose(peer, self._group.error(error, peer))

    def _next(self, line: _Line) -> _Outgoing | None:
        with self._lock:
            while not line.queue and not self._is_closing:
                line.filled.wait()
            if self._is_closing:
                return None
            outgoing = line.queue.popleft()
            if outgoing.ticket is not None:
                outgoing.ticket.started_ns = self._clock.now_ns()
            return outgoing

    def _sent(self, outgoing: _Outgoing) -> None:
        with self._lock:
            if outgoing.ticket is not None:
                self._box.end(outgoing.ticket, TicketStatus.DONE, self._clock.now_ns())
                self._tell()

    def _read(self, peer: int) -> None:
        """Receive what ``peer`` sends, until it goes."""
        frame = bytearray(FRAME_BYTES)
        try:
            while not self._is_closing:
                self._group.start_recv(self._group.bytes_tensor(memoryview(frame)), peer, _FRAME_TAG).wait(FOREVER)
                kind, tag, nbytes = _HEADER.unpack_from(frame)
                if kind == _DATA:
                    self._receive(peer, tag, nbytes, memoryview(frame)[_HEADER.size :])
                else:
                    self._hear(peer, kind)
        except RuntimeError as error:
            self._lose(peer, self._group.error(error, peer))

    def _hear(self, peer: int, kind: int) -> None:
        """Take a word of another mail."""
        if kind == _BYE:
            with self._lock:
                self._queue(peer, _Outgoing(_SEEN))
            self._lose(peer, PeerLost(f"rank {peer} closed its endpoint"))
            return
        with self._lock:
            self._lines[peer].seen = True
            self._news.notify_all()

    def _receive(self, peer: int, tag: int, nbytes: int, inline: memoryview) -> None:
        """Receive one message to where it belongs."""
        arrival = self._admit(peer, tag, nbytes)
        if arrival is None or not nbytes:
            return
        if nbytes <= INLINE_BYTES:
            arrival.memory[:] = inline[:nbytes]
        else:
            self._group.start_recv(self._group.bytes_tensor(arrival.memory), peer, _PAYLOAD_TAG).wait(FOREVER)
        with self._lock:
            self._box.advance(arrival, nbytes, self._clock.now_ns())
            self._tell()

    def _admit(self, peer: int, tag: int, nbytes: int) -> Arrival | None:
        """Return where a message goes, once there is room for it; None at the end."""
        with self._lock:
            self._outside[peer] = tag, nbytes
            self._look_outside(peer)
            while peer not in self._let_in and not self._is_closing:
                self._room.wait()
            self._tell()
            return self._let_in.pop(peer, None)

    def _look_outside(self, peer: int) -> None:
        """Begin a peer's message that found no room, if there is room now: whoever makes it decides what it is for."""
        tag, nbytes = self._outside.get(peer, (0, 0))
        if peer in self._outside and self._box.admits(peer, tag, nbytes, in_order=True):
            del self._outside[peer]
            self._let_in[peer] = self._box.begin(peer, tag, nbytes, self._clock.now_ns())
            self._room.notify_all()

    def _lose(self, peer: int, error: TransportError) -> None:
        with self._lock:
            if self._is_closing or peer in self._lost:
                return
            self._lost.add(peer)
            self._box.lose(peer, PeerLost(f"rank {peer} is gone: {error}"), self._clock.now_ns())
            line = self._lines.get(peer)
            if line is not None:
                line.queue = deque(item for item in line.queue if item.ticket is None)
            self._tell()
            self._news.notify_all()
