"""send and recv as users call them, over real transports."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from forked import PLAIN, TORCH, launch_forked
from ranks import PROGRAMS, TIMEOUT_S, attempt, give_up_after, grouped, launch, lines, run_ranks

import detcoll
from detcoll import registry
from detcoll.communicator import Communicator
from detcoll.errors import Closed, DeadlineMissed, PlanMismatch, TransportError, UsageError
from detcoll.report.standing import findings, stands
from detcoll.runtime.messages import LARGEST_EAGER
from detcoll.testing import MemoryTransport
from detcoll.types import DTYPES

sys.path.append(str(PROGRAMS))
from messages import exchange, pattern

WORLDS: dict[str, tuple[int, str, Any]] = {
    "shm 1": (1, "shm", None), "shm 3": (3, "shm", None), "shm 7": (7, "shm", None),
    "slotted 1": (1, "slotted", None), "slotted 3": (3, "slotted", None),
    "slotted 3+4": (7, "slotted", lines(3, 4)), "slotted 1+2+2": (5, "slotted", lines(1, 2, 2)),
    "shm grouped 1+2": (3, "shm", grouped(1, 2)), "mixed 2+1": (3, "auto", lines(2, 1)),
    "memory 3": (3, "memory", None), "memory 7": (7, "memory", None),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def memory_transport():
    """Let jobs use the in-memory fabric by name."""
    registry.register(MemoryTransport)
    yield
    registry._registered.pop("memory", None)


def everywhere(function):
    """Run a test in all worlds."""
    return pytest.mark.parametrize("world", WORLDS)(function)


def run(world: str, function: Callable[[Communicator], Any], **settings: Any) -> list[Any]:
    size, transport, topology = WORLDS[world]
    return run_ranks(size, function, transport=transport, topology=topology, **settings)


# What arrives.


@everywhere
def test_messages_of_all_sizes_between_all_ranks(world: str) -> None:
    def program(comm):
        exchange(comm, 5, 5, 60_000)
        comm.barrier()

    run(world, program)


@everywhere
@pytest.mark.parametrize("nbytes", [1_048_576, 9_000_001])
def test_a_ring_of_large_messages_does_not_deadlock(world: str, nbytes: int) -> None:
    size = WORLDS[world][0]
    if nbytes > 2**20 and size > 3:
        pytest.skip("the long way round is tried with few ranks")

    def program(comm):
        after, before = (comm.rank + 1) % size, (comm.rank - 1) % size
        x, y = np.full(nbytes, comm.rank, np.uint8), np.full(nbytes, 99, np.uint8)
        sent = comm.send(x, after, async_op=True)
        assert comm.recv(y, before) == before
        assert sent.wait() is None
        assert sent.source is None
        assert (y == before).all()
        y[:] = 99
        if comm.rank % 2 == 0:
            comm.send(x, after)
            comm.recv(y, before)
        else:
            comm.recv(y, before)
            comm.send(x, after)
        assert (y == before).all()

    run(world, program)


@everywhere
def test_tags_sources_and_order(world: str) -> None:
    size = WORLDS[world][0]

    def program(comm):
        after, before = (comm.rank + 1) % size, (comm.rank - 1) % size
        largest = 2**31 - 1
        works = [
            comm.send(np.full(elems, number, np.int16), after, tag, async_op=True)
            for number, (elems, tag) in enumerate([(3, 0), (3, largest), (5000, 0), (3, 0), (5000, largest)])
        ]
        room = np.zeros(5000, np.int16)
        for number, elems, src, tag in (
            (1, 3, before, largest), (0, 3, None, 0), (4, 5000, None, largest), (2, 5000, before, 0), (3, 3, before, 0),
        ):  # fmt: skip
            assert comm.recv(room[:elems], src, tag) == before
            assert (room[:elems] == number).all(), number
        for work in works:
            work.wait()

    run(world, program)


@pytest.mark.parametrize("transport", ["shm", "slotted"])
def test_containers_and_types(transport: str) -> None:
    torch = pytest.importorskip("torch")

    def program(comm):
        if comm.rank == 0:
            for dtype in DTYPES.values():
                comm.send(np.arange(100).astype(dtype), 1)
            frozen = np.arange(2000.0)
            frozen.flags.writeable = False
            comm.send(frozen, 1)
            comm.send(torch.arange(5000, dtype=torch.float32).to(torch.bfloat16), 1)
            comm.send([np.ones(3000), np.full((2, 2), 2.0)], 1)
            comm.send(np.array(3.5), 1)
            return
        for dtype in DTYPES.values():
            room = np.zeros(100, dtype)
            comm.recv(room, 0)
            assert (room == np.arange(100).astype(dtype)).all()
        room = np.zeros((2, 1000))
        comm.recv(room, 0)
        assert (room.reshape(-1) == np.arange(2000.0)).all()
        room = np.zeros(5000, ml_dtypes.bfloat16)
        comm.recv(room, 0)
        assert (room == np.arange(5000).astype(ml_dtypes.bfloat16)).all()
        several = [torch.zeros(3, dtype=torch.float64), torch.zeros(3001, dtype=torch.float64)]
        comm.recv(several, 0)
        assert several[0].tolist() == [1.0] * 3
        assert several[1].tolist() == [1.0] * 2997 + [2.0] * 4
        scalar = np.array(0.0)
        comm.recv(scalar, 0)
        assert scalar == 3.5

    run_ranks(2, program, transport=transport)


def test_a_huge_message_arrives() -> None:
    def program(comm):
        x = np.zeros(200_000_003, np.uint8)
        if comm.rank == 0:
            x[::1001] = 7
            comm.send(x, 1)
        else:
            comm.recv(x, 0)
            assert (x[::1001] == 7).all()
            assert int(x.sum()) == 7 * len(x[::1001])

    run_ranks(2, program, transport="shm")


@pytest.mark.parametrize("elems", [0, 10, 100_000])
def test_a_synchronous_send_to_oneself_copies(elems: int) -> None:
    def program(comm):
        x, room = np.full(elems, 3.0), np.zeros(elems)
        comm.send(x, comm.rank)
        x[:] = 4
        assert comm.recv(room) == comm.rank
        assert (room == 3).all()

    for transport in ("shm", "slotted"):
        run_ranks(2, program, transport=transport)


def test_the_result_of_a_future_is_the_source() -> None:
    def program(comm):
        sent = comm.send(np.ones(3), (comm.rank + 1) % 2, async_op=True)
        got = comm.recv(np.zeros(3), async_op=True)
        assert got.result() == got.as_future().result(TIMEOUT_S) == (comm.rank + 1) % 2
        assert sent.as_future().result(TIMEOUT_S) is None

    run_ranks(2, program, transport="slotted")


def test_the_functions_of_the_module(monkeypatch) -> None:
    def program(comm):
        return None

    with detcoll.init("shm") as comm:
        work = detcoll.recv(np.zeros(3), async_op=True)
        assert detcoll.send(np.ones(3), 0) is None
        assert work.wait() == 0
        detcoll.send(np.ones(3), 0, 7, True)
        assert detcoll.recv(np.zeros(3), 0, 7) == 0
    assert not comm.usable


# Beside other calls.


@everywhere
def test_groups_have_messages_of_their_own(world: str) -> None:
    size = WORLDS[world][0]

    def program(comm):
        back = comm.group(range(size - 1, -1, -1))
        dst = size - 1 - comm.rank  # the same process in both
        works = [comm.send(np.full(2000, 1.0), comm.rank, async_op=True)]
        works.append(back.send(np.full(2000, 2.0), dst, async_op=True))
        room = np.zeros(2000)
        assert back.recv(room) == dst
        assert (room == 2).all()
        assert comm.recv(room) == comm.rank
        assert (room == 1).all()
        for work in works:
            work.wait()
        back.close()
        with pytest.raises(Closed):
            back.send(room, 0)

    run(world, program)


@pytest.mark.parametrize("world", ["shm 3", "slotted 3", "slotted 1+2+2", "memory 3"])
def test_calls_on_the_same_memory_run_in_their_order(world: str) -> None:
    size = WORLDS[world][0]

    def program(comm):
        x, y = np.full(50_000, comm.rank + 1, np.float32), np.zeros(50_000, np.float32)
        works = [comm.all_reduce(x, async_op=True)]
        works.append(comm.send(x, (comm.rank + 1) % size, async_op=True))
        works.append(comm.recv(y, (comm.rank - 1) % size, async_op=True))
        works.append(comm.all_reduce(y, op="max", async_op=True))
        for work in works:
            work.wait()
        assert (y == sum(range(1, size + 1))).all()

    run(world, program)


@pytest.mark.parametrize("world", ["shm 3", "slotted 3", "slotted 1+2+2", "memory 3"])
def test_messages_wait_for_no_collective_and_collectives_for_no_message(world: str) -> None:
    size = WORLDS[world][0]

    def program(comm):
        waits = comm.recv(np.zeros(10), None, 9, async_op=True)
        x = np.ones(1000)
        comm.all_reduce(x)
        assert (x == size).all()
        if comm.rank == 0:  # the others are in a barrier until they have got their message
            for peer in range(1, size):
                comm.recv(np.zeros(1), peer)
            comm.barrier()
        else:
            barrier = comm.barrier(async_op=True)
            comm.send(np.zeros(1), 0)
            barrier.wait()
        assert not waits.done()
        comm.barrier()
        comm.send(np.zeros(10), (comm.rank + 1) % size, 9)
        waits.wait()

    run(world, program)


@pytest.mark.parametrize("world", ["shm 3", "slotted 3", "mixed 2+1", "memory 3"])
def test_more_messages_than_may_wait_arrive_at_last(world: str) -> None:
    count = LARGEST_EAGER + 300

    def program(comm):
        if comm.rank == 0:
            works = [comm.send(pattern(0, 1, at, at % 1025), 1, at % 5, async_op=True) for at in range(count)]
            comm.send(np.ones(1), 1, 77)
            for work in works:
                work.wait()
        elif comm.rank == 1:
            comm.recv(np.zeros(1), 0, 77)
            x = np.ones(100_000, np.float32)
            for tag in (4, 2, 0, 1, 3):
                for at in range(tag, count, 5):
                    room = np.zeros(at % 1025, np.int32)
                    comm.recv(room, 0, tag)
                    assert room.tobytes() == pattern(0, 1, at, room.size).tobytes()
        x = np.ones(100_000, np.float32)
        comm.all_reduce(x)
        assert (x == comm.size).all()

    run(world, program)


PROCESSES = [
    ("shm", 3), ("slotted", 3), ("mpi", 3),
    pytest.param("gloo", 2, marks=pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")),
]  # fmt: skip


@pytest.mark.timeout(200)  # a busy host takes most of a minute to import torch in each rank
@pytest.mark.parametrize(("transport", "size"), PROCESSES)
def test_threads_and_groups_in_processes(request, transport: str, size: int) -> None:
    if transport == "mpi":
        start = partial(launch, launcher=[*request.getfixturevalue("mpiexec"), "-n", str(size)])
    else:
        start = partial(launch_forked, modules=TORCH if transport == "gloo" else PLAIN)
    ended = start(size, "messages.py", "together", transport, 3, 100_000, timeout_s=150)
    assert ended.code == 0, ended.err
    assert ended.said == {rank: [transport] for rank in range(size)}


# What goes wrong.


BAD_CALLS: dict[str, Callable[[Communicator], object]] = {
    "dst=3 must be a rank from 0 to 2": lambda comm: comm.send(np.ones(1), 3),
    "dst=-1 must be": lambda comm: comm.send(np.ones(1), -1),
    "dst=True must be": lambda comm: comm.send(np.ones(1), True),
    "dst=None must be": lambda comm: comm.send(np.ones(1), None),
    "src='0' must be": lambda comm: comm.recv(np.ones(1), "0"),
    "src=3 must be": lambda comm: comm.recv(np.ones(1), 3),
    "tag=-1 must be a whole number from 0 to 2147483647": lambda comm: comm.send(np.ones(1), 1, -1),
    "tag=2147483648 must be": lambda comm: comm.recv(np.ones(1), 1, 2**31),
    "tag=1.0 must be": lambda comm: comm.recv(np.ones(1), 1, 1.0),
    "timeout=0 must be": lambda comm: comm.recv(np.ones(1), 1, timeout=0),
    "timeout='1' must be": lambda comm: comm.send(np.ones(1), 1, timeout="1"),
    "name=5 must be": lambda comm: comm.send(np.ones(1), 1, name=5),
    "x=3.0 is a scalar": lambda comm: comm.send(3.0, 1),
    "x is read-only": lambda comm: comm.recv(np.frombuffer(b"12345678", np.float64), 1),
    "contiguous": lambda comm: comm.send(np.ones((4, 4))[:, 1], 1),
}


@pytest.mark.parametrize("text", BAD_CALLS)
def test_what_is_refused_ends_nothing(text: str) -> None:
    def program(comm):
        if comm.rank == 0:
            with pytest.raises(UsageError, match=text):
                BAD_CALLS[text](comm)
            comm.send(np.ones(5000), 1)
        elif comm.rank == 1:
            comm.recv(np.ones(5000), 0)
        comm.barrier()

    run_ranks(3, program, transport="shm")


@pytest.mark.parametrize("world", ["shm 3", "slotted 3", "slotted 1+2+2", "memory 3"])
@pytest.mark.parametrize(
    ("elems", "dtype"), [(4, np.float32), (3, np.int32), (100_000, np.float32), (100_001, np.int32)]
)
def test_messages_that_do_not_fit_raise_on_both_sides(world: str, elems: int, dtype: type) -> None:
    sent = 3 if elems < 10 else 100_001
    size, transport, topology = WORLDS[world]

    def program(comm):
        if comm.rank == 0:
            waits = comm.recv(np.ones(1), 1, async_op=True)
            comm.send(np.ones(sent, np.float32), 1, 6, async_op=True)
            waits.wait()
        elif comm.rank == 1:
            comm.recv(np.ones(elems, dtype), 0, 6)
        elif comm.rank == 2:
            comm.recv(np.ones(1), 0)

    for answer in attempt(size, program, transport=transport, topology=topology, stay=True)[:3]:
        assert isinstance(answer, PlanMismatch), answer
        assert f"rank 0 called send to rank 1 of {sent} float32, tag 6" in str(answer)
        assert f"rank 1 called recv from rank 0 of {elems} {np.dtype(dtype).name}, tag 6" in str(answer)


@pytest.mark.parametrize("world", ["shm 3", "slotted 3", "memory 3"])
def test_a_mismatch_ends_no_other_group(world: str) -> None:
    def program(comm):
        part = comm.group([0, 1]) if comm.rank < 2 else None
        if part is not None:
            with pytest.raises(PlanMismatch):
                part.send(np.ones(9000), 1) if comm.rank == 0 else part.recv(np.ones(9001), 0)
            with pytest.raises(Closed, match="the group has ended"):
                part.send(np.ones(1), 0)
        comm.send(np.ones(3), (comm.rank + 1) % 3)
        comm.recv(np.ones(3))
        comm.barrier()

    run(world, program)


@pytest.mark.parametrize("world", ["shm 3", "slotted 3", "memory 3"])
def test_what_nobody_sends_or_takes_is_missed_by_name(world: str) -> None:
    def program(comm):
        part = comm.group([2, 0, 1], name="part")
        comm.barrier()
        if comm.rank == 0:  # rank 1 of the part
            with pytest.raises(DeadlineMissed, match="rank 2 has not sent tag 7") as raised:
                part.recv(np.ones(5), 0, 7, timeout=0.3)
            assert "recv from rank 2 of 5 float64, tag 7 of group 'part' was not finished after 0.3 s" in str(
                raised.value
            )
        elif comm.rank == 1:
            with pytest.raises(DeadlineMissed, match=r"rank 0 gave up: DeadlineMissed|rank 0 gave up"):
                part.recv(np.ones(5))
        comm.barrier()
        if comm.rank == 0:
            with pytest.raises(DeadlineMissed, match="rank 1 has not received tag 8"):
                comm.send(np.ones(5000), 1, 8, timeout=0.3)

    run(world, program)


def test_messages_end_with_the_native_collectives_of_their_group() -> None:
    def program(comm):
        waits = comm.recv(np.zeros(1), 2, 3, async_op=True) if comm.rank < 2 else None
        comm.barrier()
        if comm.rank == 2:
            raise KeyError("rank 2 makes no call")
        with pytest.raises(TransportError):
            comm.all_reduce(np.ones(5), timeout=5)
        assert isinstance(waits.exception(TIMEOUT_S), TransportError)

    answers = attempt(3, program, transport="shm")
    assert isinstance(answers[2], KeyError)
    assert answers[:2] == [None, None]


@pytest.mark.parametrize("late", [0, 1])
def test_a_late_native_collective_ends_messages(late: int) -> None:
    """Rank 1 is not in the all-reduce, so rank 0 gives the world up, and messages of both end."""

    def program(comm):
        waits = comm.recv(np.zeros(1), 1 - comm.rank, 3, async_op=True)
        comm.barrier()
        if comm.rank == late:
            assert isinstance(waits.exception(TIMEOUT_S), DeadlineMissed)
            return
        with pytest.raises(DeadlineMissed):
            comm.all_reduce(np.ones(5), timeout=0.3)
        assert isinstance(waits.exception(TIMEOUT_S), DeadlineMissed)

    run_ranks(2, program, transport="shm")


@pytest.mark.parametrize("transport", ["shm", "slotted"])
def test_messages_wait_no_longer_than_the_timeout_of_the_group(transport: str) -> None:
    def program(comm):
        give_up_after(comm, 0.3)
        if comm.rank == 0:
            comm.recv(np.zeros(1), 1, 3)
        else:
            comm.recv(np.zeros(1), 0, 3)

    for answer in attempt(2, program, transport=transport, stay=True):
        assert isinstance(answer, DeadlineMissed)


@pytest.mark.parametrize("transport", ["shm", "slotted"])
def test_a_killed_peer_ends_its_messages(transport: str) -> None:
    ended = launch_forked(3, "messages.py", "killed", transport)
    assert ended.code == -signal.SIGKILL
    assert sorted(ended.said) == [0, 1]
    for (said,) in ended.said.values():
        assert len(said) == 3
        assert all(text.startswith("PeerLost") and "rank 2" in text for text in said), said


def test_a_receive_that_ends_as_the_progress_thread_fails_has_its_message() -> None:
    ended = []

    def program(comm):
        if comm.rank == 0:
            comm.send(np.arange(8, dtype=np.uint8), 1, tag=1)
            comm.send(np.ones(1, np.uint8), 1, tag=2)
            return
        x = np.zeros(8, np.uint8)
        comm.recv(np.zeros(1, np.uint8), 0, tag=2)
        is_called = threading.Event()

        def fail(now_ns: int) -> None:
            is_called.wait(TIMEOUT_S)
            raise RuntimeError("broken")

        comm._caller.job.loop.post(fail)
        work = comm.recv(x, 0, tag=1, async_op=True)
        is_called.set()
        ended.append((work.exception(TIMEOUT_S), x))

    attempt(2, program, transport="memory")
    [(error, x)] = ended
    assert isinstance(error, TransportError) or x.tolist() == list(range(8))


@pytest.mark.parametrize("transport", ["shm", "slotted"])
def test_an_interrupted_wait_leaves_the_message_pending(transport: str) -> None:
    ended = launch_forked(2, "messages.py", "interrupted", transport)
    assert (ended.code, ended.said) == (0, {0: [[1, 50_000.0]]}), ended.err


@pytest.mark.parametrize("transport", ["shm", "slotted"])
def test_finalize_with_a_pending_message_fails(transport: str) -> None:
    def program(comm):
        if comm.rank == 0:
            work = comm.recv(np.zeros(1), 1, async_op=True)
            with pytest.raises(TransportError):
                comm.finalize(0.3)
            assert isinstance(work.exception(), TransportError)
            with pytest.raises(Closed):
                comm.send(np.zeros(1), 1)

    assert attempt(2, program, transport=transport)[0] is None


@pytest.mark.parametrize("transport", ["shm", "slotted"])
def test_flight_records_tell_who_waits_for_whom(transport: str) -> None:
    def program(comm):
        after, before = (comm.rank + 1) % 3, (comm.rank - 1) % 3
        work = comm.recv(np.zeros(3), after, 11, async_op=True, name="halo")
        comm._job.loop.ask(lambda now_ns: None)  # it has taken the call in
        record = comm._job.describe()
        comm._job.session.exchange("told", b"", comm._deadline())
        comm.send(np.zeros(3), before, 11, name="halo")
        work.wait()
        return record

    records = run_ranks(3, program, transport=transport)
    for rank, record in enumerate(records):
        after = (rank + 1) % 3
        (stand,) = [stand for stand in stands([record]) if stand.group == "world"]
        assert stand.doing == f"recv from rank {after} of 3 float64, tag 11 (halo): rank {after} has not sent tag 11"
        assert stand.waits_for == (after,)
    (told,) = findings(records[:1])[1:]
    assert "others wait for rank 1, of which there is no record" in told
