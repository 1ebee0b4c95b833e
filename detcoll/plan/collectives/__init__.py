"""The kinds of collectives, each declared once: one file a kind.

To add a kind, declare it in a file of its own and list it here; it also needs a method of `Communicator` and a line in
`detcoll/__init__.py`.
"""

from __future__ import annotations

from detcoll.plan.collectives.all_reduce import ALL_REDUCE
from detcoll.plan.collectives.barrier import BARRIER
from detcoll.plan.collectives.broadcast import BROADCAST
from detcoll.plan.collectives.declaration import (
    Algorithm,
    Declaration,
    Floats,
    Homes,
    Hop,
    Load,
    Opening,
    algorithms_for,
    declaration_of,
    promised_ranks,
)  # fmt: skip
from detcoll.plan.collectives.part import Part
from detcoll.signature import declare

__all__ = [
    "Algorithm",
    "Declaration",
    "Floats",
    "Homes",
    "Hop",
    "Load",
    "Opening",
    "Part",
    "algorithms_for",
    "declaration_of",
    "promised_ranks",
]

for kind in (ALL_REDUCE, BROADCAST, BARRIER):
    declare(kind)
