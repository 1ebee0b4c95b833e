"""The wait for the caller's stream, without blocking on the device."""

from __future__ import annotations

import time
from collections.abc import Callable

from detcoll.device.driver import Driver
from detcoll.errors import DeadlineMissed, DetcollError, UsageError

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 50e-6, 1e-3


def wait_until(is_over: Callable[[], bool], deadline_ns: int) -> bool:
    """Ask until ``is_over`` or the deadline; return whether it is.

    Pauses are an eighth of the time so far, so little is lost after the end. The system makes no pause shorter than 50
    us; instead, other threads get Python's lock in between.
    """
    begun_ns = time.monotonic_ns()
    while not is_over():
        now_ns = time.monotonic_ns()
        if now_ns >= deadline_ns:
            return False
        pause_s = min((now_ns - begun_ns) / 8e9, _LONGEST_PAUSE_S)
        time.sleep(pause_s if pause_s >= _SHORTEST_PAUSE_S else 0)
    return True


def _no_trouble() -> None:
    return None


class Gate:
    """What the caller's stream held when a collective was called; copies of the call begin when it is past.

    Only one thread at a time asks a gate, which need not be the caller's.

    Parameters
    ----------
    cuda : Driver
        The driver.
    device : int
        The device of the stream.
    stream : int
        The handle of the caller's stream, on the caller's thread: 2 is the default stream of the thread.

    Raises
    ------
    UsageError
        If the stream captures a CUDA graph, where a collective cannot be part of it.
    DeviceError
        If the device cannot be used.
    """

    def __init__(self, cuda: Driver, device: int, stream: int) -> None:
        self._cuda = cuda
        self._device = device
        self._event: int | None = None
        with cuda.on(device):
            if cuda.capturing(stream):
                raise UsageError(
                    f"stream {stream:#x} of cuda:{device} is in CUDA graph capture, of which a collective of detcoll "
                    "cannot be part; call it outside of the graph"
                )
            self._event = cuda.take_event(device)
            cuda.record(self._event, stream)

    def is_open(self) -> bool:
        """Tell whether the caller's stream has come to the call; asks the device until it has.

        Raises
        ------
        DeviceError
            If the device cannot be used any more.
        """
        if self._event is not None:
            with self._cuda.on(self._device):
                if self._cuda.is_past(self._event):
                    self._give_event()
        return self._event is None

    def wait(self, deadline_ns: int, trouble: Callable[[], DetcollError | None] = _no_trouble) -> None:
        """Wait until the gate is open.

        Parameters
        ----------
        deadline_ns : int
            When to give up, on the monotonic clock.
        trouble : callable
            Asked again and again; an error that it returns is raised.

        Raises
        ------
        DeadlineMissed
            If the caller's stream has not come to the call by then.
        DeviceError
            If the device cannot be used any more.
        """

        def is_over() -> bool:
            error = trouble()
            if error is not None:
                raise error
            return self.is_open()

        if not wait_until(is_over, deadline_ns):
            raise DeadlineMissed(
                f"the caller's stream of cuda:{self._device} did not come to the collective before its deadline; "
                "expected the work queued ahead of it to end"
            )

    def __del__(self) -> None:
        self._give_event()

    def _give_event(self) -> None:
        if self._event is not None:
            self._cuda.give_event(self._device, self._event)
            self._event = None
