"""Holds the lab's line against what it was told: a raw TCP stream's rate, and a ping's round trip.

    python benchmarks/lab_line.py --rate "100 Mbit/s" --round-trip "40 ms"

Needs Linux. Both ratios should lie within 2 % of one; a busy machine makes the ping late. What the router's process
needed for it stands beside them; how much it can carry at all says ``router_blast.py``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

from detcoll.emulation.lab import Lab, obtain
from detcoll.measure.host import host_facts
from detcoll.quantities import parse_duration_ns, parse_rate_bytes_per_s
from detcoll.testing.traffic import blast, ping
from detcoll.topology import Topology

SLOW_START_S = 1.0
"""Time that a stream needs until it fills the line."""

STRETCH_S = 0.2
"""Over how long a rate is taken, at least."""


def rates(seen: list[tuple[float, int]], skip_s: float) -> list[float]:
    """Return the rates in bytes/s over stretches of the stream, past its first ``skip_s``."""
    found = []
    since_s, base = next((point for point in seen if point[0] >= seen[0][0] + skip_s), seen[-1])
    for at_s, got in seen:
        if at_s - since_s >= STRETCH_S:
            found.append((got - base) / (at_s - since_s))
            since_s, base = at_s, got
    return found


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="100 Mbit/s")
    parser.add_argument("--round-trip", default="40 ms")
    parser.add_argument("--pings", type=int, default=41)
    parser.add_argument("--stretches", type=int, default=20)
    given = parser.parse_args()
    if (reason := obtain()) is not None:
        sys.exit(f"the lab cannot be opened: {reason}")
    rate, round_trip_ns = parse_rate_bytes_per_s(given.rate, "rate"), parse_duration_ns(given.round_trip, "round_trip")
    topology = Topology.uniform(2, 1, rate, round_trip_ns // 2)
    with Lab(topology) as lab:
        took_ns = ping(lab, given.pings)
        seen = blast(lab, SLOW_START_S + (given.stretches + 1) * STRETCH_S)["seen"]
        told = lab.statistics()
    carried = statistics.median(rates(seen, SLOW_START_S))
    facts = {
        "schema": "detcoll.emulation.lab-line/1",
        "host": host_facts(),
        "rate_over_stated": carried / topology.payload_share / rate,
        "round_trip_over_stated": statistics.median(took_ns) / round_trip_ns,
        "least_round_trip_over_stated": min(took_ns) / round_trip_ns,
        "router": {
            "is_compiled": told.is_compiled,
            "cpu_share": told.cpu_s / told.elapsed_s,
            "cpu_us_per_unit": told.cpu_s * 1e6 / sum(entry.units for entry in told.directions),
            "late_mean_us": told.late_mean_ns / 1e3,
            "late_peak_us": told.late_peak_ns / 1e3,
        },
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
