"""The progress thread: one a job. It drives the engine over the endpoints.

A turn of its loop: take in what callers posted, start calls, fold and copy for a while, give the line what is due, then
wait on everything at once until a ticket ends, a window opens or a deadline passes. It has no rules of its own: what
happened goes to `detcoll.runtime.engine`, and `detcoll.runtime.courier` carries out the engine's actions before the
next event.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Container
from typing import Any, Protocol

from detcoll.errors import Closed, DetcollError, PeerLost, TransportError
from detcoll.machine import Queued
from detcoll.plan.ir import Kind
from detcoll.priority import make_prompt, quick_switches, shorten_turns
from detcoll.runtime import blame
from detcoll.runtime.control import JOB_ID, WHOLE_GROUP, Cause
from detcoll.runtime.copying import LOOK_NS, Copying
from detcoll.runtime.courier import Courier
from detcoll.runtime.engine import Engine, Wide
from detcoll.runtime.failures import Failures
from detcoll.runtime.group import Group
from detcoll.runtime.membership import Membership
from detcoll.runtime.operation import Operation
from detcoll.runtime.routes import Routes
from detcoll.runtime.timekeeping import Timekeeper
from detcoll.runtime.transfer import Transfer
from detcoll.trace import Trace
from detcoll.transport import Window

log = logging.getLogger("detcoll")

LARGEST_QUEUE = 4096
"""Calls that have not ended; who makes more waits."""

_BUSY_NS = 200_000
"""How long a turn folds and copies before it looks at the endpoints again."""

_UNWAITABLE_STEP_NS = 200_000
_LONGEST_WAIT_NS = 500_000_000


class Rest(Protocol):
    """The rendezvous as the loop sees it: who is gone, and what others gave up for."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when `tell` has something to say."""

    def tell(self, failures: Failures, now_ns: int) -> None:
        """Tell the engine what has been heard, without waiting."""

    def announce(self, cause: Cause) -> None:
        """Tell all other ranks."""


