from __future__ import annotations

from dataclasses import replace
from math import gcd

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detcoll.errors import PlanError, UsageError
from detcoll.plan import Calendar, Slotting, build_calendar, check_calendar
from detcoll.plan.calendar import LAID_OUT, SMALLEST_SLOT_BYTES, SiteCycle, SlotWindow, flows_between
from detcoll.plan.layout import ChunkSize, chunks
from detcoll.testing.plans import sites_of
from detcoll.topology import Topology

TOPOLOGY = sites_of([2, 3])


@settings(max_examples=150)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    up=st.floats(1e4, 1e10),
    down=st.floats(1e4, 1e10),
    mode=st.sampled_from(list(Slotting)),
)
def test_every_calendar_proves_itself(ranks: list[int], up: float, down: float, mode: Slotting) -> None:
    topology = sites_of(ranks, up, downlink_bytes_per_s=down)
    check_calendar(build_calendar(topology, mode), topology)


def test_between_two_sites_the_slot_never_closes_and_ranks_share_it_by_rate() -> None:
    calendar = build_calendar(TOPOLOGY)
    assert calendar.mode is Slotting.CALENDAR
    assert not calendar.has_windows
    line = 1e8 * TOPOLOGY.payload_share * LAID_OUT
    assert calendar.rates == pytest.approx((0.0, line / 4, line / 4, 0.0))


def test_ranks_take_turns_with_a_guard_between() -> None:
    calendar = build_calendar(TOPOLOGY, Slotting.TURNS, slot_ns=10_000_000, error_ns=100_000)
    assert calendar.mode is Slotting.TURNS
    assert calendar.sites[1].cycle_ns == 30_000_000
    assert calendar.windows_of(1, 3) == (SlotWindow(3, 10_000_000, 19_900_000),)
    assert calendar.rate_bytes_per_s(0, 1) == pytest.approx(1e8 * TOPOLOGY.payload_share * LAID_OUT)


def test_a_lone_rank_has_no_windows() -> None:
    calendar = build_calendar(sites_of([1, 1]), Slotting.TURNS)
    assert calendar.sites[0].windows == ()


def test_a_lone_rank_with_several_peers_shares_its_line_among_them() -> None:
    topology = sites_of([1, 3])
    calendar = build_calendar(topology, Slotting.TURNS)
    line = 1e8 * topology.payload_share * LAID_OUT
    assert calendar.rate_bytes_per_s(0, 1) == pytest.approx(line / 3)
    assert calendar.rate_bytes_per_s(1, 0) == pytest.approx(line)
    check_calendar(calendar, topology)


def test_guards_cost_two_percent_at_most() -> None:
    calendar = build_calendar(TOPOLOGY, Slotting.TURNS, error_ns=1_000_000)
    used = sum(window.end_ns - window.start_ns for window in calendar.sites[0].windows)
    assert used / calendar.sites[0].cycle_ns >= 0.98
    with pytest.raises(PlanError, match=r"slot_ns=1000000 is too short for errors of 100000 ns.*10.0%"):
        build_calendar(TOPOLOGY, Slotting.TURNS, slot_ns=1_000_000, error_ns=100_000)


def test_slots_grow_on_slow_lines() -> None:
    slow = build_calendar(sites_of([2, 2], 1e6), Slotting.TURNS)
    window = slow.windows_of(0, 0)[0]
    assert (window.end_ns - window.start_ns) / 1e9 * slow.rate_bytes_per_s(0, 1) >= SMALLEST_SLOT_BYTES * 0.98


def test_turns_of_more_sites_share_and_a_mere_grouping_has_no_rates() -> None:
    assert build_calendar(sites_of([2, 2, 2]), Slotting.TURNS).mode is Slotting.SHARE
    cluster = build_calendar(TOPOLOGY.as_single_cluster())
    assert cluster.mode is Slotting.OFF
    assert not any(cluster.rates)
    assert build_calendar(Topology.single_site(3)).mode is Slotting.OFF


@given(here=st.integers(1, 9), there=st.integers(1, 9))
def test_flows_between_counts_the_pairs_that_share_a_piece(here: int, there: int) -> None:
    topology = sites_of([here, there])
    pairs = {chunk.owners for chunk in chunks(topology, here * there * 16, ChunkSize(10**9, 1))}
    assert flows_between(topology, 0, 1) == len(pairs) == here + there - gcd(here, there)


