"""Values with which reductions go wrong silently, and what must come out of them.

`edge_values` gives what each rank contributes: numbers near the largest, NaN on one rank, zeros of both signs, numbers
close to zero. `require` holds a result against the oracle, `detcoll.fold.reference`, and an average also against the
true mean, so that a mistake which both share is seen. `varied` and `whole_numbers` give ordinary values of any type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from detcoll.errors import UsageError
from detcoll.fold import reference
from detcoll.types import (
    DTYPES,
    ReduceOp,
    accumulation_dtype,
    is_complex,
    is_float,
    is_half,
    is_integer,
    operators_of,
    real_dtype,
)

FLOATS = tuple(name for name, dtype in DTYPES.items() if is_float(dtype))
EDGE_OPS = (ReduceOp.AVG, ReduceOp.MIN, ReduceOp.MAX)
EDGE_COUNTS = (1, 37, 100_003)
TYPE_SHAPES: tuple[tuple[int, ...], ...] = ((0,), (), (3, 167))


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


def whole_numbers(rank: int, count: int, op: ReduceOp, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return what ``rank`` gives: small whole numbers, with which ``op`` is exact in any order and element type.

    They name the rank and the position they come from, so that a wrong chunk names itself.
    """
    positions = np.arange(count)
    if is_complex(dtype):
        turns = np.array([1, 1j, -1, -1j])[(positions + rank) % 4]
        return np.asarray(turns * (1 + (positions + rank) % 5 // 4 if op is ReduceOp.PROD else positions % 7)).astype(
            dtype
        )
    if op is ReduceOp.PROD:
        return np.asarray(1 + (positions + rank) % 5 // 4).astype(dtype)
    values = (positions * 3 + rank * 5) % 11
    return np.asarray(values % 2 if dtype.kind == "b" else values).astype(dtype)


def reduced_whole_numbers(size: int, count: int, op: ReduceOp, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return what ``size`` ranks must get from `whole_numbers`, worked out in the widest types."""
    parts = np.stack([exact(whole_numbers(rank, count, op, dtype)) for rank in range(size)])
    fold: dict[ReduceOp, np.ufunc] = {
        ReduceOp.SUM: np.add,
        ReduceOp.AVG: np.add,
        ReduceOp.MIN: np.minimum,
        ReduceOp.MAX: np.maximum,
        ReduceOp.PROD: np.multiply,
        ReduceOp.BAND: np.bitwise_and,
        ReduceOp.BOR: np.bitwise_or,
        ReduceOp.BXOR: np.bitwise_xor,
    }
    result = fold[op].reduce(parts, axis=0)
    if op is not ReduceOp.AVG:
        return np.asarray(result.astype(dtype))
    real = real_dtype(accumulation_dtype(dtype))
    means = result.view(np.float64).astype(real) / real.type(size)
    return np.asarray(means.view(dtype) if is_complex(dtype) else means.astype(dtype))


def exact(array: NDArray[Any]) -> NDArray[Any]:
    """Return small whole numbers of any type in the widest type of their kind, in which results compare."""
    widest = {"b": "uint8", "i": "int64", "u": "int64", "c": "complex128"}
    return array.astype(widest.get(array.dtype.kind, "float64"))


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


def require_types(
    all_reduce: Callable[[NDArray[Any], ReduceOp], object], rank: int, groups: Sequence[Sequence[int]], *,
    ordered: bool, shapes: Sequence[tuple[int, ...]] = TYPE_SHAPES,
) -> None:  # fmt: skip
    """Have every type reduced in place by every operation that it has; the others must be refused, on every rank.

    Raises
    ------
    AssertionError
        At the first result that is wrong; bits are compared where the fold order is ``ordered``, else exact values.
    """
    size = sum(map(len, groups))
    for dtype, op, shape in product(DTYPES.values(), ReduceOp, shapes):
        count, what = prod(shape), f"{op.value} of {dtype} of shape {shape}, rank {rank}"
        if op not in operators_of(dtype):
            mine = np.ones(shape, dtype)
            with pytest.raises(UsageError):
                all_reduce(mine, op)
            assert (mine == 1).all(), what
            continue
        given = [varied(dtype, count, at) if ordered else whole_numbers(at, count, op, dtype) for at in range(size)]
        mine = given[rank].reshape(shape).copy()
        all_reduce(mine, op)
        if ordered:
            assert mine.tobytes() == reference(op, given, groups, dtype).tobytes(), what
        else:
            expected = reduced_whole_numbers(size, count, op, dtype)
            np.testing.assert_array_equal(exact(mine.reshape(-1)), exact(expected), what)


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
