"""The physical floor: no schedule finishes an all-reduce sooner.

For S sites with uplinks B_i (bytes/s on the wire), payload share g and V bytes:

- Every site's result depends on every other site's data. A site that sends less than V bytes of information cannot
  have told the others its V bytes, unless others add theirs on the way; in any case all sites together must send
  2(S-1)V bytes (each of the V bytes of S contributions takes part in S-1 folds between sites and S-1 copies back;
  Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", J. Parallel Distrib. Comput. 69, 2009), and the
  slowest site must send at least V if its contribution is to leave it.
- The answer crosses at least the longest one-way delay, since the two sites at its ends need each other's data.

    T >= max(V / min B_i, 2(S-1) V / sum B_i) / g + L

For a broadcast the root sends V once: V / B_root / g + the longest delay from it.
"""

from __future__ import annotations

from detcoll.topology import Topology
from detcoll.types import check_kind


def floor_ns(topology: Topology, kind: str, nbytes: int, root: int = 0) -> float | None:
    """Return the least time in nanoseconds that ``kind`` of ``nbytes`` takes, or None where there is no line.

    Raises
    ------
    UsageError
        If no collective has the name ``kind``.
    """
    check_kind(kind)
    if not topology.is_wide:
        return None
    count = len(topology.sites)
    uplinks = [site.uplink_bytes_per_s or 0.0 for site in topology.sites]
    if kind == "broadcast":
        source = topology.site_of(root)
        delay_ns = max(topology.one_way_ns(source, j) for j in range(count) if j != source)
        return nbytes / uplinks[source] / topology.payload_share * 1e9 + delay_ns
    delay_ns = max(topology.one_way_ns(i, j) for i in range(count) for j in range(count) if i != j)
    if kind == "barrier":
        return float(delay_ns)
    seconds = max(nbytes / min(uplinks), 2 * (count - 1) * nbytes / sum(uplinks)) / topology.payload_share
    return seconds * 1e9 + delay_ns
