"""MPI's own collectives, on the caller's memory.

Data that is only moved goes as bytes. Reductions go in a form in which MPI does them right (`detcoll.extrema`): 16-bit
floats in float32, floats in a minimum or maximum as integers. Where that form would change an input, the input is
copied first; a reduction that needs no other form reads the caller's memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import ConnectError, TransportError, UsageError
from detcoll.extrema import comparable
from detcoll.fold import fold, fold_step, widened
from detcoll.signature import signature_of
from detcoll.transport import Capabilities, Clock, NativeCall, NativeCollectives
from detcoll.types import ReduceOp, check_op, is_float, is_half, parse_dtype
from detcoll_mpi.blocking import BlockingCaller
from detcoll_mpi.lockstep import Lockstep

LARGEST_PART_BYTES = 2**30
"""A larger array goes in parts, since counts of older MPI libraries end at 2**31."""

STAGE_ELEMS = 2**23
"""So many 16-bit elements are widened to float32 at a time."""

GROUP_TAGS = 2**14
"""Groups that are made at the same time are told apart by two tags each; MPI promises no more than 2**15 of them."""


class MpiCollectives(NativeCollectives):
    """The collectives of one group.

    Parameters
    ----------
    lockstep : Lockstep
        Carries them out.
    ranks : sequence of int
        The members as errors name them.
    capabilities : Capabilities
        What the transport does.
    clock : Clock
        For deadlines.
    """

    def __init__(self, lockstep: Lockstep, ranks: Sequence[int], capabilities: Capabilities, clock: Clock) -> None:
        self.lockstep = lockstep
        self._ranks, self._capabilities, self._clock = tuple(ranks), capabilities, clock
        self._groups: weakref.WeakSet[MpiCollectives] = weakref.WeakSet()
        mpi = lockstep.mpi
        self._ops = {
            ReduceOp.SUM: mpi.SUM,
            ReduceOp.AVG: mpi.SUM,
            ReduceOp.MIN: mpi.MIN,
            ReduceOp.MAX: mpi.MAX,
            ReduceOp.PROD: mpi.PROD,
            ReduceOp.BAND: mpi.BAND,
            ReduceOp.BOR: mpi.BOR,
            ReduceOp.BXOR: mpi.BXOR,
        }

    @property
    def algorithm(self) -> str:
        """The name in traces and results."""
        return "mpi-native"

    def group(self, ranks: Sequence[int], key: int, deadline_ns: int) -> MpiCollectives:
        """Make communicators of some ranks.

        Raises
        ------
        ConnectError
            If MPI does not make them, or not before the deadline.
        """
        self.lockstep.check_usable()
        mpi, parent, comms = self.lockstep.mpi, self.lockstep.comm, []

        def make() -> None:
            everyone = parent.Get_group()
            members = everyone.Incl(list(ranks))
            tag = key % GROUP_TAGS * 2
            comms.extend([parent.Create_group(members, tag), parent.Create_group(members, tag + 1)])
            members.Free()
            everyone.Free()

        caller = BlockingCaller(mpi)
        try:
            if not caller.call(make, max(0, deadline_ns - self._clock.now_ns()) / 1e9):
                raise ConnectError("MPI did not set up the communicators of a group before the deadline")
        except mpi.Exception as error:
            raise TransportError(f"MPI did not set up the communicators of a group: {error}") from error
        finally:
            caller.stop()
        names = [self._ranks[rank] for rank in ranks]
        made = MpiCollectives(
            Lockstep(mpi, comms[0], comms[1], names, self._clock), names, self._capabilities, self._clock
        )
        self._groups.add(made)
        return made

    def leave(self, *, clean: bool) -> None:
        """Take no more calls, of this group and those made from it, and free its communicators if that is safe.

        A communicator with mail that no one took is kept instead: MPI would use its number again, and hand the old
        mail to another.
        """
        for group in list(self._groups):
            group.leave(clean=clean)
        lockstep = self.lockstep
        if not lockstep.is_open:
            return
        lockstep.stop()
        mpi = lockstep.mpi
        clean = clean and not (lockstep.is_broken or lockstep.is_stopped)
        if clean and not lockstep.compared.Iprobe(mpi.ANY_SOURCE, mpi.ANY_TAG):
            lockstep.comm.Free()
            lockstep.compared.Free()

    def stop(self) -> None:
        """Take no more calls, and end the one under way on another thread."""
        self.lockstep.is_stopped = True

    def run(self, call: NativeCall, deadline_ns: int) -> None:
        """Carry out one collective; all ranks are known to have called the same before its result is given out."""
        lockstep = self.lockstep
        lockstep.check_usable()
        self._check(call)
        with lockstep.calling(call):
            lockstep.compare(call)
            if signature_of(call.kind).has_out:
                lockstep.agree(call.kind, deadline_ns)
            _HOW[call.kind](self, call, deadline_ns)
            lockstep.agree(call.kind, deadline_ns)

    def _check(self, call: NativeCall) -> None:
        dtype = parse_dtype(call.array.dtype)
        nbytes, uneven = call.count * dtype.itemsize, bool(call.counts)
        if signature_of(call.kind).has_op:
            check_op(call.op, dtype)
        if not self._capabilities.supports(call.kind, dtype, call.op, nbytes, uneven=uneven):
            raise UsageError(f"MPI does no {call.kind} of {nbytes} bytes of {dtype}, op={call.op.value}; a plan does")
        if not 0 <= call.root < self.lockstep.size:
            raise UsageError(f"root={call.root} must be a rank from 0 to {self.lockstep.size - 1}")

    def _barrier(self, call: NativeCall, deadline_ns: int) -> None:
        """Do nothing more: ranks that have compared their calls have all called."""

    def _broadcast(self, call: NativeCall, deadline_ns: int) -> None:
        for part in _parts(call.array.view(np.uint8), LARGEST_PART_BYTES):
            message = [part, self.lockstep.mpi.BYTE]
            self.lockstep.run(call.kind, part.nbytes, "bcast", deadline_ns, message, call.root)

    def _all_reduce(self, call: NativeCall, deadline_ns: int) -> None:
        """Reduce in place; 16-bit floats in float32, averages divided once at the end.

        MPI's minimum and maximum lose NaN, so floats go through them as integers; bool goes as uint8, a sum of complex
        numbers as one of floats. See `detcoll.extrema`.
        """
        array, op, in_place = call.array, call.op, self.lockstep.mpi.IN_PLACE

        def reduce(given: NDArray[Any]) -> None:
            with comparable(op, given) as shown:
                self.lockstep.run(call.kind, shown.nbytes, "allreduce", deadline_ns, in_place, shown, self._ops[op])

        if is_half(array.dtype):
            for part in _parts(array, STAGE_ELEMS):
                self._reduce_half(op, part, part, reduce)
            return
        for part in _parts(array, LARGEST_PART_BYTES // array.itemsize):
            reduce(part)
        if op is ReduceOp.AVG and array.size:
            self.lockstep.agree(call.kind, deadline_ns)
            fold(op, [array], array, self.lockstep.size)

    def _reduce(self, call: NativeCall, deadline_ns: int) -> None:
        """Reduce to the root, whose array takes part where it is; others read their input."""
        op, root, lockstep = call.op, call.root, self.lockstep
        source = call.array if call.source is None else call.source
        is_root = lockstep.rank == root

        def reduce(given: NDArray[Any]) -> None:
            with comparable(op, given) as shown:
                arguments = (lockstep.mpi.IN_PLACE, shown) if is_root else (shown, None)
                lockstep.run(call.kind, shown.nbytes, "reduce", deadline_ns, *arguments, self._ops[op], root)

        if is_half(source.dtype):
            for start in range(0, source.size, STAGE_ELEMS):
                part = source[start : start + STAGE_ELEMS]
                self._reduce_half(op, part, call.array[start : start + STAGE_ELEMS] if is_root else None, reduce)
            return
        longest = LARGEST_PART_BYTES // source.itemsize
        for start in range(0, source.size, longest):
            part = source[start : start + longest]
            if is_root:
                place = call.array[start : start + longest]
                if not _is_same(place, part):
                    np.copyto(place, part)
                part = place
            elif _changes(op, part.dtype):
                part = part.copy()
            lockstep.memory.append(part)
            reduce(part)
        if op is ReduceOp.AVG and is_root and source.size:
            lockstep.agree(call.kind, deadline_ns)
            fold(op, [call.array], call.array, lockstep.size)

    def _reduce_half(
        self, op: ReduceOp, part: NDArray[Any], out: NDArray[Any] | None, reduce: Callable[[NDArray[Any]], None]
    ) -> None:
        """Reduce 16-bit floats in float32, and round the result once."""
        wide = widened(op, part, self.lockstep.size)
        self.lockstep.memory.append(wide)
        reduce(wide)
        if out is not None:
            fold_step(op, [wide], [self.lockstep.size], out, self.lockstep.size, final=True)
        self.lockstep.memory.pop()

    def _reduce_scatter(self, call: NativeCall, deadline_ns: int) -> None:
        """Reduce and scatter; the input is copied where it goes in another form, or lies where the result goes."""
        op, lockstep, source = call.op, self.lockstep, _source(call)
        out = call.array if call.array.size else np.empty(0, source.dtype)  # MPI takes no address twice
        counts = _counts(call, lockstep.size)
        half = is_half(source.dtype)
        if half or _changes(op, source.dtype) or np.may_share_memory(source, out):
            wide = widened(op, source, lockstep.size) if half else source.copy()
            lockstep.memory.append(wide)
            with comparable(op, wide) as shown:
                sizes = [count * shown.size // max(wide.size, 1) for count in counts]
                lockstep.run(
                    call.kind, shown.nbytes, "reduce_scatter", deadline_ns, lockstep.mpi.IN_PLACE, shown, sizes,
                    self._ops[op],
                )  # fmt: skip
            result = wide[: out.size]
            if half:
                fold_step(op, [result], [lockstep.size], out, lockstep.size, final=True)
                return
            np.copyto(out, result)
        else:
            with comparable(op, source) as shown, comparable(op, out) as place:
                sizes = [count * shown.size // max(source.size, 1) for count in counts]
                lockstep.run(
                    call.kind, shown.nbytes, "reduce_scatter", deadline_ns, shown, place, sizes, self._ops[op]
                )  # fmt: skip
        if op is ReduceOp.AVG and out.size:
            fold(op, [out], out, lockstep.size)

    def _all_gather(self, call: NativeCall, deadline_ns: int) -> None:
        placed = self._placed(call.array, call)
        self._move(call, "allgatherv", deadline_ns, self._sent(call, call.array), placed)

    def _gather(self, call: NativeCall, deadline_ns: int) -> None:
        is_root = self.lockstep.rank == call.root
        sent = self._sent(call, call.array if is_root else None)
        self._move(call, "gatherv", deadline_ns, sent, self._placed(call.array, call) if is_root else None, call.root)

    def _scatter(self, call: NativeCall, deadline_ns: int) -> None:
        byte, in_place, source = self.lockstep.mpi.BYTE, self.lockstep.mpi.IN_PLACE, _source(call)
        if self.lockstep.rank != call.root:
            self._move(call, "scatterv", deadline_ns, None, [call.array, byte], call.root)
            return
        is_there = _is_same(call.array, self._block(source, call))
        into = in_place if is_there else [call.array, byte]
        self._move(call, "scatterv", deadline_ns, self._placed(source, call), into, call.root)

    def _all_to_all(self, call: NativeCall, deadline_ns: int) -> None:
        byte = self.lockstep.mpi.BYTE
        self._move(call, "alltoall", deadline_ns, [_source(call), byte], [call.array, byte])

    def _move(self, call: NativeCall, step: str, deadline_ns: int, *arguments: Any) -> None:
        self.lockstep.run(call.kind, call.count * call.array.itemsize, step, deadline_ns, *arguments)

    def _sent(self, call: NativeCall, out: NDArray[Any] | None) -> Any:
        """Return this rank's block as MPI takes it; ``out`` is where it may lie already."""
        mpi, source = self.lockstep.mpi, _source(call)
        if out is not None and _is_same(source, self._block(out, call)):
            return mpi.IN_PLACE
        return [source, mpi.BYTE]

    def _block(self, array: NDArray[Any], call: NativeCall) -> NDArray[Any]:
        """Return this rank's block of an array of all blocks."""
        counts, rank = _counts(call, self.lockstep.size), self.lockstep.rank
        begin = sum(counts[:rank])
        return array[begin : begin + counts[rank]]

    def _placed(self, array: NDArray[Any], call: NativeCall) -> list[Any]:
        """Return all blocks of an array as MPI takes them: in bytes, and where each begins."""
        sizes = [count * array.itemsize for count in _counts(call, self.lockstep.size)]
        begins = [0, *accumulate(sizes)][:-1]
        return [array, sizes, begins, self.lockstep.mpi.BYTE]


