"""From whatever the user holds to one flat host array that a collective can work on.

`bind` takes NumPy arrays, torch tensors, CuPy arrays, anything with DLPack or the CUDA array interface, and lists or
tuples of those, which are coalesced. Host memory is never copied: the array is a view of it. Device memory and lists
go through a staging array, which `Bound.load` fills before the collective and `Bound.store` gives back after. So does
a `Pieces`, with which other rooms of detcoll bind host arrays that have gaps, or several as one.

Everything is checked before anything moves. torch and CuPy are never imported here for somebody who did not: an object
of theirs means that they are loaded already. Copies from and to a device run on the stream that was current where
`bind` was called, and are complete when `load` and `store` return, whichever thread calls those.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from detcoll.errors import UsageError
from detcoll.installation import install_command
from detcoll.types import BFLOAT16, DTYPES

_EXPECTED = (
    "a NumPy array, a torch tensor, a CuPy array, an object with DLPack or the CUDA array interface, "
    "or a list or tuple of those"
)
_TYPES = frozenset(DTYPES.values())
_DLPACK_HOST = frozenset({1, 3, 11, 13})  # kDLCPU, kDLCUDAHost, kDLROCMHost, kDLCUDAManaged
_DLPACK_DEVICE = frozenset({2, 10})  # kDLCUDA, kDLROCM


@dataclass(frozen=True, slots=True)
class _Part:
    """One array of the user, checked; ``host`` is a flat view of it unless it is staged.

    ``address``, ``nbytes`` : the user's memory; no bytes for memory that no other call has to wait for.
    """

    name: str
    dtype: np.dtype[Any]
    size: int
    device: str
    address: int
    nbytes: int
    host: NDArray[Any] | None
    load: Callable[[NDArray[Any]], None]
    store: Callable[[NDArray[Any]], None]


@dataclass(frozen=True, slots=True)
class Pieces:
    """Host arrays, with or without gaps, that a call sees as one flat array, one after another. Always staged.

    ``arrays`` : of one type; where the result is written, their elements do not overlap.  ``dtype`` : the type of the
    staging array.  ``enter`` : what becomes of an array on its way into the staging array; by default nothing.
    ``leave`` : what becomes of a result on its way back.  ``is_ordered`` : whether calls that use the same memory wait
    for each other. They do if what they use lies in one range of addresses, though they may use different bytes of it.
    """

    arrays: Sequence[NDArray[Any]]
    dtype: np.dtype[Any]
    enter: Callable[[NDArray[Any]], NDArray[Any]] | None = None
    leave: Callable[[NDArray[Any]], NDArray[Any]] | None = None
    is_ordered: bool = True

    @property
    def shape(self) -> tuple[int]:
        """The number of elements of all arrays."""
        return (sum(array.size for array in self.arrays),)

    def load(self, staging: NDArray[Any]) -> None:
        """Copy the arrays into a staging array."""
        for array, piece in self._pairs(staging):
            np.copyto(piece.reshape(array.shape), array if self.enter is None else self.enter(array), casting="unsafe")

    def store(self, staging: NDArray[Any]) -> None:
        """Copy a staging array back into the arrays."""
        for array, piece in self._pairs(staging):
            left = piece if self.leave is None else self.leave(piece)
            np.copyto(array, left.reshape(array.shape), casting="unsafe")

    def _pairs(self, staging: NDArray[Any]) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        begin = 0
        for array in self.arrays:
            yield array, staging[begin : begin + array.size]
            begin += array.size

    def span(self) -> tuple[int, int]:
        """Return the first address of the arrays, and how many bytes it is to their last one."""
        bounds = [np.lib.array_utils.byte_bounds(array) for array in self.arrays if array.size]
        if not bounds or not self.is_ordered:
            return 0, 0
        begin = min(low for low, _ in bounds)
        return int(begin), int(max(high for _, high in bounds) - begin)


class Bound(msgspec.Struct, frozen=True):
    """What a collective works on: one flat host array over all that was bound.

    ``array`` : array, (n,), one of `DTYPES`, C-contiguous, host; read-only if bound so.
    ``device`` : where the user's memory is, ``"cpu"`` or for example ``"cuda:0"``.
    ``staged`` : whether ``array`` is memory of its own; if not, it is the user's memory and nothing is ever copied.
    ``blocks`` : into how many equal blocks each array of a list is cut. ``array`` holds the first blocks of all arrays,
    then the second ones, and so on.
    """

    array: NDArray[Any]
    device: str
    staged: bool
    writable: bool
    _parts: tuple[_Part, ...]
    blocks: int = 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The element type."""
        return self.array.dtype

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The user's memory: the first address and the one behind the last, of each array."""
        if not self.staged:
            begin: int = self.array.__array_interface__["data"][0]
            return ((begin, begin + self.array.nbytes),) if self.array.size else ()
        return tuple((part.address, part.address + part.nbytes) for part in self._parts if part.nbytes)

    @property
    def cut(self) -> tuple[int, ...]:
        """The elements that each array of a list has in a block; the same on all ranks of a call that fits together."""
        return tuple(part.size // self.blocks for part in self._parts)

    def load(self) -> None:
        """Copy the user's values into a staging array; nothing to do for a view."""
        if not self.staged:
            return
        for part, piece in self._pieces():
            if self.blocks == 1:
                part.load(piece[0])
                continue
            whole = np.empty(part.size, part.dtype)
            part.load(whole)
            piece[:] = whole.reshape(piece.shape)

    def store(self) -> None:
        """Copy a staging array back into the user's memory; nothing to do for a view.

        Raises
        ------
        UsageError
            If it was bound read-only.
        """
        if not self.writable:
            raise UsageError("store() of a buffer that was bound with writable=False")
        if self.staged:
            for part, piece in self._pieces():
                part.store(piece[0] if self.blocks == 1 else np.ascontiguousarray(piece).reshape(-1))

    def _pieces(self) -> list[tuple[_Part, NDArray[Any]]]:
        """Return each array that has elements, and where its blocks lie in ``array``, one a row."""
        rows = self.array.reshape(self.blocks, -1)
        edges = pairwise(accumulate((part.size // self.blocks for part in self._parts), initial=0))
        pairs = zip(self._parts, edges, strict=True)
        return [(part, rows[:, start:stop]) for part, (start, stop) in pairs if start < stop]


def bind(x: object, *, writable: bool = True, name: str = "x", blocks: int = 1, copied: bool = False) -> Bound:
    """Return the flat host array for ``x``.

    Parameters
    ----------
    x : array or list or tuple of arrays
        C-contiguous, one of `DTYPES` in native byte order, any shape (0-d included), on one device.
    writable : bool
        Whether results are written to it; if False, read-only memory will do.
    name : str
        What error messages call it.
    blocks : int
        Into how many equal blocks each array of a list is cut; see `Bound`.
    copied : bool
        Whether to stage host memory too.

    Returns
    -------
    Bound
        Borrows the memory of ``x`` and keeps it alive.

    Raises
    ------
    UsageError
        If ``x`` cannot be used; the message names what, its value, and what was expected. Nothing was copied.
    """
    if type(x) is np.ndarray and x.dtype in _TYPES and writable and not copied:
        flags = x.flags
        if flags.c_contiguous and flags.writeable:
            return Bound(x.ravel(), "cpu", False, True, ())  # the usual case, which small calls should not pay for
    if isinstance(x, list | tuple):
        if not x:
            raise UsageError(f"{name}={x!r} is empty; expected at least one array")
        parts = tuple(_part(item, f"{name}[{index}]", writable) for index, item in enumerate(x))
        _check_together(parts)
        if writable:
            _check_apart(parts)
    else:
        parts = (_part(x, name, writable),)
    first = parts[0]
    if len(parts) == 1 and first.host is not None and not copied:
        array = first.host.view()
        array.flags.writeable = writable
        return Bound(array, first.device, False, writable, parts)
    staging = np.empty(sum(part.size for part in parts), first.dtype)
    if len(parts) == 1:
        return Bound(staging, first.device, True, writable, parts)
    for part in parts:
        if part.size % blocks:
            raise UsageError(f"{part.name} has {part.size} elements; expected a multiple of {blocks}, a block a rank")
    return Bound(staging, first.device, True, writable, parts, blocks)


def _part(x: Any, name: str, writable: bool) -> _Part:
    if isinstance(x, np.ndarray):
        return _numpy_part(x, name, writable)
    if isinstance(x, Pieces):
        return _Part(name, x.dtype, x.shape[0], "cpu", *x.span(), None, x.load, x.store)
    if _is_instance(x, "torch", "Tensor"):
        return _torch_part(x, name, writable)
    if _is_instance(x, "cupy", "ndarray"):
        return _cupy_part(x, name)
    if isinstance(x, bool | int | float | complex | np.generic):
        raise UsageError(f"{name}={x!r} is a scalar; expected {_EXPECTED}. Wrap it: numpy.array({x!r})")
    if isinstance(x, list | tuple):
        raise UsageError(f"{name} is a {type(x).__name__} inside a list; expected one flat list of arrays")
    if not isinstance(x, type):
        if hasattr(x, "__cuda_array_interface__"):
            return _cuda_interface_part(x, name, writable)
        if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
            return _dlpack_part(x, name, writable)
    raise UsageError(f"{name} is a {type(x).__name__}; expected {_EXPECTED}")


def _is_instance(x: object, module: str, kind: str) -> bool:
    """Tell whether ``x`` is of a type of a module that is loaded."""
    loaded = getattr(sys.modules.get(module), kind, None)
    return isinstance(loaded, type) and isinstance(x, loaded)


def _check_together(parts: Sequence[_Part]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.dtype != first.dtype:
            raise UsageError(
                f"{part.name} has dtype {part.dtype}, {first.name} {first.dtype}; expected one dtype in a list"
            )
        if part.device != first.device:
            raise UsageError(f"{part.name} is on {part.device}, {first.name} on {first.device}; expected one device")


def _check_apart(parts: Sequence[_Part]) -> None:
    """Raise UsageError if arrays of a list that results are written to share memory."""
    # The bytes of arrays with gaps may lie between each other's.
    whole = [part for part in parts if part.nbytes and part.nbytes == part.size * part.dtype.itemsize]
    for low, high in pairwise(sorted(whole, key=lambda part: part.address)):
        if low.address + low.nbytes > high.address:
            raise UsageError(f"{low.name} and {high.name} share memory; expected arrays that do not overlap in a list")


def _supported(dtype: np.dtype[Any], name: str) -> None:
    if dtype not in DTYPES.values():
        order = "" if dtype.isnative else " in foreign byte order"
        raise UsageError(f"{name} has dtype {dtype}{order}; expected one of {', '.join(DTYPES)} in native byte order")


def _not_contiguous(name: str, shape: object, strides: object, hint: str) -> UsageError:
    return UsageError(
        f"{name} is not C-contiguous (shape {tuple(shape)}, strides {tuple(strides)}); "  # type: ignore[arg-type]
        f"expected C order without gaps. Pass {hint} and copy the result back"
    )


def _numpy_part(x: NDArray[Any], name: str, writable: bool) -> _Part:
    if isinstance(x, np.ma.MaskedArray):
        raise UsageError(f"{name} is a masked array, whose mask would be ignored; pass {name}.data or fill it")
    _supported(x.dtype, name)
    if not x.flags.c_contiguous:
        raise _not_contiguous(name, x.shape, x.strides, f"numpy.ascontiguousarray({name})")
    if writable and not x.flags.writeable:
        raise UsageError(f"{name} is read-only; expected an array that the result can be written to, such as a copy")
    return _host_part(np.asarray(x).reshape(-1), name)


def _host_part(flat: NDArray[Any], name: str) -> _Part:
    def load(piece: NDArray[Any]) -> None:
        np.copyto(piece, flat)

    def store(piece: NDArray[Any]) -> None:
        np.copyto(flat, piece)

    address: int = flat.__array_interface__["data"][0]
    return _Part(name, flat.dtype, flat.size, "cpu", address, flat.nbytes, flat, load, store)


def _torch_part(x: Any, name: str, writable: bool) -> _Part:
    torch = sys.modules["torch"]
    _check_torch(torch, x, name)
    flat = x.detach().reshape(-1)
    if x.device.type == "cpu":
        # numpy() knows no bfloat16; the same bytes as int16 it does
        bfloat16 = x.dtype == torch.bfloat16
        return _host_part(flat.view(torch.int16).numpy().view(BFLOAT16) if bfloat16 else flat.numpy(), name)
    dtype = DTYPES[str(x.dtype).removeprefix("torch.")]
    stream = torch.cuda.current_stream(x.device) if x.device.type == "cuda" else None

    def copy(into_device: bool, piece: NDArray[Any]) -> None:
        host = torch.from_numpy(piece.view(np.uint8)).view(x.dtype)
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            # copies from and to pageable memory have ended when copy_ returns
            if into_device:
                flat.copy_(host)
            else:
                host.copy_(flat)

    return _Part(
        name, dtype, x.numel(), str(x.device), x.data_ptr(), x.numel() * dtype.itemsize, None,
        lambda piece: copy(False, piece), lambda piece: copy(True, piece),
    )  # fmt: skip


def _check_torch(torch: ModuleType, x: Any, name: str) -> None:
    wrapper = type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if x.device.type == "meta" or x.is_quantized or wrapper or x.layout != torch.strided:
        kind = (
            "a meta tensor" if x.device.type == "meta"
            else "quantized" if x.is_quantized
            else f"a {type(x).__name__}" if wrapper
            else f"of layout {x.layout}"
        )  # fmt: skip
        raise UsageError(f"{name} is {kind}, which has no plain memory; expected a dense tensor")
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise UsageError(f"{name} has dtype {x.dtype}; expected one of {', '.join(DTYPES)}")
    if not x.is_contiguous():
        raise _not_contiguous(name, x.shape, x.stride(), f"{name}.contiguous()")
    if x.is_conj():
        raise UsageError(f"{name} is a lazily conjugated view; pass {name}.resolve_conj() and copy the result back")
    if x.is_neg():
        raise UsageError(f"{name} is a lazily negated view; pass {name}.resolve_neg() and copy the result back")


def _cupy_part(x: Any, name: str) -> _Part:
    cupy = sys.modules["cupy"]
    _supported(x.dtype, name)
    if not x.flags.c_contiguous:
        raise _not_contiguous(name, x.shape, x.strides, f"cupy.ascontiguousarray({name})")
    flat = x.reshape(-1)
    with x.device:
        stream = cupy.cuda.get_current_stream()

    # Given a stream, CuPy only queues the copy (a pageable one may or may not have ended): wait for it.
    def load(piece: NDArray[Any]) -> None:
        with x.device:
            cupy.asnumpy(flat, stream=stream, out=piece)
            stream.synchronize()

    def store(piece: NDArray[Any]) -> None:
        with x.device:
            flat.set(piece, stream=stream)
            stream.synchronize()

    nbytes = x.size * x.dtype.itemsize
    return _Part(name, x.dtype, x.size, f"cuda:{x.device.id}", x.data.ptr, nbytes, None, load, store)


def _import_cupy(name: str) -> Any:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise UsageError(
            f"{name} is in device memory, which needs CuPy here; for CUDA 12 install it with: "
            f"{install_command('cuda12')} and for CUDA 13 with: {install_command('cuda13')}"
        ) from error


def _cuda_interface_part(x: Any, name: str, writable: bool) -> _Part:
    interface = x.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise UsageError(f"{name} has a mask, which would be ignored; expected an array without")
    if writable and interface["data"][1]:
        raise UsageError(f"{name} is read-only; expected an array that the result can be written to, such as a copy")
    return _cupy_part(_import_cupy(name).asarray(x), name)


def _dlpack_part(x: Any, name: str, writable: bool) -> _Part:
    kind = int(x.__dlpack_device__()[0])
    try:
        if kind in _DLPACK_HOST:
            return _numpy_part(np.from_dlpack(x), name, writable)
        if kind in _DLPACK_DEVICE:
            return _cupy_part(_import_cupy(name).from_dlpack(x), name)
    except (BufferError, RuntimeError, TypeError) as error:
        raise UsageError(f"{name} is a {type(x).__name__} that DLPack does not hand over: {error}") from error
    raise UsageError(f"{name} is on DLPack device {kind}; expected the host, CUDA or ROCm")
