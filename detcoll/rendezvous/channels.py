"""The ZeroMQ sockets of the rendezvous, all made here.

The hub has a ROUTER, each rank a DEALER whose routing id is a random token, new for each session: who knows the token
is the rank. A connection that is made again takes the token over from the old one (`ZMQ_ROUTER_HANDOVER`), which may
not know yet that it is dead.

Who connects must name the protocol before it may send anything. That is not secret, but keeps what speaks another
protocol from filling the hub's memory. The mechanism is PLAIN with a ZAP handler.

ZeroMQ is imported when a socket is made: whoever only starts ranks does not wait for it.
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
"""What `wait` waits for, as ZeroMQ numbers it."""

_EVENT = struct.Struct("=Hi")


class Change(enum.Enum):
    """What happened to a connection."""

    OPENED = enum.auto()
    READY = enum.auto()
    REFUSED = enum.auto()
    ENDED = enum.auto()


class Sent(enum.Enum):
    """What became of a frame."""

    OUT = enum.auto()
    FULL = enum.auto()
    UNREACHABLE = enum.auto()


class Router:
    """The hub's end.

    Parameters
    ----------
    listener : socket.socket
        Listens already; ZeroMQ owns it from here on.
    tolerance_ns : int
        What heartbeats are derived from.
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
        """Return the next frame with token, descriptor of the connection and host of the sender; None if there is none.

        What is no frame is passed over, and counts as one without a header.
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
        """Send a frame if that needs no waiting."""
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
        """Answer one that asks to be let in; False if nobody does."""
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
        """Give everything back, once what was sent is out or the time is over."""
        self.socket.linger = linger_ms
        _end(self._context, self.socket, self.gate, self.monitor)


class Dealer:
    """A rank's end. It connects when it is made; `renew` starts again from nothing, with the same token.

    Parameters
    ----------
    endpoint : str
        Of the hub, as ZeroMQ writes it.
    tolerance_ns : int
        What heartbeats are derived from.
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
        self.socket.plain_password = _NAME  # ZeroMQ wants one
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
        """Drop the connection and whatever is on its way, and connect anew.

        Raises
        ------
        OSError
            If there are too few descriptors; all is as before.
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
        """Return the next frame, None if there is none."""
        import zmq

        try:
            parts = self.socket.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return None
        return bytes(parts[0]) if len(parts) == 1 else b""

    def send(self, frame: bytes) -> Sent:
        """Send a frame if that needs no waiting."""
        import zmq

        try:
            self.socket.send(frame, zmq.DONTWAIT)
        except zmq.Again:
            return Sent.FULL
        return Sent.OUT

    def close(self) -> None:
        """Give everything back at once."""
        _end(self._context, self.socket, self.monitor)


def changes(monitor: zmq.Socket[bytes], at_most: int) -> Iterator[tuple[Change, int]]:
    """Give what happened to connections, and the descriptor where there is one."""
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
        if event in kinds:  # the last of all says that there are no more
            yield kinds[event], value


def endpoint_of(where: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """Return a socket address as ZeroMQ writes it."""
    host, port = socket.getnameinfo(where, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def wait(items: list[tuple[Any, int]], deadline_ns: int | None) -> None:
    """Sleep until one of ``items`` is ready, or it is time."""
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
    """Return an error of ZeroMQ as one of the system."""
    import zmq

    return OSError(error.errno, error.strerror) if isinstance(error, zmq.ZMQError) else error


def _end(context: zmq.Context[zmq.Socket[bytes]], monitored: zmq.Socket[bytes], *others: zmq.Socket[bytes]) -> None:
    monitored.disable_monitor()
    for one in (monitored, *others):
        one.close()
    context.term()
