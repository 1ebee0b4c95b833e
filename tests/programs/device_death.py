"""Rank 1 is killed while a copy to a device of rank 0, a double, is under way."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from devices import assert_nothing_left, hold, own_stream, until

import detcoll
from detcoll.device import cuda
from detcoll.testing.device import StrictDevice

comm = detcoll.init(timeout=60)
if comm.rank == 1:
    comm.all_reduce(np.ones(5000), async_op=True)
    comm.recv(np.empty(1), 0)
    os.kill(os.getpid(), signal.SIGKILL)

device = StrictDevice()
device.seeded(1)
cuda._driver = device  # type: ignore[assignment]
held, inner = [], device.to_device


def to_device(device_address: int, host_address: int, nbytes: int, stream: int) -> None:
    held.append(hold(device, stream))
    inner(device_address, host_address, nbytes, stream)


device.to_device = to_device  # type: ignore[method-assign]
x = device.array(np.ones(5000), 0, own_stream(device))
work = comm.all_reduce(x, async_op=True)
until(lambda: held)
comm.send(np.ones(1), 1)
until(lambda: comm._job.failure(comm._group))
for each in held:
    each.set()
error = work.exception(20)
before = device.peek(x)
device.drive()
assert (device.peek(x) == before).all(), "the array was written to after the call had failed"
assert not device.misuses
print(type(error).__name__, flush=True)
del work
assert_nothing_left(device)
print("nothing left", flush=True)
