"""How long a bucket's all-reduce takes: the plans, machines and calendars of the library, in virtual time.

Gradients of hundreds of gigabytes would be millions of chunks and buckets are many, so three things are coarse:

- Chunks are large: each site is home to one of a segment or more, so that a bucket has `LEAST_CHUNKS`. How much crosses
  a line does not change by that. Hosts are taken to have scratch for three buckets.
- Paced messages cross as a fluid (`detcoll.sim`).
- Of all buckets two in a row are simulated, with every rank. What each further one adds is d, and the first one's time
  is the end of the second less d. That is what small chunks give, too: large ones let the stages of a bucket that is
  alone wait for each other, which those of two do not. `benchmarks/simulator.py` shows how far that holds.

For d across sites, ranks of a site are taken together: one rank a site, with the site's line and R times a rank's
memory bandwidth, three buckets in a row less two. Ranks of a site do the same at the same time, so this loses what
happens inside the site and nothing of the wide area; d is never less than that of the single cluster, which is one
bucket and two simulated with every rank. Where many variants are asked for, all of a bucket's time is taken from there,
with what the stages inside a site were seen to add where both were simulated: `Together.about`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from detcoll.errors import UsageError
from detcoll.plan import (
    Calendar,
    ChunkSize,
    Collective,
    Costs,
    Plan,
    Slotting,
    build_calendar,
    choose_algorithm,
    choose_chunk,
    compile_plan,
)
from detcoll.plan.ir import Kind
from detcoll.plan.layout import cuts
from detcoll.scenarios.workload import BucketTimes, Workload
from detcoll.sim import simulate
from detcoll.topology import Site, Topology

LEAST_CHUNKS = 40
"""In a bucket; with fewer, its stages would wait for each other in the middle of it as well."""

LARGEST_SITES = 100
"""Plans of all sites take time that grows with the cube of their number."""

NEVER_NS = 2**62
"""Slow lines are asked about as well."""

Progress = Callable[[float], None]


def default_calendar(topology: Topology, mode: Slotting | None = None) -> Calendar:
    """Return the calendar that a job on this topology keeps unless told otherwise."""
    wanted = mode or (Slotting.CALENDAR if len(topology.sites) <= 2 else Slotting.SHARE)
    return build_calendar(topology, wanted)


def require_few_sites(topology: Topology) -> None:
    """Refuse more sites than can be planned for in reasonable time.

    Raises
    ------
    UsageError
        If there are more than `LARGEST_SITES`.
    """
    if len(topology.sites) > LARGEST_SITES:
        raise UsageError(f"sites={len(topology.sites)} must be at most {LARGEST_SITES}: planning would not end soon")


def coarse_chunk(bucket: Collective, topology: Topology, calendar: Calendar) -> ChunkSize:
    """Return chunks as large as a simulation bears, never smaller than the library's own."""
    segments, sites = max(len(cuts(topology, bucket.count)) - 1, 1), len(topology.sites)
    rounds = -(-LEAST_CHUNKS // (segments * sites))
    own = choose_chunk(topology, calendar, bucket)
    elems = max(-(-bucket.count // (segments * sites * rounds)), own.elems)
    return ChunkSize(elems, max(own.depth, 3 * sites * rounds))


class Buckets:
    """All ranks' plans for buckets of one workload on one set of sites; the same for every calendar and rate.

    Parameters
    ----------
    work : Workload
        Whose buckets.
    topology : Topology
        With lines between its sites.
    costs : Costs
        What a host costs.
    """

    def __init__(self, work: Workload, topology: Topology, costs: Costs) -> None:
        calendar, bucket = default_calendar(topology), work.bucket()
        self.work, self.topology, self.costs = work, topology, costs
        self.chunk = coarse_chunk(bucket, topology, calendar)
        self.algorithm = choose_algorithm(bucket, topology, calendar, costs, self.chunk)
        self._compiled: dict[int, Sequence[Plan]] = {}

    def plans(self, number: int) -> Sequence[Plan]:
        """Return all ranks' plans for ``number`` buckets in a row."""
        if number not in self._compiled:
            collective = self.work.bucket(number)
            self._compiled[number] = [
                compile_plan(collective, self.topology, rank, self.algorithm, self.chunk)
                for rank in range(self.topology.size)
            ]
        return self._compiled[number]

    def end_ns(self, number: int, topology: Topology, calendar: Calendar, progress: Progress | None = None) -> int:
        """Simulate ``number`` buckets in a row, all ready at once; return when the slowest rank has the last one."""
        plans = self.plans(number)
        return simulate(
            plans, topology, calendar, self.costs, fluid=True, progress=progress, deadline_ns=NEVER_NS
        ).slowest_ns  # fmt: skip

    def on_the_line_ns(self, calendar: Calendar) -> float:
        """Return how long the busiest flow needs for its part of a bucket at its mean rate, one rank a site."""
        longest_ns = 0.0
        for plan in self.plans(2):
            wide = plan.steps[(plan.steps["wide"] == 1) & (plan.steps["kind"] == Kind.SEND)]
            for peer in plan.peers:
                cycle = calendar.sites[plan.rank]
                windows = calendar.windows_to(plan.rank, plan.rank, peer)
                open_ns = sum(window.end_ns - window.start_ns for window in windows) or cycle.cycle_ns
                rate = calendar.rate_bytes_per_s(plan.rank, peer) * open_ns / cycle.cycle_ns
                nbytes = int(wide["length"][wide["peer"] == peer].sum()) * plan.collective.itemsize / 2
                longest_ns = max(longest_ns, nbytes / rate * 1e9 if rate else 0.0)
        return longest_ns

    def in_one_cluster(self, progress: Progress | None = None) -> BucketTimes:
        """Return the times in a single cluster with the same ranks and grouping."""
        single = self.topology.as_single_cluster()
        calendar = default_calendar(single)
        one_ns = self.end_ns(1, single, calendar, progress)
        return BucketTimes(one_ns, self.end_ns(2, single, calendar, progress) - one_ns)

    def across_sites(
        self, topology: Topology, calendar: Calendar, interval_ns: float, progress: Progress | None = None
    ) -> BucketTimes:
        """Return the times over the lines of ``topology``, of which each further bucket takes ``interval_ns``."""
        return BucketTimes(self.end_ns(2, topology, calendar, progress) - interval_ns, interval_ns)


class Together:
    """The same with the ranks of each site taken together.

    Parameters
    ----------
    work, topology, costs
        As for `Buckets`.
    local : BucketTimes
        Those of the single cluster.
    """

    def __init__(self, work: Workload, topology: Topology, costs: Costs, local: BucketTimes) -> None:
        ranks = max(len(site.ranks) for site in topology.sites)
        more = replace(costs, copy_bytes_per_s=costs.copy_bytes_per_s * ranks)
        self._buckets = Buckets(work, taken_together(topology), more)
        self._local = local
        self.inside_ns = local.first_ns
        """What the stages inside a site add to the first bucket: all of them at most, less where they overlap."""

    def alone(self, topology: Topology, calendar: Calendar) -> BucketTimes:
        """Return the times over lines and calendar of one rank a site, of which nothing is inside a site.

        The interval is never less than that of the single cluster, nor than what the lines need for a bucket: where
        windows are far apart, one bucket more may just fit into one that was open anyway.
        """
        two_ns = self._buckets.end_ns(2, topology, calendar)
        interval_ns = max(
            self._buckets.end_ns(3, topology, calendar) - two_ns, self._local.interval_ns,
            self._buckets.on_the_line_ns(calendar),
        )  # fmt: skip
        return BucketTimes(max(two_ns - interval_ns, 0), interval_ns)

    def about(self, topology: Topology, calendar: Calendar) -> BucketTimes:
        """Return the times with what is inside a site."""
        alone = self.alone(topology, calendar)
        return BucketTimes(alone.first_ns + self.inside_ns, alone.interval_ns)


def taken_together(topology: Topology) -> Topology:
    """Return the same sites and lines with one rank a site."""
    sites = tuple(
        Site(site.name, (index,), site.uplink_bytes_per_s, site.downlink_bytes_per_s)
        for index, site in enumerate(topology.sites)
    )
    return Topology(sites, topology.links, topology.mtu_bytes)