class Loop:
    """Drives the engine of one rank.

    It has many fields because callers and the thread share them: what callers posted and wait for, what wakes the
    thread, and how it ends.

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
    stop_natives : callable
        Ends the native collectives of a group, because of an error.
    """

    def __init__(
        self, engine: Engine, routes: Routes, timekeeper: Timekeeper, rest: Rest, trace: Trace,
        on_failure: Callable[[str], object] = lambda reason: None,
        stop_natives: Callable[[Group, Exception], None] = lambda group, error: None,
    ) -> None:  # fmt: skip
        self.engine, self.timekeeper, self._rest = engine, timekeeper, rest
        self._lock = threading.Lock()
        self._posted: deque[Callable[[int], None]] = deque()
        self._room = threading.Semaphore(LARGEST_QUEUE)
        self._courier = Courier(
            engine, routes, trace, rest.announce, on_failure, self._room.release, stop_natives
        )  # fmt: skip
        self._copying = Copying(self._copies_begin, self._copied, self._device_failed)
        self._courier.copying, self._courier.note = self._copying, self.note
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
        self._thread = threading.Thread(target=self._run, name=f"detcoll-{engine.rank}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    # What callers use, from any thread.

    def submit(self, operation: Operation | Transfer) -> None:
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

    def note(self, action: Callable[[int], None]) -> None:
        """Do as `post`, also while closing; nothing happens once the thread has ended."""
        self._posted.append(action)
        if self._asleep:
            self._wake()

    @property
    def has_posted(self) -> bool:
        """Whether something was handed over that the thread has not taken in."""
        return bool(self._posted)

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

    def group_failure(self, group: Group) -> Exception | None:
        """Return what ended a group, or None; may be called from any thread."""
        membership = self.engine.groups.get(group.id)
        return membership.failure if membership is not None else None

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
        self._rest.announce(Cause.of(JOB_ID, WHOLE_GROUP, error, self.engine.rank))
        self.fail(error)

    def _end_all(self, error: Exception) -> None:
        """End what is left; nothing more is sent."""
        records = self._failure is not None
        with self._lock:
            self._failure = error
        now_ns = time.monotonic_ns()
        while self._posted:
            self._posted.popleft()(now_ns)
        for membership in list(self.engine.groups.values()):
            self.engine.failures.fail_group(membership.group, error, now_ns)
        self._courier.conclude(records=records)

    def _turn(self) -> None:
        engine = self.engine
        now_ns = time.monotonic_ns()
        while self._posted:
            self._posted.popleft()(now_ns)
        engine.start_ready(now_ns)
        self._courier.act()
        self._copying.advance()
        if engine.has_work:
            self._work()
            now_ns = time.monotonic_ns()
        self._retire(now_ns)  # what ends with a fold, or as it starts, must not wait until something else happens
        if self.timekeeper.asks:
            self._ask_time(now_ns)
        engine.give_the_line(now_ns)
        engine.failures.look_after(now_ns)
        self._courier.act()
        self._poll(self._wait(now_ns))
        now_ns = time.monotonic_ns()
        self._retire(now_ns)
        if self._courier.endings:
            self._courier.report_overdue(now_ns)

    def _poll(self, ready: Container[int] | None) -> None:
        """Take the tickets that have ended from the endpoints whose descriptors are in ``ready``; from all if None."""
        take = self._courier.take
        missed: list[tuple[Queued[Wide], Window, int]] = []
        for endpoint, descriptor in self._polled:
            if ready is None or descriptor is None or descriptor in ready:
                for ticket in endpoint.poll(0):
                    take(ticket, missed)
        if missed:
            self.engine.missed(missed)

    def _work(self) -> None:
        """Fold and copy what comes first, for about `_BUSY_NS`."""
        engine = self.engine
        until_ns = time.monotonic_ns() + _BUSY_NS
        while (work := engine.next_work()) is not None:
            operation, step = work
            if step in operation.plan.copies:
                self._copying.begin(operation, step, operation.memory.device_copy(operation.plan, step))
            else:
                if operation.plan.rows[step].kind == Kind.FOLD:
                    operation.memory.fold(operation.plan, step)
                engine.worked(operation, step, time.monotonic_ns())
            if self._copying.is_busy:
                self._copying.advance()
            now_ns = time.monotonic_ns()
            if engine.slots.waiting:
                if self.timekeeper.asks:
                    self._keep_time(now_ns)
                engine.give_the_line(now_ns)
            self._courier.act()
            if engine.slots.calendar.has_windows:
                for endpoint in self._endpoints:
                    endpoint.keep_time()
                os.sched_yield()  # real-time threads of equal priority would else wait up to 100 ms for each other
            if time.monotonic_ns() >= until_ns:  # a send copies its message, which takes as long as a fold
                return

    def _copies_begin(self, call: Operation | Transfer) -> None:
        """Let the time of a collective run from when what its caller queued on a device is done."""
        if isinstance(call, Operation):
            blame.progressed(call, time.monotonic_ns())

    def _copied(self, call: Operation | Transfer, step: int) -> None:
        if isinstance(call, Operation):
            self.engine.worked(call, step, time.monotonic_ns())
        else:
            self.engine.messages.copied(call, time.monotonic_ns())
        self._courier.act()

    def _device_failed(self, call: Operation | Transfer, error: Exception) -> None:
        if isinstance(call, Operation):
            self.engine.failures.broken(call, error, time.monotonic_ns())
        else:
            self.engine.failures.fail_group(call.group, error, time.monotonic_ns())
        self._courier.act()

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
            self._courier.act()
        if self._awaited_idle:
            for membership, idle in self._awaited_idle:
                if membership.idle:
                    idle.set()
            self._awaited_idle = [entry for entry in self._awaited_idle if not entry[1].is_set()]
        if self._closing and not self._drained.is_set() and not self._posted and self.engine.idle:
            self._drained.set()
            self._courier.peers_may_leave = True

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
            if self._copying.is_busy:  # an end that nothing announces
                os.sched_yield()
                wake_ns = now_ns
            elif self._copying.waits:
                wake_ns = min(wake_ns, now_ns + LOOK_NS)
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
            self._rest.tell(self.engine.failures, time.monotonic_ns())
            self._courier.act()
