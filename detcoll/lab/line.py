"""The lines of the emulated wide area, in any time: `now_ns` comes in, units that are due come out.

A unit from site i to site j passes

1. the uplink of i: it waits behind what is queued and leaves at the uplink's rate, headers of every segment counted.
   What does not fit into the queue is dropped, segment by segment: the head of the unit that fits is kept;
2. the path from i to j: the one-way delay of that direction, and random loss of single segments. A lost segment has
   used its share of the uplink. A unit around a lost segment goes on as two units;
3. the downlink of j: a fluid line of its own rate. With F the time at which the first bit of a unit would arrive, A
   that of the last, and D the time at which the downlink is done with what came before, it is done with the unit at

       max(A, max(D, F) + wire bytes / rate)

   so that a flow which was shaped to the same rate already passes without waiting for its own bytes twice, and two
   flows that meet queue. A unit is handed over when its last bit has arrived.

Queues are fluid: a queue's backlog is the bytes that came and have not left, the unit under way counted by its
remaining bytes. All bytes are wire bytes as `detcoll.lab.unit` counts them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count

from detcoll.lab.log import ArrivalLog
from detcoll.lab.statistics import DirectionStatistics
from detcoll.lab.unit import VNET_HEADER_BYTES, Shape, cut, flow_of, shape_of
from detcoll.topology import Topology

NETWORK = b"\x0a\x4d"
"""10.77: the first two bytes of every address in a lab; the third is the site."""

_DESTINATION = VNET_HEADER_BYTES + 16


class _Losses:
    """Draws which segments are lost: the gaps between losses are geometric, so a unit without one costs nothing."""

    __slots__ = ("_loss", "_random", "gap")

    def __init__(self, loss: float, seed: str) -> None:
        self._loss = loss
        self._random = random.Random(seed)
        self.gap = self._draw()

    def _draw(self) -> int:
        """Return how many segments pass before the next one that is lost."""
        if self._loss <= 0:
            return 1 << 62
        if self._loss >= 1:
            return 0
        return int(math.log(1.0 - self._random.random()) / math.log1p(-self._loss))

    def take(self, segments: int) -> list[int]:
        """Return which of the next ``segments`` are lost, in rising order."""
        lost = []
        at = self.gap
        while at < segments:
            lost.append(at)
            at += 1 + self._draw()
        self.gap = at - segments
        return lost


class _Line:
    """A rate with a queue; ``free_ns`` is when it is done with all that it took."""

    __slots__ = ("bytes_per_ns", "free_ns", "limit_bytes", "ns_per_byte", "peak_bytes")

    def __init__(self, bytes_per_s: float, limit_bytes: int) -> None:
        self.bytes_per_ns = bytes_per_s / 1e9
        self.ns_per_byte = 1e9 / bytes_per_s
        self.limit_bytes = limit_bytes
        self.free_ns = 0.0
        self.peak_bytes = 0.0


class _Direction:
    """What belongs to one ordered pair of sites."""

    __slots__ = ("delay_ns", "destination", "down_drops", "down_line", "losses", "lost", "payload_bytes", "segments",
                 "source", "units", "up_drops", "up_line", "wire_bytes")  # fmt: skip

    def __init__(self, source: int, destination: int, delay_ns: int, losses: _Losses, up: _Line, down: _Line) -> None:
        self.source, self.destination, self.delay_ns, self.losses = source, destination, delay_ns, losses
        self.up_line, self.down_line = up, down
        self.units = self.segments = self.wire_bytes = self.payload_bytes = 0
        self.up_drops = self.lost = self.down_drops = 0

    def statistics(self) -> DirectionStatistics:
        return DirectionStatistics(
            self.source, self.destination, self.units, self.segments, self.wire_bytes, self.payload_bytes,
            self.up_drops, self.lost, self.down_drops,
        )  # fmt: skip


class WideArea:
    """All lines and paths between the sites of a topology.

    Parameters
    ----------
    topology : Topology
        Rates and one-way delays.
    queue_bytes : int
        Size of each uplink's and each downlink's queue.
    loss : float
        Probability with which a segment is lost on its path.
    seed : int
        Of the random losses; each direction draws its own sequence.
    log : ArrivalLog, optional
        Gets a record for every unit that reaches an uplink.

    Guarantees
    ----------
    Units of one direction come out in the order they went in. Nothing depends on a clock but the arguments.
    """

    def __init__(
        self, topology: Topology, queue_bytes: int, loss: float = 0.0, seed: int = 0, log: ArrivalLog | None = None
    ) -> None:
        sites = range(len(topology.sites))
        self._log = log
        self._uplinks = [_Line(site.uplink_bytes_per_s or math.inf, queue_bytes) for site in topology.sites]
        self._downlinks = [_Line(site.downlink_bytes_per_s or math.inf, queue_bytes) for site in topology.sites]
        self._directions = [
            [
                _Direction(i, j, topology.one_way_ns(i, j), _Losses(loss, f"{seed}:{i}:{j}"), self._uplinks[i],
                           self._downlinks[j])
                for j in sites
            ]
            for i in sites
        ]  # fmt: skip
        # due_ns, order, direction (None when the downlink is done with it), destination, wire bytes, unit
        self._heap: list[tuple[float, int, _Direction | None, int, int, bytes]] = []
        self._next_order: Callable[[], int] = count().__next__
        self.unroutable = 0

    @property
    def next_ns(self) -> float:
        """When `due` has something to do next; infinite when nothing is under way."""
        return self._heap[0][0] if self._heap else math.inf

    @property
    def under_way(self) -> int:
        """How many units are on their way."""
        return len(self._heap)

    def arrive(self, source: int, unit: bytes, now_ns: int) -> None:
        """Take ``unit`` from site ``source`` into its uplink."""
        if len(unit) <= _DESTINATION + 3 or unit[_DESTINATION : _DESTINATION + 2] != NETWORK:
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
        direction = self._directions[source][destination]
        line = direction.up_line
        start = line.free_ns if line.free_ns > now_ns else now_ns
        queued = (start - now_ns) * line.bytes_per_ns
        taken, wire_bytes = shape.segments, shape.wire_bytes
        if queued + wire_bytes > line.limit_bytes:
            taken, wire_bytes = _fitting(shape, line.limit_bytes - queued)
            direction.up_drops += shape.segments - taken
        queued += wire_bytes
        if self._log is not None:
            self._log.append(now_ns, source, destination, flow_of(unit), shape.protocol, shape.segments,
                             shape.segments - taken, shape.payload_bytes, shape.wire_bytes, round(queued))  # fmt: skip
        if taken:
            if queued > line.peak_bytes:
                line.peak_bytes = queued
            line.free_ns = start + wire_bytes * line.ns_per_byte
            self._depart(direction, unit, shape, taken, wire_bytes, start)

    def _depart(
        self, direction: _Direction, unit: bytes, shape: Shape, taken: int, wire_bytes: int, start_ns: float
    ) -> None:
        """Send the first ``taken`` segments of ``unit`` on their path; ``start_ns`` is when they begin to leave."""
        direction.units += 1
        direction.segments += taken
        direction.wire_bytes += wire_bytes
        direction.payload_bytes += wire_bytes - taken * shape.header_bytes
        losses = direction.losses
        if taken == shape.segments and losses.gap >= taken:
            losses.gap -= taken
            due = direction.up_line.free_ns + direction.delay_ns
            heappush(self._heap, (due, self._next_order(), direction, direction.destination, wire_bytes, unit))
            return
        lost = losses.take(taken)
        direction.lost += len(lost)
        first = 0
        for end in [*lost, taken]:
            if end > first:
                before, through = shape.wire_bytes_of(first), shape.wire_bytes_of(end)
                due = start_ns + through * direction.up_line.ns_per_byte + direction.delay_ns
                piece = cut(unit, shape, first, end)
                heappush(
                    self._heap,
                    (due, self._next_order(), direction, direction.destination, through - before, piece),
                )
            first = end + 1

    def due(self, now_ns: int) -> list[tuple[float, int, bytes]]:
        """Return what is to be handed over by ``now_ns``: when it was due, the destination site and the unit."""
        heap = self._heap
        done: list[tuple[float, int, bytes]] = []
        while heap and heap[0][0] <= now_ns:
            due, order, direction, destination, wire_bytes, unit = heappop(heap)
            if direction is None:
                done.append((due, destination, unit))
                continue
            busy_until = direction.down_line.free_ns
            finish, unit = _pass_downlink(direction, unit, wire_bytes, due)
            if not unit:
                continue
            if finish <= now_ns and busy_until < due:
                # Nothing else waits for this downlink, so order is kept without another turn through the heap.
                done.append((finish, destination, unit))
            else:
                heappush(heap, (finish, order, None, destination, 0, unit))
        return done

    def directions(self) -> tuple[DirectionStatistics, ...]:
        """Return what was counted between each ordered pair of sites."""
        entries = (entry for row in self._directions for entry in row)
        return tuple(entry.statistics() for entry in entries if entry.source != entry.destination)

    def peaks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the longest queue of each uplink and of each downlink in bytes."""
        up, down = (tuple(round(line.peak_bytes) for line in lines) for lines in (self._uplinks, self._downlinks))
        return up, down


