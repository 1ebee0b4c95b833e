"""The progress thread: one a communicator, it owns all endpoints and walks all machines.

A turn of its loop: take in new operations, carry out what their machines say, give the line what is due, then wait on
everything at once until a ticket ends, a window opens or a deadline passes. Steps of several operations are under way
at the same time, so the wide area never idles between two collectives. What costs processor time, folds and copies,
is done in the order of calls and plans, a little in each turn: what the line needs first is ready first, and a window
that opens meanwhile is not missed.

Anything that goes wrong ends every operation with the error, tells all other ranks through the rendezvous, and leaves
the communicator closed: after a lost message no later one can be trusted to match.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Container
from typing import NoReturn

from detcoll.errors import Closed, DeadlineMissed, DetcollError, FrameError, PeerLost, TransportError
from detcoll.fold import fold_step
from detcoll.machine import Queued, Slots
from detcoll.plan.headroom import Express
from detcoll.plan.ir import LARGEST_PLAN_TAG, Buffer, Kind
from detcoll.plan.layout import uses_window
from detcoll.priority import make_prompt, quick_switches, shorten_turns
from detcoll.runtime.operation import HELLO_BYTES, Operation, ScratchPool
from detcoll.runtime.routes import Membership, Routes, acquaintances
from detcoll.runtime.timekeeping import Timekeeper
from detcoll.trace import Call, Trace
from detcoll.transport import Ticket, TicketKind, TicketStatus, Window

log = logging.getLogger("detcoll")

LARGEST_ACTIVE = 16
"""Operations under way at once; further ones wait, so that scratch and credit stay bounded."""

SEQUENCES = 2047
"""Collectives that tags tell apart, far more than may be under way; tags above are the timekeeper's."""

LARGEST_QUEUE = 4096
"""Operations that wait to be started; who submits more waits too."""

HELLO_TAG = LARGEST_PLAN_TAG

LARGEST_UNASKED_BYTES = 8 * 2**20
"""What a rank sends to one that has not called the same collective yet: half of what the slotted transport lets peers
hold for each other, so that what an earlier collective needs always gets through."""

_HEARSAY_NS = 250_000_000
"""How long a rank whose peers all take part waits, after a deadline, for one that knows who does not."""

_BUSY_NS = 200_000
"""How long a turn folds and copies before it looks at the endpoints again."""

_UNWAITABLE_STEP_NS = 200_000
_LONGEST_WAIT_NS = 500_000_000

Wide = tuple[Operation, int]


