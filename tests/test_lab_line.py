"""The lines of the lab in virtual time."""

from __future__ import annotations

import math
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
from routers import ROUTERS

from detcoll.emulation.lab import RECORD, Conditions, read_log
from detcoll.emulation.lab.line import WideArea
from detcoll.emulation.lab.log import ArrivalLog
from detcoll.emulation.lab.unit import NEEDS_CSUM, TCP, VNET_HEADER, shape_of
from detcoll.errors import UsageError
from detcoll.topology import Topology

RATE = 1e6  # bytes/s, so that one byte takes a microsecond
US = 1000
DELAY_NS = 5_000_000

Delivered = list[tuple[float, int, bytes]]


@pytest.fixture(autouse=True, params=ROUTERS)
def _either_router(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "WideArea", request.param)


def tcp_unit(payload_bytes: int, gso_size: int = 0, source: int = 0, destination: int = 1, mark: int = 0) -> bytes:
    ends = socket.inet_aton(f"10.77.{source}.1") + socket.inet_aton(f"10.77.{destination}.1")
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 52 + payload_bytes, 1, 0x4000, 64, TCP, 0) + ends
    tcp = struct.pack("!HHIIBBHHH", 4000, 5000, mark, 7, 8 << 4, 0x10, 500, 0, 0) + bytes(12)
    return VNET_HEADER.pack(NEEDS_CSUM, 1 if gso_size else 0, 52, gso_size, 20, 16) + ip + tcp + bytes(payload_bytes)


def packet(wire_bytes: int, source: int = 0, destination: int = 1, mark: int = 0) -> bytes:
    return tcp_unit(wire_bytes - 52, 0, source, destination, mark)


def mark_of(unit: bytes) -> int:
    return int.from_bytes(unit[34:38], "big")


def area(sites: int = 2, queue_bytes: int = 100_000, loss: float = 0.0, seed: int = 0, **rest: ArrivalLog) -> WideArea:
    conditions = Conditions(queue_bytes, loss, seed=seed)
    return WideArea(Topology.uniform(sites, 1, RATE, DELAY_NS), conditions, **rest)


def drain(wide: WideArea) -> Delivered:
    """Walk virtual time from event to event."""
    done: Delivered = []
    while wide.next_ns < math.inf:
        done += wide.due(math.ceil(wide.next_ns))
    return done


def test_a_unit_arrives_with_its_last_bit_after_serialization_and_delay() -> None:
    wide = area()
    wide.arrive(0, packet(1000), 7)
    assert wide.due(7 + 1000 * US + DELAY_NS - 1) == []
    [(due, destination, unit)] = wide.due(7 + 1000 * US + DELAY_NS)
    assert (due, destination, unit) == (7 + 1000 * US + DELAY_NS, 1, packet(1000))
    assert wide.next_ns == math.inf


def test_a_run_of_segments_takes_the_time_of_all_their_headers() -> None:
    wide = area()
    wide.arrive(0, tcp_unit(4000, 1000), 0)
    [(due, _, _)] = drain(wide)
    assert due == pytest.approx((4000 + 4 * 52) * US + DELAY_NS)


def test_units_queue_behind_each_other_and_an_idle_line_forgets() -> None:
    wide = area()
    wide.arrive(0, packet(1000), 0)
    wide.arrive(0, packet(500), 0)
    wide.arrive(0, packet(100), 10_000 * US)
    assert [due - DELAY_NS for due, _, _ in drain(wide)] == pytest.approx([1000 * US, 1500 * US, 10_100 * US])


def test_a_long_flow_carries_the_stated_rate_and_no_more() -> None:
    wide = area()
    for number in range(1000):
        wide.arrive(0, tcp_unit(4 * 1448, 1448), number * 1000 * US)  # six times the rate
    arrivals = [(due, shape_of(unit).wire_bytes) for due, _, unit in drain(wide)]
    span_ns = arrivals[-1][0] - arrivals[0][0]
    assert sum(size for _, size in arrivals[1:]) == pytest.approx(RATE * span_ns / 1e9)


def test_asymmetry_splits_the_delay() -> None:
    text = """
        [[site]]
        name = "a"
        ranks = 1
        uplink = "8 Mbit/s"
        [[site]]
        name = "b"
        ranks = 1
        uplink = "8 Mbit/s"
        [[link]]
        between = ["a", "b"]
        one_way = "5 ms"
        asymmetry = "2 ms"
    """
    wide = WideArea(Topology.parse(text), Conditions(100_000))
    wide.arrive(0, packet(100, 0, 1), 0)
    wide.arrive(1, packet(100, 1, 0), 0)
    assert {destination: due - 100 * US for due, destination, _ in drain(wide)} == {1: 6_000_000, 0: 4_000_000}


