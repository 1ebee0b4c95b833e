"""Tickets that have ended and that nobody has collected yet."""

from __future__ import annotations

from detcoll.transport import Clock, Ticket, TicketStatus


class Outcomes:
    """Ends tickets, and keeps them until `collect`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ended: list[Ticket] = []

    def __bool__(self) -> bool:
        """Whether there is something to collect."""
        return bool(self._ended)

    def end(self, ticket: Ticket, status: TicketStatus, error: Exception | None = None) -> None:
        """End a ticket, unless it has ended."""
        if ticket.status is not TicketStatus.PENDING:
            return
        ticket.status, ticket.error = status, error
        ticket.ended_ns = self._clock.now_ns()
        self._ended.append(ticket)

    def collect(self) -> list[Ticket]:
        """Return what ended since the last call."""
        ended, self._ended = self._ended, []
        return ended
