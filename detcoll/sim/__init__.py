"""Simulation: the same plans and machines as the wire runs, over modelled lines, in virtual time."""

from __future__ import annotations

from detcoll.sim.simulator import Simulation, simulate

__all__ = ["Simulation", "simulate"]
