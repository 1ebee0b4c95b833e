"""Limits on connections to the hub that have not been identified as a rank's: their number, age and traffic."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

HELLO_NS = 10 * 10**9
_RECEIVED_AT = 128
"""Offset of tcpi_bytes_received in the kernel's struct tcp_info."""
_LOOK_NS = 50_000_000
_MOST_BYTES = 2**16
_STRANGERS = 64
"""How many connections may wait without a hello, in addition to one for each rank."""


@dataclass(frozen=True, slots=True)
class _Stranger:
    """Remote address of a connection, and when it was accepted."""

    where: object
    since_ns: int


class Door:
    """Shuts down connections that send no hello in time, send too much, or are too many.

    ZeroMQ buffers all parts of a message until the last one arrives, without a limit on their number. So the door
    checks how many bytes each unidentified connection has received.

    ZeroMQ owns the connections and reports only file descriptors. By the time that a descriptor is used here, its
    number may belong to another connection, so the door compares the remote address before it shuts one down.

    Parameters
    ----------
    size : int
        Number of ranks.
    is_rank : callable
        Returns whether a descriptor is the connection of a rank.
    """

    def __init__(self, size: int, is_rank: Callable[[int], bool]) -> None:
        self._most, self._is_rank = _STRANGERS + size, is_rank
        self._strangers: dict[int, _Stranger] = {}
        self._look_ns = 0

    def opened(self, descriptor: int, now_ns: int) -> None:
        """Register a new connection; if there are too many, end the oldest unidentified one."""
        self._strangers.pop(descriptor, None)
        with contextlib.suppress(OSError), _connection(descriptor) as connection:
            self._strangers[descriptor] = _Stranger(connection.getpeername(), now_ns)
        if len(self._strangers) > self._most:
            self.end(next(iter(self._strangers)))

    def closed(self, descriptor: int) -> None:
        """Forget a connection that ended, or that is known to be a rank's."""
        self._strangers.pop(descriptor, None)

    def on_time(self, now_ns: int) -> None:
        """End connections that sent no hello in time, or too many bytes before one."""
        for descriptor, who in list(self._strangers.items()):
            if now_ns >= who.since_ns + HELLO_NS or _received_bytes(descriptor) > _MOST_BYTES:
                self.end(descriptor)
        self._look_ns = now_ns + _LOOK_NS

    def next_ns(self) -> int | None:
        """Return when to call `on_time` next, None if no connection is watched."""
        return self._look_ns if self._strangers else None

    def end(self, descriptor: int) -> None:
        """Shut down an unidentified connection."""
        stranger = self._strangers.pop(descriptor, None)
        if stranger is not None and not self._is_rank(descriptor):
            with contextlib.suppress(OSError), _connection(descriptor) as connection:
                if connection.getpeername() == stranger.where:
                    connection.shutdown(socket.SHUT_RDWR)


def local_host(descriptor: int) -> str:
    """Return the local address of a connection, or an empty string if it is closed."""
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
