"""Algorithms: from a collective and a topology to one rank's steps.

All of them are hierarchical. Letters: P ranks, S sites, R ranks a site, V bytes; counts are for equal sites.

An all-reduce first folds each chunk inside every site, in rank order, at the chunk's owner there (local reduce); owners
then fold between sites, in site order (wide stage, below); owners hand the result to their site (local gather).
Local traffic of a rank: it sends (R-1)/R V twice and receives as much.

=========  ============================================================  ==================  =====================
wide       what owners do                                                one-way delays      bytes an uplink
=========  ============================================================  ==================  =====================
exchange   everyone sends its sum to everyone, and folds all S           1                   (S-1) V
direct     each chunk is folded at its home, which sends it to all        2                   2 (S-1)/S V
ring       sums travel site 0 -> S-1, the result S-1 -> 0 -> ... -> S-2  2 (S-1)             2 V at most
=========  ============================================================  ==================  =====================

A broadcast scatters from the root to the owners of its site, which send to the owners of the others:

=========  ============================================================  ==================  =====================
star       the root's site sends to all others                           1                   (S-1) V at the root's
relay      site r -> r+1 -> ... -> r-1                                   S-1                 V
=========  ============================================================  ==================  =====================

Every site's fold is a level of the promised order and ends in the array's own type, a sum, or a mean where 16-bit
floats are averaged; the fold between sites is the other level. Inputs of a fold say how many ranks they hold.

Chunks go through these stages one behind the other, so the stages overlap. A ring here keeps the promised fold order
(`op(lower, higher)`), which the textbook ring does not; it pays with the pipeline's length. Between sites it sends sums
in the accumulation type, so that 16-bit floats are rounded once per level and not at every hop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from detcoll.errors import PlanError, UsageError
from detcoll.plan.ir import LARGEST_PLAN_TAG, Buffer, Collective, Phase, Plan, PlanBuilder
from detcoll.plan.layout import PHASE_TAGS, Chunk, ChunkSize, chunks
from detcoll.topology import Topology

ALL_REDUCE = ("exchange", "direct", "ring")
BROADCAST = ("star", "relay")

LOCAL_WINDOW = 8
"""Chunks whose local messages are under way at once."""

LOCAL_AHEAD = 2
"""Chunks that a rank gives an owner besides those that it has scratch for: what comes too early is copied twice,
and of 1 GiB over a slow line it was 256 MiB."""


@dataclass(slots=True)
class _Part:
    """What the algorithms of one rank share while they add steps chunk by chunk."""

    topology: Topology
    rank: int
    site: int
    chunk_size: ChunkSize
    builder: PlanBuilder = field(default_factory=PlanBuilder)
    places: int = 0
    """Chunks that this rank has put into scratch so far; the n-th goes to place n mod depth."""
    last_use: dict[int, list[int]] = field(default_factory=dict)
    """Steps after which a scratch place may be written again."""
    local_sends: list[int] = field(default_factory=list)
    local_folds: list[int] = field(default_factory=list)
    local_results: dict[int, list[int]] = field(default_factory=dict)
    """By owner, what it gives back of the chunks that it was given."""
    wide_folds: list[int] = field(default_factory=list)

    @property
    def peers(self) -> list[int]:
        """The other ranks of this site, in rank order."""
        return [rank for rank in self.topology.sites[self.site].ranks if rank != self.rank]

    @property
    def ranks_of_sites(self) -> list[int]:
        """How many ranks each site has."""
        return [len(site.ranks) for site in self.topology.sites]

    def next_place(self) -> tuple[int, int, list[int]]:
        """Return a scratch place, its offset in elements, and what must end before it is written."""
        place = self.places % self.chunk_size.depth
        self.places += 1
        return place, place * self.chunk_size.elems, self.last_use.pop(place, [])


def _tag(chunk: Chunk, phase: int) -> int:
    return chunk.number * PHASE_TAGS + phase


def _recent(steps: list[int], window: int) -> list[int]:
    """Return the step that must end before another is added, so that at most ``window`` are under way."""
    return steps[-window:][:1] if len(steps) >= window else []


def compile_plan(collective: Collective, topology: Topology, rank: int, algorithm: str, chunk_size: ChunkSize) -> Plan:
    """Return ``rank``'s part of ``collective`` done by ``algorithm``.

    Raises
    ------
    UsageError
        If the algorithm does not do this kind of collective.
    PlanError
        If there are more chunks than tags for them.
    """
    known = {"all_reduce": ALL_REDUCE, "barrier": ALL_REDUCE, "broadcast": BROADCAST}.get(collective.kind, ())
    if algorithm not in known:
        raise UsageError(f"algorithm={algorithm!r} does not do {collective.kind}; expected one of {', '.join(known)}")
    part = _Part(topology, rank, topology.site_of(rank), chunk_size)
    add = _broadcast_chunk if collective.kind == "broadcast" else _all_reduce_chunk
    cut = chunks(topology, collective.count, chunk_size) if topology.size > 1 else []
    if len(cut) * PHASE_TAGS > LARGEST_PLAN_TAG:
        raise PlanError(f"{collective} needs more tags than a plan has; use larger chunks than {chunk_size.elems}")
    for chunk in cut:
        add(part, chunk, collective, algorithm)
    scratch = min(part.places, chunk_size.depth) * chunk_size.elems
    return part.builder.build(
        collective, algorithm, rank, topology.size, scratch, scratch if algorithm == "ring" else 0
    )


def _all_reduce_chunk(part: _Part, chunk: Chunk, collective: Collective, algorithm: str) -> None:
    owner = chunk.owners[part.site]
    if owner != part.rank:
        _local_contribute(part, chunk, owner)
        return
    if len(part.topology.sites) == 1:
        done = _local_fold(part, chunk, (Buffer.USER, chunk.offset), [], final=True)
    else:
        place, offset, free_after = part.next_place()
        folded = _local_fold(part, chunk, (Buffer.PARTIAL, offset), free_after, final=False)
        done = _WIDE[algorithm](part, chunk, (place, offset), folded)
    _local_gather(part, chunk, done)


def _local_contribute(part: _Part, chunk: Chunk, owner: int) -> None:
    """Send this rank's elements to the owner in its site, and take the result."""
    span = (Buffer.USER, chunk.offset)
    results = part.local_results.setdefault(owner, [])
    # A local network is faster than the line: an owner would have to hold whatever it cannot pass on yet.
    after = [*_recent(part.local_sends, LOCAL_WINDOW), *_recent(results, part.chunk_size.depth + LOCAL_AHEAD)]
    sent = part.builder.send(Phase.LOCAL_REDUCE, owner, _tag(chunk, 0), span, chunk.length, after)
    part.local_sends.append(sent)
    results.append(part.builder.recv(Phase.LOCAL_GATHER, owner, _tag(chunk, 1), span, chunk.length, [sent]))


