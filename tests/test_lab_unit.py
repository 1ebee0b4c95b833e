"""Pure parts of the lab: what units weigh on the wire, and how they are cut."""

from __future__ import annotations

import math
import os
import socket
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detcoll.emulation.helper import ASK_QUIT, receive_line
from detcoll.emulation.lab import router
from detcoll.emulation.lab.conditions import Conditions
from detcoll.emulation.lab.flows import Looks
from detcoll.emulation.lab.router import RouterConfig, _Router
from detcoll.emulation.lab.unit import NEEDS_CSUM, TCP, UDP, VNET_HEADER, cut, flow_of, shape_of
from detcoll.topology import Topology

ACK, PSH, FIN, CWR = 0x10, 0x08, 0x01, 0x80
GSO_TCPV4, GSO_ECN = 1, 0x80


def ones_sum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def tcp_unit(
    payload: bytes, gso_size: int = 0, source: int = 0, destination: int = 1, flags: int = ACK | PSH,
    gso_type: int = GSO_TCPV4, sequence: int = 0xFFFFFFF0, identification: int = 0xFFFE,
) -> bytes:  # fmt: skip
    """Make a unit as the kernel writes it: 20 bytes of IPv4, 32 of TCP with the timestamp option."""
    ends = socket.inet_aton(f"10.77.{source}.1") + socket.inet_aton(f"10.77.{destination}.1")
    length = 52 + len(payload)
    ip = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, length, identification, 0x4000, 64, TCP, 0) + ends)
    ip[10:12] = (0xFFFF ^ ones_sum(bytes(ip))).to_bytes(2, "big")
    partial = ones_sum(ends + struct.pack("!HH", TCP, length - 20))
    tcp = struct.pack("!HHIIBBHHH", 4000, 5000, sequence, 7, 8 << 4, flags, 500, partial, 0) + bytes(12)
    header = VNET_HEADER.pack(NEEDS_CSUM, gso_type if gso_size else 0, 52, gso_size, 20, 16)
    return header + bytes(ip) + tcp + payload


def udp_unit(payload_bytes: int, fragment: int = 0) -> bytes:
    ends = socket.inet_aton("10.77.0.1") + socket.inet_aton("10.77.1.1")
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 28 + payload_bytes, 1, fragment, 64, UDP, 0) + ends
    udp = struct.pack("!HHHH", 40, 50, 8 + payload_bytes, 0)
    return VNET_HEADER.pack(0, 0, 0, 0, 0, 0) + ip + udp + bytes(payload_bytes)


def test_every_segment_is_charged_its_own_headers() -> None:
    shape = shape_of(tcp_unit(bytes(3 * 1448 + 100), 1448))
    assert shape == (TCP, 52, 3 * 1448 + 100, 1448, 4, 3 * 1500 + 152)


def test_a_last_segment_that_is_full_counts_once() -> None:
    assert shape_of(tcp_unit(bytes(2 * 1448), 1448)).segments == 2


def test_a_unit_without_segmentation_weighs_its_length() -> None:
    assert shape_of(tcp_unit(bytes(10)))[2:] == (10, 10, 1, 62)
    assert shape_of(tcp_unit(b""))[2:] == (0, 0, 1, 52)
    assert shape_of(udp_unit(100)) == (UDP, 28, 100, 100, 1, 128)


def test_a_unit_no_longer_than_a_segment_is_one() -> None:
    assert shape_of(tcp_unit(bytes(1448), 1448)).segments == 1


def test_what_claims_to_be_a_run_and_is_no_tcp_is_one_segment() -> None:
    claims = VNET_HEADER.pack(0, GSO_TCPV4, 28, 10, 20, 6)
    assert shape_of(claims + udp_unit(100)[10:]).segments == 1
    assert shape_of(claims + tcp_unit(bytes(100))[10:42] + b"\x40" + tcp_unit(bytes(100))[43:]).segments == 1


def test_later_fragments_have_no_ports_and_no_udp_header() -> None:
    later = udp_unit(100, fragment=185)
    assert shape_of(later)[1:3] == (20, 108)
    assert flow_of(later)[2:] == (0, 0)
    assert flow_of(udp_unit(100, fragment=0x2000))[2:] == (40, 50)


@pytest.mark.parametrize("length", [0, 10, 29])
def test_a_unit_too_short_for_its_headers_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="no IPv4 packet"):
        shape_of(bytes(length))
    with pytest.raises(ValueError, match="shorter than its headers"):
        shape_of(udp_unit(0)[:-1])


def test_flow_is_read_from_both_headers() -> None:
    assert flow_of(tcp_unit(b"x", source=2, destination=3)) == (0x0A4D0201, 0x0A4D0301, 4000, 5000)


