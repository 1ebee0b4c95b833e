"""Several arrays, or host arrays with gaps, that a call sees as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


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


@dataclass(frozen=True, slots=True)
class Joined:
    """Arrays that a call sees as one flat array, one after another.

    ``arrays`` : what `bind` takes, of one type and on one device; where the result is written, they do not overlap.
    """

    arrays: Sequence[Any]

    @property
    def shape(self) -> tuple[int]:
        """The number of elements of all arrays."""
        return (sum(math.prod(array.shape) for array in self.arrays),)
