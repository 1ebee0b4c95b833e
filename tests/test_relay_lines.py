"""The relay's lines in virtual time, and its side of SOCKS5 without a socket."""

from __future__ import annotations

import ipaddress
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detcoll.emulation.relay.lines import Lines
from detcoll.emulation.relay.socks import Answer, Handshake
from detcoll.testing.socks import GREETING, request
from detcoll.topology import Link, Site, Topology

RATE = 1e6  # bytes/s, so that one byte takes a microsecond
US = 1000
DELAY_NS = 5_000_000
SEGMENT, HEADER, MTU = 1448, 52, 1500

Named = Lines[str]


def lines(sites: int = 2, buffer_bytes: int = 100_000, downlink: float = RATE) -> Named:
    made = tuple(Site(f"s{index}", (index,), RATE, downlink) for index in range(sites))
    links = tuple(((low, high), Link(DELAY_NS)) for low in range(sites) for high in range(low + 1, sites))
    return Lines(Topology(made, links), buffer_bytes)


def drain(area: Named) -> list[tuple[float, str]]:
    """Walk virtual time from event to event."""
    done: list[tuple[float, str]] = []
    while area.next_ns < math.inf:
        done += area.due(area.next_ns)
    return done


def test_a_piece_is_charged_the_segments_that_it_fills() -> None:
    area = lines()
    wanted = {0: HEADER, 1: 1 + HEADER, SEGMENT: MTU, SEGMENT + 1: SEGMENT + 1 + 2 * HEADER, 10 * SEGMENT: 10 * MTU}
    assert {nbytes: area.cost_bytes(nbytes) for nbytes in wanted} == wanted


def test_a_piece_is_whole_segments_of_half_a_millisecond_and_at_least_one() -> None:
    assert lines().piece_bytes(0) == SEGMENT
    fast = Lines[str](Topology.uniform(2, 1, 31.25e6, 0), 100_000)
    assert fast.piece_bytes(0) == 10 * SEGMENT  # 15,625 bytes
    assert Lines[str](Topology.uniform(2, 1, 1e12, 0), 100_000).piece_bytes(1) == 45 * SEGMENT  # 64 KiB


def test_a_piece_is_due_when_its_last_bit_has_arrived() -> None:
    area = lines()
    area.carry(0, 1, SEGMENT, "one", 7)
    due_ns = 7 + MTU * US + DELAY_NS
    assert area.due(due_ns - 1) == []
    assert area.due(due_ns) == [(due_ns, "one")]
    assert area.next_ns == math.inf


def test_what_queues_leaves_at_the_rate_and_what_rested_starts_anew() -> None:
    area = lines()
    for name in "abc":
        area.carry(0, 1, SEGMENT, name, 0)
    late_ns = 50_000_000
    area.carry(0, 1, SEGMENT, "d", late_ns)
    wanted = [MTU * US, 2 * MTU * US, 3 * MTU * US, late_ns + MTU * US]
    assert drain(area) == [(leaves_ns + DELAY_NS, name) for leaves_ns, name in zip(wanted, "abcd", strict=True)]


def test_directions_do_not_disturb_each_other() -> None:
    area = lines()
    for index in range(10):
        area.carry(0, 1, SEGMENT, f"there {index}", 0)
    area.carry(1, 0, SEGMENT, "back", 0)
    assert drain(area)[0] == (MTU * US + DELAY_NS, "there 0")
    area.carry(1, 0, 0, "back again", 10**9)
    assert drain(area) == [(10**9 + HEADER * US + DELAY_NS, "back again")]


def test_a_slower_downlink_decides() -> None:
    area = lines(downlink=RATE / 2)
    area.carry(0, 1, SEGMENT, "a", 0)
    area.carry(0, 1, SEGMENT, "b", 0)
    assert drain(area) == [(DELAY_NS + 2 * MTU * US, "a"), (DELAY_NS + 4 * MTU * US, "b")]


def test_senders_that_meet_at_a_downlink_queue_there() -> None:
    area = lines(sites=3)
    for source in (0, 1):
        for _ in range(5):
            area.carry(source, 2, SEGMENT, str(source), 0)
    done = drain(area)
    assert [due_ns for due_ns, _ in done] == [DELAY_NS + (index + 1) * MTU * US for index in range(10)]
    assert sorted(name for _, name in done) == ["0"] * 5 + ["1"] * 5


def test_a_line_closes_where_more_waits_than_its_buffer_and_opens_with_time() -> None:
    area = lines(buffer_bytes=3 * MTU)
    for index in range(4):
        assert area.opens_ns(0, 1) <= 0, index
        area.carry(0, 1, SEGMENT, "x", 0)
    assert area.opens_ns(0, 1) == MTU * US  # three are left then
    assert area.opens_ns(1, 0) <= 0
    assert area.peaks_bytes() == (4 * MTU, 0)


def test_a_line_is_closed_by_what_is_under_way_to_a_downlink_until_some_is_due() -> None:
    area = lines(sites=3, buffer_bytes=2 * MTU, downlink=RATE / 100)
    pair = DELAY_NS * RATE / 100 / 1e9  # what the downlink carries in the delay
    taken = 0
    while area.opens_ns(0, 2) < math.inf:
        area.carry(0, 2, SEGMENT, "x", 10**9 * taken)
        taken += 1
    assert (taken - 1) * MTU <= 2 * MTU + pair < taken * MTU
    assert area.opens_ns(1, 2) == math.inf, "whoever sends there waits"
    assert area.opens_ns(0, 1) < math.inf
    while area.opens_ns(0, 2) == math.inf:
        area.due(area.next_ns)
    assert area.next_ns < math.inf, "not all had to be due for that"


