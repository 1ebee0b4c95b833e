"""All-gather: every rank ends with the blocks of all ranks, one after another in rank order.

Each block is broadcast by the rank that has it. With S equal sites and V bytes, the result's size:

=========  ============================================================  ==================  =====================
wide       what owners do                                                one-way delays      bytes an uplink
=========  ============================================================  ==================  =====================
direct     each site sends its ranks' blocks to all other sites          1                   (S-1)/S V
=========  ============================================================  ==================  =====================

Blocks may differ in size. The owners of a site then carry equal parts of what it sends, whichever rank has it.
"""

from __future__ import annotations

from functools import partial

from detcoll.plan.collectives.blocks import ALL, Block, blocks_by_rank, positions
from detcoll.plan.collectives.declaration import Declaration, Homes, Hop, Run, all_pairs
from detcoll.plan.collectives.floors import floor_ns
from detcoll.plan.collectives.routes import direct
from detcoll.plan.ir import Collective
from detcoll.plan.symbols import Symbols
from detcoll.topology import Topology


def blocks(collective: Collective, topology: Topology, rank: int) -> list[Block]:
    """Return a block for each rank, from there to all."""
    return blocks_by_rank(collective, topology, lambda owner, offset: (owner, ALL, 0, offset))


def before(symbols: Symbols, collective: Collective, topology: Topology, rank: int) -> list[Run]:
    """Return a rank's own block."""
    counts = collective.blocks(topology.size)
    return [Run(symbols.leaf(rank), positions(counts)[rank], counts[rank])]


def after(symbols: Symbols, collective: Collective, topology: Topology, rank: int) -> list[Run]:
    """Return the blocks of all ranks, in rank order."""
    counts = collective.blocks(topology.size)
    return [Run(symbols.leaf(r), offset, counts[r]) for r, offset in enumerate(positions(counts))]


def elems(collective: Collective, size: int, rank: int) -> tuple[int, int]:
    """Return how many elements a rank gives and gets."""
    counts = collective.blocks(size)
    return counts[rank], sum(counts)


def in_place(collective: Collective, size: int, rank: int) -> tuple[int, int]:
    """Return where input and output lie in one array: the input may be the rank's own block of the output."""
    return positions(collective.blocks(size))[rank], 0


def _hops(sites: int, root_site: int) -> tuple[Hop, ...]:
    return (Hop(all_pairs(sites), Homes.SOURCE),)


ALL_GATHER = Declaration(
    name="all_gather",
    has_out=True,
    has_counts=True,
    algorithms=(direct(blocks, _hops),),
    before=before,
    after=after,
    floor_ns=partial(floor_ns, blocks=blocks),
    elems=elems,
    in_place=in_place,
)