@given(st.integers(2, 45).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, 100), st.sets(st.integers(1, n - 1)))))
def test_pieces_add_up_to_the_whole(case: tuple[int, int, set[int]]) -> None:
    segments, last_bytes, edges = case
    payload = bytes(i % 251 for i in range((segments - 1) * 100 + last_bytes))
    unit = tcp_unit(payload, 100, flags=ACK | PSH | FIN | CWR, gso_type=GSO_TCPV4 | GSO_ECN)
    shape = shape_of(unit)
    cuts = [0, *sorted(edges), segments]
    joined, weight = b"", 0
    for first, end in pairwise(cuts):
        piece = cut(unit, shape, first, end)
        told = shape_of(piece)
        ip, tcp = piece[10:30], piece[30:62]
        assert told.segments == end - first
        assert int.from_bytes(ip[2:4], "big") == len(piece) - 10
        assert int.from_bytes(ip[4:6], "big") == (0xFFFE + first) & 0xFFFF
        assert ones_sum(ip) == 0xFFFF
        assert int.from_bytes(tcp[4:8], "big") == (0xFFFFFFF0 + len(joined)) & 0xFFFFFFFF
        assert int.from_bytes(tcp[16:18], "big") == ones_sum(ip[12:20] + struct.pack("!HH", TCP, len(piece) - 30))
        assert bool(tcp[13] & (PSH | FIN)) == (end == segments)
        assert bool(tcp[13] & CWR) == (first == 0)
        if end - first > 1:
            assert piece[1] == (GSO_TCPV4 | GSO_ECN if first == 0 else GSO_TCPV4)
        else:
            assert (piece[1], VNET_HEADER.unpack_from(piece)[3]) == (0, 0)
        joined += piece[62:]
        weight += told.wire_bytes
        assert shape.wire_bytes_of(end) == weight
    assert joined == payload
    assert weight == shape.wire_bytes


def test_the_whole_unit_is_handed_on_as_it_is() -> None:
    unit = tcp_unit(bytes(500), 100)
    assert cut(unit, shape_of(unit), 0, 5) is unit


def test_a_request_right_behind_the_configuration_is_left_for_later() -> None:
    lab, router = socket.socketpair()
    with lab, router:
        router.settimeout(10)
        lab.sendall(b'{"a": 1}\n' + ASK_QUIT)
        assert receive_line(router) == b'{"a": 1}\n'
        assert router.recv(10) == ASK_QUIT


class _Area:
    """Notes for how long nobody had looked, at each unit."""

    def __init__(self) -> None:
        self.asleep_ns = 0.0
        self.seen: list[float] = []

    def arrive(self, site: int, unit: bytes, now_ns: int, is_tenant: bool) -> None:
        self.seen.append(self.asleep_ns)


def test_the_router_knows_for_how_long_it_did_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0]
    monkeypatch.setattr(router.time, "monotonic_ns", lambda: clock[0])
    area = _Area()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    theirs.setblocking(False)
    with ours, socket.socket() as control:
        config = RouterConfig(Topology.uniform(2, 1, 1e6, 1), Conditions(), None, (theirs.detach(),), (), (), 1)
        made = _Router(config, area, control, 0)  # type: ignore[arg-type]
        [(tun, (site, is_tenant))] = made._site_of.items()

        def look(began_ns: int, now_ns: int, due_ns: float, units: int = 0) -> float:
            for _ in range(units):
                ours.send(b"unit")
            clock[0] = now_ns
            made._look(began_ns, due_ns)
            made._read(tun, site, is_tenant)
            return area.asleep_ns

        assert look(0, 100, math.inf) == 0  # it slept because nothing came
        assert look(100, 150, 120) == 30  # past the time to wake up
        assert look(170, 180, math.inf) == 20  # it was at work
        assert look(180, 300, 200, units=20) == 100
        assert look(300, 301, math.inf) == 100  # a batch, and more is left from then
        assert look(301, 302, math.inf) == 100
        assert look(302, 303, math.inf) == 0
        assert area.seen == [100.0] * 20
        os.close(tun)


def test_a_stall_between_two_units_counts_for_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 1, 3, 900])  # opened, looked, and two units
    monkeypatch.setattr(router.time, "monotonic_ns", lambda: next(clock))
    area = _Area()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    theirs.setblocking(False)
    with ours, socket.socket() as control:
        config = RouterConfig(Topology.uniform(2, 1, 1e6, 1), Conditions(), None, (theirs.detach(),), (), (), 1)
        made = _Router(config, area, control, 0)  # type: ignore[arg-type]
        [tun] = made._site_of
        ours.send(b"one")
        ours.send(b"two")
        made._look(0, math.inf)
        made._read(tun, 0, False)
        os.close(tun)
    assert area.seen == [2, 899]


def test_what_others_got_through_is_kept_within_a_bound() -> None:
    looks, step_ns = Looks(0), 10**8
    for at_ns in range(0, 100_000 * step_ns, step_ns):
        if at_ns >= looks.next_ns:
            looks.note(at_ns, (at_ns, 2 * at_ns))
    last_ns = 100_000 * step_ns
    looks.note(last_ns, (last_ns, 2 * last_ns))
    counts = looks.counts((5, 6))
    assert counts.offered_bytes == (5, 6)
    assert counts.arrived_bytes == (counts.looked_ns, tuple(2 * at_ns for at_ns in counts.looked_ns))
    assert (counts.looked_ns[0], counts.looked_ns[-1]) == (0, last_ns)
    assert 2_000 <= len(counts.looked_ns) <= 4_096
    assert max(later - earlier for earlier, later in pairwise(counts.looked_ns)) <= 64 * step_ns
