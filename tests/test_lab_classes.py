"""Two classes of traffic on the lab's lines, others' traffic, jitter and failures: arithmetic in virtual time."""

from __future__ import annotations

import math
import random
import socket
import struct
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from routers import ROUTERS

from detcoll.emulation.lab.conditions import Conditions, Failure, Service, default_reservation
from detcoll.emulation.lab.cotenants import MEAN_BURST_PACKETS
from detcoll.emulation.lab.line import WideArea
from detcoll.emulation.lab.path import Delays
from detcoll.emulation.lab.port import Port
from detcoll.emulation.lab.unit import NEEDS_CSUM, TCP, VNET_HEADER, shape_of
from detcoll.errors import UsageError
from detcoll.topology import Topology

RATE = 1e6  # bytes/s, so that one byte takes a microsecond
RESERVED = 6e5
US = 1000
MS = 10**6
DELAY_NS = 5 * MS
MTU = 1500
EXPEDITED = 46
PLAIN = Conditions(queue_bytes=100_000, burst_bytes=20_000)

Delivered = list[tuple[float, int, bytes]]


@pytest.fixture(autouse=True, params=ROUTERS)
def _either_router(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "WideArea", request.param)


def packet(wire_bytes: int, dscp: int = 0, source: int = 0, destination: int = 1, mark: int = 0) -> bytes:
    return run_of(1, wire_bytes, dscp, source, destination, mark)


def run_of(
    segments: int, wire_bytes: int, dscp: int = 0, source: int = 0, destination: int = 1, mark: int = 0
) -> bytes:
    """Return a unit of equal segments, each with so many bytes on the wire."""
    payload = segments * (wire_bytes - 52)
    ends = socket.inet_aton(f"10.77.{source}.1") + socket.inet_aton(f"10.77.{destination}.1")
    ip = struct.pack("!BBHHHBBH", 0x45, dscp << 2, 52 + payload, 1, 0x4000, 64, TCP, 0) + ends
    tcp = struct.pack("!HHIIBBHHH", 4000, 5000, mark, 7, 8 << 4, 0x10, 500, 0, 0) + bytes(12)
    gso_size = wire_bytes - 52 if segments > 1 else 0
    return VNET_HEADER.pack(NEEDS_CSUM, 1 if gso_size else 0, 52, gso_size, 20, 16) + ip + tcp + bytes(payload)


def mark_of(unit: bytes) -> int:
    return int.from_bytes(unit[34:38], "big")


def topology(sites: int = 2, reserved: float | None = RESERVED) -> Topology:
    plain = Topology.uniform(sites, 1, RATE, DELAY_NS, MTU)
    return replace(
        plain, links=tuple((ends, replace(link, reserved_bytes_per_s=reserved)) for ends, link in plain.links)
    )


def area(sites: int = 2, reserved: float | None = RESERVED, **conditions: Any) -> WideArea:
    return WideArea(topology(sites, reserved), replace(PLAIN, **conditions))


def drain(wide: WideArea, until_ns: float = math.inf) -> Delivered:
    """Walk virtual time from event to event."""
    done: Delivered = []
    while wide.next_ns < math.inf and wide.next_ns <= until_ns:
        done += wide.due(math.ceil(wide.next_ns))
    return done


def times(done: Delivered) -> dict[int, float]:
    """Return when each unit had arrived, less the path's delay, by its mark."""
    return {mark_of(unit): due - DELAY_NS for due, _, unit in done}


def counted(wide: WideArea, service: Service = Service.BEST_EFFORT, source: int = 0) -> Any:
    [entry] = [
        each
        for each in wide.directions()
        if (each.source, each.destination, each.service) == (source, 1 - source, service)
    ]
    return entry


