"""Collectives of shared memory: the same bits as plans give, whatever the grouping, type, size and chunk."""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import re
import select
import threading
from functools import cache

import numpy as np
import pytest

from detcoll.errors import Closed, DeadlineMissed, PeerLost, PlanMismatch, TransportError, UsageError
from detcoll.fold import reference
from detcoll.testing.fabric import TIMEOUT_NS, Here, ThreadFabric
from detcoll.testing.natives import Natives
from detcoll.testing.values import varied
from detcoll.testing.worlds import ProcessFabric, Worlds
from detcoll.types import DTYPES, ReduceOp, operators_of
from detcoll_shm import ShmTransport, lockstep, processor, reading, regions

GROUPINGS = {
    "1": [[0]], "2": [[0, 1]], "1+1": [[0], [1]], "3": [[0, 1, 2]], "2+1": [[0, 1], [2]], "placed": [[1, 2], [0]],
    "4": [[0, 1, 2, 3]], "2+2": [[0, 1], [2, 3]], "1+3": [[0], [1, 2, 3]], "2+3+2": [[0, 1], [2, 3, 4], [5, 6]],
}  # fmt: skip
TINY = {"chunk_bytes": 64, "direct_bytes": 16, "wait_ns": 0, "read_bytes": 2**32}
READ = TINY | {"read_bytes": 0}
COUNTS = {"whole": (0, 1, 2, 3, 100, 1001), "chunks": (0, 1, 3, 17, 100)}


def placed(here: Here, values: np.ndarray) -> np.ndarray:
    """Return a copy of ``values`` in memory that all ranks see, a little behind its beginning."""
    ahead = here.rank * values.itemsize
    memory = here.endpoint.allocate(ahead + values.nbytes)
    array = np.frombuffer(memory, values.dtype, offset=ahead) if values.size else values.copy()
    array[:] = values
    return array


@cache
def given_and_expected(dtype: np.dtype, op: ReduceOp, count: int, groups: str) -> tuple[list[np.ndarray], bytes]:
    """Return what each rank gives, and the bits that the promise makes of it."""
    sites = json.loads(groups)
    given = [varied(dtype, count, rank) for rank in range(sum(map(len, sites)))]
    return given, reference(op, given, sites, dtype).tobytes()


def all_reduces(here: Here, groups: list[list[int]], counts: tuple[int, ...], shown: tuple[int, ...] = ()) -> None:
    """Every operation on every type gives the bits of the promise; the arrays of some ranks are shown to all."""
    here.endpoint.arrange(groups)
    for dtype in DTYPES.values():
        for op in operators_of(dtype):
            for count in counts:
                given, expected = given_and_expected(dtype, op, count, json.dumps(groups))
                mine = placed(here, given[here.rank]) if here.rank in shown else given[here.rank].copy()
                Natives(here.endpoint).all_reduce(mine, op, here.deadline_ns())
                assert mine.tobytes() == expected, f"{op.value} of {count} {dtype}, rank {here.rank}"


@pytest.mark.parametrize("groups", GROUPINGS.values(), ids=GROUPINGS)
@pytest.mark.parametrize("way", COUNTS)
def test_the_fold_is_the_promised_one(groups: list[list[int]], way: str) -> None:
    with ThreadFabric(ShmTransport(), sum(map(len, groups)), TINY if way == "chunks" else {}) as fabric:
        fabric.run(all_reduces, groups=groups, counts=COUNTS[way])


@pytest.mark.parametrize("name", ["1", "2", "2+1", "placed", "2+2"])
def test_arrays_that_are_read_fold_to_the_same_bits(name: str) -> None:
    groups = GROUPINGS[name]
    with ThreadFabric(ShmTransport(), sum(map(len, groups)), READ) as fabric:
        fabric.run(all_reduces, groups=groups, counts=(0, 1, 17, 100))


@pytest.mark.parametrize("groups", GROUPINGS.values(), ids=GROUPINGS)
@pytest.mark.parametrize("shown", [range(7), range(0, 7, 2)], ids=["all", "some"])
def test_arrays_that_all_ranks_see_fold_to_the_same_bits(groups: list[list[int]], shown: range) -> None:
    with ThreadFabric(ShmTransport(), sum(map(len, groups)), TINY) as fabric:
        fabric.run(all_reduces, groups=groups, counts=(0, 1, 17, 100), shown=tuple(shown))


