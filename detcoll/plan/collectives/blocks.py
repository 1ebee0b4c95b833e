"""Blocks: what moves as a whole from one rank, or from all, to one rank, or to all; and how blocks are cut.

Kinds whose input and output are different arrays state a list of blocks. There are three sorts:

- from one rank to all (a broadcast of the block),
- from all ranks to one (a reduction of the block), where every rank has it in its input,
- from one rank to one.

Between two sites a block travels between owners, one in each site, so that every rank of a site carries an equal part
of what its site exchanges, however uneven blocks are. For that, the blocks which one site exchanges with another are
thought of as one sequence. Each of the two sites cuts it evenly over its ranks. With equal blocks and sites of equal
size, every rank owns its own block.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate, pairwise

from detcoll.plan.collectives.part import Part
from detcoll.plan.ir import Collective
from detcoll.plan.layout import CUT_ELEMS, ChunkSize
from detcoll.topology import Topology

ALL = -1
"""Instead of a rank: every rank."""

NOBODY = -1
"""The owner in a site that a block does not reach."""


@dataclass(frozen=True, slots=True)
class Block:
    """``length`` elements at ``in_offset`` of the source's input, which go to ``out_offset`` of the target's output.

    ``source``, ``target`` : ranks, or `ALL`.
    ``slot`` : blocks that may meet between the same two ranks have different ones.
    ``begin``, ``total`` : where it lies in the sequence of what its sites exchange, and the length of that.
    ``direct`` : it goes from source to target without owners.
    """

    slot: int
    source: int
    target: int
    in_offset: int
    out_offset: int
    length: int
    begin: int
    total: int
    direct: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """What moves at once of a block; the fields of `detcoll.plan.layout.Chunk`, and the block's ends.

    ``offset`` : in the output.  ``in_offset`` : in the input.  ``owners`` : by site, `NOBODY` where it does not go.
    ``turn`` : how many pieces of the same owners come before it.
    ``late`` : there is scratch for it and for all that its owner in the source's site sends or passes on after it.
    """

    number: int
    source: int
    target: int
    in_offset: int
    offset: int
    length: int
    owners: tuple[int, ...]
    turn: int
    late: bool = False


Blocks = Callable[[Collective, Topology, int], list[Block]]
"""States the blocks that have to do with the site of a rank, in the order in which they should move."""


def positions(counts: Sequence[int]) -> list[int]:
    """Return where each rank's block begins in an array that holds them one after another."""
    return list(accumulate(counts, initial=0))[:-1]


def blocks_by_rank(
    collective: Collective, topology: Topology, place: Callable[[int, int], tuple[int, int, int, int]]
) -> list[Block]:
    """Return a block for each rank.

    ``place`` : for a rank and where its block begins in the array that has all of them, what `Block` calls ``source``,
    ``target``, ``in_offset`` and ``out_offset``.
    """
    counts = collective.blocks(topology.size)
    offsets, begins, totals = positions(counts), [0] * topology.size, [0] * topology.size
    for site in topology.sites:
        inside = [counts[rank] for rank in site.ranks]
        for rank, begin in zip(site.ranks, positions(inside), strict=True):
            begins[rank], totals[rank] = begin, sum(inside)
    return [
        Block(rank, *place(rank, offsets[rank]), counts[rank], begins[rank], totals[rank])
        for rank in range(topology.size)
        if counts[rank]
    ]


