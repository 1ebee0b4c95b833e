"""Every kind of collective in the world and in groups, also one that waits, and three from three threads."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import detcoll

sys.path.insert(0, str(Path(__file__).parent.parent))
from every_kind import every_kind, from_three_threads

comm = detcoll.init()
every_kind(comm)
part = comm.split(comm.rank % 2, key=-comm.rank)
every_kind(part)
waiting, going = comm.group(range(comm.size), "waiting"), comm.group(range(comm.size), "going")
x, y = np.ones(1000), np.ones(1000)
work = waiting.all_reduce(x, async_op=True) if comm.rank == 0 else None
for _ in range(5):
    going.all_reduce(y, async_op=True).wait(20)
comm.barrier()
assert work is None or not work.done()
comm.barrier()
(work or waiting.all_reduce(x, async_op=True)).wait(20)
assert (x == comm.size).all()
from_three_threads(comm, 20)
names = {group.algorithm(kind, 12 * 4) for group in (comm, part) for kind in ("all_reduce", "gather", "reduce_scatter")}
part.close()
if comm.rank == 0:
    print(*names)
detcoll.finalize()