def _local_fold(part: _Part, chunk: Chunk, target: tuple[Buffer, int], after: Sequence[int], *, final: bool) -> int:
    """Receive the site's contributions and fold them with this rank's own, in rank order."""
    lent = {
        peer: part.builder.recv(
            Phase.LOCAL_REDUCE, peer, _tag(chunk, 0), (Buffer.LENT, 0), chunk.length,
            _recent(part.local_folds, LOCAL_WINDOW),
        )
        for peer in part.peers
    }  # fmt: skip
    inputs = [
        (Buffer.LENT, lent[rank], 1) if rank in lent else (Buffer.USER, chunk.offset, 1)
        for rank in part.topology.sites[part.site].ranks
    ]
    folded = part.builder.fold(Phase.LOCAL_REDUCE, inputs, target, chunk.length, [*after, *lent.values()], final=final)
    part.local_folds.append(folded)
    return folded


def _local_gather(part: _Part, chunk: Chunk, done: int) -> None:
    """Hand the finished chunk in the user's array to the rest of this site."""
    for peer in part.peers:
        part.builder.send(Phase.LOCAL_GATHER, peer, _tag(chunk, 1), (Buffer.USER, chunk.offset), chunk.length, [done])


def _wide_fold(part: _Part, chunk: Chunk, place_offset: int, folded: int, target: tuple[Buffer, int]) -> int:
    """Receive the other sites' sums and fold all of them, in site order, into ``target``."""
    before = _recent(part.wide_folds, part.chunk_size.depth)
    lent = {
        site: part.builder.recv(
            Phase.WIDE_REDUCE, owner, _tag(chunk, 2), (Buffer.LENT, 0), chunk.length, before, wide=True
        )
        for site, owner in enumerate(chunk.owners)
        if site != part.site
    }
    inputs = [
        (Buffer.LENT, lent[site], ranks) if site in lent else (Buffer.PARTIAL, place_offset, ranks)
        for site, ranks in enumerate(part.ranks_of_sites)
    ]
    done = part.builder.fold(Phase.WIDE_REDUCE, inputs, target, chunk.length, [folded, *lent.values()], final=True)
    part.wide_folds.append(done)
    return done


