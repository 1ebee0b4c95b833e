"""Messages over Gloo: what was posted, what has arrived, and a thread for each direction of each pair.

A message is a frame (kind, tag, size and, if it is small, the payload), followed by the payload if it is larger. The
messages of a pair travel in order. Who closes sends ``BYE`` to those to whom it has sent messages, and goes when they
have answered ``SEEN``, since a connection that is closed earlier may take its last messages with it.

One lock guards all of it. Threads never hold it while they wait for Gloo.
"""

from __future__ import annotations

import os
import struct
import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.discarding import Discarded, has_prefix
from detcoll.errors import FrameError, PeerLost, TransportError
from detcoll.transport import Clock, Ticket, TicketStatus
from detcoll_gloo.group import FOREVER, Group

_HEADER = struct.Struct("<B7xQQ")
FRAME_BYTES = 1024
INLINE_BYTES = FRAME_BYTES - _HEADER.size
JOIN_TIMEOUT_S = 10.0
_FRAME_TAG, _PAYLOAD_TAG = 0, 1
_DATA, _BYE, _SEEN = range(3)


@dataclass(eq=False, slots=True)
class _Posted:
    """A receive that waits for its message; where it ``is_dropped``, it ends once that is no longer being written."""

    ticket: Ticket
    into: memoryview | None
    is_dropped: bool = False


@dataclass(eq=False, slots=True)
class _Arrival:
    """A message for which no receive was posted when it came; ``posted`` is one that came while it still arrives."""

    memory: NDArray[np.uint8]
    is_complete: bool = False
    is_dropped: bool = False
    posted: _Posted | None = None


@dataclass(eq=False, slots=True)
class _Outgoing:
    """What a writer sends: a message with its ticket, or a word of its own."""

    kind: int
    tag: int = 0
    view: memoryview = field(default_factory=lambda: memoryview(b""))
    ticket: Ticket | None = None


class _Line:
    """The queue of messages to one peer; ``under_way`` is the one that its thread is sending."""

    def __init__(self, lock: threading.Lock) -> None:
        self.queue: deque[_Outgoing] = deque()
        self.under_way: _Outgoing | None = None
        self.filled = threading.Condition(lock)
        self.seen = False


