"""send and recv of arrays on devices, over the strict double of CUDA."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from devices import assert_nothing_left, hold, own_stream, until
from ranks import lines, run_ranks

from detcoll.communicator import Communicator
from detcoll.device import copies
from detcoll.errors import DeadlineMissed, DetcollError, UsageError
from detcoll.runtime import messages
from detcoll.testing.device import StrictDevice, in_place_of_cuda


@pytest.fixture
def device() -> Iterator[StrictDevice]:
    with in_place_of_cuda() as strict:
        yield strict
        assert_nothing_left(strict)


SIZES = pytest.mark.parametrize("count", [5, 500, 50_000], ids=["inline", "eager", "large"])


@pytest.mark.parametrize("count", [5, 500], ids=["inline", "eager"])
def test_a_small_message_waits_for_what_its_caller_queued_and_holds_up_no_other(
    device: StrictDevice, count: int
) -> None:
    """The source is written, and the target is still read, by kernels queued before the call."""
    device.seeded(1)
    looked, seen = threading.Barrier(2), []

    def program(comm: Communicator) -> None:
        stream = own_stream(device)
        x = device.array(np.zeros(count), 0, stream)
        released = hold(device, stream)
        if comm.rank == 0:
            device.kernel(stream, lambda: device.poke(x, 7.0))
            work = comm.send(x, 1, async_op=True)
        else:
            device.kernel(stream, lambda: seen.append(device.peek(x)))
            work = comm.recv(x, 0, async_op=True)
        on_host = np.ones(10)
        comm.all_reduce(on_host)
        comm.send(on_host, 1 - comm.rank, 9)
        comm.recv(on_host, 1 - comm.rank, 9)
        assert not work.done()
        looked.wait(30)
        if comm.rank == 0:
            released.set()
            work.wait()
            comm.send(on_host, 1, 9)
        else:
            comm.recv(on_host, 0, 9)  # by then the message is on its way, or here
            assert not work.done()
            released.set()
            work.wait()
            assert (device.peek(x) == 7).all()

    run_ranks(2, program)
    assert (seen[0] == 0).all()
    assert not device.unpinned


@pytest.mark.parametrize("late", [0, 1])
def test_a_large_message_waits_for_the_stream_at_either_end(device: StrictDevice, late: int) -> None:
    device.seeded(1)
    seen = []

    def program(comm: Communicator) -> None:
        stream = own_stream(device)
        x = device.array(np.zeros(50_000), 0, stream)
        released = hold(device, stream) if comm.rank == late else threading.Event()
        if comm.rank == 0:
            device.kernel(stream, lambda: device.poke(x, 7.0))
            work = comm.send(x, 1, async_op=True)
        else:
            device.kernel(stream, lambda: seen.append(device.peek(x)))
            work = comm.recv(x, 0, async_op=True)
        comm.barrier()
        if comm.rank == late:
            assert not work.done()
            assert comm.rank == 1 or "queued on the device" in awaits(comm)
        comm.barrier()
        released.set()
        work.wait()
        if comm.rank == 1:
            assert (device.peek(x) == 7).all()

    run_ranks(2, program)
    assert (seen[0] == 0).all()


def awaits(comm: Communicator) -> str:
    """Return what messages of the rank wait for."""
    engine = comm._job.loop.engine
    return comm._job.loop.ask(
        lambda now_ns: " ".join(each.awaits for group in engine.groups.values() for each in group.mail.pending)
    )


@pytest.mark.parametrize("is_own", [False, True], ids=["another", "itself"])
def test_a_small_send_lets_its_caller_go_on_before_it_is_received(  # noqa: C901  # two ranks, step by step
    monkeypatch: pytest.MonkeyPatch, device: StrictDevice, is_own: bool
) -> None:
    """As many as are bounded; each that is received makes room for one."""
    device.seeded(2)
    monkeypatch.setattr(messages, "LARGEST_EAGER", 2)
    sent = threading.Event()

    def program(comm: Communicator) -> None:
        if comm.rank == 0:
            x = device.array(np.zeros(500), 0, own_stream(device))
            target, works = 0 if is_own else 1, []
            for number in range(3):
                device.poke(x, number)
                works.append(comm.send(x, target, async_op=True))
                if number < 2:
                    works[number].wait(20)
            with pytest.raises(DeadlineMissed):
                works[2].wait(0)
            sent.set()
            if is_own:
                receive(comm)
            works[2].wait(20)
            if not is_own:
                comm.recv(np.empty(1), 1, 5)  # behind what tells that all three were received
            for number in range(3, 5):
                device.poke(x, number)
                comm.send(x, target, timeout=20)
            device.poke(x, 99)
            comm.barrier()
            if is_own:
                receive(comm, 3, 5)
            return
        assert sent.wait(20)
        if not is_own:
            receive(comm)
            comm.send(np.ones(1), 0, 5)
        comm.barrier()
        if not is_own:
            receive(comm, 3, 5)

    def receive(comm: Communicator, begin: int = 0, end: int = 3) -> None:
        for number in range(begin, end):
            y = device.array(np.zeros(500), 1, own_stream(device, 1))
            assert comm.recv(y, 0) == 0
            assert (device.peek(y) == number).all()

    run_ranks(2, program)


PLACES = {
    "tcp": ("tcp", None, 3),
    "two sites": ("slotted", lines(1, 2, rate_bytes_per_s=1e9), 3),
    "shm": ("shm", None, 2),
}


@pytest.mark.parametrize("place", PLACES)
def test_random_messages(device: StrictDevice, place: str) -> None:
    """Between devices and hosts, of all sizes, to this rank too, in the order of their tags."""
    device.seeded(3)
    transport, topology, size = PLACES[place]
    sizes = (0, 1, 7, 300, 3_000, 40_000)

    def array(draw: np.random.Generator, values: np.ndarray) -> object:
        if draw.random() < 0.3:
            return values.copy()
        number = int(draw.integers(2))
        stream = own_stream(device, number)
        made = device.array(np.full_like(values, -1), number, stream)
        device.kernel(stream, lambda: device.poke(made, values), number)
        return made

    def program(comm: Communicator) -> None:
        plan = np.random.default_rng(5)
        draw = np.random.default_rng([6, comm.rank])
        pending = []
        for number in range(40):
            source, target, count = int(plan.integers(size)), int(plan.integers(size)), sizes[plan.integers(len(sizes))]
            tag, values = int(plan.integers(3)), np.arange(float(count)) + 1000 * number
            if comm.rank == target:
                got = array(draw, np.zeros(count))
                pending.append((comm.recv(got, source, tag, async_op=True), got, values))
            if comm.rank == source:
                given = array(draw, values)
                pending.append((comm.send(given, target, tag, async_op=True), given, values))
            while len(pending) > (8 if number < 39 else 0):
                check(*pending.pop(0))

    def check(work: object, held: object, values: np.ndarray) -> None:
        work.wait()  # type: ignore[attr-defined]
        if values.size:
            assert (held if isinstance(held, np.ndarray) else device.peek(held)).tolist() == values.tolist()

    run_ranks(size, program, transport=transport, topology=topology)
    assert not device.unpinned


def test_messages_and_collectives_on_one_memory_follow_one_another(device: StrictDevice) -> None:
    device.seeded(4)

    def program(comm: Communicator) -> None:
        x = device.array(np.full(5000, comm.rank + 1.0), 0, own_stream(device))
        works = [comm.all_reduce(x, async_op=True)]
        for number in range(3):
            works.append((comm.send if comm.rank == number % 2 else comm.recv)(x, 1 - comm.rank, async_op=True))
            works.append(comm.all_reduce(x, async_op=True))
        for work in works:
            work.wait()
        assert (device.peek(x) == 3 * 2**3).all()

    run_ranks(2, program)


def test_lists_go_in_one_message(device: StrictDevice) -> None:
    device.seeded(5)

    def program(comm: Communicator) -> None:
        arrays = [device.array(np.full(count, comm.rank * 10.0 + count)) for count in (3, 0, 2000)]
        (comm.send if comm.rank == 1 else comm.recv)(arrays, 1 - comm.rank)
        assert [set(device.peek(each).tolist()) for each in arrays] == [{13.0}, set(), {2010.0}]

    run_ranks(2, program)
    assert not device.unpinned


@pytest.mark.parametrize("late", [0, 1])
def test_what_a_caller_queued_and_does_not_end_counts_against_the_deadline(device: StrictDevice, late: int) -> None:
    device.seeded(6)
    arrays = [device.array(np.full(5000, float(rank)), 0, own_stream(device)) for rank in range(2)]
    released = hold(device, arrays[late].stream)

    def program(comm: Communicator) -> str:
        call = comm.send if comm.rank == 0 else comm.recv
        try:
            call(arrays[comm.rank], 1 - comm.rank, timeout=0.3 if comm.rank == late else 20)
            comm.barrier()
        except DetcollError as error:
            return str(error)
        return ""

    told = run_ranks(2, program)
    assert "what its caller queued on the device before" in told[late]
    released.set()
    device.drive()
    assert [set(device.peek(each).tolist()) for each in arrays] == [{0.0}, {1.0}]


@SIZES
@pytest.mark.parametrize("call", ["to_host", "to_device"])
def test_both_ranks_hear_of_a_device_that_fails(device: StrictDevice, call: str, count: int) -> None:
    device.seeded(7)
    device.fail(call, 2)

    def program(comm: Communicator) -> str:
        x = device.array(np.ones(count), comm.rank, own_stream(device, comm.rank))
        try:
            (comm.send if comm.rank == 0 else comm.recv)(x, 1 - comm.rank)
            comm.barrier()
        except DetcollError as error:
            return str(error)
        return ""

    assert all(call in text for text in run_ranks(2, program))


def test_a_call_is_no_part_of_a_graph(device: StrictDevice) -> None:
    device.seeded(8)

    def program(comm: Communicator) -> None:
        stream = own_stream(device)
        x = device.array(np.full(5000, float(comm.rank)), 0, stream)
        call = comm.send if comm.rank == 0 else comm.recv
        device.capture(stream)
        with pytest.raises(UsageError, match="graph"):
            call(x, 1 - comm.rank)
        device.capture(stream, False)
        call(x, 1 - comm.rank)
        assert (device.peek(x) == 0).all()

    run_ranks(2, program)


def test_a_receive_that_fails_writes_nothing_afterwards(monkeypatch: pytest.MonkeyPatch, device: StrictDevice) -> None:
    """The copy to the device is under way when the group ends: the caller hears of that once the copy is over."""
    device.seeded(9)
    begun, held = threading.Event(), []
    inner = device.to_device

    def to_device(device_address: int, host_address: int, nbytes: int, stream: int) -> None:
        held.append(hold(device, stream))
        inner(device_address, host_address, nbytes, stream)
        begun.set()

    monkeypatch.setattr(device, "to_device", to_device)
    monkeypatch.setattr(copies, "UNDER_WAY_BYTES", 1)

    def program(comm: Communicator) -> None:
        pair = comm.group([0, 1], "pair")
        if comm.rank == 0:
            pair.send(np.ones(5000), 1)
            assert begun.wait(20)
            pair.abort("enough")
            comm.barrier()
            return
        x = device.array(np.zeros(5000), 0, own_stream(device))
        work = pair.recv(x, 0, async_op=True)
        until(lambda: comm._job.failure(pair._group))
        held[0].set()
        assert "enough" in str(work.exception(20))
        after = device.peek(x)
        device.drive()
        assert (device.peek(x) == after).all()
        comm.barrier()

    run_ranks(2, program)
