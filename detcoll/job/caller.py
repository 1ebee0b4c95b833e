"""Calls of one group: number them, choose their executor, and report a refused call to the group.

Calls of one rank are numbered in the order in which they are made, by any thread; the order must be the same on all
ranks. A call goes to the transport's native collective if it has one for this group, kind, type and operator. Otherwise
a plan is compiled and the progress thread executes it. The choice depends only on properties that ranks compare, so all
ranks make the same one.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detcoll.buffers import Bound
from detcoll.descriptor import digest_of
from detcoll.errors import Closed, DetcollError, TransportError, UsageError
from detcoll.job.job import Job
from detcoll.plan import Calendar, Collective, Planner
from detcoll.runtime import Descriptor, Group, Memory, Operation, Work
from detcoll.runtime.group import WORLD_ID
from detcoll.runtime.native import NativeCall, NativeRunner
from detcoll.runtime.operation import Span
from detcoll.signature import signature_of
from detcoll.topology import Topology
from detcoll.types import ReduceOp, accumulation_dtype


@dataclass(slots=True)  # not frozen, which would cost a small call more than a microsecond
class Request:
    """A call with its arguments checked.

    ``output`` : where the result goes; of a collective on one array, that array.  ``source`` : the input, None for a
    collective on one array.  ``arrays`` : how many arrays the caller coalesced.  ``counts``, ``out_counts`` : elements
    of blocks that differ in size, see `detcoll.plan.Collective`.  ``result`` : what `Work.wait` returns.
    """

    kind: str
    output: Bound
    op: ReduceOp = ReduceOp.SUM
    root: int = 0
    source: Bound | None = None
    arrays: int = 1
    counts: tuple[int, ...] = ()
    out_counts: tuple[int, ...] = ()
    elems: int = -1
    result: Any = None

    @property
    def spans(self) -> Sequence[Span]:
        """The caller's memory; none for a kind that has no array."""
        if not signature_of(self.kind).has_array:
            return ()
        return self.output.spans if self.source is None else self.output.spans + self.source.spans

    @property
    def cut(self) -> Sequence[int]:
        """How a list of arrays is cut; empty for one array."""
        if self.arrays < 2:
            return ()
        return max((bound.cut for bound in (self.output, self.source) if bound is not None), key=len)

    @property
    def collective(self) -> Collective:
        """What a plan depends on."""
        dtype = self.output.dtype
        return Collective(
            self.kind, self.output.array.size if self.elems < 0 else self.elems, dtype.itemsize,
            accumulation_dtype(dtype).itemsize, self.root, self.counts, self.out_counts,
        )  # fmt: skip


