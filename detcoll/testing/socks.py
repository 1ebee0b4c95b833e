"""The client's side of SOCKS5 (RFC 1928), as much as tests and benchmarks of the relay need."""

from __future__ import annotations

import ipaddress
import socket

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
