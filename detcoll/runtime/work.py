"""A collective under way, as its caller holds it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from detcoll.errors import DeadlineMissed
from detcoll.priority import short_turns


class Work:
    """A collective under way.

    The array given to the collective belongs to detcoll until `wait` has returned.
    """

    def __init__(self, name: str, store: Callable[[], None] | None = None) -> None:
        self._name = name
        self._finished = threading.Event()
        self._error: Exception | None = None
        self._store = store
        self._lock = threading.Lock()

    def done(self) -> bool:
        """Tell whether the collective has ended, well or not; `wait` then returns at once."""
        return self._finished.is_set()

    def wait(self, timeout: float | None = None) -> None:
        """Return once the result is in the caller's array.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait at most; the collective's own deadline holds in any case.

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
        with self._lock:
            store, self._store = self._store, None
            if store is not None:
                store()

    def finish(self, error: Exception | None = None) -> None:
        """Say that the collective has ended; the first call counts."""
        if not self._finished.is_set():
            self._error = error
            self._finished.set()
