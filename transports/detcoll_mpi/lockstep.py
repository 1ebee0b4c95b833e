"""Carries out MPI's collectives of one group in step, with deadlines.

A nonblocking collective can be watched, so that a rank that never comes is noticed at the deadline. For large arrays
that has a price: with 2 ranks on one host, MPICH 5 took 1.3 times and Open MPI 5 three times as long for 16 MiB as
with the blocking call (at 8 bytes and 64 KiB both took the same, and at 1 MiB MPICH was twice as fast). So large
arrays go through a nonblocking barrier, where latecomers are noticed, and then through the blocking call in a thread
of its own, on which the caller waits until the deadline. The comparison of what ranks called (`Agreement`) is such a
barrier too, and takes its place. Should a peer freeze in the middle of that, the thread stays
in MPI, and since a process in that state cannot leave MPI in good order, the job is then ended when it exits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from detcoll.errors import Closed, DeadlineMissed, PeerLost, PlanMismatch
from detcoll.transport import Clock, NativeCall
from detcoll_mpi.agreement import Agreement
from detcoll_mpi.blocking import BlockingCaller, stuck_requests
from detcoll_mpi.giving_up import ANSWER_NS, GaveUp, GivingUp
from detcoll_mpi.progress import progress
from detcoll_mpi.waiting import Backoff

WATCHED_BYTES = 2**20
"""Up to this size collectives are nonblocking."""


class Lockstep:
    """One rank's part in the collectives of one group.

    It has many fields since a call that ends early must keep what MPI still uses, and be told of by number.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    comm : Comm
        For collectives alone, in the group's order of ranks.
    compared : Comm
        The same ranks, for what collectives compare and tell.
    ranks : sequence of int
        The members as errors name them.
    clock : Clock
        For deadlines.
    """

    def __init__(self, mpi: Any, comm: Any, compared: Any, ranks: Sequence[int], clock: Clock) -> None:
        self.mpi, self.comm, self.compared = mpi, comm, compared
        self.size, self.rank = len(ranks), int(comm.Get_rank())
        self.is_open, self.is_broken, self.is_stopped = True, False, False
        self.memory: list[Any] = []
        """What MPI may read or write in the call under way."""
        self._ranks, self._clock = tuple(ranks), clock
        self._agreement = Agreement(mpi, compared, self._ranks)
        self._giving_up = GivingUp(mpi, compared, self._ranks)
        self._comparing: Any = None
        self._number = 0
        self._requests: list[Any] = []
        self._caller: BlockingCaller | None = None

    def check_usable(self) -> None:
        """Raise Closed if no collective can be called any more."""
        progress.is_active = True
        if not self.is_open:
            raise Closed("the MPI endpoint is closed")
        if self.is_stopped:
            raise Closed("the collectives of this group by MPI were stopped")
        if self.is_broken:
            raise Closed("an earlier collective of this MPI endpoint did not end")

    def calling(self, call: NativeCall) -> _InStep:
        """Return the context in which one call is carried out."""
        return _InStep(self, call)

    def run(self, name: str, nbytes: int, step: str, deadline_ns: int, *arguments: Any) -> None:
        """Carry out ``step``, such as ``"allreduce"``, of a collective; ``nbytes`` has to be the same on all ranks."""
        if nbytes <= WATCHED_BYTES:
            start = getattr(self.comm, f"I{step}")
            self._watch(name, lambda: start(*arguments), deadline_ns)
            return
        block = getattr(self.comm, step.capitalize())
        if self._comparing is None:
            self._watch(name, self.comm.Ibarrier, deadline_ns)
        self.agree(name, deadline_ns)
        if self._caller is None:
            self._caller = BlockingCaller(self.mpi)
        timeout_s = max(0, deadline_ns - self._clock.now_ns()) / 1e9
        try:
            done = self._caller.call(lambda: block(*arguments), timeout_s, lambda: self._look(name))
        except self.mpi.Exception as error:
            raise self._lost(name, error) from error
        if not done:
            raise self._missed(name)

    def compare(self, call: NativeCall) -> None:
        """Begin to compare a call with what the others called; `agree` ends it."""
        if self.size > 1:
            try:
                self._comparing = self._agreement.start(call)
            except self.mpi.Exception as error:
                raise self._lost(call.kind, error) from error
            self._requests.append(self._comparing)

    def agree(self, name: str, deadline_ns: int) -> None:
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
        except self.mpi.Exception as error:
            self.agree(name, deadline_ns)
            raise self._lost(name, error) from error
        self._requests.append(request)
        self.agree(name, deadline_ns)
        self._await(name, request, deadline_ns)

    def _await(self, name: str, request: Any, deadline_ns: int) -> None:
        try:
            backoff = Backoff(self._clock, deadline_ns)
            while not request.Test():
                if backoff.is_long:
                    self._look(name)
                if not backoff.pause():
                    raise self._missed(name)
        except self.mpi.Exception as error:
            raise self._lost(name, error) from error

    def _look(self, name: str) -> None:
        """Raise if there is nothing to wait for any more."""
        if not self.is_open:
            raise Closed(f"the MPI endpoint was closed while {name} was under way")
        if self.is_stopped:
            raise Closed(f"the collectives of this group by MPI were stopped while {name} was under way")
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
        names = ", ".join(f"rank {self._ranks[rank]}" for rank in missing)
        return DeadlineMissed(f"{late}; it waits for {names}, which has not begun it or does not answer")

    def _lost(self, name: str, error: Exception) -> PeerLost:
        return PeerLost(f"{name} by MPI failed: {error}")

    def stop(self) -> None:
        """Take no more calls, and give the one under way up."""
        self.is_open = False
        if self._caller is not None:
            self._caller.stop()


class _InStep:
    """Counts the ranks as out of step until its body has ended well, so that nothing interrupts it unseen.

    What MPI may still read or write after an interruption is kept.
    """

    __slots__ = ("_call", "_of")

    def __init__(self, of: Lockstep, call: NativeCall) -> None:
        self._of, self._call = of, call

    def __enter__(self) -> None:
        of = self._of
        of.is_broken, of.memory = True, [self._call.array, self._call.source]
        of._number += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        of = self._of
        if error is None:
            of._giving_up.hear(of._number)
            of.is_broken, of._requests, of.memory = False, [], []
            return
        stuck_requests.extend((of.mpi, request, of.memory) for request in of._requests)
        if not isinstance(error, PlanMismatch | GaveUp):  # of these the others know
            of._giving_up.tell(of._number, error)
