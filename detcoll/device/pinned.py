"""Pinned memory of the host, which devices copy from and to at full speed while the processor does other things.

Pinning takes milliseconds, so memory is pinned in slabs, on the threads of callers (`PinnedPool.reserve`), and used
again. The thread that carries out collectives only takes (`PinnedPool.take`). The system cannot page pinned memory out,
so there is a limit; what does not fit is ordinary memory, with which copies work too, but block.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.device.driver import Driver
from detcoll.errors import DeviceError

UNIT_BYTES = 64 * 1024
"""Blocks are cut from slabs in multiples of this."""
SLAB_BYTES = 16 * 1024**2
"""The usual slab; larger blocks get slabs of their own size."""
LIMIT_BYTES = 256 * 1024**2
"""How much a pool pins at most, unless it is told otherwise."""


class _Slab:
    """Pages that are pinned by one call; ``free`` are the ranges of it that nobody borrows, in order.

    The pages are shared with forked children: what a device writes after a fork arrives here, not in a copy.
    """

    def __init__(self, nbytes: int, device: int) -> None:
        self.memory = mmap.mmap(-1, nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.nbytes = nbytes
        self.device = device
        self.free = [(0, nbytes)]

    @property
    def is_idle(self) -> bool:
        return self.free == [(0, self.nbytes)]

    def cut(self, place: int, nbytes: int) -> int:
        """Take ``nbytes`` of the free range number ``place``, and return where they begin."""
        begin, end = self.free[place]
        self.free[place : place + 1] = [(begin + nbytes, end)] if begin + nbytes < end else []
        return begin

    def give(self, begin: int, end: int) -> None:
        """Take a range back, and join it to its neighbours."""
        ranges: list[tuple[int, int]] = []
        for low, high in sorted([*self.free, (begin, end)]):
            if ranges and ranges[-1][1] == low:
                low = ranges.pop()[0]
            ranges.append((low, high))
        self.free = ranges


class _Block:
    """The owner of borrowed memory: arrays over it refer to this object, and to the slab through it."""

    def __init__(self, slab: _Slab, begin: int, nbytes: int) -> None:
        self.slab = slab
        self.__array_interface__: dict[str, Any] = {
            "shape": (nbytes,), "typestr": "|u1", "data": (slab.address + begin, False), "version": 3,
        }  # fmt: skip


_leaked: list[_Slab] = []
"""Slabs of closed pools whose memory is still in use; they stay pinned and mapped until the process ends."""


class PinnedPool:
    """Pinned memory of a job, bounded and used again.

    Parameters
    ----------
    cuda : Driver
        It pins.
    limit_bytes : int
        How much is pinned at most, with what others pin (`allow`).

    ``unpinned_bytes`` : the most ordinary memory that was borrowed at a time.  ``leaked_bytes`` : what `close` left
    pinned because it was in use.  ``refused`` : why less than the limit can be pinned; None if all can.
    Methods may be called from any thread.
    """

    def __init__(self, cuda: Driver, limit_bytes: int = LIMIT_BYTES) -> None:
        self.unpinned_bytes = 0
        self.leaked_bytes = 0
        self.refused: DeviceError | OSError | None = None
        self._cuda = cuda
        self._limit_bytes = limit_bytes
        self._slabs: list[_Slab] = []
        self._others_bytes = 0
        self._unpinned_now = 0
        # Python may free a block anywhere, also where this thread holds the lock. So blocks only line up here.
        self._returned: deque[tuple[_Slab | None, int, int]] = deque()
        self._lock = threading.Lock()
        self._growing = threading.Lock()

    @property
    def bytes(self) -> int:
        """How much is pinned now, that of others too."""
        return sum(slab.nbytes for slab in tuple(self._slabs)) + self.leaked_bytes + self._others_bytes

    def reserve(self, nbytes: int, device: int) -> None:
        """Pin more memory if no block of ``nbytes`` is free; takes milliseconds then.

        If the limit leaves no room, slabs of other sizes that nobody borrows from are unpinned. If that does not help,
        or the driver refuses, nothing happens, and `take` will return ordinary memory.

        Parameters
        ----------
        nbytes : int
            Size of the block that will be taken.
        device : int
            A device that this process uses; the memory is pinned for all.

        Raises
        ------
        DeviceError
            If the device is of no use any more.
        """
        size = _rounded(nbytes)
        with self._growing:
            with self._lock:
                self._take_back()
                if not 0 < size <= self._limit_bytes or self._smallest(size) is not None:
                    return
                idle = self._without_idle(size)
            try:
                for slab in idle:
                    self._unpin(slab)
                room = self._limit_bytes - self.bytes
                if size <= room:
                    self._pin(max(size, min(SLAB_BYTES, room // UNIT_BYTES * UNIT_BYTES)), device)
            except (DeviceError, OSError) as error:
                if isinstance(error, DeviceError) and error.is_sticky:
                    raise
                self.refused = error
                self._limit_bytes = self.bytes

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """Return memory, which goes back when its last view is gone. Never pins.

        Returns
        -------
        block : array, (nbytes,), uint8, C-contiguous, host
            Content unspecified; pinned if a free range is large enough.
        """
        size = _rounded(nbytes)
        with self._lock:
            self._take_back()
            found = self._smallest(size) if size else None
            if found is None:
                self._unpinned_now += nbytes
                self.unpinned_bytes = max(self.unpinned_bytes, self._unpinned_now)
            else:
                slab, place = found
                begin = slab.cut(place, size)
        if found is None:
            block = np.empty(nbytes, np.uint8)
            self._return_with(block, (None, 0, nbytes))
            return block
        owner = _Block(slab, begin, nbytes)
        self._return_with(owner, (slab, begin, begin + size))
        return np.asarray(owner)

    def allow(self, nbytes: int) -> bool:
        """Tell whether others may pin memory of theirs, and count it, as ordinary memory if they may not.

        If the limit leaves no room, slabs that nobody borrows from are unpinned.
        """
        with self._growing:
            with self._lock:
                self._take_back()
                idle = self._without_idle(nbytes)
            for slab in idle:
                self._unpin(slab)
            is_allowed = nbytes <= self._limit_bytes - self.bytes
            self.count(nbytes, is_pinned=is_allowed)
        return is_allowed

    def count(self, nbytes: int, *, is_pinned: bool) -> None:
        """Count more memory of others, or less, as pinned or as ordinary memory that is used instead."""
        with self._lock:
            if is_pinned:
                self._others_bytes += nbytes
            else:
                self._unpinned_now += nbytes
                self.unpinned_bytes = max(self.unpinned_bytes, self._unpinned_now)

    def close(self) -> None:
        """Unpin all that nobody borrows; what is borrowed stays pinned. `take` returns ordinary memory from now on."""
        with self._growing, self._lock:
            self._take_back()
            self._limit_bytes = 0
            slabs, self._slabs = self._slabs, []
            for slab in slabs:
                if slab.is_idle:
                    self._unpin(slab)
                else:
                    self._leak(slab)

    def _return_with(self, owner: object, what: tuple[_Slab | None, int, int]) -> None:
        weakref.finalize(owner, self._returned.append, what).atexit = False

    def _take_back(self) -> None:
        while self._returned:
            slab, begin, end = self._returned.popleft()
            if slab is None:
                self._unpinned_now -= end
            else:
                slab.give(begin, end)

    def _smallest(self, size: int) -> tuple[_Slab, int] | None:
        """Return the smallest free range that holds ``size`` bytes: its slab, and which one of it."""
        fitting = [
            (end - begin, number, place)
            for number, slab in enumerate(self._slabs)
            for place, (begin, end) in enumerate(slab.free)
            if end - begin >= size
        ]
        if not fitting:
            return None
        _, number, place = min(fitting)
        return self._slabs[number], place

    def _without_idle(self, size: int) -> list[_Slab]:
        """Give up slabs that nobody borrows from, if the limit leaves no room for ``size`` otherwise."""
        room = self._limit_bytes - self.bytes
        idle = [slab for slab in self._slabs if slab.is_idle]
        if size <= room or size > room + sum(slab.nbytes for slab in idle):
            return []
        self._slabs = [slab for slab in self._slabs if slab not in idle]
        return idle

    def _pin(self, nbytes: int, device: int) -> None:
        slab = _Slab(nbytes, device)
        with self._cuda.on(device):
            self._cuda.register(slab.address, nbytes)
        with self._lock:
            self._slabs.append(slab)

    def _unpin(self, slab: _Slab) -> None:
        try:
            with self._cuda.on(slab.device):
                self._cuda.unregister(slab.address)
        except DeviceError:
            self._leak(slab)  # then it is not known whether the device still uses it

    def _leak(self, slab: _Slab) -> None:
        _leaked.append(slab)
        self.leaked_bytes += slab.nbytes


def _rounded(nbytes: int) -> int:
    return -(-nbytes // UNIT_BYTES) * UNIT_BYTES
