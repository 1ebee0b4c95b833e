"""Random all-reduces, each held bit for bit against the fold in the promised order.

Sizes, types and operations are drawn from a seed, the same on every rank.

Usage: random_all_reduces.py COUNT SEED [LARGEST]; prints a digest of all results.
"""

from __future__ import annotations

import hashlib
import sys

import numpy as np

import detcoll
from detcoll.fold import reference
from detcoll.testing.values import varied
from detcoll.types import DTYPES, ReduceOp, operators_of

count, seed = int(sys.argv[1]), int(sys.argv[2])
largest = int(sys.argv[3]) if len(sys.argv) > 3 else 20_000
comm = detcoll.init(timeout=30, reproducible=True)
groups = [site.ranks for site in comm.topology.sites]
draw = np.random.default_rng(seed)
hashed = hashlib.blake2b(digest_size=16)
pending = []


def finish(work, mine, expected, name):
    work.wait()
    assert mine.tobytes() == expected.tobytes(), f"rank {comm.rank}: {name}"
    hashed.update(mine.tobytes())


for number in range(count):
    dtype = list(DTYPES.values())[draw.integers(len(DTYPES))]
    known = [op for op in ReduceOp if op in operators_of(dtype)]
    op = known[draw.integers(len(known))]
    elems = int(draw.integers(0, 4)) if number % 5 == 0 else int(largest ** draw.random())
    contributions = [varied(dtype, elems, number, rank) for rank in range(comm.size)]
    expected = reference(op, contributions, groups, dtype)
    mine = contributions[comm.rank].copy()
    work = comm.all_reduce(mine, op=op, async_op=True)
    pending.append((work, mine, expected, f"{number}: {op} {dtype} {elems}"))
    if draw.random() < 0.6:
        while pending:
            finish(*pending.pop(0))
while pending:
    finish(*pending.pop(0))
if comm.rank == 0:
    print(comm.transport, hashed.hexdigest())
detcoll.finalize()
