"""Reduce: the root ends with the fold of all ranks' arrays; the others' arrays stay as they are.

Each chunk is folded inside every site, at its owner there. Then, with S sites and V bytes:

=========  ============================================================  ==================  =====================
wide       what owners do                                                one-way delays      bytes an uplink
=========  ============================================================  ==================  =====================
direct     each site sends its sum to the root's site, which folds all   1                   V
at-home    a site other than the root's folds each chunk, in turn, and    2                  V
           sends the result to the root's site
=========  ============================================================  ==================  =====================

The first puts (S-1) V bytes on the root's downlink, the second V. With more than two sites and lines that are shared by
rate, the second uses the lines between all sites, and so all of every uplink.
"""

from __future__ import annotations

from functools import partial

from detcoll.plan.collectives.all_reduce import fold_of_all
from detcoll.plan.collectives.blocks import ALL, Block
from detcoll.plan.collectives.declaration import Algorithm, Declaration, Homes, Hop, Run, all_pairs
from detcoll.plan.collectives.floors import floor_ns
from detcoll.plan.collectives.routes import add_piece_at_home, direct
from detcoll.plan.ir import Collective
from detcoll.plan.symbols import Symbols
from detcoll.topology import Topology


def blocks(collective: Collective, topology: Topology, rank: int) -> list[Block]:
    """Return the whole array, from all to the root."""
    if not collective.count:
        return []
    return [Block(0, ALL, collective.root, 0, 0, collective.count, 0, collective.count)]


def after(symbols: Symbols, collective: Collective, topology: Topology, rank: int) -> list[Run]:
    """Return the fold of all ranks' arrays at the root, and nothing elsewhere."""
    return [Run(fold_of_all(symbols, topology), 0, collective.count)] if rank == collective.root else []


def elems(collective: Collective, size: int, rank: int) -> tuple[int, int]:
    """Return how many elements a rank gives and gets."""
    return collective.count, collective.count if rank == collective.root else 0


def in_place(collective: Collective, size: int, rank: int) -> tuple[int, int] | None:
    """Return where the root's input and output lie in one array: they are the same."""
    return (0, 0) if rank == collective.root else None


def _direct_hops(sites: int, root_site: int) -> tuple[Hop, ...]:
    return (Hop(tuple((site, root_site) for site in range(sites) if site != root_site), folds=True),)


def _at_home_hops(sites: int, root_site: int) -> tuple[Hop, ...]:
    to_home = tuple(pair for pair in all_pairs(sites) if pair[1] != root_site)
    to_root = tuple((site, root_site) for site in range(sites) if site != root_site)
    return Hop(to_home, Homes.DESTINATION, folds=True), Hop(to_root, Homes.SOURCE, behind=0)


REDUCE = Declaration(
    name="reduce",
    has_op=True,
    has_root=True,
    algorithms=(
        direct(blocks, _direct_hops),
        Algorithm("at-home", add_piece_at_home, _at_home_hops, blocks=blocks, at_home=True),
    ),
    after=after,
    floor_ns=partial(floor_ns, blocks=blocks),
    elems=elems,
    in_place=in_place,
)
