"""The floor of kinds that move blocks: no schedule finishes sooner."""

from __future__ import annotations

import math

from detcoll.plan.collectives.blocks import ALL, Blocks
from detcoll.plan.collectives.legs import all_blocks
from detcoll.plan.ir import Collective
from detcoll.topology import Topology


def floor_ns(topology: Topology, collective: Collective, blocks: Blocks) -> float:
    """Return the least time that it takes to move blocks.

    For sites with uplinks B_i and downlinks D_i (bytes/s on the wire), payload share g, and one-way delays of which
    none is longer than a detour:

    - A block that is needed elsewhere leaves its site at least once, and enters every other site that needs it. Of a
      block that is folded, every other site sends at least as many bytes as it has, since the result depends on that
      site's contribution, and the site that needs it takes in at least one partial fold. So site i sends at least
      out_i bytes and takes in at least in_i.
    - The last byte that leaves site i belongs to a block that then has to reach all sites that need it. So after
      out_i / B_i passes the delay to the farthest of them, of the block where that is nearest: far_i.
    - Nothing enters site j before the delay from the nearest site that sends it something: near_j.
    - All sites together send what all together take in: a block for all enters S-1 sites, and a fold for one needs
      S-1 sites to send.

        T >= max(max_i out_i / B_i / g + far_i, max_j in_j / D_j / g + near_j, sum in_j / sum B_i / g + min near_j)

    and T is at least the longest delay between two sites that exchange anything.
    """
    sites = range(len(topology.sites))
    out, into, total, longest_ns = [0.0] * len(sites), [0.0] * len(sites), 0.0, 0
    far, near = [math.inf] * len(sites), [math.inf] * len(sites)
    for block in all_blocks(collective.evened(topology.size), topology, blocks):
        seconds = block.length * collective.itemsize / topology.payload_share
        sources = sites if block.source == ALL else [topology.site_of(block.source)]
        targets = sites if block.target == ALL else [topology.site_of(block.target)]
        delays = {(i, j): topology.one_way_ns(i, j) for i in sources for j in targets if i != j}
        for i in {i for i, _ in delays}:
            out[i] += seconds
            far[i] = min(far[i], max(delay_ns for (source, _), delay_ns in delays.items() if source == i))
        for j in {j for _, j in delays}:
            into[j] += seconds
            near[j] = min(near[j], *(delay_ns for (_, target), delay_ns in delays.items() if target == j), math.inf)
        total += seconds * len(delays)
        longest_ns = max([longest_ns, *delays.values()])
    if not total:
        return float(longest_ns)
    up = [site.uplink_bytes_per_s or 0.0 for site in topology.sites]
    down = [site.downlink_bytes_per_s or rate for site, rate in zip(topology.sites, up, strict=True)]
    return max(
        longest_ns,
        total / sum(up) * 1e9 + min(near),
        *(out[i] / up[i] * 1e9 + far[i] for i in sites if out[i]),
        *(into[j] / down[j] * 1e9 + near[j] for j in sites if into[j]),
    )
