"""All-reduce: every rank ends with the fold of all ranks' arrays.

Letters: P ranks, S sites, R ranks a site, V bytes, c a chunk; counts are for equal sites.

Each chunk is first folded inside every site, in rank order, at the chunk's owner there (local reduce); owners then fold
between sites, in site order (wide stage); owners hand the result to their site (local gather). Local traffic of a rank:
it sends (R-1)/R V twice and receives as much.

=========  ============================================================  ==================  =====================
wide       what owners do                                                one-way delays      bytes an uplink
=========  ============================================================  ==================  =====================
exchange   everyone sends its sum to everyone, and folds all S           1                   (S-1) V
direct     each chunk is folded at its home, which sends it to all        2                   2 (S-1)/S V
ring       sums travel site 0 -> S-1, the result S-1 -> 0 -> ... -> S-2  2 (S-1)             2 V at most
=========  ============================================================  ==================  =====================

Every site's fold is a level of the promised order and ends in the array's own type, a sum, or a mean where 16-bit
floats are averaged; the fold between sites is the other level. Inputs of a fold say how many ranks they hold.

Chunks go through these stages one behind the other, so the stages overlap. A ring here keeps the promised fold order
(`op(lower, higher)`), which the textbook ring does not; it pays with the pipeline's length. Between sites it sends sums
in the accumulation type, so that 16-bit floats are rounded once per level and not at every hop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from detcoll.plan.collectives.declaration import (
    Algorithm,
    Declaration,
    Floats,
    Homes,
    Hop,
    Load,
    Run,
    all_pairs,
    longest_delay_ns,
)
from detcoll.plan.collectives.part import (
    Part,
    local_contribute,
    local_fold,
    local_gather,
    other_owners,
    recent,
    tag_of,
)  # fmt: skip
from detcoll.plan.ir import Buffer, Collective, Phase
from detcoll.plan.layout import Chunk
from detcoll.plan.symbols import Symbols
from detcoll.topology import Topology

Wide = Callable[[Part, Chunk, tuple[int, int], int], int]
"""Adds the wide stage of a chunk that lies in a scratch place (number, offset) after a step; returns the last one."""


def promise(symbols: Symbols, collective: Collective, topology: Topology, rank: int) -> list[Run]:
    """Return the fold of all ranks' arrays."""
    return [Run(fold_of_all(symbols, topology), 0, collective.count)]


def fold_of_all(symbols: Symbols, topology: Topology) -> int:
    """Return the fold of all ranks: in rank order inside a site, sites in site order; the last fold is final."""
    if topology.size == 1:
        return symbols.leaf(0)
    level = [[symbols.leaf(each) for each in site.ranks] for site in topology.sites]
    if len(level) == 1:
        return symbols.fold(level[0], final=True)
    return symbols.fold([symbols.fold(site) for site in level], final=True)


def floor_ns(topology: Topology, collective: Collective) -> float:
    """Return the least time that an all-reduce takes.

    For S sites with uplinks B_i (bytes/s on the wire), payload share g and V bytes:

    - Every site's result depends on every other site's data. A site that sends less than V bytes of information cannot
      have told the others its V bytes, unless others add theirs on the way; in any case all sites together must send
      2(S-1)V bytes (each of the V bytes of S contributions takes part in S-1 folds between sites and S-1 copies back;
      Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", J. Parallel Distrib. Comput. 69, 2009), and the
      slowest site must send at least V if its contribution is to leave it.
    - The answer crosses at least the longest one-way delay, since the two sites at its ends need each other's data.

        T >= max(V / min B_i, 2(S-1) V / sum B_i) / g + L
    """
    count, nbytes = len(topology.sites), collective.nbytes
    uplinks = [site.uplink_bytes_per_s or 0.0 for site in topology.sites]
    seconds = max(nbytes / min(uplinks), 2 * (count - 1) * nbytes / sum(uplinks)) / topology.payload_share
    return seconds * 1e9 + longest_delay_ns(topology)


