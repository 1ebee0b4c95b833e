"""Stream sockets for transports on a mailbox: TCP, Unix sockets, or whatever else gives a connected pair.

On the wire a message is a header, its tag and size of 8 bytes each in little endian, and its bytes. Sent memory goes to
the socket as it is, and what arrives is read straight to where `Mailbox.begin` says, so neither side copies.

`MessageStream` is one connection. `StreamEndpoint` is all of those of a rank, and leaves three methods to a transport:
how a peer is reached, who a caller is, and the address. Each connection carries messages in one direction, from the
rank that opened it: a socket that is closed while bytes wait to be read resets its connection, which would take back
what was sent on it. So a pair of ranks has two.

A connection begins with a hello, which the other end answers with one byte; messages wait for that answer. Where the
connection ends without one, nothing is lost by calling again (`detcoll.greeting`), until the deadline of
`Endpoint.connect`, or for `GREETING_NS` where a peer is called later.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import struct
from abc import abstractmethod
from collections import deque
from collections.abc import Collection, Mapping
from typing import TypeVar

from detcoll.endpoint import MailboxEndpoint
from detcoll.errors import ConnectError, FrameError, PeerLost
from detcoll.greeting import PAUSE_NS, Greetings
from detcoll.mailbox import Arrival, Mailbox
from detcoll.transport import Clock, Ticket, TicketStatus

log = logging.getLogger("detcoll")

HEADER = struct.Struct("<QQ")
GREETING_NS = 30_000_000_000
"""For how long a peer that is first needed after `Endpoint.connect` is called again, until it has answered."""

_WELCOME = memoryview(b"\x01")
_LACKING = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
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
    hello : bytes, optional
        What is said first; what is put waits until `welcome` is called. Without one, nothing waits.
    """

    def __init__(self, sock: socket.socket, mail: Mailbox, clock: Clock, peer: int = -1, hello: bytes = b"") -> None:
        self.peer, self.is_paused = peer, False
        self._mail, self._clock = mail, clock
        self._queue: deque[tuple[Ticket | None, list[memoryview]]] = deque()
        self.greet(sock, hello)
        self._head = bytearray()
        self._arrival: Arrival | None = None

    @property
    def events(self) -> int:
        """What to ask epoll for: room to write while there is something to write, bytes unless there is no room."""
        # A paused connection that is reset stays ready whatever is asked for, which is told once and not in each turn.
        reads = select.EPOLLONESHOT if self.is_paused else select.EPOLLIN
        return reads | select.EPOLLOUT if self._hello or (self.is_welcome and self._queue) else reads

    @property
    def has_said_hello(self) -> bool:
        """Whether the socket has taken all of the hello."""
        return not self._hello

    @property
    def has_unwritten(self) -> bool:
        """Whether messages are to be written."""
        return bool(self._queue)

    def greet(self, sock: socket.socket, hello: bytes) -> None:
        """Begin, or begin again on a new socket; nothing but the hello was written on the old one."""
        sock.setblocking(False)
        self.socket, self._hello, self.is_welcome = sock, memoryview(hello), not hello

    def welcome(self) -> None:
        """Take note that the hello was answered, and write what waited for that."""
        self.is_welcome = True
        self.write()

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
        while self._hello:
            try:
                self._hello = self._hello[self.socket.send(self._hello) :]
            except BlockingIOError:
                return
        while self.is_welcome and self._queue:
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
    once, who says none when too many of them are open, or when there is no descriptor for the next caller. A rank that
    is sent away with them tries again; see the module. The end of a connection after that, in whatever way, is the loss
    of the peer. What it had sent before is still received.

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
        self._greetings = Greetings()
        self._listen_ns: int | None = None  # when to listen again; None while this endpoint listens
        self._has_warned = False
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
            self._say_hello(rank, deadline_ns)
        # An answer comes once the peer polls, which it may do only after this.
        while missing := [rank for rank in wanted if rank in self._errors or not self._outgoing[rank].has_said_hello]:
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
            is_first = line.is_welcome and not line.has_unwritten
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
        """Serve the sockets that are ready, and try again what is due."""
        due_ns = self._due_ns()
        wait_s = wait_s if due_ns is None else min(wait_s, self.left_s(due_ns))
        for descriptor, events in self._epoll.poll(min(wait_s, _LONGEST_WAIT_S)):
            if descriptor == self.listener.fileno():
                self._accept()
            elif descriptor in self._open and not self._open[descriptor].is_paused:
                self._serve(self._open[descriptor], events)
        if due_ns is not None and self.clock.now_ns() >= due_ns:
            self._try_again()

    def arm(self, deadline_ns: int) -> bool:
        """Tell whether nothing has ended yet, and nothing is to be tried again."""
        due_ns = self._due_ns()
        return super().arm(deadline_ns) and (due_ns is None or self.clock.now_ns() < due_ns)

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
        lines = [(peer, line.socket) for peer, line in self._outgoing.items() if line.socket.fileno() in self._open]
        return [
            {"dst": peer, "lane": "bulk", "local": _name(made.getsockname()), "remote": self._addresses[peer]}
            for peer, made in lines
        ]

    def _say_hello(self, peer: int, until_ns: int = 0) -> None:
        """Open the connection to a peer, once; where that cannot be, the peer is lost."""
        if peer in self._outgoing or peer in self._errors:
            return
        try:
            made = self.reach(self._addresses[peer])
            line = self._outgoing[peer] = MessageStream(made, self.mail, self.clock, peer, self.hello)
            self._register(line)
        except OSError as error:
            self._lose(peer, error)
            return
        self._greetings.begin(peer, until_ns or self.clock.now_ns() + GREETING_NS)
        self._serve(line, select.EPOLLOUT)

    def _greet_again(self, peer: int) -> None:
        """Open another connection to a peer that has closed one without an answer."""
        line = self._outgoing[peer]
        try:
            line.greet(self.reach(self._addresses[peer]), self.hello)
            self._register(line)
        except OSError as error:
            self._ended(line, error)
            return
        self._serve(line, select.EPOLLOUT)

    def _due_ns(self) -> int | None:
        """Return when something is to be tried again, or None."""
        times = [self._greetings.next_ns(), self._listen_ns]
        return min((at_ns for at_ns in times if at_ns is not None), default=None)

    def _try_again(self) -> None:
        """Listen again, and greet those again whose time has come."""
        now_ns = self.clock.now_ns()
        if self._listen_ns is not None and now_ns >= self._listen_ns:
            self._listen_ns = None
            self._epoll.modify(self.listener, select.EPOLLIN)
        for peer in self._greetings.due(now_ns):
            self._greet_again(peer)

    def _register(self, line: MessageStream) -> None:
        self._open[line.socket.fileno()] = line
        self._epoll.register(line.socket, line.events)

    def _accept(self) -> None:
        """Let in who waits, and send those strangers away that have been silent longest."""
        for _ in range(_TURN_CALLERS):
            try:
                line = MessageStream(self.listener.accept()[0], self.mail, self.clock)
                self._register(line)
            except OSError as error:
                if error.errno not in _LACKING:  # nobody waits
                    break
                silent = self._silent()
                if not silent:
                    self._listen_later(error)
                    break
                self._end(silent[0], error)
            else:
                self._serve(line, select.EPOLLIN)
        for line in self._silent()[:-_SILENT_STRANGERS]:
            self._end(line, ConnectionError("it said no hello"))

    def _silent(self) -> list[MessageStream]:
        """Return the connections that have said no hello, the oldest first."""
        return [line for line in self._open.values() if line.peer < 0]

    def _listen_later(self, error: OSError) -> None:
        """Leave callers waiting for a while: they cannot be accepted, and would keep this rank busy."""
        self._epoll.modify(self.listener, 0)
        self._listen_ns = self.clock.now_ns() + PAUSE_NS
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "rank %d cannot accept connections of other ranks (%s): they wait until it can; see ulimit -n",
                self.rank, error.strerror,
            )  # fmt: skip

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
            line.put(None, _WELCOME)
            line.write()
        if self._incoming.get(line.peer) is line:
            line.read()
        elif line.take(1) is not None and not line.is_welcome:  # nothing else comes but the end
            self._greetings.end(line.peer)
            line.welcome()

    def _end(self, line: MessageStream, error: Exception) -> None:
        """Close a connection, and take note of what that says of the peer."""
        self._shut(line)
        self._ended(line, error)

    def _ended(self, line: MessageStream, error: Exception) -> None:
        peer = line.peer
        if peer < 0:
            self.refused_connections += 1
            return
        if self._outgoing.get(peer) is line:
            if self._greetings.closed(peer, error, self.clock.now_ns()):
                return
            self._accept()  # the peer may have connected and sent before it left
            if peer in self._incoming:
                self._errors.setdefault(peer, error)
                self.mail.end_sends(peer, PeerLost(f"rank {peer} is gone: {error}"), self.clock.now_ns())
                return
        self._lose(peer, error)

    def _lose(self, peer: int, error: Exception) -> None:
        self._errors.setdefault(peer, error)
        self._greetings.end(peer)
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
