"""Times collectives over sizes on the ranks of a communicator, and checks every result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.bench.consumption import Meter
from detcoll.bench.start import CallTimes, Starter, combine
from detcoll.bench.verification import Contents, reduction_of
from detcoll.errors import UsageError
from detcoll.measure.kernel import NetworkCounts, network_counts
from detcoll.measure.results import Row
from detcoll.measure.statistics import tails
from detcoll.plan import Collective, Symbols, declaration_of
from detcoll.plan.collectives.declaration import Content
from detcoll.signature import DECLARED, signature_of
from detcoll.types import parse_dtype
from detcoll.workloads.arrays import CPU, Arrays, arrays_on, require_device

ROOT = 0
GB = 10**9

_LateWindows = tuple[int, int] | None
"""How many windows were missed, and how many trimmed; None where lines have no slots."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What to time: each of ``collectives`` at each of ``sizes_bytes``, ``iterations`` times after ``warmup`` calls.

    A barrier has no size and is timed once. ``empty`` : arrays come from `Communicator.empty`. ``time_limit_s`` : no
    more calls begin once those of a point have taken so long, warm-up included; one is timed in any case. ``devices`` :
    where arrays are, "cpu" or "cuda", one after another.
    """

    collectives: tuple[str, ...]
    sizes_bytes: tuple[int, ...]
    dtype: str
    iterations: int
    warmup: int
    empty: bool = False
    time_limit_s: float | None = None
    devices: tuple[str, ...] = (CPU,)

    def validate(self) -> None:
        """Refuse what cannot be run.

        Raises
        ------
        UsageError
            If a collective, size, type, count or device is not usable; names it and what was expected.
        """
        dtype = parse_dtype(self.dtype)
        itemsize = dtype.itemsize
        for name in self.collectives:
            if name not in DECLARED:
                raise UsageError(f"collective={name!r} is not known; expected {', '.join(DECLARED)}")
        for size in self.sizes_bytes:
            if size < itemsize or size % itemsize:
                raise UsageError(f"bytes={size} must be a positive multiple of {itemsize}, the size of {self.dtype}")
        if not self.collectives or not self.sizes_bytes:
            raise UsageError("a sweep needs at least one collective and one size")
        for name, count, least in (("iterations", self.iterations, 1), ("warmup", self.warmup, 0)):
            if count < least:
                raise UsageError(f"{name}={count} must be at least {least}")
        if self.time_limit_s is not None and self.time_limit_s <= 0:
            raise UsageError(f"time_limit_s={self.time_limit_s:g} must be more than 0")
        self._validate_devices(dtype)

    def _validate_devices(self, dtype: np.dtype[Any]) -> None:
        if not self.devices:
            raise UsageError("a sweep needs at least one device")
        if self.empty and set(self.devices) != {CPU}:
            raise UsageError("empty=True is for arrays of the host; expected device='cpu' with it")
        for device in self.devices:
            require_device(device, dtype)

    def points(self) -> list[tuple[str, int]]:
        """Return each collective with each of its sizes."""
        return [
            (name, size)
            for name in self.collectives
            for size in (self.sizes_bytes if signature_of(name).has_array else (0,))
        ]


def run_sweep(
    comm: Any,
    sweep: Sweep,
    on_row: Callable[[Row], None] | None = None,
    arrays_on: Callable[[str, Any], Arrays] = arrays_on,
) -> tuple[Row, ...]:
    """Time every point of ``sweep``; all ranks call it and get the same rows.

    Parameters
    ----------
    comm : Communicator
        Whose ranks take part.
    sweep : Sweep
        What to time.
    on_row : callable, optional
        Gets each row as soon as it is there.
    arrays_on : callable, optional
        Returns what makes the arrays on a device, given its name and the communicator.

    Raises
    ------
    TransportError
        If a result is wrong; names the first element that differs.
    """
    sweep.validate()
    start = Starter(comm)
    rows = []
    for arrays, (collective, nbytes) in product([arrays_on(name, comm) for name in sweep.devices], sweep.points()):
        case = Case(comm, collective, nbytes, sweep, arrays)
        before = network_counts()
        times, cost = _time_calls(comm, start, case, sweep)
        again = _retransmits(comm, network_counts().since(before))
        row = _row(comm, sweep, case, times, cost, start.kind, again)
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return tuple(rows)


class Case:
    """One collective at one size: its arrays, what goes in and what must come out.

    ``nbytes`` is that of the largest array of a rank, rounded up to equal blocks where the kind has blocks.
    ``array`` and ``out`` are the arrays of the call. Values are written to and compared on the host.
    """

    def __init__(self, comm: Any, collective: str, nbytes: int, sweep: Sweep, arrays: Arrays) -> None:
        dtype, size = parse_dtype(sweep.dtype), comm.size
        self.collective, self.dtype = collective, sweep.dtype
        self.signature, self.arrays, self._comm = signature_of(collective), arrays, comm
        declared, elements = declaration_of(collective), nbytes // dtype.itemsize
        if self.signature.has_counts:
            elements = -(-elements // size) * size
        self.nbytes = elements * dtype.itemsize
        what = Collective(collective, elements, dtype.itemsize, dtype.itemsize, ROOT)
        gives, gets = declared.elems(what, size, comm.rank)
        if declared.has_one_array:
            gives = elements

        def contents(state: Content) -> Contents:
            symbols = Symbols()
            return Contents.stated(dtype, size, symbols, state(symbols, what, comm.topology, comm.rank))

        self._input, self._expected = contents(declared.before), contents(declared.after)
        make = comm.empty if sweep.empty else np.zeros
        self._given: NDArray[Any] = make(gives, dtype)
        self._got: NDArray[Any] = make(gets, dtype) if self.signature.has_out else self._given[:gets]
        self.array = arrays.array(self._given)
        self.out, self._landed = self.array, self._given
        if self.signature.has_out:
            self.out, self._landed = arrays.array(self._got), self._got

    def prepare(self) -> None:
        """Write what goes in."""
        self._input.write(self._given)
        self.arrays.upload(self._given, self.array)

    def call(self) -> None:
        """Do what is timed."""
        arguments: dict[str, Any] = {"op": reduction_of(self._given.dtype).value} if self.signature.has_op else {}
        if self.signature.has_root:
            arguments["root"] = ROOT
        if self.signature.has_out:
            arguments["out"] = self.out
        arrays = (self.array,) if self.signature.has_array else ()
        getattr(self._comm, self.collective)(*arrays, **arguments)
        self.arrays.settle()

    def verify(self) -> None:
        """Compare what came out.

        Raises
        ------
        TransportError
            If it is wrong.
        """
        self.arrays.download(self.out, self._landed)
        self._expected.require(self._got, f"{self.collective} of {self.nbytes} bytes, rank {self._comm.rank}")


@dataclass(frozen=True, slots=True)
class _Cost:
    """What calls cost all ranks.

    Processor time of all together in seconds a call, the greatest memory of any, and how many windows of all were
    missed and trimmed.
    """

    processor_s: float
    extra_bytes: int | None
    late_windows: _LateWindows


def _time_calls(comm: Any, start: Starter, case: Case, sweep: Sweep) -> tuple[CallTimes, _Cost]:
    entered, left = np.zeros(sweep.iterations, np.int64), np.zeros(sweep.iterations, np.int64)
    meter, before, timed, begun_ns = Meter(), _late_windows(comm), 0, time.monotonic_ns()
    for number in range(-sweep.warmup, sweep.iterations):
        if number == 0:
            before = _late_windows(comm)
        case.prepare()
        meter.prepare()
        start()
        meter.enter(timed=number >= 0)
        entered_ns = time.monotonic_ns()
        case.call()
        left_ns = time.monotonic_ns()
        meter.leave()
        case.verify()
        if number >= 0:
            entered[number], left[number] = entered_ns, left_ns
            timed = number + 1
            if timed < sweep.iterations and _is_late(comm, sweep, begun_ns):
                break
    after = _late_windows(comm)
    comm.barrier()
    processor_s = np.array([meter.processor_s()])
    comm.all_reduce(processor_s, op="sum")
    extra_bytes = meter.extra_bytes()
    greatest = np.array([-1 if extra_bytes is None else extra_bytes], np.int64)
    comm.all_reduce(greatest, op="max")
    cost = _Cost(
        float(processor_s[0]) / timed,
        int(greatest[0]) if greatest[0] >= 0 else None,
        _over_all_ranks(comm, before, after),
    )
    return combine(comm, start.kind, entered[:timed], left[:timed]), cost


def _is_late(comm: Any, sweep: Sweep, begun_ns: int) -> bool:
    """Tell whether any rank has come to the end of its time; where time is limited all ranks call it."""
    if sweep.time_limit_s is None:
        return False
    late = np.array([time.monotonic_ns() - begun_ns >= sweep.time_limit_s * 1e9], np.int64)
    comm.all_reduce(late, op="max")
    return bool(late[0])


def _late_windows(comm: Any) -> _LateWindows:
    counted = comm.counters()
    return (counted["slot_misses"], counted["slot_trims"]) if "slot_misses" in counted else None


def _over_all_ranks(comm: Any, before: _LateWindows, after: _LateWindows) -> _LateWindows:
    """Return how many windows of all ranks were missed and trimmed meanwhile."""
    if before is None or after is None:
        return None
    total = np.array(after, np.int64) - np.array(before, np.int64)
    comm.all_reduce(total, op="sum")
    return int(total[0]), int(total[1])


def _predicted_s(comm: Any, case: Case, began_ns: tuple[int, ...]) -> float | None:
    """Return the median of what was predicted for calls at these times; on devices, with rates that rank 0 measured."""
    if not case.signature.has_array:
        return None
    on_device = case.arrays.device != CPU
    each = [
        comm.predict(case.collective, case.nbytes, case.dtype, called_ns=at_ns, on_device=on_device)
        for at_ns in began_ns
    ]
    if None in each:
        return None
    predicted_s = np.array([np.median(each)])
    if on_device:
        comm.broadcast(predicted_s, root=0)
    return float(predicted_s[0])


def _retransmits(comm: Any, counts: NetworkCounts) -> int | None:
    """Return what the kernels of all sites sent again, which the first rank of each tells; all ranks call it."""
    if not comm.topology.is_wide:
        return None
    is_first = comm.topology.sites[comm.topology.site_of(comm.rank)].ranks[0] == comm.rank
    known = counts.retransmits is not None
    total = np.array([counts.retransmits if is_first and known else 0, 0 if known else 1], np.int64)
    comm.all_reduce(total, op="sum")
    return None if total[1] else int(total[0])


def _row(
    comm: Any, sweep: Sweep, case: Case, times: CallTimes, cost: _Cost, kind: str, retransmits: int | None
) -> Row:  # fmt: skip
    seen = tails(times.calls_s)
    has_size = case.signature.has_array
    bound_s = comm.bound(case.collective, case.nbytes) if has_size else None
    predicted_s = _predicted_s(comm, case, times.began_ns)
    return Row(
        collective=case.collective,
        transport=comm.transport,
        algorithm=comm.algorithm(case.collective, case.nbytes, case.dtype) if has_size else None,
        ranks=comm.size,
        sites=len(comm.topology.sites),
        dtype=case.dtype,
        bytes=case.nbytes,
        median_s=seen.median,
        min_s=seen.least,
        max_s=seen.greatest,
        p99_s=seen.p99,
        bound_s=bound_s,
        predicted_s=predicted_s,
        fraction_of_bound=bound_s / seen.median if bound_s is not None else None,
        prediction_error=predicted_s / seen.median - 1 if predicted_s is not None else None,
        iterations=len(times.calls_s),
        empty=sweep.empty,
        start=kind,
        skew_s=float(np.median(times.skew_s)) if times.skew_s is not None else None,
        slot_misses=cost.late_windows[0] if cost.late_windows else None,
        slot_trims=cost.late_windows[1] if cost.late_windows else None,
        cpu_s_per_gb=cost.processor_s / (case.nbytes * comm.size / GB) if has_size else None,
        extra_memory_bytes=cost.extra_bytes,
        retransmits=retransmits,
        samples_s=times.calls_s,
        began_s=tuple(at_ns / 1e9 for at_ns in times.began_ns),
        device=case.arrays.device,
    )