def work(load: Load, algorithm: Algorithm, opening: bool) -> tuple[Floats, Floats]:
    """Return the steps and bytes of each rank's host: a chunk of others is sent and taken back, one's own is folded."""
    times = 1 if opening else 2
    elsewhere, owned = times * (load.peers > 0), times * load.peers + 1
    steps = (load.chunks - load.owned_chunks) * elsewhere + load.owned_chunks * owned
    moved = (load.nbytes - load.owned_bytes) * elsewhere + load.owned_bytes * owned
    if load.sites > 1:
        wide_steps, wide_moves = algorithm.owner_work(load.sites)
        steps, moved = steps + load.owned_chunks * wide_steps, moved + load.owned_bytes * wide_moves * (not opening)
    return steps, moved


def _add_chunk(part: Part, chunk: Chunk, collective: Collective, *, wide: Wide) -> None:
    owner = chunk.owners[part.site]
    if owner != part.rank:
        local_contribute(part, chunk, owner)
        return
    if len(part.topology.sites) == 1:
        done = local_fold(part, chunk, (Buffer.OUT, chunk.offset), [], final=True)
    else:
        place, offset, free_after = part.next_place()
        folded = local_fold(part, chunk, (Buffer.PARTIAL, offset), free_after, final=False)
        done = wide(part, chunk, (place, offset), folded)
    local_gather(part, chunk, [done])


def _wide_fold(
    part: Part, chunk: Chunk, own: tuple[Buffer, int], after: Sequence[int], target: tuple[Buffer, int], ahead: int
) -> int:
    """Receive the other sites' sums and fold all of them, in site order, into ``target``, after some steps.

    ``ahead`` : for how many chunks this rank waits at once.
    """
    before = recent(part.wide_folds, ahead)
    lent = {
        site: part.builder.recv(
            Phase.WIDE_REDUCE, owner, tag_of(chunk, 2), (Buffer.LENT, 0), chunk.length, before, wide=True
        )
        for site, owner in enumerate(chunk.owners)
        if site != part.site
    }
    inputs = [
        (Buffer.LENT, lent[site], ranks) if site in lent else (*own, ranks)
        for site, ranks in enumerate(part.ranks_of_sites)
    ]
    done = part.builder.fold(Phase.WIDE_REDUCE, inputs, target, chunk.length, [*after, *lent.values()], final=True)
    part.wide_folds.append(done)
    return done


def _add_exchanged(part: Part, chunk: Chunk, collective: Collective) -> None:
    if part.chunk_size.in_place and not part.peers:
        user = (Buffer.OUT, chunk.offset)
        sent = _exchange_sends(part, chunk, user, [])
        _wide_fold(part, chunk, user, sent, user, part.chunk_size.in_place)
    else:
        _add_chunk(part, chunk, collective, wide=_exchange)


def _exchange_sends(part: Part, chunk: Chunk, source: tuple[Buffer, int], after: Sequence[int]) -> list[int]:
    return [
        part.builder.send(Phase.WIDE_REDUCE, owner, tag_of(chunk, 2), source, chunk.length, after, wide=True)
        for owner in other_owners(part.site, chunk.owners)
    ]


def _exchange(part: Part, chunk: Chunk, place: tuple[int, int], folded: int) -> int:
    number, offset = place
    own = (Buffer.PARTIAL, offset)
    sent = _exchange_sends(part, chunk, own, [folded])
    done = _wide_fold(part, chunk, own, [folded], (Buffer.OUT, chunk.offset), part.chunk_size.depth)
    part.last_use[number] = [*sent, done]
    return done


def _direct(part: Part, chunk: Chunk, place: tuple[int, int], folded: int) -> int:
    number, offset = place
    home = chunk.home
    if part.site == home:
        own = (Buffer.PARTIAL, offset)
        summed = _wide_fold(part, chunk, own, [folded], own, part.chunk_size.depth)
        # Sent from scratch, so that the caller's array is finished without waiting for acknowledgements.
        sends = [
            part.builder.send(Phase.WIDE_GATHER, owner, tag_of(chunk, 3), own, chunk.length, [summed], wide=True)
            for owner in other_owners(part.site, chunk.owners)
        ]
        copied = [(*own, part.topology.size)]
        done = part.builder.fold(Phase.WIDE_GATHER, copied, (Buffer.OUT, chunk.offset), chunk.length, [summed])
        part.last_use[number] = [*sends, done]
        return done
    sent = part.builder.send(
        Phase.WIDE_REDUCE, chunk.owners[home], tag_of(chunk, 2), (Buffer.PARTIAL, offset), chunk.length, [folded],
        wide=True,
    )  # fmt: skip
    part.last_use[number] = [sent]
    return part.builder.recv(
        Phase.WIDE_GATHER, chunk.owners[home], tag_of(chunk, 3), (Buffer.OUT, chunk.offset), chunk.length, [folded],
        wide=True,
    )  # fmt: skip


