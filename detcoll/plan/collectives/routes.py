"""How a piece of a block travels: the steps of one rank.

Every piece crosses the wide area at most once to each site. What a rank passes on lies in its output if it belongs
there, else in scratch. The last pieces that an owner sends over the wide area are sent from scratch too: the caller may
write to its arrays again when it has its result, and need not wait for the last acknowledgements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from detcoll.plan.collectives.blocks import ALL, Blocks, Piece
from detcoll.plan.collectives.declaration import Algorithm, Hop
from detcoll.plan.collectives.part import (
    LOCAL_WINDOW,
    Part,
    Span,
    local_fold,
    local_gather,
    other_owners,
    recent,
    tag_of,
)
from detcoll.plan.ir import Buffer, Collective, Phase
from detcoll.topology import Topology

TO_OWNER, FROM_OWNER, ACROSS, RESULT = 0, 1, 2, 3
"""The phases of a piece's messages, for tags."""


def add_piece(part: Part, piece: Piece, collective: Collective) -> None:
    """Add this rank's steps for a piece."""
    if piece.source == ALL:
        collect(part, piece)
    elif piece.target == ALL:
        spread(part, piece)
    elif part.rank in (piece.source, piece.target, *piece.owners):
        move(part, piece)


def spread(part: Part, piece: Piece, *, in_place: bool = False, home: int | None = None) -> None:
    """Add the steps for a piece that goes from one rank to all: to its owner, between owners, inside each site.

    ``in_place`` : the root has it in its output.  ``home`` : the site that passes it on to all sites but the root's; by
    default the root's own.
    """
    root, root_site, owner = piece.source, part.topology.site_of(piece.source), piece.owners[part.site]
    kept = (Buffer.OUT, piece.offset)
    given = kept if in_place else (Buffer.IN, piece.in_offset)
    have: list[int] = []
    if part.rank == root:
        if not in_place:
            part.builder.fold(Phase.LOCAL_GATHER, [(*given, 1)], kept, piece.length, [])
        if owner != root:
            _send_local(part, piece, owner, given)
            return
    elif owner != part.rank:
        part.builder.recv(Phase.LOCAL_GATHER, owner, tag_of(piece, FROM_OWNER), kept, piece.length)
        return
    else:
        given = kept
        if part.site == root_site:
            came = part.builder.recv(Phase.LOCAL_REDUCE, root, tag_of(piece, TO_OWNER), kept, piece.length)
        elif home is None or home == part.site:
            came = _recv_across(part, piece, piece.owners[root_site], kept, [])
        else:
            came = _recv_across(part, piece, piece.owners[home], kept, [], RESULT)
        have = [came]
    others = [site for site in range(len(piece.owners)) if site != part.site]
    if part.site == home:
        others.remove(root_site)
        _send_across(part, piece, [piece.owners[site] for site in others], given, have, RESULT)
    elif part.site == root_site and others:
        owners = other_owners(part.site, piece.owners) if home is None else (piece.owners[home],)
        _send_across(part, piece, owners, given, have)
    local_gather(part, piece, have, but=root, source=given)


def collect(part: Part, piece: Piece) -> None:
    """Add the steps for a piece that all ranks have and one gets the fold of: inside each site, between owners."""
    root, root_site, owner = piece.target, part.topology.site_of(piece.target), piece.owners[part.site]
    given, kept = (Buffer.IN, piece.in_offset), (Buffer.OUT, piece.offset)
    if owner != part.rank:
        sent = _send_local(part, piece, owner, given)
        if root == part.rank:
            part.builder.recv(Phase.LOCAL_GATHER, owner, tag_of(piece, FROM_OWNER), kept, piece.length, [sent])
        return
    is_alone = len(piece.owners) == 1
    if part.topology.size == 1:
        part.builder.fold(Phase.LOCAL_REDUCE, [(*given, 1)], kept, piece.length, [])
        return
    if is_alone and root == part.rank:
        local_fold(part, piece, kept, [], final=True, own=given)
        return
    number, offset, free_after = part.next_place()
    place = (Buffer.PARTIAL, offset)
    done = local_fold(part, piece, place, free_after, final=is_alone, own=given)
    if part.site != root_site:
        part.last_use[number] = [
            part.builder.send(
                Phase.WIDE_REDUCE,
                piece.owners[root_site],
                tag_of(piece, ACROSS),
                place,
                piece.length,
                [done],
                wide=True,
            )
        ]
        return
    if not is_alone:
        done = _fold_across(part, piece, place, kept if root == part.rank else place, done)
    if root == part.rank:
        part.last_use[number] = [done]
    else:
        handed = part.builder.send(Phase.LOCAL_GATHER, root, tag_of(piece, FROM_OWNER), place, piece.length, [done])
        part.last_use[number] = [handed]


