"""How fast copies between a device and pinned memory are, measured once a process.

A copy of some size takes a latency and its bytes over a rate. The latency is that of a copy of a page. The rate is that
of pieces that follow each other, as in a call: the time which some more of them take. Both directions are measured, and
the slower one counts.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from detcoll.device.copies import Copies, DeviceBuffer, Segment
from detcoll.device.cuda import driver
from detcoll.device.driver import MemoryType
from detcoll.device.now import give_copies, pinned_memory, take_copies
from detcoll.errors import DeadlineMissed, DeviceError, TransportUnavailable

PIECE_BYTES, SMALL_BYTES = 4 * 1024**2, 4096
MORE_PIECES, REPEATS = 3, 4
LONGEST_NS = 1_000_000_000
_NOT_IN_USE = 201  # CUDA_ERROR_INVALID_CONTEXT: there is such a device, and this process does not use it


@dataclass(frozen=True, slots=True)
class CopyRates:
    """What a device and pinned memory exchange, one way, and what passes besides until the end of a copy is noticed."""

    bytes_per_s: float
    latency_ns: int


class _Known:
    """What was measured in this process, by device; None where it cannot be."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.lock = threading.Lock()
        self.rates: dict[int, CopyRates | None] = {}


_known = _Known()
os.register_at_fork(after_in_child=_known.forget)


def copy_rates() -> CopyRates | None:
    """Return the rates of the first device that this process uses.

    The first call for a device copies for some milliseconds on the calling thread, and leaves 4 MiB of the device
    allocated, since to free it would wait for all that the device does. Later ones answer at once.

    Returns
    -------
    CopyRates or None
        None if no device is in use, or it cannot be measured: it refuses, is busy for longer than a second, or no
        memory can be pinned.
    """
    try:
        device = _device_in_use()
    except (TransportUnavailable, DeviceError):
        return None
    if device is None:
        return None
    with _known.lock:
        if device not in _known.rates:
            try:
                _known.rates[device] = _measured(device)
            except (DeviceError, DeadlineMissed):
                _known.rates[device] = None
        return _known.rates[device]


def _device_in_use() -> int | None:
    for device in count():
        try:
            with driver().on(device):
                return device
        except DeviceError as error:
            if error.code != _NOT_IN_USE:
                return None
    return None


def _measured(device: int) -> CopyRates | None:
    pieces = 1 + MORE_PIECES
    host = pinned_memory(pieces * PIECE_BYTES, device)
    if driver().memory_type(host.__array_interface__["data"][0]) is not MemoryType.HOST:
        return None
    buffer = DeviceBuffer((Segment(0, PIECE_BYTES, driver().allocate(device, PIECE_BYTES)),), device, None, 1)
    copies = take_copies()

    def took_ns(nbytes: int, pieces: int, to_device: bool) -> int:
        """Return the least time that so many copies took together."""
        parts = [host[at * nbytes : (at + 1) * nbytes] for at in range(pieces)]
        return min(_timed_ns(copies, buffer, parts, to_device) for _ in range(REPEATS))

    ways = (False, True)
    try:
        latency_ns = max(took_ns(SMALL_BYTES, 1, way) for way in ways)
        more_ns = max(took_ns(PIECE_BYTES, pieces, way) - took_ns(PIECE_BYTES, 1, way) for way in ways)
    finally:
        give_copies(copies)
    return CopyRates(MORE_PIECES * PIECE_BYTES / max(more_ns, 1) * 1e9, latency_ns)


def _timed_ns(copies: Copies, buffer: DeviceBuffer, parts: Sequence[NDArray[np.uint8]], to_device: bool) -> int:
    """Return how long it takes to copy each part from or to the beginning of the buffer."""
    begun_ns = time.monotonic_ns()
    begun = [copies.begin(buffer, 0, part.nbytes, part, to_device) for part in parts]
    while not all(copy.is_over for copy in begun):
        if time.monotonic_ns() > begun_ns + LONGEST_NS:
            raise DeadlineMissed(f"cuda:{buffer.device} did not end copies of {PIECE_BYTES} bytes within 1 s")
        time.sleep(0)  # others get Python's lock
        copies.advance()
    took_ns = time.monotonic_ns() - begun_ns
    for copy in begun:
        if copy.error is not None:
            raise copy.error
    return took_ns
