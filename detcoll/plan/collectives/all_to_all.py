"""All-to-all: every rank sends a block to every rank, and ends with what all sent to it, in rank order.

Between two sites a rank sends what is for the other site's ranks to one owner there, which hands it on. With S equal
sites of R ranks and V bytes, the size of a rank's array:

=========  ============================================================  ==================  =====================
wide       what owners do                                                one-way delays      bytes an uplink
=========  ============================================================  ==================  =====================
direct     each rank sends to its owner in each other site               1                   (S-1)/S R V
=========  ============================================================  ==================  =====================

Where blocks differ in size, a rank knows only its own: what it sends to each other rank, and what it gets from each.
Then they go from rank to rank without owners, and sender and receiver must state the same size.
"""

from __future__ import annotations

from functools import partial

from detcoll.plan.collectives.blocks import Block, positions
from detcoll.plan.collectives.declaration import Declaration, Homes, Hop, Run, all_pairs
from detcoll.plan.collectives.floors import floor_ns
from detcoll.plan.collectives.routes import direct
from detcoll.plan.ir import Collective
from detcoll.plan.symbols import Symbols
from detcoll.topology import Topology


def blocks(collective: Collective, topology: Topology, rank: int) -> list[Block]:
    """Return the blocks that the ranks of a rank's site send or get; where sizes differ, only its own."""
    if collective.counts:
        return _stated(collective, topology.size, rank)
    size, length, home = topology.size, collective.count // topology.size, topology.site_of(rank)
    if not length:
        return []
    site_of = {member: index for index, each in enumerate(topology.sites) for member in each.ranks}
    places = {member: place for each in topology.sites for place, member in enumerate(each.ranks)}
    ranks_at = [len(each.ranks) for each in topology.sites]
    members = topology.sites[home].ranks
    made = []
    for shift in range(size):  # so that not all send to the same rank first
        for source in sorted({*members, *((target - shift) % size for target in members)}):
            target = (source + shift) % size
            here, there = site_of[source], site_of[target]
            begin = (places[source] * ranks_at[there] + places[target]) * length
            total = ranks_at[here] * ranks_at[there] * length
            made.append(Block(shift, source, target, target * length, source * length, length, begin, total))
    return made


def _stated(collective: Collective, size: int, rank: int) -> list[Block]:
    sends, gets = collective.counts, collective.out_counts
    in_at, out_at = positions(sends), positions(gets)
    made = [Block(0, rank, rank, in_at[rank], out_at[rank], sends[rank], 0, sends[rank], direct=True)]
    for shift in range(1, size):
        to, source = (rank + shift) % size, (rank - shift) % size
        made.append(Block(0, rank, to, in_at[to], 0, sends[to], 0, sends[to], direct=True))
        made.append(Block(0, source, rank, 0, out_at[source], gets[source], 0, gets[source], direct=True))
    return [block for block in made if block.length]


def _element(source: int, target: int) -> int:
    """Return the number of the first element of a block; blocks have fewer than 2**32."""
    return (source << 16 | target) << 32


def before(symbols: Symbols, collective: Collective, topology: Topology, rank: int) -> list[Run]:
    """Return a rank's blocks for all ranks."""
    counts = collective.blocks(topology.size)
    return [Run(symbols.leaf(rank), _element(rank, to), length) for to, length in enumerate(counts)]


def after(symbols: Symbols, collective: Collective, topology: Topology, rank: int) -> list[Run]:
    """Return the blocks that all ranks have for a rank."""
    counts = collective.out_counts or collective.blocks(topology.size)
    return [Run(symbols.leaf(source), _element(source, rank), length) for source, length in enumerate(counts)]


def elems(collective: Collective, size: int, rank: int) -> tuple[int, int]:
    """Return how many elements a rank gives and gets."""
    counts = collective.blocks(size)
    return sum(counts), sum(collective.out_counts or counts)


def _hops(sites: int, root_site: int) -> tuple[Hop, ...]:
    return (Hop(all_pairs(sites), Homes.SOURCE),)


ALL_TO_ALL = Declaration(
    name="all_to_all",
    has_out=True,
    has_counts=True,
    is_pairwise=True,
    algorithms=(direct(blocks, _hops),),
    before=before,
    after=after,
    floor_ns=partial(floor_ns, blocks=blocks),
    elems=elems,
)
