"""Departures whose arrivals fit: when each site sends to each other site, in a cycle that repeats.

Sites at different distances can send at different times and still meet at a receiver. So each ordered pair (i, j) gets
windows in a cycle of length C, such that

- departures of one sender do not overlap, and
- arrivals, departure + L_ij, of one receiver do not overlap,

both as intervals modulo C. With equal delays a Latin square does it: in slot k site i sends to site i + k + 1, so every
site sends to one and receives from one. The slowest line of all fills its slot always, so nothing is lost.

With other delays gaps stay at senders and receivers, since windows would have to follow each other without one at both.
`detcoll.plan.packing` looks for orders that leave small ones. Slots of different lengths give cycles in which delays
fall differently, and a solver's random seeds give different orders, so several are tried, and the one is taken of which
a call with a second of time on its busiest line would end soonest:

    T = `CALL_NS` C / (time that the worst pair has in a cycle, what is lost subtracted) + the longest turn

where pairs' needs are such that the busiest line needs all of C if nothing is lost, and a turn is the time between two
windows of a pair: the last bytes of a call wait half of it, twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from detcoll.errors import PlanError
from detcoll.plan.packing import Departure, Matrix, Pair, Rough, in_cells, in_slots, stretch

LATE_NS = 1_000_000
"""What a window loses because its owner begins late, in the mean where twice as many ranks as cores share a host: many
of them wake up for windows of one line or another at the same moment, and hand their first bytes over in turn."""

CALL_NS = 1_000_000_000
"""Time on the busiest line of the call that a calendar is chosen for."""

SEEDS = 3
SHORTEST = 0.125
"""Of what a pair should have in a cycle, the part that one window of it has at least."""

LARGEST_GUARD_SHARE = 0.02
"""Guards may cost at most this share of a cycle."""

STRETCHES = (1.0, 1.25, 0.8, 1.5)
"""Lengths of slots to try, over the one asked for."""

SECONDS = 12.0
"""How long to look in cells for better and better answers."""

LARGEST_IN_CELLS = 20
"""Sites up to which cells are tried; with more they are too many, and slots of one length are about as dense."""

UNIT_NS = 10_000
"""Resolution of a search in slots. They are rounded up."""

SLACKS = (1.05, 1.1, 1.15, 1.2, 1.3, 1.5)
"""Cycle of a search in slots, over what the busiest site needs."""

SECONDS_A_SEARCH = 12.0
"""In cells with as many sites as are tried there; with fewer, less by the square. In slots a third for each slack."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A grid to try: cells that a pair needs, into how many runs of at least how many they fall, and spare ones."""

    cells: int
    runs: int
    shortest: int
    spare: float


SHAPES = (
    (4, (Shape(11, 2, 3, 0.09), Shape(8, 2, 2, 0.04), Shape(7, 2, 2, 0.14))),
    (6, (Shape(4, 2, 1, 0.1), Shape(6, 2, 2, 0.12), Shape(8, 2, 2, 0.08))),
    (12, (Shape(4, 2, 1, 0.1), Shape(3, 2, 1, 0.15), Shape(6, 2, 2, 0.12))),
    (LARGEST_IN_CELLS, (Shape(3, 2, 1, 0.15), Shape(2, 2, 1, 0.12))),
)
"""By the number of sites up to which they are tried. The more cells, the denser what is found, and the longer it takes;
with too few to spare nothing is found in time."""


@dataclass(frozen=True, slots=True)
class Alignment:
    """All windows of a cycle, in order of their starts. Those that begin before its end may run over it."""

    cycle_ns: int
    departures: tuple[Departure, ...]


def align(delays_ns: Matrix, slots_ns: Matrix, guard_ns: int, seconds: float = SECONDS) -> Alignment:
    """Find windows for every ordered pair of sites.

    Parameters
    ----------
    delays_ns : matrix, (S, S)
        One-way delay from site i (row) to site j; the diagonal is ignored.
    slots_ns : matrix, (S, S)
        What a pair should have in a cycle, guard included; the pairs' times for equal bytes are these without it. Where
        delays differ, cycles somewhat longer and shorter are tried as well.
    guard_ns : int
        Between any two windows of a line.
    seconds : float
        How long to look for better and better answers, with up to `LARGEST_IN_CELLS` sites.

    Returns
    -------
    Alignment
        Where delays differ, not the same every time, since the solver works against the clock.

    Raises
    ------
    PlanError
        If delays differ and OR-Tools is missing, or it finds nothing.
    """
    sites = range(len(delays_ns))
    pairs = [(i, j) for i in sites for j in sites if i != j]
    if len({delays_ns[i][j] for i, j in pairs}) == 1:
        return _latin_square(slots_ns, guard_ns)
    search = _Search(delays_ns, {(i, j): float(slots_ns[i][j] - guard_ns) for i, j in pairs}, guard_ns)
    return search.best(max(slots_ns[i][j] for i, j in pairs), seconds)


