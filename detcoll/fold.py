"""Folds: every reduction of arrays in the house happens here.

A fold takes contributions in a fixed order and combines them from the left, ``((in0 op in1) op in2) ...``, so that
the result depends on the order and never on length, alignment, blocking or who folds. What each type does:

- float32, float64: in themselves, as IEEE 754 says. ``avg`` is a true division, once.
- float16, bfloat16: in float32, rounded once where the output is a 16-bit type. A float32 output keeps the
  accumulator for a later fold of the same level. Both 16-bit types can be mixed with float32, never with each other.
- integers: in themselves, wrapping around silently. They have no average.

``min`` and ``max`` propagate NaN. Of two equal zeros of different sign they give what NumPy's ``minimum`` and
``maximum`` give on that processor: the later operand on x86. NaN payloads are not promised.

Nothing warns: floating-point events are silenced (0.9 us a call, floats only, since an 8-byte fold should stay small).
What needs other memory than the output's is done in blocks of scratch memory that stay in cache; a plain fold of
native types is not, since NumPy over the whole array was measured to be as fast.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import UsageError
from detcoll.types import DTYPES, ReduceOp, accumulation_dtype, is_half, is_integer

_UFUNCS: dict[ReduceOp, np.ufunc] = {
    ReduceOp.SUM: np.add,
    ReduceOp.AVG: np.add,
    ReduceOp.MIN: np.minimum,
    ReduceOp.MAX: np.maximum,
    ReduceOp.PROD: np.multiply,
}
_FLOAT32: np.dtype[Any] = np.dtype(np.float32)
_NATIVE = frozenset(dtype for dtype in DTYPES.values() if not is_half(dtype))

BLOCK_BYTES = 256 * 1024
"""Size of a scratch block. Two of them fit a second-level cache; smaller ones pay more calls than they save misses."""


class _Scratch(threading.local):
    """Two blocks of memory for each thread."""

    def __init__(self) -> None:
        self.first = np.empty(BLOCK_BYTES, np.uint8)
        self.second = np.empty(BLOCK_BYTES, np.uint8)


_scratch = _Scratch()


def fold(op: ReduceOp, inputs: Sequence[NDArray[Any]], out: NDArray[Any], divisor: int | None = None) -> None:
    """Combine ``inputs`` from the left into ``out``.

    Parameters
    ----------
    op : ReduceOp
        The reduction; AVG adds, and divides only where ``divisor`` is given.
    inputs : sequence of arrays, (n,), at least one
        Contributions in the promised order, of the type of ``out``, or float32 and one 16-bit float type.
    out : array, (n,), writable
        Where the result goes. It may be exactly the memory of one or more inputs, whichever they are. Overlap in any
        other way is refused, or harmless (one or two inputs of a native type).
    divisor : int, optional
        What the result is divided by before it is rounded. Only the last fold of an average gives it.

    Raises
    ------
    UsageError
        If shapes or types do not fit together, if ``divisor`` is given for anything but an average of floats, or if
        ``out`` overlaps an input in part. ``out`` is untouched then.

    Guarantees
    ----------
    The bits of the result depend on the order and values of the inputs alone (NaN payloads aside).
    """
    mixed = _check(op, inputs, out, divisor)
    if mixed or out.dtype not in _NATIVE:
        _check_half(inputs, out)
    if is_integer(out.dtype):
        _fold(_UFUNCS[op], inputs, out, None)
        return
    with np.errstate(all="ignore"):
        _fold(_UFUNCS[op], inputs, out, divisor)


def fold_groups(
    op: ReduceOp,
    inputs: Sequence[NDArray[Any]],
    groups: Sequence[Sequence[int]],
    out: NDArray[Any],
    rooms: Sequence[NDArray[Any]],
    divisor: int | None = None,
) -> None:
    """Combine the ``inputs`` of each group from the left, then the groups from the left, into ``out``.

    Parameters
    ----------
    op : ReduceOp
        The reduction.
    inputs : sequence of arrays, (n,), all of the type of ``out``
        Contributions by rank.
    groups : sequence of sequences of int
        The ranks of each site, in fold order.
    out : array, (n,), writable
        Where the result goes; see `fold`.
    rooms : sequence of arrays, (n,), of the type of ``out``
        One for each group, for its sum where it has more than one rank; unused with one group.
    divisor : int, optional
        What the result is divided by before its last rounding.

    Guarantees
    ----------
    The bits are those of `reference`: each level rounds once.
    """
    if len(groups) == 1:
        fold(op, [inputs[rank] for rank in groups[0]], out, divisor)
        return
    sums = []
    for group, room in zip(groups, rooms, strict=True):
        if len(group) == 1:
            sums.append(inputs[group[0]])
        else:
            fold(op, [inputs[rank] for rank in group], room)
            sums.append(room)
    fold(op, sums, out, divisor)


def reference(
    op: ReduceOp, contributions: Sequence[NDArray[Any]], groups: Sequence[Sequence[int]], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Return the promised result of an all-reduce, worked out plainly: the oracle for tests and acceptance runs.

    Parameters
    ----------
    op : ReduceOp
        The reduction.
    contributions : sequence of arrays, (n,), ``dtype``
        What each rank gives, by rank.
    groups : sequence of sequences of ranks
        The ranks of each site, in fold order. One group is one level; several are two, and each level rounds once.
    dtype : numpy.dtype
        One of `DTYPES`.

    Returns
    -------
    array, (n,), ``dtype``
        The ranks of a group folded in order, then the groups in order; an average is divided once, after the last
        fold and before its rounding.
    """
    if op is ReduceOp.AVG and is_integer(dtype):
        raise UsageError(f"op='avg' of {dtype} is not defined; expected a float type")
    wide = accumulation_dtype(dtype)
    ranks = sum(len(group) for group in groups)
    with np.errstate(all="ignore"):
        level = [[contributions[rank] for rank in group] for group in groups]
        while len(level) > 1:
            level = [[_plain(op, group, wide).astype(dtype) for group in level]]
        result = _plain(op, level[0], wide)
        if op is ReduceOp.AVG:
            result = result / wide.type(ranks)
        return result.astype(dtype)


