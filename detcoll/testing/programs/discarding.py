"""Programs about tags that are discarded: what is dropped, what is not, and that room is given back."""

from __future__ import annotations

import pytest

from detcoll.errors import Closed, UsageError
from detcoll.testing.fabric import Here, pattern
from detcoll.transport import LARGEST_TAG, Ticket, TicketStatus

BITS = 8
PREFIX = 0xF123_4567_89AB_CD00
"""Its lowest `BITS` bits are free."""

BESIDE = (PREFIX - 1, PREFIX + 2**BITS, PREFIX ^ 2**63, PREFIX % 2**32, 5)
"""Tags that differ from the prefix in higher bits, each in other ones."""


def discarded_receives(here: Here) -> None:
    """Pending receives of the prefix end as CANCELLED, from every peer, and no others do."""
    memory = bytearray(b"\xaa" * 100)
    dropped, kept = [], []
    for src in here.others:
        dropped.append(here.endpoint.recv(src, PREFIX, 10))
        dropped.append(here.endpoint.recv(src, PREFIX + 2**BITS - 1, 100, memoryview(memory)))
        kept += [here.endpoint.recv(src, tag, 100) for tag in BESIDE]
    here.endpoint.discard(PREFIX + 7, BITS)
    seen: list[Ticket] = []
    deadline_ns = here.deadline_ns()
    while len(seen) < len(dropped):
        ended = here.endpoint.poll(deadline_ns)
        assert ended or here.clock.now_ns() < deadline_ns, f"rank {here.rank}: not cancelled: {dropped}"
        seen += ended
    assert set(seen) == set(dropped)
    assert all(ticket.status is TicketStatus.CANCELLED and ticket.view is None for ticket in dropped)
    assert all(ticket.status is TicketStatus.PENDING for ticket in kept)
    here.meet()
    here.finish(*kept, *(here.send(dst, tag, pattern(here.rank, 100)) for dst in here.others for tag in BESIDE))
    for ticket in kept:
        assert ticket.view is not None
        assert bytes(ticket.view) == pattern(ticket.peer, 100)
        ticket.release()
    assert memory == b"\xaa" * 100


def discarded_messages(here: Here, nbytes: int, rounds: int = 1, others: int = 0) -> None:
    """Check that what comes unasked is dropped, before and after its prefix is discarded, until a receive is posted.

    ``others`` prefixes are discarded besides; room for ``rounds`` times the messages is there only if it is given back.
    """
    if here.rank == 0:
        for index in range(rounds):
            early = [here.send(1, PREFIX + offset, pattern(index, nbytes)) for offset in range(3)]
            here.meet()
            here.finish(*early, *(here.send(1, PREFIX + offset, pattern(index, nbytes)) for offset in range(3)))
            here.finish(here.send(1, 1, b"all has gone"))
        assert here.take(1, 2, 6) == b"posted"
        here.finish(*(here.send(1, PREFIX + 1, pattern(77, nbytes)) for _ in range(2)))
        return
    for index in range(rounds):
        here.meet()
        if index:  # lifts what was discarded before
            assert here.endpoint.cancel(here.endpoint.recv(0, PREFIX + 2**BITS - 1, 1))
        here.endpoint.discard(PREFIX, BITS)
        for other in range(others):
            here.endpoint.discard((other + 1) << 32, BITS)
        assert here.take(0, 1, 12) == b"all has gone"
    ticket = here.endpoint.recv(0, PREFIX + 1, nbytes)
    here.finish(here.send(0, 2, b"posted"), ticket)
    assert ticket.view is not None
    assert bytes(ticket.view) == pattern(77, nbytes)
    ticket.release()
    assert here.take(0, PREFIX + 1, nbytes) == pattern(77, nbytes)


def discarded_while_they_arrive(here: Here, nbytes: int) -> None:
    """Receives that are discarded at any moment end, DONE or CANCELLED, and leave their memory alone afterwards."""
    if here.rank == 0:
        for round_ in range(10):
            here.finish(here.send(1, PREFIX + round_, pattern(1, nbytes)), here.send(1, 3, b"x"))
        here.send(1, 4, b"all has gone")
        here.part()  # the message may have to wait for room, and leaves in a poll
        return
    for round_ in range(10):
        memory = bytearray(nbytes)
        ticket = here.endpoint.recv(0, PREFIX + round_, nbytes, memoryview(memory))
        lent = here.endpoint.recv(0, PREFIX + 128 + round_, nbytes)
        for _ in range(round_):
            here.endpoint.poll(here.clock.now_ns())
        here.endpoint.discard(PREFIX, BITS)
        here.settle(ticket, lent)
        assert ticket.status in (TicketStatus.DONE, TicketStatus.CANCELLED), ticket
        assert lent.status is TicketStatus.CANCELLED
        if ticket.status is TicketStatus.DONE:
            assert memory == pattern(1, nbytes)
        memory[:] = b"\xaa" * nbytes
        assert here.take(0, 3, 1) == b"x"
        assert memory == b"\xaa" * nbytes
    assert here.take(0, 4, 12) == b"all has gone"
    here.part()


def sending_ends_it(here: Here) -> None:
    """Check that a send with a discarded tag ends the dropping of what comes with it, too."""
    other = 1 - here.rank
    here.endpoint.discard(PREFIX, BITS)
    here.meet()
    sent = here.send(other, PREFIX + here.rank, pattern(here.rank, 50))
    here.meet()
    here.finish(sent, here.send(other, PREFIX + 10, pattern(here.rank, 60)))
    assert here.take(other, PREFIX + 10, 60) == pattern(other, 60)


def bad_prefixes(here: Here) -> None:
    """Check that prefixes that cannot be are refused, all can be discarded at once, and a closed endpoint says so."""
    for tag, bits in ((-1, 8), (LARGEST_TAG + 1, 8), (0, -1), (0, 65)):
        with pytest.raises(UsageError):
            here.endpoint.discard(tag, bits)
    tickets = [here.endpoint.recv(src, tag, 1) for src in here.others for tag in (0, LARGEST_TAG)]
    here.endpoint.discard(LARGEST_TAG, 64)
    here.settle(*tickets)
    assert all(ticket.status is TicketStatus.CANCELLED for ticket in tickets)
    here.meet()
    here.endpoint.close(here.deadline_ns())
    with pytest.raises(Closed):
        here.endpoint.discard(0, 8)
    here.meet()
