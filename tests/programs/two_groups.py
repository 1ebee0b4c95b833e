"""Collectives of two groups from two threads until something ends them; one rank ends itself at a chosen event.

Usage: two_groups.py TRANSPORT VICTIM EVENT HOW; HOW is ``kill``, ``freeze``, ``leave`` or ``nothing``. The victim does
it when its engine, or the transport's own collectives, note the EVENT-th event, so any phase of a call is met. Each
rank that ends by an error prints a line of JSON: what each thread was told, and what the rank left behind.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
from typing import Any

import numpy as np

import detcoll
from detcoll.communicator import Communicator
from detcoll.runtime.recorder import Recorder

transport, victim, at, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
TIMEOUT_S = 2.0
LARGEST_CALLS = 3_000


class Ending(Recorder):
    """A recorder that ends this process when it has noted so many events."""

    left = at

    def note(self, *arguments: Any, **named: Any) -> None:
        """Count an event."""
        super().note(*arguments, **named)
        Ending.left -= 1
        if Ending.left == 0 and how == "leave":
            os._exit(0)
        elif Ending.left == 0:
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)


told: dict[str, tuple[str, str]] = {}


def serve(name: str, group: Communicator, elems: int) -> None:
    """Reduce and broadcast until an error comes."""
    x = np.ones(elems, np.float32)
    try:
        for number in range(LARGEST_CALLS):
            if number % 3 == 2:
                group.broadcast(x, root=number % group.size)
            else:
                group.all_reduce(x, op="max")
    except detcoll.DetcollError as error:
        told[name] = type(error).__name__, str(error)


comm = detcoll.init(transport, timeout=20)
part = comm.across if len(comm.topology.sites) > 1 else comm.split(0)
comm.barrier()
comm.timeout = part.timeout = TIMEOUT_S
if comm.rank == victim and how != "nothing":
    ending = Ending()
    comm._job.loop.engine.recorder = ending
    if comm._job.native is not None:
        comm._job.native._recorder = ending
begun = time.monotonic()
threads = [
    threading.Thread(target=serve, args=("world", comm, 30_000)),
    threading.Thread(target=serve, args=("part", part, 70_000)),
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
took_s = time.monotonic() - begun
with contextlib.suppress(detcoll.DetcollError):
    detcoll.finalize(3.0)
del threads
gc.collect()
names = []
for number in os.listdir("/proc/self/fd"):
    with contextlib.suppress(OSError):
        names.append(os.readlink(f"/proc/self/fd/{number}"))
left = [name for name in names if name.startswith(("socket:", "/memfd:", "/dev/shm", "anon_inode"))]
left += [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
print(json.dumps({"rank": comm.rank, "told": told, "took_s": took_s, "left": left}), flush=True)
