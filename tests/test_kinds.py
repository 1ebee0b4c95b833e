"""Every kind of collective over every transport: random calls held bit for bit against NumPy.

``TEST_DRAWS`` asks for so many calls on every place instead of a few, ``TEST_SEED`` for another seed. Many calls are
made in several jobs one after another, each of which has the time that a job of any test has.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with contextlib.suppress(ImportError):
    import torch  # noqa: F401

from forked import launch_forked
from kinds import KINDS, Call, drawn, drawn_whole
from ranks import grouped, launch, lines, run_ranks, written

from detcoll.communicator import Communicator
from detcoll.testing import mpi_launcher
from detcoll.topology import Topology
from detcoll.types import DTYPES

DRAWS = int(os.environ.get("TEST_DRAWS", "16"))
SEED = int(os.environ.get("TEST_SEED", "20"))
DRAWS_A_JOB = 100
JOBS = [(SEED + at // DRAWS_A_JOB, min(DRAWS_A_JOB, DRAWS - at)) for at in range(0, DRAWS, DRAWS_A_JOB)]
"""A seed and a number of calls for each job."""
pytestmark = pytest.mark.timeout(120 + DRAWS)

PLACES: dict[str, tuple[str, Topology | None, int]] = {
    "slotted": ("slotted", None, 3),
    "slotted two sites": ("slotted", lines(2, 2, rate_bytes_per_s=1e9), 4),
    "slotted uneven": ("slotted", lines(1, 2, 1, rate_bytes_per_s=1e9), 4),
    "tcp": ("tcp", None, 3),
    "tcp two sites": ("tcp", lines(2, 2, rate_bytes_per_s=1e9), 4),
    "shm": ("shm", None, 4),
    "shm two groups": ("shm", grouped(1, 2), 3),
}
NEEDS_TORCH = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")


def serve(
    comm: Communicator, seed: list[int], calls: int, largest: int, make: Callable[..., Call] = drawn, **fixed: Any
) -> None:
    """Make random calls, some at once."""
    draw = np.random.default_rng([*seed, *comm.ranks])
    pending = []
    for number in range(calls):
        call = make(draw, comm.size, largest, **fixed)
        try:
            pending.append((call, call.start(comm)))
            while pending and (draw.random() < 0.5 or number == calls - 1):
                call, check = pending.pop(0)
                check()
        except Exception as error:
            error.add_note(f"seed {seed}, ranks {comm.ranks}, rank {comm.rank}, call {number}: {call}")
            raise


@pytest.mark.parametrize("place", PLACES)
def test_random_calls_of_the_world_and_of_groups(place: str) -> None:
    on_the_world_and_on_groups(*PLACES[place], drawn)


@NEEDS_TORCH
@pytest.mark.parametrize("is_native", [False, True], ids=["planned", "native"])
def test_random_calls_over_gloo(is_native: bool) -> None:
    """Gloo's own collectives fold in an order of their own, so they get whole numbers."""
    reproducible, make = (None, drawn_whole) if is_native else (True, drawn)
    on_the_world_and_on_groups("gloo", lines(2, 2, rate_bytes_per_s=1e9), 4, make, reproducible=reproducible)


