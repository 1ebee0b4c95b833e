"""Whether all ranks called the same collective.

MPI does not compare what ranks call: calls that differ hang, or give wrong data without a word. So each call also
reduces a digest of what was called, as greatest and least, over a communicator of its own. The two travel at the same
time; the result of a call is given out only when the digests were equal. On a difference all ranks learn of it in the
same step, and exchange what they called in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.descriptor import HELLO_BYTES, Announcement
from detcoll.transport import NativeCall


class Agreement:
    """The comparison of one rank's calls with those of the others.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    comm : Comm
        For nothing else, in the group's order of ranks.
    ranks : sequence of int
        The members as errors name them.
    """

    def __init__(self, mpi: Any, comm: Any, ranks: Sequence[int]) -> None:
        self._mpi, self._comm, self._ranks = mpi, comm, ranks
        self._mine, self._greatest = np.zeros(2, np.int64), np.zeros(2, np.int64)
        self._announced: Announcement | None = None
        self._sequence = -1

    def start(self, call: NativeCall) -> Any:
        """Begin to compare a call with the others' and return MPI's request."""
        self._announced, self._sequence = call.announcement, call.sequence
        digest = self._announced.digest + call.sequence
        self._mine[:] = digest, -digest
        return self._comm.Iallreduce(self._mine, self._greatest, self._mpi.MAX)

    @property
    def is_reached(self) -> bool:
        """Whether all called the same, once the request has ended."""
        return bool(self._greatest[0] == -self._greatest[1])

    def exchange(self) -> tuple[Any, NDArray[np.uint8]]:
        """Begin to exchange what was called; gives MPI's request and where the records will be: (ranks, bytes)."""
        assert self._announced is not None
        self._announced = self._announced.numbered(self._sequence)
        mine = np.frombuffer(self._announced.record, np.uint8)
        records = np.empty((self._comm.Get_size(), HELLO_BYTES), np.uint8)
        return self._comm.Iallgather(mine, records), records

    def explain(self, records: NDArray[np.uint8]) -> None:
        """Raise PlanMismatch with this rank's call and the first that differs from it."""
        assert self._announced is not None
        self._announced.compare(self._comm.Get_rank(), [record.tobytes() for record in records], self._ranks)
