"""Where the arrays of a call are, if they are on devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detcoll.device import Copies, Copy, DeviceBuffer, Gate, copy_now, driver, give_copies, pins, take_copies
from detcoll.errors import DeviceError
from detcoll.plan.ir import Buffer


class DeviceCopy(NamedTuple):
    """A copy that a call needs: as many elements of ``buffer``, from ``begin`` on, as ``host`` has."""

    buffer: DeviceBuffer
    begin: int
    host: NDArray[Any]
    to_device: bool


@dataclass(frozen=True, slots=True)
class Devices:
    """Where the arrays of a call are on devices, by the buffer of its plan, and what its copies wait for."""

    buffers: Mapping[int, DeviceBuffer]
    gates: Sequence[Gate]

    def load(self, array: NDArray[Any], name: int, deadline_ns: int) -> None:
        """Copy a whole buffer of the plan to the host, once its caller's work before the call is done.

        Raises
        ------
        DeadlineMissed
            If that is not done by ``deadline_ns``.
        DeviceError
            If the device refuses.
        """
        self._wait(deadline_ns)
        copy_now(self.buffers[name], array, to_device=False)

    def store(self, array: NDArray[Any], deadline_ns: int) -> None:
        """Copy the whole output to the device, as `load` does."""
        self._wait(deadline_ns)
        copy_now(self.buffers[Buffer.DEVICE_OUT], array, to_device=True)

    def _wait(self, deadline_ns: int) -> None:
        for gate in self.gates:
            gate.wait(deadline_ns)


class OnDevice:
    """The array of a native call on a device, for transports that copy it themselves; a `DeviceArray` of the SPI.

    Parameters
    ----------
    buffer : DeviceBuffer
        Where it is.
    gates : sequence of Gate
        What its copies wait for.
    """

    def __init__(self, buffer: DeviceBuffer, gates: Sequence[Gate]) -> None:
        self._buffer, self._gates = buffer, gates
        self._copies: Copies | None = None
        self._inside: AbstractContextManager[None] | None = None

    def is_ready(self) -> bool:
        """See `detcoll.transport.DeviceArray.is_ready`."""
        if self._inside is None:  # until the end of the call, which asks the device many times
            self._inside = driver().on(self._buffer.device)
            self._inside.__enter__()
        return all(gate.is_open() for gate in self._gates)

    def begin(self, begin: int, end: int, host: NDArray[np.uint8], *, to_device: bool) -> Copy:
        """See `detcoll.transport.DeviceArray.begin`."""
        if self._copies is None:
            self._copies = take_copies()
        size = self._buffer.itemsize
        return self._copies.begin(self._buffer, begin // size, (end - begin) // size, host, to_device)

    def pin(self, memory: NDArray[np.uint8]) -> Callable[[], None]:
        """See `detcoll.transport.DeviceArray.pin`."""
        return pins().pin(memory, self._buffer.device)

    def release(self) -> None:
        """Give the streams back, when the transport is through with the call, on the thread that carried it out."""
        copies, self._copies = self._copies, None
        if copies is not None:
            give_copies(copies)
        inside, self._inside = self._inside, None
        if inside is not None:
            with suppress(DeviceError):  # then no call of the driver means anything any more
                inside.__exit__(None, None, None)
