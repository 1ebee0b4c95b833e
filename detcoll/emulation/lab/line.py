"""The lines of the emulated wide area, in any time: `now_ns` comes in, units that are due come out.

A unit from site i to site j passes

1. the uplink of i, a port of two classes (`detcoll.emulation.lab.port`): in its class it waits behind what is queued
   and leaves at the uplink's rate, headers of every segment counted. What does not fit into the queue, or exceeds the
   rate reserved for the deterministic class, is dropped, segment by segment: the head of the unit that fits is kept;
2. the path from i to j (`detcoll.emulation.lab.path`): the one-way delay of that direction, jitter, random loss of
   single segments, and failures. A lost segment has used its share of the uplink. A unit around a lost segment goes on
   as two units;
3. the downlink of j, a port as well, and a fluid line of its own rate. With F the time at which the first bit of a unit
   would arrive, A that of the last, and W the time at which the downlink is done with what came before, it is done with
   the unit at

       max(A, max(W, F) + wire bytes / rate)

   so that a flow which was shaped to the same rate already passes without waiting for its own bytes twice, and two
   flows that meet queue. A unit is handed over when its last bit has arrived.

Queues are fluid: a queue's backlog is the bytes that came and have not left, the unit under way counted by its
remaining bytes. All bytes are wire bytes as `detcoll.emulation.lab.unit` counts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from heapq import heappop, heappush
from itertools import combinations, count

from detcoll.emulation.lab.conditions import Conditions, Service
from detcoll.emulation.lab.cotenants import PROBE_HOST, Bursts, Probes
from detcoll.emulation.lab.log import ArrivalLog
from detcoll.emulation.lab.path import Path, Piece
from detcoll.emulation.lab.port import Port
from detcoll.emulation.lab.statistics import BurstStatistics, DirectionStatistics, ProbeStatistics
from detcoll.emulation.lab.unit import VNET_HEADER_BYTES, Shape, cut, flow_of, shape_of
from detcoll.job.settings import EXPEDITED_DSCP
from detcoll.topology import Topology

NETWORK = b"\x0a\x4d"
"""10.77: the first two bytes of every address in a lab; the third is the site."""

_TOS = VNET_HEADER_BYTES + 1
_DESTINATION = VNET_HEADER_BYTES + 16
HOST = _DESTINATION + 3
"""Where the last byte of a unit's destination is: 1 for ranks, 2 for others beside them, 3 for probes."""

TENANT_HOST = 2

# Bursts have no events of their own; they are caught up with before each unit, and at least this often.
_CATCH_UP_NS = 10_000_000


class _Stage(IntEnum):
    """What is to happen to a unit, or at a port."""

    ARRIVES = 0
    DONE = 1
    UPLINK = 2
    DOWNLINK = 3


