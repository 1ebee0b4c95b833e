"""Timekeepers of several sites without a common clock, in virtual time: what they send does not meet at a receiver."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from ranks import lines, run_ranks

from detcoll.communicator import Communicator
from detcoll.job import opening
from detcoll.job.opening import ALIGNED_CLOCK_ERROR_NS
from detcoll.plan import Calendar, Slotting, build_calendar
from detcoll.runtime import Aligning, Timekeeper
from detcoll.runtime.timekeeping import SILENCE_NS
from detcoll.testing.fake_clock import FakeClock, VirtualTime
from detcoll.testing.plans import sites_of
from detcoll.topology import Topology
from detcoll.transport import Ticket, TicketKind, TicketStatus

US, MS, S = 10**3, 10**6, 10**9
GUARD_NS = 300 * US


class Post:
    """Carries small messages between ranks; ``delay_ns[i][j]`` from site i to j is what the topology may not know."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.flying: list[tuple[int, int, int, int, int, bytes]] = []
        self.posted: dict[tuple[int, int, int], deque[Ticket]] = {}
        self.number = itertools.count()
        self.lost: set[tuple[int, int]] = set()
        """Source and target of messages that never arrive."""

    def send(self, source: int, target: int, tag: int, record: bytes) -> Ticket:
        ticket = Ticket(TicketKind.SEND, target, tag, len(record), TicketStatus.DONE)
        arrives_ns = self.world.time.now_ns() + self.world.travel_ns(source, target)
        if (source, target) not in self.lost:
            heapq.heappush(self.flying, (arrives_ns, next(self.number), source, target, tag, record))
        return ticket

    def recv(self, rank: int, source: int, tag: int, nbytes: int) -> Ticket:
        ticket = Ticket(TicketKind.RECV, source, tag, nbytes)
        self.posted.setdefault((rank, source, tag), deque()).append(ticket)
        return ticket

    def deliver(self) -> None:
        while self.flying and self.flying[0][0] <= self.world.time.now_ns():
            _, _, source, target, tag, record = heapq.heappop(self.flying)
            ticket = self.posted[target, source, tag].popleft()
            assert len(record) == ticket.nbytes
            ticket.status, ticket.view = TicketStatus.DONE, memoryview(record)
            ticket.ended_ns = self.world.clocks[target].now_ns()
            ticket.context(ticket)


class Mailbox:
    """One rank's endpoint, as far as a timekeeper uses it."""

    def __init__(self, post: Post, rank: int) -> None:
        self.post, self.rank = post, rank

    def send(self, dst: int, tag: int, view: memoryview) -> Ticket:
        return self.post.send(self.rank, dst, tag, bytes(view))

    def recv(self, src: int, tag: int, nbytes: int) -> Ticket:
        return self.post.recv(self.rank, src, tag, nbytes)


