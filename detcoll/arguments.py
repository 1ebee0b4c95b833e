"""Arguments of collectives: checked before anything moves, and turned into a request.

The declaration of a kind says which arrays a rank has and how large they are in blocks, so nothing here asks for the
name of a kind.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

from detcoll.buffers import Bound, bind
from detcoll.errors import UsageError
from detcoll.job.caller import Request
from detcoll.plan import Collective, declaration_of
from detcoll.quantities import LONGEST_TIMEOUT_S
from detcoll.runtime.operation import overlap
from detcoll.signature import signature_of
from detcoll.types import DTYPES, ReduceOp, check_op, operators_of

LARGEST_NAME_BYTES = 64

_OPERATORS = {(op.value, dtype): op for dtype in DTYPES.values() for op in operators_of(dtype)}


def timeout_of(seconds: object) -> float:
    """Return a timeout in seconds; raise UsageError if it is not valid."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= LONGEST_TIMEOUT_S:
        raise UsageError(f"timeout={seconds!r} must be a number of seconds above 0 and at most {LONGEST_TIMEOUT_S}")
    return float(seconds)


def check_name(name: object) -> None:
    """Raise UsageError if ``name`` is not a name for a call or a group."""
    try:
        is_name = isinstance(name, str) and len(name.encode()) <= LARGEST_NAME_BYTES
    except UnicodeEncodeError:  # half of a surrogate pair
        is_name = False
    if not is_name:
        raise UsageError(f"name={name!r} must be a string of at most {LARGEST_NAME_BYTES} bytes")


def rank_of(label: str, rank: object, size: int) -> int:
    """Return a rank of a group of ``size``; raise UsageError if it is not one."""
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or not 0 <= rank < size:
        raise UsageError(f"{label}={rank!r} must be a rank from 0 to {size - 1}")
    return int(rank)


def operator_of(kind: str, op: str | ReduceOp | None, dtype: np.dtype[Any]) -> ReduceOp:
    """Return the operator that ``op`` names; raise UsageError if elements of ``dtype`` have no such operator.

    None is for kinds that do not reduce.
    """
    if op is None and not signature_of(kind).has_op:
        return ReduceOp.SUM
    known = _OPERATORS.get((op, dtype)) if isinstance(op, str) else None
    if known is None:
        known = ReduceOp.parse(op)
        check_op(known, dtype)
    return known


def on_one_array(kind: str, x: Any, op: str | ReduceOp | None = None, root: int = 0, shape: str = "") -> Request:
    """Return the request for a collective that works on ``x`` in place."""
    bound = bind(x)
    return Request(kind, bound, operator_of(kind, op, bound.dtype), root, arrays=_count_of(x), shape=shape)


def to_root(kind: str, x: Any, op: str | ReduceOp, root: int, rank: int, shape: str = "") -> Request:
    """Return the request for a collective that writes ``x`` at the root, and only reads it elsewhere."""
    source = bind(x, writable=rank == root)
    output = bind(x) if rank == root else bind(np.empty(0, source.dtype))
    return Request(
        kind, output, operator_of(kind, op, source.dtype), root, source, _count_of(x), elems=source.size,
        shape=shape,
    )  # fmt: skip


