"""One connection through the relay: the client's socket, the target's, and what waits to be written to either.

What happens to it on the lines, `Event` says: it is opened, answered, carries data, ends in one direction as TCP's FIN
does, or breaks. Each event travels as a piece and is carried out where it arrives, so that no side learns anything
earlier than the path allows.
"""

from __future__ import annotations

import errno
import socket
from collections import deque
from contextlib import suppress
from enum import Enum, auto

from detcoll.emulation.relay.socks import Answer, Handshake


class Event(Enum):
    """What a piece means to its tunnel."""

    OPEN = auto()
    ANSWER = auto()
    DATA = auto()
    END = auto()
    BREAK = auto()


class Side:
    """One end: a socket, its site, and bytes that have arrived for it."""

    __slots__ = ("connection", "ends", "is_closed", "is_held", "is_reading", "site", "waiting", "waiting_bytes")

    def __init__(self, connection: socket.socket, site: int) -> None:
        self.connection, self.site = connection, site
        self.waiting: deque[memoryview] = deque()
        self.waiting_bytes = 0
        self.is_reading = True
        self.ends = self.is_closed = self.is_held = False
        connection.setblocking(False)
        with suppress(OSError):  # gone already; reading tells
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def put(self, data: bytes) -> None:
        """Let bytes wait for being written."""
        self.waiting.append(memoryview(data))
        self.waiting_bytes += len(data)

    def write(self) -> None:
        """Write what the kernel takes, and pass the end on once everything before it is written.

        Raises
        ------
        OSError
            If the connection is broken.
        """
        while self.waiting:
            try:
                sent = self.connection.send(self.waiting[0])
            except BlockingIOError:
                return
            self.waiting_bytes -= sent
            if sent == len(self.waiting[0]):
                self.waiting.popleft()
            else:
                self.waiting[0] = self.waiting[0][sent:]
        if self.ends and not self.is_closed:
            self.is_closed = True
            self.connection.shutdown(socket.SHUT_WR)

    def read(self, nbytes: int) -> bytes | None:
        """Return what has come, at most ``nbytes``, empty at the end; None where nothing has come.

        Raises
        ------
        OSError
            If the connection is broken.
        """
        try:
            data = self.connection.recv(nbytes)
        except BlockingIOError:
            return None
        self.is_reading = bool(data)
        return data


class Tunnel:
    """A client's connection, from its handshake on."""

    __slots__ = ("address", "answer", "client", "deadline_ns", "handshake", "is_over", "is_ready", "target")

    def __init__(self, connection: socket.socket, site: int, deadline_ns: int) -> None:
        self.client = Side(connection, site)
        self.target: Side | None = None
        self.address = ("", 0)
        self.handshake: Handshake | None = Handshake()
        self.deadline_ns = deadline_ns
        self.answer = Answer.REFUSED
        self.is_ready = False
        self.is_over = False

    def set_target(self, address: tuple[str, int], site: int) -> None:
        """Take note of where the connection leads; nothing is connected yet."""
        self.address = address
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.target = Side(socket.socket(family, socket.SOCK_STREAM), site)

    def connect(self) -> bool:
        """Begin to connect to the target, which is writable once that has come to an end; False if it has failed."""
        assert self.target is not None
        return self.target.connection.connect_ex(self.address) in (0, errno.EINPROGRESS)

    def other(self, side: Side) -> Side | None:
        """Return the end opposite to ``side``."""
        return self.target if side is self.client else self.client

    @property
    def is_done(self) -> bool:
        """Whether both directions have ended and nothing is left to write."""
        sides = (self.client, self.target)
        return all(side is None or side.is_closed for side in sides)

    def close(self) -> None:
        """Close both sockets. Idempotent."""
        self.is_over = True
        for side in (self.client, self.target):
            if side is not None:
                side.connection.close()
