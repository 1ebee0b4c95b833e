"""What lies where in shared memory, and the address by which peers find it.

Each rank makes one memory file (``memfd``) for what others send to it::

    file header       one page: magic, layout version, geometry, a random key
    ring of source 0  `Geometry.stride_bytes` bytes
    ring of source 1  ...
    stage             what this rank shows all others during collectives; see `detcoll_shm.stage`

A ring belongs to one ordered pair of ranks: its producer is the source, its consumer the file's owner. Each maps that
ring alone::

    control           one page of words, each on cache lines of its own
    descriptors       `Geometry.slots` times 128 bytes, used in a circle, in the order of sending
    area              records of payload, 64-byte aligned, placed by the producer wherever there is room

Words are aligned and 64 bits wide. Each has one writer, but for SLEEPING, which the producer may clear:

=========== ======== ==============================================================================================
word        writer   meaning
=========== ======== ==============================================================================================
HEAD        producer descriptors published since the start
TAIL        consumer descriptors taken since the start; their slots may be used again
WANTS_ROOM  producer 1 while a send waits for room, so that the consumer tells when it makes some
SLEEPING    consumer 1 while it waits on its doorbell, so that the producer rings it
STATE       producer a `State`: has it joined, closed or aborted
=========== ======== ==============================================================================================

A descriptor is `DESCRIPTOR` (its own index, a `Kind`, tag, size of the message, size of this part, place of the record
in the area) and up to `INLINE_BYTES` of payload. A record is one word, a `Record` state, then the payload at +64. The
producer sets the state to FULL, the consumer to LENT and FREE; so records are given back in any order.

Ordering. Payload, then descriptor, then HEAD are written with plain stores, and read in the opposite order with plain
loads: x86-64 keeps both orders (Intel SDM volume 3, 9.2.2), and a 64-bit aligned access is one access. The two flags
follow Dekker: each side writes its own word, passes a full fence, and then reads the other's, so that one of the two
always sees the other. A lock taken and given back is that fence (a locked instruction).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import msgspec

from detcoll.errors import ConnectError

VERSION = 5
MAGIC = b"detcoll\0"
KEY_BYTES = 16
HEADER = struct.Struct(f"<8sqqqqq{KEY_BYTES}s")
"""Magic, version, ranks, ring bytes, slots, chunk bytes, key."""

PAGE_BYTES = 4096
WORD_BYTES = 8
LINE_BYTES = 64
SLOT_BYTES = 128
DESCRIPTOR = struct.Struct("<qqQqqq")
INLINE_BYTES = SLOT_BYTES - DESCRIPTOR.size
RECORD_HEADER_BYTES = LINE_BYTES
SMALLEST_RING_BYTES = 4096

# Two cache lines apart, since processors fetch lines in pairs.
HEAD, TAIL, WANTS_ROOM, SLEEPING, STATE = 0, 16, 32, 48, 64


class State(IntEnum):
    """How far the producer of a ring has come."""

    ABSENT = 0
    JOINED = 1
    CLOSED = 2
    ABORTED = 3


class Kind(IntEnum):
    """What a descriptor announces."""

    INLINE = 1
    WHOLE = 2
    FIRST = 3
    MORE = 4


class Record(IntEnum):
    """Who needs a record of the area."""

    FREE = 0
    FULL = 1
    LENT = 2


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def record_bytes(payload_bytes: int) -> int:
    """Return how much of the area a record with ``payload_bytes`` takes."""
    return RECORD_HEADER_BYTES + (payload_bytes + LINE_BYTES - 1 & -LINE_BYTES)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of one ring and of the stage; the owner of the memory chooses them.

    ``ring_bytes`` : payload that four of the largest undivided messages hold.  ``slots`` : a power of two.
    ``chunk_bytes`` : how much of an array the stage holds at once, a multiple of a cache line.
    ``device_chunk_bytes`` : the same where the array of a rank is on a device.
    """

    ring_bytes: int
    slots: int
    chunk_bytes: int = LINE_BYTES
    device_chunk_bytes: int = LINE_BYTES

    @property
    def whole_bytes(self) -> int:
        """The largest message that stays undivided, and so can be lent without a copy."""
        return self.ring_bytes // 4

    @property
    def area_bytes(self) -> int:
        """Size of the area: four of the largest undivided messages with their headers."""
        return _round_up(self.ring_bytes, LINE_BYTES) + 8 * LINE_BYTES

    @property
    def lent_bytes(self) -> int:
        """How much of the area the consumer may lend; the other half keeps messages moving."""
        return self.area_bytes // 2

    @property
    def copied_bytes(self) -> int:
        """Messages of at most this size are copied out, since that costs less than lending."""
        return max(LINE_BYTES, min(4096, self.ring_bytes // 64))

    @property
    def area_at(self) -> int:
        """Offset of the area in a ring."""
        return PAGE_BYTES + _round_up(self.slots * SLOT_BYTES, PAGE_BYTES)

    @property
    def stride_bytes(self) -> int:
        """Bytes of one ring, in whole pages."""
        return _round_up(self.area_at + self.area_bytes, PAGE_BYTES)

    def ring_at(self, source: int) -> int:
        """Return the offset of the ring of ``source`` in the file."""
        return PAGE_BYTES + source * self.stride_bytes

    def stage_at(self, ranks: int) -> int:
        """Return the offset of the stage in a file with rings for ``ranks`` sources."""
        return self.ring_at(ranks)

    @property
    def half_bytes(self) -> int:
        """Room for one chunk, in whole pages."""
        return _round_up(max(self.chunk_bytes, self.device_chunk_bytes), PAGE_BYTES)

    @property
    def stage_bytes(self) -> int:
        """Bytes of the stage: a page of words, two chunks given, and two folded."""
        return PAGE_BYTES + 4 * self.half_bytes


class Address(msgspec.Struct, frozen=True):
    """Where a rank's memory and doorbell are: descriptors of a process, to be opened through ``/proc``."""

    version: int
    host: str
    pid_namespace: str
    pid: int
    memory_fd: int
    bell_fd: int
    ranks: int
    ring_bytes: int
    slots: int
    chunk_bytes: int
    device_chunk_bytes: int
    key: str

    def encode(self) -> str:
        """Return the address as text."""
        return "shm:" + msgspec.json.encode(self).decode("utf-8")

    @classmethod
    def decode(cls, rank: int, text: str) -> Address:
        """Return the address of ``rank`` that ``text`` holds.

        Raises
        ------
        ConnectError
            If it is no such address, or of another layout version.
        """
        try:
            address = msgspec.json.decode(text.removeprefix("shm:"), type=cls)
        except msgspec.DecodeError as error:
            raise ConnectError(f"address of rank {rank} is {text!r}; expected one of transport 'shm'") from error
        if address.version != VERSION:
            raise ConnectError(
                f"rank {rank} lays shared memory out in version {address.version}, this rank in {VERSION}; "
                "install the same detcoll for all ranks"
            )
        return address

    @property
    def geometry(self) -> Geometry:
        """The sizes of this rank's rings and stage."""
        return Geometry(self.ring_bytes, self.slots, self.chunk_bytes, self.device_chunk_bytes)

    @property
    def key_bytes(self) -> bytes:
        """What marks memory of this rank."""
        return bytes.fromhex(self.key)

    def header(self) -> bytes:
        """Return the file header that the memory of this address starts with."""
        sizes = (self.ranks, self.ring_bytes, self.slots, self.chunk_bytes)
        return HEADER.pack(MAGIC, self.version, *sizes, self.key_bytes)
