"""Every kind of collective on values that name their rank, for tests and for programs of ranks."""

from __future__ import annotations

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
