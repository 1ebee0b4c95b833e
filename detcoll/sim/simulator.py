"""The simulator: the engines of all ranks over modelled lines, in virtual time.

Each rank has the engine of real runs (`detcoll.runtime.engine`), which gets one call of the world and its events; the
engine's actions are executed on modelled links. Ranks do not compare their calls, and nothing fails.

The model, with `detcoll.plan.predict.Costs`:

- Host: one core for each rank. Each step takes ``step_ns``. A local send, a receive into an array and each input of a
  fold add the time to copy their bytes. As in the runtime, tickets (ended sends, arrived messages) are processed in
  order of arrival, and steps that become ready run before the next ticket, lowest step first. One difference: the
  runtime processes all available tickets before it runs such steps, and polls for more every 0.2 ms; the simulator
  processes one ticket at a time.
- Device: copies between it and its host cost the core ``step_ns`` each. Those of one direction follow each other at
  ``device_bytes_per_s``, and the end of each is noticed ``device_latency_ns`` later.
- Local message: arrives ``local_latency_ns`` after the sender's step.
- Wide message: if the collective uses windows, it waits in `detcoll.machine.Slots` and is paced to its window's rate;
  otherwise it leaves at the line's rate. It crosses `WideArea` in parcels. The receiver wakes up ``wake_ns`` after the
  last byte, and the sender's step ends when the acknowledgement arrives, one delay later.
- Fluid mode: a paced message crosses as a whole; its last byte arrives one delay after it was sent at the pace. The
  rates of a calendar never add up to more than the line (`detcoll.plan.check_calendar`), so only parcels could queue.
  This takes two events for each message of any size, and is used for large worlds.

A rank has its result when its engine reports it, as in the runtime. The simulator reads no clock; equal arguments give
equal results.
"""

from __future__ import annotations

import gc
import threading
from bisect import insort
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

from numpy.typing import NDArray

from detcoll.descriptor import Descriptor
from detcoll.errors import PlanError, UsageError
from detcoll.machine import Queued, Slots
from detcoll.plan.calendar import Calendar, Slotting
from detcoll.plan.costs import Costs
from detcoll.plan.ir import Kind, Plan, shared
from detcoll.plan.layout import uses_window
from detcoll.runtime import engine as calls
from detcoll.runtime.actions import Act
from detcoll.runtime.engine import Engine
from detcoll.runtime.group import world
from detcoll.runtime.operation import Operation
from detcoll.runtime.recorder import Recorder
from detcoll.sim.host import Host, Memory, taken_ns
from detcoll.sim.line import WideArea
from detcoll.sim.result import Simulation
from detcoll.topology import Topology
from detcoll.transport import Window
from detcoll.types import ReduceOp

PARCEL_BYTES = 16_384
"""Size of a parcel, the unit in which messages cross a line."""

SEND, FOLD = Kind.SEND, Kind.FOLD
GIVE, POST, FINISH, CLOSE = Act.SEND, Act.RECV, Act.FINISH, Act.CLOSE
"""Module-level copies for comparisons at each step: to look up an enum member in its class takes ten times as long."""

LONGEST_RUN_NS = 3_600_000_000_000

Wide = Queued[calls.Wide]
Lateness = Callable[[int, int], int]
Progress = Callable[[float], None]

STEPS_A_REPORT = 20_000


