"""Copies between the stages of all ranks and the device that holds this rank's array.

Stages are pinned when the first array on a device comes, and as long as the collectives live. A copy rings no bell, so
whoever waits for one asks again and again, as one does who waits for the caller's own work on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from detcoll.errors import DetcollError
from detcoll.transport import DeviceArray, DeviceCopy
from detcoll_shm.call_layout import Bytes
from detcoll_shm.lockstep import Lockstep
from detcoll_shm.stage import Stage

LONGEST_END_S = 10.0
"""How long a failed collective waits for the copies that it began. A device that works takes milliseconds."""
LOOK_S = 0.0005

_QUEUED = "what its stream on the device held before the call"
_COPIES = "copies to or from its device"


class Transfers:
    """The copies of one rank's collectives. One thread at a time.

    Parameters
    ----------
    lockstep
        How this rank waits.
    stages
        The stages of all ranks.
    """

    def __init__(self, lockstep: Lockstep, stages: Sequence[Stage]) -> None:
        self._lockstep, self._stages = lockstep, stages
        self._under_way: list[DeviceCopy] = []
        self._unpins: list[Callable[[], None]] = []

    def open(self, device: DeviceArray) -> None:
        """Wait until copies of a call may begin, with stages that are pinned.

        Raises
        ------
        DeviceError
            If the device is of no use any more.
        DeadlineMissed, PeerLost, TransportError, Closed
            See `Lockstep.await_device`.
        """
        for stage in self._stages[len(self._unpins) :]:
            self._unpins.append(device.pin(stage.chunks))
        self._lockstep.await_device(device.is_ready, _QUEUED)

    def begin(self, device: DeviceArray, at: int, host: Bytes, *, to_device: bool) -> None:
        """Begin to copy as many bytes as ``host`` has, those from ``at`` on of the array."""
        self._under_way.append(device.begin(at, at + host.size, host, to_device=to_device))

    def settle(self) -> None:
        """Return once all copies are past.

        Raises
        ------
        DeviceError
            If one failed.
        DeadlineMissed, PeerLost, TransportError, Closed
            See `Lockstep.await_device`.
        """
        under_way = self._under_way
        while under_way:
            copy = under_way[0]
            self._lockstep.await_device(copy.is_past, _COPIES)
            if copy.error is not None:
                raise copy.error
            del under_way[0]

    def copy(self, device: DeviceArray, at: int, host: Bytes, *, to_device: bool) -> None:
        """Do as `begin` and `settle` do."""
        self.begin(device, at, host, to_device=to_device)
        self.settle()

    def end(self) -> None:
        """Wait, after a failure, until no copy uses memory any more; a device that hangs keeps it for good."""
        limit_s = time.monotonic() + LONGEST_END_S
        while not self._are_past() and time.monotonic() < limit_s:
            time.sleep(LOOK_S)

    def close(self) -> None:
        """Unpin the stages, unless a copy still uses them: those that it may use stay pinned and mapped."""
        if self._are_past():
            while self._unpins:
                self._unpins.pop()()

    def _are_past(self) -> bool:
        self._under_way = [copy for copy in self._under_way if not _is_past(copy)]
        return not self._under_way


def _is_past(copy: DeviceCopy) -> bool:
    try:
        return copy.is_past()
    except DetcollError:
        return False
