"""What a test asks of the double of CUDA."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable

from detcoll.device import now
from detcoll.testing.device import StrictDevice
from detcoll.testing.device_streams import Operation, nothing


def until(is_so: Callable[[], object]) -> None:
    """Wait for what another thread does."""
    limit = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < limit
        os.sched_yield()


def own_stream(device: StrictDevice, number: int = 0) -> int:
    """Make a stream, as a program does."""
    with device.on(number):
        return device.stream(number)


def hold(device: StrictDevice, stream: int) -> threading.Event:
    """Let nothing that is queued on a stream from now on happen until the event is set."""
    released = threading.Event()
    device._streams.find(stream, 0).queue.append(Operation(nothing, released.is_set))
    return released


def assert_nothing_left(device: StrictDevice) -> None:
    """Assert that all events are spare and all pinned memory is free."""
    gc.collect()
    spare = [event for events in device._spare_events.values() for event in events]
    assert sorted(spare) == sorted(device._streams._events)
    pool = now._shared.made_pool
    if pool is not None:
        pool._take_back()
        assert all(slab.is_idle for slab in pool._slabs)
        assert not pool.leaked_bytes
