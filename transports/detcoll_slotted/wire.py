"""The frames of the slotted transport.

A message is one header frame, and for DATA and WARM a second frame with the payload, which means nothing in WARM. A
payload that was cut at the end of a window comes in several DATA messages, each with its place in the whole. All
integers are little-endian. Every frame carries a cumulative acknowledgement of the opposite direction, so a busy pair
needs no frames of its own for it.

========  =====  ==================================================================
field     bytes  meaning
========  =====  ==================================================================
magic     4      ``DTC`` and the protocol version
kind      1      HELLO, DATA, ACK, BYE or WARM
lane      1      0 bulk, 1 express: which sequence ``sequence`` counts in
(pad)     2
source    4      rank of the sender
tag       8      of a DATA message
total     4      bytes of the whole payload of which this is a part, or all; HELLO: 1 if it wants an answer
offset    4      where in it this part begins
token     8      random number of the job; a frame with another is not ours
sequence  8      of this message in its lane, from 0; for ACK and BYE unused
bulk_ack  8      messages of the bulk lane received in order so far
fast_ack  8      messages of the express lane received in order so far
consumed  8      bytes of bulk payload received and no longer held
========  =====  ==================================================================
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from detcoll.errors import FrameError

MAGIC = b"DTC\x04"
_LAYOUT = struct.Struct("<4sBBxxIQIIQQQQQ")
HEADER_BYTES = _LAYOUT.size
FRAME_BYTES = HEADER_BYTES + 2 + 9
"""What a DATA message adds to its payload on the wire: the header and ZMTP's lengths (RFC 23: 2 short, 9 long)."""


class FrameKind(IntEnum):
    """What a frame says."""

    HELLO = 0
    DATA = 1
    ACK = 2
    BYE = 3
    WARM = 4


class Lane(IntEnum):
    """Which connection a message takes."""

    BULK = 0
    EXPRESS = 1


LANES = tuple(Lane)
_KINDS = tuple(FrameKind)
"""By number: to look one up takes a tenth of what it takes to make one of a number, or to go through an enumeration."""


class Header(NamedTuple):
    """A decoded header frame."""

    kind: FrameKind
    lane: Lane
    source: int
    tag: int
    total: int
    offset: int
    token: int
    sequence: int
    acks: tuple[int, int]
    consumed: int

    def encode(self) -> bytes:
        """Return the bytes of the frame."""
        return _LAYOUT.pack(
            MAGIC, self.kind, self.lane, self.source, self.tag, self.total, self.offset, self.token, self.sequence,
            *self.acks, self.consumed,
        )  # fmt: skip


def decode(frame: bytes | memoryview) -> Header:
    """Return the header in ``frame``.

    Raises
    ------
    FrameError
        If it is not a header of this protocol version.
    """
    if len(frame) != HEADER_BYTES:
        raise FrameError(f"a header has {HEADER_BYTES} bytes, this frame {len(frame)}")
    magic, kind, lane, source, tag, total, offset, token, sequence, bulk, fast, consumed = _LAYOUT.unpack(frame)
    if magic != MAGIC:
        raise FrameError(f"frame begins with {magic!r}, expected {MAGIC!r}")
    try:
        return Header(_KINDS[kind], LANES[lane], source, tag, total, offset, token, sequence, (bulk, fast), consumed)
    except IndexError as error:
        raise FrameError(f"frame of rank {source}: there is no kind {kind} or no lane {lane}") from error
