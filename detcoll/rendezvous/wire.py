"""Wire format between a rank and the hub: MessagePack in bounded frames, never pickle.

A message is split into pieces. Each piece is a single-part ZeroMQ message: a header (`Header`) and at most 60 KiB. So a
large message does not delay ZeroMQ's heartbeats, and the receiver checks each piece before it buffers the next one.
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
"""Limit for the sum of all payloads of an exchange."""
PAYLOAD_BYTES = 2**20
NAME_CHARS = 1024
TEXT_CHARS = 16_384
"""Longer abort texts are truncated."""
RANK_BYTES = PAYLOAD_BYTES + 2**17
"""The largest message of a rank: a payload and the list of members."""

_HEADER = struct.Struct(">BQQ")
FRAME_BYTES = _HEADER.size + PIECE_BYTES

CONTINUES = 1
HERE = 2


class Header(NamedTuple):
    """Header of a frame.

    ``number`` counts the pieces of one direction from 1; 0 is a note, which is neither numbered nor retransmitted.
    ``received`` acknowledges: it is the number of the last piece that arrived from the other side. ``flags``:
    `CONTINUES` if the message has more pieces, `HERE` in the note that comes first on a new connection.
    """

    flags: int
    number: int
    received: int


def frame(header: Header, piece: bytes | memoryview = b"") -> bytes:
    """Return the encoded frame."""
    return _HEADER.pack(*header) + bytes(piece)


def parse(data: bytes) -> tuple[Header, bytes]:
    """Return the header and the piece of a frame.

    Raises
    ------
    FrameError
        If the frame is shorter than a header.
    """
    if len(data) < _HEADER.size:
        raise FrameError(f"a frame of {len(data)} bytes has no header")
    return Header(*_HEADER.unpack_from(data)), data[_HEADER.size :]


class Hello(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A rank asks to join. ``epoch`` numbers the meetings of its process, ``remaining_ms`` is how long it will wait.

    The process accepts TCP connections at ``port`` as long as it lives; 0 if there is no such port.
    """

    version: int
    job: str
    epoch: int
    rank: int
    size: int
    remaining_ms: int
    port: int = 0


class Key(msgspec.Struct, array_like=True, frozen=True):
    """Identifies an exchange: name, members (None: all ranks), and how many with that name and members came before."""

    name: str
    ranks: tuple[int, ...] | None
    turn: int


class Gather(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A rank's contribution to an exchange; ``remaining_ms`` is how long the rank will wait."""

    key: Key
    payload: bytes
    remaining_ms: int


class Abort(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A rank aborts a group (0: the whole job) and gives the reason."""

    kind: str
    text: str
    group: int


class Bye(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A rank leaves normally."""


class Welcome(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """All ranks have joined. ``reach`` is an address at which other hosts reach rank 0's host, or empty."""

    reach: str


class Refused(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The receiver is not admitted.

    ``fault``: "usage" if it was started with wrong arguments, "world" if the cause lies elsewhere, "later" if it should
    try again.
    """

    fault: Literal["usage", "world", "later"]
    text: str


class Gathered(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The payloads of all members of an exchange, in rank order."""

    key: Key
    payloads: list[bytes]


class Missing(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """An exchange failed, or the meeting itself (no key).

    ``fault`` "absent": ``ranks`` did not arrive in time, and ``text`` gives further details. "lost" and "other":
    ``text`` is the whole reason.
    """

    key: Key | None
    fault: Literal["absent", "lost", "other"]
    ranks: tuple[int, ...]
    text: str


class LostRank(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """``rank`` is gone without a goodbye; ``text`` is the reason."""

    rank: int
    text: str


class AbortedRank(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """``rank`` aborted a group (0: the whole job)."""

    rank: int
    kind: str
    text: str
    group: int


class Closing(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Rank 0 left normally, and the hub closes with it."""


ToHub = Hello | Gather | Abort | Bye
FromHub = Welcome | Refused | Gathered | Missing | LostRank | AbortedRank | Closing

_to_hub = msgspec.msgpack.Decoder(ToHub)
_from_hub = msgspec.msgpack.Decoder(FromHub)
_encoder = msgspec.msgpack.Encoder()


def pack(message: ToHub | FromHub) -> bytes:
    """Return ``message`` as MessagePack bytes."""
    return _encoder.encode(message)


def to_hub(data: bytes) -> ToHub:
    """Decode a message of a rank to the hub.

    Raises
    ------
    FrameError
        If the bytes are not a message that a rank may send.
    """
    try:
        message: ToHub = _to_hub.decode(data)
    except ValueError as error:  # from msgspec, or for text that is not UTF-8
        raise FrameError(f"not a message of the rendezvous: {error}") from error
    return message


def from_hub(data: bytes) -> FromHub:
    """Decode a message of the hub to a rank; raises as `to_hub`."""
    try:
        message: FromHub = _from_hub.decode(data)
    except ValueError as error:
        raise FrameError(f"not a message of the rendezvous: {error}") from error
    return message