def of_blocks(
    kind: str, size: int, rank: int, x: Any, out: Any, *, op: str | ReduceOp | None = None, root: int = 0,
    counts: Sequence[int] | None = None, out_counts: Sequence[int] | None = None, shape: str = "",
) -> Request:  # fmt: skip
    """Return the request for a collective that moves blocks from ``x`` to ``out``, which is allocated where absent.

    Parameters
    ----------
    kind : str
        A kind whose input and output are different arrays.
    size, rank : int
        The number of ranks, and the caller's.
    x, out : Buffer or None
        Input and output. Each is ignored on a rank that has none.
    op, root
        Where the kind has them.
    counts, out_counts : sequence of int, optional
        Sizes of blocks along the first axis.
    shape : str, optional
        What ranks compare of the shapes of their arrays.

    Raises
    ------
    UsageError
        If an argument is not valid.
    """
    blocks = _Blocks(kind, size, rank, root, _counts("counts", counts, size), _counts("out_counts", out_counts, size))
    gives, gets = blocks.gives, blocks.gets
    if gives and x is None:
        raise UsageError(f"x=None, but rank {rank} has an input; expected an array")
    if gets and not gives and out is None:
        raise UsageError(f"out=None on rank {rank}, which has no input to tell type and size; expected an array")
    of = x if gives else out
    if blocks.is_uneven and isinstance(of, list | tuple):
        raise UsageError("counts= with a list of arrays; expected one array, or equal blocks")
    source = bind(x, writable=False, name="x", blocks=blocks.in_blocks) if gives else None
    if gives and gets and out is not None:
        _check_alike(x, out, blocks)
    given = source if source is not None else bind(out, name="out", blocks=blocks.out_blocks)
    collective = blocks.collective(of, "x" if gives else "out", given)
    _, out_elems = declaration_of(kind).elems(collective, size, rank)
    if not gets:
        result, output = None, bind(np.empty(0, given.dtype))
    else:
        result = _allocated(of, blocks, out_elems) if out is None else out
        output = bind(result, name="out", blocks=blocks.out_blocks) if source is not None else given
    if output.dtype != given.dtype:
        raise UsageError(f"out has dtype {output.dtype}, x {given.dtype}; expected one dtype")
    if output.size != out_elems:
        raise UsageError(f"out has {output.size} elements; expected {out_elems}")
    if source is None:
        source = bind(np.empty(0, output.dtype))
    elif not (source.staged or output.staged) and _disturbs(source, output, collective, size, rank):
        source = bind(x, writable=False, name="x", blocks=blocks.in_blocks, copied=True)
    on_device = source.buffer is not None and output.buffer is not None
    return Request(
        kind, output, operator_of(kind, op, output.dtype), root, source, _count_of(of), collective.counts,
        collective.out_counts, collective.count, result, shape,
        on_device and _disturbs(source, output, collective, size, rank),
    )  # fmt: skip


