"""What a rank promises about its line, as the audit of a captured line reads it."""

from __future__ import annotations

from typing import Any

from detcoll.plan.calendar import Calendar, Slotting
from detcoll.plan.headroom import burst_bytes, headroom_bytes_per_s
from detcoll.plan.layout import partners
from detcoll.topology import Topology

BURST_NS, LEAST_BURST_BYTES = 4_000_000, 131_072
"""How far a flow that never waits for a window may be ahead of its rate: the kernel paces in bursts of a millisecond,
and whoever watches the line looks a little late. Never less than two of the largest units that leave at once."""


def calendar_facts(calendar: Calendar, topology: Topology, rank: int) -> dict[str, Any] | None:
    """Return what the audit of a captured line needs to know: this rank's windows, rates, and share of its line."""
    if calendar.mode is Slotting.OFF:
        return None
    site = topology.site_of(rank)
    windows, cycle_ns = calendar.windows_of(site, rank), calendar.sites[site].cycle_ns
    rates = [calendar.rate_bytes_per_s(site, other) for other in range(len(topology.sites))]
    flows = [0] * len(rates)
    for peer in partners(topology, rank):
        flows[topology.site_of(peer)] += 1
    if windows:  # one peer at a time
        flows = [1] * len(rates)
    shares = [count * rate for count, rate in zip(flows, rates, strict=True)]
    line = (topology.sites[site].uplink_bytes_per_s or 0.0) * topology.payload_share
    burst_ns = max((window.end_ns - window.start_ns for window in windows), default=BURST_NS)
    return {
        "cycle_ns": cycle_ns,
        "windows": [[w.start_ns, w.end_ns, w.destination] for w in windows] or [[0, cycle_ns, -1]],
        "offset_ns": 0,
        "guard_ns": calendar.guard_ns,
        "mode": calendar.mode.value,
        "rates_bytes_per_s": rates,
        "flows": flows,
        "burst_bytes": [max(rate / 1e9 * burst_ns, LEAST_BURST_BYTES) for rate in rates],
        "express_bytes_per_s": headroom_bytes_per_s(topology, rank),
        "express_burst_bytes": 2 * burst_bytes(topology, rank),
        "line_share": (max(shares) if windows else sum(shares)) / line,
    }
