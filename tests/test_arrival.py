"""The arrival loop: sites whose readings of time and whose delays are wrong, in virtual time."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detcoll.clock import MARK_BYTES, ArrivalLoop
from detcoll.errors import FrameError, UsageError

US, MS, S = 10**3, 10**6, 10**9
WAY_NS = 10 * MS


class Sites:
    """Loops whose marks take ``WAY_NS`` and what is wrong with it; site i reads ``wrong_ns[i]`` more than the time."""

    def __init__(self, wrong_ns: list[int], extra_ns: list[list[int]], queued_ns: float = 0, lose: float = 0) -> None:
        self.count, self.wrong_ns, self.extra_ns = len(wrong_ns), wrong_ns, extra_ns
        self.loops = [ArrivalLoop({j: WAY_NS for j in range(self.count) if j != i}) for i in range(self.count)]
        self.now_ns, self._queued_ns, self._lose = 0, queued_ns, lose
        self._rng = np.random.default_rng(5)
        self._flying: list[tuple[int, int, int, int, bytes]] = []
        self.sent = 0

    def run(self, until_ns: int, look: Callable[[], None] = lambda: None) -> None:
        """Let marks travel until a time, and look after each event."""
        while True:
            due_ns = min(loop.next_ns(self.now_ns) for loop in self.loops)
            next_ns = min([due_ns, *(event[0] for event in self._flying[:1])])
            if next_ns > until_ns:
                self.now_ns = until_ns
                return
            self.now_ns = next_ns
            while self._flying and self._flying[0][0] <= next_ns:
                _, _, source, site, mark = heapq.heappop(self._flying)
                self.loops[site].handle_mark(source, mark, next_ns + self.wrong_ns[site])
            for site, loop in enumerate(self.loops):
                if loop.turn(next_ns):
                    self._depart(site)
            look()

    def _depart(self, site: int) -> None:
        for other in range(self.count):
            if other == site:
                continue
            mark = self.loops[site].make_mark(other, self.now_ns + self.wrong_ns[site])
            assert len(mark) == MARK_BYTES
            self.sent += 1
            if self._rng.random() >= self._lose:
                late_ns = int(self._rng.exponential(self._queued_ns)) if self._queued_ns else 0
                arrives_ns = self.now_ns + WAY_NS + self.extra_ns[site][other] + late_ns
                heapq.heappush(self._flying, (arrives_ns, self.sent, site, other, mark))

    def apart_ns(self) -> int:
        """Return how far apart arrivals truly are that should meet exactly, at the worst receiver."""
        sites = range(self.count)
        late = [
            [self.extra_ns[i][j] - self.wrong_ns[i] - self.loops[i].correction_ns for i in sites if i != j]
            for j in sites
        ]
        return max(max(of_one) - min(of_one) for of_one in late)


def right(count: int) -> list[list[int]]:
    return [[0] * count for _ in range(count)]


def least_squares_ns(sites: Sites) -> float:
    """Return what the best corrections would leave, by solving for them and for one free arrival a receiver."""
    pairs = [(i, j) for i in range(sites.count) for j in range(sites.count) if i != j]
    rows = np.zeros((len(pairs), 2 * sites.count))
    late = np.zeros(len(pairs))
    for row, (i, j) in enumerate(pairs):
        rows[row, i] = rows[row, sites.count + j] = 1
        late[row] = sites.extra_ns[i][j] - sites.wrong_ns[i]
    left = late - rows @ np.linalg.lstsq(rows, late, rcond=None)[0]
    return max(np.ptp([left[row] for row, pair in enumerate(pairs) if pair[1] == j]) for j in range(sites.count))


def test_what_all_arrivals_at_a_receiver_have_in_common_needs_no_correction() -> None:
    extra_ns = right(4)
    for site in range(3):
        extra_ns[site][3] = 5 * MS
    sites = Sites([0] * 4, extra_ns)
    sites.run(2 * S)
    assert all(abs(loop.correction_ns) < 2 * US for loop in sites.loops)
    assert sites.loops[0].error_ns == 0


def test_an_access_line_that_is_longer_both_ways_is_mended() -> None:
    extra_ns = right(4)
    for site in range(3):
        extra_ns[site][3] = extra_ns[3][site] = 2 * MS
    sites = Sites([0] * 4, extra_ns)
    assert sites.apart_ns() == 2 * MS
    sites.run(2 * S)
    assert sites.apart_ns() < 20 * US


def test_of_three_sites_one_link_that_is_longer_both_ways_is_mended() -> None:
    extra_ns = right(3)
    extra_ns[0][1] = extra_ns[1][0] = MS
    sites = Sites([0] * 3, extra_ns)
    sites.run(2 * S)
    assert sites.apart_ns() < 20 * US


@settings(max_examples=15)
@given(data=st.data(), count=st.integers(3, 8))
def test_any_start_ends_at_what_least_squares_leaves(data: st.DataObject, count: int) -> None:
    wrong_ns = data.draw(st.lists(st.integers(-20 * MS, 20 * MS), min_size=count, max_size=count))
    errors = st.lists(st.integers(-MS, MS), min_size=count, max_size=count)
    sites = Sites(wrong_ns, data.draw(st.lists(errors, min_size=count, max_size=count)))
    sites.run(5 * S)
    best_ns = least_squares_ns(sites)
    assert abs(sites.apart_ns() - best_ns) < 20 * US
    assert all(loop.settled and loop.all_settled for loop in sites.loops)
    assert all(abs((loop.error_ns or 0) - best_ns) < 40 * US for loop in sites.loops)


def test_queues_and_losses_do_not_move_what_has_settled() -> None:
    sites = Sites([3 * MS, -2 * MS, 0, MS], right(4), queued_ns=300 * US, lose=0.2)
    sites.run(10 * S)
    seen: list[int] = []
    sites.run(120 * S, lambda: seen.append(sites.apart_ns()))
    assert max(seen) < 300 * US
    assert np.median(seen) < 100 * US


def test_marks_come_in_a_burst_then_at_an_interval() -> None:
    sites = Sites([MS, 0, 0], right(3))
    sites.run(3 * S)
    before = sites.sent
    sites.run(13 * S)
    assert sites.sent - before == 6 * 40
    assert 100 < before < 6 * 100


def test_a_step_counts_from_the_new_epoch_on() -> None:
    sites = Sites([0, 0, 0], right(3))
    sites.run(3 * S)
    assert all(loop.holds for loop in sites.loops)
    sites.wrong_ns[1] += 7 * S
    sites.loops[1].restart()
    assert not sites.loops[1].holds
    moved: list[int] = []
    sites.run(3 * S + 500 * MS, lambda: moved.append(max(abs(loop.correction_ns) for loop in sites.loops)))
    assert not sites.loops[0].holds or sites.apart_ns() < 7 * S
    sites.run(8 * S)
    assert sites.apart_ns() < 20 * US
    assert all(loop.holds for loop in sites.loops)


def test_windows_are_not_trusted_where_arrivals_are_too_far_apart() -> None:
    extra_ns = right(3)
    extra_ns[0][1] = 3 * MS
    sites = Sites([0] * 3, extra_ns)
    sites.run(3 * S)
    assert all(loop.holds for loop in sites.loops)
    assert abs((sites.loops[2].error_ns or 0) - MS) < 20 * US, "two sixths of what is wrong stay at each receiver"
    for loop in sites.loops:
        loop.limit_ns = 900 * US
    assert not any(loop.holds for loop in sites.loops)
    extra_ns[0][1] = 0
    sites.run(10 * S)
    assert all(loop.holds for loop in sites.loops)


def test_nothing_is_wanted_or_known_before_enough_marks_have_come() -> None:
    loop, silent = ArrivalLoop({1: WAY_NS, 2: WAY_NS}), ArrivalLoop({0: WAY_NS, 2: WAY_NS})
    for _ in range(9):
        loop.handle_mark(1, silent.make_mark(0, 0), WAY_NS)
        loop.turn(0)
    assert loop.error_ns is None
    assert not loop.settled


def test_arguments_are_checked() -> None:
    loop = ArrivalLoop({1: 0, 2: 0})
    with pytest.raises(FrameError, match="no mark"):
        loop.handle_mark(1, b"x" * MARK_BYTES, 0)
    for wrong in ({"gain": 0.0}, {"settle": 17}, {"burst": 0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            ArrivalLoop({1: 0, 2: 0}, **wrong)
    with pytest.raises(UsageError, match="delays_ns"):
        ArrivalLoop({1: 0})


def of_three() -> list[ArrivalLoop]:
    return [ArrivalLoop({j: WAY_NS for j in range(3) if j != i}) for i in range(3)]


def tell_all(loops: list[ArrivalLoop], late_ns: int = 0, rounds: int = 9) -> None:
    """Let all hear from all, what site 0 sends being late."""
    for _ in range(rounds):
        for i, j in ((i, j) for i in range(3) for j in range(3) if i != j):
            loops[j].handle_mark(i, loops[i].make_mark(j, 0), WAY_NS + (0 if i else late_ns))


def test_marks_that_left_before_their_sender_heard_of_a_restart_do_not_count() -> None:
    loops = of_three()
    tell_all(loops)
    assert loops[0].error_ns == 0
    early = [(site, loops[site].make_mark(0, 0)) for site in (1, 2)]
    loops[0].restart()
    for site, mark in early * 9:
        loops[0].handle_mark(site, mark, 7 * S)
    assert loops[0].error_ns is None
    tell_all(loops)
    assert loops[0].error_ns == 0


def test_what_was_seen_before_a_restart_counts_no_more() -> None:
    loops = of_three()
    tell_all(loops, late_ns=-5 * MS)
    assert loops[1].error_ns == 5 * MS
    loops[0].restart()
    tell_all(loops)
    assert loops[1].error_ns == 0


def test_a_site_that_is_asked_to_move_far_has_not_settled_any_more() -> None:
    loops = of_three()
    tell_all(loops)
    assert loops[0].turn(0)
    assert loops[0].holds
    tell_all(loops, late_ns=-5 * MS)
    assert loops[0].turn(S)
    assert not loops[0].holds
    assert loops[0].next_ns(S) == S + 20 * MS


def settled() -> list[ArrivalLoop]:
    """Return three loops that have settled and whose windows of marks are full."""
    loops = of_three()
    tell_all(loops, rounds=20)
    assert all(loop.turn(0) for loop in loops)
    return loops


def test_a_mark_that_comes_far_too_early_tells_both_ends_of_a_step() -> None:
    loops = settled()
    assert loops[1].handle_mark(0, loops[0].make_mark(1, 0), WAY_NS - 5 * MS)
    assert loops[0].handle_mark(1, loops[1].make_mark(0, 0), WAY_NS), "which of the two has stepped, neither knows"
    loops[0].restart()
    loops[1].handle_mark(0, loops[0].make_mark(1, 0), WAY_NS)
    assert not loops[0].handle_mark(1, loops[1].make_mark(0, 0), WAY_NS)


def test_marks_that_are_far_later_tell_of_a_step_once_they_are_half_a_window() -> None:
    loops = settled()
    jumped = [loops[1].handle_mark(0, loops[0].make_mark(1, 0), WAY_NS + 5 * MS) for _ in range(12)]
    assert jumped == [False] * 7 + [True] + [False] * 4
    assert loops[1].error_ns == 5 * MS, "what came before counts no more"


def test_marks_that_are_far_later_now_and_then_tell_of_nothing() -> None:
    loops = settled()
    for round_ in range(40):
        late_ns = 5 * MS if round_ % 7 else 0
        assert not loops[1].handle_mark(0, loops[0].make_mark(1, 0), WAY_NS + late_ns)
    assert loops[1].error_ns == 0


def test_a_receiver_of_arrivals_far_apart_settles_only_when_its_burst_is_over() -> None:
    extra_ns = right(3)
    extra_ns[0][1] = 6 * MS
    sites = Sites([0] * 3, extra_ns)
    sites.run(1500 * MS)
    assert sites.apart_ns() == pytest.approx(2 * MS, abs=20 * US)
    assert not any(loop.settled for loop in sites.loops)
    sites.run(3 * S)
    assert all(loop.all_settled for loop in sites.loops)