class WideArea:
    """All lines and paths between the sites of a topology.

    Parameters
    ----------
    topology : Topology
        Rates, one-way delays and reserved rates.
    conditions : Conditions
        Queues, classes, loss, jitter, others' traffic and failures.
    log : ArrivalLog, optional
        Gets a record for every unit that reaches an uplink.
    opened_ns : int
        From when times of failures count, and when others' traffic begins.

    Guarantees
    ----------
    Units of one direction and class come out in the order they went in. Nothing depends on a clock but the arguments.
    """

    def __init__(
        self, topology: Topology, conditions: Conditions, log: ArrivalLog | None = None, opened_ns: int = 0
    ) -> None:
        self._log, self._opened_ns = log, opened_ns
        self._uplinks = [_port(site.uplink_bytes_per_s, conditions, topology) for site in topology.sites]
        self._downlinks = [_port(site.downlink_bytes_per_s, conditions, topology) for site in topology.sites]
        self._paths = _paths(topology, conditions, self._uplinks, self._downlinks)
        self._has_classes = any(link.reserved_bytes_per_s is not None for _, link in topology.links)
        self._is_marked = _marked(conditions.service)
        self._bursts = _bursts(topology, conditions, opened_ns)
        self._probes = Probes(
            list(combinations(range(len(topology.sites)), 2)), conditions.probe_gap_ns, conditions.seed
        )
        self._probes.start(opened_ns)
        self._catch_up_ns: float = opened_ns if self._bursts else math.inf
        # due_ns, order, what, and the unit or the number of the port's site
        self._heap: list[tuple[float, int, _Stage, Piece | int]] = []
        self._next_order: Callable[[], int] = count().__next__
        self.unroutable = 0
        self.asleep_ns = 0.0
        """For how long before now nobody could look for arrivals; a policer takes that into account."""

    @property
    def next_ns(self) -> float:
        """When `due` has something to do next; infinite when nothing is under way."""
        others_ns = min(self._catch_up_ns, self._probes.next_ns)
        return min(self._heap[0][0], others_ns) if self._heap else others_ns

    @property
    def under_way(self) -> int:
        """How many units are on their way, roughly."""
        return len(self._heap)

    @property
    def is_urgent(self) -> bool:
        """Whether a kernel waits for what is due next; nobody notices when a probe or a burst is looked at late."""
        if not self._heap or self._heap[0][0] > min(self._catch_up_ns, self._probes.next_ns):
            return False
        return _is_awaited(self._heap[0])

    @property
    def is_awaited(self) -> bool:
        """Whether a kernel waits for anything that is under way."""
        return any(map(_is_awaited, self._heap))

    def arrive(self, source: int, unit: bytes, now_ns: int, is_tenant: bool = False) -> None:
        """Take ``unit`` from site ``source`` into its uplink; what tenants send is best effort however it is marked."""
        if len(unit) > HOST and unit[HOST] == PROBE_HOST:  # nobody but the router sends probes
            self.unroutable += 1
            return
        self._take_in(source, unit, now_ns, is_tenant)

    def _take_in(self, source: int, unit: bytes, now_ns: int, is_tenant: bool) -> None:
        """Take a unit, or a probe, into the uplink of site ``source``."""
        if len(unit) <= HOST or unit[_DESTINATION : _DESTINATION + 2] != NETWORK:
            self.unroutable += 1
            return
        destination = unit[_DESTINATION + 2]
        if destination >= len(self._uplinks) or destination == source:
            self.unroutable += 1
            return
        try:
            shape = shape_of(unit)
        except ValueError:
            self.unroutable += 1
            return
        if self._bursts:
            self._bursts[source].advance(self._uplinks[source], now_ns)
        best_effort, reserved = self._paths[source][destination]
        if reserved is not None and not is_tenant and self._is_marked[unit[_TOS] >> 2]:
            self._enter_reserved(reserved, unit, shape, now_ns)
        else:
            self._enter(best_effort, unit, shape, now_ns)

    def _enter(self, path: Path, unit: bytes, shape: Shape, now_ns: int) -> None:
        """Put a unit into the best-effort queue of its uplink."""
        port = path.up
        taken, wire_bytes, room = shape.segments, shape.wire_bytes, port.room_bytes(now_ns)
        if wire_bytes > room:
            taken, wire_bytes = _fitting(shape, room)
            path.up_drops += shape.segments - taken
        self._record(path, unit, shape, taken, port.limit_bytes - room + wire_bytes, now_ns)
        if not taken:
            return
        end_ns = port.take(wire_bytes, now_ns, now_ns)
        if taken < shape.segments:
            unit = cut(unit, shape, 0, taken)
        self._after(port, end_ns, (path, unit, wire_bytes, now_ns), _Stage.UPLINK, path.source)

    def _enter_reserved(self, path: Path, unit: bytes, shape: Shape, now_ns: int) -> None:
        """Put a unit ahead of the best-effort queue of its uplink, as far as the policer lets it pass."""
        port, policer = path.up, path.policer
        assert policer is not None
        taken, wire_bytes, tokens = shape.segments, shape.wire_bytes, policer.tokens(now_ns, self.asleep_ns)
        if wire_bytes > tokens:
            taken, wire_bytes = _fitting(shape, tokens)
            path.policed += shape.segments - taken
        room = port.reserved_room_bytes(now_ns)
        if wire_bytes > room:
            before, (taken, wire_bytes) = taken, _fitting(shape, room)
            path.up_drops += before - taken
        self._record(path, unit, shape, taken, port.limit_bytes - room + wire_bytes, now_ns)
        if not taken:
            return
        policer.spend(wire_bytes)
        self._settle(_Stage.UPLINK, path.source, max(now_ns, port.overtaking_ns(now_ns)))
        end_ns = port.take_first(wire_bytes, now_ns, now_ns)
        if taken < shape.segments:
            unit = cut(unit, shape, 0, taken)
        self._depart(end_ns, (path, unit, wire_bytes, now_ns))

    def _record(self, path: Path, unit: bytes, shape: Shape, taken: int, queued: float, now_ns: int) -> None:
        """Count a unit that has reached its uplink, of which ``taken`` segments go on, and log it."""
        if taken:
            wire_bytes = shape.wire_bytes_of(taken)
            path.units += 1
            path.segments += taken
            path.wire_bytes += wire_bytes
            path.payload_bytes += wire_bytes - taken * shape.header_bytes
        if self._log is not None:
            self._log.append(now_ns, path.source, path.destination, flow_of(unit), shape.protocol, shape.segments,
                             shape.segments - taken, shape.payload_bytes, shape.wire_bytes, round(queued))  # fmt: skip

    def _after(self, port: Port[Piece], end_ns: float, piece: Piece, stage: _Stage, site: int) -> None:
        """Let a best-effort unit go on once its port is done with it."""
        if not self._has_classes:  # nobody can overtake it
            self._go_on(stage, end_ns, piece)
            return
        if port.next_done_ns is None:
            heappush(self._heap, (end_ns, self._next_order(), stage, site))
        port.remember(end_ns, piece)

    def _settle(self, stage: _Stage, site: int, now_ns: float) -> None:
        """Let go on what a port has done by ``now_ns``."""
        port = (self._uplinks if stage is _Stage.UPLINK else self._downlinks)[site]
        for end_ns, piece in port.done(now_ns):
            self._go_on(stage, end_ns, piece)

    def _go_on(self, stage: _Stage, end_ns: float, piece: Piece) -> None:
        if stage is _Stage.UPLINK:
            self._depart(end_ns, piece)
        else:
            heappush(self._heap, (end_ns, self._next_order(), _Stage.DONE, piece))

    def _depart(self, end_ns: float, piece: Piece) -> None:
        """Send a unit on its path whose last bit has left the uplink at ``end_ns``."""
        path, unit, wire_bytes, came_ns = piece
        losses = path.losses
        if not losses.any:
            self._send(path, unit, wire_bytes, came_ns, end_ns)
            return
        shape = shape_of(unit)
        lost = losses.take(shape.segments)
        path.lost += len(lost)
        first = 0
        for end in [*lost, shape.segments]:
            if end > first:
                before, through = shape.wire_bytes_of(first), shape.wire_bytes_of(end)
                left_ns = end_ns - (wire_bytes - through) * path.up.ns_per_byte
                self._send(path, cut(unit, shape, first, end), through - before, came_ns, left_ns)
            first = end + 1

    def _send(self, path: Path, unit: bytes, wire_bytes: int, came_ns: int, left_ns: float) -> None:
        due_ns = path.arrival_ns(left_ns)
        if path.is_down(left_ns - self._opened_ns, due_ns - self._opened_ns):
            path.failed += shape_of(unit).segments
            return
        heappush(self._heap, (due_ns, self._next_order(), _Stage.ARRIVES, (path, unit, wire_bytes, came_ns)))

    def due(self, now_ns: int) -> list[tuple[float, int, bytes]]:
        """Return what is to be handed over by ``now_ns``: when it was due, the destination site and the unit."""
        if now_ns >= self._catch_up_ns:
            for bursts, port in zip(self._bursts, self._uplinks, strict=True):
                bursts.advance(port, now_ns)
            self._catch_up_ns = now_ns + _CATCH_UP_NS
        for source, unit in self._probes.due(now_ns):
            self._take_in(source, unit, now_ns, is_tenant=True)
        heap = self._heap
        done: list[tuple[float, int, bytes]] = []
        while heap and heap[0][0] <= now_ns:
            due_ns, _, stage, what = heappop(heap)
            if isinstance(what, int):
                self._wake(stage, what, due_ns)
            elif stage is _Stage.ARRIVES:
                self._pass_downlink(what, due_ns)
            else:
                self._hand_over(what, due_ns, now_ns, done)
        return done

    def _wake(self, stage: _Stage, site: int, now_ns: float) -> None:
        """Let go on what a port has done, and look again when the next unit may be."""
        self._settle(stage, site, now_ns)
        port = (self._uplinks if stage is _Stage.UPLINK else self._downlinks)[site]
        if (next_ns := port.next_done_ns) is not None:
            heappush(self._heap, (next_ns, self._next_order(), stage, site))

    def _pass_downlink(self, piece: Piece, due_ns: float) -> None:
        """Take a unit into its downlink whose last bit arrives at ``due_ns``, as much of it as fits."""
        path, unit, wire_bytes, came_ns = piece
        port = path.down
        first_ns = due_ns - wire_bytes * path.up.ns_per_byte
        is_reserved = path.policer is not None
        # What leaves while the unit comes in makes room for it.
        room = (port.reserved_room_bytes if is_reserved else port.room_bytes)(first_ns)
        room += (due_ns - first_ns) * port.bytes_per_ns
        if wire_bytes > room:
            shape = shape_of(unit)
            taken, wire_bytes = _fitting(shape, room)
            path.down_drops += shape.segments - taken
            if not taken:
                return
            unit = cut(unit, shape, 0, taken)
        piece = path, unit, wire_bytes, came_ns
        if is_reserved:
            self._settle(_Stage.DOWNLINK, path.destination, max(due_ns, port.overtaking_ns(first_ns)))
            self._go_on(_Stage.DOWNLINK, port.take_first(wire_bytes, first_ns, due_ns), piece)
        else:
            end_ns = port.take(wire_bytes, first_ns, due_ns, came_ns + path.delay_ns)
            self._after(port, end_ns, piece, _Stage.DOWNLINK, path.destination)

    def _hand_over(self, piece: Piece, due_ns: float, now_ns: int, done: list[tuple[float, int, bytes]]) -> None:
        """Give out a unit that has arrived, or send a probe back."""
        path, unit, _, came_ns = piece
        path.delays.add(due_ns - came_ns)
        if unit[HOST] != PROBE_HOST:
            done.append((due_ns, path.destination, unit))
        elif (back := self._probes.arrived(unit, due_ns - came_ns)) is not None:
            self._take_in(*back, now_ns, is_tenant=True)

    def flush(self) -> None:
        """Put all records so far into the log, where they wait elsewhere."""

    def directions(self) -> tuple[DirectionStatistics, ...]:
        """Return what was counted between each ordered pair of sites, in each class that it has."""
        pairs = (pair for row in self._paths for pair in row)
        paths = (path for pair in pairs for path in pair if path is not None)
        return tuple(path.statistics() for path in paths if path.source != path.destination)

    def peaks(self, service: Service = Service.BEST_EFFORT) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the longest queue of a class at each uplink and at each downlink in bytes."""
        is_reserved = service is Service.DETERMINISTIC
        up, down = (
            tuple(round(port.reserved_peak_bytes if is_reserved else port.peak_bytes) for port in ports)
            for ports in (self._uplinks, self._downlinks)
        )
        return up, down

    def bursts(self) -> tuple[BurstStatistics, ...]:
        """Return what the router's own bursts did at each uplink; nothing where there are none."""
        return tuple(bursts.statistics() for bursts in self._bursts)

    def probe(self) -> ProbeStatistics:
        """Return what the probes found."""
        return self._probes.statistics()


