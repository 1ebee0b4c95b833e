"""Collectives of two groups from two threads until something ends them; one rank ends itself at a chosen event.

Usage: two_groups.py TRANSPORT VICTIM EVENT HOW TIMEOUT_S NOTE [PLUG PORT]; HOW is ``kill``, ``freeze``, ``leave`` or
``cut``. The victim does it when its engine, or the transport's own collectives, note the EVENT-th event, so any phase
of a call is met, and writes the time into the file NOTE. PLUG and PORT are what `apart.py` adds. Each rank prints a
line of JSON: what each thread was told and when, and what the rank left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from leaving import left_behind

import detcoll
from detcoll.communicator import Communicator
from detcoll.runtime.recorder import Recorder

transport, victim, at, how, timeout_s, note = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:7]
SIOCSIFFLAGS = 0x8914
plug = socket.socket(fileno=int(sys.argv[7])) if len(sys.argv) > 7 else socket.socket()


def unplug() -> None:
    """Set this rank's port of the switch down: no packet comes or goes from now on."""
    with plug:
        fcntl.ioctl(plug, SIOCSIFFLAGS, struct.pack("16sH22x", sys.argv[8].encode(), 0))


class Ending(Recorder):
    """A recorder that ends this process, or its network, when it has noted so many events."""

    left = at

    def note(self, *arguments: Any, **named: Any) -> None:
        """Count an event."""
        super().note(*arguments, **named)
        Ending.left -= 1
        if Ending.left == 0:
            Path(note).write_text(str(time.monotonic_ns()), encoding="ascii")
            end()


def end() -> None:
    """Do what this rank is to do."""
    if how == "leave":
        os._exit(0)
    elif how == "cut":
        unplug()
    else:
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)


told: dict[str, tuple[str, str, int]] = {}


def serve(name: str, group: Communicator, elems: int) -> None:
    """Reduce and broadcast until an error comes, or the members know that the world has ended and this group goes on.

    The first element tells that, so that all members stop after the same call. Members of a group without the victim
    take their time: until the others give up, they have nothing to do but go on.
    """
    idle_s = 0.0 if victim in group.ranks else 0.05
    x = np.zeros(elems, np.float32)
    try:
        for number in itertools.count():
            time.sleep(idle_s)
            if number % 3 == 2:
                group.broadcast(x, root=number % group.size)
                continue
            x[0] = name != "world" and "world" in told
            group.all_reduce(x, op="max")
            if x[0]:
                return
    except detcoll.DetcollError as error:
        told[name] = type(error).__name__, str(error), time.monotonic_ns()


comm = detcoll.init(transport, timeout=20)
part = comm.across if len(comm.topology.sites) > 1 else comm.split(0)
comm.barrier()
comm.timeout = part.timeout = float(timeout_s)
if comm.rank == victim:
    comm._job.recorder.note = Ending().note  # type: ignore[method-assign]
else:
    plug.close()
threads = [
    threading.Thread(target=serve, args=("world", comm, 30_000)),
    threading.Thread(target=serve, args=("part", part, 70_000)),
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
with contextlib.suppress(detcoll.DetcollError):
    detcoll.finalize(20.0)
del threads
record = {"rank": comm.rank, "told": told, "left": left_behind()}
os.write(1, f"{json.dumps(record)}\n".encode())  # whole, whoever prints at the same time