def _closes_ns(send: tuple[Wide, Window]) -> int:
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
        The plans of all ranks, in rank order.
    topology, calendar
        As the plans were compiled for.
    costs : Costs, optional
        The costs of a host.
    data : sequence of arrays, (n,), optional
        The input of each rank, or its only array; not modified. Without it only time is modelled.
    op : ReduceOp
        The operator that folds data.
    phase_ns : int
        The phase of the calendar's cycle at time zero.
    start_ns : sequence of int, optional
        When each rank calls; by default all at zero.
    lateness : callable, optional
        Called with a rank and the time at which a window opens; returns by how many nanoseconds the rank wakes up late.
    deadline_ns : int
        Virtual time at which the run is stopped.
    fluid : bool
        Let paced messages cross as a whole. The busy times and queues of their lines are then not modelled.
    progress : callable, optional
        Called from time to time with the share of steps that have ended, from 0 to 1.

    Returns
    -------
    Simulation

    Raises
    ------
    UsageError
        If a sequence does not have one entry for each rank, or data does not match the plans.
    PlanError
        If the plans come to a halt, or the deadline passes, before all ranks are done.
    """
    _check_lengths(topology.size, plans=plans, data=data, start_ns=start_ns)
    run = _Run(plans, topology, calendar, costs or Costs(), phase_ns)
    run.lateness, run.fluid, run.progress = lateness or run.lateness, fluid, progress
    run.carry(plans, op, data)
    run.schedule_calls(phase_ns, start_ns)
    run.go(phase_ns + deadline_ns)
    return run.report(phase_ns)


def _check_lengths(size: int, **sequences: Sequence[Any] | None) -> None:
    for name, given in sequences.items():
        if given is not None and len(given) != size:
            raise UsageError(f"{name} has {len(given)} entries; expected one for each of {size} ranks")


class _NoCollection:
    """Keeps the garbage collector disabled while any thread simulates.

    It would repeatedly traverse millions of objects that form no cycles.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._was_enabled = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._was_enabled:
                gc.enable()


_no_collection = _NoCollection()


def _hosts(plans: Sequence[Plan], topology: Topology, calendar: Calendar, costs: Costs) -> list[Host]:
    """Return the hosts of all ranks; they share immutable data."""
    site_of = [topology.site_of(rank) for rank in range(topology.size)]
    wide = [
        frozenset(rank for rank in range(topology.size) if topology.is_wide and site_of[rank] != site)
        for site in range(len(topology.sites))
    ]
    group, recorder, collective = world(site_of), Recorder(), plans[0].collective
    call = Descriptor(0, collective.kind, "", "", collective.count, collective.root)
    hosts = []
    for plan in plans:
        site = site_of[plan.rank]
        slots: Slots[calls.Wide] = Slots(calendar, site, plan.rank, frame_bytes=costs.frame_bytes)
        engine = Engine(plan.rank, site_of, wide[site], slots, None, recorder, lines_cost=True, greets=False)
        engine.join(group, 0)
        operation = Operation(group, call, plan, LONGEST_RUN_NS, 0)
        takes_ns = taken_ns(plan, costs, lines=topology.is_wide)
        hosts.append(Host(site, engine, operation, takes_ns, shared(plan.steps["tag"])))
    return hosts