class World:
    """Sites of so many ranks, whose clocks start hours apart and drift."""

    def __init__(self, ranks: list[int], drift_ppm: float = 0, queued_ns: float = 0) -> None:
        self.topology: Topology = sites_of(ranks)
        self.time = VirtualTime(10**12)
        self.extra_ns: dict[tuple[int, int], int] = {}
        self.queued_ns, self.rng = queued_ns, np.random.default_rng(3)
        size = self.topology.size
        drifts = [drift_ppm * (-1) ** self.topology.site_of(rank) for rank in range(size)]
        offsets = [self.topology.site_of(rank) * 3_600_123_456_789 for rank in range(size)]
        self.clocks = [
            FakeClock(self.time, offset_ns=offset_ns, drift_ppm=ppm)
            for offset_ns, ppm in zip(offsets, drifts, strict=True)
        ]
        self.slept_ns = [0] * size
        self.post = Post(self)
        domains = [str(self.topology.site_of(rank)) for rank in range(size)]
        self.keepers = [self._keeper(rank, domains) for rank in range(size)]
        for keeper in self.keepers:
            keeper.start_aligning()
            keeper.start()

    def _keeper(self, rank: int, domains: list[str]) -> Timekeeper:
        box: Any = Mailbox(self.post, rank)
        site = self.topology.sites[self.topology.site_of(rank)].ranks
        clock = self.clocks[rank]
        return Timekeeper(
            rank, site, domains, dict.fromkeys(range(self.topology.size), box), Aligning.of(self.topology, rank),
            clock, lambda: clock.now_ns() + self.slept_ns[rank],
        )  # fmt: skip

    def travel_ns(self, source: int, target: int) -> int:
        one, other = self.topology.site_of(source), self.topology.site_of(target)
        queued_ns = int(self.rng.exponential(self.queued_ns)) if self.queued_ns else 0
        return queued_ns + (30 * US if one == other else self.way_ns(one, other))

    def way_ns(self, source: int, destination: int) -> int:
        return self.topology.one_way_ns(source, destination) + self.extra_ns.get((source, destination), 0)

    def suspend(self, rank: int, ns: int) -> None:
        """Stop a rank's clock for a while, and no other."""
        before_ns = self.clocks[rank].now_ns()
        slept_ns = self.clocks[rank].advance(ns) - before_ns
        self.slept_ns[rank] += slept_ns
        self.clocks[rank].step(-slept_ns)

    def run(self, ns: int, look: Callable[[], None] = lambda: None) -> None:
        until_ns = self.time.now_ns() + ns
        while True:
            due = [
                clock.when_ns(at_ns)
                for clock, keeper in zip(self.clocks, self.keepers, strict=True)
                if (at_ns := keeper.next_ns(clock.now_ns())) is not None
            ]
            next_ns = min([*due, *(event[0] for event in self.post.flying[:1])])
            if next_ns > until_ns:
                self.time.advance_to(until_ns)
                return
            self.time.advance_to(next_ns)
            self.post.deliver()
            for clock, keeper in zip(self.clocks, self.keepers, strict=True):
                keeper.turn(clock.now_ns())
            look()

    def apart_ns(self) -> int:
        """Return how far apart arrivals truly are that should meet exactly, at the worst receiver."""
        reads_ns = [
            clock.now_ns() + keeper.offset_ns(clock.now_ns())
            for clock, keeper in zip(self.clocks, self.keepers, strict=True)
        ]
        spreads = []
        for there in range(len(reads_ns)):
            late_ns = [self.extra_ns.get((i, there), 0) - reads_ns[i] for i in range(len(reads_ns)) if i != there]
            spreads.append(max(late_ns) - min(late_ns))
        return max(spreads)

    @property
    def leaders(self) -> list[int]:
        return [site.ranks[0] for site in self.topology.sites]

    def arrivals(self, calendar: Calendar) -> list[list[tuple[int, int, int]]]:
        """Return, for each site, from which site what leaves in windows around now arrives, from when until when."""
        arrivals: list[list[tuple[int, int, int]]] = [[] for _ in self.topology.sites]
        for rank, (clock, keeper) in enumerate(zip(self.clocks, self.keepers, strict=True)):
            here, now_ns = self.topology.site_of(rank), clock.now_ns()
            cycle_ns = calendar.sites[here].cycle_ns
            site_ns = now_ns + keeper.offset_ns(now_ns)
            for window in calendar.windows_of(here, rank):
                opens_ns = clock.when_ns(now_ns - site_ns % cycle_ns + window.start_ns)
                arrives_ns = opens_ns + self.way_ns(here, window.destination)
                arrivals[window.destination].append((here, arrives_ns, arrives_ns + window.end_ns - window.start_ns))
        return arrivals

    def least_gap_ns(self, calendar: Calendar) -> int:
        """Return the least time between what comes from one site and what from another, below 0 where they meet."""
        cycle_ns = calendar.sites[0].cycle_ns
        gaps = []
        for arrivals in self.arrivals(calendar):
            for (one, a, a_end), (other, b, b_end) in itertools.combinations(arrivals, 2):
                if one != other:
                    gaps += [(b - a) % cycle_ns - (a_end - a), (a - b) % cycle_ns - (b_end - b)]
        return min(gaps)


@pytest.fixture(scope="module")
def calendar() -> Calendar:
    return build_calendar(sites_of([1, 1, 1]), Slotting.CALENDAR, error_ns=GUARD_NS)


@pytest.mark.parametrize("drift_ppm", [0, 25])
def test_three_sites_whose_clocks_are_hours_apart_and_drift(calendar: Calendar, drift_ppm: float) -> None:
    world = World([1, 1, 1], drift_ppm, queued_ns=50 * US)
    assert world.least_gap_ns(calendar) < 0, "without alignment they meet"
    world.run(2 * S)
    assert all(keeper.trusted and keeper.aligned for keeper in world.keepers)
    gaps: list[int] = []
    world.run(30 * S, lambda: gaps.append(world.least_gap_ns(calendar)))
    assert min(gaps) > GUARD_NS - 200 * US


