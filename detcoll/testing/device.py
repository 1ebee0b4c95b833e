"""A double of CUDA that is as late as it may be, and strict where CUDA is silent.

Device memory lies at addresses that the host does not have. Only `peek` and `poke` read and write it, which are the
test's; `kernel` queues a function of the test, as a program queues its kernels. Streams are queues, and nothing in them
happens before the test drives it: `drive` carries out all, `drive_one` one operation of a stream, and after `seeded`
each `is_past` and `is_idle` carries out one operation, drawn from those that may be next.

A copy fills its target with 0xFB when it is queued and writes it when it is carried out, from what its source holds
then. So whoever reads too early, or changes a source too early, gets wrong bytes. What no byte would show raises
`Misuse`: a use of freed memory or of another device, a missing or wrong `on`, host memory that two copies use or that
is unpinned too early. All of it is in `misuses` too, for errors raised on other threads.
"""

from __future__ import annotations

import ctypes
import os
import random
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.device import Driver, MemoryType, cuda, now
from detcoll.errors import DeviceError
from detcoll.testing.device_memory import DeviceArray, DeviceMemory, Misuse, PinnedRanges, refusal
from detcoll.testing.device_streams import Event, Operation, Stream, Streams, nothing

PENDING = 0xFB
"""What the bytes of a copy's target are until it is carried out."""


