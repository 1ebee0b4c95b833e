"""Memory that belongs to others and is pinned for a while, such as shared memory of a transport."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from detcoll.device.driver import Driver
from detcoll.device.pinned import PinnedPool
from detcoll.errors import DeviceError

log = logging.getLogger("detcoll")


class _Pin:
    """``memory`` : is not unmapped as long as it is pinned.  ``users`` : how many asked for it."""

    __slots__ = ("is_pinned", "memory", "users")

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.memory = memory
        self.users = 0
        self.is_pinned = False


class Pins:
    """What is pinned in this process, by address: CUDA pins no memory twice. Any thread may use it.

    Parameters
    ----------
    cuda : Driver
        It pins.
    pool : PinnedPool
        Says how much may be pinned, and counts it.
    """

    def __init__(self, cuda: Driver, pool: PinnedPool) -> None:
        self._cuda, self._pool = cuda, pool
        self._pins: dict[int, _Pin] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return how many pieces of memory are pinned, or could not be and are in use."""
        return len(self._pins)

    def pin(self, memory: NDArray[np.uint8], device: int) -> Callable[[], None]:
        """Pin ``memory``, (n,), host, for all devices, until the function that this returns was called as often.

        ``device`` is one that this process uses. If the driver refuses, the memory stays as it is, and copies block.

        Raises
        ------
        DeviceError
            If the device is of no use any more.
        """
        address = memory.__array_interface__["data"][0]
        with self._lock:
            pin = self._pins.get(address)
            if pin is None:
                pin = _Pin(memory)
                self._begin(pin, address, device)
                self._pins[address] = pin
            pin.users += 1
        return partial(self._unpin, address, device)

    def _begin(self, pin: _Pin, address: int, device: int) -> None:
        nbytes, pool = pin.memory.nbytes, self._pool
        if not pool.allow(nbytes):
            log.warning(
                "%d bytes of shared memory are not pinned, since %d are; copies block", nbytes, self._pool.bytes
            )
            return
        try:
            with self._cuda.on(device):
                self._cuda.register(address, nbytes)
            pin.is_pinned = True
        except DeviceError as error:
            pool.count(-nbytes, is_pinned=True)
            if error.is_sticky:
                raise
            pool.count(nbytes, is_pinned=False)
            log.warning("%d bytes of shared memory cannot be pinned, so copies block: %s", nbytes, error)

    def _unpin(self, address: int, device: int) -> None:
        with self._lock:
            pin = self._pins[address]
            pin.users -= 1
            if pin.users:
                return
            if pin.is_pinned:
                try:
                    with self._cuda.on(device):
                        self._cuda.unregister(address)
                except DeviceError:
                    return  # it is not known whether the device still uses the memory, so it stays mapped, and counts
            self._pool.count(-pin.memory.nbytes, is_pinned=pin.is_pinned)
            del self._pins[address]
