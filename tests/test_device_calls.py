"""Collectives on arrays of devices, over the strict double of CUDA."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

import kinds
import numpy as np
import pytest
from devices import assert_nothing_left, hold, own_stream, until
from ranks import attempt, launch, lines, run_ranks
from test_kinds import serve

from detcoll.buffers import bind
from detcoll.communicator import Communicator
from detcoll.device import PinnedPool, copies, now
from detcoll.errors import DetcollError, DeviceError, UsageError
from detcoll.runtime import copying
from detcoll.testing.device import StrictDevice, in_place_of_cuda


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[StrictDevice]:
    """Let all ranks of this process have devices."""
    with in_place_of_cuda() as strict:
        monkeypatch.setattr(kinds, "cuda", strict)
        yield strict


PLACES = {
    "tcp": ("tcp", None, 3),
    "tcp two sites": ("tcp", lines(2, 2, rate_bytes_per_s=1e9), 4),
    "slotted uneven": ("slotted", lines(1, 2, 1, rate_bytes_per_s=1e9), 4),
    "shm": ("shm", None, 2),
}


@pytest.mark.parametrize("place", PLACES)
def test_random_calls_on_devices(device: StrictDevice, place: str) -> None:
    transport, topology, size = PLACES[place]
    device.seeded(7)
    run_ranks(size, lambda comm: serve(comm, [3], 40, 3000), transport=transport, topology=topology)
    assert not device.pending
    assert not device.unpinned, "a copy blocked"


WAYS = pytest.mark.parametrize("transport", ["tcp", "shm"], ids=["planned", "native"])


@WAYS
def test_a_call_waits_for_what_its_caller_queued_and_holds_up_no_other(device: StrictDevice, transport: str) -> None:
    looked = threading.Barrier(2)

    def program(comm: Communicator) -> None:
        stream = own_stream(device)
        late = device.array(np.zeros(5000), 0, stream)
        device.kernel(stream, lambda: device.poke(late, comm.rank + 1.0))
        other, on_host = comm.group([0, 1], "other"), np.ones(10)
        work = comm.all_reduce(late, async_op=True)
        other.all_reduce(on_host)
        assert (on_host == 2).all()
        assert not work.done()
        looked.wait(30)
        until(lambda: device.drive() or work.done())
        work.wait()
        assert (device.peek(late) == 3).all()

    run_ranks(2, program, transport=transport)


@WAYS
@pytest.mark.parametrize("late", [{0}, {0, 1}])
def test_what_a_caller_queued_and_does_not_end_counts_against_the_deadline(
    device: StrictDevice, transport: str, late: set[int]
) -> None:
    arrays = []

    def program(comm: Communicator) -> str:
        stream = own_stream(device)
        array = device.array(np.full(5000, float(comm.rank)), 0, stream)
        arrays.append(array)
        if comm.rank in late:
            device.kernel(stream, lambda: None)
        else:
            stream = 0
        with pytest.raises(DetcollError) as caught:
            comm.all_reduce(array, timeout=0.5)
        return str(caught.value)

    run_ranks(2, program, transport=transport)
    before = [device.peek(array) for array in arrays]
    device.drive()
    for array, values in zip(arrays, before, strict=True):
        assert (device.peek(array) == values).all(), "an array was written to after its call had failed"


@WAYS
@pytest.mark.parametrize("call", ["to_host", "to_device", "record"])
@pytest.mark.parametrize("code", [2, 700])
def test_all_ranks_hear_of_a_device_that_fails(device: StrictDevice, transport: str, call: str, code: int) -> None:
    device.seeded(1)
    arrays = [device.array(np.ones(5000), rank, own_stream(device, rank)) for rank in range(2)]
    device.fail(call, code)

    def program(comm: Communicator) -> str:
        try:
            comm.all_reduce(arrays[comm.rank])
        except DetcollError as error:
            return str(error)
        return ""

    told = run_ranks(2, program, transport=transport)
    if (transport, call) == ("shm", "to_device") and "" in told:  # the other rank may have its result by then
        told.remove("")
    assert all(call in text for text in told), told


@WAYS
def test_a_call_is_no_part_of_a_graph(device: StrictDevice, transport: str) -> None:
    device.seeded(1)

    def program(comm: Communicator) -> str:
        stream = own_stream(device)
        array = device.array(np.ones(5000), 0, stream)
        device.capture(stream, comm.rank == 1)
        with pytest.raises(UsageError) as caught:
            comm.all_reduce(array)
        device.capture(stream, False)
        if transport == "tcp":  # what a transport does by itself ends the group
            comm.all_reduce(array)
            assert (device.peek(array) == 2).all()
        return str(caught.value)

    told = run_ranks(2, program, transport=transport)
    assert all("graph" in text for text in told), told


# In which order copies begin.


def held_at(device: StrictDevice, monkeypatch: pytest.MonkeyPatch, call: str) -> list[threading.Event]:
    """Let each copy of one direction stay under way until its event is set; return the events, one a copy begun."""
    held: list[threading.Event] = []
    inner = getattr(device, call)

    def copy(first: int, second: int, nbytes: int, stream: int) -> None:
        held.append(hold(device, stream))
        inner(first, second, nbytes, stream)

    monkeypatch.setattr(device, call, copy)
    return held


def test_a_result_is_not_written_while_the_caller_still_reads_what_was_there(device: StrictDevice) -> None:
    """A call whose output alone is on a device has nothing to load, which would wait for the caller's stream too."""
    device.seeded(12)
    seen = []

    def program(comm: Communicator) -> None:
        x, copying = np.full(3000, comm.rank + 1.0), comm._job.loop._copying
        stream = own_stream(device)
        out = device.array(np.zeros((2, 3000)), 0, stream)
        released = hold(device, stream)
        device.kernel(stream, lambda: seen.append(device.peek(out)))
        work = comm.all_gather(x, out, async_op=True)
        until(lambda: work.done() or any(call.steps for call in copying._calls.values()))
        released.set()
        work.wait(20)
        assert (device.peek(out) == [[1], [2]]).all()

    run_ranks(2, program, transport="tcp")
    assert [held.any() for held in seen] == [False, False]
    assert_nothing_left(device)


