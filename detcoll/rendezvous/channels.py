"""The ZeroMQ sockets of the rendezvous; no other module creates any.

The hub has a ROUTER, and each rank a DEALER. The routing id of a DEALER is a random token, new for each session, and it
identifies the rank. A new connection takes the token over from the old one (`ZMQ_ROUTER_HANDOVER`), whose end the hub
may not have noticed yet.

A client must name the protocol before it may send anything (PLAIN mechanism with a ZAP handler). The name is not a
secret; it keeps clients of another protocol from filling the hub's memory.

ZeroMQ is imported when a socket is created, so that a process that only starts ranks does not load it.
"""

from __future__ import annotations

import contextlib
import enum
import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from detcoll.rendezvous import wire

if TYPE_CHECKING:
    import zmq

TOKEN_BYTES = 16
_NAME = b"detcoll"
_MOST_BYTES = wire.FRAME_BYTES
_HIGH_WATER = 128
_HANDSHAKE_MS = 10_000
_CONNECT_MS = 3_000
_RECONNECT_MS, _LONGEST_RECONNECT_MS = 50, 500
_LONGEST_HEARTBEAT_MS, _LONGEST_SILENCE_MS = 1_000, 5_000
_SHORTEST_HEARTBEAT_MS, _SHORTEST_SILENCE_MS = 50, 250


READ, WRITE = 1, 2
"""Poll flags for `wait`: ZMQ_POLLIN and ZMQ_POLLOUT."""

_EVENT = struct.Struct("=Hi")


class Change(enum.Enum):
    """Event of a connection: accepted, handshake completed, handshake failed, or disconnected."""

    OPENED = enum.auto()
    READY = enum.auto()
    REFUSED = enum.auto()
    ENDED = enum.auto()


class Sent(enum.Enum):
    """Result of a send: queued, queue full, or no connection to the receiver."""

    OUT = enum.auto()
    FULL = enum.auto()
    UNREACHABLE = enum.auto()


class Router:
    """The hub's socket.

    Parameters
    ----------
    listener : socket.socket
        A listening TCP socket; owned by ZeroMQ afterwards.
    tolerance_ns : int
        How long a connection may be down; determines the heartbeat intervals.
    """

    def __init__(self, listener: socket.socket, tolerance_ns: int) -> None:
        import zmq

        self._context = zmq.Context(1)
        try:
            self.gate = self._context.socket(zmq.REP)
            self.gate.linger = 0
            self.gate.bind("inproc://zeromq.zap.01")
            self.socket = self._context.socket(zmq.ROUTER)
            _configure(self.socket, tolerance_ns)
            self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
            self.socket.setsockopt(zmq.BACKLOG, 4096)
            self.socket.plain_server = True
            self.socket.zap_domain = _NAME
            self.monitor = self.socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
            self.monitor.linger = 0
            endpoint = endpoint_of(listener.getsockname())
            self.socket.ipv6 = listener.family == socket.AF_INET6
            listener.setblocking(False)
            self.socket.setsockopt(zmq.USE_FD, listener.detach())
            self.socket.bind(endpoint)
        except BaseException as error:
            self._context.destroy(0)
            raise _translated(error) from error

    def receive(self) -> tuple[bytes, bytes, int, str] | None:
        """Return the next frame as (token, frame, descriptor of the connection, sender's host), None if there is none.

        A message that is not a single frame is returned as an empty frame, which `wire.parse` rejects.
        """
        import zmq

        try:
            parts = self.socket.recv_multipart(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return None
        last = parts[-1]
        data = last.bytes if len(parts) == 2 else b""
        host = ""
        with contextlib.suppress(zmq.ZMQError):
            host = str(last.get("Peer-Address"))
        return parts[0].bytes, data, int(last.get(zmq.SRCFD)), host

    def send(self, token: bytes, frame: bytes) -> Sent:
        """Send a frame without blocking."""
        import zmq

        try:
            self.socket.send_multipart((token, frame), zmq.DONTWAIT)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return Sent.UNREACHABLE
        return Sent.OUT

    def admit(self) -> bool:
        """Answer one ZAP request; return False if none is pending."""
        import zmq

        try:
            request = self.gate.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return False
        is_ours = request[5:7] == [b"PLAIN", _NAME]
        status = (b"200", b"OK") if is_ours else (b"400", b"not of this protocol")
        self.gate.send_multipart((request[0], request[1], *status, b"", b""))
        return True

    def close(self, linger_ms: int) -> None:
        """Close the sockets; wait up to ``linger_ms`` until queued messages are sent."""
        self.socket.linger = linger_ms
        _end(self._context, self.socket, self.gate, self.monitor)


class Dealer:
    """A rank's socket. It connects on creation; `renew` replaces it by a new socket with the same token.

    Parameters
    ----------
    endpoint : str
        Of the hub, in ZeroMQ notation.
    tolerance_ns : int
        How long a connection may be down; determines the heartbeat intervals.
    """

    def __init__(self, endpoint: str, tolerance_ns: int) -> None:
        self._endpoint, self._tolerance_ns = endpoint, tolerance_ns
        self._token = os.urandom(TOKEN_BYTES)
        import zmq

        self._context = zmq.Context(1)
        try:
            self._open()
        except BaseException as error:
            self._context.destroy(0)
            raise _translated(error) from error

    def _open(self) -> None:
        import zmq

        self.socket = self._context.socket(zmq.DEALER)
        try:
            self._connect()
        except zmq.ZMQError:
            self.socket.close(0)
            raise

    def _connect(self) -> None:
        import zmq

        _configure(self.socket, self._tolerance_ns)
        self.socket.setsockopt(zmq.ROUTING_ID, self._token)
        self.socket.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)
        self.socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, _LONGEST_RECONNECT_MS)
        self.socket.plain_username = _NAME
        self.socket.plain_password = _NAME  # PLAIN requires one
        self.monitor = self.socket.get_monitor_socket(
            zmq.EVENT_DISCONNECTED
            | zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )
        self.monitor.linger = 0
        self.socket.ipv6 = "[" in self._endpoint
        self.socket.connect(self._endpoint)

    def renew(self) -> None:
        """Drop the connection with all queued messages, and connect with a new socket.

        Raises
        ------
        OSError
            If there are too few descriptors; the old socket then stays.
        """
        import zmq

        old = self.socket, self.monitor
        try:
            self._open()
        except zmq.ZMQError as error:
            self.socket, self.monitor = old
            raise _translated(error) from error
        old[0].disable_monitor()
        for one in old:
            one.close(0)

    def receive(self) -> bytes | None:
        """Return the next frame, None if there is none; empty if the message is not a single frame."""
        import zmq

        try:
            parts = self.socket.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return None
        return bytes(parts[0]) if len(parts) == 1 else b""

    def send(self, frame: bytes) -> Sent:
        """Send a frame without blocking."""
        import zmq

        try:
            self.socket.send(frame, zmq.DONTWAIT)
        except zmq.Again:
            return Sent.FULL
        return Sent.OUT

    def close(self) -> None:
        """Close the sockets at once and discard queued messages."""
        _end(self._context, self.socket, self.monitor)