class TestPriority:
    def test_deterministic_traffic_waits_for_one_packet_at_most(self) -> None:
        wide = area()
        for mark in range(5):
            wide.arrive(0, packet(1500, mark=mark), 0)
        wide.arrive(0, packet(1000, EXPEDITED, mark=10), 2000 * US)  # 500 us into the second packet
        seen = times(drain(wide))
        assert seen[10] == pytest.approx((3000 + 1000) * US)
        assert [seen[mark] for mark in range(5)] == pytest.approx([t * US for t in (1500, 3000, 5500, 7000, 8500)])

    def test_a_run_of_segments_is_left_between_two_of_them(self) -> None:
        wide = area()
        wide.arrive(0, run_of(8, 1500, mark=1), 0)
        wide.arrive(0, packet(100, EXPEDITED, mark=2), 4000 * US)
        seen = times(drain(wide))
        assert seen[2] == pytest.approx((4500 + 100) * US)
        assert seen[1] == pytest.approx((8 * 1500 + 100) * US)

    def test_deterministic_units_keep_their_order_and_the_line_its_rate(self) -> None:
        wide = area(burst_bytes=100_000)
        for number in range(20):
            wide.arrive(0, packet(1500, mark=100 + number), number * 1500 * US)
            wide.arrive(0, packet(500, EXPEDITED, mark=number), number * 1500 * US)
        done = drain(wide)
        marks = [mark_of(unit) for _, _, unit in done]
        assert [mark for mark in marks if mark < 100] == list(range(20))
        assert [mark for mark in marks if mark >= 100] == list(range(100, 120))
        assert done[-1][0] - DELAY_NS == pytest.approx(20 * 2000 * US)
        for (before, _, _), (after, _, unit) in pairwise(done):
            assert after - before >= shape_of(unit).wire_bytes * US * 0.999

    def test_an_idle_line_makes_nobody_wait(self) -> None:
        wide = area()
        wide.arrive(0, packet(1000, mark=1), 0)
        wide.arrive(0, packet(1000, EXPEDITED, mark=2), 1000 * US)
        wide.arrive(0, packet(1000, mark=3), 5000 * US)
        assert times(drain(wide)) == pytest.approx({1: 1000 * US, 2: 2000 * US, 3: 6000 * US})

    def test_a_full_best_effort_queue_takes_nothing_from_the_other_class(self) -> None:
        wide = area(queue_bytes=6000)
        for number in range(40):
            wide.arrive(0, run_of(10, 1500, mark=1000 + number), number * MS)
            wide.arrive(0, packet(500, EXPEDITED, mark=number), number * MS)
        seen = times(drain(wide))
        waits = [seen[number] - number * MS - 500 * US for number in range(40)]
        assert max(waits) <= MTU * US
        reserved, rest = counted(wide, Service.DETERMINISTIC), counted(wide)
        assert (reserved.segments, reserved.uplink_dropped_segments, reserved.policed_segments) == (40, 0, 0)
        assert rest.uplink_dropped_segments == 400 - rest.segments > 0
        assert wide.peaks()[0][0] <= 6000
        assert wide.peaks(Service.DETERMINISTIC)[0][0] <= 500 + MTU

    def test_what_the_other_class_queues_takes_no_room_from_best_effort(self) -> None:
        wide = area(queue_bytes=6000)
        for mark in range(6):
            wide.arrive(0, packet(1000, EXPEDITED, mark=mark), 0)
        for mark in range(4):
            wide.arrive(0, packet(1500, mark=100 + mark), 0)
        assert len(drain(wide)) == 10
        assert wide.peaks()[0][0] == wide.peaks(Service.DETERMINISTIC)[0][0] == 6000

    def test_the_packet_on_a_downlink_is_not_held_up(self) -> None:
        wide = area(3, 4e5)
        wide.arrive(0, packet(1500, 0, 0, 2, 1), 0)
        wide.arrive(1, packet(1500, 0, 1, 2, 2), 0)
        wide.arrive(0, packet(100, EXPEDITED, 0, 2, 3), 2300 * US)
        assert times(drain(wide)) == pytest.approx({1: 1500 * US, 2: 3000 * US, 3: 3100 * US})

    def test_two_deterministic_flows_meet_at_a_downlink_ahead_of_the_rest(self) -> None:
        wide = area(3, 4e5)
        for number in range(10):
            for source in (0, 1):
                wide.arrive(source, packet(1000, 0, source, 2, 100 * source + number), number * 1000 * US)
                if number % 3 == 0:
                    wide.arrive(
                        source, packet(700, EXPEDITED, source, 2, 1000 + 100 * source + number), number * 1000 * US
                    )
        done = drain(wide)
        for source in (0, 1):
            mine = [mark_of(unit) for _, _, unit in done if 100 * source <= mark_of(unit) < 100 * source + 10]
            assert mine == [100 * source + number for number in range(10)]
        waits = [due - DELAY_NS - (mark_of(unit) % 100) * MS for due, _, unit in done if mark_of(unit) >= 1000]
        assert max(waits) <= (2 * 700 + 2 * MTU) * US  # one packet at each end, and one of the other flow
        assert done[-1][0] - DELAY_NS == pytest.approx((20 * 1000 + 8 * 700) * US, rel=0.1)


