"""What is MPI's own: who may join, its fold of 16-bit floats, parts, leftovers, and what ends a job.

The functions above the tests run in the ranks' processes, which import this file.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import detcoll_mpi.blocking
import detcoll_mpi.collectives
import detcoll_mpi.progress
from detcoll.errors import Closed, DeadlineMissed, PeerLost, TransportUnavailable, UsageError
from detcoll.testing import (
    MPI_ENVIRONMENT,
    Here,
    ProcessFabric,
    ThreadFabric,
    WorldError,
    Worlds,
    mpi_launcher,
    pattern,
)
from detcoll.testing.fabric import Program
from detcoll.testing.natives import Natives
from detcoll.testing.programs import collectives, messages
from detcoll.transport import TicketStatus
from detcoll.types import ReduceOp
from detcoll_mpi import MpiTransport
from detcoll_mpi.blocking import BlockingCaller
from detcoll_mpi.mail import HEADER, INLINE_BYTES, Mail
from detcoll_mpi.pool import LARGEST_IDLE_BYTES, SMALLEST_BYTES, Pool
from detcoll_mpi.progress import Progress

LAUNCHER = mpi_launcher()
TRANSPORT = "detcoll_mpi:MpiTransport"
needs_mpi = pytest.mark.skipif(
    find_spec("mpi4py") is None or LAUNCHER is None, reason="mpi4py or mpiexec is not installed"
)


def half_floats(here: Here) -> None:
    """Sums of 16-bit floats are rounded once, and their averages do not overflow on the way."""
    first = 256 if here.rank == 0 else 1
    total = np.full(1000, first, ml_dtypes.bfloat16)
    Natives(here.endpoint).all_reduce(total, ReduceOp.SUM, here.deadline_ns())
    assert (total == 256 + here.size - 1).all()
    large = np.full(1000, 40_000, np.float16)
    Natives(here.endpoint).all_reduce(large, ReduceOp.AVG, here.deadline_ns())
    assert (large == 40_000).all()


def in_parts(here: Here) -> None:
    """An array that is larger than one call may take goes in parts."""
    module = detcoll_mpi.collectives
    before = module.LARGEST_PART_BYTES, module.STAGE_ELEMS
    module.LARGEST_PART_BYTES, module.STAGE_ELEMS = 96, 10
    try:
        collectives.all_reduce(here, [1, 7, 101], ["float32", "float64", "bfloat16", "int8"])
        collectives.broadcast(here, [101])
    finally:
        module.LARGEST_PART_BYTES, module.STAGE_ELEMS = before


def blocking_everywhere(here: Here) -> None:
    """The blocking calls give the same results."""
    module = detcoll_mpi.lockstep
    before, module.WATCHED_BYTES = module.WATCHED_BYTES, 0
    try:
        collectives.all_reduce(here, [1, 7, 101], ["float32", "bfloat16", "int64"])
        collectives.broadcast(here, [1, 101])
        collectives.late_collective(here, "all_reduce")
    finally:
        module.WATCHED_BYTES = before


def leave_mail(here: Here) -> None:
    """Send what is never received."""
    if here.rank == 0:
        here.finish(here.send(1, 5, b"old mail"))
        here.finish(here.send(1, 6, b"last"))
    if here.rank == 1:
        here.take(0, 6, 4)


def expect_new_mail(here: Here) -> None:
    """Receive what is sent now, not what an earlier endpoint left."""
    if here.rank == 0:
        here.finish(here.send(1, 5, b"new mail"))
    if here.rank == 1:
        assert here.take(0, 5, 8) == b"new mail"


def die(here: Here) -> None:
    """Rank 1 ends without a word; the others wait for it."""
    if here.rank == 1:
        os._exit(3)
    here.take(1, 1, 1)


def abort(here: Here) -> None:
    """Rank 1 aborts; the others wait for it."""
    if here.rank == 1:
        here.endpoint.abort()
    here.take(1, 1, 1)


def raise_alone(here: Here) -> None:
    """Rank 1 raises; the others come to their deadlines."""
    if here.rank == 1:
        raise ValueError("rank 1 has its reasons")
    ticket = here.endpoint.recv(1, 1, 1)
    assert not here.endpoint.poll(here.clock.now_ns() + 10**7)
    assert ticket.status is TicketStatus.PENDING
    with pytest.raises(DeadlineMissed):
        Natives(here.endpoint).barrier(here.clock.now_ns() + 10**7)


def few_numbers(here: Here, count: int = 9, nbytes: int = 50_000) -> None:
    """Messages that share one of MPI's tags, since those have begun again, are not mixed up in whatever order."""
    here.endpoint._mail._numbers = 2
    if here.rank == 0:
        sent = [here.send(1, tag, pattern(tag, nbytes)) for tag in range(2 * count)]
        here.meet()
        here.finish(*sent)
        here.finish(here.send(1, 99, b"done"))
        return
    posted = [here.endpoint.recv(0, tag, nbytes) for tag in range(0, count, 3)]
    here.meet()
    here.endpoint.poll(here.clock.now_ns())
    here.endpoint.discard(16, 4)
    for tag in reversed(range(16)):
        if tag not in range(0, count, 3):
            assert here.take(0, tag, nbytes) == pattern(tag, nbytes)
    here.finish(*posted)
    assert [bytes(ticket.view) == pattern(ticket.tag, nbytes) for ticket in posted] == [True] * len(posted)
    assert here.take(0, 99, 4) == b"done"


