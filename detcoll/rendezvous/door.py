"""The connections to the hub that are no rank's: how many, and for how long."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

HELLO_NS = 10 * 10**9
_RECEIVED_AT = 128
"""Where tcpi_bytes_received is in the kernel's tcp_info."""
_LOOK_NS = 50_000_000
_MOST_BYTES = 2**16
_STRANGERS = 64
"""Connections that may wait without a hello, beyond one for each rank."""


@dataclass(frozen=True, slots=True)
class _Stranger:
    """Who is at the other end of a connection, and since when."""

    where: object
    since_ns: int


class Door:
    """Ends connections that stay strangers for too long, say too much, or are too many.

    ZeroMQ keeps the parts of a message until the last has come, however many there are. So it is looked at how much a
    stranger has sent.

    ZeroMQ owns the connections and tells descriptors only. A number may mean another connection by the time that it
    is used here; so it is compared who is at the other end.

    Parameters
    ----------
    size : int
        How many ranks there are.
    is_rank : callable
        Tells of a descriptor whether it is a rank's.
    """

    def __init__(self, size: int, is_rank: Callable[[int], bool]) -> None:
        self._most, self._is_rank = _STRANGERS + size, is_rank
        self._strangers: dict[int, _Stranger] = {}
        self._look_ns = 0

    def opened(self, descriptor: int, now_ns: int) -> None:
        """Note that a connection was accepted."""
        self._strangers.pop(descriptor, None)
        with contextlib.suppress(OSError), _connection(descriptor) as connection:
            self._strangers[descriptor] = _Stranger(connection.getpeername(), now_ns)
        if len(self._strangers) > self._most:
            self.end(next(iter(self._strangers)))

    def closed(self, descriptor: int) -> None:
        """Note that a connection ended, or is known to be a rank's."""
        self._strangers.pop(descriptor, None)

    def on_time(self, now_ns: int) -> None:
        """End connections that said no hello in time, or more than that."""
        for descriptor, who in list(self._strangers.items()):
            if now_ns >= who.since_ns + HELLO_NS or _received_bytes(descriptor) > _MOST_BYTES:
                self.end(descriptor)
        self._look_ns = now_ns + _LOOK_NS

    def next_ns(self) -> int | None:
        """Return when `on_time` has something to do."""
        return self._look_ns if self._strangers else None

    def end(self, descriptor: int) -> None:
        """End a stranger's connection."""
        stranger = self._strangers.pop(descriptor, None)
        if stranger is not None and not self._is_rank(descriptor):
            with contextlib.suppress(OSError), _connection(descriptor) as connection:
                if connection.getpeername() == stranger.where:
                    connection.shutdown(socket.SHUT_RDWR)


def local_host(descriptor: int) -> str:
    """Return this host's address in a connection, or empty."""
    with contextlib.suppress(OSError), _connection(descriptor) as connection:
        return str(connection.getsockname()[0])
    return ""


def _received_bytes(descriptor: int) -> int:
    with contextlib.suppress(OSError), _connection(descriptor) as connection:
        facts = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED_AT + 8)
        if len(facts) == _RECEIVED_AT + 8:
            return int.from_bytes(facts[_RECEIVED_AT:], sys.byteorder)
    return 0


def _connection(descriptor: int) -> socket.socket:
    copy = os.dup(descriptor)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
