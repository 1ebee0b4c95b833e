"""SOCKS5 (RFC 1928): the client's side, as much as tests and benchmarks of the relay need, and a proxy that fails.

`FaultyProxy` plays a path between two hosts that forgets connections, as a firewall does: what is sent over them is
taken and leads nowhere, without a word. New connections work, unless the path is dark altogether.
"""

from __future__ import annotations

import contextlib
import ipaddress
import selectors
import socket
import threading
from types import TracebackType
from typing import Self

GREETING = b"\x05\x01\x00"
"""Version 5, and one way of authentication: none."""

_PATIENCE_S = 20.0
_REPLY_BYTES = 10


def request(host: str, port: int, command: int = 1) -> bytes:
    """Return the request for a connection to an address; command 1 is CONNECT."""
    address = ipaddress.ip_address(host)
    kind = 1 if address.version == 4 else 4
    return bytes((5, command, 0, kind)) + address.packed + port.to_bytes(2, "big")


def receive(connection: socket.socket, nbytes: int) -> bytes:
    """Return exactly so many bytes, or fewer where the connection ends before."""
    received = bytearray()
    while len(received) < nbytes and (piece := connection.recv(nbytes - len(received))):
        received += piece
    return bytes(received)


def ask(proxy: str, said: bytes) -> tuple[socket.socket, bytes]:
    """Greet a proxy at ``host:port``, say ``said``, and return the connection and the reply to it.

    Raises
    ------
    OSError
        If the proxy cannot be reached, does not answer in time, or wants authentication.
    """
    host, _, port = proxy.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=_PATIENCE_S)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(GREETING)
        if receive(connection, 2) != b"\x05\x00":
            raise ConnectionRefusedError(f"the proxy at {proxy} wants authentication")
        connection.sendall(said)
        return connection, receive(connection, _REPLY_BYTES)
    except BaseException:
        connection.close()
        raise


def open_through(proxy: str, host: str, port: int) -> socket.socket:
    """Return a connection to an address through a proxy.

    Raises
    ------
    OSError
        If there is none.
    """
    connection, reply = ask(proxy, request(host, port))
    if reply[1:2] != b"\x00":
        connection.close()
        raise ConnectionRefusedError(f"the proxy at {proxy} answers {reply!r}")
    return connection


class FaultyProxy:
    """A SOCKS5 proxy on loopback, in a thread of its own, from ``__enter__`` to ``__exit__``."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._tunnels: list[_Tunnel] = []
        self._is_dark = self._is_over = False
        self._thread = threading.Thread(target=self._accept, name="faulty proxy")

    @property
    def address(self) -> str:
        """Where it listens, as ``host:port``."""
        host, port = self._listener.getsockname()
        return f"{host}:{port}"

    def forget(self) -> None:
        """Lead nothing any more of what comes over the connections that there are."""
        for tunnel in self._tunnels:
            tunnel.is_silent = True

    def go_dark(self) -> None:
        """Forget all connections, and answer no new ones."""
        self._is_dark = True
        self.forget()

    def __enter__(self) -> Self:
        """Begin to accept."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close everything."""
        self._is_over = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread up
        self._thread.join()
        self._listener.close()
        for tunnel in self._tunnels:
            tunnel.close()

    def _accept(self) -> None:
        while not self._is_over:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            tunnel = _Tunnel(client)
            tunnel.is_silent = self._is_dark
            self._tunnels.append(tunnel)
            tunnel.thread.start()


class _Tunnel:
    """One connection through a `FaultyProxy`, carried by a thread."""

    def __init__(self, client: socket.socket) -> None:
        self.is_silent = False
        self._ends = [client]
        self.thread = threading.Thread(target=self._run, name="faulty proxy's tunnel", daemon=True)

    def _run(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            is_open = self.is_silent or self._open()
            with selectors.DefaultSelector() as selector:
                for end in self._ends:
                    selector.register(end, selectors.EVENT_READ)
                while is_open and all(self._carry(key.fileobj) for key, _ in selector.select()):
                    pass
        for end in self._ends:
            end.close()

    def _open(self) -> bool:
        """Connect to where the client asks for; False if it left before."""
        client = self._ends[0]
        greeting = receive(client, 2)
        if len(greeting) < 2:
            return False
        receive(client, greeting[1])
        client.sendall(b"\x05\x00")
        asked = receive(client, 10)
        if len(asked) < 10:
            return False
        target = socket.create_connection((socket.inet_ntoa(asked[4:8]), int.from_bytes(asked[8:10], "big")))
        self._ends.append(target)
        for end in self._ends:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(b"\x05\x00\x00\x01" + bytes(6))
        return True

    def _carry(self, end: object) -> bool:
        assert isinstance(end, socket.socket)
        data = end.recv(65_536)
        if not self.is_silent:
            for other in self._ends:
                if other is not end:
                    other.sendall(data)
        return bool(data)

    def close(self) -> None:
        """End the connection and its thread."""
        for end in list(self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.thread.join()
