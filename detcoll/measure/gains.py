"""Switches single means off, so that what each of them gains shows by itself.

A slotted run in the deterministic class has all of them. Each of these takes one away and leaves the rest:

- ``topology``: every rank is a site of its own, as for a library that does not know who is near whom. No sum is made
  inside a site, so a flat direct plan takes 2 R (P-R)/P V over a site's line (R ranks a site, P in all, V bytes) where
  the hierarchical one of two sites takes V. Flows keep to the reservation: what crosses a line is paced to add up to
  it. A ring in rank order, as flat libraries have it, would take 2 (P-1)/P V and 2 (P-1) one-way delays.
- ``slots``: no calendar and no pacing (``DETCOLL_SLOTTING=off``); the policer drops what comes too fast.
- ``overlap``: no bucket is reduced before the backward pass has ended.
- ``reservation``: best effort, beside the same traffic of others.

What a run loses without ``topology`` is gained by hierarchy, on any network; it says nothing for determinism.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from detcoll.emulation.lab import Service
from detcoll.errors import UsageError
from detcoll.measure.networks import Network
from detcoll.topology import Link, Site, Topology

TOPOLOGY, SLOTS, OVERLAP, RESERVATION = "topology", "slots", "overlap", "reservation"
MEANS = (TOPOLOGY, SLOTS, OVERLAP, RESERVATION)


def networks_without(mean: str, networks: Sequence[Network]) -> list[Network]:
    """Return where a run without ``mean`` is measured: on what is deterministic, or on the same in best effort."""
    reserved = [network for network in networks if network.service is Service.DETERMINISTIC]
    return [replace(one, service=Service.BEST_EFFORT) for one in reserved] if mean == RESERVATION else reserved


def environment_without(mean: str | None) -> dict[str, str]:
    """Return what ranks are told beside their topology."""
    return {"DETCOLL_SLOTTING": "off"} if mean == SLOTS else {}


def require_removable(without: Sequence[str], lines: Topology, networks: Sequence[Network], is_script: bool) -> None:
    """Refuse what cannot be switched off.

    Raises
    ------
    UsageError
        Naming the mean and what was expected.
    """
    for mean in without:
        if mean not in MEANS or without.count(mean) > 1:
            raise UsageError(f"without={mean!r}: expected some of {', '.join(MEANS)}, each once")
    if without and not networks_without(SLOTS, networks):
        raise UsageError(f"without={','.join(without)!r} needs service=deterministic, where all of them are in use")
    if OVERLAP in without and is_script:
        raise UsageError("without='overlap' needs a built-in workload; what a script overlaps, it decides itself")
    if TOPOLOGY in without and all(len(site.ranks) == 1 for site in lines.sites):
        raise UsageError("without='topology' needs a site of several ranks; else there is no grouping to take away")


def flattened(lines: Topology) -> Topology:
    """Return ``lines`` as one sees them who does not know the sites: each rank has a line, all equally far apart.

    Every pair of ranks gets the same share of the lines, such that all flows that share a real line add up to it.
    """
    size = lines.size
    crossing = [len(site.ranks) * (size - len(site.ranks)) for site in lines.sites]
    rates = [
        rate / flows
        for site, flows in zip(lines.sites, crossing, strict=True)
        for rate in (site.uplink_bytes_per_s, site.downlink_bytes_per_s)
        if rate is not None
    ]
    promised = [
        link.reserved_bytes_per_s / (len(lines.sites[low].ranks) * len(lines.sites[high].ranks))
        for (low, high), link in lines.links
        if link.reserved_bytes_per_s is not None
    ]
    link = Link(
        max(link.one_way_ns for _, link in lines.links), reserved_bytes_per_s=min(promised) if promised else None
    )
    line_bytes_per_s = (size - 1) * min(rates)
    sites = tuple(Site(f"rank{rank}", (rank,), line_bytes_per_s, line_bytes_per_s) for rank in range(size))
    return Topology(sites, tuple((pair, link) for pair in combinations(range(size), 2)), lines.mtu_bytes)
