"""The floor of kinds that move blocks: no schedule finishes sooner."""

from __future__ import annotations

from detcoll.plan.collectives.blocks import ALL, Blocks
from detcoll.plan.collectives.legs import all_blocks
from detcoll.plan.ir import Collective
from detcoll.topology import Topology


def floor_ns(topology: Topology, collective: Collective, blocks: Blocks) -> float:
    """Return the least time that it takes to move blocks.

    For sites with uplinks B_i and downlinks D_i (bytes/s on the wire) and payload share g:

    - A block that is needed elsewhere leaves its site at least once, and enters every other site that needs it. Of a
      block that is folded, every other site sends at least as many bytes as it has, since the result depends on that
      site's contribution, and the site that needs it takes in at least one partial fold. So site i sends at least
      out_i bytes and takes in at least in_i.
    - All sites together send what all together take in: a block for all enters S-1 sites, and a fold for one needs
      S-1 sites to send.
    - The last byte crosses the longest one-way delay L between two sites that exchange anything.

        T >= max(max out_i / B_i, max in_i / D_i, sum in_i / sum B_i) / g + L
    """
    sites, itemsize = range(len(topology.sites)), collective.itemsize
    out, into, total, delay_ns = [0] * len(sites), [0] * len(sites), 0, 0
    for block in all_blocks(collective.evened(topology.size), topology, blocks):
        nbytes = block.length * itemsize
        sources = sites if block.source == ALL else [topology.site_of(block.source)]
        targets = sites if block.target == ALL else [topology.site_of(block.target)]
        pairs = [(i, j) for i in sources for j in targets if i != j]
        for i in {i for i, _ in pairs}:
            out[i] += nbytes
        for j in {j for _, j in pairs}:
            into[j] += nbytes
        total += nbytes * len(pairs)
        delay_ns = max([delay_ns, *(topology.one_way_ns(i, j) for i, j in pairs)])
    up = [site.uplink_bytes_per_s or 0.0 for site in topology.sites]
    down = [site.downlink_bytes_per_s or rate for site, rate in zip(topology.sites, up, strict=True)]
    seconds = max(*(out[i] / up[i] for i in sites), *(into[i] / down[i] for i in sites), total / sum(up))
    return seconds / topology.payload_share * 1e9 + delay_ns