def _latin_square(slots_ns: Matrix, guard_ns: int) -> Alignment:
    sites = len(slots_ns)
    slot_ns = max(slots_ns[i][j] for i in range(sites) for j in range(sites) if i != j)
    departures = [
        Departure(i, (i + turn + 1) % sites, turn * slot_ns, slots_ns[i][(i + turn + 1) % sites] - guard_ns)
        for turn in range(sites - 1)
        for i in range(sites)
    ]
    return Alignment((sites - 1) * slot_ns, tuple(departures))


def turns_ns(starts_ns: Sequence[int], cycle_ns: int) -> list[int]:
    """Return the times from each window of a pair to its next, from their starts in order."""
    return [after - before for before, after in pairwise([*starts_ns, starts_ns[0] + cycle_ns])]


def call_ends_ns(found: Alignment, weights: Mapping[Pair, float], busiest: float) -> float:
    """Return when a call of `CALL_NS` on the busiest line would end, `LATE_NS` of each window being lost."""
    starts: dict[Pair, list[int]] = {pair: [] for pair in weights}
    used_ns = dict.fromkeys(weights, 0)
    for departure in found.departures:
        pair = departure.source, departure.destination
        starts[pair].append(departure.start_ns)
        used_ns[pair] += max(departure.length_ns - LATE_NS, 0)
    share = min(used_ns[pair] / weight for pair, weight in weights.items()) * busiest / found.cycle_ns
    turn_ns = max(max(turns_ns(begun, found.cycle_ns)) for begun in starts.values())
    return CALL_NS / share + turn_ns if share > 0 else float("inf")


class _Search:
    """What all attempts for one set of sites share."""

    def __init__(self, delays_ns: Matrix, weights: Mapping[Pair, float], guard_ns: int) -> None:
        self.delays_ns, self.weights, self.guard_ns = delays_ns, weights, guard_ns
        self.sites = len(delays_ns)
        self.busiest_ns = self._busiest_of(weights)

    def best(self, slot_ns: int, seconds: float) -> Alignment:
        """Return the best answer found in cells until time is up, else one in slots."""
        found: list[tuple[float, Alignment]] = []
        until_s = time.monotonic() + seconds
        for longer, shape, seed in self._attempts():
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                break
            alignment = self._in_cells(slot_ns * longer, shape, seed, min(left_s, self._patience_s() * (1 + seed)))
            if alignment is not None:
                found.append((call_ends_ns(alignment, self.weights, self.busiest_ns), alignment))
        if found:
            return min(found, key=lambda entry: entry[0])[1]
        return self._in_slots()

    def _patience_s(self) -> float:
        """Return how long one attempt in cells may take: what is found at all is mostly found soon."""
        return SECONDS_A_SEARCH * (self.sites / LARGEST_IN_CELLS) ** 2

    def _attempts(self) -> list[tuple[float, Shape, int]]:
        shapes = next((shapes for most, shapes in SHAPES if self.sites <= most), ())
        return [(longer, shape, seed) for seed in range(SEEDS) for shape in shapes for longer in STRETCHES]

    def _in_cells(self, slot_ns: float, shape: Shape, seed: int, seconds: float) -> Alignment | None:
        cell_ns, heaviest = slot_ns / shape.cells, max(self.weights.values())
        needed = {pair: max(int(shape.cells * weight / heaviest), 1) for pair, weight in self.weights.items()}
        cells = round(self._busiest_of(needed) * (1 + shape.spare))
        shifts = {(i, j): round(self.delays_ns[i][j] / cell_ns) for i, j in needed}
        rough = in_cells(shifts, needed, cells, shape.runs, shape.shortest, seconds, seed)
        return None if rough is None else self._stretched(rough, round(cells * cell_ns))

    def _in_slots(self) -> Alignment:
        lengths = {pair: -(-round(weight + self.guard_ns) // UNIT_NS) + 1 for pair, weight in self.weights.items()}
        busiest = self._busiest_of(lengths)
        for slack in SLACKS:
            units = math.ceil(busiest * slack)
            shifts = {(i, j): round(self.delays_ns[i][j] / UNIT_NS) for i, j in lengths}
            rough = in_slots(shifts, lengths, units, SECONDS_A_SEARCH / 3)
            alignment = None if rough is None else self._stretched(rough, units * UNIT_NS)
            if alignment is not None:
                return alignment
        raise PlanError(f"no calendar was found for {self.sites} sites, even with slack {SLACKS[-1]}")

    def _stretched(self, rough: Rough, cycle_ns: int) -> Alignment | None:
        """Return the best times for the orders of a rough answer, if guards do not cost too much then."""
        if self.guard_ns * rough.most_on_a_line > cycle_ns * LARGEST_GUARD_SHARE:
            return None
        shortest_ns = int(min(self.weights.values()) * SHORTEST)
        found = stretch(rough, cycle_ns, self.delays_ns, self.weights, self.guard_ns, LATE_NS, shortest_ns)
        return None if found is None else Alignment(cycle_ns, found)

    def _busiest_of(self, amounts: Mapping[Pair, float]) -> float:
        """Return the largest sum of what pairs have at one uplink or one downlink."""
        return max(
            sum(amount for pair, amount in amounts.items() if pair[end] == site)
            for end in (0, 1)
            for site in range(self.sites)
        )
