"""A rank is killed in the middle of every kind of collective: the others are told whom they lost, and leave nothing.

Usage: kinds_ending.py KIND VICTIM. Each kind runs on a group of all ranks in a thread of its own, KIND on the world.
Prints what ended the calls of each kind on this rank.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

import numpy as np

import detcoll
from detcoll.signature import DECLARED

of_world, victim = sys.argv[1], int(sys.argv[2])
comm = detcoll.init(timeout=20)
groups = {kind: comm if kind == of_world else comm.group(range(comm.size), kind) for kind in DECLARED}
told: dict[str, tuple[str, str]] = {}
under_way = threading.Barrier(len(groups))


def call(kind: str, x: np.ndarray, block: np.ndarray) -> detcoll.Work:
    """Begin a call of this kind."""
    group = groups[kind]
    if kind in ("all_gather", "gather"):
        return getattr(group, kind)(block, async_op=True)
    if kind == "scatter":
        return group.scatter(x if group.rank == 0 else None, out=block, async_op=True)
    if kind == "barrier":
        return group.barrier(async_op=True)
    return getattr(group, kind)(x, async_op=True)


def serve(kind: str) -> None:
    """Call until an error comes; the victim ends itself once it has a call of each kind under way."""
    x, block = np.ones(1 << 16, np.float32), np.ones(1 << 14, np.float32)
    try:
        for number in range(400):
            works = [call(kind, x, block), call(kind, x, block)]
            if comm.rank == victim and number == 3:
                works[0].wait()
                under_way.wait()
                os.kill(os.getpid(), signal.SIGKILL)
            for work in works:
                work.wait()
            if kind in ("broadcast", "scatter", "gather", "reduce"):  # so that nobody runs far ahead
                groups[kind].barrier()
    except detcoll.DetcollError as error:
        # A thread that had no call under way at that moment finds its communicator closed.
        cause = error.__cause__ if isinstance(error, detcoll.errors.Closed) and error.__cause__ else error
        told[kind] = type(cause).__name__, str(cause)


threads = [threading.Thread(target=serve, args=(kind,)) for kind in groups]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
detcoll.finalize()
left = [thread.name for thread in threading.enumerate() if thread.name.startswith("detcoll")]
print(json.dumps({"told": told, "left": left}))
