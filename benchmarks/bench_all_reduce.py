"""All-reduce of float32, in place: one call at a time, and a gradient of eight buckets under way together."""

from __future__ import annotations

from typing import Any

import numpy as np

import detcoll
from detcoll.bench.verification import expected_all_reduce, fill, require_equal

FLOAT32 = np.dtype(np.float32)
BUCKETS = 8


class _Values:
    """What goes in, what must come out, and the array between."""

    def __init__(self, comm: detcoll.Communicator, nbytes: int) -> None:
        self.comm = comm
        self.given = np.zeros(nbytes // 4, FLOAT32)
        fill(self.given, comm.rank, comm.size)
        self.expected = expected_all_reduce(self.given.size, FLOAT32, comm.size)
        self.array = self.given.copy()

    def setup(self) -> None:
        np.copyto(self.array, self.given)
        self.comm.barrier()

    def teardown(self) -> None:
        require_equal(self.array, self.expected, f"all_reduce of {self.array.nbytes} bytes, rank {self.comm.rank}")


def bench_all_reduce(benchmark: Any, comm: detcoll.Communicator, nbytes: int, rounds: int) -> None:
    values = _Values(comm, nbytes)
    benchmark.group = f"all_reduce of {nbytes} bytes, {comm.size} ranks"
    benchmark.extra_info.update(bytes=nbytes, ranks=comm.size, algorithm=comm.algorithm("all_reduce", nbytes))

    def call() -> None:
        comm.all_reduce(values.array)

    benchmark.pedantic(call, setup=values.setup, teardown=values.teardown, rounds=rounds, warmup_rounds=2)


def bench_all_reduce_in_buckets(benchmark: Any, comm: detcoll.Communicator, nbytes: int, rounds: int) -> None:
    values = _Values(comm, nbytes)
    parts = [part for part in np.array_split(values.array, BUCKETS) if part.size]
    benchmark.group = f"all_reduce of {nbytes} bytes in {len(parts)} buckets, {comm.size} ranks"
    benchmark.extra_info.update(bytes=nbytes, ranks=comm.size, buckets=len(parts))

    def call() -> None:
        for work in [comm.all_reduce(part, async_op=True) for part in parts]:
            work.wait()

    benchmark.pedantic(call, setup=values.setup, teardown=values.teardown, rounds=rounds, warmup_rounds=2)