def _exchange(part: _Part, chunk: Chunk, place: tuple[int, int], folded: int) -> int:
    number, offset = place
    sent = [
        part.builder.send(
            Phase.WIDE_REDUCE, owner, _tag(chunk, 2), (Buffer.PARTIAL, offset), chunk.length, [folded], wide=True
        )
        for site, owner in _others_from(part.site, chunk.owners)
    ]
    done = _wide_fold(part, chunk, offset, folded, (Buffer.USER, chunk.offset))
    part.last_use[number] = [*sent, done]
    return done


def _direct(part: _Part, chunk: Chunk, place: tuple[int, int], folded: int) -> int:
    number, offset = place
    home = chunk.home
    if part.site == home:
        partial = (Buffer.PARTIAL, offset)
        summed = _wide_fold(part, chunk, offset, folded, partial)
        # Sent from scratch, so that the caller's array is finished without waiting for acknowledgements.
        sends = [
            part.builder.send(Phase.WIDE_GATHER, owner, _tag(chunk, 3), partial, chunk.length, [summed], wide=True)
            for _, owner in _others_from(part.site, chunk.owners)
        ]
        copied = [(*partial, part.topology.size)]
        done = part.builder.fold(Phase.WIDE_GATHER, copied, (Buffer.USER, chunk.offset), chunk.length, [summed])
        part.last_use[number] = [*sends, done]
        return done
    sent = part.builder.send(
        Phase.WIDE_REDUCE, chunk.owners[home], _tag(chunk, 2), (Buffer.PARTIAL, offset), chunk.length, [folded],
        wide=True,
    )  # fmt: skip
    part.last_use[number] = [sent]
    return part.builder.recv(
        Phase.WIDE_GATHER, chunk.owners[home], _tag(chunk, 3), (Buffer.USER, chunk.offset), chunk.length, [folded],
        wide=True,
    )  # fmt: skip


