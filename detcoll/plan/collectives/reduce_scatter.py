"""Reduce-scatter: every rank ends with its block of the fold of all ranks' arrays.

Each block is reduced to the rank that gets it: inside each site first, then between the block's owners. With S equal
sites and V bytes, the size of a rank's array:

=========  ============================================================  ==================  =====================
wide       what owners do                                                one-way delays      bytes an uplink
=========  ============================================================  ==================  =====================
direct     each site sends its folds of others' blocks to their sites    1                   (S-1)/S V
=========  ============================================================  ==================  =====================

The order of folds is that of an all-reduce, so that the result is the same, bit for bit, as a block of its result.
"""

from __future__ import annotations

from functools import partial

from detcoll.plan.collectives.all_reduce import fold_of_all
from detcoll.plan.collectives.blocks import ALL, Block, blocks_by_rank, positions
from detcoll.plan.collectives.declaration import Declaration, Homes, Hop, Run, all_pairs
from detcoll.plan.collectives.floors import floor_ns
from detcoll.plan.collectives.routes import direct
from detcoll.plan.ir import Collective
from detcoll.plan.symbols import Symbols
from detcoll.topology import Topology


def blocks(collective: Collective, topology: Topology, rank: int) -> list[Block]:
    """Return a block for each rank, from all to there."""
    return blocks_by_rank(collective, topology, lambda owner, offset: (ALL, owner, offset, 0))


def before(symbols: Symbols, collective: Collective, topology: Topology, rank: int) -> list[Run]:
    """Return a rank's whole array."""
    return [Run(symbols.leaf(rank), 0, sum(collective.blocks(topology.size)))]


def after(symbols: Symbols, collective: Collective, topology: Topology, rank: int) -> list[Run]:
    """Return a rank's block of the fold."""
    counts = collective.blocks(topology.size)
    return [Run(fold_of_all(symbols, topology), positions(counts)[rank], counts[rank])]


def elems(collective: Collective, size: int, rank: int) -> tuple[int, int]:
    """Return how many elements a rank gives and gets."""
    counts = collective.blocks(size)
    return sum(counts), counts[rank]


def in_place(collective: Collective, size: int, rank: int) -> tuple[int, int]:
    """Return where input and output lie in one array: the output may be the rank's own block of the input."""
    return 0, positions(collective.blocks(size))[rank]


def _hops(sites: int, root_site: int) -> tuple[Hop, ...]:
    return (Hop(all_pairs(sites), Homes.DESTINATION, folds=True),)


REDUCE_SCATTER = Declaration(
    name="reduce_scatter",
    has_op=True,
    has_out=True,
    has_counts=True,
    algorithms=(direct(blocks, _hops, awaits=True),),
    before=before,
    after=after,
    floor_ns=partial(floor_ns, blocks=blocks),
    elems=elems,
    in_place=in_place,
)
