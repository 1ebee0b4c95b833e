"""What the router counted."""

from __future__ import annotations

from dataclasses import dataclass

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
class Statistics:
    """All that the router counted since the lab opened.

    ``directions`` has an entry for each class that an ordered pair of sites has. ``uplink_peak_bytes`` and
    ``downlink_peak_bytes`` are the longest best-effort queue of each site, in wire bytes, with the unit that was added
    last; ``reserved_uplink_peak_bytes`` and ``reserved_downlink_peak_bytes`` those of the deterministic class.
    ``late_mean_ns`` and ``late_peak_ns`` tell how long after its time a unit was handed over, and ``cpu_s`` what the
    router's process used in ``elapsed_s``. ``unroutable`` units were for no site of the lab, ``refused`` ones were not
    taken by the destination's kernel. ``bursts`` are by uplink.
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

    def direction(self, source: int, destination: int, service: Service = Service.BEST_EFFORT) -> DirectionStatistics:
        """Return what went from site ``source`` to site ``destination`` in a class."""
        for entry in self.directions:
            if (entry.source, entry.destination, entry.service) == (source, destination, service):
                return entry
        raise KeyError(f"no {service.value} direction from site {source} to site {destination}")

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
