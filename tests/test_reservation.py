"""What sites ask of a carrier: packets carry the rates, gates cover the windows."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detcoll.errors import UsageError
from detcoll.plan import Calendar, Slotting, build_calendar
from detcoll.plan.calendar import LAID_OUT, SiteCycle, SlotWindow, laid_out
from detcoll.plan.reservation import CLOSED, OPEN, GateEntry, reserve
from detcoll.testing.plans import sites_of
from detcoll.topology import Topology

MS = 1_000_000


@settings(max_examples=60)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    uplink=st.sampled_from([1.25e7, 1.25e8, 1e11]),
    mode=st.sampled_from([Slotting.CALENDAR, Slotting.TURNS, Slotting.SHARE]),
)
def test_packets_carry_the_rates_and_rates_sum_to_the_line(ranks: list[int], uplink: float, mode: Slotting) -> None:
    topology = sites_of(ranks, uplink)
    calendar = build_calendar(topology, mode)
    windowed = calendar.has_windows
    for asked in reserve(topology, calendar):
        line_payload = uplink * topology.payload_share * LAID_OUT
        slowest = min(rate for rate in calendar.rates if rate > 0) / LAID_OUT
        total = sum(flow.payload_bytes_per_s for flow in asked.flows)
        # Sites of more ranks than others leave some of the line; guards leave some of the cycle.
        assert total <= line_payload * (1 + 1e-9)
        if len(set(ranks)) == 1:
            given = line_payload * laid_out(topology, slowest) / LAID_OUT
            assert total >= given * (0.97 if windowed else 1 - 1e-9)
        assert len(asked.flows) == len(ranks) - 1
        for flow in asked.flows:
            spec = flow.specification
            carried = spec.max_packets_per_interval * (topology.mtu_bytes - 52) / spec.interval_ns * 1e9
            one_packet = (topology.mtu_bytes - 52) / spec.interval_ns * 1e9
            assert flow.payload_bytes_per_s <= carried * (1 + 1e-9)
            assert carried - flow.payload_bytes_per_s <= one_packet * (1 + 1e-6)
        whole = asked.specification
        assert whole.max_payload_size_bytes == 1480
        assert whole.wire_bytes_per_s == pytest.approx(uplink, abs=1500 / whole.interval_ns * 1e9)


def test_headers_count() -> None:
    topology = Topology.uniform(2, 1, 1.25e8, 5 * MS)
    [asked, _] = reserve(topology, build_calendar(topology))
    [flow] = asked.flows
    assert flow.destination == "site1"
    assert flow.payload_bytes_per_s == pytest.approx(1.25e8 * 0.99 * 1448 / 1500)
    # 12 ms of 119.46 MB/s in segments of 1448 bytes
    assert flow.specification.interval_ns == 12 * MS
    assert flow.specification.max_packets_per_interval == 990
    assert flow.specification.wire_bytes_per_s == pytest.approx(990 * 1500 / 0.012)
    assert asked.specification.max_packets_per_interval == 1000


@pytest.mark.parametrize("ranks", [[2, 2], [3, 2], [1, 1, 1], [2, 2, 2, 2]])
def test_gates_cover_the_windows_and_nothing_else(ranks: list[int]) -> None:
    topology = sites_of(ranks)
    calendar = build_calendar(topology, Slotting.TURNS if len(ranks) == 2 else Slotting.CALENDAR)
    for cycle, asked in zip(calendar.sites, reserve(topology, calendar, 7 * MS), strict=True):
        gates = asked.gates
        assert gates.base_time_ns == 7 * MS
        assert gates.cycle_time_ns == cycle.cycle_ns == sum(entry.interval_ns for entry in gates.entries)
        opened = sum(entry.interval_ns for entry in gates.entries if entry.gate_states == OPEN)
        assert opened == sum(window.end_ns - window.start_ns for window in cycle.windows) > 0
        begin_ns, spans = 0, []
        for entry in gates.entries:
            assert entry.gate_states in (OPEN, CLOSED)
            if entry.gate_states == OPEN:
                spans.append((begin_ns, begin_ns + entry.interval_ns))
            begin_ns += entry.interval_ns
        for window in cycle.windows:
            for at_ns in (window.start_ns, (window.start_ns + window.end_ns) // 2, window.end_ns - 1):
                assert any(start <= at_ns % cycle.cycle_ns < end for start, end in spans)


def test_a_window_over_the_end_of_the_cycle_is_open_at_both_ends() -> None:
    topology = sites_of([1, 1])
    windows = (SlotWindow(-1, 8 * MS, 11 * MS, 1), SlotWindow(-1, 2 * MS, 5 * MS, 1), SlotWindow(-1, 5 * MS, 6 * MS, 1))
    cycles = (SiteCycle(10 * MS, windows), SiteCycle(10 * MS))
    calendar = Calendar(Slotting.CALENDAR, cycles, (0.0, 1e7, 1e7, 0.0))
    first, second = reserve(topology, calendar)
    assert first.gates.entries == (
        GateEntry(OPEN, MS), GateEntry(CLOSED, MS), GateEntry(OPEN, 4 * MS), GateEntry(CLOSED, 2 * MS),
        GateEntry(OPEN, 2 * MS),
    )  # fmt: skip
    assert first.flows[0].payload_bytes_per_s == pytest.approx(1e7 * 7 / 10)
    assert second.gates.entries == (GateEntry(OPEN, 10 * MS),)


def test_what_promises_nothing_is_refused() -> None:
    topology = sites_of([1, 1])
    with pytest.raises(UsageError, match="slotting='off'"):
        reserve(topology, build_calendar(topology, Slotting.OFF))
    with pytest.raises(UsageError, match="nothing to reserve"):
        reserve(sites_of([2]), build_calendar(sites_of([2])))
