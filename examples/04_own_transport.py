"""A transport of your own in one file: Unix sockets, one for each pair of ranks of a host.

As a program it registers the transport and reduces over it; as a test module it runs the contract that detcoll's own
transports pass::

    detcoll run -n 4 examples/04_own_transport.py
    python -m pytest examples/04_own_transport.py

An installed package needs no `register`: it names its class under the entry-point group ``detcoll.transports``.

On the wire a message is a header (tag, size) and its bytes. All sockets are non-blocking and are served in `poll`, by
whichever thread calls it. What arrives before its receive is posted is held; a peer that sent `HELD_BYTES` too early
is read no further until a receive waits for it, so its sends stay pending and memory is bounded.
"""

from __future__ import annotations

import os
import selectors
import shutil
import socket
import struct
import sys
import tempfile
from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import detcoll
from detcoll.discarding import Discarded, has_prefix
from detcoll.errors import Closed, ConnectError, FrameError, PeerLost, UsageError
from detcoll.registry import register
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

HEADER = struct.Struct("<QQ")  # tag, size in bytes
HELLO = struct.Struct("<I")  # the rank that connects
HELD_BYTES = 2**26


@register
class UnixTransport(Transport):
    """Joins the ranks of one host; `detcoll.init(transport="unix")`."""

    name = "unix"
    capabilities = Capabilities(scope=Scope.HOST, frame_bytes=HEADER.size)

    def open(
        self, rank: int, size: int, rendezvous: Rendezvous, clock: Clock, options: Mapping[str, Any]
    ) -> UnixEndpoint:
        """Listen on a socket in a directory that no other user can enter."""
        return UnixEndpoint(rank, size, clock, self.capabilities.largest_message_bytes)


Receive = tuple[Ticket, memoryview | None]
"""A posted receive: its ticket and ``into``."""


@dataclass(eq=False)
class Arriving:
    """A message of which the header is here: where its bytes go, and which receive takes it (None: none yet)."""

    tag: int
    memory: memoryview
    taker: Receive | None
    dropped: bool = False
    filled: int = 0


@dataclass(eq=False)
class Peer:
    """One connection: what goes out, what comes in, what is asked for, and what came too early."""

    rank: int
    socket: socket.socket
    outgoing: deque[tuple[Ticket, list[memoryview]]] = field(default_factory=deque)
    header: bytearray = field(default_factory=bytearray)
    arriving: Arriving | None = None
    posted: defaultdict[int, deque[Receive]] = field(default_factory=lambda: defaultdict(deque))
    held: defaultdict[int, deque[Arriving]] = field(default_factory=lambda: defaultdict(deque))
    held_bytes: int = 0
    events: int = selectors.EVENT_READ
    gone: bool = False

    def wanted_events(self) -> int:
        """Return what to wait for: room to write while there is something to write, bytes unless too many are held."""
        reads = self.held_bytes < HELD_BYTES or any(self.posted.values())
        return (selectors.EVENT_READ if reads else 0) | (selectors.EVENT_WRITE if self.outgoing else 0)


