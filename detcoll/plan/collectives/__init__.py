"""The kinds of collectives, each declared once: one file a kind.

To add a kind, declare it in a file of its own and list it here; it also needs a method of `Communicator` and a line in
`detcoll/__init__.py`.
"""

from __future__ import annotations

from detcoll.plan.collectives.all_gather import ALL_GATHER
from detcoll.plan.collectives.all_reduce import ALL_REDUCE
from detcoll.plan.collectives.all_to_all import ALL_TO_ALL
from detcoll.plan.collectives.barrier import BARRIER
from detcoll.plan.collectives.broadcast import BROADCAST
from detcoll.plan.collectives.declaration import (
    Algorithm,
    Declaration,
    Floats,
    Homes,
    Hop,
    Load,
    Run,
    algorithms_for,
    declaration_of,
    promised_ranks,
)  # fmt: skip
from detcoll.plan.collectives.gather import GATHER
from detcoll.plan.collectives.part import Part
from detcoll.plan.collectives.reduce import REDUCE
from detcoll.plan.collectives.reduce_scatter import REDUCE_SCATTER
from detcoll.plan.collectives.scatter import SCATTER
from detcoll.signature import declare

__all__ = [
    "Algorithm",
    "Declaration",
    "Floats",
    "Homes",
    "Hop",
    "Load",
    "Part",
    "Run",
    "algorithms_for",
    "declaration_of",
    "promised_ranks",
]

for kind in (
    ALL_REDUCE, BROADCAST, BARRIER, REDUCE, ALL_GATHER, REDUCE_SCATTER, GATHER, SCATTER, ALL_TO_ALL,
):  # fmt: skip
    declare(kind)