def small_behind_large(here: Here, numbers: int) -> None:
    """Messages with one tag keep their order, though small ones are here with their letters and large ones are not."""
    here.endpoint._mail._numbers = numbers
    large = INLINE_BYTES + 1
    sizes = {1: [50_000, 5, 40_000, 0, 7, large], 2: [50_000, 3, 40_000, large]}
    mail = [(tag, pattern(tag * 10 + index, nbytes)) for tag in sizes for index, nbytes in enumerate(sizes[tag])]
    if here.rank == 0:
        sent = [here.send(1, tag, data) for tag, data in mail]
        here.finish(*sent, here.send(1, 99, b"all"))
        return
    assert here.take(0, 99, 3) == b"all"
    for tag, data in mail:
        assert here.take(0, tag, len(data)) == data


def drop_announced(here: Here) -> None:
    """A large message that stays with its sender is fetched once it is discarded, so that its send ends."""
    if here.rank == 0:
        dropped = here.send(1, 16, pattern(0, 10**6))
        here.finish(here.send(1, 99, b"sent"), dropped)
        here.finish(here.send(1, 17, b"kept"))
        return
    assert here.take(0, 99, 4) == b"sent"
    here.endpoint.discard(16, 0)
    assert here.take(0, 17, 4) == b"kept"


def too_late(here: Here) -> None:
    """Rank 0 comes when the others have given up: it learns so, and by whom, instead of getting a result."""
    array = np.ones(10)
    if here.rank:
        with pytest.raises((DeadlineMissed, PeerLost)):
            Natives(here.endpoint).all_reduce(array, ReduceOp.SUM, here.clock.now_ns() + 10**7)
        here.finish(here.send(0, 1, b"given up"))
        return
    for rank in here.others:
        here.take(rank, 1, 8)
    with pytest.raises(PeerLost, match=r"rank [12] gave up.*number 1 .*DeadlineMissed"):
        Natives(here.endpoint).all_reduce(array, ReduceOp.SUM, here.deadline_ns())


def reduce_and_meet(here: Here) -> None:
    Natives(here.endpoint).all_reduce(np.ones(10), ReduceOp.SUM, here.deadline_ns())
    Natives(here.endpoint).barrier(here.deadline_ns())


def interrupted_in_a_blocking_call(here: Here) -> None:
    """An exception while a rank waits for a blocking call ends the wait of all, by name, and messages go on."""
    module = detcoll_mpi.lockstep
    before, module.WATCHED_BYTES = module.WATCHED_BYTES, 0
    endpoint = here.endpoint
    try:
        Natives(endpoint).all_reduce(np.ones(10), ReduceOp.SUM, here.deadline_ns())
        if here.rank == 0:
            caller = endpoint._collectives.lockstep._caller
            wait, caller._answers = caller._answers, SimpleNamespace(get=raise_inside)
            with pytest.raises(ValueError, match="inside"):
                Natives(endpoint).all_reduce(np.ones(10), ReduceOp.SUM, here.deadline_ns())
            caller._answers = wait
            with pytest.raises(Closed):
                Natives(endpoint).barrier(here.deadline_ns())
        else:
            with pytest.raises(PeerLost, match=r"rank 0 gave up.*ValueError: inside"):
                reduce_and_meet(here)
    finally:
        module.WATCHED_BYTES = before
    messages.each_to_each(here, 100)


