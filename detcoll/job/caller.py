"""Makes the calls of one group: numbers them, chooses who carries them out, and tells a group of a call refused here.

Calls of one rank are numbered in the order in which they come, whatever threads make them, and that order must agree
between ranks. A call goes to the transport's own collective where it has one for this group, kind, type and operator,
else a plan is compiled and the progress thread carries it out. That choice depends only on what ranks compare.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Sequence

from detcoll.buffers import Bound
from detcoll.errors import Closed, DetcollError, TransportError, UsageError
from detcoll.job.job import Job
from detcoll.plan import Calendar, Collective, Planner
from detcoll.runtime import Descriptor, Group, Memory, Operation, Work
from detcoll.runtime.group import WORLD_ID
from detcoll.runtime.native import NativeCall, NativeRunner
from detcoll.runtime.operation import Span
from detcoll.topology import Topology
from detcoll.types import ReduceOp, accumulation_dtype


class Caller:
    """See the module.

    Parameters
    ----------
    job : Job
        What carries calls out.
    group : Group
        Whose calls these are.
    topology : Topology
        Of the group, its lines no faster than its members' share of them.
    calendar : Calendar
        By which its plans are made and predicted.
    """

    def __init__(self, job: Job, group: Group, topology: Topology, calendar: Calendar) -> None:
        self.job, self.group = job, group
        self.rank = group.ranks.index(job.session.rank)
        self.native: NativeRunner | None = job.native if group.id == WORLD_ID else None
        """What runs the transport's own collectives of this group, or None."""
        self.planner = Planner(topology, self.rank, calendar, job.costs)
        job.keep_planner(group, self.planner)
        self._sequence = itertools.count()
        self._order = threading.Lock()
        self._is_closed = self._was_told = False
        self._group_text = "" if group.id == WORLD_ID else f"{group.id:016x}"

    @property
    def usable(self) -> bool:
        """Whether calls may be made."""
        return self.job.usable and not self._is_closed

    def close(self) -> None:
        """Take no more calls."""
        self._is_closed = True

    def check_usable(self) -> None:
        """Refuse a call where none may be made.

        Raises
        ------
        UsageError, Closed
            See `Job.check_usable`; Closed also where the group has failed, and this was told before.
        DetcollError
            What ended the group, the first time that a caller is told.
        """
        self.job.check_usable()
        if self._is_closed:
            raise Closed(f"the group {self.group.title} was closed")
        failure = self.job.failure(self.group)
        if failure is not None:
            is_told = self.job.was_told(self.group) if self.native is None else self.native.failure is not None
            if not is_told and not self._was_told:
                self._was_told = True
                raise failure
            raise Closed(f"the group has ended: {failure}") from failure

    def call(
        self, kind: str, bound: Bound, op: ReduceOp, root: int, arrays: int, *, timeout_s: float, name: str, wait: bool
    ) -> Work | None:
        """Begin a collective; None where the caller would wait and it has ended already."""
        self.check_usable()
        called_ns, timeout_ns = time.monotonic_ns(), round(timeout_s * 1e9)
        native = self.native
        with self._order:
            sequence = next(self._sequence)
            if native is not None and native.supports(kind, bound.array.dtype, op):
                if kind != "barrier" and self.job.has_loop:
                    self.job.ahead.wait(bound.spans, on_loop=False)
                call = NativeCall(
                    sequence, kind, bound.array, op, root, timeout_ns, called_ns, arrays,
                    bound.load if bound.staged else None, bound.store if bound.staged else None, name,
                )  # fmt: skip
                if wait and native.run_at_once(call):
                    return None
                work = Work(f"{kind} number {sequence}")
                native.run(call, work)
                self.job.ahead.note(bound.spans if kind != "barrier" else (), work, on_loop=False)
                return work
            spans = bound.spans if kind != "barrier" else ()
            return self._submit(sequence, kind, bound, op, root, arrays, timeout_ns, called_ns, name, spans)

    def _submit(
        self, sequence: int, kind: str, bound: Bound, op: ReduceOp, root: int, arrays: int, timeout_ns: int,
        called_ns: int, name: str, spans: Sequence[Span],
    ) -> Work:  # fmt: skip
        descriptor = Descriptor(
            sequence, kind, op.value, bound.dtype.name, bound.array.size, root, arrays, self._group_text, name
        )
        collective = Collective(
            kind, bound.array.size, bound.dtype.itemsize, accumulation_dtype(bound.dtype).itemsize, root
        )
        work = Work(f"{kind} number {sequence}")
        ahead = None if self.job.native is None else self.job.ahead
        try:
            plan = self.planner.plan(collective)
            memory = Memory(
                bound.array, op, work, descriptor.encode(), bound.load if bound.staged else None,
                bound.store if bound.staged else None,
            )  # fmt: skip
            if ahead is not None:
                ahead.wait(spans, on_loop=True)
            self.job.loop.submit(Operation(self.group, descriptor, plan, timeout_ns, called_ns, spans, memory))
        except DetcollError as error:
            self._tell_refusal(sequence, error)
            raise
        except BaseException as error:  # such as KeyboardInterrupt; it is numbered, so the others would wait for it
            self._tell_refusal(sequence, TransportError(f"{error!r} while it called {kind} number {sequence}"))
            raise
        if ahead is not None:
            ahead.note(spans, work, on_loop=True)
        return work

    def refuse(self, error: UsageError) -> None:
        """Take note of a call whose arguments cannot be used: it counts, and ends on all ranks of the group.

        A transport's own collectives have no way to hear of that, so there the call is as if it had not been made.
        """
        if self.native is not None or not self.usable or self.job.failure(self.group) is not None:
            return
        with self._order:
            self._tell_refusal(next(self._sequence), error)

    def _tell_refusal(self, sequence: int, error: Exception) -> None:
        engine, group = self.job.loop.engine, self.group
        with contextlib.suppress(Closed):  # then all have been told more than this
            self.job.loop.post(lambda now_ns: engine.refuse(group, sequence, error, now_ns))
