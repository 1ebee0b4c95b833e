"""A rank that is killed in the middle of a collective: the others are told whom they lost, and leave nothing behind.

Usage: kinds_ending.py KIND VICTIM; prints what ended the calls of this rank.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

import numpy as np

import detcoll

kind, victim = sys.argv[1], int(sys.argv[2])
comm = detcoll.init(timeout=20)
x, block = np.ones(1 << 18, np.float32), np.ones(1 << 16, np.float32)


def call() -> detcoll.Work:
    """Begin a call of this kind."""
    if kind in ("all_gather", "gather"):
        return getattr(comm, kind)(block, async_op=True)
    if kind == "scatter":
        return comm.scatter(x if comm.rank == 0 else None, out=block, async_op=True)
    if kind == "barrier":
        return comm.barrier(async_op=True)
    return getattr(comm, kind)(x, async_op=True)


told = None
try:
    for number in range(400):
        works = [call(), call()]
        if comm.rank == victim and number == 3:
            works[0].wait()
            os.kill(os.getpid(), signal.SIGKILL)
        for work in works:
            work.wait()
        if kind in ("broadcast", "scatter", "gather", "reduce"):  # so that nobody runs far ahead
            comm.barrier()
except detcoll.DetcollError as error:
    told = [type(error).__name__, str(error)]
detcoll.finalize()
left = [thread.name for thread in threading.enumerate() if thread.name.startswith("detcoll")]
print(json.dumps({"told": told, "left": left}))
