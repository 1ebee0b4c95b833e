"""An endpoint on a mailbox: a transport supplies what moves bytes, and gets the rest of the SPI.

`MailboxEndpoint` is for transports that move everything in `poll`: no thread, no window, no native collective. A
subclass writes `address`, `connect` and four methods: `post`, `turn`, `withdraw` and `leave`, and `watch` if it stops
reading from peers whose early mail finds no room.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from detcoll.mailbox import Mailbox
from detcoll.transport import Clock, Endpoint, Ticket, TicketKind, TicketStatus, Window


class MailboxEndpoint(Endpoint):
    """An endpoint whose tickets are kept by a `Mailbox`.

    Parameters
    ----------
    mail : Mailbox
        Of this endpoint. `connect` adds the ranks to `Mailbox.peers`.
    clock : Clock
        Given to `Transport.open`.
    """

    def __init__(self, mail: Mailbox, clock: Clock) -> None:
        self.mail, self.clock = mail, clock

    @abstractmethod
    def post(self, ticket: Ticket, view: memoryview) -> None:
        """Queue the message of a send, flat bytes, and write what goes without waiting."""

    @abstractmethod
    def turn(self, wait_s: float) -> None:
        """Move what goes without waiting; where nothing does, wait for at most ``wait_s`` until something does.

        It takes in a bounded part of what has come, so that deadlines are looked at in between.
        """

    @abstractmethod
    def withdraw(self, ticket: Ticket) -> bool:
        """Take back a send of which nothing has left; False if there is none."""

    @abstractmethod
    def leave(self) -> None:
        """Close all that is open. Called once."""

    def watch(self, peer: int) -> None:
        """Look again whether a message of ``peer`` that found no room is admitted: a receive was posted, say."""

    def send(self, dst: int, tag: int, view: memoryview, window: Window | None = None) -> Ticket:
        """Queue ``view``; windows are not kept. See `Endpoint.send`."""
        view = view.cast("B")
        ticket = self.mail.send(dst, tag, view.nbytes, self.clock.now_ns())
        self.post(ticket, view)
        return ticket

    def recv(self, src: int, tag: int, nbytes: int, into: memoryview | None = None) -> Ticket:
        """Take a message that is here, or wait for it; see `Endpoint.recv`."""
        ticket = self.mail.recv(src, tag, nbytes, into, self.clock.now_ns())
        self.watch(src)
        return ticket

    def poll(self, deadline_ns: int) -> Sequence[Ticket]:
        """Move messages until a ticket ends or the deadline passes; see `Endpoint.poll`."""
        while True:
            self.mail.check_open()
            self.turn(0.0 if self.mail.has_ended else self.left_s(deadline_ns))
            if self.mail.has_ended or self.clock.now_ns() >= deadline_ns:
                return self.mail.take_ended()

    def cancel(self, ticket: Ticket) -> bool:
        """Take back a receive of which nothing has come, or a send of which nothing has left."""
        self.mail.check_open()
        if ticket.status is not TicketStatus.PENDING or (ticket.kind is TicketKind.SEND and not self.withdraw(ticket)):
            return False
        return self.mail.cancel(ticket, self.clock.now_ns())

    def discard(self, tag: int, bits: int) -> None:
        """Drop what belongs to a prefix of tags; see `Endpoint.discard`."""
        self.mail.discard(tag, bits, self.clock.now_ns())
        for peer in self.mail.peers:
            self.watch(peer)

    def abort(self) -> None:
        """Close everything at once."""
        if self.mail.is_open:
            self.mail.close(self.clock.now_ns())
            self.leave()

    def close(self, deadline_ns: int) -> None:
        """Go on until all sends have ended or the deadline has passed, then close everything."""
        while self.mail.is_open and self.mail.has_sends and self.clock.now_ns() < deadline_ns:
            self.turn(self.left_s(deadline_ns))
        self.abort()

    def arm(self, deadline_ns: int) -> bool:
        """Tell whether nothing has ended yet; a descriptor such as that of epoll watches the rest by itself."""
        self.mail.check_open()
        return not self.mail.has_ended

    def counters(self) -> Mapping[str, int]:
        """Return messages and bytes sent and received."""
        return dict(self.mail.counters)

    def left_s(self, deadline_ns: int) -> float:
        """Return the seconds from now until a deadline, 0 where it has passed."""
        return max(0.0, (deadline_ns - self.clock.now_ns()) / 1e9)
