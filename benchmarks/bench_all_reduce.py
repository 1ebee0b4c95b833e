"""All-reduce of float32, in place: one call at a time, and a gradient of eight buckets under way together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import detcoll
from detcoll.bench.verification import expected_all_reduce, fill, require_equal

FLOAT32 = np.dtype(np.float32)
BUCKETS = 8


class _Values:
    """What goes in, what must come out, and the array between."""

    def __init__(self, comm: detcoll.Communicator, nbytes: int) -> None:
        self._what = f"all_reduce of {nbytes} bytes, rank {comm.rank}"
        self._given = np.zeros(nbytes // 4, FLOAT32)
        fill(self._given, comm.rank, comm.size)
        self._expected = expected_all_reduce(self._given.size, FLOAT32, comm.size)
        self.array = self._given.copy()

    def prepare(self) -> None:
        np.copyto(self.array, self._given)

    def verify(self) -> None:
        require_equal(self.array, self._expected, self._what)


def bench_all_reduce(time_calls: Callable[..., None], comm: detcoll.Communicator, nbytes: int) -> None:
    values = _Values(comm, nbytes)

    def call() -> None:
        comm.all_reduce(values.array)

    time_calls("all_reduce", nbytes, call, values.prepare, values.verify)


def bench_all_reduce_in_buckets(
    benchmark: Any, time_calls: Callable[..., None], comm: detcoll.Communicator, nbytes: int
) -> None:
    values = _Values(comm, nbytes)
    parts = [part for part in np.array_split(values.array, BUCKETS) if part.size]
    benchmark.extra_info["buckets"] = len(parts)

    def call() -> None:
        for work in [comm.all_reduce(part, async_op=True) for part in parts]:
            work.wait()

    time_calls("all_reduce", nbytes, call, values.prepare, values.verify)