def in_place(here: Here) -> None:
    """Nothing goes through the stages: what lies there stays as it was."""
    array = placed(here, np.full(1000, here.rank + 1.0, np.float32))
    before = [bytes(half) for half in here.endpoint._begin_collectives()._cutter.stages[here.rank].given]
    here.meet()
    Natives(here.endpoint).all_reduce(array, ReduceOp.SUM, here.deadline_ns())
    assert (array == 3).all()
    assert [bytes(half) for half in here.endpoint._collectives._cutter.stages[here.rank].given] == before


def test_arrays_that_all_ranks_see_are_not_staged() -> None:
    with ThreadFabric(ShmTransport(), 2, TINY) as fabric:
        fabric.run(in_place)


def read(here: Here) -> None:
    """From the second call on nothing goes through the stages, where all may read all; results are the same."""
    stage = here.endpoint._begin_collectives()._cutter.stages[here.rank]
    shown = []
    for _ in range(3):
        array = np.arange(1000, dtype=np.float64) * (here.rank + 1)
        stage.given[0][:] = stage.given[1][:] = 7
        Natives(here.endpoint).all_reduce(array, ReduceOp.SUM, here.deadline_ns())
        assert (array == np.arange(1000) * 6.0).all()
        shown.append(any((half != 7).any() for half in stage.given))
    assert shown == [True, *[not here.endpoint._collectives._reader.may_read] * 2]