def move(part: Part, piece: Piece) -> None:
    """Add the steps for a piece that goes from one rank to one: through an owner in each of the two sites."""
    source, target, rank = piece.source, piece.target, part.rank
    source_site, target_site = part.topology.site_of(source), part.topology.site_of(target)
    given, kept = (Buffer.IN, piece.in_offset), (Buffer.OUT, piece.offset)
    if source == target:
        part.builder.fold(Phase.LOCAL_GATHER, [(*given, 1)], kept, piece.length, [])
        return
    if source_site == target_site:
        if rank == source:
            _send_local(part, piece, target, given)
        else:
            part.builder.recv(Phase.LOCAL_GATHER, source, tag_of(piece, TO_OWNER), kept, piece.length)
        return
    leaves, enters = piece.owners[source_site], piece.owners[target_site]
    if rank == leaves == source:
        _send_across(part, piece, (enters,), given, [])
    elif rank == source:
        _send_local(part, piece, leaves, given)
    elif rank == leaves:
        number, offset, free_after = part.next_place()
        place = (Buffer.PARTIAL, offset)
        came = part.builder.recv(Phase.LOCAL_REDUCE, source, tag_of(piece, TO_OWNER), place, piece.length, free_after)
        part.last_use[number] = _send_from(part, piece, (enters,), place, [came])
    elif rank == enters == target:
        _recv_across(part, piece, leaves, kept, [])
    elif rank == enters:
        number, offset, free_after = part.next_place()
        place = (Buffer.PARTIAL, offset)
        came = _recv_across(part, piece, leaves, place, free_after)
        part.last_use[number] = [
            part.builder.send(Phase.LOCAL_GATHER, target, tag_of(piece, FROM_OWNER), place, piece.length, [came])
        ]
    else:
        part.builder.recv(Phase.LOCAL_GATHER, enters, tag_of(piece, FROM_OWNER), kept, piece.length)


def _send_local(part: Part, piece: Piece, peer: int, given: Span) -> int:
    sent = part.builder.send(
        Phase.LOCAL_REDUCE, peer, tag_of(piece, TO_OWNER), given, piece.length, recent(part.local_sends, LOCAL_WINDOW)
    )
    part.local_sends.append(sent)
    return sent


def _recv_across(part: Part, piece: Piece, peer: int, target: Span, after: Sequence[int], phase: int = ACROSS) -> int:
    return part.builder.recv(Phase.WIDE_GATHER, peer, tag_of(piece, phase), target, piece.length, after, wide=True)


def _send_across(
    part: Part, piece: Piece, owners: Sequence[int], given: Span, have: Sequence[int], phase: int = ACROSS
) -> None:
    """Send a piece from the caller's arrays to owners in other sites, the last pieces from scratch."""
    if not (piece.late and owners):
        _send_from(part, piece, owners, given, have, phase)
        return
    number, offset, free_after = part.next_place()
    place = (Buffer.PARTIAL, offset)
    copied = part.builder.fold(Phase.WIDE_GATHER, [(*given, 1)], place, piece.length, [*have, *free_after])
    part.last_use[number] = _send_from(part, piece, owners, place, [copied], phase)


def _send_from(
    part: Part, piece: Piece, owners: Sequence[int], source: Span, have: Sequence[int], phase: int = ACROSS
) -> list[int]:
    return [
        part.builder.send(Phase.WIDE_GATHER, owner, tag_of(piece, phase), source, piece.length, have, wide=True)
        for owner in owners
    ]


def _fold_across(part: Part, piece: Piece, place: Span, target: Span, folded: int) -> int:
    """Receive the other sites' folds and fold all of them, in site order, into ``target``."""
    before = recent(part.wide_folds, part.chunk_size.depth)
    lent = {
        site: part.builder.recv(
            Phase.WIDE_REDUCE, owner, tag_of(piece, ACROSS), (Buffer.LENT, 0), piece.length, before, wide=True
        )
        for site, owner in enumerate(piece.owners)
        if site != part.site
    }
    inputs = [
        (Buffer.LENT, lent[site], ranks) if site in lent else (*place, ranks)
        for site, ranks in enumerate(part.ranks_of_sites)
    ]
    done = part.builder.fold(Phase.WIDE_REDUCE, inputs, target, piece.length, [folded, *lent.values()], final=True)
    part.wide_folds.append(done)
    return done


def direct(blocks: Blocks, hops: Callable[[int, int], tuple[Hop, ...]], *, awaits: bool = False) -> Algorithm:
    """Return the algorithm that sends every piece straight to the sites where it belongs."""
    return Algorithm("direct", add_piece, hops, blocks=blocks, awaits=awaits)


def home_of(topology: Topology, piece: Piece) -> int:
    """Return the site that folds a piece, or passes it on: one other than the root's, in turn."""
    root_site = topology.site_of(piece.target if piece.source == ALL else piece.source)
    return (root_site + 1 + piece.number % (len(topology.sites) - 1)) % len(topology.sites)


def add_piece_at_home(part: Part, piece: Piece, collective: Collective) -> None:
    """Add the steps for a piece that is folded in another site than that of the root, which gets the result."""
    sites = len(part.topology.sites)
    root, root_site, owner = piece.target, part.topology.site_of(piece.target), piece.owners[part.site]
    if sites <= 2 or owner != part.rank:  # between two sites this takes one more delay, and nothing less
        collect(part, piece)
        return
    home, given = home_of(part.topology, piece), (Buffer.IN, piece.in_offset)
    number, offset, free_after = part.next_place()
    place = (Buffer.PARTIAL, offset)
    folded = local_fold(part, piece, place, free_after, final=False, own=given)
    if part.site == home:
        done = _fold_across(part, piece, place, place, folded)
        last = part.builder.send(
            Phase.WIDE_GATHER, piece.owners[root_site], tag_of(piece, RESULT), place, piece.length, [done], wide=True
        )
    else:
        last = part.builder.send(
            Phase.WIDE_REDUCE, piece.owners[home], tag_of(piece, ACROSS), place, piece.length, [folded], wide=True
        )
    if part.site == root_site:
        target = (Buffer.OUT, piece.offset) if root == part.rank else place
        came = part.builder.recv(
            Phase.WIDE_GATHER, piece.owners[home], tag_of(piece, RESULT), target, piece.length, [last], wide=True
        )
        last = came
        if root != part.rank:
            last = part.builder.send(Phase.LOCAL_GATHER, root, tag_of(piece, FROM_OWNER), place, piece.length, [came])
    part.last_use[number] = [last]
