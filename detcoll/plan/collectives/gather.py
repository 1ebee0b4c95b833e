"""Gather: the root ends with the blocks of all ranks, one after another in rank order.

Each site sends its blocks to the root's site, where all ranks take an equal part of them in and hand it to the root.
With S equal sites and V bytes, the size of the root's result:

=========  ============================================================  ==================  =====================
wide       what owners do                                                one-way delays      bytes an uplink
=========  ============================================================  ==================  =====================
direct     each site sends its ranks' blocks to the root's site          1                   V / S
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
    """Return a block for each rank, from there to the root."""
    return blocks_by_rank(collective, topology, lambda owner, offset: (owner, collective.root, 0, offset))


def before(symbols: Symbols, collective: Collective, topology: Topology, rank: int) -> list[Run]:
    """Return a rank's own block."""
    counts = collective.blocks(topology.size)
    return [Run(symbols.leaf(rank), positions(counts)[rank], counts[rank])]


def after(symbols: Symbols, collective: Collective, topology: Topology, rank: int) -> list[Run]:
    """Return the blocks of all ranks at the root, and nothing elsewhere."""
    counts = collective.blocks(topology.size)
    if rank != collective.root:
        return []
    return [Run(symbols.leaf(r), offset, counts[r]) for r, offset in enumerate(positions(counts))]


def elems(collective: Collective, size: int, rank: int) -> tuple[int, int]:
    """Return how many elements a rank gives and gets."""
    counts = collective.blocks(size)
    return counts[rank], sum(counts) if rank == collective.root else 0


def in_place(collective: Collective, size: int, rank: int) -> tuple[int, int] | None:
    """Return where the root's input and output lie in one array: the input may be its own block of the output."""
    return (positions(collective.blocks(size))[rank], 0) if rank == collective.root else None


def _hops(sites: int, root_site: int) -> tuple[Hop, ...]:
    return (Hop(tuple((site, root_site) for site in range(sites) if site != root_site), Homes.SOURCE),)


GATHER = Declaration(
    name="gather",
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
