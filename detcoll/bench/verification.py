"""Values that name themselves, and what a collective must make of them.

Element j of rank r is ``j mod m + r mod 2``. The modulus m is as large as the element type allows, so that a chunk
that landed in the wrong place, twice or not at all shows, while every sum stays exact whatever the order of summation.
A complex number has that as real part, and its opposite as imaginary part.

Of bool, element j of rank r is a coin that was tossed for j + r, and the sum is the exclusive or, a sum modulo 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import TransportError
from detcoll.plan import Run, Symbols
from detcoll.types import BFLOAT16, ReduceOp, is_complex, is_integer

LARGEST_MODULUS = 8191
BLOCK_ELEMS = 2**18
"""Few enough to stay in the processor's cache."""
KEPT_BLOCKS = 64

_COINS: NDArray[np.bool_] = np.random.default_rng(1).integers(0, 2, LARGEST_MODULUS).astype(bool)


def reduction_of(dtype: np.dtype[Any]) -> ReduceOp:
    """Return the operation that sums."""
    return ReduceOp.BXOR if dtype.kind == "b" else ReduceOp.SUM


def exact_limit(dtype: np.dtype[Any]) -> int:
    """Return the largest whole number up to which ``dtype`` holds every one."""
    if dtype.kind == "b":
        return 1
    if is_integer(dtype):
        return int(np.iinfo(dtype).max)
    return 2**8 if dtype == BFLOAT16 else 2 ** (int(np.finfo(dtype).nmant) + 1)


def modulus(dtype: np.dtype[Any], size: int) -> int:
    """Return m such that the sum over ``size`` ranks is exact."""
    return max(1, min(LARGEST_MODULUS, exact_limit(dtype) // size))


@dataclass(frozen=True, slots=True)
class Repeated:
    """An array of values that repeat, kept as one block of whole periods: arrays of many GiB are held once this way."""

    block: NDArray[Any]

    def write(self, array: NDArray[Any]) -> None:
        """Give ``array`` the values."""
        for part, values in self._parts(array):
            part[:] = values

    def require(self, array: NDArray[Any], what: str) -> None:
        """Compare bit for bit, a block at a time.

        Raises
        ------
        TransportError
            If an element differs; names it, its value and the one expected.
        """
        for number, (part, values) in enumerate(self._parts(array)):
            _require_equal(part, values, what, number * self.block.size)

    def _parts(self, array: NDArray[Any]) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        for start in range(0, array.size, self.block.size):
            part = array[start : start + self.block.size]
            yield part, self.block[: part.size]


@dataclass(frozen=True, slots=True)
class Contents:
    """What an array holds: runs of elements of one rank, or of a sum over ranks, as a declaration states them.

    Of each run ``runs`` has the ranks, the number of its first element, and its length.
    """

    dtype: np.dtype[Any]
    size: int
    runs: tuple[tuple[tuple[int, ...], int, int], ...]

    @classmethod
    def stated(cls, dtype: np.dtype[Any], size: int, symbols: Symbols, runs: Sequence[Run]) -> Contents:
        """Return the contents that a declaration states."""
        found = ((tuple(symbols.ranks_in(run.expression)), run.element, run.length) for run in runs)
        return cls(dtype, size, tuple(found))

    def write(self, array: NDArray[Any]) -> None:
        """Give ``array`` the values."""
        for part, values in self._parts(array):
            values.write(part)

    def require(self, array: NDArray[Any], what: str) -> None:
        """Compare bit for bit; see `Repeated.require`."""
        for number, (part, values) in enumerate(self._parts(array)):
            values.require(part, what if len(self.runs) == 1 else f"{what}, block {number}")

    def _parts(self, array: NDArray[Any]) -> Iterator[tuple[NDArray[Any], Repeated]]:
        begin = 0
        for ranks, first, length in self.runs:
            yield array[begin : begin + length], _kept(self.dtype, ranks, self.size, first)
            begin += length


@lru_cache(KEPT_BLOCKS)
def _kept(dtype: np.dtype[Any], ranks: tuple[int, ...], size: int, first: int) -> Repeated:
    """Return the same as `summed`: every call writes and compares it, and to make it takes longer than a small call."""
    return summed(dtype, ranks, size, first)


def given(dtype: np.dtype[Any], rank: int, size: int) -> Repeated:
    """Return the values of ``rank``."""
    return summed(dtype, [rank], size)


def summed(dtype: np.dtype[Any], ranks: Sequence[int], size: int, first: int = 0) -> Repeated:
    """Return the sum of the values of ``ranks``, of ``size`` in all, from element number ``first`` on.

    See `reduction_of` for types that have no sum.
    """
    if dtype.kind == "b":
        tossed = np.logical_xor.reduce([np.roll(_COINS, -(rank + first) % LARGEST_MODULUS) for rank in ranks])
        return Repeated(np.tile(tossed, BLOCK_ELEMS // LARGEST_MODULUS))
    odd = sum(rank % 2 for rank in ranks)
    numbers = np.roll(_pattern(dtype, size), -(first % modulus(dtype, size))) * len(ranks) + odd
    block = numbers.astype(dtype)
    if is_complex(dtype):
        block.imag = -numbers
    return Repeated(block)


def fill(array: NDArray[Any], rank: int, size: int) -> None:
    """Give ``array`` the values of ``rank``."""
    given(array.dtype, rank, size).write(array)


def expected_all_reduce(elements: int, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
    """Return what an all-reduce with `reduction_of` leaves on every rank."""
    return _whole(summed(dtype, range(size), size), elements)


def expected_broadcast(elements: int, dtype: np.dtype[Any], size: int, root: int) -> NDArray[Any]:
    """Return what a broadcast from ``root`` leaves on every rank."""
    return _whole(given(dtype, root, size), elements)


def require_equal(seen: NDArray[Any], expected: NDArray[Any], what: str) -> None:
    """Compare bit for bit.

    Raises
    ------
    TransportError
        If an element differs; names it, its value and the one expected.
    """
    _require_equal(seen, expected, what, 0)


def _require_equal(seen: NDArray[Any], expected: NDArray[Any], what: str, first: int) -> None:
    width = min(seen.itemsize, 8)
    differs = seen.view(f"u{width}") != expected.view(f"u{width}")
    if not differs.any():
        return
    wrong = int(np.flatnonzero(differs)[0]) // (seen.itemsize // width)
    raise TransportError(f"{what}: element {first + wrong} is {seen[wrong]}, expected {expected[wrong]}")


def _whole(values: Repeated, elements: int) -> NDArray[Any]:
    array = np.empty(elements, values.block.dtype)
    values.write(array)
    return array


def _pattern(dtype: np.dtype[Any], size: int) -> NDArray[np.int64]:
    """Return some whole periods."""
    period = modulus(dtype, size)
    return np.arange(period * max(1, BLOCK_ELEMS // period), dtype=np.int64) % period
