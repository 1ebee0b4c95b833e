"""What a collective comes to on a calendar, in a few numbers: steps, bytes and predicted time."""

from __future__ import annotations

from dataclasses import dataclass

from detcoll.plan.calendar import Calendar
from detcoll.plan.ir import Collective, Kind
from detcoll.plan.planner import Planner
from detcoll.topology import Topology


@dataclass(frozen=True, slots=True)
class RankPart:
    """What one rank does: its steps, and the payload that it sends inside its site and over the line."""

    site: str
    rank: int
    steps: int
    local_bytes: int
    wide_bytes: int


@dataclass(frozen=True, slots=True)
class Summary:
    """One collective. ``bound_s`` : the physical floor.  ``parts`` : of the first rank of each site."""

    collective: str
    bytes: int
    algorithm: str
    predicted_s: float
    bound_s: float | None
    parts: tuple[RankPart, ...]


def summarise(collective: Collective, topology: Topology, calendar: Calendar) -> Summary:
    """Return what ``collective`` comes to, by the algorithm that the planner takes."""
    planner = Planner(topology, 0, calendar)
    bound_ns, algorithm = planner.floor_ns(collective), planner.algorithm(collective)
    parts = tuple(_part(collective, topology, calendar, index, algorithm) for index in range(len(topology.sites)))
    return Summary(
        collective.kind, collective.nbytes, algorithm, planner.predict_ns(collective) / 1e9,
        None if bound_ns is None else bound_ns / 1e9, parts,
    )  # fmt: skip


def _part(collective: Collective, topology: Topology, calendar: Calendar, index: int, algorithm: str) -> RankPart:
    site = topology.sites[index]
    steps = Planner(topology, site.ranks[0], calendar).plan(collective, algorithm).steps
    widened = (steps["accumulated"] == 1) * (collective.accumulator_itemsize - collective.itemsize)
    nbytes = steps["length"] * (widened + collective.itemsize)
    local, wide = (int(nbytes[(steps["kind"] == Kind.SEND) & (steps["wide"] == flag)].sum()) for flag in (0, 1))
    return RankPart(site.name, site.ranks[0], len(steps), local, wide)
