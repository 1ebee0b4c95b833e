"""One turn of the progress thread, step by step in virtual time."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from detcoll.errors import PeerLost
from detcoll.machine import Slots
from detcoll.plan import ChunkSize, Collective, build_calendar, compile_plan
from detcoll.runtime import Descriptor, Operation, Progress, Routes, Timekeeper, Work, progress
from detcoll.testing.fake_clock import VirtualTime
from detcoll.testing.plans import sites_of
from detcoll.trace import Trace
from detcoll.transport import Ticket, TicketKind, TicketStatus
from detcoll.types import ReduceOp

FOLD_NS = 60_000
CHUNK_ELEMS = 10_000
TWO = sites_of([1, 1])


class Noted:
    """An endpoint that only notes when it was given what."""

    def __init__(self, time: VirtualTime) -> None:
        self.time = time
        self.sent: list[tuple[int, int]] = []
        self.posted: list[Ticket] = []

    def fileno(self) -> None:
        return None

    def keep_time(self) -> None:
        pass

    def recv(self, src: int, tag: int, nbytes: int, into: memoryview | None = None) -> Ticket:
        self.posted.append(Ticket(TicketKind.RECV, src, tag, nbytes))
        return self.posted[-1]

    def poll(self, deadline_ns: int) -> list[Ticket]:
        return []

    def send(self, dst: int, tag: int, view: memoryview, window: object = None) -> Ticket:
        if view.nbytes == CHUNK_ELEMS * 4:
            self.sent.append((self.time.now_ns(), view.nbytes))
        return Ticket(TicketKind.SEND, dst, tag, view.nbytes)


class Unthreaded(Progress):
    """Its thread does nothing, so that a test can take its steps."""

    def _run(self) -> None:
        pass


@pytest.fixture
def descriptor():
    number = os.eventfd(0)
    yield number
    os.close(number)


@pytest.fixture
def time(monkeypatch) -> VirtualTime:
    virtual = VirtualTime(1_000_000)
    fold = progress.fold

    def slow_fold(*arguments: Any) -> None:
        virtual.advance(FOLD_NS)
        fold(*arguments)

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic_ns=virtual.now_ns))
    monkeypatch.setattr(progress, "fold", slow_fold)
    return virtual


@pytest.fixture
def thread(time: VirtualTime, descriptor: int):
    routes: Any = Routes({1: Noted(time)}, [0, 1], frozenset({1}))
    membership: Any = SimpleNamespace(fileno=lambda: descriptor)
    keeper = Timekeeper(0, [0], ["clock", "clock"], routes.endpoint_of)
    slots: Any = Slots(build_calendar(TWO), 0, 0)
    made = Unthreaded(0, 2, routes, slots, keeper, membership, Trace(0, 0))
    yield made
    made.close()


def sum_of(elems: int) -> Operation:
    plan = compile_plan(Collective("all_reduce", elems, 4, 4), TWO, 0, "exchange", ChunkSize(CHUNK_ELEMS, 4))
    called = Descriptor(0, "all_reduce", "sum", "float32", elems, 0)
    return Operation(called, plan, np.ones(elems, np.float32), ReduceOp.SUM, Work("sum"), 10**12, 0)


def test_what_a_fold_makes_ready_leaves_before_the_next_fold(time: VirtualTime, thread: Unthreaded) -> None:
    thread._start(sum_of(3 * CHUNK_ELEMS))
    began_ns = time.now_ns()
    thread._do_busywork()
    sent = [sent_ns - began_ns for sent_ns, _ in thread._endpoints[0].sent]
    assert sent == [FOLD_NS, 2 * FOLD_NS, 3 * FOLD_NS]


def test_what_ends_with_a_fold_ends_before_the_thread_waits(monkeypatch, thread: Unthreaded) -> None:
    operation, ended = sum_of(CHUNK_ELEMS), []
    monkeypatch.setattr(thread, "_wait", lambda now_ns: ended.append(operation.work.done()))
    thread.submit(operation)
    thread._turn()
    hello, sums = thread._endpoints[0].posted
    hello.view, sums.view = memoryview(operation.descriptor.encode()), memoryview(np.ones(CHUNK_ELEMS, np.float32))
    for ticket in (hello, sums):
        ticket.status = TicketStatus.DONE
        thread._take(ticket, [])
    thread._turn()
    assert ended == [False, True]
    assert (operation.array == 2).all()


def test_a_thread_that_has_drained_starts_nothing_about_time_any_more(descriptor: int) -> None:
    told: list[str] = []

    def lose(ticket: Ticket) -> None:
        told.append("ticket")
        raise PeerLost("rank 1 is gone")

    keeper: Any = SimpleNamespace(
        turn=lambda now_ns: told.append("turn"), offset_ns=lambda now_ns: 0, next_ns=lambda now_ns: now_ns,
        trusted=False, synchronised=True,
    )  # fmt: skip
    routes: Any = Routes({1: Noted(VirtualTime())}, [0, 1], frozenset({1}))
    membership: Any = SimpleNamespace(fileno=lambda: descriptor)
    thread = Unthreaded(0, 2, routes, Slots(build_calendar(TWO), 0, 0), keeper, membership, Trace(0, 0))
    try:
        thread._stopping = True  # so that a turn does not wait
        thread._turn()
        assert thread.synchronised.is_set()
        assert not thread._slots.trusted
        ticket = Ticket(TicketKind.RECV, 1, 0, 0, context=lose)
        with pytest.raises(PeerLost):
            thread._take(ticket, [])
        assert thread._wake_ns(5) == 5
        thread._drained.set()
        assert thread._wake_ns(5) > 5
        thread._turn()
        thread._take(ticket, [])
        assert told == ["turn", "ticket", "ticket"]
    finally:
        thread.close()
