"""Values that name themselves, and what a collective must make of them.

Element j of rank r is ``j mod m + r mod 2``. The modulus m is as large as the element type allows, so that a chunk
that landed in the wrong place, twice or not at all shows, while every sum stays exact whatever the order of summation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import TransportError
from detcoll.types import BFLOAT16, is_integer

LARGEST_MODULUS = 8191


def exact_limit(dtype: np.dtype[Any]) -> int:
    """Return the largest whole number up to which ``dtype`` holds every one."""
    if is_integer(dtype):
        return int(np.iinfo(dtype).max)
    return 2**8 if dtype == BFLOAT16 else 2 ** (int(np.finfo(dtype).nmant) + 1)


def modulus(dtype: np.dtype[Any], size: int) -> int:
    """Return m such that the sum over ``size`` ranks is exact."""
    return max(1, min(LARGEST_MODULUS, exact_limit(dtype) // size))


def fill(array: NDArray[Any], rank: int, size: int) -> None:
    """Give ``array`` the values of ``rank``."""
    array[:] = _pattern(array.size, array.dtype, size) + rank % 2


def expected_all_reduce(elements: int, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
    """Return what an all-reduce with ``sum`` leaves on every rank."""
    return (_pattern(elements, dtype, size) * size + size // 2).astype(dtype)


def expected_broadcast(elements: int, dtype: np.dtype[Any], size: int, root: int) -> NDArray[Any]:
    """Return what a broadcast from ``root`` leaves on every rank."""
    return (_pattern(elements, dtype, size) + root % 2).astype(dtype)


def require_equal(seen: NDArray[Any], expected: NDArray[Any], what: str) -> None:
    """Compare bit for bit.

    Raises
    ------
    TransportError
        If an element differs; names it, its value and the one expected.
    """
    bits = f"u{seen.itemsize}"
    if np.array_equal(seen.view(bits), expected.view(bits)):
        return
    wrong = int(np.flatnonzero(seen != expected)[0])
    raise TransportError(f"{what}: element {wrong} is {seen[wrong]}, expected {expected[wrong]}")


def _pattern(elements: int, dtype: np.dtype[Any], size: int) -> NDArray[np.int64]:
    return np.arange(elements, dtype=np.int64) % modulus(dtype, size)
