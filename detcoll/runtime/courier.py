"""The courier: carries out on endpoints what the engine says, and tells the engine what came of it.

An action of the engine (`detcoll.runtime.actions`) becomes a send, a receive, or something done to a call's memory. The
context of a ticket says what it is about. A ticket that has ended becomes an event of the engine, and what the engine
says to that is carried out at once::

    Engine.actions -> act -> Endpoint.send, recv, discard   Memory.open, keep, store, close
    Engine.received, sent, missed, failed, greeted, message <- take <- Ticket

Tickets whose context is none of these belong to the timekeeper.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from detcoll.descriptor import HELLO_BYTES
from detcoll.errors import FrameError, PeerLost, TransportError
from detcoll.machine import Queued
from detcoll.plan.ir import Buffer
from detcoll.runtime.actions import Act
from detcoll.runtime.control import CONTROL_BYTES, CONTROL_TAG, Cause, Message, pack, unpack
from detcoll.runtime.copying import Copying
from detcoll.runtime.endings import Endings
from detcoll.runtime.engine import HELLO_TAG, Engine, Wide
from detcoll.runtime.group import Group
from detcoll.runtime.memory import Memory, ScratchPool
from detcoll.runtime.operation import Operation
from detcoll.runtime.postman import COPIES, Postman
from detcoll.runtime.routes import Routes
from detcoll.runtime.transfer import Posting, Transfer
from detcoll.trace import Call, Trace
from detcoll.transport import Ticket, TicketStatus, Window

log = logging.getLogger("detcoll")

STEP, HELLO, CONTROL, SENT_RECORD, MAIL = range(5)
"""What a ticket is about, the first entry of its context."""


class Courier:
    """Stands between the engine of one rank and its endpoints; only the progress thread uses it.

    ``endings`` : failed calls whose callers have not heard of it yet.  ``peers_may_leave`` : whether peers may close
    their endpoints, since nothing is under way any more.

    Parameters
    ----------
    engine : Engine
        Decides.
    routes : Routes
        The endpoint of each rank.
    trace : Trace
        Where calls and sends are noted.
    announce : callable
        Tells a cause to all other ranks through the rendezvous.
    record : callable
        Called with the reason when a group has failed.
    ended : callable
        Called when a call ends, before its caller hears of it.
    stop_natives : callable
        Ends the native collectives of a group, because of an error.
    """

    def __init__(
        self, engine: Engine, routes: Routes, trace: Trace, announce: Callable[[Cause], None],
        record: Callable[[str], object], ended: Callable[[], object],
        stop_natives: Callable[[Group, Exception], None] = lambda group, error: None,
    ) -> None:  # fmt: skip
        self._engine, self._routes, self._trace, self._ended = engine, routes, trace, ended
        self._endpoint_of, self._pool = routes.endpoint_of, ScratchPool()
        self.endings, self.peers_may_leave = Endings(), False
        self.copying: Copying | None = None
        self.note: Callable[[Callable[[int], None]], None] | None = None
        """Lets the progress thread call something soon; of its loop."""
        self._postman = Postman(
            engine, self._post_recv, self._post_send, self._settle, self._note_send, self._lose, self._copy_message,
            MAIL,
        )  # fmt: skip
        self._carry: tuple[Callable[..., object], ...] = (
            self._open, self._recv, self._send, self._hello, self._await_hello, self._copy, self._finish,
            self._close_call, self._listen, self._tell, announce, self._discard, record, self._lift, self._postman.act,
            stop_natives, self._onsite,
        )  # fmt: skip

    # Actions.

    def act(self) -> None:
        """Carry out what the engine says, also what is added meanwhile."""
        actions = self._engine.actions
        if not actions:
            return
        left = iter(actions)
        try:
            for action in left:
                self._carry[action[0]](*action[1:])
        except BaseException:  # callers whose calls end by what is left must hear of it, see `conclude`
            actions[:] = [*left]
            raise
        del actions[:]

    def conclude(self, *, records: bool) -> None:
        """End for their callers the calls that the engine has ended, and do nothing else that it says.

        What such a call copies within this rank it copies first.

        ``records`` : write the flight record where it says so, and end native collectives.
        """
        wanted = (Act.FINISH, Act.RECORD, Act.STOP) if records else (Act.FINISH,)
        for action in self._engine.actions:
            if action[0] in wanted or (action[0] is Act.MAIL and action[1] in COPIES):
                try:
                    self._carry[action[0]](*action[1:])
                except Exception:  # others still wait for their calls to end
                    log.exception("rank %d: ending what was under way", self._engine.rank)
        self._engine.actions.clear()
        self.report_overdue(None)

    def report_overdue(self, now_ns: int | None) -> None:
        """Report failed calls that were held for as long as is allowed, all if None."""
        for operation, error in self.endings.overdue(now_ns):
            self._report(operation, error)

    def _open(self, operation: Operation) -> None:
        if operation.over:
            return
        memory: Memory = operation.memory
        try:
            memory.open(operation.plan, self._pool)
            if memory.load is not None:
                memory.load()
        except Exception as problem:
            error = TransportError(f"{operation.title}: its memory cannot be used: {problem!r}")
            error.__cause__ = problem
            self._engine.failures.broken(operation, error, time.monotonic_ns())

    def _recv(self, operation: Operation, step: int) -> None:
        if operation.over:
            self._settle(operation, step)
            return
        row = operation.plan.rows[step]
        memory: Memory = operation.memory
        into = None if row.buffer == Buffer.LENT else memory.view(row.buffer, row.offset, row.length)
        peer, tag = operation.peer(step), operation.prefix | row.tag
        self._post_recv(peer, tag, operation.plan.message_bytes(step), (STEP, operation, step, None), into)

    def _send(self, operation: Operation, step: int, queued: Queued[Wide] | None, window: Window | None) -> None:
        if operation.over:
            return
        row = operation.plan.rows[step]
        view = operation.memory.view(row.buffer, row.offset, row.length)
        if queued is not None and queued.sent_bytes:
            view = view[queued.sent_bytes :]
        peer, tag = operation.peer(step), operation.prefix | row.tag
        self._post_send(peer, tag, view, (STEP, operation, step, (queued, window)), window)

    def _hello(self, operation: Operation, peer: int) -> None:
        if operation.over:
            return
        hello = operation.memory.hello or operation.described_to(peer).encode()
        self._post_send(peer, operation.prefix | HELLO_TAG, memoryview(hello), (SENT_RECORD, hello))

    def _await_hello(self, operation: Operation, peer: int) -> None:
        if operation.over:
            return
        tag = operation.prefix | HELLO_TAG
        self._post_recv(peer, tag, HELLO_BYTES, (HELLO, operation))

    def _listen(self, peer: int) -> None:
        self._post_recv(peer, CONTROL_TAG, CONTROL_BYTES, (CONTROL,))

    def _tell(self, peer: int, message: Message) -> None:
        record = pack(message)
        self._post_send(peer, CONTROL_TAG, memoryview(record), (SENT_RECORD, record))

    def _post_recv(
        self, peer: int, tag: int, nbytes: int, context: tuple[Any, ...], into: memoryview | None = None
    ) -> None:
        try:
            self._endpoint_of[peer].recv(peer, tag, nbytes, into).context = context
        except PeerLost as error:
            if context[0] == STEP:
                self._settle(context[1], context[2])
            elif context[0] == MAIL and isinstance(context[2], Transfer):
                self._settle(context[2], context[3])
            self._engine.failures.suspect(peer, error, time.monotonic_ns())

    def _post_send(
        self, peer: int, tag: int, view: memoryview, context: tuple[Any, ...], window: Window | None = None
    ) -> None:
        try:
            self._endpoint_of[peer].send(peer, tag, view, window).context = context
        except PeerLost as error:
            self._engine.failures.suspect(peer, error, time.monotonic_ns())

    def _discard(self, tag: int, bits: int) -> None:
        for endpoint in self._routes.endpoints:
            endpoint.discard(tag, bits)

    def _lift(self, tag: int, ranks: Sequence[int]) -> None:
        """End the dropping of a call's tags, as posting a receive does."""
        for endpoint in self._routes.endpoints:
            peer = next((rank for rank in ranks if self._endpoint_of.get(rank) is endpoint), None)
            if peer is not None:
                with contextlib.suppress(PeerLost):
                    endpoint.cancel(endpoint.recv(peer, tag, 0))

    def _copy(self, operation: Operation, step: int) -> None:
        operation.memory.keep(step)

    def _onsite(self, operation: Operation, step: int) -> None:
        note, engine = self.note, self._engine
        if operation.over:
            return
        assert note is not None
        operation.memory.onsite.begin(
            step == 0, lambda: note(lambda now_ns: engine.worked(operation, step, now_ns))
        )  # fmt: skip

    def _copy_message(self, transfer: Transfer) -> None:
        assert self.copying is not None
        self.copying.begin(transfer, 0, transfer.memory.device_copy(to_device=not transfer.is_send))

    def _finish(self, operation: Operation | Transfer, error: Exception | None) -> None:
        memory = operation.memory
        if self.copying is not None and memory.devices is not None:
            self.copying.end(operation)
        if error is not None:
            try:
                memory.drop()
            finally:
                if not self.endings.hold(operation, error, time.monotonic_ns()):
                    self._report(operation, error)
            return
        try:
            if memory.store is not None:
                memory.store()
        except Exception as problem:  # scratch stays until CLOSE: the rest of the plan goes on for others
            error = TransportError(f"{operation.title}: the result could not be stored: {problem!r}")
            error.__cause__ = problem
        else:
            if isinstance(operation, Operation):
                self._note_end(operation)
            elif not operation.is_send:
                memory.work.came(operation.group.ranks.index(operation.source), operation.tag)
        finally:
            self._report(operation, error)

    def _report(self, operation: Operation | Transfer, error: Exception | None) -> None:
        """Let the caller hear that its call has ended."""
        self._ended()
        operation.memory.work.finish(error)

    def _settle(self, operation: Operation | Transfer, step: int) -> None:
        """Take note that nothing is written any more for a receive of a call that has failed."""
        operation.settled.add(step)
        error = self.endings.ended(operation, step)
        if error is not None:
            self._report(operation, error)

    def _close_call(self, operation: Operation) -> None:
        operation.memory.close(self._pool)

    # Events.

    def take(self, ticket: Ticket, missed: list[tuple[Queued[Wide], Window, int]]) -> None:
        """Tell the engine how a ticket ended, and carry out what it says to that.

        ``missed`` : gets sends that did not end in their window.
        """
        context = ticket.context
        if not isinstance(context, tuple):
            self._take_other(ticket)
        elif context[0] == STEP:
            self._take_step(ticket, context[1], context[2], context[3], missed)
        elif context[0] == MAIL:
            self._postman.take(ticket, missed)
        elif context[0] == HELLO:
            self._take_hello(ticket, context[1])
        elif context[0] == CONTROL:
            self._take_control(ticket)
        elif ticket.status is TicketStatus.FAILED:
            self._lose(ticket)
        if self._engine.actions:
            self.act()

    def _take_step(
        self, ticket: Ticket, operation: Operation, step: int, wide: tuple[Queued[Wide] | None, Window | None] | None,
        missed: list[tuple[Queued[Wide], Window, int]],
    ) -> None:  # fmt: skip
        if operation.over:
            ticket.release()
            self._settle(operation, step)
            return
        now_ns = time.monotonic_ns()
        if ticket.status is TicketStatus.DONE:
            if wide is None:
                if ticket.view is not None:
                    operation.memory.lent[step] = ticket
                self._engine.received(operation, step, now_ns)
                return
            self._note_send(operation, ticket, wide, ticket.nbytes)
            self._engine.sent(operation, step, now_ns)
        elif ticket.status is TicketStatus.MISSED and wide is not None:
            queued, window = wide
            assert queued is not None
            assert window is not None
            missed.append((queued, window, ticket.sent_bytes))
            self._note_send(operation, ticket, wide, ticket.sent_bytes)
        elif ticket.status is not TicketStatus.CANCELLED:
            error = ticket.error or PeerLost(f"rank {ticket.peer}: {ticket.kind.value} was {ticket.status.value}")
            self._engine.failed(operation, step, ticket.peer, error, now_ns)

    def _take_hello(self, ticket: Ticket, operation: Operation) -> None:
        if ticket.status is TicketStatus.DONE:
            record = bytes(ticket.view or b"")
            ticket.release()
            self._engine.greeted(operation, ticket.peer, record, time.monotonic_ns())
        elif ticket.status is TicketStatus.FAILED:
            self._lose(ticket)

    def _take_control(self, ticket: Ticket) -> None:
        if ticket.status is TicketStatus.DONE:
            record = bytes(ticket.view or b"")
            ticket.release()
            self._listen(ticket.peer)
            try:
                self._engine.failures.message(ticket.peer, unpack(record), time.monotonic_ns())
            except FrameError as error:
                log.warning("rank %d: from rank %d: %s", self._engine.rank, ticket.peer, error)
        elif ticket.status is TicketStatus.FAILED:
            self._lose(ticket)
            if isinstance(ticket.error, FrameError):  # one message that cannot be read ends nothing
                log.warning("rank %d: from rank %d: %s", self._engine.rank, ticket.peer, ticket.error)
                self._listen(ticket.peer)

    def _lose(self, ticket: Ticket) -> None:
        """Take in that a peer is lost; once nothing is under way any more, peers may leave."""
        if isinstance(ticket.error, PeerLost) and not self.peers_may_leave:
            self._engine.failures.suspect(ticket.peer, ticket.error, time.monotonic_ns())

    def _take_other(self, ticket: Ticket) -> None:
        """Hand over what has come for the timekeeper; who asked last may have closed meanwhile."""
        if ticket.status is TicketStatus.FAILED:
            self._lose(ticket)
        if ticket.context is not None:
            with contextlib.suppress(PeerLost):
                ticket.context(ticket)

    # Notes.

    def _note_send(
        self, operation: Operation | Transfer | Posting, ticket: Ticket,
        wide: tuple[Queued[Wide] | None, Window | None], nbytes: int,
    ) -> None:  # fmt: skip
        if ticket.peer not in self._routes.wide:
            return
        queued, window = wide
        begins_ns, ends_ns = 0, 0
        if window is not None:
            begins_ns, ends_ns = window.not_before_ns, window.not_after_ns or 0
            if ticket.status is TicketStatus.DONE and queued is not None:
                self._engine.slots.sent(queued, window)
        if not self._trace.recording or (not nbytes and ticket.nbytes):
            return
        trimmed = ticket.status is TicketStatus.MISSED and queued is not None and queued.fits
        self._trace.sends.append(
            (
                operation.sequence, ticket.peer, nbytes, begins_ns, ends_ns,
                ticket.started_ns, ticket.left_ns, ticket.ended_ns, trimmed, operation.group.number,
            )
        )  # fmt: skip

    def _note_end(self, operation: Operation) -> None:
        if self._trace.recording:
            plan, group = operation.plan, operation.group
            collective = plan.collective
            predicted = None if plan.mates else collective  # what devices take is not known
            call = Call(operation.descriptor.kind, collective.nbytes, plan.algorithm, predicted, group.number)
            self._trace.note_collective(operation.sequence, call, operation.called_ns, time.monotonic_ns())
