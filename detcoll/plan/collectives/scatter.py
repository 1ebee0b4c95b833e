"""Scatter: every rank ends with its block of the root's array.

The root hands equal parts of what goes to other sites to the ranks of its site, which send them to owners there. With S
equal sites and V bytes, the size of the root's array:

=========  ============================================================  ==================  =====================
wide       what owners do                                                one-way delays      bytes an uplink
=========  ============================================================  ==================  =====================
direct     the root's site sends each other site the blocks of its ranks  1                  (S-1)/S V at the root's
=========  ============================================================  ==================  =====================
"""

from __future__ import annotations

from functools import partial

from detcoll.plan.collectives.blocks import Block, blocks_by_rank, positions
from detcoll.plan.collectives.declaration import Declaration, Homes, Hop, Run
from detcoll.plan.collectives.floors import floor_ns
from detcoll.plan.collectives.routes import direct
from detcoll.plan.ir import Collective
from detcoll.plan.symbols import Symbols
from detcoll.topology import Topology


def blocks(collective: Collective, topology: Topology, rank: int) -> list[Block]:
    """Return a block for each rank, from the root to there."""
    return blocks_by_rank(collective, topology, lambda owner, offset: (collective.root, owner, offset, 0))


def before(symbols: Symbols, collective: Collective, topology: Topology, rank: int) -> list[Run]:
    """Return the root's array, and nothing elsewhere."""
    if rank != collective.root:
        return []
    return [Run(symbols.leaf(rank), 0, sum(collective.blocks(topology.size)))]


def after(symbols: Symbols, collective: Collective, topology: Topology, rank: int) -> list[Run]:
    """Return a rank's block of the root's array."""
    counts = collective.blocks(topology.size)
    return [Run(symbols.leaf(collective.root), positions(counts)[rank], counts[rank])]


def elems(collective: Collective, size: int, rank: int) -> tuple[int, int]:
    """Return how many elements a rank gives and gets."""
    counts = collective.blocks(size)
    return sum(counts) if rank == collective.root else 0, counts[rank]


def in_place(collective: Collective, size: int, rank: int) -> tuple[int, int] | None:
    """Return where the root's input and output lie in one array: the output may be its own block of the input."""
    return (0, positions(collective.blocks(size))[rank]) if rank == collective.root else None


def _hops(sites: int, root_site: int) -> tuple[Hop, ...]:
    return (Hop(tuple((root_site, site) for site in range(sites) if site != root_site), Homes.DESTINATION),)


SCATTER = Declaration(
    name="scatter",
    has_root=True,
    has_out=True,
    has_counts=True,
    algorithms=(direct(blocks, _hops),),
    before=before,
    after=after,
    floor_ns=partial(floor_ns, blocks=blocks),
    elems=elems,
    in_place=in_place,
)