class Progress:
    """Owns the endpoints of one rank; see the module."""

    def __init__(
        self, rank: int, size: int, routes: Routes, slots: Slots[Wide], timekeeper: Timekeeper,
        membership: Membership, trace: Trace, express: Express | None = None,
    ) -> None:  # fmt: skip
        self._rank, self._size, self._routes, self._slots = rank, size, routes, slots
        self._acquaintances = acquaintances(rank, routes.site_of) if size > 1 else set()
        self._timekeeper = timekeeper
        self._membership, self._trace, self._express = membership, trace, express
        self._pool = ScratchPool()
        self._lock = threading.Lock()
        self._submitted: deque[Operation] = deque()
        self._room = threading.Semaphore(LARGEST_QUEUE)
        self._active: deque[Operation] = deque()
        self._busywork: list[tuple[int, int, Operation]] = []
        self._hellos: list[tuple[int, int, memoryview]] = []
        self._unasked_bytes: dict[int, int] = {}
        self._failure: Exception | None = None
        self._was_told = False
        self._closing = False
        self._heard = False
        self._asleep = False
        self._stopping = False
        self._drained = threading.Event()
        self.synchronised = threading.Event()
        """Set once this rank knows the time of its site."""
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._endpoints = routes.endpoints
        self._has_silent = any(endpoint.fileno() is None for endpoint in self._endpoints)
        self._waiter = self._make_waiter()
        self._thread = threading.Thread(target=self._run, name=f"detcoll-{rank}", daemon=True)
        self._thread.start()

    def submit(self, operation: Operation) -> None:
        """Hand an operation over; its work ends when the operation does.

        Raises
        ------
        Closed
            If the communicator has failed or is closing.
        DeadlineMissed
            If too many operations wait to be started until this one's deadline has passed.
        DetcollError
            What ended the communicator, if no operation of this rank has told it yet.
        """
        left_s = max(operation.deadline_ns - time.monotonic_ns(), 0) / 1e9
        if not self._room.acquire(timeout=left_s):
            raise DeadlineMissed(f"{operation.descriptor.kind}: {LARGEST_QUEUE} collectives before it are not finished")
        with self._lock:
            if self._closing or self._failure is not None:
                self._room.release()
                self._refuse()
            self._submitted.append(operation)
        if self._asleep:
            self._wake()

    def _refuse(self) -> NoReturn:
        """Raise why nothing can be submitted: the cause itself the first time that it is told."""
        if self._failure is not None and not self._was_told:
            self._was_told = True
            raise self._failure
        reason = f": {self._failure}" if self._failure is not None else ""
        raise Closed(f"the communicator is closed{reason}") from self._failure

    @property
    def was_told(self) -> bool:
        """Whether a caller of this rank was shown the failure."""
        return self._was_told

    @property
    def failure(self) -> Exception | None:
        """What ended this communicator, or None."""
        return self._failure

    def drain(self, deadline_ns: int) -> bool:
        """Return once everything submitted has ended here and at its peers, False if it does not before the deadline.

        The thread goes on serving peers.
        """
        with self._lock:
            self._closing = True
        self._wake()
        self._drained.wait(max(deadline_ns - time.monotonic_ns(), 0) / 1e9)
        if not self._drained.is_set():
            self.fail(DeadlineMissed("closing: collectives were still under way at the deadline"))
            return False
        return self._failure is None or not self._was_told

    def close(self) -> None:
        """Stop the thread; what is under way is dropped. Endpoints stay open. Idempotent."""
        self._stopping = True
        self._wake()
        self._thread.join()
        with self._lock:
            if self._wake_fd >= 0:
                os.close(self._wake_fd)
                self._waiter.close()
                self._wake_fd = -1

    @property
    def site_offset_ns(self) -> int:
        """What the site's clock adds to this rank's."""
        return self._slots.offset_ns

    @property
    def late_windows(self) -> tuple[int, int]:
        """How many windows of this rank were missed, and how many trimmed."""
        return self._slots.misses, self._slots.trimmed

    @property
    def missed_windows(self) -> list[tuple[int, int, int]]:
        """The last windows missed; see `detcoll.machine.Slots`."""
        return list(self._slots.missed_windows)

    def fail(self, error: Exception) -> None:
        """End everything with ``error``, from any thread."""
        with self._lock:
            if self._failure is None:
                self._failure = error
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def _make_waiter(self) -> select.epoll:
        waiter = select.epoll()
        waiter.register(self._wake_fd, select.EPOLLIN)
        waiter.register(self._membership.fileno(), select.EPOLLIN)
        for endpoint in self._endpoints:
            descriptor = endpoint.fileno()
            if descriptor is not None:
                waiter.register(descriptor, select.EPOLLIN)
        return waiter

    # What follows runs on the progress thread.

    def _run(self) -> None:
        try:
            if self._slots.calendar.has_windows:
                make_prompt()
            else:  # the kernel keeps the line busy while this thread waits for its turn, which should not be long
                shorten_turns()
            self._timekeeper.start()
            with quick_switches():
                while self._failure is None and not self._stopping:
                    self._turn()
        except PeerLost as error:
            self.fail(self._explained(error))
        except DetcollError as error:
            self.fail(error)
        except Exception as error:
            log.exception("rank %d: the progress thread failed", self._rank)
            self.fail(TransportError(f"rank {self._rank}: the progress thread failed: {error!r}"))
        finally:
            try:
                if self._failure is not None:
                    self._end_all(self._failure)
            finally:
                self.synchronised.set()
                self._drained.set()

    def _explained(self, error: PeerLost) -> DetcollError:
        """Return why a peer is lost: what the rendezvous hears, or only that it is."""
        told = None if self._heard else self._membership.explanation()
        if told is None:
            return error
        self._heard = True
        return told

    def _turn(self) -> None:
        while self._submitted and len(self._active) < LARGEST_ACTIVE:
            operation = self._submitted.popleft()
            self._room.release()
            self._active.append(operation)
            self._start(operation)
        self._do_busywork()
        self._retire()  # what ends with a fold, or as it starts, must not wait until something else happens
        self._greet_others()
        now_ns = time.monotonic_ns()
        if not self._drained.is_set():  # peers may close from then on
            self._timekeeper.turn(now_ns)
        self._give_the_line(now_ns)
        self._check_deadlines(now_ns)
        ready = self._wait(now_ns)
        missed: list[tuple[Queued[Wide], Window, int]] = []
        for endpoint in self._endpoints:
            if ready is None or endpoint.fileno() is None or endpoint.fileno() in ready:
                for ticket in endpoint.poll(0):
                    self._take(ticket, missed)
        if missed:
            self._slots.missed(missed)
        self._retire()

    def _wait(self, now_ns: int) -> Container[int] | None:
        """Sleep until an endpoint, the rendezvous or a caller has something, or it is time for something.

        Returns the descriptors that are readable, or None where all endpoints should be looked at.
        """
        wake_ns = self._wake_ns(now_ns)
        self._asleep = True
        try:
            can_start = self._submitted and len(self._active) < LARGEST_ACTIVE
            if can_start or self._busywork or self._failure is not None or self._stopping:
                return None
            full = [endpoint.fileno() for endpoint in self._endpoints if not endpoint.arm(wake_ns)]
            if self._has_silent and self._active:
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
        times = [now_ns + _LONGEST_WAIT_NS, self._slots.next_ns(now_ns)]
        if not self._drained.is_set():
            times.append(self._timekeeper.next_ns(now_ns))
        times += [self._limit_ns(operation) for operation in self._active if not operation.reported]
        return min(at_ns for at_ns in times if at_ns is not None)

    def _hear(self, ready: Container[int]) -> None:
        """Take in that a caller woke this thread, or what the rendezvous has to say."""
        if self._wake_fd in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        if self._membership.fileno() in ready:
            failure = self._membership.failure()
            if failure is not None:
                self._heard = True
                raise failure

    def _start(self, operation: Operation) -> None:
        operation.open(self._pool)
        if self._size > 1:
            self._greet(operation)
        self._carry_out(operation, operation.machine.start())

    def _greet(self, operation: Operation) -> None:
        """Exchange descriptors with every peer of the plan, so that nothing of another collective is taken in.

        Acquaintances hear it too: ranks that called different collectives may have plans that share no message.
        """
        operation.strangers = self._acquaintances | operation.plan.peers
        tag = self._tag(operation, HELLO_TAG)
        for peer in operation.strangers:
            self._routes.endpoint_of[peer].recv(peer, tag, HELLO_BYTES).context = (operation, -1, None)
        hello = memoryview(operation.descriptor.encode())
        for peer in list(operation.strangers):
            if peer in self._routes.wide:
                self._hellos.append((peer, tag, hello))
            else:
                self._routes.endpoint_of[peer].send(peer, tag, hello)

    def _greet_others(self) -> None:
        """Send what other sites are to hear; they wait for it longer than this site for its first chunk."""
        for peer, tag, hello in self._hellos:
            if self._express is not None:
                self._express.spend(len(hello), time.monotonic_ns())
            self._routes.endpoint_of[peer].send(peer, tag, hello)
        self._hellos.clear()

    def _tag(self, operation: Operation, plan_tag: int) -> int:
        return (operation.descriptor.sequence % SEQUENCES) << 20 | plan_tag

    def _carry_out(self, operation: Operation, ready: list[int]) -> None:
        """Carry out steps that may start and cost little; the others are put in order for `_do_busywork`."""
        rows = operation.plan.rows
        for step in ready:
            row = rows[step]
            if row.kind == Kind.RECV:
                self._recv(operation, step)
            elif row.kind == Kind.SEND and row.peer in self._routes.wide:
                self._send(operation, step)
            else:
                heapq.heappush(self._busywork, (operation.descriptor.sequence, step, operation))

    def _do_busywork(self) -> None:
        """Fold and copy what comes first, for about `_BUSY_NS`."""
        until_ns = time.monotonic_ns() + _BUSY_NS
        while self._busywork and time.monotonic_ns() < until_ns:
            _, step, operation = heapq.heappop(self._busywork)
            if operation.plan.rows[step].kind == Kind.FOLD:
                self._fold(operation, step)
                self._carry_out(operation, operation.machine.ended(step))
            else:
                self._send(operation, step)
            if self._slots.waiting:
                self._give_the_line(time.monotonic_ns())
            if self._slots.calendar.has_windows:
                for endpoint in self._endpoints:
                    endpoint.keep_time()
                os.sched_yield()  # real-time threads of equal priority would else wait up to 100 ms for each other

    def _recv(self, operation: Operation, step: int) -> None:
        row = operation.plan.rows[step]
        into = None if row.buffer == Buffer.LENT else operation.view(row.buffer, row.offset, row.length)
        tag = self._tag(operation, row.tag)
        nbytes = operation.plan.message_bytes(step)
        self._routes.endpoint_of[row.peer].recv(row.peer, tag, nbytes, into).context = (operation, step, None)

    def _send(self, operation: Operation, step: int) -> None:
        peer = operation.plan.rows[step].peer
        nbytes = operation.plan.message_bytes(step)
        if peer in operation.strangers and not self._may_send_unasked(operation, peer, nbytes):
            operation.unsent.setdefault(peer, []).append(step)
            return
        if peer in self._routes.wide and not self._leaves_at_once(operation, nbytes):
            self._slots.add(Queued((operation, step), self._routes.site_of[peer], peer, nbytes))
        else:
            self._launch(operation, step, None, None)

    def _leaves_at_once(self, operation: Operation, nbytes: int) -> bool:
        """Tell whether a wide message needs no window: one of a small collective that the headroom has room for."""
        if uses_window(self._slots.calendar, operation.plan.collective.nbytes):
            return False
        return self._express is None or self._express.take(nbytes, time.monotonic_ns())

    def _may_send_unasked(self, operation: Operation, peer: int, nbytes: int) -> bool:
        """Take note of a send to a rank that has not called yet; False if it holds enough already."""
        held_bytes = self._unasked_bytes.get(peer, 0)
        if operation.unsent.get(peer) or (held_bytes and held_bytes + nbytes > LARGEST_UNASKED_BYTES):
            return False
        self._unasked_bytes[peer] = held_bytes + nbytes
        operation.unasked_bytes[peer] = operation.unasked_bytes.get(peer, 0) + nbytes
        return True

    def _launch(self, operation: Operation, step: int, queued: Queued[Wide] | None, window: Window | None) -> None:
        row = operation.plan.rows[step]
        view = operation.view(row.buffer, row.offset, row.length)
        if queued is not None and queued.sent_bytes:
            view = view[queued.sent_bytes :]
        tag = self._tag(operation, row.tag)
        ticket = self._routes.endpoint_of[row.peer].send(row.peer, tag, view, window)
        ticket.context = (operation, step, (queued, window))

    def _give_the_line(self, now_ns: int) -> None:
        self._slots.trusted = self._timekeeper.trusted
        if self._timekeeper.synchronised and not self.synchronised.is_set():
            self.synchronised.set()
        self._slots.offset_ns = self._timekeeper.offset_ns(now_ns)
        for queued, window in self._slots.due(now_ns):
            operation, step = queued.item
            self._launch(operation, step, queued, window)

    def _fold(self, operation: Operation, step: int) -> None:
        rows = operation.plan.rows
        row = rows[step]
        inputs = []
        used = []
        for buffer, offset in operation.plan.inputs_of(step):
            if buffer == Buffer.LENT:
                inputs.append(operation.arrived(offset, bool(rows[offset].accumulated)))
                used.append(offset)
            else:
                inputs.append(operation.elements(buffer, offset, row.length))
        out = operation.elements(row.buffer, row.offset, row.length)
        plan = operation.plan
        fold_step(operation.op, inputs, plan.ranks_of(step), out, plan.size, final=bool(row.final))
        del inputs
        for lender in used:
            operation.lent.pop(lender).release()

    def _take(self, ticket: Ticket, missed: list[tuple[Queued[Wide], Window, int]]) -> None:
        if not isinstance(ticket.context, tuple):
            if ticket.status is TicketStatus.FAILED and ticket.error is not None and not self._drained.is_set():
                raise ticket.error
            if ticket.context is not None:  # None: a hello that has left
                self._tell_timekeeper(ticket)
            return
        operation, step, wide = ticket.context
        if ticket.status is TicketStatus.MISSED:
            missed.append((*wide, ticket.sent_bytes))
            self._note_send(operation, ticket, wide, ticket.sent_bytes)
            return
        if step >= 0 and self._must_hold(operation, ticket):
            operation.held.append(ticket)
            return
        if ticket.status is not TicketStatus.DONE:
            raise ticket.error or PeerLost(f"rank {ticket.peer}: {ticket.kind.value} was {ticket.status.value}")
        if step < 0:
            self._greeted(operation, ticket)
            return
        if ticket.view is not None:
            operation.lent[step] = ticket
        if wide is not None and ticket.peer in self._routes.wide:
            self._note_send(operation, ticket, wide, ticket.nbytes)
        self._carry_out(operation, operation.machine.ended(step))

    def _tell_timekeeper(self, ticket: Ticket) -> None:
        """Hand over what has come for it; who asked last may have closed meanwhile."""
        try:
            ticket.context(ticket)
        except PeerLost:
            if not self._drained.is_set():
                raise

    def _greeted(self, operation: Operation, ticket: Ticket) -> None:
        record = bytes(ticket.view or b"")
        ticket.release()
        operation.descriptor.compare(self._rank, ticket.peer, record)
        operation.strangers.discard(ticket.peer)
        if ticket.peer in operation.unasked_bytes:
            self._unasked_bytes[ticket.peer] -= operation.unasked_bytes.pop(ticket.peer)
        for step in operation.unsent.pop(ticket.peer, ()):
            self._send(operation, step)
        held, operation.held = operation.held, []
        for earlier in held:
            self._take(earlier, [])

    def _must_hold(self, operation: Operation, ticket: Ticket) -> bool:
        """Tell whether a receive from a stranger has to wait; a wrong size is explained by what the stranger called."""
        if ticket.kind is TicketKind.SEND or ticket.peer not in operation.strangers:
            return False
        return ticket.status is TicketStatus.DONE or isinstance(ticket.error, FrameError)

    def _note_send(
        self, operation: Operation, ticket: Ticket, wide: tuple[Queued[Wide] | None, Window | None], nbytes: int
    ) -> None:
        queued, window = wide
        begins_ns, ends_ns = 0, 0
        if window is not None:
            begins_ns, ends_ns = window.not_before_ns, window.not_after_ns or 0
            if ticket.status is TicketStatus.DONE and queued is not None:
                self._slots.sent(queued, window)
        if not self._trace.recording or (not nbytes and ticket.nbytes):
            return
        trimmed = ticket.status is TicketStatus.MISSED and queued is not None and queued.fits
        self._trace.sends.append(
            (
                operation.descriptor.sequence, ticket.peer, nbytes, begins_ns, ends_ns,
                ticket.started_ns, ticket.left_ns, ticket.ended_ns, trimmed,
            )
        )  # fmt: skip

    def _retire(self) -> None:
        for operation in self._active:
            if not operation.reported and operation.machine.result_ready and not operation.strangers:
                operation.reported = True
                self._note_end(operation)
                operation.work.finish()
        while self._active and self._active[0].reported and self._active[0].machine.done:
            self._active.popleft().close(self._pool)
        if self._closing and not self._submitted and not self._active:
            self._drained.set()

    def _note_end(self, operation: Operation) -> None:
        if self._trace.recording:
            descriptor, plan = operation.descriptor, operation.plan
            call = Call(descriptor.kind, plan.collective.nbytes, plan.algorithm, plan.collective)
            self._trace.note_collective(descriptor.sequence, call, operation.called_ns, time.monotonic_ns())

    def _check_deadlines(self, now_ns: int) -> None:
        for operation in self._active:
            if now_ns >= self._limit_ns(operation) and not operation.reported:
                raise DeadlineMissed(self._late(operation))
        if self._submitted and now_ns >= self._submitted[0].deadline_ns + _HEARSAY_NS:
            raise DeadlineMissed(self._late(self._submitted[0]))

    def _limit_ns(self, operation: Operation) -> int:
        """Return when an operation is given up: later where others know better who is missing."""
        return operation.deadline_ns + (0 if operation.strangers else _HEARSAY_NS)

    def _late(self, operation: Operation) -> str:
        descriptor = operation.descriptor
        awaited = operation.machine.waiting_for()
        peers = ", ".join(f"rank {peer} ({count} messages)" for peer, count in sorted(awaited.items()))
        if operation.strangers:
            peers = ", ".join(f"rank {peer}, which has not called it" for peer in sorted(operation.strangers))
        seconds = (operation.deadline_ns - operation.called_ns) / 1e9
        return (
            f"rank {self._rank}: {descriptor.kind} number {descriptor.sequence} was not finished after {seconds:g} s; "
            f"it waits for {peers or 'nobody'}"
        )

    def _end_all(self, error: Exception) -> None:
        """End every operation, tell the others, and drop the endpoints."""
        with self._lock:
            operations = [*self._active, *self._submitted]
            self._room.release(len(self._submitted) or 1)
            self._active.clear()
            self._busywork.clear()
            self._submitted.clear()
            self._was_told = any(not operation.reported for operation in operations)
        try:
            if not self._heard:
                self._membership.abort(type(error).__name__, str(error))
            for endpoint in self._endpoints:
                endpoint.abort()
        finally:
            for operation in operations:
                operation.work.finish(error)
