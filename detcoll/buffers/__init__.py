"""From whatever the user holds to one flat host array that a collective can work on.

`bind` takes NumPy arrays, torch tensors, CuPy arrays, anything with DLPack or the CUDA array interface, and lists or
tuples of those, which are coalesced. Host memory is never copied: the array is a view of it. Device memory and lists
go through a staging array, which `Bound.load` fills before the collective and `Bound.store` gives back after. So does
a `Pieces`, with which other rooms of detcoll bind host arrays that have gaps, or several as one, as a `Joined` does
with arrays on devices.

Everything is checked before anything moves. torch and CuPy are never imported here for somebody who did not: an object
of theirs means that they are loaded already. Copies from and to a device are ordered after what the stream holds that
is current where `bind` is called, and are complete when `load` and `store` return, whichever thread calls those. Plans
copy piece by piece instead (`Bound.buffer`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from detcoll.buffers.device import any_torch_part, cuda_interface_part, cupy_part, dlpack_part
from detcoll.buffers.host import numpy_part
from detcoll.buffers.part import Part, check_apart, check_together, leader_of
from detcoll.buffers.pieces import Joined, Pieces
from detcoll.device import DeviceBuffer, Gate, Segment, copy_now, driver, pinned_memory
from detcoll.errors import UsageError
from detcoll.types import DTYPES

__all__ = ["Bound", "Joined", "Pieces", "bind"]

_EXPECTED = (
    "a NumPy array, a torch tensor, a CuPy array, an object with DLPack or the CUDA array interface, "
    "or a list or tuple of those"
)
_TYPES = frozenset(DTYPES.values())
_LONGEST_NS = 2**63
_NO_MEMORY = bytes(max(dtype.itemsize for dtype in _TYPES))


class Bound(msgspec.Struct):
    """What a collective works on: one flat host array over all that was bound. Nobody changes its fields.

    ``dtype``, ``size`` : the element type, one of `DTYPES`, and how many elements there are.
    ``device`` : where the user's memory is, ``"cpu"`` or for example ``"cuda:0"``.
    ``staged`` : whether ``array`` is memory of its own; if not, it is the user's memory and nothing is ever copied.
    ``blocks`` : into how many equal blocks each array of a list is cut. ``array`` holds the first blocks of all arrays,
    then the second ones, and so on.
    """

    _array: NDArray[Any] | None
    dtype: np.dtype[Any]
    size: int
    device: str
    staged: bool
    writable: bool
    _parts: tuple[Part, ...]
    blocks: int = 1

    @property
    def array(self) -> NDArray[Any]:
        """The array, (size,), C-contiguous, host; read-only if bound so. One thread is the first to ask for it.

        Only then memory of its own is taken, pinned if the arrays are on a device of CUDA.
        """
        if self._array is None:
            self._array = _staging(self._parts, self.size)
        return self._array

    @property
    def outline(self) -> NDArray[Any]:
        """An array that has only the type and the size of ``array``: all its elements are one, which nobody uses."""
        return np.ndarray(self.size, self.dtype, _NO_MEMORY, strides=(0,))

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The user's memory: the first address and the one behind the last, of each array."""
        if not self.staged:
            begin: int = self.array.__array_interface__["data"][0]
            return ((begin, begin + self.array.nbytes),) if self.size else ()
        return tuple((part.address, part.address + part.nbytes) for part in self._parts if part.nbytes)

    @property
    def buffer(self) -> DeviceBuffer | None:
        """Where the elements of ``array`` lie on a device of CUDA; None if they do not, or there are none."""
        if not self.staged:
            return None
        size = self.dtype.itemsize
        if len(self._parts) == 1:
            [part] = self._parts
            if part.place is None or not part.size:
                return None
            return DeviceBuffer((Segment(0, part.size, part.address),), part.place.device, part.place.owner, size)
        places = [part.place for part in self._parts if part.size and part.place is not None]
        if not places:
            return None
        segments, first = [], 0
        for block in range(self.blocks):
            for part in self._parts:
                elems = part.size // self.blocks
                if elems:
                    address = part.address + block * elems * size
                    segments.append(Segment(first, elems, address))
                first += elems
        owners = tuple(place.owner for place in places)
        return DeviceBuffer(tuple(segments), places[0].device, owners, size)

    @property
    def streams(self) -> set[tuple[int, int]]:
        """The devices and streams of CUDA that copies of this memory are ordered after."""
        return {(part.place.device, part.place.stream) for part in self._parts if part.size and part.place is not None}

    @property
    def cut(self) -> tuple[int, ...]:
        """The elements that each array of a list has in a block; the same on all ranks of a call that fits together."""
        return tuple(part.size // self.blocks for part in self._parts)

    def load(self, deadline_ns: int | None = None) -> None:
        """Copy the user's values into a staging array; nothing to do for a view.

        Raises
        ------
        DeadlineMissed
            If a device has not done what the caller queued on it, by ``deadline_ns`` of the monotonic clock.
        """
        if not self.staged or self._copied_now(False, deadline_ns):
            return
        for part, piece in self._pieces():
            if self.blocks == 1:
                part.load(piece[0])
                continue
            whole = np.empty(part.size, part.dtype)
            part.load(whole)
            piece[:] = whole.reshape(piece.shape)

    def store(self, deadline_ns: int | None = None) -> None:
        """Copy a staging array back into the user's memory; nothing to do for a view.

        Raises
        ------
        UsageError
            If it was bound read-only.
        DeadlineMissed
            As for `load`.
        """
        if not self.writable:
            raise UsageError("store() of a buffer that was bound with writable=False")
        if not self.staged or self._copied_now(True, deadline_ns):
            return
        for part, piece in self._pieces():
            part.store(piece[0] if self.blocks == 1 else np.ascontiguousarray(piece).reshape(-1))

    def _copied_now(self, to_device: bool, deadline_ns: int | None) -> bool:
        """Copy to or from a device of CUDA if the memory is there, and return whether it is."""
        buffer = self.buffer
        if buffer is None:
            return False
        for device, stream in self.streams:
            Gate(driver(), device, stream).wait(_LONGEST_NS if deadline_ns is None else deadline_ns)
        copy_now(buffer, self.array, to_device=to_device)
        return True

    def _pieces(self) -> list[tuple[Part, NDArray[Any]]]:
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
            # The usual case, which small calls should not pay for.
            return Bound(x.ravel(), x.dtype, x.size, "cpu", False, True, ())
    if isinstance(x, Joined):
        parts, blocks = _listed(x.arrays, name, writable), 1
    elif isinstance(x, list | tuple):
        parts = _listed(x, name, writable)
    else:
        parts = (_part(x, name, writable),)
    first = leader_of(parts)
    if len(parts) == 1 and first.host is not None and not copied:
        array = first.host.view()
        array.flags.writeable = writable
        return Bound(array, first.dtype, first.size, first.device, False, writable, parts)
    size = sum(part.size for part in parts)
    if len(parts) == 1:
        return Bound(None, first.dtype, size, first.device, True, writable, parts)
    for part in parts:
        if part.size % blocks:
            raise UsageError(f"{part.name} has {part.size} elements; expected a multiple of {blocks}, a block a rank")
    return Bound(None, first.dtype, size, first.device, True, writable, parts, blocks)


def _listed(arrays: Sequence[Any], name: str, writable: bool) -> tuple[Part, ...]:
    """Return the arrays of a list, checked also against each other."""
    if not arrays:
        raise UsageError(f"{name}={arrays!r} is empty; expected at least one array")
    parts = tuple(_part(item, f"{name}[{index}]", writable) for index, item in enumerate(arrays))
    check_together(parts)
    if writable:
        check_apart(parts)
    return parts


def _staging(parts: Sequence[Part], elems: int) -> NDArray[Any]:
    """Return memory for the elements of ``parts``, pinned if they are on a device of CUDA."""
    place, dtype = leader_of(parts).place, parts[0].dtype
    if place is None or not elems:
        return np.empty(elems, dtype)
    return pinned_memory(elems * dtype.itemsize, place.device).view(dtype)


def _part(x: Any, name: str, writable: bool) -> Part:
    if isinstance(x, np.ndarray):
        return numpy_part(x, name, writable)
    if isinstance(x, Pieces):
        return Part(name, x.dtype, x.shape[0], "cpu", *x.span(), None, x.load, x.store)
    if _is_instance(x, "torch", "Tensor"):
        return any_torch_part(x, name, writable)
    if _is_instance(x, "cupy", "ndarray"):
        return cupy_part(x, name)
    if isinstance(x, bool | int | float | complex | np.generic):
        raise UsageError(f"{name}={x!r} is a scalar; expected {_EXPECTED}. Wrap it: numpy.array({x!r})")
    if isinstance(x, list | tuple):
        raise UsageError(f"{name} is a {type(x).__name__} inside a list; expected one flat list of arrays")
    if not isinstance(x, type):
        if hasattr(x, "__cuda_array_interface__"):
            return cuda_interface_part(x, name, writable)
        if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
            return dlpack_part(x, name, writable)
    raise UsageError(f"{name} is a {type(x).__name__}; expected {_EXPECTED}")


def _is_instance(x: object, module: str, kind: str) -> bool:
    """Tell whether ``x`` is of a type of a module that is loaded."""
    loaded = getattr(sys.modules.get(module), kind, None)
    return isinstance(loaded, type) and isinstance(x, loaded)