@pytest.mark.parametrize(("shift", "loaded"), [(0, 0), (1, 1), (-1, 1)], ids=["in place", "behind", "before"])
def test_a_result_is_not_written_over_input_that_is_still_to_be_read(
    monkeypatch: pytest.MonkeyPatch, device: StrictDevice, shift: int, loaded: int
) -> None:
    """The output lies ``shift`` blocks behind the input; so many blocks are loaded when the other rank's arrives."""
    device.seeded(13)
    loads, stores = held_at(device, monkeypatch, "to_host"), held_at(device, monkeypatch, "to_device")
    block, whole = 5000, device.array(np.arange(20_000.0), 0, own_stream(device))

    def at(begin: int) -> kinds.OnDevice:
        return kinds.OnDevice(whole, begin * block * 8, np.empty(2 * block))

    def program(comm: Communicator) -> None:
        if comm.rank == 1:
            got = np.empty(2 * block)
            comm.all_to_all(np.arange(2 * block) + 1e6, got)
            assert got.tolist() == [*range(2 * block, 3 * block), *(np.arange(block, 2 * block) + 1e6)]
            return
        loop = comm._job.loop
        work = comm.all_to_all(at(1), at(1 + shift), async_op=True)
        until(lambda: len(loads) == 2)
        for each in loads[:loaded]:
            each.set()
        until(lambda: stores or len(loop._copying._under_way) == 2 - loaded)
        until(lambda: comm.counters()["bytes_received"] >= block * 8)
        for _ in range(5):  # turns of the progress thread
            loop.ask(lambda now_ns: None)
        assert not stores
        loads[1].set()
        loads[0].set()
        until(lambda: [each.set() for each in stores] and work.done())
        work.wait()
        got = device.peek(whole)[(1 + shift) * block :][: 2 * block]
        assert got.tolist() == [*range(block, 2 * block), *(np.arange(block) + 1e6)]

    run_ranks(2, program, transport="tcp")
    assert_nothing_left(device)


# What a call that ends leaves behind.


@pytest.mark.parametrize("call", ["to_host", "to_device"])
def test_a_call_that_fails_waits_for_its_copies_that_have_begun_and_drops_the_others(
    monkeypatch: pytest.MonkeyPatch, device: StrictDevice, call: str
) -> None:
    """So nothing is written to an array, and none of its memory is read, after its caller has heard of the failure."""
    device.seeded(2)
    monkeypatch.setattr(copies, "UNDER_WAY_BYTES", 1)
    held, called = held_at(device, monkeypatch, call), threading.Barrier(2)

    def program(comm: Communicator) -> None:
        pair = comm.group([0, 1], "pair")
        x = device.array(np.full(500_000, 1.0), 0, own_stream(device)) if comm.rank == 0 else np.ones(500_000)
        work = pair.all_reduce(x, async_op=True)
        called.wait(20)
        if comm.rank == 0:
            until(lambda: held)
            pair.abort("enough")
            until(lambda: comm._job.failure(pair._group))
            held[0].set()
        assert "enough" in str(work.exception(20))
        if comm.rank == 0:
            assert len(held) == 1, "a copy began after the call had failed"
            assert not any(stream.queue for stream in device._streams.all)
        comm.barrier()

    run_ranks(2, program, transport="tcp")
    assert_nothing_left(device)


