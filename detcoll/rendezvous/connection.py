"""A rank's connection to the hub, and the thread that serves it.

A ZeroMQ socket may be used by one thread only, and a broken connection has to be restored even while no caller is
waiting. So one thread owns the socket: callers queue messages here and wait until `detcoll.rendezvous.member` has the
answer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from detcoll.errors import FrameError
from detcoll.rendezvous import wire
from detcoll.rendezvous.asking import Answer, Asker
from detcoll.rendezvous.channels import READ, WRITE, Change, Dealer, Sent, changes, endpoint_of, wait
from detcoll.rendezvous.link import Link
from detcoll.rendezvous.member import Member
from detcoll.rendezvous.sockets import Where, close_inherited, left
from detcoll.rendezvous.watch import Watch

_log = logging.getLogger("detcoll")

_AT_A_TIME = 256
_RETRY_NS = 20_000_000
_RENEWAL_NS = 1_000_000_000
"""How long ZeroMQ may take to reconnect; after that the socket is replaced, since ZeroMQ gives up for good where
something else answered at the address meanwhile."""
_JOIN_S = 5.0


@dataclass(slots=True)
class _Path:
    """State of the current connection."""

    dealer: Dealer
    link: Link
    watch: Watch
    is_up: bool = False
    renew_ns: int | None = None
    retry_ns: int | None = None


class Connection:
    """The connection to the hub at ``where``; `start` runs the thread that serves it.

    Parameters
    ----------
    member : Member
        Processes the hub's messages; accessed only while `changed` is held.
    where : tuple
        Numeric socket address.
    tolerance_ns : int
        How long the connection may be down before rank 0 counts as lost.
    life : socket.socket
        Listens as long as this process lives; owned by the connection.
    on_change : callable
        Called with `changed` held whenever the state of the member may have changed.
    """

    def __init__(
        self, member: Member, where: Where, tolerance_ns: int, life: socket.socket, on_change: Callable[[], None]
    ) -> None:
        self.changed = threading.Condition()
        self.fault = ""
        self._member, self._where, self._life, self._on_change = member, where, life, on_change
        self._asker: Asker[int] = Asker()
        self._is_stopping = self._is_stopped = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            dealer = Dealer(endpoint_of(where), tolerance_ns)
        except BaseException:
            os.close(self._wake)
            raise
        self._path = _Path(dealer, Link(2 * wire.MESSAGE_BYTES), Watch(tolerance_ns))
        self._thread = threading.Thread(target=self._serve, name="detcoll-session", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def post(self, message: wire.ToHub) -> int | None:
        """Queue a message for the hub, with `changed` held; return the number of its last piece, None if not queued."""
        link = self._path.link
        if link.is_full or self._is_stopping or self._member.hub_loss is not None or self._member.has_parted:
            return None
        number = link.send(wire.pack(message))
        os.eventfd_write(self._wake, 1)
        return number

    def deliver(self, message: wire.ToHub, deadline_ns: int) -> None:
        """Queue a message and wait until the hub has acknowledged it, the hub is gone, or the deadline passes."""
        with self.changed:
            number = self.post(message)
            if number is not None:
                self.changed.wait_for(lambda: self._is_delivered(number), left(deadline_ns))

    def stop(self) -> None:
        """Stop the thread and release all resources. Idempotent."""
        with self.changed:
            self._is_stopping = True
            if not self._is_stopped:
                os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join(_JOIN_S)
        elif not self._is_stopped:
            self._release()

    def forget(self) -> None:
        """Close the descriptors in a forked child, where the thread does not exist."""
        if self._is_stopped:
            return
        self._is_stopped = True
        os.close(self._wake)
        self._life.close()
        self._asker.close()
        close_inherited(lambda found: bool(found.getpeername()[:2] == self._where[:2]))

    def _is_delivered(self, number: int) -> bool:
        member = self._member
        return (
            self._path.link.acknowledged >= number
            or self._is_stopping
            or member.has_parted
            or member.hub_loss is not None
        )

    def _serve(self) -> None:
        try:
            while not self._is_stopping:
                self._turn()
        except Exception:
            _log.exception("the connection to the rendezvous ended")
            with self.changed:
                self._member.lose_hub("the connection to it broke")
                self._tell()
        finally:
            self._release()

    def _release(self) -> None:
        self._asker.close()
        self._life.close()
        self._path.dealer.close()
        with self.changed:  # here, since the thread may take longer to end than `stop` waits
            self._is_stopped = True
            os.close(self._wake)

    def _turn(self) -> None:
        path = self._path
        asked = self._asker.begin(time.monotonic_ns())
        wait(
            [
                (path.dealer.socket, READ),
                (path.dealer.monitor, READ),
                (self._wake, READ),
                (self._life.fileno(), READ),
                *((connection.fileno(), WRITE) for connection in asked),
            ],
            self._next_ns(),
        )
        now_ns = time.monotonic_ns()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        with contextlib.suppress(OSError):  # accepting proves that this process lives; nothing is read
            self._life.accept()[0].close()
        with self.changed:
            self._look_at_connection(now_ns)
            is_drained = self._take_in()
            self._on_time(now_ns, is_drained)
            self._pass_on(now_ns)

    def _next_ns(self) -> int | None:
        path = self._path
        if self._is_over:
            return None
        times = [path.watch.next_ns(), self._asker.next_ns(), path.retry_ns, path.renew_ns]
        return min((time_ns for time_ns in times if time_ns is not None), default=None)

    @property
    def _is_over(self) -> bool:
        """Whether the hub is lost or has closed."""
        return self._member.hub_loss is not None or self._member.has_parted

    def _look_at_connection(self, now_ns: int) -> None:
        path = self._path
        for change, _ in changes(path.dealer.monitor, _AT_A_TIME):
            match change:
                case Change.READY:
                    path.is_up, path.renew_ns = True, None
                    path.watch.up()
                    path.link.restart()
                    path.dealer.send(path.link.note(wire.HERE))
                case Change.REFUSED:
                    if self._member.greeting is None:
                        self.fault = "it speaks ZeroMQ, but another protocol"
                        self._tell()
                case Change.ENDED:
                    path.is_up, path.renew_ns = False, path.renew_ns or now_ns + _RENEWAL_NS
                    path.watch.down(now_ns)
        if path.renew_ns is not None and now_ns >= path.renew_ns and not self._is_over:
            path.renew_ns = None
            try:
                path.dealer.renew()
            except OSError as error:
                _log.debug("rendezvous: no new connection yet: %s", error)
                path.renew_ns = now_ns + _RENEWAL_NS

    def _take_in(self) -> bool:
        """Process received frames; return whether the socket is drained."""
        for _ in range(_AT_A_TIME):
            data = self._path.dealer.receive()
            if data is None:
                return True
            try:
                header, piece = wire.parse(data)
                message = piece if header.number == 0 and piece else self._path.link.take(header, piece)
                if message is not None:
                    self._member.take(wire.from_hub(message))
            except FrameError as error:
                self.fault = str(error)
                self._member.lose_hub(f"it sent an invalid message ({error})")
            self._tell()
        os.eventfd_write(self._wake, 1)
        return False

    def _on_time(self, now_ns: int, is_drained: bool) -> None:
        watch = self._path.watch
        if self._is_over:
            self._asker.close()
            return
        if watch.must_ask(now_ns):
            self._asker.ask(0, (self._where[0], self._where[1]))
        for _, answer in self._asker.answers(now_ns):
            if answer is Answer.REFUSED:
                watch.refused(now_ns)
        loss = watch.loss(now_ns)
        if loss is not None and is_drained:  # first process the last messages it sent
            self._member.lose_hub(loss)
            self._tell()

    def _pass_on(self, now_ns: int) -> None:
        path = self._path
        path.retry_ns = None
        if not path.is_up:
            return
        for frame in path.link.frames():
            if path.dealer.send(frame) is Sent.FULL:
                path.link.restart()
                path.retry_ns = now_ns + _RETRY_NS
                return

    def _tell(self) -> None:
        self._on_change()
        self.changed.notify_all()
