"""Gloo's own collectives, on the caller's memory.

Data that is only moved goes as bytes. Reductions go in a form in which Gloo does them right (`detcoll.extrema`). Gloo
works in place, and uses the arrays of all ranks on the way, so an input that has to keep its values is copied first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import Closed, DetcollError, UsageError
from detcoll.extrema import comparable
from detcoll.fold import fold, fold_step, widened
from detcoll.signature import signature_of
from detcoll.transport import Capabilities, NativeCall, NativeCollectives
from detcoll.types import ReduceOp, check_op, is_half, parse_dtype
from detcoll_gloo.agreement import Agreement
from detcoll_gloo.group import Group

STAGE_ELEMS = 2**23
"""So many 16-bit elements are widened to float32 at a time."""

_WIDENED = (ReduceOp.AVG, ReduceOp.MIN, ReduceOp.MAX)
"""What 16-bit floats go through in float32."""


class GlooCollectives(NativeCollectives):
    """The collectives of one group.

    Parameters
    ----------
    group : Group
        Its ranks.
    capabilities : Capabilities
        What the transport does.
    compare : bool
        Whether ranks compare what they call.
    """

    def __init__(self, group: Group, capabilities: Capabilities, compare: bool) -> None:
        self._group = group
        self._capabilities = capabilities
        self._compares = compare
        self._is_broken = self._has_left = self._is_stopped = False
        self._agreement = Agreement(group) if compare and group.size > 1 else None
        self._groups: weakref.WeakSet[GlooCollectives] = weakref.WeakSet()
        ops = group.torch.distributed.ReduceOp
        self._ops = {
            ReduceOp.SUM: ops.SUM,
            ReduceOp.AVG: ops.SUM,
            ReduceOp.MIN: ops.MIN,
            ReduceOp.MAX: ops.MAX,
            ReduceOp.PROD: ops.PRODUCT,
            ReduceOp.BAND: ops.BAND,
            ReduceOp.BOR: ops.BOR,
            ReduceOp.BXOR: ops.BXOR,
        }

    @property
    def algorithm(self) -> str:
        """The name in traces and results."""
        return "gloo-native"

    def group(self, ranks: Sequence[int], key: int, deadline_ns: int) -> GlooCollectives:
        """Return the collectives of some ranks, on connections of their own; see `Group.part`."""
        made = GlooCollectives(self._group.part(ranks, key, deadline_ns), self._capabilities, self._compares)
        self._groups.add(made)
        return made

    def leave(self, *, clean: bool) -> None:
        """Close the connections of the group, and of those made from it."""
        for group in list(self._groups):
            group.leave(clean=clean)
        if not self._has_left:
            self._has_left = True
            self._group.end()
            self._group.forget()

    def stop(self) -> None:
        """Take no more calls, and close the connections of the group, which ends one under way."""
        self._is_stopped = True
        self._group.end()

    def run(self, call: NativeCall, deadline_ns: int) -> None:
        """Carry out one collective."""
        if self._has_left:
            raise Closed("the Gloo endpoint is closed")
        if self._is_stopped:
            raise Closed("this group of Gloo was stopped")
        if self._is_broken:
            raise Closed("an earlier collective of this Gloo endpoint did not end")
        self._check(call)
        with self._in_step():
            if self._agreement is not None:
                self._agreement.reach(call, deadline_ns)
            if self._group.size > 1:
                _HOW[call.kind](self, call, deadline_ns)
            elif call.source is not None and call.array.size:
                np.copyto(call.array, call.source)

    def _check(self, call: NativeCall) -> None:
        dtype = parse_dtype(call.array.dtype)
        if signature_of(call.kind).has_op:
            check_op(call.op, dtype)
        nbytes = call.count * dtype.itemsize
        if not self._capabilities.supports(call.kind, dtype, call.op, nbytes, uneven=bool(call.counts)):
            raise UsageError(f"Gloo does no {call.kind} of {nbytes} bytes of {dtype}, op={call.op.value}; a plan does")
        if not 0 <= call.root < self._group.size:
            raise UsageError(f"root={call.root} must be a rank from 0 to {self._group.size - 1}")

    def _barrier(self, call: NativeCall, deadline_ns: int) -> None:
        if self._agreement is None:  # ranks that have compared their calls have all called
            options = self._group.torch.distributed.BarrierOptions()
            options.timeout = self._group.timeout(deadline_ns)
            self._group.wait(lambda: self._group.gloo.barrier(options), deadline_ns)

    def _broadcast(self, call: NativeCall, deadline_ns: int) -> None:
        options = self._group.torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = call.root, 0
        self._run("broadcast", call.array.view(np.uint8), options, deadline_ns)

    def _all_reduce(self, call: NativeCall, deadline_ns: int) -> None:
        """Reduce in place; averages are divided once at the end.

        Gloo's minimum and maximum lose NaN, so floats go through them as integers; bool goes as uint8, a sum of complex
        numbers as one of floats. See `detcoll.extrema`.
        """
        options = self._group.torch.distributed.AllreduceOptions()
        self._reduce_in("allreduce", call.op, call.array, call.array, options, deadline_ns)

    def _reduce(self, call: NativeCall, deadline_ns: int) -> None:
        """Reduce to the root; the other ranks' inputs are copied, since Gloo uses them on the way."""
        options = self._group.torch.distributed.ReduceOptions()
        options.rootRank, options.rootTensor = call.root, 0
        source = _source(call)
        if self._group.rank == call.root:
            np.copyto(call.array, source)
            self._reduce_in("reduce", call.op, call.array, call.array, options, deadline_ns)
        else:
            self._reduce_in("reduce", call.op, source.copy(), None, options, deadline_ns)

    def _reduce_in(
        self, name: str, op: ReduceOp, array: NDArray[Any], out: NDArray[Any] | None, options: Any, deadline_ns: int
    ) -> None:
        """Reduce ``array``, which may be overwritten; ``out`` is the same memory where this rank gets the result."""
        size = self._group.size
        options.reduceOp = self._ops[op]
        if op in _WIDENED and is_half(array.dtype):
            for start in range(0, array.size, STAGE_ELEMS):
                part = array[start : start + STAGE_ELEMS]
                wide = widened(op, part, size)
                with comparable(op, wide) as given:
                    self._run(name, given, options, deadline_ns)
                if out is not None:
                    fold_step(op, [wide], [size], part, size, final=True)
            return
        with comparable(op, array) as given:
            self._run(name, given, options, deadline_ns)
        if op is ReduceOp.AVG and out is not None:
            fold(op, [array], out, size)

    def _all_gather(self, call: NativeCall, deadline_ns: int) -> None:
        group, source = self._group, self._apart(call)
        out = self._blocks(call.array.view(np.uint8))
        self._step(
            call, lambda: group.gloo.allgather(out, group.tensor(source), group.timeout(deadline_ns)), deadline_ns
        )

    def _gather(self, call: NativeCall, deadline_ns: int) -> None:
        options = self._timeout("Gather", deadline_ns)
        options.rootRank = call.root
        out = [self._blocks(call.array.view(np.uint8))] if self._group.rank == call.root else []
        source = self._apart(call)
        self._step(call, lambda: self._group.gloo.gather(out, [self._group.tensor(source)], options), deadline_ns)

    def _scatter(self, call: NativeCall, deadline_ns: int) -> None:
        options = self._timeout("Scatter", deadline_ns)
        options.rootRank = call.root
        given = [self._blocks(self._apart(call))] if self._group.rank == call.root else []
        out = self._group.tensor(call.array.view(np.uint8))
        self._step(call, lambda: self._group.gloo.scatter([out], given, options), deadline_ns)

    def _all_to_all(self, call: NativeCall, deadline_ns: int) -> None:
        out, given = self._group.tensor(call.array.view(np.uint8)), self._group.tensor(self._apart(call))
        options = self._timeout("AllToAll", deadline_ns)
        self._step(call, lambda: self._group.gloo.alltoall_base(out, given, [], [], options), deadline_ns)

    def _apart(self, call: NativeCall) -> NDArray[np.uint8]:
        """Return the bytes of the input, which torch takes writable, in memory that is not the output's."""
        source = _source(call).view(np.uint8)
        return source.copy() if np.may_share_memory(source, call.array) or not source.flags.writeable else source

    def _blocks(self, memory: NDArray[np.uint8]) -> list[Any]:
        """Return tensors of the blocks of all ranks."""
        each = memory.size // self._group.size
        return [self._group.tensor(memory[rank * each : (rank + 1) * each]) for rank in range(self._group.size)]

    def _timeout(self, kind: str, deadline_ns: int) -> Any:
        options = getattr(self._group.torch.distributed, f"{kind}Options")()
        options.timeout = self._group.timeout(deadline_ns)
        return options

    def _step(self, call: NativeCall, start: Callable[[], Any], deadline_ns: int) -> None:
        if call.count:
            self._group.wait(start, deadline_ns)

    def _run(self, name: str, array: NDArray[Any], options: Any, deadline_ns: int) -> None:
        if array.size:
            options.timeout = self._group.timeout(deadline_ns)
            tensor = self._group.tensor(array)
            self._group.wait(lambda: getattr(self._group.gloo, name)([tensor], options), deadline_ns)

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Count the ranks as out of step until the body has ended well, so that nothing interrupts unseen."""
        self._is_broken = True
        try:
            yield
        except DetcollError:
            raise
        except BaseException:
            self._group.end()
            raise
        self._is_broken = False


_HOW: dict[str, Callable[[GlooCollectives, NativeCall, int], None]] = {
    "all_reduce": GlooCollectives._all_reduce,
    "broadcast": GlooCollectives._broadcast,
    "barrier": GlooCollectives._barrier,
    "reduce": GlooCollectives._reduce,
    "all_gather": GlooCollectives._all_gather,
    "gather": GlooCollectives._gather,
    "scatter": GlooCollectives._scatter,
    "all_to_all": GlooCollectives._all_to_all,
}
"""What carries out each kind."""


def _source(call: NativeCall) -> NDArray[Any]:
    assert call.source is not None
    return call.source
