"""Memory for what arrives without a place of its own, used again once it is free.

Fresh memory costs a fault for each page at its first use: without the pool, an all-reduce of 16 MiB by plan took a
quarter longer.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.transport import Ticket

LARGEST_IDLE_BYTES = 2**26
SMALLEST_BYTES = 4096
"""Less than a page is left to Python."""


class Pool:
    """Idle buffers by size, in powers of two."""

    def __init__(self) -> None:
        self._idle: defaultdict[int, list[NDArray[np.uint8]]] = defaultdict(list)
        self._idle_bytes = 0

    def take(self, nbytes: int) -> tuple[memoryview, Loan | None]:
        """Return writable memory of ``nbytes``, and what takes it back, None where that is not worth it."""
        if nbytes < SMALLEST_BYTES:
            return memoryview(bytearray(nbytes)), None
        size = 1 << (nbytes - 1).bit_length()
        if idle := self._idle[size]:
            self._idle_bytes -= size
            buffer = idle.pop()
        else:
            buffer = np.empty(size, np.uint8)
        data: Any = buffer.data
        return memoryview(data)[:nbytes], Loan(self, buffer)

    def give(self, buffer: NDArray[np.uint8]) -> None:
        """Take a buffer back, to be used again unless much is idle already."""
        if self._idle_bytes + buffer.size <= LARGEST_IDLE_BYTES:
            self._idle_bytes += buffer.size
            self._idle[buffer.size].append(buffer)


class Loan:
    """A buffer that a message lies in."""

    __slots__ = ("_buffer", "_pool")

    def __init__(self, pool: Pool, buffer: NDArray[np.uint8]) -> None:
        self._pool, self._buffer = pool, buffer

    def take_back(self, ticket: Ticket | None) -> None:
        """Give the buffer to the pool."""
        self._pool.give(self._buffer)
