"""What crosses the wire between a rank and the hub: length-prefixed MessagePack, bounded, and never pickle.

A frame is four bytes of length, highest first, and one message. Until a hello was accepted a frame may have 4 KiB;
nobody gets memory out of a hub by connecting to it.
"""

from __future__ import annotations

import struct
from typing import Any, Literal

import msgspec

from detcoll.errors import FrameError

VERSION = 1
HELLO_BYTES = 4096
FRAME_BYTES = 64 * 2**20
TEXT_CHARS = 16_384
"""Longer texts of an abort are cut."""

_LENGTH = struct.Struct(">I")


class Hello(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A rank asks to join. ``epoch`` counts the meetings of its process, ``remaining_ms`` is how long it will wait."""

    version: int
    job: str
    epoch: int
    rank: int
    size: int
    remaining_ms: int


class Gather(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A rank comes to the exchange ``name``, its ``number``-th."""

    number: int
    name: str
    payload: bytes
    remaining_ms: int
    ranks: list[int] = []


class Abort(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A rank gives up and says why."""

    kind: str
    text: str
    group: int = 0


class Bye(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A rank leaves in good order; the hub answers by closing the connection."""


class Welcome(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """All ranks are here. ``reach`` is an address by which other hosts reach that of rank 0, or empty."""

    reach: str


class Refused(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The world cannot be joined: ``fault`` "usage" blames the receiver, "world" somebody else, "later" nobody."""

    fault: Literal["usage", "world", "later"]
    text: str


class Gathered(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Everybody's payload of an exchange, in rank order."""

    number: int
    payloads: list[bytes]


class Missing(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """An exchange, or the joining (number 0), failed since ``ranks`` never came to it."""

    number: int
    ranks: list[int]
    text: str


class LostRank(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The connection of ``rank`` ended without a goodbye."""

    rank: int


class AbortedRank(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """``rank`` gave up."""

    rank: int
    kind: str
    text: str
    group: int = 0


class Closing(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Rank 0 left in good order and takes the hub along."""


ToHub = Hello | Gather | Abort | Bye
FromHub = Welcome | Refused | Gathered | Missing | LostRank | AbortedRank | Closing

_to_hub = msgspec.msgpack.Decoder(ToHub)
_from_hub = msgspec.msgpack.Decoder(FromHub)
_encoder = msgspec.msgpack.Encoder()


def pack(message: ToHub | FromHub) -> bytes:
    """Return ``message`` as a frame."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class Inbox:
    """Turns the bytes of one connection into messages."""

    def __init__(self, largest_bytes: int) -> None:
        self.largest_bytes = largest_bytes
        self._bytes = bytearray()

    def feed(self, data: bytes) -> None:
        """Take what was received."""
        self._bytes += data

    def to_hub(self) -> ToHub | None:
        """Return the next message of a rank, None if it is not complete yet.

        Raises
        ------
        FrameError
            If the bytes are no message that a rank may send.
        """
        message: ToHub | None = self._next(_to_hub)
        return message

    def from_hub(self) -> FromHub | None:
        """Return the next message of a hub; as `to_hub`."""
        message: FromHub | None = self._next(_from_hub)
        return message

    def _next(self, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
        if len(self._bytes) < _LENGTH.size:
            return None
        (size,) = _LENGTH.unpack_from(self._bytes)
        if size > self.largest_bytes:
            raise FrameError(f"a frame of {size} bytes exceeds {self.largest_bytes}")
        if len(self._bytes) < _LENGTH.size + size:
            return None
        body = bytes(self._bytes[_LENGTH.size : _LENGTH.size + size])
        del self._bytes[: _LENGTH.size + size]
        try:
            return decoder.decode(body)
        except ValueError as error:  # of msgspec, and of text that is not UTF-8
            raise FrameError(f"a frame is not a message of the rendezvous: {error}") from error
