"""Simulation: the plans and engines of real runs, over modelled lines, in virtual time."""

from __future__ import annotations

from detcoll.sim.result import Simulation
from detcoll.sim.simulator import simulate

__all__ = ["Simulation", "simulate"]
