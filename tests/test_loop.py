"""One turn of the progress thread, taken by hand: no thread runs, and endpoints only note what they are given."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from detcoll.errors import DeadlineMissed, PeerLost, TransportError
from detcoll.machine import Slots
from detcoll.plan import ChunkSize, Collective, build_calendar, compile_plan
from detcoll.plan.ir import Buffer, Plan
from detcoll.runtime import Descriptor, Engine, Loop, Memory, Operation, Routes, Timekeeper, Work, endings
from detcoll.runtime.actions import Act
from detcoll.runtime.group import world
from detcoll.testing.plans import sites_of
from detcoll.trace import Trace
from detcoll.transport import Ticket, TicketKind, TicketStatus
from detcoll.types import ReduceOp

CHUNK_ELEMS = 10_000
TWO = sites_of([1, 1])


class Noted:
    """An endpoint that only notes what it was given."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.posted: list[Ticket] = []

    def fileno(self) -> None:
        return None

    def keep_time(self) -> None:
        pass

    def discard(self, tag: int, bits: int) -> None:
        pass

    def arm(self, deadline_ns: int) -> bool:
        return True

    def recv(self, src: int, tag: int, nbytes: int, into: memoryview | None = None) -> Ticket:
        self.posted.append(Ticket(TicketKind.RECV, src, tag, nbytes))
        return self.posted[-1]

    def poll(self, deadline_ns: int) -> list[Ticket]:
        return []

    def send(self, dst: int, tag: int, view: memoryview, window: object = None) -> Ticket:
        if view.nbytes == CHUNK_ELEMS * 4:
            self.events.append("send")
        return Ticket(TicketKind.SEND, dst, tag, view.nbytes)


class NotedMemory(Memory):
    """Notes when it folds."""

    def fold(self, plan: Plan, step: int) -> None:
        self.work.events.append("fold")  # type: ignore[attr-defined]
        super().fold(plan, step)


class Unwaiting(Loop):
    """Its turns do not wait, and note what was done before they would."""

    def _wait(self, now_ns: int) -> None:
        self.waits.append([work.done() for work in self.works])


@pytest.fixture
def descriptor() -> Iterator[int]:
    number = os.eventfd(0)
    yield number
    os.close(number)


def loop_of(descriptor: int, keeper: Any, events: list[str]) -> Unwaiting:
    routes: Any = Routes({1: Noted(events)}, [0, 1], frozenset({1}))
    keeper = keeper or Timekeeper(0, [0], ["clock", "clock"], routes.endpoint_of)
    engine = Engine(0, [0, 1], routes.wide, Slots(build_calendar(TWO), 0, 0))
    rest: Any = SimpleNamespace(fileno=lambda: descriptor, announce=events.append)
    made = Unwaiting(engine, routes, keeper, rest, Trace(0, 0))
    made.waits, made.works, made.events = [], [], events  # type: ignore[attr-defined]
    engine.join(world([0, 1]))
    return made


@pytest.fixture
def loop(descriptor: int) -> Iterator[Unwaiting]:
    made = loop_of(descriptor, None, [])
    yield made
    made.close()


def carry_out(loop: Loop, *action: Any) -> None:
    loop.engine.actions.append(action)
    loop._courier.act()


def sum_of(elems: int, loop: Unwaiting) -> Operation:
    plan = compile_plan(Collective("all_reduce", elems, 4, 4), TWO, 0, "exchange", ChunkSize(CHUNK_ELEMS, 4))
    called = Descriptor(0, "all_reduce", "sum", "float32", elems, 0)
    work = Work("sum")
    work.events = loop.events  # type: ignore[attr-defined]
    loop.works.append(work)
    memory = NotedMemory(np.ones(elems, np.float32), ReduceOp.SUM, work, called.encode())
    return Operation(world([0, 1]), called, plan, 10**12, 0, (), memory)


def test_what_a_fold_makes_ready_leaves_before_the_next_fold(loop: Unwaiting) -> None:
    loop.submit(sum_of(3 * CHUNK_ELEMS, loop))
    while len(loop.events) < 6:
        loop._turn()
    assert loop.events == ["fold", "send"] * 3


def test_what_ends_with_a_fold_ends_before_the_thread_waits(loop: Unwaiting) -> None:
    operation = sum_of(CHUNK_ELEMS, loop)
    loop.submit(operation)
    loop._turn()
    awaited = [ticket for ticket in loop._endpoints[0].posted if ticket.nbytes < 1000 or ticket.nbytes > 2000]
    hello, sums = sorted(awaited, key=lambda ticket: ticket.nbytes)
    hello.view, sums.view = memoryview(operation.descriptor.encode()), memoryview(np.ones(CHUNK_ELEMS, np.float32))
    for ticket in (hello, sums):
        ticket.status = TicketStatus.DONE
        loop._courier.take(ticket, [])
    loop._turn()
    assert loop.waits == [[False], [True]]
    assert (operation.memory.array == 2).all()


def test_a_call_whose_array_cannot_be_loaded_fails_and_costs_nothing_else(loop: Unwaiting) -> None:
    operation = sum_of(CHUNK_ELEMS, loop)

    def load() -> None:
        raise OSError("the device is gone")

    operation.memory.load = load
    loop.submit(operation)
    loop._turn()
    assert loop.failure is None
    with pytest.raises(Exception, match="its memory cannot be used: OSError"):
        loop.works[0].wait(0)
    assert len([ticket for ticket in loop._endpoints[0].posted if ticket.nbytes == CHUNK_ELEMS * 4]) == 0