class _Blocks:
    """What a rank gives and gets of a kind, in blocks or, where they differ in size, in rows of the first axis."""

    def __init__(
        self, kind: str, size: int, rank: int, root: int, counts: tuple[int, ...], out_counts: tuple[int, ...]
    ) -> None:
        self.kind, self.size, self.rank, self.root = kind, size, rank, root
        self.counts, self.out_counts = counts, out_counts
        declared = declaration_of(kind)
        self.is_uneven = bool(counts or out_counts)
        if declared.is_pairwise and bool(counts) != bool(out_counts):
            missing, what = ("out_counts", "gets from") if counts else ("counts", "sends to")
            raise UsageError(f"{missing}=None; expected how many rows rank {rank} {what} each rank")
        if out_counts and counts[rank] != out_counts[rank]:
            raise UsageError(
                f"out_counts={out_counts} has {out_counts[rank]} rows of rank {rank} itself; expected {counts[rank]}, "
                f"by counts={counts}"
            )
        self.in_blocks, self.out_blocks = declared.elems(Collective(kind, size, 1, 1, root), size, rank)
        self.gives, self.gets = self.in_blocks > 0, self.out_blocks > 0
        whole = Collective(kind, sum(counts) if counts else size, 1, 1, root, counts, out_counts)
        self.in_rows, self.out_rows = declared.elems(whole, size, rank)

    def collective(self, x: Any, name: str, bound: Bound) -> Collective:
        """Return the collective that moves ``x``, the rank's input, or its output if it has no input."""
        dtype, blocks = bound.dtype, self.in_blocks if self.gives else self.out_blocks
        if not self.is_uneven:
            for each, label in _named(x, name):
                rows = shape_of(each)[0] if shape_of(each) else 1
                if rows % blocks:
                    raise UsageError(
                        f"{label} has {rows} rows; expected a multiple of {self.size}, as many for each rank"
                    )
            return Collective(self.kind, bound.size // blocks * self.size, dtype.itemsize, dtype.itemsize, self.root)
        shape, expected = shape_of(x) or (1,), self.in_rows if self.gives else self.out_rows
        if shape[0] != expected:
            raise UsageError(f"{name} has {shape[0]} rows; expected {expected}, by counts={self.counts}")
        row = math.prod(shape[1:])
        counts, out_counts = (tuple(n * row for n in each) for each in (self.counts, self.out_counts))
        return Collective(self.kind, sum(counts), dtype.itemsize, dtype.itemsize, self.root, counts, out_counts)

    def out_shape(self, shape: tuple[int, ...], out_elems: int) -> tuple[int, ...]:
        """Return the shape of the output for an input of ``shape``."""
        if not shape:
            return (out_elems,)
        rows = self.out_rows if self.is_uneven else shape[0] // self.in_blocks * self.out_blocks
        return (rows, *shape[1:])


def shape_of(x: Any) -> tuple[int, ...]:
    """Return the shape of one array of the user."""
    found = getattr(x, "shape", None)
    if found is None:
        found = (
            x.__cuda_array_interface__["shape"] if hasattr(x, "__cuda_array_interface__") else np.from_dlpack(x).shape
        )
    return tuple(int(length) for length in found)


def _allocated(x: Any, blocks: _Blocks, out_elems: int) -> Any:
    if isinstance(x, list | tuple):
        return [
            _allocated(each, blocks, math.prod(shape_of(each)) // blocks.in_blocks * blocks.out_blocks) for each in x
        ]
    shape = blocks.out_shape(shape_of(x), out_elems)
    try:
        return _empty(shape, x)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"out=None: no array has shape {shape}; expected smaller blocks: {error}") from error


def _empty(shape: tuple[int, ...], x: Any) -> Any:
    """Return an array like ``x`` of another shape."""
    if isinstance(x, np.ndarray):
        return np.empty(shape, x.dtype)
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(x, torch.Tensor):
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    if cupy is not None and isinstance(x, cupy.ndarray):
        with x.device:
            return cupy.empty(shape, x.dtype)
    raise UsageError(f"out=None for a {type(x).__name__}; expected an array that takes the result")


def _check_alike(x: Any, out: Any, blocks: _Blocks) -> None:
    """Check that input and output are both one array, or lists of as many that fit together."""
    are_lists = [isinstance(each, list | tuple) for each in (x, out)]
    if not any(are_lists):
        return
    if not all(are_lists) or len(x) != len(out):
        expected = f"a list of {len(x)} arrays" if are_lists[0] else "one array"
        found = f"a list of {len(out)}" if are_lists[1] else f"a {type(out).__name__}"
        raise UsageError(f"out is {found}; expected {expected}, as x is")
    bind(out, name="out")
    for index, (given, taken) in enumerate(zip(x, out, strict=True)):
        expected_elems = math.prod(shape_of(given)) // blocks.in_blocks * blocks.out_blocks
        if math.prod(shape_of(taken)) != expected_elems:
            raise UsageError(
                f"out[{index}] has {math.prod(shape_of(taken))} elements; expected {expected_elems}, by x[{index}]"
            )


def _disturbs(source: Bound, output: Bound, collective: Collective, size: int, rank: int) -> bool:
    """Tell whether writing the output would change input that is still to be read."""
    if not overlap(source.spans, output.spans):
        return False
    common = declaration_of(collective.kind).in_place(collective, size, rank)
    if common is None or len(source.spans) > 1 or len(output.spans) > 1:
        return True
    begins = [bound.spans[0][0] - at * bound.dtype.itemsize for bound, at in zip((source, output), common, strict=True)]
    return begins[0] != begins[1]


def _counts(label: str, counts: Sequence[int] | None, size: int) -> tuple[int, ...]:
    if counts is None:
        return ()
    is_list = isinstance(counts, Iterable) and not isinstance(counts, Mapping | Set | Iterator)
    given = list(counts) if is_list else []
    whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) and n >= 0 for n in given)
    if not (is_list and whole):
        raise UsageError(f"{label}={counts!r} must be a whole number, not negative, for each of {size} ranks")
    if len(given) != size:
        raise UsageError(f"{label}={counts!r} has {len(given)} entries; expected one for each of {size} ranks")
    return tuple(int(n) for n in given)


def _named(x: Any, name: str) -> list[tuple[Any, str]]:
    if isinstance(x, list | tuple):
        return [(each, f"{name}[{index}]") for index, each in enumerate(x)]
    return [(x, name)]


def _count_of(x: Any) -> int:
    return len(x) if isinstance(x, list | tuple) else 1
