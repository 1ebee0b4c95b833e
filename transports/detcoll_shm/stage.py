"""What a rank shows all others during collectives: words that say how far it is, and chunks of arrays.

A stage lies in the memory of its rank; that rank writes it and all others read it::

    words             one page, see below
    given 0, given 1  chunks of this rank's array, one after the other in turn
    folded 0, 1       this rank's share of those chunks, folded over all ranks

The halves have room for the large chunks of arrays on devices. What no chunk has used takes no memory.

========= ====================================================================================================
word      meaning
========= ====================================================================================================
ARRIVED   number of the collective that this rank is in, from 1
DIGEST    of what it called, for collectives of even and odd number in turn, beside ARRIVED on its cache line; or a
          mark that this rank gives the collective up (`detcoll_shm.verdict`)
CALLED    two words: what DIGEST was before the mark took its place
ENDED     number of the first collective in which this rank takes no part any more, 0 while it does; why lies at
          `REASON_AT`
GIVEN     chunks that lie in ``given``, counted since the start
FOLDED    chunks of which this rank's share lies in ``folded``
ASLEEP    1 while this rank waits on its doorbell, so that others ring it
PLACE     three words, for collectives of even and odd number in turn: where its array is (`detcoll_shm.regions`)
PROCESS   process of this rank
THREAD    and its thread in this collective, so that others see on which processor it is to run
BELL      descriptor in that process of the pipe that wakes it in a collective, 0 while there is none
TOKEN     address in that process at which the key of this rank's memory lies (`detcoll_shm.reading`)
TAKEN     number of the last collective in which this rank has taken all results straight from others' arrays
TOLD      number of the collective whose full descriptor lies at `TEXT_AT`
TABLE     `TABLE_WORDS` words: stages of groups (`detcoll_shm.groups`); in the first stage of a rank alone
========= ====================================================================================================

Only the owner writes them. Data, digests, places and text are written before the word that announces them and read
after it, which x86-64 keeps in order; ASLEEP follows Dekker, as in `detcoll_shm.layout`.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.descriptor import HELLO_BYTES
from detcoll_shm.layout import PAGE_BYTES, Geometry

ARRIVED, DIGEST, CALLED, ENDED = 0, 1, 3, 5
GIVEN, FOLDED, ASLEEP, TOLD, PROCESS, THREAD, TOKEN, BELL, PLACE, TAKEN = 16, 32, 48, 64, 80, 81, 82, 83, 96, 112
PLACE_WORDS = 3
TEXT_AT = 1024
REASON_AT, REASON_BYTES = 2048, 1024
TABLE, TABLE_WORDS = 384, 128


class Stage:
    """The stage of one rank, mapped into this process: the ``memory`` of its file, or a part of that."""

    __slots__ = ("_reason", "_text", "chunks", "folded", "given", "words")

    def __init__(self, memory: Any, geometry: Geometry) -> None:
        words = memoryview(memory)[:PAGE_BYTES]
        self.words: memoryview[int] = words.cast("q")
        self._text = memoryview(memory)[TEXT_AT : TEXT_AT + HELLO_BYTES]
        self._reason = memoryview(memory)[REASON_AT : REASON_AT + REASON_BYTES]
        half = geometry.half_bytes
        halves = [np.frombuffer(memory, np.uint8, half, PAGE_BYTES + index * half) for index in range(4)]
        self.given: tuple[NDArray[np.uint8], ...] = tuple(halves[:2])
        self.folded: tuple[NDArray[np.uint8], ...] = tuple(halves[2:])
        self.chunks = np.frombuffer(memory, np.uint8, 4 * half, PAGE_BYTES)

    @classmethod
    def in_file(cls, fd: int, geometry: Geometry, ranks: int) -> Stage:
        """Return the first stage of a rank, which lies behind its rings for ``ranks`` sources."""
        return cls(mmap.mmap(fd, geometry.stage_bytes, offset=geometry.stage_at(ranks)), geometry)

    def write_text(self, record: bytes) -> None:
        """Show what this rank called, before TOLD says so."""
        self._text[:] = record

    def read_text(self) -> bytes:
        """Return what the rank showed."""
        return bytes(self._text)

    def write_reason(self, record: bytes) -> None:
        """Show why this rank takes part no more, before ENDED or a mark says that it does not."""
        self._reason[: len(record)] = record

    def read_reason(self) -> bytes:
        """Return what the rank showed as its reason."""
        return bytes(self._reason)
