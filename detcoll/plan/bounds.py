"""The physical floor: no schedule finishes sooner.

Each kind declares its own, with the proof, in its file of `detcoll.plan.collectives`.
"""

from __future__ import annotations

from detcoll.plan.collectives import declaration_of
from detcoll.plan.ir import Collective
from detcoll.topology import Topology


def floor_ns(topology: Topology, kind: str, nbytes: int, root: int = 0) -> float | None:
    """Return the least time in nanoseconds that ``kind`` of ``nbytes`` takes, or None where there is no line.

    Raises
    ------
    UsageError
        If no collective has the name ``kind``.
    """
    return floor_of(topology, Collective(kind, nbytes, 1, 1, root))


def floor_of(topology: Topology, collective: Collective) -> float | None:
    """Return the same for a collective, whose blocks may differ in size.

    Of an all-to-all whose blocks differ, a rank knows only its own sizes: then this is an estimate, for equal blocks.
    """
    return declaration_of(collective.kind).floor_ns(topology, collective) if topology.is_wide else None
