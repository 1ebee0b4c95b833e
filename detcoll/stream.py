"""Stream sockets for transports on a mailbox: TCP, Unix sockets, or whatever else gives a connected pair.

On the wire a message is a header, its tag and size of 8 bytes each in little endian, and its bytes. Sent memory goes to
the socket as it is, and what arrives is read straight to where `Mailbox.begin` says, so neither side copies.

`MessageStream` is one connection. `StreamEndpoint` is all of those of a rank, and leaves three methods to a transport:
how a peer is reached, who a caller is, and the address. Each connection carries messages in one direction, from the
rank that opened it: a socket that is closed while bytes wait to be read resets its connection, which would take back
what was sent on it. So a pair of ranks has two.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from abc import abstractmethod
from collections import deque
from collections.abc import Collection, Mapping
from typing import TypeVar

from detcoll.endpoint import MailboxEndpoint
from detcoll.errors import ConnectError, FrameError, PeerLost
from detcoll.mailbox import Arrival, Mailbox
from detcoll.transport import Clock, Ticket, TicketStatus

HEADER = struct.Struct("<QQ")
_TURN_READS = 64
"""How many pieces a turn reads from one socket, so that no sender keeps a caller busy past its deadline."""

_TURN_CALLERS = 64
"""How many connections a turn accepts."""
_SILENT_STRANGERS = 64
"""How many connections may be open that have not said hello; a stranger's costs a descriptor and no more."""
_LONGEST_WAIT_S = 60.0

Read = TypeVar("Read", int, bytes)


class MessageStream:
    """One connection, with what is to be written to it and what arrives on it.

    Its methods raise OSError where the connection is broken or has ended, and FrameError for a message larger than
    there can be.

    Parameters
    ----------
    sock : socket.socket
        Connected or connecting; made non-blocking.
    mail : Mailbox
        Of the endpoint: sends end in it, and messages arrive in it.
    clock : Clock
        Of the endpoint.
    peer : int, optional
        The rank at the other end; may be set once it is known, before `read` is called.
    """

    def __init__(self, sock: socket.socket, mail: Mailbox, clock: Clock, peer: int = -1) -> None:
        sock.setblocking(False)
        self.socket, self.peer, self.is_paused = sock, peer, False
        self._mail, self._clock = mail, clock
        self._queue: deque[tuple[Ticket | None, list[memoryview]]] = deque()
        self._head = bytearray()
        self._arrival: Arrival | None = None

    @property
    def events(self) -> int:
        """What to ask epoll for: room to write while there is something to write, bytes unless there is no room."""
        # A paused connection that is reset stays ready whatever is asked for, which is told once and not in each turn.
        reads = select.EPOLLONESHOT if self.is_paused else select.EPOLLIN
        return reads | select.EPOLLOUT if self._queue else reads

    @property
    def has_unwritten(self) -> bool:
        """Whether something is to be written."""
        return bool(self._queue)

    def put(self, ticket: Ticket | None, *pieces: memoryview) -> None:
        """Queue pieces as they are; the ticket, if any, is DONE when the socket has taken them."""
        self._queue.append((ticket, list(pieces)))

    def put_message(self, ticket: Ticket, view: memoryview) -> None:
        """Queue the message of a send."""
        self.put(ticket, memoryview(HEADER.pack(ticket.tag, view.nbytes)), view)

    def withdraw(self, ticket: Ticket) -> bool:
        """Take back a message of which nothing was written."""
        for entry in self._queue:
            if entry[0] is ticket and len(entry[1]) == 2 and entry[1][0].nbytes == HEADER.size:
                self._queue.remove(entry)
                return True
        return False

    def write(self) -> None:
        """Write as much as the socket takes."""
        while self._queue:
            ticket, views = self._queue[0]
            try:
                written = self.socket.sendmsg(views)
            except BlockingIOError:
                return
            while views and written >= views[0].nbytes:
                written -= views.pop(0).nbytes
            if views:
                views[0] = views[0][written:]
                continue
            self._queue.popleft()
            if ticket is not None:
                self._mail.end(ticket, TicketStatus.DONE, self._clock.now_ns())

    def take(self, nbytes: int) -> bytes | None:
        """Return the next ``nbytes`` once all of them are here, None until then; for a hello before the messages."""
        try:
            while len(self._head) < nbytes:
                self._head += _some(self.socket.recv(nbytes - len(self._head)))
        except BlockingIOError:
            return None
        taken = bytes(self._head)
        self._head.clear()
        return taken

    def read(self) -> None:
        """Read messages, a bounded part of what is here; sets ``is_paused`` where there is no room for the next one."""
        self.is_paused = False
        try:
            for _ in range(_TURN_READS):
                if self._arrival is not None:
                    self._read_body(self._arrival)
                elif len(self._head) < HEADER.size:
                    self._head += _some(self.socket.recv(HEADER.size - len(self._head)))
                if len(self._head) == HEADER.size and not self._begin():
                    return
        except BlockingIOError:
            pass

    def _begin(self) -> bool:
        """Begin the message whose header is here; False where there is no room for it."""
        tag, nbytes = HEADER.unpack(self._head)
        if nbytes > self._mail.largest_message_bytes:
            raise FrameError(f"it announces a message of {nbytes} bytes")
        self.is_paused = not self._mail.admits(self.peer, tag, nbytes, in_order=True)
        if not self.is_paused:
            self._head.clear()
            arrival = self._mail.begin(self.peer, tag, nbytes, self._clock.now_ns())
            self._arrival = arrival if nbytes else None
        return not self.is_paused

    def _read_body(self, arrival: Arrival) -> None:
        count = _some(self.socket.recv_into(arrival.rest))
        if arrival.filled_bytes + count == arrival.memory.nbytes:
            self._arrival = None
        self._mail.advance(arrival, count, self._clock.now_ns())


