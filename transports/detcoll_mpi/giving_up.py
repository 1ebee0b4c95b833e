"""How ranks learn that another one gave up a collective.

MPI cannot take a collective back: a rank that gave up has contributed all the same, so one that comes late would get a
result that nobody else has, or that mixes two calls. So who gives up, for whatever reason, says so in a message to
every other rank, with the number of the collective. The others look for such messages while they wait, and once more
before they return a result. One look takes less than a microsecond.

A rank whose time is over asks all others first. Those that wait in the same collective answer, or ask as well; one that
does neither for `ANSWER_NS` has not come, or is frozen, and is named.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from detcoll.errors import PeerLost

GIVING_UP_TAG = 1
ASKING_TAG = 2
ANSWER_TAG = 3
ANSWER_NS = 1_000_000_000
LONGEST_TEXT_BYTES = 400
_NUMBER = struct.Struct("<Q")

_told: list[Any] = []
"""Requests of messages that nobody waits for, with their memory."""


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
    ranks : sequence of int
        The members as errors name them.
    """

    def __init__(self, mpi: Any, comm: Any, ranks: Sequence[int]) -> None:
        self._mpi, self._comm, self._ranks = mpi, comm, ranks
        self._any = mpi.ANY_SOURCE
        self._state = mpi.Status()
        self._heard: dict[int, tuple[int, str]] = {}
        self._reached: dict[int, int] = {}

    def tell(self, number: int, reason: BaseException) -> None:
        """Tell all other ranks that this one gave up collective ``number``, as far as MPI still works."""
        text = f"{type(reason).__name__}: {reason}" if str(reason) else type(reason).__name__
        self._send(self._others, GIVING_UP_TAG, _NUMBER.pack(number) + text.encode()[:LONGEST_TEXT_BYTES])

    def ask(self, number: int) -> None:
        """Ask all other ranks whether they have begun collective ``number``."""
        self._send(self._others, ASKING_TAG, _NUMBER.pack(number))

    def missing(self, number: int) -> list[int]:
        """Return the ranks that have not been heard to be in collective ``number``."""
        return [rank for rank in self._others if self._reached.get(rank, 0) < number]

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self._comm.Get_size()) if rank != self._comm.Get_rank()]

    def _send(self, ranks: Sequence[int], tag: int, data: bytes) -> None:
        for rank in ranks:
            try:
                _told.append((self._comm.Isend([data, self._mpi.BYTE], rank, tag), data))
            except self._mpi.Exception:
                return

    def hear(self, number: int) -> None:
        """Answer who asks, and raise GaveUp if a rank gave up collective ``number`` or one before it."""
        while self._comm.Iprobe(self._any, self._mpi.ANY_TAG, self._state):
            data = bytearray(self._state.Get_count(self._mpi.BYTE))
            rank, tag = self._state.Get_source(), self._state.Get_tag()
            self._comm.Recv([data, self._mpi.BYTE], rank, tag)
            reached = _NUMBER.unpack_from(data)[0]
            self._reached[rank] = max(self._reached.get(rank, 0), reached)
            if tag == GIVING_UP_TAG:
                self._heard[rank] = reached, data[_NUMBER.size :].decode(errors="replace")
            elif tag == ASKING_TAG:
                self._send([rank], ANSWER_TAG, _NUMBER.pack(number))
        for rank, (given_up, text) in self._heard.items():
            if given_up <= number:
                name = self._ranks[rank]
                raise GaveUp(f"rank {name} gave up the native collective number {given_up} of this group: {text}")