def pieces(part: Part, collective: Collective, blocks: Blocks) -> list[Piece]:
    """Return the pieces that have to do with the site of a rank, in the order in which they should move."""
    stated = blocks(collective, part.topology, part.rank)
    numbers = _numbers(part.topology, stated, part.chunk_size)
    made = [piece for block in stated for piece in _cut(part.topology, block, part.chunk_size, numbers[block.slot])]
    made.sort(key=lambda piece: piece.turn)
    site_of = {rank: index for index, site in enumerate(part.topology.sites) for rank in site.ranks}
    places: dict[int, int] = {}
    for index in reversed(range(len(made))):
        piece = made[index]
        target_site = site_of.get(piece.target, ALL)
        if piece.source == ALL or site_of[piece.source] == target_site:
            continue  # folds lie in scratch anyway, and what stays in a site needs none
        leaves = piece.owners[site_of[piece.source]]
        places[leaves] = places.get(leaves, 0) + 1
        if piece.target != ALL and (enters := piece.owners[target_site]) != piece.target:
            places[enters] = places.get(enters, 0) + 1
        if places[leaves] <= part.chunk_size.depth:
            made[index] = replace(piece, late=True)
    return made


def _numbers(topology: Topology, blocks: Sequence[Block], chunk_size: ChunkSize) -> dict[int, int]:
    """Return the number of the first piece of a block in each slot; slots follow one another.

    Owners cut a block at most where one of the sites has a cut, which is the same place for equal parts of the whole.
    """
    longest: dict[int, int] = {}
    for block in blocks:
        longest[block.slot] = max(longest.get(block.slot, 0), block.length)
    cuts = 0
    if len(topology.sites) > 1 or any(ALL in (block.source, block.target) for block in blocks):
        sizes = {len(site.ranks) for site in topology.sites}
        cuts = len({Fraction(index, ranks) for ranks in sizes for index in range(1, ranks)})
    needed = [-(-longest[slot] // chunk_size.elems) + cuts for slot in sorted(longest)]
    return dict(zip(sorted(longest), positions(needed), strict=True))


def segments_of(topology: Topology, block: Block, *, whole: bool = False) -> list[tuple[int, int, tuple[int, ...]]]:
    """Return where the parts of a block with the same owners begin and end in it, and their owners by site.

    ``whole`` : the array is small, so that inside one site its root serves all others by itself.
    """
    if not block.length:
        return []
    sites = range(len(topology.sites))
    ranks = {topology.site_of(rank): rank for rank in (block.source, block.target) if rank != ALL}
    is_shared = ALL in (block.source, block.target)
    reached = list(sites) if is_shared else sorted(ranks)
    if block.direct or (len(reached) == 1 and (whole or not is_shared)):
        return [(0, block.length, tuple(ranks.get(site, NOBODY) for site in sites))]
    cuts = {site: _cuts(block, len(topology.sites[site].ranks)) for site in reached}
    inside = {cut for _, found in cuts.values() for cut in found if 0 < cut < block.length}
    parts = []
    for begin, end in pairwise(sorted({0, block.length} | inside)):
        owners = [NOBODY] * len(topology.sites)
        for site in reached:
            before, found = cuts[site]
            owners[site] = topology.sites[site].ranks[before + bisect_right(found, begin)]
        parts.append((begin, end, tuple(owners)))
    return parts


def _cuts(block: Block, ranks: int) -> tuple[int, list[int]]:
    """Return how many cuts of the sequence by a site of so many ranks come no later than the block, and those inside.

    They count from where the block begins. A cut near an end of the block is moved to that end, since otherwise a few
    elements would travel alone.
    """
    before = min(((block.begin + 1) * ranks - 1) // block.total, ranks - 1)
    up_to = min(((block.begin + block.length) * ranks - 1) // block.total, ranks - 1)
    made = []
    for index in range(before + 1, up_to + 1):
        cut = block.total * index // ranks - block.begin
        cut -= cut % CUT_ELEMS
        made.append(block.length if block.length - cut < CUT_ELEMS else cut)
    return before, made


def _cut(topology: Topology, block: Block, chunk_size: ChunkSize, first: int) -> Iterator[Piece]:
    count = first
    for begin, end, owners in segments_of(topology, block, whole=chunk_size.whole):
        for turn, offset in enumerate(range(begin, end, chunk_size.elems)):
            length = min(chunk_size.elems, end - offset)
            yield Piece(
                count, block.source, block.target, block.in_offset + offset, block.out_offset + offset,
                length, owners, turn,
            )  # fmt: skip
            count += 1
