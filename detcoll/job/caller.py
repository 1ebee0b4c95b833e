"""Calls of one group: number them, choose their executor, and report a refused call to the group.

Calls of one rank are numbered in the order in which they are made, by any thread; the order must be the same on all
ranks. A call goes to the transport's native collective if it has one for this group, kind, type, operator and size.
Otherwise a plan is compiled and the progress thread executes it. The choice depends only on properties that ranks
compare, so all ranks make the same one.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from detcoll.buffers import Bound
from detcoll.descriptor import digest_of
from detcoll.device import DeviceBuffer, Gate, driver, pinned_memory
from detcoll.errors import Closed, DetcollError, TransportError, UsageError
from detcoll.job.job import Job
from detcoll.job.rails import Rails
from detcoll.plan import Buffer, Calendar, Collective, Plan, Planner
from detcoll.runtime import Descriptor, Group, Memory, Operation, Work
from detcoll.runtime.devices import Devices, OnDevice
from detcoll.runtime.group import WORLD_ID
from detcoll.runtime.native import NativeRunner, Submission
from detcoll.runtime.operation import Span
from detcoll.signature import signature_of
from detcoll.topology import Topology
from detcoll.transport import NativeCall
from detcoll.types import ReduceOp, accumulation_dtype


class Request(msgspec.Struct, frozen=True):
    """A call with its arguments checked.

    ``output`` : where the result goes; of a collective on one array, that array.  ``source`` : the input, None for a
    collective on one array.  ``arrays`` : how many arrays the caller coalesced.  ``counts``, ``out_counts`` : elements
    of blocks that differ in size, see `detcoll.plan.Collective`.  ``result`` : what `Work.wait` returns.
    ``shape`` : what ranks compare of the shapes of their arrays; empty where these may differ.
    ``disturbs`` : whether writing the output on a device changes input there that may still have to be read.
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
    shape: str = ""
    disturbs: bool = False

    @property
    def spans(self) -> Sequence[Span]:
        """The caller's memory; none for a kind that has no array."""
        if not signature_of(self.kind).has_array:
            return ()
        return self.output.spans if self.source is None else self.output.spans + self.source.spans

    @property
    def count(self) -> int:
        """Elements of the whole collective, see `detcoll.plan.Collective`."""
        return self.output.size if self.elems < 0 else self.elems

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
            self.kind, self.count, dtype.itemsize, accumulation_dtype(dtype).itemsize, self.root, self.counts,
            self.out_counts,
        )  # fmt: skip


def devices_of(output: Bound, source: Bound | None = None) -> Devices | None:
    """Return where the arrays of a call are on devices, and what its copies wait for; None if none is on one.

    It is called by the thread that makes the call, whose streams hold what comes before. Of a message, ``output`` is
    its array.

    Raises
    ------
    UsageError
        If a stream captures a CUDA graph.
    DeviceError
        If a device cannot be used.
    """
    buffers: dict[int, DeviceBuffer] = {}
    streams: set[tuple[int, int]] = set()
    for name, bound in ((Buffer.DEVICE_OUT, output), (Buffer.DEVICE_IN, source)):
        if bound is not None and (buffer := bound.buffer) is not None:
            buffers[name] = buffer
            streams |= bound.streams
    if not buffers:
        return None
    return Devices(buffers, [Gate(driver(), device, stream) for device, stream in sorted(streams)])


_Copy = Callable[[int], None] | None
_NOT_STAGED = None, None, None


