"""Copies between devices and the host that calls under way need: begun in order, and ended when the device says so.

A call's copies, in both directions, begin once the device has done what its caller had queued before the call: what
comes to the host is not there earlier, and what goes to the device might overwrite what is still read. Calls that wait
for their callers hold up no others. Only the progress thread uses this.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from detcoll.device import Copies, Copy, driver
from detcoll.errors import DeviceError
from detcoll.runtime.devices import DeviceCopy
from detcoll.runtime.operation import Operation
from detcoll.runtime.transfer import Transfer

LOOK_NS = 1_000_000
"""How often callers' streams are looked at."""

LONGEST_SETTLING_NS = 10_000_000_000


@dataclass(eq=False, slots=True)
class _Call:
    """Copies that have not begun, in order, by their step, and whether the caller's work before the call is done."""

    steps: deque[tuple[int, DeviceCopy]] = field(default_factory=deque)
    is_open: bool = False


class Copying:
    """The copies of all calls of a rank.

    Parameters
    ----------
    opened : callable
        Called with a call when its copies begin.
    ended : callable
        Called with a call and the step whose copy has ended.
    failed : callable
        Called with a call whose device failed, and the error.
    """

    def __init__(
        self, opened: Callable[[Operation | Transfer], object], ended: Callable[[Operation | Transfer, int], object],
        failed: Callable[[Operation | Transfer, Exception], object],
    ) -> None:  # fmt: skip
        self._opened, self._ended, self._failed = opened, ended, failed
        self._calls: dict[Operation | Transfer, _Call] = {}
        self._under_way: dict[tuple[Operation | Transfer, int], Copy] = {}
        self._copies: Copies | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a device is copying, so that looking again soon is worth it."""
        return bool(self._under_way)

    @property
    def waits(self) -> bool:
        """Whether a call waits for what its caller queued."""
        return any(not call.is_open for call in self._calls.values())

    def begin(self, operation: Operation | Transfer, step: int, wanted: DeviceCopy) -> None:
        """Take in a step of a plan that copies, or the copy of a message, which is step 0."""
        self._calls.setdefault(operation, _Call()).steps.append((step, wanted))
        self._start(operation)

    def advance(self) -> None:
        """Begin what may begin, and report what has ended."""
        for operation in [operation for operation, call in self._calls.items() if not call.is_open]:
            self._start(operation)
        for (operation, step), copy in list(self._under_way.items()):
            if (operation, step) not in self._under_way:  # its call has failed meanwhile
                continue
            if not copy.is_past():
                continue
            del self._under_way[operation, step]
            if copy.error is not None:
                self._fail(operation, copy.error)
            else:
                self._ended(operation, step)

    def end(self, operation: Operation | Transfer) -> None:
        """Forget a call that ends: drop its copies that have not begun, and wait for those that have.

        Its arrays are the caller's then. Copies that have begun wait for nothing but the device.
        """
        self._calls.pop(operation, None)
        left = [copy for key, copy in self._under_way.items() if key[0] is operation]
        if left and self._copies is not None:
            self._copies.cancel(left)
        until_ns = time.monotonic_ns() + LONGEST_SETTLING_NS
        while not all(copy.is_past() for copy in left) and time.monotonic_ns() < until_ns:
            os.sched_yield()
        self._under_way = {key: copy for key, copy in self._under_way.items() if key[0] is not operation}

    def close(self) -> None:
        """Give streams back; nothing may be under way any more."""
        if self._copies is not None:
            self._copies.close()

    def _start(self, operation: Operation | Transfer) -> None:
        call, devices = self._calls[operation], operation.memory.devices
        try:
            if not call.is_open:
                if not all(gate.is_open() for gate in devices.gates):
                    return
                call.is_open = True
                self._opened(operation)
            while call.steps:
                step, wanted = call.steps.popleft()
                self._under_way[operation, step] = self._copy(wanted)
        except DeviceError as error:
            self._fail(operation, error)

    def _copy(self, wanted: DeviceCopy) -> Copy:
        if self._copies is None:
            self._copies = Copies(driver())
        buffer, begin, host, to_device = wanted
        return self._copies.begin(buffer, begin, host.size, host, to_device=to_device)

    def _fail(self, operation: Operation | Transfer, error: DeviceError) -> None:
        self._calls.pop(operation, None)
        if not operation.over:
            self._failed(operation, error)
