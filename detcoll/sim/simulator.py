"""The simulator: all ranks' machines over modelled lines, in virtual time.

What a run models, with `detcoll.plan.predict.Costs`:

- Host: one core a rank. Each step costs ``step_ns``; a local send, a receive into an array and every input of a fold
  add the time to copy their bytes. As in the runtime, tickets (sends that ended, messages that arrived) are taken in
  the order in which they came, and what one makes ready is done before the next is taken.
- Local message: there ``local_latency_ns`` after its sender is done with it.
- Wide message: waits in `detcoll.machine.Slots` where the collective uses windows, and is paced to its window's rate;
  else it leaves at the line's rate. It crosses `WideArea` in parcels; the receiver wakes up ``wake_ns`` after its last
  byte, and the sender's step ends when an acknowledgement is back, one delay later.
- Fluid: a paced message can cross as a whole instead, its last byte a delay after the pace let it go. Rates of a
  calendar never add up to more than a line (`detcoll.plan.check_calendar`), so nothing would queue but what comes in
  parcels. That is two events a message whatever its size, and what large worlds are simulated with.

A rank's result is there when its machine says so, as in the runtime. Nothing here reads a clock; equal calls give
equal results.
"""

from __future__ import annotations

import gc
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any

from numpy.typing import NDArray

from detcoll.errors import PlanError, UsageError
from detcoll.machine import Machine, Queued, Slots
from detcoll.plan.calendar import Calendar, Slotting
from detcoll.plan.ir import Kind, Plan
from detcoll.plan.layout import uses_window
from detcoll.plan.predict import Costs
from detcoll.sim.host import Columns, Host, Job, Memory
from detcoll.sim.line import WideArea
from detcoll.sim.result import Simulation
from detcoll.topology import Topology
from detcoll.transport import Window
from detcoll.types import ReduceOp

PARCEL_BYTES = 16_384
"""Payload that crosses a line at once."""

LONGEST_RUN_NS = 3_600_000_000_000

Lateness = Callable[[int, int], int]
Progress = Callable[[float], None]

STEPS_A_REPORT = 20_000


def _closes_ns(send: tuple[Queued[int], Window]) -> int:
    return send[1].not_after_ns or 0


def _punctual(rank: int, opens_ns: int) -> int:
    return 0


