"""The planner: picks algorithm and chunk by prediction, compiles, and remembers.

A `Planner` belongs to one rank of one job, so topology and calendar are looked at once and a repeated call is one
dictionary lookup. Plans are kept while their steps together stay below `LARGEST_KEPT_STEPS`; what was used longest ago
goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

from detcoll.plan.bounds import floor_of
from detcoll.plan.calendar import Calendar
from detcoll.plan.collectives import Algorithm, declaration_of
from detcoll.plan.compiler import compile_plan
from detcoll.plan.costs import Costs
from detcoll.plan.homes import home_sites
from detcoll.plan.ir import Collective, Plan
from detcoll.plan.layout import LARGEST_SCRATCH_BYTES, ChunkSize, choose_chunk, uses_window
from detcoll.plan.predict import predict_ns
from detcoll.plan.staging import staged
from detcoll.topology import Topology

LARGEST_KEPT_STEPS = 2_000_000
LARGEST_KEPT_PLANS = 4_096
LARGEST_KEPT_CHOICES = 4_096

WORTH_A_CHANGE = 0.99
"""An algorithm with more one-way delays must be predicted to take less than this part of one with fewer, and so must
another chunk than the rule's."""

NOMINAL_BYTES = 16 * 2**20
"""The size of an array for whose chunks a rule is asked where no rank knows all sizes."""

SCALES = {Fraction(1, 2): 0.95, Fraction(2): WORTH_A_CHANGE}
"""Of the chunk that a rule gives, those that are predicted too, and the part of the rule's time that they must stay
below. Half a chunk means twice the steps, whose processor time others on a busy host miss: 4 MiB between four ranks on
two cores took 1.3 times as long with it where a gain of a hundredth was predicted."""


def predicted_chunk(
    collective: Collective, topology: Topology, calendar: Calendar, algorithm: str, costs: Costs | None = None
) -> ChunkSize:
    """Return the chunk with which ``algorithm`` is predicted to be fastest.

    Tried are the one that `choose_chunk` has a rule for and its `SCALES`, which must be better by more than a
    prediction is wrong. Where windows say what a chunk is, or nothing crosses a line, the rule decides.
    """
    how = declaration_of(collective.kind).algorithm(algorithm)
    if how.blocks is not None:
        return _chunk_of_blocks(collective, topology, calendar, how)
    taken = _chunk_with_homes(collective, topology, calendar, how, costs)
    if calendar.has_windows or not uses_window(calendar, collective.nbytes) or not any(calendar.rates):
        return taken
    least_ns = predict_ns(collective, topology, calendar, algorithm, taken, costs)
    for scale, worth in SCALES.items():
        chunk_size = _chunk_with_homes(collective, topology, calendar, how, costs, scale)
        needs_ns = predict_ns(collective, topology, calendar, algorithm, chunk_size, costs)
        if needs_ns < least_ns * worth:
            taken, least_ns = chunk_size, needs_ns
    return taken


def _chunk_with_homes(
    collective: Collective, topology: Topology, calendar: Calendar, how: Algorithm, costs: Costs | None,
    scale: Fraction = Fraction(1),
) -> ChunkSize:  # fmt: skip
    """Return the chunk that the rule gives, and the sites that are homes for this algorithm.

    Few chunks may not divide evenly between fewer homes, so that must be predicted to be faster.
    """
    chunk_size = choose_chunk(topology, calendar, collective, scale)
    if how.blocks is not None:  # pieces of blocks have homes of their own
        return chunk_size
    sites = len(topology.sites)
    homes = home_sites(how.hops(sites, topology.site_of(collective.root)), calendar, sites)
    if not homes:
        return chunk_size
    tried = replace(chunk_size, homes=homes)
    needs_ns, with_all_ns = (
        predict_ns(collective, topology, calendar, how.name, size, costs) for size in (tried, chunk_size)
    )
    return tried if needs_ns < with_all_ns * WORTH_A_CHANGE else chunk_size


