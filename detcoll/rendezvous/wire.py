"""What crosses the wire between a rank and the hub: MessagePack in bounded frames, and never pickle.

A message is cut into pieces, each a ZeroMQ message of one part: a header (`Header`) and at most 60 KiB. So a large
message never holds back ZeroMQ's heartbeats, and nobody can make the other side hold more than a piece unasked.
"""

from __future__ import annotations

import struct
from typing import Literal, NamedTuple

import msgspec

from detcoll.errors import FrameError

VERSION = 2
HELLO_BYTES = 4096
PIECE_BYTES = 60 * 1024
MESSAGE_BYTES = 64 * 2**20
"""What all payloads of an exchange may have together."""
PAYLOAD_BYTES = 2**20
NAME_CHARS = 1024
TEXT_CHARS = 16_384
"""Longer texts of an abort are cut."""
RANK_BYTES = PAYLOAD_BYTES + 2**17
"""The largest message of a rank: its payload, and who takes part."""

_HEADER = struct.Struct(">BQQ")
FRAME_BYTES = _HEADER.size + PIECE_BYTES

CONTINUES = 1
HERE = 2


class Header(NamedTuple):
    """What a frame says beside its piece.

    ``number`` counts the pieces of one direction from 1; 0 is a note, which is neither counted nor repeated.
    ``received`` is the number of the last piece that arrived from the other side. ``flags``: `CONTINUES` if the message
    has more pieces, `HERE` in the note that comes first on a new connection.
    """

    flags: int
    number: int
    received: int


def frame(header: Header, piece: bytes | memoryview = b"") -> bytes:
    """Return one frame."""
    return _HEADER.pack(*header) + bytes(piece)


def parse(data: bytes) -> tuple[Header, bytes]:
    """Return header and piece of a frame.

    Raises
    ------
    FrameError
        If it is too short to have a header.
    """
    if len(data) < _HEADER.size:
        raise FrameError(f"a frame of {len(data)} bytes has no header")
    return Header(*_HEADER.unpack_from(data)), data[_HEADER.size :]


class Hello(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A rank asks to join. ``epoch`` counts the meetings of its process, ``remaining_ms`` is how long it will wait.

    As long as the process lives, its host accepts connections at ``port``; 0 if there is no such port.
    """

    version: int
    job: str
    epoch: int
    rank: int
    size: int
    remaining_ms: int
    port: int = 0


class Key(msgspec.Struct, array_like=True, frozen=True):
    """Which exchange: its name, who takes part (None: all ranks), and the how many-th of that name and those ranks."""

    name: str
    ranks: tuple[int, ...] | None
    turn: int


class Gather(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A rank comes to an exchange."""

    key: Key
    payload: bytes
    remaining_ms: int


class Abort(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A rank gives up a group (0: the whole job) and says why."""

    kind: str
    text: str
    group: int


class Bye(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A rank leaves in good order."""


class Welcome(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """All ranks are here. ``reach`` is an address by which other hosts reach that of rank 0, or empty."""

    reach: str


class Refused(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The receiver cannot take part: ``fault`` "usage" blames it, "world" somebody else, "later" nobody."""

    fault: Literal["usage", "world", "later"]
    text: str


class Gathered(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The payloads of those who take part in an exchange, in rank order."""

    key: Key
    payloads: list[bytes]


class Missing(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """An exchange, or the joining (no key), failed.

    ``fault`` "absent": ``ranks`` did not come to it, and ``text`` adds what else is known; "lost" and "other": ``text``
    says it all.
    """

    key: Key | None
    fault: Literal["absent", "lost", "other"]
    ranks: tuple[int, ...]
    text: str


class LostRank(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """``rank`` is gone without a goodbye; ``text`` says what is known of that."""

    rank: int
    text: str


class AbortedRank(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """``rank`` gave up."""

    rank: int
    kind: str
    text: str
    group: int


class Closing(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Rank 0 left in good order and takes the hub along."""


ToHub = Hello | Gather | Abort | Bye
FromHub = Welcome | Refused | Gathered | Missing | LostRank | AbortedRank | Closing

_to_hub = msgspec.msgpack.Decoder(ToHub)
_from_hub = msgspec.msgpack.Decoder(FromHub)
_encoder = msgspec.msgpack.Encoder()


def pack(message: ToHub | FromHub) -> bytes:
    """Return ``message`` as bytes."""
    return _encoder.encode(message)


def to_hub(data: bytes) -> ToHub:
    """Return the message of a rank.

    Raises
    ------
    FrameError
        If the bytes are no message that a rank may send.
    """
    try:
        message: ToHub = _to_hub.decode(data)
    except ValueError as error:  # of msgspec, and of text that is not UTF-8
        raise FrameError(f"not a message of the rendezvous: {error}") from error
    return message


def from_hub(data: bytes) -> FromHub:
    """Return the message of a hub; as `to_hub`."""
    try:
        message: FromHub = _from_hub.decode(data)
    except ValueError as error:
        raise FrameError(f"not a message of the rendezvous: {error}") from error
    return message
