"""Programs about endings: deadlines, cancelled tickets, peers that go, and endpoints that are closed."""

from __future__ import annotations

import select
from collections.abc import Callable

import numpy as np
import pytest

from detcoll.errors import Closed, PeerLost, UsageError
from detcoll.testing.fabric import Here, pattern
from detcoll.transport import LARGEST_TAG, Ticket, TicketStatus, byte_view

SLIGHTLY_NS = 2 * 10**6


def poll_keeps_its_deadline(here: Here) -> None:
    """With nothing to end, `poll` answers empty, whether the deadline has passed or lies slightly ahead."""
    assert not here.endpoint.poll(here.clock.now_ns() - 1)
    ticket = here.endpoint.recv(here.others[0], 1, 10) if here.others else None
    for deadline_ns in (0, here.clock.now_ns(), here.clock.now_ns() + SLIGHTLY_NS):
        assert not here.endpoint.poll(deadline_ns)
    assert ticket is None or ticket.status is TicketStatus.PENDING
    here.meet()


def cancelled_receive(here: Here) -> None:
    """Check that a cancelled receive takes no message: the next receive of the same tag gets it."""
    if here.rank == 0:
        here.meet()
        here.finish(here.send(1, 4, pattern(0, 1000)))
        return
    memory = bytearray(1000)
    kept = here.endpoint.recv(0, 4, 1000)
    lent = here.endpoint.recv(0, 4, 1000)
    into = here.endpoint.recv(0, 4, 1000, memoryview(memory))
    for ticket in (kept, into, lent):
        assert here.endpoint.cancel(ticket)
        assert ticket.status is TicketStatus.CANCELLED
        assert not here.endpoint.cancel(ticket)
    assert not {kept, into, lent}.intersection(here.endpoint.poll(here.clock.now_ns()))
    here.meet()
    assert here.take(0, 4, 1000) == pattern(0, 1000)
    assert memory == bytes(1000)
    assert kept.status is lent.status is into.status is TicketStatus.CANCELLED


def cancelled_between_others(here: Here) -> None:
    """Check that cancelling one of several receives of a tag leaves the others their messages, in order."""
    if here.rank == 0:
        here.meet()
        here.finish(*(here.send(1, 4, pattern(index, 500)) for index in range(2)))
        return
    tickets = [here.endpoint.recv(0, 4, 500) for _ in range(3)]
    assert here.endpoint.cancel(tickets.pop(1))
    here.meet()
    here.finish(*tickets)
    for index, ticket in enumerate(tickets):
        assert ticket.view is not None
        assert bytes(ticket.view) == pattern(index, 500)
        ticket.release()


def ended_is_not_cancelled(here: Here) -> None:
    """Check that what has ended cannot be cancelled."""
    other = here.others[0]
    tickets = [here.endpoint.recv(other, 4, 9), here.send(other, 4, pattern(here.rank, 9))]
    here.finish(*tickets)
    assert not any([here.endpoint.cancel(ticket) for ticket in tickets])
    assert all(ticket.status is TicketStatus.DONE for ticket in tickets)


def clogged_send(here: Here, nbytes: int, cancel: bool) -> None:
    """Check that a send which the peer does not take stays pending, and is taken later or cancelled for good."""
    if here.rank == 0:
        sent = here.send(1, 1, pattern(1, nbytes))
        assert not here.endpoint.poll(here.clock.now_ns() + SLIGHTLY_NS)
        assert sent.status is TicketStatus.PENDING
        cancelled = cancel and here.endpoint.cancel(sent)
        assert sent.status is (TicketStatus.CANCELLED if cancelled else TicketStatus.PENDING)
        following = here.send(1, 1, pattern(2, nbytes))
        here.meet()
        here.finish(*([following] if cancelled else [sent, following]))
        here.finish(here.send(1, 2, bytes([cancelled])))
        return
    here.meet()
    first = here.take(0, 1, nbytes)
    if first == pattern(1, nbytes):
        assert here.take(0, 1, nbytes) == pattern(2, nbytes)
        assert here.take(0, 2, 1) == b"\0"
    else:
        assert first == pattern(2, nbytes)
        assert here.take(0, 2, 1) == b"\1"


def clogged_close(here: Here, nbytes: int) -> None:
    """Check that closing with a send under way gives up at the deadline."""
    if here.rank == 0:
        sent = here.send(1, 1, pattern(1, nbytes))
        here.endpoint.close(here.clock.now_ns() + SLIGHTLY_NS)
        assert sent.status is not TicketStatus.DONE
    here.meet()


def aborted_peer(here: Here, seen: bool) -> None:
    """When rank 1 aborts, every other rank learns it while it waits; where it cannot, its waits end at deadlines."""
    if here.rank == 1:
        here.meet()
        here.endpoint.abort()
        here.meet()
        return
    ticket = here.endpoint.recv(1, 1, 10)
    here.meet()
    if not seen:
        here.meet()
        assert not here.endpoint.poll(here.clock.now_ns() + SLIGHTLY_NS)
        assert ticket.status is TicketStatus.PENDING
        return
    here.settle(ticket)
    assert ticket.status is TicketStatus.FAILED, ticket
    assert isinstance(ticket.error, PeerLost), ticket
    here.meet()


def survivors_go_on(here: Here) -> None:
    """After rank 2 has aborted, ranks 0 and 1 still exchange messages."""
    if here.rank == 2:
        here.endpoint.abort()
    here.meet()
    if here.rank < 2:
        other = 1 - here.rank
        sent = here.send(other, 1, pattern(here.rank, 5000))
        assert here.take(other, 1, 5000) == pattern(other, 5000)
        here.finish(sent)
    here.meet()


