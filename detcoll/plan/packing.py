"""In which order windows fit into a cycle, and how long they can be.

Windows of one sender must not overlap, nor may what arrives at one receiver, a delay of its own for each sender later.
Finding orders in which that works is hard, finding the best times for given orders is easy, so there are two steps:

- `in_cells` and `in_slots` find a rough answer on a grid, with OR-Tools' CP-SAT. In cells, a site sends to one other
  in each cell of the cycle, and what arrives in the same cell must come from one; delays are rounded to whole cells.
  Pairs need so many cells in so many runs. Cells of about a fifth of a window leave much to choose from, which finds
  dense orders for up to some 16 sites. In slots, every pair has one slot of a fixed length that may begin anywhere on
  a fine grid, which is quick for many sites.
- `stretch` keeps of a rough answer only which window follows which at every sender and receiver, and finds by linear
  programming the starts and lengths with which the worst pair carries most, with exact delays. For fixed orders all
  rules are sums of starts and lengths, so the answer is the best there is.

Rounding delays to cells thus costs nothing by itself: it only decides which orders are looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from detcoll.errors import PlanError
from detcoll.installation import install_command

Matrix = Sequence[Sequence[int]]
Pair = tuple[int, int]

WORKERS = 2

TRIMMED_NS = 10
"""Windows end so much before what linear programming says, which it computes in floating point."""

OVERALL = 1e-4
"""How much all windows together count beside the worst pair, so that room that it does not need is used as well."""


@dataclass(frozen=True, slots=True)
class Rough:
    """Windows on a grid: ``starts`` are (source, destination, cell), ``shifts`` the delays in cells, not reduced."""

    cells: int
    starts: tuple[tuple[int, int, int], ...]
    shifts: Mapping[Pair, int]

    @property
    def most_on_a_line(self) -> int:
        """The most windows that one uplink or downlink has."""
        return max(max(Counter(start[end] for start in self.starts).values()) for end in (0, 1))


@dataclass(frozen=True, slots=True)
class Departure:
    """Site ``source`` may send to ``destination`` for ``length_ns`` from ``start_ns``."""

    source: int
    destination: int
    start_ns: int
    length_ns: int


def in_cells(
    shifts: Mapping[Pair, int], needed: Mapping[Pair, int], cells: int, runs: int, shortest: int, seconds: float,
    seed: int,
) -> Rough | None:  # fmt: skip
    """Find cells for every pair.

    Parameters
    ----------
    shifts : mapping
        Delay of each ordered pair, in whole cells.
    needed : mapping
        How many cells each must have.
    cells : int
        Of a cycle.
    runs : int
        Into how many windows a pair's cells may be split.
    shortest : int
        Cells that one of them has at least, unless a pair needs fewer in all.
    seconds : float
        How long to look.
    seed : int
        Other seeds find other answers.

    Returns
    -------
    Rough or None
        None where none was found in time.
    """
    cp_model = _solver()
    model = cp_model.CpModel()
    used = {pair: [model.new_bool_var("") for _ in range(cells)] for pair in needed}
    sites = sorted({site for pair in needed for site in pair})
    for site in sites:
        for cell in range(cells):
            model.add_at_most_one(used[pair][cell] for pair in used if pair[0] == site)
            model.add_at_most_one(used[pair][(cell - shifts[pair]) % cells] for pair in used if pair[1] == site)
    for pair, mine in used.items():
        model.add(sum(mine) >= needed[pair])
        begins = []
        for cell in range(cells):
            begin = model.new_bool_var("")
            begins.append(begin)
            model.add_bool_or(mine[cell].negated(), mine[cell - 1], begin)
            model.add_implication(begin, mine[cell - 1].negated())
            for further in range(min(shortest, needed[pair])):
                model.add_implication(begin, mine[(cell + further) % cells])
        model.add(sum(begins) <= runs)
    solver = _solve(cp_model, model, seconds, seed)
    if solver is None:
        return None
    starts = []
    for (i, j), mine in used.items():
        on = [bool(solver.value(cell)) for cell in mine]
        starts += [(i, j, cell) for cell in range(cells) if on[cell] and not on[cell - 1]]
    return Rough(cells, tuple(starts), shifts)


def in_slots(shifts: Mapping[Pair, int], lengths: Mapping[Pair, int], cells: int, seconds: float) -> Rough | None:
    """Find one slot for every pair, of a length in cells; a cell may be far shorter than a slot.

    Every interval enters the model with all its copies that reach into one cycle, which makes its no-overlap constraint
    cyclic. Parameters and result as for `in_cells`.
    """
    cp_model = _solver()
    model = cp_model.CpModel()
    lines: dict[tuple[str, int], list[Any]] = {}
    variables = []
    for (i, j), length in lengths.items():
        start = model.new_int_var(0, cells - 1, "")
        variables.append((i, j, start))
        for line, shift in ((("up", i), 0), (("down", j), shifts[i, j] % cells)):
            for turn in range(3):
                if shift - turn * cells < cells and shift + cells - 1 + length > turn * cells:
                    interval = model.new_fixed_size_interval_var(start + (shift - turn * cells), length, "")
                    lines.setdefault(line, []).append(interval)
    for intervals in lines.values():
        model.add_no_overlap(intervals)
    solver = _solve(cp_model, model, seconds, 0)
    if solver is None:
        return None
    return Rough(cells, tuple((i, j, solver.value(start)) for i, j, start in variables), shifts)


def stretch(
    rough: Rough, cycle_ns: int, delays_ns: Matrix, weights: Mapping[Pair, float], guard_ns: int, lost_ns: int,
    shortest_ns: int,
) -> tuple[Departure, ...] | None:  # fmt: skip
    """Keep the orders of ``rough`` and find the times with which the worst pair carries most.

    Parameters
    ----------
    rough : Rough
        Whose cycle becomes ``cycle_ns``.
    cycle_ns : int
        Length of the cycle.
    delays_ns : matrix, (S, S)
        One-way delay from site i (row) to site j.
    weights : mapping
        Time that each pair needs for equal bytes.
    guard_ns : int
        Between any two windows of a sender, and between any two that arrive at a receiver.
    lost_ns : int
        What an owner loses of each window.
    shortest_ns : int
        Of a window.

    Returns
    -------
    tuple of Departure, or None
        In order of time. None where windows cannot be as long as the shortest.
    """
    linear = _linear_solver()
    solver = linear.Solver.CreateSolver("GLOP")
    cycle = cycle_ns / 1e3  # in microseconds, which keeps numbers small
    starts = [solver.NumVar(-2 * cycle, 2 * cycle, "") for _ in rough.starts]
    sizes = [solver.NumVar((shortest_ns + guard_ns) / 1e3, cycle, "") for _ in rough.starts]
    for line in _lines(rough, delays_ns):
        for (one, after_us, turn), (other, other_us, next_turn) in pairwise(line):
            ahead_us = other_us - after_us - (next_turn - turn) * cycle
            solver.Add(starts[one] + sizes[one] <= starts[other] + ahead_us)
    least, heaviest = solver.NumVar(0, cycle, ""), max(weights.values())
    for pair, weight in weights.items():
        mine = [size for size, start in zip(sizes, rough.starts, strict=True) if start[:2] == pair]
        solver.Add(solver.Sum(mine) - len(mine) * (guard_ns + lost_ns) / 1e3 >= least * (weight / heaviest))
    solver.Maximize(least + OVERALL / len(sizes) * solver.Sum(sizes))
    if solver.Solve() != linear.Solver.OPTIMAL:
        return None
    found = []
    for (i, j, _), start, size in zip(rough.starts, starts, sizes, strict=True):
        length_ns = int(size.solution_value() * 1e3) - guard_ns - TRIMMED_NS
        found.append(Departure(i, j, round(start.solution_value() * 1e3) % cycle_ns, length_ns))
    return tuple(sorted(found, key=lambda each: (each.start_ns, each.source)))


def _lines(rough: Rough, delays_ns: Matrix) -> list[list[tuple[int, float, int]]]:
    """Return, for every uplink and downlink, its windows in cyclic order, the first once more at the end.

    A window is its index, how much later than its start it uses the line in microseconds, and how many cycles later.
    """
    lines: dict[tuple[str, int], list[tuple[int, int, int, float]]] = {}
    for index, (i, j, start) in enumerate(rough.starts):
        turn, cell = divmod(start + rough.shifts[i, j], rough.cells)
        lines.setdefault(("up", i), []).append((start, index, 0, 0.0))
        lines.setdefault(("down", j), []).append((cell, index, turn, delays_ns[i][j] / 1e3))
    cyclic = []
    for line in lines.values():
        ordered = [(index, late_us, turn) for _, index, turn, late_us in sorted(line)]
        first = ordered[0]
        cyclic.append([*ordered, (first[0], first[1], first[2] - 1)])
    return cyclic


def _no_solver() -> PlanError:
    return PlanError(f"sites at different distances need a solver; install it with: {install_command('calendar')}")


def _solver() -> Any:
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise _no_solver() from error
    return cp_model


def _linear_solver() -> Any:
    try:
        from ortools.linear_solver import pywraplp
    except ImportError as error:
        raise _no_solver() from error
    return pywraplp


def _solve(cp_model: Any, model: Any, seconds: float, seed: int) -> Any:
    """Return the solver with its answer, or None where it found none in time."""
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = WORKERS
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.random_seed = seed
    # Looking for symmetries and probing take most of the time of models in cells, and find nothing there.
    solver.parameters.symmetry_level = 0
    solver.parameters.cp_model_probing_level = 0
    return solver if solver.solve(model) in (cp_model.OPTIMAL, cp_model.FEASIBLE) else None
