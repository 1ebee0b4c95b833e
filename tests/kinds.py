"""Random calls of every kind, each with what NumPy says must come out.

`drawn` makes a `Call` from a generator that is the same on all members of a group. `Call.start` makes this rank's
arrays, calls, and returns a function that waits and compares, bit for bit.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from detcoll.communicator import Communicator
from detcoll.fold import reference
from detcoll.plan.collectives import declaration_of
from detcoll.runtime import Work
from detcoll.signature import DECLARED
from detcoll.types import BFLOAT16, DTYPES, ReduceOp, is_complex, is_integer, operators_of

OBJECTS = ("broadcast_object", "all_gather_object")
KINDS = (*DECLARED, *OBJECTS)
WHOLE = [dtype for dtype in DTYPES.values() if is_integer(dtype)]
GUARD = 16
"""Bytes before and after an array that nobody may write to."""

cuda: Any = None
"""The double of CUDA on which ranks hold arrays too, if a test sets it: a `detcoll.testing.device.StrictDevice`."""

torch: Any = sys.modules.get("torch")
"""Whoever imports this decides whether torch takes part: a process needs seconds to load it."""


@dataclass(frozen=True)
class Call:
    """One call, the same on all ranks, though each may hold its arrays in another way.

    ``counts`` : rows of blocks that differ; of an all-to-all, a matrix, by sender.  ``tails`` : by array, the shape
    behind the first axis.  ``rows`` : by array, of one block, or of the only array; None for a 0-d array.
    ``seed`` : of the values, and of how ranks hold arrays.
    """

    kind: str
    dtype: np.dtype[Any]
    op: ReduceOp
    root: int
    rows: tuple[int | None, ...]
    tails: tuple[tuple[int, ...], ...]
    counts: Any
    is_async: bool
    seed: int

    def given(self, size: int, rank: int) -> list[np.ndarray]:
        """Return what a rank's input arrays hold; of a rank without input, empty ones."""
        values = np.random.default_rng([self.seed, rank])
        made = []
        for rows, tail in zip(self.rows, self.tails, strict=True):
            shape = self.in_shape(rows, tail, size, rank)
            elems = math.prod(shape)
            if is_integer(self.dtype):
                limits = np.iinfo(self.dtype)
                array = values.integers(limits.min, limits.max, elems, self.dtype, endpoint=True)
            elif self.dtype.kind == "b":
                array = values.random(elems) < 0.5
            else:
                numbers = values.standard_normal((2, elems)) * 3
                array = (numbers[0] + 1j * numbers[1] if is_complex(self.dtype) else numbers[0]).astype(self.dtype)
            made.append(array.reshape(shape))
        return made

    def in_shape(self, rows: int | None, tail: tuple[int, ...], size: int, rank: int) -> tuple[int, ...]:
        """Return the shape of an input of ``rank``."""
        if rows is None:
            return ()
        if self.counts is not None:
            if self.kind == "all_to_all":
                return sum(self.counts[rank]), *tail
            whole = self.kind in ("reduce_scatter", "scatter")
            return sum(self.counts) if whole else self.counts[rank], *tail
        return rows * size if self.kind in ("reduce_scatter", "scatter", "all_to_all") else rows, *tail

    def expected(self, groups: list[tuple[int, ...]], size: int, rank: int) -> list[np.ndarray] | None:
        """Return what a rank's result must hold, by array, in the shape of an output that is allocated."""
        inputs = [self.given(size, each) for each in range(size)]
        return [self._expected([one[at] for one in inputs], groups, size, rank) for at in range(len(self.rows))]

    def _expected(self, given: list[np.ndarray], groups: list[tuple[int, ...]], size: int, rank: int) -> np.ndarray:
        mine = given[rank]
        if self.kind in ("all_reduce", "reduce", "reduce_scatter"):
            flat = reference(self.op, [each.reshape(-1) for each in given], groups, self.dtype)
            whole = flat.reshape(mine.shape)
            if self.kind == "reduce_scatter":
                return self._block(whole, size, rank)
            return whole if self.kind == "all_reduce" or rank == self.root else mine
        if self.kind == "broadcast":
            return given[self.root]
        if self.kind in ("all_gather", "gather"):
            return np.concatenate([np.atleast_1d(each) for each in given])
        if self.kind == "scatter":
            return self._block(given[self.root], size, rank)
        assert self.kind == "all_to_all", self.kind
        return np.concatenate([self._block(each, size, rank, source) for source, each in enumerate(given)])

    def _block(self, whole: np.ndarray, size: int, rank: int, source: int = 0) -> np.ndarray:
        if self.counts is None:
            rows = len(whole) // size
            return whole[rank * rows : (rank + 1) * rows]
        counts = self.counts[source] if self.kind == "all_to_all" else self.counts
        begin = sum(counts[:rank])
        return whole[begin : begin + counts[rank]]

    def start(self, comm: Communicator) -> Callable[[], None]:
        """Make this rank's call; return what waits for it and compares."""
        if self.kind == "barrier":
            return _waiting(comm.barrier(async_op=self.is_async), lambda result: None)
        if self.kind in OBJECTS:
            return self._objects(comm)
        return _Held(self, comm).start()

    def _objects(self, comm: Communicator) -> Callable[[], None]:
        values = [
            [each, "word" * (self.seed % 7), {"bytes": bytes(each * self.seed % 300)}] for each in range(comm.size)
        ]
        if self.kind == "broadcast_object":
            assert (
                comm.broadcast_object(values[self.root] if comm.rank == self.root else None, self.root)
                == (values[self.root])
            )
        else:
            assert comm.all_gather_object(values[comm.rank]) == values
        return lambda: None


