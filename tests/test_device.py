"""Copies between device and host, the wait for the caller's stream, and pinned memory, on the strict double."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from detcoll.device import Copies, Copy, DeviceBuffer, Gate, PinnedPool, Segment, copies, pinned
from detcoll.errors import DeadlineMissed, DeviceError, PeerLost, UsageError
from detcoll.testing.device import PENDING, StrictDevice
from detcoll.testing.device_memory import DeviceArray

NEVER = 0
"""A deadline that has passed."""
UNIT = pinned.UNIT_BYTES


def in_time() -> int:
    return time.monotonic_ns() + 60 * 10**9


def address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def buffer_of(*arrays: DeviceArray) -> DeviceBuffer:
    segments, first = [], 0
    for array in arrays:
        elems = array.nbytes // array.dtype.itemsize
        segments.append(Segment(first, elems, array.address))
        first += elems
    return DeviceBuffer(tuple(segments), arrays[0].device, arrays, arrays[0].dtype.itemsize)


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "SLAB_BYTES", 2 * UNIT)


@pytest.fixture
def fake() -> Iterator[StrictDevice]:
    fake = StrictDevice()
    yield fake
    assert fake.misuses == []
    assert fake.waits == 0, "the host blocked on a device"


@pytest.fixture
def pool(fake: StrictDevice) -> PinnedPool:
    pool = PinnedPool(fake, 64 * UNIT)
    pool.reserve(16 * UNIT, 0)
    return pool


def count_events(fake: StrictDevice, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    make = fake.event

    def event(device: int) -> int:
        made.append(device)
        return make(device)

    monkeypatch.setattr(fake, "event", event)
    return made


def busy(fake: StrictDevice, stream: int) -> int:
    fake.kernel(stream, lambda: None)
    return stream


# The wait for the caller's stream.


@pytest.mark.parametrize("handle", [0, 1, 2, None])
def test_a_gate_opens_when_the_callers_stream_has_come_to_the_call(fake: StrictDevice, handle: int | None) -> None:
    stream = fake.stream(1) if handle is None else handle
    fake.kernel(stream, lambda: None, device=1)
    with fake.on(0):
        gate = Gate(fake, 1, stream)
        fake.register(1 << 20, 1)  # device 0 is current as before
    fake.kernel(stream, lambda: None, device=1)
    assert not gate.is_open()
    assert fake.drive_one(stream, device=1)
    assert not gate.is_open()
    assert fake.drive_one(stream, device=1)
    assert gate.is_open()
    assert fake.pending == 1, "what was queued after the call is not waited for"


def test_an_open_gate_asks_no_more_and_gives_its_event_back(
    fake: StrictDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = count_events(fake, monkeypatch)
    streams = [fake.stream(device) for device in (0, 0, 1)]
    gate = Gate(fake, 0, busy(fake, streams[0]))
    fake.drive()
    assert gate.is_open()
    fake.fail("is_past", 700)
    assert gate.is_open()
    other = Gate(fake, 0, busy(fake, streams[0]))
    assert made == [0]
    assert len({id(gate), id(other)}) == 2
    del other
    Gate(fake, 0, busy(fake, streams[1]))
    assert made == [0], "a gate that nobody waits for any more keeps its event"
    Gate(fake, 1, busy(fake, streams[2]))
    assert made == [0, 1], "an event belongs to one device"


def test_a_captured_stream_is_refused(fake: StrictDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_events(fake, monkeypatch)
    stream = fake.stream(0)
    fake.capture(stream)
    for captured in (stream, 0):
        with pytest.raises(UsageError, match="CUDA graph capture"):
            Gate(fake, 0, captured)
    assert made == []
    fake.capture(stream, False)
    Gate(fake, 0, stream)


def test_waiting_for_a_gate_ends_at_the_deadline_or_by_trouble(fake: StrictDevice) -> None:
    gate = Gate(fake, 0, busy(fake, fake.stream(0)))
    with pytest.raises(DeadlineMissed, match="stream of cuda:0 did not come to the collective"):
        gate.wait(NEVER)
    asked: list[int] = []

    def trouble() -> PeerLost | None:
        asked.append(1)
        return PeerLost("rank 1 is gone") if len(asked) == 3 else None

    with pytest.raises(PeerLost, match="rank 1 is gone"):
        gate.wait(in_time(), trouble)
    assert len(asked) == 3
    fake.seeded(0)
    gate.wait(in_time())
    assert gate.is_open()


def test_a_gate_on_a_lost_device_raises(fake: StrictDevice) -> None:
    gate = Gate(fake, 0, busy(fake, fake.stream(0)))
    fake.fail("is_past", 719)
    with pytest.raises(DeviceError, match=r"\(719\)"):
        gate.wait(in_time())


# Where elements lie.


def test_a_buffer_is_cut_where_its_pieces_end() -> None:
    buffer = DeviceBuffer((Segment(0, 3, 1000), Segment(3, 1, 2000), Segment(4, 4, 3000)), 0, None, 4)
    assert buffer.cut(0, 8) == [(1000, 0, 12), (2000, 12, 4), (3000, 16, 16)]
    assert buffer.cut(1, 2) == [(1004, 0, 8)]
    assert buffer.cut(2, 3) == [(1008, 0, 4), (2000, 4, 4), (3000, 8, 4)]
    assert buffer.cut(5, 1) == [(3004, 0, 4)]
    assert buffer.cut(8, 0) == buffer.cut(3, 0) == []
    assert DeviceBuffer((), 0, None, 4).cut(0, 0) == []
    for begin, length in ((0, 9), (8, 1), (-1, 2)):
        with pytest.raises(UsageError, match=f"elements {begin} to {begin + length} are not all in"):
            buffer.cut(begin, length)


# Copies.


def test_copies_move_the_right_bytes_both_ways(fake: StrictDevice, pool: PinnedPool) -> None:
    arrays = [fake.array(np.arange(n, dtype=np.int32) + 10 * n, device=1) for n in (3, 1, 5)]
    whole = np.concatenate([fake.peek(array) for array in arrays])
    moved = Copies(fake)
    host = pool.take(6 * 4).view(np.int32)
    down = moved.begin(buffer_of(*arrays), 2, 6, host, False)
    assert not down.is_past()
    fake.drive()
    assert down.is_past()
    assert host.tolist() == whole[2:8].tolist()
    host *= -1
    up = moved.begin(buffer_of(*arrays), 2, 6, host, True)
    fake.drive()
    assert up.is_past()
    assert np.concatenate([fake.peek(array) for array in arrays]).tolist() == [*whole[:2], *-whole[2:8], whole[8]]
    assert (down.error, up.error, fake.unpinned) == (None, None, [])
    empty = moved.begin(buffer_of(*arrays), 4, 0, host[:0], True)
    assert empty.is_over
    assert moved.idle


@pytest.mark.parametrize("host", [np.zeros(7, np.uint8), np.zeros(9, np.uint8), np.zeros(16, np.uint8)[::2]], ids=len)
def test_host_memory_that_does_not_fit_is_refused(fake: StrictDevice, host: NDArray[np.uint8]) -> None:
    moved = Copies(fake)
    with pytest.raises(UsageError, match=rf"host has {host.nbytes} bytes.*expected 8 bytes, no gaps"):
        moved.begin(buffer_of(fake.array(np.zeros(8, np.uint8))), 0, 8, host, False)
    assert moved.idle
    assert fake.pending == 0


def start(moved: Copies, fake: StrictDevice, pool: PinnedPool, nbytes: int, device: int = 0) -> Copy:
    return moved.begin(buffer_of(fake.array(np.zeros(nbytes, np.uint8), device)), 0, nbytes, pool.take(nbytes), False)


def test_little_is_under_way_and_the_rest_waits_in_order(
    fake: StrictDevice, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "UNDER_WAY_BYTES", 16)
    moved = Copies(fake)
    large, *rest = [start(moved, fake, pool, nbytes) for nbytes in (100, 10, 6, 1)]
    assert fake.pending == 2, "the copy and its event"
    assert start(moved, fake, pool, 1, device=1).is_past() is False
    assert fake.pending == 4, "another device has streams of its own"
    up = moved.begin(buffer_of(fake.array(np.zeros(1, np.uint8))), 0, 1, pool.take(1), True)
    assert fake.pending == 6, "so has the other direction"
    fake.drive()
    assert not rest[0].is_past()  # asks, and begins what may begin
    assert (large.is_over, up.is_over, fake.pending) == (True, False, 4)
    moved.advance()
    assert up.is_over
    assert [copy.is_over for copy in rest] == [False, False, False]
    assert fake.pending == 4, "16 bytes are under way, 1 has to wait"
    fake.drive()
    assert not rest[2].is_past()
    fake.drive()
    assert rest[2].is_past()
    assert moved.idle


def test_events_are_used_again(fake: StrictDevice, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_events(fake, monkeypatch)
    moved = Copies(fake)
    for _ in range(5):
        copy = start(moved, fake, pool, 8)
        fake.drive()
        assert copy.is_past()
    assert made == [0]


def test_memory_stays_until_the_copy_is_over_and_no_longer(fake: StrictDevice, pool: PinnedPool) -> None:
    moved = Copies(fake)
    array = fake.array(np.zeros(16 * UNIT, np.uint8))
    copy = moved.begin(buffer_of(array), 0, array.nbytes, pool.take(array.nbytes), False)
    owner = weakref.ref(array)
    del array
    gc.collect()
    assert pool.take(UNIT).nbytes == UNIT
    assert pool.unpinned_bytes == UNIT, "the block of the copy was given away"
    fake.drive()
    assert owner() is not None
    assert copy.is_past()
    assert owner() is None
    pool.take(16 * UNIT)
    assert pool.unpinned_bytes == UNIT, "the block of the copy did not come back"


def test_cancelled_copies_do_not_begin(fake: StrictDevice, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "UNDER_WAY_BYTES", 8)
    moved = Copies(fake)
    under_way, dropped, kept = (start(moved, fake, pool, 8) for _ in range(3))
    moved.cancel([under_way, dropped])
    assert (under_way.is_over, dropped.is_over, kept.is_over) == (False, True, False)
    assert dropped._host is None
    fake.drive()
    assert under_way.is_past()
    fake.drive()
    moved.advance()
    assert kept.is_over
    assert moved.idle
    assert fake.pending == 0


def test_draining_waits_for_all_until_its_deadline(
    fake: StrictDevice, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "UNDER_WAY_BYTES", 8)
    moved = Copies(fake)
    started = [start(moved, fake, pool, 8, device) for device in (0, 1, 0)]
    assert not moved.drain(NEVER)
    assert not moved.idle
    fake.seeded(1)
    assert moved.drain(in_time())
    assert moved.idle
    assert all(copy.is_over for copy in started)


def test_a_copy_that_fails_in_its_middle_keeps_its_memory_until_its_beginning_is_past(
    fake: StrictDevice, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = [fake.array(np.zeros(4, np.uint8)) for _ in range(2)]
    moved = Copies(fake)
    to_host = fake.to_host

    def second_fails(*arguments: int) -> None:
        to_host(*arguments)
        fake.fail("to_host", 1)
        monkeypatch.undo()

    monkeypatch.setattr(fake, "to_host", second_fails)
    copy = moved.begin(buffer_of(*arrays), 0, 8, pool.take(8), False)
    assert isinstance(copy.error, DeviceError)
    assert not copy.is_past()
    assert copy._host is not None
    fake.drive()
    assert copy.is_past()
    later = start(moved, fake, pool, 8)
    fake.drive()
    assert later.is_past()
    assert later.error is None


def test_a_copy_without_its_event_keeps_its_memory_until_its_stream_is_empty(
    fake: StrictDevice, pool: PinnedPool
) -> None:
    moved = Copies(fake)
    fake.fail("record", 2)
    copy = start(moved, fake, pool, 8)
    assert not copy.is_past()
    assert copy._host is not None
    fake.drive()
    assert copy.is_past()
    assert copy.error is not None
    assert copy.error.code == 2
    assert moved.idle


@pytest.mark.parametrize("call", ["stream", "on", "event"])
def test_a_copy_that_cannot_begin_fails_alone(fake: StrictDevice, pool: PinnedPool, call: str) -> None:
    moved = Copies(fake)
    fake.fail(call, 2)
    copy = start(moved, fake, pool, 8)
    assert copy.is_past()
    assert copy.error is not None
    assert copy.error.code == 2
    assert copy._host is None
    later = start(moved, fake, pool, 8)
    fake.drive()
    assert later.is_past()
    assert later.error is None


def test_a_lost_device_ends_its_copies_and_no_others(fake: StrictDevice, pool: PinnedPool) -> None:
    moved = Copies(fake)
    lost = [start(moved, fake, pool, 8) for _ in range(2)]
    other = start(moved, fake, pool, 8, device=1)
    up = moved.begin(buffer_of(fake.array(np.zeros(8, np.uint8))), 0, 8, pool.take(8), True)
    fake.fail("is_past", 700)
    moved.advance()
    assert all(copy.is_over and copy.error is not None and copy._host is None for copy in [*lost, up])
    assert (other.is_over, other.error) == (False, None)
    again = start(moved, fake, pool, 8)
    assert again.is_over
    assert again.error is not None
    assert again.error.code == 700
    fake.drive()
    assert moved.drain(in_time())
    assert other.error is None
    moved.close()


def test_memory_of_copies_that_nobody_can_ask_for_is_never_used_again(
    fake: StrictDevice, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_abandoned", [])
    moved = Copies(fake)
    copy = start(moved, fake, pool, 16 * UNIT)
    fake.fail("is_past", 1)
    assert copy.is_past()
    assert copy.error is not None
    del copy
    gc.collect()
    pool.take(UNIT)
    assert pool.unpinned_bytes == UNIT
    fake.drive()


def test_closing_gives_streams_up_and_abandons_what_is_under_way(
    fake: StrictDevice, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_abandoned", [])
    monkeypatch.setattr(copies, "UNDER_WAY_BYTES", 8)
    moved = Copies(fake)
    under_way, waiting = (start(moved, fake, pool, 8) for _ in range(2))
    moved.close()
    assert waiting.is_over
    assert not under_way.is_over
    assert len(fake._streams._made) == 0
    del under_way
    gc.collect()
    pool.close()
    assert pool.leaked_bytes == 16 * UNIT
    fake.drive()
    moved.close()


@pytest.mark.parametrize("dropped", ["nothing", "gate", "to host", "to device"])
def test_without_any_of_its_waits_a_call_would_be_wrong(
    pool: PinnedPool, monkeypatch: pytest.MonkeyPatch, dropped: str
) -> None:
    """What a call does with one array, chunk by chunk, driven by chance."""

    def call(fake: StrictDevice) -> list[int]:
        pool, moved, stream = PinnedPool(fake), Copies(fake), fake.stream(0)
        pool.reserve(8, 0)
        array, seen = fake.array(np.zeros(8, np.uint8)), list[int]()
        buffer = buffer_of(array)
        busy(fake, stream)  # the gate's look lets this much happen
        fake.kernel(stream, lambda: fake.poke(array, np.arange(8)))
        gate = Gate(fake, 0, stream)
        if dropped != "gate":
            gate.wait(in_time())
        for begin in (0, 4):
            host = pool.take(4)
            down = moved.begin(buffer, begin, 4, host, False)
            while dropped != "to host" and not down.is_past():
                pass
            host += 100
            up = moved.begin(buffer, begin, 4, host, True)
            while dropped != "to device" and not up.is_past():
                pass
        fake.kernel(stream, lambda: seen.extend(fake.peek(array).tolist()))
        fake.drive()
        return seen

    right = [100 + number for number in range(8)]
    wrong = 0
    for seed in range(20):
        fake = StrictDevice()
        fake.seeded(seed)
        try:
            wrong += call(fake) != right
        except AssertionError:
            wrong += 1  # the double saw host memory in use by two copies
    assert (wrong > 0) == (dropped != "nothing")


# Pinned memory.


def test_blocks_are_pinned_apart_and_come_back_with_their_last_view(fake: StrictDevice, pool: PinnedPool) -> None:
    assert pool.bytes == fake.pinned_bytes == 16 * UNIT
    first, second = pool.take(UNIT + 1), pool.take(5)
    assert (first.nbytes, second.nbytes, first.dtype) == (UNIT + 1, 5, np.uint8)
    first[:], second[:] = 1, 2
    assert set(first.tolist()) == {1}
    view = memoryview(first[7:][::3].view(np.int8)[1:])
    begin = address(first)
    del first
    gc.collect()
    assert address(pool.take(UNIT + 1)) != begin, "a view still uses it"
    view.release()
    gc.collect()
    assert address(pool.take(UNIT + 1)) == begin
    assert (fake.pinned_bytes, pool.unpinned_bytes) == (16 * UNIT, 0)


def test_taking_never_pins(fake: StrictDevice) -> None:
    pool = PinnedPool(fake, 64 * UNIT)
    blocks = [pool.take(100), pool.take(50)]
    assert (fake.pinned_bytes, pool.bytes, pool.unpinned_bytes) == (0, 0, 150)
    blocks.pop()
    pool.take(60)
    blocks.clear()
    pool.take(1)
    assert pool.unpinned_bytes == 160, "the most at a time"
    pool.reserve(0, 0)
    assert pool.take(0).nbytes == 0
    assert fake.pinned_bytes == 0


def test_reserving_pins_only_what_is_missing(fake: StrictDevice) -> None:
    pool = PinnedPool(fake, 6 * UNIT)
    for _ in range(2):
        pool.reserve(5, 0)
        assert fake.pinned_bytes == 2 * UNIT, "the usual slab"
    block = pool.take(2 * UNIT)
    pool.reserve(2 * UNIT + 1, 1)
    assert fake.pinned_bytes == pool.bytes == 5 * UNIT
    large = pool.take(2 * UNIT + 1)
    pool.reserve(1, 1)
    assert fake.pinned_bytes == 6 * UNIT, "no more than the limit"
    assert pool.unpinned_bytes == 0
    del block, large
    pool.close()
    assert (fake.pinned_bytes, pool.bytes) == (0, 0)


def test_the_limit_holds(fake: StrictDevice, pool: PinnedPool) -> None:
    block = pool.take(1)
    pool.reserve(49 * UNIT, 0)
    assert fake.pinned_bytes == 16 * UNIT
    pool.reserve(65 * UNIT, 0)
    assert fake.pinned_bytes == 16 * UNIT
    pool.take(49 * UNIT)
    assert pool.unpinned_bytes == 49 * UNIT
    pool.reserve(48 * UNIT, 0)
    assert fake.pinned_bytes == 64 * UNIT
    pool.reserve(49 * UNIT, 0)
    assert fake.pinned_bytes == 64 * UNIT, "unpinning the idle slab would not have been enough"
    del block


def test_idle_slabs_make_room_for_a_larger_block(fake: StrictDevice, pool: PinnedPool) -> None:
    pool.reserve(17 * UNIT, 1)
    assert fake.pinned_bytes == 33 * UNIT
    pool.reserve(60 * UNIT, 0)
    assert fake.pinned_bytes == 60 * UNIT
    whole = pool.take(60 * UNIT)
    assert pool.unpinned_bytes == 0
    del whole


def test_small_blocks_leave_large_ranges_whole(fake: StrictDevice, pool: PinnedPool) -> None:
    pool.reserve(48 * UNIT, 0)
    block = pool.take(20 * UNIT)
    small = [pool.take(1) for _ in range(16)]
    whole = pool.take(28 * UNIT)
    assert pool.unpinned_bytes == 0
    del block, small, whole


@pytest.mark.parametrize("call", ["register", "on"])
def test_where_the_driver_refuses_memory_stays_ordinary(fake: StrictDevice, pool: PinnedPool, call: str) -> None:
    block = pool.take(1)
    fake.fail(call, 2)
    pool.reserve(20 * UNIT, 0)
    assert isinstance(pool.refused, DeviceError)
    assert pool.refused.code == 2
    pool.reserve(20 * UNIT, 0)
    assert fake.pinned_bytes == pool.bytes == 16 * UNIT
    assert pool.take(20 * UNIT).nbytes == 20 * UNIT
    fake.fail("register", 700)
    del block
    other = PinnedPool(fake)
    with pytest.raises(DeviceError, match=r"\(700\)"):
        other.reserve(1, 0)


def test_closing_unpins_all_but_what_is_borrowed(
    fake: StrictDevice, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaked: list[Any] = []
    monkeypatch.setattr(pinned, "_leaked", leaked)
    block = pool.take(5)
    pool.reserve(20 * UNIT, 1)
    pool.close()
    assert (fake.pinned_bytes, pool.bytes, pool.leaked_bytes) == (16 * UNIT, 16 * UNIT, 16 * UNIT)
    block[:] = 7
    slab = leaked[0]
    assert bytes(slab.memory[:5]) == b"\x07" * 5
    del block
    pool.reserve(1, 0)
    pool.take(1)
    assert pool.unpinned_bytes == 1
    pool.close()
    assert fake.pinned_bytes == 16 * UNIT


def test_a_slab_that_the_driver_does_not_unpin_stays_mapped(
    fake: StrictDevice, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaked: list[Any] = []
    monkeypatch.setattr(pinned, "_leaked", leaked)
    fake.fail("unregister", 1)
    pool.close()
    assert [slab.nbytes for slab in leaked] == [16 * UNIT]
    assert pool.leaked_bytes == 16 * UNIT


def test_taking_does_not_wait_for_pinning(
    fake: StrictDevice, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    register, taken = fake.register, list[int]()

    def slow(begin: int, nbytes: int) -> None:
        taken.append(pool.take(UNIT).nbytes)  # what the progress thread does meanwhile
        register(begin, nbytes)

    monkeypatch.setattr(fake, "register", slow)
    pool.reserve(17 * UNIT, 0)
    assert taken == [UNIT]
    assert pool.unpinned_bytes == 0


def test_a_block_may_be_freed_while_the_pool_is_at_work(fake: StrictDevice, pool: PinnedPool) -> None:
    block = pool.take(1)
    with pool._lock, pool._growing:  # Python may collect garbage here, on this very thread
        del block
        gc.collect()
    whole = pool.take(16 * UNIT)
    assert pool.unpinned_bytes == 0
    del whole


def test_pages_are_shared_with_forked_children(pool: PinnedPool) -> None:
    block = pool.take(1)
    begin = address(block)
    for line in Path("/proc/self/maps").read_text(encoding="ascii").splitlines():
        bounds, mode = line.split()[:2]
        low, high = (int(bound, 16) for bound in bounds.split("-"))
        if low <= begin < high:
            assert mode == "rw-s"
            return
    pytest.fail("the block is not mapped")


@given(st.lists(st.tuples(st.integers(1, 20 * UNIT), st.integers(0, 5)), max_size=30))
def test_blocks_never_overlap_and_all_of_them_come_back(steps: list[tuple[int, int]]) -> None:
    pool = PinnedPool(StrictDevice(), 40 * UNIT)
    blocks: list[NDArray[np.uint8]] = []
    for nbytes, freed in steps:
        if freed < len(blocks):
            del blocks[freed]
        pool.reserve(nbytes, 0)
        blocks.append(pool.take(nbytes))
        ranges = sorted((address(block), address(block) + block.nbytes) for block in blocks)
        assert all(low[1] <= high[0] for low, high in pairwise(ranges))
        assert pool.bytes <= 40 * UNIT
    blocks.clear()
    pool.take(0)
    assert all(slab.is_idle for slab in pool._slabs)
    pool.close()
    assert pool.bytes == 0


def test_poison_is_what_a_pending_copy_shows(fake: StrictDevice, pool: PinnedPool) -> None:
    host = pool.take(8)
    Copies(fake).begin(buffer_of(fake.array(np.zeros(8, np.uint8))), 0, 8, host, False)
    assert set(host.tolist()) == {PENDING}
    fake.drive()
