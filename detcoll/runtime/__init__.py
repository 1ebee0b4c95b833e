"""Carries plans out: the engine decides, and one progress thread a job drives it over endpoints."""

from __future__ import annotations

from detcoll.descriptor import Descriptor
from detcoll.runtime.engine import Engine
from detcoll.runtime.group import Group
from detcoll.runtime.loop import Loop
from detcoll.runtime.memory import Memory
from detcoll.runtime.operation import Operation
from detcoll.runtime.routes import Routes
from detcoll.runtime.timekeeping import Aligning, Timekeeper, align_arrivals
from detcoll.runtime.work import Work

__all__ = [
    "Aligning",
    "Descriptor",
    "Engine",
    "Group",
    "Loop",
    "Memory",
    "Operation",
    "Routes",
    "Timekeeper",
    "Work",
    "align_arrivals",
]
