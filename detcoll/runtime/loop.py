"""The progress thread: one a job. It owns the endpoints, and carries out on them what the engine says.

A turn of its loop: take in what callers posted, start calls, fold and copy for a while, give the line what is due, then
wait on everything at once until a ticket ends, a window opens or a deadline passes. It has no rules of its own: what
happened goes to `detcoll.runtime.engine`, and the engine's actions are carried out before the next event.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Sequence
from typing import Any, Protocol

from detcoll.descriptor import HELLO_BYTES
from detcoll.errors import Closed, DetcollError, FrameError, PeerLost, TransportError
from detcoll.machine import Queued
from detcoll.plan.ir import Buffer, Kind
from detcoll.priority import make_prompt, quick_switches, shorten_turns
from detcoll.runtime.actions import Act
from detcoll.runtime.control import (
    CONTROL_BYTES,
    CONTROL_TAG,
    JOB_ID,
    WHOLE_GROUP,
    Cause,
    Message,
    pack,
    unpack,
)
from detcoll.runtime.endings import Endings
from detcoll.runtime.engine import HELLO_TAG, Engine, Wide
from detcoll.runtime.group import Group
from detcoll.runtime.membership import Membership
from detcoll.runtime.memory import Memory, ScratchPool
from detcoll.runtime.operation import Operation
from detcoll.runtime.routes import Routes
from detcoll.runtime.timekeeping import Timekeeper
from detcoll.trace import Call, Trace
from detcoll.transport import Ticket, TicketStatus, Window

log = logging.getLogger("detcoll")

LARGEST_QUEUE = 4096
"""Calls that have not ended; who makes more waits."""

_BUSY_NS = 200_000
"""How long a turn folds and copies before it looks at the endpoints again."""

_UNWAITABLE_STEP_NS = 200_000
_LONGEST_WAIT_NS = 500_000_000

STEP, HELLO, CONTROL, SENT_RECORD = range(4)
"""What a ticket is about, the first entry of its context."""


class Rest(Protocol):
    """The rendezvous as the loop sees it: who is gone, and what others gave up for."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when `tell` has something to say."""

    def tell(self, engine: Engine, now_ns: int) -> None:
        """Tell the engine what has been heard, without waiting."""

    def announce(self, cause: Cause) -> None:
        """Tell all other ranks."""


