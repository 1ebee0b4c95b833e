"""A rank's side of the rendezvous: exchanging small payloads, and hearing that somebody is gone or gave up."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence

from detcoll.errors import Closed, ConnectError, UsageError
from detcoll.rendezvous import wire
from detcoll.rendezvous.connection import Connection
from detcoll.rendezvous.member import Aborted, Event, Lost, Member, absence
from detcoll.rendezvous.server import Server
from detcoll.rendezvous.sockets import Reached, is_loopback, left

__all__ = ["Aborted", "Event", "Lost", "Refusal", "Session"]

_ABORT_NS = 500_000_000


class Refusal(Exception):
    """The hub does not let this rank in; ``fault`` as in `wire.Refused`."""

    def __init__(self, fault: str, text: str) -> None:
        super().__init__(text)
        self.fault = fault


class Session:
    """The standing connection of this rank with all others; satisfies `detcoll.transport.Rendezvous`.

    Made by `meet`. All methods may be used from any thread.

    A connection that is cut is made again, and nothing is lost or doubled meanwhile. A rank without a connection for
    longer than the tolerance is lost, and at once if its host refuses a new one. After the loss of a rank, exchanges
    that need it fail, and others go on. After the loss of rank 0, where the hub is, all fail.

    Parameters
    ----------
    reached : Reached
        How to connect to the hub.
    member : Member
        What this rank knows.
    where : str
        The address of the rendezvous, for messages.
    tolerance_ns : int
        How long to be without a connection to the hub before rank 0 counts as lost.
    life : socket.socket
        Listens as long as this process lives; the session owns it from here on.
    host : str, optional
        The address to give to others; that of the connection unless given.
    server : Server, optional
        The hub itself where this is rank 0; closed with the session.
    """

    def __init__(
        self,
        reached: Reached,
        member: Member,
        where: str,
        tolerance_ns: int,
        life: socket.socket,
        host: str | None = None,
        server: Server | None = None,
    ) -> None:
        self._member, self._where, self._server = member, where, server
        self._local, self._host = reached.local, host or ""
        self._port = life.getsockname()[1]
        self._is_closed = self._is_released = False
        self._told = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._connection = Connection(member, reached.where, tolerance_ns, life, self._notify)
        except BaseException:
            life.close()
            os.close(self._told)
            raise

    @property
    def rank(self) -> int:
        """Which rank this is."""
        return self._member.rank

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self._member.size

    @property
    def host(self) -> str:
        """The local IP address by which other ranks reach this one."""
        return self._host

    def join(self, job: str, epoch: int, deadline_ns: int) -> None:
        """Say hello and wait until all ranks have come; called once, by `meet`.

        Raises
        ------
        ConnectError
            If not all came in time; names those that did not.
        Refusal
            If the hub does not let this rank in.
        """
        remaining_ms = round(left(deadline_ns) * 1000)
        member, connection = self._member, self._connection
        with connection.changed:
            connection.post(wire.Hello(wire.VERSION, job, epoch, self.rank, self.size, remaining_ms, self._port))
            connection.start()
            connection.changed.wait_for(
                lambda: member.greeting is not None or member.hub_loss is not None or bool(connection.fault),
                left(deadline_ns),
            )
            answer, loss, fault = member.greeting, member.hub_loss, connection.fault
        if isinstance(answer, wire.Refused):
            raise Refusal(answer.fault, answer.text)
        if isinstance(answer, wire.Missing):
            raise ConnectError(f"rendezvous {self._where}: {absence(answer, 'never came')}")
        if fault:
            raise ConnectError(f"what answers at {self._where} is no rendezvous of detcoll: {fault}")
        if loss is not None:
            raise Refusal("gone", loss)
        if answer is None:
            raise ConnectError(self._silence("the hub did not say in time which ranks are missing"))
        if not self._host:
            # On the host of rank 0 the way to it may be loopback, which is no way for others.
            self._host = answer.reach if answer.reach and is_loopback(self._local) else self._local

    def exchange(self, name: str, payload: bytes, deadline_ns: int, ranks: Sequence[int] | None = None) -> list[bytes]:
        """Give ``payload`` under ``name`` and return what all that take part give; all of them must call it.

        Exchanges meet by name and ranks, the first of a rank with the first of the others, and so on. Different names
        or ranks never wait for each other, and may be exchanged under from several threads at once.

        Parameters
        ----------
        name : str
            The same on all ranks.
        payload : bytes
            At most 1 MiB, and less where more than 64 take part: 64 MiB over their number.
        deadline_ns : int
            On this rank's `time.monotonic_ns`. The earliest deadline among the ranks counts for all.
        ranks : sequence of int, optional
            Who takes part, in any order, this rank among them. All ranks unless given.

        Returns
        -------
        list of bytes
            In the order of ``ranks``; in rank order unless given.

        Raises
        ------
        UsageError
            If the payload is too large, or the ranks do not fit.
        ConnectError
            If not every rank called it before the deadline; names those that did not. The session stays usable.
        PeerLost
            If a rank that takes part is lost, or one gave up the job, at once.
        """
        if self._is_closed:
            raise Closed("the rendezvous is closed")
        group = self._member.group_of(name, ranks)
        count = self.size if group is None else len(group)
        limit = min(wire.PAYLOAD_BYTES, wire.MESSAGE_BYTES // count - 64)
        member, connection = self._member, self._connection
        with connection.changed:
            key = member.count(name, group)
            if len(payload) > limit or len(name) > wire.NAME_CHARS:
                raise UsageError(
                    f"exchange {name[:64]!r}: {len(payload)} bytes exceed the {limit} that a rank may give"
                )
            member.begin(key)
            try:
                connection.post(wire.Gather(key, bytes(payload), round(left(deadline_ns) * 1000)))
                connection.changed.wait_for(lambda: member.is_settled(key) or self._is_closed, left(deadline_ns))
                payloads = member.outcome(key)
            finally:
                member.end(key)
        if payloads is None and self._is_closed:
            raise Closed(f"exchange {name!r}: the rendezvous was closed meanwhile")
        if payloads is None:
            raise ConnectError(f"exchange {name!r}: {self._silence('the hub gave no answer in time')}")
        if ranks is None:
            return payloads
        given = dict(zip(sorted(ranks), payloads, strict=True))
        return [given[rank] for rank in ranks]

    def fileno(self) -> int:
        """Return a descriptor that is readable when `events` has something to tell."""
        return self._told

    def events(self) -> list[Event]:
        """Return what happened to other ranks since the last call. Never blocks."""
        with self._connection.changed:
            if not self._is_released:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._told)
            return self._member.events()

    def abort(self, kind: str, text: str, group: int = 0) -> None:
        """Tell all other ranks that this one gives up, and why; best effort, never blocks for long.

        Parameters
        ----------
        kind : str
            What sort of trouble, such as ``"mismatch"`` or ``"error"``.
        text : str
            Shown to everybody; cut at 16384 characters.
        group : int
            What is given up, of 64 bits: 0 is the whole job, whose exchanges then fail.
        """
        if not self._is_closed:
            told = wire.Abort(kind, text[: wire.TEXT_CHARS], group)
            self._connection.deliver(told, time.monotonic_ns() + _ABORT_NS)

    def close(self, deadline_ns: int) -> None:
        """Say goodbye; rank 0 stays until all have, or the deadline passes. Idempotent."""
        with self._connection.changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._connection.changed.notify_all()
        self._connection.deliver(wire.Bye(), deadline_ns)
        self._connection.stop()
        if self._server is not None:
            self._server.close(deadline_ns)
        self._release()

    def drop(self) -> None:
        """Give everything of this rank's side back at once, without a goodbye. Idempotent."""
        with self._connection.changed:
            self._is_closed = True
            self._connection.changed.notify_all()
        self._connection.stop()
        self._release()

    def forget(self) -> None:
        """Close the descriptors in a forked child, so that the death of the parent shows."""
        if not self._is_released:
            self._is_closed = self._is_released = True
            os.close(self._told)
            self._connection.forget()
            if self._server is not None:
                self._server.forget()

    def _release(self) -> None:
        with self._connection.changed:
            if not self._is_released:
                self._is_released = True
                os.close(self._told)

    def _silence(self, what: str) -> str:
        return f"the rendezvous at {self._where} did not answer: {what}"

    def _notify(self) -> None:
        if self._member.has_events and not self._is_released:
            os.eventfd_write(self._told, 1)
