"""The handle of a call that its caller waits on."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

from detcoll.errors import DeadlineMissed
from detcoll.priority import short_turns

log = logging.getLogger("detcoll")

Callback = Callable[["Work"], object]


class Work:
    """Handle of an asynchronous collective, `send` or `recv`.

    The array passed to the call belongs to detcoll until the call has ended. All methods are thread-safe.
    """

    def __init__(self, name: str, value: Any = None, sequence: int = -1) -> None:
        self._name, self._value = name, value
        self.sequence = sequence
        """The number of a collective in its group; -1 of a message."""
        self._finished = threading.Event()
        self._error: Exception | None = None
        self._lock = threading.Lock()
        self._callbacks: list[Callback] = []
        self._notices: list[Callable[[], object]] = []
        self._source: int | None = None
        self._tag: int | None = None

    @property
    def source(self) -> int | None:
        """Of a `recv` that has ended: the rank of the group that the message came from. Otherwise None."""
        return self._source

    @property
    def tag(self) -> int | None:
        """Of a `recv` that has ended: the tag of the message. Otherwise None."""
        return self._tag

    def __repr__(self) -> str:
        """Return the name of the collective and its state."""
        if not self._finished.is_set():
            return f"<Work {self._name}: under way>"
        return f"<Work {self._name}: {'ended' if self._error is None else f'failed, {self._error}'}>"

    def done(self) -> bool:
        """Return whether the collective has ended, successfully or not; if so, `wait` does not block."""
        return self._finished.is_set()

    def wait(self, timeout: float | None = None) -> Any:
        """Block until the result is in the caller's array.

        If an exception such as KeyboardInterrupt interrupts the wait, the collective goes on; call `wait` again.

        Parameters
        ----------
        timeout : float, optional
            Longest time to wait, in seconds; by default unlimited. The collective's own timeout applies in any case.

        Returns
        -------
        array, int or None
            The output of a collective that has one, such as `Communicator.all_gather`; of a `recv`, its `source`.
            Else None.

        Raises
        ------
        DeadlineMissed
            If ``timeout`` passes first. The collective goes on and can be waited for again.
        DetcollError
            The error that ended the collective.
        """
        if not self._finished.is_set():
            with short_turns():  # otherwise the caller may wake milliseconds late on a busy machine
                self._finished.wait(timeout)
        if not self._finished.is_set():
            raise DeadlineMissed(f"{self._name} is not finished after {timeout} s")
        if self._error is not None:
            raise self._error
        return self._value if self._source is None else self._source

    def result(self, timeout: float | None = None) -> Any:
        """Call `wait`; named as in `concurrent.futures.Future`."""
        return self.wait(timeout)

    def exception(self, timeout: float | None = None) -> Exception | None:
        """Block until the collective has ended; return the error that ended it, or None on success.

        Parameters
        ----------
        timeout : float, optional
            Longest time to wait, in seconds; by default unlimited.

        Raises
        ------
        DeadlineMissed
            If ``timeout`` passes first.
        """
        if not self._finished.wait(timeout):
            raise DeadlineMissed(f"{self._name} is not finished after {timeout} s")
        return self._error

    def add_done_callback(self, callback: Callback) -> None:
        """Schedule ``callback(work)`` for when the collective has ended, or immediately if it has.

        Callbacks run one after another on a thread of detcoll, in the order in which collectives end. A callback that
        blocks delays later callbacks but no collective. Exceptions raised by callbacks are logged.
        """
        with self._lock:
            if not self._finished.is_set():
                self._callbacks.append(callback)
                return
        _callers.call(callback, self)

    def notify(self, notice: Callable[[], object]) -> None:
        """Call ``notice`` on the thread that ends the collective, or immediately if it has ended.

        That thread serves all collectives, so ``notice`` only hands over to another one, and raises nothing.
        """
        with self._lock:
            if not self._finished.is_set():
                self._notices.append(notice)
                return
        notice()

    def as_future(self) -> concurrent.futures.Future[Any]:
        """Return a future that completes with the call, with the result of `wait`; it cannot be cancelled."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()

        def end(work: Work) -> None:
            error = work.exception()
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(work.wait())

        self.add_done_callback(end)
        return future

    def came(self, source: int, tag: int) -> None:
        """Keep where the message of a `recv` came from; before `finish`."""
        self._source, self._tag = source, tag

    def finish(self, error: Exception | None = None) -> None:
        """Mark the collective as ended, with ``error`` if it failed; only the first call has an effect."""
        with self._lock:
            if self._finished.is_set():
                return
            self._error = error
            self._finished.set()
            callbacks, self._callbacks = self._callbacks, []
            notices, self._notices = self._notices, []
        for notice in notices:
            notice()
        for callback in callbacks:
            _callers.call(callback, self)


class _Callers:
    """The thread that runs callbacks; started with the first callback."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Reset the state, as in a forked child, which has no such thread; the parent runs the queued callbacks."""
        self._queue: queue.SimpleQueue[tuple[Callback, Work]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def call(self, callback: Callback, work: Work) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="detcoll-callbacks", daemon=True)
                self._thread.start()
        self._queue.put((callback, work))

    def _serve(self) -> None:
        while True:
            callback, work = self._queue.get()
            try:
                callback(work)
            except Exception:
                log.exception("a callback of a collective failed")


_callers = _Callers()
os.register_at_fork(after_in_child=_callers.forget)