@given(
    st.lists(st.tuples(st.integers(0, 40_000_000), st.integers(1, 5 * SEGMENT)), min_size=1, max_size=60),
    st.floats(0.2, 3),
)
def test_no_interval_carries_more_than_the_rate_and_order_holds(
    pushed: list[tuple[int, int]], downlink_share: float
) -> None:
    area = lines(downlink=RATE * downlink_share)
    pushed.sort(key=lambda each: each[0])
    for index, (at_ns, nbytes) in enumerate(pushed):
        area.carry(0, 1, nbytes, str(index), at_ns)
    done = drain(area)
    assert [name for _, name in done] == [str(index) for index in range(len(pushed))]
    slowest = min(RATE, RATE * downlink_share)
    costs = [area.cost_bytes(nbytes) for _, nbytes in pushed]
    for first in range(len(done)):
        carried = sum(costs[first + 1 :])
        assert carried <= (done[-1][0] - done[first][0]) * slowest / 1e9 + 1e-3
    for (due_ns, _), (at_ns, _), cost in zip(done, pushed, costs, strict=True):
        assert due_ns >= at_ns + DELAY_NS + cost / slowest * 1e9 - 1e-3


def test_a_sender_that_never_waits_gets_the_whole_line_and_no_more() -> None:
    area = lines(buffer_bytes=10 * MTU)
    now_ns, done = 0.0, list[tuple[float, str]]()
    while len(done) < 1000:
        while area.opens_ns(0, 1) <= now_ns:
            area.carry(0, 1, SEGMENT, "x", now_ns)
        now_ns = min(area.next_ns, max(now_ns, area.opens_ns(0, 1)))
        done += area.due(now_ns)
    assert done[-1][0] == pytest.approx(DELAY_NS + len(done) * MTU * US)
    assert max(area.peaks_bytes()) <= 11 * MTU


def test_what_was_carried_is_counted_by_direction() -> None:
    area = lines(sites=3)
    area.carry(0, 2, 100, "x", 0)
    area.carry(0, 2, 0, "end", 0)
    area.carry(2, 1, SEGMENT, "y", 0)
    told = {(each.source, each.destination): each for each in area.directions()}
    assert len(told) == 6
    there = told[0, 2]
    assert (there.payload_bytes, there.wire_bytes, there.pieces) == (100, 100 + 2 * HEADER, 1)
    assert (told[2, 1].payload_bytes, told[2, 1].wire_bytes, told[2, 1].pieces) == (SEGMENT, MTU, 1)
    assert told[1, 0].wire_bytes == 0


def shake(said: bytes, step: int) -> tuple[Handshake, bytes, bytes]:
    """Say something in steps of so many bytes at most; returns the replies and what was left unread."""
    handshake, replies = Handshake(), b""
    while said and not handshake.is_over:
        nbytes = min(step, handshake.wants_bytes)
        assert nbytes > 0
        handshake.feed(said[:nbytes])
        said = said[nbytes:]
        replies += handshake.reply
    return handshake, replies, said


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_request_is_read_and_nothing_beyond_it(step: int, host: str) -> None:
    handshake, replies, rest = shake(b"\x05\x02\x02\x00" + request(host, 40_000) + b"more", step)
    assert handshake.target == (host, 40_000)
    assert (replies, rest, handshake.refusal, handshake.wants_bytes) == (b"\x05\x00", b"more", None, 0)


@pytest.mark.parametrize(
    ("said", "refusal", "reply"),
    [
        (b"\x05\x01\x02", Answer.NOT_ALLOWED, b"\x05\xff"),
        (b"\x05\x00", Answer.NOT_ALLOWED, b"\x05\xff"),
        (GREETING + request("127.0.0.1", 1, command=2), Answer.COMMAND_UNKNOWN, b"\x05\x00" + b"\x05\x07\x00\x01"),
        (GREETING + b"\x05\x01\x00\x03\x09localhost\x00\x50", Answer.ADDRESS_UNKNOWN, b"\x05\x00\x05\x08\x00\x01"),
        (GREETING + b"\x05\x01\x00\x77", Answer.ADDRESS_UNKNOWN, b"\x05\x00\x05\x08\x00\x01"),
        (GREETING + b"\x04\x01", Answer.NOT_ALLOWED, b"\x05\x00"),
        (b"GET / HTTP/1.1\r\n\r\n", Answer.NOT_ALLOWED, b""),
        (b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00", Answer.NOT_ALLOWED, b""),
    ],
)
def test_what_it_does_not_speak_is_refused(said: bytes, refusal: Answer, reply: bytes) -> None:
    for step in (1, 2, 100):
        handshake, replies, _ = shake(said, step)
        assert (handshake.refusal, handshake.target) == (refusal, None)
        assert replies[: len(reply)] == reply
        assert (len(replies) in (0, 2)) if len(reply) <= 2 else (len(replies) == 12)


@given(st.binary(max_size=400), st.integers(1, 50), st.booleans())
def test_nonsense_never_breaks_it(said: bytes, step: int, is_greeted: bool) -> None:
    handshake, replies, _ = shake((GREETING if is_greeted else b"") + said, step)
    assert len(replies) <= 12
    if handshake.target is not None:
        ipaddress.ip_address(handshake.target[0])
        assert 0 <= handshake.target[1] < 65536
    assert (handshake.wants_bytes == 0) == handshake.is_over
