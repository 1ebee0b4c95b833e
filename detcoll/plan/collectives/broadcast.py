"""Broadcast: every rank ends with the root's array.

The root scatters its array to the owners of its site, which send to the owners of the others; owners hand it to their
site. With S sites and V bytes:

=========  ============================================================  ==================  =====================
wide       what owners do                                                one-way delays      bytes an uplink
=========  ============================================================  ==================  =====================
star       the root's site sends to all others                           1                   (S-1) V at the root's
at-home    the root's site sends each chunk to one other site, in turn,  2                   V
           which sends it to the rest
relay      site r -> r+1 -> ... -> r-1                                   S-1                 V
=========  ============================================================  ==================  =====================
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from detcoll.plan.collectives.blocks import ALL, Block, Piece
from detcoll.plan.collectives.declaration import Algorithm, Declaration, Floats, Homes, Hop, Load, Opening, Run
from detcoll.plan.collectives.part import LOCAL_WINDOW, Part, local_gather, recent, tag_of
from detcoll.plan.collectives.routes import home_of, spread
from detcoll.plan.ir import Buffer, Collective, Phase
from detcoll.plan.layout import Chunk
from detcoll.plan.symbols import Symbols
from detcoll.topology import Topology


def promise(symbols: Symbols, collective: Collective, topology: Topology, rank: int) -> list[Run]:
    """Return the root's contribution."""
    return [Run(symbols.leaf(collective.root), 0, collective.count)]


def floor_ns(topology: Topology, collective: Collective) -> float:
    """Return the least time that a broadcast takes.

    The V bytes leave the root's site once, and the last of them crosses the longest delay from there:
    V / B_root / g + L_root, with B_root bytes/s of its uplink and payload share g.
    """
    source = topology.site_of(collective.root)
    uplink = topology.sites[source].uplink_bytes_per_s or 0.0
    delay_ns = max(topology.one_way_ns(source, j) for j in range(len(topology.sites)) if j != source)
    return collective.nbytes / uplink / topology.payload_share * 1e9 + delay_ns


def work(load: Load, algorithm: Algorithm, opening: bool) -> tuple[Floats, Floats]:
    """Return the steps and bytes of each rank's host: every rank has one step for a chunk, its owner hands it on."""
    peers = load.peers - load.at_root
    steps, moved = load.chunks + load.owned_chunks * peers, load.nbytes + load.owned_bytes * peers
    if load.sites > 1:
        sends, moves = algorithm.owner_work(load.sites)
        steps, moved = steps + load.owned_chunks * load.at_root * sends, moved + load.owned_bytes * load.at_root * moves
    return steps, moved


def _add_chunk(part: Part, chunk: Chunk, collective: Collective, *, relays: bool) -> None:
    root = collective.root
    root_site = part.topology.site_of(root)
    owner = chunk.owners[part.site]
    span = (Buffer.OUT, chunk.offset)
    if part.rank == root and owner != root:
        sent = part.builder.send(
            Phase.LOCAL_REDUCE, owner, tag_of(chunk, 0), span, chunk.length, recent(part.local_sends, LOCAL_WINDOW)
        )
        part.local_sends.append(sent)
        return
    if owner != part.rank:
        part.builder.recv(Phase.LOCAL_GATHER, owner, tag_of(chunk, 1), span, chunk.length)
        return
    have: list[int] = []
    count = len(chunk.owners)
    if part.site == root_site:
        if part.rank != root:
            have = [part.builder.recv(Phase.LOCAL_REDUCE, root, tag_of(chunk, 0), span, chunk.length)]
    else:
        source = (part.site - 1) % count if relays else root_site
        have = [
            part.builder.recv(Phase.WIDE_GATHER, chunk.owners[source], tag_of(chunk, 2), span, chunk.length, wide=True)
        ]
    for site in _targets(part.site, root_site, count, relays=relays):
        part.builder.send(Phase.WIDE_GATHER, chunk.owners[site], tag_of(chunk, 2), span, chunk.length, have, wide=True)
    local_gather(part, chunk, have, but=root)


def _blocks(collective: Collective, topology: Topology, rank: int) -> list[Block]:
    count = collective.count
    return [Block(0, collective.root, ALL, 0, 0, count, 0, count)] if count else []


def _add_piece_at_home(part: Part, piece: Piece, collective: Collective) -> None:
    sites = len(part.topology.sites)  # between two sites there is nobody else to pass it on to
    spread(part, piece, in_place=True, home=home_of(part.topology, piece) if sites > 2 else None)


def _targets(site: int, root_site: int, count: int, *, relays: bool) -> list[int]:
    if relays:
        following = (site + 1) % count
        return [following] if following != root_site else []
    return [other for other in range(count) if other != site] if site == root_site else []


def _star_hops(sites: int, root_site: int) -> tuple[Hop, ...]:
    return (Hop(tuple((root_site, other) for other in range(sites) if other != root_site), from_user=True),)


def _relay_hops(sites: int, root_site: int) -> tuple[Hop, ...]:
    order = [(root_site + step) % sites for step in range(sites)]
    return tuple(Hop((pair,), from_user=True) for pair in pairwise(order))


def _at_home_hops(sites: int, root_site: int) -> tuple[Hop, ...]:
    others = [site for site in range(sites) if site != root_site]
    to_home = Hop(tuple((root_site, site) for site in others), Homes.DESTINATION)
    return to_home, Hop(tuple((i, j) for i in others for j in others if i != j), Homes.SOURCE)


def _star_work(sites: int) -> tuple[float, float]:
    return sites - 1, 0


def _relay_work(sites: int) -> tuple[float, float]:
    return 1, 0


BROADCAST = Declaration(
    name="broadcast",
    has_root=True,
    algorithms=(
        Algorithm("star", partial(_add_chunk, relays=False), _star_hops, _star_work),
        Algorithm("at-home", _add_piece_at_home, _at_home_hops, blocks=_blocks, at_home=True),
        Algorithm("relay", partial(_add_chunk, relays=True), _relay_hops, _relay_work),
    ),
    opening=Opening.SCATTER,
    after=promise,
    floor_ns=floor_ns,
    work=work,
)
