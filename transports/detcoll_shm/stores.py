"""What an endpoint counts, and the memory it lends out besides the rings."""

from __future__ import annotations

from dataclasses import dataclass

from detcoll.transport import Ticket

_SMALLEST_BYTES = 4096


@dataclass(slots=True)
class Counts:
    """Counters of one endpoint.

    ``messages_lent``/``bytes_lent`` : received without a copy.  ``messages_kept`` : came before their receive was
    posted and had to be copied out of the ring.  ``messages_dropped`` : came with a tag that was discarded.
    ``waits_for_room`` : times a send found the ring full.
    """

    messages_sent: int = 0
    bytes_sent: int = 0
    messages_received: int = 0
    bytes_received: int = 0
    messages_lent: int = 0
    bytes_lent: int = 0
    messages_kept: int = 0
    messages_dropped: int = 0
    waits_for_room: int = 0
    bells_rung: int = 0
    moves: int = 0
    sleeps: int = 0


@dataclass(slots=True)
class Budget:
    """A bound on the bytes of messages kept for receives not posted yet."""

    left_bytes: int

    def take(self, nbytes: int) -> bool:
        """Take ``nbytes`` if there are as many."""
        if nbytes > self.left_bytes:
            return False
        self.left_bytes -= nbytes
        return True

    def give(self, nbytes: int) -> None:
        """Give ``nbytes`` back."""
        self.left_bytes += nbytes


class Pool:
    """Buffers for messages that are put together from parts; used ones are kept up to a bound."""

    __slots__ = ("_kept", "_left_bytes")

    def __init__(self, kept_bytes: int) -> None:
        self._left_bytes = kept_bytes
        self._kept: dict[int, list[bytearray]] = {}

    def take(self, nbytes: int) -> bytearray:
        """Return a buffer of at least ``nbytes``."""
        size = max(_SMALLEST_BYTES, 1 << (nbytes - 1).bit_length())
        kept = self._kept.get(size)
        if kept:
            self._left_bytes += size
            return kept.pop()
        return bytearray(size)

    def give(self, buffer: bytearray) -> None:
        """Take ``buffer`` back; nobody may use it any more."""
        size = len(buffer)
        if size <= self._left_bytes:
            self._left_bytes -= size
            self._kept.setdefault(size, []).append(buffer)


class PoolLoan:
    """Lends a buffer of a pool until the ticket is released."""

    __slots__ = ("_buffer", "_pool")

    def __init__(self, pool: Pool, buffer: bytearray) -> None:
        self._pool = pool
        self._buffer = buffer

    def take_back(self, ticket: Ticket) -> None:
        """Give the buffer back to its pool."""
        self._pool.give(self._buffer)
