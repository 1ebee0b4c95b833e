"""The parts of the slotted transport that need no sockets: frames, the rules of a pair, and the timer."""

from __future__ import annotations

import itertools
import os
import select
import time
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detcoll.errors import FrameError
from detcoll.transport import Ticket, TicketKind
from detcoll_slotted.flow import Inbound, Outbound
from detcoll_slotted.joining import Joining
from detcoll_slotted.options import Options
from detcoll_slotted.peer import Peer
from detcoll_slotted.timer import Timer
from detcoll_slotted.wire import HEADER_BYTES, MAGIC, FrameKind, Header, Lane, decode

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
HEADERS = st.builds(
    Header, st.sampled_from(FrameKind), st.sampled_from(Lane), U32, U64, U32, U32, U64, U64, st.tuples(U64, U64), U64
)


@given(HEADERS)
def test_a_header_survives_the_wire(header: Header) -> None:
    frame = header.encode()
    assert len(frame) == HEADER_BYTES
    assert decode(frame) == header
    assert decode(memoryview(frame)) == header


@given(HEADERS, st.integers(0, HEADER_BYTES - 1))
def test_a_truncated_header_is_refused(header: Header, length: int) -> None:
    with pytest.raises(FrameError, match=f"this frame {length}"):
        decode(header.encode()[:length])
    with pytest.raises(FrameError):
        decode(header.encode() + b"\0")


