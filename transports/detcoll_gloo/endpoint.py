"""A rank's end of Gloo."""

from __future__ import annotations

import atexit
from collections.abc import Collection, Mapping, Sequence

from detcoll.errors import Closed, UsageError
from detcoll.transport import Capabilities, Clock, Endpoint, NativeCall, NativeCollectives, Ticket, TicketStatus, Window
from detcoll_gloo.collectives import GlooCollectives
from detcoll_gloo.group import Group
from detcoll_gloo.mail import Mail

_open: set[GlooEndpoint] = set()
"""Endpoints that were not closed yet; Gloo crashes a process that exits while a thread waits for it."""


class GlooEndpoint(Endpoint, NativeCollectives):
    """Messages and collectives of one rank; see the package's text.

    Parameters
    ----------
    group : Group
        Not yet joined.
    address : str
        Of the store, on rank 0.
    """

    def __init__(
        self,
        group: Group,
        address: str,
        clock: Clock,
        capabilities: Capabilities,
        unexpected_bytes: int,
        *,
        compare: bool = True,
    ) -> None:
        self._group, self._capabilities = group, capabilities
        self._collectives = GlooCollectives(group, capabilities, compare)
        self._address = address
        self._mail: Mail | None = Mail(group, clock, capabilities.largest_message_bytes, unexpected_bytes)
        self._counted: Mapping[str, int] = self._mail.counters
        _open.add(self)

    @property
    def algorithm(self) -> str:
        """The name in traces and results."""
        return self._collectives.algorithm

    def run(self, call: NativeCall, deadline_ns: int) -> None:
        """Carry out a collective of all ranks."""
        self._check_open()
        self._collectives.run(call, deadline_ns)

    def stop(self) -> None:
        """End the collectives of all ranks, and with them all messages, whose connections they share."""
        self._collectives.stop()

    def group(self, ranks: Sequence[int], key: int, deadline_ns: int) -> GlooCollectives:
        """Return the collectives of some ranks, on connections of their own."""
        self._check_open()
        return self._collectives.group(ranks, key, deadline_ns)

    @property
    def address(self) -> str:
        """The address of the store on rank 0; nothing elsewhere, since Gloo exchanges addresses itself."""
        return self._address

    def connect(self, addresses: Mapping[int, str], deadline_ns: int, needed: Collection[int] | None = None) -> None:
        """Join all ranks of the job, needed or not; Gloo has no part of a group.

        Raises
        ------
        UsageError
            If a rank is missing in ``addresses``.
        ConnectError
            If not all of them are joined at the deadline; names them.
        """
        mail = self._check_open()
        missing = sorted(set(range(self._group.size)) - set(addresses))
        if missing:
            raise UsageError(f"addresses lacks ranks {missing}; Gloo joins all {self._group.size} ranks of a job")
        if self._group.size > 1:
            self._group.join(addresses[0], deadline_ns)
        mail.peers.update(set(range(self._group.size)) - {self._group.rank})

    def send(self, dst: int, tag: int, view: memoryview, window: Window | None = None) -> Ticket:
        """Queue ``view`` behind what goes to ``dst`` already; windows are not kept."""
        return self._check_open().send(dst, tag, view)

    def recv(self, src: int, tag: int, nbytes: int, into: memoryview | None = None) -> Ticket:
        """Receive exactly ``nbytes``, straight into ``into`` where it is posted before they come."""
        return self._check_open().recv(src, tag, nbytes, into)

    def poll(self, deadline_ns: int) -> Sequence[Ticket]:
        """Return tickets that ended; see `Endpoint.poll`."""
        return self._check_open().collect(deadline_ns)

    def cancel(self, ticket: Ticket) -> bool:
        """End a ticket as CANCELLED unless its message is on the move."""
        mail = self._check_open()
        return ticket.status is TicketStatus.PENDING and mail.cancel(ticket)

    def discard(self, tag: int, bits: int) -> None:
        """Drop what belongs to a prefix of tags; see `Endpoint.discard`."""
        self._check_open().discard(tag, bits)

    def abort(self) -> None:
        """Close all connections at once; others see that this rank is gone."""
        mail, self._mail = self._mail, None
        if mail is not None:
            mail.abort()
            self._leave()

    def close(self, deadline_ns: int) -> None:
        """Wait until the receivers have seen what was sent, then close all connections."""
        mail, self._mail = self._mail, None
        if mail is not None:
            mail.close(deadline_ns)
            self._leave()

    def fileno(self) -> int | None:
        """Return an eventfd that is readable while tickets wait to be polled."""
        return self._mail.fileno() if self._mail is not None else None

    def arm(self, deadline_ns: int) -> bool:
        """Prepare to be waited on; see `Endpoint.arm`."""
        return self._check_open().arm()

    def counters(self) -> Mapping[str, int]:
        """Return messages and bytes sent and received; collectives are not counted."""
        return dict(self._counted)

    def _leave(self) -> None:
        self._collectives.leave(clean=False)
        _open.discard(self)

    def _check_open(self) -> Mail:
        if self._mail is None:
            raise Closed("the Gloo endpoint is closed")
        return self._mail


@atexit.register
def _abort_all() -> None:
    for endpoint in list(_open):
        endpoint.abort()
