"""How long a collective takes, in closed form, before it starts.

All ranks call at time zero; the answer is when the slowest has its result. Letters as in
`detcoll.plan.collectives.all_reduce`, q(c) a chunk's time on the line, s what a step costs the host, m(n) = n / copy
rate, l the local latency, n the chunks that a rank owns. Kinds declare what their hosts have to do, and their
algorithms' hops; of those that move blocks, both follow from what moves (see `_OfBlocks`).

Local reduce    A rank sends its part to the R-1 other owners and folds what it gets. The first chunk is there after
                f = max((R-1)(s + m(c)), s + m(c) + l) + (R-1) s + s + R m(c). Every other one follows D later, which
                is what the host spends on one chunk of each segment up to here. The last is there at f + (n-1) D.
A wide hop      Chunks ready from a to z end on the line at e = max(E(a, all), E(z, one)), with E from
                `detcoll.plan.lines`: no line is faster than its bytes, and the last chunk cannot leave before it is
                ready: ready means copied to the kernel, m(c) after the fold. They arrive a one-way delay and a wake-up
                later.
exchange        One hop.
direct          Two hops over the same flows. With halves of T each on the line, the second ends at
                max(2 T, T + L + q) + L: either the line is never idle, or the last sum arrives and only then the last
                result leaves. This is max(E(a, both), E(z', one)) with z' = E(a, first) + L.
ring            As many hops as sites to pass, each begun when the one before delivered; where sums and results use
                one line, E counts both.
Scratch         A rank keeps ``depth`` chunks until acknowledged, so the last cannot start before
                floor((n-1) / depth) round trips.
Local gather    max((R-1)(s + m(c)), s + m(c) + l) + (R-1)(s + m(c)), after the last fold. In all of this R-1 is the
                number of segments where that is smaller.
One site        The same without the wide area, or what all steps of the busiest rank cost.
Acknowledged    What is sent from the caller's array (ring) must be acknowledged, a delay after it arrived.
Call            All of it begins when the hosts of a call across sites have woken up, `Costs.call_ns`, and ends when
                ranks that share a core have done what is left, one after another, `Costs.return_ns`.
Host            Nothing ends before the busiest rank has done all its steps.
Device          The first chunk comes to the host before, the last goes to the device after; in between copies hide,
                unless the device takes longer for all bytes than everything else does.

With windows the answer depends on where in the cycle the call falls; without a phase it is the mean over
`PHASES` of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from detcoll.plan.calendar import Calendar, Slotting
from detcoll.plan.collectives import Homes, Hop, Load, declaration_of
from detcoll.plan.collectives.legs import Messages, legs_of
from detcoll.plan.costs import Costs
from detcoll.plan.ir import Collective
from detcoll.plan.layout import ChunkSize, segments, uses_window
from detcoll.plan.lines import Floats, Flows, Indices, Lines
from detcoll.plan.stages import Crossing, Stages
from detcoll.topology import Topology

PHASES = 16


@dataclass(frozen=True, slots=True)
class _Cut:
    """The chunks of an array by segment: ``owners`` (segments, sites), and by segment the elements and chunks.

    ``homes`` : the sites that are homes of chunks, in turn.
    """

    owners: Indices
    elems: Indices
    chunks: Indices
    chunk_elems: int
    homes: tuple[int, ...]

    def of_home(self, sites: Indices) -> tuple[Indices, Indices]:
        """Return, by segment and site in ``sites``, how many elements and chunks have that home."""
        segments, period = len(self.owners), len(self.homes)
        places = {site: place for place, site in enumerate(self.homes)}
        place = np.array([places.get(site, -1) for site in sites.tolist()], dtype=np.int64)
        first = (place[None, :] - np.arange(segments)[:, None]) % period
        number = np.maximum((self.chunks[:, None] - first + period - 1) // period, 0) * (place >= 0)
        short = self.chunks * self.chunk_elems - self.elems
        last = (self.chunks - 1 + np.arange(segments)) % period
        return number * self.chunk_elems - short[:, None] * (last[:, None] == place[None, :]), number


def predict_ns(
    collective: Collective,
    topology: Topology,
    calendar: Calendar,
    algorithm: str,
    chunk_size: ChunkSize,
    costs: Costs | None = None,
    phase_ns: int | None = None,
    *,
    on_device: bool = False,
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
    on_device : bool
        Whether all ranks have their arrays on devices.
    """
    collective, costs = collective.evened(topology.size), costs or Costs()
    if topology.size == 1 or collective.count == 0:
        return 0
    has_blocks = declaration_of(collective.kind).algorithm(algorithm).blocks is not None
    terms = _OfBlocks if has_blocks else _OfChunks
    finish_ns = terms(collective, topology, calendar, algorithm, chunk_size, costs).mean_ns(phase_ns)
    return round(_with_copies_ns(finish_ns, collective, chunk_size, costs)) if on_device else finish_ns