def changes(monitor: zmq.Socket[bytes], at_most: int) -> Iterator[tuple[Change, int]]:
    """Yield up to ``at_most`` connection events, each with ZeroMQ's event value (on the hub, the descriptor)."""
    import zmq

    kinds = {
        zmq.EVENT_ACCEPTED: Change.OPENED,
        zmq.EVENT_HANDSHAKE_SUCCEEDED: Change.READY,
        zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: Change.REFUSED,
        zmq.EVENT_HANDSHAKE_FAILED_AUTH: Change.REFUSED,
        zmq.EVENT_DISCONNECTED: Change.ENDED,
    }
    for _ in range(at_most):
        try:
            event, value = _EVENT.unpack(monitor.recv_multipart(zmq.DONTWAIT)[0])
        except zmq.Again:
            return
        if event in kinds:  # skips ZMQ_EVENT_MONITOR_STOPPED
            yield kinds[event], value


def endpoint_of(where: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """Return a socket address in ZeroMQ notation."""
    host, port = socket.getnameinfo(where, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def wait(items: list[tuple[Any, int]], deadline_ns: int | None) -> None:
    """Block until one of ``items`` is ready or the deadline passes."""
    import zmq

    left_ms = -1
    if deadline_ns is not None:
        left_ms = max(0, -(-(deadline_ns - time.monotonic_ns()) // 10**6))
    with contextlib.suppress(zmq.Again, InterruptedError):
        zmq.zmq_poll(items, min(left_ms, 2**30))


def _configure(made: zmq.Socket[bytes], tolerance_ns: int) -> None:
    import zmq

    silence_ms = max(_SHORTEST_SILENCE_MS, min(_LONGEST_SILENCE_MS, tolerance_ns // 3_000_000))
    made.linger = 0
    made.set_hwm(_HIGH_WATER)
    made.setsockopt(zmq.MAXMSGSIZE, _MOST_BYTES)
    made.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    heartbeat_ms = max(_SHORTEST_HEARTBEAT_MS, min(_LONGEST_HEARTBEAT_MS, silence_ms // 4))
    made.setsockopt(zmq.HEARTBEAT_IVL, heartbeat_ms)
    made.setsockopt(zmq.HEARTBEAT_TIMEOUT, silence_ms)
    made.setsockopt(zmq.TCP_KEEPALIVE, 1)
    made.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 10)
    made.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 5)
    made.setsockopt(zmq.TCP_KEEPALIVE_CNT, 4)
    made.setsockopt(zmq.TCP_MAXRT, max(1_000, silence_ms))


def _translated(error: BaseException) -> BaseException:
    """Return a ZMQError as an OSError, any other error unchanged."""
    import zmq

    return OSError(error.errno, error.strerror) if isinstance(error, zmq.ZMQError) else error


def _end(context: zmq.Context[zmq.Socket[bytes]], monitored: zmq.Socket[bytes], *others: zmq.Socket[bytes]) -> None:
    monitored.disable_monitor()
    for one in (monitored, *others):
        one.close()
    context.term()