class _Inside:
    """A rendezvous of the ranks ``members``, through the messages of an endpoint that joins more."""

    host = "127.0.0.1"

    def __init__(self, here: Here, members: list[int]) -> None:
        self._here, self._members = here, members

    def exchange(self, name: str, payload: bytes, deadline_ns: int) -> list[bytes]:
        here, others = self._here, [rank for rank in self._members if rank != self._here.rank]
        tickets = [here.send(rank, 9, payload.ljust(200, b"\0")) for rank in others]
        answers = {rank: here.take(rank, 9, 200).rstrip(b"\0") for rank in others} | {here.rank: payload}
        here.finish(*tickets)
        return [answers[rank] for rank in self._members]


def part_of_the_world(here: Here) -> None:
    """Ranks 2 and 1 of three, in this order, make a job of two."""
    members = [2, 1]
    if here.rank not in members:
        return
    rank = members.index(here.rank)
    inside: Any = _Inside(here, members)
    endpoint = MpiTransport().open(rank, 2, inside, here.clock, {})
    endpoint.connect({0: "", 1: ""}, here.deadline_ns())
    there = Here(rank, 2, endpoint, here.capabilities, lambda: None)
    array = np.full(10, rank + 1.0)
    Natives(endpoint).broadcast(array, 0, here.deadline_ns())
    assert (array == 1).all()
    Natives(endpoint).all_reduce(array, ReduceOp.SUM, here.deadline_ns())
    assert (array == 2).all()
    sent = there.send(1 - rank, 1, pattern(rank, 100))
    assert there.take(1 - rank, 1, 100) == pattern(1 - rank, 100)
    there.finish(sent)
    assert endpoint.counters()["bytes_sent"] == endpoint.counters()["bytes_received"] == 100
    endpoint.close(here.deadline_ns())


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    made = Worlds(LAUNCHER or (), MPI_ENVIRONMENT)
    yield made
    made.end()


@needs_mpi
def test_half_floats(worlds: Worlds) -> None:
    with ProcessFabric(worlds.of(3), TRANSPORT) as fabric:
        fabric.run(half_floats)


@needs_mpi
def test_large_arrays_go_in_parts(worlds: Worlds) -> None:
    with ProcessFabric(worlds.of(2), TRANSPORT) as fabric:
        fabric.run(in_parts)


@needs_mpi
def test_blocking_calls(worlds: Worlds) -> None:
    with ProcessFabric(worlds.of(2), TRANSPORT) as fabric:
        fabric.run(blocking_everywhere)


@needs_mpi
def test_old_mail_is_not_delivered_to_the_next_endpoint(worlds: Worlds) -> None:
    with ProcessFabric(worlds.of(2), TRANSPORT) as fabric:
        fabric.run(leave_mail)
    with ProcessFabric(worlds.of(2), TRANSPORT) as fabric:
        fabric.run(expect_new_mail)


@needs_mpi
def test_numbers_that_begin_again(worlds: Worlds) -> None:
    with ProcessFabric(worlds.of(2), TRANSPORT) as fabric:
        fabric.run(few_numbers)


@pytest.mark.parametrize("numbers", [1, 2, 100])
@needs_mpi
def test_small_messages_stay_behind_large_ones(worlds: Worlds, numbers: int) -> None:
    with ProcessFabric(worlds.of(2), TRANSPORT) as fabric:
        fabric.run(small_behind_large, numbers=numbers)


@needs_mpi
def test_discarded_while_it_stays_with_its_sender(worlds: Worlds) -> None:
    with ProcessFabric(worlds.of(2), TRANSPORT) as fabric:
        fabric.run(drop_announced)


@needs_mpi
def test_who_comes_too_late_learns_it(worlds: Worlds) -> None:
    with ProcessFabric(worlds.of(3), TRANSPORT) as fabric:
        fabric.run(too_late)