@pytest.mark.parametrize("allowed", [True, False])
def test_arrays_are_read_where_the_system_allows_it(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not allowed:
        monkeypatch.setattr(reading, "_read", lambda pid, here, there: -1)
    with ThreadFabric(ShmTransport(), 3, READ) as fabric:
        fabric.run(read)
        assert all(fabric[rank]._collectives._reader.may_read is allowed for rank in range(3))


def test_one_that_may_not_read_makes_all_use_the_stages() -> None:
    def program(here: Here) -> None:
        reader = here.endpoint._begin_collectives()._reader
        reader._may_read = here.rank != 1
        stage = here.endpoint._collectives._cutter.stages[here.rank]
        for number in range(3):
            array = np.full(1000, here.rank + number)
            stage.given[0][:] = 7
            Natives(here.endpoint).all_reduce(array, ReduceOp.SUM, here.deadline_ns())
            assert (array == 3 + 3 * number).all()
            assert (stage.given[0] != 7).any()
            here.meet()

    with ThreadFabric(ShmTransport(), 3, READ) as fabric:
        fabric.run(program)


def hides_its_array(here: Here) -> None:
    Natives(here.endpoint).all_reduce(np.ones(1000), ReduceOp.SUM, here.deadline_ns())
    collectives = here.endpoint._collectives
    if here.rank == 1:
        collectives._place_of = lambda layout, memory: regions.Place(regions.OPEN, 0, 8)
    with pytest.raises(TransportError) as seen:
        Natives(here.endpoint).all_reduce(np.ones(1000), ReduceOp.SUM, here.deadline_ns())
    assert "memory of rank 1 cannot be read: Bad address" in str(seen.value) or "rank 0 aborted" in str(seen.value)


def test_an_array_that_is_not_there_ends_the_collective_of_all() -> None:
    with ThreadFabric(ShmTransport(), 2, READ) as fabric:
        fabric.run(hides_its_array)


def test_a_rank_whose_process_ended_is_lost_to_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says so to a reader before the watch on that process does."""

    def no_such_process(pid: int, here: object, there: object) -> int:
        ctypes.set_errno(errno.ESRCH)
        return -1

    monkeypatch.setattr(reading, "_read", no_such_process)
    own, theirs = (memoryview(bytearray(4096)).cast("q") for _ in range(2))
    reader = reading.Reader(own, b"k" * 16, {1: (theirs, b"x" * 16)}, lambda rank: None)
    with pytest.raises(PeerLost, match="the process of rank 1 ended"):
        reader.read(1, 0, np.empty(8, np.uint8))
    reader.try_all()
    assert not reader.may_read


def many_arrays(here: Here) -> None:
    """More arrays than stay mapped; those that are gone leave no memory and no descriptor."""
    for number in range(12):
        array = placed(here, np.full(100, here.rank + number, np.int64))
        Natives(here.endpoint).all_reduce(array, ReduceOp.SUM, here.deadline_ns())
        assert (array == 2 * number + 1).all()
    here.meet()


def test_arrays_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "LARGEST_KEPT_MAPPINGS", 3)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with ThreadFabric(ShmTransport(), 2, TINY) as fabric:
        fabric.run(many_arrays)
        gc.collect()
        assert all(not fabric[rank]._regions._living for rank in (0, 1))
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_of_an_array_that_is_gone_is_given_back() -> None:
    mine = regions.Regions(b"k" * 16)
    array = np.frombuffer(mine.allocate(1 << 20), np.uint8)
    place = mine.place_of(array)
    theirs = regions.Mapped(0, b"k" * 16, os.dup)
    view = theirs.view(place, array.nbytes)
    array[:] = 7
    assert (view == 7).all()
    del array
    gc.collect()
    assert not view.any(), "whoever still maps it sees pages that hold nothing"


def test_memory_of_another_rank_is_not_taken_for_an_array() -> None:
    mine = regions.Regions(b"k" * 16)
    array = np.frombuffer(mine.allocate(100), np.uint8)
    place = mine.place_of(array)
    assert mine.place_of(np.zeros(100, np.uint8)) == regions.NOWHERE
    with pytest.raises(TransportError, match="is not its region 1"):
        regions.Mapped(0, b"x" * 16, os.dup).view(place, 100)
    with pytest.raises(TransportError, match="at bytes 0 to 101 of a region of 100"):
        regions.Mapped(0, b"k" * 16, os.dup).view(place, 101)


def crossed(here: Here, left: threading.Event) -> None:
    """The second rank comes once the first has stepped aside for it."""
    Natives(here.endpoint).barrier(here.deadline_ns())
    if here.rank:
        assert left.wait(timeout=60)
    Natives(here.endpoint).barrier(here.deadline_ns())


def test_a_rank_leaves_the_processor_of_the_one_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    left, asked = threading.Event(), []

    def awaited(pid: int, thread: int) -> int:
        asked.append((pid, thread))
        return 5

    def leave(processor: int) -> None:
        assert processor == 5
        left.set()

    monkeypatch.setattr(lockstep, "current_processor", lambda: 5)
    monkeypatch.setattr(lockstep, "awaited_processor", awaited)
    monkeypatch.setattr(lockstep, "leave", leave)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with ThreadFabric(ShmTransport(), 2, {"wait_ns": 10**9}) as fabric:
        fabric.run(crossed, left=left)
        assert fabric[0].counters()["moves"] >= 1
        assert asked[-1][0] == os.getpid()
        assert asked[-1][1] > 0


def test_where_a_thread_wants_to_run() -> None:
    may_end, told = threading.Event(), []
    sleeper = threading.Thread(target=lambda: (told.append(threading.get_native_id()), may_end.wait()))
    sleeper.start()
    try:
        assert processor.awaited_processor(os.getpid(), threading.get_native_id()) in os.sched_getaffinity(0)
        while not told or processor.awaited_processor(os.getpid(), told[0]) is not None:
            os.sched_yield()
    finally:
        may_end.set()
        sleeper.join()
    assert processor.awaited_processor(os.getpid(), 2**22 + 1) is None


def test_leaving_a_processor_keeps_where_a_thread_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, allowed: asked.append(allowed))
    processor.leave(5)
    assert asked == [{2}, {2, 5}]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    processor.leave(5)
    assert len(asked) == 2, "there is nowhere to go"


def test_a_sandbox_that_pins_threads_costs_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int, allowed: set[int]) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5})
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    processor.leave(5)


def mixture(here: Here, rounds: int) -> None:
    """Calls of all kinds and sizes follow each other; no half of a stage is written while another rank reads it."""
    draw = np.random.default_rng(5)
    for number in range(rounds):
        kind, count, root = draw.integers(0, 5), int(draw.integers(0, 400)), int(draw.integers(0, here.size))
        x = np.arange(count, dtype=np.int64) * 7 + number + here.rank
        if kind == 0:
            Natives(here.endpoint).broadcast(x, root, here.deadline_ns())
            np.testing.assert_array_equal(x, np.arange(count) * 7 + number + root)
        elif kind == 1:
            Natives(here.endpoint).barrier(here.deadline_ns())
        else:
            x = placed(here, x) if kind == 2 or (kind == 3 and here.rank) else x
            Natives(here.endpoint).all_reduce(x, ReduceOp.SUM, here.deadline_ns())
            others = here.size * (here.size - 1) // 2
            np.testing.assert_array_equal(x, (np.arange(count) * 7 + number) * here.size + others)


@pytest.mark.parametrize("n", [2, 4])
def test_calls_of_all_kinds_follow_each_other(n: int) -> None:
    worlds = Worlds()
    try:
        for options in (TINY, READ):
            with ProcessFabric(worlds.of(n), "detcoll_shm:ShmTransport", options | {"direct_bytes": 400}) as fabric:
                fabric.run(mixture, rounds=120)
    finally:
        worlds.end()


def different(here: Here) -> None:
    """Every rank is shown both descriptors, and no later call is taken."""
    array = np.ones(100 + (here.rank == 2), np.float32)
    with pytest.raises(PlanMismatch) as seen:
        Natives(here.endpoint).all_reduce(array, ReduceOp.SUM, here.deadline_ns(), 2)
    assert "all_reduce of 100 float32 in 2 arrays, sum" in str(seen.value)
    assert "all_reduce of 101 float32 in 2 arrays, sum" in str(seen.value)
    with pytest.raises(Closed):
        Natives(here.endpoint).barrier(here.deadline_ns())


def test_calls_that_differ() -> None:
    with ThreadFabric(ShmTransport(), 4) as fabric:
        fabric.run(different)


def test_who_heard_of_a_difference_before_it_looked_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 waits for what rank 0 called, which has ended by what rank 1 says of the two others."""
    first_is_here, second_has_raised, last_is_here = (threading.Event() for _ in range(3))
    look = lockstep.Lockstep.await_all_here

    def late(own: lockstep.Lockstep) -> None:
        if own.rank == 0:
            first_is_here.set()
            assert last_is_here.wait(TIMEOUT_NS / 1e9)
        elif own.rank == 3:
            last_is_here.set()
        look(own)

    def program(here: Here) -> None:
        for rank, event in ((1, first_is_here), (2, first_is_here), (3, second_has_raised)):
            assert here.rank != rank or event.wait(TIMEOUT_NS / 1e9)
        array = np.ones(100 + (here.rank == 2), np.float32)
        with pytest.raises(PlanMismatch, match=r"(?s)rank 1 .* of 100 .* rank 2 .* of 101|rank 2 .* of 101 .* of 100"):
            Natives(here.endpoint).all_reduce(array, ReduceOp.SUM, here.deadline_ns())
        if here.rank == 1:
            second_has_raised.set()

    monkeypatch.setattr(lockstep.Lockstep, "await_all_here", late)
    with ThreadFabric(ShmTransport(), 4) as fabric:
        fabric.run(program)


def one_is_missing(here: Here) -> None:
    """The deadline names who did not come, and the timeout as the caller gave it, whenever the call came to run."""
    here.meet()
    if here.rank != 1:
        with pytest.raises((DeadlineMissed, PeerLost)) as seen:
            Natives(here.endpoint).barrier(here.clock.now_ns() + 500 * 10**6, "step 7", timeout_ns=45 * 10**9)
        late = r"barrier number 0 \(step 7\) was not finished after 45 s .* waits for rank 1, which has not begun it"
        assert re.search(late, str(seen.value)) or "aborted" in str(seen.value)
    here.meet()


def test_who_has_not_come_is_named() -> None:
    with ThreadFabric(ShmTransport(), 3) as fabric:
        fabric.run(one_is_missing)


def one_has_begun_none(here: Here, standard_input: int) -> None:
    """The ranks whose collective ends early ring no descriptor of one that has no bell."""
    one_is_missing(here)
    assert not select.select([standard_input], [], [], 0)[0]


def test_nothing_is_written_to_the_standard_input_of_a_rank_that_has_begun_none() -> None:
    reading, writing = os.pipe()
    kept = os.dup(0)
    os.dup2(reading, 0)
    try:
        with ThreadFabric(ShmTransport(), 3) as fabric:
            fabric.run(one_has_begun_none, standard_input=reading)
    finally:
        os.dup2(kept, 0)
        for descriptor in (reading, writing, kept):
            os.close(descriptor)


def test_groups_must_hold_every_rank_once() -> None:
    with ThreadFabric(ShmTransport(), 2) as fabric:
        for groups in ([[0]], [[0, 1], [1]], [[0, 1], []], [[0, 2]]):
            with pytest.raises(UsageError, match="must hold each of 2 ranks once"):
                fabric[0].arrange(groups)
