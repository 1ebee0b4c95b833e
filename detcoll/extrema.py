"""Reductions in a form in which libraries do them right: floats as integers, bool as bytes, complex numbers as floats.

MPI and Gloo compare floats by ``<``, which is false for NaN, so that a NaN wins or loses by where it stands, and ranks
may end with different results. Integers have no such value. The bits of a float, read as an integer whose lower bits
are inverted where the sign is set, are ordered as the floats are, with -0 below +0 and every NaN beyond the infinity
of its sign. So NaNs get the sign that puts them beyond all numbers, and the library's integer minimum or maximum does
the rest. Integers are compared exactly: whatever the library's order of folding, all ranks get the same bits.

What comes out: NaN where any rank has one; of zeros of different sign, -0 by ``min`` and +0 by ``max``. A NaN's sign
and payload are not promised.

Other types need another form since a library may not know them: bool goes as uint8, whose minimum, maximum and bitwise
operations are those of 0 and 1. A sum of complex numbers is one of floats, twice as many. Their product has no such
form.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.types import ReduceOp, is_complex, is_float, real_dtype

BLOCK_ELEMS = 2**14
"""Elements that are turned at a time, so that what is in between stays in cache."""


@contextmanager
def comparable(op: ReduceOp, array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Show ``array`` in a form in which a library's own reduction gives the promised result.

    Parameters
    ----------
    op : ReduceOp
        The reduction that the library is about to do.
    array : array, (n,), contiguous, writable
        What this rank gives, of any type but 16-bit floats. While the context lasts, and in a minimum or maximum of
        floats, its memory holds integers; afterwards it holds the result as floats, also where the body raised.

    Yields
    ------
    array, (n,) or (2 n,)
        The same memory: signed integers of the same size for a minimum or maximum of floats, uint8 for bool, the real
        and imaginary parts in turn for a sum of complex numbers, else ``array`` itself.
    """
    if not (op in (ReduceOp.MIN, ReduceOp.MAX) and is_float(array.dtype)):
        yield _plain(op, array)
        return
    keys = array.view(f"i{array.itemsize}")
    _place_nans(op, array, keys)
    _turn(keys)
    try:
        yield keys
    finally:
        _turn(keys)


def _plain(op: ReduceOp, array: NDArray[Any]) -> NDArray[Any]:
    """Return the memory of ``array`` as a type that libraries know, if there is one."""
    if array.dtype.kind == "b":
        return array.view(np.uint8)
    if is_complex(array.dtype) and op is not ReduceOp.PROD:
        return array.view(real_dtype(array.dtype))
    return array


def _place_nans(op: ReduceOp, array: NDArray[Any], keys: NDArray[Any]) -> None:
    """Give NaNs the sign with which they win."""
    lowest = np.iinfo(keys.dtype).min
    for start in range(0, array.size, BLOCK_ELEMS):
        block = slice(start, start + BLOCK_ELEMS)
        missing = np.isnan(array[block])
        if missing.any():
            signed = keys[block][missing] | lowest
            keys[block][missing] = signed if op is ReduceOp.MIN else signed ^ lowest


def _turn(keys: NDArray[Any]) -> None:
    """Turn bits of floats into integers of the same order, or back."""
    bits, rest = keys.itemsize * 8 - 1, np.iinfo(keys.dtype).max
    scratch = np.empty(min(keys.size, BLOCK_ELEMS), keys.dtype)
    for start in range(0, keys.size, BLOCK_ELEMS):
        part = keys[start : start + BLOCK_ELEMS]
        mask = np.right_shift(part, bits, out=scratch[: part.size])  # all ones where the sign is set
        np.bitwise_and(mask, rest, out=mask)
        np.bitwise_xor(part, mask, out=part)
