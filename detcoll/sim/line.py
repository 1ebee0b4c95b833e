"""The modelled wide area: a queue at each site's uplink, a one-way delay, and a queue at each downlink.

Messages cross it in parcels, so that flows on one line interleave as packets do. A parcel waits until all earlier ones
have left (first in, first out), occupies the line for its wire bytes divided by the rate, and arrives one one-way delay
later. Queues are unbounded: their peak length is a result.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from detcoll.topology import Topology


@dataclass(slots=True)
class Queue:
    """The queue at one end of a line: when it is free, when it was busy, and its peak length."""

    rate_bytes_per_s: float
    free_ns: int = 0
    peak_bytes: float = 0.0
    wire_bytes: float = 0.0
    busy_ns: list[tuple[int, int]] = field(default_factory=list)

    def take(self, now_ns: int, wire_bytes: float) -> tuple[int, int]:
        """Append a parcel; return when its transmission begins and ends."""
        begin_ns = max(now_ns, self.free_ns)
        end_ns = self.free_ns = begin_ns + round(wire_bytes / self.rate_bytes_per_s * 1e9)
        self.peak_bytes = max(self.peak_bytes, (end_ns - now_ns) * self.rate_bytes_per_s / 1e9)
        self.wire_bytes += wire_bytes
        if self.busy_ns and self.busy_ns[-1][1] == begin_ns:
            self.busy_ns[-1] = (self.busy_ns[-1][0], end_ns)
        else:
            self.busy_ns.append((begin_ns, end_ns))
        return begin_ns, end_ns


class WideArea:
    """Uplinks, downlinks and delays of a topology with lines."""

    def __init__(self, topology: Topology) -> None:
        self.payload_share = topology.payload_share
        self.uplinks = [Queue(site.uplink_bytes_per_s or 0.0) for site in topology.sites]
        self.downlinks = [Queue(site.downlink_bytes_per_s or site.uplink_bytes_per_s or 0.0) for site in topology.sites]
        sites = range(len(topology.sites))
        self.delay_ns = [[topology.one_way_ns(i, j) for j in sites] for i in sites]
