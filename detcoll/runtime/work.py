"""A collective under way, as its caller holds it."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import queue
import threading
from collections.abc import Callable

from detcoll.errors import DeadlineMissed
from detcoll.priority import short_turns

log = logging.getLogger("detcoll")

Callback = Callable[["Work"], object]


class Work:
    """A collective under way.

    The array given to the collective belongs to detcoll until the collective has ended.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._finished = threading.Event()
        self._error: Exception | None = None
        self._lock = threading.Lock()
        self._callbacks: list[Callback] = []

    def __repr__(self) -> str:
        """Return what was called, and whether it has ended."""
        if not self._finished.is_set():
            return f"<Work {self._name}: under way>"
        return f"<Work {self._name}: {'ended' if self._error is None else f'failed, {self._error}'}>"

    def done(self) -> bool:
        """Tell whether the collective has ended, well or not; `wait` then returns at once."""
        return self._finished.is_set()

    def wait(self, timeout: float | None = None) -> None:
        """Return once the result is in the caller's array.

        An exception that interrupts the wait, such as KeyboardInterrupt, leaves the collective under way: wait again.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait at most; the collective's own timeout holds in any case.

        Raises
        ------
        DeadlineMissed
            If ``timeout`` passes first; the collective goes on and may be waited for again.
        DetcollError
            Whatever ended the collective.
        """
        if not self._finished.is_set():
            with short_turns():  # on a busy machine the caller would wait milliseconds for its result otherwise
                self._finished.wait(timeout)
        if not self._finished.is_set():
            raise DeadlineMissed(f"{self._name} is not finished after {timeout} s")
        if self._error is not None:
            raise self._error

    def result(self, timeout: float | None = None) -> None:
        """Do as `wait`; the name that `concurrent.futures.Future` has for it."""
        self.wait(timeout)

    def exception(self, timeout: float | None = None) -> Exception | None:
        """Return what ended the collective, or None where it ended well; wait for that as `wait` does.

        Raises
        ------
        DeadlineMissed
            If ``timeout`` passes first.
        """
        if not self._finished.wait(timeout):
            raise DeadlineMissed(f"{self._name} is not finished after {timeout} s")
        return self._error

    def add_done_callback(self, callback: Callback) -> None:
        """Call ``callback(work)`` once the collective has ended, at once if it has.

        Callbacks run on a thread of detcoll's own, one after another in the order in which collectives end. One that
        blocks delays the callbacks behind it, and no collective. What a callback raises is logged.
        """
        with self._lock:
            if not self._finished.is_set():
                self._callbacks.append(callback)
                return
        _callers.call(callback, self)

    def as_future(self) -> concurrent.futures.Future[None]:
        """Return a future that ends as the collective does; cancelling it does not end the collective."""
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()

        def end(work: Work) -> None:
            error = work.exception()
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(None)

        self.add_done_callback(end)
        return future

    def finish(self, error: Exception | None = None) -> None:
        """Say that the collective has ended; the first call counts."""
        with self._lock:
            if self._finished.is_set():
                return
            self._error = error
            self._finished.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            _callers.call(callback, self)


class _Callers:
    """The thread that runs callbacks, started with the first one."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, as in a forked child, which has no such thread and whose parent runs what was queued."""
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