class _Held:
    """One rank's arrays for a call: as NumPy or torch, read-only, inside one another, between guards."""

    def __init__(self, call: Call, comm: Communicator) -> None:
        self.call, self.comm = call, comm
        size, rank, kind = comm.size, comm.rank, call.kind
        self.declared = declaration_of(kind)
        self.how = np.random.default_rng([call.seed, 77, rank])
        self.given = call.given(size, rank)
        is_in, is_out = kind != "scatter" or rank == call.root, kind != "gather" or rank == call.root
        self.wanted = call.expected([site.ranks for site in comm.topology.sites], size, rank) if is_out else None
        self.is_device = cuda is not None and call.dtype != BFLOAT16 and self.how.random() < 0.7
        self.is_torch = torch is not None and not self.is_device and self.how.random() < 0.25
        self.uploaded: list[tuple[np.ndarray, Any]] = []
        self.guards: list[tuple[np.ndarray, bytes]] = []
        self.is_placed = False
        self.outs: list[np.ndarray] | None = None
        self.ins: list[np.ndarray] | None = None
        one_array = self.declared.has_one_array or kind == "reduce"
        must = not is_in
        if one_array:
            self.ins = [self._kept(each) for each in self.given]
            if kind == "reduce" and rank != call.root and not self.is_torch and self.how.random() < 0.4:
                for each in self.ins:
                    each.flags.writeable = False
            return
        if is_out and (must or self.is_device or self.how.random() < 0.7):
            assert self.wanted is not None
            self.outs = [self._blank(each.shape) for each in self.wanted]
        if is_in and self.outs is not None and self.how.random() < 0.6:
            self._place()
        if is_in and self.ins is None:
            self.ins = [self._kept(each) for each in self.given]
            if not self.is_torch and self.how.random() < 0.4:
                for each in self.ins:
                    each.flags.writeable = False

    def start(self) -> Callable[[], None]:
        """Call, and return what waits and compares."""
        call, kind = self.call, self.call.kind
        words: dict[str, Any] = {"async_op": call.is_async}
        if self.declared.has_op:
            words["op"] = call.op if self.how.random() < 0.5 else call.op.value.upper()
        if self.declared.has_root:
            words["root"] = call.root if self.how.random() < 0.5 else np.int64(call.root)
        if self.outs is not None:
            words["out"] = self._shown(self.outs)
        if call.counts is not None:
            if kind == "all_to_all":
                words["counts"] = call.counts[self.comm.rank]
                words["out_counts"] = tuple(row[self.comm.rank] for row in call.counts)
            else:
                words["counts"] = call.counts if self.how.random() < 0.5 else np.array(call.counts)
        x = self._shown(self.ins) if self.ins is not None else None
        made = getattr(self.comm, kind)(x, **words)
        if self.outs is not None and not call.is_async:
            assert made is words["out"], "the call returns out"
        return _waiting(made, lambda result: self._check(result, words.get("out")))

    def _check(self, result: Any, out: Any) -> None:
        kind = self.call.kind
        self._download()
        for memory, guard in self.guards:
            assert bytes(memory[:GUARD]) + bytes(memory[-GUARD:]) == guard, "what lies beside an array was written"
        if self.declared.has_one_array or kind == "reduce":
            assert result is None
            assert self.ins is not None
            assert self.wanted is not None
            self._same(self.ins, self.wanted)
            return
        if self.wanted is None:
            assert result is None
        else:
            assert out is None or result is out
            results = list(result) if isinstance(result, list) else [result]
            assert isinstance(result, list) == (len(self.call.rows) > 1)
            if self.is_device:
                assert self.outs is not None
                results = self.outs
            elif torch is not None and self.is_torch:
                assert all(type(each) is torch.Tensor for each in results)
            else:
                assert all(type(each) is np.ndarray for each in results)
            if out is None:
                assert [tuple(each.shape) for each in results] == [each.shape for each in self.wanted]
            self._same([_plain(each) for each in results], self.wanted)
        if self.ins is not None and not self.is_placed:
            self._same(self.ins, self.given)

    def _download(self) -> None:
        for memory, there in self.uploaded:
            while cuda.drive_one(self.stream, self.device):  # the caller's own work, which no empty call waits for
                pass
            memory[:] = cuda.peek(there)

    def _same(self, arrays: list[np.ndarray], wanted: list[np.ndarray]) -> None:
        for array, expected in zip(arrays, wanted, strict=True):
            assert array.dtype == self.call.dtype
            got, bits = array.tobytes(), expected.tobytes()
            if got != bits:
                where = np.array(
                    [
                        got[at : at + array.itemsize] != bits[at : at + array.itemsize]
                        for at in range(0, len(got), array.itemsize)
                    ]
                )
                at = int(np.argmax(where))
                raise AssertionError(
                    f"{int(where.sum())} of {array.size} elements are wrong, the first is {at}: "
                    f"{array.reshape(-1)[at]}; expected {expected.reshape(-1)[at]}"
                )

    def _place(self) -> None:
        """Let input and output lie in one memory: as the form in place, the same array, or overlapping askew."""
        assert self.outs is not None
        assert self.wanted is not None
        common = None
        if len(self.given) == 1:
            size = self.comm.size
            counts = self.call.counts
            elems = (self.given[0].size, self.wanted[0].size)
            low, high = sorted(elems)
            if self.call.kind == "all_to_all":
                common = (0, 0)
            elif low != high or size == 1:
                row = math.prod(self.call.tails[0])
                rows = self.call.rows[0] or 1
                begin = row * (sum(counts[: self.comm.rank]) if counts is not None else rows * self.comm.rank)
                common = (begin, 0) if elems[0] < elems[1] else (0, begin)
        if common is None:
            return
        self.is_placed = True
        form = self.how.random()
        if form > 0.6:  # askew: the input is copied first
            common = (int(self.how.integers(0, elems[1] + 1)), int(self.how.integers(0, elems[0] + 1)))
        whole = max(at + n for at, n in zip(common, elems, strict=True))
        memory = self._blank((whole,))
        self.outs = [memory[common[1] : common[1] + elems[1]].reshape(self.wanted[0].shape)]
        self.ins = [memory[common[0] : common[0] + elems[0]].reshape(self.given[0].shape)]
        self.ins[0][...] = self.given[0]

    def _blank(self, shape: tuple[int, ...]) -> np.ndarray:
        nbytes = math.prod(shape) * self.call.dtype.itemsize
        memory = np.full(nbytes + 2 * GUARD, 0xA5, np.uint8)
        self.guards.append((memory, bytes(memory[:GUARD]) + bytes(memory[-GUARD:])))
        return memory[GUARD : GUARD + nbytes].view(self.call.dtype).reshape(shape)

    def _kept(self, values: np.ndarray) -> np.ndarray:
        array = self._blank(values.shape)
        array[...] = values
        return array

    def _shown(self, arrays: list[np.ndarray]) -> Any:
        shown: list[Any] = list(arrays)
        if self.is_torch:
            shown = [_tensor(each) for each in arrays]
        elif self.is_device:
            shown = [self._on_device(each) for each in arrays]
        return shown if len(self.call.rows) > 1 else shown[0]

    def _on_device(self, array: np.ndarray) -> OnDevice:
        """Return an array on the double; what it holds comes there by a kernel that the caller has queued."""
        address = array.__array_interface__["data"][0]
        for memory, _ in self.guards:
            begin = memory.__array_interface__["data"][0]
            if begin <= address < begin + memory.size:
                break
        there = next((there for kept, there in self.uploaded if kept is memory), None)
        if there is None:
            if not hasattr(self, "stream"):
                self.device = int(self.how.integers(2))
                with cuda.on(self.device):
                    self.stream = cuda.stream(self.device)
            values = memory.copy()
            there = cuda.array(np.full_like(memory, 0x77), self.device, self.stream)
            cuda.kernel(self.stream, lambda: cuda.poke(there, values))
            self.uploaded.append((memory, there))
        return OnDevice(there, address - begin, array)