def _with_copies_ns(finish_ns: float, collective: Collective, chunk_size: ChunkSize, costs: Costs) -> float:
    """Return when the slowest has its result on its device, given when it would have it on the host."""
    first_ns = costs.device_ns(min(chunk_size.elems * collective.itemsize, collective.nbytes))
    return max(finish_ns + first_ns, costs.device_ns(collective.nbytes)) + first_ns


class _Prediction(ABC):
    """The terms of one prediction that do not depend on the phase."""

    def __init__(
        self, collective: Collective, topology: Topology, calendar: Calendar, algorithm: str, chunk_size: ChunkSize,
        costs: Costs,
    ) -> None:  # fmt: skip
        self.collective, self.topology, self.calendar = collective, topology, calendar
        self.declared = declaration_of(collective.kind)
        self.algorithm = self.declared.algorithm(algorithm)
        self.chunk_size, self.costs = chunk_size, costs
        self.sites = len(topology.sites)
        self.root_site = topology.site_of(collective.root)
        self.most_ranks = max(len(site.ranks) for site in topology.sites)

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

    def _lines(self, phase_ns: int) -> Lines:
        aligned = self.calendar.mode is Slotting.CALENDAR
        late_ns = self.costs.aligned_late_ns if aligned else self.costs.late_ns
        return Lines(self.topology, self.calendar, express=not self._paced, phase_ns=phase_ns, late_ns=late_ns)

    @abstractmethod
    def _finish_ns(self, phase_ns: int) -> float:
        """Return when the slowest rank has its result."""


class _OfChunks(_Prediction):
    """Of a kind that cuts one array into chunks."""

    def __init__(
        self, collective: Collective, topology: Topology, calendar: Calendar, algorithm: str, chunk_size: ChunkSize,
        costs: Costs,
    ) -> None:  # fmt: skip
        super().__init__(collective, topology, calendar, algorithm, chunk_size, costs)
        self.cut = _cut(topology, collective.count, chunk_size)
        self.chunk_bytes = min(int(self.cut.elems.max()), chunk_size.elems) * collective.itemsize
        self.local_step_ns = costs.step_ns + costs.copy_ns(self.chunk_bytes)

    def _finish_ns(self, phase_ns: int) -> float:
        first_ns = self._fill_ns()
        if self.sites == 1:
            return max(first_ns + self._gather_ns(), self._busiest_ns())
        lines = self._lines(phase_ns)
        first_ns += self.costs.call_ns
        first = np.full(self.topology.size, first_ns)
        stages = Stages(self.crossings, lines, self.costs, self.chunk_bytes, first, first + self._supply_ns(lines))
        busiest_ns = self.costs.call_ns + self._busiest_ns()
        return_ns = 0 if self.chunk_size.whole else self.costs.return_ns
        return max(stages.done_ns() + self._gather_ns(), stages.acknowledged_ns, busiest_ns) + return_ns

    def _supply_ns(self, lines: Lines) -> float:
        """Return how long after the first chunk the last one is ready: what the host and scratch allow."""
        turns = int(self.cut.chunks.max()) - 1
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
        owned, peers = np.zeros(size), np.zeros(size)
        for index, site in enumerate(self.topology.sites):
            np.add.at(owned, self.cut.owners[:, index], self.cut.elems * float(itemsize))
            peers[list(site.ranks)] = len(site.ranks) - 1
        return Load(
            self.sites, float(self.cut.chunks.sum()), float(self.cut.elems.sum()) * itemsize,
            self._chunks_owned().astype(np.float64), owned, peers,
        )  # fmt: skip

    @cached_property
    def crossings(self) -> list[Crossing]:
        """The hops of the wide stage, with the flows between owners that carry their chunks."""
        return [
            Crossing(self._flows(hop), hop.folds, hop.from_user, hop.behind)
            for hop in self.algorithm.hops(self.sites, self.root_site)
        ]

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


