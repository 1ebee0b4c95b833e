"""CUDA's driver library, ``libcuda.so.1``, through ctypes.

It is there wherever an NVIDIA driver is, whichever library made the arrays, and its interface is stable: what ends in
``_v2`` is what C programs get under the plain name. ctypes lets other threads of Python run during a call. Functions
that only note something for the calling thread keep Python's lock instead, since taking it back could cost milliseconds
beside a busy thread.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from detcoll.device.driver import Driver, MemoryType
from detcoll.errors import DeviceError, TransportUnavailable

LIBRARY = "libcuda.so.1"

_INT_P, _UINT_P, _HANDLE_P, _TEXT_P = POINTER(c_int), POINTER(c_uint), POINTER(c_void_p), POINTER(c_char_p)

_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (_INT_P,),
    "cuGetErrorName": (c_int, _TEXT_P),
    "cuGetErrorString": (c_int, _TEXT_P),
    "cuDeviceGetCount": (_INT_P,),
    "cuDeviceGet": (_INT_P, c_int),
    "cuDeviceGetAttribute": (_INT_P, c_int, c_int),
    "cuDeviceCanAccessPeer": (_INT_P, c_int, c_int),
    "cuDevicePrimaryCtxGetState": (c_int, _UINT_P, _INT_P),
    "cuDevicePrimaryCtxRetain": (_HANDLE_P, c_int),
    "cuStreamCreate": (_HANDLE_P, c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuStreamQuery": (c_void_p,),
    "cuStreamIsCapturing": (c_void_p, _INT_P),
    "cuEventCreate": (_HANDLE_P, c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuEventSynchronize": (c_void_p,),
    "cuEventDestroy_v2": (c_void_p,),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpy2DAsync_v2": (c_void_p, c_void_p),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuPointerGetAttribute": (c_void_p, c_int, c_uint64),
}
_FUNCTIONS_OF_THREAD: dict[str, tuple[Any, ...]] = {
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (_HANDLE_P,),
    "cuThreadExchangeStreamCaptureMode": (_INT_P,),
}

_INVALID_VALUE, _NOT_INITIALIZED, _NOT_READY, _CAPTURE_IMPLICIT = 1, 3, 600, 906
# CUDA is shutting down, or the context is gone, and with it all that there was to release.
_RELEASED = (3, 4, 201, 709)

_NOT_YET = (_NOT_READY,)

_STREAM_NON_BLOCKING = 1
_EVENT_DISABLE_TIMING = 2
_REGISTER_PORTABLE = 1
_CAPTURE_THREAD_LOCAL = 1
_POINTER_MEMORY_TYPE, _POINTER_DEVICE_ORDINAL = 2, 9
_PCI_BUS, _PCI_DEVICE, _COPY_ENGINES, _PCI_DOMAIN = 33, 34, 40, 50
_HOST, _DEVICE = int(MemoryType.HOST), int(MemoryType.DEVICE)

SMALL_BYTES = 64 * 1024
"""The driver lets the unit that runs kernels write smaller arrays to the device. Where processes share a device, such a
copy waits for the turn of its process: up to 280 us on an H200. As two rows, it goes by the unit for copies: 12 us.
There the driver does so below 32 KiB; the rest is margin."""


class _Rows(ctypes.Structure):
    """``CUDA_MEMCPY2D``."""

    _fields_ = (
        ("srcXInBytes", c_size_t), ("srcY", c_size_t), ("srcMemoryType", c_uint), ("srcHost", c_void_p),
        ("srcDevice", c_uint64), ("srcArray", c_void_p), ("srcPitch", c_size_t),
        ("dstXInBytes", c_size_t), ("dstY", c_size_t), ("dstMemoryType", c_uint), ("dstHost", c_void_p),
        ("dstDevice", c_uint64), ("dstArray", c_void_p), ("dstPitch", c_size_t),
        ("WidthInBytes", c_size_t), ("Height", c_size_t),
    )  # fmt: skip


_FORKED = "CUDA cannot be used in a forked process; start processes by spawn"


def _not_initialized(*_: object) -> int:
    return _NOT_INITIALIZED


class Cuda(Driver):
    """CUDA's driver in this process; `driver` returns the one instance.

    Raises
    ------
    TransportUnavailable
        If there is no driver of NVIDIA, or one that is too old.
    DeviceError
        If CUDA cannot be used in this process.
    """

    def __init__(self, library: str) -> None:
        super().__init__()
        try:
            self._functions = _load(ctypes.CDLL(library), _FUNCTIONS)
            self._functions |= _load(ctypes.PyDLL(library), _FUNCTIONS_OF_THREAD)
        except (OSError, AttributeError) as error:
            raise TransportUnavailable(
                f"arrays on CUDA devices need the driver library {library} of CUDA 11 or newer: {error}"
            ) from error
        self._contexts: dict[int, c_void_p] = {}
        self._inside = _Inside()
        self._retaining = threading.Lock()
        self._call("cuInit", 0)

    def forget(self) -> None:
        """Refuse all calls from now on, as CUDA does in a process that was forked from one that used it."""
        self._functions |= {name: _not_initialized for name in self._functions if not name.startswith("cuGetError")}
        self._retaining = threading.Lock()  # another thread may have held it
        self._inside = _Inside()

    def on(self, device: int) -> AbstractContextManager[None]:
        """See `Driver.on`: push and pop the primary context, which CuPy and torch use too."""
        return _On(self, device)

    def _retain(self, device: int) -> c_void_p:
        """Retain the primary context of a device, for as long as the process lives."""
        number, flags, is_active, context = c_int(), c_uint(), c_int(), c_void_p()
        with self._retaining:
            self._call("cuDeviceGet", byref(number), device)
            self._call("cuDevicePrimaryCtxGetState", number, byref(flags), byref(is_active))
            if not is_active.value:
                raise self._error("cuDevicePrimaryCtxGetState", 201, f"this process does not use cuda:{device} yet")
            if device not in self._contexts:
                self._call("cuDevicePrimaryCtxRetain", byref(context), number)
                self._contexts[device] = context
            return self._contexts[device]

    def stream(self, device: int) -> int:
        """See `Driver.stream`."""
        made = c_void_p()
        with self.on(device):
            self._call("cuStreamCreate", byref(made), _STREAM_NON_BLOCKING)
        return made.value or 0

    def destroy_stream(self, stream: int) -> None:
        """See `Driver.destroy_stream`."""
        self._call("cuStreamDestroy_v2", stream, expected=_RELEASED)

    def capturing(self, stream: int) -> bool:
        """See `Driver.capturing`. The default stream counts as captured while one that waits for it is."""
        status = c_int()
        code = self._call("cuStreamIsCapturing", stream, byref(status), expected=(_CAPTURE_IMPLICIT,))
        return bool(code or status.value)

    def is_idle(self, stream: int) -> bool:
        """See `Driver.is_idle`."""
        return not self._call("cuStreamQuery", stream, expected=_NOT_YET)

    def event(self, device: int) -> int:
        """See `Driver.event`."""
        made = c_void_p()
        with self.on(device):
            self._call("cuEventCreate", byref(made), _EVENT_DISABLE_TIMING)
        return made.value or 0

    def destroy_event(self, event: int) -> None:
        """See `Driver.destroy_event`."""
        self._call("cuEventDestroy_v2", event, expected=_RELEASED)

    def record(self, event: int, stream: int) -> None:
        """See `Driver.record`."""
        self._call("cuEventRecord", event, stream)

    def is_past(self, event: int) -> bool:
        """See `Driver.is_past`."""
        return not self._call("cuEventQuery", event, expected=_NOT_YET)

    def wait_for(self, event: int) -> None:
        """See `Driver.wait_for`."""
        self._call("cuEventSynchronize", event)

    def order(self, stream: int, event: int) -> None:
        """See `Driver.order`."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    def to_host(self, host_address: int, device_address: int, nbytes: int, stream: int) -> None:
        """See `Driver.to_host`."""
        self._call("cuMemcpyDtoHAsync_v2", host_address, device_address, nbytes, stream)

    def to_device(self, device_address: int, host_address: int, nbytes: int, stream: int) -> None:
        """See `Driver.to_device`."""
        if nbytes >= SMALL_BYTES or nbytes % 2:
            self._call("cuMemcpyHtoDAsync_v2", device_address, host_address, nbytes, stream)
            return
        row = nbytes // 2
        rows = _Rows(0, 0, _HOST, host_address, 0, None, row, 0, 0, _DEVICE, None, device_address, None, row, row, 2)
        self._call("cuMemcpy2DAsync_v2", byref(rows), stream)

    def allocate(self, device: int, nbytes: int) -> int:
        """See `Driver.allocate`."""
        address = c_uint64()
        with self.on(device):
            self._call("cuMemAlloc_v2", byref(address), nbytes)
        return address.value

    def register(self, address: int, nbytes: int) -> None:
        """See `Driver.register`."""
        self._call("cuMemHostRegister_v2", address, nbytes, _REGISTER_PORTABLE)

    def unregister(self, address: int) -> None:
        """See `Driver.unregister`."""
        self._call("cuMemHostUnregister", address, expected=_RELEASED)

    def device_of(self, address: int) -> int:
        """See `Driver.device_of`. May be called outside of `on`."""
        number = c_int()
        self._call("cuPointerGetAttribute", byref(number), _POINTER_DEVICE_ORDINAL, address)
        return number.value

    def memory_type(self, address: int) -> MemoryType:
        """See `Driver.memory_type`. May be called outside of `on`."""
        kind = c_uint()
        self._call("cuPointerGetAttribute", byref(kind), _POINTER_MEMORY_TYPE, address, expected=(_INVALID_VALUE,))
        return MemoryType(kind.value)

    def version(self) -> tuple[int, int]:
        """Return the newest version of CUDA that the driver can carry out, such as (12, 4)."""
        version = c_int()
        self._call("cuDriverGetVersion", byref(version))
        return version.value // 1000, version.value % 1000 // 10

    def count(self) -> int:
        """Return how many devices this process may use."""
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        return count.value

    def pci_bus_id(self, device: int) -> str:
        """See `Driver.pci_bus_id`. May be called outside of `on`."""
        domain, bus, slot = (self._attribute(device, number) for number in (_PCI_DOMAIN, _PCI_BUS, _PCI_DEVICE))
        return f"{domain:04x}:{bus:02x}:{slot:02x}.0"

    def reaches(self, device: int, other: int) -> bool:
        """Tell whether a device can read and write the memory of another one."""
        numbers = c_int(), c_int()
        for number, found in zip((device, other), numbers, strict=True):
            self._call("cuDeviceGet", byref(found), number)
        can = c_int()
        self._call("cuDeviceCanAccessPeer", byref(can), *numbers)
        return bool(can.value)

    def copy_engines(self, device: int) -> int:
        """Return how many copies a device carries out at a time, beside kernels."""
        return self._attribute(device, _COPY_ENGINES)

    def _attribute(self, device: int, attribute: int) -> int:
        number, value = c_int(), c_int()
        self._call("cuDeviceGet", byref(number), device)
        self._call("cuDeviceGetAttribute", byref(value), attribute, number)
        return value.value

    def _call(self, name: str, *arguments: object, expected: Collection[int] = ()) -> int:
        """Return 0, or the code if it is expected."""
        code = self._functions[name](*arguments)
        if code and code not in expected:
            raise self._error(name, code)
        return code

    def _error(self, call: str, code: int, said: str = "") -> DeviceError:
        name, text = c_char_p(), c_char_p()
        self._functions["cuGetErrorName"](code, byref(name))
        self._functions["cuGetErrorString"](code, byref(text))
        # CUDA was initialised here, unless it was so before in the process that this one was forked from.
        said = said or (_FORKED if code == _NOT_INITIALIZED else (text.value or b"no description").decode())
        return DeviceError(call, code, (name.value or b"an unknown error").decode(), said)