def simulate(
    plans: Sequence[Plan],
    topology: Topology,
    calendar: Calendar,
    costs: Costs | None = None,
    *,
    data: Sequence[NDArray[Any]] | None = None,
    op: ReduceOp = ReduceOp.SUM,
    phase_ns: int = 0,
    start_ns: Sequence[int] | None = None,
    lateness: Lateness | None = None,
    deadline_ns: int = LONGEST_RUN_NS,
    fluid: bool = False,
    progress: Progress | None = None,
) -> Simulation:
    """Run a collective in virtual time.

    Parameters
    ----------
    plans : sequence of Plan
        All ranks' parts, in rank order.
    topology, calendar
        What they were compiled for.
    costs : Costs, optional
        What a host costs.
    data : sequence of arrays, (count,), optional
        What each rank contributes; not changed. Without it only time is modelled.
    op : ReduceOp
        How to fold data.
    phase_ns : int
        Where in the cycle of the calendar time zero falls.
    start_ns : sequence of int, optional
        When each rank calls; all at zero by default.
    lateness : callable, optional
        How many nanoseconds too late a rank (first argument) wakes up for a window that opens at a time (second).
    deadline_ns : int
        When to give up.
    fluid : bool
        Let paced messages cross as a whole. Then nobody learns when lines are busy or what queues at them.
    progress : callable, optional
        Told now and then which share of all steps has ended.

    Raises
    ------
    UsageError
        If there is not one entry for each rank.
    PlanError
        If the plans come to a halt, or reach the deadline, before every rank is done.
    """
    for name, given in (("plans", plans), ("data", data), ("start_ns", start_ns)):
        if given is not None and len(given) != topology.size:
            raise UsageError(f"{name} has {len(given)} entries; expected one for each of {topology.size} ranks")
    run = _Run(plans, topology, calendar, costs or Costs(), phase_ns)
    run.lateness, run.fluid, run.progress = lateness or run.lateness, fluid, progress
    for rank, host in enumerate(run.hosts):
        if data is not None:
            host.memory = Memory(plans[rank], op, data[rank])
        called_ns = phase_ns + (start_ns[rank] if start_ns is not None else 0)
        run.at(called_ns + (run.costs.call_ns if run.area is not None else 0), run.start, rank)
    run.go(phase_ns + deadline_ns)
    return run.report(phase_ns)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from looking, again and again, at millions of objects that form no cycle."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Run:
    """One simulation on its way: the hosts, the lines, and a heap of what happens when."""

    def __init__(
        self, plans: Sequence[Plan], topology: Topology, calendar: Calendar, costs: Costs, phase_ns: int
    ) -> None:
        self.calendar, self.costs = calendar, costs
        self.area = WideArea(topology) if topology.is_wide else None
        self.paced = uses_window(calendar, plans[0].collective.nbytes)
        self.now_ns = phase_ns
        self.lateness: Lateness = _punctual
        self.fluid = False
        self.progress: Progress | None = None
        self.inside_bytes = self.windowed_bytes = 0
        self.hosts: list[Host] = []
        for plan in plans:
            site = topology.site_of(plan.rank)
            slots: Slots[int] = Slots(calendar, site, plan.rank, frame_bytes=costs.frame_bytes)
            self.hosts.append(Host(site, Machine(plan), Columns(plan, costs, lines=topology.is_wide), slots, None))
        self._steps, self._steps_ended = sum(len(plan.steps) for plan in plans), 0
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def at(self, when_ns: int, what: Callable[..., None], *arguments: Any) -> None:
        """Let ``what`` happen at ``when_ns``; of two at one time the earlier asked for comes first."""
        self._number += 1
        heappush(self._heap, (when_ns, self._number, what, arguments))

    def go(self, deadline_ns: int) -> None:
        """Let everything happen until the deadline."""
        with _no_collection():
            while self._heap and self.now_ns <= deadline_ns:
                self.now_ns, _, what, arguments = heappop(self._heap)
                what(*arguments)
        for rank, host in enumerate(self.hosts):
            if not host.machine.done:
                raise PlanError(f"rank {rank} came to a halt; it waits for {host.machine.waiting_for()}")

    def start(self, rank: int) -> None:
        """Rank ``rank`` calls the collective."""
        self._note_end(rank)
        self._carry_out(rank, self.hosts[rank].machine.start())

    def report(self, phase_ns: int) -> Simulation:
        """Return what happened."""
        up, down = (self.area.uplinks, self.area.downlinks) if self.area else ([], [])
        arrays = tuple(host.memory.user for host in self.hosts if host.memory is not None)
        return Simulation(
            finish_ns=tuple(host.finish_ns - phase_ns for host in self.hosts),
            drained_ns=tuple(host.drained_ns - phase_ns for host in self.hosts),
            uplink_busy_ns=tuple(tuple((a - phase_ns, b - phase_ns) for a, b in queue.busy_ns) for queue in up),
            uplink_wire_bytes=tuple(queue.wire_bytes for queue in up),
            peak_queue_bytes=tuple(queue.peak_bytes for queue in up),
            downlink_peak_bytes=tuple(queue.peak_bytes for queue in down),
            window_share=self.inside_bytes / self.windowed_bytes if self.windowed_bytes else None,
            misses=tuple(host.slots.misses for host in self.hosts),
            trimmed=tuple(host.slots.trimmed for host in self.hosts),
            arrays=arrays or None,
        )

    def _carry_out(self, rank: int, ready: Sequence[int]) -> None:
        host = self.hosts[rank]
        columns = host.columns
        for step in ready:
            kind = columns.kind[step]
            if kind == Kind.RECV:
                self._post(rank, step, (columns.peer[step], columns.tag[step]))
            elif kind == Kind.FOLD:
                self._work(rank, self._folded, step)
            else:
                self._work(rank, self._queue if columns.wide[step] else self._sent_locally, step)

    def _work(self, rank: int, then: Callable[..., None], step: int, *arguments: Any) -> None:
        """Let the core of ``rank`` do a step as soon as it has done those that go before it."""
        host = self.hosts[rank]
        job = (host.columns.takes_ns[step], then, (rank, step, *arguments))
        if host.taking:
            host.follow.append(job)
        else:
            self._wait_for_core(host, job)

    def _take_ticket(self, rank: int, step: int) -> None:
        """Let the core take note that a send has ended."""
        self._wait_for_core(self.hosts[rank], (0, self._ended, (rank, step)))

    def _wait_for_core(self, host: Host, job: Job) -> None:
        host.work.append(job)
        if not host.working:
            self._next_work(host)

    def _next_work(self, host: Host) -> None:
        host.working = bool(host.work)
        if host.working:
            takes_ns, then, arguments = host.work.popleft()
            self._number += 1
            heappush(self._heap, (self.now_ns + takes_ns, self._number, self._worked, (host, then, arguments)))

    def _worked(self, host: Host, then: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        host.taking = True
        then(*arguments)
        host.taking = False
        if host.follow:
            host.work.extendleft(reversed(host.follow))
            host.follow.clear()
        self._next_work(host)

    def _ended(self, rank: int, step: int) -> None:
        ready = self.hosts[rank].machine.ended(step)
        self._steps_ended += 1
        if self.progress is not None and self._steps_ended % STEPS_A_REPORT == 0:
            self.progress(self._steps_ended / self._steps)
        self._note_end(rank)
        self._carry_out(rank, ready)

    def _note_end(self, rank: int) -> None:
        host = self.hosts[rank]
        if host.finish_ns < 0 and host.machine.result_ready:
            host.finish_ns = self.now_ns
        if host.finish_ns >= 0 and host.drained_ns < 0 and host.machine.done:
            host.drained_ns = self.now_ns

    def _folded(self, rank: int, step: int) -> None:
        memory = self.hosts[rank].memory
        if memory is not None:
            memory.fold(step)
        self._ended(rank, step)

    def _read(self, rank: int, step: int) -> NDArray[Any] | None:
        memory = self.hosts[rank].memory
        return memory.read(step) if memory is not None else None

    def _sent_locally(self, rank: int, step: int) -> None:
        columns = self.hosts[rank].columns
        key, values = (rank, columns.tag[step]), self._read(rank, step)
        self.at(self.now_ns + self.costs.local_latency_ns, self._arrive, columns.peer[step], key, values)
        self._take_ticket(rank, step)

    def _post(self, rank: int, step: int, key: tuple[int, int]) -> None:
        host = self.hosts[rank]
        if key in host.arrived:
            self._receive(rank, step, host.arrived.pop(key))
        else:
            host.posted[key] = step

    def _arrive(self, rank: int, key: tuple[int, int], values: NDArray[Any] | None) -> None:
        host = self.hosts[rank]
        if key in host.posted:
            self._receive(rank, host.posted.pop(key), values)
        else:
            host.arrived[key] = values

    def _receive(self, rank: int, step: int, values: NDArray[Any] | None) -> None:
        self._work(rank, self._received, step, values)

    def _received(self, rank: int, step: int, values: NDArray[Any] | None) -> None:
        memory = self.hosts[rank].memory
        if memory is not None and values is not None:
            memory.take(step, values)
        self._ended(rank, step)

    # What follows is the transport.

    def _queue(self, rank: int, step: int) -> None:
        host = self.hosts[rank]
        peer = host.columns.peer[step]
        queued = Queued(step, self.hosts[peer].site, peer, host.columns.nbytes[step])
        if self.paced:
            host.slots.add(queued)
            self._give_the_line(rank)
        else:
            self._launch(rank, queued, None)

    def _give_the_line(self, rank: int) -> None:
        host = self.hosts[rank]
        for queued, window in host.slots.due(self.now_ns):
            if window is not None and window.not_after_ns is not None:
                insort(host.timed, (queued, window), key=_closes_ns)
            else:
                self._launch(rank, queued, window)
        self._send_timed(rank)
        next_ns = host.slots.next_ns(self.now_ns)
        if next_ns is not None and next_ns > self.now_ns and next_ns != host.asks_ns:
            host.asks_ns = next_ns
            self.at(next_ns, self._ask_again, rank)

    def _ask_again(self, rank: int) -> None:
        self.hosts[rank].asks_ns = -1
        self._give_the_line(rank)

    def _send_timed(self, rank: int) -> None:
        """Send what is in its window now, as far as it will have left by the window's end."""
        host = self.hosts[rank]
        by_peer = self.calendar.mode is Slotting.CALENDAR  # each flow at its own rate; else one after another
        missed = []
        while host.timed:
            queued, window = host.timed[0]
            opens_ns = window.not_before_ns + self.lateness(rank, window.not_before_ns)
            if self.now_ns < opens_ns:
                self.at(opens_ns, self._send_timed, rank)
                break
            host.timed.pop(0)
            flow = queued.peer if by_peer else -1
            begin_ns = max(self.now_ns, host.line_free_ns.get(flow, 0))
            part_bytes = window.fitting_bytes(queued.nbytes, begin_ns, self.costs.frame_bytes)
            if part_bytes:
                host.line_free_ns[flow] = begin_ns + window.takes_ns(part_bytes + self.costs.frame_bytes)
                self._launch(rank, queued, window, part_bytes)
            if part_bytes == queued.nbytes:
                host.slots.sent(queued, window)
            else:
                missed.append((queued, window, part_bytes))
        if missed:
            host.slots.missed(missed)
            self._give_the_line(rank)

    def _launch(self, rank: int, queued: Queued[int], window: Window | None, part_bytes: int | None = None) -> None:
        """Put a message or a part of one on the uplink, parcel by parcel, as fast as its window or the line allows."""
        assert self.area is not None
        host = self.hosts[rank]
        payload_rate = self.area.uplinks[host.site].rate_bytes_per_s * self.area.payload_share
        rate = window.rate_bytes_per_s if window is not None and window.rate_bytes_per_s else payload_rate
        begin_ns = max(self.now_ns, host.connection_free_ns.get(queued.peer, 0))
        is_rest = part_bytes is None or part_bytes == queued.nbytes
        total = (queued.nbytes if part_bytes is None else part_bytes) + self.costs.frame_bytes
        host.connection_free_ns[queued.peer] = begin_ns + int(total / rate * 1e9)
        values = self._read(rank, queued.item)
        if self.fluid and window is not None:
            self._flow(rank, queued, window, total, begin_ns, values if is_rest else None, is_rest)
            return
        for offset in range(0, total, PARCEL_BYTES):
            nbytes = min(PARCEL_BYTES, total - offset)
            last = is_rest and offset + nbytes == total
            self.at(begin_ns + int(offset / rate * 1e9), self._depart, rank, queued, window, nbytes, last, values)

    def _depart(
        self, rank: int, queued: Queued[int], window: Window | None, nbytes: int, last: bool,
        values: NDArray[Any] | None,
    ) -> None:  # fmt: skip
        assert self.area is not None
        site = self.hosts[rank].site
        wire_bytes = nbytes / self.area.payload_share
        begin_ns, end_ns = self.area.uplinks[site].take(self.now_ns, wire_bytes)
        if window is not None and self.calendar.sites[site].windows:
            self.windowed_bytes += nbytes
            self.inside_bytes += nbytes if self._owns(rank, queued.destination_site, begin_ns, end_ns) else 0
        there_ns = end_ns + self.area.delay_ns[site][queued.destination_site]
        self.at(there_ns, self._cross, rank, queued, wire_bytes, last, values)

    def _flow(
        self, rank: int, queued: Queued[int], window: Window, total_bytes: int, begin_ns: int,
        values: NDArray[Any] | None, is_rest: bool,
    ) -> None:  # fmt: skip
        """Let all of a message or of a part of one leave at its pace, and nothing queue."""
        assert self.area is not None
        site, there = self.hosts[rank].site, queued.destination_site
        end_ns = begin_ns + window.takes_ns(total_bytes)
        self.area.uplinks[site].wire_bytes += total_bytes / self.area.payload_share
        if self.calendar.sites[site].windows:
            self.windowed_bytes += total_bytes
            self.inside_bytes += total_bytes if self._owns(rank, there, begin_ns, end_ns) else 0
        if is_rest:
            self._deliver(rank, queued, end_ns + self.area.delay_ns[site][there], values)

    def _deliver(self, rank: int, queued: Queued[int], there_ns: int, values: NDArray[Any] | None) -> None:
        """Let the last byte of a message be at its destination at ``there_ns``, and an acknowledgement go back."""
        assert self.area is not None
        host = self.hosts[rank]
        back_ns = self.area.delay_ns[queued.destination_site][host.site]
        key = (rank, host.columns.tag[queued.item])
        self.at(there_ns + self.costs.wake_ns, self._arrive, queued.peer, key, values)
        self.at(there_ns + back_ns, self._take_ticket, rank, queued.item)

    def _owns(self, rank: int, destination: int, begin_ns: int, end_ns: int) -> bool:
        site = self.hosts[rank].site
        cycle_ns = self.calendar.sites[site].cycle_ns
        turn_ns = begin_ns - begin_ns % cycle_ns
        return any(
            window.start_ns <= begin_ns - at_ns and end_ns - at_ns <= window.end_ns
            for window in self.calendar.windows_to(site, rank, destination)
            for at_ns in (turn_ns, turn_ns - cycle_ns)
        )

    def _cross(
        self, rank: int, queued: Queued[int], wire_bytes: float, last: bool, values: NDArray[Any] | None
    ) -> None:
        assert self.area is not None
        _, end_ns = self.area.downlinks[queued.destination_site].take(self.now_ns, wire_bytes)
        if last:
            self._deliver(rank, queued, end_ns, values)