def _ring(part: _Part, chunk: Chunk, place: tuple[int, int], folded: int) -> int:
    number, offset = place
    site, last, ranks = part.site, len(chunk.owners) - 1, part.ranks_of_sites
    partial = (Buffer.PARTIAL, offset)
    if site == 0:
        sent = _ring_send(part, chunk, 1, partial, folded, accumulated=False)
        part.last_use[number] = [sent]
    else:
        lent = part.builder.recv(
            Phase.WIDE_REDUCE, chunk.owners[site - 1], _tag(chunk, 2), (Buffer.LENT, 0), chunk.length,
            _recent(part.wide_folds, part.chunk_size.depth), wide=True, accumulated=site > 1,
        )  # fmt: skip
        target = (Buffer.USER, chunk.offset) if site == last else (Buffer.ACCUMULATOR, offset)
        summed = part.builder.fold(
            Phase.WIDE_REDUCE, [(Buffer.LENT, lent, sum(ranks[:site])), (*partial, ranks[site])], target, chunk.length,
            [folded, lent], final=site == last,
        )  # fmt: skip
        part.wide_folds.append(summed)
        if site == last:
            part.last_use[number] = [summed]
            _ring_pass_on(part, chunk, summed)
            return summed
        sent = _ring_send(part, chunk, site + 1, target, summed, accumulated=True)
        part.last_use[number] = [sent]
    before = (site - 1) % len(chunk.owners)
    done = part.builder.recv(
        Phase.WIDE_GATHER, chunk.owners[before], _tag(chunk, 3), (Buffer.USER, chunk.offset), chunk.length, [folded],
        wide=True,
    )  # fmt: skip
    if site != last - 1:
        _ring_pass_on(part, chunk, done)
    return done


def _ring_send(
    part: _Part, chunk: Chunk, to_site: int, source: tuple[Buffer, int], after: int, *, accumulated: bool
) -> int:
    return part.builder.send(
        Phase.WIDE_REDUCE, chunk.owners[to_site], _tag(chunk, 2), source, chunk.length, [after], wide=True,
        accumulated=accumulated,
    )  # fmt: skip


def _ring_pass_on(part: _Part, chunk: Chunk, done: int) -> None:
    following = (part.site + 1) % len(chunk.owners)
    part.builder.send(
        Phase.WIDE_GATHER, chunk.owners[following], _tag(chunk, 3), (Buffer.USER, chunk.offset), chunk.length, [done],
        wide=True,
    )  # fmt: skip


_WIDE: dict[str, Callable[[_Part, Chunk, tuple[int, int], int], int]] = {
    "exchange": _exchange,
    "direct": _direct,
    "ring": _ring,
}


def _others_from(site: int, owners: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the other sites and their owners, beginning with the next one, so that not all send to site 0 first."""
    count = len(owners)
    return [((site + step) % count, owners[(site + step) % count]) for step in range(1, count)]


def _broadcast_chunk(part: _Part, chunk: Chunk, collective: Collective, algorithm: str) -> None:
    root = collective.root
    root_site = part.topology.site_of(root)
    owner = chunk.owners[part.site]
    span = (Buffer.USER, chunk.offset)
    if part.rank == root and owner != root:
        sent = part.builder.send(
            Phase.LOCAL_REDUCE, owner, _tag(chunk, 0), span, chunk.length, _recent(part.local_sends, LOCAL_WINDOW)
        )
        part.local_sends.append(sent)
        return
    if owner != part.rank:
        part.builder.recv(Phase.LOCAL_GATHER, owner, _tag(chunk, 1), span, chunk.length)
        return
    have: list[int] = []
    if part.site == root_site:
        if part.rank != root:
            have = [part.builder.recv(Phase.LOCAL_REDUCE, root, _tag(chunk, 0), span, chunk.length)]
    else:
        source = root_site if algorithm == "star" else (part.site - 1) % len(chunk.owners)
        have = [
            part.builder.recv(Phase.WIDE_GATHER, chunk.owners[source], _tag(chunk, 2), span, chunk.length, wide=True)
        ]
    for site in _broadcast_targets(part.site, root_site, len(chunk.owners), algorithm):
        part.builder.send(Phase.WIDE_GATHER, chunk.owners[site], _tag(chunk, 2), span, chunk.length, have, wide=True)
    for peer in part.peers:
        if peer != root or part.site != root_site:
            part.builder.send(Phase.LOCAL_GATHER, peer, _tag(chunk, 1), span, chunk.length, have)


def _broadcast_targets(site: int, root_site: int, count: int, algorithm: str) -> list[int]:
    if algorithm == "relay":
        following = (site + 1) % count
        return [following] if following != root_site else []
    return [other for other in range(count) if other != site] if site == root_site else []
