"""An in-memory transport: all ranks live in one process, each in a thread or all driven from one.

It keeps the SPI to the letter, so that code above it is tested without sockets. It is strict where a real transport
is lenient: the memory of a lent view is overwritten when it is released, so that a late reader reads garbage.

Options: ``capacity_bytes``, how much of one peer's mail is held before its receive is posted (what does not fit stays
with the sender, whose ticket stays pending); ``timed``, whether sends keep to their windows. A timed endpoint has no
descriptor, since nothing would wake it when a window opens.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from detcoll.discarding import Discarded, has_prefix
from detcoll.errors import Closed, ConnectError, FrameError, PeerLost, TransportUnavailable, UsageError
from detcoll.transport import (
    LARGEST_TAG,
    TAG_BITS,
    Capabilities,
    Clock,
    Endpoint,
    Rendezvous,
    Scope,
    Ticket,
    TicketKind,
    TicketStatus,
    Transport,
    Window,
)

OPEN_TIMEOUT_NS = 30 * 10**9
CAPACITY_BYTES = 2**26
_GARBAGE = b"\xdd"

_hubs: WeakValueDictionary[str, _Hub] = WeakValueDictionary()


class _Hub:
    """What the endpoints of one job share: a lock, and who is there."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.endpoints: dict[int, MemoryEndpoint] = {}


@dataclass(eq=False, slots=True)
class _Message:
    """One message: ``data`` is the sender's own memory while ``held`` is False, a copy afterwards."""

    source: MemoryEndpoint
    ticket: Ticket
    data: memoryview
    held: bool = False


@dataclass(eq=False, slots=True)
class _Timed:
    """A send that waits for its window, or behind one that does."""

    message: _Message
    window: Window | None
    ends_ns: int | None = None


class _Lender:
    """Owns the memory of one lent view, and spoils it when the view is released."""

    __slots__ = ("_memory",)

    def __init__(self, data: memoryview) -> None:
        self._memory = bytearray(data)

    def lend(self) -> memoryview:
        return memoryview(self._memory).toreadonly()

    def take_back(self, ticket: Ticket) -> None:
        self._memory[:] = _GARBAGE * len(self._memory)


class MemoryTransport(Transport):
    """Joins ranks of one process through shared dictionaries."""

    name = "memory"
    capabilities = Capabilities(scope=Scope.HOST, frame_bytes=0)

    def __init__(self, *, timed: bool = False) -> None:
        if timed:
            self.capabilities = Capabilities(scope=Scope.HOST, timed=True, frame_bytes=0)

    def open(
        self, rank: int, size: int, rendezvous: Rendezvous, clock: Clock, options: Mapping[str, Any]
    ) -> MemoryEndpoint:
        """Open this rank's endpoint; all ranks must be in one process.

        Raises
        ------
        UsageError
            If an option is unknown.
        TransportUnavailable
            If rank 0 is in another process.
        """
        unknown = sorted(set(options) - {"capacity_bytes"})
        if unknown:
            raise UsageError(f"options of transport 'memory' has unknown keys {', '.join(unknown)}")
        made = _Hub() if rank == 0 else None
        key = uuid.uuid4().hex
        if made is not None:
            _hubs[key] = made
        keys = rendezvous.exchange("memory", key.encode("ascii"), clock.now_ns() + OPEN_TIMEOUT_NS)
        hub = made or _hubs.get(keys[0].decode("ascii"))
        if hub is None:
            raise TransportUnavailable("transport 'memory' joins ranks of one process only")
        capacity_bytes = int(options.get("capacity_bytes", CAPACITY_BYTES))
        return MemoryEndpoint(rank, hub, clock, capacity_bytes, self.capabilities)


