"""Scenarios: real distances, lines and workloads, and what an iteration takes on them, in virtual time."""

from __future__ import annotations

from detcoll.scenarios.scenario import Scenario, changed, load, parse, shipped
from detcoll.scenarios.study import Study, study

__all__ = ["Scenario", "Study", "changed", "load", "parse", "shipped", "study"]
