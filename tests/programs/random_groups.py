"""Random all-reduces and broadcasts on three groups from three threads, each held bit for bit against the promise.

The groups: one inside each site, one across, and one overlapping pair (ranks 0 and 3 of four). Every thread serves one
group. Sizes, types, operators and roots are drawn from a seed, the same on every rank.

Usage: random_groups.py COUNT SEED [LARGEST]; COUNT calls in all. Prints the transport and the calls of rank 0.
"""

from __future__ import annotations

import sys
import threading

import numpy as np

import detcoll
from detcoll.communicator import Communicator
from detcoll.fold import reference
from detcoll.testing.values import varied
from detcoll.types import DTYPES, ReduceOp, operators_of

count, seed = int(sys.argv[1]), int(sys.argv[2])
largest = int(sys.argv[3]) if len(sys.argv) > 3 else 20_000
comm = detcoll.init(timeout=60, reproducible=True)
assert comm.size == 4
problems: list[BaseException] = []


def serve(group: Communicator, at: int, calls: int) -> None:
    """Make ``calls`` random calls on a group, some at once."""
    sites = [site.ranks for site in group.topology.sites]
    draw = np.random.default_rng([seed, at, *group.ranks])
    pending: list[tuple] = []
    for number in range(calls):
        dtype = list(DTYPES.values())[draw.integers(len(DTYPES))]
        known = [op for op in ReduceOp if op in operators_of(dtype)]
        op = known[draw.integers(len(known))]
        elems = int(draw.integers(0, 4)) if number % 5 == 0 else int(largest ** draw.random())
        given = [varied(dtype, elems, number, rank) for rank in range(group.size)]
        mine, root = given[group.rank].copy(), int(draw.integers(group.size))
        if draw.random() < 0.7:
            expected = reference(op, given, sites, dtype)
            work = group.all_reduce(mine, op=op, async_op=True)
        else:
            expected = given[root]
            work = group.broadcast(mine, root=root, async_op=True)
        pending.append((work, mine, expected, f"group {group.ranks}, call {number}: {op} {dtype} {elems}"))
        while pending and (draw.random() < 0.6 or number == calls - 1):
            done, got, wanted, name = pending.pop(0)
            done.wait()
            assert got.tobytes() == wanted.tobytes(), f"rank {comm.rank}: {name}"


def guarded(group: Communicator, at: int, calls: int) -> None:
    """Keep what went wrong, so that the program can end with it."""
    try:
        serve(group, at, calls)
    except BaseException as error:
        problems.append(error)


groups = [comm.local, comm.across] + ([comm.group([0, 3], name="pair")] if comm.rank in (0, 3) else [])
threads = [threading.Thread(target=guarded, args=(group, at, count // 3)) for at, group in enumerate(groups)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
if problems:
    raise problems[0]
comm.barrier()
if comm.rank == 0:
    print(comm.transport, count // 3 * 3)
detcoll.finalize()
