"""The simulator: all ranks' machines over modelled lines, in virtual time.

What a run models, with `detcoll.plan.predict.Costs`:

- Host: one core a rank. Each step costs ``step_ns``; a local send, a receive into an array and every input of a fold
  add the time to copy their bytes. As in the runtime, tickets (sends that ended, messages that arrived) are taken in
  the order in which they came, and what one makes ready is done before the next is taken.
- Local message: there ``local_latency_ns`` after its sender is done with it.
- Wide message: waits in `detcoll.machine.Slots` where the collective uses windows, and is paced to its window's rate;
  else it leaves at the line's rate. It crosses `WideArea` in parcels; the receiver wakes up ``wake_ns`` after its last
  byte, and the sender's step ends when an acknowledgement is back, one delay later.

A rank's result is there when its machine says so, as in the runtime. Nothing here reads a clock; equal calls give
equal results.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from detcoll.errors import PlanError, UsageError
from detcoll.machine import Machine, Queued, Slots
from detcoll.plan.calendar import Calendar, Slotting
from detcoll.plan.ir import Buffer, Kind, Plan
from detcoll.plan.layout import uses_window
from detcoll.plan.predict import Costs
from detcoll.sim.host import Host, Job, Memory
from detcoll.sim.line import WideArea
from detcoll.topology import Topology
from detcoll.transport import Window
from detcoll.types import ReduceOp

PARCEL_BYTES = 16_384
"""Payload that crosses a line at once."""

LONGEST_RUN_NS = 3_600_000_000_000

Lateness = Callable[[int, int], int]


def _closes_ns(send: tuple[Queued[int], Window]) -> int:
    return send[1].not_after_ns or 0


def _punctual(rank: int, opens_ns: int) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Simulation:
    """What happened. Times count from the moment that the first rank could have called.

    ``finish_ns`` : by rank, when its result was there.  ``drained_ns`` : when all its steps had ended.
    ``uplink_busy_ns`` : by site, when its uplink carried something.  ``uplink_wire_bytes`` : how much.
    ``peak_queue_bytes`` : by site, the most that waited at its uplink.  ``downlink_peak_bytes`` : at its downlink.
    ``window_share`` : part of the payload sent in windows that left while its sender owned the line; None if nothing
    was.  ``misses``, ``trimmed`` : by rank, as `Slots` counts them.  ``arrays`` : by rank, if data was given.
    """

    finish_ns: tuple[int, ...]
    drained_ns: tuple[int, ...]
    uplink_busy_ns: tuple[tuple[tuple[int, int], ...], ...]
    uplink_wire_bytes: tuple[float, ...]
    peak_queue_bytes: tuple[float, ...]
    downlink_peak_bytes: tuple[float, ...]
    window_share: float | None
    misses: tuple[int, ...]
    trimmed: tuple[int, ...]
    arrays: tuple[NDArray[Any], ...] | None

    @property
    def slowest_ns(self) -> int:
        """When the last rank had its result."""
        return max(self.finish_ns)


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
    run.lateness = lateness or run.lateness
    for rank, host in enumerate(run.hosts):
        if data is not None:
            host.memory = Memory(plans[rank], op, data[rank])
        called_ns = phase_ns + (start_ns[rank] if start_ns is not None else 0)
        run.at(called_ns + (run.costs.call_ns if run.area is not None else 0), run.start, rank)
    run.go(phase_ns + deadline_ns)
    return run.report(phase_ns)


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
        self.inside_bytes = self.windowed_bytes = 0
        self.hosts: list[Host] = []
        for plan in plans:
            site = topology.site_of(plan.rank)
            slots: Slots[int] = Slots(calendar, site, plan.rank, frame_bytes=costs.frame_bytes)
            self.hosts.append(Host(site, Machine(plan), slots, None))
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def at(self, when_ns: int, what: Callable[..., None], *arguments: Any) -> None:
        """Let ``what`` happen at ``when_ns``; of two at one time the earlier asked for comes first."""
        self._number += 1
        heapq.heappush(self._heap, (when_ns, self._number, what, arguments))

    def go(self, deadline_ns: int) -> None:
        """Let everything happen until the deadline."""
        while self._heap and self.now_ns <= deadline_ns:
            self.now_ns, _, what, arguments = heapq.heappop(self._heap)
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
        for step in ready:
            row = host.machine.plan.rows[step]
            if row.kind == Kind.RECV:
                self._post(rank, step, (row.peer, row.tag))
                continue
            nbytes = host.machine.plan.message_bytes(step)
            if row.kind == Kind.FOLD:
                inputs = len(host.machine.plan.inputs_of(step))
                self._work(rank, inputs * self.costs.copy_ns(nbytes), self._folded, step)
            elif row.wide and self.area is not None:
                self._work(rank, 0.0, self._queue, step)
            else:
                self._work(rank, self.costs.copy_ns(nbytes), self._sent_locally, step)

    def _work(self, rank: int, moving_ns: float, then: Callable[..., None], step: int, *arguments: Any) -> None:
        """Let the core of ``rank`` do a step as soon as it has done those that go before it."""
        host = self.hosts[rank]
        job = (self.costs.step_ns + round(moving_ns), then, (rank, step, *arguments))
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
            self.at(self.now_ns + takes_ns, self._worked, host, then, arguments)

    def _worked(self, host: Host, then: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        host.taking = True
        then(*arguments)
        host.taking = False
        host.work.extendleft(reversed(host.follow))
        host.follow.clear()
        self._next_work(host)

    def _ended(self, rank: int, step: int) -> None:
        ready = self.hosts[rank].machine.ended(step)
        self._note_end(rank)
        self._carry_out(rank, ready)

    def _note_end(self, rank: int) -> None:
        host = self.hosts[rank]
        if host.machine.result_ready and host.finish_ns < 0:
            host.finish_ns = self.now_ns
        if host.machine.done and host.drained_ns < 0:
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
        row = self.hosts[rank].machine.plan.rows[step]
        values = self._read(rank, step)
        self.at(self.now_ns + self.costs.local_latency_ns, self._arrive, row.peer, (rank, row.tag), values)
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
        plan = self.hosts[rank].machine.plan
        lent = plan.rows[step].buffer == Buffer.LENT
        moving_ns = 0.0 if lent else self.costs.copy_ns(plan.message_bytes(step))
        self._work(rank, moving_ns, self._received, step, values)

    def _received(self, rank: int, step: int, values: NDArray[Any] | None) -> None:
        memory = self.hosts[rank].memory
        if memory is not None and values is not None:
            memory.take(step, values)
        self._ended(rank, step)

    # What follows is the transport.

    def _queue(self, rank: int, step: int) -> None:
        host = self.hosts[rank]
        peer = host.machine.plan.rows[step].peer
        queued = Queued(step, self.hosts[peer].site, peer, host.machine.plan.message_bytes(step))
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
            tag = self.hosts[rank].machine.plan.rows[queued.item].tag
            back_ns = self.area.delay_ns[queued.destination_site][self.hosts[rank].site]
            self.at(end_ns + self.costs.wake_ns, self._arrive, queued.peer, (rank, tag), values)
            self.at(end_ns + back_ns, self._take_ticket, rank, queued.item)