@given(HEADERS, st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_read_as_it_stands(header: Header, position: int, change: int) -> None:
    frame = bytearray(header.encode())
    frame[position] ^= change
    try:
        read = decode(bytes(frame))
    except FrameError:
        assert position < 6, "only magic, kind and lane have values that mean nothing"
    else:
        assert position >= 4, "the magic was wrong"
        assert position in (6, 7) or read != header


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_garbage_raises_nothing_but_frame_error(frame: bytes) -> None:
    if not frame.startswith(MAGIC):
        with pytest.raises(FrameError):
            decode(frame)


def sent(outbound: Outbound, lane: Lane, tag: int, nbytes: int) -> Ticket:
    ticket = Ticket(TicketKind.SEND, 1, tag, nbytes)
    outbound.keep(lane, ticket, memoryview(bytes(nbytes)))
    return ticket


def test_messages_are_kept_until_acknowledged_in_order() -> None:
    outbound = Outbound(1000)
    tickets = [sent(outbound, Lane.BULK, tag, 100) for tag in range(3)]
    fast = sent(outbound, Lane.EXPRESS, 9, 10)
    assert outbound.acknowledged((0, 0), 0) == []
    assert outbound.acknowledged((2, 0), 0) == tickets[:2]
    assert not outbound.idle
    assert outbound.acknowledged((2, 0), 0) == []
    assert outbound.acknowledged((1, 1), 0) == [fast], "an acknowledgement that was overtaken takes nothing back"
    assert [kept.sequence for kept in outbound.kept[Lane.BULK]] == [2]
    assert outbound.acknowledged((3, 1), 300) == tickets[2:]
    assert outbound.idle


def test_the_parts_of_a_message_end_its_ticket_with_the_last() -> None:
    outbound, ticket = Outbound(1000), Ticket(TicketKind.SEND, 1, 4, 100)
    places = [outbound.keep(Lane.BULK, ticket, memoryview(bytes(nbytes))).place for nbytes in (30, 50, 20)]
    assert places == [(100, 0), (100, 30), (100, 80)]
    assert outbound.acknowledged((2, 0), 80) == []
    assert outbound.acknowledged((3, 0), 100) == [ticket]
    assert sent(outbound, Lane.BULK, 4, 7) in outbound.acknowledged((4, 0), 107), "the tag is free again"


@given(st.lists(st.binary(min_size=1), min_size=2, max_size=5))
def test_parts_are_joined_in_place(parts: list[bytes]) -> None:
    inbound, whole, offset = Inbound(100), b"".join(parts), 0
    for part in parts:
        joined = inbound.join(7, len(whole), offset, memoryview(part))
        offset += len(part)
        assert (joined is None) == (offset < len(whole))
    assert joined == whole
    assert not inbound.begun


@pytest.mark.parametrize(("total", "offset", "nbytes"), [(10, 1, 4), (10, 4, 7), (11, 4, 2), (10, 0, 14), (10, 5, 1)])
def test_a_part_that_does_not_follow_is_refused(total: int, offset: int, nbytes: int) -> None:
    inbound = Inbound(100)
    if offset != 1:
        inbound.join(7, 10, 0, memoryview(bytes(4)))
    with pytest.raises(FrameError, match="do not follow"):
        inbound.join(7, total, offset, memoryview(bytes(nbytes)))


def test_credit_comes_back_with_consumption_not_with_acknowledgement() -> None:
    outbound = Outbound(250)
    assert outbound.has_credit(10_000), "one larger message may go when nothing is held"
    sent(outbound, Lane.BULK, 1, 100)
    assert outbound.has_credit(150)
    assert not outbound.has_credit(151)
    outbound.acknowledged((1, 0), 0)
    assert not outbound.has_credit(151)
    outbound.acknowledged((1, 0), 100)
    assert outbound.has_credit(10_000)
    outbound.acknowledged((1, 0), 50)
    assert outbound.has_credit(10_000), "an older frame takes no credit back"


def test_express_messages_use_no_credit() -> None:
    outbound = Outbound(10)
    sent(outbound, Lane.EXPRESS, 1, 4000)
    assert outbound.has_credit(4000)


def test_a_tag_stays_in_its_lane_until_acknowledged() -> None:
    outbound = Outbound(1000)
    assert outbound.lane_for(5, Lane.EXPRESS) is Lane.EXPRESS
    sent(outbound, Lane.BULK, 5, 100)
    sent(outbound, Lane.BULK, 5, 100)
    assert outbound.lane_for(5, Lane.EXPRESS) is Lane.BULK
    assert outbound.lane_for(6, Lane.EXPRESS) is Lane.EXPRESS
    outbound.acknowledged((1, 0), 0)
    assert outbound.lane_for(5, Lane.EXPRESS) is Lane.BULK
    outbound.acknowledged((2, 0), 0)
    assert outbound.lane_for(5, Lane.EXPRESS) is Lane.EXPRESS
    assert not outbound.lane_of_tag


@given(st.lists(st.tuples(st.sampled_from(Lane), st.integers(0, 5)), max_size=60), st.randoms())
def test_any_loss_is_made_good_by_sending_again(messages, random) -> None:
    """Go-back-N: whatever part of each attempt arrives, all arrive once and in order."""
    outbound, inbound = Outbound(10**9), Inbound(10**9)
    for lane, tag in messages:
        sent(outbound, lane, tag, 10)
    arrived: list[tuple[Lane, int]] = []
    attempts = 0
    while not outbound.idle:
        attempts += 1
        for lane in Lane:
            arrived += [
                (lane, kept.ticket.tag)
                for kept in outbound.kept[lane]
                if (attempts > 5 or random.random() < 0.7) and inbound.accept(lane, kept.sequence)
            ]
        outbound.acknowledged((inbound.received[0], inbound.received[1]), 0)
    for lane in Lane:
        assert [tag for of, tag in arrived if of is lane] == [tag for of, tag in messages if of is lane]
    assert not outbound.lane_of_tag


def test_what_was_received_is_told_at_once_and_what_was_consumed_soon() -> None:
    inbound = Inbound(tell_every_bytes=1000)
    assert inbound.due_ns(50) is None
    inbound.consume(10, now_ns=200)
    assert inbound.due_ns(50) == 250
    inbound.consume(10, now_ns=240)
    assert inbound.due_ns(50) == 250, "the first waits longest"
    inbound.consume(980, now_ns=241)
    assert inbound.due_ns(50) == 0
    inbound.told()
    assert inbound.due_ns(50) is None
    inbound.consume(0, now_ns=300)
    assert inbound.due_ns(50) is None
    inbound.tell(300, soon=False)
    assert inbound.due_ns(50) == 350
    inbound.tell(310, soon=True)
    assert inbound.due_ns(50) == 0


def is_readable(timer: Timer, timeout_ms: int = 0) -> bool:
    poll = select.poll()
    poll.register(timer.fd, select.POLLIN)
    return bool(poll.poll(timeout_ms))


def test_the_timer_fires_at_its_time_and_not_before() -> None:
    timer = Timer()
    try:
        assert not is_readable(timer)
        at_ns = time.monotonic_ns() + 20_000_000
        timer.arm(at_ns)
        assert is_readable(timer, 10_000)
        assert time.monotonic_ns() >= at_ns
        timer.arm(time.monotonic_ns() + 10**12)
        assert not is_readable(timer), "armed anew, it is silent again"
        timer.arm(1)
        assert is_readable(timer, 10_000), "a time that has passed fires at once"
        timer.arm(-5)
        assert is_readable(timer, 10_000)
    finally:
        timer.close()


def test_the_timer_gives_its_descriptor_back() -> None:
    timer = Timer()
    assert not os.get_inheritable(timer.fd)
    timer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(timer.fd)


@pytest.mark.parametrize("coming", list(itertools.permutations(["hello", *Lane])))
def test_a_rank_goes_on_polling_until_each_connection_of_the_other_has_come_in(coming: tuple[Lane | str, ...]) -> None:
    lines = Mock(was_connected=True), Mock(was_connected=True)
    peer = Peer(1, lines, Outbound(2**20, is_open=False), Inbound(2**17))
    left = list(coming)

    def wait(until_ns: int) -> None:
        assert until_ns == 5
        came = left.pop(0)
        if isinstance(came, Lane):
            peer.inbound.heard.add(came)
        else:
            peer.outbound.is_open = True

    Joining(0, Options(), Mock(), Mock(now_ns=lambda: 0), wait).join([peer], 5)
    assert left == []
