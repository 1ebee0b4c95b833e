"""What ranks of a launched world do in tests: ``calls.py NAME [ARGUMENT ...]`` runs the function of that name.

Each rank prints what it has to say as lines of JSON; see `ranks.Ended.said`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from leaving import left_behind

import detcoll
from detcoll.errors import DetcollError, TransportUnavailable
from detcoll.launch.launchers import read_environment
from detcoll.testing.values import EDGE_OPS, FLOATS, require_edges, require_types

PATIENCE_S = 50.0
"""For what should succeed, also where ranks share a busy host; nothing waits for it to pass."""


def say(something: object) -> None:
    """Print one line, whole, whoever prints at the same time."""
    rank = read_environment(os.environ).rank
    os.write(1, (json.dumps({"rank": rank, "said": something}, default=str) + "\n").encode())


def describe(error: BaseException) -> list[str]:
    """Return an error as its kind and text."""
    return [type(error).__name__, str(error)]


def small(transport: str = "auto") -> None:
    """Sum once and tell the transport and the result."""
    comm = detcoll.init(transport, timeout=PATIENCE_S)
    x = np.full(50_000, comm.rank + 1, np.float32)
    detcoll.all_reduce(x)
    assert (x == sum(range(1, comm.size + 1))).all()
    say([comm.transport, comm.algorithm("all_reduce", x.nbytes), float(x[0])])
    detcoll.finalize()


def values() -> None:
    """Reduce natively by MPI what goes wrong easily, and every type; tell the algorithm and what went wrong."""
    comm = detcoll.init("mpi", timeout=PATIENCE_S)
    wrong, groups = [], [range(comm.size)]

    def reduce(array, op) -> None:
        comm.all_reduce(array, op=op)

    for name in FLOATS:
        for op in EDGE_OPS:
            try:
                require_edges(
                    reduce, comm.rank, groups, ordered=False, dtype_names=[name], ops=[op], counts=(37, 40_003)
                )
            except AssertionError:
                wrong.append(f"{op.value} of {name}")
    try:
        require_types(reduce, comm.rank, groups, ordered=False)
    except AssertionError as error:
        wrong.append(str(error))
    say([comm.algorithm("all_reduce", 8), wrong])
    detcoll.finalize()


def one_without_mpi4py() -> None:
    """Ask for MPI where one rank does not have it."""
    if read_environment(os.environ).rank == 1:
        sys.modules["mpi4py"] = None  # type: ignore[assignment]
    try:
        detcoll.init("mpi", timeout=PATIENCE_S)
    except TransportUnavailable as error:
        say([describe(error), "mpi4py.MPI" in sys.modules and sys.modules["mpi4py.MPI"].Is_initialized()])


def differ(transport: str) -> None:
    """The last rank calls something else, in job after job, and every rank tells how each ended."""
    ones = np.ones
    for count in (100, 400_000):
        for other in (
            lambda size: detcoll.all_reduce(ones(size + 1, np.float32)),
            lambda size: detcoll.all_reduce(ones(900_000, np.float32)),
            lambda size: detcoll.all_reduce(ones(0, np.float32)),
            lambda size: detcoll.all_reduce(ones(size, np.int32)),
            lambda size: detcoll.all_reduce(ones(size, np.float32), op="max"),
            lambda size: detcoll.broadcast(ones(size, np.float32)),
            lambda size: detcoll.barrier(),
            lambda size: detcoll.all_reduce(ones(size, np.float32), name="weights"),
        ):
            comm = detcoll.init(transport, timeout=PATIENCE_S)
            detcoll.barrier()
            try:
                if comm.rank == comm.size - 1:
                    other(count)
                else:
                    detcoll.all_reduce(ones(count, np.float32))
                say("no error")
            except Exception as error:
                say(describe(error))
            with contextlib.suppress(DetcollError):
                detcoll.finalize()


def freeze_one() -> None:
    """Rank 1 freezes; the others wait for it, small as the array is."""
    comm = detcoll.init("mpi", timeout=6)
    detcoll.barrier()
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        detcoll.all_reduce(np.ones(4, np.float32))
    except detcoll.DetcollError as error:
        say(describe(error))
    detcoll.finalize()


def containers(transport: str) -> None:
    """All collectives of a transport, on several containers."""
    comm = detcoll.init(transport, timeout=PATIENCE_S)
    total = sum(range(1, comm.size + 1))
    for dtype in (np.float32, np.float64, np.int32, np.uint8, ml_dtypes.bfloat16):
        x = np.full((2, 3), comm.rank + 1, dtype)
        detcoll.all_reduce(x)
        assert (x == total).all(), x
    scalar = np.array(comm.rank + 1.0)
    detcoll.all_reduce(scalar, op="avg")
    assert scalar == total / comm.size
    listed = [np.full((4, 2), comm.rank + 1.0, ml_dtypes.bfloat16), np.ones(3, ml_dtypes.bfloat16)]
    detcoll.all_reduce(listed)
    assert (listed[0] == total).all()
    assert (listed[1] == comm.size).all()
    for root in range(comm.size):
        y = np.arange(1000, dtype=np.int64) * (comm.rank == root)
        detcoll.broadcast(y, root=root)
        assert (y == np.arange(1000)).all()
    works = [comm.all_reduce(np.ones(100, np.float32), async_op=True) for _ in range(40)]
    for work in reversed(works):
        work.wait()
    detcoll.barrier()
    say(comm.transport)
    detcoll.finalize()


def killed() -> None:
    """The last rank is killed in the middle of collectives; the others tell what they saw and what is left."""
    comm = detcoll.init(timeout=PATIENCE_S)
    x = np.ones(2_000_000, np.float32)
    begun = time.monotonic()
    try:
        for number in range(10_000):
            if comm.rank == comm.size - 1 and number == 5:
                threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGKILL)).start()
            detcoll.all_reduce(x)
    except detcoll.DetcollError as error:
        took = time.monotonic() - begun
        seen = describe(error)
    with contextlib.suppress(detcoll.DetcollError):
        detcoll.finalize()
    say({"seen": seen, "in_time": took < 25, "left": left_behind()})


def never_calls(timeout: str) -> None:
    """The last rank leaves one collective out and waits until the others have given up."""
    comm = detcoll.init(timeout=float(timeout))
    detcoll.barrier()
    try:
        if comm.rank == comm.size - 1:
            while comm.usable and comm._job.failure(comm._group) is None:
                threading.Event().wait(0.02)
            detcoll.barrier()
        else:
            detcoll.all_reduce(np.ones(100_000, np.float32))
    except detcoll.DetcollError as error:
        say(describe(error))
    detcoll.finalize()


def no_finalize(transport: str) -> None:
    """Rank 0 just returns after the last collective; so do the others."""
    comm = detcoll.init(transport, timeout=PATIENCE_S)
    x = np.ones(10, np.float32)
    detcoll.all_reduce(x)
    say(float(x[0]) == comm.size)


def leaves_early() -> None:
    """Rank 0 exits while the others go on to a collective that needs it."""
    comm = detcoll.init(timeout=PATIENCE_S)
    detcoll.barrier()
    if comm.rank == 0:
        return
    try:
        detcoll.all_reduce(np.ones(10, np.float32))
    except detcoll.DetcollError as error:
        say(describe(error))


def raises() -> None:
    """Rank 1 raises inside the with block, the others are in a collective."""
    try:
        with detcoll.init(timeout=PATIENCE_S) as comm:
            detcoll.barrier()
            if comm.rank == 1:
                raise KeyError("lost the key")
            detcoll.all_reduce(np.ones(10, np.float32))
    except (detcoll.DetcollError, KeyError) as error:
        say(describe(error))


def ends_by_an_exception(transport: str) -> None:
    """Rank 1 ends by an exception that nobody catches; rank 0 only finalizes, and rank 2 calls a collective."""
    comm = detcoll.init(transport, timeout=PATIENCE_S)
    if comm.rank == 1:
        detcoll.barrier()
        raise KeyError("lost the key")
    try:
        detcoll.barrier()  # it may end with rank 1
        if comm.rank == 2:
            detcoll.all_reduce(np.ones(10, np.float32))
        detcoll.finalize()
    except detcoll.DetcollError as error:
        say(describe(error))


def forked() -> None:
    """A child made by fork may not use the communicator; the parent may go on."""
    comm = detcoll.init(timeout=PATIENCE_S)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            comm.barrier()
        except detcoll.DetcollError as error:
            os.write(writing, json.dumps(describe(error)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as told:
        said = json.loads(told.read())
    x = np.ones(3, np.float32)
    comm.all_reduce(x)
    say([*said, float(x[0])])
    detcoll.finalize()


def lifecycle() -> None:
    """Init twice, finalize twice, use after finalize, and init again."""
    errors = []
    comm = detcoll.init(timeout=PATIENCE_S)
    try:
        detcoll.init()
    except detcoll.DetcollError as error:
        errors.append(describe(error))
    detcoll.barrier()
    detcoll.finalize()
    detcoll.finalize()
    comm.finalize()
    for call in (detcoll.barrier, comm.barrier):
        try:
            call()
        except detcoll.DetcollError as error:
            errors.append(describe(error))
    again = detcoll.init(timeout=PATIENCE_S)
    x = np.ones(3, np.float32)
    again.all_reduce(x)
    detcoll.finalize()
    say([errors, float(x[0]), left_behind()])


def open_only(transport: str = "auto", timeout: str = "20") -> None:
    """Open a communicator and tell what came of it."""
    try:
        comm = detcoll.init(transport, timeout=float(timeout))
    except detcoll.DetcollError as error:
        say(describe(error))
        return
    x = np.ones(20_000, np.float32)
    detcoll.all_reduce(x)
    say([comm.transport, float(x[0])])
    detcoll.finalize()


def many_operations(count: str) -> None:
    """Run many small operations and tell by how much memory grew over the last three quarters."""
    detcoll.init(timeout=60)

    def resident_bytes() -> int:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    total = int(count)
    before = 0
    for number in range(total):
        if number == total // 4:
            before = resident_bytes()
        works = [detcoll.all_reduce(np.ones(8, np.float32), async_op=True) for _ in range(8)]
        for work in works:
            work.wait()
    grown = resident_bytes() - before
    detcoll.finalize()
    say(grown)


def shifted() -> None:
    """Sum many times, with the clocks of odd ranks ahead; tell the site's offset and its bound."""
    comm = detcoll.init(timeout=PATIENCE_S)
    total = sum(range(1, comm.size + 1))
    for _ in range(12):
        x = np.full(100_000, comm.rank + 1, np.float32)
        detcoll.all_reduce(x)
        assert (x == total).all()
    now_ns = time.monotonic_ns()
    say([comm._job.site_offset_ns(), comm._job._timekeeper.bound_ns(now_ns), now_ns])
    detcoll.finalize()


