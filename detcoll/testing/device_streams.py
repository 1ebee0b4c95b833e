"""The streams and events of `detcoll.testing.device.StrictDevice`: queues that nothing empties by itself."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from detcoll.testing.device_memory import Misuse

PER_THREAD = 2
"""The largest handle of a default stream."""

_FIRST_HANDLE = (1 << 40) + 8


def _now() -> bool:
    return True


def nothing() -> None:
    """Carry out an operation that is only a place in a stream."""


@dataclass(eq=False, slots=True)
class Operation:
    """What a stream holds.

    ``host`` : the host memory that a copy uses, from its first address to behind its last.  ``writes_host`` : whether
    the copy writes there.
    """

    run: Callable[[], None]
    may_run: Callable[[], bool] = _now
    host: tuple[int, int] = (0, 0)
    writes_host: bool = False
    is_over: bool = False


@dataclass(eq=False, slots=True)
class Stream:
    """What is queued on a stream of a device, and whether it becomes part of a CUDA graph instead."""

    device: int
    queue: deque[Operation] = field(default_factory=deque)
    is_captured: bool = False


@dataclass(eq=False, slots=True)
class Event:
    """``mark`` : the operation that makes it past, of the last time it was recorded."""

    device: int
    mark: Operation | None = None
    is_captured: bool = False


class Streams:
    """All streams and events of the fake devices, by their handles."""

    def __init__(self, misuse: Callable[[str], Misuse]) -> None:
        self._misuse = misuse
        self._made: dict[int, Stream] = {}
        self._defaults: dict[tuple[int, int], Stream] = {}
        self._abandoned: list[Stream] = []
        self._events: dict[int, Event] = {}
        self._next = _FIRST_HANDLE

    def make(self, device: int) -> int:
        """Make a stream and return its handle."""
        self._next += 8
        self._made[self._next] = Stream(device)
        return self._next

    def make_event(self, device: int) -> int:
        """Make an event and return its handle."""
        self._next += 8
        self._events[self._next] = Event(device)
        return self._next

    def find(self, handle: int, device: int | None) -> Stream:
        """Return a stream; ``device`` tells default streams apart."""
        if handle > PER_THREAD:
            if handle not in self._made:
                raise self._misuse(f"there is no stream {handle:#x}")
            return self._made[handle]
        if device is None:
            raise self._misuse(f"the default stream {handle} needs a device to be current")
        thread = threading.get_ident() if handle == PER_THREAD else 0
        return self._defaults.setdefault((device, thread), Stream(device))

    def find_event(self, handle: int) -> Event:
        """Return an event."""
        if handle not in self._events:
            raise self._misuse(f"there is no event {handle:#x}")
        return self._events[handle]

    def destroy(self, handle: int) -> None:
        """Forget a handle; what the stream holds is still carried out."""
        self._abandoned.append(self._made.pop(handle))

    def destroy_event(self, handle: int) -> None:
        """Forget an event."""
        del self._events[handle]

    @property
    def all(self) -> list[Stream]:
        """Every stream."""
        return [*self._made.values(), *self._defaults.values(), *self._abandoned]

    def check_unused(self, begin: int, end: int, said: str, is_read: bool = False) -> None:
        """Raise Misuse if a copy under way uses host memory from ``begin`` to ``end``, unless both only read it."""
        for each in (operation for stream in self.all for operation in stream.queue):
            if each.host[0] < end and begin < each.host[1] and (each.writes_host or not is_read):
                raise self._misuse(f"host memory at {begin:#x} {said} while a copy uses it")

    def lose(self, device: int) -> None:
        """End what the streams of a device hold: it is not carried out."""
        for stream in self.all:
            if stream.device == device:
                while stream.queue:
                    stream.queue.popleft().is_over = True

    def run_one(self, stream: Stream | None = None, choose: random.Random | None = None) -> bool:
        """Carry out one operation, of ``stream`` if given, and return whether there was one that may be next."""
        among = self.all if stream is None else [stream]
        runnable = [each for each in among if each.queue and each.queue[0].may_run()]
        if not runnable:
            return False
        chosen = runnable[0] if choose is None else choose.choice(runnable)
        operation = chosen.queue.popleft()
        operation.is_over = True
        operation.run()
        return True

    def run_until_over(self, operation: Operation) -> None:
        """Block, as the host does; what it waits for must be able to happen."""
        while not operation.is_over:
            if not self.run_one():
                raise self._misuse("a call blocks, and nothing can happen that would end it")
