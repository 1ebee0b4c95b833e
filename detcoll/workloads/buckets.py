"""A flat gradient, cut into buckets that are reduced as soon as they are full.

The backward pass produces the gradient from the last layer to the first. Laid out in that order, what is finished is
always a prefix of one flat array, and a bucket may go as soon as the prefix passes its end. So communication overlaps
with what is left of the backward pass.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import UsageError


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> Any:
        """Return once it is done."""


class Collectives(Protocol):
    """What a workload asks of a communicator."""

    @property
    def rank(self) -> int:
        """The rank of this process."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def all_reduce(self, x: Any, op: Any = "sum", async_op: bool = False) -> Any:
        """Reduce ``x`` in place over all ranks."""

    def barrier(self) -> Any:
        """Return once every rank has called."""


class Buckets:
    """Reduces one flat gradient bucket by bucket.

    Parameters
    ----------
    comm : Collectives
        Where to reduce.
    gradient : array, (elements,), C-contiguous, host or device
        Reduced in place; read it after `wait`.
    bucket_bytes : int
        Size of a bucket; the last one may be smaller.
    op : str
        The reduce operation.
    overlap : bool
        Start buckets as they fill; else all of them start in `wait`.
    """

    def __init__(self, comm: Collectives, gradient: Any, bucket_bytes: int, op: str, overlap: bool = True) -> None:
        self._comm, self._gradient, self._op, self._overlap = comm, gradient, op, overlap
        self.ends_elems = bucket_ends(len(gradient), gradient.itemsize, bucket_bytes)
        self._started = 0
        self._pending: list[Pending] = []

    def ready(self, prefix_elems: int) -> None:
        """Say that the first ``prefix_elems`` elements are final; starts every bucket that lies within them."""
        if self._overlap:
            self._start(prefix_elems)

    def _start(self, prefix_elems: int) -> None:
        while self._started < len(self.ends_elems) and self.ends_elems[self._started] <= prefix_elems:
            begin = self.ends_elems[self._started - 1] if self._started else 0
            bucket = self._gradient[begin : self.ends_elems[self._started]]
            self._pending.append(self._comm.all_reduce(bucket, op=self._op, async_op=True))
            self._started += 1

    def wait(self) -> None:
        """Return once the whole gradient is reduced, and be ready for the next one."""
        self._start(self.ends_elems[-1])
        for work in self._pending:
            work.wait()
        self._pending.clear()
        self._started = 0


def bucket_ends(elements: int, itemsize_bytes: int, bucket_bytes: int) -> tuple[int, ...]:
    """Return where each bucket ends, in elements.

    Raises
    ------
    UsageError
        If a bucket holds no whole number of elements.
    """
    if bucket_bytes < itemsize_bytes or bucket_bytes % itemsize_bytes:
        raise UsageError(f"bucket_bytes={bucket_bytes} must be a multiple of the element size, {itemsize_bytes} bytes")
    step = bucket_bytes // itemsize_bytes
    return (*range(step, elements, step), elements)


def as_float32(elements: int) -> NDArray[np.float32]:
    """Return a zeroed float32 array whose pages are touched, so that no iteration pays for the first touch."""
    array = np.empty(elements, np.float32)
    array.fill(0)
    return array
