"""Random calls of every kind on four groups from as many threads, each held bit for bit against NumPy.

The groups: the world, one inside each site, one across, and one overlapping pair (ranks 0 and 3 of four). Every thread
serves one group. At the end the job must have left no thread, no descriptor, no shared memory, and little memory.

Usage: random_kinds.py COUNT SEED [LARGEST [any | whole]]; COUNT calls in all. With ``whole``, of whole numbers
alone, and in any order of folds, so that transports use all their own collectives. Prints the transport and the calls
of rank 0.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from kinds import drawn, drawn_whole

import detcoll
from detcoll.communicator import Communicator

LARGEST_GROWTH_BYTES = 200 << 20

count, seed = int(sys.argv[1]), int(sys.argv[2])
largest = int(sys.argv[3]) if len(sys.argv) > 3 else 20_000
is_whole = sys.argv[4:] == ["whole"]
before = set(os.listdir("/proc/self/fd"))
comm = detcoll.init(timeout=60, reproducible=not is_whole)
assert comm.size == 4
problems: list[BaseException] = []


def serve(group: Communicator, at: int, calls: int) -> None:
    """Make ``calls`` random calls on a group, some at once."""
    draw = np.random.default_rng([seed, at, *group.ranks])
    pending = []
    for number in range(calls):
        call = (drawn_whole if is_whole else drawn)(draw, group.size, largest)
        try:
            pending.append((call, call.start(group)))
            while pending and (draw.random() < 0.6 or number == calls - 1):
                call, check = pending.pop(0)
                check()
        except BaseException as error:
            error.add_note(f"seed {seed}, group {group.ranks}, rank {group.rank}, call {number}: {call}")
            raise


def guarded(group: Communicator, at: int, calls: int) -> None:
    """Keep what went wrong, so that the program can end with it."""
    try:
        serve(group, at, calls)
    except BaseException as error:
        problems.append(error)
        comm.abort(repr(error))


def resident_bytes() -> int:
    """Return the memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


groups = [comm, comm.local, comm.across] + ([comm.group([0, 3], name="pair")] if comm.rank in (0, 3) else [])


def on_all_groups(calls: int) -> None:
    """Serve every group from a thread of its own."""
    threads = [threading.Thread(target=guarded, args=(group, at, calls)) for at, group in enumerate(groups)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]


on_all_groups(count // 16)
begin_bytes = resident_bytes()
on_all_groups(count // 4 - count // 16)
grown_bytes = resident_bytes() - begin_bytes
assert grown_bytes < LARGEST_GROWTH_BYTES, f"memory grew by {grown_bytes >> 20} MiB"
comm.barrier()
name = comm.transport
if comm.rank == 0:
    print(name, count // 4 * 4, f"{grown_bytes >> 20} MiB", flush=True)
detcoll.finalize()
left = [thread.name for thread in threading.enumerate() if thread.name.startswith("detcoll")]
assert name == "mpi" or not left, f"threads are left: {left}"
sockets = [  # detcoll's own: MPI and Gloo keep theirs until the process ends
    target
    for fd in set(os.listdir("/proc/self/fd")) - before
    if os.path.exists(f"/proc/self/fd/{fd}") and (target := os.readlink(f"/proc/self/fd/{fd}")).startswith("socket")
]
assert name in ("mpi", "gloo") or not sockets, f"sockets are left: {sockets}"