def lost_peer_costs_its_own_tickets(here: Here, nbytes: int) -> None:
    """When the last rank aborts, only tickets with it fail, whatever else is pending, and `poll` raises for none."""
    lost = here.size - 1
    if here.rank == lost:
        here.meet()
        here.endpoint.abort()
        here.meet()
        return
    survivors = [rank for rank in here.others if rank != lost]
    waiting = {src: here.endpoint.recv(src, 1, nbytes) for src in survivors}
    failing = [here.endpoint.recv(lost, tag, nbytes) for tag in (1, 2)]
    failing.append(here.endpoint.recv(lost, 3, nbytes, memoryview(bytearray(nbytes))))
    here.meet()
    here.settle(*failing)
    for ticket in failing:
        assert ticket.status is TicketStatus.FAILED, ticket
        assert isinstance(ticket.error, PeerLost), ticket
    here.meet()
    _expect_lost(here, lambda: here.endpoint.recv(lost, 4, nbytes))
    _expect_lost(here, lambda: here.send(lost, 4, bytes(nbytes)))
    here.finish(*(here.send(dst, 1, pattern(here.rank, nbytes)) for dst in survivors), *waiting.values())
    for src, ticket in waiting.items():
        assert ticket.view is not None
        assert bytes(ticket.view) == pattern(src, nbytes)
        ticket.release()


def _expect_lost(here: Here, start: Callable[[], Ticket]) -> None:
    """Check that a send or receive raises PeerLost, or its ticket ends so."""
    try:
        ticket = start()
    except PeerLost:
        return
    here.settle(ticket)
    assert isinstance(ticket.error, PeerLost), ticket


def close_finishes_sends(here: Here, nbytes: int) -> None:
    """Check that what was sent before `close` arrives, though it is taken only afterwards."""
    if here.rank == 0:
        for tag in range(3):
            here.send(1, tag, pattern(tag, nbytes))
        here.meet()
        here.endpoint.close(here.deadline_ns())
    else:
        here.meet()
        for tag in range(3):
            assert here.take(0, tag, nbytes) == pattern(tag, nbytes)
    here.meet()


def closed_twice(here: Here, abort_first: bool) -> None:
    """Check that closing and aborting are idempotent in any order, and everything else raises Closed afterwards."""
    endpoint = here.endpoint
    tickets = [endpoint.recv(peer, 1, 10) for peer in here.others]
    here.meet()
    if abort_first:
        endpoint.abort()
    for _ in range(2):
        endpoint.close(here.deadline_ns())
        endpoint.abort()
    assert all(ticket.status is not TicketStatus.PENDING for ticket in tickets)
    with pytest.raises(Closed):
        endpoint.poll(here.clock.now_ns())
    for peer in here.others:
        with pytest.raises(Closed):
            endpoint.send(peer, 0, memoryview(b"x"))
        with pytest.raises(Closed):
            endpoint.recv(peer, 0, 1)
    here.meet()


def bad_arguments(here: Here) -> None:
    """Arguments that cannot be used raise UsageError, and the endpoint serves on."""
    endpoint, other = here.endpoint, here.others[0]
    data = memoryview(b"12345678")
    for peer in (here.rank, here.size, -1):
        with pytest.raises(UsageError):
            endpoint.send(peer, 0, data)
        with pytest.raises(UsageError):
            endpoint.recv(peer, 0, 8)
    for tag in (-1, LARGEST_TAG + 1):
        with pytest.raises(UsageError):
            endpoint.send(other, tag, data)
        with pytest.raises(UsageError):
            endpoint.recv(other, tag, 8)
    with pytest.raises(UsageError):
        endpoint.recv(other, 0, 8, memoryview(bytearray(7)))
    with pytest.raises(UsageError):
        endpoint.recv(other, 0, 8, data)
    with pytest.raises(UsageError):
        endpoint.recv(other, 0, -1)
    sent = here.send(other, 0, data)
    assert here.take(other, 0, 8) == data
    here.finish(sent)


def too_large(here: Here) -> None:
    """Check that a message above ``largest_message_bytes`` is refused before anything moves."""
    nbytes = here.capabilities.largest_message_bytes + 1
    memory = byte_view(np.zeros(nbytes, np.uint8))  # untouched pages of zeros take no memory
    with pytest.raises(UsageError):
        here.endpoint.send(here.others[0], 0, memory)


def waits_on_descriptor(here: Here) -> bool:
    """Check that a caller can wait through `fileno` and `arm` instead of `poll`; False where there is no descriptor."""
    fd = here.endpoint.fileno()
    if fd is None:
        return False
    other = here.others[0]
    assert here.endpoint.arm(here.deadline_ns())
    ticket = here.endpoint.recv(other, 1, 70_000)
    armed = here.endpoint.arm(here.deadline_ns())
    here.meet()
    if not armed:
        here.endpoint.poll(here.clock.now_ns())
    sent = here.send(other, 1, pattern(here.rank, 70_000))
    deadline_ns = here.deadline_ns()
    while TicketStatus.PENDING in (ticket.status, sent.status):
        if here.endpoint.arm(deadline_ns):
            ready, _, _ = select.select([fd], [], [], max(0, deadline_ns - here.clock.now_ns()) / 1e9)
            assert ready, f"rank {here.rank}: the descriptor stayed silent: {ticket} {sent}"
        here.endpoint.poll(here.clock.now_ns())
    here.finish(ticket, sent)
    assert ticket.view is not None
    assert bytes(ticket.view) == pattern(other, 70_000)
    ticket.release()
    return True
