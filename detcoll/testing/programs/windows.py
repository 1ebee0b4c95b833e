"""Programs about windows, for transports that hold a send until its window opens."""

from __future__ import annotations

from detcoll.testing.fabric import Here, pattern
from detcoll.transport import SMALLEST_PART_BYTES, TicketStatus, Window

RATE_BYTES_PER_S = 1e9
AHEAD_NS = 20 * 10**6


def window_ahead(here: Here, open_ended: bool) -> None:
    """Check that a send does not leave before its window opens."""
    if here.rank == 1:
        into = bytearray(1000)
        ticket = here.endpoint.recv(0, 1, 1000, memoryview(into))
        here.meet()
        here.finish(ticket)
        assert into == pattern(1, 1000)
        return
    here.meet()
    not_before_ns = here.clock.now_ns() + AHEAD_NS
    window = Window(not_before_ns, None if open_ended else not_before_ns + 10**10, RATE_BYTES_PER_S)
    ticket = here.endpoint.send(1, 1, memoryview(pattern(1, 1000)), window)
    here.finish(ticket)
    assert here.clock.now_ns() >= not_before_ns
    assert ticket.started_ns == 0 or ticket.started_ns >= not_before_ns
    assert ticket.ended_ns == 0 or ticket.ended_ns >= not_before_ns


def window_passed(here: Here) -> None:
    """Check that a send whose window has passed ends MISSED, and nothing of it arrives."""
    if here.rank == 0:
        now_ns = here.clock.now_ns()
        missed = here.endpoint.send(
            1, 1, memoryview(pattern(1, 1000)), Window(now_ns - 2 * 10**9, now_ns - 10**9, RATE_BYTES_PER_S)
        )
        here.settle(missed)
        assert missed.status is TicketStatus.MISSED
        here.finish(here.send(1, 1, pattern(2, 1000)))
    elif here.rank == 1:
        assert here.take(0, 1, 1000) == pattern(2, 1000)


def window_too_short(here: Here) -> None:
    """Check that a send that does not fit in its window at the given rate ends MISSED."""
    if here.rank == 0:
        now_ns = here.clock.now_ns()
        window = Window(now_ns + AHEAD_NS, now_ns + AHEAD_NS + 10**6, 1e6)  # 1000 bytes fit, not worth a frame
        missed = here.endpoint.send(1, 1, memoryview(pattern(1, 100_000)), window)
        here.settle(missed)
        assert missed.status is TicketStatus.MISSED
        here.finish(here.send(1, 1, pattern(2, 1000)))
    elif here.rank == 1:
        assert here.take(0, 1, 1000) == pattern(2, 1000)


def window_cuts(here: Here) -> None:
    """Check that a send is cut where its window ends, goes on with the rest, and arrives as one message."""
    nbytes = 300_000
    if here.rank == 0:
        content, sent_bytes, cuts = pattern(1, nbytes), 0, 0
        while True:
            not_before_ns = here.clock.now_ns() + AHEAD_NS
            window = Window(not_before_ns, not_before_ns + 10**8, 1e6)  # 100,000 bytes fit
            ticket = here.endpoint.send(1, 1, memoryview(content)[sent_bytes:], window)
            here.settle(ticket)
            if ticket.status is TicketStatus.DONE:
                break
            assert ticket.status is TicketStatus.MISSED
            assert ticket.sent_bytes <= 100_000
            assert ticket.sent_bytes == 0 or ticket.sent_bytes >= SMALLEST_PART_BYTES
            sent_bytes, cuts = sent_bytes + ticket.sent_bytes, cuts + 1
        assert cuts >= 2
        here.finish(here.send(1, 1, pattern(2, 1000)))
    elif here.rank == 1:
        into = bytearray(nbytes)
        here.finish(here.endpoint.recv(0, 1, nbytes, memoryview(into)))
        assert into == pattern(1, nbytes)
        assert here.take(0, 1, 1000) == pattern(2, 1000)