def test_what_is_done_next_is_done_by_then_whatever_is_rounded() -> None:
    draw = random.Random(1)
    for _ in range(300):
        port: Port[int] = Port(draw.uniform(1e5, 1e6), 10**6, MTU)
        port.take_first(1000, 0.0, 0.0)
        port.remember(2**30 - draw.uniform(0, 1e6), 7)  # numbers beyond that are rounded more coarsely
        port.take_first(1000, 1e9, 1e9)
        next_ns = port.next_done_ns
        assert next_ns is not None
        assert port.done(next_ns) == [(next_ns, 7)]


class TestPolicing:
    def test_the_reserved_rate_and_one_burst_pass(self) -> None:
        wide = area(burst_bytes=20_000)
        for number in range(1000):
            wide.arrive(0, packet(1000, EXPEDITED), number * 1000 * US)  # the line's whole rate
        drain(wide)
        entry = counted(wide, Service.DETERMINISTIC)
        assert entry.wire_bytes == pytest.approx(RESERVED * 0.999 + 20_000, abs=1000)
        assert entry.policed_segments == 1000 - entry.segments
        assert entry.uplink_dropped_segments == 0

    def test_what_keeps_to_the_rate_loses_nothing(self) -> None:
        wide = area(burst_bytes=1500)
        for number in range(1000):
            wide.arrive(0, packet(600, EXPEDITED), number * 1000 * US)
        assert len(drain(wide)) == 1000
        assert counted(wide, Service.DETERMINISTIC).policed_segments == 0

    def test_of_a_run_that_exceeds_the_burst_its_head_passes(self) -> None:
        wide = area(burst_bytes=4000)
        wide.arrive(0, run_of(6, 1500, EXPEDITED), 0)
        [(_, _, unit)] = drain(wide)
        assert shape_of(unit).segments == 2
        assert counted(wide, Service.DETERMINISTIC).policed_segments == 4

    def test_what_came_while_nobody_looked_did_not_come_at_once(self) -> None:
        wide = area(burst_bytes=3000)
        for number in range(10):
            wide.arrive(0, packet(600, EXPEDITED), number * 1000 * US)
        wide.asleep_ns = 20 * MS
        for _ in range(20):
            wide.arrive(0, packet(600, EXPEDITED), 30_000 * US)
        wide.asleep_ns = 0.0
        assert counted(wide, Service.DETERMINISTIC).policed_segments == 0
        for _ in range(20):
            wide.arrive(0, packet(600, EXPEDITED), 50_000 * US)
        assert counted(wide, Service.DETERMINISTIC).policed_segments == 15

    def test_the_burst_is_stated(self) -> None:
        assert Conditions(burst_bytes=5000).burst_for(1e8) == 5000
        assert Conditions().burst_for(1e8) == 500_000
        assert Conditions().burst_for(1e6) == 131_072


class TestClassification:
    @pytest.mark.parametrize(
        ("rule", "dscp", "expected"),
        [
            (None, EXPEDITED, Service.DETERMINISTIC),
            (None, 0, Service.BEST_EFFORT),
            (None, 8, Service.BEST_EFFORT),
            (Service.DETERMINISTIC, 0, Service.DETERMINISTIC),
            (Service.BEST_EFFORT, EXPEDITED, Service.BEST_EFFORT),
        ],
    )
    def test_by_code_point_or_by_rule(self, rule: Service | None, dscp: int, expected: Service) -> None:
        wide = area(service=rule)
        wide.arrive(0, packet(100, dscp), 0)
        assert {service: counted(wide, service).units for service in Service} == {
            service: int(service is expected) for service in Service
        }

    def test_tenants_are_best_effort_whatever_they_say(self) -> None:
        wide = area(service=Service.DETERMINISTIC)
        wide.arrive(0, packet(100, EXPEDITED), 0, is_tenant=True)
        assert counted(wide).units == 1

    def test_where_nothing_is_reserved_there_is_one_class(self) -> None:
        wide = area(reserved=None)
        wide.arrive(0, packet(100, EXPEDITED), 0)
        assert [entry.service for entry in wide.directions()] == [Service.BEST_EFFORT] * 2
        assert counted(wide).units == 1


