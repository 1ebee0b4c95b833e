"""Broadcast of float32 from rank 0, and the barrier."""

from __future__ import annotations

from typing import Any

import numpy as np

import detcoll
from detcoll.bench.verification import expected_broadcast, fill, require_equal

FLOAT32 = np.dtype(np.float32)


def bench_broadcast(benchmark: Any, comm: detcoll.Communicator, nbytes: int, rounds: int) -> None:
    given = np.zeros(nbytes // 4, FLOAT32)
    fill(given, comm.rank, comm.size)
    expected = expected_broadcast(given.size, FLOAT32, comm.size, 0)
    array = given.copy()
    benchmark.group = f"broadcast of {nbytes} bytes, {comm.size} ranks"
    benchmark.extra_info.update(bytes=nbytes, ranks=comm.size, algorithm=comm.algorithm("broadcast", nbytes))

    def setup() -> None:
        np.copyto(array, given if comm.rank == 0 else 0)
        comm.barrier()

    def call() -> None:
        comm.broadcast(array, root=0)

    def teardown() -> None:
        require_equal(array, expected, f"broadcast of {nbytes} bytes, rank {comm.rank}")

    benchmark.pedantic(call, setup=setup, teardown=teardown, rounds=rounds, warmup_rounds=2)


def bench_barrier(benchmark: Any, comm: detcoll.Communicator, rounds: int) -> None:
    benchmark.group = f"barrier, {comm.size} ranks"
    benchmark.pedantic(comm.barrier, rounds=rounds, warmup_rounds=2)