class StrictDevice(Driver):
    """Fake devices behind the interface of `detcoll.device.Driver`.

    Parameters
    ----------
    devices : int
        How many there are.
    used : collection of int, optional
        Those that the process uses already, by default all; `on` refuses others.

    ``unpinned`` : address and size of host memory that was copied without being pinned; such copies block.
    ``waits`` : how often `wait_for` was called.  ``misuses`` : what each `Misuse` said.
    """

    def __init__(self, devices: int = 2, used: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.unpinned: list[tuple[int, int]] = []
        self.misuses: list[str] = []
        self.waits = 0
        self._devices = tuple(range(devices))
        self._used = self._devices if used is None else used
        self._memory = DeviceMemory(self._misuse)
        self._allocated: list[DeviceArray] = []
        self._pinned = PinnedRanges(self._misuse)
        self._streams = Streams(self._misuse)
        self._failures: defaultdict[str, deque[int]] = defaultdict(deque)
        self._lost: dict[int, int] = {}
        self._random: random.Random | None = None
        self._lock = threading.RLock()
        self._thread = threading.local()
        self._process = os.getpid()

    # What the test does.

    def array(self, values: NDArray[Any], device: int = 0, stream: int = 0) -> DeviceArray:
        """Return a device array with these values."""
        with self._lock:  # ranks are threads, and two arrays must not get one address
            return self._memory.array(values, device, stream)

    def peek(self, array: DeviceArray) -> NDArray[Any]:
        """Return a copy of what a device array holds now."""
        held = self._memory.bytes_at(array.address, array.nbytes, array.device)
        return held.view(array.dtype).reshape(array.shape).copy()

    def poke(self, array: DeviceArray, values: object) -> None:
        """Write to a device array now."""
        held = self._memory.bytes_at(array.address, array.nbytes, array.device)
        held.view(array.dtype).reshape(array.shape)[...] = values

    def free(self, array: DeviceArray) -> None:
        """Free the memory of a device array, as happens with the array itself at the latest."""
        self._memory.free(array.address)

    def kernel(self, stream: int, function: Callable[[], None], device: int = 0) -> None:
        """Queue a function on a stream; ``device`` tells default streams apart."""
        with self._lock:
            self._streams.find(stream, device).queue.append(Operation(function))

    def drive(self) -> None:
        """Carry out all that streams hold; what waits for an event that nothing will make past stays."""
        with self._lock:
            while self._streams.run_one():
                pass

    def drive_one(self, stream: int, device: int = 0) -> bool:
        """Carry out one operation of a stream, and return whether there was one that may be next."""
        with self._lock:
            return self._streams.run_one(self._streams.find(stream, device))

    def seeded(self, seed: int) -> None:
        """Carry out one operation at each question from now on, drawn from those that may be next."""
        self._random = random.Random(seed)

    def capture(self, stream: int, is_captured: bool = True, device: int = 0) -> None:
        """Let a stream capture a CUDA graph, or end that."""
        self._streams.find(stream, device).is_captured = is_captured

    def fail(self, call: str, code: int) -> None:
        """Let the next call of a method fail; a code after which CUDA is of no use any more holds for its device."""
        self._failures[call].append(code)

    @property
    def pending(self) -> int:
        """How many operations streams hold."""
        return sum(len(stream.queue) for stream in self._streams.all)

    @property
    def pinned_bytes(self) -> int:
        """How much of the host's memory is pinned."""
        return self._pinned.nbytes

    def _misuse(self, said: str) -> Misuse:
        self.misuses.append(said)
        return Misuse(said)

    # What the code under test does.

    def on(self, device: int) -> AbstractContextManager[None]:
        """See `Driver.on`."""
        return _On(self, device)

    def stream(self, device: int) -> int:
        """See `Driver.stream`."""
        with self._lock, self.on(device):
            self._check("stream", device)
            return self._streams.make(device)

    def destroy_stream(self, stream: int) -> None:
        """See `Driver.destroy_stream`."""
        with self._lock:
            self._check("destroy_stream", self._stream(stream).device)
            self._streams.destroy(stream)

    def capturing(self, stream: int) -> bool:
        """See `Driver.capturing`."""
        with self._lock:
            found = self._stream(stream)
            self._check("capturing", found.device)
            if stream in (0, 1):
                return any(each.is_captured for each in self._streams.all if each.device == found.device)
            return found.is_captured

    def is_idle(self, stream: int) -> bool:
        """See `Driver.is_idle`."""
        with self._lock:
            found = self._stream(stream)
            self._check("is_idle", found.device)
            if found.is_captured:
                raise self._misuse("is_idle of a stream that captures a CUDA graph")
            if self._random is not None:
                self._streams.run_one(choose=self._random)
            return not found.queue

    def event(self, device: int) -> int:
        """See `Driver.event`."""
        with self._lock, self.on(device):
            self._check("event", device)
            return self._streams.make_event(device)

    def destroy_event(self, event: int) -> None:
        """See `Driver.destroy_event`."""
        with self._lock:
            self._check("destroy_event", self._streams.find_event(event).device)
            self._streams.destroy_event(event)

    def record(self, event: int, stream: int) -> None:
        """See `Driver.record`."""
        with self._lock:
            found, marked = self._stream(stream), self._streams.find_event(event)
            self._check("record", marked.device)
            if found.device != marked.device:
                raise self._misuse(f"an event of device {marked.device} is recorded on one of {found.device}")
            marked.is_captured = found.is_captured
            marked.mark = Operation(nothing)
            if not found.is_captured:
                found.queue.append(marked.mark)

    def is_past(self, event: int) -> bool:
        """See `Driver.is_past`."""
        with self._lock:
            marked = self._marked("is_past", event)
            if self._random is not None:
                self._streams.run_one(choose=self._random)
            return marked.mark is None or marked.mark.is_over

    def wait_for(self, event: int) -> None:
        """See `Driver.wait_for`."""
        with self._lock:
            marked = self._marked("wait_for", event)
            self.waits += 1
            if marked.mark is not None:
                self._streams.run_until_over(marked.mark)

    def order(self, stream: int, event: int) -> None:
        """See `Driver.order`."""
        with self._lock:
            found, mark = self._stream(stream), self._marked("order", event, of_stream=stream).mark
            found.queue.append(Operation(nothing, lambda: mark is None or mark.is_over))

    def to_host(self, host_address: int, device_address: int, nbytes: int, stream: int) -> None:
        """See `Driver.to_host`."""
        self._copy("to_host", host_address, device_address, nbytes, stream)

    def to_device(self, device_address: int, host_address: int, nbytes: int, stream: int) -> None:
        """See `Driver.to_device`."""
        self._copy("to_device", host_address, device_address, nbytes, stream)

    def allocate(self, device: int, nbytes: int) -> int:
        """See `Driver.allocate`."""
        with self._lock, self.on(device):
            self._check("allocate", device)
            self._allocated.append(self._memory.array(np.empty(nbytes, np.uint8), device, 0))
            return self._allocated[-1].address

    def register(self, address: int, nbytes: int) -> None:
        """See `Driver.register`."""
        with self._lock:
            self._check("register")
            self._pinned.add(address, nbytes)

    def unregister(self, address: int) -> None:
        """See `Driver.unregister`."""
        with self._lock:
            self._check("unregister")
            self._streams.check_unused(address, address + self._pinned.remove(address), "is unpinned")

    def device_of(self, address: int) -> int:
        """See `Driver.device_of`."""
        device = self._memory.find(address)
        if device is None:
            raise refusal("device_of", 1)
        return device

    def memory_type(self, address: int) -> MemoryType:
        """See `Driver.memory_type`."""
        if self._memory.find(address) is not None:
            return MemoryType.DEVICE
        return MemoryType.HOST if self._pinned.holds(address, 1) else MemoryType.UNKNOWN

    def pci_bus_id(self, device: int) -> str:
        """See `Driver.pci_bus_id`."""
        return f"0000:{device:02x}:00.0"

    def _copy(self, call: str, host: int, device_address: int, nbytes: int, stream: int) -> None:
        with self._lock:
            found = self._stream(stream)
            self._check(call, found.device)
            if found.is_captured:
                raise self._misuse(f"{call} on a stream that captures a CUDA graph")
            writes_host = call == "to_host"
            self._streams.check_unused(host, host + nbytes, f"is used by {call}", is_read=not writes_host)
            is_pinned = self._pinned.holds(host, nbytes)
            there = self._memory.bytes_at(device_address, nbytes, found.device)
            here = np.frombuffer(memoryview((ctypes.c_uint8 * nbytes).from_address(host)), np.uint8)
            (here if writes_host else there)[:] = PENDING

            def run() -> None:
                there = self._memory.bytes_at(device_address, nbytes, found.device)
                source, target = (there, here) if writes_host else (here, there)
                target[:] = source

            operation = Operation(run, host=(host, host + nbytes), writes_host=writes_host)
            found.queue.append(operation)
            if not is_pinned:
                self.unpinned.append((host, nbytes))
                self._streams.run_until_over(operation)

    def _marked(self, call: str, event: int, of_stream: int | None = None) -> Event:
        found = self._streams.find_event(event)
        self._check(call, found.device if of_stream is None else self._stream(of_stream).device)
        if found.is_captured:
            raise refusal(call, 907)
        return found

    def _check(self, call: str, device: int | None = None) -> None:
        """Check that ``device``, or else any, is current and of use, and that nothing makes this call fail."""
        self._check_process(call)
        current = self._current()
        if current is None or current != (current if device is None else device):
            raise self._misuse(f"{call} needs device {device} to be current; that is {current}")
        code = self._lost.get(current) or (self._failures[call].popleft() if self._failures[call] else 0)
        if code:
            error = refusal(call, code)
            if error.is_sticky:
                self._lost[current] = code
                self._streams.lose(current)
            raise error

    def _check_process(self, call: str) -> None:
        if os.getpid() != self._process:
            raise DeviceError(call, 3, "CUDA_ERROR_NOT_INITIALIZED", "CUDA cannot be used in a forked process")

    def _current(self) -> int | None:
        current = self._thread.__dict__.get("current")
        return current[-1] if current else None

    def _stream(self, handle: int) -> Stream:
        return self._streams.find(handle, self._current())


class _On:
    """Makes a device current until it is left: not a generator, which would be left when nobody holds it any more."""

    def __init__(self, strict: StrictDevice, device: int) -> None:
        self._strict, self._device = strict, device

    def __enter__(self) -> None:
        strict, device = self._strict, self._device
        strict._check_process("on")
        if strict._failures["on"]:
            raise refusal("on", strict._failures["on"].popleft())
        if device not in strict._used:
            raise refusal("on", 201 if device in strict._devices else 101)
        strict._thread.__dict__.setdefault("current", []).append(device)

    def __exit__(self, *_: object) -> None:
        self._strict._thread.__dict__["current"].pop()


@contextmanager
def in_place_of_cuda(devices: int = 2) -> Iterator[StrictDevice]:
    """Let all ranks of this process have so many fake devices; raise AssertionError at the end if one was misused."""
    strict, before = StrictDevice(devices), cuda._driver
    cuda._driver = strict  # type: ignore[assignment]
    now._shared.forget()
    try:
        yield strict
    finally:
        cuda._driver = before
        now._shared.forget()
    assert not strict.misuses, strict.misuses