class MemoryEndpoint(Endpoint):
    """One rank's mailboxes; see `MemoryTransport`.

    It has many fields since it is a whole transport in one class: what was posted, came early, waits, and ended.
    """

    def __init__(self, rank: int, hub: _Hub, clock: Clock, capacity_bytes: int, capabilities: Capabilities) -> None:
        self._rank = rank
        self._hub = hub
        self._clock = clock
        self._capacity_bytes = capacity_bytes
        self._capabilities = capabilities
        self._wakeup = threading.Condition(hub.lock)
        self._eventfd: int | None = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._peers: set[int] = set()
        self._gone: set[int] = set()
        self._ended: list[Ticket] = []
        self._posted: defaultdict[tuple[int, int], deque[tuple[Ticket, memoryview | None]]] = defaultdict(deque)
        self._arrived: defaultdict[tuple[int, int], deque[_Message]] = defaultdict(deque)
        self._held_bytes: defaultdict[int, int] = defaultdict(int)
        self._sends: dict[Ticket, _Message] = {}
        self._timed: defaultdict[tuple[int, int], deque[_Timed]] = defaultdict(deque)
        self._discarded = Discarded()
        self._counters = {"messages_sent": 0, "bytes_sent": 0, "windows_missed": 0}
        with hub.lock:
            hub.endpoints[rank] = self

    @property
    def address(self) -> str:
        """The rank; the hub finds the endpoint by it."""
        return f"memory:{self._rank}"

    def connect(self, addresses: Mapping[int, str], deadline_ns: int, needed: Collection[int] | None = None) -> None:
        """Join the ranks in ``addresses``, all of which are open by now, whether needed or not."""
        with self._hub.lock:
            self._check_open()
            missing = sorted(set(addresses) - set(self._hub.endpoints))
            if missing:
                raise ConnectError(f"ranks {missing} are not open")
            self._peers |= set(addresses) - {self._rank}

    def send(self, dst: int, tag: int, view: memoryview, window: Window | None = None) -> Ticket:
        """Send ``view``; the ticket ends when the receiver holds a copy."""
        view = view.cast("B")
        with self._hub.lock:
            self._check_open()
            self._check_arguments("dst", dst, tag, view.nbytes)
            if dst in self._gone:
                raise PeerLost(f"rank {dst} is gone")
            self._discarded.lift(tag)
            ticket = Ticket(TicketKind.SEND, dst, tag, view.nbytes)
            message = _Message(self, ticket, view)
            self._sends[ticket] = message
            if not self._capabilities.timed:
                window = None
            if window is None and not self._timed.get((dst, tag)):
                self._deliver(message)
            else:
                self._timed[dst, tag].append(_Timed(message, window))
                self._advance()
            return ticket

    def recv(self, src: int, tag: int, nbytes: int, into: memoryview | None = None) -> Ticket:
        """Receive exactly ``nbytes``, at once if the message is here."""
        with self._hub.lock:
            self._check_open()
            self._check_arguments("src", src, tag, nbytes)
            if into is not None and (into.readonly or into.nbytes != nbytes):
                raise UsageError(f"into has {into.nbytes} bytes; expected {nbytes} writable bytes")
            self._discarded.lift(tag)
            ticket = Ticket(TicketKind.RECV, src, tag, nbytes)
            into = None if into is None else into.cast("B")
            waiting = self._arrived.get((src, tag))
            if waiting:
                self._match(ticket, into, waiting.popleft())
                _drop_if_empty(self._arrived, (src, tag))
                self._hold_more(src)
            elif src in self._gone:
                raise PeerLost(f"rank {src} is gone")
            else:
                self._posted[src, tag].append((ticket, into))
            return ticket

    def poll(self, deadline_ns: int) -> Sequence[Ticket]:
        """Return tickets that ended; see `Endpoint.poll`."""
        with self._hub.lock:
            while True:
                self._check_open()
                next_ns = self._advance()
                if self._ended:
                    ended, self._ended = self._ended, []
                    return ended
                now_ns = self._clock.now_ns()
                if now_ns >= deadline_ns:
                    return []
                wake_ns = deadline_ns if next_ns is None else min(deadline_ns, next_ns)
                self._wakeup.wait(max(0, wake_ns - now_ns) / 1e9)

    def cancel(self, ticket: Ticket) -> bool:
        """End a pending ticket as CANCELLED; `poll` does not return it again."""
        with self._hub.lock:
            self._check_open()
            if ticket.status is not TicketStatus.PENDING:
                return False
            found = self._withdraw(ticket) if ticket.kind is TicketKind.SEND else self._unpost(ticket)
            if found:
                self._finish(ticket, TicketStatus.CANCELLED, tell=False)
            return found

    def discard(self, tag: int, bits: int) -> None:
        """Drop what belongs to a prefix of tags; see `Endpoint.discard`."""
        with self._hub.lock:
            self._check_open()
            if not (0 <= tag <= LARGEST_TAG and 0 <= bits <= TAG_BITS):
                raise UsageError(f"tag={tag}, bits={bits} must be from 0 to {LARGEST_TAG} and from 0 to {TAG_BITS}")
            self._discarded.add(tag, bits)
            for key in [key for key in self._posted if has_prefix(key[1], tag, bits)]:
                for ticket, _ in self._posted.pop(key):
                    self._finish(ticket, TicketStatus.CANCELLED)
            dropped = [key for key in self._arrived if has_prefix(key[1], tag, bits)]
            for key in dropped:
                for message in self._arrived.pop(key):
                    self._let_go(message)
            for source in {source for source, _ in dropped}:
                self._hold_more(source)

    def abort(self) -> None:
        """Leave at once; others see PeerLost."""
        with self._hub.lock:
            if self._eventfd is None:
                return
            for ticket in list(self._sends):
                self._withdraw(ticket)
                self._finish(ticket, TicketStatus.CANCELLED, tell=False)
            for queue in self._posted.values():
                for ticket, _ in queue:
                    self._finish(ticket, TicketStatus.CANCELLED, tell=False)
            for messages in self._arrived.values():
                for message in messages:
                    if not message.held:
                        message.source._fail(message.ticket, PeerLost(f"rank {self._rank} is gone"))
            for queues in (self._posted, self._arrived, self._timed):
                queues.clear()
            os.close(self._eventfd)
            self._eventfd = None
            self._wakeup.notify_all()
            for peer in self._peers:
                self._hub.endpoints[peer]._lose(self._rank)

    def close(self, deadline_ns: int) -> None:
        """Wait until all sends have ended, then leave."""
        with self._hub.lock:
            while self._eventfd is not None and self._sends:
                next_ns = self._advance()
                now_ns = self._clock.now_ns()
                if not self._sends or now_ns >= deadline_ns:
                    break
                wake_ns = deadline_ns if next_ns is None else min(deadline_ns, next_ns)
                self._wakeup.wait(max(0, wake_ns - now_ns) / 1e9)
            self.abort()

    def fileno(self) -> int | None:
        """Return an eventfd that is readable while tickets wait to be polled; None where sends are timed."""
        return None if self._capabilities.timed else self._eventfd

    def arm(self, deadline_ns: int) -> bool:
        """Empty the descriptor; True if there is nothing to collect."""
        with self._hub.lock:
            self._check_open()
            assert self._eventfd is not None
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._eventfd)
            if self._ended:
                os.eventfd_write(self._eventfd, 1)
            return not self._ended

    def counters(self) -> Mapping[str, int]:
        """Return messages and bytes sent, and windows missed."""
        return dict(self._counters)

    def _check_open(self) -> None:
        if self._eventfd is None:
            raise Closed(f"the endpoint of rank {self._rank} is closed")

    def _check_arguments(self, name: str, peer: int, tag: int, nbytes: int) -> None:
        if peer not in self._peers:
            raise UsageError(f"{name}={peer} is not connected; expected one of {sorted(self._peers)}")
        if not 0 <= tag <= LARGEST_TAG:
            raise UsageError(f"tag={tag} must be from 0 to {LARGEST_TAG}")
        if not 0 <= nbytes <= self._capabilities.largest_message_bytes:
            raise UsageError(f"a message of {nbytes} bytes exceeds {self._capabilities.largest_message_bytes}")

    def _finish(self, ticket: Ticket, status: TicketStatus, tell: bool = True) -> None:
        """End one of this endpoint's own tickets."""
        ticket.status = status
        ticket.ended_ns = self._clock.now_ns()
        self._sends.pop(ticket, None)
        if tell:
            self._ended.append(ticket)
        if tell and self._eventfd is not None:
            os.eventfd_write(self._eventfd, 1)
        self._wakeup.notify_all()

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        ticket.error = error
        self._finish(ticket, TicketStatus.FAILED)

    def _deliver(self, message: _Message) -> None:
        """Hand a message of this endpoint to its receiver."""
        ticket = message.ticket
        receiver = self._hub.endpoints[ticket.peer]
        ticket.started_ns = self._clock.now_ns()
        if receiver._discarded.covers(ticket.tag):
            self._sent(message)
            return
        posted = receiver._posted.get((self._rank, ticket.tag))
        if posted:
            receiver._match(*posted.popleft(), message)
            _drop_if_empty(receiver._posted, (self._rank, ticket.tag))
            return
        receiver._arrived[self._rank, ticket.tag].append(message)
        receiver._hold_more(self._rank)

    def _hold_more(self, source: int) -> None:
        """Copy what ``source`` still lends, as far as there is room."""
        for (src, _), messages in self._arrived.items():
            for message in messages if src == source else ():
                nbytes = message.data.nbytes
                if message.held or self._held_bytes[source] + nbytes > self._capacity_bytes:
                    continue
                self._held_bytes[source] += nbytes
                message.data, message.held = memoryview(bytes(message.data)), True
                message.source._sent(message)

    def _sent(self, message: _Message) -> None:
        self._counters["messages_sent"] += 1
        self._counters["bytes_sent"] += message.data.nbytes
        self._finish(message.ticket, TicketStatus.DONE)

    def _match(self, ticket: Ticket, into: memoryview | None, message: _Message) -> None:
        """End the receive ``ticket`` with ``message``."""
        data = message.data
        if data.nbytes != ticket.nbytes:
            text = f"{data.nbytes} bytes came from rank {ticket.peer} with tag {ticket.tag}; expected {ticket.nbytes}"
            self._fail(ticket, FrameError(text))
        else:
            if into is None:
                ticket.lender = _Lender(data)
                ticket.view = ticket.lender.lend()
            else:
                into[:] = data
            self._finish(ticket, TicketStatus.DONE)
        self._let_go(message)

    def _let_go(self, message: _Message) -> None:
        """Give back the room that a message took here, or the memory that its sender still lends."""
        if message.held:
            self._held_bytes[message.source._rank] -= message.data.nbytes
        else:
            message.source._sent(message)

    def _advance(self) -> int | None:
        """Start and end timed sends that are due; return when the next one is."""
        now_ns = self._clock.now_ns()
        due = []
        for key, queue in list(self._timed.items()):
            due.append(self._advance_queue(queue, now_ns))
            _drop_if_empty(self._timed, key)
        return min((at_ns for at_ns in due if at_ns is not None), default=None)

    def _advance_queue(self, queue: deque[_Timed], now_ns: int) -> int | None:
        while queue:
            head = queue[0]
            window = head.window or Window(now_ns, None, float("inf"))
            if head.ends_ns is None:
                duration_ns = round(head.message.data.nbytes / window.rate_bytes_per_s * 1e9)
                start_ns = max(now_ns, window.not_before_ns)
                if window.not_after_ns is not None and start_ns + duration_ns > window.not_after_ns:
                    queue.popleft()
                    self._counters["windows_missed"] += 1
                    self._finish(head.message.ticket, TicketStatus.MISSED)
                    continue
                if now_ns < start_ns:
                    return start_ns
                head.ends_ns = now_ns + duration_ns
            if now_ns < head.ends_ns:
                return head.ends_ns
            queue.popleft()
            self._deliver(head.message)
        return None

    def _withdraw(self, ticket: Ticket) -> bool:
        """Take back a send whose message no one holds yet."""
        message = self._sends.get(ticket)
        if message is None:
            return False
        queue = self._timed.get((ticket.peer, ticket.tag), deque())
        for waiting in list(queue):
            if waiting.message is message:
                queue.remove(waiting)
                return True
        arrived = self._hub.endpoints[ticket.peer]._arrived.get((self._rank, ticket.tag), deque())
        if message in arrived:
            arrived.remove(message)
            return True
        return False

    def _unpost(self, ticket: Ticket) -> bool:
        """Take back a posted receive."""
        queue = self._posted.get((ticket.peer, ticket.tag), deque())
        for entry in list(queue):
            if entry[0] is ticket:
                queue.remove(entry)
                return True
        return False

    def _lose(self, peer: int) -> None:
        """Fail all that waits for ``peer``, which is gone."""
        if self._eventfd is None:
            return
        self._gone.add(peer)
        error = PeerLost(f"rank {peer} is gone")
        for (source, _), posted in self._posted.items():
            while source == peer and posted:
                self._fail(posted.popleft()[0], error)
        for ticket in [ticket for ticket in self._sends if ticket.peer == peer]:
            self._withdraw(ticket)
            self._fail(ticket, error)


def _drop_if_empty(queues: dict[tuple[int, int], Any], key: tuple[int, int]) -> None:
    """Forget a queue that ran empty, since tags need not come again."""
    if not queues[key]:
        del queues[key]