class Caller:
    """Makes the calls of one group; see the module.

    Parameters
    ----------
    job : Job
        Executes the calls.
    group : Group
        The group that the calls belong to.
    topology : Topology
        Of the group; its lines have at most the rate that the members share.
    calendar : Calendar
        Used to plan and predict the calls.
    """

    def __init__(self, job: Job, group: Group, topology: Topology, calendar: Calendar) -> None:
        self.job, self.group = job, group
        self.rank = group.ranks.index(job.session.rank)
        self.native: NativeRunner | None = job.native if group.id == WORLD_ID else None
        """Runs the transport's native collectives for this group, or None."""
        self.planner = Planner(topology, self.rank, calendar, job.costs)
        job.keep_planner(group, self.planner)
        self._sequence = itertools.count()
        self._order = threading.Lock()
        self._is_closed = self._was_told = False
        self._group_text = "" if group.id == WORLD_ID else f"{group.id:016x}"

    @property
    def usable(self) -> bool:
        """Whether calls are accepted: the job is usable and the group is not closed."""
        return self.job.usable and not self._is_closed

    def close(self) -> None:
        """Accept no more calls."""
        self._is_closed = True

    def check_usable(self) -> None:
        """Raise if no call may be made.

        Raises
        ------
        UsageError, Closed
            See `Job.check_usable`. Closed also if the group was closed, or failed and the failure was raised before.
        DetcollError
            The failure that ended the group, the first time that it is raised.
        """
        self.job.check_usable()
        if self._is_closed:
            raise Closed(f"the group {self.group.title} was closed")
        failure = self.job.failure(self.group)
        if failure is not None:
            is_native = self.native is not None and self.native.failure is not None
            is_told = is_native or self.job.was_told(self.group)
            if not is_told and not self._was_told:
                self._was_told = True
                raise failure
            raise Closed(f"the group has ended: {failure}") from failure

    def call(self, request: Request, *, timeout_s: float, name: str, wait: bool) -> Work | None:
        """Start a collective and return its work; None if ``wait`` is set and the collective has already ended."""
        self.check_usable()
        called_ns, timeout_ns = time.monotonic_ns(), round(timeout_s * 1e9)
        native, kind, bound = self.native, request.kind, request.output
        with self._order:
            sequence = next(self._sequence)
            if native is not None and native.supports(kind, bound.array.dtype, request.op):
                spans = request.spans if self.job.has_loop else None
                if spans:
                    self.job.ahead.wait(spans, on_loop=False)
                call = NativeCall(
                    sequence, kind, bound.array, request.op, request.root, timeout_ns, called_ns, request.arrays,
                    bound.load if bound.staged else None, bound.store if bound.staged else None, name,
                )  # fmt: skip
                if wait and native.run_at_once(call):
                    return None
                work = Work(f"{kind} number {sequence}", request.result)
                native.run(call, work)
                self.job.ahead.note(request.spans if spans is None else spans, work, on_loop=False)
                return work
            return self._submit(sequence, request, timeout_ns, called_ns, name)

    def _submit(self, sequence: int, request: Request, timeout_ns: int, called_ns: int, name: str) -> Work:
        kind, collective, output = request.kind, request.collective, request.output
        is_pairwise = bool(collective.out_counts)
        descriptor = Descriptor(
            sequence, kind, request.op.value, output.dtype.name, 0 if is_pairwise else collective.count,
            collective.root, request.arrays, self._group_text, name,
            "" if is_pairwise else digest_of(collective.counts), cut=digest_of(request.cut),
        )  # fmt: skip
        work = Work(f"{kind} number {sequence}", request.result)
        spans = request.spans
        ahead = None if self.job.native is None else self.job.ahead
        try:
            plan = self.planner.plan(collective)
            loads = request.source or output
            memory = Memory(
                output.array, request.op, work, b"" if is_pairwise else descriptor.encode(),
                loads.load if loads.staged else None, output.store if output.staged else None,
                None if request.source is None else request.source.array,
            )  # fmt: skip
            if ahead is not None:
                ahead.wait(spans, on_loop=True)
            writes = None if request.source is None else output.spans  # an input that is apart is only read
            self.job.loop.submit(Operation(self.group, descriptor, plan, timeout_ns, called_ns, spans, memory, writes))
        except DetcollError as error:
            self._tell_refusal(sequence, error)
            raise
        except BaseException as error:  # such as KeyboardInterrupt; the call has a number, so others would wait for it
            self._tell_refusal(sequence, TransportError(f"{error!r} while it called {kind} number {sequence}"))
            raise
        if ahead is not None:
            ahead.note(spans, work, on_loop=True)
        return work

    def refuse(self, kind: str, error: UsageError) -> None:
        """Count a call with invalid arguments, and fail the call of that number on all ranks of the group.

        A native collective cannot report a refused call; one of a kind that has any is not counted at all.
        """
        if (
            (self.native is not None and self.native.has(kind))
            or not self.usable
            or self.job.failure(self.group) is not None
        ):
            return
        with self._order:
            self._tell_refusal(next(self._sequence), error)

    def _tell_refusal(self, sequence: int, error: Exception) -> None:
        engine, group = self.job.loop.engine, self.group
        with contextlib.suppress(Closed):  # the loop has ended, and its cause has been reported already
            self.job.loop.post(lambda now_ns: engine.failures.refuse(group, sequence, error, now_ns))