def _plain(op: ReduceOp, arrays: Sequence[NDArray[Any]], wide: np.dtype[Any]) -> NDArray[Any]:
    total = arrays[0].astype(wide)
    for array in arrays[1:]:
        term = array.astype(wide)
        if op is ReduceOp.MIN:
            total = np.where((total < term) | (total != total), total, term)  # a NaN is unequal to itself
        elif op is ReduceOp.MAX:
            total = np.where((total > term) | (total != total), total, term)
        else:
            total = total * term if op is ReduceOp.PROD else total + term
    return total


def _check(op: ReduceOp, inputs: Sequence[NDArray[Any]], out: NDArray[Any], divisor: int | None) -> bool:
    """Raise UsageError for what no fold takes; True if an input has another type than ``out``."""
    shape, dtype, mixed = out.shape, out.dtype, False
    if len(shape) != 1 or not inputs:
        raise UsageError(f"a fold takes one-dimensional arrays and at least one input; got {len(inputs)} and {shape}")
    for array in inputs:
        if array.shape != shape:
            raise UsageError(f"inputs have shape {array.shape}; expected that of out, {shape}")
        mixed = mixed or array.dtype != dtype
    if op is ReduceOp.AVG and is_integer(dtype):
        raise UsageError(f"op='avg' of {dtype} is not defined; expected a float type")
    if divisor is not None and (op is not ReduceOp.AVG or divisor < 1):
        raise UsageError(f"divisor={divisor} with op={op.value!r}; expected a positive number and 'avg'")
    return mixed


def _check_half(inputs: Sequence[NDArray[Any]], out: NDArray[Any]) -> None:
    """Allow one 16-bit float type, with or without float32, and nothing else."""
    kinds = {array.dtype for array in (*inputs, out)} - {_FLOAT32}
    if len(kinds) != 1 or not is_half(*kinds):
        names = ", ".join(str(array.dtype) for array in inputs)
        raise UsageError(f"a fold of {names} into {out.dtype} is not defined; expected one type of {', '.join(DTYPES)}")


def _fold(ufunc: np.ufunc, inputs: Sequence[NDArray[Any]], out: NDArray[Any], divisor: int | None) -> None:
    if divisor is None:
        if len(inputs) == 1:
            np.copyto(out, inputs[0], casting="unsafe")
            return
        # NumPy reads both operands before it writes, however they overlap: one call, no copies, no checks.
        if len(inputs) == 2 and out.dtype in _NATIVE and inputs[0].dtype == inputs[1].dtype == out.dtype:
            ufunc(inputs[0], inputs[1], out=out)
            return
    in_place = _may_accumulate_in(out, inputs)
    wide = accumulation_dtype(out.dtype)
    first, second = _scratch.first.view(wide), _scratch.second.view(wide)
    whole = in_place and all(array.dtype == wide for array in inputs)
    step = max(out.size, 1) if whole else first.size
    for start in range(0, out.size, step):
        block = slice(start, min(start + step, out.size))
        target = out[block]
        total = target if in_place else first[: target.size]
        _fold_block(ufunc, [array[block] for array in inputs], total, first, second, divisor)
        if not in_place:
            np.copyto(target, total, casting="unsafe")


def _fold_block(
    ufunc: np.ufunc,
    inputs: Sequence[NDArray[Any]],
    total: NDArray[Any],
    first: NDArray[Any],
    second: NDArray[Any],
    divisor: int | None,
) -> None:
    left = _widened(inputs[0], first)
    for array in inputs[1:]:
        left = ufunc(left, _widened(array, second), out=total)
    if divisor is not None:
        np.divide(left, total.dtype.type(divisor), out=total)


def _widened(array: NDArray[Any], scratch: NDArray[Any]) -> NDArray[Any]:
    """Return ``array`` if it already has the type of ``scratch``, else its values in ``scratch``."""
    if array.dtype == scratch.dtype:
        return array
    wide = scratch[: array.size]
    np.copyto(wide, array)
    return wide


def _may_accumulate_in(out: NDArray[Any], inputs: Sequence[NDArray[Any]]) -> bool:
    """Tell whether ``out`` can hold the accumulator: it has its type and is no input that is still to be read."""
    possible = out.dtype == accumulation_dtype(out.dtype)
    for index, array in enumerate(inputs):
        if np.may_share_memory(array, out):
            if array.dtype != out.dtype or array.strides != out.strides or _address(array) != _address(out):
                raise UsageError(f"out overlaps input {index}; expected apart or exactly the same memory")
            possible = possible and index < 2
    return possible


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