def test_memory_that_a_copy_still_uses_is_not_borrowed_again(
    monkeypatch: pytest.MonkeyPatch, device: StrictDevice
) -> None:
    """A device that does not end a copy is not waited for without end, so the copy outlives its call."""
    device.seeded(3)
    monkeypatch.setattr(copying, "LONGEST_SETTLING_NS", 0)
    held, called = held_at(device, monkeypatch, "to_host"), threading.Event()

    def program(comm: Communicator) -> None:
        pair = comm.group([0, 1], "pair")
        if comm.rank == 1:
            work = pair.all_reduce(np.ones(500), async_op=True)
            called.set()
            assert work.exception(20) is not None
            return
        address = now.pinned_memory(4000, 0).__array_interface__["data"][0]
        work = pair.all_reduce(device.array(np.ones(500), 0, own_stream(device)), async_op=True)
        until(lambda: held and called.is_set())
        pair.abort("enough")
        assert work.exception(20) is not None
        del work
        gc.collect()
        assert now.pinned_memory(4000, 0).__array_interface__["data"][0] != address
        held[0].set()
        until(
            lambda: device.drive() or comm._job.loop._copying._copies.advance() or comm._job.loop._copying._copies.idle
        )
        gc.collect()
        assert now.pinned_memory(4000, 0).__array_interface__["data"][0] == address

    run_ranks(2, program, transport="tcp")
    assert_nothing_left(device)


@pytest.mark.parametrize("call", ["to_host", "to_device"])
def test_a_rank_that_leaves_while_copies_are_under_way(
    monkeypatch: pytest.MonkeyPatch, device: StrictDevice, call: str
) -> None:
    device.seeded(4)
    held = held_at(device, monkeypatch, call)

    def program(comm: Communicator) -> None:
        if comm.rank == 1:
            comm.all_reduce(np.ones(5000), async_op=True)
            until(lambda: held)
            raise ZeroDivisionError
        x = device.array(np.ones(5000), 0, own_stream(device))
        work = comm.all_reduce(x, async_op=True)
        until(lambda: comm._job.failure(comm._group))
        for each in held:
            each.set()
        assert work.exception(20) is not None
        before = device.peek(x)
        device.drive()
        assert (device.peek(x) == before).all()

    told = attempt(2, program, transport="tcp")
    assert told[0] is None, told
    assert isinstance(told[1], ZeroDivisionError)
    assert_nothing_left(device)


def test_a_rank_that_dies_while_copies_are_under_way() -> None:
    ended = launch(2, "device_death.py", environ={"DETCOLL_TRANSPORT": "tcp"})
    assert "PeerLost" in ended.out
    assert "nothing left" in ended.out


@WAYS
def test_finalize_does_not_wait_for_ever_for_a_stream(device: StrictDevice, transport: str) -> None:
    device.seeded(5)
    stream = own_stream(device)
    released = hold(device, stream)
    x, called = device.array(np.ones(5000), 0, stream), threading.Barrier(2)

    def program(comm: Communicator) -> bool:
        work, was_told = comm.all_reduce(x if comm.rank == 0 else np.ones(5000), async_op=True), False
        called.wait(30)
        try:
            comm.finalize(0.3)
        except DetcollError:
            was_told = True
        assert work.exception(20) is not None
        return was_told

    assert any(run_ranks(2, program, transport=transport)), "one of them gives up first"
    released.set()
    device.drive()
    assert (device.peek(x) == 1).all()
    assert_nothing_left(device)


