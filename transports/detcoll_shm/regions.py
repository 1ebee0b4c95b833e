"""Arrays that all ranks of a host see, so that a collective can work on them where they are.

A rank makes a region for each array that it is asked for: a memory file without a name, whose first page tells whose
it is. When all ranks call a collective with arrays that lie in regions, each folds its share of them straight from all
and writes the result straight into all: nothing is staged. Peers map a region when it is first used, through the
owner's ``/proc`` entry, as they do the rest (`detcoll_shm.memory`).

When the last array in a region is gone, its owner gives the pages back, though peers may still have it mapped: what
they hold then is an address, no memory.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import mmap
import os
import struct
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import TransportError
from detcoll_shm.layout import KEY_BYTES, PAGE_BYTES
from detcoll_shm.libc import libc

LARGEST_KEPT_MAPPINGS = 64
"""Regions of one peer that stay mapped; more than a training loop uses, and addresses alone once they are dead."""

_HEADER = struct.Struct(f"<{KEY_BYTES}sq")
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_FAILED = ctypes.c_void_p(-1).value


class Place(NamedTuple):
    """Where an array is: number of the region (from 1), its descriptor in the owner's process, offset in bytes.

    With `OPEN` for the region, the offset is an address in the owner's process, where whoever may reads it. `DEVICE`
    says that the array is on a device, and not where.
    """

    region: int
    fd: int
    offset: int


OPEN = -1
DEVICE = Place(-2, 0, 0)
NOWHERE = Place(0, 0, 0)


def _map(fd: int, size: int) -> ctypes.Array[ctypes.c_char]:
    """Map a file; unlike `mmap.mmap` this keeps no descriptor, of which there would be one an array and rank."""
    address = libc().mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    memory = (ctypes.c_char * size).from_address(address)
    weakref.finalize(memory, libc().munmap, address, size).atexit = False
    return memory


class Regions:
    """The regions of this rank, marked with ``key``. Thread-safe: a region may die in the middle of anything.

    ``empties`` : whether pages are given back though peers may have them mapped, who then read zeros.
    """

    def __init__(self, key: bytes, *, empties: bool = True) -> None:
        self._key, self._empties = key, empties
        self._living: dict[int, tuple[int, int, int]] = {}
        self._numbers = itertools.count(1)

    def allocate(self, nbytes: int) -> memoryview:
        """Return new memory of ``nbytes``, all zero.

        Raises
        ------
        OSError
            If the system has no more.
        """
        size = PAGE_BYTES + max(nbytes, 1)
        fd = os.memfd_create("detcoll-array", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            memory = _map(fd, size)
        except BaseException:
            os.close(fd)
            raise
        address = ctypes.addressof(memory) + PAGE_BYTES
        number = next(self._numbers)
        _HEADER.pack_into(memory, 0, self._key, number)
        self._living[number] = (address, nbytes, fd)
        weakref.finalize(memory, self._forget, number, size).atexit = False
        return memoryview(memory).cast("B")[PAGE_BYTES : PAGE_BYTES + nbytes]

    def place_of(self, array: NDArray[Any]) -> Place:
        """Return where ``array`` is, or `NOWHERE` if it is not in a region of this rank as a whole."""
        if not self._living or not array.nbytes:
            return NOWHERE
        at = array.__array_interface__["data"][0]
        for number, (address, nbytes, fd) in list(self._living.items()):  # one may die meanwhile
            if address <= at and at + array.nbytes <= address + nbytes:
                return Place(number, fd, at - address)
        return NOWHERE

    def _forget(self, number: int, size: int) -> None:
        _, _, fd = self._living.pop(number)
        if self._empties:
            libc().fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, 0, size)
        os.close(fd)


class Mapped:
    """The regions of a peer, as far as this rank has used them.

    ``key`` : that of the peer's memory.  ``open_descriptor`` : opens a descriptor of the peer's process here.
    """

    def __init__(self, rank: int, key: bytes, open_descriptor: Callable[[int], int]) -> None:
        self._rank, self.key, self._open = rank, key, open_descriptor
        self._arrays: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()

    def view(self, place: Place, nbytes: int) -> NDArray[np.uint8]:
        """Return the ``nbytes`` bytes at ``place``.

        Raises
        ------
        TransportError
            If that region is not there.
        """
        array = self._arrays.get(place.region)
        if array is None:
            if len(self._arrays) >= LARGEST_KEPT_MAPPINGS:
                self._arrays.popitem(last=False)
            array = self._arrays[place.region] = self._map(place)
        else:
            self._arrays.move_to_end(place.region)
        if place.offset + nbytes > array.size:
            raise TransportError(
                f"rank {self._rank} says that its array is at bytes {place.offset} to {place.offset + nbytes} of a "
                f"region of {array.size}"
            )
        return array[place.offset : place.offset + nbytes]

    def _map(self, place: Place) -> NDArray[np.uint8]:
        fd = self._open(place.fd)
        try:
            memory = _map(fd, os.fstat(fd).st_size)
        except OSError as error:
            raise TransportError(f"region {place.region} of rank {self._rank} cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        if _HEADER.unpack_from(memory) != (self.key, place.region):
            raise TransportError(f"descriptor {place.fd} of rank {self._rank} is not its region {place.region}")
        return np.frombuffer(memoryview(memory), np.uint8, offset=PAGE_BYTES)
