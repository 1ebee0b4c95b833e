"""How long a collective takes, in closed form, before it starts.

All ranks call at time zero; the answer is when the slowest has its result. Letters as in
`detcoll.plan.collectives.all_reduce`, q(c) a chunk's time on the line, s what a step costs the host, m(n) = n / copy
rate, l the local latency, n the chunks that a rank owns. Kinds declare how they open, what their hosts have to do, and
their algorithms' hops.

Local reduce    A rank sends its part to the R-1 other owners and folds what it gets. The first chunk is there after
                f = max((R-1)(s + m(c)), s + m(c) + l) + (R-1) s + s + R m(c). Every other one follows D later, which
                is what the host spends on one chunk of each segment up to here. The last is there at f + (n-1) D.
A wide hop      Chunks ready from a to z end on the line at e = max(E(a, all), E(z, one)), with E from
                `detcoll.plan.lines`: no line is faster than its bytes, and the last chunk cannot leave before it is
                ready. They arrive a one-way delay and a wake-up later.
exchange, star  One hop.
direct          Two hops over the same flows. With halves of T each on the line, the second ends at
                max(2 T, T + L + q) + L: either the line is never idle, or the last sum arrives and only then the last
                result leaves. This is max(E(a, both), E(z', one)) with z' = E(a, first) + L.
ring, relay     As many hops as sites to pass, each begun when the one before delivered; where sums and results use
                one line, E counts both.
Scratch         A rank keeps ``depth`` chunks until acknowledged, so the last cannot start before
                floor((n-1) / depth) round trips.
Local gather    max((R-1)(s + m(c)), s + m(c) + l) + (R-1)(s + m(c)), after the last fold. In all of this R-1 is the
                number of segments where that is smaller.
One site        The same without the wide area, or what all steps of the busiest rank cost.
Acknowledged    What is sent from the caller's array (ring, star, relay) must be acknowledged, a delay after it arrived.
Call            All of it begins when the hosts of a call across sites have woken up, `Costs.call_ns`, and ends when
                ranks that share a core have done what is left, one after another, `Costs.return_ns`.
Host            Nothing ends before the busiest rank has done all its steps.

With windows the answer depends on where in the cycle the call falls; without a phase it is the mean over
`PHASES` of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from detcoll.plan.alignment import LATE_NS
from detcoll.plan.calendar import Calendar, Slotting
from detcoll.plan.collectives import Homes, Hop, Load, Opening, declaration_of
from detcoll.plan.ir import Collective
from detcoll.plan.layout import LARGEST_FRAME_BYTES, STEP_NS, ChunkSize, segments, uses_window
from detcoll.plan.lines import Flows, Indices, Lines
from detcoll.topology import Topology

PHASES = 16

CALL_WORK_NS = 1_000_000
"""Processor time of a call at one rank of a Python host before its first step, ZeroMQ's thread included."""

RETURN_WORK_NS = 1_000_000
"""The same from the last byte's arrival on. Ranks that share a core all have it then, and wait for each other: on four
ranks of two cores 1.7 ms passed until the last had its result, and the steps alone need 0.8."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a host and its local network cost.

    The defaults are those of a Python host on one machine: a step some 30 us, memory at 5 GB/s, a local message 60 us,
    a wake-up from a wait 100 us. ``frame_bytes`` is what a transport adds to a wide message. ``late_ns`` is what a
    window loses because its owner wakes up late: in the mean over the windows of a host with twice as many busy ranks
    as cores, most of which begin on time and one in ten more than a millisecond late. ``aligned_late_ns`` is the same
    where windows lead to one site each. ``call_ns`` is what passes in a call across sites before the first step begins,
    ``return_ns`` what ranks that all own a part keep each other waiting for at its end, which simulated hosts do not.
    """

    step_ns: int = STEP_NS
    copy_bytes_per_s: float = 5e9
    local_latency_ns: int = 60_000
    wake_ns: int = 100_000
    late_ns: int = 300_000
    aligned_late_ns: int = LATE_NS
    call_ns: int = 0
    return_ns: int = 0
    frame_bytes: int = LARGEST_FRAME_BYTES

    def copy_ns(self, nbytes: float) -> float:
        """Return how long the host takes to read or write ``nbytes``."""
        return nbytes / self.copy_bytes_per_s * 1e9

    @classmethod
    def on_host(cls, ranks: int, cores: int) -> Costs:
        """Return what a Python host costs whose ``ranks`` share ``cores``, in a call that all of them begin at once.

        With more ranks than cores each gets its share of a core: all that needs a processor takes so much longer. A
        call across sites begins with some `CALL_WORK_NS` of it, for waking threads, greeting and posting.
        """
        crowd = max(ranks / cores, 1.0)
        usual = cls()
        return cls(
            step_ns=round(usual.step_ns * crowd),
            copy_bytes_per_s=usual.copy_bytes_per_s / crowd,
            local_latency_ns=round(usual.local_latency_ns * crowd),
            wake_ns=round(usual.wake_ns * crowd),
            call_ns=round(CALL_WORK_NS * crowd),
            return_ns=round(RETURN_WORK_NS * (crowd - 1)),
        )


