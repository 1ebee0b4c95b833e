"""The compiler: from a collective, a topology and an algorithm to one rank's plan.

All algorithms are hierarchical: inside a site first, between the owners of a chunk in each site next, and inside sites
again. The files of `detcoll.plan.collectives` hold them.
"""

from __future__ import annotations

from collections.abc import Sequence

from detcoll.errors import PlanError
from detcoll.plan.collectives import Part, declaration_of
from detcoll.plan.collectives.blocks import Piece, pieces
from detcoll.plan.ir import LARGEST_PLAN_TAG, Collective, Plan
from detcoll.plan.layout import PHASE_TAGS, Chunk, ChunkSize, chunks
from detcoll.topology import Topology


def compile_plan(collective: Collective, topology: Topology, rank: int, algorithm: str, chunk_size: ChunkSize) -> Plan:
    """Return ``rank``'s part of ``collective`` done by ``algorithm``.

    Raises
    ------
    UsageError
        If the algorithm does not do this kind of collective.
    PlanError
        If there are more chunks than tags for them.
    """
    declared = declaration_of(collective.kind)
    how = declared.algorithm(algorithm)
    part = Part(topology, rank, topology.site_of(rank), chunk_size)
    cut: Sequence[Chunk | Piece]
    if how.blocks is not None:
        cut = pieces(part, collective, how.blocks)
    else:
        cut = chunks(topology, collective.count, chunk_size) if topology.size > 1 else []
    most = max((chunk.number for chunk in cut), default=-1) + 1
    if most * PHASE_TAGS > LARGEST_PLAN_TAG:
        raise PlanError(
            f"{collective.kind} of {collective.count} elements needs {most} messages of one rank to another; "
            f"a plan has tags for {LARGEST_PLAN_TAG // PHASE_TAGS}. Split the call"
        )
    for chunk in cut:
        how.add_chunk(part, chunk, collective)
    in_elems, out_elems = declared.elems(collective, topology.size, rank)
    scratch = min(part.places, chunk_size.depth) * chunk_size.elems
    accumulator = scratch if how.accumulates else 0
    return part.builder.build(collective, algorithm, rank, topology.size, out_elems, in_elems, scratch, accumulator)
