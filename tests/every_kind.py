"""Every kind of collective on values that name their rank, for tests and for programs of ranks."""

from __future__ import annotations

import threading

import numpy as np

from detcoll.communicator import Communicator


def every_kind(comm: Communicator) -> None:
    """Call each kind, also with blocks of different sizes, and check the result."""
    size, rank = comm.size, comm.rank
    total = np.full(5, float(sum(range(size))))
    x = np.full(5, float(rank))
    comm.all_reduce(x)
    assert (x == total).all()
    x = np.full(5, float(rank))
    comm.reduce(x, root=size - 1)
    assert (x == (total if rank == size - 1 else rank)).all()
    whole = np.repeat(np.arange(float(size)), 3)
    mine = np.full(3, float(rank))
    assert (comm.all_gather(mine) == whole).all()
    gathered = comm.gather(mine, root=0)
    assert rank != 0 or (gathered == whole).all()
    out = np.empty(3)
    comm.scatter(whole if rank == 0 else None, 0, out)
    assert (out == rank).all()
    assert (comm.reduce_scatter(whole) == size * rank).all()
    assert (comm.all_to_all(np.full(size, float(rank))) == np.arange(float(size))).all()
    counts = list(range(1, size + 1))
    uneven = comm.all_gather(np.full(rank + 1, float(rank)), counts=counts)
    assert (uneven == np.repeat(np.arange(float(size)), counts)).all()
    rows = comm.all_to_all(np.full(size * 2, float(rank)), counts=[2] * size, out_counts=[2] * size)
    assert (rows == np.repeat(np.arange(float(size)), 2)).all()
    comm.barrier()


def from_three_threads(comm: Communicator, rounds: int) -> None:
    """Make calls on three groups that overlap, each from a thread of its own, in no order between groups."""
    groups = [comm.group(ranks, f"{ranks}") if comm.rank in ranks else None for ranks in ([0, 1, 2], [3, 2, 1], [1, 3])]
    errors: list[BaseException] = []

    def serve(group: Communicator) -> None:
        try:
            for number in range(rounds):
                _several(group, number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(group,)) for group in groups if group is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _several(group: Communicator, number: int) -> None:
    """Check a few calls that are under way at once."""
    size, rank = group.size, group.rank
    elems = 1 + 997 * (number % 7)
    x, y = np.full(elems, rank + number), np.full(elems, rank)
    out = np.empty((size, elems), int)
    works = [group.all_reduce(x, async_op=True), group.all_gather(y, out, async_op=True)]
    z = np.full(elems, rank)
    works.append(group.broadcast(z, root=number % size, async_op=True))
    whole = group.reduce_scatter(np.full((size, elems), rank))
    for work in works:
        work.wait()
    total = size * (size - 1) // 2
    assert (x == total + size * number).all()
    assert (out == np.arange(size)[:, None]).all()
    assert (z == number % size).all()
    assert (whole == total).all()