@dataclass(frozen=True, slots=True)
class _Cut:
    """The chunks of an array by segment: ``owners`` (segments, sites), and by segment the elements and chunks."""

    owners: Indices
    elems: Indices
    chunks: Indices
    chunk_elems: int

    def of_home(self, homes: Indices) -> tuple[Indices, Indices]:
        """Return, by segment and site in ``homes``, how many elements and chunks have that home."""
        segments, sites = self.owners.shape
        first = (homes[None, :] - np.arange(segments)[:, None]) % sites
        number = np.maximum((self.chunks[:, None] - first + sites - 1) // sites, 0)
        short = self.chunks * self.chunk_elems - self.elems
        last = (self.chunks - 1 + np.arange(segments)) % sites
        return number * self.chunk_elems - short[:, None] * (last[:, None] == homes[None, :]), number


def predict_ns(
    collective: Collective,
    topology: Topology,
    calendar: Calendar,
    algorithm: str,
    chunk_size: ChunkSize,
    costs: Costs | None = None,
    phase_ns: int | None = None,
) -> int:
    """Return when the slowest rank has its result, in nanoseconds after all ranks called at once.

    Parameters
    ----------
    collective, topology, calendar, algorithm, chunk_size
        As for `detcoll.plan.compiler.compile_plan`.
    costs : Costs, optional
        What a host costs.
    phase_ns : int, optional
        Where in the cycle of the calendar the call falls; by default the mean over phases.
    """
    if topology.size == 1 or collective.count == 0:
        return 0
    return _Prediction(collective, topology, calendar, algorithm, chunk_size, costs or Costs()).mean_ns(phase_ns)


class _Prediction:
    """The terms of one prediction that do not depend on the phase."""

    def __init__(
        self, collective: Collective, topology: Topology, calendar: Calendar, algorithm: str, chunk_size: ChunkSize,
        costs: Costs,
    ) -> None:  # fmt: skip
        self.collective, self.topology, self.calendar = collective, topology, calendar
        self.declared = declaration_of(collective.kind)
        self.algorithm = self.declared.algorithm(algorithm)
        self.chunk_size, self.costs = chunk_size, costs
        self.cut = _cut(topology, collective.count, chunk_size)
        self.sites = len(topology.sites)
        self.ranks_at = np.array([len(site.ranks) for site in topology.sites])
        self.chunk_bytes = min(int(self.cut.elems.max()), chunk_size.elems) * collective.itemsize
        self.root_site = topology.site_of(collective.root)
        self.most_ranks = int(self.ranks_at.max())
        self.local_step_ns = costs.step_ns + costs.copy_ns(self.chunk_bytes)

    def mean_ns(self, phase_ns: int | None) -> int:
        """Return the prediction for a phase, or the mean over phases where they matter."""
        cycles = self.calendar.sites if any(cycle.windows for cycle in self.calendar.sites) else ()
        if phase_ns is not None or not cycles or not self._paced:
            return round(self._finish_ns(phase_ns or 0))
        cycle_ns = max(cycle.cycle_ns for cycle in cycles)
        return round(sum(self._finish_ns(cycle_ns * k // PHASES) for k in range(PHASES)) / PHASES)

    @property
    def _paced(self) -> bool:
        return uses_window(self.calendar, self.collective.nbytes)

    def _finish_ns(self, phase_ns: int) -> float:
        scatters = self.declared.opening is Opening.SCATTER
        first_ns = self._scatter_ns() if scatters else self._fill_ns()
        if self.sites == 1:
            last_ns = self._busiest_ns()
            if scatters:  # what the root sends last has to arrive
                last_ns = last_ns + self.costs.local_latency_ns + self.local_step_ns
            return max(first_ns + self._gather_ns(), last_ns)
        aligned = self.calendar.mode is Slotting.CALENDAR
        late_ns = self.costs.aligned_late_ns if aligned else self.costs.late_ns
        lines = Lines(self.topology, self.calendar, express=not self._paced, phase_ns=phase_ns, late_ns=late_ns)
        first_ns += self.costs.call_ns
        stages = _Stages(self, lines, first_ns, first_ns + self._supply_ns(lines))
        busiest_ns = self.costs.call_ns + self._busiest_ns()
        return_ns = 0 if self.chunk_size.whole else self.costs.return_ns
        return max(stages.done_ns() + self._gather_ns(), stages.acknowledged_ns, busiest_ns) + return_ns

    def _supply_ns(self, lines: Lines) -> float:
        """Return how long after the first chunk the last one is ready: what the host and scratch allow."""
        turns = int(self.cut.chunks.max()) - 1
        if self.declared.opening is Opening.SCATTER:
            return turns * len(self.cut.elems) * self.local_step_ns
        rounds = int(self._chunks_owned().max() - 1) // self.chunk_size.depth
        if self.chunk_size.in_place and self.most_ranks == 1:  # nothing lies in scratch
            rounds = 0
        held_ns = float((lines.delay_ns + lines.delay_ns.T).max()) + self.costs.wake_ns
        turn_ns = self._busiest_ns(opening=True) / max(turns + 1, 1)
        return max(turns * turn_ns, rounds * held_ns)

    def _fill_ns(self) -> float:
        """Return when the first chunk is folded inside the slowest site."""
        fold_ns = self.costs.step_ns + self.most_ranks * self.costs.copy_ns(self.chunk_bytes)
        if self.most_ranks == 1:
            return fold_ns
        return self._across_site_ns() + (self.most_ranks - 1) * self.costs.step_ns + fold_ns

    def _scatter_ns(self) -> float:
        """Return when the owners of the root's site have their first chunk."""
        foreign = int((self.cut.owners[:, self.root_site] != self.collective.root).sum())
        return foreign * self.local_step_ns + self.costs.local_latency_ns + self.local_step_ns if foreign else 0.0

    def _gather_ns(self) -> float:
        """Return how long the last chunk takes from its owner to the rest of the largest site."""
        if self.most_ranks == 1:
            return 0.0
        sends_ns, receives_ns = (self.most_ranks - 1) * self.local_step_ns, self._parallel * self.local_step_ns
        one_ns = sends_ns + self.costs.local_latency_ns + self.local_step_ns
        return max(one_ns, self._across_site_ns() + receives_ns)

    def _across_site_ns(self) -> float:
        """Return how long the first of the messages takes that a rank sends to the others of its site."""
        return max(self._parallel * self.local_step_ns, self.local_step_ns + self.costs.local_latency_ns)

    @property
    def _parallel(self) -> int:
        """How many other owners of its site a rank has to do with at once."""
        return min(self.most_ranks - 1, len(self.cut.elems))

    def _chunks_owned(self) -> Indices:
        owned = np.zeros(self.topology.size, dtype=np.int64)
        for site in range(self.sites):
            np.add.at(owned, self.cut.owners[:, site], self.cut.chunks)
        return owned

    def _busiest_ns(self, *, opening: bool = False) -> float:
        """Return what all steps of the busiest rank cost its host, or those of the opening."""
        steps, moved = self.declared.work(self._load, self.algorithm, opening)
        return float((steps * self.costs.step_ns + moved / self.costs.copy_bytes_per_s * 1e9).max())

    @cached_property
    def _load(self) -> Load:
        itemsize, size = self.collective.itemsize, self.topology.size
        owned, peers, at_root = np.zeros(size), np.zeros(size), np.zeros(size)
        for index, site in enumerate(self.topology.sites):
            np.add.at(owned, self.cut.owners[:, index], self.cut.elems * float(itemsize))
            peers[list(site.ranks)] = len(site.ranks) - 1
            at_root[list(site.ranks)] = index == self.root_site
        return Load(
            self.sites, float(self.cut.chunks.sum()), float(self.cut.elems.sum()) * itemsize,
            self._chunks_owned().astype(np.float64), owned, peers, at_root,
        )  # fmt: skip

    @cached_property
    def hops(self) -> list[tuple[Hop, Flows]]:
        """The hops of the wide stage, and the flows between owners that carry their chunks."""
        return [(hop, self._flows(hop)) for hop in self.algorithm.hops(self.sites, self.root_site)]

    def _flows(self, hop: Hop) -> Flows:
        """Return the flows between owners that carry the chunks of ``hop``."""
        cut, size = self.cut, self.topology.size
        here, there = np.array(hop.pairs, dtype=np.int64).reshape(-1, 2).T
        if hop.homes is Homes.ALL:
            elems = np.repeat(cut.elems[:, None], len(here), axis=1)
            chunks = np.repeat(cut.chunks[:, None], len(here), axis=1)
        else:
            elems, chunks = cut.of_home(here if hop.homes is Homes.SOURCE else there)
        keys = cut.owners[:, here] * size + cut.owners[:, there]
        pairs, where = np.unique(keys, return_inverse=True)
        messages = np.asarray(np.bincount(where.ravel(), chunks.ravel()), dtype=np.float64)
        collective, frame_bytes = self.collective, float(self.costs.frame_bytes)
        nbytes = np.asarray(np.bincount(where.ravel(), elems.ravel() * float(collective.itemsize)), dtype=np.float64)
        scale = collective.accumulator_itemsize / collective.itemsize if hop.accumulated else 1.0
        return Flows(pairs // size, pairs % size, (nbytes + messages * frame_bytes) * scale, messages)


class _Stages:
    """The wide stage: hops over lines, from when owners have chunks to when every owner has its result."""

    def __init__(self, given: _Prediction, lines: Lines, first_ns: float, last_ns: float) -> None:
        self.given, self.lines = given, lines
        self.first = np.full(given.topology.size, first_ns)
        self.last = np.full(given.topology.size, last_ns)
        self.begun = self.first
        self.acknowledged_ns = 0.0
        self.fold_ns = given.costs.step_ns + given.costs.copy_ns(given.chunk_bytes)

    def done_ns(self) -> float:
        """Return when the last owner has its last chunk."""
        end_ns, folds = 0.0, False
        for hop, flows in self.given.hops:
            before = None if hop.behind is None else self.given.hops[hop.behind][1]
            end_ns = max(end_ns, self._hop(flows, before, hop.from_user))
            folds = hop.folds
            if folds:  # received and folded, before it goes on
                self.first, self.last = self.first + 2 * self.fold_ns, self.last + 2 * self.fold_ns
        return end_ns + self.fold_ns * (2 if folds else 1)

    def _hop(self, flows: Flows, before: Flows | None, from_user: bool) -> float:
        """Send ``flows`` behind what ``before`` put on the same lines; return when the last one has arrived."""
        one, over_ns = flows.only_one(), self.lines.delays_ns(flows) + self.given.costs.wake_ns
        one_ns = self.lines.end_ns(one, self.first[flows.src])
        end_ns = np.maximum(
            self.lines.end_ns(flows, self.first[flows.src]), self.lines.end_ns(one, self.last[flows.src])
        )
        if before is not None:
            end_ns = np.maximum(end_ns, self.lines.end_ns(flows.with_more(before), self.begun[flows.src]))
        used = flows.messages > 0
        if from_user:
            back = Flows(flows.dst, flows.src, flows.nbytes, flows.messages)
            acknowledged = end_ns + self.lines.delays_ns(flows) + self.lines.delays_ns(back)
            self.acknowledged_ns = max(self.acknowledged_ns, float(acknowledged[used].max(initial=0.0)))
        first, last = np.zeros_like(self.first), np.zeros_like(self.last)
        np.maximum.at(first, flows.dst[used], (one_ns + over_ns)[used])
        np.maximum.at(last, flows.dst[used], (end_ns + over_ns)[used])
        heard = last > 0
        self.first, self.last = np.where(heard, first, self.first), np.where(heard, last, self.last)
        return float(last.max())


def _cut(topology: Topology, count: int, size: ChunkSize) -> _Cut:
    cut = segments(topology, count, whole=size.whole)
    elems = np.array([end - begin for begin, end, _ in cut], dtype=np.int64)
    owners = np.array([owners for _, _, owners in cut], dtype=np.int64)
    return _Cut(owners, elems, -(-elems // size.elems), size.elems)
