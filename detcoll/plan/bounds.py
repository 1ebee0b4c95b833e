"""The physical floor: no schedule finishes sooner.

Each kind declares its own, with the proof, in its file of `detcoll.plan.collectives`.
"""

from __future__ import annotations

from detcoll.plan.collectives import declaration_of
from detcoll.topology import Topology


def floor_ns(topology: Topology, kind: str, nbytes: int, root: int = 0) -> float | None:
    """Return the least time in nanoseconds that ``kind`` of ``nbytes`` takes, or None where there is no line.

    Raises
    ------
    UsageError
        If no collective has the name ``kind``.
    """
    declared = declaration_of(kind)
    return declared.floor_ns(topology, nbytes, root) if topology.is_wide else None
