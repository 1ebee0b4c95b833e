"""Programs about collectives on arrays of devices, which are the strict double's: no device is needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from detcoll.buffers import bind
from detcoll.device import DeviceBuffer, Gate, Segment
from detcoll.errors import TransportError
from detcoll.runtime.devices import OnDevice
from detcoll.testing.device import StrictDevice, in_place_of_cuda
from detcoll.testing.device_streams import Operation, nothing
from detcoll.testing.fabric import Here
from detcoll.testing.programs.blocks import LATE_NS
from detcoll.testing.programs.collectives import supported
from detcoll.testing.values import exact, reduced_whole_numbers, whole_numbers
from detcoll.transport import NativeCall, NativeCollectives
from detcoll.types import DTYPES, ReduceOp


class _Doubled:
    """The devices of this process while any of its ranks is `inside`."""

    def __init__(self) -> None:
        self._turn, self._inside, self._devices = threading.Lock(), 0, ExitStack()

    @contextmanager
    def inside(self) -> Iterator[StrictDevice]:
        """Let this process have two fake devices; the last rank that leaves checks that they were used well."""
        with self._turn:
            if not self._inside:
                self._strict = self._devices.enter_context(in_place_of_cuda())
                self._strict.seeded(7)
            self._inside += 1
            strict = self._strict
        try:
            yield strict
        finally:
            with self._turn:
                self._inside -= 1
                if not self._inside:
                    self._devices.close()
        assert not strict.unpinned, "a copy used memory that is not pinned"


_doubled = _Doubled()


@dataclass
class Held:
    """An array on a device, whose values the caller's stream brings there."""

    strict: StrictDevice
    values: NDArray[Any]
    number: int = 0

    def __post_init__(self) -> None:
        with self.strict.on(self.number):
            self.stream = self.strict.stream(self.number)
        self.array = self.strict.array(np.full(self.values.nbytes, 0x77, np.uint8), self.number, self.stream)
        self.strict.kernel(self.stream, lambda: self.strict.poke(self.array, self.values.view(np.uint8)))

    def run(self, here: Here, kind: str, op: ReduceOp = ReduceOp.SUM, root: int = 0, timeout_s: float = 20) -> None:
        """Carry out a collective on the array."""
        assert isinstance(here.endpoint, NativeCollectives)
        size = self.values.itemsize
        buffer = DeviceBuffer((Segment(0, self.values.size, self.array.address),), self.number, self.array, size)
        on_device = OnDevice(buffer, [Gate(self.strict, self.number, self.stream)])
        outline = bind([self.values]).outline
        call = NativeCall(kind, outline, outline.size, op, root, device=on_device)
        try:
            here.endpoint.run(call, here.clock.now_ns() + round(timeout_s * 1e9))
        finally:
            on_device.release()
        assert self.strict._current() is None, "the device is still current"

    @property
    def bytes(self) -> bytes:
        """What the device has now."""
        return self.strict.peek(self.array).tobytes()


def each_call(here: Here, counts: list[int]) -> None:
    """Check collectives on one array, wherever ranks have theirs: all on devices, or some on the host."""
    assert isinstance(here.endpoint, NativeCollectives)
    with _doubled.inside() as strict:
        here.meet()
        one_a_size = {DTYPES[name].itemsize: name for name in sorted(here.capabilities.native_dtypes)}
        for name, op in supported(frozenset(one_a_size.values()), here.capabilities):
            for count in counts:
                given = whole_numbers(here.rank, count, op, DTYPES[name])
                wanted = reduced_whole_numbers(here.size, count, op, DTYPES[name])
                _check(here, strict, "all_reduce", given, wanted, op)
        if here.capabilities.supports("broadcast", np.dtype(np.float32), ReduceOp.MAX):
            given, wanted = (np.full(counts[-1], rank + 1.0, np.float32) for rank in (here.rank, 0))
            _check(here, strict, "broadcast", given, wanted, ReduceOp.MAX)
        here.meet()
        assert not strict.pending, "a call returned before its copies were past"


def _check(
    here: Here, strict: StrictDevice, kind: str, given: NDArray[Any], wanted: NDArray[Any], op: ReduceOp
) -> None:
    what = f"{kind} {op.value} of {given.size} {given.dtype} on rank {here.rank} of {here.size}"
    on_device = Held(strict, given, here.rank % 2)
    on_device.run(here, kind, op)
    values = np.frombuffer(on_device.bytes, given.dtype)
    np.testing.assert_array_equal(exact(values), exact(wanted), f"{what}, all on devices")
    if here.rank % 2:
        call = NativeCall(kind, given, given.size, op)
        here.endpoint.run(call, here.deadline_ns())  # type: ignore[attr-defined]
        np.testing.assert_array_equal(exact(given), exact(wanted), f"{what}, on the host")
    else:
        on_device = Held(strict, given)
        on_device.run(here, kind, op)
        values = np.frombuffer(on_device.bytes, given.dtype)
        np.testing.assert_array_equal(exact(values), exact(wanted), f"{what}, beside hosts")


def late_stream(here: Here, count: int) -> None:
    """Check that a call ends at its deadline while the caller's stream has not come to it, which copies nothing."""
    with _doubled.inside() as strict:
        here.meet()
        held, released = Held(strict, np.ones(count)), threading.Event()
        if here.rank == 0:
            strict._streams.find(held.stream, 0).queue.append(Operation(nothing, released.is_set))
        here.meet()
        with pytest.raises(TransportError):
            held.run(here, "all_reduce", timeout_s=LATE_NS / 1e9)
        here.meet()
        released.set()
        strict.drive()
        if here.rank == 0:
            assert held.bytes == np.ones(count).tobytes(), "the array was written to before its stream came"
        here.meet()
