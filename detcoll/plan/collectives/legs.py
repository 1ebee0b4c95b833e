"""The legs that blocks travel, counted: what predictions need of kinds that move blocks.

Every piece passes up to three stages: inside its first site to the owner there, over the wide area between owners, and
inside its last site from the owner. `legs_of` counts the messages of each stage by pairs of ranks, for all pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from detcoll.plan.collectives.blocks import ALL, NOBODY, Block, Blocks, segments_of
from detcoll.plan.ir import Collective
from detcoll.plan.layout import ChunkSize
from detcoll.topology import Topology

Pair = tuple[int, int]


@dataclass(slots=True)
class Messages:
    """Messages between ranks: by pair, how many, and how many elements all of them have."""

    chunks: dict[Pair, int] = field(default_factory=dict)
    elems: dict[Pair, int] = field(default_factory=dict)

    def add(self, source: int, target: int, chunks: int, elems: int) -> None:
        """Add messages from one rank to another."""
        key = source, target
        self.chunks[key] = self.chunks.get(key, 0) + chunks
        self.elems[key] = self.elems.get(key, 0) + elems

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Return sources, targets, elements and messages of all pairs."""
        pairs = np.array(list(self.chunks), dtype=np.int64).reshape(-1, 2)
        elems = np.array(list(self.elems.values()), dtype=np.float64)
        return pairs[:, 0], pairs[:, 1], elems, np.array(list(self.chunks.values()), dtype=np.float64)


@dataclass(slots=True)
class Legs:
    """All messages of a collective that moves blocks.

    ``opening``, ``closing`` : inside sites, before and after the wide area.  ``hops`` : over it, one after another.
    ``folds`` : whether owners fold what comes.  ``copies`` : elements and chunks that a rank copies for itself, or
    folds with others' in its site, by rank.
    """

    folds: bool
    opening: Messages = field(default_factory=Messages)
    hops: list[Messages] = field(default_factory=list)
    closing: Messages = field(default_factory=Messages)
    copies: Messages = field(default_factory=Messages)
    longest: int = 0


def all_blocks(collective: Collective, topology: Topology, blocks: Blocks) -> list[Block]:
    """Return every block once."""
    stated = (block for site in topology.sites for block in blocks(collective, topology, site.ranks[0]))
    return list(dict.fromkeys(stated))


def legs_of(
    collective: Collective, topology: Topology, blocks: Blocks, chunk_size: ChunkSize, *, at_home: bool
) -> Legs:
    """Count the messages of all pieces."""
    stated = all_blocks(collective, topology, blocks)
    legs = Legs(folds=any(block.source == ALL for block in stated))
    legs.hops = [Messages(), Messages()] if at_home and len(topology.sites) > 2 else [Messages()]
    for block in stated:
        for begin, end, owners in segments_of(topology, block, whole=chunk_size.whole):
            elems = end - begin
            chunks = -(-elems // chunk_size.elems)
            legs.longest = max(legs.longest, min(elems, chunk_size.elems))
            if block.source == ALL:
                _collect(legs, topology, block.target, owners, chunks, elems)
            elif block.target == ALL:
                _spread(legs, topology, block.source, owners, chunks, elems)
            else:
                _move(legs, topology, block.source, block.target, owners, chunks, elems)
    return legs


def _spread(legs: Legs, topology: Topology, source: int, owners: tuple[int, ...], chunks: int, elems: int) -> None:
    home = topology.site_of(source)
    legs.copies.add(source, source, chunks, elems)
    if owners[home] != source:
        legs.opening.add(source, owners[home], chunks, elems)
    others = [site for site in range(len(owners)) if site != home]
    if len(legs.hops) == 1:
        for site in others:
            legs.hops[0].add(owners[home], owners[site], chunks, elems)
    else:
        for passes, some, part in _shares(others, chunks, elems):
            legs.hops[0].add(owners[home], owners[passes], some, part)
            for site in others:
                if site != passes:
                    legs.hops[1].add(owners[passes], owners[site], some, part)
    for site, owner in enumerate(owners):
        for rank in topology.sites[site].ranks:
            if rank not in (owner, source):
                legs.closing.add(owner, rank, chunks, elems)


def _collect(legs: Legs, topology: Topology, target: int, owners: tuple[int, ...], chunks: int, elems: int) -> None:
    root_site = topology.site_of(target)
    for site, owner in enumerate(owners):
        ranks = topology.sites[site].ranks
        legs.copies.add(owner, owner, chunks, elems * len(ranks))
        for rank in ranks:
            if rank != owner:
                legs.opening.add(rank, owner, chunks, elems)
    others = [site for site in range(len(owners)) if site != root_site]
    if len(legs.hops) == 1:
        for site in others:
            legs.hops[0].add(owners[site], owners[root_site], chunks, elems)
    else:
        for home, some, part in _shares(others, chunks, elems):
            for site in range(len(owners)):
                if site != home:
                    legs.hops[0].add(owners[site], owners[home], some, part)
            legs.hops[1].add(owners[home], owners[root_site], some, part)
    if owners[root_site] != target:
        legs.closing.add(owners[root_site], target, chunks, elems)


def _shares(sites: list[int], chunks: int, elems: int) -> Iterator[tuple[int, int, int]]:
    """Return the chunks and elements that each of some sites folds or passes on, in turn."""
    for place, site in enumerate(sites):
        some = (chunks + len(sites) - 1 - place) // len(sites)
        if some:
            yield site, some, elems * some // chunks


def _move(
    legs: Legs, topology: Topology, source: int, target: int, owners: tuple[int, ...], chunks: int, elems: int
) -> None:
    here, there = topology.site_of(source), topology.site_of(target)
    if source == target:
        legs.copies.add(source, source, chunks, elems)
        return
    if here == there:
        legs.closing.add(source, target, chunks, elems)
        return
    leaves, enters = owners[here], owners[there]
    assert NOBODY not in (leaves, enters)
    if leaves != source:
        legs.opening.add(source, leaves, chunks, elems)
    legs.hops[0].add(leaves, enters, chunks, elems)
    if enters != target:
        legs.closing.add(enters, target, chunks, elems)