def test_calls_end_for_their_callers_though_an_endpoint_breaks_while_their_end_is_told(loop: Unwaiting) -> None:
    """The first message that tells of the end breaks the endpoint; what was to follow it would have ended the calls."""
    for _ in range(3):
        loop.submit(sum_of(CHUNK_ELEMS, loop))
    loop._turn()

    def broken(*given: object, **more: object) -> None:
        raise TransportError("the endpoint is broken")

    loop._endpoints[0].send = broken  # type: ignore[method-assign]
    loop.post(lambda now_ns: loop.engine.failures.fail_group(world([0, 1]), DeadlineMissed("too late"), now_ns))
    thread = threading.Thread(target=loop._run)  # it changes how its thread is scheduled
    thread.start()
    thread.join()
    assert isinstance(loop.failure, TransportError)
    for work in loop.works:
        with pytest.raises(DeadlineMissed, match="too late"):
            work.wait(0)


def broadcast(loop: Unwaiting) -> Operation:
    """Return a call that receives into the caller's array."""
    operation = sum_of(CHUNK_ELEMS, loop)
    plan = compile_plan(Collective("broadcast", CHUNK_ELEMS, 4, 4, 1), TWO, 0, "star", ChunkSize(CHUNK_ELEMS, 4))
    return Operation(operation.group, operation.descriptor, plan, 10**12, 0, (), operation.memory)


@pytest.mark.parametrize("how", ["ends", "overdue", "job ends"])
def test_a_caller_hears_of_a_failure_once_nothing_writes_into_its_array(loop: Unwaiting, monkeypatch, how: str) -> None:
    if how == "overdue":
        monkeypatch.setattr(endings, "LONGEST_NS", 0)
    loop.submit(broadcast(loop))
    loop._turn()
    (data,) = [ticket for ticket in loop._endpoints[0].posted if ticket.nbytes == CHUNK_ELEMS * 4]
    loop.engine.failures.fail_group(world([0, 1]), DeadlineMissed("too late"), 0)
    loop._courier.act()
    assert not loop.works[0].done()
    if how == "ends":
        data.status = TicketStatus.DONE
        loop._courier.take(data, [])
    elif how == "overdue":
        loop._turn()
    else:
        loop._end_all(TransportError("the job has ended"))
    with pytest.raises(DeadlineMissed, match="too late"):
        loop.works[0].wait(0)


def test_a_caller_waits_for_no_receive_that_failed_or_was_not_posted(loop: Unwaiting) -> None:
    first, second = broadcast(loop), broadcast(loop)
    loop.submit(first)
    loop._turn()
    (data,) = [ticket for ticket in loop._endpoints[0].posted if ticket.nbytes == CHUNK_ELEMS * 4]
    data.status, data.error = TicketStatus.FAILED, TransportError("broken")
    loop._courier.take(data, [])
    assert loop.works[0].done()

    loop = loop_of(loop._rest.fileno(), None, [])
    second.memory.load = lambda: 1 / 0
    loop.works.append(second.memory.work)
    loop.submit(second)
    loop._turn()
    assert second.memory.work.done()
    loop.close()


def test_a_result_that_cannot_be_stored_fails_its_call_only(loop: Unwaiting) -> None:
    operation = sum_of(CHUNK_ELEMS, loop)

    def store() -> None:
        raise OSError("the device is gone")

    operation.memory.store = store
    loop.submit(operation)
    loop._turn()
    carry_out(loop, Act.FINISH, operation, None)
    with pytest.raises(TransportError, match="the result could not be stored: OSError"):
        loop.works[0].wait(0)
    operation.memory.view(Buffer.PARTIAL, 0, 0)  # others may still need it


def test_a_lifted_tag_is_asked_for_once_and_given_up(loop: Unwaiting) -> None:
    endpoint = loop._endpoints[0]
    loop._courier.act()
    before = len(endpoint.posted)
    cancelled: list[Ticket] = []
    endpoint.cancel = cancelled.append  # type: ignore[attr-defined]
    carry_out(loop, Act.LIFT, 77 << 20, [0, 1])
    assert [(ticket.peer, ticket.tag) for ticket in endpoint.posted[before:]] == [(1, 77 << 20)]
    assert cancelled == endpoint.posted[before:]


def test_a_thread_that_has_drained_starts_nothing_about_time_any_more(descriptor: int) -> None:
    told: list[str] = []

    def lose(ticket: Ticket) -> None:
        told.append("ticket")
        raise PeerLost("rank 1 is gone")

    keeper: Any = SimpleNamespace(
        turn=lambda now_ns: told.append("turn"), offset_ns=lambda now_ns: 0, next_ns=lambda now_ns: now_ns,
        trusted=False, synchronised=True, asks=True,
    )  # fmt: skip
    loop = loop_of(descriptor, keeper, [])
    try:
        loop._turn()
        assert loop.synchronised.is_set()
        assert not loop.engine.slots.trusted
        ticket = Ticket(TicketKind.RECV, 1, 0, 0, context=lose)
        loop._courier.take(ticket, [])
        assert loop._wake_ns(5) == 5
        loop._drained.set()
        assert loop._wake_ns(5) > 5
        loop._turn()
        loop._courier.take(ticket, [])
        assert told == ["turn", "ticket", "ticket"]
    finally:
        loop.close()
