"""Programs about memory: who may read and write which bytes until when."""

from __future__ import annotations

import pytest

from detcoll.testing.fabric import Here, pattern
from detcoll.transport import Ticket, TicketKind, TicketStatus

NBYTES = 100_003


def lent_views_stay(here: Here, count: int = 8, nbytes: int = NBYTES) -> None:
    """Lent views are read-only and keep their bytes while more messages flow, until they are released."""
    if here.rank == 0:
        here.finish(*(here.send(1, tag, pattern(tag, nbytes)) for tag in range(2 * count)))
        return
    kept = []
    for tag in range(count):
        ticket = here.endpoint.recv(0, tag, nbytes)
        here.finish(ticket)
        kept.append(ticket)
    for tag in range(count, 2 * count):
        assert here.take(0, tag, nbytes) == pattern(tag, nbytes)
    for tag, ticket in enumerate(kept):
        assert ticket.view is not None
        assert ticket.view.nbytes == nbytes
        assert ticket.view.readonly
        assert bytes(ticket.view) == pattern(tag, nbytes)
    for ticket in kept:
        ticket.release()
        assert ticket.view is None
        ticket.release()


def released_memory_serves_again(here: Here, count: int = 50, nbytes: int = NBYTES) -> None:
    """Check that views that are released in another order than they came spoil no other view."""
    if here.rank == 0:
        here.finish(*(here.send(1, tag, pattern(tag, nbytes)) for tag in range(count)))
        return
    kept = {}
    for tag in range(count):
        ticket = here.endpoint.recv(0, tag, nbytes)
        here.finish(ticket)
        kept[tag] = ticket
        if tag % 3 == 2:
            kept.pop(min(kept) if tag % 2 else max(kept)).release()
        for other, held in kept.items():
            assert held.view is not None
            assert bytes(held.view) == pattern(other, nbytes)
    for ticket in kept.values():
        ticket.release()


def into_is_filled(here: Here, nbytes: int) -> None:
    """Check that a receive fills ``into``, nothing before and nothing after it, and lends no view."""
    if here.rank == 0:
        here.finish(here.send(1, 1, pattern(4, nbytes)))
        return
    memory = bytearray(b"\xaa" * (nbytes + 128))
    ticket = here.endpoint.recv(0, 1, nbytes, memoryview(memory)[64 : 64 + nbytes])
    here.finish(ticket)
    assert ticket.view is None
    assert memory[64 : 64 + nbytes] == pattern(4, nbytes)
    assert memory[:64] == memory[64 + nbytes :] == b"\xaa" * 64
    ticket.release()
    assert memory[64 : 64 + nbytes] == pattern(4, nbytes)


def sender_may_overwrite(here: Here, nbytes: int) -> None:
    """When a send has ended, its memory is the sender's again: what the receiver holds does not change."""
    if here.rank == 0:
        memory = bytearray(pattern(6, nbytes))
        into = bytearray(pattern(7, nbytes))
        here.finish(here.send(1, 1, memory), here.send(1, 2, into))
        memory[:] = into[:] = bytes(nbytes)
        here.meet()
        return
    lent = here.endpoint.recv(0, 1, nbytes)
    filled = bytearray(nbytes)
    here.finish(lent, here.endpoint.recv(0, 2, nbytes, memoryview(filled)))
    here.meet()
    assert lent.view is not None
    assert bytes(lent.view) == pattern(6, nbytes)
    assert filled == pattern(7, nbytes)
    lent.release()


def receiver_may_overwrite(here: Here, nbytes: int) -> None:
    """Check that what the receiver writes into its own memory is not seen by the sender."""
    memory = bytearray(pattern(8, nbytes))
    if here.rank == 0:
        here.finish(here.send(1, 1, memory))
        here.meet()
        assert memory == pattern(8, nbytes)
        return
    here.finish(here.endpoint.recv(0, 1, nbytes, memoryview(memory)))
    memory[:] = bytes(nbytes)
    here.meet()


def one_memory_to_many(here: Here, nbytes: int) -> None:
    """One memory may be under way to several ranks at once."""
    if here.rank == 0:
        memory = pattern(9, nbytes)
        here.finish(*(here.send(dst, 1, memory) for dst in here.others))
    else:
        assert here.take(0, 1, nbytes) == pattern(9, nbytes)


def tickets_tell(here: Here) -> None:
    """Check that a ticket states what it stands for, is polled once, and keeps the caller's context."""
    mark = object()
    ticket = here.send(1, 8, pattern(0, 10)) if here.rank == 0 else here.endpoint.recv(0, 8, 10)
    ticket.context = mark
    seen: list[Ticket] = []
    deadline_ns = here.deadline_ns()
    while ticket not in seen:
        ended = here.endpoint.poll(deadline_ns)
        assert ended or here.clock.now_ns() < deadline_ns
        seen += ended
    assert seen == [ticket]
    assert not here.endpoint.poll(here.clock.now_ns())
    assert ticket.context is mark
    assert ticket.status is TicketStatus.DONE
    assert ticket.kind is (TicketKind.SEND if here.rank == 0 else TicketKind.RECV)
    assert (ticket.peer, ticket.tag, ticket.nbytes) == (1 - here.rank, 8, 10)
    assert ticket.error is None
    if ticket.view is not None:
        with pytest.raises(TypeError):
            ticket.view[0] = 1
    ticket.release()
