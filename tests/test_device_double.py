"""The strict double of devices: each of its rules, broken once."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from detcoll.device import MemoryType
from detcoll.errors import DeviceError
from detcoll.testing.device import PENDING, StrictDevice
from detcoll.testing.device_memory import FREED, DeviceArray, Misuse

N = 8


def address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


class Bench:
    """A device with an array, pinned host memory and a stream, and the device's calls in short."""

    def __init__(self) -> None:
        self.fake = StrictDevice()
        self.array = self.fake.array(np.arange(N, dtype=np.uint8))
        self.host = np.zeros(N, np.uint8)
        self.stream = self.fake.stream(0)
        with self.fake.on(0):
            self.fake.register(address(self.host), N)

    def down(self, nbytes: int = N, stream: int | None = None, at: int = 0, device: int = 0) -> None:
        with self.fake.on(device):
            used = self.stream if stream is None else stream
            self.fake.to_host(address(self.host), self.array.address + at, nbytes, used)

    def up(self, stream: int | None = None) -> None:
        with self.fake.on(0):
            used = self.stream if stream is None else stream
            self.fake.to_device(self.array.address, address(self.host), N, used)

    def mark(self, stream: int | None = None) -> int:
        event = self.fake.event(0)
        with self.fake.on(0):
            self.fake.record(event, self.stream if stream is None else stream)
        return event

    def is_past(self, event: int) -> bool:
        with self.fake.on(0):
            return self.fake.is_past(event)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    assert bench.fake.misuses == []


@pytest.fixture
def misused() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    assert len(bench.fake.misuses) == 1, "what was raised is kept for tests that do not see it"


def test_the_host_cannot_touch_a_device_array(bench: Bench) -> None:
    with pytest.raises(TypeError, match="implicit conversion"):
        np.asarray(bench.array)
    assert bench.array.address > 2**57, "the host has no such addresses"
    interface = bench.array.__cuda_array_interface__
    assert interface["data"] == (bench.array.address, False)
    assert (interface["shape"], interface["typestr"], interface["stream"]) == ((N,), "|u1", 1)
    assert bench.fake.peek(bench.array).tolist() == list(range(N))
    bench.fake.poke(bench.array, 7)
    assert bench.fake.peek(bench.array).tolist() == [7] * N


def test_a_copy_is_late_and_takes_what_its_source_holds_then(bench: Bench) -> None:
    bench.down()
    assert bench.host.tolist() == [PENDING] * N
    bench.fake.poke(bench.array, 9)
    bench.fake.drive()
    assert bench.host.tolist() == [9] * N
    bench.host[:] = 3
    bench.up()
    assert bench.fake.peek(bench.array).tolist() == [PENDING] * N
    bench.host[:] = 4
    bench.fake.drive()
    assert bench.fake.peek(bench.array).tolist() == [4] * N


def test_streams_keep_their_order_and_no_other(bench: Bench) -> None:
    seen: list[str] = []
    other = bench.fake.stream(0)
    for name, stream in (("a", bench.stream), ("b", bench.stream), ("c", other)):
        bench.fake.kernel(stream, lambda name=name: seen.append(name))
    assert bench.fake.drive_one(other)
    assert not bench.fake.drive_one(other)
    bench.fake.drive()
    assert seen == ["c", "a", "b"]
    assert bench.fake.pending == 0


def test_an_event_is_past_when_what_was_ahead_of_it_is(bench: Bench) -> None:
    never = bench.fake.event(0)
    assert bench.is_past(never)
    bench.down()
    event = bench.mark()
    bench.fake.kernel(bench.stream, lambda: None)
    assert not bench.is_past(event)
    assert bench.fake.drive_one(bench.stream)
    assert not bench.is_past(event)
    assert bench.fake.drive_one(bench.stream)
    assert bench.is_past(event)
    with bench.fake.on(0):
        bench.fake.record(event, bench.stream)
    assert not bench.is_past(event), "it marks the last time that it was recorded"


def test_a_stream_can_wait_for_an_event_of_another(bench: Bench) -> None:
    other = bench.fake.stream(0)
    bench.fake.kernel(bench.stream, lambda: bench.fake.poke(bench.array, 5))
    event = bench.mark()
    with bench.fake.on(0):
        bench.fake.order(other, event)
        bench.fake.record(event, other)  # what was ordered before stays as it was
    bench.down(stream=other)
    assert not bench.fake.drive_one(other)
    bench.fake.drive()
    assert bench.host.tolist() == [5] * N