def altered(index: int, cycle: SiteCycle) -> Calendar:
    calendar = build_calendar(TOPOLOGY, Slotting.TURNS, slot_ns=10_000_000, error_ns=100_000)
    sites = list(calendar.sites)
    sites[index] = cycle
    return replace(calendar, sites=tuple(sites))


@pytest.mark.parametrize(
    ("windows", "said"),
    [
        (((0, 0, 10_500_000), (1, 10_000_000, 19_900_000)), "collide"),
        (((0, 0, 10_000_000), (1, 10_000_000, 19_900_000)), "collide; the guard is 100000 ns"),
        (((0, 0, 9_900_000), (1, 10_000_000, 20_000_000)), "collide"),
        (((0, 0, 9_900_000),), r"ranks \[1\] own no window"),
        (((0, 0, 9_900_000), (1, 10_000_000, 20_100_000)), "does not lie in its cycle"),
        (((0, 5, 5), (1, 10_000_000, 19_900_000)), "does not lie in its cycle"),
    ],
)
def test_bad_windows_are_found(windows: tuple[tuple[int, int, int], ...], said: str) -> None:
    cycle = SiteCycle(20_000_000, tuple(SlotWindow(*window) for window in windows))
    with pytest.raises(PlanError, match=rf"site 's0': .*{said}"):
        check_calendar(altered(0, cycle), TOPOLOGY)


def test_one_owner_needs_no_guard_between_its_own_windows() -> None:
    windows = (SlotWindow(0, 0, 5_000_000), SlotWindow(0, 5_000_000, 9_900_000), SlotWindow(1, 10_000_000, 19_900_000))
    check_calendar(altered(0, SiteCycle(20_000_000, windows)), TOPOLOGY)


def test_overcommitted_uplinks_and_downlinks_are_found() -> None:
    calendar = build_calendar(TOPOLOGY)
    with pytest.raises(PlanError, match="site 's0': its uplink of 100000000 bytes/s would carry"):
        check_calendar(replace(calendar, rates=tuple(rate * 1.02 for rate in calendar.rates)), TOPOLOGY)
    narrow = sites_of([2, 3], 1e8, downlink_bytes_per_s=5e7)
    with pytest.raises(PlanError, match="its downlink of 50000000"):
        check_calendar(calendar, narrow)


def test_overcommitted_shares_are_found() -> None:
    topology = sites_of([2, 2, 2])
    calendar = build_calendar(topology)
    with pytest.raises(PlanError, match="uplink"):
        check_calendar(replace(calendar, rates=tuple(rate * 1.02 for rate in calendar.rates)), topology)
    whole = build_calendar(sites_of([2, 1]), Slotting.TURNS)
    with pytest.raises(PlanError, match="would carry 198"):  # full rate to each of two peers at once
        check_calendar(replace(whole, rates=(0.0, whole.rates[1], whole.rates[1], 0.0)), sites_of([2, 1]))


def test_equal_calendars_have_equal_digests() -> None:
    digest = build_calendar(TOPOLOGY, Slotting.TURNS).digest
    assert digest == build_calendar(sites_of([2, 3]), Slotting.TURNS).digest
    assert digest != build_calendar(sites_of([3, 2]), Slotting.TURNS).digest


def test_modes_are_parsed() -> None:
    assert Slotting.parse("share") is Slotting.SHARE
    with pytest.raises(UsageError, match="slotting='never' must be one of calendar, turns, share, off"):
        Slotting.parse("never")


@pytest.mark.parametrize("sites", [2, 4, 8])
@pytest.mark.parametrize("line_bytes_per_s", [1.25e6, 6.25e6, 31.25e6, 1.25e9])
def test_a_line_has_room_for_what_acknowledges_the_other_direction(sites: int, line_bytes_per_s: float) -> None:
    topology = Topology.uniform(sites, 1, line_bytes_per_s, 10_000_000)
    calendar = build_calendar(topology, Slotting.SHARE)
    flow_bytes_per_s = calendar.rate_bytes_per_s(0, 1)
    payload_bytes = topology.mtu_bytes * topology.payload_share
    burst_segments = max(2, int(flow_bytes_per_s / 1024 / payload_bytes))
    acknowledged = flow_bytes_per_s / payload_bytes / burst_segments * 52
    wire = (flow_bytes_per_s / topology.payload_share + acknowledged) * (sites - 1)
    assert 0.98 * line_bytes_per_s < wire <= 0.9951 * line_bytes_per_s
