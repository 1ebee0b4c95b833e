"""Compares shared memory with MPI and Gloo on one host, in a plain loop as training has it: fill an array, reduce it.

    mpiexec -n 2 python benchmarks/one_host.py --json one_host.json

There is no barrier between calls. Libraries are called directly, not through detcoll: MPI by mpi4py (whichever MPI the
environment has), Gloo by torch, left out if it is not installed. All take turns on the same processes and arrays in
each of ``--rounds``. A row tells the median over rounds of the time of a call, and how many times as fast as the best
of the others shared memory is. Every result is checked.

``copies`` (two ranks) is no library, but what arrays that lie anywhere cost at least: a rank reads half of the other's
array (process_vm_readv, in steps that stay in cache), adds it to its own, and reads the other half of the result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

import detcoll
from detcoll.measure.host import host_facts
from detcoll.quantities import format_bytes, parse_size_bytes
from detcoll_shm.libc import Span, libc

SCHEMA = "detcoll.one-host/1"
SIZES = "8B,64KiB,256KiB,1MiB,4MiB,64MiB"
LOOP_S = 0.2
"""A round of one library takes about as long, but at least `FEWEST` calls."""
FEWEST = 5
STEP_BYTES = 2**20
COPIES = "copies"

Reduce = Callable[[NDArray[np.float32]], Any]


def libraries(rank: int, size: int, file: str) -> dict[str, Reduce]:
    """Return what reduces an array in place, by name."""
    world = MPI.COMM_WORLD
    found: dict[str, Reduce] = {
        "shm": detcoll.all_reduce,
        MPI.Get_library_version().split()[0]: lambda array: world.Allreduce(MPI.IN_PLACE, array),
    }
    if size == 2:
        found[COPIES] = copies(rank)
    if find_spec("torch") is not None:
        import torch

        torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
        found["Gloo"] = lambda array: torch.distributed.all_reduce(torch.from_numpy(array))
    return found


def copies(rank: int) -> Reduce:
    """Return what does nothing but the least that two ranks have to read and add."""
    world, here, there = MPI.COMM_WORLD, Span(), Span()
    pid, addresses = world.sendrecv(os.getpid(), 1 - rank), dict[int, int]()
    room = np.empty(STEP_BYTES // 4, np.float32)

    def read(into: NDArray[np.float32], address: int) -> None:
        here.base, there.base, here.length = into.ctypes.data, address, into.nbytes
        there.length = into.nbytes
        if libc().process_vm_readv(pid, here, 1, there, 1, 0) != into.nbytes:
            raise SystemExit("process_vm_readv is not allowed between these processes")

    def reduce(array: NDArray[np.float32]) -> None:
        own = array.ctypes.data
        if own not in addresses:
            addresses[own] = world.sendrecv(own, 1 - rank)
        half = array.size // 2
        begin, end = (0, half) if rank == 0 else (half, array.size)
        world.Barrier()
        for at in range(begin, end, room.size):
            part = array[at : min(at + room.size, end)]
            read(room[: part.size], addresses[own] + 4 * at)
            np.add(part, room[: part.size], out=part)
        world.Barrier()
        begin, end = (half, array.size) if rank == 0 else (0, half)
        for at in range(begin, end, room.size):
            read(array[at : min(at + room.size, end)], addresses[own] + 4 * at)
        world.Barrier()

    return reduce


def loop_s(reduce: Reduce, array: NDArray[np.float32], calls: int, size: int) -> float:
    """Return how long a call takes in a loop on the slowest rank."""
    world = MPI.COMM_WORLD
    world.Barrier()
    begun_s = time.perf_counter()
    for _ in range(calls):
        array[:] = 1
        reduce(array)
    took_s = (time.perf_counter() - begun_s) / calls
    if not (array == size).all():
        raise SystemExit(f"wrong sum: {array[:4]}")
    return float(world.allreduce(took_s, MPI.MAX))


def measure(reduces: dict[str, Reduce], nbytes: int, rounds: int, size: int) -> dict[str, float]:
    """Return the median over rounds of the time of a call, by library."""
    array = np.ones(nbytes // 4, np.float32)
    calls = {}
    for name, reduce in reduces.items():
        once_s = min(loop_s(reduce, array, FEWEST, size) for _ in range(2))
        calls[name] = max(int(LOOP_S / once_s), FEWEST)
    times: dict[str, list[float]] = {name: [] for name in reduces}
    for _ in range(rounds):
        for name, reduce in reduces.items():
            times[name].append(loop_s(reduce, array, calls[name], size))
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Measure all sizes; rank 0 prints the table and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", default=SIZES, help="sizes of the array, separated by commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    given = parser.parse_args()
    sizes = [parse_size_bytes(text) for text in given.bytes.split(",")]
    rank, size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    with tempfile.TemporaryDirectory() as folder:
        file = MPI.COMM_WORLD.bcast(f"{folder}/store")
        detcoll.init("shm")
        reduces, rows = libraries(rank, size, file), []
        for nbytes in sizes:
            times = measure(reduces, nbytes, given.rounds, size)
            best = min(took for name, took in times.items() if name not in ("shm", COPIES))
            rows.append({"bytes": nbytes, "ranks": size, "median_s": times, "ratio": best / times["shm"]})
            if rank == 0:
                shown = "  ".join(f"{name} {took * 1e6:10.1f} us" for name, took in times.items())
                print(f"{format_bytes(nbytes):>9}  {shown}  {best / times['shm']:.2f} times the best", flush=True)
        detcoll.finalize()
        MPI.COMM_WORLD.Barrier()
    if rank == 0 and given.json:
        facts = {"schema": SCHEMA, "host": host_facts(), "mpi": MPI.Get_library_version().strip(), "rows": rows}
        given.json.write_text(json.dumps(facts, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