class Mail:
    """All messages of one rank.

    It has many fields since Gloo needs its own queue for each stage of a message: wanted, posted, held, lent, sent.

    Parameters
    ----------
    group : Group
        The joined group.
    clock : Clock
        Of the endpoint.
    unexpected_bytes : int
        How much of one peer's mail is held before its receive is posted.
    """

    def __init__(self, group: Group, clock: Clock, unexpected_bytes: int) -> None:
        self._group = group
        self._clock = clock
        self._unexpected_bytes = unexpected_bytes
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._posted: defaultdict[tuple[int, int], deque[_Posted]] = defaultdict(deque)
        self._arrived: defaultdict[tuple[int, int], deque[_Arrival]] = defaultdict(deque)
        self._receiving: set[_Posted] = set()
        self._blocked: dict[int, int | None] = {}  # the tag of a peer's message for which there is no room; None: drop
        self._discarded = Discarded()
        self._held_bytes: defaultdict[int, int] = defaultdict(int)
        self._lines: dict[int, _Line] = {}
        self._lost: dict[int, TransportError] = {}
        self._ended: list[Ticket] = []
        self._threads: list[threading.Thread] = []
        self._is_closing = False
        self.counters = dict.fromkeys(("messages_sent", "bytes_sent", "messages_received", "bytes_received"), 0)

    def fileno(self) -> int:
        """Return an eventfd that is readable while tickets wait to be collected."""
        return self._eventfd

    def post_send(self, ticket: Ticket, view: memoryview) -> None:
        """Queue a message.

        Raises
        ------
        PeerLost
            If the peer is gone.
        """
        with self._lock:
            self._check_peer(ticket.peer)
            self._start()
            self._discarded.lift(ticket.tag)
            self._queue(ticket.peer, _Outgoing(_DATA, ticket.tag, view, ticket))

    def post_recv(self, ticket: Ticket, into: memoryview | None) -> None:
        """Match a receive with a message that is here, or let it wait for one.

        Raises
        ------
        PeerLost
            If the peer is gone, and no message of it is left.
        """
        key = ticket.peer, ticket.tag
        posted = _Posted(ticket, into)
        with self._lock:
            self._start()
            self._discarded.lift(ticket.tag)
            arrival = next((item for item in self._arrived.get(key, ()) if item.posted is None), None)
            if arrival is None:
                self._check_peer(ticket.peer)
                self._posted[key].append(posted)
                self._room.notify_all()
            elif arrival.is_complete:
                self._remove(self._arrived, key, arrival)
                self._hand_over(posted, arrival)
            else:
                arrival.posted = posted

    def collect(self, deadline_ns: int) -> list[Ticket]:
        """Return the tickets that ended, waiting until there is one or the deadline passes."""
        with self._lock:
            while not self._ended:
                remaining_ns = deadline_ns - self._clock.now_ns()
                if remaining_ns <= 0:
                    break
                self._news.wait(remaining_ns / 1e9)
            ended, self._ended = self._ended, []
            return ended

    def arm(self) -> bool:
        """Empty the descriptor; True if there is nothing to collect."""
        with self._lock:
            try:
                os.eventfd_read(self._eventfd)
            except BlockingIOError:
                return not self._ended
            if self._ended:
                os.eventfd_write(self._eventfd, 1)
            return not self._ended

    def cancel(self, ticket: Ticket) -> bool:
        """Take back what is not yet being moved."""
        with self._lock:
            key = ticket.peer, ticket.tag
            found = self._take_back_recv(key, ticket) or self._take_back_send(ticket)
            if found:
                self._end(ticket, TicketStatus.CANCELLED)
            return found

    def discard(self, tag: int, bits: int) -> None:
        """Drop what belongs to a prefix of tags, now and later."""
        with self._lock:
            self._start()
            self._discarded.add(tag, bits)
            for key in [key for key in self._posted if has_prefix(key[1], tag, bits)]:
                for posted in self._posted.pop(key):
                    self._end(posted.ticket, TicketStatus.CANCELLED, tell=True)
            for key in [key for key in self._arrived if has_prefix(key[1], tag, bits)]:
                for arrival in self._arrived.pop(key):
                    self._drop_arrival(key[0], arrival)
            for posted in [item for item in self._receiving if has_prefix(item.ticket.tag, tag, bits)]:
                posted.is_dropped = True
                if posted.into is None and posted.ticket.status is TicketStatus.PENDING:
                    self._end(posted.ticket, TicketStatus.CANCELLED, tell=True)
            for peer, blocked in self._blocked.items():
                if blocked is not None and has_prefix(blocked, tag, bits):
                    self._blocked[peer] = None
            self._room.notify_all()

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
            for peer in range(self._group.size):
                self._drop(peer, TicketStatus.CANCELLED, None)
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

    def _check_peer(self, peer: int) -> None:
        if peer in self._lost:
            raise PeerLost(f"rank {peer} is gone") from self._lost[peer]

    def _drop_arrival(self, peer: int, arrival: _Arrival) -> None:
        """Give back the room of a message that was held, once it is no longer being written."""
        if arrival.posted is not None:
            self._end(arrival.posted.ticket, TicketStatus.CANCELLED, tell=True)
            arrival.posted = None
        arrival.is_dropped = True
        if arrival.is_complete:
            self._held_bytes[peer] -= arrival.memory.size

    def _end(
        self, ticket: Ticket, status: TicketStatus, error: Exception | None = None, *, tell: bool = False
    ) -> None:  # fmt: skip
        ticket.error, ticket.ended_ns = error, self._clock.now_ns()
        ticket.status = status  # last, since the caller's thread may look at it any time
        if tell or status is not TicketStatus.CANCELLED:
            self._ended.append(ticket)
            os.eventfd_write(self._eventfd, 1)
        self._news.notify_all()

    @staticmethod
    def _remove(queues: dict[tuple[int, int], deque[Any]], key: tuple[int, int], item: object) -> None:
        queues[key].remove(item)
        if not queues[key]:
            del queues[key]

    def _take_back_recv(self, key: tuple[int, int], ticket: Ticket) -> bool:
        for posted in self._posted.get(key, ()):
            if posted.ticket is ticket:
                self._remove(self._posted, key, posted)
                return True
        for arrival in self._arrived.get(key, ()):
            if arrival.posted is not None and arrival.posted.ticket is ticket:
                following = self._posted.get(key)
                arrival.posted = following[0] if following else None
                if arrival.posted is not None:
                    self._remove(self._posted, key, arrival.posted)
                return True
        return False

    def _take_back_send(self, ticket: Ticket) -> bool:
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
                self._sent(line, outgoing)
        except RuntimeError as error:
            self._lose(peer, self._group.error(error, peer))

    def _next(self, line: _Line) -> _Outgoing | None:
        with self._lock:
            while not line.queue and not self._is_closing:
                line.filled.wait()
            if self._is_closing:
                return None
            line.under_way = line.queue.popleft()
            if line.under_way.ticket is not None:
                line.under_way.ticket.started_ns = self._clock.now_ns()
            return line.under_way

    def _sent(self, line: _Line, outgoing: _Outgoing) -> None:
        with self._lock:
            line.under_way = None
            if outgoing.ticket is not None:
                self.counters["messages_sent"] += 1
                self.counters["bytes_sent"] += outgoing.ticket.nbytes
                self._end(outgoing.ticket, TicketStatus.DONE)

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
        key = peer, tag
        place = self._find_place(key, nbytes)
        if place is None:
            return
        posted, memory, arrival = place
        if nbytes <= INLINE_BYTES:
            memory[:] = np.frombuffer(inline[:nbytes], np.uint8)
        else:
            self._group.start_recv(self._group.tensor(memory), peer, _PAYLOAD_TAG).wait(FOREVER)
        with self._lock:
            if posted is not None:
                self._receiving.discard(posted)
                self._settle(posted, memory)
            if arrival is None:
                return
            arrival.is_complete = True
            if arrival.is_dropped:
                self._drop_arrival(peer, arrival)
                self._room.notify_all()
            elif arrival.posted is not None:
                self._remove(self._arrived, key, arrival)
                self._hand_over(arrival.posted, arrival)

    def _find_place(
        self, key: tuple[int, int], nbytes: int
    ) -> tuple[_Posted | None, NDArray[np.uint8], _Arrival | None] | None:
        """Return where a message goes: to a posted receive, or to be held once there is room; None at the end.

        What is discarded goes to memory that neither a receive nor a held message has.
        """
        peer, tag = key
        with self._lock:
            while True:
                if self._is_closing:
                    return None
                if self._blocked.pop(peer, tag) is None or self._discarded.covers(tag):
                    return None, np.empty(nbytes, np.uint8), None
                queue = self._posted.get(key)
                if queue:
                    posted = queue[0]
                    self._remove(self._posted, key, posted)
                    self._receiving.add(posted)
                    if posted.into is not None and posted.ticket.nbytes == nbytes:
                        return posted, np.frombuffer(posted.into, np.uint8), None
                    return posted, np.empty(nbytes, np.uint8), None
                if self._held_bytes[peer] + nbytes <= self._unexpected_bytes:
                    self._held_bytes[peer] += nbytes
                    arrival = _Arrival(np.empty(nbytes, np.uint8))
                    self._arrived[key].append(arrival)
                    return None, arrival.memory, arrival
                self._blocked[peer] = tag
                self._room.wait()

    def _hand_over(self, posted: _Posted, arrival: _Arrival) -> None:
        """End a receive with a message that was held."""
        self._held_bytes[posted.ticket.peer] -= arrival.memory.size
        self._room.notify_all()
        if posted.into is not None and posted.into.nbytes == arrival.memory.size:
            np.frombuffer(posted.into, np.uint8)[:] = arrival.memory
        self._settle(posted, arrival.memory)

    def _settle(self, posted: _Posted, memory: NDArray[np.uint8]) -> None:
        """End a receive whose message is in ``memory``, or in ``into`` already."""
        ticket = posted.ticket
        if ticket.status is not TicketStatus.PENDING:
            return
        if posted.is_dropped:
            self._end(ticket, TicketStatus.CANCELLED, tell=True)
            return
        if memory.size != ticket.nbytes:
            text = f"{memory.size} bytes came from rank {ticket.peer} with tag {ticket.tag}; expected {ticket.nbytes}"
            self._end(ticket, TicketStatus.FAILED, FrameError(text))
            return
        if posted.into is None:
            data: Any = memory.data
            ticket.view = memoryview(data).toreadonly()
        self.counters["messages_received"] += 1
        self.counters["bytes_received"] += memory.size
        self._end(ticket, TicketStatus.DONE)

    def _lose(self, peer: int, error: TransportError) -> None:
        with self._lock:
            if not self._is_closing and peer not in self._lost:
                self._lost[peer] = error
                self._drop(peer, TicketStatus.FAILED, PeerLost(f"rank {peer} is gone: {error}"))
                self._news.notify_all()

    def _drop(self, peer: int, status: TicketStatus, error: Exception | None) -> None:
        """End all that waits for ``peer``."""
        waiting = [posted.ticket for key, queue in self._posted.items() if key[0] == peer for posted in queue]
        for key, queue in self._arrived.items():
            waiting += [item.posted.ticket for item in queue if item.posted is not None and key[0] == peer]
        waiting += [posted.ticket for posted in self._receiving if posted.ticket.peer == peer]
        line = self._lines.get(peer)
        if line is not None:
            waiting += [item.ticket for item in (line.under_way, *line.queue) if item is not None and item.ticket]
            line.queue = deque(item for item in line.queue if item.ticket is None)
        for key in [key for key in self._posted if key[0] == peer]:
            del self._posted[key]
        for ticket in waiting:
            if ticket.status is TicketStatus.PENDING:
                self._end(ticket, status, error)
