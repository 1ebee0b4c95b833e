"""The server's side of SOCKS5 (RFC 1928), as far as the relay speaks it, without any I/O.

A client says which ways of authentication it knows, and is told "none". Then it asks for a connection to an address and
is answered with a code. Of the commands there is CONNECT alone; of the addresses IPv4 and IPv6, since names would be
looked up. No byte is taken beyond the request, so what follows belongs to the connection.
"""

from __future__ import annotations

import ipaddress
from enum import IntEnum

_VERSION = 5
_NO_AUTHENTICATION, _NO_METHOD = 0, 0xFF
_CONNECT = 1
_ADDRESS_BYTES = {1: 4, 4: 16}
_PORT_BYTES = 2


class Answer(IntEnum):
    """Codes of RFC 1928, section 6."""

    SUCCEEDED = 0
    NOT_ALLOWED = 2
    REFUSED = 5
    COMMAND_UNKNOWN = 7
    ADDRESS_UNKNOWN = 8

    def encode(self) -> bytes:
        """Return the reply; the bound address in it is left zero, which means nothing to a client that connects."""
        return bytes((_VERSION, self, 0, 1, 0, 0, 0, 0, 0, 0))


class Handshake:
    """What one client has said so far.

    ``target`` is the host and port that it asked for, and ``refusal`` why it gets none; either ends the handshake.
    ``reply`` is what to send to it now, with or without a refusal.
    """

    def __init__(self) -> None:
        self.target: tuple[str, int] | None = None
        self.refusal: Answer | None = None
        self.reply = b""
        self._said = bytearray()
        self._is_greeted = False

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be read."""
        return self.target is not None or self.refusal is not None

    @property
    def wants_bytes(self) -> int:
        """How many bytes to read next, at most."""
        return 0 if self.is_over else self._expects() - len(self._said)

    def feed(self, data: bytes) -> None:
        """Take in at most `wants_bytes` bytes."""
        self.reply = b""
        self._said += data
        if not self._is_plausible():
            self._refuse(Answer.NOT_ALLOWED, b"")  # another protocol gets no answer
        elif not self.wants_bytes:
            (self._read_request if self._is_greeted else self._read_greeting)()

    def _is_plausible(self) -> bool:
        return self._said[:1] in (b"", bytes((_VERSION,)))

    def _expects(self) -> int:
        """Return how long the message that has begun is, as far as that is known."""
        said = self._said
        if not self._is_greeted:
            return 2 + (said[1] if len(said) >= 2 else 0)
        if len(said) < 4:
            return 4
        return 4 + _ADDRESS_BYTES.get(said[3], -_PORT_BYTES) + _PORT_BYTES

    def _read_greeting(self) -> None:
        if _NO_AUTHENTICATION not in self._said[2:]:
            self._refuse(Answer.NOT_ALLOWED, bytes((_VERSION, _NO_METHOD)))
            return
        self._is_greeted = True
        self._said.clear()
        self.reply = bytes((_VERSION, _NO_AUTHENTICATION))

    def _read_request(self) -> None:
        command, kind = self._said[1], self._said[3]
        if command != _CONNECT:
            self._refuse(Answer.COMMAND_UNKNOWN)
        elif kind not in _ADDRESS_BYTES:
            self._refuse(Answer.ADDRESS_UNKNOWN)
        else:
            host = ipaddress.ip_address(bytes(self._said[4:-_PORT_BYTES]))
            self.target = str(host), int.from_bytes(self._said[-_PORT_BYTES:], "big")

    def _refuse(self, answer: Answer, reply: bytes | None = None) -> None:
        self.refusal = answer
        self.reply = answer.encode() if reply is None else reply
