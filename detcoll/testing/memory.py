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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from detcoll.errors import ConnectError, PeerLost, TransportUnavailable, UsageError
from detcoll.mailbox import Mailbox
from detcoll.transport import (
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
    """One message, in its sender's own memory."""

    source: MemoryEndpoint
    ticket: Ticket
    data: memoryview


@dataclass(eq=False, slots=True)
class _Timed:
    """A send that waits for its window, or behind one that does."""

    message: _Message
    window: Window | None
    ends_ns: int | None = None


class _Spoiler:
    """Owns the memory of one message, and spoils it once that is free."""

    __slots__ = ("_memory",)

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def take_back(self, ticket: Ticket | None) -> None:
        self._memory[:] = _GARBAGE * len(self._memory)


def _spoiled_later(nbytes: int) -> tuple[memoryview, _Spoiler]:
    memory = memoryview(bytearray(nbytes))
    return memory, _Spoiler(memory)


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
    """One rank's mailbox, and messages that find no room in it; see `MemoryTransport`.

    All methods take the lock that the endpoints of a job share, since each delivers to the mailboxes of others.
    """

    def __init__(self, rank: int, hub: _Hub, clock: Clock, capacity_bytes: int, capabilities: Capabilities) -> None:
        self._rank = rank
        self._hub = hub
        self._clock = clock
        self._is_timed = capabilities.timed
        self._wakeup = threading.Condition(hub.lock)
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._mail = Mailbox(
            rank,
            largest_message_bytes=capabilities.largest_message_bytes,
            held_bytes=capacity_bytes,
            memory=_spoiled_later,
        )
        self._outside: defaultdict[int, deque[_Message]] = defaultdict(deque)
        self._timed: defaultdict[tuple[int, int], deque[_Timed]] = defaultdict(deque)
        self._windows_missed = 0
        with hub.lock:
            hub.endpoints[rank] = self

    @property
    def address(self) -> str:
        """The rank; the hub finds the endpoint by it."""
        return f"memory:{self._rank}"

    def connect(self, addresses: Mapping[int, str], deadline_ns: int, needed: Collection[int] | None = None) -> None:
        """Join the ranks in ``addresses``, all of which are open by now, whether needed or not."""
        with self._hub.lock:
            self._mail.check_open()
            missing = sorted(set(addresses) - set(self._hub.endpoints))
            if missing:
                raise ConnectError(f"ranks {missing} are not open")
            self._mail.peers |= set(addresses) - {self._rank}

    def send(self, dst: int, tag: int, view: memoryview, window: Window | None = None) -> Ticket:
        """Send ``view``; the ticket ends when the receiver holds a copy."""
        view = view.cast("B")
        with self._hub.lock:
            ticket = self._mail.send(dst, tag, view.nbytes, self._clock.now_ns())
            message = _Message(self, ticket, view)
            if not self._is_timed:
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
            ticket = self._mail.recv(src, tag, nbytes, into, self._clock.now_ns())
            self._let_in(src)
            self._tell()
            return ticket

    def poll(self, deadline_ns: int) -> Sequence[Ticket]:
        """Return tickets that ended; see `Endpoint.poll`."""
        with self._hub.lock:
            while True:
                self._mail.check_open()
                next_ns = self._advance()
                if self._mail.has_ended:
                    return self._mail.take_ended()
                now_ns = self._clock.now_ns()
                if now_ns >= deadline_ns:
                    return []
                wake_ns = deadline_ns if next_ns is None else min(deadline_ns, next_ns)
                self._wakeup.wait(max(0, wake_ns - now_ns) / 1e9)

    def cancel(self, ticket: Ticket) -> bool:
        """End a pending ticket as CANCELLED; `poll` does not return it again."""
        with self._hub.lock:
            self._mail.check_open()
            is_send = ticket.kind is TicketKind.SEND
            if ticket.status is TicketStatus.PENDING and is_send:
                self._withdraw(lambda message: message.ticket is ticket)
            return self._mail.cancel(ticket, self._clock.now_ns())

    def discard(self, tag: int, bits: int) -> None:
        """Drop what belongs to a prefix of tags; see `Endpoint.discard`."""
        with self._hub.lock:
            self._mail.discard(tag, bits, self._clock.now_ns())
            for source in list(self._outside):
                self._let_in(source)
            self._tell()

    def abort(self) -> None:
        """Leave at once; others see PeerLost."""
        with self._hub.lock:
            if not self._mail.is_open:
                return
            self._withdraw(lambda message: True)
            self._mail.close(self._clock.now_ns())
            self._outside.clear()
            os.close(self._eventfd)
            self._wakeup.notify_all()
            for peer in self._mail.peers:
                self._hub.endpoints[peer]._lose(self._rank)

    def close(self, deadline_ns: int) -> None:
        """Wait until all sends have ended, then leave."""
        with self._hub.lock:
            while self._mail.is_open and self._mail.has_sends:
                next_ns = self._advance()
                now_ns = self._clock.now_ns()
                if not self._mail.has_sends or now_ns >= deadline_ns:
                    break
                wake_ns = deadline_ns if next_ns is None else min(deadline_ns, next_ns)
                self._wakeup.wait(max(0, wake_ns - now_ns) / 1e9)
            self.abort()

    def fileno(self) -> int | None:
        """Return an eventfd that is readable while tickets wait to be polled; None where sends are timed."""
        return None if self._is_timed or not self._mail.is_open else self._eventfd

    def arm(self, deadline_ns: int) -> bool:
        """Empty the descriptor; True if there is nothing to collect."""
        with self._hub.lock:
            self._mail.check_open()
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._eventfd)
            self._tell()
            return not self._mail.has_ended

    def counters(self) -> Mapping[str, int]:
        """Return messages and bytes sent and received, and windows missed."""
        return {**self._mail.counters, "windows_missed": self._windows_missed}

    def _tell(self) -> None:
        """Wake up who waits for tickets of this endpoint, if some have ended."""
        if self._mail.has_ended and self._mail.is_open:
            os.eventfd_write(self._eventfd, 1)
            self._wakeup.notify_all()

    def _end(self, ticket: Ticket, status: TicketStatus) -> None:
        self._mail.end(ticket, status, self._clock.now_ns())
        self._tell()

    def _deliver(self, message: _Message) -> None:
        """Put a message of this endpoint into its receiver's mailbox, or let it wait outside."""
        message.ticket.started_ns = self._clock.now_ns()
        receiver = self._hub.endpoints[message.ticket.peer]
        receiver._outside[self._rank].append(message)
        receiver._let_in(self._rank)
        receiver._tell()

    def _let_in(self, source: int) -> None:
        """Take in what waits outside, as far as there is room for it; messages of one tag keep their order."""
        stay: set[int] = set()
        for message in list(self._outside.get(source, ())):
            tag, now_ns = message.ticket.tag, self._clock.now_ns()
            if tag in stay or not self._mail.admits(source, tag, message.data.nbytes):
                stay.add(tag)
                continue
            self._outside[source].remove(message)
            self._mail.deliver(source, tag, message.data, now_ns)
            message.source._end(message.ticket, TicketStatus.DONE)
        if not self._outside.get(source, True):
            del self._outside[source]

    def _advance(self) -> int | None:
        """Start and end timed sends that are due; return when the next one is."""
        now_ns = self._clock.now_ns()
        due = []
        for key, queue in list(self._timed.items()):
            due.append(self._advance_queue(queue, now_ns))
            if not queue:
                del self._timed[key]
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
                    self._windows_missed += 1
                    self._end(head.message.ticket, TicketStatus.MISSED)
                    continue
                if now_ns < start_ns:
                    return start_ns
                head.ends_ns = now_ns + duration_ns
            if now_ns < head.ends_ns:
                return head.ends_ns
            queue.popleft()
            self._deliver(head.message)
        return None

    def _withdraw(self, is_meant: Callable[[_Message], bool]) -> None:
        """Take back messages of this endpoint that no mailbox holds yet."""
        for key, queue in list(self._timed.items()):
            self._timed[key] = deque(waiting for waiting in queue if not is_meant(waiting.message))
        for peer in self._mail.peers:
            outside = self._hub.endpoints[peer]._outside
            if self._rank in outside:
                outside[self._rank] = deque(message for message in outside[self._rank] if not is_meant(message))

    def _lose(self, peer: int) -> None:
        """Fail all that waits for ``peer``, which is gone."""
        if self._mail.is_open:
            self._withdraw(lambda message: message.ticket.peer == peer)
            self._mail.lose(peer, PeerLost(f"rank {peer} is gone"), self._clock.now_ns())
            self._tell()
