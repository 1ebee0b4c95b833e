"""Copies between arrays on devices and the host, on streams of detcoll's own.

Nobody blocks on a device: events are asked whether they are past, and memory may be used again when its copy is over.
Only a little is handed to the device at a time. The rest waits here, where a call that failed can take it back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray

from detcoll.device.driver import Driver
from detcoll.device.gate import wait_until
from detcoll.errors import DeviceError, UsageError

UNDER_WAY_BYTES = 8 * 1024**2
"""How much is handed to a device at a time in each direction, beside a single copy of any size."""


class Segment(NamedTuple):
    """Elements of a buffer that lie in one piece of device memory; ``first`` is the number of the first one."""

    first: int
    elems: int
    address: int


@dataclass(frozen=True, eq=False, slots=True)
class DeviceBuffer:
    """Elements, one after another, in one or more pieces of the memory of a device.

    ``segments`` : in order, the first one from element 0 on, without gaps.  ``owner`` : what the memory belongs to; it
    lives as long as the buffer.  ``itemsize`` : bytes of an element.
    """

    segments: tuple[Segment, ...]
    device: int
    owner: object
    itemsize: int

    @property
    def elems(self) -> int:
        """How many elements it has."""
        return self.segments[-1].first + self.segments[-1].elems if self.segments else 0

    def cut(self, begin: int, length: int) -> list[tuple[int, int, int]]:
        """Return where elements ``[begin, begin + length)`` lie: address, bytes from the first one on, and bytes.

        Raises
        ------
        UsageError
            If the buffer does not have them all.
        """
        end, found = begin + length, []
        if self.segments and 0 <= begin < end <= self.segments[0].elems:  # as below, for less
            return [(self.segments[0].address + begin * self.itemsize, 0, length * self.itemsize)]
        at = max(bisect_right(self.segments, begin, key=lambda each: each.first) - 1, 0)
        for segment in self.segments[at:]:
            low, high = max(begin, segment.first), min(end, segment.first + segment.elems)
            if low < high:
                address = segment.address + (low - segment.first) * self.itemsize
                found.append((address, (low - begin) * self.itemsize, (high - low) * self.itemsize))
            if segment.first + segment.elems >= end:
                break
        if sum(nbytes for _, _, nbytes in found) != length * self.itemsize:
            raise UsageError(f"elements {begin} to {end} are not all in the device buffer {self.segments}")
        return found


@dataclass(eq=False, slots=True)
class Copy:
    """A copy between a device and the host.

    ``is_over`` : whether it ended, as far as `Copies` was asked: nothing uses its memory any more.  ``error`` : why it
    failed; then its target holds unspecified values.
    """

    nbytes: int
    is_over: bool = False
    error: DeviceError | None = None
    _event: int = 0
    _lane: _Lane | None = None
    # What must stay alive; None when it is over.
    _buffer: DeviceBuffer | None = None
    _host: NDArray[Any] | None = None
    _pieces: Sequence[tuple[int, int, int]] = ()

    def is_past(self) -> bool:
        """Ask the device whether the copy ended; also begins copies that wait for it."""
        if not self.is_over and self._lane is not None:
            self._lane.advance()
        return self.is_over

    def _end(self, error: DeviceError | None = None) -> None:
        self.error = self.error or error
        self.is_over = True
        self._lane = self._buffer = self._host = None
        self._pieces = ()


class _Lane:
    """The copies of one direction and device, in order."""

    def __init__(self, cuda: Driver, device: int, to_device: bool) -> None:
        self.cuda = cuda
        self.device = device
        self.waiting: deque[Copy] = deque()
        self.under_way: deque[Copy] = deque()
        self.under_way_bytes = 0
        self.lost: DeviceError | None = None
        self._to_device = to_device
        self.stream = cuda.stream(device)

    def advance(self) -> None:
        """End what is past, and begin what may begin."""
        if not self.under_way and not self.waiting:
            return
        try:
            with self.cuda.on(self.device):
                while self.under_way and self._is_past(self.under_way[0]):
                    self._end(self.under_way.popleft())
                while self.waiting and self._has_room(self.waiting[0].nbytes):
                    self._begin(self.waiting.popleft())
        except DeviceError as error:
            self.lose(error)

    def lose(self, error: DeviceError) -> None:
        """End all copies: the device does not tell any more what becomes of them."""
        self.lost = error
        if not error.is_sticky:
            _abandoned.extend((copy._buffer, copy._host) for copy in self.under_way)
        while self.under_way or self.waiting:
            (self.under_way or self.waiting).popleft()._end(error)

    def _has_room(self, nbytes: int) -> bool:
        return not self.under_way or self.under_way_bytes + nbytes <= UNDER_WAY_BYTES

    def _is_past(self, copy: Copy) -> bool:
        return self.cuda.is_past(copy._event) if copy._event else self.cuda.is_idle(self.stream)

    def _end(self, copy: Copy) -> None:
        self.under_way_bytes -= copy.nbytes
        if copy._event:
            self.cuda.give_event(self.device, copy._event)
        copy._end()

    def _begin(self, copy: Copy) -> None:
        try:
            copy._event = self.cuda.take_event(self.device)
        except DeviceError as error:
            copy._end(error)
            return
        self.under_way.append(copy)
        self.under_way_bytes += copy.nbytes
        assert copy._host is not None
        host = copy._host.__array_interface__["data"][0]
        try:
            for address, offset, nbytes in copy._pieces:
                if self._to_device:
                    self.cuda.to_device(address, host + offset, nbytes, self.stream)
                else:
                    self.cuda.to_host(host + offset, address, nbytes, self.stream)
        except DeviceError as error:
            copy.error = error  # pieces that are queued already use the memory until the event is past
        try:
            self.cuda.record(copy._event, self.stream)
        except DeviceError as error:
            if error.is_sticky:
                raise
            copy.error, copy._event = copy.error or error, 0  # past with all that the stream holds


class Copies:
    """The copies of a job between its devices and the host; one thread at a time uses it.

    Whoever has many copies under way calls `advance` and then looks at `Copy.is_over` of each, which asks no device.

    Parameters
    ----------
    cuda : Driver
        The driver.
    """

    def __init__(self, cuda: Driver) -> None:
        self._cuda = cuda
        self._lanes: dict[tuple[int, bool], _Lane] = {}

    def begin(self, buffer: DeviceBuffer, begin: int, length: int, host: NDArray[Any], to_device: bool) -> Copy:
        """Copy elements ``[begin, begin + length)`` of a buffer to or from the host.

        The copy begins at once, or when earlier ones in its direction have made room. It uses a stream of detcoll, so
        what the buffer holds must be there already: see `detcoll.device.Gate`.

        Parameters
        ----------
        buffer : DeviceBuffer
            Kept alive until the copy is over.
        begin, length : int
            Elements of it.
        host : array, length elements or their bytes, C-contiguous, host
            Kept alive until the copy is over. If it is not pinned, the call blocks.
        to_device : bool
            The direction.

        Returns
        -------
        Copy
            Over and with ``error`` set if the device refused it.

        Raises
        ------
        UsageError
            If sizes do not fit, or ``host`` has gaps.
        """
        pieces = buffer.cut(begin, length)
        nbytes = length * buffer.itemsize
        if host.nbytes != nbytes or not host.flags.c_contiguous:
            raise UsageError(f"host has {host.nbytes} bytes, strides {host.strides}; expected {nbytes} bytes, no gaps")
        copy = Copy(nbytes, _buffer=buffer, _host=host, _pieces=pieces)
        if not nbytes:
            copy._end()
            return copy
        try:
            lane = copy._lane = self._lane(buffer.device, to_device)
        except DeviceError as error:
            copy._end(error)
            return copy
        lane.waiting.append(copy)
        if lane.lost is not None:
            lane.lose(lane.lost)
        lane.advance()
        return copy

    def advance(self) -> None:
        """End copies that are past, and begin those that may begin."""
        for lane in self._lanes.values():
            lane.advance()

    @property
    def idle(self) -> bool:
        """Whether no copy is under way or waits, as far as the device was asked."""
        return not any(lane.under_way or lane.waiting for lane in self._lanes.values())

    @property
    def is_lost(self) -> bool:
        """Whether a device does not tell any more what becomes of copies."""
        return any(lane.lost is not None for lane in self._lanes.values())

    def cancel(self, copies: Iterable[Copy]) -> None:
        """Drop those that have not begun; the others go on, and use their memory until they are over."""
        dropped = set(copies)
        for lane in self._lanes.values():
            kept: deque[Copy] = deque()
            for copy in lane.waiting:
                if copy in dropped:
                    copy._end()
                else:
                    kept.append(copy)
            lane.waiting = kept

    def drain(self, deadline_ns: int) -> bool:
        """Wait until no copy is under way or waits, and return whether that was so by the deadline."""

        def is_over() -> bool:
            self.advance()
            return self.idle

        return wait_until(is_over, deadline_ns)

    def close(self) -> None:
        """Drop what waits and give the streams up. The memory of copies under way is never used again."""
        for lane in self._lanes.values():
            self.cancel(tuple(lane.waiting))
            _abandoned.extend((copy._buffer, copy._host) for copy in lane.under_way)
            with suppress(DeviceError), self._cuda.on(lane.device):  # then there is nothing to give up
                self._cuda.destroy_stream(lane.stream)
        self._lanes.clear()

    def _lane(self, device: int, to_device: bool) -> _Lane:
        key = device, to_device
        if key not in self._lanes:
            self._lanes[key] = _Lane(self._cuda, device, to_device)
        return self._lanes[key]


_abandoned: list[tuple[DeviceBuffer | None, NDArray[Any] | None]] = []
"""Memory that devices may still use although nobody waits for it any more."""
