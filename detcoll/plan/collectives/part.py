"""One rank's part while algorithms add steps to it chunk by chunk, and the stages inside a site that kinds share.

The owner of a chunk in a site is the rank that folds it there and exchanges it with other sites. The others contribute:
they send their elements to the owner (local reduce) and take the result from it (local gather).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from detcoll.plan.ir import Buffer, Phase, PlanBuilder
from detcoll.plan.layout import PHASE_TAGS, Chunk, ChunkSize
from detcoll.topology import Topology

LOCAL_WINDOW = 8
"""Chunks whose local messages are under way at once."""

LOCAL_AHEAD = 2
"""Chunks that a rank gives an owner besides those that it has scratch for: what comes too early is copied twice,
and of 1 GiB over a slow line it was 256 MiB."""


class Portion(Protocol):
    """What moves at once: a chunk of an array or a piece of a block."""

    @property
    def number(self) -> int:
        """Tells it from all others between the same two ranks."""

    @property
    def offset(self) -> int:
        """Where it begins in the output, in elements."""

    @property
    def length(self) -> int:
        """How many elements it has."""


Span = tuple[Buffer, int]
"""A buffer and an offset in it."""


@dataclass(slots=True)
class Part:
    """What the algorithms of one rank share while they add steps chunk by chunk."""

    topology: Topology
    rank: int
    site: int
    chunk_size: ChunkSize
    builder: PlanBuilder = field(default_factory=PlanBuilder)
    places: int = 0
    """Chunks that this rank has put into scratch so far; the n-th goes to place n mod depth."""
    last_use: dict[int, list[int]] = field(default_factory=dict)
    """Steps after which a scratch place may be written again."""
    local_sends: list[int] = field(default_factory=list)
    local_folds: list[int] = field(default_factory=list)
    local_results: dict[int, list[int]] = field(default_factory=dict)
    """By owner, what it gives back of the chunks that it was given."""
    wide_folds: list[int] = field(default_factory=list)

    @property
    def peers(self) -> list[int]:
        """The other ranks of this site, in rank order."""
        return [rank for rank in self.topology.sites[self.site].ranks if rank != self.rank]

    @property
    def ranks_of_sites(self) -> list[int]:
        """How many ranks each site has."""
        return [len(site.ranks) for site in self.topology.sites]

    def next_place(self) -> tuple[int, int, list[int]]:
        """Return a scratch place, its offset in elements, and what must end before it is written."""
        place = self.places % self.chunk_size.depth
        self.places += 1
        return place, place * self.chunk_size.elems, self.last_use.pop(place, [])


def tag_of(chunk: Portion, phase: int) -> int:
    """Return the tag of a chunk's messages in one of its `PHASE_TAGS` phases."""
    return chunk.number * PHASE_TAGS + phase


def recent(steps: list[int], window: int) -> list[int]:
    """Return the step that must end before another is added, so that at most ``window`` are under way."""
    return steps[-window:][:1] if len(steps) >= window else []


def other_owners(site: int, owners: tuple[int, ...]) -> tuple[int, ...]:
    """Return the owners in the other sites, those of the next site first, so that not all send to site 0 first."""
    return (*owners[site + 1 :], *owners[:site])


def local_contribute(part: Part, chunk: Chunk, owner: int) -> None:
    """Send this rank's elements to the owner in its site, and take the result."""
    span = (Buffer.OUT, chunk.offset)
    results = part.local_results.setdefault(owner, [])
    # A local network is faster than the line: an owner would have to hold whatever it cannot pass on yet.
    after = [*recent(part.local_sends, LOCAL_WINDOW), *recent(results, part.chunk_size.depth + LOCAL_AHEAD)]
    sent = part.builder.send(Phase.LOCAL_REDUCE, owner, tag_of(chunk, 0), span, chunk.length, after)
    part.local_sends.append(sent)
    results.append(part.builder.recv(Phase.LOCAL_GATHER, owner, tag_of(chunk, 1), span, chunk.length, [sent]))


def local_fold(
    part: Part, chunk: Portion, target: Span, after: Sequence[int], *, final: bool, own: Span | None = None
) -> int:
    """Receive the site's contributions and fold them with this rank's ``own``, in rank order; return the fold."""
    buffer, offset = own or (Buffer.OUT, chunk.offset)
    lent = {
        peer: part.builder.recv(
            Phase.LOCAL_REDUCE, peer, tag_of(chunk, 0), (Buffer.LENT, 0), chunk.length,
            recent(part.local_folds, LOCAL_WINDOW),
        )
        for peer in part.peers
    }  # fmt: skip
    inputs = [
        (Buffer.LENT, lent[rank], 1) if rank in lent else (buffer, offset, 1)
        for rank in part.topology.sites[part.site].ranks
    ]
    folded = part.builder.fold(Phase.LOCAL_REDUCE, inputs, target, chunk.length, [*after, *lent.values()], final=final)
    part.local_folds.append(folded)
    return folded


def local_gather(
    part: Part, chunk: Portion, after: Sequence[int], *, but: int = -1, source: Span | None = None
) -> None:
    """Hand the finished chunk in the user's array, or in ``source``, to the rest of this site, except to ``but``."""
    span = source or (Buffer.OUT, chunk.offset)
    for peer in part.peers:
        if peer != but:
            part.builder.send(Phase.LOCAL_GATHER, peer, tag_of(chunk, 1), span, chunk.length, after)