@needs_mpi
def test_interrupted_in_a_blocking_call(worlds: Worlds) -> None:
    with ProcessFabric(worlds.of(2), TRANSPORT) as fabric:
        fabric.run(interrupted_in_a_blocking_call)


@needs_mpi
def test_part_of_the_world(worlds: Worlds) -> None:
    with ProcessFabric(worlds.of(3), TRANSPORT) as fabric:
        fabric.run(part_of_the_world)


@needs_mpi
def test_ranks_in_another_order(worlds: Worlds) -> None:
    shuffled = Worlds(LAUNCHER or (), {**MPI_ENVIRONMENT, "DETCOLL_TESTING_ORDER": "2,0,1"})
    try:
        with ProcessFabric(shuffled.of(3), TRANSPORT) as fabric:
            fabric.run(messages.each_to_each, nbytes=1000)
            fabric.run(collectives.broadcast, counts=[10])
    finally:
        shuffled.end()


@needs_mpi
def test_an_exception_on_one_rank_leaves_no_other_waiting(worlds: Worlds) -> None:
    with (
        pytest.raises(WorldError, match="rank 1 has its reasons") as caught,
        ProcessFabric(worlds.of(2), TRANSPORT) as fabric,
    ):
        fabric.run(raise_alone)
    assert "rank 0" not in str(caught.value)


@pytest.mark.parametrize(
    ("program", "options"),
    [(die, {}), (abort, {"abort_job": True})],
    ids=["dead process", "abort_job"],
)
@needs_mpi
def test_the_launcher_ends_the_job(worlds: Worlds, program: Program, options: dict[str, object]) -> None:
    world = worlds.of(2)
    with pytest.raises(WorldError, match="died"), ProcessFabric(world, TRANSPORT, options) as fabric:
        fabric.run(program)
    assert not world.is_alive


@needs_mpi
def test_ranks_without_a_launcher_are_refused(worlds: Worlds) -> None:
    apart = Worlds()
    try:
        with pytest.raises(WorldError, match="mpiexec -n 2"), ProcessFabric(apart.of(2), TRANSPORT):
            pass
    finally:
        apart.end()


def fake_mpi(**changes: Any) -> SimpleNamespace:
    world = SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 1, Get_attr=lambda key: 2**31 - 1)
    levels = {"THREAD_MULTIPLE": 3, "Query_thread": lambda: changes.get("level", 3), "TAG_UB": 0}
    state = {"Is_initialized": lambda: True, "Is_finalized": lambda: changes.get("finalized", False)}
    return SimpleNamespace(COMM_WORLD=world, **state, **levels)


def without_mpi4py() -> Any:
    raise ImportError("No module named 'mpi4py'")


def without_library() -> Any:
    raise RuntimeError("cannot load MPI library")


@pytest.mark.parametrize(
    ("load", "text"),
    [
        (without_mpi4py, r"No module named 'mpi4py'.*pip install .*\[mpi\]"),
        (without_library, r"cannot load MPI library.*pip install .*\[mpi\]"),
        (lambda: fake_mpi(level=2), "MPI_THREAD_MULTIPLE"),
        (lambda: fake_mpi(finalized=True), "finalized"),
        (lambda: fake_mpi(), "mpiexec -n 2"),
    ],
)
def test_what_is_missing_is_said_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch, load: Callable[[], Any], text: str
) -> None:
    imported = importlib.import_module
    monkeypatch.setattr(
        "detcoll_mpi.transport.importlib.import_module", lambda name: load() if name == "mpi4py.MPI" else imported(name)
    )
    with pytest.raises(TransportUnavailable, match=text), ThreadFabric(MpiTransport(), 2):
        pass


@pytest.mark.parametrize(
    "options", [{"abort_jobs": True}, {"abort_job": 1}, {"open_timeout_ns": "60 s"}, {"open_timeout_ns": True}]
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))), ThreadFabric(MpiTransport(), 1, options):
        pass


