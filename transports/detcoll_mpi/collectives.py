"""MPI's own collectives, with deadlines.

A nonblocking collective can be watched, so that a rank that never comes is noticed at the deadline. For large arrays
that has a price: with 2 ranks on one host, MPICH 5 took 1.3 times and Open MPI 5 three times as long for 16 MiB as
with the blocking call (at 8 bytes and 64 KiB both took the same, and at 1 MiB MPICH was twice as fast). So large
arrays go through a nonblocking barrier, where latecomers are noticed, and then through the blocking call in a thread
of its own, on which the caller waits until the deadline. The comparison of what ranks called (`Agreement`) is such a
barrier too, and takes its place. Should a peer freeze in the middle of that, the thread stays
in MPI, and since a process in that state cannot leave MPI in good order, the job is then ended when it exits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import Closed, DeadlineMissed, PeerLost, PlanMismatch, UsageError
from detcoll.extrema import comparable
from detcoll.fold import fold, fold_step, widened
from detcoll.transport import Clock, Endpoint, NativeCollectives
from detcoll.types import ReduceOp, check_op, is_half, parse_dtype
from detcoll_mpi.agreement import Agreement
from detcoll_mpi.blocking import BlockingCaller, stuck_requests
from detcoll_mpi.giving_up import ANSWER_NS, GaveUp, GivingUp
from detcoll_mpi.progress import progress
from detcoll_mpi.waiting import Backoff

WATCHED_BYTES = 2**20
"""Up to this size collectives are nonblocking."""

LARGEST_PART_BYTES = 2**30
"""A larger array goes in parts, since counts of older MPI libraries end at 2**31."""

_NOTHING = np.empty(0, np.uint8)

STAGE_ELEMS = 2**23
"""So many 16-bit elements are widened to float32 at a time."""


class MpiCollectives(Endpoint, NativeCollectives):
    """The collective half of an endpoint."""

    def __init__(self, mpi: Any, comm: Any, size: int, clock: Clock, agreement: Agreement) -> None:
        self._mpi = mpi
        self._agreement = agreement
        self._comparing: Any = None
        self._comm = comm
        self._size = size
        self._clock = clock
        self._is_open = True
        progress.enter(mpi)
        self._is_broken = False
        self._number = 0
        self._giving_up = GivingUp(mpi, agreement.comm)
        self._requests: list[Any] = []
        self._memory: list[NDArray[Any]] = []
        self._caller: BlockingCaller | None = None
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

    def all_reduce(self, array: NDArray[Any], op: ReduceOp, deadline_ns: int, arrays: int = 1, name: str = "") -> None:
        """Reduce ``array`` over all ranks, in place; 16-bit floats in float32, averages divided once at the end.

        MPI's minimum and maximum lose NaN, so floats go through them as integers; bool goes as uint8, a sum of complex
        numbers as one of floats. See `detcoll.extrema`.
        """
        self._check_usable()
        dtype = parse_dtype(array.dtype)
        check_op(op, dtype)
        with _InStep(self, array):
            self._compare("all_reduce", op, array, 0, arrays, name)
            if is_half(dtype):
                self._all_reduce_half(array, op, deadline_ns)
                return
            with comparable(op, array) as given:
                for part in _parts(given, LARGEST_PART_BYTES // given.itemsize):
                    self._all_reduce_part(part, op, deadline_ns)
                self._agree("all_reduce", deadline_ns)
            if op is ReduceOp.AVG and array.size:
                fold(op, [array], array, self._size)

    def broadcast(self, array: NDArray[Any], root: int, deadline_ns: int, arrays: int = 1, name: str = "") -> None:
        """Copy ``array`` of ``root`` to all ranks."""
        self._check_usable()
        if not 0 <= root < self._size:
            raise UsageError(f"root={root} must be a rank from 0 to {self._size - 1}")
        with _InStep(self, array):
            self._compare("broadcast", ReduceOp.SUM, array, root, arrays, name)
            for part in _parts(array.view(np.uint8), LARGEST_PART_BYTES):
                self._broadcast_part(part, root, deadline_ns)
            self._agree("broadcast", deadline_ns)

    def barrier(self, deadline_ns: int, name: str = "") -> None:
        """Return once every rank has called."""
        self._check_usable()
        if self._size == 1:
            return
        with _InStep(self, _NOTHING):
            self._compare("barrier", ReduceOp.MAX, _NOTHING, 0, 1, name)
            self._agree("barrier", deadline_ns)

    def _broadcast_part(self, part: NDArray[np.uint8], root: int, deadline_ns: int) -> None:
        message = [part, self._mpi.BYTE]
        self._run(
            "broadcast",
            part.nbytes,
            lambda: self._comm.Ibcast(message, root),
            lambda: self._comm.Bcast(message, root),
            deadline_ns,
        )

    def _all_reduce_half(self, array: NDArray[Any], op: ReduceOp, deadline_ns: int) -> None:
        for part in _parts(array, STAGE_ELEMS):
            wide = widened(op, part, self._size)
            self._memory.append(wide)
            with comparable(op, wide) as given:
                self._all_reduce_part(given, op, deadline_ns)
            fold_step(op, [wide], [self._size], part, self._size, final=True)
            self._memory.pop()
        self._agree("all_reduce", deadline_ns)

    def _all_reduce_part(self, part: NDArray[Any], op: ReduceOp, deadline_ns: int) -> None:
        in_place, mpi_op = self._mpi.IN_PLACE, self._ops[op]
        self._run(
            "all_reduce",
            part.nbytes,
            lambda: self._comm.Iallreduce(in_place, part, mpi_op),
            lambda: self._comm.Allreduce(in_place, part, mpi_op),
            deadline_ns,
        )

    def _run(self, name: str, nbytes: int, start: Callable[[], Any], call: Callable[[], Any], deadline_ns: int) -> None:
        if nbytes <= WATCHED_BYTES:
            self._watch(name, start, deadline_ns)
            return
        if self._comparing is None:
            self._watch(name, self._comm.Ibarrier, deadline_ns)
        self._agree(name, deadline_ns)
        if self._caller is None:
            self._caller = BlockingCaller(self._mpi)
        timeout_s = max(0, deadline_ns - self._clock.now_ns()) / 1e9
        try:
            done = self._caller.call(call, timeout_s, lambda: self._look(name))
        except self._mpi.Exception as error:
            raise self._lost(name, error) from error
        if not done:
            raise self._missed(name)

    def _compare(self, kind: str, op: ReduceOp, array: NDArray[Any], root: int, arrays: int, name: str) -> None:
        """Begin to compare a call with what the others called; `_agree` ends it."""
        if self._size > 1:
            try:
                self._comparing = self._agreement.start(kind, op, array, root, arrays, name)
            except self._mpi.Exception as error:
                raise self._lost(kind, error) from error
            self._requests.append(self._comparing)

    def _agree(self, name: str, deadline_ns: int) -> None:
        """Wait until all ranks are known to have called the same, if that is still to be found out.

        Raises
        ------
        PlanMismatch
            If they called different collectives; shows this rank's and another.
        """
        comparing, self._comparing = self._comparing, None
        if comparing is None:
            return
        self._await(name, comparing, deadline_ns)
        if not self._agreement.is_reached:
            request, records = self._agreement.exchange()
            self._requests.append(request)
            self._await(name, request, deadline_ns)
            self._agreement.explain(records)

    def _watch(self, name: str, start: Callable[[], Any], deadline_ns: int) -> None:
        """Carry out a nonblocking collective, and give its result out when all ranks are known to have called it."""
        try:
            request = start()
        except self._mpi.Exception as error:
            self._agree(name, deadline_ns)
            raise self._lost(name, error) from error
        self._requests.append(request)
        self._agree(name, deadline_ns)
        self._await(name, request, deadline_ns)

    def _await(self, name: str, request: Any, deadline_ns: int) -> None:
        try:
            backoff = Backoff(self._clock, deadline_ns)
            while not request.Test():
                if backoff.is_long:
                    self._look(name)
                if not backoff.pause():
                    raise self._missed(name)
        except self._mpi.Exception as error:
            raise self._lost(name, error) from error

    def _look(self, name: str) -> None:
        """Raise if there is nothing to wait for any more."""
        if not self._is_open:
            raise Closed(f"the MPI endpoint was closed while {name} was under way")
        self._giving_up.hear(self._number)

    def _missed(self, name: str) -> DeadlineMissed:
        """Return the error for a collective whose time is over; names those that do not say that they wait as well.

        Raises
        ------
        GaveUp
            If another rank gives it up meanwhile.
        """
        self._giving_up.ask(self._number)
        backoff = Backoff(self._clock, self._clock.now_ns() + ANSWER_NS)
        while (missing := self._giving_up.missing(self._number)) and backoff.pause():
            self._look(name)
        late = f"{name} by MPI did not end before its deadline"
        if not missing:
            return DeadlineMissed(f"{late}, though all ranks have begun it")
        names = ", ".join(f"rank {rank}" for rank in missing)
        return DeadlineMissed(f"{late}; it waits for {names}, which has not begun it or does not answer")

    def _lost(self, name: str, error: Exception) -> PeerLost:
        return PeerLost(f"{name} by MPI failed: {error}")

    def _check_open(self) -> None:
        progress.is_active = True
        if not self._is_open:
            raise Closed("the MPI endpoint is closed")

    def _check_usable(self) -> None:
        self._check_open()
        if self._is_broken:
            raise Closed("an earlier collective of this MPI endpoint did not end")

    def _stop(self) -> None:
        self._is_open = False
        progress.leave()
        if self._caller is not None:
            self._caller.stop()


class _InStep:
    """Counts the ranks as out of step until its body has ended well, so that nothing interrupts it unseen.

    What MPI may still read or write after an interruption is kept.
    """

    __slots__ = ("_array", "_of")

    def __init__(self, of: MpiCollectives, array: NDArray[Any]) -> None:
        self._of, self._array = of, array

    def __enter__(self) -> None:
        of = self._of
        of._is_broken, of._memory = True, [self._array]
        of._number += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        of = self._of
        if error is None:
            of._giving_up.hear(of._number)
            of._is_broken, of._requests, of._memory = False, [], []
            return
        stuck_requests.extend((of._mpi, request, of._memory) for request in of._requests)
        if not isinstance(error, PlanMismatch | GaveUp):  # of these the others know
            of._giving_up.tell(of._number, error)


def _parts(array: NDArray[Any], longest_elems: int) -> Iterator[NDArray[Any]]:
    for start in range(0, len(array), longest_elems):
        yield array[start : start + longest_elems]