def _fitting(shape: Shape, room_bytes: float) -> tuple[int, int]:
    """Return how many segments of a unit fit into ``room_bytes``, and their wire bytes."""
    if shape.wire_bytes <= room_bytes:
        return shape.segments, shape.wire_bytes
    taken = max(0, min(int(room_bytes // (shape.segment_bytes + shape.header_bytes)), shape.segments - 1))
    return taken, shape.wire_bytes_of(taken)


def _pass_downlink(direction: _Direction, unit: bytes, wire_bytes: int, due_ns: float) -> tuple[float, bytes]:
    """Return when the downlink is done with a unit whose last bit arrives at ``due_ns``, and what it took of it."""
    line = direction.down_line
    first_bit = due_ns - wire_bytes * direction.up_line.ns_per_byte
    start = line.free_ns if line.free_ns > first_bit else first_bit
    finish = start + wire_bytes * line.ns_per_byte
    if finish <= due_ns:
        line.free_ns = due_ns
        return due_ns, unit
    queued = (finish - due_ns) * line.bytes_per_ns
    if queued > line.limit_bytes:
        shape = shape_of(unit)
        taken, wire_bytes = _fitting(shape, line.limit_bytes + (due_ns - start) * line.bytes_per_ns)
        direction.down_drops += shape.segments - taken
        if not taken:
            return due_ns, b""
        unit = cut(unit, shape, 0, taken)
        finish = max(due_ns, start + wire_bytes * line.ns_per_byte)
        queued = (finish - due_ns) * line.bytes_per_ns
    if queued > line.peak_bytes:
        line.peak_bytes = queued
    line.free_ns = finish
    return finish, unit
