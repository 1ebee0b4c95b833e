"""Tags that are discarded: what waits for them ends, what has come and what still comes is dropped."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

from detcoll.errors import Closed, UsageError
from detcoll.testing.fabric import ThreadFabric, pattern
from detcoll.transport import Ticket, TicketStatus
from detcoll_shm import ShmEndpoint, ShmTransport

HIGH = 0xDEADBEEF << 32
OTHER = 0xDEADBEEE << 32
SIZES = [8, 1000, 40_000]
"""In its descriptor, whole in the ring, and in parts."""
SMALL = {"ring_bytes": 65536, "slots": 64}


def pair(options: Mapping[str, Any]) -> ThreadFabric:
    return ThreadFabric(ShmTransport(), 2, options)


def sides(fabric: ThreadFabric) -> tuple[ShmEndpoint, ShmEndpoint]:
    """The two endpoints, to be driven from this thread in turn."""
    first, second = fabric[0], fabric[1]
    assert isinstance(first, ShmEndpoint)
    assert isinstance(second, ShmEndpoint)
    return first, second


def alternate(here: ShmEndpoint, there: ShmEndpoint, *tickets: Ticket) -> None:
    """Poll both in turn until all ``tickets`` are DONE."""
    deadline = time.monotonic() + 20
    while not all(ticket.status is TicketStatus.DONE for ticket in tickets):
        assert time.monotonic() < deadline, tickets
        here.poll(0)
        there.poll(0)


def passes(here: ShmEndpoint, there: ShmEndpoint, tag: int, nbytes: int) -> bool:
    """Tell whether a message with ``tag`` gets through unharmed."""
    ticket, sent = there.recv(0, tag, nbytes), here.send(1, tag, memoryview(pattern(99, nbytes)))
    alternate(here, there, ticket, sent)
    assert ticket.view is not None
    same = bytes(ticket.view) == pattern(99, nbytes)
    ticket.release()
    return same


def test_pending_receives_come_out_cancelled() -> None:
    with pair({}) as fabric:
        here, there = sides(fabric)
        dropped = [there.recv(0, HIGH + low, 8) for low in (0, 1, 1, 2**32 - 1)]
        kept = there.recv(0, OTHER, 8)
        there.discard(HIGH + 5, 32)
        assert list(there.poll(0)) == dropped
        assert {ticket.status for ticket in dropped} == {TicketStatus.CANCELLED}
        here.send(1, OTHER, memoryview(pattern(1, 8)))
        alternate(here, there, kept)
        assert bytes(kept.view or b"") == pattern(1, 8)


@pytest.mark.parametrize("nbytes", SIZES)
def test_what_has_come_is_dropped_and_its_memory_given_back(nbytes: int) -> None:
    with pair({"ring_bytes": 16384, "slots": 64}) as fabric:
        here, there = sides(fabric)
        for round_ in range(40):  # more than the ring holds, and than may be kept
            assert there.cancel(there.recv(0, HIGH + 2**31, 1))  # ends the dropping
            sent = here.send(1, HIGH + round_, memoryview(pattern(round_, nbytes)))
            between = here.send(1, OTHER, memoryview(pattern(7, 9)))
            if round_ % 2:  # taken out of the ring, since a receive waits for what comes later
                waiting = there.recv(0, OTHER, 9)
            there.discard(HIGH, 32)
            alternate(here, there, sent, between)
            if not round_ % 2:
                waiting = there.recv(0, OTHER, 9)
            alternate(here, there, waiting)
        assert there.counters()["messages_dropped"] == 40
        assert there._budget.left_bytes == there._settings.unexpected_bytes
        assert not there._peers[0].inbound._doomed


@pytest.mark.parametrize("nbytes", SIZES)
def test_what_comes_later_is_dropped_though_no_receive_waits(nbytes: int) -> None:
    with pair(SMALL) as fabric:
        here, there = sides(fabric)
        there.discard(HIGH, 32)
        sent = [here.send(1, HIGH + index, memoryview(bytes(nbytes))) for index in range(200)]
        alternate(here, there, *sent)
        assert there.counters()["messages_dropped"] == 200
        assert passes(here, there, OTHER, nbytes)


@pytest.mark.parametrize("how", ["recv", "send"])
@pytest.mark.parametrize("nbytes", SIZES)
def test_using_a_tag_again_ends_the_dropping(how: str, nbytes: int) -> None:
    with pair({}) as fabric:
        here, there = sides(fabric)
        there.discard(HIGH, 32)
        there.discard(OTHER, 32)
        if how == "recv":
            assert passes(here, there, HIGH + 1, nbytes)
        else:
            there.send(0, HIGH + 2, memoryview(b"x"))
            here.send(1, HIGH + 3, memoryview(pattern(3, nbytes)))
            there.poll(0)
            ticket = there.recv(0, HIGH + 3, nbytes)
            alternate(here, there, ticket)
            assert bytes(ticket.view or b"") == pattern(3, nbytes)
        dropped = here.send(1, OTHER + 1, memoryview(bytes(nbytes)))
        alternate(here, there, dropped)
        there.poll(0)
        assert there.counters()["messages_dropped"] == 1, "the other prefix is dropped still"


def test_what_had_come_is_not_taken_for_what_is_sent_again() -> None:
    with pair({}) as fabric:
        here, there = sides(fabric)
        for nbytes in SIZES:
            here.send(1, HIGH, memoryview(pattern(1, nbytes)))
        there.discard(HIGH, 32)
        for nbytes in SIZES:
            assert passes(here, there, HIGH, nbytes)


def test_a_receive_that_was_half_filled_is_left_alone() -> None:
    with pair({"ring_bytes": 4096}) as fabric:
        here, there = sides(fabric)
        memory = bytearray(100_000)
        ticket = there.recv(0, HIGH, 100_000, memoryview(memory))
        lent = there.recv(0, HIGH + 1, 100_000)
        sent = [here.send(1, HIGH + index, memoryview(b"x" * 100_000)) for index in (0, 1)]
        there.poll(0)
        assert memory[0] == ord("x")
        there.discard(HIGH, 32)
        assert set(there.poll(0)) == {ticket, lent}
        before = bytes(memory)
        alternate(here, there, *sent)
        assert bytes(memory) == before
        assert passes(here, there, HIGH, 100_000)


def test_memory_of_what_came_in_part_is_given_back() -> None:
    with pair({"ring_bytes": 4096}) as fabric:
        here, there = sides(fabric)
        sent = here.send(1, HIGH, memoryview(bytes(100_000)))
        later = there.recv(0, OTHER, 8)
        there.poll(0)
        assert there._budget.left_bytes < there._settings.unexpected_bytes
        there.discard(HIGH, 32)
        assert there._budget.left_bytes == there._settings.unexpected_bytes
        alternate(here, there, sent, here.send(1, OTHER, memoryview(bytes(8))), later)
        assert there._budget.left_bytes == there._settings.unexpected_bytes


def test_sends_are_not_touched() -> None:
    with pair({"ring_bytes": 4096}) as fabric:
        here, there = sides(fabric)
        sent = here.send(1, HIGH, memoryview(pattern(1, 100_000)))
        here.discard(HIGH, 32)
        assert sent.status is TicketStatus.PENDING
        ticket = there.recv(0, HIGH, 100_000)
        alternate(here, there, sent, ticket)
        assert bytes(ticket.view or b"") == pattern(1, 100_000)


def test_whole_tags_and_all_tags() -> None:
    with pair({}) as fabric:
        here, there = sides(fabric)
        tickets = [there.recv(0, tag, 8) for tag in (6, 7, 2**64 - 1)]
        there.discard(7, 0)
        assert list(there.poll(0)) == tickets[1:2]
        there.discard(0, 64)
        assert list(there.poll(0)) == [tickets[0], tickets[2]]
        assert passes(here, there, 5, 8)


@pytest.mark.parametrize(("tag", "bits"), [(-1, 0), (2**64, 0), (0, -1), (0, 65)])
def test_arguments_that_cannot_be_used(tag: int, bits: int) -> None:
    with pair({}) as fabric:
        here, _ = sides(fabric)
        with pytest.raises(UsageError):
            here.discard(tag, bits)


def test_after_close() -> None:
    with pair({}) as fabric:
        here, _ = sides(fabric)
        here.abort()
        with pytest.raises(Closed):
            here.discard(1, 0)