def _chunk_of_blocks(collective: Collective, topology: Topology, calendar: Calendar, how: Algorithm) -> ChunkSize:
    """Return the chunk that the rule gives, the same on all ranks, with scratch for what owners hold.

    Where no block is as long as a chunk, the same scratch has more places: an owner may have many short blocks.
    """
    size, is_stated = topology.size, bool(collective.out_counts)
    if is_stated:  # a rank knows only its own sizes
        count = longest = NOMINAL_BYTES // collective.itemsize
        collective = replace(collective, count=count, counts=(), out_counts=())
    else:
        has_counts = declaration_of(collective.kind).has_counts
        longest = max(collective.blocks(size)) if has_counts else collective.count
    chunk_size = choose_chunk(topology, calendar, collective)
    most = max(LARGEST_SCRATCH_BYTES // (chunk_size.elems * collective.itemsize), chunk_size.depth)
    if how.awaits:
        chunk_size = replace(chunk_size, depth=min(2 * chunk_size.depth, most))
    if is_stated:  # a block for every rank may be short
        chunk_size = replace(chunk_size, depth=min(max(chunk_size.depth, size), most))
    elems = min(chunk_size.elems, max(longest, 1))
    return replace(chunk_size, elems=elems, depth=chunk_size.depth * chunk_size.elems // elems)


def choose_algorithm(
    collective: Collective, topology: Topology, calendar: Calendar, costs: Costs | None = None,
    chunk_size: ChunkSize | None = None,
) -> str:  # fmt: skip
    """Return the algorithm with the smallest prediction; of nearly equal ones, that with the fewest delays."""
    algorithms = declaration_of(collective.kind).algorithms
    if (
        len(algorithms) == 1 or len(topology.sites) <= 2
    ):  # between two, no other has fewer delays or puts fewer bytes on a line
        return algorithms[0].name
    taken, least_ns = "", 0.0
    for how in algorithms:
        tried = chunk_size or _chunk_with_homes(collective, topology, calendar, how, costs)
        needs_ns = predict_ns(collective, topology, calendar, how.name, tried, costs)
        if not taken or needs_ns < least_ns * WORTH_A_CHANGE:
            taken, least_ns = how.name, needs_ns
    return taken


class Planner:
    """Plans of one rank.

    Parameters
    ----------
    topology : Topology
        Where all ranks are.
    rank : int
        Whose part is compiled.
    calendar : Calendar
        Who may send when.
    costs : Costs, optional
        What a host costs; all ranks must give the same, since the choice of algorithm depends on it.
    """

    def __init__(self, topology: Topology, rank: int, calendar: Calendar, costs: Costs | None = None) -> None:
        topology.site_of(rank)
        self.topology = topology
        self.rank = rank
        self.calendar = calendar
        self.costs = costs or Costs()
        self._plans: OrderedDict[tuple[Collective, str, bool, bool, bool], Plan] = OrderedDict()
        self._kept_steps = 0
        self._choose = lru_cache(LARGEST_KEPT_CHOICES)(self._choose_now)
        self._chunk = lru_cache(LARGEST_KEPT_CHOICES)(self._chunk_now)
        self._predict = lru_cache(LARGEST_KEPT_CHOICES)(self._predict_now)

    def algorithm(self, collective: Collective) -> str:
        """Return the algorithm that `plan` takes for this collective."""
        return self._choose(collective)

    def plan(
        self, collective: Collective, algorithm: str | None = None, *, device_in: bool = False,
        device_out: bool = False, disturbs: bool = False,
    ) -> Plan:  # fmt: skip
        """Return this rank's part, by the algorithm named or the one predicted to be fastest.

        ``device_in``, ``device_out``, ``disturbs`` : whether the caller's input and output are on a device, and whether
        they share memory there, which other ranks need not know; see `detcoll.plan.staging.staged`.

        Raises
        ------
        UsageError
            If the algorithm does not do this kind of collective.
        PlanError
            If the collective is too large for the tags of a plan.
        """
        key = (collective, algorithm or self._choose(collective), device_in, device_out, disturbs)
        plan = self._plans.get(key)
        if plan is None:
            compiled = compile_plan(collective, self.topology, self.rank, key[1], self._chunk(*key[:2]))
            plan = staged(compiled, source=device_in, output=device_out, disturbs=disturbs)
            self._keep(key, plan)
        else:
            self._plans.move_to_end(key)
        return plan

    def predict_ns(
        self, collective: Collective, algorithm: str | None = None, phase_ns: int | None = None, *,
        on_device: bool = False, costs: Costs | None = None,
    ) -> int:  # fmt: skip
        """Return the predicted time of the slowest rank; see `detcoll.plan.predict.predict_ns`.

        ``costs`` : where they are known better than they were when the plans were chosen.
        """
        algorithm = algorithm or self._choose(collective)
        return self._predict(collective, algorithm, phase_ns, on_device, costs or self.costs)

    def floor_ns(self, collective: Collective) -> float | None:
        """Return the physical floor, or None where there is no line; see `detcoll.plan.bounds.floor_of`."""
        return floor_of(self.topology, collective)

    def _choose_now(self, collective: Collective) -> str:
        return choose_algorithm(collective, self.topology, self.calendar, self.costs)

    def _chunk_now(self, collective: Collective, algorithm: str) -> ChunkSize:
        return predicted_chunk(collective, self.topology, self.calendar, algorithm, self.costs)

    def _predict_now(
        self, collective: Collective, algorithm: str, phase_ns: int | None, on_device: bool, costs: Costs
    ) -> int:  # fmt: skip
        chunk_size = self._chunk(collective, algorithm)
        return predict_ns(
            collective, self.topology, self.calendar, algorithm, chunk_size, costs, phase_ns, on_device=on_device
        )

    def _keep(self, key: tuple[Collective, str, bool, bool, bool], plan: Plan) -> None:
        self._plans[key] = plan
        self._kept_steps += len(plan.steps)
        while len(self._plans) > 1 and (self._kept_steps > LARGEST_KEPT_STEPS or len(self._plans) > LARGEST_KEPT_PLANS):
            _, dropped = self._plans.popitem(last=False)
            self._kept_steps -= len(dropped.steps)