def shifted_sites() -> None:
    """Sum many times in sites of two ranks, with the clock of each site ahead of the one before."""
    comm = detcoll.init(timeout=PATIENCE_S)
    total = sum(range(1, comm.size + 1))
    for _ in range(4):
        x = np.full(500_000, comm.rank + 1, np.float32)
        detcoll.all_reduce(x)
        assert (x == total).all()
    keeper = comm._job._timekeeper
    say([comm.calendar.mode.value, comm.calendar.guard_ns, time.monotonic_ns(), keeper.trusted, keeper.arrivals_ns])
    detcoll.finalize()


def asked(folder: str) -> None:
    """Rank 1 does not come to a barrier until doctor has asked both ranks where they stand."""
    comm = detcoll.init(timeout=PATIENCE_S)
    comm.barrier()
    if comm.rank == 0:
        comm.all_reduce(np.ones(10, np.float32))
    else:
        path = Path(folder) / "asked.json"
        command = [sys.executable, "-m", "detcoll", "doctor", "--job", "--json", str(path)]
        records: list[dict] = []
        while not any(group["calls"] for record in records for group in record["groups"]):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            records = [record for record in json.loads(path.read_text()) if record["job"] == comm._job.flight.name]
        path.write_text(json.dumps(sorted(records, key=lambda record: record["rank"])))
        comm.all_reduce(np.ones(10, np.float32))
    detcoll.finalize()


if __name__ == "__main__":
    if "gloo" in sys.argv:
        import torch  # noqa: F401  # which takes long, so before there is a deadline
    globals()[sys.argv[1]](*sys.argv[2:])
