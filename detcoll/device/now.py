"""What callers' threads do by themselves: pinned memory for a call, and copies that they wait for or look after."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.device.copies import Copies, DeviceBuffer
from detcoll.device.cuda import driver
from detcoll.device.gate import wait_until
from detcoll.device.pinned import PinnedPool
from detcoll.device.pins import Pins
from detcoll.errors import DeadlineMissed

LONGEST_COPY_NS = 60_000_000_000


class _Shared:
    """What all calls of a process share; made when it is needed, and anew in a forked child."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.lock, self.turn = threading.Lock(), threading.Lock()
        self._pool: PinnedPool | None = None
        self._copies: Copies | None = None
        self._pins: Pins | None = None
        self.spare: list[Copies] = []

    @property
    def pins(self) -> Pins:
        pool = self.pool
        with self.lock:
            if self._pins is None:
                self._pins = Pins(driver(), pool)
            return self._pins

    @property
    def pool(self) -> PinnedPool:
        with self.lock:
            if self._pool is None:
                self._pool = PinnedPool(driver())
            return self._pool

    @property
    def made_pool(self) -> PinnedPool | None:
        return self._pool

    @property
    def copies(self) -> Copies:
        with self.lock:
            if self._copies is None:
                self._copies = Copies(driver())
            return self._copies


_shared = _Shared()
os.register_at_fork(after_in_child=_shared.forget)


def pinned_memory(nbytes: int, device: int) -> NDArray[np.uint8]:
    """Return memory for a call, (nbytes,), pinned as far as the process may; for threads of callers, see `PinnedPool`.

    Raises
    ------
    DeviceError
        If the device is of no use any more.
    """
    pool = _shared.pool
    pool.reserve(nbytes, device)
    return pool.take(nbytes)


def pinned_counts() -> dict[str, int]:
    """Return what `PinnedPool` counts, by name: ``pinned_bytes``, ``unpinned_bytes``; empty if no device was used."""
    pool = _shared.made_pool
    return {} if pool is None else {"pinned_bytes": pool.bytes, "unpinned_bytes": pool.unpinned_bytes}


def pins() -> Pins:
    """Return what is pinned in this process beside the memory of calls."""
    return _shared.pins


def take_copies() -> Copies:
    """Return streams for one call that looks after its copies itself; give them back with `give_copies`."""
    try:
        return _shared.spare.pop()
    except IndexError:
        return Copies(driver())


def give_copies(copies: Copies) -> None:
    """Take streams back. What a call that failed left under way goes on, and keeps its memory."""
    if copies.idle and not copies.is_lost:
        _shared.spare.append(copies)
    else:
        copies.close()


def copy_now(buffer: DeviceBuffer, host: NDArray[Any], *, to_device: bool) -> None:
    """Copy a whole buffer to or from the host, and return when that is done.

    What the caller had queued on the device must be done already.

    Raises
    ------
    DeviceError
        If the device refused it.
    DeadlineMissed
        If the device does nothing any more.
    """
    elems = buffer.segments[-1].first + buffer.segments[-1].elems
    with _shared.turn:
        copy = _shared.copies.begin(buffer, 0, elems, host, to_device)
        if not wait_until(copy.is_past, time.monotonic_ns() + LONGEST_COPY_NS):
            raise DeadlineMissed(f"cuda:{buffer.device} did not end a copy of {host.nbytes} bytes within 60 s")
    if copy.error is not None:
        raise copy.error
