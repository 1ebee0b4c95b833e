"""The kinds of collectives, each declared once: one file a kind, with the name of the kind.

To add a kind, declare it in a file of its own here. It also needs a method of `detcoll.collectives.Collectives` and a
function in `detcoll/__init__.py`. Every file of this package that holds a declaration of its own name is found.
"""

from __future__ import annotations

import importlib
import pkgutil

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
from detcoll.plan.collectives.part import Part
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

for found in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    for value in vars(importlib.import_module(f"{__name__}.{found}")).values():
        if isinstance(value, Declaration) and value.name == found:
            declare(value)
