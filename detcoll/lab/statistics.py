"""What the router counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DirectionStatistics:
    """Traffic from site ``source`` to site ``destination``.

    ``units``, ``segments``, ``wire_bytes`` and ``payload_bytes`` (TCP and UDP) count what the uplink of ``source``
    took. ``uplink_dropped_segments`` found its queue full and are not among them; ``lost_segments`` (random loss) and
    ``downlink_dropped_segments`` are among them and did not arrive.
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


@dataclass(frozen=True, slots=True)
class Statistics:
    """All that the router counted since the lab opened.

    ``uplink_peak_bytes`` and ``downlink_peak_bytes`` are the longest queue of each site, in wire bytes, with the unit
    that was added last. ``late_mean_ns`` and ``late_peak_ns`` tell how long after its time a unit was handed over, and
    ``cpu_s`` what the router's process used in ``elapsed_s``. ``unroutable`` units were for no site of the lab,
    ``refused`` ones were not taken by the destination's kernel.
    """

    directions: tuple[DirectionStatistics, ...]
    uplink_peak_bytes: tuple[int, ...]
    downlink_peak_bytes: tuple[int, ...]
    unroutable: int
    refused: int
    late_mean_ns: float
    late_peak_ns: int
    cpu_s: float
    elapsed_s: float

    def direction(self, source: int, destination: int) -> DirectionStatistics:
        """Return what went from site ``source`` to site ``destination``."""
        for entry in self.directions:
            if (entry.source, entry.destination) == (source, destination):
                return entry
        raise KeyError(f"no direction from site {source} to site {destination}")

    @property
    def dropped_segments(self) -> int:
        """Segments that found a queue full, all directions."""
        return sum(entry.uplink_dropped_segments + entry.downlink_dropped_segments for entry in self.directions)

    @property
    def lost_segments(self) -> int:
        """Segments lost at random, all directions."""
        return sum(entry.lost_segments for entry in self.directions)
