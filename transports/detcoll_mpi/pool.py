"""Memory for what arrives without a place of its own, lent until it is released and then used again."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.transport import Ticket

LARGEST_IDLE_BYTES = 2**26
SMALLEST_BYTES = 256


class Pool:
    """Idle buffers by size, in powers of two."""

    def __init__(self) -> None:
        self._idle: defaultdict[int, list[NDArray[np.uint8]]] = defaultdict(list)
        self._idle_bytes = 0

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """Return a buffer of at least ``nbytes``."""
        size = max(SMALLEST_BYTES, 1 << (nbytes - 1).bit_length())
        idle = self._idle[size]
        if not idle:
            return np.empty(size, np.uint8)
        self._idle_bytes -= size
        return idle.pop()

    def give(self, buffer: NDArray[np.uint8]) -> None:
        """Take a buffer back, to be used again unless much is idle already."""
        if self._idle_bytes + buffer.size <= LARGEST_IDLE_BYTES:
            self._idle_bytes += buffer.size
            self._idle[buffer.size].append(buffer)


class Loan:
    """A buffer lent with a ticket."""

    __slots__ = ("_buffer", "_pool")

    def __init__(self, pool: Pool, buffer: NDArray[np.uint8]) -> None:
        self._pool = pool
        self._buffer = buffer

    def memory(self, nbytes: int) -> memoryview:
        """Return the first ``nbytes``, writable."""
        data: Any = self._buffer.data
        return memoryview(data)[:nbytes]

    def give_back(self) -> None:
        """Give the buffer to the pool."""
        self._pool.give(self._buffer)

    def take_back(self, ticket: Ticket) -> None:
        """Give the buffer to the pool when its ticket is released."""
        self.give_back()
