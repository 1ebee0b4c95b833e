"""The memory of `detcoll.testing.device.StrictDevice`: device arrays that the host cannot touch, and pinned ranges."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import DeviceError

FREED = 0xFD
"""What the bytes of freed memory become."""

_FIRST_ADDRESS = 1 << 60  # no address of the host: touching it would end the process
_GAP_BYTES = 1 << 12

_NAMES = {
    1: "CUDA_ERROR_INVALID_VALUE",
    2: "CUDA_ERROR_OUT_OF_MEMORY",
    3: "CUDA_ERROR_NOT_INITIALIZED",
    101: "CUDA_ERROR_INVALID_DEVICE",
    201: "CUDA_ERROR_INVALID_CONTEXT",
    700: "CUDA_ERROR_ILLEGAL_ADDRESS",
    712: "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
    713: "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
    907: "CUDA_ERROR_CAPTURED_EVENT",
}


class Misuse(AssertionError):
    """What CUDA would not have noticed, or would have answered with wrong bytes or the end of the process."""


def refusal(call: str, code: int) -> DeviceError:
    """Return the error that CUDA would raise."""
    return DeviceError(call, code, _NAMES.get(code, "an error"), "the strict device was told so, or found it")


class DeviceArray:
    """An array on a fake device, as CUDA's array interface describes it; NumPy cannot read it.

    ``address``, ``nbytes``, ``device``, ``dtype``, ``shape`` : where it is and what.  ``stream`` : the handle of the
    stream that its values are ordered on.
    """

    def __init__(self, values: NDArray[Any], device: int, address: int, stream: int) -> None:
        self.dtype, self.shape, self.nbytes = values.dtype, values.shape, values.nbytes
        self.device, self.address, self.stream = device, address, stream

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "stream": self.stream or 1,  # 0 is not allowed there
            "version": 3,
        }

    def __array__(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("implicit conversion of a device array to a NumPy array")


class DeviceMemory:
    """What was allocated on fake devices. No address is used twice."""

    def __init__(self, misuse: Callable[[str], Misuse]) -> None:
        self._misuse = misuse
        self._next = _FIRST_ADDRESS
        self._lock = threading.Lock()
        self._pieces: dict[int, tuple[int, NDArray[np.uint8]]] = {}
        self._freed: set[int] = set()

    def array(self, values: NDArray[Any], device: int, stream: int) -> DeviceArray:
        """Return a new device array; its memory is freed with it."""
        held = np.frombuffer(bytearray(values.tobytes()), np.uint8)
        with self._lock:
            array = DeviceArray(values, device, self._next, stream)
            self._next += -(-max(array.nbytes, 1) // _GAP_BYTES) * _GAP_BYTES + _GAP_BYTES
        self._pieces[array.address] = device, held
        weakref.finalize(array, self.free, array.address).atexit = False
        return array

    def free(self, address: int) -> None:
        """Free an array; to do so again is nothing."""
        if address not in self._freed:
            self._freed.add(address)
            self._pieces[address][1][:] = FREED

    def find(self, address: int) -> int | None:
        """Return the device of the array that ``address`` lies in, or None if there is none."""
        found = self._around(address)
        return None if found is None else self._pieces[found][0]

    def bytes_at(self, address: int, nbytes: int, device: int) -> NDArray[np.uint8]:
        """Return memory of one array, as a view.

        Raises
        ------
        Misuse
            If it is freed, of another device, or not of one array.
        """
        begin = self._around(address)
        if begin is None:
            raise self._misuse(f"no device array is at {address:#x}")
        of, held = self._pieces[begin]
        if begin in self._freed:
            raise self._misuse(f"the device array at {begin:#x} is freed")
        if of != device:
            raise self._misuse(f"the device array at {begin:#x} is on device {of}, used on {device}")
        if address - begin + nbytes > held.size:
            raise self._misuse(f"{nbytes} bytes at {address:#x} go beyond the device array at {begin:#x}")
        return held[address - begin : address - begin + nbytes]

    def _around(self, address: int) -> int | None:
        for begin, (_, held) in self._pieces.copy().items():  # other threads make arrays
            if begin <= address < begin + max(held.size, 1):
                return begin
        return None


class PinnedRanges:
    """Which memory of the host is pinned."""

    def __init__(self, misuse: Callable[[str], Misuse]) -> None:
        self._misuse = misuse
        self._sizes: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """How much is pinned."""
        return sum(self._sizes.values())

    def add(self, address: int, nbytes: int) -> None:
        """Pin memory; DeviceError if some of it is pinned, or there is none."""
        if nbytes <= 0:
            raise refusal("register", 1)
        if any(begin < address + nbytes and address < begin + size for begin, size in self._sizes.items()):
            raise refusal("register", 712)
        self._sizes[address] = nbytes

    def remove(self, address: int) -> int:
        """End a pinning and return its size; DeviceError if there is none."""
        if address not in self._sizes:
            raise refusal("unregister", 713)
        return self._sizes.pop(address)

    def holds(self, address: int, nbytes: int) -> bool:
        """Tell whether memory is pinned, by one call; Misuse if some of it is not."""
        for begin, size in self._sizes.items():
            if begin <= address and address + nbytes <= begin + size:
                return True
            if begin < address + nbytes and address < begin + size:
                raise self._misuse(f"{nbytes} bytes at {address:#x} are pinned in part, or by two calls")
        return False