class UnixEndpoint(Endpoint):
    """A rank's sockets."""

    def __init__(self, rank: int, size: int, clock: Clock, largest_bytes: int) -> None:
        self._rank, self._clock, self._largest_bytes = rank, clock, largest_bytes
        self._directory = tempfile.mkdtemp(prefix="detcoll-")
        self._path = os.path.join(self._directory, "socket")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self._path)
        self._listener.listen(size)
        self._selector = selectors.EpollSelector()
        self._peers: dict[int, Peer] = {}
        self._ended: list[Ticket] = []
        self._discarded = Discarded()
        self._closed = False

    @property
    def address(self) -> str:
        """The path of the socket that this endpoint listens on."""
        return self._path

    def connect(self, addresses: Mapping[int, str], deadline_ns: int, needed: Collection[int] | None = None) -> None:
        """Call the ranks below this one and wait for the calls of those above it, needed or not."""
        awaited = {rank for rank in addresses if rank != self._rank}
        try:
            for rank in sorted(awaited):
                if rank < self._rank:
                    called = socket.socket(socket.AF_UNIX)
                    called.settimeout(self._left_s(deadline_ns))
                    called.connect(addresses[rank])
                    called.sendall(HELLO.pack(self._rank))
                    self._join(rank, called)
            while awaited - set(self._peers):
                self._listener.settimeout(self._left_s(deadline_ns))
                caller, _ = self._listener.accept()
                caller.settimeout(self._left_s(deadline_ns))
                self._join(HELLO.unpack(caller.recv(HELLO.size, socket.MSG_WAITALL))[0], caller)
        except (OSError, struct.error) as error:
            missing = sorted(awaited - set(self._peers))
            self.abort()
            raise ConnectError(f"rank {self._rank}: ranks {missing} were not joined: {error}") from error

    def send(self, dst: int, tag: int, view: memoryview, window: Window | None = None) -> Ticket:
        """Queue the message and write what the socket takes at once."""
        view = view.cast("B")
        peer = self._checked("dst", dst, tag, view.nbytes)
        if peer.gone:
            raise PeerLost(f"rank {dst} is gone")
        self._discarded.lift(tag)
        ticket = Ticket(TicketKind.SEND, dst, tag, view.nbytes, started_ns=self._clock.now_ns())
        peer.outgoing.append((ticket, [memoryview(HEADER.pack(tag, view.nbytes)), view]))
        self._serve(peer)
        return ticket

    def recv(self, src: int, tag: int, nbytes: int, into: memoryview | None = None) -> Ticket:
        """Take a message that is held, or wait for it."""
        peer = self._checked("src", src, tag, nbytes)
        if into is not None and (into.readonly or into.nbytes != nbytes):
            raise UsageError(f"into has {into.nbytes} bytes; expected {nbytes} writable bytes")
        self._discarded.lift(tag)
        ticket = Ticket(TicketKind.RECV, src, tag, nbytes)
        receive = (ticket, None if into is None else into.cast("B"))
        if peer.held[tag]:
            message = peer.held[tag].popleft()
            peer.held_bytes -= message.memory.nbytes
            self._hand_over(message, receive)
        elif peer.gone:
            raise PeerLost(f"rank {src} is gone")
        else:
            peer.posted[tag].append(receive)
        self._watch(peer)
        return ticket

    def poll(self, deadline_ns: int) -> Sequence[Ticket]:
        """Serve the sockets until a ticket ends or the deadline passes."""
        while True:
            self._check_open()
            wait_s = 0.0 if self._ended else self._left_s(deadline_ns)
            for key, _ in self._selector.select(wait_s):
                self._serve(key.data)
            if self._ended or self._clock.now_ns() >= deadline_ns:
                ended, self._ended = self._ended, []
                return ended

    def cancel(self, ticket: Ticket) -> bool:
        """Take back a receive of which nothing has come, or a send of which nothing has left."""
        self._check_open()
        if ticket.status is not TicketStatus.PENDING:
            return False
        peer = self._peers[ticket.peer]
        for posted in list(peer.posted[ticket.tag]):
            if posted[0] is ticket:
                peer.posted[ticket.tag].remove(posted)
                ticket.status = TicketStatus.CANCELLED
                return True
        for queued in list(peer.outgoing):
            if queued[0] is ticket and len(queued[1]) == 2 and queued[1][0].nbytes == HEADER.size:
                peer.outgoing.remove(queued)
                ticket.status = TicketStatus.CANCELLED
                return True
        return False

    def discard(self, tag: int, bits: int) -> None:
        """End what waits for a prefix of tags, and forget what is held or comes later of it."""
        self._check_open()
        if not (0 <= tag <= LARGEST_TAG and 0 <= bits <= TAG_BITS):
            raise UsageError(f"tag={tag}, bits={bits} must be from 0 to {LARGEST_TAG} and from 0 to {TAG_BITS}")
        self._discarded.add(tag, bits)
        for peer in self._peers.values():
            for posted in [peer.posted[key] for key in peer.posted if has_prefix(key, tag, bits)]:
                while posted:
                    self._end(posted.popleft()[0], TicketStatus.CANCELLED)
            for held in [peer.held.pop(key) for key in list(peer.held) if has_prefix(key, tag, bits)]:
                peer.held_bytes -= sum(message.memory.nbytes for message in held)
            if peer.arriving is not None and has_prefix(peer.arriving.tag, tag, bits):
                peer.arriving.dropped = True
            self._watch(peer)

    def abort(self) -> None:
        """Close every socket; peers see the end of the stream."""
        if self._closed:
            return
        self._closed = True
        for peer in self._peers.values():
            self._drop(peer, TicketStatus.CANCELLED, None)
        self._selector.close()
        self._listener.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def close(self, deadline_ns: int) -> None:
        """Write what was sent, then leave; what the kernel holds still arrives."""
        while not self._closed and any(peer.outgoing for peer in self._peers.values()):
            for key, _ in self._selector.select(self._left_s(deadline_ns)):
                self._serve(key.data)
            if self._clock.now_ns() >= deadline_ns:
                break
        self.abort()

    def fileno(self) -> int | None:
        """Return the selector's own descriptor, which is readable when a socket is."""
        return self._selector.fileno()

    def arm(self, deadline_ns: int) -> bool:
        """Tell whether nothing has ended yet; the kernel watches the sockets by itself."""
        self._check_open()
        return not self._ended

    def _left_s(self, deadline_ns: int) -> float:
        return max(0.0, (deadline_ns - self._clock.now_ns()) / 1e9)

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"the endpoint of rank {self._rank} is closed")

    def _checked(self, name: str, rank: int, tag: int, nbytes: int) -> Peer:
        self._check_open()
        if rank not in self._peers:
            raise UsageError(f"{name}={rank} is not connected; expected one of {sorted(self._peers)}")
        if not 0 <= tag <= LARGEST_TAG:
            raise UsageError(f"tag={tag} must be from 0 to {LARGEST_TAG}")
        if not 0 <= nbytes <= self._largest_bytes:
            raise UsageError(f"a message of {nbytes} bytes is not from 0 to {self._largest_bytes}")
        return self._peers[rank]

    def _join(self, rank: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._peers[rank] = Peer(rank, connection)
        self._selector.register(connection, selectors.EVENT_READ, self._peers[rank])

    def _watch(self, peer: Peer) -> None:
        """Wait for what this peer's state asks for."""
        events = 0 if peer.gone else peer.wanted_events()
        if events == peer.events:
            return
        if events and peer.events:
            self._selector.modify(peer.socket, events, peer)
        elif events:
            self._selector.register(peer.socket, events, peer)
        else:
            self._selector.unregister(peer.socket)
        peer.events = events

    def _serve(self, peer: Peer) -> None:
        """Write and read what goes without waiting."""
        try:
            try:
                self._write(peer)
            except BrokenPipeError:  # what the peer had written before it left is still to be read
                self._end_sends(peer, TicketStatus.FAILED, PeerLost(f"rank {peer.rank} is gone"))
            while peer.wanted_events() & selectors.EVENT_READ and self._read(peer):
                pass
        except BlockingIOError:
            pass
        except OSError as error:
            self._drop(peer, TicketStatus.FAILED, PeerLost(f"rank {peer.rank} is gone: {error}"))
        self._watch(peer)

    def _write(self, peer: Peer) -> None:
        while peer.outgoing:
            ticket, views = peer.outgoing[0]
            try:
                written = peer.socket.sendmsg(views)
            except BlockingIOError:
                return
            while views and written >= views[0].nbytes:
                written -= views.pop(0).nbytes
            if views:
                views[0] = views[0][written:]
            else:
                peer.outgoing.popleft()
                self._end(ticket, TicketStatus.DONE)

    def _read(self, peer: Peer) -> bool:
        """Read one piece; False at the end of the stream."""
        if peer.arriving is None:
            piece = peer.socket.recv(HEADER.size - len(peer.header))
            if not piece:
                return self._drop(peer, TicketStatus.FAILED, PeerLost(f"rank {peer.rank} is gone"))
            peer.header += piece
            if len(peer.header) == HEADER.size:
                self._begin(peer, *HEADER.unpack(peer.header))
                peer.header.clear()
            return True
        message = peer.arriving
        count = peer.socket.recv_into(message.memory[message.filled :])
        if not count:
            return self._drop(peer, TicketStatus.FAILED, PeerLost(f"rank {peer.rank} is gone"))
        message.filled += count
        if message.filled == message.memory.nbytes:
            self._arrived(peer, message)
        return True

    def _begin(self, peer: Peer, tag: int, nbytes: int) -> None:
        """Make ready for a message whose header is here: it goes straight to where a receive wants it, if one does."""
        if nbytes > self._largest_bytes:
            raise OSError(f"it announces a message of {nbytes} bytes")
        taker = peer.posted[tag].popleft() if peer.posted[tag] else None
        into = taker[1] if taker is not None else None
        memory = into if into is not None and into.nbytes == nbytes else memoryview(bytearray(nbytes))
        peer.arriving = Arriving(tag, memory, taker, self._discarded.covers(tag))
        if nbytes == 0:
            self._arrived(peer, peer.arriving)

    def _arrived(self, peer: Peer, message: Arriving) -> None:
        peer.arriving = None
        if message.dropped:
            if message.taker is not None:
                self._end(message.taker[0], TicketStatus.CANCELLED)
        elif message.taker is not None:
            self._hand_over(message, message.taker)
        elif peer.posted[message.tag]:  # posted while the message was on its way in
            self._hand_over(message, peer.posted[message.tag].popleft())
        else:
            peer.held[message.tag].append(message)
            peer.held_bytes += message.memory.nbytes

    def _hand_over(self, message: Arriving, receive: Receive) -> None:
        """End a receive with its message."""
        ticket, into = receive
        if message.memory.nbytes != ticket.nbytes:
            text = f"{message.memory.nbytes} bytes came from rank {ticket.peer}, tag {ticket.tag}"
            self._end(ticket, TicketStatus.FAILED, FrameError(f"{text}; expected {ticket.nbytes}"))
            return
        if into is None:
            ticket.view = message.memory.toreadonly()
        elif into is not message.memory:
            into[:] = message.memory
        self._end(ticket, TicketStatus.DONE)

    def _drop(self, peer: Peer, status: TicketStatus, error: Exception | None) -> bool:
        """Close a connection and end all that waits for it."""
        waiting = [ticket for queue in peer.posted.values() for ticket, _ in queue]
        if peer.arriving is not None and peer.arriving.taker is not None:
            waiting.append(peer.arriving.taker[0])
        peer.posted.clear()
        self._end_sends(peer, status, error)
        peer.arriving, peer.gone = None, True
        self._watch(peer)
        peer.socket.close()
        for ticket in waiting:
            self._end(ticket, status, error)
        return False

    def _end_sends(self, peer: Peer, status: TicketStatus, error: Exception | None) -> None:
        while peer.outgoing:
            self._end(peer.outgoing.popleft()[0], status, error)

    def _end(self, ticket: Ticket, status: TicketStatus, error: Exception | None = None) -> None:
        ticket.status, ticket.error, ticket.ended_ns = status, error, self._clock.now_ns()
        self._ended.append(ticket)


if "pytest" in sys.modules:
    from detcoll.testing import ThreadFabric, TransportContract

    class TestUnix(TransportContract):
        """The contract, with ranks as threads."""

        capabilities = UnixTransport.capabilities

        def fabric(self, n: int) -> ThreadFabric:
            """Join ``n`` ranks."""
            return ThreadFabric(UnixTransport(), n)

        def clogged_fabric(self) -> ThreadFabric:
            """Join two ranks; a socket's buffer is all that one takes before it polls."""
            return ThreadFabric(UnixTransport(), 2)


if __name__ == "__main__":
    comm = detcoll.init(transport="unix")
    x = np.full(1000, comm.rank + 1, dtype=np.float32)
    detcoll.all_reduce(x, op="sum")
    if comm.rank == 0:
        print(f"{comm.size} ranks over {comm.transport}: every element is {x[0]:g}")
    detcoll.finalize()