class StreamEndpoint(MailboxEndpoint):
    """An endpoint that reaches its peers by stream sockets, each when it is first needed.

    A connection begins with a hello that says who has opened it. Strangers are sent away: who says another hello at
    once, who says none when too many of them are open. The end of a connection, in whatever way, is the loss of the
    peer. What it had sent before is still received.

    Parameters
    ----------
    mail : Mailbox
        Of this endpoint.
    clock : Clock
        Given to `Transport.open`.
    rank : int
        Of this endpoint.
    listener : socket.socket
        Where other ranks connect; closed with the endpoint.
    hello : bytes
        What this rank says on each connection that it opens; those of all ranks have one size.
    """

    def __init__(self, mail: Mailbox, clock: Clock, rank: int, listener: socket.socket, hello: bytes) -> None:
        super().__init__(mail, clock)
        listener.setblocking(False)
        self.rank, self.listener, self.hello = rank, listener, hello
        self.refused_connections = 0
        self._epoll = select.epoll()
        self._epoll.register(listener, select.EPOLLIN)
        self._addresses: dict[int, str] = {}
        self._outgoing: dict[int, MessageStream] = {}
        self._incoming: dict[int, MessageStream] = {}
        self._open: dict[int, MessageStream] = {}  # by descriptor, those of strangers too
        self._errors: dict[int, Exception] = {}

    @abstractmethod
    def reach(self, address: str) -> socket.socket:
        """Return a socket that is connected to ``address``, or about to be; OSError where that cannot be."""

    @abstractmethod
    def recognise(self, hello: bytes) -> int:
        """Return the rank that says this; ConnectionError if it is a stranger."""

    def connect(self, addresses: Mapping[int, str], deadline_ns: int, needed: Collection[int] | None = None) -> None:
        """Say hello to the ranks that are needed; see `Endpoint.connect`."""
        self._addresses |= {rank: address for rank, address in addresses.items() if rank != self.rank}
        self.mail.peers |= self._addresses.keys()
        wanted = [rank for rank in self._addresses if needed is None or rank in needed]
        for rank in wanted:
            self._say_hello(rank)
        while missing := [rank for rank in wanted if rank in self._errors or self._outgoing[rank].has_unwritten]:
            error = next((self._errors[rank] for rank in missing if rank in self._errors), None)
            if error is not None or self.clock.now_ns() >= deadline_ns:
                ranks = ", ".join(map(str, missing))
                raise ConnectError(f"rank {self.rank} did not reach rank {ranks}: {error or 'no answer'}") from error
            self.turn(self.left_s(deadline_ns))

    def post(self, ticket: Ticket, view: memoryview) -> None:
        """Queue the message, and write what the socket takes unless others wait before it."""
        self._say_hello(ticket.peer)
        if ticket.status is TicketStatus.PENDING:
            line = self._outgoing[ticket.peer]
            is_first = not line.has_unwritten
            line.put_message(ticket, view)
            if is_first:
                self._serve(line, select.EPOLLOUT)

    def withdraw(self, ticket: Ticket) -> bool:
        """Take back a message of which nothing was written."""
        return self._outgoing[ticket.peer].withdraw(ticket)

    def watch(self, peer: int) -> None:
        """Read on where mail had found no room; connect to a peer that a receive waits for, to see it go."""
        line = self._incoming.get(peer)
        if line is not None and line.is_paused:
            self._serve(line, select.EPOLLIN)
        if self.mail.awaits(peer):
            self._say_hello(peer)

    def turn(self, wait_s: float) -> None:
        """Serve the sockets that are ready."""
        for descriptor, events in self._epoll.poll(min(wait_s, _LONGEST_WAIT_S)):
            if descriptor == self.listener.fileno():
                self._accept()
            elif descriptor in self._open and not self._open[descriptor].is_paused:
                self._serve(self._open[descriptor], events)

    def leave(self) -> None:
        """Close all sockets; what the kernel has taken still leaves."""
        for line in self._open.values():
            line.socket.close()
        self.listener.close()
        self._epoll.close()

    def fileno(self) -> int | None:
        """Return epoll's own descriptor, which is readable while a socket is ready."""
        return self._epoll.fileno() if self.mail.is_open else None

    def counters(self) -> Mapping[str, int]:
        """Return messages and bytes sent and received, and connections of strangers that were closed."""
        return {**super().counters(), "refused_connections": self.refused_connections}

    def connections(self) -> list[dict[str, object]]:
        """Return the connections that this rank sends on."""
        lines = [(peer, line.socket) for peer, line in self._outgoing.items() if peer not in self._errors]
        return [
            {"dst": peer, "lane": "bulk", "local": _name(made.getsockname()), "remote": self._addresses[peer]}
            for peer, made in lines
        ]

    def _say_hello(self, peer: int) -> None:
        """Open the connection to a peer, once; where that cannot be, the peer is lost."""
        if peer in self._outgoing or peer in self._errors:
            return
        try:
            line = self._outgoing[peer] = self._watched(self.reach(self._addresses[peer]), peer)
        except OSError as error:
            self._lose(peer, error)
            return
        line.put(None, memoryview(self.hello))
        self._serve(line, select.EPOLLOUT)

    def _watched(self, made: socket.socket, peer: int) -> MessageStream:
        line = self._open[made.fileno()] = MessageStream(made, self.mail, self.clock, peer)
        self._epoll.register(made, line.events)
        return line

    def _accept(self) -> None:
        """Let in who waits, and send those strangers away that have been silent longest."""
        with contextlib.suppress(OSError):  # nobody waits, or no descriptor is left
            for _ in range(_TURN_CALLERS):
                self._serve(self._watched(self.listener.accept()[0], -1), select.EPOLLIN)
        silent = [line for line in self._open.values() if line.peer < 0]
        for line in silent[:-_SILENT_STRANGERS]:
            self._end(line, ConnectionError("it said no hello"))

    def _serve(self, line: MessageStream, events: int) -> None:
        """Move what goes without waiting."""
        try:
            line.write()
            if events & ~select.EPOLLOUT:
                self._read(line)
            self._epoll.modify(line.socket, line.events)
        except (OSError, FrameError) as error:
            self._end(line, error)

    def _read(self, line: MessageStream) -> None:
        if line.peer < 0:
            hello = line.take(len(self.hello))
            if hello is None:
                return
            rank = self.recognise(hello)
            if rank in self._incoming:
                raise ConnectionError(f"rank {rank} is connected already")
            line.peer, self._incoming[rank] = rank, line
        if self._incoming.get(line.peer) is line:
            line.read()
        else:
            line.take(1)  # nothing comes but the end

    def _end(self, line: MessageStream, error: Exception) -> None:
        """Close a connection, and take note of what that says of the peer."""
        self._shut(line)
        peer = line.peer
        if peer < 0:
            self.refused_connections += 1
            return
        if self._outgoing.get(peer) is line:
            self._accept()  # the peer may have connected and sent before it left
            if peer in self._incoming:
                self._errors.setdefault(peer, error)
                self.mail.end_sends(peer, PeerLost(f"rank {peer} is gone: {error}"), self.clock.now_ns())
                return
        self._lose(peer, error)

    def _lose(self, peer: int, error: Exception) -> None:
        self._errors.setdefault(peer, error)
        self.mail.lose(peer, PeerLost(f"rank {peer} is gone: {error}"), self.clock.now_ns())
        for line in (self._outgoing.get(peer), self._incoming.get(peer)):
            if line is not None and line.socket.fileno() in self._open:
                self._shut(line)

    def _shut(self, line: MessageStream) -> None:
        """Close a connection. A forked child may hold the socket too, and epoll would then go on to report it."""
        del self._open[line.socket.fileno()]
        with contextlib.suppress(OSError):  # it could not be registered
            self._epoll.unregister(line.socket)
        line.socket.close()


def _name(address: object) -> str:
    """Return a socket's own address as ``host:port``, or the path of a Unix socket."""
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address)


def _some(read: Read) -> Read:
    """Return what was read, which is nothing only at the end of a stream."""
    if not read:
        raise ConnectionResetError("the connection has ended")
    return read
