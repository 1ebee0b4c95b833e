"""Threads that complete futures and run callbacks, so that nothing that a callback does stops detcoll.

A callback may block, for instance in a collective of its own. So a task that finds all threads busy gets a new one, and
no task waits for another. Tasks are started in the order in which they are given.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable

log = logging.getLogger("detcoll")

KEPT_THREADS = 4
"""So many threads stay when there is nothing to do."""


class _Threads:
    """The threads; started when there is work."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Reset the state, as in a forked child, which has none of these threads."""
        self._tasks: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._idle = 0

    def run(self, task: Callable[[], object]) -> None:
        """Run a task soon, whatever the earlier ones do."""
        with self._changed:
            self._tasks.append(task)
            if self._idle >= len(self._tasks):
                self._changed.notify()
                return
        threading.Thread(target=self._serve, name="detcoll-torch", daemon=True).start()

    def _serve(self) -> None:
        while True:
            with self._changed:
                if not self._tasks:
                    if self._idle >= KEPT_THREADS:
                        return
                    self._idle += 1
                    while not self._tasks:
                        self._changed.wait()
                    self._idle -= 1
                task = self._tasks.popleft()
            try:
                task()
            except BaseException:  # such as SystemExit, which would end this thread alone
                log.exception("a callback of a collective failed")


_threads = _Threads()
run = _threads.run
os.register_at_fork(after_in_child=_threads.forget)
