"""The hub's thread, in the process of rank 0: it does the I/O for the decisions of `detcoll.rendezvous.hub`.

Each iteration of the loop handles a bounded number of events and then the timers, so that a flood of messages cannot
delay a deadline.

Rank 0 gets its messages last, once those for the other ranks have been passed to ZeroMQ. What rank 0 does next may
block the interpreter, and with it this thread, until all ranks arrive: mpi4py holds the GIL throughout ``MPI_Init``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from detcoll.errors import FrameError
from detcoll.rendezvous import wire
from detcoll.rendezvous.asking import Answer, Asker
from detcoll.rendezvous.channels import READ, WRITE, Change, Router, Sent, changes, wait
from detcoll.rendezvous.door import Door, local_host
from detcoll.rendezvous.hub import Hub
from detcoll.rendezvous.link import Link
from detcoll.rendezvous.sockets import close_inherited, is_loopback
from detcoll.rendezvous.watch import Watch

_log = logging.getLogger("detcoll")

_AT_A_TIME = 256
_LINGER_MS = 500
_RETRY_NS = 20_000_000
_CHECKS_NS = (0, 10_000_000, 100_000_000, 1_000_000_000)
"""Delays of the checks after the monitor reports a disconnect: ZeroMQ reports it before it drops its routing entry."""


@dataclass(eq=False, slots=True)
class _Seat:
    """A rank that was admitted."""

    rank: int
    token: bytes
    link: Link
    watch: Watch
    descriptor: int
    life: tuple[str, int] | None
    is_reachable: bool | None = None
    is_gone: str = ""
    checks: deque[int] = field(default_factory=deque)

    def check_after(self, now_ns: int) -> None:
        """Schedule checks within the next second of whether the connection has ended."""
        self.checks = deque(now_ns + later_ns for later_ns in _CHECKS_NS)


_UNKNOWN = -1
"""Descriptor of a seat whose connection ended, until a frame arrives over a new one."""


class Seats:
    """The admitted ranks, by session token and by rank."""

    def __init__(self) -> None:
        self._by_token: dict[bytes, _Seat] = {}
        self._by_rank: dict[int, _Seat] = {}

    def __iter__(self) -> Iterator[_Seat]:
        return iter(self._by_rank.values())

    def add(self, seat: _Seat) -> None:
        """Add an admitted rank."""
        self._by_token[seat.token] = self._by_rank[seat.rank] = seat

    def at(self, token: bytes) -> _Seat | None:
        """Return the seat of the rank with this token, or None."""
        return self._by_token.get(token)

    def of(self, rank: int) -> _Seat | None:
        """Return the seat of a rank, or None if it was not admitted."""
        return self._by_rank.get(rank)

    def is_rank(self, descriptor: int) -> bool:
        """Return whether this is the current connection of a rank that is up."""
        return any(seat.descriptor == descriptor and not seat.watch.is_down for seat in self)


class Server:
    """Serves the rendezvous of one world.

    Parameters
    ----------
    listener : socket.socket
        A listening TCP socket; owned by the server.
    hub : Hub
        The rules.
    tolerance_ns : int
        How long the connection of a rank may be down before it counts as lost.
    directory : socket.socket, optional
        A listening Unix socket, owned by the server. Processes of the same user that connect there get ``where``.
    where : str
        The address of ``listener``.
    """

    def __init__(
        self,
        listener: socket.socket,
        hub: Hub,
        tolerance_ns: int,
        directory: socket.socket | None = None,
        where: str = "",
    ) -> None:
        self._hub, self._tolerance_ns, self._directory, self._where = hub, tolerance_ns, directory, where
        if directory is not None:
            directory.setblocking(False)
        self._port = listener.getsockname()[1]
        self._router = Router(listener, tolerance_ns)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._seats = Seats()
        self._door = Door(hub.size, self._seats.is_rank)
        self._asker: Asker[int] = Asker()
        self._is_drained = True
        self._finish_ns: int | None = None
        self._is_closed = False
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="detcoll-rendezvous", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, deadline_ns: int) -> None:
        """Serve until every rank has left or was told why the meeting failed, or the deadline passes. Idempotent."""
        with self._ending:
            self._finish_ns = deadline_ns
            if not self._is_closed:
                os.eventfd_write(self._wake, 1)
        self._thread.join(max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9) + 5.0)

    def forget(self) -> None:
        """Close the descriptors in a forked child, where the thread does not exist."""
        if self._is_closed:
            return
        self._is_closed = True
        os.close(self._wake)
        self._asker.close()
        if self._directory is not None:
            self._directory.close()
        close_inherited(lambda found: bool(found.getsockname()[1] == self._port))

    def _serve(self) -> None:
        try:
            while not self._is_over(time.monotonic_ns()):
                self._turn()
            self._hub.close()
            self._pass_on(time.monotonic_ns())
        except Exception:
            _log.exception("the rendezvous of rank 0 ended")
        finally:
            self._asker.close()
            if self._directory is not None:
                self._directory.close()
            self._router.close(_LINGER_MS)
            with self._ending:  # here, since the thread may take longer to end than `close` waits
                self._is_closed = True
                os.close(self._wake)

    def _is_over(self, now_ns: int) -> bool:
        return self._finish_ns is not None and (self._hub.is_over or now_ns >= self._finish_ns)

    def _turn(self) -> None:
        asked = self._asker.begin(time.monotonic_ns())
        items: list[tuple[Any, int]] = [
            (self._router.socket, READ),
            (self._router.gate, READ),
            (self._router.monitor, READ),
            (self._wake, READ),
            *((connection.fileno(), WRITE) for connection in asked),
        ]
        if self._directory is not None:
            items.append((self._directory.fileno(), READ))
        wait(items, self._next_ns())
        now_ns = time.monotonic_ns()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        self._look_at_connections(now_ns)
        self._take_in(now_ns)
        self._on_time(now_ns)
        self._pass_on(now_ns)

    def _next_ns(self) -> int | None:
        times = [self._hub.next_ns(), self._door.next_ns(), self._asker.next_ns(), self._finish_ns]
        for seat in self._seats:
            if not seat.is_gone:
                times += [seat.watch.next_ns(), seat.checks[0] if seat.checks else None]
        if not self._is_drained:
            return 0
        return min((time_ns for time_ns in times if time_ns is not None), default=None)

    def _look_at_connections(self, now_ns: int) -> None:
        for change, descriptor in changes(self._router.monitor, _AT_A_TIME):
            if change is Change.OPENED:
                self._door.opened(descriptor, now_ns)
                continue
            self._door.closed(descriptor)
            for seat in self._seats:
                if seat.descriptor in (descriptor, _UNKNOWN):
                    seat.check_after(now_ns)
        for _ in range(_AT_A_TIME):
            if not self._router.admit():
                break
        if self._directory is not None:
            with contextlib.suppress(OSError):
                connection, _ = self._directory.accept()
                with connection:
                    if peer_uid(connection) == os.getuid():
                        connection.send(self._where.encode(), socket.MSG_NOSIGNAL)

    def _take_in(self, now_ns: int) -> None:
        for _ in range(_AT_A_TIME):
            found = self._router.receive()
            if found is None:
                self._is_drained = True
                return
            token, data, descriptor, host = found
            seat = self._seats.at(token)
            try:
                header, piece = wire.parse(data)
                if seat is None:
                    self._greet(token, header, piece, descriptor, host, now_ns)
                else:
                    self._take(seat, header, piece, descriptor, now_ns)
            except FrameError as error:
                _log.debug("rendezvous: %s", error)
                if seat is None:
                    self._door.end(descriptor)
                else:
                    self._lose(seat, f"it sent an invalid message ({error})")
        self._is_drained = False

    def _greet(self, token: bytes, header: wire.Header, piece: bytes, descriptor: int, host: str, now_ns: int) -> None:
        """Process a frame from a sender that has no seat."""
        if header.number != 1:
            if header.number or header.received:  # a session with an earlier hub; a new one begins with an empty note
                self._refuse(token, wire.Refused("world", "the hub that it had joined is gone"))
            return
        if len(piece) > wire.HELLO_BYTES:
            raise FrameError(f"a hello of {len(piece)} bytes")
        hello = wire.to_hub(piece)
        if not isinstance(hello, wire.Hello):
            raise FrameError("the first message is not a hello")
        refusal = self._hub.greet(hello, now_ns)
        if refusal is not None:
            self._refuse(token, refusal)
            return
        life = (host, hello.port) if hello.port and host else None
        seat = _Seat(hello.rank, token, Link(wire.RANK_BYTES), Watch(self._tolerance_ns), descriptor, life)
        self._seats.add(seat)
        if life is not None:
            self._asker.ask(seat.rank, life)
            self._asker.begin(now_ns)  # probe before the rank is admitted, since it may leave at once
        seat.link.take(header, b"")
        self._door.closed(descriptor)
        local = local_host(descriptor)
        if local and not is_loopback(local):
            self._hub.reach = local
        if self._hub.is_assembled:
            self._hub.welcome()

    def _refuse(self, token: bytes, refusal: wire.Refused | wire.Missing) -> None:
        self._router.send(token, wire.frame(wire.Header(0, 0, 0), wire.pack(refusal)))

    def _take(self, seat: _Seat, header: wire.Header, piece: bytes, descriptor: int, now_ns: int) -> None:
        seat.descriptor = descriptor
        self._door.closed(descriptor)
        if header.flags & wire.HERE:
            seat.watch.up()
            seat.link.restart()
            seat.check_after(now_ns)
        message = seat.link.take(header, piece)
        if seat.is_gone:
            self._refuse(seat.token, wire.Refused("world", f"rank 0 gave this rank up: {seat.is_gone}"))
            return
        if message is None:
            return
        match wire.to_hub(message):
            case wire.Hello():
                raise FrameError("a second hello")
            case wire.Gather() as gather:
                self._hub.gather(seat.rank, gather, now_ns)
            case wire.Abort() as abort:
                self._hub.abort(seat.rank, abort)
            case wire.Bye():
                self._hub.leave(seat.rank)

    def _on_time(self, now_ns: int) -> None:
        for rank, answer in self._asker.answers(now_ns):
            self._learn(rank, answer, now_ns)
        for seat in self._seats:
            if seat.is_gone:
                continue
            while seat.checks and now_ns >= seat.checks[0]:
                seat.checks.popleft()
                self._send(seat, [seat.link.note()], now_ns)
            if seat.watch.must_ask(now_ns):
                self._seek(seat, now_ns)
            loss = seat.watch.loss(now_ns)
            if loss is not None and self._is_drained:  # first process the last messages it sent
                self._lose(seat, loss)
        self._door.on_time(now_ns)
        self._hub.on_time(now_ns)

    def _seek(self, seat: _Seat, now_ns: int) -> None:
        """Check whether a rank has reconnected, which its ZeroMQ does even while the rank is busy; else probe it."""
        if self._router.send(seat.token, seat.link.note()) is Sent.OUT:
            seat.watch.up()
            seat.link.restart()
        elif seat.life is not None and seat.is_reachable is not False:
            self._asker.ask(seat.rank, seat.life)

    def _learn(self, rank: int, answer: Answer, now_ns: int) -> None:
        """Process the result of a probe; a refusal counts only if probes of the live rank were not refused before."""
        seat = self._seats.of(rank)
        if seat is None:
            return
        if seat.watch.is_down:
            if answer is Answer.REFUSED and seat.is_reachable is not False:
                seat.watch.refused(now_ns)
        else:
            seat.is_reachable = answer is Answer.ACCEPTED

    def _lose(self, seat: _Seat, why: str) -> None:
        seat.is_gone = why
        seat.checks.clear()
        self._asker.forget(seat.rank)
        self._hub.lose(seat.rank, why)

    def _pass_on(self, now_ns: int) -> None:
        """Pass pending messages to ZeroMQ; those for rank 0 only after all others."""
        last, packed = None, b""
        while answers := self._hub.answers():
            for rank, message in answers:
                if message is not last:
                    last, packed = message, wire.pack(message)
                seat = self._seats.of(rank)
                if seat is not None and not seat.is_gone:
                    seat.link.send(packed)
                    if seat.link.is_full:
                        self._lose(seat, "it does not read the messages of the hub")
        first = self._seats.of(0)
        for seat in self._seats:
            if seat is not first:
                self._flush(seat, now_ns)
        if first is not None and not any(seat.link.has_waiting for seat in self._seats if self._counts(seat)):
            self._flush(first, now_ns)

    def _counts(self, seat: _Seat) -> bool:
        """Return whether messages for this seat must be sent before those for rank 0."""
        return seat.rank != 0 and not seat.is_gone and not seat.watch.is_down

    def _flush(self, seat: _Seat, now_ns: int) -> None:
        if not (seat.is_gone or seat.watch.is_down):
            self._send(seat, seat.link.frames(), now_ns)

    def _send(self, seat: _Seat, frames: list[bytes], now_ns: int) -> None:
        for frame in frames:
            sent = self._router.send(seat.token, frame)
            if sent is Sent.OUT:
                continue
            seat.link.restart()
            if sent is Sent.UNREACHABLE:
                seat.checks.clear()
                seat.descriptor = _UNKNOWN
                seat.watch.down(now_ns)
            else:
                seat.checks.appendleft(now_ns + _RETRY_NS)
            return


def peer_uid(connection: socket.socket) -> int:
    """Return the user id of the process at the other end of a Unix socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])
