"""Arrays in device memory: torch tensors, CuPy arrays, the CUDA array interface, and what DLPack hands over.

All arrays of CUDA become an address, a device, and the stream that was current where the call was made; copies are the
work of `detcoll.device`. Tensors of torch on other devices (ROCm, XPU, MPS) are copied by torch, as a whole.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.buffers.host import check_torch, numpy_part, torch_part
from detcoll.buffers.part import Part, Place, check_dtype, not_contiguous
from detcoll.device import driver
from detcoll.errors import DeviceError, UsageError
from detcoll.installation import install_command
from detcoll.types import DTYPES

_DLPACK_HOST = frozenset({1, 3, 11})  # kDLCPU, kDLCUDAHost, kDLROCMHost
_DLPACK_CUDA = frozenset({2, 13})  # kDLCUDA, kDLCUDAManaged
_LEGACY, _PER_THREAD = 1, 2


def _cuda_part(name: str, dtype: np.dtype[Any], size: int, place: Place) -> Part:
    nbytes = size * dtype.itemsize
    return Part(name, dtype, size, f"cuda:{place.device}", place.address, nbytes, None, _nothing, _nothing, place)


def _nothing(piece: NDArray[Any]) -> None:
    return None


def _stream(handle: int) -> int:
    """Return a stream by which other threads may order copies after what ``handle`` of this one holds.

    The default stream of a thread has one handle in all threads. The legacy default stream waits for it, and it waits
    for that.
    """
    return _LEGACY if handle == _PER_THREAD else handle


def _current_of_torch(torch: Any, place: Any) -> int:
    """Return the handle of the current stream; torch's public way makes an object first, in six times as long."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    handle: int = torch.cuda.current_stream(place).cuda_stream if raw is None else raw(place.index)
    return handle


def any_torch_part(x: Any, name: str, writable: bool) -> Part:
    """Return a tensor of torch, on any device."""
    if x.device.type == "cpu":
        return torch_part(x, name, writable)
    torch = sys.modules["torch"]
    check_torch(torch, x, name)
    dtype = DTYPES[str(x.dtype).removeprefix("torch.")]
    place, held = x.device, x.detach()
    if place.type == "cuda" and torch.version.hip is None:
        handle = _stream(_current_of_torch(torch, place))
        return _cuda_part(name, dtype, x.numel(), Place(place.index, x.data_ptr(), handle, held))
    load, store = _by_torch(torch, held.reshape(-1))
    return Part(name, dtype, x.numel(), str(place), x.data_ptr(), x.numel() * dtype.itemsize, None, load, store)


def _by_torch(torch: Any, flat: Any) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return how torch copies a flat tensor, on the caller's stream; to and from pageable memory it then waits."""
    streams = getattr(torch, flat.device.type)
    stream = streams.current_stream(flat.device) if hasattr(streams, "current_stream") else None

    def copy(target: Any, source: Any) -> None:
        with streams.stream(stream) if stream is not None else nullcontext():
            target.copy_(source)

    def host(piece: NDArray[Any]) -> Any:
        return torch.from_numpy(piece.view(np.uint8)).view(flat.dtype)

    def load(piece: NDArray[Any]) -> None:
        copy(host(piece), flat)

    def store(piece: NDArray[Any]) -> None:
        copy(flat, host(piece))

    return load, store


def cupy_part(x: Any, name: str) -> Part:
    """Return an array of CuPy."""
    cupy = sys.modules["cupy"]
    if cupy.cuda.runtime.is_hip:
        raise UsageError(f"{name} is an array of CuPy on a device of ROCm; expected one of CUDA, or a tensor of torch")
    check_dtype(x.dtype, name)
    if not x.flags.c_contiguous:
        raise not_contiguous(name, x.shape, x.strides, f"cupy.ascontiguousarray({name})")
    number = x.device.id
    handle = _stream(cupy.cuda.get_current_stream(number).ptr)
    return _cuda_part(name, x.dtype, x.size, Place(number, x.data.ptr, handle, x))


def cuda_interface_part(x: Any, name: str, writable: bool) -> Part:
    """Return an array of any library that has the CUDA array interface, version 3 (numba's documentation of it)."""
    interface = x.__cuda_array_interface__
    address, is_read_only = interface["data"]
    if interface.get("mask") is not None:
        raise UsageError(f"{name} has a mask, which would be ignored; expected an array without")
    if writable and is_read_only:
        raise UsageError(f"{name} is read-only; expected an array that the result can be written to, such as a copy")
    shape, strides, dtype = interface["shape"], interface.get("strides"), np.dtype(interface["typestr"])
    check_dtype(dtype, name)
    packed = np.lib.stride_tricks.as_strided(np.empty((), dtype), shape, strides).flags if strides else None
    if packed is not None and not packed.c_contiguous:
        raise not_contiguous(name, shape, strides, "a contiguous copy")
    size = math.prod(shape)
    try:
        device = driver().device_of(address) if size else 0
    except DeviceError as error:
        raise UsageError(
            f"{name} says that it is at address {address:#x}, which no device of CUDA has: {error}"
        ) from error
    stated = interface.get("stream")
    return _cuda_part(name, dtype, size, Place(device, address, _stream(_LEGACY if stated is None else stated), x))


def dlpack_part(x: Any, name: str, writable: bool) -> Part:
    """Return an array of any library that speaks DLPack."""
    kind = int(x.__dlpack_device__()[0])
    try:
        if kind in _DLPACK_HOST:
            return numpy_part(np.from_dlpack(x), name, writable)
        if kind in _DLPACK_CUDA:
            return _taken_over(x, name, writable)
    except (BufferError, RuntimeError, TypeError) as error:
        raise UsageError(f"{name} is a {type(x).__name__} that DLPack does not hand over: {error}") from error
    raise UsageError(f"{name} is on DLPack device {kind}; expected the host or CUDA, or a tensor of torch")


def _taken_over(x: Any, name: str, writable: bool) -> Part:
    """Return an array on a CUDA device as one of torch or CuPy, whichever is loaded."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return any_torch_part(torch.from_dlpack(x), name, writable)
    try:
        return cupy_part(importlib.import_module("cupy").from_dlpack(x), name)
    except ImportError as error:
        raise UsageError(
            f"{name} is in device memory, which needs torch or CuPy here; import torch, or install CuPy, "
            f"for CUDA 12 with: {install_command('cuda12')} and for CUDA 13 with: {install_command('cuda13')}"
        ) from error
