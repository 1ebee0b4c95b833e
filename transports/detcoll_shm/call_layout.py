"""Calls that were made before: what they are, and the pieces of shared memory that they use, cut once.

An array goes through the stages in chunks. Of each chunk every rank folds one share; shares of large chunks begin at
cache lines, so that no two ranks write one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from detcoll.descriptor import Descriptor
from detcoll.fold import Folder, folder
from detcoll.types import ReduceOp
from detcoll_shm.layout import LINE_BYTES
from detcoll_shm.stage import Stage

CHUNKS_A_CALL = 2
"""What an array is cut into at least, so that giving, folding and taking overlap, unless chunks would be too small."""

SMALLEST_CHUNK_BYTES = 128 * 2**10

READ_STEP_BYTES = 2**20
"""How much of another rank's array is read at once, so that the kernel's part of it is small."""
READ_ROOM_BYTES = 8 * 2**20
"""What all that a rank reads at once may take, if there are many ranks."""

Bytes = NDArray[np.uint8]
Piece = tuple[Bytes, int, int]
"""Memory in a stage, and the first and last offset in the chunk that it stands for, in bytes."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One chunk in one half of the stages.

    ``gives`` : where this rank puts what others fold.  ``given`` : where it puts the whole chunk, if it comes from a
    device.  ``inputs`` : contributions to this rank's share, by rank; None for its own.  ``share`` : first and last
    byte of that share in the chunk.  ``out`` : where its result goes, as elements and as bytes.  ``takes`` : other
    ranks' results.
    """

    gives: tuple[Piece, ...]
    given: Bytes
    inputs: tuple[NDArray[Any] | None, ...]
    share: tuple[int, int]
    out: NDArray[Any]
    out_bytes: Bytes
    takes: tuple[Piece, ...]
    rooms: tuple[NDArray[Any], ...]


@dataclass(frozen=True, slots=True)
class CallLayout:
    """One kind of call: equal for all calls with equal arguments.

    ``chunks`` : how many there are; 0 where every rank folds everything from what all others give whole.
    ``whole`` : by half of the stage, the memory for the arrays of all ranks.  ``whole_out`` : the memory for the result
    on its way to a device.  ``fold`` : combines arrays of all ranks.
    ``rooms`` : for the sums of groups, of a small array, a chunk or a step.  ``read_step_bytes`` : how much is read of
    another's array at once.
    """

    descriptor: Descriptor
    digest: int
    dtype: np.dtype[Any]
    chunk_bytes: int
    read_step_bytes: int
    nbytes: int
    chunks: int
    full: tuple[Cut, ...]
    last: tuple[Cut, ...]
    whole: tuple[tuple[NDArray[Any], ...], ...]
    whole_out: tuple[NDArray[Any], ...]
    rooms: tuple[NDArray[Any], ...]
    fold: Folder

    def cut(self, number: int, half: int) -> Cut:
        """Return where chunk ``number`` of the call lies in a half of the stages."""
        return (self.last if number == self.chunks - 1 else self.full)[half]

    def named(self, name: str) -> CallLayout:
        """Return the layout of the same call under a name; names differ from call to call, so these are not kept."""
        descriptor = msgspec.structs.replace(self.descriptor, name=name)
        return replace(self, descriptor=descriptor, digest=digest_of(descriptor))


LARGEST_DIGEST = 2**63 - 1


def digest_of(descriptor: Descriptor) -> int:
    """Return a number that differs for calls that differ."""
    return int.from_bytes(hashlib.blake2b(descriptor.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True, slots=True)
class Cutter:
    """Makes layouts for one rank: ``stages`` of all ranks by rank, and how they are grouped."""

    rank: int
    stages: Sequence[Stage]
    groups: Sequence[Sequence[int]]
    chunk_bytes: int
    direct_bytes: int
    device_chunk_bytes: int

    def layout(self, descriptor: Descriptor, op: ReduceOp, dtype: np.dtype[Any]) -> CallLayout:
        """Return the layout for calls that `descriptor` (of number 0) describes."""
        nbytes = descriptor.count * dtype.itemsize
        digest, fold = digest_of(descriptor), folder(op, self.groups, dtype)
        step = self._step_bytes(nbytes, dtype.itemsize, self.chunk_bytes)
        if nbytes * (len(self.stages) - 1) <= self.direct_bytes and nbytes <= self.chunk_bytes:
            whole = tuple(tuple(s.given[half][:nbytes].view(dtype) for s in self.stages) for half in (0, 1))
            out = tuple(half[:nbytes].view(dtype) for half in self.stages[self.rank].folded)
            rooms = self._rooms(descriptor.count, dtype)
            return CallLayout(descriptor, digest, dtype, step, 0, nbytes, 0, (), (), whole, out, rooms, fold)
        chunks, full, last = self._chunks(nbytes, step, dtype)
        read_step = self._read_step_bytes(nbytes, dtype.itemsize)
        rooms = self._rooms(max(step, read_step) // dtype.itemsize, dtype)
        return CallLayout(descriptor, digest, dtype, step, read_step, nbytes, chunks, full, last, (), (), rooms, fold)

    def for_devices(self, layout: CallLayout) -> CallLayout:
        """Return the layout of the same call in large chunks, since each costs copies that have to be waited for."""
        step = self._step_bytes(layout.nbytes, layout.dtype.itemsize, self.device_chunk_bytes)
        chunks, full, last = self._chunks(layout.nbytes, step, layout.dtype)
        return replace(layout, chunk_bytes=step, chunks=chunks, full=full, last=last)

    def edges(self, nbytes: int, itemsize: int) -> list[int]:
        """Return where shares of an array begin, by rank, and its end, in bytes."""
        ranks = len(self.stages)
        unit = LINE_BYTES if nbytes >= LINE_BYTES * ranks else itemsize
        return [nbytes * rank // ranks // unit * unit for rank in range(ranks)] + [nbytes]

    def _chunks(self, nbytes: int, step: int, dtype: np.dtype[Any]) -> tuple[int, tuple[Cut, ...], tuple[Cut, ...]]:
        """Return how many chunks of ``step`` bytes there are, and where those and the last one lie, by half."""
        chunks = -(-nbytes // step)
        full = tuple(self._cut(step, half, dtype) for half in (0, 1)) if chunks > 1 else ()
        return chunks, full, tuple(self._cut(nbytes - (chunks - 1) * step, half, dtype) for half in (0, 1))

    def _step_bytes(self, nbytes: int, itemsize: int, largest: int) -> int:
        """Return the size of chunks: some for each call, so that giving, folding and taking overlap."""
        wanted = max(min(largest, nbytes // CHUNKS_A_CALL), SMALLEST_CHUNK_BYTES)
        step = min(wanted // LINE_BYTES * LINE_BYTES, largest)
        return max(step, itemsize)

    def _read_step_bytes(self, nbytes: int, itemsize: int) -> int:
        """Return the size of steps in which a share is read: two at least, so that ranks fold and take meanwhile.

        Small chunks mean small steps.
        """
        ranks = len(self.stages)
        step = min(READ_STEP_BYTES, READ_ROOM_BYTES // max(ranks - 1, 1), nbytes // ranks // 2, 2 * self.chunk_bytes)
        return max(step // LINE_BYTES * LINE_BYTES, LINE_BYTES, itemsize)

    def _cut(self, nbytes: int, half: int, dtype: np.dtype[Any]) -> Cut:
        edges = self.edges(nbytes, dtype.itemsize)
        begin, end = edges[self.rank], edges[self.rank + 1]
        own = self.stages[self.rank]
        given = own.given[half][:nbytes]
        gives = tuple((given[a:b], a, b) for a, b in ((0, begin), (end, nbytes)) if a < b)
        inputs = tuple(
            None if rank == self.rank else stage.given[half][begin:end].view(dtype)
            for rank, stage in enumerate(self.stages)
        )
        out_bytes = own.folded[half][: end - begin]
        takes = tuple(
            (stage.folded[half][: edges[rank + 1] - edges[rank]], edges[rank], edges[rank + 1])
            for rank, stage in enumerate(self.stages)
            if rank != self.rank and edges[rank] < edges[rank + 1]
        )
        rooms = self._rooms((end - begin) // dtype.itemsize, dtype)
        return Cut(gives, given, inputs, (begin, end), out_bytes.view(dtype), out_bytes, takes, rooms)

    def _rooms(self, count: int, dtype: np.dtype[Any]) -> tuple[NDArray[Any], ...]:
        """Return memory for the sums of groups, if there is more than one."""
        if len(self.groups) == 1:
            return ()
        return tuple(np.empty(count if len(group) > 1 else 0, dtype) for group in self.groups)
