"""Folds: every reduction of arrays in the house happens here.

A fold takes contributions in a fixed order and combines them from the left, ``((in0 op in1) op in2) ...``, so that
the result depends on the order and never on length, alignment, blocking or who folds. What each type does:

- float32, float64: in themselves, as IEEE 754 says. ``avg`` is a true division of the sum, once; a sum beyond the
  largest number is infinite, and so is its average.
- float16, bfloat16: in float32, rounded once where the output is a 16-bit type. A float32 output keeps the
  accumulator for a later fold of the same level. Both 16-bit types can be mixed with float32, never with each other.
- integers: in themselves, wrapping around silently. They have no average.
- bool: ``min`` and ``band`` are and, ``max`` and ``bor`` are or, ``bxor`` is exclusive or.
- complex64, complex128: in themselves. Sums add the parts, an average divides each part of the sum, once. A product is
  ``(ar br - ai bi) + (ar bi + ai br) i``, each operation rounded by itself. NumPy's own product is not used: it fuses
  some operations where the processor and the place of the arrays in memory let it, and so changes its last bits.

An all-reduce folds in levels: a level takes values of the array's own type and ends with such a value, so a 16-bit
float is rounded once a level. The ranks of a site are one level. Its results, one a site, are the next. With one site
there is one level. How steps divide a level (a ring takes one step a site) changes no bit.

An average of 16-bit floats is a mean at each level, since a mean has the range of what it is made from, and a sum has
not: a level adds ``m_i * n_i`` in float32, where n_i ranks stand behind the value m_i, then divides by the sum of all
n_i, then rounds. Inside a site every n_i is 1. Nothing overflows on the way: sums of float16 stay far below the
largest float32. bfloat16 reaches as far as float32 does, so its terms are scaled by the largest power of two that is
at most 1 / (number of ranks); that is exact, with up to 65,536 ranks also for subnormal numbers.

``min`` and ``max`` propagate NaN. Of two equal zeros of different sign they give what NumPy's ``minimum`` and
``maximum`` give on that processor: the later operand on x86. NaN payloads are not promised.

Nothing warns: floating-point events are silenced. `numpy.errstate` takes 1 us, so only for floats; the prepared context
of `folder` takes nothing.
What needs other memory than the output's is done in blocks of scratch memory that stay in cache; a plain fold of
native types is not, since NumPy over the whole array was measured to be as fast.
"""

from __future__ import annotations

import contextvars
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import UsageError
from detcoll.types import (
    BFLOAT16,
    DTYPES,
    ReduceOp,
    accumulation_dtype,
    check_op,
    is_complex,
    is_half,
    real_dtype,
)

_UFUNCS: dict[ReduceOp, np.ufunc] = {
    ReduceOp.SUM: np.add,
    ReduceOp.AVG: np.add,
    ReduceOp.MIN: np.minimum,
    ReduceOp.MAX: np.maximum,
    ReduceOp.PROD: np.multiply,
    ReduceOp.BAND: np.bitwise_and,
    ReduceOp.BOR: np.bitwise_or,
    ReduceOp.BXOR: np.bitwise_xor,
}
_FLOAT32: np.dtype[Any] = np.dtype(np.float32)
_NATIVE = frozenset(dtype for dtype in DTYPES.values() if not is_half(dtype))

BLOCK_BYTES = 256 * 1024
"""Size of a scratch block. Two of them fit a second-level cache; smaller ones pay more calls than they save misses."""


