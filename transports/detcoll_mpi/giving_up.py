"""How ranks learn that another one gave up a collective.

MPI cannot take a collective back: a rank that gave up has contributed all the same, so one that comes late would get a
result that nobody else has, or that mixes two calls. So who gives up, for whatever reason, says so in a message to
every other rank, with the number of the collective. The others look for such messages while they wait, and once more
before they return a result. One look takes less than a microsecond.
"""

from __future__ import annotations

import struct
from typing import Any

from detcoll.errors import PeerLost

GIVING_UP_TAG = 1
LONGEST_TEXT_BYTES = 400
_NUMBER = struct.Struct("<Q")

_told: list[Any] = []
"""Requests of messages that say so, with their memory: nobody waits for them."""


class GaveUp(PeerLost):
    """Another rank gave up the collective, and has told everybody."""


class GivingUp:
    """What one rank says and hears about collectives that were given up.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    comm : Comm
        On which nothing else sends messages.
    """

    def __init__(self, mpi: Any, comm: Any) -> None:
        self._mpi, self._comm = mpi, comm
        self._any = mpi.ANY_SOURCE
        self._state = mpi.Status()
        self._heard: dict[int, tuple[int, str]] = {}

    def tell(self, number: int, reason: BaseException) -> None:
        """Tell all other ranks that this one gave up collective ``number``, as far as MPI still works."""
        text = f"{type(reason).__name__}: {reason}" if str(reason) else type(reason).__name__
        data = _NUMBER.pack(number) + text.encode()[:LONGEST_TEXT_BYTES]
        for rank in range(self._comm.Get_size()):
            if rank != self._comm.Get_rank():
                try:
                    _told.append((self._comm.Isend([data, self._mpi.BYTE], rank, GIVING_UP_TAG), data))
                except self._mpi.Exception:
                    return

    def hear(self, number: int) -> None:
        """Raise GaveUp if a rank gave up collective ``number`` or one before it."""
        while self._comm.Iprobe(self._any, GIVING_UP_TAG, self._state):
            data = bytearray(self._state.Get_count(self._mpi.BYTE))
            rank = self._state.Get_source()
            self._comm.Recv([data, self._mpi.BYTE], rank, GIVING_UP_TAG)
            self._heard[rank] = _NUMBER.unpack_from(data)[0], data[_NUMBER.size :].decode(errors="replace")
        for rank, (given_up, text) in self._heard.items():
            if given_up <= number:
                raise GaveUp(f"rank {rank} gave up the native collective number {given_up} of this endpoint: {text}")
