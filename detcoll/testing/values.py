"""Values with which reductions go wrong silently, and what must come out of them.

`edge_values` gives what each rank contributes: numbers near the largest, NaN on one rank, zeros of both signs, numbers
close to zero. `require` holds a result against the oracle, `detcoll.fold.reference`, and an average also against the
true mean, so that a mistake which both share is seen. `varied` gives ordinary values of any type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from detcoll.fold import reference
from detcoll.types import DTYPES, ReduceOp, is_complex, is_float, is_half, is_integer

FLOATS = tuple(name for name, dtype in DTYPES.items() if is_float(dtype))
EDGE_OPS = (ReduceOp.AVG, ReduceOp.MIN, ReduceOp.MAX)
EDGE_COUNTS = (1, 37, 100_003)


def varied(dtype: np.dtype[Any], count: int, *seed: int) -> NDArray[Any]:
    """Return ``count`` random values of any type; in sums and products of floats of them, order and rounding show."""
    draw = np.random.default_rng([*seed, count])
    if is_integer(dtype):
        limits = np.iinfo(dtype)
        return draw.integers(limits.min, limits.max, count, dtype, endpoint=True)
    values = draw.standard_normal(2 * count) * 10
    if is_complex(dtype):
        return values.view(np.complex128).astype(dtype)
    return np.asarray(values[:count] > 0 if dtype.kind == "b" else values[:count].astype(dtype))


def edge_values(op: ReduceOp, dtype: np.dtype[Any], size: int, count: int) -> list[NDArray[Any]]:
    """Return what each of ``size`` ranks gives: (count,) of a float ``dtype``, with one case a position, in turn.

    Averages of float32 and float64 are spared sums that overflow, which depend on the order.
    """
    limits = ml_dtypes.finfo(dtype)
    largest, smallest = float(limits.max), float(limits.smallest_subnormal)
    large = largest if op is not ReduceOp.AVG or is_half(dtype) else largest / 2 / size
    position = np.arange(count)
    arrays = []
    for rank in range(size):
        sign = -1.0 if rank % 2 else 1.0
        cases: list[Any] = [
            large * 0.6, large, -large, sign * large, large / size * (rank + 1), (rank + 1) * smallest, sign * 0.0,
            sign * (rank + 1.5), np.where(position // 9 % size == rank, np.nan, rank + 1.0),
        ]  # fmt: skip
        values = np.choose(position % len(cases), cases).astype(np.float64)
        arrays.append(values.astype(dtype))
    return arrays


def require(
    op: ReduceOp, given: Sequence[NDArray[Any]], groups: Sequence[Sequence[int]], result: NDArray[Any], *, ordered: bool
) -> None:
    """Check what an all-reduce gave.

    Parameters
    ----------
    op : ReduceOp
        The reduction.
    given : sequence of arrays, (n,)
        What each rank contributed.
    groups : sequence of sequences of ranks
        The sites.
    result : array, (n,)
        What came out.
    ordered : bool
        Whether the promised fold order was kept: bits are compared then, payloads of NaN aside. Else values are, and
        averages may differ by roundings.

    Raises
    ------
    AssertionError
        At the first element that is wrong.
    """
    dtype = result.dtype
    what = f"{op.value} of {dtype} in groups {[list(group) for group in groups]}"
    expected = reference(op, given, groups, dtype)
    if ordered:
        np.testing.assert_array_equal(plain_bits(result), plain_bits(expected), what)
    if op is ReduceOp.AVG:
        _require_mean(given, result, what)
    else:
        np.testing.assert_array_equal(result.astype(np.float64), expected.astype(np.float64), what)


def require_edges(
    all_reduce: Callable[[NDArray[Any], ReduceOp], object], rank: int, groups: Sequence[Sequence[int]], *,
    ordered: bool, dtype_names: Sequence[str] = FLOATS, ops: Sequence[ReduceOp] = EDGE_OPS,
    counts: Sequence[int] = EDGE_COUNTS,
) -> None:  # fmt: skip
    """Have `edge_values` reduced in place by ``all_reduce``, on every rank, and hold the results against `require`."""
    size = sum(map(len, groups))
    for name in dtype_names:
        for op in ops:
            for count in counts:
                given = edge_values(op, DTYPES[name], size, count)
                mine = given[rank].copy()
                all_reduce(mine, op)
                require(op, given, groups, mine, ordered=ordered)


def plain_bits(array: NDArray[Any]) -> NDArray[Any]:
    """Return the bits of floats, with every NaN made the same."""
    plain = array.copy()
    plain[plain != plain] = np.nan
    return plain.view(f"u{plain.itemsize}")


def _require_mean(given: Sequence[NDArray[Any]], result: NDArray[Any], what: str) -> None:
    """Check that an average is the true mean, but for a rounding of its largest term at each of two levels."""
    limits = ml_dtypes.finfo(result.dtype)
    wide = np.stack([array.astype(np.longdouble) for array in given])
    mean = (wide / len(given)).sum(axis=0)
    slack = float(limits.eps) * len(given) ** (not is_half(result.dtype)) * np.abs(wide).max(axis=0)
    wrong = ~(np.abs(result.astype(np.longdouble) - mean) <= slack + float(limits.smallest_subnormal))
    wrong &= ~(np.isnan(mean) & np.isnan(result.astype(np.longdouble)))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise AssertionError(f"{what}: element {at} is {result[at]}, the mean of {[array[at] for array in given]}")