class Loop:
    """Drives the engine of one rank. Its many fields are what a driver holds: endpoints, thread, queue, wake-up.

    Parameters
    ----------
    engine : Engine
        Decides; only the loop's thread touches it once `start` was called.
    routes : Routes
        The endpoint of each rank.
    timekeeper : Timekeeper
        Knows the time of the site.
    rest : Rest
        The rendezvous.
    trace : Trace
        Where calls and sends are noted.
    on_failure : callable
        Called with the reason when a group has failed.
    """

    def __init__(
        self, engine: Engine, routes: Routes, timekeeper: Timekeeper, rest: Rest, trace: Trace,
        on_failure: Callable[[str], object] = lambda reason: None,
    ) -> None:  # fmt: skip
        self.engine, self.routes, self.timekeeper = engine, routes, timekeeper
        self._rest, self._trace, self._on_failure = rest, trace, on_failure
        self._pool, self._endings = ScratchPool(), Endings()
        self._lock = threading.Lock()
        self._posted: deque[Callable[[int], None]] = deque()
        self._room = threading.Semaphore(LARGEST_QUEUE)
        self._failure: Exception | None = None
        self._closing = self._stopping = self._asleep = False
        self._awaited_idle: list[tuple[Membership, threading.Event]] = []
        self._drained = threading.Event()
        self.synchronised = threading.Event()
        """Set once this rank knows the time of its site."""
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._endpoints = routes.endpoints
        self._polled = [(endpoint, endpoint.fileno()) for endpoint in self._endpoints]
        self._has_silent = any(descriptor is None for _, descriptor in self._polled)
        self._waiter = self._make_waiter()
        self._carry = (
            self._open, self._recv, self._send, self._hello, self._await_hello, self._copy, self._finish,
            self._close_call, self._listen, self._tell, self._announce, self._discard, self._record,
            self._lift,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._run, name=f"detcoll-{engine.rank}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    # What callers use, from any thread.

    def submit(self, operation: Operation) -> None:
        """Hand a call over; its work ends when the call does. Waits while too many calls have not ended.

        Raises
        ------
        Closed
            If the job is closing or its progress thread has failed.
        """
        while not self._room.acquire(timeout=_LONGEST_WAIT_NS / 1e9):
            self._check_open()
        try:
            self.post(lambda now_ns: self.engine.submit(operation, now_ns))
        except BaseException:
            self._room.release()
            raise

    def post(self, action: Callable[[int], None]) -> None:
        """Let the thread call ``action(now_ns)`` soon.

        Raises
        ------
        Closed
            If the job is closing or its progress thread has failed.
        """
        with self._lock:
            self._check_open()
            self._posted.append(action)
        if self._asleep:
            self._wake()

    def ask(self, action: Callable[[int], Any]) -> Any:
        """Let the thread call ``action(now_ns)``, and return or raise what that does."""
        answered = threading.Event()
        answer: list[Any] = [None, None]

        def act(now_ns: int) -> None:
            try:
                answer[0] = action(now_ns)
            except Exception as error:
                answer[1] = error
            finally:
                answered.set()

        self.post(act)
        while not answered.wait(_LONGEST_WAIT_NS / 1e9):
            if not self._thread.is_alive():
                self._check_open()
                raise Closed("the progress thread has ended")
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def _check_open(self) -> None:
        if self._failure is not None:
            raise Closed(f"the job is closed: {self._failure}") from self._failure
        if self._closing:
            raise Closed("the job is closed")

    @property
    def failure(self) -> Exception | None:
        """What ended the progress thread, or None."""
        return self._failure

    def drain(self, deadline_ns: int) -> bool:
        """Return once everything submitted has ended here and at its peers, False if it does not before the deadline.

        The thread goes on serving peers.
        """
        with self._lock:
            self._closing = True
        self._wake()
        self._drained.wait(max(deadline_ns - time.monotonic_ns(), 0) / 1e9)
        return self._drained.is_set()

    def drain_group(self, group: Group, deadline_ns: int) -> bool:
        """Return once everything of a group has ended, False if it does not before the deadline."""
        idle = threading.Event()
        self.ask(lambda now_ns: self._await_idle(group, idle))
        idle.wait(max(deadline_ns - time.monotonic_ns(), 0) / 1e9)
        return idle.is_set()

    def _await_idle(self, group: Group, idle: threading.Event) -> None:
        membership = self.engine.groups.get(group.id)
        if membership is None or membership.idle:
            idle.set()
        else:
            self._awaited_idle.append((membership, idle))

    def fail(self, error: Exception) -> None:
        """End everything with ``error``."""
        with self._lock:
            self._failure = self._failure or error
        self._wake()

    def close(self) -> None:
        """Stop the thread; what is under way is dropped. Endpoints stay open. Idempotent."""
        self._stopping = True
        self._wake()
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock:
            if self._wake_fd >= 0:
                os.close(self._wake_fd)
                self._waiter.close()
                self._wake_fd = -1

    def _wake(self) -> None:
        with self._lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def _make_waiter(self) -> select.epoll:
        waiter = select.epoll()
        waiter.register(self._wake_fd, select.EPOLLIN)
        waiter.register(self._rest.fileno(), select.EPOLLIN)
        for _, descriptor in self._polled:
            if descriptor is not None:
                waiter.register(descriptor, select.EPOLLIN)
        return waiter

    # What follows runs on the thread.

    def _run(self) -> None:
        try:
            if self.engine.slots.calendar.has_windows:
                make_prompt()
            else:  # the kernel keeps the line busy while this thread waits for its turn, which should not be long
                shorten_turns()
            with contextlib.suppress(PeerLost):  # what loses a peer shows by itself
                self.timekeeper.start()
            self._keep_time(time.monotonic_ns())
            with quick_switches():
                while self._failure is None and not self._stopping:
                    self._turn()
        except DetcollError as error:
            self._give_up(error)
        except Exception as error:
            log.exception("rank %d: the progress thread failed", self.engine.rank)
            self._give_up(TransportError(f"rank {self.engine.rank}: the progress thread failed: {error!r}"))
        finally:
            try:
                self._end_all(self._failure or Closed("the job was closed"))
            finally:
                self.synchronised.set()
                self._drained.set()

    def _give_up(self, error: Exception) -> None:
        """End everything here, and tell the others by the one way that needs no thread."""
        self._announce(Cause.of(JOB_ID, WHOLE_GROUP, error, self.engine.rank))
        self.fail(error)

    def _end_all(self, error: Exception) -> None:
        """End what is left; nothing more is sent."""
        wanted = (Act.FINISH, Act.RECORD) if self._failure is not None else (Act.FINISH,)
        with self._lock:
            self._failure = error
        now_ns = time.monotonic_ns()
        while self._posted:
            self._posted.popleft()(now_ns)
        for membership in list(self.engine.groups.values()):
            self.engine.fail_group(membership.group, error, now_ns)
        for action in self.engine.actions:
            if action[0] in wanted:
                try:
                    self._carry[action[0]](*action[1:])
                except Exception:  # others still wait for their calls to end
                    log.exception("rank %d: ending what was under way", self.engine.rank)
        self.engine.actions.clear()
        for operation, ended_by in self._endings.overdue():
            self._report(operation, ended_by)

    def _turn(self) -> None:
        engine = self.engine
        now_ns = time.monotonic_ns()
        while self._posted:
            self._posted.popleft()(now_ns)
        engine.start_ready(now_ns)
        self._act()
        if engine.has_work:
            self._work()
            now_ns = time.monotonic_ns()
        self._retire(now_ns)  # what ends with a fold, or as it starts, must not wait until something else happens
        if self.timekeeper.asks:
            self._ask_time(now_ns)
        engine.give_the_line(now_ns)
        engine.look_after(now_ns)
        self._act()
        self._poll(self._wait(now_ns))
        now_ns = time.monotonic_ns()
        self._retire(now_ns)
        if self._endings:
            for operation, error in self._endings.overdue(now_ns):
                self._report(operation, error)

    def _poll(self, ready: Container[int] | None) -> None:
        """Take what has ended from the endpoints that are ``ready``, all if None."""
        missed: list[tuple[Queued[Wide], Window, int]] = []
        for endpoint, descriptor in self._polled:
            if ready is None or descriptor is None or descriptor in ready:
                for ticket in endpoint.poll(0):
                    self._take(ticket, missed)
        if missed:
            self.engine.missed(missed)

    def _act(self) -> None:
        """Carry out what the engine says, also what comes of that."""
        actions = self.engine.actions
        while actions:
            self.engine.actions = []
            left = iter(actions)
            try:
                for action in left:
                    self._carry[action[0]](*action[1:])
            except BaseException:  # callers whose calls end by what is left must hear of it, see `_end_all`
                self.engine.actions = [*left, *self.engine.actions]
                raise
            actions = self.engine.actions

    def _work(self) -> None:
        """Fold and copy what comes first, for about `_BUSY_NS`."""
        engine = self.engine
        until_ns = time.monotonic_ns() + _BUSY_NS
        while (work := engine.next_work()) is not None:
            operation, step = work
            if operation.plan.rows[step].kind == Kind.FOLD:
                operation.memory.fold(operation.plan, step)
            now_ns = time.monotonic_ns()
            engine.worked(operation, step, now_ns)
            if engine.slots.waiting:
                if self.timekeeper.asks:
                    self._keep_time(now_ns)
                engine.give_the_line(now_ns)
            self._act()
            if engine.slots.calendar.has_windows:
                for endpoint in self._endpoints:
                    endpoint.keep_time()
                os.sched_yield()  # real-time threads of equal priority would else wait up to 100 ms for each other
            if time.monotonic_ns() >= until_ns:  # a send copies its message, which takes as long as a fold
                return

    def _ask_time(self, now_ns: int) -> None:
        if not self._drained.is_set():  # peers may close from then on
            with contextlib.suppress(PeerLost):
                self.timekeeper.turn(now_ns)
        self._keep_time(now_ns)

    def _keep_time(self, now_ns: int) -> None:
        slots, timekeeper = self.engine.slots, self.timekeeper
        slots.trusted = timekeeper.trusted
        if timekeeper.synchronised and not self.synchronised.is_set():
            self.synchronised.set()
        slots.offset_ns = timekeeper.offset_ns(now_ns)

    def _retire(self, now_ns: int) -> None:
        self.engine.retire(now_ns)
        if self.engine.actions:
            self._act()
        if self._awaited_idle:
            for membership, idle in self._awaited_idle:
                if membership.idle:
                    idle.set()
            self._awaited_idle = [entry for entry in self._awaited_idle if not entry[1].is_set()]
        if self._closing and not self._drained.is_set() and not self._posted and self.engine.idle:
            self._drained.set()

    def _wait(self, now_ns: int) -> Container[int] | None:
        """Sleep until an endpoint, the rendezvous or a caller has something, or it is time for something.

        Returns the descriptors that are readable, or None where all endpoints should be looked at.
        """
        wake_ns = self._wake_ns(now_ns)
        self._asleep = True
        try:
            if self._posted or self.engine.has_work or self._failure is not None or self._stopping:
                return None
            if self.engine.can_start:
                return None
            full = [descriptor for endpoint, descriptor in self._polled if not endpoint.arm(wake_ns)]
            if self._has_silent and not self.engine.idle:
                wake_ns = min(wake_ns, now_ns + _UNWAITABLE_STEP_NS)
            left_ns = 0 if full else max(wake_ns - time.monotonic_ns(), 0)
            waited = [descriptor for descriptor, _ in self._waiter.poll(left_ns / 1e9)]
            ready = {descriptor for descriptor in [*full, *waited] if descriptor is not None}
        finally:
            self._asleep = False
        self._hear(ready)
        return ready

    def _wake_ns(self, now_ns: int) -> int:
        """Return when this thread has something to do even if nothing happens."""
        times = [self.engine.next_ns(now_ns)]
        if self.timekeeper.asks and not self._drained.is_set():
            times.append(self.timekeeper.next_ns(now_ns))
        return min([now_ns + _LONGEST_WAIT_NS, *[at_ns for at_ns in times if at_ns is not None]])

    def _hear(self, ready: Container[int]) -> None:
        """Take in that a caller woke this thread, or what the rendezvous has to say."""
        if self._wake_fd in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        if self._rest.fileno() in ready:
            self._rest.tell(self.engine, time.monotonic_ns())
            self._act()

    # Actions.

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
            self.engine.broken(operation, error, time.monotonic_ns())

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
        tag = operation.prefix | HELLO_TAG
        self._post_send(peer, tag, memoryview(operation.memory.hello), (SENT_RECORD, operation.memory.hello))

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
            self.routes.endpoint_of[peer].recv(peer, tag, nbytes, into).context = context
        except PeerLost as error:
            if context[0] == STEP:
                self._settle(context[1], context[2])
            self.engine.suspect(peer, error, time.monotonic_ns())

    def _post_send(
        self, peer: int, tag: int, view: memoryview, context: tuple[Any, ...], window: Window | None = None
    ) -> None:
        try:
            self.routes.endpoint_of[peer].send(peer, tag, view, window).context = context
        except PeerLost as error:
            self.engine.suspect(peer, error, time.monotonic_ns())

    def _announce(self, cause: Cause) -> None:
        self._rest.announce(cause)

    def _discard(self, tag: int, bits: int) -> None:
        for endpoint in self._endpoints:
            endpoint.discard(tag, bits)

    def _lift(self, tag: int, ranks: Sequence[int]) -> None:
        """End the dropping of a call's tags, as posting a receive does."""
        for endpoint in self._endpoints:
            peer = next((rank for rank in ranks if self.routes.endpoint_of.get(rank) is endpoint), None)
            if peer is not None:
                with contextlib.suppress(PeerLost):
                    endpoint.cancel(endpoint.recv(peer, tag, 0))

    def _record(self, reason: str) -> None:
        self._on_failure(reason)

    def _copy(self, operation: Operation, step: int) -> None:
        operation.memory.keep(step)

    def _finish(self, operation: Operation, error: Exception | None) -> None:
        memory: Memory = operation.memory
        if error is not None:
            try:
                memory.drop()
            finally:
                if self._failure is not None or not self._endings.hold(operation, error, time.monotonic_ns()):
                    self._report(operation, error)
            return
        try:
            if memory.store is not None:
                memory.store()
        except Exception as problem:  # scratch stays until CLOSE: the rest of the plan goes on for others
            error = TransportError(f"{operation.title}: the result could not be stored: {problem!r}")
            error.__cause__ = problem
        else:
            self._note_end(operation)
        finally:
            self._report(operation, error)

    def _report(self, operation: Operation, error: Exception | None) -> None:
        """Let the caller hear that its call has ended."""
        self._room.release()
        operation.memory.work.finish(error)

    def _settle(self, operation: Operation, step: int) -> None:
        """Take note that nothing is written any more for a receive of a call that has failed."""
        operation.settled.add(step)
        error = self._endings.ended(operation, step)
        if error is not None:
            self._report(operation, error)

    def _close_call(self, operation: Operation) -> None:
        operation.memory.close(self._pool)

    # Events.

    def _take(self, ticket: Ticket, missed: list[tuple[Queued[Wide], Window, int]]) -> None:
        context = ticket.context
        if not isinstance(context, tuple):
            self._take_other(ticket)
        elif context[0] == STEP:
            self._take_step(ticket, context[1], context[2], context[3], missed)
        elif context[0] == HELLO:
            self._take_hello(ticket, context[1])
        elif context[0] == CONTROL:
            self._take_control(ticket)
        elif ticket.status is TicketStatus.FAILED:
            self._lose(ticket)
        if self.engine.actions:
            self._act()

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
                self.engine.received(operation, step, now_ns)
                return
            if ticket.peer in self.routes.wide:
                self._note_send(operation, ticket, wide, ticket.nbytes)
            self.engine.sent(operation, step, now_ns)
        elif ticket.status is TicketStatus.MISSED and wide is not None:
            queued, window = wide
            assert queued is not None
            assert window is not None
            missed.append((queued, window, ticket.sent_bytes))
            self._note_send(operation, ticket, wide, ticket.sent_bytes)
        elif ticket.status is not TicketStatus.CANCELLED:
            error = ticket.error or PeerLost(f"rank {ticket.peer}: {ticket.kind.value} was {ticket.status.value}")
            self.engine.failed(operation, step, ticket.peer, error, now_ns)

    def _take_hello(self, ticket: Ticket, operation: Operation) -> None:
        if ticket.status is TicketStatus.DONE:
            record = bytes(ticket.view or b"")
            ticket.release()
            self.engine.greeted(operation, ticket.peer, record, time.monotonic_ns())
        elif ticket.status is TicketStatus.FAILED:
            self._lose(ticket)

    def _take_control(self, ticket: Ticket) -> None:
        if ticket.status is TicketStatus.DONE:
            record = bytes(ticket.view or b"")
            ticket.release()
            self._listen(ticket.peer)
            try:
                self.engine.message(ticket.peer, unpack(record), time.monotonic_ns())
            except FrameError as error:
                log.warning("rank %d: from rank %d: %s", self.engine.rank, ticket.peer, error)
        elif ticket.status is TicketStatus.FAILED:
            self._lose(ticket)

    def _lose(self, ticket: Ticket) -> None:
        """Take in that a peer is lost; once nothing is under way any more, peers may leave."""
        if isinstance(ticket.error, PeerLost) and not self._drained.is_set():
            self.engine.suspect(ticket.peer, ticket.error, time.monotonic_ns())

    def _take_other(self, ticket: Ticket) -> None:
        """Hand over what has come for the timekeeper; who asked last may have closed meanwhile."""
        if ticket.status is TicketStatus.FAILED:
            self._lose(ticket)
        if ticket.context is not None:
            with contextlib.suppress(PeerLost):
                ticket.context(ticket)

    # Notes.

    def _note_send(
        self, operation: Operation, ticket: Ticket, wide: tuple[Queued[Wide] | None, Window | None], nbytes: int
    ) -> None:
        queued, window = wide
        begins_ns, ends_ns = 0, 0
        if window is not None:
            begins_ns, ends_ns = window.not_before_ns, window.not_after_ns or 0
            if ticket.status is TicketStatus.DONE and queued is not None:
                self.engine.slots.sent(queued, window)
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
            call = Call(operation.descriptor.kind, collective.nbytes, plan.algorithm, collective, group.number)
            self._trace.note_collective(operation.sequence, call, operation.called_ns, time.monotonic_ns())

    def group_failure(self, group: Group) -> Exception | None:
        """Return what ended a group, or None; may be called from any thread."""
        membership = self.engine.groups.get(group.id)
        return membership.failure if membership is not None else None