def test_a_wait_blocks_until_the_event_is_past(bench: Bench) -> None:
    bench.down()
    event = bench.mark()
    with bench.fake.on(0):
        bench.fake.wait_for(event)
    assert bench.host.tolist() == list(range(N))
    assert bench.fake.waits == 1


def test_a_wait_that_cannot_end_is_noticed(misused: Bench) -> None:
    held = misused.fake.event(0)
    with misused.fake.on(0):
        misused.fake.record(held, misused.fake.stream(0))
        misused.fake._streams.all[-1].queue[0].may_run = lambda: False
        with pytest.raises(Misuse, match="nothing can happen"):
            misused.fake.wait_for(held)


def test_default_streams_are_those_of_the_current_device(bench: Bench) -> None:
    seen: list[int] = []
    for device in (0, 1):
        bench.fake.kernel(0, lambda device=device: seen.append(device), device=device)
    assert bench.fake.drive_one(1, device=1), "1 is another name of 0"
    assert seen == [1]
    bench.fake.kernel(2, lambda: seen.append(2))
    assert bench.fake.drive_one(2)
    bench.fake.drive()
    assert seen == [1, 2, 0]


def test_polls_drive_by_a_seed(bench: Bench) -> None:
    def order(seed: int) -> list[int]:
        fake, seen = StrictDevice(), list[int]()
        streams = [fake.stream(0) for _ in range(3)]
        for number in range(9):
            fake.kernel(streams[number % 3], lambda number=number: seen.append(number))
        fake.seeded(seed)
        event = fake.event(0)
        for done in range(9):
            assert len(seen) == done
            with fake.on(0):
                fake.is_past(event)
        return seen

    orders = [order(seed) for seed in range(4)]
    assert order(0) == orders[0]
    assert any(other != orders[0] for other in orders[1:])
    for found in orders:
        assert [[each for each in found if each % 3 == stream] for stream in range(3)] == [
            [0, 3, 6],
            [1, 4, 7],
            [2, 5, 8],
        ]


def test_memory_that_is_not_pinned_blocks_and_is_noted(bench: Bench) -> None:
    pageable = np.zeros(N, np.uint8)
    bench.fake.kernel(bench.stream, lambda: bench.fake.poke(bench.array, 6))
    with bench.fake.on(0):
        bench.fake.to_host(address(pageable), bench.array.address, N, bench.stream)
    assert pageable.tolist() == [6] * N
    assert bench.fake.unpinned == [(address(pageable), N)]
    assert bench.fake.memory_type(address(pageable)) is MemoryType.UNKNOWN
    assert bench.fake.memory_type(address(bench.host)) is MemoryType.HOST
    assert bench.fake.memory_type(bench.array.address) is MemoryType.DEVICE


def test_freed_memory_is_spoiled_and_must_not_be_used(misused: Bench) -> None:
    held = misused.fake._memory.bytes_at(misused.array.address, N, 0)
    misused.down()
    misused.fake.free(misused.array)
    assert held.tolist() == [FREED] * N
    with pytest.raises(Misuse, match="is freed"):
        misused.fake.drive()


def test_memory_is_freed_with_its_array(misused: Bench) -> None:
    misused.down()
    misused.array = None  # type: ignore[assignment]
    gc.collect()
    with pytest.raises(Misuse, match="is freed"):
        misused.fake.drive()


MISUSES: list[tuple[str, Callable[[Bench], object]]] = [
    ("go beyond the device array", lambda bench: bench.down(at=1)),
    ("no device array is at", lambda bench: bench.down(at=-1)),
    ("is on device 1, used on 0", lambda bench: _on_another_device(bench)),
    ("to_host needs device 0 to be current; that is 1", lambda bench: bench.down(device=1)),
    ("needs device 0 to be current; that is None", lambda bench: bench.fake.is_past(bench.fake.event(0))),
    ("register needs device None", lambda bench: bench.fake.register(1, 1)),
    ("needs a device to be current", lambda bench: bench.fake.capturing(0)),
    ("there is no stream", lambda bench: bench.fake.drive_one(4711)),
    ("there is no event", lambda bench: bench.is_past(4711)),
    ("pinned in part", lambda bench: _in_part(bench)),
    ("is used by to_host while a copy uses it", lambda bench: (bench.down(), bench.down())),
    ("is used by to_host while a copy uses it", lambda bench: (bench.up(), bench.down())),
    ("is used by to_device while a copy uses it", lambda bench: (bench.down(), bench.up(bench.fake.stream(0)))),
    ("is unpinned while a copy uses it", lambda bench: (bench.up(), _unpin(bench))),
    ("captures a CUDA graph", lambda bench: (bench.fake.capture(bench.stream), bench.up())),
    ("recorded on one of", lambda bench: bench.mark(bench.fake.stream(1))),
]