def _port(bytes_per_s: float | None, conditions: Conditions, topology: Topology) -> Port[Piece]:
    return Port(bytes_per_s or math.inf, conditions.queue_bytes, topology.mtu_bytes)


def _paths(
    topology: Topology, conditions: Conditions, uplinks: list[Port[Piece]], downlinks: list[Port[Piece]]
) -> list[list[tuple[Path, Path | None]]]:
    """Return the paths from each site to each other: best effort, and deterministic where a rate is reserved."""
    links = dict(topology.links)
    sites = range(len(topology.sites))

    def between(i: int, j: int) -> tuple[Path, Path | None]:
        link = links.get((min(i, j), max(i, j)))
        reserved = None if link is None else link.reserved_bytes_per_s
        delay_ns, ports = topology.one_way_ns(i, j), (uplinks[i], downlinks[j])
        best_effort = Path(i, j, delay_ns, ports, conditions)
        return best_effort, None if reserved is None else Path(i, j, delay_ns, ports, conditions, reserved)

    return [[between(i, j) for j in sites] for i in sites]


def _marked(service: Service | None) -> tuple[bool, ...]:
    """Return for each code point whether the router puts it in the deterministic class."""
    if service is None:
        return tuple(code == EXPEDITED_DSCP for code in range(64))
    return (service is Service.DETERMINISTIC,) * 64


def _bursts(topology: Topology, conditions: Conditions, opened_ns: int) -> list[Bursts]:
    """Return what others offer each uplink beside their TCP flows; nothing where nobody does."""
    share = conditions.cross_traffic - conditions.tcp_share
    if share <= 0:
        return []
    return [
        Bursts(share * (site.uplink_bytes_per_s or 0.0), topology.mtu_bytes, [conditions.seed, index], opened_ns)
        for index, site in enumerate(topology.sites)
    ]


def _fitting(shape: Shape, room_bytes: float) -> tuple[int, int]:
    """Return how many segments of a unit fit into ``room_bytes``, and their wire bytes."""
    if shape.wire_bytes <= room_bytes:
        return shape.segments, shape.wire_bytes
    taken = max(0, min(int(room_bytes // (shape.segment_bytes + shape.header_bytes)), shape.segments - 1))
    return taken, shape.wire_bytes_of(taken)


def _is_awaited(entry: tuple[float, int, _Stage, Piece | int]) -> bool:
    """Tell whether a kernel waits for this; nobody waits for a probe."""
    what = entry[3]
    return isinstance(what, int) or what[1][HOST] != PROBE_HOST