class OnDevice:
    """A part of an array on the double, as the CUDA array interface describes it."""

    def __init__(self, whole: Any, offset: int, array: np.ndarray) -> None:
        self.whole, self.size, self.shape = whole, array.size, array.shape
        self.__cuda_array_interface__ = {
            "shape": array.shape, "typestr": array.dtype.str, "strides": None,
            "data": (whole.address + offset, not array.flags.writeable), "stream": whole.stream, "version": 3,
        }  # fmt: skip


def _waiting(made: Any, check: Callable[[Any], None]) -> Callable[[], None]:
    return lambda: check(made.wait() if isinstance(made, Work) else made)


def _tensor(array: np.ndarray) -> Any:
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _plain(array: Any) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    return array.view(torch.int16).numpy().view(BFLOAT16) if array.dtype == torch.bfloat16 else array.numpy()


def drawn(draw: np.random.Generator, size: int, largest: int, **fixed: Any) -> Call:
    """Draw a call for ``size`` ranks of at most about ``largest`` elements, apart from the fields that are fixed."""
    kind = fixed.get("kind") or KINDS[draw.integers(len(KINDS))]
    dtype = fixed.get("dtype") or list(DTYPES.values())[draw.integers(len(DTYPES))]
    known = [op for op in ReduceOp if op in operators_of(dtype)]
    op = known[draw.integers(len(known))]
    root, is_async, seed = int(draw.integers(size)), bool(draw.random() < 0.6), int(draw.integers(2**31))
    declared = DECLARED.get(kind)
    arrays = int(draw.integers(2, 4)) if draw.random() < 0.2 else 1
    counts: Any = None
    if declared is not None and declared.has_counts and draw.random() < 0.5:
        arrays = 1
        counts = _counts(draw, kind, size, largest)
    tails = tuple(((), (3,), (2, 2), (1,), (0,), (5, 0))[_index(draw, (60, 15, 10, 10, 3, 2))] for _ in range(arrays))
    per = largest if declared is None or not declared.has_counts else max(1, largest // size)
    rows = tuple(_rows(draw, max(1, per // max(1, math.prod(tail)))) for tail in tails)
    if counts is None and kind in ("all_reduce", "broadcast", "reduce", "all_gather", "gather"):
        rows = tuple(None if tail == () and draw.random() < 0.1 else n for n, tail in zip(rows, tails, strict=True))
    return Call(kind, dtype, op, root, rows, tails, counts, is_async, seed)


def drawn_whole(draw: np.random.Generator, size: int, largest: int) -> Call:
    """Draw a call of whole numbers, which are the same bits in any order of folds."""
    return drawn(draw, size, largest, dtype=WHOLE[draw.integers(len(WHOLE))])


def _index(draw: np.random.Generator, weights: tuple[int, ...]) -> int:
    return int(draw.choice(len(weights), p=np.array(weights) / sum(weights)))


def _rows(draw: np.random.Generator, largest: int) -> int:
    return int(draw.integers(0, 4)) if draw.random() < 0.3 else int(largest ** draw.random())


def _counts(draw: np.random.Generator, kind: str, size: int, largest: int) -> Any:
    """Return sizes that differ: some are zero, sometimes all but one."""
    ranks = size * size if kind == "all_to_all" else size
    each = [0 if draw.random() < 0.3 else _rows(draw, max(1, largest // ranks)) for _ in range(ranks)]
    if draw.random() < 0.2:
        each = [0] * ranks
        each[draw.integers(ranks)] = _rows(draw, largest)
    if kind == "all_to_all":
        return tuple(tuple(each[row * size : (row + 1) * size]) for row in range(size))
    return tuple(each)
