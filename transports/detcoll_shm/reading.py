"""Arrays that stay where they are and are read by other processes, through the kernel.

``process_vm_readv`` copies from another process once, where a stage takes two copies and shares its cache lines. The
kernel allows it to processes of one user that may trace each other; some systems restrict that (Yama's
``ptrace_scope``, seccomp), so each rank tries it before it promises to read. Nobody writes into memory of others.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import TransportError
from detcoll_shm.bell import process_ended
from detcoll_shm.libc import Span, libc
from detcoll_shm.stage import PROCESS, TOKEN


def _read(pid: int, here: Span, there: Span) -> int:
    """Return how many bytes were copied, or -1."""
    return int(libc().process_vm_readv(pid, here, 1, there, 1, 0))


class Reader:
    """Reads memory of other ranks' processes.

    Parameters
    ----------
    own
        The words of this rank's stage, in which it shows where its key lies.
    key
        What marks memory of this rank.
    others
        Words of the other ranks' stages, and their keys, by rank.
    why_lost
        Tells why a rank is gone, or None.
    """

    def __init__(
        self, own: memoryview[int], key: bytes, others: Mapping[int, tuple[memoryview[int], bytes]],
        why_lost: Callable[[int], TransportError | None],
    ) -> None:  # fmt: skip
        self._token = ctypes.create_string_buffer(key, len(key))
        own[TOKEN] = ctypes.addressof(self._token)
        self._others, self._why_lost = others, why_lost
        self._rooms: dict[int, NDArray[np.uint8]] = {}
        self._here, self._there = Span(), Span()
        self._may_read: bool | None = None

    @property
    def may_read(self) -> bool:
        """Whether this rank was found to read all others; False until `try_all`."""
        return bool(self._may_read)

    def try_all(self) -> None:
        """Find out whether this rank can read all others, unless it is known; all must have shown their keys."""
        if self._may_read is None:
            self._may_read = all(self._finds_key_of(rank) for rank in self._others)

    def read(self, rank: int, address: int, into: NDArray[np.uint8]) -> None:
        """Copy as many bytes as ``into`` has from ``address`` in the process of ``rank``.

        Raises
        ------
        TransportError
            If they cannot be read; `PeerLost` where that rank is gone.
        """
        here, there = self._here, self._there
        here.base, here.length = into.__array_interface__["data"][0], into.size
        there.base, there.length = address, into.size
        words, _ = self._others[rank]
        got = _read(words[PROCESS], here, there)
        if got != into.size:
            code = ctypes.get_errno() if got < 0 else errno.EFAULT
            if code == errno.ESRCH:  # known here before the watch on its process tells
                raise process_ended(rank)
            raise self._why_lost(rank) or TransportError(f"memory of rank {rank} cannot be read: {os.strerror(code)}")

    def room(self, rank: int, nbytes: int) -> NDArray[np.uint8]:
        """Return memory for ``nbytes`` of what ``rank`` has, the same each time."""
        room = self._rooms.get(rank)
        if room is None or room.size < nbytes:
            room = self._rooms[rank] = np.empty(nbytes, np.uint8)
        return room[:nbytes]

    def _finds_key_of(self, rank: int) -> bool:
        words, key = self._others[rank]
        found = np.empty(len(key), np.uint8)
        try:
            self.read(rank, words[TOKEN], found)
        except TransportError:
            return False
        return found.tobytes() == key