class _Run:
    """The state of one simulation: hosts, lines, and a heap of scheduled events."""

    def __init__(
        self, plans: Sequence[Plan], topology: Topology, calendar: Calendar, costs: Costs, phase_ns: int
    ) -> None:
        self.calendar, self.costs = calendar, costs
        self.area = WideArea(topology) if topology.is_wide else None
        self.paced = any(uses_window(calendar, plan.collective.nbytes) for plan in plans)
        self.now_ns = phase_ns
        self.lateness: Lateness = _punctual
        self.fluid = False
        self.progress: Progress | None = None
        self.inside_bytes = self.windowed_bytes = 0
        self.hosts = _hosts(plans, topology, calendar, costs)
        self._steps, self._steps_ended = sum(len(plan.steps) for plan in plans), 0
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def carry(self, plans: Sequence[Plan], op: ReduceOp, data: Sequence[NDArray[Any]] | None) -> None:
        """Give each rank its contribution, if there is data."""
        if data is not None:
            for host, plan, values in zip(self.hosts, plans, data, strict=True):
                host.memory = Memory(plan, op, values)

    def schedule_calls(self, phase_ns: int, start_ns: Sequence[int] | None) -> None:
        """Schedule the call of each rank at its time after ``phase_ns``; by default all at once."""
        entry_ns = phase_ns + (self.costs.call_ns if self.area is not None else 0)
        for rank, host in enumerate(self.hosts):
            self.at(entry_ns + (start_ns[rank] if start_ns is not None else 0), self.start, host)

    def at(self, when_ns: int, what: Callable[..., None], *arguments: Any) -> None:
        """Schedule a call of ``what`` at ``when_ns``; events at the same time run in the order of scheduling."""
        self._number += 1
        heappush(self._heap, (when_ns, self._number, what, arguments))

    def go(self, deadline_ns: int) -> None:
        """Run all events until the deadline; raise PlanError if a rank is not done then."""
        with _no_collection:
            while self._heap and self.now_ns <= deadline_ns:
                self.now_ns, _, what, arguments = heappop(self._heap)
                what(*arguments)
        for rank, host in enumerate(self.hosts):
            if host.drained_ns < 0:
                raise PlanError(f"rank {rank} came to a halt; it waits for {host.operation.machine.waiting_for()}")

    def start(self, host: Host) -> None:
        """Let a rank make the call."""
        host.engine.submit(host.operation, self.now_ns)
        host.engine.start_ready(self.now_ns)
        host.engine.retire(self.now_ns)
        self._carry_out(host)
        self._go_on(host)

    def report(self, phase_ns: int) -> Simulation:
        """Return the result, with times relative to ``phase_ns``."""
        up, down = (self.area.uplinks, self.area.downlinks) if self.area else ([], [])
        arrays = tuple(host.memory.result for host in self.hosts if host.memory is not None)
        return Simulation(
            finish_ns=tuple(host.finish_ns - phase_ns for host in self.hosts),
            drained_ns=tuple(host.drained_ns - phase_ns for host in self.hosts),
            uplink_busy_ns=tuple(tuple((a - phase_ns, b - phase_ns) for a, b in queue.busy_ns) for queue in up),
            uplink_wire_bytes=tuple(queue.wire_bytes for queue in up),
            peak_queue_bytes=tuple(queue.peak_bytes for queue in up),
            downlink_peak_bytes=tuple(queue.peak_bytes for queue in down),
            window_share=self.inside_bytes / self.windowed_bytes if self.windowed_bytes else None,
            misses=tuple(host.engine.slots.misses for host in self.hosts),
            trimmed=tuple(host.engine.slots.trimmed for host in self.hosts),
            arrays=arrays or None,
        )

    def _carry_out(self, host: Host) -> None:
        """Execute the engine's actions; copies of lent bytes that cannot be folded yet take no time in the model."""
        actions = host.engine.actions
        for action in actions:
            act = action[0]
            if act == POST:
                self._post(host, action[2])
            elif act == GIVE:
                self._send(host, action[2], action[3], action[4])
            elif act == FINISH:
                host.finish_ns = self.now_ns
            elif act == CLOSE:
                host.drained_ns = self.now_ns
        actions.clear()

    # The core.

    def _go_on(self, host: Host) -> None:
        """Start the engine's next step on the core, else the next ticket; the end of a send takes no core time."""
        engine, tickets, kinds = host.engine, host.tickets, host.operation.columns.kind
        while (work := engine.next_work()) is None and tickets and kinds[tickets[0][0]] == SEND:
            engine.sent(host.operation, tickets.popleft()[0], self.now_ns)
            self._ended(host)
        host.working = work is not None or bool(tickets)
        if work is not None:
            self.at(self.now_ns + host.takes_ns[work[1]], self._worked, host, work[1])
        elif tickets:
            step, values = tickets.popleft()
            self.at(self.now_ns + host.takes_ns[step], self._received, host, step, values)

    def _worked(self, host: Host, step: int) -> None:
        engine, operation = host.engine, host.operation
        if operation.columns.kind[step] == FOLD:
            if step in operation.plan.copies:
                self.at(self._copied_ns(host, step), self._copied, host, step)
            else:
                self._folded(host, step)
        else:
            engine.worked(operation, step, self.now_ns)
            self._carry_out(host)
            if self.paced and operation.columns.peer[step] in engine.wide:
                self._give_the_line(host)
        self._go_on(host)

    def _folded(self, host: Host, step: int) -> None:
        if host.memory is not None:
            host.memory.fold(step)
        host.engine.worked(host.operation, step, self.now_ns)
        self._ended(host)

    def _copied_ns(self, host: Host, step: int) -> int:
        """Return when the device ends a copy that is queued now, behind those before in the same direction."""
        columns, costs = host.operation.columns, self.costs
        target, takes_ns = columns.buffer[step], columns.nbytes[step] / costs.device_bytes_per_s * 1e9
        free_ns = max(self.now_ns, host.device_free_ns.get(target, 0)) + round(takes_ns)
        host.device_free_ns[target] = free_ns
        return free_ns + costs.device_latency_ns

    def _copied(self, host: Host, step: int) -> None:
        self._folded(host, step)
        if not host.working:
            self._go_on(host)

    def _received(self, host: Host, step: int, values: NDArray[Any] | None) -> None:
        if host.memory is not None and values is not None:
            host.memory.take(step, values)
        host.engine.received(host.operation, step, self.now_ns)
        self._ended(host)
        self._go_on(host)

    def _ended(self, host: Host) -> None:
        """Process the end of a step."""
        self._steps_ended += 1
        if self.progress is not None and self._steps_ended % STEPS_A_REPORT == 0:
            self.progress(self._steps_ended / self._steps)
        if host.operation.machine.result_ready:
            host.engine.retire(self.now_ns)
        if host.engine.actions:
            self._carry_out(host)

    def _take_ticket(self, host: Host, step: int, values: NDArray[Any] | None = None) -> None:
        """Queue the end of a step for the core, and wake the core if it is idle."""
        host.tickets.append((step, values))
        if not host.working:
            self._go_on(host)

    # The transport.

    def _post(self, host: Host, step: int) -> None:
        key = (host.operation.columns.peer[step], host.tags[step])
        if key in host.arrived:
            host.tickets.append((step, host.arrived.pop(key)))
        else:
            host.posted[key] = step

    def _arrive(self, host: Host, key: tuple[int, int], values: NDArray[Any] | None) -> None:
        if key in host.posted:
            self._take_ticket(host, host.posted.pop(key), values)
        else:
            host.arrived[key] = values

    def _send(self, host: Host, step: int, queued: Wide | None, window: Window | None) -> None:
        columns, rank = host.operation.columns, host.engine.rank
        peer = columns.peer[step]
        if peer not in host.engine.wide:
            values = host.memory.read(step) if host.memory is not None else None
            there_ns = self.now_ns + self.costs.local_latency_ns
            self.at(there_ns, self._arrive, self.hosts[peer], (rank, host.tags[step]), values)
            host.tickets.append((step, None))
        elif queued is None or window is None or window.not_after_ns is None:
            whole = queued or Queued((host.operation, step), self.hosts[peer].site, peer, columns.nbytes[step])
            self._launch(host, whole, window)
        else:
            insort(host.timed, (queued, window), key=_closes_ns)

    def _give_the_line(self, host: Host) -> None:
        slots = host.engine.slots
        host.engine.give_the_line(self.now_ns)
        self._carry_out(host)
        self._send_timed(host)
        next_ns = slots.next_ns(self.now_ns)
        if next_ns is not None and next_ns > self.now_ns and next_ns != host.asks_ns:
            host.asks_ns = next_ns
            self.at(next_ns, self._ask_again, host)

    def _ask_again(self, host: Host) -> None:
        host.asks_ns = -1
        self._give_the_line(host)

    def _send_timed(self, host: Host) -> None:
        """Send messages whose window is open, as far as they fit before its end; return misses to the engine."""
        by_peer = self.calendar.mode is Slotting.CALENDAR  # each flow at its own rate; otherwise one after another
        missed = []
        while host.timed:
            queued, window = host.timed[0]
            opens_ns = window.not_before_ns + self.lateness(host.engine.rank, window.not_before_ns)
            if self.now_ns < opens_ns:
                self.at(opens_ns, self._send_timed, host)
                break
            host.timed.pop(0)
            flow = queued.peer if by_peer else -1
            begin_ns = max(self.now_ns, host.line_free_ns.get(flow, 0))
            part_bytes = window.fitting_bytes(queued.nbytes, begin_ns, self.costs.frame_bytes)
            if part_bytes:
                host.line_free_ns[flow] = begin_ns + window.takes_ns(part_bytes + self.costs.frame_bytes)
                self._launch(host, queued, window, part_bytes)
            if part_bytes == queued.nbytes:
                host.engine.slots.sent(queued, window)
            else:
                missed.append((queued, window, part_bytes))
        if missed:
            host.engine.missed(missed)
            self._give_the_line(host)

    def _launch(self, host: Host, queued: Wide, window: Window | None, part_bytes: int | None = None) -> None:
        """Put a message or a part of one on the uplink in parcels, at the rate of its window or of the line."""
        assert self.area is not None
        payload_rate = self.area.uplinks[host.site].rate_bytes_per_s * self.area.payload_share
        rate = window.rate_bytes_per_s if window is not None and window.rate_bytes_per_s else payload_rate
        begin_ns = max(self.now_ns, host.connection_free_ns.get(queued.peer, 0))
        is_rest = part_bytes is None or part_bytes == queued.nbytes
        total = (queued.nbytes if part_bytes is None else part_bytes) + self.costs.frame_bytes
        host.connection_free_ns[queued.peer] = begin_ns + int(total / rate * 1e9)
        values = host.memory.read(queued.item[1]) if host.memory is not None else None
        if self.fluid and window is not None:
            self._flow(host, queued, window, total, begin_ns, values if is_rest else None, is_rest)
            return
        for offset in range(0, total, PARCEL_BYTES):
            nbytes = min(PARCEL_BYTES, total - offset)
            last = is_rest and offset + nbytes == total
            self.at(begin_ns + int(offset / rate * 1e9), self._depart, host, queued, window, nbytes, last, values)

    def _depart(
        self, host: Host, queued: Wide, window: Window | None, nbytes: int, last: bool,
        values: NDArray[Any] | None,
    ) -> None:  # fmt: skip
        assert self.area is not None
        site = host.site
        wire_bytes = nbytes / self.area.payload_share
        begin_ns, end_ns = self.area.uplinks[site].take(self.now_ns, wire_bytes)
        if window is not None and self.calendar.sites[site].windows:
            self.windowed_bytes += nbytes
            self.inside_bytes += nbytes if self._owns(host, queued.destination_site, begin_ns, end_ns) else 0
        there_ns = end_ns + self.area.delay_ns[site][queued.destination_site]
        self.at(there_ns, self._cross, host, queued, wire_bytes, last, values)

    def _flow(
        self, host: Host, queued: Wide, window: Window, total_bytes: int, begin_ns: int,
        values: NDArray[Any] | None, is_rest: bool,
    ) -> None:  # fmt: skip
        """Send a message or a part of one as a whole at its pace, without queues."""
        assert self.area is not None
        site, there = host.site, queued.destination_site
        end_ns = begin_ns + window.takes_ns(total_bytes)
        self.area.uplinks[site].wire_bytes += total_bytes / self.area.payload_share
        if self.calendar.sites[site].windows:
            self.windowed_bytes += total_bytes
            self.inside_bytes += total_bytes if self._owns(host, there, begin_ns, end_ns) else 0
        if is_rest:
            self._deliver(host, queued, end_ns + self.area.delay_ns[site][there], values)

    def _deliver(self, host: Host, queued: Wide, there_ns: int, values: NDArray[Any] | None) -> None:
        """Schedule the arrival of a message at ``there_ns``, and the end of its send one delay later."""
        assert self.area is not None
        back_ns = self.area.delay_ns[queued.destination_site][host.site]
        step = queued.item[1]
        key = (host.engine.rank, host.tags[step])
        self.at(there_ns + self.costs.wake_ns, self._arrive, self.hosts[queued.peer], key, values)
        self.at(there_ns + back_ns, self._take_ticket, host, step)

    def _owns(self, host: Host, destination: int, begin_ns: int, end_ns: int) -> bool:
        site = host.site
        cycle_ns = self.calendar.sites[site].cycle_ns
        turn_ns = begin_ns - begin_ns % cycle_ns
        return any(
            window.start_ns <= begin_ns - at_ns and end_ns - at_ns <= window.end_ns
            for window in self.calendar.windows_to(site, host.engine.rank, destination)
            for at_ns in (turn_ns, turn_ns - cycle_ns)
        )

    def _cross(self, host: Host, queued: Wide, wire_bytes: float, last: bool, values: NDArray[Any] | None) -> None:
        assert self.area is not None
        _, end_ns = self.area.downlinks[queued.destination_site].take(self.now_ns, wire_bytes)
        if last:
            self._deliver(host, queued, end_ns, values)
