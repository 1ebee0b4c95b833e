"""A rank's side of the rendezvous: exchanging small payloads, and hearing that somebody is gone or gave up.

One descriptor, `Session.fileno`, is readable whenever `Session.events` has something to tell or to read, also when
an exchange on another thread read it first: an epoll descriptor that holds the connection and a counter.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from detcoll.errors import Closed, ConnectError, FrameError, PeerLost, UsageError
from detcoll.rendezvous import wire
from detcoll.rendezvous.hub import Hub
from detcoll.rendezvous.sockets import is_loopback, left

_LARGEST_PAYLOAD_BYTES = 2**20
_ABORT_S = 0.5


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection of ``rank`` ended without a goodbye: its process died or its host vanished."""

    rank: int


@dataclass(frozen=True, slots=True)
class Aborted:
    """``rank`` called `Session.abort`."""

    rank: int
    kind: str
    text: str
    group: int = 0


Event = Lost | Aborted


class Refusal(Exception):
    """The hub does not let this rank in; ``fault`` as in `wire.Refused`."""

    def __init__(self, fault: str, text: str) -> None:
        super().__init__(text)
        self.fault = fault


class Session:
    """The standing connection of this rank with all others; satisfies `detcoll.transport.Rendezvous`.

    Made by `meet`. One thread at a time exchanges; `events` and `fileno` may be used by another; `abort` by any.

    Parameters
    ----------
    connection : socket.socket
        Connected to the hub; the session owns it from here on.
    hello : wire.Hello
        Says who this is.
    where : str
        The address of the rendezvous, for messages.
    host : str, optional
        The address to give to others; that of the connection unless given.
    hub : Hub, optional
        The hub itself where this is rank 0; closed with the session.
    """

    def __init__(
        self, connection: socket.socket, hello: wire.Hello, where: str, host: str | None = None, hub: Hub | None = None
    ) -> None:
        self._connection, self._where, self._hub, self._host = connection, where, hub, host or ""
        self.rank, self.size = hello.rank, hello.size
        self._inbox = wire.Inbox(2 * wire.FRAME_BYTES)
        self._sending, self._receiving = threading.Lock(), threading.RLock()
        self._answers: list[wire.FromHub] = []
        self._pending: list[Event] = []
        self._trouble: list[str] = []
        self._fault = ""
        self._number = 0
        self._is_closed = self._is_cut = self._has_parted = self._is_released = False
        self._answered = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._told = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        connection.setblocking(False)
        self._epoll.register(connection, select.EPOLLIN)
        self._epoll.register(self._told, select.EPOLLIN)

    @property
    def host(self) -> str:
        """The local IP address by which other ranks reach this one."""
        return self._host

    def join(self, hello: wire.Hello, deadline_ns: int) -> None:
        """Say hello and wait until all ranks have come; called once, by `meet`.

        Raises
        ------
        ConnectError
            If not all came in time; names those that did not.
        Refusal
            If the hub does not let this rank in.
        """
        self._send(wire.pack(hello), deadline_ns)
        answer = self._await(0, deadline_ns)
        if isinstance(answer, wire.Refused):
            raise Refusal(answer.fault, answer.text)
        if isinstance(answer, wire.Missing):
            raise ConnectError(f"rendezvous {self._where}: {_never_came(answer.ranks)}")
        if self._fault:
            raise ConnectError(f"what answers at {self._where} is no rendezvous of detcoll: {self._fault}")
        if self._is_cut:  # perhaps the hub of a meeting before, which went just now
            raise Refusal("later", "the connection ended")
        if not isinstance(answer, wire.Welcome):
            raise ConnectError(self._silence("the hub did not say in time which ranks are missing"))
        if not self._host:
            local = str(self._connection.getsockname()[0])
            # On the host of rank 0 the way to it may be loopback, which is no way for others.
            self._host = answer.reach if answer.reach and is_loopback(local) else local

    def exchange(self, name: str, payload: bytes, deadline_ns: int, ranks: Sequence[int] | None = None) -> list[bytes]:
        """Give ``payload`` under ``name`` and return every rank's, in rank order; all ranks must call it.

        Parameters
        ----------
        name : str
            The same on all ranks; that is checked.
        payload : bytes
            At most 1 MiB, and less where there are more than 64 ranks: 64 MiB over the number of ranks.
        deadline_ns : int
            On this rank's `time.monotonic_ns`. The earliest deadline among the ranks counts for all.

        Raises
        ------
        ConnectError
            If not every rank called it before the deadline; names those that did not.
        PeerLost
            If a rank is lost or gave up, at once.
        """
        self._require_open()
        limit = min(_LARGEST_PAYLOAD_BYTES, wire.FRAME_BYTES // self.size - 64)
        if len(payload) > limit or len(name) > 1024:
            raise UsageError(f"exchange {name[:64]!r}: {len(payload)} bytes exceed the {limit} that a rank may give")
        self._raise_trouble(name)
        if ranks is None:
            self._number += 1
            number = self._number
        else:
            number = zlib.crc32(repr((name, list(ranks))).encode()) + 2**20
        remaining_ms = round(left(deadline_ns) * 1000)
        gather = wire.Gather(number, name, bytes(payload), remaining_ms, list(ranks or ()))
        self._send(wire.pack(gather), deadline_ns)
        answer = self._await(number, deadline_ns)
        if isinstance(answer, wire.Gathered):
            return answer.payloads
        if isinstance(answer, wire.Missing):
            self._raise_trouble(name)  # a loss says more than that somebody is missing
            raise ConnectError(f"exchange {name!r}: {answer.text or _never_came(answer.ranks, 'never arrived')}")
        self._raise_trouble(name)
        raise ConnectError(f"exchange {name!r}: {self._silence('the hub gave no answer in time')}")

    def fileno(self) -> int:
        """Return a descriptor that is readable when `events` has something to tell."""
        return self._epoll.fileno()

    def events(self) -> list[Event]:
        """Return what happened to other ranks since the last call. Never blocks."""
        with self._receiving:
            if not self._is_closed:
                self._pump()
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._told)
            told, self._pending = self._pending, []
            return told

    def abort(self, kind: str, text: str, group: int = 0) -> None:
        """Tell all other ranks that this one gives up, and why; best effort, never blocks for long.

        Parameters
        ----------
        kind : str
            What sort of trouble, such as ``"mismatch"`` or ``"error"``.
        text : str
            Shown to everybody; cut at 16384 characters.
        """
        if self._is_closed or self._is_cut:
            return
        with contextlib.suppress(ConnectError):
            frame = wire.pack(wire.Abort(kind, text[: wire.TEXT_CHARS], group))
            self._send(frame, time.monotonic_ns() + round(_ABORT_S * 1e9))

    def close(self, deadline_ns: int) -> None:
        """Say goodbye; rank 0 stays until all have, or the deadline passes. Idempotent."""
        with self._receiving:
            if self._is_closed:
                return
            self._is_closed = True
        if not self._is_cut:
            with contextlib.suppress(ConnectError):
                self._send(wire.pack(wire.Bye()), deadline_ns)
            while not self._is_cut and self._wait(deadline_ns):  # the hub answers by closing the connection
                self._pump()
        if self._hub is not None:
            self._hub.close(deadline_ns)
        self._release()

    def drop(self) -> None:
        """Give everything of this rank's side back at once, without a goodbye. Idempotent."""
        self._is_closed = True
        self._release()

    def forget(self) -> None:
        """Close the descriptors in a forked child, so that the death of the parent shows."""
        if not self._is_closed:
            self._is_closed = True
            self._free()
            if self._hub is not None:
                self._hub.forget()

    def _release(self) -> None:
        with self._sending, self._receiving:
            if not self._is_released:
                self._is_released = True
                self._free()

    def _free(self) -> None:
        self._epoll.close()
        self._connection.close()
        os.close(self._answered)
        os.close(self._told)

    def _require_open(self) -> None:
        if self._is_closed:
            raise Closed("the rendezvous is closed")

    def _silence(self, what: str) -> str:
        return f"the rendezvous at {self._where} did not answer: {what}; rank 0 hangs or is cut off"

    def _raise_trouble(self, name: str) -> None:
        if self._trouble:
            raise PeerLost(f"exchange {name!r}: {'; '.join(self._trouble)}")

    def _await(self, number: int, deadline_ns: int) -> wire.FromHub | None:
        """Return the hub's answer to an exchange; None when the time is over or somebody is in trouble."""
        while True:
            with self._receiving:
                self._pump()
                for answer in self._answers:
                    if not isinstance(answer, wire.Gathered | wire.Missing) or answer.number == number:
                        self._answers.clear()
                        return answer
                if self._trouble:
                    return None
            if not self._wait(deadline_ns):
                return None

    def _wait(self, deadline_ns: int) -> bool:
        """Wait for the hub, or for another thread that read its answer; False at the deadline."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        poll.register(self._answered, select.POLLIN)
        is_ready = bool(poll.poll(left(deadline_ns) * 1000))
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._answered)
        return is_ready

    def _pump(self) -> None:
        """Read what has come, without waiting."""
        with self._receiving:
            try:
                while not (self._is_cut or self._is_released):
                    data = self._connection.recv(2**18)
                    if not data:
                        self._cut()
                        return
                    self._inbox.feed(data)
                    while (message := self._inbox.from_hub()) is not None:
                        self._take(message)
            except BlockingIOError:
                pass
            except OSError:
                self._cut()
            except FrameError as error:
                self._fault = str(error)
                self._cut()

    def _take(self, message: wire.FromHub) -> None:
        match message:
            case wire.LostRank(rank):
                self._note(Lost(rank), f"rank {rank} is lost")
            case wire.AbortedRank(rank, kind, text, group):
                self._note(Aborted(rank, kind, text, group), "" if group else f"rank {rank} gave up ({kind}): {text}")
            case wire.Closing():
                self._has_parted = True
            case _:
                self._answers.append(message)
                os.eventfd_write(self._answered, 1)

    def _note(self, event: Event, text: str) -> None:
        self._pending.append(event)
        if text:
            self._trouble.append(text)
        os.eventfd_write(self._told, 1)
        os.eventfd_write(self._answered, 1)

    def _cut(self) -> None:
        """Note that the connection is over: rank 0 is gone, unless one of the two said goodbye."""
        self._is_cut = True
        with contextlib.suppress(OSError):
            self._epoll.unregister(self._connection)
        if self._has_parted:
            self._trouble.append("rank 0 has left")
            os.eventfd_write(self._answered, 1)
        elif not self._is_closed:
            self._note(Lost(0), "rank 0 is lost")

    def _send(self, frame: bytes, deadline_ns: int) -> None:
        """Send all of ``frame`` or break the connection: half a frame would spoil all that follow."""
        if not self._sending.acquire(timeout=left(deadline_ns)):
            raise ConnectError(self._silence("it does not read"))
        try:
            if not self._is_released and not self._send_all(frame, deadline_ns):
                raise ConnectError(self._silence("it does not read"))
        except OSError:
            self._pump()  # reads what the hub said before the connection broke, and notes that it broke
        finally:
            self._sending.release()

    def _send_all(self, frame: bytes, deadline_ns: int) -> bool:
        poll = select.poll()
        poll.register(self._connection, select.POLLOUT)
        rest = memoryview(frame)
        while rest:
            try:
                rest = rest[self._connection.send(rest, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                if not poll.poll(left(deadline_ns) * 1000):
                    if len(rest) < len(frame):
                        self._connection.shutdown(socket.SHUT_RDWR)
                    return False
        return True


def _never_came(ranks: Sequence[int], what: str = "never came") -> str:
    shown = ", ".join(str(rank) for rank in ranks[:32])
    more = f" and {len(ranks) - 32} more" if len(ranks) > 32 else ""
    return f"rank {shown}{more} {what}"