def test_a_call_that_does_not_return_is_given_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(detcoll_mpi.blocking, "_callers", [])
    ended: list[int] = []
    caller = BlockingCaller(SimpleNamespace(COMM_WORLD=SimpleNamespace(Abort=ended.append)))
    release = threading.Event()
    assert caller.call(lambda: None, 10)
    with pytest.raises(ValueError, match="inside"):
        caller.call(raise_inside, 10)
    assert not caller.call(lambda: release.wait(30), 0.001)
    assert caller.is_busy
    detcoll_mpi.blocking._end_job_if_stuck()
    assert ended == [1]
    assert "stuck in MPI" in capsys.readouterr().err
    caller.stop()
    release.set()
    caller._thread.join(30)
    assert not caller.is_busy
    detcoll_mpi.blocking._end_job_if_stuck()
    assert ended == [1]


def raise_inside(timeout: float = 0.0) -> None:
    raise ValueError("inside")


def test_pool_keeps_a_bounded_amount() -> None:
    pool = Pool()
    first, loan = pool.take(10_000)
    assert first.nbytes == 10_000
    loan.take_back(None)
    assert pool.take(9_000)[0].obj is first.obj
    assert pool.take(SMALLEST_BYTES - 1)[1] is None
    largest = [pool.take(LARGEST_IDLE_BYTES // 2 - 5) for _ in range(3)]
    for _, loan in largest:
        loan.take_back(None)
    again = [pool.take(LARGEST_IDLE_BYTES // 2) for _ in range(3)]
    assert sum(any(memory.obj is old.obj for old, _ in largest) for memory, _ in again) == 2


class RefusingMpi:
    """MPI that brings the letters it was given, and refuses all that is asked of it."""

    ANY_SOURCE, BYTE, Exception = -1, "byte", OSError

    def __init__(self, letters: list[bytes]) -> None:
        self.letters = letters

    def Status(self) -> SimpleNamespace:
        return SimpleNamespace(source=1, count=0)

    def Get_rank(self) -> int:
        return 0

    def Improbe(self, source: int, tag: int, state: SimpleNamespace) -> Any:
        if not self.letters:
            return None
        letter = self.letters.pop(0)
        state.count = len(letter)

        def receive(message: list[Any]) -> SimpleNamespace:
            message[0][:] = letter
            return SimpleNamespace(Test=lambda: True)

        return SimpleNamespace(Irecv=receive)

    def Isend(self, message: list[Any], dst: int, tag: int) -> Any:
        raise OSError("refused")

    def Irecv(self, message: list[Any], src: int, tag: int) -> Any:
        raise OSError("refused")


def test_what_mpi_refuses_costs_that_message_only() -> None:
    mpi = RefusingMpi([HEADER.pack(5, 9000, 1), HEADER.pack(6, 4, 0) + b"good"])
    mail = Mail(mpi, mpi, SimpleNamespace(now_ns=lambda: 1), 10_000, 100)
    mail.peers.add(1)
    with pytest.raises(PeerLost, match="MPI lost rank 1: refused"):
        mail.send(1, 5, memoryview(b"sent"))
    with pytest.raises(TypeError):
        mail.send(1, 5, memoryview(b"not in one piece")[::2])
    assert not mail.is_sending
    refused, good = mail.recv(1, 5, 9000, None), mail.recv(1, 6, 4, None)
    mail.progress()
    assert mail.collect() == [refused, good]
    assert isinstance(refused.error, PeerLost)
    assert good.view == b"good"
    assert mail.end()


def test_progress_is_made_while_nobody_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = [threading.Event() for _ in range(3)]

    def look(source: int, tag: int) -> None:
        next(event for event in looked if not event.is_set() or event is looked[-1]).set()

    world = SimpleNamespace(Iprobe=look)
    mpi = SimpleNamespace(COMM_WORLD=world, ANY_SOURCE=-1, ANY_TAG=-1, Is_finalized=lambda: False)
    monkeypatch.setattr(detcoll_mpi.progress, "LINGER_S", 0.0)
    progress = Progress()
    for _ in range(2):
        progress.enter(mpi)
    thread = progress._thread
    assert thread is not None
    assert all(event.wait(30) for event in looked)
    progress.leave()
    assert progress._thread is thread
    progress.leave()
    thread.join(30)
    assert not thread.is_alive()
    progress.enter(mpi)
    progress.stop()
    assert progress._thread is None