class _OfBlocks(_Prediction):
    """Of a kind that moves blocks.

    Letters as in the module. A piece is at its owner when its rank has sent it and the owner has taken it; a rank that
    owns its pieces has them at once, and copies them to scratch where they are the last. Where pieces are folded, an
    owner takes R-1 others' first. The opening of all pieces takes what it costs the busiest host. What comes from the
    line goes to the rest of the site as in a local gather, or to the one rank that gets it.
    """

    def __init__(
        self, collective: Collective, topology: Topology, calendar: Calendar, algorithm: str, chunk_size: ChunkSize,
        costs: Costs,
    ) -> None:  # fmt: skip
        super().__init__(collective, topology, calendar, algorithm, chunk_size, costs)
        how = self.algorithm
        assert how.blocks is not None
        self.legs = legs_of(collective, topology, how.blocks, chunk_size, at_home=how.at_home)
        self.chunk_bytes = self.legs.longest * collective.itemsize
        self.step_ns = costs.step_ns + costs.copy_ns(self.chunk_bytes)

    def _finish_ns(self, phase_ns: int) -> float:
        first, last = self._opened()
        is_wide = any(hop.chunks for hop in self.legs.hops)
        call_ns, return_ns = (self.costs.call_ns, self.costs.return_ns) if is_wide else (0, 0)
        busiest_ns = call_ns + float(self._host_ns().max())
        if not is_wide:
            return max(float(last.max()) + self._closing_ns(), busiest_ns)
        crossings = [
            Crossing(self._flows(hop), self.legs.folds and number == 0, behind=0 if number else None)
            for number, hop in enumerate(self.legs.hops)
        ]
        stages = Stages(crossings, self._lines(phase_ns), self.costs, self.chunk_bytes, first + call_ns, last + call_ns)
        done_ns = max(stages.done_ns(), float(last.max()) + call_ns)
        return max(done_ns + self._closing_ns(), busiest_ns) + (0 if self.chunk_size.whole else return_ns)

    def _opened(self) -> tuple[Floats, Floats]:
        """Return when each rank has the first and the last of what it sends over the line."""
        size, costs = self.topology.size, self.costs
        first = np.full(size, costs.step_ns + self.step_ns)
        sources, targets, _, chunks = self.legs.opening.arrays()
        if len(sources):
            given = np.bincount(sources, minlength=size)  # a rank sends to so many owners in turn
            ready = np.zeros(size)
            np.maximum.at(ready, targets, given[sources] * self.step_ns)
            first = np.where(ready > 0, ready + costs.local_latency_ns + self.step_ns, first)
        if self.legs.folds and self.most_ranks > 1:
            first += (self.most_ranks - 1) * self.step_ns + self.step_ns
        opening = self._host_ns(opening=True)
        rounds = np.zeros(size)
        if len(sources):
            np.maximum.at(rounds, targets, chunks)
        return first, np.maximum(first, first + opening * (1 - 1 / np.maximum(rounds, 1)))

    def _closing_ns(self) -> float:
        """Return how long the last piece takes from its owner to where it belongs."""
        sources = self.legs.closing.arrays()[0]
        if not len(sources):
            return 0.0
        others = min(self.most_ranks - 1, int(np.bincount(sources).max()))
        return others * self.step_ns + self.costs.local_latency_ns + self.step_ns

    def _host_ns(self, *, opening: bool = False) -> Floats:
        """Return what all steps of each rank cost its host, or those of the opening."""
        size, itemsize = self.topology.size, self.collective.itemsize
        steps, moved = np.zeros(size), np.zeros(size)

        def count(ranks: Indices, chunks: Floats, elems: Floats) -> None:
            np.add.at(steps, ranks, chunks)
            np.add.at(moved, ranks, elems * itemsize)

        local = [self.legs.opening] if opening else [self.legs.opening, self.legs.closing]
        for messages in local:
            sources, targets, elems, chunks = messages.arrays()
            count(sources, chunks, elems)
            lends = self.legs.folds and messages is self.legs.opening
            count(targets, chunks, 0 * elems if lends else elems)
        sources, _, elems, chunks = self.legs.copies.arrays()
        count(sources, chunks, elems)
        for hop in [] if opening else self.legs.hops:
            sources, targets, elems, chunks = hop.arrays()
            count(sources, chunks, 0 * elems)
            count(targets, chunks * (2 if self.legs.folds else 1), elems)
        return steps * self.costs.step_ns + moved / self.costs.copy_bytes_per_s * 1e9

    def _flows(self, hop: Messages) -> Flows:
        sources, targets, elems, chunks = hop.arrays()
        nbytes = elems * self.collective.itemsize + chunks * self.costs.frame_bytes
        return Flows(sources, targets, nbytes, chunks)


def _cut(topology: Topology, count: int, size: ChunkSize) -> _Cut:
    cut = segments(topology, count, whole=size.whole)
    elems = np.array([end - begin for begin, end, _ in cut], dtype=np.int64)
    owners = np.array([owners for _, _, owners in cut], dtype=np.int64)
    homes = size.homes or tuple(range(len(topology.sites)))
    return _Cut(owners, elems, -(-elems // size.elems), size.elems, homes)
