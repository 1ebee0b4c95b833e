"""What ranks of a launched world do in tests of send and recv: ``messages.py NAME [ARGUMENT ...]``.

Each rank prints what it has to say as one line of JSON; see `ranks.Ended.said`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

import numpy as np

import detcoll
from detcoll import Communicator, DetcollError
from detcoll.launch.launchers import read_environment

PATIENCE_S = 50.0
"""For what should succeed, also where ranks share a busy host; nothing waits for it to pass."""


def say(something: object) -> None:
    """Print one line, whole, whoever prints at the same time."""
    rank = read_environment(os.environ).rank
    os.write(1, (json.dumps({"rank": rank, "said": something}, default=str) + "\n").encode())


def pattern(source: int, dst: int, number: int, elems: int) -> np.ndarray:
    """Return values that name their message."""
    return np.random.default_rng([source, dst, number]).integers(0, 2**31, elems, dtype=np.int32)


def exchange(comm: Communicator, tag: int, count: int, largest: int) -> None:
    """Every rank sends messages of all sizes to every rank, itself too, and receives them, named or from any source."""
    draw = np.random.default_rng([tag, 1])
    sizes = [0, 1, 1024, 1025, largest, *(int(size) for size in draw.integers(0, largest, count))]
    rooms = []
    works = [
        comm.send(pattern(comm.rank, peer, number, elems), peer, tag, async_op=True)
        for number, elems in enumerate(sizes)
        for peer in range(comm.size)
    ]
    for number, elems in enumerate(sizes):
        for peer in range(comm.size):
            room = np.full(elems, -1, np.int32)
            rooms.append((number, peer, room, comm.recv(room, peer, tag, async_op=True)))
    for number, peer, room, work in rooms:
        assert work.wait() == work.source == peer
        assert work.tag == tag
        assert room.tobytes() == pattern(peer, comm.rank, number, room.size).tobytes(), (number, peer)
    for work in works:
        work.wait()
    if comm.size > 1:
        gather(comm, tag)


def gather(comm: Communicator, tag: int) -> None:
    """Rank 0 takes a large message of every rank as they come, and answers each."""
    elems = 20_000
    if comm.rank:
        comm.send(np.full(elems, comm.rank, np.float32), 0, tag)
        answer = np.zeros(1, np.int64)
        assert comm.recv(answer, 0, tag) == 0
        assert answer[0] == comm.rank
        return
    come = []
    for _ in range(comm.size - 1):
        room = np.zeros(elems, np.float32)
        source = comm.recv(room, None, tag)
        assert (room == source).all()
        come.append(source)
        comm.send(np.array([source]), source, tag)
    assert sorted(come) == list(range(1, comm.size))


def together(transport: str = "auto", threads: str = "3", largest: str = "300000") -> None:
    """Exchange messages from several threads, on the world and on a group, beside all-reduces of the world."""
    comm = detcoll.init(transport, timeout=PATIENCE_S)
    part = comm.group(range(comm.size - 1, -1, -1), name="part")
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            exchange(comm if number % 2 else part, number, 6, int(largest))
        except BaseException as problem:
            problems.append(problem)

    running = [threading.Thread(target=work, args=(number,)) for number in range(int(threads))]
    for thread in running:
        thread.start()
    for number in range(30):
        x = np.full(3000, comm.rank + number, np.float32)
        comm.all_reduce(x)
        assert (x == sum(range(comm.size)) + comm.size * number).all()
    for thread in running:
        thread.join()
    if problems:
        raise problems[0]
    say(comm.transport)
    detcoll.finalize()


def across(transport: str = "slotted") -> None:
    """Send large and small messages to the other half of the ranks and back, beside all-reduces."""
    comm = detcoll.init(transport, timeout=PATIENCE_S)
    peer = (comm.rank + comm.size // 2) % comm.size
    x, room = np.full(500_000, comm.rank, np.float32), np.zeros(500_000, np.float32)
    z = np.ones(50_000, np.float32)
    works = [comm.send(x, peer, async_op=True), comm.all_reduce(z, async_op=True)]
    works += [comm.send(np.full(size, 3.0), peer, 1, async_op=True) for size in (1, 10, 400, 600)]
    assert comm.recv(room, peer) == peer
    for size in (1, 10, 400, 600):
        small = np.zeros(size)
        comm.recv(small, peer, 1)
        assert (small == 3).all()
    for work in works:
        work.wait()
    assert (room == peer).all()
    assert (z == comm.size).all()
    say(comm.counters().get("slot_misses", 0))
    detcoll.finalize()


def flood(transport: str = "slotted", count: str = "800", nbytes: str = "4096") -> None:
    """Send many small messages to the other half of the ranks, which takes them as they come."""
    comm = detcoll.init(transport, timeout=PATIENCE_S)
    peer = (comm.rank + comm.size // 2) % comm.size
    rooms = [np.zeros(int(nbytes), np.uint8) for _ in range(int(count))]
    works = [comm.recv(room, peer, async_op=True) for room in rooms]
    comm.barrier()
    works += [comm.send(np.full(int(nbytes), at % 251, np.uint8), peer, async_op=True) for at in range(int(count))]
    for work in works:
        work.wait()
    assert all((room == at % 251).all() for at, room in enumerate(rooms))
    say(comm.counters().get("slot_misses", 0))
    detcoll.finalize()


def killed(transport: str) -> None:
    """The last rank dies while others wait for its messages; tell how these ended."""
    comm = detcoll.init(transport, timeout=PATIENCE_S)
    last = comm.size - 1
    room = np.zeros(100_000, np.float32)
    works = []
    if comm.rank < last:
        works = [comm.recv(room, last, 3, async_op=True), comm.recv(np.zeros(1), None, 4, async_op=True)]
        works.append(comm.send(room.copy(), last, 5, async_op=True))
        comm.send(np.zeros(1), last, 6)
    else:
        for peer in range(last):
            comm.recv(np.zeros(1), peer, 6)
        os.kill(os.getpid(), signal.SIGKILL)
    said = []
    for work in works:
        try:
            work.wait()
        except DetcollError as error:
            said.append(f"{type(error).__name__}: {error}")
    say(said)


def interrupted(transport: str) -> None:
    """Rank 0 interrupts its own wait for a message, and takes it afterwards."""
    comm = detcoll.init(transport, timeout=PATIENCE_S)
    if comm.rank == 0:
        room = np.zeros(50_000)
        work = comm.recv(room, 1, async_op=True)
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()  # here, since this thread may not run again before the signal
            work.wait()
        except KeyboardInterrupt:
            comm.send(np.zeros(1), 1)
        source = work.wait()
        timer.join()
        say([source, float(room.sum())])
    else:
        comm.recv(np.zeros(1), 0)
        comm.send(np.ones(50_000), 0)
    comm.barrier()
    detcoll.finalize()


if __name__ == "__main__":
    if "gloo" in sys.argv:
        import torch  # noqa: F401  # which takes long, so before there is a deadline
    globals()[sys.argv[1]](*sys.argv[2:])
