"""Broadcast: every rank ends with the root's array.

The root scatters its array to the owners of its site, which send to the owners of the others; owners hand it to their
site. With S sites and V bytes:

=========  ============================================================  ==================  =====================
wide       what owners do                                                one-way delays      bytes an uplink
=========  ============================================================  ==================  =====================
star       the root's site sends to all others                           1                   (S-1) V at the root's
at-home    the root's site sends each chunk to one other site, in turn,  2                   V
           which sends it to the rest
=========  ============================================================  ==================  =====================

With more than two sites and lines that are shared by rate, the second uses the lines between all sites.
"""

from __future__ import annotations

from functools import partial

from detcoll.plan.collectives.blocks import ALL, Block, Piece
from detcoll.plan.collectives.declaration import Algorithm, Declaration, Homes, Hop, Run
from detcoll.plan.collectives.floors import floor_ns
from detcoll.plan.collectives.part import Part
from detcoll.plan.collectives.routes import home_of, spread
from detcoll.plan.ir import Collective
from detcoll.plan.symbols import Symbols
from detcoll.topology import Topology


def blocks(collective: Collective, topology: Topology, rank: int) -> list[Block]:
    """Return the whole array, from the root to all."""
    count = collective.count
    return [Block(0, collective.root, ALL, 0, 0, count, 0, count)] if count else []


def promise(symbols: Symbols, collective: Collective, topology: Topology, rank: int) -> list[Run]:
    """Return the root's contribution."""
    return [Run(symbols.leaf(collective.root), 0, collective.count)]


def _add_piece(part: Part, piece: Piece, collective: Collective, *, at_home: bool) -> None:
    passed_on = at_home and len(part.topology.sites) > 2
    spread(part, piece, in_place=True, home=home_of(part.topology, piece) if passed_on else None)


def _star_hops(sites: int, root_site: int) -> tuple[Hop, ...]:
    return (Hop(tuple((root_site, other) for other in range(sites) if other != root_site)),)


def _at_home_hops(sites: int, root_site: int) -> tuple[Hop, ...]:
    others = [site for site in range(sites) if site != root_site]
    to_home = Hop(tuple((root_site, site) for site in others), Homes.DESTINATION)
    return to_home, Hop(tuple((i, j) for i in others for j in others if i != j), Homes.SOURCE)


BROADCAST = Declaration(
    name="broadcast",
    has_root=True,
    algorithms=(
        Algorithm("star", partial(_add_piece, at_home=False), _star_hops, blocks=blocks),
        Algorithm("at-home", partial(_add_piece, at_home=True), _at_home_hops, blocks=blocks, at_home=True),
    ),
    after=promise,
    floor_ns=partial(floor_ns, blocks=blocks),
)
