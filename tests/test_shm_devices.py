"""Collectives of shared memory on arrays of devices, over the strict double of CUDA."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace

import kinds
import numpy as np
import pytest
from devices import until
from ranks import grouped, run_ranks
from test_kinds import serve

from detcoll.clock import MonotonicClock
from detcoll.communicator import Communicator
from detcoll.device import PinnedPool, Pins, cuda, now
from detcoll.errors import Closed, DeadlineMissed, DetcollError, DeviceError
from detcoll.fold import reference
from detcoll.runtime.devices import OnDevice
from detcoll.testing.device import StrictDevice
from detcoll.testing.fabric import Here, LocalMeeting, ThreadFabric
from detcoll.testing.programs.devices import Held
from detcoll.testing.values import varied
from detcoll.transport import NativeCall
from detcoll.types import DTYPES, ReduceOp, operators_of
from detcoll_shm import ShmTransport, transfers

GROUPINGS = {"2": [[0, 1]], "2+1": [[0, 1], [2]], "placed": [[1, 2], [0]], "2+3+2": [[0, 1], [2, 3, 4], [5, 6]]}
TINY = {"chunk_bytes": 64, "device_chunk_bytes": 192, "direct_bytes": 16, "read_bytes": 2**32}
SMALL = {"chunk_bytes": 64, "device_chunk_bytes": 192, "read_bytes": 0}
"""Whole arrays where there are few ranks, else chunks; hosts read each other where they can."""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[StrictDevice]:
    """Let all ranks of this process have devices."""
    strict = StrictDevice()
    monkeypatch.setattr(cuda, "_driver", strict)
    monkeypatch.setattr(kinds, "cuda", strict)
    now._shared.forget()
    yield strict
    now._shared.forget()
    assert not strict.misuses
    assert not strict.unpinned, "a copy blocked"


def random_calls(here: Here, strict: StrictDevice, groups: list[list[int]], seed: int, calls: int) -> None:
    """Kinds, types, operators, sizes and roots; each rank holds its array on the host or on one of two devices."""
    here.endpoint.arrange(groups)
    draw, own = np.random.default_rng(seed), np.random.default_rng([seed, here.rank])
    for number in range(calls):
        dtype = draw.choice(list(DTYPES))
        op = ReduceOp(draw.choice([each.value for each in operators_of(DTYPES[dtype])]))
        kind, root = "broadcast" if draw.random() < 0.3 else "all_reduce", int(draw.integers(here.size))
        count = int(draw.choice([1, 3, 8, 17, 50, 100, 300]))
        all_on_devices = draw.random() < 0.5
        given = [varied(DTYPES[dtype], count, number, rank) for rank in range(here.size)]
        wanted = reference(op, given, groups, DTYPES[dtype]) if kind == "all_reduce" else given[root]
        what = f"{number}: {kind} {op.value} of {count} {dtype}, rank {here.rank}"
        if all_on_devices or own.random() < 0.6:
            held = Held(strict, given[here.rank], int(own.integers(2)))
            held.run(here, kind, op, root)
            assert held.bytes == wanted.tobytes(), what
        else:
            array = given[here.rank].copy()
            here.endpoint.run(NativeCall(kind, array, count, op, root), here.deadline_ns())
            assert array.tobytes() == wanted.tobytes(), what


@pytest.mark.parametrize("groups", GROUPINGS.values(), ids=GROUPINGS)
@pytest.mark.parametrize("options", [TINY, SMALL], ids=["tiny", "small"])
@pytest.mark.parametrize("seed", [1, 2])
def test_random_calls(device: StrictDevice, groups: list[list[int]], options: dict[str, int], seed: int) -> None:
    device.seeded(seed)
    size = sum(map(len, groups))
    with ThreadFabric(ShmTransport(), size, options) as fabric:
        fabric.run(random_calls, strict=device, groups=groups, seed=seed, calls=200 // size)
    assert not device.pending
    assert not len(now.pins()), "a stage was left pinned"


@pytest.mark.parametrize("takes", [True, False], ids=["taken", "staged"])
def test_calls_of_communicators(device: StrictDevice, monkeypatch: pytest.MonkeyPatch, takes: bool) -> None:
    """Also of groups, and over a transport that takes no arrays on devices."""
    monkeypatch.setattr(ShmTransport, "capabilities", replace(ShmTransport.capabilities, native_devices=takes))
    device.seeded(5)

    def program(comm: Communicator) -> None:
        serve(comm, [4], 20, 3000)
        given = [np.arange(200_000) * (comm.rank + 1.0), np.full(100_000, comm.rank + 1.0)]
        with device.on(0):
            stream = device.stream(0)
        arrays = [device.array(each, 0, stream) for each in given] if comm.rank != 1 else given
        comm.all_reduce(arrays, async_op=True).wait()
        results = [device.peek(each) for each in arrays] if comm.rank != 1 else arrays
        assert (results[0] == np.arange(200_000) * 6.0).all()
        assert (results[1] == 6).all()
        if comm.rank < 2:
            with comm.group([0, 1], "pair") as pair:
                array = device.array(np.full(300_000, comm.rank + 1.0))
                pair.broadcast(array, root=1)
                assert (device.peek(array) == 2).all()
        comm.barrier()
        assert len(now.pins()) == (9 if takes else 0), "the stages of a group stay pinned"

    run_ranks(3, program, transport="shm", topology=grouped(1, 2))
    assert not len(now.pins())


@pytest.mark.parametrize("call", ["to_host", "to_device"])
@pytest.mark.parametrize("kind", ["all_reduce", "broadcast"])
@pytest.mark.parametrize("after", [2, 9])
def test_a_copy_that_fails_ends_the_call_of_all(device: StrictDevice, kind: str, call: str, after: int) -> None:
    """None raises before the copies that it began are past."""
    device.seeded(3)
    copy, copies = getattr(device, call), itertools.count()

    def fail_once(*arguments: int) -> None:
        if next(copies) == after:
            device.fail(call, 2)
        copy(*arguments)

    setattr(device, call, fail_once)

    def program(here: Here) -> None:
        held = Held(device, np.full(300, here.rank + 1.0), here.rank % 2)
        with pytest.raises(DetcollError, match=call):
            held.run(here, kind)
        assert not here.endpoint._collectives.transfers._under_way
        with pytest.raises(Closed, match="earlier collective failed"):
            held.run(here, kind)

    with ThreadFabric(ShmTransport(), 3, TINY) as fabric:
        fabric.run(program)
    device.drive()  # the second calls never came to their gates


@pytest.mark.parametrize("count", [1, 300], ids=["whole", "chunks"])
def test_a_caller_that_is_late_counts_against_the_deadline(device: StrictDevice, count: int) -> None:
    def program(here: Here) -> str:
        held = Held(device, np.ones(count))
        if here.rank == 0:
            device.kernel(held.stream, lambda: None)
        with pytest.raises(DeadlineMissed) as caught:
            held.run(here, "all_reduce", timeout_s=0.3)
        return str(caught.value)

    with ThreadFabric(ShmTransport(), 2, SMALL) as fabric:
        told = fabric.run(program)
    assert all("what its stream on the device held" in text or "has not begun it" in text for text in told), told
    assert not len(now.pins())


@pytest.mark.parametrize("count", [1, 300], ids=["whole", "chunks"])
def test_who_waits_for_a_device_hears_that_another_gave_up(device: StrictDevice, count: int) -> None:
    def program(here: Here) -> None:
        if here.rank == 0:
            call = NativeCall("all_reduce", np.ones(count), count)
            with pytest.raises(DeadlineMissed):
                here.endpoint.run(call, here.clock.now_ns() + 200_000_000)
            return
        with pytest.raises(DeadlineMissed, match="rank 0"):
            Held(device, np.ones(count)).run(here, "all_reduce")

    with ThreadFabric(ShmTransport(), 2, SMALL) as fabric:
        fabric.run(program)


@pytest.mark.parametrize("how", ["stop", "abort"])
@pytest.mark.parametrize("count", [1, 300], ids=["whole", "chunks"])
def test_who_waits_for_a_device_hears_that_the_endpoint_was_closed(device: StrictDevice, count: int, how: str) -> None:
    with ThreadFabric(ShmTransport(), 2, SMALL) as fabric:

        def program(here: Here) -> None:
            if here.rank == 0 and count > 1:
                with pytest.raises(DetcollError):
                    here.endpoint.run(NativeCall("all_reduce", np.ones(count), count), here.deadline_ns())
            if here.rank == 1:
                thread = threading.Thread(target=end, args=(here,))
                thread.start()
                with pytest.raises(Closed):
                    Held(device, np.ones(count)).run(here, "all_reduce")
                thread.join()

        def end(here: Here) -> None:
            natives = here.endpoint
            until(lambda: natives._collectives is not None and natives._collectives.turn.locked())
            until(lambda: len(now.pins()) == 2)
            getattr(here.endpoint, how)()

        fabric.run(program)


def test_who_waits_for_a_device_hears_that_a_peer_is_gone(device: StrictDevice) -> None:
    def program(here: Here) -> None:
        if here.rank == 0:
            until(lambda: len(now.pins()) == 2)
            here.endpoint.abort()
            return
        with pytest.raises(DetcollError, match="rank 0 aborted"):
            Held(device, np.ones(1)).run(here, "all_reduce")

    with ThreadFabric(ShmTransport(), 2, SMALL) as fabric:
        fabric.run(program)


@pytest.mark.parametrize("count", [1, 300], ids=["whole", "chunks"])
def test_memory_that_a_hanging_device_may_use_stays(
    device: StrictDevice, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(OnDevice, "is_ready", lambda self: True)
    monkeypatch.setattr(transfers, "LONGEST_END_S", 0.0)

    def program(here: Here) -> None:
        held = Held(device, np.ones(count), here.rank)
        here.meet()
        with pytest.raises(DeadlineMissed):
            held.run(here, "all_reduce", timeout_s=0.5)

    with ThreadFabric(ShmTransport(), 2, SMALL) as fabric:
        fabric.run(program)
    gc.collect()
    assert len(now.pins()) == 4
    device.drive()


def test_memory_is_pinned_once_until_its_last_user_is_through() -> None:
    strict, memory = StrictDevice(), np.zeros(8192, np.uint8)
    pins = Pins(strict, PinnedPool(strict))
    first, second = pins.pin(memory, 0), pins.pin(memory, 1)
    assert strict.pinned_bytes == 8192
    second()
    assert strict.pinned_bytes == 8192
    first()
    assert strict.pinned_bytes == 0
    assert not len(pins)


def test_memory_that_cannot_be_pinned_is_used_as_it_is() -> None:
    strict, memory = StrictDevice(), np.zeros(8192, np.uint8)
    pins = Pins(strict, PinnedPool(strict))
    strict.fail("register", 2)
    unpin = pins.pin(memory, 0)
    assert strict.pinned_bytes == 0
    unpin()
    strict.fail("register", 700)
    with pytest.raises(DeviceError):
        pins.pin(memory, 0)
    assert not len(pins)


def test_what_others_pin_counts_in_the_limit_and_takes_the_place_of_what_nobody_uses() -> None:
    strict, unit = StrictDevice(), 64 * 1024
    pool = PinnedPool(strict, 4 * unit)
    pins, memory = Pins(strict, pool), [np.zeros(2 * unit, np.uint8) for _ in range(4)]
    pool.reserve(unit, 0)
    assert strict.pinned_bytes == pool.bytes == 4 * unit
    unpins = [pins.pin(each, 0) for each in memory[:2]]
    assert (strict.pinned_bytes, pool.bytes, pool.unpinned_bytes) == (4 * unit, 4 * unit, 0)
    unpins.append(pins.pin(memory[2], 0))
    pool.reserve(unit, 0)
    assert (strict.pinned_bytes, pool.bytes, pool.unpinned_bytes) == (4 * unit, 4 * unit, 2 * unit)
    strict.fail("register", 2)
    unpins.pop()()
    unpins.pop()()
    unpins.append(pins.pin(memory[3], 0))
    assert (strict.pinned_bytes, pool.bytes, pool.unpinned_bytes) == (2 * unit, 2 * unit, 2 * unit)
    for unpin in unpins:
        unpin()
    assert (strict.pinned_bytes, pool.bytes) == (0, 0)
    pool.take(3 * unit)
    assert pool.unpinned_bytes == 3 * unit, "memory of others counts although it is used no more"


def test_stages_of_many_ranks_hold_less_of_an_array() -> None:
    """Each rank with a device pins them all."""
    for size, chunk_bytes in ((2, 4 * 2**20), (4, 4 * 2**20), (16, 2**20), (1024, 16 * 2**10)):
        endpoint = ShmTransport().open(0, size, LocalMeeting(1).member(0), MonotonicClock(), {})
        assert endpoint._settings.device_chunk_bytes == chunk_bytes
        endpoint.abort()