class TestCrossTraffic:
    @pytest.mark.parametrize("share", [0.3, 1.0, 2.0])
    def test_bursts_offer_their_share_and_what_is_too_much_is_dropped(self, share: float) -> None:
        wide = area(reserved=None, cross_traffic=share, cross_tcp_share=0.0, queue_bytes=60_000)
        seconds = 200
        drain(wide, seconds * 1e9)
        for bursts in wide.bursts():
            offered = share * RATE * seconds
            # A compound Poisson sum: bursts of a geometric size have a variance of twice the squared mean.
            spread = math.sqrt(offered * 2 * MEAN_BURST_PACKETS * MTU)
            assert abs(bursts.offered_bytes - offered) < 5 * spread
            carried = bursts.offered_bytes - bursts.dropped_bytes
            assert carried <= RATE * seconds + 60_000
            if share > 1:
                assert carried >= 0.99 * RATE * seconds
        assert wide.peaks()[0][0] <= 60_000

    def test_bursts_are_seeded_and_each_uplink_has_its_own(self) -> None:
        def offered(seed: int) -> tuple[int, ...]:
            wide = area(cross_traffic=1.0, cross_tcp_share=0.0, seed=seed)
            drain(wide, 2e9)
            return tuple(each.offered_bytes for each in wide.bursts())

        assert offered(1) == offered(1)
        assert offered(1) != offered(2)
        assert len(set(offered(1))) == 2

    def test_best_effort_waits_and_loses_beside_bursts(self) -> None:
        calm, busy = (
            area(reserved=None, cross_traffic=share, cross_tcp_share=0.0, queue_bytes=30_000) for share in (0, 2)
        )
        for wide in (calm, busy):
            for number in range(1000):
                drain(wide, number * 5 * MS)
                wide.arrive(0, packet(MTU), number * 5 * MS)
            drain(wide, 6000 * MS)
        assert counted(calm).uplink_dropped_segments == 0
        assert counted(calm).delay_max_ns == pytest.approx(MTU * US + DELAY_NS, abs=2**14)
        lost = counted(busy).uplink_dropped_segments
        bursts = busy.bursts()[0]
        carried = bursts.offered_bytes - bursts.dropped_bytes + (1000 - lost) * MTU
        assert carried == pytest.approx(6 * RATE, rel=0.03)
        # A single packet is lost less often than those of a burst, of which the first makes the others' loss likelier.
        assert 0.05 < lost / 1000 < 0.3
        assert counted(busy).delay_p50_ns > 20_000 * US

    @pytest.mark.parametrize("wire_bytes", [100, 1500])
    def test_bursts_never_touch_the_deterministic_class_but_for_a_packet(self, wire_bytes: int) -> None:
        gap_ns = round(wire_bytes / RESERVED * 1e9)
        alone, beside = (area(cross_traffic=share, cross_tcp_share=0.0) for share in (0.0, 2.0))
        seen = []
        for wide in (alone, beside):
            done = []
            for number in range(2000):
                done += drain(wide, number * gap_ns)
                wide.arrive(0, packet(wire_bytes, EXPEDITED, mark=number), number * gap_ns)
            seen.append(times(done + drain(wide, 2001 * gap_ns + 2 * DELAY_NS)))
        waited = np.array([seen[1][number] - seen[0][number] for number in range(2000)])
        assert waited.min() >= -1
        assert waited.max() <= MTU * US
        assert waited.max() > 0.5 * MTU * US
        entry = counted(beside, Service.DETERMINISTIC)
        assert (entry.segments, entry.policed_segments, entry.uplink_dropped_segments) == (2000, 0, 0)

    def test_both_together_fill_the_line_and_no_more(self) -> None:
        wide = area(cross_traffic=2.0, cross_tcp_share=0.0)
        seconds = 20
        for number in range(seconds * 500):
            drain(wide, number * 2 * MS)
            wide.arrive(0, packet(1000, EXPEDITED), number * 2 * MS)
        drain(wide, seconds * 1e9)
        bursts = wide.bursts()[0]
        carried = bursts.offered_bytes - bursts.dropped_bytes + counted(wide, Service.DETERMINISTIC).wire_bytes
        assert carried == pytest.approx(RATE * seconds, abs=2 * 100_000)