def _staging_of(request: Request, native: NativeRunner) -> tuple[_Copy, _Copy, OnDevice | None]:
    """Return what fills the input of a native call, what empties its output, and what its transport copies itself."""
    output, source = request.output, request.source
    loads = source or output
    load, store = loads.load if loads.staged else None, output.store if output.staged else None
    devices = devices_of(output, source) if load or store else None
    if devices is None:
        return load, store, None
    if source is None and native.takes_devices:
        return None, None, OnDevice(devices.buffers[Buffer.DEVICE_OUT], devices.gates)
    if loads.buffer is not None:
        load = partial(devices.load, loads.array, Buffer.DEVICE_OUT if source is None else Buffer.DEVICE_IN)
    if output.buffer is not None:
        store = partial(devices.store, output.array)
    return load, store, None


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
        self.native: NativeRunner | None = job.natives.of(group)
        """Runs the transport's native collectives for this group, or None."""
        self._membership = job.membership(group)
        self.planner = Planner(topology, self.rank, calendar, job.costs)
        job.keep_planner(group, self.planner)
        self._rails = Rails.of(job, group, topology, self.rank, calendar)
        self._sequence = itertools.count()
        self._order = threading.Lock()
        self._is_closed = False
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
        native, membership = self.native, self._membership
        if native is not None and native.failure is None and membership is not None and membership.failure is None:
            return  # as below, for less
        failure = self.job.failure(self.group)
        if failure is not None:
            if not self.job.was_told(self.group):
                self.job.note_told(self.group)
                raise failure
            raise Closed(f"the group has ended: {failure}") from failure

    def call(self, request: Request, *, timeout_s: float, name: str, wait: bool) -> Work | None:
        """Start a collective and return its work; None if ``wait`` is set and the collective has already ended."""
        self.check_usable()
        called_ns, timeout_ns = time.monotonic_ns(), round(timeout_s * 1e9)
        with self._order:
            rails = self._rails
            if rails is not None and rails.take(request.kind, request.op, request.output.dtype, request.output.buffer):
                return self._submit(next(self._sequence), request, timeout_ns, called_ns, name, rails)
            native = self.native
            if native is not None and self._is_native(native, request):
                return self._do_native(native, request, timeout_ns, called_ns, name, wait)
            return self._submit(next(self._sequence), request, timeout_ns, called_ns, name)

    def _do_native(
        self, native: NativeRunner, request: Request, timeout_ns: int, called_ns: int, name: str, wait: bool
    ) -> Work | None:  # fmt: skip
        if self.job.ahead.calls:  # before the call has a number, which others would wait for
            self.job.ahead.wait(request.spans, native)
        sequence, output, source = next(self._sequence), request.output, request.source
        try:
            is_staged = output.staged or (source is not None and source.staged)
            load, store, on_device = _staging_of(request, native) if is_staged else _NOT_STAGED
            array = output.array if on_device is None else output.outline
            given = None if source is None else source.array
        except BaseException as error:
            self._tell_refusal(request.kind, sequence, error)
            raise
        call = NativeCall(
            request.kind, array, request.count, request.op, request.root, given, request.counts, request.out_counts,
            request.arrays, name, sequence, request.cut if request.arrays > 1 else (), request.shape, on_device,
            timeout_ns,
        )  # fmt: skip
        release = on_device.release if on_device is not None else None
        if wait and native.run_at_once(call, called_ns, load, store, release):
            return None
        work = Work(f"{request.kind} number {sequence}", request.result, sequence)
        try:
            native.run(Submission(call, called_ns, load, store, release), work)
        except BaseException as error:
            self._tell_refusal(request.kind, sequence, error)
            raise
        self.job.ahead.note(request.spans, work, native)
        return work

    def _is_native(self, native: NativeRunner, request: Request) -> bool:
        """Tell whether the transport does this call by itself; reads nothing that ranks do not compare."""
        if request.source is None:
            return native.supports(request.kind, request.output.dtype, request.op)
        if request.out_counts:  # sizes that differ between ranks decide nothing
            return native.supports(request.kind, request.output.dtype, request.op, uneven=True)
        nbytes = request.count * request.output.dtype.itemsize
        return native.supports(request.kind, request.output.dtype, request.op, nbytes, uneven=bool(request.counts))

    def _submit(
        self, sequence: int, request: Request, timeout_ns: int, called_ns: int, name: str, rails: Rails | None = None
    ) -> Work:  # fmt: skip
        kind, collective, output = request.kind, request.collective, request.output
        is_pairwise = bool(collective.out_counts)
        descriptor = Descriptor(
            sequence, kind, request.op.value, output.dtype.name, 0 if is_pairwise else collective.count,
            collective.root, request.arrays, self._group_text, name,
            "" if is_pairwise else digest_of(collective.counts), cut=digest_of(request.cut), shape=request.shape,
            by="NCCL" if rails is not None else "",
        )  # fmt: skip
        work = Work(f"{kind} number {sequence}", request.result, sequence)
        spans = request.spans
        ahead = self.job.ahead if self.job.natives else None
        hello = b"" if is_pairwise else descriptor.encode()
        try:
            if ahead is not None:
                ahead.wait(spans, None)
            if rails is not None:
                plan, memory = self._on_rails(rails, request, work, hello)
            else:
                plan, memory = self._planned(request, work, hello)
            writes = None if request.source is None else output.spans  # an input that is apart is only read
            self.job.loop.submit(Operation(self.group, descriptor, plan, timeout_ns, called_ns, spans, memory, writes))
        except BaseException as error:
            self._tell_refusal(kind, sequence, error)
            raise
        if ahead is not None:
            ahead.note(spans, work, None)
        return work

    def _planned(self, request: Request, work: Work, hello: bytes) -> tuple[Plan, Memory]:
        output = request.output
        devices = devices_of(output, request.source)
        on_devices = devices.buffers if devices is not None else ()
        plan = self.planner.plan(
            request.collective, device_in=Buffer.DEVICE_IN in on_devices, device_out=Buffer.DEVICE_OUT in on_devices,
            disturbs=request.disturbs,
        )  # fmt: skip
        loads, loaded = request.source or output, Buffer.DEVICE_IN if request.source else Buffer.DEVICE_OUT
        return plan, Memory(
            output.array, request.op, work, hello,
            loads.load if loads.staged and loaded not in on_devices else None,
            output.store if output.staged and Buffer.DEVICE_OUT not in on_devices else None,
            None if request.source is None else request.source.array, devices,
        )  # fmt: skip

    def _on_rails(self, rails: Rails, request: Request, work: Work, hello: bytes) -> tuple[Plan, Memory]:
        output = request.output
        devices = devices_of(output)
        assert devices is not None
        dtype, whole = output.dtype, devices.buffers[Buffer.DEVICE_OUT]
        op = ReduceOp.SUM if request.op is ReduceOp.AVG else request.op  # the last fold divides
        inner = Work(f"{request.kind} by NCCL")
        call = rails.onsite.add(whole, dtype.name, op.value, devices.gates, work, inner)
        elems = call.share.elems if len(self.planner.topology.sites) > 1 else 0
        array = pinned_memory(elems * dtype.itemsize, whole.device).view(dtype)
        on_share = Devices({Buffer.DEVICE_OUT: call.share}, ())
        return rails.plan(request.collective, elems), Memory(
            array, request.op, inner, hello, devices=on_share, onsite=call
        )  # fmt: skip

    def _tell_refusal(self, kind: str, sequence: int, error: BaseException) -> None:
        """Report a call that has a number and was not handed over; others would wait for it."""
        if not isinstance(error, DetcollError):  # such as KeyboardInterrupt
            error = TransportError(f"{error!r} while it called {kind} number {sequence}")
        self.job.refuse(self.group, sequence, error)

    def refuse(self, error: UsageError) -> None:
        """Count a call with invalid arguments, and fail the call of that number on all ranks of the group.

        Ranks that are in that call in the transport already cannot leave it alone, so then the group ends.
        """
        if self.usable and self.job.failure(self.group) is None:
            with self._order:
                self.job.refuse(self.group, next(self._sequence), error)
