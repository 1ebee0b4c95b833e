"""Carries plans out: one progress thread a communicator walks machines over endpoints."""

from __future__ import annotations

from detcoll.runtime.operation import Descriptor, Operation
from detcoll.runtime.progress import Progress
from detcoll.runtime.routes import Membership, Routes
from detcoll.runtime.timekeeping import Aligning, Timekeeper, align_arrivals
from detcoll.runtime.work import Work

__all__ = [
    "Aligning",
    "Descriptor",
    "Membership",
    "Operation",
    "Progress",
    "Routes",
    "Timekeeper",
    "Work",
    "align_arrivals",
]