class TestPathConditions:
    def test_jitter_stays_in_bounds_and_keeps_order(self) -> None:
        wide = area(jitter_ns=4 * MS)
        for number in range(300):
            wide.arrive(0, packet(500, mark=number), number * MS)
            wide.arrive(0, packet(100, EXPEDITED, mark=1000 + number), number * MS)
        done = drain(wide)
        plain = [mark_of(unit) for _, _, unit in done if mark_of(unit) < 1000]
        assert plain == list(range(300))
        extra = np.array(
            [due - DELAY_NS - mark_of(unit) * MS - 600 * US for due, _, unit in done if mark_of(unit) < 1000]
        )
        assert -500 * US <= extra.min() < MS
        assert 3 * MS < extra.max() <= 4 * MS + 1
        calm = [due - DELAY_NS - (mark_of(unit) - 1000) * MS for due, _, unit in done if mark_of(unit) >= 1000]
        assert max(calm) <= (100 + 2 * MTU) * US  # a packet at each end of the line

    def test_jitter_is_seeded(self) -> None:
        def arrivals(seed: int) -> list[float]:
            wide = area(jitter_ns=MS, seed=seed)
            for number in range(20):
                wide.arrive(0, packet(100), number * 10 * MS)
            return [due for due, _, _ in drain(wide)]

        assert arrivals(3) == arrivals(3)
        assert arrivals(3) != arrivals(4)

    def test_random_loss_is_for_best_effort_alone(self) -> None:
        wide = area(loss=0.1, burst_bytes=100_000)
        for number in range(1000):
            wide.arrive(0, packet(100, mark=1), number * 10 * MS)
            wide.arrive(0, packet(100, EXPEDITED, mark=2), number * 10 * MS)
        arrived = [mark_of(unit) for _, _, unit in drain(wide)]
        assert arrived.count(2) == 1000
        assert abs(arrived.count(1) - 900) < 5 * math.sqrt(1000 * 0.1 * 0.9)
        assert counted(wide).lost_segments == 1000 - arrived.count(1)

    def test_a_failure_takes_all_that_is_on_its_way(self) -> None:
        failure = Failure(100 * MS, 200 * MS)
        wide = area(failures=(failure,))
        for number in range(300):
            wide.arrive(0, packet(100, EXPEDITED if number % 2 else 0, mark=number), number * MS)
        arrived = {mark_of(unit) for _, _, unit in drain(wide)}
        expected = {
            number for number in range(300)
            if number * MS + 100 * US + DELAY_NS < failure.start_ns or number * MS + 100 * US >= failure.end_ns
        }  # fmt: skip
        assert arrived == expected
        assert sum(counted(wide, service).failed_segments for service in Service) == 300 - len(expected)

    def test_a_failure_of_one_link_spares_the_others(self) -> None:
        wide = area(3, 4e5, failures=(Failure(0, 10**9, (0, 2)),))
        for source, destination in ((0, 1), (0, 2), (2, 0), (1, 2)):
            wide.arrive(source, packet(100, 0, source, destination, 10 * source + destination), 0)
        assert sorted(mark_of(unit) for _, _, unit in drain(wide)) == [1, 12]

    def test_times_of_failures_count_from_the_opening(self) -> None:
        opened_ns = 77 * 10**9
        wide = WideArea(topology(), replace(PLAIN, failures=(Failure(0, 50 * MS),)), None, opened_ns)
        wide.arrive(0, packet(100, mark=1), opened_ns + 10 * MS)
        wide.arrive(0, packet(100, mark=2), opened_ns + 60 * MS)
        assert [mark_of(unit) for _, _, unit in drain(wide)] == [2]