def on_the_world_and_on_groups(
    transport: str, topology: Topology | None, size: int, make: Callable[..., Call], **settings: Any
) -> None:
    def program(comm: Communicator, seed: int, calls: int) -> None:
        groups = [comm, comm.local, comm.across, comm.group([comm.rank], "alone")]
        if comm.rank in (0, comm.size - 1):
            groups.append(comm.group([comm.size - 1, 0], "pair"))
        for at, group in enumerate(groups):
            serve(group, [seed, at], calls if at == 0 else calls // 4, 3000, make)

    for seed, calls in JOBS:
        run_ranks(size, partial(program, seed=seed, calls=calls), transport=transport, topology=topology, **settings)


@pytest.mark.parametrize("place", ["slotted two sites", "tcp", "shm", "shm two groups"])
def test_every_kind_with_every_type(place: str) -> None:
    transport, topology, size = PLACES[place]

    def program(comm: Communicator) -> None:
        for at, kind in enumerate(KINDS):
            for dtype in DTYPES.values():
                serve(comm, [SEED, 100 + at, dtype.num], 1, 60, kind=kind, dtype=dtype)

    run_ranks(size, program, transport=transport, topology=topology)


@pytest.mark.parametrize(
    ("transport", "values"), [("slotted", "any"), ("shm", "any"), ("mpi", "any"), ("mpi", "whole")]
)
def test_random_calls_in_processes(tmp_path: Path, transport: str, values: str) -> None:
    """Groups from threads of one job, of MPI by plans and by its own collectives, which needs processes."""
    start = launch_forked
    if transport == "mpi":
        found = mpi_launcher()
        if find_spec("mpi4py") is None or found is None:
            pytest.skip("mpi4py or mpiexec is not installed")
        start = partial(launch, launcher=[word.format(n=4) for word in found])
    topology = written(lines(2, 2, rate_bytes_per_s=1e9), tmp_path)
    environ = {"DETCOLL_TOPOLOGY": topology, "DETCOLL_TRANSPORT": transport}
    for seed, calls in JOBS:
        ended = start(4, "random_kinds.py", max(80, calls), seed, 2000, values, environ=environ, timeout_s=85)
        assert ended.code == 0, ended.err
        assert ended.out.split()[0] == transport


@pytest.mark.parametrize("place", PLACES)
def test_calls_in_flight_on_one_array_follow_one_another(place: str) -> None:
    """Planned and native ones; each takes what the one before left, in every overlap of input and output."""
    transport, topology, size = PLACES[place]

    def blocks(array: np.ndarray) -> list[np.ndarray]:
        return np.split(array, size)

    def program(comm: Communicator) -> None:
        for n in (3, 20_000):
            whole = np.zeros(size * n, np.int64)
            mine = blocks(whole)[comm.rank]
            mine[:] = comm.rank + 1
            works = [
                comm.all_gather(mine, whole, async_op=True),
                comm.reduce_scatter(whole, mine, async_op=True),
                comm.all_to_all(whole, whole, async_op=True),
                comm.all_reduce(whole, async_op=True),
                comm.scatter(whole, size - 1, mine, async_op=True),
                comm.reduce(whole, 1, async_op=True),
                comm.gather(mine, 0, whole if comm.rank == 0 else None, async_op=True),
                comm.broadcast(whole, 0, async_op=True),
            ]
            for work in works:
                work.wait()
            held = [np.repeat(np.arange(size) + 1, n) for _ in range(size)]
            total = sum(held)
            for rank in range(size):
                blocks(held[rank])[rank][:] = blocks(total)[rank]
            held = [np.concatenate([blocks(each)[rank] for each in held]) for rank in range(size)]
            total = sum(held)  # the all-reduce; the scatter then changes nothing
            held = [total * size if rank == 1 else total for rank in range(size)]
            assert whole.tolist() == np.concatenate([blocks(each)[rank] for rank, each in enumerate(held)]).tolist()

    run_ranks(size, program, transport=transport, topology=topology)


@pytest.mark.parametrize("place", PLACES)
def test_blocks_of_very_different_sizes(place: str) -> None:
    transport, topology, size = PLACES[place]

    def program(comm: Communicator) -> None:
        counts = [700_000, *[1] * (size - 1)]
        gathered = comm.all_gather(np.full(counts[comm.rank], comm.rank, np.float32), counts=counts)
        assert gathered.tobytes() == np.repeat(np.arange(size, dtype=np.float32), counts).tobytes()
        reduced = comm.reduce_scatter(np.ones(sum(counts), np.float32), counts=counts[::-1])
        assert reduced.tobytes() == np.full(counts[::-1][comm.rank], size, np.float32).tobytes()
        matrix = np.add.outer(np.arange(size), np.arange(size))
        matrix[0, -1] = 700_000
        sends, gets = matrix[comm.rank].tolist(), matrix[:, comm.rank].tolist()
        exchanged = comm.all_to_all(np.full(sum(sends), comm.rank, np.float32), None, sends, gets)
        assert exchanged.tobytes() == np.repeat(np.arange(size, dtype=np.float32), gets).tobytes()
        text = "x" * 1_000_000
        assert comm.broadcast_object(text if comm.rank == size - 1 else None, size - 1) == text

    run_ranks(size, program, transport=transport, topology=topology)
