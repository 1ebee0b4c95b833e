"""What ranks do in tests of faults that were mended: ``regressions.py NAME [ARGUMENT ...]`` runs that function.

Only what detcoll promises to its users is used here, so that the program runs with any version of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from inspect import signature
from types import FrameType

import ml_dtypes
import numpy as np

import detcoll
from detcoll import Communicator, DetcollError

PATIENCE_S = 50.0
"""For what should succeed, also where ranks share a busy host; nothing waits for it to pass."""


def say(comm: Communicator | int, something: object) -> None:
    """Print one line of JSON, whole, whoever prints at the same time."""
    rank = comm if isinstance(comm, int) else comm.rank
    os.write(1, (json.dumps({"rank": rank, "said": something}, default=str) + "\n").encode())


def describe(error: BaseException) -> str:
    """Return an error as its kind and text."""
    return f"{type(error).__name__}: {error}"


def outcome(function: Callable[[], object]) -> str:
    """Return how a call ended."""
    try:
        function()
    except (DetcollError, TypeError) as error:
        return describe(error)
    return "done"


def open_together(transport: str, timeout_s: float) -> Communicator:
    """Open a communicator with a short timeout, which begins to count when all ranks are there."""
    comm = detcoll.init(transport, timeout=PATIENCE_S)
    detcoll.barrier()
    comm.timeout = timeout_s
    return comm


def edge_values(transport: str) -> None:
    """Reduce values that go wrong easily, and tell what came out; see the two functions below."""
    comm = detcoll.init(transport, timeout=PATIENCE_S)
    say(comm, averages())
    say(comm, lost_nans(comm))
    detcoll.finalize()


def averages() -> dict[str, list[float]]:
    """Average numbers close to the largest of their type, and return the results as parts of what is right."""
    results = {}
    for dtype, value in ((np.float16, 40_000), (ml_dtypes.bfloat16, 2.0**127)):
        for count in (1, 37, 100_003):
            x = np.full(count, value).astype(dtype)
            detcoll.all_reduce(x, op="avg")
            results[f"{np.dtype(dtype)} {count}"] = sorted({float(each) / value for each in x})
    return results


def lost_nans(comm: Communicator) -> list[str]:
    """Take minimum and maximum with NaN on one rank after the other, and return where no NaN came out."""
    lost = []
    for op, right in (("min", 1), ("max", comm.size)):
        for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
            for bad in range(comm.size):
                x = np.full(37, comm.rank + 1).astype(dtype)
                x[::2] = np.nan if comm.rank == bad else x[::2]
                detcoll.all_reduce(x, op=op)
                if not np.isnan(x[::2].astype(np.float64)).all():
                    lost.append(f"{op} of {np.dtype(dtype)}, NaN on rank {bad}: {float(x[0])}")
                assert (x[1::2].astype(np.float64) == right).all()
    return lost


def same_memory(transport: str) -> None:
    """Call twice on the same memory, or on memory that overlaps, and count the rounds with a wrong result."""
    comm = detcoll.init(transport, timeout=PATIENCE_S)
    wrong = dict.fromkeys(("broadcast", "twice", "slice", "list"), 0)
    half = 5_000
    for _ in range(10):
        for name in wrong:
            x = np.ones(2 * half, np.float32)
            works = [detcoll.all_reduce(x, async_op=True)]
            if name == "broadcast":
                detcoll.broadcast(x, 0)
            elif name == "twice":
                works.append(detcoll.all_reduce(x, async_op=True))
            elif name == "slice":
                works.append(detcoll.all_reduce(x[half:], async_op=True))
            else:
                works.append(detcoll.all_reduce([x[half:], x[:half]], async_op=True))
            for work in works:
                work.wait()
            first = comm.size ** (2 if name in ("twice", "list") else 1)
            second = comm.size ** (1 if name == "broadcast" else 2)
            wrong[name] += not ((x[:half] == first).all() and (x[half:] == second).all())
    say(comm, wrong)
    detcoll.finalize()


def accepted(**options: object) -> dict[str, object]:
    """Return those of the options that `detcoll.all_reduce` of this version takes."""
    return {name: value for name, value in options.items() if name in signature(detcoll.all_reduce).parameters}


def orders_of_threads(apart: str) -> None:
    """Two threads sum an array each; on rank 1 the other one comes first. Calls have names, or groups of their own."""
    comm = detcoll.init("slotted", timeout=PATIENCE_S)
    arrays = {name: np.full(100, base + comm.rank, np.float32) for name, base in (("weights", 1), ("biases", 100))}
    make = comm.group if apart == "groups" and hasattr(comm, "group") else lambda _: comm
    groups = {name: make(range(comm.size)) for name in arrays}
    called = {name: threading.Event() for name in arrays}
    ends = {}

    def reduce(name: str, earlier: str | None) -> None:
        if earlier is not None:
            called[earlier].wait(PATIENCE_S)
        ends[name] = outcome(lambda: call(name))

    def call(name: str) -> None:
        options = accepted(name=name) if apart == "names" else {}
        try:
            work = groups[name].all_reduce(arrays[name], async_op=True, **options)
        finally:
            called[name].set()
        work.wait()

    first, second = arrays if comm.rank == 0 else reversed(arrays)
    threads = [threading.Thread(target=reduce, args=each) for each in ((first, None), (second, first))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say(comm, [ends, {name: float(array[0]) for name, array in arrays.items()}])
    with contextlib.suppress(DetcollError):
        detcoll.finalize()


def tell(fifo: str) -> None:
    """Tell one rank that waits in `hear`."""
    with open(fifo, "wb", buffering=0) as out:
        out.write(b"!")


def hear(fifo: str, times: int = 1) -> None:
    """Wait until others have told."""
    descriptor = os.open(fifo, os.O_RDWR)  # which never comes to an end
    for _ in range(times):
        os.read(descriptor, 1)
    os.close(descriptor)


def late(fifo: str) -> None:
    """Rank 0 comes to a collective when all others have given it up, in one job after the other."""
    x = np.ones(1000, np.float32)
    calls = {
        "all_reduce": lambda: detcoll.all_reduce(x),
        "barrier": detcoll.barrier,
        "broadcast": lambda: detcoll.broadcast(x, 1),
    }
    for name, call in calls.items():
        comm = open_together("shm", 0.7)
        rank = comm.rank
        if rank == 0:
            hear(fifo, comm.size - 1)
        end = outcome(call)
        if rank:
            tell(fifo)
        say(rank, [name, end])
        with contextlib.suppress(DetcollError):
            detcoll.finalize()


def unknown_kind(transport: str) -> None:
    """Ask about a collective that there is not."""
    comm = detcoll.init(transport, timeout=PATIENCE_S)
    for ask in (comm.algorithm, comm.predict, comm.bound):
        say(comm, outcome(lambda ask=ask: ask("gossip", 8)))
    detcoll.finalize()


def two_calls(timeout_s: str) -> None:
    """Sum twice; between the two calls the test does what it likes."""
    comm = open_together("slotted", float(timeout_s))
    for _ in range(2):
        x = np.ones(1000, np.float32)
        end = outcome(lambda x=x: detcoll.all_reduce(x))
        say(comm, end if end != "done" else float(x.sum()))
        sys.stdin.readline()
    with contextlib.suppress(DetcollError):
        detcoll.finalize()


def many_calls(transport: str, timeout_s: str, calls: str, elems: str) -> None:
    """Make calls that take longer than the timeout, all together, and tell how they ended."""
    comm = open_together(transport, float(timeout_s))
    works = [detcoll.all_reduce(np.ones(int(elems), np.float32), async_op=True) for _ in range(int(calls))]
    say(comm, sorted({outcome(work.wait) for work in works}))
    with contextlib.suppress(DetcollError):
        detcoll.finalize()


def frozen(transport: str) -> None:
    """Rank 0 freezes after a call that all have made; the others tell whom they wait for in the next one."""
    comm = open_together(transport, 2.0)
    detcoll.barrier()
    say(comm, "ready")
    sys.stdin.readline()
    if comm.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    say(comm, outcome(lambda: detcoll.all_reduce(np.ones(1000, np.float32))))


def missing_in_mpi(fifo: str) -> None:
    """Rank 1 leaves a call out until the others have given it up, and then ends the job."""
    comm = open_together("mpi", 1.0)
    detcoll.barrier()
    if comm.rank == 1:
        hear(fifo, comm.size - 1)
        os._exit(3)
    say(comm, outcome(lambda: detcoll.all_reduce(np.ones(1000, np.float32))))
    tell(fifo)
    with contextlib.suppress(DetcollError):
        detcoll.finalize()


def starved(limit: str) -> None:
    """Open a communicator with too few descriptors."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(limit), int(limit)))
    rank = int(os.environ["RANK"])
    try:
        detcoll.init("slotted", timeout=4.0)
    except Exception as error:
        say(rank, describe(error))