def test_the_queue_keeps_the_head_of_a_unit_that_fits() -> None:
    wide = area(queue_bytes=3000)
    wide.arrive(0, packet(1000), 0)
    wide.arrive(0, tcp_unit(10 * 448, 448), 0)  # segments of 500 bytes on the wire: four of ten fit
    wide.arrive(0, packet(100), 0)
    wide.arrive(0, packet(100), 100 * US)  # now 100 bytes have left
    sizes = [shape_of(unit).wire_bytes for _, _, unit in drain(wide)]
    assert sizes == [1000, 2000, 100]
    [counted] = [entry for entry in wide.directions() if entry.source == 0]
    assert (counted.units, counted.segments, counted.uplink_dropped_segments) == (3, 6, 7)
    assert (counted.wire_bytes, counted.payload_bytes) == (3100, 3100 - 6 * 52)
    assert wide.peaks() == ((3000, 0), (0, 0))


def test_a_queue_of_exactly_the_bytes_drops_nothing() -> None:
    wide = area(queue_bytes=3000)
    for _ in range(3):
        wide.arrive(0, packet(1000), 0)
    assert len(drain(wide)) == 3
    assert wide.directions()[0].uplink_dropped_segments == 0


def test_the_downlink_adds_nothing_to_a_flow_shaped_to_its_rate() -> None:
    wide = area()
    for number in range(100):
        wide.arrive(0, packet(500 + number), 0)
    for due, _, unit in drain(wide):
        number = len(unit) - 10 - 500
        assert due == pytest.approx(sum(range(500, 501 + number)) * US + DELAY_NS)
    assert wide.peaks()[1] == (0, 0)


def test_two_uplinks_share_a_downlink() -> None:
    wide = area(3)
    for number in range(20):
        wide.arrive(0, packet(1000, 0, 2, number), 0)
        wide.arrive(1, packet(1000, 1, 2, 1000 + number), 0)
    done = drain(wide)
    assert done[-1][0] == pytest.approx(40_000 * US + DELAY_NS)
    for first in (0, 1000):
        assert [mark_of(unit) - first for _, _, unit in done if first <= mark_of(unit) < first + 20] == list(range(20))
    assert wide.peaks()[1][2] == pytest.approx(20_000, abs=1)


def test_the_downlink_drops_what_its_queue_cannot_hold() -> None:
    wide = area(3, queue_bytes=5000)
    for number in range(10):
        wide.arrive(0, tcp_unit(4 * 198, 198, 0, 2), number * 1000 * US)  # 4 segments of 250 bytes, at the full rate
        wide.arrive(1, tcp_unit(4 * 198, 198, 1, 2), number * 1000 * US)
    arrived = sum(shape_of(unit).segments for _, _, unit in drain(wide))
    dropped = sum(entry.downlink_dropped_segments for entry in wide.directions())
    # 20 kB come in 10 ms, of which 10 kB leave meanwhile: 5 kB wait and 5 kB, 20 segments, are too many.
    assert (arrived, dropped) == (60, 20)
    assert wide.peaks()[1][2] <= 5000


def test_a_slower_downlink_paces_what_arrives() -> None:
    text = """
        [[site]]
        name = "a"
        ranks = 1
        uplink = "8 Mbit/s"
        [[site]]
        name = "b"
        ranks = 1
        uplink = "8 Mbit/s"
        downlink = "4 Mbit/s"
        [[link]]
        between = ["a", "b"]
        one_way = "5 ms"
    """
    wide = WideArea(Topology.parse(text), Conditions(100_000))
    wide.arrive(0, packet(1000), 0)
    wide.arrive(0, packet(1000), 0)
    # Cut through: the first bit goes on as it comes, so the first unit takes its 2 ms of the downlink alone.
    assert [due - DELAY_NS for due, _, _ in drain(wide)] == pytest.approx([2000 * US, 4000 * US])


@pytest.mark.parametrize("step_us", [70, 700, 3000, 20_000, 10**6])
def test_late_wakeups_shift_no_due_time_and_keep_the_order(step_us: int) -> None:
    punctual, sleepy = area(3), area(3)
    for wide in (punctual, sleepy):
        for number in range(50):
            wide.arrive(number % 2, packet(100 + 7 * number, number % 2, 2, number), number * 100 * US)
    on_time = [(due, mark_of(unit)) for due, _, unit in drain(punctual)]
    late: list[tuple[float, int]] = []
    now_ns = 0
    while sleepy.next_ns < math.inf:
        now_ns += step_us * US
        woken = [(due, mark_of(unit)) for due, _, unit in sleepy.due(now_ns)]
        assert all(now_ns - step_us * US < due <= now_ns for due, _ in woken)
        late += woken
    assert [due for due, _ in late] == pytest.approx([due for due, _ in on_time])
    assert [mark for _, mark in late] == [mark for _, mark in on_time]


