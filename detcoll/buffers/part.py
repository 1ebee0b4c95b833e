"""One array of the user, checked, and what every sort of array is checked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import UsageError
from detcoll.types import DTYPES

_TYPES = frozenset(DTYPES.values())


class Place(NamedTuple):
    """Where an array of CUDA is: its device, address, and the stream of the caller; ``owner`` keeps it alive."""

    device: int
    address: int
    stream: int
    owner: Any


@dataclass(frozen=True, slots=True)
class Part:
    """One array of the user, checked; ``host`` is a flat view of it unless it is staged.

    ``address``, ``nbytes`` : the user's memory; no bytes for memory that no other call has to wait for.
    ``load``, ``store`` : copy into and from a staging array.  ``place`` : of an array on a CUDA device, where they do
    nothing: all of a call's arrays are copied together, see `Bound.buffer`.
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
    place: Place | None = None


def leader_of(parts: Sequence[Part]) -> Part:
    """Return the first array that has elements, whose device is known, or the first of all."""
    return next((part for part in parts if part.size), parts[0])


def check_together(parts: Sequence[Part]) -> None:
    """Raise UsageError unless the arrays of a list are of one type and on one device."""
    first = leader_of(parts)
    for part in parts:
        if part.dtype != first.dtype:
            raise UsageError(
                f"{part.name} has dtype {part.dtype}, {first.name} {first.dtype}; expected one dtype in a list"
            )
        if part.device != first.device and part.size:
            raise UsageError(f"{part.name} is on {part.device}, {first.name} on {first.device}; expected one device")


def check_apart(parts: Sequence[Part]) -> None:
    """Raise UsageError if arrays of a list that results are written to share memory."""
    # The bytes of arrays with gaps may lie between each other's.
    whole = [part for part in parts if part.nbytes and part.nbytes == part.size * part.dtype.itemsize]
    for low, high in pairwise(sorted(whole, key=lambda part: part.address)):
        if low.address + low.nbytes > high.address:
            raise UsageError(f"{low.name} and {high.name} share memory; expected arrays that do not overlap in a list")


def check_dtype(dtype: np.dtype[Any], name: str) -> None:
    """Raise UsageError unless detcoll takes elements of ``dtype``."""
    if dtype not in _TYPES:
        order = "" if dtype.isnative else " in foreign byte order"
        raise UsageError(f"{name} has dtype {dtype}{order}; expected one of {', '.join(DTYPES)} in native byte order")


def not_contiguous(name: str, shape: object, strides: object, hint: str) -> UsageError:
    """Return the error of an array with gaps; ``hint`` : what to pass instead."""
    return UsageError(
        f"{name} is not C-contiguous (shape {tuple(shape)}, strides {tuple(strides)}); "  # type: ignore[arg-type]
        f"expected C order without gaps. Pass {hint} and copy the result back"
    )
