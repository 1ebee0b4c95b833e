"""Collectives of shared memory that a rank gives up: all ranks agree on that, and are told why."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from detcoll.errors import Closed, DeadlineMissed, DetcollError, PlanMismatch, TransportError
from detcoll.fold import Folder, folder
from detcoll.testing.fabric import Here, ThreadFabric
from detcoll.testing.natives import Natives
from detcoll.testing.worlds import ProcessFabric, Worlds
from detcoll.types import ReduceOp
from detcoll_shm import ShmEndpoint, ShmTransport, bell, call_layout
from detcoll_shm.lockstep import Lockstep
from detcoll_shm.stage import ARRIVED, ASLEEP
from detcoll_shm.verdict import Reason

CHUNKS = {"chunk_bytes": 64, "direct_bytes": 16, "read_bytes": 2**32}
READ = {"chunk_bytes": 64, "direct_bytes": 16, "read_bytes": 0}
PASSED_NS = 1
"""A deadline that has passed: whoever has to sleep gives up at once."""

NEVER_NS = 10**12
"""Longer than a test may take: whoever is not woken waits until it is ended."""


def lockstep_of(here: Here) -> Lockstep:
    assert isinstance(here.endpoint, ShmEndpoint)
    return here.endpoint._begin_collectives()._lockstep


def reduces(here: Here, deadline_ns: int, placed: bool = False) -> None:
    """Reduce 100 elements, on memory that all ranks see if it is ``placed``."""
    assert isinstance(here.endpoint, ShmEndpoint)
    array = np.frombuffer(here.endpoint.allocate(800), np.float64) if placed else np.empty(100)
    array[:] = here.rank
    Natives(here.endpoint).all_reduce(array, ReduceOp.SUM, deadline_ns)
    assert (array == sum(range(here.size))).all()


def call(here: Here, kind: str, deadline_ns: int) -> None:
    assert isinstance(here.endpoint, ShmEndpoint)
    if kind == "barrier":
        Natives(here.endpoint).barrier(deadline_ns)
    elif kind == "broadcast":
        array = np.full(100, float(here.rank))
        Natives(here.endpoint).broadcast(array, 1, deadline_ns)
        assert (array == 1).all()
    else:
        reduces(here, deadline_ns, kind == "in place")


def prepare(here: Here, kind: str) -> None:
    """Let ranks find out that they may read each other's memory."""
    if kind == "read":
        reduces(here, here.deadline_ns())


CALLS = [
    ("barrier", {}), ("all_reduce", {}), ("all_reduce", CHUNKS), ("in place", CHUNKS), ("read", READ),
    ("broadcast", {}), ("broadcast", CHUNKS),
]  # fmt: skip
IDS = ["barrier", "small", "staged", "in place", "read", "broadcast", "broadcast in parts"]


def comes_late(here: Here, kind: str) -> None:
    """Rank 0 calls when the others have given up."""
    prepare(here, kind)
    if here.rank == 0:
        here.meet()
    with pytest.raises(DeadlineMissed, match="it waits for rank 0, which has not begun it"):
        call(here, kind, PASSED_NS if here.rank else here.deadline_ns())
    if here.rank:
        here.meet()
    with pytest.raises(Closed, match="an earlier collective failed"):
        call(here, kind, here.deadline_ns())


@pytest.mark.parametrize(("kind", "options"), CALLS, ids=IDS)
def test_a_late_rank_does_not_finish_what_others_gave_up(kind: str, options: dict[str, int]) -> None:
    with ThreadFabric(ShmTransport(), 3, options) as fabric:
        fabric.run(comes_late, kind=kind)


def publishes_late(here: Here, kind: str) -> None:
    """Rank 0 is late with the very last word of a collective, when it has all that it needs of the others."""
    prepare(here, kind)
    lockstep = lockstep_of(here)
    publish, await_all = lockstep.publish, lockstep.await_all

    def publish_late(word: int, value: int) -> None:
        if (word, value) == lockstep.last_word:
            here.meet()
        publish(word, value)

    def await_no_longer(word: int, value: int) -> None:
        if (word, value) == lockstep.last_word:
            lockstep._deadline_ns = PASSED_NS
        await_all(word, value)

    if here.rank == 0:
        lockstep.publish = publish_late
    else:
        lockstep.await_all = await_no_longer
    with pytest.raises(DeadlineMissed, match=r"it waits for rank 0, which has not (folded|taken)"):
        call(here, kind, here.deadline_ns())
    if here.rank:
        here.meet()


@pytest.mark.parametrize(("kind", "options"), CALLS[2:5], ids=IDS[2:5])
def test_the_last_word_of_a_late_rank_comes_too_late(kind: str, options: dict[str, int]) -> None:
    with ThreadFabric(ShmTransport(), 3, options) as fabric:
        fabric.run(publishes_late, kind=kind)


