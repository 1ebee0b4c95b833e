"""Broadcast of float32 from rank 0, and the barrier."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import detcoll
from detcoll.bench.verification import expected_broadcast, fill, require_equal

FLOAT32 = np.dtype(np.float32)


def bench_broadcast(time_calls: Callable[..., None], comm: detcoll.Communicator, nbytes: int) -> None:
    given = np.zeros(nbytes // 4, FLOAT32)
    fill(given, comm.rank, comm.size)
    expected = expected_broadcast(given.size, FLOAT32, comm.size, 0)
    array = given.copy()

    def prepare() -> None:
        np.copyto(array, given if comm.rank == 0 else 0)

    def call() -> None:
        comm.broadcast(array, root=0)

    def verify() -> None:
        require_equal(array, expected, f"broadcast of {nbytes} bytes, rank {comm.rank}")

    time_calls("broadcast", nbytes, call, prepare, verify)


@pytest.mark.parametrize("nbytes", ["0 B"], indirect=True)  # so that tables can be grouped by size
def bench_barrier(time_calls: Callable[..., None], comm: detcoll.Communicator, nbytes: int) -> None:
    time_calls("barrier", nbytes, comm.barrier)
