"""Departures whose arrivals fit: when each site sends to each other site, in a cycle that repeats.

Sites at different distances can send at different times and still meet at a receiver. So each ordered pair (i, j) gets
m slots of length d_ij in a cycle of C, such that

- departures of one sender do not overlap, and
- arrivals, departure + L_ij, of one receiver do not overlap,

both as intervals modulo C. With equal delays a Latin square does it: in slot k site i sends to site i + k + 1, so every
site sends to one and receives from one. The slowest line of all fills its slot always, so nothing is lost.

With other delays C has to be longer than the m rounds of the busiest site by some slack, and OR-Tools' CP-SAT looks for
departures, with the least slack first. Delays are not whole slots: each arrival has a phase of its own, so gaps stay at
receivers, and slots of few rounds leave little to choose from. Every interval enters the model with all its copies
that reach into one cycle, which makes its no-overlap constraint cyclic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from detcoll.errors import PlanError

UNIT_NS = 10_000
"""Resolution of the search. Slots are rounded up, and one unit is added for what rounding delays may shift."""

SLACKS = (1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5)
"""Cycle over what the busiest site needs."""

SECONDS_A_SLACK = 4.0
WORKERS = 2

ROUNDS = ((4, 8), (8, 4), (16, 2))
"""Sites up to which a pair has so many slots a cycle; beyond, one. More rounds are more to choose from."""

Matrix = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Departure:
    """Site ``source`` may send to ``destination`` from ``start_ns``, for the length of the pair's slot."""

    source: int
    destination: int
    start_ns: int


@dataclass(frozen=True, slots=True)
class Alignment:
    """All departures of a cycle. Those that begin before its end may run over it."""

    cycle_ns: int
    departures: tuple[Departure, ...]


def align(delays_ns: Matrix, slots_ns: Matrix, seconds: float = SECONDS_A_SLACK) -> Alignment:
    """Find departures for every ordered pair of sites.

    Parameters
    ----------
    delays_ns : matrix, (S, S)
        One-way delay from site i (row) to site j; the diagonal is ignored.
    slots_ns : matrix, (S, S)
        Length of a slot of the pair, guard included.
    seconds : float
        How long the solver may look for each slack.

    Raises
    ------
    PlanError
        If delays differ and OR-Tools is missing, or it finds nothing.
    """
    pairs = [(i, j) for i in range(len(delays_ns)) for j in range(len(delays_ns)) if i != j]
    if len({delays_ns[i][j] for i, j in pairs}) == 1:
        return _latin_square(len(delays_ns), max(slots_ns[i][j] for i, j in pairs))
    return _search(delays_ns, slots_ns, pairs, seconds)


def _latin_square(sites: int, slot_ns: int) -> Alignment:
    departures = tuple(
        Departure(site, (site + turn + 1) % sites, turn * slot_ns) for site in range(sites) for turn in range(sites - 1)
    )
    return Alignment((sites - 1) * slot_ns, departures)


def rounds_for(sites: int) -> int:
    """Return how many slots a pair has in a cycle where delays differ."""
    return next((rounds for most, rounds in ROUNDS if sites <= most), 1)


def _search(delays_ns: Matrix, slots_ns: Matrix, pairs: list[tuple[int, int]], seconds: float) -> Alignment:
    sites, rounds = range(len(delays_ns)), rounds_for(len(delays_ns))
    lengths = {(i, j): -(-slots_ns[i][j] // UNIT_NS) + 1 for i, j in pairs}
    busiest = max(
        max(sum(lengths[i, j] for j in sites if j != i), sum(lengths[j, i] for j in sites if j != i)) for i in sites
    )
    for slack in SLACKS:
        if slack == 1.0 and len(delays_ns) > 3:
            continue
        cycle = -(-int(rounds * busiest * slack * 1000) // 1000)
        shifts = {(i, j): round(delays_ns[i][j] / UNIT_NS) % cycle for i, j in pairs}
        starts = _solve(lengths, shifts, rounds, cycle, seconds)
        if starts is not None:
            departures = tuple(Departure(i, j, start * UNIT_NS) for i, j, start in starts)
            return Alignment(cycle * UNIT_NS, departures)
    raise PlanError(f"no calendar was found for {len(delays_ns)} sites, even with slack {SLACKS[-1]}")


def _solve(
    lengths: dict[tuple[int, int], int], shifts: dict[tuple[int, int], int], rounds: int, cycle: int, seconds: float
) -> list[tuple[int, int, int]] | None:
    """Return pairs and starts in units, or None where none were found in time."""
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise PlanError(
            'sites at different distances need a solver; install it with: pip install "detcoll[calendar]"'
        ) from error
    model = cp_model.CpModel()
    lines: dict[tuple[str, int], list[cp_model.IntervalVar]] = {}
    variables = []
    for (i, j), length in lengths.items():
        for _ in range(rounds):
            start = model.new_int_var(0, cycle - 1, "")
            variables.append((i, j, start))
            for line, shift in ((("up", i), 0), (("down", j), shifts[i, j])):
                for turn in range(3):
                    if shift - turn * cycle < cycle and shift + cycle - 1 + length > turn * cycle:
                        interval = model.new_fixed_size_interval_var(start + (shift - turn * cycle), length, "")
                        lines.setdefault(line, []).append(interval)
    for intervals in lines.values():
        model.add_no_overlap(intervals)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = WORKERS
    solver.parameters.max_time_in_seconds = seconds
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    return sorted((i, j, solver.value(start)) for i, j, start in variables)