class _Scratch(threading.local):
    """Blocks of memory for each thread; ``parts`` holds real and imaginary parts of a product.

    ``quietly`` : calls a function in a context in which NumPy warns of nothing; faster than `numpy.errstate`.
    """

    def __init__(self) -> None:
        context = contextvars.Context()
        context.run(np.seterr, all="ignore")
        self.quietly = context.run
        self.first = np.empty(BLOCK_BYTES, np.uint8)
        self.second = np.empty(BLOCK_BYTES, np.uint8)
        self.parts = np.empty(3 * BLOCK_BYTES // 2, np.uint8)


_scratch = _Scratch()


def fold(op: ReduceOp, inputs: Sequence[NDArray[Any]], out: NDArray[Any], divisor: int | None = None) -> None:
    """Combine ``inputs`` from the left into ``out``.

    Parameters
    ----------
    op : ReduceOp
        The reduction; AVG adds, and divides only where ``divisor`` is given. Averages of 16-bit floats are the business
        of `fold_step`.
    inputs : sequence of arrays, (n,), at least one
        Contributions in the promised order, of the type of ``out``, or float32 and one 16-bit float type.
    out : array, (n,), writable
        Where the result goes. It may be exactly the memory of one or more inputs, whichever they are. Overlap in any
        other way is refused, or harmless (one or two inputs of a native type).
    divisor : int, optional
        What the result is divided by. Only the last fold of an average gives it.

    Raises
    ------
    UsageError
        If shapes or types do not fit together, if the type does not have ``op``, if ``divisor`` is given for anything
        but an average of a native type, or if ``out`` overlaps an input in part. ``out`` is untouched then.

    Guarantees
    ----------
    The bits of the result depend on the order and values of the inputs alone (NaN payloads aside).
    """
    mixed = _check(op, inputs, out, divisor)
    if mixed or out.dtype not in _NATIVE:
        _check_half(inputs, out)
        if divisor is not None:
            raise UsageError(f"divisor={divisor} for {out.dtype}; 16-bit floats are averaged by fold_step")
    if out.dtype.kind in "iub":
        _fold(_UFUNCS[op], inputs, out, None)
        return
    with np.errstate(all="ignore"):
        if _is_complex_product(op, out.dtype):
            _fold_complex_product(inputs, out)
        else:
            _fold(_UFUNCS[op], inputs, out, divisor)


def fold_step(
    op: ReduceOp, inputs: Sequence[NDArray[Any]], ranks: Sequence[int], out: NDArray[Any], size: int, *, final: bool
) -> None:
    """Do one step of an all-reduce: combine ``inputs`` from the left into ``out``.

    Parameters
    ----------
    op : ReduceOp
        The reduction.
    inputs : sequence of arrays, (n,), at least one
        As for `fold`. In an average of 16-bit floats, a 16-bit input is a mean, and a float32 one the accumulator of an
        earlier step of the same level.
    ranks : sequence of int
        How many ranks stand behind each input.
    out : array, (n,), writable
        Where the result goes; see `fold`. In an average of 16-bit floats, a 16-bit output ends the level with a mean,
        and a float32 one leaves it open.
    size : int
        How many ranks the all-reduce has.
    final : bool
        Whether ``out`` is the result of the all-reduce. Only there are averages of other types divided.

    Raises
    ------
    UsageError
        As `fold`.

    Guarantees
    ----------
    Those of `fold`. A 16-bit average is right, one rounding a level aside, wherever the mean can be represented.
    """
    if len(inputs) == 1 and not final and inputs[0].dtype == out.dtype:  # a copy, also of kinds that reduce nothing
        np.copyto(out, inputs[0])
    elif op is not ReduceOp.AVG:
        fold(op, inputs, out)
    elif all(array.dtype in _NATIVE for array in (out, *inputs)):
        fold(op, inputs, out, size if final else None)
    elif len(inputs) == 1 and inputs[0].dtype == out.dtype:
        fold(op, inputs, out)
    else:
        _fold_means(inputs, ranks, out, size)


def widened(op: ReduceOp, array: NDArray[Any], size: int) -> NDArray[np.float32]:
    """Return a 16-bit ``array`` in float32, for a transport that reduces what all ``size`` ranks give by itself.

    The result is finished by ``fold_step(op, [total], [size], array, size, final=True)``, which divides an average.
    """
    wide = array.astype(np.float32)
    if op is ReduceOp.AVG and (scale := _scale(array.dtype, size)) != 1:
        np.multiply(wide, np.float32(scale), out=wide)
    return wide


def fold_groups(
    op: ReduceOp,
    inputs: Sequence[NDArray[Any]],
    groups: Sequence[Sequence[int]],
    out: NDArray[Any],
    rooms: Sequence[NDArray[Any]],
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
        One for each group, for its result where it has more than one rank; unused with one group.

    Guarantees
    ----------
    The bits are those of `reference`: each level rounds once.
    """
    if len(groups) == 1:
        group = groups[0]
        fold_step(op, [inputs[rank] for rank in group], (1,) * len(group), out, len(group), final=True)
        return
    ranks = [len(group) for group in groups]
    size = sum(ranks)
    results = []
    for group, room in zip(groups, rooms, strict=True):
        if len(group) == 1:
            results.append(inputs[group[0]])
        else:
            fold_step(op, [inputs[rank] for rank in group], (1,) * len(group), room, size, final=False)
            results.append(room)
    fold_step(op, results, ranks, out, size, final=True)


Folder = Callable[[Sequence[NDArray[Any]], NDArray[Any], Sequence[NDArray[Any]]], None]
"""Takes ``inputs``, ``out`` and ``rooms`` of `fold_groups`."""


def folder(op: ReduceOp, groups: Sequence[Sequence[int]], dtype: np.dtype[Any]) -> Folder:
    """Return what does `fold_groups` with arrays of this type, for callers that have checked them.

    The fold of two small arrays takes less time than its checks.
    """
    if sum(map(len, groups)) != 2 or op is ReduceOp.AVG or dtype not in _NATIVE or _is_complex_product(op, dtype):
        return lambda inputs, out, rooms: fold_groups(op, inputs, groups, out, rooms)
    first, second = (rank for group in groups for rank in group)
    ufunc = _UFUNCS[op]

    def fold_two(inputs: Sequence[NDArray[Any]], out: NDArray[Any], rooms: Sequence[NDArray[Any]]) -> None:
        # NumPy reads both operands before it writes, however they overlap.
        _scratch.quietly(ufunc, inputs[first], inputs[second], out=out)

    return fold_two


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
        The ranks of a group folded in order, then the groups in order. An average of float32 or float64 is divided
        once, after the last fold. One of 16-bit floats is a mean at each level, whose values are weighted by the ranks
        behind them.
    """
    check_op(op, dtype)
    wide = accumulation_dtype(dtype)
    sizes = [len(group) for group in groups]
    level = [[contributions[rank] for rank in group] for group in groups]
    with np.errstate(all="ignore"):
        if op is ReduceOp.AVG and is_half(dtype):
            means = [_plain_mean(group, [1] * len(group), sum(sizes)).astype(dtype) for group in level]
            return means[0] if len(means) == 1 else _plain_mean(means, sizes, sum(sizes)).astype(dtype)
        while len(level) > 1:
            level = [[_plain(op, group, wide).astype(dtype) for group in level]]
        result = _plain(op, level[0], wide)
        if op is ReduceOp.AVG:
            parts = result.view(real_dtype(wide))
            result = (parts / parts.dtype.type(sum(sizes))).view(wide)
        return result.astype(dtype)


def _plain_mean(arrays: Sequence[NDArray[Any]], ranks: Sequence[int], size: int) -> NDArray[np.float32]:
    """Return the mean of ``arrays`` in float32, each weighted by its ``ranks``; terms are scaled below 1 / ``size``."""
    scale = np.float32(1.0)
    while scale * size > 1:
        scale /= np.float32(2)
    total = arrays[0].astype(np.float32) * (ranks[0] * scale)
    for array, count in zip(arrays[1:], ranks[1:], strict=True):
        total = total + array.astype(np.float32) * (count * scale)
    return np.asarray(total / (sum(ranks) * scale), np.float32)


_OPERATIONS: dict[ReduceOp, Callable[[Any, Any], NDArray[Any]]] = {
    ReduceOp.SUM: operator.add,
    ReduceOp.AVG: operator.add,
    ReduceOp.PROD: operator.mul,
    ReduceOp.BAND: operator.and_,
    ReduceOp.BOR: operator.or_,
    ReduceOp.BXOR: operator.xor,
}


def _plain(op: ReduceOp, arrays: Sequence[NDArray[Any]], wide: np.dtype[Any]) -> NDArray[Any]:
    total = arrays[0].astype(wide)
    for array in arrays[1:]:
        term = array.astype(wide)
        if op is ReduceOp.MIN:
            total = np.where((total < term) | (total != total), total, term)  # a NaN is unequal to itself
        elif op is ReduceOp.MAX:
            total = np.where((total > term) | (total != total), total, term)
        elif op is ReduceOp.PROD and is_complex(wide):
            real = total.real * term.real - total.imag * term.imag
            imaginary = total.real * term.imag + total.imag * term.real
            total = np.stack([real, imaginary], axis=-1).reshape(-1).view(wide)
        else:
            total = _OPERATIONS[op](total, term)
    return total


def _is_complex_product(op: ReduceOp, dtype: np.dtype[Any]) -> bool:
    return op is ReduceOp.PROD and is_complex(dtype)


def _check(op: ReduceOp, inputs: Sequence[NDArray[Any]], out: NDArray[Any], divisor: int | None) -> bool:
    """Raise UsageError for what no fold takes; True if an input has another type than ``out``."""
    shape, dtype, mixed = out.shape, out.dtype, False
    if len(shape) != 1 or not inputs:
        raise UsageError(f"a fold takes one-dimensional arrays and at least one input; got {len(inputs)} and {shape}")
    for array in inputs:
        if array.shape != shape:
            raise UsageError(f"inputs have shape {array.shape}; expected that of out, {shape}")
        mixed = mixed or array.dtype != dtype
    check_op(op, dtype)
    if divisor is not None and (op is not ReduceOp.AVG or divisor < 1):
        raise UsageError(f"divisor={divisor} with op={op.value!r}; expected a positive number and 'avg'")
    return mixed


def _check_half(inputs: Sequence[NDArray[Any]], out: NDArray[Any]) -> None:
    """Allow one 16-bit float type, with or without float32, and nothing else."""
    kinds = {array.dtype for array in (*inputs, out)} - {_FLOAT32}
    if len(kinds) != 1 or not is_half(*kinds):
        names = ", ".join(str(array.dtype) for array in inputs)
        raise UsageError(f"a fold of {names} into {out.dtype} is not defined; expected one type of {', '.join(DTYPES)}")


def _scale(dtype: np.dtype[Any], size: int) -> float:
    """Return what terms of an average over ``size`` ranks are multiplied by, so that their sum stays in float32."""
    return 0.5 ** (size - 1).bit_length() if dtype == BFLOAT16 else 1.0


def _fold_means(inputs: Sequence[NDArray[Any]], ranks: Sequence[int], out: NDArray[Any], size: int) -> None:
    """Fold 16-bit means and float32 accumulators; see `fold_step`."""
    _check(ReduceOp.AVG, inputs, out, None)
    _check_half(inputs, out)
    if len(ranks) != len(inputs) or min(ranks) < 1 or sum(ranks) > size:
        raise UsageError(f"ranks={list(ranks)} of {len(inputs)} inputs; expected one count each, at most {size} in all")
    half = out.dtype if is_half(out.dtype) else next(array.dtype for array in inputs if is_half(array.dtype))
    scale = _scale(half, size)
    weights = [count * scale if array.dtype == half else 1.0 for array, count in zip(inputs, ranks, strict=True)]
    with np.errstate(all="ignore"):
        _fold(np.add, inputs, out, sum(ranks) * scale if out.dtype == half else 1.0, weights)


def _fold(
    ufunc: np.ufunc,
    inputs: Sequence[NDArray[Any]],
    out: NDArray[Any],
    divisor: float | None,
    weights: Sequence[float] | None = None,
) -> None:
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
        _fold_block(ufunc, [array[block] for array in inputs], total, first, second, divisor, weights)
        if not in_place:
            np.copyto(target, total, casting="unsafe")


def _fold_complex_product(inputs: Sequence[NDArray[Any]], out: NDArray[Any]) -> None:
    if len(inputs) == 1:
        np.copyto(out, inputs[0])
        return
    in_place = _may_accumulate_in(out, inputs)
    first, parts = _scratch.first.view(out.dtype), _scratch.parts.view(real_dtype(out.dtype)).reshape(3, -1)
    for start in range(0, out.size, first.size):
        block = slice(start, min(start + first.size, out.size))
        target = out[block]
        total = target if in_place else first[: target.size]
        left = inputs[0][block]
        for array in inputs[1:]:
            _multiply(left, array[block], total, parts[:, : target.size])
            left = total
        if not in_place:
            np.copyto(target, total)


def _multiply(left: NDArray[Any], right: NDArray[Any], out: NDArray[Any], parts: NDArray[Any]) -> None:
    """Multiply complex numbers, one rounding an operation; ``out`` may be an operand."""
    real, imaginary, term = parts
    np.multiply(left.real, right.real, out=real)
    np.multiply(left.imag, right.imag, out=term)
    np.subtract(real, term, out=real)
    np.multiply(left.real, right.imag, out=imaginary)
    np.multiply(left.imag, right.real, out=term)
    np.add(imaginary, term, out=imaginary)
    out.real, out.imag = real, imaginary


def _fold_block(
    ufunc: np.ufunc,
    inputs: Sequence[NDArray[Any]],
    total: NDArray[Any],
    first: NDArray[Any],
    second: NDArray[Any],
    divisor: float | None,
    weights: Sequence[float] | None,
) -> None:
    factors = weights or (1.0,) * len(inputs)
    left = _widened(inputs[0], first, factors[0])
    for array, factor in zip(inputs[1:], factors[1:], strict=True):
        left = ufunc(left, _widened(array, second, factor), out=total)
    if divisor is not None and (divisor != 1 or left is not total):
        _divide(left, divisor, total)


def _divide(array: NDArray[Any], divisor: float, out: NDArray[Any]) -> None:
    """Divide truly; of complex numbers each part, since NumPy's complex division multiplies by a reciprocal."""
    if not is_complex(out.dtype):
        np.divide(array, out.dtype.type(divisor), out=out)
        return
    number = real_dtype(out.dtype).type(divisor)
    np.divide(array.real, number, out=out.real)
    np.divide(array.imag, number, out=out.imag)


def _widened(array: NDArray[Any], scratch: NDArray[Any], factor: float) -> NDArray[Any]:
    """Return ``array`` if it already has the type of ``scratch``, else its values times ``factor`` in ``scratch``."""
    if array.dtype == scratch.dtype:
        return array
    wide = scratch[: array.size]
    np.copyto(wide, array)
    if factor != 1:
        np.multiply(wide, scratch.dtype.type(factor), out=wide)
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