def low_limit(soft: str, hard: str) -> None:
    """Sum under a limit of descriptors."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(soft), int(hard)))
    rank = int(os.environ["RANK"])
    say(rank, outcome(lambda: detcoll.init("slotted", timeout=PATIENCE_S).barrier()))
    x = np.ones(1000, np.float32)
    detcoll.all_reduce(x)
    say(rank, float(x[0]))
    detcoll.finalize()


def interrupted(fifo: str) -> None:
    """Rank 0 is interrupted in a collective that rank 1 has not called yet; all tell how calls after it end."""
    comm = open_together("shm", 3.0)
    detcoll.barrier()
    if comm.rank == 0:
        signal.signal(signal.SIGALRM, raise_in_the_transport)
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        try:
            detcoll.all_reduce(np.ones(1000, np.float32))
        except KeyboardInterrupt:
            say(comm, "interrupted")
        signal.setitimer(signal.ITIMER_REAL, 0)
        tell(fifo)
    else:
        hear(fifo)
    for _ in range(2):
        say(comm, outcome(lambda: detcoll.all_reduce(np.ones(1000, np.float32))))
    with contextlib.suppress(DetcollError):
        detcoll.finalize()


def raise_in_the_transport(number: int, frame: FrameType | None) -> None:
    """Interrupt once the main thread is in the code of a transport."""
    while frame is not None:
        if os.sep + "detcoll_" in frame.f_code.co_filename:
            raise KeyboardInterrupt
        frame = frame.f_back


def default_timeout() -> None:
    """Tell how long a job waits that does not say it."""
    comm = detcoll.init()
    given = signature(detcoll.init).parameters["timeout"].default
    say(comm, comm.timeout if given is None else given)
    detcoll.finalize()


def come_alone() -> None:
    """Rank 0 opens a communicator, and no other does."""
    if os.environ["RANK"] == "0":
        say(0, outcome(detcoll.init))


def timeout_of_a_call(fifo: str) -> None:
    """Rank 0 makes a call that the other does not, with a timeout of its own."""
    comm = detcoll.init("slotted", timeout=PATIENCE_S)
    if comm.rank == 0:
        say(comm, outcome(lambda: detcoll.all_reduce(np.ones(1000, np.float32), timeout=0.5)))
        tell(fifo)
    else:
        hear(fifo)
    with contextlib.suppress(DetcollError):
        detcoll.finalize()


def meet() -> None:
    """Open a communicator, wherever the environment says, and sum once."""
    rank = int(os.environ["RANK"])
    x = np.ones(1000, np.float32)

    def sum_once() -> None:
        detcoll.init("slotted", timeout=PATIENCE_S)
        detcoll.all_reduce(x)

    say(rank, outcome(sum_once))
    say(rank, float(x[0]))
    with contextlib.suppress(DetcollError):
        detcoll.finalize()


def alone_in_a_call() -> None:
    """Rank 1 makes a call that rank 0 does not, and both wait for the test in between."""
    comm = open_together("slotted", 1.0)
    say(comm, "ready")
    sys.stdin.readline()
    if comm.rank == 1:
        say(comm, outcome(lambda: detcoll.all_reduce(np.ones(1000, np.float32))))
    sys.stdin.readline()
    with contextlib.suppress(DetcollError):
        detcoll.finalize()


if __name__ == "__main__":
    if "gloo" in sys.argv:
        import torch  # noqa: F401  # which takes long, so before there is a deadline
    globals()[sys.argv[1]](*sys.argv[2:])
