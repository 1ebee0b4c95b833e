"""How an array is cut: segments with an owner in every site, and chunks that move.

Each site cuts the array evenly over its ranks. The union of all sites' cuts gives segments, each owned by one rank in
every site; owners of a segment exchange it over the wide area. With equal ranks a site these are the shards of a
reduce-scatter; with unequal ones nothing changes but their number.

Chunks are what moves at once. They are small against the array, so that stages overlap, and large against what a
step costs a Python host. Where a window ends before its chunk, the transport cuts it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from detcoll.plan.calendar import Calendar, Slotting, at_once
from detcoll.plan.ir import LARGEST_PLAN_TAG, Collective
from detcoll.topology import Topology

CUT_ELEMS = 16
"""Cuts of large arrays fall on multiples of this, so that no two ranks write one cache line."""

CHUNKS_A_WINDOW = 2
"""So one is on the line while the host prepares the next; more would cost a Python host more than they save."""

CHUNKS_A_CYCLE = 8
"""The same for flows without windows, whose chunks share a line: the last one is slow, so it should be small."""

CHUNKS_A_FLOW = 16
"""Flows that share lines are slow and many, so their chunks grow with the array until a flow has about this many: a
step for each few kB would cost the host far more than the pipeline gains."""

HOST_SHARE = 0.1
"""Of the time that a line is busy with chunks, their steps may take a host that has nothing else to do this part."""

CHUNKS_A_RELAYED_FLOW, RELAYED_HOST_SHARE = 32, 0.2
"""The same with more than two sites, where a chunk crosses the wide area twice: its result leaves only when all of its
sum has come, and scratch is held longer, so chunks should be smaller."""

TURNS_HELD = 4
"""Where windows lead to one site each, a chunk's scratch is held until its sum has had a window, those of the others
have come, its result has had one behind what waits there, and the acknowledgement is back. With 2 turns 48 MB over 4
sites took a seventh longer in the simulator; more than 4 gain nothing."""

STEP_NS = 30_000
"""What a step costs a Python host that has nothing else to do."""

LARGEST_FRAME_BYTES = 128
"""What a transport may add to a message; chunks leave room for it, so that a whole number of them fill a window."""

LOCAL_CHUNK_BYTES = 262_144
"""Where there are no lines, at least; chunks of larger arrays grow like those of flows that share lines."""
SMALLEST_CHUNK_BYTES = 4_096
LARGEST_CHUNK_BYTES = 1_048_576

FAST_BYTES_PER_S = 1.25e9
"""From here on hosts cost more time than the line: chunks may be as many times larger as a line is faster, up to
`LARGEST_FAST_CHUNK_BYTES`."""
LARGEST_FAST_CHUNK_BYTES = 8 * LARGEST_CHUNK_BYTES

IN_PLACE_BYTES = 8 * 2**20
"""What may wait to be folded in place of what was sent there: as much as stays in a transport's memory, see
`detcoll.runtime.credit`. Further receives are not posted yet, which keeps nothing from arriving."""

LARGEST_SCRATCH_BYTES = 33_554_432

CHUNKS_A_FLOW_HELD = 8
"""Of each flow between more than two sites that share their lines: one leaves, one crosses, others wait for sums and
results that are on their way. With 3 the simulator loses a tenth of the floor between 8 sites."""

PHASE_TAGS = 8
"""Tags a chunk may use, so that a chunk's messages never share one."""

EXPRESS_BYTES = 4_096
"""Messages up to this size leave at once, in the headroom that the calendar leaves. Arrays up to this size are not cut:
what more messages cost the hosts is more than shorter ones gain on the line."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements ``[offset, offset + length)``, owned by ``owners[s]`` in site s.

    ``number`` is its place in the order of all chunks, ``home`` the site that folds it where one site does.
    """

    number: int
    home: int
    offset: int
    length: int
    owners: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChunkSize:
    """``elems`` a chunk, and how many chunks a rank keeps in scratch at once (``depth``).

    ``whole`` : the array is one segment, owned by the last rank of each site.
    ``in_place`` : if not 0, a rank that is alone in its site sends from the caller's array instead of a copy, where the
    algorithm can. What it gets is then folded only when what it sent there was acknowledged, and this is for how many
    chunks it waits at once.
    ``homes`` : the sites that are homes of chunks, in turn; empty for all of them, see `detcoll.plan.homes`.
    """

    elems: int
    depth: int
    whole: bool = False
    in_place: int = 0
    homes: tuple[int, ...] = ()