def test_delays_that_differ_by_a_millisecond_from_the_topology(calendar: Calendar) -> None:
    world = World([1, 1, 1])
    world.extra_ns = {(0, 1): 2 * MS, (1, 0): 1 * MS, (2, 1): 1 * MS, (1, 2): 1 * MS}
    world.run(3 * S)
    left_ns = world.keepers[0].arrivals_ns
    assert left_ns is not None
    assert abs(left_ns - MS // 3) < 30 * US, "what is unequal there and back goes three ways, and is seen"
    wide = build_calendar(world.topology, Slotting.CALENDAR, error_ns=GUARD_NS + left_ns)
    assert world.least_gap_ns(wide) > GUARD_NS - 50 * US


@settings(max_examples=6, phases=[Phase.generate])
@given(data=st.data(), count=st.integers(3, 5), drift_ppm=st.sampled_from([0, 10, 25, 45]))
def test_arrivals_are_no_further_apart_than_guards_allow_for(data: st.DataObject, count: int, drift_ppm: float) -> None:
    world = World([1] * count, drift_ppm)
    pairs = list(itertools.permutations(range(count), 2))
    errors = data.draw(st.lists(st.integers(-MS // 2, MS // 2), min_size=len(pairs), max_size=len(pairs)))
    world.extra_ns = dict(zip(pairs, errors, strict=True))
    world.run(2 * S)
    untold_ns: list[int] = []

    def look() -> None:
        told = [keeper.arrivals_ns for keeper in world.keepers]
        assert None not in told
        untold_ns.append(world.apart_ns() - max(ns for ns in told if ns is not None))

    world.run(8 * S, look)
    assert max(untold_ns) < ALIGNED_CLOCK_ERROR_NS, "what guards allow for beside what is told"


def test_ranks_of_a_site_keep_its_time(calendar: Calendar) -> None:
    world = World([2, 2, 2], 25)
    world.extra_ns = {(0, 1): 600 * US, (1, 0): 200 * US, (2, 1): 400 * US, (1, 2): 400 * US}
    world.run(6 * S)
    assert abs(world.keepers[2]._loop.correction_ns) > 100 * US  # type: ignore[union-attr]
    pair = build_calendar(world.topology, Slotting.CALENDAR, error_ns=GUARD_NS)
    assert all(keeper.trusted for keeper in world.keepers)
    assert world.least_gap_ns(pair) > GUARD_NS - 250 * US
    for leader in world.leaders:
        now_ns = world.clocks[leader].now_ns()
        apart_ns = world.keepers[leader].offset_ns(now_ns) - world.keepers[leader + 1].offset_ns(now_ns)
        assert abs(apart_ns) < 60 * US


@pytest.mark.parametrize("sleeper", [0, 1])
def test_a_suspended_host_shares_by_rate_until_arrivals_are_aligned_again(calendar: Calendar, sleeper: int) -> None:
    world = World([1, 1, 1], 25)
    world.run(5 * S)
    world.suspend(sleeper, 20 * S + 7 * MS)
    assert world.least_gap_ns(calendar) < 0
    world.run(0)
    assert not world.keepers[sleeper].trusted
    trusted: list[bool] = []

    def look() -> None:
        trusted.append(all(keeper.trusted for keeper in world.keepers))
        if trusted[-1] and len(trusted) > 20:
            assert world.least_gap_ns(calendar) > GUARD_NS - 200 * US, "nobody trusts windows that meet"

    world.run(5 * S, look)
    assert False in trusted
    assert trusted[-1]


def test_ranks_of_a_site_that_lost_the_time_trust_it_no_longer(calendar: Calendar) -> None:
    world = World([1, 2, 1])
    world.run(4 * S)
    assert all(keeper.trusted for keeper in world.keepers)
    loop = world.keepers[1]._loop
    assert loop is not None
    loop.limit_ns = -1
    world.run(S)
    assert not world.keepers[1].trusted
    assert not world.keepers[2].trusted
    assert world.keepers[2].synchronised
    loop.limit_ns = None
    world.run(S)
    assert world.keepers[2].trusted
    world.post.lost.add((1, 2))
    world.run(SILENCE_NS + S)
    assert not world.keepers[2].trusted
    assert world.keepers[1].trusted


@pytest.mark.parametrize("stepped", [0, 2])
@pytest.mark.parametrize(("step_ns", "found_ns"), [(-7 * MS, 3 * S), (7 * MS, 3 * S), (3600 * S, 400 * MS)])
def test_a_clock_that_steps_unseen_is_found_out(calendar: Calendar, stepped: int, step_ns: int, found_ns: int) -> None:
    world = World([1, 1, 1], 25)
    world.run(5 * S)
    world.clocks[stepped].step(step_ns)
    world.slept_ns[stepped] -= step_ns
    world.run(found_ns)
    moved_ns: list[int] = []

    def look() -> None:
        if all(keeper.trusted for keeper in world.keepers):
            assert world.least_gap_ns(calendar) > GUARD_NS - 200 * US
            moved_ns.append(max(abs(keeper._loop.correction_ns) for keeper in world.keepers if keeper._loop))

    world.run(8 * S, look)
    assert moved_ns
    assert moved_ns[-1] < 100 * US, "a step is followed by asking anew, not by corrections"


def test_ranks_whose_sites_tell_of_different_clocks_get_windows_all_the_same(monkeypatch) -> None:
    monkeypatch.setattr(opening, "clock_domain", lambda: str(int(threading.current_thread().name.split()[-1]) // 2))

    def total(comm: Communicator) -> tuple[bool, int, float]:
        x = np.full(100_000, comm.rank + 1, np.float32)
        for _ in range(3):
            x[:] = comm.rank + 1
            comm.all_reduce(x)
        return comm.calendar.has_windows, comm.calendar.guard_ns, float(x.sum())

    answers = run_ranks(6, total, topology=lines(2, 2, 2), environ={"DETCOLL_SLOTTING": "calendar"})
    for has_windows, guard_ns, summed in answers:
        assert has_windows
        assert 500_000 <= guard_ns <= 1_500_000
        assert summed == 21 * 100_000
