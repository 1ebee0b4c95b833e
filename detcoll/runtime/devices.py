"""Where the arrays of a call are, if they are on devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray

from detcoll.device import DeviceBuffer, Gate, copy_now
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