def _ring(part: Part, chunk: Chunk, place: tuple[int, int], folded: int) -> int:
    number, offset = place
    site, last, ranks = part.site, len(chunk.owners) - 1, part.ranks_of_sites
    own = (Buffer.PARTIAL, offset)
    if site == 0:
        sent = _ring_send(part, chunk, 1, own, folded, accumulated=False)
        part.last_use[number] = [sent]
    else:
        lent = part.builder.recv(
            Phase.WIDE_REDUCE, chunk.owners[site - 1], tag_of(chunk, 2), (Buffer.LENT, 0), chunk.length,
            recent(part.wide_folds, part.chunk_size.depth), wide=True, accumulated=site > 1,
        )  # fmt: skip
        target = (Buffer.OUT, chunk.offset) if site == last else (Buffer.ACCUMULATOR, offset)
        summed = part.builder.fold(
            Phase.WIDE_REDUCE, [(Buffer.LENT, lent, sum(ranks[:site])), (*own, ranks[site])], target, chunk.length,
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
        Phase.WIDE_GATHER, chunk.owners[before], tag_of(chunk, 3), (Buffer.OUT, chunk.offset), chunk.length, [folded],
        wide=True,
    )  # fmt: skip
    if site != last - 1:
        _ring_pass_on(part, chunk, done)
    return done


def _ring_send(
    part: Part, chunk: Chunk, to_site: int, source: tuple[Buffer, int], after: int, *, accumulated: bool
) -> int:
    return part.builder.send(
        Phase.WIDE_REDUCE, chunk.owners[to_site], tag_of(chunk, 2), source, chunk.length, [after], wide=True,
        accumulated=accumulated,
    )  # fmt: skip


def _ring_pass_on(part: Part, chunk: Chunk, done: int) -> None:
    following = (part.site + 1) % len(chunk.owners)
    part.builder.send(
        Phase.WIDE_GATHER, chunk.owners[following], tag_of(chunk, 3), (Buffer.OUT, chunk.offset), chunk.length, [done],
        wide=True,
    )  # fmt: skip


def _exchange_hops(sites: int, root_site: int) -> tuple[Hop, ...]:
    return (Hop(all_pairs(sites), folds=True),)


def _direct_hops(sites: int, root_site: int) -> tuple[Hop, ...]:
    pairs = all_pairs(sites)
    return Hop(pairs, Homes.DESTINATION, folds=True), Hop(pairs, Homes.SOURCE, behind=0)


def _ring_hops(sites: int, root_site: int) -> tuple[Hop, ...]:
    last = sites - 1
    sums = [Hop(((site, site + 1),), folds=True, accumulated=site > 0) for site in range(last)]
    results = [
        Hop(((site, (site + 1) % sites),), from_user=True, behind=site if site < last else None)
        for site in [last, *range(last - 1)]
    ]
    return (*sums, *results)


def _exchange_work(sites: int) -> tuple[float, float]:
    return 2 * (sites - 1) + 1, sites


def _direct_work(sites: int) -> tuple[float, float]:
    """Return the mean over sites: a chunk is at home in one of them."""
    others = sites - 1
    return (2 * others + 2 + 2 * others) / sites, (sites + 1 + others) / sites


def _ring_work(sites: int) -> tuple[float, float]:
    return 5, 3


ALL_REDUCE = Declaration(
    name="all_reduce",
    has_op=True,
    algorithms=(
        Algorithm("exchange", _add_exchanged, _exchange_hops, _exchange_work),
        Algorithm("direct", partial(_add_chunk, wide=_direct), _direct_hops, _direct_work),
        Algorithm("ring", partial(_add_chunk, wide=_ring), _ring_hops, _ring_work, accumulates=True),
    ),
    after=promise,
    floor_ns=floor_ns,
    work=work,
)