def until(is_true: Callable[[], bool]) -> None:
    """Wait for what another thread does, which has no event to tell by."""
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline
        os.sched_yield()


def comes_in_time_after_all(here: Here, asks: threading.Event) -> None:
    """Rank 0 arrives while rank 1 asks whether to give up, and waits until that is settled."""
    lockstep = lockstep_of(here)
    if here.rank == 0:
        assert asks.wait(30)
        Natives(here.endpoint).barrier(here.deadline_ns())
    else:
        give_up, words = lockstep._is_done_after_trying, lockstep.peers[0].stage.words

        def give_up_slowly(reason: Reason, is_done: Callable[[], bool]) -> bool:
            def asked() -> bool:
                assert not is_done()
                asks.set()
                until(lambda: words[ARRIVED] == 1 and words[ASLEEP] == 1)
                return is_done()

            return give_up(reason, asked)

        lockstep._is_done_after_trying = give_up_slowly
        Natives(here.endpoint).barrier(PASSED_NS)
        lockstep._is_done_after_trying = give_up
    Natives(here.endpoint).barrier(here.deadline_ns())


def test_one_that_arrives_while_another_asks_is_in_time() -> None:
    with ThreadFabric(ShmTransport(), 2) as fabric:
        fabric.run(comes_in_time_after_all, asks=threading.Event())


def races(here: Here, shift_ns: int) -> bool:
    """Call at about the same moment as all others, with so little time that some give up; tell who returned."""
    Natives(here.endpoint).barrier(here.deadline_ns())
    mine_ns = shift_ns if here.rank == 0 else 0
    until_ns = time.monotonic_ns() + mine_ns
    while time.monotonic_ns() < until_ns:
        pass
    try:
        Natives(here.endpoint).barrier(PASSED_NS)
    except DeadlineMissed:
        return False
    return True


@pytest.mark.parametrize("shift_us", [200, 400])
def test_all_agree_whether_a_collective_was_given_up(shift_us: int, worlds: Worlds) -> None:
    for round_ in range(10):
        with ProcessFabric(worlds.of(3), "detcoll_shm:ShmTransport") as fabric:
            returned = fabric.run(races, shift_ns=shift_us * 1000 + round_ * 1000)
            assert len(set(returned)) == 1, returned


@pytest.fixture(scope="module")
def worlds() -> Any:
    made = Worlds()
    yield made
    made.end()


def interrupt(thread: int) -> None:
    """Raise KeyboardInterrupt in another thread, as a signal does in the main one."""
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt)) == 1


def interrupted(here: Here, threads: dict[int, int], is_over: threading.Event, kind: str) -> None:
    """Rank 1 is interrupted while it waits for rank 2, as does rank 0."""
    lockstep = lockstep_of(here)
    threads[here.rank] = threading.get_ident()
    if here.rank == 2:
        until(lambda: all(peer.stage.words[ASLEEP] for peer in lockstep.peers))
        interrupt(threads[1])
        assert is_over.wait(30)
    if here.rank == 1:
        with pytest.raises(KeyboardInterrupt):
            call(here, kind, here.deadline_ns())
        is_over.set()
    else:
        with pytest.raises(TransportError) as seen:
            call(here, kind, here.deadline_ns())
        name = kind if kind == "barrier" else "all_reduce"
        assert str(seen.value) == f"rank 1 was interrupted in {name} number 0"
    with pytest.raises(Closed, match="rank 1 was interrupted in"):
        call(here, kind, here.deadline_ns())


@pytest.mark.parametrize(("kind", "options"), CALLS[:3], ids=IDS[:3])
def test_an_interruption_is_told_to_all(kind: str, options: dict[str, int]) -> None:
    with ThreadFabric(ShmTransport(), 3, options) as fabric:
        fabric.run(interrupted, threads={}, is_over=threading.Event(), kind=kind)


def one_fails(here: Here, kind: str, error: BaseException, failing: set[int]) -> None:
    """Rank 1 fails when it folds, in the first call in which it may."""
    prepare(here, kind)
    here.meet()
    if here.rank == 1:
        failing.add(threading.get_ident())
    here.meet()
    told = "was interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    with pytest.raises(type(error) if here.rank == 1 else TransportError) as seen:
        call(here, kind, here.deadline_ns())
    assert here.rank == 1 or str(seen.value).startswith(f"rank 1 {told} in all_reduce number {kind == 'read':d}")
    with pytest.raises(Closed, match=f"rank 1 {told}"):
        call(here, kind, here.deadline_ns())


