"""The lines between sites as the relay keeps them, in any time: `now_ns` comes in, what is due comes out.

A relay sees streams, not packets. What it reads at once from a connection, a *piece*, is charged as the segments it
would fill: with m the MTU and h = 52 bytes of IP and TCP headers with timestamps (RFC 791, 793, 7323), n bytes cost

    n + h * max(1, ceil(n / (m - h)))

bytes of the line; the opening of a connection, its answer and its end cost one segment without payload each.

A piece from site i to site j, c bytes of the line, read at time t, then passes

1. the uplink of i: with W the time at which it is done with what came before, it is done at W = max(W, t) + c / rate;
2. the path: A = W + one-way delay is when its last bit arrives, F = A - c / uplink rate its first;
3. the downlink of j, which is done with it at D = max(A, max(D, F) + c / rate), so that what was shaped to the same
   rate does not wait for its own bytes twice, and flows that meet there queue. The piece is handed over at D.

Nothing is dropped. Instead a line is closed to more pieces while its uplink has more than ``buffer_bytes`` waiting, or
while more is under way to its downlink than that and what the downlink carries in the longest delay to it: whoever
reads the connections stops, and the sender's TCP fills up. So memory is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count, product
from typing import Generic, TypeVar

from detcoll.topology import TCP_IP_HEADER_BYTES, Topology

T = TypeVar("T")

_PIECE_NS = 500_000
_LARGEST_PIECE_BYTES = 65_536


@dataclass(slots=True)
class Direction:
    """What was carried from one site to another: payload of connections, bytes of the line, and pieces with payload."""

    source: int
    destination: int
    payload_bytes: int = 0
    wire_bytes: int = 0
    pieces: int = 0


class _Uplink:
    """When an uplink is done with what came, and how long its queue may be."""

    __slots__ = ("buffer_ns", "free_ns", "ns_per_byte", "peak_ns")

    def __init__(self, bytes_per_s: float, buffer_bytes: int) -> None:
        self.ns_per_byte = 1e9 / bytes_per_s
        self.buffer_ns = buffer_bytes * self.ns_per_byte
        self.free_ns = self.peak_ns = 0.0


class _Downlink:
    """When a downlink is done with what came, and how much is under way to it."""

    __slots__ = ("free_ns", "limit_bytes", "ns_per_byte", "under_way_bytes")

    def __init__(self, bytes_per_s: float, longest_ns: int, buffer_bytes: int) -> None:
        self.ns_per_byte = 1e9 / bytes_per_s
        self.limit_bytes = buffer_bytes + longest_ns / self.ns_per_byte
        self.free_ns = 0.0
        self.under_way_bytes = 0


class Lines(Generic[T]):
    """All lines and paths between the sites of a topology; ``T`` is what is remembered of a piece.

    Parameters
    ----------
    topology : Topology
        Rates and one-way delays; every site has an uplink and a downlink.
    buffer_bytes : int
        What may wait at each line before it is closed to more.

    Guarantees
    ----------
    Pieces of one direction come out in the order they went in. Nothing depends on a clock but the arguments.
    """

    def __init__(self, topology: Topology, buffer_bytes: int) -> None:
        sites = range(len(topology.sites))
        self._delays_ns = {(i, j): topology.one_way_ns(i, j) for i, j in product(sites, sites) if i != j}
        self._segment_bytes = topology.mtu_bytes - TCP_IP_HEADER_BYTES
        self._uplinks = [_Uplink(site.uplink_bytes_per_s or math.inf, buffer_bytes) for site in topology.sites]
        self._downlinks = [
            _Downlink(
                site.downlink_bytes_per_s or math.inf,
                max(delay_ns for (_, to), delay_ns in self._delays_ns.items() if to == j),
                buffer_bytes,
            )
            for j, site in enumerate(topology.sites)
        ]
        self._directions = {pair: Direction(*pair) for pair in self._delays_ns}
        # due_ns, order, whether it has passed the downlink, direction, bytes of the line, and what is remembered
        self._heap: list[tuple[float, int, bool, tuple[int, int], int, T]] = []
        self._next_order: Callable[[], int] = count().__next__

    def piece_bytes(self, source: int) -> int:
        """Return how much to read at once from a connection of a site: whole segments, half a millisecond of line."""
        wanted = min(_PIECE_NS / self._uplinks[source].ns_per_byte, _LARGEST_PIECE_BYTES)
        return max(1, int(wanted / self._segment_bytes)) * self._segment_bytes

    def cost_bytes(self, payload_bytes: int) -> int:
        """Return what a piece costs on a line."""
        return payload_bytes + TCP_IP_HEADER_BYTES * max(1, -(-payload_bytes // self._segment_bytes))

    def opens_ns(self, source: int, destination: int) -> float:
        """Return from when the line takes another piece; infinite where something has to be due first."""
        downlink, uplink = self._downlinks[destination], self._uplinks[source]
        return math.inf if downlink.under_way_bytes > downlink.limit_bytes else uplink.free_ns - uplink.buffer_ns

    def carry(self, source: int, destination: int, payload_bytes: int, what: T, now_ns: float) -> None:
        """Take a piece into the uplink of ``source``, also where the line is closed."""
        uplink, downlink = self._uplinks[source], self._downlinks[destination]
        cost = self.cost_bytes(payload_bytes)
        uplink.free_ns = max(uplink.free_ns, now_ns) + cost * uplink.ns_per_byte
        uplink.peak_ns = max(uplink.peak_ns, uplink.free_ns - now_ns)
        downlink.under_way_bytes += cost
        direction = self._directions[source, destination]
        direction.payload_bytes += payload_bytes
        direction.wire_bytes += cost
        direction.pieces += payload_bytes > 0
        arrives_ns = uplink.free_ns + self._delays_ns[source, destination]
        heappush(self._heap, (arrives_ns, self._next_order(), False, (source, destination), cost, what))

    @property
    def next_ns(self) -> float:
        """When `due` has something to do next; infinite when nothing is under way."""
        return self._heap[0][0] if self._heap else math.inf

    def due(self, now_ns: float) -> list[tuple[float, T]]:
        """Return what is to be handed over by ``now_ns``, in order, and when each was due."""
        done: list[tuple[float, T]] = []
        while self._heap and self._heap[0][0] <= now_ns:
            due_ns, _, has_passed, pair, cost, what = heappop(self._heap)
            downlink = self._downlinks[pair[1]]
            if has_passed:
                downlink.under_way_bytes -= cost
                done.append((due_ns, what))
                continue
            first_ns = due_ns - cost * self._uplinks[pair[0]].ns_per_byte
            downlink.free_ns = max(due_ns, max(downlink.free_ns, first_ns) + cost * downlink.ns_per_byte)
            heappush(self._heap, (downlink.free_ns, self._next_order(), True, pair, cost, what))
        return done

    def directions(self) -> tuple[Direction, ...]:
        """Return what was carried between each ordered pair of sites."""
        return tuple(self._directions.values())

    def peaks_bytes(self) -> tuple[int, ...]:
        """Return the longest queue of each uplink, the piece under way included."""
        return tuple(round(uplink.peak_ns / uplink.ns_per_byte) for uplink in self._uplinks)
