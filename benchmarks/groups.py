"""Random calls of three groups from three threads across the lab's line, and the audit of all that they sent together.

    python benchmarks/groups.py --calls 2000 --largest 200000

Four ranks in two sites: one group in each site, one across, and an overlapping pair. Every result is held against the
promised fold, bit for bit. What the router saw is held against the reserved rates: all that a rank sends to a site
counts as one flow, whatever group and peer. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from detcoll.emulation.lab import Conditions, Lab, obtain, read_log, run_ranks
from detcoll.emulation.lab.audit import audit, read_traces
from detcoll.emulation.lab.log import of_ranks
from detcoll.measure.host import host_facts
from detcoll.quantities import parse_duration_ns, parse_rate_bytes_per_s
from detcoll.topology import Topology
from detcoll.trace import TRACE_VARIABLE

PROGRAM = Path(__file__).parent.parent / "tests" / "programs" / "random_groups.py"


def main() -> None:
    """Run the calls, and print one line of JSON; the exit code is 1 where a result or the audit is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--largest", type=int, default=200_000, help="elements of the largest array")
    parser.add_argument("--rate", default="1 Gbit/s")
    parser.add_argument("--round-trip", default="20 ms")
    given = parser.parse_args()
    if (reason := obtain()) is not None:
        sys.exit(f"the lab cannot be opened: {reason}")
    rate = parse_rate_bytes_per_s(given.rate)
    topology = Topology.uniform(2, 2, rate, parse_duration_ns(given.round_trip) // 2)
    argv = [sys.executable, str(PROGRAM), str(given.calls), str(given.seed), str(given.largest)]
    with tempfile.TemporaryDirectory(prefix="detcoll-groups-") as made:
        folder = Path(made)
        environment = {TRACE_VARIABLE: made, "DETCOLL_TRANSPORT": "slotted"}
        began_s = time.monotonic()
        with Lab(topology, Conditions(), log_path=folder / "arrivals.npy") as lab:
            code = run_ranks(lab, argv, env=environment, deadline_s=500)
            late_ns = lab.statistics().late_peak_ns
        took_s = time.monotonic() - began_s
        if code != 0:
            sys.exit(1)
        traces = read_traces([folder / f"rank{rank}.json" for rank in range(topology.size)])
        seen = audit(of_ranks(read_log(folder / "arrivals.npy")), traces, topology, late_ns)
    told = {
        "calls": given.calls, "seed": given.seed, "seconds": round(took_s, 1), "kept_share": seen.kept_share,
        "payload_inside_share": seen.payload_inside_share, "bulk_bytes": seen.bulk_bytes,
        "express_beyond_bytes": seen.express_bytes - seen.express_inside_bytes,
        "peak_queue_bytes": seen.peak_queue_bytes, "passed": seen.is_slotted and seen.queues_within_windows,
        "processors": os.cpu_count(), "host": host_facts(),
    }  # fmt: skip
    print(json.dumps(told, default=str))
    sys.exit(0 if told["passed"] else 1)


if __name__ == "__main__":
    main()