_HOW: dict[str, Callable[[MpiCollectives, NativeCall, int], None]] = {
    "all_reduce": MpiCollectives._all_reduce,
    "broadcast": MpiCollectives._broadcast,
    "barrier": MpiCollectives._barrier,
    "reduce": MpiCollectives._reduce,
    "all_gather": MpiCollectives._all_gather,
    "reduce_scatter": MpiCollectives._reduce_scatter,
    "gather": MpiCollectives._gather,
    "scatter": MpiCollectives._scatter,
    "all_to_all": MpiCollectives._all_to_all,
}
"""What carries out each kind."""


def _source(call: NativeCall) -> NDArray[Any]:
    assert call.source is not None
    return call.source


def _counts(call: NativeCall, size: int) -> Sequence[int]:
    return call.counts or [call.count // size] * size


def _changes(op: ReduceOp, dtype: np.dtype[Any]) -> bool:
    """Tell whether `comparable` writes into an array while it shows it in another form."""
    return op in (ReduceOp.MIN, ReduceOp.MAX) and is_float(dtype)


def _is_same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Tell whether two arrays are the same memory."""
    first, second = one.__array_interface__["data"][0], other.__array_interface__["data"][0]
    return bool(one.size == other.size > 0 and first == second)


def _parts(array: NDArray[Any], longest_elems: int) -> Iterator[NDArray[Any]]:
    for start in range(0, len(array), longest_elems):
        yield array[start : start + longest_elems]
