"""A rank's side of the rendezvous: exchange small payloads, and learn that a rank is lost or has aborted."""

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
from detcoll.rendezvous.sockets import OwnHost, Reached, is_loopback, left

__all__ = ["Aborted", "Event", "Lost", "Refusal", "Session"]

_ABORT_NS = 500_000_000


class Refusal(Exception):
    """The hub does not admit this rank; ``fault`` as in `wire.Refused`, or "gone" if rank 0 was lost meanwhile."""

    def __init__(self, fault: str, text: str) -> None:
        super().__init__(text)
        self.fault = fault


class Session:
    """The permanent connection of this rank with all others; satisfies `detcoll.transport.Rendezvous`.

    Created by `meet`. All methods are thread-safe.

    A broken connection is restored without loss or duplication of messages. A rank is lost if its connection stays
    down for longer than the tolerance, or at once if its process is found dead. After the loss of a rank, exchanges
    that need it fail and others go on. After the loss of rank 0, which runs the hub, all exchanges fail.

    Parameters
    ----------
    reached : Reached
        How to connect to the hub.
    member : Member
        State of this rank.
    where : str
        The address of the rendezvous, for error messages.
    tolerance_ns : int
        How long the connection to the hub may be down before rank 0 counts as lost.
    life : socket.socket
        Listens as long as this process lives; owned by the session.
    host : OwnHost, optional
        The address to give to other ranks, and where to listen. By default both are the local address of the connection
        to the hub or, if that is loopback, an address of rank 0's host at which another host connected.
    server : Server, optional
        The hub's server, on rank 0; closed with the session.
    """

    def __init__(
        self,
        reached: Reached,
        member: Member,
        where: str,
        tolerance_ns: int,
        life: socket.socket,
        host: OwnHost | None = None,
        server: Server | None = None,
    ) -> None:
        self._member, self._where, self._server = member, where, server
        self._local, self._host = reached.local, host
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
        """The rank of this process."""
        return self._member.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._member.size

    @property
    def host(self) -> str:
        """The address or name at which other ranks reach this one; known once `join` has returned."""
        return "" if self._host is None else self._host.told

    @property
    def listen_host(self) -> str:
        """The numeric address to listen at for other ranks; known once `join` has returned."""
        return "" if self._host is None else self._host.listen

    def join(self, job: str, epoch: int, deadline_ns: int) -> None:
        """Send a hello and wait until all ranks have joined; called once, by `meet`.

        Raises
        ------
        ConnectError
            If not all ranks joined in time; names the missing ones.
        Refusal
            If the hub does not admit this rank.
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
            raise ConnectError(f"the service at {self._where} is not a detcoll rendezvous: {fault}")
        if loss is not None:
            raise Refusal("gone", loss)
        if answer is None:
            raise ConnectError(self._silence("the hub did not say in time which ranks are missing"))
        if self._host is None:
            # On rank 0's host the connection may use loopback, an address that is useless to other hosts.
            host = answer.reach if answer.reach and is_loopback(self._local) else self._local
            self._host = OwnHost(host, host)

    def exchange(self, name: str, payload: bytes, deadline_ns: int, ranks: Sequence[int] | None = None) -> list[bytes]:
        """Contribute ``payload`` and return the payloads of all members (an all-gather); all members must call it.

        Calls are matched by name and ranks, in the order in which each rank makes them. Exchanges with different names
        or ranks are independent, and several threads may run them concurrently.

        Parameters
        ----------
        name : str
            The same on all members.
        payload : bytes
            At most 1 MiB; with more than 63 members at most 64 MiB divided by their number, less 64 bytes.
        deadline_ns : int
            In this rank's `time.monotonic_ns`. The earliest deadline of all members applies to all.
        ranks : sequence of int, optional
            The members, in any order, including this rank. By default all ranks.

        Returns
        -------
        list of bytes
            In the order of ``ranks``; by default in rank order.

        Raises
        ------
        UsageError
            If the payload or the name is too large, or ``ranks`` is not valid.
        ConnectError
            If not all members called it before the deadline; names the missing ones. Also if a member has left, or the
            hub does not answer. The session stays usable.
        PeerLost
            At once, if a member or rank 0 is lost, a rank aborted the job, or rank 0 has left.
        Closed
            If this session is closed.
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
        return payloads if ranks is None else _in_order_of(ranks, payloads)

    def fileno(self) -> int:
        """Return a file descriptor that is readable when `events` has something to return; valid until `close`.

        Raises
        ------
        Closed
            If this session has released it; its number may belong to another file by now.
        """
        if self._is_released:
            raise Closed("the rendezvous is closed")
        return self._told

    def events(self) -> list[Event]:
        """Return the losses and aborts of other ranks since the last call. Never blocks."""
        with self._connection.changed:
            if not self._is_released:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._told)
            return self._member.events()

    def abort(self, kind: str, text: str, group: int = 0) -> None:
        """Tell all other ranks that this one aborts, and why; best effort, blocks for at most 0.5 s.

        Parameters
        ----------
        kind : str
            The kind of failure, such as ``"mismatch"`` or ``"error"``.
        text : str
            Shown on all ranks; truncated to 16384 characters.
        group : int
            The 64-bit id of the group to abort. 0 aborts the whole job, and all exchanges then fail.
        """
        if not self._is_closed:
            told = wire.Abort(kind, text[: wire.TEXT_CHARS], group)
            self._connection.deliver(told, time.monotonic_ns() + _ABORT_NS)

    def close(self, deadline_ns: int) -> None:
        """Leave with a goodbye; rank 0 waits until all others have left or the deadline passes. Idempotent."""
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
        """Release this rank's connection at once, without a goodbye; the server stays. Idempotent."""
        with self._connection.changed:
            self._is_closed = True
            self._connection.changed.notify_all()
        self._connection.stop()
        self._release()

    def forget(self) -> None:
        """Close the descriptors in a forked child, which would otherwise hide the death of the parent."""
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


def _in_order_of(ranks: Sequence[int], payloads: Sequence[bytes]) -> list[bytes]:
    """Return ``payloads``, which are in ascending order of ranks, in the order of ``ranks``."""
    given = dict(zip(sorted(ranks), payloads, strict=True))
    return [given[rank] for rank in ranks]
