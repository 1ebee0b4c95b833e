"""What the router counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detcoll.emulation.lab.conditions import Service


@dataclass(frozen=True, slots=True)
class DirectionStatistics:
    """Traffic of one class from site ``source`` to site ``destination``.

    ``units``, ``segments``, ``wire_bytes`` and ``payload_bytes`` (TCP and UDP) count what the uplink of ``source``
    took. ``uplink_dropped_segments`` found its queue full and ``policed_segments`` exceeded the reserved rate; they are
    not among them. ``lost_segments`` (random loss), ``failed_segments`` (the link was down) and
    ``downlink_dropped_segments`` are among them and did not arrive. Delays are those of units from reaching the uplink
    until their last bit has left the downlink, to within 16 us; None where nothing arrived.
    """

    source: int
    destination: int
    units: int
    segments: int
    wire_bytes: int
    payload_bytes: int
    uplink_dropped_segments: int
    lost_segments: int
    downlink_dropped_segments: int
    service: Service = Service.BEST_EFFORT
    policed_segments: int = 0
    failed_segments: int = 0
    delay_p50_ns: int | None = None
    delay_p99_ns: int | None = None
    delay_max_ns: int | None = None


@dataclass(frozen=True, slots=True)
class BurstStatistics:
    """What the router's own bursts offered one uplink, and how much of it found the queue full; wire bytes."""

    offered_bytes: int
    dropped_bytes: int


@dataclass(frozen=True, slots=True)
class ProbeStatistics:
    """A co-tenant's small packets, best effort: how many were sent, and which came back, on all links together.

    ``sent_ns`` : monotonic time at which each was sent.  ``round_trip_ns`` : how long it took, in the order in which
    they came back; the latest 65,536.
    """

    sent: int
    sent_ns: tuple[int, ...]
    round_trip_ns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FlowStatistics:
    """What others' TCP flows from site ``source`` offered, and what of it arrived; payload.

    ``offered_bytes`` is what the kernel took, which is ahead of what arrived by what is under way and in its buffers.
    ``arrived_bytes`` has a number for each of ``Statistics.flows_at_ns``, counted from the lab's opening on.
    """

    source: int
    offered_bytes: int
    arrived_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Statistics:
    """All that the router counted since the lab opened, and others' TCP flows with it.

    ``directions`` has an entry for each class that an ordered pair of sites has. ``uplink_peak_bytes`` and
    ``downlink_peak_bytes`` are the longest best-effort queue of each site, in wire bytes, with the unit that was added
    last; ``reserved_uplink_peak_bytes`` and ``reserved_downlink_peak_bytes`` those of the deterministic class.
    ``late_mean_ns`` and ``late_peak_ns`` tell how long after its time a unit was handed over, and ``cpu_s`` what the
    router's process used in ``elapsed_s``. ``unroutable`` units were for no site of the lab, ``refused`` ones were not
    taken by the destination's kernel. ``is_compiled`` : whether the router's inner loop ran in C. ``bursts`` and
    ``flows`` are by uplink; of flows there are none where nobody sends over TCP. ``flows_at_ns`` are the monotonic
    times at which those were looked at, about every 0.1 s and in long runs more seldom, the last being that of the
    question.
    """

    directions: tuple[DirectionStatistics, ...]
    uplink_peak_bytes: tuple[int, ...]
    downlink_peak_bytes: tuple[int, ...]
    reserved_uplink_peak_bytes: tuple[int, ...]
    reserved_downlink_peak_bytes: tuple[int, ...]
    bursts: tuple[BurstStatistics, ...]
    probe: ProbeStatistics
    unroutable: int
    refused: int
    late_mean_ns: float
    late_peak_ns: int
    cpu_s: float
    elapsed_s: float
    is_compiled: bool = False
    flows: tuple[FlowStatistics, ...] = ()
    flows_at_ns: tuple[int, ...] = ()

    def direction(self, source: int, destination: int, service: Service = Service.BEST_EFFORT) -> DirectionStatistics:
        """Return what went from site ``source`` to site ``destination`` in a class."""
        for entry in self.directions:
            if (entry.source, entry.destination, entry.service) == (source, destination, service):
                return entry
        raise KeyError(f"no {service.value} direction from site {source} to site {destination}")

    def flows_bytes_per_s(self, spans_ns: Sequence[tuple[int, int]]) -> float | None:
        """Return what others' TCP flows got through in the mean of these times, all sites together; payload.

        None where there are no flows, or nobody looked in these times.
        """
        if not self.flows or len(self.flows_at_ns) < 2:
            return None
        arrived = np.sum([flow.arrived_bytes for flow in self.flows], axis=0)
        first_ns, last_ns = self.flows_at_ns[0], self.flows_at_ns[-1]
        within = [(max(begin, first_ns), min(end, last_ns)) for begin, end in spans_ns]
        ends = np.array([span for span in within if span[1] > span[0]], dtype=np.int64).reshape(-1, 2)
        took_ns = int((ends[:, 1] - ends[:, 0]).sum())
        at_ends = np.interp(ends - first_ns, np.array(self.flows_at_ns) - first_ns, arrived)
        return float((at_ends[:, 1] - at_ends[:, 0]).sum()) / took_ns * 1e9 if took_ns else None

    @property
    def dropped_segments(self) -> int:
        """Segments that found a queue full, all directions."""
        return sum(entry.uplink_dropped_segments + entry.downlink_dropped_segments for entry in self.directions)

    @property
    def policed_segments(self) -> int:
        """Segments that exceeded a reserved rate, all directions."""
        return sum(entry.policed_segments for entry in self.directions)

    @property
    def lost_segments(self) -> int:
        """Segments lost at random, all directions."""
        return sum(entry.lost_segments for entry in self.directions)