def _unpin(bench: Bench) -> None:
    with bench.fake.on(0):
        bench.fake.unregister(address(bench.host))


def _in_part(bench: Bench) -> None:
    big = bench.host = np.zeros(2 * N, np.uint8)
    with bench.fake.on(0):
        bench.fake.register(address(big) + N, N)
    bench.array = bench.fake.array(np.zeros(2 * N, np.uint8))
    bench.down(nbytes=2 * N)


def _on_another_device(bench: Bench) -> None:
    bench.array = bench.fake.array(np.zeros(N, np.uint8), device=1)
    bench.down()


@pytest.mark.parametrize(("said", "misuse"), MISUSES, ids=[said for said, _ in MISUSES])
def test_misuse_is_noticed(misused: Bench, said: str, misuse: Callable[[Bench], object]) -> None:
    with pytest.raises(Misuse, match=said):
        misuse(misused)


def test_two_copies_may_read_the_same_host_memory(bench: Bench) -> None:
    bench.up()
    bench.up(bench.fake.stream(0))
    bench.fake.drive()


def test_memory_is_pinned_once_and_unpinned_once(bench: Bench) -> None:
    with bench.fake.on(1):
        for begin, nbytes, code in ((0, N, 712), (N - 1, N, 712), (N, 0, 1)):
            with pytest.raises(DeviceError, match=rf"\({code}\)"):
                bench.fake.register(address(bench.host) + begin, nbytes)
        assert bench.fake.pinned_bytes == N
        bench.fake.unregister(address(bench.host))
        with pytest.raises(DeviceError, match=r"\(713\)"):
            bench.fake.unregister(address(bench.host))
    assert bench.fake.pinned_bytes == 0


def test_an_event_of_a_graph_cannot_be_asked(bench: Bench) -> None:
    bench.fake.capture(bench.stream)
    with bench.fake.on(0):
        assert bench.fake.capturing(bench.stream)
        assert bench.fake.capturing(0), "the default stream would wait for it"
        assert not bench.fake.capturing(bench.fake.stream(0))
    event = bench.mark()
    with pytest.raises(DeviceError, match=r"\(907\)"):
        bench.is_past(event)
    bench.fake.capture(bench.stream, False)
    with bench.fake.on(0):
        assert not bench.fake.capturing(bench.stream)
        bench.fake.record(event, bench.stream)
        assert not bench.fake.is_past(event)


def test_devices_that_are_not_used_yet_are_refused() -> None:
    fake = StrictDevice(devices=2, used=(1,))
    for device, code in ((0, 201), (2, 101)):
        with pytest.raises(DeviceError, match=rf"\({code}\)"), fake.on(device):
            pass
    with fake.on(1):
        pass


def test_calls_fail_as_the_test_asks(bench: Bench) -> None:
    bench.fake.fail("to_device", 2)
    with pytest.raises(DeviceError, match=r"to_device failed with CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        bench.up()
    bench.up()
    event = bench.mark()
    bench.fake.fail("is_past", 700)
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"\(700\)"):
            bench.is_past(event)
    assert bench.fake.pending == 0, "what a lost device holds is not carried out"
    assert bench.fake.stream(1)


def test_a_stream_that_is_given_up_is_still_carried_out(bench: Bench) -> None:
    bench.down()
    with bench.fake.on(0):
        bench.fake.destroy_stream(bench.stream)
    bench.fake.drive()
    assert bench.host.tolist() == list(range(N))


def test_a_forked_child_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    for call in (bench.up, lambda: bench.fake.stream(0)):
        with pytest.raises(DeviceError, match="forked process"):
            call()


def test_arrays_keep_shape_and_type(bench: Bench) -> None:
    values = np.arange(6, dtype=np.complex64).reshape(2, 3)
    array: DeviceArray = bench.fake.array(values, device=1, stream=bench.stream)
    np.testing.assert_array_equal(bench.fake.peek(array), values)
    assert bench.fake.device_of(array.address + 47) == 1
    assert array.__cuda_array_interface__["stream"] == bench.stream
    with pytest.raises(DeviceError, match="device_of"):
        bench.fake.device_of(array.address + 48)
