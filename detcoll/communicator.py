"""What a user holds: this rank's place in the job, and the collectives.

One all-reduce passes through here as: `bind` makes a flat view of the user's array, arguments are checked, a
`Descriptor` says what was called, `Planner` compiles this rank's steps or finds them in its cache, and `Progress`
carries them out on the endpoints. A transport that does collectives itself takes the same call through `NativeRunner`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from detcoll.assembly import Assembled, deadline_after
from detcoll.buffers import Bound, bind
from detcoll.errors import Closed, DeadlineMissed, DetcollError, PlanMismatch, TransportError, UsageError
from detcoll.machine import Slots
from detcoll.membership import Members
from detcoll.plan import Calendar, Collective, Planner, Slotting
from detcoll.plan.headroom import Express
from detcoll.plan.layout import LARGEST_FRAME_BYTES
from detcoll.plan.predict import Costs
from detcoll.plan.promise import calendar_facts
from detcoll.rendezvous import Session
from detcoll.runtime import Descriptor, Operation, Progress, Timekeeper, Work
from detcoll.runtime.native import NativeCall, NativeRunner
from detcoll.settings import Facts, Settings
from detcoll.topology import Topology
from detcoll.trace import Call, Trace
from detcoll.types import ReduceOp, accumulation_dtype, check_kind, is_integer, parse_dtype

log = logging.getLogger("detcoll")

_FINALIZE_S = 10.0
_PARTING_AFTER_FAILURE_S = 2.0
TRACED_PHASES = 256
"""Predictions in a trace tell so many moments of a cycle apart."""
_BARRIER = np.zeros(1, np.uint8)


class Communicator:
    """A group of ranks and this rank's place in it. Made by `detcoll.init`. Thread-safe.

    Collectives must be called by all ranks in the same order. With ``async_op=True`` they return a `Work` at once, and
    the array belongs to detcoll until its ``wait`` has returned.
    """

    def __init__(
        self, session: Session, settings: Settings, topology: Topology, assembled: Assembled, calendar: Calendar,
        facts: Sequence[Facts], timekeeper: Timekeeper,
    ) -> None:  # fmt: skip
        self._session, self._settings, self._topology, self._assembled = session, settings, topology, assembled
        self._calendar = calendar
        self._planner = Planner(topology.granted, session.rank, calendar, _costs(facts))
        self._sequence = itertools.count()
        self._order = threading.Lock()
        self._finalized = False
        self._pid = os.getpid()
        here = topology.site_of(session.rank)
        self._trace = Trace(
            session.rank, here, settings.trace is not None, time.monotonic_ns(),
            calendar_facts(calendar, topology.granted, session.rank),
        )  # fmt: skip
        self._members = Members(session)
        self._runner = self._make_runner(here, timekeeper)
        _open.add(self)

    def _make_runner(self, here: int, timekeeper: Timekeeper) -> Progress | NativeRunner:
        members = self._members
        native = self._assembled.native
        if native is not None:
            return NativeRunner(
                native,
                self._trace,
                lambda error: members.abort(type(error).__name__, str(error)),
                members.explanation,
            )
        slots: Slots[tuple[Operation, int]] = Slots(
            self._calendar,
            here,
            self._session.rank,
            frame_bytes=LARGEST_FRAME_BYTES,
            ahead=self._assembled.transport.capabilities.timed,
            splits=self._assembled.transport.capabilities.splits,
        )
        routes = self._assembled.routes
        rank, reserved = self._session.rank, self._calendar.mode is not Slotting.OFF
        express = Express.of(self._topology, rank) if reserved else None
        return Progress(rank, self._session.size, routes, slots, timekeeper, members, self._trace, express)

    def await_clock(self, deadline_ns: int) -> None:
        """Return once this rank knows the time of its site.

        Raises
        ------
        DeadlineMissed
            If it does not by the deadline.
        DetcollError
            If something goes wrong meanwhile.
        """
        if isinstance(self._runner, Progress):
            left_s = max(deadline_ns - time.monotonic_ns(), 0) / 1e9
            is_known = self._runner.synchronised.wait(left_s)
            if self._runner.failure is not None:
                raise self._runner.failure
            if not is_known:
                raise DeadlineMissed(f"rank {self.rank} does not agree with its site about the time")

    @property
    def rank(self) -> int:
        """The number of this rank, from 0."""
        return self._session.rank

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self._session.size

    @property
    def topology(self) -> Topology:
        """Sites, lines and delays; it fixes the order in which contributions are folded."""
        return self._topology

    @property
    def transport(self) -> str:
        """The name of the transport in use."""
        return self._assembled.transport.name

    @property
    def usable(self) -> bool:
        """Whether collectives may be called: made by this process and not finalized."""
        return not self._finalized and os.getpid() == self._pid

    @property
    def calendar(self) -> Calendar:
        """The windows and rates of the lines between sites."""
        return self._calendar

    @overload
    def all_reduce(self, x: Any, op: str | ReduceOp = "sum", async_op: Literal[False] = False) -> None: ...
    @overload
    def all_reduce(self, x: Any, op: str | ReduceOp = "sum", *, async_op: Literal[True]) -> Work: ...
    @overload
    def all_reduce(self, x: Any, op: str | ReduceOp = "sum", async_op: bool = False) -> Work | None: ...

    def all_reduce(self, x: Any, op: str | ReduceOp = "sum", async_op: bool = False) -> Work | None:
        """Reduce ``x`` over all ranks, in place.

        Parameters
        ----------
        x : Buffer, any shape, one of the types in `detcoll.types.DTYPES`, C-contiguous, writable, borrowed until wait
            A NumPy or CuPy array, a torch tensor, or a list of them, which is coalesced. Equal shapes on all ranks.
        op : str
            ``sum``, ``avg``, ``min``, ``max`` or ``prod``.
        async_op : bool
            Return a `Work` at once instead of waiting.

        Returns
        -------
        Work or None

        Raises
        ------
        UsageError
            If an argument cannot be used, before anything moves.
        PlanMismatch, PeerLost, DeadlineMissed
            See `detcoll.errors`.

        Guarantees
        ----------
        With a transport or setting that keeps the promise (``slotted``, ``shm``, or ``reproducible=True``), the result
        is the fold in rank order inside each site, then in site order, bit for bit on every rank, whatever the
        transport, the chunks and the load. 16-bit floats fold in float32 and are rounded once a level: within the
        sites, and between them.

        With every transport, ``min`` and ``max`` give NaN on all ranks where any rank has one, as NumPy does; its
        payload and the sign of a zero among zeros are not promised, except that the promised fold gives NumPy's
        ``op(lower, higher)``. ``avg`` of 16-bit floats is right wherever the mean can be represented, even if the sum
        cannot: between sites it adds means, each weighted by how many ranks its site has. ``avg`` of float32 and
        float64 divides the sum, which is infinite beyond the largest number. Integers wrap around.
        """
        parsed = ReduceOp.parse(op)
        bound = bind(x)
        if parsed is ReduceOp.AVG and is_integer(bound.dtype):
            raise UsageError(f"op='avg' of {bound.dtype} has no exact result; use sum, or a float type")
        return self._call("all_reduce", bound, parsed, 0, async_op, _count_of(x))

    def broadcast(self, x: Any, root: int = 0, async_op: bool = False) -> Work | None:
        """Copy ``x`` of rank ``root`` into ``x`` of all ranks.

        Parameters
        ----------
        x : Buffer, as for `all_reduce`
        root : int
            From 0 to size - 1, the same on all ranks.
        async_op : bool
            Return a `Work` at once instead of waiting.

        Raises
        ------
        UsageError
            If an argument cannot be used, before anything moves.
        """
        if isinstance(root, bool) or not isinstance(root, int | np.integer) or not 0 <= root < self.size:
            raise UsageError(f"root={root!r} must be a rank from 0 to {self.size - 1}")
        return self._call("broadcast", bind(x), ReduceOp.SUM, int(root), async_op, _count_of(x))

    def barrier(self, async_op: bool = False) -> Work | None:
        """Return once every rank has called it."""
        return self._call("barrier", bind(_BARRIER.copy()), ReduceOp.MAX, 0, async_op, 1)

    def empty(self, shape: int | Sequence[int], dtype: object = "float32") -> NDArray[Any]:
        """Return a new array in memory that collectives of this job's ranks need not stage.

        On one host (transport ``shm``) an all-reduce of arrays that all ranks made here goes straight from array to
        array. Anything else works too, without that gain: slices of such an array, one beside another rank's ordinary
        array, or another transport, which gives ordinary memory. ``torch.from_numpy`` makes a tensor of it.

        Parameters
        ----------
        shape : int or sequence of int
            Not negative.
        dtype : dtype
            One of `detcoll.types.DTYPES`.

        Returns
        -------
        array, ``shape``, ``dtype``, C-contiguous, host
            Its values are arbitrary. After a collective failed its memory may still be written by other ranks.

        Raises
        ------
        UsageError
            If there are no such arrays.
        Closed
            If the communicator is finalized, or belongs to the process that this one was forked from.
        TransportUnavailable
            If the system has no more shared memory.
        """
        if not self.usable:
            raise Closed("empty() on a communicator that is finalized, or in a forked process")
        kind = parse_dtype(dtype)
        sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
        if any(isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 0 for size in sizes):
            raise UsageError(f"shape={shape!r} must be a whole number, or some, none negative")
        native, nbytes = self._assembled.native, math.prod(map(int, sizes)) * kind.itemsize
        memory = native.allocate(nbytes) if native is not None else None
        return np.empty(sizes, kind) if memory is None else np.frombuffer(memory, kind).reshape(sizes)

    def predict(self, kind: str, nbytes: int, dtype: object = "float32", called_ns: int | None = None) -> float | None:
        """Return the predicted time of a collective, or None where the transport plans none.

        Parameters
        ----------
        kind : str
            ``all_reduce``, ``broadcast`` or ``barrier``.
        nbytes : int
            Size of the array.
        dtype : dtype
            Its element type.
        called_ns : int, optional
            When all ranks call, by this rank's monotonic clock: it decides how long the first window is away. By
            default the mean over all times.

        Returns
        -------
        float or None
            Seconds until the slowest rank has its result.
        """
        collective = self._collective(kind, nbytes, dtype)
        if isinstance(self._runner, NativeRunner):
            return None
        phase_ns = None if called_ns is None else self._phase_ns(called_ns)
        return self._planner.predict_ns(collective, phase_ns=phase_ns) / 1e9

    def _phase_ns(self, at_ns: int) -> int:
        """Return where in the calendar's cycle a time of this rank falls."""
        offset_ns = self._runner.site_offset_ns if isinstance(self._runner, Progress) else 0
        return (at_ns + offset_ns) % self._calendar.sites[self._topology.site_of(self.rank)].cycle_ns

    def bound(self, kind: str, nbytes: int, dtype: object = "float32") -> float | None:
        """Return the physical floor in seconds (see `detcoll.plan.bounds`), or None where there is no line."""
        floor_ns = self._planner.floor_ns(self._collective(kind, nbytes, dtype))
        return None if floor_ns is None else floor_ns / 1e9

    def algorithm(self, kind: str, nbytes: int, dtype: object = "float32") -> str:
        """Return which algorithm a collective of ``nbytes`` would use."""
        check_kind(kind)
        native = self._assembled.native
        if native is not None:
            return native.algorithm
        return self._planner.algorithm(self._collective(kind, nbytes, dtype))

    def counters(self) -> dict[str, int]:
        """Return what the transport and the calendar counted so far, by name.

        ``slot_misses`` and ``slot_trims`` count windows: those in which data waited and nothing was sent, and those in
        which some of what was due came too late. They are there where lines have slots, also one that never closes.
        """
        counted: dict[str, int] = {}
        for endpoint in self._assembled.endpoints:
            for name, value in endpoint.counters().items():
                counted[name] = counted.get(name, 0) + value
        if isinstance(self._runner, Progress) and self._calendar.mode in (Slotting.CALENDAR, Slotting.TURNS):
            counted["slot_misses"], counted["slot_trims"] = self._runner.late_windows
        return counted

    @property
    def trace(self) -> Trace:
        """What this rank did, beside what was planned; without DETCOLL_TRACE nothing is kept."""
        return self._trace

    def finalize(self, timeout: float = _FINALIZE_S) -> None:
        """Finish what is under way, meet all ranks once more, and give everything back. Idempotent.

        Raises
        ------
        TransportError
            If collectives were still under way at the deadline, or something ended them meanwhile.
        PlanMismatch
            If this rank is through with a collective that others called differently, and was not told yet.
        """
        if self._finalized or os.getpid() != self._pid:
            return
        self._finalized = True
        _open.discard(self)
        deadline_ns = deadline_after(timeout)
        had_failed = self._runner.failure is not None
        trouble: Exception | None = None
        try:
            if not self._runner.drain(deadline_ns) and not had_failed:
                trouble = self._runner.failure
            if self._runner.failure is None:
                self._part(deadline_ns)
        finally:
            self._runner.close()
            trouble = trouble or self._untold_mismatch()
            self._complete_trace()
            for endpoint in self._assembled.endpoints:
                if self._runner.failure is None:
                    endpoint.close(deadline_ns)
                else:
                    endpoint.abort()
            if self._runner.failure is not None:  # all have been told; a frozen rank 0 would not answer
                deadline_ns = min(deadline_ns, deadline_after(_PARTING_AFTER_FAILURE_S))
            self._session.close(deadline_ns)
            self._write_trace()
        if trouble is not None:
            raise trouble

    def _untold_mismatch(self) -> PlanMismatch | None:
        failure = self._runner.failure
        if failure is None:
            failure = self._members.failure()
        elif self._runner.was_told:
            return None
        return failure if isinstance(failure, PlanMismatch) else None

    def __enter__(self) -> Communicator:
        """Return the communicator itself."""
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Finalize; after an error without waiting for anybody."""
        if kind is None:
            self.finalize()
        else:
            self.abort(f"{getattr(kind, '__name__', kind)}: {error}")

    def abort(self, reason: str) -> None:
        """Give up: every collective under way fails on all ranks, with ``reason`` shown to them. Idempotent."""
        if self._finalized or os.getpid() != self._pid:
            return
        self._finalized = True
        _open.discard(self)
        self._session.abort("TransportError", reason)
        self._runner.fail(TransportError(f"rank {self.rank} aborted: {reason}"))
        self._runner.close()
        for endpoint in self._assembled.endpoints:
            endpoint.abort()
        self._session.close(deadline_after(0.5))

    def _call(self, kind: str, bound: Bound, op: ReduceOp, root: int, async_op: bool, arrays: int) -> Work | None:
        self._check_usable()
        called_ns = time.monotonic_ns()
        bound.load()
        with self._order:
            work = self._start(kind, bound, op, root, arrays, called_ns, wait=not async_op)
        if work is None:  # a native collective, which has ended
            bound.store()
            return None
        if async_op:
            return work
        work.wait()
        return None

    def _start(
        self, kind: str, bound: Bound, op: ReduceOp, root: int, arrays: int, called_ns: int, *, wait: bool
    ) -> Work | None:
        """Begin a collective; None where the caller would wait and it has ended already."""
        sequence = next(self._sequence)
        deadline_ns = called_ns + round(self._settings.timeout_s * 1e9)
        runner = self._runner
        if isinstance(runner, NativeRunner):
            call = NativeCall(sequence, kind, bound.array, op, root, deadline_ns, called_ns, arrays)
            if wait and runner.run_at_once(call):
                return None
        work = Work(f"{kind} number {sequence}", bound.store if bound.staged else None)
        if isinstance(runner, NativeRunner):
            runner.run(call, work)
            return work
        collective = Collective(
            kind, bound.array.size, bound.dtype.itemsize, accumulation_dtype(bound.dtype).itemsize, root
        )
        descriptor = Descriptor(sequence, kind, op.value, bound.dtype.name, bound.array.size, root, arrays)
        runner.submit(
            Operation(descriptor, self._planner.plan(collective), bound.array, op, work, deadline_ns, called_ns)
        )
        return work

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise UsageError("this communicator was made before a fork; call detcoll.init() in the new process")
        if self._finalized:
            raise Closed("the communicator was finalized")

    def _collective(self, kind: str, nbytes: int, dtype: object) -> Collective:
        element = parse_dtype(dtype)
        check_kind(kind)
        if nbytes < 0 or nbytes % element.itemsize:
            raise UsageError(f"nbytes={nbytes} must be a multiple of {element.itemsize}, the size of {element}")
        count = nbytes // element.itemsize
        return Collective(kind, count, element.itemsize, accumulation_dtype(element).itemsize)

    def _part(self, deadline_ns: int) -> None:
        """Meet once more, so that nobody closes while another still needs an answer."""
        try:
            self._session.exchange("finalize", b"", deadline_ns)
        except TransportError as error:
            log.warning("rank %d: others did not finalize: %s", self.rank, error)

    def _complete_trace(self) -> None:
        """Note what is known at the end only."""
        if self._trace.calendar is not None and isinstance(self._runner, Progress):
            self._trace.calendar["offset_ns"] = self._runner.site_offset_ns
            self._trace.misses = self._runner.missed_windows
        self._trace.counts = self.counters()
        for endpoint in self._assembled.endpoints:
            self._trace.connections.extend(endpoint.connections())

    def _predict_call(self, call: Call, called_ns: int) -> int | None:
        """Return the predicted time of a call in the trace; phases are rounded, so that few have to be computed."""
        if not isinstance(call.subject, Collective):
            return None
        phase_ns = None
        if self._calendar.has_windows:
            cycle_ns = self._calendar.sites[self._topology.site_of(self.rank)].cycle_ns
            step_ns = max(cycle_ns // TRACED_PHASES, 1)
            phase_ns = self._phase_ns(called_ns) // step_ns * step_ns
        return self._planner.predict_ns(call.subject, phase_ns=phase_ns)

    def _write_trace(self) -> None:
        if self._settings.trace is None:
            return
        folder = Path(self._settings.trace)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank{self.rank}.json").write_text(
                json.dumps(self._trace.to_json(self._predict_call)), encoding="utf-8"
            )
        except OSError as error:
            log.warning("trace of rank %d was not written: %s", self.rank, error)


_open: weakref.WeakSet[Communicator] = weakref.WeakSet()


def _costs(facts: Sequence[Facts]) -> Costs:
    """Return what hosts cost, which is the same on all ranks: the most crowded host sets the pace of a call."""
    ranks_on = Counter(fact.host for fact in facts)
    cores_of = {host: set[int]().union(*(fact.cores for fact in facts if fact.host == host)) for host in ranks_on}
    return max(
        (Costs.on_host(count, len(cores_of[host])) for host, count in ranks_on.items()), key=lambda costs: costs.call_ns
    )


def _count_of(x: Any) -> int:
    return len(x) if isinstance(x, list | tuple) else 1


def close_all() -> None:
    """Finalize communicators that were left open when the interpreter ends."""
    for communicator in list(_open):
        with contextlib.suppress(DetcollError):
            communicator.finalize(1.0)
