"""Calendars of more than two sites: departures of a sender and arrivals at a receiver one after another."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detcoll.errors import PlanError
from detcoll.machine import Queued, Slots
from detcoll.plan import Calendar, Collective, Slotting, build_calendar, check, check_calendar, choose_chunk
from detcoll.plan.alignment import CALL_NS, LARGEST_GUARD_SHARE, LATE_NS, Alignment, align, call_ends_ns
from detcoll.plan.calendar import LAID_OUT, SiteCycle, SlotWindow
from detcoll.plan.packing import Departure, Rough, in_cells, stretch
from detcoll.sim import simulate
from detcoll.testing.plans import all_parts, sites_of
from detcoll.topology import Link, Topology

MS = 1_000_000
FOUR = sites_of([2, 2, 2, 2])
ALIGNED = build_calendar(FOUR, slot_ns=10 * MS)


def apart(sites: int, delays_ns: list[int], asymmetry_ns: int = 0, rates: tuple[float, ...] = (1e8,)) -> Topology:
    """Return sites of one rank whose delays and rates are taken in turn."""
    even = sites_of([1] * sites)
    links = tuple(
        (pair, Link(delays_ns[index % len(delays_ns)], asymmetry_ns)) for index, (pair, _) in enumerate(even.links)
    )
    made = tuple(replace(site, uplink_bytes_per_s=rates[i % len(rates)]) for i, site in enumerate(even.sites))
    return replace(even, sites=made, links=links)


def check_guards(calendar: Calendar) -> None:
    for cycle in calendar.sites:
        assert len(cycle.windows) * calendar.guard_ns <= LARGEST_GUARD_SHARE * cycle.cycle_ns


@settings(max_examples=60)
@given(
    sites=st.integers(3, 12),
    one_way_ns=st.integers(0, 300 * MS),
    rates=st.lists(st.floats(1e6, 1e9), min_size=1, max_size=4),
    error_ns=st.integers(0, 400_000),
)
def test_equal_distances_need_no_solver_and_no_slack(
    sites: int, one_way_ns: int, rates: list[float], error_ns: int
) -> None:
    topology = apart(sites, [one_way_ns], rates=tuple(rates))
    calendar = build_calendar(topology, error_ns=error_ns)
    check_calendar(calendar, topology)
    check_guards(calendar)
    longest_ns = max(window.end_ns - window.start_ns for cycle in calendar.sites for window in cycle.windows)
    assert calendar.sites[0].cycle_ns == (sites - 1) * (longest_ns + error_ns)


@settings(max_examples=3)
@given(
    sites=st.integers(3, 5),
    delays_ns=st.lists(st.integers(2 * MS, 60 * MS), min_size=3, max_size=5, unique=True),
    asymmetry_ns=st.integers(-3 * MS, 3 * MS),
    rates=st.sampled_from([(1e8,), (1e8, 4e7), (1e9, 2e8, 1e8)]),
)
def test_unequal_distances_and_rates_are_solved(
    sites: int, delays_ns: list[int], asymmetry_ns: int, rates: tuple[float, ...]
) -> None:
    topology = apart(sites, delays_ns, asymmetry_ns, rates)
    calendar = build_calendar(topology, seconds=1)
    check_calendar(calendar, topology)
    check_guards(calendar)
    carried_bytes = [
        sum(window.end_ns - window.start_ns for window in calendar.windows_to(i, i, j))
        * calendar.rate_bytes_per_s(i, j)
        / 1e9
        for i in range(sites)
        for j in range(sites)
        if i != j
    ]
    slowest = min(rate for rate in calendar.rates if rate)
    assert min(carried_bytes) > 0.5 * slowest * calendar.sites[0].cycle_ns / 1e9 / (sites - 1)
    collective = Collective("all_reduce", 4000, 4, 4)
    check(all_parts(collective, topology, "direct", choose_chunk(topology, calendar, collective)), topology, calendar)


def test_stretching_finds_the_best_times_for_an_order() -> None:
    # Two senders to one receiver and back; delays differ by 3 ms, and nothing else stands in the way.
    delays = [[0, 0, 7 * MS], [0, 0, 4 * MS], [7 * MS, 4 * MS, 0]]
    weights = {(0, 2): 1.0, (1, 2): 3.0}
    rough = Rough(10, ((0, 2, 0), (1, 2, 8)), {(0, 2): 7, (1, 2): 4})
    found = stretch(rough, 10 * MS, delays, weights, 100_000, 300_000, MS)
    assert found is not None
    lengths = {each.source: each.length_ns for each in found}
    # 10 ms less two guards of 0.1 ms and two losses of 0.3 ms are shared one to three.
    assert lengths[0] == pytest.approx(9.2 * MS / 4 + 300_000, abs=2_000)
    assert lengths[1] == pytest.approx(9.2 * MS * 3 / 4 + 300_000, abs=2_000)
    arrivals = sorted((each.start_ns + delays[each.source][2]) % (10 * MS) for each in found)
    assert arrivals[1] - arrivals[0] in (lengths[0] + 100_010, lengths[1] + 100_010) or arrivals == []
    assert stretch(rough, 2 * MS, delays, weights, 100_000, 300_000, MS) is None


def test_cells_are_given_once_and_in_few_runs() -> None:
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    shifts = {pair: 3 + 5 * index for index, pair in enumerate(pairs)}
    rough = in_cells(shifts, dict.fromkeys(pairs, 4), 10, 2, 2, 10, 0)
    assert rough is not None
    assert all(1 <= sum(start[:2] == pair for start in rough.starts) <= 2 for pair in pairs)
    assert in_cells(shifts, dict.fromkeys(pairs, 6), 10, 2, 2, 10, 0) is None


def test_a_call_ends_sooner_the_more_fits_and_the_shorter_turns_are() -> None:
    weights = {(0, 1): 10.0, (0, 2): 10.0}

    def ends_ns(*windows: tuple[int, int, int]) -> float:
        found = Alignment(20 * MS, tuple(Departure(0, to, start, length) for to, start, length in windows))
        return call_ends_ns(found, weights, 20.0)

    whole = ends_ns((1, 0, 10 * MS), (2, 10 * MS, 10 * MS))
    assert whole == pytest.approx(CALL_NS * 10 / (10 - LATE_NS / MS) + 20 * MS)
    assert ends_ns((1, 0, 9 * MS), (2, 10 * MS, 10 * MS)) > whole
    halves = ends_ns(*((to, start * MS, 5 * MS) for to, start in ((1, 0), (2, 5), (1, 10), (2, 15))))
    assert halves == pytest.approx(CALL_NS * 10 / (10 - 2 * LATE_NS / MS) + 10 * MS)


def test_without_the_solver_only_equal_distances_have_a_calendar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    slots = [[5 * MS] * 3 for _ in range(3)]
    assert len(align([[7 * MS] * 3 for _ in range(3)], slots, 0).departures) == 6
    with pytest.raises(PlanError, match=r"pip install .*\[calendar\]"):
        align([[0, 1, 2], [3, 0, 4], [5, 6, 0]], slots, 0)


def moved(site: int, index: int, by_ns: int) -> Calendar:
    sites = list(ALIGNED.sites)
    windows = list(sites[site].windows)
    window = windows[index]
    windows[index] = replace(window, start_ns=window.start_ns + by_ns, end_ns=window.end_ns + by_ns)
    sites[site] = SiteCycle(sites[site].cycle_ns, tuple(windows))
    return replace(ALIGNED, sites=tuple(sites))


def test_a_departure_that_is_shifted_is_found() -> None:
    check_calendar(ALIGNED, FOUR)
    with pytest.raises(PlanError, match=r"site 's1': .* collide; the guard is 100000 ns"):
        check_calendar(moved(1, 0, 1), FOUR)


def test_arrivals_that_meet_are_found() -> None:
    sites = [SiteCycle(cycle.cycle_ns, cycle.windows) for cycle in ALIGNED.sites]
    ahead = [replace(w, start_ns=w.start_ns, destination=d.destination)
             for w, d in zip(sites[2].windows, [*sites[2].windows[1:], sites[2].windows[0]], strict=True)]  # fmt: skip
    sites[2] = SiteCycle(sites[2].cycle_ns, tuple(ahead))
    with pytest.raises(PlanError, match="arrivals at site"):
        check_calendar(replace(ALIGNED, sites=tuple(sites)), FOUR)
    further = replace(FOUR, links=(((0, 1), Link(FOUR.links[0][1].one_way_ns + 1)), *FOUR.links[1:]))
    with pytest.raises(PlanError, match=r"arrivals at site 's[01]'"):
        check_calendar(ALIGNED, further)


def test_a_pair_without_a_window_and_rates_that_are_too_high_are_found() -> None:
    sites = [SiteCycle(ALIGNED.sites[0].cycle_ns, ALIGNED.sites[0].windows[1:]), *ALIGNED.sites[1:]]
    with pytest.raises(PlanError, match="site 's0' has no window of its own to site 's1'"):
        check_calendar(replace(ALIGNED, sites=tuple(sites)), FOUR)
    with pytest.raises(PlanError, match="uplink of 100000000 bytes/s would carry"):
        check_calendar(replace(ALIGNED, rates=tuple(rate * 1.02 for rate in ALIGNED.rates)), FOUR)


def test_ranks_share_the_windows_of_their_site_by_rate() -> None:
    assert ALIGNED.rate_bytes_per_s(0, 1) == pytest.approx(1e8 * FOUR.payload_share * LAID_OUT / 2)
    assert ALIGNED.windows_of(0, 0) == ALIGNED.windows_of(0, 1) == ALIGNED.sites[0].windows
    assert ALIGNED.windows_to(0, 0, 2) == (SlotWindow(-1, 10 * MS, 20 * MS - 100_000, 2),)


def test_each_rank_of_a_site_has_the_same_part_of_its_windows_however_many_peers_it_has() -> None:
    topology = sites_of([1, 2, 3])
    calendar = build_calendar(topology)
    check_calendar(calendar, topology)
    line = 1e8 * topology.payload_share * LAID_OUT
    for source, ranks in enumerate((1, 2, 3)):
        for destination in {0, 1, 2} - {source}:
            assert calendar.rate_bytes_per_s(source, destination) == pytest.approx(line / ranks)


def test_sends_wait_for_windows_of_their_destination_and_not_for_each_other() -> None:
    line: Slots[int] = Slots(ALIGNED, 0, 0)
    for number in range(12):
        line.add(Queued(number, 1, 2, 200_000))  # takes 4 ms, so the first window has no room for all of them
    line.add(Queued(12, 3, 6, 1000))
    given_out = [(send.item, window.not_before_ns) for send, window in line.due(0) if window is not None]
    assert given_out == [(0, 0), (1, 0), (2, 0), (12, 20 * MS)]
    assert line.next_ns(0) == 10 * MS - 100_000
    line.add(Queued(13, 2, 4, 1000))
    late = [(send.item, window) for send, window in line.due(15 * MS) if window is not None]
    assert [(item, window.not_before_ns) for item, window in late] == [(3, 30 * MS), (4, 30 * MS), (5, 30 * MS),
                                                                       (13, 10 * MS)]  # fmt: skip


def test_a_window_may_run_over_the_end_of_the_cycle() -> None:
    windows = (SlotWindow(-1, 15 * MS, 24 * MS, 1), SlotWindow(-1, 5 * MS, 14 * MS, 2))
    calendar = Calendar(Slotting.CALENDAR, (SiteCycle(20 * MS, windows),) * 3, (1e8,) * 9)
    line: Slots[int] = Slots(calendar, 0, 0)
    line.add(Queued(0, 1, 1, 1000))
    ((_, window),) = line.due(21 * MS)
    assert window is not None
    assert (window.not_before_ns, window.not_after_ns) == (15 * MS, 24 * MS)


@pytest.mark.parametrize(
    "topology", [sites_of([1] * 4), sites_of([2] * 3), sites_of([1, 3, 2]), apart(3, [5 * MS, 11 * MS, 38 * MS])]
)
def test_everything_leaves_in_its_window_and_downlinks_hardly_queue(topology: Topology) -> None:
    collective = Collective("all_reduce", 2_000_000, 4, 4)
    peaks = {}
    for mode in (Slotting.CALENDAR, Slotting.OFF):
        calendar = build_calendar(topology, mode, seconds=1)
        parts = all_parts(collective, topology, "direct", choose_chunk(topology, calendar, collective))
        result = simulate(parts, topology, calendar, phase_ns=13 * MS)
        peaks[mode] = max(result.downlink_peak_bytes)
        if mode is Slotting.CALENDAR:
            assert result.window_share == 1.0
            assert sum(result.misses) == 0
    assert peaks[Slotting.CALENDAR] <= 40_000
    assert peaks[Slotting.OFF] > 2 * peaks[Slotting.CALENDAR]


def test_a_plan_is_proved_with_its_calendar() -> None:
    collective = Collective("all_reduce", 4000, 4, 4)
    calendar = build_calendar(FOUR)
    chunk = choose_chunk(FOUR, calendar, collective)
    check(all_parts(collective, FOUR, "direct", chunk), FOUR, calendar)