class TestProbe:
    def test_an_idle_line_takes_two_delays_and_the_probe_itself(self) -> None:
        wide = area(probe_gap_ns=20 * MS)
        drain(wide, 2e9)
        probe = wide.probe()
        assert 50 < probe.sent < 200
        assert len(probe.round_trip_ns) >= probe.sent - 2
        assert set(probe.round_trip_ns) == {2 * (DELAY_NS + 64 * US)}

    def test_it_waits_behind_best_effort_and_yields_to_the_other_class(self) -> None:
        behind, beside = area(service=Service.BEST_EFFORT, probe_gap_ns=20 * MS), area(probe_gap_ns=20 * MS)
        for wide in (behind, beside):
            for number in range(200):
                drain(wide, number * 25 * MS)
                wide.arrive(0, run_of(10, 1500, EXPEDITED), number * 25 * MS)  # 60 % of the line, in lumps of 15 ms
            drain(wide, 5e9)
        base_ns = 2 * (DELAY_NS + 64 * US)
        for wide in (behind, beside):
            took = np.array(wide.probe().round_trip_ns) - base_ns
            # A lump is on the line for 0.6 of the time, and who comes meanwhile waits for the rest of it.
            assert np.mean(took > 0) == pytest.approx(0.6, abs=0.15)
            assert 10 * MS < took.max() <= 15 * MS

    def test_it_is_best_effort_whatever_the_rule(self) -> None:
        wide = area(service=Service.DETERMINISTIC, probe_gap_ns=20 * MS)
        drain(wide, 1e9)
        assert counted(wide, Service.DETERMINISTIC).units == 0
        assert counted(wide).units > 0

    def test_a_probe_that_is_lost_does_not_come_back(self) -> None:
        wide = area(probe_gap_ns=MS, loss=1.0)
        drain(wide, 1e9)
        assert wide.probe().sent > 0
        assert wide.probe().round_trip_ns == ()


def test_delays_are_counted_to_within_a_bucket() -> None:
    delays = Delays()
    assert delays.percentile_ns(50) is None
    values = np.random.default_rng(1).integers(0, 10**8, 5000)
    for value in values:
        delays.add(float(value))
    for percent in (1, 50, 99):
        exact = np.percentile(values, percent, method="inverted_cdf")
        assert exact <= delays.percentile_ns(percent) <= exact + 2**14
    assert delays.percentile_ns(100) == values.max()


class TestArguments:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"queue_bytes": 100}, "queue_bytes=100 must be from one packet"),
            ({"burst_bytes": 100}, "burst_bytes=100 must be from one packet"),
            ({"loss": -0.1}, "loss=-0.1 must be from 0 to 1"),
            ({"cross_tcp_share": 1.1}, "cross_tcp_share=1.1 must be from 0 to 1"),
            ({"jitter_ns": -1}, "jitter_ns=-1 must not be negative"),
            ({"probe_gap_ns": -1}, "probe_gap_ns=-1 must not be negative"),
            ({"cross_traffic": 2.1}, "cross_traffic=2.1 must be a share from 0 to 2"),
            ({"cross_traffic": math.nan}, "cross_traffic=nan"),
        ],
    )
    def test_conditions_that_cannot_be_are_refused(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            replace(PLAIN, **changes).validate(topology())

    def test_a_reservation_leaves_the_line_something(self) -> None:
        with pytest.raises(
            UsageError, match="8 Mbit/s in all at site 'site0' must be less than its uplink of 8 Mbit/s"
        ):
            PLAIN.validate(topology(reserved=RATE))
        with pytest.raises(UsageError, match="in all at site 'site0'"):
            PLAIN.validate(topology(3, RATE / 2))
        for sites in (2, 3, 5):
            PLAIN.validate(topology(sites, default_reservation(topology(sites))))

    def test_a_class_needs_a_reservation(self) -> None:
        with pytest.raises(UsageError, match="needs a rate reserved"):
            replace(PLAIN, service=Service.DETERMINISTIC).validate(topology(reserved=None))
        with pytest.raises(UsageError, match="service='express' is not known; expected best-effort or deterministic"):
            Service.parse("express")

    def test_failures_as_people_write_them(self) -> None:
        three = topology(3)
        assert Failure.parse("5 s to 7 s", three) == Failure(5 * 10**9, 7 * 10**9)
        assert Failure.parse("site2 and site0: 1 ms to 2.5 ms", three) == Failure(MS, 2_500_000, (0, 2))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("5 s", "must be of the form"),
            ("5 to 7", "failure='5'"),
            ("7 s to 5 s", "ends before it starts"),
            ("site0 and site9: 1 s to 2 s", "names no two sites; the sites are site0, site1"),
        ],
    )
    def test_failures_that_cannot_be_are_refused(self, text: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            Failure.parse(text, topology())
