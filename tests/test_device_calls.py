"""Collectives on arrays of devices, over the strict double of CUDA."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import kinds
import numpy as np
import pytest
from ranks import lines, run_ranks
from test_kinds import serve

from detcoll.communicator import Communicator
from detcoll.device import cuda, now
from detcoll.errors import DetcollError, UsageError
from detcoll.testing.device import StrictDevice


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


def until(is_so: Callable[[], bool]) -> None:
    """Drive nothing, and wait for what another thread does."""
    limit = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < limit
        time.sleep(0.001)


def own_stream(device: StrictDevice, number: int = 0) -> int:
    with device.on(number):
        return device.stream(number)


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
    if (transport, call) == ("shm", "to_device"):  # the other rank has its result by then
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