def test_an_interrupted_wait_leaves_the_call_under_way(monkeypatch: pytest.MonkeyPatch, device: StrictDevice) -> None:
    device.seeded(6)

    def interrupt(timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    def program(comm: Communicator) -> None:
        stream = own_stream(device)
        released = hold(device, stream)
        x = device.array(np.ones(5000), 0, stream)
        work = comm.all_reduce(x, async_op=True)
        with monkeypatch.context() as patched:
            patched.setattr(work._finished, "wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                work.wait()
        assert not work.done()
        released.set()
        work.wait(20)
        assert (device.peek(x) == 2).all()

    run_ranks(2, program, transport="tcp")
    assert_nothing_left(device)


def test_an_interrupt_in_a_native_call_ends_it_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch, device: StrictDevice
) -> None:
    inner, interrupted = device.is_past, threading.Event()

    def is_past(event: int) -> bool:
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt
        return inner(event)

    def program(comm: Communicator) -> None:
        stream = own_stream(device)
        device.kernel(stream, lambda: None)
        comm.all_reduce(device.array(np.ones(5000), 0, stream) if comm.rank == 0 else np.ones(5000))

    monkeypatch.setattr(device, "is_past", is_past)
    told = attempt(2, program, transport="shm")
    assert isinstance(told[0], KeyboardInterrupt)
    assert "rank 0 was interrupted" in str(told[1])
    device.drive()
    told.clear()
    assert_nothing_left(device)


# Sizes, groups, and processes.


@pytest.mark.parametrize("size", [1, 3, 7])
@WAYS
def test_worlds_of_any_size(device: StrictDevice, transport: str, size: int) -> None:
    device.seeded(7)
    now._shared._pool = PinnedPool(device, 2**30)  # for all ranks together

    def program(comm: Communicator) -> None:
        for count in (0, 1, 20_000):
            x = device.array(np.full(count, comm.rank + 1.0), comm.rank % 2, own_stream(device, comm.rank % 2))
            comm.all_reduce(x)
            assert (device.peek(x) == size * (size + 1) / 2).all()
            whole = device.array(np.zeros((size, count)), comm.rank % 2)
            comm.all_gather(x, whole)
            if count:
                assert (device.peek(whole) == size * (size + 1) / 2).all()

    run_ranks(size, program, transport=transport)
    assert not device.unpinned
    assert_nothing_left(device)


def test_groups_used_from_several_threads(device: StrictDevice) -> None:
    device.seeded(8)

    def program(comm: Communicator) -> None:
        groups = [comm, comm.group([0, 1], "other")]
        wrong: list[str] = []

        def use(at: int) -> None:
            x = device.array(np.zeros(3000), at, own_stream(device, at))
            for number in range(10):
                device.kernel(x.stream, lambda: device.poke(x, number + at))  # noqa: B023  # awaited in this round
                groups[at].all_reduce(x)
                if not (device.peek(x) == 2 * (number + at)).all():
                    wrong.append(f"group {at}, round {number}: {device.peek(x)}")

        threads = [threading.Thread(target=use, args=(at,)) for at in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong

    run_ranks(2, program, transport="tcp")
    assert_nothing_left(device)


@pytest.mark.parametrize(("transport", "limit_mib"), [("tcp", 16), ("shm", 64), ("shm", 16)])
def test_more_than_may_be_pinned_goes_through_ordinary_memory(
    device: StrictDevice, transport: str, limit_mib: int
) -> None:
    """Both ranks pin the stages of both, which are of 16 MiB; arrays that go through stages need nothing else."""
    device.seeded(9)
    now._shared._pool = PinnedPool(device, limit_mib * 2**20)
    nbytes = 64 * 2**20

    def program(comm: Communicator) -> dict[str, int]:
        assert "pinned_bytes" in comm.counters()
        x = device.array(np.full(nbytes // 4, comm.rank + 1, np.float32), comm.rank)
        comm.all_reduce(x)
        assert (device.peek(x) == 3).all()
        small = device.array(np.ones(1000), comm.rank)
        comm.all_reduce(small)
        return comm.counters()

    for counted in run_ranks(2, program, transport=transport):
        assert 0 < counted["pinned_bytes"] <= limit_mib * 2**20
        if transport == "tcp":
            assert nbytes <= counted["unpinned_bytes"] <= 2 * nbytes
        else:
            assert counted["unpinned_bytes"] == 64 * 2**20 - limit_mib * 2**20
    assert bool(device.unpinned) == (limit_mib == 16)
    assert_nothing_left(device)


def test_counters_speak_of_pinned_memory_only_if_there_is_some(device: StrictDevice) -> None:
    device.seeded(10)

    def program(comm: Communicator) -> None:
        comm.all_reduce(np.ones(10))
        comm.barrier()
        assert "pinned_bytes" not in comm.counters()
        comm.barrier()
        comm.all_reduce(device.array(np.ones(10)))
        assert comm.counters()["pinned_bytes"] > 0
        assert comm.counters()["unpinned_bytes"] == 0
        comm.finalize()
        assert comm.trace.counts["pinned_bytes"] > 0

    run_ranks(2, program)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_told_that_it_has_no_device(device: StrictDevice) -> None:
    device.seeded(11)
    x = device.array(np.arange(1000.0))
    bind(x).load()
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            bind(np.ones(3)).load()
            try:
                bind(x).load()
            except DeviceError as error:
                os._exit(0 if "forked process" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    bound = bind(x)
    bound.load()
    assert bound.array.tolist() == list(range(1000))
