"""Plans: from a collective, a topology and a calendar to steps, their proof and their predicted time.

Everything here is pure: no clock, no socket, no array of the user's.
"""

from __future__ import annotations

from detcoll.plan.bounds import floor_ns
from detcoll.plan.calendar import Calendar, Slotting, build_calendar, check_calendar
from detcoll.plan.check import check
from detcoll.plan.collectives import Run, algorithms_for, declaration_of, promised_ranks
from detcoll.plan.compiler import compile_plan
from detcoll.plan.costs import Costs
from detcoll.plan.ir import Buffer, Collective, Kind, Phase, Plan, PlanBuilder
from detcoll.plan.layout import ChunkSize, choose_chunk, uses_window
from detcoll.plan.planner import Planner, choose_algorithm
from detcoll.plan.predict import predict_ns
from detcoll.plan.reservation import SiteReservation, reserve
from detcoll.plan.symbols import Symbols

__all__ = [
    "Buffer",
    "Calendar",
    "ChunkSize",
    "Collective",
    "Costs",
    "Kind",
    "Phase",
    "Plan",
    "PlanBuilder",
    "Planner",
    "Run",
    "SiteReservation",
    "Slotting",
    "Symbols",
    "algorithms_for",
    "build_calendar",
    "check",
    "check_calendar",
    "choose_algorithm",
    "choose_chunk",
    "compile_plan",
    "declaration_of",
    "floor_ns",
    "predict_ns",
    "promised_ranks",
    "reserve",
    "uses_window",
]