def test_lost_segments_are_cut_out_of_their_units_and_cost_the_uplink() -> None:
    wide = area(loss=0.3, seed=4)
    wide.arrive(0, tcp_unit(40 * 48, 48), 0)  # 40 segments of 100 bytes
    pieces = [(due, (mark_of(unit)) // 48, shape_of(unit)) for due, _, unit in drain(wide)]
    counted = wide.directions()[0]
    assert sum(shape.segments for _, _, shape in pieces) == 40 - counted.lost_segments
    assert 0 < counted.lost_segments < 40
    assert counted.segments == 40
    for due, first, shape in pieces:
        assert due == pytest.approx((first + shape.segments) * 100 * US + DELAY_NS)


def test_the_loss_share_is_binomial_and_seeded() -> None:
    def lost(seed: int) -> list[int]:
        wide = area(queue_bytes=2**31, loss=0.02, seed=seed)
        counts = []
        for _ in range(2000):
            wide.arrive(0, tcp_unit(10 * 48, 48), 0)
            wide.arrive(1, tcp_unit(10 * 48, 48, 1, 0), 0)
            counts.append(sum(entry.lost_segments for entry in wide.directions()))
        there, back = (entry.lost_segments for entry in wide.directions())
        for count in (there, back):
            assert abs(count - 400) < 5 * math.sqrt(20_000 * 0.02 * 0.98)
        return counts

    assert lost(1) == lost(1)
    assert lost(1) != lost(2)


def test_a_loss_of_one_loses_everything() -> None:
    wide = area(loss=1.0)
    wide.arrive(0, tcp_unit(10 * 48, 48), 0)
    assert drain(wide) == []
    assert wide.directions()[0].lost_segments == 10


@pytest.mark.parametrize(
    "unit",
    [b"", bytes(12), packet(100, destination=7), packet(100, destination=0), bytes(10) + b"\x60" + bytes(50),
     packet(100)[:-60], packet(100)[:29] + b"\x03" + packet(100)[30:]],
)  # fmt: skip
def test_what_is_for_no_other_site_is_counted_and_ignored(unit: bytes) -> None:
    wide = area()
    wide.arrive(0, unit, 0)
    assert (wide.unroutable, wide.next_ns) == (1, math.inf)


def test_the_log_tells_of_every_unit_that_came(tmp_path: Path) -> None:
    with ArrivalLog(tmp_path / "log.npy") as log:
        wide = area(queue_bytes=2000, log=log)
        wide.arrive(0, packet(1000), 100)
        wide.arrive(0, tcp_unit(4 * 448, 448), 200)
        wide.arrive(1, packet(60, 1, 0), 300)
        wide.flush()
    records = read_log(tmp_path / "log.npy")
    assert records.dtype == RECORD
    assert records["time_ns"].tolist() == [100, 200, 300]
    assert records["source_site"].tolist() == [0, 0, 1]
    assert records["destination_site"].tolist() == [1, 1, 0]
    assert records["source_address"].tolist() == [0x0A4D0001, 0x0A4D0001, 0x0A4D0101]
    assert records["destination_address"].tolist() == [0x0A4D0101, 0x0A4D0101, 0x0A4D0001]
    assert (records["source_port"] == 4000).all()
    assert (records["destination_port"] == 5000).all()
    assert (records["protocol"] == TCP).all()
    assert records["segments"].tolist() == [1, 4, 1]
    assert records["dropped"].tolist() == [False, True, False]
    assert records["dropped_segments"].tolist() == [0, 2, 0]
    assert records["payload_bytes"].tolist() == [948, 1792, 8]
    assert records["wire_bytes"].tolist() == [1000, 2000, 60]
    assert records["queue_bytes"].tolist() == [1000, 2000, 60]


def test_a_log_of_many_pieces_is_one_array(tmp_path: Path) -> None:
    with ArrivalLog(tmp_path / "log.npy") as log:
        for number in range(10_000):
            log.append(number, 0, 1, (1, 2, 3, 4), TCP, 1, 0, 10, 62, number)
    assert np.array_equal(read_log(tmp_path / "log.npy")["queue_bytes"], np.arange(10_000))


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.zeros(3))
    with pytest.raises(UsageError, match="is no arrival log"):
        read_log(tmp_path / "other.npy")
    with pytest.raises(UsageError, match="cannot be read"):
        read_log(tmp_path / "missing.npy")