def choose_chunk(
    topology: Topology, calendar: Calendar, collective: Collective, scale: Fraction = Fraction(1)
) -> ChunkSize:
    """Return the chunk for this line: a window's bytes over `CHUNKS_A_WINDOW`, and scratch for what is in flight.

    In flight at a site's owners is what leaves until an acknowledgement is back, a round trip and a cycle later.
    ``scale`` : how much larger than by this rule it should be, within the same limits.
    """
    whole = collective.nbytes <= EXPRESS_BYTES
    segments = 1 if whole else max(len(cuts(topology, collective.count)) - 1, 1)
    chunk_bytes = max(LOCAL_CHUNK_BYTES, collective.nbytes // (segments * CHUNKS_A_FLOW))
    in_flight_bytes = 8 * min(chunk_bytes, LARGEST_CHUNK_BYTES)
    if any(calendar.rates):
        cycle_ns = max(cycle.cycle_ns for cycle in calendar.sites)
        round_trip_ns = 2 * max(link.one_way_ns for _, link in topology.links)
        chunk_bytes = _turn_bytes(topology, calendar) - LARGEST_FRAME_BYTES
        relayed = len(topology.sites) > 2
        host_share = RELAYED_HOST_SHARE if relayed or calendar.has_windows else HOST_SHARE
        chunk_bytes = max(chunk_bytes, _host_bytes(topology, segments, host_share))
        if not calendar.has_windows:
            flow_bytes = collective.nbytes // (segments * len(topology.sites))
            chunk_bytes = max(chunk_bytes, flow_bytes // (CHUNKS_A_RELAYED_FLOW if relayed else CHUNKS_A_FLOW))
        turns_ns = TURNS_HELD * _turn_ns(calendar) if relayed and calendar.has_windows else 2 * cycle_ns
        in_flight_bytes = int(_owner_bytes_per_s(topology, calendar) * (round_trip_ns + turns_ns) / 1e9)
    largest_bytes = _largest_bytes(topology, calendar, collective.nbytes // segments)
    chunk_bytes = min(max(int(chunk_bytes * scale), SMALLEST_CHUNK_BYTES), largest_bytes)
    smallest_for_tags = collective.count * PHASE_TAGS // (LARGEST_PLAN_TAG // 2) + segments
    elems = max(chunk_bytes // collective.itemsize, smallest_for_tags, 1)
    segment_elems = -(-collective.count // segments)
    if len(topology.sites) > 2 and segment_elems * collective.itemsize > SMALLEST_CHUNK_BYTES:
        elems = _even(segment_elems, elems, len(topology.sites))
    shares = len(topology.sites) > 2 and not calendar.has_windows
    if shares:  # each flow has chunks that leave, cross and wait
        in_flight_bytes += CHUNKS_A_FLOW_HELD * len(topology.sites) * elems * collective.itemsize
    elif any(calendar.rates):  # the one that leaves may need longer for it than a cycle
        in_flight_bytes += elems * collective.itemsize
    place_bytes = elems * collective.accumulator_itemsize
    depth = min(-(-in_flight_bytes // place_bytes), LARGEST_SCRATCH_BYTES // place_bytes)
    owned = -(-segment_elems // elems)
    if shares and depth < owned <= 2 * depth:  # the last ones would wait for results that queue behind all sums
        depth = min(owned, LARGEST_SCRATCH_BYTES // place_bytes)
    if is_fast(topology, calendar):
        return ChunkSize(elems, max(depth, 4), whole, max(IN_PLACE_BYTES // (elems * collective.itemsize), 1))
    return ChunkSize(elems, max(depth, 4), whole)


def _fastest_bytes_per_s(topology: Topology) -> float:
    return max(site.uplink_bytes_per_s or 0.0 for site in topology.sites)


def is_fast(topology: Topology, calendar: Calendar) -> bool:
    """Tell whether flows share a line that is faster than hosts, between two sites."""
    return len(topology.sites) == 2 and not calendar.has_windows and _fastest_bytes_per_s(topology) > FAST_BYTES_PER_S


def _largest_bytes(topology: Topology, calendar: Calendar, flow_bytes: int) -> int:
    """Return the largest chunk: more on fast lines, as long as a flow has `CHUNKS_A_FLOW` of them."""
    if not is_fast(topology, calendar):
        return LARGEST_CHUNK_BYTES
    grown_bytes = int(LARGEST_CHUNK_BYTES * _fastest_bytes_per_s(topology) / FAST_BYTES_PER_S)
    return max(LARGEST_CHUNK_BYTES, min(grown_bytes, LARGEST_FAST_CHUNK_BYTES, flow_bytes // CHUNKS_A_FLOW))


def _host_bytes(topology: Topology, segments: int, host_share: float) -> int:
    """Return the least chunk whose steps keep the host busy for ``host_share`` of its time on the fastest line.

    One chunk of each segment costs a rank some 4 R + 5 steps and crosses an uplink 2 (S-1)/S times.
    """
    count = len(topology.sites)
    steps = 4 * max(len(site.ranks) for site in topology.sites) + 5
    fastest = _fastest_bytes_per_s(topology)
    return int(steps * STEP_NS / host_share / 1e9 * fastest * count / (2 * (count - 1)) / segments)


def _turn_ns(calendar: Calendar) -> int:
    """Return the longest time from one window to the next that leads to the same site."""
    longest_ns = 0
    for cycle in calendar.sites:
        starts: dict[int, list[int]] = {}
        for window in sorted(cycle.windows, key=lambda each: each.start_ns):
            starts.setdefault(window.destination, []).append(window.start_ns)
        for begun in starts.values():
            longest_ns = max(longest_ns, *(b - a for a, b in pairwise([*begun, begun[0] + cycle.cycle_ns])))
    return longest_ns


def _turn_bytes(topology: Topology, calendar: Calendar) -> int:
    """Return the part of a window that a chunk fills, or of the slowest flow's cycle without any.

    Windows that lead to one site each have many lengths, and the mean counts, of what a rank of the largest site sends
    in one; else all have one.
    """
    most = max(len(site.ranks) for site in topology.sites) if calendar.leads else 0
    windows = [
        (window.end_ns - window.start_ns)
        * calendar.rate_bytes_per_s(site, window.destination if window.destination >= 0 else 1 - site)
        * (len(topology.sites[site].ranks) / most if most else 1.0)
        for site, cycle in enumerate(calendar.sites)
        for window in cycle.windows
    ]
    if windows:
        return int(sum(windows) / len(windows) / 1e9) // CHUNKS_A_WINDOW
    slowest = min(rate for rate in calendar.rates if rate > 0)
    return int(calendar.sites[0].cycle_ns * slowest / 1e9) // CHUNKS_A_CYCLE


def _owner_bytes_per_s(topology: Topology, calendar: Calendar) -> float:
    """Return the most that one rank sends over the wide area while the calendar lets it."""
    count = len(topology.sites)

    def flows(i: int, j: int) -> float:
        number = at_once(calendar, topology, i, j)
        return 1.0 if calendar.sites[i].windows else number / len(topology.sites[i].ranks)

    together = max if calendar.mode is Slotting.CALENDAR and calendar.has_windows else sum
    return max(
        together([calendar.rate_bytes_per_s(i, j) * flows(i, j) for j in range(count) if j != i]) for i in range(count)
    )


def _even(segment_elems: int, chunk_elems: int, sites: int) -> int:
    """Return a chunk no larger than asked of which each site folds the same number in a segment."""
    rounds = max(-(-segment_elems // (chunk_elems * sites)), 1)
    return max(-(-segment_elems // (rounds * sites)), 1)


def cuts(topology: Topology, count: int) -> list[int]:
    """Return the sorted offsets at which segments begin, and ``count`` at the end."""
    offsets = {0, count}
    for site in topology.sites:
        for index in range(1, len(site.ranks)):
            offsets.add(_cut(count, index, len(site.ranks)))
    return sorted(offsets)


def _cut(count: int, index: int, parts: int) -> int:
    even = count * index // parts
    return even - even % CUT_ELEMS if count >= CUT_ELEMS * parts else even


def segments(topology: Topology, count: int, *, whole: bool = False) -> list[tuple[int, int, tuple[int, ...]]]:
    """Return where each segment of ``count`` elements begins and ends, and its owner in every site."""
    if whole:
        return [(0, count, tuple(site.ranks[-1] for site in topology.sites))]
    sites = range(len(topology.sites))
    return [
        (begin, end, tuple(owner_of(topology, site, count, begin) for site in sites))
        for begin, end in pairwise(cuts(topology, count))
    ]


def partners(topology: Topology, rank: int) -> frozenset[int]:
    """Return the ranks of other sites with which ``rank`` owns a common part of a large array."""
    site = topology.site_of(rank)
    owners = [owners for _, _, owners in segments(topology, CUT_ELEMS * topology.size**2)]
    return frozenset(other for row in owners if row[site] == rank for other in row) - {rank}


def owner_of(topology: Topology, site: int, count: int, offset: int) -> int:
    """Return the rank of ``site`` whose even part of ``count`` elements holds ``offset``."""
    ranks = topology.sites[site].ranks
    begins = [_cut(count, index, len(ranks)) for index in range(len(ranks))]
    return ranks[bisect_right(begins, offset) - 1]


def chunks(topology: Topology, count: int, size: ChunkSize) -> list[Chunk]:
    """Return all chunks, those of different segments taking turns, in the order in which they should move."""
    rows: list[tuple[int, int, int, int, tuple[int, ...]]] = []
    for index, (begin, end, owners) in enumerate(segments(topology, count, whole=size.whole)):
        rows.extend(
            (turn, index, offset, min(size.elems, end - offset), owners)
            for turn, offset in enumerate(range(begin, end, size.elems))
        )
    rows.sort(key=lambda row: row[:2])
    homes = size.homes or range(len(topology.sites))
    return [
        Chunk(number, homes[(turn + index) % len(homes)], offset, length, owners)
        for number, (turn, index, offset, length, owners) in enumerate(rows)
    ]


def uses_window(calendar: Calendar, nbytes: int) -> bool:
    """Tell whether wide messages of a collective of ``nbytes`` in all wait for a window or a pace.

    Those of smaller collectives leave at once, as express. The whole collective counts, not the message: the small
    chunks of a large array would else flood the line.
    """
    return calendar.mode is not Slotting.OFF and nbytes > EXPRESS_BYTES