class _Inside(threading.local):
    """Which device a thread has made current by `Cuda.on`."""

    device: int | None = None


class _On:
    """Makes a device current, and its thread's captures the only ones that forbid calls; nothing where both are so."""

    __slots__ = ("_before", "_cuda", "_device", "_mode")

    def __init__(self, cuda: Cuda, device: int) -> None:
        self._cuda, self._device = cuda, device
        self._mode: c_int | None = None

    def __enter__(self) -> None:
        cuda, device = self._cuda, self._device
        inside = cuda._inside
        self._before = inside.device
        if self._before == device:
            return
        cuda._call("cuCtxPushCurrent_v2", cuda._contexts.get(device) or cuda._retain(device))
        mode = c_int(_CAPTURE_THREAD_LOCAL)
        try:
            cuda._call("cuThreadExchangeStreamCaptureMode", byref(mode))
        except BaseException:
            cuda._call("cuCtxPopCurrent_v2", byref(c_void_p()), expected=_RELEASED)
            raise
        self._mode = mode
        inside.device = device

    def __exit__(self, *_: object) -> None:
        cuda, mode = self._cuda, self._mode
        if mode is None:
            return
        cuda._inside.device, self._mode = self._before, None
        try:
            cuda._call("cuThreadExchangeStreamCaptureMode", byref(mode))
        finally:
            cuda._call("cuCtxPopCurrent_v2", byref(c_void_p()), expected=_RELEASED)


def _load(library: ctypes.CDLL, signatures: dict[str, tuple[Any, ...]]) -> dict[str, Callable[..., int]]:
    functions = {name: getattr(library, name) for name in signatures}
    for name, function in functions.items():
        function.argtypes = signatures[name]
        function.restype = c_int
    return functions


_making = threading.Lock()
_driver: Cuda | None = None


def driver() -> Cuda:
    """Return CUDA's driver, which is loaded by the first call.

    Raises
    ------
    TransportUnavailable, DeviceError
        See `Cuda`. In a process that was forked after the first call, the driver's methods raise DeviceError.
    """
    global _driver
    if _driver is not None:
        return _driver
    with _making:
        if _driver is None:
            _driver = Cuda(LIBRARY)
        return _driver


def _forked() -> None:
    global _making
    _making = threading.Lock()
    if _driver is not None:
        _driver.forget()


os.register_at_fork(after_in_child=_forked)