def folds_fail(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Let folds raise ``error`` in the threads whose identifiers are put into the set that is returned."""
    failing: set[int] = set()

    def failing_folder(*arguments: Any) -> Folder:
        fold = folder(*arguments)

        def fold_or_fail(*arrays: Any) -> None:
            if threading.get_ident() in failing:
                raise error
            fold(*arrays)

        return fold_or_fail

    monkeypatch.setattr(call_layout, "folder", failing_folder)
    return failing


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no"), SystemExit(1)], ids=repr)
@pytest.mark.parametrize(("kind", "options"), CALLS[2:5], ids=IDS[2:5])
def test_a_failure_in_the_middle_is_told_to_all(
    kind: str, options: dict[str, int], error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = folds_fail(error, monkeypatch)
    with ThreadFabric(ShmTransport(), 3, options) as fabric:
        fabric.run(one_fails, kind=kind, error=error, failing=failing)


def fails_first(here: Here) -> None:
    """Rank 1 fails before it has arrived, while the others sleep."""
    lockstep = lockstep_of(here)
    if here.rank == 1:

        def fail(*_: object) -> None:
            until(lambda: all(peer.stage.words[ASLEEP] for peer in lockstep.peers))
            raise MemoryError

        here.endpoint._collectives._give = fail
    with pytest.raises(MemoryError if here.rank == 1 else TransportError) as seen:
        call(here, "all_reduce", time.monotonic_ns() + NEVER_NS)
    assert here.rank == 1 or str(seen.value) == "rank 1 failed in all_reduce number 0: MemoryError()"


def test_a_failure_before_the_arrival_wakes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bell, "RECHECK_NS", NEVER_NS)
    with ThreadFabric(ShmTransport(), 3, CHUNKS) as fabric:
        fabric.run(fails_first)


def interrupted_late(here: Here, failing: set[int]) -> None:
    """Rank 1 is interrupted when all have arrived: the others return, and are told in the next call."""
    if here.rank == 1:
        failing.add(threading.get_ident())
        with pytest.raises(KeyboardInterrupt):
            call(here, "all_reduce", here.deadline_ns())
    else:
        call(here, "all_reduce", here.deadline_ns())
        with pytest.raises(TransportError, match="rank 1 was interrupted in all_reduce number 0"):
            call(here, "barrier", here.deadline_ns())


def test_what_all_ranks_have_called_goes_on_without_one_that_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = folds_fail(KeyboardInterrupt(), monkeypatch)
    with ThreadFabric(ShmTransport(), 3) as fabric:
        fabric.run(interrupted_late, failing=failing)


def interrupted_twice(here: Here) -> None:
    """Rank 1 fails, and is interrupted while it says so."""
    lockstep = lockstep_of(here)
    if here.rank == 1:
        give_up, times = lockstep._is_done_after_trying, []

        def interrupted(reason: Reason, is_done: Callable[[], bool]) -> bool:
            times.append(reason)
            if len(times) < 3:
                raise KeyboardInterrupt
            return give_up(reason, is_done)

        lockstep._is_done_after_trying = interrupted
        with pytest.raises(KeyboardInterrupt):
            Natives(here.endpoint).barrier(PASSED_NS)
    else:
        here.meet()
        with pytest.raises(TransportError, match="rank 1 was interrupted in barrier number 0"):
            Natives(here.endpoint).barrier(here.deadline_ns())
    if here.rank == 1:
        here.meet()


def test_an_interruption_of_the_ending_changes_nothing() -> None:
    with ThreadFabric(ShmTransport(), 2) as fabric:
        fabric.run(interrupted_twice)


def keeps_messages(here: Here) -> None:
    """After a collective has failed, messages go on."""
    if here.rank:
        with pytest.raises(DeadlineMissed):
            call(here, "barrier", PASSED_NS)
    here.meet()
    tickets = [here.send(other, 7, bytes([here.rank] * 9)) for other in here.others]
    for other in here.others:
        assert here.take(other, 7, 9) == bytes([other] * 9)
    here.finish(*tickets)
    here.meet()


def test_a_collective_that_failed_leaves_messages_alone() -> None:
    with ThreadFabric(ShmTransport(), 3) as fabric:
        fabric.run(keeps_messages)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DeadlineMissed("x"), DeadlineMissed),
        (PlanMismatch("x"), PlanMismatch),
        (ValueError("\ud800" * 9999), TransportError),
    ],
)
def test_a_reason_is_raised_as_what_it_was(error: Exception, kind: type[DetcollError]) -> None:
    read = Reason.decode(Reason.of(error, 3, "barrier number 5").encode().ljust(1024, b"\0"))
    raised = read.error(4, "barrier number 5")
    assert type(raised) is kind
    assert len(str(raised)) < 1024
    assert "x" in str(raised) or str(raised).startswith("rank 3 failed in barrier number 5: ValueError")
